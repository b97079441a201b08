"""The simulator that these tests run in: it computes what a GPU would, and shows where a kernel lacks a barrier."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba import cuda, types

from emalgam_kernels.numba_cuda import batch_memory
from emalgam_kernels.numba_cuda.batch_memory import begin_tile
from emalgam_kernels.numba_cuda.device import Kernel, flat
from tests.conftest import SIMULATED

pytestmark = pytest.mark.skipif(not SIMULATED, reason="only the simulator can be asked in which order threads run")
BLOCKS, THREADS = 2, 8


def mirrored(with_barrier: bool) -> np.ndarray:
    """What each block makes of 0, 1, 2, ...: its numbers the other way round."""

    @cuda.jit
    def kernel(x: Any, out: Any) -> None:
        shared = cuda.shared.array(THREADS, types.int64)
        n, i = cuda.grid(1), cuda.threadIdx.x
        shared[i] = x[n]
        if with_barrier:
            cuda.syncthreads()
        out[n] = shared[THREADS - 1 - i]

    out = np.empty(BLOCKS * THREADS, np.int64)
    kernel[BLOCKS, THREADS](np.arange(BLOCKS * THREADS), out)
    return out.reshape(BLOCKS, THREADS)


def test_threads_wait_at_a_barrier() -> None:
    np.testing.assert_array_equal(mirrored(True), np.arange(BLOCKS * THREADS).reshape(BLOCKS, THREADS)[:, ::-1])


def test_a_missing_barrier_shows() -> None:
    assert (mirrored(False) != mirrored(True)).any()


def test_both_orders_occur() -> None:
    """The last thread of the even blocks writes what stays, the first of the odd ones."""

    @cuda.jit
    def kernel(out: Any) -> None:
        out[2 * cuda.blockIdx.x] = cuda.threadIdx.x
        cuda.syncthreads()
        out[2 * cuda.blockIdx.x + 1] = cuda.threadIdx.x

    out = np.empty(2 * BLOCKS, np.int64)
    kernel[BLOCKS, THREADS](out)
    assert out.tolist() == [THREADS - 1, 0, 0, THREADS - 1]


def test_threads_that_end_early_hold_nobody_up() -> None:
    @cuda.jit
    def kernel(out: Any) -> None:
        i = cuda.threadIdx.x
        if i % 2 == 0:
            return
        cuda.syncthreads()
        out[i] = i

    out = np.zeros(THREADS, np.int64)
    kernel[1, THREADS](out)
    assert out.tolist() == [0, 1, 0, 3, 0, 5, 0, 7]


def test_an_error_says_where() -> None:
    @cuda.jit
    def kernel(out: Any) -> None:
        if cuda.threadIdx.x == 5:
            raise ValueError("wrong")
        cuda.syncthreads()
        out[cuda.threadIdx.x] = 1

    with pytest.raises(ValueError, match=r"tid=\[5, 0, 0\] ctaid=\[0, 0, 0\]: wrong"):
        kernel[1, THREADS](np.zeros(THREADS))


def test_an_error_ends_the_threads_that_wait() -> None:
    @cuda.jit
    def kernel(out: Any) -> None:
        cuda.syncthreads()
        if cuda.threadIdx.x == 5:
            raise ValueError("wrong")
        cuda.syncthreads()
        out[cuda.threadIdx.x] = 1

    out = np.zeros(THREADS)
    with pytest.raises(ValueError, match="wrong"):
        kernel[1, THREADS](out)
    assert not out.any()
    assert_all_rest()


def assert_all_rest() -> None:
    """No thread of Python is still in a kernel."""
    from tests.simulator import Worker

    assert {thread for thread in threading.enumerate() if isinstance(thread, Worker)} == set(Worker.resting)


def test_the_same_threads_of_python_serve_every_launch() -> None:
    @cuda.jit
    def kernel(out: Any) -> None:
        out[cuda.threadIdx.x] += 1
        cuda.syncthreads()
        out[cuda.threadIdx.x] += 1

    out = np.zeros(THREADS)
    kernel[BLOCKS, THREADS](out)
    before = threading.active_count()
    kernel[BLOCKS, THREADS](out)
    assert threading.active_count() == before
    assert (out == 4 * BLOCKS).all()
    assert_all_rest()


def test_functions_of_other_modules_know_the_thread() -> None:
    size = SimpleNamespace(D=1, T=BLOCKS * THREADS, P=4)

    def kernel(tile: Any) -> None:
        begin_tile(tile, size)

    tile = np.full(size.P * size.T, np.nan)
    Kernel("toy", "float64", kernel, (flat(types.float64),), THREADS).launch(1, THREADS, tile)
    np.testing.assert_array_equal(tile.reshape(size.P, size.T).T, [[np.nan, 1, 0, 0]] * size.T)
    assert batch_memory.cuda is cuda, "the simulator's stays"


def test_arguments_may_share_memory() -> None:
    """As on a GPU, and not each in a copy that is written back at the end."""

    @cuda.jit
    def kernel(x: Any, out: Any) -> None:
        i = cuda.threadIdx.x
        out[i] = x[i] + 1
        cuda.syncthreads()
        value = x[THREADS - 1 - i]
        cuda.syncthreads()
        out[i] = value

    shared = np.arange(THREADS)
    kernel[1, THREADS](shared, shared[:])
    np.testing.assert_array_equal(shared, np.arange(THREADS, 0, -1))


def test_overflow_is_silent_as_on_a_gpu() -> None:
    @cuda.jit
    def kernel(x: Any, out: Any) -> None:
        out[cuda.threadIdx.x] = x[0] * x[0]

    out = np.zeros(THREADS, np.float32)
    kernel[1, THREADS](np.full(1, 1e30, np.float32), out)
    assert np.isinf(out).all()
