"""Random numbers, samples of mixtures and Monte Carlo divergences, compiled by Numba on first use: loops over draws.py.

The functions are specified in `emalgam_kernels.reference.sampling`. Three jitted functions serve them, each compiled
once for each dtype, whatever the strides of `out`, and kept on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numba
import numpy as np

from emalgam_kernels import contract, polynomials, scalars
from emalgam_kernels import philox as constants
from emalgam_kernels.alias import stratum_ends
from emalgam_kernels.blocks import CACHE_LINE, for_each_block, workspace
from emalgam_kernels.monte_carlo import one_by_one, sum_log_ratios
from emalgam_kernels.numba_cpu import draws, tiles
from emalgam_kernels.numba_cpu.compilation import compile_function
from emalgam_kernels.numba_cpu.draws import (
    FEATURES_AT_ONCE,
    UNIFORMS_AT_ONCE,
    affine_diagonal_rows,
    affine_rows,
    label_tile,
    negate_odd_rows,
    normal_tile,
    philox,
    stratum_tile,
    uniform_tile,
)
from emalgam_kernels.numba_cpu.mixture import Blocks
from emalgam_kernels.numba_cpu.tiles import column_step, padded
from emalgam_kernels.parameters import Direct, Packed, Sampler, take
from emalgam_kernels.philox import OFFSET, rows_per_block

ROWS_OF_A_TILE: Final = 512
ALL_BITS: Final = 2**64 - 1
STREAM_OF_NORMALS: Final = np.uint64(constants.NORMALS)


class Draws(NamedTuple):
    """What all blocks of a call share."""

    seed: np.uint64
    halve: np.uint64  # 1 for antithetic draws, whose rows 2 j and 2 j + 1 are draw j
    diagonal: bool
    step: int  # what the columns of every tile are a multiple of
    means: np.ndarray  # (K, padded D), in the arithmetic dtype
    factors: np.ndarray  # (K or 1, D, padded D), the columns of each L_k; or (K or 1, 1, padded D)
    probability: np.ndarray  # (K,) float64
    alias: np.ndarray  # (K,) int32
    ends: np.ndarray  # (K,) int64; or empty


class Tiles(NamedTuple):
    """One thread's scratch memory; rows of the arithmetic dtype begin on cache lines."""

    noise: np.ndarray  # (D padded to UNIFORMS_AT_ONCE, T)
    x: np.ndarray  # (T, D padded to FEATURES_AT_ONCE)
    u: np.ndarray  # (4, T) float64
    labels: np.ndarray  # (T,) int64


# ---- compiled ------------------------------------------------------------------------------------------------------


def _sample_function(version: str) -> Callable[..., None]:
    """The tile loop of samples, as a closure over `version`: see `emalgam_kernels.numba_cpu.compilation`."""

    def sample_block(draws: Draws, work: Tiles, first: np.uint64, out: np.ndarray, labels: np.ndarray) -> None:
        """Rows of `out` and `labels`, the first of which is row `first` of the samples."""
        _ = version
        for start in range(0, len(out), ROWS_OF_A_TILE):
            rows, row = min(len(out) - start, ROWS_OF_A_TILE), first + np.uint64(start)
            columns = (rows + draws.step - 1) // draws.step * draws.step
            if len(draws.ends) > 0:
                stratum_tile(row, draws.ends, columns, work.labels)
            else:
                label_tile(draws.seed, row, draws.halve, draws.probability, draws.alias, columns, work.u, work.labels)
            normal_tile(draws.seed, STREAM_OF_NORMALS, row, draws.halve, columns, work.noise)
            if draws.halve > 0:
                negate_odd_rows(row, columns, work.noise)
            if draws.diagonal:
                affine_diagonal_rows(draws.means, draws.factors, work.labels, work.noise, rows, work.x)
            else:
                affine_rows(draws.means, draws.factors, work.labels, work.noise, rows, work.x)
            for n in range(rows):
                labels[start + n] = work.labels[n]
                for d in range(out.shape[1]):
                    out[start + n, d] = work.x[n, d]

    return sample_block


def _normal_function(version: str) -> Callable[..., None]:
    """The tile loop of normals; see `_sample_function`."""

    def normal_block(
        seed: np.uint64, stream: np.uint64, first: np.uint64, step: int, noise: np.ndarray, out: np.ndarray
    ) -> None:
        """Rows of `out`, the first of which is row `first`; noise (padded D, T) is scratch."""
        _ = version
        for start in range(0, len(out), ROWS_OF_A_TILE):
            rows = min(len(out) - start, ROWS_OF_A_TILE)
            columns = (rows + step - 1) // step * step
            normal_tile(seed, stream, first + np.uint64(start), np.uint64(0), columns, noise)
            for n in range(rows):
                for d in range(out.shape[1]):
                    out[start + n, d] = noise[d, n]

    return normal_block


