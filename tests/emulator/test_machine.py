"""The emulated GPU: it runs blocks as a GPU does, and ends a launch that leaves something to chance."""

from __future__ import annotations

import re
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba import cuda

from bench.cuda_resources import ARCHITECTURES, compiled, compiling_for
from emalgam_kernels.numba_cuda import fused
from emalgam_kernels.numba_cuda.device import Kernel, flat, view
from tests.emulator.machine import ARCHITECTURE, SHARED_BYTES, STACK_BYTES, Array, Fault, built, launch, load

THREADS = 64
int64, float32, float64 = numba.types.int64, numba.types.float32, numba.types.float64


def run(function: Any, blocks: Any, *arrays: torch.Tensor, threads: Any = THREADS, shared_bytes: int = 0) -> None:
    kinds = [flat(getattr(numba.types, str(each.dtype).removeprefix("torch."))) for each in arrays]
    kernel = Kernel("toy", "float64", function, tuple(kinds), int(np.prod(threads)))
    launch(kernel, blocks, threads, *map(view, arrays), shared_bytes=shared_bytes)


def mirrored(x: Any, out: Any) -> None:
    shared = cuda.shared.array(THREADS, float32)
    n, i = cuda.grid(1), cuda.threadIdx.x
    shared[i] = x[n]
    cuda.syncthreads()
    out[n] = shared[THREADS - 1 - i]


def test_threads_wait_at_a_barrier() -> None:
    x, out = torch.arange(3.0 * THREADS), torch.zeros(3 * THREADS)
    run(mirrored, 3, x, out)
    assert out.reshape(3, -1).equal(x.reshape(3, -1).flip(1))


def test_blocks_and_threads_have_three_dimensions() -> None:
    def where(out: Any) -> None:
        n = (cuda.blockIdx.z * cuda.gridDim.y + cuda.blockIdx.y) * cuda.gridDim.x + cuda.blockIdx.x
        i = (cuda.threadIdx.z * cuda.blockDim.y + cuda.threadIdx.y) * cuda.blockDim.x + cuda.threadIdx.x
        out[24 * n + i] = n + 100 * i

    out = torch.full((6 * 24,), -1)
    run(where, (3, 2), out, threads=(2, 3, 4))
    n, i = np.divmod(np.arange(6 * 24), 24)
    np.testing.assert_array_equal(out.numpy(), n + 100 * i)


def test_float32_stays_float32() -> None:
    """The simulator computes `x * 0.1` in float32; the compiler makes a float64 of it, and so does the emulator."""

    def scaled(x: Any, out: Any) -> None:
        out[cuda.grid(1)] = x[cuda.grid(1)] * 0.1

    x, out = torch.rand(THREADS, generator=torch.manual_seed(0)), torch.zeros(THREADS, dtype=torch.float64)
    run(scaled, 1, x, out)
    assert out.equal(x.double() * 0.1)


def test_what_blocks_leave_in_the_arrays_stays() -> None:
    """Within a block through a barrier; arguments may share memory."""

    def shifted(x: Any, out: Any) -> None:
        i = cuda.threadIdx.x
        value = x[(i + 1) % THREADS]
        cuda.syncthreads()
        out[i] = value

    x = torch.arange(float(THREADS))
    run(shifted, 1, x, x[:])
    assert x.equal(torch.arange(float(THREADS)).roll(-1))


# ---- what is left to chance


def without_barrier(x: Any, out: Any) -> None:
    shared = cuda.shared.array(THREADS, float32)
    n, i = cuda.grid(1), cuda.threadIdx.x
    shared[i] = x[n]
    out[n] = shared[i ^ 1]


def read_first(x: Any, out: Any) -> None:
    shared = cuda.shared.array(THREADS, float32)
    n, i = cuda.grid(1), cuda.threadIdx.x
    shared[i] = x[n]
    cuda.syncthreads()
    out[n] = shared[(i + 1) % THREADS]
    shared[i] = x[n]


