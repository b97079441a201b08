"""Entropy and divergences of discrete distributions and of Gaussians, and log p(x) = ELBO + KL."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emalgam import GaussianMixture, Mixture, backends, use_backend
from emalgam.information import (
    cross_entropy,
    elbo_decomposition,
    entropy,
    gaussian_entropy,
    information_content,
    kl_discrete,
    posterior,
)
from emalgam_kernels import Direct
from tests import oracles
from tests.conftest import COVARIANCE_TYPES

EPS = np.finfo(np.float64).eps


def exact_kl(p: np.ndarray, q: np.ndarray) -> mpmath.mpf:
    """Σ p log(p / q) − p + q at 60 digits: the divergence of these floats, whose sums are not quite one."""
    with mpmath.workdps(oracles.DIGITS):
        pairs = [(mpmath.mpf(float(a)), mpmath.mpf(float(b))) for a, b in zip(p, q, strict=True)]
        return mpmath.fsum((a * mpmath.log(a / b) if a else 0) - a + b for a, b in pairs)


def distributions(*shape: int, seed: int = 0, concentration: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], concentration), shape[:-1])


# ---- the numbers of the notes


def test_coin_of_the_notes() -> None:
    """(.75, .25) against the fair coin: 0.1308 nats, the other way 0.1438; in bits too."""
    p, q = [0.75, 0.25], [0.5, 0.5]
    assert kl_discrete(p, q) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-15)
    assert round(float(kl_discrete(p, q)), 4) == 0.1308
    assert round(float(kl_discrete(q, p)), 4) == 0.1438
    assert entropy(q, base=2) == 1.0
    assert entropy(p, base=2) == pytest.approx(2 - 0.75 * np.log2(3), rel=1e-15)
    assert cross_entropy(p, q, base=2) == 1.0
    assert kl_discrete(p, q, base=2) == pytest.approx(1 - (2 - 0.75 * np.log2(3)), rel=1e-14)
    assert information_content(0.25, base=2) == 2.0


def test_least_cross_entropy_is_least_kl() -> None:
    """H(P, Q) = H(P) + KL(P ‖ Q): over a grid of Q, the two are least at the same place, Q = P."""
    p = np.array([0.3, 0.7])
    q = np.stack([np.linspace(0.01, 0.99, 99), 1 - np.linspace(0.01, 0.99, 99)], axis=1)
    np.testing.assert_allclose(cross_entropy(p, q), entropy(p) + kl_discrete(p, q), rtol=8 * EPS)
    assert np.argmin(cross_entropy(p, q)) == np.argmin(kl_discrete(p, q)) == 29
    np.testing.assert_allclose(q[29], p)


# ---- discrete distributions


@pytest.mark.parametrize("K", [1, 2, 5, 300])
@pytest.mark.parametrize("concentration", [0.05, 1.0, 100.0])
def test_kl_against_mpmath(K: int, concentration: float) -> None:
    p = distributions(4, K, concentration=concentration)
    q = distributions(4, K, seed=1, concentration=concentration)
    exact = np.array([float(exact_kl(a, b)) for a, b in zip(p, q, strict=True)])
    np.testing.assert_allclose(kl_discrete(p, q), exact, rtol=16 * EPS, atol=0)


@pytest.mark.parametrize("exponent", range(-52, 1, 4))
def test_tiny_divergences_keep_their_digits(exponent: int) -> None:
    """From neighbouring floats to far apart; the plain Σ p log(p / q) has no digit left below 1e-16."""
    p = distributions(40)
    q = p * (1 + 2.0**exponent * np.random.default_rng(1).uniform(-1, 1, 40))
    q /= q.sum()
    exact = float(exact_kl(p, q))
    assert 0 <= exact < 10 * 4.0**exponent
    assert kl_discrete(p, q) == pytest.approx(exact, rel=32 * EPS, abs=0)


def test_ratios_that_float64_cannot_hold() -> None:
    p, q = np.array([1 - 1e-200, 1e-200]), np.array([1.0, 5e-324])
    assert kl_discrete(p, q) == pytest.approx(float(exact_kl(p, q)), rel=8 * EPS)
    p, q = np.array([0.5, 0.5]), np.array([1.0, 1e-310])
    assert kl_discrete(p, q) == pytest.approx(float(exact_kl(p, q)), rel=8 * EPS)
    assert kl_discrete(q, p) == pytest.approx(float(np.log(2)), rel=8 * EPS)


def test_zeros() -> None:
    """0 log 0 = 0; what q holds impossible and p does not costs infinitely much; the rest of p's zeros cost nothing."""
    assert entropy([0.0, 1.0]) == 0.0
    assert not np.signbit(entropy([0.0, 1.0]))
    assert not np.signbit(information_content(1.0))
    assert information_content(0.0) == np.inf
    assert kl_discrete([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]) == 0.0
    assert kl_discrete([0.0, 1.0], [0.5, 0.5]) == pytest.approx(np.log(2), rel=EPS)
    assert cross_entropy([0.0, 1.0], [0.5, 0.5]) == pytest.approx(np.log(2), rel=EPS)
    for divergence in (kl_discrete, cross_entropy):
        assert divergence([0.5, 0.5], [1.0, 0.0]) == np.inf
        assert np.isfinite(divergence([1.0, 0.0], [0.5, 0.5]))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.integers(0, 10**6))
