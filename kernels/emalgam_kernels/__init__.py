"""The accelerated core of emalgam: kernels for Gaussian mixtures in several backends with one contract.

>>> import numpy as np
>>> from emalgam_kernels import Packed, log_prob
>>> unit = Packed("spherical", np.zeros(2), np.ones(2), None, np.array([[-0.5, 0.0, 0.0, -np.log(2 * np.pi)]]))
>>> out = np.empty(1)
>>> log_prob(np.zeros((1, 2)), unit, out)
>>> float(out[0].round(6))
-1.837877

``from emalgam_kernels import log_prob`` takes the fastest backend that can run on this machine;
``emalgam_kernels.load("numba_cpu").log_prob`` a certain one. Only the backend that is used gets imported.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Final

from emalgam_kernels.alias import AliasTable, alias_table
from emalgam_kernels.parameters import Direct, Gaussians, Packed, Parameters, Sampler, statistic_count

BACKENDS: Final = ("reference", "cython_cpu", "numba_cpu", "numba_cuda")
PREFERRED: Final = ("cython_cpu", "numba_cpu", "reference")
# Which kernels are in which file: the same in every backend.
FILES: Final = {
    "mixture": ("log_prob", "responsibilities", "em_statistics"),
    "kl": ("kl_pairs", "kl_all_pairs"),
    "sampling": ("uniforms", "normals", "sample_mixture", "kl_monte_carlo"),
    "batch": ("fit_many", "predict_many"),
}
HOMES: Final = {kernel: file for file, kernels in FILES.items() for kernel in kernels}
KERNELS: Final = tuple(HOMES)

__all__ = [
    "BACKENDS",
    "FILES",
    "KERNELS",
    "AliasTable",
    "Direct",
    "Gaussians",
    "Packed",
    "Parameters",
    "Sampler",
    "alias_table",
    "load",
    "probe",
    "statistic_count",
    *KERNELS,
]


def probe(backend: str) -> str | None:
    """Why `backend` cannot run here, or None if it can. Imports neither Numba nor a compiled module.

    ValueError for a backend that does not exist, or a setting of it that is not valid.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    reason: str | None = importlib.import_module(f"emalgam_kernels.{backend}").probe()
    return reason


def load(backend: str, file: str = "mixture") -> ModuleType:
    """The module that holds the kernels of one of `FILES`; ImportError with the reason if it cannot run here."""
    if file not in FILES:
        raise ValueError(f"file is {file!r}; expected one of {', '.join(FILES)}")
    reason = probe(backend)
    if reason is not None:
        raise ImportError(f"emalgam_kernels.{backend} cannot run here: {reason}")
    return importlib.import_module(f"emalgam_kernels.{backend}.{file}")


def __getattr__(name: str) -> Any:
    if name in KERNELS:
        return getattr(load(next(backend for backend in PREFERRED if probe(backend) is None), HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
