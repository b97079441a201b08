"""Autoencoders: an encoder x → z, a decoder z → x̂, trained to x̂ ≈ x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emalgam.nn.layers import (
    ConvolutionalEncoder,
    TiedConvolution,
    Transposed,
    Upsampled,
    check_sizes,
    dense,
    tied_dense,
    with_activations,
)
from emalgam.nn.model import LatentModel
from emalgam.nn.tensors import standard_normal
from emalgam.validation import check_choice, check_flag, check_integer, check_number, check_positive

OUTPUTS = ("identity", "sigmoid")
UPSAMPLINGS = {"transposed": Transposed, "nearest": Upsampled}


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
        return x + self.denoising * standard_normal(x, x.shape, generator)

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
        variance = check_positive("variance", variance)
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
        self.activation, self.latent_activation, self.tied = activation, latent_activation, check_flag("tied", tied)
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
        return cls._of_widths((784, 100), {"output": "sigmoid", "latent_activation": "relu", **options})

    @classmethod
    def deep(cls, **options: Any) -> Autoencoder:
        """784-256-64-16-4 and back, ReLU, a sigmoid at the end: 437 812 parameters; options as arguments."""
        return cls._of_widths((784, 256, 64, 16, 4), {"output": "sigmoid", **options})

    @classmethod
    def _of_widths(cls, widths: tuple[int, ...], options: dict[str, Any]) -> Autoencoder:
        """ValueError for other widths, and for a class whose constructor takes none."""
        if "widths" in options:
            raise ValueError(
                f"widths is {options['widths']!r} where they are {widths}; expected none: {cls.__name__}(widths, ...) "
                "takes others"
            )
        if "widths" not in (own := signature(cls).parameters):
            raise ValueError(
                f"{cls.__name__} takes no widths, which are {widths} here; expected Autoencoder, or "
                f"{cls.__name__}({', '.join(own)})"
            )
        return cls(widths, **options)

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


class LinearAutoencoder(Autoencoder):
    """x → z → x̂ without activations: trained, it spans the subspace of the first principal components.

    Parameters
    ----------
    n_features, n_latent : int
    tied : bool
        As for `Autoencoder`.

    References
    ----------
    Baldi, Hornik (1989), "Neural networks and principal component analysis: learning from examples without local
    minima".

    Examples
    --------
    >>> sum(p.numel() for p in LinearAutoencoder(3, 2).parameters())
    17
    """

    def __init__(self, n_features: int, n_latent: int, tied: bool = False) -> None:
        n_features, n_latent = check_integer("n_features", n_features, 1), check_integer("n_latent", n_latent, 1)
        super().__init__((n_features, n_latent), "identity", tied=tied)

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"n_features": self.widths[0], "n_latent": self.widths[1], "tied": self.tied}

    def subspace(self) -> Tensor:
        """An orthonormal basis of what the decoder can make, less its offset, (n_features, n_latent or fewer)."""
        weight = self.encoder[0].weight.t() if self.tied else self.decoder[0].weight
        return torch.linalg.qr(weight.detach())[0]


class ConvAutoencoder(Reconstructing):
    """Convolutions and poolings to latent images, and back.

    Parameters
    ----------
    data_shape : (channels, height, width)
        Of one image; each pooling halves height and width (rounded down).
    channels : sequence of int
        Of the hidden images, the last of the latents.
    activation, output, latent_activation, denoising
        As for `Autoencoder`.
    upsample : {"transposed", "nearest"}
        How the decoder doubles images: 2 × 2 transposed convolutions of stride 2, or pixels repeated and then a 3 × 3
        convolution.
    tied : bool
        Whether the decoder's layers are the adjoints of the encoder's 3 × 3 convolutions, with the same weights; the
        biases are its own.

    Examples
    --------
    >>> model = ConvAutoencoder()
    >>> model.latent_shape, sum(p.numel() for p in model.parameters())
    ((8, 7, 7), 15241)
    """

    def __init__(
        self,
        data_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (128, 8),
        activation: str = "relu",
        output: str = "sigmoid",
        latent_activation: str = "identity",
        upsample: str = "transposed",
        tied: bool = False,
        denoising: float = 0.0,
    ) -> None:
        super().__init__()
        self.data_shape, self.channels = check_sizes("data_shape", data_shape, 3), check_sizes("channels", channels)
        poolings = len(self.channels)
        if len(self.data_shape) != 3 or min(self.data_shape[1:]) >> poolings == 0:
            raise ValueError(
                f"data_shape is {tuple(data_shape)}; expected (channels, height, width), of at least "
                f"{2**poolings} x {2**poolings} pixels: each of {poolings} poolings halves them"
            )
        self.activation, self.latent_activation = activation, latent_activation
        self.output, self.upsample = check_choice("output", output, OUTPUTS), upsample
        self.tied, self.denoising = check_flag("tied", tied), check_number("denoising", denoising)
        self.unit_interval = output == "sigmoid"
        self.encoder = ConvolutionalEncoder(
            (self.data_shape[0], *self.channels), self.data_shape[1:], activation, latent_activation
        )
        self.latent_shape = (self.channels[-1], *self.encoder.images[-1])
        self.decoder = with_activations(self._upsamplings(), activation, output)

    def _upsamplings(self) -> list[nn.Module]:
        """The decoder's layers: the encoder's in reverse."""
        layer = UPSAMPLINGS[check_choice("upsample", self.upsample, tuple(UPSAMPLINGS))]
        steps = reversed(list(zip(self.encoder.convolutions, self.encoder.images[:-1], strict=True)))
        if self.tied:
            return [TiedConvolution(mirrored, image, self.upsample) for mirrored, image in steps]
        return [layer(mirrored.out_channels, mirrored.in_channels, image) for mirrored, image in steps]

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "data_shape": list(self.data_shape),
            "channels": list(self.channels),
            "activation": self.activation,
            "output": self.output,
            "latent_activation": self.latent_activation,
            "upsample": self.upsample,
            "tied": self.tied,
            "denoising": self.denoising,
        }
