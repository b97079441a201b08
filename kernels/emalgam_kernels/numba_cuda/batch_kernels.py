"""The kernels of many fits: whole fits on the device, one block to a problem; see `emalgam_kernels.reference.batch`.

A block has one problem at a time. Its samples pass through a tile of T rows in shared memory as often as a fit goes
over them, and are put into the frame on the way: nothing of length N is kept. The tile, feature-major::

    y = (z, 1, 0 …) (P, T)   ω (T)   ω log p (T)   ω times the entropy of r (T)

The means μ_k are stored as (μ_k, 0, 0 …), so that y − μ_k = (z − μ_k, 1, 0 …). All else that a problem has, `Places`,
is in shared memory too if it fits, else in the block's part of a workspace.

There is one form of the logits and of the statistics, that of the reference:

- L_k = c_k − ½ ‖L_k⁻¹ (z − μ_k)‖², which takes D (D + 1) / 2 products, as ⟨η_k, φ(z)⟩ does;
- S_k = Σ ω r_k φ(z − μ_k), the packed statistics about each component's own mean, which cost what those about the
  origin do, and do not cancel. So there is no guard here, and nothing is done twice.

Sums over rows are made of `LANES` (statistics: up to so many) partial sums, each of every so manieth row, which are
then added in order: no bit of a result depends on how many threads a block has, nor on the other problems.

Covariances are packed lower triangles, row by row, or rows of variances (``full`` of `Size` is 0); M numbers each.

Arithmetic is float64, whatever the type of x: that is the kernels' contract, by which a collapse is told from rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numba import cuda, types

from emalgam_kernels import batch, scalars
from emalgam_kernels.batch import EQUAL, LIFTS, NO_MASS, RELATIVE_FLOOR, ROUND_SHIFT, ROUNDING, Status
from emalgam_kernels.numba_cuda.device import SIMULATED, Kernel, flat, inlined, log, sqrt
from emalgam_kernels.numba_cuda.device import integers_of as type_of_integers
from emalgam_kernels.numba_cuda.products import at
from emalgam_kernels.philox import PROBLEMS, SEEDS

THREADS: Final = 8 if SIMULATED else 64
BLOCKS: Final = 4  # of a multiprocessor, with all the registers that a thread may have
BLOCKS_OF_PREDICTIONS: Final = 6  # 168 registers
CHUNK: Final = 8  # rows whose masses a thread adds when an index is drawn
LOG_LIKELIHOOD, ENTROPY = range(2)  # rows of the real results
N_COMPONENTS, N_ITER, CONVERGED, STATUS = range(4)  # rows of the integer results
LANES: Final = 4 if SIMULATED else 32
SUMS_AT_ONCE: Final = 8 if SIMULATED else 64  # partial sums of all statistics, until there are more statistics
OF_A_TASK: Final = 17  # numbers: 16 sums; an odd number lets neighbouring threads meet in different banks
HALF_LOG_2_PI: Final = 0.5 * math.log(2 * math.pi)
WHOLE: Final = 2.0**52  # from here on every float64 is a whole number
MOST_EXPONENT: Final = 1021
_LIFTS: Final = np.array(LIFTS)

# Of each feature in a frame: z = ((x − middle) · coarse − mean) · finer = (x − shift) · scale.
MIDDLE, COARSE, MEAN, FINER, SHIFT, SCALE, FLOOR, ADDED, PIVOT, CLOSENESS = range(10)
OF_A_FEATURE: Final = 10
# What rows are given to: one component that has all; the nearest mean; all by EM; and by EM, for the likelihood alone.
ALL, NEAREST, EM, EVALUATE = range(4)
# What becomes of a covariance in an M-step.
PENDING, BROAD, NARROW, KEPT = 0.0, 1.0, 2.0, 3.0

_STREAM_OF_PROBLEMS, _STREAM_OF_SEEDS, _0, _32 = at(PROBLEMS), at(SEEDS), at(0), at(32)
_FINE, _NOT_CONVERGED, _COLLAPSED, _TOO_FEW_ROWS, _NOT_FINITE, _BAD_WEIGHT, _NO_LIKELIHOOD, _ = map(int, Status)

_int64: Any = types.int64
_float64: Any = types.float64
philox, unit_float64 = inlined(scalars.philox), inlined(scalars.unit_float64)
replaces = inlined(batch.replaces)


class Places(NamedTuple):
    """Where the numbers of a problem begin, in elements of the block's memory.

    `sums` also holds what is not needed at the same time: the ranges of features, potentials of candidates, and L.
    """

    frame: int  # (D, OF_A_FEATURE)
    weights: int  # (K,)
    means: int  # (K, P)
    covariances: int  # (C, M)
    factors: int  # (C, Q, Q): column j of L⁻¹ is row j, zeros above the diagonal; or (C, D)
    constants: int  # (K,)
    masses: int  # (K,)
    states: int  # (C,)
    statistics: int  # (K, F)
    lanes: int  # (2, LANES)
    candidates: int  # (K, P)
    targets: int  # (K,)
    picks: int  # (K,)
    chunks: int  # (T / CHUNK,)
    lasts: int  # (T / CHUNK,)
    logits: int  # (K, T)
    sums: int


class Size(NamedTuple):
    """The integers of a launch, in one argument. Flags are 0 or 1.

    `full`: covariances are matrices; `shared`: components share one covariance; `isotropic`: features share one
    variance; `single`: x is float32. `B` problems of up to `K` components. D features are padded to P > D and Q ≥ D,
    multiples of 4. M are the numbers of a covariance, and the first of the F statistics of a component; the others are
    those of (z − μ, 1). A problem has C covariances, of `covariance_width` numbers in the result. `memory`: numbers of
    a block's part of the workspace.
    """

    full: int
    B: int
    D: int
    K: int
    T: int
    log_T: int  # noqa: N815
    P: int
    Q: int
    M: int
    F: int
    C: int
    covariance_width: int
    row_stride: int
    feature_stride: int
    single: int
    ordered: int
    weighted: int
    shared: int
    isotropic: int
    aic: int
    icl: int
    n_init: int
    max_iter: int
    memory: int
    places: Places


_PLACES: Final = len(Size._fields) - 1
N_INTEGERS: Final = _PLACES + len(Places._fields)


def integers_of(size: Size) -> list[int]:
    """All in one list, as `size_of` takes them."""
    numbers: Any = size[:_PLACES]
    return [*numbers, *size.places]


@inlined
def size_of(sizes: Any) -> Size:
    """The integers of a launch from shared memory, anew for each step of a fit.

    In registers for a whole fit, they and all that follows from them would leave none for the arithmetic: the compiler
    takes what does not change out of every loop.
    """
    s = sizes
    places = Places(
        s[_PLACES], s[_PLACES + 1], s[_PLACES + 2], s[_PLACES + 3], s[_PLACES + 4], s[_PLACES + 5], s[_PLACES + 6],
        s[_PLACES + 7], s[_PLACES + 8], s[_PLACES + 9], s[_PLACES + 10], s[_PLACES + 11], s[_PLACES + 12],
        s[_PLACES + 13], s[_PLACES + 14], s[_PLACES + 15], s[_PLACES + 16],
    )  # fmt: skip
    return Size(
        s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16],
        s[17], s[18], s[19], s[20], s[21], s[22], s[23], places,
    )  # fmt: skip


# There it would take longer than the steps themselves.
_size_of: Final = inlined(lambda sizes: sizes) if SIMULATED else size_of


class Samples(NamedTuple):
    """Where the samples of a problem are: `n` of them from number `first` on. Either x64 or x32 is x."""

    x64: Any
    x32: Any
    order: Any
    weight: Any
    first: int
    n: int
    largest: float  # weight; weights are divided by it, so that their sum does not overflow


# ---- samples


@inlined
def row_of(samples: Samples, size: Size, n: int) -> int:
    """The row of x that sample n of the problem is."""
    if size.ordered:
        return samples.order[at(samples.first + n)]
    return samples.first + n


@inlined
def number(samples: Samples, size: Size, row: int, d: int) -> Any:
    """x_d of a row, in float64."""
    place = at(row * size.row_stride + d * size.feature_stride)
    if size.single:
        return _float64(samples.x32[place])
    return samples.x64[place]


@inlined
def in_frame(samples: Samples, memory: Any, size: Size, row: int, d: int) -> Any:
    """z_d = ((x_d − middle) · coarse − mean) · finer."""
    place = size.places.frame + d * OF_A_FEATURE
    coarse = (number(samples, size, row, d) - memory[at(place + MIDDLE)]) * memory[at(place + COARSE)]
    return (coarse - memory[at(place + MEAN)]) * memory[at(place + FINER)]


@inlined
def begin_tile(tile: Any, size: Size) -> None:
    """What stays: the 1 of y, and the zeros behind it."""
    for item in range(cuda.threadIdx.x + size.D * size.T, size.P * size.T, cuda.blockDim.x):
        tile[at(item)] = 1.0 if item < (size.D + 1) * size.T else 0.0


@inlined
def read_tile(samples: Samples, tile: Any, memory: Any, size: Size, start: int) -> None:
    """z and ω of the samples from number `start` on; zeros for those without weight, and behind the last one."""
    parts = max(cuda.blockDim.x >> size.log_T, 1)
    for item in range(cuda.threadIdx.x, size.T * parts, cuda.blockDim.x):
        t, part, weight, row = item & (size.T - 1), item >> size.log_T, 0.0, 0
        if start + t < samples.n:
            row, weight = row_of(samples, size, start + t), 1.0
            if size.weighted:
                weight = samples.weight[at(row)] / samples.largest
        for d in range(part, size.D, parts):
            tile[at(d * size.T + t)] = in_frame(samples, memory, size, row, d) if weight > 0 else 0.0
        if part == 0:
            tile[at(size.P * size.T + t)] = weight
    cuda.syncthreads()


@inlined
def sum_of(memory: Any, place: int, count: int) -> Any:
    """Of so many numbers, in order; every thread has it."""
    total = 0.0
    for i in range(count):
        total += memory[at(place + i)]
    return total


# ---- distances and logits


@inlined
def squared_distance(tile: Any, memory: Any, size: Size, mean: int, t: int) -> Any:
    """Σ_d (z_d − mean_d)² · closeness_d, as k-means++ measures."""
    total, frame = 0.0, size.places.frame
    for d in range(size.D):
        centred = tile[at(d * size.T + t)] - memory[at(mean + d)]
        total += centred * centred * memory[at(frame + d * OF_A_FEATURE + CLOSENESS)]
    return total


@inlined
def mahalanobis(tile: Any, memory: Any, size: Size, mean: int, factor: int, t: int) -> Any:
    """‖L⁻¹ (z − μ)‖², four rows of L⁻¹ at a time."""
    total = 0.0
    if not size.full:
        for d in range(size.D):
            whitened = (tile[at(d * size.T + t)] - memory[at(mean + d)]) * memory[at(factor + d)]
            total += whitened * whitened
        return total
    whitened = cuda.local.array(4, types.float64)
    for first in range(0, size.D, 4):
        for i in range(4):
            whitened[i] = 0.0
        place = factor + first
        for j in range(min(first + 4, size.D)):
            centred = tile[at(j * size.T + t)] - memory[at(mean + j)]
            for i in range(4):
                whitened[i] += memory[at(place + i)] * centred
            place += size.Q
        for i in range(4):
            total += whitened[i] * whitened[i]
    return total


@inlined
def logit_tile(tile: Any, memory: Any, size: Size, K: int, form: int) -> None:
    """L_k = c_k − ½ ‖L_k⁻¹ (z − μ_k)‖², or less the squared distance to mean k."""
    places, parts = size.places, max(cuda.blockDim.x >> size.log_T, 1)
    for item in range(cuda.threadIdx.x, size.T * parts, cuda.blockDim.x):
        t = item & (size.T - 1)
        for k in range(item >> size.log_T, K, parts):
            mean = places.means + k * size.P
            if form == NEAREST:
                value = -squared_distance(tile, memory, size, mean, t)
            else:
                factor = places.factors + (0 if size.shared else k * (size.Q * size.Q if size.full else size.D))
                value = memory[at(places.constants + k)] - 0.5 * mahalanobis(tile, memory, size, mean, factor, t)
            memory[at(places.logits + k * size.T + t)] = value
    cuda.syncthreads()


@inlined
def largest_logit(memory: Any, size: Size, K: int, t: int) -> tuple[int, Any]:
    """argmax_k L_k, the first of equals, and the maximum."""
    label, top = 0, memory[at(size.places.logits + t)]
    for k in range(1, K):
        value = memory[at(size.places.logits + k * size.T + t)]
        if value > top:
            label, top = k, value
    return label, top


@inlined
def exponentials(memory: Any, size: Size, K: int, top: Any, t: int) -> Any:
    """L_k ← exp(L_k − top), and their sum."""
    total = 0.0
    for k in range(K):
        place = at(size.places.logits + k * size.T + t)
        value = math.exp(memory[place] - top)
        memory[place] = value
        total += value
    return total


@inlined
def responsibility_tile(tile: Any, memory: Any, size: Size, K: int, form: int) -> None:
    """L_k ← ω r_k, and ω log p; to evaluate, −ω Σ r log r too. Thread: one row."""
    omega, logits = size.P * size.T, size.places.logits
    for t in range(cuda.threadIdx.x, size.T, cuda.blockDim.x):
        weight, log_p, entropy = tile[at(omega + t)], 0.0, 0.0
        if form == ALL or not weight > 0:
            for k in range(K):
                memory[at(logits + k * size.T + t)] = weight
        elif form == NEAREST:
            label, _ = largest_logit(memory, size, K, t)
            for k in range(K):
                memory[at(logits + k * size.T + t)] = weight if k == label else 0.0
        else:
            # r_k = exp(L_k − top) / Σ, log p = top + log Σ
            _, top = largest_logit(memory, size, K, t)
            total = exponentials(memory, size, K, top, t)
            log_p = weight * (top + log(total))
            for k in range(K):
                r = memory[at(logits + k * size.T + t)] / total
                memory[at(logits + k * size.T + t)] = weight * r
                if form == EVALUATE and r > 0:
                    entropy -= weight * (r * log(r))
        tile[at(omega + size.T + t)] = log_p
        tile[at(omega + 2 * size.T + t)] = entropy
    cuda.syncthreads()


# ---- statistics


@inlined
def slices_of(size: Size, K: int) -> tuple[int, int, int]:
    """Tasks, each of 4 × 4 (or 4 + 4) statistics, and into how many partial sums each is divided: a power of two."""
    fours = size.P >> 2
    tasks = K * ((fours * (fours + 1)) >> 1) if size.full else K * fours
    log_slices = 0
    while (tasks << (log_slices + 1)) <= SUMS_AT_ONCE and (2 << log_slices) <= LANES:
        log_slices += 1
    return tasks, 1 << log_slices, log_slices


@inlined
def block_of(size: Size, task: int) -> tuple[int, int, int]:
    """Component, and rows 4 I … and columns 4 J … ≤ 4 I of y yᵀ; of variances, features 4 I …"""
    fours = size.P >> 2
    if not size.full:
        return task // fours, task % fours, 0
    blocks = (fours * (fours + 1)) >> 1
    k, rest, block = task // blocks, task % blocks, 0
    while rest > block:
        rest -= block + 1
        block += 1
    return k, block, rest


@inlined
def add_products(tile: Any, memory: Any, size: Size, sums: Any, task: int, first: int, step: int) -> None:
    """sums_ij += Σ ω r y_i y_j of 4 × 4 pairs (i, j), y = (z − μ_k, 1), over every `step`-th row."""
    k, block, other = block_of(size, task)
    left, right = cuda.local.array(4, types.float64), cuda.local.array(4, types.float64)
    mean, r = size.places.means + k * size.P, size.places.logits + k * size.T
    rows, columns = 4 * block * size.T, 4 * other * size.T
    for t in range(first, size.T, step):
        weight = memory[at(r + t)]
        for i in range(4):
            left[i] = weight * (tile[at(rows + i * size.T + t)] - memory[at(mean + 4 * block + i)])
            right[i] = tile[at(columns + i * size.T + t)] - memory[at(mean + 4 * other + i)]
        for i in range(4):
            for j in range(4):
                sums[4 * i + j] += left[i] * right[j]


@inlined
def add_squares(tile: Any, memory: Any, size: Size, sums: Any, task: int, first: int, step: int) -> None:
    """sums_i += Σ ω r y_i² and sums_{4 + i} += Σ ω r y_i of four features i, y = (z − μ_k, 1)."""
    k, block, _ = block_of(size, task)
    mean, r = size.places.means + k * size.P + 4 * block, size.places.logits + k * size.T
    for t in range(first, size.T, step):
        weight = memory[at(r + t)]
        for i in range(4):
            centred = tile[at((4 * block + i) * size.T + t)] - memory[at(mean + i)]
            sums[i] += weight * centred * centred
            sums[4 + i] += weight * centred


@inlined
def statistic_tile(tile: Any, memory: Any, size: Size, K: int, start: int) -> None:
    """The partial sums of S go on with the rows of a tile."""
    tasks, slices, log_slices = slices_of(size, K)
    sums = cuda.local.array(16, types.float64)
    for item in range(cuda.threadIdx.x, tasks << log_slices, cuda.blockDim.x):
        place = size.places.sums + item * OF_A_TASK
        for e in range(16):
            sums[e] = 0.0
            if start > 0 and (size.full or e < 8):
                sums[e] = memory[at(place + e)]
        first = (item - start) & (slices - 1)
        if size.full:
            add_products(tile, memory, size, sums, item >> log_slices, first, slices)
        else:
            add_squares(tile, memory, size, sums, item >> log_slices, first, slices)
        for e in range(16):
            if size.full or e < 8:
                memory[at(place + e)] = sums[e]
    cuda.syncthreads()


@inlined
def add_slices(memory: Any, size: Size, K: int) -> None:
    """S_k from its partial sums: (y_i y_j for i ≥ j), or (squares, y)."""
    tasks, slices, log_slices = slices_of(size, K)
    log_entries = 4 if size.full else 3
    for item in range(cuda.threadIdx.x, tasks << log_entries, cuda.blockDim.x):
        task, e = item >> log_entries, item & ((1 << log_entries) - 1)
        k, block, other = block_of(size, task)
        i, j = 4 * block + (e >> 2), 4 * other + (e & 3)
        f, there = ((i * (i + 1)) >> 1) + j, j <= i <= size.D
        if not size.full:
            i = 4 * block + (e & 3)
            f, there = (i, i < size.D) if e < 4 else (size.D + i, i <= size.D)
        if there:
            total = 0.0
            for partial in range(slices):
                total += memory[at(size.places.sums + ((task << log_slices) + partial) * OF_A_TASK + e)]
            memory[at(size.places.statistics + k * size.F + f)] = total
    cuda.syncthreads()


@inlined
def add_to_lanes(tile: Any, memory: Any, size: Size, start: int) -> None:
    """The partial sums of ω log p and of the entropy go on with the rows of a tile."""
    for item in range(cuda.threadIdx.x, 2 * LANES, cuda.blockDim.x):
        row, place = size.P + 1 + item // LANES, at(size.places.lanes + item)
        total = memory[place] if start > 0 else 0.0
        for t in range((item - start) & (LANES - 1), size.T, LANES):
            total += tile[at(row * size.T + t)]
        memory[place] = total
    cuda.syncthreads()


@inlined
def sweep(samples: Samples, tile: Any, memory: Any, sizes: Any, K: int, form: int) -> None:
    """One pass: the statistics of all samples, and the sums of ω log p and of the entropy."""
    for start in range(0, samples.n, _size_of(sizes).T):
        read_tile(samples, tile, memory, _size_of(sizes), start)
        if form != ALL:
            logit_tile(tile, memory, _size_of(sizes), K, form)
        responsibility_tile(tile, memory, _size_of(sizes), K, form)
        if form != EVALUATE:
            statistic_tile(tile, memory, _size_of(sizes), K, start)
        add_to_lanes(tile, memory, _size_of(sizes), start)
    if form != EVALUATE:
        add_slices(memory, _size_of(sizes), K)


# ---- the frame


@inlined
def power_of_two(deviation: Any) -> Any:
    """What brings a positive number into [½, 1); 1 for zero. Neither it nor its inverse overflows."""
    if not deviation > 0:
        return 1.0
    _, exponent = math.frexp(deviation)
    return math.ldexp(1.0, -min(max(exponent, -MOST_EXPONENT), MOST_EXPONENT))


@inlined
def rounded(value: Any) -> Any:
    """To the nearest whole number, and half-way to the even one."""
    if not abs(value) < WHOLE:
        return value
    return (value + WHOLE) - WHOLE if value > 0 else (value - WHOLE) + WHOLE


@inlined
def survey_weights(samples: Samples, memory: Any, size: Size) -> tuple[bool, int, Any]:
    """Whether a weight is negative or not finite, how many are positive, and the largest."""
    if not size.weighted:
        return False, samples.n, 1.0
    place = size.places.sums
    for lane in range(cuda.threadIdx.x, LANES, cuda.blockDim.x):
        bad, positive, largest = 0.0, 0.0, 0.0
        for n in range(lane, samples.n, LANES):
            weight = samples.weight[at(row_of(samples, size, n))]
            if not 0 <= weight < np.inf:
                bad = 1.0
            elif weight > 0:
                positive += 1.0
                largest = max(largest, weight)
        memory[at(place + lane)] = bad
        memory[at(place + LANES + lane)] = positive
        memory[at(place + 2 * LANES + lane)] = largest
    cuda.syncthreads()
    bad, positive, largest = 0.0, 0.0, 0.0
    for lane in range(LANES):
        bad = max(bad, memory[at(place + lane)])
        positive += memory[at(place + LANES + lane)]
        largest = max(largest, memory[at(place + 2 * LANES + lane)])
    cuda.syncthreads()
    return bad > 0, _int64(positive), largest


@inlined
def find_range(samples: Samples, memory: Any, size: Size) -> bool:
    """Middle and coarse from the range of each feature; False if a sample with weight is not finite."""
    D, places, finite = size.D, size.places, True
    for item in range(cuda.threadIdx.x, D * LANES, cuda.blockDim.x):
        lane, d, low, high = item // D, item % D, np.inf, -np.inf
        for n in range(lane, samples.n, LANES):
            row = row_of(samples, size, n)
            if not size.weighted or samples.weight[at(row)] > 0:
                value = number(samples, size, row, d)
                if not abs(value) < np.inf:
                    low, high = -np.inf, np.inf
                low, high = min(low, value), max(high, value)
        memory[at(places.sums + item)] = low
        memory[at(places.sums + D * LANES + item)] = high
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, size.P, cuda.blockDim.x):
        memory[at(places.means + i)] = 0.0
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        low, high = np.inf, -np.inf
        for lane in range(LANES):
            low = min(low, memory[at(places.sums + lane * D + d)])
            high = max(high, memory[at(places.sums + D * LANES + lane * D + d)])
        # Within the range of each feature nothing overflows; a constant one is exactly zero in the frame.
        frame = places.frame + d * OF_A_FEATURE
        memory[at(frame + MIDDLE)] = low / 2 + high / 2 if high > low else low
        memory[at(frame + COARSE)] = power_of_two(high / 2 - low / 2)
        memory[at(frame + MEAN)] = 0.0
        memory[at(frame + FINER)] = 1.0
        memory[at(frame + SHIFT)] = low
        memory[at(frame + SCALE)] = high
    cuda.syncthreads()
    for d in range(D):
        low, high = (
            memory[at(places.frame + d * OF_A_FEATURE + SHIFT)],
            memory[at(places.frame + d * OF_A_FEATURE + SCALE)],
        )
        finite = finite and low > -np.inf and high < np.inf
    cuda.syncthreads()
    return finite


@inlined
def find_finer(memory: Any, size: Size, total: Any) -> None:
    """The second step of the frame from Σ ω (z − mean)², where `means` begins with the mean; FLOOR ← variances."""
    D, places, least = size.D, size.places, np.inf
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        f = (((d * (d + 1)) >> 1) + d) if size.full else d
        deviation = sqrt(memory[at(places.statistics + f)] / total)
        finer = power_of_two(deviation)
        # A rounded mean leaves the differences between samples exact: those that are equal stay so.
        unit = finer * ROUND_SHIFT
        memory[at(places.frame + d * OF_A_FEATURE + MEAN)] = rounded(memory[at(places.means + d)] * unit) / unit
        memory[at(places.frame + d * OF_A_FEATURE + FINER)] = finer
        memory[at(places.frame + d * OF_A_FEATURE + FLOOR)] = deviation
    cuda.syncthreads()
    for d in range(D):
        scale = (
            memory[at(places.frame + d * OF_A_FEATURE + COARSE)] * memory[at(places.frame + d * OF_A_FEATURE + FINER)]
        )
        if memory[at(places.frame + d * OF_A_FEATURE + FLOOR)] > 0 and scale < least:
            least = scale
    cuda.syncthreads()
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        if size.isotropic:  # one scale for all features
            one = least if least < np.inf else 1.0
            memory[at(places.frame + d * OF_A_FEATURE + FINER)] = (
                one / memory[at(places.frame + d * OF_A_FEATURE + COARSE)]
            )
        scaled = (
            memory[at(places.frame + d * OF_A_FEATURE + FLOOR)] * memory[at(places.frame + d * OF_A_FEATURE + FINER)]
        )
        memory[at(places.frame + d * OF_A_FEATURE + FLOOR)] = scaled * scaled
    cuda.syncthreads()


@inlined
def find_scale(memory: Any, size: Size, added: Any) -> None:
    """The rest of the frame from `find_finer`: shift, scale, floor, added and closeness."""
    D, frame = size.D, size.places.frame
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        finer, variance = memory[at(frame + d * OF_A_FEATURE + FINER)], memory[at(frame + d * OF_A_FEATURE + FLOOR)]
        scale, spread = memory[at(frame + d * OF_A_FEATURE + COARSE)] * finer, variance if variance > 0 else 1.0
        floor = RELATIVE_FLOOR * spread
        middle, mean = memory[at(frame + d * OF_A_FEATURE + MIDDLE)], memory[at(frame + d * OF_A_FEATURE + MEAN)]
        memory[at(frame + d * OF_A_FEATURE + SCALE)] = scale
        memory[at(frame + d * OF_A_FEATURE + SHIFT)] = middle + mean / scale * finer
        memory[at(frame + d * OF_A_FEATURE + FLOOR)] = floor
        memory[at(frame + d * OF_A_FEATURE + ADDED)] = floor if added < 0 else added * (scale * scale)
        memory[at(frame + d * OF_A_FEATURE + CLOSENESS)] = 1.0 if size.isotropic else 1.0 / spread
        memory[at(size.places.means + d)] = 0.0
    cuda.syncthreads()
    if size.isotropic:
        floor, lift = 0.0, 0.0
        for d in range(D):
            floor += memory[at(frame + d * OF_A_FEATURE + FLOOR)] / D
            lift += memory[at(frame + d * OF_A_FEATURE + ADDED)] / D
        cuda.syncthreads()
        for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
            memory[at(frame + d * OF_A_FEATURE + FLOOR)] = floor
            memory[at(frame + d * OF_A_FEATURE + ADDED)] = lift
        cuda.syncthreads()


# ---- matrices


@inlined
def entry(size: Size, i: int, j: int) -> int:
    """Where A_ij, i ≥ j, is in a packed lower triangle; of variances, i = j."""
    return (((i * (i + 1)) >> 1) + j) if size.full else i


@inlined
def group_of(size: Size, C: int) -> tuple[int, int, int, int]:
    """A group of threads for each of C matrices: this thread's group, its number there; groups, and threads of one."""
    log_lanes = 0
    while (C << (log_lanes + 1)) <= cuda.blockDim.x and (1 << log_lanes) < size.D:
        log_lanes += 1
    thread = cuda.threadIdx.x
    return thread >> log_lanes, thread & ((1 << log_lanes) - 1), cuda.blockDim.x >> log_lanes, 1 << log_lanes


