"""GaussianMixture as scikit-learn's users use it."""

from __future__ import annotations

import pickle
import re
import warnings
from typing import Any

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Peer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from emalgam import BackendUnavailable, GaussianMixture, Mixture, open_stream
from tests.conftest import COVARIANCE_TYPES, Variant
from tests.samples import blobs, start


def fitted(variant: Variant | None = None, **arguments: object) -> tuple[GaussianMixture, np.ndarray]:
    x, _ = blobs(600)
    if variant is not None:
        x = x.astype(variant.dtype)
        arguments = {"covariance_type": variant.covariance_type, "backend": variant.backend, **arguments}
    return GaussianMixture(4, random_state=0, **arguments).fit(x), x


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_scikit_learn_checks(covariance_type: str) -> None:
    """check_estimator, sample weights included; nothing may fail, and what is skipped needs another library."""
    results = check_estimator(GaussianMixture(covariance_type=covariance_type), on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert not failed
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {"check_array_api_input"}
    assert any("sample_weight" in r["check_name"] for r in results)


def test_constructor_is_that_of_scikit_learn() -> None:
    """Same names and defaults, but for reg_covar; ours come after."""
    theirs, ours = Peer().get_params(), GaussianMixture().get_params()
    assert {name: ours[name] for name in theirs} == {**theirs, "reg_covar": "auto"}
    added = {
        "backend": "auto",
        "algorithm": "auto",
        "on_degenerate": "regularize",
        "n_threads": None,
        "precision": "strict",
    }
    assert {name: ours[name] for name in ours if name not in theirs} == added


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_attributes_and_methods_agree_with_scikit_learn(covariance_type: str, dtype: str) -> None:
    """Every public fitted attribute of the peer, with its type, dtype and shape; every method's result."""
    x, centres = blobs()
    x = x.astype(dtype)
    given = {name: value.astype(dtype) for name, value in start(centres, covariance_type).items()}
    arguments = {"covariance_type": covariance_type, "reg_covar": 1e-6, **given}
    ours, theirs = GaussianMixture(4, **arguments).fit(x), Peer(4, **arguments).fit(x)
    bound = {"float64": 1e-8, "float32": 2e-3}[dtype]  # float32: the peer's own arithmetic is float32 throughout
    for name, value in vars(theirs).items():
        if not name.endswith("_"):
            continue
        mine = getattr(ours, name)
        if isinstance(value, np.ndarray):  # the bounds are Python floats here, float32 scalars there
            assert mine.dtype == value.dtype, name
        np.testing.assert_allclose(mine, value, rtol=bound, atol=bound * np.abs(value).max(), err_msg=name)
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), atol=50 * bound, rtol=0)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=10 * bound, rtol=0)
    assert ours.predict_proba(x).dtype == theirs.predict_proba(x).dtype
    assert (ours.predict(x) != theirs.predict(x)).mean() <= {"float64": 0.0, "float32": 0.002}[dtype]
    assert (ours.fit_predict(x) != theirs.fit_predict(x)).mean() <= {"float64": 0.0, "float32": 0.002}[dtype]
    for method in ("score", "aic", "bic"):
        assert getattr(ours, method)(x) == pytest.approx(getattr(theirs, method)(x), rel=bound)


def test_extra_attributes_say_what_ran(variant: Variant) -> None:
    model, _ = fitted(variant)
    assert model.backend_ == variant.backend
    assert model.algorithm_ == "packed"
    assert model.arithmetic_ == variant.dtype
    assert 0 < model.error_bound_ <= {"float64": 1e-9, "float32": 1e-3}[variant.dtype]
    assert model.effective_components_ == 4
    assert len(model.lower_bounds_) == model.n_iter_
    assert model.lower_bounds_[-1] == model.lower_bound_
    assert isinstance(model.mixture_, Mixture)


def test_score_takes_weights() -> None:
    model, x = fitted()
    weight = np.random.default_rng(0).integers(0, 4, len(x))
    assert model.score(x, sample_weight=weight) == pytest.approx(model.score(np.repeat(x, weight, axis=0)))
    assert model.score(x, sample_weight=2.0) == pytest.approx(model.score(x))


