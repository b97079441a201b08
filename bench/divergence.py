"""Divergences of Gaussians against torch.distributions and against the same algebra in NumPy.

    python -m bench.divergence

Everyone starts from means and covariances, in float64, on as many threads as this process has processors: all pairs of
1000 Gaussians with D = 16, and 100 000 pairs with D = 8. What every contender makes of them first includes its checks:
torch's distributions, which share their tensors, and emalgam's Gaussians, which share arrays that are read-only and
copy others. "prepared" is the divergence alone: torch has its distributions, `emalgam.kl` its Gaussians, the kernels
their precision factors and NumPy its inverses already. torch computes a twentieth of all pairs: its memory grows with
their number. Contenders take turns, and medians are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam_kernels
from bench.libraries import EMALGAM
from bench.peers import load_torch
from bench.tables import Target, Topic, judged, number, say, table
from bench.turns import in_turns
from emalgam import Gaussian, kl, use_backend
from emalgam_kernels import Gaussians
from emalgam_kernels.blocks import default_threads

ALL: Final = (1000, 16)
PAIRS: Final = (100_000, 8)
SMOKE_ALL: Final = (60, 5)
SMOKE_PAIRS: Final = (500, 3)
TORCH_SHARE: Final = 20
ROUNDS: Final = 7
THREADS: Final = default_threads()
NUMPY: Final = "NumPy, same algebra"
TORCH: Final = "torch.distributions"
# How many times faster cython_cpu has to be, from covariances on; torch shares the tensors it is given, so what shares
# its arrays is judged, and what a copy costs is shown beside.
OWN: Final = {"all pairs": "cython_cpu kernels", "element by element": "cython_cpu kl, shared"}
FASTER: Final = {"all pairs": {TORCH: 150, NUMPY: 1.5}, "element by element": {TORCH: 20}}

Given = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Rate:
    """Million pairs per second of one contender; `whole` starts from covariances, `prepared` from what it keeps.

    `times_torch` is how many times faster than torch both are, where torch is installed.
    """

    work: str
    contender: str
    whole: float
    prepared: float


@dataclass(frozen=True)
class Contender:
    """``compute(prepare(p), prepare(q))``; `share` of the columns of q are enough to know its rate.

    `given` turns arrays into what it is given, before the clock starts.
    """

    name: str
    prepare: Callable[[Any], Any]
    compute: Callable[[Any, Any], np.ndarray]
    share: int = 1
    given: Callable[[Given], Any] = lambda arrays: arrays


def gaussians(M: int, D: int, seed: int) -> Given:
    """Means about one standard deviation apart, and covariances of Wishart matrices: conditions of some tens."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(M, D, D + 3))
    covariances = factors @ factors.transpose(0, 2, 1) / (D + 3) + 0.1 * np.eye(D)
    return rng.normal(size=(M, D)), covariances


# ---- contenders


def emalgam(backend: str, all_pairs: bool) -> Contender:
    """The kernels of one backend, factorisation included."""
    kernels = emalgam_kernels.load(backend, "kl")

    def prepare(given: Given) -> Gaussians:
        factors = np.empty_like(given[1])
        if kernels.precision_factors(given[1], factors, THREADS) >= 0:
            raise ValueError("a covariance is not positive definite")
        return Gaussians("full", *given, factors)

    def compute(p: Gaussians, q: Gaussians) -> np.ndarray:
        out = np.empty((len(p), len(q)) if all_pairs else len(p))
        (kernels.kl_all_pairs if all_pairs else kernels.kl_pairs)(p, q, out, THREADS)
        return out

    return Contender(f"{backend} kernels", prepare, compute)