@inlined
def pivot_of(memory: Any, size: Size, lower: int, variance: Any, j: int) -> Any:
    """What the features before it leave of the variance of feature j."""
    if size.full:
        row = lower + ((j * (j + 1)) >> 1)
        for m in range(j):
            variance -= memory[at(row + m)] * memory[at(row + m)]
    return variance


@inlined
def column_below(memory: Any, size: Size, covariance: int, lower: int, j: int, root: Any, lane: int, step: int) -> None:
    """L_ij = (A_ij − Σ_{m<j} L_im L_jm) / L_jj for every `step`-th row i > j."""
    above = lower + ((j * (j + 1)) >> 1)
    for i in range(j + 1 + lane, size.D, step):
        row = (i * (i + 1)) >> 1
        value = memory[at(covariance + row + j)]
        for m in range(j):
            value -= memory[at(lower + row + m)] * memory[at(above + m)]
        memory[at(lower + row + j)] = value / root


@inlined
def factorize(memory: Any, size: Size, C: int, times: Any, rounding: Any) -> None:
    """Of covariances that are pending: Σ ← Σ + diag(added + times · floor), and L, in `sums`, if no pivot is rounding.

    A pivot is what the other features leave of a variance, or of the spread of all samples. It is narrow if it took any
    floor, or if some feature, given those before it, varies less than the floor, and less than in all samples together.
    """
    D, places = size.D, size.places
    group, lane, groups, step = group_of(size, C)
    for first in range(0, C, groups):
        c = first + group
        covariance, lower, frame = places.covariances + c * size.M, places.sums + c * size.M, places.frame
        fine = c < C and memory[at(places.states + min(c, C - 1))] == PENDING
        narrow = times > 0
        for j in range(D):
            if fine:
                floor, added = (
                    memory[at(frame + j * OF_A_FEATURE + FLOOR)],
                    memory[at(frame + j * OF_A_FEATURE + ADDED)],
                )
                variance = memory[at(covariance + entry(size, j, j))] + (added + times * floor)
                pivot = pivot_of(memory, size, lower, variance, j)
                fine = pivot > rounding * max(variance, rounding * floor / RELATIVE_FLOOR)
                least = added + floor
                narrow = narrow or (pivot < least and memory[at(frame + j * OF_A_FEATURE + PIVOT)] > 2 * least)
            if fine:
                root = sqrt(pivot)
                if lane == 0:
                    memory[at(lower + entry(size, j, j))] = root
                if size.full:
                    column_below(memory, size, covariance, lower, j, root, lane, step)
            if size.full:
                cuda.syncthreads()
        cuda.syncthreads()
        if fine:
            if lane == 0:
                memory[at(places.states + c)] = NARROW if narrow else BROAD
            for j in range(lane, D, step):
                lift = (
                    memory[at(frame + j * OF_A_FEATURE + ADDED)] + times * memory[at(frame + j * OF_A_FEATURE + FLOOR)]
                )
                memory[at(covariance + entry(size, j, j))] += lift
    cuda.syncthreads()


