"""A fresh interpreter, for what depends on the state of the whole process, and the command line in one."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, cast


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


def output_of(program: str, environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """What a program printed; its traceback is the message if it failed."""
    finished = python("-c", program, environment=environment, folder=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


# ---- the command line


def run(*arguments: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`emalgam arguments`, which has to end with `status`."""
    command = [sys.executable, "-m", "emalgam", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_json(*arguments: object) -> Any:
    """The only thing on standard output, a JSON object on one line."""
    done = run(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    return json.loads(done.stdout)


def error_of(*arguments: object, status: int = 1, **environment: str) -> str:
    """The one line on standard error."""
    done = run(*arguments, status=status, **environment)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stderr.removeprefix("error: ").rstrip("\n")


class OnTerminal:
    """`emalgam arguments` with its standard error on a terminal."""

    def __init__(self, *arguments: object) -> None:
        self.leader, follower = pty.openpty()
        command = [sys.executable, "-m", "emalgam", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, text=True)
        os.close(follower)
        self.shown = ""

    def read(self, until: str | None = None) -> str:
        """What the terminal shows, up to a text or to the end."""
        while until is None or until not in self.shown:
            try:
                self.shown += os.read(self.leader, 4096).decode(errors="replace")
            except OSError:  # the process has closed its side
                break
        return self.shown

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        cast(IO[str], self.process.stdout).close()
        os.close(self.leader)

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end: exit status, standard output and what the terminal shows."""
        shown = self.read()
        out = cast(IO[str], self.process.stdout).read()
        return self.process.wait(), out, shown
