"""Expectation maximization as a function: arrays in, a frozen `Mixture` and the trace of its likelihood out.

Each iteration is one pass over the data: `em_statistics` gives the statistics S of the E-step and the log-likelihood
together, and the M-step is algebra on S. What is done when a component collapses is the policy `on_degenerate`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emalgam import arrays
from emalgam.blas import one_blas_thread
from emalgam.checkpoint import FACTS, Best, Checkpoint, State
from emalgam.covariance import COVARIANCES, Covariance
from emalgam.guard import ALGORITHMS, PRECISIONS, Cancellation, Evaluation, Schedule, parameters_of
from emalgam.initialization import INITIALIZATIONS, Given
from emalgam.m_step import POLICIES, MStep, NumericalError, effective_components
from emalgam.mixture import Mixture, check_numbers, check_symmetric, check_weights
from emalgam.namespace import beside, is_tensor, namespace, to_host
from emalgam.packing import Components, Frame, Moments
from emalgam.parts import Data, observe
from emalgam.stream import for_many_passes
from emalgam.validation import check_choice, check_integer, check_number, generator


class ConvergenceWarning(UserWarning):
    """EM stopped at `max_iter` before the change of the lower bound fell below `tol`."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """What a callback sees after each iteration: the mean log-likelihood in nats, its change, whether that ends EM."""

    restart: int
    iteration: int
    lower_bound: float
    change: float
    converged: bool = False


@dataclass(frozen=True, eq=False)
class Fit:
    """The result of `fit`.

    Attributes
    ----------
    mixture : Mixture
    converged : bool
    n_iter : int
    lower_bound : float
        Mean log-likelihood of the last pass, nats per unit of weight.
    lower_bounds : list of float
        Of every iteration of the best restart.
    effective_components : int
        Components that have weight and differ from all others.
    backend, algorithm, arithmetic : str
        What ran last.
    error_bound : float
        Bound on the absolute error of a log-density near the components, in nats.
    stopped : bool
        Whether the callback ended it.
    float32_iterations : int
        Those of `n_iter` that computed in float32.
    """

    mixture: Mixture
    converged: bool
    n_iter: int
    lower_bound: float
    lower_bounds: list[float]
    effective_components: int
    backend: str
    algorithm: str
    arithmetic: str
    error_bound: float
    stopped: bool = False
    float32_iterations: int = 0

    @property
    def short_of_convergence(self) -> bool:
        """Whether `max_iter` ended the fit, which deserves a warning."""
        return self.n_iter > 0 and not (self.converged or self.stopped)


@dataclass(frozen=True, eq=False)
class Settings:
    """What to fit and how; checked, but for the initial parameters, which wait for the data. See `fit`."""

    n_components: int = 1
    covariance_type: str = "full"
    tol: float = 1e-3
    reg_covar: float | str = "auto"
    max_iter: int = 100
    n_init: int = 1
    init_params: str = "kmeans"
    weights_init: Any = None
    means_init: Any = None
    precisions_init: Any = None
    random_state: Any = None
    on_degenerate: str = "regularize"
    algorithm: str = "auto"
    callback: Callable[[Iteration], Any] | None = None
    precision: str = "strict"
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        check_choice("covariance_type", self.covariance_type, tuple(COVARIANCES))
        check_integer("n_components", self.n_components, 1)
        check_number("tol", self.tol)
        check_integer("max_iter", self.max_iter, 0)
        check_integer("n_init", self.n_init, 1)
        check_choice("init_params", self.init_params, tuple(INITIALIZATIONS))
        check_choice("on_degenerate", self.on_degenerate, POLICIES)
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.precision == "mixed" and self.algorithm == "direct":
            raise ValueError(
                "precision is 'mixed' and algorithm 'direct', which computes in float64 only; expected algorithm "
                "'auto' or 'packed', or precision 'strict'"
            )
        if self.reg_covar != "auto":
            check_number("reg_covar (unless it is 'auto')", self.reg_covar)
        if self.callback is not None and not callable(self.callback):
            raise ValueError(f"callback is {self.callback!r}; expected a function of one Iteration")
        if self.checkpoint is not None and not isinstance(self.checkpoint, Checkpoint):
            raise ValueError(f"checkpoint is {self.checkpoint!r}; expected emalgam.checkpoint.Checkpoint(path)")

    @property
    def covariance(self) -> Covariance:
        """The algebra of the covariance type."""
        return COVARIANCES[self.covariance_type]

    def given(self, frame: Frame) -> Given:
        """The initial parameters, checked and brought into the frame; ValueError naming the argument."""
        initial = self.weights_init, self.means_init, self.precisions_init
        return given_parameters(self.covariance, self.n_components, frame, *initial)


def fit(
    x: Any,
    n_components: int,
    *,
    covariance_type: str = "full",
    sample_weight: Any = None,
    tol: float = 1e-3,
    reg_covar: float | str = "auto",
    max_iter: int = 100,
    n_init: int = 1,
    init_params: str = "kmeans",
    weights_init: Any = None,
    means_init: Any = None,
    precisions_init: Any = None,
    random_state: Any = None,
    on_degenerate: str = "regularize",
    backend: str = "auto",
    algorithm: str = "auto",
    n_threads: int | None = None,
    callback: Callable[[Iteration], Any] | None = None,
    precision: str = "strict",
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Fit a Gaussian mixture by expectation maximization.

    Parameters
    ----------
    x : (N, D) array of real numbers, `emalgam.Stream`, or the path of what can be one; dask array or data frame
        Any dtype and strides; read where it lies, on the CPU or on a GPU. Memory maps are read as streams: a start then
        looks at about 2²⁰ numbers of the data. Of Dask's collections too; see `emalgam.distributed`.
    n_components : int
        K.
    covariance_type : {"full", "tied", "diag", "spherical"}
    sample_weight : (N,) array, optional
        ω_n ≥ 0: weight 2 counts a row twice, weight 0 leaves it out.
    tol : float
        Stop when the mean log-likelihood changes by less, in nats.
    reg_covar : float or "auto"
        Added to the diagonal of every covariance; "auto" adds 1e-6 of each feature's variance.
    max_iter, n_init : int
        Iterations of a restart at most; restarts, of which the best is kept.
    init_params : {"kmeans", "k-means++", "random", "random_from_data"}
    weights_init : (K,) array, optional
    means_init : (K, D) array, optional
    precisions_init : array in the shape of the covariance type, optional
        Parameters to begin with; what is not given comes from `init_params`.
    random_state : None, int or NumPy generator
    on_degenerate : {"regularize", "reseed", "error"}
        A collapsed component is kept positive definite, started again at a random row, or an error that names it.
    backend : str
        See `emalgam.backends`.
    algorithm : {"auto", "packed", "direct"}
        See `emalgam.guard.choose_evaluation`.
    n_threads : int, optional
        None means all processors (of a task of Dask: one thread); the result does not depend on it.
    callback : function of one `Iteration`, optional
        Called after every iteration; the fit ends, without further restarts, when it returns something true.
    precision : {"strict", "mixed", "tf32"}
        "strict" computes in the data's own precision, or higher where that would cancel; "mixed" in float32 first and
        in float64 last, of float32 data too, see `emalgam.guard.Schedule`: a long fit of float64 data is faster.
        "tf32" lets the matrix products of a GPU round float32 operands to ten bits; `Fit.error_bound` says what that
        costs.
    checkpoint : emalgam.checkpoint.Checkpoint, optional
        Where the state is written between iterations, and read to go on after an interruption: on the same machine and
        backend to the same bits. Of data on the host, and with an integer `random_state`.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        For bad data or arguments; `DegenerateComponentError` and `NumericalError` are among them.
    BackendUnavailable
        If the backend cannot run here.

    References
    ----------
    Dempster, Laird, Rubin (1977), "Maximum likelihood from incomplete data via the EM algorithm"; Bishop (2006),
    section 9.2.

    Examples
    --------
    >>> import numpy as np
    >>> import emalgam
    >>> rng = np.random.default_rng(0)
    >>> x = np.concatenate([rng.normal(-5, 1, (500, 2)), rng.normal(5, 1, (500, 2))])
    >>> result = emalgam.fit(x, 2, random_state=0)
    >>> result.converged, sorted(result.mixture.means[:, 0].round().tolist())
    (True, [-5.0, 5.0])
    """
    settings = Settings(
        n_components, covariance_type, tol, reg_covar, max_iter, n_init, init_params, weights_init, means_init,
        precisions_init, random_state, on_degenerate, algorithm, callback, precision, checkpoint,
    )  # fmt: skip
    with arrays.callers_stream(x):
        data = observe(*for_many_passes(x, sample_weight, backend), settings.covariance, backend, n_threads)
        result = fit_observations(data, settings)
    if result.short_of_convergence:
        warnings.warn(not_converged(result, settings), ConvergenceWarning, stacklevel=2)
    return result


