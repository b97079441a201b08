"""How long it takes to begin: imports, the command line as a whole process, and Numba's compiler.

Wall-clock time of new interpreters, in turns; medians.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from bench.libraries import EMALGAM
from bench.tables import Target, Topic, number, say, table, verdict

ROWS, FEATURES, COMPONENTS = 10_000, 4, 3
ROUNDS: Final = 11
ROUNDS_OF_COMPILATION: Final = 2
MOST_IMPORT: Final = 0.2  # seconds
MOST_COMMAND: Final = 1.2  # seconds
JUDGED: Final = EMALGAM[0]

IMPORTS: Final = {
    "nothing": "pass",
    "numpy": "import numpy",
    "numpy, emalgam": "import numpy, emalgam",
    "numpy, emalgam.fit": "import numpy; from emalgam import fit, Mixture",
    "numpy, emalgam.GaussianMixture": "import numpy; from emalgam import GaussianMixture",
    "numpy, sklearn.mixture.GaussianMixture": "import numpy; from sklearn.mixture import GaussianMixture",
}

# The first fit of a process on each dtype: with an empty cache it compiles, then it loads.
NUMBA_SCRIPT: Final = """
import json, time, warnings
import numpy as np
import emalgam
from emalgam import fit
warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
found = {}
start = time.perf_counter()
import numba
found["import numba"] = time.perf_counter() - start
for dtype in ("float64", "float32"):
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(dtype)
    start = time.perf_counter()
    fit(x, 2, max_iter=1, backend="numba_cpu")
    found["first fit, " + dtype] = time.perf_counter() - start
from emalgam_kernels.numba_cpu.compilation import compile_seconds
found["compiled"] = sum(compile_seconds().values())
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Start:
    """Seconds of imports, of the command line on each backend, and of Numba's first fits in each state of its cache."""

    imports: dict[str, float]
    commands: dict[str, float]
    numba: dict[str, dict[str, float]]

    @property
    def import_seconds(self) -> float:
        """What `import emalgam` adds to `import numpy`; below zero only by noise."""
        return self.imports["numpy, emalgam"] - self.imports["numpy"]


def topic(smoke: bool) -> Topic:
    """Imports, commands and compilation; each once in a smoke test."""
    rounds = 1 if smoke else ROUNDS
    say("    imports and commands")
    imported, commands = imports(rounds), command_line(rounds)
    say("    Numba's compiler")
    found = Start(imported, commands, numba_start(1 if smoke else ROUNDS_OF_COMPILATION))
    targets = [
        Target("`import emalgam` beyond `import numpy`", found.import_seconds, MOST_IMPORT, False, " s"),
        Target(f"`emalgam fit`, whole process, {JUDGED}", commands[JUDGED], MOST_COMMAND, False, " s"),
    ]
    return Topic([f"## Start\n\nMedians of {rounds} new processes.\n\n" + _tables(found)], targets)


def imports(rounds: int) -> dict[str, float]:
    """Median seconds of an interpreter that imports something and ends."""
    return _in_turns({name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}, rounds)


def command_line(rounds: int) -> dict[str, float]:
    """Median seconds of ``emalgam fit`` as a process on each backend: from a .npy file to a model file."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, FEATURES)) + 6 * rng.integers(COMPONENTS, size=(ROWS, 1))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npy"
        np.save(data, x)
        commands = {
            backend: [
                *(sys.executable, "-m", "emalgam", "fit", str(data), "-k", str(COMPONENTS)),
                *("--backend", backend, "-o", str(Path(folder) / f"{backend}.safetensors")),
            ]
            for backend in EMALGAM
        }
        return _in_turns(commands, rounds)


def numba_start(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of `NUMBA_SCRIPT`'s parts: "empty cache", where every kernel is compiled, and "from cache"."""
    found: dict[str, list[dict[str, float]]] = {"empty cache": [], "from cache": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state in found.values():
                output = _run([sys.executable, "-c", NUMBA_SCRIPT], {"NUMBA_CACHE_DIR": folder})
                state.append(json.loads(output))
    if any(each["compiled"] > 0 for each in found["from cache"]):
        raise AssertionError(f"Numba compiled again what it had just compiled: {found['from cache']}")
    return {
        state: {part: median(each[part] for each in values) for part in values[0]} for state, values in found.items()
    }


def _in_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Median wall-clock seconds of each command; before several rounds, one round fills the disk cache."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_number in range(0 if rounds > 1 else 1, rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            _run(command)
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def _run(command: Sequence[str], environment: Mapping[str, Any] | None = None) -> str:
    """Standard output of a command; RuntimeError with what it says if it fails."""
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | (environment or {})
    )
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    return finished.stdout


def _tables(found: Start) -> str:
    seconds = found.imports
    rows = [[f"`{name}`", number(value), f"{value - seconds['numpy']:+.3f}"] for name, value in seconds.items()]
    met = verdict(found.import_seconds <= MOST_IMPORT)
    commands = [
        [name, number(value), f"target {MOST_COMMAND} s: {verdict(value <= MOST_COMMAND)}" if name == JUDGED else ""]
        for name, value in found.commands.items()
    ]
    shape = f"{ROWS} × {FEATURES}, K = {COMPONENTS}"
    states = found.numba
    parts = [[part, *(number(states[state][part]) for state in states)] for part in next(iter(states.values()))]
    return (
        table(["an interpreter that imports", "seconds", "beyond `import numpy`"], rows)
        + f"\nTarget: `import emalgam` adds at most {MOST_IMPORT} s to `import numpy`: {met}.\n\n"
        + table([f"`emalgam fit`, {shape}, whole process", "seconds", ""], commands)
        + "\n"
        + table(["numba_cpu, seconds", *states], parts)
    )
