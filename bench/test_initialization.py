"""k-means++ initialization of 1 000 000 × 8, K = 64; `make bench` sets it beside five iterations."""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import emalgam
from bench.initialization import METHODS, SMOKE_K, SMOKE_N, D, K, N
from bench.libraries import EMALGAM
from bench.problems import blobs

SMALL: Final = os.environ.get("EMALGAM_BENCH_SMALL") == "1"


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return blobs(SMOKE_N if SMALL else N, D, SMOKE_K if SMALL else K)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", EMALGAM)
def test_initialization(benchmark: BenchmarkFixture, x: np.ndarray, backend: str, method: str) -> None:
    n_components = SMOKE_K if SMALL else K

    def initialize() -> emalgam.Fit:
        return emalgam.fit(x, n_components, init_params=method, max_iter=0, random_state=0, backend=backend)

    result = benchmark.pedantic(initialize, rounds=1 if SMALL else 3, warmup_rounds=1)
    assert result.effective_components == n_components, f"{method} left {result.effective_components} components"
