"""The steps of the tile loop as Numba functions, for the kernels of this package and for other people's ``@njit``.

A tile is feature-major: row d of z holds feature d of T samples, so every loop below runs with unit stride over
samples and vectorises whatever D and K are. Tiles are C-contiguous arrays of one arithmetic dtype, float32 or float64,
and only their first `columns` columns take part. For speed let `columns` be a multiple of `column_step`, and let rows
start on 64-byte boundaries that are not a power of two apart, as `emalgam_kernels.numba_cpu.mixture` does.

The two products work on register blocks of `COMPONENTS_AT_ONCE` × `STATISTICS_AT_ONCE`. Of an odd number of components
the last goes alone; statistics have no remainders: Φ and η have `padded` F, and what is beyond F is zero or ignored.

Letters: N samples, D features, K components, F packed statistics, T columns of a tile. Nothing is validated. Functions
compile when they are first called; Numba's disk cache of a caller does not notice when this file changes.

>>> import numba, numpy as np
>>> @numba.njit
... def log_prob(z, natural, n_components, phi, logits, log_p, scratch):
...     feature_tile(SPHERICAL, z, z.shape[1], 0, phi)
...     logit_tile(natural, 0, phi, z.shape[1], False, logits)
...     softmax_tile(logits, n_components, z.shape[1], np.ones_like(log_p), False, log_p, scratch)
>>> unit = pack_natural(np.array([[-0.5, 0.0, 0.0, -np.log(2 * np.pi)]]), "float64")
>>> log_p = np.empty(64)
>>> log_prob(np.zeros((2, 64)), unit, 1, np.empty((6, 64)), np.empty((1, 64)), log_p, np.empty(64))
>>> float(log_p[0].round(6))
-1.837877
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
from numba.extending import overload

from emalgam_kernels import polynomials

Function = TypeVar("Function", bound=Callable[..., Any])

FULL: Final = 0
DIAG: Final = 1
SPHERICAL: Final = 2
LINEAR: Final = 3  # z, 1: for components that share their quadratic term
FEATURE_MAP_CODES: Final = {"full": FULL, "diag": DIAG, "spherical": SPHERICAL}

# 2 × 6 sums and the three operands of a product fit the 16 registers of AVX2; larger blocks would spill there.
COMPONENTS_AT_ONCE: Final = 2
STATISTICS_AT_ONCE: Final = 6
ROWS_OF_A_LOAD: Final = 32

# "contract" lets a product and the sum it goes into become one fused instruction. NaN, infinities, signed zeros and the
# order of operations keep their meaning. No function returns an array: it is compiled for its first caller, and what it
# returns to one that counts references must be counted, which those of `batch_memory` do not.
OPTIONS: Final[Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
INLINED: Final[Any] = OPTIONS | {"forceinline": True}  # a loop around a call would not vectorise
# A sum over samples is one chain of additions, and vectorises only if it may be split into lanes.
REDUCTION: Final[Any] = OPTIONS | {"fastmath": {"contract", "reassoc"}}


def compiled(options: Any) -> Callable[[Function], Function]:
    """Numba's njit; for the type checker the function stays what it was."""
    decorator: Any = numba.njit(**options)
    return cast(Callable[[Function], Function], decorator)


def constant(value: int) -> Any:
    """A number or bool as NumPy has them: Numba compiles a function once more for each of Python's that it is given."""
    return np.bool_(value) if isinstance(value, bool) else np.int64(value)


_FIRST, _REPLACE = constant(0), constant(False)


def column_step(dtype: str) -> int:
    """Columns of eight 64-byte registers: at multiples of it, unrolled loops leave no slow remainder.

    >>> column_step("float64"), column_step("float32")
    (64, 128)
    """
    return 8 * 64 // np.dtype(dtype).itemsize


