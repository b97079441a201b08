"""The M-step of many fits: weights, means and covariances from statistics, and what the next E-step needs of them."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import cuda

from emalgam_kernels.batch import LIFTS, NO_MASS, RELATIVE_FLOOR, ROUNDING
from emalgam_kernels.numba_cuda.batch_matrices import entry, factorize, invert
from emalgam_kernels.numba_cuda.batch_memory import (
    FLOOR,
    KEPT,
    NARROW,
    OF_A_FEATURE,
    PENDING,
    Size,
    size_of,
    sum_of,
)
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, log, sqrt

HALF_LOG_2_PI: Final = 0.5 * math.log(2 * math.pi)
_LIFTS: Final = np.array(LIFTS)


@inlined
def maximize(memory: Any, sizes: Any, K: int) -> tuple[bool, bool]:
    """w_k = N_k / N, μ_k and Σ_k from the statistics: Bishop (2006), eq. 9.24-9.26.

    Whether all covariances are positive definite, and whether a component has collapsed.
    """
    C = 1 if size_of(sizes).shared else K
    move(memory, size_of(sizes), K)
    estimate(memory, size_of(sizes), K)
    regularize(memory, sizes, C)
    invert(memory, size_of(sizes), C)
    find_constants(memory, size_of(sizes), K)
    return verdict(memory, size_of(sizes), K)


# ---- from statistics to parameters


@inlined
def move(memory: Any, size: Size, K: int) -> None:
    """Weights, and the means by δ = Σ ω r (z − μ) / N_k, which takes its place among the statistics.

    A component without data stays where it was, without weight.
    """
    D, places, total = size.D, size.places, 0.0
    for k in ascending(K):
        total += memory[at(places.statistics + k * size.F + size.M + D)]
    for k in ascending(cuda.threadIdx.x, K, cuda.blockDim.x):
        mass = memory[at(places.statistics + k * size.F + size.M + D)]
        mass = 0.0 if mass <= NO_MASS * total else mass
        memory[at(places.masses + k)] = mass
        memory[at(places.weights + k)] = mass / total
        if k == 0 or not size.shared:
            memory[at(places.states + k)] = KEPT if mass == 0 and not size.shared else PENDING
    cuda.syncthreads()
    for item in ascending(cuda.threadIdx.x, K * D, cuda.blockDim.x):
        k, d = divided(item, D)
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
    for item in ascending(cuda.threadIdx.x, C * D, cuda.blockDim.x):
        c, i = divided(item, D)
        if memory[at(places.states + c)] == KEPT:
            continue
        for j in ascending(0 if size.full else i, i + 1):
            value = 0.0
            if size.shared:
                for k in ascending(K):
                    value += memory[at(places.masses + k)] / total * moment(memory, size, k, i, j)
            elif size.isotropic:
                for d in ascending(D):
                    value += moment(memory, size, c, d, d)
                value /= D
            else:
                value = moment(memory, size, c, i, j)
            memory[at(places.covariances + c * size.M + entry(size, i, j))] = value
    cuda.syncthreads()


@inlined
def regularize(memory: Any, sizes: Any, C: int) -> None:
    """As many floors as it takes to be positive definite; what none makes so stays pending."""
    lifts = cuda.const.array_like(_LIFTS)
    for attempt in ascending(len(LIFTS)):
        pending, states = False, size_of(sizes).places.states
        for c in ascending(C):
            pending = pending or memory[at(states + c)] == PENDING
        if not pending:
            break
        cuda.syncthreads()
        factorize(memory, size_of(sizes), C, lifts[at(attempt)], ROUNDING)


@inlined
def verdict(memory: Any, size: Size, K: int) -> tuple[bool, bool]:
    """What `maximize` returns, from masses and states."""
    fine, collapsed = True, False
    for k in ascending(K):
        collapsed = collapsed or memory[at(size.places.masses + k)] == 0
    for c in ascending(1 if size.shared else K):
        state = memory[at(size.places.states + c)]
        fine = fine and state != PENDING
        collapsed = collapsed or (state == NARROW and not size.shared)
    return fine, collapsed


# ---- what the E-step needs


@inlined
def find_constants(memory: Any, size: Size, K: int) -> None:
    """c_k = log w_k + log |L_k⁻¹| − ½ D log 2π; the factors of one covariance are one after the other."""
    places = size.places
    for k in ascending(cuda.threadIdx.x, K, cuda.blockDim.x):
        value = log(memory[at(places.weights + k)]) - size.D * HALF_LOG_2_PI
        width = size.Q * size.Q if size.full else size.D
        factor, step = places.factors + (0 if size.shared else k * width), size.Q + 1 if size.full else 1
        for d in ascending(size.D):
            value += log(memory[at(factor + d * step)])
        memory[at(places.constants + k)] = value
    cuda.syncthreads()


@inlined
def begin_components(memory: Any, size: Size, K: int) -> None:
    """Before the first M-step: means are padded with zeros, features independent, with the variances of all samples."""
    D, places, C = size.D, size.places, 1 if size.shared else K
    for item in ascending(cuda.threadIdx.x, K * size.P, cuda.blockDim.x):
        _, d = divided(item, size.P)
        if d >= D:
            memory[at(places.means + item)] = 0.0
    for item in ascending(cuda.threadIdx.x, C * size.Q, cuda.blockDim.x):
        c, j = divided(item, size.Q)
        column, row = places.factors + item * size.Q, places.covariances + c * size.M
        if size.full:
            for i in ascending(size.Q):
                memory[at(column + i)] = 0.0
        if j < D:
            variance = memory[at(places.frame + j * OF_A_FEATURE + FLOOR)] / RELATIVE_FLOOR
            for i in ascending(j if size.full else 0):
                memory[at(row + entry(size, j, i))] = 0.0
            memory[at(row + entry(size, j, j))] = variance
            memory[at(column + j if size.full else places.factors + c * D + j)] = 1.0 / sqrt(variance)
    cuda.syncthreads()
