"""The translation's example is read everywhere; the rest needs NVIDIA's compiler, and the emulator to be asked for."""

from __future__ import annotations

from pathlib import Path

from tests.emulator import EMULATED

OF_THE_MACHINE = ("machine.py", "test_machine.py", "test_instructions.py")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be imported without it."""
    return True if not EMULATED and collection_path.name in OF_THE_MACHINE else None
