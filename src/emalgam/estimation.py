"""Least squares and maximum likelihood: `ols`, and Gaussian, Bernoulli and categorical estimates.

Every function takes sample weights ω: a row of weight 2 counts as the row twice, a row of weight zero not at all.
Leading axes are a batch of independent problems. Log-likelihoods are in nats, and 0 log 0 = 0. All is computed on the
host in float64, whatever real type the data have. How least squares are solved: `emalgam.least_squares`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from emalgam.blas import one_blas_thread
from emalgam.information import check_distributions, check_probabilities
from emalgam.least_squares import DEPENDENT, ELEMENTS_AT_ONCE, EPS, LeastSquares, Rows, Triangle, ols
from emalgam.namespace import invert_triangular
from emalgam.packing import LOG_2_PI
from emalgam.validation import (
    broadcast,
    check_array,
    check_integer,
    check_weight_of,
    factor_covariances,
    first_index,
    in_words,
)

MOST_COUNTS: Final = 2**30  # of categories in all problems: 8 GB

__all__ = [
    "GaussianEstimate",
    "LeastSquares",
    "bernoulli_log_likelihood",
    "bernoulli_map",
    "bernoulli_mle",
    "categorical_log_likelihood",
    "categorical_mle",
    "gaussian_log_likelihood",
    "gaussian_mle",
    "ols",
]


# ---- Gaussian


@dataclass(frozen=True, eq=False)
class GaussianEstimate:
    """The result of `gaussian_mle`; batch axes (...) come first.

    Attributes
    ----------
    mean : (..., D) float64
    covariance : (..., D, D) float64
        Divided by Σ ω: the maximum-likelihood estimate, without Bessel's correction.
    log_likelihood : float
        Σ_n ω_n log N(x_n; mean, covariance) in nats, the largest that a Gaussian reaches. inf if the data lie in a
        hyperplane, where it has no bound.
    """

    mean: np.ndarray
    covariance: np.ndarray
    log_likelihood: float | np.ndarray


def gaussian_mle(X: Any, sample_weight: Any = None) -> GaussianEstimate:
    """μ = Σ ω x / Σ ω and Σ = Σ ω (x − μ)(x − μ)ᵀ / Σ ω: the Gaussian of greatest likelihood.

    Parameters
    ----------
    X : (..., N, D) array of real numbers
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    GaussianEstimate

    Raises
    ------
    ValueError
        For a wrong shape, NaN, infinity or negative weights, naming the index.

    References
    ----------
    Bishop (2006), eq. 2.121-2.122.

    Examples
    --------
    >>> estimate = gaussian_mle([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0], [3.0, 2.0]])
    >>> estimate.mean.round(6), estimate.covariance.round(6)
    (array([2., 1.]), array([[1., 0.], [0., 1.]]))
    >>> round(float(estimate.log_likelihood), 6)
    -11.351508
    """
    x = _check_samples("X", X)
    weight = check_weight_of(sample_weight, x.shape[:-1])
    (*batch, N, D) = x.shape
    x, weight = x.reshape(-1, N, D), weight.reshape(-1, N)
    step = max(ELEMENTS_AT_ONCE // (N * D), 1)
    groups = [slice(start, start + step) for start in range(0, len(x), step)]
    with one_blas_thread():
        parts = [_gaussian(x[group], weight[group]) for group in groups]
    mean, covariance, log_likelihood = (np.concatenate(part) for part in zip(*parts, strict=True))
    return GaussianEstimate(
        mean.reshape(*batch, D), covariance.reshape(*batch, D, D), log_likelihood.reshape(batch)[()]
    )


def _gaussian(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (B, D), covariance (B, D, D) and log-likelihood (B,) of x (B, N, D) with weights (B, N)."""
    B, _, D = x.shape
    # The weights go along as a right-hand side, for x is to be centred before it is multiplied by any.
    rows = Rows.of(x, weight[:, :, None], weight)
    rows = replace(rows, weight=np.broadcast_to(1.0, weight.shape), root_scale=np.ones(B))

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((np.where(mine > 0, z, 0.0), mine) for _, z, mine in rows.blocks(D))

    total, mass = np.zeros((B, 1, D)), np.zeros((B, 1, 1))
    for z, mine in blocks():
        total += mine.swapaxes(1, 2) @ z
        mass += mine.sum(axis=1, keepdims=True)
    mean = total / mass
    # Beside the rows √ω (x − mean) goes √ω: RᵀQᵀ√ω is Σ ω (x − mean), what rounding has left out of the mean.
    triangle = Triangle.of_blocks((np.sqrt(mine) * (z - mean), np.sqrt(mine)) for z, mine in blocks())
    upper = triangle.upper / np.sqrt(mass)
    offset = triangle.projected.swapaxes(1, 2) @ triangle.upper / mass
    # Σ = RᵀR / Σω − δδᵀ
    covariance = upper.swapaxes(1, 2) @ upper - offset.swapaxes(1, 2) * offset
    covariance = 0.5 * (covariance + covariance.swapaxes(1, 2))
    scale = rows.x_scale
    with np.errstate(over="ignore", under="ignore"):
        covariance = covariance / scale[:, :, None] / scale[:, None]
    weight_sum = mass[:, 0, 0] / rows.y_scale[:, 0]
    return ((mean + offset)[:, 0] / scale, covariance, _largest_log_likelihood(upper, mean[:, 0], scale, weight_sum))


