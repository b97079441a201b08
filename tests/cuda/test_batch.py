"""Many fits on the device: places, pieces and the workspace change no bit; tests/kernels has the rest."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

import emalgam
from emalgam_kernels.batch import Mixtures, Outcomes, Problems, Settings, Status
from emalgam_kernels.numba_cuda import batch, device, staging
from tests.conftest import SIMULATED
from tests.kernels.test_batch import assert_same_bits, settings, together

every_place = pytest.mark.parametrize("results", ["host", "device"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two or three problems."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 2000)


@pytest.fixture
def in_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory for a problem's tile and nothing else; a workspace that holds anything."""
    tile = batch.ITEM_BYTES * (batch._padded(2 + 1) + batch.TILE_ROWS) * batch._rows_of_a_tile(2)
    monkeypatch.setattr(batch, "most_shared_bytes", lambda _: tile + batch.STATIC_BYTES)

    def workspace(launch: Any, place: torch.device) -> torch.Tensor:
        return torch.full((launch.blocks * launch.size.memory,), torch.nan, dtype=torch.float64, device=place)

    monkeypatch.setattr(batch._Launch, "workspace", workspace)


def some_problems(D: int = 2, n: int = 30) -> Problems:
    """Seven problems of different sizes, one of them empty and one with NaN."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n - i, D)) + 5 * rng.integers(0, 2, (n - i, 1)) for i in range(5)]
    parts += [np.empty((0, D)), np.full((6, D), np.nan)]
    return together(parts)


def how_to(problems: Problems, covariance_type: str = "full") -> Settings:
    return settings(problems, covariance_type, (1, 2), max_iter=2, tol=0.0, seed=5)


def room(problems: Problems, how: Settings) -> tuple[Mixtures, Outcomes]:
    K = int(how.most.max())
    return Mixtures.empty(how.covariance_type, len(problems), K, problems.n_features), Outcomes.empty(len(problems))


def fitted(problems: Problems, how: Settings, place: str = "host") -> tuple[Any, Any]:
    """The fits; with `place` "device" into tensors there, and then from them."""
    results = room(problems, how)
    if place == "device":
        results = tuple(map(on_device, results))
    assert batch.fit_many(problems, how, *results, 2) is None
    return tuple(map(on_host, results)) if place == "device" else results


def on_device(given: Any) -> Any:
    """The same dataclass with tensors on the device for its float and integer arrays."""
    return replace(given, **{name: sent(value) for name, value in arrays(given).items()})


def arrays(given: Any) -> dict[str, np.ndarray]:
    return {
        each.name: getattr(given, each.name) for each in fields(given) if hasattr(getattr(given, each.name), "shape")
    }


def sent(array: np.ndarray) -> torch.Tensor:
    """As it lies: strides are kept."""
    if array.dtype == np.uint64:
        array = array.view(np.int64)
    if SIMULATED:
        return torch.from_numpy(array.copy(order="K"))
    return torch.from_numpy(array.copy(order="K")).to(device.default_device())


def on_host(given: Any) -> Any:
    return replace(given, **{name: value.cpu().numpy() for name, value in arrays(given).items()})


# ---- where samples and results lie


@every_place
def test_pieces_and_places_do_not_matter(results: str, small: None) -> None:
    problems = some_problems()
    how = how_to(problems)
    in_pieces = fitted(problems, how, results)
    np.testing.assert_array_equal(in_pieces[1].status[5:], [Status.TOO_FEW_ROWS, Status.NOT_FINITE])
    assert (in_pieces[1].status[:5] <= Status.COLLAPSED).all()
    there = replace(problems, x=sent(problems.x))
    assert_same_bits(in_pieces, fitted(there, how, results))
    assert_same_bits(in_pieces, fitted(on_device(problems), on_device(how), results))


def test_how_many_pieces_there_are(small: None) -> None:
    problems = some_problems()
    edges = batch._edges(problems, problem_bytes=100)
    assert edges[0] == 0
    assert edges[-1] == len(problems)
    assert len(edges) >= 3
    crossing = np.diff(problems.offsets[edges]) * 16 + np.diff(edges) * 100
    assert ((crossing <= 2000) | (np.diff(edges) == 1)).all()
    resident = replace(problems, x=sent(problems.x))
    assert batch._edges(resident, problem_bytes=100).tolist() == [0, len(problems)]


@pytest.mark.parametrize("covariance_type", ["full", "spherical"])
def test_order_weights_and_strides(covariance_type: str, small: None) -> None:
    """Rows in any order, every other column, float32: sent in the order of the problems, or read where they lie."""
    plain = some_problems(n=20)
    rng, N = np.random.default_rng(1), len(plain.x)
    order, weight = rng.permutation(N), rng.integers(0, 3, N).astype(float)
    wide = np.full((N, 4), np.nan, np.float32)
    wide[order, ::2] = plain.x
    sorted_weight = weight[order]
    mixed = replace(plain, x=wide[:, ::2], order=order, sample_weight=weight)
    how = how_to(plain, covariance_type)
    first = fitted(replace(plain, x=plain.x.astype(np.float32), sample_weight=sorted_weight), how)
    assert_same_bits(first, fitted(mixed, how))
    strided = sent(wide)[:, ::2]
    assert_same_bits(first, fitted(replace(mixed, x=strided), how))
    assert_same_bits(first, fitted(replace(mixed, x=strided, order=sent(order), sample_weight=sent(weight)), how))


def test_a_part_of_the_rows(small: None) -> None:
    """Problems may begin behind the first row, as those of a slice do; rows of no problem keep what they had."""
    problems = some_problems(n=20)
    chosen = replace(problems, offsets=problems.offsets[2:5], numbers=problems.numbers[2:4])
    all_, part = fitted(problems, how_to(problems)), fitted(chosen, how_to(chosen))
    for name in ("weights", "means", "covariances"):
        np.testing.assert_array_equal(getattr(all_[0], name)[2:4], getattr(part[0], name))
    for x in (problems.x, sent(problems.x)):
        log_prob, labels = np.full(len(problems.x), 7.0), np.full(len(problems.x), 7)
        batch.predict_many(replace(chosen, x=x), part[0], log_prob, labels)
        inside = slice(problems.offsets[2], problems.offsets[4])
        outside = np.delete(np.arange(len(log_prob)), np.arange(len(log_prob))[inside])
        assert (log_prob[outside] == 7).all()
        assert (labels[outside] == 7).all()
        assert (labels[inside] < 2).all()


@every_place
def test_predictions_of_pieces_and_places(results: str, small: None) -> None:
    problems = some_problems(n=20)
    mixtures, _ = fitted(problems, how_to(problems))
    rng, N = np.random.default_rng(1), len(problems.x)
    order, moved = rng.permutation(N), np.empty_like(problems.x)
    moved[order] = problems.x
    mixed = replace(problems, x=moved, order=order)
    expected = predicted(problems, mixtures)
    assert np.isnan(expected[0][problems.offsets[6] :]).all()
    assert np.isfinite(expected[0][: problems.offsets[5]]).all()
    for given, place in ((problems, slice(None)), (mixed, order)):
        there = replace(given, x=sent(given.x))
        for found in (
            predicted(given, mixtures, results),
            predicted(there, mixtures, results),
            predicted(there, on_device(mixtures), results),
        ):
            np.testing.assert_array_equal(found[0][place], expected[0])
            np.testing.assert_array_equal(found[1][place], expected[1])


def predicted(problems: Problems, mixtures: Mixtures, place: str = "host") -> tuple[np.ndarray, np.ndarray]:
    N = len(problems.x)
    log_prob, labels = np.zeros(N), np.zeros(N, np.int64)
    if place == "host" or not isinstance(problems.x, torch.Tensor):
        batch.predict_many(problems, mixtures, log_prob, labels, 2)
        return log_prob, labels
    found: list[Any] = [sent(each) for each in (log_prob, labels)]
    batch.predict_many(problems, mixtures, *found)
    return found[0].cpu().numpy(), found[1].cpu().numpy()


# ---- where a problem's numbers lie


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_a_workspace_changes_no_bit(covariance_type: str, request: pytest.FixtureRequest) -> None:
    problems = some_problems(n=20)
    how = how_to(problems, covariance_type)
    shared = fitted(problems, how)
    predictions = predicted(problems, shared[0])
    request.getfixturevalue("in_workspace")
    launch = batch._Launch.of(
        next(batch._pieces(problems, np.array([0, 7]), device.default_device(), 1)), shared[0], how
    )
    assert not launch.in_shared
    assert_same_bits(shared, fitted(problems, how))
    for found, expected in zip(predicted(problems, shared[0]), predictions, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_memory_does_not_grow_with_problems_or_samples() -> None:
    launches = []
    for B, n in ((1000, 50), (2000, 100)):
        problems = together([np.zeros((n, 8))] * B)
        piece = next(batch._pieces(problems, np.array([0, B]), device.default_device(), 1))
        launches.append(batch._Launch.of(piece, Mixtures.empty("full", B, 40, 8)))
    assert launches[0].blocks == launches[1].blocks
    assert launches[0].shared_bytes == launches[1].shared_bytes
    assert launches[0].size.memory == launches[1].size.memory


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
@pytest.mark.parametrize(("D", "K"), [(1, 1), (2, 3), (8, 5), (20, 2), (64, 16), (100, 40)])
def test_places_do_not_overlap_and_sums_have_room(covariance_type: str, D: int, K: int) -> None:
    piece = next(batch._pieces(together([np.zeros((4, D))]), np.array([0, 1]), device.default_device(), 1))
    size = batch._size(piece, K, 32, covariance_type, None)
    starts = [*size.places, size.memory]
    assert (np.diff(starts) > 0).all()
    lower = size.C * size.M  # of all covariances, while they are factorised
    assert size.memory - size.places.sums >= max(lower, 2 * D * batch.LANES, 3 * batch.LANES)


def test_too_many_features_is_an_error() -> None:
    problems = together([np.zeros((3, 9000))])
    with pytest.raises(
        ValueError, match=r"many fits of 9000 features need .* expected fewer features; use a CPU backend"
    ):
        fitted(problems, settings(problems, "diag", 1))


# ---- the public function


def test_fit_many_on_the_device() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 24, 2)) + 9 * rng.integers(0, 2, (5, 24, 1))
    fits, specified = (
        emalgam.fit_many(x, 2, max_iter=3, tol=0.0, random_state=0, backend=backend)
        for backend in ("numba_cuda", "reference")
    )
    assert fits.backend == "numba_cuda"
    np.testing.assert_allclose(fits.means, specified.means, rtol=1e-9)
    np.testing.assert_allclose(fits.log_likelihood, specified.log_likelihood, rtol=1e-12)
    scores = fits.score_samples(x, backend="numba_cuda")
    np.testing.assert_allclose(scores, specified.score_samples(x, backend="reference"), rtol=1e-9)
    np.testing.assert_array_equal(fits.predict(x, backend="numba_cuda"), specified.predict(x, backend="reference"))