def _uniform_function(version: str) -> Callable[..., None]:
    """The tile loop of uniforms; see `_sample_function`."""

    def uniform_block(seed: np.uint64, stream: np.uint64, first: np.uint64, u: np.ndarray, out: np.ndarray) -> None:
        """Rows of `out`, the first of which is row `first`; u (4, T) is scratch."""
        _ = version
        for start in range(0, len(out), ROWS_OF_A_TILE):
            rows = min(len(out) - start, ROWS_OF_A_TILE)
            uniform_tile(seed, stream, np.uint64(0), first + np.uint64(start), np.uint64(0), rows, u)
            for n in range(rows):
                out[start + n] = u[0, n]

    return uniform_block


def _word_function(version: str) -> Callable[..., None]:
    """The loop of Philox's words; see `_sample_function`."""

    def word_block(seed: np.uint64, stream: np.uint64, block: np.uint64, first: np.uint64, out: np.ndarray) -> None:
        _ = version
        for n in range(len(out)):
            out[n, 0], out[n, 1], out[n, 2], out[n, 3] = philox(seed, stream, block, first + np.uint64(n))

    return word_block


_FACTORIES: Final = {
    "sample": _sample_function,
    "normal": _normal_function,
    "uniform": _uniform_function,
    "word": _word_function,
}
_SMALLEST: Final = Sampler(np.zeros((1, 1)), np.ones((1, 1)), np.ones(1))
_compiled: dict[tuple[str, str], Callable[..., None]] = {}
_compiling = threading.Lock()


def _function(name: str, dtype: np.dtype) -> Callable[..., None]:
    """A block function for `dtype`; any strides go to the same code."""
    with _compiling:
        if (name, dtype.char) not in _compiled:
            sources = draws, tiles, scalars, polynomials, constants
            _compiled[name, dtype.char] = compile_function(
                f"{name}_block ({dtype})", _FACTORIES[name], _signature(name, dtype), sources
            )
        return _compiled[name, dtype.char]


def _signature(name: str, dtype: np.dtype) -> Any:
    types: Any = numba.types
    typeof: Any = numba.typeof
    word, size, tile, array = types.uint64, types.int64, typeof(np.empty((0, 0), dtype)), types.Array
    rows, row = array(tile.dtype, 2, "A"), array(tile.dtype, 1, "A")
    if name == "word":
        return types.void(word, word, word, word, rows)
    shared, work = typeof(_draws(_SMALLEST, 0, dtype, "plain")), typeof(_tiles(1, dtype))
    arguments = {
        "sample": (shared, work, word, rows, array(size, 1, "A")),
        "normal": (word, word, word, size, tile, rows),
        "uniform": (word, word, word, tile, row),
    }
    return types.void(*arguments[name])


# ---- blocks --------------------------------------------------------------------------------------------------------


def _draws(sampler: Sampler, seed: int, dtype: np.dtype, draw: str) -> Draws:
    """What sample_block wants to know."""
    K, D = sampler.means.shape
    given = sampler.factors[:1] if sampler.factors.strides[0] == 0 else sampler.factors
    diagonal, width = sampler.diagonal, padded(D, FEATURES_AT_ONCE)
    means = np.zeros((K, width), dtype)
    means[:, :D] = sampler.means
    factors = np.zeros((len(given), 1 if diagonal else D, width), dtype)
    factors[:, :, :D] = given[:, None] if diagonal else np.tril(given).transpose(0, 2, 1)
    ends = np.empty(0, np.int64)
    if draw == "stratified":
        offset = np.empty(1)
        uniforms(seed, OFFSET, 0, offset)
        ends = stratum_ends(sampler.weights, sampler.n_total, float(offset[0]))
    return Draws(
        seed=np.uint64(seed),
        halve=np.uint64(draw == "antithetic"),
        diagonal=diagonal,
        step=column_step(dtype.name),
        means=means,
        factors=factors,
        probability=sampler.table.probability,
        alias=sampler.table.alias,
        ends=ends,
    )


