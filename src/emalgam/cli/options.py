"""Options that several commands share, and what is made of their texts: typer checks words and numbers only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Table of numbers: .npy, .npz, .csv, .parquet, or a folder of the last."),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model file that `emalgam fit` wrote.")]
TableToWrite = Annotated[Path, typer.Option("-o", "--output", help="Table to write: .npy, .npz, .csv or .parquet.")]
Covariance = Annotated[Literal["full", "tied", "diag", "spherical"], typer.Option(help="Covariance type.")]
Tol = Annotated[float, typer.Option(min=0.0, help="Stop below this change of the mean log-likelihood.")]
MaxIter = Annotated[int, typer.Option(min=1, help="Most iterations of EM.")]
NInit = Annotated[int, typer.Option(min=1, help="Restarts; the best one is kept.")]
RegCovar = Annotated[
    str, typer.Option(metavar="auto|FLOAT", help="Added to variances; auto: 1e-6 of each feature's variance.")
]
Backend = Annotated[
    Literal["auto", "reference", "cython_cpu", "numba_cpu", "numba_cuda"],
    typer.Option(help="What computes; `emalgam info` lists what can run here."),
]
Algorithm = Annotated[
    Literal["auto", "packed", "direct"], typer.Option(help="auto takes the fastest that is accurate on the data.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="All processors by default; results do not depend on it.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Fit on the workers of the Dask scheduler at tcp://HOST:PORT, who read the same file under the same path; "
        "--threads are those of a task then, one by default.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, unless --json.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def parse_reg_covar(text: str) -> float | Literal["auto"]:
    """``auto``, or ``1e-3``."""
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is neither auto nor a number >= 0", param_hint="--reg-covar")
    return value


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """``a,b``, or ``a, b``."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def parse_component_range(text: str) -> range:
    """``3``, or ``1:6`` for 1 to 6, both included."""
    first, colon, last = text.partition(":")
    ends = [int(end) if end.isascii() and end.isdigit() else 0 for end in (first, last if colon else first)]
    if not 1 <= ends[0] <= ends[1]:
        expected = "expected a number >= 1, or FIRST:LAST with 1 <= FIRST <= LAST"
        raise typer.BadParameter(f"{text!r} is no number of components; {expected}", param_hint="-k")
    return range(ends[0], ends[1] + 1)


def parse_lengths(text: str, option: str) -> tuple[int, ...]:
    """``28,28``."""
    lengths = tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in text.split(","))
    if min(lengths) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers >= 1, such as 256,64", param_hint=option)
    return lengths


def parse_fraction(text: str, option: str) -> float:
    """``0.5``, or ``1/255``."""
    from fractions import Fraction

    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise typer.BadParameter(f"{text!r} is no number other than 0, such as 0.5 or 1/255", param_hint=option)
    return value


def parse_fraction_or_path(text: str) -> float | Path:
    """A number from 0 to 1, or the name of a file."""
    try:
        value = float(text)
    except ValueError:
        return Path(text)
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text} is no fraction, 0 <= fraction < 1", param_hint="--validation")
    return value
