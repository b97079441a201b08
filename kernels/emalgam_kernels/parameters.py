"""What a kernel needs to know about a mixture, as frozen values of plain arrays.

`Packed` is the library's one idea: ``log w_k N(x; μ_k, Σ_k) = ⟨η_k, φ(z)⟩`` with ``z = (x − shift) · scale`` (then
``z W`` if there is a whitening). `Direct` holds means and precision factors instead, for parameters at which the
packed inner product would cancel. Letters: N samples, D features, K components, F packed statistics, B mixtures.

A stack of B mixtures of one form and one K is such a value too: every array has one more axis, of length B, in front,
whatever its stride (`numpy.broadcast_to`: one mixture serves all). `take` gives some of them, or one.

What is built has arrays of the shapes, dtypes and layouts that are said here: ValueError (TypeError for what is no
array) otherwise. Their numbers are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np

from emalgam_kernels.alias import AliasTable, alias_table
from emalgam_kernels.checks import FLOAT64, FLOATS, Kinds, expect, expect_axes, expect_option

FEATURE_MAPS: Final = ("full", "diag", "spherical")
DIRECT_FEATURE_MAPS: Final = ("full", "diag")
ARITHMETICS: Final = ("float32", "float64")
EVERY_ARITHMETIC: Final = (*ARITHMETICS, "tf32")  # of a GPU's matrix products


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
    arithmetic : {"float32", "float64", "tf32"}
        The type that a tile is computed in. Statistics are float64 whatever it is. "tf32", float32 whose products may
        round operands to ten bits, is for numba_cuda alone.
    """

    feature_map: str
    shift: np.ndarray
    scale: np.ndarray
    whitening: np.ndarray | None
    natural: np.ndarray
    arithmetic: str = "float64"

    def __post_init__(self) -> None:
        expect_option("feature_map", self.feature_map, FEATURE_MAPS)
        stack, D, kinds = _expect_frame(self)
        K = _components("natural", self.natural, stack)
        natural = (*stack, K, statistic_count(self.feature_map, D))
        expect("natural", self.natural, natural, FLOAT64, kinds, free=len(stack))
        if self.whitening is not None:
            expect("whitening", self.whitening, (*stack, D, D), FLOAT64, kinds, free=len(stack))

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

    def __post_init__(self) -> None:
        expect_option("feature_map", self.feature_map, DIRECT_FEATURE_MAPS)
        stack, D, kinds = _expect_frame(self)
        K, free = _components("means", self.means, stack), len(stack)
        factors = (*stack, K, D, D) if self.feature_map == "full" else (*stack, K, D)
        expect("means", self.means, (*stack, K, D), FLOAT64, kinds, free=free)
        expect("precisions_cholesky", self.precisions_cholesky, factors, FLOAT64, kinds, free=free + 1)
        expect("log_constants", self.log_constants, (*stack, K), FLOAT64, kinds, free=free)

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

    def __post_init__(self) -> None:
        expect_option("covariance_type", self.covariance_type, DIRECT_FEATURE_MAPS)
        M, D = expect_axes("means", self.means, "M, D")
        expect("means", self.means, (M, max(D, 1)), FLOATS, free=1)
        kinds, dtype = _kinds(self.means), self.means.dtype
        shape = (M, D, D) if self.covariance_type == "full" else (M, D)
        for name in ("covariances", "precisions_cholesky"):
            matrices = getattr(self, name)
            if matrices is not None or name == "covariances":
                expect(name, matrices, shape, FLOATS, kinds, free=1)
                if matrices.dtype != dtype:
                    raise ValueError(f"{name} is {matrices.dtype}; expected {dtype}, as the means are")

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
        axes = "B, K, D" if getattr(self.means, "ndim", 2) > 2 else "K, D"
        *stack, K, D = shape = expect_axes("means", self.means, axes, np.ndarray)
        free = len(stack)
        expect("means", self.means, (*stack, max(K, 1), max(D, 1)), FLOAT64, np.ndarray, free=free)
        factors = shape if getattr(self.factors, "ndim", 0) == len(shape) else (*shape, D)
        expect("factors", self.factors, factors, FLOAT64, np.ndarray, free=free + 1)
        expect("weights", self.weights, shape[:-1], FLOAT64, np.ndarray)
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


def _expect_frame(parameters: Parameters) -> tuple[tuple[int, ...], int, Kinds | None]:
    """The shape of a stack, () if it is none, D, and what the other arrays have to be instances of."""
    expect_option("arithmetic", parameters.arithmetic, EVERY_ARITHMETIC)
    shift, kinds = parameters.shift, _kinds(parameters.shift)
    shape = expect_axes("shift", shift, "B, D" if getattr(shift, "ndim", 1) > 1 else "D", kinds)
    stack, D = shape[:-1], shape[-1]
    expect("shift", shift, (*stack, max(D, 1)), FLOAT64, kinds, free=len(stack))
    expect("scale", parameters.scale, shape, FLOAT64, kinds, free=len(stack))
    return stack, D, kinds


def _components(name: str, array: Any, stack: tuple[int, ...]) -> int:
    """K of an array (K, ...), or (B, K, ...) for a stack; at least 1, as there is no mixture of none."""
    return max(expect_axes(name, array, "B, K, ..." if stack else "K, ...")[-2], 1)


def _kinds(first: Any) -> Kinds | None:
    """NumPy's arrays if the first is one: all are, or none."""
    return np.ndarray if isinstance(first, np.ndarray) else None


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
