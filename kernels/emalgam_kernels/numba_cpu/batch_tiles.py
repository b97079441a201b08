"""The steps of many fits as Numba functions; specified in `emalgam_kernels.reference.batch`, named as there.

One thread runs a whole problem. Its samples lie in tiles of T columns (see `emalgam_kernels.numba_cpu.tiles`); while
they fit the thread's memory, z and Φ are made once and kept for the whole fit, else tile by tile in every pass. T
follows from the number of features, and tiles are visited in order, so the bits of a result depend on neither.

Covariances of full and tied mixtures are (D, D), those of diag and spherical ones rows (1, D): the variance of feature
i is ``covariance[min(i, H − 1), i]``, where H is how many rows there are.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np

from emalgam_kernels import batch
from emalgam_kernels.batch import (
    EQUAL,
    LIFTS,
    MOST_CANCELLATION,
    NO_MASS,
    RELATIVE_FLOOR,
    ROUND_SHIFT,
    ROUNDING,
    Status,
)
from emalgam_kernels.numba_cpu.draws import philox, unit_float64
from emalgam_kernels.numba_cpu.tiles import (
    COMPONENTS_AT_ONCE,
    DIAG,
    FULL,
    LINEAR,
    OPTIONS,
    REDUCTION,
    compiled,
    constant,
    copy_row,
    direct_logit_tile,
    direct_statistic_tile,
    feature_tile,
    fill_row,
    inner_product,
    load_tile,
    log,
    packed_logit_tile,
    packed_statistic_tile,
    quadratic_count,
    softmax_tile,
)
from emalgam_kernels.philox import PROBLEMS, SEEDS

STEP: Final = 8  # columns of a tile are a multiple of it: one register of AVX-512
HALF_LOG_2_PI: Final = 0.5 * math.log(2 * math.pi)

# No function here makes an array, and only compiled ones call them: without reference counts and wrappers they compile
# in half the time, and a call costs less. Those that call others, from one place, are spliced into their caller, as for
# a function of its own Numba would optimize once more all that it calls.
OUTER: Final[Any] = OPTIONS | {"_nrt": False, "no_cfunc_wrapper": True}
INNER: Final[Any] = OUTER | {"no_cpython_wrapper": True}
SPLICED: Final[Any] = INNER | {"inline": "always"}
INNER_REDUCTION: Final[Any] = INNER | {"fastmath": REDUCTION["fastmath"]}

START, PACKED, DIRECT = map(constant, range(3))  # logits by distance to the seeds; ⟨η, φ(z)⟩; about each own mean
OLD, NEW, BEST = map(constant, range(3))  # of Components
FAILED, NARROW, BROAD = map(constant, range(3))  # what became of a covariance
MIDDLE, COARSE, MEAN, FINER, SHIFT, SCALE, FLOOR, ADDED, PIVOT = range(9)  # rows of a frame
FIRST, DIAGONAL = constant(0), constant(DIAG)

_FINE, _NOT_CONVERGED, _COLLAPSED, _TOO_FEW_ROWS, _NOT_FINITE, _BAD_WEIGHT, _NO_LIKELIHOOD, _ = map(int, Status)
replaces: Any = compiled(INNER)(batch.replaces)
_STREAM_OF_PROBLEMS, _STREAM_OF_SEEDS = np.uint64(PROBLEMS), np.uint64(SEEDS)
_0, _32 = np.uint64(0), np.uint64(32)


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
    logits: np.ndarray  # (padded K, stride)
    scratch: np.ndarray  # (3, stride)
    y: np.ndarray  # for direct tiles, as the next two
    whitened: np.ndarray
    products: np.ndarray


class Frame(NamedTuple):
    """Of a problem: z = ((x − middle) · coarse − mean) · finer = (x − shift) · scale."""

    rows: np.ndarray  # (9, D): MIDDLE … PIVOT
    metric: np.ndarray  # (1, 1, D): the factor that gives z unit variances
    origin: np.ndarray  # (1, D): zeros
    constants: np.ndarray  # (K,): zeros
    scatter: np.ndarray  # (1, direct F): Σ ω φ(z)


class Components(NamedTuple):
    """Three mixtures in the frame: OLD and NEW, which trade places, and BEST. C is 1 if they share Σ, else K."""

    weights: np.ndarray  # (3, K)
    means: np.ndarray  # (3, K, D)
    covariances: np.ndarray  # (3, C, H, D)
    factors: np.ndarray  # L⁻¹ as direct_logit_tile reads it: (3, C, padded D, padded D), or (3, C, 1, D)
    log_constants: np.ndarray  # (3, K)
    natural: np.ndarray  # (3, padded K, padded F)


class Scratch(NamedTuple):
    """What steps hand to each other."""

    indices: np.ndarray  # (padded K,) int64
    statistics: np.ndarray  # (padded K, padded F)
    centred_statistics: np.ndarray  # (padded K, direct F): about each component's own mean
    lower: np.ndarray  # (H, D)
    precision: np.ndarray  # (H, D)
    vector: np.ndarray  # (D,)
    mass: np.ndarray  # (K,)
    candidates: np.ndarray  # (padded K, D)
    targets: np.ndarray  # (padded K,)


class Work(NamedTuple):
    """All memory of one thread."""

    tiles: Tiles
    frame: Frame
    components: Components
    scratch: Scratch


class Verdict(NamedTuple):
    """What an M-step came to."""

    fine: bool  # there are components
    collapsed: bool
    packed: bool  # the guard lets them be packed
    common: float  # what the packed logits of all components lack, summed: −½ ⟨Λ, Σ ω z zᵀ⟩ if Λ is shared


class Fit(NamedTuple):
    """The outcome of a start; `value` is that of the criterion. K is 0 if it came to nothing."""

    K: int
    status: int
    log_likelihood: float
    entropy: float
    n_iter: int
    converged: bool
    value: float


# ---- the samples of a problem ---------------------------------------------------------------------------------------


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


# ---- the frame ------------------------------------------------------------------------------------------------------


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
        rows[MIDDLE, d] = low[d] / 2 + high[d] / 2 if high[d] > low[d] else low[d]
        rows[COARSE, d] = power_of_two(high[d] / 2 - low[d] / 2)
    return finite


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
def average(row: np.ndarray, count: int) -> None:
    """Every entry ← the mean of all."""
    total = 0.0
    for d in range(count):
        total += row[d]
    for d in range(count):
        row[d] = total / count


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
        rows[SHIFT, d] = rows[MIDDLE, d] + rows[MEAN, d] / scale * finer
        rows[FLOOR, d] = RELATIVE_FLOOR * spread
        rows[ADDED, d] = rows[FLOOR, d] if rules.added < 0 else rules.added * scale**2
        frame.metric[0, 0, d] = 1.0 if rules.isotropic else 1.0 / math.sqrt(spread)
    if rules.isotropic:
        average(rows[FLOOR], D)
        average(rows[ADDED], D)


@compiled(INNER)
def divide(rules: Rules, second: np.ndarray, mass: float, out: np.ndarray) -> None:
    """out ← second / mass, a matrix or a row; averaged over features if there is one variance for all."""
    D = out.shape[1]
    if rules.direct_map == FULL:
        for i in range(D):
            for j in range(i + 1):
                out[i, j] = out[j, i] = second[i * (i + 1) // 2 + j] / mass
        return
    for i in range(D):
        out[0, i] = second[i] / mass
    if rules.isotropic:
        average(out[0], D)


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
                feature_tile(rules.packed_map, z, columns, FIRST, tiles.phi[slot])
        y, whitened, products = tiles.y, tiles.whitened, tiles.products
        direct_statistic_tile(rules.direct_map, frame.origin, z, weight, columns, y, whitened, products, frame.scatter)
    # The variance of each feature given those before it, of all samples together.
    divide(rules, frame.scatter[0], total, scratch.lower)
    factorize(scratch.lower, frame.rows[ADDED], frame.rows[FLOOR], 1.0, scratch.precision)
    for i in range(frame.rows.shape[1]):
        frame.rows[PIVOT, i] = scratch.precision[min(i, len(scratch.precision) - 1), i] ** 2
    return total


# ---- the start ------------------------------------------------------------------------------------------------------


@compiled(INNER)
def uniform(key: np.uint64, K: int, restart: int, t: int) -> float:
    """Number t of a restart with K components, in (0, 1)."""
    row = (np.uint64(K) << _32) + np.uint64(restart)
    a, b, _, _ = philox(key, _STREAM_OF_SEEDS, np.uint64(t), row)
    return unit_float64(a, b)


@compiled(INNER)
def distance_tile(frame: Frame, tiles: Tiles, seeds: np.ndarray, slot: int, columns: int) -> None:
    """logits ← −½ of the squared distance to each seed, in the metric of k-means++."""
    z, y, whitened, logits = tiles.z[slot], tiles.y, tiles.whitened, tiles.logits
    direct_logit_tile(DIAGONAL, frame.metric, seeds, frame.constants, z, columns, y, whitened, logits)


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


# ---- matrices; L and L⁻¹ are lower triangles, or rows ---------------------------------------------------------------


@compiled(INNER_REDUCTION)
def dot(a: np.ndarray, b: np.ndarray, count: int) -> float:
    """Σ_i a_i b_i."""
    total = 0.0
    for i in range(count):
        total += a[i] * b[i]
    return total


@compiled(INNER)
def factorize(matrix: np.ndarray, added: np.ndarray, floor: np.ndarray, times: float, lower: np.ndarray) -> bool:
    """L with L Lᵀ = matrix + diag(added + times · floor); False if that is not positive definite."""
    H, D = matrix.shape
    for i in range(D):
        row = min(i, H - 1)
        pivot = matrix[row, i] + (added[i] + times * floor[i])
        if H == D:
            for j in range(i):
                lower[i, j] = (matrix[i, j] - dot(lower[i], lower[j], j)) / lower[j, j]
            pivot -= dot(lower[i], lower[i], i)
        if not pivot > 0:
            return False
        lower[row, i] = math.sqrt(pivot)
    return True


@compiled(INNER)
def invert(lower: np.ndarray, factor: np.ndarray) -> None:
    """factor ← L⁻¹: row i is (e_i − Σ_{j<i} L_ij row j) / L_ii."""
    H, D = lower.shape
    for i in range(D):
        row = min(i, H - 1)
        inverse = 1 / lower[row, i]
        if H == D:
            fill_row(factor[i], i, 0)
            for j in range(i):
                scaled = lower[i, j] * inverse
                for m in range(j + 1):
                    factor[i, m] -= scaled * factor[j, m]
        factor[row, i] = inverse


@compiled(INNER)
def multiply(factor: np.ndarray, precision: np.ndarray) -> None:
    """Lower triangle of Λ ← L⁻ᵀ L⁻¹: the sum over rows of L⁻¹ of rowᵀ row."""
    H, D = precision.shape
    if H < D:
        for i in range(D):
            precision[0, i] = factor[0, i] * factor[0, i]
        return
    for row in range(D):
        fill_row(precision[row], row + 1, 0)
        for i in range(row + 1):
            left = factor[row, i]
            for j in range(i + 1):
                precision[i, j] += left * factor[row, j]


@compiled(INNER)
def symmetric_product(lower: np.ndarray, packed: np.ndarray) -> float:
    """⟨A, B⟩ of two symmetric matrices: the lower triangle of A, and that of B row by row."""
    total = 0.0
    for i in range(len(lower)):
        start = i * (i + 1) // 2
        total += 2 * dot(lower[i], packed[start:], i) + lower[i, i] * packed[start + i]
    return total


# ---- parameters -----------------------------------------------------------------------------------------------------


@compiled(INNER)
def log_constant(weight: float, factor: np.ndarray, H: int, D: int) -> float:
    """log w + log |L⁻¹| − ½ D log 2π."""
    value = np.log(weight) - D * HALF_LOG_2_PI
    for i in range(D):
        value += np.log(factor[min(i, H - 1), i])
    return float(value)


@compiled(INNER)
def pack(
    packed_map: int, precision: np.ndarray, factor: np.ndarray, mean: np.ndarray, offset: float, natural: np.ndarray
) -> None:
    """η = (−½ Λ_ii, −Λ_ij, Λμ, offset − ½ ‖L⁻¹μ‖²) in the order of the feature map."""
    H, D = precision.shape
    first = quadratic_count(packed_map, D)
    fill_row(natural[first:], D, 0)
    for i in range(D):
        row, start = min(i, H - 1), 0 if H == D else i
        whitened = dot(factor[row, start:], mean[start:], i + 1 - start)
        offset -= 0.5 * whitened * whitened
        for j in range(start, i + 1):
            natural[first + j] += factor[row, j] * whitened
    natural[first + D] = offset
    if packed_map == FULL:
        for i in range(D):
            for j in range(i + 1):
                natural[i * (i + 1) // 2 + j] = -precision[i, j] if j < i else -0.5 * precision[i, i]
    elif packed_map != LINEAR:
        for i in range(first):
            natural[i] = -0.5 * precision[0, i]


@compiled(INNER)
def cancellation(precision: np.ndarray, covariance: np.ndarray, mean: np.ndarray, size: np.ndarray) -> float:
    """Σ_ij |Λ_ij| s_i s_j + D + 2, s_i² = Σ_ii + μ_i²: how large the terms of ⟨η, φ(z)⟩ are near the component."""
    H, D = precision.shape
    total = D + 2.0
    for i in range(D):
        row = min(i, H - 1)
        size[i] = math.sqrt(covariance[row, i] + mean[i] * mean[i])
        for j in range(i if H == D else 0):
            total += 2 * abs(precision[i, j]) * size[i] * size[j]
        total += precision[row, i] * size[i] * size[i]
    return total


@compiled(INNER)
def express(rules: Rules, frame: Frame, components: Components, scratch: Scratch, K: int, side: int) -> float:
    """Constants and natural parameters from weights, means and factors; returns the largest cancellation."""
    precision, D, most = scratch.precision, components.means.shape[2], 0.0
    for k in range(K):
        c = min(k, components.factors.shape[1] - 1)
        factor, mean, weight = components.factors[side, c], components.means[side, k], components.weights[side, k]
        if c == k:
            multiply(factor, precision)
        offset = log_constant(weight, factor, len(precision), D)
        components.log_constants[side, k] = offset
        pack(rules.packed_map, precision, factor, mean, offset, components.natural[side, k])
        if weight > 0:
            terms = cancellation(precision, components.covariances[side, c], mean, scratch.vector)
            most = most if terms <= most else terms  # NaN is the largest
    return most


# ---- the E-step -----------------------------------------------------------------------------------------------------


@compiled(INNER)
def logits_of(
    rules: Rules,
    frame: Frame,
    tiles: Tiles,
    components: Components,
    K: int,
    side: int,
    form: int,
    slot: int,
    columns: int,
    ready: bool,
) -> None:
    """L_k of a tile; packed ones without −½ zᵀΛz if Λ is shared."""
    z, means, y, whitened, logits = tiles.z[slot], components.means[side, :K], tiles.y, tiles.whitened, tiles.logits
    if form == START:
        distance_tile(frame, tiles, means, slot, columns)
    elif form == PACKED:
        natural = components.natural[side, : even(K)]
        phi = tiles.phi[min(slot, len(tiles.phi) - 1)]
        packed_logit_tile(rules.packed_map, natural, z, columns, ready, phi, logits)
    else:
        factors, constants = components.factors[side], components.log_constants[side]
        direct_logit_tile(rules.direct_map, factors, means, constants, z, columns, y, whitened, logits)


@compiled(INNER)
def even(K: int) -> int:
    """Rows of logits: K in whole register blocks."""
    return (K + COMPONENTS_AT_ONCE - 1) // COMPONENTS_AT_ONCE * COMPONENTS_AT_ONCE


@compiled(SPLICED)
def expect(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, side: int, form: int, centred: bool
) -> float:
    """Σ ω log p and the statistics of a pass: about each component's own mean if they are `centred`."""
    tiles, components, scratch, sum_log_p = work.tiles, work.components, work.scratch, 0.0
    statistics = scratch.centred_statistics[: even(K)] if centred else scratch.statistics[: even(K)]
    for k in range(K):
        fill_row(statistics[k], statistics.shape[1], 0)
    log_p, total, r, ready = tiles.scratch[0], tiles.scratch[1], tiles.logits[: even(K)], problem.kept and rules.whole
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        z, phi, weight = tiles.z[slot], tiles.phi[min(slot, len(tiles.phi) - 1)], tiles.rows[slot, 0]
        columns = whole(rows)
        logits_of(rules, work.frame, tiles, components, K, side, form, slot, columns, ready)
        softmax_tile(r, K, columns, weight, form == START, log_p, total)
        sum_log_p += inner_product(weight, log_p, rows)
        if centred:
            means, y, whitened, products = components.means[side, :K], tiles.y, tiles.whitened, tiles.products
            direct_statistic_tile(rules.direct_map, means, z, r, columns, y, whitened, products, statistics)
        else:
            built = ready or (form == PACKED and rules.whole)
            packed_statistic_tile(rules.packed_map, z, r, columns, built, phi, statistics)
    return sum_log_p


