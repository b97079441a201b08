"""The compile gate sees what it is for: kernels that spill, need a stack, or compute in the wrong type.

NVIDIA's compiler runs, on kernels made for these tests; no GPU is needed. Not in the simulator, which compiles nothing.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from cuda.core.utils import StridedMemoryView
from numba import cuda
from numba.cuda import codegen, dispatcher

from bench import cuda_resources
from bench.cuda_resources import ARCHITECTURES, Resources, differences, measure, render, violations
from emalgam_kernels.numba_cuda import device, fused
from emalgam_kernels.numba_cuda.device import Kernel, allow_shared_bytes, ascending, at, divided, flat, view
from emalgam_kernels.numba_cuda.fused import plan
from emalgam_kernels.numba_cuda.kl_kernels import factor_kernel

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
float32, float64 = numba.types.float32, numba.types.float64


def kernel(function: Callable[..., None], name: str = "toy", real: Any = float32, threads: int = 64) -> Kernel:
    """A kernel of two arrays of the type it computes in."""
    return Kernel(name, str(real), function, (flat(real), flat(real)), threads)


def reversed_sums(x: Any, out: Any) -> None:
    """A block writes the sum of each element and its mirror image."""
    shared = cuda.shared.array(64, float32)
    n, i = cuda.grid(1), cuda.threadIdx.x
    shared[at(i)] = x[at(n)]
    cuda.syncthreads()
    out[at(n)] = shared[at(i)] + shared[at(63 - i)]


def scaled(x: Any, out: Any) -> None:
    """The literal is float64, and one tenth is not a float32."""
    n = cuda.grid(1)
    out[at(n)] = x[at(n)] * 0.1


def shuffled(x: Any, out: Any) -> None:
    """An array of its own that is read at places known only at run time cannot be in registers."""
    n, own = cuda.grid(1), cuda.local.array(32, float32)
    for i in ascending(32):
        own[i] = x[at(n + i)]
    for i in ascending(32):
        out[at(n + i)] = own[at(x[at(n + i)])]


def many_sums(x: Any, out: Any) -> None:
    """A hundred sums at once, written at the end: more than the registers of a thread in a block of 1024."""
    n, sums = cuda.grid(1), cuda.local.array(100, float32)
    for i in ascending(100):
        sums[i] = float32(0)
    for row in ascending(out.size):
        for i in ascending(100):
            sums[i] += x[at(row)] * x[at(row + i)]
    for i in ascending(100):
        out[at(n + i)] = sums[i]


@cuda.jit(device=True)
def squared(value: Any) -> Any:
    return value * value


def squares(x: Any, out: Any) -> None:
    n = cuda.grid(1)
    out[at(n)] = squared(x[at(n)])


def strided_sum(x: Any, out: Any) -> None:
    """Each thread sums every so manieth element, and writes the sum as often as rows of ten allow."""
    n, step, total = cuda.grid(1), cuda.gridsize(1), float32(0)
    for i in ascending(n, x.size, step):
        total += x[at(i)]
    row, column = divided(n, 10)
    out[at(row)] = out[at(column)] = total


def python_range(x: Any, out: Any) -> None:
    n, step, total = cuda.grid(1), cuda.gridsize(1), float32(0)
    for i in range(n, x.size, step):
        total += x[at(i)]
    out[at(n)] = total


def python_index(x: Any, out: Any) -> None:
    n = cuda.grid(1)
    out[at(n)] = x[n - out.size]


def python_division(x: Any, out: Any) -> None:
    out[at(cuda.grid(1) // x.size)] = x[at(0)]


def sliced(x: Any, out: Any) -> None:
    out[cuda.grid(1) - x.size :][at(0)] = x[at(0)]


@every_architecture
def test_a_good_kernel(architecture: str) -> None:
    found = measure(kernel(reversed_sums), architecture)
    assert violations(found) == []
    assert found.shared_bytes == 256
    assert 0 < found.registers <= 32
    assert found.blocks == 32  # of two warps each
    assert found.float64 == 0


@every_architecture
def test_float64_in_a_float32_kernel(architecture: str) -> None:
    found = measure(kernel(scaled), architecture)
    (fault,) = violations(found)
    assert re.fullmatch(rf"toy \({architecture}\) computes in float32 and mentions float64 \d+ times in its PTX", fault)
    assert violations(measure(kernel(scaled, real=float64), architecture)) == []


@every_architecture
def test_stack(architecture: str) -> None:
    found = measure(kernel(shuffled), architecture)
    assert violations(found) == [f"toy ({architecture}) has a stack of 128 bytes"]
    assert found.local > 0


@every_architecture
def test_spills(architecture: str) -> None:
    faults = violations(measure(kernel(many_sums, threads=1024), architecture))
    assert [fault for fault in faults if re.fullmatch(rf"toy \({architecture}\) spills \d+ bytes", fault)], faults


@pytest.mark.parametrize(("function", "allows"), [
    (strided_sum, False), (sliced, False), (python_range, True), (python_index, True), (python_division, True),
])  # fmt: skip
@every_architecture
def test_signs(function: Callable[..., None], allows: bool, architecture: str) -> None:
    found = measure(kernel(function), architecture)
    expected = [f"toy ({architecture}) allows for negative integers {found.signs} times in its PTX"]
    assert violations(found) == (expected if allows else [])


@pytest.mark.parametrize("bounds", [(5,), (0,), (-3,), (2, 7), (7, 2), (1, 10, 3), (0, 9, 3), (-4, 3, 2), (3, 3, 1)])
def test_ascending_counts_as_range(bounds: tuple[int, ...]) -> None:
    """All bounds are known, so what the kernel writes is in its PTX."""
    start, stop, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]

    def of_a_stop(out: Any) -> None:
        value = 1
        for i in ascending(stop):
            value = 31 * value + i
        out[at(0)] = value

    def from_a_start(out: Any) -> None:
        value = 1
        for i in ascending(start, stop):
            value = 31 * value + i
        out[at(0)] = value

    def in_steps(out: Any) -> None:
        value = 1
        for i in ascending(start, stop, step):
            value = 31 * value + i
        out[at(0)] = value

    expected = reduce(lambda value, i: 31 * value + i, range(*bounds), 1)
    assert stored((of_a_stop, from_a_start, in_steps)[len(bounds) - 1]) == expected


@pytest.mark.parametrize(("a", "b"), [(17, 5), (0, 3), (9, 3), (2, 7), (2**32 - 1, 1), (2**32 - 1, 2**16)])
def test_divided_is_divmod(a: int, b: int) -> None:
    def both(out: Any) -> None:
        quotient, remainder = divided(a, b)
        out[at(0)] = quotient * 2**17 + remainder

    assert stored(both) == a // b * 2**17 + a % b


def stored(function: Callable[[Any], None]) -> int:
    """What a kernel without inputs, which the compiler has run, stores: one int64."""
    constant = Kernel("constant", "float64", function, (flat(numba.types.int64),), 64)
    with cuda_resources.compiling_for(ARCHITECTURES["sm_90"]):
        ptx = cuda_resources.compiled(constant, "sm_90", "ptx")
    ((register,),) = [re.findall(r"st\.global\.u64\s+\[%\w+\], (%\w+);", ptx)]
    (value,) = re.findall(rf"mov\.u64\s+{register}, (-?\d+);", ptx)
    return int(value)


def test_device_functions_need_no_gpu() -> None:
    for architecture in ARCHITECTURES:
        found = measure(kernel(squares), architecture)
        assert violations(found) == []
        assert found.registers <= 32, "the function was not inlined"


@every_architecture
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_products_whose_rounding_is_taken_apart(arithmetic: str, architecture: str) -> None:
    """The factorisation needs each product rounded by itself: no mul that ptxas could join with a sum, but an fma."""
    factors = factor_kernel(arithmetic, in_shared=True)
    with cuda_resources.compiling_for(ARCHITECTURES[architecture]):
        ptx = cuda_resources.compiled(factors, architecture, "ptx")
    products = re.findall(r"fma\.rn\.f\d\d\s+(%\w+), (%\w+), (%\w+), 0[fd]0+;", ptx)
    assert products, "none"
    for product, m, n in products:
        assert not re.search(rf"mul\S*\.f\d\d\s+%\w+, ({m}, {n}|{n}, {m});", ptx), f"{m} {n} is a mul too"
        negative = re.search(rf"neg\.f\d\d\s+(%\w+), {product};", ptx)
        assert negative, f"{product} is not subtracted from the exact product"
        assert re.search(rf"fma\.rn\.f\d\d\s+%\w+, {m}, {n}, {negative[1]};", ptx)


def test_more_registers_than_a_multiprocessor_has() -> None:
    found = Resources("toy", "float32", 1024, "sm_90", 65, 0, 0, 0, 0, 0, 0)
    assert violations(found) == ["toy (sm_90) cannot be launched: 1024 threads of 65 registers are too many"]
    assert [replace(found, registers=r).blocks for r in (64, 33, 32, 10)] == [1, 1, 2, 2]
    assert [replace(found, threads=256, registers=r).blocks for r in (128, 80, 64, 255)] == [2, 3, 4, 1]


@pytest.mark.parametrize("kilobytes", [163, 227])
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_a_hundred_statistics_of_a_hundred_components_fit_the_fused_kernel(arithmetic: str, kilobytes: int) -> None:
    for D, F in ((98, 100), (49, 99), (12, 91)):
        assert plan(D, 100, F, arithmetic, False, kilobytes * 1024) is not None
    (row,) = (row for row in cuda_resources.reach() if row[:5] == ["spherical", "98", "100", "100", arithmetic])
    assert "no" not in row[6:]


def test_two_blocks_of_a_multiprocessor_come_before_larger_tiles() -> None:
    """K = 16 components of F = 128 statistics in float64: registers leave room for two blocks of 128 threads."""
    found = {kilobytes: plan(126, 16, 128, "float64", False, kilobytes * 1024) for kilobytes in (48, 99, 163, 227)}
    assert {kilobytes: way and (way.tile.T, way.blocks) for kilobytes, way in found.items()} == {
        48: None,
        99: (64, 1),
        163: (32, 2),
        227: (64, 2),
    }


def test_registers_leave_room_for_the_blocks_that_plans_count_on() -> None:
    """Twice the threads where a plan with few of them has two blocks or four."""
    for kernel in fused.kernels():
        found = measure(kernel, "sm_80")
        assert found.blocks >= kernel.blocks, kernel.name


def test_shared_memory_is_allowed_as_the_driver_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attribute, its value, the kernel and the device, in the order of `cuKernelSetAttribute`."""
    from cuda.bindings import driver as binding
    from numba.cuda.cudadrv import driver

    allowed: list[Any] = []
    monkeypatch.setattr(driver, "driver", SimpleNamespace(cuKernelSetAttribute=lambda *given: allowed.append(given)))
    function = SimpleNamespace(attrs=SimpleNamespace(shared=1000), handle="kernel", device=SimpleNamespace(id=1))
    allow_shared_bytes(function, 163 * 1024)
    attribute = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert allowed == [(attribute, 163 * 1024 - 1000, "kernel", 1)]
    assert callable(binding.cuKernelSetAttribute)


