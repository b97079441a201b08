"""Data larger than memory, a chunk at a time: memory maps, Parquet files and folders, any iterable of chunks.

`open_stream` makes a `Stream`, which `emalgam.fit`, `GaussianMixture` and `Mixture` take in place of an array. Every
pass goes through it once, and a thread reads ahead of the compute. EM on it is exact, in memory of a few chunks and
K · F statistics.
"""

from __future__ import annotations

import mmap
import os
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial, wraps
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar, cast

import numpy as np

from emalgam import backends
from emalgam.arrays import on_dask, to_numbers
from emalgam.parts import Part, Parts, Share
from emalgam.tables import number_columns, number_dtype, numbers_of, open_parquet, pyarrow_module, read_table, reading
from emalgam.validation import check_data, check_integer, check_not_rounded
from emalgam_kernels.blocks import Background, tile_dtype

ELEMENTS_OF_A_CHUNK: Final = 2**22  # numbers that are copied at once
ELEMENTS_OF_A_VIEW: Final = 2**24  # numbers that are looked at at once where they lie
CHUNKS_AHEAD: Final = 2

Chunk = tuple[np.ndarray, np.ndarray | None]


def open_stream(
    source: Any, *, columns: Sequence[str] | None = None, sample_weight: Any = None, chunk_rows: int | None = None
) -> Stream:
    """A `Stream` of what `source` says.

    Parameters
    ----------
    source : path, array or iterable
        The path of a ``.npy`` file (memory-mapped), a ``.parquet`` file or a folder of them; an (N, D) array, such as a
        memory map, a data frame or a tensor; a list or other re-iterable object of chunks (torch's DataLoader), or a
        function that returns an iterator of them: each chunk an (n, D) array, or a pair of one and its (n,) weights.
    columns : sequence of str, optional
        Parquet: which columns, in which order; all others than the weights' if it is not given.
    sample_weight : str or (N,) array, optional
        The name of a Parquet column; for an array or ``.npy`` an array.
    chunk_rows : int, optional
        How many rows go to the kernels at once; the default suits them.

    Raises
    ------
    ValueError
        If there is no such file, it is none of these, or an argument does not go with it.

    Examples
    --------
    >>> import numpy as np
    >>> import emalgam
    >>> def chunks():
    ...     rng = np.random.default_rng(0)
    ...     for _ in range(20):
    ...         yield rng.normal(size=(500, 2)) + 9 * rng.integers(0, 2, (500, 1))
    >>> result = emalgam.fit(emalgam.open_stream(chunks), 2, random_state=0)
    >>> sorted(result.mixture.means[:, 0].round().astype(int).tolist())
    [0, 9]
    """
    if chunk_rows is not None:
        chunk_rows = check_integer("chunk_rows", chunk_rows, 1)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir() or path.suffix.lower() == ".parquet":
            return ParquetStream(path, columns, sample_weight, chunk_rows)
        if path.suffix.lower() != ".npy":
            raise ValueError(
                f"{path}: cannot be read in chunks; expected a .npy or .parquet file, or a folder of the latter"
            )
        source = read_table(path)
    if columns is not None:
        raise ValueError("columns was given, which is for Parquet; leave it out")
    if hasattr(source, "shape"):
        return ArrayStream(to_numbers(source), sample_weight, chunk_rows)
    if sample_weight is not None:
        raise ValueError("sample_weight was given beside an iterable; let it yield pairs of chunks and weights instead")
    return IterableStream(source, chunk_rows)


def as_stream(x: Any) -> Stream | None:
    """The stream that `x` is or, as a path, names; None for anything else."""
    if isinstance(x, Stream):
        return x
    return open_stream(x) if isinstance(x, str | os.PathLike) else None


