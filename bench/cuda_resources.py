"""Compile every CUDA kernel for several architectures, without a GPU, and count what it takes: CUDA_RESOURCES.md.

python bench/cuda_resources.py            writes bench/CUDA_RESOURCES.md
python bench/cuda_resources.py --check    writes nothing

Either names every violation and ends with 1 if there is one: spilled registers, a stack, float64 in a kernel whose
arithmetic is float32, loops, divisions and indices that allow for negative numbers; --check also if the table that is
there knows other kernels than the code does.

The PTX shows what Numba made of the types; registers, stack and spills are known only after ptxas, which nvJitLink
runs on NVVM's output as it does when a kernel is launched.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from emalgam_kernels.numba_cuda.device import Kernel

ROOT: Final = Path(__file__).resolve().parent.parent
TABLE: Final = ROOT / "bench" / "CUDA_RESOURCES.md"
ARCHITECTURES: Final = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
PACKAGES: Final = ("numba", "numba-cuda", "cuda-core", "cuda-toolkit", "nvidia-nvvm", "nvidia-nvjitlink")

WORTH_A_PROCESS: Final = 32  # kernels and architectures

# Kernels that keep Numba's ranges, since registers would not suffice for as many blocks: see `kl_kernels`.
WITH_RANGES: Final = re.compile(
    r"^KL of |^precision factors|expectations|naturals|^log-densities|^samples.*in global memory$"
)

# The same on all these architectures: registers and warps of a multiprocessor, and in what portions a warp gets them.
REGISTERS: Final = 65536
WARPS: Final = 64
WARP: Final = 32
REGISTERS_OF_A_WARP: Final = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every kernel is within bounds (and --check finds the table's kernels to be those of the code), else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    kernels = kernels_of_the_library()
    found = measure_all(kernels)
    wrong = [text for resources in found for text in violations(resources)]
    if check:
        wrong += differences(TABLE.read_text() if TABLE.exists() else "", kernels)
    else:
        TABLE.write_text(render(found))
    print(*wrong, f"{len(kernels)} kernels, {len(ARCHITECTURES)} architectures, {len(wrong)} violations", sep="\n")
    return 1 if wrong else 0


def kernels_of_the_library() -> list[Kernel]:
    """Every kernel that numba_cuda may launch."""
    from emalgam_kernels.numba_cuda import catalog

    return catalog.kernels()


# ---- compiling


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    Attributes
    ----------
    name, arithmetic, threads
        As in `Kernel`.
    architecture : str
        "sm_90".
    registers : int
        Of a thread.
    shared_bytes : int
        Static shared memory of a block; what a launch asks for comes on top.
    stack_bytes, spilled_bytes : int
        Of a thread; spilled is stored and loaded together.
    float64 : int
        Mentions of float64 in the PTX: registers and instructions.
    local : int
        Mentions of local memory in the PTX. Informs only: ptxas may still keep it in registers.
    signs : int
        What the PTX does about integers that might be negative, see `signs_in`. Informs only, if `WITH_RANGES`.
    """

    name: str
    arithmetic: str
    threads: int
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int
    float64: int
    local: int
    signs: int

    @property
    def blocks(self) -> int:
        """Blocks of `threads` that the registers (and places for warps) of a multiprocessor allow."""
        warps = -(-self.threads // WARP)
        portions = -(-self.registers * WARP // REGISTERS_OF_A_WARP)
        return min(REGISTERS // (portions * REGISTERS_OF_A_WARP), WARPS) // warps


def measure_all(kernels: Iterable[Kernel]) -> list[Resources]:
    """Each kernel on each architecture; many of them in as many processes as there are processors."""
    pairs = list(itertools.product(kernels, ARCHITECTURES))
    processes = min(len(os.sched_getaffinity(0)), len(pairs) // WORTH_A_PROCESS)
    if processes < 2:
        return [measure(*pair) for pair in pairs]
    # Kernels are closures, which do not travel between processes: those that are forked have them.
    with multiprocessing.get_context("fork").Pool(processes, _inherit, (pairs,)) as pool:
        return pool.map(_measure_inherited, range(len(pairs)), chunksize=1)


_inherited: list[tuple[Kernel, str]] = []


def _inherit(pairs: list[tuple[Kernel, str]]) -> None:
    _inherited[:] = pairs


def _measure_inherited(number: int) -> Resources:
    return measure(*_inherited[number])


def measure(kernel: Kernel, architecture: str) -> Resources:
    """Compile one kernel for one architecture."""
    with compiling_for(ARCHITECTURES[architecture]):
        ptx = compiled(kernel, architecture, "ptx")
        log = link(compiled(kernel, architecture, "ltoir"), architecture)
    return Resources(
        kernel.name,
        kernel.arithmetic,
        kernel.threads,
        architecture,
        **numbers_in(log),
        float64=len(re.findall(r"\.f64\b", ptx)),
        local=len(re.findall(r"\.local\b", ptx)),
        signs=signs_in(ptx),
    )


def compiled(kernel: Kernel, architecture: str, output: str) -> Any:
    """PTX (text) or what nvJitLink takes (bytes)."""
    from numba import cuda, types

    code, _ = cuda.compile(
        kernel.function,
        types.void(*kernel.signature),
        output=output,
        device=False,
        abi="numba",
        cc=ARCHITECTURES[architecture],
        launch_bounds=kernel.launch_bounds,
    )
    return code


def link(code: bytes, architecture: str) -> str:
    """What ptxas says about the finished kernel."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=architecture, link_time_optimization=True, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ltoir(code), options=options)
    linker.link("cubin")
    return str(linker.get_info_log())


def numbers_in(log: str) -> dict[str, int]:
    """The figures of ptxas -v, summed over the functions that it names.

    >>> numbers_in("8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads. Used 40 registers, 256 bytes smem")
    {'registers': 40, 'shared_bytes': 256, 'stack_bytes': 8, 'spilled_bytes': 16}
    """
    used = re.findall(r"Used (\d+) registers", log)
    if len(used) != 1:
        raise RuntimeError(f"expected one kernel in what ptxas says, but it says: {log!r}")

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    return {
        "registers": int(used[0]),
        "shared_bytes": total(r"(\d+) bytes smem"),
        "stack_bytes": total(r"(\d+) bytes stack frame"),
        "spilled_bytes": total(r"(\d+) bytes spill (?:stores|loads)"),
    }


def signs_in(ptx: str) -> int:
    """How often Numba allows for integers below zero, instead of `ascending`, `divided` and `at` of `device`.

    Its ranges and its divisions, which round downwards, add −1 or nothing; to an index below zero it adds the length of
    the array. Where the sum is compared with zero it is a slice, kept within the array, and does not count.

    >>> signs_in("selp.b64 %rd1, -1, 0, %p1;")
    1
    >>> index = "shr.s64 %rd1, %rd9, 63; and.b64 %rd2, %rd1, %rd8; add.s64 %rd3, %rd2, %rd9;"
    >>> signs_in(index), signs_in(index + "max.s64 %rd4, %rd3, 0;")
    (1, 0)
    """
    index = r"shr\.s64\s+(%\w+), (%\w+), 63;\s+and\.b64\s+(%\w+), \1, [^;]+;\s+add\.s64\s+(%\w+), \3, \2;"
    slices = set(re.findall(r"(?:max|setp\.[gl]t)\.s64\s+%\w+, (%\w+), (?:0|-1);", ptx))
    indices = [place for *_, place in re.findall(index, ptx) if place not in slices]
    return len(indices) + len(re.findall(r"selp\.[bs](?:32|64)\s+%\w+, -1, 0,", ptx))


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Compile the device functions that a kernel calls without asking a GPU for its compute capability.

    Numba compiles such a function when it meets the call, always for the current device; `cuda.compile` tells it no
    other. This is the one place that replaces something of Numba's.
    """
    from numba.cuda import dispatcher

    ask_the_device = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = ask_the_device


# ---- judging


def violations(found: Resources) -> list[str]:
    """What is wrong with a kernel, a line each."""
    faults = {
        f"spills {found.spilled_bytes} bytes": found.spilled_bytes > 0,
        f"has a stack of {found.stack_bytes} bytes": found.stack_bytes > 0,
        f"computes in float32 and mentions float64 {found.float64} times in its PTX": (
            found.arithmetic == "float32" and found.float64 > 0
        ),
        f"allows for negative integers {found.signs} times in its PTX": (
            found.signs > 0 and not WITH_RANGES.search(found.name)
        ),
        f"cannot be launched: {found.threads} threads of {found.registers} registers are too many": found.blocks == 0,
    }
    return [f"{found.name} ({found.architecture}) {fault}" for fault, so in faults.items() if so]


def differences(text: str, kernels: Iterable[Kernel]) -> list[str]:
    """Which kernels the table lacks, which it has too many, and names that two kernels share; a line each."""
    names = [kernel.name for kernel in kernels]
    listed, there = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)), set(names)
    remedy = f"{TABLE.name} is not of this code; python bench/cuda_resources.py writes it anew"
    return [
        *(f"{name} is missing: {remedy}" for name in sorted(there - listed)),
        *(f"{name} is in the table and not in the code: {remedy}" for name in sorted(listed - there)),
        *(f"{name} is the name of {names.count(name)} kernels" for name in sorted(there) if names.count(name) > 1),
    ]


# ---- writing


def render(found: Sequence[Resources]) -> str:
    """CUDA_RESOURCES.md."""
    from bench.tables import table

    faults = [text for resources in found for text in violations(resources)]
    numbers = ["threads", "registers", "blocks", "shared", "stack", "spilled", "float64", "signs"]
    sections = [
        f"# Resources of the CUDA kernels\n\nWritten by `make cuda-resources` on {today()}. Do not edit.\n",
        NOTE,
        table(["kernel", "architecture", *numbers], map(cells, found)),
        "## Reach of the fused kernel\n",
        REACH_NOTE,
        table(["features", "D", "K", "F", "arithmetic", *(f"{n} KB" for n in SHARED_KILOBYTES)], reach()),
        "## Violations\n\n" + ("\n".join(f"- {fault}" for fault in faults) or "None.") + "\n",
        "## Versions\n\n" + table(["package", "version"], ([name, version(name)] for name in PACKAGES)),
    ]
    return "\n".join(sections)


NOTE: Final = """Compiled, not run: what ptxas says about each kernel. "threads" is the largest block it is compiled
for, "registers" are those of a thread, "blocks" is how many such blocks they leave room for on a multiprocessor,
"shared" is static shared memory in bytes (what a launch asks for comes on top), "stack" and "spilled" are bytes of a
thread and have to be 0, "float64" is how often the PTX mentions that type: never, if a kernel computes in float32, and
"signs" how often it allows for integers below zero, in ranges, divisions and indices: never, but in kernels over
triangles, which the compiler would give more registers without them.
"""


SHARED_KILOBYTES: Final = (99, 163, 227)
PROBLEMS: Final = (
    *(("full", D, K, False) for D, K in ((8, 16), (8, 64), (8, 128), (12, 64), (12, 100), (15, 64))),
    *((kind, D, 100, False) for kind, D in (("diag", 49), ("spherical", 64), ("spherical", 98))),
    *(("spherical", D, 100, True) for D in (64, 98)),
)
REACH_NOTE: Final = """Which problems fit the fused kernel, by the shared memory that a block may have: 99 KB on sm_86,
sm_89 and sm_120, 163 KB on sm_80, 227 KB on sm_90 and sm_100. Rows of a tile, and blocks that a multiprocessor runs at
once at least. "no": it does not fit. "products": it fits, but leaves a multiprocessor one block with three tasks of a
thread; there matrix products are taken while no crossover was measured.
"""


def reach() -> Iterator[list[str]]:
    """The rows of that table; the features of tied covariances are spherical ones in a whitened frame."""
    from emalgam_kernels.numba_cuda.device import REALS
    from emalgam_kernels.numba_cuda.fused import plan
    from emalgam_kernels.parameters import statistic_count

    for arithmetic in REALS:
        for kind, D, K, whitened in PROBLEMS:
            F = statistic_count(kind, D)
            ways = [plan(D, K, F, arithmetic, whitened, 1024 * n) for n in SHARED_KILOBYTES]
            fits = [f"{way.tile.T} × {way.blocks}{'' if way.busy else ', products'}" if way else "no" for way in ways]
            yield ["spherical, whitened" if whitened else kind, str(D), str(K), str(F), arithmetic, *fits]


def cells(found: Resources) -> list[str]:
    numbers = (
        found.threads,
        found.registers,
        found.blocks,
        found.shared_bytes,
        found.stack_bytes,
        found.spilled_bytes,
        found.float64,
        found.signs,
    )
    return [f"`{found.name}`", found.architecture, *map(str, numbers)]


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


if __name__ == "__main__":
    os.environ["NUMBA_ENABLE_CUDASIM"] = "0"  # the simulator compiles nothing
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("error")
    sys.exit(main())
