"""Arrays in and out: NumPy where it lies, other libraries' arrays through DLPack without a copy, and back.

No framework is imported here: a tensor in somebody's hand means that its library is loaded already.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

_DLPACK_CPU = (1, 3)  # main memory, and main memory pinned for a GPU


def on_gpu(x: Any) -> bool:
    """Whether `x` lies on a device other than the CPU."""
    if isinstance(x, np.ndarray):
        return False
    if hasattr(x, "__cuda_array_interface__"):
        return True
    device = getattr(x, "__dlpack_device__", None)
    return device is not None and int(device()[0]) not in _DLPACK_CPU


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def to_numpy(x: Any, name: str = "x") -> np.ndarray:
    """`x` as a NumPy array: itself, a view through DLPack, or what `numpy.asarray` makes of it.

    Raises
    ------
    ValueError
        If it is ragged, or a tensor that NumPy cannot view (one that requires a gradient, bfloat16).
    """
    if isinstance(x, np.ndarray):
        return x
    try:
        return np.from_dlpack(x) if _is_tensor(x) else np.asarray(x)
    except (ValueError, TypeError, RuntimeError, BufferError) as error:
        remedy = "call x.detach().float() first" if _is_tensor(x) else "give a rectangular table of numbers"
        raise ValueError(
            f"{name} is a {type(x).__name__} that cannot be read as an array ({error}); {remedy}"
        ) from None


def like(result: np.ndarray, x: Any) -> Any:
    """`result` in the library of `x`: a torch tensor for a torch tensor (sharing memory), else itself."""
    return sys.modules["torch"].from_numpy(result) if _is_tensor(x) else result


def same_device(**arrays: Any) -> None:
    """ValueError if some of the arrays are on a GPU and some are not; None does not count."""
    places = {name: on_gpu(array) for name, array in arrays.items() if array is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on the {'GPU' if gpu else 'CPU'}" for name, gpu in places.items())
        raise ValueError(f"all arrays must be on one device, but {found}; move them to the same device first")
