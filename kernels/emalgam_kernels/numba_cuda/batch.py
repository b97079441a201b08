"""Many fits at once on a GPU: the host's side of `batch_kernels`.

The functions are specified in `emalgam_kernels.reference.batch`. Samples on the device (then `order` and
`sample_weight` may be there or on the host) are used where they lie, on torch's current stream. NumPy samples cross the
bus in pieces of whole problems, in the order of the problems: a problem has to fit the device's memory, all of them
have not. Results go to NumPy arrays or to tensors on the device.

The blocks of a launch, of which there are no more for more problems, take every so manieth problem each. What a block
keeps of a problem is in shared memory, or in a workspace of a fixed size; neither grows with B, nor with the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import torch

from emalgam_kernels import contract
from emalgam_kernels.batch import Mixtures, Outcomes, Problems, Settings
from emalgam_kernels.numba_cuda import batch_kernels, staging
from emalgam_kernels.numba_cuda.batch_kernels import BLOCKS, THREADS, fit_kernel, predict_kernel
from emalgam_kernels.numba_cuda.batch_memory import (
    CHUNK,
    LANES,
    OF_A_FEATURE,
    OF_A_TASK,
    SUMS_AT_ONCE,
    Places,
    Size,
    integers_of,
)
from emalgam_kernels.numba_cuda.device import (
    ARRAYS,
    SHARED_BYTES,
    SIMULATED,
    Kernel,
    default_device,
    explained,
    is_tensor,
    most_shared_bytes,
    multiprocessors,
    on,
    require_on_device,
    span,
    view,
)
from emalgam_kernels.numba_cuda.staging import Inbound, Outbound, target
from emalgam_kernels.parameters import statistic_count

ITEM_BYTES: Final = 8  # of a float64
_REAL: Final = torch.float64
ROWS_OF_A_TILE: Final = (2 * CHUNK,) if SIMULATED else (128, 64, 32, 16, CHUNK)
TILE_BYTES: Final = 24 * 1024  # T is the largest of those whose tile is no larger, or the smallest
TILE_ROWS: Final = 3  # beside y
STATIC_BYTES: Final = 1024  # of shared memory that a kernel has beside what a launch asks for, at most
RESERVED_BYTES: Final = 1024  # of each block's shared memory, by the system
MOST_WORKSPACE: Final = 512 * 2**20
_RESULTS: Final = torch.float64, torch.int64  # of a row: log p and its label


def fit_many(
    problems: Problems, settings: Settings, mixtures: Mixtures, outcomes: Outcomes, n_threads: int = 1
) -> None:
    """EM of many problems; see `emalgam_kernels.reference.batch.fit_many`.

    `problems.x`, and the arrays of `mixtures` and `outcomes`, are NumPy arrays or tensors on the device. `n_threads`
    copy NumPy arrays to and from pinned memory.
    """
    contract.fit_many(problems, settings, mixtures, outcomes, kinds=ARRAYS)
    require_on_device(problems.x)
    places: list[Any] = [mixtures.weights, mixtures.means, mixtures.covariances]
    places += [outcomes.log_likelihood, outcomes.entropy]
    places += [mixtures.n_components, outcomes.n_iter, outcomes.converged, outcomes.status]
    problem_bytes = ITEM_BYTES * sum(math.prod(each.shape[1:]) for each in places)
    numbers = int(settings.seed), float(settings.tol), float(settings.added)
    with _at(problems.x) as device, explained("many fits"):
        edges = _edges(problems, problem_bytes)
        targets = [target(each, int(np.diff(edges).max(initial=1)), device, n_threads) for each in places]
        for piece in _pieces(problems, edges, device, n_threads):
            B, some, launch = piece.n_problems, piece.problems, _Launch.of(piece, mixtures, settings)
            limits = (_as_tensor(each[some], torch.int64, device) for each in (settings.fewest, settings.most))
            shaped = [torch.full((B, *each.shape[1:]), torch.nan, dtype=_REAL, device=device) for each in places[:3]]
            reals = torch.full((2, B), torch.nan, dtype=_REAL, device=device)
            integers = torch.zeros((4, B), dtype=torch.int64, device=device)
            sizes = torch.tensor(integers_of(launch.size), device=device)
            chosen = _as_tensor(problems.numbers[some], torch.int64, device), torch.cat(list(limits))
            arrays = piece.weights, piece.offsets, *chosen, launch.workspace(device), *shaped, reals, integers, sizes
            fit_kernel(launch.in_shared).launch(
                launch.blocks, THREADS, *piece.samples, *map(view, arrays), *numbers,
                shared_bytes=launch.shared_bytes,
            )  # fmt: skip
            found = [*shaped, *reals, *integers[:2], integers[2].bool(), integers[3]]
            for each, part in zip(targets, found, strict=True):
                each.put(piece.first, part)
        for each in targets:
            each.finish()


def predict_many(
    problems: Problems, mixtures: Mixtures, log_prob: np.ndarray, labels: np.ndarray, n_threads: int = 1
) -> None:
    """log p and labels; see `emalgam_kernels.reference.batch.predict_many`, and `fit_many` for where arrays may be."""
    contract.predict_many(problems, mixtures, log_prob, labels, kinds=ARRAYS)
    require_on_device(problems.x, log_prob, labels)
    given: list[Any] = [mixtures.weights, mixtures.means, mixtures.covariances]
    results: list[Any] = [log_prob, labels]
    with _at(problems.x) as device, explained("many predictions"):
        edges = _edges(problems, ITEM_BYTES * sum(math.prod(each.shape[1:]) for each in given), results_of_a_row=2)
        targets = _Rows(problems, edges, results, device, n_threads)
        for piece in _pieces(problems, edges, device, n_threads):
            some, launch = piece.problems, _Launch.of(piece, mixtures)
            parts = [_as_tensor(each[some], _REAL, device) for each in given]
            found = targets.of(piece)
            arrays = (
                piece.offsets,
                _as_tensor(mixtures.n_components[some], torch.int64, device),
                launch.workspace(device),
            )
            predict_kernel(launch.in_shared).launch(
                launch.blocks, THREADS, *piece.samples, *map(view, (*arrays, *parts, *found)), launch.size,
                shared_bytes=launch.shared_bytes,
            )  # fmt: skip
            targets.put(piece, found)
        targets.finish()


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    return batch_kernels.kernels()


# ---- samples on the device, all of them or some problems at a time


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some problems, one after the other, on the device.

    Attributes
    ----------
    first, n_problems : int
    first_row, n_rows : int
        Of the samples of all problems, in the order of the problems.
    x : (n, D) float32 or float64
    order : (n,) int64 or None
    weight : (n,) float64 or None
    offsets : (n_problems + 1,) int64
        In `order`, or rows of x.
    """

    first: int
    n_problems: int
    first_row: int
    n_rows: int
    x: torch.Tensor
    order: torch.Tensor | None
    weight: torch.Tensor | None
    offsets: torch.Tensor

    @property
    def problems(self) -> slice:
        """Which of all."""
        return slice(self.first, self.first + self.n_problems)

    @property
    def weights(self) -> torch.Tensor:
        """What the kernel takes: something, if there are none."""
        return self.offsets.to(_REAL) if self.weight is None else self.weight

    @property
    def samples(self) -> tuple[Any, ...]:
        """What both kernels take of them: x as float64 and as float32, of which one is empty, and the order."""
        absent = {dtype: self.x.new_empty(1, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.int64)}
        given = {**absent, self.x.dtype: span(self.x)}
        order = absent[torch.int64] if self.order is None else self.order
        return view(given[torch.float64]), view(given[torch.float32]), view(order)


