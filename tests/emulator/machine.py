"""Compiles kernels by way of PTX and C, and launches them on the memory of torch's CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import struct
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from bench.cuda_resources import ARCHITECTURES, compiled, compiling_for
from emalgam_kernels.numba_cuda import device
from emalgam_kernels.numba_cuda.device import Kernel, View
from tests.emulator.translation import Program, translate

ROOT: Final = Path(__file__).resolve().parents[2]
BUILT: Final = ROOT / "build" / "emulator"  # compiled kernels, by what they were compiled from
RUNTIME: Final = Path(__file__).with_name("runtime.h")
ARCHITECTURE: Final = "sm_90"

MOST_THREADS: Final = 1024
STACK_BYTES: Final = 2**17
FRAME_BYTES: Final = STACK_BYTES // 2  # of a kernel, at most

# Signed numbers wrap around; a + b c is one rounding only where PTX says so, unless "joined" allows what ptxas may do.
FLAGS: Final = (
    "-std=gnu11", "-O1", "-fPIC", "-shared", "-fwrapv", "-fno-strict-aliasing", "-frounding-math",
    "-U_FORTIFY_SOURCE",  # which takes a change of stacks for an attack
    f"-Werror=frame-larger-than={FRAME_BYTES}",
)  # fmt: skip
JOINED: Final = os.environ.get("EMALGAM_EMULATED_PRODUCTS") == "joined"
JOINING: Final = ["-ffp-contract=fast", *(["-march=x86-64-v3"] if platform.machine() == "x86_64" else [])]

SHARED_BYTES: Final = 227 * 1024  # of an H100 or H200


class Fault(Exception):
    """What a GPU leaves to chance, or answers with an error."""


Three = int | tuple[int, ...]  # of a grid or of a block


@dataclass(frozen=True)
class Array:
    """Memory that a launch may touch, in numbers of so many bytes."""

    start: int
    n_bytes: int
    item_bytes: int


class Memory(ctypes.Structure):
    """`struct memory` of runtime.h."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("granule", ctypes.c_uint64),
        ("traces", ctypes.c_void_p),
    )


class Failure(ctypes.Structure):
    """`struct failure`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "line", "writes", "space")),
        ("address", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("block", "thread", "other", "other_block")),
    )


class Launch(ctypes.Structure):
    """`struct launch`."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_void_p),
        ("shared", Memory),
        ("arrays", ctypes.c_void_p),
        ("n_arrays", ctypes.c_int64),
        ("stacks", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_uint64),
        ("failure", Failure),
    )


TRACE_BYTES: Final = 24  # `struct trace`
OUTSIDE, MISALIGNED, UNWRITTEN, READ_AND_WRITTEN, WRITTEN_TWICE, DIFFERENT_BARRIERS, BARRIER_WITHOUT = range(1, 8)
ARRAY, SHARED, CONSTANT = range(3)


# ---- from a kernel to a function


@dataclass(frozen=True)
class Loaded:
    """A kernel that can be launched."""

    name: str
    program: Program
    function: Any

    def launch(
        self, grid: Three, block: Three, parameters: Sequence[bytes], arrays: Sequence[Array], shared_bytes: int = 0
    ) -> None:
        """Run all blocks; Fault at the first thing that is wrong.

        Parameters
        ----------
        grid, block : int, or tuple of up to three
        parameters : sequence of bytes
            Of 8 bytes each at most.
        arrays : sequence of Array
            All memory that the kernel may touch beside the shared.
        shared_bytes : int
            Asked for by the launch.
        """
        whole_bytes = self.program.shared_bytes + shared_bytes
        if whole_bytes > SHARED_BYTES:
            raise Fault(f"{self.name}: {whole_bytes} bytes of shared memory, there are {SHARED_BYTES}")
        if len(parameters) != self.program.n_parameters:
            raise Fault(f"{self.name}: {len(parameters)} words for {self.program.n_parameters} parameters")
        given = Launch(
            grid=_three(grid), block=_three(block), dynamic_bytes=shared_bytes,
            stacks=_stacks().data_ptr(), stack_bytes=STACK_BYTES,
        )  # fmt: skip
        words = b"".join(each.ljust(8, b"\0") for each in parameters)
        given.parameters = ctypes.cast(ctypes.c_char_p(words), ctypes.c_void_p)
        joined = _joined(arrays)
        traced = [*joined, Array(_shared().data_ptr(), whole_bytes, self.program.shared_item_bytes)]
        with _traces(traced) as (*memories, given.shared), _launching:
            given.arrays = ctypes.cast((Memory * len(memories))(*memories), ctypes.c_void_p)
            given.n_arrays = len(memories)
            self.function(ctypes.byref(given))
        if given.failure.kind:
            raise Fault(f"{self.name}: {_explained(given.failure, self.program, joined)}")


def load(ptx: str, name: str) -> Loaded:
    """Compile PTX, or find what an earlier process compiled from the same."""
    program = translate(ptx)
    return Loaded(name, program, ctypes.CDLL(str(built(program.source))).run)


@cache
def loaded(kernel: Kernel) -> Loaded:
    """A kernel of the library."""
    with compiling_for(ARCHITECTURES[ARCHITECTURE]):
        return load(compiled(kernel, ARCHITECTURE, "ptx"), kernel.name)


