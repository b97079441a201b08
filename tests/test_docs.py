"""The pages under docs/: every section's examples run, alone, as a reader copies them."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "from-the-notes.md"


def sections(page: Path) -> list[doctest.DocTest]:
    """The examples below each heading of the third level, named by it."""
    text = page.read_text(encoding="utf-8")
    starts = [found.start() for found in re.finditer(r"^### ", text, re.MULTILINE)]
    parser, found = doctest.DocTestParser(), []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        title, line = text[start:end].split("\n", 1)[0].removeprefix("### "), text.count("\n", 0, start)
        found.append(parser.get_doctest(text[start:end], {}, title, str(page), line))
    return found


@pytest.fixture(autouse=True)
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has the examples of the checkout, and takes the pictures."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")


@pytest.mark.parametrize("section", sections(GUIDE), ids=lambda section: section.name)
def test_section(section: doctest.DocTest) -> None:
    assert section.examples, f"{section.name} shows no call"
    report: list[str] = []
    failures, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(section, out=report.append)
    pyplot.close("all")
    assert failures == 0, "".join(report)
    for picture in re.findall(r'savefig\("(.*?)"\)', "".join(example.source for example in section.examples)):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_contents_lead_somewhere() -> None:
    """Every link within the page and to files of the checkout has its target."""
    text = GUIDE.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((.*?)\)", text):
        inside = target.startswith("#")
        assert target[1:] in anchors if inside else (GUIDE.parent / target).exists(), f"{target} leads nowhere"
