"""Arrays in and out: NumPy where it lies, other libraries' arrays through DLPack without a copy, and back.

What lies on a GPU becomes a torch tensor over the same memory and stays there. No framework is imported for anything
else: a tensor in somebody's hand means that its library is loaded already.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Final

import numpy as np

from emalgam.namespace import is_tensor
from emalgam_kernels import blocks

_DLPACK_CPU: Final = (1, 3)  # main memory, and main memory pinned for a GPU
_DLPACK_CUDA: Final = (2, 13)  # a GPU's memory, and managed memory


def simulated() -> bool:
    """Whether Numba simulates a GPU: torch's CPU tensors are then taken for the GPU's."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def on_gpu(x: Any) -> bool:
    """Whether `x` lies on a device other than the CPU."""
    if isinstance(x, np.ndarray):
        return False
    if is_tensor(x) and simulated():
        return True
    if is_tensor(x):
        return x.device.type != "cpu"
    if hasattr(x, "__cuda_array_interface__"):
        return True
    device = getattr(x, "__dlpack_device__", None)
    return device is not None and int(device()[0]) not in _DLPACK_CPU


def on_dask(x: Any) -> bool:
    """Whether `x` is a collection of Dask's. Imports nothing: whoever holds one has loaded Dask."""
    dask = sys.modules.get("dask")
    return dask is not None and not isinstance(x, np.ndarray) and bool(dask.is_dask_collection(x))


def to_numpy(x: Any, name: str = "x") -> np.ndarray:
    """`x` as a NumPy array: itself, a view through DLPack, or what `numpy.asarray` makes of it.

    Raises
    ------
    ValueError
        If it is ragged, a tensor that NumPy cannot view (one that requires a gradient, bfloat16), a collection of
        Dask's, which need not fit in memory, or an array with values that are masked.
    """
    if isinstance(x, np.ma.MaskedArray):
        masked = int(np.ma.getmaskarray(x).sum())
        if masked:
            raise ValueError(
                f"{name} is a masked array with {masked} values masked (missing values are not "
                f"supported); leave out their rows, or give {name}.data, which holds what is under the mask"
            )
        return x.data
    if isinstance(x, np.ndarray):
        return np.asarray(x) if isinstance(x, np.matrix) else x  # whose rows are matrices again
    if on_dask(x):
        raise ValueError(
            f"{name} is a dask {type(x).__name__}; expected an array in memory: {name}.compute(), or a function that "
            "takes Dask's collections (emalgam.fit, GaussianMixture, Mixture, emalgam.distributed)"
        )
    try:
        return np.from_dlpack(x) if is_tensor(x) else np.asarray(x)
    except (ValueError, TypeError, RuntimeError, BufferError) as error:
        remedy = "call x.detach().float() first" if is_tensor(x) else "give a rectangular table of numbers"
        raise ValueError(
            f"{name} is a {type(x).__name__} that cannot be read as an array ({error}); {remedy}"
        ) from None


def to_numbers(x: Any, name: str = "x") -> np.ndarray:
    """`to_numpy`, with NaN where columns of a data frame mark missing values."""
    array = to_numpy(x, name)
    if array.dtype == object and hasattr(x, "convert_dtypes"):
        columns = [column for _, column in x.items()] if array.ndim == 2 else [x]
        # Of others pandas makes numbers too, of dates and of text: who checks the type will say that they are none.
        if all(map(_holds_numbers, columns)):
            return x.to_numpy(np.float64, na_value=np.nan)
    return array


def _holds_numbers(column: Any) -> bool:
    """Whether a column of pandas has a type of numbers, or objects that are."""
    if column.dtype.kind in "fiub":
        return True
    return all(isinstance(value, numbers.Real) for value in column.to_numpy(object, na_value=np.nan))


def to_tensor(x: Any, name: str = "x") -> Any:
    """`x`, which lies on a GPU, as a torch tensor over the same memory.

    Raises
    ------
    ValueError
        If its device is not one of CUDA's, or it requires a gradient.
    """
    import torch

    if isinstance(x, torch.Tensor):
        if x.requires_grad:
            raise ValueError(f"{name} is a tensor that requires a gradient; call x.detach() first")
        if x.device.type != "cuda" and not simulated():
            raise ValueError(f"{name} is on device {x.device}; expected the CPU or a CUDA device: {name}.cpu()")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is a tensor of layout {x.layout}; call x.to_dense() first")
        return x.resolve_neg()
    try:
        if hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) in _DLPACK_CUDA:
            return torch.from_dlpack(x)
        return torch.as_tensor(x, device=_device_of(x))
    except (ValueError, TypeError, RuntimeError, BufferError) as error:
        raise ValueError(
            f"{name} is a {type(x).__name__} that cannot be read as a CUDA array ({error}); make it a torch tensor"
        ) from None


