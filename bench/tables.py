"""How the benchmarks write numbers, targets and tables; imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.problems import Case


@dataclass(frozen=True)
class Target:
    """A figure, what it has to be and what it is."""

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
        return [self.figure, self.wanted, f"{number(self.measured)}{self.unit}", verdict(self.met)]


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
