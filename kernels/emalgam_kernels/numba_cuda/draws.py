"""The kernels of random numbers: words, uniforms, samples of mixtures, and the sums of log ratios over samples.

Rows that are drawn have the numbers first, first + 1 …; nothing depends on which thread, block or launch draws one.

A block draws a tile of T rows and up to 4 · THREADS features at a time, four features of a row on a thread: it makes
four normals, which is one block of Philox in float32 and two in float64, leaves them in shared memory, and computes
four numbers of x = μ_k + L_k ε from all of the row's normals. x passes through shared memory too, so that consecutive
threads write consecutive numbers whatever the strides of `out`. Shared memory, row by row::

    ε, then x (T, S)   if they fit: L_k in columns (K or 1, rows, W), μ (K, W)

With more features than one tile holds, each panel of x draws the normals of the panels before it again: that is little
beside their products, and nothing has to be stored.

If the parameters fit into shared memory, a thread takes four neighbouring features, which are one vector, and leaves
out what lies above the diagonal of L. Otherwise L is read where it lies, and neighbouring threads take neighbouring
features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

from numba import cuda, types

from emalgam_kernels import scalars
from emalgam_kernels.numba_cuda.device import (
    NUMBA_REALS,
    REALS,
    Kernel,
    ascending,
    at,
    divided,
    flat,
    inlined,
    threads_per_block,
)
from emalgam_kernels.numba_cuda.fused import ALIGNMENT, VECTOR_BYTES, place_of_four
from emalgam_kernels.philox import LABELS

THREADS: Final = threads_per_block(256)
FEATURES_AT_ONCE: Final = 4  # of a thread
SUMS: Final = 5  # Σ d, Σ d², Σ c, Σ c², Σ d c
SUMS_SHARED: Final = SUMS * THREADS

uint64: Any = types.uint64  # the type as a conversion: of words and of what they are made from
_0, _1, _2 = uint64(0), uint64(1), uint64(2)
_STREAM_OF_LABELS: Final = uint64(LABELS)

philox, unit_integer, column_of = (inlined(each) for each in (scalars.philox, scalars.unit_integer, scalars.column_of))
unit_float64, unit_float32 = inlined(scalars.unit_float64), inlined(scalars.unit_float32)
_COS_SIN: Final = {"float64": inlined(scalars.cos_sin_float64), "float32": inlined(scalars.cos_sin_float32)}


class Size(NamedTuple):
    """The integers of a launch, in one argument.

    `groups` threads draw the D features of a row, or a panel of them, and T = ⌊THREADS / groups⌋ rows are a tile, whose
    rows are S numbers apart. L_k starts at k · `component`, its column j at j · W from there; μ_k is at `means` + k W.
    Of a stack of mixtures block z takes one: `parameters` numbers, and `table` ones of its labels, are each mixture's,
    and its samples begin `stride_mixture` after those of the one before.
    Flags (0 or 1): `antithetic`, `stratified`; `diagonal`: L_k is one column of diagonals; `labelled`: labels are
    wanted.
    """

    N: int
    D: int
    K: int
    T: int
    groups: int
    S: int
    W: int
    component: int
    means: int
    parameters: int
    table: int
    tiles: int
    stream: int
    stride_mixture: int
    stride_n: int
    stride_d: int
    stride_label: int
    antithetic: int
    stratified: int
    diagonal: int
    labelled: int


class Task(NamedTuple):
    """What a thread does in every tile: features `feature` + i · `step`, i < 4, of the panel's row n.

    `group` is its number among the threads of that row, `noise` where the row's normals are in shared memory, `panel`
    the panel's first feature, and `start` where the parameters are. `along`, `across`: the first number of the tile
    that it writes, on which row (column) of `length` numbers; `more`, `further`: how far the following one is.
    """

    n: int
    group: int
    feature: int
    step: int
    noise: int
    panel: int
    start: int
    by_row: bool
    length: int
    along: int
    across: int
    more: int
    further: int


# ---- words and uniforms


def words(out: Any, seed: int, stream: int, block: int, first: int, rows: int, row_stride: int, stride: int) -> None:
    """Four words of a row, as int32 of the same bits; thread: one row."""
    n = cuda.grid(1)
    if n < rows:
        a, b, c, d = philox(uint64(seed), uint64(stream), uint64(block), uint64(first) + uint64(n))
        out[at(n * row_stride)] = types.int32(a)
        out[at(n * row_stride + stride)] = types.int32(b)
        out[at(n * row_stride + 2 * stride)] = types.int32(c)
        out[at(n * row_stride + 3 * stride)] = types.int32(d)


def _uniforms(arithmetic: str) -> Callable[..., None]:
    single = arithmetic == "float32"

    def uniforms(out: Any, seed: int, stream: int, first: int, rows: int, stride: int) -> None:
        """The first uniform of a row's block 0; thread: one row."""
        n = cuda.grid(1)
        if n < rows:
            a, b, _, _ = philox(uint64(seed), uint64(stream), _0, uint64(first) + uint64(n))
            out[at(n * stride)] = unit_float32(a) if single else unit_float64(a, b)

    return uniforms


