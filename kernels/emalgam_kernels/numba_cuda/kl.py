"""Divergences of Gaussians on a GPU: see `emalgam_kernels.reference.kl` for what is computed.

Tensors on the device (and results with them) stay where they are, on torch's current stream, strides along M included.
NumPy arrays cross the bus in pieces. `kl_pairs` never waits for the device; `kl_all_pairs` does once for each tile of
the result, to learn how many pairs its guard has rejected, and `precision_factors` and `check_covariances` once, for
what they return.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np
import torch

from emalgam_kernels import contract
from emalgam_kernels.kl_blocks import shift_of
from emalgam_kernels.numba_cuda import device, staging
from emalgam_kernels.numba_cuda.device import (
    ARRAYS,
    REALS,
    SHARED_BYTES,
    is_tensor,
    on,
    require_on_device,
    require_one_place,
    upload,
    view,
)
from emalgam_kernels.numba_cuda.kl_kernels import (
    ABSENT,
    THREADS,
    WARP,
    Size,
    expectation_kernel,
    factor_kernel,
    feature_count,
    guard_kernel,
    natural_kernel,
    numbers_of_a_thread,
    pair_kernel,
)
from emalgam_kernels.numba_cuda.staging import Outbound, rows_of_a_piece
from emalgam_kernels.numba_cuda.staging import pieces as pieces_of_memory
from emalgam_kernels.parameters import Gaussians

SHARED: int = SHARED_BYTES  # that a block's matrices may take
SCRATCH_IN_CACHE: int = 32 * 2**20  # L2 holds 40 MB on an A100, 50 MB on an H100
WARPS_AT_ONCE: Final = 2  # of a multiprocessor at least, even if their scratch is more than L2 holds
MOST_SCRATCH: Final = 512 * 2**20
PAIRS_AT_ONCE: int = 2**20  # on the device: what kernels allocate does not grow with M
TILE: int = 4096  # rows and columns of all pairs that are multiplied at once
TILE_BYTES: int = 512 * 2**20  # that one side of a tile may take in Gaussians and features
NONE: Final = torch.iinfo(torch.int64).max  # the number of the first that failed, where none has


def precision_factors(covariances: np.ndarray, out: np.ndarray, n_threads: int = 1) -> int:
    """P_m; see `emalgam_kernels.reference.kl.precision_factors`.

    `covariances` and `out` are NumPy arrays, or both tensors on the device. `n_threads` copy NumPy arrays into pinned
    memory.
    """
    require_one_place(covariances, out)  # or the contract would speak of their dtypes
    contract.precision_factors(covariances, out, kinds=ARRAYS)
    here = is_tensor(out)
    with _at(covariances) as place, device.explained("the precision factors"):
        first = torch.full((), NONE, device=place)
        rows = _rows_at_once((covariances, out))
        target = None if here else Outbound(out, rows, place, n_threads)
        for start, piece in zip(count(0, rows), pieces_of_memory(covariances, rows, place, n_threads)):
            P: Any = out[start : start + len(piece)] if here else piece.new_empty(piece.shape)
            first = _first(first, _factorize(piece, P), start)
            if target is not None:
                target.put(start, P)
        if target is not None:
            target.finish()
        found = int(first)
    return -1 if found == NONE else found


def check_covariances(covariances: np.ndarray, n_threads: int = 1) -> int:
    """The first that is none; see `emalgam_kernels.reference.kl.check_covariances`.

    `covariances` are a NumPy array or a tensor on the device. `n_threads` copy NumPy arrays into pinned memory.
    """
    contract.check_covariances(covariances, kinds=ARRAYS)
    require_on_device(covariances)
    with _at(covariances) as place, device.explained("the check of covariances"):
        first, rows = torch.full((), NONE, device=place), _rows_at_once((covariances,))
        for start, piece in zip(count(0, rows), pieces_of_memory(covariances, rows, place, n_threads)):
            first = _first(first, _factorize(piece), start)
        found = int(first)
    return -1 if found == NONE else found


def kl_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_m ‖ q_m); see `emalgam_kernels.reference.kl.kl_pairs`.

    Everything is NumPy arrays, or everything tensors on the device. `n_threads` copy NumPy arrays into pinned memory.
    """
    _require_one_place(p, q, out)
    contract.kl_pairs(p, q, out, kinds=ARRAYS)
    with _at(p.means) as place, device.explained("the divergences"):
        rows = _rows_at_once((*_arrays(p), *_arrays(q)))
        target = staging.target(out, rows, place, n_threads)
        stacks = (_stacks(each, rows, place, n_threads) for each in (p, q))
        for start, left, right in zip(count(0, rows), *stacks):
            divergence = left.empty(len(left))
            _compute(left, right, divergence)
            target.put(start, divergence)
        target.finish()


