"""Many fits: each against oracles, against the specification, and apart from its neighbours, over every backend."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from types import ModuleType
from typing import Final

import numpy as np
import pytest

import emalgam_kernels
from emalgam_kernels.batch import (
    COVARIANCE_TYPES,
    Mixtures,
    Outcomes,
    Problems,
    Settings,
    Status,
    criterion_value,
    parameter_count,
)
from tests import oracles
from tests.conftest import DTYPES, SIMULATED
from tests.tolerances import tolerance

every_type = pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SIZES: Final = (40, 7, 90) if SIMULATED else (200, 7, 1500, 61)  # samples of the problems of `ragged`


@pytest.fixture(scope="session")
def kernels(backend: str) -> ModuleType:
    """The backend's many fits."""
    return emalgam_kernels.load(backend, "batch")


# ---- problems


@cache
def ragged(D: int = 2, dtype: str = "float64", seed: int = 0) -> Problems:
    """Problems of different sizes, each three clusters."""
    rng = np.random.default_rng(seed)
    parts = []
    for n in SIZES:
        centres = rng.normal(0, 4, (3, D))
        parts.append(centres[rng.integers(0, 3, n)] + rng.normal(size=(n, D)) @ (np.eye(D) + 0.3 * rng.normal(size=D)))
    return together(parts, dtype)


