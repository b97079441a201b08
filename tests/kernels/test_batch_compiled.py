"""The compiled many fits: every SIMD level, tiles that are kept and tiles that are not, and the memory they ask for."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

import emalgam_kernels
from emalgam_kernels.batch import COVARIANCE_TYPES, Mixtures, Outcomes, Problems, Settings, passes_of_a_fit
from emalgam_kernels.blocks import workspace
from tests.conftest import need
from tests.tolerances import tolerance

Fit = tuple[Mixtures, Outcomes]
every_type = pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    need("cython_cpu")
    return emalgam_kernels.load("cython_cpu", "batch")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return emalgam_kernels.load("reference", "batch")


def clusters(sizes: list[int], D: int) -> Problems:
    """Problems of these sizes, each two clusters, every third row without weight."""
    rng = np.random.default_rng(D)
    N = sum(sizes)
    x = rng.normal(size=(N, D)) + 5 * rng.integers(0, 2, (N, 1))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Problems(x, offsets, rng.permutation(N), np.arange(N) % 3 + 0.0, np.arange(len(sizes), dtype=np.uint64))


def fit(kernels: ModuleType, problems: Problems, covariance_type: str, K: int) -> Fit:
    counts = np.full(len(problems), K)
    mixtures, outcomes = (
        Mixtures.empty(covariance_type, len(problems), K, problems.n_features),
        Outcomes.empty(len(problems)),
    )
    how = Settings(covariance_type, counts, counts, n_init=2, max_iter=3, tol=0.0)
    kernels.fit_many(problems, how, mixtures, outcomes)
    return mixtures, outcomes


def assert_same_fit(found: Fit, expected: Fit) -> None:
    for name in ("weights", "means", "covariances"):
        values, truth = getattr(found[0], name), getattr(expected[0], name)
        scale = np.abs(truth).max()
        np.testing.assert_allclose(values, truth, rtol=0, atol=tolerance("fit", "float64") * scale, err_msg=name)
    np.testing.assert_allclose(found[1].log_likelihood, expected[1].log_likelihood, rtol=tolerance("fit", "float64"))
    np.testing.assert_array_equal(found[1].status, expected[1].status)


@every_type
@pytest.mark.parametrize("simd_level", ["v3", "baseline"], indirect=True)
def test_lower_levels(simd_level: str, compiled: ModuleType, reference: ModuleType, covariance_type: str) -> None:
    for D, K in ((1, 3), (3, 9), (7, 2)):
        problems = clusters([120, 31, 700], D)
        assert_same_fit(fit(compiled, problems, covariance_type, K), fit(reference, problems, covariance_type, K))


@every_type
@pytest.mark.parametrize(("n", "D"), [(60_000, 2), (5_000, 17), (300, 101)])
def test_more_samples_than_are_kept(
    compiled: ModuleType, reference: ModuleType, covariance_type: str, n: int, D: int
) -> None:
    problems = clusters([n], D)
    assert_same_fit(fit(compiled, problems, covariance_type, 2), fit(reference, problems, covariance_type, 2))


def guarded(given: list[tuple[np.ndarray, int]]) -> Callable[[int], np.ndarray]:
    """A workspace with canaries behind it, noted in `given`, and the worst alignment that malloc gives."""

    def guarded_workspace(n_bytes: int) -> np.ndarray:
        memory = np.full(n_bytes + 4096, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64 + 16
        given.append((memory, start + n_bytes))
        return memory[start : start + n_bytes]

    return guarded_workspace


@pytest.mark.parametrize("simd_level", ["v4", "v3", "baseline"], indirect=True)
def test_workspace_is_large_enough(simd_level: str, compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[np.ndarray, int]] = []
    assert compiled.workspace is workspace
    monkeypatch.setattr(compiled, "workspace", guarded(given))
    for covariance_type in COVARIANCE_TYPES:
        for D, K, sizes in ((1, 1, [1, 40]), (2, 3, [40, 300, 3]), (5, 9, [90, 12]), (3, 2, [40_000]), (40, 2, [300])):
            problems = clusters(sizes, D)
            mixtures, _ = fit(compiled, problems, covariance_type, K)
            compiled.predict_many(problems, mixtures, np.empty(len(problems.x)), np.empty(len(problems.x), np.int64))
            for memory, end in given:
                behind = np.flatnonzero(memory[end:] != 0xA5)
                assert len(behind) == 0, f"{covariance_type}, D = {D}, K = {K}: wrote {behind[-1] + 1} bytes behind"
            assert len(given) >= 2, "the kernels have their memory from elsewhere"
            given.clear()


def test_workspace_does_not_grow_with_the_samples(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(compiled, "workspace", lambda n_bytes: sizes.append(n_bytes) or workspace(n_bytes))
    for n in (20_000, 100_000):
        fit(compiled, clusters([n], 4), "full", 2)
    assert sizes[0] == sizes[1] < 4e6


def test_a_prediction_of_what_overflowed_is_nan(compiled: ModuleType, reference: ModuleType) -> None:
    mixtures = Mixtures(
        "full", np.ones(1, np.int64), np.ones((1, 1)), np.zeros((1, 1, 2)), np.full((1, 1, 2, 2), np.inf)
    )
    problems = Problems(np.ones((3, 2)), np.array([0, 3]), None, None, np.zeros(1, np.uint64))
    for kernels in (compiled, reference):
        log_prob, labels = np.zeros(3), np.zeros(3, np.int64)
        kernels.predict_many(problems, mixtures, log_prob, labels)
        assert np.isnan(log_prob).all()
        np.testing.assert_array_equal(labels, -1)


def test_equal_distances_are_equal_on_every_backend(compiled: ModuleType, reference: ModuleType) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 12, (40 * 30, 1)) / 10
    problems = Problems(x, np.arange(0, 1201, 30), None, None, np.arange(40, dtype=np.uint64))
    found, expected = fit(compiled, problems, "diag", 4), fit(reference, problems, "diag", 4)
    assert_same_fit(found, expected)


def test_passes_of_a_fit() -> None:
    how = Settings("full", np.array([1, 2]), np.array([3, 2]), n_init=5, max_iter=10)
    assert passes_of_a_fit(how) == 2 * 5 * 12


@pytest.mark.parametrize(
    ("cancellation", "terms", "form"),
    [
        (0.25, [1.0, 0.5], "RELATIVE"),  # the component with the smallest terms is left out
        (0.25, [1.0, 0.8], "PACKED"),
        (1.1, [0.0, 0.0], "DIRECT"),
        (np.inf, [0.0, 0.0], "DIRECT"),
        (np.nan, [0.0, 0.0], "DIRECT"),
        (0.25, [np.nan, np.nan], "PACKED"),
        (0.25, [np.inf, np.inf], "PACKED"),
    ],
)
def test_form_that_keeps_digits(cancellation: float, terms: list[float], form: str) -> None:
    """In multiples of what the guard lets pass."""
    need("numba_cpu")
    import numba

    from emalgam_kernels.batch import MOST_CANCELLATION
    from emalgam_kernels.numba_cpu import batch_expectation
    from emalgam_kernels.numba_cpu.batch_fit import form_of
    from emalgam_kernels.numba_cpu.batch_maximization import Verdict

    @numba.njit
    def form_for(cancellation: float, terms: np.ndarray) -> int:
        return form_of(Verdict(True, False, cancellation, 0.0), terms, len(terms))

    found = form_for(cancellation * MOST_CANCELLATION, np.array(terms) * MOST_CANCELLATION)
    assert found == getattr(batch_expectation, form)


def test_a_covariance_that_takes_a_floor_was_lifted() -> None:
    """Then what it came from cancels, however small the terms of the logits are."""
    need("numba_cpu")
    import numba

    from emalgam_kernels.numba_cpu import batch_maximization
    from emalgam_kernels.numba_cpu.batch_maximization import regularize
    from emalgam_kernels.numba_cpu.batch_memory import FLOOR, PIVOT, Frame

    @numba.njit
    def outcome(covariance: np.ndarray, rows: np.ndarray) -> int:
        unused = np.zeros((1, 1))
        frame = Frame(rows, np.zeros((1, 1, 1)), unused, rows[0], unused, rows[0])
        return regularize(frame, covariance, np.zeros_like(covariance))

    rows = np.zeros((10, 2))
    rows[FLOOR], rows[PIVOT] = 1e-6, 1.0
    for covariance, expected in (([[1.0, 1.0], [1.0, 1.0]], "LIFTED"), ([[1.0, 0.5], [0.5, 1.0]], "BROAD")):
        assert outcome(np.array(covariance), rows) == getattr(batch_maximization, expected)
