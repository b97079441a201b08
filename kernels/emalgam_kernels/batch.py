"""What the kernels of `batch` are given and what they return: many problems, how to fit them, many mixtures.

Letters: B problems, N samples of all problems together, D features, K components at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np

from emalgam_kernels.blocks import FLOP_PER_BLOCK, FLOP_PER_EXPONENTIAL
from emalgam_kernels.parameters import statistic_count

COVARIANCE_TYPES: Final = ("full", "tied", "diag", "spherical")
CRITERIA: Final = ("bic", "aic", "icl")

RELATIVE_FLOOR: Final = (
    1e-6  # of each feature's variance: what `added` is if it is not given, and what lifts are made of
)
LIFTS: Final = (0.0, 1.0, 1e2, 1e4, 1e6)  # floors that are added until a covariance is positive definite
NO_MASS: Final = 10 * float(np.finfo(np.float64).eps)  # share of the weight below which a component is without data
ROUND_SHIFT: Final = 2.0**20  # the mean is rounded to that part of the deviation before it is subtracted
ROUNDING: Final = 1e-12  # of a number: smaller differences say nothing
EQUAL: Final = 1e-9  # nats for each unit of weight: criteria that differ by less do so by rounding
# The guard of `emalgam.guard`: ⟨η, φ⟩ keeps its digits while 4 eps times the size of its terms is at most 1e-9 nats.
MOST_CANCELLATION: Final = 1e-9 / (4 * float(np.finfo(np.float64).eps))
ITERATIONS_OF_A_FIT: Final = 20  # about: what the size of a block goes by


class Status(IntEnum):
    """How the fit of a problem ended; up to `COLLAPSED` there is a mixture, from `TOO_FEW_ROWS` on there is none.

    Kernels never say `OUT_OF_RANGE`: it is for `withdraw_out_of_range`, which does the same for all of them.
    """

    FINE = 0
    NOT_CONVERGED = 1
    COLLAPSED = 2
    TOO_FEW_ROWS = 3
    NOT_FINITE = 4
    BAD_WEIGHT = 5
    NO_LIKELIHOOD = 6
    OUT_OF_RANGE = 7


MESSAGES: Final = {
    Status.FINE: "",
    Status.NOT_CONVERGED: "the log-likelihood still changed after max_iter iterations; increase max_iter or tol",
    Status.COLLAPSED: "a component has no data left, or data with (almost) no spread in some direction; use fewer",
    Status.TOO_FEW_ROWS: "there are fewer samples with positive weight than components",
    Status.NOT_FINITE: "the samples hold NaN or infinity",
    Status.BAD_WEIGHT: "the sample weights hold a negative number, NaN or infinity",
    Status.NO_LIKELIHOOD: "no start gave a finite likelihood",
    Status.OUT_OF_RANGE: "the covariances, or sums over the weights, leave the range of float64; scale the samples, or "
    "the weights",
}


@dataclass(frozen=True, slots=True, eq=False)
class Problems:
    """B sets of samples, one after the other.

    Parameters
    ----------
    x : (N, D) float32 or float64, any strides
        The samples; arithmetic is float64 whatever the type.
    offsets : (B + 1,) int64
        Problem b has the samples [offsets[b], offsets[b + 1]).
    order : (N,) int64 or None
        Sample i is row order[i] of x; None: row i.
    sample_weight : (N,) float64 or None
        ω of each row of x. A row of weight zero has no influence, whatever it holds.
    numbers : (B,) uint64
        What takes the place of a problem's index in the counters of its random numbers.
    """

    x: np.ndarray
    offsets: np.ndarray
    order: np.ndarray | None
    sample_weight: np.ndarray | None
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_features(self) -> int:
        return int(self.x.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """How each problem is fitted.

    Parameters
    ----------
    covariance_type : {"full", "tied", "diag", "spherical"}
    fewest, most : (B,) int64
        Numbers of components that are tried, both included; a problem's samples limit them too.
    criterion : {"bic", "aic", "icl"}
        The smallest decides between them, and between restarts; but a fit that has not collapsed beats any that has.
    n_init, max_iter : int
        Restarts for each number of components; iterations of each at most.
    tol : float
        Converged when the mean log-likelihood changes by less, in nats.
    added : float
        What is added to the diagonal of every covariance, in units of the data squared; negative: 1e-6 of each
        feature's variance.
    seed : int
        Of the k-means++ starts, in [0, 2⁶⁴).
    """

    covariance_type: str
    fewest: np.ndarray
    most: np.ndarray
    criterion: str = "bic"
    n_init: int = 1
    max_iter: int = 100
    tol: float = 1e-3
    added: float = -1.0
    seed: int = 0


def covariance_shape(covariance_type: str, B: int, K: int, D: int) -> tuple[int, ...]:
    """Of the covariances of B mixtures.

    >>> covariance_shape("tied", 7, 3, 2)
    (7, 2, 2)
    """
    return {"full": (B, K, D, D), "tied": (B, D, D), "diag": (B, K, D), "spherical": (B, K)}[covariance_type]


@dataclass(frozen=True, slots=True, eq=False)
class Mixtures:
    """B mixtures of up to K components, in the units of the data; NaN where there is no component.

    Parameters
    ----------
    covariance_type : {"full", "tied", "diag", "spherical"}
    n_components : (B,) int64
        0: there is no mixture.
    weights : (B, K) float64
    means : (B, K, D) float64
    covariances : (B, K, D, D), (B, D, D), (B, K, D) or (B, K) float64
    """

    covariance_type: str
    n_components: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @classmethod
    def empty(cls, covariance_type: str, n_problems: int, n_components: int, n_features: int) -> Mixtures:
        """Room for mixtures; NaN everywhere.

        >>> Mixtures.empty("tied", 7, 3, 2).covariances.shape
        (7, 2, 2)
        """
        B, K, D = n_problems, n_components, n_features
        return cls(
            covariance_type,
            np.zeros(B, np.int64),
            np.full((B, K), np.nan),
            np.full((B, K, D), np.nan),
            np.full(covariance_shape(covariance_type, B, K, D), np.nan),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """How the fits of B problems ended; NaN where there is no mixture.

    Parameters
    ----------
    log_likelihood : (B,) float64
        Σ ω log p(x), in nats.
    entropy : (B,) float64
        −Σ ω Σ_k r_k log r_k of the responsibilities: what ICL adds twice.
    n_iter : (B,) int64
        Of the start that won.
    converged : (B,) bool
    status : (B,) int64
        See `Status`.
    """

    log_likelihood: np.ndarray
    entropy: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray
    status: np.ndarray

    @classmethod
    def empty(cls, n_problems: int) -> Outcomes:
        """Room for the outcomes of B problems."""
        B = n_problems
        return cls(
            np.full(B, np.nan), np.full(B, np.nan), np.zeros(B, np.int64), np.zeros(B, np.bool_), np.zeros(B, np.int64)
        )


def withdraw_out_of_range(mixtures: Mixtures, outcomes: Outcomes, total_weight: np.ndarray) -> None:
    """Take back mixtures with a variance that float64 cannot hold, or not to all its digits: `Status.OUT_OF_RANGE`.

    Kernels fit in a frame where any scale is fine; what leaves the frame may overflow, or underflow. No covariance is
    larger than the larger of its two variances, so these are all there is to look at. Σ ω, (B,), and sums with
    weights may overflow too.
    """
    variances = mixtures.covariances
    if mixtures.covariance_type in ("full", "tied"):
        variances = np.einsum("...ii->...i", variances)
    outside = (variances < np.finfo(np.float64).tiny) | np.isinf(variances)  # where there is no component: NaN, neither
    infinite = np.isinf(total_weight) | np.isinf(outcomes.log_likelihood) | np.isinf(outcomes.entropy)
    lost = np.flatnonzero(outside.reshape(len(variances), -1).any(axis=1) | infinite & (mixtures.n_components > 0))
    for values in (mixtures.weights, mixtures.means, mixtures.covariances, outcomes.log_likelihood, outcomes.entropy):
        values[lost] = np.nan
    for counts in (mixtures.n_components, outcomes.n_iter, outcomes.converged):
        counts[lost] = 0
    outcomes.status[lost] = Status.OUT_OF_RANGE


def parameter_count(covariance_type: str, n_components: int, n_features: int) -> int:
    """Free parameters of a mixture, as BIC and AIC count them.

    >>> parameter_count("full", 3, 2)
    17
    """
    K, D = n_components, n_features
    triangle = D * (D + 1) // 2
    return K - 1 + K * D + {"full": K * triangle, "tied": triangle, "diag": K * D, "spherical": K}[covariance_type]


def criterion_value(criterion: str, log_likelihood: Any, entropy: Any, n_parameters: Any, total: Any) -> Any:
    """BIC = −2 log L + p log Σω (Schwarz 1978), AIC = −2 log L + 2 p (Akaike 1974), ICL = BIC + 2 entropy.

    Numbers, or arrays of one shape.

    References
    ----------
    Biernacki, Celeux, Govaert (2000), "Assessing a mixture model for clustering with the integrated completed
    likelihood", IEEE PAMI 22.
    """
    penalty = 2.0 if criterion == "aic" else np.log(total)
    return -2.0 * log_likelihood + n_parameters * penalty + (2.0 * entropy if criterion == "icl" else 0.0)


def replaces(value: float, collapsed: bool, best: float, best_collapsed: bool, margin: float) -> bool:
    """Whether a fit is better than the best so far: its criterion is smaller by more than the margin.

    A fit that has not collapsed is better than any that has: towards a point the likelihood grows without bound, and
    with it every criterion falls, whatever the number of components (Bishop 2006, section 9.2.1).

    >>> replaces(10.0, False, -90.0, True, 1e-9), replaces(-90.0, True, 10.0, False, 1e-9)
    (True, False)
    """
    return value < best - margin if collapsed == best_collapsed else best_collapsed


def problems_per_block(problems: Problems, n_components: np.ndarray, passes: float = 1.0) -> int:
    """Problems that a thread takes at once: a third of a millisecond of work or somewhat more, and at least one.

    >>> nothing = np.empty(0)
    >>> many = Problems(np.empty((2000, 2)), np.arange(0, 2001, 200), None, None, nothing)
    >>> problems_per_block(many, np.full(10, 3), passes=20)
    21
    """
    rows = float(problems.offsets[-1] - problems.offsets[0]) / max(len(problems), 1)
    return max(int(FLOP_PER_BLOCK / max(rows * flop_of_a_row(problems.n_features, n_components, passes), 1.0)), 1)


def flop_of_a_row(n_features: int, n_components: np.ndarray, passes: float) -> float:
    """What a sample takes in so many passes, about."""
    components = float(np.mean(n_components)) if len(n_components) else 0.0
    return components * (4 * statistic_count("full", n_features) + FLOP_PER_EXPONENTIAL) * passes


def passes_of_a_fit(settings: Settings) -> float:
    """Passes over the samples of a problem, about."""
    choices = float(np.mean(settings.most - settings.fewest + 1)) if len(settings.most) else 0.0
    return choices * settings.n_init * (min(settings.max_iter, ITERATIONS_OF_A_FIT) + 2)
