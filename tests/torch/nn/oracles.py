"""What likelihoods and bounds should be, from NumPy, SciPy and mpmath alone: nothing here may import what it judges."""

from __future__ import annotations

import mpmath
import numpy as np
from scipy import optimize, special, stats

DIGITS = 400  # exp(h) − 1 for h down to 1e-30 and up to 1e4, without a thought


def log_partition(h: float) -> mpmath.mpf:
    """log ∫₀¹ exp(h x) dx."""
    with mpmath.workdps(DIGITS):
        return mpmath.mpf(0) if h == 0 else mpmath.log(mpmath.expm1(mpmath.mpf(h)) / mpmath.mpf(h))


def continuous_mean(h: float) -> mpmath.mpf:
    """E x for the density ∝ exp(h x) on [0, 1]."""
    with mpmath.workdps(DIGITS):
        return mpmath.mpf("0.5") if h == 0 else 1 / -mpmath.expm1(-mpmath.mpf(h)) - 1 / mpmath.mpf(h)


def continuous_bernoulli(x: float, probability: float) -> float:
    """log of C(λ) λˣ (1 − λ)¹⁻ˣ, Loaiza-Ganem and Cunningham (2019), eq. 7-8."""
    odds = 1 - 2 * probability
    constant = 2.0 if odds == 0 else 2 * np.arctanh(odds) / odds
    return float(np.log(constant) + x * np.log(probability) + (1 - x) * np.log1p(-probability))


def linear_gaussian(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, variance: float) -> np.ndarray:
    """log N(x; b, W Wᵀ + σ² I) of rows: probabilistic PCA (Tipping and Bishop 1999, eq. 4-5)."""
    covariance = weight @ weight.T + variance * np.eye(len(bias))
    return np.atleast_1d(stats.multivariate_normal.logpdf(x, bias, covariance))


def linear_gaussian_posterior(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Means (N, J) and covariance (J, J) of p(z | x): M⁻¹ Wᵀ (x − b) and σ² M⁻¹ (eq. 6-7 there)."""
    inverse = np.linalg.inv(weight.T @ weight + variance * np.eye(weight.shape[1]))
    return (x - bias) @ weight @ inverse, variance * inverse


def vade_bound(
    mean: np.ndarray, variance: np.ndarray, gamma: np.ndarray, prior: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float:
    """Jiang et al. (2017), eq. 12, for one datum, without its reconstruction, and with Σ_c γ_c = 1.

    −½ Σ_c γ_c Σ_j (log σ_c² + σ̃²/σ_c² + (μ̃ − μ_c)²/σ_c²) + Σ_c γ_c log(π_c/γ_c) + ½ Σ_j (1 + log σ̃²).
    """
    weights, means, variances = prior
    total = 0.0
    for c, share in enumerate(gamma):
        terms = np.log(variances[c]) + variance / variances[c] + (mean - means[c]) ** 2 / variances[c]
        total += -0.5 * share * terms.sum() + share * np.log(weights[c]) - special.xlogy(share, share)
    return float(total + 0.5 * (1 + np.log(variance)).sum())


def mixture_log_prob(z: np.ndarray, weights: np.ndarray, means: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """log Σ_c π_c N(z; μ_c, diag σ_c²) of rows."""
    prior = zip(weights, means, variances, strict=True)
    logs = [np.log(w) + stats.norm.logpdf(z, mean, np.sqrt(variance)).sum(1) for w, mean, variance in prior]
    return np.asarray(special.logsumexp(logs, axis=0))


def clustering_accuracy(labels: np.ndarray, truth: np.ndarray) -> float:
    """The share of rows that are right under the best matching of clusters with classes (Jiang et al., section 4)."""
    together = np.zeros((labels.max() + 1, truth.max() + 1))
    np.add.at(together, (labels, truth), 1)
    rows, columns = optimize.linear_sum_assignment(-together)
    return float(together[rows, columns].sum() / len(truth))