@inlined
def regularize(memory: Any, sizes: Any, C: int) -> None:
    """As many floors as it takes to be positive definite; what none makes so stays pending."""
    lifts = cuda.const.array_like(_LIFTS)
    for attempt in range(len(LIFTS)):
        pending, states = False, _size_of(sizes).places.states
        for c in range(C):
            pending = pending or memory[at(states + c)] == PENDING
        if not pending:
            break
        cuda.syncthreads()
        factorize(memory, _size_of(sizes), C, lifts[attempt], ROUNDING)


@inlined
def invert(memory: Any, size: Size, C: int) -> None:
    """L⁻¹ of each new L, a column on a thread: X_ij = (δ_ij − Σ_{j≤m<i} L_im X_mj) / L_ii."""
    D, places = size.D, size.places
    for item in range(cuda.threadIdx.x, C * D, cuda.blockDim.x):
        c, j = item // D, item % D
        state = memory[at(places.states + c)]
        if state in (KEPT, PENDING):
            continue
        lower = places.sums + c * size.M
        if not size.full:
            memory[at(places.factors + item)] = 1.0 / memory[at(lower + j)]
            continue
        column = places.factors + (c * size.Q + j) * size.Q
        for i in range(j, D):
            row, value = lower + ((i * (i + 1)) >> 1), 1.0 if i == j else 0.0
            for m in range(j, i):
                value -= memory[at(row + m)] * memory[at(column + m)]
            memory[at(column + i)] = value / memory[at(row + i)]
    cuda.syncthreads()


