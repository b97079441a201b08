"""Divergences as means over samples: how many, from where, and their standard error.

Letters: B pairs of mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Final

import numpy as np

from emalgam import backends
from emalgam.comparison import ELEMENTS_AT_ONCE, common_kind, flattened, meetings, shaped
from emalgam.draws import philox_seed, sampler_of
from emalgam.gaussian import Gaussian
from emalgam.guard import TOLERANCE, Cancellation, packed_bound, packed_reach
from emalgam.packing import Components, Frame
from emalgam.sampling import Estimate
from emalgam.stacks import MixtureStack, Stacks, both_as_stacks, stack_of_gaussians
from emalgam.validation import check_choice, check_integer, check_number, check_threads
from emalgam_kernels import Direct, Packed, Parameters, Sampler
from emalgam_kernels.monte_carlo import SUMS, SUMS_WITH_CONTROL
from emalgam_kernels.parameters import take

ESTIMATORS: Final = ("plain", "control")
DEFAULT_SAMPLES: Final = 100_000
MOST_SAMPLES: Final = 2**26
# The standard error is an estimate, too, and of few samples so rough that a rule which stops at a small one would stop
# at what is wrong by chance: of a thousand it has an error of a few per cent.
LEAST_FOR_STOPPING: Final = 1000
# β of the control is estimated from the samples that it corrects, a bias of order 1 / n: for mixtures in one dimension
# 95 % intervals covered 75 % at 5 samples, 89 % at 10 and 95 % from 30 on.
LEAST_FOR_CONTROL: Final = 30
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
        n_samples: int | None = None,
        relative_error: float | None = None,
        estimator: str = "plain",
        random_state: Any = None,
        max_samples: int = MOST_SAMPLES,
        backend: str = "auto",
        n_threads: int | None = None,
    ) -> Sampling:
        """Of arguments that users give."""
        n = DEFAULT_SAMPLES if n_samples is None else check_integer("n_samples", n_samples, 1)
        most = check_integer("max_samples", max_samples, 1)
        if relative_error is not None:
            if check_number("relative_error", relative_error) == 0:
                raise ValueError("relative_error is 0; expected a number > 0")
            if n_samples is not None and n > most:
                raise ValueError(
                    f"n_samples is {n} and max_samples {most}; expected n_samples <= max_samples: it is how many "
                    "samples relative_error begins with"
                )
            n = min(max(n, LEAST_FOR_STOPPING), most)
        control = check_choice("estimator", estimator, ESTIMATORS) == "control"
        if control and n < LEAST_FOR_CONTROL:
            raise ValueError(
                f"estimator is 'control' with {n} samples; expected at least {LEAST_FOR_CONTROL}, from which its "
                "coefficient and its error can be estimated: draw more, or pass estimator='plain'"
            )
        kernels, seed = backends.kernels(backend, "sampling"), philox_seed(random_state)
        return cls(n, relative_error, control, seed, most, kernels, backend, check_threads(n_threads))

    def other(self) -> Sampling:
        """The same with samples that are independent of these."""
        return replace(self, first=OTHER_SAMPLES)

    def closed_form(self, p: Gaussian, q: Gaussian) -> np.ndarray:
        """KL(p ‖ q) of two stacks of full Gaussians, (B,)."""
        stacks = [flattened(each, "full", np.dtype(np.float64)) for each in (p, q)]
        out = np.empty(len(stacks[0]))
        backends.kernels(self.backend, "kl").kl_pairs(*stacks, out, n_threads=self.n_threads)
        return out

    def estimate(self, p: Members, q: Members) -> Estimate:
        """KL(p ‖ q) of each pair, arrays (B,)."""
        out = Estimate(np.empty(len(p)), np.empty(len(p)), np.empty(len(p), np.int64))
        forms = 2 * p.too_far(p) + q.too_far(p)
        for form in np.unique(forms).tolist():  # one call of a kernel takes packed or direct densities
            alike = np.flatnonzero(forms == form)
            some_p, some_q = p.take(alike), q.take(alike)
            self._estimate(
                _Run.of(self, some_p, some_p.density(form & 2), some_q.density(form & 1), some_q), alike, out
            )
        return out

    def _estimate(self, run: _Run, rows: np.ndarray, out: Estimate) -> None:
        """Estimates of the pairs of a run, which are `rows` of `out`: those that are accurate enough drop out."""
        run.draw(self.n_samples)
        while True:
            found = run.estimate()
            for place, values in zip(out, found, strict=True):
                place[rows] = values
            if self.relative_error is None or run.count >= self.max_samples:
                return
            short = np.flatnonzero(~(found.standard_error <= self.relative_error * np.abs(found.value)))
            if len(short) == 0:
                return
            run, rows = run.take(short), rows[short]
            run.draw(min(run.count, self.max_samples - run.count))


@dataclass(slots=True, eq=False)
class _Run:
    """Sums over the samples of pairs of mixtures; arrays (B, ...)."""

    settings: Sampling
    sampler: Sampler
    densities: list[Parameters]  # p and q, and those of the control if there is one
    expected_control: np.ndarray
    pivot: np.ndarray
    control_pivot: np.ndarray
    sums: np.ndarray
    count: int = 0

    @classmethod
    def of(cls, settings: Sampling, p: Members, density_p: Parameters, density_q: Parameters, q: Members) -> _Run:
        """Of pairs that nothing has been drawn for."""
        densities, zero = [density_p, density_q], np.zeros(len(p))
        expected, sums = zero, np.zeros((len(p), SUMS))
        if settings.control:
            g_p, g_q = (Gaussian(*each.mixtures.moments()) for each in (p, q))
            expected, sums = settings.closed_form(g_p, g_q), np.zeros((len(p), SUMS_WITH_CONTROL))
            densities += [Prepared.of(stack_of_gaussians(g, name)).packed for g, name in ((g_p, "p"), (g_q, "q"))]
        run = cls(settings, p.sampler, densities, expected, zero, zero, sums)
        run._take_pivots()
        return run

    def take(self, rows: np.ndarray) -> _Run:
        """Some of the pairs."""
        return replace(
            self,
            sampler=take(self.sampler, rows),
            densities=[take(each, rows) for each in self.densities],
            expected_control=self.expected_control[rows],
            pivot=self.pivot[rows],
            control_pivot=self.control_pivot[rows],
            sums=self.sums[rows],
        )

    def _take_pivots(self) -> None:
        """Let the sums be of d − pivot, where d is large: Σ d² would hide how d varies."""
        self.draw(1)
        found, self.sums, self.count = self.sums, np.zeros_like(self.sums), 0
        self.pivot = _pivot(found[:, 0])
        self.densities[0] = _lowered(self.densities[0], self.pivot)
        if self.settings.control:
            self.control_pivot = _pivot(found[:, 2])
            self.densities[2] = _lowered(self.densities[2], self.control_pivot)

    def draw(self, n: int) -> None:
        """Add the next n samples."""
        settings, part = self.settings, np.empty_like(self.sums)
        first, (p, q, *control) = settings.first + self.count, self.densities
        settings.kernels.kl_monte_carlo(
            self.sampler, p, q, settings.seed, first, n, part,
            n_threads=settings.n_threads, control=tuple(control) or None,
        )  # fmt: skip
        self.sums += part
        self.count += n

    def estimate(self) -> Estimate:
        """Mean and standard error of the samples so far."""
        n, (d, dd) = self.count, self.sums[:, :SUMS].T
        if n == 1:
            return Estimate(self.pivot + d, np.full(len(d), math.nan), np.ones(len(d), np.int64))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            value, residual, freedom = self.pivot + d / n, dd - d * d / n, np.full(len(d), n - 1)
            if self.settings.control:
                c, cc, dc = self.sums[:, SUMS:].T
                spread, shared = cc - c * c / n, dc - d * c / n
                useful = np.isfinite(dd) & (spread > n * LEAST_CONTROL**2)
                # d̄ − β (c̄ − E c) with β = cov(d, c) / var(c), which leaves (1 − ρ²) of the variance
                slope = shared / np.where(useful, spread, 1.0)
                departure = slope * (c / n + self.control_pivot - self.expected_control)
                value = np.where(useful, value - departure, value)
                residual = np.where(useful, residual - slope * shared, residual)
                freedom = np.where(useful, n - 2, freedom)
            error = np.sqrt(np.maximum(residual, 0.0) / freedom / n)
        return Estimate(value, np.where(np.isfinite(dd), error, math.inf), np.full(len(d), n))


def _pivot(first: np.ndarray) -> np.ndarray:
    """The log ratios of the first samples where they are large, else zero."""
    size = np.abs(first)
    return np.where((size > LARGE) & (size < math.inf), first, 0.0)


def _lowered(parameters: Parameters, by: np.ndarray) -> Parameters:
    """Of log p − `by`, (B,)."""
    if not by.any():
        return parameters
    if isinstance(parameters, Direct):
        return replace(parameters, log_constants=parameters.log_constants - by[:, None])
    natural = parameters.natural.copy()
    natural[..., -1] -= by[:, None]
    return replace(parameters, natural=natural)


# ---- densities and samplers


@dataclass(frozen=True, eq=False)
class Prepared:
    """A stack of mixtures, and what their densities are evaluated with: `reach` is how far the packed form does."""

    mixtures: MixtureStack
    frame: Frame
    components: Components
    reach: np.ndarray

    @classmethod
    def of(cls, mixtures: MixtureStack) -> Prepared:
        """By `emalgam.guard`'s promise for float64; below zero where the packed form is none at all."""
        frame = mixtures.own_frame()
        components = mixtures.components(frame)
        packed, own = Cancellation.scalars(mixtures.covariance, components)
        with np.errstate(over="ignore", invalid="ignore"):
            keeps = packed_bound("float64", packed()) <= TOLERANCE["float64"]
            reach = packed_reach("float64", own(), mixtures.n_features)
        return cls(mixtures, frame, components, np.where(keeps, reach, -math.inf))

    @cached_property
    def packed(self) -> Packed:
        """Natural parameters, whether they keep their digits or not."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.mixtures.covariance.packed(self.components, self.frame, "float64")

    @cached_property
    def direct(self) -> Direct:
        """Means and factors."""
        return self.mixtures.direct()

    @cached_property
    def sampler(self) -> Sampler:
        """What draws from the mixtures."""
        return sampler_of(self.mixtures)


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """Some mixtures of a stack that was prepared once, in any order and as often as they are wanted."""

    prepared: Prepared
    rows: np.ndarray

    @classmethod
    def all_of(cls, mixtures: MixtureStack) -> Members:
        """A stack as it is."""
        return cls(Prepared.of(mixtures), np.arange(len(mixtures)))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: np.ndarray) -> Members:
        """Some of them."""
        return Members(self.prepared, self.rows[which])

    @property
    def mixtures(self) -> MixtureStack:
        return self.prepared.mixtures.take(self.rows)

    @property
    def sampler(self) -> Sampler:
        return take(self.prepared.sampler, self.rows)

    def density(self, direct: bool | int) -> Parameters:
        """What kernels need for log-densities."""
        return take(self.prepared.direct if direct else self.prepared.packed, self.rows)

    def too_far(self, source: Members) -> np.ndarray:
        """Of which the density at samples of `source` is not to be packed, (B,) bool."""
        prepared, rows, mixtures = self.prepared, self.rows, source.mixtures
        if source is self:  # each component is the nearest one to itself
            return prepared.reach[rows] < 0
        # ½ ‖P_kᵀ (μ_a − μ_k)‖² to the nearest component k, for the farthest component a of the source
        frame, components = Frame(prepared.frame.shift[rows], prepared.frame.scale[rows]), prepared.components
        offsets = frame.apply(mixtures.means)[:, :, None] - components.means[rows][:, None]
        factors = shaped(prepared.mixtures, components.precisions_cholesky, prepared.mixtures.covariance.direct_map)
        P = factors[rows][:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            y = offsets * P if P.ndim == offsets.ndim else (offsets[..., None, :] @ P)[..., 0, :]
            distances = 0.5 * (y**2).sum(axis=3)
        nearest = np.where(components.weights[rows][:, None] > 0, distances, math.inf).min(axis=2)
        farthest = np.where(mixtures.weights > 0, nearest, -math.inf).max(axis=1)
        too_far: np.ndarray = farthest > prepared.reach[rows]
        return too_far


def over_pairs(p: Any, q: Any, all_pairs: bool, estimate: Callable[[Members, Members], Estimate]) -> Estimate:
    """An estimate for each pair: those whose mixtures are alike at once, a bounded number at a time."""
    left, right = both_as_stacks(p, q)
    shape, rows, columns = meetings(left.shape, right.shape, all_pairs)
    out = Estimate(np.empty(len(rows)), np.empty(len(rows)), np.empty(len(rows), np.int64))
    for pairs, some_p, some_q in _alike(left, right, rows, columns):
        numbers = (some_p.prepared.mixtures.n_components + some_q.prepared.mixtures.n_components) * left.n_features**2
        step = max(ELEMENTS_AT_ONCE // numbers, 1)
        for start in range(0, len(pairs), step):
            some = np.arange(start, min(start + step, len(pairs)))
            found = estimate(some_p.take(some), some_q.take(some))
            for place, values in zip(out, found, strict=True):
                place[pairs[some]] = values
    if not shape:
        return Estimate(float(out.value[0]), float(out.standard_error[0]), int(out.n_samples[0]))
    return Estimate(*(column.reshape(shape) for column in out))


def _alike(
    left: Stacks, right: Stacks, rows: np.ndarray, columns: np.ndarray
) -> Iterator[tuple[np.ndarray, Members, Members]]:
    """Pairs of mixtures `rows` and `columns` whose stacks are the same two, and the mixtures of each side."""
    prepared = [[Prepared.of(stack) for _, stack in stacks.groups] for stacks in (left, right)]
    (group_p, place_p), (group_q, place_q) = left.places(), right.places()
    groups = group_p[rows] * len(right.groups) + group_q[columns]
    for group in np.unique(groups).tolist():
        pairs = np.flatnonzero(groups == group)
        i, j = divmod(group, len(right.groups))
        yield pairs, Members(prepared[0][i], place_p[rows[pairs]]), Members(prepared[1][j], place_q[columns[pairs]])


def sum_of(one: Estimate, other: Estimate, share: float = 1.0) -> Estimate:
    """`share` times the sum of two independent estimates."""
    error = share * np.hypot(one.standard_error, other.standard_error)
    return Estimate(share * (one.value + other.value), error, one.n_samples + other.n_samples)


def average(p: Members, q: Members) -> Members:
    """½ (p + q) of each pair."""
    one, other = p.mixtures, q.mixtures
    kind = common_kind(one, other)
    covariances, factors = (  # kernels read matrices in C order; np.concatenate takes the order of its parts
        np.ascontiguousarray(np.concatenate([shaped(each, getattr(each, name), kind) for each in (one, other)], axis=1))
        for name in ("covariances", "precisions_cholesky")
    )
    weights, means = (
        np.concatenate([one.weights, other.weights], axis=1) / 2,
        np.concatenate([one.means, other.means], 1),
    )
    return Members.all_of(MixtureStack(weights, means, covariances, factors, kind))
