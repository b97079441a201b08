"""What this machine has to compute with, for ``emalgam info`` and for bug reports."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

import emalgam_kernels
from emalgam import __version__, backends
from emalgam_kernels import Direct, Gaussians, Packed, Sampler
from emalgam_kernels.blocks import default_threads
from emalgam_kernels.numba_cpu import compile_times
from emalgam_kernels.parameters import ARITHMETICS

PACKAGES: Final = ("numpy", "numba", "numba-cuda", "scipy", "scikit-learn", "pyarrow", "safetensors", "torch", "dask")
NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/gpus")

__all__ = ["describe"]


def describe(compile_kernels: bool = False) -> dict[str, Any]:
    """Backends and why they cannot run, threads, SIMD level, GPU, compile time of the Numba kernels, versions.

    Parameters
    ----------
    compile_kernels : bool
        Whether to compile those Numba kernels now that are not on disk. (In an empty folder, named by the environment
        variable NUMBA_CACHE_DIR, none are.)

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
        "numba_kernels": _numba_kernels(compile_kernels),
        "versions": {"emalgam": __version__, "python": platform.python_version()} | _versions(),
        "backends": [asdict(each) for each in status],
    }


def _default_backend() -> str:
    try:
        return backends.resolve()
    except (ValueError, backends.BackendUnavailable) as error:  # what the environment names may not exist or not run
        return f"none: {error}"


def _simd_level() -> str:
    try:
        return str(emalgam_kernels.load("cython_cpu").simd_level())
    except ImportError as error:
        return f"none: {error}"


def _gpu(cuda: backends.BackendStatus) -> str:
    """The GPUs that NVIDIA's driver lists, and whether anything here would use them."""
    models = []
    for information in sorted(NVIDIA_DRIVER.glob("*/information")):
        fields = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        models.append(fields.get("Model", "unknown model").strip())
    if not models:
        return "none found"
    return ", ".join(models) + ("" if cuda.available else f" (not used: {cuda.reason})")


def _numba_kernels(compile_kernels: bool) -> dict[str, Any]:
    """The folder of compiled kernels, None if there are none, and the seconds that each took when it was compiled."""
    seconds: dict[str, float] = {}
    error = None
    if compile_kernels:
        try:
            seconds = _compile()
        except Exception as reason:  # a broken Numba or LLVM raises anything, and this is where one looks for why
            error = f"{type(reason).__name__}: {reason}"
    cache = _numba_cache()
    if cache is not None:
        seconds = {**seconds, **compile_times.recorded(Path(cache))}
    return {"cache": cache, "compile_seconds": seconds, "error": error}


def _compile() -> dict[str, float]:
    """Have every form of the kernels compiled, by running each on one number; seconds, 0 for what was on disk."""
    for file, run in {"mixture": _run_mixture, "kl": _run_kl, "sampling": _run_sampling}.items():
        run(emalgam_kernels.load("numba_cpu", file))
    from emalgam_kernels.numba_cpu.compilation import compile_seconds  # imports Numba

    return compile_seconds()


def _run_mixture(kernels: ModuleType) -> None:
    for dtype, arithmetic in (("float64", "float64"), ("float32", "float32"), ("float32", "float64")):
        zero, one, x = np.zeros(1), np.ones(1), np.zeros((1, 1), dtype)
        kernels.log_prob(x, Packed("diag", zero, one, None, np.zeros((1, 3)), arithmetic), np.empty(1))
        direct = Direct("diag", zero, one, np.zeros((1, 1)), np.ones((1, 1)), zero, arithmetic)
        kernels.log_prob(x, direct, np.empty(1))


def _run_kl(kernels: ModuleType) -> None:
    for dtype in ARITHMETICS:
        one = np.ones((1, 1, 1), dtype)
        kernels.precision_factors(one, np.empty_like(one))
        gaussian = Gaussians("full", np.zeros((1, 1), dtype), one, one)
        kernels.kl_pairs(gaussian, gaussian, np.empty(1))
        kernels.kl_all_pairs(gaussian, gaussian, np.empty((1, 1)))


def _run_sampling(kernels: ModuleType) -> None:
    sampler = Sampler(np.zeros((1, 1)), np.ones((1, 1)), np.ones(1))
    for dtype in ARITHMETICS:
        out = np.empty((1, 1), dtype)
        kernels.uniforms(0, 0, 0, out[0])
        kernels.normals(0, 0, 0, out)
        kernels.sample_mixture(sampler, 0, 0, out, np.empty(1, np.int64))


def _numba_cache() -> str | None:
    """The folder with compiled kernels in it, of those that Numba tries: named, beside the source, the user's."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(emalgam_kernels.__file__).parent / "numba_cpu" / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))) / "numba"
    for folder in (Path(named),) if named else (beside, user):
        for record in folder.rglob(compile_times.FILE_NAME):
            if any(record.parent.glob("*.nbi")):
                return str(record.parent)
    return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