# ---- normals and labels


def _normals(arithmetic: str) -> Any:
    """The function that leaves four normals of a row in shared memory."""
    real, single, cos_sin = NUMBA_REALS[arithmetic], arithmetic == "float32", _COS_SIN[arithmetic]
    minus_two = real(-2)

    def box_muller(u_1: Any, u_2: Any) -> Any:
        # √(−2 ln u₁) cos 2πu₂, √(−2 ln u₁) sin 2πu₂
        radius = real(math.sqrt(minus_two * real(math.log(u_1))))
        cosine, sine = cos_sin(u_2)
        return radius * cosine, radius * sine

    pair = inlined(box_muller)

    def normals(shared: Any, place: int, seed: Any, row: Any, block: int, size: Size) -> None:
        """ε of features 4 · block … 4 · block + 3, from element `place` on; −ε in odd rows of antithetic draws."""
        values = cuda.local.array(4, real)
        drawn, odd = row >> uint64(size.antithetic), (row & uint64(size.antithetic)) != _0
        stream, word_block = uint64(size.stream), uint64(block) if single else _2 * uint64(block)
        a, b, c, d = philox(seed, stream, word_block, drawn)
        if single:
            values[0], values[1] = pair(unit_float32(a), unit_float32(b))
            values[2], values[3] = pair(unit_float32(c), unit_float32(d))
        else:
            values[0], values[1] = pair(unit_float64(a, b), unit_float64(c, d))
            a, b, c, d = philox(seed, stream, word_block + _1, drawn)
            values[2], values[3] = pair(unit_float64(a, b), unit_float64(c, d))
        for i in ascending(4):
            shared[at(place + i)] = -values[i] if odd else values[i]

    return inlined(normals)


@inlined
def _label(table: Any, seed: Any, row: Any, size: Size) -> Any:
    """The label of a row, which no float64 is needed for: `table` holds thresholds and aliases, or ends of strata."""
    if size.stratified:
        # the first k with i < ends_k, i = row mod n_total
        position = types.int64(row % uint64(table[at(size.K - 1)]))
        below, above = 0, size.K - 1
        while below < above:
            middle = (below + above) >> 1
            if position < table[at(middle)]:
                above = middle
            else:
                below = middle + 1
        return below
    if size.K == 1:
        return 0
    # column ⌊u₁ K⌋, kept if 2⁵³ u₂ < ⌈2⁵³ probability⌉
    a, b, c, d = philox(seed, _STREAM_OF_LABELS, _0, row)
    column = column_of(unit_integer(a, b), uint64(size.K))
    kept = types.int64(unit_integer(c, d)) < table[_2 * column]
    return types.int64(column) if kept else table[_2 * column + _1]


@inlined
def _draw_labels(component: Any, table: Any, labels: Any, seed: Any, first: Any, size: Size, tile: int) -> None:
    """Labels of the tile's rows, one on a thread."""
    thread, antithetic = cuda.threadIdx.x, uint64(size.antithetic)
    n = tile * size.T + thread
    if thread < size.T and n < size.N:
        label = _label(table, seed, (first + uint64(n)) >> antithetic, size)
        component[at(thread)] = label
        if size.labelled and cuda.blockIdx.y == 0:
            labels[at(n * size.stride_label)] = label


# ---- x = μ + L ε


@inlined
def _add_columns_nearby(shared: Any, sums: Any, noise: int, column: int, columns: int, size: Size) -> None:
    """Σ_j ε_j L[4 g … 4 g + 3, j] with both in shared memory, in vectors: `noise` and `column` count those."""
    normals, vectors = cuda.local.array(4, shared.dtype), shared.itemsize >> 2
    for _ in ascending(0, columns, 4):
        for j in ascending(4):
            normals[j] = shared[place_of_four(shared, noise, 1, j)]
        for j in ascending(4):
            for i in ascending(4):
                sums[i] += shared[place_of_four(shared, column, 1, i)] * normals[j]
            column += (size.W >> 2) * vectors
        noise += vectors


@inlined
def _add_columns_far(
    shared: Any, parameters: Any, sums: Any, noise: int, column: int, columns: int, ends: Any, size: Size
) -> None:
    """Σ_j ε_j L[g + i · groups, j] with L where it lies, for the j < ends_i in which it is not zero."""
    for j in range(columns):  # not `ascending`: registers would not suffice for as many blocks
        normal = shared[at(noise + j)]
        for i in ascending(4):
            if j < ends[i]:
                sums[i] += parameters[at(column + i * size.groups)] * normal
        column += size.W


