"""The EM loop: what it computes against scikit-learn, the chapter's numbers, and what it promises on the way."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import emalgam
from emalgam import initialization
from emalgam.covariance import COVARIANCES
from emalgam.m_step import effective_components
from emalgam_kernels import blocks
from tests.conftest import COVARIANCE_TYPES, DTYPES, Variant
from tests.processes import output_of
from tests.samples import blobs, start
from tests.tolerances import tolerance

EXAMPLES = Path(__file__).parent.parent / "examples"
FAITHFUL = np.loadtxt(EXAMPLES / "data" / "old_faithful.csv", delimiter=",", skiprows=1)


def quiet_fit(*args: object, **kwargs: object) -> emalgam.Fit:
    """A fit whose number of iterations is the test's choice, so that not converging is no surprise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        return emalgam.fit(*args, **kwargs)


@pytest.mark.parametrize("algorithm", ["packed", "direct"])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_path_as_scikit_learn(variant: Variant, algorithm: str, weighted: bool) -> None:
    """Same parameters, bounds and number of iterations as sklearn from the same start; weights as repeated rows."""
    from sklearn.mixture import GaussianMixture as Peer

    x, centres = blobs()
    x = x.astype(variant.dtype)
    weight = np.random.default_rng(1).integers(0, 3, len(x)) if weighted else None
    given = start(centres, variant.covariance_type)
    peer = Peer(
        len(centres), covariance_type=variant.covariance_type, tol=1e-4, max_iter=200, reg_covar=1e-6, **given
    ).fit((x if weight is None else np.repeat(x, weight, axis=0)).astype(np.float64))
    result = emalgam.fit(
        x,
        len(centres),
        covariance_type=variant.covariance_type,
        sample_weight=weight,
        tol=1e-4,
        max_iter=200,
        reg_covar=1e-6,
        algorithm=algorithm,
        backend=variant.backend,
        **given,
    )
    assert result.n_iter == peer.n_iter_
    assert result.converged
    bound = tolerance("fit", variant.dtype)
    np.testing.assert_allclose(result.lower_bounds, peer.lower_bounds_, rtol=bound, atol=bound)
    for name in ("weights", "means", "covariances", "precisions_cholesky"):
        ours, theirs = getattr(result.mixture, name), getattr(peer, f"{name}_")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max(), err_msg=name)


def faithful(backend: str, **changes: object) -> emalgam.Fit:
    arguments: dict[str, object] = {
        "tol": 1e-4,
        "reg_covar": 0.0,
        "weights_init": [0.5, 0.5],
        "means_init": [[0.0, 50.0], [0.0, 100.0]],
        "precisions_init": np.tile(np.eye(2), (2, 1, 1)),
        "backend": backend,
    }
    return quiet_fit(FAITHFUL, 2, **{**arguments, **changes})


def test_old_faithful(backend: str) -> None:
    """The chapter's program: start, nine iterations, convergence; the golden numbers to 1e-6."""
    result = faithful(backend)
    assert result.lower_bounds[0] == pytest.approx(-137.488246, abs=1e-6)
    assert result.lower_bounds[9] == pytest.approx(-4.155382999, abs=1e-6)
    assert result.converged

    final = faithful(backend, tol=1e-12, max_iter=1000).mixture
    assert final.log_prob(FAITHFUL).sum() == pytest.approx(-1130.26396, abs=1e-5)
    np.testing.assert_allclose(final.weights, [0.355873, 0.644127], atol=1e-6)
    np.testing.assert_allclose(final.means, [[2.036388, 54.478516], [4.289662, 79.968115]], atol=1e-6)
    np.testing.assert_allclose(
        final.covariances,
        [[[0.0691677, 0.4351676], [0.4351676, 33.697282]], [[0.1699684, 0.9406093], [0.9406093, 36.046211]]],
        atol=1e-6,
    )
    x, labels = final.sample(500, random_state=0)
    assert x.shape == (500, 2)
    assert set(labels) == {0, 1}


# ---- promises of every fit


