"""Tables in files: what was written is read, and each way in which a file can be wrong is one line that names it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emalgam import open_stream
from emalgam.tables import FORMATS, check_suffix, read_table, write_table

SUFFIXES = tuple(FORMATS)


def error_of(path: Path) -> str:
    """What reading says, without the name of the file that it has to begin with."""
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
        read_table(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def npy_bytes(header: str) -> bytes:
    """A .npy file of 16 bytes of data under any header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_was_written_is_read(suffix: str, order: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3)) * 10.0 ** np.arange(-200, 250, 150)
    x = values if order == "C" else np.asfortranarray(values)
    write_table(tmp_path / f"x{suffix}", x)
    assert read_table(tmp_path / f"x{suffix}").tolist() == x.tolist()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_are_read_as_one_column(suffix: str, tmp_path: Path) -> None:
    labels = np.array([2, 0, 1, 1])
    write_table(tmp_path / f"labels{suffix}", labels, name="label")
    assert read_table(tmp_path / f"labels{suffix}").ravel().tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_suffix_in_capitals_is_the_same(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"x{suffix.upper()}", np.eye(2))
    assert read_table(tmp_path / f"x{suffix.upper()}").tolist() == [[1, 0], [0, 1]]


def test_npy_is_memory_mapped(tmp_path: Path) -> None:
    write_table(tmp_path / "x.npy", np.zeros((100_000, 10)))
    tracemalloc.start()
    x = read_table(tmp_path / "x.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(x, np.memmap)
    assert not x.flags.writeable
    assert peak < 10**6


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i4", "u1", "b1"])
def test_npy_and_npz_keep_the_dtype(dtype: str, tmp_path: Path) -> None:
    x = np.array([[0, 1], [1, 1]], dtype)
    for suffix in (".npy", ".npz"):
        write_table(tmp_path / f"x{suffix}", x)
        read = read_table(tmp_path / f"x{suffix}")
        assert read.dtype == x.dtype
        assert (read == x).all()


def test_npz_takes_the_only_array_or_the_one_called_x(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, anything=np.eye(2))
    assert read_table(path).tolist() == [[1, 0], [0, 1]]
    np.savez_compressed(path, X=np.zeros((1000, 2)), y=np.ones(3))
    assert read_table(path).shape == (1000, 2)
    np.savez(path, weights=np.ones(3), y=np.ones(4))
    assert read_table(path, names=("weights",)).shape == (3,)
    assert error_of(path) == "holds the arrays ['weights', 'y']; expected exactly one, or one called 'x' or 'X'"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("a,b\n1,2\n", [[1, 2]]),
        ('"a","b"\r\n1,2\r\n', [[1, 2]]),
        ("a,2\n3,4\n", [[3, 4]]),
        ("\ufeff1,2\n", [[1, 2]]),
        ("1e3,-inf\n", [[1000, -np.inf]]),
        ("5\n6\n", [[5], [6]]),
        ("a,a\n1,2\n", [[1, 2]]),
        ("1,2\n" * 200_000 + "1.5,2\n", [[1, 2]] * 200_000 + [[1.5, 2]]),
    ],
    ids=[
        "no header",
        "header",
        "quoted",
        "one name",
        "byte order mark",
        "notation",
        "one column",
        "same names",
        "late float",
    ],
)
def test_csv(text: str, rows: list[list[float]], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    x = read_table(tmp_path / "x.csv")
    assert x.dtype == np.float64
    assert x.tolist() == rows


def test_missing_values_are_nan(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,c\n1,,\n3,4,\n")
    np.testing.assert_equal(read_table(tmp_path / "x.csv"), [[1, np.nan, np.nan], [3, 4, np.nan]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Empty CSV file"),
        ("a,b\n1,2\n3,x\n", "column 'b' holds 'x' at row 1; expected numbers"),
        ("1,2\n3,x\n", "column 1 holds 'x' at row 1; expected numbers"),
        ("1;2\n3;4\n", "column '1;2' holds '3;4' at row 0; expected numbers"),
        ("when\n2020-01-01\n", "column 'when' holds values of type date32[day]; expected numbers"),
        ("1,2\n3\n", "Expected 2 columns, got 1"),
    ],
)
def test_csv_that_is_not_numbers(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    assert message in error_of(tmp_path / "x.csv")


def test_parquet_takes_every_number_and_no_row_index(tmp_path: Path) -> None:
    columns = {
        "int": pyarrow.array([1, 2], pyarrow.int8()),
        "half": pyarrow.array(np.array([0.5, 1.5], np.float16)),
        "bool": pyarrow.array([True, False]),
        "missing": pyarrow.array([None, 2.0]),
        "nothing": pyarrow.nulls(2),
        "__index_level_0__": pyarrow.array(["p", "q"]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    x = read_table(tmp_path / "x.parquet")
    assert x.dtype == np.float64
    np.testing.assert_equal(x, [[1, 0.5, 1, np.nan, np.nan], [2, 1.5, 0, 2, np.nan]])


@pytest.mark.parametrize("name", [None, "id"])
def test_parquet_of_pandas_without_its_row_index(name: str | None, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"a": [1.0, 2, 3], "b": [4.0, 5, 6]}, index=pandas.Index([7, 5, 3], name=name))
    frame.to_parquet(tmp_path / "x.parquet")
    np.testing.assert_array_equal(read_table(tmp_path / "x.parquet"), frame.to_numpy())
    assert open_stream(tmp_path / "x.parquet").n_features == 2
    asked = name or "__index_level_0__"
    np.testing.assert_array_equal(read_table(tmp_path / "x.parquet", columns=[asked, "a"])[:, 0], [7, 5, 3])


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b'{"index_columns": 3}', b'{"index_columns": [["a"], {}]}', b"\xff"]
)
def test_parquet_whose_metadata_are_not_those_of_pandas(metadata: bytes, tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1.0], "b": [2.0]}).replace_schema_metadata({b"pandas": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet").tolist() == [[1.0, 2.0]]


def test_columns_are_a_sequence_of_names(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": [1.0], "b": [2.0]}), tmp_path / "x.parquet")
    for read in (read_table, open_stream):
        with pytest.raises(ValueError, match=r"columns is 'ab'; expected a sequence of names: \['ab'\]"):
            read(tmp_path / "x.parquet", columns="ab")


def test_columns_have_to_be_one_each(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array([1.0])] * 3, names=["a", "b", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for read in (read_table, open_stream):
        with pytest.raises(ValueError, match=r"x\.parquet: has more than one column 'a'; there are a, b, a"):
            read(tmp_path / "x.parquet", columns=["a"])
        with pytest.raises(ValueError, match=r"x\.parquet: column 'b' is asked for twice"):
            read(tmp_path / "x.parquet", columns=["b", "b"])
    assert read_table(tmp_path / "x.parquet").shape == (1, 3)


def test_parquet_of_float32_stays_float32(tmp_path: Path) -> None:
    write_table(tmp_path / "x.parquet", np.eye(3, dtype=np.float32))
    assert read_table(tmp_path / "x.parquet").dtype == np.float32


def test_parquet_of_lists_names_the_column(tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1.0], "pixels": [[1, 2]]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert (
        error_of(tmp_path / "x.parquet")
        == "column 'pixels' holds values of type list<element: int64>; expected numbers"
    )


FULL_DISK = """
import resource, sys
import numpy as np
from emalgam.tables import write_table
write_table(sys.argv[1], np.zeros((10, 2)))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_table(sys.argv[1], np.random.default_rng(0).normal(size=(10_000, 2)))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_an_error_that_names_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n"
    np.testing.assert_array_equal(read_table(path), np.zeros((10, 2)))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_and_a_folder(suffix: str, tmp_path: Path) -> None:
    assert error_of(tmp_path / f"x{suffix}") == "there is no such file"
    (tmp_path / f"folder{suffix}").mkdir()
    assert error_of(tmp_path / f"folder{suffix}") == "is not a regular file"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", ".txt files are not supported; supported are .npy, .npz, .csv, .parquet"),
        ("x", "a name without a suffix is not supported; supported are .npy, .npz, .csv, .parquet"),
    ],
)
def test_other_suffixes_are_refused(name: str, message: str, tmp_path: Path) -> None:
    assert error_of(tmp_path / name) == message
    with pytest.raises(ValueError, match=r"supported are \.npy, \.npz, \.csv, \.parquet"):
        write_table(tmp_path / name, np.eye(2))
    with pytest.raises(ValueError, match="not supported"):
        check_suffix(name)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet"])
def test_every_cut_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_table(path, np.random.default_rng(0).normal(size=(20, 2)))
    content = path.read_bytes()
    for length in {*range(0, len(content), 7), len(content) - 1}:
        path.write_bytes(content[:length])
        error_of(path)


def test_a_cut_npy_says_what_fits(tmp_path: Path) -> None:
    write_table(tmp_path / "x.npy", np.zeros((20, 2)))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:-8])
    expected = "shape (20, 2) and dtype float64 do not fit in 312 bytes of data (cut short, forged?)"
    assert error_of(tmp_path / "x.npy") == expected


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", "has dtype object; expected real numbers"),
        ("{'descr': '<c8', 'fortran_order': False, 'shape': (2,), }", "has dtype complex64; expected real numbers"),
        ("{'descr': '<U2', 'fortran_order': False, 'shape': (2,), }", "has dtype <U2; expected real numbers"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999, 4), }", "do not fit in 16 bytes of data"),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -2), }",
            "shape (-1, -2) and dtype float64 do not fit",
        ),
        ("__import__('os').getcwd()", ""),
        ("(" * 100, ""),
    ],
    ids=["objects", "complex", "text", "huge", "negative", "code", "nested"],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_forged_arrays(suffix: str, header: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        path.write_bytes(npy_bytes(header))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", npy_bytes(header))
    tracemalloc.start()
    assert message in error_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    import pickle

    for suffix in (".npy", ".npz"):
        (tmp_path / f"x{suffix}").write_bytes(pickle.dumps([1.0, 2.0]))
        error_of(tmp_path / f"x{suffix}")
    np.savez(tmp_path / "x.npz", x=np.array([[1], [None]], dtype=object))
    assert error_of(tmp_path / "x.npz") == "has dtype object; expected real numbers"


def test_an_npz_cannot_promise_more_than_deflate_can_hold(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.zeros(10))
    content = bytearray(buffer.getvalue())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")  # the uncompressed size
    (tmp_path / "x.npz").write_bytes(content)
    assert "array 'x' of 2147483648 bytes does not fit in the file (forged?)" in error_of(tmp_path / "x.npz")


@given(data=st.binary(max_size=300), suffix=st.sampled_from([".npy", ".npz", ".parquet"]))
def test_random_bytes_are_value_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"random{suffix}"
    path.write_bytes(data)
    error_of(path)


@given(data=st.binary(max_size=300))
def test_random_csv_is_a_table_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.csv"
    path.write_bytes(data)
    try:
        x = read_table(path)
    except ValueError:
        error_of(path)
    else:
        assert x.ndim == 2


def test_only_tables_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\) is no table; expected one or two dimensions"):
        write_table(tmp_path / "x.npy", np.zeros((2, 2, 2)))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_table(tmp_path / "absent" / "x.npy", np.zeros((2, 2)))
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    code = (
        "import sys; sys.modules['pyarrow'] = None; sys.modules['pyarrow.csv'] = None\n"
        "from emalgam.tables import read_table\n"
        "try: read_table(sys.argv[1])\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.csv")], capture_output=True, text=True, check=True
    )
    assert ".csv and .parquet files need pyarrow" in done.stdout
    assert "pip install pyarrow" in done.stdout


def test_numpy_tables_need_no_pyarrow(tmp_path: Path) -> None:
    write_table(tmp_path / "x.npy", np.eye(2))
    code = "import sys; from emalgam.tables import read_table; read_table(sys.argv[1]); print('pyarrow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.npy")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
