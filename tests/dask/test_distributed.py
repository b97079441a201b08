"""Fits over the partitions of Dask against the same rows in memory, answers that are lazy, and input that is bad."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import emalgam
from emalgam import distributed
from emalgam import parts as in_parts
from emalgam.covariance import COVARIANCES
from emalgam.dask_parts import FAN_IN, DaskParts
from tests.conftest import need
from tests.samples import blobs
from tests.tolerances import tolerance

N = 1500
NAMES = ["a", "b", "c"]
TYPES = tuple(COVARIANCES)
PARAMETERS = ("weights", "means", "covariances")

pytestmark = pytest.mark.usefixtures("threads")


def rows(dtype: str = "float64") -> np.ndarray:
    return blobs(N)[0].astype(dtype)


def weights() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 3, N).astype(float)


def as_array(x: np.ndarray, weight: np.ndarray | None) -> tuple[Any, Any]:
    """With a chunk that has no rows."""
    chunks = (400, 0, 600, 1, 499)
    return da.from_array(x, chunks=(chunks, -1)), None if weight is None else da.from_array(weight, chunks=(chunks,))


def as_unknown(x: np.ndarray, weight: np.ndarray | None) -> tuple[Any, Any]:
    """Chunks that have to be counted, one of which turns out to be empty."""
    given, known = as_array(x, np.ones(N) if weight is None else weight)
    everything = da.from_array(np.arange(N), chunks=given.chunks[:1]) >= 0
    return given[everything], None if weight is None else known[everything]


def as_frame(x: np.ndarray, weight: np.ndarray | None) -> tuple[Any, Any]:
    frame = pd.DataFrame(x, columns=NAMES)
    if weight is None:
        return dd.from_pandas(frame, npartitions=4), None
    return dd.from_pandas(frame.assign(weight=weight), npartitions=4), "weight"


def as_series(x: np.ndarray, weight: np.ndarray | None) -> tuple[Any, Any]:
    """Weights in a frame of their own, a partition of which is empty."""
    frame = dd.from_pandas(
        pd.DataFrame(x, columns=NAMES).assign(weight=1.0 if weight is None else weight), npartitions=4
    )
    frame = dd.concat([frame, frame.partitions[1][frame.partitions[1]["a"] > np.inf]])
    return frame[NAMES], None if weight is None else frame["weight"]


Source = Callable[[np.ndarray, np.ndarray | None], tuple[Any, Any]]
every_source = pytest.mark.parametrize("source", [as_array, as_unknown, as_frame, as_series])


def assert_close(found: emalgam.Fit, expected: emalgam.Fit) -> None:
    assert found.n_iter == expected.n_iter
    assert found.lower_bound == pytest.approx(expected.lower_bound, abs=1e-12)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(found.mixture, name), getattr(expected.mixture, name), rtol=1e-9, atol=1e-12)


def assert_same_bits(found: emalgam.Fit, expected: emalgam.Fit) -> None:
    assert found.lower_bounds == expected.lower_bounds
    for name in PARAMETERS:
        np.testing.assert_array_equal(getattr(found.mixture, name), getattr(expected.mixture, name), err_msg=name)


# ---- against the same rows in memory


@every_source
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_fit_is_that_of_the_rows_in_memory(source: Source, weighted: bool, covariance_type: str) -> None:
    x, weight = rows(), weights() if weighted else None
    how: dict[str, Any] = {"covariance_type": covariance_type, "random_state": 0, "max_iter": 1000}
    given, of_given = source(x, weight)
    found = distributed.fit(given, 4, sample_weight=of_given, **how)
    assert_close(found, emalgam.fit(x, 4, sample_weight=weight, **how))


@pytest.mark.parametrize("backend", ["reference", "cython_cpu"])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_backends_and_types(backend: str, dtype: str) -> None:
    need(backend)
    x = (rows() * 100).astype(dtype)
    whole = emalgam.fit(x, 4, random_state=0, backend=backend)
    for source in (as_array, as_frame):
        found = distributed.fit(source(x, None)[0], 4, random_state=0, backend=backend)
        assert (found.backend, found.arithmetic) == (backend, whole.arithmetic)
        bound = tolerance("fit", whole.arithmetic) * np.abs(x).max()
        np.testing.assert_allclose(found.mixture.means, whole.mixture.means, rtol=0, atol=bound)


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_every_start(init_params: str) -> None:
    how: dict[str, Any] = {"init_params": init_params, "n_init": 2, "random_state": 3, "max_iter": 500}
    assert_close(distributed.fit(as_array(rows(), None)[0], 3, **how), emalgam.fit(rows(), 3, **how))


@pytest.mark.parametrize("precision", ["strict", "mixed"])
def test_a_stream_of_the_same_chunks_agrees(precision: str) -> None:
    x, how = rows(), {"random_state": 0, "precision": precision}
    chunks = [x[first : first + 300] for first in range(0, N, 300)]
    streamed = emalgam.fit(emalgam.open_stream(chunks, chunk_rows=300), 4, **how)
    found = emalgam.fit(da.from_array(x, chunks=(300, 3)), 4, **how)
    assert_same_bits(found, streamed)
    assert (found.float32_iterations > 0) == (precision == "mixed")


def test_columns_are_chosen_and_ordered() -> None:
    frame = dd.from_pandas(pd.DataFrame(rows(), columns=NAMES).assign(name="n", row=range(N)), npartitions=3)
    found = distributed.fit(frame, 4, columns=["c", "a"], random_state=0)
    assert_close(found, emalgam.fit(rows()[:, [2, 0]], 4, random_state=0))


def test_nulls_of_pandas_are_not_numbers() -> None:
    frame = pd.DataFrame({"a": pd.array([1, 2, None, 4], dtype="Int64"), "b": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(ValueError, match="contains NaN at row 2, column 0"):
        distributed.fit(dd.from_pandas(frame, npartitions=2), 1)


# ---- partitions


def test_the_same_partitions_give_the_same_bits_on_every_scheduler(client: Any) -> None:
    x = da.from_array(rows(), chunks=(80, 3))
    assert x.npartitions > FAN_IN  # a tree of two levels
    expected = distributed.fit(x, 4, random_state=0)
    assert_same_bits(distributed.fit(x, 4, random_state=0, client=client), expected)
    assert_same_bits(distributed.fit(x, 4, random_state=0, client=client, n_threads=2), expected)


def test_what_is_persisted_is_made_once_and_the_rest_in_every_pass() -> None:
    made: list[int] = []

    def reading(block: np.ndarray) -> np.ndarray:
        made.append(len(block))
        return block

    x = da.from_array(rows(), chunks=(500, 3)).map_blocks(reading, dtype=float, meta=np.empty((0, 0)))
    result = emalgam.fit(x, 4, random_state=0)
    assert len(made) >= 3 * (result.n_iter + 2)  # the survey, the frame, and each iteration
    made.clear()
    assert_same_bits(emalgam.fit(x.persist(), 4, random_state=0), result)
    assert len(made) == 3


@pytest.mark.parametrize("weight", [None, "weight", pd.Series])
def test_small_files_are_the_partitions_they_show(small_files: Callable[..., Any], weight: Any) -> None:
    table = pd.DataFrame(rows(), columns=NAMES).assign(weight=weights())
    given, alike = small_files(table), dd.from_pandas(table, npartitions=10)
    assert given[NAMES[0]].optimize().npartitions < given.npartitions == 10
    if weight is pd.Series:
        found = distributed.fit(given[NAMES], 3, sample_weight=given["weight"], random_state=0)
    else:
        found = distributed.fit(given, 3, columns=NAMES, sample_weight=weight, random_state=0)
    of_weight = None if weight is None else "weight"
    assert_same_bits(found, distributed.fit(alike, 3, columns=NAMES, sample_weight=of_weight, random_state=0))
    answer = found.mixture.predict(given[NAMES])
    assert answer.numblocks == (10,)
    np.testing.assert_array_equal(answer, found.mixture.predict(rows()))


def test_only_the_columns_that_are_asked_for_are_read() -> None:
    table, asked = pd.DataFrame(rows(), columns=NAMES).assign(weight=weights()), set()

    def read(number: int, columns: list[str] | None = None) -> pd.DataFrame:
        asked.update(table.columns if columns is None else columns)
        return table.iloc[500 * number : 500 * (number + 1)][list(table.columns if columns is None else columns)]

    with dask.config.set({"dataframe.convert-string": False}):  # which would ask for all
        frame = dd.from_map(read, range(3), meta=table.iloc[:0])
    distributed.fit(frame, 2, columns=["a", "c"], sample_weight="weight", random_state=0)
    assert asked == {"a", "c", "weight"}


def test_weights_in_a_column_stay_with_their_rows() -> None:
    """Whatever is computed from the data, such as where to cut them, is the same for both."""
    table = pd.DataFrame(rows(), columns=NAMES).assign(weight=weights())
    frame = dd.from_pandas(table, npartitions=4).drop_duplicates(subset=["a"]).set_index("b", drop=False)
    found = distributed.fit(frame, 3, columns=NAMES, sample_weight="weight", random_state=0)
    table = table.sort_values("b")
    assert_close(found, emalgam.fit(table[NAMES], 3, sample_weight=table["weight"].to_numpy(), random_state=0))


@pytest.mark.parametrize("verify_meta", [True, False])
def test_frames_of_delayed_parts(verify_meta: bool) -> None:
    frame = dd.from_pandas(pd.DataFrame(rows(), columns=NAMES).assign(weight=weights()), npartitions=4)
    given = dd.from_delayed(frame.to_delayed(), meta=frame._meta, verify_meta=verify_meta)
    how: dict[str, Any] = {"sample_weight": "weight", "random_state": 0}
    found = distributed.fit(given, 3, **how)
    assert_same_bits(found, distributed.fit(frame, 3, **how))
    np.testing.assert_array_equal(found.mixture.predict(given[NAMES]), found.mixture.predict(rows()))


def test_a_task_has_one_thread_unless_told_otherwise() -> None:
    parts = DaskParts(as_array(rows(), None)[0])
    assert (parts.threads(None), parts.threads(3), parts.shape) == (1, 3, (N, 3))
    with pytest.raises(ValueError, match="n_threads is 0"):
        parts.threads(0)


@pytest.mark.parametrize("rare", [False, True])
def test_partitions_offer_no_more_than_the_sample_can_take(rare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is that of a stream, which does not know its length; also where few rows have weight."""
    monkeypatch.setattr(in_parts, "ELEMENTS_OF_A_SAMPLE", 0)
    monkeypatch.setattr(in_parts, "FEWEST_ROWS_OF_A_SAMPLE", 20)
    offered: list[int] = []
    combine = in_parts.Survey.__add__

    def watched(a: in_parts.Survey, b: in_parts.Survey) -> in_parts.Survey:
        offered.extend((len(a.sample.keys), len(b.sample.keys)))
        return combine(a, b)

    monkeypatch.setattr(in_parts.Survey, "__add__", watched)
    weight = (np.arange(N) % 30 == 0).astype(float) if rare else np.ones(N)
    chunked = da.from_array(rows(), chunks=(100, 3)), da.from_array(weight, chunks=100)
    found = in_parts.survey_of(DaskParts(*chunked), 0, 1).sample
    assert rare or max(offered[:2]) < 20
    expected = in_parts.survey_of(emalgam.open_stream(rows(), sample_weight=weight), 0, 1).sample
    assert found.threshold == expected.threshold
    np.testing.assert_array_equal(found.numbers, expected.numbers)