@pytest.mark.parametrize("scale", [5e-324, 1e-320, 1e-200, 1e200, 1e308])
@pytest.mark.parametrize("cut", [None, 250], ids=["rows", "stream"])
def test_only_ratios_of_weights_matter_to_a_score(scale: float, cut: int | None) -> None:
    """However large or small they are: sums would overflow, or have hardly a digit."""
    x, _ = blobs(1000)
    omega = np.random.default_rng(0).integers(0, 2, len(x)).astype(float)
    model, weight = GaussianMixture(4, random_state=0).fit(x, sample_weight=omega), omega * scale
    expected = model.score(x, sample_weight=omega)
    assert model.fit(x, sample_weight=weight).score(x, sample_weight=omega) == pytest.approx(expected, rel=1e-12)
    given = (x, weight) if cut is None else (open_stream(x, sample_weight=weight, chunk_rows=cut), None)
    assert model.score(given[0], sample_weight=given[1]) == pytest.approx(expected, rel=1e-12)


def test_scores_of_chunks_whose_weights_lie_far_apart() -> None:
    """The chunk with the large weights decides, wherever it comes; chunks without weight do not."""
    model, x = fitted()
    expected = model.score(x[200:400])
    for scales in ([1e-320, 1e308, 1.0], [0.0, 5e-324, 0.0], [1.0, 1e300, 0.0], [0.0, 1e308, 5e-324]):
        stream = open_stream(x, sample_weight=np.repeat(scales, 200), chunk_rows=200)
        assert model.score(stream) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="zero for every sample"):
        model.score(open_stream(x, sample_weight=np.zeros(600), chunk_rows=200))


def test_bic_counts_the_weights_of_a_stream() -> None:
    model, x = fitted()
    for scale in (3.0, 1e-320, 1e300):
        stream = open_stream(x, sample_weight=np.full(600, scale), chunk_rows=250)
        penalty = model.mixture_.n_parameters * (np.log(600) + np.log(scale))
        bic = -2 * model.score(x) * 600 * scale + penalty
        assert model.bic(stream) == pytest.approx(bic, rel=1e-3 if scale < 1e-300 else 1e-12)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, r"sample_weight is -1\.0 at row 3; expected weights >= 0"),
        (np.nan, "sample_weight contains nan at row 3"),
        (1j, "sample_weight has shape .* and dtype complex128"),
    ],
)
def test_score_checks_weights_as_fit_does(value: complex, message: str) -> None:
    model, x = fitted()
    weight = np.ones(len(x), np.result_type(value, float))
    weight[3] = value
    for method in (model.fit, model.score):
        with pytest.raises(ValueError, match=message):
            method(x, sample_weight=weight)
        with pytest.raises(ValueError, match="zero for every sample"):
            method(x, sample_weight=np.zeros(len(x)))
        with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\)"):
            method(x, sample_weight=np.ones(3))


def test_pipeline_clone_search_and_pickle(variant: Variant) -> None:
    x, _ = blobs(300)
    x = x.astype(variant.dtype)
    model = GaussianMixture(
        2, covariance_type=variant.covariance_type, random_state=0, backend=variant.backend, tol=1e-2
    )
    assert clone(model).get_params() == model.get_params()
    pipeline = make_pipeline(StandardScaler(), clone(model)).fit(x)
    assert pipeline.predict(x).shape == (300,)
    search = GridSearchCV(clone(model), {"n_components": [1, 3]}, cv=2, n_jobs=1).fit(x)
    assert search.best_params_["n_components"] == 3
    copy = pickle.loads(pickle.dumps(model.fit(x)))
    np.testing.assert_array_equal(copy.predict_proba(x), model.predict_proba(x))


@pytest.mark.parametrize("prefer", ["processes", "threads"])
def test_joblib_workers(prefer: str) -> None:
    """Several fits side by side, in processes and in threads, give what one gives."""
    x, _ = blobs(3000)
    expected = GaussianMixture(3, random_state=0).fit(x)
    results = joblib.Parallel(n_jobs=2, prefer=prefer)(
        joblib.delayed(GaussianMixture(3, random_state=0).fit)(x) for _ in range(4)
    )
    assert all(result.lower_bounds_ == expected.lower_bounds_ for result in results)


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame])
def test_data_frames(library: type) -> None:
    x, _ = blobs(300)
    columns = ["a", "b", "c"]
    frame = pd.DataFrame(x, columns=columns) if library is pd.DataFrame else pl.DataFrame(x, schema=columns)
    model = GaussianMixture(3, random_state=0).fit(frame)
    assert model.feature_names_in_.tolist() == columns
    np.testing.assert_array_equal(model.predict(frame), GaussianMixture(3, random_state=0).fit(x).predict(x))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])


