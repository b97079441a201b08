"""Many fits over partitions: the bits of `emalgam.fit_many`, however the problems are cut and shuffled."""

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
from tests.samples import blobs
from tests.test_batch import SAME, assert_same, clusters

HOW: dict[str, Any] = {"random_state": 3, "max_iter": 20}

pytestmark = pytest.mark.usefixtures("threads")


def table(labels: np.ndarray, dtype: str = "float64") -> pd.DataFrame:
    """Rows of many groups, in any order, with weights."""
    x = blobs(len(labels), D=2)[0].astype(dtype)
    weight = np.random.default_rng(2).integers(0, 3, len(labels)).astype(float)
    return pd.DataFrame({"a": x[:, 0], "label": labels, "b": x[:, 1], "weight": weight})


def in_memory(frame: pd.DataFrame, n_components: Any, **arguments: Any) -> emalgam.ManyFits:
    return emalgam.fit_many(
        frame[["a", "b"]].to_numpy(),
        n_components,
        groups=np.array(frame["label"].tolist()),
        sample_weight=frame["weight"].to_numpy(),
        **HOW | arguments,
    )


def some_labels(B: int = 20, N: int = 800) -> np.ndarray:
    return np.random.default_rng(1).integers(0, B, N)


@pytest.mark.parametrize("n_components", [2, range(1, 4), list(np.arange(13) % 3 + 1)])
@pytest.mark.parametrize("covariance_type", ["full", "tied", "spherical"])
def test_stacks(n_components: Any, covariance_type: str) -> None:
    X = clusters(B=13)
    how = HOW | {"covariance_type": covariance_type}
    found = distributed.fit_many(da.from_array(X, chunks=(4, -1, -1)), n_components, **how)
    assert_same(found, emalgam.fit_many(X, n_components, **how))
    assert found.means.shape == (13, 2 if n_components == 2 else 3, 2)


def test_stacks_with_weights_and_empty_chunks(client: Any) -> None:
    X, weight = clusters(B=7), np.random.default_rng(3).integers(0, 3, (7, 60)).astype(float)
    chunks = (3, 0, 4)
    given = da.from_array(X, chunks=(chunks, -1, -1)), da.from_array(weight, chunks=(chunks, -1))
    found = distributed.fit_many(given[0], 2, sample_weight=given[1], client=client, **HOW)
    expected = emalgam.fit_many(X, 2, sample_weight=weight, **HOW)
    assert_same(found, expected)
    np.testing.assert_array_equal(found.total_weight, expected.total_weight)


@pytest.mark.parametrize("n_components", [2, range(1, 4), list(np.arange(20) % 2 + 1)])
def test_groups(n_components: Any) -> None:
    frame = table(some_labels())
    found = distributed.fit_many(
        dd.from_pandas(frame, npartitions=5), n_components, groups="label", sample_weight="weight", **HOW
    )
    assert_same(found, in_memory(frame, n_components))
    np.testing.assert_array_equal(found.groups, np.arange(20))
    np.testing.assert_array_equal(found.score_samples(frame[["a", "b"]], groups=frame["label"]).shape, (800,))


def test_groups_in_small_files(small_files: Callable[..., Any]) -> None:
    frame = table(some_labels())
    how = {"groups": "label", "columns": ["a", "b"], "sample_weight": "weight"}
    assert_same(distributed.fit_many(small_files(frame), 2, **how, **HOW), in_memory(frame, 2))


@pytest.mark.parametrize("partitions", [1, 7])
def test_groups_on_a_cluster_whatever_the_partitions(partitions: int, client: Any) -> None:
    frame = table(some_labels())
    given = dd.from_pandas(frame, npartitions=partitions)
    found = distributed.fit_many(given, 2, groups="label", sample_weight="weight", client=client, **HOW)
    assert_same(found, in_memory(frame, 2))


@pytest.mark.parametrize("kind", ["names", "objects", "categories", "days", "halves"])
def test_labels_of_every_kind(kind: str) -> None:
    numbers = some_labels(B=5, N=200)
    labels: Any = {
        "names": pd.array([f"s{n}" for n in numbers]),
        "objects": np.array([f"s{n}" for n in numbers], dtype=object),
        "categories": pd.Categorical([f"s{n}" for n in numbers]),
        "days": np.datetime64("2026-01-01T00:00:00") + numbers,
        "halves": numbers / 2,
    }[kind]
    frame = table(labels)
    frame["label"] = labels
    given = dd.from_pandas(frame, npartitions=3)
    found = distributed.fit_many(given, 2, groups="label", sample_weight="weight", **HOW)
    expected = in_memory(frame.assign(label=numbers), 2)
    for name in SAME:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(found.groups.astype(str), np.unique(np.asarray(labels)).astype(str))


