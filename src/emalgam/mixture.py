"""`Mixture`: the frozen value that every part of emalgam exchanges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emalgam import arrays, backends
from emalgam.covariance import COVARIANCES, Covariance
from emalgam.guard import ALGORITHMS, Cancellation, choose_evaluation, packed_reach, parameters_of
from emalgam.namespace import beside, cast, invert_triangular, is_tensor, namespace, to_host, where_true
from emalgam.observations import ELEMENTS_ON_A_GPU, moderation
from emalgam.packing import Components, Frame, log_constants, power_of_two
from emalgam.parts import Part, Parts, check_no_weight
from emalgam.stream import for_many_passes, over_chunks
from emalgam.validation import (
    asymmetric,
    check_array,
    check_choice,
    check_data,
    check_features,
    check_finite,
    check_integer,
    check_some_weight,
    check_threads,
    check_weight,
    first_index,
    in_words,
    indefinite,
)
from emalgam_kernels import Direct, Parameters

ROWS_AT_ONCE = 65536  # per thread: at least one block of rows
ELEMENTS_AT_ONCE = 2**18
WEIGHT_SUM_TOLERANCE = 1e-6


class MixtureAlgebra:
    """What a mixture and a stack of mixtures, whose arrays have one more axis in front, have in common."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    covariance_type: str
    precisions_cholesky: np.ndarray

    @property
    def n_components(self) -> int:
        """K."""
        return int(self.means.shape[-2])

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.means.shape[-1])

    @property
    def covariance(self) -> Covariance:
        """The algebra of the covariance type."""
        return COVARIANCES[self.covariance_type]

    def own_frame(self) -> Frame:
        """A frame in which means and spreads are near one; the choice of scale (a power of two) changes no bits."""
        shift = (self.weights[..., None, :] @ self.means)[..., 0, :]
        diagonal = self.covariance.diagonals(self.precisions_cholesky, self.n_components, self.n_features)
        spread = np.maximum(np.abs(self.means - shift[..., None, :]), 1.0 / diagonal).max(axis=-2)
        if self.covariance.isotropic_frame:
            spread = np.repeat(spread.max(axis=-1, keepdims=True), self.n_features, axis=-1)
        return Frame(shift, power_of_two(spread))

    def components(self, frame: Frame) -> Components:
        """The components in a frame."""
        with np.errstate(over="ignore", under="ignore"):
            covariances = self.covariance.rescale(self.covariances, frame.scale)
        factors = self.covariance.rescale_factor(self.precisions_cholesky, frame.scale)
        lost = ~np.isfinite(covariances).reshape(*self.weights.shape[:-1], -1).all(axis=-1)
        if lost.any():
            covariances[lost] = self.covariance.covariances(factors[lost])
        return Components(self.weights, frame.apply(self.means), covariances, factors)

    def direct(self) -> Direct:
        """Means and factors for the direct form in float64."""
        frame = self.own_frame().about_origin()
        return self.covariance.direct(self.components(frame), frame, "float64")

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (..., D) and covariance (..., D, D) of x."""
        mean = (self.weights[..., None, :] @ self.means)[..., 0, :]
        offsets = self.means - mean[..., None, :]
        within = self.covariance.matrices(self.covariances, self.n_components, self.n_features)
        between = (self.weights[..., None] * offsets).swapaxes(-1, -2) @ offsets
        covariance = np.einsum("...k,...kij->...ij", self.weights, within) + between
        return mean, 0.5 * (covariance + covariance.swapaxes(-1, -2))


@dataclass(frozen=True, eq=False)
class Mixture(MixtureAlgebra):
    """A Gaussian mixture: Σ_k w_k N(μ_k, Σ_k).

    Parameters
    ----------
    weights : (K,) float64
        w_k ≥ 0, summing to one.
    means : (K, D) float64
        μ_k.
    covariances : float64
        (K, D, D) for "full", (D, D) for "tied", (K, D) for "diag", (K,) for "spherical".
    covariance_type : {"full", "tied", "diag", "spherical"}

    Attributes
    ----------
    precisions_cholesky : float64, shape of the covariances
        P with ``P Pᵀ = Σ⁻¹``, upper triangular. Log-densities are computed from these.

    Raises
    ------
    ValueError
        Naming the field, if a shape is wrong, a number is not finite, the weights are negative or do not sum to one,
        or a covariance is not symmetric and positive definite.

    Examples
    --------
    >>> import numpy as np
    >>> from emalgam import Mixture
    >>> coin = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.array([1.0, 1.0]), "spherical")
    >>> coin.log_prob(np.array([[0.0]])).round(6)
    array([-1.418939])
    >>> coin.responsibilities(np.array([[0.0]]))
    array([[0.5, 0.5]])
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    covariance_type: str = "full"
    precisions_cholesky: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        covariance = COVARIANCES[check_choice("covariance_type", self.covariance_type, tuple(COVARIANCES))]
        means = check_numbers("means", self.means)
        if means.ndim != 2 or 0 in means.shape:
            raise ValueError(f"means has shape {means.shape}; expected (components, features)")
        K, D = means.shape
        weights = check_weights(check_numbers("weights", self.weights, (K,)))
        covariances = check_numbers("covariances", self.covariances, covariance.shape(K, D))
        self._set(weights, means, covariances, factor_covariances(covariance, covariances))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled arrays are writeable; a mixture's are not."""
        for name, value in state.items():
            object.__setattr__(self, name, value)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def _set(self, *values: np.ndarray) -> None:
        for name, value in zip(("weights", "means", "covariances", "precisions_cholesky"), values, strict=True):
            own = np.array(value, dtype=np.float64, order="C")
            own.setflags(write=False)
            object.__setattr__(self, name, own)

    @classmethod
    def from_components(cls, components: Components, frame: Frame, covariance: Covariance) -> Mixture:
        """A mixture in a frame, brought back to the data's units.

        Factors are rescaled, not computed again: they are right even where the covariances overflow.
        """
        mixture = object.__new__(cls)
        object.__setattr__(mixture, "covariance_type", covariance.name)
        with np.errstate(over="ignore", under="ignore"):
            covariances = covariance.rescale(components.covariances, 1.0 / frame.scale)
        factors = covariance.rescale_factor(components.precisions_cholesky, 1.0 / frame.scale)
        mixture._set(components.weights, frame.undo(components.means), covariances, factors)
        return mixture

    @classmethod
    def from_cholesky(cls, weights: np.ndarray, means: np.ndarray, lower: np.ndarray) -> Mixture:
        """The mixture of N(μ_k, L_k L_kᵀ), of weights ∝ w_k, from (K,), (K, D), (K, D, D); nothing is checked."""
        factors = np.ascontiguousarray(invert_triangular(lower).swapaxes(1, 2))
        components = Components(weights / weights.sum(), means, lower @ lower.swapaxes(1, 2), factors)
        return cls.from_components(components, Frame.identity(means.shape[1]), COVARIANCES["full"])

    # ---- sizes

    @property
    def n_parameters(self) -> int:
        """Free parameters: of the covariances, the means and the weights less one."""
        K, D = self.means.shape
        return int(self.covariance.n_parameters(K, D) + K * D + K - 1)

    @property
    def precisions(self) -> np.ndarray:
        """Σ⁻¹ in the shape of the covariances."""
        return self.covariance.multiply(self.precisions_cholesky)

    # ---- evaluation

    @over_chunks
    def log_prob(self, x: Any, *, backend: str = "auto", algorithm: str = "auto", n_threads: int | None = None) -> Any:
        """log p(x_n) = log Σ_k w_k N(x_n; μ_k, Σ_k).

        Parameters
        ----------
        x : (N, D) array of real numbers, `emalgam.Stream`, or the path of what can be one
            Any dtype and strides, memory-mapped too; read where it lies. A torch tensor gives a torch tensor.
            `Stream.map` gives the results of a stream one chunk after the other. A dask array or data frame gives a
            dask array, to be computed partition by partition, with one thread each unless `n_threads` says otherwise.
        backend : str
            See `emalgam.backends`.
        algorithm : {"auto", "packed", "direct"}
            "auto" keeps the absolute error below 1e-9 nats (1e-3 for float32 data). Rows so far from all components
            that their log-density itself has fewer digits keep a relative error of a few eps. See `emalgam.guard`.
        n_threads : int, optional
            None means all processors; the result does not depend on it.

        Returns
        -------
        (N,) float64
            In nats; finite, however far from every component x lies.

        Raises
        ------
        ValueError
            For data of a wrong shape or type, NaN or infinity.
        BackendUnavailable
            If the backend cannot run here.
        """
        with arrays.callers_stream(x):
            return arrays.like(self._query(x, backend, algorithm, n_threads).log_prob(), x)

    @over_chunks
    def responsibilities(
        self, x: Any, *, backend: str = "auto", algorithm: str = "auto", n_threads: int | None = None
    ) -> Any:
        """r_nk = w_k N(x_n; μ_k, Σ_k) / p(x_n); (N, K), float32 for float32 data, else float64. See `log_prob`."""
        with arrays.callers_stream(x):
            return arrays.like(self._query(x, backend, algorithm, n_threads).responsibilities(slice(None)), x)

    @over_chunks
    def predict(self, x: Any, *, backend: str = "auto", algorithm: str = "auto", n_threads: int | None = None) -> Any:
        """The component with the largest responsibility for each row, (N,) int64. See `log_prob`."""
        with arrays.callers_stream(x):
            run = self._query(x, backend, algorithm, n_threads)
            labels = arrays.empty((len(run.data),), np.int64, run.data)
            on_gpu = is_tensor(run.data)
            step = max(ELEMENTS_ON_A_GPU // self.n_components, 1) if on_gpu else ROWS_AT_ONCE * run.n_threads
            for start in range(0, len(labels), step):
                rows = slice(start, start + step)
                labels[rows] = run.responsibilities(rows).argmax(axis=1)
            return arrays.like(labels, x)

    def aic(self, x: Any, **how: Any) -> float:
        """Akaike's criterion of x, −2 Σ log p + 2 · parameters, in nats; keywords as in `log_prob`."""
        return LogLikelihood.of(self, x, **how).aic(self.n_parameters)

    def bic(self, x: Any, **how: Any) -> float:
        """Schwarz's criterion of x, −2 Σ log p + parameters · log N, in nats; keywords as in `log_prob`."""
        return LogLikelihood.of(self, x, **how).bic(self.n_parameters)

    def _prepared(self, algorithm: str, dtype: np.dtype) -> Preparation:
        """What queries of a type need. The last one is kept: it takes longer than the evaluation of a few rows."""
        kept: tuple[Any, Preparation] | None = self.__dict__.get("_kept")
        if kept is None or kept[0] != (algorithm, dtype):
            kept = (algorithm, dtype), Preparation.of(self, algorithm, dtype)
            object.__setattr__(self, "_kept", kept)
        return kept[1]

    def _query(self, x: Any, backend: str, algorithm: str, n_threads: int | None) -> Query:
        name = backends.resolve(backend, x)
        data = check_data(x, n_features=self.n_features)
        check_finite(data)
        return Query(self, name, data, algorithm, n_threads)

    # ---- sampling, marginals, conditionals

    def sample(
        self,
        n_samples: int = 1,
        random_state: Any = None,
        *,
        draw: str = "plain",
        backend: str = "auto",
        n_threads: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw x ~ Σ_k w_k N(μ_k, Σ_k).

        Parameters
        ----------
        n_samples : int
        random_state : None, int or NumPy generator
            The same integer gives the same rows, to rounding on every backend; the first rows do not depend on
            `n_samples`, but of a stratified draw.
        draw : {"plain", "antithetic", "stratified"}
            "stratified": as many rows of each component as its weight says, to less than one row, so that means over
            the rows do not vary by how often each component came. "antithetic": rows 2 j and 2 j + 1 have one
            component and opposite deviations from its mean, which cancel in the mean of a function that is nearly
            linear within components; that of one nearly even about their means varies more. And a pair is one draw of
            a component, not two, so what varies between components counts double: of x itself the mean is worse than
            that of plain rows where the means are further apart than the components are wide. The standard error of
            independent rows holds for neither.
        backend : str
            See `emalgam.backends`.
        n_threads : int, optional
            None means all processors; the result does not depend on it.

        Returns
        -------
        x : (n_samples, D) float64
            In random order; antithetic rows in pairs, stratified ones component by component.
        labels : (n_samples,) int64
            The component of each row.

        Raises
        ------
        ValueError
            If `n_samples` is not positive, or there is no such draw.
        BackendUnavailable
            If the backend cannot run here.
        """
        from emalgam.draws import philox_seed, sampler_of
        from emalgam_kernels.philox import DRAWS

        check_choice("draw", draw, DRAWS)
        N, threads = check_integer("n_samples", n_samples, 1), check_threads(n_threads)
        x, labels = np.empty((N, self.n_features)), np.empty(N, np.int64)
        kernels = backends.kernels(backend, "sampling")
        sampler = sampler_of(self, N if draw == "stratified" else 0)
        kernels.sample_mixture(sampler, philox_seed(random_state), 0, x, labels, draw, n_threads=threads)
        return x, labels

    def marginal(self, features: Sequence[int]) -> Mixture:
        """The mixture of some of the features, in the order given; ValueError for a feature that is not there."""
        kept = check_features(features, self.n_features)
        kind = self.covariance_type
        return Mixture(self.weights, self.means[:, kept], self.covariance.select(self.covariances, kept), kind)

    def conditional(self, features: Sequence[int], values: Sequence[float] | np.ndarray) -> Mixture:
        """The mixture of the other features, given that `features` have `values`.

        Each component becomes N(μ_a + Σ_ab Σ_bb⁻¹ (x_b − μ_b), Σ_aa − Σ_ab Σ_bb⁻¹ Σ_ba) with weight w_k p_k(x_b).

        Parameters
        ----------
        features : sequence of int
            The features b that are known.
        values : sequence of float, one for each
            x_b.

        References
        ----------
        Bishop (2006), eq. 2.81-2.82.
        """
        given = check_features(features, self.n_features)
        point = check_numbers("values", values, (len(given),))
        rest = np.setdiff1d(np.arange(self.n_features), given)
        if len(rest) == 0:
            raise ValueError(f"features is {list(features)}, all {self.n_features} of them; leave at least one unknown")
        weights = self.marginal(given.tolist()).responsibilities(point[None])[0]
        if self.covariance.direct_map == "diag":  # independent features: only the weights learn something
            covariances = self.covariance.select(self.covariances, rest)
            return Mixture(weights / weights.sum(), self.means[:, rest], covariances, self.covariance_type)
        across = self.covariances[..., rest[:, None], given]
        gain = np.linalg.solve(self.covariances[..., given[:, None], given], across.swapaxes(-1, -2)).swapaxes(-1, -2)
        means = self.means[:, rest] + (gain @ (point - self.means[:, given])[:, :, None])[:, :, 0]
        covariances = self.covariances[..., rest[:, None], rest] - gain @ across.swapaxes(-1, -2)
        covariances = 0.5 * (covariances + covariances.swapaxes(-1, -2))
        return Mixture(weights / weights.sum(), means, covariances, self.covariance_type)


@dataclass(frozen=True)
class LogLikelihood:
    """Σ ω log p, in nats, and Σ ω of rows, both times a power of two.

    Sums of very large weights overflow, and those of very small ones have few digits. So each part of the rows brings
    its largest weight near one (`observations.moderation`), and parts are added as those with the largest weights are.

    Attributes
    ----------
    moderated_total, moderated_weight : float
    moderation : float
        The power of two.
    """

    moderated_total: float
    moderated_weight: float
    moderation: float = 1.0

    @classmethod
    def of(cls, mixture: Mixture, x: Any, sample_weight: Any = None, **how: Any) -> LogLikelihood:
        """Of the rows of x, which count once each without weights. Keywords as in `Mixture.log_prob`.

        Of streams, paths, memory maps and Dask's collections in memory that does not grow with N.

        Raises
        ------
        ValueError
            As `Mixture.log_prob`, and for weights that are not finite, negative, or zero for every row.
        """
        x, sample_weight = for_many_passes(x, sample_weight, how.get("backend", "auto"))
        if not isinstance(x, Parts):
            found = LogLikelihoodOf(mixture, how)(Part(0, x, sample_weight))
        else:
            check_no_weight(sample_weight)
            backend = backends.resolve(how.get("backend", "auto"))
            how |= {"backend": backend, "n_threads": x.threads(how.get("n_threads"))}
            found = x.fold(LogLikelihoodOf(mixture, how), LogLikelihood.__add__)
        check_some_weight(found.moderated_weight)
        return found

    def __add__(self, other: LogLikelihood) -> LogLikelihood:
        """Of the rows of both."""
        if not (self.moderated_weight and other.moderated_weight):  # rows without weight have no say in the power
            return self if self.moderated_weight else other
        power = min(self.moderation, other.moderation)
        a, b = power / self.moderation, power / other.moderation
        total = a * self.moderated_total + b * other.moderated_total
        return LogLikelihood(total, a * self.moderated_weight + b * other.moderated_weight, power)

    @property
    def mean(self) -> float:
        """Σ ω log p / Σ ω."""
        return self.moderated_total / self.moderated_weight

    @property
    def total(self) -> float:
        """Σ ω log p; infinite if float64 cannot hold it."""
        return self.moderated_total / self.moderation

    @property
    def weight(self) -> float:
        """Σ ω; infinite if float64 cannot hold it."""
        return self.moderated_weight / self.moderation

    def aic(self, n_parameters: int) -> float:
        """Akaike's criterion of a mixture with so many parameters."""
        return 2.0 * n_parameters - 2.0 * self.total

    def bic(self, n_parameters: int) -> float:
        """Schwarz's criterion."""
        log_weight = math.log(self.moderated_weight) - math.log(self.moderation)
        return n_parameters * log_weight - 2.0 * self.total


@dataclass(frozen=True, eq=False)
class LogLikelihoodOf:
    """That of a part."""

    mixture: Mixture
    how: dict[str, Any]

    def __call__(self, part: Part) -> LogLikelihood:
        if part.first:  # the row's number among all is what an error has to name
            check_finite(part.x, first=part.first)
        log_prob = self.mixture.log_prob(part.x, **self.how)
        if part.weight is None:
            return LogLikelihood(float(log_prob.sum()), float(len(log_prob)))
        weight = to_host(check_weight(part.weight, len(log_prob), first=part.first, some=False))
        power = moderation(float(weight.max(initial=0.0)))
        weight = weight if power == 1 else weight * power
        return LogLikelihood(float((to_host(log_prob) * weight).sum()), float(weight.sum()), power)


def check_numbers(name: str, values: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """`values` as finite float64 numbers of a shape; ValueError naming the field, and the index if one is not."""
    array = check_array(name, values)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}")
    return array.astype(np.float64)


def check_weights(weights: np.ndarray) -> np.ndarray:
    """Mixing weights (..., K), checked, and divided by their sum unless that is one but for rounding."""
    total = weights.sum(axis=-1, keepdims=True)
    excess = np.abs(total - 1)
    wrong = (weights.min(axis=-1) < 0) | (excess[..., 0] > WEIGHT_SUM_TOLERANCE)
    if wrong.any():
        index = first_index(wrong)
        own = weights[index]
        where = in_words((*index, *first_index(own < 0))) if own.min() < 0 else in_words(index)
        raise ValueError(
            f"weights have minimum {own.min():g}{where} and sum {own.sum():.9g}; expected weights >= 0 that sum to one"
        )
    return np.where(excess <= weights.shape[-1] * np.finfo(np.float64).eps, weights, weights / total)


def check_symmetric(name: str, covariance: Covariance, matrices: np.ndarray) -> None:
    """ValueError naming the argument if its matrices are not symmetric but for rounding."""
    if covariance.direct_map != "full":
        return
    skew = asymmetric(matrices)
    if skew.any():
        where = in_words(first_index(skew))
        raise ValueError(f"{name}{where} are not symmetric (type {covariance.name}); pass 0.5 * (c + c.T)")


def factor_covariances(covariance: Covariance, covariances: np.ndarray) -> np.ndarray:
    """P of each covariance; ValueError naming the first that is not symmetric and positive definite."""
    check_symmetric("covariances", covariance, covariances)
    try:
        return covariance.factor(covariances)
    except np.linalg.LinAlgError:
        if covariance.shared:
            raise ValueError("covariances is not positive definite (type tied); add to its diagonal") from None
        D = covariances.shape[1] if covariances.ndim > 1 else 1  # of one variance, one is enough to say so
        matrices = covariance.matrices(covariances, len(covariances), D)
        (k,) = first_index(indefinite(matrices))
        raise ValueError(
            f"covariances of component {k} are not positive definite (smallest eigenvalue "
            f"{np.linalg.eigvalsh(matrices[k])[0]:g}); "
            "add to the diagonal"
        ) from None


@dataclass(frozen=True, eq=False)
class Preparation:
    """What a call needs that depends on the mixture, the algorithm and the type of the data alone.

    Attributes
    ----------
    frame : Frame
        For the direct form about the origin: see `emalgam.packing.Frame.about_origin`.
    components : Components
        In the frame.
    parameters : Parameters
        In the form that the guard has chosen.
    constants : (K,) float64
        log w_k N(μ_k; μ_k, Σ_k).
    lowest : float
        The log-density below which a row is evaluated again, directly.
    """

    frame: Frame
    components: Components
    parameters: Parameters
    constants: np.ndarray
    lowest: float

    @classmethod
    def of(cls, mixture: Mixture, algorithm: str, dtype: np.dtype) -> Preparation:
        """ValueError if there is no such algorithm."""
        check_choice("algorithm", algorithm, ALGORITHMS)
        covariance, frame = mixture.covariance, mixture.own_frame()
        components = mixture.components(frame)
        cancellation = Cancellation.of(covariance, components)
        how = choose_evaluation(algorithm, dtype, cancellation)
        K, D = mixture.means.shape
        log_det = covariance.log_det(components.precisions_cholesky, K, D)
        constants = log_constants(components.log_weights, log_det, D, frame)
        lowest = -np.inf
        if algorithm == "auto" and how.algorithm == "packed":
            lowest = float(constants.max()) - packed_reach(how.arithmetic, cancellation.own(), D)
        if how.algorithm == "direct":
            frame = frame.about_origin()
            components = mixture.components(frame)
        return cls(frame, components, parameters_of(covariance, components, frame, how), constants, lowest)


class Query:
    """One call on checked data: parameters and guard once, then the kernels, then the rows that need more care."""

    def __init__(self, mixture: Mixture, backend: str, data: Any, algorithm: str, n_threads: int | None) -> None:
        self.backend, self.kernels = backend, backends.kernels(backend)
        self.data, self.n_threads = data, check_threads(n_threads)
        self.covariance, self.alive = mixture.covariance, mixture.weights > 0
        prepared = mixture._prepared(algorithm, arrays.tile_dtype(data))
        self.frame, self.components, self.parameters = prepared.frame, prepared.components, prepared.parameters
        self.constants, self.lowest = prepared.constants, prepared.lowest

    def of(self, data: Any, n_threads: int) -> Query:
        """The same call on other data of this type on this device."""
        other = copy(self)
        other.data, other.n_threads = data, n_threads
        return other

    def log_prob(self) -> Any:
        """log p of all rows, (N,) float64, where they lie."""
        out = self._empty(len(self.data))
        self.kernels.log_prob(self.data, self.parameters, out, n_threads=self.n_threads)
        for rows in self._rows_to_repair(out):
            out[rows] = self._carefully(self.data[rows])[0]
        return out

    def responsibilities(self, where: slice, n_threads: int | None = None) -> Any:
        """r of some rows, (n, K) in the type of the data, where they lie."""
        return self.evaluate(where, n_threads)[0]

    def evaluate(self, where: slice, n_threads: int | None = None) -> tuple[Any, Any]:
        """r (n, K) and log p (n,) of some rows; on fewer threads if blocks of rows run on several already."""
        data, threads = self.data[where], n_threads or self.n_threads
        out, log_prob = self._empty(len(data), len(self.alive), dtype=arrays.tile_dtype(data)), self._empty(len(data))
        self.kernels.responsibilities(data, self.parameters, out, n_threads=threads, log_prob=log_prob)
        for rows in self._rows_to_repair(log_prob):
            log_prob[rows], r = self._carefully(data[rows])
            out[rows] = cast(r, like=out)
        return out, log_prob

    def _empty(self, *shape: int, dtype: Any = np.float64) -> Any:
        return arrays.empty(shape, dtype, self.data)

    def beyond_reach(self, log_prob: Any) -> Any:
        """Which rows are too far away for the packed form, or overflowed (inf, NaN); (N,) bool."""
        return ~((log_prob >= self.lowest) & namespace(log_prob).isfinite(log_prob))

    def _rows_to_repair(self, log_prob: Any) -> Iterator[Any]:
        """Indices of the rows that are beyond reach, a few at a time."""
        rows = where_true(self.beyond_reach(log_prob))
        K, D = self.components.means.shape
        step = max(ELEMENTS_AT_ONCE // (K * D), 1)
        return (rows[start : start + step] for start in range(0, len(rows), step))

    def _carefully(self, x: Any) -> tuple[Any, Any]:
        """log p and r of a few rows by the direct form in float64; by scaled distances where squares overflow."""
        direct = self.covariance.direct(self.components, self.frame, "float64")
        log_prob, r = self._empty(len(x)), self._empty(len(x), len(self.alive))
        self.kernels.responsibilities(x, direct, r, log_prob=log_prob)
        overflow = ~namespace(log_prob).isfinite(log_prob)
        if bool(overflow.any()):
            far = self._beyond_squares(to_host(x[overflow]))
            log_prob[overflow], r[overflow] = (beside(part, r) for part in far)
        return log_prob, r

    def _beyond_squares(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p and r from distances with their scale taken out.

        −½ d² is cut off at the most negative float64; the nearest components share the responsibility.
        """
        K, D = self.components.means.shape
        factors = self.covariance.matrices(self.components.precisions_cholesky, K, D)
        # z − μ in halves, so that the difference of the largest numbers is finite, and relative to the largest entry.
        half = (x.astype(np.float64) / 2 - self.frame.shift / 2)[:, None]
        size = np.maximum(np.abs(half).max(axis=2, keepdims=True), 0.5)
        centred = half / size * self.frame.scale - self.components.means / size / 2
        distance = np.linalg.norm((centred[:, :, None] @ factors)[:, :, 0], axis=2)
        with np.errstate(over="ignore"):
            square = np.minimum((2 * size[:, :, 0] * distance) ** 2, np.finfo(np.float64).max)
        log_prob = np.where(self.alive, self.constants - 0.5 * square, -np.inf).max(axis=1)
        nearest = np.where(self.alive, distance, np.inf)
        shared = (nearest <= nearest.min(axis=1, keepdims=True)) * self.components.weights
        return log_prob, shared / shared.sum(axis=1, keepdims=True)
