"""Tables of numbers in files: .npy (memory-mapped), .npz, .csv and .parquet.

pyarrow reads and writes the last two and is imported only then. Nothing is unpickled, and what a header promises is
held against the size of its file before memory is taken for it.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO, Final, cast

import numpy as np

from emalgam.files import replacing

LONGEST_LINE: Final = 2**24
DEFLATE_RATIO: Final = 1032  # a byte of a deflate stream stands for no more bytes than this
INDEX_COLUMN: Final = "__index_level_"  # where pandas keeps a row index in Parquet
BUFFER_BYTES: Final = 2**20  # of each column's compressed data

__all__ = [
    "check_suffix",
    "number_columns",
    "number_dtype",
    "numbers_of",
    "open_parquet",
    "pyarrow_module",
    "read_table",
    "reading",
    "without_row_index",
    "write_npy",
    "write_table",
]


def read_table(
    path: str | os.PathLike[str], *, names: Sequence[str] = ("x", "X"), columns: Sequence[str] | None = None
) -> np.ndarray:
    """The array or table of numbers in a file.

    Parameters
    ----------
    path : path-like
        ``.npy``: memory-mapped, so that only what is used gets read. ``.npz``: its only array, or the one called one of
        `names`. ``.csv``: comma-separated; the first line is a header if any of its fields is not a number.
        ``.parquet``: every column but the row index of pandas, whatever its name.
    names : sequence of str
        The arrays of an ``.npz`` to look for if it holds several.
    columns : sequence of str, optional
        Parquet: which columns, in which order.

    Returns
    -------
    array
        What ``.npy`` and ``.npz`` hold, of any real dtype and shape; from the others (N, D) float32 if every column
        is float32, else float64, with NaN where a value is missing.

    Raises
    ------
    ValueError
        Naming the file: missing, unsupported, cut short or forged; not numbers (naming the column).
    ImportError
        If pyarrow is needed and missing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from emalgam.tables import read_table
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "data.csv").write_text("height,weight\\n1.5,60\\n1.8,75\\n")
    ...     read_table(f"{folder}/data.csv").tolist()
    [[1.5, 60.0], [1.8, 75.0]]
    """
    file = Path(path)
    suffix = check_suffix(file)
    if columns is not None and suffix != ".parquet":
        raise ValueError(f"{file}: columns can be chosen of .parquet files only")
    read, _ = FORMATS[suffix]
    with reading(file):
        array = read(file, names) if columns is None else _read_parquet(file, names, columns)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{file}: has dtype {array.dtype}; expected real numbers")
    return array


@contextmanager
def reading(path: Path, error_type: type[ValueError] = ValueError) -> Iterator[None]:
    """Whatever goes wrong in the block is an error of one type that names the file; there has to be one.

    Errors of a type of their own are expected to name it already.
    """
    if not path.exists():
        raise error_type(f"{path}: there is no such file")
    if not path.is_file():  # a pipe would block, a device may never end
        raise error_type(f"{path}: is not a regular file")
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if error_type is not ValueError and isinstance(error, error_type):
            raise
        # a damaged file makes zipfile, NumPy and pyarrow raise a dozen types
        raise error_type(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def write_table(path: str | os.PathLike[str], array: np.ndarray, *, name: str = "x") -> None:
    """Write an array of one or two dimensions; the suffix of `path` says how: .npy, .npz, .csv or .parquet.

    Parameters
    ----------
    path : path-like
        The file; an existing one is replaced, at once and whole.
    array : (N,) or (N, D) any real dtype
        What to write.
    name : str
        The array's name in an ``.npz``, and the column's in a table; two dimensions give columns name0, name1, ...

    Raises
    ------
    ValueError
        For any other suffix or number of dimensions.
    OSError
        If the file cannot be written.
    ImportError
        If pyarrow is needed and missing.
    """
    _, write = FORMATS[check_suffix(path)]
    if array.ndim not in (1, 2):
        raise ValueError(f"{os.fspath(path)}: shape {array.shape} is no table; expected one or two dimensions")
    with replacing(path) as file:
        write(file, array, name)


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of `path` in lower case; ValueError listing those that are supported if it is none of them."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        ending = f"{suffix} files are" if suffix else "a name without a suffix is"
        raise ValueError(f"{os.fspath(path)}: {ending} not supported; supported are {', '.join(FORMATS)}")
    return suffix


def _read_npy(path: Path, names: Sequence[str]) -> np.ndarray:
    with open(path, "rb") as file:
        _check_header(file, path.stat().st_size)
    return np.lib.format.open_memmap(path, mode="r")


def _read_npz(path: Path, names: Sequence[str]) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        chosen = list(members) if len(members) == 1 else [name for name in names if name in members][:1]
        if not chosen:
            wanted = " or ".join(map(repr, names))
            raise ValueError(f"holds the arrays {list(members)}; expected exactly one, or one called {wanted}")
        info = members[chosen[0]]
        possible = info.compress_size <= path.stat().st_size
        if not possible or info.file_size > DEFLATE_RATIO * (info.compress_size + 1):
            raise ValueError(f"array {chosen[0]!r} of {info.file_size} bytes does not fit in the file (forged?)")
        with archive.open(info) as member:
            _check_header(member, info.file_size)
            member.seek(0)
            return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _check_header(file: IO[bytes], size: int) -> None:
    """ValueError if the header of a .npy file promises objects, or more numbers than `size` bytes hold."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"has version {version} of the .npy format; expected (1, 0) or (2, 0)")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"has dtype {dtype}; expected real numbers")
    held = size - file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > held:
        raise ValueError(f"shape {shape} and dtype {dtype} do not fit in {held} bytes of data (cut short, forged?)")


