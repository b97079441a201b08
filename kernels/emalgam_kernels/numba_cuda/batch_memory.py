"""Where the numbers of a problem are while it is fitted, and how its samples get there.

A block has one problem at a time. Its samples pass through a tile of T rows in shared memory as often as a fit goes
over them, and are put into the frame on the way: nothing of length N is kept. The tile, feature-major::

    y = (z, 1, 0 …) (P, T)   ω (T)   ω log p (T)   ω times the entropy of r (T)

The means μ_k are stored as (μ_k, 0, 0 …), so that y − μ_k = (z − μ_k, 1, 0 …). All else that a problem has, `Places`,
is in shared memory too if it fits, else in the block's part of a workspace.

Covariances are packed lower triangles, row by row, or rows of variances (``full`` of `Size` is 0); M numbers each.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from numba import cuda, types

from emalgam_kernels.numba_cuda.device import SIMULATED, ascending, at, inlined

int64: Any = types.int64  # the type as a conversion

LOG_CHUNK: Final = 3
CHUNK: Final = 1 << LOG_CHUNK  # rows whose masses a thread adds when an index is drawn
LANES: Final = 4 if SIMULATED else 32
SUMS_AT_ONCE: Final = 8 if SIMULATED else 64  # partial sums of all statistics, until there are more statistics
OF_A_TASK: Final = 17  # numbers: 16 sums; an odd number lets neighbouring threads meet in different banks

# Of each feature in a frame: z = ((x − middle) · coarse − mean) · finer = (x − shift) · scale.
MIDDLE, COARSE, MEAN, FINER, SHIFT, SCALE, FLOOR, ADDED, PIVOT, CLOSENESS = range(10)
OF_A_FEATURE: Final = 10
# What becomes of a covariance in an M-step.
PENDING, BROAD, NARROW, KEPT = 0.0, 1.0, 2.0, 3.0


class Places(NamedTuple):
    """Where the numbers of a problem begin, in elements of the block's memory.

    `sums` also holds what is not needed at the same time: the ranges of features, potentials of candidates, and L.
    """

    frame: int  # (D, OF_A_FEATURE)
    weights: int  # (K,)
    means: int  # (K, P)
    covariances: int  # (C, M)
    factors: int  # (C, Q, Q): column j of L⁻¹ is row j, zeros above the diagonal; or (C, D)
    constants: int  # (K,)
    masses: int  # (K,)
    states: int  # (C,)
    statistics: int  # (K, F)
    lanes: int  # (2, LANES)
    candidates: int  # (K, P)
    targets: int  # (K,)
    picks: int  # (K,)
    chunks: int  # (T / CHUNK,)
    lasts: int  # (T / CHUNK,)
    logits: int  # (K, T)
    sums: int


class Size(NamedTuple):
    """The integers of a launch, in one argument. Flags are 0 or 1.

    `full`: covariances are matrices; `shared`: components share one covariance; `isotropic`: features share one
    variance; `single`: x is float32. `B` problems of up to `K` components. D features are padded to P > D and Q ≥ D,
    multiples of 4. M are the numbers of a covariance, and the first of the F statistics of a component; the others are
    those of (z − μ, 1). A problem has C covariances, of `covariance_width` numbers in the result. `memory`: numbers of
    a block's part of the workspace.
    """

    full: int
    B: int
    D: int
    K: int
    T: int
    log_T: int  # noqa: N815
    P: int
    Q: int
    M: int
    F: int
    C: int
    covariance_width: int
    row_stride: int
    feature_stride: int
    single: int
    ordered: int
    weighted: int
    shared: int
    isotropic: int
    aic: int
    icl: int
    n_init: int
    max_iter: int
    memory: int
    places: Places


_PLACES: Final = len(Size._fields) - 1
N_INTEGERS: Final = _PLACES + len(Places._fields)


def integers_of(size: Size) -> list[int]:
    """All in one list, as `unpacked` takes them."""
    numbers: Any = size[:_PLACES]
    return [*numbers, *size.places]


@inlined
def unpacked(sizes: Any) -> Size:
    """The integers of a launch from shared memory, anew for each step of a fit.

    In registers for a whole fit, they and all that follows from them would leave none for the arithmetic: the compiler
    takes what does not change out of every loop.
    """
    s = sizes
    places = Places(
        s[_PLACES], s[_PLACES + 1], s[_PLACES + 2], s[_PLACES + 3], s[_PLACES + 4], s[_PLACES + 5], s[_PLACES + 6],
        s[_PLACES + 7], s[_PLACES + 8], s[_PLACES + 9], s[_PLACES + 10], s[_PLACES + 11], s[_PLACES + 12],
        s[_PLACES + 13], s[_PLACES + 14], s[_PLACES + 15], s[_PLACES + 16],
    )  # fmt: skip
    return Size(
        s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16],
        s[17], s[18], s[19], s[20], s[21], s[22], s[23], places,
    )  # fmt: skip


# What the steps of a fit call. In the simulator it would take longer than they do: there a kernel unpacks once.
size_of: Final = inlined(lambda sizes: sizes) if SIMULATED else unpacked


class Samples(NamedTuple):
    """Where the samples of a problem are: `n` of them from number `first` on. Either x64 or x32 is x."""

    x64: Any
    x32: Any
    order: Any
    weight: Any
    first: int
    n: int
    largest: float  # weight; weights are divided by it, so that their sum does not overflow


# ---- samples


@inlined
def row_of(samples: Samples, size: Size, n: int) -> int:
    """The row of x that sample n of the problem is."""
    if size.ordered:
        return samples.order[at(samples.first + n)]
    return samples.first + n


@inlined
def number(samples: Samples, size: Size, row: int, d: int) -> Any:
    """x_d of a row, in float64."""
    place = at(row * size.row_stride + d * size.feature_stride)
    if size.single:
        return types.float64(samples.x32[place])
    return samples.x64[place]


@inlined
def in_frame(samples: Samples, memory: Any, size: Size, row: int, d: int) -> Any:
    """z_d = ((x_d − middle) · coarse − mean) · finer."""
    place = size.places.frame + d * OF_A_FEATURE
    coarse = (number(samples, size, row, d) - memory[at(place + MIDDLE)]) * memory[at(place + COARSE)]
    return (coarse - memory[at(place + MEAN)]) * memory[at(place + FINER)]


@inlined
def begin_tile(tile: Any, size: Size) -> None:
    """What stays: the 1 of y, and the zeros behind it."""
    for item in ascending(cuda.threadIdx.x + size.D * size.T, size.P * size.T, cuda.blockDim.x):
        tile[at(item)] = 1.0 if item < (size.D + 1) * size.T else 0.0


@inlined
def read_tile(samples: Samples, tile: Any, memory: Any, size: Size, start: int) -> None:
    """z and ω of the samples from number `start` on; zeros for those without weight, and behind the last one."""
    parts = max(cuda.blockDim.x >> size.log_T, 1)
    for item in ascending(cuda.threadIdx.x, size.T * parts, cuda.blockDim.x):
        t, part, weight, row = item & (size.T - 1), item >> size.log_T, 0.0, 0
        if start + t < samples.n:
            row, weight = row_of(samples, size, start + t), 1.0
            if size.weighted:
                weight = samples.weight[at(row)] / samples.largest
        for d in ascending(part, size.D, parts):
            tile[at(d * size.T + t)] = in_frame(samples, memory, size, row, d) if weight > 0 else 0.0
        if part == 0:
            tile[at(size.P * size.T + t)] = weight
    cuda.syncthreads()


@inlined
def sum_of(memory: Any, place: int, count: int) -> Any:
    """Of so many numbers, in order; every thread has it."""
    total = 0.0
    for i in ascending(count):
        total += memory[at(place + i)]
    return total
