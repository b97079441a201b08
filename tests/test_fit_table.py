"""Groups of Parquet tables: sorted, in pieces and scattered, labels and numbers of every type, shards of any size."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as arrow
import pytest
from pyarrow import parquet

import emalgam
from emalgam import fit_table as tables
from emalgam import grouped_table
from emalgam.batch import ManyFits
from emalgam.fit_table import Job, Summary
from emalgam.grouped_table import GroupedTable

D = 2
SAME = ("groups", "n_samples", "n_components", "means", "covariances", "log_likelihood", "n_iter", "status")


def rows_of(sizes: list[int], seed: int = 0) -> arrow.Table:
    """Groups of labels that go down, each in one piece."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes))[::-1] * 3, sizes)
    x = rng.normal(size=(len(labels), D))
    return arrow.table({"id": labels, "a": x[:, 0], "b": x[:, 1]})


def fit(table: arrow.Table, folder: Path, *, row_group_size: int = 50, **changes: Any) -> Summary:
    """Fit one component to each group of a table, and write ``out.parquet``."""
    if table is not None:
        parquet.write_table(table, folder / "table.parquet", row_group_size=row_group_size)
    resume = changes.pop("resume", False)
    settings = {"random_state": 0, "backend": "reference"} | changes.pop("settings", {})
    job: dict[str, Any] = {"by": "id", "features": ("a", "b"), "weights": None, "n_components": range(1, 2)} | changes
    return tables.fit_table(
        Job(table=folder / "table.parquet", output=folder / "out.parquet", settings=settings, **job), resume=resume
    )


def in_memory(table: arrow.Table) -> ManyFits:
    x = np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1)
    return emalgam.fit_many(x, 1, groups=table["id"].to_numpy(), random_state=0, backend="reference")


def assert_same(first: ManyFits, second: ManyFits) -> None:
    for name in SAME:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


# ---- reading


