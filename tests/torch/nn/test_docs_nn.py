"""docs/autoencoders.md: every section's examples run, alone, as a reader copies them."""

from __future__ import annotations

import doctest
from pathlib import Path

import matplotlib
import pytest

from tests.test_docs import ROOT, check_section, sections

GUIDE = ROOT / "docs" / "autoencoders.md"


@pytest.mark.parametrize("section", sections(GUIDE), ids=lambda section: section.name)
def test_section(section: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    check_section(section)
