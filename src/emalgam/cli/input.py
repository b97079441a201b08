"""The rows that a command reads: in memory, as a stream, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import typer

from emalgam.tables import read_table

STREAMED_BYTES: Final = 2**30


@contextmanager
def opened(
    data: Path,
    features: tuple[str, ...] | None,
    weights: Path | None,
    weight_column: str | None,
    stream: bool | None,
    dask: str | None,
    persist: bool,
) -> Iterator[tuple[Any, Any]]:
    """The rows to fit and their weights: in memory, as a stream, or on the workers of a cluster."""
    if weights is not None and weight_column is not None:
        raise typer.BadParameter("give --weights or --weight-column, not both", param_hint="--weight-column")
    if dask is None:
        if persist:
            raise typer.BadParameter("is for --dask, which was not given", param_hint="--persist")
        yield open_here(data, features, weights, weight_column, stream)
        return
    if weights is not None or stream is not None:
        problem = "workers read DATA and its weights from Parquet: name a column with --weight-column, and leave out"
        raise typer.BadParameter(f"{problem} --weights, --stream and --in-memory", param_hint="--dask")
    from emalgam import distributed
    from emalgam.dask_parts import DaskParts

    with distributed.connected(dask) as client:
        frame = distributed.read_parquet(data)
        yield DaskParts(frame.persist() if persist else frame, weight_column, features, client), None


def open_here(
    data: Path,
    features: tuple[str, ...] | None = None,
    weights: Path | None = None,
    weight_column: str | None = None,
    stream: bool | None = None,
) -> tuple[Any, Any]:
    """The rows and their weights: in memory or, by default if they are large, as a stream."""
    from emalgam.stream import open_stream

    large = data.is_dir() or (data.suffix.lower() in (".npy", ".parquet") and _size(data) > STREAMED_BYTES)
    if stream is None:
        stream = large or weight_column is not None
    if not stream and (data.is_dir() or weight_column is not None):
        raise typer.BadParameter("a folder, or a weight column, is read with --stream", param_hint="--in-memory")
    sample_weight = None if weights is None else _column(weights)
    if stream:
        weight = weight_column if sample_weight is None else sample_weight
        return open_stream(data, columns=features, sample_weight=weight), None
    return read_table(data, columns=features), sample_weight


def _size(path: Path) -> int:
    """In bytes; 0 of what is no file, which reading it will say."""
    return path.stat().st_size if path.is_file() else 0


def _column(path: Path) -> np.ndarray:
    """A file's only column, (N,)."""
    array = read_table(path, names=("weights", "sample_weight"))
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{path}: has shape {array.shape}; expected one weight for each row of the data")
    return array
