"""A mixture for each group of a Parquet table, in shards: what ``emalgam fit-many`` does.

Groups are fitted in the order of their first rows, a shard at a time. A shard is a file of fits (`emalgam.fits_file`)
in the folder ``OUTPUT.parts``, written whole or not at all; at the end the shards become one table and the folder goes.
Which groups a shard has depends on the table alone, and a group's random numbers on the place of its label among all
labels. So a run that is killed, or finds the disk full, loses the shard that it is working on, and one that goes on
writes the rows that an uninterrupted one would have: those of ``emalgam.fit_many(x, ..., groups=labels)``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from emalgam import __version__
from emalgam.batch import ManyFits, fit_many, shown
from emalgam.files import replacing, target_of
from emalgam.fits_file import COLUMNS, join_fits, load_fits_metadata, save_fits, status_counts
from emalgam.grouped_table import GroupedTable, Groups, Rows
from emalgam.model_file import ModelFileError
from emalgam.problems import end_of_slice
from emalgam_kernels.batch import Settings, Status, flop_of_a_row, passes_of_a_fit

GROUPS_OF_A_SHARD: Final = 4096
NUMBERS_OF_A_SHARD: Final = 2**22
FLOP_OF_A_SHARD: Final = 2**40  # about twenty seconds of one processor
NUMBERS_IN_MEMORY: Final = 2**25  # of the rows that are read at once: 256 MB
JOB: Final = "job.json"  # in the folder of the parts, and in the metadata of the output
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

__all__ = ["Job", "Piece", "Shard", "Summary", "fit_table", "pieces"]

Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is fitted and how; only the same job on the same table can be gone on with.

    Attributes
    ----------
    table, output : Path
        Parquet files.
    by : str
        The column of the labels, and its name in the output.
    features : tuple of str, optional
        All other columns by default.
    weights : str, optional
        The column of the sample weights.
    n_components : range
    settings : mapping
        Other arguments of `emalgam.fit_many` that decide about the result: `random_state`, an integer, and `backend`,
        the name of one, among them.
    """

    table: Path
    output: Path
    by: str
    features: tuple[str, ...] | None
    weights: str | None
    n_components: range
    settings: Mapping[str, Any]

    @property
    def parts(self) -> Path:
        """The folder of the shards."""
        target = target_of(self.output)  # shards take its name at the end, which only works beside it
        return target.with_name(f"{target.name}.parts")

    def open(self) -> GroupedTable:
        """The table; ValueError naming it if it cannot be read, or has not the columns."""
        return GroupedTable(self.table, self.by, self.features, self.weights)

    def described(self, table: GroupedTable) -> dict[str, Any]:
        """Everything that decides about the result, as JSON has it."""
        own = {"by": self.by, "features": table.features, "weights": self.weights}
        counts = {"fewest components": self.n_components[0], "most components": self.n_components[-1]}
        found = {f"table's {name}": value for name, value in table.fingerprint().items()}
        described: dict[str, Any] = json.loads(
            json.dumps({"emalgam": __version__} | own | counts | dict(self.settings) | found)
        )
        return described

    def rows_of_a_shard(self, n_features: int) -> int:
        """How many rows have so many numbers, and take about so long, as a shard may; the same whatever fits them."""
        fewest, most = (np.array([self.n_components[end]]) for end in (0, -1))
        how = {name: self.settings[name] for name in ("n_init", "max_iter") if name in self.settings}
        flop = flop_of_a_row(n_features, most, passes_of_a_fit(Settings("full", fewest, most, **how)))
        return max(min(NUMBERS_OF_A_SHARD // n_features, int(FLOP_OF_A_SHARD / flop)), 1)

    def fit(
        self, rows: Rows, offsets: np.ndarray, numbers: np.ndarray, n_threads: int | None, advance: Advance
    ) -> ManyFits:
        """The fits of some groups whose rows lie at `offsets`; `advance` is told how many more are done."""
        which = slice(int(offsets[0]), int(offsets[-1]))
        return fit_many(
            rows.x[which],
            self.n_components,
            offsets=offsets - offsets[0],
            sample_weight=None if rows.weight is None else rows.weight[which],
            numbers=numbers,
            n_threads=n_threads,
            progress=advance,
            **self.settings,
        )


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes
    ----------
    n_groups, n_samples : int
    features : tuple of str
    resumed : int
        Groups that an earlier run had fitted.
    statuses : dict
        How many groups ended with each `Status`.
    """

    n_groups: int
    n_samples: int
    features: tuple[str, ...]
    resumed: int
    statuses: dict[Status, int]


@dataclass(frozen=True)
class Shard:
    """The groups [first, last), and their file."""

    first: int
    last: int
    path: Path


@dataclass(frozen=True, eq=False)
class Piece:
    """Shards that follow each other and are read at once, and their groups alone."""

    shards: list[Shard]
    groups: Groups

    def fits(
        self, job: Job, table: GroupedTable, n_threads: int | None, advance: Advance = lambda done: None
    ) -> Iterator[ManyFits]:
        """Those of one shard after the other; the rows go when it ends."""
        rows, begin = table.rows(self.groups), self.shards[0].first
        for shard in self.shards:
            which = slice(shard.first - begin, shard.last - begin)
            offsets = self.groups.offsets[which.start : which.stop + 1]
            yield job.fit(rows, offsets, self.groups.ranks[which], n_threads, advance)


Fitting = Callable[[Job, GroupedTable, Groups, list[Shard], int | None, Advance], Iterator[tuple[Shard, ManyFits]]]


def fit_here(
    job: Job, table: GroupedTable, groups: Groups, shards: list[Shard], n_threads: int | None, advance: Advance
) -> Iterator[tuple[Shard, ManyFits]]:
    """The fits of each shard, in this process; `advance` is told how many more groups are done."""
    for piece in pieces(groups, shards, len(table.features)):
        yield from zip(piece.shards, piece.fits(job, table, n_threads, advance), strict=True)


def fit_table(
    job: Job,
    *,
    resume: bool = False,
    n_threads: int | None = None,
    progress: bool = False,
    fitting: Fitting = fit_here,
) -> Summary:
    """Fit a mixture to each group of a table, and write a table of them.

    The output is a file of fits (`emalgam.fits_file`), its rows in the order in which the groups first appear.

    Parameters
    ----------
    job : Job
    resume : bool
        Go on with what an earlier run left; begin if there is nothing.
    n_threads : int, optional
        As in `emalgam.fit_many`.
    progress : bool
        Show groups done, fits per second and the time left on standard error.
    fitting : function
        What fits shards, in any order: `fit_here`, or `emalgam.distributed.fit_shards` of a client.

    Raises
    ------
    ValueError
        If the table cannot be read or has not the columns; if there is an unfinished run and `resume` is false; if the
        run that is gone on with had other settings or another table, saying what differs.
    OSError
        If a file cannot be written, naming it; what was written before is kept.
    """
    with job.open() as table:
        if job.by in COLUMNS:
            raise ValueError(f"{job.table}: column {job.by!r} has the name of a column of the output; rename it")
        description = job.described(table)
        if resume and _is_finished(job, description):
            _remove(job.parts)
            statuses = status_counts(job.output)
            n_groups = sum(statuses.values())
            return Summary(n_groups, table.n_samples, table.features, n_groups, statuses)
        with _own_parts(job.parts, description, resume), _hint():
            groups = table.groups()
            shards = _shards(job.parts, groups.offsets, job.rows_of_a_shard(len(table.features)))
            missing = [shard for shard in shards if not shard.path.exists()]
            resumed = len(groups) - sum(shard.last - shard.first for shard in missing)
            metadata = {"job": json.dumps(description)}
            with shown(len(groups), progress, resumed) as advance:
                for shard, fits in fitting(job, table, groups, missing, n_threads, advance):
                    labels = groups.labels[shard.first : shard.last]
                    save_fits(fits, shard.path, labels=labels, label_name=job.by, metadata=metadata, durable=True)
            join_fits([shard.path for shard in shards], job.output, folder=job.parts)
        _remove(job.parts)
    return Summary(len(groups), table.n_samples, table.features, resumed, status_counts(job.output))


def _shards(parts: Path, offsets: np.ndarray, most_rows: int) -> list[Shard]:
    """All groups in pieces of at most so many rows, or of one group, that depend on their sizes alone."""
    shards: list[Shard] = []
    first = 0
    while first < len(offsets) - 1:
        last = end_of_slice(offsets, first, GROUPS_OF_A_SHARD, most_rows)
        shards.append(Shard(first, last, parts / f"{first:09}-{last:09}.parquet"))
        first = last
    return shards


def pieces(groups: Groups, shards: list[Shard], n_features: int, least: int = 1) -> Iterator[Piece]:
    """The shards in pieces as large as memory allows, but in `least` pieces if there are enough shards."""
    n_rows = sum(int(groups.offsets[shard.last] - groups.offsets[shard.first]) for shard in shards)
    most_rows = min(NUMBERS_IN_MEMORY // n_features, n_rows // least)
    for some in _together(shards, groups.offsets, most_rows):
        yield Piece(some, groups.part(some[0].first, some[-1].last))


def _together(shards: list[Shard], offsets: np.ndarray, most_rows: int) -> Iterator[list[Shard]]:
    """Shards that follow each other and whose rows may be in memory at once; one at least."""
    some: list[Shard] = []
    for shard in shards:
        if some and (shard.first != some[-1].last or offsets[shard.last] - offsets[some[0].first] > most_rows):
            yield some
            some = []
        some.append(shard)
    if some:
        yield some


# ---- what an earlier run left


def _is_finished(job: Job, description: dict[str, Any]) -> bool:
    """Whether the output is that of this job; ValueError if it is another's and there are no parts to go on with."""
    unfinished = (job.parts / JOB).exists()
    if not job.output.exists():
        return False
    try:
        finished = _json_object(load_fits_metadata(job.output).get("job", ""))
    except ModelFileError:
        if unfinished:  # what is there will be replaced, as it is by a run that begins
            return False
        raise
    if finished != description and not unfinished:
        problem = f"{job.output} is the result of another job and cannot be gone on with"
        raise ValueError(f"{problem}: {_difference(finished, description)}. To replace it, leave out --resume")
    return finished == description


@contextmanager
def _own_parts(parts: Path, description: dict[str, Any], resume: bool) -> Iterator[None]:
    """The folder of the shards, for this process alone; it goes if nothing was fitted."""
    parts.mkdir(exist_ok=True)
    descriptor = os.open(parts, os.O_RDONLY)
    try:
        _lock(descriptor, parts)
        try:
            _begin(parts, description, resume)
            yield
        finally:
            if not any(parts.glob("*.parquet")):
                _remove(parts)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, parts: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{parts}: another process is writing there") from None


def _begin(parts: Path, description: dict[str, Any], resume: bool) -> None:
    """Write down what is fitted, or hold it against what an earlier run has written; its half-written files go."""
    for remains in parts.glob(".*"):
        remains.unlink()
    job = parts / JOB
    if not job.exists():
        if any(parts.iterdir()):
            raise ValueError(f"{parts} holds files and no {JOB}: it is not of an unfinished run; move it away")
        with replacing(job, durable=True) as file:
            file.write(json.dumps(description, indent=1).encode())
        return
    if not resume:
        raise ValueError(f"{parts} holds an unfinished run: go on with --resume, or remove the folder to begin anew")
    begun = _json_object(job.read_text())
    if begun != description:
        problem = f"{parts} holds an unfinished run that cannot be gone on with"
        raise ValueError(f"{problem}: {_difference(begun, description)}. To begin anew, remove the folder")


def _json_object(text: str) -> dict[str, Any]:
    """What a JSON object holds; nothing if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)


def _remove(parts: Path) -> None:
    """The folder and what a run has put into it, its description last; anything else stays."""
    for path in (*parts.glob(".*"), *parts.glob("*.parquet"), parts / JOB):
        path.unlink(missing_ok=True)
    if parts.exists() and not any(parts.iterdir()):
        parts.rmdir()


@contextmanager
def _hint() -> Iterator[None]:
    """Says after a full disk that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        kept = f"{error.strerror}; what was fitted is kept: make room and go on with --resume"
        raise OSError(error.errno, kept, error.filename) from error