@contextmanager
def _at(x: Any) -> Iterator[torch.device]:
    """Compute where x lies, or on the device that NumPy arrays are sent to."""
    device = x.device if is_tensor(x) else default_device()
    with on(device), torch.no_grad():
        yield device


def _edges(problems: Problems, problem_bytes: int, results_of_a_row: int = 0) -> np.ndarray:
    """Problems [edges[i], edges[i + 1]) are piece i: as many as fill a buffer of the bus, and at least one."""
    x: Any = problems.x
    crossing = 0 if is_tensor(x) else problems.n_features * x.itemsize + ITEM_BYTES * results_of_a_row
    offsets = _on_host(problems.offsets)
    ends = (offsets - offsets[:1]) * crossing + np.arange(len(offsets)) * problem_bytes
    edges = [0]
    while edges[-1] < len(problems):
        last = int(np.searchsorted(ends, ends[edges[-1]] + staging.PIECE_BYTES, side="right")) - 1
        edges.append(max(last, edges[-1] + 1))
    return np.array(edges)


def _pieces(problems: Problems, edges: np.ndarray, device: torch.device, n_threads: int) -> Iterator[_Piece]:
    """The samples of each piece, which may be overwritten when the one after the next is asked for."""
    offsets, x, order, weight = _on_host(problems.offsets), problems.x, problems.order, problems.sample_weight
    in_place, rows = is_tensor(x), offsets[edges]
    if in_place:
        tensor: Any = x
        whole = tensor if tensor.dtype in (torch.float32, _REAL) else tensor.to(_REAL)
        order = None if order is None else _as_tensor(order, torch.int64, device)
        weight = None if weight is None else _as_tensor(weight, _REAL, device)
    else:
        arrays = [None if each is None else Inbound(each, rows, device, n_threads, order) for each in (x, weight)]
        samples, weights = (iter(()) if each is None else each.pieces() for each in arrays)
    for (first, last), (start, stop) in zip(pairwise(edges.tolist()), pairwise(rows.tolist()), strict=True):
        ends = _as_tensor(offsets[first : last + 1] - (0 if in_place else start), torch.int64, device)
        if in_place:
            yield _Piece(first, last - first, start, stop - start, whole, order, weight, ends)
        else:
            part = next(samples), None, next(weights, None)
            yield _Piece(first, last - first, start, stop - start, *part, ends)


