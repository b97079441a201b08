"""`GaussianMixture`: scikit-learn's estimator over `emalgam.em`; the one module that imports scikit-learn."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from time import perf_counter
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from emalgam import arrays, backends
from emalgam.covariance import COVARIANCES
from emalgam.em import Fit, Iteration, Settings, Start, fit_observations, not_converged
from emalgam.mixture import LogLikelihood, Mixture, check_numbers
from emalgam.observations import moderate
from emalgam.parts import Parts, observe
from emalgam.stepwise import Memory, Running, check_precision_of_steps
from emalgam.stream import as_stream, for_many_passes
from emalgam.validation import check_choice, check_data, check_finite, check_integer, check_threads, check_weight

PARAMETERS = ("weights_", "means_", "precisions_cholesky_")
FEATURES = ("n_features_in_", "feature_names_in_")


class GaussianMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """Gaussian mixture fitted by EM, in place of `sklearn.mixture.GaussianMixture`.

    Parameters
    ----------
    n_components : int, default=1
    covariance_type : {"full", "tied", "diag", "spherical"}, default="full"
    tol : float, default=1e-3
        EM stops when the mean log-likelihood changes by less, in nats.
    reg_covar : float or "auto", default="auto"
        Added to the diagonal of the covariances. "auto" adds 1e-6 of each feature's variance; scikit-learn's default
        is the absolute 1e-6.
    max_iter : int, default=100
    n_init : int, default=1
    init_params : {"kmeans", "k-means++", "random", "random_from_data"}, default="kmeans"
    weights_init : (K,) array, default=None
    means_init : (K, D) array, default=None
    precisions_init : array in the shape of the covariance type, default=None
    random_state : int, RandomState, Generator or None, default=None
    warm_start : bool, default=False
        Begin from the last fit's parameters, or from what has been set in their place.
    verbose : int, default=0
        1 prints each restart, every `verbose_interval`-th iteration and how the restart ended, 2 changes, times and
        the lower bound too.
    verbose_interval : int, default=10
    backend : str, default="auto"
        See `emalgam.backends`.
    algorithm : {"auto", "packed", "direct"}, default="auto"
        See `emalgam.guard.choose_evaluation`.
    on_degenerate : {"regularize", "reseed", "error"}, default="regularize"
        What happens to a component that collapses.
    n_threads : int or None, default=None
        None means all processors; results do not depend on it.
    precision : {"strict", "mixed", "tf32"}, default="strict"
        "mixed" computes in float32 first and in float64 last, which makes long fits of float64 data faster; "tf32" lets
        the matrix products of a GPU round float32 operands to ten bits. See `emalgam.fit`, and `error_bound_`.

    Attributes
    ----------
    weights_ : (K,) array
    means_ : (K, D) array
    covariances_, precisions_, precisions_cholesky_ : array
        (K, D, D), (D, D), (K, D) or (K,); float32 if the data were, else float64, as are all array attributes.
    converged_ : bool
    n_iter_ : int
    lower_bound_ : float
        Mean log-likelihood of the last iteration, in nats.
    lower_bounds_ : list of float
        Of every iteration of the best restart.
    effective_components_ : int
        Components that have weight and differ from all others.
    backend_, algorithm_, arithmetic_ : str
        What ran.
    error_bound_ : float
        Bound on the absolute error of a log-density near the components, in nats.
    mixture_ : Mixture
        The parameters in float64, as the rest of emalgam takes them.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Examples
    --------
    >>> import numpy as np
    >>> from emalgam import GaussianMixture
    >>> x = np.array([[1.0, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
    >>> model = GaussianMixture(2, random_state=0, reg_covar=1e-6).fit(x)
    >>> sorted(model.means_[:, 0].round().tolist())
    [1.0, 10.0]
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float | str = "auto",
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        backend: str = "auto",
        algorithm: str = "auto",
        on_degenerate: str = "regularize",
        n_threads: int | None = None,
        precision: str = "strict",
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.backend = backend
        self.algorithm = algorithm
        self.on_degenerate = on_degenerate
        self.n_threads = n_threads
        self.precision = precision

    @classmethod
    def from_parameters(cls, weights: Any, means: Any, covariances: Any, **constructor_arguments: Any) -> Self:
        """A mixture that was never fitted: predicts, scores and samples as if it had been.

        Parameters
        ----------
        weights : (K,) array
        means : (K, D) array
        covariances : array
            In the shape of ``covariance_type``, a constructor argument ("full" unless given).

        Raises
        ------
        ValueError
            Naming the parameter that is not valid.

        Examples
        --------
        >>> round(GaussianMixture.from_parameters([1.0], [[0.0]], [[[1.0]]]).score([[0.0]]), 6)
        -0.918939
        """
        mixture = Mixture(weights, means, covariances, constructor_arguments.get("covariance_type", "full"))
        constructor_arguments.setdefault("n_components", mixture.n_components)
        if constructor_arguments["n_components"] != mixture.n_components:
            raise ValueError(
                f"n_components is {constructor_arguments['n_components']}; the parameters have {mixture.n_components}"
            )
        return cls(**constructor_arguments)._adopt(mixture, np.dtype(np.float64))

    # ---- fitting

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit by EM.

        Parameters
        ----------
        X : (N, D) array, data frame or tensor; dask array or data frame, stream or path
            Any real dtype; floating-point and integer arrays are read where they lie.
        y : ignored
        sample_weight : (N,) array, optional

        Raises
        ------
        ValueError
            For bad data or parameters; `emalgam.DegenerateComponentError` and `emalgam.NumericalError` are among them.
        BackendUnavailable
            If `backend` cannot run here.
        """
        settings = self._settings()
        with arrays.callers_stream(X), self._features_of_a_success():
            X, sample_weight = for_many_passes(X, sample_weight, self.backend)
            rows = self._read(X, reset=True)
            data = observe(rows, sample_weight, settings.covariance, self.backend, self.n_threads)
            result = fit_observations(data, settings, self._start((settings.n_components, data.n_features)))
            if result.short_of_convergence:
                warnings.warn(not_converged(result, settings), ConvergenceWarning, stacklevel=2)
            self._adopt(result.mixture, data.dtype, result)
            self._seen = Memory.of(data.total_weight, data.moderation)
            return self

    def _start(self, shape: tuple[int, int]) -> Start | None:
        """Where a warm start begins; ValueError if the last fit was of another shape (K, D) or type."""
        if not (self.warm_start and all(hasattr(self, name) for name in PARAMETERS)):
            return None
        mixture = self._mixture()
        if mixture.means.shape != shape or mixture.covariance_type != self.covariance_type:
            raise ValueError(
                f"warm_start: the last fit has means of shape {mixture.means.shape} and type "
                f"{mixture.covariance_type!r}; this one wants {shape} and {self.covariance_type!r}; set "
                "warm_start=False or clone the estimator"
            )
        return Start(mixture, self.lower_bound_)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """One step of stepwise EM, for streams that pass once; see `emalgam.fit_stepwise`, which does them all.

        The first call fits its batch; later ones, and those after `fit`, move running statistics and the parameters
        with them. A batch counts by its weight beside that of all data before it, those of `fit` among them
        (`emalgam.stepwise.Memory`): one whose weights are all zero changes nothing. Parameters that were never fitted
        count as much as the first batch; those set in place of fitted ones, as much as these. `lower_bound_` is the
        batch's mean log p before the step, in nats, and `n_iter_` counts the steps after the first call, which compute
        in float64.

        `reg_covar`, `on_degenerate`, `algorithm`, `backend` and `n_threads` may change between calls.

        Parameters
        ----------
        X : (n, D) array
            A batch; the first with at least some hundred rows for each component.
        y : ignored
        sample_weight : (n,) array, optional

        Raises
        ------
        ValueError
            For bad data or parameters, `precision` "tf32", or a number of features, a `n_components` or a
            `covariance_type` that differs from that of earlier batches; `emalgam.DegenerateComponentError` and
            `emalgam.NumericalError` are among them. The mixture is then as it was.
        BackendUnavailable
            If `backend` cannot run here.
        """
        settings = self._settings()
        check_precision_of_steps(settings)
        # Also of parameters that somebody has set; then the running statistics are of other ones, and are dropped.
        mixture = self._mixture() if all(hasattr(self, name) for name in PARAMETERS) else None
        for name in () if mixture is None else ("n_components", "covariance_type"):
            if (before := getattr(mixture, name)) != getattr(settings, name):
                raise ValueError(f"{name} is {getattr(settings, name)!r}; the batches before had {before!r}")
        if isinstance(X, str | os.PathLike | Parts):
            raise ValueError(
                f"X is a {type(X).__name__}, and partial_fit takes one batch in memory; emalgam.fit_stepwise takes "
                "paths and streams whole"
            )
        if arrays.on_gpu(X):
            raise ValueError("X is on a GPU, and partial_fit takes batches from the host; move it first: X.cpu()")
        with self._features_of_a_success():
            data = arrays.to_numpy(self._read(X, reset=mixture is None), "X")
            check_finite(check_data(data))
            weight, threads = (
                check_weight(sample_weight, len(data), some=mixture is None),
                check_threads(self.n_threads),
            )
            if weight is not None and not weight.any():  # which says nothing
                return self
            running, result = self._step(mixture, data, weight, settings, threads)
        self._adopt(result.mixture, arrays.tile_dtype(data) if mixture is None else self.means_.dtype, result)
        self._running, self._seen = running, running.memory
        return self

    def _step(
        self, mixture: Mixture | None, x: np.ndarray, weight: np.ndarray | None, settings: Settings, n_threads: int
    ) -> tuple[Running, Fit]:
        """One more batch: the state after it, which goes on from `mixture` if there was none, and what it says."""
        if mixture is None:
            return Running.begin(x, weight, settings, self.backend, n_threads)
        backend, running = backends.resolve(self.backend), getattr(self, "_running", None)
        if running is None:
            moderated, factor = moderate(weight)
            batch = Memory.of(float(len(x) if weight is None else moderated.sum()), factor)
            running = Running.of(mixture, getattr(self, "_seen", batch))
        running, bound = running.step(x, weight, settings, backend, n_threads)
        return running, running.result([bound], backend)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit, and the component of each row: the same as ``fit(X).predict(X)``."""
        return self.fit(X, sample_weight=sample_weight).predict(X)

    def _settings(self) -> Settings:
        """Those of the constructor's arguments that `emalgam.fit` has, under the same names."""
        verbose = int(self.verbose) if isinstance(self.verbose, bool) else self.verbose
        interval = check_integer("verbose_interval", self.verbose_interval, 1)
        named = {field.name: getattr(self, field.name) for field in fields(Settings) if hasattr(self, field.name)}
        callback = _printer(check_integer("verbose", verbose, 0), interval, self.max_iter)
        return Settings(**named, callback=callback)

    def _adopt(self, mixture: Mixture, dtype: np.dtype, result: Fit | None = None) -> Self:
        """Take over a mixture, and what a fit says of it."""
        self.__dict__.pop("_running", None)  # the state of partial_fit, which belongs to another mixture
        self.mixture_ = mixture
        with np.errstate(over="ignore"):
            self.weights_ = mixture.weights.astype(dtype)
            self.means_ = mixture.means.astype(dtype)
            self.covariances_ = mixture.covariances.astype(dtype)
            self.precisions_ = mixture.precisions.astype(dtype)
            self.precisions_cholesky_ = mixture.precisions_cholesky.astype(dtype)
        self.n_features_in_ = mixture.n_features
        self.converged_ = result.converged if result else False
        self.n_iter_ = result.n_iter if result else 0
        self.lower_bound_ = result.lower_bound if result else -np.inf
        self.lower_bounds_ = result.lower_bounds if result else []
        if result:
            self.effective_components_ = result.effective_components
            self.backend_, self.algorithm_, self.arithmetic_ = result.backend, result.algorithm, result.arithmetic
            self.error_bound_, self.float32_iterations_ = result.error_bound, result.float32_iterations
        return self

    @contextmanager
    def _features_of_a_success(self) -> Iterator[None]:
        """What scikit-learn has noted of the features is as before if the block raises: the last fit's model stands."""
        before = {name: getattr(self, name) for name in FEATURES if hasattr(self, name)}
        try:
            yield
        except BaseException:
            for name in FEATURES:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)
            raise

    def _read(self, X: Any, *, reset: bool) -> Any:
        """X by scikit-learn's conventions (data frames, names and number of features), neither copied nor converted."""
        X = as_stream(X) or X
        if isinstance(X, Parts):
            return self._checked(X, np.empty((0, X.n_features)) if X.outline is None else X.outline, reset)
        if arrays.on_dask(X):
            from emalgam.dask_parts import rows_and_weights

            return self._checked(X, rows_and_weights(X, None)[2], reset)
        if arrays.on_gpu(X):
            return X
        if isinstance(X, np.ma.MaskedArray) or type(X).__module__.startswith("torch"):
            X = arrays.to_numpy(X, "X")
        return validate_data(self, X, reset=reset, dtype="numeric", order=None, ensure_all_finite=False)

    def _checked(self, X: Any, outline: Any, reset: bool) -> Any:
        """X, whose features have the names and number of those of `outline`, (0, D)."""
        validate_data(self, outline, reset=reset, skip_check_array=True)
        return X

    # ---- a fitted mixture

    def score_samples(self, X: Any) -> Any:
        """log p(x_n), (N,), in nats."""
        return self._evaluate("log_prob", X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean of log p(x_n) over the rows of X, weighted by `sample_weight` or a stream's weights, in nats."""
        rows, weight = for_many_passes(X, sample_weight, self.backend)
        how = {"backend": self.backend, "algorithm": self.algorithm, "n_threads": self.n_threads}
        return LogLikelihood.of(self._mixture(), self._read(rows, reset=False), weight, **how).mean

    def predict(self, X: Any) -> Any:
        """The component with the largest responsibility for each row, (N,) int64."""
        return self._evaluate("predict", X)

    def predict_proba(self, X: Any) -> Any:
        """Responsibilities r_nk, (N, K); each row sums to one."""
        return self._evaluate("responsibilities", X)

    def _evaluate(self, method: str, X: Any) -> Any:
        mixture = self._mixture()
        result = getattr(mixture, method)(
            self._read(X, reset=False), backend=self.backend, algorithm=self.algorithm, n_threads=self.n_threads
        )
        return result if isinstance(result, float) else arrays.like(result, X)

    def _mixture(self) -> Mixture:
        """`mixture_`, or what the attributes say if somebody has changed them, as scikit-learn allows."""
        check_is_fitted(self, PARAMETERS)
        last: Mixture | None = getattr(self, "mixture_", None)
        if last is None or not all(self._holds(name, getattr(last, name[:-1])) for name in PARAMETERS):
            self._adopt(self._from_attributes(last), arrays.tile_dtype(np.asarray(self.means_)))
        return self.mixture_

    def _holds(self, name: str, values: np.ndarray) -> bool:
        """Whether an attribute is what a fit has made of these values."""
        found = getattr(self, name)
        if not isinstance(found, np.ndarray) or found.dtype != arrays.tile_dtype(found):
            return False
        with np.errstate(over="ignore"):
            return np.array_equal(found, values.astype(found.dtype))

    def _from_attributes(self, last: Mixture | None) -> Mixture:
        """The mixture of attributes that were set; ValueError naming the one that cannot be.

        Their type is that of the last fit, which `covariance_type` may have left for the next one, unless the
        precisions have the shape of the latter only.
        """
        weights, means, factors = (check_numbers(name, getattr(self, name)) for name in PARAMETERS)
        if means.ndim != 2:
            raise ValueError(f"means_ has shape {means.shape}; expected (components, features)")
        check_choice("covariance_type", self.covariance_type, tuple(COVARIANCES))
        kinds = (self.covariance_type,) if last is None else (last.covariance_type, self.covariance_type)
        shapes = {kind: COVARIANCES[kind].shape(*means.shape) for kind in kinds}
        kind = next((kind for kind in kinds if shapes[kind] == factors.shape), kinds[0])
        covariances = COVARIANCES[kind].covariances(check_numbers(PARAMETERS[2], factors, shapes[kind]))
        return Mixture(weights, means, covariances, kind)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """n_samples points of the mixture in random order, and their components; see `Mixture.sample`."""
        return self._mixture().sample(n_samples, self.random_state, backend=self.backend, n_threads=self.n_threads)

    def bic(self, X: Any) -> float:
        """Schwarz's criterion −2 Σ log p + parameters · log N: the lower the better."""
        return self._evaluate("bic", X)

    def aic(self, X: Any) -> float:
        """Akaike's criterion −2 Σ log p + 2 · parameters: the lower the better."""
        return self._evaluate("aic", X)

    def marginal(self, features: Sequence[int]) -> GaussianMixture:
        """The mixture of some of the features; see `Mixture.marginal`."""
        return self._derived(self._mixture().marginal(features), np.asarray(features))

    def conditional(self, features: Sequence[int], values: Any) -> GaussianMixture:
        """The mixture of the other features given that `features` have `values`; see `Mixture.conditional`."""
        rest = np.setdiff1d(np.arange(self.n_features_in_), features)
        return self._derived(self._mixture().conditional(features, values), rest)

    def _derived(self, mixture: Mixture, features: np.ndarray) -> GaussianMixture:
        """A `GaussianMixture` over some of the features, with their names, whatever arguments a subclass has."""
        arguments = {name: getattr(self, name) for name in GaussianMixture().get_params()}
        arguments |= dict.fromkeys(("weights_init", "means_init", "precisions_init"))
        arguments |= {"n_components": mixture.n_components, "covariance_type": mixture.covariance_type}
        derived = GaussianMixture(**arguments)._adopt(mixture, self.means_.dtype)
        if hasattr(self, "feature_names_in_"):
            derived.feature_names_in_ = self.feature_names_in_[features]
        return derived


def _printer(verbose: int, interval: int, max_iter: int) -> Callable[[Iteration], None] | None:
    """scikit-learn's verbose output, as a callback."""
    if not verbose:
        return None
    began = last = perf_counter()

    def show(event: Iteration) -> None:
        nonlocal began, last
        now = perf_counter()
        if event.iteration == 1:
            print(f"Initialization {event.restart}", file=sys.stdout)
        if event.iteration % interval == 0:
            details = f"\t time lapse {now - last:.5f}s\t ll change {event.change:.5f}" if verbose > 1 else ""
            print(f"  Iteration {event.iteration}{details}", file=sys.stdout)
            last = now
        if event.converged or event.iteration == max_iter:
            ending = "converged" if event.converged else "did not converge"
            details = f" time lapse {now - began:.5f}s\t lower bound {event.lower_bound:.5f}." if verbose > 1 else ""
            print(f"Initialization {ending}.{details}", file=sys.stdout)
            began = last = now

    return show
