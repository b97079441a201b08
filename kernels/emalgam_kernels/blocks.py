"""Rows in blocks, blocks on threads, and sums whose bits do not depend on how many threads there were.

The grid of blocks follows from (N, K, F) alone. Threads take the next block when they are free; partial sums are
added in the order of the blocks, whichever finishes first. The threads are Python's, and the kernels they run have
released the GIL: no OpenMP runtime is needed, a fork leaves nothing broken, and compiled and Numba kernels share one
schedule.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, cast

import numpy as np

FLOP_PER_BLOCK: Final = 2**24  # about a third of a millisecond: long beside a hand-over, short beside a pass
FLOP_PER_EXPONENTIAL: Final = 40
FEWEST_ROWS: Final = 1024
MOST_ROWS: Final = 65536
ROWS_PER_CONVERSION: Final = 2048
BLOCKS_AHEAD: Final = 4  # per thread: enough that a thread which lost its processor for a while holds up no other

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


def tile_dtype(x: np.ndarray) -> np.dtype:
    """The type that kernels read x as: float32 for float32 of either byte order, else float64."""
    return np.dtype(np.float32 if x.dtype.newbyteorder("=") == np.float32 else np.float64)


def native_slices(x: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Rows [start, stop) of x as float32 or float64 in this machine's byte order: a view, or a few rows at a time.

    Yields (first row, last row + 1, rows), the rows in the type of `tile_dtype`.
    """
    dtype = tile_dtype(x)
    if x.dtype == dtype and x.flags.aligned:
        yield start, stop, x[start:stop]
        return
    for first in range(start, stop, ROWS_PER_CONVERSION):
        last = min(first + ROWS_PER_CONVERSION, stop)
        yield first, last, x[first:last].astype(dtype)


class _Crew:
    """Threads that share the blocks of one call. The first error ends them all, and is raised when they have ended."""

    def __init__(self, n_blocks: int) -> None:
        self.indices = iter(range(n_blocks))
        self.errors: list[BaseException] = []
        self.changed = threading.Condition()

    def run(self, block: Callable[[int], None], n_threads: int) -> None:
        """Call ``block(index)`` for every index on `n_threads` threads, the caller's among them."""
        global _threads
        others: list[Future[None]] = []
        try:
            if n_threads > 1 and _threads is None:
                _threads = ThreadPoolExecutor(max_workers=4096, thread_name_prefix="emalgam")
            for _ in range(n_threads - 1):
                others.append(cast(ThreadPoolExecutor, _threads).submit(self._work, block))
            self._work(block)
            wait(others)
        except BaseException as error:  # an interrupt, or no thread to be had
            self._fail(error)
            wait(others)
        if self.errors:
            del self.errors[1:]
            raise self.errors.pop()

    def _work(self, block: Callable[[int], None]) -> None:
        try:
            for index in self.indices:
                if self.errors:
                    return
                block(index)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.errors.append(error)
            self.changed.notify_all()


def for_each_block(block: Callable[[int, int], None], n_rows: int, rows: int, n_threads: int) -> None:
    """Call ``block(start, stop)`` for every block of `rows` rows."""
    n_blocks = -(-n_rows // rows)
    crew = _Crew(n_blocks)
    crew.run(lambda index: block(index * rows, min((index + 1) * rows, n_rows)), min(n_threads, n_blocks))


def sum_over_blocks(
    block: Callable[[int, int, np.ndarray], float], n_rows: int, rows: int, out: np.ndarray, n_threads: int
) -> float:
    """out ← Σ over blocks of what ``block(start, stop, partial)`` adds to a C-contiguous array of zeros, in block
    order.

    Returns the sum of the blocks' return values, in the same order. Memory: `out` at most a few times per thread, as
    threads wait rather than run far ahead of a block that takes long.
    """
    n_blocks = -(-n_rows // rows)
    n_threads = min(n_threads, n_blocks)
    ahead = BLOCKS_AHEAD * max(n_threads, 1)
    crew = _Crew(n_blocks)
    finished: dict[int, tuple[np.ndarray, float]] = {}
    spare: list[np.ndarray] = []
    added, total = 0, 0.0
    out[...] = 0.0

    def add(index: int) -> None:
        nonlocal added, total
        with crew.changed:
            crew.changed.wait_for(lambda: crew.errors or index < added + ahead)
            if crew.errors:
                return
            partial = spare.pop() if spare else np.empty(out.shape)
        partial[...] = 0.0
        value = block(index * rows, min((index + 1) * rows, n_rows), partial)
        with crew.changed:
            finished[index] = partial, value
            while added in finished:
                partial, value = finished.pop(added)
                np.add(out, partial, out=out)
                total += value
                added += 1
                spare.append(partial)
            crew.changed.notify_all()

    crew.run(add, n_threads)
    return total
