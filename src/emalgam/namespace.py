"""NumPy or torch: the algebra is written once, for arrays on the host and for tensors on a GPU.

torch has NumPy's names for all that the algebra needs. The functions here are those for which the two differ, most of
them because on a GPU nothing may wait for the device.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def is_tensor(array: Any) -> bool:
    """Whether `array` is torch's. Imports nothing: a tensor in somebody's hand means that torch is loaded."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def namespace(array: Any) -> Any:
    """The library of `array`."""
    return sys.modules["torch"] if is_tensor(array) else np


def to_host(array: Any) -> np.ndarray:
    """`array` as a NumPy array; waits for the device if it lies on one. bfloat16, unknown to NumPy, becomes float32."""
    if not is_tensor(array):
        return array
    values = array.detach().cpu()
    return (values.float() if values.dtype == sys.modules["torch"].bfloat16 else values).numpy()


def beside(array: np.ndarray, other: Any) -> Any:
    """`array` where `other` lies: itself, or a copy on the other's device."""
    return sys.modules["torch"].tensor(array, device=other.device) if is_tensor(other) else array


def as_float64(array: Any) -> Any:
    """`array` in float64."""
    return array.double() if is_tensor(array) else array.astype(np.float64)


def as_type(array: Any, dtype: str) -> Any:
    """`array` in a dtype of NumPy's name."""
    return array.to(getattr(sys.modules["torch"], dtype)) if is_tensor(array) else array.astype(dtype, copy=False)


def cast(array: Any, like: Any) -> Any:
    """`array` in the dtype of `like`."""
    return array.to(like.dtype) if is_tensor(array) else array.astype(like.dtype, copy=False)


def contiguous(array: Any) -> Any:
    """`array`, copied if its memory is not in C order."""
    return array.contiguous() if is_tensor(array) else np.ascontiguousarray(array)


def cholesky(matrices: Any) -> Any:
    """L with L Lᵀ = Σ, (..., D, D). What is not positive definite is a LinAlgError on the host, NaN on a GPU."""
    if not is_tensor(matrices):
        return np.linalg.cholesky(matrices)
    torch = sys.modules["torch"]
    lower, failed = torch.linalg.cholesky_ex(matrices)
    return torch.where(failed[..., None, None] > 0, float("nan"), lower)


def invert_triangular(lower: Any) -> Any:
    """L⁻¹ of lower triangular matrices (..., D, D), by forward substitution over all of them at once."""
    if is_tensor(lower):
        torch = sys.modules["torch"]
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity.expand(lower.shape), upper=False)
    inverse = np.zeros_like(lower)
    for i in range(lower.shape[-1]):
        inverse[..., i, i] = 1.0
        inverse[..., i, :i] = -(lower[..., i : i + 1, :i] @ inverse[..., :i, :i])[..., 0, :]
        inverse[..., i, : i + 1] /= lower[..., i, i, None]
    return inverse


def below(matrices: Any, bound: Any) -> Any:
    """Which of symmetric matrices (K, D, D) have an eigenvalue below `bound`, (K,) bool.

    On a GPU eigenvalues would wait for the device: there, those without a Cholesky factor when `bound` is taken off.
    """
    if not is_tensor(matrices):
        return np.linalg.eigvalsh(matrices)[:, 0] < bound
    torch = sys.modules["torch"]
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.cholesky_ex(matrices - bound * identity)[1] > 0


def where_true(mask: Any) -> Any:
    """Indices of the true entries of a mask (n,)."""
    return mask.nonzero()[:, 0] if is_tensor(mask) else np.flatnonzero(mask)


def positive_or_error(values: Any, what: str) -> None:
    """LinAlgError unless all values are positive; on a GPU the NaN or infinity that follows says so instead."""
    if not is_tensor(values) and not (values > 0).all():
        raise np.linalg.LinAlgError(f"{what} is not positive")
