"""Gaussians and their algebra, Monte Carlo expectations, and mixtures reduced to fewer components."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

import emalgam_kernels
from emalgam import BackendUnavailable, GaussianMixture, Mixture, backends
from emalgam import gaussian as gaussians
from emalgam.divergence import kl, kl_monte_carlo
from emalgam.draws import philox_seed
from emalgam.sampling import Estimate, Gaussian, expectation, merge, merge_costs, moment_match, reduce
from tests import divergence_oracles as truth
from tests import oracles
from tests.conftest import COVARIANCE_TYPES
from tests.kernels.problems import random_mixture
from tests.tolerances import STANDARD_ERRORS, tolerance

ALGEBRA = tolerance("algebra of Gaussians", "float64")


def random_gaussian(seed: int, D: int = 3, batch: tuple[int, ...] = ()) -> Gaussian:
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(*batch, D, D)) * 0.4 + np.eye(D)
    return Gaussian(rng.normal(size=(*batch, D)), factors @ factors.swapaxes(-1, -2))


def mixture_of(K: int, D: int, covariance_type: str, seed: int = 0) -> tuple[Mixture, oracles.Gaussians]:
    given = random_mixture(np.random.default_rng(seed), K, D, covariance_type)
    return Mixture(given.weights, given.means, given.covariances, covariance_type), given


# ---- slides 79-83: the Gaussian, its linear map, its logarithm


def test_shares_of_the_normal_distribution() -> None:
    """0-1σ 34.13 %, 1-2σ 13.59 %, beyond 2σ 2.28 % (slide 80 rounds), by quadrature of the density and by sampling."""
    normal = Gaussian(0.0, 1.0)
    for low, high, share in ((0, 1, 0.3413), (1, 2, 0.1359), (2, np.inf, 0.0228)):
        area = integrate.quad(lambda x: np.exp(normal.log_prob(x)), low, high)[0]
        assert round(area, 4) == share
        found = expectation(lambda x, a=low, b=high: (x[:, 0] > a) & (x[:, 0] < b), normal, 200_000, seed=1)
        assert abs(found.value - area) < STANDARD_ERRORS * found.standard_error


def test_linear_map_of_a_gaussian() -> None:
    """E(aX + b) = a E(X) + b and Var(aX + b) = a² Var(X); A x + b has A μ + b and A Σ Aᵀ."""
    line = Gaussian(66.8, 41.36).affine(2.0, -3.0)
    np.testing.assert_allclose([line.mean[0], line.covariance[0, 0]], [2 * 66.8 - 3, 4 * 41.36], rtol=ALGEBRA)
    gaussian, rng = random_gaussian(0), np.random.default_rng(1)
    A, b = rng.normal(size=(2, 3)), rng.normal(size=2)
    mapped = gaussian.affine(A, b)
    np.testing.assert_allclose(mapped.mean, A @ gaussian.mean + b, rtol=ALGEBRA)
    np.testing.assert_allclose(mapped.covariance, A @ gaussian.covariance @ A.T, rtol=ALGEBRA)


def test_logarithm_of_the_density() -> None:
    """log N = −½ log 2π − log σ − (x − μ)² / 2σ²."""
    x, mean, deviation = 2.5, 1.0, 0.5
    expected = -0.5 * np.log(2 * np.pi) - np.log(deviation) - (x - mean) ** 2 / (2 * deviation**2)
    assert Gaussian(mean, deviation**2).log_prob(x) == pytest.approx(expected, rel=ALGEBRA)


# ---- Gaussian


@pytest.mark.parametrize("D", [1, 2, 7])
@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_log_prob_and_entropy(D: int, covariance_type: str) -> None:
    gaussian = random_gaussian(D, D)
    variances = np.diagonal(gaussian.covariance).copy()
    covariance = {"full": gaussian.covariance, "diag": variances, "spherical": variances[0]}[covariance_type]
    matrix = {"full": gaussian.covariance, "diag": np.diag(variances), "spherical": variances[0] * np.eye(D)}
    given = Gaussian(gaussian.mean, covariance, covariance_type)
    scipys = stats.multivariate_normal(gaussian.mean, matrix[covariance_type])
    x = np.random.default_rng(0).normal(size=(4, 5, D))
    np.testing.assert_allclose(given.log_prob(x), scipys.logpdf(x).reshape(4, 5), rtol=ALGEBRA)
    assert given.entropy() == pytest.approx(scipys.entropy(), rel=ALGEBRA)
    if D > 1 and covariance_type == "full":
        assert stats.multivariate_normal(gaussian.mean, np.diag(variances)).entropy() > given.entropy()


def test_an_empty_stack_has_samples_of_none() -> None:
    assert Gaussian(np.zeros((0, 2)), np.zeros((0, 2, 2))).sample(3, 0).shape == (3, 0, 2)


def test_stacks_broadcast() -> None:
    """One covariance for many means; x with leading axes meets the stack; every member is as it would be alone."""
    means = np.arange(6.0).reshape(3, 2)
    tied = Gaussian(means, [[2.0, 0.5], [0.5, 1.0]])
    assert (tied.batch_shape, tied.covariance.shape, tied.n_features) == ((3,), (3, 2, 2), 2)
    assert tied.covariance.strides[0] == 0, "a shared covariance is not copied"
    stack = random_gaussian(1, 2, (4, 3))
    x = np.random.default_rng(0).normal(size=(5, 1, 3, 2))
    log_prob = stack.log_prob(x)
    assert log_prob.shape == (5, 4, 3)
    alone = Gaussian(stack.mean[2, 1], stack.covariance[2, 1])
    assert log_prob[4, 2, 1] == pytest.approx(alone.log_prob(x[4, 0, 1]), rel=ALGEBRA)
    assert stack.entropy()[2, 1] == pytest.approx(alone.entropy(), rel=ALGEBRA)


def test_marginal_and_conditional() -> None:
    """p(a, b) = p(a given b) p(b), for every type and for stacks."""
    for gaussian in (
        random_gaussian(2, 4),
        random_gaussian(3, 4, (2, 3)),
        Gaussian(np.arange(4.0), np.arange(1.0, 5), "diag"),
        Gaussian(np.arange(8.0).reshape(2, 4), [3.0, 1.0], "spherical"),
    ):
        x = np.array([0.3, -1.0, 2.0, 0.7])
        known, rest = [3, 1], [0, 2]
        marginal, conditional = gaussian.marginal(known), gaussian.conditional(known, x[known])
        total = marginal.log_prob(x[known]) + conditional.log_prob(x[rest])
        np.testing.assert_allclose(total, gaussian.log_prob(x), rtol=10 * ALGEBRA)
        assert marginal.batch_shape == conditional.batch_shape == gaussian.batch_shape
    many = random_gaussian(2, 3).conditional([0], np.linspace(-1, 1, 5)[:, None])
    assert many.batch_shape == (5,)


def test_affine_of_stacks_and_numbers() -> None:
    stack = random_gaussian(4, 2, (3,))
    A = np.random.default_rng(0).normal(size=(3, 2, 2))
    mapped = stack.affine(A, np.ones((3, 2)))
    for m in range(3):
        np.testing.assert_allclose(mapped.covariance[m], A[m] @ stack.covariance[m] @ A[m].T, rtol=ALGEBRA)
    diagonal = Gaussian([1.0, 2.0], [1.0, 4.0], "diag").affine(-2.0)
    assert diagonal.covariance_type == "diag"
    np.testing.assert_array_equal(diagonal.covariance, [4.0, 16.0])
    assert Gaussian([1.0, 2.0], [1.0, 4.0], "diag").affine([[1.0, 1.0]]).covariance.tolist() == [[5.0]]


def test_samples_have_the_moments(backend: str) -> None:
    """Mean and covariance of 1e5 draws within `STANDARD_ERRORS`, of one Gaussian and of a stack."""
    n = 100_000 if backend != "reference" else 20_000
    stack = random_gaussian(5, 3, (2,))
    for gaussian in (random_gaussian(5, 3), stack, Gaussian([1.0, 2.0], [0.25, 4.0], "diag")):
        x = gaussian.sample(n, random_state=7, backend=backend)
        assert x.shape == (n, *gaussian.mean.shape)
        z = np.einsum("n...d->...nd", x - gaussian.mean)
        full = gaussian.covariance if gaussian.covariance_type == "full" else np.diag(gaussian.covariance)
        variance = np.diagonal(full, axis1=-2, axis2=-1)
        assert (np.abs(z.mean(axis=-2)) < STANDARD_ERRORS * np.sqrt(variance / n)).all()
        products = z.swapaxes(-1, -2) @ z / n
        # Var(x_i x_j) = Σ_ii Σ_jj + Σ_ij²
        error = np.sqrt((variance[..., :, None] * variance[..., None, :] + full**2) / n)
        assert (np.abs(products - full) < STANDARD_ERRORS * error).all()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_sample_i_depends_on_seed_and_i(backend: str, batch: tuple[int, ...]) -> None:
    gaussian = random_gaussian(6, 3, batch)
    many = gaussian.sample(1000, random_state=3, backend=backend)
    np.testing.assert_array_equal(gaussian.sample(10, random_state=3, backend=backend), many[:10])
    np.testing.assert_array_equal(gaussian.sample(1000, random_state=3, backend=backend, n_threads=3), many)
    assert not np.array_equal(gaussian.sample(10, random_state=4, backend=backend), many[:10])


@pytest.mark.parametrize(("n", "batch"), [(50, (2, 3)), (2, (40,)), (7, (7,)), (1, (1,))])
def test_stacks_are_coloured_in_tiles(monkeypatch: pytest.MonkeyPatch, n: int, batch: tuple[int, ...]) -> None:
    """Tiles of a few numbers, some cut off by the end of the stack, give the bits of one; each is μ + L ε."""
    gaussian = random_gaussian(8, 3, batch)
    whole = gaussian.sample(n, random_state=1, n_threads=1)
    noise = Gaussian(np.zeros((*batch, 3)), np.eye(3)).sample(n, random_state=1, n_threads=1)
    expected = gaussian.mean + np.einsum("...ij,n...j->n...i", np.linalg.cholesky(gaussian.covariance), noise)
    np.testing.assert_allclose(whole, expected, rtol=ALGEBRA, atol=ALGEBRA)
    for elements in (1, 20, 70):
        monkeypatch.setattr(gaussians, "ELEMENTS_OF_A_TILE", elements)
        np.testing.assert_array_equal(gaussian.sample(n, random_state=1, n_threads=3), whole)


def test_frozen_and_pickled() -> None:
    gaussian = pickle.loads(pickle.dumps(random_gaussian(0)))
    with pytest.raises(ValueError, match="read-only"):
        gaussian.mean[0] = 1.0
    with pytest.raises(AttributeError):
        gaussian.mean = np.zeros(3)


def test_tensors() -> None:
    """Read from torch's memory; log_prob returns a tensor."""
    torch = pytest.importorskip("torch")
    gaussian = Gaussian(torch.zeros(2), torch.eye(2, dtype=torch.float32))
    result = gaussian.log_prob(torch.zeros(3, 2))
    assert isinstance(result, torch.Tensor)
    assert result.shape == (3,)
    assert kl(gaussian, Gaussian(torch.ones(2), torch.eye(2))) == 1.0


