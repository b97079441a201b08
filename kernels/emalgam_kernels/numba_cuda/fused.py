"""E-step and statistics of small packed problems in one kernel, which reads the data once and stores nothing per row.

A persistent block takes every G-th tile of T rows. Shared memory holds the parameters, the features Φ (F, T) and the
logits L (K, T). Both matrix products, L = η Φ and S = R Φᵀ, give each thread 4 × 4 outputs in registers. The statistics
stay there from tile to tile; at the end each block writes one partial sum, and a second kernel adds the partial sums in
the order of the blocks.

Everything that the products touch is read in vectors of 16 bytes. Rows of Φ and L are one vector longer than T, so that
threads that read the same columns of neighbouring rows meet in different banks. Shared memory, row by row (`Tile` has
the starts of the parts)::

    η transposed (F, 4 ⌈K/4⌉)   W (D, 4 ⌈D/4⌉)   shift₀, shift₁, scale (D each)
    Φ (F, T)   L (K, T)   z before whitening (D, T)   ω (T)   two numbers of each thread

The last D + 1 rows of Φ are z and ones for every feature map: z is written there, and its products are made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numba
import numpy as np
import torch
from numba import cuda

from emalgam_kernels.numba_cuda.device import (
    NUMBA_REALS,
    SHARED_BYTES,
    SIMULATED,
    Kernel,
    ascending,
    at,
    divided,
    flat,
    inlined,
    integers_of,
    most_shared_bytes,
    multiprocessors,
    span,
    threads_per_block,
    view,
)
from emalgam_kernels.numba_cuda.problem import PackedProblem, Results

ROWS_OF_A_TILE: Final = (16,) if SIMULATED else (128, 64, 32)
BLOCKS_PER_MULTIPROCESSOR: Final = 4  # at most: each writes a partial sum
FEWER_THREADS: Final = threads_per_block(128)
MORE_THREADS: Final = threads_per_block(256)
REDUCTION_BLOCK: Final = (8, 4) if SIMULATED else (32, 16)
ITEM_BYTES: Final = {"float32": 4, "float64": 8}
RESERVED_BYTES: Final = 1024  # of each block, by the system: a multiprocessor has so much more than a block may ask for
MOST_TASKS: Final = 3  # of a thread: more, and registers spill

# Vectors: LLVM joins loads if it sees that they are neighbours and aligned, which takes all three of these: indices
# written as a multiple of the vector's length plus a constant, indices without a sign (`at`), and memory of known
# alignment.
VECTOR_BYTES: Final = 16
ALIGNMENT: Final = None if SIMULATED else VECTOR_BYTES


class Tile(NamedTuple):
    """How a tile lies in shared memory.

    Starts of matrices, and S, the length of their rows, are counted in vectors; those of `frame`, `weight`, `scratch`
    in elements. `slices`: parts into which the columns are divided where there are more threads than tasks.
    """

    T: int
    log_T: int  # noqa: N815
    S: int
    slices: int
    whitening: int
    phi: int
    logits: int
    raw: int
    frame: int
    weight: int
    scratch: int


class Size(NamedTuple):
    """The integers of a launch, in one argument.

    Flags (0 or 1): `spherical`: the first feature is ‖z‖²; `statistics`, `log_prob` and `responsibilities`: which
    results are wanted.
    """

    N: int
    D: int
    K: int
    F: int
    stride_n: int
    stride_d: int
    weighted: int
    whitened: int
    spherical: int
    hard: int
    statistics: int
    log_prob: int
    responsibilities: int
    tile: Tile


@dataclass(frozen=True)
class Plan:
    """How a problem lies in shared memory and on threads.

    Attributes
    ----------
    tile : Tile
    threads : int
        Threads of a block.
    tasks_of_a_thread : {1, 3}
        At most; a task is 4 × 4 statistics.
    blocks : int
        That a multiprocessor runs at once at least: by shared memory, and by the registers that the kernels are
        compiled for. At most `BLOCKS_PER_MULTIPROCESSOR`.
    shared_bytes : int
        Of a block.
    """

    tile: Tile
    threads: int
    tasks_of_a_thread: int
    blocks: int
    shared_bytes: int

    @property
    def busy(self) -> bool:
        """Whether a multiprocessor has enough to do while some of its threads wait."""
        return self.tasks_of_a_thread == 1 or self.blocks >= 2


@cache
def plan(D: int, K: int, F: int, arithmetic: str, whitened: bool, most_bytes: int) -> Plan | None:
    """The largest tile that fits; None if there is none, or more statistics than the threads of a block can keep.

    The largest within `SHARED_BYTES`; if there is none, the largest with which two blocks fit a multiprocessor (where
    its registers allow two); if there is none, the largest with which one does.

    Parameters
    ----------
    D, K, F : int
    arithmetic : {"float32", "float64"}
    whitened : bool
    most_bytes : int
        Shared memory of a block at most: `device.most_shared_bytes`.
    """
    tasks = -(-K // 4) * -(-F // 4)
    threads = FEWER_THREADS if tasks <= FEWER_THREADS else MORE_THREADS
    if tasks > MOST_TASKS * threads:
        return None
    tasks_of_a_thread = 1 if tasks <= threads else MOST_TASKS
    tiles = [_layout(D, K, F, arithmetic, whitened, T, threads) for T in ROWS_OF_A_TILE]
    by_registers = _threads_of_a_multiprocessor(arithmetic, tasks_of_a_thread) // threads
    of_two = (most_bytes + RESERVED_BYTES) // 2 - RESERVED_BYTES if by_registers >= 2 else 0
    limits = min(SHARED_BYTES, most_bytes), of_two, most_bytes
    found = next(((tile, size) for limit in limits for tile, size in tiles if size <= limit), None)
    if found is None:
        return None
    tile, n_bytes = found
    by_memory = (most_bytes + RESERVED_BYTES) // (n_bytes + RESERVED_BYTES)
    blocks = min(by_memory, by_registers, BLOCKS_PER_MULTIPROCESSOR)
    return Plan(tile, threads, tasks_of_a_thread, blocks, n_bytes)


def _threads_of_a_multiprocessor(arithmetic: str, tasks_of_a_thread: int) -> int:
    """Threads that registers leave room for: what the kernels are compiled for, as the compile gate finds them."""
    return MORE_THREADS * (2 if arithmetic == "float32" and tasks_of_a_thread == 1 else 1)


def _layout(D: int, K: int, F: int, arithmetic: str, whitened: bool, T: int, threads: int) -> tuple[Tile, int]:
    """A tile of T rows, and the bytes that a block then takes."""
    item_bytes = ITEM_BYTES[arithmetic]
    vector = VECTOR_BYTES // item_bytes
    fours = -(-K // 4)
    S = T // vector + 1
    slices = max(min(threads // (fours * -(-F // 4)), T // 4), 1)
    whitening = F * fours * 4 // vector
    frame = vector * whitening + (4 * D * -(-D // 4) if whitened else 0)
    phi = -(-(frame + 3 * D) // vector)
    logits = phi + F * S
    raw = logits + K * S
    weight = vector * (raw + (D * S if whitened else 0))
    scratch = weight + T
    # At the end the block's sums pass through the same memory: 16 of each thread, float32 in pairs.
    elements = max(scratch + 2 * threads, 16 * threads * (8 // item_bytes))
    tile = Tile(T, T.bit_length() - 1, S, slices, whitening, phi, logits, raw, frame, weight, scratch)
    return tile, elements * item_bytes


# ---- places in shared memory


@inlined
def _place(shared: Any, start: int, i: int) -> Any:
    """Element i of the row that starts with vector `start`."""
    return at((VECTOR_BYTES // shared.itemsize) * start + i)


@inlined
def place_of_four(shared: Any, start: int, distance: int, i: int) -> Any:
    """Element i < 4 of those that a thread takes at once: one vector of float32, or two of float64 `distance` apart."""
    vector = VECTOR_BYTES // shared.itemsize
    return at(vector * (start + i // vector * distance) + i % vector)


@inlined
def _columns(size: Size) -> tuple[int, int, int]:
    """For work on four columns: which ones this thread takes, of which rows the first, and every how manieth."""
    thread, shift = cuda.threadIdx.x, size.tile.log_T - 2
    return thread & ((1 << shift) - 1), thread >> shift, cuda.blockDim.x >> shift


@inlined
def _column(size: Size) -> tuple[int, int, int]:
    """For work on one column: which one this thread takes, of which rows the first, and every how manieth."""
    return cuda.threadIdx.x & (size.tile.T - 1), cuda.threadIdx.x >> size.tile.log_T, cuda.blockDim.x >> size.tile.log_T


@inlined
def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """a + b rounded, and exactly what the rounding took away (Knuth, TAOCP volume 2, section 4.2.2)."""
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


# ---- a tile: from rows of x to logits


@inlined
def _load_weights(shared: Any, weight: Any, size: Size, first: int) -> None:
    """ω of the tile's rows; zero beyond the last row of all."""
    real = shared.dtype.type
    for n in ascending(cuda.threadIdx.x, size.tile.T, cuda.blockDim.x):
        value = real(0)
        if first + n < size.N:
            value = weight[at(first + n)] if size.weighted else real(1)
        shared[at(size.tile.weight + n)] = value


