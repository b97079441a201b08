"""Numba's CUDA simulator with the threads of a block in turn: many times as fast as its own polling, and repeatable.

Between two `syncthreads` one thread runs after the other, forwards in one phase and backwards in the next. A kernel
that lacks a `syncthreads` is found out by one of the orders; threads that run at once hide it most of the time.

What a kernel calls most is what costs: arrays are NumPy's own instead of two wrappers and two copies of each, types of
Numba are called as those of NumPy, and threads of Python serve one thread of a block after another.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Final

import numba
import numpy as np
from numba.cuda.simulator import kernel as simulator
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDALocal, FakeCUDAModule, FakeCUDAShared, swapped_cuda_module

CALLED: Final = ("uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")


def take_turns() -> None:
    """Replace the simulator's way to launch a kernel, and Numba's way to convert numbers."""
    simulator.FakeCUDAKernel.__call__ = launch
    types: Any = numba.types
    of_numba = types.Number.__call__

    def call(kind: Any, *given: Any) -> Any:
        try:
            return kind.of_numpy(*given)
        except (AttributeError, TypeError):  # another type, or types: a signature
            return of_numba(kind, *given)

    types.Number.__call__ = call
    for name in CALLED:
        getattr(types, name).of_numpy = getattr(np, name)


def launch(kernel: Any, *arguments: Any) -> None:
    """Run a kernel that has its grid: one block after the other, on the memory of the arguments themselves."""
    grid, block = simulator.normalize_kernel_dimensions(kernel.grid_dim, kernel.block_dim)
    module = Module(grid, block, kernel.dynshared_size)
    with swapped_cuda_module(kernel.fn, module):
        for point in np.ndindex(*grid):
            module.begin(point)
            Block(kernel.fn, arguments, module).run(forwards=sum(point) % 2 == 0)


# ---- what kernels call `cuda`


def dtype_of(kind: Any) -> np.dtype:
    """NumPy's type for one of Numba's, or for the type of a NumPy array, which is one already."""
    return np.dtype(getattr(kind, "of_numpy", kind))


class Local(FakeCUDALocal):
    """Arrays of a thread."""

    def array(self, shape: Any, dtype: Any, alignment: None = None) -> np.ndarray:
        return np.empty(shape, dtype_of(dtype))


class Shared(FakeCUDAShared):
    """Arrays of a block, told apart by where in the code they are asked for."""

    def array(self, shape: Any, dtype: Any, alignment: None = None) -> np.ndarray:
        if shape == 0:
            whole: np.ndarray = super().array(shape, dtype_of(dtype))
            return whole
        caller = sys._getframe(1)
        place = caller.f_code, caller.f_lasti
        if place not in self._allocations:
            self._allocations[place] = np.empty(shape, dtype_of(dtype))
        found: np.ndarray = self._allocations[place]
        return found


class Module(FakeCUDAModule):
    """`cuda` as the thread sees it whose turn it is."""

    threadIdx = blockIdx = local = shared = None  # noqa: N815 - Numba's looks for the thread of Python that asks

    def __init__(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int) -> None:
        super().__init__(grid, block, shared_bytes)
        self.local, self.shared = Local(), Shared(shared_bytes)
        self.block: Any = None

    def begin(self, point: tuple[int, ...]) -> None:
        """Another block: it finds what the one before it left in shared memory, as it may on a GPU."""
        self.blockIdx = Dim3(*point)

    def syncthreads(self) -> None:
        self.block.pause()


# ---- threads


def locked() -> threading.Lock:
    """A lock for somebody else to release; quicker than a semaphore."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Thread:
    """A thread of a block, before its first turn, between two, or at its end."""

    __slots__ = ("begun", "finished", "place", "turn")

    def __init__(self, place: Dim3) -> None:
        self.place, self.begun, self.finished = place, False, False
        self.turn: Any = None  # a lock, once it has waited


class Block:
    """Runs each thread up to the next `syncthreads`, then each up to the one after."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], module: Module) -> None:
        self.function, self.arguments, self.module = function, arguments, module
        self.phase_over = locked()
        self.error: Exception | None = None
        module.block = self

    def run(self, forwards: bool) -> None:
        dimensions = self.module.blockDim
        waiting = [Thread(Dim3(*place)) for place in np.ndindex(*dimensions)]
        while waiting:
            self.order = iter(waiting if forwards else waiting[::-1])
            self.wake_next()
            self.phase_over.acquire()
            waiting, forwards = [thread for thread in waiting if not thread.finished], not forwards
            if self.error is not None:
                self.end(waiting)
                raise self.error

    def wake_next(self) -> None:
        """Give the turn away."""
        thread = None if self.error else next(self.order, None)
        if thread is None:
            self.phase_over.release()
        elif thread.begun:
            thread.turn.release()
        else:
            Worker.idle().begin(self, thread)

    def serve(self, worker: Worker, thread: Thread) -> None:
        """On a thread of Python: one thread of the block to its end, and those after it as long as they are new."""
        while True:
            self.take_turn(thread)
            try:
                self.function(*self.arguments)
            except Exception as error:
                self.fail(error)
            thread.finished = True
            following = None if self.error else next(self.order, None)
            if following is None or following.begun:
                break
            thread = following
        worker.rest()
        (self.phase_over if following is None else following.turn).release()

    def take_turn(self, thread: Thread) -> None:
        thread.begun = True
        self.running, self.module.threadIdx = thread, thread.place

    def pause(self) -> None:
        """The running thread is at a `syncthreads`."""
        thread = self.running
        thread.turn = thread.turn or locked()
        self.wake_next()
        thread.turn.acquire()
        if self.error is not None:
            raise Aborted
        self.take_turn(thread)

    def fail(self, error: Exception) -> None:
        """An error ends the launch; it says in which thread it was."""
        if isinstance(error, Aborted):
            return
        where = f"tid={list(self.running.place)} ctaid={list(self.module.blockIdx)}"
        self.error = type(error)(f"{where}: {error}" if str(error) else where).with_traceback(error.__traceback__)

    def end(self, waiting: list[Thread]) -> None:
        """Let the threads end that wait for their turn, one after the other."""
        for thread in waiting:
            if thread.begun:
                thread.turn.release()
                self.phase_over.acquire()


class Aborted(Exception):
    """Another thread of the block failed."""


class Worker(threading.Thread):
    """A thread of Python that serves threads of blocks, launch after launch."""

    resting: list[Worker] = []  # noqa: RUF012 - shared by all

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.wake = locked()
        self.start()

    @classmethod
    def idle(cls) -> Worker:
        """One that rests, or a new one."""
        return cls.resting.pop() if cls.resting else cls()

    def begin(self, block: Block, thread: Thread) -> None:
        """Serve a thread that has not begun."""
        self.work = block, thread
        self.wake.release()

    def rest(self) -> None:
        """Be ready for other work; whoever gets the turn next may give it."""
        self.resting.append(self)

    def run(self) -> None:
        with np.errstate(all="ignore"):  # NumPy's scalars compute here; a GPU does not warn of an overflow
            while True:
                self.wake.acquire()
                block, thread = self.work
                block.serve(self, thread)
