"""What a pass needs to know, on the device; and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Frame:
    """``z = ((x − shift₀) − shift₁) · scale``, rounded once: the shift in two parts, so that float32 loses no digit.

    Attributes
    ----------
    shift : (2, D) of the arithmetic dtype, contiguous
        float64: the second part is zero.
    scale : (D,) of the arithmetic dtype
    """

    shift: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedProblem:
    """`emalgam_kernels.Packed` on the device; all tensors contiguous and of the arithmetic dtype.

    Attributes
    ----------
    feature_map : {"full", "diag", "spherical"}
    arithmetic : {"float32", "float64"}
    tf32 : bool
        Whether matrix products may use TF32.
    frame : Frame
    whitening : (D, D) or None
        z W.
    natural : (K, F)
        η.
    hard : bool
        As in `em_statistics`.
    """

    feature_map: str
    arithmetic: str
    tf32: bool
    frame: Frame
    whitening: torch.Tensor | None
    natural: torch.Tensor
    hard: bool = False

    @property
    def n_components(self) -> int:
        return int(self.natural.shape[0])

    @property
    def n_statistics(self) -> int:
        return int(self.natural.shape[1])


@dataclass(frozen=True, eq=False)
class DirectProblem:
    """`emalgam_kernels.Direct` on the device; all tensors contiguous and of the arithmetic dtype.

    Attributes
    ----------
    feature_map : {"full", "diag"}
    arithmetic : {"float32", "float64"}
    frame : Frame
    means : (K, D)
    factors : (K or 1, D, D) or (K, D)
        P_k, or one that all share; for "diag" the diagonals.
    log_constants : (K,)
    hard : bool
        As in `em_statistics`.
    """

    feature_map: str
    arithmetic: str
    frame: Frame
    means: torch.Tensor
    factors: torch.Tensor
    log_constants: torch.Tensor
    hard: bool = False

    @property
    def n_components(self) -> int:
        return int(self.means.shape[0])


@dataclass(frozen=True, eq=False)
class Sums:
    """The sums over rows that a pass adds to, float64 whatever it computes in.

    Attributes
    ----------
    statistics : (K, F), contiguous
        S.
    total : (1,)
        Σ ω log p, in nats.
    """

    statistics: torch.Tensor
    total: torch.Tensor


@dataclass(frozen=True, eq=False)
class Results:
    """Where the results of a pass over n rows go; None for those that are not wanted.

    Attributes
    ----------
    log_prob : (n,) of the arithmetic dtype, contiguous
        log p(x_n), in nats (hard: the largest logit).
    responsibilities : (n, K) of the arithmetic dtype, contiguous
    sums : Sums
    """

    log_prob: torch.Tensor | None = None
    responsibilities: torch.Tensor | None = None
    sums: Sums | None = None
