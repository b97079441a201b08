"""Which device and which versions, and how fast the device copies and multiplies."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch

from bench.gpu_clock import Run
from bench.tables import number, table
from emalgam_kernels.numba_cuda.device import float32_products

PACKAGES: Final = ("numpy", "scipy", "numba", "numba-cuda", "torch", "cuda-toolkit", "scikit-learn", "pytest")
MATRIX_SIZE: Final = 8192
COPY_BYTES: Final = 4 * 2**30
PINNED_BYTES: Final = 2**29


def describe(run: Run) -> dict[str, str]:
    """The device and the versions of what runs on it."""
    found = {"device": "none: torch's CPU tensors and Numba's simulator"} if run.dry else _device(run.device)
    return {
        **found,
        "CUDA of torch": str(torch.version.cuda),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Python": platform.python_version(),
        "operating system": platform.platform(),
        "emalgam": _emalgam_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _device(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2 cache": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB",
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} of nvidia-smi)"
    return answer.strip().splitlines()[0]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _emalgam_version() -> str:
    import emalgam

    return str(emalgam.__version__)


# ---- limits


@dataclass(frozen=True)
class Limits:
    """What no program on this device can be faster than.

    Attributes
    ----------
    copy : float
        Bytes per second from device memory to device memory, read and written.
    pinned : float
        Bytes per second from pinned main memory to the device.
    products : dict of str to float
        Floating-point operations per second of a large matrix product in float32, TF32 and float64.
    """

    copy: float
    pinned: float
    products: dict[str, float]

    def text(self) -> str:
        """The section of the report."""
        size = f"{MATRIX_SIZE} × {MATRIX_SIZE}"
        rows = [
            ["copy on the device, bytes read and written", f"{number(self.copy / 1e9)} GB/s"],
            ["copy from pinned main memory", f"{number(self.pinned / 1e9)} GB/s"],
            *(
                [f"torch.matmul {size}, {name}", f"{number(rate / 1e12)} Tflop/s"]
                for name, rate in self.products.items()
            ),
        ]
        return table(["limit", ""], rows)


def measure(run: Run) -> Limits:
    """Copies and products of random numbers; zeros would be faster."""
    rates = {
        name: _product(run, dtype, tf32)
        for name, dtype, tf32 in (
            ("float32", torch.float32, False),
            ("TF32", torch.float32, True),
            ("float64", torch.float64, False),
        )
    }
    run.free()
    found = Limits(_copy(run), _pinned(run), rates)
    run.free()
    return found


def _copy(run: Run) -> float:
    elements = (2**20 if run.dry else COPY_BYTES) // 4
    source = torch.rand(elements, device=run.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / run.seconds(lambda: target.copy_(source))


def _pinned(run: Run) -> float:
    elements = (2**20 if run.dry else PINNED_BYTES) // 4
    source = torch.rand(elements, pin_memory=not run.dry)
    target = torch.empty(elements, device=run.device)
    return source.nbytes / run.seconds(lambda: target.copy_(source, non_blocking=True))


def _product(run: Run, dtype: torch.dtype, tf32: bool) -> float:
    n = 128 if run.dry else MATRIX_SIZE
    left, right = (torch.randn(n, n, dtype=dtype, device=run.device) for _ in range(2))
    out = torch.empty_like(left)
    with float32_products(tf32):
        return 2 * n**3 / run.seconds(lambda: torch.matmul(left, right, out=out))
