"""The rows of a Parquet table by groups: a bounded number of rows in memory, groups in any order and of any size.

A first pass reads the column of the labels and counts. Groups are numbered as they first appear in the table; what
follows asks for the rows of some consecutive groups (`GroupedTable.rows`), and only the row groups of the file that
may hold them are read. If the rows of each group lie together, that is one pass over the table; if they are scattered,
it is one pass for each time that rows are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from emalgam.tables import number_columns, numbers_of, open_parquet, pyarrow_module, reading

ROWS_AT_ONCE: Final = 2**16

__all__ = ["GroupedTable", "Groups", "Rows"]


@dataclass(frozen=True, eq=False)
class Groups:
    """Where the groups of a table are, in the order of their first rows.

    Attributes
    ----------
    labels : (B,) pyarrow.Array
    codes : dict
        The number of each label.
    offsets : (B + 1,) int64
        Group b has offsets[b + 1] − offsets[b] rows.
    begins, ends : (B,) int64
        The first row of each, and the one after its last.
    ranks : (B,) int64
        The place of each label among all labels in ascending order.
    """

    labels: Any
    codes: dict[Any, int]
    offsets: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    ranks: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def part(self, first: int, last: int) -> Groups:
        """Groups `first` to `last`, without the last; numbered from 0, with the ranks that they have among all."""
        which = slice(first, last)
        labels = self.labels.take(np.arange(first, last))  # a slice would be pickled with all the others
        codes = {key: number for number, key in enumerate(_keys(labels))}
        offsets = self.offsets[first : last + 1] - self.offsets[first]
        return Groups(labels, codes, offsets, self.begins[which], self.ends[which], self.ranks[which])


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of some groups, one group after the other: (n, D) and, if the table has weights, (n,) float64."""

    x: np.ndarray
    weight: np.ndarray | None


