"""Rows per second of drawing from a mixture, and of Monte Carlo divergences, beside scikit-learn and torch.

``python bench/sampling.py`` measures in one process on the processors it may use, in turns, and prints medians. torch
draws all K components of every row, so it gets fewer rows, and rates are compared. Every contender draws from the same
mixture, and its mean is checked before anything is timed.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import emalgam_kernels
from bench.tables import Target, number, table
from emalgam_kernels import Packed
from emalgam_kernels.blocks import default_threads
from emalgam_kernels.parameters import Sampler

N, D, K = 1_000_000, 8, 16
TORCH_ROWS: Final = 50_000
ROUNDS: Final = 5
BACKENDS: Final = ("cython_cpu", "numba_cpu")
SEED: Final = 1
STANDARD_ERRORS: Final = 6.0

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """A mixture of K full covariances."""

    weights: Array
    means: Array
    covariances: Array

    @classmethod
    def random(cls, seed: int) -> Problem:
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(K, D, D))
        return cls(rng.dirichlet(np.full(K, 5.0)), rng.normal(0, 2, (K, D)), a @ a.transpose(0, 2, 1) / D + np.eye(D))

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.means, np.linalg.cholesky(self.covariances), self.weights)

    @property
    def packed(self) -> Packed:
        """log w N(x) = −½ xᵀ Λ x + (Λ μ)ᵀ x + constant, with off-diagonal entries doubled."""
        precision = np.linalg.inv(self.covariances)
        linear = np.einsum("kij,kj->ki", precision, self.means)
        constant = np.log(self.weights) + 0.5 * np.linalg.slogdet(precision)[1] - 0.5 * D * np.log(2 * np.pi)
        constant -= 0.5 * np.einsum("ki,ki->k", linear, self.means)
        i, j = np.tril_indices(D)
        quadratic = -0.5 * precision[:, i, j] * np.where(i == j, 1, 2)
        return Packed("full", np.zeros(D), np.ones(D), None, np.hstack([quadratic, linear, constant[:, None]]))


P: Final = Problem.random(0)
Q: Final = Problem.random(1)


@dataclass(frozen=True)
class Contender:
    """`run` does `rows` rows, and `rate` rows per second are what it is judged by."""

    name: str
    rows: int
    run: Callable[[], Any]


def sampling_contenders(rows: int, torch_rows: int) -> list[Contender]:
    """Everyone who draws: emalgam into arrays that are there, the others as they do."""
    out, labels, sampler = np.empty((rows, D)), np.empty(rows, np.int64), P.sampler

    def draw(backend: str) -> Callable[[], Array]:
        kernel = emalgam_kernels.load(backend, "sampling").sample_mixture

        def run() -> Array:
            kernel(sampler, SEED, 0, out, labels, n_threads=default_threads())
            return out

        return run

    ours = [Contender(backend, rows, draw(backend)) for backend in BACKENDS]
    return [
        *ours,
        Contender("scikit-learn", rows, lambda: scikit_learn().sample(rows)[0]),
        Contender("torch", torch_rows, lambda: torch_mixture(P).sample((torch_rows,)).numpy()),
    ]


def divergence_contenders(rows: int, torch_rows: int) -> list[Contender]:
    """Everyone who estimates KL(P ‖ Q) by Monte Carlo; each returns its estimate."""
    sampler, p, q = P.sampler, P.packed, Q.packed

    def estimate(backend: str) -> Callable[[], float]:
        kernel, out = emalgam_kernels.load(backend, "sampling").kl_monte_carlo, np.empty(2)

        def run() -> float:
            kernel(sampler, p, q, SEED, 0, rows, out, n_threads=default_threads())
            return float(out[0] / rows)

        return run

    def of_torch() -> float:
        x = torch_mixture(P).sample((torch_rows,))
        return float((torch_mixture(P).log_prob(x) - torch_mixture(Q).log_prob(x)).mean())

    return [*(Contender(b, rows, estimate(b)) for b in BACKENDS), Contender("torch", torch_rows, of_torch)]


def scikit_learn() -> Any:
    """scikit-learn's mixture with P's parameters."""
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(K, random_state=SEED)
    model.weights_, model.means_, model.covariances_ = P.weights, P.means, P.covariances
    return model


def torch_mixture(problem: Problem, dtype: str = "float64", device: Any = "cpu") -> Any:
    """torch's mixture with the parameters of `problem`."""
    import torch
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

    weights, means, covariances = (
        torch.as_tensor(each, dtype=getattr(torch, dtype), device=device)
        for each in (problem.weights, problem.means, problem.covariances)
    )
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def verify(sampling: list[Contender], divergence: list[Contender]) -> None:
    """All draw from P, and all estimate the same divergence; this warms up too."""
    mean = P.weights @ P.means
    variance = P.weights @ (np.einsum("kdd->kd", P.covariances) + (P.means - mean) ** 2)
    for each in sampling:
        z = (each.run().mean(axis=0) - mean) / np.sqrt(variance / each.rows)
        if np.abs(z).max() > STANDARD_ERRORS:
            raise AssertionError(f"the mean of {each.name}'s samples is off by {np.abs(z).max():.1f} standard errors")
    sums, rows = np.empty(2), 20_000
    emalgam_kernels.load("reference", "sampling").kl_monte_carlo(P.sampler, P.packed, Q.packed, SEED + 1, 0, rows, sums)
    value = sums[0] / rows
    deviation = np.sqrt(sums[1] / rows - value**2)
    for each in divergence:
        z = (each.run() - value) / (deviation * np.sqrt(1 / rows + 1 / each.rows))
        if abs(z) > STANDARD_ERRORS:
            raise AssertionError(f"{each.name}'s divergence is off by {z:.1f} standard errors")


