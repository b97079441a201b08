"""The place of the CUDA kernels. This version has none: `probe` says so, whatever the machine holds."""

from __future__ import annotations

import importlib.util


def probe() -> str | None:
    """Why this backend cannot run here."""
    missing = [name for name in ("numba", "numba_cuda") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; nor does this version of emalgam contain its CUDA kernels yet"
    return "this version of emalgam does not contain its CUDA kernels yet"
