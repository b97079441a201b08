"""Streams that pass once: stepwise EM against full EM, and batch by batch through the estimator."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import emalgam
from emalgam.covariance import COVARIANCES
from emalgam.stepwise import Running
from tests.samples import blobs

TYPES = tuple(COVARIANCES)


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
    state = Running.of(estimator.mixture_, 0.0, kappa=1.0, t_0=1.0)  # γ₁ = 1/2
    moved, bound = state.step(x[1000:], None, "reference", 1)
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
    again = Running.of(mixture, 0.0)
    components = again._maximize()
    found = emalgam.Mixture.from_components(components, again.origin.frame, mixture.covariance)
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(found, name), getattr(mixture, name), rtol=1e-9, atol=1e-11)


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


def test_weights_count_rows_twice_or_not_at_all() -> None:
    x, weight = blobs(4000)[0], np.tile([1.0, 2.0, 0.0, 1.0], 1000)
    state = Running.of(emalgam.fit(x[:500], 3, random_state=0).mixture, "auto")
    repeated = np.repeat(x, weight.astype(int), axis=0)
    moved = [state.step(rows, omega, "cython_cpu", 1) for rows, omega in ((x, weight), (repeated, None))]
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
