"""Divergences: closed forms to mpmath, approximations to their formulas, bounds and Monte Carlo to quadrature."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from emalgam import GaussianMixture, Mixture, fit_many
from emalgam.batch import ManyFits
from emalgam.divergence import (
    Bounds,
    entropy_bounds,
    gaussian_cross_entropy,
    jensen_shannon,
    kl,
    kl_all_pairs,
    kl_bounds,
    kl_matched,
    kl_monte_carlo,
    kl_product,
    kl_unscented,
    kl_variational,
    symmetric_kl,
)
from emalgam.monte_carlo import Members
from emalgam.sampling import Estimate, Gaussian, expectation, moment_match
from emalgam.stacks import MixtureStack
from tests import divergence_oracles as truth
from tests import oracles
from tests.conftest import COVARIANCE_TYPES
from tests.kernels.problems import random_mixture
from tests.tolerances import STANDARD_ERRORS, tolerance

CLOSED = tolerance("closed-form KL", "float64")
ARITHMETICS = ("float64", "float32")
TINY = tolerance("tiny KL", "float64")
MIXTURES = tolerance("divergence of mixtures", "float64")
QUADRATURE = tolerance("quadrature", "float64")
AFFINE = tolerance("affine invariance of KL", "float64")
DATA = Path(__file__).parent.parent / "examples" / "data"

Approximation = Callable[..., Any]
APPROXIMATIONS: dict[Approximation, Callable[[oracles.Gaussians, oracles.Gaussians], Any]] = {
    kl_variational: truth.variational,
    kl_matched: truth.matched,
    kl_unscented: truth.unscented,
    kl_product: truth.product_of_gaussians,
    kl_bounds: truth.bounds,
}
every_approximation = pytest.mark.parametrize("approximation", APPROXIMATIONS, ids=lambda f: f.__name__)


def with_condition(rng: np.random.Generator, D: int, condition: float) -> np.ndarray:
    """A covariance with eigenvalues from 1 down to 1 / condition."""
    q = np.linalg.qr(rng.normal(size=(D, D)))[0]
    matrix = q * condition ** -np.linspace(0, 1, D) @ q.T
    return np.asarray((matrix + matrix.T) / 2)


def stack_of(M: int, D: int, seed: int, condition: float = 30.0, offset: float = 0.0) -> Gaussian:
    rng = np.random.default_rng(seed)
    return Gaussian(rng.normal(size=(M, D)) + offset, np.stack([with_condition(rng, D, condition) for _ in range(M)]))


def mixture_of(K: int, D: int, covariance_type: str = "full", seed: int = 0) -> Mixture:
    given = random_mixture(np.random.default_rng(seed), K, D, covariance_type, spread=1.5)
    return Mixture(given.weights, given.means, given.covariances, covariance_type)


def oracle(mixture: Mixture) -> oracles.Gaussians:
    return oracles.Gaussians(mixture.weights, mixture.means, mixture.covariances, mixture.covariance_type)


def scale_of(p: Mixture, q: Mixture) -> float:
    """1 + the largest divergence between components."""
    pairs = ((f, g) for _, f in truth.components(oracle(p)) for _, g in truth.components(oracle(q)))
    return 1 + max(truth.kl(f, g) for f, g in pairs)


LINE_P = Mixture(np.array([0.3, 0.7]), np.array([[-1.5], [1.0]]), np.array([0.5, 1.2]), "spherical")
LINE_Q = Mixture(np.array([0.5, 0.3, 0.2]), np.array([[-1.0], [0.8], [3.0]]), np.array([1.0, 0.6, 2.0]), "spherical")


# ---- the EM chapter, and slides 95-101


def test_two_normals() -> None:
    """Slide 101 finished: log(σ_Q/σ_P) + (σ_P² + (μ_P − μ_Q)²) / (2σ_Q²) − ½."""
    for mean_p, sigma_p, mean_q, sigma_q in ((1.0, 1.0, 0.0, 2.0), (66.2, 15.7, 66.8, 6.4), (0.0, 1.0, 0.0, 1.0)):
        formula = np.log(sigma_q / sigma_p) + (sigma_p**2 + (mean_p - mean_q) ** 2) / (2 * sigma_q**2) - 0.5
        assert kl(Gaussian(mean_p, sigma_p**2), Gaussian(mean_q, sigma_q**2)) == pytest.approx(formula, rel=1e-12)


def test_zero_iff_equal_positive_and_asymmetric() -> None:
    p, q = Gaussian(1.0, 1.0), Gaussian(0.0, 4.0)
    assert kl(p, p) == kl(q, q) == 0.0
    assert kl(p, q) == pytest.approx(0.4431471805599453, rel=CLOSED)
    assert kl(q, p) == pytest.approx(1.3068528194400546, rel=CLOSED)
    assert symmetric_kl(p, q) == pytest.approx(1.75, rel=CLOSED)
    assert isinstance(kl(p, q), float)


def test_monte_carlo_as_in_the_chapter() -> None:
    """The mean of log p − log q over samples of p: by `kl_monte_carlo`, and written out with `expectation`."""
    p, q = Gaussian(1.0, 1.0), Gaussian(0.0, 4.0)
    written = expectation(lambda x: p.log_prob(x) - q.log_prob(x), p, 50_000, seed=3)
    found = kl_monte_carlo(p, q, 50_000, random_state=3)
    assert abs(found.value - kl(p, q)) < STANDARD_ERRORS * found.standard_error
    assert found.value == pytest.approx(written.value, rel=1e-9), "the same samples"
    assert found.standard_error == pytest.approx(written.standard_error, rel=1e-6)


def test_least_divergence_is_greatest_likelihood() -> None:
    """With the data's own Gaussian ĝ, −mean log q = H(ĝ, q) = H(ĝ) + KL(ĝ ‖ q) for every q: q = ĝ is best by both."""
    x = np.loadtxt(DATA / "old_faithful.csv", delimiter=",", skiprows=1)
    data = Gaussian(x.mean(axis=0), np.cov(x.T, bias=True))
    rng = np.random.default_rng(0)
    for _ in range(10):
        q = Gaussian(data.mean + rng.normal(size=2), with_condition(rng, 2, 10.0) * 100)
        likelihood = q.log_prob(x).mean()
        assert gaussian_cross_entropy(data, q) == pytest.approx(-likelihood, rel=1e-11)
        assert likelihood - data.log_prob(x).mean() == pytest.approx(-kl(data, q), rel=1e-9)
        assert likelihood < data.log_prob(x).mean()


# ---- Gaussians


GAUSSIAN_TYPES = ("full", "diag", "spherical")
every_gaussian_type = pytest.mark.parametrize("covariance_type", GAUSSIAN_TYPES)
every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)


def covariances_of(shape: tuple[int, ...], D: int, covariance_type: str, seed: int) -> np.ndarray:
    """Of condition numbers of at most 10."""
    rng = np.random.default_rng(seed)
    if covariance_type != "full":
        return rng.uniform(0.5, 4.0, size=(*shape, D) if covariance_type == "diag" else shape)
    matrices = [with_condition(rng, D, 10.0) for _ in range(int(np.prod(shape, dtype=int)))]
    return np.stack(matrices).reshape(*shape, D, D)


