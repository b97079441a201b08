"""Covariances of many fits, their Cholesky factors and the inverses of these; a group of threads to a matrix."""

from __future__ import annotations

from typing import Any

from numba import cuda

from emalgam_kernels.batch import RELATIVE_FLOOR
from emalgam_kernels.numba_cuda.batch_memory import (
    ADDED,
    BROAD,
    FLOOR,
    KEPT,
    NARROW,
    OF_A_FEATURE,
    PENDING,
    PIVOT,
    Size,
)
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, sqrt


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
        for m in ascending(j):
            variance -= memory[at(row + m)] * memory[at(row + m)]
    return variance


@inlined
def column_below(memory: Any, size: Size, covariance: int, lower: int, j: int, root: Any, lane: int, step: int) -> None:
    """L_ij = (A_ij − Σ_{m<j} L_im L_jm) / L_jj for every `step`-th row i > j."""
    above = lower + ((j * (j + 1)) >> 1)
    for i in ascending(j + 1 + lane, size.D, step):
        row = (i * (i + 1)) >> 1
        value = memory[at(covariance + row + j)]
        for m in ascending(j):
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
    for first in ascending(0, C, groups):
        c = first + group
        covariance, lower, frame = places.covariances + c * size.M, places.sums + c * size.M, places.frame
        fine = c < C and memory[at(places.states + min(c, C - 1))] == PENDING
        narrow = times > 0
        for j in ascending(D):
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
            for j in ascending(lane, D, step):
                lift = (
                    memory[at(frame + j * OF_A_FEATURE + ADDED)] + times * memory[at(frame + j * OF_A_FEATURE + FLOOR)]
                )
                memory[at(covariance + entry(size, j, j))] += lift
    cuda.syncthreads()


@inlined
def invert(memory: Any, size: Size, C: int) -> None:
    """L⁻¹ of each new L, a column on a thread: X_ij = (δ_ij − Σ_{j≤m<i} L_im X_mj) / L_ii."""
    D, places = size.D, size.places
    for item in ascending(cuda.threadIdx.x, C * D, cuda.blockDim.x):
        c, j = divided(item, D)
        state = memory[at(places.states + c)]
        if state in (KEPT, PENDING):
            continue
        lower = places.sums + c * size.M
        if not size.full:
            memory[at(places.factors + item)] = 1.0 / memory[at(lower + j)]
            continue
        column = places.factors + (c * size.Q + j) * size.Q
        for i in ascending(j, D):
            row, value = lower + ((i * (i + 1)) >> 1), 1.0 if i == j else 0.0
            for m in ascending(j, i):
                value -= memory[at(row + m)] * memory[at(column + m)]
            memory[at(column + i)] = value / memory[at(row + i)]
    cuda.syncthreads()
