"""Cut a photograph into tiles, fit a mixture to the 8 × 8 patches of each tile, and draw what the mixtures know.

The photograph is china.jpg, 640 by 427 pixels, from scikit-learn. A patch has 8 · 8 · 3 = 192 numbers, of which six
features are made: its mean colour, and the first three principal components of its brightness about the mean, which
are its slopes and curvature. A tile is a square of 32 pixels, and its problem the patches in it, two pixels from one to
the next; BIC chooses the number of components of each tile.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from sklearn.datasets import load_sample_image

import emalgam

PATCH, TILE, STRIDE = 8, 32, 2  # pixels; the last from one patch to the next
TEXTURES = 3
TRIED = range(1, 7)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--step", type=int, default=8, help="pixels from one tile to the next (default: 8)")
    parser.add_argument("--backend", default="auto", help="see `emalgam info` (default: auto)")
    return parser.parse_args()


def feature_basis(windows: np.ndarray, n_textures: int) -> np.ndarray:
    """Orthonormal vectors (D, 192): the mean colour, and the principal components of brightness about its mean."""
    brightness = windows[::3, ::3].mean(axis=2).reshape(-1, PATCH**2)
    brightness -= brightness.mean(axis=1, keepdims=True)
    textures = np.linalg.eigh(np.cov(brightness.T))[1][:, ::-1][:, :n_textures].T
    colours = np.kron(np.eye(3), np.full(PATCH**2, 1 / PATCH))
    return np.concatenate([colours, np.kron(np.full((1, 3), 3**-0.5), textures)])


def features_of(windows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Features of the patch at each pixel, (rows, columns, D)."""
    return np.stack([line.reshape(len(line), -1) @ basis.T for line in windows])


def cut(features: np.ndarray, step: int) -> np.ndarray:
    """The patches of each tile, (rows, columns, patches, D): tiles overlap if `step` is less than a tile."""
    inside = TILE - PATCH + 1  # patches along an edge
    tiles = np.lib.stride_tricks.sliding_window_view(features, (inside, inside), axis=(0, 1))
    tiles = tiles[::step, ::step, :, ::STRIDE, ::STRIDE]
    rows, columns, D = tiles.shape[:3]
    return np.ascontiguousarray(np.moveaxis(tiles.reshape(rows, columns, D, -1), 2, 3))


def from_means(fits: emalgam.ManyFits, tiles: np.ndarray, shape: tuple[int, int], step: int) -> np.ndarray:
    """The features of each patch, (rows, columns, D), if it is the mean of its component; averaged over tiles."""
    n_patches, D = tiles.shape[2:]
    labels = fits.predict(tiles.reshape(-1, n_patches, D), backend=fits.backend)
    total, count = np.zeros((*shape, D)), np.zeros((*shape, 1))
    side = int(np.sqrt(n_patches))
    for tile in np.flatnonzero(fits.n_components):
        corner = step * np.array(divmod(tile, tiles.shape[1]))
        place = tuple(slice(begin, begin + STRIDE * side, STRIDE) for begin in corner)
        total[place] += fits.means[tile, labels[tile]].reshape(side, side, D)
        count[place] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def paint(features: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The picture whose patches have these features, overlapping patches averaged; NaN where there is none."""
    rows, columns = features.shape[:2]
    there = np.isfinite(features[..., :1])
    patches = (np.nan_to_num(features) @ basis).reshape(rows, columns, 3, PATCH, PATCH)
    total = np.zeros((rows + PATCH - 1, columns + PATCH - 1, 4))
    for y, x in np.ndindex(PATCH, PATCH):
        total[y : y + rows, x : x + columns] += np.concatenate([patches[..., y, x], there], axis=2)
    with np.errstate(invalid="ignore"):
        return np.clip(total[..., :3] / total[..., 3:] / 255, 0, 1)


def draw_map(ax: Axes, values: np.ndarray, title: str, step: int) -> None:
    """A colour for each tile, at its middle; whole numbers have steps of colour."""
    rows, columns = values.shape
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        style = {"cmap": pyplot.get_cmap("viridis", high - low + 1), "vmin": low - 0.5, "vmax": high + 0.5}
        ticks = range(low, high + 1)
    else:
        style = {"cmap": "magma", "vmin": np.nanpercentile(values, 1), "vmax": np.nanpercentile(values, 99)}
        ticks = None
    begin = (TILE - step) / 2
    extent = (begin, begin + columns * step, begin + rows * step, begin)
    shown = ax.imshow(values, extent=extent, **style)
    ax.set_title(title, loc="left")
    ax.figure.colorbar(shown, ax=ax, shrink=0.75, ticks=ticks)


def draw(photograph: np.ndarray, painted: np.ndarray, maps: dict[str, np.ndarray], step: int, path: Path) -> None:
    """The photograph, the same from the means of the components, and a map of the tiles for each entry."""
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    height, width = photograph.shape[:2]
    axes[0, 0].imshow(photograph)
    axes[0, 0].set_title(f"{width} × {height} pixels", loc="left")
    axes[0, 1].imshow(painted)
    axes[0, 1].set_title("each patch as the mean of its component", loc="left")
    for ax, (title, values) in zip(axes[1], maps.items(), strict=True):
        draw_map(ax, values, title, step)
    for ax in axes.flat:
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = read_arguments()
    matplotlib.use("Agg")
    arguments.output.mkdir(parents=True, exist_ok=True)
    photograph = load_sample_image("china.jpg")
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (PATCH, PATCH), axis=(0, 1))
    basis = feature_basis(windows, TEXTURES)
    features = features_of(windows, basis)
    tiles = cut(features, arguments.step)
    rows, columns, n_patches, D = tiles.shape
    problems = tiles.reshape(-1, n_patches, D)
    start = time.perf_counter()
    fits = emalgam.fit_many(problems, TRIED, random_state=0, backend=arguments.backend)
    seconds = time.perf_counter() - start
    painted = paint(from_means(fits, tiles, features.shape[:2], arguments.step), basis)
    maps = {
        f"components of each tile, chosen by BIC from 1 to {TRIED[-1]}": fits.n_components.reshape(rows, columns),
        f"entropy of its patches, in nats per patch (D = {D})": -fits.score(problems).reshape(rows, columns),
    }
    models, picture = arguments.output / "tiles.parquet", arguments.output / "tiles.png"
    fits.save(models)
    draw(photograph, painted, maps, arguments.step, picture)
    noise = np.nanmean((painted - photograph / 255) ** 2)
    K = fits.n_components
    print(f"tiles           {rows} x {columns} of {TILE} x {TILE} pixels, {n_patches} patches of {D} features each")
    print(f"backend         {fits.backend}")
    print(f"seconds         {seconds:.2f} ({len(fits) / seconds:.0f} tiles a second)")
    print(f"components      {K.min()} to {K.max()}, {K.mean():.2f} on average")
    print(f"from means      {-10 * np.log10(noise):.1f} dB (peak signal to noise)")
    print(f"written         {models} {picture}")


if __name__ == "__main__":
    main()
