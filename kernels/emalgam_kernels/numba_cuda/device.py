"""The device: the one module that imports Numba's CUDA target and torch, so that a successor of either has one place.

torch owns memory, streams and matrix products (cuBLAS); Numba compiles the kernels. With NUMBA_ENABLE_CUDASIM=1 Numba
interprets the kernels and torch's CPU tensors are the device's: everything above the kernels runs as on a GPU.

All kernels take flat C-contiguous arrays and integers, so that one signature serves every layout of the data.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from operator import attrgetter
from typing import Any, Final, get_type_hints

import numba
import numpy as np
import torch
from cuda import core
from numba import cuda

SIMULATED: Final = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
DEVICE_TYPE: Final = "cpu" if SIMULATED else "cuda"

# Shared memory that every launch may ask for without an attribute of the kernel, on every architecture; and the most
# that one may have with it where there is no device to ask: on an A100 (227 KB on an H100, 99 KB on some smaller ones).
SHARED_BYTES: Final = 48 * 1024
ASSUMED_SHARED_BYTES: Final = 163 * 1024
ASSUMED_CACHE_BYTES: Final = 40 * 2**20  # L2 of an A100 too

ARRAYS: Final = (np.ndarray, torch.Tensor)  # what kernels take
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


def _upward() -> Any:
    """A range that only goes up, as numba-cuda's interface for extensions takes it: its type, and its code."""
    from numba.cuda import cgutils, types
    from numba.cuda.core.imputils import RefType, iternext_impl
    from numba.cuda.extending import lower_builtin, models, register_model, type_callable

    class Upward(types.SimpleIteratorType):
        """An iterator over int64."""

    upward = Upward("upward", types.int64)

    def ascending(*bounds: Any) -> range:
        return range(*bounds)

    @register_model(Upward)
    class Model(models.StructModel):
        def __init__(self, manager: Any, kind: Any) -> None:
            place = types.EphemeralPointer(types.int64)
            super().__init__(manager, kind, [("place", place), ("stop", types.int64), ("step", types.int64)])

    @type_callable(ascending)
    def kind_of(_: Any) -> Any:
        def kind(first: Any, second: Any = None, third: Any = None) -> Any:
            bounds = [each for each in (first, second, third) if each is not None]
            return upward if all(isinstance(each, types.Integer) and each.signed for each in bounds) else None

        return kind

    @lower_builtin(ascending, types.VarArg(types.Integer))
    def begin(context: Any, builder: Any, signature: Any, bounds: Any) -> Any:
        zero, one = (context.get_constant(types.int64, number) for number in (0, 1))
        numbers = [context.cast(builder, *each, types.int64) for each in zip(bounds, signature.args, strict=True)]
        start, stop, step = [[zero, *numbers, one], [*numbers, one], numbers][len(numbers) - 1]
        found = cgutils.create_struct_proxy(upward)(context, builder)
        found.place, found.stop, found.step = cgutils.alloca_once_value(builder, start), stop, step
        return found._getvalue()

    @lower_builtin("iternext", Upward)
    @iternext_impl(RefType.UNTRACKED)
    def proceed(context: Any, builder: Any, _: Any, iterators: Any, result: Any) -> None:
        found = cgutils.create_struct_proxy(upward)(context, builder, value=iterators[0])
        value = builder.load(found.place)
        result.set_valid(builder.icmp_signed("<", value, found.stop))
        result.yield_(value)
        # For all that LLVM is told this may overflow: else it unrolls loops with a step, which takes registers.
        builder.store(builder.add(value, found.step), found.place)

    return ascending


# How kernels count and where they look. Python allows for negative numbers, Numba for all that Python allows, and LLVM
# sees through little of it. What kernels count is not negative, and they say so:
#
# - ascending(stop), (start, stop) or (start, stop, step): `range`, with a step that is positive. Numba's own may
#   descend: before the loop it divides, to know how often it runs, and in each turn it selects what it counts with, so
#   that places which follow from it are multiplied anew.
# - array[at(i)]: others count from the end. It enters no arithmetic: the sum of it and a signed integer is float64.
ascending: Final = range if SIMULATED else _upward()
at: Final = int if SIMULATED else numba.uint64