def member(gaussian: Gaussian, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the matrix of one Gaussian of a stack."""
    covariance, D = gaussian.covariance[index], gaussian.n_features
    return gaussian.mean[index], covariance if gaussian.covariance_type == "full" else covariance * np.eye(D)


def assert_as_members(p: Gaussian, q: Gaussian, backend: str, arithmetic: str) -> None:
    """Stacks give what their members give one by one, pair by pair (as far as they broadcast) and each with each."""
    relative, how = tolerance("closed-form KL", arithmetic), {"backend": backend, "arithmetic": arithmetic}
    of_table = relative + tolerance("all pairs", arithmetic)
    table = kl_all_pairs(p, q, **how)
    expected = np.empty(p.batch_shape + q.batch_shape)
    for i in np.ndindex(p.batch_shape):
        for j in np.ndindex(q.batch_shape):
            expected[i + j] = truth.kl(member(p, i), member(q, j))
    np.testing.assert_allclose(table, expected, rtol=of_table, err_msg="kl_all_pairs")
    one = Gaussian(*member(q, (0,) * len(q.batch_shape)))
    alone = expected[(..., *(0,) * len(q.batch_shape))]
    np.testing.assert_allclose(kl(p, one, **how), alone, rtol=relative, err_msg="kl of a stack and one")
    if p.batch_shape == q.batch_shape:
        paired = np.array([expected[i + i] for i in np.ndindex(p.batch_shape)]).reshape(p.batch_shape)
        np.testing.assert_allclose(kl(p, q, **how), paired, rtol=relative, err_msg="kl of two stacks")


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Fortran": np.asfortranarray,
    "read-only Fortran": lambda array: read_only(array.copy(order="F")),
    "last axis first": lambda array: np.moveaxis(np.moveaxis(array, -1, 0).copy(), 0, -1),
    "negative strides": lambda array: np.flip(np.flip(array).copy()),
    "every other": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
}


@every_arithmetic
@every_gaussian_type
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(backend: str, layout: str, covariance_type: str, arithmetic: str) -> None:
    arrange, rng = LAYOUTS[layout], np.random.default_rng(0)
    p, q = (
        Gaussian(
            arrange(rng.normal(size=(2, 3, 3))),
            arrange(covariances_of((2, 3), 3, covariance_type, seed)),
            covariance_type,
        )
        for seed in (1, 2)
    )
    assert_as_members(p, q, backend, arithmetic)
    if arithmetic == "float64":
        alone = [gaussian_cross_entropy(*(Gaussian(*member(g, i)) for g in (p, q))) for i in np.ndindex(2, 3)]
        np.testing.assert_allclose(gaussian_cross_entropy(p, q, backend=backend).ravel(), alone, rtol=CLOSED)


@every_arithmetic
@every_gaussian_type
@pytest.mark.parametrize("shapes", [((5,), ()), ((), (5,)), ((2, 1), (3,)), ((3,), (2, 1)), ((2, 1), (1, 3))], ids=str)
def test_shared_means_and_covariances(
    backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], covariance_type: str, arithmetic: str
) -> None:
    """Axes that broadcasting repeats, of the mean or of the covariance, for all of the stack or for a part of it."""
    means, covariances = shapes
    rng = np.random.default_rng(0)
    p, q = (
        Gaussian(rng.normal(size=(*means, 3)), covariances_of(covariances, 3, covariance_type, seed), covariance_type)
        for seed in (1, 2)
    )
    assert_as_members(p, q, backend, arithmetic)
    assert_as_members(p, copy.deepcopy(q), backend, arithmetic)


@pytest.mark.parametrize("offset", [1e4, 1e6, 1e8])
@every_gaussian_type
def test_float32_wherever_the_means_lie(backend: str, covariance_type: str, offset: float) -> None:
    """Offsets that float32 could not hold: one by one, in stacks, and each with each."""
    rng = np.random.default_rng(0)
    means, others = np.round(rng.normal(size=(2, 5, 3)), 3) + offset * np.array([1.0, -3.0, 0.1])
    p, q = (
        Gaussian(mean, covariances_of((5,), 3, covariance_type, seed), covariance_type)
        for seed, mean in ((1, means), (2, others))
    )
    assert_as_members(p, q, backend, "float32")
    near = Gaussian(p.mean + 2.0**-20, p.covariance, covariance_type)
    how = {"arithmetic": "float32", "backend": backend}
    np.testing.assert_allclose(kl(near, p, **how), kl(near, p), rtol=tolerance("tiny KL", "float32"))
    assert not kl(p, p, **how).any()


def test_float32_of_all_pairs_far_apart(backend: str) -> None:
    """What `kl_all_pairs` promises of means m standard deviations from their centre: 1e-7 m √KL, beside its 5e-4."""
    m = 1e4
    line = Gaussian(np.concatenate([np.arange(5.0) - m, np.arange(5.0) + m])[:, None] + 1e9, 1.0, "spherical")
    found = kl_all_pairs(line, line, arithmetic="float32", backend=backend)
    exact = kl_all_pairs(line, line)
    allowed = 1e-7 * m * np.sqrt(exact) + tolerance("all pairs", "float32") * exact
    assert (np.abs(found - exact) <= allowed).all(), np.abs(found - exact).max()


def test_float32_of_all_pairs_with_one_far_away(backend: str) -> None:
    """It does not cost the others their digits."""
    means = np.append(np.linspace(0, 1, 99), 1e9)[:, None]
    line = Gaussian(means, 1.0, "spherical")
    found = kl_all_pairs(line, line, arithmetic="float32", backend=backend)[:-1, :-1]
    np.testing.assert_allclose(found, kl_all_pairs(line, line)[:-1, :-1], rtol=0, atol=1e-6)
    none = Gaussian(np.zeros((0, 2)), np.zeros((0, 2, 2)))
    assert kl_all_pairs(none, none, arithmetic="float32", backend=backend).shape == (0, 0)


def test_symmetric_kl_of_what_is_no_array() -> None:
    g, h = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
    np.testing.assert_array_equal(symmetric_kl(g, h, lambda a, b: [kl(a, b)]), [1.0])
    assert type(symmetric_kl(g, h, kl)) is float


def test_what_a_stack_shares_is_not_written_out() -> None:
    """In float32 neither: 4000 matrices of 32 features would be 16 MB, as many means 0.5 MB."""
    rng, D = np.random.default_rng(0), 32
    covariance = with_condition(rng, D, 10.0)
    p, q = (Gaussian(rng.normal(size=(4000, D)), covariance) for _ in range(2))
    kl(p, q, arithmetic="float32")
    tracemalloc.start()
    kl(p, q, arithmetic="float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6, f"{peak / 1e6:.1f} MB"


DERIVED: dict[str, Callable[[Gaussian], Gaussian]] = {
    "marginal": lambda g: g.marginal([2, 0]),
    "conditional": lambda g: g.conditional([1], np.linspace(-1, 1, 5)[:, None]),
    "affine map": lambda g: g.affine([[1.0, 0.5, 0.0], [0.0, 1.0, -2.0]], np.arange(10.0).reshape(2, 5).T),
    "multiple": lambda g: g.affine(-2.0, np.arange(15.0).reshape(3, 5).T),
}


@every_arithmetic
@every_gaussian_type
@pytest.mark.parametrize("operation", DERIVED)
def test_what_is_derived_from_stacks(backend: str, operation: str, covariance_type: str, arithmetic: str) -> None:
    rng = np.random.default_rng(0)
    p, q = (
        DERIVED[operation](
            Gaussian(rng.normal(size=(5, 3)), covariances_of((5,), 3, covariance_type, s), covariance_type)
        )
        for s in (1, 2)
    )
    assert p.batch_shape == (5,)
    assert_as_members(p, q, backend, arithmetic)


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("condition", [1.0, 1e4])
@pytest.mark.parametrize("D", [1, 3, 8])
def test_closed_form_against_mpmath(backend: str, D: int, condition: float, offset: float) -> None:
    p, q = stack_of(6, D, 1, condition, offset), stack_of(6, D, 2, condition, offset)
    pairs = zip(zip(p.mean, p.covariance, strict=True), zip(q.mean, q.covariance, strict=True), strict=True)
    exact = np.array([float(truth.exact_kl(*pair)) for pair in pairs])
    assert exact.min() > 1e-3
    np.testing.assert_allclose(kl(p, q, backend=backend), exact, rtol=CLOSED)
    table = kl_all_pairs(p, q, backend=backend)
    np.testing.assert_allclose(np.diagonal(table), exact, rtol=CLOSED)
    entropy = p.entropy()
    np.testing.assert_allclose(gaussian_cross_entropy(p, q, backend=backend), exact + entropy, rtol=1e-11)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_tiny_divergences_keep_their_digits(backend: str, size: float) -> None:
    p, rng = stack_of(5, 4, 3, 100.0), np.random.default_rng(4)
    means = p.mean + size * 0.05 * rng.normal(size=p.mean.shape)
    q = Gaussian(means, p.covariance * (1 + size * rng.uniform(-1, 1, (5, 1, 1))))
    pairs = zip(zip(p.mean, p.covariance, strict=True), zip(q.mean, q.covariance, strict=True), strict=True)
    exact = np.array([float(truth.exact_kl(*pair)) for pair in pairs])
    np.testing.assert_allclose(kl(p, q, backend=backend), exact, rtol=TINY)
    np.testing.assert_array_equal(kl(p, p, backend=backend), 0.0)
    np.testing.assert_array_equal(np.diagonal(kl_all_pairs(p, p, backend=backend)), 0.0)


def test_batch_shapes(backend: str) -> None:
    """Broadcasting in every way, in blocks or not, gives what each pair gives alone."""
    p, q = stack_of(12, 2, 5), stack_of(4, 2, 6)
    table = kl_all_pairs(p, q, backend=backend)
    assert table.shape == (12, 4)
    p_column = Gaussian(p.mean.reshape(3, 4, 2), p.covariance.reshape(3, 4, 2, 2))
    outer = kl(p_column, q, backend=backend)
    np.testing.assert_allclose(outer, table.reshape(3, 4, 4).diagonal(axis1=1, axis2=2), rtol=CLOSED)
    one = Gaussian(q.mean[1], q.covariance[1])
    np.testing.assert_allclose(kl(p, one, backend=backend), table[:, 1], rtol=CLOSED)
    np.testing.assert_array_equal(kl(p, [one] * 12, backend=backend), kl(p, one, backend=backend))
    down = Gaussian(p.mean[:, None], p.covariance[:, None])
    np.testing.assert_allclose(kl(down, q, backend=backend), table, rtol=CLOSED)
    assert kl_all_pairs(p_column, one, backend=backend).shape == (3, 4)


def test_gathering_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = stack_of(7, 3, 1), stack_of(5, 3, 2)
    down = Gaussian(p.mean[:, None], p.covariance[:, None])
    whole = kl(down, q)
    monkeypatch.setattr("emalgam.divergence.ELEMENTS_AT_ONCE", 9 * 4)
    np.testing.assert_array_equal(kl(down, q), whole)


def test_types_meet_in_the_cheapest_common_one(backend: str) -> None:
    """diag and spherical stay diagonal, with a full one they are full; one covariance may serve a whole stack."""
    rng = np.random.default_rng(0)
    variances, means = rng.uniform(0.5, 2, (4, 3)), rng.normal(size=(4, 3))
    diag, full = Gaussian(means, variances, "diag"), Gaussian(means, variances[:, :, None] * np.eye(3))
    ball = Gaussian(-means, variances[:, 0], "spherical")
    ball_as_full = Gaussian(-means, variances[:, :1, None] * np.eye(3))
    expected = kl(full, ball_as_full, backend=backend)
    for p in (diag, full):
        for q in (ball, ball_as_full):
            np.testing.assert_allclose(kl(p, q, backend=backend), expected, rtol=CLOSED)
            np.testing.assert_allclose(kl_all_pairs(p, q, backend=backend).diagonal(), expected, rtol=CLOSED)
    tied = Gaussian(means, with_condition(rng, 3, 10.0))
    single = [Gaussian(mean, tied.covariance[0]) for mean in means]
    np.testing.assert_allclose(kl(tied, full, backend=backend), kl(single, full, backend=backend), rtol=CLOSED)


def test_float32(backend: str) -> None:
    p, q = stack_of(20, 4, 7), stack_of(20, 4, 8)
    for function in (kl, kl_all_pairs):
        double, single = (function(p, q, arithmetic=a, backend=backend) for a in ("float64", "float32"))
        np.testing.assert_allclose(single, double, rtol=1e-3)


@given(seed=st.integers(0, 10_000), D=st.integers(1, 5))
def test_divergence_is_positive_and_knows_no_coordinates(seed: int, D: int) -> None:
    """KL ≥ 0, and the same after the same affine map of both."""
    p, q = stack_of(3, D, seed), stack_of(3, D, seed + 1)
    rng = np.random.default_rng(seed)
    A, b = with_condition(rng, D, 100.0) @ with_condition(rng, D, 10.0), rng.normal(size=D)
    before = kl(p, q)
    assert (before >= 0).all()
    np.testing.assert_allclose(kl(p.affine(A, b), q.affine(A, b)), before, rtol=AFFINE, atol=AFFINE)


@given(seed=st.integers(0, 10_000), D=st.integers(1, 4), size=st.floats(1e-6, 3.0))
def test_zero_only_for_equals_and_not_symmetric(seed: int, D: int, size: float) -> None:
    """KL(p ‖ p) = 0 and KL(p ‖ q) > 0 however near q is; the two directions differ where the covariances do."""
    p, rng = stack_of(3, D, seed), np.random.default_rng(seed)
    moved = Gaussian(p.mean + size * rng.uniform(0.5, 1, p.mean.shape), p.covariance)
    wider = Gaussian(p.mean, p.covariance * (1 + size))
    np.testing.assert_array_equal(kl(p, p), 0.0)
    for q in (moved, wider):
        assert (kl(p, q) > 0).all()
        assert (kl(q, p) > 0).all()
    # ½ δᵀ Σ⁻¹ δ both ways; but for Σ_q = (1 + s) Σ_p, with a = log(1 + s): D/2 (e⁻ᵃ − 1 + a) < D/2 (eᵃ − 1 − a)
    np.testing.assert_allclose(kl(p, moved), kl(moved, p), rtol=CLOSED)
    assert (kl(p, wider) < kl(wider, p)).all()


# ---- mixtures: the formulas


@every_approximation
@pytest.mark.parametrize("types", [("full", "full"), ("diag", "spherical"), ("tied", "diag"), ("spherical", "tied")])
def test_approximations_are_their_formulas(backend: str, approximation: Approximation, types: tuple[str, str]) -> None:
    p, q = mixture_of(3, 2, types[0], 1), mixture_of(4, 2, types[1], 2)
    where = {} if approximation is kl_product else {"backend": backend}
    expected = APPROXIMATIONS[approximation](oracle(p), oracle(q))
    np.testing.assert_allclose(approximation(p, q, **where), expected, rtol=0, atol=MIXTURES * scale_of(p, q))


@every_approximation
def test_stacks_give_what_pairs_give(approximation: Approximation) -> None:
    """One to one, one to many and each with each; numbers of components and types may differ within a stack."""
    left = [mixture_of(3, 2, "full", 1), mixture_of(1, 2, "tied", 2), mixture_of(2, 2, "diag", 3)]
    right = [mixture_of(2, 2, "spherical", 4), mixture_of(3, 2, "full", 5), mixture_of(2, 2, "diag", 6)]
    table = np.array([[approximation(p, q) for q in right] for p in left])
    close = {"rtol": 0, "atol": MIXTURES * max(scale_of(p, q) for p in left for q in right)}

    def check(found: Any, expected: np.ndarray) -> None:
        found = found if isinstance(found, Bounds) else (found,)
        expected = np.moveaxis(expected, -1, 0) if len(found) == 2 else expected[None]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, **close)

    diagonal = table[np.arange(3), np.arange(3)]
    check(approximation(left, right), diagonal)
    check(approximation(left, right, all_pairs=True), table)
    check(approximation(left[0], right), table[0])
    check(approximation(left, right[1]), table[:, 1])
    check(approximation(left[:1], right), table[0])
    check(approximation(left[0], right, all_pairs=True), table[0])


@every_approximation
def test_blocks_and_threads_change_no_digit(approximation: Approximation, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = ([mixture_of(3, 2, "full", seed) for seed in range(first, first + 9)] for first in (0, 9))
    for arguments in ({}, {"all_pairs": True}):
        whole = approximation(left, right, n_threads=1, **arguments)
        np.testing.assert_array_equal(approximation(left, right, n_threads=3, **arguments), whole)
        with monkeypatch.context() as patch:
            for module in ("comparison", "divergence"):
                patch.setattr(f"emalgam.{module}.ELEMENTS_AT_ONCE", 100)
            np.testing.assert_allclose(approximation(left, right, **arguments), whole, rtol=1e-10, atol=1e-12)


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the bytes that were allocated at the most."""
    call()
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 × 300 mixtures of 4 components: a table of them all would take 12 MB, and its exponentials as much.

    One mixture with 300 components in 8 features: the sums Σ_a + Σ_b of all pairs would take 46 MB.
    """
    monkeypatch.setattr("emalgam.comparison.ELEMENTS_AT_ONCE", 2**15)
    mixtures = [mixture_of(4, 3, "full", seed) for seed in range(300)]
    table, peak = peak_of(lambda: kl_variational(mixtures, mixtures, all_pairs=True, n_threads=1))
    assert np.abs(np.diagonal(table)).max() < 10 * MIXTURES
    assert peak < 6e6, f"{peak / 1e6:.1f} MB"
    large = mixture_of(300, 8)
    _, peak = peak_of(lambda: entropy_bounds(large, n_threads=1))
    assert peak < 6e6, f"{peak / 1e6:.1f} MB"


# ---- mixtures: what is true of the formulas


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_exact_for_single_gaussians(backend: str, covariance_type: str) -> None:
    p, q = mixture_of(1, 3, covariance_type, 1), mixture_of(1, 3, covariance_type, 2)
    exact = kl(p, q, backend=backend)
    for approximation in (kl_variational, kl_matched, kl_unscented):
        assert approximation(p, q, backend=backend) == pytest.approx(exact, rel=1e-9)
    lower, upper = kl_bounds(p, q, backend=backend)
    assert lower < exact < upper


@given(seed=st.integers(0, 1000), K=st.integers(1, 4), covariance_type=st.sampled_from(COVARIANCE_TYPES))
def test_zero_for_equal_mixtures(seed: int, K: int, covariance_type: str) -> None:
    """Exactly, one by one; in stacks too. Matched pairs the components with themselves if they lie apart."""
    p = mixture_of(K, 2, covariance_type, seed)
    assert kl_variational(p, p) == kl_product(p, p) == kl_unscented(p, p) == 0.0
    assert kl_monte_carlo(p, p, 100, random_state=0)[:2] == (0.0, 0.0)
    assert jensen_shannon(p, p, 100, random_state=0).value == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_array_equal(kl_variational([p, p], [p, p]), 0.0)
    assert kl_matched(p, p) <= 1e-12
    lower, upper = kl_bounds(p, p)
    assert lower <= 1e-12
    assert upper >= -1e-12


@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 2.0]), D=st.integers(1, 3))
def test_bounds_enclose_monte_carlo(seed: int, spread: float, D: int) -> None:
    p, q = mixture_of(3, D, "full", seed), mixture_of(2, D, "diag", seed + 1)
    q = Mixture(q.weights, q.means + spread, q.covariances, "diag")
    found = kl_monte_carlo(p, q, 4000, random_state=seed)
    lower, upper = kl_bounds(p, q)
    margin = STANDARD_ERRORS * found.standard_error
    assert lower - margin < found.value < upper + margin


@given(seed=st.integers(0, 1000), D=st.integers(1, 3))
def test_approximations_know_no_coordinates(seed: int, D: int) -> None:
    """The same after the same affine map; the unscented points depend on coordinates, their mean not on a rotation."""
    rng = np.random.default_rng(seed)
    p, q, A = mixture_of(2, D, "full", seed), mixture_of(3, D, "full", seed + 1), with_condition(rng, D, 10.0)

    def mapped(mixture: Mixture, by: np.ndarray) -> Mixture:
        covariances = by @ mixture.covariances @ by.T
        covariances = (covariances + covariances.swapaxes(1, 2)) / 2
        return Mixture(mixture.weights, mixture.means @ by.T + 1.0, covariances)

    rotation = np.linalg.qr(A)[0]
    close = {"rel": 1e-8, "abs": 1e-9 * scale_of(p, q)}
    for approximation in (kl_variational, kl_matched, kl_product):
        assert approximation(mapped(p, A), mapped(q, A)) == pytest.approx(approximation(p, q), **close)
    assert kl_unscented(mapped(p, rotation), mapped(q, rotation)) == pytest.approx(kl_unscented(p, q), **close)


@pytest.mark.parametrize("estimator", ["plain", "control"])
def test_monte_carlo_against_quadrature(backend: str, estimator: str) -> None:
    exact = truth.integrated_kl(oracle(LINE_P), oracle(LINE_Q))
    found = kl_monte_carlo(LINE_P, LINE_Q, 40_000, estimator=estimator, random_state=1, backend=backend)
    assert abs(found.value - exact) < STANDARD_ERRORS * found.standard_error
    assert found.n_samples == 40_000
    lower, upper = kl_bounds(LINE_P, LINE_Q)
    assert lower < exact < upper


def test_standard_errors_are_honest() -> None:
    """Of 200 estimates with different seeds the errors, divided by their standard errors, have variance one."""
    exact = truth.integrated_kl(oracle(LINE_P), oracle(LINE_Q))
    for estimator in ("plain", "control"):
        found = [kl_monte_carlo(LINE_P, LINE_Q, 1000, estimator=estimator, random_state=s) for s in range(200)]
        z = np.array([(each.value - exact) / each.standard_error for each in found])
        assert abs(z.mean()) < STANDARD_ERRORS / np.sqrt(200)
        # The variance of 200 squared normals is 1 ± 0.1; the tails of log p − log q add some.
        assert 0.5 < (z**2).mean() < 1.6


def test_control_removes_what_is_gaussian() -> None:
    """Nearly Gaussian mixtures: a much smaller error. Gaussians: none but rounding. Equal moments: no worse."""
    p = Mixture(np.array([0.5, 0.5]), np.array([[-0.2, 0.0], [0.2, 0.0]]), np.ones((2, 2)), "diag")
    q = Mixture(np.array([0.5, 0.5]), np.array([[0.8, 0.0], [1.3, 0.0]]), np.ones((2, 2)), "diag")
    plain, control = (kl_monte_carlo(p, q, 10_000, estimator=e, random_state=0) for e in ("plain", "control"))
    assert control.standard_error < 0.1 * plain.standard_error
    assert abs(control.value - plain.value) < STANDARD_ERRORS * plain.standard_error
    one, other = moment_match(p), moment_match(q)
    found = kl_monte_carlo(one, other, 1000, estimator="control", random_state=0)
    assert found.value == pytest.approx(kl(one, other), rel=1e-9)
    same = moment_match(p)
    found = kl_monte_carlo(p, same, 10_000, estimator="control", random_state=0)
    assert found == kl_monte_carlo(p, same, 10_000, random_state=0)


def test_samples_are_counted_not_drawn_anew() -> None:
    """The first samples of a longer run are those of a shorter one, and threads change nothing."""
    short, long = (kl_monte_carlo(LINE_P, LINE_Q, n, random_state=5) for n in (2000, 8000))
    doubled = kl_monte_carlo(LINE_P, LINE_Q, 2000, 1e-9, random_state=5, max_samples=8000)
    assert doubled.n_samples == 8000
    assert doubled.value == pytest.approx(long.value, rel=1e-12)
    assert short.value != long.value
    assert kl_monte_carlo(LINE_P, LINE_Q, 8000, random_state=5, n_threads=3) == long


def test_relative_error_is_reached_or_the_cap() -> None:
    found = kl_monte_carlo(LINE_P, LINE_Q, 100, relative_error=0.02, random_state=0)
    assert found.standard_error <= 0.02 * found.value
    assert found.n_samples in [1000 * 2**i for i in range(1, 20)]
    capped = kl_monte_carlo(LINE_P, LINE_Q, 100, relative_error=1e-6, random_state=0, max_samples=1500)
    assert capped.n_samples == 1500
    assert capped.standard_error > 1e-6 * capped.value


CROSSED_P = Mixture([0.3, 0.7], [[-1.0], [1.0]], [0.5, 1.0], "spherical")
CROSSED_Q = Mixture([0.6, 0.4], [[-0.5], [2.0]], [1.0, 2.0], "spherical")


def test_few_samples_are_no_ground_for_stopping() -> None:
    """Of estimates that stop at a relative error of 10 % the mean is not pulled by those that stopped too early."""
    exact = truth.integrated_kl(oracle(CROSSED_P), oracle(CROSSED_Q))
    found = [kl_monte_carlo(CROSSED_P, CROSSED_Q, 2, relative_error=0.1, random_state=seed) for seed in range(400)]
    assert min(each.n_samples for each in found) >= 1000
    values = np.array([each.value for each in found])
    assert abs(values.mean() - exact) < STANDARD_ERRORS * values.std() / 20
    assert kl_monte_carlo(CROSSED_P, CROSSED_Q, 2, relative_error=0.1, random_state=0, max_samples=50).n_samples == 50


def test_intervals_of_the_smallest_control() -> None:
    """95 % intervals of 30 samples cover the truth in 95 % of 1000 runs, to three standard errors of that share."""
    exact = truth.integrated_kl(oracle(CROSSED_P), oracle(CROSSED_Q))
    runs = (kl_monte_carlo(CROSSED_P, CROSSED_Q, 30, estimator="control", random_state=seed) for seed in range(1000))
    covered = np.mean([abs(found.value - exact) < stats.t.ppf(0.975, 28) * found.standard_error for found in runs])
    assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 1000), f"{covered:.1%}"


def test_no_more_samples_than_the_cap() -> None:
    found = kl_monte_carlo(LINE_P, LINE_Q, relative_error=1e-4, max_samples=1000, random_state=0)
    assert found.n_samples == 1000
    both = jensen_shannon(LINE_P, LINE_Q, relative_error=1e-4, max_samples=1500, random_state=0)
    assert both.n_samples == 3000
    both = symmetric_kl(LINE_P, LINE_Q, relative_error=1e-4, max_samples=1500, random_state=0)
    assert both.n_samples == 3000
    assert kl_monte_carlo(LINE_P, LINE_Q, random_state=0).n_samples == 100_000


def test_monte_carlo_of_stacks() -> None:
    """Every pair gets the same random numbers: what it gets alone."""
    left, right = [LINE_P, LINE_Q], [LINE_Q, LINE_P, moment_match(LINE_P)]
    table = kl_monte_carlo(left, right, 500, random_state=1, all_pairs=True)
    assert table.value.shape == table.standard_error.shape == table.n_samples.shape == (2, 3)
    for i, p in enumerate(left):
        for j, q in enumerate(right):
            alone = kl_monte_carlo(p, q, 500, random_state=1)
            assert tuple(field[i, j] for field in table) == tuple(alone)
    np.testing.assert_array_equal(kl_monte_carlo(left, right[:2], 500, random_state=1).value, table.value.diagonal())


def unlike() -> list[Mixture]:
    """Types, numbers of components and ways of evaluation differ; the last one is too far away for packed densities."""
    mixtures = [
        mixture_of(K, 2, kind, seed)
        for seed, (K, kind) in enumerate(
            [(3, "full"), (2, "full"), (3, "full"), (2, "tied"), (1, "diag"), (2, "spherical")]
        )
    ]
    return [*mixtures, Mixture(np.ones(1), np.array([[1e6, 0.0]]), np.ones((1, 2)), "diag")]


def assert_as_alone(estimate: Callable[..., Any], left: Any, right: Any) -> None:
    """A stack's estimates are those of its pairs, bit by bit: one to one, and each with each."""
    table = estimate(left, right, all_pairs=True)
    for i, p in enumerate(left):
        for j, q in enumerate(right):
            alone = estimate(p, q)
            assert tuple(field[i, j] for field in table) == tuple(alone), (i, j)
    row = np.arange(len(left))
    for found, expected in zip(estimate(left, right), table, strict=True):
        np.testing.assert_array_equal(found, expected[row, row])


@pytest.mark.parametrize("estimator", ["plain", "control"])
def test_unlike_mixtures_of_a_stack(backend: str, estimator: str) -> None:
    how = {"estimator": estimator, "random_state": 3, "backend": backend}
    assert_as_alone(lambda p, q, **a: kl_monte_carlo(p, q, 50, **how, **a), unlike(), unlike()[::-1])


def test_jensen_shannon_is_the_same_on_every_backend(backend: str) -> None:
    """The mixture in the middle of two of other types is read as it was meant, where packed densities would not do."""
    how = {"random_state": 3, "all_pairs": True}
    found, expected = (jensen_shannon(unlike(), unlike(), 40, **how, backend=b).value for b in (backend, "reference"))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_sums_of_two_directions_of_a_stack() -> None:
    assert_as_alone(lambda p, q, **a: jensen_shannon(p, q, 40, random_state=3, **a), unlike(), unlike()[::-1])
    assert_as_alone(
        lambda p, q, **a: symmetric_kl(p, q, kl_monte_carlo, n_samples=40, random_state=3, **a),
        unlike(),
        unlike()[::-1],
    )


def test_pairs_of_a_stack_are_done_when_they_are_done() -> None:
    """With `relative_error` each pair has as many samples as alone, and the same estimate."""
    p, others = mixture_of(2, 2, "full", 1), [mixture_of(3, 2, "full", seed) for seed in range(2, 8)]
    how = {"relative_error": 0.03, "random_state": 0, "max_samples": 3000}
    found = kl_monte_carlo(p, others, 100, **how)
    assert len(np.unique(found.n_samples)) > 1
    alone = [kl_monte_carlo(p, q, 100, **how) for q in others]
    for one, expected in zip(found, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(one, expected)


def test_pairs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kl_monte_carlo(unlike(), unlike(), 50, random_state=1, all_pairs=True)
    monkeypatch.setattr("emalgam.monte_carlo.ELEMENTS_AT_ONCE", 60)
    np.testing.assert_array_equal(kl_monte_carlo(unlike(), unlike(), 50, random_state=1, all_pairs=True), whole)


def many_fits(covariance_type: str, n_components: Any = range(1, 4)) -> ManyFits:
    rng = np.random.default_rng(4)
    X = rng.normal(size=(6, 60, 2)) + 8 * rng.integers(0, 1 + np.arange(6)[:, None, None] % 3, (6, 60, 1))
    return fit_many(X, n_components, covariance_type=covariance_type, random_state=0)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_many_fits_are_a_stack(covariance_type: str) -> None:
    """Their arrays give what the sequence of mixtures gives, and each alone."""
    fits = many_fits(covariance_type)
    assert len(np.unique(fits.n_components)) > 1
    mixtures = list(fits)
    for approximation in APPROXIMATIONS:
        for how in ({}, {"all_pairs": True}):
            np.testing.assert_array_equal(
                approximation(fits, fits[::-1], **how), approximation(mixtures, mixtures[::-1], **how)
            )
        np.testing.assert_array_equal(approximation(fits, fits[0]), approximation(mixtures, fits[0]))
    np.testing.assert_array_equal(entropy_bounds(fits), entropy_bounds(mixtures))
    assert_as_alone(lambda p, q, **how: kl_monte_carlo(p, q, 50, random_state=1, **how), fits, fits[::-1])
    only = fits[:1]
    assert kl_monte_carlo(only, only, 50, random_state=1).value.shape == kl_unscented(only, only).shape == (1,)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_many_fits_of_one_component_are_gaussians(covariance_type: str) -> None:
    fits = many_fits(covariance_type, 1)
    np.testing.assert_array_equal(kl(fits, fits[0]), kl(list(fits), fits[0]))
    np.testing.assert_array_equal(symmetric_kl(fits, fits[0]), kl(fits, fits[0]) + kl(fits[0], fits))
    with pytest.raises(ValueError, match=r"p\[\d\] is a mixture of \d components, for which there is no closed form"):
        kl(many_fits(covariance_type), fits)


def test_a_fit_without_a_mixture_is_named() -> None:
    X = np.random.default_rng(0).normal(size=(3, 20, 2))
    X[1, 4] = np.nan
    fits = fit_many(X, 2, random_state=0)
    for call in (lambda: kl_monte_carlo(fits[0], fits, 10), lambda: kl_variational(fits[0], fits)):
        with pytest.raises(ValueError, match=r"q\[1\]: problem 1 has no mixture: the samples hold NaN or infinity"):
            call()
    wrong = replace(fits, covariances=-fits.covariances, n_components=np.full(3, 2))
    with pytest.raises(ValueError, match=r"p\[0\]: covariances of component 0 are not positive definite"):
        kl_unscented(wrong[:1], fits[0])


def test_far_and_narrow_mixtures() -> None:
    """Packed densities would cancel, so the direct ones are taken: 1e8 from the origin, 1e6 deviations apart."""
    far = Mixture(np.array([0.5, 0.5]), np.array([[1e8], [1e8 + 2]]), np.ones(2), "spherical")
    moved = Mixture(far.weights, far.means - 1e8, far.covariances, "spherical")
    q = Mixture(far.weights, far.means + 1, far.covariances, "spherical")
    q_moved = Mixture(far.weights, moved.means + 1, far.covariances, "spherical")
    for approximation in (kl_variational, kl_matched, kl_product, kl_unscented):
        assert approximation(far, q) == pytest.approx(approximation(moved, q_moved), rel=1e-7)
    found, expected = (kl_monte_carlo(*pair, 1000, random_state=0) for pair in ((far, q), (moved, q_moved)))
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    apart = Mixture(np.ones(1), np.array([[1e6]]), np.ones(1), "spherical")
    beyond, near = (Members.all_of(MixtureStack.of([mixture])) for mixture in (apart, far))
    assert beyond.too_far(near).tolist() == [True], "direct"
    assert beyond.too_far(beyond).tolist() == [False], "packed"
    single = Gaussian(0.0, 1.0)
    assert kl_monte_carlo(single, apart, 1000, random_state=0).value == pytest.approx(kl(single, apart), rel=1e-5)


def test_units_do_not_matter() -> None:
    """Data in units of 1e-100 give the same divergences, though products of their variances underflow."""
    p, q = mixture_of(2, 2, "full", 1), mixture_of(3, 2, "full", 2)
    unit = 2.0**-330

    def scaled(mixture: Mixture) -> Mixture:
        return Mixture(mixture.weights, mixture.means * unit, mixture.covariances * unit**2)

    for approximation in (kl_variational, kl_matched, kl_product):
        assert approximation(scaled(p), scaled(q)) == pytest.approx(approximation(p, q), rel=1e-9)
    (lower, upper), (expected_lower, expected_upper) = entropy_bounds(scaled(p)), entropy_bounds(p)
    assert lower == pytest.approx(expected_lower + 2 * np.log(unit), rel=1e-12)
    assert upper == pytest.approx(expected_upper + 2 * np.log(unit), rel=1e-12)


def test_components_without_weight_do_not_count() -> None:
    p, q = LINE_P, LINE_Q

    def padded(mixture: Mixture) -> Mixture:
        weights, means = np.append(mixture.weights, 0.0), np.append(mixture.means, [[50.0]], axis=0)
        return Mixture(weights, means, np.append(mixture.covariances, 1.0), "spherical")

    for approximation in APPROXIMATIONS:
        np.testing.assert_allclose(approximation(padded(p), padded(q)), approximation(p, q), rtol=1e-9)
    np.testing.assert_allclose(entropy_bounds(padded(p)), entropy_bounds(p), rtol=1e-12)
    found, expected = (kl_monte_carlo(one, q, 1000, random_state=0) for one in (p, padded(p)))
    assert found.value == pytest.approx(expected.value, abs=10 * found.standard_error)


# ---- Jensen-Shannon, symmetric, entropies


def test_jensen_shannon_against_quadrature(backend: str) -> None:
    exact = truth.integrated_jensen_shannon(oracle(LINE_P), oracle(LINE_Q))
    found = jensen_shannon(LINE_P, LINE_Q, 40_000, random_state=2, backend=backend)
    assert abs(found.value - exact) < STANDARD_ERRORS * found.standard_error
    assert found.n_samples == 80_000
    assert 0 < found.value < np.log(2)
    other = jensen_shannon(LINE_Q, LINE_P, 40_000, random_state=3, backend=backend)
    assert abs(other.value - found.value) < STANDARD_ERRORS * np.hypot(found.standard_error, other.standard_error)
    mixed = jensen_shannon(mixture_of(2, 2, "tied", 1), mixture_of(2, 2, "diag", 2), 1000, random_state=0)
    assert 0 < mixed.value < np.log(2)


@pytest.mark.parametrize("distance", [1e8, 1e20])
def test_jensen_shannon_of_what_lies_far_apart(backend: str, distance: float) -> None:
    found = jensen_shannon(Gaussian(0.0, 1.0), Gaussian(distance, 1.0), 1000, random_state=0, backend=backend)
    assert found.value == pytest.approx(np.log(2), rel=MIXTURES)
    assert found.standard_error < 1e-8


@pytest.mark.parametrize("approximation", [kl_variational, kl_matched, kl_unscented])
def test_divergences_of_components_far_apart(approximation: Approximation) -> None:
    """They are the mean of the divergences of the components."""
    p, q = (Mixture([0.5, 0.5], [[mean], [1e12]], [1.0, v], "spherical") for mean, v in ((0.3, 1.0), (0.9, 2.0)))
    expected = (kl(Gaussian(0.3, 1.0), Gaussian(0.9, 1.0)) + kl(Gaussian(0.0, 1.0), Gaussian(0.0, 2.0))) / 2
    assert approximation(p, q) == pytest.approx(expected, rel=MIXTURES)


def test_jensen_shannon_of_shared_covariances(backend: str) -> None:
    """Tied mixtures, so far apart that the direct form is taken: what they give as full ones."""
    means = np.array([[[0.0, 0.0], [1e6, 1.0]], [[0.5, 0.0], [1e6, 2.0]]])
    tied = [Mixture([0.5, 0.5], each, [[2.0, 0.9], [0.9, 1.0]], "tied") for each in means]
    full = [Mixture(each.weights, each.means, np.stack([each.covariances] * 2)) for each in tied]
    found, expected = (jensen_shannon(*each, 2000, random_state=0, backend=backend) for each in (tied, full))
    assert found.value == pytest.approx(expected.value, abs=MIXTURES)
    several = jensen_shannon(tied, tied[::-1], 2000, random_state=0, backend=backend)
    assert several.value[0] == found.value


def test_symmetric() -> None:
    p, q = mixture_of(2, 2, "full", 1), mixture_of(3, 2, "full", 2)
    for approximation in (kl_variational, kl_matched, kl_product, kl_unscented):
        found = symmetric_kl(p, q, approximation)
        assert found == approximation(p, q) + approximation(q, p) == symmetric_kl(q, p, approximation)
    lower, upper = symmetric_kl(p, q, kl_bounds)
    found = symmetric_kl(p, q, n_samples=5000, random_state=0)
    assert found.n_samples == 10_000
    assert lower < found.value < upper
    exact = truth.integrated_kl(oracle(LINE_P), oracle(LINE_Q)) + truth.integrated_kl(oracle(LINE_Q), oracle(LINE_P))
    found = symmetric_kl(LINE_P, LINE_Q, kl_monte_carlo, n_samples=20_000, random_state=0)
    assert abs(found.value - exact) < STANDARD_ERRORS * found.standard_error


def test_symmetric_estimates_of_other_functions() -> None:
    """Value, standard error and numbers of samples are sums, in the shape of the first direction."""

    def estimate(p: Any, q: Any, **how: Any) -> Estimate:
        return kl_monte_carlo(p, q, 500, random_state=0, **how)

    forth, back = estimate(LINE_P, LINE_Q), estimate(LINE_Q, LINE_P)
    found = symmetric_kl(LINE_P, LINE_Q, estimate)
    assert found == Estimate(forth.value + back.value, forth.standard_error + back.standard_error, 1000)
    left, right = [LINE_P, LINE_Q], [LINE_Q, LINE_P, moment_match(LINE_P)]
    table = symmetric_kl(left, right, estimate, all_pairs=True)
    assert tuple(field[0, 0] for field in table) == tuple(found)
    assert table.standard_error.shape == (2, 3)


def test_symmetric_each_with_each() -> None:
    left = [mixture_of(2, 2, "full", seed) for seed in range(3)]
    right = [mixture_of(2, 2, "full", seed) for seed in range(3, 5)]
    expected = np.array([[symmetric_kl(p, q, kl_variational) for q in right] for p in left])
    np.testing.assert_allclose(symmetric_kl(left, right, kl_variational, all_pairs=True), expected, rtol=1e-10)
    lower, upper = symmetric_kl(left, right, kl_bounds, all_pairs=True)
    assert ((lower < expected) & (expected < upper)).all()
    assert symmetric_kl(left, right, n_samples=10, random_state=0, all_pairs=True).value.shape == (3, 2)
    p, q = stack_of(4, 2, 1), stack_of(3, 2, 2)
    table = kl_all_pairs(p, q) + kl_all_pairs(q, p).T
    np.testing.assert_allclose(symmetric_kl(p, q, kl_all_pairs), table, rtol=1e-12)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_entropy_bounds(covariance_type: str) -> None:
    """Their formulas; around the entropy; the upper one is exact for one Gaussian and components far apart."""
    p = mixture_of(3, 2, covariance_type, 5)
    np.testing.assert_allclose(entropy_bounds(p), truth.entropy_bounds(oracle(p)), rtol=0, atol=MIXTURES)
    surprise = expectation(lambda x: -p.log_prob(x), p, 20_000, seed=0)
    lower, upper = entropy_bounds(p)
    margin = STANDARD_ERRORS * surprise.standard_error
    assert lower - margin < surprise.value < upper + margin
    stacked = entropy_bounds([p, mixture_of(2, 2, "full", 1)])
    np.testing.assert_allclose([stacked.lower[0], stacked.upper[0]], [lower, upper], rtol=1e-12)
    single = mixture_of(1, 2, covariance_type, 6)
    assert entropy_bounds(single).upper == pytest.approx(moment_match(single).entropy(), rel=1e-12)


def test_entropy_by_quadrature() -> None:
    exact = truth.integrated_entropy(oracle(LINE_P))
    lower, upper = entropy_bounds(LINE_P)
    assert lower < exact < upper
    apart = Mixture(np.array([0.5, 0.5]), np.array([[-50.0], [50.0]]), np.ones(2), "spherical")
    assert entropy_bounds(apart).upper == pytest.approx(truth.integrated_entropy(oracle(apart)), abs=QUADRATURE)


# ---- what is accepted, and what is not


def test_estimators_and_gaussians_are_mixtures() -> None:
    p = GaussianMixture.from_parameters(LINE_P.weights, LINE_P.means, LINE_P.covariances, covariance_type="spherical")
    x = np.random.default_rng(0).normal(size=(300, 1)) * 2
    fitted = GaussianMixture(2, random_state=0).fit(x)
    assert kl_variational(p, fitted) == kl_variational(LINE_P, fitted.mixture_)
    assert kl_monte_carlo(p, LINE_Q, 100, random_state=0) == kl_monte_carlo(LINE_P, LINE_Q, 100, random_state=0)
    stack = stack_of(3, 2, 1)
    np.testing.assert_allclose(kl_variational(stack, stack, all_pairs=True), kl_all_pairs(stack, stack), atol=1e-12)
    assert kl(mixture_of(1, 2, "tied", 1), mixture_of(1, 2, "diag", 2)) > 0


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: kl(LINE_P, Gaussian(0.0, 1.0)), "p is a mixture of 2 components, .* no closed form; use kl_monte_carlo"),
    (lambda: kl(Gaussian(0.0, 1.0), 3.0), "q is a float; expected a Gaussian, Mixture or fitted GaussianMixture"),
    (lambda: kl(stack_of(2, 2, 1), stack_of(2, 3, 1)), "q has 3 features; p has 2"),
    (lambda: kl(stack_of(2, 2, 1), stack_of(3, 2, 1)), r"do not broadcast: p \(2,\), q \(3,\); .* use kl_all_pairs"),
    (lambda: kl([], Gaussian(0.0, 1.0)), "p is empty"),
    (lambda: kl([Gaussian(0.0, 1.0), stack_of(1, 2, 0)], Gaussian(0.0, 1.0)), r"p\[1\] has mean of shape"),
    (lambda: kl(Gaussian(0.0, 1.0), Gaussian(0.0, 1.0), arithmetic="half"), "arithmetic is 'half'"),
    (lambda: kl(Gaussian(0.0, 1.0), Gaussian(0.0, 1.0), backend="gpu"), "backend is 'gpu'"),
    (lambda: kl(Gaussian(0.0, 1.0), Gaussian(0.0, 1.0), n_threads=0), "n_threads is 0"),
    (lambda: kl_variational([LINE_P, "p"], LINE_Q), r"p\[1\] is a str; expected a Gaussian, Mixture or fitted"),
    (lambda: kl_variational([LINE_P] * 2, [LINE_Q] * 3), r"do not broadcast: .* use all_pairs=True"),
    (lambda: kl_variational([LINE_P] * 2, [LINE_Q, mixture_of(2, 2)]), r"q\[1\] has 2 features; p has 1"),
    (lambda: kl_unscented(LINE_P, mixture_of(2, 2)), "q has 2 features; p has 1"),
    (lambda: kl_product([], LINE_P), "p is empty; expected at least one mixture"),
    (lambda: kl_monte_carlo(LINE_P, [], 10), "q is empty; expected at least one mixture"),
    (lambda: kl_monte_carlo(many_fits("full")[:0], LINE_P, 10), "p is empty; expected at least one mixture"),
    (lambda: kl_monte_carlo([LINE_P, LINE_Q, mixture_of(2, 2)], LINE_Q), r"p\[2\] has 2 features; p has 1"),
    (lambda: kl_monte_carlo([LINE_P] * 2, [LINE_Q] * 3), r"do not broadcast: .* use all_pairs=True"),
    (lambda: kl_monte_carlo([LINE_P, "p"], LINE_Q), r"p\[1\] is a str; expected a Gaussian, Mixture or fitted"),
    (lambda: kl_variational(LINE_P, Mixture([0.7, 0.2], [[0.0], [1.0]], [1.0, 1.0], "spherical")), "sum 0.9; expected"),
    (lambda: kl_matched(LINE_P, Mixture([1.2, -0.2], [[0.0], [1.0]], [1.0, 1.0], "spherical")), r"-0.2 at \[1\]"),
    (lambda: kl_bounds(LINE_P, Mixture([1.0], [[np.nan]], [1.0], "spherical")), r"means contains NaN at \[0, 0\]"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, 0), "n_samples is 0; expected an integer >= 1"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, -5), "n_samples is -5; expected an integer >= 1"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, 1.5), "n_samples is 1.5"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, relative_error=0.0), "relative_error is 0; expected a number > 0"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, relative_error=np.nan), "relative_error is nan"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, max_samples=0), "max_samples is 0"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, estimator="best"), "estimator is 'best'; expected one of plain, control"),
    (lambda: kl_monte_carlo(LINE_P, LINE_Q, random_state=-1), "random_state is -1"),
    (lambda: jensen_shannon(LINE_P, LINE_Q, 0), "n_samples is 0"),
    (lambda: jensen_shannon(LINE_P, LINE_Q, -1), "n_samples is -1"),
    (lambda: symmetric_kl(LINE_P, LINE_Q, n_samples=0), "n_samples is 0"),
    (lambda: symmetric_kl(LINE_P, LINE_Q, n_samples=-1), "n_samples is -1"),
    (lambda: symmetric_kl(LINE_P, LINE_Q, jensen_shannon), "divergence is jensen_shannon, .* symmetric already"),
    (lambda: symmetric_kl(LINE_P, LINE_Q, symmetric_kl), "divergence is symmetric_kl, .* symmetric already"),
    (
        lambda: kl_monte_carlo(LINE_P, LINE_Q, 2000, relative_error=0.1, max_samples=1000),
        "n_samples is 2000 and max_samples 1000; expected n_samples <= max_samples",
    ),
    (
        lambda: kl_monte_carlo(LINE_P, LINE_Q, 29, estimator="control"),
        "'control' with 29 samples; expected at least 30",
    ),
    (
        lambda: kl_monte_carlo(LINE_P, LINE_Q, relative_error=0.1, estimator="control", max_samples=10),
        "'control' with 10 samples; expected at least 30",
    ),
    (lambda: entropy_bounds([LINE_P, mixture_of(2, 2)]), r"p\[1\] has 2 features; p has 1"),
    (lambda: kl_variational(GaussianMixture(2), LINE_P), "not fitted"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_too_far_is_infinite_not_an_error() -> None:
    """Divergences beyond what float64 can hold: inf, in every form."""
    near, far = Gaussian(0.0, 1e-300), Gaussian(1e10, 1e-300)
    assert kl(near, far) == np.inf
    assert kl_all_pairs(near, far) == np.inf
    assert kl(Gaussian(0.0, 1.0), Gaussian(1e60, 1.0), arithmetic="float32") == np.inf
    assert kl_variational(near, far) == np.inf
    assert kl_monte_carlo(near, far, 100, random_state=0)[:2] == (np.inf, np.inf)
    assert kl_monte_carlo(near, far, 100, relative_error=0.1, random_state=0).n_samples == 1000


@pytest.mark.parametrize("estimator", ["plain", "control"])
@pytest.mark.parametrize("distance", [1e2, 1e5, 1e8, 1e9])
def test_standard_error_of_large_divergences(distance: float, estimator: str) -> None:
    """d = log p − log q = ½ distance² − x · distance: its standard deviation is the distance."""
    p, q = (Mixture(np.ones(1), np.array([[mean]]), np.ones(1), "spherical") for mean in (0.0, distance))
    found = kl_monte_carlo(p, q, n_samples=10_000, estimator=estimator, random_state=0)
    if estimator == "plain":
        assert found.standard_error == pytest.approx(distance / 100, rel=0.05)
    assert abs(found.value - distance**2 / 2) <= STANDARD_ERRORS * distance / 100


def test_symmetric_divergence_of_single_components_is_the_closed_form() -> None:
    p, q = (Mixture(np.ones(1), np.array([[mean]]), np.ones(1), "spherical") for mean in (0.0, 2.0))
    assert symmetric_kl(p, q) == pytest.approx(4.0, rel=1e-12)
    with pytest.raises(ValueError, match="n_samples is no argument of kl, the closed form"):
        symmetric_kl(p, q, n_samples=10)
