"""torch in, torch out, on the same device, without a copy."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import emalgam
from emalgam import arrays
from tests.samples import blobs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_and_out(dtype: torch.dtype) -> None:
    x, _ = blobs(400)
    tensor = torch.tensor(x, dtype=dtype)
    model = emalgam.GaussianMixture(3, random_state=0).fit(tensor)
    expected = emalgam.GaussianMixture(3, random_state=0).fit(tensor.numpy())
    for method in ("score_samples", "predict_proba", "predict"):
        result = getattr(model, method)(tensor)
        assert isinstance(result, torch.Tensor), method
        assert result.device == tensor.device
        np.testing.assert_array_equal(result.numpy(), getattr(expected, method)(tensor.numpy()))
    assert model.predict_proba(tensor).dtype == dtype
    for method in ("bic", "aic", "score"):
        assert getattr(model, method)(tensor) == getattr(expected, method)(tensor.numpy())
    mixture = emalgam.fit(tensor, 3, random_state=0, sample_weight=torch.ones(400)).mixture
    assert isinstance(mixture.log_prob(tensor), torch.Tensor)


def test_no_copy() -> None:
    tensor = torch.zeros(4, 2, dtype=torch.float64)
    assert arrays.to_numpy(tensor).ctypes.data == tensor.data_ptr()
    result = np.ones(3)
    assert arrays.like(result, tensor).data_ptr() == result.ctypes.data


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, dtype=torch.bfloat16)],
    ids=["gradient", "bfloat16"],
)
def test_tensors_that_numpy_cannot_view(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"x is a Tensor that cannot be read .* call x.detach\(\).float\(\) first"):
        emalgam.fit(tensor, 1)


class OnGpu:
    """An array that only says where it lies, and on which stream."""

    def __init__(self, stream: int | None) -> None:
        self.__cuda_array_interface__ = {"stream": stream, "data": (0, False)}


@pytest.mark.parametrize(
    ("named", "stream"),
    [
        (None, None),
        (1, "default stream of cuda:1"),
        (2, "stream 2 of cuda:1"),
        (0x7F00, f"stream {0x7F00} of cuda:1"),
    ],
)
def test_the_stream_that_an_array_names(named: int | None, stream: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 3 of the protocol: none, the default one, the thread's own default one, any other."""
    entered: list[str] = []

    @contextmanager
    def enter(given: str) -> Iterator[None]:
        entered.append(given)
        yield

    monkeypatch.setattr(arrays, "_device_of", lambda _: "cuda:1")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default stream of {device}")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: f"stream {pointer} of {device}")
    monkeypatch.setattr(torch.cuda, "stream", enter)
    assert arrays.on_gpu(OnGpu(named))
    with arrays.callers_stream(OnGpu(named)):
        assert entered == ([] if stream is None else [stream])


def test_a_stream_that_nobody_can_tell() -> None:
    """0 would be either of two default streams."""
    message = "of a OnGpu names stream 0; expected None, 1 .* 2 .* or the address of a stream"
    with pytest.raises(ValueError, match=message), arrays.callers_stream(OnGpu(0)):
        pass


def test_results_in_the_callers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's and JAX's arrays come back as such; an array of an unknown library as a tensor."""
    tensor = torch.zeros(3)
    for library, home in (("cupy", "cupy"), ("jaxlib", "jax.numpy")):
        module = types.ModuleType(home)
        module.from_dlpack = lambda result, home=home: (home, result)
        monkeypatch.setitem(sys.modules, home, module)
        array = type("Array", (), {"__module__": f"{library}.core"})()
        assert arrays.like(tensor, array) == (home, tensor)
    assert arrays.like(tensor, object()) is tensor


def test_sparse_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "simulated", lambda: True)
    with pytest.raises(ValueError, match=r"x is a tensor of layout torch.sparse_coo; call x.to_dense\(\) first"):
        arrays.read(torch.zeros(3, 3).to_sparse())


def test_streams_of_tensors_and_loaders() -> None:
    x = blobs(1000)[0]
    expected = emalgam.fit(x, 2, random_state=0).mixture
    tensor = torch.from_numpy(x)
    for given in (tensor, DataLoader(TensorDataset(tensor), batch_size=300)):
        found = emalgam.fit(emalgam.open_stream(given), 2, random_state=0).mixture
        np.testing.assert_allclose(found.means, expected.means, rtol=1e-9)
        once = emalgam.fit_stepwise(given, 2, random_state=0).mixture
        np.testing.assert_allclose(once.means, expected.means, rtol=1e-6)
