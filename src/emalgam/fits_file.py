"""Many mixtures in a Parquet table: a row for each problem, for any reader of Parquet, and nothing to execute.

==================  ==============  ===============================================================
column              type            meaning
==================  ==============  ===============================================================
label               any             of the group; called ``group``, or as in the table that was fitted
``n_samples``       int64           rows
``total_weight``    double          Σ ω
``n_components``    int64           K; 0 where there is no mixture, and the lists are empty
``weights``         list of double  K numbers
``means``           list of double  K · D numbers, component after component
``covariances``     list of double  full K · D · D, tied D · D, diag K · D, spherical K numbers
``covariance_type`` string
``log_likelihood``  double          Σ ω log p(x), in nats; NaN without a mixture
``entropy``         double          of the responsibilities, what ICL adds to BIC twice
``bic``             double
``n_iter``          int64
``converged``       bool
``status``          int64           `emalgam_kernels.batch.Status`; 0: fine
``message``         string          what the status means
==================  ==============  ===============================================================

The metadata hold ``format`` (``emalgam.fits``), ``format_version``, ``covariance_type``, ``n_features``, ``criterion``,
``backend``, ``writer`` and, if there are labels, ``label``, the name of their column.

What `load_fits` reads is stored plain and uncompressed: floating-point numbers hardly shrink, and so the footer can be
held against the size of the file before memory is taken for what it promises.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from emalgam import __version__
from emalgam.batch import ManyFits
from emalgam.covariance import COVARIANCES
from emalgam.files import replacing
from emalgam.mixture import WEIGHT_SUM_TOLERANCE, factor_covariances
from emalgam.model_file import ModelFileError, check_description, fail
from emalgam.problems import repeated
from emalgam.tables import DEFLATE_RATIO, FORMATS, pyarrow_module, reading
from emalgam_kernels.batch import CRITERIA, Mixtures, Outcomes, Status

FORMAT: Final = "emalgam.fits"
FORMAT_VERSION: Final = "1"
LISTS: Final = ("weights", "means", "covariances")
NUMBERS: Final = ("n_samples", "total_weight", "n_components", "log_likelihood", "entropy", "n_iter", "status")
REPEATED: Final = ("covariance_type", "message")  # for other readers, who see the same few texts again and again
COLUMNS: Final = (
    *("n_samples", "total_weight", "n_components", "weights", "means", "covariances", "covariance_type"),
    *("log_likelihood", "entropy", "bic", "n_iter", "converged", "status", "message"),
)
ROWS_AT_ONCE: Final = 4096
SQUARABLE: Final = (1e-280, 1e280)  # variances outside may have lost digits, or all, to underflow and overflow

__all__ = ["COLUMNS", "join_fits", "load_fits", "load_fits_metadata", "save_fits", "status_counts"]


def check_name(path: str | os.PathLike[str]) -> None:
    """ValueError if a file of many fits is to have a name that belongs to another format."""
    if Path(path).suffix.lower() in {*FORMATS} - {".parquet"}:
        raise ValueError(f"{os.fspath(path)}: many fits are written as Parquet; name it {Path(path).stem}.parquet")


def save_fits(
    fits: ManyFits,
    path: str | os.PathLike[str],
    *,
    labels: Any = None,
    label_name: str = "group",
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
) -> None:
    """Write many fits as a Parquet table; an existing file is replaced, at once and whole.

    Parameters
    ----------
    fits : ManyFits
    path : path-like
    labels : (B,) pyarrow.Array, optional
        Of the problems; `fits.groups` by default, and no column if that is None.
    label_name : str
        Of their column.
    metadata : mapping of str to str, optional
        Anything to keep beside it, for `load_fits_metadata`.
    durable : bool
        Wait for the disk.

    Raises
    ------
    ValueError
        If a label of `fits.groups` is there twice, or of a type that Parquet has no column for; or if `path` is named
        after another format.
    OSError
        If the file cannot be written.
    """
    check_name(path)
    arrow = pyarrow_module("pyarrow")
    if labels is None and fits.groups is not None:
        for label in repeated(fits.groups):
            raise ValueError(f"groups holds {label!r} twice; a file has one mixture for each label: select each once")
        labels = _label_column(fits.groups)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "covariance_type": fits.covariance_type,
        "n_features": str(fits.means.shape[2]),
        "criterion": fits.criterion,
        "backend": fits.backend,
        "writer": f"emalgam {__version__}",
    } | ({} if labels is None else {"label": label_name})
    with replacing(path, durable=durable) as file, _Writer(file) as writer:
        for first in range(0, max(len(fits), 1), ROWS_AT_ONCE):
            which = slice(first, first + ROWS_AT_ONCE)
            columns = {} if labels is None else {label_name: labels[which]}
            columns |= _columns(fits[which])
            writer.write(arrow.table(columns).replace_schema_metadata(described | dict(metadata or {})))


def _label_column(labels: np.ndarray) -> Any:
    """Labels as an array of pyarrow; ValueError if it has none that gives them back."""
    arrow = pyarrow_module("pyarrow")
    try:
        column = arrow.array(labels)
    except (arrow.ArrowException, OverflowError, UnicodeError):
        column = None
    nested = column is None or arrow.types.is_nested(column.type)
    if nested or not np.array_equal(column.to_numpy(zero_copy_only=False), labels):
        kind = type(labels[-1]).__name__ if labels.dtype == object else labels.dtype
        example = f", such as {labels[-1]!r}" if len(labels) else ""
        raise ValueError(
            f"groups holds labels of type {kind}{example}, for which Parquet has no column; fit with labels that are "
            "text: groups=labels.astype(str)"
        )
    return column


def join_fits(parts: Sequence[Path], path: Path, *, folder: Path) -> None:
    """Write the rows of several files of fits, which have the same columns and metadata, one after the other.

    The new file is made in `folder`, on the same disk, and then takes the name `path`.
    """
    parquet = pyarrow_module("pyarrow.parquet")
    with replacing(path, folder=folder, durable=True) as file, _Writer(file) as writer:
        for part in parts:
            with reading(part, ModelFileError), parquet.ParquetFile(part) as source:
                table = source.read()
            writer.write(table)


class _Writer:
    """A Parquet file that takes its schema from the first table."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.writer: Any = None

    def write(self, table: Any) -> None:
        if self.writer is None:
            self.writer = pyarrow_module("pyarrow.parquet").ParquetWriter(
                self.file, table.schema, compression="none", use_dictionary=list(REPEATED)
            )
        self.writer.write_table(table)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()


