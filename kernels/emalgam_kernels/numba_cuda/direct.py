"""The direct form, for parameters at which the packed one cancels: L_k = c_k − ½ ‖P_kᵀ (z − μ_k)‖².

The chunks, the frame and the posterior are those of `products`. Statistics are about each component's own mean,
Σ ω r_nk φ(z_n − μ_k). "diag" takes one kernel for all logits and one for all statistics; "full" takes a few products
for each component, one component after the other, in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from numba import cuda

from emalgam_kernels.numba_cuda import device, products
from emalgam_kernels.numba_cuda.device import NUMBA_REALS, REALS, Kernel, ascending, at, flat
from emalgam_kernels.numba_cuda.problem import DirectProblem, Results
from emalgam_kernels.numba_cuda.products import COLUMN_STEP, FULL, GROUP, THREADS, Chunk, Posterior, Samples, integers

# ---- kernels


def _diag_logits(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero, half = real(0), real(0.5)

    def diag_logits(
        z: Any, means: Any, factors: Any, constants: Any, logits: Any, K: int, D: int, width: int, factor_stride: int
    ) -> None:
        """L_k of `GROUP` components; thread: one column."""
        column = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if column >= width:
            return
        first = cuda.blockIdx.y * GROUP
        distances = cuda.local.array(GROUP, real)
        for g in ascending(GROUP):
            distances[g] = zero
        # ‖P_kᵀ (z − μ_k)‖² = Σ_d ((z_d − μ_kd) p_kd)²
        for d in ascending(D):
            z_d = z[at(d * width + column)]
            for g in ascending(GROUP):
                k = first + g
                if k < K:
                    y = (z_d - means[at(k * D + d)]) * factors[at(k * factor_stride + d)]
                    distances[g] += y * y
        # L_k = c_k − ½ ‖P_kᵀ (z − μ_k)‖²
        for g in ascending(GROUP):
            k = first + g
            if k < K:
                logits[at(k * width + column)] = constants[at(k)] - half * distances[g]

    return diag_logits


def _full_logits(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero, half = real(0), real(0.5)

    def full_logits(y: Any, constants: Any, logits: Any, k: int, D: int, width: int) -> None:
        """L_k = c_k − ½ Σ_d y_d²; thread: one column."""
        column = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if column >= width:
            return
        distance = zero
        for d in ascending(D):
            y_d = y[at(d * width + column)]
            distance += y_d * y_d
        logits[at(k * width + column)] = constants[at(k)] - half * distance

    return full_logits


def _diag_statistics(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero = real(0)

    def diag_statistics(z: Any, means: Any, r: Any, partial: Any, D: int, width: int, rows: int) -> None:
        """Σ ω r (z_d − μ_kd)² and Σ ω r (z_d − μ_kd) over one part; block: one k, d and part; d = D: Σ ω r alone."""
        squares = cuda.shared.array(THREADS, real)
        firsts = cuda.shared.array(THREADS, real)
        k, d, part = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        thread, K = cuda.threadIdx.x, cuda.gridDim.x
        mean = means[at(k * D + d)] if d < D else zero
        square, first = zero, zero
        for column in ascending(part * rows + thread, (part + 1) * rows, cuda.blockDim.x):
            omega_r = r[at(k * width + column)]
            if d < D:
                centred = z[at(d * width + column)] - mean
                first += omega_r * centred
                square += (omega_r * centred) * centred
            else:
                first += omega_r
        squares[at(thread)], firsts[at(thread)] = square, first
        cuda.syncthreads()
        half = cuda.blockDim.x >> 1
        while half > 0:
            if thread < half:
                squares[at(thread)] += squares[at(thread + half)]
                firsts[at(thread)] += firsts[at(thread + half)]
            cuda.syncthreads()
            half >>= 1
        if thread == 0:
            start = (part * K + k) * (2 * D + 1)
            partial[at(start + D + d)] = firsts[0]
            if d < D:
                partial[at(start + d)] = squares[0]

    return diag_statistics


def accumulate_triangle(partial: Any, statistics: Any, k: int, size: int, parts: int) -> None:
    """S_k += Σ_parts of the lower triangle of (parts, size, size), row by row; block: a row and some columns of it."""
    i, j = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if j > i:
        return
    value = statistics.dtype.type(0)
    for part in ascending(parts):
        value += partial[at((part * size + i) * size + j)]
    statistics[at(k * ((size * (size + 1)) >> 1) + ((i * (i + 1)) >> 1) + j)] += value


@cache
def _kernel(name: str, arithmetic: str) -> Kernel:
    """A kernel that computes in one type throughout."""
    factory, arrays, count = {
        "diag logits": (_diag_logits, 5, 4),
        "full logits": (_full_logits, 3, 3),
        "diag statistics": (_diag_statistics, 4, 3),
    }[name]
    signature = (*(flat(NUMBA_REALS[arithmetic]),) * arrays, *integers(count))
    return Kernel(f"direct {name}, {arithmetic}", arithmetic, factory(arithmetic), signature, THREADS, FULL)


@cache
def _triangle_kernel(arithmetic: str) -> Kernel:
    """Sums of a chunk in its arithmetic type to those of all chunks in float64."""
    signature = (flat(NUMBA_REALS[arithmetic]), flat(NUMBA_REALS["float64"]), *integers(3))
    return Kernel(f"direct sums of {arithmetic}", "float64", accumulate_triangle, signature, THREADS)


def kernels() -> list[Kernel]:
    """The kernels that this file adds to those of `products`, for the compile gate."""
    names = "diag logits", "full logits", "diag statistics"
    return [
        kernel
        for arithmetic in REALS
        for kernel in (*(_kernel(name, arithmetic) for name in names), _triangle_kernel(arithmetic))
    ]


# ---- one pass


class _Diag:
    """P_k a diagonal: S_k = Σ ω r ((z − μ_k)², z − μ_k, 1)."""

    def __init__(self, samples: Samples, problem: DirectProblem, results: Results) -> None:
        self.samples, self.problem = samples, problem
        K, D = problem.n_components, samples.D
        self.columns = products.rows_of_a_chunk(samples, D + K, K, problem.arithmetic)
        self.posterior = Posterior(samples, K, self.columns, problem.hard, results, problem.arithmetic)
        like, parts = self.posterior.logits, products.parts_of(self.columns)
        self.z = device.view(like.new_empty(D * self.columns))
        self.partial = device.view(like.new_empty(1 if results.sums is None else parts * K * (2 * D + 1)))
        self.means, self.factors, self.constants = (
            device.view(each) for each in (problem.means, problem.factors, problem.log_constants)
        )

    def logits(self, chunk: Chunk) -> None:
        """L of a chunk."""
        problem, (D, width) = self.problem, (self.samples.D, chunk.width)
        K, threads = problem.n_components, COLUMN_STEP
        self.samples.into_frame(chunk, self.z)
        _kernel("diag logits", problem.arithmetic).launch(
            (width // threads, -(-K // GROUP)), threads,
            self.z, self.means, self.factors, self.constants, self.posterior.view,
            K, D, width, 0 if len(problem.factors) < K else D,
        )  # fmt: skip

    def statistics(self, chunk: Chunk) -> None:
        """S += that of a chunk."""
        K, D = self.problem.n_components, self.samples.D
        _kernel("diag statistics", self.problem.arithmetic).launch(
            (K, D + 1, chunk.parts), THREADS,
            self.z, self.means, self.posterior.view, self.partial, D, chunk.width, chunk.width // chunk.parts,
        )  # fmt: skip
        self.posterior.add(chunk, self.partial, K * (2 * D + 1))


class _Full:
    """P_k a triangular matrix: S_k is the lower triangle of Σ ω r y yᵀ with y = (z − μ_k, 1)."""

    def __init__(self, samples: Samples, problem: DirectProblem, results: Results) -> None:
        self.samples, self.problem = samples, problem
        K, D = problem.n_components, samples.D
        self.columns = products.rows_of_a_chunk(samples, 3 * D + 2 + K, D, problem.arithmetic)
        self.posterior = Posterior(samples, K, self.columns, problem.hard, results, problem.arithmetic)
        like, parts = self.posterior.logits, products.parts_of(self.columns)
        self.z, self.centred, self.scaled = (like.new_empty(rows * self.columns) for rows in (D, D + 1, D + 1))
        self.partial = like.new_empty(1 if results.sums is None else parts * (D + 1) ** 2)
        self.z_view, self.y_view, self.partial_view, self.constants = (
            device.view(each) for each in (self.z, self.scaled, self.partial, problem.log_constants)
        )
        self.sums = samples.nothing if results.sums is None else device.view(results.sums.statistics)

    def logits(self, chunk: Chunk) -> None:
        """L of a chunk."""
        problem, (D, width) = self.problem, (self.samples.D, chunk.width)
        self.samples.into_frame(chunk, self.z_view)
        y = self.scaled[: D * width].view(D, width)
        threads = COLUMN_STEP
        for k in range(problem.n_components):
            # L_k = c_k − ½ ‖y‖², y = P_kᵀ (z − μ_k)
            centred = self._centre(k, width)
            torch.matmul(problem.factors[min(k, len(problem.factors) - 1)].T, centred[:D], out=y)
            _kernel("full logits", problem.arithmetic).launch(
                width // threads, threads, self.y_view, self.constants, self.posterior.view, k, D, width
            )

    def statistics(self, chunk: Chunk) -> None:
        """S += that of a chunk."""
        width, parts, size = chunk.width, chunk.parts, self.samples.D + 1
        r = self.posterior.logits[: self.problem.n_components * width].view(-1, width)
        scaled = self.scaled[: size * width].view(size, width)
        partial = self.partial[: parts * size * size].view(parts, size, size)
        self.centred[(size - 1) * width : size * width].fill_(1)
        threads = COLUMN_STEP
        for k in range(self.problem.n_components):
            # Σ ω r y yᵀ, y = (z − μ_k, 1), part by part
            y = self._centre(k, width)
            torch.mul(y, r[k], out=scaled)
            left, right = (each.view(size, parts, -1).transpose(0, 1) for each in (scaled, y))
            torch.bmm(left, right.transpose(1, 2), out=partial)
            _triangle_kernel(self.problem.arithmetic).launch(
                (-(-size // threads), size), threads, self.partial_view, self.sums, k, size, parts
            )
        self.posterior.add(chunk, self.samples.nothing, 0)

    def _centre(self, k: int, width: int) -> torch.Tensor:
        """z − μ_k, (D + 1, width); the last row stays what it is."""
        D = self.samples.D
        centred = self.centred[: (D + 1) * width].view(D + 1, width)
        torch.sub(self.z[: D * width].view(D, width), self.problem.means[k, :, None], out=centred[:D])
        return centred


FORMS: Final[dict[str, type[_Diag] | type[_Full]]] = {"full": _Full, "diag": _Diag}


def run(x: torch.Tensor, weight: torch.Tensor | None, problem: DirectProblem, results: Results) -> None:
    """One pass over rows on the device, which is the current one of torch and Numba.

    Parameters
    ----------
    x, weight, results
        As in `products.run`.
    problem : DirectProblem
    """
    if len(x) == 0:
        return
    form = FORMS[problem.feature_map](Samples(x, weight, problem.frame, problem.arithmetic), problem, results)
    with torch.no_grad(), device.float32_products(tf32=False):
        for chunk in products.chunks(len(x), form.columns):
            form.logits(chunk)
            form.posterior.of(chunk)
            if results.sums is not None:
                form.statistics(chunk)