@inlined
def _load_rows(shared: Any, x: Any, size: Size, first: int, target: int) -> None:
    """z of the tile's rows, feature-major, from vector `target` on.

    Consecutive threads take consecutive numbers of a row if x is row-major, of a column if it is column-major. Four
    loads are under way at a time.
    """
    by_row = size.stride_d < size.stride_n
    length = size.D if by_row else size.tile.T
    across, along = divided(cuda.threadIdx.x, length)
    further, more = divided(cuda.blockDim.x, length)
    values, places = cuda.local.array(4, x.dtype), cuda.local.array((4, 2), numba.int64)
    while across < (size.tile.T if by_row else size.D):
        for i in ascending(4):
            n, d = (across, along) if by_row else (along, across)
            places[i, 0], places[i, 1] = n, d
            if n < size.tile.T and d < size.D and first + n < size.N:
                values[i] = x[at((first + n) * size.stride_n + d * size.stride_d)]
            along, across = along + more, across + further
            if along >= length:
                along, across = along - length, across + 1
        for i in ascending(4):
            n, d = places[i, 0], places[i, 1]
            if n < size.tile.T and d < size.D:
                shared[_place(shared, target + d * size.tile.S, n)] = _in_frame(values[i], shared, size, n, d)


@inlined
def framed(value: Any, shift: Any, lost: Any, scale: Any) -> Any:
    """z_d = ((x_d − shift₀) − shift₁) · scale, rounded once; all of one type."""
    centred, error = _two_sum(value, -shift)
    return (centred + (error - lost)) * scale