def for_many_passes(x: Any, sample_weight: Any, backend: str) -> tuple[Any, Any]:
    """`x` and its weights, or the parts that hold both: of a path, of a memory map (nothing is kept), and of Dask.

    A memory map for a GPU stays as it is: it is sent there once if it fits, else in pieces that overlap the compute.
    ValueError for chunks that nobody made a stream of.
    """
    if isinstance(x, Iterator) or callable(x) or (isinstance(x, list | tuple) and len(x) and _is_chunk(x[0])):
        raise ValueError(
            f"x is a {type(x).__name__}; expected rows in one array, a path, or a stream: emalgam.open_stream takes "
            "lists of chunks and functions that return a new iterator of them, emalgam.fit_stepwise takes iterators"
        )
    if on_dask(x):
        from emalgam.dask_parts import DaskParts

        return DaskParts(x, sample_weight), None
    mapped = isinstance(x, np.memmap) and backends.resolve(backend) != "numba_cuda"
    if not (mapped or isinstance(x, str | os.PathLike)):
        return x, sample_weight
    return open_stream(x, sample_weight=sample_weight), None


def one_pass(source: Any) -> Iterator[Chunk]:
    """The chunks of a stream, of what `open_stream` makes one of, or of an iterable that can be gone through once."""
    if isinstance(source, Iterable) and not isinstance(source, str) and not hasattr(source, "shape"):
        return checked_chunks(source)
    return (as_stream(source) or open_stream(source)).chunks()


Method = TypeVar("Method", bound=Callable[..., Any])


def over_chunks(method: Method) -> Method:
    """Let a method of ``(self, x, **how)`` that answers row by row take streams, paths, and collections of Dask."""

    @wraps(method)
    def answer(self: Any, x: Any, **how: Any) -> Any:
        if on_dask(x):
            from emalgam.dask_parts import map_rows

            return map_rows(partial(method, self), x, **how)
        stream = as_stream(x)
        return method(self, x, **how) if stream is None else np.concatenate([*stream.map(partial(method, self, **how))])

    return cast(Method, answer)


class Stream(Parts):
    """Rows that are read in order, a chunk at a time, as often as wanted."""

    n_features: int
    dtype: np.dtype
    rows_of_a_pass: int | None = None  # of those so far

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """From the first row to the last: (n, D) arrays with their weights (n,), or None."""

    def parts(self) -> Generator[Part]:
        """The chunks as `Part`s, while a thread reads the next ones."""
        first = 0
        with closing(read_ahead(self.chunks())) as chunks:
            for x, weight in chunks:
                yield Part(first, x, weight)
                first += len(x)

    def fold(self, task: Callable[[Part], Share], combine: Callable[[Share, Share], Share]) -> Share:
        """`task` of every chunk, combined from the first to the last.

        ValueError if there is none, or if there are more or fewer rows than in the passes before.
        """
        total: Share | None = None
        rows = 0
        with closing(self.parts()) as parts:
            for part in parts:
                share = task(part)
                total = share if total is None else combine(total, share)
                rows = part.first + len(part.x)
        if self.rows_of_a_pass not in (None, rows):
            raise ValueError(
                f"the stream has {rows} rows in this pass and had {self.rows_of_a_pass} before; data have to be the "
                "same in every pass: open a new stream for other data, or use fit_stepwise, which needs one pass"
            )
        if total is None:
            raise ValueError("the stream has no rows; expected at least one")
        self.rows_of_a_pass = rows
        return total

    def map(self, function: Callable[[np.ndarray], Any]) -> Generator[Any]:
        """``function(x)`` of each chunk, in order: results that need not be in memory together.

        >>> import numpy as np
        >>> from emalgam import Mixture, open_stream
        >>> unit = Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1), "spherical")
        >>> rows = open_stream([np.zeros((3, 2)), np.ones((2, 2))])
        >>> [log_prob.shape for log_prob in rows.map(unit.log_prob)]
        [(5,)]
        """
        with closing(self.parts()) as parts:
            for part in parts:
                try:
                    yield function(part.x)
                except ValueError as error:
                    raise ValueError(f"{error} (rows are counted from row {part.first} of the stream)") from error


