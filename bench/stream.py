"""Data larger than memory: an iteration from a memory map beside the same from memory, and Parquet.

    python -m bench.stream

20 000 000 × 8 float32, K = 16, from the same parameters. Seconds per iteration are the difference between a longer and
a one-iteration fit, so that what is done once does not count. The file has been read before, so that it is in the
system's cache as far as that can hold it.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam
from bench.tables import Target, Topic, judged, milliseconds, number, say, table
from bench.turns import in_turns, timed

N, D, K = 20_000_000, 8, 16
SMOKE_N: Final = 40_000
PARQUET_SHARE: Final = 10
LONG: Final = 4  # iterations
ROUNDS: Final = 5
MOST: Final = 1.2
ROWS_AT_ONCE: Final = 2**20


def write(folder: Path, n: int) -> Path:
    """The rows as .npy, and a tenth of them as Parquet, neither held in memory."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 4, (K, D)).astype(np.float32)
    x = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(n, D))
    for start in range(0, n, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, n))
        count = rows.stop - start
        x[rows] = centres[rng.integers(0, K, count)] + rng.standard_normal((count, D), dtype=np.float32)
    x.flush()
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"x{d}": np.ascontiguousarray(x[: n // PARQUET_SHARE, d]) for d in range(D)}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder


def seconds_per_iteration(x: Any) -> float:
    """Of EM from parameters that are the same for all."""
    rng = np.random.default_rng(1)
    given = {
        "weights_init": np.full(K, 1 / K),
        "means_init": rng.normal(0, 4, (K, D)),
        "precisions_init": np.tile(np.eye(D), (K, 1, 1)),
    }

    def fit(iterations: int) -> emalgam.Fit:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
            return emalgam.fit(x, K, max_iter=iterations, tol=0.0, **given)

    return (timed(partial(fit, 1 + LONG))[0] - timed(partial(fit, 1))[0]) / LONG


def topic(smoke: bool) -> Topic:
    """A memory map, memory, and Parquet."""
    n = SMOKE_N if smoke else N
    with tempfile.TemporaryDirectory() as name:
        say(f"    {n} × {D}, writing")
        folder = write(Path(name), n)
        mapped = np.load(folder / "x.npy", mmap_mode="r")
        sources = {"in memory": np.array(mapped), "memory map": mapped, "Parquet": folder / "x.parquet"}
        measurements = {each: partial(seconds_per_iteration, source) for each, source in sources.items()}
        found = {each: median(times) for each, times in in_turns(measurements, 1 if smoke else ROUNDS).items()}
    sizes = {each: n // PARQUET_SHARE if each == "Parquet" else n for each in found}
    rows = [
        [each, f"{sizes[each]:,}".replace(",", " "), milliseconds(t), number(sizes[each] / t / 1e6)]
        for each, t in found.items()
    ]
    target = Target(
        f"EM from a memory map, {n:,} × {D}, K = {K}: times as long as in memory",
        found["memory map"] / found["in memory"],
        MOST,
        False,
        " ×",
    )
    text = table(["float32, K = 16", "rows", "ms per iteration", "million rows per second"], rows)
    return Topic([f"## Data larger than memory\n\n{text}\n{judged([target])}"], [target])


if __name__ == "__main__":
    print("\n".join(topic(smoke=False).sections))