@compiled(INNER_REDUCTION)
def entropy_of(r: np.ndarray, weight: np.ndarray, rows: int) -> float:
    """−Σ ω r log r."""
    total = 0.0
    for n in range(rows):
        total -= weight[n] * (r[n] * log(r[n]) if r[n] > 0 else 0.0)
    return total


@compiled(SPLICED)
def evaluate(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, side: int, form: int
) -> tuple[float, float]:
    """Σ ω log p as in `expect`, and the entropy of the responsibilities."""
    tiles, sum_log_p, entropy = work.tiles, 0.0, 0.0
    log_p, total, ones = tiles.scratch[0], tiles.scratch[1], tiles.scratch[2]
    fill_row(ones, len(ones), 1)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        weight, columns, ready = tiles.rows[slot, 0], whole(rows), problem.kept and rules.whole
        logits_of(rules, work.frame, tiles, work.components, K, side, form, slot, columns, ready)
        softmax_tile(tiles.logits, K, columns, ones, form == START, log_p, total)
        sum_log_p += inner_product(weight, log_p, rows)
        for k in range(K):
            entropy += entropy_of(tiles.logits[k], weight, rows)
    return sum_log_p, entropy


# ---- the M-step -----------------------------------------------------------------------------------------------------


@compiled(SPLICED)
def maximize(rules: Rules, work: Work, K: int, old: int, new: int, centred: bool) -> Verdict:
    """w_k = N_k / N, μ_k and Σ_k from the statistics of a pass; Bishop (2006), eq. 9.24-9.26.

    A component without data stays where it was, without weight.
    """
    frame, components, scratch = work.frame, work.components, work.scratch
    statistics = scratch.centred_statistics if centred else scratch.statistics
    first = quadratic_count(rules.direct_map if centred else rules.packed_map, components.means.shape[2])
    collapsed = move(components, statistics, scratch.mass, first, K, old, new, centred)
    fine = True
    if rules.shared:
        estimate_shared(frame, scratch.mass, statistics, first, K, centred, components.covariances[new, 0])
    for c in range(1 if rules.shared else K):
        covariance, factor = components.covariances[new, c], components.factors[new, c]
        if not rules.shared and scratch.mass[c] == 0:
            copy_matrix(components.covariances[old, c], covariance)
            copy_matrix(components.factors[old, c], factor)
            continue
        if not rules.shared:
            estimate(rules, statistics[c], scratch.mass[c], first, covariance)
        outcome = regularize(frame, covariance, scratch.lower)
        fine &= outcome != FAILED
        collapsed |= outcome == NARROW and not rules.shared
        invert(scratch.lower, factor)
    packed = express(rules, frame, components, scratch, K, new) <= MOST_CANCELLATION
    common = -0.5 * symmetric_product(scratch.precision, frame.scatter[0]) if rules.shared else 0.0
    return Verdict(fine, collapsed, packed, common)


