"""The steps of divergences as Numba functions, for tiles of pairs; specified in `emalgam_kernels.reference.kl`.

A tile of matrices holds element (i, j) of `PAIRS` matrices in row i D + j, so every inner loop runs with unit stride
over pairs. Diagonals are columns: (M, D, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numba
import numpy as np
from numba.extending import overload

from emalgam_kernels import polynomials
from emalgam_kernels.kl_blocks import ASYMMETRY, FARTHEST, PLAIN
from emalgam_kernels.numba_cpu.tiles import (
    INLINED,
    OPTIONS,
    compiled,
    log,
    logit_tile,
)

PAIRS: Final = 32  # pairs of a tile: the matrices of D = 8 share the first-level cache, those of D = 32 the second
COLUMNS: Final = 128  # of a tile of natural parameters
CHUNK: Final = 64  # rows of E φ that are multiplied with it at once
# Twice the precision comes from rounding errors that a fused instruction would not make.
EXACT: Final[Any] = {"nogil": True, "error_model": "numpy"}
PLAIN_FLOAT64, PLAIN_FLOAT32 = PLAIN["float64"], PLAIN["float32"]


class Stack(NamedTuple):
    """A stack of Gaussians: (M, D), and twice (M, D, D) or (M, D, 1). Factors are (0, …) if they were not given."""

    means: np.ndarray
    covariances: np.ndarray
    factors: np.ndarray


class PairWork(NamedTuple):
    """One thread's scratch memory for a tile of pairs; of the arithmetic dtype and C-contiguous."""

    indices: np.ndarray  # (3, PAIRS) int64: of pairs that wait, and of whatever else is gathered
    first: np.ndarray  # (D D, PAIRS), or (D, PAIRS) for diagonals; the next three as well
    second: np.ndarray
    third: np.ndarray
    fourth: np.ndarray
    m: np.ndarray  # (D, PAIRS)
    y: np.ndarray  # (D, PAIRS)
    rows: np.ndarray  # (12, PAIRS): the last five are for factors
    columns: np.ndarray  # (2 D, PAIRS)
    pivots: np.ndarray  # (2 D, PAIRS): 1 / √pivot


class Tiles(NamedTuple):
    """One thread's further memory for all pairs. Rows of features are padded as `logit_tile` wants them."""

    products: int  # rows of features that divergences are made of; the rest is for B
    features: np.ndarray  # (features, PAIRS): E φ of a tile of p
    packed: np.ndarray  # (ROWS_OF_A_BLOCK, features): E φ of a block of p
    natural: np.ndarray  # (features, COLUMNS): −η of a tile of q
    divergences: np.ndarray  # (CHUNK, COLUMNS)
    sizes: np.ndarray  # (CHUNK, COLUMNS): B
    negative_entropies: np.ndarray  # (ROWS_OF_A_BLOCK,)


# ---- d − log(1 + d) ------------------------------------------------------------------------------------------------


def _excess_of(dtype: str) -> Callable[..., Any]:
    """`excess` for one dtype; constants have that dtype too."""
    real = np.dtype(dtype).type
    c = tuple(real(value) for value in polynomials.LOG[dtype])
    degree = len(c)
    two, lowest, highest = real(2), real(np.sqrt(0.5)), real(np.sqrt(2.0))

    def excess(d: Any, x: Any) -> Any:
        # s = d / (2 + d), d − log(1 + d) = s (d − z p(z)) with z = s², where log's polynomial p holds.
        s = d / (d + two)
        z = s * s
        p = c[0]
        for i in range(1, degree):
            p = p * z + c[i]
        close, far = s * (d - z * p), d - log(x)
        return close if lowest <= x < highest else far

    return excess


_excess_float64, _excess_float32 = _excess_of("float64"), _excess_of("float32")


def excess(d: Any, x: Any) -> Any:
    """d − log(x), where x is 1 + d and d may hold more digits; float32 or float64."""
    return (_excess_float32 if isinstance(d, np.float32) else _excess_float64)(d, x)


