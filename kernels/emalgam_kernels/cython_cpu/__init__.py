"""Compiled kernels: Cython over GNU C vector types, one code path for each SIMD level of the processor.

The extension module ``mixture`` is there if a C compiler was at hand when the package was built.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Final

SIMD_LEVELS: Final = ("v4", "v3", "baseline")
SIMD_VARIABLE: Final = "EMALGAM_SIMD"


def probe() -> str | None:
    """Why this backend cannot run here; None if it can. ValueError if EMALGAM_SIMD names no level."""
    wanted = os.environ.get(SIMD_VARIABLE)
    if wanted and wanted not in SIMD_LEVELS:
        raise ValueError(
            f"environment variable {SIMD_VARIABLE} is {wanted!r}; expected one of {', '.join(SIMD_LEVELS)}"
        )
    if importlib.util.find_spec("emalgam_kernels.cython_cpu.mixture") is None:
        return "its extension module was not built (no C compiler was found when emalgam was installed)"
    return None
