"""Data for models: IDX files and what else they may hold; arrays, tensors, datasets and loaders as batches."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from emalgam.nn import Autoencoder, as_dataset, as_loader, load_idx
from emalgam.nn.data import IDX_TYPES, Batches, check_data

CODES = {np.dtype(name).newbyteorder("=").name: code for code, name in IDX_TYPES.items()}


def idx(array: np.ndarray) -> bytes:
    """An IDX file's content, written after the format's description."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[array.dtype.name], array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.idx"


# ---- IDX


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(7,), (3, 4), (5, 2, 3), (0, 28, 28)])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_of_every_type(dtype: str, shape: tuple[int, ...], compressed: bool, path: Path) -> None:
    array = np.random.default_rng(0).normal(scale=100, size=shape).astype(dtype)
    path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    found = load_idx(path)
    assert found.dtype == array.dtype
    assert found.dtype.isnative
    assert found.shape == shape
    assert found.tobytes() == array.tobytes()


def test_the_published_header_of_mnist(path: Path) -> None:
    # The header of train-labels-idx1-ubyte and its first labels, as LeCun's page lists them, for five labels.
    path.write_bytes(bytes.fromhex("00000801 00000005 05 00 04 01 09".replace(" ", "")))
    assert load_idx(path).tolist() == [5, 0, 4, 1, 9]


SOUND = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
FORGED = {
    "empty": (b"", "magic number is missing; IDX files begin with 00 00"),
    "another format": (b"\x93NUMPY..", "magic number is 93 4e 55 4d; IDX files begin with 00 00"),
    "no such type": (SOUND[:2] + b"\x0a" + SOUND[3:], "type is 0x0a; IDX has 0x08, 0x09, 0x0b, 0x0c, 0x0d, 0x0e"),
    "no axes": (SOUND[:3] + b"\x00" + SOUND[4:], "number of axes is 0; expected 1 to 16"),
    "many axes": (SOUND[:3] + b"\xff" + SOUND[4:], "number of axes is 255; expected 1 to 16"),
    "header cut": (SOUND[:9], "lengths of the axes are cut short: 5 bytes for 3 axes"),
    "data cut": (SOUND[:-1], r"shape \(2, 3, 4\) of uint8 does not fit in 23 bytes of data \(cut short, forged\?\)"),
    "longer": (SOUND + b"\0", r"data goes on after the 24 bytes of shape \(2, 3, 4\)"),
    "huge": (
        b"\0\0\x0e\x04" + b"\xff" * 16 + b"\0" * 100,
        r"shape \(4294967295, 4294967295, 4294967295, 4294967295\) of float64 does not fit in 100 bytes",
    ),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("compressed", [False, True])
def test_what_idx_files_cannot_hold(name: str, compressed: bool, path: Path) -> None:
    content, text = FORGED[name]
    if compressed:
        content = gzip.compress(content)
        # a compressed file may hold more than its size: the claim is refused later, or for a larger bound
        text = {
            "data cut": r"data has 23 bytes, expected 24 for shape \(2, 3, 4\) \(cut short\)",
            "huge": r"shape \(4294967295, .*\) of float64 does not fit in \d+ bytes",
        }.get(name, text)
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"images.idx: {text}"):
        load_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("change", [lambda c: c[:-9], lambda c: c[:40] + bytes(20) + c[60:], lambda c: c[:12]])
def test_damaged_gzip(change: Any, path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 10), dtype=np.uint8)
    path.write_bytes(change(gzip.compress(idx(noise))))
    with pytest.raises(ValueError, match=r"images\.idx: "):
        load_idx(path)


def test_a_claim_within_what_gzip_may_hold_takes_no_memory(path: Path) -> None:
    """A file of 64 KB may hold 64 MB: they are not there, and no memory is taken for them."""
    noise = np.random.default_rng(0).bytes(2**16)
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 2**26) + noise))
    tracemalloc.start()
    with pytest.raises(ValueError, match="data has 65536 bytes, expected 67108864"):
        load_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.idx: there is no such file"):
        load_idx(tmp_path / "none.idx")
    with pytest.raises(ValueError, match="is not a regular file"):
        load_idx(tmp_path)


