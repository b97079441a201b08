"""What `make bench` measures, and RESULTS.md: every number in it but the targets is from the run that writes it."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, ParamSpec, TypeVar

from bench import em_iteration, initialization, machine, memory, startup
from bench.em_iteration import Measurement
from bench.libraries import EMALGAM, LIBRARIES, ONEDAL, SCIKIT_LEARN, TOLERANCES
from bench.problems import COVARIANCE_TYPES, DTYPES, SIZES, SMOKE_SIZE, Case
from bench.tables import Target, describe, milliseconds, number, size, table, verdict

P = ParamSpec("P")
T = TypeVar("T")

ROUNDS: Final = 5
ROUNDS_OF_STARTS: Final = 11
ROUNDS_OF_COMPILATION: Final = 2
CYTHON, NUMBA = EMALGAM

# How many times faster than scikit-learn and than oneDAL cython_cpu has to be.
FASTER: Final = {
    (*size, covariance_type, dtype): dict(zip((SCIKIT_LEARN, ONEDAL), factors, strict=False))
    for covariance_type, dtype, rows in (
        ("full", "float64", zip(SIZES, ((30, 2.5), (40, 3), (45, 1.8), (6.5, 1.5)), strict=True)),
        ("full", "float32", zip(SIZES, ((25, 2.5), (60, 3), (80, 3), (4, 1.5)), strict=True)),
        ("diag", "float64", ((SIZES[0], (15,)),)),
        ("tied", "float64", ((SIZES[0], (40,)),)),
        ("spherical", "float64", ((SIZES[0], (15,)),)),
    )
    for size, factors in rows
}
MOST_NUMBA: Final = 1.5  # numba_cpu by cython_cpu
LEAST_SHARE: Final = 0.6  # of the matrix product rate, in the first size
MOST_MEMORY: Final = 64.0  # MiB
MOST_IMPORT: Final = 0.2  # seconds
MOST_COMMAND: Final = 1.2  # seconds
MOST_INITIALIZATION: Final = 1.0  # of five iterations


@dataclass(frozen=True)
class Results:
    """Everything that one run measured."""

    description: dict[str, str]
    minutes: float
    iterations: list[Measurement]
    initializations: list[initialization.Initialization]
    memories: list[memory.Memory]
    imports: dict[str, float]
    commands: dict[str, float]
    numba: dict[str, dict[str, float]]
    date: str
    rounds: int
    starts: int


# ---- measuring


def cases(smoke: bool) -> list[Case]:
    """The cases that have figures; the small ones, of every covariance type and dtype, for a smoke test."""
    if smoke:
        return [Case(*SMOKE_SIZE, kind, dtype) for kind in COVARIANCE_TYPES for dtype in DTYPES]
    return [Case(N, D, K, kind, dtype) for N, D, K, kind, dtype in FASTER]


def measure_all(smoke: bool = False) -> Results:
    """One run; says on standard error what it is at."""
    started = time.perf_counter()
    rounds = 1 if smoke else ROUNDS
    iterations = []
    span_seconds = 0.01 if smoke else em_iteration.SPAN_SECONDS
    for case in cases(smoke):
        found = _announced(f"iterations of {case}", em_iteration.measure, case, rounds, span_seconds)
        iterations.append(found)
        _say("    " + ", ".join(f"{name} {milliseconds(found.median(name))} ms" for name in found.seconds))
    starts = 1 if smoke else ROUNDS_OF_STARTS
    return Results(
        description=machine.describe(),
        iterations=iterations,
        initializations=_announced("initialization", initialization.measure, rounds, smoke),
        memories=[
            _announced(f"memory, {backend}, {start}", memory.measure, backend, start, smoke)
            for backend in EMALGAM
            for start in memory.STARTS
        ],
        imports=_announced("imports", startup.imports, starts),
        commands=_announced("command line", startup.command_line, starts),
        numba=_announced("Numba's compiler", startup.numba_start, 1 if smoke else ROUNDS_OF_COMPILATION),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rounds=rounds,
        starts=starts,
        minutes=(time.perf_counter() - started) / 60,
    )


def _announced(what: str, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """What a function returns, said on standard error before it begins."""
    _say(what)
    return function(*arguments, **keywords)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- judging


def targets(results: Results) -> list[Target]:
    """Every figure that has a target, in the order of the report."""
    return [
        *_speed_targets(results.iterations),
        *_backend_targets(results.iterations),
        *(
            Target(
                f"k-means++ beside five iterations, {size(*each.size)}, {each.backend}", each.ratio("k-means++"), *less
            )
            for each in results.initializations
            for less in [(MOST_INITIALIZATION, False, " ×")]
        ),
        *(
            Target(
                f"memory beyond X and the interpreter, {size(*each.size)}, {each.backend}",
                each.beyond,
                MOST_MEMORY,
                False,
                " MiB",
            )
            for each in results.memories
            if each.start == "loaded"
        ),
        Target("`import emalgam` beyond `import numpy`", import_seconds(results), MOST_IMPORT, False, " s"),
        Target("`emalgam fit`, whole process, cython_cpu", results.commands[CYTHON], MOST_COMMAND, False, " s"),
    ]


def _speed_targets(measurements: Iterable[Measurement]) -> list[Target]:
    return [
        Target(f"{describe(found.case)}: faster than {peer}", found.ratio(peer, CYTHON), factor, True, " ×")
        for found in measurements
        for peer, factor in factors(found.case).items()
    ]


def _backend_targets(measurements: Sequence[Measurement]) -> list[Target]:
    slowest = max(measurements, key=lambda found: found.ratio(NUMBA, CYTHON))
    name = f"numba_cpu beside cython_cpu, at worst ({describe(slowest.case)})"
    shares = [
        Target(
            f"share of the matrix product rate, {describe(found.case)}",
            100 * found.share(CYTHON),
            100 * LEAST_SHARE,
            True,
            " %",
        )
        for found in measurements
        if found.case == Case(*SIZES[0])
    ]
    return [Target(name, slowest.ratio(NUMBA, CYTHON), MOST_NUMBA, False, " ×"), *shares]


def factors(case: Case) -> dict[str, float]:
    """How many times faster than each peer cython_cpu has to be on a case."""
    return FASTER.get((*case.size, case.covariance_type, case.dtype), {})


def import_seconds(results: Results) -> float:
    """What `import emalgam` adds to `import numpy`; below zero only by noise."""
    return results.imports["numpy, emalgam"] - results.imports["numpy"]


# ---- writing


def render(results: Results) -> str:
    """RESULTS.md."""
    judged = targets(results)
    missed = sum(not target.met for target in judged)
    sections = [
        f"# Results\n\nWritten by `make bench` on {results.date} ({results.minutes:.0f} minutes). Do not edit.\n",
        f"{len(judged) - missed} of {len(judged)} targets met.\n",
        "## Machine\n\n" + table(["", ""], results.description.items()) + "\n" + _rates(results),
        METHOD.format(rounds=results.rounds, span=em_iteration.SPAN_SECONDS, starts=results.starts),
        *(
            f"## Full covariances, {dtype}\n\nMilliseconds per iteration; how many times faster cython_cpu is.\n\n"
            + _speed_table(
                [m for m in results.iterations if m.case.covariance_type == "full" and m.case.dtype == dtype]
            )
            for dtype in DTYPES
        ),
        "## Other covariances, float64\n\noneDAL has no tied and no spherical ones.\n\n"
        + _speed_table(
            [m for m in results.iterations if m.case.covariance_type != "full" and m.case.dtype == "float64"]
        ),
        "## Backends\n\n" + BACKENDS_NOTE + _backend_table(results.iterations),
        "## Initialization\n\n" + _initialization_table(results.initializations),
        "## Memory\n\n" + MEMORY_NOTE + _memory_table(results.memories),
        "## Start\n\n" + _start_tables(results),
        "## All targets\n\n" + table(["figure", "target", "measured", ""], (target.cells() for target in judged)),
        "## All measurements\n\nMilliseconds per iteration over the rounds.\n\n"
        + _measurement_table(results.iterations),
        "## Agreement\n\n" + AGREEMENT_NOTE + _agreement_table(results.iterations),
    ]
    return "\n".join(sections)


METHOD: Final = """## How