def not_converged(result: Fit, settings: Settings) -> str:
    """The text of the warning."""
    return (
        f"EM did not converge in {result.n_iter} iterations (tol={settings.tol:g}); increase max_iter or tol, or try "
        "another initialization"
    )


def given_parameters(covariance: Covariance, K: int, frame: Frame, weights: Any, means: Any, precisions: Any) -> Given:
    """The user's initial parameters, checked and brought into the frame; ValueError naming the argument."""
    D = len(frame.shift)
    checked: dict[str, np.ndarray] = {}
    if weights is not None:
        checked["weights"] = check_weights(check_numbers("weights_init", weights, (K,)))
    if means is not None:
        checked["means"] = frame.apply(check_numbers("means_init", means, (K, D)))
    if precisions is not None:
        values = check_numbers("precisions_init", precisions, covariance.shape(K, D))
        check_symmetric("precisions_init", covariance, values)
        try:
            factor = covariance.factor_precisions(values)
        except np.linalg.LinAlgError:
            raise ValueError("precisions_init is not positive definite; expected inverse covariances") from None
        checked["precisions_cholesky"] = covariance.rescale_factor(factor, frame.scale)
    return Given(**checked)


@dataclass(frozen=True)
class Start:
    """A mixture to begin with (warm start) and the lower bound that it had."""

    mixture: Mixture
    lower_bound: float


