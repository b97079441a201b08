"""The algebra of packed statistics: frames, natural parameters, moments.

A Gaussian is an exponential family: ``log w_k N(x; μ_k, Σ_k) = ⟨η_k, φ(x)⟩`` with ``φ(x) = (x_i x_j, x_i, 1)``. This
module turns weights, means and precision factors into η, and statistics ``S = Rᵀ Φ`` back into means and second
moments. Everything happens in a `Frame`, in which the data have their mean near zero and their spread near one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import numpy as np

LOG_2_PI: Final = float(np.log(2 * np.pi))


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """``z = (x − shift) · scale``, feature by feature; both (D,) float64, every scale a power of two."""

    shift: np.ndarray
    scale: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Points (…, D) into the frame."""
        return (x - self.shift) * self.scale

    def undo(self, z: np.ndarray) -> np.ndarray:
        """Points (…, D) out of the frame."""
        return z / self.scale + self.shift


def power_of_two(spread: np.ndarray) -> np.ndarray:
    """The powers of two that bring `spread` nearest to one, element by element; one where the spread is zero."""
    exponent = np.frexp(np.where(spread > 0, spread, 0.5))[1]
    return np.ldexp(1.0, np.clip(-exponent, -1021, 1021))


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """A mixture in a frame.

    `weights` (K,), `means` (K, D) and, in the shape of the covariance type, `covariances` and the factors
    `precisions_cholesky`: P with P Pᵀ = Σ⁻¹, upper triangular (or its diagonal).
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    precisions_cholesky: np.ndarray

    @property
    def log_weights(self) -> np.ndarray:
        """log w_k, −inf for a component without weight."""
        with np.errstate(divide="ignore"):
            return np.log(self.weights)


@lru_cache(maxsize=32)
def _lower_triangle(n_features: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.tril_indices(n_features)
    return i, j


def log_constants(log_weights: np.ndarray, log_det: np.ndarray, n_features: int, frame: Frame) -> np.ndarray:
    """c_k = log w_k + log|P_k| − D/2 log 2π + Σ log scale: what a log-density adds to −½ ‖P_kᵀ (z − μ_k)‖²; (K,)."""
    return log_weights + log_det + (np.log(frame.scale).sum() - 0.5 * n_features * LOG_2_PI)


def natural_parameters(quadratic: np.ndarray, linear: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """η = (quadratic, linear, constant), (K, F) float64: one row for each component."""
    return np.ascontiguousarray(np.hstack([quadratic, linear, constants[:, None]]))


def pack_precisions(precisions: np.ndarray) -> np.ndarray:
    """−½ Λ as coefficients of z_i z_j (i ≥ j), off-diagonals doubled; (K, D, D) → (K, D (D + 1) / 2)."""
    i, j = _lower_triangle(precisions.shape[-1])
    return precisions[:, i, j] * np.where(i == j, -0.5, -1.0)


def unpack_symmetric(packed: np.ndarray, n_features: int) -> np.ndarray:
    """The symmetric matrices (K, D, D) whose lower triangles are `packed`, (K, D (D + 1) / 2)."""
    i, j = _lower_triangle(n_features)
    full = np.empty((len(packed), n_features, n_features))
    full[:, i, j] = packed
    full[:, j, i] = packed
    return full


@dataclass(frozen=True, eq=False)
class Moments:
    """What the statistics of a pass say: ``S = (Σ r φ₂(z − a), Σ r (z − a), Σ r)`` about the centres a.

    `mass` N_k (K,), `first` Σ r (z − a) (K, D), `second` Σ r φ₂(z − a) packed as the feature map packs it, and
    `centres` a (K, D), zero for packed kernels and the component's previous mean for direct ones.
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

    @cached_property
    def offset(self) -> np.ndarray:
        """δ_k = Σ r (z − a) / N_k, from the centre to the new mean; zero where there is no mass. (K, D)"""
        mass = self.mass[:, None]
        return np.divide(self.first, mass, out=np.zeros_like(self.first), where=mass > 0)

    def means(self) -> np.ndarray:
        """a_k + δ_k, (K, D)."""
        return self.centres + self.offset

    def mean_of(self, second: np.ndarray) -> np.ndarray:
        """`second` divided by N_k; zero where there is no mass."""
        mass = self.mass.reshape(-1, *[1] * (second.ndim - 1))
        return np.divide(second, mass, out=np.zeros_like(second), where=mass > 0)