@inlined
def find_constants(memory: Any, size: Size, K: int) -> None:
    """c_k = log w_k + log |L_k⁻¹| − ½ D log 2π; the factors of one covariance are one after the other."""
    places = size.places
    for k in range(cuda.threadIdx.x, K, cuda.blockDim.x):
        value = log(memory[at(places.weights + k)]) - size.D * HALF_LOG_2_PI
        width = size.Q * size.Q if size.full else size.D
        factor, step = places.factors + (0 if size.shared else k * width), size.Q + 1 if size.full else 1
        for d in range(size.D):
            value += log(memory[at(factor + d * step)])
        memory[at(places.constants + k)] = value
    cuda.syncthreads()


@inlined
def begin_components(memory: Any, size: Size, K: int) -> None:
    """Before the first M-step: means are padded with zeros, features independent, with the variances of all samples."""
    D, places, C = size.D, size.places, 1 if size.shared else K
    for item in range(cuda.threadIdx.x, K * size.P, cuda.blockDim.x):
        if item % size.P >= D:
            memory[at(places.means + item)] = 0.0
    for item in range(cuda.threadIdx.x, C * size.Q, cuda.blockDim.x):
        c, j = item // size.Q, item % size.Q
        column, row = places.factors + item * size.Q, places.covariances + c * size.M
        if size.full:
            for i in range(size.Q):
                memory[at(column + i)] = 0.0
        if j < D:
            variance = memory[at(places.frame + j * OF_A_FEATURE + FLOOR)] / RELATIVE_FLOOR
            for i in range(j if size.full else 0):
                memory[at(row + entry(size, j, i))] = 0.0
            memory[at(row + entry(size, j, j))] = variance
            memory[at(column + j if size.full else places.factors + c * D + j)] = 1.0 / sqrt(variance)
    cuda.syncthreads()


