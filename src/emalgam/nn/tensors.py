"""Tensors as arguments: what operators, priors, divergences and models check in the same words, and their noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

HALVES: Final = (torch.float16, torch.bfloat16)


def check_tensor(name: str, given: Any) -> Tensor:
    """`given` if it is a tensor; TypeError that says how to make one."""
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{name} is a {type(given).__name__}; expected a torch tensor, e.g. torch.as_tensor({name}, "
            "dtype=torch.float32)"
        )
    return given


def check_alike(**given: Tensor) -> None:
    """TypeError or ValueError naming the first tensor whose dtype or device is not that of the first one."""
    (first, like), *others = given.items()
    for name, each in others:
        if each.dtype != like.dtype:
            raise TypeError(
                f"{first} has dtype {like.dtype} but {name} {each.dtype}; expected one type: {name}.to({first}.dtype)"
            )
        if each.device != like.device:
            raise ValueError(
                f"{first} is on {like.device} but {name} on {each.device}; expected one device: "
                f"{name}.to({first}.device)"
            )


def check_beside(name: str, given: Tensor, own: Tensor, owner: str, of_integers: str = "") -> Tensor:
    """`given` if it has the dtype (but under autocast) and the device of a module's `own` parameter.

    TypeError or ValueError that calls the module `owner`, and says what else to do with integers.
    """
    if given.dtype != own.dtype and not torch.is_autocast_enabled(given.device.type):
        other = f", or {owner}.to({given.dtype})" if given.is_floating_point() else of_integers
        raise TypeError(f"{name} has dtype {given.dtype}, the {owner} {own.dtype}; call {name}.to({own.dtype}){other}")
    if given.device != own.device:
        raise ValueError(
            f"{name} lies on {given.device}, the {owner} on {own.device}; call {name}.to('{own.device}'), "
            f"or {owner}.to('{given.device}')"
        )
    return given


def as_rows(name: str, given: Tensor) -> Tensor:
    """(..., D) as (N, D); ValueError if there is no D, or it is zero."""
    if given.ndim == 0:
        raise ValueError(f"{name} is a single number; expected (..., features)")
    if given.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected (..., features), at least one of them")
    return given.reshape(-1, given.shape[-1])


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it has 16 bits: NumPy has no bfloat16, kernels read no float16, and a nat needs more digits."""
    return x.float() if x.dtype in HALVES else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products in the type of their factors on the device of x: a divergence of 8 bits is none."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def check_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """`generator` if it is torch's; TypeError that says how to make one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}; expected a torch.Generator: torch.Generator().manual_seed(0)")
    return generator


def standard_normal(like: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """ε ~ N(0, I) of a shape, with the dtype and on the device of `like`."""
    how: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    # torch.compile has no graph for an argument generator=, None included, once sizes are symbols
    return (
        torch.randn(shape, **how)
        if generator is None
        else torch.randn(shape, generator=check_generator(generator), **how)
    )
