"""Information, entropy, divergence and Bayes' rule of discrete distributions; entropy of Gaussians; a mixture's ELBO.

A discrete distribution is a vector of K probabilities along the last axis; leading axes are a batch and broadcast.
Results are in nats unless another base of the logarithm is named. Throughout, 0 log 0 = 0.
"""

from __future__ import annotations

import numbers
from dataclasses import replace
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np

from emalgam import arrays, backends
from emalgam.mixture import WEIGHT_SUM_TOLERANCE, Mixture
from emalgam.packing import LOG_2_PI
from emalgam.validation import (
    check_array,
    check_data,
    check_finite,
    factor_covariances,
    first_index,
    in_words,
    real_array,
)
from emalgam_kernels import Direct
from emalgam_kernels.blocks import default_threads, for_each_block

ELEMENTS_AT_ONCE: Final = 2**16  # of a block of rows: its arrays stay in the second cache
NEAR: Final = 0.25  # |s| below which a term of the divergence is summed as a series
ATANH_SERIES: Final = 1.0 / np.arange(3, 31, 2)  # atanh s − s = s³ (1/3 + s²/5 + …); the rest is below 2⁻⁵⁶ s²
LEAST_EXPONENT: Final = -(2**20)  # below that of any product
LARGEST: Final = 0.5 * float(np.finfo(np.float64).max)  # half: sums of such terms have to stay finite


class ElboDecomposition(NamedTuple):
    """log p(x_n) in two parts; both (N,) float64, in nats.

    Attributes
    ----------
    elbo : (N,) float64
        The evidence lower bound, Σ_k q_nk log(w_k N(x_n; μ_k, Σ_k) / q_nk).
    kl : (N,) float64
        Σ_k q_nk log(q_nk / r_nk) ≥ 0, the divergence of q from the posterior r.
    """

    elbo: np.ndarray
    kl: np.ndarray


class Posterior(NamedTuple):
    """What `posterior` returns.

    Attributes
    ----------
    probabilities : (..., K) float64
        P(z = k given x).
    evidence : (...) float64
        P(x), the total probability of what was observed.
    """

    probabilities: np.ndarray
    evidence: np.ndarray | float


# ---- discrete distributions


def information_content(p: Any, base: float | None = None) -> np.ndarray | float:
    """−log p: how much is learnt when an event of probability p happens.

    Parameters
    ----------
    p : (...) array of real numbers
        Probabilities from 0 to 1, of any events: they need not sum to one.
    base : float, optional
        Base of the logarithm, > 1; 2 gives bits. None gives nats.

    Returns
    -------
    (...) float64
        inf where p is zero.

    Raises
    ------
    ValueError
        Naming the first index at which p is not a number from 0 to 1.

    References
    ----------
    Shannon (1948), section 6.

    Examples
    --------
    >>> float(information_content(0.125, base=2))
    3.0
    """
    probabilities = check_probabilities("p", p)
    with np.errstate(divide="ignore"):
        return (-np.log(probabilities) / _unit(base) + 0.0)[()]


def entropy(p: Any, base: float | None = None) -> np.ndarray | float:
    """H(P) = −Σ_k p_k log p_k.

    Parameters
    ----------
    p : (..., K) array of real numbers
        Probabilities ≥ 0 that sum to one along the last axis. A sum that is wrong by up to 1e-6, as from float32, is
        divided out.
    base : float, optional
        Base of the logarithm, > 1; 2 gives bits. None gives nats.

    Returns
    -------
    (...) float64
        From 0 to log K.

    Raises
    ------
    ValueError
        For probabilities that are negative, NaN or do not sum to one, naming the first such distribution and its sum.

    References
    ----------
    Shannon (1948), section 6.

    Examples
    --------
    >>> float(entropy([0.5, 0.5], base=2))
    1.0
    >>> entropy([[1.0, 0.0], [0.75, 0.25]]).round(6)
    array([0.      , 0.562335])
    """
    distribution = check_distributions("p", p)
    return (_expected_information(distribution, distribution) / _unit(base))[()]


def cross_entropy(p: Any, q: Any, base: float | None = None) -> np.ndarray | float:
    """H(P, Q) = −Σ_k p_k log q_k = H(P) + KL(P ‖ Q): the mean code length of P with the code for Q.

    Parameters
    ----------
    p, q : (..., K) array of real numbers
        Distributions along the last axis, as for `entropy`; leading axes broadcast.
    base : float, optional
        As for `entropy`.

    Returns
    -------
    (...) float64
        inf where p_k > 0 and q_k = 0 for some k.

    Raises
    ------
    ValueError
        As for `entropy`; and for shapes that do not broadcast.

    References
    ----------
    Cover & Thomas (2006), theorem 5.4.3.

    Examples
    --------
    >>> float(cross_entropy([0.75, 0.25], [0.5, 0.5], base=2))
    1.0
    """
    first, second = _same_outcomes(p, q)
    return (_expected_information(first, second) / _unit(base))[()]