def example(kind: Any, of_numba: bool) -> Any:
    """An argument of one of Numba's types, as Numba's launch takes it or as ours does."""
    if isinstance(kind, numba.types.Array):
        array = ARRAYS[str(kind.dtype)]
        return StridedMemoryView.from_dlpack(array, stream_ptr=-1) if of_numba else view(array)
    if isinstance(kind, numba.types.BaseTuple):
        fields = (example(each, of_numba) for each in kind)
        return getattr(kind, "instance_class", tuple)(*fields)
    return int(np.random.default_rng(len(str(kind))).integers(100))


def plain(word: Any) -> tuple[Any, int]:
    """Value and bytes of a word; Python's integers are as long as a pointer."""
    return (word, 8) if isinstance(word, int) else (word.value, ctypes.sizeof(word))


DTYPES = ("float32", "float64", "int32", "int64", "uint8")
ARRAYS = {name: torch.zeros(3, dtype=getattr(torch, name)) for name in DTYPES}


@pytest.mark.parametrize("kernel", cuda_resources.kernels_of_the_library(), ids=lambda kernel: kernel.name)
def test_arguments_are_what_numba_makes_of_them(kernel: Kernel) -> None:
    """Arrays in main memory, whose addresses tell as much."""
    expected: list[Any] = []
    numbas = dispatcher._Kernel.__new__(dispatcher._Kernel)
    numbas.extensions = []
    for kind in kernel.signature:
        numbas._prepare_args(kind, example(kind, of_numba=True), 0, [], expected)
    found = kernel.words(*(example(kind, of_numba=False) for kind in kernel.signature))
    assert [plain(word) for word in found] == [plain(word) for word in expected]
    with pytest.raises(ValueError, match="shorter"):
        kernel.words()


