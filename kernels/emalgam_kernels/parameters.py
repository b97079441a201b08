"""What a kernel needs to know about a mixture, as frozen values of plain arrays.

`Packed` is the library's one idea: ``log w_k N(x; μ_k, Σ_k) = ⟨η_k, φ(z)⟩`` with ``z = (x − shift) · scale`` (then
``z W`` if there is a whitening). `Direct` holds means and precision factors instead, for parameters at which the
packed inner product would cancel. Letters: N samples, D features, K components, F packed statistics, B mixtures.

A stack of B mixtures of one form and one K is such a value too: every array has one more axis, of length B, in front,
whatever its stride (`numpy.broadcast_to`: one mixture serves all). `take` gives some of them, or one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np

from emalgam_kernels.alias import AliasTable, alias_table

FEATURE_MAPS: Final = ("full", "diag", "spherical")
ARITHMETICS: Final = ("float32", "float64")


def statistic_count(feature_map: str, n_features: int) -> int:
    """Length F of φ(z).

    ===========  =====================================  ===================
    feature map  φ(z)                                   F
    ===========  =====================================  ===================
    full         z_i z_j for i ≥ j (row by row), z, 1   (D + 1)(D + 2) / 2
    diag         z_i², z, 1                             2 D + 1
    spherical    ‖z‖², z, 1                             D + 2
    ===========  =====================================  ===================

    >>> statistic_count("full", 2), statistic_count("diag", 2), statistic_count("spherical", 2)
    (6, 5, 4)
    """
    D = n_features
    return {"full": (D + 1) * (D + 2) // 2, "diag": 2 * D + 1, "spherical": D + 2}[feature_map]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A mixture as natural parameters in a frame.

    Parameters
    ----------
    feature_map : {"full", "diag", "spherical"}
        Which φ the natural parameters belong to (see `statistic_count`).
    shift, scale : (D,) float64, C-contiguous
        The frame: ``z = (x − shift) · scale``.
    whitening : (D, D) float64, C-contiguous, or None
        Applied after the frame: ``z W``.
    natural : (K, F) float64, C-contiguous
        η: off-diagonal entries doubled, log w_k and every constant in the last column.
    arithmetic : {"float32", "float64"}
        The type that a tile is computed in. Statistics are float64 whatever it is.
    """

    feature_map: str
    shift: np.ndarray
    scale: np.ndarray
    whitening: np.ndarray | None
    natural: np.ndarray
    arithmetic: str = "float64"

    @property
    def n_components(self) -> int:
        return int(self.natural.shape[-2])

    @property
    def n_statistics(self) -> int:
        return int(self.natural.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Direct:
    """A mixture as means and precision factors in a frame: ``log w_k N = c_k − ½ ‖P_kᵀ (z − μ_k)‖²``.

    Parameters
    ----------
    feature_map : {"full", "diag"}
        "full": P_k is a triangular matrix. "diag": it is a diagonal.
    shift, scale : (D,) float64, C-contiguous
        The frame, as in `Packed`.
    means : (K, D) float64, C-contiguous
        μ_k in the frame.
    precisions_cholesky : (K, D, D) or (K, D) float64
        P_k, upper triangular with ``P Pᵀ = Σ⁻¹`` in the frame, each C-contiguous; for "diag" the diagonals. A stride
        of zero along K (`numpy.broadcast_to`) is allowed for "full": one factor shared by all components.
    log_constants : (K,) float64
        c_k, log w_k and the log-determinant included.
    arithmetic : {"float32", "float64"}
        As in `Packed`.

    Notes
    -----
    `em_statistics` then returns statistics about each component's own mean: Σ r φ(z − μ_k).
    """

    feature_map: str
    shift: np.ndarray
    scale: np.ndarray
    means: np.ndarray
    precisions_cholesky: np.ndarray
    log_constants: np.ndarray
    arithmetic: str = "float64"

    @property
    def n_components(self) -> int:
        return int(self.means.shape[-2])

    @property
    def n_statistics(self) -> int:
        return statistic_count(self.feature_map, self.means.shape[-1])


Parameters = Packed | Direct


@dataclass(frozen=True, slots=True, eq=False)
class Gaussians:
    """A stack of M Gaussians N(μ_m, Σ_m); the dtype of the arrays, float64 or float32, is the arithmetic.

    Parameters
    ----------
    covariance_type : {"full", "diag"}
    means : (M, D)
        μ_m.
    covariances : (M, D, D), or (M, D) for "diag"
        Σ_m.
    precisions_cholesky : (M, D, D) or (M, D), or None
        P_m, upper triangular with ``P Pᵀ = Σ⁻¹``; for "diag" the diagonals. None leaves the factorisation to
        `kl_pairs`, which needs no memory for it; `kl_all_pairs` wants P.

    Notes
    -----
    A stride of zero along M (`numpy.broadcast_to`) is allowed for each array: one value shared by all.
    """

    covariance_type: str
    means: np.ndarray
    covariances: np.ndarray
    precisions_cholesky: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.means.shape[0])

    @property
    def n_features(self) -> int:
        return int(self.means.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """A mixture to draw from: x = μ_k + L_k ε with a label k of probability w_k and ε of standard normals.

    Parameters
    ----------
    means : (K, D) float64, C-contiguous
        μ_k.
    factors : (K, D, D) or (K, D) float64
        L_k, lower triangular with ``L Lᵀ = Σ`` (what lies above the diagonal is not read), each C-contiguous; or the
        diagonals of diagonal ones. A stride of zero along K (`numpy.broadcast_to`) is allowed.
    weights : (K,) float64
        w_k, non-negative, not all zero; they need not sum to one.
    n_total : int
        Stratified draws only: rows [0, n_total) together hold the labels in proportion to the weights. Row n_total is
        like row 0 again, with other noise.

    Attributes
    ----------
    table : AliasTable
        Follows from the weights.
    """

    means: np.ndarray
    factors: np.ndarray
    weights: np.ndarray
    n_total: int = 0
    table: AliasTable = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", alias_table(self.weights))

    @property
    def n_components(self) -> int:
        return int(self.means.shape[-2])

    @property
    def n_features(self) -> int:
        return int(self.means.shape[-1])

    @property
    def diagonal(self) -> bool:
        """Whether the factors are diagonal."""
        return self.factors.ndim == self.means.ndim


Value = TypeVar("Value", Packed, Direct, Parameters, Sampler)


def take(stack: Value, which: Any) -> Value:
    """Some mixtures of a stack, or (an integer) one; ``take(mixture, None)`` is a stack of one.

    What components share, they go on sharing.
    """
    taken = object.__new__(type(stack))
    for name in stack.__slots__:
        object.__setattr__(taken, name, _part(getattr(stack, name), which))
    return taken


def _part(value: Any, which: Any) -> Any:
    if isinstance(value, AliasTable):
        return AliasTable(*(part[which] for part in value))
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim < 2 or value.strides[1] != 0:
        return value[which]
    part = value[:, :1][which]
    axis = part.ndim - value.ndim + 1
    return np.broadcast_to(part, (*part.shape[:axis], value.shape[1], *part.shape[axis + 1 :]))
