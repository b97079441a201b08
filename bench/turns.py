"""Timing that is fair: everyone in turn, after a pause, with the garbage collector out of the way."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

T = TypeVar("T")

PAUSE: Final = 0.2  # seconds: threads of the library before spin for a while after their last work


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes, with the garbage collector out of the way, and what it returns."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result
    finally:
        gc.enable()


def in_turns(measurements: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each measurement finds in every round.

    Who begins a round rotates, so that a slow minute of the machine hits all of them.
    """
    found: dict[str, list[T]] = {name: [] for name in measurements}
    names = list(measurements)
    for round_number in range(rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE)
            found[name].append(measurements[name]())
    return found
