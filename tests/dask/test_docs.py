"""The page about clusters: every section's examples run, alone, as a reader copies them."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from tests.test_docs import sections

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("section", sections(PAGE), ids=lambda section: section.name)
def test_section(section: doctest.DocTest) -> None:
    assert section.examples, f"{section.name} shows no call"
    report: list[str] = []
    failures, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(section, out=report.append)
    assert failures == 0, "".join(report)
