"""The models by the names that files and the command line give them."""

from __future__ import annotations

from typing import Final

from emalgam.nn.autoencoders import Autoencoder, ConvAutoencoder, LinearAutoencoder
from emalgam.nn.mixture_vae import MixtureVAE
from emalgam.nn.model import LatentModel
from emalgam.nn.vae import VAE

MODELS: Final[dict[str, type[LatentModel]]] = {
    "linear": LinearAutoencoder,
    "autoencoder": Autoencoder,
    "conv": ConvAutoencoder,
    "vae": VAE,
    "mixture-vae": MixtureVAE,
}
