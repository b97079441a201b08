"""These tests are collected where the CUDA kernels run: on a machine with a GPU, in Numba's simulator,
or on the emulator.

The compile gate is the opposite: it needs NVIDIA's compiler but no GPU, and the simulator compiles nothing.
EMALGAM_REQUIRED_BACKENDS=numba_cuda makes it an error that the kernels cannot run, as everywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import emalgam_kernels
from emalgam_kernels.numba_cuda import missing_compiler, missing_packages
from tests.conftest import SIMULATED, required_backends
from tests.emulator import EMULATED

COMPILE_GATE = "test_compile_gate.py"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be imported here; the report's header says why."""
    reason = emalgam_kernels.probe("numba_cuda")
    if reason is not None and "numba_cuda" in required_backends():
        raise pytest.Collector.CollectError(f"numba_cuda is in EMALGAM_REQUIRED_BACKENDS and cannot run here: {reason}")
    if collection_path.name == COMPILE_GATE:
        return True if SIMULATED or EMULATED or missing_packages() or missing_compiler() else None
    return True if reason is not None and collection_path.suffix == ".py" else None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few blocks that each has several tiles, and chunks of two sums."""
    from emalgam_kernels.numba_cuda import fused, products

    monkeypatch.setattr(fused, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(products, "ROWS_OF_A_SUM", products.COLUMN_STEP)
    monkeypatch.setattr(products, "MOST_ROWS", 2 * products.COLUMN_STEP)
