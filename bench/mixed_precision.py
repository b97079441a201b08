"""Whole fits to convergence, in float64 and with precision="mixed": seconds, iterations, and where they end.

Clusters overlap, so that EM takes a while, and it stops when the mean log-likelihood changes by less than `TOL`, later
than by default. Both begin from the same k-means, whose time is in both.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import numpy as np

import emalgam
from bench.libraries import EMALGAM
from bench.problems import SIZES, SMOKE_SIZE, Case, blobs
from bench.tables import Topic, number, say, size, table
from bench.turns import in_turns, timed

SEPARATION: Final = 3.0  # typical distance of two means, in standard deviations
TOL: Final = 1e-5
ITERATIONS: Final = 60
ROUNDS: Final = 3
PRECISIONS: Final = ("strict", "mixed")
AGREEMENT: Final = 50 * TOL  # nats: each stops while it still climbs, by less than TOL in an iteration


@dataclass(frozen=True)
class Comparison:
    """Seconds of each precision, one for each round, and what it found."""

    case: Case
    backend: str
    seconds: dict[str, list[float]]
    fits: dict[str, emalgam.Fit]

    @property
    def ratio(self) -> float:
        """How many times faster "mixed" is, by the medians."""
        strict, mixed = (median(self.seconds[precision]) for precision in PRECISIONS)
        return strict / mixed

    @property
    def difference(self) -> float:
        """Of the mean log-likelihoods, nats."""
        strict, mixed = (self.fits[precision].lower_bound for precision in PRECISIONS)
        return mixed - strict


def topic(smoke: bool) -> Topic:
    """Every size on each backend; a small one, once, in a smoke test."""
    found = []
    for backend in EMALGAM:
        for dimensions in (SMOKE_SIZE,) if smoke else SIZES:
            say(f"    {backend}, {size(*dimensions)}")
            found.append(measure(Case(*dimensions), backend, 1 if smoke else ROUNDS))
    return Topic(["## Mixed precision\n\n" + NOTE + _table(found)])


def measure(case: Case, backend: str, rounds: int) -> Comparison:
    """In turns; AssertionError if the two do not end at the same log-likelihood."""
    x, _ = blobs(*case.size, separation=SEPARATION)
    fits = {precision: _fit(x, case, backend, precision) for precision in PRECISIONS}  # loads or compiles, too
    found = Comparison(case, backend, {}, fits)
    if abs(found.difference) > AGREEMENT:
        raise AssertionError(f"{case}: the fits in {PRECISIONS} end {found.difference} nats apart")
    turns = {precision: partial(_seconds, x, case, backend, precision) for precision in PRECISIONS}
    found.seconds.update(in_turns(turns, rounds))
    return found


def _fit(x: np.ndarray, case: Case, backend: str, precision: str) -> emalgam.Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        return emalgam.fit(
            x,
            case.K,
            tol=TOL,
            max_iter=ITERATIONS,
            random_state=0,
            backend=backend,
            precision=precision,
        )


def _seconds(x: np.ndarray, case: Case, backend: str, precision: str) -> float:
    return timed(lambda: _fit(x, case, backend, precision))[0]


NOTE: Final = f"""Seconds of whole fits of float64 rows, full covariances, overlapping clusters, from k-means until the
mean log-likelihood changes by less than {TOL:g}, or {ITERATIONS} iterations; "mixed" computes most of them in float32.
The difference is that of the mean log-likelihoods at the end. Medians of {ROUNDS} rounds.

"""


def _table(found: Sequence[Comparison]) -> str:
    rows = [
        [
            f"{size(*each.case.size)}, {each.backend}",
            *(number(median(each.seconds[precision])) for precision in PRECISIONS),
            f"{number(each.ratio)} ×",
            f"{each.fits['strict'].n_iter}",
            f"{each.fits['mixed'].n_iter} ({each.fits['mixed'].float32_iterations})",
            f"{each.difference:.1e}",
        ]
        for each in found
    ]
    header = ["N, D, K, backend", *PRECISIONS, "faster", "iterations", "mixed (in float32)", "difference, nats"]
    return table(header, rows)
