"""Pictures of mixtures: their components, and whose the points are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emalgam.plot.style import component_colors, pyplot_module, rgb, tidy, write_at
from emalgam.validation import check_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from emalgam.mixture import Mixture


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
    pyplot = pyplot_module()
    means, covariances = _two_features(mixture, features)
    colors = _colors(mixture, colors)
    if not all(distance > 0 for distance in n_std):
        raise ValueError(f"n_std is {tuple(n_std)}; expected positive distances in standard deviations")
    ax = pyplot.subplots()[1] if ax is None else ax
    _add_ellipses(ax, means, covariances, n_std, colors)
    if labels:
        write_at(ax, means, range(len(means)))
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
    pyplot = pyplot_module()
    _two_features(mixture, features)
    if max_points < 1:
        raise ValueError(f"max_points is {max_points}; expected at least 1")
    points = check_data(x, n_features=mixture.n_features)
    n_samples = len(points)
    if n_samples > max_points:
        points = points[np.sort(np.random.default_rng(0).choice(n_samples, max_points, replace=False))]
    colors = _colors(mixture, colors)
    shares = mixture.responsibilities(points, **how)
    mixed = np.clip(shares @ np.array([rgb(color) for color in colors]), 0, 1)
    ax = pyplot.subplots()[1] if ax is None else ax
    horizontal, vertical = points[:, list(features)].T
    ax.scatter(horizontal, vertical, c=mixed, s=8, linewidths=0, alpha=0.8)
    if n_samples > max_points:
        ax.set_title(f"{max_points:,} of {n_samples:,} points".replace(",", "\N{NO-BREAK SPACE}"), fontsize="medium")
    _frame(ax, features)
    return ax


def _colors(mixture: Mixture, colors: Sequence[Any] | None) -> Sequence[Any]:
    if colors is None:
        return component_colors(mixture.n_components)
    if len(colors) != mixture.n_components:
        raise ValueError(f"colors has {len(colors)} entries; expected {mixture.n_components}, one for each component")
    return colors


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
            shape.set(facecolor=(*rgb(color), 0.12), edgecolor=color, path_effects=halo)
            ax.add_patch(shape)


def _frame(ax: Axes, features: tuple[int, int]) -> None:
    ax.set(xlabel=ax.get_xlabel() or f"feature {features[0]}", ylabel=ax.get_ylabel() or f"feature {features[1]}")
    tidy(ax)
