"""The schedule of blocks: order, errors, threads, forks, and memory."""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import emalgam_kernels
from emalgam_kernels import blocks
from emalgam_kernels.blocks import Background, for_each_block, rows_per_block, sum_over_blocks, workspace
from tests.conftest import ALGORITHMS, COVARIANCE_TYPES, CPU_BACKENDS, need
from tests.kernels.problems import Problem, problem, random_mixture
from tests.processes import output_of, python

SECONDS = 60
every_number_of_threads = pytest.mark.parametrize("n_threads", [1, 2, 3, 7])


# ---- the grid


def test_rows_of_a_block_depend_on_the_work_in_a_row() -> None:
    assert rows_per_block(1, 3) == blocks.MOST_ROWS
    assert rows_per_block(10_000, 2000) == blocks.FEWEST_ROWS
    sizes = [rows_per_block(K, 153) for K in (8, 16, 32, 64, 128)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 512 == 0 for size in sizes)


@every_number_of_threads
@pytest.mark.parametrize("n_rows", [1, 99, 100, 101, 1000])
def test_blocks_cover_every_row_once(n_rows: int, n_threads: int) -> None:
    counts = np.zeros(n_rows, int)

    def block(start: int, stop: int) -> None:
        assert 0 < stop - start <= 100
        counts[start:stop] += 1

    for_each_block(block, n_rows, 100, n_threads)
    assert (counts == 1).all()


@pytest.mark.parametrize("n_threads", [0, 1, 5])
def test_no_rows_are_no_blocks(n_threads: int) -> None:
    calls: list[int] = []
    for_each_block(lambda start, stop: calls.append(start), 0, 100, n_threads)
    out = np.ones(3)
    assert sum_over_blocks(lambda start, stop, partial: calls.append(start) or 1.0, 0, 100, out, n_threads) == 0.0
    assert calls == []
    assert (out == 0).all()


# ---- sums


@every_number_of_threads
def test_partial_sums_are_added_in_the_order_of_the_blocks(n_threads: int) -> None:
    """Numbers whose sum depends on the order."""
    terms = np.random.default_rng(0).normal(size=200) * 10.0 ** np.random.default_rng(1).integers(-8, 8, 200)

    def block(start: int, stop: int, partial: np.ndarray) -> float:
        assert (partial == 0).all()
        partial += terms[start]
        return float(terms[start])

    expected = 0.0
    for term in terms:
        expected += term
    assert expected != float(terms[::-1].cumsum()[-1]), "these terms do not test the order"
    out = np.full((2, 3), np.nan)
    for _ in range(5):
        assert sum_over_blocks(block, len(terms), 1, out, n_threads) == expected
        assert (out == expected).all()


def test_a_block_that_ends_last_is_still_added_first() -> None:
    """Block 0 returns only after block 3 has: a sum in the order of completion would be another."""
    third_is_done = threading.Event()
    terms = [1.0, 1e16, -1e16, 1.0]

    def block(start: int, stop: int, partial: np.ndarray) -> float:
        if start == 0:
            assert third_is_done.wait(SECONDS)
        if start == 3:
            third_is_done.set()
        partial += terms[start]
        return terms[start]

    out = np.empty(1)
    assert sum_over_blocks(block, 4, 1, out, 2) == sum(terms) == 1.0
    assert out[0] == 1.0


def test_memory_is_bounded_when_one_block_takes_long() -> None:
    """The other thread may not fill memory with partial sums that wait for block 0."""
    n_threads, started, far_ahead = 2, [], threading.Event()
    most = blocks.BLOCKS_AHEAD * n_threads

    def block(start: int, stop: int, partial: np.ndarray) -> float:
        started.append(start)
        if start == 0:
            # Every block that may start before this one ends does; then the other thread has to wait.
            assert far_ahead.wait(SECONDS)
            assert max(started) < most
        if start == most - 1:
            far_ahead.set()
        return 1.0

    assert sum_over_blocks(block, 1000, 1, np.empty(1), n_threads) == 1000.0
    assert len(started) == 1000


def test_partial_sums_are_contiguous_whatever_out_is() -> None:
    def block(start: int, stop: int, partial: np.ndarray) -> float:
        assert partial.flags.c_contiguous
        assert partial.dtype == np.float64
        return 0.0

    for out in (np.empty((3, 4)).T, np.empty((6, 8))[::2, ::-2]):
        sum_over_blocks(block, 10, 1, out, 1)


# ---- errors


@every_number_of_threads
@pytest.mark.parametrize("failing", [0, 7, 99])
def test_an_error_in_a_block_is_raised(n_threads: int, failing: int) -> None:
    def block(start: int, stop: int, *partial: np.ndarray) -> float:
        if start == failing:
            raise RuntimeError(f"block {start}")
        return 0.0

    with pytest.raises(RuntimeError, match=f"block {failing}"):
        for_each_block(block, 100, 1, n_threads)
    with pytest.raises(RuntimeError, match=f"block {failing}"):
        sum_over_blocks(block, 100, 1, np.empty(1), n_threads)


