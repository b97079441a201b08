"""Data in parts that are never in memory together: chunks of a stream, or partitions on other machines.

What EM needs of data are sums over rows: the statistics of a pass, the range of each feature, how many rows have
weight. `Parts.fold` computes each part's share where it lies and adds the shares up; only they move, never the rows.
The start of a fit looks at a sample: the rows whose random number, a function of (seed, row), is small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from emalgam import backends
from emalgam.covariance import Covariance
from emalgam.observations import Observations, View, covariance_of, moderation, ranges_of, warn_of_constants
from emalgam.packing import Frame
from emalgam.validation import check_finite, check_some_weight, check_threads, check_weight
from emalgam_kernels import Packed, Parameters, statistic_count
from emalgam_kernels.philox import ROWS_OF_A_SAMPLE as SAMPLE_STREAM
from emalgam_kernels.reference.sampling import uniforms

ELEMENTS_OF_A_SAMPLE: Final = 2**20  # numbers that a sample has at least if the data have as many, twice that at most
FEWEST_ROWS_OF_A_SAMPLE: Final = 8192
ROWS_AT_ONCE: Final = 2**16

Share = TypeVar("Share")


class Part(NamedTuple):
    """Some of the rows.

    Attributes
    ----------
    first : int
        The number of its first row among all.
    x : (n, D) array of real numbers
    weight : (n,) array of real numbers, or None
    """

    first: int
    x: np.ndarray
    weight: np.ndarray | None


class Parts(ABC):
    """Data that can be gone through again and again, a part at a time.

    Attributes
    ----------
    n_features : int
    dtype : float32 or float64
        What kernels read the rows as.
    n_rows : int or None
        How many, if that is known before a pass.
    outline : (0, D) data frame or None
        The names of the features, if they have any.
    """

    n_features: int
    dtype: np.dtype
    n_rows: int | None = None
    outline: Any = None

    def threads(self, n_threads: int | None) -> int:
        """How many threads a task may use, of what `emalgam.fit` was given; checked."""
        return check_threads(n_threads)

    @abstractmethod
    def fold(self, task: Callable[[Part], Share], combine: Callable[[Share, Share], Share]) -> Share:
        """`task` of every part, combined in an order that depends on the parts alone.

        `task` may run elsewhere: it can be pickled, and its result is small.
        """


# ---- the first pass


@dataclass(frozen=True, eq=False)
class Sample:
    """The rows, and their weights, whose random number is below `threshold`, in the order of their numbers.

    The threshold is the largest power of two that leaves at most twice `wanted` rows: the same for all ways to cut the
    data into parts.
    """

    wanted: int
    threshold: float
    numbers: np.ndarray
    keys: np.ndarray
    x: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, part: Part, weight: np.ndarray | None, seed: int, wanted: int, most: float = 1.0) -> Sample:
        """Of the rows with weight of one part, below a threshold of at most `most`; only the chosen ones are copied."""
        keys = np.empty(len(part.x))
        for start in range(0, len(keys), ROWS_AT_ONCE):
            uniforms(seed, SAMPLE_STREAM, part.first + start, keys[start : start + ROWS_AT_ONCE])
        if weight is not None:
            keys[weight == 0] = 1.0
        threshold = _threshold(keys, most, wanted)
        chosen = np.flatnonzero(keys < threshold)
        weights = np.ones(len(chosen)) if weight is None else weight[chosen]
        return cls(wanted, threshold, part.first + chosen, keys[chosen], part.x[chosen], weights)

    def __add__(self, other: Sample) -> Sample:
        names = ("numbers", "keys", "x", "weight")
        joined = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        threshold = _threshold(joined["keys"], min(self.threshold, other.threshold), self.wanted)
        kept = joined["keys"] < threshold
        return Sample(self.wanted, threshold, *(joined[name][kept] for name in names))


def _threshold(keys: np.ndarray, threshold: float, wanted: int) -> float:
    """The largest of `threshold`, its half, its quarter … that leaves at most twice `wanted` keys below it."""
    while np.count_nonzero(keys < threshold) > 2 * wanted:
        threshold /= 2
    return threshold


@dataclass(frozen=True, eq=False)
class Survey:
    """What the first pass learns of the rows with weight."""

    n_rows: int
    n_with_weight: int
    largest_weight: float
    low: np.ndarray
    high: np.ndarray
    sample: Sample

    def __add__(self, other: Survey) -> Survey:
        return Survey(
            self.n_rows + other.n_rows,
            self.n_with_weight + other.n_with_weight,
            max(self.largest_weight, other.largest_weight),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.sample + other.sample,
        )


@dataclass(frozen=True)
class SurveyOf:
    """The survey of a part, which is checked; ValueError naming the row."""

    seed: int
    wanted: int
    n_threads: int
    most: float = 1.0

    def __call__(self, part: Part) -> Survey:
        check_finite(part.x, first=part.first)
        weight = _weight(part)
        low, high = ranges_of(part.x, weight, self.n_threads)
        sample = Sample.of(part, weight, self.seed, self.wanted, self.most)
        count = len(part.x) if weight is None else int(np.count_nonzero(weight))
        largest = float(len(part.x) > 0) if weight is None else float(weight.max(initial=0.0))
        return Survey(len(part.x), count, largest, low, high, sample)


def survey_of(parts: Parts, seed: int, n_threads: int) -> Survey:
    """One pass; two if most rows have no weight.

    Of n rows about n times the threshold are below it. Where n is known, parts need not offer more than the sample of
    all can take: four times as many as it has at least. If those turn out to be too few, all parts begin from 1.
    """
    wanted = max(ELEMENTS_OF_A_SAMPLE // parts.n_features, FEWEST_ROWS_OF_A_SAMPLE)
    most = 1.0 if parts.n_rows is None else min(2.0 ** math.ceil(math.log2(4 * wanted / parts.n_rows)), 1.0)
    survey = parts.fold(SurveyOf(seed, wanted, n_threads, most), Survey.__add__)
    if most < 1 and survey.sample.threshold == most:
        survey = parts.fold(SurveyOf(seed, wanted, n_threads), Survey.__add__)
    return survey


def _weight(part: Part) -> np.ndarray | None:
    weight: np.ndarray | None = check_weight(part.weight, len(part.x), first=part.first, some=False)
    return weight


def check_no_weight(sample_weight: Any) -> None:
    """ValueError if there are weights beside data in parts."""
    if sample_weight is not None:
        raise ValueError("sample_weight was given beside data in parts, which carry their own; leave it out")


# ---- a pass of EM


@dataclass(frozen=True, eq=False)
class StatisticsOf:
    """S (K, F) and Σ ω log p of a part: `em_statistics` of a backend."""

    parameters: Parameters
    hard: bool
    moderation: float
    backend: str
    n_threads: int

    def __call__(self, part: Part) -> tuple[np.ndarray, float]:
        weight = _weight(part)
        if weight is not None and self.moderation != 1:
            weight = weight * self.moderation
        out = np.empty((self.parameters.n_components, self.parameters.n_statistics))
        kernels = backends.kernels(backends.resolve(self.backend))  # another machine may lack what this one has
        total = kernels.em_statistics(part.x, weight, self.parameters, out, hard=self.hard, n_threads=self.n_threads)
        return out, total


def _sum(a: tuple[np.ndarray, float], b: tuple[np.ndarray, float]) -> tuple[np.ndarray, float]:
    return a[0] + b[0], a[1] + b[1]


@dataclass(frozen=True, eq=False)
class ObservationsInParts:
    """What EM sees of data in parts: the interface of `emalgam.observations.Observations`.

    Attributes
    ----------
    parts : Parts
    survey : Survey
    sample : Observations
        The rows that starts are found with, in the frame of all.
    """

    parts: Parts
    survey: Survey
    sample: Observations
    moderation: float
    view: View
    backend: str
    kernels: ModuleType
    n_threads: int

    @classmethod
    def of(
        cls, parts: Parts, covariance: Covariance, backend: str = "auto", n_threads: int | None = None, seed: int = 0
    ) -> ObservationsInParts:
        """Check the data, and find their frame: two passes, or three for tied covariances.

        Raises
        ------
        ValueError
            For data or weights of a wrong shape or type, NaN or infinity, naming the row; or without any weight.
        BackendUnavailable
            If the backend cannot run here.
        """
        name, threads, of_a_task = backends.resolve(backend), check_threads(n_threads), parts.threads(n_threads)
        survey = survey_of(parts, seed, of_a_task)
        check_some_weight(survey.n_with_weight)
        factor = moderation(survey.largest_weight)

        def total_statistics(feature_map: str, frame: Frame) -> np.ndarray:
            natural = np.zeros((1, statistic_count(feature_map, parts.n_features)))
            single = Packed(feature_map, frame.shift, frame.scale, None, natural)
            return parts.fold(StatisticsOf(single, False, factor, name, of_a_task), _sum)[0][0]

        view = View.of(survey.low, survey.high, covariance, total_statistics)
        warn_of_constants(survey.low, survey.high)
        kernels = backends.kernels(name)
        rows = survey.sample
        weight = None if (rows.weight == 1).all() else rows.weight * factor
        total = float(len(rows.x) if weight is None else weight.sum())
        in_frame = (total, view.frame, view.variance, view.largest, view.scatter)
        sample = Observations(np.ascontiguousarray(rows.x), weight, *in_frame, name, kernels, threads)
        return cls(parts, survey, sample, factor, view, name, kernels, of_a_task)

    @property
    def n_features(self) -> int:
        return self.parts.n_features

    @property
    def dtype(self) -> np.dtype:
        """The type that kernels read the rows as."""
        return self.parts.dtype

    @property
    def total_weight(self) -> float:
        return self.view.total_weight

    @property
    def frame(self) -> Frame:
        return self.view.frame

    @property
    def variance(self) -> np.ndarray:
        return self.view.variance

    @property
    def largest(self) -> float:
        return self.view.largest

    @property
    def scatter(self) -> np.ndarray | None:
        return self.view.scatter

    def rows_with_weight(self) -> int:
        """How many rows take part."""
        return self.survey.n_with_weight

    @cached_property
    def total_covariance(self) -> np.ndarray:
        """The covariance of all data in the frame, (D, D)."""
        natural = np.zeros((1, statistic_count("full", self.n_features)))
        single = Packed("full", self.frame.shift, self.frame.scale, None, natural)
        return covariance_of(self.statistics(single)[0][0], self.total_weight, self.n_features)

    def statistics(self, parameters: Parameters, hard: bool = False) -> tuple[np.ndarray, Any]:
        """One pass over all parts: S (K, F) and the mean Σ ω log p / Σ ω."""
        task = StatisticsOf(parameters, hard, self.moderation, self.backend, self.n_threads)
        statistics, total = self.parts.fold(task, _sum)
        return statistics, total / self.total_weight


Data = Observations | ObservationsInParts


def observe(x: Any, sample_weight: Any, covariance: Covariance, backend: str, n_threads: int | None) -> Data:
    """Data as EM sees them, in memory or in parts; see `Observations.of` and `ObservationsInParts.of`."""
    if not isinstance(x, Parts):
        return Observations.of(x, sample_weight, covariance, backend, n_threads)
    check_no_weight(sample_weight)
    return ObservationsInParts.of(x, covariance, backend, n_threads)
