"""Fits on a Dask cluster: rows stay where they lie, and only parameters and statistics move.

`fit` is `emalgam.fit` over the partitions of a dask array or data frame, and gives the same mixture to rounding;
`fit_many` is `emalgam.fit_many`, and gives the same bits. `emalgam.fit`, `GaussianMixture` and `Mixture` take Dask's
collections too; here are the options that only a cluster has.

What is persisted is used where it lies. What is not is made again in every pass, from files for example, and dropped;
nothing is persisted behind your back: ``x = x.persist()`` if it fits the workers' memory. A task uses one thread unless
`n_threads` says otherwise, so that workers may have as many threads as processors. A worker that dies costs the time to
make its partitions again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np

from emalgam import backends, batch, em
from emalgam.batch import ManyFits
from emalgam.dask_parts import (
    DaskParts,
    Partitions,
    dask_module,
    dtype_of,
    feature_columns,
    graph_of_frame,
    is_array,
    is_frame,
    single_precision,
    threads_of_a_task,
)
from emalgam.draws import philox_seed
from emalgam.fit_table import Job, Piece, Shard, pieces
from emalgam.grouped_table import GroupedTable, Groups
from emalgam.problems import check_labels, component_counts

PIECES_OF_A_SLOT: Final = 4  # that a thread of a worker gets at least, if there are enough shards

__all__ = ["connected", "fit", "fit_many", "fit_shards", "read_parquet"]


def fit(
    x: Any,
    n_components: int,
    *,
    sample_weight: Any = None,
    columns: Sequence[Any] | None = None,
    client: Any = None,
    **how: Any,
) -> em.Fit:
    """Fit a Gaussian mixture to a dask array or data frame; `emalgam.fit` on a cluster.

    Parameters
    ----------
    x : dask array (N, D), its columns in one chunk, or dask data frame
        Any real dtype.
    n_components : int
        K.
    sample_weight : (N,) dask array or series in the partitions of x, or of a data frame the name of a column, optional
        A column of this name is no feature.
    columns : sequence, optional
        The features of a data frame, in this order; all columns but the weights if it is not given.
    client : distributed.Client, optional
        Where to compute; otherwise Dask's current client, or the threads of this process if there is none.
    **how
        As in `emalgam.fit`. `backend` is chosen here and has to run on every worker. `n_threads` is that of a task;
        None means one.

    Returns
    -------
    Fit
        The one-machine fit to rounding, and the same bits for the same partitions on any number of like workers.

    Raises
    ------
    ValueError
        As in `emalgam.fit`, and for collections of other kinds or shapes, or weights that are cut otherwise than x.
    BackendUnavailable
        If the backend cannot run here, or on a worker.
    ImportError
        If Dask is not installed.

    Examples
    --------
    >>> import dask.array as da
    >>> import emalgam.distributed
    >>> rng = da.random.default_rng(0)
    >>> x = rng.normal(size=(4000, 2), chunks=(1000, 2)) + 9 * rng.integers(0, 2, (4000, 1), chunks=(1000, 1))
    >>> result = emalgam.distributed.fit(x.persist(), 2, random_state=0)
    >>> sorted(result.mixture.means[:, 0].round().astype(int).tolist())
    [0, 9]
    """
    return em.fit(DaskParts(x, sample_weight, columns, client), n_components, **how)


def fit_many(
    X: Any,
    n_components: Any,
    *,
    groups: str | None = None,
    columns: Sequence[Any] | None = None,
    sample_weight: Any = None,
    random_state: Any = None,
    n_threads: int | None = None,
    client: Any = None,
    **how: Any,
) -> ManyFits:
    """Fit a mixture to each of many sets of samples on a cluster; `emalgam.fit_many` over partitions.

    A problem's random numbers depend on (random_state, its number) alone: its index along B, or the rank of its label
    among all. The result has the bits of `emalgam.fit_many`, whatever the partitions and the workers.

    Parameters
    ----------
    X : dask array (B, N, D) with chunks along B only, or dask data frame
        The problems of a chunk are fitted where it lies. Rows of a data frame are shuffled first, so that each group is
        whole: nearly every row goes once over the network and into its new worker's memory or disk, with the number of
        its group, its own, and 8 bytes for each number (float32: 4). Any group has to fit a worker's memory.
    n_components : int, (B,) integers, or range
        As in `emalgam.fit_many`.
    groups : str
        Of a data frame: the column of labels.
    columns : sequence, optional
        The features of a data frame; all columns but the labels and weights if it is not given.
    sample_weight : dask array (B, N) with the chunks of X, or of a data frame the name of a column, optional
    random_state : None, int or NumPy generator
    n_threads : int, optional
        Of a task; None means one.
    client : distributed.Client, optional
        As in `fit`.
    **how
        As in `emalgam.fit_many`; `numbers`, `offsets` and `progress` are for data in memory.

    Returns
    -------
    ManyFits
        In this process.

    Raises
    ------
    ValueError
        For arguments of a wrong form; what is wrong with a single problem is in its `status`.
    BackendUnavailable
        If the backend cannot run here, or on a worker.
    ImportError
        If Dask is not installed.

    Examples
    --------
    >>> import dask.array as da
    >>> import emalgam.distributed
    >>> X = da.random.default_rng(0).normal(size=(6, 60, 2), chunks=(2, 60, 2))
    >>> emalgam.distributed.fit_many(X, 2, random_state=0).means.shape
    (6, 2, 2)
    """
    for name in ("numbers", "offsets", "progress"):
        if name in how:
            raise ValueError(f"{name} is for data in memory; leave it out, or call emalgam.fit_many")
    how |= {
        "random_state": philox_seed(random_state),
        "backend": backends.resolve(how.get("backend", "auto")),
        "n_threads": threads_of_a_task(n_threads),
    }
    if is_frame(X):
        with client.as_current() if client is not None else nullcontext():  # shuffles ask which one is
            return _fit_groups(X, n_components, _Table.of(X, groups, columns, sample_weight), how, client)
    if groups is not None or columns is not None:
        raise ValueError("groups and columns are for data frames; leave them out, or give a dask data frame")
    return _fit_stack(X, n_components, sample_weight, how, client)


# ---- problems in an array


def _fit_stack(X: Any, n_components: Any, sample_weight: Any, how: dict[str, Any], client: Any) -> ManyFits:
    """The problems of a dask array (B, N, D), chunk by chunk."""
    if not is_array(X) or X.ndim != 3:
        received = f"has shape {X.shape}" if is_array(X) else f"is a {type(X).__name__}"
        raise ValueError(
            f"X {received}; expected a dask array (B, N, D), or a dask data frame with groups (emalgam.fit_many takes "
            "what is in memory)"
        )
    if X.numblocks[1:] != (1, 1) or np.isnan(X.shape).any():
        raise ValueError(
            f"X has shape {X.shape} in chunks of {X.chunksize}; expected whole problems, and how many: "
            "X.rechunk({1: -1, 2: -1})"
        )
    if sample_weight is not None and not (is_array(sample_weight) and sample_weight.chunks == X.chunks[:2]):
        received = getattr(sample_weight, "chunks", type(sample_weight).__name__)
        raise ValueError(f"sample_weight has chunks {received}; expected a dask array with chunks {X.chunks[:2]}")
    component_counts(n_components, X.shape[0])
    nothing = batch.fit_many(np.empty((0, 1, X.shape[2])), _counts_of(n_components, slice(0)), **how)
    ends = np.cumsum(X.chunks[0])
    numbers = [np.arange(end - size, end) for end, size in zip(ends, X.chunks[0], strict=True)]
    arguments = [(_counts_of(n_components, each), each) for each in numbers]
    partitions = Partitions.of([X] if sample_weight is None else [X, sample_weight], client)
    return _joined([nothing, *partitions.map(_fit_problems, how, arguments)])


def _fit_problems(
    how: dict[str, Any], n_components: Any, numbers: np.ndarray, x: np.ndarray, weight: np.ndarray | None = None
) -> ManyFits:
    """The fits of one chunk, where it lies."""
    return batch.fit_many(x, n_components, sample_weight=weight, numbers=numbers, **how)


def _counts_of(n_components: Any, which: Any) -> Any:
    """What `n_components` says of some of the problems."""
    of_all = isinstance(n_components, int | np.integer | range)
    return n_components if of_all else np.asarray(n_components)[which]


def _joined(parts: Sequence[ManyFits]) -> ManyFits:
    """The fits of all parts, one part after the other."""
    most = max(part.weights.shape[1] for part in parts)
    joined: dict[str, Any] = {
        field.name: np.concatenate([_padded(part, field.name, most) for part in parts])
        for field in fields(ManyFits)
        if isinstance(getattr(parts[0], field.name), np.ndarray)
    }
    return replace(parts[-1], **joined)


def _padded(fits: ManyFits, name: str, most: int) -> np.ndarray:
    """An array of the fits, with as many places for components as all parts have."""
    values: np.ndarray = getattr(fits, name)
    by_component = name in ("weights", "means") or (name == "covariances" and fits.covariance_type != "tied")
    if not by_component or values.shape[1] == most:
        return values
    places = np.full((len(values), most - values.shape[1], *values.shape[2:]), np.nan)
    return np.concatenate([values, places], axis=1)


# ---- problems in a data frame


@dataclass(frozen=True)
class _Table:
    """What is read of a data frame: the columns of labels, features and weights, and the type of the features."""

    groups: str
    features: tuple[Any, ...]
    weight: str | None
    dtype: np.dtype

    @classmethod
    def of(cls, frame: Any, groups: Any, columns: Sequence[Any] | None, weight: Any) -> _Table:
        if not isinstance(groups, str) or not isinstance(weight, str | None):
            raise ValueError(
                f"groups is {groups!r} and sample_weight {weight!r}; expected the name of a column for each (None for "
                "weights: there are none)"
            )
        features = feature_columns(frame, columns, [groups] if weight is None else [groups, weight])
        return cls(groups, tuple(features), weight, dtype_of(frame[features]))

    @property
    def columns(self) -> list[Any]:
        """All that is read."""
        return list(dict.fromkeys([self.groups, *self.features, *([] if self.weight is None else [self.weight])]))

    @property
    def names(self) -> list[str]:
        """Of the features once their rows are numbered."""
        return [f"x{number}" for number in range(len(self.features))]

    def numbered(self, frame: Any, first: int, labels: np.ndarray) -> Any:
        """The rows of a partition with the number of their problem and their own, as a pandas data frame."""
        pandas = dask_module("pandas")
        numbers = {
            "problem": np.searchsorted(labels, labels_of(frame[self.groups])[0]),
            "row": first + np.arange(len(frame)),
        }
        if self.dtype == np.float32:
            single_precision(frame[list(self.features)])
        kept = {name: frame[column].astype(self.dtype) for name, column in zip(self.names, self.features, strict=True)}
        if self.weight is not None:
            kept["weight"] = frame[self.weight].astype(np.float64)
        return pandas.DataFrame(numbers | {name: column.to_numpy() for name, column in kept.items()})


def labels_of(column: Any) -> tuple[np.ndarray, int | None]:
    """The labels in a pandas series up to the first that is missing, and the row of that one, if there is one."""
    missing = np.flatnonzero(column.isna())
    end = int(missing[0]) if len(missing) else None
    labels: np.ndarray = column.iloc[:end].to_numpy()
    if labels.dtype.kind == "O":
        check_labels(labels)  # before NumPy makes one type of several
        labels = np.array(labels.tolist())
    return labels, end


def _fit_groups(frame: Any, n_components: Any, table: _Table, how: dict[str, Any], client: Any) -> ManyFits:
    """The groups of a dask data frame: one pass for the labels, the shuffle, and the fits."""
    labels, sizes = Partitions.of([frame[table.groups]], client).fold(_labels_and_size, _merged, None)
    lengths = _lengths(table.groups, sizes)
    component_counts(n_components, len(labels))
    empty, none = np.empty((0, len(table.features))), np.empty(0, np.int64)
    nothing = batch.fit_many(empty, _counts_of(n_components, none), groups=none, **how)
    whole = Partitions.of([_whole_groups(frame, table, labels, lengths)], client)
    parts: list[Any] = whole.map(_fit_whole_groups, (table, n_components, how))
    parts = [nothing, *(part for part in parts if part is not None)]
    order = np.argsort(np.concatenate([part.groups for part in parts]))
    return replace(_joined(parts)[order], groups=labels)


Labels = tuple[np.ndarray, list[tuple[int, int | None]]]


def _labels_and_size(_: None, column: Any) -> Labels:
    """The distinct labels of a partition; its length, and the first row without a label."""
    labels, missing = labels_of(column)
    return np.unique(labels), [(len(column), missing)]


def _lengths(name: str, sizes: list[tuple[int, int | None]]) -> list[int]:
    """The lengths of partitions; ValueError naming the first row without a label."""
    first = 0
    for length, missing in sizes:
        if missing is not None:
            raise ValueError(f"column {name!r} has no label in row {first + missing}; expected one for each row")
        first += length
    return [length for length, _ in sizes]


def _merged(a: Labels, b: Labels) -> Labels:
    """Labels and sizes of two runs of partitions; one without rows says nothing of the labels' type."""
    if not len(a[0]) or not len(b[0]):
        return (a if len(a[0]) else b)[0], a[1] + b[1]
    check_labels(np.array([a[0][:1].tolist()[0], b[0][:1].tolist()[0]], dtype=object))
    return np.union1d(a[0], b[0]), a[1] + b[1]