def test_positive_and_zero_only_for_equals(weights: list[float], seed: int) -> None:
    raw = np.array(weights) + 1e-9
    p = raw / raw.sum()
    q = distributions(len(p), seed=seed)
    assert kl_discrete(p, p) == 0.0
    assert kl_discrete(p, q) > 0
    assert kl_discrete(q, p) > 0
    assert -1e-15 <= entropy(p) <= np.log(len(p)) + 1e-15
    assert cross_entropy(p, q) >= entropy(p) - 1e-15


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_the_two_directions_differ(first: float, second: float) -> None:
    """Two coins: KL(P ‖ Q) = KL(Q ‖ P) only where Q is P or P turned over."""
    p, q = np.array([first, 1 - first]), np.array([second, 1 - second])
    forth, back = exact_kl(p, q), exact_kl(q, p)
    difference, rounding = float(forth - back), 32 * EPS * float(forth + back)
    assert kl_discrete(p, q) - kl_discrete(q, p) == pytest.approx(difference, abs=rounding)
    if min(abs(first - second), abs(first + second - 1)) > 1e-3:
        assert kl_discrete(p, q) != kl_discrete(q, p)


def test_batches_broadcast() -> None:
    p, q = distributions(3, 1, 4), distributions(5, 4, seed=1)
    all_pairs = kl_discrete(p, q)
    assert all_pairs.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            assert all_pairs[i, j] == kl_discrete(p[i, 0], q[j])
    assert entropy(distributions(2, 3, 4)).shape == (2, 3)
    assert entropy(np.zeros((0, 4))).shape == (0,)
    assert isinstance(kl_discrete(q[0], q[1]), float)


