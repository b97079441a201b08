"""The variational KL of mixtures, each with each, against the same algebra in NumPy.

    python -m bench.mixture_divergence

1000 × 1000 mixtures with K = 4 and D = 8, float64: 16 million divergences of Gaussians, and a log-sum-exp of each four.
"prepared" is without what is made of the weights, means and covariances first: mixtures for emalgam, inverses and
log-determinants for NumPy.

Then a stack of many fits against one of them, by each estimator: what a pair takes that has little to compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam
from bench.divergence import (
    NUMPY,
    Contender,
    Given,
    entropy_terms,
    expected_statistics,
    natural_parameters,
    rate_table,
    rates,
    with_inverses,
)
from bench.divergence import gaussians as stack_of_gaussians
from bench.libraries import EMALGAM
from bench.tables import Topic, say

SIZE: Final = (1000, 4, 8)
SMOKE_SIZE: Final = (30, 3, 4)
STACK: Final = (5000, 2, 2)
SMOKE_STACK: Final = (20, 2, 2)
SAMPLES_OF_A_PAIR: Final = 1000
ROUNDS: Final = 5
ROWS_AT_ONCE: Final = 50  # of NumPy: all at once takes twice as long, in memory

Prepared = tuple[np.ndarray, ...]


def mixtures(B: int, K: int, D: int, seed: int) -> Given:
    """Weights (B, K), means (B, K, D) and covariances (B, K, D, D)."""
    means, covariances = stack_of_gaussians(B * K, D, seed)
    weights = np.random.default_rng(seed).dirichlet(np.full(K, 5.0), size=B)
    return weights, means.reshape(B, K, D), covariances.reshape(B, K, D, D)


# ---- contenders


def of_emalgam(backend: str) -> Contender:
    """`emalgam.kl_variational` of lists of `Mixture`s."""

    def prepare(given: Given) -> list[emalgam.Mixture]:
        return [emalgam.Mixture(*parameters, "full") for parameters in zip(*given, strict=True)]

    def compute(p: list[emalgam.Mixture], q: list[emalgam.Mixture]) -> np.ndarray:
        found: Any = emalgam.kl_variational(p, q, all_pairs=True, backend=backend)
        return np.asarray(found)

    return Contender(backend, prepare, compute)


def of_numpy() -> Contender:
    """Σ_a π_a log [Σ_a' π_a' exp(−KL(f_a ‖ f_a')) / Σ_b ω_b exp(−KL(f_a ‖ g_b))], each KL as −H_a − ⟨η_b, E_a φ⟩."""

    def prepare(given: Given) -> Prepared:
        weights, means, covariances = given
        return weights, *with_inverses((means, covariances))

    def compute(p: Prepared, q: Prepared) -> np.ndarray:
        (weights, *stack), (others, *other_stack) = p, q
        statistics, entropies = expected_statistics(*stack), entropy_terms(*stack)
        own = statistics @ natural_parameters(*stack).swapaxes(1, 2) + entropies[:, :, None]
        inside = np.einsum("ba,bac->bc", weights, _log_sum(own[..., None], weights[:, None, :, None]))
        columns = natural_parameters(*other_stack).swapaxes(0, 1).reshape(-1, statistics.shape[-1]).T
        out = np.empty((len(weights), len(others)))
        for start in range(0, len(weights), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            cross = statistics[some] @ columns + entropies[some, :, None]
            terms = _log_sum(cross.reshape(*cross.shape[:2], *others.T.shape), others.T)
            out[some] = inside[some] - np.einsum("ba,bac->bc", weights[some], terms)
        return out

    return Contender(NUMPY, prepare, compute)


def _log_sum(twice: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log Σ_b w_b exp(−½ twice_b) over axis 2, in place; the largest term is taken out."""
    twice *= -0.5
    top = twice.max(axis=2, keepdims=True)
    twice -= top
    np.exp(twice, out=twice)
    twice *= weights
    return np.log(twice.sum(axis=2)) + top[:, :, 0]


# ---- writing


NOTE: Final = """The variational approximation of KL(p ‖ q) of mixtures with K = {K} and D = {D}, each of {B} with each
of {B}, float64. Million pairs of mixtures per second; how many times faster cython_cpu is. "From covariances" includes
mixtures for emalgam, inverses and log-determinants for NumPy; "prepared" is the rest.

"""


STACK_NOTE: Final = """{B} fits (`emalgam.fit_many`, full covariances, K = {K}, D = {D}) against one of them, float64:
pairs per second, the median of {rounds} runs. Monte Carlo with {samples} samples a pair; "samples alone" is what as
many samples of one pair take in one call.

"""


def stack_rates(smoke: bool) -> dict[str, float]:
    """Pairs per second of each estimator."""
    (B, K, D), rounds = (SMOKE_STACK, 1) if smoke else (STACK, ROUNDS)
    samples = np.random.default_rng(0).normal(size=(B, 100 * K, D)) + 5.0 * (np.arange(100 * K) % K)[:, None]
    fits = emalgam.fit_many(samples, K, random_state=0)
    one, divergence = fits[0], emalgam.divergence
    n, how = SAMPLES_OF_A_PAIR, {"random_state": 0}
    calls: dict[str, Callable[[], Any]] = {
        "`kl_monte_carlo`": lambda: divergence.kl_monte_carlo(fits, one, n, **how),
        "`kl_monte_carlo`, control": lambda: divergence.kl_monte_carlo(fits, one, n, estimator="control", **how),
        "samples alone": lambda: divergence.kl_monte_carlo(fits[1], one, n * B, **how),
        "`jensen_shannon`": lambda: divergence.jensen_shannon(fits, one, n, **how),
    }
    for function in (divergence.kl_variational, divergence.kl_unscented, divergence.kl_product, divergence.kl_bounds):
        calls[f"`{function.__name__}`"] = partial(function, fits, one)
    found = {}
    for name, call in calls.items():
        call()
        found[name] = B / median(seconds(call) for _ in range(rounds))
        say(f"    {name}: {found[name]:,.0f} pairs/s")
    return found


def seconds(call: Callable[[], Any]) -> float:
    """What a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stack_section(smoke: bool) -> str:
    """A stack of many fits."""
    B, K, D = SMOKE_STACK if smoke else STACK
    say(f"    a stack of {B} fits")
    found = stack_rates(smoke)
    note = STACK_NOTE.format(B=B, K=K, D=D, rounds=1 if smoke else ROUNDS, samples=SAMPLES_OF_A_PAIR)
    rows = "".join(f"| {name} | {rate:,.0f} | {1e6 / rate:.1f} |\n" for name, rate in found.items())
    return "## Divergences of many fits\n\n" + note + "| | pairs/s | µs a pair |\n| --- | ---: | ---: |\n" + rows


def topic(smoke: bool) -> Topic:
    """Measured and stated; there is no target."""
    B, K, D = size = SMOKE_SIZE if smoke else SIZE
    work = f"{B} × {B} mixtures"
    say(f"    {work}")
    competing = [*(of_emalgam(backend) for backend in EMALGAM), of_numpy()]
    found = rates(work, competing, mixtures(*size, seed=0), mixtures(*size, seed=1), B**2, 1 if smoke else ROUNDS)
    section = "## Divergences of mixtures\n\n" + NOTE.format(B=B, K=K, D=D) + rate_table(found)
    return Topic([section, stack_section(smoke)])


if __name__ == "__main__":
    print("\n".join(topic(smoke=False).sections))