Every library begins from the same weights, means and precisions on the same rows and adds nothing to covariances.
Seconds per iteration are the difference between a long and a one-iteration fit, divided by the difference in
iterations; the long one is about {span:g} s longer, three iterations at least. The libraries take turns, {rounds}
times each, scikit-learn too; the figures are medians. All use every processor of the table above: emalgam's and
oneDAL's own threads, scikit-learn's BLAS. Starts of processes are medians of {starts}. Before it is timed, each library
has to agree with scikit-learn in float64; see the end.
"""

BACKENDS_NOTE: Final = """What the guard chose (the benchmark stops if it leaves the dtype of the data), the share of
the machine's matrix product rate (4 N F K flop per iteration by the time of an iteration, beside NumPy's product of two
large matrices of the same dtype in the same rounds), and how many times longer numba_cpu takes.

"""

MEMORY_NOTE: Final = """Peak of resident memory during a fit (k-means, then EM) of float64 rows in memory, less what was
resident before it. "loaded": the backend's code was in memory before. "cold": the first fit of the process loads it,
Numba and LLVM included.

"""

AGREEMENT_NOTE: Final = """Largest difference from scikit-learn's float64 result on the same rows, after three
iterations, over all cases; the benchmark stops where one is larger than allowed. Clusters have variances near one.

