"""Pictures of a model's latents: where the data lie, what is decoded over a plane, and on the way between two data."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from emalgam.namespace import to_host
from emalgam.plot.images import Look, as_images, draw_sheet
from emalgam.plot.style import INK, component_colors, pyplot_module, rgb, tidy, write_at
from emalgam.validation import check_array, check_features, check_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from emalgam.nn import LatentModel

MOST_CLASSES: Final = 30
TICKS: Final = 5


def latent_scatter(
    z: Any,
    labels: Any = None,
    ax: Axes | None = None,
    *,
    axes: tuple[int, int] = (0, 1),
    max_points: int = 5000,
) -> Axes:
    """Latents as points, in the colours of their classes, each class with its name where its median is.

    Parameters
    ----------
    z : (N, ...) array or tensor
        The latents, such as `encode` returns; taken as (N, D) with D ≥ 2.
    labels : (N,) array, optional
        The class of each: numbers or names, at most 30 different ones.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    axes : (int, int)
        The latent dimensions on the horizontal and the vertical axis.
    max_points : int
        The most points to draw. Of more, that many are drawn at random (always the same ones), and the title says so.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the latents are not (N, ...) finite numbers with the two dimensions asked for, or `labels` is not one class
        for each.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from emalgam import plot
    >>> ax = plot.latent_scatter([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], ["a", "b", "b"])
    >>> [(text.get_text(), text.get_position()) for text in ax.texts]
    [('a', (0.0, 1.0)), ('b', (3.0, 4.0))]
    """
    pyplot = pyplot_module()
    latents = check_array("z", to_host(z))
    latents = latents.reshape(len(latents), -1) if latents.ndim > 2 else latents
    if latents.ndim != 2 or latents.shape[1] < 2:
        raise ValueError(f"z has shape {latents.shape}; expected (N, D) latents of at least two dimensions")
    points = latents[:, _two_axes(axes, latents.shape[1])].astype(np.float64)
    names, members = _classes(labels, len(points))
    check_integer("max_points", max_points, 1)
    ax = pyplot.subplots(layout="constrained")[1] if ax is None else ax
    if len(points) > max_points:
        drawn = np.sort(np.random.default_rng(0).choice(len(points), max_points, replace=False))
        ax.set_title(f"{max_points:,} of {len(points):,} latents".replace(",", "\N{NO-BREAK SPACE}"), fontsize="medium")
    else:
        drawn = np.arange(len(points))
    colors = np.array([rgb(color) for color in component_colors(len(names))])
    # One collection in the order of the data: classes drawn one after the other would hide each other.
    across, up = points[drawn].T
    ax.scatter(across, up, c=colors[members[drawn]], s=8, linewidths=0, alpha=0.7)
    if labels is not None:
        medians = [np.median(points[members == number], axis=0).tolist() for number in range(len(names))]
        write_at(ax, medians, names)
    ax.set(xlabel=ax.get_xlabel() or f"latent {axes[0]}", ylabel=ax.get_ylabel() or f"latent {axes[1]}")
    tidy(ax)
    return ax


def manifold_grid(
    model: LatentModel,
    ax: Axes | None = None,
    *,
    n: int = 20,
    limits: tuple[float, float] = (0.05, 0.95),
    axes: tuple[int, int] = (0, 1),
    center: Any = 0.0,
    scale: Any = 1.0,
    shape: tuple[int, ...] | None = None,
    value_limits: tuple[float, float] | None = None,
    cmap: str = "gray",
) -> Axes:
    """What a model decodes over a plane of its latent space, in steps of equal probability under a normal distribution.

    The grid is z = center + scale · Φ⁻¹(u) with u from limits[0] to limits[1] along two of the latent dimensions; the
    others stay at the center.

    Parameters
    ----------
    model : LatentModel
        Decodes the grid.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    n : int
        Images in each direction.
    limits : (float, float)
        The probabilities u at the ends, between 0 and 1.
    axes : (int, int)
        The latent dimensions that grow to the right and upwards, of the latents taken as flat.
    center, scale : float or (D,) arrays
        Mean and standard deviation of the latents. The default, N(0, I), is the prior of a VAE; for other models take
        them from `encode`.
    shape : tuple of int, optional
        Of an image, as in `reconstructions`; that of the model's data by default.
    value_limits : (float, float), optional
        The values that are drawn as the first and the last colour, as `limits` of `reconstructions`.
    cmap : str
        The colour map.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib or torch is not installed.
    ValueError
        If the model has fewer than two latent dimensions, or not those asked for; if `limits` are not two
        probabilities, or `scale` is not positive.
    """
    from emalgam.nn.evaluation import decode

    pyplot_module()
    D = int(np.prod(model.latent_shape))
    if D < 2:
        raise ValueError(f"the latents of the model have shape {model.latent_shape}; a plane needs two dimensions")
    chosen = _two_axes(axes, D)
    steps = _normal_quantiles(limits, check_integer("n", n, 2))
    middle = _of_latents("center", center, D)
    spread = _of_latents("scale", scale, D)
    if not (spread > 0).all():
        raise ValueError(f"scale is {scale!r}; expected positive standard deviations")
    z = np.tile(middle, (n, n, 1))
    across, up = (middle[axis] + spread[axis] * steps for axis in chosen)
    z[:, :, chosen[0]], z[:, :, chosen[1]] = across, up[::-1, None]  # the first row of a sheet is on top
    images = as_images("decode(z)", decode(model, z.reshape(n * n, *model.latent_shape)), shape)
    ax = draw_sheet(images, n, ax, Look(shape, value_limits, cmap).within(images))
    _scale_of_axes(ax, across, up[::-1], chosen)
    return ax


def interpolation(
    model: LatentModel,
    a: Any,
    b: Any,
    ax: Axes | None = None,
    *,
    n: int = 10,
    shape: tuple[int, ...] | None = None,
    limits: tuple[float, float] | None = None,
    cmap: str = "gray",
) -> Axes:
    """What a model decodes on the straight line between the latents of two data, z(t) = (1 − t) z_a + t z_b.

    Parameters
    ----------
    model : LatentModel
        Encodes both ends and decodes what lies between them.
    a, b : data of the model
        One datum each, or as many of both: each pair is a row, which begins with the reconstruction of a and ends with
        that of b.
    ax, shape, limits, cmap
        As in `reconstructions`.
    n : int
        Images in a row, t = 0 and t = 1 included.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib or torch is not installed.
    ValueError
        If `a` and `b` are not as many, or not data of the model.
    """
    from emalgam.nn.evaluation import decode, encode

    pyplot_module()
    t = np.linspace(0, 1, check_integer("n", n, 2))
    ends = [encode(model, _as_batch(name, x, model)) for name, x in (("a", a), ("b", b))]
    if ends[0].shape != ends[1].shape:
        raise ValueError(f"there are {len(ends[0])} data in a and {len(ends[1])} in b; expected as many")
    t = t.reshape(n, *(1 for _ in model.latent_shape))
    z = (1 - t) * ends[0][:, None] + t * ends[1][:, None]
    images = as_images("decode(z)", decode(model, z.reshape(-1, *model.latent_shape)), shape)
    ax = draw_sheet(images, n, ax, Look(shape, limits, cmap).within(images))
    ax.set_xticks([0, n - 1], ["t = 0", "t = 1"])
    ax.tick_params(length=0, labelcolor=INK)
    return ax


def _two_axes(axes: tuple[int, int], D: int) -> np.ndarray:
    if len(axes) != 2:
        raise ValueError(f"axes is {axes!r}; expected two of the {D} latent dimensions")
    try:
        return check_features(axes, D)
    except ValueError:
        raise ValueError(f"axes is {axes!r}; expected two different integers from 0 to {D - 1}") from None


def _classes(labels: Any, n_points: int) -> tuple[list[object], np.ndarray]:
    """The names of the classes in ascending order, and the number of each point's class; one class without labels."""
    if labels is None:
        return [""], np.zeros(n_points, np.intp)
    given = np.asarray(to_host(labels))
    if given.shape != (n_points,):
        raise ValueError(f"labels has shape {given.shape}; expected one for each of the {n_points} latents")
    names, members = np.unique(given, return_inverse=True)
    if len(names) > MOST_CLASSES:
        raise ValueError(f"labels has {len(names)} different values; expected at most {MOST_CLASSES} classes")
    return names.tolist(), members