def fit_observations(data: Data, settings: Settings, start: Start | None = None) -> Fit:
    """`fit` on checked data: the best of the restarts. A restart that meets NaN loses; ValueError if all do."""
    given, rng = settings.given(data.frame), generator(settings.random_state)
    covariance, K = settings.covariance, settings.n_components
    if data.rows_with_weight() < K:
        raise ValueError(
            f"there are {data.rows_with_weight()} samples (with positive weight) for n_components={K}; "
            "expected at least as many samples as components"
        )
    check_precision(settings.precision, data)
    run = _RestartOnGpu if is_tensor(data.sample.x) else _Restart
    state = _resumed(data, covariance, K, settings, rng, given)
    best = None if state is None or state.best is None else _fit_of(state.best, data, covariance)
    failures: list[str] = []
    # On a GPU no thread of ours competes with BLAS.
    with nullcontext() if is_tensor(data.sample.x) else one_blas_thread():
        for restart in range(0 if state is None else state.restart, 1 if start is not None else settings.n_init):
            try:
                result = run(data, covariance, K, settings, rng, restart, best).run(given, start, state)
            except NumericalError as error:
                failures.append(f"restart {restart}: {error}")
                continue
            finally:
                state = None
            if best is None or result.lower_bound > best.lower_bound:
                best = result
            if result.stopped:
                break
    if best is None:
        raise NumericalError("no restart gave a finite likelihood; " + "; ".join(failures))
    return best


