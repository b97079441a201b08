"""How long Numba took to compile what lies in its cache, written beside it: `emalgam info` shows it without Numba."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

FILE_NAME: Final = "emalgam_compile_seconds.json"


def recorded(folder: Path) -> dict[str, float]:
    """Seconds for each compiled function of a cache folder; empty if none were recorded or the record is damaged."""
    try:
        record = json.loads((folder / FILE_NAME).read_text())
        return {str(name): float(seconds) for name, seconds in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def record(folder: Path, name: str, seconds: float) -> None:
    """Add one function to the record. A folder that cannot be written to keeps its old record: it is only for show."""
    temporary = folder / f"{FILE_NAME}.{os.getpid()}"
    with suppress(OSError):
        temporary.write_text(json.dumps({**recorded(folder), name: seconds}))
        temporary.replace(folder / FILE_NAME)
