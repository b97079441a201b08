"""What this machine has to compute with, for ``emalgam info`` and for bug reports."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import emalgam_kernels
from emalgam import backends
from emalgam_kernels.blocks import default_threads

PACKAGES: Final = (
    "emalgam",
    "numpy",
    "numba",
    "numba-cuda",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "safetensors",
    "torch",
)
NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/gpus")

__all__ = ["describe"]


def describe(compile_kernels: bool = False) -> dict[str, Any]:
    """Backends and why they cannot run, threads, SIMD level, GPU, compile time of the Numba kernels, versions.

    Parameters
    ----------
    compile_kernels : bool
        Whether to load Numba and compile its kernels, or take them from the cache, so as to time it (many seconds at first).

    Returns
    -------
    dict
        Of strings, numbers, lists and dicts: it can be written as JSON.
    """
    status = backends.status()
    return {
        "default_backend": _default_backend(),
        "n_threads": default_threads(),
        "simd_level": _simd_level(),
        "gpu": _gpu(next(each for each in status if each.name == "numba_cuda")),
        "numba_compilation": _numba_compilation(compile_kernels),
        "versions": {"python": platform.python_version()} | _versions(),
        "backends": [asdict(each) for each in status],
    }


def _default_backend() -> str:
    try:
        return backends.resolve()
    except (ValueError, backends.BackendUnavailable) as error:  # what the environment names may not exist or not run
        return f"none: {error}"


def _simd_level() -> str:
    reason = emalgam_kernels.probe("cython_cpu")
    return f"none: {reason}" if reason else str(emalgam_kernels.load("cython_cpu").simd_level())


def _gpu(cuda: backends.BackendStatus) -> str:
    """The GPUs that NVIDIA's driver lists, and whether anything here would use them."""
    models = []
    for information in sorted(NVIDIA_DRIVER.glob("*/information")):
        fields = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        models.append(fields.get("Model", "unknown model").strip())
    found = ", ".join(models) or "none found"
    return found if cuda.available else f"{found} (numba_cuda: {cuda.reason})"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
