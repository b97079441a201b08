"""Networks and layers that the models are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from emalgam.validation import check_choice, check_integer

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def activation_of(name: str, argument: str = "activation") -> nn.Module:
    """A new module of ACTIVATIONS; ValueError that lists them."""
    return ACTIVATIONS[check_choice(argument, name, tuple(ACTIVATIONS))]()


def check_sizes(name: str, sizes: Sequence[int] | np.ndarray, least: int = 1) -> tuple[int, ...]:
    """Positive integers, at least `least` of them; ValueError saying which is not."""
    if isinstance(sizes, np.ndarray):
        sizes = sizes.tolist()
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or len(sizes) < least:
        raise ValueError(f"{name} is {sizes!r}; expected at least {least} positive integers, e.g. {name}=(64, 16)")
    return tuple(check_integer(f"{name}[{i}]", size, 1) for i, size in enumerate(sizes))


def dense(widths: Sequence[int], activation: str, last: str = "identity") -> nn.Sequential:
    """Linear layers from one width to the next, with `activation` between them and `last` after the last."""
    return with_activations([nn.Linear(*pair) for pair in pairwise(widths)], activation, last)


def tied_dense(encoder: nn.Sequential, activation: str, last: str) -> nn.Sequential:
    """The mirror image of a dense network, with its weights transposed and biases of its own."""
    linears = [layer for layer in encoder if isinstance(layer, nn.Linear)]
    return with_activations([TiedLinear(linear) for linear in reversed(linears)], activation, last)


def with_activations(layers: Sequence[nn.Module], activation: str, last: str) -> nn.Sequential:
    """`layers`, `activation` after each but the last, and `last` after that."""
    network = nn.Sequential()
    for layer in layers:
        network.append(layer).append(activation_of(activation))
    network[-1] = activation_of(last)
    return network


class ConvolutionalEncoder(nn.Sequential):
    """3 × 3 convolutions, each with an activation and a pooling that halves the image (rounded down).

    Parameters
    ----------
    channels : sequence of int
        From the data to the latents.
    image : (height, width)
        Of the data.
    """

    def __init__(self, channels: Sequence[int], image: tuple[int, int], activation: str, last: str) -> None:
        super().__init__()
        self.convolutions = tuple(nn.Conv2d(*pair, kernel_size=3, padding=1) for pair in pairwise(channels))
        self.images = [tuple(size >> i for size in image) for i in range(len(channels))]
        for i, convolution in enumerate(self.convolutions, 1):
            self.append(convolution)
            self.append(activation_of(last if i == len(self.convolutions) else activation))
            self.append(nn.MaxPool2d(2))


class Upsampled(nn.Sequential):
    """Pixels repeated to `image`, then a 3 × 3 convolution (Odena et al. 2016: no checkerboards)."""

    def __init__(self, inputs: int, outputs: int, image: tuple[int, int]) -> None:
        super().__init__(nn.Upsample(size=image), nn.Conv2d(inputs, outputs, kernel_size=3, padding=1))


class Transposed(nn.ConvTranspose2d):
    """A 2 × 2 transposed convolution of stride 2 that makes `image`: odd sizes get a further row or column."""

    def __init__(self, inputs: int, outputs: int, image: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, kernel_size=2, stride=2, output_padding=tuple(size % 2 for size in image))


class TiedConvolution(nn.Module):
    """The adjoint of a 3 × 3 convolution, with its weights: of stride 2, or after repeating pixels; makes `image`."""

    def __init__(self, mirrored: nn.Conv2d, image: tuple[int, int], upsample: str) -> None:
        super().__init__()
        self._mirrored = (mirrored,)  # in a tuple: its parameters stay those of the encoder
        self.bias = nn.Parameter(mirrored.weight.new_zeros(mirrored.in_channels))
        self.image, self.repeat = image, upsample == "nearest"

    def forward(self, x: Tensor) -> Tensor:
        """(N, out_channels of the other, h, w) → (N, its in_channels, *image)."""
        weight = self._mirrored[0].weight
        if self.repeat:
            return functional.conv_transpose2d(functional.interpolate(x, self.image), weight, self.bias, padding=1)
        even = [1 - size % 2 for size in self.image]  # (h − 1) 2 − 2 even + 3 + even: 2 h, or 2 h + 1 if odd
        return functional.conv_transpose2d(x, weight, self.bias, stride=2, padding=even, output_padding=even)


class TiedLinear(nn.Module):
    """y = Wᵀ x + b, with the weight W of another layer."""

    def __init__(self, mirrored: nn.Linear) -> None:
        super().__init__()
        self._mirrored = (mirrored,)  # in a tuple: its parameters stay those of the encoder
        self.bias = nn.Parameter(mirrored.weight.new_zeros(mirrored.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(N, out_features of the other) → (N, its in_features)."""
        return functional.linear(x, self._mirrored[0].weight.t(), self.bias)
