"""Rows in blocks, blocks on threads, and sums whose bits do not depend on how many threads there were.

The grid of blocks follows from (N, K, F) alone. Threads take the next block when they are free; partial sums are
added in the order of the blocks, whichever finishes first. The threads are Python's, and the kernels they run have
released the GIL: no OpenMP runtime is needed, a fork leaves nothing broken, and compiled and Numba kernels share one schedule.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

FLOP_PER_BLOCK: Final = 2**24  # about a third of a millisecond: long beside a hand-over, short beside a pass
FLOP_PER_EXPONENTIAL: Final = 40
FEWEST_ROWS: Final = 1024
MOST_ROWS: Final = 65536
ROWS_PER_CONVERSION: Final = 2048

_threads: ThreadPoolExecutor | None = None
_local = threading.local()


def _forget_threads() -> None:
    global _threads, _local
    _threads, _local = None, threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def default_threads() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workspace(n_bytes: int) -> np.ndarray:
    """Scratch memory of the calling thread, (≥ n_bytes,) uint8, kept from call to call."""
    kept: np.ndarray | None = getattr(_local, "workspace", None)
    if kept is None or kept.size < n_bytes:
        kept = _local.workspace = np.empty(n_bytes, np.uint8)
    return kept


def rows_per_block(n_components: int, n_statistics: int) -> int:
    """Rows of one block: a multiple of 512, so that tiles stay whole."""
    flop = n_components * (4 * n_statistics + FLOP_PER_EXPONENTIAL)
    return min(max(FLOP_PER_BLOCK // flop // 512 * 512, FEWEST_ROWS), MOST_ROWS)


def native_slices(x: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Rows [start, stop) of x as float32 or float64 in this machine's byte order: a view, or a few rows at a time.

    Yields (first row, last row + 1, rows). float32 stays; every other type becomes float64.
    """
    if x.dtype in (np.float32, np.float64) and x.dtype.isnative and x.flags.aligned:
        yield start, stop, x[start:stop]
        return
    dtype = np.float32 if x.dtype == np.float32 else np.float64
    for first in range(start, stop, ROWS_PER_CONVERSION):
        last = min(first + ROWS_PER_CONVERSION, stop)
        yield first, last, x[first:last].astype(dtype)


def _on_threads(worker: Callable[[], None], n_threads: int) -> None:
    """Run `worker` on `n_threads` threads, the caller's among them; the first error is raised when all have ended."""
    global _threads
    if n_threads == 1:
        worker()
        return
    if _threads is None:
        _threads = ThreadPoolExecutor(max_workers=4096, thread_name_prefix="emalgam")
    others = [_threads.submit(worker) for _ in range(n_threads - 1)]
    try:
        worker()
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


def for_each_block(block: Callable[[int, int], None], n_rows: int, rows: int, n_threads: int) -> None:
    """Call ``block(start, stop)`` for every block of `rows` rows."""
    n_blocks = -(-n_rows // rows)
    indices = iter(range(n_blocks))

    def worker() -> None:
        for index in indices:
            block(index * rows, min((index + 1) * rows, n_rows))

    _on_threads(worker, min(n_threads, n_blocks))


def sum_over_blocks(
    block: Callable[[int, int, np.ndarray], float], n_rows: int, rows: int, out: np.ndarray, n_threads: int
) -> float:
    """out ← Σ over blocks of what ``block(start, stop, partial)`` adds to a partial array of zeros, in block order.

    Returns the sum of the blocks' return values, in the same order. Memory: `out` a few times per thread.
    """
    n_blocks = -(-n_rows // rows)
    indices = iter(range(n_blocks))
    lock = threading.Lock()
    finished: dict[int, tuple[np.ndarray, float]] = {}
    spare: list[np.ndarray] = []
    added, total = 0, 0.0
    out[...] = 0.0

    def worker() -> None:
        nonlocal added, total
        for index in indices:
            partial = spare.pop() if spare else np.empty_like(out)
            partial[...] = 0.0
            value = block(index * rows, min((index + 1) * rows, n_rows), partial)
            with lock:
                finished[index] = partial, value
                while added in finished:
                    partial, value = finished.pop(added)
                    np.add(out, partial, out=out)
                    total += value
                    added += 1
                    spare.append(partial)

    _on_threads(worker, min(n_threads, n_blocks))
    return total
