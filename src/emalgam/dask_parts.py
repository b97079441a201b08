"""Dask arrays and data frames: partitions are worked on where they lie; only parameters and shares move.

A pass over the data is one graph. Its parameters (K · F numbers) go to each worker once, every partition gives its
share, and the shares come together through a tree whose shape depends on the number of partitions alone: the same
partitions give the same bits, whichever worker computes what, and in which order. What a worker that dies had computed
is computed again, from the same graph.

Dask is imported when it is used; whoever holds a collection has loaded it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import compress
from typing import Any, Final, TypeVar
from uuid import uuid4

import numpy as np

from emalgam import arrays, backends
from emalgam.parts import Part, Parts, Share
from emalgam.tables import number_columns, pyarrow_module
from emalgam.validation import check_data, check_finite, check_not_rounded, check_threads
from emalgam_kernels.blocks import tile_dtype

FAN_IN: Final = 16  # shares that one task of the tree combines
WIDER: Final = 'make all partitions float64: x.astype("float64")'

Result = TypeVar("Result")


def dask_module(name: str) -> Any:
    """A module of Dask; ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'a cluster needs Dask ({error}); to install it: pip install "emalgam[dask]"') from error


# ---- graphs


@dataclass(frozen=True, eq=False)
class Partitions:
    """Collections that are cut alike, as a graph.

    Attributes
    ----------
    collections : sequence
        What is persisted of them lies in the workers' memory as long as somebody has them.
    graph : dict
        How the partitions are made, of what is persisted if it is.
    keys : list of tuples
        For each partition its key in every collection.
    get : function of a graph and keys
        Of a scheduler.
    """

    collections: Sequence[Any]
    graph: dict[Any, Any]
    keys: list[tuple[Any, ...]]
    get: Callable[[Any, Any], Any]

    @classmethod
    def of(cls, collections: Sequence[Any], client: Any = None) -> Partitions:
        """Of collections with as many partitions each, on the scheduler of `client`, or else on Dask's current one."""
        get = dask_module("dask.base").get_scheduler(scheduler=client, collections=collections)
        flatten = dask_module("dask.core").flatten
        if all(map(is_array, collections)):
            optimized = dask_module("dask").optimize(*collections)  # together: what two of them need is made once
            made = [(dict(each.__dask_graph__()), flatten(each.__dask_keys__())) for each in optimized]
        else:
            made = list(map(graph_of_frame, collections))
        graph = {key: task for each, _ in made for key, task in each.items()}
        return cls(collections, graph, list(zip(*(keys for _, keys in made), strict=True)), get)

    def map(
        self, function: Callable[..., Result], common: Any, arguments: Sequence[tuple[Any, ...]] | None = None
    ) -> list[Result]:
        """``function(common, *arguments[i], *partition i)`` of each partition, to this process."""
        made, tasks = self._tasks(function, common, arguments)
        return list(self.get(self._in_place(made, tasks, {}), list(tasks)))

    def fold(
        self,
        function: Callable[..., Share],
        combine: Callable[[Share, Share], Share],
        common: Any,
        arguments: Sequence[tuple[Any, ...]] | None = None,
    ) -> Share:
        """``function(common, *arguments[i], *partition i)`` of each partition, combined through a tree."""
        spec = dask_module("dask._task_spec")
        made, tasks = self._tasks(function, common, arguments)
        tree: dict[Any, Any] = {}
        level = list(tasks)
        while len(level) > 1:
            name = f"emalgam-sum-{uuid4().hex}"
            groups = [level[start : start + FAN_IN] for start in range(0, len(level), FAN_IN)]
            level = [(name, number) for number in range(len(groups))]
            for key, group in zip(level, groups, strict=True):
                tree[key] = spec.Task(key, _combined, combine, *map(spec.TaskRef, group))
        (share,) = self.get(self._in_place(made, tasks, tree), level)
        return share

    def _tasks(
        self, function: Callable[..., Any], common: Any, arguments: Sequence[tuple[Any, ...]] | None
    ) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """What the tasks of a pass are made of, and the tasks, one for each partition.

        `common` is a node of its own, and not scattered: a worker gets it once, and what a worker loses is sent again.
        """
        spec, number = dask_module("dask._task_spec"), uuid4().hex
        name, shared = f"emalgam-{function.__name__.strip('_')}-{number}", f"emalgam-common-{number}"
        tasks = {}
        for place, (given, keys) in enumerate(zip(arguments or [()] * len(self.keys), self.keys, strict=True)):
            key = (name, place)
            tasks[key] = spec.Task(key, function, spec.TaskRef(shared), *given, *map(spec.TaskRef, keys))
        return self.graph | {shared: spec.DataNode(shared, common)}, tasks

    def _in_place(self, made: dict[Any, Any], tasks: dict[Any, Any], tree: dict[Any, Any]) -> Any:
        """All of a pass; the task of a partition that workers hold is for one of them, as long as they live.

        Without being told, a scheduler sends partitions after the parameters, to a worker that got these first and has
        less to do.
        """
        holders = self._holders()
        if not any(holders):
            return made | tasks | tree
        placed: dict[tuple[str, ...], dict[Any, Any]] = {}
        for workers, (key, task) in zip(holders, tasks.items(), strict=True):
            placed.setdefault(workers, {})[key] = task
        dask_graphs, name = dask_module("dask.highlevelgraph"), f"emalgam-pass-{uuid4().hex}"
        layers = {f"{name}-made": dask_graphs.MaterializedLayer(made)}
        for number, (workers, some) in enumerate(placed.items()):
            annotations = {"workers": list(workers), "allow_other_workers": True} if workers else None
            layers[f"{name}-{number}"] = dask_graphs.MaterializedLayer(some, annotations)
        layers[f"{name}-tree"] = dask_graphs.MaterializedLayer(tree)
        names = list(layers)
        return dask_graphs.HighLevelGraph(layers, {each: set(names[:place]) for place, each in enumerate(names)})

    def _holders(self) -> list[tuple[str, ...]]:
        """The workers that hold what each partition is made of; none if it is not persisted, or lies here."""
        client = getattr(self.get, "__self__", None)  # `get` is its method; that of Dask's threads is a function
        held = {} if client is None else client.who_has(self.collections)
        if not any(held.values()):
            return [()] * len(self.keys)
        return [tuple(sorted({worker for key in keys for worker in held.get(key, ())})) for keys in self._sources]

    @cached_property
    def _sources(self) -> list[set[Any]]:
        """For each partition its keys and those that they are made of."""
        found = []
        for keys in self.keys:
            waiting, seen = list(keys), set(keys)
            while waiting:
                new = set(getattr(self.graph.get(waiting.pop()), "dependencies", ())) - seen
                seen |= new
                waiting.extend(new)
            found.append(seen)
        return found


