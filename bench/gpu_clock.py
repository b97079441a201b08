"""The device, its clock, and the time that a whole run may take."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, TypeVar

import torch

T = TypeVar("T")

REPEATS: Final = 7
WARMUPS: Final = 2


class NotMeasuredError(Exception):
    """Why something cannot be measured here; no fault of emalgam's."""


@dataclass(frozen=True)
class Missing:
    """Why there is no measurement."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass
class Run:
    """One run of the benchmark.

    Attributes
    ----------
    dry : bool
        Small problems on the CPU, the kernels in Numba's simulator: every line runs, no number means anything.
    device : torch.device
    end : float
        When it has to be over, on `time.perf_counter`.
    failures : list of str
        What went wrong, a line each.
    """

    dry: bool
    device: torch.device
    end: float
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.perf_counter()

    def attempt(self, what: str, function: Callable[[], T], needs: float = 0.0) -> T | Missing:
        """What `function` returns, if `needs` seconds are left for it and it does not fail; else the reason."""
        if self.left < needs:
            return Missing("not measured: out of time")
        try:
            return function()
        except NotMeasuredError as reason:
            return Missing(f"not measured: {reason}")
        except Exception as error:  # whatever it is belongs into the report, and the rest is to go on
            traceback.print_exc()
            self.failures.append(f"{what}: {shortened(error)}")
            return Missing(f"failed: {shortened(error)}")

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back memory that nothing uses any more."""
        if not self.dry:
            torch.cuda.empty_cache()

    def wall(self, function: Callable[[], Any]) -> float:
        """Seconds by the wall clock until the device has done what `function` asks for: where the host takes part."""
        self.synchronize()
        started = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - started

    def seconds(self, function: Callable[[], Any], repeats: int = REPEATS, warmups: int = WARMUPS) -> float:
        """Seconds on the device, by CUDA events around each call: the median, after some calls that do not count."""
        if self.dry:
            return median(self.wall(function) for _ in range(2))
        for _ in range(warmups):
            function()
        spans = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in spans) / 1e3


def shortened(error: BaseException) -> str:
    """An error in one line that fits a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".replace("|", "/")
