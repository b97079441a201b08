"""The E-step and its statistics on a GPU: see `emalgam_kernels.reference.mixture` for what is computed.

Tensors on the device (and results with them) stay where they are, on torch's current stream, and nothing waits for the
device unless a result is wanted on the host. NumPy arrays cross the bus in pieces. Packed parameters go to the fused
kernel or to matrix products, whichever `crossover` says; direct ones have a way of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from emalgam_kernels import contract
from emalgam_kernels.blocks import tile_dtype
from emalgam_kernels.numba_cuda import crossover, direct, fused, products
from emalgam_kernels.numba_cuda.device import (
    ARRAYS,
    REALS,
    default_device,
    explained,
    free_bytes,
    is_tensor,
    most_shared_bytes,
    on,
    require_on_device,
    require_one_place,
    upload,
)
from emalgam_kernels.numba_cuda.problem import DirectProblem, Frame, PackedProblem, Results, Sums
from emalgam_kernels.numba_cuda.staging import Inbound, Outbound, rows_of_a_piece
from emalgam_kernels.parameters import Direct, Packed

ROWS_AT_ONCE: Final = 2**24  # where a type has to be converted: what that takes does not grow with N
SHARE_FOR_DATA: Final = 0.5  # of the free memory; larger data cross the bus in every pass


def log_prob(x: np.ndarray, parameters: Packed | Direct, out: np.ndarray, n_threads: int = 1) -> None:
    """log p(x_n); see `emalgam_kernels.reference.mixture.log_prob`.

    `x` and `out` are NumPy arrays, or both tensors on the device. `n_threads` copy NumPy arrays into pinned memory.
    """
    contract.log_prob(x, parameters, out, kinds=ARRAYS)
    require_one_place(x, out)
    Pass(x, parameters).run(None, log_prob=out, n_threads=n_threads)


def responsibilities(
    x: np.ndarray,
    parameters: Packed | Direct,
    out: np.ndarray,
    n_threads: int = 1,
    log_prob: np.ndarray | None = None,
) -> None:
    """r_nk; see `emalgam_kernels.reference.mixture.responsibilities` and `log_prob`."""
    contract.responsibilities(x, parameters, out, log_prob, kinds=ARRAYS)
    require_one_place(x, out, log_prob)
    Pass(x, parameters).run(None, log_prob=log_prob, responsibilities=out, n_threads=n_threads)


def em_statistics(
    x: np.ndarray,
    sample_weight: np.ndarray | None,
    parameters: Packed | Direct,
    out: np.ndarray,
    hard: bool = False,
    n_threads: int = 1,
) -> float:
    """S and Σ ω log p; see `emalgam_kernels.reference.mixture.em_statistics` and `log_prob`.

    With `out` on the device the sum is a float64 tensor () there, and nothing waits for the device.
    """
    contract.em_statistics(x, sample_weight, parameters, out, kinds=ARRAYS)
    require_one_place(x, sample_weight)
    require_on_device(x, out)
    whole = Pass(x, parameters, hard)
    shape = parameters.n_components, parameters.n_statistics
    with explained("the statistics"):
        sums = Sums(*(torch.zeros(size, dtype=torch.float64, device=whole.device) for size in (shape, (1,))))
    whole.run(sample_weight, sums=sums, n_threads=n_threads)
    place: Any = out
    if is_tensor(place):
        place.copy_(sums.statistics)
        on_device: Any = sums.total[0]
        return on_device
    place[...] = sums.statistics.cpu().numpy()
    return float(sums.total)


def resident(x: Any, sample_weight: Any, n_threads: int = 1) -> tuple[Any, Any]:
    """`x` and its weights as tensors on the device, or both as they are if they would take half of its free memory.

    What is on the device stays where it is.
    """
    if isinstance(x, torch.Tensor):
        return x, sample_weight
    device = default_device()
    with on(device), explained("the data"):
        n_bytes = len(x) * (x.shape[1] * tile_dtype(x).itemsize + 8)
        if n_bytes > SHARE_FOR_DATA * free_bytes(device):
            return x, sample_weight
        moved: list[torch.Tensor | None] = []
        for array in (x, sample_weight):
            if array is None:
                moved.append(None)
                continue
            inbound = Inbound(array, rows_of_a_piece(tile_dtype(x).itemsize * x.shape[1]), device, n_threads)
            whole = torch.empty(array.shape, dtype=inbound.dtype, device=device)
            first = 0
            for piece in inbound.pieces():
                whole[first : first + len(piece)] = piece
                first += len(piece)
            moved.append(whole)
    return moved[0], moved[1]


class Pass:
    """One pass over x, wherever it lies."""

    def __init__(self, x: np.ndarray | torch.Tensor, parameters: Packed | Direct, hard: bool = False) -> None:
        self.x, self.parameters = x, parameters
        self.device = x.device if isinstance(x, torch.Tensor) else default_device()
        with on(self.device), explained("the parameters"):
            self.problem = problem_of(parameters, self.device, hard)

    def run(
        self,
        sample_weight: Any,
        log_prob: Any = None,
        responsibilities: Any = None,
        sums: Sums | None = None,
        n_threads: int = 1,
    ) -> None:
        """The results of all rows; those without a place are not wanted."""
        results = Results(log_prob, responsibilities, sums)
        with on(self.device), explained("a pass over the data"):
            if isinstance(self.x, torch.Tensor):
                self._in_place(self.x, sample_weight, results)
            else:
                self._in_pieces(self.x, sample_weight, results, n_threads)

    def _in_place(self, x: torch.Tensor, weight: torch.Tensor | None, results: Results) -> None:
        """Data on the device: all rows at once, or some at a time where a type has to be converted."""
        for rows in self._slices(x, weight, results):
            part, problem = self._read(x[rows])
            omega = None if weight is None else weight[rows].to(REALS[problem.arithmetic]).contiguous()
            log_p, log_p_place = self._place(results.log_prob, rows, problem.arithmetic)
            r, r_place = self._place(results.responsibilities, rows, problem.arithmetic)
            run(part, omega, problem, replace(results, log_prob=log_p, responsibilities=r))
            for result, place in ((log_p, log_p_place), (r, r_place)):
                if result is not None and place is not None and place is not result:
                    place.copy_(result)

    def _in_pieces(self, x: np.ndarray, weight: np.ndarray | None, results: Results, n_threads: int) -> None:
        """Data in main memory, across the bus."""
        K, D = self.problem.n_components, x.shape[1]
        width = D + (K if results.responsibilities is not None else 0)
        rows = rows_of_a_piece(tile_dtype(x).itemsize * width)
        weights = iter(()) if weight is None else Inbound(weight, rows, self.device, n_threads).pieces()
        places = {"log_prob": results.log_prob, "responsibilities": results.responsibilities}
        out = {
            name: Outbound(place, rows, self.device, n_threads) for name, place in places.items() if place is not None
        }
        first = 0
        for piece in Inbound(x, rows, self.device, n_threads).pieces():
            part, problem = self._read(piece)
            real, n = REALS[problem.arithmetic], len(piece)
            omega = None if weight is None else next(weights).to(real)
            found = {
                name: torch.empty((n, *place.shape[1:]), dtype=real, device=self.device)
                for name, place in places.items()
                if place is not None
            }
            run(part, omega, problem, replace(results, **{**dict.fromkeys(places), **found}))
            for name, result in found.items():
                out[name].put(first, result)
            first += n
        for each in out.values():
            each.finish()

    def _slices(self, x: torch.Tensor, weight: torch.Tensor | None, results: Results) -> Iterator[slice]:
        real = REALS[self.problem.arithmetic]
        as_they_are = x.dtype in (real, torch.float32) and all(
            tensor is None or tensor.dtype == real for tensor in (weight, results.log_prob, results.responsibilities)
        )
        step = max(len(x), 1) if as_they_are else ROWS_AT_ONCE
        return (slice(first, min(first + step, len(x))) for first in range(0, len(x), step))

    def _read(self, rows: torch.Tensor) -> tuple[torch.Tensor, PackedProblem | DirectProblem]:
        """Rows in a type that the kernels read, and the problem in the frame they are then in."""
        real = REALS[self.problem.arithmetic]
        if rows.dtype in (real, torch.float32):
            return rows, self.problem
        rows = rows.to(torch.float64)
        if real == torch.float64:
            return rows, self.problem
        # float64 rows in float32 arithmetic: out of their frame in float64, or they would lose digits.
        parts = (self.parameters.shift, self.parameters.scale)
        shift, scale = (as_tensor(part, torch.float64, self.device) for part in parts)
        frame = self.problem.frame
        identity = Frame(torch.zeros_like(frame.shift), torch.ones_like(frame.scale))
        return ((rows - shift) * scale).to(real), replace(self.problem, frame=identity)

    @staticmethod
    def _place(out: Any, rows: slice, arithmetic: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where the kernels write a result, and where it belongs: the same memory if type and layout allow it."""
        if out is None:
            return None, None
        place: torch.Tensor = out[rows]
        real = REALS[arithmetic]
        same = place.dtype == real and place.is_contiguous()
        return place if same else torch.empty(place.shape, dtype=real, device=place.device), place


