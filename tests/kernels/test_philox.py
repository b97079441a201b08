"""Philox4x32-10 and its uniforms: known answers, the same bits on every backend, and what makes them random."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

import emalgam_kernels
from emalgam_kernels import philox
from tests.conftest import DTYPES, SIMULATED

KNOWN_ANSWERS = Path(__file__).parents[1] / "data" / "philox4x32_10.txt"
HEADER = Path(emalgam_kernels.__file__).parent / "cython_cpu" / "sample_tiles.h"
SEED = 0x0123456789ABCDEF
FIRST_ROWS = (0, 1, 2**32 - 50, 2**64 - 50)  # the last two carry, and wrap around
N = 500 if SIMULATED else 100_000
FALSE_ALARM = 1e-4  # of each test of a distribution; the seeds are fixed, so what passes once passes always
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def kernels(backend: str) -> ModuleType:
    return emalgam_kernels.load(backend, "sampling")


def known_answers() -> list[tuple[list[int], list[int], list[int]]]:
    """Counter, key and output of every line."""
    lines = (line for line in KNOWN_ANSWERS.read_text().splitlines() if line and not line.startswith("#"))
    return [
        tuple([int(word, 16) for word in part.split()] for part in re.split(r"\||->", line))  # type: ignore[misc]
        for line in lines
    ]


def words(kernels: ModuleType, seed: int, stream: int, block: int, first: int, n: int) -> np.ndarray:
    out = np.zeros((n, 4), np.uint32)
    kernels.philox_words(seed, stream, block, first, out)
    return out


def uniforms(kernels: ModuleType, seed: int, stream: int, first: int, n: int, dtype: str = "float64") -> np.ndarray:
    out = np.full(n, np.nan, dtype)
    kernels.uniforms(seed, stream, first, out)
    return out


@pytest.mark.parametrize("answer", known_answers(), ids=lambda answer: f"{answer[0][0]:08x}")
def test_known_answers(kernels: ModuleType, answer: tuple[list[int], list[int], list[int]]) -> None:
    (low, high, stream, block), (key_low, key_high), output = answer
    found = words(kernels, key_high << 32 | key_low, stream, block, high << 32 | low, 1)
    assert found.tolist() == [output]


def test_header_holds_the_same_constants() -> None:
    defined = dict(re.findall(r"#define (\w+) (0x[0-9A-F]+|\d+)u?\b", HEADER.read_text()))
    expected = {
        "PHILOX_ROUNDS": philox.ROUNDS,
        "PHILOX_FIRST_MULTIPLIER": philox.MULTIPLIERS[0],
        "PHILOX_SECOND_MULTIPLIER": philox.MULTIPLIERS[1],
        "PHILOX_FIRST_KEY_INCREMENT": philox.KEY_INCREMENTS[0],
        "PHILOX_SECOND_KEY_INCREMENT": philox.KEY_INCREMENTS[1],
        "STREAM_OF_LABELS": philox.LABELS,
        "STREAM_OF_NORMALS": philox.NORMALS,
    }
    assert {name: int(defined[name], 0) for name in expected} == expected


@pytest.mark.parametrize("first", FIRST_ROWS)
def test_words_are_the_reference_s(kernels: ModuleType, first: int) -> None:
    expected = words(emalgam_kernels.load("reference", "sampling"), SEED, 5, 3, first, 100)
    np.testing.assert_array_equal(words(kernels, SEED, 5, 3, first, 100), expected)


@every_dtype
@pytest.mark.parametrize("first", FIRST_ROWS)
def test_uniforms_are_the_highest_bits_and_a_half(kernels: ModuleType, dtype: str, first: int) -> None:
    """Bit-equal to their definition, and therefore across backends."""
    low, high = words(emalgam_kernels.load("reference", "sampling"), SEED, 9, 0, first, 700)[:, :2].T.tolist()
    bits = {"float64": 52, "float32": 23}[dtype]
    integers = [(h << 32 | w if dtype == "float64" else w << 32) >> (64 - bits) for w, h in zip(low, high, strict=True)]
    expected = np.array([(2 * k + 1) * 2.0 ** -(bits + 1) for k in integers], dtype)
    found = uniforms(kernels, SEED, 9, first, 700, dtype)
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.min() < found.max() < 1


@every_dtype
@pytest.mark.parametrize("simd_level", ["v3", "baseline"], indirect=True)
def test_uniforms_of_other_simd_levels(simd_level: str, dtype: str) -> None:
    found = [uniforms(emalgam_kernels.load(b, "sampling"), 3, 4, 5, 777, dtype) for b in ("reference", "cython_cpu")]
    np.testing.assert_array_equal(*found)


@every_dtype
def test_extreme_words_stay_inside_the_open_interval(dtype: str) -> None:
    """The largest and smallest numbers that the definition allows are exact in the dtype."""
    bits = {"float64": 52, "float32": 23}[dtype]
    real = np.dtype(dtype).type
    for k in (0, 2**bits - 1):
        u = (real(k) + real(0.5)) * real(2.0**-bits)
        assert float(u) * 2 ** (bits + 1) == 2 * k + 1
        assert 0 < u < 1


@every_dtype
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 20), (511, 514), (600, 1400)])
def test_a_slice_drawn_alone(kernels: ModuleType, dtype: str, start: int, stop: int) -> None:
    whole = uniforms(kernels, SEED, 7, 2**40, 1400, dtype)
    np.testing.assert_array_equal(uniforms(kernels, SEED, 7, 2**40 + start, stop - start, dtype), whole[start:stop])


def test_strided_out(kernels: ModuleType) -> None:
    out = np.full(200, -1.0)
    kernels.uniforms(SEED, 7, 0, out[::-2])
    np.testing.assert_array_equal(out[::-2], uniforms(kernels, SEED, 7, 0, 100))
    assert (out[::2] == -1).all()
    assert uniforms(kernels, SEED, 7, 0, 0).shape == (0,)


def test_every_part_of_key_and_counter_counts(kernels: ModuleType) -> None:
    base = words(kernels, 1, 2, 3, 4, 1)
    others = [(1 + 2**32, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (1, 2, 3, 4 + 2**32)]
    for seed, stream, block, first in others:
        assert (words(kernels, seed, stream, block, first, 1) != base).all()


@every_dtype
def test_uniforms_are_uniform(kernels: ModuleType, dtype: str) -> None:
    u = uniforms(kernels, 2024, 3, 0, N, dtype).astype(np.float64)
    assert stats.kstest(u, "uniform").pvalue > FALSE_ALARM
    counts = np.bincount((u * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_interleaved_streams_are_uncorrelated(kernels: ModuleType) -> None:
    """Rows, streams and seeds side by side: correlations of ten series at lags up to three."""
    series = [uniforms(kernels, 11, stream, 0, N) for stream in range(5)]
    series += [uniforms(kernels, seed, 0, 0, N) for seed in range(12, 17)]
    centred = (np.stack(series) - 0.5) * 12**0.5
    count = 4 * len(series) ** 2
    bound = stats.norm.isf(FALSE_ALARM / count / 2)  # Bonferroni: the alarm of all together
    for lag in range(4):
        z = centred[:, : N - lag] @ centred[:, lag:].T / np.sqrt(N - lag)
        if lag == 0:
            np.fill_diagonal(z, 0)
        assert np.abs(z).max() < bound, f"lag {lag}: {np.abs(z).max():.2f} standard errors"


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_neighbouring_rows_differ_in_half_of_the_bits(kernels: ModuleType, bit: int) -> None:
    rows = np.stack([words(kernels, SEED, 0, 0, row, 1)[0] for row in range(40)])
    flipped = np.stack([words(kernels, SEED, 0, 0, row ^ 1 << bit, 1)[0] for row in range(40)])
    changed = int(np.unpackbits((rows ^ flipped).view(np.uint8)).sum())
    assert stats.binomtest(changed, 40 * 128, 0.5).pvalue > FALSE_ALARM