def together(parts: list[np.ndarray], dtype: str = "float64") -> Problems:
    """One problem for each array."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Problems(np.concatenate(parts).astype(dtype), offsets, None, None, np.arange(len(parts), dtype=np.uint64))


def samples(problems: Problems, b: int) -> np.ndarray:
    """The samples of one problem, as stored, in float64."""
    span = slice(problems.offsets[b], problems.offsets[b + 1])
    return problems.x[span if problems.order is None else problems.order[span]].astype(np.float64)


def settings(problems: Problems, covariance_type: str, K: int | tuple[int, int] = 3, **changes: object) -> Settings:
    fewest, most = (K, K) if isinstance(K, int) else K
    counts = [np.full(len(problems), count, np.int64) for count in (fewest, most)]
    return replace(Settings(covariance_type, *counts), **changes)


def fit(kernels: ModuleType, problems: Problems, how: Settings, n_threads: int = 1) -> tuple[Mixtures, Outcomes]:
    mixtures = Mixtures.empty(how.covariance_type, len(problems), int(how.most.max()), problems.n_features)
    outcomes = Outcomes.empty(len(problems))
    assert kernels.fit_many(problems, how, mixtures, outcomes, n_threads) is None
    return mixtures, outcomes


def specified(problems: Problems, how: Settings) -> tuple[Mixtures, Outcomes]:
    """What the reference makes of it."""
    return fit(emalgam_kernels.load("reference", "batch"), problems, how)


def mixture(mixtures: Mixtures, b: int) -> oracles.Gaussians:
    """One of them, for the oracles."""
    K, covariances = int(mixtures.n_components[b]), mixtures.covariances[b]
    shaped = covariances if mixtures.covariance_type == "tied" else covariances[:K]
    return oracles.Gaussians(mixtures.weights[b, :K], mixtures.means[b, :K], shaped, mixtures.covariance_type)


def arrays(mixtures: Mixtures, outcomes: Outcomes) -> dict[str, np.ndarray]:
    """All that a fit returns, by name."""
    found = {name: getattr(mixtures, name) for name in ("n_components", "weights", "means", "covariances")}
    return found | {name: getattr(outcomes, name) for name in Outcomes.__slots__}


def assert_same_bits(
    first: tuple[Mixtures, Outcomes], second: tuple[Mixtures, Outcomes], rows: slice | np.ndarray = slice(None)
) -> None:
    """Every number of `first`, or of some of its problems, is that of `second`."""
    for name, values in arrays(*first).items():
        np.testing.assert_array_equal(values[rows], arrays(*second)[name], err_msg=name)


def assert_close(first: tuple[Mixtures, Outcomes], second: tuple[Mixtures, Outcomes], bound: float) -> None:
    """Relative to the largest entry of each array, of the entropy to that of the log-likelihood; integers are equal."""
    for name, values in arrays(*first).items():
        truth = arrays(*second)[name]
        if values.dtype.kind in "bi":
            np.testing.assert_array_equal(values, truth, err_msg=name)
            continue
        np.testing.assert_array_equal(np.isnan(values), np.isnan(truth), err_msg=name)
        whole = second[1].log_likelihood if name == "entropy" else truth  # an entropy may be next to nothing
        scale = float(np.nanmax(np.abs(whole), initial=0.0))
        worst = float(np.nanmax(np.abs(values - truth), initial=0.0))
        assert worst <= bound * scale, f"{name}: off by {worst / scale:.2g} of the largest; allowed are {bound:.2g}"


# ---- against oracles


@every_type
@every_dtype
def test_log_likelihood_is_that_of_the_mixture_that_is_returned(
    kernels: ModuleType, covariance_type: str, dtype: str
) -> None:
    problems = ragged(3, dtype)
    mixtures, outcomes = fit(kernels, problems, settings(problems, covariance_type, 2, max_iter=7))
    for b in range(len(problems)):
        x = samples(problems, b)
        truth = float(oracles.log_prob(x, mixture(mixtures, b)).sum())
        assert abs(outcomes.log_likelihood[b] - truth) <= 1e-9 * len(x) + 1e-12 * abs(truth), f"problem {b}"
        r = oracles.responsibilities(x, mixture(mixtures, b)).astype(np.float64)
        entropy = -(r * np.log(np.maximum(r, 1e-300))).sum()
        assert abs(outcomes.entropy[b] - entropy) <= 1e-8 * len(x), f"problem {b}"


@every_type
def test_a_converged_fit_is_a_fixed_point_of_em(kernels: ModuleType, covariance_type: str) -> None:
    problems = ragged()
    how = settings(problems, covariance_type, 2, max_iter=400 if SIMULATED else 5000, tol=1e-13, added=0.0)
    mixtures, outcomes = fit(kernels, problems, how)
    for b in np.flatnonzero(outcomes.converged):
        x, found = samples(problems, b), mixture(mixtures, b)
        r = oracles.responsibilities(x, found).astype(np.float64)
        mass = r.sum(axis=0)
        np.testing.assert_allclose(found.weights, mass / len(x), rtol=1e-5)
        means = r.T @ x / mass[:, None]
        np.testing.assert_allclose(found.means, means, rtol=1e-4, atol=1e-5)
        centred = x[:, None] - means
        full = np.einsum("nk,nki,nkj->kij", r, centred, centred) / mass[:, None, None]
        expected = {
            "full": full,
            "tied": np.einsum("k,kij->ij", mass, full) / len(x),
            "diag": np.einsum("kii->ki", full),
            "spherical": np.einsum("kii->k", full) / x.shape[1],
        }[covariance_type]
        np.testing.assert_allclose(found.covariances, expected, rtol=1e-3, atol=1e-4)
    assert outcomes.converged.sum() >= 2


@every_type
def test_the_likelihood_never_falls(kernels: ModuleType, covariance_type: str) -> None:
    problems = ragged()
    trace = [
        fit(kernels, problems, settings(problems, covariance_type, 3, max_iter=n, tol=0.0, added=0.0))[1].log_likelihood
        for n in range(4 if SIMULATED else 6)
    ]
    assert (np.diff(trace, axis=0) >= -1e-9 * np.diff(problems.offsets)).all()
    large = np.diff(problems.offsets) > 10  # the smallest problem is fitted by its start
    assert (trace[-1] > trace[0])[large].all()


@every_dtype
def test_the_start_gives_every_sample_to_its_nearest_seed(kernels: ModuleType, dtype: str) -> None:
    rng = np.random.default_rng(5)
    problems = together([rng.normal(size=(7, 2)) for _ in range(5)], dtype)
    mixtures, outcomes = fit(kernels, problems, settings(problems, "spherical", 3, max_iter=0, added=0.0))
    np.testing.assert_array_equal(outcomes.n_iter, 0)
    for b in range(len(problems)):
        x = samples(problems, b)
        distances = ((x[:, None] - x) ** 2).sum(axis=2)
        partitions = [distances[:, seeds].argmin(axis=1) for seeds in combinations(range(7), 3)]
        possible = [np.stack([x[labels == k].mean(axis=0) for k in range(3)]) for labels in partitions]
        found = mixtures.means[b][np.argsort(mixtures.means[b][:, 0])]
        errors = [np.abs(means[np.argsort(means[:, 0])] - found).max() for means in possible]
        assert min(errors) < 1e-12, f"problem {b}: the means are not those of the cells of any three samples"


def test_seeds_are_far_apart(kernels: ModuleType) -> None:
    # Four tight clusters, so far apart that greedy k-means++ misses one about once in 1e4 problems.
    rng = np.random.default_rng(6)
    corners = 100.0 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    parts = [corners[np.arange(24) % 4] + rng.normal(size=(24, 2)) for _ in range(20)]
    problems = together(parts)
    mixtures, _ = fit(kernels, problems, settings(problems, "full", 4, max_iter=0))
    np.testing.assert_allclose(np.sort(mixtures.weights, axis=1), 0.25, rtol=1e-12)


# ---- against the specification


@every_type
@every_dtype
@pytest.mark.parametrize("D", [1, 2, 5])
def test_agrees_with_the_reference(kernels: ModuleType, covariance_type: str, dtype: str, D: int) -> None:
    problems = ragged(D, dtype)
    how = settings(problems, covariance_type, 3, max_iter=5, tol=0.0, seed=11)
    assert_close(fit(kernels, problems, how), specified(problems, how), tolerance("fit", "float64"))


@every_type
def test_many_components_and_restarts_agree_with_the_reference(kernels: ModuleType, covariance_type: str) -> None:
    problems = ragged(3)
    most, n_init = (3, 2) if SIMULATED else (6, 3)
    how = settings(problems, covariance_type, (1, most), max_iter=4, n_init=n_init, criterion="icl", seed=2**64 - 1)
    assert_close(fit(kernels, problems, how), specified(problems, how), tolerance("fit", "float64"))


def hard(kind: str, D: int = 3) -> Problems:
    """Three clusters where a form of the logits that suits most data would overflow or lose its digits."""
    rng, n = np.random.default_rng(4), 40 if SIMULATED else 150
    parts = []
    for _ in range(2 if SIMULATED else 5):
        labels = np.arange(n) % 3
        centres, noise = rng.normal(0, 4, (3, D)), rng.normal(size=(n, D))
        if kind == "far apart":
            centres *= 40
        elif kind == "outliers":
            noise[:2] *= 1e5
        elif kind == "one is narrow":
            noise[labels == 0] *= 1e-5
        elif kind == "one is narrow, at the origin":
            centres[0], centres[2], noise[labels == 2] = 0, -centres[1], -noise[labels == 1]
            half = rng.normal(0, 1e-5, (np.count_nonzero(labels == 0) // 2, D))
            noise[labels == 0] = np.concatenate([half, -half])
        elif kind == "one is rare":
            labels[labels == 0] = 1
            labels[: D + 2] = 0
        parts.append(centres[labels] + noise)
    return together(parts)


@every_type
@pytest.mark.parametrize(
    "kind", ["far apart", "outliers", "one is narrow", "one is narrow, at the origin", "one is rare"]
)
def test_hard_problems_agree_with_the_reference(kernels: ModuleType, covariance_type: str, kind: str) -> None:
    problems = hard(kind)
    how = settings(problems, covariance_type, max_iter=5, tol=0.0, added=0.0)
    assert_close(fit(kernels, problems, how), specified(problems, how), tolerance("fit", "float64"))


@pytest.mark.parametrize(
    "n", [1, 2, 63, 64, 65, 511, 512, 513] if SIMULATED else [1, 2, 255, 256, 257, 511, 512, 513, 1025, 20_001]
)
@every_type
def test_sizes_across_a_tile(kernels: ModuleType, covariance_type: str, n: int) -> None:
    rng = np.random.default_rng(n)
    problems = together([rng.normal(size=(n, 2)) + 6 * rng.integers(0, 2, (n, 1))])
    how = settings(problems, covariance_type, min(n, 2), max_iter=3, tol=0.0)
    assert_close(fit(kernels, problems, how), specified(problems, how), tolerance("fit", "float64"))


@every_type
def test_many_features(kernels: ModuleType, covariance_type: str) -> None:
    rng = np.random.default_rng(3)
    n = 40 if SIMULATED else 90
    problems = together([rng.normal(size=(n, 20)) + 3 * rng.integers(0, 2, (n, 1)) for _ in range(2)])
    how = settings(problems, covariance_type, 2, max_iter=3, tol=0.0)
    assert_close(fit(kernels, problems, how), specified(problems, how), tolerance("fit", "float64"))


@every_type
def test_weights_order_and_strides(kernels: ModuleType, covariance_type: str) -> None:
    rng = np.random.default_rng(4)
    plain = ragged(3)
    N = len(plain.x)
    order = rng.permutation(N)
    wide = np.full((N, 7), np.nan)[:, ::-2][:, :3]
    wide[order] = plain.x
    weight = rng.integers(0, 3, N).astype(float)
    problems = replace(plain, x=wide, order=order, sample_weight=weight)
    how = settings(problems, covariance_type, 2, max_iter=5, tol=0.0)
    assert_close(fit(kernels, problems, how), specified(problems, how), tolerance("fit", "float64"))


def test_weight_two_is_the_row_twice_and_weight_zero_its_absence(kernels: ModuleType) -> None:
    rng = np.random.default_rng(8)
    x = np.concatenate([rng.normal(size=(30, 2)), rng.normal(size=(30, 2)) + 50])
    weight = np.tile([0.0, 1.0, 2.0], 20)
    there, twice = x[weight > 0], np.repeat(x, weight.astype(int), axis=0)
    weighted = replace(together([np.where(weight[:, None] == 0, np.nan, x)]), sample_weight=weight)
    first = fit(kernels, weighted, settings(weighted, "full", 2, max_iter=50, tol=1e-9))
    second = fit(kernels, together([twice]), settings(together([twice]), "full", 2, max_iter=50, tol=1e-9))
    order = [np.argsort(found[0].means[0, :, 0]) for found in (first, second)]
    for name in ("weights", "means", "covariances"):
        values = [getattr(found[0], name)[0][index] for found, index in zip((first, second), order, strict=True)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-9, atol=1e-9, err_msg=name)
    assert first[1].log_likelihood[0] == pytest.approx(second[1].log_likelihood[0], rel=1e-10)
    assert len(there) < len(x)


# ---- each problem by itself


@every_type
def test_a_result_depends_on_the_problem_alone(kernels: ModuleType, covariance_type: str) -> None:
    problems, most, max_iter = ragged(), *((2, 4) if SIMULATED else (3, 10))
    how = settings(problems, covariance_type, (1, most), n_init=2, max_iter=max_iter, seed=3)
    together_ = fit(kernels, problems, how)
    assert_same_bits(together_, fit(kernels, problems, how, n_threads=3))
    for b in range(len(problems)):
        alone = replace(
            problems,
            x=problems.x[problems.offsets[b] : problems.offsets[b + 1]],
            offsets=problems.offsets[b : b + 2] - problems.offsets[b],
            numbers=problems.numbers[b : b + 1],
        )
        assert_same_bits(
            together_,
            fit(kernels, alone, settings(alone, covariance_type, (1, most), n_init=2, max_iter=max_iter, seed=3)),
            slice(b, b + 1),
        )


def test_another_number_is_another_start(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).normal(size=(60, 2))
    problems = together([x] * 6)
    mixtures, _ = fit(kernels, problems, settings(problems, "full", 3, max_iter=0))
    assert len({means.tobytes() for means in mixtures.means}) > 1
    same = replace(problems, numbers=np.zeros(6, np.uint64))
    mixtures, _ = fit(kernels, same, settings(same, "full", 3, max_iter=0))
    assert len({means.tobytes() for means in mixtures.means}) == 1


# ---- how many components


@pytest.mark.parametrize("criterion", ["bic", "aic", "icl"])
def test_the_smallest_criterion_wins(kernels: ModuleType, criterion: str) -> None:
    problems, most, max_iter = ragged(2), *((3, 4) if SIMULATED else (4, 20))
    total = np.diff(problems.offsets)
    values, collapsed = [], []
    for K in range(1, most + 1):
        _, outcomes = fit(kernels, problems, settings(problems, "diag", K, criterion=criterion, max_iter=max_iter))
        count = parameter_count("diag", K, 2)
        collapsed.append(outcomes.status == Status.COLLAPSED)
        values.append(
            [
                criterion_value(criterion, outcomes.log_likelihood[b], outcomes.entropy[b], count, float(total[b]))
                for b in range(len(problems))
            ]
        )
    mixtures, _ = fit(kernels, problems, settings(problems, "diag", (1, most), criterion=criterion, max_iter=max_iter))
    best = [np.lexsort((np.array(values)[:, b], np.array(collapsed)[:, b]))[0] for b in range(len(problems))]
    np.testing.assert_array_equal(mixtures.n_components, 1 + np.array(best))


@pytest.mark.parametrize("criterion", ["bic", "aic", "icl"])
def test_noise_does_not_choose_components_that_collapse(kernels: ModuleType, criterion: str) -> None:
    # One Gaussian: with more components EM finds a plane through three samples, where the likelihood has no bound.
    B, most = (2, 3) if SIMULATED else (60, 6)
    problems = together(list(np.random.default_rng(0).normal(size=(B, 12 if SIMULATED else 20, 3))))
    how = settings(problems, "full", most, criterion=criterion)
    collapsed = fit(kernels, problems, how)[1].status == Status.COLLAPSED
    assert collapsed.mean() > 0.4, "the components do not collapse, and show nothing"
    _, outcomes = fit(kernels, problems, replace(how, fewest=np.ones(B, np.int64)))
    assert (outcomes.status < Status.COLLAPSED).all()


def test_restarts_do_not_choose_components_that_collapse(kernels: ModuleType) -> None:
    # Rounded samples lie on lines, where components collapse from some starts.
    B, N, step, n_init = (2, 24, 1.0, 2) if SIMULATED else (60, 60, 0.5, 8)
    x = np.random.default_rng(2).normal(size=(B, N, 2))
    problems = together(list(np.round(x / step) * step))
    fine = np.zeros(B, bool)
    for starts in (1, n_init):
        _, outcomes = fit(kernels, problems, settings(problems, "full", 3, n_init=starts, max_iter=20))
        now_fine = outcomes.status < Status.COLLAPSED
        assert not (fine & ~now_fine).any(), "a start that did not collapse lost to one that did"
        fine = now_fine
    assert fine.any()


def test_each_problem_has_its_own_range(kernels: ModuleType) -> None:
    problems = ragged()
    fewest = np.arange(len(problems)) % 3 + 1
    how = replace(settings(problems, "full"), fewest=fewest, most=fewest)
    mixtures, _ = fit(kernels, problems, how)
    np.testing.assert_array_equal(mixtures.n_components, fewest)
    for b, K in enumerate(fewest):
        assert np.isfinite(mixtures.weights[b, :K]).all()
        assert np.isnan(mixtures.weights[b, K:]).all()
        assert np.isnan(mixtures.means[b, K:]).all()
        assert np.isnan(mixtures.covariances[b, K:]).all()


def test_a_range_ends_at_the_number_of_samples(kernels: ModuleType) -> None:
    problems = together([np.random.default_rng(0).normal(size=(3, 1)), np.random.default_rng(1).normal(size=(30, 1))])
    mixtures, outcomes = fit(kernels, problems, settings(problems, "spherical", (1, 8)))
    assert 1 <= mixtures.n_components[0] <= 3
    assert (outcomes.status <= Status.COLLAPSED).all()


# ---- problems that go wrong


def test_a_bad_problem_leaves_the_others_alone(kernels: ModuleType) -> None:
    rng = np.random.default_rng(1)
    good = [rng.normal(size=(30, 2)) + 8 * rng.integers(0, 2, (30, 1)) for _ in range(4)]
    bad = [
        np.full((30, 2), np.nan),
        np.where(np.arange(60).reshape(30, 2) == 17, np.inf, good[0]),
        np.empty((0, 2)),
        np.ones((1, 2)),
    ]
    problems = together([good[0], bad[0], good[1], bad[1], bad[2], good[2], bad[3], good[3]])
    mixtures, outcomes = fit(kernels, problems, settings(problems, "full", 2))
    expected = [0, Status.NOT_FINITE, 0, Status.NOT_FINITE, Status.TOO_FEW_ROWS, 0, Status.TOO_FEW_ROWS, 0]
    np.testing.assert_array_equal(outcomes.status, expected)
    for b in (1, 3, 4, 6):
        assert mixtures.n_components[b] == 0
        assert np.isnan(outcomes.log_likelihood[b])
        assert not outcomes.converged[b]
        assert np.isnan(mixtures.weights[b]).all()
        assert np.isnan(mixtures.means[b]).all()
    kept = replace(together(good), numbers=problems.numbers[[0, 2, 5, 7]])
    assert_same_bits((mixtures, outcomes), fit(kernels, kept, settings(kept, "full", 2)), np.array([0, 2, 5, 7]))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_bad_weights_have_a_status(kernels: ModuleType, weight: float) -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    weights = np.ones(40)
    weights[25] = weight
    problems = replace(together([x[:20], x[20:]]), sample_weight=weights)
    _, outcomes = fit(kernels, problems, settings(problems, "full", 2))
    np.testing.assert_array_equal(outcomes.status, [Status.FINE, Status.BAD_WEIGHT])


def test_all_weights_zero_are_too_few_samples(kernels: ModuleType) -> None:
    problems = replace(together([np.ones((9, 1))]), sample_weight=np.zeros(9))
    _, outcomes = fit(kernels, problems, settings(problems, "full", 1))
    np.testing.assert_array_equal(outcomes.status, [Status.TOO_FEW_ROWS])


def test_what_has_not_converged_says_so(kernels: ModuleType) -> None:
    problems = ragged()
    _, outcomes = fit(kernels, problems, settings(problems, "full", 1, max_iter=1))
    np.testing.assert_array_equal(outcomes.status, Status.NOT_CONVERGED)
    assert not outcomes.converged.any()
    assert (outcomes.n_iter == 1).all()
    _, outcomes = fit(kernels, problems, settings(problems, "full", 1, max_iter=10))
    np.testing.assert_array_equal(outcomes.status, Status.FINE)
    assert outcomes.converged.all()
    assert (outcomes.n_iter < 10).all()


@every_type
def test_what_has_collapsed_says_so(kernels: ModuleType, covariance_type: str) -> None:
    rng = np.random.default_rng(2)
    spread, point = rng.normal(size=(40, 2)), np.tile([[60.0, 60.0]], (20, 1))
    problems = together([np.concatenate([spread, point])])
    mixtures, outcomes = fit(kernels, problems, settings(problems, covariance_type, 2))
    assert outcomes.status[0] == (Status.FINE if covariance_type == "tied" else Status.COLLAPSED)
    assert np.isfinite(mixtures.covariances).all()
    assert np.isfinite(outcomes.log_likelihood).all()


@every_type
def test_duplicates_and_constant_features_fit(kernels: ModuleType, covariance_type: str) -> None:
    rng = np.random.default_rng(2)
    parts = [np.ones((20, 2)), np.column_stack([rng.normal(size=20), np.full(20, 7.0)])]
    problems = together(parts)
    mixtures, outcomes = fit(kernels, problems, settings(problems, covariance_type, 1))
    np.testing.assert_array_equal(outcomes.status, Status.FINE)
    np.testing.assert_allclose(mixtures.means[1, 0], parts[1].mean(axis=0), rtol=1e-12)
    more = fit(kernels, problems, settings(problems, covariance_type, 3))
    assert np.isfinite(more[1].log_likelihood).all()


@every_type
@pytest.mark.parametrize(("scale", "shift"), [(1e-150, 0.0), (1e150, 0.0), (1.0, 1e8), (1e-5, 3.0)])
def test_units_and_origin_do_not_matter(kernels: ModuleType, covariance_type: str, scale: float, shift: float) -> None:
    rng = np.random.default_rng(7)
    x = np.round(rng.normal(size=(80, 2)) + 9 * rng.integers(0, 2, (80, 1)), 6)
    moved = x * scale + shift
    plain = fit(kernels, together([x]), settings(together([x]), covariance_type, 2, max_iter=8, tol=0.0))[0]
    other = fit(kernels, together([moved]), settings(together([moved]), covariance_type, 2, max_iter=8, tol=0.0))[0]
    rounding = np.finfo(np.float64).eps * abs(shift) / scale
    np.testing.assert_allclose((other.means - shift) / scale, plain.means, rtol=1e-9, atol=10 * rounding)
    np.testing.assert_allclose(other.weights, plain.weights, rtol=1e-9 + 1e3 * rounding)


def test_parameters_that_cancel_are_evaluated_directly(kernels: ModuleType) -> None:
    # Two needles, a million of their standard deviations apart: the packed form would lose ten digits.
    rng = np.random.default_rng(9)
    x = rng.normal(size=(60, 2)) * 1e-6 + np.repeat([[0.0, 0.0], [1.0, 1.0]], 30, axis=0)
    problems = together([x])
    mixtures, outcomes = fit(kernels, problems, settings(problems, "full", 2, added=0.0))
    truth = float(oracles.log_prob(x, mixture(mixtures, 0)).sum())
    assert abs(outcomes.log_likelihood[0] - truth) <= 1e-8 * len(x)


# ---- predict_many


@every_type
@every_dtype
def test_prediction_against_oracles(kernels: ModuleType, covariance_type: str, dtype: str) -> None:
    problems = ragged(3, dtype)
    mixtures, _ = specified(problems, settings(problems, covariance_type, (1, 3)))
    log_prob, labels = np.full(len(problems.x), np.nan), np.full(len(problems.x), -7)
    assert kernels.predict_many(problems, mixtures, log_prob, labels, 2) is None
    for b in range(len(problems)):
        span, x = slice(problems.offsets[b], problems.offsets[b + 1]), samples(problems, b)
        joint = oracles.joint_log_prob(x, mixture(mixtures, b))
        np.testing.assert_allclose(log_prob[span], oracles.log_sum_exp(joint).astype(float), atol=1e-9, rtol=1e-12)
        np.testing.assert_array_equal(labels[span], joint.argmax(axis=1))


def test_prediction_without_a_mixture_or_of_nan(kernels: ModuleType) -> None:
    rng = np.random.default_rng(0)
    problems = together([rng.normal(size=(20, 2)), np.full((5, 2), np.nan), rng.normal(size=(20, 2))])
    mixtures, _ = specified(problems, settings(problems, "full", 2))
    x = np.where(np.arange(len(problems.x))[:, None] == 3, np.nan, problems.x)
    log_prob, labels = np.zeros(len(x)), np.zeros(len(x), np.int64)
    kernels.predict_many(replace(problems, x=x), mixtures, log_prob, labels)
    absent = np.isin(np.arange(len(x)), [3, 20, 21, 22, 23, 24])
    np.testing.assert_array_equal(np.isnan(log_prob), absent)
    np.testing.assert_array_equal(labels == -1, absent)


def test_prediction_in_another_order(kernels: ModuleType) -> None:
    problems = ragged(2)
    mixtures, _ = specified(problems, settings(problems, "full", 2))
    order = np.random.default_rng(0).permutation(len(problems.x))
    moved = np.empty_like(problems.x)
    moved[order] = problems.x
    plain, other = np.empty(len(order)), np.empty(len(order))
    labels, other_labels = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    kernels.predict_many(problems, mixtures, plain, labels)
    kernels.predict_many(replace(problems, x=moved, order=order), mixtures, other, other_labels)
    np.testing.assert_array_equal(other[order], plain)
    np.testing.assert_array_equal(other_labels[order], labels)