def graph_of_frame(frame: Any) -> tuple[dict[Any, Any], list[Any]]:
    """How a data frame, or a series, is made, and the keys of its partitions.

    These are the steps of its `optimize` but the one that tunes: that joins small partitions as they are read, as many
    as the columns suggest, so that two selections of one frame were cut differently, and neither as `npartitions` says.
    Only the columns that are asked for are read.
    """
    spec = dask_module("dask._task_spec")
    expression = frame.expr.simplify().lower_completely().simplify().fuse()
    # `from_delayed(..., verify_meta=False)` gives aliases the key of what they stand for, and what optimizes arrays
    # goes by a task's own key.
    graph = {
        key: spec.Alias(key, task.target) if isinstance(task, spec.Alias) else task
        for key, task in expression.__dask_graph__().items()
    }
    return graph, expression.__dask_keys__()


def _combined(combine: Callable[[Share, Share], Share], *shares: Share) -> Share:
    """The shares from the first to the last; a task of the tree."""
    return reduce(combine, shares)


# ---- rows


class DaskParts(Parts):
    """The rows of a Dask array or data frame.

    Parameters
    ----------
    x : dask array (N, D), its columns in one chunk, or dask data frame
        What is persisted is used where it lies. What is not is made again in every pass, and not kept. Chunks of
        unknown length (those of data frames) are counted first, which makes them once more.
    sample_weight : (N,) dask array or series in the partitions of x, or of a data frame the name of a column, optional
    columns : sequence, optional
        The features of a data frame, in this order; all columns but the weights if it is not given.
    client : distributed.Client, optional
        Where to compute; otherwise Dask's current client, or the threads of this process if there is none.

    Raises
    ------
    ValueError
        For collections of other kinds, shapes or types, or weights that are cut otherwise than the rows.
    """

    n_rows: int

    def __init__(
        self, x: Any, sample_weight: Any = None, columns: Sequence[Any] | None = None, client: Any = None
    ) -> None:
        rows, weight, self.outline = rows_and_weights(x, sample_weight, columns)
        partitions = Partitions.of([rows] if weight is None else [rows, weight], client)
        lengths = lengths_of(rows, partitions)
        if not sum(lengths):
            raise ValueError("x has no rows; expected at least one")
        self.n_features, self.dtype = int(rows.shape[1]), tile_dtype(rows)
        self.n_rows = sum(lengths)
        firsts = np.cumsum([0, *lengths[:-1]]).tolist()
        # A partition without rows has no share.
        self.partitions = replace(partitions, keys=list(compress(partitions.keys, lengths)))
        self._places = [(first, length) for first, length in zip(firsts, lengths, strict=True) if length]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.n_rows, self.n_features

    def threads(self, n_threads: int | None) -> int:
        """One for each task unless told otherwise: a worker runs as many tasks at once as it has threads."""
        return threads_of_a_task(n_threads)

    def fold(self, task: Callable[[Part], Share], combine: Callable[[Share, Share], Share]) -> Share:
        """`task` of every partition, combined through a tree."""
        arguments = [(*place, self.dtype) for place in self._places]
        return self.partitions.fold(_share, combine, task, arguments)


