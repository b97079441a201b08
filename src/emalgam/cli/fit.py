"""``emalgam fit``: one mixture to all rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from emalgam import __version__
from emalgam.cli.input import opened
from emalgam.cli.options import (
    Algorithm,
    Backend,
    Covariance,
    Dask,
    Data,
    Json,
    MaxIter,
    NInit,
    Quiet,
    RegCovar,
    Seed,
    Threads,
    Tol,
    parse_names,
    parse_reg_covar,
)
from emalgam.cli.output import check_writable
from emalgam.cli.report import criteria, print_report

if TYPE_CHECKING:
    from emalgam.checkpoint import Checkpoint
    from emalgam.em import Fit, Iteration


def fit(
    data: Data,
    components: Annotated[int, typer.Option("-k", "--components", min=1, help="Number of components K.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Model file to write (safetensors).")] = None,
    covariance: Covariance = "full",
    tol: Tol = 1e-3,
    max_iter: MaxIter = 100,
    n_init: NInit = 1,
    init: Annotated[
        Literal["kmeans", "k-means++", "random", "random_from_data"], typer.Option(help="How to start.")
    ] = "kmeans",
    reg_covar: RegCovar = "auto",
    seed: Seed = 0,
    features: Annotated[
        str | None, typer.Option(help="Columns of a Parquet file or folder, between commas; all others by default.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Sample weights: a file like DATA with one column.")] = None,
    weight_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Sample weights: this column of a Parquet file or folder.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--in-memory",
            help="Read .npy and Parquet in chunks in every pass; by default folders and files above 1 GiB.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Write the state to this file now and then; removed when the fit is done. Data read in chunks have "
            "OUTPUT.checkpoint by default.",
        ),
    ] = None,
    checkpoint_every: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="How often at most.")] = 30.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --checkpoint; begin if there is none.")] = False,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    threads: Threads = None,
    precision: Annotated[
        Literal["strict", "mixed", "tf32"],
        typer.Option(
            help="mixed: float32 first and float64 last, faster where EM takes long; tf32: a GPU's products may round "
            "float32 operands to ten bits."
        ),
    ] = "strict",
    on_degenerate: Annotated[
        Literal["regularize", "reseed", "error"], typer.Option(help="What to do with a component that collapses.")
    ] = "regularize",
    dask: Dask = None,
    persist: Annotated[
        bool, typer.Option("--persist", help="With --dask: keep DATA in the workers' memory; else read in every pass.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a mixture to the rows of DATA by expectation-maximization."""
    from emalgam import em
    from emalgam.mixture import LogLikelihood

    floor = parse_reg_covar(reg_covar)
    check_writable(output, data, weights, checkpoint)
    check_writable(checkpoint, data, weights)
    with opened(data, parse_names(features), weights, weight_column, stream, dask, persist) as (x, sample_weight):
        saved = _checkpoint(checkpoint or _default_checkpoint(x, output), checkpoint_every, resume)
        start = time.perf_counter()
        with _progress(max_iter, quiet, x) as (watched, callback):
            fitted = em.fit(
                watched,
                components,
                covariance_type=covariance,
                sample_weight=sample_weight,
                tol=tol,
                reg_covar=floor,
                max_iter=max_iter,
                n_init=n_init,
                init_params=init,
                random_state=seed,
                on_degenerate=on_degenerate,
                backend=backend,
                algorithm=algorithm,
                n_threads=threads,
                callback=callback,
                precision=precision,
                checkpoint=saved,
            )
        seconds = time.perf_counter() - start
        if output is not None:
            _save(fitted, output)
        if saved is not None:
            saved.end()
        if as_json or not quiet:
            report = _fit_report(fitted, watched, seconds, precision)
            if sample_weight is None and weight_column is None:  # the criteria count rows and have no place for weights
                how = {"backend": backend, "algorithm": algorithm, "n_threads": threads}
                report |= criteria(fitted.mixture, LogLikelihood.of(fitted.mixture, x, **how))
            print_report(report | {"output": output}, as_json)


def _default_checkpoint(x: Any, output: Path | None) -> Path | None:
    """Beside the model, if the data are a stream: those take long."""
    from emalgam.stream import Stream

    return output.with_name(f"{output.name}.checkpoint") if output is not None and isinstance(x, Stream) else None


def _checkpoint(path: Path | None, seconds: float, resume: bool) -> Checkpoint | None:
    if path is None:
        if resume:
            raise typer.BadParameter(
                "give the file to go on from with --checkpoint (or DATA read in chunks and --output)",
                param_hint="--resume",
            )
        return None
    from emalgam.checkpoint import Checkpoint

    return Checkpoint(path, seconds=seconds, resume=resume)


@contextmanager
def _progress(max_iter: int, quiet: bool, x: Any) -> Iterator[tuple[Any, Callable[[Iteration], bool] | None]]:
    """The data, watched if they are a stream, and a callback: both show on standard error if somebody is looking."""
    from emalgam.stream import Stream, WatchedStream

    if quiet or not sys.stderr.isatty():
        yield (WatchedStream(x) if isinstance(x, Stream) else x), None
        return
    from emalgam.progress import fitting

    with fitting(max_iter) as (seen, show):
        yield (WatchedStream(x, seen) if isinstance(x, Stream) else x), show


def _save(fitted: Fit, path: Path) -> None:
    from emalgam.model_file import save_model

    metadata = {
        "writer": f"emalgam {__version__}",
        "n_iter": str(fitted.n_iter),
        "converged": str(fitted.converged).lower(),
        "lower_bound": repr(float(fitted.lower_bound)),
    }
    save_model(fitted.mixture, path, metadata=metadata)


def _fit_report(fitted: Fit, x: Any, seconds: float, precision: str) -> dict[str, Any]:
    passes = getattr(x, "passes", None)
    streamed = {} if passes is None else {"passes": passes, "rows_per_second": x.rows / seconds}
    return {
        "n_samples": x.rows // x.passes if streamed else x.shape[0],
        "n_features": x.n_features if streamed else x.shape[1],
        "n_components": fitted.mixture.n_components,
        "covariance_type": fitted.mixture.covariance_type,
        "backend": fitted.backend,
        "algorithm": fitted.algorithm,
        "arithmetic": fitted.arithmetic,
        "error_bound": fitted.error_bound,
        "converged": fitted.converged,
        "n_iter": fitted.n_iter,
        **({"float32_iterations": fitted.float32_iterations} if precision == "mixed" else {}),
        "seconds": seconds,
        **streamed,
        "effective_components": fitted.effective_components,
        "lower_bound": fitted.lower_bound,
    }
