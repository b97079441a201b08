"""What a topic of the benchmarks reports, and how numbers, targets and tables are written; imports nothing slow."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.problems import Case


@dataclass(frozen=True)
class Target:
    """A figure, what it has to be and what it is: NaN if it was not measured, which misses every bound."""

    figure: str
    measured: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"

    def cells(self) -> list[str]:
        measured = "not measured" if math.isnan(self.measured) else f"{number(self.measured)}{self.unit}"
        return [self.figure, self.wanted, measured, verdict(self.met)]


@dataclass(frozen=True)
class Topic:
    """What one topic adds to RESULTS.md: sections, the figures that have a target, and details for its end."""

    sections: Sequence[str]
    targets: Sequence[Target] = ()
    details: Sequence[str] = ()


def number(value: float) -> str:
    """Three significant digits, without an exponent where there need be none."""
    digits = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in digits else digits


def milliseconds(seconds: float) -> str:
    return number(1e3 * seconds)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def size(N: int, D: int, K: int) -> str:
    return f"{N:,}, {D}, {K}".replace(f"{N:,}", f"{N:,}".replace(",", " "))


def describe(case: Case) -> str:
    return f"{size(*case.size)}, {case.covariance_type}, {case.dtype}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def judged(targets: Iterable[Target]) -> str:
    """The table of figures, what they have to be and what they are."""
    return table(["figure", "target", "measured", ""], (target.cells() for target in targets))


def say(text: str) -> None:
    """To standard error, at once."""
    print(text, file=sys.stderr, flush=True)
