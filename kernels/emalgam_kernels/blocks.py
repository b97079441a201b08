"""Rows in blocks, blocks on threads, and sums whose bits do not depend on how many threads there were.

The grid of blocks follows from (N, K, F) alone. Threads take the next block when they are free; partial sums are
added in the order of the blocks, whichever finishes first. The threads are Python's, and the kernels they run have
released the GIL: no OpenMP runtime is needed, a fork leaves nothing broken, and compiled and Numba kernels share one
schedule.
"""

from __future__ import annotations

import _thread
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import numpy as np

FLOP_PER_BLOCK: Final = 2**24  # about a third of a millisecond: long beside a hand-over, short beside a pass
FLOP_PER_EXPONENTIAL: Final = 40
FEWEST_ROWS: Final = 1024
MOST_ROWS: Final = 65536
ROWS_PER_CONVERSION: Final = 2048
BLOCKS_AHEAD: Final = 4  # per thread: enough that a thread which lost its processor for a while holds up no other
SECONDS_OF_A_WAIT: Final = 0.0005
CACHE_LINE: Final = 64

_idle: list[_Worker] = []
_local = threading.local()


def _forget_threads() -> None:
    global _idle, _local
    _idle, _local = [], threading.local()


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


def carve(shapes: list[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
    """C-contiguous arrays in the calling thread's scratch memory, each from the beginning of a cache line on."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // CACHE_LINE) * CACHE_LINE for shape in shapes]
    memory = workspace(sum(sizes) + CACHE_LINE)
    start, arrays = -memory.ctypes.data % CACHE_LINE, []
    for shape, size in zip(shapes, sizes, strict=True):
        arrays.append(memory[start : start + size].view(dtype)[: math.prod(shape)].reshape(shape))
        start += size
    return arrays


def rows_per_block(n_components: int, n_statistics: int) -> int:
    """Rows of one block: a multiple of 512, so that tiles stay whole."""
    flop = n_components * (4 * n_statistics + FLOP_PER_EXPONENTIAL)
    return min(max(FLOP_PER_BLOCK // flop // 512 * 512, FEWEST_ROWS), MOST_ROWS)


def cuts(flop: np.ndarray) -> np.ndarray:
    """Pieces of work [cuts[i], cuts[i + 1]) make block i, each about `FLOP_PER_BLOCK`, or one piece that is larger.

    Parameters
    ----------
    flop : (n,) float64
        What each piece takes.

    >>> cuts(np.array([2.0**26, 2.0**23, 2.0**23, 2.0**23])).tolist()
    [0, 1, 4]
    """
    ends = np.cumsum(flop)
    n_blocks = min(int(ends[-1] // FLOP_PER_BLOCK), len(flop)) if len(flop) > 0 else 0
    inner = np.searchsorted(ends, np.arange(1, n_blocks) * (ends[-1] / n_blocks)) if n_blocks > 1 else []
    return np.unique(np.concatenate([[0], inner, [len(flop)]]).astype(np.int64))


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


class _Worker:
    """A thread that runs one task after another, and waits in `_idle` for the next.

    A thread that waits does not hold its worker. So it ends with a worker that nobody holds: one whose caller was
    interrupted between taking it from `_idle` and giving it a task.
    """

    def __init__(self) -> None:
        self.orders: SimpleQueue[Any] = SimpleQueue()
        _thread.start_new_thread(_serve, (self.orders, weakref.ref(self, self.orders.put)))

    def run(self, task: Callable[[], None]) -> None:
        self.orders.put((self, task))


def _serve(orders: SimpleQueue[Any], lost: weakref.ref[_Worker]) -> None:
    """Run the tasks of a worker, until `lost` says that there is none."""
    while (order := orders.get()) is not lost:
        worker, task = order
        task()
        del order, task  # data that they hold
        _idle.append(worker)
        del worker


def _idle_worker() -> _Worker:
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()


class Background:
    """A task on another thread, to be started once, which must not raise.

    KeyboardInterrupt can reach the caller's thread at any instruction. Therefore only plain locks, whose ``with``
    cannot be cut in two, queues in C and `_thread`; no Condition, and nothing that has one (Event, Future, Queue,
    Thread.start): it would stay locked and hang the next call. An interrupted `start` may have started the task or
    not, and `wait` is right for both.
    """

    def __init__(self, task: Callable[[], None]) -> None:
        self.task, self.process, self.thread = task, os.getpid(), 0
        self.started = False
        self.begins: dict[str, bool] = {}  # what the first to ask has set, thread or caller
        self.running = threading.Lock()
        self.running.acquire()

    def start(self) -> None:
        """Run the task on a thread that has nothing to do, or on a new one."""
        _idle_worker().run(self._run)
        self.started = True

    def _run(self) -> None:
        if self.begins.setdefault("begins", True):
            self.thread = threading.get_ident()
            try:
                self.task()
            finally:
                self.running.release()

    def wait(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        """Return when the task has ended. One whose start was interrupted before it began never will.

        At once in the task itself, whose thread may be the one that collects garbage, in a fork, which has no such
        thread, and when the interpreter ends (`at_exit`, bound here as modules are empty by then): what still holds
        a task is collected then, and no other thread runs any more.
        """
        if at_exit():
            return
        ends = self.started or self.begins.setdefault("begins", False)
        if ends and self.process == os.getpid() and self.thread != threading.get_ident():
            with self.running:
                pass


class _Crew:
    """Threads that share the blocks of one call. The first error ends them all, and is raised when they have ended."""

    def __init__(self, n_blocks: int) -> None:
        self.indices = iter(range(n_blocks))
        self.errors: list[BaseException] = []

    def run(self, block: Callable[[int], None], n_threads: int) -> None:
        """Call ``block(index)`` for every index on `n_threads` threads, the caller's among them."""
        others = [Background(partial(self._work, block)) for _ in range(n_threads - 1)]
        try:
            for other in others:
                other.start()
            self._work(block)
        except BaseException as error:  # no thread to be had, or an interrupt
            self.errors.append(error)
        while True:  # not in a function, whose first instruction could be interrupted
            try:
                for other in others:
                    other.wait()
                break
            except BaseException as error:
                self.errors.append(error)
        if self.errors:
            del self.errors[1:]
            raise self.errors.pop()

    def _work(self, block: Callable[[int], None]) -> None:
        try:
            for index in self.indices:
                if self.errors:
                    break
                block(index)
        except BaseException as error:
            self.errors.append(error)


def for_each_block(block: Callable[[int, int], None], n_rows: int, rows: int, n_threads: int) -> None:
    """Call ``block(start, stop)`` for every block of `rows` rows."""
    n_blocks = -(-n_rows // rows)
    crew = _Crew(n_blocks)
    crew.run(lambda index: block(index * rows, min((index + 1) * rows, n_rows)), min(n_threads, n_blocks))


def sum_over_blocks(
    block: Callable[[int, int, np.ndarray], float], n_rows: int, rows: int, out: np.ndarray, n_threads: int
) -> float:
    """out ← Σ over blocks of what ``block(start, stop, partial)`` adds to C-contiguous zeros, in block order.

    Returns the sum of the blocks' return values, in the same order. Memory: as `sum_in_order`.
    """

    def add(index: int, partial: np.ndarray) -> float:
        return block(index * rows, min((index + 1) * rows, n_rows), partial)

    out[...] = 0.0
    return sum_in_order(add, lambda _: out, -(-n_rows // rows), n_threads)


def sum_in_order(
    block: Callable[[int, np.ndarray], float], place: Callable[[int], np.ndarray], n_blocks: int, n_threads: int
) -> float:
    """Add what ``block(index, partial)`` adds to C-contiguous zeros to ``place(index)``, in the order of the blocks.

    Returns the sum of the blocks' return values, in the same order. Memory: a place at most a few times per thread, as
    threads wait rather than run far ahead of a block that takes long.
    """
    n_threads = min(n_threads, n_blocks)
    ahead = BLOCKS_AHEAD * max(n_threads, 1)
    crew, lock = _Crew(n_blocks), threading.Lock()
    finished: dict[int, tuple[np.ndarray, float]] = {}
    spare: list[np.ndarray] = []
    added, total = 0, 0.0

    def add(index: int) -> None:
        nonlocal added, total
        while index >= added + ahead and not crew.errors:
            time.sleep(SECONDS_OF_A_WAIT)
        if crew.errors:
            return
        shape = place(index).shape
        with lock:
            sums = spare.pop() if spare and spare[-1].shape == shape else np.empty(shape)
        sums[...] = 0.0
        value = block(index, sums)
        with lock:
            finished[index] = sums, value
            while added in finished:
                sums, value = finished.pop(added)
                out = place(added)
                np.add(out, sums, out=out)
                total += value
                added += 1
                spare.append(sums)

    crew.run(add, n_threads)
    return total