class _Rows:
    """Where results for each row of x go: tensors that the kernels write into, or NumPy arrays, piece by piece."""

    def __init__(
        self, problems: Problems, edges: np.ndarray, results: list[Any], device: torch.device, n_threads: int
    ) -> None:
        self.results, self.device = results, device
        self.outbound: list[Outbound] = []
        if is_tensor(problems.x):
            self.tensors = [_as_tensor(each, dtype, device) for each, dtype in zip(results, _RESULTS, strict=True)]
            return
        rows = int(np.diff(_on_host(problems.offsets)[edges]).max(initial=1))
        self.outbound = [Outbound(each, rows, device, n_threads, problems.order) for each in results]

    def of(self, piece: _Piece) -> list[torch.Tensor]:
        """What the kernels write into: all rows of x, or those of a piece."""
        if not self.outbound:
            return self.tensors
        return [torch.empty(piece.n_rows, dtype=dtype, device=self.device) for dtype in _RESULTS]

    def put(self, piece: _Piece, found: list[torch.Tensor]) -> None:
        """Send a piece on its way."""
        for each, part in zip(self.outbound, found, strict=False):
            each.put(piece.first_row, part)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        for each in self.outbound:
            each.finish()
        for place, tensor in zip(self.results, [] if self.outbound else self.tensors, strict=False):
            if not is_tensor(place):
                place[...] = tensor.cpu().numpy()
            elif place.data_ptr() != tensor.data_ptr():
                place.copy_(tensor)


def _on_host(array: Any) -> np.ndarray:
    """A small array as NumPy's."""
    found: np.ndarray = array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    return found


