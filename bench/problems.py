"""What is fitted: sizes, data and the initial parameters that every library begins from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

SEED: Final = 20260101
SEPARATION: Final = 6.0  # typical distance of two means, in standard deviations: responsibilities are neither 0 nor 1
SIZES: Final = ((100_000, 16, 64), (100_000, 8, 16), (200_000, 2, 10), (50_000, 64, 32))
SMALLEST: Final = (200_000, 2, 10)  # in work, N F K
SMOKE_SIZE: Final = (4_000, 4, 3)
COVARIANCE_TYPES: Final = ("full", "tied", "diag", "spherical")
DTYPES: Final = ("float64", "float32")


@dataclass(frozen=True)
class Case:
    """N rows of D features, K components, of one covariance type and dtype."""

    N: int
    D: int
    K: int
    covariance_type: str = "full"
    dtype: str = "float64"

    def __str__(self) -> str:
        return f"{self.N}-{self.D}-{self.K}-{self.covariance_type}-{self.dtype}"

    @property
    def size(self) -> tuple[int, int, int]:
        return self.N, self.D, self.K

    @property
    def F(self) -> int:
        """Statistics of a row, DESIGN's F."""
        D = self.D
        return {"full": (D + 1) * (D + 2) // 2, "tied": D + 2, "diag": 2 * D + 1, "spherical": D + 2}[
            self.covariance_type
        ]

    @property
    def flop(self) -> int:
        """4 N F K: the two matrix products of an iteration, an addition and a multiplication for each element."""
        return 4 * self.N * self.F * self.K


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's data and initial parameters; covariances and precisions in scikit-learn's shapes.

    `x` (N, D) of the case's dtype, C-contiguous; `weights` (K,), `means` (K, D), `covariances`, `precisions` float64.
    """

    case: Case
    x: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    precisions: np.ndarray


def blobs(N: int, D: int, K: int, seed: int = SEED, separation: float = SEPARATION) -> tuple[np.ndarray, np.ndarray]:
    """N rows from K Gaussians of unequal weight in any orientation, variances from 1/2 to 2; and their means (K, D).

    `separation` is the typical distance of two means.
    """
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, D)) * separation / np.sqrt(2 * D)
    weights = rng.uniform(0.5, 1.5, K)
    labels = rng.choice(K, N, p=weights / weights.sum())
    x = rng.normal(size=(N, D))
    for k in range(K):
        orientation = np.linalg.qr(rng.normal(size=(D, D)))[0]
        deviations = np.exp2(rng.uniform(-0.5, 0.5, D))
        x[labels == k] = means[k] + x[labels == k] * deviations @ orientation
    return x, means


@lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """Blobs, and a start: true means moved by about one standard deviation, equal weights, variances 3/2."""
    x, means = blobs(*case.size)
    rng = np.random.default_rng(SEED + 1)
    start = means + rng.normal(size=means.shape) / np.sqrt(case.D)
    covariances = {
        "full": np.tile(1.5 * np.eye(case.D), (case.K, 1, 1)),
        "tied": 1.5 * np.eye(case.D),
        "diag": np.full((case.K, case.D), 1.5),
        "spherical": np.full(case.K, 1.5),
    }[case.covariance_type]
    precisions = covariances / 1.5**2  # 1 / 1.5 on every diagonal
    x = np.ascontiguousarray(x, dtype=case.dtype)
    return Problem(case, x, np.full(case.K, 1 / case.K), start, covariances, precisions)