@compiled(INNER)
def move(
    components: Components,
    statistics: np.ndarray,
    mass: np.ndarray,
    first: int,
    K: int,
    old: int,
    new: int,
    centred: bool,
) -> bool:
    """Mass, weights and means of the new components; returns whether one is without data, whose mass becomes zero."""
    total, empty = 0.0, False
    for k in range(K):
        mass[k] = statistics[k, first + components.means.shape[2]]
        total += mass[k]
    for k in range(K):
        if mass[k] <= NO_MASS * total:
            mass[k], empty = 0.0, True
        components.weights[new, k] = mass[k] / total
        for d in range(components.means.shape[2]):
            centre = components.means[old, k, d] if centred or mass[k] == 0 else 0.0
            components.means[new, k, d] = centre + (statistics[k, first + d] / mass[k] if mass[k] > 0 else 0.0)
    return empty


@compiled(INNER)
def copy_matrix(matrix: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(matrix)):
        copy_row(matrix[i], matrix.shape[1], out[i])


@compiled(INNER)
def estimate(rules: Rules, statistics: np.ndarray, mass: float, first: int, out: np.ndarray) -> None:
    """Σ r (z − a)(z − a)ᵀ / N_k − δδᵀ with δ = Σ r (z − a) / N_k, about whatever centre a."""
    H, D = out.shape
    offset, squares = statistics[first : first + D], 0.0
    if rules.isotropic:  # (Σ r ‖z − a‖² / N_k − ‖δ‖²) / D
        for i in range(first):
            squares += statistics[i] / mass
        for i in range(D):
            squares -= (offset[i] / mass) * (offset[i] / mass)
        for i in range(D):
            out[0, i] = squares / D
        return
    divide(rules, statistics, mass, out)
    for i in range(D):
        row = min(i, H - 1)
        for j in range(0 if H == D else i, D if H == D else i + 1):
            out[row, j] -= (offset[i] / mass) * (offset[j] / mass)


