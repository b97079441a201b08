"""Rows per second of drawing from a mixture, and of Monte Carlo divergences, beside scikit-learn and torch.

    python -m bench.sampling

measures in one process on the processors it may use, in turns, and prints medians. torch draws all K components of
every row, so it gets fewer rows, and rates are compared. Every contender draws from the same mixture, and its mean is
checked before anything is timed. Whether Monte Carlo takes memory is measured in processes of their own, by the
peak of resident memory that the operating system records: ``python -m bench.sampling cython_cpu 10000000``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam
import emalgam_kernels
from bench.libraries import EMALGAM, SCIKIT_LEARN
from bench.memory import MEBIBYTE, in_new_process, peak, resident
from bench.peers import load_torch
from bench.tables import Target, Topic, judged, number, say, table
from bench.turns import in_turns, timed
from emalgam_kernels import Packed
from emalgam_kernels.parameters import Sampler, take

N, D, K = 1_000_000, 8, 16
TORCH_ROWS: Final = N // 20
SMOKE_SHARE: Final = 50  # of the rows
FEW, MANY = 100_000, 10_000_000  # samples of which memory should not depend
WARM: Final = 20_000  # samples that load everything before
ROUNDS: Final = 15
SEED: Final = 1
TORCH: Final = "torch.distributions"
# How many times faster cython_cpu has to be.
FASTER: Final = {"sampling": {SCIKIT_LEARN: 8, TORCH: 250}, "Monte Carlo KL": {TORCH: 50}}
MOST_GROWTH: Final = 4.0  # MiB: the tile of a thread that few samples left idle; the samples are 610
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
    def mixture(self) -> emalgam.Mixture:
        return emalgam.Mixture(self.weights, self.means, self.covariances, "full")

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
    """Everyone who draws, as their users call them."""
    mixture = emalgam.Mixture(P.weights, P.means, P.covariances)

    def draw(backend: str) -> Callable[[], Array]:
        return lambda: mixture.sample(rows, SEED, backend=backend)[0]

    ours = [Contender(backend, rows, draw(backend)) for backend in EMALGAM]
    return [
        *ours,
        Contender(SCIKIT_LEARN, rows, lambda: scikit_learn().sample(rows)[0]),
        Contender(TORCH, torch_rows, lambda: torch_mixture(P).sample((torch_rows,)).numpy()),
    ]


def divergence_contenders(rows: int, torch_rows: int) -> list[Contender]:
    """Everyone who estimates KL(P ‖ Q) by Monte Carlo, as their users call them; each returns its estimate."""
    p, q = (emalgam.Mixture(each.weights, each.means, each.covariances) for each in (P, Q))

    def estimate(backend: str) -> Callable[[], float]:
        return lambda: float(emalgam.kl_monte_carlo(p, q, n_samples=rows, random_state=SEED, backend=backend).value)

    def of_torch() -> float:
        x = torch_mixture(P).sample((torch_rows,))
        return float((torch_mixture(P).log_prob(x) - torch_mixture(Q).log_prob(x)).mean())

    return [*(Contender(b, rows, estimate(b)) for b in EMALGAM), Contender(TORCH, torch_rows, of_torch)]


def scikit_learn() -> Any:
    """scikit-learn's mixture with P's parameters."""
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(K, random_state=SEED)
    model.weights_, model.means_, model.covariances_ = P.weights, P.means, P.covariances
    return model


def torch_mixture(problem: Problem, dtype: str = "float64", device: Any = "cpu") -> Any:
    """torch's mixture with the parameters of `problem`."""
    torch = load_torch()
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
    sums, rows = np.empty((1, 2)), 20_000
    pair = (take(each, None) for each in (P.sampler, P.packed, Q.packed))
    emalgam_kernels.load("reference", "sampling").kl_monte_carlo(*pair, SEED + 1, 0, rows, sums)
    value, square = sums[0] / rows
    deviation = np.sqrt(square - value**2)
    for each in divergence:
        z = (each.run() - value) / (deviation * np.sqrt(1 / rows + 1 / each.rows))
        if abs(z) > STANDARD_ERRORS:
            raise AssertionError(f"{each.name}'s divergence is off by {z:.1f} standard errors")


def rates(contenders: Sequence[Contender], rounds: int) -> dict[str, float]:
    """Median rows per second, everyone in turns."""
    seconds = in_turns({each.name: partial(_seconds, each) for each in contenders}, rounds)
    return {each.name: each.rows / median(seconds[each.name]) for each in contenders}


def _seconds(contender: Contender) -> float:
    return timed(contender.run)[0]


