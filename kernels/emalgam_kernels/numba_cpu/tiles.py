"""The steps of the tile loop as Numba functions, for the kernels of this package and for other people's ``@njit``.

A tile is feature-major: row d of z holds feature d of T samples, so every loop below runs with unit stride over samples
and vectorises whatever D and K are. Tiles are C-contiguous arrays of one arithmetic dtype, float32 or float64; only their
first `columns` columns take part. For speed let `columns` be a multiple of 64, and rows start on 64-byte boundaries that
are not a power of two apart (`emalgam_kernels.numba_cpu.mixture` shows how).

The two products work on register blocks of `COMPONENTS_AT_ONCE` × `STATISTICS_AT_ONCE`, and there is no code for
remainders: tiles that take part in them have `padded` numbers of rows, and rows beyond K or F hold zeros or are ignored.

Letters: N samples, D features, K components, F packed statistics, T columns of a tile. Nothing is validated. Numba's disk
cache of a function that calls these does not notice when this file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import numba
import numpy as np
from numba.extending import overload

from emalgam_kernels import polynomials

Function = TypeVar("Function", bound=Callable[..., Any])

FULL: Final = 0
DIAG: Final = 1
SPHERICAL: Final = 2
FEATURE_MAP_CODES: Final = {"full": FULL, "diag": DIAG, "spherical": SPHERICAL}

# 2 × 4 sums and their operands fit the 16 registers of AVX2; larger blocks gain nothing on AVX-512 and spill on AVX2.
COMPONENTS_AT_ONCE: Final = 2
STATISTICS_AT_ONCE: Final = 4


def tile_function(function: Function) -> Function:
    """Compile for callers without the GIL; "contract" lets a product and a sum become one fused instruction."""
    return numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)  # type: ignore[no-any-return]


def reduction(function: Function) -> Function:
    """As `tile_function`, and sums over samples may be split into the lanes of a register ("reassoc").

    Without that permission a sum is one chain of additions and cannot vectorise. NaN, infinities and signed zeros
    keep their meaning.
    """
    options: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
    return options(function)  # type: ignore[no-any-return]


def inlined(function: Function) -> Function:
    """As `tile_function`, and always inlined: a loop around a call would not vectorise."""
    options: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"}, forceinline=True)
    return options(function)  # type: ignore[no-any-return]


def padded(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`.

    >>> padded(10, 4), padded(12, 4)
    (12, 12)
    """
    return -(-count // multiple) * multiple


def pack_natural(natural: np.ndarray, arithmetic: str) -> np.ndarray:
    """η as `logit_tile` reads it: converted, and padded with zeros to whole register blocks.

    Parameters
    ----------
    natural : (..., K, F) float64
        Natural parameters, or the transposes of any matrices that tiles are to be multiplied with.
    arithmetic : {"float32", "float64"}

    Returns
    -------
    (..., padded K, padded F) of dtype `arithmetic`

    >>> pack_natural(np.ones((3, 6)), "float32").shape
    (4, 8)
    """
    *outer, K, F = natural.shape
    packed = np.zeros((*outer, padded(K, COMPONENTS_AT_ONCE), padded(F, STATISTICS_AT_ONCE)), arithmetic)
    packed[..., :K, :F] = natural
    return packed


# ---- exp and log ---------------------------------------------------------------------------------------------------


def _exp_of(dtype: str, integer: type[np.int32] | type[np.int64], mantissa_bits: int, bias: int) -> Callable[..., Any]:
    """exp for one dtype; every constant has that dtype, because a Python float would make float32 arithmetic float64."""
    real = np.dtype(dtype).type
    q = tuple(real(c) for c in polynomials.EXP[dtype])
    degree = len(q)
    log2_e, ln2_high, ln2_low = (real(p[dtype]) for p in (polynomials.LOG2_E, polynomials.LN2_HIGH, polynomials.LN2_LOW))
    underflow = real(polynomials.EXP_UNDERFLOW[dtype])
    round_to_integer = real(1.5 * 2**mantissa_bits)
    exponent_bias = integer(bias << mantissa_bits)
    zero, one = real(0), real(1)

    @inlined
    def exp(x):  # type: ignore[no-untyped-def]
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

    @inlined
    def log(x):  # type: ignore[no-untyped-def]
        # x = 2ᵉ (1 + f) with a mantissa 1 + f in [√½, √2).
        bits = real(x).view(integer)
        e = integer(integer(bits - sqrt_half_bits) >> mantissa_bits)
        f = integer(bits - (e << mantissa_bits)).view(real) - one
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
    """exp(x) for x ≤ 0, float32 or float64, ≤ 2 ulp; 0 where the result would be subnormal, NaN for NaN.

    >>> @numba.njit
    ... def half(x):
    ...     return exp(x) / 2
    >>> half(0.0)
    0.5
    """
    return (_exp_float32 if isinstance(x, np.float32) else _exp_float64)(x)


def log(x: Any) -> Any:
    """log(x) for normal x > 0, float32 or float64, ≤ 2 ulp; NaN for NaN."""
    return (_log_float32 if isinstance(x, np.float32) else _log_float64)(x)


@overload(exp)
def _exp_in_numba(x: Any) -> Any:
    exp_of_type = _exp_float32 if x == numba.float32 else _exp_float64
    return lambda x: exp_of_type(x)


@overload(log)
def _log_in_numba(x: Any) -> Any:
    log_of_type = _log_float32 if x == numba.float32 else _log_float64
    return lambda x: log_of_type(x)


# ---- load ----------------------------------------------------------------------------------------------------------


@tile_function
def load_tile(x, sample_weight, start, rows, columns, shift, scale, weight, z):  # type: ignore[no-untyped-def]
    real = z.dtype.type
    for n in range(rows):
        weight[n] = sample_weight[start + n] if len(sample_weight) > 0 else 1.0
    for n in range(rows, columns):
        weight[n] = 0
    for d in range(len(shift)):
        for n in range(rows):
            z[d, n] = (x[start + n, d] - shift[d]) * scale[d]
        for n in range(rows, columns):
            z[d, n] = 0
    for d in range(len(shift), len(z)):
        for n in range(columns):
            z[d, n] = 0
    if len(sample_weight) == 0:
        return
    for n in range(rows):
        if weight[n] == 0:
            for d in range(len(shift)):
                z[d, n] = 0
