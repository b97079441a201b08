"""What models are trained on: arrays, tensors, datasets and loaders, and the IDX files that MNIST comes in.

Rows stay where they are (a memory map on the disk) until a batch of them is needed, which is then copied and becomes a
tensor of the model's dtype. Labels are ignored: a datum that is a tuple or a list stands for its first element.

**Integers have to be scaled by the user's word**, ``as_dataset(images, model, scale=1 / 255)``: 0 to 255 are as likely
counts as they are grey levels, and a wrong guess trains without complaint.
"""

from __future__ import annotations

import gzip
import inspect
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, default_collate

from emalgam.tables import DEFLATE_RATIO, reading
from emalgam.validation import check_integer

IDX_TYPES: Final = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC: Final = b"\x1f\x8b"
MOST_AXES: Final = 16
PIECE_BYTES: Final = 2**20
ROWS_AT_ONCE: Final = 1024
NUMBERS_AT_ONCE: Final = 2**22

__all__ = ["as_dataset", "as_loader", "load_idx"]


# ---- IDX


def load_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, the format that MNIST comes in; compressed by gzip or not, whatever its name.

    Parameters
    ----------
    path : path-like
        Two zero bytes, one byte for the type (0x08 uint8, 0x09 int8, 0x0B int16, 0x0C int32, 0x0D float32, 0x0E
        float64), one for the number of axes, four for the length of each, then the numbers, all big-endian.

    Returns
    -------
    array of the file's shape and dtype, in the byte order of this machine

    Raises
    ------
    ValueError
        Naming the file, and the field where there is one: missing, of another format, cut short, longer than its
        header says, or forged. Memory is taken for what is there, not for what a header promises.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from emalgam.nn import load_idx
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "labels.idx").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    ...     load_idx(f"{folder}/labels.idx")
    array([7, 2, 1], dtype=uint8)
    """
    file = Path(path)
    with reading(file), open(file, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        compressed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not compressed:
            return _read_idx(raw, size)
        with gzip.open(raw) as content:
            return _read_idx(content, DEFLATE_RATIO * size)


def _read_idx(file: Any, most_bytes: int) -> np.ndarray:
    """The array in an open file, whose content may have no more than `most_bytes` bytes."""
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0":
        raise ValueError(f"magic number is {head.hex(' ') or 'missing'}; IDX files begin with 00 00")
    kind, n_axes = head[2], head[3]
    if kind not in IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in IDX_TYPES)
        raise ValueError(f"type is 0x{kind:02x}; IDX has {known}")
    if not 1 <= n_axes <= MOST_AXES:
        raise ValueError(f"number of axes is {n_axes}; expected 1 to {MOST_AXES}")
    axes = file.read(4 * n_axes)
    if len(axes) < 4 * n_axes:
        raise ValueError(f"lengths of the axes are cut short: {len(axes)} bytes for {n_axes} axes")
    shape, dtype = struct.unpack(f">{n_axes}I", axes), np.dtype(IDX_TYPES[kind])
    wanted, held = math.prod(shape) * dtype.itemsize, most_bytes - 4 - 4 * n_axes
    if wanted > held:
        raise ValueError(f"shape {shape} of {dtype.name} does not fit in {held} bytes of data (cut short, forged?)")
    content = bytearray()  # grows with what is there: read(wanted) would take memory for all that is wanted
    while len(content) < wanted and (piece := file.read(min(PIECE_BYTES, wanted - len(content)))):
        content += piece
    if len(content) < wanted:
        raise ValueError(f"data has {len(content)} bytes, expected {wanted} for shape {shape} (cut short)")
    if file.read(1):
        raise ValueError(f"data goes on after the {wanted} bytes of shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


# ---- rows by their indices


class Indexed(Dataset[Tensor]):
    """Data that are looked up by index: a number gives one datum, a sequence of numbers a batch."""

    in_memory: bool  # or in a memory map: to look at all of them costs little

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The data at `indices`, (n, *data_shape), copied."""
        raise NotImplementedError

    def __getitem__(self, index: int | Sequence[int]) -> Tensor:
        return self.batch([index])[0] if isinstance(index, int) else self.batch(index)


class Rows(Indexed):
    """Rows of an array or a tensor, times `scale`, in `dtype`."""

    in_memory = True

    def __init__(self, values: np.ndarray | Tensor, dtype: torch.dtype, scale: float | None) -> None:
        self.values, self.dtype, self.scale = values, dtype, scale

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: Sequence[int]) -> Tensor:
        if isinstance(self.values, Tensor):
            chosen = self.values[torch.as_tensor(indices, device=self.values.device)]
        else:  # torch takes no other byte order than this machine's
            native = self.values.dtype.newbyteorder("=")
            chosen = torch.from_numpy(np.asarray(self.values[np.asarray(indices)], native))
        chosen = chosen.to(self.dtype)
        return chosen if self.scale is None else chosen * self.scale


