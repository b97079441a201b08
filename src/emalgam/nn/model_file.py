"""Models of emalgam.nn in safetensors files: tensors, and metadata in JSON, nothing that could be executed.

========================  ==========================================================================
metadata ``format``       ``emalgam.nn.model``
``format_version``        ``1``
``model``                 a name in `emalgam.nn.MODELS`
``configuration``         JSON: the arguments of its constructor
``dtype``                 of its parameters, such as ``float32``
``sampler``               JSON: what a `LatentMixtureSampler` holds beside arrays; missing without one
``extra``                 JSON: what the user wants to keep beside the model
tensors ``model.*``       the model's state
``sampler.*``             the sampler's arrays, float64
========================  ==========================================================================

Loading builds the model that the configuration describes on torch's meta device first, which takes no memory. It holds
the shapes and dtypes of its state against the header, and the header against the size of the file, before anything is
allocated or read.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from emalgam.model_file import (
    ModelFileError,
    check_entry,
    check_format,
    check_offsets,
    fail,
    metadata_of,
    read_file,
    write_file,
)
from emalgam.nn.data import dtype_of
from emalgam.nn.model import LatentModel
from emalgam.nn.models import MODELS

if TYPE_CHECKING:
    from emalgam.nn.latent import LatentMixtureSampler

FORMAT: Final = "emalgam.nn.model"
FORMAT_VERSION: Final = "1"
NAME_IN_FOLDER: Final = "model.safetensors"
OF_MODEL, OF_SAMPLER = "model.", "sampler."
LONGEST_CONFIGURATION: Final = 2**13  # each number in it may be a layer
STORED_AS: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_AS if dtype.is_floating_point}

__all__ = ["load_extra", "load_model", "load_sampler", "save_model"]


def save_model(
    model: LatentModel,
    path: str | os.PathLike[str],
    sampler: LatentMixtureSampler | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a safetensors file; an existing file is replaced, at once and whole.

    Parameters
    ----------
    model : LatentModel
        Of a class in `MODELS`, on any device.
    path : path-like
        The file, or a folder, in which it is called ``model.safetensors``. What ends in a slash is a folder, and is
        made if need be.
    sampler : LatentMixtureSampler, optional
        A mixture fitted to the model's latents, which travels along.
    extra : mapping, optional
        Anything that JSON can hold, for `load_extra`.

    Raises
    ------
    TypeError
        If the model's class is not in `MODELS`.
    ModelFileError
        If what is saved could not be loaded again, or is not finite.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch
    >>> from emalgam.nn import Autoencoder, load_model, save_model
    >>> model, x = Autoencoder((8, 2)), torch.rand(3, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, folder)
    ...     again = load_model(folder)
    >>> torch.equal(again.encode(x), model.encode(x))
    True
    """
    from safetensors.torch import save

    is_folder, path = _is_folder(path), _file(path)
    name = next((name for name, known in MODELS.items() if type(model) is known), None)
    if name is None:
        raise TypeError(
            f"model is a {type(model).__name__}; files hold {', '.join(kind.__name__ for kind in MODELS.values())}: "
            "save others with safetensors.torch.save_model"
        )
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": name,
        "configuration": _json(model.configuration(), "configuration", path),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
    }
    if extra is not None:
        described["extra"] = _json(dict(extra), "extra", path)
    tensors = _state(model, path)
    _check_state(_expected(described, path), tensors, path)
    if sampler is not None:
        arrays, rest = _parts(sampler.state())
        if tuple(sampler.latent_shape) != tuple(model.latent_shape):
            shapes = f"{tuple(sampler.latent_shape)}, and the model's {tuple(model.latent_shape)}"
            fail(path, "sampler", f"is of latents of shape {shapes}: not saved, because it could not be loaded again")
        described["sampler"] = _json(rest, "sampler", path)
        tensors |= {OF_SAMPLER + key: torch.from_numpy(values) for key, values in arrays.items()}
    for key, values in tensors.items():
        if not bool(torch.isfinite(values).all()):
            fail(path, key, "holds values that are not finite and is not saved")
    if is_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save(tensors, described))


def load_model(path: str | os.PathLike[str]) -> LatentModel:
    """The model in a file or folder that `save_model` wrote, on the CPU and in evaluation mode.

    Raises
    ------
    ModelFileError
        If the file is missing, cut short, forged, of another format or version, or not of a model of `MODELS`; naming
        the field.

    Examples
    --------
    >>> from emalgam.nn import load_model
    >>> load_model("nowhere.safetensors")
    Traceback (most recent call last):
        ...
    emalgam.model_file.ModelFileError: nowhere.safetensors: there is no such file
    """
    return _load(path)[0]


def load_sampler(path: str | os.PathLike[str]) -> LatentMixtureSampler:
    """The sampler that was saved along with a model; its attribute ``model`` is that model.

    ModelFileError as from `load_model`, and if the file holds no sampler.
    """
    from emalgam.nn.latent import LatentMixtureSampler

    model, metadata, tensors = _load(path)
    if "sampler" not in metadata:
        fail(_file(path), "sampler", "is missing: the model was saved without one")
    rest = _object(metadata, "sampler", _file(path))
    arrays = {name.removeprefix(OF_SAMPLER): values.numpy() for name, values in tensors.items()}
    try:
        return LatentMixtureSampler.from_state(rest | arrays, model)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{_file(path)}: sampler: {error}") from error