def test_data_that_change_are_an_error() -> None:
    made: list[int] = []

    def shrinking(block: np.ndarray) -> np.ndarray:
        made.append(len(block))
        return block[: len(block) - (len(made) > 6)]

    x = da.from_array(rows(), chunks=(500, 3)).map_blocks(shrinking, dtype=float, meta=np.empty((0, 0)))
    with pytest.raises(ValueError, match=r"the partition of row \d+ has 499 rows now and had 500 before"):
        emalgam.fit(x, 4, random_state=0)


# ---- GaussianMixture and Mixture


@every_source
def test_estimator(source: Source) -> None:
    x, weight = rows(), weights()
    given, _ = source(x, None)
    found = emalgam.GaussianMixture(4, random_state=0).fit(given)
    expected = emalgam.GaussianMixture(4, random_state=0).fit(x)
    np.testing.assert_allclose(found.means_, expected.means_, rtol=1e-12)
    for method in ("score_samples", "predict", "predict_proba"):
        answer = getattr(found, method)(given)
        assert isinstance(answer, da.Array)
        assert answer.numblocks[0] == given.npartitions
        computed = answer.compute()
        assert computed.dtype == answer.dtype
        np.testing.assert_allclose(computed, getattr(expected, method)(x), rtol=1e-9, atol=1e-12)
    for criterion in ("bic", "aic", "score"):
        assert getattr(found, criterion)(given) == pytest.approx(getattr(expected, criterion)(x), rel=1e-12)
    known = as_array(x, weight)
    if source is as_array:
        assert found.score(given, sample_weight=known[1]) == pytest.approx(expected.score(x, sample_weight=weight))


