"""What all pictures share: colours, and how axes look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

OKABE_ITO: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
INK: Final = "#333333"


def component_colors(n_components: int) -> list[Any]:
    """A colour for each component: those of Okabe and Ito, or steps of viridis if there are more than seven."""
    if n_components <= len(OKABE_ITO):
        return list(OKABE_ITO[:n_components])
    pyplot_module()
    from matplotlib import colormaps

    return [tuple(color) for color in colormaps["viridis"](np.linspace(0, 0.95, n_components))]


def pyplot_module() -> Any:
    """matplotlib.pyplot; ImportError says how to install it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f'emalgam.plot needs matplotlib ({error}); to install it: pip install "emalgam[plot]"'
        ) from error
    return pyplot


def rgb(color: Any) -> tuple[float, float, float]:
    """Red, green and blue of a matplotlib colour, from 0 to 1."""
    from matplotlib.colors import to_rgb

    return to_rgb(color)


def write_at(ax: Axes, points: Iterable[tuple[float, float]], texts: Iterable[object]) -> None:
    """Texts at points, on white so that they can be read on any colour."""
    backing = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for (horizontal, vertical), text in zip(points, texts, strict=True):
        ax.text(horizontal, vertical, str(text), ha="center", va="center", fontsize="small", color=INK, bbox=backing)


def whole_numbers(ax: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only: there is no half an iteration."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def tidy(ax: Axes) -> None:
    """No frame on the sides that carry no scale, and a grid that stays behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