# ---- rows


class Squares(Dataset[Any]):
    """Item i is (i², ..., i²) with a label; making it is counted."""

    made = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.made += 1
        return torch.full((4,), float(index) ** 2, dtype=torch.float64), index


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([np.ones(4, np.float32)] * 5)


def model(dtype: torch.dtype = torch.float32) -> Autoencoder:
    return Autoencoder((4, 2)).to(dtype)


def everything(data: Any, of: Autoencoder | None = None, **options: Any) -> torch.Tensor:
    return torch.cat(list(as_loader(data, of or model(), batch_size=4, **options)))


X = np.random.default_rng(1).normal(size=(10, 4))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16])
def test_arrays_of_every_float_become_the_models_dtype(dtype: str, of: torch.dtype) -> None:
    found = everything(X.astype(dtype), model(of))
    assert found.dtype == of
    assert torch.equal(found, torch.from_numpy(X.astype(dtype).astype(np.float64)).to(of))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64"])
@pytest.mark.parametrize("tensor", [False, True])
def test_integers_times_the_scale(dtype: str, tensor: bool) -> None:
    images: Any = np.random.default_rng(2).integers(0, 100, (10, 4)).astype(dtype)
    expected = torch.tensor(images.astype(np.float32)) * (1 / 255)
    if tensor:
        images = torch.from_numpy(images)
    assert torch.equal(everything(images, scale=1 / 255), expected)
    text = rf"data have dtype (torch\.)?{dtype}; say how to scale them: .*scale=1 / 255"
    with pytest.raises(TypeError, match=text):
        as_dataset(images, model())


def test_lists_of_images() -> None:
    images = [X[:2], X[2:4]]
    assert torch.equal(everything(images), torch.from_numpy(np.stack(images)).float())
    assert torch.equal(everything([torch.from_numpy(image) for image in images]), everything(images))


def test_booleans_are_zero_and_one() -> None:
    assert torch.equal(everything(X > 0), torch.from_numpy((X > 0).astype(np.float32)))


def test_memory_maps_are_read_by_the_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = as_dataset(mapped, model())
    assert np.shares_memory(rows.values, mapped)  # type: ignore[attr-defined]
    assert torch.equal(everything(mapped), torch.from_numpy(X).float())
    batch = rows[[3, 1]]
    batch += 1  # a copy: the map is read-only
    assert torch.equal(rows[3], torch.from_numpy(X[3]).float())


def test_strided_and_read_only_arrays() -> None:
    wide = np.repeat(X, 2, 1)[:, ::2]
    wide.setflags(write=False)
    assert torch.equal(everything(wide), everything(X))


def test_tensors_that_need_gradients_are_only_data() -> None:
    assert not everything(torch.ones(5, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(torch.from_numpy(X), torch.arange(10)),
        [tuple(row) for row in X],
        DataLoader(TensorDataset(torch.from_numpy(X), torch.arange(10)), batch_size=3),
        ((torch.from_numpy(X[i : i + 2]), None) for i in range(0, 10, 2)),
    ],
    ids=["dataset", "list", "loader", "generator"],
)
def test_labels_are_ignored(data: Any) -> None:
    assert torch.equal(everything(data), torch.from_numpy(X).float())


def test_items_of_datasets() -> None:
    squares = Squares()
    rows = as_dataset(squares, model())
    assert rows[3].tolist() == [9.0] * 4
    assert rows[[1, 2]].tolist() == [[1.0] * 4, [4.0] * 4]
    assert torch.equal(torch.cat(list(DataLoader(rows, batch_size=3))), everything(squares))
    assert len(everything(Endless())) == 5