def test_float32_and_chosen_columns() -> None:
    frame = table(some_labels(), "float32")
    given = dd.from_pandas(frame, npartitions=4)
    found = distributed.fit_many(given, 2, groups="label", columns=["b"], covariance_type="diag", **HOW)
    expected = emalgam.fit_many(
        frame[["b"]].to_numpy(), 2, groups=frame["label"].to_numpy(), covariance_type="diag", **HOW
    )
    assert_same(found, expected)


def test_a_bad_problem_leaves_the_others_alone() -> None:
    X = clusters(B=6)
    X[4, 0, 0] = np.nan
    found = distributed.fit_many(da.from_array(X, chunks=(2, -1, -1)), 2, **HOW)
    assert found.message[4] == "the samples hold NaN or infinity"
    assert_same(found, emalgam.fit_many(X, 2, **HOW))


def test_no_problems() -> None:
    frame = dd.from_pandas(table(some_labels()), npartitions=3)
    assert len(distributed.fit_many(frame[frame["a"] > np.inf], 2, groups="label", columns=["a", "b"], **HOW)) == 0
    assert len(distributed.fit_many(da.zeros((0, 5, 2)), 2, **HOW)) == 0


STACK = da.zeros((6, 10, 2), chunks=(3, 10, 2))
SINGLE = table(some_labels(N=40), "float32")
FRAME = dd.from_pandas(table(some_labels(N=40)).assign(name="n"), npartitions=2)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (np.zeros((6, 10, 2)), {}, "X is a ndarray; expected a dask array (B, N, D), or a dask data frame with groups"),
        (da.zeros((6, 10)), {}, "X has shape (6, 10); expected a dask array (B, N, D)"),
        (
            da.zeros((6, 10, 2), chunks=(6, 5, 2)),
            {},
            "expected whole problems, and how many: X.rechunk({1: -1, 2: -1})",
        ),
        (STACK, {"sample_weight": da.ones((6, 10))}, "sample_weight has chunks ((6,), (10,))"),
        (STACK, {"sample_weight": np.ones((6, 10))}, "sample_weight has chunks ndarray"),
        (STACK, {"groups": "label"}, "groups and columns are for data frames"),
        (STACK, {"offsets": [0, 6]}, "offsets is for data in memory"),
        (STACK, {"progress": True}, "progress is for data in memory"),
        (STACK, {"criterion": "best"}, "criterion is 'best'; expected one of"),
        (STACK, {"n_components": [1, 2]}, "n_components has shape (2,)"),
        (FRAME, {}, "groups is None and sample_weight None; expected the name of a column"),
        (FRAME, {"groups": "label"}, "the data frame: column 'name' holds values of type large_string"),
        (FRAME, {"groups": "sensor"}, "the data frame: has no column 'sensor'"),
        (FRAME, {"groups": "label", "columns": ["a", "label"]}, "the data frame: column 'label' is asked for twice"),
        (
            dd.from_delayed(
                [dask.delayed(SINGLE), dask.delayed(SINGLE.astype({"a": "f8"}))], meta=SINGLE, verify_meta=False
            ),
            {"groups": "label", "columns": ["a"]},
            "column 'a' of a partition has dtype float64 in data of float32",
        ),
        (FRAME, {"groups": "label", "columns": ["a"], "max_iter": -1}, "max_iter is -1"),
    ],
)
def test_bad_input(x: Any, arguments: dict[str, Any], message: str) -> None:
    arguments = {"n_components": 2} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        distributed.fit_many(x, **arguments)


def test_a_row_without_label() -> None:
    frame = table(some_labels(N=40)).assign(label=[1.0] * 33 + [np.nan] * 7)
    with pytest.raises(ValueError, match="column 'label' has no label in row 33; expected one for each row"):
        distributed.fit_many(dd.from_pandas(frame, npartitions=4), 2, groups="label", columns=["a"])


@pytest.mark.parametrize("labels", [[1, "1"] * 50, [1] * 50 + ["1"] * 50])
def test_labels_of_several_types_are_refused(labels: list[Any]) -> None:
    frame = table(np.arange(100))
    frame["label"] = pd.Series(labels, dtype=object)
    with dask.config.set({"dataframe.convert-string": False}):  # which makes all of them text
        given = dd.from_pandas(frame, npartitions=2, sort=False)
        with pytest.raises(ValueError, match="groups has labels of types int, str, which have no common order"):
            distributed.fit_many(given, 2, groups="label", **HOW)
