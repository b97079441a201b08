"""Log-densities of the mixtures of a stack at samples of their own, all in one launch: for `kl_monte_carlo`.

A pass of `mixture` fills the device with the rows of one data set. A stack of pairs with a few samples each would leave
it idle, and wait for a launch each; here the grid is rows × pairs, and a thread takes one row: z in shared memory, in
columns of its own, then the components one after the other. What a mixture needs lies in one piece::

    shift, what shift lost in float32, scale (D each)   whitening (D, D) if there is one
    packed: η (K, F)   direct: μ (K, D), P (K or 1, D, D) or its diagonals (K, D), c (K)

Loops stay Numba's ranges, see `kl_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numba import cuda

from emalgam_kernels.numba_cuda.device import (
    NUMBA_REALS,
    REALS,
    Kernel,
    at,
    flat,
    inlined,
    integers_of,
    log,
    upload,
    view,
)
from emalgam_kernels.numba_cuda.device import threads_per_block as at_most
from emalgam_kernels.numba_cuda.fused import ALIGNMENT, framed
from emalgam_kernels.parameters import Direct, Packed

THREADS: Final = at_most(64)
MOST_FEATURES: Final = 32  # z and zW of a block in 32 KB; wider samples have enough work for a launch of their own
PACKED_FULL, PACKED_DIAG, PACKED_SPHERICAL, DIRECT_FULL, DIRECT_DIAG = range(5)
FORMS: Final = {
    (Packed, "full"): PACKED_FULL,
    (Packed, "diag"): PACKED_DIAG,
    (Packed, "spherical"): PACKED_SPHERICAL,
    (Direct, "full"): DIRECT_FULL,
    (Direct, "diag"): DIRECT_DIAG,
}


class Density(NamedTuple):
    """The integers of a launch: `length` numbers describe a mixture; `component`: from P_k to P_k+1, 0 if shared."""

    form: int
    rows: int
    D: int
    K: int
    F: int
    length: int
    whitened: int
    component: int


# ---- kernels


@inlined
def _packed_full(z: Any, own: int, parameters: Any, place: int, size: Density) -> Any:
    """Σ_i z_i (λ_i + Σ_j≤i η_ij z_j) + c."""
    linear, threads = place + ((size.D * (size.D + 1)) >> 1), cuda.blockDim.x
    total = parameters[at(linear + size.D)]
    for i in range(size.D):
        term = parameters[at(linear + i)]
        for j in range(i + 1):
            term += parameters[at(place + j)] * z[at(own + j * threads)]
        total += term * z[at(own + i * threads)]
        place += i + 1
    return total


@inlined
def _packed_diag(z: Any, own: int, parameters: Any, place: int, size: Density) -> Any:
    """Σ_i (η_i z_i + λ_i) z_i + c; spherical: one η for all i."""
    step = 1 if size.form == PACKED_DIAG else 0
    linear = place + (size.D if size.form == PACKED_DIAG else 1)
    total = parameters[at(linear + size.D)]
    for i in range(size.D):
        z_i = z[at(own + i * cuda.blockDim.x)]
        total += (parameters[at(place + i * step)] * z_i + parameters[at(linear + i)]) * z_i
    return total


def _direct(arithmetic: str) -> Any:
    """The function that computes c_k − ½ ‖P_kᵀ (z − μ_k)‖²."""
    real = NUMBA_REALS[arithmetic]
    zero, half = real(0), real(0.5)

    def direct(z: Any, own: int, parameters: Any, place: int, k: int, size: Density) -> Any:
        D, threads = size.D, cuda.blockDim.x
        mean, factor = place + k * D, place + size.K * D + k * size.component
        distance = zero
        for j in range(D):
            if size.form == DIRECT_FULL:
                y = zero
                for i in range(j + 1):
                    y += parameters[at(factor + i * D + j)] * (z[at(own + i * threads)] - parameters[at(mean + i)])
            else:
                y = parameters[at(factor + j)] * (z[at(own + j * threads)] - parameters[at(mean + j)])
            distance += y * y
        constant = parameters[at(size.length * (cuda.blockIdx.y + 1) - size.K + k)]
        return constant - half * distance

    return inlined(direct)


def _log_densities(arithmetic: str) -> Callable[..., None]:
    real, direct = NUMBA_REALS[arithmetic], _direct(arithmetic)
    zero, one, lowest = real(0), real(1), real(-math.inf)

    def log_densities(x: Any, parameters: Any, logs: Any, size: Density) -> None:
        """log p of a row of x (pairs, rows, D) under the mixture of its pair; thread: one row, block y: a pair."""
        z = cuda.shared.array(0, real, alignment=ALIGNMENT)
        own, threads, D = cuda.threadIdx.x, cuda.blockDim.x, size.D
        n = cuda.blockIdx.x * threads + own
        if n >= size.rows:
            return
        row = cuda.blockIdx.y * size.rows + n
        place = cuda.blockIdx.y * size.length
        for d in range(D):
            shift, scale = parameters[at(place + d)], parameters[at(place + 2 * D + d)]
            z[at(own + d * threads)] = framed(x[at(row * D + d)], shift, parameters[at(place + D + d)], scale)
        place += 3 * D
        if size.whitened:
            # z̃_j = Σ_i z_i W_ij, behind z
            for j in range(D):
                total = zero
                for i in range(D):
                    total += z[at(own + i * threads)] * parameters[at(place + i * D + j)]
                z[at(own + (D + j) * threads)] = total
            own, place = own + D * threads, place + D * D
        # log Σ_k exp(L_k), the largest term so far taken out
        top, rest = lowest, zero
        for k in range(size.K):
            if size.form == PACKED_FULL:
                logit = _packed_full(z, own, parameters, place + k * size.F, size)
            elif size.form <= PACKED_SPHERICAL:
                logit = _packed_diag(z, own, parameters, place + k * size.F, size)
            else:
                logit = direct(z, own, parameters, place, k, size)
            if logit > top:
                rest = rest * real(math.exp(top - logit)) + one
                top = logit
            elif logit != lowest:
                rest += real(math.exp(logit - top))
        logs[at(row)] = top + real(log(rest))

    return log_densities


@cache
def density_kernel(arithmetic: str) -> Kernel:
    """Log-densities of a stack; samples have the arithmetic's type."""
    real = flat(NUMBA_REALS[arithmetic])
    signature = (real, real, real, integers_of(Density))
    return Kernel(f"log-densities of a stack, {arithmetic}", arithmetic, _log_densities(arithmetic), signature, THREADS)


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    return [density_kernel(arithmetic) for arithmetic in REALS]