def public(backend: str, read_only: bool) -> Contender:
    """``kl(Gaussian(mean, covariance), Gaussian(mean, covariance))``, element by element.

    Of arrays that are `read_only`, and shared as torch shares its tensors, or of others, which are copied.
    """

    def frozen(given: Given) -> Given:
        own = given[0].copy(), given[1].copy()
        for array in own:
            array.setflags(write=not read_only)
        return own

    def prepare(given: Given) -> Gaussian:
        with use_backend(backend):
            return Gaussian(*given)

    def compute(p: Gaussian, q: Gaussian) -> np.ndarray:
        return np.asarray(kl(p, q, backend=backend, n_threads=THREADS))

    name = f"{backend} kl, {'shared' if read_only else 'copied'}"
    return Contender(name, prepare, compute, given=frozen)


def numpy_algebra() -> Contender:
    """−H_p − ⟨η_q, E_p φ⟩ as one product of triangles, inverses and determinants by numpy.linalg."""

    def compute(p: tuple[np.ndarray, ...], q: tuple[np.ndarray, ...]) -> np.ndarray:
        out: np.ndarray = expected_statistics(*p) @ natural_parameters(*q).T
        out += entropy_terms(*p)[:, None]
        out *= 0.5
        return out

    return Contender(NUMPY, with_inverses, compute)


def with_inverses(given: Given) -> tuple[np.ndarray, ...]:
    """Means, covariances, their inverses and log-determinants."""
    means, covariances = given
    return means, covariances, np.linalg.inv(covariances), np.linalg.slogdet(covariances)[1]


def expected_statistics(means: np.ndarray, covariances: np.ndarray, *_: np.ndarray) -> np.ndarray:
    """E φ = (lower triangle of Σ + μ μᵀ, μ, 1), (..., F)."""
    i, j = np.tril_indices(means.shape[-1])
    second = covariances[..., i, j] + means[..., i] * means[..., j]
    return np.concatenate([second, means, np.ones((*means.shape[:-1], 1))], axis=-1)


def natural_parameters(
    means: np.ndarray, _: np.ndarray, precisions: np.ndarray, log_determinants: np.ndarray
) -> np.ndarray:
    """−2 η but for constants of all Gaussians: (Λ with off-diagonal entries doubled, −2 Λ μ, μᵀ Λ μ + log |Σ|)."""
    i, j = np.tril_indices(means.shape[-1])
    linear = np.einsum("...ij,...j->...i", precisions, means)
    constant = np.einsum("...i,...i->...", linear, means) + log_determinants
    return np.concatenate(
        [precisions[..., i, j] * np.where(i == j, 1.0, 2.0), -2 * linear, constant[..., None]], axis=-1
    )


def entropy_terms(means: np.ndarray, _: np.ndarray, __: np.ndarray, log_determinants: np.ndarray) -> np.ndarray:
    """−2 H but for constants of all Gaussians, −log |Σ| − D."""
    return -(log_determinants + means.shape[-1])


def torch_distributions(all_pairs: bool) -> Contender:
    """kl_divergence of two MultivariateNormal(covariance_matrix=...), broadcast for all pairs."""
    torch = load_torch()
    from torch.distributions import MultivariateNormal, kl_divergence

    def tensors(given: Given) -> Any:
        return tuple(map(torch.from_numpy, given))

    def prepare(given: Any) -> Any:
        return MultivariateNormal(given[0], covariance_matrix=given[1])

    def compute(p: Any, q: Any) -> np.ndarray:
        if all_pairs:
            M = len(p.loc)
            p = p.expand((len(q.loc), M))
            q = MultivariateNormal(q.loc[:, None], scale_tril=q.scale_tril[:, None], validate_args=False)
            q = q.expand((len(q.loc), M))
        found: np.ndarray = kl_divergence(p, q).numpy()
        return found.T if all_pairs else found

    return Contender(TORCH, prepare, compute, TORCH_SHARE if all_pairs else 1, tensors)


def contenders(all_pairs: bool) -> list[Contender]:
    """Ours first: for single pairs what users call, constructors and their checks included."""
    ours = [emalgam(backend, all_pairs) for backend in EMALGAM]
    if not all_pairs:
        ours = [*(public(backend, read_only) for backend in EMALGAM for read_only in (True, False)), *ours]
    return [*ours, *([numpy_algebra()] if all_pairs else []), torch_distributions(all_pairs)]


