"""Random numbers one at a time, in plain Python on NumPy's scalars: what Numba compiles for processors and for GPUs.

A word of Philox is kept in a uint64, so that a product of two words needs no wider type. Every constant is a uint64
too: with a Python int, Numba's arithmetic would go on in float64.

>>> import numpy as np
>>> zero = np.uint64(0)
>>> words = philox(zero, zero, zero, zero)
>>> [f"{word:08x}" for word in words]
['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
>>> float(unit_float32(np.uint64(2**31)) - 0.5) == 2.0**-24
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from emalgam_kernels import polynomials
from emalgam_kernels.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS

_0, _1, _2, _9, _12, _21, _32 = (np.uint64(value) for value in (0, 1, 2, 9, 12, 21, 32))
_LOW: Final = np.uint64(0xFFFFFFFF)
_LOW_21: Final = np.uint64(2**21 - 1)
_ALL_53: Final = np.uint64(2**53)
_MULTIPLIERS: Final = tuple(np.uint64(value) for value in MULTIPLIERS)
_KEY_INCREMENTS: Final = tuple(np.uint64(value) for value in KEY_INCREMENTS)
_ONE_BITS_FLOAT64: Final = np.float64(1).view(np.uint64)
_ONE_BITS_FLOAT32: Final = np.float32(1).view(np.uint32)
_BELOW_ONE_FLOAT64: Final = np.float64(1 - 2.0**-53)
_BELOW_ONE_FLOAT32: Final = np.float32(1 - 2.0**-24)


# ---- Philox and uniforms -------------------------------------------------------------------------------------------


def philox(
    seed: np.uint64, stream: np.uint64, block: np.uint64, row: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """The four words of Philox4x32-10, each uint64 below 2³². Salmon et al. (2011)."""
    a, b, c, d = row & _LOW, row >> _32, stream, block
    first_key, second_key = seed & _LOW, seed >> _32
    for _ in range(ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (right >> _32) ^ b ^ first_key, right & _LOW
        c, d = (left >> _32) ^ d ^ second_key, left & _LOW
        first_key, second_key = (first_key + _KEY_INCREMENTS[0]) & _LOW, (second_key + _KEY_INCREMENTS[1]) & _LOW
    return a, b, c, d


def unit_float64(low: np.uint64, high: np.uint64) -> np.float64:
    """(k + ½) 2⁻⁵² of the 52 highest bits k of two words: 1 + k 2⁻⁵² by its bits, less 1 − 2⁻⁵³."""
    return np.uint64(((high << _32) | low) >> _12 | _ONE_BITS_FLOAT64).view(np.float64) - _BELOW_ONE_FLOAT64


def unit_float32(word: np.uint64) -> np.float32:
    """(k + ½) 2⁻²³ of the 23 highest bits k of a word."""
    return np.uint32(np.uint32(word >> _9) | _ONE_BITS_FLOAT32).view(np.float32) - _BELOW_ONE_FLOAT32


# ---- labels without float64 ----------------------------------------------------------------------------------------


def unit_integer(low: np.uint64, high: np.uint64) -> np.uint64:
    """2⁵³ u for the uniform u = `unit_float64` of the same words: an odd integer.

    >>> int(unit_integer(np.uint64(0), np.uint64(2**31))) - 2**52
    1
    """
    return (((high << _32) | low) >> _12) * _2 + _1


def column_of(odd: np.uint64, n_columns: np.uint64) -> np.uint64:
    """⌊u K⌋ for u = odd · 2⁻⁵³ and K < 2³¹ columns, with u K rounded to float64 first as the specification has it.

    >>> int(column_of(unit_integer(np.uint64(0), np.uint64(2**31)), np.uint64(10)))
    5
    """
    # odd · K = column · 2⁵³ + rest, in two words of 32 bits and more
    lower = (odd & _LOW) * n_columns
    upper = (odd >> _32) * n_columns + (lower >> _32)
    column, missing = upper >> _21, _ALL_53 - (((upper & _LOW_21) << _32) | (lower & _LOW))
    # What is missing to the next integer is rounded away if it is at most half a unit of the 53rd digit of u K: the
    # largest power of two that is not above `column`.
    if missing <= column:
        power = _1
        while power < missing:
            power = power * _2
        if power <= column:
            column = column + _1
    return column


# ---- normals -------------------------------------------------------------------------------------------------------


def cos_sin_of(dtype: str, integer: type[np.int32] | type[np.int64], mantissa_bits: int) -> Callable[..., Any]:
    """The function that returns cos 2πu and sin 2πu for u in [0, 1] of one dtype, ≤ 2 ulp."""
    real = np.dtype(dtype).type
    s_coefficients = tuple(real(value) for value in polynomials.SIN[dtype])
    c_coefficients = tuple(real(value) for value in polynomials.COS[dtype])
    degree = len(s_coefficients)
    round_to_integer, four, one = real(1.5 * 2**mantissa_bits), real(4), real(1)
    first_bit, second_bit = integer(1), integer(2)

    def cos_sin(u: Any) -> Any:
        # 4 u = q + r with an integer q and |r| ≤ ½, both exact, then q quarter turns of the angle rπ/2.
        shifted = real(u * four + round_to_integer)
        r = u * four - (shifted - round_to_integer)
        z = r * r
        s, c = s_coefficients[0], c_coefficients[0]
        for i in range(1, degree):
            s = s * z + s_coefficients[i]
            c = c * z + c_coefficients[i]
        s = s * r
        c = c * z + one
        # The low bits of `shifted` hold q: odd ones swap the two, and the signs follow the quadrant.
        quarter = shifted.view(integer)
        odd = (quarter & first_bit) != 0
        cosine, sine = (s if odd else c), (c if odd else s)
        cosine = -cosine if ((quarter + first_bit) & second_bit) != 0 else cosine
        sine = -sine if (quarter & second_bit) != 0 else sine
        return cosine, sine

    return cos_sin


cos_sin_float64, cos_sin_float32 = cos_sin_of("float64", np.int64, 52), cos_sin_of("float32", np.int32, 23)