def threads_of_a_task(n_threads: int | None) -> int:
    """A number of threads; None means one."""
    return 1 if n_threads is None else check_threads(n_threads)


def _share(
    task: Callable[[Part], Share], first: int, n_rows: int, dtype: np.dtype, x: Any, weight: Any = None
) -> Share:
    """What a partition contributes, where it lies.

    ValueError if it has changed since its rows were counted.
    """
    x = arrays.to_numpy(x)
    if len(x) != n_rows:
        raise ValueError(
            f"the partition of row {first} has {len(x)} rows now and had {n_rows} before; data have to be the same in "
            "every pass: persist them"
        )
    check_not_rounded(f"the partition of row {first}", x.dtype, dtype, WIDER)
    return task(Part(first, x if tile_dtype(x) == dtype else x.astype(dtype), weight))


def rows_and_weights(x: Any, sample_weight: Any, columns: Sequence[Any] | None = None) -> tuple[Any, Any, Any]:
    """Dask arrays (N, D) and (N,), or None, cut alike; and what x looks like without its rows, (0, D)."""
    if is_frame(x):
        by_name = isinstance(sample_weight, str)
        features = feature_columns(x, columns, [sample_weight] if by_name else [])
        outline = x[features]._meta
        if by_name:
            rows, sample_weight = arrays_of(
                x[list(dict.fromkeys([*features, sample_weight]))], [features, sample_weight]
            )
        else:
            rows = array_of(x[features])
    elif columns is not None:
        raise ValueError("columns was given, which is for data frames; leave it out")
    else:
        rows = checked_array(x)
        outline = np.empty((0, rows.shape[1]), rows.dtype)
    return rows, None if sample_weight is None else _weights(sample_weight, rows), outline


