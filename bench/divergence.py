"""Divergences of Gaussians against torch.distributions and against the same algebra in NumPy.

    python bench/divergence.py

Everyone starts from means and covariances, in float64 on two threads: all pairs of 1000 Gaussians with D = 16, and
100 000 pairs with D = 8. "whole" includes the constructors, with all their checks: of torch's distributions, which
share their tensors, and of emalgam's Gaussians, which share arrays that are read-only and copy others. "prepared" is
the divergence alone: torch has its distributions, `emalgam.kl` its Gaussians, the kernels their precision factors and
NumPy its inverses already. torch computes a twentieth of all pairs: its memory grows with their number.
Contenders take turns; medians are shown, and how many times faster than torch they are.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam_kernels
from emalgam import Gaussian, kl, use_backend
from emalgam_kernels import Gaussians

ALL: Final = (1000, 16)
PAIRS: Final = (100_000, 8)
SMOKE_ALL: Final = (60, 5)
SMOKE_PAIRS: Final = (500, 3)
TORCH_SHARE: Final = 20
ROUNDS: Final = 7
THREADS: Final = 2
PAUSE: Final = 0.2  # seconds: threads of the library before spin for a while after their last work
BACKENDS: Final = ("cython_cpu", "numba_cpu")
TORCH: Final = "torch.distributions"

Given = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Rate:
    """Million pairs per second of one contender; `whole` starts from covariances, `prepared` from what it keeps.

    `times_torch` is how many times faster than torch both are, where torch is installed.
    """

    work: str
    contender: str
    whole: float
    prepared: float
    times_torch: tuple[float, float] | None = None

    def __str__(self) -> str:
        rates = f"{self.work:44s} {self.contender:22s} {self.whole:10.3f} {self.prepared:10.3f}"
        return rates + "".join(f" {times:8.1f} ×" for times in self.times_torch or ())

    def beside(self, torch: Rate) -> Rate:
        """The same with `times_torch`."""
        return replace(self, times_torch=(self.whole / torch.whole, self.prepared / torch.prepared))


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

    def prepare(given: Given) -> tuple[np.ndarray, ...]:
        return (*given, np.linalg.inv(given[1]), np.linalg.slogdet(given[1])[1])

    def compute(p: tuple[np.ndarray, ...], q: tuple[np.ndarray, ...]) -> np.ndarray:
        (means, covariances, _, logs_p), (others, _, precisions, logs_q) = p, q
        i, j = np.tril_indices(means.shape[1])
        linear = np.einsum("mij,mj->mi", precisions, others)
        constant = np.einsum("mi,mi->m", linear, others) + logs_q
        eta = np.hstack([precisions[:, i, j] * np.where(i == j, 1.0, 2.0), -2 * linear, constant[:, None]])
        second = covariances[:, i, j] + means[:, i] * means[:, j]
        out: np.ndarray = np.hstack([second, means, np.ones((len(means), 1))]) @ eta.T
        out -= (logs_p + means.shape[1])[:, None]
        out *= 0.5
        return out

    return Contender("NumPy, same algebra", prepare, compute)


def torch_distributions(all_pairs: bool) -> Contender:
    """kl_divergence of two MultivariateNormal(covariance_matrix=...), broadcast for all pairs."""
    import torch
    from torch.distributions import MultivariateNormal, kl_divergence

    torch.set_num_threads(THREADS)

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
    """Those that are installed, the kernels first."""
    backends = [backend for backend in BACKENDS if emalgam_kernels.probe(backend) is None]
    found = [emalgam(backend, all_pairs) for backend in backends]
    if not all_pairs:
        found += [public(backend, read_only) for backend in backends for read_only in (True, False)]
    if all_pairs:
        found.append(numpy_algebra())
    if importlib.util.find_spec("torch"):
        found.append(torch_distributions(all_pairs))
    return found


# ---- measuring


def rates(work: str, all_pairs: bool, size: tuple[int, int], rounds: int) -> list[Rate]:
    """Each contender in turns, after all have computed the same; AssertionError if one has not."""
    p, q = gaussians(*size, seed=0), gaussians(*size, seed=1)
    competing = contenders(all_pairs)
    seconds: dict[str, list[tuple[float, float]]] = {each.name: [] for each in competing}
    expected = None
    for each in competing:  # warms up, too
        found = _timed(each, p, q)[2]
        expected = found if expected is None else expected
        same = expected[:, : found.shape[1]] if all_pairs else expected
        np.testing.assert_allclose(found, same, rtol=1e-9, err_msg=each.name)
    for _ in range(rounds):
        for each in competing:
            seconds[each.name].append(_timed(each, p, q)[:2])
    found_rates = [_rate(work, each, size[0] ** 2 if all_pairs else size[0], seconds[each.name]) for each in competing]
    torch = next((rate for rate in found_rates if rate.contender == TORCH), None)
    return [rate.beside(torch) for rate in found_rates] if torch else found_rates


def _timed(each: Contender, p: Given, q: Given) -> tuple[float, float, np.ndarray]:
    """Seconds from covariances on, seconds of the divergences alone, and the divergences."""
    few = each.given((q[0][: len(q[0]) // each.share], q[1][: len(q[1]) // each.share]))
    all_of_p = each.given(p)
    time.sleep(PAUSE)
    start = time.perf_counter()
    prepared = each.prepare(all_of_p), each.prepare(few)
    middle = time.perf_counter()
    found = each.compute(*prepared)
    end = time.perf_counter()
    return end - start, end - middle, found


def _rate(work: str, each: Contender, pairs: int, seconds: list[tuple[float, float]]) -> Rate:
    whole, prepared = (pairs / each.share / median(column) / 1e6 for column in zip(*seconds, strict=True))
    return Rate(work, each.name, whole, prepared)


def measure(rounds: int = ROUNDS, smoke: bool = False) -> list[Rate]:
    """Both figures, printed while they come."""
    found = []
    print(f"{'million pairs per second':67s} {'whole':>10s} {'prepared':>10s}   whole ×  prepared × torch")
    for name, all_pairs, (M, D) in (
        ("all pairs", True, SMOKE_ALL if smoke else ALL),
        ("element by element", False, SMOKE_PAIRS if smoke else PAIRS),
    ):
        for rate in rates(f"{name}, {M} Gaussians, D = {D}", all_pairs, (M, D), rounds):
            print(rate, flush=True)
            found.append(rate)
    return found


if __name__ == "__main__":
    measure()