def _tiles(n_features: int, dtype: np.dtype) -> Tiles:
    """The calling thread's scratch memory."""
    stride = ROWS_OF_A_TILE + CACHE_LINE // dtype.itemsize  # rows a power of two apart would share cache sets
    heights = padded(n_features, UNIFORMS_AT_ONCE), padded(n_features, FEATURES_AT_ONCE)
    shapes = (
        ((heights[0], stride), dtype),
        ((ROWS_OF_A_TILE, heights[1]), dtype),
        ((UNIFORMS_AT_ONCE, ROWS_OF_A_TILE), np.dtype(np.float64)),
        ((ROWS_OF_A_TILE,), np.dtype(np.int64)),
    )
    sizes = [padded(int(np.prod(shape)) * each.itemsize, CACHE_LINE) for shape, each in shapes]
    memory = workspace(sum(sizes) + CACHE_LINE)
    start, arrays = -memory.ctypes.data % CACHE_LINE, []
    for (shape, each), size in zip(shapes, sizes, strict=True):
        arrays.append(memory[start : start + size].view(each)[: int(np.prod(shape))].reshape(shape))
        start += size
    return Tiles(*arrays)


def philox_words(seed: int, stream: int, block: int, first: int, out: np.ndarray) -> None:
    """The words of Philox4x32-10; see `emalgam_kernels.reference.sampling.philox_words`."""
    contract.philox_words(seed, stream, block, first, out)
    _function("word", out.dtype)(np.uint64(seed), np.uint64(stream), np.uint64(block), np.uint64(first), out)


def uniforms(seed: int, stream: int, first: int, out: np.ndarray) -> None:
    """Uniforms in (0, 1); see `emalgam_kernels.reference.sampling.uniforms`."""
    contract.uniforms(seed, stream, first, out)
    u = _tiles(UNIFORMS_AT_ONCE, out.dtype).noise
    _function("uniform", out.dtype)(np.uint64(seed), np.uint64(stream), np.uint64(first), u, out)


def normals(seed: int, stream: int, first: int, out: np.ndarray, n_threads: int = 1) -> None:
    """Standard normals; see `emalgam_kernels.reference.sampling.normals`."""
    contract.normals(seed, stream, first, out)
    function, D = _function("normal", out.dtype), out.shape[1]
    key, words, step = np.uint64(seed), np.uint64(stream), column_step(out.dtype.name)

    def block(start: int, stop: int) -> None:
        function(key, words, np.uint64(first + start & ALL_BITS), step, _tiles(D, out.dtype).noise, out[start:stop])

    for_each_block(block, len(out), rows_per_block(D), n_threads)


def sample_mixture(
    sampler: Sampler,
    seed: int,
    first: int,
    out: np.ndarray,
    labels: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
) -> None:
    """Samples of a mixture; see `emalgam_kernels.reference.sampling.sample_mixture`."""
    contract.sample_mixture(sampler, seed, first, out, labels, draw)
    shared, function = _draws(sampler, seed, out.dtype, draw), _function("sample", out.dtype)

    def block(start: int, stop: int) -> None:
        work = _tiles(sampler.n_features, out.dtype)
        function(shared, work, np.uint64(first + start & ALL_BITS), out[start:stop], labels[start:stop])

    for_each_block(block, len(out), rows_per_block(sampler.n_features), n_threads)


def kl_monte_carlo(
    sampler: Sampler,
    p: Packed | Direct,
    q: Packed | Direct,
    seed: int,
    first: int,
    n: int,
    out: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
    control: tuple[Packed, Packed] | None = None,
) -> None:
    """Sums of log p − log q over samples; see `emalgam_kernels.reference.sampling.kl_monte_carlo`."""
    contract.kl_monte_carlo(sampler, p, q, seed, first, n, out, draw, control)
    dtype, D, densities = np.dtype(p.arithmetic), sampler.n_features, (p, q, *(control or ()))
    function, like = _function("sample", dtype), np.empty((0, D), dtype)

    @cache  # a pair that has many tiles is prepared once
    def draws_of(pair: int) -> Draws:
        return _draws(take(sampler, pair), seed, dtype, draw)

    @cache
    def blocks_of(density: int, pair: int) -> Blocks:
        return Blocks(like, take(densities[density], pair))

    def sample(pair: int, start: int, x: np.ndarray, labels: np.ndarray) -> None:
        function(draws_of(pair), _tiles(D, dtype), np.uint64(first + start & ALL_BITS), x, labels)

    def log_density(density: int, pair: int, x: np.ndarray, out: np.ndarray) -> None:
        blocks_of(density, pair).run(x, log_prob=out)

    evaluate = one_by_one(sample, log_density, D, p.arithmetic)
    sum_log_ratios(evaluate, len(densities), D, n, out, n_threads)