def test_an_argument_that_no_kernel_takes() -> None:
    with pytest.raises(TypeError, match="expected flat arrays, numbers, and NamedTuples of numbers"):
        replace(kernel(reversed_sums), signature=(float32[:, :],)).words(None)


def test_what_numba_compiled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one signature; only loading it needs a GPU."""
    context = SimpleNamespace(device=SimpleNamespace(compute_capability=(9, 0)))
    monkeypatch.setattr(codegen.devices, "get_context", lambda: context)
    monkeypatch.setattr(dispatcher._Kernel, "bind", lambda _: None)
    with cuda_resources.compiling_for((9, 0)):
        library = kernel(reversed_sums)._library
    assert isinstance(library, codegen.CUDACodeLibrary)
    assert "reversed_sums" in library.get_asm_str()
    assert callable(library.get_cufunc)


class Loaded:
    """A kernel that the driver has loaded: it says how many blocks run at once."""

    occupancy: Any = SimpleNamespace(max_active_blocks_per_multiprocessor=lambda threads, n_bytes: 4096 // threads)


@dataclass
class Gpu:
    """What takes the place of a GPU: it keeps what was asked of it."""

    device: int = 0
    context: int = 7
    launched: list[Any] = field(default_factory=list)
    allowed: list[Any] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    kernel: Loaded = field(default_factory=Loaded)

    def get_cufunc(self) -> Any:
        self.found.append(self.device)
        return SimpleNamespace(kernel=self.kernel, device=SimpleNamespace(id=self.device))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(device.core, "launch", lambda *given: found.launched.append(given))
    monkeypatch.setattr(device, "allow_shared_bytes", lambda function, most: found.allowed.append(most))
    monkeypatch.setattr(device, "most_shared_bytes", lambda _: 163 * 1024)
    monkeypatch.setattr(device, "current_context", lambda: found.context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return found


def toy_on(gpu: Gpu) -> Kernel:
    toy = kernel(reversed_sums)
    toy.__dict__["_library"] = gpu
    return toy


def test_a_launch_is_as_numbas(gpu: Gpu) -> None:
    """Grid, block, shared memory, stream and kernel; the limit of shared memory is raised once for a device."""
    toy, x = toy_on(gpu), view(ARRAYS["float32"])
    for shared_bytes in (0, 100 * 1024, 120 * 1024):
        toy.launch((3, 2), 64, x, x, shared_bytes=shared_bytes)
        _, configuration, loaded, *words = gpu.launched[-1]
        assert (configuration.grid, configuration.block) == ((3, 2, 1), (64, 1, 1))
        assert (configuration.shmem_size, configuration.is_cooperative) == (shared_bytes, False)
        assert (loaded, words) == (gpu.kernel, [*x.words, *x.words])
    assert gpu.allowed == [163 * 1024]


def test_a_kernel_is_looked_up_once_for_a_device_and_context(gpu: Gpu) -> None:
    toy, x = toy_on(gpu), view(ARRAYS["float32"])
    for gpu.device, gpu.context in ((0, 7), (0, 7), (1, 8), (0, 7), (0, 9), (1, 8)):
        toy.launch(1, 64, x, x)
    assert gpu.found == [0, 1, 0]


def test_streams_of_devices_with_one_pointer_are_different(gpu: Gpu) -> None:
    """The default stream of every device is number 0."""
    toy, x = toy_on(gpu), view(ARRAYS["float32"])
    for gpu.device in (0, 1, 0):
        toy.launch(1, 64, x, x)
    first, second, third = (stream for stream, *_ in gpu.launched)
    assert first is third
    assert first is not second


def test_blocks_that_run_at_once_are_the_drivers(gpu: Gpu) -> None:
    """At least one, whatever it says; more shared memory than every kernel may have is allowed before it is asked."""
    toy = toy_on(gpu)
    assert [toy.resident_blocks(threads, 0) for threads in (256, 1024, 8192)] == [16, 4, 1]
    assert gpu.allowed == []
    assert toy.resident_blocks(256, 100 * 1024) == 16
    assert gpu.allowed == [163 * 1024]


def test_what_the_driver_is_asked_exists() -> None:
    from cuda.bindings import driver
    from cuda.core._module import KernelOccupancy

    assert callable(KernelOccupancy.max_active_blocks_per_multiprocessor)
    assert callable(driver.cuCtxGetCurrent)


def test_a_log_without_a_kernel_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="expected one kernel in what ptxas says, but it says: ''"):
        cuda_resources.numbers_in("")


def test_the_table_lists_every_kernel() -> None:
    good, bad = kernel(reversed_sums, "good, float32"), kernel(shuffled, "bad, float32")
    text = render([measure(each, "sm_90") for each in (good, bad)])
    good_row = r"^\| `good, float32` \| sm_90 \| 64 \| \d+ \| 32 \| 256 \| 0 \| 0 \| 0 \| 0 \|$"
    assert re.search(good_row, text, re.MULTILINE)
    assert "- bad, float32 (sm_90) has a stack of 128 bytes" in text
    assert "| nvidia-nvvm | " in text
    assert differences(text, [good, bad]) == []
    remedy = "CUDA_RESOURCES.md is not of this code; python bench/cuda_resources.py writes it anew"
    assert differences(text, [good, replace(bad, name="new")]) == [
        f"new is missing: {remedy}",
        f"bad, float32 is in the table and not in the code: {remedy}",
    ]
    assert differences(text, [good, bad, bad]) == ["bad, float32 is the name of 2 kernels"]


@pytest.mark.parametrize("check", [True, False])
def test_every_violation_is_named_and_ends_with_an_error(
    check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = [kernel(shuffled, "first"), kernel(scaled, "second")]
    table = tmp_path / "CUDA_RESOURCES.md"
    monkeypatch.setattr(cuda_resources, "TABLE", table)
    monkeypatch.setattr(cuda_resources, "ARCHITECTURES", {"sm_90": (9, 0)})
    monkeypatch.setattr(cuda_resources, "kernels_of_the_library", lambda: kernels)
    assert cuda_resources.main(["--check"] if check else []) == 1
    told = capsys.readouterr().out
    assert "first (sm_90) has a stack of 128 bytes\nsecond (sm_90) computes in float32" in told
    assert ("first is missing" in told) == check
    assert f"2 kernels, 1 architectures, {4 if check else 2} violations" in told
    assert table.exists() != check
    kernels[:] = [kernel(reversed_sums)]
    assert cuda_resources.main([]) == 0
    assert cuda_resources.main(["--check"]) == 0