def _read_csv(path: Path, names: Sequence[str]) -> np.ndarray:
    arrow_csv = pyarrow_module("pyarrow.csv")
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = next(csv.reader([file.readline(LONGEST_LINE)]), [])
    has_header = not all(_is_number(field) for field in first)
    options = arrow_csv.ReadOptions(autogenerate_column_names=not has_header)
    return numbers_of(arrow_csv.read_csv(path, read_options=options), has_header)


def _is_number(field: str) -> bool:
    """Whether a field of a CSV file is a number; an empty one is a missing number."""
    try:
        float(field or "nan")
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, names: Sequence[str], columns: Sequence[str] | None = None) -> np.ndarray:
    with pyarrow_module("pyarrow.parquet").ParquetFile(path) as file:
        if columns is not None:
            wanted = number_columns(file.schema_arrow, columns, [])
            return numbers_of(file.read(columns=wanted).select(wanted), True)
        return numbers_of(file.read(columns=without_row_index(file.schema_arrow)), True)


def open_parquet(path: str | os.PathLike[str]) -> Any:
    """A pyarrow.parquet.ParquetFile whose batches can be iterated over in memory that does not grow with the file."""
    return pyarrow_module("pyarrow.parquet").ParquetFile(
        path,
        buffer_size=BUFFER_BYTES,
        pre_buffer=False,  # which would keep the whole file in memory
    )


def numbers_of(table: Any, has_header: bool = True) -> np.ndarray:
    """The columns of a pyarrow.Table side by side, (N, D), NaN where a value is missing."""
    arrow = pyarrow_module("pyarrow")
    for index, field in enumerate(table.schema):
        if not is_number_type(field.type):
            name = repr(field.name) if has_header else str(index)
            raise ValueError(f"column {name} holds {_first_not_number(table.column(index))}; expected numbers")
    out = np.empty(table.shape, number_dtype(table.schema))
    wanted = arrow.from_numpy_dtype(out.dtype)
    for index in range(table.num_columns):
        out[:, index] = table.column(index).cast(wanted, safe=False).to_numpy()
    return out


def number_dtype(schema: Any) -> np.dtype:
    """What the columns of a pyarrow.Schema are read as: float32 if all of them are, else float64."""
    single = pyarrow_module("pyarrow").float32()
    return np.dtype(np.float32 if all(field.type == single for field in schema) else np.float64)


