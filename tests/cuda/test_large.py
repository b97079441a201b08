"""What only a GPU can show: sizes at which an index of 32 bits would overflow, failed launches, streams, devices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import types

import emalgam
from emalgam_kernels import Packed, Sampler
from emalgam_kernels.numba_cuda import device, mixture, sampling
from emalgam_kernels.numba_cuda.device import Kernel, flat, view
from tests.conftest import ON_A_GPU
from tests.samples import blobs, start

pytestmark = pytest.mark.skipif(
    not ON_A_GPU, reason="the simulator and the emulator have one stream, and would take days"
)
several_devices = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="there are not two GPUs"
)


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


def test_more_responsibilities_than_32_bits_count() -> None:
    """N · K > 2³¹ numbers of float32; the last rows are those of a call of their own."""
    N, D, place = 2**28 + 9, 2, device.default_device()
    x = torch.randn((N, D), generator=torch.Generator(place).manual_seed(0), device=place)
    parameters = problem(D, 8)
    out = torch.empty((N, 8), device=place)
    mixture.responsibilities(x, parameters, out)  # type: ignore[arg-type]
    for rows in (slice(0, 1000), slice(N - 1000, N)):
        alone = torch.empty((1000, 8), device=place)
        mixture.responsibilities(x[rows], parameters, alone)  # type: ignore[arg-type]
        torch.testing.assert_close(out[rows], alone, rtol=1e-5, atol=1e-6)
    assert float((out[-(2**20) :].sum(1) - 1).abs().max()) < 1e-5


def test_a_memory_mapped_fit(tmp_path: Path) -> None:
    """Rows of a file, in pieces through pinned memory in every pass, give what they give as a tensor."""
    x, centres = blobs(300_000, 8, 3)
    np.save(tmp_path / "x.npy", x)
    how: dict[str, Any] = {"max_iter": 3, "tol": 0.0, **start(centres, "full")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        found = emalgam.fit(np.load(tmp_path / "x.npy", mmap_mode="r"), 3, backend="numba_cuda", **how)
        expected = emalgam.fit(torch.as_tensor(x, device=device.default_device()), 3, **how)
    assert found.backend == "numba_cuda"
    np.testing.assert_allclose(found.lower_bounds, expected.lower_bounds, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.mixture.covariances, expected.mixture.covariances, rtol=1e-8, atol=1e-10)


# ---- launches


def add_one(x: Any) -> None:
    """One block of one thread."""
    x[0] += types.float32(1)


def adding() -> Kernel:
    return Kernel("add one", "float32", add_one, (flat(types.float32),), 1024)


@pytest.mark.parametrize(
    ("block", "shared_bytes"), [(2048, 0), (32, 2**30)], ids=["too many threads", "too much shared memory"]
)
def test_a_launch_that_fails_raises(block: int, shared_bytes: int) -> None:
    """And the device goes on to work."""
    place = device.default_device()
    with device.on(place):
        x, kernel = torch.zeros(1, device=place), adding()
        with pytest.raises(Exception, match=r"CUDA_ERROR_INVALID_VALUE|cuda|CUDA"):
            kernel.launch(1, block, view(x), shared_bytes=shared_bytes)
        kernel.launch(1, 1, view(x))
        torch.cuda.synchronize()
    assert x.tolist() == [1]


def test_blocks_that_run_at_once() -> None:
    """The driver's own answer: fewer where a block takes more shared memory."""
    place = device.default_device()
    with device.on(place):
        kernel, most = adding(), device.most_shared_bytes(place)
        threads = torch.cuda.get_device_properties(place).max_threads_per_multi_processor
        assert kernel.resident_blocks(1024, 0) == threads // 1024
        assert kernel.resident_blocks(32, most) == 1
        assert kernel.resident_blocks(32, most // 4 - 1024) == 4  # the system takes 1 KB of each block


@several_devices
def test_default_streams_of_several_devices() -> None:
    """All have the pointer 0."""
    kernel = adding()
    for ordinal in (0, 1, 0):
        place = torch.device("cuda", ordinal)
        with device.on(place):
            x = torch.zeros(1, device=place)
            kernel.launch(1, 1, view(x))
            assert x.tolist() == [1]


# ---- streams that arrays name


class Named:
    """A tensor that is an array of nobody's library, made on a stream."""

    def __init__(self, x: torch.Tensor, stream: int) -> None:
        self.x, self.__cuda_array_interface__ = x, {**x.__cuda_array_interface__, "version": 3, "stream": stream}


@pytest.mark.parametrize("stream", [1, 2])
def test_default_streams_that_arrays_name(stream: int) -> None:
    """The device's, and the thread's own, on which the array becomes what it is after a while."""
    place = device.default_device()
    two = emalgam.Mixture([0.5, 0.5], [[0.0, 0.0], [1.0, 2.0]], np.array([np.eye(2), 2 * np.eye(2)]))
    x = torch.zeros((1_000_000, 2), device=place, dtype=torch.float64)
    torch.cuda.synchronize()
    made_on = torch.cuda.ExternalStream(2, device=place) if stream == 2 else torch.cuda.default_stream(place)
    with torch.cuda.stream(made_on):
        torch.cuda._sleep(10**8)  # clock cycles
        x += 1
    log_prob = two.log_prob(Named(x, stream))
    torch.cuda.synchronize()
    expected = two.log_prob(np.ones((1, 2)), backend="reference")[0]
    np.testing.assert_allclose(log_prob.cpu().numpy(), np.full(len(x), expected), rtol=1e-12)