def _device_of(x: Any) -> str:
    """The torch device of an array that only has a ``__cuda_array_interface__``: the driver knows its pointer."""
    pointer = x.__cuda_array_interface__.get("data", (0,))[0]
    try:
        from cuda.bindings import driver

        ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        error, number = driver.cuPointerGetAttribute(ordinal, pointer)
    except (ImportError, RuntimeError):  # no driver: whoever uses the array will say so
        return "cuda"
    return "cuda" if int(error) else f"cuda:{int(number)}"  # an empty array has no pointer, and lies anywhere


def read(x: Any, name: str = "x") -> Any:
    """`x` as a tensor if it lies on a GPU, else as a NumPy array."""
    return to_tensor(x, name) if on_gpu(x) else to_numbers(x, name)


def kind(array: Any) -> str:
    """The kind of an array's numbers as NumPy's one letter: "f", "i", "u", "b", or another one."""
    if not is_tensor(array):
        return str(array.dtype.kind)
    dtype = array.dtype
    if dtype.is_floating_point:
        return "f"
    if dtype.is_complex:
        return "c"
    return "b" if str(dtype) == "torch.bool" else "i"


def tile_dtype(x: Any) -> np.dtype:
    """The type that kernels read x as: float32 for float32, else float64."""
    if is_tensor(x):
        return np.dtype(np.float32 if str(x.dtype) == "torch.float32" else np.float64)
    return blocks.tile_dtype(x)


def empty(shape: tuple[int, ...], dtype: Any, beside: Any) -> Any:
    """An array of a NumPy dtype where `beside` lies."""
    if not is_tensor(beside):
        return np.empty(shape, dtype)
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device=beside.device)


def like(result: Any, x: Any) -> Any:
    """`result` in the library of `x`, on its device and sharing memory, if it has a ``from_dlpack``; else itself."""
    if is_tensor(x):
        return result if is_tensor(result) else sys.modules["torch"].from_numpy(result)
    if not is_tensor(result):
        return result
    library = type(x).__module__.partition(".")[0]
    home = sys.modules.get({"jaxlib": "jax.numpy", "jax": "jax.numpy"}.get(library, library))
    return home.from_dlpack(result) if home is not None and hasattr(home, "from_dlpack") else result


def _place(x: Any) -> str:
    """Where an array lies, in words."""
    if not on_gpu(x):
        return "the CPU"
    if is_tensor(x):
        return f"the GPU ({x.device})"
    if hasattr(x, "__dlpack_device__"):
        return f"the GPU (cuda:{int(x.__dlpack_device__()[1])})"
    return f"the GPU ({_device_of(x)})"


def same_device(**arrays: Any) -> None:
    """ValueError if the arrays are not all on one device; None does not count."""
    places = {name: _place(array) for name, array in arrays.items() if array is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ValueError(f"all arrays must be on one device, but {found}; move them to the same device first")


@contextmanager
def callers_stream(x: Any) -> Iterator[None]:
    """Make the stream on which `x` was computed torch's current one: CuPy's current one, or the one that `x` names.

    MemoryError that says what to do if the GPU's memory does not suffice for what is done there.
    """
    if not on_gpu(x) or find_spec("torch") is None:  # then there is no backend either, and it is said below
        yield
        return
    import torch

    pointer = None if is_tensor(x) else _stream_pointer(x)
    with nullcontext() if pointer is None else torch.cuda.stream(_stream(pointer, _place(x))):
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU's memory does not suffice ({str(error).splitlines()[0]}); free some of it "
                "(torch.cuda.empty_cache()), or give a NumPy array or memory map, which is read in pieces"
            ) from error


def _stream(pointer: int, place: str) -> Any:
    """torch's object for a stream.

    0 and 1 (`cudaStreamLegacy`) are the device's default one, which torch knows by another name; 2
    (`cudaStreamPerThread`) is this thread's own, which CUDA takes for a pointer wherever it takes one.
    """
    import torch

    device = torch.device(place.removeprefix("the GPU (").removesuffix(")"))
    return torch.cuda.ExternalStream(pointer, device=device) if pointer > 1 else torch.cuda.default_stream(device)


def _stream_pointer(x: Any) -> int | None:
    """The stream on which `x` is made: CuPy's current one, or the one that `x` names; None if it names none.

    ValueError for 0, which version 3 of the interface does not allow: nobody knows which default stream is meant.
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return int(cupy.cuda.get_current_stream().ptr)
    named = getattr(x, "__cuda_array_interface__", {}).get("stream")
    if named == 0:
        raise ValueError(
            f"the __cuda_array_interface__ of a {type(x).__name__} names stream 0; expected None, 1 (the default "
            "stream), 2 (the thread's default stream) or the address of a stream"
        )
    return None if named is None else int(named)