def test_other_dtypes() -> None:
    """float32 sums are off by 1e-7 and divided out; lists, integers and bools are numbers too."""
    p = distributions(1000).astype(np.float32)
    assert entropy(p) == pytest.approx(float(entropy(p.astype(np.float64) / p.astype(np.float64).sum())), rel=EPS)
    assert kl_discrete(p, p) == 0.0
    assert entropy([0, 1]) == entropy([False, True]) == 0.0
    unchanged = p.copy()
    entropy(p)
    np.testing.assert_array_equal(p, unchanged)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy([0.5, 0.6]), r"p has sum 1\.1 and minimum 0\.5; .*p / p\.sum\(axis=-1, keepdims=True\)"),
        (lambda: entropy([[1, 0], [1.2, -0.2], [2, 0]]), r"p\[1\] has sum 1 and minimum -0\.2"),
        (lambda: kl_discrete([[1.0, 0.0]], np.full((2, 3, 2), 0.4)), r"q\[0, 0\] has sum 0\.8"),
        (lambda: cross_entropy([1.0, 0.0], [0.5, np.nan]), r"q has sum nan"),
        (lambda: entropy([np.inf, 0.0]), r"p has sum inf"),
        (lambda: entropy(1.0), r"p has shape \(\); expected the probabilities of outcomes along the last axis"),
        (lambda: entropy([[], []]), r"p has shape \(2, 0\)"),
        (lambda: entropy(["a"]), r"p has dtype <U1; expected probabilities"),
        (lambda: kl_discrete([1.0], [0.5, 0.5]), r"p has shape \(1,\) and q \(2,\); expected the same number"),
        (lambda: kl_discrete(np.eye(3), np.eye(3)[:2]), r"expected leading axes that broadcast"),
        (lambda: posterior([0.5, 0.6], [1, 1]), r"prior has sum 1\.1"),
        (lambda: posterior([0.5, 0.5], [[1, 1], [1, -1]]), r"likelihood is -1 at \[1, 1\]; expected numbers >= 0"),
        (lambda: posterior([0.5, 0.5], [1, np.nan]), r"likelihood contains NaN at \[1\]"),
        (lambda: posterior([0.5, 0.5], [1.0]), r"prior has shape \(2,\) and likelihood \(1,\); expected the same"),
        (lambda: posterior([0.5, 0.5], 1.0), r"prior has shape \(2,\) and likelihood \(\); expected the same number"),
        (lambda: posterior(np.eye(2), np.ones((3, 2))), r"likelihood \(3, 2\); expected leading axes that broadcast"),
        (lambda: posterior([1.0, 0.0], [[1, 0], [0, 1]]), r"likelihood at \[1\] is zero wherever the prior is not"),
        (lambda: information_content([0.1, 1.5]), r"p is 1\.5 at \[1\]; expected a probability from 0 to 1"),
        (lambda: information_content(np.nan), r"p is nan; expected a probability"),
        (lambda: entropy([1.0], base=1), r"base is 1; expected a number > 1 \(2 for bits\), or None for nats"),
        (lambda: entropy([1.0], base="2"), r"base is '2'; expected a number > 1"),
        (lambda: gaussian_entropy([1.0]), r"covariance has shape \(1,\); expected square matrices"),
        (
            lambda: gaussian_entropy([[1.0, 0.5], [0.4, 1.0]]),
            r"covariance is not symmetric; pass 0\.5 \* \(c \+ c\.T\)",
        ),
        (
            lambda: gaussian_entropy([np.eye(2), np.diag([1.0, -2.0])]),
            r"covariance at \[1\] is not positive definite \(smallest eigenvalue -2\)",
        ),
        (lambda: gaussian_entropy([[np.nan]]), r"covariance contains NaN at \[0, 0\]"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- Bayes' rule


def test_married_and_childless() -> None:
    """The mended example of the slides: 0.2 as P(childless given married) is 0.25 as P(married given childless)."""
    probabilities, evidence = posterior([0.5, 0.5], [0.2, 0.6])
    assert evidence == pytest.approx(0.4, rel=EPS)
    np.testing.assert_allclose(probabilities, [0.25, 0.75], rtol=2 * EPS)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_responsibilities_are_posteriors(covariance_type: str) -> None:
    """With the weights for a prior and densities for likelihoods; the evidence is the mixture's density."""
    model = mixture(covariance_type)
    x = model.sample(100, random_state=0)[0]
    densities = np.exp(oracles.joint_log_prob(x, as_oracle(model)).astype(np.float64)) / model.weights
    probabilities, evidence = posterior(model.weights, densities)
    np.testing.assert_allclose(probabilities, model.responsibilities(x, algorithm="direct"), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(np.log(evidence), model.log_prob(x, algorithm="direct"), rtol=1e-11)


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1e-300, 1.0, 1e300]))
def test_posteriors_are_distributions(seed: int, K: int, unit: float) -> None:
    """Joint probability = posterior times evidence; the unit of the likelihood cancels, however small or large."""
    prior = distributions(3, 1, K, seed=seed)
    likelihood = np.random.default_rng(seed).uniform(0.1, 2, (4, K))
    probabilities, evidence = posterior(prior, likelihood * unit)
    assert probabilities.shape == (3, 4, K)
    assert evidence.shape == (3, 4)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=8 * EPS)
    np.testing.assert_allclose(evidence / unit, (prior * likelihood).sum(axis=-1), rtol=8 * EPS)
    np.testing.assert_allclose(probabilities * (evidence / unit)[..., None], prior * likelihood, rtol=16 * EPS)


