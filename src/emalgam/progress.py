"""What long work shows on standard error while it runs: rich's bars, with a rate and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """How many a second, on average."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def render(self, task: Any) -> Text:
        seconds = task.finished_time or task.elapsed
        done = task.completed - task.fields["before"]
        return Text(f"{done / seconds:,.0f} {self.what}/s" if seconds else "")


@contextmanager
def counting(what: str, total: int | None, before: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar; yields a function that takes how many more are done. `before`: how many were done by an earlier run."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(what), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, completed=before, before=before)
        yield lambda done: progress.advance(task, done)
