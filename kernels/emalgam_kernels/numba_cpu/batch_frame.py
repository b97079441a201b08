"""The frame that a problem is fitted in, made from its samples."""

from __future__ import annotations

import math

import numpy as np

from emalgam_kernels.batch import RELATIVE_FLOOR, ROUND_SHIFT
from emalgam_kernels.numba_cpu.batch_matrices import average, divide, factorize
from emalgam_kernels.numba_cpu.batch_memory import (
    ADDED,
    COARSE,
    EXTENT,
    FINER,
    FLOOR,
    INNER,
    INNER_REDUCTION,
    MEAN,
    MIDDLE,
    PIVOT,
    SCALE,
    SHIFT,
    SPLICED,
    Frame,
    Problem,
    Rules,
    Samples,
    Tiles,
    Work,
    read_tile,
    reframe,
    rows_of,
    visit,
    whole,
)
from emalgam_kernels.numba_cpu.tiles import (
    compiled,
    constant,
    copy_row,
    direct_statistic_tile,
    feature_tile,
    fill_row,
    inner_product,
    quadratic_count,
)

_FIRST = constant(0)


@compiled(SPLICED)
def prepare(rules: Rules, samples: Samples, problem: Problem, work: Work) -> float:
    """Makes the frame of a problem, and its tiles if they are kept; returns Σ ω, or NaN if a sample is not finite."""
    tiles, frame, scratch = work.tiles, work.frame, work.scratch
    if not find_range(samples, problem, frame, tiles):
        return np.nan
    total = find_deviation(samples, problem, frame, tiles, scratch.vector)
    find_scale(rules, frame, scratch.vector)
    fill_row(frame.scatter[0], frame.scatter.shape[1], 0)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, frame, tiles, tile), rows_of(problem, tile)
        z, weight, columns = tiles.z[slot], tiles.rows[slot], whole(rows)
        if problem.kept:
            reframe(z, weight[0], rows, frame.rows[MEAN], frame.rows[FINER])
            if rules.whole:
                feature_tile(rules.packed_map, z, columns, _FIRST, tiles.phi[slot])
        y, whitened, products = tiles.y, tiles.whitened, tiles.products
        direct_statistic_tile(rules.direct_map, frame.origin, z, weight, columns, y, whitened, products, frame.scatter)
    find_totals(rules, frame)
    # The variance of each feature given those before it, of all samples together.
    divide(rules, frame.scatter[0], total, scratch.lower)
    factorize(scratch.lower, frame.rows[ADDED], frame.rows[FLOOR], 1.0, scratch.precision)
    for i in range(frame.rows.shape[1]):
        frame.rows[PIVOT, i] = scratch.precision[min(i, len(scratch.precision) - 1), i] ** 2
    return total


# ---- the first step: the range of each feature -----------------------------------------------------------------------


@compiled(INNER)
def power_of_two(deviation: float) -> float:
    """What brings a positive number into [½, 1); 1 for zero. Neither it nor its inverse overflows."""
    if not deviation > 0:
        return 1.0
    return math.ldexp(1.0, -min(max(math.frexp(deviation)[1], -1021), 1021))


@compiled(INNER)
def find_range(samples: Samples, problem: Problem, frame: Frame, tiles: Tiles) -> bool:
    """Reads the tiles; middle and coarse from the range of each feature; False if a sample is not finite."""
    rows, finite = frame.rows, True
    low, high = rows[SHIFT], rows[SCALE]
    for d in range(len(low)):
        low[d], high[d] = np.inf, -np.inf
        rows[MIDDLE, d], rows[COARSE, d], rows[MEAN, d], rows[FINER, d] = 0.0, 1.0, 0.0, 1.0
    for tile in range(problem.tiles):
        slot = tile if problem.kept else len(tiles.z) - 1
        read_tile(samples, problem, frame, tiles, tile, slot)
        weight = tiles.rows[slot, 0]
        for d in range(len(low)):
            row, least, most = tiles.z[slot, d], low[d], high[d]
            for n in range(rows_of(problem, tile)):
                if weight[n] > 0:
                    finite &= abs(row[n]) < np.inf
                    least = row[n] if row[n] < least else least
                    most = row[n] if row[n] > most else most
            low[d], high[d] = least, most
    # Within the range of each feature nothing overflows; a constant one is exactly zero in the frame.
    for d in range(len(low)):
        half = high[d] / 2 - low[d] / 2
        rows[MIDDLE, d] = low[d] / 2 + high[d] / 2 if high[d] > low[d] else low[d]
        rows[COARSE, d] = power_of_two(half)
        rows[EXTENT, d] = half * rows[COARSE, d]
    return finite


