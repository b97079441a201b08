"""`Gaussian`: a frozen value like `Mixture`, or a stack of them, and what turns one into the other.

Letters: D features, and "..." the axes of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from emalgam import arrays, backends
from emalgam.blas import one_blas_thread
from emalgam.draws import philox_seed, sampler_of
from emalgam.mixture import Mixture
from emalgam.namespace import invert_triangular
from emalgam.packing import LOG_2_PI
from emalgam.validation import (
    broadcast,
    check_array,
    check_choice,
    check_features,
    check_integer,
    check_symmetric,
    check_threads,
    first_index,
    in_words,
    not_positive_definite,
    real_array,
)
from emalgam_kernels.blocks import default_threads, for_each_block
from emalgam_kernels.kl_blocks import PAIRS_AT_ONCE
from emalgam_kernels.philox import NORMALS

COVARIANCE_TYPES: Final = ("full", "diag", "spherical")
ELEMENTS_AT_ONCE: Final = 2**19  # checked as they are copied, 4 MB: smaller parts cost more hand-overs than they save
ELEMENTS_OF_A_TILE: Final = 2**15  # 256 KB, in the second cache


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(μ, Σ), or a stack of them.

    Parameters
    ----------
    mean : (..., D) array
        μ. A single number means one feature.
    covariance : array
        Σ: (..., D, D) for "full", (..., D) for "diag" (variances), (...) for "spherical" (one variance). A single
        number is the variance of one feature, so ``Gaussian(0.0, 1.0)`` is the standard normal distribution.
        The leading axes of mean and covariance are broadcast: one covariance can serve many means.
    covariance_type : {"full", "diag", "spherical"}

    Both are copied, unless they cannot change: ``array.setflags(write=False)`` lets a Gaussian share a float64 array
    that owns its memory.

    Attributes
    ----------
    mean : (*batch_shape, D) float64
    covariance : (*batch_shape, D, D), (*batch_shape, D) or batch_shape, float64
    precision_cholesky : float64, shape of the covariance
        P with ``P Pᵀ = Σ⁻¹``, upper triangular (or its diagonal); computed when it is first asked for.

    Raises
    ------
    ValueError
        Naming the argument, and the first index at which a number is not finite or a covariance is not symmetric and
        positive definite.

    Examples
    --------
    >>> from emalgam.sampling import Gaussian
    >>> standard = Gaussian(0.0, 1.0)
    >>> float(standard.log_prob(0.0).round(6))
    -0.918939
    >>> Gaussian([[0.0, 0.0], [3.0, 1.0]], [[1.0, 0.5], [0.5, 2.0]]).batch_shape
    (2,)
    """

    mean: np.ndarray
    covariance: np.ndarray
    covariance_type: str = "full"

    def __post_init__(self) -> None:
        kind = check_choice("covariance_type", self.covariance_type, COVARIANCE_TYPES)
        mean = np.atleast_1d(check_array("mean", self.mean))
        D, rank = mean.shape[-1], covariance_rank(kind)
        given = real_array("covariance", self.covariance)
        covariance = given.reshape((1,) * rank) if given.ndim == 0 and D == 1 else given
        expected = (D,) * rank
        if D == 0 or covariance.shape[max(covariance.ndim - rank, 0) :] != expected:
            sizes = ", ".join(("...", *map(str, expected)))
            raise ValueError(
                f"covariance has shape {given.shape} and mean {mean.shape}; expected ({sizes}) for type {kind!r}"
            )
        stack = covariance.shape[: covariance.ndim - rank]
        batch_shape = broadcast("the stacks", mean=mean.shape[:-1], covariance=stack)
        own = _own_matrices(covariance) if kind == "full" else _own_variances(covariance)
        self._set("mean", _own(mean), (*batch_shape, D))
        self._set("covariance", own, (*batch_shape, *expected))

    def _set(self, name: str, own: np.ndarray, shape: tuple[int, ...]) -> None:
        own.setflags(write=False)
        object.__setattr__(self, name, np.broadcast_to(own, shape))

    @cached_property
    def precision_cholesky(self) -> np.ndarray:
        """P with ``P Pᵀ = Σ⁻¹``, upper triangular (or its diagonal)."""
        own = without_repeats(self.covariance, covariance_rank(self.covariance_type))
        P = _factors(own) if self.covariance_type == "full" else 1.0 / np.sqrt(own)
        P.setflags(write=False)
        return np.broadcast_to(P, self.covariance.shape)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled arrays are writeable; a Gaussian's are not."""
        for name, value in state.items():
            object.__setattr__(self, name, value)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    # ---- sizes

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the stack; () for one Gaussian."""
        return self.mean.shape[:-1]

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.mean.shape[-1])

    # ---- evaluation

    def log_prob(self, x: Any) -> Any:
        """log N(x; μ, Σ), in nats.

        Parameters
        ----------
        x : (..., D) array
            Leading axes are broadcast with `batch_shape`; a single number where D = 1. A tensor gives a tensor.

        Returns
        -------
        (...) float64

        Raises
        ------
        ValueError
            If the number of features differs, the shapes do not broadcast, or a number is not finite.

        Examples
        --------
        >>> Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]]).log_prob([[0.0, 0.0], [1.0, 2.0]]).round(6)
        array([-2.531024, -3.531024])
        """
        centred = self._points("x", x) - self.mean
        P = self.precision_cholesky
        if self.covariance_type == "full":
            # BLAS's own threads are slower on tall, narrow products; to limit them takes as long as a small product.
            with one_blas_thread() if centred.size > ELEMENTS_OF_A_TILE else nullcontext():
                y = centred @ P if P.ndim == 2 else (centred[..., None, :] @ P)[..., 0, :]
        else:
            y = centred * (P if self.covariance_type == "diag" else P[..., None])
        with np.errstate(over="ignore"):
            square = np.einsum("...d,...d->...", y, y)
        return arrays.like(self._log_det() - 0.5 * (square + self.n_features * LOG_2_PI), x)

    def entropy(self) -> Any:
        """H = ½ log |2πe Σ|, in nats; the shape of the stack.

        References
        ----------
        Cover, Thomas (2006), theorem 8.4.1.

        Examples
        --------
        >>> round(float(Gaussian(0.0, 1.0).entropy()), 6)
        1.418939
        """
        return 0.5 * self.n_features * (1.0 + LOG_2_PI) - self._log_det()

    def _log_det(self) -> np.ndarray:
        """log |P| = −½ log |Σ|."""
        P = self.precision_cholesky
        if self.covariance_type == "spherical":
            return self.n_features * np.log(P)
        diagonal = np.einsum("...ii->...i", P) if self.covariance_type == "full" else P
        return np.log(diagonal).sum(axis=-1)

    def _points(self, name: str, x: Any) -> np.ndarray:
        points = check_array(name, x).astype(np.float64, copy=False)
        points = points[None] if points.ndim == 0 and self.n_features == 1 else points
        if points.ndim == 0 or points.shape[-1] != self.n_features:
            hint = f" (for one feature: {name}[..., None])" if self.n_features == 1 else ""
            raise ValueError(f"{name} has shape {points.shape}; expected (..., {self.n_features}){hint}")
        broadcast("the stacks", **{name: points.shape[:-1], "the Gaussians": self.batch_shape})
        return points

    # ---- sampling

    def sample(
        self, n_samples: int = 1, random_state: Any = None, *, backend: str = "auto", n_threads: int | None = None
    ) -> np.ndarray:
        """Draw x = μ + L ε with L Lᵀ = Σ from each Gaussian of the stack.

        Parameters
        ----------
        n_samples : int
        random_state : None, int or NumPy generator
            An integer is the key of the random numbers: then the first samples are the same for every `n_samples`.
        backend : str
            See `emalgam.backends`.
        n_threads : int, optional
            None means all processors; the result does not depend on it.

        Returns
        -------
        (n_samples, *batch_shape, D) float64

        Examples
        --------
        >>> Gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 4.0]]).sample(3, random_state=0).shape
        (3, 2)
        """
        n, threads = check_integer("n_samples", n_samples, 1), check_threads(n_threads)
        kernels, seed = backends.kernels(backend, "sampling"), philox_seed(random_state)
        if not self.batch_shape:
            x = np.empty((n, self.n_features))
            sampler = sampler_of(as_mixture("the Gaussian", self))
            kernels.sample_mixture(sampler, seed, 0, x, np.empty(n, np.int64), n_threads=threads)
            return x
        noise = np.empty((n * math.prod(self.batch_shape), self.n_features))
        kernels.normals(seed, NORMALS, 0, noise, n_threads=threads)
        return self._colour(noise.reshape(n, *self.batch_shape, self.n_features), threads)

    def _colour(self, noise: np.ndarray, n_threads: int) -> np.ndarray:
        """μ + L ε, for "full" in the place of the noise, tile by tile of samples and Gaussians."""
        if self.covariance_type != "full":
            deviation = 1.0 / self.precision_cholesky
            return self.mean + noise * (deviation if self.covariance_type == "diag" else deviation[..., None])
        n, M, D = len(noise), math.prod(self.batch_shape), self.n_features
        x, mean, lower = noise.reshape(n, M, D), self.mean.reshape(M, D), self._lower().reshape(M, D, D)
        members = max(min(ELEMENTS_OF_A_TILE // D, M), 1)
        rows, across = max(ELEMENTS_OF_A_TILE // (D * members), 1), -(-M // members)

        def block(index: int, _: int) -> None:
            start, first = index // across * rows, index % across * members
            here, which = slice(start, start + rows), slice(first, first + members)
            x[here, which] = _coloured(x[here, which], mean[which], lower[which])

        for_each_block(block, -(-n // rows) * across, 1, n_threads)
        return noise

    def _lower(self) -> np.ndarray:
        """L = P⁻ᵀ with L Lᵀ = Σ ("full" only)."""
        P, D = self.precision_cholesky, self.n_features
        return invert_triangular(P.reshape(-1, D, D).swapaxes(1, 2)).reshape(P.shape)

    # ---- algebra

    def affine(self, A: Any, b: Any = 0.0) -> Gaussian:
        """The distribution of A x + b: N(A μ + b, A Σ Aᵀ).

        Parameters
        ----------
        A : (..., E, D) array, or a number
            Of rank E. A number stands for that multiple of the identity, and keeps the covariance type.
        b : (..., E) array, or a number

        Raises
        ------
        ValueError
            If the shapes do not match, or the rank of A is too small for a density.

        References
        ----------
        Bishop (2006), section 2.3.3 without the noise.

        Examples
        --------
        >>> line = Gaussian(10.0, 4.0).affine(3.0, 1.0)
        >>> line.mean, line.covariance
        (array([31.]), array([[36.]]))
        """
        matrix, offset = (check_array(name, value).astype(np.float64) for name, value in (("A", A), ("b", b)))
        if matrix.ndim == 0:
            if matrix == 0:
                raise ValueError("A is 0; expected a number that is not, as a constant has no density")
            return self._moved(matrix * self.mean, offset, matrix**2 * self.covariance, self.covariance_type)
        if matrix.ndim < 2 or matrix.shape[-1] != self.n_features or 0 in matrix.shape:
            raise ValueError(f"A has shape {matrix.shape}; expected (..., rows, {self.n_features}) or a number")
        broadcast("the stacks", **{"A": matrix.shape[:-2], "the Gaussians": self.batch_shape})
        lower = matrix @ as_full(self)._lower()
        size = np.linalg.norm(lower, axis=-1, keepdims=True)  # of each row: units do not make it dependent on others
        if (np.linalg.matrix_rank(lower / np.where(size > 0, size, 1.0)) < matrix.shape[-2]).any():
            raise ValueError(f"A of shape {matrix.shape} has too small a rank: A x has no density; leave out rows")
        mean = (matrix @ self.mean[..., None])[..., 0]
        return self._moved(mean, offset, lower @ lower.swapaxes(-1, -2), "full")

    @staticmethod
    def _moved(mean: np.ndarray, offset: np.ndarray, covariance: np.ndarray, kind: str) -> Gaussian:
        if offset.ndim > 0 and offset.shape[-1] != mean.shape[-1]:
            raise ValueError(f"b has shape {offset.shape}; expected (..., {mean.shape[-1]}) or a number")
        broadcast("the stacks", **{"b": offset.shape[:-1], "A x": mean.shape[:-1]})
        if kind == "full":
            covariance = 0.5 * (covariance + covariance.swapaxes(-1, -2))
        return Gaussian(mean + offset, covariance, kind)

    def marginal(self, features: Sequence[int]) -> Gaussian:
        """The distribution of some of the features, in the order given; ValueError for one that is not there.

        References
        ----------
        Bishop (2006), eq. 2.98.

        Examples
        --------
        >>> Gaussian([1.0, 2.0], [[1.0, 0.5], [0.5, 2.0]]).marginal([1])
        Gaussian(mean=array([2.]), covariance=array([[2.]]), covariance_type='full')
        """
        return self._select(check_features(features, self.n_features))

    def _select(self, kept: np.ndarray) -> Gaussian:
        covariance = self.covariance
        if self.covariance_type == "full":
            covariance = covariance[..., kept[:, None], kept]
        elif self.covariance_type == "diag":
            covariance = covariance[..., kept]
        return Gaussian(self.mean[..., kept], covariance, self.covariance_type)

    def conditional(self, features: Sequence[int], values: Any) -> Gaussian:
        """The distribution of the other features, given that `features` have `values`.

        N(μ_a + Σ_ab Σ_bb⁻¹ (x_b − μ_b), Σ_aa − Σ_ab Σ_bb⁻¹ Σ_ba).

        Parameters
        ----------
        features : sequence of int
            The features b that are known.
        values : (..., len(features)) array
            x_b; leading axes are broadcast with `batch_shape`.

        References
        ----------
        Bishop (2006), eq. 2.81-2.82.

        Examples
        --------
        >>> Gaussian([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]]).conditional([1], [2.0])
        Gaussian(mean=array([1.]), covariance=array([[0.75]]), covariance_type='full')
        """
        given = check_features(features, self.n_features)
        rest = np.setdiff1d(np.arange(self.n_features), given)
        if len(rest) == 0:
            raise ValueError(f"features is {list(features)}, all {self.n_features} of them; leave at least one unknown")
        known, unknown = self._select(given), self._select(rest)
        departure = known._points("values", values) - known.mean
        if self.covariance_type != "full":  # independent features: nothing is learnt
            shape = (*departure.shape[:-1], len(rest))
            return Gaussian(np.broadcast_to(unknown.mean, shape), unknown.covariance, self.covariance_type)
        across = self.covariance[..., rest[:, None], given]
        gain = np.linalg.solve(known.covariance, across.swapaxes(-1, -2)).swapaxes(-1, -2)
        mean = unknown.mean + (gain @ departure[..., None])[..., 0]
        covariance = unknown.covariance - gain @ across.swapaxes(-1, -2)
        return Gaussian(mean, 0.5 * (covariance + covariance.swapaxes(-1, -2)), "full")


# ---- covariances


def covariance_rank(kind: str) -> int:
    """Axes of one covariance."""
    return {"full": 2, "diag": 1, "spherical": 0}[kind]


def without_repeats(stack: np.ndarray, rank: int) -> np.ndarray:
    """A stack whose members have `rank` axes and are in C order; what broadcasting has repeated is there once."""
    strides = stack.strides[: stack.ndim - rank]
    return np.asarray(stack[tuple(slice(None) if stride else slice(1) for stride in strides)], order="C")


def _own_variances(given: np.ndarray) -> np.ndarray:
    """A copy in float64; ValueError naming the first that is not a positive number."""
    variances = _own(check_array("covariance", given))
    if (variances <= 0).any():
        index = first_index(variances <= 0)
        raise ValueError(f"covariance is not positive definite{in_words(index)}: a variance is {variances[index]:g}")
    return variances


def _can_be_shared(array: np.ndarray) -> bool:
    """Whether an array is in float64 and C order, and neither it nor any that it is a view of may be written to."""
    if array.dtype != np.float64 or not array.flags.c_contiguous:
        return False
    owner: Any = array
    while isinstance(owner, np.ndarray) and not owner.flags.writeable:
        owner = owner.base
    return owner is None


def _own(given: np.ndarray) -> np.ndarray:
    """A copy in float64 and C order, or the same numbers if they are so already and cannot change."""
    return given[...] if _can_be_shared(given) else np.array(given, dtype=np.float64, order="C")


def _own_matrices(given: np.ndarray) -> np.ndarray:
    """What `_own` gives of (..., D, D).

    ValueError naming the first that is not finite, symmetric and positive definite.
    """
    matrices = given.reshape(-1, *given.shape[-2:])
    if _can_be_shared(given):
        own, failed = matrices, backends.host_kernels("kl").check_covariances(matrices, default_threads())
    else:
        own, failed = _checked_copy(matrices)
    own = own.reshape(given.shape)
    if failed >= 0:
        check_array("covariance", own)
        check_symmetric("covariance", own)
        raise not_positive_definite("covariance", own, tuple(map(int, np.unravel_index(failed, own.shape[:-2]))))
    return own


def _checked_copy(matrices: np.ndarray) -> tuple[np.ndarray, int]:
    """A copy of (M, D, D), checked part by part while the processor's caches hold it; the first that is no covariance,
    or −1."""
    own = np.empty(matrices.shape)
    kernels = backends.host_kernels("kl")
    failed: list[int] = []

    def block(start: int, stop: int) -> None:
        with np.errstate(over="ignore"):
            own[start:stop] = matrices[start:stop]
        first = kernels.check_covariances(own[start:stop])
        if first >= 0:
            failed.append(start + first)

    rows = max(ELEMENTS_AT_ONCE // matrices.shape[-1] ** 2 // PAIRS_AT_ONCE, 1) * PAIRS_AT_ONCE
    for_each_block(block, len(own), rows, default_threads())
    return own, min(failed, default=-1)


def _factors(covariance: np.ndarray) -> np.ndarray:
    """P (..., D, D) of matrices that have been checked."""
    P = np.empty(covariance.shape)
    shape = (-1, *covariance.shape[-2:])
    backends.host_kernels("kl").precision_factors(covariance.reshape(shape), P.reshape(shape), default_threads())
    return P


def _coloured(noise: np.ndarray, mean: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """μ_m + L_m ε, (n, M, D), one column of L after the other: no product whose rounding depends on what lies beside.

    Features come first, and of the other axes the longer one last: along it NumPy's loops are fast.
    """
    member = 1 if noise.shape[0] > noise.shape[1] else 2
    axes = (2, 1, 0) if member == 1 else (2, 0, 1)
    epsilon = np.ascontiguousarray(noise.transpose(axes))
    x = np.broadcast_to(np.expand_dims(mean.T, 3 - member), epsilon.shape).copy()
    for j, column in enumerate(lower.transpose(2, 1, 0)):  # (D, M)
        x[j:] += np.expand_dims(column[j:], 3 - member) * epsilon[j]
    return x.transpose(np.argsort(axes))


# ---- conversions


def as_full(gaussian: Gaussian) -> Gaussian:
    """The same Gaussian with matrices as covariances."""
    if gaussian.covariance_type == "full":
        return gaussian
    variances = gaussian.covariance[..., None] if gaussian.covariance_type == "spherical" else gaussian.covariance
    return Gaussian(gaussian.mean, variances[..., None] * np.eye(gaussian.n_features))


def as_mixture(name: str, value: Any) -> Mixture:
    """A Gaussian, a mixture or what holds a fitted one as a mixture; ValueError naming the argument otherwise."""
    if isinstance(value, Mixture):
        return value
    if isinstance(held := getattr(value, "mixture", None), Mixture):  # a Fit
        return held
    if isinstance(value, Gaussian):
        if value.batch_shape:
            raise ValueError(f"{name} is a stack of {value.batch_shape} Gaussians; expected one")
        return Mixture(np.ones(1), value.mean[None], value.covariance[None], value.covariance_type)
    fitted = getattr(value, "_mixture", None)  # not by its type: importing scikit-learn takes long
    if callable(fitted):
        mixture: Mixture = fitted()
        return mixture
    raise ValueError(f"{name} is a {type(value).__name__}; expected a Gaussian, Mixture or fitted GaussianMixture")


def moment_match(p: Any) -> Gaussian:
    """The Gaussian with the mean and the covariance of a mixture, which is nearest to it in KL(p ‖ ·).

    Parameters
    ----------
    p : Mixture, fitted GaussianMixture or Gaussian

    References
    ----------
    Hershey, Olsen (2007), section 4 (Gaussian approximations).

    Examples
    --------
    >>> import numpy as np
    >>> moment_match(Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.ones(2), "spherical")).covariance
    array([[2.]])
    """
    return Gaussian(*as_mixture("p", p).moments())