def lengths_of(rows: Any, partitions: Partitions) -> list[int]:
    """How many rows each partition has; those of unknown length are counted."""
    lengths = rows.chunks[0]
    if not any(map(math.isnan, lengths)):
        return list(map(int, lengths))
    return partitions.map(_length, None)


def _length(_: None, x: Any, weight: Any = None) -> int:
    return len(x)


def is_array(x: Any) -> bool:
    """Whether `x` is a dask array."""
    return _is(x, "dask.array", "Array")


def is_frame(x: Any) -> bool:
    """Whether `x` is a dask data frame."""
    return _is(x, "dask.dataframe", "DataFrame")


def is_series(x: Any) -> bool:
    """Whether `x` is one column of a dask data frame."""
    return _is(x, "dask.dataframe", "Series")


def _is(x: Any, module: str, name: str) -> bool:
    """Whether `x` is of a class whose module, if it is, has been loaded."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(x, getattr(loaded, name))


def feature_columns(frame: Any, columns: Sequence[Any] | None, others: Sequence[Any]) -> list[Any]:
    """The columns of a data frame that are features; ValueError if one is absent, or does not hold numbers."""
    names = {str(name): name for name in frame.columns}
    schema = pyarrow_module("pyarrow").Schema.from_pandas(frame._meta, preserve_index=False)
    wanted = columns if columns is None or isinstance(columns, str) else list(map(str, columns))
    return [names[name] for name in number_columns(schema, wanted, list(map(str, others)), "the data frame")]


def dtype_of(frame: Any) -> np.dtype:
    """Of a data frame, or a series, as an array: float32 if all of it is, else float64."""
    types = [frame.dtype] if frame.ndim == 1 else frame.dtypes.tolist()
    return np.dtype(np.float32 if all(kind == np.float32 for kind in types) else np.float64)


def array_of(frame: Any) -> Any:
    """A data frame, or a series, as a dask array with its partitions; NaN for nulls."""
    return arrays_of(frame, [None])[0]


def arrays_of(frame: Any, selections: Sequence[Any]) -> list[Any]:
    """Dask arrays of columns of a data frame, cut alike as each partition is made once for all of them.

    A selection is a list of columns, one column, or None for the whole; NaN stands for nulls.
    """
    spec, graphs = dask_module("dask._task_spec"), dask_module("dask.highlevelgraph")
    graph, keys = graph_of_frame(frame)
    made, arrays_made = f"emalgam-partitions-{dask_module('dask.base').tokenize(frame)}", []
    for selection in selections:
        values = _values(selection, dtype_of(_selected(frame._meta, selection)), frame._meta)
        name = f"emalgam-values-{dask_module('dask.base').tokenize(frame, selection)}"
        places = [(name, number, *[0] * (values.ndim - 1)) for number in range(len(keys))]
        tasks = {
            place: spec.Task(place, _values, selection, values.dtype, spec.TaskRef(key))
            for place, key in zip(places, keys, strict=True)
        }
        whole = graphs.HighLevelGraph({made: graph, name: tasks}, {made: set(), name: {made}})
        chunks = ((math.nan,) * len(keys), *((width,) for width in values.shape[1:]))
        arrays_made.append(dask_module("dask.array").Array(whole, name, chunks, meta=values))
    return arrays_made


def _values(selection: Any, dtype: np.dtype, partition: Any) -> np.ndarray:
    """What is selected of a partition, as an array."""
    chosen = _selected(partition, selection)
    if dtype == np.float32:
        single_precision(chosen)
    values: np.ndarray = chosen.astype(dtype).to_numpy()
    return values


def _selected(partition: Any, selection: Any) -> Any:
    return partition if selection is None else partition[selection]


def single_precision(partition: Any) -> None:
    """ValueError if a partition of a data frame, or of a series, that says to hold float32 alone does not.

    Dask takes the types of many files from the first one.
    """
    for name, found in dask_module("pandas").DataFrame(partition).dtypes.items():
        check_not_rounded(f"column {name!r} of a partition", found, np.dtype(np.float32), WIDER)


def checked_array(x: Any) -> Any:
    """A dask array (N, D) with its columns in one chunk; ValueError for anything else."""
    if is_series(x):
        x = array_of(x)
    if not is_array(x):
        raise ValueError(
            f"x is a {type(x).__name__}; expected a dask array or data frame (emalgam.fit takes what is in memory)"
        )
    if any(map(math.isnan, x.shape[1:])):
        raise ValueError(f"x has shape {x.shape}; expected a known number of columns: call x.compute_chunk_sizes()")
    # All its numbers are one: what is checked is what it says of itself.
    check_data(np.broadcast_to(np.zeros((), x.dtype), tuple(1 if math.isnan(n) else int(n) for n in x.shape)))
    if x.numblocks[1] != 1:
        raise ValueError(
            f"x has its {x.shape[1]} columns in {x.numblocks[1]} chunks; expected whole rows: x.rechunk({{1: -1}})"
        )
    return x


def _weights(weight: Any, rows: Any) -> Any:
    """Weights as a dask array that is cut as the rows are."""
    weight = array_of(weight) if is_series(weight) else weight
    if not is_array(weight):
        raise ValueError(
            f"sample_weight is a {type(weight).__name__}; expected a dask array (or series) with the partitions of x, "
            "e.g. dask.array.from_array(weight, chunks=x.chunks[0]), or the name of a column of a data frame"
        )
    if weight.ndim != 1 or not _cut_alike(weight.chunks[0], rows.chunks[0]):
        raise ValueError(
            f"sample_weight has shape {weight.shape} in {weight.npartitions} chunks {_few(weight.chunks[0])}; expected "
            f"one number per row, cut as the rows are: {_few(rows.chunks[0])}; rechunk it"
        )
    return weight


def _cut_alike(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether chunks are as many and, where it is known, as long."""
    return len(a) == len(b) and all(m == n for m, n in zip(a, b, strict=True) if not (math.isnan(m) or math.isnan(n)))


