"""What long work shows on standard error while it runs: rich's bars, with a rate and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from emalgam.em import Iteration


@contextmanager
def fitting(max_iter: int) -> Iterator[tuple[Callable[[int, int], None], Callable[[Iteration], bool]]]:
    """A bar of iterations, and a line of passes; yields what `WatchedStream` and `emalgam.fit` call as they go on."""
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        iterations = progress.add_task("starting", total=max_iter)
        passes: TaskID | None = None
        start = perf_counter()
        earlier = current = 0

        def seen(number: int, rows: int) -> None:
            nonlocal passes, earlier, current
            if passes is None:
                passes = progress.add_task("", total=None)
            if rows < current:
                earlier += current
            current = rows
            rate = (earlier + current) / (perf_counter() - start)
            progress.update(passes, completed=rows, description=f"pass {number}: {rate:,.0f} rows/s")

        def show(step: Iteration) -> bool:
            text = f"restart {step.restart}  log-likelihood {step.lower_bound:.6f}  change {step.change:.1e}"
            progress.update(iterations, completed=step.iteration, description=text)
            return False

        yield seen, show


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
