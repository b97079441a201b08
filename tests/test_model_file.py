"""Model files: what was saved comes back; whatever else a file may hold is one error that names file and field."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import emalgam
from emalgam.mixture import Mixture
from emalgam.model_file import ModelFileError, load_metadata, load_model, save_model

K, D = 3, 2
SHAPES = {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}
METADATA = {"format": "emalgam.mixture", "format_version": "1", "covariance_type": "diag"}


def mixture_of(covariance_type: str) -> Mixture:
    rng = np.random.default_rng(7)
    if covariance_type in ("full", "tied"):
        a = rng.normal(size=(*SHAPES[covariance_type][:-1], 4))
        covariances = a @ a.swapaxes(-1, -2)
    else:
        covariances = rng.uniform(0.1, 2.0, SHAPES[covariance_type])
    return Mixture(rng.dirichlet(np.ones(K)), rng.normal(size=(K, D)), covariances, covariance_type)


def entry(shape: list[int], start: int) -> dict[str, Any]:
    return {"dtype": "F64", "shape": shape, "data_offsets": [start, start + 8 * int(np.prod(shape))]}


def sound_header() -> dict[str, Any]:
    return {
        "__metadata__": dict(METADATA),
        "weights": entry([K], 0),
        "means": entry([K, D], 24),
        "covariances": entry([K, D], 72),
    }


def sound_data() -> np.ndarray:
    return np.concatenate([np.full(K, 1 / K), np.arange(K * D), np.ones(K * D)]).astype("<f8")


def write(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("covariance_type", SHAPES)
def test_what_was_saved_comes_back(covariance_type: str, path: Path) -> None:
    mixture = mixture_of(covariance_type)
    save_model(mixture, path)
    loaded = load_model(path)
    assert loaded.covariance_type == covariance_type
    assert loaded.covariances.tobytes() == mixture.covariances.tobytes()
    assert loaded.means.tobytes() == mixture.means.tobytes()
    # the constructor divides weights by their sum, which may differ from one in the last bit
    np.testing.assert_allclose(loaded.weights, mixture.weights, rtol=4e-16)
    x = np.random.default_rng(1).normal(size=(20, D))
    np.testing.assert_allclose(loaded.log_prob(x), mixture.log_prob(x), rtol=0, atol=1e-12)


def test_what_holds_a_mixture_is_saved_too(path: Path) -> None:
    x = np.random.default_rng(3).normal(size=(300, D))
    fitted = emalgam.fit(x, K, random_state=0)
    for model in (fitted, emalgam.GaussianMixture(K, random_state=0).fit(x)):
        save_model(model, path)
        np.testing.assert_array_equal(load_model(path).means, fitted.mixture.means)
    save_model(emalgam.Gaussian([1.0], [[2.0]]), path)
    assert load_model(path).covariances.tolist() == [[[2.0]]]
    with pytest.raises(ValueError, match="mixture is a str; expected a Gaussian, Mixture or fitted GaussianMixture"):
        save_model("model", path)


@pytest.mark.parametrize("covariance_type", SHAPES)
def test_a_fitted_mixture_comes_back(covariance_type: str, path: Path) -> None:
    x = np.random.default_rng(3).normal(size=(300, D)) * [1.0, 50.0] + 1000.0
    mixture = emalgam.fit(x, K, covariance_type=covariance_type, random_state=0, tol=1e-2).mixture
    emalgam.save_model(mixture, path)
    np.testing.assert_allclose(emalgam.load_model(path).log_prob(x), mixture.log_prob(x), rtol=0, atol=1e-9)


def test_metadata_comes_back(path: Path) -> None:
    save_model(mixture_of("diag"), path, metadata={"data": "café\n", "zeta": "1"})
    assert load_metadata(path) == METADATA | {"data": "café\n", "zeta": "1"}


def test_equal_mixtures_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    metadata = {letter: letter for letter in "qwertyuiopasdfg"}
    save_model(mixture_of("full"), path, metadata=metadata)
    for attempt in range(5):
        again = tmp_path / f"{attempt}.safetensors"
        save_model(mixture_of("full"), again, metadata=dict(reversed(metadata.items())))
        assert again.read_bytes() == path.read_bytes()


def test_other_readers_of_safetensors_read_it(path: Path) -> None:
    from safetensors.numpy import load_file

    mixture = mixture_of("tied")
    save_model(mixture, path, metadata={"b": "2", "a": "1"})
    tensors = load_file(path)
    assert {name: array.shape for name, array in tensors.items()} == {
        "weights": (K,),
        "means": (K, D),
        "covariances": (D, D),
    }
    assert (tensors["covariances"] == mixture.covariances).all()


def test_the_forging_helpers_write_a_sound_file(path: Path) -> None:
    write(path, sound_header(), sound_data().tobytes())
    assert load_model(path).means.tolist() == [[0, 1], [2, 3], [4, 5]]


def change(*keys: str | int, value: object) -> Callable[[Any], None]:
    def apply(header: Any) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return apply


def remove(*keys: str) -> Callable[[Any], None]:
    def apply(header: Any) -> None:
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return apply


HUGE = 2**40
FORGED = {
    "no metadata": (remove("__metadata__"), "__metadata__ is missing"),
    "metadata not strings": (
        change("__metadata__", "n", value=1),
        "__metadata__ is missing or not an object of strings",
    ),
    "no format": (remove("__metadata__", "format"), "format is None, expected 'emalgam.mixture'"),
    "another format": (change("__metadata__", "format", value="pt"), "format is 'pt', expected 'emalgam.mixture'"),
    "another version": (
        change("__metadata__", "format_version", value="2"),
        "format_version is '2'; this version of emalgam reads '1'",
    ),
    "no covariance type": (
        remove("__metadata__", "covariance_type"),
        "covariance_type is None, expected one of full, tied",
    ),
    "another covariance type": (
        change("__metadata__", "covariance_type", value="low rank"),
        "covariance_type is 'low rank', expected one of full, tied, diag, spherical",
    ),
    "tensor missing": (
        remove("means"),
        "tensors are ['covariances', 'weights'], expected ['covariances', 'means', 'weights']",
    ),
    "tensor too many": (
        change("more", value=entry([1], 120)),
        "tensors are ['covariances', 'means', 'more', 'weights']",
    ),
    "entry not an object": (change("means", value=[1]), "means is not described by dtype, shape and data_offsets"),
    "entry without shape": (remove("means", "shape"), "means is not described by dtype, shape and data_offsets"),
    "dtype": (change("weights", "dtype", value="F32"), "weights has dtype 'F32', expected 'F64'"),
    "shape not a list": (change("means", "shape", value=6), "means has shape 6, expected whole numbers"),
    "negative shape": (change("means", "shape", value=[-3, -2]), "means has shape [-3, -2], expected whole numbers"),
    "fractional shape": (change("means", "shape", value=[3.0, 2]), "means has shape [3.0, 2], expected whole numbers"),
    "boolean shape": (change("weights", "shape", value=[True]), "weights has shape [True], expected whole numbers"),
    "number beyond 64 bits": (change("means", "shape", value=[10**4000, 2]), "means has shape"),
    "three offsets": (
        change("means", "data_offsets", value=[24, 72, 72]),
        "means has data_offsets [24, 72, 72], expected two",
    ),
    "no components": (change("means", "shape", value=[0, 2]), "means has shape (0, 2), expected (K, D)"),
    "means of one dimension": (change("means", "shape", value=[6]), "means has shape (6,), expected (K, D)"),
    "weights that do not fit": (change("weights", "shape", value=[4]), "weights has shape (4,), expected (3,)"),
    "covariances that do not fit": (
        change("covariances", "shape", value=[3, 2, 2]),
        "covariances has shape (3, 2, 2), expected (3, 2) for 'diag'",
    ),
    "covariances of another type": (
        change("__metadata__", "covariance_type", value="full"),
        "covariances has shape (3, 2), expected (3, 2, 2) for 'full'",
    ),
    "overlap": (change("means", "data_offsets", value=[0, 48]), "lies at bytes 0 to 48 of the data"),
    "hole": (change("covariances", "data_offsets", value=[80, 128]), "covariances lies at bytes 80 to 128 of the data"),
    "offsets of another length": (
        change("means", "data_offsets", value=[24, 64]),
        "means lies at bytes 24 to 64 of the data",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_header_is_named(case: str, path: Path) -> None:
    forge, message = FORGED[case]
    header = sound_header()
    forge(header)
    write(path, header, sound_data().tobytes())
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


VALUES = {
    "NaN": (0, np.nan, "weights contains NaN at [0]"),
    "infinity": (4, np.inf, "means contains inf at [0, 1]"),
    "weights that do not sum to one": (1, 0.5, "weights have"),
    "a negative variance": (10, -1.0, "covariances of component 0 are not positive definite"),
}


@pytest.mark.parametrize("case", VALUES)
def test_numbers_that_are_no_mixture_are_named(case: str, path: Path) -> None:
    index, value, message = VALUES[case]
    data = sound_data()
    data[index] = value
    write(path, sound_header(), data.tobytes())
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert f"{path}: {message}" in str(caught.value)


BROKEN = {
    "empty": (b"", "header is cut short: the file has 0 bytes"),
    "seven bytes": (b"1234567", "header is cut short: the file has 7 bytes"),
    "length beyond the file": (
        struct.pack("<Q", 100) + b"{}",
        "header has 100 bytes by its own account, in a file of 10",
    ),
    "length beyond everything": (
        struct.pack("<Q", 2**63) + b"{}",
        "header has 9223372036854775808 bytes by its own account",
    ),
    "no header": (struct.pack("<Q", 0), "header has 0 bytes by its own account"),
    "not JSON": (struct.pack("<Q", 4) + b"{{{{", "header is not valid JSON"),
    "not text": (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "header is not valid JSON"),
    "nested beyond reason": (struct.pack("<Q", 10**6) + b"[" * 10**6, "header is not valid JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "header is list, expected a JSON object"),
    "a name twice": (struct.pack("<Q", 15) + b'{"a":1,  "a":2}', "header is not valid JSON (a name occurs twice)"),
    "a pickle": (
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "header has",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case: str, path: Path) -> None:
    content, message = BROKEN[case]
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert f"{path}: {message}" in str(caught.value)


def test_every_cut_is_an_error(path: Path) -> None:
    save_model(mixture_of("full"), path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match="cut short"):
            load_model(path)


def test_bytes_behind_the_end_are_an_error(path: Path) -> None:
    save_model(mixture_of("full"), path)
    path.write_bytes(path.read_bytes() + b"12345678")
    with pytest.raises(ModelFileError, match="data has 176 bytes, expected 168"):
        load_model(path)


def test_what_a_header_promises_is_not_allocated(path: Path) -> None:
    header = sound_header() | {
        "weights": entry([HUGE], 0),
        "means": entry([HUGE, 2], 8 * HUGE),
        "covariances": entry([HUGE, 2], 24 * HUGE),
    }
    write(path, header, sound_data().tobytes())
    tracemalloc.start()
    with pytest.raises(ModelFileError, match="weights lies at bytes 0 to 8796093022208 of the data"):
        load_model(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, f"{peak} bytes were allocated for a file of {path.stat().st_size}"


def test_a_missing_file_a_folder_and_a_device_are_errors(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="there is no such file"):
        load_model(path)
    with pytest.raises(ModelFileError, match="is not a regular file"):
        load_model(tmp_path)
    with pytest.raises(ModelFileError, match="is not a regular file"):
        load_model("/dev/null")


@given(data=st.binary(max_size=400))
def test_random_bytes_are_model_file_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFileError):
        load_model(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(field=st.sampled_from(["weights", "means", "covariances", "__metadata__"]), value=JSON, inside=st.booleans())
def test_random_headers_are_model_file_errors(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object, inside: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    header = sound_header()
    if inside:
        for key in list(header[field]):
            header[field][key] = value
    else:
        header[field] = value
    write(path, header, sound_data().tobytes())
    with pytest.raises(ModelFileError):
        load_model(path)


@given(position=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_changed_byte_is_a_mixture_or_a_model_file_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_model(mixture_of("full"), path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= value
    path.write_bytes(content)
    try:
        loaded = load_model(path)
    except ModelFileError:
        return
    assert abs(loaded.weights.sum() - 1) < 1e-9
    assert np.isfinite(loaded.means).all()


def test_covariances_that_overflowed_are_not_saved(path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 2)) * 1e200
    mixture = emalgam.fit(x, 2, random_state=0).mixture
    assert not np.isfinite(mixture.covariances).all()
    with pytest.raises(ModelFileError, match="covariances holds values that are not finite and cannot be saved"):
        save_model(mixture, path)
    assert not path.exists()


def test_covariances_that_underflowed_are_not_saved(path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 2)) * 1e-200
    mixture = emalgam.fit(x, 2, random_state=0).mixture
    with pytest.raises(ModelFileError, match="not saved, because it could not be loaded again"):
        save_model(mixture, path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "mine"}, "metadata holds 'format', which the format itself uses"),
        ({"n": 1}, "metadata holds 'n': 1; expected a string under a string"),
        ({"long": "x" * 2**20}, "metadata is too long"),
    ],
)
def test_metadata_is_checked(metadata: Any, message: str, path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        save_model(mixture_of("full"), path, metadata=metadata)
    assert not path.exists()


def test_a_failed_save_leaves_the_old_file_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(mixture_of("full"), path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(mixture_of("diag"), path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot be written: there is no folder .*absent"):
        save_model(mixture_of("full"), tmp_path / "absent" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file to write"):
        save_model(mixture_of("full"), tmp_path)


def test_a_pipe_is_not_replaced(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(OSError, match="is not a regular file; name a file to write"):
        save_model(mixture_of("full"), path)
    assert path.is_fifo()


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_points_to_is_replaced(there: bool, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "other.safetensors"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    path.symlink_to(target)
    save_model(mixture_of("full"), path)
    assert path.is_symlink()
    assert load_model(target).n_components == K
    assert [each.name for each in target.parent.iterdir()] == [target.name]
