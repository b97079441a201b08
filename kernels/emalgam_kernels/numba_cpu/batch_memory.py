"""What a thread has in memory of a problem while it is fitted, and how the problem's samples get there.

One thread runs a whole problem. Its samples lie in tiles of T columns (see `emalgam_kernels.numba_cpu.tiles`); while
they fit the thread's memory, z and Φ are made once and kept for the whole fit, else tile by tile in every pass. T
follows from the number of features, and tiles are visited in order, so the bits of a result depend on neither.

Covariances of full and tied mixtures are (D, D), those of diag and spherical ones rows (1, D): the variance of feature
i is ``covariance[min(i, H − 1), i]``, where H is how many rows there are.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from emalgam_kernels.numba_cpu.tiles import OPTIONS, REDUCTION, compiled, constant, load_tile

STEP: Final = 8  # columns of a tile are a multiple of it: one register of AVX-512

# No step makes an array, and only compiled functions call it: without reference counts and wrappers steps compile in
# half the time, and a call costs less. Those that call others, from one place, are spliced into their caller, as for a
# function of its own Numba would optimize once more all that it calls.
OUTER: Final[Any] = OPTIONS | {"_nrt": False, "no_cfunc_wrapper": True}
INNER: Final[Any] = OUTER | {"no_cpython_wrapper": True}
SPLICED: Final[Any] = INNER | {"inline": "always"}
INNER_REDUCTION: Final[Any] = INNER | {"fastmath": REDUCTION["fastmath"]}

OLD, NEW, BEST = map(constant, range(3))  # of Components
MIDDLE, COARSE, MEAN, FINER, SHIFT, SCALE, EXTENT, FLOOR, ADDED, PIVOT = range(10)  # rows of a frame


class Samples(NamedTuple):
    """The samples of all problems. Either float64 or float32 is x, the other is empty: one function serves both."""

    float64: np.ndarray  # (N, D)
    float32: np.ndarray  # (N, D)
    order: np.ndarray  # (N,) int64, or empty
    sample_weight: np.ndarray  # (N,) float64, or empty


class Rules(NamedTuple):
    """How each problem is fitted; see `emalgam_kernels.batch.Settings`."""

    packed_map: int  # FULL, LINEAR for tied, DIAG or SPHERICAL
    direct_map: int  # FULL or DIAG
    shared: bool  # one covariance for all components: tied
    isotropic: bool  # one variance for all features: spherical
    whole: bool  # Φ of a tile is in one piece, and kept if the tile is
    columns: int  # T
    parameters_at_all: float  # p = parameters_at_all + K · parameters_each
    parameters_each: float
    aic: bool
    icl: bool
    n_init: int
    max_iter: int
    tol: float
    added: float
    seed: np.uint64


class Problem(NamedTuple):
    """Where the samples of a problem are: [first, first + size), of which `positive` have weight."""

    first: int
    size: int
    positive: int
    largest: float  # weight; weights are divided by it, so that their sum does not overflow
    tiles: int
    columns: int  # T
    kept: bool  # all tiles at once


class Tiles(NamedTuple):
    """Tiles that are kept, or one that is filled again and again; and what all of them share."""

    z: np.ndarray  # (tiles, D, stride)
    phi: np.ndarray  # (tiles or 1, features, stride)
    rows: np.ndarray  # (tiles, 2, stride): ω, and half the squared distance to the nearest seed
    x: np.ndarray  # (T, D)
    logits: np.ndarray  # (K, stride)
    scratch: np.ndarray  # (3, stride)
    y: np.ndarray  # for direct tiles, as the next two
    whitened: np.ndarray
    products: np.ndarray


class Frame(NamedTuple):
    """Of a problem: z = ((x − middle) · coarse − mean) · finer = (x − shift) · scale."""

    rows: np.ndarray  # (10, D): MIDDLE … PIVOT
    metric: np.ndarray  # (1, 1, D): the factor that gives z unit variances
    origin: np.ndarray  # (1, D): zeros
    constants: np.ndarray  # (K,): zeros
    scatter: np.ndarray  # (1, direct F): Σ ω φ(z)
    totals: np.ndarray  # (F,): the same of the packed φ


class Components(NamedTuple):
    """Three mixtures in the frame: OLD and NEW, which trade places, and BEST. C is 1 if they share Σ, else K."""

    weights: np.ndarray  # (3, K)
    means: np.ndarray  # (3, K, D)
    covariances: np.ndarray  # (3, C, H, D)
    factors: np.ndarray  # L⁻¹ as direct_logit_tile reads it: (3, C, D, padded D), or (3, C, 1, D)
    log_constants: np.ndarray  # (3, K)
    natural: np.ndarray  # (3, K, padded F)
    terms: np.ndarray  # (3, K): how large the terms of ⟨η, φ(z)⟩ are anywhere among the samples, over w


class Scratch(NamedTuple):
    """What steps hand to each other."""

    indices: np.ndarray  # (K,) int64
    relative: np.ndarray  # (K, padded F): η relative to one component
    statistics: np.ndarray  # (K, padded F)
    centred_statistics: np.ndarray  # (K, direct F): about each component's own mean
    lower: np.ndarray  # (H, D)
    precision: np.ndarray  # (H, D)
    vector: np.ndarray  # (D,)
    mass: np.ndarray  # (K,)
    candidates: np.ndarray  # (K, D)
    targets: np.ndarray  # (K,)


class Work(NamedTuple):
    """All memory of one thread."""

    tiles: Tiles
    frame: Frame
    components: Components
    scratch: Scratch


# ---- the samples of a problem ----------------------------------------------------------------------------------------


@compiled(INNER)
def describe(rules: Rules, samples: Samples, first: int, size: int, places: int) -> tuple[Problem, bool]:
    """Where a problem's samples are; and whether a weight is negative or not finite."""
    positive, largest, bad = size, 1.0, False
    if len(samples.sample_weight) > 0:
        positive, largest = 0, 0.0
        for i in range(first, first + size):
            weight = samples.sample_weight[samples.order[i] if len(samples.order) > 0 else i]
            bad |= not 0 <= weight < np.inf
            positive += weight > 0
            largest = max(largest, weight)
    tiles = (size + rules.columns - 1) // rules.columns
    return Problem(first, size, positive, largest, tiles, rules.columns, tiles <= places), bad