@inlined
def _in_frame(value: Any, shared: Any, size: Size, n: int, d: int) -> Any:
    """z_d; zero if the row has no weight, whatever it holds."""
    real, shift = shared.dtype.type, size.tile.frame + d
    if shared[at(size.tile.weight + n)] == real(0):
        return real(0)
    return framed(real(value), shared[at(shift)], shared[at(shift + size.D)], shared[at(shift + 2 * size.D)])


@inlined
def _product(shared: Any, size: Size, left: int, right: int, length: int, target: int, rows: int) -> None:
    """target_kn = Σ_f left_fk right_fn for k < rows, f < length: 4 × 4 outputs of a thread at a time."""
    a, b = cuda.local.array(4, shared.dtype), cuda.local.array(4, shared.dtype)
    s = cuda.local.array((4, 4), shared.dtype)
    columns, first, step = _columns(size)
    distance, groups, vectors = size.tile.T >> 2, (rows + 3) >> 2, shared.itemsize >> 2
    for group in ascending(first, groups, step):
        _clear(s)
        # Running places, not products of f: integers would cost as much as the arithmetic.
        place, row = left + group * vectors, right + columns
        for _ in ascending(length):
            for i in ascending(4):
                a[i] = shared[place_of_four(shared, place, 1, i)]
            for j in ascending(4):
                b[j] = shared[place_of_four(shared, row, distance, j)]
            for i in ascending(4):
                for j in ascending(4):
                    s[i, j] += a[i] * b[j]
            place, row = place + groups * vectors, row + size.tile.S
        for i in ascending(4):
            if 4 * group + i < rows:
                for j in ascending(4):
                    row = target + (4 * group + i) * size.tile.S
                    shared[place_of_four(shared, row + columns, distance, j)] = s[i, j]


