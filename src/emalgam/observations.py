"""The data of a fit: checked, weighed, and seen through their frame. Nothing here is as large as the data.

Except on a GPU: data from main memory that fit its memory are sent there once, and not again in every pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from emalgam import arrays, backends
from emalgam.covariance import Covariance
from emalgam.namespace import beside, is_tensor, namespace, to_host
from emalgam.packing import Frame, power_of_two, unpack_symmetric
from emalgam.validation import check_data, check_finite, check_threads, check_weight
from emalgam_kernels import Packed, Parameters, statistic_count
from emalgam_kernels.blocks import for_each_block

ROWS_AT_ONCE = 4096
ELEMENTS_ON_A_GPU = 2**26
PASSES_FOR_THE_FRAME = 3
CANCELLED = 1e-6  # of the second moment: a variance below it has lost its digits
LARGEST_WEIGHT = 2.0**30  # beyond this, or below its inverse, weights are scaled: float32 tiles hold them too


@dataclass(frozen=True, eq=False)
class View:
    """All rows through their frame; see `Observations` for the attributes."""

    total_weight: float
    frame: Frame
    variance: np.ndarray
    largest: float
    scatter: np.ndarray | None

    @classmethod
    def of(
        cls,
        low: np.ndarray,
        high: np.ndarray,
        covariance: Covariance,
        total_statistics: Callable[[str, Frame], np.ndarray],
    ) -> View:
        """From each feature's range (D,), and what computes Σ ω φ(z) over all rows, (F,), in a frame."""
        frame, variance, total = _frame(low, high, total_statistics)
        if covariance.isotropic_frame:
            scale = np.full_like(frame.scale, frame.scale[variance > 0].min(initial=np.inf) if variance.any() else 1.0)
            variance, frame = variance * (scale / frame.scale) ** 2, Frame(frame.shift, scale)
        largest = float(np.abs(frame.apply(np.stack([low, high]))).max())
        scatter = None
        if covariance.shared:
            D = len(low)
            scatter = unpack_symmetric(total_statistics("full", frame)[None, : -1 - D], D)[0]
        return cls(total, frame, variance, largest, scatter)


