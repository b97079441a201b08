"""The algebra of packed statistics: frames, natural parameters, moments.

A Gaussian is an exponential family: ``log w_k N(x; μ_k, Σ_k) = ⟨η_k, φ(x)⟩`` with ``φ(x) = (x_i x_j, x_i, 1)``. This
module turns weights, means and precision factors into η, and statistics ``S = Rᵀ Φ`` back into means and second
moments. Everything happens in a `Frame`, in which the data have their mean near zero and their spread near one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np

from emalgam.namespace import beside, contiguous, is_tensor, namespace, to_host

LOG_2_PI: Final = float(np.log(2 * np.pi))


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """``z = (x − shift) · scale``, feature by feature; both (D,) float64, every scale a power of two.

    Of a stack of mixtures (B, D): then points are (B, …, D).
    """

    shift: np.ndarray
    scale: np.ndarray

    @classmethod
    def identity(cls, n_features: int) -> Frame:
        """The data's own units, z = x."""
        return cls(np.zeros(n_features), np.ones(n_features))

    def about_origin(self) -> Frame:
        """The same scale without a shift: x · scale is exact, and so z − μ is x − μ, rounded once, times the scale.

        What a shift rounds is as large as the distance of x from the shift, which is that of other components. It is
        the packed form that needs one, as its terms grow with z; the direct form's do not.
        """
        return Frame(np.zeros_like(self.shift), self.scale)

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Points (…, D) into the frame."""
        return (x - self._along(self.shift, x)) * self._along(self.scale, x)

    def undo(self, z: np.ndarray) -> np.ndarray:
        """Points (…, D) out of the frame."""
        return z / self._along(self.scale, z) + self._along(self.shift, z)

    @staticmethod
    def _along(part: np.ndarray, points: np.ndarray) -> np.ndarray:
        """A part of a stack's frame, with axes for the points of each mixture."""
        return part if part.ndim == 1 else part.reshape(len(part), *(1,) * (points.ndim - 2), -1)


def power_of_two(spread: np.ndarray) -> np.ndarray:
    """The powers of two that bring `spread` nearest to one, element by element; one where the spread is zero."""
    exponent = np.frexp(np.where(spread > 0, spread, 0.5))[1]
    return np.ldexp(1.0, np.clip(-exponent, -1021, 1021))


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """A mixture in a frame.

    `weights` (K,), `means` (K, D) and, in the shape of the covariance type, `covariances` and the factors
    `precisions_cholesky`: P with P Pᵀ = Σ⁻¹, upper triangular (or its diagonal). Of a stack: (..., K) and so on.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    precisions_cholesky: np.ndarray

    @property
    def log_weights(self) -> np.ndarray:
        """log w_k, −inf for a component without weight."""
        with np.errstate(divide="ignore"):
            return namespace(self.weights).log(self.weights)

    def beside(self, other: Any) -> Components:
        """These components where `other` lies."""
        parts = (self.weights, self.means, self.covariances, self.precisions_cholesky)
        return Components(*(beside(part, other) for part in parts))

    def on_host(self) -> Components:
        """These components as NumPy arrays."""
        parts = (self.weights, self.means, self.covariances, self.precisions_cholesky)
        return Components(*map(to_host, parts))


@dataclass(frozen=True, eq=False)
class _Triangle:
    """The lower triangle of a D × D matrix, row by row.

    `i`, `j` (D (D + 1) / 2,) are its indices, `sign` −½ on the diagonal and −1 beside it, and `position` (D, D) says
    where an entry of the symmetric matrix is packed.
    """

    i: np.ndarray
    j: np.ndarray
    sign: np.ndarray
    position: np.ndarray


@lru_cache(maxsize=32)
def _triangle_on(device: Any, n_features: int) -> _Triangle:
    i, j = np.tril_indices(n_features)
    position = np.empty((n_features, n_features), np.int64)
    position[i, j] = position[j, i] = np.arange(len(i))
    parts = (i, j, np.where(i == j, -0.5, -1.0), position)
    if device is None:
        return _Triangle(*parts)
    return _Triangle(*(sys.modules["torch"].as_tensor(part, device=device) for part in parts))


def _triangle(n_features: int, other: np.ndarray) -> _Triangle:
    """The triangle's indices where `other` lies."""
    return _triangle_on(other.device if is_tensor(other) else None, n_features)