def rates(contenders: list[Contender], rounds: int) -> dict[str, float]:
    """Median rows per second, everyone in turn in each round."""
    found: dict[str, list[float]] = {each.name: [] for each in contenders}
    for round_number in range(rounds):
        turn = round_number % len(contenders)
        for each in contenders[turn:] + contenders[:turn]:
            gc.collect()
            start = time.perf_counter()
            each.run()
            found[each.name].append(each.rows / (time.perf_counter() - start))
    return {name: median(values) for name, values in found.items()}


def measure(rounds: int = ROUNDS, rows: int = N, torch_rows: int = TORCH_ROWS) -> dict[str, dict[str, float]]:
    """Rows per second of every contender, for "sampling" and "divergence"."""
    sampling, divergence = sampling_contenders(rows, torch_rows), divergence_contenders(rows, torch_rows)
    verify(sampling, divergence)
    return {"sampling": rates(sampling, rounds), "divergence": rates(divergence, rounds)}


def targets(measured: dict[str, dict[str, float]]) -> list[Target]:
    """The figures, each by the faster of the two backends."""
    sampling, divergence = measured["sampling"], measured["divergence"]
    fastest, estimate = (max(rate[b] for b in BACKENDS) for rate in (sampling, divergence))
    what = f"K = {K}, D = {D}"
    return [
        Target(f"sampling, {what}: against scikit-learn", fastest / sampling["scikit-learn"], 8, True, " ×"),
        Target(f"sampling, {what}: against torch", fastest / sampling["torch"], 250, True, " ×"),
        Target(f"Monte Carlo KL, {what}: against torch", estimate / divergence["torch"], 50, True, " ×"),
    ]


def render(measured: dict[str, dict[str, float]]) -> str:
    """Tables of rates and of figures."""
    names = list(measured["sampling"])
    cells = [[name] + [millions(measured[work].get(name)) for work in measured] for name in names]
    header = ["M rows / s", *measured]
    figures = [target.cells() for target in targets(measured)]
    return table(header, cells) + "\n" + table(["figure", "wanted", "measured", ""], figures)


def millions(rate: float | None) -> str:
    return "" if rate is None else number(rate / 1e6)


if __name__ == "__main__":
    print(f"{N:,} rows (torch: {TORCH_ROWS:,}), float64, {default_threads()} processors, medians of {ROUNDS} rounds\n")
    print(render(measure()))
