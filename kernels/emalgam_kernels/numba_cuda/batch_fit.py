"""EM of a problem: its restarts with every number of components, and the best of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from emalgam_kernels import batch
from emalgam_kernels.batch import EQUAL, Status
from emalgam_kernels.numba_cuda.batch_expectation import EM, EVALUATE, NEAREST, sweep
from emalgam_kernels.numba_cuda.batch_matrices import entry
from emalgam_kernels.numba_cuda.batch_maximization import begin_components, maximize
from emalgam_kernels.numba_cuda.batch_memory import LANES, OF_A_FEATURE, SCALE, SHIFT, Samples, Size, size_of, sum_of
from emalgam_kernels.numba_cuda.batch_seeding import choose_seeds
from emalgam_kernels.numba_cuda.device import ascending, at, divided, inlined, log

LOG_LIKELIHOOD, ENTROPY = range(2)  # rows of the real results
N_COMPONENTS, N_ITER, CONVERGED, STATUS = range(4)  # rows of the integer results
FINE, NOT_CONVERGED, COLLAPSED, TOO_FEW_ROWS, NOT_FINITE, BAD_WEIGHT, NO_LIKELIHOOD, _ = map(int, Status)

replaces = inlined(batch.replaces)


@inlined
def fit_problem(
    samples: Samples, tile: Any, memory: Any, sizes: Any, b: int, key: Any, fewest: int, most: int, tol: Any,
    total: Any, weights: Any, means: Any, covariances: Any, reals: Any, integers: Any,
) -> int:  # fmt: skip
    """The best fit of all numbers of components and restarts, see `replaces`; returns its status."""
    status, best, largest = NO_LIKELIHOOD, np.inf, samples.largest
    for fit in ascending((most - fewest + 1) * size_of(sizes).n_init):
        more, restart = divided(fit, size_of(sizes).n_init)
        K = fewest + more
        fine, log_p, entropy, n_iter, converged, collapsed = restart_fit(
            samples, tile, memory, sizes, key, K, restart, total, tol
        )
        log_p, entropy = log_p * largest, entropy * largest
        value = criterion_of(size_of(sizes), K, log_p, entropy, log(total) + log(largest))
        margin = EQUAL * total * largest
        if fine and (status == NO_LIKELIHOOD or replaces(value, collapsed, best, status == COLLAPSED, margin)):
            best, status = value, COLLAPSED if collapsed else (FINE if converged else NOT_CONVERGED)
            # K never falls, so this covers all that an earlier fit has left
            store(memory, size_of(sizes), b, K, weights, means, covariances)
            if cuda.threadIdx.x == 0:
                B = size_of(sizes).B
                reals[at(LOG_LIKELIHOOD * B + b)], reals[at(ENTROPY * B + b)] = log_p, entropy
                integers[at(N_COMPONENTS * B + b)], integers[at(N_ITER * B + b)] = K, n_iter
                integers[at(CONVERGED * B + b)] = 1 if converged else 0
        cuda.syncthreads()
    return status


@inlined
def restart_fit(
    samples: Samples, tile: Any, memory: Any, sizes: Any, key: Any, K: int, restart: int, total: Any, tol: Any
) -> tuple[bool, Any, Any, int, bool, bool]:
    """EM from one start: whether it came to something, Σ ω log p, entropy, iterations, converged, collapsed."""
    choose_seeds(samples, tile, memory, sizes, key, K, restart, total)
    begin_components(memory, size_of(sizes), K)
    fine, collapsed, converged, bound = True, False, False, -np.inf
    form, n_iter = NEAREST, -1  # the M-step of the start is no iteration
    while fine and form != EVALUATE:
        if converged or n_iter >= size_of(sizes).max_iter:
            form = EVALUATE
        sweep(samples, tile, memory, sizes, K, form)
        if form != EVALUATE:
            if form == EM:
                previous, bound = bound, sum_of(memory, size_of(sizes).places.lanes, LANES) / total
                converged = abs(bound - previous) < tol
            fine, collapsed = maximize(memory, sizes, K)
            fine = fine and (form == NEAREST or abs(bound) < np.inf)
            form, n_iter = EM, n_iter + 1
    log_p, entropy = evaluation(memory, size_of(sizes), total)
    return fine and abs(log_p) < np.inf, log_p, entropy, n_iter, converged, collapsed


@inlined
def evaluation(memory: Any, size: Size, total: Any) -> tuple[Any, Any]:
    """Σ ω log p(x), in the units of the data, and the entropy, from the last pass."""
    lanes, frame = size.places.lanes, size.places.frame
    log_p, entropy = sum_of(memory, lanes, LANES), sum_of(memory, lanes + LANES, LANES)
    for d in ascending(size.D):
        log_p += total * log(memory[at(frame + d * OF_A_FEATURE + SCALE)])
    cuda.syncthreads()
    return log_p, entropy


@inlined
def criterion_of(size: Size, K: int, log_likelihood: Any, entropy: Any, log_total: Any) -> Any:
    """See `emalgam_kernels.batch.criterion_value`."""
    each = size.D + (0 if size.shared else 1 if size.isotropic else size.M)
    count = types.float64(K - 1 + K * each + (size.M if size.shared else 0))
    penalty = 2.0 if size.aic else log_total
    return -2.0 * log_likelihood + count * penalty + (2.0 * entropy if size.icl else 0.0)


@inlined
def store(memory: Any, size: Size, b: int, K: int, weights: Any, means: Any, covariances: Any) -> None:
    """Components, out of their frame: x = z / scale + shift."""
    D, places, width = size.D, size.places, size.covariance_width
    scale, shift = places.frame + SCALE, places.frame + SHIFT
    for item in ascending(cuda.threadIdx.x, K * D, cuda.blockDim.x):
        k, d = divided(item, D)
        mean = (
            memory[at(places.means + k * size.P + d)] / memory[at(scale + d * OF_A_FEATURE)]
            + memory[at(shift + d * OF_A_FEATURE)]
        )
        means[at((b * size.K + k) * D + d)] = mean
        if d == 0:
            weights[at(b * size.K + k)] = memory[at(places.weights + k)]
    for item in ascending(cuda.threadIdx.x, (1 if size.shared else K) * width, cuda.blockDim.x):
        c, place = divided(item, width)
        i, j = divided(place, D) if size.full else (place, place)
        value = memory[at(places.covariances + c * size.M + entry(size, max(i, j), min(i, j)))]
        target = at(b * size.C * width + item)
        covariances[target] = value / (memory[at(scale + i * OF_A_FEATURE)] * memory[at(scale + j * OF_A_FEATURE)])
