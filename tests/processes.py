"""A fresh interpreter, for what depends on the state of the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(
    *arguments: str, folder: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter and return what it printed; a process that hangs is ended and is an error."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=folder,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(program: str, environment: dict[str, str] | None = None) -> str:
    """What a program printed; its traceback is the message if it failed."""
    finished = python("-c", program, environment=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()