def kl_all_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_i ‖ q_j); see `emalgam_kernels.reference.kl.kl_all_pairs` and `kl_pairs`.

    In tiles of the result. A q in main memory that is longer than a tile crosses the bus again for each row of tiles.
    """
    _require_one_place(p, q, out)
    contract.kl_all_pairs(p, q, out, kinds=ARRAYS)
    if 0 in out.shape:
        return
    with _at(p.means) as place, device.explained("all pairs"):
        shift, rows = _shift(p, q, place), _rows_of_a_tile(p)
        q = q if len(q) > rows else _uploaded(q, place)
        for row, left in zip(count(0, rows), _stacks(p, rows, place, n_threads)):
            expectations, negative_entropy = _expectations(left, shift)
            for column, right in zip(count(0, rows), _stacks(q, rows, place, n_threads)):
                tile = _tile(left, right, expectations, negative_entropy, shift)
                height, width = tile.shape
                step = height if is_tensor(out) else rows_of_a_piece(width * tile.itemsize)
                target = staging.target(out[row : row + height, column : column + width], step, place, n_threads)
                for first in range(0, height, step):
                    target.put(first, tile[first : first + step])
                target.finish()


def _require_one_place(p: Any, q: Any, out: Any) -> None:
    """TypeError as of `require_one_place`; before the contract, which would speak of dtypes, and refuses all else."""
    require_one_place(*(each.means for each in (p, q) if isinstance(each, Gaussians)), out)


# ---- stacks on the device


class _Stack:
    """Some Gaussians on the device, as the kernels take them; `given`: they came with P."""

    def __init__(self, covariance_type: str, arrays: tuple[torch.Tensor, ...]) -> None:
        self.covariance_type, self.means, self.given = covariance_type, arrays[0], len(arrays) == 3
        views, strides = [view(device.span(array)) for array in arrays], [array.stride(0) for array in arrays]
        factors, factor_stride = (
            (views[2], strides[2]) if self.given else (views[1], ABSENT)
        )  # any view: it is not read
        self.views = *views[:2], factors
        self.strides = strides[0], strides[1], factor_stride
        self.D = int(self.means.shape[1])
        self.arithmetic = str(self.means.dtype).removeprefix("torch.")

    def __len__(self) -> int:
        return len(self.means)

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for numbers of the arithmetic dtype."""
        return self.means.new_empty(shape)


def _arrays(gaussians: Gaussians) -> tuple[Any, ...]:
    """Means, covariances, and P if there are."""
    arrays = gaussians.means, gaussians.covariances, gaussians.precisions_cholesky
    return arrays if arrays[2] is not None else arrays[:2]


def _stacks(gaussians: Gaussians, rows: int, place: torch.device, n_threads: int) -> Iterator[_Stack]:
    """A stack of any length, `rows` Gaussians at a time."""
    pieces = (pieces_of_memory(array, rows, place, n_threads) for array in _arrays(gaussians))
    for arrays in zip(*pieces, strict=True):
        yield _Stack(gaussians.covariance_type, arrays)


