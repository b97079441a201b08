"""Files of models: what was saved comes back; whatever else they may hold is one error that names file and field."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emalgam.model_file import ModelFileError
from emalgam.nn import (
    MODELS,
    Autoencoder,
    LatentMixtureSampler,
    LatentModel,
    load_extra,
    load_model,
    load_sampler,
    save_model,
)

CONFIGURATIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"n_features": 3, "n_latent": 2}],
    "autoencoder": [{"widths": (6, 4, 2)}, {"widths": (6, 4, 2), "tied": True, "output": "sigmoid", "denoising": 0.5}],
    "conv": [{"data_shape": (1, 8, 8), "channels": (4, 2), "upsample": "nearest"}],
    "vae": [{"data_shape": (6,), "n_latent": 2, "widths": (5,)}],
    "mixture-vae": [{"data_shape": (6,), "n_latent": 2, "n_components": 3, "widths": (5,)}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def made(name: str, options: dict[str, Any]) -> LatentModel:
    torch.manual_seed(5)
    return MODELS[name](**options)


def autoencoder(**options: Any) -> LatentModel:
    return made("autoencoder", {"widths": (6, 4, 2), **options})


def data_for(model: LatentModel) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return torch.rand(20, *model.data_shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_what_ends_in_a_slash_is_a_folder(tmp_path: Path) -> None:
    new = f"{tmp_path}/new/"
    with pytest.raises(ModelFileError, match=r"new/model\.safetensors: there is no such file"):
        load_model(new)
    save_model(autoencoder(), new)
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert load_model(new).configuration() == load_model(tmp_path / "new").configuration()


def test_a_sampler_of_other_latents_is_not_saved(path: Path) -> None:
    sampler = LatentMixtureSampler(1, random_state=0).fit_latents(np.random.default_rng(0).normal(size=(50, 3)))
    with pytest.raises(ModelFileError, match=r"sampler is of latents of shape \(3,\), and the model's \(2,\)"):
        save_model(autoencoder(), path, sampler)
    assert not path.exists()


def test_every_model_is_tried() -> None:
    assert set(CONFIGURATIONS) == set(MODELS)


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, several in CONFIGURATIONS.items() for options in several]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_saved_comes_back(name: str, options: dict[str, Any], dtype: torch.dtype, path: Path) -> None:
    model = made(name, options).to(dtype)
    save_model(model, path)
    state = torch.get_rng_state()
    again = load_model(path)
    assert torch.equal(torch.get_rng_state(), state), "loading drew random numbers"
    assert type(again) is type(model)
    assert again.configuration() == model.configuration()
    assert not again.training
    assert {key: value.dtype for key, value in again.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    x = data_for(model)
    assert torch.equal(again.reconstruct(x), model.eval().reconstruct(x))
    assert sum(weight.numel() for weight in again.parameters()) == sum(weight.numel() for weight in model.parameters())


def test_a_folder_holds_one_model(tmp_path: Path) -> None:
    save_model(autoencoder(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert type(load_model(tmp_path)) is Autoencoder
    with pytest.raises(ModelFileError, match=r"model\.safetensors: there is no such file"):
        load_model(tmp_path / "model.safetensors" / "model.safetensors")


def test_equal_models_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    extra = {letter: letter for letter in "qwertyuiop"}
    save_model(autoencoder(), path, extra=extra)
    for attempt in range(3):
        again = tmp_path / f"{attempt}.safetensors"
        save_model(autoencoder(), again, extra=dict(reversed(extra.items())))
        assert again.read_bytes() == path.read_bytes()


def test_the_sampler_travels_along(path: Path) -> None:
    model = autoencoder()
    sampler = LatentMixtureSampler(2, random_state=0).fit(model, torch.randn(200, 6))
    save_model(model, path, sampler)
    again = load_sampler(path)
    assert again.model is not None
    found, labels = again.sample(5, random_state=3)
    expected, expected_labels = sampler.sample(5, random_state=3)
    assert torch.equal(found, expected)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(load_model(path).state_dict()["encoder.0.weight"], model.state_dict()["encoder.0.weight"])


def test_without_a_sampler(path: Path) -> None:
    save_model(autoencoder(), path)
    with pytest.raises(ModelFileError, match="sampler is missing: the model was saved without one"):
        load_sampler(path)


def test_what_else_the_user_keeps(path: Path) -> None:
    save_model(autoencoder(), path, extra={"image_shape": [2, 3], "scale": 1 / 255, "name": "café\n"})
    assert load_extra(path) == {"image_shape": [2, 3], "scale": 1 / 255, "name": "café\n"}
    save_model(autoencoder(), path)
    assert load_extra(path) == {}


# ---- what is not saved


class Own(Autoencoder):
    pass


def test_models_of_others_are_not_saved(path: Path) -> None:
    with pytest.raises(TypeError, match=r"model is a Own; files hold .*Autoencoder.*safetensors\.torch\.save_model"):
        save_model(Own((6, 2)), path)
    assert not path.exists()


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    save_model(autoencoder(), path)
    before = path.read_bytes()
    changed = autoencoder()
    changed.encoder = torch.nn.Sequential(torch.nn.Linear(6, 3))
    with pytest.raises(ModelFileError, match=r"model\.encoder\.0\.weight is .*: not saved, because it could not be"):
        save_model(changed, path)
    broken = autoencoder()
    with torch.no_grad():
        next(iter(broken.parameters()))[0, 0] = torch.nan
    with pytest.raises(ModelFileError, match=r"model\.encoder\.0\.weight holds values that are not finite"):
        save_model(broken, path)
    with pytest.raises(ModelFileError, match="extra cannot be written as JSON"):
        save_model(autoencoder(), path, extra={"array": np.ones(2)})
    with pytest.raises(ModelFileError, match="extra cannot be written as JSON"):
        save_model(autoencoder(), path, extra={"number": float("nan")})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ---- forged files


def forged(path: Path, change: Callable[[dict[str, Any]], None], data: Callable[[bytes], bytes] = bytes) -> None:
    """Change the header, or the data, of a sound file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data(content[8 + length :]))