def _resumed(
    data: Data, covariance: Covariance, K: int, settings: Settings, rng: np.random.Generator, given: Given
) -> State | None:
    """What a checkpoint holds; None without one, or before the first."""
    if settings.checkpoint is None:
        return None
    if is_tensor(data.sample.x):
        raise ValueError("checkpoint was given for data on a GPU; give them from the host, or leave it out")
    identity = {
        "n_features": data.n_features,
        "n_samples_with_weight": data.rows_with_weight(),
        "total_weight": data.total_weight,
        "shift": data.frame.shift.tolist(),
        "scale": data.frame.scale.tolist(),
        "n_components": K,
        "covariance_type": covariance.name,
        "tol": settings.tol,
        "reg_covar": settings.reg_covar,
        "n_init": settings.n_init,
        "init_params": settings.init_params,
        "on_degenerate": settings.on_degenerate,
        "algorithm": settings.algorithm,
        "precision": settings.precision,
        "random_state": rng.bit_generator.state,
        "weights_init": _digest(given.weights),
        "means_init": _digest(given.means),
        "precisions_init": _digest(given.precisions_cholesky),
    }
    state = settings.checkpoint.begin(identity, covariance.name)
    if state is not None:
        rng.bit_generator.state = state.rng
    return state


def _digest(values: np.ndarray | None) -> str | None:
    """What tells an array from others, in a few letters."""
    return None if values is None else hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _fit_of(best: Best, data: Data, covariance: Covariance) -> Fit:
    """The fit that a checkpoint remembers."""
    return Fit(
        mixture=Mixture.from_components(best.components, Frame.identity(data.n_features), covariance),
        converged=best.converged,
        n_iter=len(best.lower_bounds),
        lower_bound=best.lower_bounds[-1],
        lower_bounds=best.lower_bounds,
        effective_components=best.effective_components,
        backend=data.backend,
        algorithm=best.algorithm,
        arithmetic=best.arithmetic,
        error_bound=best.error_bound,
        float32_iterations=best.float32_iterations,
    )


def check_precision(precision: str, data: Data) -> None:
    """ValueError if TF32 is asked for where there is none."""
    if precision == "tf32" and (data.backend != "numba_cuda" or data.dtype != np.float32):
        raise ValueError(
            f"precision is 'tf32', which is for float32 data on backend numba_cuda; these are {data.dtype} on "
            f"{data.backend}; leave it at 'strict'"
        )


