"""What `make bench` measures, and RESULTS.md: every number in it but the targets is from a run of that command.

A topic is a function that measures in a smoke test or in full, and returns what it adds. What it returned last is kept
in bench/results/, with the machine and the date, so that a topic can be measured alone; RESULTS.md puts these records
together. Topics that load torch come last: nothing else is measured in a process that has its threads.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import (
    cluster,
    core,
    divergence,
    initialization,
    machine,
    many_fits,
    memory,
    mixed_precision,
    mixture_divergence,
    operators,
    sampling,
    startup,
    stream,
)
from bench.tables import Target, Topic, judged, say, table

TOPICS: Final[dict[str, Callable[[bool], Topic]]] = {
    "core": core.topic,
    "mixed_precision": mixed_precision.topic,
    "initialization": initialization.topic,
    "memory": memory.topic,
    "start": startup.topic,
    "stream": stream.topic,
    "cluster": cluster.topic,
    "mixture_divergence": mixture_divergence.topic,
    "divergence": divergence.topic,
    "sampling": sampling.topic,
    "many_fits": many_fits.topic,
    "operators": operators.topic,
}


@dataclass(frozen=True)
class Record:
    """What a topic added, and where and when it was measured."""

    topic: Topic
    machine: dict[str, str]
    date: str
    minutes: float


def measure(name: str, smoke: bool = False) -> Record:
    """One topic; says on standard error what it is at, and how long that took."""
    say(name)
    begun = time.perf_counter()
    topic = TOPICS[name](smoke)
    seconds = time.perf_counter() - begun
    say(f"    {name} took {seconds:.0f} s")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Record(topic, machine.describe(), date, seconds / 60)


# ---- records


def save(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Record:
    """What `save` has written."""
    found = json.loads(path.read_text())
    topic = found["topic"]
    targets = [Target(**target) for target in topic["targets"]]
    return Record(
        Topic(topic["sections"], targets, topic["details"]), found["machine"], found["date"], found["minutes"]
    )


def load_all(folder: Path) -> dict[str, Record]:
    """The topics that have been measured, in the order of `TOPICS`."""
    return {name: load(path) for name in TOPICS if (path := folder / f"{name}.json").exists()}


# ---- RESULTS.md

METHOD: Final = """## How

All contenders of a comparison compute the same thing, which is checked before anything is timed, and that warms them up
too. Then they take turns, with a pause between them, and the figures are medians. All use every processor of the table
above, with their own threads or with those of their BLAS.
"""


def render(records: Mapping[str, Record]) -> str:
    """RESULTS.md: the machine is that of the newest record, and what differs stands beside the older one."""
    targets = [target for record in records.values() for target in record.topic.targets]
    missed = sum(not target.met for target in targets)
    newest = max(records.values(), key=lambda record: record.date).machine
    runs = [
        [name, record.date, f"{record.minutes:.1f}", differences(record.machine, newest)]
        for name, record in records.items()
    ]
    sections = [
        "# Results\n\nWritten by `make bench`. Do not edit.\n",
        f"{len(targets) - missed} of {len(targets)} targets met.\n",
        "## Machine\n\n" + table(["", ""], newest.items()),
        METHOD,
        "## When\n\n" + table(["topic", "measured", "minutes", "other than above"], runs),
        *(section for record in records.values() for section in record.topic.sections),
        "## All targets\n\n" + judged(targets),
        *(details for record in records.values() for details in record.topic.details),
    ]
    return "\n".join(sections)


def differences(machine: Mapping[str, str], newest: Mapping[str, str]) -> str:
    """What a table of the machine has that the newest one has not."""
    return ", ".join(f"{name} {value}" for name, value in machine.items() if newest.get(name) != value)
