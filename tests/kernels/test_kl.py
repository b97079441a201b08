"""Divergences of Gaussians against mpmath and by their identities, over every backend, dtype and covariance type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import mpmath
import numpy as np
import pytest

import emalgam_kernels
from emalgam_kernels import Gaussians, blocks
from emalgam_kernels.blocks import workspace
from emalgam_kernels.kl_blocks import (
    COLUMNS_OF_A_BLOCK,
    MOST_PAIRS,
    PLAIN,
    ROWS_OF_A_BLOCK,
    guard,
    matrices_per_block,
    pairs_per_block,
)
from tests import oracles
from tests.conftest import DTYPES, SIMULATED, of_the_cpu
from tests.oracles import LONG
from tests.tolerances import EPS, tolerance

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_type = pytest.mark.parametrize("covariance_type", ["full", "diag"])
CONDITION = {"float64": 1e4, "float32": 1e2}
SIZES = ((1, 1), (5, 1), (1, 3), (21, 2), (9, 3), (7, 8), (6, 17))  # M, D


@pytest.fixture(scope="session")
def kernels(backend: str) -> ModuleType:
    """The backend's divergences."""
    try:
        return emalgam_kernels.load(backend, "kl")
    except ImportError as error:
        pytest.skip(str(error))


def random_covariances(rng: np.random.Generator, M: int, D: int, condition: float, covariance_type: str) -> np.ndarray:
    """Eigenvalues from 1 / condition to 1, both ends included if D ≥ 2; in any orientation if full."""
    variances = condition ** -rng.uniform(0, 1, (M, D))
    variances[:, :2] = np.array([1, 1 / condition])[:D]
    if covariance_type == "diag":
        return variances
    orientations = np.linalg.qr(rng.normal(size=(M, D, D)))[0]
    matrices = (orientations * variances[:, None]) @ orientations.transpose(0, 2, 1)
    return (matrices + matrices.transpose(0, 2, 1)) / 2


def stack(means: np.ndarray, covariances: np.ndarray, dtype: str) -> Gaussians:
    """What the kernels take. P is that of the covariances as stored, computed in long double and rounded once."""
    stored = np.ascontiguousarray(covariances, dtype)
    if stored.ndim == 2:
        factors = 1 / np.sqrt(stored.astype(LONG))
    else:
        factors = oracles.triangular_inverse(oracles.cholesky(stored)).transpose(0, 2, 1)
    covariance_type = "diag" if stored.ndim == 2 else "full"
    return Gaussians(covariance_type, np.ascontiguousarray(means, dtype), stored, np.ascontiguousarray(factors, dtype))


def random_stack(
    rng: np.random.Generator, M: int, D: int, covariance_type: str, dtype: str, condition: float = 30.0
) -> Gaussians:
    return stack(rng.normal(size=(M, D)), random_covariances(rng, M, D, condition, covariance_type), dtype)


def near(rng: np.random.Generator, q: Gaussians, distance: float) -> Gaussians:
    """Gaussians about `distance` from those of q, in their standard deviations: KL is about the square of it."""
    M, D = q.means.shape
    covariances = q.covariances.astype(np.float64)
    other = random_covariances(rng, M, D, 10.0, q.covariance_type)
    if q.covariance_type == "diag":
        moved = covariances * (1 + distance * other)
        means = q.means + distance * np.sqrt(covariances) * rng.normal(size=(M, D))
    else:
        L = np.linalg.cholesky(covariances)
        moved = covariances + distance * L @ other @ L.transpose(0, 2, 1)
        means = q.means + distance * np.einsum("mij,mj->mi", L, rng.normal(size=(M, D)))
    return stack(means, moved, q.means.dtype.name)


def pairs(kernels: ModuleType, p: Gaussians, q: Gaussians, n_threads: int = 1) -> np.ndarray:
    out = np.full(len(p), np.nan)
    assert kernels.kl_pairs(p, q, out, n_threads) is None
    return out


def all_pairs(kernels: ModuleType, p: Gaussians, q: Gaussians, n_threads: int = 1) -> np.ndarray:
    out = np.full((len(p), len(q)), np.nan)
    assert kernels.kl_all_pairs(p, q, out, n_threads) is None
    return out


def exact(p: Gaussians, q: Gaussians, i: int, j: int) -> mpmath.mpf:
    return oracles.exact_divergence(p.means[i], p.covariances[i], q.means[j], q.covariances[j])