def built(source: str) -> Path:
    """The library of a kernel in C."""
    command = [*_compiler(), *FLAGS, *(JOINING if JOINED else ["-ffp-contract=off"]), "-x", "c", "-"]
    whole = RUNTIME.read_text() + source
    name = hashlib.sha256("\0".join([*command, whole]).encode()).hexdigest()[:32]
    library = BUILT / f"{name}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [*command, "-o", str(unfinished), "-lm"]
        done = subprocess.run(command, input=whole, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[0]} could not compile a kernel's C:\n{done.stderr}")
        unfinished.replace(library)
    return library


def _compiler() -> list[str]:
    return (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[:1]


# ---- a launch


_launching: Final = threading.Lock()  # a library's variables are those of one launch


def launch(kernel: Kernel, grid: Three, block: Three, *arguments: Any, shared_bytes: int = 0) -> None:
    """As `Kernel.launch`; returns when all blocks are done."""
    if math.prod(_three(block)) > kernel.threads:
        raise Fault(f"{kernel.name}: a block of {_three(block)} threads, it was compiled for {kernel.threads}")
    tensors = [each.tensor for each in arguments if isinstance(each, View) and each.tensor.numel()]
    arrays = [Array(each.data_ptr(), each.numel() * each.element_size(), each.element_size()) for each in tensors]
    words = [struct.pack("q", each) if isinstance(each, int) else bytes(each) for each in kernel.words(*arguments)]
    loaded(kernel).launch(grid, block, words, arrays, shared_bytes)


def _three(size: Three) -> tuple[int, int, int]:
    """Of a grid or of a block, as CUDA counts; nothing is an error there too."""
    x, y, z, *_ = (*((size,) if isinstance(size, int) else size), 1, 1)
    if min(x, y, z) < 1 or x >= 2**31 or max(y, z) >= 2**16:
        raise Fault(f"a grid or block of {(x, y, z)}")
    return x, y, z


# ---- memory


def _joined(arrays: Sequence[Array]) -> list[Array]:
    """Arrays that share memory are one, in the smaller numbers."""
    joined: list[Array] = []
    for array in sorted(arrays, key=lambda each: each.start):
        last = joined[-1] if joined else None
        if last is None or array.start >= last.start + last.n_bytes:
            joined.append(array)
            continue
        end = max(last.start + last.n_bytes, array.start + array.n_bytes)
        joined[-1] = Array(last.start, end - last.start, min(last.item_bytes, array.item_bytes))
    return joined


@contextmanager
def _traces(arrays: Sequence[Array]) -> Iterator[list[Memory]]:
    """The arrays with room for the traces of who touched them."""
    rooms = [torch.zeros(-(-each.n_bytes // each.item_bytes) * TRACE_BYTES, dtype=torch.uint8) for each in arrays]
    pairs = zip(arrays, rooms, strict=True)
    yield [Memory(array.start, array.n_bytes, array.item_bytes, room.data_ptr()) for array, room in pairs]


@cache
def _stacks() -> torch.Tensor:
    """Of all threads of a block."""
    return torch.empty(MOST_THREADS * STACK_BYTES, dtype=torch.uint8)


@cache
def _shared() -> torch.Tensor:
    """What a block may have at most; what it finds there is what the one before left."""
    return torch.empty(SHARED_BYTES, dtype=torch.uint8)


# ---- what went wrong


def _explained(failure: Failure, program: Program, arrays: Sequence[Array]) -> str:
    """Which thread did what, where, and the line of PTX."""
    action = "writes" if failure.writes else "reads"
    where = _place(failure, arrays)
    elsewhere = f" of block {failure.other_block - 1}" if failure.other_block != failure.block else ""
    other = f"thread {failure.other - 1}{elsewhere}"
    what = {
        OUTSIDE: f"{action} outside all arrays, {where}",
        MISALIGNED: f"{action} at an address that is not aligned, {where}",
        UNWRITTEN: f"reads what no thread of its block has written, {where}",
        READ_AND_WRITTEN: f"{action} what {other} {'reads' if failure.writes else 'writes'}, unordered, {where}",
        WRITTEN_TWICE: f"writes what {other} writes, unordered, {where}",
        DIFFERENT_BARRIERS: f"waits at another barrier than {other}",
        BARRIER_WITHOUT: f"waits at a barrier for {other}, which has ended",
    }[failure.kind]
    line = program.lines[failure.line - 1].strip()
    return f"thread {failure.thread - 1} of block {failure.block - 1} {what} (PTX line {failure.line}: {line})"


def _place(failure: Failure, arrays: Sequence[Array]) -> str:
    """Bytes from the start of the nearest array."""
    if failure.space == SHARED:
        return f"byte {failure.address - _shared().data_ptr()} of shared memory"
    if failure.space == CONSTANT:
        return "among the constants"
    if not arrays:
        return f"address {failure.address:#x}"
    distances = [(failure.address - each.start, each.n_bytes) for each in arrays]
    distance, n_bytes = min(distances, key=lambda each: min(abs(each[0]), abs(each[0] - each[1])))
    return f"byte {distance} of an array of {n_bytes}"


# ---- in the place of a GPU


def install() -> None:
    """Let kernels run here, on torch's CPU tensors."""
    import emalgam_kernels.numba_cuda as backend
    from emalgam import arrays

    def resident_blocks(kernel: Kernel, threads: int, shared_bytes: int) -> int:
        return max(kernel.blocks * kernel.threads // threads, 1)

    changes = (
        (backend, "probe", lambda: None),
        (arrays, "simulated", lambda: True),
        (device, "DEVICE_TYPE", "cpu"),
        (device, "ASSUMED_SHARED_BYTES", SHARED_BYTES),
        (Kernel, "launch", launch),
        (Kernel, "resident_blocks", resident_blocks),
    )
    for owner, name, value in changes:
        setattr(owner, name, value)