def _normal_quantiles(limits: tuple[float, float], n: int) -> np.ndarray:
    """Φ⁻¹(u) for n probabilities u between the limits."""
    if not 0 < limits[0] < limits[1] < 1:
        raise ValueError(f"limits is {limits}; expected two probabilities, 0 < first < last < 1")
    return np.array([NormalDist().inv_cdf(u) for u in np.linspace(*limits, n)])


def _of_latents(name: str, values: Any, D: int) -> np.ndarray:
    """One number for all latent dimensions, or one for each, as (D,)."""
    array = check_array(name, to_host(values)).reshape(-1)
    if len(array) not in (1, D):
        raise ValueError(f"{name} has shape {np.shape(values)}; expected one number, or one for each of {D} latents")
    return np.broadcast_to(array.astype(np.float64), (D,))


def _as_batch(name: str, x: Any, model: LatentModel) -> Any:
    """One datum as (1, ...); a batch as it is."""
    given = tuple(np.shape(x))
    if given == tuple(model.data_shape):
        return x[None] if hasattr(x, "__getitem__") and hasattr(x, "ndim") else [x]
    return x


def _scale_of_axes(ax: Axes, across: np.ndarray, down: np.ndarray, axes: np.ndarray) -> None:
    """The latents' values at a few of the rows and columns."""
    shown = np.unique(np.linspace(0, len(across) - 1, TICKS).round().astype(int))
    numbers = [[f"{values[i]:.2g}".replace("-", "\N{MINUS SIGN}") for i in shown] for values in (across, down)]
    ax.set_xticks(shown, numbers[0])
    ax.set_yticks(shown, numbers[1])
    ax.set(xlabel=f"latent {axes[0]}", ylabel=f"latent {axes[1]}")