@dataclass(frozen=True, eq=False)
class Observations:
    """N rows of D features with weights, and how kernels see them.

    Attributes
    ----------
    x : (N, D) any real dtype
        The caller's memory: a NumPy array, or a tensor on a GPU.
    weight : (N,) float64 or None
        Where x lies.
    total_weight : float
        Σ ω, N without weights.
    frame : Frame
        Shift and scale from the weighted mean and standard deviation.
    variance : (D,) float64
        Weighted variances in the frame; zero for a constant feature.
    largest : float
        max |z| over rows with weight.
    scatter : (D, D) float64 or None
        Σ ω z zᵀ, for the tied type.
    moderation : float
        What the given weights were multiplied by.
    """

    x: Any
    weight: Any
    total_weight: float
    frame: Frame
    variance: np.ndarray
    largest: float
    scatter: np.ndarray | None
    backend: str
    kernels: ModuleType
    n_threads: int
    moderation: float = 1.0

    @classmethod
    def of(
        cls, x: Any, sample_weight: Any, covariance: Covariance, backend: str = "auto", n_threads: int | None = None
    ) -> Observations:
        """Check `x` and its weights, and find the frame; a warning names constant features.

        Raises
        ------
        ValueError
            For data or weights of a wrong shape or type, NaN or infinity.
        BackendUnavailable
            If the backend cannot run here.
        """
        name = backends.resolve(backend, x)
        arrays.same_device(x=x, sample_weight=sample_weight)
        data, threads = check_data(x), check_threads(n_threads)
        check_finite(data)
        weight, factor = moderate(check_weight(sample_weight, len(data)))
        kernels = backends.kernels(name)
        if name == "numba_cuda":
            data, weight = kernels.resident(data, weight, threads)
        low, high = ranges_of(data, weight, threads)
        view = View.of(
            low,
            high,
            covariance,
            lambda feature_map, frame: _total_statistics(feature_map, data, weight, frame, kernels, threads),
        )
        warn_of_constants(low, high)
        in_frame = (view.total_weight, view.frame, view.variance, view.largest, view.scatter)
        return cls(data, weight, *in_frame, name, kernels, threads, factor)

    @property
    def sample(self) -> Observations:
        """The rows that starts are found with: all of them."""
        return self

    @property
    def n_features(self) -> int:
        return int(self.x.shape[1])

    @property
    def dtype(self) -> np.dtype:
        """The type that kernels read x as."""
        return arrays.tile_dtype(self.x)

    def rows_with_weight(self) -> int:
        """How many rows take part."""
        return len(self.x) if self.weight is None else int((self.weight > 0).sum())

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Some rows as float64 on the host, (n, D)."""
        return to_host(self.x[self._beside_x(indices)]).astype(np.float64)

    def subset(self, indices: np.ndarray) -> Observations:
        """Some rows, without weights, in the same frame."""
        return replace(self, x=self.x[self._beside_x(indices)], weight=None, total_weight=float(len(indices)))

    def _beside_x(self, indices: np.ndarray) -> Any:
        return beside(indices, self.x)

    @cached_property
    def total_covariance(self) -> np.ndarray:
        """The covariance of all data in the frame, (D, D)."""
        statistics = _total_statistics("full", self.x, self.weight, self.frame, self.kernels, self.n_threads)
        return covariance_of(statistics, self.total_weight, self.n_features)

    def statistics(self, parameters: Parameters, hard: bool = False) -> tuple[np.ndarray, float]:
        """One pass of `em_statistics`: S (K, F) and the mean Σ ω log p / Σ ω, where the parameters lie."""
        out = arrays.empty((parameters.n_components, parameters.n_statistics), np.float64, parameters.shift)
        total = self.kernels.em_statistics(self.x, self.weight, parameters, out, hard=hard, n_threads=self.n_threads)
        return out, total / self.total_weight


def covariance_of(statistics: np.ndarray, total_weight: float, n_features: int) -> np.ndarray:
    """The covariance (D, D) that Σ ω φ(z) of the full feature map, (F,), holds."""
    D = n_features
    mean = statistics[-1 - D : -1] / total_weight
    return unpack_symmetric(statistics[None, : -1 - D] / total_weight, D)[0] - np.outer(mean, mean)


def moderation(largest: float) -> float:
    """What brings weights whose largest is far from one near it: only their ratios matter."""
    moderate = largest == 0 or 1 / LARGEST_WEIGHT <= largest <= LARGEST_WEIGHT
    return 1.0 if moderate else float(power_of_two(np.array(largest)))


def moderate(weight: Any) -> tuple[Any, float]:
    """Weights whose largest is near one, if it was far from it, and what they were multiplied by."""
    factor = 1.0 if weight is None else moderation(float(weight.max()))
    return (weight if factor == 1 else weight * factor), factor


def ranges_of(x: Any, weight: Any, n_threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each feature over the rows with weight; (D,) float64 each."""
    if is_tensor(x):
        return _ranges_on_a_gpu(x, weight)
    n_blocks = -(-len(x) // ROWS_AT_ONCE)
    low, high = np.full((n_blocks, x.shape[1]), np.inf), np.full((n_blocks, x.shape[1]), -np.inf)

    def block(start: int, stop: int) -> None:
        rows = x[start:stop]
        if weight is not None:
            rows = rows[weight[start:stop] > 0]
        if len(rows):
            columns = np.ascontiguousarray(rows.T)  # minima along short rows of memory would take ten times as long
            low[start // ROWS_AT_ONCE], high[start // ROWS_AT_ONCE] = columns.min(axis=1), columns.max(axis=1)

    for_each_block(block, len(x), ROWS_AT_ONCE, n_threads)
    return low.min(axis=0), high.max(axis=0)


def _ranges_on_a_gpu(x: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    xp = namespace(x)
    lows, highs = [], []
    step = max(ELEMENTS_ON_A_GPU // x.shape[1], 1)
    for start in range(0, len(x), step):
        low = high = x[start : start + step] if x.is_floating_point() else x[start : start + step].to(xp.float64)
        if weight is not None:
            absent = (weight[start : start + step] == 0)[:, None]
            low, high = xp.where(absent, np.inf, low), xp.where(absent, -np.inf, high)
        lows.append(xp.amin(low, 0).to(xp.float64))
        highs.append(xp.amax(high, 0).to(xp.float64))
    return to_host(xp.amin(xp.stack(lows), 0)), to_host(xp.amax(xp.stack(highs), 0))


def _total_statistics(
    feature_map: str, x: Any, weight: Any, frame: Frame, kernels: ModuleType, n_threads: int
) -> np.ndarray:
    """Σ ω φ(z) over all data: the statistics of a single component; (F,)."""
    natural = np.zeros((1, statistic_count(feature_map, x.shape[1])))
    out = np.empty_like(natural)
    kernels.em_statistics(
        x, weight, Packed(feature_map, frame.shift, frame.scale, None, natural), out, n_threads=n_threads
    )
    return out[0]


def _frame(
    low: np.ndarray, high: np.ndarray, total_statistics: Callable[[str, Frame], np.ndarray]
) -> tuple[Frame, np.ndarray, float]:
    """The frame, the variances in it, and Σ ω.

    Moments are taken in the frame of the range, where nothing overflows, and again in the frame they give if the
    variance cancelled (a row far out that weighs next to nothing). A constant feature keeps its own value as shift, so
    that it is exactly zero in the frame.
    """
    D = len(low)
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    varies = half > 0
    frame = Frame(np.where(varies, middle, low), power_of_two(half))
    for _ in range(PASSES_FOR_THE_FRAME):
        statistics = total_statistics("diag", frame)
        total = float(statistics[-1])
        mean, square = statistics[D:-1] / total, statistics[:D] / total
        variance = np.where(varies, np.maximum(square - mean**2, np.finfo(float).tiny), 0.0)
        frame = Frame(np.where(varies, frame.undo(mean), low), _product(frame.scale, power_of_two(np.sqrt(variance))))
        if (variance >= CANCELLED * square)[varies].all():
            break
    return frame, variance * power_of_two(np.sqrt(variance)) ** 2, total


def _product(scale: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The product of powers of two, kept within what a float64 can be."""
    exponent = (np.frexp(scale)[1] - 1) + (np.frexp(other)[1] - 1)
    return np.ldexp(1.0, np.clip(exponent, -1021, 1021))


def warn_of_constants(low: np.ndarray, high: np.ndarray) -> None:
    columns = np.flatnonzero(low == high)
    if len(columns) and len(low) > 0:
        names = ", ".join(map(str, columns[:10])) + (", ..." if len(columns) > 10 else "")
        warnings.warn(
            f"constant feature{'s' if len(columns) > 1 else ''}: column {names} has one value in all rows and cannot "
            "tell components apart; consider leaving it out",
            UserWarning,
            stacklevel=4,
        )
