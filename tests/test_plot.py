"""Pictures: the artists that are drawn, in which colours, and where."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.patches import Ellipse

import emalgam
from emalgam import plot
from emalgam.mixture import Mixture

matplotlib.use("Agg")

MEANS = np.array([[0.0, 0.0, 5.0], [6.0, 1.0, -5.0]])
FULL = np.array([[[4.0, 1.5, 0.3], [1.5, 1.0, 0.1], [0.3, 0.1, 2.0]], np.diag([1.0, 9.0, 0.25])])
COVARIANCES = {
    "full": FULL,
    "tied": FULL[0],
    "diag": np.array([[4.0, 1.0, 2.0], [1.0, 9.0, 0.25]]),
    "spherical": np.array([1.0, 4.0]),
}


def mixture_of(covariance_type: str) -> Mixture:
    return Mixture(np.array([0.25, 0.75]), MEANS, COVARIANCES[covariance_type], covariance_type)


def matrix_of(covariance_type: str, k: int) -> np.ndarray:
    shaped = COVARIANCES[covariance_type]
    if covariance_type == "tied":
        return shaped
    return {"full": shaped[k], "diag": np.diag(np.atleast_1d(shaped[k])), "spherical": np.eye(3) * shaped[k]}[
        covariance_type
    ]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return mixture_of("full").sample(2000, 0)[0]


@pytest.mark.parametrize("covariance_type", COVARIANCES)
@pytest.mark.parametrize("features", [(0, 1), (2, 0)])
def test_ellipses_lie_at_their_mahalanobis_distance(covariance_type: str, features: tuple[int, int]) -> None:
    ax = plot.ellipses(mixture_of(covariance_type), features=features, n_std=(1, 2.5))
    patches = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    assert len(patches) == 4
    for patch, (k, distance) in zip(patches, [(0, 2.5), (0, 1), (1, 2.5), (1, 1)], strict=True):
        covariance = matrix_of(covariance_type, k)[np.ix_(features, features)]
        outline = patch.get_patch_transform().transform(patch.get_path().vertices[:-1])
        # vertices between the ends of Bézier curves are control points, which lie outside
        outline = outline[::3] - MEANS[k][list(features)]
        squares = np.einsum("ni,ij,nj->n", outline, np.linalg.inv(covariance), outline)
        np.testing.assert_allclose(np.sqrt(squares), distance, rtol=1e-6)


def test_ellipses_are_labelled_and_coloured() -> None:
    ax = plot.ellipses(mixture_of("full"), n_std=(1,))
    assert [text.get_text() for text in ax.texts] == ["0", "1"]
    assert [text.get_position() for text in ax.texts] == [(0, 0), (6, 1)]
    assert [to_hex(patch.get_edgecolor()) for patch in ax.patches] == [c.lower() for c in plot.OKABE_ITO[:2]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("feature 0", "feature 1")
    ax = plot.ellipses(mixture_of("full"), n_std=(1,), colors=["red", "blue"], labels=False)
    assert [patch.get_edgecolor() for patch in ax.patches] == [to_rgba("red"), to_rgba("blue")]
    assert list(ax.texts) == []


def test_everything_drawn_is_in_view() -> None:
    ax = plot.ellipses(mixture_of("diag"), n_std=(3,))
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert left <= -6
    assert right >= 9
    assert bottom <= -8
    assert top >= 10


def test_an_axes_and_its_labels_are_kept() -> None:
    figure, (_, ax) = pyplot.subplots(1, 2)
    ax.set(xlabel="length", ylabel="width")
    assert plot.ellipses(mixture_of("full"), ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("length", "width")
    assert plot.likelihood_trace([1.0, 2.0], figure.axes[0]) is figure.axes[0]
    assert pyplot.get_fignums() == [1]


def test_points_have_the_mixed_colours_of_their_components(x: np.ndarray) -> None:
    mixture = mixture_of("full")
    ax = plot.responsibilities(x, mixture, features=(0, 2), max_points=2000)
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), x[:, [0, 2]])
    pure = np.array([to_rgb(color) for color in plot.OKABE_ITO[:2]])
    expected = mixture.responsibilities(x) @ pure
    np.testing.assert_allclose(points.get_facecolors()[:, :3], expected, atol=1e-12)
    assert ax.get_title() == ""
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("feature 0", "feature 2")


def test_a_subsample_is_stated_and_always_the_same(x: np.ndarray) -> None:
    first, second = (plot.responsibilities(x, mixture_of("full"), max_points=150) for _ in range(2))
    offsets = first.collections[0].get_offsets()
    assert len(offsets) == 150
    assert {tuple(row) for row in offsets.tolist()} <= {tuple(row) for row in x[:, :2].tolist()}
    np.testing.assert_array_equal(offsets, second.collections[0].get_offsets())
    assert first.get_title() == "150 of 2\N{NO-BREAK SPACE}000 points"


def test_the_trace_is_the_lower_bounds(x: np.ndarray) -> None:
    fitted = emalgam.fit(x, 2, random_state=0, init_params="random", tol=1e-6)
    for trace in (fitted, fitted.lower_bounds):
        ax = plot.likelihood_trace(trace)
        (line,) = ax.lines
        assert line.get_xdata().tolist() == list(range(1, fitted.n_iter + 1))
        assert line.get_ydata().tolist() == fitted.lower_bounds
        assert ax.get_xlabel() == "iteration"
        assert ax.get_ylabel() == "log-likelihood (nats per sample)"
        final = f"{fitted.lower_bound:.6g} at the end".replace("-", "\N{MINUS SIGN}")
        assert [text.get_text() for text in ax.texts] == [final]


def test_the_trace_of_an_estimator(x: np.ndarray) -> None:
    estimator = emalgam.GaussianMixture(2, random_state=0).fit(x)
    (line,) = plot.likelihood_trace(estimator).lines
    assert line.get_ydata().tolist() == list(estimator.lower_bounds_)


def test_bic_marks_the_lowest(x: np.ndarray) -> None:
    ax, values = plot.bic_curve(x, [4, 1, 2], random_state=0, tol=1e-5, max_iter=1000, backend="reference")
    expected = [
        emalgam.fit(x, K, random_state=0, tol=1e-5, max_iter=1000, backend="reference").mixture.bic(x)
        for K in (4, 1, 2)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    curve, mark = ax.lines
    assert curve.get_xdata().tolist() == [1, 2, 4]
    assert curve.get_ydata().tolist() == [values[1], values[2], values[0]]
    assert mark.get_xdata()[0] == 2
    assert [text.get_text() for text in ax.texts] == ["lowest at K = 2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of components K", "BIC (nats)")


def test_ticks_are_whole_numbers(x: np.ndarray) -> None:
    for ax in (plot.likelihood_trace([1.0, 2.0, 3.0]), plot.bic_curve(x, [1, 2], random_state=0)[0]):
        ticks = ax.get_xticks()
        np.testing.assert_array_equal(ticks, np.round(ticks))


def test_the_likelihood_of_a_coin() -> None:
    """HHHTT: the curve is 0 at both ends and 0.03456 at 0.6, where the mark is; the logarithm leaves the ends out."""
    theta = np.linspace(0, 1, 101)[::-1]
    with np.errstate(divide="ignore"):
        log_likelihood = 3 * np.log(theta) + 2 * np.log1p(-theta)
    ax = plot.likelihood_curve(theta, log_likelihood)
    curve, mark = ax.lines
    np.testing.assert_allclose(curve.get_xdata(), theta[::-1])
    np.testing.assert_allclose(curve.get_ydata(), (theta**3 * (1 - theta) ** 2)[::-1], atol=1e-15)
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == pytest.approx((0.6, 0.03456))
    assert [text.get_text() for text in ax.texts] == ["largest, 0.03456, at θ = 0.6"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("θ", "likelihood")
    ax = plot.likelihood_curve(theta, log_likelihood - 1000, log=True, name="heads")
    drawn = ax.lines[0].get_ydata()
    assert np.isnan(drawn[[0, -1]]).all()
    np.testing.assert_allclose(drawn[1:-1], log_likelihood[::-1][1:-1] - 1000)
    assert [text.get_text() for text in ax.texts] == ["largest, \N{MINUS SIGN}1003, at heads = 0.6"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("heads", "log-likelihood (nats)")


@pytest.mark.parametrize(("best", "side"), [(0.0, "left"), (0.5, "center"), (1.0, "right")])
def test_the_label_of_the_largest_likelihood_stays_in_the_picture(best: float, side: str) -> None:
    theta = np.linspace(0, 1, 11)
    (text,) = plot.likelihood_curve(theta, -((theta - best) ** 2)).texts
    assert text.get_horizontalalignment() == side
    assert plot.likelihood_curve([0.3], [0.0]).texts[0].get_text() == "largest, 1, at θ = 0.3"


@pytest.mark.parametrize("n_components", [1, 7, 8, 40])
def test_colours_differ(n_components: int) -> None:
    colors = plot.component_colors(n_components)
    assert len({to_hex(color) for color in colors}) == len(colors) == n_components


def test_bad_arguments_say_what_is_expected(x: np.ndarray) -> None:
    mixture = mixture_of("full")
    with pytest.raises(ValueError, match=r"features is \(0, 3\)"):
        plot.ellipses(mixture, features=(0, 3))
    with pytest.raises(ValueError, match=r"features is \(0, 1, 2\); expected two of the 3 features"):
        plot.ellipses(mixture, features=(0, 1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features is \(1, 1\)"):
        plot.responsibilities(x, mixture, features=(1, 1))
    with pytest.raises(ValueError, match=r"n_std is \(0,\); expected positive distances"):
        plot.ellipses(mixture, n_std=(0,))
    with pytest.raises(ValueError, match="colors has 1 entries; expected 2, one for each component"):
        plot.ellipses(mixture, colors=["red"])
    with pytest.raises(ValueError, match="colors has 3 entries; expected 2, one for each component"):
        plot.responsibilities(x, mixture, colors=["red", "blue", "green"])
    with pytest.raises(ValueError, match="max_points is 0; expected at least 1"):
        plot.responsibilities(x, mixture, max_points=0)
    with pytest.raises(ValueError, match=r"the trace has shape \(0,\)"):
        plot.likelihood_trace([])
    with pytest.raises(ValueError, match=r"theta has shape \(2,\) and log_likelihood \(3,\); expected the same"):
        plot.likelihood_curve([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match=r"theta has shape \(0,\)"):
        plot.likelihood_curve([], [])
    with pytest.raises(ValueError, match="contains NaN or inf"):
        plot.likelihood_curve([0, np.nan], [0, 1])
    with pytest.raises(ValueError, match="contains NaN or inf"):
        plot.likelihood_curve([0, 1], [0, np.inf])
    with pytest.raises(ValueError, match="−inf everywhere: the data cannot happen"):
        plot.likelihood_curve([0, 1], [-np.inf, -np.inf])
    with pytest.raises(ValueError, match=r"cannot hold the likelihood exp\(-1000\); draw the logarithm: log=True"):
        plot.likelihood_curve([0, 1], [-2000, -1000])
    with pytest.raises(ValueError, match=r"cannot hold the likelihood exp\(1000\)"):
        plot.likelihood_curve([0, 1], [0, 1000])
    with pytest.raises(ValueError, match="n_components_range is empty"):
        plot.bic_curve(x, [])
    with pytest.raises(ValueError, match="BIC counts samples and has no place for sample_weight"):
        plot.bic_curve(x, [1], sample_weight=np.ones(len(x)))
    with pytest.raises(ValueError, match="x contains NaN"):
        plot.responsibilities(np.full((3, 3), np.nan), mixture)
    assert pyplot.get_fignums() == []  # nothing was begun


def test_without_matplotlib_the_error_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from emalgam import plot\n"
        "try: plot.likelihood_trace([1.0])\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("emalgam.plot needs matplotlib")
    assert 'pip install "emalgam[plot]"' in done.stdout


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, emalgam.plot; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
