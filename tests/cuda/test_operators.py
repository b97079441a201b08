"""The torch operators on tensors of the device: the CPU's values and gradients, on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from emalgam.nn import GaussianMixturePrior, mixture_log_prob, mixture_responsibilities
from emalgam.nn.gradients import Evaluation
from emalgam_kernels.numba_cuda import device
from tests.conftest import SIMULATED

N, D, K = (40 if SIMULATED else 3000), 2, 3
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}  # of the largest entry, as in tests/torch/nn


def parameters(dtype: torch.dtype, apart: float = 2.0) -> list[Tensor]:
    rng = np.random.default_rng(0)
    lower = np.tril(0.3 * rng.normal(size=(K, D, D)), -1) + np.eye(D)
    means = apart * rng.normal(size=(K, D))
    x = means[rng.integers(K, size=N)] + rng.normal(size=(N, D))
    x[0] += 1e4  # beyond the reach of packed products
    where = device.default_device()
    return [torch.tensor(each).to(where, dtype).requires_grad_() for each in (x, rng.uniform(0.2, 2, K), means, lower)]


def plain_logits(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    normal = torch.distributions.MultivariateNormal(means, scale_tril=scale_tril, validate_args=False)
    return normal.log_prob(x[:, None]) + weights.log()


def assert_same(
    found: Tensor, expected: Tensor, where: list[Tensor], doubles: list[Tensor], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(found.shape, generator=generator, dtype=torch.float64).to(found.device)
    ours = torch.autograd.grad(found, where, gradient.to(dtype))
    theirs = torch.autograd.grad(expected, doubles, gradient)
    for name, own, their in zip(
        ("value", "x", "weights", "means", "scale_tril"), (found, *ours), (expected, *theirs), strict=True
    ):
        assert (own.dtype, own.device) == (dtype, found.device)
        error = float((own - their).detach().abs().max() / their.detach().abs().max())
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g} of its largest entry"


@every_dtype
@pytest.mark.parametrize("apart", [2.0, 1e4])
def test_values_and_gradients(dtype: torch.dtype, apart: float) -> None:
    """Packed products, and the direct form where clusters lie ten thousand times as far apart as they are wide."""
    arguments = parameters(dtype, apart)
    doubles = [each.detach().double().requires_grad_() for each in arguments]
    run = Evaluation(*(each.detach() for each in arguments), n_threads=1)
    assert run.query.backend == "numba_cuda"
    assert run.direct == (apart > 2)
    assert_same(mixture_log_prob(*arguments), plain_logits(*doubles).logsumexp(1), arguments, doubles, dtype)
    if apart == 2:  # else responsibilities are 0 or 1, and their gradients nothing but rounding
        assert_same(mixture_responsibilities(*arguments), plain_logits(*doubles).softmax(1), arguments, doubles, dtype)


def test_prior_samples_and_learns_on_the_device() -> None:
    x, _, means, _ = (each.detach() for each in parameters(torch.float64))
    prior = GaussianMixturePrior(K, D, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        prior.means.copy_(means)
    z, labels = prior.sample(5, torch.Generator().manual_seed(0))
    assert (z.device, labels.device, tuple(z.shape)) == (x.device, x.device, (5, D))
    before = prior.refresh(x[1:], step=0.5)
    assert prior.log_prob(x[1:]).mean().item() > before
    host = GaussianMixturePrior(K, D, dtype=torch.float64)
    with torch.no_grad():
        host.means.copy_(means.cpu())
    assert before == pytest.approx(host.log_prob(x[1:].cpu()).mean().item(), rel=1e-9)
