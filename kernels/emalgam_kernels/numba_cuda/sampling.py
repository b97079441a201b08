"""Random numbers, samples of mixtures and Monte Carlo divergences on a GPU: the host's side of draws.py.

The functions are specified in `emalgam_kernels.reference.sampling`. Outputs are NumPy arrays, or all of them tensors on
the device, of any strides: those are written where they lie, on torch's current stream. NumPy arrays are drawn on the
device and cross the bus in pieces; `n_threads` copy them out of pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from emalgam_kernels import contract
from emalgam_kernels.monte_carlo import SUMS, SUMS_WITH_CONTROL
from emalgam_kernels.numba_cuda import draws, mixture, pairs, products
from emalgam_kernels.numba_cuda.device import (
    ARRAYS,
    REALS,
    SIMULATED,
    Kernel,
    default_device,
    explained,
    is_tensor,
    multiprocessors,
    on,
    require_on_device,
    require_one_place,
    span,
    upload,
    view,
)
from emalgam_kernels.numba_cuda.draws import FEATURES_AT_ONCE, THREADS, Size
from emalgam_kernels.numba_cuda.pairs import MOST_FEATURES, StackedDensity
from emalgam_kernels.numba_cuda.staging import Outbound, rows_of_a_piece
from emalgam_kernels.parameters import Direct, Packed, Sampler, take
from emalgam_kernels.philox import NORMALS
from emalgam_kernels.reference.sampling import ends_of_strata

NEARBY_BYTES: Final = 32 * 1024  # of parameters in shared memory: they leave room for as many blocks as registers do
BLOCKS_PER_MULTIPROCESSOR: Final = 8
BLOCKS_OF_A_SUM: Final = 2 if SIMULATED else 256  # whatever the device: the order of the sum
CHUNK_BYTES: int = 32 * 2**20  # L2 holds 40 MB on an A100, 50 MB on an H100; the order of a sum follows from it
WITH_CONTROL: Final = 4  # densities: p, q and the control's
ROWS_TOGETHER: Final = 2**16  # samples that do not fill a device: a chunk takes them of many pairs
MOST_PAIRS: Final = 2**15  # of a chunk: a grid may have 65535 blocks along y and z
ALL_BITS: Final = 2**64 - 1

# Draws rows from number `first` on into tensors on the device, as many as they have: (first, *tensors).
Drawing = Callable[..., None]


def kernels() -> list[Kernel]:
    """Every kernel of this file, for the compile gate."""
    return [*draws.kernels(), *pairs.kernels()]


def philox_words(seed: int, stream: int, block: int, first: int, out: np.ndarray) -> None:
    """The words of Philox4x32-10; see `emalgam_kernels.reference.sampling.philox_words`."""
    contract.philox_words(seed, stream, block, first, out, kinds=ARRAYS)
    require_on_device(out)

    def into(start: int, words: torch.Tensor) -> None:
        arguments = seed, stream, block, start, len(words), *words.stride()
        draws.word_kernel().launch(_blocks(len(words)), THREADS, view(span(words)), *arguments)

    signed: Any = out.view(torch.int32) if is_tensor(out) else out.view(np.int32)
    _draw(lambda _: into, first, (signed,))


def uniforms(seed: int, stream: int, first: int, out: np.ndarray) -> None:
    """Uniforms in (0, 1); see `emalgam_kernels.reference.sampling.uniforms`."""
    contract.uniforms(seed, stream, first, out, kinds=ARRAYS)
    require_on_device(out)
    kernel = draws.uniform_kernel(_name(_dtype(out)))

    def into(start: int, u: torch.Tensor) -> None:
        kernel.launch(_blocks(len(u)), THREADS, view(span(u)), seed, stream, start, len(u), u.stride(0))

    _draw(lambda _: into, first, (out,))


def normals(seed: int, stream: int, first: int, out: np.ndarray, n_threads: int = 1) -> None:
    """Standard normals, which are samples of N(0, I); see `emalgam_kernels.reference.sampling.normals`."""
    contract.normals(seed, stream, first, out, kinds=ARRAYS)
    require_on_device(out)
    D = out.shape[1]
    standard = Sampler(np.zeros((1, D)), np.ones((1, D)), np.ones(1))
    _draw(lambda device: Draws(standard, seed, "plain", _dtype(out), device, stream).into, first, (out,), n_threads)


def sample_mixture(
    sampler: Sampler,
    seed: int,
    first: int,
    out: np.ndarray,
    labels: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
) -> None:
    """Samples of a mixture; see `emalgam_kernels.reference.sampling.sample_mixture`."""
    contract.sample_mixture(sampler, seed, first, out, labels, draw, kinds=ARRAYS)
    require_one_place(out, labels)
    _draw(lambda device: Draws(sampler, seed, draw, _dtype(out), device).into, first, (out, labels), n_threads)


def kl_monte_carlo(
    sampler: Sampler,
    p: Packed | Direct,
    q: Packed | Direct,
    seed: int,
    first: int,
    n: int,
    out: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
    control: tuple[Packed, Packed] | None = None,
) -> None:
    """Sums of log p − log q over samples; see `emalgam_kernels.reference.sampling.kl_monte_carlo`.

    `out` may be a tensor on the device: then nothing waits for the sums. `n_threads` has nothing to do here.
    """
    contract.kl_monte_carlo(sampler, p, q, seed, first, n, out, draw, control, kinds=ARRAYS)
    require_on_device(out)
    place: Any = out
    device = place.device if is_tensor(out) else default_device()
    densities = (p, q) if control is None else (p, q, *control)
    with on(device), torch.no_grad(), explained("the samples of a chunk"):
        sums = torch.zeros((len(out), SUMS_WITH_CONTROL), dtype=torch.float64, device=device)
        if n > 0:
            _sum_log_ratios(sampler, densities, seed, first, n, draw, sums)
        found = sums[:, : SUMS if control is None else SUMS_WITH_CONTROL]
        if is_tensor(out):
            place.copy_(found)
        else:
            out[...] = found.cpu().numpy()


# ---- drawing where the results lie, or piece by piece


def _draw(prepare: Callable[[torch.device], Drawing], first: int, places: tuple[Any, ...], n_threads: int = 1) -> None:
    """Rows `first`, `first` + 1 … into NumPy arrays, or into tensors on the device; prepared once for all pieces."""
    n = len(places[0])
    if n == 0:
        return
    in_place = is_tensor(places[0])
    device = places[0].device if in_place else default_device()
    with on(device), torch.no_grad(), explained("what is drawn"):
        into = prepare(device)
        if in_place:
            into(first, *places)
            return
        rows = min(rows_of_a_piece(sum(place[:1].nbytes for place in places)), n)
        out = [Outbound(place, rows, device, n_threads) for place in places]
        for start in range(0, n, rows):
            count = min(rows, n - start)
            # New ones each time: those before may still be on their way.
            pieces = [torch.empty((count, *place.shape[1:]), dtype=_dtype(place), device=device) for place in places]
            into(first + start & ALL_BITS, *pieces)
            for each, piece in zip(out, pieces, strict=True):
                each.put(start, piece)
        for each in out:
            each.finish()


def _blocks(rows: int) -> int:
    """Blocks of one row a thread."""
    return -(-rows // THREADS)


def _name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def _dtype(array: Any) -> torch.dtype:
    """torch's name for the type of an array's numbers."""
    found: torch.dtype = array.dtype if is_tensor(array) else torch.from_numpy(np.empty(0, array.dtype)).dtype
    return found


# ---- samples


class Draws:
    """A mixture on the device, or a stack of them, ready to be drawn from.

    Parameters
    ----------
    sampler : Sampler
    seed : int
    draw : {"plain", "antithetic", "stratified"}
    dtype : torch.float64 or torch.float32
        Of the samples and of the arithmetic.
    device : torch.device
        The current one.
    stream : int
        Of the normals.
    """

    def __init__(
        self,
        sampler: Sampler,
        seed: int,
        draw: str,
        dtype: torch.dtype,
        device: torch.device,
        stream: int = NORMALS,
    ) -> None:
        sampler = sampler if sampler.means.ndim == 3 else take(sampler, None)  # a stack of one
        self.seed, (self.mixtures, K, D) = seed, sampler.means.shape
        columns, means = _parameters(sampler, dtype)
        numbers = np.concatenate([each.reshape(self.mixtures, -1) for each in (columns, means)], axis=1)
        groups = min(-(-D // FEATURES_AT_ONCE), THREADS)
        T, S = THREADS // groups, FEATURES_AT_ONCE * (groups | 1)
        self.panels = -(-D // (FEATURES_AT_ONCE * groups))
        count = numbers.shape[1]
        nearby = self.panels == 1 and count * dtype.itemsize <= NEARBY_BYTES
        self.shared_bytes = (T * S + (count if nearby else 0)) * dtype.itemsize
        self.kernel = draws.sample_kernel(_name(dtype), nearby)
        self.most_blocks = BLOCKS_PER_MULTIPROCESSOR * multiprocessors(device)
        table = _thresholds(sampler) if draw != "stratified" else ends_of_strata(sampler, seed)
        self.parameters = view(upload(numbers, dtype, device))
        self.table = view(upload(table, torch.int64, device))
        self.nothing = torch.zeros(1, dtype=torch.int64, device=device)
        self.size = Size(
            N=0, D=D, K=K, T=T, groups=groups, S=S, W=means.shape[-1],
            component=columns[0, 0].size if columns.shape[1] > 1 else 0, means=columns[:1].size, parameters=count,
            table=table.size // self.mixtures, tiles=0, stream=stream,
            stride_mixture=0, stride_n=0, stride_d=0, stride_label=0,
            antithetic=int(draw == "antithetic"), stratified=int(draw == "stratified"),
            diagonal=int(sampler.diagonal), labelled=0,
        )  # fmt: skip

    def into(self, first: int, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """The samples from number `first` on into x, (n, D) of any strides, or (B, n, D) for a stack.

        `labels`, (n,) int64, if anybody wants them.
        """
        rows = x.shape[-2]
        tiles = -(-rows // self.size.T)
        size = self.size._replace(
            N=rows, tiles=tiles, stride_mixture=x.stride(0) if x.ndim == 3 else 0, stride_n=x.stride(-2),
            stride_d=x.stride(-1), stride_label=0 if labels is None else labels.stride(0),
            labelled=int(labels is not None),
        )  # fmt: skip
        self.kernel.launch(
            (min(tiles, max(self.most_blocks // self.mixtures, 1)), self.panels, self.mixtures), THREADS,
            self.parameters, self.table, view(span(x)), view(self.nothing if labels is None else span(labels)),
            self.seed, first, size, shared_bytes=self.shared_bytes,
        )  # fmt: skip


def _parameters(sampler: Sampler, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The columns of each L_k, (B, K or 1, odd, W) with zeros where L has none, and μ (B, K, W), W a multiple of four.

    The odd number of columns lets threads of different components meet in different banks. Diagonal L: one column.
    """
    B, K, D = sampler.means.shape
    given = sampler.factors[:, :1] if sampler.factors.strides[1] == 0 else sampler.factors
    width, real = -(-D // FEATURES_AT_ONCE) * FEATURES_AT_ONCE, _name(dtype)
    means = np.zeros((B, K, width), real)
    means[:, :, :D] = sampler.means
    columns = np.zeros((*given.shape[:2], 1 if sampler.diagonal else width + 1, width), real)
    if sampler.diagonal:
        columns[:, :, 0, :D] = given
    else:
        columns[:, :, :D, :D] = np.tril(given).swapaxes(-1, -2)
    return columns, means


def _thresholds(sampler: Sampler) -> np.ndarray:
    """⌈2⁵³ probability⌉ and alias of each column, (B, K, 2) int64: an integer is below the one if below the product."""
    return np.stack([np.ceil(np.ldexp(sampler.table.probability, 53)), sampler.table.alias], axis=-1).astype(np.int64)


# ---- Monte Carlo sums


def _sum_log_ratios(
    sampler: Sampler,
    densities: tuple[Packed | Direct, ...],
    seed: int,
    first: int,
    n: int,
    draw: str,
    sums: torch.Tensor,
) -> None:
    """Add Σ d, Σ d², Σ c, Σ c², Σ d c of each pair to `sums` (B, 5), chunk by chunk: all are drawn into one memory.

    A chunk holds few samples of many pairs, or many of one. Which of the two follows from n and D alone, so that the
    sums of a pair do not depend on the pairs beside it.
    """
    arithmetics = {_arithmetic(each) for each in densities}
    row_bytes = REALS[_arithmetic(densities[0])].itemsize * (sampler.n_features + len(densities))
    rows, count = _rows_of_a_chunk(n, row_bytes), 1
    together = n <= ROWS_TOGETHER and sampler.n_features <= MOST_FEATURES and len(arithmetics) == 1
    if together:
        rows, count = n, min(max(CHUNK_BYTES // (n * row_bytes), 1), MOST_PAIRS)
    for start in range(0, len(sums), count):
        some = slice(start, min(start + count, len(sums)))
        own = take(sampler, some), tuple(take(each, some) for each in densities)
        Chunk(*own, seed, draw, rows, together, sums.device).add(first, n, sums[some])


class Chunk:
    """Memory for `rows` samples of each pair of a stack and for their log-densities, and what fills it."""

    def __init__(
        self,
        sampler: Sampler,
        densities: tuple[Packed | Direct, ...],
        seed: int,
        draw: str,
        rows: int,
        together: bool,
        device: torch.device,
    ) -> None:
        self.rows, self.pairs = rows, len(sampler.means)
        logs_type = max(_arithmetic(each) for each in densities)  # float64, if one of them is
        real, size = REALS[_arithmetic(densities[0])], (self.pairs, rows, sampler.n_features)
        x = torch.empty(size, dtype=real, device=device)
        self.logs = torch.empty((len(densities), self.pairs * rows), dtype=REALS[logs_type], device=device)
        self.blocks = min(BLOCKS_OF_A_SUM, -(-rows // THREADS))
        self.x, self.drawn = x, Draws(sampler, seed, draw, x.dtype, device)
        self.kernel = draws.sum_kernel(logs_type)
        self.passes = [
            StackedDensity(each, x).log_prob if together else _log_prob_of(mixture.Pass(x[0], take(each, 0)))
            for each in densities
        ]
        partial = torch.empty(self.blocks * self.pairs * draws.SUMS, dtype=torch.float64, device=device)
        self.partial, self.logs_view = view(partial), view(self.logs)

    def add(self, first: int, n: int, sums: torch.Tensor) -> None:
        """Add the sums of n samples of each pair, from number `first` on, to `sums` (pairs, 5)."""
        nothing, place, elements = view(torch.zeros_like(sums)), view(sums), sums.numel()
        add, controlled = products.accumulate_kernel("float64"), int(len(self.logs) == WITH_CONTROL)
        for start in range(0, n, self.rows):
            self.drawn.into(first + start & ALL_BITS, self.x)
            for log_prob, logs in zip(self.passes, self.logs, strict=True):
                log_prob(logs)
            self.kernel.launch(
                (self.blocks, self.pairs), THREADS,
                self.logs_view, self.partial, self.rows, min(self.rows, n - start), controlled,
            )  # fmt: skip
            add.launch(
                -(-elements // products.THREADS) + 1, products.THREADS,
                self.partial, nothing, place, nothing, elements, self.blocks, 0,
            )  # fmt: skip


def _log_prob_of(whole: mixture.Pass) -> Callable[[torch.Tensor], None]:
    """What puts the log-densities of a pass into a tensor."""
    return lambda out: whole.run(None, log_prob=out)


def _arithmetic(parameters: Packed | Direct) -> str:
    """The type that a tile is computed in."""
    return "float64" if parameters.arithmetic == "float64" else "float32"


def _rows_of_a_chunk(n: int, row_bytes: int) -> int:
    """As many rows as L2 holds, or so many fewer that all chunks are as long: every chunk is drawn as a whole."""
    chunks = -(-n // max(CHUNK_BYTES // row_bytes, 1))
    return -(-n // chunks)
