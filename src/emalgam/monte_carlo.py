"""Divergences as means over samples: how many, from where, and their standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from emalgam import backends
from emalgam.comparison import flattened, shaped
from emalgam.covariance import COVARIANCES
from emalgam.draws import philox_seed, sampler_of
from emalgam.gaussian import Gaussian, as_mixture, moment_match
from emalgam.guard import Cancellation, choose_evaluation, packed_reach, parameters_of
from emalgam.mixture import Mixture
from emalgam.packing import Components, Frame
from emalgam.sampling import Estimate
from emalgam.validation import check_choice, check_integer, check_number, check_threads
from emalgam_kernels import Direct, Parameters

ESTIMATORS: Final = ("plain", "control")
DEFAULT_SAMPLES: Final = 100_000
MOST_SAMPLES: Final = 2**26
OTHER_SAMPLES: Final = 2**62  # the first row of a second, independent set of samples of one seed
LARGE: Final = 1e4  # nats: the first log ratio beyond which sums are taken about it
LEAST_CONTROL: Final = 1e-7  # a control whose standard deviation is smaller (in nats) is mostly rounding


@dataclass(frozen=True, slots=True, eq=False)
class Sampling:
    """How many samples, and where they come from."""

    n_samples: int
    relative_error: float | None
    control: bool
    seed: int
    max_samples: int
    kernels: ModuleType
    backend: str
    n_threads: int
    first: int = 0

    @classmethod
    def of(
        cls,
        n_samples: int = DEFAULT_SAMPLES,
        relative_error: float | None = None,
        estimator: str = "plain",
        random_state: Any = None,
        max_samples: int = MOST_SAMPLES,
        backend: str = "auto",
        n_threads: int | None = None,
    ) -> Sampling:
        """Of arguments that users give."""
        n = check_integer("n_samples", n_samples, 1)
        most = check_integer("max_samples", max_samples, 1)
        if relative_error is not None and check_number("relative_error", relative_error) == 0:
            raise ValueError("relative_error is 0; expected a number > 0")
        control = check_choice("estimator", estimator, ESTIMATORS) == "control"
        kernels, seed = backends.kernels(backend, "sampling"), philox_seed(random_state)
        return cls(n, relative_error, control, seed, most, kernels, backend, check_threads(n_threads))

    def other(self) -> Sampling:
        """The same with samples that are independent of these."""
        return replace(self, first=OTHER_SAMPLES)

    def closed_form(self, p: Gaussian, q: Gaussian) -> float:
        """KL(p ‖ q) of two full Gaussians."""
        out = np.empty(1)
        stacks = (flattened(each, "full", np.dtype(np.float64)) for each in (p, q))
        backends.kernels(self.backend, "kl").kl_pairs(*stacks, out)
        return float(out[0])

    def estimate(self, p: Mixture, q: Mixture) -> Estimate:
        """KL(p ‖ q)."""
        run = _Run(self, p, q)
        run.draw(self.n_samples)
        while self.relative_error is not None and run.count < self.max_samples:
            found = run.estimate()
            if found.standard_error <= self.relative_error * abs(found.value):
                break
            run.draw(min(run.count, self.max_samples - run.count))
        return run.estimate()


class _Run:
    """Sums over the samples of one pair of mixtures."""

    def __init__(self, settings: Sampling, p: Mixture, q: Mixture) -> None:
        self.settings, self.sampler, self.count = settings, _sampler(p), 0
        self.densities = density(p, p), density(q, p)
        self.control: tuple[Parameters, Parameters] | None = None
        self.expected_control = 0.0
        if settings.control:
            g_p, g_q = moment_match(p), moment_match(q)
            self.expected_control = settings.closed_form(g_p, g_q)
            self.control = packed(as_mixture("p", g_p)), packed(as_mixture("q", g_q))
        self.sums = np.zeros(5 if settings.control else 2)
        self.pivot = self.control_pivot = 0.0
        self._take_pivots()

    def _take_pivots(self) -> None:
        """Let the sums be of d − pivot, where d is large: Σ d² would hide how d varies."""
        self.draw(1)
        found, self.sums, self.count = self.sums, np.zeros_like(self.sums), 0
        if LARGE < abs(found[0]) < math.inf:
            self.pivot = float(found[0])
            self.densities = _lowered(self.densities[0], self.pivot), self.densities[1]
        if self.control is not None and LARGE < abs(found[2]) < math.inf:
            self.control_pivot = float(found[2])
            self.control = _lowered(self.control[0], self.control_pivot), self.control[1]

    def draw(self, n: int) -> None:
        """Add the next n samples."""
        settings, part = self.settings, np.empty_like(self.sums)
        first = settings.first + self.count
        settings.kernels.kl_monte_carlo(
            self.sampler, *self.densities, settings.seed, first, n, part,
            n_threads=settings.n_threads, control=self.control,
        )  # fmt: skip
        self.sums += part
        self.count += n

    def estimate(self) -> Estimate:
        """Mean and standard error of the samples so far."""
        n, (d, dd) = self.count, self.sums[:2]
        if n == 1:
            return Estimate(self.pivot + float(d), math.nan, 1)
        if not math.isfinite(dd):
            return Estimate(self.pivot + float(d) / n, math.inf, n)
        value, residual, freedom = self.pivot + d / n, dd - d * d / n, n - 1
        if self.control is not None and n > 2:
            c, cc, dc = self.sums[2:]
            spread, shared = cc - c * c / n, dc - d * c / n
            if spread > n * LEAST_CONTROL**2:
                # d̄ − β (c̄ − E c) with β = cov(d, c) / var(c), which leaves (1 − ρ²) of the variance
                slope = shared / spread
                value -= slope * (c / n + self.control_pivot - self.expected_control)
                residual, freedom = residual - slope * shared, n - 2
        return Estimate(float(value), math.sqrt(max(residual, 0.0) / freedom / n), n)


def _lowered(parameters: Parameters, by: float) -> Parameters:
    """Of log p − `by`."""
    if isinstance(parameters, Direct):
        return replace(parameters, log_constants=parameters.log_constants - by)
    natural = parameters.natural.copy()
    natural[:, -1] -= by
    return replace(parameters, natural=natural)


Value = TypeVar("Value")


def _remembered(function: Callable[[Mixture], Value]) -> Callable[[Mixture], Value]:
    """`function`, once for each mixture as long as that lives: a stack of pairs asks for the same ones again."""
    known: WeakKeyDictionary[Mixture, Value] = WeakKeyDictionary()

    @wraps(function)
    def look_up(mixture: Mixture) -> Value:
        if mixture not in known:
            known[mixture] = function(mixture)
        return known[mixture]

    return look_up


_sampler = _remembered(sampler_of)


class _Own(NamedTuple):
    """What the density of a mixture is evaluated with."""

    frame: Frame
    components: Components
    factors: np.ndarray
    reach: float
    parameters: Parameters


@_remembered
def _own(mixture: Mixture) -> _Own:
    frame = mixture.own_frame()
    components = mixture.components(frame)
    cancellation = Cancellation.of(mixture.covariance, components)
    how = choose_evaluation("auto", np.dtype(np.float64), cancellation)
    factors = mixture.covariance.matrices(components.precisions_cholesky, *mixture.means.shape)
    reach = packed_reach(how, cancellation, mixture.n_features) if how.algorithm == "packed" else math.inf
    return _Own(frame, components, factors, reach, parameters_of(mixture.covariance, components, frame, how))


def density(mixture: Mixture, source: Mixture) -> Parameters:
    """What kernels need for log-densities at samples of `source`: packed while that keeps `emalgam.guard`'s promise."""
    own = _own(mixture)
    # ½ ‖P_kᵀ (μ_a − μ_k)‖² to the nearest component k, for the farthest component a of the source
    offsets = own.frame.apply(source.means[source.weights > 0])[:, None] - own.components.means
    with np.errstate(over="ignore"):
        distances = 0.5 * (np.einsum("akd,kde->ake", offsets, own.factors) ** 2).sum(axis=2)
    if distances[:, mixture.weights > 0].min(axis=1).max() > own.reach:
        return mixture.covariance.direct(own.components, own.frame, "float64")
    return own.parameters


def packed(mixture: Mixture) -> Any:
    """A mixture as natural parameters."""
    frame = mixture.own_frame()
    return mixture.covariance.packed(mixture.components(frame), frame, "float64")


def sum_of(one: Estimate, other: Estimate, share: float = 1.0) -> Estimate:
    """`share` times the sum of two independent estimates."""
    error = share * math.hypot(one.standard_error, other.standard_error)
    return Estimate(share * (one.value + other.value), error, one.n_samples + other.n_samples)


def average(p: Mixture, q: Mixture) -> Mixture:
    """½ (p + q)."""
    D = p.n_features
    kind = "diag" if p.covariance.direct_map == q.covariance.direct_map == "diag" else "full"
    weights, means = np.concatenate([p.weights, q.weights]) / 2, np.concatenate([p.means, q.means])
    covariances = np.concatenate([shaped(each, each.covariances, kind) for each in (p, q)])
    factors = np.concatenate([shaped(each, each.precisions_cholesky, kind) for each in (p, q)])
    components = Components(weights, means, covariances, factors)
    return Mixture.from_components(components, Frame(np.zeros(D), np.ones(D)), COVARIANCES[kind])