def _whole_groups(frame: Any, table: _Table, labels: np.ndarray, lengths: Sequence[int]) -> Any:
    """The rows, numbered, in partitions that hold the whole of every group in them."""
    delayed, high_level = dask_module("dask.delayed"), dask_module("dask.highlevelgraph").HighLevelGraph
    graph, keys = graph_of_frame(frame[table.columns])
    layer, node = f"emalgam-rows-{uuid4().hex}", delayed.delayed(labels)
    made = high_level.from_collections(layer, graph)
    firsts = np.cumsum([0, *lengths[:-1]]).tolist()
    parts = [
        delayed.delayed(table.numbered)(delayed.Delayed(key, made, layer=layer), first, node)
        for key, first in zip(keys, firsts, strict=True)
    ]
    meta = table.numbered(frame._meta, 0, labels)
    numbered = dask_module("dask.dataframe").from_delayed(parts, meta=meta, verify_meta=False)
    return numbered.shuffle(on="problem", npartitions=len(keys))


def _fit_whole_groups(shared: tuple[_Table, Any, dict[str, Any]], frame: Any) -> ManyFits | None:
    """The fits of a partition's groups, their rows in the order of all; None without rows."""
    table, n_components, how = shared
    if not len(frame):
        return None
    order = np.lexsort((frame["row"].to_numpy(), frame["problem"].to_numpy()))
    frame = frame.iloc[order]
    problems = frame["problem"].to_numpy()
    numbers = np.unique(problems)
    return batch.fit_many(
        frame[table.names].to_numpy(table.dtype),
        _counts_of(n_components, numbers),
        groups=problems,
        sample_weight=None if table.weight is None else frame["weight"].to_numpy(),
        numbers=numbers,
        **how,
    )


