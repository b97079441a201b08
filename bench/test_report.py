"""What the benchmarks report, and what they say without their competitors."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from bench import peers
from bench.report import TOPICS, Record, load_all, render, save
from bench.tables import Target, Topic

FAST = Topic(["## Fast\n"], [Target("speed", 3.0, 2.0, True, " ×")], ["## Each speed\n"])
LARGE = Topic(["## Large\n"], [Target("memory", 3.0, 2.0, False, " MiB")])
OLD = Record(LARGE, {"processor": "abacus", "torch": "1"}, "2026-01-01 09:00 UTC", 1.0)
NEW = Record(FAST, {"processor": "abacus", "torch": "2"}, "2026-01-02 09:00 UTC", 1.0)


def test_topics_come_in_order_and_targets_are_counted() -> None:
    text = render({"fast": NEW, "large": OLD})
    assert "1 of 2 targets met." in text
    assert "| speed | ≥ 2 × | 3 × | met |\n| memory | ≤ 2 MiB | 3 MiB | **missed** |" in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Machine", "## How", "## When", "## Fast", "## Large", "## All targets", "## Each speed"]


def test_a_figure_that_is_missing_is_missed() -> None:
    assert Target("speed", math.nan, 2.0, True, " ×").cells() == ["speed", "≥ 2 ×", "not measured", "**missed**"]
    assert not Target("memory", math.nan, 2.0, False, " MiB").met


def test_without_dask_the_cluster_is_a_missing_figure_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    topic = TOPICS["cluster"](True)
    assert [target.cells()[2:] for target in topic.targets] == [["not measured", "**missed**"]]
    reason = "not measured: a cluster needs Dask"
    assert reason in capsys.readouterr().err
    assert reason in topic.sections[0]
    assert 'pip install "emalgam[dask]"' in topic.sections[0]


def test_what_an_older_machine_had_stands_beside_its_topic() -> None:
    text = render({"large": OLD, "fast": NEW})
    assert "| torch | 2 |" in text
    assert "| large | 2026-01-01 09:00 UTC | 1.0 | torch 1 |" in text
    assert "| fast | 2026-01-02 09:00 UTC | 1.0 |  |" in text


def test_records_come_back(tmp_path: Path) -> None:
    save(NEW, tmp_path / "results" / "stream.json")
    assert load_all(tmp_path / "results") == {"stream": NEW}


def test_without_torch_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert peers.absent() == ["torch"]
    with pytest.raises(ImportError, match=r"torch is not installed.*pip install -e '\.\[peers\]'"):
        peers.load_torch()
