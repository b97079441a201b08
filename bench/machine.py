"""What the figures were measured on: processor, versions, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import re
import time
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

import emalgam
import emalgam_kernels
from emalgam_kernels.blocks import default_threads

MATRIX_SIZE: Final = 2048
PACKAGES: Final = (
    "numpy",
    "scipy",
    "numba",
    "llvmlite",
    "Cython",
    "scikit-learn",
    "scikit-learn-intelex",
    "daal",
    "tbb",
    "torch",
)


def describe() -> dict[str, str]:
    """Processor, threads, SIMD level, operating system, compiler of the extension, versions."""
    kernels = emalgam_kernels.load("cython_cpu")
    return {
        "processor": processor(),
        "processors used": f"{default_threads()} of {os.cpu_count()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "SIMD level of cython_cpu": str(kernels.simd_level()),
        "compiler of cython_cpu": compiler(Path(str(kernels.__file__))),
        "BLAS of NumPy": blas(),
        "operating system": platform.platform(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "emalgam": emalgam.__version__,
    } | {name: version(name) for name in PACKAGES}


def processor() -> str:
    """The model's name as the operating system gives it, family and model number with it where there are any."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor() or platform.machine()
    first = information.read_text().split("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = ", ".join(f"{name} {fields[name]}" for name in ("cpu family", "model", "cpu MHz") if name in fields)
    return f"{fields.get('model name', platform.machine())} ({numbers})" if numbers else platform.machine()


def compiler(extension: Path) -> str:
    """Who compiled it, from the comment that compilers leave."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|(?:Debian |Ubuntu |Apple )?clang version [\d.]+", extension.read_bytes())
    return found.group().decode() if found else "not recorded in the extension"


def blas() -> str:
    """The BLAS that NumPy was built with."""
    built = np.show_config(mode="dicts")
    found = built["Build Dependencies"]["blas"] if isinstance(built, dict) else {}
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()


@lru_cache(maxsize=1)
def _factors(dtype: str, size: int) -> np.ndarray:
    """Two square matrices of random numbers; (2, size, size)."""
    return np.random.default_rng(0).random((2, size, size), dtype=np.dtype(dtype).type)


def matrix_product_rate(dtype: str, size: int = MATRIX_SIZE) -> float:
    """flop/s of one product of two square matrices by NumPy, on all processors: the limit of a pass of EM."""
    a, b = _factors(dtype, size)
    out = np.empty_like(a)
    np.matmul(a[:64], b, out=out[:64])  # wakes the threads
    start = time.perf_counter()
    np.matmul(a, b, out=out)
    return 2 * size**3 / (time.perf_counter() - start)
