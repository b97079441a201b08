"""What ``emalgam generate`` does: a saved model in, a picture or numbers out, and what to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from emalgam import plot
from emalgam.cli.pictures import prepare_pictures, write_picture
from emalgam.files import replacing
from emalgam.nn.data import ROWS_AT_ONCE
from emalgam.nn.evaluation import evaluating, on_host
from emalgam.nn.model_file import NAME_IN_FOLDER, load_extra, load_model, load_sampler
from emalgam.tables import FORMATS, write_npy, write_table


def run_generation(
    model: Path, output: Path, n: int, *, seed: int, prior: str, shape: tuple[int, ...] | None
) -> dict[str, Any]:
    """Draw data from a saved model and write them, as a picture or as numbers; returns what to report."""
    _check_suffix(output)
    x, drawn_from = _generated(model, n, seed, prior)
    if output.suffix.lower() == ".png":
        prepare_pictures()
        image_shape = shape or load_extra(model).get("image_shape")
        write_picture(output, plot.samples(x, shape=None if image_shape is None else tuple(image_shape)))
    elif output.suffix.lower() == ".npy":
        with replacing(output) as file:
            write_npy(file, x)
    else:
        write_table(output, x.reshape(n, -1))
    return {"n_samples": n, "data_shape": list(x.shape[1:]), "prior": drawn_from, "output": output}


def _check_suffix(path: Path) -> None:
    """ValueError unless samples can be written in the format that the suffix names."""
    if path.suffix.lower() not in (".png", *FORMATS):
        raise ValueError(f"{path}: expected a picture, .png, or numbers: {', '.join(FORMATS)}")


def _generated(path: Path, n: int, seed: int, prior: str) -> tuple[np.ndarray, str]:
    """(n, *data_shape) on the host, and from what the latents were drawn."""
    model = load_model(path)
    if prior == "mixture" or (prior == "auto" and _has_sampler(path)):
        sampler = load_sampler(path)
        return on_host(sampler.sample(n, seed)[0]), f"mixture of {sampler.mixture.n_components}"
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(ROWS_AT_ONCE, n - start) for start in range(0, n, ROWS_AT_ONCE)]
    with evaluating(model):
        try:
            return on_host(torch.cat([model.generate(size, generator=generator) for size in sizes])), "the model's own"
        except NotImplementedError as error:
            raise ValueError(f"{path}: {error}") from error


def _has_sampler(path: Path) -> bool:
    """Whether a mixture was saved along with a model that has been loaded."""
    with safe_open(path / NAME_IN_FOLDER if path.is_dir() else path, framework="np") as file:
        return "sampler" in (file.metadata() or {})
