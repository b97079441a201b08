"""The tests on a GPU and its benchmark need numpy, scipy, numba, numba-cuda, torch and pytest, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.emulator import EMULATED

ROOT = Path(__file__).parents[2]
ABSENT = (
    "sklearn", "threadpoolctl", "hypothesis", "safetensors", "pyarrow", "typer", "rich", "pandas", "polars",
    "matplotlib", "PIL", "pytest_benchmark", "daal4py", "Cython", "array_api_compat",
)  # fmt: skip
ENVIRONMENT = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
HIDE = f"""
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "src")!r}, {str(ROOT / "kernels")!r}]
{"from tests.emulator.machine import install; install()" if EMULATED else ""}
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code], cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_are_collected() -> None:
    parts = "contract", "mixture", "kl", "philox", "sampling"
    names = ["tests/cuda", *(f"tests/kernels/test_{part}.py" for part in parts)]
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    run(f"import pytest; sys.exit(pytest.main({[*options, *names]!r}))")


def test_the_benchmark_is_imported() -> None:
    names = "figures", "divergence", "sampling", "crossover", "machine"
    run("import bench.run_on_gpu, bench.torch_em, " + ", ".join(f"bench.gpu_{name}" for name in names))


def test_a_fit() -> None:
    code = """
import numpy as np, emalgam
x = np.repeat([[0.0], [1.0], [9.0], [10.0]], 2, axis=0)
print(emalgam.fit(x, 2, backend="numba_cuda", max_iter=2, tol=9.0, random_state=0).backend)
"""
    assert run(code) == "numba_cuda\n"


def test_divergences() -> None:
    code = """
import numpy as np, emalgam
p, q = emalgam.Gaussian(np.array([[0.0], [1.0]]), np.array([[1.0]])), emalgam.Gaussian(0.0, 1.0)
print(*(kl(p, q, backend="numba_cuda") for kl in (emalgam.divergence.kl, emalgam.divergence.kl_all_pairs)))
"""
    assert run(code) == "[0.  0.5] [0.  0.5]\n"