def test_trace_never_falls(variant: Variant) -> None:
    """EM's likelihood never falls (but for what regularization and rounding take)."""
    x, _ = blobs(seed=3)
    result = quiet_fit(
        x.astype(variant.dtype),
        6,
        covariance_type=variant.covariance_type,
        reg_covar=0.0,
        tol=0.0,
        max_iter=60,
        random_state=0,
        backend=variant.backend,
    )
    steps = np.diff(result.lower_bounds)
    assert steps.min() > -tolerance("monotone", variant.dtype), f"the bound fell by {-steps.min():.3g}"


@given(seed=st.integers(0, 2**32 - 1), covariance_type=st.sampled_from(COVARIANCE_TYPES), K=st.integers(1, 5))
def test_properties_of_any_fit(seed: int, covariance_type: str, K: int) -> None:
    """Weights sum to one, covariances are positive definite, responsibilities sum to one, the bound never falls."""
    rng = np.random.default_rng(seed)
    D = int(rng.integers(1, 5))
    x = rng.normal(size=(60, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D) * 100
    result = quiet_fit(x, K, covariance_type=covariance_type, reg_covar=0.0, random_state=seed, tol=1e-5)
    mixture = result.mixture
    assert mixture.weights.sum() == pytest.approx(1, abs=1e-12)
    matrices = mixture.covariance.matrices(mixture.covariances, K, D)
    assert np.linalg.eigvalsh(matrices).min() > 0
    np.testing.assert_allclose(mixture.responsibilities(x).sum(axis=1), 1, atol=1e-12)
    if result.lower_bounds and result.effective_components == K:
        assert np.diff(result.lower_bounds).min(initial=0) > -1e-6


@pytest.mark.parametrize("init_params", list(initialization.INITIALIZATIONS))
def test_affine_maps_change_nothing_but_units(variant: Variant, init_params: str) -> None:
    """x → 4 x + 64 gives the same responsibilities: initialization, regularization and kernels have no unit of their
    own."""
    x, _ = blobs(400, 3, 3)
    x = x.astype(np.float32).astype(variant.dtype)
    arguments = {
        "covariance_type": variant.covariance_type,
        "init_params": init_params,
        "random_state": 5,
        "backend": variant.backend,
        "max_iter": 30,
    }
    first, second = quiet_fit(x, 3, **arguments), quiet_fit(4 * x + 64, 3, **arguments)
    bound = tolerance("affine", variant.dtype)
    np.testing.assert_allclose(
        first.mixture.responsibilities(x), second.mixture.responsibilities(4 * x + 64), atol=bound, rtol=0
    )


def test_row_order_does_not_matter_from_the_same_start(variant: Variant) -> None:
    x, centres = blobs()
    x = x.astype(variant.dtype)
    order = np.random.default_rng(0).permutation(len(x))
    arguments = {
        "covariance_type": variant.covariance_type,
        "backend": variant.backend,
        **start(centres, variant.covariance_type),
    }
    first, second = (quiet_fit(rows, 4, max_iter=10, **arguments).mixture for rows in (x, x[order]))
    np.testing.assert_allclose(first.means, second.means, rtol=0, atol=10 * tolerance("fit", variant.dtype))


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++"])
def test_weights_mean_repetition_and_zero_means_absence(variant: Variant, init_params: str) -> None:
    """Weight 2 = the row twice, weight 0 = no row, whatever it holds; from the same random state, initialization
    included."""
    x, _ = blobs(600)
    x = x.astype(variant.dtype)
    weight = np.random.default_rng(2).integers(0, 3, len(x))
    wild = np.where(weight[:, None] == 0, np.finfo(variant.dtype).max / 4, x).astype(variant.dtype)
    arguments = {
        "covariance_type": variant.covariance_type,
        "init_params": init_params,
        "random_state": 0,
        "backend": variant.backend,
    }
    weighted = quiet_fit(wild, 4, sample_weight=weight, **arguments)
    repeated = quiet_fit(np.repeat(x, weight, axis=0), 4, **arguments)
    bound = tolerance("fit", variant.dtype)
    np.testing.assert_allclose(weighted.lower_bounds, repeated.lower_bounds, rtol=bound, atol=bound)
    np.testing.assert_allclose(weighted.mixture.means, repeated.mixture.means, rtol=0, atol=20 * bound)


def test_threads_give_the_same_bits(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so small blocks that there are many for each thread."""
    monkeypatch.setattr(blocks, "FLOP_PER_BLOCK", 1)
    x, _ = blobs(20000, 4, 5)
    x = x.astype(variant.dtype)
    assert len(x) > 8 * blocks.rows_per_block(5, 15)
    results = [
        quiet_fit(
            x,
            5,
            covariance_type=variant.covariance_type,
            random_state=0,
            max_iter=4,
            backend=variant.backend,
            n_threads=n,
        )
        for n in (1, 2, 5)
    ]
    assert results[0].lower_bounds == results[2].lower_bounds
    assert results[0].lower_bounds == results[1].lower_bounds
    for name in ("weights", "means", "covariances"):
        np.testing.assert_array_equal(getattr(results[0].mixture, name), getattr(results[1].mixture, name))


# ---- the loop's arguments


def test_best_of_several_restarts_wins() -> None:
    x, _ = blobs(500, 2, 5)
    bounds: dict[int, float] = {}

    def note(event: emalgam.Iteration) -> None:
        bounds[event.restart] = event.lower_bound

    result = quiet_fit(x, 5, init_params="random_from_data", n_init=6, random_state=0, callback=note)
    assert sorted(bounds) == list(range(6))
    assert len(set(bounds.values())) > 1, "the restarts must differ, or the test shows nothing"
    assert result.lower_bound == max(bounds.values())


def test_callback_sees_every_iteration_and_can_stop() -> None:
    x, centres = blobs()
    events: list[emalgam.Iteration] = []

    def third(event: emalgam.Iteration) -> bool:
        events.append(event)
        return event.iteration == 3

    result = quiet_fit(x, 4, tol=0.0, callback=third, **start(centres, "full"))
    assert [event.iteration for event in events] == [1, 2, 3]
    assert [event.lower_bound for event in events] == result.lower_bounds
    assert events[0].change == np.inf
    assert events[2].change == result.lower_bounds[2] - result.lower_bounds[1]
    assert result.n_iter == 3
    assert not result.converged


def test_a_callback_ends_all_restarts_and_is_no_failure() -> None:
    """Anything true will do, NumPy's too; a wanted stop is no warning."""
    x, _ = blobs()
    seen: list[tuple[int, int]] = []

    def enough(event: emalgam.Iteration) -> object:
        seen.append((event.restart, event.iteration))
        return np.bool_(event.iteration == 2)

    result = emalgam.fit(x, 4, n_init=3, tol=0.0, random_state=0, callback=enough)
    assert seen == [(0, 1), (0, 2)]
    assert result.stopped
    assert not result.converged


def test_not_converging_is_a_warning() -> None:
    x, centres = blobs()
    with pytest.warns(emalgam.ConvergenceWarning, match=r"did not converge in 2 iterations \(tol=0\)"):
        emalgam.fit(x, 4, tol=0.0, max_iter=2, **start(centres, "full"))


def test_no_iterations_return_the_start() -> None:
    x, centres = blobs()
    result = emalgam.fit(x, 4, max_iter=0, **start(centres, "full"))
    np.testing.assert_allclose(result.mixture.means, centres + 0.3, atol=1e-12)
    assert result.lower_bounds == []


def test_partly_given_parameters_are_kept(variant: Variant) -> None:
    """What is given is used; the rest comes from the initialization."""
    x, centres = blobs()
    given = start(centres, variant.covariance_type)
    for name, attribute in (("weights_init", "weights"), ("means_init", "means"), ("precisions_init", "precisions")):
        result = emalgam.fit(
            x.astype(variant.dtype),
            4,
            covariance_type=variant.covariance_type,
            max_iter=0,
            random_state=0,
            backend=variant.backend,
            **{name: given[name]},
        )
        np.testing.assert_allclose(getattr(result.mixture, attribute), given[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("n_components", 0, "n_components is 0; expected an integer >= 1"),
        ("n_components", 2.5, "n_components is 2.5"),
        ("tol", -1.0, "tol is -1.0; expected a finite number >= 0"),
        ("tol", np.nan, "tol is nan"),
        ("reg_covar", -1e-6, "reg_covar"),
        ("reg_covar", "big", "reg_covar .* is 'big'"),
        ("max_iter", -1, "max_iter is -1"),
        ("n_init", 0, "n_init is 0"),
        ("init_params", "magic", "init_params is 'magic'; expected one of kmeans, k-means"),
        ("covariance_type", "round", "covariance_type is 'round'; expected one of full, tied, diag, spherical"),
        ("on_degenerate", "ignore", "on_degenerate is 'ignore'; expected one of regularize, reseed, error"),
        ("algorithm", "fast", "algorithm is 'fast'; expected one of auto, packed, direct"),
        ("backend", "gpu", "backend is 'gpu'; expected one of auto, reference"),
        ("n_threads", 0, "n_threads is 0; expected an integer >= 1"),
        ("random_state", "seed", "random_state is 'seed'"),
        ("random_state", -1, "random_state is -1"),
        ("callback", 3, "callback is 3"),
        ("weights_init", [0.5, 0.6], "weights have minimum 0.5 and sum 1.1"),
        ("weights_init", [1.0], r"weights_init has shape \(1,\); expected \(2,\)"),
        ("means_init", [[0.0, 1.0]], r"means_init has shape \(1, 2\); expected \(2, 2\)"),
        ("means_init", [[0.0, np.nan]] * 2, "means_init contains NaN"),
        ("precisions_init", -np.tile(np.eye(2), (2, 1, 1)), "precisions_init is not positive definite"),
        ("precisions_init", np.eye(2), r"precisions_init has shape \(2, 2\); expected \(2, 2, 2\)"),
    ],
)
def test_bad_arguments_say_what_is_wanted(argument: str, value: object, message: str) -> None:
    arguments = {"n_components": 2, argument: value}
    with pytest.raises(ValueError, match=message):
        emalgam.fit(FAITHFUL, **arguments)


# ---- initialization


def test_draws_follow_the_masses() -> None:
    """χ² over 8 cells, false alarm 1 in 10⁶ (fixed seed: it either passes or the code is wrong)."""
    mass = np.repeat([0.0, 1.0, 3.0, 0.0, 2.0, 0.5, 4.0, 0.0], 1200)
    drawn = initialization.draw(mass, np.random.default_rng(0).random(20000)) // 1200
    counts = np.bincount(drawn, minlength=8)
    expected = 20000 * mass[::1200] / mass[::1200].sum()
    assert (counts[expected == 0] == 0).all()
    chi_squared = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_squared < 35.0, f"χ²(4) = {chi_squared:.1f}"


def test_draws_at_the_ends() -> None:
    mass = np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    assert initialization.draw(mass, np.array([0.0, 0.49, 0.5, np.nextafter(1, 0)])).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++"])
def test_seeds_find_well_separated_clusters(backend: str, init_params: str) -> None:
    """One seed in each of 12 far clusters, ten seeds of ten."""
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2) * 50.0
    x = centres[rng.integers(0, 12, 3000)] + rng.normal(size=(3000, 2))
    for seed in range(10):
        means = quiet_fit(x, 12, init_params=init_params, random_state=seed, max_iter=1, backend=backend).mixture.means
        nearest = np.linalg.norm(means[:, None] - centres, axis=2).argmin(axis=1)
        assert len(set(nearest)) == 12, f"random_state={seed}"


def test_kmeans_on_a_sample_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a sample: seeds, trials and Lloyd's first part look at the sample; the result is as good."""
    x, _ = blobs(6000, 3, 4)
    whole = quiet_fit(x, 4, random_state=0, n_init=5)
    monkeypatch.setattr(initialization, "FEWEST_ROWS_OF_A_SAMPLE", 1000)
    sampled = quiet_fit(x, 4, random_state=0, n_init=5)
    assert sampled.lower_bound == pytest.approx(whole.lower_bound, abs=0.01)
    weight = np.random.default_rng(0).integers(0, 3, len(x))
    assert np.isfinite(quiet_fit(x, 4, random_state=0, sample_weight=weight).lower_bound)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_initial_statistics_are_those_of_the_nearest_centre(covariance_type: str) -> None:
    """hard_statistics equals counting by hand, in the data's frame."""
    from emalgam.observations import Observations
    from emalgam.packing import Moments

    x, _ = blobs(500)
    x = x * [1.0, 100.0, 0.01]
    covariance = COVARIANCES[covariance_type]
    data = Observations.of(x, None, covariance, "reference")
    frame = initialization.metric_frame(data, covariance)
    points = frame.apply(x[:4])
    statistics = initialization.hard_statistics(data, covariance, frame, points)
    moments = Moments.of(statistics, np.zeros((4, 3)))
    nearest = np.linalg.norm(frame.apply(x)[:, None] - points, axis=2).argmin(axis=1)
    np.testing.assert_allclose(moments.mass, np.bincount(nearest, minlength=4))
    z = data.frame.apply(x)
    np.testing.assert_allclose(moments.means(), [z[nearest == k].mean(axis=0) for k in range(4)], atol=1e-12)
    expected = np.stack([np.cov(z[nearest == k].T, bias=True) for k in range(4)])
    estimate = covariance.matrices(covariance.estimate(moments, "packed", data.scatter), 4, 3)
    if covariance_type == "tied":
        expected = np.tile(np.average(expected, axis=0, weights=moments.mass), (4, 1, 1))
    elif covariance_type != "full":
        expected = expected * np.eye(3)
    if covariance_type == "spherical":
        expected = np.trace(expected, axis1=1, axis2=2)[:, None, None] / 3 * np.eye(3)
    np.testing.assert_allclose(estimate, expected, atol=1e-12)


def test_blas_limit_is_lifted_by_the_last_of_overlapping_fits() -> None:
    """Two fits that overlap in threads leave BLAS as it was."""
    from emalgam.blas import _libraries, one_blas_thread

    def threads() -> list[int]:
        return [library.num_threads for library in _libraries()]

    before = threads()
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    assert set(threads()) == {1}
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before


INTERRUPTED_LIMITS = """
import threadpoolctl
import numpy
from emalgam.blas import one_blas_thread
from tests.interrupts import interrupt_at_random

def threads():
    return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]

def limited():
    for _ in range(100):
        with one_blas_thread():
            pass

def check():
    assert threads() == before, f"BLAS had {before} threads, and has {threads()} after an interrupt"

threadpoolctl.threadpool_limits(2, user_api="blas")
before = threads()
assert before
interrupt_at_random(limited, 1000, check)
with one_blas_thread():
    assert set(threads()) == {1}
check()
print("done")
"""


def test_blas_limit_is_lifted_after_an_interrupt_at_any_moment() -> None:
    assert output_of(INTERRUPTED_LIMITS, folder=Path(__file__).parents[1]) == "done"


# ---- components that collapse


def duplicates(dtype: str) -> np.ndarray:
    return np.repeat(np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 2.0]]), 10, axis=0).astype(dtype)


