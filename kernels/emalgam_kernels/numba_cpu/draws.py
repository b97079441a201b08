"""Philox, normals and samples as Numba functions on tiles, for the kernels of this package and for people's ``@njit``.

Tiles are those of `emalgam_kernels.numba_cpu.tiles`: feature-major, C-contiguous, of one arithmetic dtype, `columns` a
multiple of `column_step`. What they make of one number is in `emalgam_kernels.scalars`.

>>> import numba, numpy as np
>>> @numba.njit
... def draw(noise):
...     normal_tile(np.uint64(7), np.uint64(1), np.uint64(0), np.uint64(0), noise.shape[1], noise)
>>> noise = np.full((4, 64), np.nan)
>>> draw(noise)
>>> bool(np.isfinite(noise).all())
True
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from numba.extending import overload

from emalgam_kernels import scalars
from emalgam_kernels.numba_cpu.tiles import INLINED, OPTIONS, compiled, log
from emalgam_kernels.philox import LABELS
from emalgam_kernels.scalars import cos_sin_float32, cos_sin_float64

FEATURES_AT_ONCE: Final = 8  # of x = μ + L ε: one register of AVX-512, two of AVX2
UNIFORMS_AT_ONCE: Final = 4  # rows that ε is padded to: a block's uniforms, or two blocks'

_0, _1, _2 = (np.uint64(value) for value in (0, 1, 2))
_STREAM_OF_LABELS: Final = np.uint64(LABELS)


# ---- Philox and uniforms -------------------------------------------------------------------------------------------

philox = compiled(INLINED)(scalars.philox)
unit_float64 = compiled(INLINED)(scalars.unit_float64)
unit_float32 = compiled(INLINED)(scalars.unit_float32)


def _uniform_tile_float64(seed: Any, stream: Any, block: Any, first: Any, halve: Any, columns: Any, u: Any) -> Any:
    for pair in range(2):
        low_half, high_half, following = u[2 * pair], u[2 * pair + 1], _2 * block + np.uint64(pair)
        for n in range(columns):
            a, b, c, d = philox(seed, stream, following, (first + np.uint64(n)) >> halve)
            low_half[n] = unit_float64(a, b)
            high_half[n] = unit_float64(c, d)


def _uniform_tile_float32(seed: Any, stream: Any, block: Any, first: Any, halve: Any, columns: Any, u: Any) -> Any:
    u_1, u_2, u_3, u_4 = u[0], u[1], u[2], u[3]
    for n in range(columns):
        a, b, c, d = philox(seed, stream, block, (first + np.uint64(n)) >> halve)
        u_1[n], u_2[n], u_3[n], u_4[n] = unit_float32(a), unit_float32(b), unit_float32(c), unit_float32(d)


def uniform_tile(
    seed: np.uint64,
    stream: np.uint64,
    block: np.uint64,
    first: np.uint64,
    halve: np.uint64,
    columns: int,
    u: np.ndarray,
) -> None:
    """Uniforms 4 · block … 4 · block + 3 of the rows (first + n) >> halve, in (0, 1).

    Parameters
    ----------
    seed, stream, block, first, halve : uint64
        `block` counts four uniforms: one block of Philox for float32, two for float64.
    columns : int
    u : (4, ≥ columns) float64 or float32
        Receives the uniforms.
    """
    fill = _uniform_tile_float32 if u.dtype == np.float32 else _uniform_tile_float64
    fill(seed, stream, block, first, halve, columns, u)


@overload(uniform_tile, jit_options=OPTIONS)
def _uniform_tile_in_numba(
    seed: Any, stream: Any, block: Any, first: Any, halve: Any, columns: Any, u: Any
) -> Any:  # annotated as what it returns is: Numba compares the two
    return _uniform_tile_float32 if u.dtype == numba.float32 else _uniform_tile_float64


# ---- normals -------------------------------------------------------------------------------------------------------


def cos_sin(u: Any) -> Any:
    """cos 2πu and sin 2πu for u in [0, 1], float32 or float64, ≤ 2 ulp."""
    return (cos_sin_float32 if isinstance(u, np.float32) else cos_sin_float64)(u)


@overload(cos_sin, jit_options=INLINED)
def _cos_sin_in_numba(u: Any) -> Any:
    return cos_sin_float32 if u == numba.float32 else cos_sin_float64


@compiled(OPTIONS)
def _box_muller(u: np.ndarray, columns: int) -> None:
    """u₁, u₂ ← √(−2 ln u₁) cos 2πu₂, √(−2 ln u₁) sin 2πu₂."""
    left, right = u[0], u[1]
    minus_two = u.dtype.type(-2)
    for n in range(columns):
        radius = np.sqrt(minus_two * log(left[n]))
        cosine, sine = cos_sin(right[n])
        left[n] = radius * cosine
        right[n] = radius * sine


@compiled(OPTIONS)
def normal_tile(
    seed: np.uint64, stream: np.uint64, first: np.uint64, halve: np.uint64, columns: int, noise: np.ndarray
) -> None:
    """ε: the normals of rows (first + n) >> halve by the Box-Muller transform, both halves used.

    Parameters
    ----------
    seed, stream, first, halve : uint64
    columns : int
    noise : (D padded to 4, ≥ columns) float64 or float32
        Receives the normals, those of padding included.
    """
    for block in range(len(noise) // UNIFORMS_AT_ONCE):
        u = noise[UNIFORMS_AT_ONCE * block : UNIFORMS_AT_ONCE * (block + 1)]
        uniform_tile(seed, stream, np.uint64(block), first, halve, columns, u)
        _box_muller(u[:2], columns)
        _box_muller(u[2:], columns)


@compiled(OPTIONS)
def negate_odd_rows(first: np.uint64, columns: int, noise: np.ndarray) -> None:
    """ε ← −ε in the columns whose row first + n is odd."""
    for row in noise:
        for n in range((first + _1) & _1, columns, 2):
            row[n] = -row[n]


# ---- labels --------------------------------------------------------------------------------------------------------


@compiled(OPTIONS)
def label_tile(
    seed: np.uint64,
    first: np.uint64,
    halve: np.uint64,
    probability: np.ndarray,
    alias: np.ndarray,
    columns: int,
    u: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Labels by the alias table: column ⌊u₁ K⌋, kept if u₂ is below its probability.

    Parameters
    ----------
    seed, first, halve : uint64
    probability, alias : (K,) float64, (K,) int32
    columns : int
    u : (4, ≥ columns) float64
        Scratch.
    labels : (≥ columns,) int64
        Receives the labels.
    """
    uniform_tile(seed, _STREAM_OF_LABELS, _0, first, halve, columns, u)
    K = np.float64(len(probability))
    for n in range(columns):
        column = np.int64(u[0, n] * K)
        labels[n] = column if u[1, n] < probability[column] else alias[column]


