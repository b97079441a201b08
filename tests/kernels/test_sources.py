"""What Numba keeps on disk counts while its sources stay: every file that a kernel is compiled from is among them."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import need

PACKAGE = "emalgam_kernels."


def modules_of_functions(module: ModuleType) -> set[ModuleType]:
    """Where the compiled functions are defined that a module uses, and those that they use."""
    from numba.core.dispatcher import Dispatcher

    found: set[ModuleType] = set()
    seen, waiting = {module}, [module]
    while waiting:
        functions: list[Any] = [each for each in vars(waiting.pop()).values() if isinstance(each, Dispatcher)]
        found |= {import_module(each.py_func.__module__) for each in functions}
        waiting += [each for each in found if each not in seen]
        seen |= found
    return {each for each in found if each.__name__.startswith(PACKAGE)}


@pytest.mark.parametrize("name", ["batch", "kl"])
def test_all_sources_count(name: str) -> None:
    need("numba_cpu")
    module: Any = import_module(f"emalgam_kernels.numba_cpu.{name}")
    files = {inspect.getsourcefile(each) for each in module._SOURCES}
    missing = [each.__name__ for each in modules_of_functions(module) if inspect.getsourcefile(each) not in files]
    assert not missing, f"{name}.py compiles functions of {missing}, which are not in its _SOURCES"