def test_duplicates_fit_and_effective_components_counts(variant: Variant) -> None:
    """More components than distinct points."""
    result = emalgam.fit(
        duplicates(variant.dtype), 5, covariance_type=variant.covariance_type, random_state=0, backend=variant.backend
    )
    assert result.effective_components == 3
    assert np.isfinite(result.lower_bound)
    assert set(result.mixture.predict(duplicates(variant.dtype))[::10]) <= set(range(5))
    assert len(set(result.mixture.predict(duplicates(variant.dtype))[::10])) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_collapse_under_error_names_the_component(backend: str, covariance_type: str, dtype: str) -> None:
    """A far point, ten times: the component that takes it has no spread left."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(200, 2)), np.full((10, 2), 50.0)]).astype(dtype)
    given = {"means_init": [[0.0, 0.0], [50.0, 50.0]], "weights_init": [0.9, 0.1]}
    with pytest.raises(emalgam.DegenerateComponentError, match="component 1 collapsed in iteration") as caught:
        emalgam.fit(
            x, 2, covariance_type=covariance_type, on_degenerate="error", random_state=0, backend=backend, **given
        )
    assert caught.value.component == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_reseeding_gives_the_component_other_work(backend: str, dtype: str) -> None:
    """A component stuck on four equal points is started again and finds the second cluster instead."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(300, 2)), rng.normal(8, 1, (300, 2)), np.full((4, 2), 30.0)]).astype(dtype)
    given = {
        "means_init": [[4.0, 4.0], [30.0, 30.0]],
        "weights_init": [0.99, 0.01],
        "precisions_init": [np.eye(2) / 20, np.eye(2) * 1e8],
    }
    stuck = quiet_fit(x, 2, random_state=1, backend=backend, on_degenerate="regularize", **given)
    moved = quiet_fit(x, 2, random_state=1, backend=backend, on_degenerate="reseed", **given)
    assert stuck.mixture.weights.min() < 0.01
    assert moved.mixture.weights.min() > 0.2


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_a_reseeded_fit_returns_what_it_reports(covariance_type: str) -> None:
    """The bound is that of the returned mixture (one M-step on), never of one whose component was then thrown away."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(100, 2)), np.full((20, 2), 9.0), np.full((20, 2), -9.0)])
    for seed in range(20):
        result = quiet_fit(x, 4, covariance_type=covariance_type, on_degenerate="reseed", random_state=seed)
        assert result.mixture.log_prob(x).mean() >= result.lower_bound - 1e-6, f"random_state={seed}"


def test_indefinite_covariances_are_lifted(backend: str) -> None:
    """reg_covar=0 on a plane in three dimensions: singular covariances get the floor instead of an error."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3))
    x[:, 2] = x[:, 0] - 2 * x[:, 1]
    for covariance_type in ("full", "tied"):
        result = quiet_fit(x, 2, covariance_type=covariance_type, reg_covar=0.0, random_state=0, backend=backend)
        assert np.isfinite(result.lower_bound)
        with pytest.raises(emalgam.DegenerateComponentError, match="collapsed in iteration"):
            emalgam.fit(
                x,
                2,
                covariance_type=covariance_type,
                reg_covar=0.0,
                random_state=0,
                backend=backend,
                on_degenerate="error",
                algorithm="direct",
            )