@overload(excess, jit_options=INLINED)
def _excess_in_numba(d: Any, x: Any) -> Any:
    return _excess_float32 if d == numba.float32 else _excess_float64


# ---- tiles of small matrices ---------------------------------------------------------------------------------------


@compiled(OPTIONS)
def gather(matrices: np.ndarray, index: np.ndarray, tile: np.ndarray) -> None:
    """Row i D₂ + j of the tile ← element (i, j) of the chosen matrices, (M, D, D₂)."""
    _, D, width = matrices.shape
    for n in range(PAIRS):
        matrix = matrices[index[n]]
        for i in range(D):
            for j in range(width):
                tile[i * width + j, n] = matrix[i, j]


@compiled(OPTIONS)
def _gather_difference(p: np.ndarray, i: np.ndarray, q: np.ndarray, j: np.ndarray, tile: np.ndarray) -> None:
    """The same for p_i − q_j."""
    _, D, width = p.shape
    for n in range(PAIRS):
        a, b = p[i[n]], q[j[n]]
        for row in range(D):
            for column in range(width):
                tile[row * width + column, n] = a[row, column] - b[row, column]


@compiled(OPTIONS)
def _dot(x: np.ndarray, x_step: int, y: np.ndarray, y_step: int, count: int, out: np.ndarray) -> None:
    """out ← Σ_k x_k y_k over every `x_step`-th row of x and `y_step`-th of y, four rows at a time."""
    for n in range(PAIRS):
        out[n] = 0
    whole = count // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = x[k * x_step], x[(k + 1) * x_step], x[(k + 2) * x_step], x[(k + 3) * x_step]
        e, f, g, h = y[k * y_step], y[(k + 1) * y_step], y[(k + 2) * y_step], y[(k + 3) * y_step]
        for n in range(PAIRS):
            out[n] = out[n] + a[n] * e[n] + b[n] * f[n] + c[n] * g[n] + d[n] * h[n]
    for k in range(whole, count):
        a, e = x[k * x_step], y[k * y_step]
        for n in range(PAIRS):
            out[n] += a[n] * e[n]


@compiled(OPTIONS)
def _sandwich(difference: np.ndarray, factor: np.ndarray, D: int, half_way: np.ndarray) -> None:
    """Lower triangle of `difference` ← Pᵀ difference P, with P upper triangular."""
    for i in range(D):
        for j in range(D):
            _dot(difference[i * D :], 1, factor[j:], D, j + 1, half_way[i * D + j])
    for i in range(D):
        for j in range(i + 1):
            _dot(factor[i:], D, half_way[j:], D, i + 1, difference[i * D + j])


@compiled(OPTIONS)
def _squared_distance(factor: np.ndarray, m: np.ndarray, D: int, y: np.ndarray, out: np.ndarray) -> None:
    """y ← Pᵀ m and out ← ‖y‖²."""
    for i in range(D):
        _dot(factor[i:], D, m, 1, i + 1, y[i])
    _dot(y, 1, y, 1, D, out)


