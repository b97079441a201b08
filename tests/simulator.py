"""Numba's CUDA simulator with the threads of a block in turn: three times as fast as its own polling, and repeatable.

Between two `syncthreads` one thread runs after the other, forwards in one phase and backwards in the next. A kernel
that lacks a `syncthreads` is found out by one of the orders; threads that run at once hide it most of the time.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel as simulator


def take_turns() -> None:
    """Replace the simulator's way to run a block."""
    simulator.BlockManager = BlockInTurn


def locked() -> threading.Lock:
    """A lock for somebody else to release; quicker than a semaphore."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class BlockInTurn(simulator.BlockManager):
    """Runs a block: each of its threads up to the next `syncthreads`, then each up to the one after."""

    def run(self, grid_point: tuple[int, ...], *arguments: Any) -> None:
        def kernel() -> None:
            self._f(*arguments)

        self.phase_over = locked()
        points = np.ndindex(*self._block_dim)
        threads = [ThreadInTurn(kernel, self, grid_point, point, self._debug) for point in points]
        for thread in threads:
            thread.start()
        waiting, forwards = threads, sum(grid_point) % 2 == 0
        while waiting:
            self._run_phase(waiting if forwards else waiting[::-1])
            for thread in waiting:
                if thread.exception:
                    self._end(threads)
                    raise thread.exception[0].with_traceback(thread.exception[1])
            waiting, forwards = [thread for thread in waiting if not thread.finished], not forwards

    def _run_phase(self, threads: list[ThreadInTurn]) -> None:
        """Each thread wakes the one after it, the last one this block."""
        for thread, following in pairwise(threads):
            thread.following = following.turn
        threads[-1].following = self.phase_over
        threads[0].turn.release()
        self.phase_over.acquire()

    @staticmethod
    def _end(threads: list[ThreadInTurn]) -> None:
        for thread in threads:
            thread.abort = True
            thread.turn.release()


class ThreadInTurn(simulator.BlockThread):
    """Runs from the moment that `turn` is released to the next `syncthreads` or its end."""

    def __init__(self, kernel: Any, block: BlockInTurn, *place: Any) -> None:
        super().__init__(kernel, block, *place)
        self.block, self.finished = block, False
        self.turn = self.following = locked()

    def run(self) -> None:
        self.turn.acquire()
        if not self.abort:
            with np.errstate(all="ignore"):  # NumPy's scalars compute here; a GPU does not warn of an overflow
                super().run()
        self.finished = True
        if not self.abort:
            (self.block.phase_over if self.exception else self.following).release()

    def syncthreads(self) -> None:
        self.following.release()
        self.turn.acquire()
        if self.abort:
            raise RuntimeError("another thread of the block failed")
