"""Divergences on the device: places, pieces, tiles and launches change no bit; tests/kernels has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import cuda

import emalgam
from emalgam import divergence
from emalgam.namespace import to_host
from emalgam_kernels import Gaussians
from emalgam_kernels.kl_blocks import guard, shift_of
from emalgam_kernels.numba_cuda import device, kl, staging
from emalgam_kernels.numba_cuda.device import NUMBA_REALS, Kernel, flat, fma
from emalgam_kernels.numba_cuda.kl_kernels import numbers_of_a_thread
from emalgam_kernels.reference import kl as reference
from tests.conftest import DTYPES, ON_A_GPU, SIMULATED
from tests.kernels.test_kl import (
    CONDITION,
    all_pairs,
    assert_close,
    exact,
    near,
    pairs,
    random_covariances,
    random_stack,
    taken,
    ways_to_leave_out,
    without_factors,
)
from tests.tolerances import EPS, tolerance

M = 21 if SIMULATED else 300  # several pieces, tiles or launches of `small`
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_type = pytest.mark.parametrize("covariance_type", ["full", "diag"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few Gaussians, tiles of 8 × 8 pairs, and a launch as small as it can be."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 2000)
    monkeypatch.setattr(kl, "PAIRS_AT_ONCE", 10)
    monkeypatch.setattr(kl, "TILE", 8)
    monkeypatch.setattr(kl, "SCRATCH_IN_CACHE", 1)


@pytest.fixture
def in_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices in global memory, whatever their size."""
    monkeypatch.setattr(kl, "SHARED", 0)


def on_device(gaussians: Gaussians) -> Gaussians:
    """The same stack as tensors; strides of zero stay."""

    def send(array: np.ndarray) -> Any:
        first = array[:1] if array.strides[0] == 0 else array
        return torch.from_numpy(np.array(first)).to(device.default_device()).expand(array.shape)

    return Gaussians(gaussians.covariance_type, *map(send, kl._arrays(gaussians)))


def nan_on_device(*shape: int) -> Any:
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device.default_device())


def two_stacks(covariance_type: str, dtype: str, D: int = 3, seed: int = 0) -> tuple[Gaussians, Gaussians]:
    rng = np.random.default_rng(seed)
    q = random_stack(rng, M, D, covariance_type, dtype)
    return near(rng, q, 0.3), q


# ---- where matrices are, and how many are at work at once


@every_dtype
@pytest.mark.parametrize("D", [1, 3, 6])
@pytest.mark.usefixtures("in_scratch")
def test_matrices_in_global_memory(dtype: str, D: int) -> None:
    rng = np.random.default_rng(D)
    q = random_stack(rng, 9, D, "full", dtype, CONDITION[dtype])
    for p in (random_stack(rng, 9, D, "full", dtype, CONDITION[dtype]), near(rng, q, 0.1)):
        truth = [exact(p, q, m, m) for m in range(9)]
        for left, right in ((p, q), *ways_to_leave_out(p, q)):
            assert_close(pairs(kl, left, right), truth, tolerance("closed-form KL", dtype), f"D = {D}")
        for each in (p, without_factors(p)):
            assert not pairs(kl, each, each).any()