def _as_tensor(array: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the device, contiguous, in a type; of the same bits where uint64 becomes int64."""
    if not isinstance(array, torch.Tensor):
        given = np.ascontiguousarray(array)
        array = torch.from_numpy((given.view(np.int64) if given.dtype == np.uint64 else given).copy())
    elif array.dtype == torch.uint64:
        array = array.view(torch.int64)
    return array.to(device=device, dtype=dtype).contiguous()


# ---- how a problem lies in memory


@dataclass(frozen=True)
class _Launch:
    """How a piece is divided among blocks.

    Attributes
    ----------
    size : Size
    blocks : int
    shared_bytes : int
        Of a block.
    in_shared : bool
        Whether all that a problem has is in shared memory; else only the tile is.
    """

    size: Size
    blocks: int
    shared_bytes: int
    in_shared: bool

    @classmethod
    def of(cls, piece: _Piece, mixtures: Mixtures, settings: Settings | None = None) -> _Launch:
        """For problems of up to the K of `mixtures`; without settings nothing is fitted."""
        K, D, most_bytes = (
            mixtures.weights.shape[1],
            int(piece.x.shape[1]),
            most_shared_bytes(piece.x.device) - STATIC_BYTES,
        )
        T = _rows_of_a_tile(D)
        tile = (_padded(D + 1) + TILE_ROWS) * T
        if tile * ITEM_BYTES > most_bytes:
            raise ValueError(
                f"many fits of {D} features need {tile * ITEM_BYTES} bytes of shared memory, and a block of this GPU "
                f"has {most_bytes}; expected fewer features; use a CPU backend"
            )
        size = _size(piece, K, T, mixtures.covariance_type, settings)
        memory, shared_bytes = size.memory, tile * ITEM_BYTES
        in_shared = shared_bytes + memory * ITEM_BYTES <= most_bytes
        if in_shared:
            shared_bytes += memory * ITEM_BYTES
            size = size._replace(memory=0, places=Places(*(tile + place for place in size.places)))
        if shared_bytes + STATIC_BYTES > SHARED_BYTES:
            shared_bytes = max(shared_bytes, SHARED_BYTES + ITEM_BYTES)  # the kernel is to ask whether it may
        of_one = min(BLOCKS, (most_bytes + RESERVED_BYTES) // (shared_bytes + RESERVED_BYTES))
        blocks = min(multiprocessors(piece.x.device) * max(of_one, 1), piece.n_problems)
        if not in_shared:
            blocks = min(blocks, max(MOST_WORKSPACE // (ITEM_BYTES * memory), 1))
        return cls(size, blocks, shared_bytes, in_shared)

    def workspace(self, device: torch.device) -> torch.Tensor:
        """For all blocks; next to nothing if they do not need one."""
        return torch.empty(max(self.blocks * self.size.memory, 1), dtype=_REAL, device=device)


def _padded(count: int) -> int:
    """The next multiple of 4."""
    return -(-count // 4) * 4


def _rows_of_a_tile(n_features: int) -> int:
    """T. It follows from D alone, or a result would depend on other problems."""
    numbers = _padded(n_features + 1) + TILE_ROWS
    fitting = (T for T in ROWS_OF_A_TILE if ITEM_BYTES * T * numbers <= TILE_BYTES)
    return next(fitting, ROWS_OF_A_TILE[-1])


def _size(piece: _Piece, K: int, T: int, covariance_type: str, settings: Settings | None) -> Size:
    """The integers of a launch; places begin with zero, and a block's memory is shared."""
    D, full = int(piece.x.shape[1]), covariance_type in ("full", "tied")
    P, Q, M = _padded(D + 1), _padded(D), D * (D + 1) // 2 if full else D
    C, F = 1 if covariance_type == "tied" else K, statistic_count("full" if full else "diag", D)
    fours = P // 4
    tasks = K * (fours * (fours + 1) // 2 if full else fours)
    sums = max(max(tasks, SUMS_AT_ONCE) * OF_A_TASK, LANES * (2 * D + 8))
    lengths = Places(
        frame=OF_A_FEATURE * D, weights=K, means=K * P, covariances=C * M, factors=C * (Q * Q if full else D),
        constants=K, masses=K, states=C, statistics=K * F, lanes=2 * LANES, candidates=K * P, targets=K, picks=K,
        chunks=T // CHUNK, lasts=T // CHUNK, logits=K * T, sums=sums,
    )  # fmt: skip
    row_stride, feature_stride = piece.x.stride()
    return Size(
        full=int(full), B=piece.n_problems, D=D, K=K, T=T, log_T=T.bit_length() - 1, P=P, Q=Q, M=M, F=F, C=C,
        covariance_width=D * D if full else (1 if covariance_type == "spherical" else D),
        row_stride=row_stride, feature_stride=feature_stride, single=int(piece.x.dtype == torch.float32),
        ordered=int(piece.order is not None), weighted=int(piece.weight is not None),
        shared=int(covariance_type == "tied"), isotropic=int(covariance_type == "spherical"),
        aic=int(settings is not None and settings.criterion == "aic"),
        icl=int(settings is not None and settings.criterion == "icl"),
        n_init=0 if settings is None else int(settings.n_init),
        max_iter=0 if settings is None else int(settings.max_iter),
        memory=sum(lengths), places=Places(*accumulate((0, *lengths[:-1]))),
    )  # fmt: skip