# ---- the host's side


class StackedDensity:
    """A stack of mixtures on the device.

    Parameters
    ----------
    parameters : Packed or Direct
        A stack of B.
    x : (B, rows, D) contiguous
        Samples of each, of the arithmetic's type.
    """

    def __init__(self, parameters: Packed | Direct, x: torch.Tensor) -> None:
        dtype, (_, rows, D) = x.dtype, x.shape
        numbers, component = _numbers(parameters, np.empty(0, str(dtype).removeprefix("torch.")).dtype)
        whitened = isinstance(parameters, Packed) and parameters.whitening is not None
        self.x, self.numbers = view(x), view(upload(numbers, dtype, x.device))
        self.kernel = density_kernel(str(dtype).removeprefix("torch."))
        self.grid = -(-rows // THREADS), len(numbers)
        self.shared_bytes = (2 if whitened else 1) * D * THREADS * dtype.itemsize
        self.size = Density(
            form=FORMS[type(parameters), parameters.feature_map], rows=rows, D=D, K=parameters.n_components,
            F=parameters.n_statistics, length=numbers.shape[1], whitened=int(whitened), component=component,
        )  # fmt: skip

    def log_prob(self, out: torch.Tensor) -> None:
        """log p of all samples, (B · rows,)."""
        self.kernel.launch(
            self.grid, THREADS, self.x, self.numbers, view(out), self.size, shared_bytes=self.shared_bytes
        )


def _numbers(parameters: Packed | Direct, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """What the kernel reads of each mixture, (B, length), and how far P_k+1 is from P_k."""
    high = parameters.shift.astype(dtype)
    parts, component = [high, parameters.shift - high, parameters.scale], 0
    if isinstance(parameters, Packed):
        parts += [parameters.natural] if parameters.whitening is None else [parameters.whitening, parameters.natural]
    else:
        factors = parameters.precisions_cholesky
        shared = factors.ndim == 4 and factors.strides[1] == 0
        component = 0 if shared else math.prod(factors.shape[2:])
        parts += [parameters.means, factors[:, :1] if shared else factors, parameters.log_constants]
    return np.concatenate([part.reshape(len(high), -1) for part in parts], axis=1, dtype=dtype), component