@compiled(INNER)
def estimate_shared(
    frame: Frame, mass: np.ndarray, statistics: np.ndarray, first: int, K: int, centred: bool, out: np.ndarray
) -> None:
    """(Σ_n ω z zᵀ − Σ_k N_k δ_k δ_kᵀ) / Σ_k N_k; about the centres the first term is summed over components."""
    total = 0.0
    for k in range(K):
        total += mass[k]
    for i in range(len(out)):
        for j in range(i + 1):
            f = i * (i + 1) // 2 + j
            second = 0.0 if centred else frame.scatter[0, f]
            for k in range(K):
                if mass[k] > 0:
                    second += statistics[k, f] if centred else 0.0
                    second -= statistics[k, first + i] * (statistics[k, first + j] / mass[k])
            out[i, j] = out[j, i] = second / total


@compiled(INNER)
def singular(frame: Frame, covariance: np.ndarray, times: float, lower: np.ndarray) -> bool:
    """Whether some pivot, what the other features leave of a variance, or of the spread of all samples, is rounding."""
    added, floor, found = frame.rows[ADDED], frame.rows[FLOOR], False
    for i in range(len(floor)):
        row = min(i, len(covariance) - 1)
        variance = covariance[row, i] + (added[i] + times * floor[i])
        found |= lower[row, i] * lower[row, i] <= ROUNDING * max(variance, ROUNDING * floor[i] / RELATIVE_FLOOR)
    return found