# ---- the second: mean and deviation ----------------------------------------------------------------------------------


@compiled(INNER_REDUCTION)
def squared_deviation(weight: np.ndarray, z: np.ndarray, mean: float, rows: int) -> float:
    """Σ ω (z − mean)²."""
    total = 0.0
    for n in range(rows):
        total += weight[n] * ((z[n] - mean) * (z[n] - mean))
    return total


@compiled(INNER)
def find_deviation(samples: Samples, problem: Problem, frame: Frame, tiles: Tiles, deviation: np.ndarray) -> float:
    """Mean and deviation, √(Σ ω (z − mean)² / Σ ω), in the coarse frame; returns Σ ω."""
    D, total, mean = len(deviation), 0.0, frame.rows[SHIFT]
    fill_row(mean, D, 0)
    fill_row(deviation, D, 0)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, frame, tiles, tile), rows_of(problem, tile)
        z, weight = tiles.z[slot], tiles.rows[slot, 0]
        if problem.kept:
            reframe(z, weight, rows, frame.rows[MIDDLE], frame.rows[COARSE])
        for n in range(rows):
            total += weight[n]
        for d in range(D):
            mean[d] += inner_product(weight, z[d], rows)
    for d in range(D):
        mean[d] /= total
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, frame, tiles, tile), rows_of(problem, tile)
        for d in range(D):
            deviation[d] += squared_deviation(tiles.rows[slot, 0], tiles.z[slot, d], mean[d], rows)
    for d in range(D):
        deviation[d] = math.sqrt(deviation[d] / total)
        frame.rows[MEAN, d] = mean[d]
    return total


@compiled(INNER)
def find_scale(rules: Rules, frame: Frame, deviation: np.ndarray) -> None:
    """The rest of the frame, and what is measured in it: metric, floor and added."""
    rows, D, least = frame.rows, len(deviation), np.inf
    for d in range(D):
        finer = power_of_two(deviation[d])
        # A rounded mean leaves the differences between samples exact: those that are equal stay so.
        rows[MEAN, d] = np.rint(rows[MEAN, d] * (finer * ROUND_SHIFT)) / (finer * ROUND_SHIFT)
        rows[FINER, d] = finer
        if deviation[d] > 0:
            least = min(least, rows[COARSE, d] * rows[FINER, d])
    for d in range(D):
        if rules.isotropic:  # one scale for all features
            rows[FINER, d] = (least if least < np.inf else 1.0) / rows[COARSE, d]
        finer, scale = rows[FINER, d], rows[COARSE, d] * rows[FINER, d]
        variance = (deviation[d] * finer) ** 2
        spread = variance if variance > 0 else 1.0
        rows[SCALE, d] = scale
        rows[EXTENT, d] = (rows[EXTENT, d] + abs(rows[MEAN, d])) * finer  # the largest |z|
        rows[SHIFT, d] = rows[MIDDLE, d] + rows[MEAN, d] / scale * finer
        rows[FLOOR, d] = RELATIVE_FLOOR * spread
        rows[ADDED, d] = rows[FLOOR, d] if rules.added < 0 else rules.added * scale**2
        frame.metric[0, 0, d] = 1.0 if rules.isotropic else 1.0 / math.sqrt(spread)
    if rules.isotropic:
        average(rows[FLOOR], D)
        average(rows[ADDED], D)


@compiled(INNER)
def find_totals(rules: Rules, frame: Frame) -> None:
    """Σ ω of the packed φ from that of the direct one, which has all of its features."""
    D, scatter, totals = frame.rows.shape[1], frame.scatter[0], frame.totals
    first, quadratic = quadratic_count(rules.direct_map, D), quadratic_count(rules.packed_map, D)
    copy_row(scatter, quadratic, totals)
    if rules.isotropic:
        for d in range(1, D):
            totals[0] += scatter[d]
    copy_row(scatter[first:], D + 1, totals[quadratic:])
