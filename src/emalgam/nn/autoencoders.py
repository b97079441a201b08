"""Autoencoders: an encoder x → z, a decoder z → x̂, trained to x̂ ≈ x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emalgam.nn.layers import check_sizes, dense, tied_dense
from emalgam.nn.model import LatentModel
from emalgam.validation import check_choice, check_number

OUTPUTS = ("identity", "sigmoid")


class Reconstructing(LatentModel):
    """What autoencoders share: `encoder` and `decoder`, the squared error, and noise on the input."""

    encoder: nn.Module
    decoder: nn.Module
    denoising: float = 0.0

    def encode(self, x: Tensor) -> Tensor:
        """z, (N, *latent_shape), of x, (N, *data_shape)."""
        return self.encoder(self.check_input(x))

    def decode(self, z: Tensor) -> Tensor:
        """x̂, (N, *data_shape), of z, (N, *latent_shape)."""
        return self.decoder(self.check_latents(z))

    def corrupt(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """x + denoising · ε, ε ~ N(0, I); not clipped to the range of x."""
        return x + self.denoising * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    def losses(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "loss": the squared error of the reconstruction, mean over data and their elements.

        If `denoising` is positive, the input is corrupted and the target is x itself (Vincent et al. 2008, "Extracting
        and composing robust features with denoising autoencoders", section 2.3).
        """
        self.check(x)
        given = self.corrupt(x, generator=generator) if self.denoising > 0 else x
        return {"loss": functional.mse_loss(self.reconstruct(given), x)}

    def log_likelihood(self, x: Tensor, *, variance: float = 1.0) -> Tensor:
        """log N(x; x̂, variance · I), (N,), in nats per datum: of x given its own reconstruction, not of x itself."""
        square = (self.check(x) - self.reconstruct(x)).flatten(1).square().sum(1)
        return -0.5 * (square / variance + math.prod(self.data_shape) * math.log(2 * math.pi * variance))


class Autoencoder(Reconstructing):
    """A mirrored network of linear layers.

    Parameters
    ----------
    widths : sequence of int
        From the data to the latents: (784, 256, 64, 16, 4). The decoder goes back through the same widths.
    activation : str
        Between layers: "relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid" or "identity".
    output : {"identity", "sigmoid"}
        After the last layer. "sigmoid" is for data in [0, 1], and other data are refused.
    latent_activation : str
        After the encoder. Latents of a ReLU have a spike at 0, which a mixture of Gaussians does not fit well.
    tied : bool
        Whether the decoder's weights are those of the encoder, transposed; its biases are its own.
    denoising : float
        Standard deviation of the noise on the input during training; the target is the clean input.

    Examples
    --------
    >>> model = Autoencoder.deep()
    >>> sum(p.numel() for p in model.parameters())
    437812
    >>> model.encode(torch.zeros(5, 784)).shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "relu",
        output: str = "identity",
        latent_activation: str = "identity",
        tied: bool = False,
        denoising: float = 0.0,
    ) -> None:
        super().__init__()
        self.widths = check_sizes("widths", widths, 2)
        self.activation, self.latent_activation, self.tied = activation, latent_activation, tied
        self.output = check_choice("output", output, OUTPUTS)
        self.denoising = check_number("denoising", denoising)
        self.data_shape, self.latent_shape = self.widths[:1], self.widths[-1:]
        self.unit_interval = output == "sigmoid"
        self.encoder = dense(self.widths, activation, latent_activation)
        if tied:
            self.decoder = tied_dense(self.encoder, activation, output)
        else:
            self.decoder = dense(self.widths[::-1], activation, output)

    @classmethod
    def shallow(cls, **options: Any) -> Autoencoder:
        """784-100-784 with a ReLU for latents and a sigmoid at the end: 157 684 parameters; options as arguments."""
        return cls((784, 100), **{"output": "sigmoid", "latent_activation": "relu", **options})

    @classmethod
    def deep(cls, **options: Any) -> Autoencoder:
        """784-256-64-16-4 and back, ReLU, a sigmoid at the end: 437 812 parameters; options as arguments."""
        return cls((784, 256, 64, 16, 4), **{"output": "sigmoid", **options})

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "widths": list(self.widths),
            "activation": self.activation,
            "output": self.output,
            "latent_activation": self.latent_activation,
            "tied": self.tied,
            "denoising": self.denoising,
        }
