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
    "save_model": "model_file",
    "load_model": "model_file",
    "ModelFileError": "model_file",
}
_MODULES: Final = ("backends", "plot")

__all__ = [*_HOMES, *_MODULES]

if TYPE_CHECKING:
    from emalgam import backends as backends
    from emalgam import plot as plot
    from emalgam.backends import BackendUnavailable as BackendUnavailable
    from emalgam.backends import use_backend as use_backend
    from emalgam.em import ConvergenceWarning as ConvergenceWarning
    from emalgam.em import Fit as Fit
    from emalgam.em import Iteration as Iteration
    from emalgam.em import fit as fit
    from emalgam.estimator import GaussianMixture as GaussianMixture
    from emalgam.m_step import DegenerateComponentError as DegenerateComponentError
    from emalgam.m_step import NumericalError as NumericalError
    from emalgam.mixture import Mixture as Mixture
    from emalgam.model_file import ModelFileError as ModelFileError
    from emalgam.model_file import load_model as load_model
    from emalgam.model_file import save_model as save_model


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