def test_integer_frames_are_not_converted_first() -> None:
    x = np.random.default_rng(0).integers(0, 255, (500, 3), dtype=np.uint8)
    model = GaussianMixture(2, random_state=0)
    assert model.fit(x)._read(x, reset=False) is x
    assert model.means_.dtype == np.float64


def test_warm_start_goes_on_where_it_stopped() -> None:
    x, centres = blobs()
    given = start(centres, "full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = GaussianMixture(4, tol=0.0, max_iter=8, **given).fit(x)
        parts = GaussianMixture(4, tol=0.0, max_iter=4, warm_start=True, **given).fit(x)
        first = list(parts.lower_bounds_)
        parts.fit(x)
    np.testing.assert_allclose(first + parts.lower_bounds_, whole.lower_bounds_, rtol=1e-12)
    np.testing.assert_allclose(parts.means_, whole.means_, rtol=1e-10)
    parts.set_params(n_components=3, **dict.fromkeys(given))
    with pytest.raises(ValueError, match=r"warm_start: the last fit has means of shape \(4, 3\)"):
        parts.fit(x)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_warm_start_begins_from_what_was_set(dtype: str) -> None:
    x, centres = blobs()
    x, how = x.astype(dtype), {"tol": 0.0, "max_iter": 1, "reg_covar": 1e-6, "warm_start": True}
    bound = {"float64": 1e-8, "float32": 2e-3}[dtype]
    models = [estimator(4, **how, **start(centres, "full")).fit(x) for estimator in (GaussianMixture, Peer)]
    for moved in (models[1].means_ + 3.0, models[1].means_.round().astype(int), models[1].means_[::-1].copy()):
        for model in models:
            model.means_ = moved
            model.fit(x)
        np.testing.assert_allclose(models[0].means_, models[1].means_, rtol=bound, atol=bound * 10)
        assert models[0].means_.dtype == dtype
    by_hand = GaussianMixture(4, **how)  # never fitted: a prediction between must change nothing
    for name in ("weights_", "means_", "precisions_cholesky_"):
        setattr(by_hand, name, getattr(models[0], name).copy())
    predicted = GaussianMixture(4, **how)
    predicted.__dict__.update(by_hand.__dict__)
    predicted.predict(x)
    np.testing.assert_array_equal(by_hand.fit(x).means_, predicted.fit(x).means_)
    np.testing.assert_allclose(by_hand.means_, models[0].fit(x).means_, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("x", "how"),
    [
        (np.full((5, 2), np.nan), {}),
        (pd.DataFrame(np.eye(3, 2), columns=["c", "d"]), {"n_components": 4}),
        (np.full((300, 2), "a"), {}),
        (np.eye(10, 2), {"warm_start": True}),
        (np.eye(10, 2), {"on_degenerate": "error", "reg_covar": 0.0, "n_components": 3}),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_fit_that_fails_leaves_the_last_one(x: Any, how: dict[str, Any], named: bool) -> None:
    rows = pd.DataFrame(blobs(300)[0], columns=["a", "b", "c"])
    data = rows if named else rows.to_numpy()
    model = GaussianMixture(2, random_state=0).fit(data)
    expected, before = model.predict(data), {**vars(model)}
    with pytest.raises(ValueError, match=r".+"):
        model.set_params(**how).fit(x)
    np.testing.assert_array_equal(model.set_params(n_components=2).predict(data), expected)
    assert model.n_features_in_ == 3
    assert hasattr(model, "feature_names_in_") == named
    assert vars(model).keys() == before.keys()
    never = GaussianMixture(**{"n_components": 2} | how, random_state=0)
    if "warm_start" not in how:
        with pytest.raises(ValueError, match=r".+"):
            never.fit(x)
        assert not hasattr(never, "n_features_in_")


def test_convergence_warning_is_scikit_learns() -> None:
    x, _ = blobs()
    with pytest.warns(ConvergenceWarning, match="did not converge in 1 iterations"):
        GaussianMixture(4, max_iter=1, tol=0.0, random_state=0).fit(x)


@pytest.mark.parametrize("verbose", [1, 2])
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_verbose_prints_what_scikit_learn_prints(verbose: int, tol: float, capsys: pytest.CaptureFixture[str]) -> None:
    """The same lines but for the times, whether EM converges or not."""
    x, centres = blobs()
    shown = []
    for estimator in (GaussianMixture, Peer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            given: dict[str, Any] = {"tol": tol, "max_iter": 6, "verbose": verbose, "verbose_interval": 2}
            estimator(4, **given, reg_covar=0.0, **start(centres, "full")).fit(x)
        shown.append(re.sub(r"time lapse \d+\.\d+s", "time lapse", capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0].startswith("Initialization 0\n  Iteration 2")
    assert ("Initialization converged." if tol else "Initialization did not converge.") in shown[0]


def test_verbose_prints_each_restart(capsys: pytest.CaptureFixture[str]) -> None:
    x, _ = blobs()
    GaussianMixture(2, n_init=3, verbose=1, verbose_interval=1000, random_state=0).fit(x)
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [f"Initialization {restart}" for restart in range(3)]
    assert lines[1::2] == ["Initialization converged."] * 3


@pytest.mark.usefixtures("no_gpu")
def test_not_fitted_and_other_errors() -> None:
    with pytest.raises(NotFittedError):
        GaussianMixture().predict([[0.0]])
    with pytest.raises(BackendUnavailable, match="numba_cuda"):
        GaussianMixture(backend="numba_cuda").fit(np.eye(4))
    with pytest.raises(ValueError, match="verbose_interval is 0"):
        GaussianMixture(verbose_interval=0).fit(np.eye(4))


def test_changed_attributes_count() -> None:
    """scikit-learn's users move means by hand, or set the parameters of a model that was never fitted."""
    ours, x = fitted()
    theirs = Peer(4)
    moved = ours.means_ + 1.0
    for model in (ours, theirs):
        model.weights_, model.means_ = ours.weights_, moved
        model.covariances_, model.precisions_cholesky_ = ours.covariances_, ours.precisions_cholesky_
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), rtol=1e-10)
    ours.means_ += 2.0
    theirs.means_ = ours.means_
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), rtol=1e-10)
    unfitted = GaussianMixture(4)
    unfitted.weights_, unfitted.means_ = ours.weights_, ours.means_
    with pytest.raises(NotFittedError):
        unfitted.predict(x)
    unfitted.precisions_cholesky_ = ours.precisions_cholesky_
    np.testing.assert_allclose(unfitted.score_samples(x), theirs.score_samples(x), rtol=1e-10)


@pytest.mark.parametrize("values", [list, lambda means: means.round().astype(int), np.float16])
def test_attributes_may_be_set_in_other_types(values: Any) -> None:
    model, x = fitted()
    changed = np.asarray(values(model.means_), dtype=np.float64)
    expected = GaussianMixture.from_parameters(model.weights_, changed, model.covariances_).score_samples(x)
    model.means_ = values(model.means_)
    for _ in range(2):
        np.testing.assert_allclose(model.score_samples(x), expected, rtol=1e-10)
    assert model.weights_.dtype == model.means_.dtype == np.float64
    assert model.marginal([0]).means_.dtype == np.float64


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_the_type_of_the_next_fit_does_not_change_the_last(covariance_type: str) -> None:
    model, x = fitted(covariance_type=covariance_type)
    expected = model.score_samples(x)
    for other in COVARIANCE_TYPES:
        model.set_params(covariance_type=other)
        model.weights_, model.means_ = model.weights_[::-1].copy(), model.means_[::-1].copy()
        if covariance_type != "tied":
            model.precisions_cholesky_ = model.precisions_cholesky_[::-1].copy()
        np.testing.assert_allclose(model.score_samples(x), expected, rtol=1e-10)
        assert model.mixture_.covariance_type == model.marginal([0]).covariance_type == covariance_type
    model.set_params(covariance_type="diag").precisions_cholesky_ = np.ones((4, 3))
    model.score(x)
    assert model.mixture_.covariance_type == "diag"
    model.precisions_cholesky_ = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"precisions_cholesky_ has shape \(4, 2\); expected \(4, 3\)"):
        model.score(x)
    model.means_ = np.full((4, 3), np.nan)
    with pytest.raises(ValueError, match=r"means_ contains NaN at \[0, 0\]"):
        model.score(x)


