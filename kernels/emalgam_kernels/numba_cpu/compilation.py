"""From a function to machine code, from disk where it can be, and the seconds that took.

A function that Numba keeps on disk is looked up by the file that it is defined in and by what its closure holds. So a
kernel's factory returns it as a closure over `version`, a hash of the other sources that it was compiled from.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

from emalgam_kernels.numba_cpu import compile_times
from emalgam_kernels.numba_cpu.tiles import OPTIONS

_seconds: dict[str, float] = {}


def compile_function(
    name: str,
    factory: Callable[[str], Callable[..., Any]],
    signature: Any,
    sources: Sequence[ModuleType | str],
    options: Mapping[str, Any] = OPTIONS,
) -> Callable[..., Any]:
    """``factory(version)``, compiled for one signature; the seconds are recorded beside it.

    Parameters
    ----------
    name : str
        What `compile_seconds` and ``emalgam info`` call it.
    factory : callable
        Returns a closure over its argument.
    signature : Numba signature
    sources : sequence of modules or texts
        What else the function is compiled from: with other sources, what is on disk does not count.
    options : mapping
        Of `numba.njit`.
    """
    start = time.perf_counter()
    try:
        texts = (source if isinstance(source, str) else inspect.getsource(source) for source in sources)
        version = hashlib.sha256("".join(texts).encode()).hexdigest()
        function: Callable[..., Any] = numba.njit(signature, cache=True, **options)(factory(version))
    except (OSError, RuntimeError):  # no sources at hand, or no folder that Numba could write to: for this process only
        function = numba.njit(signature, **options)(factory(""))
    stats = getattr(function, "stats", None)  # there is none under NUMBA_DISABLE_JIT
    found = bool(stats and stats.cache_hits)
    _seconds[name] = 0.0 if found else time.perf_counter() - start
    if stats and stats.cache_path and not found:
        compile_times.record(Path(stats.cache_path), name, _seconds[name])
    return function


def compile_seconds() -> dict[str, float]:
    """Seconds that Numba compiled in this process, for every function in use; 0 if it came from disk."""
    return dict(_seconds)
