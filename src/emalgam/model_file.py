"""Mixtures in safetensors files: three float64 tensors and metadata in JSON, nothing that could be executed.

========================  ==========================================================================
metadata ``format``       ``emalgam.mixture``
``format_version``        ``1``
``covariance_type``       ``full``, ``tied``, ``diag`` or ``spherical``
tensor ``weights``        (K,)
``means``                 (K, D)
``covariances``           full (K, D, D), tied (D, D), diag (K, D), spherical (K,)
========================  ==========================================================================

Loading reads the header first and holds it against the size of the file before memory is taken for anything that the
header promises. `Mixture` then checks the values. Equal mixtures with equal metadata give files with equal bytes.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, TypeVar

import numpy as np

from emalgam.covariance import COVARIANCES
from emalgam.files import replacing
from emalgam.gaussian import as_mixture
from emalgam.mixture import Mixture

FORMAT: Final = "emalgam.mixture"
FORMAT_VERSION: Final = "1"
TENSORS: Final = ("weights", "means", "covariances")
RESERVED: Final = ("format", "format_version", "covariance_type")
LENGTH_BYTES: Final = 8
LONGEST_HEADER: Final = 2**20
LARGEST_NUMBER: Final = 2**53
ITEM_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
T = TypeVar("T")

__all__ = ["ModelFileError", "load_metadata", "load_model", "save_model"]


class ModelFileError(ValueError):
    """A model file that cannot be read or written; the message names the file and the field."""


def save_model(mixture: Any, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a mixture as a safetensors file; an existing file is replaced, at once and whole.

    Parameters
    ----------
    mixture : Mixture, Gaussian, Fit or fitted GaussianMixture
        What to save: weights (K,), means (K, D) and covariances, all float64.
    path : path-like
        The file; its folder has to exist.
    metadata : mapping of str to str, optional
        Anything to keep beside the mixture, for `load_metadata`. The names ``format``, ``format_version`` and
        ``covariance_type`` are taken.

    Raises
    ------
    ValueError
        If there is no mixture to save.
    ModelFileError
        If what is saved could not be loaded again (a covariance overflows on data near 1e200, underflows near 1e-200,
        or is singular to working precision), or `metadata` is not as described.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from emalgam import Mixture, load_model, save_model
    >>> mixture = Mixture([0.25, 0.75], [[0.0, 0.0], [3.0, 3.0]], [1.0, 2.0], "spherical")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(mixture, f"{folder}/model.safetensors", metadata={"data": "two blobs"})
    ...     load_model(f"{folder}/model.safetensors").weights.tolist()
    [0.25, 0.75]
    """
    from safetensors.numpy import save

    mixture = as_mixture("mixture", mixture)
    tensors = {name: np.ascontiguousarray(getattr(mixture, name), np.float64) for name in TENSORS}
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            fail(path, name, "holds values that are not finite and cannot be saved; scale the data and fit again")
    try:  # a covariance may have lost to rounding, or underflow, what its factor still has
        Mixture(**tensors, covariance_type=mixture.covariance_type)
    except ValueError as error:
        raise ModelFileError(f"{os.fspath(path)}: not saved, because it could not be loaded again: {error}") from error
    described = {"format": FORMAT, "format_version": FORMAT_VERSION, "covariance_type": mixture.covariance_type}
    write_file(path, save(tensors, described | _checked_metadata(metadata or {}, path)))


def load_model(path: str | os.PathLike[str]) -> Mixture:
    """The mixture in a file that `save_model` wrote.

    Raises
    ------
    ModelFileError
        If the file is missing, cut short, forged, of another format or version, or holds values that are no mixture:
        not finite, weights that do not sum to one, covariances that are not positive definite.

    Examples
    --------
    >>> from emalgam import load_model
    >>> load_model("nowhere.safetensors")
    Traceback (most recent call last):
        ...
    emalgam.model_file.ModelFileError: nowhere.safetensors: there is no such file
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content, metadata = read_file(path, _check)
    try:
        tensors = load(content)
        return Mixture(tensors["weights"], tensors["means"], tensors["covariances"], metadata["covariance_type"])
    except (SafetensorError, ValueError) as error:
        raise ModelFileError(f"{os.fspath(path)}: {error}") from error


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a model file, ``format``, ``format_version`` and ``covariance_type`` included.

    Raises
    ------
    ModelFileError
        If the file's header is not as `save_model` writes it.
    """
    return read_file(path, _check)[1]


def fail(path: str | os.PathLike[str], field: str, problem: str) -> NoReturn:
    """ModelFileError that names the file and the field."""
    raise ModelFileError(f"{os.fspath(path)}: {field} {problem}")