def _largest_log_likelihood(upper: np.ndarray, mean: np.ndarray, scale: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """−½ Σω (D log 2πe + log |Σ|) (B,), from the factor R with RᵀR = Σ in the frame."""
    diagonal = np.abs(np.einsum("bii->bi", upper))
    # What rounding leaves of a feature that is constant, or a combination of others.
    rounding = DEPENDENT * np.linalg.norm(upper, axis=1) + 4 * EPS * np.abs(mean)
    flat = (diagonal <= rounding).any(axis=1)
    log_det = 2.0 * (np.log(np.where(flat[:, None], 1.0, diagonal)) - np.log(scale)).sum(axis=1)
    return np.where(flat, np.inf, -0.5 * mass * (mean.shape[1] * (1.0 + LOG_2_PI) + log_det))


def gaussian_log_likelihood(mean: Any, covariance: Any, X: Any, sample_weight: Any = None) -> np.ndarray | float:
    """Σ_n ω_n log N(x_n; μ, Σ).

    With x_n the residuals of a regression this is the likelihood of its coefficients: the largest where the sum of
    squares is the least.

    Parameters
    ----------
    mean : (D,) or (..., D) array of real numbers
    covariance : (D, D) or (..., D, D) array of real numbers
    X : (N, D) or (..., N, D) array of real numbers
        Leading axes of all three broadcast.
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    (...) float64
        In nats.

    Raises
    ------
    ValueError
        For shapes that do not fit, numbers that are not finite, and a covariance that is not symmetric and positive
        definite, naming the index.

    References
    ----------
    Bishop (2006), eq. 2.118.

    Examples
    --------
    >>> round(float(gaussian_log_likelihood([0.0], [[1.0]], [[0.0], [1.0]])), 6)
    -2.337877
    """
    x = _check_samples("X", X)
    N, D = x.shape[-2:]
    centre, lower = check_array("mean", mean), factor_covariances("covariance", covariance)
    if centre.shape[-1:] != (D,) or lower.shape[-1] != D:
        raise ValueError(
            f"mean has shape {centre.shape} and covariance {lower.shape}; expected (..., {D}) and (..., {D}, {D}) "
            f"for X of shape {x.shape}"
        )
    weight = check_weight_of(sample_weight, x.shape[:-1])
    batch = broadcast("leading axes", mean=centre.shape[:-1], covariance=lower.shape[:-2], X=x.shape[:-2])
    whitening = invert_triangular(lower.reshape(-1, D, D)).reshape(lower.shape).swapaxes(-1, -2)
    constant = 0.5 * D * LOG_2_PI + np.log(np.einsum("...ii->...i", lower)).sum(axis=-1)
    total: Any = 0.0
    step = max(ELEMENTS_AT_ONCE // (D * max(math.prod(batch), 1)), 1)
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, N, step):
            rows = slice(start, start + step)
            y = (x[..., rows, :].astype(np.float64) - centre[..., None, :]) @ whitening
            log_prob = -0.5 * (y * y).sum(axis=-1) - constant[..., None]
            total = total + np.where(weight[..., rows] > 0, weight[..., rows] * log_prob, 0.0).sum(axis=-1)
    return total


# ---- coins and categories


def bernoulli_mle(x: Any, sample_weight: Any = None) -> np.ndarray | float:
    """θ = Σ ω x / Σ ω, the share of ones: the probability of greatest likelihood.

    All ones give 1, which no sample from a fair coin deserves: see `bernoulli_map`.

    Parameters
    ----------
    x : (..., N) array of 0 and 1
        Samples along the last axis.
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    (...) float64

    Raises
    ------
    ValueError
        For values other than 0 and 1 and for negative weights, naming the index.

    References
    ----------
    Bishop (2006), eq. 2.7-2.8.

    Examples
    --------
    >>> float(bernoulli_mle([1, 1, 1, 0, 0]))
    0.6
    """
    ones, zeros = _coin_counts(x, sample_weight)
    return (ones / (ones + zeros))[()]


def bernoulli_map(x: Any, alpha: Any, beta: Any, sample_weight: Any = None) -> np.ndarray | float:
    """The mode of the posterior Beta(α + N₁, β + N₀): the prior Beta(α, β) counts as α − 1 ones and β − 1 zeros.

    Parameters
    ----------
    x : (..., N) array of 0 and 1
        Samples along the last axis.
    alpha, beta : (...) array of real numbers > 0
        Of the prior; both 1 is the uniform one, for which this is the maximum-likelihood estimate.
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    (...) float64

    Raises
    ------
    ValueError
        As for `bernoulli_mle`; and if the posterior has no mode, because α + N₁ < 1 or β + N₀ < 1: its density is
        unbounded at 0 or 1.

    References
    ----------
    Murphy (2012), eq. 3.21.

    Examples
    --------
    >>> float(bernoulli_map([1, 1, 1], alpha=2, beta=2))
    0.8
    """
    prior = {"alpha": check_array("alpha", alpha), "beta": check_array("beta", beta)}
    for name, value in prior.items():
        if (value <= 0).any():
            index = first_index(value <= 0)
            raise ValueError(f"{name} is {value[index]:g}{in_words(index)}; expected a number > 0")
    ones, zeros = _coin_counts(x, sample_weight)
    broadcast("leading axes", x=ones.shape, alpha=prior["alpha"].shape, beta=prior["beta"].shape)
    first, second = np.broadcast_arrays(prior["alpha"] + ones, prior["beta"] + zeros)
    wrong = (first < 1) | (second < 1)
    if wrong.any():
        index = first_index(wrong)
        raise ValueError(
            f"the posterior Beta({first[index]:g}, {second[index]:g}){in_words(index)} has no mode: its density is "
            "unbounded at 0 or 1; expected alpha and beta >= 1"
        )
    flat = (first == 1) & (second == 1)
    if flat.any():
        where = in_words(first_index(flat))
        raise ValueError(f"the posterior Beta(1, 1){where} has no mode: it is uniform; expected a larger alpha or beta")
    return ((first - 1) / (first - 1 + (second - 1)))[()]


def bernoulli_log_likelihood(theta: Any, x: Any, sample_weight: Any = None) -> np.ndarray | float:
    """Σ_n ω_n (x_n log θ + (1 − x_n) log(1 − θ)): of the samples in their order, not of their count.

    Parameters
    ----------
    theta : (...) array of real numbers
        Probability of a one; a grid of them gives the likelihood function.
    x : (..., N) array of 0 and 1
        Samples along the last axis; leading axes broadcast with those of theta.
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    (...) float64
        In nats; −inf for what cannot happen.

    Raises
    ------
    ValueError
        For values other than 0 and 1, and probabilities that are none, naming the index.

    References
    ----------
    Bishop (2006), eq. 2.6.

    Examples
    --------
    >>> import math
    >>> round(math.exp(bernoulli_log_likelihood(0.6, [1, 1, 1, 0, 0])), 5)
    0.03456
    >>> bernoulli_log_likelihood([0.0, 0.5, 1.0], [1, 1]).round(6)
    array([     -inf, -1.386294,  0.      ])
    """
    probability = check_probabilities("theta", theta)
    ones, zeros = _coin_counts(x, sample_weight)
    broadcast("leading axes", theta=probability.shape, x=ones.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = np.where(ones > 0, ones * np.log(probability), 0.0)
        tails = np.where(zeros > 0, zeros * np.log1p(-probability), 0.0)
    return (heads + tails)[()]


def categorical_mle(labels: Any, n_categories: int | None = None, *, sample_weight: Any = None) -> np.ndarray:
    """p_k = Σ_n ω_n [label_n = k] / Σ_n ω_n, the shares: the probabilities of greatest likelihood.

    Equally those of least cross entropy, and least KL, from the distribution of the labels. To estimate from counts,
    give each category once with its count for a weight.

    Parameters
    ----------
    labels : (..., N) array of int
        From 0 to K − 1; samples along the last axis.
    n_categories : int, optional
        K. None means one more than the largest label. Times the number of problems it must not exceed 2³⁰.
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    (..., K) float64

    Raises
    ------
    ValueError
        For labels that are no integers from 0 to K − 1, and for one that makes too many categories, naming the index.

    References
    ----------
    Bishop (2006), eq. 2.33.

    Examples
    --------
    >>> categorical_mle([0, 2, 2, 1])
    array([0.25, 0.25, 0.5 ])
    >>> categorical_mle([0, 1, 2], sample_weight=[3, 1, 0])
    array([0.75, 0.25, 0.  ])
    """
    given = _check_labels(labels)
    counts = _category_counts(given, _number_of_categories(given, n_categories), sample_weight)
    return counts / counts.sum(axis=-1, keepdims=True)


def categorical_log_likelihood(probabilities: Any, labels: Any, sample_weight: Any = None) -> np.ndarray | float:
    """Σ_n ω_n log p(label_n).

    Parameters
    ----------
    probabilities : (..., K) array of real numbers
        Distributions along the last axis, checked as `emalgam.information.entropy` checks them.
    labels : (..., N) array of int
        From 0 to K − 1; leading axes broadcast with those of the probabilities.
    sample_weight : (N,) or (..., N) array, optional
        ω_n ≥ 0.

    Returns
    -------
    (...) float64
        In nats; −inf if a label has probability zero.

    Raises
    ------
    ValueError
        For labels that are no integers from 0 to K − 1 and distributions that are none, naming the index.

    References
    ----------
    Bishop (2006), eq. 2.29.

    Examples
    --------
    >>> round(float(categorical_log_likelihood([0.5, 0.25, 0.25], [0, 0, 1])), 6)
    -2.772589
    """
    distribution = check_distributions("probabilities", probabilities)
    counts = _category_counts(_check_labels(labels), distribution.shape[-1], sample_weight)
    broadcast("leading axes", probabilities=distribution.shape[:-1], labels=counts.shape[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, counts * np.log(distribution), 0.0).sum(axis=-1)


def _coin_counts(x: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Σ ω x and Σ ω (1 − x), (...) float64 both, each exactly zero where nothing is in it."""
    coins = check_array("x", x)
    if coins.ndim == 0 or 0 in coins.shape:
        raise ValueError(f"x has shape {coins.shape}; expected at least one sample along the last axis")
    wrong = (coins != 0) & (coins != 1)
    if wrong.any():
        index = first_index(wrong)
        raise ValueError(f"x is {coins[index]}{in_words(index)}; expected 0 or 1")
    weight = check_weight_of(sample_weight, coins.shape)
    heads = coins != 0
    return np.where(heads, weight, 0.0).sum(axis=-1), np.where(heads, 0.0, weight).sum(axis=-1)


def _check_labels(labels: Any) -> np.ndarray:
    """Labels (..., N) of an integer type, at least one."""
    given = check_array("labels", labels)
    if given.dtype.kind == "f" or given.ndim == 0 or 0 in given.shape:
        raise ValueError(f"labels has dtype {given.dtype} and shape {given.shape}; expected integers, at least one")
    return given


def _number_of_categories(labels: np.ndarray, n_categories: int | None) -> int:
    """K, as given or one more than the largest label; ValueError if there would be more counts than memory is for."""
    largest = max(int(labels.max()), 0)
    K = largest + 1 if n_categories is None else check_integer("n_categories", n_categories, 1)
    if (counts := K * math.prod(labels.shape[:-1])) <= MOST_COUNTS:
        return K
    if n_categories is not None:
        raise ValueError(f"n_categories is {K}, which makes {counts} counts; expected at most {MOST_COUNTS}")
    raise ValueError(
        f"labels is {largest}{in_words(first_index(labels == largest))}, which makes {counts} counts; expected at most "
        f"{MOST_COUNTS}: number the labels without gaps, np.unique(labels, return_inverse=True)[1]"
    )


def _category_counts(labels: np.ndarray, K: int, sample_weight: Any) -> np.ndarray:
    """Σ_n ω_n [label_n = k], (..., K) float64."""
    wrong = (labels < 0) | (labels >= K)
    if wrong.any():
        index = first_index(wrong)
        raise ValueError(f"labels is {labels[index]}{in_words(index)}; expected integers from 0 to {K - 1}")
    weight = check_weight_of(sample_weight, labels.shape)
    flat = labels.reshape(-1, labels.shape[-1]).astype(np.int64)
    cells = (flat + K * np.arange(len(flat))[:, None]).ravel()
    return np.bincount(cells, weight.ravel(), K * len(flat)).reshape(*labels.shape[:-1], K)


def _check_samples(name: str, values: Any) -> np.ndarray:
    """Samples (..., N, D), at least one."""
    x = check_array(name, values)
    if x.ndim < 2 or 0 in x.shape:
        hint = f" (for one feature: {name}.reshape(-1, 1))" if x.ndim == 1 else ""
        raise ValueError(f"{name} has shape {x.shape}; expected (samples, features), or a batch of such{hint}")
    return x
