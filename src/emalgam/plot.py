"""Pictures of mixtures, fits and likelihoods, with matplotlib.

Every function draws into `ax`, or into a new figure, and returns the Axes. Components have the colours of Okabe and
Ito, which people with any kind of colour vision can tell apart, and their number as a label; beyond seven, colours are
steps of the colour map viridis and the label is what tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from emalgam.validation import check_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from emalgam.mixture import Mixture

OKABE_ITO: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
INK: Final = "#333333"

__all__ = ["bic_curve", "component_colors", "ellipses", "likelihood_curve", "likelihood_trace", "responsibilities"]


def ellipses(
    mixture: Mixture,
    ax: Axes | None = None,
    *,
    features: tuple[int, int] = (0, 1),
    n_std: Sequence[float] = (1, 2),
    colors: Sequence[Any] | None = None,
    labels: bool = True,
) -> Axes:
    """Each component as ellipses of constant Mahalanobis distance from its mean.

    Parameters
    ----------
    mixture : Mixture
        K components of at least two features.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    features : (int, int)
        The features on the horizontal and the vertical axis; the others are integrated out.
    n_std : sequence of float
        The distances, in standard deviations. In two dimensions 1 holds 39 % of a component, 2 hold 86 %.
    colors : K matplotlib colours, optional
        `component_colors` by default.
    labels : bool
        Whether to write the number of each component at its mean.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If `features` are not two different features of the mixture, `n_std` is not positive, or `colors` are not K.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from emalgam import Mixture, plot
    >>> mixture = Mixture([0.5, 0.5], [[0.0, 0.0], [3.0, 1.0]], [[1.0, 0.2], [0.5, 0.5]], "diag")
    >>> len(plot.ellipses(mixture, n_std=(1, 2)).patches)
    4
    """
    pyplot = _pyplot()
    means, covariances = _two_features(mixture, features)
    colors = _colors(mixture, colors)
    if not all(distance > 0 for distance in n_std):
        raise ValueError(f"n_std is {tuple(n_std)}; expected positive distances in standard deviations")
    ax = pyplot.subplots()[1] if ax is None else ax
    _add_ellipses(ax, means, covariances, n_std, colors)
    if labels:
        _label(ax, means)
    _frame(ax, features)
    ax.autoscale_view()
    return ax


def responsibilities(
    x: Any,
    mixture: Mixture,
    ax: Axes | None = None,
    *,
    features: tuple[int, int] = (0, 1),
    max_points: int = 5000,
    colors: Sequence[Any] | None = None,
    **how: Any,
) -> Axes:
    """Points in the colour Σ_k r_nk · colour_k: pure where one component is responsible, mixed where several are.

    Parameters
    ----------
    x : (N, D) array of real numbers
        The points.
    mixture : Mixture
        K components of D features.
    ax, features, colors
        As in `ellipses`.
    max_points : int
        The most points to draw. Of more, that many are drawn at random (always the same ones), and the title says so.
    **how
        `backend`, `algorithm` and `n_threads` of `Mixture.responsibilities`.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        As in `ellipses`, or for data that `Mixture.responsibilities` refuses.
    """
    pyplot = _pyplot()
    _two_features(mixture, features)
    if max_points < 1:
        raise ValueError(f"max_points is {max_points}; expected at least 1")
    points = check_data(x, n_features=mixture.n_features)
    n_samples = len(points)
    if n_samples > max_points:
        points = points[np.sort(np.random.default_rng(0).choice(n_samples, max_points, replace=False))]
    colors = _colors(mixture, colors)
    shares = mixture.responsibilities(points, **how)
    mixed = np.clip(shares @ np.array([_rgb(color) for color in colors]), 0, 1)
    ax = pyplot.subplots()[1] if ax is None else ax
    horizontal, vertical = points[:, list(features)].T
    ax.scatter(horizontal, vertical, c=mixed, s=8, linewidths=0, alpha=0.8)
    if n_samples > max_points:
        ax.set_title(f"{max_points:,} of {n_samples:,} points".replace(",", "\N{NO-BREAK SPACE}"), fontsize="medium")
    _frame(ax, features)
    return ax


def likelihood_trace(trace: Any, ax: Axes | None = None) -> Axes:
    """The mean log-likelihood after each iteration of a fit.

    Parameters
    ----------
    trace : Fit, fitted GaussianMixture, or sequence of float
        Something with `lower_bounds` or `lower_bounds_`, or the numbers themselves, in nats per sample.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there are no numbers.
    """
    pyplot = _pyplot()
    values = np.asarray(getattr(trace, "lower_bounds", getattr(trace, "lower_bounds_", trace)), np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"the trace has shape {values.shape}; expected one number for each iteration")
    ax = pyplot.subplots()[1] if ax is None else ax
    iterations = np.arange(1, len(values) + 1)
    ax.plot(iterations, values, color=OKABE_ITO[0], marker="o", markersize=3, linewidth=1.5)
    final = f"{values[-1]:.6g}".replace("-", "\N{MINUS SIGN}")
    ax.text(
        0.98, 0.04, f"{final} at the end", transform=ax.transAxes, ha="right", color=INK
    )  # a rising curve is never there
    ax.set(xlabel="iteration", ylabel="log-likelihood (nats per sample)")
    _whole_numbers(ax)
    _tidy(ax)
    return ax


def likelihood_curve(
    theta: Any, log_likelihood: Any, ax: Axes | None = None, *, log: bool = False, name: str = "θ"
) -> Axes:
    """The likelihood of the data as a function of a parameter, with its largest value marked.

    Parameters
    ----------
    theta : (M,) array of real numbers
        The grid of the parameter, in any order.
    log_likelihood : (M,) array of real numbers
        log p(data given θ) at the grid, in nats; −inf where the data cannot happen.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    log : bool
        Whether to draw the logarithm, for likelihoods that are too small for float64.
    name : str
        Of the parameter, for the labels.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the arrays are not one-dimensional and of one length, hold NaN or +inf, or nothing can be drawn: the data
        cannot happen at any θ, or float64 cannot hold their likelihood and `log` is not set.

    Examples
    --------
    Three heads and two tails, in this order:

    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import numpy as np
    >>> from emalgam import plot
    >>> from emalgam.estimation import bernoulli_log_likelihood
    >>> theta = np.linspace(0, 1, 101)
    >>> ax = plot.likelihood_curve(theta, bernoulli_log_likelihood(theta, [1, 1, 1, 0, 0]))
    >>> ax.texts[0].get_text()
    'largest, 0.03456, at θ = 0.6'
    """
    pyplot = _pyplot()
    grid, values = _curve(theta, log_likelihood, log)
    ax = pyplot.subplots()[1] if ax is None else ax
    best = int(np.nanargmax(values))
    ax.plot(grid, values, color=OKABE_ITO[0], linewidth=1.5)
    ax.plot(grid[best], values[best], "o", color=OKABE_ITO[1], markersize=7)
    text = f"largest, {values[best]:.4g}, at {name} = {grid[best]:.4g}".replace("-", "\N{MINUS SIGN}")
    highest = (float(grid[best]), float(values[best]))  # above it nothing is drawn
    along = (grid[best] - grid[0]) / max(grid[-1] - grid[0], np.finfo(np.float64).tiny)
    side = "left" if along < 0.25 else "right" if along > 0.75 else "center"  # not beyond the edge of the picture
    ax.annotate(text, highest, xytext=(0, 8), textcoords="offset points", ha=side, color=INK)
    ax.margins(y=0.12)
    ax.set(xlabel=name, ylabel="log-likelihood (nats)" if log else "likelihood")
    _tidy(ax)
    return ax


def _curve(theta: Any, log_likelihood: Any, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """The grid in ascending order, and what to draw over it: NaN where the logarithm is −inf."""
    grid, values = np.asarray(theta, np.float64), np.asarray(log_likelihood, np.float64)
    if grid.ndim != 1 or len(grid) == 0 or values.shape != grid.shape:
        raise ValueError(f"theta has shape {grid.shape} and log_likelihood {values.shape}; expected the same (M,)")
    if not np.isfinite(grid).all() or np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError("theta or log_likelihood contains NaN or inf; expected numbers, of the likelihood also −inf")
    if np.isneginf(values).all():
        raise ValueError("log_likelihood is −inf everywhere: the data cannot happen at any theta of the grid")
    order = np.argsort(grid, kind="stable")
    with np.errstate(under="ignore", over="ignore"):
        drawn = np.where(np.isneginf(values), np.nan, values) if log else np.exp(values)
    if not log and not 0 < drawn.max() < np.inf:
        raise ValueError(f"float64 cannot hold the likelihood exp({values.max():.6g}); draw the logarithm: log=True")
    return grid[order], drawn[order]


def bic_curve(
    x: Any, n_components_range: Iterable[int], ax: Axes | None = None, **fit_arguments: Any
) -> tuple[Axes, np.ndarray]:
    """Fit a mixture for each number of components and draw Schwarz's criterion over it; the lowest is marked.

    Parameters
    ----------
    x : (N, D) array of real numbers
        The data.
    n_components_range : iterable of int
        The numbers of components K to try.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    **fit_arguments
        Any argument of `emalgam.fit` but sample weights, the same for every K.

    Returns
    -------
    ax : matplotlib Axes
    values : (len(n_components_range),) float64
        −2 Σ log p + parameters · log N, in nats, in the order of `n_components_range`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is no K to try, sample weights are given, or `emalgam.fit` refuses the data or an argument.

    References
    ----------
    Schwarz (1978), Estimating the dimension of a model.
    """
    from emalgam.em import fit

    pyplot = _pyplot()
    candidates = list(n_components_range)
    if not candidates:
        raise ValueError("n_components_range is empty; expected numbers of components, such as range(1, 11)")
    if fit_arguments.get("sample_weight") is not None:
        raise ValueError("BIC counts samples and has no place for sample_weight; leave it out")
    how = {key: fit_arguments[key] for key in ("backend", "algorithm", "n_threads") if key in fit_arguments}
    values = np.array([fit(x, K, **fit_arguments).mixture.bic(x, **how) for K in candidates])
    ax = pyplot.subplots()[1] if ax is None else ax
    best = int(values.argmin())
    order = np.argsort(candidates)
    ax.plot(np.take(candidates, order), values[order], color=OKABE_ITO[0], marker="o", markersize=4, linewidth=1.5)
    ax.plot(candidates[best], values[best], "o", color=OKABE_ITO[1], markersize=9)
    text = f"lowest at K = {candidates[best]}"
    lowest = (candidates[best], float(values[best]))  # below it nothing is drawn
    ax.annotate(text, lowest, xytext=(0, -18), textcoords="offset points", ha="center", color=INK)
    ax.margins(y=0.15)
    ax.set(xlabel="number of components K", ylabel="BIC (nats)")
    _whole_numbers(ax)
    _tidy(ax)
    return ax, values


def component_colors(n_components: int) -> list[Any]:
    """A colour for each component: those of Okabe and Ito, or steps of viridis if there are more than seven."""
    if n_components <= len(OKABE_ITO):
        return list(OKABE_ITO[:n_components])
    _pyplot()
    from matplotlib import colormaps

    return [tuple(color) for color in colormaps["viridis"](np.linspace(0, 0.95, n_components))]


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f'emalgam.plot needs matplotlib ({error}); to install it: pip install "emalgam[plot]"'
        ) from error
    return pyplot


def _colors(mixture: Mixture, colors: Sequence[Any] | None) -> Sequence[Any]:
    if colors is None:
        return component_colors(mixture.n_components)
    if len(colors) != mixture.n_components:
        raise ValueError(f"colors has {len(colors)} entries; expected {mixture.n_components}, one for each component")
    return colors


def _rgb(color: Any) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)


def _two_features(mixture: Mixture, features: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Means (K, 2) and covariances (K, 2, 2) of two features, the others integrated out."""
    if len(features) != 2:
        raise ValueError(f"features is {features!r}; expected two of the {mixture.n_features} features")
    pair = mixture.marginal(features)
    return pair.means, pair.covariance.matrices(pair.covariances, pair.n_components, 2)


