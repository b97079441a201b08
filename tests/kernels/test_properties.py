"""What must hold for any mixture and any data, on every backend: hypothesis chooses them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import emalgam_kernels
from tests import oracles
from tests.conftest import ALGORITHMS, COVARIANCE_TYPES
from tests.kernels.problems import Problem, assert_within, random_mixture, sample
from tests.oracles import Frame
from tests.tolerances import EPS, tolerance

every_arithmetic = pytest.mark.parametrize("arithmetic", ["float64", "float32"])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A small problem; the numbers come from a seed, so that shrinking ends at the simplest shapes."""
    N, D, K = draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    covariance_type = draw(st.sampled_from(COVARIANCE_TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mixture = random_mixture(rng, K, D, covariance_type, spread=draw(st.sampled_from([0.0, 1.0, 5.0])))
    frame = Frame(mixture.means.mean(axis=0), np.full(D, 0.5))
    algorithm = draw(st.sampled_from(ALGORITHMS))
    if covariance_type == "tied" and algorithm == "packed":
        whitening = oracles.precision_factors(oracles.in_frame(mixture, frame))[0].astype(np.float64, order="C")
        frame = Frame(frame.shift, frame.scale, whitening)
    return Problem(sample(rng, mixture, N, "float32"), mixture, algorithm, frame)


def log_prob(backend: str, problem: Problem, x: np.ndarray, arithmetic: str) -> np.ndarray:
    out = np.empty(len(x))
    emalgam_kernels.load(backend).log_prob(x, problem.parameters(arithmetic), out)
    return out


def responsibilities(backend: str, problem: Problem, x: np.ndarray, arithmetic: str) -> np.ndarray:
    out = np.empty((len(x), problem.mixture.n_components))
    emalgam_kernels.load(backend).responsibilities(x, problem.parameters(arithmetic), out)
    return out


def em_statistics(
    backend: str, problem: Problem, x: np.ndarray, weight: np.ndarray | None, arithmetic: str
) -> tuple[np.ndarray, float]:
    parameters = problem.parameters(arithmetic)
    out = np.empty((parameters.n_components, parameters.n_statistics))
    return out, emalgam_kernels.load(backend).em_statistics(x, weight, parameters, out)


def order_of_sums(problem: Problem, counts: np.ndarray, arithmetic: str) -> tuple[np.ndarray, float]:
    """What adding `counts` of each row in another order may change: of S, and of Σ ω log p."""
    factor = (1 + counts.sum() ** 0.5) * tolerance("order of a sum", arithmetic)
    terms = np.broadcast_to(counts[:, None], problem.responsibilities.shape)
    return factor * problem.statistics(terms, absolute=True), factor * float(counts @ np.abs(problem.log_prob))


@every_arithmetic
@given(problem=problems())
def test_responsibilities_are_a_distribution(backend: str, arithmetic: str, problem: Problem) -> None:
    r = responsibilities(backend, problem, problem.x, arithmetic)
    assert ((r >= 0) & (r <= 1 + 4 * EPS[arithmetic])).all()
    bound = tolerance("sum of responsibilities", arithmetic) * (2 + r.shape[1] ** 0.5)
    assert_within(r.sum(axis=1), np.ones(len(r)), bound, "Σ_k r_nk")


@every_arithmetic
@given(problem=problems(), seed=st.integers(0, 1000))
def test_order_of_rows_does_not_matter(backend: str, arithmetic: str, problem: Problem, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(problem.x))
    x = problem.x
    # Every bit, but for the reference: how BLAS adds depends on where in the matrix a row stands.
    exact = backend != "reference"
    bound = 0 if exact else tolerance("same mixture", arithmetic) * problem.log_prob_scale[order]
    expected = log_prob(backend, problem, x, arithmetic)[order]
    assert_within(log_prob(backend, problem, x[order], arithmetic), expected, bound, "log p of permuted rows")
    bound = 0 if exact else tolerance("same mixture", arithmetic) * problem.logit_scale[order].astype(np.float64)
    expected = responsibilities(backend, problem, x, arithmetic)[order]
    assert_within(responsibilities(backend, problem, x[order], arithmetic), expected, bound, "r of permuted rows")
    statistics, total = em_statistics(backend, problem, x, None, arithmetic)
    permuted, total_of_permuted = em_statistics(backend, problem, x[order], None, arithmetic)
    bound, bound_of_total = order_of_sums(problem, np.ones(len(x)), arithmetic)
    assert_within(permuted, statistics, bound, "S of permuted rows")
    assert_within(total_of_permuted, total, bound_of_total, "Σ log p of permuted rows")


@every_arithmetic
@given(problem=problems(), seed=st.integers(0, 1000))
def test_a_weight_is_a_number_of_repetitions(backend: str, arithmetic: str, problem: Problem, seed: int) -> None:
    """Zero among them: the row is absent."""
    counts = np.random.default_rng(seed).integers(0, 4, len(problem.x))
    statistics, total = em_statistics(backend, problem, problem.x, counts.astype(float), arithmetic)
    repeated, total_of_repeated = em_statistics(
        backend, problem, np.repeat(problem.x, counts, axis=0), None, arithmetic
    )
    bound, bound_of_total = order_of_sums(problem, counts, arithmetic)
    assert_within(statistics, repeated, bound, "S of repeated rows")
    assert_within(total, total_of_repeated, bound_of_total, "Σ log p of repeated rows")


@every_arithmetic
@given(problem=problems(), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_statistics_are_linear_in_the_weights(backend: str, arithmetic: str, problem: Problem, factor: float) -> None:
    """By a power of two, to the last bit."""
    weight = np.linspace(0.5, 2, len(problem.x))
    statistics, total = em_statistics(backend, problem, problem.x, weight, arithmetic)
    scaled, total_of_scaled = em_statistics(backend, problem, problem.x, factor * weight, arithmetic)
    np.testing.assert_array_equal(scaled, factor * statistics)
    assert total_of_scaled == factor * total


@every_arithmetic
@given(problem=problems(), shift=st.integers(-3, 3), exponent=st.integers(-3, 3))
def test_the_frame_does_not_matter(backend: str, arithmetic: str, problem: Problem, shift: int, exponent: int) -> None:
    """Another shift and another scale are other natural parameters of the same density."""
    whitening = None if problem.frame.whitening is None else problem.frame.whitening * 2.0**-exponent
    frame = Frame(problem.frame.shift + shift, problem.frame.scale * 2.0**exponent, whitening)
    other = Problem(problem.x, problem.mixture, problem.algorithm, frame)
    scale = tolerance("same mixture", arithmetic) * np.maximum(problem.log_prob_scale, other.log_prob_scale)
    assert_within(
        log_prob(backend, other, other.x, arithmetic), log_prob(backend, problem, problem.x, arithmetic), scale, "log p"
    )


@every_arithmetic
@given(problem=problems(), seed=st.integers(0, 1000))
def test_order_of_components_does_not_matter(backend: str, arithmetic: str, problem: Problem, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(problem.mixture.n_components)
    mixture = problem.mixture
    covariances = mixture.covariances if mixture.covariance_type == "tied" else mixture.covariances[order]
    permuted = oracles.Gaussians(mixture.weights[order], mixture.means[order], covariances, mixture.covariance_type)
    other = Problem(problem.x, permuted, problem.algorithm, problem.frame)
    scale = tolerance("same mixture", arithmetic) * problem.log_prob_scale
    assert_within(
        log_prob(backend, other, other.x, arithmetic), log_prob(backend, problem, problem.x, arithmetic), scale, "log p"
    )


@every_arithmetic
@given(problem=problems())
def test_statistics_of_all_components_are_those_of_the_data(backend: str, arithmetic: str, problem: Problem) -> None:
    """Σ_k S_k = Σ_n φ(z_n), for responsibilities sum to one; the constant feature gives N."""
    statistics, _ = em_statistics(backend, problem, problem.x, None, arithmetic)
    counts = statistics[:, -1].sum()
    bound = tolerance("sum of responsibilities", arithmetic) * (2 + problem.mixture.n_components**0.5)
    assert_within(counts, len(problem.x), bound * len(problem.x) * len(problem.x) ** 0.5, "Σ_k N_k")
    if problem.algorithm == "packed":
        phi = oracles.features(problem.frame.apply(problem.x), problem.parameters(arithmetic).feature_map)
        bound = (bound + 4 * EPS[arithmetic]) * len(phi) ** 0.5 * (np.abs(phi).sum(axis=0) + EPS[arithmetic])
        assert_within(statistics.sum(axis=0), phi.sum(axis=0), bound, "Σ_k S_k")