@inlined
def _ends(ends: Any, columns: int, before: int, task: Task, size: Size) -> None:
    """How many columns of the panel `before` reach the thread's i-th feature: on the diagonal not all."""
    for i in ascending(4):
        ends[i] = min((i + 1) * size.groups, columns) if before == task.panel else columns
        if task.panel + task.feature + i * size.groups >= size.D:
            ends[i] = 0


@inlined
def _add_diagonal(shared: Any, parameters: Any, sums: Any, place: int, task: Task, size: Size) -> None:
    """l ε of the thread's features; what is past the last one nobody reads."""
    for i in ascending(4):
        d = min(task.feature + i * task.step, size.D - task.panel - 1)
        sums[i] += parameters[at(place + d)] * shared[at(task.noise + d)]


def _affine(arithmetic: str, nearby: bool) -> Any:
    """The function that adds to a thread's four features what the normals of one panel give."""
    vector = VECTOR_BYTES // REALS[arithmetic].itemsize

    def affine(shared: Any, parameters: Any, sums: Any, k: int, before: int, task: Task, size: Size) -> None:
        """μ_k with the first panel, and L_k ε."""
        place, first = task.start + k * size.component + task.panel, task.panel + task.feature
        if size.diagonal or before == 0:
            for i in ascending(4):
                d = min(first + i * task.step, size.W - 1)
                sums[i] = parameters[at(task.start + size.means + k * size.W + d)]
        if size.diagonal:
            _add_diagonal(shared, parameters, sums, place, task, size)
        elif nearby:
            place += task.feature
            (noise, _), (column, _) = divided(task.noise, vector), divided(place, vector)
            _add_columns_nearby(shared, sums, noise, column, task.feature + 4, size)
        else:
            ends, columns = cuda.local.array(4, types.int64), min(4 * size.groups, size.D - before)
            _ends(ends, columns, before, task, size)
            place += task.feature + before * size.W
            _add_columns_far(shared, parameters, sums, task.noise, place, columns, ends, size)

    return inlined(affine)


@inlined
def _write_tile(shared: Any, out: Any, tile: int, task: Task, size: Size) -> None:
    """x of a tile to `out`: consecutive threads to consecutive numbers of a row, or of a column where those are."""
    rows, features = min(size.T, size.N - tile * size.T), min(4 * size.groups, size.D - task.panel)
    along, across = task.along, task.across
    while across < (rows if task.by_row else features):
        n, d = (across, along) if task.by_row else (along, across)
        if n < rows:
            place = (tile * size.T + n) * size.stride_n + (task.panel + d) * size.stride_d
            out[at(place)] = shared[at(n * size.S + d)]
        along, across = along + task.more, across + task.further
        if along >= task.length:
            along, across = along - task.length, across + 1


def _task(nearby: bool) -> Any:
    """The function that says what a thread does. Its divisions are slow: not in every tile."""

    def task(size: Size) -> Task:
        thread, threads, panel = cuda.threadIdx.x, cuda.blockDim.x, cuda.blockIdx.y * 4 * size.groups
        n, group = divided(thread, size.groups)
        feature, step = (4 * group, 1) if nearby else (group, size.groups)
        by_row = size.stride_d < size.stride_n
        length = min(4 * size.groups, size.D - panel) if by_row else size.T
        (across, along), (further, more) = divided(thread, length), divided(threads, length)
        return Task(
            n=n, group=group, feature=feature, step=step,
            noise=n * size.S, panel=panel, start=size.T * size.S if nearby else 0,
            by_row=by_row, length=length,
            along=along, across=across, more=more, further=further,
        )  # fmt: skip

    return inlined(task)


