"""The start of a fit: greedy k-means++, and the random numbers of a problem."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from emalgam_kernels.batch import ROUNDING
from emalgam_kernels.numba_cuda.batch_expectation import squared_distance
from emalgam_kernels.numba_cuda.batch_memory import (
    CHUNK,
    LANES,
    LOG_CHUNK,
    Samples,
    Size,
    in_frame,
    int64,
    read_tile,
    row_of,
    size_of,
    sum_of,
)
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, log
from emalgam_kernels.numba_cuda.draws import philox, uint64, unit_float64
from emalgam_kernels.philox import PROBLEMS, SEEDS

_STREAM_OF_PROBLEMS, _STREAM_OF_SEEDS, _0, _32 = uint64(PROBLEMS), uint64(SEEDS), uint64(0), uint64(32)


@inlined
def choose_seeds(
    samples: Samples, tile: Any, memory: Any, sizes: Any, key: Any, K: int, restart: int, total: Any
) -> None:
    """means ← greedy k-means++: each seed is the best of 2 + log K candidates, drawn in proportion to ω · nearest."""
    by_weight, mass, t, T = True, total, 0, size_of(sizes).T
    for k in ascending(K):
        count, cumulative = 1 if k == 0 else 2 + int64(log(types.float64(K))), 0.0
        set_targets(memory, size_of(sizes), key, K, restart, t, count, mass)
        for start in ascending(0, samples.n, T):
            read_tile(samples, tile, memory, size_of(sizes), start)
            mass_tile(tile, memory, size_of(sizes), k, by_weight)
            cumulative = pick_from_tile(tile, memory, size_of(sizes), start, cumulative, count)
        take_candidates(samples, memory, size_of(sizes), count)
        for start in ascending(0, samples.n, T):
            read_tile(samples, tile, memory, size_of(sizes), start)
            potential_tile(tile, memory, size_of(sizes), k, count, start)
        mass = take_seed(memory, size_of(sizes), k, count)
        by_weight = not mass > 0
        mass = total if by_weight else mass
        t += count


# ---- random numbers


@inlined
def key_of(seed: int, number: int) -> Any:
    """Of the random numbers of a problem."""
    low, high, _, _ = philox(uint64(seed), _STREAM_OF_PROBLEMS, _0, uint64(number))
    return low | high << _32


@inlined
def uniform(key: Any, K: int, restart: int, t: int) -> Any:
    """Number t of a restart with K components, in (0, 1)."""
    a, b, _, _ = philox(key, _STREAM_OF_SEEDS, uint64(t), (uint64(K) << _32) + uint64(restart))
    return unit_float64(a, b)


# ---- candidates


@inlined
def set_targets(memory: Any, size: Size, key: Any, K: int, restart: int, t: int, count: int, mass: Any) -> None:
    """Where candidates are to be drawn: u · mass, with the numbers from t on; nothing is picked yet."""
    for c in ascending(cuda.threadIdx.x, count, cuda.blockDim.x):
        memory[at(size.places.targets + c)] = uniform(key, K, restart, t + c) * mass
        memory[at(size.places.picks + c)] = -1.0
    for chunk in ascending(cuda.threadIdx.x, size.T >> LOG_CHUNK, cuda.blockDim.x):
        memory[at(size.places.lasts + chunk)] = -1.0
    cuda.syncthreads()


@inlined
def nearest(tile: Any, memory: Any, size: Size, k: int, t: int) -> Any:
    """The squared distance to the nearest of the first k seeds."""
    least = np.inf
    for seed in ascending(k):
        least = min(least, squared_distance(tile, memory, size, size.places.means + seed * size.P, t))
    return least


@inlined
def mass_tile(tile: Any, memory: Any, size: Size, k: int, by_weight: bool) -> None:
    """ω, or ω times the squared distance to the nearest seed, of each row; and the sum of every `CHUNK` rows."""
    omega = size.P * size.T
    for t in ascending(cuda.threadIdx.x, size.T, cuda.blockDim.x):
        weight = tile[at(omega + t)]
        mass = weight if by_weight or not weight > 0 else weight * nearest(tile, memory, size, k, t)
        tile[at(omega + size.T + t)] = mass
    cuda.syncthreads()
    for chunk in ascending(cuda.threadIdx.x, size.T >> LOG_CHUNK, cuda.blockDim.x):
        total = 0.0
        for i in ascending(CHUNK):
            total += tile[at(omega + size.T + chunk * CHUNK + i)]
        memory[at(size.places.chunks + chunk)] = total
    cuda.syncthreads()


@inlined
def pick_from_chunk(
    tile: Any, memory: Any, size: Size, start: int, chunk: int, below: Any, above: Any, count: int
) -> None:
    """For targets in [below, above): the first row of the chunk whose cumulative mass is larger, never one without."""
    place = (size.P + 1) * size.T + chunk * CHUNK
    for c in ascending(count):
        target, cumulative, found, last = memory[at(size.places.targets + c)], below, -1, -1
        for i in ascending(CHUNK):
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
    for chunk in ascending(cuda.threadIdx.x, size.T >> LOG_CHUNK, cuda.blockDim.x):
        below = cumulative
        for before in ascending(chunk):
            below += memory[at(chunks + before)]
        pick_from_chunk(tile, memory, size, start, chunk, below, below + memory[at(chunks + chunk)], count)
    for chunk in ascending(size.T >> LOG_CHUNK):
        cumulative += memory[at(chunks + chunk)]
    cuda.syncthreads()
    return cumulative


@inlined
def take_candidates(samples: Samples, memory: Any, size: Size, count: int) -> None:
    """candidates ← the samples picked; rounding may have left a target that no cumulative mass exceeds."""
    places = size.places
    for c in ascending(count):
        pick = memory[at(places.picks + c)]
        for chunk in ascending(size.T >> LOG_CHUNK if pick < 0 else 0):
            pick = max(pick, memory[at(places.lasts + chunk)])
        row = row_of(samples, size, int64(max(pick, 0.0)))
        for d in ascending(cuda.threadIdx.x, size.D, cuda.blockDim.x):
            memory[at(places.candidates + c * size.P + d)] = in_frame(samples, memory, size, row, d)
    cuda.syncthreads()


# ---- the best of them


@inlined
def potential_tile(tile: Any, memory: Any, size: Size, k: int, count: int, start: int) -> None:
    """The partial sums of ω min(nearest, squared distance to the candidate) go on with the rows of a tile."""
    places = size.places
    for t in ascending(cuda.threadIdx.x, size.T, cuda.blockDim.x):
        weight, least = tile[at(size.P * size.T + t)], nearest(tile, memory, size, k, t)
        for c in ascending(count):
            distance = squared_distance(tile, memory, size, places.candidates + c * size.P, t)
            memory[at(places.logits + c * size.T + t)] = weight * min(least, distance) if weight > 0 else 0.0
    cuda.syncthreads()
    for item in ascending(cuda.threadIdx.x, count * LANES, cuda.blockDim.x):
        (c, lane), total = divided(item, LANES), memory[at(places.sums + item)] if start > 0 else 0.0
        for t in ascending((lane - start) & (LANES - 1), size.T, LANES):
            total += memory[at(places.logits + c * size.T + t)]
        memory[at(places.sums + item)] = total
    cuda.syncthreads()


@inlined
def take_seed(memory: Any, size: Size, k: int, count: int) -> Any:
    """Mean k ← the first of the candidates that leave the least potential, which is returned."""
    places, best = size.places, 0
    least = sum_of(memory, places.sums, LANES)
    for c in ascending(1, count):
        potential = sum_of(memory, places.sums + c * LANES, LANES)
        if potential < (1 - ROUNDING) * least:
            best, least = c, potential
    for d in ascending(cuda.threadIdx.x, size.D, cuda.blockDim.x):
        memory[at(places.means + k * size.P + d)] = memory[at(places.candidates + best * size.P + d)]
    cuda.syncthreads()
    return least
