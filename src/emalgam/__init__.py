"""emalgam: Gaussian mixtures, divergences and Monte Carlo at the speed of the hardware.

Names are imported when they are first used: ``import emalgam`` loads NumPy and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__: Final = "0.1.0"

_HOMES: Final = {
    "GaussianMixture": "estimator",
    "Mixture": "mixture",
    "fit": "em",
    "Fit": "em",
    "Iteration": "em",
    "ConvergenceWarning": "em",
    "DegenerateComponentError": "m_step",
    "NumericalError": "m_step",
    "BackendUnavailable": "backends",
    "use_backend": "backends",
    "fit_many": "batch",
    "ManyFits": "batch",
    "load_fits": "fits_file",
    "Gaussian": "gaussian",
    "kl": "divergence",
    "kl_all_pairs": "divergence",
    "kl_monte_carlo": "divergence",
    "kl_variational": "divergence",
    "kl_matched": "divergence",
    "kl_unscented": "divergence",
    "kl_product": "divergence",
    "kl_bounds": "divergence",
    "jensen_shannon": "divergence",
    "symmetric_kl": "divergence",
    "gaussian_cross_entropy": "divergence",
    "entropy_bounds": "divergence",
    "expectation": "sampling",
    "fit_stepwise": "stepwise",
    "open_stream": "stream",
    "Stream": "stream",
    "Checkpoint": "checkpoint",
    "Estimate": "sampling",
    "moment_match": "gaussian",
    "merge": "reduction",
    "merge_costs": "reduction",
    "reduce": "reduction",
    "save_model": "model_file",
    "load_model": "model_file",
    "ModelFileError": "model_file",
}
_MODULES: Final = ("backends", "distributed", "divergence", "estimation", "information", "plot", "sampling", "stream")

__all__ = [*_HOMES, *_MODULES]

if TYPE_CHECKING:
    from emalgam import backends as backends
    from emalgam import distributed as distributed
    from emalgam import divergence as divergence
    from emalgam import estimation as estimation
    from emalgam import information as information
    from emalgam import plot as plot
    from emalgam import sampling as sampling
    from emalgam import stream as stream
    from emalgam.backends import BackendUnavailable as BackendUnavailable
    from emalgam.backends import use_backend as use_backend
    from emalgam.batch import ManyFits as ManyFits
    from emalgam.batch import fit_many as fit_many
    from emalgam.checkpoint import Checkpoint as Checkpoint
    from emalgam.divergence import entropy_bounds as entropy_bounds
    from emalgam.divergence import gaussian_cross_entropy as gaussian_cross_entropy
    from emalgam.divergence import jensen_shannon as jensen_shannon
    from emalgam.divergence import kl as kl
    from emalgam.divergence import kl_all_pairs as kl_all_pairs
    from emalgam.divergence import kl_bounds as kl_bounds
    from emalgam.divergence import kl_matched as kl_matched
    from emalgam.divergence import kl_monte_carlo as kl_monte_carlo
    from emalgam.divergence import kl_product as kl_product
    from emalgam.divergence import kl_unscented as kl_unscented
    from emalgam.divergence import kl_variational as kl_variational
    from emalgam.divergence import symmetric_kl as symmetric_kl
    from emalgam.em import ConvergenceWarning as ConvergenceWarning
    from emalgam.em import Fit as Fit
    from emalgam.em import Iteration as Iteration
    from emalgam.em import fit as fit
    from emalgam.estimator import GaussianMixture as GaussianMixture
    from emalgam.fits_file import load_fits as load_fits
    from emalgam.gaussian import Gaussian as Gaussian
    from emalgam.gaussian import moment_match as moment_match
    from emalgam.m_step import DegenerateComponentError as DegenerateComponentError
    from emalgam.m_step import NumericalError as NumericalError
    from emalgam.mixture import Mixture as Mixture
    from emalgam.model_file import ModelFileError as ModelFileError
    from emalgam.model_file import load_model as load_model
    from emalgam.model_file import save_model as save_model
    from emalgam.reduction import merge as merge
    from emalgam.reduction import merge_costs as merge_costs
    from emalgam.reduction import reduce as reduce
    from emalgam.sampling import Estimate as Estimate
    from emalgam.sampling import expectation as expectation
    from emalgam.stepwise import fit_stepwise as fit_stepwise
    from emalgam.stream import Stream as Stream
    from emalgam.stream import open_stream as open_stream


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"emalgam.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"emalgam.{name}")
    else:
        raise AttributeError(f"module 'emalgam' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