@compiled(OPTIONS)
def stratum_tile(first: np.uint64, ends: np.ndarray, columns: int, labels: np.ndarray) -> None:
    """Labels by the rows of the strata: row i has the first label k with i < ends[k]; see `stratum_ends`."""
    n_total = ends[-1]
    row, k = np.int64(first % np.uint64(n_total)), 0
    for n in range(columns):
        if row == n_total:
            row, k = np.int64(0), 0
        while row >= ends[k]:
            k += 1
        labels[n] = k
        row += np.int64(1)


# ---- x = μ + L ε ---------------------------------------------------------------------------------------------------


@compiled(OPTIONS)
def affine_rows(
    means: np.ndarray, factors: np.ndarray, labels: np.ndarray, noise: np.ndarray, rows: int, out: np.ndarray
) -> None:
    """x = μ_k + Σ_j ε_j L_k[:, j] for the first `rows` columns of ε; see `affine_diagonal_rows` for diagonal L.

    Parameters
    ----------
    means : (K, padded D)
    factors : (K or 1, D, padded D)
        The columns of each L_k.
    labels : (≥ rows,) int64
    noise : (≥ D, ≥ rows)
    out : (≥ rows, padded D)
        Receives the samples.
    """
    D, several = factors.shape[1], min(len(factors) - 1, 1)
    for n in range(rows):
        k = labels[n]
        for d in range(0, means.shape[1], FEATURES_AT_ONCE):
            mean, x = means[k, d : d + FEATURES_AT_ONCE], out[n, d : d + FEATURES_AT_ONCE]
            # Eight sums with names and constant indices: LLVM joins them to vectors, but not those of a short loop.
            a, b, c, e, f, g, h, i = mean[0], mean[1], mean[2], mean[3], mean[4], mean[5], mean[6], mean[7]
            for j in range(min(d + FEATURES_AT_ONCE, D)):
                normal, column = noise[j, n], factors[k * several, j, d : d + FEATURES_AT_ONCE]
                a += normal * column[0]
                b += normal * column[1]
                c += normal * column[2]
                e += normal * column[3]
                f += normal * column[4]
                g += normal * column[5]
                h += normal * column[6]
                i += normal * column[7]
            x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7] = a, b, c, e, f, g, h, i


@compiled(OPTIONS)
def affine_diagonal_rows(
    means: np.ndarray, factors: np.ndarray, labels: np.ndarray, noise: np.ndarray, rows: int, out: np.ndarray
) -> None:
    """x = μ_k + l_k ε: as `affine_rows`, with factors (K or 1, 1, padded D)."""
    several = min(len(factors) - 1, 1)
    for n in range(rows):
        mean, factor, x = means[labels[n]], factors[labels[n] * several, 0], out[n]
        for d in range(min(len(mean), len(noise))):
            x[d] = mean[d] + factor[d] * noise[d, n]
