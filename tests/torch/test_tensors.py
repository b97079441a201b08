"""torch in, torch out, on the same device, without a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
