"""Very many fits: `emalgam.fit_many` beside scikit-learn in joblib and beside a batched EM in torch.

    python -m bench.many_fits

Each problem has clusters about four standard deviations apart and gets 20 iterations of EM. emalgam's time is that of
the whole call, k-means++ included; torch begins with emalgam's start, which is not counted, and has to reach emalgam's
log-likelihoods. scikit-learn fits a share of the problems, whole fits with its defaults, in as many processes as there
are processors, which are up and warm before the clock starts.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import numpy as np

import emalgam
import emalgam_kernels
from bench import torch_batch
from bench.libraries import EMALGAM
from bench.machine import matrix_product_rate
from bench.memory import in_new_process, peak, resident
from bench.tables import Target, Topic, judged, number, say, table
from bench.turns import in_turns, timed
from emalgam_kernels.blocks import default_threads

ITERATIONS: Final = 20
ROUNDS: Final = 5
SKLEARN: Final = "scikit-learn in joblib"
TORCH: Final = "batched EM in torch"
PRODUCTS: Final = "products alone"
MEBIBYTE: Final = 2**20
MOST_MEMORY: Final = 100e6 / MEBIBYTE
MEMORY_PROBLEMS: Final = 100_000
PROBLEMS_AT_ONCE: Final = 500


@dataclass(frozen=True)
class Work:
    """B problems of N × D with K components; scikit-learn does `share` of them, and how many times slower it may be."""

    B: int
    N: int
    D: int
    K: int
    share: int
    than_sklearn: float
    than_torch: float | None = None

    @property
    def flop(self) -> float:
        """Of both matrix products of a fit, Φ η and Rᵀ Φ: in each iteration, for the start, and to judge the end."""
        F = emalgam_kernels.statistic_count("full", self.D)
        return 4.0 * (ITERATIONS + 1) * self.N * self.K * F

    def __str__(self) -> str:
        return f"{self.B:_} problems of {self.N} × {self.D}, K = {self.K}".replace("_", " ")


WORKS: Final = (Work(10_000, 200, 2, 3, 100, 250, 10), Work(2_000, 1000, 8, 5, 40, 60))
SMOKE: Final = (Work(60, 50, 2, 2, 4, 250, 10),)


def problems(work: Work) -> np.ndarray:
    """Samples (B, N, D), made a few problems at a time: making them should not hide what fitting them takes."""
    rng = np.random.default_rng(0)
    x = np.empty((work.B, work.N, work.D))
    for first in range(0, work.B, PROBLEMS_AT_ONCE):
        part = x[first : first + PROBLEMS_AT_ONCE]
        centres = rng.normal(0, 4, (len(part), work.K, work.D))
        labels = rng.integers(0, work.K, part.shape[:2])
        part[...] = centres[np.arange(len(part))[:, None], labels] + rng.normal(size=part.shape)
    return x


# ---- contenders: each returns its fits per second


def ours(backend: str, x: np.ndarray, work: Work) -> float:
    seconds, _ = timed(partial(fit, x, work.K, backend, ITERATIONS))
    return work.B / seconds


def fit(x: np.ndarray, K: int, backend: str, iterations: int) -> emalgam.ManyFits:
    return emalgam.fit_many(x, K, max_iter=iterations, tol=0.0, random_state=0, backend=backend)


def in_torch(x: np.ndarray, work: Work, start: emalgam.ManyFits) -> float:
    seconds, _ = timed(lambda: torch_batch.em(x, start.weights, start.means, start.covariances, ITERATIONS))
    return work.B / seconds


def in_joblib(x: np.ndarray, work: Work) -> float:
    from joblib import Parallel, delayed

    few = x[: work.share]
    parts = np.array_split(few, default_threads())
    with Parallel(n_jobs=default_threads()) as pool:
        pool(delayed(_sklearn)(part[:1], work.K) for part in parts)
        seconds, _ = timed(lambda: pool(delayed(_sklearn)(part, work.K) for part in parts))
    return len(few) / seconds


def _sklearn(x: np.ndarray, K: int) -> list[float]:
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each stops at max_iter, as it should
        return [
            float(GaussianMixture(K, max_iter=ITERATIONS, tol=0.0, random_state=0).fit(each).lower_bound_) for each in x
        ]


def check(x: np.ndarray, work: Work) -> emalgam.ManyFits:
    """The start that torch gets, after both have come from it to the same log-likelihoods."""
    start, end = (fit(x, work.K, EMALGAM[0], iterations) for iterations in (0, ITERATIONS))
    sound = (start.status <= 1) & (end.status <= 1)
    found = torch_batch.em(x, start.weights, start.means, start.covariances, ITERATIONS)
    np.testing.assert_allclose(found[sound], end.log_likelihood[sound], rtol=1e-7)
    if sound.mean() < 0.99:
        raise AssertionError(f"{np.count_nonzero(~sound)} of {work.B} problems collapsed; choose others to measure")
    return start


# ---- memory


def memory_beyond(n_problems: int) -> float:
    """MiB that `fit_many` takes beyond its input and output, in a process of its own."""
    return float(in_new_process("bench.many_fits", n_problems))


def measure_memory(n_problems: int) -> float:
    """The peak of resident memory less what was resident before, and less the result's own bytes, in MiB."""
    work = Work(n_problems, 200, 2, 3, 0, 0)
    x = problems(work)
    fit(x[:10], work.K, EMALGAM[0], 1)  # loads the code
    before = resident()
    fits = fit(x, work.K, EMALGAM[0], ITERATIONS)
    result = sum(part.nbytes for part in vars(fits).values() if isinstance(part, np.ndarray))
    return (peak() - before - result) / MEBIBYTE


