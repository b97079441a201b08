"""Files of many fits: what is written is read, and what was not written by us is refused by the name of its field."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as arrow
import pytest
from pyarrow import parquet

import emalgam
from emalgam import fits_file
from emalgam.batch import ManyFits
from emalgam.fits_file import load_fits, load_fits_metadata, save_fits
from emalgam.model_file import ModelFileError
from emalgam_kernels.batch import COVARIANCE_TYPES

Change = Callable[[dict[str, Any], dict[str, str]], None]


def some_fits(covariance_type: str = "full", groups: Any = None, n_components: Any = range(1, 4)) -> ManyFits:
    """Five problems of which the second and the last have no mixture, with weights."""
    rng = np.random.default_rng(4)
    X = rng.normal(size=(5, 40, 2)) + 7 * rng.integers(0, 2, (5, 40, 1))
    X[1, 3] = np.nan
    labels = np.repeat(np.arange(5) if groups is None else np.asarray(groups), 40)
    weight = rng.integers(0, 3, 200).astype(float)
    weight[-1] = -1
    return emalgam.fit_many(
        X.reshape(-1, 2),
        n_components,
        groups=labels,
        covariance_type=covariance_type,
        sample_weight=weight,
        random_state=0,
        backend="reference",
    )


def assert_same(loaded: ManyFits, fits: ManyFits) -> None:
    """Everything but room for components that no problem has."""
    K = loaded.weights.shape[1]
    assert np.isnan(fits.weights[:, K:]).all()
    for field in fields(ManyFits):
        expected, found = getattr(fits, field.name), getattr(loaded, field.name)
        if isinstance(expected, np.ndarray):
            shape = tuple(slice(None, length) for length in found.shape)
            np.testing.assert_array_equal(found, expected[shape], err_msg=field.name)
        else:
            assert found == expected, field.name


def test_a_name_of_another_format(tmp_path: Path) -> None:
    fits = emalgam.fit_many(np.random.default_rng(0).normal(size=(2, 20, 1)), 1)
    with pytest.raises(ValueError, match=r"fits\.CSV: many fits are written as Parquet; name it fits\.parquet"):
        fits.save(tmp_path / "fits.CSV")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_what_is_saved_is_loaded(covariance_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = some_fits(covariance_type)
    fits.save(tmp_path / "fits.parquet")
    loaded = emalgam.load_fits(tmp_path / "fits.parquet")
    assert_same(loaded, fits)
    np.testing.assert_array_equal(loaded.bic, fits.bic)
    np.testing.assert_array_equal(loaded[0].means_, fits[0].means_)
    monkeypatch.setattr(fits_file, "ROWS_AT_ONCE", 2)
    fits.save(tmp_path / "pieces.parquet")
    assert_same(load_fits(tmp_path / "pieces.parquet"), fits)


@pytest.mark.parametrize(
    "groups", [["a", "bb", "ccc", "d", "e"], [-3, 0, 5, 9, 2**62], np.arange("2024-01", "2024-06", dtype="M8[M]")]
)
def test_labels(groups: Any, tmp_path: Path) -> None:
    groups = groups.astype("M8[D]") if isinstance(groups, np.ndarray) else groups
    fits = some_fits(groups=groups)
    fits.save(tmp_path / "fits.parquet")
    loaded = load_fits(tmp_path / "fits.parquet")
    assert loaded.groups is not None
    assert loaded.groups.tolist() == np.asarray(groups).tolist()
    x = np.zeros((2, 2))
    np.testing.assert_array_equal(
        loaded.score_samples(x, groups=np.asarray(groups)[[2, 0]], backend="reference"),
        fits.score_samples(x, groups=np.asarray(groups)[[2, 0]], backend="reference"),
    )
    with pytest.raises(ValueError, match="groups contains 'zz', for which there was no fit"):
        some_fits(groups=["a", "b", "c", "d", "e"]).predict(x, groups=np.array(["a", "zz"], object))


@pytest.mark.parametrize(
    ("groups", "kind"),
    [
        (pd.PeriodIndex(["2020", "2021"], freq="Y"), "Period"),
        (pd.cut([0.0, 1.0], 2), "Interval"),
        ([1, 2**70], "int"),
        ([Fraction(1, 3), Fraction(1, 2)], "Fraction"),
        ([UUID(int=1), UUID(int=2)], "UUID"),
        ([(1, 2), (1, 3)], "tuple"),
        (np.array(["2020", "2021"], "M8[Y]"), r"datetime64\[Y\]"),
        (np.array([1, 2], np.longdouble), np.dtype(np.longdouble).name),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_without_a_column_say_what_to_do(groups: Any, kind: str, tmp_path: Path) -> None:
    """Of a type that pyarrow does not take, takes at times, or gives back as another."""
    labels = pd.Series(groups, dtype=None if isinstance(groups, np.ndarray) else object).repeat(20)
    if isinstance(groups, np.ndarray):  # pandas would make others of them
        labels = np.repeat(groups, 20)
    X = np.random.default_rng(0).normal(size=(40, 1))
    fits = emalgam.fit_many(X, 1, groups=labels, random_state=0, backend="reference")
    assert len(fits) == 2
    with pytest.raises(ValueError, match=rf"labels of type {kind}, such as .*: groups=labels\.astype\(str\)") as error:
        fits.save(tmp_path / "fits.parquet")
    assert type(error.value) is ValueError
    assert not any(tmp_path.iterdir())
    as_text = emalgam.fit_many(X, 1, groups=labels.astype(str), random_state=0, backend="reference")
    as_text.save(tmp_path / "fits.parquet")
    assert load_fits(tmp_path / "fits.parquet").groups.tolist() == as_text.groups.tolist()


def test_without_labels_and_without_problems(tmp_path: Path) -> None:
    fits = emalgam.fit_many(np.random.default_rng(0).normal(size=(3, 20, 2)), 1, random_state=0, backend="reference")
    fits.save(tmp_path / "fits.parquet")
    assert "group" not in parquet.read_table(tmp_path / "fits.parquet").column_names
    assert_same(load_fits(tmp_path / "fits.parquet"), fits)
    fits[:0].save(tmp_path / "none.parquet")
    assert len(load_fits(tmp_path / "none.parquet")) == 0
    failed = emalgam.fit_many(np.full((3, 20, 2), np.nan), 1, covariance_type="tied", backend="reference")
    failed.save(tmp_path / "failed.parquet")
    assert load_fits(tmp_path / "failed.parquet").n_components.tolist() == [0, 0, 0]


def test_other_readers_find_numbers_and_words(tmp_path: Path) -> None:
    fits = some_fits()
    fits.save(tmp_path / "fits.parquet")
    rows = parquet.read_table(tmp_path / "fits.parquet").to_pylist()
    assert [row["covariance_type"] for row in rows] == ["full"] * 5
    assert [row["message"] for row in rows] == fits.message.tolist()
    assert (rows[1]["weights"], rows[1]["means"], rows[1]["covariances"]) == ([], [], [])
    K = rows[0]["n_components"]
    np.testing.assert_array_equal(np.reshape(rows[0]["means"], (K, 2)), fits.means[0, :K])
    np.testing.assert_array_equal(np.reshape(rows[0]["covariances"], (K, 2, 2)), fits.covariances[0, :K])


def test_equal_fits_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_fits(some_fits(), tmp_path / name, metadata={"job": "{}"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_fits_metadata(tmp_path / "a")["job"] == "{}"


def test_variances_beyond_float64_do_not_spoil_a_file(tmp_path: Path) -> None:
    """Of a fit to data near 1e200 the covariances overflow; the mixture is refused when it is asked for, and alone."""
    fits = some_fits("diag", n_components=1)
    fits.covariances[0] = np.inf
    fits.covariances[2] = 0.0
    fits.save(tmp_path / "fits.parquet")
    loaded = load_fits(tmp_path / "fits.parquet")
    np.testing.assert_array_equal(loaded.covariances, fits.covariances)
    with pytest.raises(ValueError, match="covariances"):
        loaded[0]


# ---- files that were not written by us, or not whole


def forge(path: Path, change: Change | None = None, **options: Any) -> Path:
    """A file of fits, read, changed and written by other means."""
    some_fits(n_components=1).save(path)
    table = parquet.read_table(path)
    columns: dict[str, Any] = {name: table[name].to_pylist() for name in table.column_names}
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    types = {field.name: field.type for field in table.schema}
    if change is not None:
        change(columns, metadata)
    arrays = {
        name: values if isinstance(values, arrow.Array) else arrow.array(values, types.get(name))
        for name, values in columns.items()
    }
    table = arrow.table(arrays).replace_schema_metadata(metadata)
    parquet.write_table(table, path, **{"compression": "none", "use_dictionary": False} | options)
    return path


def put(name: str, row: int, value: Any) -> Change:
    def change(columns: dict[str, Any], metadata: dict[str, str]) -> None:
        columns[name][row] = value

    return change


def replaced(name: str, values: Any) -> Change:
    return lambda columns, metadata: columns.update({name: values})


def described(name: str, value: str) -> Change:
    return lambda columns, metadata: metadata.update({name: value})


FORGED: dict[str, tuple[Change, str]] = {
    "another format": (described("format", "pickle"), "format is 'pickle', expected 'emalgam.fits'"),
    "version": (described("format_version", "9"), "format_version is '9'; this version of emalgam reads '1'"),
    "type": (described("covariance_type", "round"), "covariance_type is 'round'"),
    "criterion": (described("criterion", "dic"), "criterion is 'dic', expected one of bic, aic, icl"),
    "no features": (described("n_features", "0"), "n_features is '0'"),
    "huge features": (described("n_features", "9" * 17), "n_features is '99999999999999999'"),
    "features": (described("n_features", "3"), "means holds 2 numbers in row 0, expected 3 for 1 components"),
    "no backend": (lambda columns, metadata: metadata.pop("backend") and None, "backend is missing"),
    "no such label": (described("label", "sensor"), "sensor is there 0 times"),
    "no column": (lambda columns, metadata: columns.pop("entropy") and None, "entropy is there 0 times"),
    "column of text": (replaced("status", arrow.array(["0"] * 5)), "status is a column of string, expected int64"),
    "column of floats": (replaced("n_iter", arrow.array([1.0] * 5)), "n_iter is a column of double, expected int64"),
    "no list": (replaced("means", arrow.array([1.0] * 5)), "means is a column of double, expected list"),
    "null": (put("n_iter", 2, None), "n_iter lacks values"),
    "null list": (put("means", 2, None), "means holds 0 numbers in row 2"),
    "null label": (put("group", 2, None), "group lacks values"),
    "label twice": (put("group", 2, 0), "labels hold 0 twice"),
    "huge K": (put("n_components", 2, 10**12), "n_components goes from 0 to 1000000000000 with 2 features"),
    "negative K": (put("n_components", 2, -1), "n_components goes from -1"),
    "other K": (put("n_components", 2, 2), "weights holds 1 numbers in row 2, expected 2 for 2 components"),
    "status of another world": (put("status", 2, 99), "status is 99 with 1 components in row 2"),
    "status without mixture": (put("status", 2, 3), "status is 3 with 1 components in row 2"),
    "infinite likelihood": (put("log_likelihood", 2, np.inf), "log_likelihood is inf with 1 components in row 2"),
    "negative samples": (put("n_samples", 2, -1), "n_samples is -1"),
    "no weight": (put("total_weight", 2, 0.0), "total_weight is 0.0"),
    "weights": (put("weights", 2, [0.5]), "weights have minimum 0.5 and sum 0.5"),
    "NaN weight": (
        put("weights", 2, [np.nan]),
        "weights contains NaN at [0]",
    ),
    "NaN mean": (
        put("means", 2, [np.nan, 0.0]),
        "means contains NaN at [0, 0]",
    ),
    "covariances": (
        put("covariances", 2, [1.0, 2.0, 2.0, 1.0]),
        "covariances of component 0 are not positive definite",
    ),
    "not symmetric": (put("covariances", 2, [1.0, 0.5, 0.0, 1.0]), "covariances at [0] are not symmetric"),
    "NaN covariance": (put("covariances", 2, [np.nan, 0.0, 0.0, 1.0]), "covariances contains NaN"),
    "negative variance": (put("covariances", 2, [-1.0, 0.0, 0.0, 1.0]), "covariances of component 0 are not"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused_by_field(case: str, tmp_path: Path) -> None:
    change, message = FORGED[case]
    path = forge(tmp_path / "fits.parquet", change)
    with pytest.raises(ModelFileError, match=re.escape(message)) as error:
        load_fits(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).count(str(path)) == 1


def test_an_honest_copy_is_read(tmp_path: Path) -> None:
    assert_same(load_fits(forge(tmp_path / "fits.parquet")), some_fits(n_components=1))


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": True}])
def test_what_could_grow_when_it_is_read_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = forge(tmp_path / "fits.parquet", **options)
    with pytest.raises(ModelFileError, match="expected plain and uncompressed"):
        load_fits(path)


def test_a_short_file_of_many_rows_takes_no_memory(tmp_path: Path) -> None:
    """A million equal rows in some kilobytes."""
    some_fits().save(tmp_path / "fits.parquet")
    table = parquet.read_table(tmp_path / "fits.parquet").slice(2, 1)
    many = arrow.table(
        {name: table[name].combine_chunks().take(np.zeros(1_000_000, int)) for name in table.column_names}
    )
    many = many.replace_schema_metadata(table.schema.metadata)
    parquet.write_table(many, tmp_path / "many.parquet", compression="zstd")
    assert (tmp_path / "many.parquet").stat().st_size < 200_000
    tracemalloc.start()
    before = arrow.total_allocated_bytes()
    with pytest.raises(ModelFileError, match="expected plain and uncompressed"):
        load_fits(tmp_path / "many.parquet")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    assert arrow.total_allocated_bytes() - before < 10e6
    tracemalloc.stop()


def test_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fits.parquet"
    some_fits().save(path)
    content = path.read_bytes()
    for length in [0, 3, 12, *range(100, len(content), 331), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match=re.escape(str(path))):
            load_fits(path)


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    """Any byte of the file may be wrong: it loads, or a ModelFileError names the file."""
    path = tmp_path / "fits.parquet"
    some_fits().save(path)
    content, rng = path.read_bytes(), np.random.default_rng(11)
    refusals = []
    for place in rng.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        try:
            load_fits(path)
        except ModelFileError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 300
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="there is no such file"):
        load_fits(tmp_path / "absent.parquet")
    with pytest.raises(ModelFileError, match="is not a regular file"):
        load_fits(tmp_path)
    parquet.write_table(arrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ModelFileError, match=r"other\.parquet: format is None, expected 'emalgam\.fits'"):
        load_fits(tmp_path / "other.parquet")
    with pytest.raises(OSError, match="there is no folder"):
        some_fits().save(tmp_path / "absent" / "fits.parquet")
