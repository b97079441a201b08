"""Autoencoders, VAEs and mixtures as their priors, in torch: the only place of emalgam that imports it.

``pip install emalgam[torch]``. Names are imported when they are first used. Models are plain modules, usable in
anyone's loop: see `LatentModel` for what they share.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if find_spec("torch") is None:
    raise ImportError("emalgam.nn needs torch, which is not installed: pip install emalgam[torch]")

_LAZY: Final = {
    "MODELS": "models",
    "Autoencoder": "autoencoders",
    "Bernoulli": "likelihoods",
    "ContinuousBernoulli": "likelihoods",
    "ConvAutoencoder": "autoencoders",
    "Gaussian": "likelihoods",
    "GaussianMixturePrior": "prior",
    "LatentMixtureSampler": "latent",
    "History": "training",
    "LatentModel": "model",
    "Likelihood": "likelihoods",
    "LinearAutoencoder": "autoencoders",
    "MixtureVAE": "mixture_vae",
    "Posterior": "vae",
    "VAE": "vae",
    "as_dataset": "data",
    "as_loader": "data",
    "kl_gaussian": "divergence",
    "kl_to_mixture": "divergence",
    "load_extra": "model_file",
    "load_idx": "data",
    "load_model": "model_file",
    "load_sampler": "model_file",
    "mixture_log_prob": "operators",
    "mixture_responsibilities": "operators",
    "save_model": "model_file",
    "train": "training",
}

__all__ = [*_LAZY]

if TYPE_CHECKING:
    from emalgam.nn.autoencoders import Autoencoder as Autoencoder
    from emalgam.nn.autoencoders import ConvAutoencoder as ConvAutoencoder
    from emalgam.nn.autoencoders import LinearAutoencoder as LinearAutoencoder
    from emalgam.nn.data import as_dataset as as_dataset
    from emalgam.nn.data import as_loader as as_loader
    from emalgam.nn.data import load_idx as load_idx
    from emalgam.nn.divergence import kl_gaussian as kl_gaussian
    from emalgam.nn.divergence import kl_to_mixture as kl_to_mixture
    from emalgam.nn.latent import LatentMixtureSampler as LatentMixtureSampler
    from emalgam.nn.likelihoods import Bernoulli as Bernoulli
    from emalgam.nn.likelihoods import ContinuousBernoulli as ContinuousBernoulli
    from emalgam.nn.likelihoods import Gaussian as Gaussian
    from emalgam.nn.likelihoods import Likelihood as Likelihood
    from emalgam.nn.mixture_vae import MixtureVAE as MixtureVAE
    from emalgam.nn.model import LatentModel as LatentModel
    from emalgam.nn.model_file import load_extra as load_extra
    from emalgam.nn.model_file import load_model as load_model
    from emalgam.nn.model_file import load_sampler as load_sampler
    from emalgam.nn.model_file import save_model as save_model
    from emalgam.nn.models import MODELS as MODELS
    from emalgam.nn.operators import mixture_log_prob as mixture_log_prob
    from emalgam.nn.operators import mixture_responsibilities as mixture_responsibilities
    from emalgam.nn.prior import GaussianMixturePrior as GaussianMixturePrior
    from emalgam.nn.training import History as History
    from emalgam.nn.training import train as train
    from emalgam.nn.vae import VAE as VAE
    from emalgam.nn.vae import Posterior as Posterior


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'emalgam.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"emalgam.nn.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