@inlined
def _clear(values: Any) -> None:
    """Zero 4 × 4 registers."""
    for i in ascending(4):
        for j in ascending(4):
            values[i, j] = values.dtype.type(0)


@inlined
def _products_of_features(shared: Any, pairs: Any, size: Size) -> None:
    """φ_f = z_a z_b with (a, b) = pairs_f; spherical: φ_0 = Σ_d z_d²."""
    s = cuda.local.array(4, shared.dtype)
    columns, first, step = _columns(size)
    distance, products = size.tile.T >> 2, size.F - size.D - 1
    z = size.tile.phi + products * size.tile.S + columns
    for f in ascending(first, products, step):
        for i in ascending(4):
            s[i] = shared.dtype.type(0)
        for d in ascending(size.D if size.spherical else 1):
            row = z + (d if size.spherical else pairs[at(2 * f)]) * size.tile.S
            other = z + (d if size.spherical else pairs[at(2 * f + 1)]) * size.tile.S
            for i in ascending(4):
                factor = shared[place_of_four(shared, other, distance, i)]
                s[i] += shared[place_of_four(shared, row, distance, i)] * factor
        for i in ascending(4):
            shared[place_of_four(shared, size.tile.phi + f * size.tile.S + columns, distance, i)] = s[i]


@inlined
def _features(shared: Any, x: Any, weight: Any, pairs: Any, size: Size, first: int) -> None:
    """ω and Φ of the tile that begins with row `first`."""
    z = size.tile.phi + (size.F - size.D - 1) * size.tile.S
    _load_weights(shared, weight, size, first)
    cuda.syncthreads()
    _load_rows(shared, x, size, first, size.tile.raw if size.whitened else z)
    cuda.syncthreads()
    if size.whitened:
        _product(shared, size, size.tile.whitening, size.tile.raw, size.D, z, size.D)
        cuda.syncthreads()
    _products_of_features(shared, pairs, size)
    cuda.syncthreads()


# ---- log-sum-exp: each column on one thread, or on several that take every so manieth component


@inlined
def _leave_maximum(shared: Any, size: Size) -> None:
    """The largest of the thread's logits, where `_combined` finds it."""
    top = shared.dtype.type(-math.inf)
    n, first, step = _column(size)
    for k in ascending(first, size.K, step):
        top = max(top, shared[_place(shared, size.tile.logits + k * size.tile.S, n)])
    shared[at(size.tile.scratch + cuda.threadIdx.x)] = top


@inlined
def _combined(shared: Any, size: Size, start: int, largest: bool) -> Any:
    """The largest, or the sum, of what the threads of a column left, in their order."""
    n, _, parts = _column(size)
    value = shared[at(start + n)]
    for part in ascending(1, parts):
        other = shared[at(start + part * size.tile.T + n)]
        value = max(value, other) if largest else value + other
    return value


@inlined
def _leave_exponentials(shared: Any, size: Size, top: Any) -> int:
    """Replace L_k by exp(L_k − top) and leave their sum; hard: return the first k with L_k = top."""
    real = shared.dtype.type
    n, first, step = _column(size)
    chosen, total = 0, real(0)
    if size.hard:
        while chosen < size.K - 1 and shared[_place(shared, size.tile.logits + chosen * size.tile.S, n)] != top:
            chosen += 1
    else:
        for k in ascending(first, size.K, step):
            place = _place(shared, size.tile.logits + k * size.tile.S, n)
            exponential = real(math.exp(shared[place] - top))
            shared[place] = exponential
            total += exponential
    shared[at(size.tile.scratch + cuda.blockDim.x + cuda.threadIdx.x)] = total
    return chosen


