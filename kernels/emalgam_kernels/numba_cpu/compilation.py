"""Compiling the kernels of this package: from Numba's disk cache if the sources have not changed since."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

from emalgam_kernels.numba_cpu import compile_times
from emalgam_kernels.numba_cpu.tiles import OPTIONS


def compile_kernel(
    factory: Callable[[str], Callable[..., Any]],
    signature: Any,
    modules: tuple[ModuleType, ...],
    name: str,
    options: Any = OPTIONS,
) -> tuple[Callable[..., Any], float]:
    """The compiled function, and the seconds that took, which are recorded beside it: 0 if it came from disk.

    Numba keys its disk cache by the file that a function is in and by what its closure holds. So `factory` makes the
    function as a closure over a version: the hash of the `modules` with what it calls.
    """
    start = time.perf_counter()
    try:
        version = hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()
        function: Any = numba.njit(signature, cache=True, **options)(factory(version))
    except (OSError, RuntimeError):  # no sources at hand, or no folder that Numba could write to: for this process only
        function = numba.njit(signature, **options)(factory(""))
    stats = getattr(function, "stats", None)  # there is none under NUMBA_DISABLE_JIT
    if stats and stats.cache_hits:
        return function, 0.0
    seconds = time.perf_counter() - start
    if stats and stats.cache_path:
        compile_times.record(Path(stats.cache_path), name, seconds)
    return function, seconds
