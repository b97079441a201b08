"""Streams that pass once: stepwise EM against full EM, and batch by batch through the estimator."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import emalgam
from emalgam.covariance import COVARIANCES
from emalgam.em import Settings
from emalgam.packing import Moments, features
from emalgam.stepwise import Memory, Running
from tests.samples import blobs

TYPES = tuple(COVARIANCES)
UNREGULARIZED = Settings(reg_covar=0.0)


def assert_close(found: emalgam.Mixture, expected: emalgam.Mixture, rtol: float) -> None:
    """The same parameters, but for `rtol` of the largest."""
    for name in ("weights", "means", "covariances"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max(), err_msg=name)


def batches(x: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    return (x[begin : begin + rows] for begin in range(0, len(x), rows))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_one_pass_over_a_million_rows_is_within_a_percent_of_full_em(covariance_type: str) -> None:
    x = blobs(1_000_000)[0]
    how: dict[str, Any] = {"covariance_type": covariance_type, "random_state": 0}
    full = emalgam.fit(x, 4, tol=1e-5, **how)
    found = emalgam.fit_stepwise(batches(x, 7000), 4, **how).mixture.log_prob(x).mean()
    assert found >= full.lower_bound - 0.01 * abs(full.lower_bound)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_leaves_a_bad_start_behind(covariance_type: str) -> None:
    # The first batch comes from somewhere else: its statistics have to be forgotten.
    x = blobs(400_000)[0]
    first = np.random.default_rng(0).normal(size=(8000, 3)) * 4
    result = emalgam.fit_stepwise(
        batches(np.concatenate([first, x]), 4000), 4, covariance_type=covariance_type, random_state=0, batch_rows=4000
    )
    start = emalgam.fit(first, 4, covariance_type=covariance_type, random_state=0)
    assert result.mixture.log_prob(x).mean() > start.mixture.log_prob(x).mean() + 0.2
    assert result.lower_bounds[-1] > result.lower_bounds[1]


def test_a_step_is_the_running_mean_of_statistics_and_an_m_step() -> None:
    x = blobs(3000)[0]
    estimator = emalgam.GaussianMixture(3, random_state=0, reg_covar=0.0).fit(x[:1000])
    state = Running.of(estimator.mixture_, Memory.of(2000.0, kappa=1.0, t_0=1.0))  # γ₁ = 1/2
    moved, bound = state.step(x[1000:], None, UNREGULARIZED, "reference", 1)
    before, r = estimator.mixture_, estimator.predict_proba(x[1000:])
    assert bound == pytest.approx(estimator.score(x[1000:]), abs=1e-9)
    weights = 0.5 * before.weights + 0.5 * r.mean(axis=0)
    np.testing.assert_allclose(moved.mixture.weights, weights, rtol=1e-9)
    first = 0.5 * before.weights[:, None] * before.means + 0.5 * r.T @ x[1000:] / 2000
    means = first / weights[:, None]
    np.testing.assert_allclose(moved.mixture.means, means, rtol=1e-8, atol=1e-10)
    second = (
        0.5 * before.weights[:, None, None] * (before.covariances + before.means[:, :, None] * before.means[:, None])
        + 0.5 * np.einsum("nk,ni,nj->kij", r, x[1000:], x[1000:]) / 2000
    )
    covariances = second / weights[:, None, None] - means[:, :, None] * means[:, None]
    np.testing.assert_allclose(moved.mixture.covariances, covariances, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_statistics_of_a_mixture_give_it_back(covariance_type: str) -> None:
    mixture = emalgam.fit(blobs(2000)[0], 3, covariance_type=covariance_type, random_state=0).mixture
    state = Running.of(mixture, Memory.of(1.0))
    again = state._maximize(state.origin, UNREGULARIZED)
    assert_close(again.mixture, mixture, rtol=1e-9)
    np.testing.assert_allclose(again.statistics, state.statistics, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_partial_fit(covariance_type: str) -> None:
    x = blobs(200_000)[0].astype(np.float32)
    estimator = emalgam.GaussianMixture(4, covariance_type=covariance_type, random_state=0)
    for batch in batches(x, 10_000):
        assert estimator.partial_fit(batch) is estimator
    assert estimator.n_iter_ == 19
    full = emalgam.GaussianMixture(4, covariance_type=covariance_type, random_state=0, tol=1e-5).fit(x)
    assert estimator.score(x) >= full.score(x) - 0.01 * abs(full.score(x))
    assert estimator.means_.dtype == np.float32


def test_partial_fit_goes_on_after_fit_and_after_pickling() -> None:
    x = blobs(30_000)[0]
    estimator = emalgam.GaussianMixture(4, random_state=0).fit(x[:10_000])
    estimator.partial_fit(x[10_000:20_000])
    copy = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(copy.partial_fit(x[20_000:]).means_, estimator.partial_fit(x[20_000:]).means_)
    assert estimator.n_iter_ == 2
    assert estimator.fit(x).n_iter_ != 2 or estimator.converged_
    assert estimator.partial_fit(x[:100]).n_iter_ == 1


# ---- how much a batch counts


def test_equal_batches_have_the_step_sizes_of_the_literature() -> None:
    memory = Memory(0.6, 2.0, 700.0, 700.0)
    for t in range(1, 50):
        assert memory.gamma(700.0) == (t + 2.0) ** -0.6
        memory = memory.after(700.0)


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_light_tail_moves_the_estimate_in_proportion(covariance_type: str, weighted: bool) -> None:
    """One row, or one weight, of ε of the batches before moves it by O(ε), not by γ."""
    x, tail = blobs(32_768)[0], np.full((1, 3), 30.0)
    how: dict[str, Any] = {"covariance_type": covariance_type, "random_state": 0, "reg_covar": 0.0}
    before = emalgam.fit_stepwise(iter([x]), 2, **how).mixture
    moved = []
    for light in (1.0, 0.5, 1e-6, 1e-12) if weighted else (1.0,):
        chunks = [(x, np.ones(len(x))), (tail, np.array([light]))] if weighted else [x, tail]
        after = emalgam.fit_stepwise(iter(chunks), 2, **how).mixture
        moved.append(np.abs(after.means - before.means).max() / light)
    far, share = 40.0, 1 / 16_384  # of the row from the means, and of the row beside a batch
    assert moved[0] < 4 * far * share  # γ / (1 − γ) is near one, and a component has about half of the rows
    if weighted:
        assert moved[0] == pytest.approx(moved[1], rel=0.01)
        assert moved[0] == pytest.approx(moved[2], rel=0.01)
        assert moved[3] < 1e-2  # the movement, 1e-14, is in the rounding


def test_a_row_after_fit_counts_as_one_of_its_rows() -> None:
    x = np.random.default_rng(0).normal(size=(98_304, 2))
    for how in ({}, {"sample_weight": np.full(len(x), 3.0)}, {"sample_weight": np.full(len(x), 1e200)}):
        weight = np.full(1, how["sample_weight"][0]) if how else None
        estimator = emalgam.GaussianMixture(1).fit(x, **how)
        before = estimator.means_
        estimator.partial_fit([[3.0, 3.0]], sample_weight=weight)
        assert 1e-5 < np.abs(estimator.means_ - before).max() < 1e-4
    stream = emalgam.GaussianMixture(1, random_state=0).fit(emalgam.open_stream(x, chunk_rows=9999))
    before = stream.means_
    assert 1e-5 < np.abs(stream.partial_fit([[3.0, 3.0]]).means_ - before).max() < 1e-4


@pytest.mark.parametrize("covariance_type", TYPES)
def test_with_kappa_and_t_0_one_it_is_the_mean_over_all_rows_however_they_are_cut(covariance_type: str) -> None:
    """Of one component, whose E-step does not depend on its parameters: batches from one row to most of all rows."""
    x = blobs(5000)[0]
    weight = np.random.default_rng(1).gamma(0.3, size=len(x))
    how: dict[str, Any] = {"covariance_type": covariance_type, "reg_covar": 0.0}
    settings = Settings(**how)
    ends = [100, 101, 110, 900, 4300, 4310, 4999, 5000]
    state, _ = Running.begin(x[:100], weight[:100], settings, "cython_cpu", 1, kappa=1.0, t_0=1.0)
    for begin, end in itertools.pairwise(ends):
        state, _ = state.step(x[begin:end], weight[begin:end], settings, "cython_cpu", 1)
    assert state.memory.weight == pytest.approx(weight.sum())
    assert_close(state.mixture, emalgam.fit(x, 1, sample_weight=weight, **how).mixture, rtol=1e-10)


def test_a_tiny_first_batch_is_left_behind_by_the_first_large_one() -> None:
    rng = np.random.default_rng(0)
    estimator = emalgam.GaussianMixture(1).partial_fit(rng.normal(100, 1, size=(20, 2)))
    means = []
    for _ in range(3):
        means.append(estimator.partial_fit(rng.normal(size=(20_000, 2))).means_)
    assert np.abs(means).max() < 0.15  # 100 · 20 / 20 000
    # From there on the large batches are the measure: the next one does not take the place of the one before.
    memory = estimator._running.memory
    assert memory.gamma(20_000.0) == pytest.approx((3 + 2) ** -0.6, rel=1e-3)


def test_parameters_from_elsewhere_count_as_much_as_the_first_batch() -> None:
    x = np.ones((10, 1)) * [[4.0]] + np.random.default_rng(0).normal(size=(10, 1))
    for rows in (10, 5):
        found = emalgam.GaussianMixture.from_parameters([1.0], [[0.0]], [[[1.0]]]).partial_fit(x[:rows])
        assert found.means_[0, 0] == pytest.approx(3**-0.6 * x[:rows].mean())


@pytest.mark.parametrize("unit", [1e-300, 1e-12, 1e200, 1e305, 8e307])
def test_only_ratios_of_weights_matter(unit: float) -> None:
    x = blobs(9000)[0]
    weight = np.random.default_rng(0).uniform(0.5, 2, 9000)
    found = []
    for omega in (weight, unit * weight):
        estimator = emalgam.GaussianMixture(3, random_state=0).fit(x[:3000], sample_weight=omega[:3000])
        estimator.partial_fit(x[3000:8000], sample_weight=omega[3000:8000])
        found.append(estimator.partial_fit(x[8000:], sample_weight=omega[8000:]).mixture_)
    assert_close(found[1], found[0], rtol=1e-9)


def test_batches_whose_weights_are_powers_apart() -> None:
    """One of nearly all the weight, or of nearly none, whichever comes first."""
    light, heavy = (64.0, 2.0**-900), (64.0, 2.0**900)  # Σ ω times a power of two, and that power
    memory = Memory(0.6, 2.0, light[0], light[0], light[1])
    assert memory.gamma(*heavy) == pytest.approx(0.0, abs=1e-300)
    assert memory.after(*heavy) == memory
    memory = Memory(0.6, 2.0, heavy[0], heavy[0], heavy[1])
    assert memory.gamma(*light) == 1.0
    assert memory.after(*light) == Memory(0.6, 2.0, *light[:1], *light)


# ---- the guard


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("far", [1e8, 1e9])
def test_keeps_the_digits_of_components_far_from_each_other(covariance_type: str, far: float) -> None:
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(0, 1, (5000, 2)), rng.normal(far, 1, (5000, 2))])
    rng.shuffle(z)
    how: dict[str, Any] = {"covariance_type": covariance_type, "reg_covar": 0, "random_state": 0}
    whole = emalgam.GaussianMixture(2, **how).fit(z)
    for algorithm in ("auto", "direct"):
        estimator = emalgam.GaussianMixture(2, algorithm=algorithm, **how)
        for _ in range(3):
            estimator.partial_fit(z)
        # x itself has an ulp of far · 1e-16
        np.testing.assert_allclose(estimator.covariances_, whole.covariances_, rtol=1e-6, atol=1e-6)
        assert estimator.score(z) == pytest.approx(whole.score(z), abs=1e-6)
        assert (estimator.algorithm_, estimator.arithmetic_) == ("direct", "float64")
    assert emalgam.fit_stepwise(iter([z]), 2, batch_rows=2000, **how).algorithm == "direct"


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_and_direct_steps_agree(backend: str, covariance_type: str, weighted: bool) -> None:
    x = blobs(3000)[0]
    weight = np.random.default_rng(0).uniform(0, 2, 3000) if weighted else np.ones(3000)
    found = []
    for algorithm in ("packed", "direct"):
        estimator = emalgam.GaussianMixture(
            3, covariance_type=covariance_type, algorithm=algorithm, random_state=0, backend=backend
        )
        for batch in (slice(0, 1500), slice(1500, 2400), slice(2400, 3000)):
            estimator.partial_fit(x[batch], sample_weight=weight[batch])
        assert (estimator.algorithm_, estimator.backend_) == (algorithm, backend)
        found.append(estimator.mixture_)
    assert_close(found[0], found[1], rtol=1e-8)


def test_the_guard_looks_before_every_step() -> None:
    """Components drift apart from step to step, and packed becomes direct."""
    x = blobs(4000)[0]
    estimator = emalgam.GaussianMixture(2, random_state=0).partial_fit(x)
    assert estimator.partial_fit(x).algorithm_ == "packed"
    estimator.means_ = estimator.means_ * 1e7
    estimator.partial_fit(x * 1e7)
    assert estimator.algorithm_ == "direct"


@pytest.mark.parametrize(("feature_map", "n"), [("full", 6), ("diag", 3), ("spherical", 1)])
def test_moments_about_other_centres(feature_map: str, n: int) -> None:
    rng = np.random.default_rng(0)
    z, r, centres = rng.normal(size=(50, 3)), rng.uniform(size=(50, 2)), rng.normal(size=(2, 3)) * 5
    r[:, 1] = 0

    def about(a: np.ndarray) -> np.ndarray:
        return np.stack([r[:, k] @ features(z - a[k], feature_map) for k in range(2)])

    old = Moments.of(about(np.ones((2, 3))), np.ones((2, 3)))
    assert old.second.shape == (2, n)
    np.testing.assert_allclose(old.about(centres, feature_map).statistics, about(centres), rtol=1e-12, atol=1e-12)


# ---- settings that change


@pytest.mark.parametrize("covariance_type", TYPES)
def test_later_steps_honour_reg_covar(covariance_type: str) -> None:
    x = blobs(3000)[0]
    plain, changed = (
        emalgam.GaussianMixture(2, covariance_type=covariance_type, random_state=0).partial_fit(x[:1000])
        for _ in range(2)
    )
    plain.partial_fit(x[1000:2000])
    changed.set_params(reg_covar=100.0).partial_fit(x[1000:2000])
    covariance, size = COVARIANCES[covariance_type], plain.means_.shape
    for each, added in ((plain, 0.0), (changed, 100.0)):
        diagonals = covariance.diagonals(each.covariances_, *size) - added
        np.testing.assert_allclose(diagonals, covariance.diagonals(plain.covariances_, *size), rtol=1e-4)
    # It is added to the covariances, not to what is remembered.
    np.testing.assert_allclose(changed._running.statistics, plain._running.statistics, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["packed", "direct"])
def test_later_steps_honour_on_degenerate_error(algorithm: str) -> None:
    x = blobs(3000)[0]
    estimator = emalgam.GaussianMixture(2, random_state=0, algorithm=algorithm).partial_fit(x)
    estimator.set_params(on_degenerate="error").partial_fit(x)
    kept = []

    def shrink() -> None:
        for _ in range(200):
            kept[:] = [estimator.means_, estimator.n_iter_]
            estimator.partial_fit(np.ones((3000, 3)))

    with pytest.raises(emalgam.DegenerateComponentError, match=r"component \d collapsed in iteration \d+: its data"):
        shrink()
    assert estimator.means_ is kept[0]
    assert estimator.n_iter_ == kept[1]
    collapsing = iter([x, *[np.ones((3000, 3))] * 200])
    with pytest.raises(emalgam.DegenerateComponentError):
        emalgam.fit_stepwise(collapsing, 2, batch_rows=3000, random_state=0, on_degenerate="error")


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_later_steps_honour_on_degenerate_reseed(covariance_type: str) -> None:
    """A component that has shrunk to a point starts again at a row of the batch, and its statistics with it."""
    x = blobs(3000)[0]
    mixture = emalgam.fit(x, 2, covariance_type=covariance_type, random_state=0).mixture
    covariances = mixture.covariances.copy()
    covariances[0] *= 1e-9
    how: dict[str, Any] = {"covariance_type": covariance_type, "random_state": 0, "reg_covar": 0.0}
    estimators = [
        emalgam.GaussianMixture.from_parameters(mixture.weights, mixture.means, covariances, **how, on_degenerate=each)
        for each in ("regularize", "reseed", "reseed")
    ]
    for estimator in estimators:
        estimator.partial_fit(x)
    kept, found, again = estimators
    np.testing.assert_array_equal(again.means_, found.means_)
    assert (x == found.means_[0]).all(axis=1).any()
    assert not (x == kept.means_[0]).all(axis=1).any()
    weights = np.array([0.5, kept.weights_[1]])
    np.testing.assert_allclose(found.weights_, weights / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.means_[1], kept.means_[1], rtol=1e-12)
    # What is remembered is what the mixture is: unregularized, another M-step on it changes nothing.
    state = found._running
    assert state.reseeds_left == 19
    assert_close(state._maximize(state.origin, UNREGULARIZED).mixture, found.mixture_, rtol=1e-9)
    shrunk = emalgam.Mixture(found.weights_, found.means_, covariances, covariance_type)
    second = Running.of(shrunk, Memory.of(3000.0))
    settings = Settings(2, covariance_type, reg_covar=0.0, random_state=0, on_degenerate="reseed")
    rows = {
        tuple(replace(second, steps=steps).step(x, None, settings, "reference", 1)[0].mixture.means[0])
        for steps in range(4)
    }
    assert len(rows) == 4, "every step draws numbers of its own"
    # Ten times as often as there are components, over all steps; then it regularizes.
    spent, _ = replace(second, reseeds_left=0).step(x, None, settings, "reference", 1)
    regularized, _ = second.step(x, None, replace(settings, on_degenerate="regularize"), "reference", 1)
    assert_close(spent.mixture, regularized.mixture, rtol=1e-12)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_an_empty_component_starts_again(covariance_type: str) -> None:
    x = blobs(3000)[0]
    mixture = emalgam.fit(x, 2, covariance_type=covariance_type, random_state=0).mixture
    how: dict[str, Any] = {"covariance_type": covariance_type, "reg_covar": 0.0, "random_state": 0}
    estimator = emalgam.GaussianMixture.from_parameters(
        [0.0, 1.0], mixture.means, mixture.covariances, on_degenerate="reseed", **how
    ).partial_fit(x)
    np.testing.assert_allclose(estimator.weights_, [1 / 3, 2 / 3], rtol=1e-12)
    state = estimator._running
    assert_close(state._maximize(state.origin, UNREGULARIZED).mixture, estimator.mixture_, rtol=1e-9)
    before = estimator.score(x)
    for _ in range(5):
        estimator.partial_fit(x)
    assert estimator.score(x) > before
    assert estimator.weights_.min() > 0.01


def test_nobodys_generator_is_touched_where_nothing_is_drawn() -> None:
    x, state = blobs(2000)[0], np.random.RandomState(0)
    estimator = emalgam.GaussianMixture(2, random_state=state).partial_fit(x)
    before = state.get_state()[2]  # how many of its words have been drawn
    assert estimator.partial_fit(x).n_iter_ == 1
    assert state.get_state()[2] == before
    estimator.set_params(on_degenerate="reseed").partial_fit(x)
    assert state.get_state()[2] != before


def test_precision() -> None:
    """Under "mixed" the fit of the first batch has passes in float32; steps are in float64, and TF32 is refused."""
    x = blobs(4000)[0] + np.random.default_rng(0).normal(size=(4000, 3)) * 2
    estimator = emalgam.GaussianMixture(4, precision="mixed", random_state=0, tol=1e-6, max_iter=1000).partial_fit(x)
    assert estimator.float32_iterations_ > 0
    estimator.partial_fit(x)
    assert (estimator.arithmetic_, estimator.float32_iterations_) == ("float64", 0)
    refused = "precision is 'tf32', and the steps of stepwise EM compute in float64; expected 'strict', or 'mixed'"
    for each in (estimator, emalgam.GaussianMixture(4)):
        with pytest.raises(ValueError, match=re.escape(refused)):
            each.set_params(precision="tf32").partial_fit(x.astype(np.float32))


# ---- parameters that somebody has set


def test_partial_fit_goes_on_from_what_was_set() -> None:
    x = blobs(3000)[0]
    estimator = emalgam.GaussianMixture(2, random_state=0).partial_fit(x).partial_fit(x)
    means = estimator.means_ + 3.0
    estimator.means_ = means
    estimator.partial_fit(x[:1])  # one row beside 6000
    np.testing.assert_allclose(estimator.means_, means, atol=0.02)
    assert estimator.n_iter_ == 1
    by_hand = emalgam.GaussianMixture(2)
    for name in ("weights_", "means_", "precisions_cholesky_"):
        setattr(by_hand, name, getattr(estimator, name))
    expected = emalgam.GaussianMixture.from_parameters(estimator.weights_, estimator.means_, estimator.covariances_)
    assert_close(by_hand.partial_fit(x).mixture_, expected.partial_fit(x).mixture_, rtol=1e-9)


def test_whole_numbers_give_parameters_that_are_not() -> None:
    x = np.random.default_rng(0).integers(0, 50, (500, 2))
    estimator = emalgam.GaussianMixture(1).partial_fit(x)
    np.testing.assert_allclose(estimator.means_[0], x.mean(axis=0))
    assert estimator.partial_fit(x).means_.dtype == np.float64


def test_what_ran_is_said_after_every_step() -> None:
    x = blobs(3000)[0]
    estimator = emalgam.GaussianMixture.from_parameters([1.0], [[0.0] * 3], [np.eye(3)], backend="reference")
    estimator.partial_fit(x)
    assert (estimator.backend_, estimator.algorithm_, estimator.effective_components_) == ("reference", "packed", 1)
    assert estimator.lower_bounds_ == [estimator.lower_bound_]
    assert not estimator.converged_


def test_weights_count_rows_twice_or_not_at_all() -> None:
    x, weight = blobs(4000)[0], np.tile([1.0, 2.0, 0.0, 1.0], 1000)
    state = Running.of(emalgam.fit(x[:500], 3, random_state=0).mixture, Memory.of(500.0))
    repeated = np.repeat(x, weight.astype(int), axis=0)
    moved = [state.step(rows, omega, Settings(3), "cython_cpu", 1) for rows, omega in ((x, weight), (repeated, None))]
    assert moved[0][1] == pytest.approx(moved[1][1], rel=1e-12)
    np.testing.assert_allclose(moved[0][0].mixture.covariances, moved[1][0].mixture.covariances, rtol=1e-9, atol=1e-12)


def test_weights_of_chunks() -> None:
    x = blobs(40_000)[0]
    weight = np.ones(40_000)
    weight[1::2] = 0
    pairs = ((x[begin : begin + 999], weight[begin : begin + 999]) for begin in range(0, 40_000, 999))
    found = emalgam.fit_stepwise(pairs, 4, random_state=0, batch_rows=2000)
    assert found.mixture.log_prob(x).mean() == pytest.approx(
        emalgam.fit(x, 4, random_state=0).mixture.log_prob(x).mean(), rel=0.01
    )


def test_arrays_paths_and_functions_pass_once_too(tmp_path: Path) -> None:
    x = blobs(5000)[0]
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "folder").mkdir()
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    frame.to_parquet(tmp_path / "folder" / "0.parquet")
    how: dict[str, Any] = {"random_state": 0, "batch_rows": 1000}
    expected = emalgam.fit_stepwise(iter([x]), 2, **how).mixture.means
    for given in (x, frame, str(tmp_path / "folder"), tmp_path / "x.npy", lambda: iter([x])):
        np.testing.assert_array_equal(emalgam.fit_stepwise(given, 2, **how).mixture.means, expected)
    with pytest.raises(ValueError, match="a int can be gone through once or not at all"):
        emalgam.fit_stepwise(7, 2)
    for whole in (str(tmp_path / "folder"), emalgam.open_stream(x)):
        with pytest.raises(ValueError, match=r"partial_fit takes one batch in memory; emalgam\.fit_stepwise"):
            emalgam.GaussianMixture(2).partial_fit(whole)


def test_batches_without_weight_change_nothing() -> None:
    x, weight = blobs(6000)[0], np.ones(6000)
    weight[4000:5000] = 0
    spans = [slice(begin, begin + 1000) for begin in range(0, 6000, 1000)]
    kept = [span for span in spans if weight[span].any()]
    how: dict[str, Any] = {"random_state": 0, "batch_rows": 1000}
    found, expected = (
        emalgam.fit_stepwise(((x[span], weight[span]) for span in some), 2, **how) for some in (spans, kept)
    )
    assert (found.n_iter, found.lower_bounds) == (expected.n_iter, expected.lower_bounds)
    np.testing.assert_array_equal(found.mixture.means, expected.mixture.means)
    estimator = emalgam.GaussianMixture(2, random_state=0).partial_fit(x[:4000]).partial_fit(x[:1000])
    before = estimator.means_, estimator.n_iter_, estimator.lower_bound_
    estimator.partial_fit(x[spans[4]], sample_weight=weight[spans[4]])
    assert (estimator.n_iter_, estimator.lower_bound_) == before[1:]
    np.testing.assert_array_equal(estimator.means_, before[0])
    with pytest.raises(ValueError, match="sample_weight is zero for every sample"):
        emalgam.fit_stepwise([(x, np.zeros(len(x)))], 2)
    with pytest.raises(ValueError, match="sample_weight is zero for every sample"):
        emalgam.GaussianMixture(2).partial_fit(x, sample_weight=np.zeros(len(x)))


@pytest.mark.parametrize(
    ("chunks", "arguments", "message"),
    [
        ([], {}, "the stream has no rows"),
        ([np.zeros((3, 2))], {"kappa": 0.5}, "kappa is 0.5; expected a number above 0.5, up to 1"),
        ([np.zeros((3, 2))], {"kappa": 1.5}, "kappa is 1.5"),
        ([np.zeros((3, 2))], {"t_0": -1}, "t_0 is -1"),
        ([np.zeros((3, 2))], {"batch_rows": 0}, "batch_rows is 0"),
        ([np.zeros((3, 2))], {"covariance_type": "round"}, "covariance_type is 'round'"),
        ([np.random.default_rng(0).normal(size=(3000, 2)), np.full((9, 2), np.nan)], {}, "NaN at row 3000, column 0"),
        ([np.zeros((3, 2)), np.zeros((3, 4))], {}, "chunk 1 has 4 features; those before it have 2"),
    ],
)
def test_bad_input(chunks: list[np.ndarray], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        emalgam.fit_stepwise(iter(chunks), 2, **{"batch_rows": 1000} | arguments)


def test_bad_batches() -> None:
    x = blobs(4000)[0]
    estimator = emalgam.GaussianMixture(2, random_state=0).partial_fit(x)
    with pytest.raises(ValueError, match="X has 2 features"):
        estimator.partial_fit(x[:, :2])
    with pytest.raises(ValueError, match="contains NaN at row 0"):
        estimator.partial_fit(np.full((4, 3), np.nan))
    estimator.n_components = 3
    with pytest.raises(ValueError, match="n_components is 3; the batches before had 2"):
        estimator.partial_fit(x)
    estimator.set_params(n_components=2, covariance_type="diag")
    with pytest.raises(ValueError, match="covariance_type is 'diag'; the batches before had 'full'"):
        estimator.partial_fit(x)
