"""The command line: ``emalgam fit | fit-many | score | predict | sample | kl | train-ae | generate | info``.

Results go to standard output, as text or (``--json``) as one JSON object; progress, warnings and errors go to standard
error, each on one line. Libraries that a command can do without are imported in the functions that use them: a short
fit should not wait for pyarrow or rich.

======  ==================================================================
exit    meaning
======  ==================================================================
0       done; a fit that stopped at --max-iter warns and says so in its report
1       the input, the model file or the fit is at fault
2       the command line is: an unknown option, a value out of range
3       the backend that was asked for cannot run here
130     interrupted
======  ==================================================================
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
import typer

from emalgam import __version__
from emalgam.backends import BackendUnavailable
from emalgam.files import check_target
from emalgam.tables import check_suffix, read_table, write_table

if TYPE_CHECKING:
    from emalgam.checkpoint import Checkpoint
    from emalgam.em import Fit, Iteration
    from emalgam.fit_table import Job, Summary
    from emalgam.mixture import Mixture

EXIT_FAULT: Final = 1
EXIT_BACKEND: Final = 3
STREAMED_BYTES: Final = 2**30
EPILOG: Final = (
    "Exit codes: 0 done (a fit that did not converge warns), 1 input, model or fit at fault, 2 command line at fault, "
    "3 backend unavailable, 130 interrupted."
)

app = typer.Typer(
    help="Fit, score and sample Gaussian mixtures.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Table of numbers: .npy, .npz, .csv, .parquet, or a folder of the last."),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model file that `emalgam fit` wrote.")]
Backend = Annotated[
    Literal["auto", "reference", "cython_cpu", "numba_cpu", "numba_cuda"],
    typer.Option(help="What computes; `emalgam info` lists what can run here."),
]
Algorithm = Annotated[
    Literal["auto", "packed", "direct"], typer.Option(help="auto takes the fastest that is accurate on the data.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="All processors by default; results do not depend on it.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
RegCovar = Annotated[
    str, typer.Option(metavar="auto|FLOAT", help="Added to variances; auto: 1e-6 of each feature's variance.")
]
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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emalgam {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fit, score and sample Gaussian mixtures; train autoencoders that draw from them."""


