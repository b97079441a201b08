"""The kernels of many fits: whole fits on the device, one block to a problem; see `emalgam_kernels.reference.batch`.

`batch_memory` says what a block has of a problem. `batch_frame` looks at the samples and finds the frame that they are
fitted in, `batch_seeding` makes a start, `batch_expectation` and `batch_maximization` are the steps of EM, the latter
with the factors of `batch_matrices`, and `batch_fit` runs them and keeps the best; `batch_prediction` takes mixtures
as they are.

Sums over rows are made of `LANES` (statistics: up to so many) partial sums, each of every so manieth row, which are
then added in order: no bit of a result depends on how many threads a block has, nor on the other problems.

Arithmetic is float64, whatever the type of x: that is the kernels' contract, by which a collapse is told from rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from numba import cuda, types

from emalgam_kernels.numba_cuda.batch_expectation import EM, logit_tile
from emalgam_kernels.numba_cuda.batch_fit import BAD_WEIGHT, FINE, NOT_FINITE, STATUS, TOO_FEW_ROWS, fit_problem
from emalgam_kernels.numba_cuda.batch_frame import find_range, prepare, survey_weights
from emalgam_kernels.numba_cuda.batch_memory import N_INTEGERS, Samples, Size, begin_tile, read_tile, size_of, unpacked
from emalgam_kernels.numba_cuda.batch_prediction import adopt, predict_tile
from emalgam_kernels.numba_cuda.batch_seeding import key_of
from emalgam_kernels.numba_cuda.device import SIMULATED, Kernel, ascending, at, flat, integers_of

THREADS: Final = 8 if SIMULATED else 64
BLOCKS: Final = 4  # of a multiprocessor, with all the registers that a thread may have
BLOCKS_OF_PREDICTIONS: Final = 6  # 168 registers


def _fit(in_shared: bool) -> Callable[..., None]:
    def fit_many(
        x64: Any, x32: Any, order: Any, weight: Any, offsets: Any, numbers: Any, choices: Any, workspace: Any,
        weights: Any, means: Any, covariances: Any, reals: Any, integers: Any,
        given: Any, seed: int, tol: float, added: float,
    ) -> None:  # fmt: skip
        """Every so manieth problem is the block's; `choices` are the fewest components (B,) and the most (B,)."""
        tile = cuda.shared.array(0, types.float64)
        kept = cuda.shared.array(N_INTEGERS, types.int64)
        for i in ascending(cuda.threadIdx.x, N_INTEGERS, cuda.blockDim.x):
            kept[at(i)] = given[at(i)]
        cuda.syncthreads()
        sizes = unpacked(kept) if SIMULATED else kept
        part = cuda.blockIdx.x * size_of(sizes).memory
        memory = tile if in_shared else workspace[part : part + size_of(sizes).memory]
        begin_tile(tile, size_of(sizes))
        for b in ascending(cuda.blockIdx.x, size_of(sizes).B, cuda.gridDim.x):
            first, fewest, status = offsets[at(b)], choices[at(b)], FINE
            n = offsets[at(b + 1)] - first
            samples = Samples(x64, x32, order, weight, first, n, 1.0)
            bad, positive, largest = survey_weights(samples, memory, size_of(sizes))
            if bad:
                status = BAD_WEIGHT
            elif positive < fewest:
                status = TOO_FEW_ROWS
            elif not find_range(samples, memory, size_of(sizes)):
                status = NOT_FINITE
            else:
                samples = Samples(x64, x32, order, weight, first, n, largest)
                total = prepare(samples, tile, memory, sizes, added)
                key, most = key_of(seed, numbers[at(b)]), min(choices[at(size_of(sizes).B + b)], positive)
                status = fit_problem(
                    samples, tile, memory, sizes, b, key, fewest, most, tol, total,
                    weights, means, covariances, reals, integers,
                )  # fmt: skip
            if cuda.threadIdx.x == 0:
                integers[at(STATUS * size_of(sizes).B + b)] = status
            cuda.syncthreads()

    return fit_many


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
        for b in ascending(cuda.blockIdx.x, size.B, cuda.gridDim.x):
            first, K = offsets[at(b)], n_components[at(b)]
            samples = Samples(x64, x32, order, x64, first, offsets[at(b + 1)] - first, 1.0)
            known = K > 0
            if known:
                known = adopt(memory, size, b, K, weights, means, covariances)
            for start in ascending(0, samples.n, size.T):
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
    signature = *_signature(*inputs, real, real, real, real, integer), integers_of(Size)
    return Kernel(
        _name("many predictions", in_shared), "float64", _predict(in_shared), signature, THREADS, BLOCKS_OF_PREDICTIONS
    )


def _name(what: str, in_shared: bool) -> str:
    return f"{what}, float64, parameters in {'shared' if in_shared else 'global'} memory"


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    return [kernel(in_shared) for kernel in (fit_kernel, predict_kernel) for in_shared in (True, False)]
