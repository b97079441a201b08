"""What `make bench` measures, and RESULTS.md: every number in it but the targets is from the run that writes it.

A topic is a function that measures in a smoke test or in full, and returns what it adds; this module puts them
together. Topics that load torch come last: nothing else is measured in a process that has its threads.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench import (
    core,
    divergence,
    initialization,
    machine,
    many_fits,
    memory,
    mixture_divergence,
    operators,
    sampling,
    startup,
    stream,
)
from bench.tables import Topic, judged, say, table

TOPICS: Final[dict[str, Callable[[bool], Topic]]] = {
    "core": core.topic,
    "initialization": initialization.topic,
    "memory": memory.topic,
    "start": startup.topic,
    "stream": stream.topic,
    "mixture_divergence": mixture_divergence.topic,
    "divergence": divergence.topic,
    "sampling": sampling.topic,
    "many_fits": many_fits.topic,
    "operators": operators.topic,
}


@dataclass(frozen=True)
class Results:
    """Everything that one run measured."""

    description: dict[str, str]
    topics: list[Topic]
    minutes: float
    date: str


def measure_all(smoke: bool = False, names: Sequence[str] = tuple(TOPICS)) -> Results:
    """One run; says on standard error what it is at, and how long that took."""
    started = time.perf_counter()
    topics = []
    for name in names:
        say(name)
        begun = time.perf_counter()
        topics.append(TOPICS[name](smoke))
        say(f"    {name} took {time.perf_counter() - begun:.0f} s")
    return Results(
        description=machine.describe(),
        topics=topics,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        minutes=(time.perf_counter() - started) / 60,
    )


METHOD: Final = """## How

All contenders of a comparison compute the same thing, which is checked before anything is timed, and that warms them up
too. Then they take turns, with a pause between them, and the figures are medians. All use every processor of the table
above, with their own threads or with those of their BLAS.
"""


def render(results: Results) -> str:
    """RESULTS.md."""
    targets = [target for topic in results.topics for target in topic.targets]
    missed = sum(not target.met for target in targets)
    sections = [
        f"# Results\n\nWritten by `make bench` on {results.date} ({results.minutes:.0f} minutes). Do not edit.\n",
        f"{len(targets) - missed} of {len(targets)} targets met.\n",
        "## Machine\n\n" + table(["", ""], results.description.items()),
        METHOD,
        *(section for topic in results.topics for section in topic.sections),
        "## All targets\n\n" + judged(targets),
        *(details for topic in results.topics for details in topic.details),
    ]
    return "\n".join(sections)