def load_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was given to `save_model` as ``extra``; empty if nothing was. ModelFileError as from `load_model`."""
    path = _file(path)
    metadata = read_file(path, _check)[1]
    return _object(metadata, "extra", path) if "extra" in metadata else {}


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / NAME_IN_FOLDER if _is_folder(path) else Path(path)


def _is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether it is there, or is to be: its name ends in a slash, which `Path` forgets."""
    return Path(path).is_dir() or os.fspath(path).endswith(("/", os.sep))


# ---- writing


def _json(values: Mapping[str, Any], field: str, path: Path) -> str:
    try:
        return json.dumps(values, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {field} cannot be written as JSON ({error})") from error


def _state(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The model's state on the CPU; what two names share is stored twice."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, values in model.state_dict().items():
        if not isinstance(values, Tensor):
            fail(path, name, f"is a {type(values).__name__}; files hold tensors")
        stored = values.detach().cpu().contiguous()
        state[OF_MODEL + name] = stored.clone() if stored.data_ptr() in seen else stored
        seen.add(stored.data_ptr())
    return state


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays in float64, and the rest."""
    arrays = {key: np.array(values, np.float64) for key, values in state.items() if isinstance(values, np.ndarray)}
    return arrays, {key: value for key, value in state.items() if key not in arrays}


# ---- reading


def _load(path: str | os.PathLike[str]) -> tuple[LatentModel, dict[str, str], dict[str, Tensor]]:
    """The model, the metadata, and the tensors that are not the model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _file(path)
    content, metadata = read_file(path, _check)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error
    for name, values in tensors.items():
        if not bool(torch.isfinite(values).all()):
            fail(path, name, "holds values that are not finite")
    with torch.random.fork_rng(devices=[]):  # of the weights that a new model begins with
        model = _build(metadata, path)
    own = [name for name in tensors if name.startswith(OF_MODEL)]
    model.load_state_dict({name.removeprefix(OF_MODEL): tensors.pop(name) for name in own})
    return model.eval(), metadata, tensors


def _check(header: dict[str, Any], data_bytes: int, path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata, if the header is that of the model that they describe."""
    path = Path(path)
    metadata = metadata_of(header, path)
    check_format(metadata, FORMAT, FORMAT_VERSION, path)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    expected = _expected(metadata, path)
    for name, entry in entries.items():
        if name.startswith(OF_SAMPLER) and "sampler" in metadata:
            check_entry(name, entry, "F64", path)
        elif name not in expected:
            fail(path, name, f"is no part of the model {metadata['model']!r}, or of a sampler")
    for name, (shape, dtype) in expected.items():
        if name not in entries:
            fail(path, name, "is missing")
        check_entry(name, entries[name], dtype, path)
        if tuple(entries[name]["shape"]) != shape:
            fail(path, name, f"has shape {reprlib.repr(tuple(entries[name]['shape']))}, expected {shape}")
    check_offsets(header, entries, data_bytes, path)
    return metadata


def _check_state(expected: Mapping[str, tuple[tuple[int, ...], str]], state: Mapping[str, Tensor], path: Path) -> None:
    """ModelFileError if a model made from its own configuration would not have this state."""
    found = {name: (tuple(values.shape), STORED_AS.get(values.dtype)) for name, values in state.items()}
    for name in dict.fromkeys((*expected, *found)):
        if found.get(name) != expected.get(name):
            problem = f"is {found.get(name)}, but {expected.get(name)} in a model made from its configuration"
            fail(path, name, f"{problem}: not saved, because it could not be loaded again")


def _expected(metadata: Mapping[str, str], path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of the model that the metadata describe; takes no memory."""
    with torch.device("meta"):
        model = _build(metadata, path)
    state = model.state_dict().items()
    return {OF_MODEL + name: (tuple(values.shape), STORED_AS[values.dtype]) for name, values in state}


def _build(metadata: Mapping[str, str], path: Path) -> LatentModel:
    """A new model as the metadata describe it."""
    kind = MODELS.get(metadata.get("model", ""))
    if kind is None:
        fail(path, "model", f"is {reprlib.repr(metadata.get('model'))}, expected one of {', '.join(MODELS)}")
    dtype = DTYPES.get(metadata.get("dtype", ""))
    if dtype is None:
        fail(path, "dtype", f"is {reprlib.repr(metadata.get('dtype'))}, expected one of {', '.join(DTYPES)}")
    configuration = _object(metadata, "configuration", path)
    try:
        return kind(**configuration).to(dtype)
    except Exception as error:  # a forged configuration makes a constructor raise anything
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ModelFileError(f"{path}: configuration is not one of {kind.__name__}: {problem}") from error


def _object(metadata: Mapping[str, str], field: str, path: Path) -> dict[str, Any]:
    """The JSON object in a field."""
    text = metadata.get(field, "")
    if field == "configuration" and len(text) > LONGEST_CONFIGURATION:
        fail(path, field, f"has {len(text)} characters, expected at most {LONGEST_CONFIGURATION}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {field} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        fail(path, field, f"is {type(values).__name__}, expected a JSON object")
    return values