def test_an_error_ends_the_other_threads() -> None:
    """Both threads are in a block when each fails: one of the errors is raised, and no other block starts."""
    both, started = threading.Barrier(2), []

    def block(start: int, stop: int) -> None:
        started.append(start)
        both.wait(SECONDS)
        raise RuntimeError(f"block {start}")

    with pytest.raises(RuntimeError, match=r"block [01]"):
        for_each_block(block, 1000, 1, 2)
    assert sorted(started) == [0, 1]


def test_threads_that_wait_for_a_failed_block_end() -> None:
    """Block 0 fails when the other thread waits for it: nothing may hang, and the error is that of block 0."""
    far_ahead = threading.Event()

    def block(start: int, stop: int, partial: np.ndarray) -> float:
        if start == 0:
            assert far_ahead.wait(SECONDS)
            raise RuntimeError("block 0")
        if start == blocks.BLOCKS_AHEAD * 2 - 1:
            far_ahead.set()
        return 1.0

    with pytest.raises(RuntimeError, match="block 0"):
        sum_over_blocks(block, 1000, 1, np.empty(1), 2)


@every_number_of_threads
def test_threads_work_after_an_error(n_threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        for_each_block(lambda start, stop: 1 / 0, 100, 1, n_threads)
    assert sum_over_blocks(lambda start, stop, partial: 1.0, 100, 1, np.empty(1), n_threads) == 100.0


def test_an_interrupt_ends_the_call() -> None:
    """Ctrl-C at a thousand moments: KeyboardInterrupt each time, never a hang, and the threads are free again."""
    program = """
import _thread, numpy as np
from emalgam_kernels.blocks import sum_over_blocks
def block(start, stop, partial):
    if start == moment:
        _thread.interrupt_main()
    return 1.0
interrupted = 0
for moment in range(1000):
    n_threads = 1 + moment % 4
    try:
        while True:
            sum_over_blocks(block, 1000, 1, np.empty(1), n_threads)
    except KeyboardInterrupt:
        interrupted += 1
    assert sum_over_blocks(lambda *_: 1.0, 10, 1, np.empty(1), n_threads) == 10
print(interrupted)
"""
    assert output_of(program) == "1000"


INTERRUPTED_CALLS = """
from emalgam_kernels.blocks import for_each_block
from tests.interrupts import assert_threads_are_idle, interrupt_at_random

def calls():
    for _ in range(10):
        for_each_block(lambda start, stop: None, 8, 1, 3)

interrupt_at_random(calls, 1000)
assert_threads_are_idle()
print("done")
"""


def test_interrupts_at_any_moment_lose_no_thread() -> None:
    """A thread that was taken, and given no task, would wait for one for ever."""
    assert output_of(INTERRUPTED_CALLS, folder=Path(__file__).parents[2]) == "done"


# ---- tasks in the background


def test_a_task_whose_start_was_interrupted_never_begins() -> None:
    called: list[int] = []
    task = Background(lambda: called.append(0))
    task.wait()
    task.wait()  # an interrupt may have made the first one uncertain
    task._run()  # its thread gets to it late
    assert called == []


def test_a_task_does_not_wait_for_itself() -> None:
    """Its thread may be the one that collects what holds it."""
    waited: list[bool] = []

    def run() -> None:
        task.wait()
        waited.append(True)

    task = Background(run)
    task.start()
    task.wait()
    assert waited == [True]


HELD_TO_THE_END = """
import os, threading, numpy
from emalgam_kernels.blocks import Background

class Holder:
    def __init__(self):
        gate = threading.Lock()
        gate.acquire()
        self.task = Background(gate.acquire)
        self.task.start()

    def __del__(self, write=os.write):
        self.task.wait()
        write(1, b"waited")

numpy.holder = Holder()
"""


def test_the_end_of_the_interpreter_waits_for_no_task() -> None:
    """A module that lives longer than this package holds one that never ends."""
    finished = python("-c", HELD_TO_THE_END)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "waited", "")


def test_a_thread_ends_with_its_worker() -> None:
    worker, ended = blocks._Worker(), threading.Event()
    orders = weakref.ref(worker.orders, lambda _: ended.set())
    del worker
    assert ended.wait(SECONDS), "the thread still waits for orders"
    assert orders() is None


# ---- threads


def test_default_threads_are_those_of_this_process() -> None:
    assert blocks.default_threads() == len(os.sched_getaffinity(0))


