"""The files that a command is to write, looked at before the work."""

from __future__ import annotations

from pathlib import Path

from emalgam.files import check_target
from emalgam.tables import check_suffix


def check_writable(path: Path | None, *others: Path | None) -> None:
    """Say before the work, not after it, that a result could not be written, or would replace one of `others`."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    check_target(path)
    for other in others:
        if other is not None and path.resolve() == other.resolve():
            raise ValueError(f"{path} is named twice, and what is there would be lost; name another file to write")
        if other is not None and other.is_dir() and path.resolve().is_relative_to(other.resolve()):
            raise ValueError(f"{path} would be taken for data, as it lies in {other}; write it into another folder")


def check_table(path: Path | None, *others: Path | None) -> None:
    """The same of a table, whose format the suffix names."""
    if path is not None:
        check_suffix(path)
        check_writable(path, *others)
