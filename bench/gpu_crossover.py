"""Where the fused kernel is faster than cuBLAS products with features in memory: measured, for crossover.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from bench.gpu_clock import Missing, Run
from bench.problems import SEED
from bench.tables import milliseconds, number, say, table
from emalgam.covariance import COVARIANCES
from emalgam.packing import Components, Frame
from emalgam_kernels.numba_cuda import fused, products
from emalgam_kernels.numba_cuda.device import most_shared_bytes
from emalgam_kernels.numba_cuda.mixture import problem_of
from emalgam_kernels.numba_cuda.problem import Results, Sums
from emalgam_kernels.parameters import statistic_count

GRID: Final = (
    *(("full", D, K) for D in (2, 4, 8, 12, 16) for K in (4, 16, 64, 128)),
    *(("spherical", D, K) for D in (16, 64, 96) for K in (4, 16, 64, 128)),
)
DRY_GRID: Final = (("full", 2, 3), ("spherical", 3, 2), ("full", 40, 40))
ARITHMETICS: Final = ("float32", "float64")
ROWS: Final = 1_000_000
NEEDED: Final = 3.0  # seconds, Numba's compilation included
TOLERATED: Final = (
    1.05  # how many times longer the fused kernel may take somewhere in the region that the table gives it
)


@dataclass(frozen=True)
class Point:
    """Seconds of one pass both ways; None where the fused kernel does not fit."""

    feature_map: str
    D: int
    K: int
    arithmetic: str
    fused: float | Missing | None
    products: float | Missing

    @property
    def F(self) -> int:
        return statistic_count(self.feature_map, self.D)

    @property
    def ratio(self) -> float | None:
        """How many times longer the fused kernel takes."""
        known = isinstance(self.fused, float) and isinstance(self.products, float)
        return self.fused / self.products if known else None


def measure(run: Run) -> list[Point]:
    """Both ways over the grid, as far as time allows."""
    return [
        _point(run, feature_map, D, K, arithmetic)
        for arithmetic in ARITHMETICS
        for feature_map, D, K in (DRY_GRID if run.dry else GRID)
    ]


def _point(run: Run, feature_map: str, D: int, K: int, arithmetic: str) -> Point:
    F = statistic_count(feature_map, D)
    place = feature_map, D, K, arithmetic
    if fused.plan(D, K, F, arithmetic, False, most_shared_bytes(run.device)) is None:
        return Point(*place, None, Missing(""))
    found = [
        run.attempt(f"crossover, {way.__name__}, {place}", lambda way=way: _seconds(run, way, *place), NEEDED)
        for way in (fused, products)
    ]
    say(f"    {place}: {found}")
    return Point(*place, *found)


def _seconds(run: Run, way: Any, feature_map: str, D: int, K: int, arithmetic: str) -> float:
    """A pass of one of the two modules over rows on the device."""
    dtype = getattr(torch, arithmetic)
    generator = torch.Generator(run.device).manual_seed(SEED)
    x = torch.randn(60 if run.dry else ROWS, D, dtype=dtype, device=run.device, generator=generator)
    covariance = COVARIANCES[feature_map]
    ones = covariance.from_variances(np.ones(D), K)
    means = np.random.default_rng(SEED).normal(size=(K, D))
    components = Components(np.full(K, 1 / K), means, ones, covariance.factor(ones))
    parameters = covariance.packed(components, Frame(np.zeros(D), np.ones(D)), arithmetic)
    problem = problem_of(parameters, run.device)
    zeros = torch.zeros(K * parameters.n_statistics + 1, dtype=torch.float64, device=run.device)
    results = Results(sums=Sums(zeros[:-1].view(K, -1), zeros[-1:]))
    return run.seconds(lambda: way.run(x, None, problem, results), repeats=5)


# ---- the table that the kernels use


def pairs(points: Sequence[Point], arithmetic: str) -> list[list[int]]:
    """[F, K] up to which the fused kernel is to be used; [[0, 0]], which nothing is below, if nowhere.

    It was faster at (F, K) itself, and nowhere below did it take more than 5 % longer.
    """
    known = [point for point in points if point.arithmetic == arithmetic and point.ratio is not None]
    good = [
        (point.F, point.K)
        for point in known
        if point.ratio < 1
        and all(other.ratio <= TOLERATED for other in known if other.F <= point.F and other.K <= point.K)
    ]
    outermost = [
        list(pair)
        for pair in sorted(set(good))
        if not any(other != pair and other[0] >= pair[0] and other[1] >= pair[1] for other in good)
    ]
    return outermost or [[0, 0]]


def write(path: Path, points: Sequence[Point], device: str, date: str) -> None:
    """crossover.json; RuntimeError if a point of the grid could not be measured."""
    if any(point.fused is not None and point.ratio is None for point in points):
        raise RuntimeError("crossover.json is as it was: some points of the grid were not measured")
    path.write_text(as_json(points, device, date), encoding="utf-8")


def as_json(points: Sequence[Point], device: str, date: str) -> str:
    found = {arithmetic: pairs(points, arithmetic) for arithmetic in ARITHMETICS}
    return json.dumps({"device": device, "date": date, **found}) + "\n"


NOTE: Final = """Milliseconds of a pass of 1 000 000 rows, the fused kernel and products with features in memory;
"longer" is how many times longer the fused one takes. Where it does not fit into shared memory there is only the other
way.

"""


def text(points: Sequence[Point]) -> str:
    """The section of the report."""
    rows = []
    for point in points:
        measured = [str(each) if isinstance(each, Missing) else each for each in (point.fused, point.products)]
        cells = [milliseconds(each) if isinstance(each, float) else each for each in measured]
        ratio = "" if point.ratio is None else f"{number(point.ratio)} ×"
        cells = ["does not fit", "", ""] if point.fused is None else [*cells, ratio]
        rows.append([point.feature_map, str(point.D), str(point.K), str(point.F), point.arithmetic, *cells])
    header = ["features", "D", "K", "F", "arithmetic", "fused", "products", "longer"]
    best = ", ".join(f"{arithmetic} {pairs(points, arithmetic)}" for arithmetic in ARITHMETICS)
    return NOTE + table(header, rows) + f"\nFused up to [F, K]: {best}.\n"
