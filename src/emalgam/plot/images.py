"""Pictures of many images: sheets of rows and columns, each drawn in one piece."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from emalgam.namespace import to_host
from emalgam.plot.style import INK, pyplot_module
from emalgam.validation import check_array, check_integer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

INCHES_OF_AN_IMAGE: Final = 0.7
INCHES_OF_A_SHEET: Final = 9  # at most, if that leaves the images large enough
PIXELS_OF_A_GAP: Final = 14  # of an image, for one pixel of a gap


@dataclass(frozen=True)
class Look:
    """How images are drawn.

    Attributes
    ----------
    shape : tuple of int, optional
        Of one image, for data that are flat: (H, W), (1, H, W) or (3, H, W).
    limits : (float, float), optional
        The values drawn as the first and the last colour. By default (0, 1) if all values lie there, else the smallest
        and the largest.
    cmap : str
        The colour map of images without colours of their own.
    """

    shape: tuple[int, ...] | None = None
    limits: tuple[float, float] | None = None
    cmap: str = "gray"

    def __post_init__(self) -> None:
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(f"limits is {self.limits}; expected a smaller and a larger number")

    def within(self, images: np.ndarray) -> Look:
        """The same with limits, those of `images` unless they are given."""
        if self.limits is not None:
            return self
        low, high = float(images.min()), float(images.max())
        if low >= 0 and high <= 1:
            return Look(self.shape, (0.0, 1.0), self.cmap)
        return Look(self.shape, (low, high if high > low else low + 1.0), self.cmap)


def reconstructions(
    x: Any,
    reconstructed: Any,
    ax: Axes | None = None,
    *,
    n: int = 10,
    names: tuple[str, str] = ("input", "output"),
    shape: tuple[int, ...] | None = None,
    limits: tuple[float, float] | None = None,
    cmap: str = "gray",
) -> Axes:
    """Inputs in a row, and below each what became of it.

    Parameters
    ----------
    x, reconstructed : (N, ...) images
        Of the same shape. Values of both are drawn in the colours of `x`.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    n : int
        How many to draw: the first ones, or all if there are fewer.
    names : (str, str)
        Of the two rows.
    shape : tuple of int, optional
        Of one image if they are flat and not square: (H, W), (1, H, W) or (3, H, W).
    limits : (float, float), optional
        The values that are drawn as the first and the last colour; by default (0, 1) if all of `x` lie there, else its
        smallest and largest.
    cmap : str
        The colour map.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If they are no images, have different shapes, or hold NaN or infinity.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import numpy as np
    >>> from emalgam import plot
    >>> x = np.random.default_rng(0).random((12, 64))
    >>> ax = plot.reconstructions(x, x.round())
    >>> ax.images[0].get_array().shape                          # 2 × 10 of 8 × 8, and gaps
    (17, 89)
    """
    pyplot_module()
    inputs, outputs = as_images("x", x, shape), as_images("reconstructed", reconstructed, shape)
    if inputs.shape != outputs.shape:
        raise ValueError(f"x holds images {inputs.shape} and reconstructed {outputs.shape}; expected the same")
    shown = min(check_integer("n", n, 1), len(inputs))
    look = Look(shape, limits, cmap).within(inputs[:shown])
    ax = draw_sheet(np.concatenate([inputs[:shown], outputs[:shown]]), shown, ax, look)
    label_rows(ax, names, inputs.shape[1])
    return ax


def samples(
    x: Any,
    ax: Axes | None = None,
    *,
    n_columns: int | None = None,
    shape: tuple[int, ...] | None = None,
    limits: tuple[float, float] | None = None,
    cmap: str = "gray",
) -> Axes:
    """Images side by side, row by row.

    Parameters
    ----------
    x : (N, ...) images
        All are drawn.
    ax, shape, limits, cmap
        As in `reconstructions`.
    n_columns : int, optional
        Images in a row; by default as many as make a square, or little less.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If they are no images, or hold NaN or infinity.
    """
    pyplot_module()
    images = as_images("x", x, shape)
    columns = math.isqrt(len(images) - 1) + 1 if n_columns is None else check_integer("n_columns", n_columns, 1)
    return draw_sheet(images, min(columns, len(images)), ax, Look(shape, limits, cmap).within(images))


# ---- what the pictures of latents use too


def as_images(name: str, x: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """`x` as images: (N, H, W), or (N, H, W, 3) if they have colours; any real dtype.

    ValueError naming the argument, if it is neither images nor of the `shape` of one.
    """
    array = check_array(name, to_host(x))
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; expected images: (N, H, W), (N, 1, H, W) or (N, 3, H, W)")
    if shape is not None:
        if math.prod(shape) != math.prod(array.shape[1:]):
            raise ValueError(
                f"{name} has shape {array.shape}; images of shape {tuple(shape)} have {math.prod(shape)} values"
            )
        array = array.reshape(len(array), *shape)
    elif array.ndim == 2:
        side = math.isqrt(array.shape[1])
        if side * side != array.shape[1]:
            raise ValueError(
                f"{name} has shape {array.shape}, and {array.shape[1]} values are no square; "
                "give the shape of an image: shape=(height, width)"
            )
        array = array.reshape(len(array), side, side)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim == 4 and array.shape[1] == 3:
        array = np.moveaxis(array, 1, 3)
    elif array.ndim != 3:
        raise ValueError(f"{name} has shape {array.shape}; expected images: (N, H, W), (N, 1, H, W) or (N, 3, H, W)")
    return array


def draw_sheet(images: np.ndarray, n_columns: int, ax: Axes | None, look: Look) -> Axes:
    """Images in rows of `n_columns`, each image one unit wide and high: the first has its centre at (0, 0)."""
    H, W = images.shape[1:3]
    gap = max(max(H, W) // PIXELS_OF_A_GAP, 1)
    n_rows = -(-len(images) // n_columns)
    sheet = _sheet(images, n_rows, n_columns, gap)
    if ax is None:
        inches = max(min(INCHES_OF_AN_IMAGE, INCHES_OF_A_SHEET / max(n_columns, n_rows)), INCHES_OF_AN_IMAGE / 3)
        size = (1 + n_columns * inches, 0.5 + n_rows * inches * H / W)
        ax = pyplot_module().subplots(figsize=size, layout="constrained")[1]
    # Half a gap is missing around the sheet.
    across, down = 0.5 * gap / (W + gap), 0.5 * gap / (H + gap)
    extent = (-0.5 + across, n_columns - 0.5 - across, n_rows - 0.5 - down, -0.5 + down)
    low, high = look.limits or (0.0, 1.0)
    if sheet.ndim == 3:
        sheet = _with_transparency((sheet - low) / (high - low))
    ax.imshow(sheet, cmap=look.cmap, vmin=low, vmax=high, extent=extent, aspect=(H + gap) / (W + gap))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def label_rows(ax: Axes, names: Sequence[str], height: int) -> None:
    """A name on the left of each row of a sheet."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, labelcolor=INK)


def _sheet(images: np.ndarray, n_rows: int, n_columns: int, gap: int) -> np.ndarray:
    """(rows, columns) or (rows, columns, 3) float64, NaN where there is no image."""
    H, W = images.shape[1:3]
    sheet = np.full((n_rows * (H + gap) - gap, n_columns * (W + gap) - gap, *images.shape[3:]), np.nan)
    for number, image in enumerate(images):
        row, column = divmod(number, n_columns)
        top, left = row * (H + gap), column * (W + gap)
        sheet[top : top + H, left : left + W] = image
    return sheet


def _with_transparency(colors: np.ndarray) -> np.ndarray:
    """(..., 4): red, green, blue from 0 to 1, and 0 where they are NaN."""
    there = ~np.isnan(colors[..., :1])
    return np.concatenate([np.clip(np.where(there, colors, 0.0), 0.0, 1.0), there], axis=-1)