class WatchedStream(Stream):
    """A stream that counts its passes and rows, and tells somebody of each chunk that was computed.

    Parameters
    ----------
    stream : Stream
    seen : function of two integers
        The pass, from 1 on, and how many of its rows are done.
    """

    def __init__(self, stream: Stream, seen: Callable[[int, int], None] = lambda number, rows: None) -> None:
        self.stream, self.seen = stream, seen
        self.n_features, self.dtype, self.outline = stream.n_features, stream.dtype, stream.outline
        self.passes = self.rows = 0

    def chunks(self) -> Iterator[Chunk]:
        return self.stream.chunks()

    def parts(self) -> Generator[Part]:
        self.passes += 1
        with closing(self.stream.parts()) as parts:
            for part in parts:
                yield part
                self.rows += len(part.x)
                self.seen(self.passes, part.first + len(part.x))


class ArrayStream(Stream):
    """An array, looked at where it lies; of a memory map, the system is asked to read ahead."""

    def __init__(self, x: np.ndarray, sample_weight: Any = None, chunk_rows: int | None = None) -> None:
        self.x = check_data(x)
        N = len(self.x)
        self.weight = None if sample_weight is None else to_numbers(sample_weight, "sample_weight")
        if self.weight is not None and self.weight.ndim == 0:
            self.weight = np.broadcast_to(self.weight, N)
        if self.weight is not None and self.weight.shape != (N,):
            raise ValueError(f"sample_weight has shape {self.weight.shape}; expected one number per row: ({N},)")
        self.n_features, self.dtype = self.x.shape[1], tile_dtype(self.x)
        self.rows = chunk_rows or max(ELEMENTS_OF_A_VIEW // self.n_features, 1)

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, len(self.x), self.rows):
            _will_need(self.x, start + self.rows, start + 2 * self.rows)
            rows = slice(start, start + self.rows)
            yield self.x[rows], None if self.weight is None else self.weight[rows]

    def parts(self) -> Generator[Part]:
        """Without a thread: nothing is copied."""
        return (Part(number * self.rows, x, weight) for number, (x, weight) in enumerate(self.chunks()))


def _will_need(x: np.ndarray, start: int, stop: int) -> None:
    """Ask the system to read rows of a memory map in the background."""
    mapped = getattr(x, "_mmap", None)
    if mapped is None or not hasattr(mmap, "MADV_WILLNEED") or not x.flags.c_contiguous or start >= len(x):
        return
    begin = x.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data + start * x.strides[0]
    page = begin // mmap.PAGESIZE * mmap.PAGESIZE
    length = min(stop, len(x)) * x.strides[0] - start * x.strides[0] + begin - page
    mapped.madvise(mmap.MADV_WILLNEED, page, length)