def measure(smoke: bool = False) -> dict[str, dict[str, float]]:
    """Rows per second of every contender, by the names in `FASTER`."""
    rows, torch_rows = (N // SMOKE_SHARE, TORCH_ROWS // SMOKE_SHARE) if smoke else (N, TORCH_ROWS)
    sampling, divergence = sampling_contenders(rows, torch_rows), divergence_contenders(rows, torch_rows)
    verify(sampling, divergence)
    rounds = 1 if smoke else ROUNDS
    return {"sampling": rates(sampling, rounds), "Monte Carlo KL": rates(divergence, rounds)}


# ---- memory


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that estimates a divergence: resident before, and of the peak."""

    backend: str
    samples: int
    before: int
    peak: int

    @property
    def beyond(self) -> float:
        """MiB that the estimate took."""
        return (self.peak - self.before) / MEBIBYTE


def memory_here(backend: str, samples: int) -> Memory:
    """What `emalgam.kl_monte_carlo` takes in this process once it has run on a few samples."""
    p, q = P.mixture, Q.mixture
    emalgam.kl_monte_carlo(p, q, WARM, random_state=SEED, backend=backend)
    before = resident()
    emalgam.kl_monte_carlo(p, q, samples, random_state=SEED, backend=backend)
    return Memory(backend, samples, before, peak())


def memories(smoke: bool) -> list[Memory]:
    """Few and many samples on each backend, each in a new process."""
    counts = [count // SMOKE_SHARE for count in (FEW, MANY)] if smoke else [FEW, MANY]
    return [Memory(**in_new_process("bench.sampling", name, count)) for name in EMALGAM for count in counts]


def growth(found: Sequence[Memory], backend: str) -> float:
    """MiB that many samples take beyond what few take."""
    few, many = sorted((each for each in found if each.backend == backend), key=lambda each: each.samples)
    return many.beyond - few.beyond


# ---- writing


def targets(measured: dict[str, dict[str, float]], found: Sequence[Memory]) -> list[Target]:
    """The figures of cython_cpu, and the memory of both."""
    own = EMALGAM[0]
    return [
        *(
            Target(f"{work}, K = {K}, D = {D}: faster than {peer}", rate[own] / rate[peer], factor, True, " ×")
            for work, rate in measured.items()
            for peer, factor in FASTER[work].items()
        ),
        *(
            Target(
                f"Monte Carlo KL, {counts(found)} samples: more memory, {name}",
                growth(found, name),
                MOST_GROWTH,
                False,
                " MiB",
            )
            for name in EMALGAM
        ),
    ]


def counts(found: Sequence[Memory]) -> str:
    """ "100 000 to 10 000 000"."""
    samples = [each.samples for each in found]
    return f"{min(samples):,} to {max(samples):,}".replace(",", " ")


NOTE: Final = """Mixtures with K = {K} and D = {D}, full covariances, float64. Million rows (samples) per second; how
many times faster cython_cpu is. scikit-learn is `GaussianMixture.sample`, torch `MixtureSameFamily`, and `log_prob` of
two of them; it draws all K components of every row, and does a twentieth of the rows.

"""
MEMORY_NOTE: Final = """Peak of resident memory during `kl_monte_carlo`, less what was resident before it. To store the
samples would take what the last column says.

"""


def rate_table(measured: dict[str, dict[str, float]]) -> str:
    """The contenders, and how many times faster the first one is at each work."""
    first, *_ = measured.values()
    rows = []
    for name in first:
        row = [name]
        for rate in measured.values():
            known = name in rate
            row += [number(rate[name] / 1e6), f"{number(rate[EMALGAM[0]] / rate[name])} ×"] if known else ["", ""]
        rows.append(row)
    return table(["contender", *(title for work in measured for title in (work, "faster"))], rows)


def memory_table(found: Sequence[Memory]) -> str:
    """Few and many samples on each backend."""
    rows = [
        [
            f"{each.samples:,}".replace(",", " "),
            each.backend,
            f"{each.before / MEBIBYTE:.0f}",
            f"{each.beyond:.1f}",
            f"{8 * D * each.samples / MEBIBYTE:.0f}",
        ]
        for each in found
    ]
    return table(["samples", "backend", "MiB resident before", "MiB that it took", "MiB of its samples"], rows)


def topic(smoke: bool) -> Topic:
    """Draws, divergences by draws, and their memory."""
    say("    memory")
    found = memories(smoke)
    say("    rates")
    measured = measure(smoke)
    figures = targets(measured, found)
    rates_shown = NOTE.format(K=K, D=D) + rate_table(measured)
    memory_shown = MEMORY_NOTE + memory_table(found)
    return Topic([f"## Sampling and Monte Carlo\n\n{rates_shown}\n{memory_shown}\n{judged(figures)}"], figures)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asdict(memory_here(sys.argv[1], int(sys.argv[2])))))
    else:
        print("\n".join(topic(smoke=False).sections))
