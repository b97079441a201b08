"""Pictures as files, by a process that shows none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emalgam.files import replacing
from emalgam.plot.style import pyplot_module


def prepare_pictures() -> None:
    """No window; ImportError if matplotlib is missing, before the hours of a training and not after them."""
    pyplot_module().switch_backend("Agg")


def write_picture(path: Path, ax: Any) -> None:
    """The figure of an Axes as a PNG file, at once and whole."""
    with replacing(path) as file:
        ax.figure.savefig(file, format="png", dpi=110)
    pyplot_module().close(ax.figure)
