"""`LatentModel`: what every model of emalgam.nn can do, and how it checks its input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from emalgam.nn.tensors import check_beside, check_tensor
from emalgam.validation import first_index, in_words


class LatentModel(nn.Module):
    """A model with an encoder and a decoder, N data at a time.

    Attributes
    ----------
    data_shape : tuple of int
        Shape of one datum x, such as (784,) or (1, 28, 28).
    latent_shape : tuple of int
        Shape of one latent z, such as (16,) or (8, 7, 7).
    unit_interval : bool
        Whether data have to lie in [0, 1], because nothing else can come out of the decoder.
    """

    data_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    unit_interval: bool = False

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments, fit for JSON: ``type(m)(**m.configuration())`` has the same architecture."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """z, (N, *latent_shape), of x, (N, *data_shape); the mean of the posterior for models that have one."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given z, (N, *data_shape)."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)), (N, *data_shape)."""
        return self.decode(self.encode(x))

    def forward(self, x: Tensor) -> Tensor:
        """The same as `reconstruct`."""
        return self.reconstruct(x)

    def generate(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Decode n latents drawn from the prior, (n, *data_shape); NotImplementedError for a model without one."""
        raise NotImplementedError(
            f"{type(self).__name__} has no prior to draw latents from; fit one to its latents: "
            "emalgam.nn.LatentMixtureSampler().fit(model, data).sample(n)"
        )

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(N,), in nats per datum; each model says which likelihood."""
        raise NotImplementedError

    def losses(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Means over the data, each a tensor (): "loss" is what training minimises, the others are there to be seen."""
        raise NotImplementedError

    # ---- input

    def check(self, x: Tensor, *, first_row: int = 0) -> Tensor:
        """`x` if it can be learnt: of the right shape, dtype and device, finite, in [0, 1] if it has to be.

        `first_row` is the number that errors give to the first row, for a piece of larger data. While torch.compile
        traces, nothing is known of the values, and they are not looked at.

        Raises
        ------
        TypeError
            If x is no tensor, or has another dtype than the model.
        ValueError
            For another shape or device, NaN or infinity, and values outside [0, 1] where `unit_interval`.
        """
        check_values(self.check_input(x), self.unit_interval, type(self).__name__, first_row)
        return x

    def check_input(self, x: Tensor) -> Tensor:
        """`x` if it can be encoded; the values are not looked at."""
        return self._check("x", x, self.data_shape, ", scaled as the data are (pixels: / 255)")

    def check_latents(self, z: Tensor) -> Tensor:
        """`z` if it can be decoded; the values are not looked at."""
        return self._check("z", z, self.latent_shape)

    def _check(self, name: str, given: Tensor, shape: tuple[int, ...], of_integers: str = "") -> Tensor:
        if check_tensor(name, given).shape[1:] != shape or given.ndim != len(shape) + 1:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}; expected (N, {', '.join(map(str, shape))})"
                f"{_how_to_reshape(name, given, shape)}"
            )
        return check_beside(name, given, next(self.parameters()), "model", of_integers)


def _how_to_reshape(name: str, given: Tensor, shape: tuple[int, ...]) -> str:
    """What to do, if it is only a matter of reshaping."""
    if given.ndim and given.shape[0] and math.prod(given.shape[1:]) == math.prod(shape) and given.ndim > 1:
        return f"; call {name}.reshape({', '.join(map(str, (-1, *shape)))})"
    if tuple(given.shape) == shape:
        return f"; for one datum: {name}[None]"
    return ""


def check_values(x: Tensor, unit_interval: bool, wanted_by: str, first_row: int = 0) -> None:
    """ValueError naming the first index where x, (N, ...), is not finite, or outside [0, 1] if it has to be there.

    Looks at nothing while torch.compile traces: values would break the graph.
    """
    if torch.compiler.is_compiling() or x.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))  # NaN if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        index = first_index((~torch.isfinite(x)).cpu().numpy())
        raise ValueError(f"x contains {x[index].item()}{_place(index, first_row)}; expected finite numbers")
    if unit_interval and not (low >= 0.0 and high <= 1.0):
        index = first_index(((x < 0) | (x > 1)).cpu().numpy())
        raise ValueError(
            f"x is {x[index].item():.6g}{_place(index, first_row)}; {wanted_by} expects values in [0, 1]: scale the "
            'data (pixels: / 255), or choose output="identity" or a Gaussian likelihood'
        )


def _place(index: tuple[int, ...], first_row: int) -> str:
    """Where in the data an index of a piece of them is that begins with `first_row`."""
    return in_words((index[0] + first_row, *index[1:]))