def is_number_type(kind: Any) -> bool:
    """Whether columns of a pyarrow type are read as numbers; a column without any value is of the null type."""
    arrow = pyarrow_module("pyarrow")
    integers = [getattr(arrow, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]
    numbers = [*integers, arrow.float16(), arrow.float32(), arrow.float64(), arrow.bool_(), arrow.null()]
    return any(map(kind.__eq__, numbers))


def without_row_index(schema: Any) -> list[str]:
    """The columns of a pyarrow.Schema but for a row index of pandas, which says in the metadata where it is."""
    try:
        index = json.loads((schema.metadata or {})[b"pandas"])["index_columns"]
        named = {name for name in index if isinstance(name, str)}  # a range of numbers is no column
    except (ValueError, KeyError, TypeError):
        named = set()
    return [name for name in schema.names if name not in named and not name.startswith(INDEX_COLUMN)]


def number_columns(
    schema: Any, wanted: Sequence[str] | None, others: Sequence[str], where: str | None = None
) -> list[str]:
    """The columns of a pyarrow.Schema that are features: those `wanted`, or all but `others` and a row index of pandas.

    ValueError, which begins with `where`, if one of these or of the others (weights, labels) is not there, there twice
    or asked for twice, or if a feature does not hold numbers.
    """
    beginning = "" if where is None else f"{where}: "
    if isinstance(wanted, str):
        raise ValueError(f"{beginning}columns is {wanted!r}; expected a sequence of names: [{wanted!r}]")
    columns = list(wanted) if wanted is not None else [n for n in without_row_index(schema) if n not in others]
    there, asked = Counter(schema.names), Counter([*columns, *others])
    for name, times in asked.items():
        if there[name] != 1:
            found = "more than one" if name in there else "no"
            raise ValueError(f"{beginning}has {found} column {name!r}; there are {', '.join(schema.names)}")
        if times > 1:
            raise ValueError(
                f"{beginning}column {name!r} is asked for twice; features, weights and labels have to differ"
            )
    for name in columns:
        if not is_number_type(schema.field(name).type):
            raise ValueError(
                f"{beginning}column {name!r} holds values of type {schema.field(name).type}; expected numbers"
            )
    if not columns:
        raise ValueError(f"{beginning}has no columns to read; expected at least one feature")
    return columns


def _first_not_number(column: Any) -> str:
    """What a pyarrow.ChunkedArray of another type holds: the first text that is no number, or the type's name."""
    for row, value in enumerate(column):
        text = value.as_py()
        if isinstance(text, str) and not _is_number(text):
            return f"{text[:40]!r} at row {row}"
    return f"values of type {column.type}"


def pyarrow_module(module: str) -> Any:
    """pyarrow or a part of it; ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f".csv and .parquet files need pyarrow ({error}); to install it: pip install pyarrow"
        ) from error


def write_npy(file: BinaryIO, array: np.ndarray, name: str = "") -> None:
    """An array of any shape in NumPy's format, which has no place for a name."""
    # Into a file itself NumPy would write with a function of C, whose error does not say that the disk is full.
    np.save(cast(BinaryIO, SimpleNamespace(write=file.write)), array, allow_pickle=False)


def _write_npz(file: BinaryIO, array: np.ndarray, name: str) -> None:
    arrays: dict[str, Any] = {name: array}
    np.savez(file, **arrays)


def _write_csv(file: BinaryIO, array: np.ndarray, name: str) -> None:
    pyarrow_module("pyarrow.csv").write_csv(_table(array, name), file)


def _write_parquet(file: BinaryIO, array: np.ndarray, name: str) -> None:
    pyarrow_module("pyarrow.parquet").write_table(_table(array, name), file)


def _table(array: np.ndarray, name: str) -> Any:
    if array.ndim == 1:
        return pyarrow_module("pyarrow").table({name: array})
    return pyarrow_module("pyarrow").table({f"{name}{index}": column for index, column in enumerate(array.T)})


Reader = Callable[[Path, Sequence[str]], np.ndarray]
Writer = Callable[[BinaryIO, np.ndarray, str], None]
FORMATS: Final[dict[str, tuple[Reader, Writer]]] = {
    ".npy": (_read_npy, write_npy),
    ".npz": (_read_npz, _write_npz),
    ".csv": (_read_csv, _write_csv),
    ".parquet": (_read_parquet, _write_parquet),
}
