"""What the benchmarks report, and what they say without their competitors."""

from __future__ import annotations

import sys

import pytest

from bench import peers
from bench.report import Results, render
from bench.tables import Target, Topic


def test_topics_come_in_order_and_targets_are_counted() -> None:
    fast = Topic(["## Fast\n"], [Target("speed", 3.0, 2.0, True, " ×")], ["## Each speed\n"])
    large = Topic(["## Large\n"], [Target("memory", 3.0, 2.0, False, " MiB")])
    text = render(Results({"processor": "abacus"}, [fast, large], 1.0, "today"))
    assert "1 of 2 targets met." in text
    assert "| speed | ≥ 2 × | 3 × | met |\n| memory | ≤ 2 MiB | 3 MiB | **missed** |" in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Machine", "## How", "## Fast", "## Large", "## All targets", "## Each speed"]


def test_without_torch_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert peers.absent() == ["torch"]
    with pytest.raises(ImportError, match=r"torch is not installed.*pip install -e '\.\[peers\]'"):
        peers.load_torch()
