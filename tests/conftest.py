"""Which combinations the tests run over, and what happens to a backend that is absent.

``EMALGAM_REQUIRED_BACKENDS=cython_cpu,numba_cpu`` makes the absence of a listed backend a failure. Without it, an
absent backend's tests are skipped one by one, each with its name and the reason, and the report's header says so too.

``EMALGAM_TESTED_BACKENDS=numba_cuda`` runs the tests that go over backends on the listed ones instead of those of the
CPU. With ``NUMBA_ENABLE_CUDASIM=1`` too, Numba interprets the CUDA kernels: no GPU is needed, but small data are. With
``EMALGAM_EMULATED_CUDA=1`` too, what the compiler made of them runs on an emulated GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Final

import pytest

import emalgam_kernels
from emalgam_kernels.numba_cuda import missing_packages
from tests.emulator import EMULATED


def listed(variable: str) -> tuple[str, ...]:
    """The names in an environment variable, between commas."""
    return tuple(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


CPU_BACKENDS: Final = ("reference", "cython_cpu", "numba_cpu")
TESTED_BACKENDS: Final = listed("EMALGAM_TESTED_BACKENDS") or CPU_BACKENDS
SIMULATED: Final = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
ON_A_GPU: Final = not (SIMULATED or EMULATED)  # where tests of a GPU run
DTYPES: Final = ("float64", "float32")
COVARIANCE_TYPES: Final = ("full", "tied", "diag", "spherical")
ALGORITHMS: Final = ("packed", "direct")
of_the_cpu: Final = pytest.mark.skipif(
    not set(TESTED_BACKENDS) & set(CPU_BACKENDS), reason="of kernels of the CPU, which are not those under test"
)

try:
    import hypothesis
except ImportError:  # the tests of the CUDA kernels do without it
    pass
else:
    hypothesis.settings.register_profile(
        "emalgam", deadline=None, derandomize=True, database=None, max_examples=20, print_blob=False
    )
    hypothesis.settings.load_profile("emalgam")


@dataclass(frozen=True)
class Variant:
    """One combination: backend, dtype of the data, covariance type, and for kernels how and in what they compute."""

    backend: str
    dtype: str
    covariance_type: str
    algorithm: str = "packed"
    arithmetic: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arithmetic", self.arithmetic or self.dtype)

    def __str__(self) -> str:
        arithmetic = self.dtype if self.arithmetic == self.dtype else f"{self.dtype} in {self.arithmetic}"
        return f"{self.backend}-{arithmetic}-{self.covariance_type}-{self.algorithm}"

    @property
    def kernels(self) -> ModuleType:
        """The backend's kernels."""
        return emalgam_kernels.load(self.backend)


def variants(algorithms: tuple[str, ...] = ALGORITHMS, backends: tuple[str, ...] = TESTED_BACKENDS) -> list[Variant]:
    """Every combination that the kernels know; ``parametrize("variant", variants(), indirect=True, ids=str)``."""
    arithmetics = [("float64", "float64"), ("float32", "float32"), ("float32", "float64")]
    return [
        Variant(backend, dtype, covariance_type, algorithm, arithmetic)
        for backend, (dtype, arithmetic), covariance_type, algorithm in product(
            backends, arithmetics, COVARIANCE_TYPES, algorithms
        )
    ]


def required_backends() -> list[str]:
    """The names in EMALGAM_REQUIRED_BACKENDS; one that no version of emalgam has is an error."""
    return known_backends("EMALGAM_REQUIRED_BACKENDS")


def known_backends(variable: str) -> list[str]:
    """The names in an environment variable, each of a backend."""
    unknown = sorted(set(listed(variable)) - set(emalgam_kernels.BACKENDS))
    if unknown:
        known = ", ".join(emalgam_kernels.BACKENDS)
        raise pytest.UsageError(f"{variable} names {', '.join(unknown)}; expected some of {known}")
    return list(listed(variable))


def need(backend: str) -> None:
    """Go on if `backend` runs here; else fail if it is required, or skip the one test and say why."""
    reason = emalgam_kernels.probe(backend)
    if reason is None:
        return
    if backend in required_backends():
        pytest.fail(f"{backend} is in EMALGAM_REQUIRED_BACKENDS and cannot run here: {reason}", pytrace=False)
    pytest.skip(f"{backend} cannot run here: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    required_backends()
    known_backends("EMALGAM_TESTED_BACKENDS")
    if SIMULATED and EMULATED:
        raise pytest.UsageError("NUMBA_ENABLE_CUDASIM and EMALGAM_EMULATED_CUDA are both 1; unset one of them")
    if (SIMULATED or EMULATED) and missing_packages() is None:
        take_the_place_of_a_gpu()


def take_the_place_of_a_gpu() -> None:
    """Before anything is imported that launches kernels."""
    import torch

    torch.set_num_threads(1)  # products are small here, and threads wait for each other without rest
    if SIMULATED:
        from tests.simulator import take_turns

        take_turns()
    else:
        from tests.emulator.machine import install

        install()


def pytest_report_header(config: pytest.Config) -> list[str]:
    required = required_backends()
    lines = [
        f"{backend}: {emalgam_kernels.probe(backend) or 'available'}{' (required)' if backend in required else ''}"
        for backend in emalgam_kernels.BACKENDS
    ]
    if SIMULATED:
        lines.append("numba_cuda: in Numba's simulator, without large data")
    if EMULATED:
        lines.append("numba_cuda: on an emulated GPU")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "required_backend" in metafunc.fixturenames:
        metafunc.parametrize("required_backend", required_backends() or ["reference"])


@pytest.fixture(
    scope="session", params=[Variant(*each) for each in product(TESTED_BACKENDS, DTYPES, COVARIANCE_TYPES)], ids=str
)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Backend × dtype × covariance type; a test may parametrize it indirectly with `variants(...)`."""
    need(request.param.backend)
    return request.param


@pytest.fixture(scope="session", params=TESTED_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that runs here."""
    need(request.param)
    return request.param


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The reason why numba_cuda cannot run, on a machine with a GPU too."""
    reason = "no NVIDIA driver: install the driver of the GPU"
    monkeypatch.setattr("emalgam_kernels.numba_cuda.probe", lambda: reason)
    return reason


@pytest.fixture(scope="session")
def cython_cpu() -> ModuleType:
    """The compiled kernels."""
    need("cython_cpu")
    return emalgam_kernels.load("cython_cpu")


@pytest.fixture
def simd_level(request: pytest.FixtureRequest, cython_cpu: ModuleType) -> Iterator[str]:
    """Runs the test on one SIMD level of the compiled kernels (parametrize it indirectly), and restores the best."""
    yield cython_cpu.select_simd_level(request.param)
    cython_cpu.select_simd_level(os.environ.get("EMALGAM_SIMD"))
