"""The libraries that emalgam is measured beside. Nothing here imports one before it is needed."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Final

PEERS: Final = ("sklearn", "daal4py", "torch")


def absent() -> list[str]:
    """Which of them are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def how_to_install(names: list[str]) -> str:
    """What to tell the one who lacks them."""
    return f"{', '.join(names)} is not installed; the competitors come with: pip install -e '.[peers]'"


def load_torch() -> ModuleType:
    """torch with one thread for each processor of this process; ImportError that says where it comes from."""
    if "torch" in absent():
        raise ImportError(how_to_install(["torch"]))
    import torch

    from emalgam_kernels.blocks import default_threads

    torch.set_num_threads(default_threads())
    return torch