def assert_close(found: np.ndarray, truth: list[mpmath.mpf], relative: float, what: str) -> None:
    """Every relative error is at most `relative`; NaN fails."""
    errors = oracles.absolute_errors(found, np.array(truth, object)) / np.array(truth, np.float64)
    worst = int(np.where(np.isnan(errors), np.inf, errors).argmax())
    message = (
        f"{what}: entry {worst} is {found[worst]!r} instead of {float(truth[worst])!r}, off by {errors[worst]:.2g}"
    )
    assert errors[worst] <= relative, f"{message} relative; allowed are {relative:.2g}"


def taken(gaussians: Gaussians, index: np.ndarray) -> Gaussians:
    means, covariances, factors = gaussians.means, gaussians.covariances, gaussians.precisions_cholesky
    chosen = None if factors is None else factors[index]
    return Gaussians(gaussians.covariance_type, means[index], covariances[index], chosen)


# ---- against mpmath


@every_dtype
@every_type
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ill_conditioned_pairs(kernels: ModuleType, covariance_type: str, dtype: str, size: tuple[int, int]) -> None:
    """At the largest condition number that a digit is promised for: unrelated Gaussians, and related ones."""
    rng = np.random.default_rng(size)
    q = random_stack(rng, *size, covariance_type, dtype, CONDITION[dtype])
    for p in (random_stack(rng, *size, covariance_type, dtype, CONDITION[dtype]), near(rng, q, 1.0), near(rng, q, 0.1)):
        truth = [exact(p, q, m, m) for m in range(len(p))]
        assert_close(pairs(kernels, p, q), truth, tolerance("closed-form KL", dtype), f"M, D = {size}")


@every_dtype
@every_type
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pair(kernels: ModuleType, covariance_type: str, dtype: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size)
    p, q = (random_stack(rng, M, size[1], covariance_type, dtype, CONDITION[dtype]) for M in (size[0], 3))
    truth = [exact(p, q, i, j) for i in range(len(p)) for j in range(len(q))]
    bound = tolerance("all pairs", dtype) + tolerance("closed-form KL", dtype)
    assert_close(all_pairs(kernels, p, q).ravel(), truth, bound, f"M, D = {size}")


@every_dtype
@every_type
@pytest.mark.parametrize("D", [1, 2, 5, 16])
def test_tiny_divergences_keep_their_digits(kernels: ModuleType, covariance_type: str, dtype: str, D: int) -> None:
    """Down to about 1e-12 (float32, whose numbers are not that dense: 1e-10), element by element and as all pairs."""
    rng = np.random.default_rng(D)
    for distance in (1e-1, 1e-3, 1e-6 if dtype == "float64" else 1e-5):
        q = random_stack(rng, 8, D, covariance_type, dtype, 100.0)
        p = near(rng, q, distance)
        truth = [exact(p, q, m, m) for m in range(len(p))]
        found = pairs(kernels, p, q)
        assert_close(found, truth, tolerance("tiny KL", dtype), f"distance {distance}")
        if distance < 0.1:
            np.testing.assert_array_equal(np.diag(all_pairs(kernels, p, q)), found)


@every_type
def test_far_from_the_origin(kernels: ModuleType, covariance_type: str) -> None:
    """Means around 1e8 standard deviations: μ_p − μ_q is exact enough, and all pairs have an origin of their own."""
    rng = np.random.default_rng(0)
    q = random_stack(rng, 6, 4, covariance_type, "float64", 100.0)
    for other in (random_stack(rng, 6, 4, covariance_type, "float64", 100.0), near(rng, q, 0.1)):
        p, shifted = (stack(each.means + 1e8, each.covariances, "float64") for each in (other, q))
        truth = [exact(p, shifted, i, j) for i in range(6) for j in range(6)]
        found = all_pairs(kernels, p, shifted)
        assert_close(found.ravel(), truth, 2 * tolerance("closed-form KL", "float64"), "all pairs")
        assert_close(
            pairs(kernels, p, shifted),
            truth[:: len(p) + 1],
            tolerance("closed-form KL", "float64"),
            "element by element",
        )


@every_type
@pytest.mark.parametrize("ratio", [1e-30, 1e-12, 1e-4, 0.4, 2.5, 1e4, 1e12, 1e30])
def test_widths_of_any_ratio(kernels: ModuleType, covariance_type: str, ratio: float) -> None:
    """Σ_p ≪ Σ_q rounds away in Σ_p − Σ_q, and is computed in another way."""
    rng = np.random.default_rng(1)
    q = random_stack(rng, 5, 4, covariance_type, "float64", 100.0)
    p = stack(q.means + 0.1, random_covariances(rng, 5, 4, 100.0, covariance_type) * ratio, "float64")
    truth = [exact(p, q, i, j) for i in range(5) for j in range(5)]
    assert_close(pairs(kernels, p, q), truth[::6], tolerance("closed-form KL", "float64"), "element by element")
    assert_close(all_pairs(kernels, p, q).ravel(), truth, 2 * tolerance("closed-form KL", "float64"), "all pairs")


