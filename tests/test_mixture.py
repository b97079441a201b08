"""Mixture: its checks, its accuracy wherever the data lie, and the guard that sees to it."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from emalgam import GaussianMixture, Mixture
from emalgam import mixture as mixtures
from emalgam.covariance import COVARIANCES, invert_triangular
from emalgam.guard import TOLERANCE, Cancellation, Evaluation, choose_evaluation
from emalgam.packing import Components, Frame, power_of_two
from tests import oracles
from tests.conftest import COVARIANCE_TYPES, Variant
from tests.tolerances import STANDARD_ERRORS, tolerance


def make(covariance_type: str, D: int, separation: float, condition: float, offset: float, seed: int = 0) -> Mixture:
    """Three components `separation` apart, covariances of a condition number, all shifted by `offset`."""
    rng = np.random.default_rng(seed)
    K = 3

    def covariance() -> np.ndarray:
        q = np.linalg.qr(rng.normal(size=(D, D)))[0]
        matrix = q * condition ** -np.linspace(0, 1, D) @ q.T
        return np.asarray((matrix + matrix.T) / 2)

    full = np.stack([covariance() for _ in range(K)])
    covariances = {
        "full": full,
        "tied": full[0],
        "diag": condition ** -rng.uniform(0, 1, (K, D)),
        "spherical": condition ** -rng.uniform(0, 1, K),
    }[covariance_type]
    means = rng.normal(size=(K, D)) * separation / np.sqrt(2 * D) + offset
    return Mixture(rng.dirichlet(np.full(K, 5.0)), means, covariances, covariance_type)


def oracle(mixture: Mixture) -> oracles.Gaussians:
    return oracles.Gaussians(mixture.weights, mixture.means, mixture.covariances, mixture.covariance_type)


@pytest.mark.parametrize("D", [2, 7])
@pytest.mark.parametrize("separation", [3.0, 300.0])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("far", [False, True])
def test_auto_keeps_the_tolerance(variant: Variant, D: int, separation: float, condition: float, far: bool) -> None:
    """1e-9 nats in float64 and 1e-3 in float32, offsets of 1e8 and 1e4 included, against long double."""
    offset = {"float64": 1e8, "float32": 1e4}[variant.dtype] if far else 0.0
    mixture = make(variant.covariance_type, D, separation, condition, offset)
    x = mixture.sample(200, random_state=1)[0].astype(variant.dtype)
    exact = oracles.log_prob(x, oracle(mixture))
    near = exact > -1e4  # rounding x to float32 at 1e4 can carry it far away: relative accuracy is asked there
    error = np.abs(mixture.log_prob(x, backend=variant.backend) - exact)
    assert error[near].max(initial=0) <= TOLERANCE[variant.dtype]
    assert (error[~near] / np.abs(exact[~near])).max(initial=0) <= 1e-6
    r = mixture.responsibilities(x, backend=variant.backend)
    assert np.abs(r - oracles.responsibilities(x, oracle(mixture)))[near].max(initial=0) <= TOLERANCE[variant.dtype]


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_against_mpmath(covariance_type: str) -> None:
    """Twenty rows at 60 digits: the long double oracle itself has no say here."""
    mixture = make(covariance_type, 3, 10.0, 1e4, 1e8)
    x = mixture.sample(20, random_state=0)[0]
    errors = oracles.absolute_errors(mixture.log_prob(x), oracles.exact_log_prob(x, oracle(mixture)))
    assert errors.max() <= TOLERANCE["float64"]


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("distance", [1e8, 1e10, 1e12, 1e16, 1e200])
def test_distance_of_other_components_costs_no_digits(
    variant: Variant, distance: float, offset: float, algorithm: str
) -> None:
    """Rows near a component are as accurate as if it were alone, wherever the others and the origin are."""
    first = np.array([0.25, -0.5]) + offset
    means = np.stack([first, first + distance, first - [distance, 0.0]])
    covariances = {
        "full": np.array([[[2.0, 0.9], [0.9, 1.0]]] * 3),
        "tied": np.array([[2.0, 0.9], [0.9, 1.0]]),
        "diag": np.array([[2.0, 1.0]] * 3),
        "spherical": np.array([2.0, 1.0, 0.5]),
    }[variant.covariance_type]
    mixture = Mixture([0.5, 0.25, 0.25], means, covariances, variant.covariance_type)
    x = (np.array([[0.3, -0.7], [-1.7, 0.0], [2.12, 1.0]]) + offset).astype(variant.dtype)
    exact = oracles.exact_log_prob(x, oracle(mixture))
    found = mixture.log_prob(x, backend=variant.backend, algorithm=algorithm)
    scale = 1 + np.abs(found) + 2 * np.log(distance)
    errors = oracles.absolute_errors(found, exact) / scale
    assert errors.max() <= tolerance("log_prob far from others", "float64")
    r = mixture.responsibilities(x, backend=variant.backend, algorithm=algorithm)
    if variant.dtype == "float64" or offset == 0:  # in float32 rows cannot be near a component at 1e8
        np.testing.assert_allclose(r, [[1.0, 0.0, 0.0]] * 3, atol=1e-15)


def test_rows_whose_squares_overflow_between_distant_components(backend: str) -> None:
    """1e155 standard deviations from the nearest component, 1e200 from the other."""
    mixture = Mixture([0.5, 0.5], [[0.0], [1e200]], [1.0, 1.0], "spherical")
    x = np.array([[1e150], [1e153], [1e155], [0.4e200], [0.6e200], [1e200]])
    log_prob = mixture.log_prob(x, backend=backend)
    np.testing.assert_allclose(log_prob[:2], [-0.5e300, -0.5e306], rtol=1e-14)
    assert (log_prob[2:5] == -np.finfo(np.float64).max / 2).all()
    assert log_prob[5] == pytest.approx(-0.5 * np.log(2 * np.pi) + np.log(0.5), rel=1e-13)
    assert mixture.predict(x, backend=backend).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_ladder(covariance_type: str) -> None:
    """float32, then float64 on the float32 tile, then direct; the bound is kept or the ladder goes on."""
    steps = []
    for separation in (3.0, 300.0, 1e5):
        mixture = make(covariance_type, 4, separation, 1.0, 0.0)
        components = mixture.components(mixture.own_frame())
        cancellation = Cancellation.of(mixture.covariance, components)
        how = choose_evaluation("auto", np.dtype(np.float32), cancellation)
        steps.append((how.algorithm, how.arithmetic))
        assert how.error_bound <= TOLERANCE[how.arithmetic]
    assert steps == [("packed", "float32"), ("packed", "float64"), ("direct", "float64")]
    how = choose_evaluation("packed", np.dtype(np.float32), cancellation)
    assert (how.algorithm, how.arithmetic) == ("packed", "float32")
    assert how.error_bound > 1
    assert choose_evaluation("direct", np.dtype(np.float32), cancellation).arithmetic == "float64"


def test_correlation_alone_climbs_the_ladder() -> None:
    """Components at the origin, condition 1e6: the distance of the means says nothing, the cancellation does."""
    mixture = make("full", 3, 0.0, 1e6, 0.0)
    cancellation = Cancellation.of(mixture.covariance, mixture.components(mixture.own_frame()))
    how = choose_evaluation("auto", np.dtype(np.float32), cancellation)
    assert how.arithmetic == "float64"


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_packed_and_direct_agree(covariance_type: str) -> None:
    mixture = make(covariance_type, 5, 5.0, 10.0, 3.0)
    x = mixture.sample(300, random_state=0)[0]
    packed, direct = (mixture.log_prob(x, algorithm=algorithm) for algorithm in ("packed", "direct"))
    np.testing.assert_allclose(packed, direct, atol=1e-11)


# ---- the algebra of the covariance types


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_factors_undo_each_other(covariance_type: str) -> None:
    mixture, covariance = make(covariance_type, 4, 3.0, 100.0, 0.0), COVARIANCES[covariance_type]
    K, D = mixture.means.shape
    factor = covariance.factor(mixture.covariances)
    matrices = covariance.matrices(mixture.covariances, K, D)
    precisions = covariance.matrices(covariance.multiply(factor), K, D)
    np.testing.assert_allclose(matrices @ precisions, np.tile(np.eye(D), (K, 1, 1)), atol=1e-10)
    np.testing.assert_allclose(covariance.covariances(factor), mixture.covariances, rtol=1e-10)
    np.testing.assert_allclose(covariance.factor_precisions(covariance.multiply(factor)), factor, atol=1e-10)
    log_det = np.broadcast_to(-0.5 * np.linalg.slogdet(matrices)[1], (K,))
    np.testing.assert_allclose(covariance.log_det(factor, K, D), log_det, atol=1e-10)
    assert mixture.covariances.shape == covariance.shape(K, D)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_rescaling_is_that_of_the_data(covariance_type: str) -> None:
    """The covariance of x · s, and its factor, from those of x; back again without a rounding error."""
    mixture, covariance = make(covariance_type, 3, 3.0, 10.0, 0.0), COVARIANCES[covariance_type]
    scale = np.array([4.0, 4.0, 4.0]) if covariance.isotropic_frame else np.array([0.5, 2.0, 1024.0])
    scaled = covariance.rescale(mixture.covariances, scale)
    np.testing.assert_allclose(
        covariance.factor(scaled), covariance.rescale_factor(mixture.precisions_cholesky, scale), rtol=1e-10
    )
    np.testing.assert_array_equal(covariance.rescale(scaled, 1 / scale), mixture.covariances)


def test_triangular_inverse_of_ill_conditioned_factors() -> None:
    lower = np.tril(np.random.default_rng(0).normal(size=(3, 6, 6))) + 3 * np.eye(6)
    lower[:, 3, 3] = 1e-12
    product = lower @ invert_triangular(lower)
    np.testing.assert_allclose(product, np.tile(np.eye(6), (3, 1, 1)), atol=1e-3)


def test_powers_of_two() -> None:
    spread = np.array([1.0, 3.0, 1e-300, 5e-324, 1e308, 0.0])
    scale = power_of_two(spread)
    assert (np.frexp(scale)[0] == 0.5).all()
    assert ((spread * scale)[:3] >= 0.5).all()
    assert (spread * scale <= 8).all(), "the largest and smallest numbers stay within what a scale can be"
    assert scale[-1] == 1.0


def test_frame_inverts() -> None:
    frame = Frame(np.array([1e8, -3.0]), np.array([0.25, 1024.0]))
    x = np.array([[1e8 + 3, 5.0]])
    np.testing.assert_array_equal(frame.undo(frame.apply(x)), x)


def test_cancellation_ignores_components_without_weight() -> None:
    means, ones = np.array([[0.0], [1e9]]), np.ones(2)
    components = Components(np.array([1.0, 0.0]), means, ones, ones)
    covariance = COVARIANCES["spherical"]
    assert covariance.cancellation(components) < 10
    assert covariance.cancellation(dataclasses.replace(components, weights=np.array([0.5, 0.5]))) > 1e17


# ---- the value


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_sizes(covariance_type: str) -> None:
    mixture = make(covariance_type, 4, 3.0, 10.0, 0.0)
    assert (mixture.n_components, mixture.n_features) == (3, 4)
    free = {"full": 30, "tied": 10, "diag": 12, "spherical": 3}[covariance_type]
    assert mixture.n_parameters == free + 12 + 2
    x = mixture.sample(50, random_state=0)[0]
    log_likelihood = mixture.log_prob(x).sum()
    assert mixture.aic(x) == pytest.approx(-2 * log_likelihood + 2 * mixture.n_parameters)
    assert mixture.bic(x) == pytest.approx(-2 * log_likelihood + np.log(50) * mixture.n_parameters)


def test_frozen() -> None:
    mixture = make("full", 2, 3.0, 10.0, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixture.weights = np.ones(3)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        mixture.means[0, 0] = 3.0


GOOD = {"weights": [0.5, 0.5], "means": [[0.0, 0.0], [1.0, 1.0]], "covariances": [np.eye(2), np.eye(2)]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [0.5, 0.6]}, "weights have minimum 0.5 and sum 1.1"),
        ({"weights": [1.5, -0.5]}, r"weights have minimum -0\.5 at \[1\] and sum 1;"),
        ({"weights": [1.0]}, r"weights has shape \(1,\); expected \(2,\)"),
        ({"weights": [np.nan, 1.0]}, r"weights contains NaN at \[0\]; expected finite numbers"),
        ({"weights": ["a", "b"]}, "weights has dtype <U1"),
        ({"means": [0.0, 1.0]}, r"means has shape \(2,\)"),
        ({"means": [[0.0, np.inf], [0.0, 0.0]]}, r"means contains inf at \[0, 1\]"),
        ({"covariances": np.eye(2)}, r"covariances has shape \(2, 2\); expected \(2, 2, 2\)"),
        (
            {"covariances": [np.eye(2), [[1.0, 2.0], [2.0, 1.0]]]},
            "component 1 are not positive definite .*eigenvalue -1",
        ),
        (
            {"covariances": [np.eye(2) * 1e-30, [[1.0, 1.0], [1.0, 1.0]]]},  # the smaller one is the sound one
            "component 1 are not positive definite",
        ),
        ({"covariances": [np.eye(2), [[1.0, 0.2], [0.0, 1.0]]]}, r"covariances at \[1\] are not symmetric"),
        ({"covariance_type": "tied", "covariances": -np.eye(2)}, "covariances is not positive definite"),
        ({"covariance_type": "diag", "covariances": [[1.0, 0.0], [1.0, 1.0]]}, "component 0 are not positive definite"),
        ({"covariance_type": "spherical", "covariances": [1.0, -1.0]}, "component 1 are not positive .*eigenvalue -1"),
        ({"covariance_type": "banana"}, "covariance_type is 'banana'; expected one of full, tied"),
    ],
)
def test_bad_parameters_name_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**{**GOOD, **changes})


def test_sample_checks_its_arguments() -> None:
    mixture = Mixture(**GOOD)
    for n_samples in (0, -3):
        for sampled in (mixture, GaussianMixture.from_parameters(*GOOD.values())):
            with pytest.raises(ValueError, match=f"n_samples is {n_samples}; expected an integer >= 1"):
                sampled.sample(n_samples)
    for state in (3, np.random.default_rng(3), np.random.RandomState(3), np.random, None):
        assert mixture.sample(4, state)[0].shape == (4, 2)


def test_antithetic_draws_mirror_each_other() -> None:
    mixture = Mixture([0.3, 0.7], [[0.0, 1.0], [9.0, 2.0]], [[1.0, 2.0], [3.0, 0.5]], "diag")
    x, labels = mixture.sample(1000, 3, draw="antithetic")
    np.testing.assert_array_equal(labels[::2], labels[1::2])
    np.testing.assert_allclose(x[::2] + x[1::2], 2 * mixture.means[labels[::2]], atol=1e-12)
    assert len(np.unique(x[:, 0])) == 1000


def test_stratified_draws_have_their_share_of_each_component() -> None:
    mixture = Mixture([0.123, 0.877], [[0.0], [9.0]], [1.0, 3.0], "spherical")
    _, labels = mixture.sample(1000, 3, draw="stratified")
    assert abs(np.count_nonzero(labels == 0) - 123) <= 1
    with pytest.raises(ValueError, match="draw is 'latin'; expected one of plain, antithetic, stratified"):
        mixture.sample(10, draw="latin")


@pytest.mark.parametrize(("distance", "helps"), [(3.0, False), (0.3, True)])
def test_how_accurate_means_of_each_draw_are(distance: float, helps: bool) -> None:
    """The variance of the mean of N rows, over seeds, is B / N + W / N: of components, and within them.

    Of x itself stratified labels leave W / N. Antithetic pairs leave 2 B / N: half as many labels, deviations that
    cancel. Of squared deviations, which are equal within a pair, they leave 2 W / N.
    """
    N, seeds, within = 100, 1000, 1.0
    mixture = Mixture([0.5, 0.5], [[-distance], [distance]], [within, within], "spherical")
    variance = {}
    for draw in ("plain", "stratified", "antithetic"):
        rows = [mixture.sample(N, seed, draw=draw, n_threads=1) for seed in range(seeds)]
        x, labels = np.stack([x[:, 0] for x, _ in rows]), np.stack([k for _, k in rows])
        variance[draw] = x.mean(axis=1).var()
        variance[f"{draw}, squares"] = ((x - mixture.means[labels, 0]) ** 2).mean(axis=1).var()
    between, square = distance**2, 2.0 * within**2
    expected = {
        "plain": between + within,
        "stratified": within,
        "antithetic": 2.0 * between,
        "plain, squares": square,
        "stratified, squares": square,
        "antithetic, squares": 2.0 * square,
    }
    # The sample variance of means that are nearly normal has a relative standard error of √(2 / seeds).
    tolerance = STANDARD_ERRORS * (2.0 / seeds) ** 0.5
    assert variance == pytest.approx({name: value / N for name, value in expected.items()}, rel=tolerance)
    assert (variance["antithetic"] < variance["plain"]) == helps


def test_what_depends_on_the_parameters_alone_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with one row would mostly compute it; a pickled mixture does not take it along."""
    chosen: list[tuple[str, str]] = []

    def choose(algorithm: str, dtype: np.dtype, cancellation: Cancellation) -> Evaluation:
        chosen.append((algorithm, str(dtype)))
        return choose_evaluation(algorithm, dtype, cancellation)

    monkeypatch.setattr(mixtures, "choose_evaluation", choose)
    x = np.random.default_rng(0).normal(size=(5, 2))
    ways = [("auto", "float64"), ("direct", "float64"), ("auto", "float32")]
    expected = [
        make("full", 2, 1.0, 1.0, 0.0).log_prob(x.astype(dtype), algorithm=algorithm) for algorithm, dtype in ways
    ]
    chosen.clear()
    mixture = make("full", 2, 1.0, 1.0, 0.0)
    size = len(pickle.dumps(mixture))
    for (algorithm, dtype), log_prob in zip(ways, expected, strict=True):
        for _ in range(3):
            np.testing.assert_array_equal(mixture.log_prob(x.astype(dtype), algorithm=algorithm), log_prob)
    mixture.predict(x.astype(np.float32))
    assert chosen == ways
    assert len(pickle.dumps(mixture)) == size
    with pytest.raises(ValueError, match="algorithm is 'x'"):
        mixture.log_prob(x, algorithm="x")