# ---- what the command line needs


def fit_shards(
    client: Any,
    job: Job,
    table: GroupedTable,
    groups: Groups,
    shards: list[Shard],
    n_threads: int | None,
    advance: Callable[[int], object],
) -> Iterator[tuple[Shard, ManyFits]]:
    """The fits of each shard of ``emalgam fit-many``, in any order: workers read and fit, and few results wait for us.

    `advance` is told how many more groups are done.

    Raises
    ------
    ValueError
        If a worker finds no table under the path, or another one.
    """
    job, there, threads = replace(job, table=job.table.absolute()), _content(table), threads_of_a_task(n_threads)
    slots = max(sum(client.nthreads().values()), 1)
    waiting = pieces(groups, shards, len(table.features), PIECES_OF_A_SLOT * slots)

    def begun(count: int) -> list[Any]:
        some = islice(waiting, count)
        return [client.submit(_fit_piece, job, piece, there, threads, pure=False) for piece in some]

    as_completed = dask_module("distributed").as_completed
    running = as_completed(begun(2 * slots), loop=client.loop, with_results=True)
    for _, fitted in running:
        running.update(begun(1))
        advance(sum(len(fits) for _, fits in fitted))
        yield from fitted


def _fit_piece(job: Job, piece: Piece, there: dict[str, Any], n_threads: int) -> list[tuple[Shard, ManyFits]]:
    """The fits of some shards, by a worker."""
    try:
        with job.open() as table:
            if (here := _content(table)) != there:
                raise ValueError(f"{job.table}: is another table: {here} instead of {there}")
            return list(zip(piece.shards, piece.fits(job, table, n_threads), strict=True))
    except ValueError as error:
        worker = dask_module("distributed").get_worker().address
        raise ValueError(f"{error} (on worker {worker}; all have to find the table under its path)") from error