def log_constants(log_weights: np.ndarray, log_det: np.ndarray, n_features: int, frame: Frame) -> np.ndarray:
    """c_k = log w_k + log|P_k| − D/2 log 2π + Σ log scale: what a log-density adds to −½ ‖P_kᵀ (z − μ_k)‖²; (…, K)."""
    log_scale = namespace(frame.scale).log(frame.scale).sum(axis=-1)[..., None]
    return log_weights + log_det + (log_scale - 0.5 * n_features * LOG_2_PI)


def natural_parameters(quadratic: np.ndarray, linear: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """η = (quadratic, linear, constant), (…, K, F) float64: one row for each component."""
    return contiguous(namespace(linear).concat([quadratic, linear, constants[..., None]], axis=-1))


def pack_precisions(precisions: np.ndarray) -> np.ndarray:
    """−½ Λ as coefficients of z_i z_j (i ≥ j), off-diagonals doubled; (…, K, D, D) → (…, K, D (D + 1) / 2)."""
    triangle = _triangle(precisions.shape[-1], precisions)
    return precisions[..., triangle.i, triangle.j] * triangle.sign


def pack_symmetric(matrices: np.ndarray) -> np.ndarray:
    """The lower triangles of symmetric matrices, row by row; (K, D, D) → (K, D (D + 1) / 2)."""
    triangle = _triangle(matrices.shape[-1], matrices)
    return matrices[:, triangle.i, triangle.j]


def unpack_symmetric(packed: np.ndarray, n_features: int) -> np.ndarray:
    """The symmetric matrices (K, D, D) whose lower triangles are `packed`, (K, D (D + 1) / 2)."""
    return packed[:, _triangle(n_features, packed).position]


def features(z: np.ndarray, feature_map: str) -> np.ndarray:
    """φ(z) = (φ₂(z), z, 1), (N, F): see `emalgam_kernels.statistic_count`."""
    xp = namespace(z)
    return xp.concat([quadratic_features(z, feature_map), z, xp.ones_like(z[:, :1])], axis=1)


def quadratic_features(z: np.ndarray, feature_map: str) -> np.ndarray:
    """φ₂(z), (N, F − D − 1)."""
    if feature_map == "full":
        triangle = _triangle(z.shape[1], z)
        return z[:, triangle.i] * z[:, triangle.j]
    square = z * z
    return square if feature_map == "diag" else square.sum(axis=1)[:, None]


@dataclass(frozen=True, eq=False)
class Moments:
    """What the statistics of a pass say: ``S = (Σ r φ₂(z − a), Σ r (z − a), Σ r)`` about the centres a.

    `mass` N_k (K,), `first` Σ r (z − a) (K, D), `second` Σ r φ₂(z − a) packed as the feature map packs it, and
    `centres` a (K, D), zero for packed kernels and the component's previous mean for direct ones, or what `about`
    moved them to.
    """

    mass: np.ndarray
    first: np.ndarray
    second: np.ndarray
    centres: np.ndarray

    @classmethod
    def of(cls, statistics: np.ndarray, centres: np.ndarray) -> Moments:
        """The slices of S (K, F)."""
        D = centres.shape[1]
        return cls(statistics[:, -1], statistics[:, -1 - D : -1], statistics[:, : -1 - D], centres)

    @property
    def statistics(self) -> np.ndarray:
        """S (K, F)."""
        return namespace(self.mass).concat([self.second, self.first, self.mass[:, None]], axis=1)

    def about(self, centres: np.ndarray, feature_map: str) -> Moments:
        """The same moments about other `centres` (K, D), by the parallel axis theorem."""
        # Σ r φ₂(z − c) = Σ r φ₂(z − a) − N φ₂(m − a) + N φ₂(m − c), where m = a + δ is the mean
        mass, offset = self.mass[:, None], self.means() - centres
        moved = quadratic_features(offset, feature_map) - quadratic_features(self.offset, feature_map)
        return Moments(self.mass, mass * offset, self.second + mass * moved, centres)

    @cached_property
    def offset(self) -> np.ndarray:
        """δ_k = Σ r (z − a) / N_k, from the centre to the new mean; zero where there is no mass. (K, D)"""
        return self.mean_of(self.first)

    def means(self) -> np.ndarray:
        """a_k + δ_k, (K, D)."""
        return self.centres + self.offset

    def on_host(self) -> Moments:
        """These moments as NumPy arrays."""
        return Moments(*map(to_host, (self.mass, self.first, self.second, self.centres)))

    def mean_of(self, second: np.ndarray) -> np.ndarray:
        """`second` (K, n) divided by N_k; zero where there is no mass."""
        # Without mass a sum is zero, and so is its quotient by one.
        return second / namespace(second).where(self.mass > 0, self.mass, 1.0)[:, None]