BAD_GAUSSIANS: list[tuple[tuple[Any, ...], str]] = [
    (([0.0, np.nan], np.eye(2)), r"mean contains NaN at \[1\]"),
    (([[0.0], [np.inf]], [[1.0]]), r"mean contains inf at \[1, 0\]"),
    (([0.0, 0.0], [[1.0, np.nan], [np.nan, 1.0]]), r"covariance contains NaN at \[0, 1\]"),
    (([0.0, 0.0], np.eye(3)), r"covariance has shape \(3, 3\) and mean \(2,\); expected \(..., 2, 2\) for type 'full'"),
    (([0.0, 0.0], 1.0), r"covariance has shape \(\)"),
    (([0.0, 0.0], [1.0, 1.0, 1.0], "diag"), r"expected \(..., 2\) for type 'diag'"),
    ((np.zeros((3, 2)), np.tile(np.eye(2), (4, 1, 1))), r"do not broadcast: mean \(3,\), covariance \(4,\)"),
    (
        (np.zeros(2), [np.eye(2), [[1.0, 2.0], [2.0, 1.0]]]),
        r"covariance at \[1\] is not positive definite .smallest eigenvalue -1",
    ),
    ((np.zeros(2), [[1.0, 2.0], [2.0, 1.0]]), "covariance is not positive definite .smallest eigenvalue -1"),
    ((np.zeros(2), [np.eye(2), [[1.0, 0.1], [0.2, 1.0]]]), r"covariance at \[1\] is not symmetric; pass 0.5"),
    (([0.0, 0.0], [[1.0, 1.0], [1.0, 0.0]], "diag"), r"not positive definite at \[1, 1\]: a variance is 0"),
    ((0.0, -1.0), "covariance is not positive definite"),
    ((["a"], [[1.0]]), "mean has dtype <U1; expected real numbers"),
    (([0.0], [[1.0]], "tied"), "covariance_type is 'tied'; expected one of full, diag, spherical"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_GAUSSIANS)
def test_bad_gaussians_name_the_argument_and_the_index(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gaussian(*arguments)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((0, 1, np.nan), r"covariance contains NaN at \[17, 203, 0, 1\]"),
        ((1, 1, np.inf), r"covariance contains inf at \[17, 203, 1, 1\]"),
        ((0, 1, 0.5), r"covariance at \[17, 203\] is not symmetric"),
        ((2, 2, -1.0), r"covariance at \[17, 203\] is not positive definite .smallest eigenvalue -"),
    ],
)
def test_first_bad_covariance_of_a_large_stack(fault: tuple[int, int, float], message: str) -> None:
    """Parts of the stack are checked by different threads; the first fault of them all is reported."""
    covariances = np.tile(random_gaussian(0).covariance, (40, 400, 1, 1))
    Gaussian(np.zeros(3), covariances)
    i, j, value = fault
    covariances[17, 203, i, j] = covariances[18:, 5, i, j] = covariances[39, :, i, j] = value
    with pytest.raises(ValueError, match=message):
        Gaussian(np.zeros(3), covariances)


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_factors_are_computed_when_they_are_needed(covariance_type: str) -> None:
    one = {"full": random_gaussian(0).covariance, "diag": np.array([1.0, 2.0, 4.0]), "spherical": np.array(4.0)}
    callers = np.array(one[covariance_type])
    gaussian = Gaussian(np.arange(6.0).reshape(2, 3), callers, covariance_type)
    kl(gaussian, gaussian)
    assert "precision_cholesky" not in vars(gaussian)
    callers *= 2.0  # the Gaussian has its own
    P = gaussian.precision_cholesky
    assert P.shape == gaussian.covariance.shape
    assert P.strides[0] == 0, "the factor of one covariance was computed twice"
    assert not P.flags.writeable
    assert gaussian.precision_cholesky is P
    if covariance_type == "full":
        np.testing.assert_allclose(P[0].T @ one["full"] @ P[0], np.eye(3), atol=1e-13)
        assert not np.tril(P[0], -1).any()
    else:
        np.testing.assert_array_equal(P[0], 1 / np.sqrt(one[covariance_type]))
    again = pickle.loads(pickle.dumps(gaussian))
    np.testing.assert_array_equal(again.precision_cholesky, P)
    assert not again.precision_cholesky.flags.writeable


