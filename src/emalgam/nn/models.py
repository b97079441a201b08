"""The models by the names that files and the command line give them."""

from __future__ import annotations

from typing import Final

from emalgam.nn.autoencoders import Autoencoder
from emalgam.nn.model import LatentModel

MODELS: Final[dict[str, type[LatentModel]]] = {
    "autoencoder": Autoencoder,
}