@compiled(INNER)
def regularize(frame: Frame, covariance: np.ndarray, lower: np.ndarray) -> int:
    """Σ + diag(added), with as many floors as it takes to be positive definite; its L; and what became of it.

    It is narrow if it took any floor, or if, given the features before it, some feature varies less than the floor, and
    less than it does in all samples together.
    """
    added, floor, pivots = frame.rows[ADDED], frame.rows[FLOOR], frame.rows[PIVOT]
    for times in LIFTS:
        if factorize(covariance, added, floor, times, lower) and not singular(frame, covariance, times, lower):
            narrow = times > 0
            for i in range(len(floor)):
                row, least = min(i, len(covariance) - 1), added[i] + floor[i]
                covariance[row, i] += added[i] + times * floor[i]
                narrow |= lower[row, i] * lower[row, i] < least and pivots[i] > 2 * least
            return NARROW if narrow else BROAD
    return FAILED


# ---- EM -------------------------------------------------------------------------------------------------------------


@compiled(INNER)
def begin(frame: Frame, components: Components, K: int, side: int) -> None:
    """Before the first M-step: independent features with the variances of all samples."""
    for c in range(min(K, components.covariances.shape[1])):
        covariance, factor = components.covariances[side, c], components.factors[side, c]
        for i in range(frame.rows.shape[1]):
            row, variance = min(i, len(covariance) - 1), frame.rows[FLOOR, i] / RELATIVE_FLOOR
            if row == i:
                fill_row(covariance[i], len(covariance), 0)
                fill_row(factor[i], len(covariance), 0)
            covariance[row, i], factor[row, i] = variance, 1 / math.sqrt(variance)