def test_what_is_certain_and_what_underflows() -> None:
    certain, evidence = posterior([1.0, 0.0], [1e-300, 1e300])
    assert certain.tolist() == [1.0, 0.0]
    assert evidence == 1e-300
    share = np.random.default_rng(0).uniform(1, 2, 1000)
    found = posterior(np.full(1000, 1e-3), share * 1e-307)  # products of 1e-310 have ten digits left
    np.testing.assert_allclose(found.probabilities, share / share.sum(), rtol=16 * EPS)
    assert isinstance(posterior([1], [1]).evidence, float)

    # The largest likelihood need not belong to the largest product, nor a ratio of products be in float64's range.
    probabilities, evidence = posterior([1e-300, 1.0], [1e300, 1e-300])
    np.testing.assert_allclose(probabilities, [1.0, 1e-300], rtol=4 * EPS)
    assert evidence == pytest.approx(1.0, rel=4 * EPS)
    assert posterior([1e-300, 1.0], [1e-300, 1e300]).probabilities.tolist() == [0.0, 1.0]
    largest, prior = np.finfo(np.float64).max, distributions(500, 50)  # some sum to 1 + eps
    np.testing.assert_allclose(posterior(prior, np.full(50, largest)).evidence, largest, rtol=8 * EPS)


# ---- Gaussians


@pytest.mark.parametrize("D", [1, 2, 7])
def test_gaussian_entropy(D: int) -> None:
    """Against SciPy, on a stack, and of very small and large variances; H(aX) = H(X) + D log a."""
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(0)
    root = rng.normal(size=(2, 3, D, D))
    covariance = root @ root.swapaxes(-1, -2) + np.eye(D)
    ours = gaussian_entropy(covariance)
    assert ours.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert ours[index] == pytest.approx(multivariate_normal(cov=covariance[index]).entropy(), rel=1e-13)
    np.testing.assert_allclose(gaussian_entropy(covariance * 2.0**-900), ours - 450 * D * np.log(2), rtol=1e-13)


def test_entropy_of_a_wide_discretized_gaussian() -> None:
    """Cells of width δ: the discrete entropy is the differential one − log δ, all but for the shape of a cell."""
    x = np.arange(-12, 12, 0.01)
    p = np.exp(-(x**2) / 2)
    assert entropy(p / p.sum()) + np.log(0.01) == pytest.approx(float(gaussian_entropy([[1.0]])), abs=1e-9)


# ---- the decomposition of the log-likelihood


def mixture(covariance_type: str, offset: float = 0.0, D: int = 3) -> Mixture:
    rng = np.random.default_rng(3)
    root = rng.normal(size=(4, D, D)) * 0.3 + np.eye(D)
    full = root @ root.swapaxes(1, 2)
    covariances = {"full": full, "tied": full[0], "diag": full[:, 0] ** 2 + 0.1, "spherical": full[:, 0, 0]}
    return Mixture(
        [0.1, 0.2, 0.3, 0.4], rng.normal(size=(4, D)) * 3 + offset, covariances[covariance_type], covariance_type
    )


def as_oracle(model: Mixture) -> oracles.Gaussians:
    return oracles.Gaussians(model.weights, model.means, model.covariances, model.covariance_type)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_elbo_and_kl(covariance_type: str, offset: float) -> None:
    """Both parts against long double, and their sum against log p, for any q."""
    model = mixture(covariance_type, offset)
    x = model.sample(300, random_state=0)[0]
    q = distributions(300, 4, concentration=0.5)
    elbo, kl = elbo_decomposition(model, x, q)
    logits = oracles.joint_log_prob(x, as_oracle(model))
    log_p = oracles.log_sum_exp(logits)
    terms = q * np.log(np.where(q > 0, q, 1)), q * logits
    bound = 1e-13 * np.maximum(1, offset)  # x − μ itself has eps · offset
    np.testing.assert_allclose(elbo, (terms[1] - terms[0]).sum(axis=1), rtol=bound, atol=bound)
    np.testing.assert_allclose(kl, (terms[0] - terms[1]).sum(axis=1) + log_p, rtol=bound, atol=bound)
    np.testing.assert_allclose(elbo + kl, model.log_prob(x, algorithm="direct"), rtol=8 * EPS, atol=1e-9)
    assert kl.min() >= 0


def test_the_e_step_closes_the_gap() -> None:
    """q = r makes the KL zero to rounding and the ELBO log p; a q near r has a KL of second order, to its digits."""
    model = mixture("full")
    x = model.sample(200, random_state=0)[0]
    r = model.responsibilities(x, algorithm="direct")
    elbo, kl = elbo_decomposition(model, x, r)
    assert 0 <= kl.min() <= kl.max() < 1e-28
    np.testing.assert_allclose(elbo, model.log_prob(x), rtol=1e-12)

    near = r * (1 + 1e-7 * np.random.default_rng(0).uniform(-1, 1, r.shape))
    near /= near.sum(axis=1, keepdims=True)
    exact = oracles.responsibilities(x, as_oracle(model))
    second_order = (np.square(near - exact) / (near + exact)).sum(axis=1)
    np.testing.assert_allclose(elbo_decomposition(model, x, near).kl, second_order, rtol=1e-5, atol=1e-24)


