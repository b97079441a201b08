"""Memory of a fit beyond X and the interpreter: 2 000 000 × 8, K = 32, k-means and EM, in a process of its own.

    python -m bench.memory cython_cpu

The process loads emalgam, fills X (float64, in memory) and then fits. What counts is the peak of resident memory since
the process began, less what was resident just before the fit; the peak is the operating system's own record, so that
no moment is missed. Before the fit, "loaded" has the backend's code in memory, as an interpreter with its libraries
has; "cold" has nothing but X, NumPy and ``import emalgam``, so that code which the first fit loads counts as well.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import emalgam
from bench.libraries import EMALGAM
from bench.tables import Target, Topic, say, size, table, verdict

N, D, K = 2_000_000, 8, 32
SMOKE_N: Final = 50_000
ITERATIONS: Final = 5
ROWS_AT_ONCE: Final = 10_000
ROOT: Final = Path(__file__).resolve().parent.parent
MEBIBYTE: Final = 2**20
STARTS: Final = ("loaded", "cold")
MOST: Final = 64.0  # MiB


@dataclass(frozen=True)
class Memory:
    """Bytes: of X, resident before the fit, and of the peak."""

    backend: str
    start: str
    size: tuple[int, int, int]
    of_x: int
    before: int
    peak: int

    @property
    def beyond(self) -> float:
        """MiB that the fit took."""
        return (self.peak - self.before) / MEBIBYTE


def topic(smoke: bool) -> Topic:
    """Each backend from both starts."""
    found = []
    for backend in EMALGAM:
        for start in STARTS:
            say(f"    {backend}, {start}")
            found.append(measure(backend, start, smoke))
    targets = [
        Target(
            f"memory beyond X and the interpreter, {size(*each.size)}, {each.backend}", each.beyond, MOST, False, " MiB"
        )
        for each in found
        if each.start == "loaded"
    ]
    return Topic(["## Memory\n\n" + NOTE + _table(found)], targets)


def measure(backend: str, start: str = "loaded", smoke: bool = False) -> Memory:
    """`fit_here` in a new interpreter."""
    values = in_new_process("bench.memory", backend, start, SMOKE_N if smoke else N)
    return Memory(**values | {"size": tuple(values["size"])})


def in_new_process(module: str, *arguments: object) -> Any:
    """What ``python -m module arguments`` prints as JSON; RuntimeError with what it says if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    return json.loads(finished.stdout)


def fit_here(backend: str, start: str, n_samples: int) -> Memory:
    """Fill X, fit, and say what this process took."""
    rng = np.random.default_rng(0)
    if start == "loaded":
        _fit(rng.normal(size=(10 * K, D)), backend)
    x = np.empty((n_samples, D))
    means = rng.normal(size=(K, D)) * 2
    for first in range(0, n_samples, ROWS_AT_ONCE):
        rows = x[first : first + ROWS_AT_ONCE]
        rows[:] = rng.normal(size=rows.shape) + means[rng.integers(K, size=len(rows))]
    before = resident()
    _fit(x, backend)
    return Memory(backend, start, (n_samples, D, K), x.nbytes, before, peak())


def _fit(x: np.ndarray, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        emalgam.fit(x, K, tol=0.0, max_iter=ITERATIONS, random_state=0, backend=backend)


def resident() -> int:
    """Bytes of this process in memory now; on a system that does not say, the most there were so far."""
    status = Path("/proc/self/status")
    return _field(status, "VmRSS") if status.exists() else peak()


def peak() -> int:
    """The most bytes of this process that were ever in memory."""
    status = Path("/proc/self/status")
    if status.exists():
        return _field(status, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


NOTE: Final = """Peak of resident memory during a fit (k-means, then EM) of float64 rows in memory, less what was
resident before it. "loaded": the backend's code was in memory before. "cold": the first fit of the process loads it,
Numba and LLVM included.

"""


def _table(found: Sequence[Memory]) -> str:
    rows = [
        [
            f"{size(*each.size)}, {each.backend}",
            each.start,
            f"{each.of_x / MEBIBYTE:.0f}",
            f"{each.before / MEBIBYTE:.0f}",
            f"{each.beyond:.1f}"
            + (f" (target {MOST:g}: {verdict(each.beyond <= MOST)})" if each.start == "loaded" else ""),
        ]
        for each in found
    ]
    return table(
        ["N, D, K, backend", "before the fit", "MiB of X", "MiB resident before", "MiB that the fit took"], rows
    )


if __name__ == "__main__":
    print(json.dumps(asdict(fit_here(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
