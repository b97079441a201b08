"""What kernels ask of an array before they follow its pointer: its kind, shape, dtype and layout, never its values.

A check is a few comparisons of attributes, since a call on ten rows takes microseconds. Arrays are NumPy's, or tensors
on a device: those are known by what they have (`shape`, `dtype`, `is_contiguous`), so that nothing imports torch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

# What a kernel takes: a class or a tuple of classes, as for isinstance.
Kinds = type[Any] | tuple[type[Any], ...]

FLOAT64: Final = (np.dtype(np.float64),)
FLOATS: Final = (np.dtype(np.float64), np.dtype(np.float32))
INT64: Final = (np.dtype(np.int64),)
UINT64: Final = (np.dtype(np.uint64),)
UINT32: Final = (np.dtype(np.uint32),)
BOOL: Final = (np.dtype(np.bool_),)
REAL_KINDS: Final = "fiub"  # of NumPy's dtypes


def expect(
    name: str,
    array: Any,
    shape: tuple[int, ...],
    dtypes: tuple[np.dtype, ...],
    kinds: Kinds | None = None,
    written: bool = False,
    free: int | None = None,
) -> None:
    """An aligned array of that shape, of one of those dtypes in this machine's byte order.

    Parameters
    ----------
    name : str
        What the message calls it.
    array : array
    shape : tuple of int
    dtypes : tuple of numpy.dtype
        A tensor's dtype is compared by its name.
    kinds : type or tuple of types, optional
        What `array` has to be an instance of; None: a NumPy array, or whatever looks like a tensor.
    written : bool
        Whether it has to be writeable.
    free : int, optional
        It has to be C-contiguous but for the strides of so many first axes; None: any strides will do.

    Raises
    ------
    TypeError
        If it is no such array.
    ValueError
        If it is, but not of that shape, dtype or layout.

    >>> expect("out", np.empty((2, 3)), (2, 4), FLOAT64)
    Traceback (most recent call last):
        ...
    ValueError: out has shape (2, 3); expected (2, 4)
    """
    of_numpy = isinstance(array, np.ndarray)
    if not (of_numpy if kinds is np.ndarray else _is_one_of(array, kinds)):
        raise not_an_array(name, array, kinds)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}; expected {shape}")
    if array.dtype not in dtypes and _name(array.dtype) not in map(str, dtypes):
        raise ValueError(f"{name} is {_name(array.dtype)}; expected {' or '.join(map(str, dtypes))}")
    if of_numpy:
        flags = array.flags
        if not (flags.behaved if written else flags.aligned):
            wrong = "unaligned" if not flags.aligned else "read-only"
            raise ValueError(f"{name} is {wrong}; expected an aligned array{' to write to' if written else ''}")
        if free is None or flags.c_contiguous:
            return
    if free is not None and not _is_contiguous(array[(slice(1),) * free]):
        which = "" if free == 0 else f" along all axes but the first {'one' if free == 1 else 'two'}"
        raise ValueError(f"{name} has strides {_strides(array)}; expected a C-contiguous array{which}")


def expect_axes(name: str, array: Any, axes: str, kinds: Kinds | None = None) -> tuple[int, ...]:
    """The shape of an array that has as many axes as `axes` has names, such as "N, D"."""
    if not _is_one_of(array, kinds):
        raise not_an_array(name, array, kinds)
    shape: tuple[int, ...] = array.shape
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(shape)}; expected as many axes as ({axes})")
    return shape


def expect_samples(x: Any, kinds: Kinds) -> tuple[int, int]:
    """N and D of samples of any real dtype, byte order, alignment and strides."""
    if not isinstance(x, kinds):
        raise not_an_array("x", x, kinds)
    shape, dtype = x.shape, x.dtype
    if len(shape) != 2:
        raise ValueError(f"x has shape {tuple(shape)}; expected (N, D)")
    if not (dtype.kind in REAL_KINDS if isinstance(x, np.ndarray) else not dtype.is_complex):
        raise ValueError(f"x is {_name(dtype)}; expected a real dtype")
    return shape[0], shape[1]


def expect_option(name: str, value: Any, options: Iterable[str]) -> None:
    """One of some words."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(options)}")


def expect_integer(name: str, value: Any, first: int, end: int) -> None:
    """An integer in [first, end)."""
    if not first <= operator.index(value) < end:
        raise ValueError(f"{name} is {value}; expected an integer from {first} to {end - 1}")


def not_an_array(name: str, value: Any, kinds: Kinds | None = np.ndarray) -> TypeError:
    """The error for what is no array that the kernel takes."""
    wanted = "a NumPy array" if kinds is np.ndarray else "a NumPy array or a tensor on the device"
    return TypeError(f"{name} is {type(value).__name__}; expected {wanted}")


def _is_one_of(array: Any, kinds: Kinds | None) -> bool:
    if kinds is None:
        return isinstance(array, np.ndarray) or hasattr(array, "is_contiguous")
    return isinstance(array, kinds)


def _is_contiguous(array: Any) -> bool:
    return bool(array.flags.c_contiguous if isinstance(array, np.ndarray) else array.is_contiguous())


def _strides(array: Any) -> tuple[int, ...]:
    """Of NumPy in bytes, of tensors in elements."""
    return tuple(array.strides if isinstance(array, np.ndarray) else array.stride())


def _name(dtype: Any) -> str:
    """ "float64", "torch.float64" without the dot, or ">f8"."""
    return str(dtype).removeprefix("torch.")