# ---- the M-step


@inlined
def move(memory: Any, size: Size, K: int) -> None:
    """Weights, and the means by δ = Σ ω r (z − μ) / N_k, which takes its place among the statistics.

    A component without data stays where it was, without weight.
    """
    D, places, total = size.D, size.places, 0.0
    for k in range(K):
        total += memory[at(places.statistics + k * size.F + size.M + D)]
    for k in range(cuda.threadIdx.x, K, cuda.blockDim.x):
        mass = memory[at(places.statistics + k * size.F + size.M + D)]
        mass = 0.0 if mass <= NO_MASS * total else mass
        memory[at(places.masses + k)] = mass
        memory[at(places.weights + k)] = mass / total
        if k == 0 or not size.shared:
            memory[at(places.states + k)] = KEPT if mass == 0 and not size.shared else PENDING
    cuda.syncthreads()
    for item in range(cuda.threadIdx.x, K * D, cuda.blockDim.x):
        k, d = item // D, item % D
        mass, place = memory[at(places.masses + k)], at(places.statistics + k * size.F + size.M + d)
        offset = memory[place] / mass if mass != 0 else 0.0
        memory[place] = offset
        memory[at(places.means + k * size.P + d)] += offset
    cuda.syncthreads()


@inlined
def moment(memory: Any, size: Size, k: int, i: int, j: int) -> Any:
    """Σ ω r (z − μ)_i (z − μ)_j / N_k − δ_i δ_j; 0 for a component without data."""
    statistics, mass = size.places.statistics + k * size.F, memory[at(size.places.masses + k)]
    if mass == 0:
        return 0.0
    offsets = statistics + size.M
    return memory[at(statistics + entry(size, i, j))] / mass - memory[at(offsets + i)] * memory[at(offsets + j)]


@inlined
def estimate(memory: Any, size: Size, K: int) -> None:
    """Of all covariances that the type allows, those of the largest likelihood: Bishop (2006), exercise 9.6 ff."""
    D, places, C = size.D, size.places, 1 if size.shared else K
    total = sum_of(memory, places.masses, K)
    for item in range(cuda.threadIdx.x, C * D, cuda.blockDim.x):
        c, i = item // D, item % D
        if memory[at(places.states + c)] == KEPT:
            continue
        for j in range(0 if size.full else i, i + 1):
            value = 0.0
            if size.shared:
                for k in range(K):
                    value += memory[at(places.masses + k)] / total * moment(memory, size, k, i, j)
            elif size.isotropic:
                for d in range(D):
                    value += moment(memory, size, c, d, d)
                value /= D
            else:
                value = moment(memory, size, c, i, j)
            memory[at(places.covariances + c * size.M + entry(size, i, j))] = value
    cuda.syncthreads()