def _columns(fits: ManyFits) -> dict[str, Any]:
    """The columns of some problems, in order."""
    arrow = pyarrow_module("pyarrow")
    lists = {}
    for name in LISTS:
        values = getattr(fits, name)
        present, lengths = _present(name, values, fits)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lists[name] = arrow.ListArray.from_arrays(ends, values[present].reshape(-1))
    others = {"covariance_type": arrow.array([fits.covariance_type] * len(fits), arrow.string())}
    others["message"] = arrow.array(fits.message.tolist(), arrow.string())
    return {name: lists[name] if name in lists else others.get(name, getattr(fits, name, None)) for name in COLUMNS}


def _present(name: str, values: np.ndarray, fits: ManyFits) -> tuple[np.ndarray, np.ndarray]:
    """Where the padded arrays hold components, (B, K) or (B,) bool, and how many numbers each row has, (B,)."""
    if name == "covariances" and fits.covariance_type == "tied":
        present = fits.n_components > 0
        return present, present * math.prod(values.shape[1:])
    present = np.arange(fits.weights.shape[1]) < fits.n_components[:, None]
    return present, fits.n_components * math.prod(values.shape[2:])


def load_fits(path: str | os.PathLike[str]) -> ManyFits:
    """The fits in a file that `ManyFits.save` or ``emalgam fit-many`` wrote, in ascending order of their labels.

    K of the arrays is the largest number of components in the file.

    Raises
    ------
    ModelFileError
        If the file is missing, cut short, forged, of another format or version, or holds values that are no mixtures.
    ImportError
        If pyarrow is missing.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import emalgam
    >>> X = np.random.default_rng(0).normal(size=(300, 2))
    >>> fits = emalgam.fit_many(X, 1, groups=np.repeat(["a", "b", "c"], 100), random_state=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fits.save(f"{folder}/fits.parquet")
    ...     loaded = emalgam.load_fits(f"{folder}/fits.parquet")
    >>> loaded.groups.tolist(), bool((loaded.means == fits.means).all())
    (['a', 'b', 'c'], True)
    """
    file = Path(path)
    with reading(file, ModelFileError), pyarrow_module("pyarrow.parquet").ParquetFile(file) as table:
        metadata = _metadata(table, file)
        _check_columns(table, metadata.get("label"), file)
        _check_footer(table, metadata.get("label"), file)
        fits = _read(table, metadata, file)
    return _in_order(fits, file)