class ParquetStream(Stream):
    """The rows of a Parquet file, or of all files of a folder in the order of their names."""

    def __init__(
        self, path: Path, columns: Sequence[str] | None = None, sample_weight: Any = None, chunk_rows: int | None = None
    ) -> None:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        if sample_weight is not None and not isinstance(sample_weight, str):
            raise ValueError(
                f"sample_weight is {type(sample_weight).__name__}; expected the name of a column of {path}"
            )
        self.path, self.weight = path, sample_weight
        try:
            nothing_yet = pyarrow_module("pyarrow").schema([])  # without it a file is read
            dataset = pyarrow_module("pyarrow.dataset").dataset(path, nothing_yet, format="parquet")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        self.files = sorted(dataset.files)
        if not self.files:
            raise ValueError(f"{path}: holds no Parquet files")
        features = self._features(self.files[0], columns)
        self.columns, self.outline = features.names, features.empty_table()
        dtypes = [number_dtype(self._features(file, self.columns)) for file in self.files]
        self.dtype = np.result_type(*dtypes)
        self.n_features = len(self.columns)
        self.rows = chunk_rows or max(ELEMENTS_OF_A_CHUNK // self.n_features, 1)

    @property
    def _weights(self) -> list[str]:
        """The column of weights, if there is one."""
        return [] if self.weight is None else [self.weight]

    def _features(self, file: str, columns: Sequence[str] | None) -> Any:
        """The fields of the features in a file's pyarrow.Schema; ValueError if it has not the columns."""
        with reading(Path(file)):
            schema = pyarrow_module("pyarrow.parquet").read_schema(file)
        names = number_columns(schema, columns, self._weights, file)
        return pyarrow_module("pyarrow").schema([schema.field(name) for name in names])

    def chunks(self) -> Iterator[Chunk]:
        return rejoined(self._pieces(), self.rows)

    def _pieces(self) -> Iterator[Chunk]:
        """Of one file after the other: a dataset's own batches are read so far ahead that files lie in memory whole."""
        for file in self.files:
            with reading(Path(file)):
                parquet = open_parquet(file)
            with parquet:
                number_columns(parquet.schema_arrow, self.columns, self._weights, file)
                with reading(Path(file)):
                    for batch in parquet.iter_batches(self.rows, columns=[*self.columns, *self._weights]):
                        if batch.num_rows:
                            yield self._chunk(batch)

    def _chunk(self, batch: Any) -> Chunk:
        table = pyarrow_module("pyarrow").Table.from_batches([batch])
        weight = None if self.weight is None else numbers_of(table.select(self._weights))[:, 0]
        x = numbers_of(table.select(self.columns))
        check_not_rounded("the table", x.dtype, self.dtype, "the file has changed: open a new stream")
        return x.astype(self.dtype, copy=False), weight


class IterableStream(Stream):
    """Chunks that somebody else makes."""

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]], chunk_rows: int | None = None) -> None:
        if not callable(source) and (not isinstance(source, Iterable) or iter(source) is source):
            raise ValueError(
                f"a {type(source).__name__} can be gone through once or not at all, and EM goes through the data in "
                "every iteration; give a function that returns a new iterator, or use partial_fit, which needs one pass"
            )
        self.source = source
        iterator = self._iterator()
        self.looked_at: Iterator[Any] | None = iterator
        with closing(checked_chunks(iterator)) as chunks:
            first = next(chunks, None)
        if first is None:
            raise ValueError("the stream has no rows; expected at least one")
        self.n_features, self.dtype = first[0].shape[1], tile_dtype(first[0])
        self.rows = chunk_rows or max(ELEMENTS_OF_A_CHUNK // self.n_features, 1)

    def chunks(self) -> Iterator[Chunk]:
        """ValueError if the function gives an iterator again whose first chunk has been taken."""
        iterator, before = self._iterator(), self.looked_at
        if iterator is before:
            raise ValueError(
                "the function gives the same iterator again, and chunks that were taken from it do not come back; give "
                "a function that makes a new one in each call, or use fit_stepwise, which needs one pass"
            )
        self.looked_at = None  # it may hold a file open
        return rejoined(checked_chunks(iterator, self.n_features, self.dtype), self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes iterators of its own."""
        return self.__dict__ | {"looked_at": None}

    def _iterator(self) -> Iterator[Any]:
        return iter(self.source() if callable(self.source) else self.source)


def checked_chunks(
    chunks: Iterable[Any], n_features: int | None = None, dtype: np.dtype | None = None
) -> Generator[Chunk]:
    """Chunks as somebody else made them, those that hold rows; of the width and, if it is given, the dtype wanted.

    ValueError naming the chunk that is no array, or has other columns or more digits than those before it.
    """
    columns = None
    for number, given in enumerate(chunks):
        x, weight = _rows_and_weight(given, number)
        names = _names_of(x)
        if names is not None and names != (columns or names):
            found, known = (", ".join(map(str, each)) for each in (names, columns or ()))
            raise ValueError(f"chunk {number} has columns {found}; those before it have {known}")
        columns = names or columns
        x = to_numbers(x, f"chunk {number}")
        if x.ndim == 2 and len(x) == 0:
            continue
        x = check_data(x, name=f"chunk {number}")
        if x.shape[1] != (n_features or x.shape[1]):
            raise ValueError(f"chunk {number} has {x.shape[1]} features; those before it have {n_features}")
        n_features = x.shape[1]
        if weight is not None:
            weight = to_numbers(weight, f"the weights of chunk {number}")
            if weight.shape != (len(x),):
                raise ValueError(f"the weights of chunk {number} have shape {weight.shape}; expected ({len(x)},)")
        if dtype is not None:
            check_not_rounded(f"chunk {number}", x.dtype, dtype, "give all chunks one dtype")
            x = x.astype(dtype, copy=False)
        yield x, weight


def _names_of(x: Any) -> list[Any] | None:
    """The names of a data frame's columns; None of anything else."""
    return [*x.columns] if hasattr(x, "columns") and hasattr(x, "to_numpy") else None


def _is_chunk(x: Any) -> bool:
    """Whether `x` is an array of rows, or begins with one as pairs do."""
    if isinstance(x, list | tuple):
        return len(x) > 0 and getattr(x[0], "ndim", 0) == 2
    return getattr(x, "ndim", 0) == 2


def _rows_and_weight(given: Any, number: int) -> tuple[Any, Any]:
    """A chunk's rows and, or None, their weights: a pair, which may be a list as DataLoaders make it, or the rows."""
    if not (isinstance(given, tuple) or (isinstance(given, list) and _is_chunk(given))):
        return given, None
    if len(given) not in (1, 2):
        kind = type(given).__name__
        raise ValueError(f"chunk {number} is a {kind} of {len(given)}; expected an (n, D) array, or it and its weights")
    return given[0], given[1] if len(given) == 2 else None


def rejoined(chunks: Iterable[Chunk], rows: int, first: int | None = None) -> Iterator[Chunk]:
    """The same rows in chunks of `rows`, one of `first` rows before them; the last may be smaller.

    Those of the right size are not copied.
    """
    waiting: list[Chunk] = []
    count, wanted = 0, rows if first is None else first
    for x, weight in chunks:
        start = 0
        while start < len(x):
            taken = min(wanted - count, len(x) - start)
            span = slice(start, start + taken)
            waiting.append((x[span], None if weight is None else weight[span]))
            start, count = start + taken, count + taken
            if count == wanted:
                yield _joined(waiting)
                waiting, count, wanted = [], 0, rows
    if waiting:
        yield _joined(waiting)


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    weights = None
    if any(weight is not None for _, weight in chunks):
        weights = np.concatenate([np.ones(len(x)) if weight is None else weight for x, weight in chunks])
    return np.concatenate([x for x, _ in chunks]), weights


# ---- reading ahead


def read_ahead(chunks: Iterator[Chunk], depth: int = CHUNKS_AHEAD) -> Generator[Chunk]:
    """The same chunks, made by a thread that is up to `depth` of them ahead; its errors are raised here.

    The thread ends when the iterator is closed, at the latest after the chunk that it is making, and so it does after
    an interrupt at any moment.
    """
    source = [chunks]
    del chunks  # only the thread's loop holds a generator that it has begun, and so closes it
    made: SimpleQueue[Chunk | None] = SimpleQueue()
    places: SimpleQueue[None] = SimpleQueue()
    errors: list[BaseException] = []
    stopped = False

    def read() -> None:
        try:
            for chunk in source.pop():
                places.get()
                if stopped:
                    break
                made.put(chunk)
        except BaseException as error:
            errors.append(error)
        made.put(None)

    reader = Background(read)
    try:
        for _ in range(depth):
            places.put(None)
        reader.start()
        while (chunk := made.get()) is not None:
            places.put(None)
            yield chunk
        if errors:
            raise errors.pop()
    finally:
        stopped = True
        places.put(None)  # the reader may wait for one
        reader.wait()