# ---- writing


def topic(smoke: bool) -> Topic:
    """Fits per second, and memory."""
    sections, targets = [], []
    for work in SMOKE if smoke else WORKS:
        say(f"    {work}")
        x = problems(work)
        start = check(x, work)
        measurements = {backend: partial(ours, backend, x, work) for backend in EMALGAM}
        measurements[TORCH] = partial(in_torch, x, work, start)
        measurements[SKLEARN] = partial(in_joblib, x, work)
        measurements[PRODUCTS] = lambda work=work: matrix_product_rate("float64") / work.flop
        rates = {name: median(found) for name, found in in_turns(measurements, 1 if smoke else ROUNDS).items()}
        own = rates[EMALGAM[0]]
        rows = [[name, number(rate), f"{number(own / rate)} ×"] for name, rate in rates.items()]
        sections.append(table([f"{work}, {ITERATIONS} iterations", "fits per second", f"{EMALGAM[0]} is faster"], rows))
        targets.append(_faster(work, SKLEARN, own / rates[SKLEARN], work.than_sklearn))
        if work.than_torch is not None:
            targets.append(_faster(work, TORCH, own / rates[TORCH], work.than_torch))
    count = 1000 if smoke else MEMORY_PROBLEMS
    beyond = memory_beyond(count)
    targets.append(Target(f"memory of {count:,} fits of 200 × 2", beyond, MOST_MEMORY, False, " MiB"))
    return Topic([f"## Very many fits\n\n{NOTE}" + "\n".join([*sections, judged(targets)])], targets)


NOTE: Final = """float64, full covariances, whole calls. "Products alone" is how many fits per second there would
be if nothing took time but the two matrix products of EM, Φ η and Rᵀ Φ for all K components, at the rate of NumPy's
product of large matrices. Memory is the peak beyond samples and result, in a process of its own.

"""


def _faster(work: Work, than: str, times: float, bound: float) -> Target:
    return Target(f"fit_many, {work}: faster than {than}", times, bound, True, " ×")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure_memory(int(sys.argv[1]))))
    else:
        print("\n".join(topic(smoke=False).sections))
