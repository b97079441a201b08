"""Many fits at once: one call fits a mixture to each of B sets of samples, on all processors.

Each problem is fitted by itself, from random numbers of its own (seed, index): its result does not depend on its
neighbours, on the order or on threads, and a problem that cannot be fitted gets a status and leaves the others alone.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from emalgam import backends
from emalgam.draws import philox_seed
from emalgam.mixture import Mixture
from emalgam.problems import Source, component_counts, places_of, problem_numbers
from emalgam.stacks import MixtureStack
from emalgam.validation import check_choice, check_integer, check_number, check_threads
from emalgam_kernels.batch import (
    COVARIANCE_TYPES,
    CRITERIA,
    MESSAGES,
    Mixtures,
    Outcomes,
    Settings,
    Status,
    criterion_value,
    flop_of_a_row,
    parameter_count,
    passes_of_a_fit,
    withdraw_out_of_range,
)
from emalgam_kernels.blocks import FLOP_PER_BLOCK
from emalgam_kernels.philox import LABELS_OF_MANY, NORMALS_OF_MANY

if TYPE_CHECKING:
    from emalgam.estimator import GaussianMixture

PROBLEMS_AT_ONCE: Final = 4096  # of a call of the kernel at most
FLOP_AT_ONCE: Final = 1500 * FLOP_PER_BLOCK  # of each thread while progress is shown: about half a second
NUMBERS_AT_ONCE: Final = 2**18  # of a chunk of draws


def fit_many(
    X: Any,
    n_components: Any,
    *,
    groups: Any = None,
    offsets: Any = None,
    covariance_type: str = "full",
    sample_weight: Any = None,
    max_iter: int = 100,
    tol: float = 1e-3,
    reg_covar: float | str = "auto",
    n_init: int = 1,
    criterion: str = "bic",
    random_state: Any = None,
    numbers: Any = None,
    backend: str = "auto",
    n_threads: int | None = None,
    progress: bool | Callable[[int], object] = False,
) -> ManyFits:
    """Fit a Gaussian mixture to each of many sets of samples.

    Parameters
    ----------
    X : (B, N, D) array, list of B arrays (N_b, D), or (N, D) array with `groups` or `offsets`
        Any real dtype; float32 and float64 arrays are read where they lie. Arithmetic is float64.
    n_components : int, (B,) integers, or range
        K of all problems, of each, or ``range(1, 7)`` to try each of these and keep the one of the best `criterion`.
    groups : (N,) array, optional
        The label of each row, in any order; rows of one label are one problem. Problems are in ascending order of their
        labels (`ManyFits.groups`); times with a zone are there in UTC. Of a data frame also the name of a column, as
        the weights may be; all other columns are features then.
    offsets : (B + 1,) integers, optional
        Problem b is rows [offsets[b], offsets[b + 1]).
    covariance_type : {"full", "tied", "diag", "spherical"}
    sample_weight : optional
        ω ≥ 0 in the form of X without its last axis. A weight says how often a sample counts: BIC and ICL take log Σω
        for that of the number of samples, so weights that sum to one would always choose the most components.
    max_iter, n_init : int
        Iterations of a start at most; starts (k-means++), of which the best is kept.
    tol : float
        Stop when the mean log-likelihood changes by less, in nats.
    reg_covar : float or "auto"
        Added to the diagonal of every covariance; "auto" adds 1e-6 of each feature's variance in its problem.
    criterion : {"bic", "aic", "icl"}
    random_state : None, int or NumPy generator
        An integer gives the same result again; problem b takes its own random numbers from (random_state, b).
    numbers : (B,) integers >= 0, optional
        What takes the place of b there: with the numbers that problems have among all, a part of them gives the same as
        all at once.
    backend : str
        See `emalgam.backends`.
    n_threads : int, optional
        None means all processors; the result does not depend on it.
    progress : bool or function
        Show problems done, problems per second and the time left on standard error; or call a function from time to
        time with how many more are done.

    Returns
    -------
    ManyFits

    Raises
    ------
    ValueError
        For arguments of a wrong form. What is wrong with a single problem (NaN, too few samples, bad weights) is in its
        `status` and `message` instead.
    BackendUnavailable
        If the backend cannot run here.

    References
    ----------
    Dempster, Laird, Rubin (1977); Arthur, Vassilvitskii (2007), "k-means++: the advantages of careful seeding";
    Schwarz (1978), "Estimating the dimension of a model".

    Examples
    --------
    >>> import numpy as np
    >>> import emalgam
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(100, 60, 2)) + 9 * rng.integers(0, 2, (100, 60, 1))
    >>> fits = emalgam.fit_many(X, range(1, 4), covariance_type="spherical", random_state=0)
    >>> len(fits), fits.means.shape, int(np.median(fits.n_components))
    (100, (100, 3, 2), 2)
    >>> fits[0]
    GaussianMixture(covariance_type='spherical', n_components=2)
    """
    source, moderation = Source.of(X, groups, offsets, sample_weight).moderated()
    fewest, most, K = component_counts(n_components, len(source))
    settings = Settings(
        check_choice("covariance_type", covariance_type, COVARIANCE_TYPES),
        fewest,
        most,
        check_choice("criterion", criterion, CRITERIA),
        check_integer("n_init", n_init, 1),
        check_integer("max_iter", max_iter, 0),
        check_number("tol", tol),
        -1.0 if reg_covar == "auto" else check_number("reg_covar (unless it is 'auto')", reg_covar),
        philox_seed(random_state),
    )
    numbers = problem_numbers(numbers, len(source))
    name, threads = backends.resolve(backend), check_threads(n_threads)
    kernels = backends.kernels(name, "batch")
    mixtures = Mixtures.empty(covariance_type, len(source), K, source.n_features)
    outcomes = Outcomes.empty(len(source))
    total_weight = _divided(source.total_weight(), moderation)
    at_once = _problems_at_once(source, settings, threads) if progress and name != "numba_cuda" else PROBLEMS_AT_ONCE
    with shown(len(source), progress) as advance:
        for which, _, problems in source.slices(at_once):
            numbered = replace(problems, numbers=numbers[which])
            part = replace(settings, fewest=fewest[which], most=most[which])
            fitted, ended = _part(mixtures, which), _part(outcomes, which)
            kernels.fit_many(numbered, part, fitted, ended, threads)
            for sums in (ended.log_likelihood, ended.entropy):
                sums[:] = _divided(sums, moderation[which])
            withdraw_out_of_range(fitted, ended, total_weight[which])
            advance(which.stop - which.start)
    return ManyFits(
        **{field.name: getattr(mixtures, field.name) for field in fields(Mixtures)},
        **{field.name: getattr(outcomes, field.name) for field in fields(Outcomes)},
        n_samples=source.sizes,
        total_weight=total_weight,
        criterion=criterion,
        groups=source.groups,
        backend=name,
    )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ManyFits:
    """B mixtures, and how their fits ended; a sequence of `GaussianMixture`.

    Attributes
    ----------
    covariance_type : str
    n_components : (B,) int64
        Of each mixture; 0 where there is none.
    weights : (B, K) float64
    means : (B, K, D) float64
    covariances : float64
        (B, K, D, D), (B, D, D), (B, K, D) or (B, K). All three are NaN where there is no component.
    log_likelihood : (B,) float64
        Σ ω log p(x), in nats; NaN without a mixture.
    entropy : (B,) float64
        −Σ ω Σ_k r_k log r_k of the responsibilities, in nats.
    n_iter : (B,) int64
    converged : (B,) bool
    status : (B,) int64
        0: fine; see `emalgam_kernels.batch.Status` and `message`.
    n_samples : (B,) int64
        Rows of each problem.
    total_weight : (B,) float64
        Σ ω: the number of samples without weights.
    criterion : str
        What chose between numbers of components.
    groups : (B,) array or None
        The label of each problem.
    backend : str
        What ran.
    """

    covariance_type: str
    n_components: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    log_likelihood: np.ndarray
    entropy: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray
    status: np.ndarray
    n_samples: np.ndarray
    total_weight: np.ndarray
    criterion: str
    groups: np.ndarray | None
    backend: str

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        """How many there are, of what size, and how they ended: arrays of a million fits say less."""
        K, D = self.means.shape[1:]
        endings = Counter(Status(code).name.lower().replace("_", " ") for code in self.status.tolist())
        ended = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        return f"<ManyFits of {len(self)} mixtures, {self.covariance_type}, K <= {K}, D = {D}: {ended or 'none'}>"

    def __iter__(self) -> Iterator[GaussianMixture]:
        return (self[b] for b in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> GaussianMixture: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> ManyFits: ...
    def __getitem__(self, index: Any) -> Any:
        """Problem i as a `GaussianMixture`; of a slice, or an array of indices or truth values, those problems.

        Raises
        ------
        ValueError
            If problem i has no mixture, with the reason.
        IndexError
            If there is no problem i.
        TypeError
            If it is none of these.
        """
        if isinstance(index, slice) or (isinstance(index, np.ndarray | list) and np.ndim(index) == 1):
            parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
            parts |= {name: part[index] for name, part in parts.items() if isinstance(part, np.ndarray)}
            return ManyFits(**parts)
        from emalgam.estimator import GaussianMixture

        mixture, b = self.mixture(index), self._problem(index)
        estimator = GaussianMixture(mixture.n_components, covariance_type=self.covariance_type)
        estimator._adopt(mixture, np.dtype(np.float64))
        estimator.converged_, estimator.n_iter_ = bool(self.converged[b]), int(self.n_iter[b])
        estimator.lower_bound_ = float(self.log_likelihood[b] / self.total_weight[b])
        return estimator

    def mixture(self, index: int) -> Mixture:
        """Problem i as a `Mixture`; ValueError with the reason if it has none, IndexError if there is no problem i."""
        b = self._problem(index)
        K = int(self.n_components[b])
        if K == 0:
            raise ValueError(f"problem {b} has no mixture: {MESSAGES[Status(int(self.status[b]))]}")
        covariances = self.covariances[b] if self.covariance_type == "tied" else self.covariances[b, :K]
        return Mixture(self.weights[b, :K], self.means[b, :K], covariances, self.covariance_type)

    def _problem(self, index: int) -> int:
        if not hasattr(index, "__index__") or np.ndim(index) > 0:
            raise TypeError(
                f"the index is {index!r}; expected an integer, a slice, or indices or truth values of one dimension "
                "(of a group: fits.groups == label)"
            )
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no problem {index}; there are {len(self)}")
        return index % len(self)

    def _mixture_stacks(self, name: str) -> list[tuple[np.ndarray, MixtureStack]]:
        """The problems of each K and their mixtures, without an object for each; ValueError if one has no mixture.

        `name` is that of the argument that they are.
        """
        for b in np.flatnonzero(self.n_components == 0)[:1].tolist():
            raise ValueError(f"{name}[{b}]: problem {b} has no mixture: {MESSAGES[Status(int(self.status[b]))]}")
        stacks = []
        for K in np.unique(self.n_components).tolist():
            rows = np.flatnonzero(self.n_components == K)
            covariances = self.covariances[rows] if self.covariance_type == "tied" else self.covariances[rows, :K]
            parts = self.weights[rows, :K], self.means[rows, :K], covariances
            stacks.append((rows, MixtureStack.checked(name, rows, self.covariance_type, *parts)))
        return stacks

    @property
    def message(self) -> np.ndarray:
        """What is the matter with each problem, (B,) str; empty where nothing is."""
        return np.array([MESSAGES[Status(code)] for code in self.status.tolist()], dtype=str)

    @property
    def n_parameters(self) -> np.ndarray:
        """Free parameters of each mixture, (B,)."""
        D = self.means.shape[2]
        counts = [parameter_count(self.covariance_type, K, D) for K in range(self.weights.shape[1] + 1)]
        return np.array(counts)[self.n_components]

    @property
    def bic(self) -> np.ndarray:
        """Schwarz's criterion of each mixture on its own samples, (B,): the lower the better."""
        return self._criterion("bic")

    @property
    def aic(self) -> np.ndarray:
        """Akaike's criterion, (B,)."""
        return self._criterion("aic")

    @property
    def icl(self) -> np.ndarray:
        """BIC plus twice the entropy of the responsibilities, (B,): Biernacki, Celeux, Govaert (2000)."""
        return self._criterion("icl")

    def _criterion(self, name: str) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return criterion_value(name, self.log_likelihood, self.entropy, self.n_parameters, self.total_weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Parquet table with a row for each problem, for `emalgam.load_fits`; an existing file is replaced.

        Raises
        ------
        ValueError
            If a label is there twice, or of a type that Parquet has no column for (make it text); or if `path` is named
            after another format, such as .csv.
        OSError
            If the file cannot be written.

        See Also
        --------
        emalgam.fits_file : The columns.
        """
        from emalgam.fits_file import save_fits

        save_fits(self, path)

    # ---- all problems at once

    def score_samples(
        self, X: Any, *, groups: Any = None, offsets: Any = None, backend: str = "auto", n_threads: int | None = None
    ) -> np.ndarray:
        """log p(x) of each sample under the mixture of its problem, in nats; NaN where there is none.

        Parameters
        ----------
        X, groups, offsets
            As in `fit_many`. With `groups`, a label must be one of `ManyFits.groups`; otherwise there are B problems.

        Returns
        -------
        (B, N) or (N,) float64
            Of a list: its arrays one after the other.
        """
        return self._evaluate(X, groups, offsets, backend, n_threads)[0]

    def predict(
        self, X: Any, *, groups: Any = None, offsets: Any = None, backend: str = "auto", n_threads: int | None = None
    ) -> np.ndarray:
        """The component with the largest responsibility for each sample, int64; −1 where there is none.

        Parameters and shape as in `score_samples`.
        """
        return self._evaluate(X, groups, offsets, backend, n_threads)[1]

    def score(
        self, X: Any, *, groups: Any = None, offsets: Any = None, backend: str = "auto", n_threads: int | None = None
    ) -> np.ndarray:
        """Mean of log p(x) over the samples of each problem in X, in nats; NaN where there are none.

        (B,), or with `groups` one number for each label in X, in ascending order.
        """
        source = Source.of(X, groups, offsets)
        log_prob = self._evaluate(X, groups, offsets, backend, n_threads)[0].reshape(-1)
        if source.order is not None:
            log_prob = log_prob[source.order]
        return np.where(source.sizes > 0, source.sums(log_prob) / np.maximum(source.sizes, 1), np.nan)

    def sample(self, n_samples: int = 1, random_state: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """n samples of every mixture, in random order, and their components: (B, n, D) float64 and (B, n) int64.

        NaN and −1 where there is no mixture. An integer `random_state` gives the same samples again.
        """
        n, B, D = check_integer("n_samples", n_samples, 1), len(self), self.means.shape[2]
        kernels, seed = backends.kernels("auto", "sampling"), philox_seed(random_state)
        x, labels = np.empty((B, n, D)), np.empty((B, n), np.int64)
        numbers = D + self.weights.shape[1] + math.prod(self.covariances.shape[2:])  # of a draw, with its factor
        draws = min(max(NUMBERS_AT_ONCE // numbers, 1), n)
        step = max(NUMBERS_AT_ONCE // (numbers * n), 1)  # problems; one if its draws are cut
        for first, at in product(range(0, B, step), range(0, n, draws)):
            chosen, span = slice(first, min(first + step, B)), slice(at, min(at + draws, n))
            shape = chosen.stop - first, span.stop - at
            u, normals = np.empty(shape), np.empty((*shape, D))  # of one problem, or whole problems: rows in one piece
            kernels.uniforms(seed, LABELS_OF_MANY, first * n + at, u.reshape(-1))
            kernels.normals(seed, NORMALS_OF_MANY, first * n + at, normals.reshape(-1, D))
            labels[chosen, span] = _drawn(self.weights[chosen], u)
            x[chosen, span] = self._moved(chosen, labels[chosen, span], normals)
        return x, labels

    def _moved(self, chosen: slice, labels: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """μ_k + L_k ε for the components that were drawn."""
        b = np.arange(len(labels))[:, None]
        means = np.where(labels[..., None] < 0, np.nan, self.means[chosen][b, labels])
        covariances = self.covariances[chosen]
        if self.covariance_type in ("diag", "spherical"):
            deviations = np.sqrt(covariances[b, labels])
            return means + normals * (deviations if deviations.ndim == 3 else deviations[..., None])
        D = normals.shape[-1]
        absent = np.isnan(covariances).any(axis=(-2, -1), keepdims=True)
        lower = np.linalg.cholesky(np.where(absent, np.eye(D), covariances))
        factors = lower[:, None] if self.covariance_type == "tied" else lower[b, labels]
        return means + (factors @ normals[..., None])[..., 0]

    def _evaluate(
        self, X: Any, groups: Any, offsets: Any, backend: str, n_threads: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        source, threads = Source.of(X, groups, offsets), check_threads(n_threads)
        fits = self._for(source)
        kernels = backends.kernels(backend, "batch")
        n = int(source.offsets[-1])
        log_prob, labels = np.full(n, np.nan), np.full(n, -1, np.int64)
        mixtures = Mixtures(*(getattr(fits, field.name) for field in fields(Mixtures)))
        for which, chosen, problems in source.slices(PROBLEMS_AT_ONCE):
            in_place = problems.x is source.parts
            rows = slice(None) if in_place else source.rows(chosen)
            places = [
                each[rows] if isinstance(rows, slice) else np.empty(len(problems.x), each.dtype)
                for each in (log_prob, labels)
            ]
            kernels.predict_many(problems, _part(mixtures, which), *places, threads)
            if not isinstance(rows, slice):
                log_prob[rows], labels[rows] = places
        return log_prob.reshape(source.shape), labels.reshape(source.shape)

    def _for(self, source: Source) -> ManyFits:
        """The mixtures of the problems of `source`, one for each."""
        D = self.means.shape[2]
        if source.n_features != D:
            raise ValueError(f"X has {source.n_features} features; these mixtures have {D}")
        if source.groups is None or self.groups is None:
            if len(source) != len(self):
                raise ValueError(
                    f"X holds {len(source)} problems; there are {len(self)} mixtures, expected one for each"
                )
            return self
        return self[places_of(self.groups, source.groups)]


def _divided(sums: np.ndarray, moderation: np.ndarray) -> np.ndarray:
    """Sums over moderated weights as they are over the weights themselves; infinite if float64 cannot hold them."""
    with np.errstate(over="ignore"):
        return sums / moderation


def _drawn(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Labels (B, n) from weights (B, K) and uniforms (B, n): the inverse of the cumulative sum; −1 without weights."""
    cumulative = np.cumsum(np.nan_to_num(weights), axis=1)
    labels = (u[..., None] * cumulative[:, None, -1:] >= cumulative[:, None]).sum(axis=2)
    last = weights.shape[1] - 1 - np.argmax(np.nan_to_num(weights)[:, ::-1] > 0, axis=1)
    return np.where(cumulative[:, -1:] > 0, np.minimum(labels, last[:, None]), -1)


def _problems_at_once(source: Source, settings: Settings, threads: int) -> int:
    """How many take all threads about half a second; some for each thread, so that none waits long for the others."""
    rows = float(source.offsets[-1]) / max(len(source), 1)
    flop = rows * flop_of_a_row(source.n_features, settings.most, passes_of_a_fit(settings))
    return int(min(max(FLOP_AT_ONCE * threads / max(flop, 1.0), 4 * threads), PROBLEMS_AT_ONCE))


def _part(values: Any, which: slice) -> Any:
    """Some of the problems of `Mixtures` or `Outcomes`: views, for kernels to write into."""
    parts = (getattr(values, field.name) for field in fields(values))
    return type(values)(*(part[which] if isinstance(part, np.ndarray) else part for part in parts))


@contextmanager
def shown(total: int, progress: bool | Callable[[int], object], before: int = 0) -> Iterator[Callable[[int], object]]:
    """A bar on standard error with fits per second and the time left; `before` were done by an earlier run.

    `progress` may be the function that shows it.
    """
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done: None
        return
    from emalgam.progress import counting

    with counting("fits", total, before) as advance:
        yield advance