@every_type
def test_one_direction_wide_and_one_narrow(kernels: ModuleType, covariance_type: str) -> None:
    """Every pivot of I + E may be of size one while an eigenvalue is tiny: factors alone would lose digits."""
    rng = np.random.default_rng(2)
    for seed in range(4 if SIMULATED else 20):
        rng = np.random.default_rng(seed)
        p, q = (random_stack(rng, 40, 3, covariance_type, "float64", 1e4) for _ in range(2))
        element = pairs(kernels, p, q)
        np.testing.assert_allclose(
            np.diag(all_pairs(kernels, p, q)), element, rtol=2 * tolerance("closed-form KL", "float64")
        )
        worst = int(element.argmax())
        bound = tolerance("closed-form KL", "float64")
        assert_close(element[worst : worst + 1], [exact(p, q, worst, worst)], bound, f"seed {seed}")


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_any_unit_of_measurement(kernels: ModuleType, scale: float) -> None:
    rng = np.random.default_rng(3)
    p, q = (random_stack(rng, 4, 3, "full", "float64") for _ in range(2))
    truth = [exact(p, q, m, m) for m in range(4)]
    small, large = (stack(each.means * scale**0.5, each.covariances * scale, "float64") for each in (p, q))
    assert_close(pairs(kernels, small, large), truth, 1e-11, "element by element")  # the scaled numbers are rounded
    np.testing.assert_allclose(np.diag(all_pairs(kernels, small, large)), pairs(kernels, small, large), rtol=1e-12)


def test_one_dimension_by_its_formula(kernels: ModuleType) -> None:
    """log(σ_Q / σ_P) + (σ_P² + (μ_P − μ_Q)²) / (2 σ_Q²) − ½."""
    rng = np.random.default_rng(4)
    (mean_p, mean_q), (sigma_p, sigma_q) = rng.normal(size=(2, 50)), rng.uniform(0.2, 3, (2, 50))
    expected = np.log(sigma_q / sigma_p) + (sigma_p**2 + (mean_p - mean_q) ** 2) / (2 * sigma_q**2) - 0.5
    for shape in ((50, 1), (50, 1, 1)):
        p = stack(mean_p[:, None], (sigma_p**2).reshape(shape), "float64")
        q = stack(mean_q[:, None], (sigma_q**2).reshape(shape), "float64")
        np.testing.assert_allclose(pairs(kernels, p, q), expected, rtol=1e-11, atol=1e-14)


# ---- P of covariances


@every_dtype
@pytest.mark.parametrize("size", [*SIZES, (65, 2), (3, 33)], ids=str)
def test_precision_factors(kernels: ModuleType, dtype: str, size: tuple[int, int]) -> None:
    """Pᵀ Σ P = I to eps times the condition number."""
    covariances = random_covariances(np.random.default_rng(size), *size, CONDITION[dtype], "full").astype(dtype)
    out = np.full(covariances.shape, np.nan, dtype)
    assert kernels.precision_factors(covariances, out) == -1
    assert not np.tril(out, -1).any()
    P = out.astype(LONG)
    residual = np.abs(np.einsum("mki,mkl,mlj->mij", P, covariances.astype(LONG), P) - np.eye(size[1])).max()
    assert residual <= tolerance("precision factors", dtype) * CONDITION[dtype], f"residual {float(residual):.2g}"


@every_dtype
def test_pivots_keep_their_digits(kernels: ModuleType, dtype: str) -> None:
    """At condition numbers of a thousand, which plain arithmetic would lose three digits to.

    Where the variance inflation factors are small, Σ_i Σ_ii (Σ⁻¹)_ii ≤ `PLAIN`, it may lose that many eps.
    """
    rng = np.random.default_rng(19)
    for D in (2, 3, 7):
        covariances = random_covariances(rng, 12, D, 1e3, "full").astype(dtype)
        out = np.empty_like(covariances)
        assert kernels.precision_factors(covariances, out) == -1
        expected = 1 / np.einsum("mii->mi", oracles.cholesky(covariances))
        errors = np.abs(np.einsum("mii->mi", out) / expected - 1).max(axis=1)
        inverses = np.linalg.inv(covariances.astype(np.float64))
        inflation = np.einsum("mii,mii->m", covariances, inverses)
        plain = inflation <= PLAIN[dtype]
        allowed = tolerance("diagonal of precision factors", dtype) * np.where(plain, inflation, 1.0)
        assert (errors <= allowed).all(), f"off by {(errors / allowed).max():.2g} times what is allowed"
        assert not plain.all() or D == 2