def spoil(monkeypatch: pytest.MonkeyPatch, calls_to_spoil: set[int]) -> None:
    """Make the statistics of some passes NaN, as an overflow inside a fit would."""
    from emalgam.observations import Observations

    genuine, counter = Observations.statistics, itertools.count()

    def statistics(self: Observations, parameters: object, hard: bool = False) -> tuple[np.ndarray, float]:
        out, bound = genuine(self, parameters, hard)
        return (out * np.nan, np.nan) if next(counter) in calls_to_spoil else (out, bound)

    monkeypatch.setattr(Observations, "statistics", statistics)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_restart_loses(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str) -> None:
    """A restart that meets NaN never wins; when all do, the error says why."""
    x, centres = blobs(300)
    x = x.astype(dtype)
    given = start(centres, "full")
    clean = quiet_fit(x, 4, max_iter=3, tol=0.0, backend=backend, **given)
    spoil(monkeypatch, {1})
    survivor = quiet_fit(x, 4, n_init=2, max_iter=3, tol=0.0, backend=backend, **given)
    assert survivor.lower_bounds == clean.lower_bounds
    spoil(monkeypatch, set(range(100)))
    with pytest.raises(emalgam.NumericalError, match=r"no restart gave a finite likelihood; restart 0: .* nan"):
        emalgam.fit(x, 4, n_init=2, backend=backend, **given)


def test_effective_components_ignores_empty_and_equal_ones() -> None:
    from emalgam.packing import Components

    means = np.array([[0.0], [0.0], [1.0], [2.0]])
    components = Components(np.array([0.5, 0.3, 0.2, 0.0]), means, np.ones(4), np.ones(4))
    assert effective_components(components, COVARIANCES["spherical"]) == 2
