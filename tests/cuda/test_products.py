"""Packed parameters by matrix products, against the long-double oracle."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emalgam_kernels.numba_cuda import device, products
from emalgam_kernels.numba_cuda.products import COLUMN_STEP, chunks, padded, rows_of_a_chunk, run
from tests.conftest import ON_A_GPU
from tests.cuda.passes import (
    assert_right,
    assert_right_when_hard,
    make,
    on_device,
    one_pass,
)

SIZES = {
    "one row": (1, 3, 4),
    "one feature": (40, 1, 3),
    "one component": (40, 3, 1),
    "several lanes": (40, 2, 37),
    "most lanes": (12, 2, 259),
    "two panels": (20, 35, 3),
}


# ---- against the oracle


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("covariance_type", ["full", "spherical"])
def test_sizes(covariance_type: str, size: str) -> None:
    given = make(covariance_type, "float32", "packed", *SIZES[size])
    assert_right(given, "float32", one_pass(run, given.x, given.weight, given.parameters("float32")))


def test_hard_assignment_over_lanes() -> None:
    given = make("diag", "float64", "packed", *SIZES["several lanes"])
    assert_right_when_hard(given, "float64", one_pass(run, given.x, given.weight, given.parameters("float64"), True))


@pytest.mark.skipif(not ON_A_GPU, reason="only a GPU has TF32")
def test_tf32_only_if_asked_for() -> None:
    given = make("full", "float32", "packed", 2000, 20, 50)
    parameters = given.parameters("float32")
    exact = one_pass(run, given.x, given.weight, parameters)
    assert_right(given, "float32", exact)

    def rounded(x: torch.Tensor, weight: torch.Tensor | None, problem: object, results: object) -> None:
        run(x, weight, replace(on_device(parameters), tf32=True), results)  # type: ignore[type-var, arg-type]

    found = one_pass(rounded, given.x, given.weight, parameters)
    assert (found.log_prob != exact.log_prob).any()


# ---- chunks


def test_rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of L2; where that is too little for a tile of the product for each multiprocessor, these tiles."""
    monkeypatch.setattr(device, "cache_bytes", lambda _: 50 * 2**20)
    monkeypatch.setattr(device, "multiprocessors", lambda _: 132)

    def rows(n: int, numbers: int, outputs: int, arithmetic: str) -> int:
        return rows_of_a_chunk(SimpleNamespace(n=n, device=None), numbers, outputs, arithmetic)  # type: ignore[arg-type]

    assert rows(10**7, 130 + 1024, 1024, "float32") == 25 * 2**20 // 4 // 1154 // 1024 * 1024
    assert rows(10**7, 2145 + 32, 32, "float32") == 132 * 128 // 1024 * 1024
    assert rows(10**7, 2145 + 256, 256, "float64") == 66 * 128 // 1024 * 1024
    assert rows(10**7, 10**6, 10**6, "float64") == products.ROWS_OF_A_SUM
    assert rows(10**9, 2, 1, "float32") == products.MOST_ROWS
    assert rows(100, 3000, 1000, "float32") == padded(100)


def test_chunks_cover_the_rows_once() -> None:
    columns = 3 * products.ROWS_OF_A_SUM
    found = list(chunks(10_000, columns))
    assert [chunk.first for chunk in found] == list(range(0, 10_000, columns))
    assert sum(chunk.rows for chunk in found) == 10_000
    for chunk in found:
        assert chunk.rows <= chunk.width <= columns
        assert chunk.width % (chunk.parts * COLUMN_STEP) == 0
