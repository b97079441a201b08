"""Fit a full-covariance mixture to the colours of a photograph, and paint every pixel in the colour of its component.

The photograph is china.jpg, 640 by 427 pixels, from scikit-learn: N = 273 280 rows of D = 3 numbers between 0 and 255.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from sklearn.datasets import load_sample_image

import emalgam
from emalgam import plot


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("-k", "--components", type=int, default=16, help="number of components K (default: 16)")
    parser.add_argument("--backend", default="auto", help="see `emalgam info` (default: auto)")
    return parser.parse_args()


def draw(photograph: np.ndarray, fitted: emalgam.Fit, path: Path) -> None:
    """Photograph, segmentation, the components in the plane of red and blue, and the trace of the fit."""
    pixels = photograph.reshape(-1, 3)
    mixture = fitted.mixture
    colors = np.clip(mixture.means / 255, 0, 1)
    labels = mixture.predict(pixels, backend=fitted.backend).reshape(photograph.shape[:2])
    figure, ((left, right), (plane, trace)) = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    left.imshow(photograph)
    left.set_title(f"{len(pixels):,} pixels".replace(",", " "))
    right.imshow(colors[labels])
    right.set_title(f"each in the mean colour of its component, K = {mixture.n_components}")
    for ax in (left, right):
        ax.axis("off")
    plane.set(xlabel="red", ylabel="blue")
    plot.responsibilities(pixels, mixture, plane, features=(0, 2), colors=colors, max_points=8000)
    plot.ellipses(mixture, plane, features=(0, 2), n_std=(1,), colors=colors)
    plot.likelihood_trace(fitted, trace)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = read_arguments()
    matplotlib.use("Agg")
    photograph = load_sample_image("china.jpg")
    pixels = photograph.reshape(-1, 3)
    start = time.perf_counter()
    fitted = emalgam.fit(
        pixels, arguments.components, tol=1e-4, max_iter=500, random_state=0, backend=arguments.backend
    )
    seconds = time.perf_counter() - start
    total = float(fitted.mixture.log_prob(pixels, backend=fitted.backend).sum())
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, picture = arguments.output / "model.safetensors", arguments.output / "photograph.png"
    emalgam.save_model(fitted.mixture, model, metadata={"data": "china.jpg of scikit-learn"})
    draw(photograph, fitted, picture)
    print(f"pixels          {len(pixels)} x {pixels.shape[1]} ({pixels.dtype})")
    print(f"components      {fitted.mixture.n_components}, full covariance")
    print(f"backend         {fitted.backend} ({fitted.algorithm}, {fitted.arithmetic})")
    print(f"iterations      {fitted.n_iter} ({'converged' if fitted.converged else 'not converged'})")
    print(f"seconds         {seconds:.2f}")
    print(f"log-likelihood  {total:.3f} ({total / len(pixels):.6f} per pixel)")
    print(f"BIC             {fitted.mixture.bic(pixels, backend=fitted.backend):.3f}")
    print(f"written         {model} {picture}")


if __name__ == "__main__":
    main()
