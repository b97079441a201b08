"""What initialization costs beside iterations: 1 000 000 × 8, K = 64, on each compiled backend.

A fit with ``max_iter=0`` checks the data, initializes and stops; the same fit from given parameters does not
initialize. The difference is the initialization. Five iterations are the difference of fits with six and with one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam
from bench.libraries import EMALGAM
from bench.problems import blobs
from bench.tables import Target, Topic, number, size, table, verdict
from bench.turns import PAUSE, timed

N, D, K = 1_000_000, 8, 64
SMOKE_N, SMOKE_K = 10_000, 4
ITERATIONS: Final = 5
METHODS: Final = ("k-means++", "kmeans")
ROUNDS: Final = 5
MOST: Final = 1.0  # k-means++ by five iterations


@dataclass(frozen=True)
class Initialization:
    """Seconds of each method and of `ITERATIONS` iterations on one backend, one for each round."""

    backend: str
    size: tuple[int, int, int]
    seconds: dict[str, list[float]]
    iterations: list[float]

    def ratio(self, method: str) -> float:
        """How long the method takes beside `ITERATIONS` iterations, by the medians."""
        return median(self.seconds[method]) / median(self.iterations)


def measure(rounds: int, smoke: bool = False) -> list[Initialization]:
    """Each backend in turns; the seed is the round's number, so that no lucky draw decides."""
    size = (SMOKE_N, D, SMOKE_K) if smoke else (N, D, K)
    x, means = blobs(*size)
    found = [Initialization(name, size, {method: [] for method in METHODS}, []) for name in EMALGAM]
    for each in found:
        _fit(x, means, each.backend, max_iter=1)  # loads or compiles; so does the next line, for the direct kernel
        _fit(x[: 100 * len(means)], means, each.backend, max_iter=0, init_params="k-means++", random_state=0)
    for seed in range(rounds):
        for each in found:
            time.sleep(PAUSE)
            set_up = _fit(x, means, each.backend, max_iter=0)
            for method in METHODS:
                seconds = _fit(x, means, each.backend, max_iter=0, init_params=method, random_state=seed)
                each.seconds[method].append(max(seconds - set_up, 0.0))
            one, six = (_fit(x, means, each.backend, max_iter=m) for m in (1, 1 + ITERATIONS))
            each.iterations.append(six - one if six > one else six)
    return found


def _fit(x: np.ndarray, means: np.ndarray, backend: str, init_params: str | None = None, **arguments: Any) -> float:
    """Seconds of a fit, from `means` unless a method of initialization is named."""
    n_components = len(means)
    if init_params is None:
        precisions = np.tile(np.eye(x.shape[1]), (n_components, 1, 1))
        weights = np.full(n_components, 1 / n_components)
        arguments |= {"weights_init": weights, "means_init": means, "precisions_init": precisions}
    else:
        arguments["init_params"] = init_params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        seconds, _ = timed(lambda: emalgam.fit(x, n_components, tol=0.0, backend=backend, **arguments))
    return seconds


def topic(smoke: bool) -> Topic:
    """Both backends; once in a smoke test."""
    found = measure(1 if smoke else ROUNDS, smoke)
    targets = [
        Target(
            f"k-means++ beside five iterations, {size(*each.size)}, {each.backend}",
            each.ratio("k-means++"),
            MOST,
            False,
            " ×",
        )
        for each in found
    ]
    return Topic(["## Initialization\n\n" + _table(found)], targets)


def _table(found: Sequence[Initialization]) -> str:
    rows = [
        [
            f"{size(*each.size)}, {each.backend}",
            number(median(each.iterations)),
            *(number(median(each.seconds[method])) for method in METHODS),
            f"{number(each.ratio('k-means++'))} × ({verdict(each.ratio('k-means++') < MOST)})",
        ]
        for each in found
    ]
    return "Seconds.\n\n" + table(
        [
            "N, D, K, backend",
            "five iterations",
            *METHODS,
            f"k-means++ by five iterations (target {MOST:g} ×)",
        ],
        rows,
    )
