"""One fit on Dask: two workers of one thread beside one process with two, and what a pass costs against partitions.

    python -m bench.cluster

Rows are the same for everyone and lie in memory: in this process, and persisted on the workers, which are processes of
this machine. All begin from the same parameters and do the same number of iterations, in turns; the lower bounds are
compared before anything is judged. A callback reads the clock and the bytes that went over the loopback interface after
every iteration; figures are medians. What Dask costs by itself shows with few rows, where there is nothing to compute.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, Final

import numpy as np

import emalgam
from bench.tables import Target, Topic, judged, milliseconds, number, say, size, table
from bench.turns import in_turns
from emalgam.dask_parts import dask_module

N, D, K = 4_000_000, 8, 32
F: Final = (D + 1) * (D + 2) // 2
FEW_ROWS: Final = 6_400
SMOKE_N: Final = 64_000
PARTITIONS: Final = (1, 4, 16, 64)
JUDGED: Final = 4  # partitions of the figure that has a target: two for each worker
MOST: Final = 1.4  # times what one process takes
PIECES: Final = 64  # of the rows, each from a seed of its own: the same rows in any partitions
WORKERS: Final = 2
ROUNDS, SMOKE_ROUNDS = 5, 1
ITERATIONS: Final = 6
STEALING: Final = "distributed.scheduler.work-stealing"
SAME: Final = 1e-9  # nats: how far lower bounds of the same iterations may be apart
HERE: Final = "one process, 2 threads"


@dataclass(frozen=True)
class Run:
    """One fit: seconds from its call to its end, and seconds and bytes between two iterations."""

    whole: float
    seconds: float
    bytes: float
    lower_bound: float


@dataclass(frozen=True)
class Measured:
    """Every round of every contender, by its name, and for how many rows."""

    n_rows: int
    runs: Mapping[str, Sequence[Run]]

    def median(self, name: str, figure: str) -> float:
        return median(getattr(run, figure) for run in self.runs[name])


def topic(smoke: bool) -> Topic:
    """Many rows in this process and on workers, and few rows on workers; without Dask the reason why there are none."""
    rounds = SMOKE_ROUNDS if smoke else ROUNDS
    try:
        dask_module("distributed")
    except ImportError as error:
        say(f"    not measured: {error}")
        missing = [target(math.nan, N)]
        return Topic([f"## A cluster\n\nnot measured: {error}\n\n{judged(missing)}"], missing)
    with cluster() as client:
        say("    many rows")
        many = measure(client, SMOKE_N if smoke else N, rounds)
        say("    few rows")
        few = measure(client, FEW_ROWS, rounds)
    figure = target(many.median(on_dask(JUDGED), "seconds") / many.median(HERE, "seconds"), many.n_rows)
    return Topic([section(many, few, figure)], [figure])


# ---- measuring


@contextmanager
def cluster() -> Iterator[Any]:
    """A client of two workers of one thread, in processes of their own."""
    import dask
    from distributed import Client, LocalCluster

    how: dict[str, Any] = {"n_workers": WORKERS, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    how["silence_logs"] = logging.CRITICAL  # of workers that are ended while they report
    # Partitions that an idle worker takes over would be counted as what a pass moves.
    with dask.config.set({STEALING: False}), LocalCluster(**how) as workers, Client(workers) as client:
        yield client


def measure(client: Any, n_rows: int, rounds: int) -> Measured:
    """Everyone in turns on the same rows; RuntimeError if they do not compute the same."""
    x = rows(0, PIECES, n_rows)
    contenders: dict[str, Callable[[], Run]] = {HERE: partial(run, x, x, n_threads=2)}
    for partitions in PARTITIONS:
        persisted = client.persist(on_workers(partitions, n_rows))
        contenders[on_dask(partitions)] = partial(run, persisted, x)
    for contender in contenders.values():
        contender()  # loads and compiles what there is to load
    found = in_turns(contenders, rounds)
    bounds = [each.lower_bound for runs in found.values() for each in runs]
    if max(bounds) - min(bounds) > SAME:
        raise RuntimeError(f"lower bounds of the same iterations differ: {min(bounds)!r} to {max(bounds)!r}")
    return Measured(n_rows, found)


def on_dask(partitions: int) -> str:
    return f"Dask, {partitions} partition{'s' if partitions > 1 else ''}"


def rows(first: int, last: int, n_rows: int) -> np.ndarray:
    """Some of the pieces of the rows, one after the other, (n, D) float64."""
    return np.concatenate([_piece(number, n_rows // PIECES) for number in range(first, last)])


def _piece(number: int, n_rows: int) -> np.ndarray:
    means = np.random.default_rng(0).normal(size=(K, D)) * 2
    rng = np.random.default_rng([1, number])
    return rng.normal(size=(n_rows, D)) + means[rng.integers(K, size=n_rows)]


def on_workers(partitions: int, n_rows: int) -> Any:
    """The rows as a dask array, which the workers make."""
    import dask
    import dask.array as da

    pieces, length = PIECES // partitions, n_rows // partitions
    made = (dask.delayed(rows)(part * pieces, (part + 1) * pieces, n_rows) for part in range(partitions))
    return da.concatenate([da.from_delayed(each, (length, D), np.float64) for each in made])


def run(x: Any, start: np.ndarray, n_threads: int | None = None) -> Run:
    """One fit from parameters that depend on the rows at its start alone."""
    seen: list[tuple[float, float]] = []

    def look(_: emalgam.Iteration) -> None:
        seen.append((time.perf_counter(), loopback_bytes()))

    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        fitted = emalgam.fit(
            x,
            K,
            tol=0.0,
            max_iter=ITERATIONS,
            weights_init=np.full(K, 1 / K),
            means_init=start[:K],
            precisions_init=np.tile(np.eye(D), (K, 1, 1)),
            n_threads=n_threads,
            callback=look,
        )
    whole = time.perf_counter() - begun
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(seen)]
    return Run(whole, median(each[0] for each in steps), median(each[1] for each in steps), fitted.lower_bound)


def loopback_bytes() -> float:
    """What went over this machine's loopback interface so far, once counted."""
    import psutil

    interfaces = psutil.net_io_counters(pernic=True)
    name = next(each for each in ("lo", "lo0") if each in interfaces)
    return float(interfaces[name].bytes_sent)