def test_many_python_threads_at_once(backend: str) -> None:
    """Each with a problem, a number of threads and a workspace of its own."""
    kernels = emalgam_kernels.load(backend)
    cases = [
        (problem(covariance_type, "float64", algorithm, size), 1 + index % 3)
        for index, (covariance_type, algorithm, size) in enumerate(
            (covariance_type, algorithm, size)
            for covariance_type in ("full", "diag")
            for algorithm in ("packed", "direct")
            for size in ("one row", "odd sizes", "features in pieces", "a block and a row")
        )
    ]

    def results(case: int, n_threads: int) -> tuple[np.ndarray, np.ndarray, float]:
        given, parameters = cases[case][0], cases[case][0].parameters("float64")
        out = np.empty(len(given.x))
        statistics = np.empty((parameters.n_components, parameters.n_statistics))
        kernels.log_prob(given.x, parameters, out, n_threads)
        return out, statistics, kernels.em_statistics(given.x, None, parameters, statistics, False, n_threads)

    expected = [results(case, 1) for case in range(len(cases))]
    order = np.random.default_rng(0).integers(0, len(cases), 48)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: results(int(case), cases[case][1]), order))
    for case, result in zip(order, found, strict=True):
        np.testing.assert_array_equal(result[0], expected[case][0])
        np.testing.assert_array_equal(result[1], expected[case][1])
        assert result[2] == expected[case][2]


FORK = """
import os, sys, numpy as np, emalgam_kernels
from emalgam_kernels import Packed
kernels = emalgam_kernels.load("{backend}")
x = np.random.default_rng(0).normal(size=(200_000, 2))
parameters = Packed("diag", np.zeros(2), np.ones(2), None, np.random.default_rng(1).normal(-1, 0.1, (3, 5)))
def statistics():
    out = np.empty((3, 5))
    return out, kernels.em_statistics(x, None, parameters, out, False, 2)
expected, total = statistics()
child = os.fork()
if child == 0:
    out, total_of_child = statistics()
    same = (out == expected).all() and total == total_of_child
    {leave}
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
out, _ = statistics()
assert (out == expected).all()
print("done")
"""


@pytest.mark.parametrize("leave", ["os._exit(0 if same else 1)", "sys.exit(0 if same else 1)"])
def test_a_fork_after_a_threaded_call(backend: str, leave: str) -> None:
    assert output_of(FORK.format(backend=backend, leave=leave)) == "done"


# ---- memory of a thread


def test_workspace_grows_and_is_kept() -> None:
    def sizes() -> list[int]:
        first = workspace(1000)
        assert workspace(500) is first
        larger = workspace(5000)
        assert workspace(5000) is larger
        assert workspace(10) is larger
        return [first.size, larger.size]

    with ThreadPoolExecutor(1) as fresh_thread:
        assert fresh_thread.submit(sizes).result() == [1000, 5000]


def test_workspaces_of_threads_are_their_own() -> None:
    both = threading.Barrier(2)

    def address(_: int) -> int:
        memory = workspace(1000)
        both.wait(SECONDS)
        return memory.ctypes.data

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(address, range(2)))) == 2


def assert_workspace_is_large_enough(kernels: ModuleType, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries behind the workspace: its size is computed in one place and used in another."""
    given: list[tuple[np.ndarray, int]] = []

    def guarded_workspace(n_bytes: int) -> np.ndarray:
        memory = np.full(n_bytes + 4096, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64 + 16  # the worst alignment that malloc gives
        given.append((memory, start + n_bytes))
        return memory[start : start + n_bytes]

    assert kernels.workspace is workspace
    monkeypatch.setattr(kernels, "workspace", guarded_workspace)
    rng = np.random.default_rng(0)
    for covariance_type, algorithm in product(COVARIANCE_TYPES, ALGORITHMS):
        for D, K in product((1, 2, 3, 5, 8, 9, 13, 17), (1, 2, 3, 5, 8)):
            mixture, x = random_mixture(rng, K, D, covariance_type), rng.normal(size=(40, D))
            parameters = Problem(x, mixture, algorithm).parameters(arithmetic)
            given.clear()
            kernels.em_statistics(x, None, parameters, np.empty((K, parameters.n_statistics)))
            assert given, "the kernel has its memory from elsewhere"
            for memory, end in given:
                behind = np.flatnonzero(memory[end:] != 0xA5)
                what = f"{covariance_type}, {algorithm}, D = {D}, K = {K}"
                assert len(behind) == 0, f"{what}: {behind[-1] + 1} bytes behind the workspace were written"


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
@pytest.mark.parametrize("name", [name for name in CPU_BACKENDS if name != "reference"])
def test_workspace_is_large_enough(name: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name)
    assert_workspace_is_large_enough(emalgam_kernels.load(name), arithmetic, monkeypatch)


def test_a_small_problem_after_a_large_one(backend: str) -> None:
    """What the large one left in the workspace must not be read."""
    kernels = emalgam_kernels.load(backend)
    large, small = (problem("full", "float64", "packed", size) for size in ("features in pieces", "one feature"))
    parameters = small.parameters("float64")

    def statistics() -> np.ndarray:
        out = np.empty((parameters.n_components, parameters.n_statistics))
        kernels.em_statistics(small.x, None, parameters, out)
        return out

    with ThreadPoolExecutor(1) as fresh_thread:
        expected = fresh_thread.submit(statistics).result()
    out = np.empty(len(large.x))
    for arithmetic in ("float64", "float32"):
        kernels.log_prob(large.x * np.nan, large.parameters(arithmetic), out)
    np.testing.assert_array_equal(statistics(), expected)