class Three(GaussianMixture):
    """A subclass with arguments of its own."""

    def __init__(self, shrink: float = 0.5, random_state: Any = None) -> None:
        super().__init__(3, random_state=random_state, backend="reference", covariance_type="diag")
        self.shrink = shrink


def test_derived_mixtures_of_subclasses() -> None:
    x, _ = blobs(300)
    model = clone(Three(random_state=4)).fit(x)
    for derived in (model.marginal([0, 2]), model.conditional([1], [0.0])):
        assert type(derived) is GaussianMixture
        assert (derived.n_components, derived.covariance_type, derived.backend) == (3, "diag", "reference")
        assert derived.random_state == 4
        assert clone(derived).fit(x[:, :2]).n_features_in_ == 2


def test_derived_mixtures_keep_the_names() -> None:
    x, _ = blobs(300)
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    model = GaussianMixture(2, random_state=0).fit(frame)
    assert model.marginal([2, 0]).feature_names_in_.tolist() == ["c", "a"]
    assert model.conditional([1], [0.0]).predict(frame[["a", "c"]]).shape == (300,)


# ---- without a fit


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_from_parameters_equals_the_fit(covariance_type: str) -> None:
    model, x = fitted(covariance_type=covariance_type)
    again = GaussianMixture.from_parameters(
        model.weights_, model.means_, model.covariances_, covariance_type=covariance_type, random_state=3
    )
    np.testing.assert_allclose(again.score_samples(x), model.score_samples(x), atol=1e-11)
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    assert again.n_components == 4
    assert again.random_state == 3
    assert again.sample(5)[0].shape == (5, 3)