@inlined
def _normalize(shared: Any, size: Size, top: Any, chosen: int, factor: Any) -> Any:
    """r_k times `factor` in place of the exponentials; returns log p = top + log Σ_k exp(L_k − top)."""
    real = shared.dtype.type
    n, first, step = _column(size)
    if size.hard:
        for k in ascending(first, size.K, step):
            shared[_place(shared, size.tile.logits + k * size.tile.S, n)] = factor if k == chosen else real(0)
        return top
    total = _combined(shared, size, size.tile.scratch + cuda.blockDim.x, False)
    scale = real(1) / total
    for k in ascending(first, size.K, step):
        place = _place(shared, size.tile.logits + k * size.tile.S, n)
        shared[place] = shared[place] * scale * factor
    return top + real(math.log(total))


@inlined
def _log_sum_exp(shared: Any, size: Size, factor: Any) -> Any:
    """r times `factor` in place of the logits; returns log p of the thread's column."""
    _leave_maximum(shared, size)
    cuda.syncthreads()
    top = _combined(shared, size, size.tile.scratch, True)
    chosen = _leave_exponentials(shared, size, top)
    cuda.syncthreads()
    log_p = _normalize(shared, size, top, chosen, factor)
    cuda.syncthreads()
    return log_p


@inlined
def _write_responsibilities(shared: Any, responsibilities: Any, size: Size, first: int) -> None:
    """r of the tile's rows, consecutive threads to consecutive places."""
    n, k = divided(cuda.threadIdx.x, size.K)
    further, more = divided(cuda.blockDim.x, size.K)
    while n < min(size.tile.T, size.N - first):
        responsibilities[at((first + n) * size.K + k)] = shared[_place(shared, size.tile.logits + k * size.tile.S, n)]
        n, k = n + further, k + more
        if k >= size.K:
            n, k = n + 1, k - size.K


@inlined
def _weigh(shared: Any, size: Size) -> None:
    """ω r in place of r."""
    n, first, step = _column(size)
    for k in ascending(first, size.K, step):
        shared[_place(shared, size.tile.logits + k * size.tile.S, n)] *= shared[at(size.tile.weight + n)]


# ---- statistics: sums in registers, from tile to tile


@inlined
def _accumulate(shared: Any, size: Size, number: int, task: int, part: int, high: Any, low: Any) -> None:
    """S += Σ_n r_n φ_nᵀ over a part of the tile's columns, for components k + i ⌈K/4⌉ and features f + j ⌈F/4⌉.

    The sums are those of the thread's task `number`, task `task` of all. float32: the tile is summed in float32, the
    tiles in pairs (high, low) of it. float64: everything in `high` alone.
    """
    a, b = cuda.local.array(4, shared.dtype), cuda.local.array((4, 4), shared.dtype)
    s = cuda.local.array((4, 4), shared.dtype)
    distance, components, features = size.tile.T >> 2, (size.K + 3) >> 2, (size.F + 3) >> 2
    k, f = divided(task, features)
    for i in ascending(4):
        for j in ascending(4):
            s[i, j] = shared.dtype.type(0) if shared.itemsize == 4 else high[number, i, j]
    for columns in ascending(part, distance, size.tile.slices):
        # Where K or F is no multiple of 4 some threads compute the last one again; nobody writes that.
        for j in ascending(4):
            phi = size.tile.phi + min(f + j * features, size.F - 1) * size.tile.S + columns
            for n in ascending(4):
                b[j, n] = shared[place_of_four(shared, phi, distance, n)]
        for i in ascending(4):
            r = size.tile.logits + min(k + i * components, size.K - 1) * size.tile.S + columns
            for n in ascending(4):
                a[n] = shared[place_of_four(shared, r, distance, n)]
            for j in ascending(4):
                for n in ascending(4):
                    s[i, j] += a[n] * b[j, n]
    _keep(s, number, high, low)


@inlined
def _keep(s: Any, number: int, high: Any, low: Any) -> None:
    """The sums of the thread's task `number` with those of another tile."""
    for i in ascending(4):
        for j in ascending(4):
            if s.itemsize == 4:
                high[number, i, j], error = _two_sum(high[number, i, j], s[i, j])
                low[number, i, j] += error
            else:
                high[number, i, j] = s[i, j]


