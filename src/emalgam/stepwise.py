"""Stepwise EM: streams that pass once. Each batch moves running statistics, and the M-step follows them.

    ŝ ← (1 − γ_t) ŝ + γ_t s(batch),    γ_t = (t + t₀)^−κ

s(batch) are the statistics of the E-step per unit of weight, in the frame of the first batch, about its origin. The
first batch is fitted by EM to convergence; what later batches hold is forgotten slowly enough for the estimate to
converge (½ < κ ≤ 1), and fast enough to leave the start behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import numpy as np

from emalgam import backends
from emalgam.covariance import COVARIANCES, Covariance
from emalgam.em import Fit, Settings, fit_observations
from emalgam.guard import Cancellation, choose_evaluation, parameters_of
from emalgam.m_step import MStep, NumericalError, effective_components
from emalgam.mixture import Mixture
from emalgam.observations import Observations
from emalgam.packing import Components, Frame, Moments
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


@dataclass(frozen=True, eq=False)
class _Origin:
    """What the M-step needs to know of the first batch: the frame, the variances and, for tied, the scatter."""

    frame: Frame
    variance: np.ndarray
    scatter: np.ndarray | None
    x: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def sample(self) -> _Origin:
        return self


@dataclass(frozen=True, eq=False)
class Running:
    """The state between two batches, in the frame of the first.

    Attributes
    ----------
    covariance_type : str
    origin : _Origin
        Its scatter runs too.
    statistics : (K, F) float64
        ŝ, per unit of weight.
    components : Components
    steps : int
        t.
    reg_covar : float or "auto"
    kappa, t_0 : float
    """

    covariance_type: str
    origin: _Origin
    statistics: np.ndarray
    components: Components
    steps: int
    reg_covar: float | str
    kappa: float
    t_0: float

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
        """The state after a fit of the first batch, and that fit; errors as in `emalgam.fit`."""
        data = Observations.of(x, weight, settings.covariance, backend, n_threads)
        fitted = fit_observations(data, settings)
        scatter = None if data.scatter is None else data.scatter / data.total_weight
        origin = _Origin(data.frame, data.variance, scatter)
        components = fitted.mixture.components(data.frame)
        nothing = np.empty((settings.n_components, 0))
        first = cls(settings.covariance_type, origin, nothing, components, 0, settings.reg_covar, kappa, t_0)
        statistics, _ = first._expect(data.x, data.weight, data.backend, n_threads)
        return replace(first, statistics=statistics / data.total_weight), fitted

    @classmethod
    def of(
        cls,
        mixture: Mixture,
        reg_covar: float | str,
        kappa: float = KAPPA,
        t_0: float = T_0,
        least_variance: float = 0.0,
    ) -> Running:
        """The state that goes on from a mixture: ŝ is what the statistics are in the mean over it, w_k E_k φ.

        A feature that varies less under the mixture than `least_variance` counts as if it varied that much.
        """
        covariance, frame = mixture.covariance, mixture.own_frame()
        components = mixture.components(frame)
        K, D = components.means.shape
        weights, means = components.weights[:, None], components.means
        # E φ₂ = Σ + μ μᵀ
        second = covariance.matrices(components.covariances, K, D) + means[:, :, None] * means[:, None]
        i, j = np.tril_indices(D)
        diagonal = np.einsum("kdd->kd", second)
        packed = {"full": second[:, i, j], "diag": diagonal, "spherical": diagonal.sum(axis=1)[:, None]}
        statistics = np.hstack([weights * packed[covariance.feature_map], weights * means, weights])
        scatter = np.einsum("k,kij->ij", components.weights, second)
        mean = components.weights @ means
        variance = np.maximum(np.diag(scatter) - mean**2, least_variance * frame.scale**2)
        origin = _Origin(frame, variance, scatter if covariance.shared else None)
        return cls(covariance.name, origin, statistics, components, 0, reg_covar, kappa, t_0)

    @property
    def covariance(self) -> Covariance:
        return COVARIANCES[self.covariance_type]

    @property
    def mixture(self) -> Mixture:
        """The mixture so far."""
        return Mixture.from_components(self.components, self.origin.frame, self.covariance)

    def step(
        self, x: np.ndarray, weight: np.ndarray | None, backend: str, n_threads: int, gamma: float | None = None
    ) -> tuple[Running, float]:
        """The state after one more batch, and the batch's mean log p before it, in nats.

        `gamma` is γ where the number of steps does not say it.

        Raises
        ------
        NumericalError
            If the statistics are not finite.
        """
        total = float(len(x)) if weight is None else float(weight.sum())
        statistics, bound = self._expect(x, weight, backend, n_threads)
        if not np.isfinite(bound):
            raise NumericalError(f"the log-likelihood of batch {self.steps + 1} is {bound}")
        gamma = (self.steps + 1 + self.t_0) ** -self.kappa if gamma is None else gamma
        running = (1 - gamma) * self.statistics + gamma * statistics / total
        origin = self.origin
        if origin.scatter is not None:
            origin = replace(origin, scatter=(1 - gamma) * origin.scatter + gamma * self._scatter(x, weight) / total)
        moved = replace(self, origin=origin, statistics=running, steps=self.steps + 1)
        return replace(moved, components=moved._maximize()), bound / total

    def _expect(
        self, x: np.ndarray, weight: np.ndarray | None, backend: str, n_threads: int
    ) -> tuple[np.ndarray, float]:
        """S (K, F) about the origin, and Σ ω log p: packed, in float64 arithmetic whatever the data."""
        how = choose_evaluation("packed", np.dtype(np.float64), Cancellation.of(self.covariance, self.components))
        parameters = parameters_of(self.covariance, self.components, self.origin.frame, how)
        statistics = np.empty((parameters.n_components, parameters.n_statistics))
        kernels = backends.kernels(backend)
        total = float(kernels.em_statistics(x, weight, parameters, statistics, n_threads=n_threads))
        moments = self.covariance.moments(statistics, self.components, "packed")  # tied: out of the whitening
        return np.concatenate([moments.second, moments.first, moments.mass[:, None]], axis=1), total

    def _scatter(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """Σ ω z zᵀ of a batch, (D, D)."""
        z = self.origin.frame.apply(x.astype(np.float64, copy=False))
        return (z if weight is None else z * weight[:, None]).T @ z

    def _maximize(self) -> Components:
        data = cast(Data, self.origin)
        m_step = MStep(data, self.covariance, len(self.statistics), self.reg_covar, "regularize", generator(0))
        moments = Moments.of(self.statistics, np.zeros_like(self.components.means))
        return m_step.update(moments, self.components, "packed", self.steps, reseed=False)


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
    backend: str = "auto",
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
        γ_t = (t + t₀)^−κ: how fast earlier batches are forgotten; ½ < κ ≤ 1.
    tol, reg_covar, max_iter, n_init, init_params, random_state
        As in `emalgam.fit`, for the first batch.
    backend, n_threads
        As in `emalgam.fit`.

    Returns
    -------
    Fit
        `lower_bounds` has the mean log p of the first batch at its end, and of each later one before its M-step.

    Raises
    ------
    ValueError
        For bad data, naming the row of the stream, or arguments.
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
            state, bound = state.step(x, omega, name, threads)
            trace.append(bound)
    if state is None:
        raise ValueError("the stream has no rows; expected at least one")
    return replace(
        fitted,
        mixture=state.mixture,
        converged=False,
        n_iter=state.steps,
        lower_bound=trace[-1],
        lower_bounds=trace,
        effective_components=effective_components(state.components, settings.covariance),
        stopped=True,
    )


def batches(chunks: Any, rows: int, first: int) -> Iterator[Chunk]:
    """The rows of a stream in batches of `rows`, the first of `first`, while a thread reads ahead."""
    with closing(read_ahead(one_pass(chunks))) as ahead:
        yield from rejoined(ahead, rows, first)
