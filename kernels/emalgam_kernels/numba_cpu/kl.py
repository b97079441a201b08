"""Divergences of Gaussians, compiled by Numba on first use: blocks of pairs through the tiles of kl_tiles.py.

The functions are specified in `emalgam_kernels.reference.kl`. Each is compiled once for each dtype that occurs,
whatever the strides, and kept on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np

from emalgam_kernels import contract, kl_blocks, polynomials
from emalgam_kernels.blocks import carve, for_each_block
from emalgam_kernels.kl_blocks import (
    ROWS_OF_A_BLOCK,
    for_each_tile,
    guard,
    matrices_per_block,
    pairs_per_block,
    shift_of,
)
from emalgam_kernels.numba_cpu import kl_tiles, tiles
from emalgam_kernels.numba_cpu.compilation import compile_function
from emalgam_kernels.numba_cpu.kl_tiles import (
    CHUNK,
    COLUMNS,
    PAIRS,
    PairWork,
    Stack,
    Tiles,
    are_symmetric,
    compute_again,
    multiply_tile,
    natural_tile,
    pack_expectations,
    pair_tile,
    precisions_of,
    write_tile,
)
from emalgam_kernels.numba_cpu.tiles import STATISTICS_AT_ONCE, padded
from emalgam_kernels.parameters import Gaussians

# ---- compiled: each function is a closure over `version`; see `emalgam_kernels.numba_cpu.compilation`


def _pair_function(version: str) -> Callable[..., None]:
    """A block of pairs."""

    def block(
        p_means: np.ndarray,
        p_covariances: np.ndarray,
        p_factors: np.ndarray,
        q_means: np.ndarray,
        q_covariances: np.ndarray,
        q_factors: np.ndarray,
        full: bool,
        where: tuple[int, int],
        work: PairWork,
        out: np.ndarray,
    ) -> None:
        """out_m ← KL(p_m ‖ q_m) for start ≤ m < stop; a last tile that is not full repeats its last pair."""
        _ = version
        p, q = Stack(p_means, p_covariances, p_factors), Stack(q_means, q_covariances, q_factors)
        (start, stop), index, divergence = where, work.indices[2], work.rows[6]
        for first in range(start, stop, PAIRS):
            for n in range(PAIRS):
                index[n] = min(first + n, stop - 1)
            pair_tile(p, q, full, work, index, index, divergence)
            for n in range(min(PAIRS, stop - first)):
                out[first + n] = divergence[n]

    return block


def _factor_function(version: str) -> Callable[..., int]:
    """A block of factors."""

    def block(covariances: np.ndarray, where: tuple[int, int], work: PairWork, out: np.ndarray) -> int:
        """out_m ← P_m for start ≤ m < stop; returns the first that is not positive definite, or −1.

        Without room in `out` nothing is written, and a matrix that is not symmetric fails, too.
        """
        _ = version
        (start, stop), index, D = where, work.indices[2], covariances.shape[1]
        failed = -1
        for first in range(start, stop, PAIRS):
            for n in range(PAIRS):
                index[n] = min(first + n, stop - 1)
            precisions_of(covariances, index, work, work.first, work.second, work.third)
            for n in range(min(PAIRS, stop - first)):
                proper = len(out) > 0 or are_symmetric(covariances[first + n])
                for i in range(D):
                    proper &= work.pivots[i, n] > 0
                    for j in range(D if len(out) else 0):
                        out[first + n, i, j] = work.third[i * D + j, n]
                if failed < 0 and not proper:
                    failed = first + n
        return failed

    return block


def _all_pairs_function(version: str) -> Callable[..., None]:
    """A block of all pairs."""

    def block(
        p_means: np.ndarray,
        p_covariances: np.ndarray,
        p_factors: np.ndarray,
        q_means: np.ndarray,
        q_covariances: np.ndarray,
        q_factors: np.ndarray,
        full: bool,
        where: tuple[int, int, int, int],
        frame: tuple[np.ndarray, float],
        work: tuple[PairWork, Tiles],
        out: np.ndarray,
    ) -> None:
        """out_ij ← KL(p_i ‖ q_j) for `where`: first row, last row + 1, first column, last column + 1."""
        _ = version
        p, q = Stack(p_means, p_covariances, p_factors), Stack(q_means, q_covariances, q_factors)
        (row, last_row, column, last_column), (shift, limit), (pairs, tile) = where, frame, work
        pack_expectations(p, full, row, last_row, shift, pairs, tile)
        index, waiting = pairs.indices[2], 0
        for start in range(column, last_column, COLUMNS):
            count = min(COLUMNS, last_column - start)
            for first in range(0, count, PAIRS):
                for n in range(PAIRS):
                    index[n] = min(start + first + n, last_column - 1)
                natural_tile(q, full, index, shift, pairs, tile, first)
            for k in range(0, last_row - row, CHUNK):
                height = min(CHUNK, last_row - row - k)
                multiply_tile(tile, k, height, (count + PAIRS - 1) // PAIRS * PAIRS)
                waiting = write_tile(p, q, full, (row + k, height, start, count), limit, pairs, tile, waiting, out)
        compute_again(p, q, full, pairs, waiting, out)

    return block


# ---- compilation


_FUNCTIONS: Final[dict[str, Callable[[str], Callable[..., Any]]]] = {
    "precision_factors": _factor_function,
    "kl_pairs": _pair_function,
    "kl_all_pairs": _all_pairs_function,
}
_SOURCES: Final = kl_tiles, tiles, polynomials, kl_blocks
_compiled: dict[tuple[str, str], Callable[..., Any]] = {}
_compiling = threading.Lock()


def _block(kernel: str, dtype: np.dtype, *arguments: Any) -> Callable[..., Any]:
    """The block function of a kernel for one dtype; any strides, read-only or not, go to the same code.

    `arguments` are examples of those between the arrays and `out`.
    """
    with _compiling:
        if (kernel, dtype.char) not in _compiled:
            types: Any = numba.types
            typeof: Any = numba.typeof
            real = typeof(dtype).dtype
            vectors, matrices = (types.Array(real, n, "A", readonly=True) for n in (2, 3))
            between = [typeof(argument) for argument in arguments]
            if kernel == "precision_factors":
                signature = types.int64(matrices, *between, types.Array(real, 3, "A"))
            else:
                out = types.Array(types.float64, 1 if kernel == "kl_pairs" else 2, "A")
                stack = vectors, matrices, matrices
                signature = types.void(*stack, *stack, *between, out)
            name = f"{kernel} ({dtype})"
            _compiled[kernel, dtype.char] = compile_function(name, _FUNCTIONS[kernel], signature, _SOURCES)
        return _compiled[kernel, dtype.char]


# ---- blocks --------------------------------------------------------------------------------------------------------


def _arrays(p: Gaussians, q: Gaussians) -> list[np.ndarray]:
    """Means, covariances and factors of both, diagonals as (M, D, 1); factors that were not given as (0, …)."""
    arrays = []
    for each in (p, q):
        factors = each.covariances[:0] if each.precisions_cholesky is None else each.precisions_cholesky
        matrices = each.covariances, factors
        arrays += [each.means, *(m if each.covariance_type == "full" else m[:, :, None] for m in matrices)]
    return arrays


def _pair_shapes(D: int, full: bool) -> list[tuple[int, ...]]:
    """Of the arrays of PairWork but the last."""
    width = D * D if full else D
    return [*[(width, PAIRS)] * 4, (D, PAIRS), (D, PAIRS), (12, PAIRS), (2 * D, PAIRS), (2 * D, PAIRS)]


def _pair_work(D: int, full: bool, dtype: np.dtype) -> PairWork:
    """The calling thread's scratch memory for pairs."""
    return PairWork(np.empty((3, PAIRS), np.int64), *carve(_pair_shapes(D, full), dtype))