# ---- writing


def target(ratio: float, n_rows: int) -> Target:
    """The figure: how many times as long as one process an iteration takes."""
    return Target(f"Dask, {WORKERS} workers of 1 thread, {size(n_rows, D, K)}: beside {HERE}", ratio, MOST, False, " ×")


NOTE: Final = """{rows} rows, D = {D}, K = {K}, full covariances, float64, persisted; {workers} workers of one thread.
Per iteration: milliseconds, how many times those of one process with 2 threads, bytes over the loopback interface (all
that client, scheduler and workers say to each other) and the same in units of K · F numbers. Whole fits of {iterations}
iterations, which check the data and find their frame too. With few rows the milliseconds are Dask's own. Work stealing
is off.

"""


def section(many: Measured, few: Measured, figure: Target) -> str:
    note = NOTE.format(rows=f"{many.n_rows:,}".replace(",", " "), D=D, K=K, workers=WORKERS, iterations=ITERATIONS)
    return f"## A cluster\n\n{note}{_table(many, few)}\n{on_paper(many, few)}\n{judged([figure])}"


def _table(many: Measured, few: Measured) -> str:
    few_rows = f"{few.n_rows:,}".replace(",", " ")
    header = ["", "ms", "beside one process", "kB", "K · F", "whole fit, s", f"ms with {few_rows} rows"]
    lines: list[list[str]] = []
    for name in many.runs:
        seconds, moved = many.median(name, "seconds"), many.median(name, "bytes")
        away = name != HERE
        lines.append(
            [
                name,
                milliseconds(seconds),
                f"{number(seconds / many.median(HERE, 'seconds'))} ×",
                number(moved / 1e3) if away else "",
                number(moved / (8 * K * F)) if away else "",
                number(many.median(name, "whole")),
                milliseconds(few.median(name, "seconds")),
            ]
        )
    return table(header, lines)


PAPER: Final = (1_000_000_000, 16, 64)
PAPER_WORKERS, PAPER_PARTITIONS = 64, 512
PAPER_NOTE: Final = """On paper: {size} on {workers} workers of one thread, {partitions} partitions, {gigabytes} GB on
each worker. A worker did {rate} Gflop/s here (4 N F K in an iteration), so an iteration computes for {compute} ms. A
partition cost {each} ms of Dask here: {dask} ms there, if nothing of it hides behind the compute, and {total} ms in
all. A partition moved {moved} kB here; there its share of the statistics is {share} kB and goes once to another worker,
as do the parameters, of the same size, to each worker: at most {megabytes} MB per iteration.
"""


def on_paper(many: Measured, few: Measured) -> str:
    """What a large fit would take, from the rate of a worker and the cost of a partition that were measured."""
    n_rows, n_features, n_components = PAPER
    statistics = (n_features + 1) * (n_features + 2) // 2
    most, least = on_dask(PARTITIONS[-1]), on_dask(PARTITIONS[0])
    spread = PARTITIONS[-1] - PARTITIONS[0]
    each, moved = ((few.median(most, what) - few.median(least, what)) / spread for what in ("seconds", "bytes"))
    rate = 4 * many.n_rows * F * K / many.median(on_dask(JUDGED), "seconds") / WORKERS  # flop/s, with Dask's own time
    compute = 4 * n_rows * statistics * n_components / rate / PAPER_WORKERS
    share = 8 * n_components * statistics
    return PAPER_NOTE.format(
        size=size(*PAPER),
        workers=PAPER_WORKERS,
        partitions=PAPER_PARTITIONS,
        gigabytes=number(8 * n_rows * n_features / PAPER_WORKERS / 1e9),
        rate=number(rate / 1e9),
        compute=milliseconds(compute),
        each=milliseconds(each),
        dask=milliseconds(PAPER_PARTITIONS * each),
        total=milliseconds(compute + PAPER_PARTITIONS * each),
        moved=number(moved / 1e3),
        share=number(share / 1e3),
        megabytes=number((PAPER_PARTITIONS * (moved + share) + PAPER_WORKERS * share) / 1e6),
    )


if __name__ == "__main__":
    print("\n".join(topic(smoke=False).sections))