def run(x: torch.Tensor, weight: torch.Tensor | None, problem: PackedProblem | DirectProblem, results: Results) -> None:
    """One pass over rows on the device, the way that suits the problem; TF32 is a matter of cuBLAS's products."""
    if isinstance(problem, DirectProblem):
        direct.run(x, weight, problem, results)
        return
    K, F, D = problem.n_components, problem.n_statistics, x.shape[1]
    suits = suits_fused(D, K, F, problem.arithmetic, problem.whitening is not None, x.device)
    if suits and not problem.tf32:
        fused.run(x, weight, problem, results)
    else:
        products.run(x, weight, problem, results)


def suits_fused(D: int, K: int, F: int, arithmetic: str, whitened: bool, device: torch.device) -> bool:
    """Whether the fused kernel fits a device, and is not known to be the slower way."""
    way = fused.plan(D, K, F, arithmetic, whitened, most_shared_bytes(device))
    return way is not None and crossover.fused_is_faster(F, K, arithmetic, way.busy)


def as_tensor(array: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A parameter on the device in the type it is wanted in."""
    if isinstance(array, torch.Tensor):
        return array.to(device=device, dtype=dtype).contiguous()
    return upload(array, dtype, device)


def problem_of(parameters: Packed | Direct, device: torch.device, hard: bool = False) -> PackedProblem | DirectProblem:
    """Parameters of either kind, from the host or from the device."""
    arithmetic = "float32" if parameters.arithmetic == "tf32" else parameters.arithmetic
    real = REALS[arithmetic]
    shift = as_tensor(parameters.shift, torch.float64, device)
    high = shift.to(real)
    low = (shift - high.to(torch.float64)).to(real)
    frame = Frame(torch.stack([high, low]), as_tensor(parameters.scale, real, device))
    if isinstance(parameters, Packed):
        whitening = None if parameters.whitening is None else as_tensor(parameters.whitening, real, device)
        natural = as_tensor(parameters.natural, real, device)
        tf32 = parameters.arithmetic == "tf32"
        return PackedProblem(parameters.feature_map, arithmetic, tf32, frame, whitening, natural, hard)
    factors: Any = parameters.precisions_cholesky
    shared = factors.ndim == 3 and (factors.stride(0) if isinstance(factors, torch.Tensor) else factors.strides[0]) == 0
    return DirectProblem(
        parameters.feature_map,
        arithmetic,
        frame,
        as_tensor(parameters.means, real, device),
        as_tensor(factors[:1] if shared else factors, real, device),
        as_tensor(parameters.log_constants, real, device),
        hard,
    )
