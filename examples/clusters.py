"""Handwritten digits without their labels: a VAE with a mixture for a prior finds the classes better than k-means.

The digits are scikit-learn's, 1797 images of 8 by 8 pixels. For each seed a `MixtureVAE` of ten components is trained
as an autoencoder, gets the mixture that fits its latents for a prior, and is trained with it. Its clusters, and those
of k-means on the pixels, are compared with the labels: accuracy is the share of digits that are right under the best
matching of clusters with classes (Jiang et al. 2017, "Variational deep embedding", section 4). With the defaults it is
0.835 in the mean of five seeds against 0.793, and higher for four of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from emalgam import plot
from emalgam.nn import MixtureVAE, train

CLASSES = 10
DRAWN = 12  # of each cluster, for the picture
LIKELIHOOD = {"name": "gaussian", "variance": 0.05}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo-ae"), help="folder (default: demo-ae)")
    parser.add_argument("--pretraining", type=int, default=100, help="epochs as an autoencoder (default: 100)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs with the mixture (default: 30)")
    parser.add_argument("--seeds", type=int, default=5, help="how often everything is repeated (default: 5)")
    return parser.parse_args()


def accuracy(clusters: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows that are right under the best matching of clusters with classes."""
    together = np.zeros((CLASSES, CLASSES))
    np.add.at(together, (clusters, labels), 1)
    return float(together[linear_sum_assignment(-together)].sum() / len(labels))


def cluster(x: torch.Tensor, seed: int, pretraining: int, epochs: int) -> MixtureVAE:
    """The three steps of variational deep embedding."""
    torch.manual_seed(seed)
    model = MixtureVAE(x.shape[1:], 10, CLASSES, (256, 128), LIKELIHOOD, covariance_type="full", denoising=0.2)
    model.pretraining = True
    train(model, x, epochs=pretraining, seed=seed, progress=False)
    model.pretraining = False
    model.initialize_prior(model.encode(x), random_state=seed)
    train(model, x, epochs=epochs, seed=seed, progress=False)
    return model


def clusters_of(model: MixtureVAE) -> np.ndarray:
    """Digits drawn from each component, a row for each, (CLASSES · DRAWN, 8, 8)."""
    rows = [model.generate(DRAWN, component=c, generator=torch.Generator().manual_seed(c)) for c in range(CLASSES)]
    return torch.cat(rows).reshape(-1, 8, 8).clamp(0, 1).numpy()


def summary(values: list[float]) -> str:
    return f"{np.mean(values):.3f}, standard deviation {np.std(values):.3f}: {' '.join(f'{v:.3f}' for v in values)}"


def main() -> None:
    matplotlib.use("Agg")
    arguments = read_arguments()
    torch.set_num_threads(1)  # nets of this size are slower on two
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    x, seeds = torch.from_numpy(pixels), range(arguments.seeds)
    print(f"digits          {len(x)} x {x.shape[1]}, seeds {seeds.start} to {seeds.stop - 1}", flush=True)
    means = [KMeans(CLASSES, n_init=10, random_state=seed).fit_predict(pixels) for seed in seeds]
    by_means = [accuracy(each, labels) for each in means]
    print(f"k-means         {summary(by_means)}", flush=True)
    began = time.perf_counter()
    models = [cluster(x, seed, arguments.pretraining, arguments.epochs) for seed in seeds]
    by_mixtures = [accuracy(each.predict(x).numpy(), labels) for each in models]
    print(f"mixture VAE     {summary(by_mixtures)}")
    print(f"better          {np.greater(by_mixtures, by_means).sum()} of {len(models)} seeds")
    print(f"seconds         {(time.perf_counter() - began) / len(models):.1f} for each seed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot.samples(clusters_of(models[0]), n_columns=DRAWN)
    picture = arguments.output / "clusters.png"
    pyplot.savefig(picture, dpi=150)
    print(f"written         {picture}")


if __name__ == "__main__":
    main()