def _divided(a: Any, b: Any) -> tuple[Any, Any]:
    quotient = numba.int64(numba.uint32(a) // numba.uint32(b))
    return quotient, a - quotient * b


# divided(a, b): (a // b, a % b) of numbers of a block's threads and tasks and of elements of one problem's parameters,
# which 32 bits hold. Numba rounds downwards whatever the signs, in 64 bits, and for either result anew.
divided: Final = divmod if SIMULATED else inlined(_divided)


# Python's own raise where a GPU returns NaN or an infinity.
log, sqrt = (np.log, np.sqrt) if SIMULATED else (math.log, math.sqrt)


def _fma_of_the_simulator() -> Callable[[Any, Any, Any], Any]:
    """That of C's library, as the simulator's own rounds twice."""
    library, by_type = ctypes.CDLL(None), {}
    for real, name, number in ((np.float64, "fma", ctypes.c_double), (np.float32, "fmaf", ctypes.c_float)):
        function = getattr(library, name)
        function.argtypes, function.restype = (number,) * 3, number
        by_type[real] = function

    def rounded_once(a: Any, b: Any, c: Any) -> Any:
        real = type(c)
        return real(by_type[real](a, b, c))

    return rounded_once


def _fma(a: Any, b: Any, c: Any) -> Any:
    return cuda.fma(a, b, c)


# a b + c, rounded once. The compiler joins other products with sums as it likes, so code that takes rounding errors
# apart writes every product that enters a sum as one of these: fma(a, b, 0) is the product rounded by itself.
fma: Final = _fma_of_the_simulator() if SIMULATED else inlined(_fma)


def _for_the_simulator(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel such that functions of other modules that it calls see the same `cuda`.

    The simulator replaces `cuda` in the module of the function that it runs: in that of `thread`, which is this one.
    """
    users = _users_of_cuda(kernel)
    if not set(users) - {kernel.__module__}:
        return kernel
    from numba.cuda.simulator.kernelapi import swapped_cuda_module

    def thread(*arguments: Any) -> None:
        with ExitStack() as swaps:
            for function in users.values():
                swaps.enter_context(swapped_cuda_module(function, cuda))
            kernel(*arguments)

    return thread


def _users_of_cuda(kernel: Callable[..., None]) -> dict[str, Callable[..., None]]:
    """Of all that a kernel calls, and of itself, a function of each module in which some say `cuda`."""
    users: dict[str, Callable[..., None]] = {}
    seen, waiting = {kernel}, [kernel]
    while waiting:
        function = waiting.pop()
        names = inspect.getclosurevars(function)
        if names.globals.get("cuda") is cuda:
            users[function.__module__] = function
        named = (*names.globals.values(), *names.nonlocals.values())
        new = {each for each in named if inspect.isfunction(each)} - seen
        waiting += new
        seen |= new
    return users


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
    blocks : int
        Of so many threads, for which the registers of a multiprocessor have to suffice. 0 leaves it to ptxas, which
        then saves registers that 1 makes it spend, or spills them.
    """

    name: str
    arithmetic: str
    function: Callable[..., None]
    signature: tuple[Any, ...]
    threads: int
    blocks: int = 0

    @property
    def launch_bounds(self) -> int | tuple[int, int]:
        """As Numba takes them."""
        return (self.threads, self.blocks) if self.blocks else self.threads

    @cached_property
    def _simulated(self) -> Any:
        return cuda.jit(_for_the_simulator(self.function))

    @cached_property
    def _library(self) -> Any:
        """What Numba compiled: the machine code, and the loaded function on each device."""
        compiled = cuda.jit(numba.types.void(*self.signature), launch_bounds=self.launch_bounds)(self.function)
        (overload,) = compiled.overloads.values()
        return overload._codelibrary

    @cached_property
    def _loaded(self) -> dict[tuple[int, int, bool], core.Kernel]:
        """The loaded kernel on each device, in each context, with `SHARED_BYTES` at most and with more."""
        return {}

    @cached_property
    def _resident(self) -> dict[tuple[int, int, int], int]:
        """What `resident_blocks` has found."""
        return {}

    @cached_property
    def _converters(self) -> tuple[Callable[[Any], Sequence[Any]], ...]:
        return tuple(map(converter, self.signature))

    def words(self, *arguments: Any) -> list[Any]:
        """The arguments as CUDA takes them: what Numba's own launch makes of them, in a tenth of its time."""
        pairs = zip(self._converters, arguments, strict=True)
        return [word for convert, argument in pairs for word in convert(argument)]

    def launch(
        self, grid: int | tuple[int, ...], block: int | tuple[int, ...], *arguments: Any, shared_bytes: int = 0
    ) -> None:
        """Run on torch's current stream; arguments are what `view` returns, numbers, and NamedTuples of numbers.

        Numba's launch makes the arguments anew each time, some 10 µs of Python for an array: chunks that fit a cache
        would wait for it. This one looks up what it can, and calls CUDA as Numba does.
        """
        if SIMULATED:
            with _launching:
                self._simulated[grid, block, 0, shared_bytes](*arguments)
            return
        loaded = self._on_the_current_device(shared_bytes)
        stream = _stream(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
        core.launch(stream, _configuration(grid, block, shared_bytes), loaded, *self.words(*arguments))

    def _on_the_current_device(self, shared_bytes: int) -> core.Kernel:
        """The loaded kernel; where a launch wants more than `SHARED_BYTES`, it may have all there are from then on."""
        ordinal, more = torch.cuda.current_device(), shared_bytes > SHARED_BYTES
        loaded = self._loaded.get((ordinal, current_context(), more))
        if loaded is None:
            function = self._library.get_cufunc()  # makes a context current, where there is none
            if more:
                allow_shared_bytes(function, most_shared_bytes(torch.device("cuda", ordinal)))
            loaded = self._loaded[ordinal, current_context(), more] = function.kernel
        return loaded

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """Blocks of so many threads that a multiprocessor of the current device runs at once, at least one.

        The driver knows, from registers and shared memory; in the simulator, what the registers have to suffice for.
        """
        if SIMULATED:
            return max(self.blocks * self.threads // threads, 1)
        key = torch.cuda.current_device(), threads, shared_bytes
        if key not in self._resident:
            occupancy = self._on_the_current_device(shared_bytes).occupancy
            self._resident[key] = max(occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes), 1)
        return self._resident[key]


def current_context() -> int:
    """The address of CUDA's current context."""
    from cuda.bindings import driver

    _, context = driver.cuCtxGetCurrent()
    return int(context)


@lru_cache(1024)
def _configuration(grid: int | tuple[int, ...], block: int | tuple[int, ...], shared_bytes: int) -> core.LaunchConfig:
    return core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)


@lru_cache(1024)
def _stream(device: int, pointer: int) -> core.Stream:
    """A stream of a device: each has a default one, with the same pointer, and the object remembers its device."""
    return core.Stream.from_handle(pointer)


def allow_shared_bytes(function: Any, most_bytes: int) -> None:
    """Let a kernel, loaded on a device, have up to `most_bytes` of shared memory.

    Numba has no public way (https://github.com/NVIDIA/numba-cuda/issues/94); this is what it does itself for
    `shared_memory_carveout`, with another attribute.
    """
    from numba.cuda.cudadrv.driver import binding, driver

    attribute = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.cuKernelSetAttribute(attribute, most_bytes - function.attrs.shared, function.handle, function.device.id)


# ---- arguments


def integers_of(kind: Any) -> Any:
    """Numba's type of a NamedTuple of integers, which may hold others of its kind: many arguments in one."""
    types: Any = numba.types
    fields = get_type_hints(kind).values()
    return types.BaseTuple.from_types([types.int64 if each is int else integers_of(each) for each in fields], kind)


def converter(kind: Any) -> Callable[[Any], Sequence[Any]]:
    """What makes of an argument of one of Numba's types the words that CUDA takes."""
    types: Any = numba.types
    if isinstance(kind, types.Array) and kind.ndim == 1 and kind.layout == "C":
        return attrgetter("words")
    if isinstance(kind, types.BaseTuple):
        fields = [converter(each) for each in kind]
        return lambda value: [word for field, item in zip(fields, value, strict=True) for word in field(item)]
    number = {types.float32: ctypes.c_float, types.float64: ctypes.c_double}.get(kind)
    if number is None and isinstance(kind, types.Integer):
        number = getattr(ctypes, f"c_{kind}")
    if number is None:
        raise TypeError(f"a kernel takes {kind}; expected flat arrays, numbers, and NamedTuples of numbers")
    return lambda value: (number(value),)


@dataclass(frozen=True, eq=False)
class View:
    """A flat tensor, and the words that Numba's kernels take for an array."""

    tensor: torch.Tensor
    words: tuple[int, ...]


def view(tensor: torch.Tensor) -> Any:
    """A contiguous tensor as kernels take it: flat, without a copy."""
    flattened = tensor.detach().view(-1)
    if SIMULATED:
        return flattened.numpy()
    length, n_bytes = flattened.numel(), flattened.element_size()
    # Two pointers that only Numba's own arrays have, length, bytes of an element, address, shape, strides.
    return View(flattened, (0, 0, length, n_bytes, flattened.data_ptr(), length, n_bytes))


def span(x: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of a tensor of any strides, flat."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((length,), (1,))


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make `device` the current one of torch and of Numba."""
    if DEVICE_TYPE == "cpu":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index), cuda.gpus[index]:
        yield


def multiprocessors(device: torch.device) -> int:
    """How many blocks can run side by side at least."""
    return 2 if DEVICE_TYPE == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def cache_bytes(device: torch.device) -> int:
    """What the L2 cache holds."""
    return ASSUMED_CACHE_BYTES if DEVICE_TYPE == "cpu" else int(torch.cuda.get_device_properties(device).L2_cache_size)


@cache
def most_shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have at most."""
    if DEVICE_TYPE == "cpu":
        return ASSUMED_SHARED_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def is_tensor(x: Any) -> bool:
    """Whether `x` lies on the device already (in the simulator, any tensor does)."""
    return isinstance(x, torch.Tensor) and x.device.type == DEVICE_TYPE


def require_on_device(*arrays: Any) -> None:
    """TypeError unless those that are tensors lie on one device, and a device that kernels can read."""
    places = {array.device for array in arrays if isinstance(array, torch.Tensor)}
    if len(places) > 1 or any(place.type != DEVICE_TYPE for place in places):
        found = " and ".join(sorted(map(str, places)))
        raise TypeError(f"tensors are on {found}; expected one {DEVICE_TYPE} device, or NumPy arrays")


def require_one_place(*arrays: Any) -> None:
    """TypeError unless all (but None) are NumPy arrays, or all tensors on one device."""
    kinds = {isinstance(array, torch.Tensor) for array in arrays if array is not None}
    if len(kinds) > 1:
        raise TypeError("some arrays are NumPy's and some tensors; expected all of them in one place")
    require_on_device(*arrays)


def default_device() -> torch.device:
    """The device that NumPy arrays are sent to."""
    return torch.device("cpu") if DEVICE_TYPE == "cpu" else torch.device("cuda", torch.cuda.current_device())


def upload(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy of a small array on the device."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=device)


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Main memory that the device copies from and to by itself; MemoryError that says what to do if there is none."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=DEVICE_TYPE == "cuda")
    except RuntimeError as error:
        n_bytes = math.prod(shape) * dtype.itemsize
        raise MemoryError(
            f"{n_bytes} bytes of page-locked main memory could not be had ({str(error).splitlines()[0]}); free some "
            "memory, raise the limit (ulimit -l; docker run --ulimit memlock=-1), or move the data to the GPU first, "
            "where they take none: torch.from_numpy(x).cuda()"
        ) from error


_products = threading.RLock()


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether cuBLAS may round float32 operands to TF32: only if this call asks for it, whatever the process allows.

    The setting is the process's: threads that want different ones take turns. torch has it twice, and refuses to say
    what holds while one says "ieee" and the other TF32: the old one goes along with the new one, and back.
    """
    setting = torch.backends.cuda.matmul
    with _products:
        before = setting.fp32_precision
        setting.fp32_precision = "tf32" if tf32 else "ieee"
        other = _other_setting(tf32)
        if other is not None:
            setting.allow_tf32 = tf32
        try:
            yield
        finally:
            if other is not None:
                _restore_other_setting(other)
            setting.fp32_precision = before


def _other_setting(tf32: bool) -> str | None:
    """torch's older setting if it contradicts the new one, which is `tf32`: then torch does not read it out."""
    try:
        _ = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return "highest" if tf32 else torch.get_float32_matmul_precision()
    return None


def _restore_other_setting(value: str) -> None:
    """Only that of cuBLAS: the function that takes all values changes the one for products on the CPU too."""
    on_cpu = torch.backends.mkldnn.matmul
    before = on_cpu.fp32_precision
    torch.set_float32_matmul_precision(value)
    on_cpu.fp32_precision = before


class Marker:
    """A point in the current stream's work; nothing in the simulator, where work is done when it is asked for."""

    def __init__(self) -> None:
        self.event: Any = None

    def set(self) -> None:
        """Put the mark behind everything that was queued so far."""
        if DEVICE_TYPE == "cuda":
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
        self.stream = torch.cuda.Stream(device) if DEVICE_TYPE == "cuda" else None
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
    if DEVICE_TYPE == "cpu":
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