def written_twice(x: Any, out: Any) -> None:
    shared = cuda.shared.array(THREADS, float32)
    n, i = cuda.grid(1), cuda.threadIdx.x
    shared[i // 2] = x[n]
    cuda.syncthreads()
    out[n] = shared[i // 2]


def half_written(x: Any, out: Any) -> None:
    shared = cuda.shared.array(THREADS, float32)
    n, i = cuda.grid(1), cuda.threadIdx.x
    if i < THREADS // 2:
        shared[i] = x[n]
    cuda.syncthreads()
    out[n] = shared[i]


def blocks_write_the_same(x: Any, out: Any) -> None:
    out[cuda.threadIdx.x] = x[cuda.grid(1)]


def blocks_read_what_others_write(x: Any, out: Any) -> None:
    n, size = cuda.grid(1), 3 * THREADS
    out[n] = out[(n + THREADS) % size] + x[n]


def behind_the_end(x: Any, out: Any) -> None:
    n = cuda.grid(1)
    out[n] = x[n + 1]


def two_barriers(x: Any, out: Any) -> None:
    n, i = cuda.grid(1), cuda.threadIdx.x
    if i < 32:
        cuda.syncthreads()
        out[n] = x[n]
    else:
        out[n] = x[n] + float32(1)
        cuda.syncthreads()
        out[n] *= float32(2)


def half_ended(x: Any, out: Any) -> None:
    n = cuda.grid(1)
    if cuda.threadIdx.x % 2 == 0:
        return
    cuda.syncthreads()
    out[n] = x[n]


def unequal_turns(x: Any, out: Any) -> None:
    for n in range(cuda.threadIdx.x, 96, THREADS):
        out[n] = x[n]
        cuda.syncthreads()


CONSTANTS = np.arange(8.0)


def behind_the_constants(x: Any, out: Any) -> None:
    numbers, n = cuda.const.array_like(CONSTANTS), cuda.grid(1)
    out[n] = numbers[cuda.threadIdx.x]


FAULTS = {
    without_barrier: r"thread 0 of block 0 reads what no thread of its block has written, byte 4 of shared memory",
    read_first: r"thread 1 of block 0 writes what thread 0 reads, unordered, byte 4 of shared memory",
    written_twice: r"thread 1 of block 0 writes what thread 0 writes, unordered, byte 0 of shared memory",
    half_written: r"thread 32 of block 0 reads what no thread of its block has written, byte 128 of shared memory",
    blocks_write_the_same: r"thread 0 of block 1 writes what thread 0 of block 0 writes, unordered, byte 0 of an array",
    blocks_read_what_others_write: r"thread 0 of block 1 writes what thread 0 of block 0 reads, unordered, byte 256 of",
    behind_the_end: r"thread 63 of block 2 reads outside all arrays, byte 768 of an array of 768",
    two_barriers: r"thread 32 of block 0 waits at another barrier than thread 0 \(",
    half_ended: r"thread 1 of block 0 waits at a barrier for thread 0, which has ended \(",
    unequal_turns: r"thread 0 of block \d waits at a barrier for thread 32, which has ended \(",
    behind_the_constants: r"thread 8 of block 0 reads outside all arrays, among the constants \(",
}


@pytest.mark.parametrize("function", FAULTS, ids=lambda function: function.__name__)
def test_fault(function: Any) -> None:
    with pytest.raises(Fault, match=rf"toy: {FAULTS[function]}.*PTX line \d+: .*;.*\)"):
        run(function, 3, torch.ones(3 * THREADS), torch.zeros(3 * THREADS))


def test_a_race_of_a_thread_that_ran_before() -> None:
    """Whatever the order in which threads run: here the reading one comes first, and would get the right number."""

    def backwards(x: Any, out: Any) -> None:
        i = cuda.threadIdx.x
        if i == 1:
            x[0] = 7.0
        if i == 0:
            out[0] = x[0]

    with pytest.raises(
        Fault, match="thread 1 of block 0 writes what thread 0 reads, unordered, byte 0 of an array of 8"
    ):
        run(backwards, 1, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def test_a_fault_ends_that_launch_alone() -> None:
    x, out = torch.arange(3.0 * THREADS), torch.zeros(3 * THREADS)
    with pytest.raises(Fault, match="reads outside"):
        run(behind_the_end, 3, x, out)
    run(behind_the_end, 2, x, out)
    assert out[: 2 * THREADS].equal(x[1 : 2 * THREADS + 1])


def test_neighbouring_bytes_are_no_race() -> None:
    def flags(out: Any) -> None:
        shared = cuda.shared.array(THREADS, numba.types.uint8)
        shared[cuda.threadIdx.x] = cuda.threadIdx.x
        out[cuda.grid(1)] = shared[cuda.threadIdx.x]

    out = torch.zeros(2 * THREADS, dtype=torch.uint8)
    run(flags, 2, out)
    assert out.tolist() == 2 * list(range(THREADS))


def test_launches_that_cuda_refuses() -> None:
    x = torch.zeros(THREADS)
    kernel = Kernel("toy", "float32", mirrored, (flat(float32),) * 2, THREADS)
    with pytest.raises(Fault, match=r"toy: a block of \(65, 1, 1\) threads, it was compiled for 64"):
        launch(kernel, 1, 65, view(x), view(x))
    with pytest.raises(Fault, match=rf"toy: {SHARED_BYTES + 256} bytes of shared memory, there are {SHARED_BYTES}"):
        launch(kernel, 1, THREADS, view(x), view(x), shared_bytes=SHARED_BYTES)
    with pytest.raises(Fault, match=r"a grid or block of \(0, 1, 1\)"):
        launch(kernel, 0, THREADS, view(x), view(x))


# ---- a kernel of the library


def test_each_barrier_of_a_kernel_is_needed() -> None:
    """The sum of the fused kernel's blocks with one barrier taken out of its PTX."""
    (kernel,) = (each for each in fused.kernels() if each.name == "sum of the blocks of fused, float32")
    with compiling_for(ARCHITECTURES[ARCHITECTURE]):
        ptx = compiled(kernel, ARCHITECTURE, "ptx")
    barriers = [found.span() for found in re.finditer(r"bar\.sync\s+0;", ptx)]
    assert barriers
    launched(ptx)
    for start, end in barriers:
        with pytest.raises(Fault, match=r"sum: .*(unordered|no thread of its block has written)"):
            launched(ptx[:start] + ptx[end:])


def launched(ptx: str) -> None:
    """Ten rows of forty sums."""
    rows, outputs = 10, 40
    partial = torch.rand(rows * outputs, generator=torch.manual_seed(0))
    statistics, total = torch.zeros(outputs - 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    tensors = partial, statistics, total
    words = [int(word).to_bytes(8, "little") for each in tensors for word in view(each).words]
    arrays = [Array(each.data_ptr(), each.numel() * each.element_size(), each.element_size()) for each in tensors]
    words += [number.to_bytes(8, "little") for number in (rows, outputs)]
    across, down = fused.REDUCTION_BLOCK
    load(ptx, "sum").launch(-(-outputs // across), (across, down), words, arrays)
    expected = partial.double().reshape(rows, outputs).sum(0)
    torch.testing.assert_close(torch.cat([statistics, total]), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("statements", "fault"),
    [("nothing;", "undeclared"), (f"volatile char much[{STACK_BYTES}]; much[0] = 1;", "frame")],
)
def test_c_that_does_not_compile_is_an_error(statements: str, fault: str) -> None:
    """Nor does a kernel that would write past its stack."""
    with pytest.raises(RuntimeError, match=rf"could not compile a kernel's C:[\s\S]*{fault}"):
        built(f"static void kernel(const uint64_t *parameters) {{ {statements} }}")