def test_answers_are_lazy_and_cut_like_the_data() -> None:
    def never(block: np.ndarray) -> np.ndarray:
        raise AssertionError("computed before it was asked for")

    mixture = emalgam.fit(rows("float32"), 4, random_state=0).mixture
    x = da.from_array(rows("float32"), chunks=(400, 3)).map_blocks(never, dtype="float32", meta=np.empty((0, 0), "f4"))
    answers = [mixture.log_prob(x), mixture.predict(x), mixture.responsibilities(x)]
    assert [each.shape for each in answers] == [(N,), (N,), (N, 4)]
    assert [str(each.dtype) for each in answers] == ["float64", "int64", "float32"]
    assert all(each.chunks[0] == x.chunks[0] for each in answers)
    with pytest.raises(AssertionError, match="computed before"):
        answers[0].compute()


def test_names_of_features() -> None:
    frame, _ = as_frame(rows(), None)
    estimator = emalgam.GaussianMixture(4, random_state=0).fit(frame)
    assert estimator.feature_names_in_.tolist() == NAMES
    with pytest.raises(ValueError, match="feature names should match"):
        estimator.predict(frame.rename(columns={"a": "z"}))
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        emalgam.GaussianMixture(4, random_state=0).fit(as_array(rows(), None)[0]).predict(da.zeros((4, 2)))