def _add_ellipses(
    ax: Axes, means: np.ndarray, covariances: np.ndarray, n_std: Sequence[float], colors: Sequence[Any]
) -> None:
    """The ellipses of each component, the largest first."""
    from matplotlib.patches import Ellipse
    from matplotlib.patheffects import withStroke

    variances, axes = np.linalg.eigh(covariances)  # Σ = V diag(variances) Vᵀ, ascending
    angles = np.degrees(np.arctan2(axes[:, 1, 1], axes[:, 0, 1]))
    halo = [withStroke(linewidth=3.5, foreground="white")]  # seen on points of the same colour, too
    for mean, spread, angle, color in zip(means, np.sqrt(variances), angles, colors, strict=True):
        for distance in sorted(n_std, reverse=True):
            width, height = 2 * distance * spread[::-1]
            shape = Ellipse(tuple(mean), width, height, angle=angle, linewidth=1.5)
            shape.set(facecolor=(*_rgb(color), 0.12), edgecolor=color, path_effects=halo)
            ax.add_patch(shape)


def _label(ax: Axes, means: np.ndarray) -> None:
    """The number of each component at its mean, on white so that it can be read on any colour."""
    backing = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for k, (horizontal, vertical) in enumerate(means):
        ax.text(horizontal, vertical, str(k), ha="center", va="center", fontsize="small", color=INK, bbox=backing)


def _frame(ax: Axes, features: tuple[int, int]) -> None:
    ax.set(xlabel=ax.get_xlabel() or f"feature {features[0]}", ylabel=ax.get_ylabel() or f"feature {features[1]}")
    _tidy(ax)


def _whole_numbers(ax: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only: there is no half an iteration."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _tidy(ax: Axes) -> None:
    """No frame on the sides that carry no scale, and a grid that stays behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