# ---- measuring


def rates(work: str, competing: Sequence[Contender], p: Given, q: Given, pairs: int, rounds: int) -> list[Rate]:
    """Each contender in turns, after all have computed the same; AssertionError if one has not."""
    expected = None
    for each in competing:  # warms up, too
        found = _timed(each, p, q)[2]
        expected = found if expected is None else expected
        same = expected[:, : found.shape[1]] if each.share > 1 else expected
        np.testing.assert_allclose(found, same, rtol=1e-9, err_msg=each.name)
    seconds = in_turns({each.name: partial(_seconds, each, p, q) for each in competing}, rounds)
    return [_rate(work, each, pairs, seconds[each.name]) for each in competing]


def _timed(each: Contender, p: Given, q: Given) -> tuple[float, float, np.ndarray]:
    """Seconds from covariances on, seconds of the divergences alone, and the divergences."""
    few = each.given(tuple(part[: len(part) // each.share] for part in q))
    all_of_p = each.given(p)
    start = time.perf_counter()
    prepared = each.prepare(all_of_p), each.prepare(few)
    middle = time.perf_counter()
    found = each.compute(*prepared)
    end = time.perf_counter()
    return end - start, end - middle, found


def _seconds(each: Contender, p: Given, q: Given) -> tuple[float, float]:
    return _timed(each, p, q)[:2]


def _rate(work: str, each: Contender, pairs: int, seconds: list[tuple[float, float]]) -> Rate:
    whole, prepared = (pairs / each.share / median(column) / 1e6 for column in zip(*seconds, strict=True))
    return Rate(work, each.name, whole, prepared)


def measure(smoke: bool = False) -> dict[str, list[Rate]]:
    """Both figures, by their names in `FASTER`."""
    found = {}
    for name, all_pairs, (M, D) in (
        ("all pairs", True, SMOKE_ALL if smoke else ALL),
        ("element by element", False, SMOKE_PAIRS if smoke else PAIRS),
    ):
        work = f"{name}, {M} Gaussians, D = {D}"
        say(f"    {work}")
        p, q = gaussians(M, D, seed=0), gaussians(M, D, seed=1)
        pairs = M**2 if all_pairs else M
        found[name] = rates(work, contenders(all_pairs), p, q, pairs, 1 if smoke else ROUNDS)
    return found


# ---- writing


def targets(measured: dict[str, list[Rate]]) -> list[Target]:
    """The figures of cython_cpu, from covariances on."""
    return [
        Target(
            f"KL, {rate.work}, {own.contender}: faster than {rate.contender}",
            own.whole / rate.whole,
            factor,
            True,
            " ×",
        )
        for name, found in measured.items()
        for own in found
        if own.contender == OWN[name]
        for rate in found
        if (factor := FASTER[name].get(rate.contender))
    ]


NOTE: Final = """Million pairs per second, float64; how many times faster cython_cpu is. "From covariances" includes
what every contender makes of them first (factors, inverses, torch's distributions); "prepared" is the rest. torch does
a twentieth of all pairs, as its memory grows with their number.

"""


def rate_table(rates: Sequence[Rate]) -> str:
    """The contenders of one work; how many times faster the first one is."""
    own = rates[0]
    rows = [
        [
            rate.contender,
            number(rate.whole),
            f"{number(own.whole / rate.whole)} ×",
            number(rate.prepared),
            f"{number(own.prepared / rate.prepared)} ×",
        ]
        for rate in rates
    ]
    return table([own.work, "from covariances", "faster", "prepared", "faster"], rows)


def topic(smoke: bool) -> Topic:
    """All pairs and single pairs."""
    measured = measure(smoke)
    figures = targets(measured)
    tables = "\n".join(rate_table(rates) for rates in measured.values())
    return Topic([f"## Divergences of Gaussians\n\n{NOTE}{tables}\n{judged(figures)}"], figures)


if __name__ == "__main__":
    print("\n".join(topic(smoke=False).sections))