@every_dtype
@pytest.mark.usefixtures("in_scratch")
def test_launches(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp at a time: the same bits."""
    p, q = two_stacks("full", dtype)
    expected, factors = pairs(kl, p, q), np.empty_like(p.covariances)
    expected_without = pairs(kl, without_factors(p), without_factors(q))
    assert kl.precision_factors(p.covariances, factors) == -1
    monkeypatch.setattr(kl, "SCRATCH_IN_CACHE", 1)
    monkeypatch.setattr(device, "multiprocessors", lambda _: 0)
    np.testing.assert_array_equal(pairs(kl, p, q), expected)
    np.testing.assert_array_equal(pairs(kl, without_factors(p), without_factors(q)), expected_without)
    found = np.empty_like(factors)
    assert kl.precision_factors(p.covariances, found) == -1
    np.testing.assert_array_equal(found, factors)


@every_dtype
@pytest.mark.parametrize("D", [1, 8, 64, 1000])
def test_memory_of_a_launch_is_bounded(dtype: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of pairs, and never more than shared memory holds."""
    like = torch.empty(0, dtype=device.REALS[dtype], device=device.default_device())
    monkeypatch.setattr(kl, "view", len)
    room, n_bytes = kl._Room.of(like, D, 10**9), numbers_of_a_thread(D) * like.itemsize
    assert room.shared_bytes == (room.threads * n_bytes if room.in_shared else 0) <= kl.SHARED
    if not room.in_shared:
        assert room.scratch == room.at_once * numbers_of_a_thread(D)
        assert room.scratch * like.itemsize <= max(kl.MOST_SCRATCH, kl.SCRATCH_IN_CACHE, n_bytes)
    covered = [(first, some) for first, some, _ in kl._Room.of(like, D, 100).launches(100)]
    assert sum(some for _, some in covered) == 100


# ---- pieces and tiles


@every_dtype
@every_type
def test_pieces(covariance_type: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """From either place, through buffers that are used again: the same bits, and those of every other way."""
    p, q = two_stacks(covariance_type, dtype)
    expected = pairs(kl, p, q)
    request.getfixturevalue("small")
    np.testing.assert_array_equal(pairs(kl, p, q, 2), expected)
    out = nan_on_device(M, 2)
    kl.kl_pairs(on_device(p), on_device(q), out[:, 1])
    np.testing.assert_array_equal(to_host(out[:, 1]), expected)
    assert bool(out[:, 0].isnan().all())


@every_dtype
@every_type
@pytest.mark.parametrize("far", [False, True])
def test_without_factors_as_with_those_of_the_device(covariance_type: str, dtype: str, far: bool) -> None:
    """The same bits, whichever of p and q came without P, and in pieces from either place."""
    rng = np.random.default_rng(5)
    _, q = two_stacks(covariance_type, dtype)
    p = random_stack(rng, M, 3, covariance_type, dtype, 100.0) if far else near(rng, q, 0.1)
    for each in (p, q):
        if covariance_type == "full":
            assert kl.precision_factors(each.covariances, each.precisions_cholesky) == -1
        else:
            np.divide(1, np.sqrt(each.covariances), out=each.precisions_cholesky)
    expected = pairs(kl, p, q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "PIECE_BYTES", 2000)
        patch.setattr(kl, "PAIRS_AT_ONCE", 10)
        for left, right in ways_to_leave_out(p, q):
            np.testing.assert_array_equal(pairs(kl, left, right, 2), expected)
            out = nan_on_device(M)
            kl.kl_pairs(on_device(left), on_device(right), out)
            np.testing.assert_array_equal(to_host(out), expected)


@every_type
def test_shared_covariances_without_factors(covariance_type: str) -> None:
    """Strides of zero and of two, on the device."""
    p, q = map(without_factors, two_stacks(covariance_type, "float64"))
    shared = Gaussians(covariance_type, q.means, np.broadcast_to(q.covariances[:1], q.covariances.shape))
    expected = pairs(kl, p, Gaussians(covariance_type, q.means, shared.covariances.copy()))
    left, right = on_device(p), on_device(shared)
    assert right.covariances.stride(0) == 0  # type: ignore[attr-defined]
    found = nan_on_device(M)
    kl.kl_pairs(left, right, found)
    np.testing.assert_array_equal(to_host(found), expected)
    every_other = (Gaussians(covariance_type, each.means[::2], each.covariances[::2]) for each in (left, right))
    kl.kl_pairs(*every_other, found[: -(-M // 2)])
    np.testing.assert_array_equal(to_host(found[: -(-M // 2)]), expected[::2])


@every_type
@pytest.mark.usefixtures("small")
def test_pieces_of_shared_and_strided_stacks(covariance_type: str) -> None:
    p, q = two_stacks(covariance_type, "float64")
    one = taken(q, np.zeros(M, int))
    shared = Gaussians(
        covariance_type,
        *(np.broadcast_to(array[:1], array.shape) for array in (q.means, q.covariances, q.precisions_cholesky)),
    )
    expected = pairs(kl, p, one)
    np.testing.assert_array_equal(pairs(kl, p, shared), expected)
    found = nan_on_device(M)
    kl.kl_pairs(on_device(p), on_device(shared), found)
    np.testing.assert_array_equal(to_host(found), expected)
    there = on_device(p)
    half = Gaussians(covariance_type, there.means[::2], there.covariances[::2], there.precisions_cholesky[::2])
    found = nan_on_device(len(half))
    kl.kl_pairs(half, on_device(taken(one, np.arange(len(half)))), found)
    np.testing.assert_array_equal(to_host(found), expected[::2])


@every_dtype
@every_type
@pytest.mark.usefixtures("small")
def test_tiles(covariance_type: str, dtype: str) -> None:
    """All pairs in tiles, from either place, against 50 digits."""
    rng = np.random.default_rng(1)
    p, q = (random_stack(rng, rows, 3, covariance_type, dtype, CONDITION[dtype]) for rows in (9, 17))
    truth = [exact(p, q, i, j) for i in range(9) for j in range(17)]
    bound = tolerance("all pairs", dtype) + tolerance("closed-form KL", dtype)
    found = all_pairs(kl, p, q)
    assert_close(found.ravel(), truth, bound, "all pairs")
    out = nan_on_device(17, 9)
    kl.kl_all_pairs(on_device(p), on_device(q), out.T)
    assert_close(to_host(out.T).ravel(), truth, bound, "all pairs on the device")
    np.testing.assert_array_equal(all_pairs(kl, p, q), found)


@every_dtype
@every_type
@pytest.mark.parametrize("fixtures", [(), ("small",), ("in_scratch",)], ids=str)
def test_rejected_pairs_have_the_bits_of_pairs(
    covariance_type: str, dtype: str, fixtures: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """A stack that is all but one Gaussian, and one far from it: some pairs are rejected by the guard, some are not."""
    rng = np.random.default_rng(2)
    one = random_stack(rng, 1, 4, covariance_type, dtype)
    p = near(rng, taken(one, np.zeros(9, int)), 1e-3)
    p.means[[2, 5]] += 50
    i, j = np.indices((9, 9)).reshape(2, -1)
    for fixture in fixtures:
        request.getfixturevalue(fixture)
    element = pairs(kl, taken(p, i), taken(p, j)).reshape(9, 9)
    close = element < guard(np.dtype(dtype))
    assert 0 < close.sum() < close.size
    found, out = all_pairs(kl, p, p), nan_on_device(9, 9)
    kl.kl_all_pairs(on_device(p), on_device(p), out)
    for each in (found, to_host(out)):
        np.testing.assert_array_equal(each[close], element[close])
        np.testing.assert_allclose(each, element, rtol=tolerance("all pairs", dtype))


@every_dtype
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.usefixtures("small")
def test_factors_in_pieces(dtype: str, place: str) -> None:
    covariances = random_covariances(np.random.default_rng(3), M, 4, 10.0, "full").astype(dtype)
    expected = np.concatenate([factors(covariances[m : m + 1])[1] for m in range(M)])
    spoilt = covariances.copy()
    spoilt[[M - 1, M - 4]] *= -1
    for given, first in ((covariances, -1), (spoilt, M - 4)):
        failed, found = factors(given, place)
        assert failed == first
        np.testing.assert_array_equal(found[: M - 4], expected[: M - 4])
        here = given if place == "host" else torch.from_numpy(given).to(device.default_device())
        assert kl.check_covariances(here, 2) == first  # type: ignore[arg-type]
    skew = covariances[::2].copy()
    skew[3, 0, 1] += 1e-3
    here = skew if place == "host" else torch.from_numpy(skew).to(device.default_device())
    assert kl.check_covariances(here, 2) == 3  # type: ignore[arg-type]
    assert not np.isfinite(found[M - 4]).all()


def factors(covariances: np.ndarray, place: str = "host") -> tuple[int, np.ndarray]:
    """What the kernel returns and writes, from and to one of the places; on the device to every other of a stack."""
    out = np.full((len(covariances), 2, *covariances.shape[1:]), np.nan, covariances.dtype)
    if place == "host":
        return kl.precision_factors(covariances, out[:, 1], 2), out[:, 1]
    there: Any = torch.from_numpy(out).to(device.default_device())
    given: Any = torch.from_numpy(covariances).to(device.default_device())
    failed = kl.precision_factors(given, there[:, 1])
    assert bool(there[:, 0].isnan().all())
    return failed, to_host(there[:, 1])


@every_dtype
@every_type
@pytest.mark.parametrize("D", [1, 4])
def test_features_of_all_pairs(covariance_type: str, dtype: str, D: int) -> None:
    """E φ, η and the size of their terms, which decides what is rejected, are the reference's."""
    p, q = two_stacks(covariance_type, dtype, D)
    with device.on(device.default_device()):
        shift = kl._shift(on_device(p), on_device(q), device.default_device())
        (left,), (right,) = (kl._stacks(on_device(each), M, device.default_device(), 1) for each in (p, q))
        expectations, negative_entropy = map(to_host, kl._expectations(left, shift))
        naturals = to_host(kl._naturals(right, shift))
    everyone = slice(0, M)
    phi, size_of_p, entropies = reference._expectations(p, everyone, shift_of(p, q))
    eta, size_of_q = reference._naturals(q, everyone, shift_of(p, q))
    for found, expected in (
        (expectations, np.hstack([phi, size_of_p])),
        (naturals, np.hstack([-eta, size_of_q])),
        (negative_entropy, entropies),
    ):
        np.testing.assert_allclose(found.T, expected, rtol=1e3 * EPS[dtype], atol=1e3 * EPS[dtype])


# ---- on the device


@every_type
def test_same_bits_twice(covariance_type: str) -> None:
    p, q = (on_device(each) for each in two_stacks(covariance_type, "float32", D=5))
    found = []
    for _ in range(2):
        out = nan_on_device(M, M)
        kl.kl_all_pairs(p, q, out)
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.skipif(not ON_A_GPU, reason="only a GPU can tell who waits")
@every_dtype
@every_type
def test_pairs_wait_for_nothing(covariance_type: str, dtype: str) -> None:
    """torch itself raises at any synchronisation."""
    p, q = (on_device(each) for each in two_stacks(covariance_type, dtype))
    out = nan_on_device(M)
    kl.kl_pairs(p, q, out)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kl.kl_pairs(p, q, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(out.isfinite().all())


@pytest.mark.skipif(not ON_A_GPU, reason="only a GPU has streams")
def test_the_current_stream() -> None:
    """A stack that a busy stream is still to fill is read after it."""
    p, q = (on_device(each) for each in two_stacks("full", "float64"))
    expected, out = nan_on_device(M), nan_on_device(M)
    kl.kl_pairs(p, q, expected)
    late = torch.zeros_like(p.means)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        late.copy_(p.means)
        kl.kl_pairs(Gaussians("full", late, p.covariances, p.precisions_cholesky), q, out)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_fma_rounds_once() -> None:
    """(1 + ε) (1 − ε) − 1 = −ε², which a rounded product would lose; and infinities and NaN pass."""
    for dtype in DTYPES:
        eps, real = float(np.finfo(dtype).eps), NUMBA_REALS[dtype]

        def kernel(x: Any, out: Any) -> None:
            n = cuda.grid(1)
            out[n] = fma(x[3 * n], x[3 * n + 1], x[3 * n + 2])

        x = torch.tensor([[1 + eps, 1 - eps, -1], [torch.inf, 1, 1], [2, torch.nan, 1]], dtype=device.REALS[dtype])
        with device.on(device.default_device()):
            there = x.to(device.default_device())
            out = torch.zeros_like(there[:, 0])
            kernel_of_one = Kernel(f"fma, {dtype}", dtype, kernel, (flat(real), flat(real)), 1)
            kernel_of_one.launch(3, 1, device.view(there), device.view(out))
        np.testing.assert_array_equal(to_host(out), [-(eps**2), np.inf, np.nan])


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    p, q = two_stacks("full", "float64")
    monkeypatch.setattr(kl, "_compute", full)
    with pytest.raises(MemoryError, match=r"memory does not suffice for the divergences .*2.00 GiB"):
        pairs(kl, p, q)


# ---- the library


def test_divergences_of_the_library() -> None:
    """By name, in several threads: the reference's results."""
    rng = np.random.default_rng(4)
    covariances = random_covariances(rng, 6, 3, 30.0, "full")
    p, q = (emalgam.Gaussian(rng.normal(size=(6, 3)), covariances[rng.permutation(6)]) for _ in range(2))
    mixtures = [
        emalgam.Mixture(np.array([0.25, 0.75]), rng.normal(size=(2, 3)), covariances[m : m + 2]) for m in range(3)
    ]
    bound = 2 * tolerance("closed-form KL", "float64")
    for function in (divergence.kl, divergence.kl_all_pairs):
        found = function(p, q, backend="numba_cuda", n_threads=2)
        np.testing.assert_allclose(found, function(p, q, backend="reference"), rtol=bound)
    for together in (False, True):
        found, expected = (
            divergence.kl_variational(mixtures, mixtures[::-1], all_pairs=together, backend=backend, n_threads=2)
            for backend in ("numba_cuda", "reference")
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)