def test_arrays_that_cannot_change_are_shared() -> None:
    """Read-only arrays of float64 in C order; neither views of what may change, nor other types and orders."""
    mean, covariance = np.zeros((40, 3)), np.tile(random_gaussian(0).covariance, (40, 1, 1)).copy()
    view = covariance[:]
    view.setflags(write=False)
    assert not np.shares_memory(Gaussian(mean, view).covariance, covariance)
    for array in (mean, covariance):
        array.setflags(write=False)
    shared = Gaussian(mean, covariance[10:11])
    assert np.shares_memory(shared.covariance, covariance)
    assert np.shares_memory(shared.mean, mean)
    variances = np.einsum("mii->mi", covariance).copy()
    variances.setflags(write=False)
    assert np.shares_memory(Gaussian(mean, variances, "diag").covariance, variances)
    for other in (covariance.astype(np.float32), covariance.copy(order="F")):
        other.setflags(write=False)
        assert not np.shares_memory(Gaussian(mean, other).covariance, other)
    bad = covariance.copy()
    bad[7, 0, 0] = -1.0
    bad.setflags(write=False)
    with pytest.raises(ValueError, match=r"covariance at \[7\] is not positive definite"):
        Gaussian(mean, bad)


def test_gaussians_are_checked_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arrays are in main memory, whichever backend evaluates them; a CPU's backend that was chosen does it."""
    monkeypatch.setenv("EMALGAM_BACKEND", "numba_cuda")
    np.testing.assert_allclose(Gaussian(0.0, 4.0).precision_cholesky, [[0.5]])
    monkeypatch.setenv("EMALGAM_BACKEND", "reference")
    assert backends.host_kernels("kl") is emalgam_kernels.load("reference", "kl")


