"""The plain NumPy backend: its signatures and docstrings are the specification of every other."""

from __future__ import annotations


def probe() -> str | None:
    """Why this backend cannot run here; None if it can. NumPy is always there."""
    return None