class Items(Indexed):
    """First elements of the items of a dataset, put together into batches as torch does."""

    in_memory = False

    def __init__(self, items: Dataset[Any], dtype: torch.dtype, scale: float | None) -> None:
        self.items, self.dtype, self.scale = items, dtype, scale

    def __len__(self) -> int:
        return len(cast(Any, self.items))

    def batch(self, indices: Sequence[int]) -> Tensor:
        values = default_collate([_first(self.items[int(index)]) for index in indices])
        return as_batch(values, self.dtype, self.scale)


class Part(Indexed):
    """Some of the rows of other data."""

    def __init__(self, whole: Indexed, chosen: np.ndarray) -> None:
        self.whole, self.chosen, self.in_memory = whole, chosen, whole.in_memory

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.whole.batch(self.chosen[np.asarray(indices)].tolist())


def as_dataset(data: Any, model: nn.Module, *, scale: float | None = None) -> Indexed:
    """Data as a dataset of tensors (*data_shape) of the model's dtype, without labels.

    Parameters
    ----------
    data : (N, *data_shape) array, tensor or dataset
        Real numbers. Memory maps are read batch by batch. A dataset's items may be tuples: the first element counts.
    model : Module
        Whose dtype the tensors get.
    scale : float, optional
        What to multiply with, such as 1 / 255 for images of bytes. Integers cannot do without.

    Returns
    -------
    dataset
        Indexed by a number, or by a sequence of numbers for a whole batch. `train` takes it, and torch's DataLoader.

    Raises
    ------
    TypeError
        For integers without `scale`, numbers that are not real, and what is no array, tensor or dataset.
    ValueError
        If there are no data, or no rows of them.

    Examples
    --------
    >>> import numpy as np
    >>> from emalgam.nn import Autoencoder, as_dataset
    >>> images = np.full((10, 64), 51, np.uint8)
    >>> as_dataset(images, Autoencoder((64, 2)), scale=1 / 255)[0, 5].shape
    torch.Size([2, 64])
    """
    if isinstance(data, Indexed):
        if scale is not None:
            raise ValueError(f"scale={scale:g} was given for a dataset that as_dataset has made; give it the array")
        return data
    if isinstance(data, DataLoader | IterableDataset):
        raise TypeError(f"data is a {type(data).__name__}, whose rows have no numbers; expected an array or a dataset")
    dtype = dtype_of(model)
    if isinstance(data, TensorDataset):
        data = data.tensors[0]
    indexed: Indexed
    if isinstance(data, Dataset):
        indexed = Items(data, dtype, scale)
    else:
        values = _real(data)
        _check_scale(values.dtype, is_integer(values), scale)
        indexed = Rows(values, dtype, scale)
    if len(indexed) == 0:
        raise ValueError("data have no rows; expected at least one")
    return indexed


def _real(data: Any) -> np.ndarray | Tensor:
    """An array of real numbers that torch can take, or a tensor of them; one axis at least."""
    if isinstance(data, str | os.PathLike):
        raise TypeError(f"data is the name {os.fspath(data)!r}; load it first: np.load, or emalgam.nn.load_idx")
    try:
        values = data.detach() if isinstance(data, Tensor) else np.asarray(data)
    except ValueError as error:  # parts of different shapes
        raise TypeError(
            f"data is a {type(data).__name__} that is no array; give the data without labels, and batches as a loader"
        ) from error
    if isinstance(values, np.ndarray):
        real = values.dtype.kind in "fiub" and values.dtype.itemsize <= 8
    else:
        real = not values.is_complex() and not values.is_quantized
    if not real:
        raise TypeError(f"data have dtype {values.dtype}; expected real numbers of at most 64 bits")
    if values.ndim == 0:
        raise ValueError("data have shape (); expected (N, ...)")
    return values


def is_integer(values: np.ndarray | Tensor) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() and values.dtype != torch.bool
    return values.dtype.kind in "iu"


