"""Why numba_cuda cannot run: each reason says what is wrong and what to do. The driver's answers are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from emalgam_kernels import numba_cuda
from tests.processes import output_of


class FakeDriver:
    """libcuda.so.1 as ctypes gives it: functions that return a status and write through pointers."""

    def __init__(
        self,
        cuda: int = 13000,
        status: int = 0,
        name: bytes = b"",
        capabilities: tuple[tuple[int, int], ...] = ((9, 0),),
    ) -> None:
        self.cuda, self.status, self.name, self.capabilities = cuda, status, name, capabilities

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.cuda
        return 0

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.status

    def cuGetErrorName(self, status: int, out: Any) -> int:
        assert status == self.status
        out._obj.value = self.name or None
        return 0 if self.name else 1

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, out: Any, ordinal: int) -> int:
        out._obj.value = 40 + ordinal  # a handle, not the ordinal
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> int:
        out._obj.value = self.capabilities[device.value - 40][{75: 0, 76: 1}[attribute]]
        return 0


Setup = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A machine on which the kernels run, but for what the test names."""

    def set_up(
        driver: FakeDriver | OSError | None = None,
        absent: tuple[str, ...] = (),
        toolkit: tuple[int, int] | None = (13, 0),
        torch_version_file: str = "cuda: Optional[str] = '13.0'\n",
        compiler: str | None = None,
    ) -> None:
        def load_driver() -> FakeDriver:
            if isinstance(driver, OSError):
                raise driver
            return driver or FakeDriver()

        for name in ("CUDA_VISIBLE_DEVICES", "NUMBA_ENABLE_CUDASIM", "NUMBA_DISABLE_CUDA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(numba_cuda, "load_driver", load_driver)
        monkeypatch.setattr(numba_cuda, "find_spec", lambda name: None if name in absent else object())
        monkeypatch.setattr(numba_cuda, "toolkit_version", lambda: toolkit)
        monkeypatch.setattr(numba_cuda, "torch_version_file", lambda: torch_version_file)
        monkeypatch.setattr(numba_cuda, "version", lambda name: "2.13.0+cpu")
        monkeypatch.setattr(numba_cuda, "missing_compiler", lambda: compiler)

    return set_up


def test_everything_is_there(machine: Setup) -> None:
    machine()
    assert numba_cuda.probe() is None


def test_packages(machine: Setup) -> None:
    machine(absent=("numba_cuda", "torch"), driver=OSError("not asked"))
    assert numba_cuda.probe() == 'numba_cuda and torch not installed: pip install --upgrade "emalgam[cuda]"'


@pytest.mark.parametrize("absent", ["cuda", "cuda.core"])
def test_what_launches_kernels(machine: Setup, absent: str) -> None:
    """cuda.core is looked for in a package that may not be there either."""
    machine(absent=(absent,))
    assert numba_cuda.probe() == 'cuda.core not installed: pip install --upgrade "emalgam[cuda]"'


def test_the_simulator_needs_packages_only(machine: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(driver=OSError("not asked"), torch_version_file="cuda: Optional[str] = None\n", compiler="not asked")
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert numba_cuda.probe() is None
    machine(absent=("torch",))
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert numba_cuda.probe() == 'torch not installed: pip install --upgrade "emalgam[cuda]"'


def test_cuda_turned_off(machine: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setenv("NUMBA_DISABLE_CUDA", "1")
    assert numba_cuda.probe() == "the environment variable NUMBA_DISABLE_CUDA turns Numba's CUDA off: unset it"


def test_no_driver(machine: Setup) -> None:
    machine(driver=OSError("libcuda.so.1: cannot open shared object file"))
    assert numba_cuda.probe() == (
        "no NVIDIA driver (libcuda.so.1: cannot open shared object file): install the driver of the GPU; a container "
        "needs access to the one outside (docker run --gpus all)"
    )


def test_driver_older_than_the_toolkit(machine: Setup) -> None:
    machine(driver=FakeDriver(cuda=12040))
    assert numba_cuda.probe() == (
        "the NVIDIA driver runs CUDA 12.4 and the installed CUDA toolkit is for CUDA 13.0: "
        "update the driver or install numba-cuda[cu12] and a torch for CUDA 12"
    )


def test_driver_older_than_torch(machine: Setup) -> None:
    machine(driver=FakeDriver(cuda=12080), toolkit=None)
    assert numba_cuda.probe() == (
        "the NVIDIA driver runs CUDA 12.8 and the installed torch is for CUDA 13.0: "
        "update the driver or install numba-cuda[cu12] and a torch for CUDA 12"
    )


def test_driver_older_than_the_toolkit_by_a_minor_version(machine: Setup) -> None:
    machine(driver=FakeDriver(cuda=13000), toolkit=(13, 2))
    assert numba_cuda.probe() == (
        "the NVIDIA driver runs CUDA 13.0 and the installed CUDA toolkit is for CUDA 13.2, whose PTX it refuses: "
        'update the driver or pip install "cuda-toolkit==13.0.*" "nvidia-nvjitlink==13.0.*"'
    )


@pytest.mark.parametrize("cuda", [13000, 13020, 14010])
def test_newer_drivers_run_older_toolkits(machine: Setup, cuda: int) -> None:
    machine(driver=FakeDriver(cuda=cuda))
    assert numba_cuda.probe() is None


@pytest.mark.parametrize(
    ("name", "told"), [(b"CUDA_ERROR_SYSTEM_NOT_READY", "CUDA_ERROR_SYSTEM_NOT_READY"), (b"", "error 802")]
)
def test_driver_that_does_not_start(machine: Setup, name: bytes, told: str) -> None:
    machine(driver=FakeDriver(status=802, name=name))
    assert numba_cuda.probe() == f"the NVIDIA driver did not start ({told}): nvidia-smi may say more"


@pytest.mark.parametrize("driver", [FakeDriver(status=100), FakeDriver(capabilities=())], ids=["cuInit", "count"])
def test_no_device(machine: Setup, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(driver=driver)
    assert numba_cuda.probe() == "the NVIDIA driver sees no GPU: nvidia-smi may say more"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert numba_cuda.probe() == (
        "the NVIDIA driver shows no GPU while CUDA_VISIBLE_DEVICES is '': unset it or name a GPU"
    )


def test_device_too_weak(machine: Setup) -> None:
    machine(driver=FakeDriver(capabilities=((6, 1), (7, 5))))
    assert numba_cuda.probe() == (
        "the GPU has compute capability 7.5 and the kernels need 8.0 or more (an A100 or newer): "
        "choose a backend of the CPU"
    )
    machine(driver=FakeDriver(capabilities=((7, 5), (8, 6))))
    assert numba_cuda.probe() is None


def test_no_compiler(machine: Setup) -> None:
    machine(compiler="NVIDIA's compiler is not installed")
    assert numba_cuda.probe() == "NVIDIA's compiler is not installed"


def test_what_the_compiler_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def load(name: str) -> None:
        if name != "nvrtc":
            raise pathfinder.DynamicLibNotFoundError(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", load)
    assert numba_cuda.missing_compiler() == (
        'NVIDIA\'s compiler is not installed (libnvvm, libnvJitLink not found): pip install --upgrade "emalgam[cuda]"'
    )


@pytest.mark.parametrize("absent", ["cuda", "cuda.pathfinder"])
def test_no_pathfinder(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: None if name == absent else object())
    assert numba_cuda.missing_compiler() == (
        "cuda-pathfinder is not installed, with which numba-cuda finds NVIDIA's compiler: "
        'pip install --upgrade "emalgam[cuda]"'
    )


def test_torch_for_the_cpu(machine: Setup) -> None:
    machine(torch_version_file="__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    assert numba_cuda.probe() == (
        "torch 2.13.0+cpu is built without CUDA: pip install --force-reinstall torch "
        "--index-url https://download.pytorch.org/whl/cu130"
    )


def test_torch_that_does_not_say(machine: Setup) -> None:
    machine(torch_version_file="")
    assert numba_cuda.probe() is None


def test_the_version_file_is_that_of_torch() -> None:
    """What torch says of itself when it is imported."""
    pytest.importorskip("torch")
    program = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))"
    release, cuda = json.loads(output_of(program))
    assert f"__version__ = '{release}'" in numba_cuda.torch_version_file()
    assert (numba_cuda.torch_without_cuda() is None) == (cuda is not None)
    found = numba_cuda.torch_version()
    assert (found and f"{found[0]}.{found[1]}") == cuda


def test_version_of_the_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cuda, "version", {"cuda-toolkit": "12.9.1.0"}.__getitem__)
    assert numba_cuda.toolkit_version() == (12, 9)

    def none(name: str) -> str:
        raise numba_cuda.PackageNotFoundError(name)

    monkeypatch.setattr(numba_cuda, "version", none)
    assert numba_cuda.toolkit_version() is None
