"""Kernels compiled by Numba for NVIDIA GPUs; torch owns memory, streams and matrix products.

This file only finds out whether they can run, without importing Numba or torch, which takes seconds.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

LOWEST_CAPABILITY: Final = (8, 0)
COMPILER: Final = ("nvvm", "nvrtc", "nvJitLink")  # NVIDIA's libraries that turn Numba's output into machine code
INSTALL: Final = 'pip install --upgrade "emalgam[cuda]"'

# Of cuda.h; error 100 is that of a driver that sees no device.
NO_DEVICE: Final = 100
CAPABILITY_MAJOR: Final = 75
CAPABILITY_MINOR: Final = 76


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says of itself.

    Attributes
    ----------
    cuda : (major, minor)
        The newest CUDA version that it runs.
    error : str
        The error with which it did not start; empty if it did.
    capabilities : tuple of (major, minor)
        Compute capability of each visible device.
    """

    cuda: tuple[int, int]
    error: str
    capabilities: tuple[tuple[int, int], ...]


def probe() -> str | None:
    """Why this backend cannot run here and what to do about it; None if it can.

    In Numba's simulator (NUMBA_ENABLE_CUDASIM=1) only the packages have to be there.
    """
    reason = missing_packages()
    if reason is not None or os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return reason
    if os.environ.get("NUMBA_DISABLE_CUDA", "0") != "0":
        return "the environment variable NUMBA_DISABLE_CUDA turns Numba's CUDA off: unset it"
    if _ran_with is load_driver:
        return None
    reason = missing_device() or missing_compiler() or torch_without_cuda()
    if reason is None:
        _remember(load_driver)
    return reason


_ran_with: Any = None  # to ask the driver takes a millisecond, and its yes holds for the process


def _remember(driver: Any) -> None:
    global _ran_with
    _ran_with = driver


def missing_packages() -> str | None:
    """Which packages are not installed."""
    names = "numba", "numba_cuda", "torch", "cuda.core"
    missing = [name for name in names if find_spec(name.partition(".")[0]) is None or find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: {INSTALL}" if missing else None


# ---- the driver and its devices


def missing_device() -> str | None:
    """Why no device of this machine can run the kernels."""
    try:
        driver = ask(load_driver())
    except OSError as error:
        return (
            f"no NVIDIA driver ({error}): install the driver of the GPU; a container needs access to the one outside "
            "(docker run --gpus all)"
        )
    return too_old(driver) or no_device(driver) or too_weak(driver)


def load_driver() -> Any:
    """The driver's library; OSError if there is none."""
    return ctypes.CDLL("libcuda.so.1")


def ask(library: Any) -> Driver:
    """What the driver says; only its start is an error that has a name here, the rest cannot fail after it."""
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = divmod(number.value // 10, 100)
    status = library.cuInit(0)
    if status not in (0, NO_DEVICE):
        return Driver(cuda, error_name(library, status), ())
    if status == NO_DEVICE:
        return Driver(cuda, "", ())
    library.cuDeviceGetCount(ctypes.byref(number))
    return Driver(cuda, "", tuple(capability(library, ordinal) for ordinal in range(number.value)))


def error_name(library: Any, status: int) -> str:
    """As in NVIDIA's documentation: "CUDA_ERROR_SYSTEM_NOT_READY"."""
    name = ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {status}"


def capability(library: Any, ordinal: int) -> tuple[int, int]:
    """Compute capability of one device."""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), ordinal)
    library.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    return major.value, minor.value


def too_old(driver: Driver) -> str | None:
    """A driver runs what was built for its own major version of CUDA or an older one; PTX, for its own version."""
    for name, needed in {"CUDA toolkit": toolkit_version(), "torch": torch_version()}.items():
        if needed is not None and needed[0] > driver.cuda[0]:
            return (
                f"the NVIDIA driver runs CUDA {dotted(driver.cuda)} and the installed {name} is for CUDA "
                f"{dotted(needed)}: update the driver or install numba-cuda[cu{driver.cuda[0]}] and a torch for CUDA "
                f"{driver.cuda[0]}"
            )
    toolkit = toolkit_version()
    if toolkit is not None and toolkit > driver.cuda:
        return (
            f"the NVIDIA driver runs CUDA {dotted(driver.cuda)} and the installed CUDA toolkit is for CUDA "
            f"{dotted(toolkit)}, whose PTX it refuses: update the driver or pip install "
            f'"cuda-toolkit=={dotted(driver.cuda)}.*" "nvidia-nvjitlink=={dotted(driver.cuda)}.*"'
        )
    return None


def no_device(driver: Driver) -> str | None:
    if driver.error:
        return f"the NVIDIA driver did not start ({driver.error}): nvidia-smi may say more"
    if driver.capabilities:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"the NVIDIA driver shows no GPU while CUDA_VISIBLE_DEVICES is {visible!r}: unset it or name a GPU"
    return "the NVIDIA driver sees no GPU: nvidia-smi may say more"


def too_weak(driver: Driver) -> str | None:
    if max(driver.capabilities) >= LOWEST_CAPABILITY:
        return None
    return (
        f"the GPU has compute capability {dotted(max(driver.capabilities))} and the kernels need "
        f"{dotted(LOWEST_CAPABILITY)} or more (an A100 or newer): choose a backend of the CPU"
    )


def dotted(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"


# ---- what has to be installed beside Numba


def missing_compiler() -> str | None:
    """Which of NVIDIA's compiler libraries numba-cuda will not find, wherever it looks: packages, CUDA_HOME, system."""
    if find_spec("cuda") is None or find_spec("cuda.pathfinder") is None:
        return f"cuda-pathfinder is not installed, with which numba-cuda finds NVIDIA's compiler: {INSTALL}"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    missing = []
    for name in COMPILER:
        try:
            load_nvidia_dynamic_lib(name)
        except DynamicLibNotFoundError:
            missing.append(f"lib{name}")
    return f"NVIDIA's compiler is not installed ({', '.join(missing)} not found): {INSTALL}" if missing else None


def toolkit_version() -> tuple[int, int] | None:
    """Major and minor version of the CUDA toolkit that pip installed; None if the compiler came another way."""
    try:
        major, minor = version("cuda-toolkit").split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def torch_version() -> tuple[int, int] | None:
    """The CUDA version that the installed torch is for; None if it is for none, or does not say."""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", torch_version_file(), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def torch_without_cuda() -> str | None:
    """torch's packages for the CPU have the same name."""
    if not re.search(r"^cuda\b[^=\n]*=\s*None", torch_version_file(), re.MULTILINE):
        return None
    return (
        f"torch {version('torch')} is built without CUDA: pip install --force-reinstall torch "
        "--index-url https://download.pytorch.org/whl/cu130"
    )


def torch_version_file() -> str:
    """torch/version.py as text; empty if it is not where it is expected."""
    found = find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""