def kl_discrete(p: Any, q: Any, base: float | None = None) -> np.ndarray | float:
    """KL(P ‖ Q) = Σ_k p_k log(p_k / q_k).

    It is computed as Σ_k p_k log(p_k / q_k) − p_k + q_k, no term of which is negative: P = Q gives exactly zero, and
    a tiny divergence keeps its digits.

    Parameters
    ----------
    p, q : (..., K) array of real numbers
        Distributions along the last axis, as for `entropy`; leading axes broadcast.
    base : float, optional
        As for `entropy`.

    Returns
    -------
    (...) float64
        ≥ 0; inf where p_k > 0 and q_k = 0 for some k.

    Raises
    ------
    ValueError
        As for `cross_entropy`.

    References
    ----------
    Kullback & Leibler (1951); Cover & Thomas (2006), eq. 2.26.

    Examples
    --------
    >>> coin, fair = [0.75, 0.25], [0.5, 0.5]
    >>> round(float(kl_discrete(coin, fair)), 4), round(float(kl_discrete(fair, coin)), 4)
    (0.1308, 0.1438)
    >>> float(kl_discrete(coin, coin))
    0.0
    """
    first, second = _same_outcomes(p, q)
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        ratio = first / second
        ordinary = (ratio > np.finfo(np.float64).tiny) & (ratio < np.inf)
        log_ratio = np.where(ordinary, np.log(ratio), np.log(first) - np.log(second))
    return (_divergence_terms(first, second, log_ratio).sum(axis=-1) / _unit(base))[()]


def posterior(prior: Any, likelihood: Any) -> Posterior:
    """Bayes' rule: P(z = k given x) = P(z = k) P(x given z = k) / P(x), and the total probability that divides.

    P(x) = Σ_k P(z = k) P(x given z = k). The responsibilities of a mixture are this with weights and densities.

    Parameters
    ----------
    prior : (..., K) array of real numbers
        P(z = k): distributions along the last axis, as for `entropy`.
    likelihood : (..., K) array of real numbers
        P(x given z = k) ≥ 0, a probability or a density: it need not sum to one. Leading axes broadcast.

    Returns
    -------
    Posterior
        ``probabilities, evidence``; digits are kept where prior times likelihood would underflow or overflow.

    Raises
    ------
    ValueError
        As for `entropy`; for likelihoods that are negative or not finite, naming the index; for shapes that do not
        broadcast; and where the evidence is zero: what cannot happen has no posterior.

    References
    ----------
    Bishop (2006), eq. 1.12-1.13.

    Examples
    --------
    Half of a group are married. Of those one in five is childless, of the others three in five:

    >>> married, childless = posterior([0.5, 0.5], [0.2, 0.6])
    >>> married.round(6), round(float(childless), 6)
    (array([0.25, 0.75]), 0.4)
    """
    first, second = check_distributions("prior", prior), check_array("likelihood", likelihood).astype(np.float64)
    _check_same_outcomes("prior", first, "likelihood", second)
    if (second < 0).any():
        index = first_index(second < 0)
        raise ValueError(f"likelihood is {second[index]:g}{in_words(index)}; expected numbers >= 0")
    # Numbers as m 2^e with ½ ≤ m < 1: a product neither overflows nor underflows, nor do sums relative to the largest.
    (m_1, e_1), (m_2, e_2) = np.frexp(first), np.frexp(second)
    product, exponent = m_1 * m_2, e_1 + e_2
    top = np.where(product > 0, exponent, LEAST_EXPONENT).max(axis=-1, keepdims=True)
    if (top == LEAST_EXPONENT).any():
        where = in_words(first_index(top[..., 0] == LEAST_EXPONENT))
        raise ValueError(f"likelihood{where} is zero wherever the prior is not; what cannot happen has no posterior")
    with np.errstate(over="ignore", under="ignore"):
        joint = np.ldexp(product, exponent - top)
        total = joint.sum(axis=-1, keepdims=True)
        evidence = np.minimum(np.ldexp(total, top), 2 * LARGEST)  # no larger than a likelihood, but for rounding
        return Posterior(joint / total, evidence[..., 0][()])


# ---- Gaussians and mixtures


