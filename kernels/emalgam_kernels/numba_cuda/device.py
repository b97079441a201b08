"""The device: the one module that imports Numba's CUDA target and torch, so that a successor of either has one place.

torch owns memory, streams and matrix products (cuBLAS); Numba compiles the kernels. With NUMBA_ENABLE_CUDASIM=1 Numba
interprets the kernels and torch's CPU tensors are the device's: everything above the kernels runs as on a GPU.

All kernels take flat C-contiguous arrays and integers, so that one signature serves every layout of the data.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final, get_type_hints

import numba
import numpy as np
import torch
from numba import cuda

# Small grids are meant: Numba would warn of each in every process.
vars(numba.config)["CUDA_LOW_OCCUPANCY_WARNINGS"] = 0

SIMULATED: Final = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
DEVICE_TYPE: Final = "cpu" if SIMULATED else "cuda"

# Shared memory that every launch may ask for without an attribute of the kernel, on every architecture; and the most
# that one may have with it where there is no device to ask: on an A100 (227 KB on an H100, 99 KB on some smaller ones).
SHARED_BYTES: Final = 48 * 1024
ASSUMED_SHARED_BYTES: Final = 163 * 1024

MOST_CONFIGURED: Final = 1024  # launches that a kernel remembers

REALS: Final = {"float32": torch.float32, "float64": torch.float64}
NUMBA_REALS: Final[dict[str, Any]] = {"float32": numba.types.float32, "float64": numba.types.float64}


def flat(dtype: Any) -> Any:
    """Numba's type of a flat C-contiguous array."""
    return numba.types.Array(dtype, 1, "C")


def integers_of(kind: Any) -> Any:
    """Numba's type of a NamedTuple of integers, which may hold others of its kind: many arguments in one."""
    types: Any = numba.types
    fields = get_type_hints(kind).values()
    return types.BaseTuple.from_types([types.int64 if each is int else integers_of(each) for each in fields], kind)


def threads_per_block(wanted: int) -> int:
    """`wanted`, or one warp in the simulator, where each thread of a block is a thread of the interpreter."""
    return min(wanted, 32) if SIMULATED else wanted


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel for one combination of dtypes, compiled when it is first launched.

    Attributes
    ----------
    name : str
        With the dtypes, as in bench/CUDA_RESOURCES.md.
    arithmetic : {"float32", "float64"}
        The PTX of a float32 kernel holds no float64 instruction; the compile gate checks it.
    function : callable
        Plain Python, one thread of it.
    signature : tuple of Numba types
    threads : int
        Threads of a block at most.
    blocks : int
        Of so many threads, for which the registers of a multiprocessor have to suffice.
    """

    name: str
    arithmetic: str
    function: Callable[..., None]
    signature: tuple[Any, ...]
    threads: int
    blocks: int = 1

    @property
    def launch_bounds(self) -> tuple[int, int]:
        """As Numba takes them."""
        return self.threads, self.blocks

    @cached_property
    def _compiled(self) -> Any:
        if SIMULATED:
            return cuda.jit(self.function)
        # With its one signature the kernel is specialized: Numba infers no types when it is launched.
        return cuda.jit(numba.types.void(*self.signature), launch_bounds=self.launch_bounds)(self.function)

    @cached_property
    def _configured(self) -> dict[tuple[Any, ...], Any]:
        """The kernel for each grid, block, stream and shared memory that it was launched with."""
        return {}

    def launch(
        self, grid: int | tuple[int, ...], block: int | tuple[int, ...], *arguments: Any, shared_bytes: int = 0
    ) -> None:
        """Run on torch's current stream; arguments are what `view` returns, integers, and NamedTuples of integers."""
        if SIMULATED:
            self._compiled[grid, block, 0, shared_bytes](*arguments)
            return
        stream = torch.cuda.current_stream()
        key = grid, block, shared_bytes, stream.device_index, stream.cuda_stream
        configured = self._configured.get(key)
        if configured is None:
            if shared_bytes > SHARED_BYTES:
                allow_shared_bytes(self._compiled, most_shared_bytes(stream.device))
            if len(self._configured) >= MOST_CONFIGURED:
                self._configured.clear()
            configured = self._configured[key] = self._compiled[grid, block, _numba_stream(stream), shared_bytes]
        configured(*arguments)