@pytest.mark.parametrize("order", ["falling", "rising", "scattered"])
@pytest.mark.parametrize(("shard", "in_memory_numbers"), [(1000, 2**25), (3, 2**25), (3, 100), (1, 1)])
def test_rows_in_any_order(
    order: str, shard: int, in_memory_numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUPS_OF_A_SHARD", shard)
    monkeypatch.setattr(tables, "NUMBERS_OF_A_SHARD", 150)
    monkeypatch.setattr(tables, "NUMBERS_IN_MEMORY", in_memory_numbers)
    monkeypatch.setattr(grouped_table, "ROWS_AT_ONCE", 17)
    table = rows_of([5, 1, 70, 2, 2, 2, 30, 40, 1, 120])
    rows = np.arange(table.num_rows)
    orders = {"falling": rows, "rising": rows[::-1], "scattered": np.random.default_rng(1).permutation(rows)}
    table = table.take(orders[order])
    summary = fit(table, tmp_path)
    assert (summary.n_groups, summary.n_samples, summary.resumed) == (10, table.num_rows, 0)
    assert_same(emalgam.load_fits(tmp_path / "out.parquet"), in_memory(table))
    labels = table["id"].to_pylist()
    assert parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == list(dict.fromkeys(labels))


def test_only_the_row_groups_of_a_group_are_read(tmp_path: Path) -> None:
    table = rows_of([50] * 8)
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    with GroupedTable(tmp_path / "t.parquet", "id") as grouped:
        groups = grouped.groups()
        assert [grouped._row_groups(groups.part(b, b + 1)) for b in range(8)] == [[b // 2] for b in range(8)]
        assert grouped._row_groups(groups.part(1, 7)) == [0, 1, 2, 3]
        assert grouped.features == ("a", "b")
        rows = grouped.rows(groups.part(3, 5))
    np.testing.assert_array_equal(rows.x[:, 0], table["a"].to_numpy()[150:250])


def test_reading_keeps_nothing_that_it_has_read(tmp_path: Path) -> None:
    """Of a table of 48 MB; pyarrow by itself would keep all of it."""
    rng = np.random.default_rng(0)
    columns = {"id": np.repeat(np.arange(100), 10_000)} | {name: rng.random(1_000_000) for name in "abcdef"}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet", row_group_size=100_000, use_dictionary=["id"])
    with GroupedTable(tmp_path / "t.parquet", "id") as grouped:
        before = most = arrow.total_allocated_bytes()
        for _ in grouped._batches(grouped.columns, range(10)):
            most = max(most, arrow.total_allocated_bytes())
    assert most - before < 16e6


LABELS = {
    "int8": arrow.array([3, -1, 2], "int8"),
    "uint64": arrow.array([2**64 - 1, 0, 2**63], "uint64"),
    "text": arrow.array(["b", "", "ä"]),
    "large text": arrow.array(["b", "", "ä"], arrow.large_string()),
    "categories": arrow.array(["b", "", "ä"]).dictionary_encode(),
    "truth": arrow.array([True, False]),
    "float": arrow.array([0.5, -1.5, 7.0]),
    "dates": arrow.array([datetime.date(2024, 2, 29), datetime.date(1969, 1, 1)]),
    "nanoseconds": arrow.array([1_700_000_000_000_000_001, 5], arrow.timestamp("ns", tz="Europe/Berlin")),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type(kind: str, tmp_path: Path) -> None:
    labels = LABELS[kind]
    n = len(labels)
    x = np.random.default_rng(0).normal(size=(20 * n, D)) + np.repeat(np.arange(n), 20)[:, None]
    table = arrow.table({"id": labels.take(np.repeat(np.arange(n), 20)), "a": x[:, 0], "b": x[:, 1]})
    fit(table, tmp_path)
    written = parquet.read_table(tmp_path / "out.parquet")
    plain = labels.dictionary_decode() if kind == "categories" else labels
    assert written["id"].combine_chunks().equals(plain)
    loaded = emalgam.load_fits(tmp_path / "out.parquet")
    order = np.argsort(plain.to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(loaded.means[:, 0], x.reshape(n, 20, D).mean(axis=1)[order])
    assert loaded.groups is not None
    assert loaded.groups.tolist() == plain.to_numpy(zero_copy_only=False)[order].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint64", "bool"])
def test_numbers_of_every_type(dtype: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 2, (40, D)).astype(dtype)
    columns = {"id": np.repeat([0, 1], 20), "a": x[:, 0], "b": x[:, 1]}
    fit(arrow.table(columns), tmp_path)
    with GroupedTable(tmp_path / "table.parquet", "id") as grouped:
        assert grouped.dtype == ("float32" if dtype == "float32" else "float64")
    np.testing.assert_allclose(
        emalgam.load_fits(tmp_path / "out.parquet").means[:, 0], x.reshape(2, 20, D).astype(float).mean(axis=1)
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_zero_has_one_sign(dtype: str, tmp_path: Path) -> None:
    labels = np.tile([-0.0, 1.5, 0.0, 1.5], 10).astype(dtype)
    table = rows_of([40]).set_column(0, "id", arrow.array(labels))
    fit(table, tmp_path)
    assert_same(emalgam.load_fits(tmp_path / "out.parquet"), in_memory(table))


@pytest.mark.parametrize("name", [None, "row"])
def test_a_row_index_of_pandas_is_no_feature(name: str | None, tmp_path: Path) -> None:
    table = rows_of([20, 30])
    frame = table.to_pandas().set_index(pandas.Index([7, *range(49)], name=name))
    written = arrow.Table.from_pandas(frame)
    assert written.num_columns == 1 + table.num_columns
    fit(written, tmp_path, features=None)
    assert_same(emalgam.load_fits(tmp_path / "out.parquet"), in_memory(table))


def test_the_output_may_be_a_link(tmp_path: Path) -> None:
    """To another disk, say: the shards have to lie there too, for one of them takes its name."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.parquet").symlink_to(tmp_path / "disk" / "fits.parquet")
    job = {"by": "id", "features": None, "weights": None, "n_components": range(1, 2), "settings": {}}
    parts = Job(table=tmp_path / "table.parquet", output=tmp_path / "out.parquet", **job).parts
    assert parts == tmp_path / "disk" / "fits.parquet.parts"
    fit(rows_of([20, 30]), tmp_path)
    assert len(emalgam.load_fits(tmp_path / "disk" / "fits.parquet")) == 2
    assert (tmp_path / "out.parquet").is_symlink()


def test_missing_weights_are_a_status(tmp_path: Path) -> None:
    table = rows_of([20, 20]).append_column("w", arrow.array([1.0] * 39 + [None]))
    assert fit(table, tmp_path, weights="w").statuses == {0: 1, 5: 1}
    assert emalgam.load_fits(tmp_path / "out.parquet").message[0].startswith("the sample weights hold")


def test_a_table_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows_of([20, 30])
    counted = GroupedTable.groups
    parquet.write_table(rows_of([21, 29]), tmp_path / "other.parquet")

    def change(self: GroupedTable) -> grouped_table.Groups:
        groups = counted(self)
        self.file = parquet.ParquetFile(tmp_path / "other.parquet")
        return groups

    monkeypatch.setattr(GroupedTable, "groups", change)
    with pytest.raises(ValueError, match=r"table\.parquet: has changed while it was read"):
        fit(table, tmp_path)


BAD_TABLES = {
    "empty": ({"sensor": arrow.array([], "int64"), "a": arrow.array([], "float64")}, "holds no rows"),
    "text": ({"sensor": [1, 1], "a": ["1", "x"]}, "column 'a' holds values of type string; expected numbers"),
    "no label": ({"sensor": ["p", None], "a": [1.0, 2.0]}, "column 'sensor' has no label in row 1"),
    "NaN label": ({"sensor": [0.5, np.nan], "a": [1.0, 2.0]}, "column 'sensor' has no label in row 1"),
    "lists": ({"sensor": [[1], [2]], "a": [1.0, 2.0]}, "column 'sensor' holds values of type list"),
    "only labels": ({"sensor": [1, 2]}, "has no columns to read; expected at least one feature"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(case: str, tmp_path: Path) -> None:
    columns, message = BAD_TABLES[case]
    with pytest.raises(ValueError, match=message) as error:
        fit(arrow.table(columns), tmp_path, by="sensor", features=None)
    assert str(error.value).startswith(str(tmp_path / "table.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


@pytest.mark.parametrize(
    ("features", "weights"), [(["a", "a"], None), (["a", "b"], "b"), (["a", "sensor"], None), (None, "sensor")]
)
def test_columns_that_are_asked_for_twice(features: list[str] | None, weights: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    parquet.write_table(arrow.table({"sensor": [1], "a": [1.0], "b": [1.0]}), path)
    with pytest.raises(ValueError, match="is asked for twice; features, weights and labels have to differ"):
        GroupedTable(path, "sensor", features, weights)


# ---- shards and the folder they are in


def test_shards_depend_on_the_groups_alone() -> None:
    offsets = np.cumsum([0, 10, 10, 10, 500, 10, 10])
    shards = tables._shards(Path("p"), offsets, 25)
    assert [(shard.first, shard.last) for shard in shards] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    together = list(tables._together(shards, offsets, 30))
    assert [[shard.first for shard in some] for some in together] == [[0, 2], [3], [4]]
    together = list(tables._together([shards[0], shards[3]], offsets, 1000))
    assert [[shard.first for shard in some] for some in together] == [[0], [4]], "only those that follow each other"


def test_an_error_before_the_first_shard_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tol is inf"):
        fit(rows_of([20]), tmp_path, settings={"tol": np.inf})
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_a_folder_that_is_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out.parquet.parts" / "mine.parquet"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"holds files and no job\.json: it is not of an unfinished run"):
        fit(rows_of([20]), tmp_path)
    assert mine.read_text() == "mine"


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    parts = tmp_path / "out.parquet.parts"
    with tables._own_parts(parts, {}, False):
        with pytest.raises(ValueError, match=r"parts: another process is writing there"):
            fit(rows_of([20]), tmp_path)
        assert (parts / "job.json").exists()


@pytest.mark.parametrize("written", ["", "[1]", '{"emalgam": 1'])
def test_a_damaged_description_is_not_gone_on_with(written: str, tmp_path: Path) -> None:
    parts = tmp_path / "out.parquet.parts"
    parts.mkdir()
    (parts / "job.json").write_text(written)
    (parts / "000000000-000000001.parquet").write_text("")
    with pytest.raises(ValueError, match="cannot be gone on with: emalgam was None and is "):
        fit(rows_of([20]), tmp_path, resume=True)
    assert len(list(parts.iterdir())) == 2
