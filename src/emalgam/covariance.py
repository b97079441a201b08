"""One class for each covariance type: four feature maps of the same kernel, not four kernels.

A type knows the shape of its covariances, their factors, the natural parameters of its feature map, and how to read new
covariances off the statistics. `COVARIANCES` is the registry. Arrays below are in a frame, in float64; "shape" means
(K, D, D) for full, (D, D) for tied, (K, D) for diag and (K,) for spherical, as in scikit-learn. What an iteration of EM
needs works on NumPy arrays and on tensors alike, and on a GPU waits for nothing.

What turns mixtures into kernel parameters takes stacks of mixtures too: all arrays, those of the frame included, then
have the same leading axes, here "...".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import numpy as np

from emalgam.namespace import below, cholesky, contiguous, invert_triangular, is_tensor, namespace, positive_or_error
from emalgam.packing import (
    Components,
    Frame,
    Moments,
    log_constants,
    natural_parameters,
    pack_precisions,
    pack_symmetric,
    unpack_symmetric,
)
from emalgam_kernels import Direct, Packed


class Covariance(ABC):
    """The algebra of one covariance type."""

    name: str
    feature_map: str  # of packed kernels
    direct_map: str  # of direct kernels
    isotropic_frame = False  # whether one scale must serve all features
    shared = False  # whether all components have one covariance

    @abstractmethod
    def shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        """Shape of the covariances."""

    @abstractmethod
    def n_parameters(self, n_components: int, n_features: int) -> int:
        """Free parameters of the covariances."""

    @abstractmethod
    def factor(self, covariances: np.ndarray) -> np.ndarray:
        """P with P Pᵀ = Σ⁻¹ in the type's shape.

        If some Σ is not positive definite: LinAlgError on the host, entries that are not finite on a GPU.
        """

    @abstractmethod
    def factor_precisions(self, precisions: np.ndarray) -> np.ndarray:
        """P with P Pᵀ = Λ in the type's shape; LinAlgError if some Λ is not positive definite."""

    @abstractmethod
    def multiply(self, factor: np.ndarray) -> np.ndarray:
        """P Pᵀ: precisions of the type's shape from their factors."""

    @abstractmethod
    def covariances(self, factor: np.ndarray) -> np.ndarray:
        """P⁻ᵀ P⁻¹: covariances of the type's shape from precision factors."""

    @abstractmethod
    def matrices(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        """Covariances or factors of the type's shape as matrices (..., K, D, D); a view where one will do."""

    @abstractmethod
    def diagonals(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        """The diagonals of covariances or factors of the type's shape, (..., K, D); a view where one will do."""

    @abstractmethod
    def rescale(self, covariances: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Σ_ij · s_i s_j: covariances of x · s from those of x."""

    @abstractmethod
    def rescale_factor(self, factor: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """P_ij / s_i: precision factors of x · s from those of x."""

    def log_det(self, factor: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        """log |P_k| = ½ log |Λ_k|, (..., K)."""
        return namespace(factor).log(self.diagonals(factor, n_components, n_features)).sum(axis=-1)

    @abstractmethod
    def packed(self, components: Components, frame: Frame, arithmetic: str) -> Packed:
        """Natural parameters η for the packed kernels."""

    @abstractmethod
    def direct(self, components: Components, frame: Frame, arithmetic: str) -> Direct:
        """Means and factors for the direct kernels."""

    @abstractmethod
    def moments(self, statistics: np.ndarray, components: Components, algorithm: str) -> Moments:
        """The statistics of a pass, undone from the whitening if there is one."""

    @abstractmethod
    def estimate(self, moments: Moments, algorithm: str, scatter: np.ndarray | None) -> np.ndarray:
        """The M-step: covariances of the type's shape. `scatter` (D, D) is Σ ω z zᵀ over all data (tied, packed
        only)."""

    @abstractmethod
    def second_moments(self, covariances: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        """E φ₂(z − μ_k) under each component, (K, n), which `estimate` takes back to the covariances.

        φ₂ of the type's feature map; of a shared covariance, which a feature map of its own whitens, that of "full".
        """

    @abstractmethod
    def regularize(self, covariances: np.ndarray, floor: np.ndarray) -> np.ndarray:
        """Σ + diag(floor), `floor` (D,) or (K, D)."""

    @abstractmethod
    def from_variances(self, variances: np.ndarray, n_components: int) -> np.ndarray:
        """Covariances of the type's shape with the variances (D,) of independent features, the same for all."""

    @abstractmethod
    def select(self, covariances: np.ndarray, features: np.ndarray) -> np.ndarray:
        """The covariances of some of the features."""

    @abstractmethod
    def narrow(self, estimate: np.ndarray, total: np.ndarray, floor: np.ndarray) -> np.ndarray:
        """Whose estimate is below `floor` (D,) in some direction, (K,) bool.

        `total` (D, D) is the covariance of all data: directions in which they are flat do not count, nor does a
        shared covariance.
        """

    @abstractmethod
    def cancellation(self, components: Components) -> np.ndarray:
        """max_k Σ_ij |Λ_ij| s_i s_j + D + 2, s_i² = Σ_ii + μ_i²: how large the terms of ⟨η_k, φ⟩ are near component k.

        For a diagonal Σ the sum is m² = max_k (μ_k − c)ᵀ Σ_k⁻¹ (μ_k − c) + D; correlations add what they cancel, and D
        + 2 stands for the constants. A scalar () where the components lie; (...) of a stack.
        """

    def _constants(self, components: Components, frame: Frame) -> np.ndarray:
        K, D = components.means.shape[-2:]
        log_det = self.log_det(components.precisions_cholesky, K, D)
        return log_constants(components.log_weights, log_det, D, frame)


class _Matrix(Covariance):
    """Full and tied: factors are triangular matrices."""

    direct_map = "full"

    def factor(self, covariances: np.ndarray) -> np.ndarray:
        # Σ = L Lᵀ, so Λ = L⁻ᵀ L⁻¹ and P = L⁻ᵀ
        return contiguous(invert_triangular(cholesky(covariances)).swapaxes(-1, -2))

    def factor_precisions(self, precisions: np.ndarray) -> np.ndarray:
        # The upper factor of Λ is the lower factor of Λ with rows and columns in reverse order, reversed back.
        reverse = (Ellipsis, slice(None, None, -1), slice(None, None, -1))
        return np.ascontiguousarray(np.linalg.cholesky(precisions[reverse])[reverse])

    def multiply(self, factor: np.ndarray) -> np.ndarray:
        return factor @ factor.swapaxes(-1, -2)

    def covariances(self, factor: np.ndarray) -> np.ndarray:
        lower = invert_triangular(factor.swapaxes(-1, -2))
        return lower @ lower.swapaxes(-1, -2)

    def diagonals(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        diagonals: np.ndarray = namespace(shaped).linalg.diagonal(self.matrices(shaped, n_components, n_features))
        return diagonals

    def rescale(self, covariances: np.ndarray, scale: np.ndarray) -> np.ndarray:
        s = self._of_matrices(scale)
        return covariances * s[..., None] * s[..., None, :]

    def rescale_factor(self, factor: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return factor / self._of_matrices(scale)[..., None]

    @abstractmethod
    def _of_matrices(self, scale: np.ndarray) -> np.ndarray:
        """Scales (..., D) for each of the type's matrices."""

    def direct(self, components: Components, frame: Frame, arithmetic: str) -> Direct:
        K, D = components.means.shape[-2:]
        factors = self.matrices(contiguous(components.precisions_cholesky), K, D)
        means = contiguous(components.means)
        return Direct("full", frame.shift, frame.scale, means, factors, self._constants(components, frame), arithmetic)

    def second_moments(self, covariances: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return pack_symmetric(self.matrices(covariances, n_components, n_features))

    def regularize(self, covariances: np.ndarray, floor: np.ndarray) -> np.ndarray:
        xp = namespace(floor)
        where = {"device": floor.device} if is_tensor(floor) else {}
        return covariances + floor[..., None] * xp.eye(floor.shape[-1], dtype=floor.dtype, **where)

    def select(self, covariances: np.ndarray, features: np.ndarray) -> np.ndarray:
        return covariances[..., features[:, None], features]

    def cancellation(self, components: Components) -> np.ndarray:
        K, D = components.means.shape[-2:]
        xp = namespace(components.means)
        size = xp.sqrt(self.diagonals(components.covariances, K, D) + components.means**2)
        precisions = xp.abs(self.matrices(self.multiply(components.precisions_cholesky), K, D))
        terms = ((precisions @ size[..., None])[..., 0] * size).sum(axis=-1)
        return xp.amax(xp.where(components.weights > 0, terms, float(D)), -1) + (D + 2)


class Full(_Matrix):
    """Σ_k for every component: φ(z) = (z_i z_j, z_i, 1)."""

    name = feature_map = "full"

    def shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        return n_components, n_features, n_features

    def n_parameters(self, n_components: int, n_features: int) -> int:
        return n_components * n_features * (n_features + 1) // 2

    def matrices(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return shaped

    def _of_matrices(self, scale: np.ndarray) -> np.ndarray:
        return scale[..., None, :]

    def packed(self, components: Components, frame: Frame, arithmetic: str) -> Packed:
        # −½ zᵀΛz + (Λμ)ᵀz + c − ½ ‖Pᵀμ‖²
        P = components.precisions_cholesky
        whitened = (components.means[..., None, :] @ P)[..., 0, :]
        linear = (P @ whitened[..., None])[..., 0]
        constants = self._constants(components, frame) - 0.5 * (whitened**2).sum(axis=-1)
        natural = natural_parameters(pack_precisions(self.multiply(P)), linear, constants)
        return Packed("full", frame.shift, frame.scale, None, natural, arithmetic)

    def from_variances(self, variances: np.ndarray, n_components: int) -> np.ndarray:
        return np.tile(np.diag(variances), (n_components, 1, 1))

    def narrow(self, estimate: np.ndarray, total: np.ndarray, floor: np.ndarray) -> np.ndarray:
        # The smallest eigenvalue of Σ_k relative to the total, both with the floor: 1 where all data are flat.
        xp = namespace(estimate)
        inverse = invert_triangular(cholesky((total + xp.diag(floor))[None]))[0]
        relative = inverse @ (estimate + xp.diag(floor)) @ inverse.T
        share = (floor / (xp.diag(total) + floor)).min()
        return below(relative, 2 * share)

    def moments(self, statistics: np.ndarray, components: Components, algorithm: str) -> Moments:
        return Moments.of(
            statistics,
            components.means if algorithm == "direct" else namespace(components.means).zeros_like(components.means),
        )

    def estimate(self, moments: Moments, algorithm: str, scatter: np.ndarray | None) -> np.ndarray:
        # Σ_k = Σ r (z − a)(z − a)ᵀ / N_k − δδᵀ
        offset = moments.offset
        second = unpack_symmetric(moments.mean_of(moments.second), offset.shape[1])
        return second - offset[:, :, None] * offset[:, None]


class Tied(_Matrix):
    """One Σ for all components: the feature map of spherical, in the frame whitened by it; z̃ = z P."""

    name, feature_map = "tied", "spherical"
    shared = True

    def shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        return n_features, n_features

    def n_parameters(self, n_components: int, n_features: int) -> int:
        return n_features * (n_features + 1) // 2

    def matrices(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        shape = (*shaped.shape[:-2], n_components, n_features, n_features)
        return namespace(shaped).broadcast_to(shaped[..., None, :, :], shape)

    def _of_matrices(self, scale: np.ndarray) -> np.ndarray:
        return scale

    def packed(self, components: Components, frame: Frame, arithmetic: str) -> Packed:
        # −½ ‖z̃‖² + μ̃ᵀz̃ + c − ½ ‖μ̃‖²
        P = contiguous(components.precisions_cholesky)
        means = components.means @ P
        constants = self._constants(components, frame) - 0.5 * (means**2).sum(axis=-1)
        natural = natural_parameters(namespace(means).full_like(means[..., :1], -0.5), means, constants)
        return Packed("spherical", frame.shift, frame.scale, P, natural, arithmetic)

    def from_variances(self, variances: np.ndarray, n_components: int) -> np.ndarray:
        return np.diag(variances)

    def narrow(self, estimate: np.ndarray, total: np.ndarray, floor: np.ndarray) -> np.ndarray:
        return namespace(estimate).zeros_like(estimate[0, :1], dtype=bool)

    def moments(self, statistics: np.ndarray, components: Components, algorithm: str) -> Moments:
        if algorithm == "direct":
            return Moments.of(statistics, components.means)
        whitened = Moments.of(statistics, namespace(components.means).zeros_like(components.means))
        # Σ r z = (Σ r z̃) P⁻¹
        first = whitened.first @ invert_triangular(components.precisions_cholesky.T[None])[0].T
        return Moments(whitened.mass, first, whitened.second, whitened.centres)

    def estimate(self, moments: Moments, algorithm: str, scatter: np.ndarray | None) -> np.ndarray:
        # Σ = (Σ_n ω z zᵀ − Σ_k N_k μ_k μ_kᵀ) / Σ ω, the first term constant; direct: about the centres, summed over k
        if algorithm == "direct" or scatter is None:
            scatter = unpack_symmetric(moments.second.sum(axis=0)[None], moments.first.shape[1])[0]
        offset = moments.offset
        return (scatter - (offset * moments.mass[:, None]).T @ offset) / moments.mass.sum()


class Diag(Covariance):
    """A variance for each feature of every component: φ(z) = (z_i², z_i, 1)."""

    name = feature_map = direct_map = "diag"

    def shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        return n_components, n_features

    def n_parameters(self, n_components: int, n_features: int) -> int:
        return n_components * n_features

    def factor(self, covariances: np.ndarray) -> np.ndarray:
        positive_or_error(covariances, "a variance")
        return 1.0 / namespace(covariances).sqrt(covariances)

    def factor_precisions(self, precisions: np.ndarray) -> np.ndarray:
        positive_or_error(precisions, "a precision")
        return namespace(precisions).sqrt(precisions)

    def multiply(self, factor: np.ndarray) -> np.ndarray:
        return factor**2

    def covariances(self, factor: np.ndarray) -> np.ndarray:
        return 1.0 / factor**2

    def matrices(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return self.diagonals(shaped, n_components, n_features)[..., None] * np.eye(n_features)

    def diagonals(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return shaped

    def rescale(self, covariances: np.ndarray, scale: np.ndarray) -> np.ndarray:
        s = scale[..., None, :]
        return covariances * s * s

    def rescale_factor(self, factor: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return factor / scale[..., None, :]

    def packed(self, components: Components, frame: Frame, arithmetic: str) -> Packed:
        # −½ Σ λ_i z_i² + Σ λ_i μ_i z_i + c − ½ Σ λ_i μ_i²
        precisions = self.multiply(self.diagonals(components.precisions_cholesky, *components.means.shape[-2:]))
        linear = precisions * components.means
        constants = self._constants(components, frame) - 0.5 * (linear * components.means).sum(axis=-1)
        quadratic = -0.5 * (precisions if self.feature_map == "diag" else precisions[..., :1])
        natural = natural_parameters(quadratic, linear, constants)
        return Packed(self.feature_map, frame.shift, frame.scale, None, natural, arithmetic)

    def direct(self, components: Components, frame: Frame, arithmetic: str) -> Direct:
        factors = contiguous(self.diagonals(components.precisions_cholesky, *components.means.shape[-2:]))
        means = contiguous(components.means)
        return Direct("diag", frame.shift, frame.scale, means, factors, self._constants(components, frame), arithmetic)

    def moments(self, statistics: np.ndarray, components: Components, algorithm: str) -> Moments:
        return Moments.of(
            statistics,
            components.means if algorithm == "direct" else namespace(components.means).zeros_like(components.means),
        )

    def estimate(self, moments: Moments, algorithm: str, scatter: np.ndarray | None) -> np.ndarray:
        # σ_i² = Σ r (z_i − a_i)² / N_k − δ_i²
        return moments.mean_of(moments.second) - moments.offset**2

    def second_moments(self, covariances: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return covariances

    def regularize(self, covariances: np.ndarray, floor: np.ndarray) -> np.ndarray:
        return covariances + floor

    def select(self, covariances: np.ndarray, features: np.ndarray) -> np.ndarray:
        return covariances[:, features]

    def from_variances(self, variances: np.ndarray, n_components: int) -> np.ndarray:
        return np.tile(variances, (n_components, 1))

    def narrow(self, estimate: np.ndarray, total: np.ndarray, floor: np.ndarray) -> np.ndarray:
        return namespace(estimate).any((estimate < floor) & (namespace(total).diag(total) > floor), axis=1)

    def cancellation(self, components: Components) -> np.ndarray:
        K, D = components.means.shape[-2:]
        xp = namespace(components.means)
        distances = ((self.diagonals(components.precisions_cholesky, K, D) * components.means) ** 2).sum(axis=-1)
        return xp.amax(xp.where(components.weights > 0, distances, 0.0), -1) + (2 * D + 2)


class Spherical(Diag):
    """One variance for every component: φ(z) = (‖z‖², z_i, 1). The frame has one scale for all features."""

    name, feature_map, direct_map = "spherical", "spherical", "diag"
    isotropic_frame = True

    def shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        return (n_components,)

    def n_parameters(self, n_components: int, n_features: int) -> int:
        return n_components

    def diagonals(self, shaped: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return namespace(shaped).broadcast_to(shaped[..., None], (*shaped.shape, n_features))

    def rescale(self, covariances: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return covariances * scale[..., :1] * scale[..., :1]

    def rescale_factor(self, factor: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return factor / scale[..., :1]

    def estimate(self, moments: Moments, algorithm: str, scatter: np.ndarray | None) -> np.ndarray:
        # σ² = (Σ r ‖z − a‖² / N_k − ‖δ‖²) / D
        D = moments.first.shape[1]
        second = moments.mean_of(moments.second).sum(axis=1)
        return (second - (moments.offset**2).sum(axis=1)) / D

    def second_moments(self, covariances: np.ndarray, n_components: int, n_features: int) -> np.ndarray:
        return n_features * covariances[:, None]

    def regularize(self, covariances: np.ndarray, floor: np.ndarray) -> np.ndarray:
        return covariances + floor.mean(axis=-1)

    def select(self, covariances: np.ndarray, features: np.ndarray) -> np.ndarray:
        return covariances

    def from_variances(self, variances: np.ndarray, n_components: int) -> np.ndarray:
        return np.full(n_components, variances.mean())

    def narrow(self, estimate: np.ndarray, total: np.ndarray, floor: np.ndarray) -> np.ndarray:
        return estimate < floor.mean()


COVARIANCES: Final[dict[str, Covariance]] = {kind.name: kind for kind in (Full(), Tied(), Diag(), Spherical())}
