"""One iteration of EM: library × covariance type × dtype × size.

    python -m pytest bench/test_em_iteration.py --benchmark-enable -k "cython_cpu and full"

Every contender is first compared with scikit-learn, so that what computes something else cannot look fast. The table's
seconds are seconds per iteration. `make bench` measures the same in turns.
"""

from __future__ import annotations

import os
from typing import Final

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.em_iteration import Contender
from bench.libraries import EMALGAM, competitors
from bench.problems import COVARIANCE_TYPES, DTYPES, SIZES, SMOKE_SIZE, Case

SMALL: Final = os.environ.get("EMALGAM_BENCH_SMALL") == "1"
CASES: Final = [
    Case(*size, covariance_type, dtype)
    for size in ((SMOKE_SIZE,) if SMALL else SIZES)
    for covariance_type in COVARIANCE_TYPES
    for dtype in DTYPES
]
ROUNDS: Final = 5
ROUNDS_OF_PEERS: Final = 3  # some take seconds for an iteration


class Clock:
    """A clock that shows the seconds which measurements have found, so that pytest-benchmark's table holds theirs."""

    def __init__(self) -> None:
        self.shown = 0.0

    def __call__(self) -> float:
        return self.shown


CLOCK: Final = Clock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "library"), [(case, name) for case in CASES for name in competitors(case)], ids=str)
def test_em_iteration(benchmark: BenchmarkFixture, case: Case, library: str) -> None:
    contender = Contender.of(library, case, span_seconds=0.01 if SMALL else 0.25)
    benchmark.group = f"seconds per iteration, N-D-K-covariance-dtype = {case}"
    benchmark.extra_info |= {"flop": case.flop, "how": contender.how, "iterations timed": contender.span}

    def iteration() -> None:
        CLOCK.shown += contender.seconds_per_iteration()

    rounds = ROUNDS if library in EMALGAM else ROUNDS_OF_PEERS
    benchmark.pedantic(iteration, rounds=1 if SMALL else rounds)