@inlined
def _accumulate_tasks(shared: Any, size: Size, task: int, part: int, high: Any, low: Any) -> None:
    """S += that of the tile, for the thread's tasks: `task`, and as many threads further the second and the third."""
    threads, tasks = cuda.blockDim.x, ((size.K + 3) >> 2) * ((size.F + 3) >> 2)
    if part < size.tile.slices:
        _accumulate(shared, size, 0, task, part, high, low)
    # Numbers of registers, not a loop: registers have no index.
    if high.shape[0] > 1:
        if task + threads < tasks:
            _accumulate(shared, size, 1, task + threads, 0, high, low)
        if task + 2 * threads < tasks:
            _accumulate(shared, size, 2, task + 2 * threads, 0, high, low)


@inlined
def _write_statistics(shared: Any, partial: Any, size: Size, number: int, high: Any, low: Any) -> None:
    """The block's sums of each thread's task `number`, in the order of S: the parts of the columns are added here."""
    thread, threads, pairs = cuda.threadIdx.x, cuda.blockDim.x, 8 // shared.itemsize
    components, features = (size.K + 3) >> 2, (size.F + 3) >> 2
    for i in ascending(4):
        for j in ascending(4):
            shared[at((4 * i + j) * threads + thread)] = high[number, i, j]
            if shared.itemsize == 4:
                shared[at((16 + 4 * i + j) * threads + thread)] = low[number, i, j]
    cuda.syncthreads()
    first = number * threads
    tasks = min(components * features - first, threads)
    for item in ascending(thread, 16 * tasks, threads):
        output, task = divided(item, tasks)
        k, f = divided(first + task, features)
        k, f = k + (output >> 2) * components, f + (output & 3) * features
        if k < size.K and f < size.F:
            place = cuda.blockIdx.x * pairs * (size.K * size.F + 1) + k * size.F + f
            _write_sum(shared, partial, size, output * threads + task, tasks, place)
    cuda.syncthreads()


@inlined
def _write_sum(shared: Any, partial: Any, size: Size, start: int, step: int, place: int) -> None:
    """The sum of the parts of one output, a pair in float32."""
    lows = start + 16 * cuda.blockDim.x
    high, low = shared[at(start)], shared.dtype.type(0)
    if shared.itemsize == 4:
        low = shared[at(lows)]
    for part in ascending(1, size.tile.slices):
        high, error = _two_sum(high, shared[at(start + part * step)])
        low += error
        if shared.itemsize == 4:
            low += shared[at(lows + part * step)]
    _write_pair(partial, place, size.K * size.F + 1, high, low)


