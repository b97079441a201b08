"""What ``emalgam train-ae`` does: data in, a folder out, and what to report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from emalgam import __version__, plot
from emalgam.cli.pictures import prepare_pictures, write_picture
from emalgam.nn.data import NUMBERS_AT_ONCE, as_dataset, as_loader, load_idx
from emalgam.nn.evaluation import reconstruct
from emalgam.nn.latent import LatentMixtureSampler
from emalgam.nn.mixture_vae import MixtureVAE
from emalgam.nn.model import LatentModel
from emalgam.nn.model_file import save_model
from emalgam.nn.models import MODELS
from emalgam.nn.prior import COVARIANCE_TYPES
from emalgam.nn.training import CHECKPOINT, LOSSES, History, train
from emalgam.tables import FORMATS, read_table

# Options that only some models have.
BELONGS_TO: Final = {
    "widths": ("autoencoder", "conv", "vae", "mixture-vae"),
    "activation": ("autoencoder", "conv", "vae", "mixture-vae"),
    "tied": ("linear", "autoencoder", "conv"),
    "upsample": ("conv",),
    "likelihood": ("vae", "mixture-vae"),
    "beta": ("vae", "mixture-vae"),
    "kl": ("vae", "mixture-vae"),
    "denoising": ("autoencoder", "conv", "mixture-vae"),
    "clusters": ("mixture-vae",),
    "pretrain": ("mixture-vae",),
    "components": ("linear", "autoencoder", "conv", "vae"),
}
AS_GIVEN: Final = ("activation", "tied", "upsample", "beta", "kl", "denoising")  # called the same by the constructors
PRETRAINING: Final = "pretraining"  # the folder of a mixture VAE's first step
WIDTHS: Final = {"conv": (32,)}  # of the hidden layers, by default; channels of a convolutional model
DEFAULT_WIDTHS: Final = (256, 64)
DEFAULT_COMPONENTS: Final = range(1, 33)
LARGEST_FULL: Final = 64  # latents of more dimensions get diagonal covariances by default


@dataclass(frozen=True)
class TrainingJob:
    """What ``emalgam train-ae`` was asked for; None where an option was not given. ValueError if it makes no sense."""

    data: Path
    output: Path
    model: str
    latent: int
    widths: tuple[int, ...] | None
    activation: str | None
    tied: bool | None
    upsample: str | None
    likelihood: str | None
    beta: float | None
    kl: str | None
    denoising: float | None
    clusters: int | None
    pretrain: int | None
    shape: tuple[int, ...] | None
    scale: float | None
    validation: float | Path
    components: Iterable[int] | None
    covariance: str | None
    epochs: int
    batch_size: int
    learning_rate: float
    patience: int | None
    precision: str
    seed: int
    resume: bool
    threads: int | None

    def __post_init__(self) -> None:
        for option, models in BELONGS_TO.items():
            if getattr(self, option) is not None and self.model not in models:
                advice = "its prior has --clusters" if option == "components" else "leave it out"
                raise ValueError(f"--{option} is for {', '.join(models)}, not for --model {self.model}; {advice}")
        if self.model == "mixture-vae" and self.covariance not in (None, *COVARIANCE_TYPES):
            raise ValueError(f"--covariance of a mixture VAE's prior is {' or '.join(COVARIANCE_TYPES)}")
        if self.model == "mixture-vae" and self.clusters is None:
            raise ValueError("--model mixture-vae needs --clusters, the number of components of its prior")
        if self.patience is not None and not self.validation:
            raise ValueError("--patience looks at the validation loss, and --validation 0 leaves none")


def run_training(job: TrainingJob, progress: bool) -> dict[str, Any]:
    """Train, save, fit the mixture of the latents, draw; returns what to report."""
    prepare_pictures()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if not job.resume and any((folder / CHECKPOINT).exists() for folder in (job.output, job.output / PRETRAINING)):
        raise ValueError(
            f"{job.output}: there is a training in it already; go on with --resume, or name another folder"
        )
    rows, image_shape = _read(job.data, job)
    torch.manual_seed(job.seed)
    model = _new_model(job, rows)
    data = as_dataset(rows, model, scale=job.scale)
    held_out: Any = job.validation or None
    if isinstance(held_out, Path):
        held_out = as_dataset(_read(held_out, job)[0], model, scale=job.scale)
    start = time.perf_counter()
    history = _train(job, model, data, held_out, progress)
    trained = time.perf_counter()
    sampler = None if isinstance(model, MixtureVAE) else _mixture(job, model, data)
    fitted = time.perf_counter()
    extra = {"writer": f"emalgam {__version__}", "image_shape": list(image_shape), "scale": job.scale}
    save_model(model, job.output, sampler, extra=extra)
    shown = held_out if hasattr(held_out, "batch") else data
    _draw(job.output, model, shown.batch(range(min(10, len(shown)))), image_shape, history)
    return {
        "model": job.model,
        "n_parameters": sum(weight.numel() for weight in model.parameters()),
        "n_samples": len(data),
        "data_shape": list(model.data_shape),
        "latent_shape": list(model.latent_shape),
        "epochs": history.epochs,
        **{name: float(values[-1]) for name, values in history.items()},
        "seconds": trained - start,
        "mixture_components": None if sampler is None else sampler.mixture.n_components,
        "mixture_seconds": None if sampler is None else fitted - trained,
        "output": job.output,
    }


# ---- data


def read_rows(path: Path) -> np.ndarray:
    """The data in a table or in an IDX file, (N, ...); ValueError naming the file."""
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        values = read_table(path)
    elif suffix in ("", ".gz") or suffix.startswith(".idx"):
        values = load_idx(path)
    else:
        raise ValueError(f"{path}: {suffix} files are not supported; supported are {', '.join(FORMATS)} and IDX")
    if values.ndim < 2 or 0 in values.shape:
        raise ValueError(f"{path}: has shape {values.shape}; expected rows of data: (N, features) or (N, H, W)")
    return values


def _read(path: Path, job: TrainingJob) -> tuple[np.ndarray, tuple[int, ...]]:
    """Rows in the shape that the model takes, and the shape of one as an image."""
    rows = read_rows(path)
    if job.scale is None and rows.dtype.kind in "iu":
        raise ValueError(
            f"{path}: holds {rows.dtype} numbers; say how to scale them: --scale 1/255 for images of bytes, "
            "--scale 1 for numbers as they are"
        )
    given = job.shape or rows.shape[1:]
    if math.prod(given) != math.prod(rows.shape[1:]):
        raise ValueError(f"{path}: has shape {rows.shape}; data of --shape {given} have {math.prod(given)} values")
    image = _image_shape(given)
    if job.model in ("linear", "autoencoder"):
        return rows.reshape(len(rows), -1), image
    if job.model == "conv":
        if len(given) == 1 and image[0] == 1:
            raise ValueError(f"{path}: {given[0]} values are no square image; give --shape C,H,W")
        given = image if len(image) == 3 else (1, *image)
    return rows.reshape(len(rows), *given), image


def _image_shape(given: tuple[int, ...]) -> tuple[int, ...]:
    """How to draw one datum: as an image, a square of what is flat, or a strip."""
    if len(given) == 2 or (len(given) == 3 and given[0] in (1, 3)):
        return given
    size = math.prod(given)
    side = math.isqrt(size)
    return (side, side) if side * side == size else (1, size)


def _in_unit_interval(rows: np.ndarray, scale: float | None) -> bool:
    """Whether all data lie in [0, 1]."""
    factor = 1.0 if scale is None else scale
    step = max(NUMBERS_AT_ONCE // math.prod(rows.shape[1:]), 1)
    pieces = (np.asarray(rows[start : start + step]) * factor for start in range(0, len(rows), step))
    return all(piece.min() >= 0 and piece.max() <= 1 for piece in pieces)


# ---- steps of a training


def _new_model(job: TrainingJob, rows: np.ndarray) -> LatentModel:
    """A model for these data: what is not given follows from whether they lie in [0, 1]."""
    bounded = _in_unit_interval(rows, job.scale)
    hidden = WIDTHS.get(job.model, DEFAULT_WIDTHS) if job.widths is None else job.widths
    options: dict[str, Any]
    if job.model == "linear":
        options = {"n_features": rows.shape[1], "n_latent": job.latent}
    elif job.model in ("autoencoder", "conv"):
        widths = {"widths": (rows.shape[1], *hidden, job.latent)}
        shapes = {"data_shape": rows.shape[1:], "channels": (*hidden, job.latent)}
        output = {"output": "sigmoid" if bounded else "identity"}
        options = {**(widths if job.model == "autoencoder" else shapes), **output}
    else:
        likelihood = job.likelihood or ("bernoulli" if bounded else "gaussian")
        options = {"data_shape": rows.shape[1:], "n_latent": job.latent, "widths": hidden, "likelihood": likelihood}
        if job.model == "mixture-vae":
            options |= {"n_components": job.clusters, "covariance_type": job.covariance or COVARIANCE_TYPES[0]}
    options |= {name: getattr(job, name) for name in AS_GIVEN if getattr(job, name) is not None}
    return MODELS[job.model](**options)


def _train(job: TrainingJob, model: LatentModel, data: Any, held_out: Any, progress: bool) -> History:
    """One training, or the three steps of a mixture VAE; each goes on with --resume."""
    how: dict[str, Any] = {name: getattr(job, name) for name in ("batch_size", "learning_rate", "seed", "precision")}
    how |= {"validation": held_out, "resume": job.resume, "progress": progress}
    if job.resume and (job.output / CHECKPOINT).exists():
        _check_pretraining(job)
    elif isinstance(model, MixtureVAE):
        model.pretraining = True
        train(model, data, epochs=job.pretrain or job.epochs, folder=job.output / PRETRAINING, **how)
        model.pretraining = False
        model.initialize_prior(as_loader(data, model), random_state=job.seed)
    return train(model, data, epochs=job.epochs, patience=job.patience, folder=job.output, **how)


def _check_pretraining(job: TrainingJob) -> None:
    """ValueError if what is to go on had another pre-training than is asked for."""
    if job.pretrain is None:
        return
    epochs = History.read(job.output / PRETRAINING / LOSSES).epochs
    if epochs != job.pretrain:
        raise ValueError(f"{job.output}: had {epochs} epochs of pre-training, and --pretrain is {job.pretrain}")


def _mixture(job: TrainingJob, model: LatentModel, data: Any) -> LatentMixtureSampler:
    small = math.prod(model.latent_shape) <= LARGEST_FULL
    covariance = job.covariance or ("full" if small else "diag")
    components = DEFAULT_COMPONENTS if job.components is None else job.components
    sampler = LatentMixtureSampler(components, covariance, random_state=job.seed, n_threads=job.threads)
    return sampler.fit(model, data)


def _draw(folder: Path, model: LatentModel, x: torch.Tensor, shape: tuple[int, ...], history: History) -> None:
    write_picture(folder / "losses.png", plot.losses(history))
    write_picture(folder / "reconstructions.png", plot.reconstructions(x, reconstruct(model, x), shape=shape))
