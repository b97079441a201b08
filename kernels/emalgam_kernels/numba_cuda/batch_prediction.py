"""Mixtures that are given, and what they say of samples: log p and labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from emalgam_kernels.numba_cuda.batch_expectation import largest_logit
from emalgam_kernels.numba_cuda.batch_matrices import entry, factorize, invert
from emalgam_kernels.numba_cuda.batch_maximization import begin_components, find_constants
from emalgam_kernels.numba_cuda.batch_memory import (
    ADDED,
    BROAD,
    CLOSENESS,
    COARSE,
    FINER,
    FLOOR,
    MEAN,
    MIDDLE,
    OF_A_FEATURE,
    PENDING,
    PIVOT,
    Samples,
    Size,
    row_of,
)
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, log


@inlined
def adopt(memory: Any, size: Size, b: int, K: int, weights: Any, means: Any, covariances: Any) -> bool:
    """A mixture in the units of the data, with its factors; whether its covariances are positive definite."""
    D, places, C, width = size.D, size.places, 1 if size.shared else K, size.covariance_width
    for d in ascending(cuda.threadIdx.x, D, cuda.blockDim.x):
        for row in (MIDDLE, MEAN, ADDED, PIVOT):
            memory[at(places.frame + d * OF_A_FEATURE + row)] = 0.0
        for row in (COARSE, FINER, FLOOR, CLOSENESS):
            memory[at(places.frame + d * OF_A_FEATURE + row)] = 1.0
    cuda.syncthreads()
    begin_components(memory, size, K)
    for item in ascending(cuda.threadIdx.x, K * D, cuda.blockDim.x):
        k, i = divided(item, D)
        memory[at(places.means + k * size.P + i)] = means[at((b * size.K + k) * D + i)]
        if i == 0:
            memory[at(places.weights + k)] = weights[at(b * size.K + k)]
        if k >= C:
            continue
        if i == 0:
            memory[at(places.states + k)] = PENDING
        source = (b * size.C + k) * width
        for j in ascending(0 if size.full else i, i + 1):
            place = source + ((i * D + j) if size.full else min(i, width - 1))
            memory[at(places.covariances + k * size.M + entry(size, i, j))] = covariances[at(place)]
    cuda.syncthreads()
    factorize(memory, size, C, 0.0, 0.0)
    invert(memory, size, C)
    find_constants(memory, size, K)
    known = True
    for c in ascending(C):
        known = known and memory[at(places.states + c)] == BROAD
    return known


@inlined
def predict_tile(
    samples: Samples, memory: Any, size: Size, K: int, start: int, known: bool, log_prob: Any, labels: Any
) -> None:
    """log p and argmax_k L_k; NaN and −1 where there is no mixture or log p is not finite. Thread: one row."""
    for t in ascending(cuda.threadIdx.x, min(size.T, samples.n - start), cuda.blockDim.x):
        row, label, log_p = row_of(samples, size, start + t), -1, np.nan
        if known:
            label, top = largest_logit(memory, size, K, t)
            total = 0.0
            for k in ascending(K):
                total += math.exp(memory[at(size.places.logits + k * size.T + t)] - top)
            log_p = top + log(total)
        there = abs(log_p) < np.inf
        log_prob[at(row)] = log_p if there else np.nan
        labels[at(row)] = label if there else -1
