"""A backend that the environment requires and that is absent is a failure, never a skip that looks green."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import emalgam_kernels
from tests.conftest import CPU_BACKENDS
from tests.processes import python

TESTS = Path(__file__).parent
CONTRACT = "kernels/test_contract.py::test_required_backend_is_here"


def report(required: str, tests: Path = TESTS / CONTRACT, **environment: str) -> tuple[int, str]:
    """Exit status and output of a pytest that requires the backends, on a machine without a GPU."""
    arguments = ("-m", "pytest", "-p", "no:cacheprovider", "-v", str(tests))
    without_gpu = {"NUMBA_DISABLE_CUDA": "1", "NUMBA_ENABLE_CUDASIM": "0"}
    environment = without_gpu | {"EMALGAM_REQUIRED_BACKENDS": required} | environment
    finished = python(*arguments, folder=TESTS.parent, environment=environment)
    return finished.returncode, finished.stdout + finished.stderr


def test_an_absent_backend_that_is_required_fails() -> None:
    status, output = report("reference,numba_cuda")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    told = re.search(r"^numba_cuda: (.+) \(required\)$", output, re.MULTILINE)
    assert told, output
    assert f"numba_cuda is in EMALGAM_REQUIRED_BACKENDS and cannot run here: {told[1]}" in output
    assert "1 failed, 1 passed" in output


def test_tests_of_an_absent_backend_that_is_required_are_not_passed_over() -> None:
    status, output = report("numba_cuda", TESTS / "cuda")
    assert status == pytest.ExitCode.INTERRUPTED, output
    assert "numba_cuda is in EMALGAM_REQUIRED_BACKENDS and cannot run here: " in output


def test_backends_that_run_here_pass() -> None:
    names = [name for name in CPU_BACKENDS if emalgam_kernels.probe(name) is None]
    status, output = report(", ".join(names))
    assert status == pytest.ExitCode.OK, output
    assert f"{len(names)} passed" in output


def test_only_the_backends_that_are_named_are_tested() -> None:
    contract = TESTS / "kernels" / "test_contract.py"
    status, output = report("reference", contract, EMALGAM_TESTED_BACKENDS="reference")
    assert status == pytest.ExitCode.OK, output
    assert "test_no_rows[reference-log_prob]" in output
    assert "test_no_rows[cython_cpu-" not in output


@pytest.mark.parametrize("variable", ["EMALGAM_REQUIRED_BACKENDS", "EMALGAM_TESTED_BACKENDS"])
def test_a_name_that_no_backend_has_is_an_error(variable: str) -> None:
    status, output = report("reference", **{variable: "cython"})
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert f"{variable} names cython; expected some of reference, cython_cpu, numba_cpu" in output
