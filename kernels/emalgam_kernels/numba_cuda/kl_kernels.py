"""The kernels of divergences; what they compute is specified in `emalgam_kernels.reference.kl`.

A thread has a pair of Gaussians (or a covariance) of its own, and room for its matrices: number e of them is at
``place + e · stride``, so that neighbouring threads touch neighbouring numbers. The room is shared memory while that
of a warp fits there, else a scratch in global memory. In it, one after the other::

    F (D (D + 1) / 2)   E (D, D)   column (D)   m (D)

F is Pᵀ, lower triangular, row by row: F_ij = P_ji. While P is computed, L and the pivots are in its place, and their
low halves in those of E, column and m: `factorize` and `invert` leave P where a pair wants it, which so can do without
P given, and without memory for it. Of Σ_p only a distant pair needs the pivots, when all else has been read.

Loops over triangles stay Numba's ranges: through `ascending` the compiler sees more of them than registers allow, and
on some architectures fewer blocks fit a multiprocessor.

Features of all pairs are feature-major, (F + D + 2, M): F for the divergence, D + 2 for the size B of its terms (see
`emalgam_kernels.kl_blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numba import cuda, types

from emalgam_kernels import polynomials
from emalgam_kernels.kl_blocks import ASYMMETRY, FARTHEST
from emalgam_kernels.kl_blocks import guard as guard_of
from emalgam_kernels.numba_cuda.device import NUMBA_REALS, REALS, SIMULATED, Kernel, at, flat, fma, inlined, log, sqrt
from emalgam_kernels.numba_cuda.products import integers

THREADS: Final = 8 if SIMULATED else 128
WARP: Final = 8 if SIMULATED else 32  # threads of a block whose matrices are in global memory
GROUP: Final = 4  # rows of a matrix that share what they read of a vector
ABSENT: Final = -1  # the stride of an array that was not given


class Size(NamedTuple):
    """The integers of a launch for pairs, in one argument.

    `p_means` to `q_factors`: elements from one of the stack to the next, 0 where all share one; of factors that were
    not given, `ABSENT`. The launch computes
    `pairs` pairs from number `first` on: of p_n and q_n, or if `chosen` of those that `index` (i₀, j₀, i₁, ...) names.
    The result of p_i and q_j goes to ``i · row + j · column``. `stride` is that of the scratch.
    """

    p_means: int
    p_covariances: int
    p_factors: int
    q_means: int
    q_covariances: int
    q_factors: int
    D: int
    first: int
    pairs: int
    chosen: int
    row: int
    column: int
    stride: int


def numbers_of_a_thread(D: int) -> int:
    """How many numbers F, E, column and m are."""
    return D * (D + 1) // 2 + D * D + 2 * D


@inlined
def _row(i: int) -> int:
    """Where row i of a packed lower triangle begins."""
    return (i * (i + 1)) >> 1


# ---- d − log(1 + d)


def _excess(arithmetic: str) -> Any:
    real = NUMBA_REALS[arithmetic]
    c = tuple(real(value) for value in polynomials.LOG[arithmetic])
    degree = len(c)
    two, lowest, highest = real(2), real(np.sqrt(0.5)), real(np.sqrt(2.0))

    @inlined
    def excess(d: Any, x: Any) -> Any:
        """d − log(x), where x is 1 + d and d may hold more digits."""
        if x < lowest or x >= highest:
            return d - log(x)
        # s = d / (2 + d), d − log(1 + d) = s (d − z p(z)) with z = s², where log's polynomial p holds.
        s = d / (d + two)
        z = s * s
        p = c[0]
        for i in range(1, degree):
            p = p * z + c[i]
        return s * (d - z * p)

    return excess


# ---- the matrices of a thread


@inlined
def _multiply(memory: Any, starts: Any, ends: Any, vector: int, count: int, stride: int, sums: Any) -> None:
    """sums_g ← Σ_k<count row_gk vector_k of `GROUP` rows, which have numbers up to k = ends_g."""
    for g in range(GROUP):
        sums[g] = memory.dtype.type(0)
    step = 0
    for k in range(count):
        value = memory[at(vector + step)]
        for g in range(GROUP):
            if k <= ends[g]:
                sums[g] += memory[at(starts[g] + step)] * value
        step += stride


@inlined
def _multiply_factor(memory: Any, place: int, stride: int, D: int, first: int, vector: int, sums: Any) -> None:
    """sums_g ← Σ_k F_ik vector_k for rows i = first + g."""
    starts, ends = cuda.local.array(GROUP, types.int64), cuda.local.array(GROUP, types.int64)
    for g in range(GROUP):
        starts[g] = place + _row(first + g) * stride
        ends[g] = first + g if first + g < D else -1
    _multiply(memory, starts, ends, vector, min(first + GROUP, D), stride, sums)


@inlined
def _squared_distance(memory: Any, place: int, stride: int, D: int) -> Any:
    """‖Pᵀ m‖²."""
    sums = cuda.local.array(GROUP, memory.dtype)
    m = place + (_row(D) + D * D + D) * stride
    total = memory.dtype.type(0)
    for first in range(0, D, GROUP):
        _multiply_factor(memory, place, stride, D, first, m, sums)
        for g in range(GROUP):
            total += sums[g] * sums[g]
    return total


@inlined
def _sandwich(memory: Any, place: int, stride: int, D: int) -> None:
    """Lower triangle of E ← Pᵀ E P of a symmetric E, the last column first: those before it do without it."""
    starts, ends = cuda.local.array(GROUP, types.int64), cuda.local.array(GROUP, types.int64)
    sums = cuda.local.array(GROUP, memory.dtype)
    E = place + _row(D) * stride
    column = E + D * D * stride
    for j in range(D - 1, -1, -1):
        # column ← E P_j
        for first in range(0, D, GROUP):
            for g in range(GROUP):
                starts[g] = E + (first + g) * D * stride
                ends[g] = j if first + g < D else -1
            _multiply(memory, starts, ends, place + _row(j) * stride, j + 1, stride, sums)
            for g in range(GROUP):
                if first + g < D:
                    memory[at(column + (first + g) * stride)] = sums[g]
        # E_ij ← P_iᵀ column, i ≥ j
        for first in range(j, D, GROUP):
            _multiply_factor(memory, place, stride, D, first, column, sums)
            for g in range(GROUP):
                if first + g < D:
                    memory[at(E + ((first + g) * D + j) * stride)] = sums[g]


def _close(arithmetic: str) -> Any:
    real, excess = NUMBA_REALS[arithmetic], _excess(arithmetic)
    zero, one, infinity = real(0), real(1), real(np.inf)

    @inlined
    def close(memory: Any, place: int, stride: int, D: int) -> Any:
        """tr E − log |I + E| from I + E = L diag(1 + d) Lᵀ; inf if a pivot 1 + d is not positive. Overwrites E."""
        E = place + _row(D) * stride
        column = E + D * D * stride
        total = zero
        for k in range(D):
            d = memory[at(E + k * (D + 1) * stride)]
            pivot = d + one
            if not pivot > zero:
                return infinity
            total += excess(d, pivot)
            for i in range(k + 1, D):
                row = E + i * D * stride
                below = memory[at(row + k * stride)]
                scaled = below / pivot
                memory[at(column + i * stride)] = scaled
                total += below * scaled
                for j in range(k + 1, i + 1):
                    memory[at(row + j * stride)] -= below * memory[at(column + j * stride)]
        return total

    return close


@inlined
def _read_difference(memory: Any, place: int, stride: int, D: int, p: Any, p_start: int, q: Any, q_start: int) -> None:
    """E ← Σ_p − Σ_q."""
    E = place + _row(D) * stride
    for element in range(D * D):
        memory[at(E + element * stride)] = p[at(p_start + element)] - q[at(q_start + element)]


@inlined
def _read_factor(memory: Any, place: int, stride: int, D: int, factors: Any, start: int) -> None:
    """F ← Pᵀ."""
    for i in range(D):
        for j in range(i, D):
            memory[at(place + (_row(j) + i) * stride)] = factors[at(start + i * D + j)]


@inlined
def _read_covariance(memory: Any, place: int, stride: int, D: int, covariances: Any, start: int) -> None:
    """The lower triangle of Σ, to where F will be."""
    for i in range(D):
        for j in range(i + 1):
            memory[at(place + (_row(i) + j) * stride)] = covariances[at(start + i * D + j)]


@inlined
def _log_diagonal(memory: Any, place: int, stride: int, D: int) -> Any:
    """Σ_i log F_ii = −½ log |Σ|."""
    total = memory.dtype.type(0)
    for i in range(D):
        total += log(memory[at(place + (_row(i) + i) * stride)])
    return total


@inlined
def _log_factors(factors: Any, start: int, D: int, step: int) -> Any:
    """Σ_i log P_ii = −½ log |Σ|; P_ii is every `step`-th number from `start` on."""
    total = factors.dtype.type(0)
    for i in range(D):
        total += log(factors[at(start + i * step)])
    return total


# ---- kernels: pairs


def _full_pairs(arithmetic: str, in_shared: bool, given: bool) -> Callable[..., None]:
    """`given`: both P are there; else either may be absent."""
    real, close, factorize = NUMBA_REALS[arithmetic], _close(arithmetic), _factorize(arithmetic)
    half, farthest = real(0.5), real(FARTHEST)

    def full_pairs(
        p_means: Any, p_covariances: Any, p_factors: Any, q_means: Any, q_covariances: Any, q_factors: Any,
        index: Any, scratch: Any, out: Any, size: Size,
    ) -> None:  # fmt: skip
        """½ [tr E − log |I + E| + ‖δ‖²], or ½ [tr E + log |Σ_q| − log |Σ_p| + ‖δ‖²] for distant covariances."""
        n, D = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, size.D
        if in_shared:
            memory, place, stride = cuda.shared.array(0, real), cuda.threadIdx.x, cuda.blockDim.x
        else:
            memory, place, stride = scratch, n, size.stride
        if n >= size.pairs:
            return
        i = j = size.first + n
        if size.chosen:
            i, j = index[at(2 * (size.first + n))], index[at(2 * (size.first + n) + 1)]
        p_start, q_start = i * size.p_covariances, j * size.q_covariances
        if given or size.q_factors != ABSENT:
            _read_factor(memory, place, stride, D, q_factors, j * size.q_factors)
        else:
            _read_covariance(memory, place, stride, D, q_covariances, q_start)
            factorize(memory, place, stride, D)
            invert(memory, place, stride, D)
        # E = Pᵀ (Σ_p − Σ_q) P, δ = Pᵀ (μ_p − μ_q)
        _read_difference(memory, place, stride, D, p_covariances, p_start, q_covariances, q_start)
        E = place + _row(D) * stride
        for d in range(D):
            delta = p_means[at(i * size.p_means + d)] - q_means[at(j * size.q_means + d)]
            memory[at(E + (D * D + D + d) * stride)] = delta
        distance = _squared_distance(memory, place, stride, D)
        _sandwich(memory, place, stride, D)
        trace = real(0)
        for d in range(D):
            trace += memory[at(E + d * (D + 1) * stride)]
        terms = close(memory, place, stride, D)
        target = i * size.row + j * size.column
        if terms <= farthest:
            out[at(target)] = half * (terms + distance)
            return
        # log |Σ_p| is added to what is written already: nothing else is to be kept meanwhile
        out[at(target)] = half * (trace + distance) - _log_diagonal(memory, place, stride, D)
        if given or size.p_factors != ABSENT:
            out[at(target)] += _log_factors(p_factors, i * size.p_factors, D, D + 1)
        else:
            _read_covariance(memory, place, stride, D, p_covariances, p_start)
            factorize(memory, place, stride, D)
            out[at(target)] += _log_diagonal(memory, place, stride, D)

    return full_pairs


def _diag_pairs(arithmetic: str) -> Callable[..., None]:
    real, excess = NUMBA_REALS[arithmetic], _excess(arithmetic)
    zero, half, one, nan = real(0), real(0.5), real(1), real(np.nan)

    def diag_pairs(
        p_means: Any, p_covariances: Any, p_factors: Any, q_means: Any, q_covariances: Any, q_factors: Any,
        index: Any, scratch: Any, out: Any, size: Size,
    ) -> None:  # fmt: skip
        """½ Σ [e − log(1 + e) + δ²], e = (σ_p² − σ_q²) P_q²; where 1 + e < ½ it is computed as σ_p² P_q²."""
        n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if n >= size.pairs:
            return
        i = j = size.first + n
        if size.chosen:
            i, j = index[at(2 * (size.first + n))], index[at(2 * (size.first + n) + 1)]
        total = zero
        for d in range(size.D):
            variance, other = (
                p_covariances[at(i * size.p_covariances + d)],
                q_covariances[at(j * size.q_covariances + d)],
            )
            if size.q_factors != ABSENT:
                factor = q_factors[at(j * size.q_factors + d)]
            else:
                factor = one / sqrt(other if other > zero else nan)
            e = (variance - other) * factor * factor
            delta = (p_means[at(i * size.p_means + d)] - q_means[at(j * size.q_means + d)]) * factor
            ratio = variance * factor * factor if e < -half else e + one
            total += half * (excess(e, ratio) + delta * delta) if ratio > zero else nan
        out[at(i * size.row + j * size.column)] = total

    return diag_pairs


# ---- kernels: P of covariances


def _factorize(arithmetic: str) -> Any:
    real = NUMBA_REALS[arithmetic]
    zero, one, infinity, nan = real(0), real(1), real(np.inf), real(np.nan)

    @inlined
    def subtract_product(m: Any, m_low: Any, l: Any, l_low: Any, memory: Any, high: int, low: int) -> None:  # noqa: E741
        """(high, low) −= (m, m_low) (l, l_low) in twice the precision: Dekker (1971), Numer. Math. 18, 224-242."""
        product = fma(m, l, zero)
        rest = fma(m, l, -product)
        before = memory[at(high)]
        difference = before - product
        back = difference - before
        error = (before - (difference - back)) - (product + back)
        memory[at(high)] = difference
        memory[at(low)] += error - rest - (m * l_low + m_low * l)

    @inlined
    def factorize(memory: Any, place: int, stride: int, D: int) -> None:
        """Σ = L diag(pivots) Lᵀ in twice the precision, where the lower triangle of Σ was; 1 / √pivot on the diagonal.

        Sums that leave little of Σ are what KL would otherwise lose eps times the condition number to.
        """
        low = place + _row(D) * stride
        column = low + D * D * stride
        column_low = column + D * stride
        for e in range(_row(D)):
            memory[at(low + e * stride)] = zero
        for k in range(D):
            diagonal = (_row(k) + k) * stride
            high, rest = memory[at(place + diagonal)], memory[at(low + diagonal)]
            pivot = high + rest
            pivot_low = rest - (pivot - high)
            reciprocal = one / pivot
            memory[at(place + diagonal)] = one / sqrt(pivot if zero < pivot < infinity else nan)
            for i in range(k + 1, D):
                start = _row(i) * stride
                m, m_low = memory[at(place + start + k * stride)], memory[at(low + start + k * stride)]
                # (l, l_low) = (m, m_low) / (pivot, pivot_low)
                l = m * reciprocal  # noqa: E741
                l_low = (fma(-l, pivot, m) + m_low - l * pivot_low) * reciprocal
                memory[at(column + i * stride)], memory[at(column_low + i * stride)] = l, l_low
                for j in range(k + 1, i + 1):
                    subtract_product(
                        m, m_low, memory[at(column + j * stride)], memory[at(column_low + j * stride)],
                        memory, place + start + j * stride, low + start + j * stride,
                    )  # fmt: skip
            for i in range(k + 1, D):
                memory[at(place + (_row(i) + k) * stride)] = memory[at(column + i * stride)]

    return factorize


@inlined
def invert(memory: Any, place: int, stride: int, D: int) -> None:
    """F ← Pᵀ = diag(1 / √pivots) L⁻¹, where `factorize` left L."""
    # Row i of L⁻¹ from those above it
    for i in range(D):
        row = place + _row(i) * stride
        for j in range(i):
            value = memory[at(row + j * stride)]
            for k in range(j + 1, i):
                value += memory[at(row + k * stride)] * memory[at(place + (_row(k) + j) * stride)]
            memory[at(row + j * stride)] = -value
    for i in range(D):
        row = place + _row(i) * stride
        scale = memory[at(row + i * stride)]
        for j in range(i):
            memory[at(row + j * stride)] *= scale


def _symmetric(arithmetic: str) -> Any:
    real = NUMBA_REALS[arithmetic]
    zero, tolerance = real(0), real(ASYMMETRY)

    @inlined
    def symmetric(covariances: Any, start: int, D: int) -> bool:
        """Whether |Σ_ij − Σ_ji| ≤ ASYMMETRY √(Σ_ii Σ_jj)."""
        proper = True
        for i in range(1, D):
            size = tolerance * sqrt(covariances[at(start + i * (D + 1))])
            for j in range(i):
                difference = abs(covariances[at(start + i * D + j)] - covariances[at(start + j * D + i)])
                proper &= difference == zero or difference <= size * sqrt(covariances[at(start + j * (D + 1))])
        return proper

    return symmetric


def _factors(arithmetic: str, in_shared: bool) -> Callable[..., None]:
    real, factorize, symmetric = NUMBA_REALS[arithmetic], _factorize(arithmetic), _symmetric(arithmetic)
    zero, infinity = real(0), real(np.inf)

    def factors(
        covariances: Any, scratch: Any, out: Any, failed: Any,
        D: int, covariance_stride: int, out_stride: int, first: int, count: int, width: int,
    ) -> None:  # fmt: skip
        """P of `count` covariances from number `first` on; failed ← 1 for those that are not positive definite.

        If `out_stride` is `ABSENT` nothing is written to `out`, and those that are not symmetric fail, too.
        """
        n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if in_shared:
            memory, place, stride = cuda.shared.array(0, real), cuda.threadIdx.x, cuda.blockDim.x
        else:
            memory, place, stride = scratch, n, width
        if n >= count:
            return
        start, target = (first + n) * covariance_stride, (first + n) * out_stride
        _read_covariance(memory, place, stride, D, covariances, start)
        factorize(memory, place, stride, D)
        total = zero
        for i in range(D):
            total += memory[at(place + (_row(i) + i) * stride)]
        proper = total < infinity
        if out_stride == ABSENT:
            proper = proper and symmetric(covariances, start, D)
        else:
            invert(memory, place, stride, D)
            for i in range(D):
                for j in range(D):
                    value = zero
                    if j >= i:
                        value = memory[at(place + (_row(j) + i) * stride)]
                    out[at(target + i * D + j)] = value
        failed[at(first + n)] = types.uint8(0) if proper else types.uint8(1)

    return factors


# ---- kernels: all pairs


def feature_count(covariance_type: str, D: int) -> int:
    """F: features of the divergence."""
    return (D + 1) * (D + 2) // 2 if covariance_type == "full" else 2 * D + 1


def _expectations(arithmetic: str, full: bool) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    half, one = real(0.5), real(1)

    def expectations(
        means: Any, covariances: Any, factors: Any, shift: Any, out: Any, negative_entropy: Any,
        M: int, D: int, F: int, mean_stride: int, covariance_stride: int, factor_stride: int,
    ) -> None:  # fmt: skip
        """E_p φ: Σ_ij + m_i m_j (i ≥ j), m_i, 1; for B Σ_ii + m_i², 1, |½ log |Σ||; and −H_p up to a constant.

        Thread: one Gaussian and one i; i = D: what has no index.
        """
        n, i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.y
        if n >= M:
            return
        if i == D:
            logs = _log_factors(factors, n * factor_stride, D, D + 1 if full else 1)
            out[at((F - 1) * M + n)] = out[at((F + D) * M + n)] = one
            out[at((F + D + 1) * M + n)] = abs(logs)
            negative_entropy[at(n)] = logs - half * real(D)
            return
        mean, covariance = n * mean_stride, n * covariance_stride
        m = means[at(mean + i)] - shift[at(i)]
        place = _row(i) if full else i
        if full:
            covariance += i * D
            for j in range(i):
                product = m * (means[at(mean + j)] - shift[at(j)])
                out[at((place + j) * M + n)] = covariances[at(covariance + j)] + product
            place += i
        second = covariances[at(covariance + i)] + m * m
        out[at(place * M + n)] = out[at((F + i) * M + n)] = second
        out[at((F - 1 - D + i) * M + n)] = m

    return expectations


@inlined
def _dot_of_rows(factors: Any, start: int, i: int, j: int, D: int) -> Any:
    """Λ_ij = Σ_k P_ik P_jk, i ≥ j."""
    total = factors.dtype.type(0)
    for k in range(i, D):
        total += factors[at(start + i * D + k)] * factors[at(start + j * D + k)]
    return total


@inlined
def _whitened(factors: Any, start: int, means: Any, mean: int, shift: Any, k: int, D: int) -> Any:
    """(Pᵀ m)_k."""
    total = factors.dtype.type(0)
    for i in range(k + 1):
        total += factors[at(start + i * D + k)] * (means[at(mean + i)] - shift[at(i)])
    return total


def _full_naturals(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero, half, one = real(0), real(0.5), real(1)

    def full_naturals(
        means: Any, factors: Any, shift: Any, out: Any, M: int, D: int, F: int, mean_stride: int, factor_stride: int
    ) -> None:
        """−η_q: ½ Λ_ii, Λ_ij (i > j), −Λ m, ½ mᵀ Λ m + ½ log |Σ|; for B Λ_ii, Σ Λ_ii m_i² + |½ log |Σ|| + D, 1.

        Thread: one Gaussian and one i; i = D: what has no index.
        """
        n, i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.y
        if n >= M:
            return
        mean, start = n * mean_stride, n * factor_stride
        if i < D:
            linear = zero  # Λ m = P (Pᵀ m)
            for k in range(i, D):
                linear += factors[at(start + i * D + k)] * _whitened(factors, start, means, mean, shift, k, D)
            for j in range(i):
                out[at((_row(i) + j) * M + n)] = _dot_of_rows(factors, start, i, j, D)
            diagonal = _dot_of_rows(factors, start, i, i, D)
            out[at((_row(i) + i) * M + n)] = half * diagonal
            out[at((F + i) * M + n)] = diagonal
            out[at((F - 1 - D + i) * M + n)] = -linear
            return
        logs, distance = _log_factors(factors, start, D, D + 1), zero
        size = abs(logs) + real(D)
        for k in range(D):
            y, m = _whitened(factors, start, means, mean, shift, k, D), means[at(mean + k)] - shift[at(k)]
            distance += y * y
            size += _dot_of_rows(factors, start, k, k, D) * m * m
        out[at((F - 1) * M + n)] = half * distance - logs
        out[at((F + D) * M + n)] = size
        out[at((F + D + 1) * M + n)] = one

    return full_naturals


def _diag_naturals(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    half, one = real(0.5), real(1)

    def diag_naturals(
        means: Any, factors: Any, shift: Any, out: Any, M: int, D: int, F: int, mean_stride: int, factor_stride: int
    ) -> None:
        """As `full_naturals`, of diagonals; thread: one Gaussian."""
        n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if n >= M:
            return
        logs, distance = _log_factors(factors, n * factor_stride, D, 1), real(0)
        for i in range(D):
            factor, m = factors[at(n * factor_stride + i)], means[at(n * mean_stride + i)] - shift[at(i)]
            diagonal, y = factor * factor, factor * m
            distance += y * y
            out[at(i * M + n)] = half * diagonal
            out[at((D + i) * M + n)] = -(factor * y)
            out[at((F + i) * M + n)] = diagonal
        out[at((F - 1) * M + n)] = half * distance - logs
        out[at((F + D) * M + n)] = distance + abs(logs) + real(D)
        out[at((F + D + 1) * M + n)] = one

    return diag_naturals


def _guard(arithmetic: str) -> Callable[..., None]:
    limit = NUMBA_REALS[arithmetic](guard_of(np.dtype(arithmetic)))

    def guard(divergence: Any, sizes: Any, negative_entropy: Any, rejected: Any, columns: int) -> None:
        """−⟨η_q, E φ⟩ becomes KL; rejected ← 1 where that is small beside B. Thread: one pair; grid: rows below."""
        i, j = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if j >= columns:
            return
        place = at(i * columns + j)
        value = divergence[place] + negative_entropy[at(i)]
        divergence[place] = value
        rejected[place] = types.uint8(0) if value >= limit * sizes[place] else types.uint8(1)

    return guard


# ---- kernels: their signatures


def _name(what: str, arithmetic: str, in_shared: bool) -> str:
    return f"{what}, {arithmetic}, in {'shared' if in_shared else 'global'} memory"


@cache
def pair_kernel(covariance_type: str, arithmetic: str, in_shared: bool, given: bool = True) -> Kernel:
    """KL(p_i ‖ q_j); "diag" needs no memory, and one kernel serves it with P and without (`given`: both are there)."""
    real = flat(NUMBA_REALS[arithmetic])
    numba_types: Any = types
    sizes = numba_types.NamedUniTuple(types.int64, len(Size._fields), Size)
    signature = (*(real,) * 6, flat(types.int64), real, real, sizes)
    if covariance_type == "diag":
        return Kernel(f"KL of diag pairs, {arithmetic}", arithmetic, _diag_pairs(arithmetic), signature, THREADS)
    name = _name("KL of full pairs" if given else "KL of full pairs without P", arithmetic, in_shared)
    function = _full_pairs(arithmetic, in_shared, given)
    return Kernel(name, arithmetic, function, signature, WARP if given and not in_shared else THREADS)


@cache
def factor_kernel(arithmetic: str, in_shared: bool) -> Kernel:
    """Σ to P, or the check of Σ alone."""
    real = flat(NUMBA_REALS[arithmetic])
    signature = (real, real, real, flat(types.uint8), *integers(6))
    name = _name("precision factors", arithmetic, in_shared)
    return Kernel(name, arithmetic, _factors(arithmetic, in_shared), signature, THREADS if in_shared else WARP)


@cache
def expectation_kernel(covariance_type: str, arithmetic: str) -> Kernel:
    """p to E_p φ."""
    signature = (*(flat(NUMBA_REALS[arithmetic]),) * 6, *integers(6))
    function = _expectations(arithmetic, covariance_type == "full")
    return Kernel(f"{covariance_type} expectations, {arithmetic}", arithmetic, function, signature, THREADS)


@cache
def natural_kernel(covariance_type: str, arithmetic: str) -> Kernel:
    """q to −η_q."""
    signature = (*(flat(NUMBA_REALS[arithmetic]),) * 4, *integers(5))
    function = {"full": _full_naturals, "diag": _diag_naturals}[covariance_type](arithmetic)
    return Kernel(f"{covariance_type} naturals, {arithmetic}", arithmetic, function, signature, THREADS)


@cache
def guard_kernel(arithmetic: str) -> Kernel:
    """Inner products to divergences."""
    real = flat(NUMBA_REALS[arithmetic])
    signature = (real, real, real, flat(types.uint8), types.int64)
    return Kernel(f"guard of all pairs, {arithmetic}", arithmetic, _guard(arithmetic), signature, THREADS)


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    found = []
    for arithmetic in REALS:
        for in_shared in (True, False):
            found += [pair_kernel("full", arithmetic, in_shared, given) for given in (True, False)]
            found.append(factor_kernel(arithmetic, in_shared))
        for covariance_type in ("full", "diag"):
            found += [expectation_kernel(covariance_type, arithmetic), natural_kernel(covariance_type, arithmetic)]
        found += [pair_kernel("diag", arithmetic, False), guard_kernel(arithmetic)]
    return found