# ---- bad input


def test_not_finite_names_the_row_of_all() -> None:
    x = rows()
    x[1234, 1] = np.nan
    given = da.from_array(x, chunks=(100, 3))
    with pytest.raises(ValueError, match="contains NaN at row 1234, column 1"):
        emalgam.fit(given, 2)
    mixture = emalgam.fit(rows(), 2).mixture
    with pytest.raises(ValueError, match="contains NaN at row 1234, column 1"):
        mixture.log_prob(given).compute()
    uncounted = given[given[:, 0] > -np.inf]
    with pytest.raises(ValueError, match=r"row 34, column 1.*\(rows are counted from the first of partition 12\)"):
        mixture.log_prob(uncounted).compute()
    with pytest.raises(ValueError, match="contains NaN at row 1234, column 1"):
        mixture.bic(given)


def test_bad_weights_name_the_row_of_all() -> None:
    weight = np.ones(N)
    weight[1300] = -1
    with pytest.raises(ValueError, match=r"is -1.0 at row 1300"):
        emalgam.fit(da.from_array(rows(), chunks=(100, 3)), 2, sample_weight=da.from_array(weight, chunks=100))


def test_no_weight_and_too_few_rows() -> None:
    x = da.from_array(rows(), chunks=(400, 3))
    with pytest.raises(ValueError, match="sample_weight is zero for every sample"):
        emalgam.fit(x, 2, sample_weight=da.zeros(N, chunks=400))
    with pytest.raises(ValueError, match="there are 3 samples"):
        emalgam.fit(x[:3], 4)
    with pytest.raises(ValueError, match="x has no rows; expected at least one"):
        emalgam.fit(x[x[:, 0] > np.inf], 4)