"""


def _rates(results: Results) -> str:
    lines = []
    for dtype in DTYPES:
        rates = [rate for found in results.iterations if found.case.dtype == dtype for rate in found.matrix_product]
        low, high = min(rates) / 1e9, max(rates) / 1e9
        lines.append([dtype, number(median(rates) / 1e9), f"{number(low)} to {number(high)}"])
    size = machine.MATRIX_SIZE
    return table([f"matrix product {size} × {size}", "Gflop/s, median of the run", "range"], lines)


def _speed_table(measurements: Sequence[Measurement]) -> str:
    names = [name for name in LIBRARIES if any(name in found.seconds for found in measurements)]
    peers = [name for name in (SCIKIT_LEARN, ONEDAL) if name in names]
    rows = []
    for found in measurements:
        case = found.case
        label = size(*case.size) + ("" if case.covariance_type == "full" else f", {case.covariance_type}")
        times = [milliseconds(found.median(name)) if name in found.seconds else "" for name in names]
        rows.append([label, *times, *(_faster(found, peer) for peer in peers)])
    return table(["N, D, K", *names, *(f"faster than {peer}" for peer in peers)], rows)


def _faster(found: Measurement, peer: str) -> str:
    if peer not in found.seconds:
        return ""
    ratio = found.ratio(peer, CYTHON)
    factor = factors(found.case).get(peer)
    return f"{number(ratio)} ×" + ("" if factor is None else f" (target {factor:g} ×: {verdict(ratio >= factor)})")


def _backend_table(measurements: Sequence[Measurement]) -> str:
    rows = [
        [
            describe(found.case),
            found.contenders[CYTHON].how,
            number(found.case.flop / found.median(CYTHON) / 1e9),
            *(f"{100 * found.share(name):.0f} %" for name in EMALGAM),
            f"{number(found.ratio(NUMBA, CYTHON))} × ({verdict(found.ratio(NUMBA, CYTHON) <= MOST_NUMBA)})",
        ]
        for found in measurements
    ]
    ratio = f"numba_cpu by cython_cpu (target {MOST_NUMBA} ×)"
    header = [
        "N, D, K, covariance, dtype",
        "guard's choice",
        "cython_cpu Gflop/s",
        "cython_cpu share",
        "numba_cpu share",
        ratio,
    ]
    return table(header, rows)


def _initialization_table(found: Sequence[initialization.Initialization]) -> str:
    rows = [
        [
            f"{size(*each.size)}, {each.backend}",
            number(median(each.iterations)),
            *(number(median(each.seconds[method])) for method in initialization.METHODS),
            f"{number(each.ratio('k-means++'))} × ({verdict(each.ratio('k-means++') < MOST_INITIALIZATION)})",
        ]
        for each in found
    ]
    return "Seconds.\n\n" + table(
        [
            "N, D, K, backend",
            "five iterations",
            *initialization.METHODS,
            f"k-means++ by five iterations (target {MOST_INITIALIZATION:g} ×)",
        ],
        rows,
    )


def _memory_table(found: Sequence[memory.Memory]) -> str:
    rows = [
        [
            f"{size(*each.size)}, {each.backend}",
            each.start,
            f"{each.of_x / memory.MEBIBYTE:.0f}",
            f"{each.before / memory.MEBIBYTE:.0f}",
            f"{each.beyond:.1f}"
            + (f" (target {MOST_MEMORY:g}: {verdict(each.beyond <= MOST_MEMORY)})" if each.start == "loaded" else ""),
        ]
        for each in found
    ]
    return table(
        ["N, D, K, backend", "before the fit", "MiB of X", "MiB resident before", "MiB that the fit took"], rows
    )


def _start_tables(results: Results) -> str:
    seconds = results.imports
    rows = [[f"`{name}`", number(value), f"{value - seconds['numpy']:+.3f}"] for name, value in seconds.items()]
    met = verdict(import_seconds(results) <= MOST_IMPORT)
    commands = [
        [name, number(value), f"target {MOST_COMMAND} s: {verdict(value <= MOST_COMMAND)}" if name == CYTHON else ""]
        for name, value in results.commands.items()
    ]
    shape = f"{startup.ROWS} × {startup.FEATURES}, K = {startup.COMPONENTS}"
    states = results.numba
    parts = [[part, *(number(states[state][part]) for state in states)] for part in next(iter(states.values()))]
    return (
        table(["an interpreter that imports", "seconds", "beyond `import numpy`"], rows)
        + f"\nTarget: `import emalgam` adds at most {MOST_IMPORT} s to `import numpy`: {met}.\n\n"
        + table([f"`emalgam fit`, {shape}, whole process", "seconds", ""], commands)
        + "\n"
        + table(["numba_cpu, seconds", *states], parts)
    )


def _measurement_table(measurements: Sequence[Measurement]) -> str:
    rows = [
        [
            describe(found.case),
            name,
            str(found.contenders[name].span),
            *(milliseconds(value) for value in (median(seconds), min(seconds), max(seconds))),
        ]
        for found in measurements
        for name, seconds in found.seconds.items()
    ]
    return table(["N, D, K, covariance, dtype", "library", "iterations timed", "median", "least", "most"], rows)


def _agreement_table(measurements: Sequence[Measurement]) -> str:
    rows = []
    for dtype in DTYPES:
        rows.append([dtype, "allowed", *(f"{allowed:g}" for allowed in TOLERANCES[dtype].values())])
        for name in LIBRARIES:
            found = [
                m.contenders[name].differences for m in measurements if m.case.dtype == dtype and name in m.contenders
            ]
            if found:
                rows.append([dtype, name, *(f"{max(each[what] for each in found):.1e}" for what in TOLERANCES[dtype])])
    return table(["dtype", "library", *TOLERANCES["float64"]], rows)