@compiled(SPLICED)
def step(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, old: int, new: int, form: int
) -> tuple[float, Verdict]:
    """The E-step with the old components and the M-step that makes the new ones; and Σ ω log p as in `expect`.

    Where packed statistics lead to components that the guard does not let pass, the step is done again with statistics
    about the old means, which do not cancel.
    """
    centred = form == DIRECT
    while True:
        sum_log_p = expect(rules, samples, problem, work, K, old, form, centred)
        verdict = maximize(rules, work, K, old, new, centred)
        if centred or (verdict.fine and verdict.packed):
            return sum_log_p, verdict
        centred = True


@compiled(SPLICED)
def restart_fit(
    rules: Rules, samples: Samples, problem: Problem, work: Work, key: np.uint64, K: int, restart: int, total: float
) -> tuple[Fit, int]:
    """EM from one start, and where its components are."""
    old, new = OLD, NEW
    choose_seeds(samples, problem, work, key, K, restart, total, work.components.means[new])
    begin(work.frame, work.components, K, new)
    verdict, form = Verdict(True, False, True, 0.0), START
    bound, converged, n_iter = -np.inf, False, -1  # the M-step of the start is none
    while verdict.fine and n_iter < rules.max_iter and not converged:
        old, new, previous, common = new, old, bound, verdict.common
        sum_log_p, verdict = step(rules, samples, problem, work, K, old, new, form)
        n_iter += 1
        if n_iter > 0:
            bound = (sum_log_p + (common if form == PACKED else 0.0)) / total
            converged = abs(bound - previous) < rules.tol
            if not abs(bound) < np.inf:
                break
        form = PACKED if verdict.packed else DIRECT
    log_p, entropy = evaluate(rules, samples, problem, work, K, new, form)
    log_p += verdict.common if form == PACKED else 0.0
    for d in range(work.frame.rows.shape[1]):
        log_p += total * np.log(work.frame.rows[SCALE, d])
    log_p, entropy = log_p * problem.largest, entropy * problem.largest
    value = criterion_of(rules, K, log_p, entropy, np.log(total) + np.log(problem.largest))
    fine = verdict.fine and abs(log_p) < np.inf and (abs(bound) < np.inf or n_iter == 0)
    status = _COLLAPSED if verdict.collapsed else _FINE if converged else _NOT_CONVERGED
    return Fit(K if fine else 0, status, log_p, entropy, n_iter, converged, value), new


