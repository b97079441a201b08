"""Seconds per iteration of EM, for every library the same way: the difference of two whole fits.

    seconds = (time of a fit with FIRST + span iterations − time of a fit with FIRST iterations) / span

What a fit does once (checking the data, scikit-learn's last E-step) drops out, and nobody's internals are touched.
`span` makes the difference last about `SPAN_SECONDS`; a library that stops before, because the likelihood stands
still, is divided by the iterations that it did. In every round each library does its two fits, and the machine's
matrix product is timed, in turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

from bench.libraries import ITERATIONS_COMPARED, LIBRARIES, Outcome, competitors, verify
from bench.machine import matrix_product_rate
from bench.problems import Case, problem
from bench.turns import in_turns, timed

FIRST: Final = 1
SPAN_SECONDS: Final = 1.0
FEWEST_ITERATIONS: Final = 3
MOST_ITERATIONS: Final = 400
MATRIX_PRODUCT: Final = "matrix product"


def difference_of_fits(fit: Callable[[int], Outcome], span: int, how: str) -> float:
    """Seconds per iteration of ``fit(iterations)``, which has to say that it ran `how`; see the module.

    Where noise leaves no difference, the longer fit's time by its iterations instead: that is never too short.
    """
    short, first = timed(lambda: fit(FIRST))
    long, last = timed(lambda: fit(FIRST + span))
    few, many = first.iterations, last.iterations
    if few != FIRST or many <= few or last.how != how:
        raise AssertionError(
            f"fits of {FIRST} and {FIRST + span} iterations did {few} and {many} ({last.how}; expected {how})"
        )
    return (long - short) / (many - few) if long > short else long / many


@dataclass(frozen=True)
class Contender:
    """A library that was found to compute the right thing on a case.

    `span` iterations make a measurement, `how` is what the library says it runs, `differences` is what `verify` saw.
    """

    name: str
    case: Case
    span: int
    how: str
    differences: dict[str, float]

    @classmethod
    def of(cls, name: str, case: Case, span_seconds: float = SPAN_SECONDS) -> Contender:
        """Warm up, compare with scikit-learn, and choose the span; AssertionError if the library is wrong."""
        given, fit = problem(case), LIBRARIES[name]
        fit(given, FIRST)  # loads or compiles
        seconds, outcome = timed(lambda: fit(given, ITERATIONS_COMPARED))
        differences = verify(name, case, outcome)
        span = math.ceil(span_seconds / (seconds / ITERATIONS_COMPARED))
        span = min(max(span, FEWEST_ITERATIONS), MOST_ITERATIONS)
        return cls(name, case, span, outcome.how, differences)

    def seconds_per_iteration(self) -> float:
        """One measurement."""
        given, fit = problem(self.case), LIBRARIES[self.name]
        return difference_of_fits(lambda iterations: fit(given, iterations), self.span, self.how)


@dataclass(frozen=True)
class Measurement:
    """Seconds per iteration of each contender and flop/s of the machine's matrix product, one for each round."""

    case: Case
    contenders: dict[str, Contender]
    seconds: dict[str, list[float]]
    matrix_product: list[float]

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """How many times faster, by the medians."""
        return self.median(slower) / self.median(faster)

    def share(self, name: str) -> float:
        """The share of the machine's matrix product rate at which the iteration does its 4 N F K flop."""
        return self.case.flop / self.median(name) / median(self.matrix_product)


def measure(case: Case, rounds: int, span_seconds: float = SPAN_SECONDS) -> Measurement:
    """All libraries that can do `case`, in turns."""
    contenders = {name: Contender.of(name, case, span_seconds) for name in competitors(case)}
    turns: dict[str, Callable[[], float]] = {name: each.seconds_per_iteration for name, each in contenders.items()}
    turns[MATRIX_PRODUCT] = partial(matrix_product_rate, case.dtype)
    seconds = in_turns(turns, rounds)
    rates = seconds.pop(MATRIX_PRODUCT)
    return Measurement(case, contenders, seconds, rates)
