"""The device: the one module that imports Numba's CUDA target and torch, so that a successor of either has one place.

torch owns memory, streams and matrix products (cuBLAS); Numba compiles the kernels. With NUMBA_ENABLE_CUDASIM=1 Numba
interprets the kernels and torch's CPU tensors are the device's: everything above the kernels runs as on a GPU.

All kernels take flat C-contiguous arrays and integers, so that one signature serves every layout of the data.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import cuda

# Small grids are meant: Numba would warn of each in every process.
vars(numba.config)["CUDA_LOW_OCCUPANCY_WARNINGS"] = 0

SIMULATED: Final = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
DEVICE_TYPE: Final = "cpu" if SIMULATED else "cuda"

# Shared memory that every launch may ask for without an attribute of the kernel, on every architecture.
SHARED_BYTES: Final = 48 * 1024

REALS: Final = {"float32": torch.float32, "float64": torch.float64}
NUMBA_REALS: Final[dict[str, Any]] = {"float32": numba.types.float32, "float64": numba.types.float64}


def flat(dtype: Any) -> Any:
    """Numba's type of a flat C-contiguous array."""
    return numba.types.Array(dtype, 1, "C")


def threads_per_block(wanted: int) -> int:
    """`wanted`, or one warp in the simulator, where each thread of a block is a thread of the interpreter."""
    return min(wanted, 32) if SIMULATED else wanted


def inlined(function: Callable[..., Any]) -> Any:
    """A function that kernels call, dissolved in them: only then are its arrays known to be shared, or registers."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


# Python's own raise where a GPU returns NaN or an infinity.
log, sqrt = (np.log, np.sqrt) if SIMULATED else (math.log, math.sqrt)


def _fma_of_the_simulator(a: Any, b: Any, c: Any) -> Any:
    """In exact fractions: the simulator's own rounds twice."""
    plain = a * b + c
    if not np.isfinite(plain):
        return plain
    return type(plain)(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def _fma(a: Any, b: Any, c: Any) -> Any:
    return cuda.fma(a, b, c)


# a b + c, rounded once. The compiler joins other products with sums as it likes, so code that takes rounding errors
# apart writes every product that enters a sum as one of these: fma(a, b, 0) is the product rounded by itself.
fma: Final = _fma_of_the_simulator if SIMULATED else inlined(_fma)


_launching: Final = threading.Lock() if SIMULATED else nullcontext()  # the simulator runs one kernel at a time


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
    """

    name: str
    arithmetic: str
    function: Callable[..., None]
    signature: tuple[Any, ...]
    threads: int

    @cached_property
    def _compiled(self) -> Any:
        if SIMULATED:
            return cuda.jit(self.function)
        return cuda.jit(numba.types.void(*self.signature), launch_bounds=self.threads)(self.function)

    def launch(
        self, grid: int | tuple[int, ...], block: int | tuple[int, ...], *arguments: Any, shared_bytes: int = 0
    ) -> None:
        """Run on torch's current stream; arguments are what `view` returns, and integers."""
        with _launching:
            self._compiled[grid, block, current_stream(), shared_bytes](*arguments)


def view(tensor: torch.Tensor) -> Any:
    """A contiguous tensor as kernels take it: flat, without a copy. Making one costs microseconds: keep it."""
    flattened = tensor.detach().view(-1)
    return flattened.numpy() if SIMULATED else cuda.as_cuda_array(flattened, sync=False)


def span(x: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of a tensor of any strides, flat."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((length,), (1,))


def current_stream() -> Any:
    """torch's current stream as Numba takes it."""
    return 0 if SIMULATED else _numba_stream(torch.cuda.current_stream().cuda_stream)


_streams: dict[int, Any] = {}


def _numba_stream(pointer: int) -> Any:
    if pointer not in _streams:
        _streams[pointer] = cuda.external_stream(pointer) if pointer else cuda.default_stream()
    return _streams[pointer]


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