@inlined
def _write_total(shared: Any, partial: Any, size: Size, high: Any, low: Any) -> None:
    """The block's Σ ω log p, the last of its outputs: a tree over its threads."""
    thread, threads, outputs = cuda.threadIdx.x, cuda.blockDim.x, size.K * size.F + 1
    shared[at(thread)], shared[at(threads + thread)] = high, low
    half = threads >> 1
    while half > 0:
        cuda.syncthreads()
        if thread < half:
            shared[at(thread)], error = _two_sum(shared[at(thread)], shared[at(thread + half)])
            shared[at(threads + thread)] += shared[at(threads + thread + half)] + error
        half >>= 1
    if thread == 0:
        place = cuda.blockIdx.x * (8 // shared.itemsize) * outputs + outputs - 1
        _write_pair(partial, place, outputs, shared[at(0)], shared[at(threads)])


@inlined
def _write_pair(partial: Any, place: int, outputs: int, high: Any, low: Any) -> None:
    """float32: the two numbers; float64: their sum."""
    if partial.itemsize == 4:
        partial[at(place)] = high
        partial[at(place + outputs)] = low
    else:
        partial[at(place)] = high + low


# ---- kernels


@cache
def _fused(sample: str, arithmetic: str, tasks_of_a_thread: int) -> Kernel:
    """The pass over the data; each thread has at most one task or three, each of them 4 × 4 statistics."""
    real = NUMBA_REALS[arithmetic]
    zero, one = real(0), real(1)

    def fused(
        x: Any, weight: Any, parameters: Any, pairs: Any, log_prob: Any, responsibilities: Any, partial: Any, size: Size
    ) -> None:
        shared = cuda.shared.array(0, real, alignment=ALIGNMENT)
        high, low = cuda.local.array((tasks_of_a_thread, 4, 4), real), cuda.local.array((tasks_of_a_thread, 4, 4), real)
        for number in ascending(tasks_of_a_thread):
            _clear(high[number]), _clear(low[number])
        total_high, total_low = zero, zero
        thread, threads, features = cuda.threadIdx.x, cuda.blockDim.x, (size.F + 3) >> 2
        tasks = ((size.K + 3) >> 2) * features
        part, task = divided(thread, tasks)
        z = size.tile.phi + (size.F - size.D - 1) * size.tile.S
        for i in ascending(thread, size.tile.frame + 3 * size.D, threads):
            shared[at(i)] = parameters[at(i)]
        for n in ascending(thread, size.tile.T, threads):
            shared[_place(shared, z + size.D * size.tile.S, n)] = one
        for first in ascending(cuda.blockIdx.x * size.tile.T, size.N, cuda.gridDim.x * size.tile.T):
            cuda.syncthreads()
            _features(shared, x, weight, pairs, size, first)
            _product(shared, size, 0, size.tile.phi, size.F, size.tile.logits, size.K)
            cuda.syncthreads()
            n = thread & (size.tile.T - 1)
            omega = shared[at(size.tile.weight + n)]
            log_p = _log_sum_exp(shared, size, one if size.responsibilities else omega)
            if thread < size.tile.T:
                total_high, error = _two_sum(total_high, omega * log_p)
                total_low += error
                if size.log_prob and first + n < size.N:
                    log_prob[at(first + n)] = log_p
            if size.responsibilities:
                _write_responsibilities(shared, responsibilities, size, first)
                cuda.syncthreads()
                _weigh(shared, size)
                cuda.syncthreads()
            if size.statistics:
                _accumulate_tasks(shared, size, task, part, high, low)
        if size.statistics:
            cuda.syncthreads()
            _write_statistics(shared, partial, size, 0, high, low)
            if tasks_of_a_thread > 1:
                _write_statistics(shared, partial, size, 1, high, low)
                _write_statistics(shared, partial, size, 2, high, low)
            _write_total(shared, partial, size, total_high, total_low)

    array = flat(real)
    signature = (flat(NUMBA_REALS[sample]), array, array, flat(numba.int32), array, array, array, integers_of(Size))
    dtypes = arithmetic if sample == arithmetic else f"{sample} in {arithmetic}"
    name = f"fused, {dtypes}, {16 * tasks_of_a_thread} statistics per thread"
    blocks = _threads_of_a_multiprocessor(arithmetic, tasks_of_a_thread) // MORE_THREADS
    return Kernel(name, arithmetic, fused, signature, MORE_THREADS, blocks)


@cache
def _reduction(arithmetic: str) -> Kernel:
    """Adds the blocks' sums, (blocks, 1 or 2, outputs), to S and Σ ω log p: in a fixed order, in float64."""
    across, down = REDUCTION_BLOCK
    count = across * down

    def reduction(partial: Any, statistics: Any, total: Any, rows: int, outputs: int) -> None:
        sums = cuda.shared.array(count, numba.float64)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        output = cuda.blockIdx.x * across + x
        value = numba.float64(0)
        if output < outputs:
            for row in ascending(y, rows, down):
                value += numba.float64(partial[at(row * outputs + output)])
        sums[at(y * across + x)] = value
        half = down >> 1
        while half > 0:
            cuda.syncthreads()
            if y < half:
                sums[at(y * across + x)] += sums[at((y + half) * across + x)]
            half >>= 1
        if y == 0 and output < outputs - 1:
            statistics[at(output)] += sums[at(x)]
        if y == 0 and output == outputs - 1:
            total[at(0)] += sums[at(x)]

    double = flat(numba.float64)
    signature = (flat(NUMBA_REALS[arithmetic]), double, double, numba.int64, numba.int64)
    return Kernel(f"sum of the blocks of fused, {arithmetic}", "float64", reduction, signature, count)


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    variants = (("float32", "float32"), ("float64", "float64"), ("float32", "float64"))
    passes = [_fused(*dtypes, tasks) for dtypes in variants for tasks in (1, MOST_TASKS)]
    return [*passes, *(_reduction(arithmetic) for arithmetic in ITEM_BYTES)]


# ---- on the host


def run(x: torch.Tensor, weight: torch.Tensor | None, problem: PackedProblem, results: Results) -> None:
    """One pass over x; `plan` must have found a way. Nothing waits for the device.

    Parameters
    ----------
    x : (N, D) float32 or float64, any strides
        On the current device; of the arithmetic dtype, or float32.
    weight : (N,) of the arithmetic dtype, contiguous, or None
        ω.
    problem : PackedProblem
    results : Results
    """
    N, D = x.shape
    K, F = problem.n_components, problem.n_statistics
    way = plan(D, K, F, problem.arithmetic, problem.whitening is not None, most_shared_bytes(x.device))
    if way is None:
        raise ValueError(f"D = {D}, K = {K}, F = {F} do not fit the fused kernel; ask plan() first")
    if N == 0:
        return
    kernel = _fused("float32" if x.dtype == torch.float32 else "float64", problem.arithmetic, way.tasks_of_a_thread)
    resident = min(kernel.resident_blocks(way.threads, way.shared_bytes), BLOCKS_PER_MULTIPROCESSOR)
    blocks = min(-(-N // way.tile.T), resident * multiprocessors(x.device))
    rows, outputs = blocks * (8 // ITEM_BYTES[problem.arithmetic]), K * F + 1
    dtype = problem.natural.dtype
    none = _nothing(dtype, x.device)
    sums = results.sums
    partial = none if sums is None else view(torch.empty(rows * outputs, dtype=dtype, device=x.device))
    kernel.launch(
        blocks, way.threads,
        view(span(x)), none if weight is None else view(weight), view(_parameters(problem, way)),
        _pairs(problem.feature_map, D, x.device),
        *(none if each is None else view(each) for each in (results.log_prob, results.responsibilities)),
        partial, _size(x, weight, problem, results, way), shared_bytes=way.shared_bytes,
    )  # fmt: skip
    if sums is not None:
        _reduction(problem.arithmetic).launch(
            -(-outputs // REDUCTION_BLOCK[0]), REDUCTION_BLOCK,
            partial, view(sums.statistics), view(sums.total), rows, outputs,
        )  # fmt: skip


def _size(x: torch.Tensor, weight: torch.Tensor | None, problem: PackedProblem, results: Results, way: Plan) -> Size:
    """The integers of a pass."""
    return Size(
        N=x.shape[0], D=x.shape[1], K=problem.n_components, F=problem.n_statistics,
        stride_n=x.stride(0), stride_d=x.stride(1),
        weighted=int(weight is not None), whitened=int(problem.whitening is not None),
        spherical=int(problem.feature_map == "spherical"), hard=int(problem.hard),
        statistics=int(results.sums is not None), log_prob=int(results.log_prob is not None),
        responsibilities=int(results.responsibilities is not None), tile=way.tile,
    )  # fmt: skip


def _parameters(problem: PackedProblem, way: Plan) -> torch.Tensor:
    """η and W in rows of whole fours, and the frame, as they lie in shared memory."""
    K, F, D = problem.n_components, problem.n_statistics, problem.frame.scale.shape[0]
    fours, frame = 4 * -(-K // 4), way.tile.frame
    packed = torch.zeros(frame + 3 * D, dtype=problem.natural.dtype, device=problem.natural.device)
    packed[: F * fours].view(F, fours)[:, :K] = problem.natural.T
    if problem.whitening is not None:
        packed[F * fours : frame].view(D, -1)[:, :D] = problem.whitening
    packed[frame : frame + 2 * D] = problem.frame.shift.view(-1)
    packed[frame + 2 * D :] = problem.frame.scale
    return packed


@cache
def _pairs(feature_map: str, D: int, device: torch.device) -> Any:
    """(a, b) of every feature z_a z_b, flat, on the device: those before the last D + 1."""
    i, j = np.tril_indices(D) if feature_map == "full" else (np.arange(D), np.arange(D))
    return view(torch.as_tensor(np.stack([i, j], axis=1).astype(np.int32)).to(device))


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Any:
    """What stands for an array that is absent."""
    return view(torch.zeros(1, dtype=dtype, device=device))
