"""Mixtures, data and the parameters that kernels take, for the kernel tests. The right answers: `tests.oracles`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pytest

from emalgam_kernels import Direct, Packed
from emalgam_kernels.blocks import rows_per_block
from emalgam_kernels.parameters import statistic_count
from tests import oracles
from tests.conftest import SIMULATED
from tests.oracles import LONG, Frame, Gaussians


def random_mixture(rng: np.random.Generator, K: int, D: int, covariance_type: str, spread: float = 3.0) -> Gaussians:
    """Means a few standard deviations apart, covariances with condition numbers below about 30."""

    def covariance() -> np.ndarray:
        orthogonal = np.linalg.qr(rng.normal(size=(D, D)))[0]
        matrix = (orthogonal * rng.uniform(0.3, 3.0, D)) @ orthogonal.T
        return (matrix + matrix.T) / 2

    covariances = {
        "full": lambda: np.stack([covariance() for _ in range(K)]),
        "tied": covariance,
        "diag": lambda: rng.uniform(0.3, 3.0, (K, D)),
        "spherical": lambda: rng.uniform(0.3, 3.0, K),
    }[covariance_type]()
    return Gaussians(rng.dirichlet(np.full(K, 5.0)), rng.normal(0, spread, (K, D)), covariances, covariance_type)


def sample(rng: np.random.Generator, mixture: Gaussians, N: int, dtype: str) -> np.ndarray:
    """N rows of the mixture in `dtype`, every tenth far away (some ten standard deviations)."""
    labels = rng.choice(mixture.n_components, N, p=mixture.weights)
    factors = oracles.cholesky(oracles.full_covariances(mixture)).astype(np.float64)
    noise = rng.normal(size=(N, mixture.n_features))
    noise[5::10] *= 8
    return (mixture.means[labels] + np.einsum("nij,nj->ni", factors[labels], noise)).astype(dtype)


def frame_of(x: np.ndarray, mixture: Gaussians, whiten: bool) -> Frame:
    """Mean and power-of-two scale of the data (one scale for spherical); for `whiten` also W that makes Σ identity."""
    shift, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + 1e-3
    if mixture.covariance_type == "spherical":
        deviation[:] = deviation.mean()
    scale = np.exp2(-np.round(np.log2(deviation)))
    if not whiten:
        return Frame(shift, scale)
    return Frame(shift, scale, precision_in_frame(mixture, Frame(shift, scale))[0].astype(np.float64, order="C"))


def precision_in_frame(mixture: Gaussians, frame: Frame) -> np.ndarray:
    """P_k of the density of z, (K, D, D) long double."""
    return oracles.precision_factors(oracles.in_frame(mixture, frame))


def packed(mixture: Gaussians, frame: Frame, arithmetic: str) -> Packed:
    """The mixture as natural parameters."""
    feature_map = oracles.feature_map_of(mixture.covariance_type)
    natural = oracles.natural_parameters(mixture, frame)
    return Packed(feature_map, frame.shift, frame.scale, frame.whitening, natural, arithmetic)


def direct(mixture: Gaussians, frame: Frame, arithmetic: str) -> Direct:
    """The mixture as means and precision factors; tied shares one factor with a stride of zero."""
    factors = precision_in_frame(mixture, frame).astype(np.float64, order="C")
    feature_map = "full" if mixture.covariance_type in ("full", "tied") else "diag"
    if mixture.covariance_type == "tied":
        factors[1:] = np.nan  # for a kernel that overlooks the stride
        factors = np.broadcast_to(factors[0], factors.shape)
    elif feature_map == "diag":
        factors = np.ascontiguousarray(np.einsum("kdd->kd", factors))
    means, constants = frame.apply(mixture.means).astype(np.float64), oracles.log_constants(mixture)
    return Direct(feature_map, frame.shift, frame.scale, means, factors, constants.astype(np.float64), arithmetic)


@dataclass(frozen=True, eq=False)
class Problem:
    """Data, a mixture, and everything that a test compares with, computed when first asked for and kept."""

    x: np.ndarray
    mixture: Gaussians
    algorithm: str
    given_frame: Frame | None = None

    @cached_property
    def frame(self) -> Frame:
        whiten = self.mixture.covariance_type == "tied" and self.algorithm == "packed"
        return self.given_frame or frame_of(self.x, self.mixture, whiten)

    def parameters(self, arithmetic: str) -> Packed | Direct:
        """What the kernel takes."""
        build = packed if self.algorithm == "packed" else direct
        return build(self.mixture, self.frame, arithmetic)

    @cached_property
    def logits(self) -> np.ndarray:
        return oracles.joint_log_prob(self.x, self.mixture)

    @cached_property
    def log_prob(self) -> np.ndarray:
        return oracles.log_sum_exp(self.logits)

    @cached_property
    def responsibilities(self) -> np.ndarray:
        return oracles.softmax(self.logits)

    def statistics(self, r: np.ndarray, absolute: bool = False) -> np.ndarray:
        """Σ r φ(z) (direct: φ(z − μ_k)) for `r` (N, K) that contains the weights; `absolute`: Σ |r φ|."""
        z = self.frame.apply(self.x)
        parameters = self.parameters("float64")
        means = parameters.means if isinstance(parameters, Direct) else None
        if not absolute:
            return oracles.statistics(r, z, parameters.feature_map, means)
        if means is None:
            return np.abs(r).T @ np.abs(oracles.features(z, parameters.feature_map))
        centred = (z - mean.astype(LONG) for mean in means)
        phi = (np.abs(oracles.features(c, parameters.feature_map)) for c in centred)
        return np.stack([np.abs(r[:, k]) @ p for k, p in enumerate(phi)])

    @cached_property
    def logit_scale(self) -> np.ndarray:
        """By how much rounding grows on the way to L_nk, (N, K): its error is a small multiple of eps times this.

        Packed: the terms of ⟨η, φ(z)⟩ are as large as m² + (x − μ_k)ᵀ Σ_k⁻¹ (x − μ_k), m² the largest squared distance
        of the frame's origin from a mean, in standard deviations of that component. Direct: z − μ_k is off by eps · m
        standard deviations, so its square by eps · m · distance.
        """
        distance = oracles.mahalanobis(self.x, self.mixture).astype(np.float64)
        origin = oracles.mahalanobis(self.frame.shift[None], self.mixture).astype(np.float64)
        constant = np.abs(oracles.log_constants(self.mixture)).astype(np.float64) + self.mixture.n_features
        m_squared = origin.max()
        if self.algorithm == "packed":
            return m_squared + distance + constant
        return np.sqrt(m_squared * distance) + distance + constant

    @cached_property
    def weight(self) -> np.ndarray:
        """Sample weights from 0 to 3, every seventh zero."""
        weight = np.random.default_rng(len(self.x)).uniform(0, 3, len(self.x))
        weight[3::7] = 0
        return weight

    @cached_property
    def weighted_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """S with `weight`, and how rounding grows on the way to it; (K, F) each."""
        r = self.responsibilities * self.weight[:, None]
        scale = self.logit_scale + self.log_prob_scale[:, None]
        return self.statistics(r), self.statistics(r * scale, absolute=True).astype(np.float64)

    @cached_property
    def hard_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """S with `weight` on the largest logit of each row, and Σ |ω r φ|; (K, F) each."""
        r = oracles.hard_responsibilities(self.logits) * self.weight[:, None]
        return self.statistics(r), self.statistics(r, absolute=True).astype(np.float64)

    @cached_property
    def log_prob_scale(self) -> np.ndarray:
        """The same for log p(x_n) = log Σ exp L_nk, whose derivative in L_nk is r_nk; (N,)."""
        return (self.responsibilities * self.logit_scale).sum(axis=1).astype(np.float64) + np.abs(self.log_prob)


SIZES = {
    "one row": (1, 3, 4),
    "one component": (50, 3, 1),
    "one feature": (300, 1, 3),
    "a tile and a row": (513, 2, 3),
    "odd sizes": (1100, 3, 15),
    "features in pieces": (600, 18, 5),
    "a block and a row": (None, 9, 64),
}

# The simulator of CUDA kernels takes a microsecond for each multiplication; its tiles have 32 rows.
TOO_LARGE_FOR_THE_SIMULATOR = ("a block and a row",)
if SIMULATED:
    SIZES |= {
        "one feature": (70, 1, 3),
        "a tile and a row": (33, 2, 3),
        "odd sizes": (100, 3, 7),
        "features in pieces": (40, 18, 5),
    }


@cache
def problem(covariance_type: str, dtype: str, algorithm: str, size: str, offset: float = 0.0) -> Problem:
    """A problem of one of `SIZES`, its data around `offset` (in every feature) instead of the origin."""
    if SIMULATED and size in TOO_LARGE_FOR_THE_SIMULATOR:
        pytest.skip(f"{size}: too large for the simulator of CUDA kernels")
    N, D, K = SIZES[size]
    if N is None:
        feature_map = oracles.feature_map_of(covariance_type)
        N = rows_per_block(K, statistic_count(feature_map, D)) + 1
    rng = np.random.default_rng([N, D, K])
    centred = random_mixture(rng, K, D, covariance_type)
    mixture = Gaussians(centred.weights, centred.means + offset, centred.covariances, covariance_type)
    return Problem(sample(rng, mixture, N, dtype), mixture, algorithm)


def assert_within(actual: np.ndarray, truth: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """Every |actual − truth| ≤ bound; the message names the worst entry. NaN fails."""
    error = np.abs(np.asarray(actual, LONG) - truth)
    limit = np.broadcast_to(np.asarray(bound, LONG), error.shape)
    wrong = ~(error <= limit)
    if wrong.any():
        ratio = np.where(np.isnan(error), np.inf, error / np.maximum(limit, np.finfo(LONG).tiny))
        worst = np.unravel_index(ratio.argmax(), error.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {error.size} entries are off by more than their bound; the worst, at "
            f"{tuple(map(int, worst))}, is {np.asarray(actual)[worst]!r} instead of {np.asarray(truth)[worst]!r}, "
            f"off by {float(error[worst]):.3g}, {float(ratio[worst]):.3g} times the bound"
        )