class _Restart:
    """One run of EM from one start."""

    def __init__(
        self,
        data: Data,
        covariance: Covariance,
        K: int,
        settings: Settings,
        rng: np.random.Generator,
        number: int,
        best: Fit | None = None,
    ) -> None:
        self.data, self.covariance, self.K, self.settings, self.rng = data, covariance, K, settings, rng
        self.number, self.best = number, best
        self.m_step = MStep(data, covariance, K, settings.reg_covar, settings.on_degenerate, rng)
        self.frame = data.frame
        self.schedule = Schedule(settings.algorithm, settings.precision, settings.tol, data.dtype, data.largest)

    def run(self, given: Given, start: Start | None, state: State | None = None) -> Fit:
        lower_bound = start.lower_bound if start is not None else -np.inf
        trace: list[float] = []
        if state is not None:
            components, trace, self.m_step.reseeds_left = state.components, state.lower_bounds, state.reseeds_left
            self.schedule = replace(self.schedule, **state.schedule)
            lower_bound = trace[-1] if trace else lower_bound
        else:
            components = start.mixture.components(self.data.frame) if start is not None else self.first(given)
        converged = stopped = False
        cancellation = Cancellation.of(self.covariance, components)
        first = len(trace) + 1
        # One more where a checkpoint ends with a pass in float32.
        last = max(self.settings.max_iter, first) if self.schedule.noise else self.settings.max_iter
        how = self.schedule.before(cancellation, last=first > last)
        components = components.beside(self.frame.shift)
        for iteration in range(first, last + 1):
            how = self.schedule.before(cancellation, last=iteration == last)
            parameters = parameters_of(self.covariance, components, self.frame, how)
            statistics, bound = self.data.statistics(parameters)
            moments = self.covariance.moments(statistics, components, how.algorithm)
            components, bound, cancellation = self.maximize(moments, components, bound, how, iteration)
            change, lower_bound = bound - lower_bound, bound
            trace.append(bound)
            converged = self.schedule.after(how, change, self.m_step.reseeded)
            stopped = self.report(Iteration(self.number, iteration, bound, change, converged))
            if converged or stopped:
                break
            self.record(components, trace)
        components = components.on_host()
        return Fit(
            mixture=Mixture.from_components(components, self.data.frame, self.covariance),
            converged=converged,
            n_iter=len(trace),
            lower_bound=lower_bound,
            lower_bounds=trace,
            effective_components=effective_components(components, self.covariance),
            backend=self.data.backend,
            algorithm=how.algorithm,
            arithmetic=how.arithmetic,
            error_bound=how.error_bound,
            stopped=stopped,
            float32_iterations=self.schedule.float32_iterations,
        )

    def maximize(
        self, moments: Moments, old: Components, bound: float, how: Evaluation, iteration: int
    ) -> tuple[Components, float, Cancellation]:
        """The M-step, the lower bound as a number, and what the guard has to know of the components that came out."""
        if not np.isfinite(bound):
            raise NumericalError(f"the log-likelihood became {bound} in iteration {iteration}")
        last = iteration >= self.settings.max_iter
        components = self.m_step.update(moments, old, how.algorithm, iteration, reseed=not last)
        return components, bound, Cancellation.of(self.covariance, components)

    def report(self, iteration: Iteration) -> bool:
        callback = self.settings.callback
        return callback is not None and bool(callback(iteration))

    def record(self, components: Components, trace: list[float]) -> None:
        """Let the checkpoint have the state, if there is one."""
        if self.settings.checkpoint is not None:
            rng: Any = self.rng.bit_generator.state
            memory = self.m_step.reseeds_left, self.schedule.memory(), rng
            state = State(self.number, len(trace), components, trace, *memory, self._so_far())
            self.settings.checkpoint.record(state)

    def _so_far(self) -> Best | None:
        """The best of the restarts before this one."""
        if self.best is None:
            return None
        best, mixture = self.best, self.best.mixture
        parts = (mixture.weights, mixture.means, mixture.covariances, mixture.precisions_cholesky)
        return Best(Components(*parts), best.lower_bounds, **{name: getattr(best, name) for name in FACTS})

    def first(self, given: Given) -> Components:
        """The components to begin with: given, or the M-step of the initialization's responsibilities."""
        D = self.data.n_features
        components = self.m_step.broadest(np.zeros((self.K, D)))
        if not given.complete:
            initialize = INITIALIZATIONS[self.settings.init_params]
            statistics = initialize(self.data.sample, self.covariance, self.K, self.rng)
            moments = Moments.of(statistics, np.zeros((self.K, D)))
            components = self.m_step.update(
                moments, replace(components, means=moments.means()), "packed", 0, reseed=True
            )
        changes = {
            name: value
            for name in ("weights", "means", "precisions_cholesky")
            if (value := getattr(given, name)) is not None
        }
        if given.precisions_cholesky is not None:
            changes["covariances"] = self.covariance.covariances(given.precisions_cholesky)
        return replace(components, **changes)


class _RestartOnGpu(_Restart):
    """The same where the data lie on a GPU: the M-step and the guard's sums too.

    An iteration waits for the device once, to learn four numbers: the lower bound, whether the M-step met anything out
    of the ordinary (then the host does it again, and applies the policy), and what the guard needs.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        frame = self.data.frame
        self.frame = Frame(beside(frame.shift, self.data.sample.x), beside(frame.scale, self.data.sample.x))

    def maximize(
        self, moments: Moments, old: Components, bound: Any, how: Evaluation, iteration: int
    ) -> tuple[Components, float, Cancellation]:
        components, sound = self.m_step.update_where_it_lies(moments, old, how.algorithm)
        numbers = [bound, sound, *(scalar() for scalar in Cancellation.scalars(self.covariance, components))]
        xp = namespace(bound)
        bound, sound, packed, own = to_host(xp.stack([number.to(xp.float64) for number in numbers])).tolist()
        if sound and np.isfinite(bound):
            self.m_step.reseeded = False
            return components, bound, Cancellation(packed, lambda: own)
        components, bound, cancellation = super().maximize(moments.on_host(), old.on_host(), bound, how, iteration)
        return components.beside(self.frame.shift), bound, cancellation