def metadata(**fields: str | None) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        header["__metadata__"] |= fields
        for name, value in fields.items():
            if value is None:
                del header["__metadata__"][name]

    return apply


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        header[f"model.{name}"] |= fields

    return apply


def configuration(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return metadata(configuration=json.dumps({"widths": [6, 4, 2], **fields}))


HUGE = 2**40
WEIGHT = "encoder.0.weight"
FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no metadata": (lambda header: header.pop("__metadata__"), "__metadata__ is missing or not an object of strings"),
    "another format": (metadata(format="emalgam.mixture"), "format is 'emalgam.mixture', expected 'emalgam.nn.model'"),
    "another version": (metadata(format_version="2"), "format_version is '2'; this version of emalgam reads '1'"),
    "no model": (metadata(model=None), "model is None, expected one of linear, autoencoder"),
    "unknown model": (metadata(model="os.system"), "model is 'os.system', expected one of linear, autoencoder"),
    "another model": (metadata(model="linear"), "configuration is not one of LinearAutoencoder: "),
    "unknown dtype": (metadata(dtype="object"), "dtype is 'object', expected one of float64, float32"),
    "another dtype": (metadata(dtype="float64"), "has dtype 'F32', expected 'F64'"),
    "no configuration": (metadata(configuration=None), "configuration is not valid JSON"),
    "configuration no JSON": (metadata(configuration="{"), "configuration is not valid JSON"),
    "configuration a list": (metadata(configuration="[1]"), "configuration is list, expected a JSON object"),
    "configuration too deep": (metadata(configuration="[" * 8000), "configuration is not valid JSON"),
    "configuration too long": (
        configuration(widths=[1] * 9000),
        "configuration has 270.. characters, expected at most",
    ),
    "unknown argument": (configuration(call="rm"), "configuration is not one of Autoencoder: .*'call'"),
    "wrong argument": (configuration(widths="ab"), "configuration is not one of Autoencoder: "),
    "other widths": (configuration(widths=[6, 5, 2]), r"model.encoder.0.weight has shape \(4, 6\), expected \(5, 6\)"),
    "more layers": (configuration(widths=[6, 4, 2, 2]), r"model\.\S+ (is missing|has shape)"),
    "huge widths": (
        configuration(widths=[HUGE, 4, 2]),
        rf"model.encoder.0.weight has shape \(4, 6\), expected \(4, {HUGE}\)",
    ),
    "larger than can be": (configuration(widths=[2**62, 2**62]), "configuration is not one of Autoencoder: "),
    "huge tensor": (entry(WEIGHT, shape=[HUGE, HUGE]), "model.encoder.0.weight has shape .*, expected"),
    "huge offsets": (entry(WEIGHT, data_offsets=[0, HUGE]), "lies at bytes .* of the data, expected"),
    "transposed": (entry(WEIGHT, shape=[6, 4]), r"model.encoder.0.weight has shape \(6, 4\), expected \(4, 6\)"),
    "integers": (entry(WEIGHT, dtype="I32"), "model.encoder.0.weight has dtype 'I32', expected 'F32'"),
    "one missing": (lambda header: header.pop(f"model.{WEIGHT}"), "model.encoder.0.weight is missing"),
    "one more": (
        lambda header: header.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        "more is no part of the model 'autoencoder', or of a sampler",
    ),
    "a sampler's array without one": (
        lambda header: header.update({"sampler.means": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}}),
        "sampler.means is no part of the model",
    ),
    "an entry that is none": (lambda header: header.update({f"model.{WEIGHT}": 7}), "is not described by dtype, shape"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_headers(name: str, path: Path) -> None:
    change, text = FORGED[name]
    save_model(autoencoder(), path)
    forged(path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (load_model, load_sampler, load_extra):
        with pytest.raises(ModelFileError, match=rf"model\.safetensors: .*{text}"):
            load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17, "took more than 128 MB"


@pytest.mark.parametrize("bytes_left", [0, 5, 8, 100, -1])
def test_cut_files(bytes_left: int, path: Path) -> None:
    save_model(autoencoder(), path)
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ModelFileError, match=r"model\.safetensors: .*(cut short|is no|header)"):
        load_model(path)


def test_data_that_are_not_finite(path: Path) -> None:
    save_model(autoencoder(), path)
    forged(path, lambda header: None, lambda data: struct.pack("<f", float("inf")) + data[4:])
    with pytest.raises(ModelFileError, match=r"model\.\S+ holds values that are not finite"):
        load_model(path)


def test_pickles_are_not_read(path: Path) -> None:
    torch.save(autoencoder().state_dict(), path)
    with pytest.raises(ModelFileError, match=r"header has .* bytes by its own account"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (metadata(sampler="{}"), "sampler: the state of the sampler has no"),
        (metadata(sampler="[]"), "sampler is list, expected a JSON object"),
        (metadata(sampler='{"covariance_type": "full", "latent_shape": [3]}'), r"sampler: latent_shape is"),
        (metadata(sampler='{"covariance_type": "no", "latent_shape": [2]}'), "sampler: "),
        (lambda header: header["sampler.means"].update(dtype="F32"), "sampler.means has dtype 'F32', expected 'F64'"),
        (lambda header: header["sampler.means"].update(shape=[4, HUGE]), "sampler.means lies at bytes"),
    ],
)
def test_forged_samplers(change: Callable[[dict[str, Any]], Any], text: str, path: Path) -> None:
    model = autoencoder()
    save_model(model, path, LatentMixtureSampler(2, random_state=0).fit(model, torch.randn(200, 6)))
    forged(path, change)
    with pytest.raises(ModelFileError, match=rf"model\.safetensors: .*{text}"):
        load_sampler(path)