def _check_scale(dtype: object, integer: bool, scale: float | None) -> None:
    if integer and scale is None:
        raise TypeError(
            f"data have dtype {dtype}; say how to scale them: emalgam.nn.as_dataset(data, model, scale=1 / 255) for "
            "images of bytes, scale=1 for numbers as they are; a loader has to do it itself"
        )
    if scale is not None and not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale is {scale!r}; expected a finite number other than 0")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first parameter of floating point, else torch's default."""
    return next(
        (weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.get_default_dtype()
    )


def _first(item: Any) -> Any:
    """What counts of an item with labels."""
    return item[0] if isinstance(item, tuple | list) else item


def as_batch(batch: Any, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """The data of a loader's batch, or of a batch of items: labels dropped, floating-point numbers in `dtype`."""
    values = _first(batch)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"a batch of data is a {type(values).__name__}; expected a tensor, or a tuple whose first element is one"
        )
    _check_scale(values.dtype, is_integer(values), scale)
    values = values.to(dtype)
    return values if scale is None else values * scale


# ---- loaders


class Batches(Sampler[list[int]]):
    """Indices of batches, in an order of its own in every epoch, which depends on (seed, epoch) only; or in order.

    Of several processes each takes every so-manyth row; the first rows come twice where rows do not go round.
    """

    def __init__(self, n: int, size: int, seed: int | None = None, rank: int = 0, processes: int = 1) -> None:
        self.n, self.size, self.seed, self.epoch = n, size, seed, 0
        self.rank, self.processes = rank, processes

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by lightning."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.n / self.processes) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.n)
        if self.seed is not None:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        share = np.resize(order, self.processes * math.ceil(self.n / self.processes))[self.rank :: self.processes]
        for start in range(0, len(share), self.size):
            yield share[start : start + self.size].tolist()


def loader_of(dataset: Indexed, batches: Batches) -> DataLoader[Tensor]:
    """Whole batches are looked up at once: putting rows together one by one takes longer than a step of a small net."""
    return DataLoader(dataset, batch_size=None, sampler=cast(Any, batches))


class _Converted:
    """Batches of someone's loader as tensors of the model's dtype, without labels."""

    def __init__(self, loader: Iterable[Any], dtype: torch.dtype, scale: float | None) -> None:
        self.loader, self.dtype, self.scale = loader, dtype, scale

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield as_batch(batch, self.dtype, self.scale)


def as_loader(
    data: Any, model: nn.Module, *, batch_size: int = ROWS_AT_ONCE, scale: float | None = None
) -> Iterable[Tensor]:
    """All data in order, as batches of the model's dtype, without labels; for `encode`, `log_likelihood` and the like.

    Parameters
    ----------
    data : array, tensor, dataset or loader
        As `as_dataset` takes them. A loader, or an iterable of batches, gives the batches and their order itself.
    model : Module
    batch_size : int
        Rows of a batch, if `data` is not a loader.
    scale : float, optional
        See `as_dataset`.

    Returns
    -------
    iterable of (n, *data_shape) tensors
        Where the data are: arrays give tensors on the CPU. It can be gone through as often as `data` can.

    Examples
    --------
    >>> import numpy as np
    >>> from emalgam.nn import Autoencoder, as_loader
    >>> [len(x) for x in as_loader(np.zeros((10, 64)), Autoencoder((64, 2)), batch_size=4)]
    [4, 4, 2]
    """
    check_integer("batch_size", batch_size, 1)
    if is_loader(data):
        return _Converted(
            DataLoader(data, batch_size) if isinstance(data, IterableDataset) else data, dtype_of(model), scale
        )
    dataset = as_dataset(data, model, scale=scale)
    return loader_of(dataset, Batches(len(dataset), batch_size))


def is_loader(data: Any) -> bool:
    """Whether data come as batches, in an order of their own: a loader, or an iterable that is no sequence."""
    if isinstance(data, DataLoader | IterableDataset):
        return True
    known = isinstance(data, Dataset | Tensor | np.ndarray | Sequence) or hasattr(data, "__array__")
    return not known and isinstance(data, Iterable)


def check_data(data: Indexed, model: nn.Module) -> int | None:
    """Errors of the model's `check` before training begins; a checksum of the rows of arrays and tensors.

    Of a dataset only the first two items are looked at: making an item may be expensive.
    """
    check: Callable[..., Any] = getattr(model, "check", lambda x: x)
    counts_rows = "first_row" in inspect.signature(check).parameters
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    checksum = 0
    size = max(1, min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // max(1, data[0].numel()))) if data.in_memory else 2
    for start in range(0, len(data) if data.in_memory else 1, size):
        rows = range(start, min(start + size, len(data)))
        batch = data.batch(rows)
        beside = batch.to(device if batch.device.type == "cpu" else batch.device, dtype_of(model))
        check(beside, **({"first_row": start} if counts_rows else {}))
        checksum = zlib.crc32(batch.contiguous().cpu().view(torch.uint8).numpy(), checksum)
    return checksum if data.in_memory else None
