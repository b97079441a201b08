"""``emalgam train-ae`` and ``emalgam generate``: what they can be told.

What they do is in `autoencoder_training` and `autoencoder_generation`, which import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from emalgam.cli.options import (
    Json,
    Quiet,
    Seed,
    parse_component_range,
    parse_fraction,
    parse_fraction_or_path,
    parse_lengths,
)
from emalgam.cli.output import check_writable
from emalgam.cli.report import print_report


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
    _check_torch()
    from emalgam.cli.autoencoder_training import TrainingJob, run_training

    with _fault_of_the_command_line():
        job = TrainingJob(
            data=data,
            output=output,
            model=model,
            latent=latent,
            widths=None if widths is None else parse_lengths(widths, "--widths"),
            activation=activation,
            tied=tied or None,
            upsample=upsample,
            likelihood=likelihood,
            beta=beta,
            kl=kl,
            denoising=denoising,
            clusters=clusters,
            pretrain=pretrain,
            shape=None if shape is None else parse_lengths(shape, "--shape"),
            scale=None if scale is None else parse_fraction(scale, "--scale"),
            validation=parse_fraction_or_path(validation),
            components=None if components is None else parse_component_range(components),
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
    with _lack_of_memory():
        report = run_training(job, progress=not quiet)
    if as_json or not quiet:
        print_report(report, as_json)


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
    _check_torch()
    from emalgam.cli.autoencoder_generation import run_generation

    check_writable(output)
    lengths = None if shape is None else parse_lengths(shape, "--shape")
    with _lack_of_memory():
        report = run_generation(model, output, n_samples, seed=seed, prior=prior, shape=lengths)
    print_report(report, as_json)


def _check_torch() -> None:
    """ImportError saying what to install if torch is missing."""
    importlib.import_module("emalgam.nn")  # says it


@contextmanager
def _fault_of_the_command_line() -> Iterator[None]:
    """ValueErrors as errors of usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _lack_of_memory() -> Iterator[None]:
    """torch's RuntimeErrors for want of memory as MemoryErrors."""
    try:
        yield
    except RuntimeError as error:
        import torch

        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise MemoryError(str(error).splitlines()[0].rpartition("Allocator: ")[2]) from error