def test_from_parameters_checks() -> None:
    with pytest.raises(ValueError, match="n_components is 3; the parameters have 1"):
        GaussianMixture.from_parameters([1.0], [[0.0]], [[[1.0]]], n_components=3)
    with pytest.raises(ValueError, match="covariances of component 0 are not positive definite"):
        GaussianMixture.from_parameters([1.0], [[0.0]], [[[-1.0]]])


def test_sample_has_the_moments_and_is_reproducible() -> None:
    model, _ = fitted()
    x, labels = model.sample(20000)
    np.testing.assert_array_equal(x, model.sample(20000)[0])
    np.testing.assert_array_equal(x[:10], model.sample(10)[0])
    runs, share = (np.diff(labels) != 0).mean(), np.bincount(labels) / 20000
    assert abs(runs - (1 - (share**2).sum())) < 0.03, "rows in random order; six standard errors"
    counts = np.bincount(labels, minlength=4)
    p = stats.chisquare(counts, 20000 * model.weights_).pvalue
    assert p > 1e-6, "component counts; false alarm 1 in 10⁶, fixed seed"
    for k in range(4):
        centred = (x[labels == k] - model.means_[k]) @ model.precisions_cholesky_[k]
        assert stats.kstest(centred.ravel(), "norm").pvalue > 1e-6


def test_samples_come_from_the_backend_that_was_named(no_gpu: str) -> None:
    model = GaussianMixture.from_parameters([1.0], [[0.0]], [[[1.0]]], backend="numba_cuda")
    with pytest.raises(BackendUnavailable, match=no_gpu):
        model.sample(3)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_marginal_and_conditional(covariance_type: str) -> None:
    """p(a, b) = p(b) p(a given b), and the marginal's moments are slices."""
    model, x = fitted(covariance_type=covariance_type)
    marginal = model.marginal([2, 0])
    np.testing.assert_allclose(marginal.means_, model.means_[:, [2, 0]])
    for row in x[:5]:
        conditional = model.conditional([2, 0], row[[2, 0]])
        joint = marginal.score_samples(row[None, [2, 0]]) + conditional.score_samples(row[None, [1]])
        np.testing.assert_allclose(joint, model.score_samples(row[None]), atol=1e-10)
    assert marginal.covariance_type == conditional.covariance_type == covariance_type
    assert isinstance(conditional, GaussianMixture)


@pytest.mark.parametrize(
    ("features", "values", "message"),
    [
        ([3], [0.0], r"features is \[3\]; expected different integers from 0 to 2"),
        ([0, 0], [0.0, 0.0], "expected different integers"),
        ([], [], "expected different integers"),
        ([0.5], [0.0], "expected different integers"),
        ([0, 1, 2], [0.0] * 3, "all 3 of them; leave at least one"),
        ([0], [0.0, 1.0], r"values has shape \(2,\); expected \(1,\)"),
        ([0], [np.nan], "values contains NaN"),
    ],
)
def test_bad_conditions(features: list[int], values: list[float], message: str) -> None:
    model, _ = fitted()
    with pytest.raises(ValueError, match=message):
        model.conditional(features, values)