def load_fits_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file of fits.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, or of another format.
    """
    with reading(Path(path), ModelFileError), pyarrow_module("pyarrow.parquet").ParquetFile(path) as table:
        return _metadata(table, Path(path))


def status_counts(path: str | os.PathLike[str]) -> dict[Status, int]:
    """How many of the problems in a file of fits ended with each status that occurs."""
    with reading(Path(path), ModelFileError), pyarrow_module("pyarrow.parquet").ParquetFile(path) as table:
        found = np.bincount(_numbers(table, "status", Path(path)), minlength=len(Status))
    return {status: int(found[status]) for status in Status if found[status]}


def _metadata(table: Any, path: Path) -> dict[str, str]:
    found = table.schema_arrow.metadata or {}
    metadata = {key.decode(): value.decode() for key, value in found.items()}
    check_description(metadata, FORMAT, FORMAT_VERSION, path)
    if metadata.get("criterion") not in CRITERIA:
        fail(path, "criterion", f"is {metadata.get('criterion')!r}, expected one of {', '.join(CRITERIA)}")
    for name in ("n_features", "backend"):
        if name not in metadata:
            fail(path, name, "is missing from the metadata")
    if not 1 <= _integer(metadata["n_features"]) <= path.stat().st_size:
        fail(path, "n_features", f"is {metadata['n_features'][:40]!r}, expected a number of features")
    return metadata


def _integer(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 18 else -1


def _check_columns(table: Any, label: str | None, path: Path) -> None:
    """All columns there, each of its type."""
    arrow, schema = pyarrow_module("pyarrow"), table.schema_arrow
    expected = dict.fromkeys(NUMBERS, arrow.int64()) | {"converged": arrow.bool_()}
    expected |= dict.fromkeys(("total_weight", "log_likelihood", "entropy"), arrow.float64())
    expected |= dict.fromkeys(LISTS, arrow.list_(arrow.float64()))
    for name in (*expected, *([] if label is None else [label])):
        if schema.names.count(name) != 1:
            fail(path, name, f"is there {schema.names.count(name)} times; expected one column of this name")
    for name, wanted in expected.items():
        found = schema.field(name).type
        same = arrow.types.is_list(found) and found.value_type == arrow.float64() if name in LISTS else found == wanted
        if not same:
            fail(path, name, f"is a column of {found}, expected {wanted}")


def _check_footer(table: Any, label: str | None, path: Path) -> None:
    """What is read is plain and uncompressed, and no column has more values than the file has bytes for them."""
    footer = table.metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    if sum(group.num_rows for group in groups) != footer.num_rows:
        fail(path, "footer", f"has {footer.num_rows} rows by its own account, and its row groups others (forged?)")
    for group in groups:
        for chunk in map(group.column, range(group.num_columns)):
            is_label = chunk.path_in_schema == label
            name = chunk.path_in_schema.partition(".")[0]
            if is_label or name in (*NUMBERS, *LISTS, "converged"):
                _check_chunk(chunk, name, group.num_rows, is_label, path)


def _check_chunk(chunk: Any, name: str, rows: int, is_label: bool, path: Path) -> None:
    """One column of a row group; an empty list counts as a value too, labels and bits may take less than 8 bytes."""
    size, values, held = path.stat().st_size, chunk.num_values, chunk.total_compressed_size
    if chunk.compression != "UNCOMPRESSED" or not set(chunk.encodings) <= {"PLAIN", "RLE"}:
        stored = f"{chunk.compression}, {'/'.join(chunk.encodings)}"
        fail(path, name, f"is stored as {stored}; expected plain and uncompressed (rewritten by another program?)")
    least = 0 if is_label or name == "converged" else 8
    if held > size or least * (values - rows * (name in LISTS)) > held or (name not in LISTS and values != rows):
        problem = f"has {values} values in {held} bytes, for {rows} rows in a file of {size} bytes"
        fail(path, name, f"{problem} (cut short, forged?)")


def _read(table: Any, metadata: dict[str, str], path: Path) -> ManyFits:
    """All rows in the order of the file."""
    B, label = table.metadata.num_rows, metadata.get("label")
    n_components = _numbers(table, "n_components", path)
    covariance_type, D = metadata["covariance_type"], int(metadata["n_features"])
    K, size = int(n_components.max(initial=0)), path.stat().st_size
    padded = B * (K + K * D + math.prod(COVARIANCES[covariance_type].shape(K, D)))
    if n_components.min(initial=0) < 0 or 8 * padded > DEFLATE_RATIO * size:
        problem = f"goes from {n_components.min(initial=0)} to {K} with {D} features, in a file of {size} bytes"
        fail(path, "n_components", f"{problem} (forged?)")
    mixtures = Mixtures.empty(covariance_type, B, K, D)
    mixtures.n_components[:] = n_components
    outcomes = Outcomes(*(_numbers(table, field.name, path) for field in fields(Outcomes)))
    fits = ManyFits(
        **{field.name: getattr(mixtures, field.name) for field in fields(Mixtures)},
        **{field.name: getattr(outcomes, field.name) for field in fields(Outcomes)},
        n_samples=_numbers(table, "n_samples", path),
        total_weight=_numbers(table, "total_weight", path),
        criterion=metadata["criterion"],
        groups=None if label is None else _numbers(table, label, path),
        backend=metadata["backend"],
    )
    _check_outcomes(fits, path)
    for which, batch in _batches(table, list(LISTS)):
        _fill(fits[which], batch, which.start, path)
        _check_mixtures(fits[which], which.start, path)
    return fits


def _numbers(table: Any, name: str, path: Path) -> np.ndarray:
    """A column that is no list, (B,)."""
    none = table.schema_arrow.empty_table().column(name).to_numpy()  # has the type of an empty file's column
    parts = [batch.column(name) for _, batch in _batches(table, [name])]
    if any(part.null_count for part in parts):
        fail(path, name, "lacks values")
    return np.concatenate([none, *(part.to_numpy(zero_copy_only=False) for part in parts)])


def _batches(table: Any, columns: list[str]) -> Iterator[tuple[slice, Any]]:
    first = 0
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
        yield slice(first, first + len(batch)), batch
        first += len(batch)


def _check_outcomes(fits: ManyFits, path: Path) -> None:
    """Numbers that belong together; the first row where they do not is named."""
    fitted = fits.n_components > 0
    wrong = {
        "status": (fits.status < 0) | (fits.status >= len(Status)) | ((fits.status <= Status.COLLAPSED) != fitted),
        "n_samples": fits.n_samples < 0,
        "total_weight": fitted & ~((fits.total_weight > 0) & (fits.total_weight < np.inf)),
        "log_likelihood": np.isfinite(fits.log_likelihood) != fitted,
        "entropy": np.isfinite(fits.entropy) != fitted,
        "n_iter": fits.n_iter < 0,
    }
    for name, rows in wrong.items():
        if rows.any():
            row = int(rows.argmax())
            found = f"{getattr(fits, name)[row]} with {fits.n_components[row]} components"
            fail(path, name, f"is {found} in row {row}, which cannot be")


def _fill(fits: ManyFits, batch: Any, first: int, path: Path) -> None:
    """Put the lists of some rows into the padded arrays of these."""
    for name in LISTS:
        column, values = batch.column(name), getattr(fits, name)
        present, lengths = _present(name, values, fits)
        found = np.diff(column.offsets.to_numpy())
        if column.null_count or (found != lengths).any():
            row = int((found != lengths).argmax())
            problem = f"holds {found[row]} numbers in row {first + row}, expected {lengths[row]}"
            fail(path, name, f"{problem} for {fits.n_components[row]} components")
        numbers = column.flatten()
        if numbers.null_count:
            fail(path, name, "lacks values")
        values[present] = numbers.to_numpy().reshape(-1, *values.shape[present.ndim :])


def _check_mixtures(fits: ManyFits, first: int, path: Path) -> None:
    """Weights that sum to one, finite means, covariances that are positive definite; `Mixture` says what is not."""
    if _plausible(fits):
        return
    for row in np.flatnonzero(fits.n_components).tolist():
        try:
            fits.mixture(row)
        except ValueError as error:
            field, _, problem = str(error).partition(" ")
            fail(path, field, f"{problem} (row {first + row})")


def _plausible(fits: ManyFits) -> bool:
    """Whether no mixture is wrong, of all at once; covariances that left the range of float64 are not judged."""
    weights, means, covariances = (getattr(fits, name)[_present(name, getattr(fits, name), fits)[0]] for name in LISTS)
    kind = COVARIANCES["full" if fits.covariance_type == "tied" else fits.covariance_type]
    variances = np.einsum("kii->ki", covariances) if kind.direct_map == "full" else covariances
    low, high = SQUARABLE
    extreme = ((variances >= 0) & ((variances < low) | (variances > high))).any(axis=tuple(range(1, variances.ndim)))
    judged = covariances[~extreme]
    if not all(np.isfinite(values).all() for values in (weights, means, judged)) or (weights < 0).any():
        return False
    if (np.abs(np.nansum(fits.weights, axis=1) - (fits.n_components > 0)) > WEIGHT_SUM_TOLERANCE).any():
        return False
    try:
        factor_covariances(kind, judged)
    except ValueError:
        return False
    return True


def _in_order(fits: ManyFits, path: Path) -> ManyFits:
    """In ascending order of the labels, each of which may be there once."""
    if fits.groups is None:
        return fits
    for label in repeated(fits.groups):
        fail(path, "labels", f"hold {label!r} twice")
    order = np.argsort(fits.groups, kind="stable")
    return fits if (np.diff(order) == 1).all() else fits[order]
