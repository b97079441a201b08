"""Sizes at which an index of 32 bits would overflow; only on a GPU, which has the memory and the speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emalgam_kernels import Packed, Sampler
from emalgam_kernels.numba_cuda import device, mixture, sampling
from tests.conftest import SIMULATED

pytestmark = pytest.mark.skipif(SIMULATED, reason="the simulator would take days")


def problem(D: int, K: int) -> Packed:
    """K spherical Gaussians of unit variance."""
    place = device.default_device()
    means = torch.randn((K, D), generator=torch.Generator(place).manual_seed(1), device=place, dtype=torch.float64)
    natural = torch.cat(
        [torch.full((K, 1), -0.5, device=place, dtype=torch.float64), means, -0.5 * (means**2).sum(1, keepdim=True)], 1
    )
    zero, one = torch.zeros(D, device=place, dtype=torch.float64), torch.ones(D, device=place, dtype=torch.float64)
    return Packed("spherical", zero, one, None, natural, "float32")


@pytest.mark.parametrize(("N", "D", "K"), [(2**25 + 3, 65, 8), (2**21 + 5, 128, 1024)], ids=["fused", "products"])
def test_more_elements_than_32_bits_count(N: int, D: int, K: int) -> None:
    """N · D or N · K is beyond 2³¹: statistics and log p against torch in float64, a slice at a time."""
    place = device.default_device()
    x = torch.randn((N, D), generator=torch.Generator(place).manual_seed(0), device=place)
    parameters = problem(D, K)
    out = torch.empty((K, D + 2), device=place, dtype=torch.float64)
    total = mixture.em_statistics(x, None, parameters, out)
    log_prob = torch.empty(N, device=place, dtype=torch.float64)
    mixture.log_prob(x, parameters, log_prob)
    expected, sums = torch.zeros_like(out), torch.zeros((), device=place, dtype=torch.float64)
    step = 2**17
    for first in range(0, N, step):
        z = x[first : first + step].double()
        phi = torch.cat([(z**2).sum(1, keepdim=True), z, torch.ones_like(z[:, :1])], 1)
        logits = phi @ parameters.natural.T
        log_p = logits.logsumexp(1)
        assert float((log_prob[first : first + step] - log_p).abs().max()) < 1e-3
        expected += (logits - log_p[:, None]).exp().T @ phi
        sums += log_p.sum()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3 * N**0.5)
    torch.testing.assert_close(total, sums, rtol=1e-6, atol=0.0)


def test_more_samples_than_32_bits_count() -> None:
    """The last rows of N · D > 2³¹ are those that are drawn alone."""
    N, D = 2**25 + 3, 65
    place, rng = device.default_device(), np.random.default_rng(0)
    sampler = Sampler(rng.normal(size=(3, D)), rng.normal(size=(3, D)), np.ones(3))
    x, labels = torch.empty((N, D), device=place), torch.empty(N, dtype=torch.int64, device=place)
    sampling.sample_mixture(sampler, 1, 0, x, labels)  # type: ignore[arg-type]
    last, last_labels = np.empty((1000, D), np.float32), np.empty(1000, np.int64)
    sampling.sample_mixture(sampler, 1, N - 1000, last, last_labels)
    np.testing.assert_array_equal(x[-1000:].cpu().numpy(), last)
    np.testing.assert_array_equal(labels[-1000:].cpu().numpy(), last_labels)
