"""Documentation examples run in an empty folder, so that they leave no file behind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import emalgam_kernels

# torch is no dependency: `make test-torch` installs it and names these tests, and finds none without it.
collect_ignore = []
if not find_spec("torch"):
    collect_ignore += ["tests/torch", "src/emalgam/nn"]
    collect_ignore += [f"src/emalgam/cli/autoencoder_{what}.py" for what in ("training", "generation")]

# Nor is Dask: `make test-dask`.
if not (find_spec("dask") and find_spec("distributed")):
    collect_ignore += ["tests/dask", "src/emalgam/distributed.py", "src/emalgam/dask_parts.py"]

# Nor is numba-cuda: the documentation of its kernels runs where they do (`make test-cuda`: in the simulator).
# tests/cuda/conftest.py is about their tests.
collect_ignore_glob = (
    [] if emalgam_kernels.probe("numba_cuda") is None else ["kernels/emalgam_kernels/numba_cuda/[a-z]*.py"]
)


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)