def test_bad_arguments_of_methods() -> None:
    gaussian, pair = random_gaussian(0), random_gaussian(0, 3, (2,))
    for call, message in (
        (lambda: gaussian.log_prob(np.zeros((5, 2))), r"x has shape \(5, 2\); expected \(..., 3\)"),
        (lambda: Gaussian(0.0, 1.0).log_prob(np.zeros(5)), r"for one feature: x\[..., None\]"),
        (lambda: pair.log_prob(np.zeros((5, 3))), r"do not broadcast: x \(5,\), the Gaussians \(2,\)"),
        (lambda: gaussian.log_prob([0.0, np.nan, 0.0]), r"x contains NaN at \[1\]"),
        (lambda: gaussian.sample(0), "n_samples is 0; expected an integer >= 1"),
        (lambda: gaussian.sample(-1), "n_samples is -1"),
        (lambda: gaussian.sample(1, random_state=-1), "random_state is -1"),
        (lambda: gaussian.affine(np.ones((2, 2))), r"A has shape \(2, 2\); expected \(..., rows, 3\)"),
        (lambda: gaussian.affine(np.ones((2, 3))), "A of shape .2, 3. has too small a rank"),
        (lambda: gaussian.affine(0.0), "A is 0"),
        (lambda: gaussian.affine(2.0, np.ones(2)), r"b has shape \(2,\); expected \(..., 3\)"),
        (lambda: gaussian.marginal([3]), r"features is \[3\]; expected different integers from 0 to 2"),
        (lambda: gaussian.conditional([0, 1, 2], np.zeros(3)), "leave at least one unknown"),
        (lambda: gaussian.conditional([0], np.zeros(2)), "values has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_backend_without_these_kernels_says_so(no_gpu: str) -> None:
    with pytest.raises(BackendUnavailable, match="numba_cuda"):
        random_gaussian(0).sample(1, backend="numba_cuda")


def test_seeds() -> None:
    """An integer is the key; others draw one; the same generator in the same state draws the same."""
    assert philox_seed(2**64 - 1) == 2**64 - 1
    assert philox_seed(np.random.default_rng(1)) == philox_seed(np.random.default_rng(1))
    assert philox_seed(None) != philox_seed(None)
    with pytest.raises(ValueError, match="random_state"):
        philox_seed(2**64)


# ---- expectation


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_expectation_of_a_mixture(backend: str, covariance_type: str) -> None:
    """E[x] = Σ w μ and E[x xᵀ] = Σ w (Σ + μ μᵀ), several values at once, from a Mixture and from an estimator."""
    mixture, given = mixture_of(3, 2, covariance_type)
    second = np.einsum("k,kij->ij", given.weights, oracles.full_covariances(given).astype(float))
    second += (given.weights[:, None] * given.means).T @ given.means
    estimator = GaussianMixture.from_parameters(
        given.weights, given.means, given.covariances, covariance_type=covariance_type
    )
    for p in (mixture, estimator):
        first = expectation(lambda x: x, p, 20_000, seed=1, backend=backend)
        assert (np.abs(first.value - given.weights @ given.means) < STANDARD_ERRORS * first.standard_error).all()
        found = expectation(lambda x: x[:, :, None] * x[:, None], p, 20_000, 1, backend=backend)
        assert found.value.shape == (2, 2)
        assert (np.abs(found.value - second) < STANDARD_ERRORS * found.standard_error).all()


def test_expectation_of_the_notes_mixture() -> None:
    """The converged parameters of the EM chapter: their mean is that of the data, whatever the mixture."""
    p = Mixture(
        np.array([0.355873, 0.644127]),
        np.array([[2.036388, 54.478516], [4.289662, 79.968115]]),
        np.array([[[0.0691677, 0.4351676], [0.4351676, 33.697282]], [[0.1699684, 0.9406093], [0.9406093, 36.046211]]]),
    )
    found = expectation(lambda x: x, p, 50_000, seed=2)
    assert (np.abs(found.value - [3.487783, 70.897059]) < STANDARD_ERRORS * found.standard_error).all()


def test_expectation_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks give the mean and the standard error of all samples, far from zero too; never more rows at once."""
    monkeypatch.setattr("emalgam.sampling.ELEMENTS_AT_ONCE", 700)
    rows: list[int] = []

    def f(x: np.ndarray) -> np.ndarray:
        rows.append(len(x))
        return x[:, 0] + 1e6

    gaussian = random_gaussian(1, 3)
    found = expectation(f, gaussian, 1000, seed=5)
    values = gaussian.sample(1000, random_state=5)[:, 0] + 1e6
    assert max(rows) == 233
    assert sum(rows) == 1000
    assert found.value == pytest.approx(values.mean(), rel=ALGEBRA)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(1000), rel=1e-8)
    assert found == expectation(f, gaussian, 1000, seed=5, n_threads=1)


def test_expectation_checks_its_arguments() -> None:
    normal = Gaussian(0.0, 1.0)
    for n in (0, -1):
        with pytest.raises(ValueError, match=rf"n_samples\) is {n}; expected an integer >= 1"):
            expectation(np.sum, normal, n, 0)
    with pytest.raises(ValueError, match=r"f returned shape \(\)"):
        expectation(np.sum, normal, 3, 0)
    with pytest.raises(ValueError, match="p is a str; expected a Gaussian, Mixture or fitted GaussianMixture"):
        expectation(np.sum, "normal", 3, 0)
    with pytest.raises(ValueError, match=r"p is a stack of \(2,\) Gaussians; expected one"):
        expectation(np.sum, random_gaussian(0, 2, (2,)), 3, 0)
    single = expectation(lambda x: x[:, 0], normal, 1, 0)
    assert isinstance(single, Estimate)
    assert np.isnan(single.standard_error), "one sample does not know its own spread"


# ---- reduction


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_merging_matches_moments(covariance_type: str) -> None:
    """Of the pair, and so of the mixture: all for full and tied, variances for diag, their mean for spherical."""
    mixture, _ = mixture_of(4, 3, covariance_type)
    merged = merge(mixture, 3, 1)
    assert merged.n_components == 3
    assert merged.covariance_type == ("full" if covariance_type == "tied" else covariance_type)
    before, after = moment_match(mixture), moment_match(merged)
    np.testing.assert_allclose(after.mean, before.mean, rtol=10 * ALGEBRA)
    reading = {
        "full": lambda c: c,
        "tied": lambda c: c,
        "diag": np.diagonal,
        "spherical": np.trace,
    }[covariance_type]
    np.testing.assert_allclose(reading(after.covariance), reading(before.covariance), rtol=10 * ALGEBRA)
    np.testing.assert_allclose(merged.means[[0, 2]], mixture.means[[0, 2]], rtol=ALGEBRA)


def test_costs_are_runnalls() -> None:
    mixture, given = mixture_of(5, 3, "full")
    table = merge_costs(mixture)
    for i in range(5):
        for j in range(i):
            assert table[i, j] == table[j, i] == pytest.approx(truth.merge_cost(given, i, j), rel=10 * ALGEBRA)
    np.testing.assert_array_equal(np.diagonal(table), 0.0)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_cost_bounds_the_divergence(covariance_type: str) -> None:
    """KL(before ‖ after) ≤ B_ij, by Monte Carlo."""
    mixture, _ = mixture_of(3, 2, covariance_type, seed=3)
    table = merge_costs(mixture)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        found = kl_monte_carlo(mixture, merge(mixture, i, j), 20_000, random_state=0)
        assert found.value < table[i, j] + STANDARD_ERRORS * found.standard_error


def test_reduction_is_greedy_merging() -> None:
    """The same as merging the cheapest pair again and again, by the public functions."""
    mixture, _ = mixture_of(7, 2, "full", seed=4)
    step = mixture
    for K in range(6, 0, -1):
        table = merge_costs(step)
        np.fill_diagonal(table, np.inf)
        step = merge(step, *divmod(int(table.argmin()), K + 1))
        reduced = reduce(mixture, K)
        np.testing.assert_allclose(reduced.weights, step.weights, rtol=100 * ALGEBRA)
        np.testing.assert_allclose(reduced.means, step.means, rtol=100 * ALGEBRA, atol=100 * ALGEBRA)
    single, moments = reduce(mixture, 1), moment_match(mixture)
    np.testing.assert_allclose(single.covariances[0], moments.covariance, rtol=100 * ALGEBRA)
    assert reduce(mixture, 7) is mixture


@given(seed=st.integers(0, 200), K=st.integers(1, 6), covariance_type=st.sampled_from(COVARIANCE_TYPES))
def test_doubled_components_are_found(seed: int, K: int, covariance_type: str) -> None:
    """A mixture whose components all appear twice is reduced to itself: merging equals costs nothing."""
    mixture, given_parameters = mixture_of(K, 2, covariance_type, seed)
    covariances = given_parameters.covariances
    doubled = Mixture(
        np.tile(mixture.weights / 2, 2),
        np.tile(mixture.means, (2, 1)),
        covariances if covariance_type == "tied" else np.concatenate([covariances] * 2),
        covariance_type,
    )
    np.testing.assert_allclose(reduce(doubled, K).means, mixture.means, rtol=100 * ALGEBRA)
    np.testing.assert_allclose(reduce(doubled, K).weights, mixture.weights, rtol=100 * ALGEBRA)


def test_reduction_at_extreme_scales_and_without_weight() -> None:
    mixture, given = mixture_of(4, 2, "full")
    small = Mixture(given.weights, given.means * 1e-100, given.covariances * 1e-200, "full")
    np.testing.assert_allclose(merge_costs(small), merge_costs(mixture), rtol=1e-9)
    np.testing.assert_allclose(reduce(small, 2).means, 1e-100 * reduce(mixture, 2).means, rtol=1e-9)
    absent = Mixture(np.array([0.0, 0.0, 0.5, 0.5]), given.means, given.covariances, "full")
    assert np.isfinite(merge_costs(absent)).all()
    np.testing.assert_allclose(reduce(absent, 2).weights.sum(), 1.0)


def test_reduction_checks_its_arguments() -> None:
    mixture, _ = mixture_of(3, 2, "full")
    for call, message in (
        (lambda: merge(mixture, 0, 3), "j is 3; the mixture has 3 components, 0 to 2"),
        (lambda: merge(mixture, 1, 1), "i and j are both 1"),
        (lambda: merge(mixture, -1, 1), "i is -1"),
        (lambda: reduce(mixture, 0), "n_components is 0; expected an integer >= 1"),
        (lambda: reduce(mixture, 4), "n_components is 4; the mixture has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("units", [1.0, 1e-17, 1e12])
def test_rank_does_not_depend_on_units(units: float) -> None:
    A = np.array([[1.0, 0.0], [0.0, units]])
    moved = Gaussian(np.zeros(2), np.eye(2)).affine(A)
    np.testing.assert_allclose(np.diag(moved.covariance), [1.0, units**2], rtol=1e-12)
    wide = Gaussian(np.zeros(2), np.array([1e20, 1e-20]), "diag").affine(np.eye(2))
    np.testing.assert_allclose(np.diag(wide.covariance), [1e20, 1e-20], rtol=1e-12)
    with pytest.raises(ValueError, match="too small a rank"):
        Gaussian(np.zeros(2), np.eye(2)).affine(units * np.ones((2, 2)))
    with pytest.raises(ValueError, match="too small a rank"):
        Gaussian(np.zeros(2), np.eye(2)).affine(np.array([[1.0, 0.0], [0.0, 0.0]]))