def _few(lengths: Sequence[float]) -> str:
    return f"({', '.join(map(str, lengths[:5]))}{', ...' if len(lengths) > 5 else ''})"


# ---- answers row by row


def map_rows(function: Callable[..., np.ndarray], x: Any, *, n_threads: int | None = None, **how: Any) -> Any:
    """``function(rows, **how)`` of each partition: a dask array cut like x, computed when it is asked for.

    Raises
    ------
    ValueError
        As `function` does for data of the width and type of x.
    """
    rows, _, _ = rows_and_weights(x, None)
    backend = backends.resolve(how.pop("backend", "auto"))
    function = partial(function, backend=backend, n_threads=threads_of_a_task(n_threads), **how)
    nothing = function(np.zeros((1, rows.shape[1]), rows.dtype))[:0]
    shape: dict[str, Any] = {"drop_axis": 1} if nothing.ndim == 1 else {"chunks": (rows.chunks[0], nothing.shape[1:])}
    answer = partial(_answer, function, nothing)
    return rows.map_blocks(answer, token="emalgam", dtype=nothing.dtype, meta=nothing, **shape)


def _answer(
    function: Callable[[np.ndarray], np.ndarray],
    nothing: np.ndarray,
    x: np.ndarray,
    block_info: Any = None,
) -> np.ndarray:
    if not len(x):
        return nothing
    try:
        return function(x)
    except ValueError as error:
        where = block_info[0]
        first = where["array-location"][0][0]
        if not math.isnan(first):
            check_finite(x, first=first)
        number = where["chunk-location"][0]
        raise ValueError(f"{error} (rows are counted from the first of partition {number})") from error
