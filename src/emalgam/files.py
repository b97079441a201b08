"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None, durable: bool = False
) -> Iterator[BinaryIO]:
    """A binary file for writing that takes the name `path` when the block ends, and is removed if the block raises.

    It is written beside it and then renamed: a reader sees the old file or the new one, never half of one. Of a link
    the file that it points to is replaced.

    Parameters
    ----------
    path : path-like
    folder : path-like, optional
        Where it is written first, on the same file system: a process that is killed leaves its remains there, under a
        name that begins with a dot.
    durable : bool
        Wait for the disk before the file takes its name, so that it is whole after a loss of power too.

    Raises
    ------
    OSError
        If the folder does not exist or cannot be written to, `path` is a folder, a device or a pipe, or the disk is
        full; it names a file.
    """
    target = target_of(path)
    check_target(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")
    temporary = Path(folder or target.parent) / f".{target.name}.{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, target)
        if durable:
            _keep_names(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(target)  # a write that fails does not say to which file
        raise


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that `path` names, or that the link there points to."""
    return Path(path).resolve() if Path(path).is_symlink() else Path(path)


def check_target(path: Path) -> None:
    """OSError if there is something that must not be replaced: a folder, a device such as /dev/null, a pipe."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file; name a file to write")


def _keep_names(folder: Path) -> None:
    """Wait until the disk has the names of the files in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