def gaussian_entropy(covariance: Any) -> np.ndarray | float:
    """H = ½ log |2πe Σ|, the differential entropy of N(μ, Σ); may be negative.

    Parameters
    ----------
    covariance : (..., D, D) array of real numbers
        Σ, or a stack of them.

    Returns
    -------
    (...) float64
        In nats.

    Raises
    ------
    ValueError
        Naming the first matrix that is not finite, symmetric and positive definite.

    References
    ----------
    Cover & Thomas (2006), theorem 8.4.1.

    Examples
    --------
    >>> round(float(gaussian_entropy([[1.0]])), 6)
    1.418939
    """
    lower = factor_covariances("covariance", covariance)
    log_det = np.log(np.einsum("...ii->...i", lower)).sum(axis=-1)
    return (0.5 * lower.shape[-1] * (1.0 + LOG_2_PI) + log_det)[()]


def elbo_decomposition(mixture: Any, X: Any, q: Any) -> ElboDecomposition:
    """log p(x_n) = ELBO_n + KL_n for any distributions q_n over the components.

    The E-step sets q to the responsibilities, which makes the KL zero; the M-step raises the ELBO.

    Parameters
    ----------
    mixture : Mixture, or a fitted GaussianMixture
    X : (N, D) array of real numbers
    q : (N, K) or (K,) array of real numbers
        q_n over the components, or one for all rows; checked as `entropy` checks its argument.

    Returns
    -------
    ElboDecomposition
        ``elbo, kl``, each (N,) float64. A q_nk > 0 on a component of weight zero gives −inf and inf.

    Raises
    ------
    ValueError
        For data or probabilities that the mixture cannot take, naming the row.

    References
    ----------
    Bishop (2006), eq. 9.70-9.72; Neal & Hinton (1998).

    Examples
    --------
    >>> from emalgam import Mixture
    >>> coin = Mixture([0.5, 0.5], [[-1.0], [1.0]], [1.0, 1.0], "spherical")
    >>> elbo, kl = elbo_decomposition(coin, [[0.0], [3.0]], [0.5, 0.5])
    >>> kl.round(4)
    array([0.    , 2.3093])
    >>> bool(abs(elbo + kl - coin.log_prob([[0.0], [3.0]])).max() < 1e-14)
    True
    """
    model = getattr(mixture, "mixture_", mixture)
    if not isinstance(model, Mixture):
        raise ValueError(f"mixture is a {type(mixture).__name__}; expected a Mixture or a fitted GaussianMixture")
    data = check_data(arrays.to_numpy(X, "X"), n_features=model.n_features, name="X")
    check_finite(data, "X")
    K, D = model.means.shape
    posterior = check_distributions("q", q)
    if posterior.shape not in {(K,), (len(data), K)}:
        raise ValueError(f"q has shape {posterior.shape}; expected ({len(data)}, {K}) or ({K},)")
    posterior = np.broadcast_to(posterior, (len(data), K))
    # The kernels are chosen here: threads do not know what `emalgam.use_backend` says.
    components, kernels = _alone(model), backends.host_kernels("mixture")
    parts = ElboDecomposition(np.empty(len(data)), np.empty(len(data)))

    def block(start: int, stop: int) -> None:
        rows = slice(start, stop)
        logits = _joint_log_prob(data[rows], components, kernels)
        parts.elbo[rows], parts.kl[rows] = _decompose(logits, np.ascontiguousarray(posterior[rows].T))

    for_each_block(block, len(data), max(ELEMENTS_AT_ONCE // (K + D), 1), default_threads())
    return parts


def _alone(model: Mixture) -> list[Direct]:
    """Each component with its weight, as if it were a mixture: what log w_k N(x; μ_k, Σ_k) is the log-density of."""
    whole = model.direct()
    own = (slice(k, k + 1) for k in range(whole.n_components))
    return [
        replace(
            whole,
            means=whole.means[k],
            precisions_cholesky=whole.precisions_cholesky[k],
            log_constants=whole.log_constants[k],
        )
        for k in own
    ]


def _joint_log_prob(x: np.ndarray, components: list[Direct], kernels: ModuleType) -> np.ndarray:
    """L_kn = log w_k N(x_n; μ_k, Σ_k) = c_k − ½ ‖P_kᵀ (z_n − μ_k)‖², (K, N) float64."""
    logits = np.full((len(components), len(x)), -np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, component in zip(logits, components, strict=True):
            if component.log_constants[0] > -np.inf:
                kernels.log_prob(x, component, row)
                # Of a square that overflows, as much as float64 can hold: log p stays a finite number.
                np.fmax(row, -LARGEST, out=row)
    return logits


def _decompose(logits: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ELBO and KL of each row, (N,) both, from L_kn and q_kn, (K, N) both."""
    with np.errstate(divide="ignore", under="ignore", invalid="ignore"):
        log_r = logits - logits.max(axis=0)
        log_r -= np.log(np.exp(log_r).sum(axis=0))
        log_q = np.log(q)
        # Σ_k q_nk (L_nk − log q_nk)
        elbo = np.where(q > 0, q * (logits - log_q), 0.0).sum(axis=0)
        kl = _divergence_terms(q, np.exp(log_r), log_q - log_r).sum(axis=0)
    return elbo, kl


# ---- terms of the sums


def _expected_information(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """−Σ_k p_k log q_k; outcomes of probability zero count nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, -p * np.log(q), 0.0).sum(axis=-1) + 0.0


def _divergence_terms(p: np.ndarray, q: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """p log(p / q) − p + q ≥ 0, element by element; `log_ratio` is log(p / q), of use where p and q differ much.

    With m = (p + q) / 2 and s = (p − q) / (p + q), so that log(p / q) = 2 atanh s, this is

        2m (s atanh s + (atanh s − s)),

    in which close p and q cancel nothing: p − q is exact, and atanh s − s is a series in s.
    """
    with np.errstate(under="ignore", invalid="ignore"):
        total = p + q
        s = np.where(total > 0, (p - q) / total, 0.0)
        terms = np.maximum(np.where(p > 0, p * (log_ratio - 1.0), 0.0) + q, 0.0)
        close = np.abs(s) < NEAR
        s, total = s[close], total[close]
        square = s * s
        excess = s * square * np.polynomial.polynomial.polyval(square, ATANH_SERIES)
        terms[close] = total * (s * (s + excess) + excess)
    return terms


# ---- what comes in


def check_probabilities(name: str, values: Any) -> np.ndarray:
    """`values` as float64 numbers from 0 to 1; ValueError naming the first index that is not."""
    array = real_array(name, values, "probabilities (real numbers)").astype(np.float64, copy=False)
    wrong = ~((array >= 0) & (array <= 1))
    if wrong.any():
        index = first_index(wrong)
        raise ValueError(f"{name} is {array[index]:.9g}{in_words(index)}; expected a probability from 0 to 1")
    return array


def check_distributions(name: str, values: Any) -> np.ndarray:
    """`values` as distributions along the last axis, (..., K) float64; ValueError naming the first that is none.

    They are divided by their sum unless that is one but for rounding.
    """
    array = real_array(name, values, "probabilities (real numbers)")
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected the probabilities of outcomes along the last axis")
    array = array.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        total, least = array.sum(axis=-1), array.min(axis=-1)
        wrong = ~((least >= 0) & (np.abs(total - 1) <= WEIGHT_SUM_TOLERANCE))
    if wrong.any():
        index = first_index(wrong)
        where = f"[{', '.join(map(str, index))}]" if index else ""
        raise ValueError(
            f"{name}{where} has sum {total[index]:.9g} and minimum {least[index]:.9g}; expected probabilities >= 0 "
            f"that sum to one: divide non-negative numbers by their sum, {name} / {name}.sum(axis=-1, keepdims=True)"
        )
    rounding = np.abs(total - 1) <= array.shape[-1] * np.finfo(np.float64).eps
    return array / np.where(rounding, 1.0, total)[..., None]


def _same_outcomes(p: Any, q: Any) -> tuple[np.ndarray, np.ndarray]:
    """p and q as distributions over the same outcomes whose leading axes broadcast."""
    first, second = check_distributions("p", p), check_distributions("q", q)
    _check_same_outcomes("p", first, "q", second)
    return first, second


def _check_same_outcomes(name: str, first: np.ndarray, other: str, second: np.ndarray) -> None:
    """ValueError naming the arguments if their last axes differ or the others do not broadcast."""
    message = f"{name} has shape {first.shape} and {other} {second.shape}; expected "
    if first.shape[-1:] != second.shape[-1:]:
        raise ValueError(f"{message}the same number of outcomes along the last axis")
    try:
        np.broadcast_shapes(first.shape, second.shape)
    except ValueError:
        raise ValueError(f"{message}leading axes that broadcast") from None


def _unit(base: float | None) -> float:
    """The nats in one unit of information: log base."""
    if base is None:
        return 1.0
    if not isinstance(base, numbers.Real) or isinstance(base, bool) or not 1 < float(base) < np.inf:
        raise ValueError(f"base is {base!r}; expected a number > 1 (2 for bits), or None for nats")
    return float(np.log(base))
