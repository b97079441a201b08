"""A backend that the environment requires and that is absent is a failure, never a skip that looks green."""

from __future__ import annotations

from pathlib import Path

import pytest

import emalgam_kernels
from tests.conftest import CPU_BACKENDS
from tests.processes import python

TESTS = Path(__file__).parent
CONTRACT = "kernels/test_contract.py::test_required_backend_is_here"


def report(required: str) -> tuple[int, str]:
    """Exit status and output of a pytest that requires the backends."""
    arguments = ("-m", "pytest", "-p", "no:cacheprovider", "-v", str(TESTS / CONTRACT))
    finished = python(*arguments, folder=TESTS.parent, environment={"EMALGAM_REQUIRED_BACKENDS": required})
    return finished.returncode, finished.stdout + finished.stderr


def test_an_absent_backend_that_is_required_fails() -> None:
    status, output = report("reference,numba_cuda")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    reason = emalgam_kernels.probe("numba_cuda")
    assert f"numba_cuda is in EMALGAM_REQUIRED_BACKENDS and cannot run here: {reason}" in output
    assert f"numba_cuda: {reason} (required)" in output
    assert "1 failed, 1 passed" in output


def test_backends_that_run_here_pass() -> None:
    names = [name for name in CPU_BACKENDS if emalgam_kernels.probe(name) is None]
    status, output = report(", ".join(names))
    assert status == pytest.ExitCode.OK, output
    assert f"{len(names)} passed" in output


def test_a_name_that_no_backend_has_is_an_error() -> None:
    status, output = report("cython")
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "EMALGAM_REQUIRED_BACKENDS names cython; expected some of reference, cython_cpu, numba_cpu" in output
