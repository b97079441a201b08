"""A trained model at work: batches of arrays through its encoder and decoder, in evaluation mode, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emalgam.namespace import to_host
from emalgam.nn.data import ROWS_AT_ONCE, is_integer
from emalgam.nn.model import LatentModel
from emalgam.nn.tensors import at_least_float32
from emalgam.validation import check_integer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode and no gradients; yields the model's device. Each module gets back the mode it had.

    Not to be held across the yields of a generator: torch keeps the switch of gradients for each thread.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in modes.items():
            module.training = mode


def encode(model: LatentModel, x: Any, *, rows_at_once: int = ROWS_AT_ONCE) -> np.ndarray:
    """The latents, (N, *latent_shape), of data, an array or a tensor; ValueError if they are not data of the model.

    Of all functions here: the result is on the host, in the model's dtype but at least float32; integers are a
    TypeError, as nobody has said how to scale them.
    """
    return _in_pieces(model, model.encode, x, rows_at_once)


def decode(model: LatentModel, z: Any, *, rows_at_once: int = ROWS_AT_ONCE) -> np.ndarray:
    """What latents, an array or a tensor, are decoded to, (N, *data_shape)."""
    return _in_pieces(model, model.decode, z, rows_at_once)


def reconstruct(model: LatentModel, x: Any, *, rows_at_once: int = ROWS_AT_ONCE) -> np.ndarray:
    """The reconstruction, (N, *data_shape), of data, an array or a tensor."""
    return _in_pieces(model, model.reconstruct, x, rows_at_once)


def _in_pieces(model: LatentModel, function: Callable[[Tensor], Tensor], rows: Any, rows_at_once: int) -> np.ndarray:
    check_integer("rows_at_once", rows_at_once, 1)
    pieces = [rows[start : start + rows_at_once] for start in range(0, max(len(rows), 1), rows_at_once)]
    with evaluating(model):
        return np.concatenate([on_host(function(as_input(model, piece))) for piece in pieces])


def on_host(values: Tensor) -> np.ndarray:
    """Values as an array of float32 at least."""
    return to_host(at_least_float32(values))


def as_input(model: nn.Module, x: Any) -> Tensor:
    """An array or tensor as a tensor beside the model, in its dtype; TypeError for integers."""
    own = next(model.parameters())
    values = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))  # a copy: it may be read-only
    if is_integer(values):
        raise TypeError(
            f"given {values.dtype}; expected floating point, scaled as what the model was trained on (pixels: / 255)"
        )
    return values.to(own.device, own.dtype)
