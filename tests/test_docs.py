"""The pages under docs/: every section's examples run, alone, as a reader copies them.

Those of docs/autoencoders.md need torch: tests/torch/nn/test_docs_nn.py runs them.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "from-the-notes.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def sections(page: Path) -> list[doctest.DocTest]:
    """The examples below each heading of the third level, named by it."""
    text = page.read_text(encoding="utf-8")
    starts = [found.start() for found in re.finditer(r"^### ", text, re.MULTILINE)]
    parser, found = doctest.DocTestParser(), []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        title, line = text[start:end].split("\n", 1)[0].removeprefix("### "), text.count("\n", 0, start)
        found.append(parser.get_doctest(text[start:end], {}, title, str(page), line))
    return found


def check_section(section: doctest.DocTest) -> None:
    """Its examples print what the page says, and draw the pictures that it names."""
    assert section.examples, f"{section.name} shows no call"
    report: list[str] = []
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failures, _ = doctest.DocTestRunner(optionflags=flags).run(section, out=report.append)
    pyplot.close("all")
    assert failures == 0, "".join(report)
    for picture in re.findall(r'savefig\("(.*?)"\)', "".join(example.source for example in section.examples)):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(autouse=True)
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has the examples of the checkout, and takes the pictures."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")


@pytest.mark.parametrize("section", sections(GUIDE), ids=lambda section: section.name)
def test_section(section: doctest.DocTest) -> None:
    check_section(section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_contents_lead_somewhere(page: Path) -> None:
    """Every link within a page, to another one and to files of the checkout has its target."""
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{target} leads nowhere"


def anchors(page: Path) -> set[str]:
    """What a link to a heading is called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