class GroupedTable:
    """A Parquet file, the column of its labels, those of its features and perhaps that of its weights.

    Parameters
    ----------
    path : path-like
    by : str
        The labels: integers, numbers, text, booleans, dates or times.
    features : sequence of str, optional
        Columns of numbers, all but `by`, `weights` and a row index of pandas by default. The data are float32 if all of
        them are, else float64. A missing value is NaN.
    weights : str, optional

    Raises
    ------
    ValueError
        Naming the file: missing, damaged, empty, without such a column (listing those there are), not numbers, or
        a label that is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        by: str,
        features: Sequence[str] | None = None,
        weights: str | None = None,
    ) -> None:
        self.path, self.by, self.weights = Path(path), by, weights
        if self.path.is_dir():
            raise ValueError(f"{self.path}: is a folder; expected one Parquet file")
        with reading(self.path):
            self.file = open_parquet(self.path)
            schema = self.file.schema_arrow
            self.features = tuple(number_columns(schema, features, [by, *self._weights]))
            self._check_types()
            if self.n_samples == 0:
                raise ValueError("holds no rows")

    @property
    def columns(self) -> list[str]:
        """Everything that is read."""
        return [self.by, *self.features, *self._weights]

    @property
    def _weights(self) -> list[str]:
        """The column of weights, if there is one."""
        return [] if self.weights is None else [self.weights]

    def _check_types(self) -> None:
        """Labels of a type that has equality, weights that are numbers."""
        types, schema = pyarrow_module("pyarrow").types, self.file.schema_arrow
        kind = schema.field(self.by).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        known = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
        if not any(is_known(kind) for is_known in (*known, types.is_date, types.is_timestamp)):
            raise ValueError(
                f"column {self.by!r} holds values of type {kind}; expected numbers, text or dates as labels"
            )
        none = schema.empty_table()
        self.dtype = numbers_of(none.select(self.features)).dtype
        numbers_of(none.select(self._weights))

    def __enter__(self) -> GroupedTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def n_samples(self) -> int:
        return int(self.file.metadata.num_rows)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this table from another, or from itself before it was written again."""
        state = self.path.stat()
        schema = {field.name: str(field.type) for field in self.file.schema_arrow}
        return {"rows": self.n_samples, "bytes": state.st_size, "modified": state.st_mtime_ns, "columns": schema}

    def groups(self) -> Groups:
        """The first pass: every label, how often it occurs and where."""
        codes: dict[Any, int] = {}
        labels = []
        seen = np.zeros((0, 3), np.int64)  # rows, first row, and one after the last, of each group
        for first, batch in self._batches([self.by], range(self.file.num_row_groups)):
            distinct, local = self._encoded(batch.column(0), first)
            known = len(codes)
            found = np.array([codes.setdefault(key, len(codes)) for key in _keys(distinct)], np.int64)
            new = found >= known
            seen = _grown(seen, len(codes))
            rows = np.arange(len(local))
            own = np.zeros((len(found), 2), np.int64)
            own[local[::-1], 0], own[local, 1] = rows[::-1], rows + 1  # of equal indices the last one counts
            seen[found, 0] += np.bincount(local, minlength=len(found))
            seen[found[new], 1] = first + own[new, 0]
            seen[found, 2] = first + own[:, 1]
            labels.append(distinct.filter(pyarrow_module("pyarrow").array(new)))
        seen = seen[: len(codes)]
        offsets = np.concatenate([[0], np.cumsum(seen[:, 0])])
        everything = pyarrow_module("pyarrow").concat_arrays(labels)
        return Groups(everything, codes, offsets, seen[:, 1], seen[:, 2], _ranks(everything))

    def rows(self, groups: Groups) -> Rows:
        """The rows of some groups, one group after the other; those of a group in the order of the table.

        Raises
        ------
        ValueError
            If the table has changed since the groups were counted.
        """
        x = np.empty((int(groups.offsets[-1]), len(self.features)), self.dtype)
        weight = None if self.weights is None else np.empty(len(x))
        filled = groups.offsets[:-1].copy()
        for start, batch in self._batches(self.columns, self._row_groups(groups)):
            distinct, local = self._encoded(batch.column(self.by), start)
            codes = np.array([groups.codes.get(key, -1) for key in _keys(distinct)], np.int64)[local]
            chosen = np.flatnonzero(codes >= 0)
            places = _places(codes[chosen], filled)
            if (places >= groups.offsets[codes[chosen] + 1]).any():
                break
            x[places] = self._numbers(batch, self.features)[chosen]
            if weight is not None:
                weight[places] = self._numbers(batch, self.columns[-1:])[chosen, 0]
        if (filled != groups.offsets[1:]).any():
            raise ValueError(f"{self.path}: has changed while it was read")
        return Rows(x, weight)

    def _row_groups(self, groups: Groups) -> list[int]:
        """The row groups of the file that may hold rows of these groups."""
        begin, end = int(groups.begins.min()), int(groups.ends.max())
        ends = np.cumsum([self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)])
        return list(range(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(ends, end, "left")) + 1))

    def _batches(self, columns: list[str], row_groups: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Pieces of some row groups that follow each other, each with the number of its first row."""
        with reading(self.path):
            first = sum(self.file.metadata.row_group(i).num_rows for i in range(row_groups[0])) if row_groups else 0
            for batch in self.file.iter_batches(ROWS_AT_ONCE, row_groups=list(row_groups), columns=columns):
                yield first, batch
                first += len(batch)

    def _encoded(self, column: Any, first: int) -> tuple[Any, np.ndarray]:
        """The distinct labels of a piece of the column, and which of them each row has."""
        arrow, compute = pyarrow_module("pyarrow"), pyarrow_module("pyarrow.compute")
        if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        missing = compute.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)
        if missing.any():
            row = first + int(missing.argmax())
            raise ValueError(f"{self.path}: column {self.by!r} has no label in row {row}; expected one in each row")
        if arrow.types.is_floating(column.type):
            column = arrow.array(column.to_numpy() + 0)  # −0 + 0 is 0, the same label
        encoded = column.dictionary_encode()
        return encoded.dictionary, encoded.indices.to_numpy()

    def _numbers(self, batch: Any, columns: Sequence[str]) -> np.ndarray:
        return numbers_of(pyarrow_module("pyarrow").Table.from_batches([batch]).select(columns))


def _keys(labels: Any) -> list[Any]:
    """Labels as objects of Python that can be compared."""
    keys: list[Any] = labels.to_numpy(zero_copy_only=False).tolist()
    return keys


def _ranks(labels: Any) -> np.ndarray:
    """The place of each label among all in ascending order, (B,) int64."""
    arrow = pyarrow_module("pyarrow")
    if arrow.types.is_float16(labels.type):  # which Arrow does not sort
        labels = labels.cast(arrow.float32())
    ascending = pyarrow_module("pyarrow.compute").array_sort_indices(labels).to_numpy()
    ranks = np.empty(len(labels), np.int64)
    ranks[ascending] = np.arange(len(labels))
    return ranks


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """The array with room for `size` rows: twice as much as is needed, so that it seldom grows."""
    if size <= len(array):
        return array
    return np.concatenate([array, np.zeros((2 * size - len(array), *array.shape[1:]), array.dtype)])


def _places(codes: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Where rows of the groups `codes` go, each behind those of its group before it; `filled` moves on."""
    counts = np.bincount(codes, minlength=len(filled))
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    places = np.empty(len(codes), np.int64)
    places[order] = filled[ordered] + np.arange(len(codes)) - (np.cumsum(counts) - counts)[ordered]
    filled += counts
    return places
