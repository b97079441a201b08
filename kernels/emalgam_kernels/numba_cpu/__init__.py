"""Kernels compiled by Numba on first use and cached on disk: no compiler needed to install."""

from __future__ import annotations

import importlib.util


def probe() -> str | None:
    """Why this backend cannot run here; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    return None