@compiled(INNER)
def criterion_of(rules: Rules, K: int, log_likelihood: float, entropy: float, log_total: float) -> float:
    """See `emalgam_kernels.batch.criterion_value`."""
    n_parameters = rules.parameters_at_all + K * rules.parameters_each
    penalty = 2.0 if rules.aic else log_total
    return -2.0 * log_likelihood + n_parameters * penalty + (2.0 * entropy if rules.icl else 0.0)


@compiled(INNER)
def keep(components: Components, K: int, side: int) -> None:
    """The best components so far."""
    copy_row(components.weights[side], K, components.weights[BEST])
    for k in range(K):
        copy_row(components.means[side, k], components.means.shape[2], components.means[BEST, k])
        c = min(k, components.covariances.shape[1] - 1)
        copy_matrix(components.covariances[side, c], components.covariances[BEST, c])


@compiled(INNER)
def no_fit(status: int) -> Fit:
    return Fit(0, status, np.nan, np.nan, 0, False, np.nan)


@compiled(SPLICED)
def fit_problem(
    rules: Rules,
    samples: Samples,
    where: tuple[int, int],
    number: np.uint64,
    choices: tuple[int, int],
    work: Work,
) -> Fit:
    """The best fit, see `replaces`; its components are those at BEST.

    `where` are the first and the number of the problem's samples, `choices` the fewest and the most components.
    """
    problem, bad = describe(rules, samples, where[0], where[1], len(work.tiles.z))
    if bad or problem.positive < choices[0]:
        return no_fit(_BAD_WEIGHT if bad else _TOO_FEW_ROWS)
    total = prepare(rules, samples, problem, work)
    if np.isnan(total):
        return no_fit(_NOT_FINITE)
    low, high, _, _ = philox(rules.seed, _STREAM_OF_PROBLEMS, _0, number)
    best, margin = no_fit(_NO_LIKELIHOOD), EQUAL * total * problem.largest
    for K in range(choices[0], min(choices[1], problem.positive) + 1):
        for restart in range(rules.n_init):
            fit, side = restart_fit(rules, samples, problem, work, low | high << _32, K, restart, total)
            collapsed, best_collapsed = fit.status == _COLLAPSED, best.status == _COLLAPSED
            if fit.K > 0 and (best.K == 0 or replaces(fit.value, collapsed, best.value, best_collapsed, margin)):
                keep(work.components, K, side)
                best = fit
    return best


