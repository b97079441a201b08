"""What importing the kernels loads, and what choosing a backend says."""

from __future__ import annotations

import json

import pytest

import emalgam_kernels
from emalgam_kernels import BACKENDS, FILES, HOMES, KERNELS, PREFERRED
from tests.processes import output_of

HEAVY = ("numba", "llvmlite", "scipy", "sklearn", "torch", "matplotlib", "pandas", "dask")


def modules_after(command: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after the command."""
    return set(json.loads(output_of(f"import json, sys\n{command}\nprint(json.dumps(sorted(sys.modules)))")))


def loaded_backends(modules: set[str]) -> set[str]:
    return {backend for backend in BACKENDS for file in FILES if f"emalgam_kernels.{backend}.{file}" in modules}


def test_import_loads_numpy_and_nothing_heavy() -> None:
    modules = modules_after("import emalgam_kernels")
    assert "numpy" in modules
    assert modules & set(HEAVY) == set()
    assert loaded_backends(modules) == set()


def test_probing_loads_nothing_heavy() -> None:
    modules = modules_after("import emalgam_kernels as k\nfor backend in k.BACKENDS: k.probe(backend)")
    assert modules & set(HEAVY) == set()
    assert loaded_backends(modules) == set()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_comes_from_the_first_backend_that_runs(kernel: str) -> None:
    first = next(backend for backend in PREFERRED if emalgam_kernels.probe(backend) is None)
    modules = modules_after(f"from emalgam_kernels import {kernel}")
    assert loaded_backends(modules) == {first}
    assert getattr(emalgam_kernels, kernel) is getattr(emalgam_kernels.load(first, HOMES[kernel]), kernel)
    assert not modules & set(HEAVY) or first == "numba_cpu"


def test_a_named_backend_loads_no_other(backend: str) -> None:
    modules = modules_after(f"import emalgam_kernels\nemalgam_kernels.load({backend!r})")
    assert loaded_backends(modules) == {backend}
    assert modules & {"sklearn", "torch", "matplotlib", "pandas", "dask"} == set()


def test_load_gives_a_module_with_all_kernels(backend: str) -> None:
    for file in FILES:
        module = emalgam_kernels.load(backend, file)
        assert [kernel for kernel in FILES[file] if not callable(getattr(module, kernel, None))] == []


def test_a_backend_that_cannot_run_says_why(no_gpu: str) -> None:
    assert emalgam_kernels.probe("numba_cuda") == no_gpu
    with pytest.raises(ImportError, match=rf"emalgam_kernels\.numba_cuda cannot run here: {no_gpu}"):
        emalgam_kernels.load("numba_cuda")


def test_a_backend_that_does_not_exist_is_an_error_with_the_names() -> None:
    message = "backend is 'nonsense'; expected one of reference, cython_cpu, numba_cpu, numba_cuda"
    with pytest.raises(ValueError, match=message):
        emalgam_kernels.load("nonsense")


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        emalgam_kernels.fit  # noqa: B018


def test_the_reason_why_numba_is_absent() -> None:
    program = """
import importlib.util, sys
found = importlib.util.find_spec
absent = ("numba", "emalgam_kernels.cython")
importlib.util.find_spec = lambda name, *rest: None if name.startswith(absent) else found(name)
import emalgam_kernels as k
assert "Numba is not installed" in k.probe("numba_cpu"), k.probe("numba_cpu")
assert "was not built" in k.probe("cython_cpu"), k.probe("cython_cpu")
try:
    k.load("numba_cpu")
except ImportError as error:
    assert "emalgam_kernels.numba_cpu cannot run here: Numba is not installed" in str(error), error
else:
    raise AssertionError("load did not raise")
from emalgam_kernels import log_prob
assert log_prob.__module__ == "emalgam_kernels.reference.mixture", log_prob.__module__
print("done")
"""
    assert output_of(program) == "done"
