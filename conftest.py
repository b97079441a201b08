"""Documentation examples run in an empty folder, so that they leave no file behind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

# torch is no dependency: `make test-torch` installs it and names these tests, and finds none without it.
collect_ignore = [] if find_spec("torch") else ["tests/torch"]


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)
