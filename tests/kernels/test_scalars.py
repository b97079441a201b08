"""Random numbers one at a time: columns of the alias table in integers, where float64 rounds and where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from emalgam_kernels.scalars import column_of, unit_float64, unit_integer


def in_float64(odd: int, n_columns: int) -> int:
    """The specification: ⌊u K⌋ with u = odd · 2⁻⁵³, which float64 holds, and a product that it rounds."""
    return int(np.float64(odd * 2.0**-53) * n_columns)


def test_unit_integer_is_the_uniform() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (200, 2), dtype=np.uint64)
    words[0], words[1] = 0, 2**32 - 1
    for low, high in words:
        assert float(int(unit_integer(low, high)) * 2.0**-53) == float(unit_float64(low, high))


@pytest.mark.parametrize("n_columns", [1, 2, 3, 16, 257, 65_537, 10**6 + 3, 2**31 - 1])
def test_columns_are_those_of_float64(n_columns: int) -> None:
    """Anywhere, and for the largest u below each of some columns: there the product may be rounded up to it."""
    rng, rounded_up = np.random.default_rng(n_columns), 0
    odd = [2 * int(k) + 1 for k in rng.integers(0, 2**52, 300)] + [1, 2**53 - 1]
    columns = {*range(1, min(n_columns, 300)), *map(int, rng.integers(1, n_columns + 1, 300)), n_columns}
    for column in columns:
        below = (column * 2**53 - 1) // n_columns
        odd += [each for each in range(below - 2, below + 4) if each % 2 and 0 < each < 2**53]
    for each in odd:
        found = int(column_of(np.uint64(each), np.uint64(n_columns)))
        assert found == in_float64(each, n_columns) < n_columns, f"2⁵³ u = {each}"
        rounded_up += found != each * n_columns >> 53
    assert (rounded_up > 0) == (n_columns in (3, 257, 65_537, 10**6 + 3, 2**31 - 1)), f"{rounded_up} were rounded up"
