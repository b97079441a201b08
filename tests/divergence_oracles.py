"""What divergences should be, from NumPy, SciPy and mpmath alone: nothing here may import what it judges.

A mixture is `tests.oracles.Gaussians`. Formulas are written out as in the papers, one pair of components at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import mpmath
import numpy as np
from scipy import integrate, stats

from tests.oracles import Gaussians, full_covariances

DIGITS = 50


def exact_kl(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> mpmath.mpf:
    """½ [tr(Σ_q⁻¹ Σ_p) − D + (μ_p − μ_q)ᵀ Σ_q⁻¹ (μ_p − μ_q) − log |Σ_p| / |Σ_q|] at 50 digits; (mean, covariance)."""
    with mpmath.workdps(DIGITS):
        mean_p, mean_q = (mpmath.matrix([mpmath.mpf(float(v)) for v in mean]) for mean, _ in (p, q))
        covariance_p, covariance_q = (
            mpmath.matrix([[mpmath.mpf(float(v)) for v in row] for row in matrix]) for _, matrix in (p, q)
        )
        precision, offset = covariance_q**-1, mean_p - mean_q
        trace = mpmath.fsum((precision * covariance_p)[i, i] for i in range(len(mean_p)))
        square = (offset.T * precision * offset)[0]
        logarithm = mpmath.log(mpmath.det(covariance_p) / mpmath.det(covariance_q))
        return (trace - len(mean_p) + square - logarithm) / 2


def kl(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    """The same in float64, for the formulas below."""
    precision, offset = np.linalg.inv(q[1]), p[0] - q[0]
    difference = np.linalg.slogdet(p[1])[1] - np.linalg.slogdet(q[1])[1]
    return float((np.trace(precision @ p[1]) - len(offset) + offset @ precision @ offset - difference) / 2)


def overlap(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    """∫ f g = N(μ_f; μ_g, Σ_f + Σ_g)."""
    return float(stats.multivariate_normal.pdf(p[0], q[0], p[1] + q[1]))


def components(mixture: Gaussians) -> list[tuple[float, tuple[np.ndarray, np.ndarray]]]:
    """(weight, (mean, covariance)) of each component."""
    covariances = full_covariances(mixture).astype(np.float64)
    pairs = zip(mixture.means, covariances, strict=True)
    return list(zip(mixture.weights.tolist(), pairs, strict=True))


def log_prob(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """log p of rows (N, D)."""
    logs = [np.log(w) + np.atleast_1d(stats.multivariate_normal.logpdf(x, *c)) for w, c in components(mixture)]
    return np.asarray(np.logaddexp.reduce(logs))


def log_sums(p: Gaussians, q: Gaussians, similarity: Callable[..., float]) -> float:
    """Σ_a π_a log Σ_b ω_b similarity(f_a, g_b)."""
    return float(
        sum(w * np.log(sum(v * similarity(f, g) for v, g in components(q))) for w, f in components(p) if w > 0)
    )


def closeness(f: tuple[np.ndarray, np.ndarray], g: tuple[np.ndarray, np.ndarray]) -> float:
    """exp(−KL(f ‖ g))."""
    return float(np.exp(-kl(f, g)))


def mean_entropy(p: Gaussians) -> float:
    """Σ_a π_a ½ log |2πe Σ_a|."""
    return float(sum(w * np.linalg.slogdet(2 * np.pi * np.e * f[1])[1] / 2 for w, f in components(p)))


def variational(p: Gaussians, q: Gaussians) -> float:
    """Hershey and Olsen (2007), section 7."""
    return log_sums(p, p, closeness) - log_sums(p, q, closeness)


def product_of_gaussians(p: Gaussians, q: Gaussians) -> float:
    """Hershey and Olsen (2007), section 5."""
    return log_sums(p, p, overlap) - log_sums(p, q, overlap)


def matched(p: Gaussians, q: Gaussians) -> float:
    """Hershey and Olsen (2007), section 6."""
    return float(
        sum(
            w * min(kl(f, g) + np.log(w) - np.log(v) for v, g in components(q) if v > 0)
            for w, f in components(p)
            if w > 0
        )
    )


def unscented(p: Gaussians, q: Gaussians) -> float:
    """Hershey and Olsen (2007), section 3."""
    total, D = 0.0, p.n_features
    for weight, (mean, covariance) in components(p):
        values, vectors = np.linalg.eigh(covariance)
        for i, sign in product(range(D), (-1, 1)):
            point = (mean + sign * np.sqrt(D * values[i]) * vectors[:, i])[None]
            total += weight / (2 * D) * float(log_prob(point, p)[0] - log_prob(point, q)[0])
    return total


def bounds(p: Gaussians, q: Gaussians) -> tuple[float, float]:
    """Durrieu, Thiran, Kelly (2012)."""
    entropy = mean_entropy(p)
    lower = log_sums(p, p, closeness) - log_sums(p, q, overlap) - entropy
    return lower, log_sums(p, p, overlap) - log_sums(p, q, closeness) + entropy


def entropy_bounds(p: Gaussians) -> tuple[float, float]:
    """Huber et al. (2008)."""
    labels = -sum(w * np.log(w) for w in p.weights if w > 0)
    return -log_sums(p, p, overlap), float(mean_entropy(p) + labels)


def mean_over(p: Gaussians, f: Callable[[np.ndarray], np.ndarray]) -> float:
    """∫ p(x) f(x) dx in one dimension, f of rows (N, 1), by adaptive quadrature between the components."""
    deviations = np.sqrt(full_covariances(p).astype(np.float64)[:, 0, 0])
    steps = np.array([-14.0, -4.0, -1.0, 0.0, 1.0, 4.0, 14.0])
    edges = np.unique(p.means[:, 0, None] + deviations[:, None] * steps)

    def integrand(x: float) -> float:
        row = np.array([[x]])
        return float(np.exp(log_prob(row, p)[0]) * f(row)[0])

    pieces = pairwise(edges)
    return float(sum(integrate.quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12, limit=200)[0] for a, b in pieces))


def integrated_kl(p: Gaussians, q: Gaussians) -> float:
    """KL(p ‖ q) in one dimension."""
    return mean_over(p, lambda x: log_prob(x, p) - log_prob(x, q))


def integrated_jensen_shannon(p: Gaussians, q: Gaussians) -> float:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), in one dimension."""

    def log_average(x: np.ndarray) -> np.ndarray:
        return np.logaddexp(log_prob(x, p), log_prob(x, q)) - np.log(2)

    halves = (mean_over(each, lambda x, each=each: log_prob(x, each) - log_average(x)) for each in (p, q))
    return sum(halves) / 2


def integrated_entropy(p: Gaussians) -> float:
    """−∫ p log p in one dimension."""
    return -mean_over(p, lambda x: log_prob(x, p))


def merge_cost(p: Gaussians, i: int, j: int) -> float:
    """Runnalls (2007): ½ [(w_i + w_j) log |Σ_ij| − w_i log |Σ_i| − w_j log |Σ_j|] of full covariances."""
    (w, (mean_i, covariance_i)), (v, (mean_j, covariance_j)) = components(p)[i], components(p)[j]
    offset = mean_i - mean_j
    both = (w * covariance_i + v * covariance_j) / (w + v) + w * v / (w + v) ** 2 * np.outer(offset, offset)
    logs = [np.linalg.slogdet(matrix)[1] for matrix in (both, covariance_i, covariance_j)]
    return float(((w + v) * logs[0] - w * logs[1] - v * logs[2]) / 2)