def test_a_dataset_is_itself() -> None:
    rows = as_dataset(X, model())
    assert as_dataset(rows, model()) is rows
    with pytest.raises(ValueError, match="scale=2 was given for a dataset that as_dataset has made"):
        as_dataset(rows, model(), scale=2)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (X.astype(complex), TypeError, "data have dtype complex128; expected real numbers"),
        (X.astype(np.longdouble), TypeError, "data have dtype .*; expected real numbers of at most 64 bits"),
        (np.array(["a"]), TypeError, "data have dtype <U1; expected real numbers"),
        (np.float64(3), ValueError, r"data have shape \(\); expected \(N, ...\)"),
        (X[:0], ValueError, "data have no rows; expected at least one"),
        ("mnist.idx", TypeError, r"data is the name 'mnist\.idx'; load it first: np\.load, or emalgam\.nn\.load_idx"),
        (Path("x.npy"), TypeError, r"data is the name 'x\.npy'; load it first"),
        (Endless(), TypeError, "data is a Endless, whose rows have no numbers"),
        ((X, np.zeros(10)), TypeError, "data is a tuple that is no array; give the data without labels, and batches"),
        ([torch.ones(5, 4), torch.ones(3, 4)], TypeError, "data is a list that is no array"),
    ],
)
def test_what_are_no_data(data: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        as_dataset(data, model())


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_scales_that_make_no_sense(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale is .*; expected a finite number other than 0"):
        as_dataset(X, model(), scale=scale)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_batches_of_no_rows(batch_size: float) -> None:
    with pytest.raises(ValueError, match=rf"batch_size is {batch_size}; expected an integer >= 1"):
        as_loader(X, model(), batch_size=batch_size)  # type: ignore[arg-type]


def test_batches_that_are_none() -> None:
    with pytest.raises(TypeError, match="a batch of data is a dict; expected a tensor, or a tuple whose first element"):
        everything(DataLoader([{"image": 1.0}], batch_size=None))  # type: ignore[arg-type]


# ---- checks before training


def test_every_row_is_checked() -> None:
    bad = np.random.default_rng(3).uniform(size=(3000, 4))
    bad[2500, 1] = np.nan
    with pytest.raises(ValueError, match=r"x contains nan at \[2500, 1\]; expected finite numbers"):
        check_data(as_dataset(bad, model()), model())
    unit = Autoencoder((4, 2), output="sigmoid")
    bad[2500, 1] = 1.5
    with pytest.raises(ValueError, match=r"x is 1\.5 at \[2500, 1\]; .*expects values in \[0, 1\]"):
        check_data(as_dataset(bad, unit), unit)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(10, 2, 2\); expected \(N, 4\); call x\.reshape\(-1, 4\)"):
        check_data(as_dataset(X.reshape(10, 2, 2), model()), model())


def test_of_a_dataset_two_items_are_made() -> None:
    squares = Squares()
    assert check_data(as_dataset(squares, model()), model()) is None
    assert squares.made <= 3


def test_checksums_tell_data_apart() -> None:
    other = X.copy()
    other[9, 3] += 1e-3
    first, second, third = (check_data(as_dataset(x, model()), model()) for x in (X, X.copy(), other))
    assert first == second != third


# ---- orders


def test_orders_follow_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(100, 7, seed)
        batches.set_epoch(epoch)
        assert len(batches) == len(list(batches)) == 15
        return [index for batch in batches for index in batch]

    assert order(1, 2) == order(1, 2)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(found) for found in orders}) == 9
    assert all(sorted(found) == list(range(100)) for found in orders)


@pytest.mark.parametrize(("n", "processes"), [(10, 3), (12, 4), (2, 3)])
def test_processes_share_the_rows(n: int, processes: int) -> None:
    shares = [[i for batch in Batches(n, 2, 5, rank, processes) for i in batch] for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert {i for share in shares for i in share} == set(range(n))
    assert sum(map(len, shares)) < n + processes
