"""The E-step of many fits: a pass over the samples of a problem, from logits to statistics.

There is one form of the logits and of the statistics, that of the reference:

- L_k = c_k − ½ ‖L_k⁻¹ (z − μ_k)‖², which takes D (D + 1) / 2 products, as ⟨η_k, φ(z)⟩ does;
- S_k = Σ ω r_k φ(z − μ_k), the packed statistics about each component's own mean, which cost what those about the
  origin do, and do not cancel. So there is no guard here, and nothing is done twice.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cuda, types

from emalgam_kernels.numba_cuda.batch_memory import (
    CLOSENESS,
    LANES,
    OF_A_FEATURE,
    OF_A_TASK,
    SUMS_AT_ONCE,
    Samples,
    Size,
    read_tile,
    size_of,
)
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, log

# What rows are given to: one component that has all; the nearest mean; all by EM; and by EM, for the likelihood alone.
ALL, NEAREST, EM, EVALUATE = range(4)


# ---- distances and logits


@inlined
def squared_distance(tile: Any, memory: Any, size: Size, mean: int, t: int) -> Any:
    """Σ_d (z_d − mean_d)² · closeness_d, as k-means++ measures."""
    total, frame = 0.0, size.places.frame
    for d in ascending(size.D):
        centred = tile[at(d * size.T + t)] - memory[at(mean + d)]
        total += centred * centred * memory[at(frame + d * OF_A_FEATURE + CLOSENESS)]
    return total


@inlined
def mahalanobis(tile: Any, memory: Any, size: Size, mean: int, factor: int, t: int) -> Any:
    """‖L⁻¹ (z − μ)‖², four rows of L⁻¹ at a time."""
    total = 0.0
    if not size.full:
        for d in ascending(size.D):
            whitened = (tile[at(d * size.T + t)] - memory[at(mean + d)]) * memory[at(factor + d)]
            total += whitened * whitened
        return total
    whitened = cuda.local.array(4, types.float64)
    for first in ascending(0, size.D, 4):
        for i in ascending(4):
            whitened[i] = 0.0
        place = factor + first
        for j in ascending(min(first + 4, size.D)):
            centred = tile[at(j * size.T + t)] - memory[at(mean + j)]
            for i in ascending(4):
                whitened[i] += memory[at(place + i)] * centred
            place += size.Q
        for i in ascending(4):
            total += whitened[i] * whitened[i]
    return total


@inlined
def logit_tile(tile: Any, memory: Any, size: Size, K: int, form: int) -> None:
    """L_k = c_k − ½ ‖L_k⁻¹ (z − μ_k)‖², or less the squared distance to mean k."""
    places, parts = size.places, max(cuda.blockDim.x >> size.log_T, 1)
    for item in ascending(cuda.threadIdx.x, size.T * parts, cuda.blockDim.x):
        t = item & (size.T - 1)
        for k in ascending(item >> size.log_T, K, parts):
            mean = places.means + k * size.P
            if form == NEAREST:
                value = -squared_distance(tile, memory, size, mean, t)
            else:
                factor = places.factors + (0 if size.shared else k * (size.Q * size.Q if size.full else size.D))
                value = memory[at(places.constants + k)] - 0.5 * mahalanobis(tile, memory, size, mean, factor, t)
            memory[at(places.logits + k * size.T + t)] = value
    cuda.syncthreads()


# ---- responsibilities


@inlined
def largest_logit(memory: Any, size: Size, K: int, t: int) -> tuple[int, Any]:
    """argmax_k L_k, the first of equals, and the maximum."""
    label, top = 0, memory[at(size.places.logits + t)]
    for k in ascending(1, K):
        value = memory[at(size.places.logits + k * size.T + t)]
        if value > top:
            label, top = k, value
    return label, top


@inlined
def exponentials(memory: Any, size: Size, K: int, top: Any, t: int) -> Any:
    """L_k ← exp(L_k − top), and their sum."""
    total = 0.0
    for k in ascending(K):
        place = at(size.places.logits + k * size.T + t)
        value = math.exp(memory[place] - top)
        memory[place] = value
        total += value
    return total


@inlined
def responsibility_tile(tile: Any, memory: Any, size: Size, K: int, form: int) -> None:
    """L_k ← ω r_k, and ω log p; to evaluate, −ω Σ r log r too. Thread: one row."""
    omega, logits = size.P * size.T, size.places.logits
    for t in ascending(cuda.threadIdx.x, size.T, cuda.blockDim.x):
        weight, log_p, entropy = tile[at(omega + t)], 0.0, 0.0
        if form == ALL or not weight > 0:
            for k in ascending(K):
                memory[at(logits + k * size.T + t)] = weight
        elif form == NEAREST:
            label, _ = largest_logit(memory, size, K, t)
            for k in ascending(K):
                memory[at(logits + k * size.T + t)] = weight if k == label else 0.0
        else:
            # r_k = exp(L_k − top) / Σ, log p = top + log Σ
            _, top = largest_logit(memory, size, K, t)
            total = exponentials(memory, size, K, top, t)
            log_p = weight * (top + log(total))
            for k in ascending(K):
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
        k, block = divided(task, fours)
        return k, block, 0
    blocks = (fours * (fours + 1)) >> 1
    (k, rest), block = divided(task, blocks), 0
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
    for t in ascending(first, size.T, step):
        weight = memory[at(r + t)]
        for i in ascending(4):
            left[i] = weight * (tile[at(rows + i * size.T + t)] - memory[at(mean + 4 * block + i)])
            right[i] = tile[at(columns + i * size.T + t)] - memory[at(mean + 4 * other + i)]
        for i in ascending(4):
            for j in ascending(4):
                sums[4 * i + j] += left[i] * right[j]


@inlined
def add_squares(tile: Any, memory: Any, size: Size, sums: Any, task: int, first: int, step: int) -> None:
    """sums_i += Σ ω r y_i² and sums_{4 + i} += Σ ω r y_i of four features i, y = (z − μ_k, 1)."""
    k, block, _ = block_of(size, task)
    mean, r = size.places.means + k * size.P + 4 * block, size.places.logits + k * size.T
    for t in ascending(first, size.T, step):
        weight = memory[at(r + t)]
        for i in ascending(4):
            centred = tile[at((4 * block + i) * size.T + t)] - memory[at(mean + i)]
            sums[i] += weight * centred * centred
            sums[4 + i] += weight * centred


@inlined
def statistic_tile(tile: Any, memory: Any, size: Size, K: int, start: int) -> None:
    """The partial sums of S go on with the rows of a tile."""
    tasks, slices, log_slices = slices_of(size, K)
    sums = cuda.local.array(16, types.float64)
    for item in ascending(cuda.threadIdx.x, tasks << log_slices, cuda.blockDim.x):
        place = size.places.sums + item * OF_A_TASK
        for e in ascending(16):
            sums[e] = 0.0
            if start > 0 and (size.full or e < 8):
                sums[e] = memory[at(place + e)]
        first = (item - start) & (slices - 1)
        if size.full:
            add_products(tile, memory, size, sums, item >> log_slices, first, slices)
        else:
            add_squares(tile, memory, size, sums, item >> log_slices, first, slices)
        for e in ascending(16):
            if size.full or e < 8:
                memory[at(place + e)] = sums[e]
    cuda.syncthreads()


@inlined
def add_slices(memory: Any, size: Size, K: int) -> None:
    """S_k from its partial sums: (y_i y_j for i ≥ j), or (squares, y)."""
    tasks, slices, log_slices = slices_of(size, K)
    log_entries = 4 if size.full else 3
    for item in ascending(cuda.threadIdx.x, tasks << log_entries, cuda.blockDim.x):
        task, e = item >> log_entries, item & ((1 << log_entries) - 1)
        k, block, other = block_of(size, task)
        i, j = 4 * block + (e >> 2), 4 * other + (e & 3)
        f, there = ((i * (i + 1)) >> 1) + j, j <= i <= size.D
        if not size.full:
            i = 4 * block + (e & 3)
            f, there = (i, i < size.D) if e < 4 else (size.D + i, i <= size.D)
        if there:
            total = 0.0
            for partial in ascending(slices):
                total += memory[at(size.places.sums + ((task << log_slices) + partial) * OF_A_TASK + e)]
            memory[at(size.places.statistics + k * size.F + f)] = total
    cuda.syncthreads()


@inlined
def add_to_lanes(tile: Any, memory: Any, size: Size, start: int) -> None:
    """The partial sums of ω log p and of the entropy go on with the rows of a tile."""
    for item in ascending(cuda.threadIdx.x, 2 * LANES, cuda.blockDim.x):
        (row, lane), place = divided(item, LANES), at(size.places.lanes + item)
        total = memory[place] if start > 0 else 0.0
        for t in ascending((lane - start) & (LANES - 1), size.T, LANES):
            total += tile[at((size.P + 1 + row) * size.T + t)]
        memory[place] = total
    cuda.syncthreads()


# ---- a pass


@inlined
def sweep(samples: Samples, tile: Any, memory: Any, sizes: Any, K: int, form: int) -> None:
    """One pass: the statistics of all samples, and the sums of ω log p and of the entropy."""
    for start in ascending(0, samples.n, size_of(sizes).T):
        read_tile(samples, tile, memory, size_of(sizes), start)
        if form != ALL:
            logit_tile(tile, memory, size_of(sizes), K, form)
        responsibility_tile(tile, memory, size_of(sizes), K, form)
        if form != EVALUATE:
            statistic_tile(tile, memory, size_of(sizes), K, start)
        add_to_lanes(tile, memory, size_of(sizes), start)
    if form != EVALUATE:
        add_slices(memory, size_of(sizes), K)
