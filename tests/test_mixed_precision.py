"""precision="mixed": float32 passes first, float64 passes last, and the result of a fit in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emalgam
from emalgam.checkpoint import Checkpoint
from emalgam.guard import LARGEST_FLOAT32, NOISE_OF_A_CHANGE, TOLERANCE, Cancellation, Schedule
from emalgam.parts import Observations
from tests.conftest import COVARIANCE_TYPES, DTYPES
from tests.samples import blobs, start
from tests.test_checkpoint import Interrupt, assert_same_bits, interrupt
from tests.test_em import quiet_fit

PARTS = ("weights", "means", "covariances")


def overlapping(N: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Clusters that EM needs a while to tell apart."""
    x, centres = blobs(N, K=5, seed=2)
    return x + np.random.default_rng(3).normal(size=x.shape) * 2.5, centres


@pytest.fixture
def arithmetics(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arithmetic of every pass of EM, in turn; filled as fits run."""
    seen: list[str] = []
    statistics = Observations.statistics

    def spy(self: Observations, parameters: Any, hard: bool = False) -> Any:
        if not hard:
            seen.append(parameters.arithmetic)
        return statistics(self, parameters, hard)

    monkeypatch.setattr(Observations, "statistics", spy)
    return seen


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_where_float64_ends(backend: str, dtype: str, covariance_type: str, arithmetics: list[str]) -> None:
    """The fixed point of EM does not depend on the way to it: both stop within what `tol` leaves of the way."""
    x, centres = overlapping(1200)
    x = x.astype(dtype)
    how = {"covariance_type": covariance_type, "backend": backend, "max_iter": 3000, **start(centres, covariance_type)}
    strict = emalgam.fit(x.astype(np.float64), 5, tol=1e-12, **how)
    arithmetics.clear()
    mixed = emalgam.fit(x, 5, tol=1e-12, precision="mixed", **how)
    first = mixed.float32_iterations
    assert 0 < first < mixed.n_iter
    assert arithmetics == ["float32"] * first + ["float64"] * (mixed.n_iter - first)
    assert mixed.converged
    assert (mixed.algorithm, mixed.arithmetic) == ("packed", "float64")
    assert mixed.error_bound < TOLERANCE["float64"]
    assert mixed.lower_bound == pytest.approx(strict.lower_bound, abs=1e-10)
    for name in PARTS:
        ours, theirs = getattr(mixed.mixture, name), getattr(strict.mixture, name)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=name)


def test_most_passes_of_a_long_fit_are_in_float32() -> None:
    x, centres = overlapping()
    how = {"tol": 1e-5, "max_iter": 1000, **start(centres, "full")}
    strict, mixed = (emalgam.fit(x, 5, precision=each, **how) for each in ("strict", "mixed"))
    assert strict.n_iter > 20
    assert mixed.n_iter <= strict.n_iter + 2
    assert mixed.float32_iterations >= strict.n_iter - 2
    assert strict.float32_iterations == 0
    assert emalgam.fit(x.astype(np.float32), 5, **how).float32_iterations > 20


def test_weights_and_rows_far_out() -> None:
    """An offset of 1e8 has no digits in float32: rows are brought into their frame in float64."""
    x, centres = overlapping()
    weight = np.random.default_rng(4).integers(0, 3, len(x))
    how = {"tol": 1e-10, "max_iter": 3000}
    mixed = emalgam.fit(x + 1e8, 5, sample_weight=weight, precision="mixed", **start(centres + 1e8, "full"), **how)
    strict = emalgam.fit(np.repeat(x, weight, axis=0), 5, **start(centres, "full"), **how)
    assert mixed.float32_iterations > 5
    assert mixed.lower_bound == pytest.approx(strict.lower_bound, abs=1e-8)


@pytest.mark.parametrize("algorithm", ["auto", "packed"])
def test_where_the_guard_refuses_float32_nothing_changes(algorithm: str) -> None:
    """ "packed" as well: float32 passes would lose what float64 ones, which it does ask for, still see."""
    x, centres = blobs(600)
    x, centres = x * 1e-3 + centres[np.arange(600) % 4] * 100, centres * 100
    how = {"random_state": 0, "tol": 1e-9, "max_iter": 500, "init_params": "k-means++", "algorithm": algorithm}
    strict, mixed = (emalgam.fit(x, 4, precision=each, **how) for each in ("strict", "mixed"))
    assert strict.error_bound * 2**29 > TOLERANCE["float32"]  # what it would be in float32
    assert mixed.float32_iterations == 0
    assert_same_bits(mixed, strict)


@pytest.mark.parametrize("max_iter", [0, 1, 3])
def test_the_last_pass_is_in_float64(max_iter: int, arithmetics: list[str]) -> None:
    x, centres = overlapping(500)
    result = quiet_fit(x, 5, precision="mixed", max_iter=max_iter, **start(centres, "full"))
    assert arithmetics == (["float32"] * (max_iter - 1) + ["float64"] if max_iter else [])
    assert result.arithmetic == "float64"
    assert result.error_bound < TOLERANCE["float64"]


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, _ = overlapping()
    one, two = (emalgam.fit(x, 5, precision="mixed", random_state=0, n_threads=n) for n in (1, 2))
    assert_same_bits(one, two)


@pytest.mark.parametrize("after", [-3, 0, 1])
def test_interrupted_before_and_after_the_last_float32_pass(after: int, tmp_path: Path) -> None:
    x, path = overlapping()[0], tmp_path / "state"
    how = {"precision": "mixed", "tol": 1e-4, "max_iter": 500, "random_state": 3, "init_params": "random_from_data"}
    whole = emalgam.fit(x, 5, **how)
    at = interrupt(0, whole.float32_iterations + after)
    with pytest.raises(Interrupt):
        emalgam.fit(x, 5, callback=at, checkpoint=Checkpoint(path, seconds=0), **how)
    again = emalgam.fit(x, 5, checkpoint=Checkpoint(path, seconds=0, resume=True), **how)
    assert_same_bits(again, whole)
    assert again.float32_iterations == whole.float32_iterations


def test_a_fit_that_goes_on_never_ends_in_float32(tmp_path: Path) -> None:
    """Interrupted in float32, and asked for no more iterations than it has had: one more, in float64."""
    x, path = overlapping(600)[0], tmp_path / "state"
    how = {"precision": "mixed", "tol": 0.0, "random_state": 3, "init_params": "random_from_data"}
    with pytest.raises(Interrupt):
        emalgam.fit(x, 5, max_iter=50, callback=interrupt(0, 8), checkpoint=Checkpoint(path, seconds=0), **how)
    result = quiet_fit(x, 5, max_iter=7, checkpoint=Checkpoint(path, seconds=0, resume=True), **how)
    assert (result.n_iter, result.float32_iterations, result.arithmetic) == (8, 7, "float64")


@pytest.mark.parametrize("seed", range(4))
def test_restarts_that_go_on_say_what_ran(seed: int, tmp_path: Path) -> None:
    x, path = overlapping(600)[0], tmp_path / "state"
    how = {"precision": "mixed", "tol": 0.0, "max_iter": 5, "n_init": 2, "random_state": seed}
    whole = quiet_fit(x, 5, **how)
    with pytest.raises(Interrupt):
        emalgam.fit(x, 5, callback=interrupt(1, 3), checkpoint=Checkpoint(path, seconds=0), **how)
    again = quiet_fit(x, 5, checkpoint=Checkpoint(path, seconds=0, resume=True), **how)
    assert_same_bits(again, whole)
    assert (again.arithmetic, again.float32_iterations) == ("float64", 4)


def test_reseeding() -> None:
    """A pass that started a component again says nothing of convergence, nor of float32's noise."""
    passes = schedule()
    how = passes.before(terms(100.0))
    assert not passes.after(how, 0.0, reseeded=True)
    assert not passes.settled
    x = np.concatenate([overlapping(600)[0], np.zeros((80, 3))])
    how_to = {"on_degenerate": "reseed", "reg_covar": 0.0, "random_state": 0, "tol": 1e-6, "max_iter": 2000}
    strict, mixed = (emalgam.fit(x, 4, precision=each, **how_to) for each in ("strict", "mixed"))
    assert mixed.float32_iterations > 0
    assert mixed.lower_bound == pytest.approx(strict.lower_bound, abs=1e-3)


def test_streams_and_restarts() -> None:
    x, _ = overlapping()
    how = {"precision": "mixed", "random_state": 0, "n_init": 2, "tol": 1e-6, "max_iter": 1000}
    whole, streamed = emalgam.fit(x, 5, **how), emalgam.fit(emalgam.open_stream(x, chunk_rows=700), 5, **how)
    assert streamed.float32_iterations > 5
    assert streamed.lower_bound == pytest.approx(whole.lower_bound, abs=1e-5)


def test_estimator() -> None:
    x, _ = overlapping()
    model = emalgam.GaussianMixture(5, precision="mixed", tol=1e-6, max_iter=1000, random_state=0).fit(x)
    assert model.arithmetic_ == "float64"
    assert 0 < model.float32_iterations_ < model.n_iter_
    assert model.set_params(warm_start=True).fit(x).n_iter_ <= 3


def test_not_with_direct() -> None:
    with pytest.raises(ValueError, match="precision is 'mixed' and algorithm 'direct', which computes in float64 only"):
        emalgam.fit(overlapping()[0], 5, precision="mixed", algorithm="direct")


# ---- the schedule by itself


def schedule(precision: str = "mixed", tol: float = 1e-3, largest: float = 10.0) -> Schedule:
    return Schedule("auto", precision, tol, np.dtype("float64"), largest)


def terms(size: float) -> Cancellation:
    """Of terms that are `size` large."""
    return Cancellation(size, lambda: size)


def test_a_change_that_rounding_explains_is_no_convergence() -> None:
    """The first float64 pass counts only if float32's noise cannot have made its change small."""
    passes = schedule(tol=1e-5)
    how = passes.before(terms(1000.0))
    assert not passes.after(how, 0.9e-5)
    assert passes.settled
    assert passes.noise == NOISE_OF_A_CHANGE * how.error_bound > 1e-5
    exact = passes.before(terms(1000.0))
    assert exact.arithmetic == "float64"
    assert not passes.after(exact, 0.0)
    assert passes.after(exact, 0.0)


def test_float32_passes_end_in_their_noise_whatever_tol() -> None:
    passes = schedule(tol=0.0)
    how = passes.before(terms(1000.0))
    assert not passes.after(how, 1.0)
    assert not passes.settled
    assert not passes.after(how, 0.5 * passes.noise)
    assert passes.settled


def test_a_start_that_the_guard_refuses_does_not_end_float32_passes() -> None:
    """Few rows to a component make its first covariance nearly singular; it grows soon."""
    passes = schedule()
    assert passes.before(terms(1e5)).arithmetic == "float64"
    assert not passes.after(passes.before(terms(1e5)), np.inf)
    assert passes.before(terms(10.0)).arithmetic == "float32"


def test_a_fit_that_the_guard_keeps_in_float64_converges_as_strict_does() -> None:
    passes = schedule()
    assert not passes.after(passes.before(terms(1e5)), 1.0)
    assert passes.after(passes.before(terms(1e5)), 0.9e-3)


def test_rows_too_far_out_for_float32() -> None:
    assert schedule(largest=LARGEST_FLOAT32).before(terms(10.0)).arithmetic == "float64"
    assert schedule().before(terms(10.0)).arithmetic == "float32"
    assert schedule("strict").before(terms(10.0)).arithmetic == "float64"
