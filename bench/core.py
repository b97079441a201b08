"""Iterations of EM beside scikit-learn and oneDAL: the cases, what their figures have to be, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final

from bench import em_iteration
from bench.em_iteration import Measurement
from bench.libraries import EMALGAM, LIBRARIES, ONEDAL, SCIKIT_LEARN, TOLERANCES
from bench.machine import MATRIX_SIZE
from bench.problems import COVARIANCE_TYPES, DTYPES, SIZES, SMOKE_SIZE, Case
from bench.tables import Target, Topic, describe, milliseconds, number, say, size, table, verdict

ROUNDS: Final = 5
SMOKE_SPAN_SECONDS: Final = 0.01
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


def topic(smoke: bool) -> Topic:
    """Every case in turns; in a smoke test small ones, once."""
    measurements = [_announced(case, smoke) for case in cases(smoke)]
    return Topic(
        sections=_sections(measurements),
        targets=[*_speed_targets(measurements), *_backend_targets(measurements)],
        details=[
            "## All measurements\n\nMilliseconds per iteration over the rounds.\n\n" + _measurement_table(measurements),
            "## Agreement\n\n" + AGREEMENT_NOTE + _agreement_table(measurements),
        ],
    )


# ---- measuring


def cases(smoke: bool) -> list[Case]:
    """The cases that have figures; the small ones, of every covariance type and dtype, for a smoke test."""
    if smoke:
        return [Case(*SMOKE_SIZE, kind, dtype) for kind in COVARIANCE_TYPES for dtype in DTYPES]
    return [Case(N, D, K, kind, dtype) for N, D, K, kind, dtype in FASTER]


def _announced(case: Case, smoke: bool) -> Measurement:
    """A measurement, said on standard error before it begins and when it is there."""
    say(f"    {case}")
    rounds, span_seconds = (1, SMOKE_SPAN_SECONDS) if smoke else (ROUNDS, em_iteration.SPAN_SECONDS)
    found = em_iteration.measure(case, rounds, span_seconds)
    say("        " + ", ".join(f"{name} {milliseconds(found.median(name))} ms" for name in found.seconds))
    return found


# ---- judging


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


# ---- writing


METHOD: Final = """## Iterations of EM

Every library begins from the same weights, means and precisions on the same rows and adds nothing to covariances.
Seconds per iteration are the difference between a long and a one-iteration fit, divided by the difference in
iterations; the long one is about {span:g} s longer, three iterations at least. Medians of {rounds} rounds; scikit-learn
computes with its BLAS, emalgam and oneDAL with their own threads. Before it is timed, each library has to agree with
scikit-learn in float64; see the end.
"""

BACKENDS_NOTE: Final = """What the guard chose (the benchmark stops if it leaves the dtype of the data), the share of
the machine's matrix product rate (4 N F K flop per iteration by the time of an iteration, beside NumPy's product of two
large matrices of the same dtype in the same rounds), and how many times longer numba_cpu takes.

"""

AGREEMENT_NOTE: Final = """Largest difference from scikit-learn's float64 result on the same rows, after three
iterations, over all cases; the benchmark stops where one is larger than allowed. Clusters have variances near one.

"""


def _sections(measurements: Sequence[Measurement]) -> list[str]:
    full = [
        f"## Full covariances, {dtype}\n\nMilliseconds per iteration; how many times faster cython_cpu is.\n\n"
        + _speed_table([m for m in measurements if m.case.covariance_type == "full" and m.case.dtype == dtype])
        for dtype in DTYPES
    ]
    others = [m for m in measurements if m.case.covariance_type != "full" and m.case.dtype == "float64"]
    return [
        METHOD.format(rounds=len(measurements[0].matrix_product), span=em_iteration.SPAN_SECONDS),
        *full,
        "## Other covariances, float64\n\noneDAL has no tied and no spherical ones.\n\n" + _speed_table(others),
        "## Backends\n\n" + BACKENDS_NOTE + _backend_table(measurements) + "\n" + _rates(measurements),
    ]


def _rates(measurements: Sequence[Measurement]) -> str:
    lines = []
    for dtype in DTYPES:
        rates = [rate for found in measurements if found.case.dtype == dtype for rate in found.matrix_product]
        low, high = min(rates) / 1e9, max(rates) / 1e9
        lines.append([dtype, number(median(rates) / 1e9), f"{number(low)} to {number(high)}"])
    return table([f"matrix product {MATRIX_SIZE} × {MATRIX_SIZE}", "Gflop/s, median of the run", "range"], lines)


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