def padded(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`.

    >>> padded(10, 4), padded(12, 4)
    (12, 12)
    """
    return -(-count // multiple) * multiple


def pack_natural(natural: np.ndarray, arithmetic: str) -> np.ndarray:
    """η as `logit_tile` reads it: converted, and padded with zeros to whole blocks of statistics.

    Parameters
    ----------
    natural : (..., K, F) float64
        Natural parameters, or the transposes of any matrices that tiles are to be multiplied with.
    arithmetic : {"float32", "float64"}

    Returns
    -------
    (..., K, padded F) of dtype `arithmetic`

    >>> pack_natural(np.ones((3, 6)), "float32").shape
    (3, 6)
    """
    *outer, K, F = natural.shape
    packed = np.zeros((*outer, K, padded(F, STATISTICS_AT_ONCE)), arithmetic)
    packed[..., :F] = natural
    return packed


# ---- exp and log ---------------------------------------------------------------------------------------------------


def _exp_of(dtype: str, integer: type[np.int32] | type[np.int64], mantissa_bits: int, bias: int) -> Callable[..., Any]:
    """exp for one dtype. Constants have that dtype too: a Python float would make float32 arithmetic float64."""
    real = np.dtype(dtype).type
    q = tuple(real(c) for c in polynomials.EXP[dtype])
    degree = len(q)
    log2_e, underflow = real(polynomials.LOG2_E[dtype]), real(polynomials.EXP_UNDERFLOW[dtype])
    ln2_high, ln2_low = real(polynomials.LN2_HIGH[dtype]), real(polynomials.LN2_LOW[dtype])
    round_to_integer = real(1.5 * 2**mantissa_bits)
    exponent_bias = integer(bias << mantissa_bits)
    zero, one = real(0), real(1)

    def exp(x: Any) -> Any:
        # n = round(x log2 e), r = x − n ln 2, exp(x) = 2ⁿ (1 + r + r² q(r)).
        shifted = real(x * log2_e + round_to_integer)
        n = shifted - round_to_integer
        r = (x - n * ln2_high) - n * ln2_low
        p = q[0]
        for i in range(1, degree):
            p = p * r + q[i]
        p = p * (r * r) + r + one
        # The low bits of `shifted` hold n: move them into the exponent.
        power = integer((shifted.view(integer) << mantissa_bits) + exponent_bias).view(real)
        return zero if x < underflow else p * power

    return exp


def _log_of(dtype: str, integer: type[np.int32] | type[np.int64], mantissa_bits: int) -> Callable[..., Any]:
    """log for one dtype."""
    real = np.dtype(dtype).type
    c = tuple(real(value) for value in polynomials.LOG[dtype])
    degree = len(c)
    ln2_high, ln2_low = real(polynomials.LN2_HIGH[dtype]), real(polynomials.LN2_LOW[dtype])
    sqrt_half_bits = real(np.sqrt(0.5)).view(integer)
    one, two, half_of_one = real(1), real(2), real(0.5)

    def log(x: Any) -> Any:
        # x = 2ᵉ (1 + f) with a mantissa 1 + f in [√½, √2); x − x lets NaN through, whose bits would look like a number.
        bits = real(x).view(integer)
        e = integer(integer(bits - sqrt_half_bits) >> mantissa_bits)
        f = integer(bits - (e << mantissa_bits)).view(real) - (x - x + one)
        # s = f / (2 + f), log(1 + f) = f − (f²/2 − s (f²/2 + s² p(s²))).
        s = f / (f + two)
        z = s * s
        half = half_of_one * f * f
        p = c[0]
        for i in range(1, degree):
            p = p * z + c[i]
        exponent = real(e)
        return exponent * ln2_high + (f - (half - (s * (half + z * p) + exponent * ln2_low)))

    return log


_exp_float64, _exp_float32 = _exp_of("float64", np.int64, 52, 1023), _exp_of("float32", np.int32, 23, 127)
_log_float64, _log_float32 = _log_of("float64", np.int64, 52), _log_of("float32", np.int32, 23)


def exp(x: Any) -> Any:
    """exp(x) for x ≤ 0, or ≤ 650 in float64, ≤ 2 ulp; 0 where the result would be subnormal, NaN for NaN.

    >>> @numba.njit
    ... def half(x):
    ...     return exp(x) / 2
    >>> half(0.0)
    0.5
    """
    with np.errstate(over="ignore", invalid="ignore"):  # not under Numba: integers wrap around as they do there
        return (_exp_float32 if isinstance(x, np.float32) else _exp_float64)(x)


def log(x: Any) -> Any:
    """log(x) for normal x > 0, float32 or float64, ≤ 2 ulp; NaN for NaN."""
    with np.errstate(over="ignore", invalid="ignore"):  # not under Numba: integers wrap around as they do there
        return (_log_float32 if isinstance(x, np.float32) else _log_float64)(x)


@overload(exp, jit_options=INLINED)
def _exp_in_numba(x: Any) -> Any:
    return _exp_float32 if x == numba.float32 else _exp_float64


@overload(log, jit_options=INLINED)
def _log_in_numba(x: Any) -> Any:
    return _log_float32 if x == numba.float32 else _log_float64


@compiled(INLINED)
def fill_row(row: np.ndarray, columns: int, value: int) -> None:
    for n in range(columns):
        row[n] = value


@compiled(INLINED)
def copy_row(row: np.ndarray, columns: int, out: np.ndarray) -> None:
    for n in range(columns):
        out[n] = row[n]


# ---- load ----------------------------------------------------------------------------------------------------------


@compiled(OPTIONS)
def load_tile(
    x: np.ndarray,
    sample_weight: np.ndarray,
    columns: int,
    shift: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
    z: np.ndarray,
) -> None:
    """z ← (x − shift) · scale, one column for each row of x.

    z is zero in further columns, in rows beyond D, and where the weight is zero: such a sample may hold anything
    finite, and 0 · φ must be 0.

    Parameters
    ----------
    x : (≤ columns, D) float32 or float64, any strides
    sample_weight : (len(x),) float64, or empty for ones
    shift, scale : (D,) float64
    weight : (≥ columns,)
        Receives ω, zero in further columns.
    z : (≥ D, ≥ columns)
        Receives the samples, feature-major.
    """
    D, rows = len(shift), len(x)
    fill_row(weight, columns, 0)
    fill_row(weight, rows, 1)
    for n in range(len(sample_weight)):
        weight[n] = sample_weight[n]
    for d in range(len(z)):
        fill_row(z[d, rows if d < D else 0 : columns], columns - (rows if d < D else 0), 0)
    # A few rows at a time, so that the cache lines of row-major x are still there for the next feature.
    for first in range(0, rows, ROWS_OF_A_LOAD):
        last = min(first + ROWS_OF_A_LOAD, rows)
        for d in range(D):
            column, centre, factor, out = x[first:last, d], shift[d], scale[d], z[d, first:last]
            for n in range(len(column)):
                out[n] = (column[n] - centre) * factor
    if len(sample_weight) == 0:
        return
    for n in range(rows):
        if weight[n] == 0:
            for d in range(D):
                z[d, n] = 0


# ---- features ------------------------------------------------------------------------------------------------------


@compiled(INLINED)
def _multiply(a: np.ndarray, b: np.ndarray, columns: int, out: np.ndarray) -> None:
    for n in range(columns):
        out[n] = a[n] * b[n]


@compiled(INLINED)
def _sum_of_squares(y: np.ndarray, columns: int, out: np.ndarray) -> None:
    """Σ_d y_d², (D, T) → (T,)."""
    fill_row(out, columns, 0)
    for d in range(len(y)):
        row = y[d]
        for n in range(columns):
            out[n] += row[n] * row[n]


@compiled(INLINED)
def quadratic_count(feature_map: int, n_features: int) -> int:
    """How many rows of φ come before z and 1."""
    D = n_features
    return (
        D * (D + 1) // 2 if feature_map == FULL else D if feature_map == DIAG else 1 if feature_map == SPHERICAL else 0
    )


@compiled(OPTIONS)
def feature_tile(feature_map: int, z: np.ndarray, columns: int, first: int, phi: np.ndarray) -> None:
    """Rows [first, first + len(phi)) of φ(z): full z_i z_j (i ≥ j), z_i, 1; diag z_i², z_i, 1; spherical ‖z‖², z_i, 1.

    Parameters
    ----------
    feature_map : int
        `FULL`, `DIAG`, `SPHERICAL`, or `LINEAR` for z_i, 1.
    z : (D, ≥ columns)
    phi : (rows, ≥ columns)
        Receives the features; rows beyond F are zero.
    """
    D = len(z)
    quadratic = quadratic_count(feature_map, D)
    i, j = 0, first  # full: the pair of the row, counted along the triangle
    while feature_map == FULL and j > i:
        i, j = i + 1, j - i - 1
    for row in range(len(phi)):
        f, out = first + row, phi[row]
        if f >= quadratic + D:
            fill_row(out, columns, 1 if f == quadratic + D else 0)
        elif f >= quadratic:
            copy_row(z[f - quadratic], columns, out)
        elif feature_map == SPHERICAL:
            _sum_of_squares(z, columns, out)
        elif feature_map == DIAG:
            _multiply(z[f], z[f], columns, out)
        else:
            _multiply(z[i], z[j], columns, out)
            i, j = (i, j + 1) if j < i else (i + 1, 0)


# ---- L = η Φᵀ ------------------------------------------------------------------------------------------------------


@compiled(INLINED)
def _six(row: np.ndarray, first: int) -> Any:
    """`STATISTICS_AT_ONCE` elements."""
    return row[first], row[first + 1], row[first + 2], row[first + 3], row[first + 4], row[first + 5]


@compiled(OPTIONS)
def logit_tile(
    natural: np.ndarray, first: int, phi: np.ndarray, columns: int, accumulate: bool, logits: np.ndarray
) -> None:
    """L ← η[:, first : first + len(phi)] Φᵀ (+ L), in nats.

    Parameters
    ----------
    natural : (K, padded F)
        What `pack_natural` returns.
    phi : (rows, ≥ columns)
        `rows` is a multiple of `STATISTICS_AT_ONCE`.
    accumulate : bool
        Add to L, for all but the first of several blocks of features.
    logits : (≥ K, ≥ columns)
        Receives L_kn.
    """
    zero = logits.dtype.type(0)
    for row in range(0, len(phi), STATISTICS_AT_ONCE):
        p, q, r, s, t, u = phi[row], phi[row + 1], phi[row + 2], phi[row + 3], phi[row + 4], phi[row + 5]
        f, add = first + row, accumulate or row > 0
        for k in range(1, len(natural), COMPONENTS_AT_ONCE):
            a, b = logits[k - 1], logits[k]
            ap, aq, ar, as_, at, au = _six(natural[k - 1], f)
            bp, bq, br, bs, bt, bu = _six(natural[k], f)
            for n in range(columns):  # nothing is stored before all is loaded, so that a load serves both components
                x, y = (a[n], b[n]) if add else (zero, zero)
                x = x + ap * p[n] + aq * q[n] + ar * r[n] + as_ * s[n] + at * t[n] + au * u[n]
                y = y + bp * p[n] + bq * q[n] + br * r[n] + bs * s[n] + bt * t[n] + bu * u[n]
                a[n], b[n] = x, y
        if len(natural) % COMPONENTS_AT_ONCE == 1:
            a = logits[len(natural) - 1]
            ap, aq, ar, as_, at, au = _six(natural[len(natural) - 1], f)
            for n in range(columns):
                x = a[n] if add else zero
                a[n] = x + ap * p[n] + aq * q[n] + ar * r[n] + as_ * s[n] + at * t[n] + au * u[n]


# ---- log-sum-exp ---------------------------------------------------------------------------------------------------


@compiled(INLINED)
def _maximum(logits: np.ndarray, n_components: int, columns: int, out: np.ndarray) -> None:
    """max_k L_k."""
    copy_row(logits[0], columns, out)
    for k in range(1, n_components):
        row = logits[k]
        for n in range(columns):
            out[n] = row[n] if row[n] > out[n] else out[n]


@compiled(INLINED)
def _choose_maximum(
    logits: np.ndarray, n_components: int, columns: int, weight: np.ndarray, top: np.ndarray, chosen: np.ndarray
) -> None:
    """L_k ← ω where L_k is the first to equal the maximum, else 0."""
    real = logits.dtype.type
    zero, one = real(0), real(1)
    fill_row(chosen, columns, 0)
    for k in range(n_components):
        row = logits[k]
        for n in range(columns):
            is_first = row[n] == top[n] and chosen[n] == zero
            chosen[n] = one if is_first else chosen[n]
            row[n] = weight[n] if is_first else zero


@compiled(OPTIONS)
def softmax_tile(
    logits: np.ndarray,
    n_components: int,
    columns: int,
    weight: np.ndarray,
    hard: bool,
    log_prob: np.ndarray,
    total: np.ndarray,
) -> None:
    """L ← ω softmax_k(L) and log p ← log Σ_k exp(L_k), with the maximum taken out.

    Parameters
    ----------
    logits : (≥ K, ≥ columns)
        L on entry, weighted responsibilities on return.
    n_components : int
        K; further rows are left alone.
    weight : (≥ columns,)
        ω.
    hard : bool
        Put ω at the (first) maximum of L instead; log p is that maximum.
    log_prob : (≥ columns,)
        Receives log p, in nats.
    total : (≥ columns,)
        Scratch.
    """
    if n_components == 1:  # nothing to choose: r = 1
        for n in range(columns):
            log_prob[n] = logits[0, n]
            logits[0, n] = weight[n]
        return
    top = log_prob
    _maximum(logits, n_components, columns, top)
    if hard:
        _choose_maximum(logits, n_components, columns, weight, top, total)
        return
    fill_row(total, columns, 0)
    for k in range(n_components):
        row = logits[k]
        for n in range(columns):
            exponential = exp(row[n] - top[n])
            row[n] = exponential
            total[n] += exponential
    for n in range(columns):
        log_prob[n] = top[n] + log(total[n])
        total[n] = weight[n] / total[n]
    for k in range(n_components):
        row = logits[k]
        for n in range(columns):
            row[n] *= total[n]


# ---- S += R Φ ------------------------------------------------------------------------------------------------------


@compiled(INLINED)
def _add_six(row: np.ndarray, first: int, p: float, q: float, s: float, t: float, u: float, v: float) -> None:
    row[first] += p
    row[first + 1] += q
    row[first + 2] += s
    row[first + 3] += t
    row[first + 4] += u
    row[first + 5] += v


@compiled(REDUCTION)
def statistic_tile(r: np.ndarray, phi: np.ndarray, columns: int, first: int, statistics: np.ndarray) -> None:
    """S[:, first : first + len(phi)] += R Φ over one tile: summed in the arithmetic type, added in float64.

    Parameters
    ----------
    r : (K, ≥ columns)
        Weighted responsibilities.
    phi : (rows, ≥ columns)
        `rows` is a multiple of `STATISTICS_AT_ONCE`.
    statistics : (≥ K, padded F) float64
        Added to.
    """
    zero = r.dtype.type(0)
    for row in range(0, len(phi), STATISTICS_AT_ONCE):
        p, q, s, t, u, v = phi[row], phi[row + 1], phi[row + 2], phi[row + 3], phi[row + 4], phi[row + 5]
        f = first + row
        for k in range(1, len(r), COMPONENTS_AT_ONCE):
            a, b = r[k - 1], r[k]
            ap = aq = as_ = at = au = av = bp = bq = bs = bt = bu = bv = zero
            for n in range(columns):  # both products with a feature side by side, so that one register holds it
                ap += a[n] * p[n]
                bp += b[n] * p[n]
                aq += a[n] * q[n]
                bq += b[n] * q[n]
                as_ += a[n] * s[n]
                bs += b[n] * s[n]
                at += a[n] * t[n]
                bt += b[n] * t[n]
                au += a[n] * u[n]
                bu += b[n] * u[n]
                av += a[n] * v[n]
                bv += b[n] * v[n]
            _add_six(statistics[k - 1], f, ap, aq, as_, at, au, av)
            _add_six(statistics[k], f, bp, bq, bs, bt, bu, bv)
        if len(r) % COMPONENTS_AT_ONCE == 1:
            a = r[len(r) - 1]
            ap = aq = as_ = at = au = av = zero
            for n in range(columns):
                ap += a[n] * p[n]
                aq += a[n] * q[n]
                as_ += a[n] * s[n]
                at += a[n] * t[n]
                au += a[n] * u[n]
                av += a[n] * v[n]
            _add_six(statistics[len(r) - 1], f, ap, aq, as_, at, au, av)


@compiled(REDUCTION)
def inner_product(a: np.ndarray, b: np.ndarray, count: int) -> float:
    """Σ_n a_n b_n over the first `count` elements, in float64."""
    total = 0.0
    for n in range(count):
        total += np.float64(a[n]) * np.float64(b[n])
    return total


# ---- both products, a block of features at a time ------------------------------------------------------------------


@compiled(OPTIONS)
def packed_logit_tile(
    feature_map: int,
    natural: np.ndarray,
    z: np.ndarray,
    columns: int,
    ready: bool,
    phi: np.ndarray,
    logits: np.ndarray,
) -> None:
    """L ← η Φᵀ, in nats.

    Parameters
    ----------
    feature_map : int
        See `feature_tile`.
    natural : (K, padded F)
        What `pack_natural` returns.
    z : (D, ≥ columns)
    ready : bool
        phi holds all features of these columns already.
    phi : (≤ padded F, ≥ columns)
        Receives the features, as many rows at a time as it has; all of them stay there if it has padded F.
    logits : (≥ K, ≥ columns)
        Receives L_kn.
    """
    F = natural.shape[1]
    for first in range(0, F, len(phi)):
        block = phi[: min(len(phi), F - first)]
        if not ready:
            feature_tile(feature_map, z, columns, first, block)
        logit_tile(natural, first, block, columns, first > 0, logits)


@compiled(OPTIONS)
def packed_statistic_tile(
    feature_map: int,
    z: np.ndarray,
    r: np.ndarray,
    columns: int,
    ready: bool,
    phi: np.ndarray,
    statistics: np.ndarray,
) -> None:
    """S += R Φ; the parameters are those of `packed_logit_tile` and `statistic_tile`."""
    F = statistics.shape[1]
    for first in range(0, F, len(phi)):
        block = phi[: min(len(phi), F - first)]
        if not ready:
            feature_tile(feature_map, z, columns, first, block)
        statistic_tile(r, block, columns, first, statistics)


# ---- the same two steps about each component's own mean ------------------------------------------------------------


@compiled(INLINED)
def _centre_tile(z: np.ndarray, mean: np.ndarray, columns: int, y: np.ndarray) -> None:
    """y ← (z − μ, 1, 0 …), (≥ D + 1, T)."""
    D = len(mean)
    for d in range(D):
        row, out = z[d], y[d]
        for n in range(columns):
            out[n] = row[n] - mean[d]
    for d in range(D, len(y)):
        fill_row(y[d], columns, 1 if d == D else 0)


@compiled(OPTIONS)
def direct_logit_tile(
    feature_map: int,
    factors: np.ndarray,
    means: np.ndarray,
    log_constants: np.ndarray,
    z: np.ndarray,
    columns: int,
    y: np.ndarray,
    whitened: np.ndarray,
    logits: np.ndarray,
) -> None:
    """L_k ← c_k − ½ ‖P_kᵀ (z − μ_k)‖², in nats: the logits without features, for parameters that would cancel.

    Parameters
    ----------
    feature_map : int
        `FULL` or `DIAG`.
    factors : (K or 1, D, padded D) or (K, 1, D)
        Full: `pack_natural` of the P_kᵀ, or of one that all components share. Diag: the diagonals of the P_k.
    means : (K, D)
    log_constants : (K,)
    z : (D, ≥ columns)
    y, whitened : (D + 1 padded, ≥ columns), (≥ D, ≥ columns)
        Scratch.
    logits : (≥ K, ≥ columns)
        Receives L_kn.
    """
    D = len(z)
    half = z.dtype.type(0.5)
    for k in range(len(means)):
        factor, row, constant = factors[min(k, len(factors) - 1)], logits[k], log_constants[k]
        if feature_map == FULL:
            _centre_tile(z, means[k], columns, y)
            logit_tile(factor, _FIRST, y[: factor.shape[1]], columns, _REPLACE, whitened)
            _sum_of_squares(whitened[:D], columns, row)
        else:
            fill_row(row, columns, 0)
            for d in range(D):
                feature, mean, precision = z[d], means[k, d], factor[0, d]
                for n in range(columns):
                    distance = (feature[n] - mean) * precision
                    row[n] += distance * distance
        for n in range(columns):
            row[n] = constant - half * row[n]


@compiled(OPTIONS)
def direct_statistic_tile(
    feature_map: int,
    means: np.ndarray,
    z: np.ndarray,
    r: np.ndarray,
    columns: int,
    y: np.ndarray,
    weighted: np.ndarray,
    products: np.ndarray,
    statistics: np.ndarray,
) -> None:
    """S_k += Σ_n r_nk φ(z_n − μ_k): statistics about each component's own mean.

    With y = (z − μ_k, 1), the lower triangle of Σ r y yᵀ, row by row, is the full feature map's S_k.

    Parameters
    ----------
    feature_map : int
        `FULL` or `DIAG`.
    means : (K, D)
    z : (D, ≥ columns)
    r : (≥ K, ≥ columns)
        Weighted responsibilities.
    y, weighted : (D + 1 padded, ≥ columns), (D + 1, ≥ columns)
        Scratch.
    products : (D + 1, D + 1 padded) float64
        Scratch.
    statistics : (≥ K, ≥ F) float64
        Added to.
    """
    D = len(z)
    for k in range(len(means)):
        _centre_tile(z, means[k], columns, y)
        for d in range(len(weighted)):
            _multiply(y[d], r[k], columns, weighted[d])
        if feature_map == DIAG:
            for d in range(D):
                statistics[k, d] += inner_product(weighted[d], y[d], columns)
            for d in range(D + 1):
                statistics[k, D + d] += inner_product(r[k], y[d], columns)
            continue
        for row in products:
            fill_row(row, len(row), 0)
        statistic_tile(weighted, y, columns, _FIRST, products)
        f = 0
        for i in range(D + 1):
            for j in range(i + 1):
                statistics[k, f] += products[i, j]
                f += 1
