"""The start of a fit: greedy k-means++, and the random numbers of a problem."""

from __future__ import annotations

import math

import numpy as np

from emalgam_kernels.batch import ROUNDING
from emalgam_kernels.numba_cpu.batch_expectation import distance_tile
from emalgam_kernels.numba_cpu.batch_memory import (
    INNER,
    INNER_REDUCTION,
    SPLICED,
    Frame,
    Problem,
    Samples,
    Tiles,
    Work,
    rows_of,
    visit,
    whole,
)
from emalgam_kernels.numba_cpu.draws import philox, unit_float64
from emalgam_kernels.numba_cpu.tiles import compiled, copy_row, fill_row
from emalgam_kernels.philox import PROBLEMS, SEEDS

_STREAM_OF_PROBLEMS, _STREAM_OF_SEEDS = np.uint64(PROBLEMS), np.uint64(SEEDS)
_0, _32 = np.uint64(0), np.uint64(32)


@compiled(SPLICED)
def choose_seeds(
    samples: Samples,
    problem: Problem,
    work: Work,
    key: np.uint64,
    K: int,
    restart: int,
    total: float,
    seeds: np.ndarray,
) -> None:
    """Greedy k-means++: each seed is the best of 2 + log K candidates, drawn in proportion to ω · nearest."""
    by_weight, mass, t = True, total, 0
    for k in range(K):
        count = 1 if k == 0 else 2 + int(math.log(K))
        for c in range(count):
            work.scratch.targets[c] = uniform(key, K, restart, t + c) * mass
        draw(samples, problem, work, seeds[:k], by_weight, count)
        take(samples, problem, work, count)
        best = choose(samples, problem, work, seeds[:k], count)
        copy_row(work.scratch.candidates[best], seeds.shape[1], seeds[k])
        by_weight = not work.scratch.targets[best] > 0
        mass = total if by_weight else work.scratch.targets[best]
        t += count


# ---- random numbers --------------------------------------------------------------------------------------------------


@compiled(INNER)
def key_of(seed: np.uint64, number: np.uint64) -> np.uint64:
    """Of the random numbers of a problem."""
    low, high, _, _ = philox(seed, _STREAM_OF_PROBLEMS, _0, number)
    return low | high << _32


@compiled(INNER)
def uniform(key: np.uint64, K: int, restart: int, t: int) -> float:
    """Number t of a restart with K components, in (0, 1)."""
    row = (np.uint64(K) << _32) + np.uint64(restart)
    a, b, _, _ = philox(key, _STREAM_OF_SEEDS, np.uint64(t), row)
    return unit_float64(a, b)


# ---- candidates ------------------------------------------------------------------------------------------------------


@compiled(INNER)
def nearest_tile(problem: Problem, frame: Frame, tiles: Tiles, seeds: np.ndarray, slot: int, rows: int) -> None:
    """nearest ← half the squared distance to the nearest seed; only the last seed is new to a tile that is kept."""
    nearest, closeness = tiles.rows[slot, 1], tiles.logits[0]
    first = max(len(seeds) - 1, 0) if problem.kept else 0
    for k in range(first, len(seeds)):
        distance_tile(frame, tiles, seeds[k : k + 1], slot, whole(rows))
        for n in range(rows):
            nearest[n] = -closeness[n] if k == 0 else min(nearest[n], -closeness[n])


@compiled(SPLICED)
def draw(samples: Samples, problem: Problem, work: Work, seeds: np.ndarray, by_weight: bool, count: int) -> None:
    """indices ← the first sample whose cumulative mass, ω or ω · nearest, exceeds each target; never one without."""
    frame, tiles, targets, indices = work.frame, work.tiles, work.scratch.targets, work.scratch.indices
    total, last, cumulative = 0.0, 0, tiles.scratch[0]
    for c in range(count):
        indices[c] = 0
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, frame, tiles, tile), rows_of(problem, tile)
        nearest_tile(problem, frame, tiles, seeds, slot, rows)
        weight, nearest = tiles.rows[slot, 0], tiles.rows[slot, 1]
        for n in range(rows):
            mass = weight[n] if by_weight else weight[n] * nearest[n]
            last = tile * problem.columns + n if mass > 0 else last
            total += mass
            cumulative[n] = total
        for c in range(count):
            target, below = targets[c], 0
            for n in range(rows):
                below += cumulative[n] <= target
            indices[c] += below
    for c in range(count):
        indices[c] = min(indices[c], last)


@compiled(INNER)
def take(samples: Samples, problem: Problem, work: Work, count: int) -> None:
    """candidates ← the samples of the indices, in the frame."""
    tiles, candidates = work.tiles, work.scratch.candidates
    for c in range(count):
        index = work.scratch.indices[c]
        slot = visit(samples, problem, work.frame, tiles, index // problem.columns)
        for d in range(candidates.shape[1]):
            candidates[c, d] = tiles.z[slot, d, index % problem.columns]


# ---- the best of them ------------------------------------------------------------------------------------------------


@compiled(INNER_REDUCTION)
def potential_of(weight: np.ndarray, nearest: np.ndarray, closeness: np.ndarray, rows: int, alone: bool) -> float:
    """Σ ω min(nearest, −closeness)."""
    total = 0.0
    for n in range(rows):
        total += weight[n] * (-closeness[n] if alone or -closeness[n] < nearest[n] else nearest[n])
    return total


@compiled(SPLICED)
def choose(samples: Samples, problem: Problem, work: Work, seeds: np.ndarray, count: int) -> int:
    """The first of the candidates that leave the least potential, Σ ω · nearest; targets ← the potentials."""
    frame, tiles, candidates = work.frame, work.tiles, work.scratch.candidates[:count]
    potentials, best = work.scratch.targets, 0
    fill_row(potentials, count, 0)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, frame, tiles, tile), rows_of(problem, tile)
        if not problem.kept:
            nearest_tile(problem, frame, tiles, seeds, slot, rows)
        distance_tile(frame, tiles, candidates, slot, whole(rows))
        for c in range(count):
            weight, nearest = tiles.rows[slot, 0], tiles.rows[slot, 1]
            potentials[c] += potential_of(weight, nearest, tiles.logits[c], rows, len(seeds) == 0)
    for c in range(1, count):
        best = c if potentials[c] < (1 - ROUNDING) * potentials[best] else best
    return best
