"""Compiled kernels: Cython over GNU C vector types, one code path for each SIMD level of the processor.

The extension module ``mixture`` is there if a C compiler was at hand when the package was built.
"""

from __future__ import annotations

import importlib.util


def probe() -> str | None:
    """Why this backend cannot run here; None if it can."""
    if importlib.util.find_spec("emalgam_kernels.cython_cpu.mixture") is None:
        return "its extension module was not built (no C compiler was found when emalgam was installed)"
    return None