def _work(D: int, full: bool, dtype: np.dtype) -> tuple[PairWork, Tiles]:
    """The calling thread's scratch memory for all pairs."""
    products = padded((D + 1) * (D + 2) // 2 if full else 2 * D + 1, STATISTICS_AT_ONCE)
    features = products + padded(D + 2, STATISTICS_AT_ONCE)
    shapes = _pair_shapes(D, full)
    count = len(shapes)
    shapes += [(features, PAIRS), (ROWS_OF_A_BLOCK, features), (features, COLUMNS)]
    shapes += [(CHUNK, COLUMNS), (CHUNK, COLUMNS), (ROWS_OF_A_BLOCK,)]
    arrays = carve(shapes, dtype)
    tile = Tiles(products, *arrays[count:])
    tile.features[...] = tile.natural[...] = 0  # rows that only pad
    return PairWork(np.empty((3, PAIRS), np.int64), *arrays[:count]), tile


def precision_factors(covariances: np.ndarray, out: np.ndarray, n_threads: int = 1) -> int:
    """P_m; see `emalgam_kernels.reference.kl.precision_factors`."""
    contract.precision_factors(covariances, out)
    return _first_failure(covariances, out, n_threads)


def check_covariances(covariances: np.ndarray, n_threads: int = 1) -> int:
    """The first that is none; see `emalgam_kernels.reference.kl.check_covariances`."""
    contract.check_covariances(covariances)
    return _first_failure(covariances, np.empty((0, *covariances.shape[1:]), covariances.dtype), n_threads)


def _first_failure(covariances: np.ndarray, out: np.ndarray, n_threads: int) -> int:
    """The first that any block finds, or −1."""
    D = out.shape[1]
    function = _block("precision_factors", out.dtype, (0, 0), _pair_work(D, True, out.dtype))
    failed: list[int] = []

    def block(start: int, stop: int) -> None:
        first = function(covariances, (start, stop), _pair_work(D, True, out.dtype), out)
        if first >= 0:
            failed.append(first)

    for_each_block(block, len(covariances), matrices_per_block(D), n_threads)
    return min(failed, default=-1)


def kl_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_m ‖ q_m); see `emalgam_kernels.reference.kl.kl_pairs`."""
    contract.kl_pairs(p, q, out)
    shape = p.n_features, p.covariance_type == "full", p.means.dtype
    arrays, full = _arrays(p, q), shape[1]
    function = _block("kl_pairs", p.means.dtype, full, (0, 0), _pair_work(*shape))

    def block(start: int, stop: int) -> None:
        function(*arrays, full, (start, stop), _pair_work(*shape), out)

    for_each_block(block, len(out), pairs_per_block(p), n_threads)


def kl_all_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_i ‖ q_j); see `emalgam_kernels.reference.kl.kl_all_pairs`."""
    contract.kl_all_pairs(p, q, out)
    shape = p.n_features, p.covariance_type == "full", p.means.dtype
    arrays, full = _arrays(p, q), shape[1]
    frame = shift_of(p, q), p.means.dtype.type(guard(p.means.dtype))
    function = _block("kl_all_pairs", p.means.dtype, full, (0, 0, 0, 0), frame, _work(*shape))

    def block(row: int, last_row: int, column: int, last_column: int) -> None:
        function(*arrays, full, (row, last_row, column, last_column), frame, _work(*shape), out)

    for_each_tile(block, len(p), len(q), n_threads)