def _uploaded(gaussians: Gaussians, place: torch.device) -> Gaussians:
    """A stack that is short enough, on the device for good."""
    arrays: list[Any] = [next(pieces_of_memory(array, len(array), place, 1)) for array in _arrays(gaussians)]
    return Gaussians(gaussians.covariance_type, *arrays)


@contextmanager
def _at(array: Any) -> Iterator[torch.device]:
    """Compute where `array` lies, or on the device that NumPy arrays are sent to."""
    place = array.device if is_tensor(array) else device.default_device()
    with on(place), torch.no_grad():
        yield place


def _rows_at_once(arrays: tuple[Any, ...]) -> int:
    """How many of a stack are a piece."""
    if all(map(is_tensor, arrays)):
        return PAIRS_AT_ONCE
    return rows_of_a_piece(sum(array.itemsize * int(np.prod(array.shape[1:])) for array in arrays))


# ---- pairs, and P


@dataclass(frozen=True, eq=False)
class _Room:
    """Where the threads of a launch have their matrices.

    Attributes
    ----------
    threads : int
        Of a block.
    at_once : int
        Threads of a launch at most.
    shared_bytes : int
        Of a block; 0: the matrices are in `scratch`.
    scratch : view of (at_once numbers of a thread,)
    """

    threads: int
    at_once: int
    shared_bytes: int
    scratch: Any

    @classmethod
    def of(cls, like: torch.Tensor, D: int, n: int) -> _Room:
        """For n matrices of the dtype of `like`: shared memory if the matrices of a warp fit."""
        n_bytes = numbers_of_a_thread(D) * like.itemsize
        threads = min(THREADS, SHARED // n_bytes // WARP * WARP)
        if threads:
            return cls(threads, n, threads * n_bytes, view(like.new_empty(1)))
        enough = WARPS_AT_ONCE * WARP * device.multiprocessors(like.device)
        at_once = max(SCRATCH_IN_CACHE // n_bytes, min(enough, MOST_SCRATCH // n_bytes), 1)
        at_once = min(at_once, n)
        return cls(WARP, at_once, 0, view(like.new_empty(at_once * numbers_of_a_thread(D))))

    @property
    def in_shared(self) -> bool:
        """Whether the kernels for shared memory are to run."""
        return self.shared_bytes > 0

    def launches(self, n: int) -> Iterator[tuple[int, int, int]]:
        """First matrix, how many, and blocks, of each launch."""
        for first in range(0, n, self.at_once):
            some = min(self.at_once, n - first)
            yield first, some, -(-some // self.threads)


def _compute(p: _Stack, q: _Stack, out: torch.Tensor, index: torch.Tensor | None = None) -> None:
    """out_m ← KL(p_m ‖ q_m), or out_ij ← KL(p_i ‖ q_j) for rows (i, j) of `index`; out is contiguous."""
    n = len(out) if index is None else len(index)
    full = p.covariance_type == "full"
    room = _Room.of(p.means, p.D, n) if full else _Room(THREADS, n, 0, view(p.empty(1)))
    kernel = pair_kernel(p.covariance_type, p.arithmetic, room.in_shared, not full or (p.given and q.given))
    row, column = (1, 0) if index is None else out.stride()
    chosen = view(torch.empty(1, dtype=torch.int64, device=out.device) if index is None else index)
    target = view(out)
    for first, some, blocks in room.launches(n):
        size = Size(*p.strides, *q.strides, p.D, first, some, int(index is not None), row, column, room.at_once)
        kernel.launch(
            blocks, room.threads, *p.views, *q.views, chosen, room.scratch, target, size,
            shared_bytes=room.shared_bytes,
        )  # fmt: skip


def _factorize(covariances: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """out ← P of each; returns (M,) uint8: 1 if not positive definite, and without `out` also if not symmetric."""
    M, D = covariances.shape[:2]
    failed = torch.empty(M, dtype=torch.uint8, device=covariances.device)
    room = _Room.of(covariances, D, M)
    kernel = factor_kernel(str(covariances.dtype).removeprefix("torch."), room.in_shared)
    target, out_stride = (room.scratch, ABSENT) if out is None else (view(device.span(out)), out.stride(0))
    arrays = view(device.span(covariances)), room.scratch, target, view(failed)
    for first, some, blocks in room.launches(M):
        kernel.launch(
            blocks, room.threads, *arrays, D, covariances.stride(0), out_stride, first, some, room.at_once,
            shared_bytes=room.shared_bytes,
        )  # fmt: skip
    return failed


def _first(before: torch.Tensor, failed: torch.Tensor, start: int) -> torch.Tensor:
    """The lowest of `before` and the numbers of those that failed of a piece from `start` on, on the device."""
    numbers = torch.arange(start, start + len(failed), device=failed.device)
    return torch.minimum(before, numbers.masked_fill(~failed.bool(), NONE).min())


# ---- all pairs


def _shift(p: Gaussians, q: Gaussians, place: torch.device) -> torch.Tensor:
    """The mean of all means: see `emalgam_kernels.kl_blocks.shift_of`."""
    means: tuple[Any, ...] = p.means, q.means
    if not is_tensor(means[0]):
        return upload(shift_of(p, q), REALS[means[0].dtype.name], place)
    total = sum(each.sum(0, dtype=torch.float64) for each in means)
    return (total / (len(p) + len(q))).to(means[0].dtype)


def _rows_of_a_tile(p: Gaussians) -> int:
    """Rows and columns of a tile: fewer than `TILE` where many features would make it too large."""
    numbers = sum(int(np.prod(array.shape[1:])) for array in _arrays(p))
    numbers += feature_count(p.covariance_type, p.n_features) + p.n_features + 2
    return max(min(TILE, TILE_BYTES // (numbers * p.means.itemsize)), 1)


def _expectations(p: _Stack, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E_p φ and what B takes of p, (F + D + 2, M), and −H_p up to a constant, (M,)."""
    F, D, M = feature_count(p.covariance_type, p.D), p.D, len(p)
    features, negative_entropy = p.empty(F + D + 2, M), p.empty(M)
    expectation_kernel(p.covariance_type, p.arithmetic).launch(
        (-(-M // THREADS), D + 1), THREADS,
        *p.views, view(shift), view(features), view(negative_entropy), M, D, F, *p.strides,
    )  # fmt: skip
    return features, negative_entropy


def _naturals(q: _Stack, shift: torch.Tensor) -> torch.Tensor:
    """−η_q and what B takes of q, (F + D + 2, M)."""
    F, D, M = feature_count(q.covariance_type, q.D), q.D, len(q)
    features = q.empty(F + D + 2, M)
    means, _, factors = q.views
    natural_kernel(q.covariance_type, q.arithmetic).launch(
        (-(-M // THREADS), D + 1 if q.covariance_type == "full" else 1), THREADS,
        means, factors, view(shift), view(features), M, D, F, q.strides[0], q.strides[2],
    )  # fmt: skip
    return features


def _tile(
    p: _Stack, q: _Stack, expectations: torch.Tensor, negative_entropy: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """KL(p_i ‖ q_j), (M₁, M₂) of the arithmetic dtype."""
    F, naturals = feature_count(p.covariance_type, p.D), _naturals(q, shift)
    with device.float32_products(tf32=False):
        # −⟨η_q, E_p φ⟩, and B
        divergence = torch.mm(expectations[:F].T, naturals[:F])
        sizes = torch.mm(expectations[F:].T, naturals[F:])
    rejected = torch.empty(divergence.shape, dtype=torch.uint8, device=divergence.device)
    guard_kernel(p.arithmetic).launch(
        (-(-len(q) // THREADS), len(p)), THREADS,
        view(divergence), view(sizes), view(negative_entropy), view(rejected), len(q),
    )  # fmt: skip
    # Waits for the device: memory and launches depend on how many there are.
    again = rejected.nonzero().contiguous()
    if len(again):
        _compute(p, q, divergence, again)
    return divergence
