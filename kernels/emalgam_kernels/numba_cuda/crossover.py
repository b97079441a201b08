"""Which of the two ways is faster for packed parameters: the fused kernel, or cuBLAS products with features in memory.

``crossover.json`` is a table that ``python bench/run_on_gpu.py --crossover`` measures and writes: for each arithmetic
type, pairs (F, K): up to F statistics the fused kernel was faster while there were at most K components.

An empty table means that none was measured. Then the fused kernel takes what fits it and leaves a multiprocessor
something to do while threads wait: one task of 4 × 4 statistics on a thread (F K up to 4096), or two blocks at once by
their registers and shared memory. Beyond that one block with all registers would wait at each of its barriers.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def table() -> dict[str, Any]:
    """The file: device, date, and a list of [F, K] for each arithmetic type."""
    loaded: dict[str, Any] = json.loads((files(__package__) / "crossover.json").read_text(encoding="utf-8"))
    return loaded


def fused_is_faster(n_statistics: int, n_components: int, arithmetic: str, by_default: bool) -> bool:
    """Whether the table prefers the fused kernel, which has to fit too; `by_default` if the table is empty.

    >>> fused_is_faster(6, 4, "float32", by_default=True)
    True
    """
    measured = table()[arithmetic]
    return any(n_statistics <= F and n_components <= K for F, K in measured) if measured else by_default
