"""What every model of the registry promises: the contract of `LatentModel`."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import emalgam.nn
from emalgam.nn import MODELS, LatentModel

IMAGE = (1, 8, 8)
CONTRACT = (
    "configuration",
    "encode",
    "decode",
    "reconstruct",
    "forward",
    "generate",
    "log_likelihood",
    "losses",
    "check",
)


def model_of(name: str) -> LatentModel:
    torch.manual_seed(0)
    arguments = {
        "linear": (64, 2),
        "autoencoder": ((64, 8, 2),),
        "conv": (IMAGE, (4, 2)),
        "vae": (64, 2, (8,)),
        "mixture-vae": (64, 2, 3, (8,)),
    }
    return MODELS[name](*arguments[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_contract(name: str) -> None:
    model = model_of(name)
    x = torch.rand(6, *model.data_shape)
    z = model.encode(x)
    assert z.shape == (6, *model.latent_shape)
    assert model.decode(z).shape == model.reconstruct(x).shape == x.shape
    assert model.log_likelihood(x).shape == (6,)
    assert model.check(x) is x
    losses = model.losses(x, generator=torch.Generator().manual_seed(0))
    assert all(each.shape == () and each.dtype == torch.float32 for each in losses.values())
    for method in CONTRACT:
        expected = [name for name in inspect.signature(getattr(LatentModel, method)).parameters if name != "self"]
        given = inspect.signature(getattr(type(model), method)).parameters
        assert [name for name in expected if name not in given] == [], method
        further = [p for p in given.values() if p.name not in {"self", *expected}]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in further), method


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_compiles_in_one_graph(name: str) -> None:
    model = model_of(name)
    x = torch.rand(6, *model.data_shape)
    expected = model.losses(x, generator=None)["loss"] if name in {"linear", "autoencoder", "conv"} else None
    loss = torch.compile(lambda rows: model.losses(rows)["loss"], fullgraph=True, backend="aot_eager")(x)
    loss.backward()
    assert torch.isfinite(loss)
    if expected is not None:
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch_has_latents(name: str) -> None:
    model = model_of(name)
    x = torch.empty(0, *model.data_shape)
    assert model.encode(x).shape == (0, *model.latent_shape)
    assert model.reconstruct(x).shape == x.shape


def test_names_are_imported_when_they_are_used() -> None:
    """`import emalgam.nn` loads no lightning, and every name in __all__ is there; unknown ones say so."""
    code = "import sys, emalgam.nn; assert 'lightning' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(emalgam.nn, name) for name in emalgam.nn.__all__)
    with pytest.raises(AttributeError, match=r"module 'emalgam.nn' has no attribute 'nothing'"):
        emalgam.nn.nothing  # noqa: B018


def test_without_torch_the_error_says_what_to_install() -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "try: import emalgam.nn\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "emalgam.nn needs torch, which is not installed: pip install emalgam[torch]"