def _checked_metadata(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            fail(path, "metadata", f"holds {key!r}: {value!r}; expected a string under a string")
        if key in RESERVED:
            fail(path, "metadata", f"holds {key!r}, which the format itself uses; choose another name")
    return dict(metadata)


def _header_length(content: bytes) -> int:
    return int.from_bytes(content[:LENGTH_BYTES], "little")


def _in_order(content: bytes) -> bytes:
    """The same file with its metadata in alphabetical order: safetensors writes them in a random one."""
    end = LENGTH_BYTES + _header_length(content)
    header = json.loads(content[LENGTH_BYTES:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + content[end:]


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write the bytes of a safetensors file, at once and whole; equal tensors and metadata give equal files."""
    content = _in_order(content)
    if _header_length(content) > LONGEST_HEADER:
        fail(path, "metadata", f"is too long: a header may have {LONGEST_HEADER} bytes")
    with replacing(path) as file:
        file.write(content)


def read_file(
    path: str | os.PathLike[str], check: Callable[[dict[str, Any], int, str | os.PathLike[str]], T]
) -> tuple[bytes, T]:
    """The bytes of a safetensors file, and what `check` says to (header, bytes of data, path), which comes first."""
    if not Path(path).exists():
        raise ModelFileError(f"{os.fspath(path)}: there is no such file")
    if not Path(path).is_file():  # a pipe would block, a device may never end
        raise ModelFileError(f"{os.fspath(path)}: is not a regular file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_bytes = read_header(file, size, path)
            found = check(header, data_bytes, path)
            file.seek(0)
            return file.read(size), found
    except OSError as error:
        raise ModelFileError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error


def read_header(file: BinaryIO, size: int, path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of tensor data follow it."""
    if size < LENGTH_BYTES:
        fail(path, "header", f"is cut short: the file has {size} bytes")
    length = _header_length(file.read(LENGTH_BYTES))
    if not 2 <= length <= min(size - LENGTH_BYTES, LONGEST_HEADER):
        fail(path, "header", f"has {length} bytes by its own account, in a file of {size} (cut short, forged?)")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{os.fspath(path)}: header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        fail(path, "header", f"is {type(header).__name__}, expected a JSON object")
    return header, size - LENGTH_BYTES - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two equal names they take, so none may occur twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def metadata_of(header: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata in a header: strings under strings."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(path, "__metadata__", "is missing or not an object of strings")
    return metadata


def check_format(metadata: Mapping[str, str], name: str, version: str, path: str | os.PathLike[str]) -> None:
    """Format and version, which every file of ours has in its metadata."""
    if metadata.get("format") != name:
        fail(path, "format", f"is {reprlib.repr(metadata.get('format'))}, expected {name!r}")
    if metadata.get("format_version") != version:
        fail(
            path,
            "format_version",
            f"is {reprlib.repr(metadata.get('format_version'))}; this version of emalgam reads {version!r}",
        )


def check_description(metadata: Mapping[str, str], name: str, version: str, path: str | os.PathLike[str]) -> None:
    """Format, version and covariance type, which every file with mixtures has in its metadata."""
    check_format(metadata, name, version, path)
    if metadata.get("covariance_type") not in COVARIANCES:
        fail(
            path,
            "covariance_type",
            f"is {reprlib.repr(metadata.get('covariance_type'))}, expected one of {', '.join(COVARIANCES)}",
        )


def _check(header: dict[str, Any], data_bytes: int, path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a mixture's file, if its header is sound."""
    metadata = metadata_of(header, path)
    check_description(metadata, FORMAT, FORMAT_VERSION, path)
    _check_tensors(header, metadata["covariance_type"], data_bytes, path)
    return metadata


def _check_tensors(header: dict[str, Any], covariance_type: str, data_bytes: int, path: str | os.PathLike[str]) -> None:
    """Exactly the three tensors, shapes that fit each other, and data that fills the rest of the file."""
    names = sorted(name for name in header if name != "__metadata__")
    if names != sorted(TENSORS):
        fail(path, "tensors", f"are {reprlib.repr(names)}, expected {sorted(TENSORS)}")
    for name in TENSORS:
        check_entry(name, header[name], "F64", path)
    shapes = {name: tuple(header[name]["shape"]) for name in TENSORS}
    if len(shapes["means"]) != 2 or 0 in shapes["means"]:
        fail(path, "means", f"has shape {reprlib.repr(shapes['means'])}, expected (K, D)")
    K, D = shapes["means"]
    if shapes["weights"] != (K,):
        fail(path, "weights", f"has shape {reprlib.repr(shapes['weights'])}, expected {(K,)}")
    expected = COVARIANCES[covariance_type].shape(K, D)
    if shapes["covariances"] != expected:
        received = reprlib.repr(shapes["covariances"])
        fail(path, "covariances", f"has shape {received}, expected {expected} for {covariance_type!r}")
    check_offsets(header, TENSORS, data_bytes, path)


def check_offsets(header: dict[str, Any], names: Iterable[str], data_bytes: int, path: str | os.PathLike[str]) -> None:
    """Each tensor where the one before it ends, the first at 0, the last at the end of the file."""
    end = 0
    for start, stop, name in sorted((*header[name]["data_offsets"], name) for name in names):
        expected = end + ITEM_BYTES[header[name]["dtype"]] * math.prod(header[name]["shape"])
        if (start, stop) != (end, expected) or stop > data_bytes:
            problem = f"lies at bytes {start} to {stop} of the data, expected {end} to {expected} of {data_bytes}"
            fail(path, name, f"{problem} (cut short, forged?)")
        end = stop
    if end != data_bytes:
        fail(path, "data", f"has {data_bytes} bytes, expected {end}")


def check_entry(name: str, entry: Any, dtype: str, path: str | os.PathLike[str]) -> None:
    """One tensor's entry in the header: its dtype, a shape and two offsets, nothing else."""
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        fail(path, name, "is not described by dtype, shape and data_offsets")
    if entry["dtype"] != dtype:
        fail(path, name, f"has dtype {reprlib.repr(entry['dtype'])}, expected {dtype!r}")
    for key in ("shape", "data_offsets"):
        numbers = entry[key]
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number <= LARGEST_NUMBER for number in numbers
        ):
            fail(path, name, f"has {key} {reprlib.repr(numbers)}, expected whole numbers")
    if len(entry["data_offsets"]) != 2:
        fail(path, name, f"has data_offsets {reprlib.repr(entry['data_offsets'])}, expected two")