@cache
def sample_kernel(arithmetic: str, nearby: bool) -> Kernel:
    """Samples of a mixture; `nearby`: the parameters fit into shared memory, and one panel holds all features."""
    real, leave_normals, affine = NUMBA_REALS[arithmetic], _normals(arithmetic), _affine(arithmetic, nearby)
    task_of = _task(nearby)

    def samples(parameters: Any, table: Any, out: Any, labels: Any, seed: int, first: int, size: Size) -> None:
        """Tiles of rows, (y) a panel of features, and (z) a mixture; thread: four features of a row."""
        shared = cuda.shared.array(0, real, alignment=ALIGNMENT)
        component = cuda.shared.array(THREADS, types.int64)
        sums = cuda.local.array(4, real)
        mixture = cuda.blockIdx.z
        own, x = parameters[mixture * size.parameters :], out[mixture * size.stride_mixture :]
        thresholds = table[mixture * size.table :]
        task, source = task_of(size), shared if nearby else own
        if nearby:
            for i in ascending(cuda.threadIdx.x, size.parameters, cuda.blockDim.x):
                shared[at(task.start + i)] = own[at(i)]
        for tile in ascending(cuda.blockIdx.x, size.tiles, cuda.gridDim.x):
            row = tile * size.T + task.n
            there = task.n < size.T and row < size.N
            _draw_labels(component, thresholds, labels, uint64(seed), uint64(first), size, tile)
            before = task.panel if size.diagonal else 0
            while before <= task.panel:
                cuda.syncthreads()
                if there:
                    place, block = task.noise + 4 * task.group, (before >> 2) + task.group
                    leave_normals(shared, place, uint64(seed), uint64(first) + uint64(row), block, size)
                cuda.syncthreads()
                if there:
                    affine(shared, source, sums, component[at(task.n)], before, task, size)
                before += 4 * size.groups
            cuda.syncthreads()
            if there:
                for i in ascending(4):
                    shared[at(task.noise + task.feature + i * task.step)] = sums[i]
            cuda.syncthreads()
            _write_tile(shared, x, tile, task, size)

    array, integers = flat(real), flat(types.int64)
    integer_tuple: Any = types.NamedUniTuple
    sizes = integer_tuple(types.int64, len(Size._fields), Size)
    signature = (array, integers, array, integers, types.uint64, types.uint64, sizes)
    name = f"samples, {arithmetic}, parameters in {'shared' if nearby else 'global'} memory"
    blocks = {"float32": 4, "float64": 3}[arithmetic]
    return Kernel(name, arithmetic, samples, signature, THREADS, blocks)


@cache
def word_kernel() -> Kernel:
    """Words of Philox: integers, and like float32 kernels without float64."""
    signature = (flat(types.int32), *(types.uint64,) * 4, *(types.int64,) * 3)
    return Kernel("words of Philox", "float32", words, signature, THREADS)


@cache
def uniform_kernel(arithmetic: str) -> Kernel:
    """Uniforms of one stream."""
    signature = (flat(NUMBA_REALS[arithmetic]), *(types.uint64,) * 3, *(types.int64,) * 2)
    return Kernel(f"uniforms, {arithmetic}", arithmetic, _uniforms(arithmetic), signature, THREADS)


# ---- sums of log ratios


def log_ratio_sums(logs: Any, partial: Any, width: int, rows: int, controlled: int) -> None:
    """Σ d, Σ d² and, if `controlled`, Σ c, Σ c², Σ d c of some rows (block x) of a pair (y), always in the same order.

    `logs` (2 or 4, pairs, width) are log p, log q and those of the control; d and c are their differences.
    """
    shared = cuda.shared.array(SUMS_SHARED, types.float64)
    sums = cuda.local.array(SUMS, types.float64)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    start, step = cuda.blockIdx.y * width, cuda.gridDim.y * width
    for i in ascending(SUMS):
        sums[i] = types.float64(0)
    for n in ascending(cuda.blockIdx.x * threads + thread, rows, cuda.gridDim.x * threads):
        place = start + n
        d = types.float64(logs[at(place)]) - types.float64(logs[at(place + step)])
        sums[0] += d
        sums[1] += d * d
        if controlled:
            c = types.float64(logs[at(place + 2 * step)]) - types.float64(logs[at(place + 3 * step)])
            sums[2] += c
            sums[3] += c * c
            sums[4] += d * c
    for i in ascending(SUMS):
        shared[at(i * threads + thread)] = sums[i]
    half = threads >> 1
    while half > 0:
        cuda.syncthreads()
        if thread < half:
            for i in ascending(SUMS):
                shared[at(i * threads + thread)] += shared[at(i * threads + thread + half)]
        half >>= 1
    if thread == 0:
        for i in ascending(SUMS):
            partial[at((cuda.blockIdx.x * cuda.gridDim.y + cuda.blockIdx.y) * SUMS + i)] = shared[at(i * threads)]


@cache
def sum_kernel(arithmetic: str) -> Kernel:
    """Sums over the log-densities of a chunk, which are of one type, in float64."""
    signature = (flat(NUMBA_REALS[arithmetic]), flat(types.float64), *(types.int64,) * 3)
    return Kernel(f"sums of log ratios, {arithmetic}", "float64", log_ratio_sums, signature, THREADS)


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    found = [word_kernel()]
    for arithmetic in REALS:
        found += [uniform_kernel(arithmetic), sum_kernel(arithmetic)]
        found += [sample_kernel(arithmetic, nearby) for nearby in (True, False)]
    return found
