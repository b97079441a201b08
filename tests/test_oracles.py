"""The oracles judge everything else, so they are held to SciPy and to each other first."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests import oracles
from tests.conftest import COVARIANCE_TYPES
from tests.kernels.problems import problem, random_mixture
from tests.oracles import LONG, Frame, Gaussians
from tests.tolerances import tolerance


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_long_double_agrees_with_mpmath(covariance_type: str) -> None:
    assert np.finfo(LONG).nmant >= 63, "the oracles need a long double that is longer than double"
    given = problem(covariance_type, "float64", "packed", "features in pieces")
    few = slice(0, 40)
    truth = oracles.exact_joint_log_prob(given.x[few], given.mixture)
    bound = tolerance("long double log_prob", "float64")
    assert (oracles.absolute_errors(given.logits[few], truth) <= bound * given.logit_scale[few]).all()
    log_prob = oracles.exact_log_sum_exp(truth)
    assert (oracles.absolute_errors(given.log_prob[few], log_prob) <= bound * given.log_prob_scale[few]).all()
    r = oracles.exact_softmax(truth)
    assert oracles.absolute_errors(given.responsibilities[few], r).max() <= bound * given.logit_scale[few].max()


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_long_double_agrees_with_scipy(covariance_type: str) -> None:
    mixture = random_mixture(np.random.default_rng(1), K=3, D=4, covariance_type=covariance_type)
    x = np.random.default_rng(2).normal(size=(20, 4))
    covariances = oracles.full_covariances(mixture).astype(np.float64)
    expected = [
        weight * stats.multivariate_normal(mean, covariance).pdf(x)
        for weight, mean, covariance in zip(mixture.weights, mixture.means, covariances, strict=True)
    ]
    np.testing.assert_allclose(np.exp(oracles.joint_log_prob(x, mixture)).astype(float), np.transpose(expected), 1e-12)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_natural_parameters_give_the_log_density(covariance_type: str) -> None:
    rng = np.random.default_rng(3)
    mixture = random_mixture(rng, K=3, D=4, covariance_type=covariance_type)
    x = rng.normal(size=(20, 4))
    scale = np.full(4, 2.0) if covariance_type == "spherical" else np.array([1.0, 2.0, 0.5, 4.0])
    frame = Frame(rng.normal(size=4), scale)
    if covariance_type == "tied":
        whitening = oracles.precision_factors(oracles.in_frame(mixture, frame))[0].astype(np.float64)
        frame = Frame(frame.shift, scale, whitening)
    phi = oracles.features(frame.apply(x), oracles.feature_map_of(covariance_type))
    logits = phi @ oracles.natural_parameters(mixture, frame).T
    np.testing.assert_allclose(logits.astype(float), oracles.joint_log_prob(x, mixture).astype(float), 1e-12)


def test_statistics_by_hand() -> None:
    z = np.array([[1.0, 2.0], [3.0, 5.0]], LONG)
    r = np.array([[0.5, 0.5], [0.0, 2.0]], LONG)
    np.testing.assert_array_equal(oracles.features(z, "full"), [[1, 2, 4, 1, 2, 1], [9, 15, 25, 3, 5, 1]])
    np.testing.assert_array_equal(oracles.features(z, "diag"), [[1, 4, 1, 2, 1], [9, 25, 3, 5, 1]])
    np.testing.assert_array_equal(oracles.features(z, "spherical"), [[5, 1, 2, 1], [34, 3, 5, 1]])
    np.testing.assert_array_equal(oracles.statistics(r, z, "spherical"), [[2.5, 0.5, 1, 0.5], [70.5, 6.5, 11, 2.5]])
    about_means = oracles.statistics(r, z, "diag", np.array([[1.0, 2.0], [2.0, 2.0]]))
    np.testing.assert_array_equal(about_means, [[0, 0, 0, 0, 0.5], [2.5, 18, 1.5, 6, 2.5]])


def test_hard_responsibilities_take_the_first_of_equals() -> None:
    np.testing.assert_array_equal(
        oracles.hard_responsibilities(np.array([[1, 2, 2], [3, 1, 3]])), [[0, 1, 0], [1, 0, 0]]
    )


def test_ulp_errors_count_units_of_the_last_place() -> None:
    truth = oracles.exact(np.array([1.0, 2.0, 1.5]))
    values = np.array([1 + 2.0**-52, 2 - 2.0**-52, 1.5])
    np.testing.assert_array_equal(oracles.ulp_errors(values, truth, "float64"), [1, 0.5, 0])
    assert oracles.ulp_errors(np.array([1 + 2.0**-22]), truth[:1], "float32") == [2]


def test_weights_of_zero_have_a_log_density_of_minus_infinity() -> None:
    mixture = Gaussians(np.array([0.0, 1.0]), np.zeros((2, 1)), np.ones((2, 1)), "diag")
    assert oracles.joint_log_prob(np.zeros((1, 1)), mixture)[0, 0] == -np.inf