def test_one_q_for_all_rows_and_fitted_estimators() -> None:
    model = mixture("diag")
    x = model.sample(50, random_state=0)[0]
    prior = elbo_decomposition(model, x, model.weights)
    rows = elbo_decomposition(model, x, np.tile(model.weights, (50, 1)))
    np.testing.assert_array_equal(prior.elbo, rows.elbo)
    fitted = GaussianMixture(2, random_state=0).fit(x)
    elbo, kl = elbo_decomposition(fitted, x, [0.5, 0.5])
    np.testing.assert_allclose(elbo + kl, fitted.score_samples(x), rtol=1e-12)


def test_components_without_weight_and_rows_far_away() -> None:
    model = Mixture([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0], "spherical")
    x = np.array([[0.0], [1e3], [1e200]])
    elbo, kl = elbo_decomposition(model, x, [0.5, 0.5])
    np.testing.assert_array_equal(elbo, -np.inf)
    np.testing.assert_array_equal(kl, np.inf)
    elbo, kl = elbo_decomposition(model, x, [1.0, 0.0])
    np.testing.assert_array_equal(kl, 0.0)
    np.testing.assert_allclose(elbo, model.log_prob(x), rtol=1e-14)

    model = Mixture([0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0], "spherical")
    elbo, kl = elbo_decomposition(model, [[1e3]], [1.0, 0.0])  # r of the first component underflows
    assert kl[0] == pytest.approx(999.5, rel=1e-14)
    assert elbo[0] + kl[0] == pytest.approx(model.log_prob([[1e3]])[0], rel=1e-15)
    assert np.isfinite(elbo_decomposition(model, [[1e200], [-1e308]], [0.3, 0.7])).all()


def test_memory_is_bounded_by_the_rows_at_once() -> None:
    """More rows than one step takes give what their parts give."""
    model = mixture("full")
    x = model.sample(100_000, random_state=0)[0].astype(np.float32)
    whole = elbo_decomposition(model, x, model.weights)
    part = elbo_decomposition(model, x[90_000:], model.weights)
    np.testing.assert_array_equal(whole.elbo[90_000:], part.elbo)
    np.testing.assert_array_equal(whole.kl[90_000:], part.kl)


def test_elbo_by_the_backend_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever threads the blocks of rows run on; a component's own log-density is a kernel's."""
    kernels = backends.kernels("reference", "mixture")
    blocks: list[int] = []

    def log_prob(x: np.ndarray, parameters: Direct, out: np.ndarray) -> None:
        blocks.append(len(x))
        reference_log_prob(x, parameters, out)

    reference_log_prob = kernels.log_prob
    monkeypatch.setattr(kernels, "log_prob", log_prob)
    model = mixture("diag")
    x = model.sample(70_000, random_state=0)[0]
    with use_backend("reference"):
        elbo_decomposition(model, x, model.weights)
    assert len(blocks) > model.n_components
    assert sum(blocks) == model.n_components * len(x)


@pytest.mark.parametrize(
    ("x", "q", "message"),
    [
        (np.zeros((2, 3)), [[0.25] * 4, [0.5] * 4], r"q\[1\] has sum 2 and minimum 0\.5"),
        (np.zeros((2, 3)), np.full((3, 4), 0.25), r"q has shape \(3, 4\); expected \(2, 4\) or \(4,\)"),
        (np.zeros((2, 3)), [1.0], r"q has shape \(1,\); expected"),
        (np.zeros((2, 2)), [0.25] * 4, r"X has 2 features; the mixture has 3"),
        (np.array([[0, 0, 0], [0, 0, np.nan]]), [0.25] * 4, r"X contains NaN at row 1, column 2"),
    ],
)
def test_elbo_of_bad_input(x: np.ndarray, q: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elbo_decomposition(mixture("full"), x, q)


def test_elbo_needs_a_mixture() -> None:
    with pytest.raises(
        ValueError, match="mixture is a GaussianMixture; expected a Mixture or a fitted GaussianMixture"
    ):
        elbo_decomposition(GaussianMixture(), [[0.0]], [1.0])