def _content(table: GroupedTable) -> dict[str, Any]:
    """What copies of a table have in common."""
    return {name: value for name, value in table.fingerprint().items() if name != "modified"}


def read_parquet(path: str | os.PathLike[str]) -> Any:
    """A Parquet file, or a folder of them, as a dask data frame; workers have to find it under the same path.

    ValueError naming the path if it cannot be read.
    """
    file = Path(path).absolute()
    if file.suffix.lower() != ".parquet" and not file.is_dir():
        raise ValueError(f"{file}: cannot be read on a cluster; expected a .parquet file, or a folder of them")
    try:
        return dask_module("dask.dataframe").read_parquet(str(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of the scheduler at `address`, which is Dask's current one inside the block.

    Raises
    ------
    ValueError
        If no scheduler answers there or it has no workers, in the time that Dask's configuration gives
        (``distributed.comm.timeouts.connect``), or the workers died of what they were given.
    ImportError
        If Dask is not installed.
    """
    distributed = dask_module("distributed")
    try:
        client = distributed.Client(address)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no Dask scheduler at {address} ({error}); start one with `dask scheduler`, or correct the "
            "address"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, dask_module("dask").config.get("distributed.comm.timeouts.connect"))
        except TimeoutError:
            raise ValueError(
                f"the Dask scheduler at {address} has no workers; start some with `dask worker {address}`"
            ) from None
        try:
            yield client
        except distributed.KilledWorker as error:
            raise ValueError(
                f"the workers of {address} died of what they were given, of too little memory perhaps ({error})"
            ) from error
        except distributed.CancelledError as error:
            raise ValueError(f"the Dask scheduler at {address} was lost ({error})") from error
