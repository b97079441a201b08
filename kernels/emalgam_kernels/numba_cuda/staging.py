"""Rows of main memory on their way to the device and back: pinned buffers in pairs, so that copies and kernels overlap.

While the device computes with one piece, the next crosses the bus and the host fills the pinned buffer of the one
after; results of the one before cross it the other way. Copies have streams of their own and wait for nothing but the
kernels that make what they copy, or free what they overwrite. Nothing here is larger than a few pieces, so data larger
than the device's memory fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch

from emalgam_kernels.blocks import for_each_block, tile_dtype
from emalgam_kernels.numba_cuda.device import REALS, Copies, Marker, is_tensor, pinned, upload

PIECE_BYTES: Final = 64 * 2**20  # a millisecond of the bus: long beside the launches of a pass
ROWS_PER_COPY: Final = 8192  # of one thread that fills a pinned buffer
BUFFERS: Final = 2


def rows_of_a_piece(row_bytes: int) -> int:
    """How many rows cross the bus at once."""
    return max(PIECE_BYTES // row_bytes, 1)


def pieces(array: Any, rows: int, device: torch.device, n_threads: int) -> Iterator[torch.Tensor]:
    """An array (M, ...) of either place as tensors on the device, `rows` at a time.

    Tensors are not copied, and neither are they or NumPy arrays written out along a stride of zero. A piece may be
    overwritten when the one after the next is asked for.
    """
    if isinstance(array, np.ndarray):
        shared = array.strides[0] == 0
        if not shared and len(array) > rows:
            yield from Inbound(array, rows, device, n_threads).pieces()
            return
        array = upload(array[:1] if shared else array, REALS[array.dtype.name], device).expand(array.shape)
    for first in range(0, len(array), rows):
        yield array[first : first + rows]


class Inbound:
    """Pieces of an array (N, ...) of main memory, one after the other, as tensors on the device.

    Parameters
    ----------
    array : (N, ...) of any real dtype and strides, memory-mapped too
    rows : int or increasing integers
        Rows of a piece, or where pieces begin and the last one ends.
    n_threads : int
        Threads that fill the pinned buffers.
    order : (n,) int64, optional
        Row n of a piece is row order[n] of the array; None: row n.
    """

    def __init__(
        self,
        array: np.ndarray,
        rows: int | np.ndarray,
        device: torch.device,
        n_threads: int,
        order: np.ndarray | None = None,
    ) -> None:
        self.array, self.n_threads, self.order = array, n_threads, order
        self.edges = [*range(0, len(array), rows), len(array)] if isinstance(rows, int) else rows.tolist()
        self.rows = max((last - first for first, last in pairwise(self.edges)), default=0) or 1
        shape = (self.rows, *array.shape[1:])
        self.dtype = dtype = torch.float32 if tile_dtype(array) == np.float32 else torch.float64
        self.pinned = [pinned(shape, dtype) for _ in range(BUFFERS)]
        self.arrived = [torch.empty(shape, dtype=dtype, device=device) for _ in range(BUFFERS)]
        self.copies = Copies(device)
        self.copied = [Marker() for _ in range(BUFFERS)]
        self.consumed = [Marker() for _ in range(BUFFERS)]

    def pieces(self) -> Iterator[torch.Tensor]:
        """Each piece; it may be overwritten when the one after the next is asked for."""
        for number, (first, last) in enumerate(pairwise(self.edges)):
            buffer = number % BUFFERS
            self.copied[buffer].wait_on_host()  # the pinned buffer's last piece has left
            self._fill(self.pinned[buffer].numpy(), first, last)
            with self.copies.queue(after=self.consumed[buffer]):
                self.arrived[buffer][: last - first].copy_(self.pinned[buffer][: last - first], non_blocking=True)
                self.copied[buffer].set()
            self.copied[buffer].wait_on_device()
            yield self.arrived[buffer][: last - first]
            self.consumed[buffer].set()

    def _fill(self, on_host: np.ndarray, first: int, last: int) -> None:
        def block(start: int, stop: int) -> None:
            rows = slice(first + start, first + stop)
            source = self.array[rows if self.order is None else self.order[rows]]
            np.copyto(on_host[start:stop], source, casting="unsafe")

        for_each_block(block, last - first, ROWS_PER_COPY, self.n_threads)


class Outbound:
    """Pieces of results on their way into an array (N, ...) of main memory; `finish` waits for the last ones.

    Parameters
    ----------
    out : (N, ...)
    rows : int
        Rows of a piece.
    n_threads : int
        Threads that empty the pinned buffers.
    order : (n,) int64, optional
        Row n of what is put belongs to out[order[n]]; None: to out[n].
    """

    def __init__(
        self, out: np.ndarray, rows: int, device: torch.device, n_threads: int, order: np.ndarray | None = None
    ) -> None:
        self.out, self.n_threads, self.order = out, n_threads, order
        self.pinned: list[torch.Tensor | None] = [None] * BUFFERS
        self.copies = Copies(device)
        self.made = [Marker() for _ in range(BUFFERS)]
        self.copied = [Marker() for _ in range(BUFFERS)]
        # Where each buffer's piece belongs; and the piece, which lives until it was copied: the allocator would give
        # its memory to the compute stream's next results.
        self.places: list[tuple[int, torch.Tensor] | None] = [None] * BUFFERS
        self.rows, self.number = max(min(rows, len(out)), 1), 0

    def put(self, first: int, piece: torch.Tensor) -> None:
        """Begin to copy `piece`, which the current stream makes, to out[first : first + len(piece)]."""
        buffer = self.number % BUFFERS
        self._take(buffer)
        on_host = self.pinned[buffer]
        if on_host is None:
            on_host = self.pinned[buffer] = pinned((self.rows, *piece.shape[1:]), piece.dtype)
        self.made[buffer].set()
        with self.copies.queue(after=self.made[buffer]):
            on_host[: len(piece)].copy_(piece, non_blocking=True)
            self.copied[buffer].set()
        self.places[buffer] = first, piece
        self.number += 1

    def finish(self) -> None:
        """Wait until everything has arrived."""
        for buffer in range(BUFFERS):
            self._take((self.number + buffer) % BUFFERS)

    def _take(self, buffer: int) -> None:
        place, on_host = self.places[buffer], self.pinned[buffer]
        if place is None or on_host is None:
            return
        self.copied[buffer].wait_on_host()
        first, piece = place
        source = on_host.numpy()

        def block(start: int, stop: int) -> None:
            rows = slice(first + start, first + stop)
            if self.order is None:
                np.copyto(self.out[rows], source[start:stop], casting="same_kind")
            else:
                self.out[self.order[rows]] = source[start:stop]

        for_each_block(block, len(piece), ROWS_PER_COPY, self.n_threads)
        self.places[buffer] = None


class InPlace:
    """Results that stay on the device."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out

    def put(self, first: int, piece: torch.Tensor) -> None:
        """out[first : first + len(piece)] ← piece, of any strides and in the type of `out`."""
        self.out[first : first + len(piece)].copy_(piece)

    def finish(self) -> None:
        """Nothing to wait for."""


def target(out: Any, rows: int, device: torch.device, n_threads: int) -> InPlace | Outbound:
    """Where pieces of results go."""
    return InPlace(out) if is_tensor(out) else Outbound(out, rows, device, n_threads)
