"""What is drawn on the device, where it goes, and that pieces, panels, launches and chunks do not show in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import emalgam
from emalgam_kernels import Direct, Packed
from emalgam_kernels.numba_cuda import device, draws, sampling, staging
from emalgam_kernels.parameters import Sampler
from emalgam_kernels.philox import DRAWS
from emalgam_kernels.reference import sampling as reference
from tests import oracles
from tests.conftest import DTYPES, ON_A_GPU, SIMULATED
from tests.kernels.problems import assert_within
from tests.kernels.test_sampling import (
    SEED,
    STANDARD_ERRORS,
    in_frame,
    kl_sums_of,
    pair,
    sampler_of,
    several,
    some_mixture,
    stacked,
)
from tests.tolerances import EPS, tolerance

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_draw = pytest.mark.parametrize("draw", DRAWS)
FALSE_ALARM = 1e-4
FIRST = 2**32 - 7  # the row's number needs its high word too


def tensors(n: int, D: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    place = device.default_device()
    x = torch.full((n, D), torch.nan, dtype=device.REALS[dtype], device=place)
    return x, torch.full((n,), -1, dtype=torch.int64, device=place)


def drawn(sampler: Sampler, n: int, dtype: str, draw: str = "plain", first: int = FIRST) -> tuple[np.ndarray, ...]:
    """Samples and labels as tensors, in main memory."""
    x, labels = tensors(n, sampler.n_features, dtype)
    sampling.sample_mixture(sampler, SEED, first, x, labels, draw)
    return x.cpu().numpy(), labels.cpu().numpy()


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_is_the_reference_s(sampler: Sampler, n: int, dtype: str, draw: str) -> None:
    x, labels = drawn(sampler, n, dtype, draw)
    expected, expected_labels = np.empty(x.shape, dtype), np.empty(n, np.int64)
    reference.sample_mixture(sampler, SEED, FIRST, expected, expected_labels, draw)
    np.testing.assert_array_equal(labels, expected_labels)
    # |ε| < 8.6, and D terms that are rounded one after the other
    factors = np.tril(sampler.factors) if sampler.factors.ndim == 3 else sampler.factors[..., None]
    scale = np.abs(sampler.means[labels]) + 8.6 * np.abs(factors).sum(axis=2)[labels]
    ulp = tolerance("normal", dtype) + tolerance("numpy normal", dtype) + 2 * sampler.n_features
    assert_within(x, expected.astype(np.float64), ulp * EPS[dtype] * scale, "x")


# ---- how features and parameters are laid out


def wide(D: int, diagonal: bool) -> Sampler:
    """A mixture of two with cheap factors."""
    rng = np.random.default_rng(D)
    factors = rng.normal(size=(2, D) if diagonal else (2, D, D)) / D**0.5
    return Sampler(rng.normal(size=(2, D)), factors, np.array([0.4, 0.6]), 3)


@every_dtype
@every_draw
@pytest.mark.parametrize("diagonal", [True, False])
def test_more_features_than_a_panel_has(dtype: str, draw: str, diagonal: bool) -> None:
    """Two panels and a bit: the last feature alone, and groups of threads that have nothing to write."""
    assert_is_the_reference_s(wide(8 * draws.THREADS + 1, diagonal), 3, dtype, draw)


@every_dtype
@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag"])
@pytest.mark.parametrize("D", [1, 5, 12])
def test_parameters_too_large_for_shared_memory(
    dtype: str, covariance_type: str, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(some_mixture(5, D, covariance_type), 20)
    monkeypatch.setattr(sampling, "NEARBY_BYTES", 0)
    for draw in DRAWS:
        assert_is_the_reference_s(sampler, 40, dtype, draw)


def test_shared_memory_suffices() -> None:
    """For every number of features; and the largest parameters that go there do."""
    static = draws.THREADS * 8
    for D in (*range(1, 40), 63, 64, 65, 255, 1023, 1024, 1025, 5000):
        for K in (1, 100):
            one = Sampler(np.zeros((K, D)), np.ones((K, D)), np.ones(K))
            found = sampling.Draws(one, 0, "plain", torch.float64, device.default_device())
            assert found.shared_bytes + static <= device.SHARED_BYTES
            assert found.size.T * found.size.groups <= draws.THREADS
            assert found.panels * 4 * found.size.groups >= D


# ---- pieces and slices


@every_dtype
@every_draw
def test_pieces_do_not_show(dtype: str, draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, n = sampler_of(some_mixture(4, 3), 30), 70
    expected = drawn(sampler, n, dtype, draw)
    monkeypatch.setattr(staging, "PIECE_BYTES", 400)
    found = np.full((n, 3), np.nan, dtype), np.full(n, -1, np.int64)
    prepared = []

    def prepare(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        prepared.append(arguments)
        return parameters(*arguments)

    parameters = sampling._parameters
    monkeypatch.setattr(sampling, "_parameters", prepare)
    sampling.sample_mixture(sampler, SEED, FIRST, *found, draw, n_threads=2)
    assert_same(found, expected)
    assert len(prepared) == 1, "the mixture was sent more than once"


def test_pieces_of_words_and_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    words, u = np.empty((50, 4), np.uint32), np.empty(50, np.float32)
    monkeypatch.setattr(staging, "PIECE_BYTES", 100)
    sampling.philox_words(SEED, 1, 2, 2**64 - 20, words)
    sampling.uniforms(SEED, 1, 2**64 - 20, u)
    expected_words, expected = np.empty_like(words), np.empty_like(u)
    reference.philox_words(SEED, 1, 2, 2**64 - 20, expected_words)
    reference.uniforms(SEED, 1, 2**64 - 20, expected)
    assert_same((words, u), (expected_words, expected))


@every_dtype
def test_rows_after_the_last_number(dtype: str) -> None:
    """Numbers have 64 bits and begin again."""
    sampler = sampler_of(some_mixture(4, 3))
    last = 2**64 - 15
    whole, before, after = (drawn(sampler, n, dtype, first=f) for n, f in ((40, last), (15, last), (25, 0)))
    assert_same(whole, tuple(np.concatenate(parts) for parts in zip(before, after, strict=True)))


@every_dtype
def test_launches_do_not_show(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block that goes from tile to tile, or many."""
    sampler = sampler_of(some_mixture(4, 9))
    expected = drawn(sampler, 90, dtype)
    monkeypatch.setattr(sampling, "BLOCKS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(sampling, "multiprocessors", lambda _: 1)
    assert_same(drawn(sampler, 90, dtype), expected)


# ---- tensors


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(x.shape[::-1]).T


def sliced(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros((2 * x.shape[0] + 1, 3 * x.shape[1]))[1::2, ::3]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.zeros_like,
    "transposed": transposed,
    "sliced": sliced,
    "sliced and transposed": lambda x: sliced(x.T).T,
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [3, 4 * draws.THREADS + 2])
def test_tensors_are_written_where_they_lie(layout: str, D: int, dtype: str) -> None:
    sampler, n = wide(D, diagonal=True), 4 if D > 3 else 50
    x, _ = tensors(n, D, dtype)
    out, labels = LAYOUTS[layout](x), x.new_full((3 * n,), -1, dtype=torch.int64)
    memory = out._base if out._base is not None else out
    sampling.sample_mixture(sampler, SEED, FIRST, out, labels[1::3])
    assert_same((out.cpu().numpy(), labels[1::3].cpu().numpy()), drawn(sampler, n, dtype))
    assert (labels[::3] == -1).all()
    assert int((memory != 0).sum()) == n * D


def test_words_uniforms_and_normals_as_tensors() -> None:
    place = device.default_device()
    words, u = torch.zeros((4, 30), dtype=torch.uint32, device=place).T, torch.zeros(60, device=place)
    epsilon = torch.zeros((30, 5), dtype=torch.float64, device=place)
    sampling.philox_words(SEED, 1, 2, 3, words)
    sampling.uniforms(SEED, 1, 3, u[::2])
    sampling.normals(SEED, 1, 3, epsilon)
    found = words.cpu().numpy(), u[::2].cpu().numpy(), epsilon.cpu().numpy()
    expected = np.empty((30, 4), np.uint32), np.empty(30, np.float32), np.empty((30, 5))
    sampling.philox_words(SEED, 1, 2, 3, expected[0])
    sampling.uniforms(SEED, 1, 3, expected[1])
    sampling.normals(SEED, 1, 3, expected[2])
    assert_same(found, expected)
    assert (u[1::2] == 0).all()


def test_goodness_of_fit_on_the_device() -> None:
    """Labels by χ², squared Mahalanobis distances by Kolmogorov and Smirnov: one seed in 5000 fails one of the two."""
    n, mixture = 3000 if SIMULATED else 10**6, some_mixture(5, 3)
    x, labels = drawn(sampler_of(mixture), n, "float32")
    counts = np.bincount(labels, minlength=5)
    assert stats.chisquare(counts, n * mixture.weights).pvalue > FALSE_ALARM
    inverse = np.linalg.inv(oracles.full_covariances(mixture).astype(np.float64))[labels]
    centred = x - mixture.means[labels]
    distance = np.einsum("ni,nij,nj->n", centred, inverse, centred)
    assert stats.kstest(distance, stats.chi2(3).cdf).pvalue > FALSE_ALARM


# ---- Monte Carlo sums


def kl_sums(n: int, p: Packed | Direct, q: Packed | Direct, sampler: Sampler, controlled: bool = False) -> np.ndarray:
    """Sums of one pair into a tensor, in main memory."""
    p, q, sampler = (stacked([each]) for each in (p, q, sampler))
    control = (p, q) if controlled else None
    out = torch.full((1, 5 if controlled else 2), torch.nan, dtype=torch.float64, device=device.default_device())
    sampling.kl_monte_carlo(sampler, p, q, SEED, FIRST, n, out, control=control)  # type: ignore[arg-type]
    return out.cpu().numpy()[0]


def densities(dtype: str, other: str | None = None) -> tuple[Packed, Packed, Sampler]:
    p, q = pair(3, "full")
    return in_frame(p, "packed", dtype), in_frame(q, "packed", other or dtype), sampler_of(p)


@every_dtype
def test_chunks_add_up(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what one chunk gives, but for the order of the sum; and the last one may be shorter."""
    p, q, sampler = densities(dtype)
    monkeypatch.setattr(sampling, "ROWS_TOGETHER", 0)
    whole = kl_sums(95, p, q, sampler, controlled=True)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1500)
    row_bytes = np.dtype(dtype).itemsize * 7
    assert 95 % sampling._rows_of_a_chunk(95, row_bytes) != 0
    np.testing.assert_allclose(kl_sums(95, p, q, sampler, controlled=True), whole, rtol=1e-12)
    np.testing.assert_array_equal(whole[:2], whole[2:4])  # the control is the pair itself
    assert whole[4] == whole[1]


def test_chunks_are_as_long_as_each_other() -> None:
    for n in (1, 7, 1000, 10**7 + 3):
        for row_bytes in (20, 10**6, 10**9):
            rows = sampling._rows_of_a_chunk(n, row_bytes)
            chunks = -(-n // rows)
            assert 1 <= rows <= max(sampling.CHUNK_BYTES // row_bytes, 1)
            assert chunks * rows - n < chunks


@every_dtype
def test_sums_have_the_same_bits_every_time(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ROWS_TOGETHER", 0)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1500)
    p, q, sampler = densities(dtype)
    first, second = (kl_sums(95, p, q, sampler) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    out = np.empty((1, 2))
    sampling.kl_monte_carlo(stacked([sampler]), stacked([p]), stacked([q]), SEED, FIRST, 95, out)
    np.testing.assert_array_equal(out[0], first)


@every_dtype
@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("algorithm", ["packed", "direct"])
def test_pairs_together_and_one_by_one(
    dtype: str, covariance_type: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same sums to rounding, and the pairs of a chunk do not show in theirs."""
    pairs, n = several(3, covariance_type, 3), 40
    how = {"dtype": dtype, "algorithm": algorithm, "controlled": covariance_type == "full"}
    found = kl_sums_of(pairs, sampling, n, **how)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 2 * n * 8 * 7)
    np.testing.assert_array_equal(kl_sums_of(pairs, sampling, n, **how), found)
    monkeypatch.setattr(sampling, "ROWS_TOGETHER", 0)
    size = np.abs(found).max(axis=0)
    assert_within(kl_sums_of(pairs, sampling, n, **how), found, n * tolerance("log ratio", dtype) * (1 + size), "Σ")


@pytest.mark.parametrize(("dtype", "other"), [("float32", "float64"), ("float64", "float32")])
def test_densities_of_two_types(dtype: str, other: str) -> None:
    """Samples have the type of p's arithmetic; log q keeps its own."""
    n, (p, q, sampler) = 60, densities(dtype, other)
    x, _ = drawn(sampler, n, dtype)
    d = oracles.log_prob(x, pair(3, "full")[0]) - oracles.log_prob(x, pair(3, "full")[1])
    bound = n * tolerance("log ratio", "float32")
    assert_within(kl_sums(n, p, q, sampler), [d.sum(), (d * d).sum()], bound * np.array([1, 2 * np.abs(d).max()]), "Σ")


@pytest.mark.skipif(not ON_A_GPU, reason="only a GPU can tell who waits")
def test_nothing_waits_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks there are: torch itself raises at a synchronisation once the parameters are there."""
    p, q, sampler = (stacked([each]) for each in densities("float32"))
    warm = torch.zeros((1, 2), dtype=torch.float64, device=device.default_device())
    sampling.kl_monte_carlo(sampler, p, q, SEED, FIRST, 10**5, warm)  # type: ignore[arg-type]
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 2**16)
    genuine = sampling.Draws.draw

    def watched(self: sampling.Draws, first: int, rows: int) -> None:
        torch.cuda.set_sync_debug_mode("error")
        genuine(self, first, rows)

    monkeypatch.setattr(sampling.Draws, "draw", watched)
    try:
        out = torch.zeros((1, 2), dtype=torch.float64, device=device.default_device())
        sampling.kl_monte_carlo(sampler, p, q, SEED, FIRST, 10**5, out)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(out.isfinite().all())


# ---- what users call


def mixtures() -> tuple[emalgam.Mixture, emalgam.Mixture]:
    shape = np.array([[1.0, 0.3], [0.3, 0.5]])
    p = emalgam.Mixture([0.4, 0.6], [[0.0, 0.0], [3.0, 1.0]], np.stack([shape, 2 * shape]))
    return p, emalgam.Mixture([0.5, 0.5], [[0.5, 0.0], [3.0, 0.0]], np.stack([shape, shape]))


def test_mixtures_and_gaussians_draw_there() -> None:
    p, _ = mixtures()
    (x, labels), (expected, expected_labels) = (p.sample(40, 3, backend=each) for each in ("numba_cuda", "reference"))
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-14)
    single = emalgam.Gaussian([0.0, 1.0], [[1.0, 0.2], [0.2, 4.0]])
    stack = emalgam.Gaussian(np.zeros((3, 2)), np.tile(np.eye(2), (3, 1, 1)))
    for gaussian in (single, stack):
        found, expected = (gaussian.sample(20, 3, backend=each) for each in ("numba_cuda", "reference"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_expectations_and_divergences_are_estimated_there() -> None:
    p, q = mixtures()
    backends = ("numba_cuda", "reference")
    found, expected = (emalgam.sampling.expectation(lambda x: x[:, 0], p, 300, 1, backend=each) for each in backends)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for estimator in ("plain", "control"):
        found, expected = (
            emalgam.divergence.kl_monte_carlo(p, q, 300, estimator=estimator, random_state=1, backend=each)
            for each in backends
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert abs(found.value - expected.value) < STANDARD_ERRORS * found.standard_error
