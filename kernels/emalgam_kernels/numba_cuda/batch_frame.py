"""What is found out about the samples of a problem before it is fitted: whether they can be, and their frame."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import cuda

from emalgam_kernels.batch import RELATIVE_FLOOR, ROUND_SHIFT
from emalgam_kernels.numba_cuda.batch_expectation import ALL, sweep
from emalgam_kernels.numba_cuda.batch_matrices import entry, factorize
from emalgam_kernels.numba_cuda.batch_maximization import estimate
from emalgam_kernels.numba_cuda.batch_memory import (
    ADDED,
    CLOSENESS,
    COARSE,
    FINER,
    FLOOR,
    LANES,
    MEAN,
    MIDDLE,
    OF_A_FEATURE,
    PENDING,
    PIVOT,
    SCALE,
    SHIFT,
    Samples,
    Size,
    int64,
    number,
    row_of,
    size_of,
)
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, sqrt

WHOLE: Final = 2.0**52  # from here on every float64 is a whole number
MOST_EXPONENT: Final = 1021


@inlined
def survey_weights(samples: Samples, memory: Any, size: Size) -> tuple[bool, int, Any]:
    """Whether a weight is negative or not finite, how many are positive, and the largest."""
    if not size.weighted:
        return False, samples.n, 1.0
    place = size.places.sums
    for lane in ascending(cuda.threadIdx.x, LANES, cuda.blockDim.x):
        bad, positive, largest = 0.0, 0.0, 0.0
        for n in ascending(lane, samples.n, LANES):
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
    for lane in ascending(LANES):
        bad = max(bad, memory[at(place + lane)])
        positive += memory[at(place + LANES + lane)]
        largest = max(largest, memory[at(place + 2 * LANES + lane)])
    cuda.syncthreads()
    return bad > 0, int64(positive), largest


# ---- the first step: the range of each feature


@inlined
def power_of_two(deviation: Any) -> Any:
    """What brings a positive number into [½, 1); 1 for zero. Neither it nor its inverse overflows."""
    if not deviation > 0:
        return 1.0
    _, exponent = math.frexp(deviation)
    return math.ldexp(1.0, -min(max(exponent, -MOST_EXPONENT), MOST_EXPONENT))


@inlined
def find_range(samples: Samples, memory: Any, size: Size) -> bool:
    """Middle and coarse from the range of each feature; False if a sample with weight is not finite."""
    D, places, finite = size.D, size.places, True
    for item in ascending(cuda.threadIdx.x, D * LANES, cuda.blockDim.x):
        (lane, d), low, high = divided(item, D), np.inf, -np.inf
        for n in ascending(lane, samples.n, LANES):
            row = row_of(samples, size, n)
            if not size.weighted or samples.weight[at(row)] > 0:
                value = number(samples, size, row, d)
                if not abs(value) < np.inf:
                    low, high = -np.inf, np.inf
                low, high = min(low, value), max(high, value)
        memory[at(places.sums + item)] = low
        memory[at(places.sums + D * LANES + item)] = high
    cuda.syncthreads()
    for i in ascending(cuda.threadIdx.x, size.P, cuda.blockDim.x):
        memory[at(places.means + i)] = 0.0
    for d in ascending(cuda.threadIdx.x, D, cuda.blockDim.x):
        low, high = np.inf, -np.inf
        for lane in ascending(LANES):
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
    for d in ascending(D):
        low, high = (
            memory[at(places.frame + d * OF_A_FEATURE + SHIFT)],
            memory[at(places.frame + d * OF_A_FEATURE + SCALE)],
        )
        finite = finite and low > -np.inf and high < np.inf
    cuda.syncthreads()
    return finite


# ---- the second: mean and deviation


@inlined
def prepare(samples: Samples, tile: Any, memory: Any, sizes: Any, added: Any) -> Any:
    """The frame, its ranges having been found; returns Σ ω."""
    total = 0.0
    for stage in ascending(3):
        # Σ ω z; Σ ω (z − mean)²; in the frame Σ ω z zᵀ
        sweep(samples, tile, memory, sizes, 1, ALL)
        total = take_total(memory, size_of(sizes), stage)
        if stage == 1:
            find_finer(memory, size_of(sizes), total)
            find_scale(memory, size_of(sizes), added)
    # The variance of each feature given those before it, of all samples together.
    estimate(memory, size_of(sizes), 1)
    factorize(memory, size_of(sizes), 1, 1.0, 0.0)
    keep_pivots(memory, size_of(sizes))
    return total


@inlined
def take_total(memory: Any, size: Size, stage: int) -> Any:
    """Σ ω; at first means ← the mean, in the end the statistics become moments about the origin, of one component."""
    places, linear = size.places, size.places.statistics + size.M
    total = memory[at(linear + size.D)]
    for d in ascending(cuda.threadIdx.x, size.D, cuda.blockDim.x):
        if stage == 0:
            memory[at(places.means + d)] = memory[at(linear + d)] / total
        elif stage == 2:
            memory[at(linear + d)] = 0.0
    if cuda.threadIdx.x == 0:
        memory[at(places.masses)], memory[at(places.states)] = total, PENDING
    cuda.syncthreads()
    return total


@inlined
def rounded(value: Any) -> Any:
    """To the nearest whole number, and half-way to the even one."""
    if not abs(value) < WHOLE:
        return value
    return (value + WHOLE) - WHOLE if value > 0 else (value - WHOLE) + WHOLE


@inlined
def find_finer(memory: Any, size: Size, total: Any) -> None:
    """The second step of the frame from Σ ω (z − mean)², where `means` begins with the mean; FLOOR ← variances."""
    D, places, least = size.D, size.places, np.inf
    for d in ascending(cuda.threadIdx.x, D, cuda.blockDim.x):
        f = (((d * (d + 1)) >> 1) + d) if size.full else d
        deviation = sqrt(memory[at(places.statistics + f)] / total)
        finer = power_of_two(deviation)
        # A rounded mean leaves the differences between samples exact: those that are equal stay so.
        unit = finer * ROUND_SHIFT
        memory[at(places.frame + d * OF_A_FEATURE + MEAN)] = rounded(memory[at(places.means + d)] * unit) / unit
        memory[at(places.frame + d * OF_A_FEATURE + FINER)] = finer
        memory[at(places.frame + d * OF_A_FEATURE + FLOOR)] = deviation
    cuda.syncthreads()
    for d in ascending(D):
        scale = (
            memory[at(places.frame + d * OF_A_FEATURE + COARSE)] * memory[at(places.frame + d * OF_A_FEATURE + FINER)]
        )
        if memory[at(places.frame + d * OF_A_FEATURE + FLOOR)] > 0 and scale < least:
            least = scale
    cuda.syncthreads()
    for d in ascending(cuda.threadIdx.x, D, cuda.blockDim.x):
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
    for d in ascending(cuda.threadIdx.x, D, cuda.blockDim.x):
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
        for d in ascending(D):
            floor += memory[at(frame + d * OF_A_FEATURE + FLOOR)] / D
            lift += memory[at(frame + d * OF_A_FEATURE + ADDED)] / D
        cuda.syncthreads()
        for d in ascending(cuda.threadIdx.x, D, cuda.blockDim.x):
            memory[at(frame + d * OF_A_FEATURE + FLOOR)] = floor
            memory[at(frame + d * OF_A_FEATURE + ADDED)] = lift
        cuda.syncthreads()


@inlined
def keep_pivots(memory: Any, size: Size) -> None:
    """Of the covariance of all samples."""
    for d in ascending(cuda.threadIdx.x, size.D, cuda.blockDim.x):
        root = memory[at(size.places.sums + entry(size, d, d))]
        pivot = root * root if memory[at(size.places.states)] != PENDING else 0.0
        memory[at(size.places.frame + d * OF_A_FEATURE + PIVOT)] = pivot
    cuda.syncthreads()
