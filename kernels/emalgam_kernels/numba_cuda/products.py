"""Packed parameters with many statistics or components: cuBLAS products over chunks of rows that stay in the L2 cache.

For each chunk of C rows, all matrices feature-major or component-major, so that neighbouring threads touch neighbouring
rows of the data:

1. z = ((x − shift₀) − shift₁) · scale goes straight to the linear rows of Φ (F, C); then z W, if there is a whitening;
2. the quadratic rows of Φ are products of its linear rows;
3. L = η Φ, (K, C);
4. R = ω softmax_k(L), where L was, and log p(x_n);
5. S += R Φᵀ, in parts of `ROWS_OF_A_SUM` rows that are added in float64: float32 arithmetic loses no more than such a
   part costs, and a product with few outputs is spread over the device without leaving the order of the sum to cuBLAS.

Φ and L of a chunk take half of L2; more only where that is too little for products that keep the device busy
(`rows_of_a_chunk`). Columns past the last row have weight zero. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numba import cuda, types

from emalgam_kernels.numba_cuda import device
from emalgam_kernels.numba_cuda.device import NUMBA_REALS, REALS, Kernel, ascending, at, flat, inlined, integers_of
from emalgam_kernels.numba_cuda.problem import Frame, PackedProblem, Results

SHARE_OF_CACHE: Final = 0.5  # of L2, for a chunk's features and logits; the rest is for x, η, R Φᵀ and what is written
TILE_OF_A_PRODUCT: Final = 128  # rows and columns of a product that cuBLAS gives to a multiprocessor
MOST_ROWS: int = 2**18  # of a chunk
ROWS_OF_A_SUM: int = 1024
# Of the matrices' columns: whole blocks of every kernel, and rows aligned for cuBLAS. Small where threads are slow.
COLUMN_STEP: Final = 32 if device.SIMULATED else 256

THREADS: Final = 8 if device.SIMULATED else 256  # of a block whose threads take many elements each
FULL: Final = 8  # blocks of so many threads are all that a multiprocessor runs, if registers allow it
PANEL: Final = 32  # features of a tile of x at most
TILE: Final = 1024  # numbers of a tile of x
TILE_SHARED: Final = TILE + PANEL  # with the padding against bank conflicts
GROUP: Final = 4  # rows of Φ that share what they read
MOST_LANES: Final = 16


# ---- chunks


class Chunk(NamedTuple):
    """`rows` rows of x from row `first` on, in matrices of `width` ≥ rows columns, `parts` sums of equal length."""

    first: int
    rows: int
    width: int
    parts: int


def padded(rows: int) -> int:
    """The columns that `rows` rows take: whole sums, or one short sum."""
    step = COLUMN_STEP if rows <= ROWS_OF_A_SUM else ROWS_OF_A_SUM
    return -(-rows // step) * step


def parts_of(width: int) -> int:
    """How many sums in the arithmetic dtype a chunk is divided into."""
    return max(width // ROWS_OF_A_SUM, 1)


def rows_of_a_chunk(samples: Samples, numbers: int, outputs: int, arithmetic: str) -> int:
    """How many columns the matrices have: what L2 holds, or what gives every multiprocessor a tile of a product.

    With many statistics and few components L2 holds so few columns that most multiprocessors would have no part of
    L = η Φ: there the products' arithmetic is worth more than the cache.

    Parameters
    ----------
    samples : Samples
    numbers, outputs : int
        What a row takes in memory, and what its product has for it.
    arithmetic : {"float32", "float64"}
    """
    in_cache = int(SHARE_OF_CACHE * device.cache_bytes(samples.device)) // (REALS[arithmetic].itemsize * numbers)
    tiles = -(-device.multiprocessors(samples.device) // -(-outputs // TILE_OF_A_PRODUCT))
    rows = min(max(in_cache, tiles * TILE_OF_A_PRODUCT), MOST_ROWS)
    return min(max(rows // ROWS_OF_A_SUM, 1) * ROWS_OF_A_SUM, padded(samples.n))


def chunks(n: int, columns: int) -> Iterator[Chunk]:
    """All n rows in chunks of `columns`; the last may be narrower."""
    for first in range(0, n, columns):
        rows = min(columns, n - first)
        width = padded(rows)
        yield Chunk(first, rows, width, parts_of(width))


# ---- kernels: the frame and the features


class Source(NamedTuple):
    """Where `frame` finds x and where it puts z: strides of x, whether rows have weights, the first element of z.

    A tile has 2^`panel_bits` features and 2^`tile_bits` rows.
    """

    row_stride: int
    feature_stride: int
    weighted: int
    D: int
    offset: int
    panel_bits: int
    tile_bits: int


def _frame(sample: str, arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero = real(0)
    two_parts = arithmetic == "float32"  # the second part of a float64 shift is zero

    def frame(x: Any, shift: Any, scale: Any, weight: Any, out: Any, source: Source, chunk: Chunk) -> None:
        """z of a tile of rows and features, turned in shared memory so that both sides are coalesced."""
        tile = cuda.shared.array(TILE_SHARED, real)
        D, row_stride, feature_stride = source.D, source.row_stride, source.feature_stride
        panel, columns = 1 << source.panel_bits, 1 << source.tile_bits
        first_column, first_feature = cuda.blockIdx.x * columns, cuda.blockIdx.y * PANEL
        # z = ((x − shift₀) − shift₁) · scale, rounded once (Knuth's two-sum); 0 for rows of weight zero, which may hold
        # anything, and past the last one
        for t in ascending(cuda.threadIdx.x, panel * columns, cuda.blockDim.x):
            if feature_stride <= row_stride:
                column, i = t >> source.panel_bits, t & (panel - 1)
            else:
                column, i = t & (columns - 1), t >> source.tile_bits
            n, d = first_column + column, first_feature + i
            z = zero
            if d < D and n < chunk.rows and (source.weighted == 0 or weight[at(chunk.first + n)] != zero):
                value = real(x[at((chunk.first + n) * row_stride + d * feature_stride)])
                centred = value - shift[at(d)]
                if two_parts:
                    back = centred - value
                    error = (value - (centred - back)) - (shift[at(d)] + back)
                    centred += error - shift[at(D + d)]
                z = centred * scale[at(d)]
            tile[at(i * (columns + 1) + column)] = z
        cuda.syncthreads()
        for t in ascending(cuda.threadIdx.x, panel * columns, cuda.blockDim.x):
            column, i = t & (columns - 1), t >> source.tile_bits
            if first_feature + i < D and first_column + column < chunk.width:
                place = source.offset + (first_feature + i) * chunk.width + first_column + column
                out[at(place)] = tile[at(i * (columns + 1) + column)]

    return frame


def _full_features(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]

    def full_features(phi: Any, D: int, width: int) -> None:
        """φ = z_i z_j for `GROUP` rows i; thread: one column. The longest rows go first."""
        column = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if column >= width:
            return
        linear = ((D * (D + 1)) >> 1) * width + column
        first = (cuda.gridDim.y - 1 - cuda.blockIdx.y) * GROUP
        z = cuda.local.array(GROUP, real)
        starts = cuda.local.array(GROUP, types.int64)
        ends = cuda.local.array(GROUP, types.int64)
        for g in ascending(GROUP):
            i = first + g
            z[g] = phi[at(linear + min(i, D - 1) * width)]
            starts[g] = ((i * (i + 1)) >> 1) * width + column
            ends[g] = i if i < D else -1
        # φ_{i(i+1)/2 + j} = z_i z_j, i ≥ j
        row = 0
        for j in ascending(min(first + GROUP, D)):
            z_j = phi[at(linear + row)]
            for g in ascending(GROUP):
                if j <= ends[g]:
                    phi[at(starts[g] + row)] = z[g] * z_j
            row += width

    return full_features


def _spherical_features(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero = real(0)

    def spherical_features(phi: Any, D: int, width: int) -> None:
        """φ_0 = ‖z‖²; thread: one column."""
        column = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if column >= width:
            return
        # ‖z‖² = Σ_d z_d²
        total = zero
        for d in ascending(1, D + 1):
            z = phi[at(d * width + column)]
            total += z * z
        phi[at(column)] = total

    return spherical_features


# ---- kernels: the posterior


@inlined
def _sum_up(values: Any, thread: int, count: int) -> None:
    """values[0] becomes Σ values[:count] as a tree, in shared memory; `count` is a power of two, `thread` from 0 on."""
    cuda.syncthreads()
    half = count >> 1
    while half > 0:
        if thread < half:
            values[at(thread)] += values[at(thread + half)]
        cuda.syncthreads()
        half >>= 1


class Wanted(NamedTuple):
    """What `softmax` is to do. Flags (0 or 1): `weighted`: rows have weights; `hard`: all to the first largest logit;
    `plain`: r instead of ω r; `log_prob`: write log p.
    """

    K: int
    weighted: int
    hard: int
    plain: int
    log_prob: int


def _softmax(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero, one, lowest = real(0), real(1), real(-np.inf)
    most_threads = _softmax_threads()

    def softmax(logits: Any, weight: Any, log_prob: Any, terms: Any, wanted: Wanted, chunk: Chunk) -> None:
        """ω r_nk or r_nk where L_nk was; log p(x_n); Σ ω log p of the block to `terms`.

        Block: columns × lanes; a lane takes every so many'th component.
        """
        largest = cuda.shared.array(most_threads, real)
        winners = cuda.shared.array(most_threads, types.int32)
        sums = cuda.shared.array(most_threads, real)
        K, width = wanted.K, chunk.width
        c, lane, columns, lanes = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.x, cuda.blockDim.y
        column = cuda.blockIdx.x * columns + c
        # max_k L_nk, and the first k that has it
        top, winner = lowest, lane
        for k in ascending(lane, K, lanes):
            logit = logits[at(k * width + column)]
            if logit > top:
                top, winner = logit, k
        largest[at(lane * columns + c)], winners[at(lane * columns + c)] = top, winner
        cuda.syncthreads()
        for other in ascending(lanes):
            logit, k = largest[at(other * columns + c)], winners[at(other * columns + c)]
            if logit > top or (logit == top and k < winner):
                top, winner = logit, k
        # Σ_k exp(L_nk − max L)
        total = one
        if wanted.hard == 0:
            total = zero
            for k in ascending(lane, K, lanes):
                total += real(math.exp(logits[at(k * width + column)] - top))
            sums[at(lane * columns + c)] = total
            cuda.syncthreads()
            total = zero
            for other in ascending(lanes):
                total += sums[at(other * columns + c)]
        # ω r_nk = ω exp(L_nk − max L) / Σ
        omega = zero
        if column < chunk.rows:
            omega = weight[at(chunk.first + column)] if wanted.weighted else one
        inverse, factor = one / total, one if wanted.plain else omega
        for k in ascending(lane, K, lanes):
            won = one if k == winner else zero
            r = won if wanted.hard else real(math.exp(logits[at(k * width + column)] - top)) * inverse
            logits[at(k * width + column)] = r * factor
        # log p(x_n) = max L + log Σ, and Σ_n ω log p(x_n) as a tree
        cuda.syncthreads()
        if lane == 0:
            log_p = top + real(math.log(total))
            if wanted.log_prob and column < chunk.rows:
                log_prob[at(chunk.first + column)] = log_p
            sums[at(c)] = omega * log_p if omega != zero else zero
        _sum_up(sums, lane * columns + c, columns)
        if lane == 0 and c == 0:
            terms[at(cuda.blockIdx.x)] = sums[0]

    return softmax


def _responsibilities(arithmetic: str) -> Callable[..., None]:
    real = NUMBA_REALS[arithmetic]
    zero, one = real(0), real(1)

    def responsibilities(r: Any, weight: Any, out: Any, K: int, weighted: int, chunk: Chunk) -> None:
        """r (K, width) to rows of `out` (n, K), turned in shared memory; r becomes ω r."""
        tile = cuda.shared.array(TILE_SHARED, real)
        first_column, first_component = cuda.blockIdx.x * 32, cuda.blockIdx.y * 32
        for t in ascending(cuda.threadIdx.x, 1024, cuda.blockDim.x):
            column, k = first_column + (t & 31), first_component + (t >> 5)
            if k < K:
                value = r[at(k * chunk.width + column)]
                tile[at((t >> 5) * 33 + (t & 31))] = value
                omega = zero
                if column < chunk.rows:
                    omega = weight[at(chunk.first + column)] if weighted else one
                r[at(k * chunk.width + column)] = omega * value
        cuda.syncthreads()
        for t in ascending(cuda.threadIdx.x, 1024, cuda.blockDim.x):
            column, k = first_column + (t >> 5), first_component + (t & 31)
            if k < K and column < chunk.rows:
                out[at((chunk.first + column) * K + k)] = tile[at((t & 31) * 33 + (t >> 5))]

    return responsibilities


# ---- kernels: the sums in float64


def accumulate(partial: Any, terms: Any, statistics: Any, total: Any, elements: int, parts: int, n_terms: int) -> None:
    """S += Σ_parts partial (parts, elements); the last block: total += Σ terms. Always in the same order."""
    sums = cuda.shared.array(THREADS, types.float64)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    value = types.float64(0)
    if cuda.blockIdx.x < cuda.gridDim.x - 1:
        element = cuda.blockIdx.x * threads + thread
        if element < elements:
            for part in ascending(parts):
                value += partial[at(part * elements + element)]
            statistics[at(element)] += value
        return
    for term in ascending(thread, n_terms, threads):
        value += terms[at(term)]
    sums[at(thread)] = value
    _sum_up(sums, thread, threads)
    if thread == 0:
        total[0] += sums[0]


# ---- kernels: their signatures


def integers(count: int) -> tuple[Any, ...]:
    """The types of `count` integer arguments."""
    return (types.int64,) * count


@cache
def frame_kernel(sample: str, arithmetic: str) -> Kernel:
    """x of one type into the frame in another."""
    real = flat(NUMBA_REALS[arithmetic])
    signature = (flat(NUMBA_REALS[sample]), real, real, real, real, integers_of(Source), integers_of(Chunk))
    name = f"frame, {sample} samples, {arithmetic}"
    return Kernel(name, arithmetic, _frame(sample, arithmetic), signature, THREADS, FULL)


@cache
def feature_kernel(feature_map: str, arithmetic: str) -> Kernel:
    """The quadratic rows of Φ, for the maps that torch has no operation for."""
    factory = {"full": _full_features, "spherical": _spherical_features}[feature_map]
    signature = (flat(NUMBA_REALS[arithmetic]), *integers(2))
    return Kernel(f"{feature_map} features, {arithmetic}", arithmetic, factory(arithmetic), signature, THREADS)


@cache
def softmax_kernel(arithmetic: str) -> Kernel:
    """L to ω r and log p."""
    signature = (*(flat(NUMBA_REALS[arithmetic]),) * 4, integers_of(Wanted), integers_of(Chunk))
    blocks = {"float32": 3, "float64": 2}[arithmetic]  # with one more registers spill
    return Kernel(f"softmax, {arithmetic}", arithmetic, _softmax(arithmetic), signature, _softmax_threads(), blocks)


@cache
def responsibilities_kernel(arithmetic: str) -> Kernel:
    """r to rows, and ω r."""
    signature = (*(flat(NUMBA_REALS[arithmetic]),) * 3, *integers(2), integers_of(Chunk))
    function = _responsibilities(arithmetic)
    return Kernel(f"responsibilities, {arithmetic}", arithmetic, function, signature, THREADS, FULL)


@cache
def accumulate_kernel(arithmetic: str) -> Kernel:
    """Sums of a chunk in its arithmetic type to those of all chunks in float64."""
    double, real = flat(types.float64), flat(NUMBA_REALS[arithmetic])
    return Kernel(f"sums of {arithmetic}", "float64", accumulate, (real, real, double, double, *integers(3)), THREADS)


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    found = [frame_kernel("float32", "float64")]
    for arithmetic in REALS:
        found += [
            frame_kernel(arithmetic, arithmetic),
            feature_kernel("full", arithmetic),
            feature_kernel("spherical", arithmetic),
            softmax_kernel(arithmetic),
            responsibilities_kernel(arithmetic),
            accumulate_kernel(arithmetic),
        ]
    return found


def _softmax_threads() -> int:
    return device.threads_per_block(32 * MOST_LANES)


# ---- the samples, and what becomes of them


class Samples:
    """x and its weights as the kernels take them.

    Parameters
    ----------
    x : (n, D) float32 or float64 of any strides
    weight : (n,) of the arithmetic dtype, contiguous, or None
    frame : Frame
    arithmetic : {"float32", "float64"}
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor | None, frame: Frame, arithmetic: str) -> None:
        self.n, self.D = x.shape
        self.device = x.device
        self.weighted = int(weight is not None)
        nothing = torch.empty(1, dtype=REALS[arithmetic], device=x.device)
        self.nothing = device.view(nothing)
        self.weight = self.nothing if weight is None else device.view(weight)
        self._sources = device.view(device.span(x)), device.view(frame.shift), device.view(frame.scale)
        self._kernel = frame_kernel(str(x.dtype).removeprefix("torch."), arithmetic)
        panel_bits = (min(self.D, PANEL) - 1).bit_length()
        tile_bits = TILE.bit_length() - 1 - panel_bits
        self._columns = 1 << tile_bits
        self._source = Source(x.stride(0), x.stride(1), self.weighted, self.D, 0, panel_bits, tile_bits)

    def into_frame(self, chunk: Chunk, out: Any, offset: int = 0) -> None:
        """z of a chunk, (D, width) from element `offset` of the view `out` on."""
        grid = -(-chunk.width // self._columns), -(-self.D // PANEL)
        source = self._source._replace(offset=offset)
        self._kernel.launch(grid, THREADS, *self._sources, self.weight, out, source, chunk)


class Posterior:
    """From logits to responsibilities, log p and the sums over rows.

    Parameters
    ----------
    samples : Samples
    K, columns : int
        Components, and columns of a chunk at most.
    hard : bool
        As in `em_statistics`.
    results : Results
    arithmetic : {"float32", "float64"}

    Attributes
    ----------
    logits : (K · columns,) of the arithmetic dtype
        Of a chunk, (K, width); after `of` ω r.
    view
        `logits` as the kernels take it.
    """

    def __init__(self, samples: Samples, K: int, columns: int, hard: bool, results: Results, arithmetic: str) -> None:
        self.samples, self.K = samples, K
        plain, log_prob = (int(result is not None) for result in (results.responsibilities, results.log_prob))
        self._wanted = Wanted(K, samples.weighted, int(hard), plain, log_prob)
        self._softmax, self._rows, self._accumulate = (
            kernel(arithmetic) for kernel in (softmax_kernel, responsibilities_kernel, accumulate_kernel)
        )
        self.lanes = 1 if K < 16 else 8 if K < 256 else MOST_LANES
        threads = _softmax_threads() if self.lanes == MOST_LANES else THREADS
        self.lanes = min(self.lanes, 4) if device.SIMULATED else self.lanes
        self.block = threads // self.lanes, self.lanes
        self.logits = torch.empty(K * columns, dtype=REALS[arithmetic], device=samples.device)
        self.view = device.view(self.logits)
        self.terms = device.view(self.logits.new_empty(columns // self.block[0]))
        self._log_prob, self._responsibilities = (
            samples.nothing if result is None else device.view(result)
            for result in (results.log_prob, results.responsibilities)
        )
        sums = results.sums
        self._sums = None if sums is None else (device.view(sums.statistics), device.view(sums.total))

    def of(self, chunk: Chunk) -> None:
        """L of a chunk becomes ω r; log p and r go where they are wanted."""
        samples, wanted = self.samples, self._wanted
        self._softmax.launch(
            chunk.width // self.block[0], self.block,
            self.view, samples.weight, self._log_prob, self.terms, wanted, chunk,
        )  # fmt: skip
        if wanted.plain:
            self._rows.launch(
                (chunk.width // 32, -(-self.K // 32)), THREADS,
                self.view, samples.weight, self._responsibilities, self.K, samples.weighted, chunk,
            )  # fmt: skip

    def add(self, chunk: Chunk, partial: Any, elements: int) -> None:
        """S and the total grow by those of a chunk: `partial`, a view of (parts, elements), and its log p."""
        if self._sums is None:
            raise ValueError("this pass was not asked for sums")
        threads, n_terms = THREADS, chunk.width // self.block[0]
        self._accumulate.launch(
            -(-elements // threads) + 1, threads,
            partial, self.terms, *self._sums, elements, chunk.parts, n_terms,
        )  # fmt: skip


# ---- one pass


class _Matrices:
    """The scratch of a call as the matrices of one width; all are views of the same memory."""

    def __init__(self, scratch: _Scratch, width: int, parts: int) -> None:
        F, K, D = scratch.F, scratch.K, scratch.D
        rows = width // parts
        phi = scratch.phi[: F * width].view(F, width)
        phi[-1].fill_(1)
        self.features = phi
        self.quadratic, self.linear = phi[: F - D - 1], phi[F - D - 1 : F - 1]
        self.plain = None if scratch.plain is None else scratch.plain[: D * width].view(D, width)
        self.logits = scratch.posterior.logits[: K * width].view(K, width)
        self.parts_of_r = self.logits.view(K, parts, rows).permute(1, 0, 2)
        self.parts_of_phi = phi.view(F, parts, rows).permute(1, 2, 0)
        self.partial = None if scratch.partial is None else scratch.partial[: parts * K * F].view(parts, K, F)


class _Scratch:
    """The memory of a call, and the steps of a chunk in it."""

    def __init__(self, samples: Samples, problem: PackedProblem, results: Results) -> None:
        self.samples, self.problem = samples, problem
        self.K, self.F, self.D = problem.n_components, problem.n_statistics, samples.D
        K, F = self.K, self.F
        self.columns = rows_of_a_chunk(samples, F + K, K, problem.arithmetic)
        self.posterior = Posterior(samples, K, self.columns, problem.hard, results, problem.arithmetic)
        like, parts = self.posterior.logits, parts_of(self.columns)
        self.phi = like.new_empty(F * self.columns)
        self.plain = None if problem.whitening is None else like.new_empty(self.D * self.columns)
        self.partial = None if results.sums is None else like.new_empty(parts * K * F)
        self.phi_view = device.view(self.phi)
        self.plain_view = None if self.plain is None else device.view(self.plain)
        self.partial_view = None if self.partial is None else device.view(self.partial)

    def features(self, chunk: Chunk, matrices: _Matrices) -> None:
        """Φ of a chunk."""
        whitening, width = self.problem.whitening, chunk.width
        if whitening is None or matrices.plain is None:
            self.samples.into_frame(chunk, self.phi_view, (self.F - self.D - 1) * width)
        else:
            # z W, feature-major: Wᵀ z
            self.samples.into_frame(chunk, self.plain_view)
            torch.matmul(whitening.T, matrices.plain, out=matrices.linear)
        feature_map = self.problem.feature_map
        if feature_map == "diag":
            torch.mul(matrices.linear, matrices.linear, out=matrices.quadratic)
            return
        threads = COLUMN_STEP
        groups = -(-self.D // GROUP) if feature_map == "full" else 1
        kernel = feature_kernel(feature_map, self.problem.arithmetic)
        kernel.launch((-(-width // threads), groups), threads, self.phi_view, self.D, width)

    def statistics(self, chunk: Chunk, matrices: _Matrices) -> None:
        """S += R Φᵀ, part by part."""
        if matrices.partial is not None:
            torch.bmm(matrices.parts_of_r, matrices.parts_of_phi, out=matrices.partial)
            self.posterior.add(chunk, self.partial_view, self.K * self.F)


def run(x: torch.Tensor, weight: torch.Tensor | None, problem: PackedProblem, results: Results) -> None:
    """One pass over rows on the device, which is the current one of torch and Numba.

    Parameters
    ----------
    x : (n, D) float32 or float64 of any strides
        Of the arithmetic dtype, or float32.
    weight : (n,) of the arithmetic dtype, contiguous, or None
        ω_n; None means ones. A row of weight zero may hold anything: its own log p and r are then those of z = 0.
    problem : PackedProblem
    results : Results
        Receive what is wanted; S and the total are added to.
    """
    if len(x) == 0:
        return
    scratch = _Scratch(Samples(x, weight, problem.frame, problem.arithmetic), problem, results)
    matrices: _Matrices | None = None
    with torch.no_grad(), device.float32_products(problem.tf32):
        for chunk in chunks(len(x), scratch.columns):
            if matrices is None or matrices.features.shape[1] != chunk.width:
                matrices = _Matrices(scratch, chunk.width, chunk.parts)
            scratch.features(chunk, matrices)
            # L = η Φ
            torch.matmul(problem.natural, matrices.features, out=matrices.logits)
            scratch.posterior.of(chunk)
            scratch.statistics(chunk, matrices)
