"""Stepwise EM: streams that pass once. Each batch moves running statistics, and the M-step follows them.

    ŝ ← (1 − γ) ŝ + γ s(batch)

s(batch) are the statistics of the E-step per unit of weight, in the frame of the first batch, about the means before
it; after each M-step ŝ is moved to be about the new ones. So nothing cancels where the guard has chosen the direct
form, wherever the components lie. The first batch is fitted by EM to convergence; what later batches hold is forgotten
slowly enough for the estimate to converge (½ < κ ≤ 1), and fast enough to leave the start behind. See `Memory` for γ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, Final, cast

import numpy as np

from emalgam import backends
from emalgam.covariance import COVARIANCES, Covariance
from emalgam.em import Fit, Settings, fit_observations
from emalgam.guard import Cancellation, Evaluation, choose_evaluation, parameters_of
from emalgam.m_step import RESEEDS_PER_COMPONENT, MStep, NumericalError, effective_components
from emalgam.mixture import Mixture
from emalgam.observations import Observations, moderate
from emalgam.packing import Components, Frame, Moments, pack_symmetric
from emalgam.parts import Data
from emalgam.stream import Chunk, one_pass, read_ahead, rejoined
from emalgam.validation import (
    check_data,
    check_finite,
    check_integer,
    check_number,
    check_threads,
    check_weight,
    generator,
)

KAPPA: Final = 0.6  # what Cappé and Moulines recommend, section 4
T_0: Final = 2.0
ROWS_OF_A_BATCH: Final = 16_384
ROWS_OF_THE_FIRST: Final = 1000  # for each component


@dataclass(frozen=True, slots=True)
class Memory:
    """How much what was seen counts beside one more batch.

    The rule of the literature, γ_t = (t + t₀)^−κ in the t-th step, is for batches that weigh the same: it takes what
    was seen for (1 − γ_t) / γ_t of them. Here t is weight, counted in batches like the heaviest so far, and a batch
    counts by its own: one of weight ε moves the estimate by O(ε), equal batches have γ_t, and with κ = t₀ = 1 ŝ is the
    mean over all rows, however they were cut.

    Attributes
    ----------
    kappa, t_0 : float
    weight : float
        Σ ω of what was seen, times `moderation`.
    heaviest : float
        That of its heaviest batch.
    moderation : float
        A power of two that keeps both within float64, as in `observations.moderation`.

    References
    ----------
    Cappé, Moulines (2009), "On-line expectation-maximization algorithm for latent data models"; Liang, Klein (2009),
    "Online EM for unsupervised models", who take t₀ = 2 and mini-batches of one size.
    """

    kappa: float
    t_0: float
    weight: float
    heaviest: float
    moderation: float = 1.0

    @classmethod
    def of(cls, weight: float, moderation: float = 1.0, kappa: float = KAPPA, t_0: float = T_0) -> Memory:
        """That of one batch."""
        return cls(kappa, t_0, weight, weight, moderation)

    def gamma(self, weight: float, moderation: float = 1.0) -> float:
        """γ of a batch of that weight, times a `moderation` of its own."""
        # γ_t of one like the heaviest
        gamma = (self.weight / self.heaviest + self.t_0) ** -self.kappa
        # 1 / b, for a batch that weighs as much as b of the heaviest
        lightness = min((self.heaviest / weight) * (moderation / self.moderation), sys.float_info.max)
        # b of them beside the (1 − γ) / γ that were seen: γ_b = b / (b + (1 − γ) / γ)
        return gamma / (gamma + (1 - gamma) * lightness)

    def after(self, weight: float, moderation: float = 1.0) -> Memory:
        """The memory when a batch of that weight has been seen too."""
        unit = min(self.moderation, moderation)
        before, new = unit / self.moderation, weight * (unit / moderation)
        heaviest = max(self.heaviest * before, new)
        return replace(self, weight=self.weight * before + new, heaviest=heaviest, moderation=unit)


@dataclass(frozen=True, eq=False)
class _Origin:
    """The data as an M-step sees them: frame, variances and covariance are those of the first batch, (D,), (D, D).

    `x` and `weight` are the rows that a component can start again at, those of the batch.
    """

    frame: Frame
    variance: np.ndarray
    total_covariance: np.ndarray
    x: Any = field(default_factory=lambda: np.empty((0, 0)))
    weight: Any = None
    scatter: ClassVar[None] = None  # of a shared covariance too the statistics are about the means

    @property
    def sample(self) -> _Origin:
        return self

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Some rows as float64, (n, D)."""
        return np.asarray(self.x[indices], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Running:
    """The state between two batches, in the frame of the first.

    Attributes
    ----------
    covariance_type : str
    origin : _Origin
    statistics : (K, F) float64
        ŝ, per unit of weight, about the components' means; `Covariance.second_moments` says of which φ₂.
    components : Components
    memory : Memory
    steps : int
    how : Evaluation
        Of the last pass.
    reseeds_left : int
    """

    covariance_type: str
    origin: _Origin
    statistics: np.ndarray
    components: Components
    memory: Memory
    steps: int
    how: Evaluation
    reseeds_left: int

    @classmethod
    def begin(
        cls,
        x: np.ndarray,
        weight: np.ndarray | None,
        settings: Settings,
        backend: str,
        n_threads: int,
        kappa: float = KAPPA,
        t_0: float = T_0,
    ) -> tuple[Running, Fit]:
        """The state after a fit of the first batch, and that fit; errors as in `emalgam.fit` and `step`."""
        check_precision_of_steps(settings)
        data = Observations.of(x, weight, settings.covariance, backend, n_threads)
        fitted = fit_observations(data, settings)
        components = fitted.mixture.components(data.frame)
        memory = Memory.of(data.total_weight, data.moderation, kappa, t_0)
        first = cls._implied(components, settings.covariance, data.frame, memory)
        how = _evaluation(settings.algorithm, components, settings.covariance)
        statistics, _ = first._expect(data.x, data.weight, how, data.backend, n_threads)
        origin = replace(first.origin, variance=data.variance)
        return replace(first, origin=origin, statistics=statistics / data.total_weight, how=how), fitted

    @classmethod
    def of(cls, mixture: Mixture, memory: Memory, least_variance: float = 0.0) -> Running:
        """The state that goes on from a mixture of data that were seen: ŝ is what the statistics are in its mean.

        A feature that varies less under the mixture than `least_variance` counts as if it varied that much.
        """
        frame = mixture.own_frame()
        state = cls._implied(mixture.components(frame), mixture.covariance, frame, memory)
        variance = np.maximum(state.origin.variance, least_variance * frame.scale**2)
        return replace(state, origin=replace(state.origin, variance=variance))

    @classmethod
    def _implied(cls, components: Components, covariance: Covariance, frame: Frame, memory: Memory) -> Running:
        """What a mixture says of the data that it was fitted to."""
        K = len(components.means)
        total = _total_covariance(components, covariance)
        return cls(
            covariance_type=covariance.name,
            origin=_Origin(frame, np.diag(total).copy(), total),
            statistics=_implied_statistics(components, covariance),
            components=components,
            memory=memory,
            steps=0,
            how=_evaluation("auto", components, covariance),
            reseeds_left=RESEEDS_PER_COMPONENT * K,
        )

    @property
    def covariance(self) -> Covariance:
        return COVARIANCES[self.covariance_type]

    @property
    def feature_map(self) -> str:
        """φ of ŝ."""
        return "full" if self.covariance.shared else self.covariance.feature_map

    @property
    def mixture(self) -> Mixture:
        """The mixture so far."""
        return Mixture.from_components(self.components, self.origin.frame, self.covariance)

    def result(self, trace: list[float], backend: str) -> Fit:
        """What there is to say of the mixture so far; `trace` ends with the mean log p of the last batch."""
        return Fit(
            mixture=self.mixture,
            converged=False,
            n_iter=self.steps,
            lower_bound=trace[-1],
            lower_bounds=trace,
            effective_components=effective_components(self.components, self.covariance),
            backend=backend,
            algorithm=self.how.algorithm,
            arithmetic=self.how.arithmetic,
            error_bound=self.how.error_bound,
            stopped=True,
        )

    def step(
        self,
        x: np.ndarray,
        weight: np.ndarray | None,
        settings: Settings,
        backend: str,
        n_threads: int,
        gamma: float | None = None,
    ) -> tuple[Running, float]:
        """The state after one more batch, and the batch's mean log p before it, in nats.

        Of the settings `reg_covar`, `on_degenerate` (with `random_state`) and `algorithm` matter; the arithmetic is
        float64. `gamma` is γ where the memory does not say it.

        Raises
        ------
        ValueError
            If `precision` is "tf32"; DegenerateComponentError under "error"; NumericalError if the statistics are not
            finite.
        """
        check_precision_of_steps(settings)
        weight, factor = moderate(weight)
        total = float(len(x)) if weight is None else float(weight.sum())
        how = _evaluation(settings.algorithm, self.components, self.covariance)
        statistics, bound = self._expect(x, weight, how, backend, n_threads)
        if not np.isfinite(bound):
            raise NumericalError(f"the log-likelihood of batch {self.steps + 1} is {bound}")
        gamma = self.memory.gamma(total, factor) if gamma is None else gamma
        running = (1 - gamma) * self.statistics + gamma * statistics / total
        origin = replace(self.origin, x=x, weight=weight)
        moved = replace(self, statistics=running, memory=self.memory.after(total, factor), steps=self.steps + 1)
        return replace(moved._maximize(origin, settings), how=how), bound / total

    def _expect(
        self, x: np.ndarray, weight: np.ndarray | None, how: Evaluation, backend: str, n_threads: int
    ) -> tuple[np.ndarray, float]:
        """S (K, F) about the means, and Σ ω log p."""
        parameters = parameters_of(self.covariance, self.components, self.origin.frame, how)
        statistics = np.empty((parameters.n_components, parameters.n_statistics))
        kernels = backends.kernels(backend)
        total = float(kernels.em_statistics(x, weight, parameters, statistics, n_threads=n_threads))
        moments = self.covariance.moments(statistics, self.components, how.algorithm)
        second = moments.second
        if self.covariance.shared and how.algorithm == "packed":
            # Only the sum over the components counts: each has its share of the scatter.
            second = np.outer(moments.mass / moments.mass.sum(), pack_symmetric(self._scatter(x, weight)[None]))
        elif self.feature_map == "spherical":
            second = second.sum(axis=1, keepdims=True)  # direct kernels keep the features apart
        return replace(moments, second=second).about(self.components.means, self.feature_map).statistics, total

    def _scatter(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """Σ ω z zᵀ of a batch, (D, D)."""
        z = self.origin.frame.apply(x.astype(np.float64, copy=False))
        return (z if weight is None else z * weight[:, None]).T @ z

    def _maximize(self, data: _Origin, settings: Settings) -> Running:
        """The M-step, and ŝ about the means that come out of it."""
        rng = _generator_of_a_step(settings, self.steps)
        m_step = MStep(
            cast(Data, data), self.covariance, len(self.statistics), settings.reg_covar, settings.on_degenerate, rng
        )
        m_step.reseeds_left = self.reseeds_left
        moments = Moments.of(self.statistics, self.components.means)
        components = m_step.update(moments, self.components, "direct", self.steps, reseed=True)
        statistics = moments.about(components.means, self.feature_map).statistics
        if m_step.reseeded:  # the others gave some of their weight
            again = np.isin(np.arange(len(statistics)), m_step.collapsed)[:, None]
            share = components.weights / np.where(again[:, 0], 1.0, moments.mass)
            implied = _implied_statistics(components, self.covariance)
            statistics = np.where(again, implied, statistics * share[:, None])
        return replace(self, components=components, statistics=statistics, reseeds_left=m_step.reseeds_left)


def check_precision_of_steps(settings: Settings) -> None:
    """ValueError for TF32; "mixed", whose last pass is in float64, is float64 in steps, which have no other."""
    if settings.precision == "tf32":
        raise ValueError(
            "precision is 'tf32', and the steps of stepwise EM compute in float64; expected 'strict', or 'mixed' for "
            "the fit of the first batch"
        )


def _evaluation(algorithm: str, components: Components, covariance: Covariance) -> Evaluation:
    """How a step evaluates log-densities: in float64, whatever the data."""
    return choose_evaluation(algorithm, np.dtype(np.float64), Cancellation.of(covariance, components))


def _generator_of_a_step(settings: Settings, step: int) -> np.random.Generator:
    """Of an integer seed every step has its own; nobody's generator is touched where nothing will be drawn."""
    if settings.on_degenerate != "reseed":
        return generator(0)
    seed = settings.random_state
    return generator([int(seed), step] if isinstance(seed, Integral) else seed)


def _implied_statistics(components: Components, covariance: Covariance) -> np.ndarray:
    """S (K, F) about the means, in the mean over the mixture: w_k (E_k φ₂(z − μ_k), 0, 1)."""
    second = covariance.second_moments(components.covariances, *components.means.shape)
    weights = components.weights
    return Moments(weights, np.zeros_like(components.means), weights[:, None] * second, components.means).statistics


def _total_covariance(components: Components, covariance: Covariance) -> np.ndarray:
    """The covariance of z, within components and between them, (D, D)."""
    weights, covariances = components.weights, components.covariances
    within = covariances if covariance.shared else np.tensordot(weights, covariances, 1)[None]
    offsets = components.means - weights @ components.means
    return covariance.matrices(within, 1, len(offsets[0]))[0] + (offsets * weights[:, None]).T @ offsets


def fit_stepwise(
    chunks: Any,
    n_components: int,
    *,
    covariance_type: str = "full",
    batch_rows: int | None = None,
    kappa: float = KAPPA,
    t_0: float = T_0,
    tol: float = 1e-3,
    reg_covar: float | str = "auto",
    max_iter: int = 100,
    n_init: int = 1,
    init_params: str = "kmeans",
    random_state: Any = None,
    on_degenerate: str = "regularize",
    backend: str = "auto",
    algorithm: str = "auto",
    n_threads: int | None = None,
) -> Fit:
    """Fit a Gaussian mixture to a stream that passes once.

    Parameters
    ----------
    chunks : iterable of (n, D) arrays, or of pairs of one and its (n,) weights; or what `emalgam.open_stream` takes
        A generator will do. Chunks are joined and cut into batches.
    n_components : int
        K.
    covariance_type : {"full", "tied", "diag", "spherical"}
    batch_rows : int, optional
        Rows between two M-steps; 16 384. The first batch has a thousand rows for each component if that is more.
    kappa, t_0 : float
        γ_t = (t + t₀)^−κ: how fast earlier batches are forgotten; ½ < κ ≤ 1. A batch counts by its weight, and t is
        the weight of those before it, both in batches like the heaviest so far (`emalgam.stepwise.Memory`). With t₀ = 0
        the second forgets the first, whatever it weighs.
    tol, max_iter, n_init, init_params
        As in `emalgam.fit`, for the first batch.
    reg_covar, random_state, on_degenerate
        As in `emalgam.fit`. "auto" goes by the variances of the first batch; a component that "reseed" starts again
        begins at a row of the batch.
    backend, algorithm, n_threads
        As in `emalgam.fit`. Later batches are computed in float64 whatever their type.

    Returns
    -------
    Fit
        `lower_bounds` has the mean log p of the first batch at its end, and of each later one before its M-step.

    Raises
    ------
    ValueError
        For bad data, naming the row of the stream, or arguments; `emalgam.DegenerateComponentError` and
        `emalgam.NumericalError` are among them.
    BackendUnavailable
        If the backend cannot run here.

    References
    ----------
    Cappé, Moulines (2009), "On-line expectation-maximization algorithm for latent data models".

    Examples
    --------
    >>> import numpy as np
    >>> import emalgam
    >>> rng = np.random.default_rng(0)
    >>> chunks = (rng.normal(size=(5000, 2)) + 9 * rng.integers(0, 2, (5000, 1)) for _ in range(20))
    >>> result = emalgam.fit_stepwise(chunks, 2, random_state=0)
    >>> sorted(result.mixture.means[:, 0].round().astype(int).tolist())
    [0, 9]
    """
    settings = Settings(
        n_components,
        covariance_type,
        tol=tol,
        reg_covar=reg_covar,
        max_iter=max_iter,
        n_init=n_init,
        init_params=init_params,
        random_state=random_state,
        on_degenerate=on_degenerate,
        algorithm=algorithm,
    )
    if not 0.5 < check_number("kappa", kappa) <= 1:
        raise ValueError(f"kappa is {kappa}; expected a number above 0.5, up to 1")
    check_number("t_0", t_0)
    name, threads = backends.resolve(backend), check_threads(n_threads)
    rows = ROWS_OF_A_BATCH if batch_rows is None else check_integer("batch_rows", batch_rows, 1)
    state: Running | None = None
    row = 0
    for x, weight in batches(chunks, rows, max(rows, ROWS_OF_THE_FIRST * settings.n_components)):
        check_finite(check_data(x), first=row)
        omega = check_weight(weight, len(x), first=row, some=state is None)
        row += len(x)
        if state is None:
            steps = float(kappa), float(t_0)
            state, fitted = Running.begin(x, omega, settings, name, threads, *steps)
            trace = [fitted.lower_bound]
        elif omega is None or omega.any():  # a batch without weight says nothing
            state, bound = state.step(x, omega, settings, name, threads)
            trace.append(bound)
    if state is None:
        raise ValueError("the stream has no rows; expected at least one")
    return state.result(trace, name)


def batches(chunks: Any, rows: int, first: int) -> Iterator[Chunk]:
    """The rows of a stream in batches of `rows`, the first of `first`, while a thread reads ahead."""
    with closing(read_ahead(one_pass(chunks))) as ahead:
        yield from rejoined(ahead, rows, first)