def test_divergences_from_covariances_alone(kernels: ModuleType) -> None:
    """With P computed here, not in long double: in two dimensions LAPACK's float64 would lose 2e-12 of some."""
    rng = np.random.default_rng(16)
    for D in (2, 3, 8):
        q = random_stack(rng, 40 if SIMULATED else 300, D, "full", "float64", 1e4)
        p = near(rng, q, 0.3)
        expected = pairs(kernels, p, q)
        for each in (p, q):
            assert kernels.precision_factors(each.covariances, each.precisions_cholesky) == -1
        np.testing.assert_allclose(pairs(kernels, p, q), expected, rtol=tolerance("closed-form KL", "float64") / 2)


@every_dtype
def test_first_that_is_not_positive_definite(kernels: ModuleType, dtype: str) -> None:
    rng = np.random.default_rng(17)
    count = 75 if SIMULATED else matrices_per_block(4) + 70
    covariances = random_covariances(rng, 30, 4, 10.0, "full").astype(dtype)[rng.integers(0, 30, count)]
    out, expected = np.empty_like(covariances), np.empty_like(covariances)
    assert kernels.precision_factors(covariances, expected, 2) == -1
    covariances[count - 1] *= -1
    covariances[count - 3, 2, 2] = np.nan
    for n_threads in (1, 2):
        assert kernels.precision_factors(covariances, out, n_threads) == count - 3
        np.testing.assert_array_equal(out[: count - 3], expected[: count - 3])
    covariances[7] = 1.0  # singular: the second pivot is exactly zero
    assert kernels.precision_factors(covariances, out, 2) == 7
    assert not np.isfinite(out[7]).all()


def test_factors_of_shared_and_strided_matrices(kernels: ModuleType) -> None:
    covariances = random_covariances(np.random.default_rng(18), 9, 3, 10.0, "full")
    expected, out = np.empty((9, 3, 3)), np.full((9, 2, 3, 3), np.nan)
    assert kernels.precision_factors(covariances, expected) == -1
    assert kernels.precision_factors(covariances[::2], out[:5, 1]) == -1
    np.testing.assert_array_equal(out[:5, 1], expected[::2])
    assert np.isnan(out[:, 0]).all()
    assert kernels.precision_factors(np.broadcast_to(covariances[:1], (9, 3, 3)), out[:, 0]) == -1
    np.testing.assert_array_equal(out[:, 0], np.broadcast_to(expected[:1], (9, 3, 3)))
    assert kernels.precision_factors(covariances[:0], expected[:0], 2) == -1


def test_signature_and_docstring_are_those_of_the_reference(kernels: ModuleType) -> None:
    specified = emalgam_kernels.load("reference", "kl").precision_factors
    assert inspect.signature(kernels.precision_factors) == inspect.signature(specified)
    text = inspect.getdoc(kernels.precision_factors) or ""
    assert kernels.__name__.endswith("reference.kl") or "emalgam_kernels.reference.kl.precision_factors" in text


# ---- covariances that come without P


def without_factors(gaussians: Gaussians) -> Gaussians:
    return Gaussians(gaussians.covariance_type, gaussians.means, gaussians.covariances)


def ways_to_leave_out(p: Gaussians, q: Gaussians) -> list[tuple[Gaussians, Gaussians]]:
    """P left out of one, of the other, and of both."""
    return [(without_factors(p), q), (p, without_factors(q)), (without_factors(p), without_factors(q))]


@every_dtype
@every_type
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pairs_without_factors(kernels: ModuleType, covariance_type: str, dtype: str, size: tuple[int, int]) -> None:
    """The accuracy promised with P, also where plain arithmetic just suffices (PLAIN) or just does not."""
    rng = np.random.default_rng(size)
    for condition in (30.0, CONDITION[dtype] / 10, CONDITION[dtype]):
        q = random_stack(rng, *size, covariance_type, dtype, condition)
        for p in (random_stack(rng, *size, covariance_type, dtype, condition), near(rng, q, 0.3)):
            truth = [exact(p, q, m, m) for m in range(len(p))]
            for left_out in ways_to_leave_out(p, q):
                assert_close(pairs(kernels, *left_out), truth, tolerance("closed-form KL", dtype), f"M, D = {size}")


