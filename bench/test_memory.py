"""A fit of 2 000 000 × 8, K = 32 takes at most 64 MiB beyond X and the interpreter."""

from __future__ import annotations

import os
from typing import Final

import pytest

from bench import memory
from bench.libraries import EMALGAM

SMALL: Final = os.environ.get("EMALGAM_BENCH_SMALL") == "1"


@pytest.mark.parametrize("backend", EMALGAM)
def test_memory(backend: str) -> None:
    found = memory.measure(backend, smoke=SMALL)
    assert found.beyond <= memory.MOST, (
        f"the fit took {found.beyond:.1f} MiB beyond X and the interpreter; expected at most {memory.MOST}"
    )