@inlined
def maximize(memory: Any, sizes: Any, K: int) -> tuple[bool, bool]:
    """w_k = N_k / N, μ_k and Σ_k from the statistics: Bishop (2006), eq. 9.24-9.26.

    Whether all covariances are positive definite, and whether a component has collapsed.
    """
    C = 1 if _size_of(sizes).shared else K
    move(memory, _size_of(sizes), K)
    estimate(memory, _size_of(sizes), K)
    regularize(memory, sizes, C)
    invert(memory, _size_of(sizes), C)
    find_constants(memory, _size_of(sizes), K)
    return verdict(memory, _size_of(sizes), K)


@inlined
def verdict(memory: Any, size: Size, K: int) -> tuple[bool, bool]:
    """What `maximize` returns, from masses and states."""
    fine, collapsed = True, False
    for k in range(K):
        collapsed = collapsed or memory[at(size.places.masses + k)] == 0
    for c in range(1 if size.shared else K):
        state = memory[at(size.places.states + c)]
        fine = fine and state != PENDING
        collapsed = collapsed or (state == NARROW and not size.shared)
    return fine, collapsed


# ---- the frame of a problem


@inlined
def prepare(samples: Samples, tile: Any, memory: Any, sizes: Any, added: Any) -> Any:
    """The frame, its ranges having been found; returns Σ ω."""
    total = 0.0
    for stage in range(3):
        # Σ ω z; Σ ω (z − mean)²; in the frame Σ ω z zᵀ
        sweep(samples, tile, memory, sizes, 1, ALL)
        total = take_total(memory, _size_of(sizes), stage)
        if stage == 1:
            find_finer(memory, _size_of(sizes), total)
            find_scale(memory, _size_of(sizes), added)
    # The variance of each feature given those before it, of all samples together.
    estimate(memory, _size_of(sizes), 1)
    factorize(memory, _size_of(sizes), 1, 1.0, 0.0)
    keep_pivots(memory, _size_of(sizes))
    return total


@inlined
def take_total(memory: Any, size: Size, stage: int) -> Any:
    """Σ ω; at first means ← the mean, in the end the statistics become moments about the origin, of one component."""
    places, linear = size.places, size.places.statistics + size.M
    total = memory[at(linear + size.D)]
    for d in range(cuda.threadIdx.x, size.D, cuda.blockDim.x):
        if stage == 0:
            memory[at(places.means + d)] = memory[at(linear + d)] / total
        elif stage == 2:
            memory[at(linear + d)] = 0.0
    if cuda.threadIdx.x == 0:
        memory[at(places.masses)], memory[at(places.states)] = total, PENDING
    cuda.syncthreads()
    return total


@inlined
def keep_pivots(memory: Any, size: Size) -> None:
    """Of the covariance of all samples."""
    for d in range(cuda.threadIdx.x, size.D, cuda.blockDim.x):
        root = memory[at(size.places.sums + entry(size, d, d))]
        pivot = root * root if memory[at(size.places.states)] != PENDING else 0.0
        memory[at(size.places.frame + d * OF_A_FEATURE + PIVOT)] = pivot
    cuda.syncthreads()


# ---- the start


@inlined
def uniform(key: Any, K: int, restart: int, t: int) -> Any:
    """Number t of a restart with K components, in (0, 1)."""
    a, b, _, _ = philox(key, _STREAM_OF_SEEDS, at(t), (at(K) << _32) + at(restart))
    return unit_float64(a, b)


@inlined
def nearest(tile: Any, memory: Any, size: Size, k: int, t: int) -> Any:
    """The squared distance to the nearest of the first k seeds."""
    least = np.inf
    for seed in range(k):
        least = min(least, squared_distance(tile, memory, size, size.places.means + seed * size.P, t))
    return least