X = da.zeros((8, 3), chunks=(4, 3))
SINGLE = pd.DataFrame(np.eye(8, 2, dtype=np.float32), columns=["a", "b"])
FRAME = dd.from_pandas(pd.DataFrame({"a": range(8), "name": list("abcdefgh"), "w": 1.0}), npartitions=2)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (np.zeros((8, 3)), {}, "x is a ndarray; expected a dask array or data frame"),
        (da.zeros(8), {}, "x has shape (8,); expected two dimensions"),
        (da.zeros((8, 3, 2)), {}, "x has shape (8, 3, 2); expected two dimensions"),
        (da.zeros((8, 3), dtype=complex), {}, "x has dtype complex128; expected real numbers"),
        (
            da.zeros((8, 4), chunks=(4, 2)),
            {},
            "x has its 4 columns in 2 chunks; expected whole rows: x.rechunk({1: -1})",
        ),
        (
            X.rechunk(8).map_blocks(lambda x: x.astype("f8"), dtype="f4"),
            {},
            "the partition of row 0 has dtype float64 in data of float32, and may be rounded to it; make all",
        ),
        (X, {"columns": ["a"]}, "columns was given, which is for data frames"),
        (X, {"sample_weight": np.ones(8)}, "sample_weight is a ndarray; expected a dask array (or series)"),
        (X, {"sample_weight": "w"}, "sample_weight is a str; expected a dask array (or series)"),
        (
            X,
            {"sample_weight": da.ones(8)},
            "has shape (8,) in 1 chunks (8); expected one number per row, cut as the rows",
        ),
        (X, {"sample_weight": da.ones((8, 3), chunks=(4, 3))}, "sample_weight has shape (8, 3)"),
        (FRAME, {}, "the data frame: column 'name' holds values of type large_string; expected numbers"),
        (FRAME, {"columns": ["y"]}, "the data frame: has no column 'y'; there are a, name, w"),
        (FRAME, {"columns": ["a"], "sample_weight": "v"}, "the data frame: has no column 'v'"),
        (FRAME, {"columns": ["a", "a"]}, "the data frame: column 'a' is asked for twice"),
        (FRAME, {"columns": ["a", "w"], "sample_weight": "w"}, "the data frame: column 'w' is asked for twice"),
        (
            dd.from_map(SINGLE.astype, ["f4", "f8"], meta=SINGLE),
            {},
            "column 'a' of a partition has dtype float64 in data of float32, and may be rounded to it; make all",
        ),
        (FRAME["a"], {}, "x has shape (1,); expected two dimensions"),
        (X, {"client": 3}, "Unexpected scheduler: 3"),
    ],
)
def test_bad_collections(x: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        distributed.fit(x, 2, **arguments)


def test_what_takes_arrays_in_memory_says_so() -> None:
    for call in (
        lambda: emalgam.GaussianMixture(2).partial_fit(X),
        lambda: emalgam.fit_many(X, 2),
        lambda: emalgam.fit(rows(), 2, sample_weight=da.ones(N)),
    ):
        with pytest.raises(ValueError, match=r"is a dask Array; expected an array in memory"):
            call()
