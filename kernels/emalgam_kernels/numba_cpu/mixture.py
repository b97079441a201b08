"""The E-step and its statistics, compiled by Numba on first use: blocks of rows through the tile loop of tiles.py.

The functions are specified in `emalgam_kernels.reference.mixture`. One jitted function serves the three of them. It is
compiled once for each combination of packed or direct, x's dtype and the arithmetic dtype that occurs, whatever the
strides of x, and kept on disk.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numba
import numpy as np

from emalgam_kernels import contract, polynomials
from emalgam_kernels.blocks import (
    CACHE_LINE,
    for_each_block,
    native_slices,
    rows_per_block,
    sum_over_blocks,
    tile_dtype,
    workspace,
)
from emalgam_kernels.numba_cpu import tiles
from emalgam_kernels.numba_cpu.compilation import compile_function
from emalgam_kernels.numba_cpu.tiles import (
    FEATURE_MAP_CODES,
    OPTIONS,
    STATISTICS_AT_ONCE,
    column_step,
    compiled,
    direct_logit_tile,
    direct_statistic_tile,
    inner_product,
    load_tile,
    logit_tile,
    pack_natural,
    packed_logit_tile,
    packed_statistic_tile,
    padded,
    softmax_tile,
)
from emalgam_kernels.parameters import Direct, Packed

# Tile sizes: Φ, logits and x of a tile share the second-level cache; a block of Φ is kept for both products.
FEATURES_AT_ONCE: Final = 160
TILE_BYTES: Final = 448 * 1024
MOST_ROW_BYTES: Final = 2048


class Problem(NamedTuple):
    """What all blocks share. Arrays are C-contiguous; their dtype is the arithmetic one unless said otherwise."""

    feature_map: int
    hard: bool
    n_components: int
    columns: int  # T
    step: int  # what `columns` of every tile, the last included, is a multiple of
    shift: np.ndarray  # (D,) float64
    scale: np.ndarray  # (D,) float64
    whitening: np.ndarray  # Wᵀ, packed; or empty
    coefficients: np.ndarray  # (1, K, padded F) η; direct: what direct_logit_tile calls factors
    means: np.ndarray | None  # (K, D); None if packed
    log_constants: np.ndarray  # (K,); or empty


class Tiles(NamedTuple):
    """One thread's scratch memory: rows of one C-contiguous array of the arithmetic dtype, T and a cache line wide."""

    z: np.ndarray  # padded D
    second: np.ndarray  # D + 1: z after whitening; direct: P_kᵀ (z − μ_k), then r y
    phi: np.ndarray  # rows of Φ kept at once; direct: y
    logits: np.ndarray  # K
    rows: np.ndarray  # 3: weight, log p, and scratch
    products: np.ndarray  # float64: what direct_statistic_tile wants


# ---- compiled ------------------------------------------------------------------------------------------------------

# Numba knows when it compiles whether `means` is None, and leaves out the branch that is not taken: packed parameters
# do not wait for the compilation of direct ones.


@compiled(OPTIONS)
def _logits(problem: Problem, means: np.ndarray | None, work: Tiles, z: np.ndarray, columns: int) -> None:
    """L of one tile; the features stay in work.phi if there is only one block of them."""
    if means is None:
        natural = problem.coefficients[0]
        packed_logit_tile(problem.feature_map, natural, z, columns, False, work.phi, work.logits)
    else:
        factors, log_constants = problem.coefficients, problem.log_constants
        direct_logit_tile(
            problem.feature_map, factors, means, log_constants, z, columns, work.phi, work.second, work.logits
        )


@compiled(OPTIONS)
def _statistics(
    problem: Problem, means: np.ndarray | None, work: Tiles, z: np.ndarray, columns: int, statistics: np.ndarray
) -> None:
    """S += the statistics of one tile."""
    if means is None:
        ready = len(work.phi) >= statistics.shape[1]
        packed_statistic_tile(problem.feature_map, z, work.logits, columns, ready, work.phi, statistics)
    else:
        direct_statistic_tile(
            problem.feature_map, means, z, work.logits, columns, work.phi, work.second, work.products, statistics
        )