@compiled(OPTIONS)
def _log_factors(factors: np.ndarray, index: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """Σ_i log P_ii = −½ log |Σ| of the chosen factors."""
    _, D, width = factors.shape
    for n in range(PAIRS):
        out[n] = 0
    for i in range(D):
        for n in range(PAIRS):
            values[n] = factors[index[n], i, min(i, width - 1)]
        for n in range(PAIRS):
            out[n] += log(values[n])


# ---- P of covariances ----------------------------------------------------------------------------------------------


@compiled(OPTIONS)
def _inverse_roots(pivot: np.ndarray, out: np.ndarray) -> None:
    """1 / √pivot; NaN unless that is positive and finite."""
    real = pivot.dtype.type
    one, zero, infinity, nan = real(1), real(0), real(np.inf), real(np.nan)
    for n in range(PAIRS):
        root = one / np.sqrt(pivot[n])
        out[n] = root if root > zero and root < infinity else nan


@compiled(EXACT)
def _subtract_product(
    m: np.ndarray, m_low: np.ndarray, factor: np.ndarray, factor_low: np.ndarray, high: np.ndarray, low: np.ndarray
) -> None:
    """(high, low) −= (m, m_low) (factor, factor_low) in twice the precision: Dekker (1971)."""
    real = m.dtype.type
    half_the_digits = real(2.0**27 + 1) if m.itemsize == 8 else real(2.0**12 + 1)
    for n in range(PAIRS):
        a, b = m[n] * half_the_digits, factor[n] * half_the_digits
        a, b = a - (a - m[n]), b - (b - factor[n])
        c, d = m[n] - a, factor[n] - b
        product = m[n] * factor[n]
        rest = ((a * b - product) + a * d + c * b) + c * d
        difference = high[n] - product
        back = difference - high[n]
        error = (high[n] - (difference - back)) - (product + back)
        low[n] += error - rest - (m[n] * factor_low[n] + m_low[n] * factor[n])
        high[n] = difference


@compiled(EXACT)
def _quotient(
    m: np.ndarray, m_low: np.ndarray, pivot: np.ndarray, pivot_low: np.ndarray, out: np.ndarray, out_low: np.ndarray
) -> None:
    """(out, out_low) ← (m, m_low) / (pivot, pivot_low); overwrites m and m_low."""
    zero = m.dtype.type(0)
    for n in range(PAIRS):
        out[n], out_low[n] = m[n] / pivot[n], zero
    _subtract_product(out, out_low, pivot, pivot_low, m, m_low)
    for n in range(PAIRS):
        out_low[n] = (m[n] + m_low[n]) / pivot[n]


@compiled(EXACT)
def _factorize_exactly(
    A: np.ndarray, low: np.ndarray, D: int, columns: np.ndarray, rows: np.ndarray, scale: np.ndarray
) -> None:
    """Σ = L diag(pivots) Lᵀ in twice the precision; L replaces what is below the diagonal, scale ← 1 / √pivot."""
    m, m_low, pivot, pivot_low = rows[0], rows[1], rows[2], rows[3]
    for row in low:
        for n in range(PAIRS):
            row[n] = 0
    for k in range(D):
        at = k * D + k
        for n in range(PAIRS):
            pivot[n] = A[at, n] + low[at, n]
            pivot_low[n] = low[at, n] - (pivot[n] - A[at, n])
        _inverse_roots(pivot, scale[k])
        for i in range(k + 1, D):
            for n in range(PAIRS):
                m[n], m_low[n] = A[i * D + k, n], low[i * D + k, n]
            _quotient(A[i * D + k], low[i * D + k], pivot, pivot_low, columns[i], columns[D + i])
            for j in range(k + 1, i + 1):
                _subtract_product(m, m_low, columns[j], columns[D + j], A[i * D + j], low[i * D + j])
        for i in range(k + 1, D):
            for n in range(PAIRS):
                A[i * D + k, n] = columns[i, n]


@compiled(OPTIONS)
def _factorize_plainly(A: np.ndarray, D: int, columns: np.ndarray, scale: np.ndarray) -> None:
    """The same in plain arithmetic."""
    for k in range(D):
        pivot = A[k * D + k]
        _inverse_roots(pivot, scale[k])
        for i in range(k + 1, D):
            m, factor = A[i * D + k], columns[i]
            for n in range(PAIRS):
                factor[n] = m[n] / pivot[n]
            for j in range(k + 1, i + 1):
                out, other = A[i * D + j], columns[j]
                for n in range(PAIRS):
                    out[n] -= m[n] * other[n]
        for i in range(k + 1, D):
            for n in range(PAIRS):
                A[i * D + k, n] = columns[i, n]


@compiled(OPTIONS)
def _invert(A: np.ndarray, D: int, scale: np.ndarray, P: np.ndarray) -> None:
    """P ← L⁻ᵀ diag(scale), row i of L⁻¹ from those above it."""
    for i in range(D):
        for j in range(i):
            out, below = P[j * D + i], P[i * D + j]
            _dot(A[i * D + j + 1 :], 1, P[j * D + j + 1 :], 1, i - j - 1, out)
            for n in range(PAIRS):
                out[n], below[n] = -(out[n] + A[i * D + j, n]), 0
        for n in range(PAIRS):
            P[i * D + i, n] = 1
    for i in range(D):
        for j in range(i + 1):
            for n in range(PAIRS):
                P[j * D + i, n] *= scale[i, n]


@compiled(OPTIONS)
def _inflation(matrices: np.ndarray, index: np.ndarray, P: np.ndarray, rows: np.ndarray, total: np.ndarray) -> None:
    """total ← Σ_i Σ_ii (Σ⁻¹)_ii of the chosen matrices."""
    D, precision = matrices.shape[1], rows[0]
    for n in range(PAIRS):
        total[n] = 0
    for i in range(D):
        _dot(P[i * D + i :], 1, P[i * D + i :], 1, D - i, precision)
        for n in range(PAIRS):
            total[n] += matrices[index[n], i, i] * precision[n]


@compiled(OPTIONS)
def precisions_of(
    covariances: np.ndarray, index: np.ndarray, work: PairWork, A: np.ndarray, low: np.ndarray, P: np.ndarray
) -> None:
    """P ← factors of the chosen covariances, the first D of work.pivots ← 1 / √pivots. A and low are scratch memory.

    In plain arithmetic, and again in twice the precision where that has lost digits: see PLAIN in kl_blocks.
    """
    D, rows, exact = covariances.shape[1], work.rows[7:], work.rows[11]
    scale, other = work.pivots[:D], work.pivots[D:]
    limit = A.dtype.type(PLAIN_FLOAT64 if A.itemsize == 8 else PLAIN_FLOAT32)
    gather(covariances, index, A)
    _factorize_plainly(A, D, work.columns, scale)
    _invert(A, D, scale, P)
    _inflation(covariances, index, P, rows, exact)
    count = 0
    for n in range(PAIRS):
        count += exact[n] <= limit  # not so if NaN
    if count == PAIRS:
        return
    gather(covariances, index, A)
    _factorize_exactly(A, low, D, work.columns, rows, other)
    _invert(A, D, other, low)
    for i in range(D):
        for n in range(PAIRS):
            scale[i, n] = scale[i, n] if exact[n] <= limit else other[i, n]
        for j in range(i, D):
            for n in range(PAIRS):
                P[i * D + j, n] = P[i * D + j, n] if exact[n] <= limit else low[i * D + j, n]


@compiled(OPTIONS)
def are_symmetric(matrix: np.ndarray) -> bool:
    """Whether |a_ij − a_ji| ≤ ASYMMETRY √(a_ii a_jj)."""
    for i in range(1, len(matrix)):
        for j in range(i):
            difference = abs(matrix[i, j] - matrix[j, i])
            if not (difference == 0 or difference <= ASYMMETRY * np.sqrt(matrix[i, i]) * np.sqrt(matrix[j, j])):
                return False
    return True


# ---- pairs ---------------------------------------------------------------------------------------------------------


@compiled(OPTIONS)
def _close(E: np.ndarray, D: int, column: np.ndarray, least: np.ndarray, total: np.ndarray) -> None:
    """total ← tr E − log |I + E| from I + E = L diag(1 + d) Lᵀ, least ← min (1 + d). Overwrites E."""
    one = E.dtype.type(1)
    for n in range(PAIRS):
        total[n], least[n] = 0, 1
    for k in range(D):
        d = E[k * D + k]
        for n in range(PAIRS):
            total[n] += excess(d[n], d[n] + one)
            least[n] = least[n] if d[n] + one >= least[n] else d[n] + one  # NaN counts as least, and stays
        for i in range(k + 1, D):
            below, scaled = E[i * D + k], column[i]
            for n in range(PAIRS):
                scaled[n] = below[n] / (d[n] + one)
                total[n] += below[n] * scaled[n]
            for j in range(k + 1, i + 1):
                out, other = E[i * D + j], column[j]
                for n in range(PAIRS):
                    out[n] -= below[n] * other[n]


@compiled(OPTIONS)
def _log_pivots(pivots: np.ndarray, D: int, out: np.ndarray) -> None:
    """Σ_i log (1 / √pivot_i) = −½ log |Σ|."""
    for n in range(PAIRS):
        out[n] = 0
    for i in range(D):
        for n in range(PAIRS):
            out[n] += log(pivots[i, n])


@compiled(OPTIONS)
def _trace_of_far(p: Stack, q: Stack, work: PairWork, i: np.ndarray, j: np.ndarray, trace: np.ndarray) -> None:
    """trace ← tr E + log |Σ_q| − log |Σ_p|. Overwrites all matrices of `work` if p came without factors."""
    D, logs, values = p.means.shape[1], work.rows[3], work.rows[5]
    two = trace.dtype.type(2)
    if len(q.factors):
        _log_factors(q.factors, j, values, logs)
    else:
        _log_pivots(work.pivots, D, logs)
    for n in range(PAIRS):
        trace[n] -= two * logs[n]
    if len(p.factors):
        _log_factors(p.factors, i, values, logs)
    else:
        precisions_of(p.covariances, i, work, work.third, work.fourth, work.second)
        _log_pivots(work.pivots, D, logs)
    for n in range(PAIRS):
        trace[n] += two * logs[n]


@compiled(OPTIONS)
def _full_pairs(p: Stack, q: Stack, work: PairWork, i: np.ndarray, j: np.ndarray, out: np.ndarray) -> None:
    """½ [tr E − log |I + E| + ‖δ‖²], or ½ [tr E + log |Σ_q| − log |Σ_p| + ‖δ‖²] for distant covariances."""
    D, E, factor = p.means.shape[1], work.first, work.second
    trace, least, close = work.rows[0], work.rows[1], work.rows[2]
    real = E.dtype.type
    half, zero, farthest = real(0.5), real(0), real(FARTHEST)
    if len(q.factors):
        gather(q.factors, j, factor)
    else:
        precisions_of(q.covariances, j, work, work.third, work.fourth, factor)
    _gather_difference(p.covariances, i, q.covariances, j, E)
    _gather_difference(p.means[:, :, None], i, q.means[:, :, None], j, work.m)
    _sandwich(E, factor, D, work.third)
    _squared_distance(factor, work.m, D, work.y, out)
    for n in range(PAIRS):
        trace[n] = 0
    for k in range(D):
        for n in range(PAIRS):
            trace[n] += E[k * D + k, n]
    _close(E, D, work.m, least, close)
    far = 0
    for n in range(PAIRS):
        far += not (least[n] > zero and close[n] <= farthest)
    if far:
        _trace_of_far(p, q, work, i, j, trace)
    for n in range(PAIRS):
        near = least[n] > zero and close[n] <= farthest
        out[n] = half * ((close[n] if near else trace[n]) + out[n])


@compiled(OPTIONS)
def _diag_pairs(p: Stack, q: Stack, work: PairWork, i: np.ndarray, j: np.ndarray, out: np.ndarray) -> None:
    """½ Σ [e − log(1 + e) + δ²], e = (σ_p² − σ_q²) P_q²; where 1 + e < ½ it is computed as σ_p² P_q²."""
    D, e, m = p.means.shape[1], work.first, work.m
    real = e.dtype.type
    half, one, zero, nan = real(0.5), real(1), real(0), real(np.nan)
    _gather_difference(p.covariances, i, q.covariances, j, e)
    gather(p.covariances, i, work.second)
    if len(q.factors):
        gather(q.factors, j, work.third)
    else:
        gather(q.covariances, j, work.fourth)
        for d in range(D):
            _inverse_roots(work.fourth[d], work.third[d])
    _gather_difference(p.means[:, :, None], i, q.means[:, :, None], j, m)
    for n in range(PAIRS):
        out[n] = 0
    for d in range(D):
        for n in range(PAIRS):
            factor = work.third[d, n]
            difference, delta = e[d, n] * factor * factor, m[d, n] * factor
            ratio = work.second[d, n] * factor * factor if difference < -half else difference + one
            term = half * (excess(difference, ratio) + delta * delta)
            out[n] += term if work.second[d, n] > zero else nan


@compiled(OPTIONS)
def pair_tile(p: Stack, q: Stack, full: bool, work: PairWork, i: np.ndarray, j: np.ndarray, out: np.ndarray) -> None:
    """KL(p_i ‖ q_j) for PAIRS indices each."""
    if full:
        _full_pairs(p, q, work, i, j, out)
    else:
        _diag_pairs(p, q, work, i, j, out)


# ---- all pairs: F features for the divergence, and D + 2 for the size B of its terms (see kl_blocks) -----------------


@compiled(OPTIONS)
def _centre(means: np.ndarray, index: np.ndarray, shift: np.ndarray, m: np.ndarray) -> None:
    """m ← μ − shift."""
    gather(means[:, :, None], index, m)
    for d in range(len(shift)):
        for n in range(PAIRS):
            m[d, n] -= shift[d]


@compiled(OPTIONS)
def _expectations(
    p: Stack, full: bool, index: np.ndarray, shift: np.ndarray, work: PairWork, tile: Tiles, entropy: np.ndarray
) -> None:
    """E_p φ about `shift`, what B takes of p in the last rows, and −H_p up to a constant."""
    D, covariance, m, logs, out, last = len(shift), work.first, work.m, work.rows[0], tile.features, tile.products
    F = (D + 1) * (D + 2) // 2 if full else 2 * D + 1
    half = m.dtype.type(0.5)
    gather(p.covariances, index, covariance)
    _centre(p.means, index, shift, m)
    _log_factors(p.factors, index, work.rows[1], logs)
    row = 0
    for i in range(D):
        for j in range(0 if full else i, i + 1):
            second = covariance[i * D + j] if full else covariance[i]
            for n in range(PAIRS):
                out[row, n] = second[n] + m[i, n] * m[j, n]
            row += 1
        for n in range(PAIRS):
            out[last + i, n], out[F - 1 - D + i, n] = out[row - 1, n], m[i, n]
    for n in range(PAIRS):
        out[F - 1, n], out[last + D, n], out[last + D + 1, n] = 1, 1, abs(logs[n])
        entropy[n] = logs[n] - half * m.dtype.type(D)


@compiled(OPTIONS)
def _diag_precisions(
    factor: np.ndarray,
    m: np.ndarray,
    D: int,
    y: np.ndarray,
    distance: np.ndarray,
    precision: np.ndarray,
    linear: np.ndarray,
) -> None:
    """Λ ← P², Λ m, y ← P m and ‖y‖² of diagonals."""
    for i in range(D):
        for n in range(PAIRS):
            y[i, n] = factor[i, n] * m[i, n]
            precision[i, n], linear[i, n] = factor[i, n] * factor[i, n], factor[i, n] * y[i, n]
    _dot(y, 1, y, 1, D, distance)


@compiled(OPTIONS)
def _precisions(factor: np.ndarray, D: int, y: np.ndarray, precision: np.ndarray, linear: np.ndarray) -> None:
    """Lower triangle of Λ ← P Pᵀ, and Λ m ← P y with y = Pᵀ m."""
    for i in range(D):
        for j in range(i + 1):
            _dot(factor[i * D + i :], 1, factor[j * D + i :], 1, D - i, precision[i * D + j])
        _dot(factor[i * D + i :], 1, y[i:], 1, D - i, linear[i])


@compiled(OPTIONS)
def natural_tile(
    q: Stack, full: bool, index: np.ndarray, shift: np.ndarray, work: PairWork, tile: Tiles, column: int
) -> None:
    """−η_q from `column` on: ½ Λ_ii, Λ_ij, −Λ m, ½ mᵀ Λ m + ½ log |Σ|; and what B takes of q in the last rows."""
    D, factor, precision, linear, m, y = len(shift), work.first, work.second, work.third, work.m, work.y
    logs, values, distance, size = work.rows[0], work.rows[1], work.rows[2], work.rows[3]
    out, last = tile.natural, tile.products
    F = (D + 1) * (D + 2) // 2 if full else 2 * D + 1
    real = m.dtype.type
    half, one = real(0.5), real(1)
    gather(q.factors, index, factor)
    _centre(q.means, index, shift, m)
    _log_factors(q.factors, index, values, logs)
    if full:
        _squared_distance(factor, m, D, y, distance)
        _precisions(factor, D, y, precision, linear)
    else:
        _diag_precisions(factor, m, D, y, distance, precision, linear)
    for n in range(PAIRS):
        size[n] = abs(logs[n]) + real(D)
    row = 0
    for i in range(D):
        for j in range(0 if full else i, i + 1):
            entry, weight = precision[i * D + j if full else i], half if i == j else one
            for n in range(PAIRS):
                out[row, column + n] = weight * entry[n]
            row += 1
        diagonal = precision[i * D + i if full else i]
        for n in range(PAIRS):
            out[F - 1 - D + i, column + n] = -linear[i, n]
            out[last + i, column + n] = diagonal[n]
            size[n] += diagonal[n] * m[i, n] * m[i, n]
    for n in range(PAIRS):
        out[F - 1, column + n] = half * distance[n] - logs[n]
        out[last + D, column + n], out[last + D + 1, column + n] = size[n], one


@compiled(OPTIONS)
def compute_again(p: Stack, q: Stack, full: bool, work: PairWork, waiting: int, out: np.ndarray) -> None:
    """The first `waiting` pairs that wait, from the Gaussians themselves."""
    i, j, divergence = work.indices[0], work.indices[1], work.rows[6]
    if waiting == 0:
        return
    for n in range(waiting, PAIRS):
        i[n], j[n] = i[0], j[0]
    pair_tile(p, q, full, work, i, j, divergence)
    for n in range(waiting):
        out[i[n], j[n]] = divergence[n]


@compiled(OPTIONS)
def write_tile(
    p: Stack,
    q: Stack,
    full: bool,
    corner: tuple[int, int, int, int],
    limit: float,
    work: PairWork,
    tile: Tiles,
    waiting: int,
    out: np.ndarray,
) -> int:
    """One tile to `out`, rows and columns of `corner` (first, count, first, count).

    A divergence that is smaller than `limit` times B waits until a tile of pairs is full; returns how many wait.
    """
    row, rows, column, columns = corner
    for i in range(rows):
        divergence, size = tile.divergences[i], tile.sizes[i]
        for n in range(columns):
            out[row + i, column + n] = divergence[n]
        for n in range(columns):
            if not divergence[n] >= limit * size[n]:
                work.indices[0, waiting], work.indices[1, waiting] = row + i, column + n
                waiting += 1
                if waiting == PAIRS:
                    compute_again(p, q, full, work, waiting, out)
                    waiting = 0
    return waiting


@compiled(OPTIONS)
def pack_expectations(
    p: Stack, full: bool, row: int, last_row: int, shift: np.ndarray, work: PairWork, tile: Tiles
) -> None:
    """E φ of rows [row, last_row) as logit_tile reads natural parameters, and their −H_p."""
    index, entropy = work.indices[2], work.rows[2]
    for first in range(row, last_row, PAIRS):
        for n in range(PAIRS):
            index[n] = min(first + n, last_row - 1)
        _expectations(p, full, index, shift, work, tile, entropy)
        for n in range(min(PAIRS, last_row - first)):
            tile.negative_entropies[first - row + n] = entropy[n]
            for f in range(len(tile.features)):
                tile.packed[first - row + n, f] = tile.features[f, n]


@compiled(OPTIONS)
def multiply_tile(tile: Tiles, first: int, height: int, columns: int) -> None:
    """−H_p − ⟨η_q, E φ⟩, and B, of `height` rows from `first` on."""
    packed = tile.packed[first : first + height]
    logit_tile(packed, 0, tile.natural[: tile.products], columns, False, tile.divergences)
    logit_tile(packed, tile.products, tile.natural[tile.products :], columns, False, tile.sizes)
    for i in range(height):
        row, entropy = tile.divergences[i], tile.negative_entropies[first + i]
        for n in range(columns):
            row[n] += entropy