@compiled(INNER)
def store(
    frame: Frame, components: Components, K: int, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray
) -> None:
    """The best components, out of their frame: x = z / scale + shift."""
    scale, D = frame.rows[SCALE], frame.rows.shape[1]
    for k in range(K):
        weights[k] = components.weights[BEST, k]
        for d in range(D):
            means[k, d] = components.means[BEST, k, d] / scale[d] + frame.rows[SHIFT, d]
    for c in range(min(K, components.covariances.shape[1])):
        covariance = components.covariances[BEST, c]
        for i in range(covariances.shape[1]):
            for j in range(covariances.shape[2]):
                covariances[c, i, j] = covariance[i, j] / (scale[i if len(covariance) == D else j] * scale[j])


# ---- prediction -----------------------------------------------------------------------------------------------------


@compiled(INNER)
def adopt(work: Work, K: int, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
    """BEST ← a mixture in the units of the data, with its factors; NaN where a covariance is not positive definite."""
    rows, components, lower = work.frame.rows, work.components, work.scratch.lower
    H, D = lower.shape
    for row in (MIDDLE, MEAN, FLOOR, ADDED):
        fill_row(rows[row], D, 0)
    fill_row(rows[COARSE], D, 1)
    fill_row(rows[FINER], D, 1)
    for k in range(K):
        c = min(k, components.factors.shape[1] - 1)
        covariance, factor = components.covariances[BEST, c], components.factors[BEST, c]
        if c == k:
            for i in range(H):
                for j in range(D):
                    covariance[i, j] = covariances[c, i, min(j, covariances.shape[2] - 1)]
            fine = factorize(covariance, rows[ADDED], rows[FLOOR], 0.0, lower)
            invert(lower, factor)
            factor[0, 0] = factor[0, 0] if fine else np.nan
        copy_row(means[k], D, components.means[BEST, k])
        components.log_constants[BEST, k] = log_constant(weights[k], factor, H, D)


@compiled(INNER)
def label_tile(logits: np.ndarray, K: int, rows: int, top: np.ndarray, labels: np.ndarray) -> None:
    """labels ← argmax_k L_k, the first of equals."""
    copy_row(logits[0], rows, top)
    fill_row(labels, rows, 0)
    for k in range(1, K):
        row = logits[k]
        for n in range(rows):
            labels[n] = k if row[n] > top[n] else labels[n]
            top[n] = row[n] if row[n] > top[n] else top[n]


@compiled(INNER)
def predict_problem(
    rules: Rules,
    samples: Samples,
    where: tuple[int, int],
    K: int,
    work: Work,
    log_prob: np.ndarray,
    labels: np.ndarray,
) -> None:
    """log p and labels of a problem's samples under the components at BEST, which are in the units of the data."""
    tiles, log_p, label, top = work.tiles, work.tiles.scratch[0], work.tiles.scratch[1], work.tiles.scratch[2]
    problem, _ = describe(rules, samples, where[0], where[1], 0)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        columns, weight, form = whole(rows), tiles.rows[slot, 0], DIRECT
        logits_of(rules, work.frame, tiles, work.components, K, BEST, form, slot, columns, problem.kept)
        label_tile(tiles.logits, K, rows, top, label)
        softmax_tile(tiles.logits, K, columns, weight, form == START, log_p, top)
        for n in range(rows):
            i = problem.first + tile * problem.columns + n
            i = samples.order[i] if len(samples.order) > 0 else i
            known = abs(log_p[n]) < np.inf
            log_prob[i] = log_p[n] if known else np.nan
            labels[i] = int(label[n]) if known else -1