def allow_shared_bytes(compiled: Any, most_bytes: int) -> None:
    """Let a kernel have up to `most_bytes` of shared memory on the current device.

    Numba has no public way (https://github.com/NVIDIA/numba-cuda/issues/94); this is what it does itself for
    `shared_memory_carveout`, with another attribute.
    """
    from numba.cuda.cudadrv.driver import binding, driver

    (overload,) = compiled.overloads.values()
    function = overload._codelibrary.get_cufunc()
    attribute = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    dynamic = most_bytes - function.attrs.shared
    driver.cuKernelSetAttribute(attribute, dynamic, function.handle, function.device.id)


def view(tensor: torch.Tensor) -> Any:
    """A contiguous tensor as kernels take it: flat, without a copy. Making one costs microseconds: keep it."""
    flattened = tensor.detach().view(-1)
    return flattened.numpy() if SIMULATED else cuda.as_cuda_array(flattened, sync=False)


def span(x: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of a tensor of any strides, flat."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((length,), (1,))


_streams: dict[tuple[int, int], Any] = {}


def _numba_stream(stream: torch.cuda.Stream) -> Any:
    """A stream of torch's as Numba takes it."""
    key = stream.device_index, stream.cuda_stream
    if key not in _streams:
        _streams[key] = cuda.external_stream(key[1]) if key[1] else cuda.default_stream()
    return _streams[key]


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make `device` the current one of torch and of Numba."""
    if SIMULATED:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index), cuda.gpus[index]:
        yield


def multiprocessors(device: torch.device) -> int:
    """How many blocks can run side by side at least."""
    return 2 if SIMULATED else int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def most_shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have at most."""
    if SIMULATED:
        return ASSUMED_SHARED_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def is_tensor(x: Any) -> bool:
    """Whether `x` lies on the device already (in the simulator, any tensor does)."""
    return isinstance(x, torch.Tensor) and x.device.type == DEVICE_TYPE


def default_device() -> torch.device:
    """The device that NumPy arrays are sent to."""
    return torch.device("cpu") if SIMULATED else torch.device("cuda", torch.cuda.current_device())


def upload(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy of a small array on the device."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=device)


_products = threading.RLock()


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether cuBLAS may round float32 operands to TF32: only if this call asks for it, whatever the process allows.

    The setting is the process's: threads that want different ones take turns.
    """
    setting = torch.backends.cuda.matmul
    with _products:
        before = setting.fp32_precision
        setting.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            setting.fp32_precision = before


class Marker:
    """A point in the current stream's work; nothing in the simulator, where work is done when it is asked for."""

    def __init__(self) -> None:
        self.event: Any = None

    def set(self) -> None:
        """Put the mark behind everything that was queued so far."""
        if not SIMULATED:
            self.event = self.event or torch.cuda.Event()
            self.event.record()

    def wait_on_host(self) -> None:
        """Return when the device has passed the mark; at once if it was never set."""
        if self.event is not None:
            self.event.synchronize()

    def wait_on_device(self) -> None:
        """Let the current stream wait for the mark."""
        if self.event is not None:
            self.event.wait()


class Copies:
    """A stream beside the current one, for copies."""

    def __init__(self, device: torch.device) -> None:
        self.stream = None if SIMULATED else torch.cuda.Stream(device)
        start = Marker()
        start.set()
        self.start = start

    @contextmanager
    def queue(self, after: Marker) -> Iterator[None]:
        """Queue work on that stream, to begin when `after` was passed."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.start.wait_on_device()  # buffers may be memory that the current stream was still reading
            after.wait_on_device()
            yield


def free_bytes(device: torch.device) -> int:
    """Device memory that is free, torch's own reserve included."""
    if SIMULATED:
        return 2**40
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(reserve)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """MemoryError that says what to do, instead of torch's, when the device's memory does not suffice for `what`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"the GPU's memory does not suffice for {what} ({str(error).splitlines()[0]}); free some of it "
            "(torch.cuda.empty_cache()), give a NumPy array or memory map, which is read in pieces, or a CPU backend"
        ) from error
