"""Many fits through the public layer: every form of the data, the result as a sequence, and bad input."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest

import emalgam
from emalgam import batch
from emalgam import problems as forms
from emalgam.batch import ManyFits
from emalgam_kernels.batch import COVARIANCE_TYPES, Status
from tests import oracles
from tests.tolerances import STANDARD_ERRORS

SAME = ("n_components", "weights", "means", "covariances", "log_likelihood", "n_iter", "converged", "status")


def clusters(B: int = 12, N: int = 60, D: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, N, D)) + 9.0 * rng.integers(0, 2, (B, N, 1))


def fit(X: Any, n_components: Any = 2, **arguments: Any) -> ManyFits:
    return emalgam.fit_many(X, n_components, **{"random_state": 0} | arguments)


def assert_same(first: ManyFits, second: ManyFits) -> None:
    for name in SAME:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


# ---- forms of the data


def test_forms_agree() -> None:
    X = clusters()
    whole = fit(X)
    rows = X.reshape(-1, 2)
    assert_same(fit(list(X)), whole)
    assert_same(fit(tuple(X)), whole)
    assert_same(fit(rows, offsets=np.arange(13) * 60), whole)
    names = np.array([f"s{b:02}" for b in range(12)])
    grouped = fit(rows, groups=np.repeat(names, 60))
    assert_same(grouped, whole)
    np.testing.assert_array_equal(grouped.groups, names)


def test_groups_in_any_order() -> None:
    X = clusters()
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(12) * 7 - 30, 60))
    rows = np.empty((720, 2))
    for b, label in enumerate(np.arange(12) * 7 - 30):
        rows[labels == label] = X[b]
    grouped = fit(rows, groups=labels)
    assert_same(grouped, fit(X))
    np.testing.assert_array_equal(grouped.score_samples(rows, groups=labels)[labels == -30], fit(X).score_samples(X)[0])


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    X, integers = clusters(), np.round(clusters() * 10).astype(np.int32)
    whole, of_list, of_integers = fit(X), fit(list(X)), fit(integers)
    predicted = whole.predict(X)
    monkeypatch.setattr("emalgam.batch.PROBLEMS_AT_ONCE", 5)
    monkeypatch.setattr(forms, "ELEMENTS_OF_A_SLICE", 250)
    assert_same(fit(X), whole)
    assert_same(fit(list(X)), of_list)
    assert_same(fit(integers), of_integers)
    np.testing.assert_array_equal(whole.predict(X), predicted)
    np.testing.assert_array_equal(whole.predict(list(X)), predicted.reshape(-1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int16", "uint8", ">f8", "bool"])
def test_real_types(dtype: str) -> None:
    X = np.abs(clusters()).astype(dtype)
    assert_same(fit(X), fit(X.astype(np.float64)))


def test_strides_and_memory_maps(tmp_path: Any) -> None:
    X = clusters()
    wide = np.zeros((12, 120, 4))
    wide[:, ::2, ::2] = X
    assert_same(fit(wide[:, ::2, ::2]), fit(X))
    np.save(tmp_path / "X.npy", X)
    assert_same(fit(np.load(tmp_path / "X.npy", mmap_mode="r")), fit(X))


def test_weights_in_every_form() -> None:
    X, weight = clusters(), np.random.default_rng(3).integers(0, 3, (12, 60)).astype(float)
    whole = fit(X, sample_weight=weight)
    assert_same(fit(list(X), sample_weight=list(weight)), whole)
    assert_same(fit(X.reshape(-1, 2), offsets=np.arange(13) * 60, sample_weight=weight.reshape(-1)), whole)
    np.testing.assert_array_equal(whole.total_weight, weight.sum(axis=1))
    assert not np.array_equal(whole.means, fit(X).means)


def test_weights_count_as_repetitions_in_the_choice_of_components() -> None:
    X = np.random.default_rng(3).normal(size=(10, 60, 2))
    twice = fit(np.concatenate([X, X], axis=1), 1, criterion="bic")
    weighted = fit(X, 1, sample_weight=np.full((10, 60), 2.0), criterion="bic")
    np.testing.assert_allclose(weighted.bic, twice.bic, rtol=1e-9)
    most = fit(X, range(1, 4), sample_weight=np.full((10, 60), 1 / 60))
    assert (most.n_components == 3).mean() > 0.5, "log of a total weight of one punishes no parameter"
    assert (fit(X, range(1, 4)).n_components == 1).mean() > 0.5


def test_some_problems_with_the_numbers_they_have_among_all() -> None:
    rng = np.random.default_rng(6)
    X = rng.normal(size=(12, 40, 2))  # without clusters the start decides
    whole = fit(X, 3)
    assert_same(fit(X[4:9], 3, numbers=np.arange(4, 9)), whole[4:9])
    assert_same(fit(X[::-1], 3, numbers=range(11, -1, -1)), whole[::-1])
    assert not np.array_equal(fit(X[4:9], 3).means, whole[4:9].means)


def test_no_problems_at_all() -> None:
    none = fit(np.empty((0, 5, 2)))
    assert len(none) == 0
    assert none.means.shape == (0, 2, 2)
    assert list(none) == []
    assert none.score_samples(np.empty((0, 5, 2))).shape == (0, 5)


# ---- the result


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_a_problem_is_an_estimator(covariance_type: str) -> None:
    X = clusters()
    fits = fit(X, range(1, 4), covariance_type=covariance_type)
    for b in (0, -1):
        estimator = fits[b]
        assert isinstance(estimator, emalgam.GaussianMixture)
        assert estimator.n_components == fits.n_components[b]
        assert estimator.bic(X[b]) == pytest.approx(fits.bic[b], rel=1e-10)
        assert estimator.aic(X[b]) == pytest.approx(fits.aic[b], rel=1e-10)
        assert estimator.score(X[b]) * 60 == pytest.approx(fits.log_likelihood[b], rel=1e-10)
        np.testing.assert_allclose(fits.score_samples(X)[b], estimator.score_samples(X[b]), atol=1e-9)
        np.testing.assert_array_equal(fits.predict(X)[b], estimator.predict(X[b]))
    np.testing.assert_allclose(fits.score(X), fits.log_likelihood / 60, rtol=1e-10)
    assert len(list(fits)) == len(fits) == 12


def test_icl_adds_the_entropy_twice() -> None:
    X = clusters()
    fits = fit(X, 3, criterion="icl")
    r = fits[4].predict_proba(X[4])
    entropy = -(r * np.log(np.maximum(r, 1e-300))).sum()
    assert fits.icl[4] - fits.bic[4] == pytest.approx(2 * entropy, rel=1e-6)


def test_parts_of_a_result() -> None:
    X = clusters()
    fits = fit(X)
    np.testing.assert_array_equal(fits[3:7].means, fits.means[3:7])
    np.testing.assert_array_equal(fits[fits.converged].score(X[fits.converged]), fits.score(X)[fits.converged])
    np.testing.assert_array_equal(fits[np.array(3)].means_, fits[3].means_)
    for wrong in ("g3", 1.5, (1, 2), np.array([[1, 2]]), [[1, 2]]):
        with pytest.raises(
            TypeError, match=r"expected an integer, a slice, or indices .*\(of a group: fits\.groups =="
        ):
            fits[wrong]
    with pytest.raises(IndexError, match="there is no problem 12; there are 12"):
        fits[12]
    assert repr(fits[:3]) == "<ManyFits of 3 mixtures, full, K <= 2, D = 2: 3 fine>"


@pytest.mark.parametrize("kind", [str, int])
def test_groups_find_their_mixtures_in_any_order(kind: type, tmp_path: Any) -> None:
    X = clusters()
    labels = np.arange(10, 22).astype(kind)
    fits = fit(X.reshape(-1, 2), groups=np.repeat(labels, 60))
    some = fits[np.array([7, 2, 9])]
    rows, groups = X[[9, 2]].reshape(-1, 2), np.repeat(labels[[9, 2]], 60)
    np.testing.assert_array_equal(some.score(rows, groups=groups), fits.score(X)[[2, 9]])
    with pytest.raises(ValueError, match=f"groups contains {kind(13)!r}, for which there was no fit"):
        some.predict(X[3], groups=np.full(60, kind(13)))
    other = {str: int, int: str}[kind]
    with pytest.raises(ValueError, match=f"of type {other.__name__}, and those of the fits are of type"):
        some.predict(X[3], groups=np.full(60, other(13)))
    with pytest.raises(ValueError, match="for which there was no fit"):
        fits[:0].predict(X[3], groups=np.full(60, kind(13)))
    twice = fits[np.array([4, 4])]
    np.testing.assert_array_equal(twice.score(X[4], groups=np.full(60, labels[4])), fits.score(X)[4:5])
    with pytest.raises(ValueError, match=f"groups holds {kind(14)!r} twice"):
        twice.save(tmp_path / "fits.parquet")


def test_samples_follow_their_mixtures() -> None:
    fits = fit(clusters(), range(1, 4), covariance_type="full")
    x, labels = fits.sample(4000, random_state=5)
    assert x.shape == (12, 4000, 2)
    for b in range(12):
        mixture = fits.mixture(b)
        expected = np.bincount(labels[b], minlength=mixture.n_components) / 4000
        error = np.sqrt(mixture.weights * (1 - mixture.weights) / 4000)
        assert (np.abs(expected - mixture.weights) <= STANDARD_ERRORS * error).all()
        for k in range(mixture.n_components):
            rows = x[b][labels[b] == k]
            deviation = np.sqrt(np.diag(mixture.covariances[k]) / len(rows))
            assert (np.abs(rows.mean(axis=0) - mixture.means[k]) <= STANDARD_ERRORS * deviation).all()
    np.testing.assert_array_equal(fits.sample(4000, random_state=5)[0], x)
    assert len(np.unique(x[:, 0, 0])) == 12


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_samples_of_every_covariance_type(covariance_type: str) -> None:
    X = clusters(3, 200, 3)
    fits = fit(X, 1, covariance_type=covariance_type)
    x, _ = fits.sample(20_000, random_state=1)
    whole = oracles.full_covariances(
        oracles.Gaussians(fits.weights[1], fits.means[1], fits.covariances[1], covariance_type)
    )[0].astype(float)
    found = np.cov(x[1].T)
    error = np.sqrt((np.outer(np.diag(whole), np.diag(whole)) + whole**2) / 20_000)
    assert (np.abs(found - whole) <= STANDARD_ERRORS * error).all()


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_samples_do_not_depend_on_how_many_are_drawn_at_once(
    covariance_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = fit(clusters(5, 80, 3), covariance_type=covariance_type)
    x, labels = fits.sample(50, random_state=1)
    for most in (1, 100, 700, 2000):
        monkeypatch.setattr(batch, "NUMBERS_AT_ONCE", most)
        again = fits.sample(50, random_state=1)
        np.testing.assert_array_equal(again[1], labels)
        np.testing.assert_array_equal(again[0], x)


def test_sampling_takes_little_memory_beside_the_samples() -> None:
    fits = fit(clusters(1, 400, 16))
    tracemalloc.start()
    try:
        x, labels = fits.sample(20_000, random_state=0)
        extra = tracemalloc.get_traced_memory()[1] - x.nbytes - labels.nbytes
    finally:
        tracemalloc.stop()
    assert extra < 16e6, f"{extra / 1e6:.0f} MB; a factor for each sample takes 41 MB"


def test_a_stack_of_mixtures_for_divergences() -> None:
    fits = fit(clusters())
    divergences = emalgam.kl_variational(fits[:3], fits[3:6])
    assert np.shape(divergences) == (3,)
    assert divergences[1] == pytest.approx(float(emalgam.kl_variational(fits[1], fits[4])), rel=1e-12)


# ---- data frames


def frame() -> pd.DataFrame:
    X = clusters(4)
    labels = np.repeat(["a", "b", "c", "d"], 60)
    return pd.DataFrame({"x": X[..., 0].ravel(), "g": labels, "y": X[..., 1].ravel(), "w": np.arange(240.0)})


def test_columns_of_a_data_frame_by_name() -> None:
    table = frame()
    x, labels = table[["x", "y"]].to_numpy(), table["g"].to_numpy()
    assert_same(fit(table.drop(columns="w"), groups="g"), fit(x, groups=labels))
    weighted = fit(table, groups="g", sample_weight="w")
    assert_same(weighted, fit(x, groups=labels, sample_weight=table["w"]))
    assert weighted.groups is not None
    assert weighted.groups.tolist() == ["a", "b", "c", "d"]
    part = table.drop(columns="w").iloc[:60]
    np.testing.assert_array_equal(weighted.predict(part, groups="g"), weighted.predict(x[:60], groups=labels[:60]))
    with pytest.raises(ValueError, match="there is no column 'z'; the columns are x, g, y, w; expected a column"):
        fit(table, groups="z")
    with pytest.raises(ValueError, match="there is no column 'g'; X is a ndarray"):
        fit(x, groups="g")


def test_nullable_columns() -> None:
    table = frame()
    nullable = table.convert_dtypes()
    assert_same(fit(nullable[["x", "y"]], groups=nullable["g"]), fit(table[["x", "y"]], groups=table["g"]))
    nullable.loc[5, "x"] = pd.NA
    assert fit(nullable[["x", "y"]], groups=table["g"]).status.tolist() == [Status.NOT_FINITE, 0, 0, 0]
    nullable.loc[7, "g"] = pd.NA
    for labels in (nullable["g"], nullable["g"].astype(object), pd.Series(nullable["g"].tolist(), dtype="string")):
        with pytest.raises(ValueError, match=r"groups contains .* at row 7; expected a label for each row"):
            fit(table[["x", "y"]], groups=labels)
    with pytest.raises(ValueError, match="of real numbers"):
        fit(nullable[["x", "g"]], groups=table["g"])


def test_times_with_a_zone_are_labels(tmp_path: Any) -> None:
    times = pd.Series(pd.date_range("2026-03-01", periods=4, tz="Europe/Berlin").repeat(60))
    x = clusters(4).reshape(-1, 2)
    fits = fit(x, groups=times)
    fits.save(tmp_path / "fits.parquet")
    loaded = emalgam.load_fits(tmp_path / "fits.parquet")
    np.testing.assert_array_equal(loaded.score(x, groups=times), fits.score(x, groups=times))
    assert np.isfinite(fits.score(x, groups=times)).all()


# ---- problems that go wrong


def test_bad_problems_say_why() -> None:
    X = list(clusters(5))
    X[1] = X[1].copy()
    X[1][7, 0] = np.nan
    X[3] = X[3][:1]
    fits = fit(X)
    np.testing.assert_array_equal(fits.status, [0, Status.NOT_FINITE, 0, Status.TOO_FEW_ROWS, 0])
    assert fits.message.tolist() == ["", "the samples hold NaN or infinity", "", fits.message[3], ""]
    with pytest.raises(ValueError, match="problem 1 has no mixture: the samples hold NaN or infinity"):
        fits[1]
    assert np.isnan(fits.bic[[1, 3]]).all()
    assert np.isfinite(fits.bic[[0, 2, 4]]).all()
    x, labels = fits.sample(3, random_state=0)
    assert np.isnan(x[1]).all()
    assert (labels[[1, 3]] == -1).all()
    scores = fits.score(X)
    np.testing.assert_array_equal(np.isnan(scores), [False, True, False, True, False])


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("scale", [1e-170, 1e-155, 1e155, 1e200])
def test_covariances_outside_float64_are_no_mixture(backend: str, covariance_type: str, scale: float) -> None:
    X = clusters(3)
    X[1] *= scale
    arguments: dict[str, Any] = {"covariance_type": covariance_type, "max_iter": 5, "tol": 0.0}
    fits = fit(X, backend=backend, **arguments)
    np.testing.assert_array_equal(fits.status == Status.OUT_OF_RANGE, [False, True, False])
    assert "leave the range of float64; scale the samples" in fits.message[1]
    assert fits.n_components.tolist() == [2, 0, 2]
    assert np.isnan(fits.covariances[1]).all()
    assert_same(fits[[0, 2]], fit(X[[0, 2]], backend=backend, numbers=[0, 2], **arguments))
    np.testing.assert_array_equal(np.isnan(fits.sample(4, random_state=0)[0]).any(axis=(1, 2)), [False, True, False])
    np.testing.assert_array_equal(np.isnan(fits.score(X)), [False, True, False])
    for reg_covar in (0.0, 1e-6):  # in units of the data squared, which may be infinite in the units of a fit
        status = fit(X, backend=backend, reg_covar=reg_covar, **arguments).status
        assert status[[0, 2]].max() <= Status.COLLAPSED
        assert status[1] in (Status.NO_LIKELIHOOD, Status.OUT_OF_RANGE)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_covariances_near_the_ends_of_float64_are_usable(scale: float) -> None:
    X = scale * clusters(3)
    fits = fit(X)
    assert (fits.status <= Status.COLLAPSED).all()
    assert np.isfinite(fits.score(X)).all()
    assert np.isfinite(fits.sample(4, random_state=0)[0]).all()


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("scale", [2.0**-1074, 1e-320, 1e-200, 1e200, 1e304])
def test_only_ratios_of_weights_matter_to_the_mixtures(backend: str, covariance_type: str, scale: float) -> None:
    """A problem with weights far from one, beside others; its rows in another order, too."""
    X, weight = clusters(3), np.ones((3, 60))
    plain = fit(X, sample_weight=weight, backend=backend, covariance_type=covariance_type)
    weight[1] *= scale
    fits = fit(X, sample_weight=weight, backend=backend, covariance_type=covariance_type)
    assert_same(fits[[0, 2]], plain[[0, 2]])
    np.testing.assert_array_equal(fits.status, plain.status)
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(fits, name), getattr(plain, name), rtol=1e-9, atol=1e-12, err_msg=name)
    units = 60 / 2**12 if scale < 1e-300 else 1e-9  # sums of the smallest numbers are rounded to whole ones
    np.testing.assert_allclose(fits.log_likelihood[1], plain.log_likelihood[1] * scale, rtol=units)
    np.testing.assert_array_equal(fits.total_weight, weight.sum(axis=1))
    order = np.random.default_rng(0).permutation(180)
    labels = np.repeat(np.arange(3), 60)[order]
    rows, omega = X.reshape(-1, 2)[order], weight.reshape(-1)[order]
    grouped = fit(rows, groups=labels, sample_weight=omega, backend=backend, covariance_type=covariance_type)
    np.testing.assert_array_equal(grouped.total_weight, fits.total_weight)
    assert (grouped.status <= Status.COLLAPSED).all()
    assert grouped.log_likelihood[1] / plain.log_likelihood[1] == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("criterion", ["bic", "aic", "icl"])
@pytest.mark.parametrize(("near", "far"), [(1e140, 1e300), (1e-140, 1e-305)])
def test_weights_however_far_from_one_choose_alike(criterion: str, near: float, far: float) -> None:
    X = clusters(6, N=40)
    chosen = [
        fit(X, range(1, 5), sample_weight=np.full((6, 40), scale), criterion=criterion).n_components
        for scale in (near, far)
    ]
    np.testing.assert_array_equal(*chosen)


def test_sums_over_weights_that_leave_float64_are_no_result(backend: str) -> None:
    X, weight = clusters(3), np.ones((3, 60))
    weight[1] = 1e308
    fits = fit(X, sample_weight=weight, backend=backend)
    np.testing.assert_array_equal(fits.status == Status.OUT_OF_RANGE, [False, True, False])
    assert fits.message[1].startswith("the covariances, or sums over the weights, leave the range of float64")
    assert "the weights" in fits.message[1]
    assert (fits.n_components[1], fits.total_weight[1]) == (0, np.inf)
    assert np.isnan(fits.means[1]).all()


@pytest.mark.parametrize("bad", [-5e-324, -1.0, np.nan, np.inf, -np.inf])
def test_bad_weights_among_the_largest_are_found(backend: str, bad: float) -> None:
    weight = np.full((1, 60), 1e307)
    weight[0, 7] = bad
    assert fit(clusters(1), sample_weight=weight, backend=backend).status.tolist() == [Status.BAD_WEIGHT]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (np.array([1j, 2.0]), "complex128"),
        (np.array([1j, 2 + 0j], dtype=object), "complex"),
        (np.array([{}, {"a": 1}]), "dict"),
        (np.array([(1, 2.0), (2, 3.0)], "i4,f8"), "f8"),
    ],
)
def test_labels_without_order_are_refused(labels: np.ndarray, kind: str) -> None:
    with pytest.raises(
        ValueError, match=f"groups has labels of type .*{kind}.*, which have no order; expected numbers"
    ):
        fit(clusters(1).reshape(-1, 2), groups=np.repeat(labels, 30))


def test_a_nan_weight_stays_in_its_problem() -> None:
    X, weight = clusters(3), np.ones((3, 60))
    weight[1, 5] = np.nan
    fits = fit(X, sample_weight=weight)
    np.testing.assert_array_equal(fits.status, [0, Status.BAD_WEIGHT, 0])
    np.testing.assert_array_equal(fits.total_weight[[0, 2]], 60)
    assert np.isfinite(fits.bic[[0, 2]]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"X": np.zeros((4, 2))}, "X has shape (4, 2) with neither groups nor offsets; expected an array (B, N, D)"),
        ({"X": np.zeros((4, 2)), "groups": np.zeros(3)}, "groups has shape (3,); expected one label per row: (4,)"),
        ({"X": np.zeros((4, 2)), "groups": [0, np.nan, 1, 1]}, "groups contains nan at row 1"),
        ({"X": np.zeros((4, 2)), "groups": np.array(["a", None, "b", "b"])}, "groups contains None at row 1"),
        ({"X": np.zeros((4, 2)), "groups": np.array([0, np.nan, 1, 1], object)}, "groups contains nan at row 1"),
        ({"X": np.zeros((4, 2)), "groups": np.array([0, "a", 1, 1], object)}, "groups has labels of types int, str"),
        ({"X": np.zeros((4, 2)), "groups": [1, "1", 1, 1]}, "groups has labels of types int, str"),
        ({"X": np.zeros((4, 2)), "groups": ("a", np.nan, "b", "b")}, "groups contains nan at row 1"),
        ({"X": np.zeros((4, 2)), "groups": [b"a", "a", b"b", b"b"]}, "groups has labels of types bytes, str"),
        (
            {"X": np.zeros((4, 2)), "offsets": [0, 3]},
            "offsets go from 0 to 3; expected numbers that never fall, from 0",
        ),
        ({"X": np.zeros((4, 2)), "offsets": [0, 3, 2, 4]}, "offsets go from 0 to 4, not always upwards"),
        ({"X": np.zeros((4, 2)), "offsets": [0.0, 4.0]}, "offsets has shape (2,) and dtype float64; expected integers"),
        ({"X": np.zeros((4, 2)), "groups": np.zeros(4), "offsets": [0, 4]}, "with groups and offsets"),
        ({"X": np.zeros((2, 4, 2)), "groups": np.zeros(2)}, "leave out groups and offsets"),
        ({"X": [np.zeros((4, 2))], "offsets": [0, 4]}, "X is a list of arrays, which says where problems begin"),
        ({"X": [np.zeros((4, 2)), np.zeros((4, 3))]}, "X is a list of 2 arrays of shapes (4, 2), (4, 3)"),
        ({"X": np.zeros((2, 4, 2), complex)}, "X has shape (2, 4, 2) and dtype complex128"),
        ({"X": np.zeros((2, 4, 0))}, "X has shape (2, 4, 0)"),
        ({"X": [np.zeros((4, 2))] * 2, "sample_weight": [None, np.ones(4)]}, "sample_weight[0] has shape () and dtype"),
        (
            {"X": [np.zeros((4, 2))] * 2, "sample_weight": 2.5},
            "sample_weight is 2.5; expected a list of 2 arrays (N_b,)",
        ),
        (
            {"X": [np.zeros((4, 2))] * 2, "sample_weight": np.ones(8)},
            "sample_weight has length 8; expected a list of 2",
        ),
        ({"X": np.zeros((2, 4, 2)), "sample_weight": np.ones(8)}, "sample_weight has shape (8,)"),
        ({"X": np.zeros((2, 4, 2)), "n_components": 0}, "n_components is 0; expected an integer >= 1"),
        ({"X": np.zeros((2, 4, 2)), "n_components": range(3)}, "n_components is range(0, 3)"),
        ({"X": np.zeros((2, 4, 2)), "n_components": range(1, 6, 2)}, "in steps of one"),
        ({"X": np.zeros((2, 4, 2)), "n_components": [1, 2, 3]}, "one integer >= 1 per problem: (2,)"),
        ({"X": np.zeros((2, 4, 2)), "criterion": "bayes"}, "criterion is 'bayes'; expected one of bic, aic, icl"),
        ({"X": np.zeros((2, 4, 2)), "covariance_type": "round"}, "covariance_type is 'round'"),
        ({"X": np.zeros((2, 4, 2)), "tol": -1}, "tol is -1"),
        ({"X": np.zeros((2, 4, 2)), "random_state": -1}, "random_state is -1"),
        (
            {"X": np.zeros((2, 4, 2)), "numbers": [0]},
            "numbers has shape (1,) and dtype int64; expected one",
        ),
        ({"X": np.zeros((2, 4, 2)), "numbers": [0, -1]}, "expected one integer >= 0 per problem: (2,)"),
        ({"X": np.zeros((2, 4, 2)), "backend": "fortran"}, "backend is 'fortran'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        emalgam.fit_many(**{"n_components": 2} | arguments)


def test_queries_that_do_not_fit() -> None:
    X = clusters()
    fits = fit(X)
    with pytest.raises(ValueError, match="X has 3 features; these mixtures have 2"):
        fits.predict(np.zeros((12, 5, 3)))
    with pytest.raises(ValueError, match="X holds 11 problems; there are 12 mixtures"):
        fits.predict(X[:11])
    grouped = fit(X.reshape(-1, 2), groups=np.repeat(np.arange(12), 60))
    np.testing.assert_array_equal(grouped.score(X[4], groups=np.full(60, 4)), fits.score(X)[4:5])
    with pytest.raises(ValueError, match="groups contains 99, for which there was no fit"):
        grouped.predict(X[4], groups=np.full(60, 99))


def test_progress_is_shown_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    fit(clusters(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "12/12" in err
    assert "fits/s" in err


def test_progress_is_told_in_steps_of_about_as_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    X, steps = clusters(40), []
    whole = fit(X, n_threads=1)
    assert_same(fit(X, n_threads=1, progress=steps.append), whole)
    assert steps == [40]
    monkeypatch.setattr(batch, "FLOP_AT_ONCE", 1)
    steps.clear()
    assert_same(fit(X, n_threads=1, progress=steps.append, backend="cython_cpu"), fit(X, backend="cython_cpu"))
    assert steps == [4] * 10
