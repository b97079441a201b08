"""Divergences between Gaussians, and between mixtures of them: closed form, bounds, approximations, Monte Carlo.

===========================  ==================================================  =====================================
function                     what it computes                                    cost for K components in D features
===========================  ==================================================  =====================================
`kl`, `kl_all_pairs`         KL of Gaussians, exact                              D³ for a pair
`kl_monte_carlo`             KL of mixtures with a standard error                K D² for a sample
`kl_variational`             approximation, exact for single Gaussians           K² D²
`kl_matched`                 approximation, good while components lie apart      K² D²
`kl_unscented`               approximation, exact if log p − log q is quadratic  K² D³
`kl_product`                 approximation, not exact for single Gaussians       K² D³
`kl_bounds`                  a lower and an upper bound                          K² D³
`symmetric_kl`               KL(p ‖ q) + KL(q ‖ p)                               as the divergence it is made of
`jensen_shannon`             with a standard error                               K D² for a sample
`gaussian_cross_entropy`     −E_p log q of Gaussians, exact                      D³ for a pair
`entropy_bounds`             of a mixture                                        K² D³
===========================  ==================================================  =====================================

All in nats. Mixtures p and q may be stacks: sequences of B mixtures, or the result of `emalgam.fit_many`. Stacks are
compared one to one (a single mixture with each of a stack), or with ``all_pairs=True`` each with each, and give arrays:
all pairs at once, prepared as arrays and evaluated by one call of a kernel for many of them. Letters: B mixtures of a
stack, K components, D features, M Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np

from emalgam import backends
from emalgam.blas import one_blas_thread
from emalgam.comparison import (
    ELEMENTS_AT_ONCE,
    Comparison,
    Table,
    as_gaussians,
    centre_of,
    common,
    common_type,
    divergences,
    flattened,
    in_common_units,
    largest,
    meetings,
    overlaps,
    pairs_of,
)
from emalgam.gaussian import Gaussian
from emalgam.monte_carlo import MOST_SAMPLES, Members, Prepared, Sampling, average, over_pairs, sum_of
from emalgam.packing import Frame
from emalgam.sampling import Estimate
from emalgam.stacks import MixtureStack, as_stacks, both_as_stacks, check_same_features, is_many_fits
from emalgam.validation import check_choice, check_threads
from emalgam_kernels.parameters import take

ARITHMETICS: Final = ("float64", "float32")


class Bounds(NamedTuple):
    """A lower and an upper bound: floats, or arrays of one shape."""

    lower: Any
    upper: Any


# ---- Gaussians


def kl(
    p: Any, q: Any, *, arithmetic: str = "float64", backend: str = "auto", n_threads: int | None = None
) -> np.ndarray | float:
    """KL(p ‖ q) of Gaussians, in closed form, element by element.

    Parameters
    ----------
    p, q : Gaussian, or a sequence of them
        Their stacks are broadcast. Mixtures of one component count as Gaussians.
    arithmetic : {"float64", "float32"}
        float32 halves the memory; its relative error is about 1e-6 times the condition number, wherever the means lie
        (their difference is rounded, not they), and the result NaN for a covariance that rounding makes singular.
    backend : str
        See `emalgam.backends`.
    n_threads : int, optional
        None means all processors; the result does not depend on it.

    Returns
    -------
    float64 of the broadcast shape; a float for two single Gaussians
        ½ [tr(Σ_q⁻¹ Σ_p) − D − log |Σ_q⁻¹ Σ_p| + (μ_p − μ_q)ᵀ Σ_q⁻¹ (μ_p − μ_q)], in nats: exactly zero for p = q.

    Raises
    ------
    ValueError
        If p or q is a mixture of several components, the number of features differs or the stacks do not broadcast.
    BackendUnavailable
        If the backend cannot run here.

    References
    ----------
    Kullback (1959), Information Theory and Statistics, chapter 9. How it is evaluated: `emalgam_kernels.reference.kl`.

    Examples
    --------
    The formula in which slide 101 would have ended, log(σ_q/σ_p) + (σ_p² + (μ_p − μ_q)²) / (2σ_q²) − ½:

    >>> round(kl(Gaussian(1.0, 1.0), Gaussian(0.0, 4.0)), 6)
    0.443147
    >>> kl(Gaussian([[0.0], [1.0]], [[1.0]]), Gaussian(0.0, 1.0)).tolist()
    [0.0, 0.5]
    """
    p, q = as_gaussians("p", p), as_gaussians("q", q)
    shape, kind, dtype, threads = *common(p, q), _dtype(arithmetic), check_threads(n_threads)
    kernels = backends.kernels(backend, "kl")
    out = np.empty(math.prod(shape))
    pairs = pairs_of(p, q, shape, kind, dtype)
    gathered = not {len(out), 1}.issuperset((math.prod(p.batch_shape), math.prod(q.batch_shape)))
    step = max(ELEMENTS_AT_ONCE // p.n_features**2, 1) if gathered else max(len(out), 1)
    for start in range(0, len(out), step):
        rows = slice(start, min(start + step, len(out)))
        kernels.kl_pairs(*pairs(rows), out[rows], n_threads=threads)
    return plain(out.reshape(shape))


def kl_all_pairs(
    p: Any, q: Any, *, arithmetic: str = "float64", backend: str = "auto", n_threads: int | None = None
) -> np.ndarray | float:
    """KL of every Gaussian of p to every Gaussian of q, in closed form.

    Parameters
    ----------
    p, q, arithmetic, backend, n_threads
        As in `kl`.

    Returns
    -------
    (*p.batch_shape, *q.batch_shape) float64
        As accurate as `kl`, but mostly one matrix product. Less so in float32: a relative error of 5e-4, and as means
        are rounded relative to the median of all of them, an error of about 1e-7 m √KL for two that lie m standard
        deviations (of q) from it.

    Examples
    --------
    >>> line = Gaussian([[0.0], [1.0], [3.0]], [[1.0]])
    >>> kl_all_pairs(line, line)
    array([[0. , 0.5, 4.5],
           [0.5, 0. , 2. ],
           [4.5, 2. , 0. ]])
    """
    p, q = as_gaussians("p", p), as_gaussians("q", q)
    kind, dtype, threads = common_type(p, q), _dtype(arithmetic), check_threads(n_threads)
    kernels = backends.kernels(backend, "kl")
    centre = centre_of(p, q) if dtype != np.float64 else None
    left, right = (flattened(each, kind, dtype, factors=True, centre=centre) for each in (p, q))
    out = np.empty((len(left), len(right)))
    with one_blas_thread():
        kernels.kl_all_pairs(left, right, out, n_threads=threads)
    return plain(out.reshape(p.batch_shape + q.batch_shape))


def gaussian_cross_entropy(
    p: Any, q: Any, *, backend: str = "auto", n_threads: int | None = None
) -> np.ndarray | float:
    """H(p, q) = −E_p log q = H(p) + KL(p ‖ q) of Gaussians, in nats; arguments as in `kl`.

    References
    ----------
    Cover, Thomas (2006), section 2.3 and theorem 8.4.1.

    Examples
    --------
    >>> round(gaussian_cross_entropy(Gaussian(1.0, 1.0), Gaussian(0.0, 4.0)), 6)
    1.862086
    """
    p = as_gaussians("p", p)
    entropy = np.reshape(p.entropy(), p.batch_shape)
    return plain(entropy + kl(p, q, backend=backend, n_threads=n_threads))


def plain(values: np.ndarray) -> np.ndarray | float:
    """A float for an array of no axes."""
    return float(values) if np.ndim(values) == 0 else values


def _dtype(arithmetic: str) -> np.dtype:
    return np.dtype(check_choice("arithmetic", arithmetic, ARITHMETICS))


# ---- mixtures


def kl_variational(
    p: Any, q: Any, *, all_pairs: bool = False, backend: str = "auto", n_threads: int | None = None
) -> np.ndarray | float:
    """The variational approximation of KL(p ‖ q) of mixtures.

    Parameters
    ----------
    p, q : Mixture, fitted GaussianMixture, Gaussian, a sequence of them, or what `fit_many` returns
    all_pairs : bool
        Compare each p with each q, in blocks: memory does not grow with the number of pairs, but for the result.
    backend : str
        See `emalgam.backends`.
    n_threads : int, optional
        None means all processors; the result does not depend on it.

    Returns
    -------
    float64 of the broadcast shape, or (*shape of p, *shape of q) for `all_pairs`; a float for two mixtures
        Σ_a π_a log [Σ_a' π_a' exp(−KL(f_a ‖ f_a')) / Σ_b ω_b exp(−KL(f_a ‖ g_b))], in nats. Exact for single
        Gaussians, zero for p = q; else neither a bound nor always positive.

    Raises
    ------
    ValueError
        Naming the argument and the index of what is no mixture or has another number of features.
    BackendUnavailable
        If the backend cannot run here.

    References
    ----------
    Hershey, Olsen (2007), Approximating the Kullback Leibler divergence between Gaussian mixture models, section 7.

    Examples
    --------
    >>> from emalgam import Mixture
    >>> p = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.ones(2), "spherical")
    >>> q = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [3.0]]), np.ones(2), "spherical")
    >>> round(kl_variational(p, q), 6)
    0.780187
    >>> kl_variational(p, [p, q]).round(6)
    array([0.      , 0.780187])
    """
    comparison, table = _compared(p, q, all_pairs, backend, n_threads)
    return plain(comparison.own(table) - comparison.cross(table))


def _compared(p: Any, q: Any, all_pairs: bool, backend: str, n_threads: int | None) -> tuple[Comparison, Table]:
    """The stacks of mixtures, and the closed-form divergences of their components."""
    return Comparison.of(p, q, all_pairs, n_threads), divergences(backends.kernels(backend, "kl"))


def kl_matched(
    p: Any, q: Any, *, all_pairs: bool = False, backend: str = "auto", n_threads: int | None = None
) -> np.ndarray | float:
    """The matched bound (Goldberger's) approximation of KL(p ‖ q): each component of p has one partner in q.

    Σ_a π_a min_b [KL(f_a ‖ g_b) + log (π_a / ω_b)], in nats; arguments and result as in `kl_variational`. Good where
    the components of p do not overlap; where they do it may be below zero, for p = q too.

    References
    ----------
    Hershey, Olsen (2007), section 6; Goldberger, Gordon, Greenspan (2003), eq. 2.

    Examples
    --------
    >>> from emalgam import Mixture
    >>> p = Mixture(np.array([0.5, 0.5]), np.array([[-9.0], [9.0]]), np.ones(2), "spherical")
    >>> q = Mixture(np.array([0.5, 0.5]), np.array([[-8.0], [9.0]]), np.ones(2), "spherical")
    >>> round(kl_matched(p, q), 6)
    0.25
    """
    comparison, table = _compared(p, q, all_pairs, backend, n_threads)
    weights = comparison.p.weights
    log_weights = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    own = comparison.of_p(np.einsum("ba,ba->b", weights, log_weights))
    return plain(own - comparison.cross(table, largest))


def kl_product(p: Any, q: Any, *, all_pairs: bool = False, n_threads: int | None = None) -> np.ndarray | float:
    """The product of Gaussians approximation of KL(p ‖ q).

    Σ_a π_a log [Σ_a' π_a' ∫ f_a f_a' / Σ_b ω_b ∫ f_a g_b] with ∫ f g = N(μ_f; μ_g, Σ_f + Σ_g), in nats; arguments and
    result as in `kl_variational`. Not exact for single Gaussians.

    References
    ----------
    Hershey, Olsen (2007), section 5.

    Examples
    --------
    >>> kl_product(Gaussian(1.0, 1.0), Gaussian(0.0, 1.0))
    0.25
    """
    comparison = Comparison.of(p, q, all_pairs, n_threads)
    return plain(comparison.own(overlaps) - comparison.cross(overlaps))


def kl_bounds(
    p: Any, q: Any, *, all_pairs: bool = False, backend: str = "auto", n_threads: int | None = None
) -> Bounds:
    """A lower and an upper bound of KL(p ‖ q) of mixtures.

    Parameters
    ----------
    p, q, all_pairs, backend, n_threads
        As in `kl_variational`.

    Returns
    -------
    Bounds
        With H̄ = Σ_a π_a H(f_a), in nats:
        lower = Σ_a π_a log [Σ_a' π_a' exp(−KL(f_a ‖ f_a')) / Σ_b ω_b ∫ f_a g_b] − H̄, which may be negative, though
        the divergence is not; upper = Σ_a π_a log [Σ_a' π_a' ∫ f_a f_a' / Σ_b ω_b exp(−KL(f_a ‖ g_b))] + H̄.

    References
    ----------
    Durrieu, Thiran, Kelly (2012), Lower and upper bounds for approximation of the Kullback-Leibler divergence between
    Gaussian mixture models: E_p log p and E_p log q are bounded as in Hershey and Olsen (2007), sections 5 and 7, and
    combined so that each error has one sign.

    Examples
    --------
    >>> from emalgam import Mixture
    >>> p = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.ones(2), "spherical")
    >>> q = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [3.0]]), np.ones(2), "spherical")
    >>> lower, upper = kl_bounds(p, q)
    >>> lower < kl_monte_carlo(p, q, random_state=0).value < upper
    True
    """
    comparison, table = _compared(p, q, all_pairs, backend, n_threads)
    entropies = comparison.entropies()
    lower = comparison.own(table) - comparison.cross(overlaps) - entropies
    upper = comparison.own(overlaps) - comparison.cross(table) + entropies
    return Bounds(plain(lower), plain(upper))


def entropy_bounds(p: Any, *, n_threads: int | None = None) -> Bounds:
    """A lower and an upper bound of the entropy of a mixture, or of each of a stack.

    Parameters
    ----------
    p : Mixture, fitted GaussianMixture, Gaussian, a sequence of them, or what `fit_many` returns
    n_threads : int, optional
        None means all processors; the result does not depend on it.

    Returns
    -------
    Bounds
        −Σ_a π_a log Σ_b π_b N(μ_a; μ_b, Σ_a + Σ_b) and Σ_a π_a (H(f_a) − log π_a), in nats.

    References
    ----------
    Huber, Bailey, Durrant-Whyte, Hanebeck (2008), On entropy approximation for Gaussian mixture random vectors.

    Examples
    --------
    >>> lower, upper = entropy_bounds(Gaussian(0.0, 1.0))
    >>> round(lower, 6), round(upper, 6)
    (1.265512, 1.418939)
    """
    given = as_stacks("p", p)
    check_same_features(p=given)
    scale, (stack,) = in_common_units(given)
    comparison = Comparison(stack, stack, given.shape, given.shape, False, check_threads(n_threads))
    weights = stack.weights
    surprise = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    of_labels = comparison.of_p(np.einsum("ba,ba->b", weights, surprise))
    units = np.log(scale).sum()  # the entropy of x · s is that of x plus Σ log s
    upper = comparison.entropies() - of_labels - units
    return Bounds(plain(-comparison.own(overlaps) - units), plain(upper))


def kl_unscented(
    p: Any, q: Any, *, all_pairs: bool = False, backend: str = "auto", n_threads: int | None = None
) -> np.ndarray | float:
    """The unscented approximation of KL(p ‖ q): the mean of log p − log q over 2 D points for each component of p.

    The points μ_a ± √(D λ_i) e_i, with the eigenvalues λ_i and eigenvectors e_i of Σ_a, have the component's mean and
    covariance: exact where log p − log q is quadratic, so for single Gaussians. Arguments and result as in
    `kl_variational`.

    References
    ----------
    Hershey, Olsen (2007), section 3, eq. 8; Julier, Uhlmann (1996).

    Examples
    --------
    >>> round(kl_unscented(Gaussian(1.0, 1.0), Gaussian(0.0, 4.0)), 6)
    0.443147
    """
    left, right = both_as_stacks(p, q)
    shape, rows, columns = meetings(left.shape, right.shape, all_pairs)
    query = _Query(backend, check_threads(n_threads), backends.kernels(backend))
    sigma = [_sigma_points(stack) for _, stack in left.groups]
    own = np.empty(len(left))
    for (places, stack), points in zip(left.groups, sigma, strict=True):
        densities = Prepared.of(stack)
        own[places] = [query.means(densities, b, points, slice(b, b + 1))[0] for b in range(len(stack))]
    others = [Prepared.of(stack) for _, stack in right.groups]
    out, (group_p, place_p), (group_q, place_q) = own[rows], left.places(), right.places()
    # The points of several mixtures that meet the same other one are evaluated together.
    order = np.lexsort((group_p[rows], columns))
    changes = np.diff(columns[order]).astype(bool) | np.diff(group_p[rows][order]).astype(bool)
    for group in np.split(order, np.flatnonzero(changes) + 1):
        points, other = sigma[group_p[rows[group[0]]]], columns[group[0]]
        step = max(ELEMENTS_AT_ONCE // points.points[0].size, 1)
        for start in range(0, len(group), step):
            some = group[start : start + step]
            out[some] -= query.means(others[group_q[other]], place_q[other], points, place_p[rows[some]])
    return plain(out.reshape(shape))


class SigmaPoints(NamedTuple):
    """Points (B, 2 D K, D) of B mixtures and their weights π_a / 2D, (B, 2 D K)."""

    points: np.ndarray
    weights: np.ndarray


class _Query(NamedTuple):
    """How log-densities are evaluated."""

    backend: str
    n_threads: int
    kernels: ModuleType

    def means(self, densities: Prepared, b: int, sigma: SigmaPoints, which: Any) -> np.ndarray:
        """Σ weight · log p(point) of mixture b for some sets of points, one number each."""
        weights = sigma.weights[which]
        points = sigma.points[which].reshape(-1, sigma.points.shape[-1])
        log_prob = np.empty(len(points))
        self.kernels.log_prob(points, take(densities.direct, b), log_prob, n_threads=self.n_threads)
        if not np.isfinite(log_prob).all():  # squares overflow: a mixture by itself knows what to do
            log_prob = densities.mixtures.mixture(b).log_prob(
                points, algorithm="direct", backend=self.backend, n_threads=self.n_threads
            )
        means: np.ndarray = (weights * log_prob.reshape(weights.shape)).sum(axis=1)
        return means


def _sigma_points(mixtures: MixtureStack) -> SigmaPoints:
    """μ_a ± √(D λ_i) e_i of every component."""
    K, D = mixtures.n_components, mixtures.n_features
    own = mixtures.own_frame()
    # one scale for all features: the eigenvectors stay what they are
    frame = Frame(own.shift, np.repeat(own.scale.min(axis=1, keepdims=True), D, axis=1))
    components = mixtures.components(frame)
    values, vectors = np.linalg.eigh(mixtures.covariance.matrices(components.covariances, K, D))
    steps = np.sqrt(D * np.maximum(values, 0.0))[..., None] * vectors.swapaxes(-1, -2)
    scale = frame.scale[:, None, None]
    points = mixtures.means[:, :, None] + np.concatenate([steps, -steps], axis=2) / scale
    weights = np.repeat(mixtures.weights / (2 * D), 2 * D, axis=1)
    return SigmaPoints(points.reshape(len(mixtures), -1, D), weights)


# ---- Monte Carlo


def kl_monte_carlo(
    p: Any,
    q: Any,
    n_samples: int | None = None,
    relative_error: float | None = None,
    estimator: str = "plain",
    random_state: Any = None,
    *,
    all_pairs: bool = False,
    max_samples: int = MOST_SAMPLES,
    backend: str = "auto",
    n_threads: int | None = None,
) -> Estimate:
    """KL(p ‖ q) as the mean of log p(x) − log q(x) over samples x of p, none of which is stored.

    Parameters
    ----------
    p, q : Mixture, fitted GaussianMixture, Gaussian, a sequence of them, or what `fit_many` returns
    n_samples : int, optional
        For each pair; None means 100 000, or `max_samples` if `relative_error` is given and that is less.
    relative_error : float, optional
        Double the number of samples until the standard error is at most this times |value|, or `max_samples` is
        reached: then the standard error says how far it got. It begins with `n_samples`, but at least 1000, as the
        error of few samples is no ground for stopping.
    estimator : {"plain", "control"}
        "control" subtracts what is known exactly: c = log g_p(x) − log g_q(x) for the Gaussians with the moments of p
        and q, whose mean under p is KL(g_p ‖ g_q). A much smaller error where p and q are nearly Gaussian. Its
        coefficient is estimated from the same samples, which takes at least 30 of them.
    random_state : None, int or NumPy generator
        An integer is the key of the random numbers: sample i depends on it and on i alone. Every pair of a stack gets
        the same random numbers, so that differences between pairs are sharper than their standard errors.
    all_pairs : bool
        Compare each p with each q.
    max_samples : int
        Cap for `relative_error`.
    backend : str
        See `emalgam.backends`.
    n_threads : int, optional
        None means all processors; the result does not depend on it.

    Returns
    -------
    Estimate
        value, standard_error (NaN for one sample) and n_samples: numbers, or arrays of the shape of the result.

    Raises
    ------
    ValueError
        For n_samples < 1, fewer than 30 with "control", more than max_samples with `relative_error`, and as in
        `kl_variational`.
    BackendUnavailable
        If the backend cannot run here.

    References
    ----------
    Hershey, Olsen (2007), section 2, eq. 4; control variates: Glasserman (2003), section 4.1.

    Examples
    --------
    >>> from emalgam import Mixture
    >>> p = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.ones(2), "spherical")
    >>> q = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [3.0]]), np.ones(2), "spherical")
    >>> found = kl_monte_carlo(p, q, n_samples=20_000, random_state=0)
    >>> abs(found.value - 0.451199) < 4 * found.standard_error
    True
    """
    settings = Sampling.of(n_samples, relative_error, estimator, random_state, max_samples, backend, n_threads)
    return over_pairs(p, q, all_pairs, settings.estimate)


def jensen_shannon(
    p: Any,
    q: Any,
    n_samples: int | None = None,
    relative_error: float | None = None,
    random_state: Any = None,
    *,
    all_pairs: bool = False,
    max_samples: int = MOST_SAMPLES,
    backend: str = "auto",
    n_threads: int | None = None,
) -> Estimate:
    """Jensen-Shannon divergence ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), by Monte Carlo.

    From 0 to log 2, but for the noise of the estimate.

    Parameters
    ----------
    p, q : Mixture, fitted GaussianMixture, Gaussian, a sequence of them, or what `fit_many` returns
        There is no closed form for Gaussians either.
    n_samples, relative_error, random_state, all_pairs, max_samples, backend, n_threads
        As in `kl_monte_carlo`, for each of the two terms.

    Returns
    -------
    Estimate
        n_samples counts those of both terms.

    References
    ----------
    Lin (1991), Divergence measures based on the Shannon entropy, IEEE Transactions on Information Theory 37, 145-151.

    Examples
    --------
    >>> found = jensen_shannon(Gaussian(-9.0, 1.0), Gaussian(9.0, 1.0), n_samples=1000, random_state=0)
    >>> round(found.value, 6), round(float(np.log(2)), 6)
    (0.693147, 0.693147)
    """
    settings = Sampling.of(n_samples, relative_error, "plain", random_state, max_samples, backend, n_threads)

    def estimate(one: Members, other: Members) -> Estimate:
        middle = average(one, other)
        return sum_of(settings.estimate(one, middle), settings.other().estimate(other, middle), share=0.5)

    return over_pairs(p, q, all_pairs, estimate)


def symmetric_kl(p: Any, q: Any, divergence: Callable[..., Any] | None = None, **arguments: Any) -> Any:
    """Jeffreys' divergence KL(p ‖ q) + KL(q ‖ p).

    Parameters
    ----------
    p, q
        As the divergence takes them.
    divergence : function, optional
        One of this module's, such as `kl_variational`. None means `kl` for Gaussians and `kl_monte_carlo` for mixtures.
    **arguments
        The divergence's keywords.

    Returns
    -------
    float or array
        In the shape of KL(p ‖ q). Of `kl_monte_carlo` an `Estimate`, its two directions from independent samples and
        n_samples counting both; of `kl_bounds` `Bounds`. Of another function that returns an `Estimate` one whose
        standard error is the sum of both: the most it can be, whatever random numbers the two directions share.

    Raises
    ------
    ValueError
        For a divergence that is symmetric already, and as the divergence.

    References
    ----------
    Jeffreys (1946), Proceedings of the Royal Society A 186, 453-461; Kullback, Leibler (1951), On information and
    sufficiency.

    Examples
    --------
    >>> round(symmetric_kl(Gaussian(1.0, 1.0), Gaussian(0.0, 4.0)), 6)
    1.75
    """
    if divergence is None:
        divergence = kl if _all_gaussian(p) and _all_gaussian(q) else kl_monte_carlo
        unknown = sorted(set(arguments) - {"arithmetic", "backend", "n_threads"}) if divergence is kl else []
        if unknown:
            raise ValueError(
                f"{unknown[0]} is no argument of kl, the closed form that these Gaussians have; pass "
                "divergence=kl_monte_carlo for an estimate"
            )
    if divergence in (jensen_shannon, symmetric_kl):
        raise ValueError(f"divergence is {divergence.__name__}, which is symmetric already; call it by itself")
    if divergence is kl_monte_carlo:
        return _symmetric_monte_carlo(p, q, **arguments)
    forth: Any = divergence(p, q, **arguments)
    back: Any = divergence(q, p, **arguments)
    # The axes of each with each: those of q first in the second direction.
    axes = len(as_stacks("q", q).shape) if divergence is kl_all_pairs or arguments.get("all_pairs") else 0

    def total(one: Any, other: Any) -> Any:
        return np.add(one, np.moveaxis(other, range(axes), range(-axes, 0)) if axes else other)

    if isinstance(forth, Bounds | Estimate):
        return type(forth)(*map(total, forth, back))
    return plain(total(forth, back))


def _all_gaussian(value: Any) -> bool:
    if is_many_fits(value):
        return bool((value.n_components == 1).all())
    members = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(each, Gaussian) or getattr(each, "n_components", 0) == 1 for each in members)


def _symmetric_monte_carlo(p: Any, q: Any, all_pairs: bool = False, **arguments: Any) -> Estimate:
    """The sum of both directions by `kl_monte_carlo`, whose arguments these are."""
    settings = Sampling.of(**arguments)

    def estimate(one: Members, other: Members) -> Estimate:
        return sum_of(settings.estimate(one, other), settings.other().estimate(other, one))

    return over_pairs(p, q, all_pairs, estimate)