@inlined
def mass_tile(tile: Any, memory: Any, size: Size, k: int, by_weight: bool) -> None:
    """ω, or ω times the squared distance to the nearest seed, of each row; and the sum of every `CHUNK` rows."""
    omega = size.P * size.T
    for t in range(cuda.threadIdx.x, size.T, cuda.blockDim.x):
        weight = tile[at(omega + t)]
        mass = weight if by_weight or not weight > 0 else weight * nearest(tile, memory, size, k, t)
        tile[at(omega + size.T + t)] = mass
    cuda.syncthreads()
    for chunk in range(cuda.threadIdx.x, size.T // CHUNK, cuda.blockDim.x):
        total = 0.0
        for i in range(CHUNK):
            total += tile[at(omega + size.T + chunk * CHUNK + i)]
        memory[at(size.places.chunks + chunk)] = total
    cuda.syncthreads()


@inlined
def pick_from_chunk(
    tile: Any, memory: Any, size: Size, start: int, chunk: int, below: Any, above: Any, count: int
) -> None:
    """For targets in [below, above): the first row of the chunk whose cumulative mass is larger, never one without."""
    place = (size.P + 1) * size.T + chunk * CHUNK
    for c in range(count):
        target, cumulative, found, last = memory[at(size.places.targets + c)], below, -1, -1
        for i in range(CHUNK):
            mass = tile[at(place + i)]
            cumulative += mass
            if mass > 0:
                last = start + chunk * CHUNK + i
                if found < 0 and cumulative > target:
                    found = last
        if last >= 0:
            memory[at(size.places.lasts + chunk)] = last
        if below <= target < above:
            memory[at(size.places.picks + c)] = found if found >= 0 else last


@inlined
def pick_from_tile(tile: Any, memory: Any, size: Size, start: int, cumulative: Any, count: int) -> Any:
    """For each target that the cumulative mass of a tile reaches, the sample; returns the cumulative mass behind it."""
    chunks = size.places.chunks
    for chunk in range(cuda.threadIdx.x, size.T // CHUNK, cuda.blockDim.x):
        below = cumulative
        for before in range(chunk):
            below += memory[at(chunks + before)]
        pick_from_chunk(tile, memory, size, start, chunk, below, below + memory[at(chunks + chunk)], count)
    for chunk in range(size.T // CHUNK):
        cumulative += memory[at(chunks + chunk)]
    cuda.syncthreads()
    return cumulative


@inlined
def take_candidates(samples: Samples, memory: Any, size: Size, count: int) -> None:
    """candidates ← the samples picked; rounding may have left a target that no cumulative mass exceeds."""
    places = size.places
    for c in range(count):
        pick = memory[at(places.picks + c)]
        for chunk in range(size.T // CHUNK if pick < 0 else 0):
            pick = max(pick, memory[at(places.lasts + chunk)])
        row = row_of(samples, size, _int64(max(pick, 0.0)))
        for d in range(cuda.threadIdx.x, size.D, cuda.blockDim.x):
            memory[at(places.candidates + c * size.P + d)] = in_frame(samples, memory, size, row, d)
    cuda.syncthreads()


@inlined
def potential_tile(tile: Any, memory: Any, size: Size, k: int, count: int, start: int) -> None:
    """The partial sums of ω min(nearest, squared distance to the candidate) go on with the rows of a tile."""
    places = size.places
    for t in range(cuda.threadIdx.x, size.T, cuda.blockDim.x):
        weight, least = tile[at(size.P * size.T + t)], nearest(tile, memory, size, k, t)
        for c in range(count):
            distance = squared_distance(tile, memory, size, places.candidates + c * size.P, t)
            memory[at(places.logits + c * size.T + t)] = weight * min(least, distance) if weight > 0 else 0.0
    cuda.syncthreads()
    for item in range(cuda.threadIdx.x, count * LANES, cuda.blockDim.x):
        row, total = places.logits + (item // LANES) * size.T, memory[at(places.sums + item)] if start > 0 else 0.0
        for t in range((item - start) & (LANES - 1), size.T, LANES):
            total += memory[at(row + t)]
        memory[at(places.sums + item)] = total
    cuda.syncthreads()


@inlined
def set_targets(memory: Any, size: Size, key: Any, K: int, restart: int, t: int, count: int, mass: Any) -> None:
    """Where candidates are to be drawn: u · mass, with the numbers from t on; nothing is picked yet."""
    for c in range(cuda.threadIdx.x, count, cuda.blockDim.x):
        memory[at(size.places.targets + c)] = uniform(key, K, restart, t + c) * mass
        memory[at(size.places.picks + c)] = -1.0
    for chunk in range(cuda.threadIdx.x, size.T // CHUNK, cuda.blockDim.x):
        memory[at(size.places.lasts + chunk)] = -1.0
    cuda.syncthreads()


@inlined
def take_seed(memory: Any, size: Size, k: int, count: int) -> Any:
    """Mean k ← the first of the candidates that leave the least potential, which is returned."""
    places, best = size.places, 0
    least = sum_of(memory, places.sums, LANES)
    for c in range(1, count):
        potential = sum_of(memory, places.sums + c * LANES, LANES)
        if potential < (1 - ROUNDING) * least:
            best, least = c, potential
    for d in range(cuda.threadIdx.x, size.D, cuda.blockDim.x):
        memory[at(places.means + k * size.P + d)] = memory[at(places.candidates + best * size.P + d)]
    cuda.syncthreads()
    return least


@inlined
def choose_seeds(
    samples: Samples, tile: Any, memory: Any, sizes: Any, key: Any, K: int, restart: int, total: Any
) -> None:
    """means ← greedy k-means++: each seed is the best of 2 + log K candidates, drawn in proportion to ω · nearest."""
    by_weight, mass, t, T = True, total, 0, _size_of(sizes).T
    for k in range(K):
        count, cumulative = 1 if k == 0 else 2 + _int64(log(_float64(K))), 0.0
        set_targets(memory, _size_of(sizes), key, K, restart, t, count, mass)
        for start in range(0, samples.n, T):
            read_tile(samples, tile, memory, _size_of(sizes), start)
            mass_tile(tile, memory, _size_of(sizes), k, by_weight)
            cumulative = pick_from_tile(tile, memory, _size_of(sizes), start, cumulative, count)
        take_candidates(samples, memory, _size_of(sizes), count)
        for start in range(0, samples.n, T):
            read_tile(samples, tile, memory, _size_of(sizes), start)
            potential_tile(tile, memory, _size_of(sizes), k, count, start)
        mass = take_seed(memory, _size_of(sizes), k, count)
        by_weight = not mass > 0
        mass = total if by_weight else mass
        t += count


# ---- EM


@inlined
def restart_fit(
    samples: Samples, tile: Any, memory: Any, sizes: Any, key: Any, K: int, restart: int, total: Any, tol: Any
) -> tuple[bool, Any, Any, int, bool, bool]:
    """EM from one start: whether it came to something, Σ ω log p, entropy, iterations, converged, collapsed."""
    choose_seeds(samples, tile, memory, sizes, key, K, restart, total)
    begin_components(memory, _size_of(sizes), K)
    fine, collapsed, converged, bound = True, False, False, -np.inf
    form, n_iter = NEAREST, -1  # the M-step of the start is no iteration
    while fine and form != EVALUATE:
        if converged or n_iter >= _size_of(sizes).max_iter:
            form = EVALUATE
        sweep(samples, tile, memory, sizes, K, form)
        if form != EVALUATE:
            if form == EM:
                previous, bound = bound, sum_of(memory, _size_of(sizes).places.lanes, LANES) / total
                converged = abs(bound - previous) < tol
            fine, collapsed = maximize(memory, sizes, K)
            fine = fine and (form == NEAREST or abs(bound) < np.inf)
            form, n_iter = EM, n_iter + 1
    log_p, entropy = evaluation(memory, _size_of(sizes), total)
    return fine and abs(log_p) < np.inf, log_p, entropy, n_iter, converged, collapsed


@inlined
def evaluation(memory: Any, size: Size, total: Any) -> tuple[Any, Any]:
    """Σ ω log p(x), in the units of the data, and the entropy, from the last pass."""
    lanes, frame = size.places.lanes, size.places.frame
    log_p, entropy = sum_of(memory, lanes, LANES), sum_of(memory, lanes + LANES, LANES)
    for d in range(size.D):
        log_p += total * log(memory[at(frame + d * OF_A_FEATURE + SCALE)])
    cuda.syncthreads()
    return log_p, entropy


@inlined
def criterion_of(size: Size, K: int, log_likelihood: Any, entropy: Any, log_total: Any) -> Any:
    """See `emalgam_kernels.batch.criterion_value`."""
    numbers = size.D if size.isotropic else 1
    each = size.D + (0 if size.shared else size.M // numbers)
    count = _float64(K - 1 + K * each + (size.M if size.shared else 0))
    penalty = 2.0 if size.aic else log_total
    return -2.0 * log_likelihood + count * penalty + (2.0 * entropy if size.icl else 0.0)


@inlined
def store(memory: Any, size: Size, b: int, K: int, weights: Any, means: Any, covariances: Any) -> None:
    """Components, out of their frame: x = z / scale + shift."""
    D, places, width = size.D, size.places, size.covariance_width
    scale, shift = places.frame + SCALE, places.frame + SHIFT
    for item in range(cuda.threadIdx.x, K * D, cuda.blockDim.x):
        k, d = item // D, item % D
        mean = (
            memory[at(places.means + k * size.P + d)] / memory[at(scale + d * OF_A_FEATURE)]
            + memory[at(shift + d * OF_A_FEATURE)]
        )
        means[at((b * size.K + k) * D + d)] = mean
        if d == 0:
            weights[at(b * size.K + k)] = memory[at(places.weights + k)]
    for item in range(cuda.threadIdx.x, (1 if size.shared else K) * width, cuda.blockDim.x):
        c, place = item // width, item % width
        i, j = (place // D, place % D) if size.full else (place, place)
        value = memory[at(places.covariances + c * size.M + entry(size, max(i, j), min(i, j)))]
        target = at(b * size.C * width + item)
        covariances[target] = value / (memory[at(scale + i * OF_A_FEATURE)] * memory[at(scale + j * OF_A_FEATURE)])


@inlined
def fit_problem(
    samples: Samples, tile: Any, memory: Any, sizes: Any, b: int, key: Any, fewest: int, most: int, tol: Any,
    total: Any, weights: Any, means: Any, covariances: Any, reals: Any, integers: Any,
) -> int:  # fmt: skip
    """The best fit of all numbers of components and restarts, see `replaces`; returns its status."""
    status, best, largest = _NO_LIKELIHOOD, np.inf, samples.largest
    for fit in range((most - fewest + 1) * _size_of(sizes).n_init):
        K, restart = fewest + fit // _size_of(sizes).n_init, fit % _size_of(sizes).n_init
        fine, log_p, entropy, n_iter, converged, collapsed = restart_fit(
            samples, tile, memory, sizes, key, K, restart, total, tol
        )
        log_p, entropy = log_p * largest, entropy * largest
        value = criterion_of(_size_of(sizes), K, log_p, entropy, log(total) + log(largest))
        margin = EQUAL * total * largest
        if fine and (status == _NO_LIKELIHOOD or replaces(value, collapsed, best, status == _COLLAPSED, margin)):
            best, status = value, _COLLAPSED if collapsed else (_FINE if converged else _NOT_CONVERGED)
            # K never falls, so this covers all that an earlier fit has left
            store(memory, _size_of(sizes), b, K, weights, means, covariances)
            if cuda.threadIdx.x == 0:
                B = _size_of(sizes).B
                reals[at(LOG_LIKELIHOOD * B + b)], reals[at(ENTROPY * B + b)] = log_p, entropy
                integers[at(N_COMPONENTS * B + b)], integers[at(N_ITER * B + b)] = K, n_iter
                integers[at(CONVERGED * B + b)] = 1 if converged else 0
        cuda.syncthreads()
    return status


# ---- kernels


def _fit(in_shared: bool) -> Callable[..., None]:
    def fit_many(
        x64: Any, x32: Any, order: Any, weight: Any, offsets: Any, numbers: Any, choices: Any, workspace: Any,
        weights: Any, means: Any, covariances: Any, reals: Any, integers: Any,
        given: Any, seed: int, tol: float, added: float,
    ) -> None:  # fmt: skip
        """Every so manieth problem is the block's; `choices` are the fewest components (B,) and the most (B,)."""
        tile = cuda.shared.array(0, types.float64)
        kept = cuda.shared.array(N_INTEGERS, types.int64)
        for i in range(cuda.threadIdx.x, N_INTEGERS, cuda.blockDim.x):
            kept[i] = given[i]
        cuda.syncthreads()
        sizes = size_of(kept) if SIMULATED else kept
        part = cuda.blockIdx.x * _size_of(sizes).memory
        memory = tile if in_shared else workspace[part : part + _size_of(sizes).memory]
        begin_tile(tile, _size_of(sizes))
        for b in range(cuda.blockIdx.x, _size_of(sizes).B, cuda.gridDim.x):
            first, fewest, status = offsets[at(b)], choices[at(b)], _FINE
            n = offsets[at(b + 1)] - first
            samples = Samples(x64, x32, order, weight, first, n, 1.0)
            bad, positive, largest = survey_weights(samples, memory, _size_of(sizes))
            if bad:
                status = _BAD_WEIGHT
            elif positive < fewest:
                status = _TOO_FEW_ROWS
            elif not find_range(samples, memory, _size_of(sizes)):
                status = _NOT_FINITE
            else:
                samples = Samples(x64, x32, order, weight, first, n, largest)
                total = prepare(samples, tile, memory, sizes, added)
                low, high, _, _ = philox(at(seed), _STREAM_OF_PROBLEMS, _0, at(numbers[at(b)]))
                most = min(choices[at(_size_of(sizes).B + b)], positive)
                status = fit_problem(
                    samples, tile, memory, sizes, b, low | high << _32, fewest, most, tol, total,
                    weights, means, covariances, reals, integers,
                )  # fmt: skip
            if cuda.threadIdx.x == 0:
                integers[at(STATUS * _size_of(sizes).B + b)] = status
            cuda.syncthreads()

    return fit_many


@inlined
def adopt(memory: Any, size: Size, b: int, K: int, weights: Any, means: Any, covariances: Any) -> bool:
    """A mixture in the units of the data, with its factors; whether its covariances are positive definite."""
    D, places, C, width = size.D, size.places, 1 if size.shared else K, size.covariance_width
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        for row in (MIDDLE, MEAN, ADDED, PIVOT):
            memory[at(places.frame + d * OF_A_FEATURE + row)] = 0.0
        for row in (COARSE, FINER, FLOOR, CLOSENESS):
            memory[at(places.frame + d * OF_A_FEATURE + row)] = 1.0
    cuda.syncthreads()
    begin_components(memory, size, K)
    for item in range(cuda.threadIdx.x, K * D, cuda.blockDim.x):
        k, i = item // D, item % D
        memory[at(places.means + k * size.P + i)] = means[at((b * size.K + k) * D + i)]
        if i == 0:
            memory[at(places.weights + k)] = weights[at(b * size.K + k)]
        if k >= C:
            continue
        if i == 0:
            memory[at(places.states + k)] = PENDING
        source = (b * size.C + k) * width
        for j in range(0 if size.full else i, i + 1):
            place = source + ((i * D + j) if size.full else min(i, width - 1))
            memory[at(places.covariances + k * size.M + entry(size, i, j))] = covariances[at(place)]
    cuda.syncthreads()
    factorize(memory, size, C, 0.0, 0.0)
    invert(memory, size, C)
    find_constants(memory, size, K)
    known = True
    for c in range(C):
        known = known and memory[at(places.states + c)] == BROAD
    return known


@inlined
def predict_tile(
    samples: Samples, memory: Any, size: Size, K: int, start: int, known: bool, log_prob: Any, labels: Any
) -> None:
    """log p and argmax_k L_k; NaN and −1 where there is no mixture or log p is not finite. Thread: one row."""
    for t in range(cuda.threadIdx.x, min(size.T, samples.n - start), cuda.blockDim.x):
        row, label, log_p = row_of(samples, size, start + t), -1, np.nan
        if known:
            label, top = largest_logit(memory, size, K, t)
            total = 0.0
            for k in range(K):
                total += math.exp(memory[at(size.places.logits + k * size.T + t)] - top)
            log_p = top + log(total)
        there = abs(log_p) < np.inf
        log_prob[at(row)] = log_p if there else np.nan
        labels[at(row)] = label if there else -1


def _predict(in_shared: bool) -> Callable[..., None]:
    def predict_many(
        x64: Any, x32: Any, order: Any, offsets: Any, n_components: Any, workspace: Any,
        weights: Any, means: Any, covariances: Any, log_prob: Any, labels: Any, size: Size,
    ) -> None:  # fmt: skip
        """Every so manieth problem is the block's."""
        tile = cuda.shared.array(0, types.float64)
        part = cuda.blockIdx.x * size.memory
        memory = tile if in_shared else workspace[part : part + size.memory]
        begin_tile(tile, size)
        for b in range(cuda.blockIdx.x, size.B, cuda.gridDim.x):
            first, K = offsets[at(b)], n_components[at(b)]
            samples = Samples(x64, x32, order, x64, first, offsets[at(b + 1)] - first, 1.0)
            known = K > 0
            if known:
                known = adopt(memory, size, b, K, weights, means, covariances)
            for start in range(0, samples.n, size.T):
                if known:
                    read_tile(samples, tile, memory, size, start)
                    logit_tile(tile, memory, size, K, EM)
                predict_tile(samples, memory, size, K, start, known, log_prob, labels)
                cuda.syncthreads()

    return predict_many


def _signature(*arrays: Any) -> tuple[Any, ...]:
    return tuple(map(flat, arrays))


@cache
def fit_kernel(in_shared: bool) -> Kernel:
    """Whole fits; `in_shared`: all that a problem has is in shared memory, not only the tile."""
    real, integer = types.float64, types.int64
    inputs = real, types.float32, integer, real, integer, integer, integer, real
    signature = *_signature(*inputs, real, real, real, real, integer, integer), types.uint64, real, real
    return Kernel(_name("many fits", in_shared), "float64", _fit(in_shared), signature, THREADS, BLOCKS)


@cache
def predict_kernel(in_shared: bool) -> Kernel:
    """log p and labels; see `fit_kernel`."""
    real, integer = types.float64, types.int64
    inputs = real, types.float32, integer, integer, integer, real
    signature = *_signature(*inputs, real, real, real, real, integer), type_of_integers(Size)
    return Kernel(
        _name("many predictions", in_shared), "float64", _predict(in_shared), signature, THREADS, BLOCKS_OF_PREDICTIONS
    )


def _name(what: str, in_shared: bool) -> str:
    return f"{what}, float64, parameters in {'shared' if in_shared else 'global'} memory"


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    return [kernel(in_shared) for kernel in (fit_kernel, predict_kernel) for in_shared in (True, False)]