def _block_function(version: str) -> Callable[..., float]:
    """The tile loop, as a closure over `version`: see `emalgam_kernels.numba_cpu.compilation`."""

    def mixture_block(
        problem: Problem,
        work: Tiles,
        x: np.ndarray,
        sample_weight: np.ndarray,
        log_prob: np.ndarray,
        responsibilities: np.ndarray,
        statistics: np.ndarray,
    ) -> float:
        """Load, logits, log-sum-exp, and whichever results have a place, tile by tile; returns Σ ω log p."""
        _ = version
        N, D, K, T = len(x), len(problem.shift), problem.n_components, problem.columns
        weight, log_p, scratch = work.rows[0], work.rows[1], work.rows[2]
        total = 0.0
        for start in range(0, N, T):
            stop = min(start + T, N)
            rows = stop - start
            columns = (rows + problem.step - 1) // problem.step * problem.step
            load_tile(x[start:stop], sample_weight[start:stop], columns, problem.shift, problem.scale, weight, work.z)
            z = work.z[:D]
            if len(problem.whitening) > 0:
                logit_tile(problem.whitening, 0, work.z, columns, False, work.second)
                z = work.second[:D]
            _logits(problem, problem.means, work, z, columns)
            softmax_tile(work.logits, K, columns, weight, problem.hard, log_p, scratch)
            for n in range(min(rows, len(log_prob) - start)):
                log_prob[start + n] = log_p[n]
            for n in range(min(rows, len(responsibilities) - start)):
                for k in range(K):
                    responsibilities[start + n, k] = work.logits[k, n]
            if len(statistics) > 0:
                total += inner_product(weight, log_p, rows)
                _statistics(problem, problem.means, work, z, columns, statistics)
        return total

    return mixture_block


_compiled: dict[tuple[str, str, str], Callable[..., float]] = {}
_compiling = threading.Lock()


def _compiled_block(x_dtype: np.dtype, problem: Problem) -> Callable[..., float]:
    """mixture_block for one dtype of x and one arithmetic; any strides, read-only or not, go to the same code."""
    dtype = problem.coefficients.dtype
    key = "packed" if problem.means is None else "direct", str(x_dtype.char), str(dtype.char)
    with _compiling:
        if key not in _compiled:
            types: Any = numba.types
            typeof: Any = numba.typeof
            float64, array, empty = types.float64, types.Array, np.empty((0, 0), dtype)
            signature = float64(
                typeof(problem),
                typeof(Tiles(empty, empty, empty, empty, empty, np.empty((0, 0)))),
                array(typeof(x_dtype).dtype, 2, "A", readonly=True),
                array(float64, 1, "A", readonly=True),
                array(float64, 1, "A"),
                array(typeof(dtype).dtype, 2, "A"),
                array(float64, 2, "C"),
            )
            _compiled[key] = compile_function(_block_name(*key), _block_function, signature, (tiles, polynomials))
        return _compiled[key]


def _block_name(form: str, x: str, arithmetic: str) -> str:
    return f"mixture_block ({form}, {np.dtype(x)} samples, {np.dtype(arithmetic)} arithmetic)"


# ---- blocks --------------------------------------------------------------------------------------------------------


def _coefficients(parameters: Packed | Direct) -> np.ndarray:
    """The coefficients as logit_tile and direct_logit_tile read them."""
    if isinstance(parameters, Packed):
        return pack_natural(parameters.natural[None], parameters.arithmetic)
    factors = parameters.precisions_cholesky
    if parameters.feature_map == "diag":
        return factors[:, None].astype(parameters.arithmetic, order="C")
    shared = factors.strides[0] == 0
    return pack_natural((factors[:1] if shared else factors).transpose(0, 2, 1), parameters.arithmetic)