@every_dtype
@every_type
@pytest.mark.parametrize("D", [1, 2, 5, 16])
def test_tiny_divergences_without_factors(kernels: ModuleType, covariance_type: str, dtype: str, D: int) -> None:
    rng = np.random.default_rng(D)
    for distance in (1e-1, 1e-6 if dtype == "float64" else 1e-5):
        q = without_factors(random_stack(rng, 8, D, covariance_type, dtype, 100.0))
        p = without_factors(near(rng, q, distance))
        truth = [exact(p, q, m, m) for m in range(len(p))]
        assert_close(pairs(kernels, p, q), truth, tolerance("tiny KL", dtype), f"distance {distance}")
        assert not pairs(kernels, q, taken(q, np.arange(8))).any()


@every_dtype
@every_type
def test_not_positive_definite_is_nan(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    """Of p or of q, by a little or by much: NaN there, and the same bits as before elsewhere."""
    rng = np.random.default_rng(19)
    q = without_factors(random_stack(rng, 40, 3, covariance_type, dtype))
    for p in (without_factors(near(rng, q, 0.1)), without_factors(random_stack(rng, 40, 3, covariance_type, dtype))):
        expected = pairs(kernels, p, q)
        assert np.isfinite(expected).all()
        for covariances in (p.covariances, q.covariances):
            for scale in (-1.0, 0.0, np.nan, np.inf):
                before = covariances[7].copy()
                covariances[7] = before * scale if np.isfinite(scale) else scale
                found = pairs(kernels, p, q)
                assert np.isnan(found[7]), f"{scale} times a covariance gives {found[7]}"
                np.testing.assert_array_equal(np.delete(found, 7), np.delete(expected, 7))
                covariances[7] = before


@every_dtype
def test_a_last_pivot_that_is_not_positive_is_nan(kernels: ModuleType, dtype: str) -> None:
    """All of Σ is as it should be but its smallest eigenvalue, which is −1e-3."""
    rng = np.random.default_rng(20)
    variances = np.array([1.0, 0.5, -1e-3])
    rotation = np.linalg.qr(rng.normal(size=(20, 3, 3)))[0]
    wrong = (rotation * variances[:, None]) @ rotation.transpose(0, 2, 1)
    right = random_stack(rng, 20, 3, "full", dtype)
    indefinite = Gaussians("full", right.means, np.ascontiguousarray(wrong, dtype))
    assert np.isnan(pairs(kernels, indefinite, without_factors(right))).all()
    assert np.isnan(pairs(kernels, indefinite, right)).all()
    assert np.isnan(pairs(kernels, without_factors(right), indefinite)).all()
    assert np.isnan(pairs(kernels, indefinite, indefinite)).all()


@every_dtype
@every_type
def test_strides_and_threads_without_factors(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    rng = np.random.default_rng(21)
    few = without_factors(random_stack(rng, 23, 6, covariance_type, dtype, CONDITION[dtype]))
    index = rng.integers(0, 23, (2, 75 if SIMULATED else pairs_per_block(few) + 1))
    p, q = (taken(few, each) for each in index)
    found = pairs(kernels, p, q)
    np.testing.assert_array_equal(pairs(kernels, p, q, 2), found)
    np.testing.assert_array_equal(pairs(kernels, taken(p, np.arange(5)), taken(q, np.arange(5))), found[:5])
    shared = np.broadcast_to(few.covariances[:1], few.covariances.shape)
    np.testing.assert_array_equal(
        pairs(kernels, few, Gaussians(covariance_type, few.means, shared)),
        pairs(kernels, few, Gaussians(covariance_type, few.means, shared.copy())),
    )
    assert not len(pairs(kernels, taken(few, np.arange(0)), taken(few, np.arange(0))))


@every_type
def test_all_pairs_want_factors(kernels: ModuleType, covariance_type: str) -> None:
    q = random_stack(np.random.default_rng(22), 3, 2, covariance_type, "float64")
    for p in (without_factors(q), q):
        with pytest.raises(ValueError, match="precisions_cholesky is None; kl_all_pairs needs them"):
            all_pairs(kernels, p, without_factors(q))


@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_covariances_that_are_none(kernels: ModuleType, dtype: str, size: tuple[int, int]) -> None:
    """The first that is not finite, symmetric and positive definite, wherever in it the fault is."""
    M, D = size
    covariances = random_covariances(np.random.default_rng(size), M, D, CONDITION[dtype], "full").astype(dtype)
    assert kernels.check_covariances(covariances) == -1
    rounded = covariances.copy()
    rounded[:, 0] *= 1 + 1e-9
    assert kernels.check_covariances(rounded) == -1
    for m in {0, M // 2, M - 1}:
        for i, j in {(0, 0), (D - 1, 0), (0, D - 1)}:
            for wrong in (np.nan, np.inf, -np.inf, covariances[m, i, j] + 2.0 * (i != j) - 3.0 * (i == j)):
                one = covariances.copy()
                one[m:, i, j] = wrong
                assert kernels.check_covariances(one) == m, f"{wrong} at {m, i, j}"
                assert kernels.check_covariances(one, 2) == m
    assert kernels.check_covariances(covariances[:0]) == -1
    assert kernels.check_covariances(np.broadcast_to(covariances[:1], covariances.shape)) == -1
    tiny, singular = (covariances * 1e-30).astype(dtype), np.ones_like(covariances)
    assert kernels.check_covariances(tiny) == -1
    if D > 1:
        tiny[M - 1, D - 1, 0] += 1e-36
        assert kernels.check_covariances(tiny) == M - 1
        assert kernels.check_covariances(singular) == 0


def test_check_is_specified_by_the_reference(kernels: ModuleType) -> None:
    specified = emalgam_kernels.load("reference", "kl").check_covariances
    assert inspect.signature(kernels.check_covariances) == inspect.signature(specified)
    text = inspect.getdoc(kernels.check_covariances) or ""
    assert kernels.__name__.endswith("reference.kl") or "emalgam_kernels.reference.kl.check_covariances" in text


# ---- identities


@every_dtype
@every_type
@pytest.mark.parametrize("D", [1, 3, 16])
def test_zero_exactly_for_the_same_numbers(kernels: ModuleType, covariance_type: str, dtype: str, D: int) -> None:
    p = random_stack(np.random.default_rng(D), 37, D, covariance_type, dtype, CONDITION[dtype])
    again = taken(p, np.arange(37))
    assert not pairs(kernels, p, again).any()
    every = all_pairs(kernels, p, again)
    assert not np.diag(every).any()
    assert (every + np.eye(37) > 0).all()


@every_dtype
@every_type
def test_never_negative(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    """Neighbours in the last few bits too."""
    rng = np.random.default_rng(5)
    q = random_stack(rng, 20 if SIMULATED else 300, 4, covariance_type, dtype)
    for distance in (4, 64, 1e4):
        p = near(rng, q, distance * EPS[dtype])
        assert (pairs(kernels, p, q) >= 0).all()
        assert (all_pairs(kernels, p, q) >= 0).all()


@every_type
def test_affine_invariance(kernels: ModuleType, covariance_type: str) -> None:
    """KL of A x + b is that of x. The mapped covariances are rounded: at condition numbers of 30, times that of A."""
    rng = np.random.default_rng(6)
    p, q = (random_stack(rng, 20, 4, covariance_type, "float64") for _ in range(2))
    A, b = rng.uniform(0.5, 2, 4), rng.normal(size=4)
    full = np.diag(A) if covariance_type == "diag" else rng.normal(size=(4, 4)) + 3 * np.eye(4)
    mapped = [
        stack(
            each.means @ full.T + b,
            each.covariances * A**2 if covariance_type == "diag" else full @ each.covariances @ full.T,
            "float64",
        )
        for each in (p, q)
    ]
    np.testing.assert_allclose(pairs(kernels, *mapped), pairs(kernels, p, q), rtol=1e-11)
    np.testing.assert_allclose(all_pairs(kernels, *mapped), all_pairs(kernels, p, q), rtol=1e-11)


@every_dtype
@pytest.mark.parametrize("D", [1, 4, 9])
def test_full_is_diag_for_diagonals(kernels: ModuleType, dtype: str, D: int) -> None:
    rng = np.random.default_rng(D)
    p, q = (random_stack(rng, 11, D, "diag", dtype) for _ in range(2))
    matrices = [stack(each.means, each.covariances[:, :, None] * np.eye(D), dtype) for each in (p, q)]
    bound = 2 * tolerance("closed-form KL", dtype)
    np.testing.assert_allclose(pairs(kernels, *matrices), pairs(kernels, p, q), rtol=bound)
    np.testing.assert_allclose(all_pairs(kernels, *matrices), all_pairs(kernels, p, q), rtol=bound)


# ---- all pairs are pairs


@every_dtype
@every_type
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_all_pairs_are_pairs(kernels: ModuleType, covariance_type: str, dtype: str, spread: float) -> None:
    rng = np.random.default_rng(7)
    p, q = (random_stack(rng, M, 3, covariance_type, dtype) for M in (37, 41))
    p, q = (stack(each.means * spread, each.covariances, dtype) for each in (p, q))
    i, j = np.indices((37, 41)).reshape(2, -1)
    expected = pairs(kernels, taken(p, i), taken(q, j)).reshape(37, 41)
    np.testing.assert_allclose(all_pairs(kernels, p, q), expected, rtol=tolerance("all pairs", dtype))


@every_dtype
def test_guard_recomputes_what_cancels(kernels: ModuleType, dtype: str) -> None:
    """A stack that is all but one Gaussian: every divergence is small beside its terms, and has the bits of pairs."""
    rng = np.random.default_rng(8)
    one, M = random_stack(rng, 1, 5, "full", dtype), 15 if SIMULATED else 50
    p = near(rng, taken(one, np.zeros(M, int)), 1e-3)
    i, j = np.indices((M, M)).reshape(2, -1)
    expected = pairs(kernels, taken(p, i), taken(p, j)).reshape(M, M)
    assert (expected < guard(np.dtype(dtype))).all(), "not small: the test tests nothing"
    np.testing.assert_array_equal(all_pairs(kernels, p, p), expected)


# ---- layouts, sizes, threads


@every_dtype
@every_type
def test_strides_of_zero(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    """One mean, or one covariance, or one Gaussian for all: the same bits as its copies."""
    rng = np.random.default_rng(9)
    p, one = random_stack(rng, 21, 3, covariance_type, dtype), random_stack(rng, 1, 3, covariance_type, dtype)
    names = ("means", "covariances", "precisions_cholesky")
    for shared in (names[:1], names[1:], names):
        arrays = {name: getattr(one if name in shared else p, name) for name in names}
        broadcast = {name: np.broadcast_to(array, (21, *array.shape[1:])) for name, array in arrays.items()}
        q, copied = (
            Gaussians(covariance_type, **each) for each in (broadcast, {k: v.copy() for k, v in broadcast.items()})
        )
        for kernel in (pairs, all_pairs):
            np.testing.assert_array_equal(kernel(kernels, p, q), kernel(kernels, p, copied))
            np.testing.assert_array_equal(kernel(kernels, q, p), kernel(kernels, copied, p))


@every_type
def test_strided_and_read_only(kernels: ModuleType, covariance_type: str) -> None:
    rng = np.random.default_rng(10)
    p, q = (random_stack(rng, 22, 3, covariance_type, "float64") for _ in range(2))
    half = taken(p, np.arange(0, 22, 2))
    every_other = Gaussians(covariance_type, p.means[::2], p.covariances[::2], p.precisions_cholesky[::2])
    for array in (p.means, p.covariances, p.precisions_cholesky):
        array.setflags(write=False)
    expected, everyone = pairs(kernels, half, taken(q, np.arange(11))), all_pairs(kernels, half, q)
    out = np.full((11, 2), np.nan)
    kernels.kl_pairs(every_other, taken(q, np.arange(11)), out[:, 1])
    np.testing.assert_array_equal(out[:, 1], expected)
    assert np.isnan(out[:, 0]).all()
    transposed = np.full((22, 11), np.nan)
    kernels.kl_all_pairs(every_other, q, transposed.T)
    np.testing.assert_array_equal(transposed.T, everyone)


@every_type
@pytest.mark.parametrize("kernel", [pairs, all_pairs])
def test_nothing(kernels: ModuleType, covariance_type: str, kernel: Callable[..., np.ndarray]) -> None:
    p = random_stack(np.random.default_rng(11), 3, 2, covariance_type, "float64")
    assert kernel(kernels, taken(p, np.arange(0)), taken(p, np.arange(0)), 2).size == 0


@every_dtype
@every_type
def test_blocks_and_threads(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    """One more than a block; each element the same whatever lies beside it, in any number of threads."""
    rng = np.random.default_rng(12)
    D = 12 if covariance_type == "full" else 2
    few = random_stack(rng, 23, D, covariance_type, dtype)
    count = 41 if SIMULATED else pairs_per_block(few) + 1
    assert count <= MOST_PAIRS + 1
    index = rng.integers(0, 23, (2, count))
    expected = pairs(kernels, taken(few, index[0, -40:]), taken(few, index[1, -40:]))
    p, q = (taken(few, each) for each in index)
    found = pairs(kernels, p, q)
    np.testing.assert_array_equal(found[-40:], expected)
    np.testing.assert_array_equal(pairs(kernels, p, q, 2), found)


@every_dtype
@every_type
def test_blocks_and_threads_of_all_pairs(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    rng = np.random.default_rng(13)
    few = random_stack(rng, 23, 2, covariance_type, dtype)
    p = taken(few, rng.integers(0, 23, 31 if SIMULATED else ROWS_OF_A_BLOCK + 1))
    q = taken(few, rng.integers(0, 23, 35 if SIMULATED else COLUMNS_OF_A_BLOCK + 3))
    found = all_pairs(kernels, p, q)
    np.testing.assert_array_equal(all_pairs(kernels, p, q, 2), found)
    corner = [taken(each, np.arange(len(each) - 9, len(each))) for each in (p, q)]
    # the corner alone has another origin
    np.testing.assert_allclose(all_pairs(kernels, *corner), found[-9:, -9:], rtol=tolerance("all pairs", dtype))


@every_dtype
@every_type
def test_nan_stays_where_it_is(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    """One bad Gaussian among many: the others are unaffected."""
    rng = np.random.default_rng(14)
    p, q = (random_stack(rng, 21, 3, covariance_type, dtype) for _ in range(2))
    expected = pairs(kernels, p, q)
    for array in (p.means, p.covariances, p.precisions_cholesky, q.means, q.covariances, q.precisions_cholesky):
        before = array[5].copy()
        array[5] = np.nan
        if array is not p.precisions_cholesky:  # log |Σ_p| only, which close pairs and diagonals do without
            assert np.isnan(pairs(kernels, p, q)[5])
        np.testing.assert_array_equal(np.delete(pairs(kernels, p, q), 5), np.delete(expected, 5))
        array[5] = before


@of_the_cpu
@every_dtype
@pytest.mark.parametrize("name", ["cython_cpu", "numba_cpu"])
def test_workspace_is_large_enough(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries behind the workspace: its size is computed in one place and used in another."""
    try:
        kernels = emalgam_kernels.load(name, "kl")
    except ImportError as error:
        pytest.skip(str(error))
    given: list[tuple[np.ndarray, int]] = []

    def guarded_workspace(n_bytes: int) -> np.ndarray:
        memory = np.full(n_bytes + 4096, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64 + 16  # the worst alignment that malloc gives
        given.append((memory, start + n_bytes))
        return memory[start : start + n_bytes]

    owner = kernels if hasattr(kernels, "workspace") else blocks
    assert owner.workspace is workspace
    monkeypatch.setattr(owner, "workspace", guarded_workspace)
    rng = np.random.default_rng(15)
    for covariance_type in ("full", "diag"):
        for D in (1, 2, 3, 4, 7, 8, 9, 16, 17):
            p, q = (random_stack(rng, M, D, covariance_type, dtype) for M in (ROWS_OF_A_BLOCK, 130))
            pairs(kernels, q, q)
            pairs(kernels, without_factors(q), without_factors(q))
            all_pairs(kernels, p, q)
            all_pairs(kernels, q, q)
            if covariance_type == "full":
                kernels.precision_factors(q.covariances, np.empty_like(q.covariances))
                kernels.check_covariances(q.covariances)
            assert given, "the kernel has its memory from elsewhere"
            for memory, end in given:
                assert (memory[end:] == 0xA5).all(), f"{covariance_type}, D = {D}: written behind the workspace"
            given.clear()


@of_the_cpu
@pytest.mark.parametrize("simd_level", ["v3", "baseline"], indirect=True)
@every_dtype
@every_type
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lower_levels(simd_level: str, covariance_type: str, dtype: str, size: tuple[int, int]) -> None:
    """The compiled kernels on every SIMD level that this processor has."""
    kernels = emalgam_kernels.load("cython_cpu", "kl")
    test_ill_conditioned_pairs(kernels, covariance_type, dtype, size)
    test_every_pair(kernels, covariance_type, dtype, size)
    test_zero_exactly_for_the_same_numbers(kernels, covariance_type, dtype, size[1])
    test_precision_factors(kernels, dtype, size)
    test_pairs_without_factors(kernels, covariance_type, dtype, size)
    test_covariances_that_are_none(kernels, dtype, size)