@app.command(epilog=EPILOG)
def fit(
    data: Data,
    components: Annotated[int, typer.Option("-k", "--components", min=1, help="Number of components K.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Model file to write (safetensors).")] = None,
    covariance: Annotated[Literal["full", "tied", "diag", "spherical"], typer.Option(help="Covariance type.")] = "full",
    tol: Annotated[float, typer.Option(min=0.0, help="Stop below this change of the mean log-likelihood.")] = 1e-3,
    max_iter: Annotated[int, typer.Option(min=1, help="Most iterations of EM.")] = 100,
    n_init: Annotated[int, typer.Option(min=1, help="Restarts; the best one is kept.")] = 1,
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
        Literal["strict", "tf32"], typer.Option(help="tf32: a GPU's products may round float32 operands to ten bits.")
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
    from emalgam.mixture import log_likelihood

    floor = _reg_covar(reg_covar)
    _check_folder(output, data, weights, checkpoint)
    _check_folder(checkpoint, data, weights)
    with _data(data, _names(features), weights, weight_column, stream, dask, persist) as (x, sample_weight):
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
            report = _fit_report(fitted, watched, seconds)
            if sample_weight is None and weight_column is None:  # the criteria count rows and have no place for weights
                how = {"backend": backend, "algorithm": algorithm, "n_threads": threads}
                report |= _criteria(fitted.mixture, *log_likelihood(fitted.mixture, x, **how))
            _print_report(report | {"output": output}, as_json)


@app.command(epilog=EPILOG)
def fit_many(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet file with a column that names the groups.")],
    by: Annotated[str, typer.Option("--by", help="Column of the groups' labels.")],
    components: Annotated[
        str, typer.Option("-k", "--components", metavar="K|FIRST:LAST", help="Components, or a range to choose from.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file to write, a row for each group.")],
    features: Annotated[str | None, typer.Option(help="Columns, between commas; all others by default.")] = None,
    covariance: Annotated[Literal["full", "tied", "diag", "spherical"], typer.Option(help="Covariance type.")] = "full",
    criterion: Annotated[
        Literal["bic", "aic", "icl"], typer.Option(help="Chooses between numbers of components and restarts.")
    ] = "bic",
    n_init: Annotated[int, typer.Option(min=1, help="Restarts; the best one is kept.")] = 1,
    max_iter: Annotated[int, typer.Option(min=1, help="Most iterations of EM.")] = 100,
    tol: Annotated[float, typer.Option(min=0.0, help="Stop below this change of the mean log-likelihood.")] = 1e-3,
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

    settings: dict[str, Any] = {
        "covariance_type": covariance,
        "criterion": criterion,
        "n_init": n_init,
        "max_iter": max_iter,
        "tol": tol,
    }
    job = Job(
        table=table,
        output=output,
        by=by,
        features=_names(features),
        weights=weights,
        n_components=_component_range(components),
        settings=settings | {"reg_covar": _reg_covar(reg_covar), "random_state": seed, "backend": resolve(backend)},
    )
    _check_folder(output, table)
    check_name(output)
    start = time.perf_counter()
    summary = _fit_table(job, dask, resume=resume, n_threads=threads, progress=not quiet and sys.stderr.isatty())
    seconds = time.perf_counter() - start
    if as_json or not quiet:
        _print_report(_many_report(job, summary, seconds), as_json)


@app.command(epilog=EPILOG)
def score(
    data: Data,
    model: Model,
    each: Annotated[Path | None, typer.Option(help="Write the log-density of each row to this table.")] = None,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Log-likelihood of DATA under MODEL, in nats, and its AIC and BIC."""
    from emalgam.mixture import log_likelihood
    from emalgam.model_file import load_model

    _check_table(each, data, model)
    mixture, (x, _) = load_model(model), _data_here(data)
    how: dict[str, Any] = {"backend": backend, "algorithm": algorithm, "n_threads": threads}
    if each is None:
        total, n_samples = log_likelihood(mixture, x, **how)
    else:
        log_prob = mixture.log_prob(x, **how)
        write_table(each, log_prob, name="log_prob")
        total, n_samples = float(log_prob.sum()), len(log_prob)
    sizes = {"n_samples": int(n_samples), "n_components": mixture.n_components, "n_parameters": mixture.n_parameters}
    _print_report(sizes | _criteria(mixture, total, n_samples) | {"each": each}, as_json)


@app.command(epilog=EPILOG)
def predict(
    data: Data,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Table to write: .npy, .npz, .csv or .parquet.")],
    proba: Annotated[bool, typer.Option("--proba", help="Write the probability of every component instead.")] = False,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The component that each row of DATA most probably came from."""
    from emalgam.model_file import load_model

    _check_table(output, data, model)
    mixture = load_model(model)
    assign = mixture.responsibilities if proba else mixture.predict
    assigned = assign(_data_here(data)[0], backend=backend, algorithm=algorithm, n_threads=threads)
    write_table(output, assigned, name="probability" if proba else "label")
    labels = assigned.argmax(axis=1) if proba else assigned
    counts = np.bincount(labels, minlength=mixture.n_components).tolist()
    _print_report({"n_samples": len(assigned), "rows_per_component": counts, "output": output}, as_json)


@app.command(epilog=EPILOG)
def sample(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Table to write: .npy, .npz, .csv or .parquet.")],
    n_samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Rows to draw.")] = 1000,
    labels: Annotated[Path | None, typer.Option(help="Write the component of each row to this table.")] = None,
    draw: Annotated[
        Literal["plain", "antithetic", "stratified"],
        typer.Option(help="antithetic: rows in mirrored pairs; stratified: labels in proportion to the weights."),
    ] = "plain",
    seed: Seed = 0,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Draw rows from MODEL, in random order."""
    from emalgam.model_file import load_model

    _check_table(output, model)
    _check_table(labels, model, output)
    x, drawn = load_model(model).sample(n_samples, seed, draw=draw, backend=backend, n_threads=threads)
    write_table(output, x)
    if labels is not None:
        write_table(labels, drawn, name="label")
    _print_report({"n_samples": len(x), "n_features": x.shape[1], "output": output, "labels": labels}, as_json)


@app.command(epilog=EPILOG)
def kl(
    p: Annotated[Path, typer.Argument(help="A model.", show_default=False)],
    q: Annotated[Path, typer.Argument(help="Another one, over the same features.", show_default=False)],
    n_samples: Annotated[int, typer.Option("-n", "--samples", min=30, help="Rows that Monte Carlo draws.")] = 100_000,
    seed: Seed = 0,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Kullback-Leibler divergence of P from Q, in nats, by every estimator."""
    from emalgam import divergence
    from emalgam.model_file import load_model

    pair = load_model(p), load_model(q)
    how: dict[str, Any] = {"backend": backend, "n_threads": threads}
    report: dict[str, Any] = {}
    if all(mixture.n_components == 1 for mixture in pair):
        report["closed_form"] = float(divergence.kl(*pair, **how))
    for name, estimator in (("monte_carlo", "plain"), ("control_variate", "control")):
        found = divergence.kl_monte_carlo(*pair, n_samples=n_samples, estimator=estimator, random_state=seed, **how)
        report |= {name: float(found.value), f"{name}_error": float(found.standard_error)}
    for name in ("variational", "matched", "unscented"):
        report[name] = float(getattr(divergence, f"kl_{name}")(*pair, **how))
    report["product"] = float(divergence.kl_product(*pair, n_threads=threads))  # NumPy, whatever the backend
    bounds = divergence.kl_bounds(*pair, **how)
    _print_report(report | {"lower_bound": float(bounds.lower), "upper_bound": float(bounds.upper)}, as_json)


@app.command(epilog=EPILOG)
def train_ae(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Rows or images: .npy, .npz, .csv, .parquet, or IDX, compressed or not."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the model, losses and pictures.")],
    model: Annotated[
        Literal["linear", "autoencoder", "conv", "vae", "mixture-vae"], typer.Option(help="What to train.")
    ] = "autoencoder",
    latent: Annotated[int, typer.Option(min=1, help="Dimensions of the latents; of conv their channels.")] = 16,
    widths: Annotated[
        str | None,
        typer.Option(metavar="W,...", help="Of hidden layers, from the data to the latents; 256,64, or 32 of conv."),
    ] = None,
    activation: Annotated[
        Literal["relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid", "identity"] | None,
        typer.Option(help="Of hidden layers; relu by default."),
    ] = None,
    tied: Annotated[bool, typer.Option("--tied", help="The decoder's weights are the encoder's, transposed.")] = False,
    upsample: Annotated[
        Literal["transposed", "nearest"] | None,
        typer.Option(help="How conv enlarges: transposed convolutions, by default, or repeated pixels."),
    ] = None,
    likelihood: Annotated[
        Literal["bernoulli", "continuous-bernoulli", "gaussian"] | None,
        typer.Option(help="Of a VAE's data; by default bernoulli if they lie in [0, 1], else gaussian."),
    ] = None,
    beta: Annotated[float | None, typer.Option(min=0.0, help="Weight of a VAE's KL.")] = None,
    kl: Annotated[
        Literal["closed", "monte_carlo"] | None, typer.Option(help="How a VAE's KL is computed; closed by default.")
    ] = None,
    denoising: Annotated[
        float | None,
        typer.Option(min=0.0, help="Deviation of noise on an autoencoder's input; a mixture VAE's while pre-training."),
    ] = None,
    clusters: Annotated[int | None, typer.Option(min=1, help="Components of a mixture VAE's prior.")] = None,
    pretrain: Annotated[
        int | None, typer.Option(min=1, help="Epochs before a mixture VAE gets its prior; --epochs by default.")
    ] = None,
    shape: Annotated[str | None, typer.Option(metavar="[C,]H,W", help="Of one image, if rows are flat.")] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="FLOAT|A/B", help="Multiplies the data: 1/255 for images of bytes.")
    ] = None,
    validation: Annotated[
        str, typer.Option(metavar="FRACTION|FILE", help="Data set apart, or a file like DATA; 0 for none.")
    ] = "0.1",
    components: Annotated[
        str | None,
        typer.Option(
            "-k",
            "--components",
            metavar="K|FIRST:LAST",
            help="Of the mixture of latents; BIC chooses; by default 1:32.",
        ),
    ] = None,
    covariance: Annotated[
        Literal["full", "tied", "diag", "spherical"] | None,
        typer.Option(
            help="Of that mixture; full by default, diag above 64 dimensions. Of a mixture VAE's prior: diag, or full."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often to go through the data.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of Adam.")] = 1e-3,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better validation loss.")
    ] = None,
    precision: Annotated[
        Literal["32", "64", "bf16-mixed", "16-mixed"], typer.Option(help="Of the arithmetic of the training.")
    ] = "32",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in the folder; or begin.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="All processors by default; sums of another number may differ in rounding."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an autoencoder on DATA and fit a mixture to its latents, for `emalgam generate`.

    Writes model.safetensors, losses.csv, losses.png, reconstructions.png and a checkpoint for --resume.
    """
    commands = _autoencoder_commands()

    with _at_fault():
        job = commands.TrainingJob(
            data=data,
            output=output,
            model=model,
            latent=latent,
            widths=None if widths is None else _lengths(widths, "--widths"),
            activation=activation,
            tied=tied or None,
            upsample=upsample,
            likelihood=likelihood,
            beta=beta,
            kl=kl,
            denoising=denoising,
            clusters=clusters,
            pretrain=pretrain,
            shape=None if shape is None else _lengths(shape, "--shape"),
            scale=None if scale is None else _fraction(scale, "--scale"),
            validation=_fraction_or_path(validation),
            components=None if components is None else _component_range(components),
            covariance=covariance,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            patience=patience,
            precision=precision,
            seed=seed,
            resume=resume,
            threads=threads,
        )
    report = commands.run_training(job, progress=not quiet)
    if as_json or not quiet:
        _print_report(report, as_json)


@app.command(epilog=EPILOG)
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that `emalgam train-ae` wrote, or its model.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A picture, .png, or numbers: .npy, .npz, .csv, .parquet.")
    ],
    n_samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="How many to draw.")] = 64,
    prior: Annotated[
        Literal["auto", "mixture", "model"],
        typer.Option(help="Latents from the mixture fitted to them, or from the model's own prior; auto: the first."),
    ] = "auto",
    shape: Annotated[str | None, typer.Option(metavar="[C,]H,W", help="Of one image in the picture.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Draw new data from a trained MODEL."""
    commands = _autoencoder_commands()

    _check_folder(output)
    lengths = None if shape is None else _lengths(shape, "--shape")
    report = commands.run_generation(model, output, n_samples, seed=seed, prior=prior, shape=lengths)
    _print_report(report, as_json)


@app.command(epilog=EPILOG)
def info(
    compile_kernels: Annotated[
        bool,
        typer.Option("--compile", help="Compile the Numba kernels now, if they are not in the cache, and time it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What can compute here, and why not: backends, threads, SIMD level, GPU, versions."""
    from emalgam.machine import describe

    machine = describe(compile_kernels)
    if as_json:
        typer.echo(json.dumps(machine))
        return
    for key in ("default_backend", "n_threads", "simd_level", "gpu"):
        _print_line(key.replace("_", " "), machine[key])
    _print_line("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    _print_line("numba kernels", *_compilation(machine["numba_kernels"]))
    for backend in machine["backends"]:
        remedy = f"unavailable: {backend['reason']}", f"to install it: {backend['install']}"
        _print_line(backend["name"], *(("available",) if backend["available"] else remedy))


def _compilation(kernels: Mapping[str, Any]) -> list[str]:
    """Where compiled Numba kernels are, and how long each took to compile."""
    folder = f"on disk in {kernels['cache']}" if kernels["cache"] else "not compiled yet"
    if kernels["error"]:
        return [folder, f"compiling failed with {kernels['error']}"]
    took = [f"{name}: compiled in {seconds:.1f} s" for name, seconds in kernels["compile_seconds"].items()]
    return [folder, *took, "emalgam info --compile compiles and times those that are not on disk"]


def _print_line(label: str, *texts: object) -> None:
    """Texts in a column, beside a label."""
    for row, text in enumerate(texts):
        typer.echo(f"{label if row == 0 else '':21} {text}")


def _reg_covar(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is neither auto nor a number >= 0", param_hint="--reg-covar")
    return value


def _names(text: str | None) -> tuple[str, ...] | None:
    """``a,b``, or ``a, b``."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _component_range(text: str) -> range:
    """``3``, or ``1:6`` for 1 to 6, both included."""
    first, colon, last = text.partition(":")
    ends = [int(end) if end.isascii() and end.isdigit() else 0 for end in (first, last if colon else first)]
    if not 1 <= ends[0] <= ends[1]:
        expected = "expected a number >= 1, or FIRST:LAST with 1 <= FIRST <= LAST"
        raise typer.BadParameter(f"{text!r} is no number of components; {expected}", param_hint="-k")
    return range(ends[0], ends[1] + 1)


@contextmanager
def _at_fault() -> Iterator[None]:
    """A ValueError is the fault of the command line."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _lengths(text: str, option: str) -> tuple[int, ...]:
    """``28,28``."""
    lengths = tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in text.split(","))
    if min(lengths) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers >= 1, such as 256,64", param_hint=option)
    return lengths


def _fraction(text: str, option: str) -> float:
    """``0.5``, or ``1/255``."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise typer.BadParameter(f"{text!r} is no number other than 0, such as 0.5 or 1/255", param_hint=option)
    return value


def _fraction_or_path(text: str) -> float | Path:
    """A number from 0 to 1, or the name of a file."""
    try:
        value = float(text)
    except ValueError:
        return Path(text)
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text} is no fraction, 0 <= fraction < 1", param_hint="--validation")
    return value


def _autoencoder_commands() -> ModuleType:
    """The module of both; ImportError saying what to install if torch is missing."""
    importlib.import_module("emalgam.nn")  # says it
    from emalgam import autoencoder_commands

    return autoencoder_commands


def _check_folder(path: Path | None, *others: Path | None) -> None:
    """Say before the work, not after it, that a result could not be written, or would replace one of `others`."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    check_target(path)
    for other in others:
        if other is not None and path.resolve() == other.resolve():
            raise ValueError(f"{path} is named twice, and what is there would be lost; name another file to write")
        if other is not None and other.is_dir() and path.resolve().is_relative_to(other.resolve()):
            raise ValueError(f"{path} would be taken for data, as it lies in {other}; write it into another folder")


def _check_table(path: Path | None, *others: Path | None) -> None:
    if path is not None:
        check_suffix(path)
        _check_folder(path, *others)


def _column(path: Path) -> np.ndarray:
    """A file's only column, (N,)."""
    array = read_table(path, names=("weights", "sample_weight"))
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{path}: has shape {array.shape}; expected one weight for each row of the data")
    return array


@contextmanager
def _data(
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
        yield _data_here(data, features, weights, weight_column, stream)
        return
    if weights is not None or stream is not None:
        problem = "workers read DATA and its weights from Parquet: name a column with --weight-column, and leave out"
        raise typer.BadParameter(f"{problem} --weights, --stream and --in-memory", param_hint="--dask")
    from emalgam import distributed
    from emalgam.dask_parts import DaskParts

    with distributed.connected(dask) as client:
        frame = distributed.read_parquet(data)
        yield DaskParts(frame.persist() if persist else frame, weight_column, features, client), None


def _data_here(
    data: Path,
    features: tuple[str, ...] | None = None,
    weights: Path | None = None,
    weight_column: str | None = None,
    stream: bool | None = None,
) -> tuple[Any, Any]:
    """In memory or, by default if they are large, as a stream."""
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
    return path.stat().st_size if path.is_file() else 0


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


def _fit_report(fitted: Fit, x: Any, seconds: float) -> dict[str, Any]:
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
        "seconds": seconds,
        **streamed,
        "effective_components": fitted.effective_components,
        "lower_bound": fitted.lower_bound,
    }


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


def _criteria(mixture: Mixture, total: float, n_samples: float) -> dict[str, float]:
    """Log-likelihood, AIC and BIC, in nats."""
    return {
        "mean_log_likelihood": total / n_samples,
        "log_likelihood": total,
        "aic": 2.0 * mixture.n_parameters - 2.0 * total,
        "bic": math.log(n_samples) * mixture.n_parameters - 2.0 * total,
    }


def _print_report(report: Mapping[str, Any], as_json: bool) -> None:
    """A result on standard output: a JSON object, or one line for each entry that has a value."""
    if as_json:
        typer.echo(json.dumps({key: _plain(value) for key, value in report.items()}))
    else:
        for key, value in report.items():
            if value is not None:
                _print_line(key.replace("_", " "), _text(value))


def _plain(value: Any) -> Any:
    """A value that JSON has: paths as text, null for what is not finite."""
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say("warning", message)


def _say(kind: str, message: object) -> None:
    """One line on standard error."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _os_error(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `arguments` are those of the process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _show_warning
    try:
        status = app(args=list(arguments) or ["--help"], prog_name="emalgam", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        _say("error", f"{error.format_message()} (see emalgam --help)")
        return error.exit_code
    except BackendUnavailable as error:
        _say("error", error)
        return EXIT_BACKEND
    except BrokenPipeError:  # whoever read the output has left; a second error at exit would help nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except OSError as error:
        _say("error", _os_error(error))
    except MemoryError as error:
        _say("error", f"out of memory: {error}")
    except (ValueError, ImportError, FloatingPointError) as error:
        _say("error", error)
    return EXIT_FAULT