def _features_at_once(parameters: Packed | Direct, n_features: int) -> int:
    """Rows of Φ in a tile: F in equal pieces of at most FEATURES_AT_ONCE; direct: D + 1."""
    if isinstance(parameters, Direct):
        return padded(n_features + 1, STATISTICS_AT_ONCE)
    pieces = -(-parameters.n_statistics // FEATURES_AT_ONCE)
    return padded(-(-parameters.n_statistics // pieces), STATISTICS_AT_ONCE)


def _heights(n_features: int, n_components: int, features_at_once: int) -> tuple[int, int, int, int, int]:
    """Rows of z, second, phi, logits and rows in `Tiles`."""
    return padded(n_features, STATISTICS_AT_ONCE), n_features + 1, features_at_once, n_components, 3


def _tile_columns(height: int, itemsize: int, step: int) -> int:
    """T: as many columns of `height` elements as fit, in whole steps."""
    return min(max(TILE_BYTES // (height * itemsize) // step * step, step), MOST_ROW_BYTES // itemsize)


class Blocks:
    """What the blocks of one call share."""

    def __init__(self, x: np.ndarray, parameters: Packed | Direct, hard: bool = False) -> None:
        D, K, self.dtype = x.shape[1], parameters.n_components, np.dtype(parameters.arithmetic)
        features, step = _features_at_once(parameters, D), column_step(parameters.arithmetic)
        self.heights = _heights(D, K, features)
        whitening, means, log_constants = np.empty((0, 0)), None, np.empty(0)
        if isinstance(parameters, Direct):
            means, log_constants = parameters.means, parameters.log_constants
        elif parameters.whitening is not None:
            whitening = pack_natural(parameters.whitening.T, parameters.arithmetic)
        self.problem = Problem(
            feature_map=FEATURE_MAP_CODES[parameters.feature_map],
            hard=bool(hard),
            n_components=K,
            columns=_tile_columns(sum(self.heights), self.dtype.itemsize, step),
            step=step,
            shift=np.array(parameters.shift),
            scale=np.array(parameters.scale),
            whitening=whitening.astype(self.dtype),
            coefficients=_coefficients(parameters),
            means=None if means is None else means.astype(self.dtype, order="C"),
            log_constants=log_constants.astype(self.dtype),
        )
        self.function = _compiled_block(tile_dtype(x), self.problem)

    def tiles(self) -> Tiles:
        """The calling thread's scratch memory."""
        stride = self.problem.columns + CACHE_LINE // self.dtype.itemsize  # rows a power of two apart share cache sets
        size = sum(self.heights) * stride * self.dtype.itemsize
        memory = workspace(size + CACHE_LINE)
        start = -memory.ctypes.data % CACHE_LINE
        whole = memory[start : start + size].view(self.dtype).reshape(-1, stride)
        ends = itertools.accumulate(self.heights)
        z, second, phi, logits, rows = (
            whole[end - height : end] for height, end in zip(self.heights, ends, strict=True)
        )
        products = np.empty((len(second), len(phi)) if self.problem.means is not None else (0, 0))
        return Tiles(z, second, phi, logits, rows, products)

    def run(
        self,
        rows: np.ndarray,
        sample_weight: np.ndarray | None = None,
        log_prob: np.ndarray | None = None,
        responsibilities: np.ndarray | None = None,
        statistics: np.ndarray | None = None,
    ) -> float:
        """Call the compiled function for native rows of x; a result that has no place is not wanted."""
        return self.function(
            self.problem,
            self.tiles(),
            rows,
            np.empty(0) if sample_weight is None else sample_weight,
            np.empty(0) if log_prob is None else log_prob,
            np.empty((0, 0), self.dtype) if responsibilities is None else responsibilities,
            np.empty((0, 0)) if statistics is None else statistics,
        )


def log_prob(x: np.ndarray, parameters: Packed | Direct, out: np.ndarray, n_threads: int = 1) -> None:
    """log p(x_n); see `emalgam_kernels.reference.mixture.log_prob`."""
    contract.log_prob(x, parameters, out)
    blocks = Blocks(x, parameters)

    def block(start: int, stop: int) -> None:
        for first, last, rows in native_slices(x, start, stop):
            blocks.run(rows, log_prob=out[first:last])

    for_each_block(block, len(x), rows_per_block(parameters.n_components, parameters.n_statistics), n_threads)


def responsibilities(
    x: np.ndarray,
    parameters: Packed | Direct,
    out: np.ndarray,
    n_threads: int = 1,
    log_prob: np.ndarray | None = None,
) -> None:
    """r_nk; see `emalgam_kernels.reference.mixture.responsibilities`."""
    contract.responsibilities(x, parameters, out, log_prob)
    blocks = Blocks(x, parameters)

    def block(start: int, stop: int) -> None:
        for first, last, rows in native_slices(x, start, stop):
            same = out.dtype == blocks.dtype
            r = out[first:last] if same else np.empty((last - first, parameters.n_components), blocks.dtype)
            blocks.run(rows, log_prob=None if log_prob is None else log_prob[first:last], responsibilities=r)
            if not same:
                out[first:last] = r

    for_each_block(block, len(x), rows_per_block(parameters.n_components, parameters.n_statistics), n_threads)


def em_statistics(
    x: np.ndarray,
    sample_weight: np.ndarray | None,
    parameters: Packed | Direct,
    out: np.ndarray,
    hard: bool = False,
    n_threads: int = 1,
) -> float:
    """S and Σ ω log p; see `emalgam_kernels.reference.mixture.em_statistics`."""
    contract.em_statistics(x, sample_weight, parameters, out)
    blocks = Blocks(x, parameters, hard)
    K, F = out.shape

    def block(start: int, stop: int, partial: np.ndarray) -> float:
        total = 0.0
        for first, last, rows in native_slices(x, start, stop):
            weight = None if sample_weight is None else sample_weight[first:last]
            total += blocks.run(rows, weight, statistics=partial)
        return total

    whole = np.empty((K, padded(F, STATISTICS_AT_ONCE)))
    total = sum_over_blocks(block, len(x), rows_per_block(K, F), whole, n_threads)
    out[...] = whole[:, :F]
    return total