@compiled(INNER)
def rows_of(problem: Problem, tile: int) -> int:
    """Samples of a tile."""
    return min(problem.columns, problem.size - tile * problem.columns)


@compiled(INNER)
def whole(rows: int) -> int:
    """Columns of a tile of so many samples."""
    return (rows + STEP - 1) // STEP * STEP


@compiled(INNER)
def reframe(z: np.ndarray, weight: np.ndarray, rows: int, shift: np.ndarray, scale: np.ndarray) -> None:
    """z ← (z − shift) · scale; samples without weight stay zero."""
    for d in range(len(z)):
        row, centre, factor = z[d], shift[d], scale[d]
        for n in range(rows):
            row[n] = (row[n] - centre) * factor if weight[n] > 0 else 0.0


@compiled(INNER)
def read_tile(samples: Samples, problem: Problem, frame: Frame, tiles: Tiles, tile: int, slot: int) -> None:
    """z = ((x − middle) · coarse − mean) · finer, and ω."""
    start, rows, D = tile * problem.columns, rows_of(problem, tile), tiles.x.shape[1]
    x, given = tiles.x[:rows], tiles.scratch[0, : rows if len(samples.sample_weight) > 0 else 0]
    for n in range(rows):
        i = problem.first + start + n
        i = samples.order[i] if len(samples.order) > 0 else i
        if len(samples.float64) > 0:
            for d in range(D):
                x[n, d] = samples.float64[i, d]
        else:
            for d in range(D):
                x[n, d] = samples.float32[i, d]
        if len(given) > 0:
            given[n] = samples.sample_weight[i] / problem.largest
    z, weight = tiles.z[slot], tiles.rows[slot, 0]
    load_tile(x, given, whole(rows), frame.rows[MIDDLE], frame.rows[COARSE], weight, z)
    reframe(z, weight, rows, frame.rows[MEAN], frame.rows[FINER])


@compiled(INNER)
def visit(samples: Samples, problem: Problem, frame: Frame, tiles: Tiles, tile: int) -> int:
    """The place of a tile, which is read again if it was not kept."""
    if problem.kept:
        return tile
    slot = len(tiles.z) - 1
    read_tile(samples, problem, frame, tiles, tile, slot)
    return slot
