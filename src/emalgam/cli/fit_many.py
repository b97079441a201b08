"""``emalgam fit-many``: a mixture to each group of rows."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from emalgam.cli.options import (
    Backend,
    Covariance,
    Dask,
    Json,
    MaxIter,
    NInit,
    Quiet,
    RegCovar,
    Seed,
    Threads,
    Tol,
    parse_component_range,
    parse_names,
    parse_reg_covar,
)
from emalgam.cli.output import check_writable
from emalgam.cli.report import print_report

if TYPE_CHECKING:
    from emalgam.fit_table import Job, Summary


def fit_many(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet file with a column that names the groups.")],
    by: Annotated[str, typer.Option("--by", help="Column of the groups' labels.")],
    components: Annotated[
        str, typer.Option("-k", "--components", metavar="K|FIRST:LAST", help="Components, or a range to choose from.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file to write, a row for each group.")],
    features: Annotated[str | None, typer.Option(help="Columns, between commas; all others by default.")] = None,
    covariance: Covariance = "full",
    criterion: Annotated[
        Literal["bic", "aic", "icl"], typer.Option(help="Chooses between numbers of components and restarts.")
    ] = "bic",
    n_init: NInit = 1,
    max_iter: MaxIter = 100,
    tol: Tol = 1e-3,
    reg_covar: RegCovar = "auto",
    weights: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of sample weights.")] = None,
    seed: Seed = 0,
    backend: Backend = "auto",
    threads: Threads = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; begin if there is none.")
    ] = False,
    dask: Dask = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a mixture to each group of rows of TABLE, and write them as a table.

    A run that is killed or finds the disk full goes on with --resume and ends with the same rows.
    """
    from emalgam.backends import resolve
    from emalgam.fit_table import Job
    from emalgam.fits_file import check_name

    n_components = parse_component_range(components)
    settings: dict[str, Any] = {
        "covariance_type": covariance,
        "criterion": criterion,
        "n_init": n_init,
        "max_iter": max_iter,
        "tol": tol,
        "reg_covar": parse_reg_covar(reg_covar),
        "random_state": seed,
        "backend": resolve(backend),
    }
    job = Job(
        table=table,
        output=output,
        by=by,
        features=parse_names(features),
        weights=weights,
        n_components=n_components,
        settings=settings,
    )
    check_writable(output, table)
    check_name(output)
    start = time.perf_counter()
    summary = _fit_table(job, dask, resume=resume, n_threads=threads, progress=not quiet and sys.stderr.isatty())
    seconds = time.perf_counter() - start
    if as_json or not quiet:
        print_report(_many_report(job, summary, seconds), as_json)


def _fit_table(job: Job, dask: str | None, **how: Any) -> Summary:
    """`emalgam.fit_table.fit_table` here, or on the workers of a cluster."""
    from emalgam.fit_table import fit_table

    if dask is None:
        return fit_table(job, **how)
    from emalgam import distributed

    with distributed.connected(dask) as client:
        return fit_table(job, fitting=partial(distributed.fit_shards, client), **how)


def _many_report(job: Job, summary: Summary, seconds: float) -> dict[str, Any]:
    fitted = summary.n_groups - summary.resumed
    return {
        "n_groups": summary.n_groups,
        "n_samples": summary.n_samples,
        "n_features": len(summary.features),
        "covariance_type": job.settings["covariance_type"],
        "criterion": job.settings["criterion"],
        "backend": job.settings["backend"],
        "resumed": summary.resumed,
        "seconds": seconds,
        "fits_per_second": fitted / seconds,
        "status": {status.name.lower(): count for status, count in summary.statuses.items()},
        "output": job.output,
    }
