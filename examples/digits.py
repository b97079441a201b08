"""Handwritten digits: an autoencoder, a mixture of its latents, and new digits drawn from it, scored against real ones.

The digits are scikit-learn's, 1797 images of 8 by 8 pixels in seventeen greys. The autoencoder is trained on 1297 of
them; a Gaussian mixture (K by BIC) and, to compare, one Gaussian are fitted to their latents. New digits are decoded
from both, and their distance from the 500 digits that were held out is the squared maximum mean discrepancy (MMD).
All of it is repeated with other seeds: of the split, the weights, the training, the fits and the draws.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits

from emalgam import plot
from emalgam.nn import VAE, Autoencoder, History, LatentMixtureSampler, LatentModel, save_model, train
from emalgam.nn.evaluation import encode, reconstruct

WIDTHS = (64, 256, 128, 12)
HELD_OUT = 500
DRAWN = 1000
BANDWIDTHS = (3.0, 1.5)  # the median distance between two digits (pixels from 0 to 1), and half of it
TRAINING = {"batch_size": 64, "learning_rate": 2e-3}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo-ae"), help="folder (default: demo-ae)")
    parser.add_argument("--epochs", type=int, default=60, help="of each training (default: 60)")
    parser.add_argument("--seeds", type=int, default=5, help="how often everything is repeated (default: 5)")
    return parser.parse_args()


# ---- scores


def squared_mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """The squared maximum mean discrepancy of two samples under k(a, b) = exp(−‖a − b‖² / 2 bandwidth²), unbiased.

    E k(x, x′) + E k(y, y′) − 2 E k(x, y), with x and x′ different rows: 0 in the mean if x and y have one distribution,
    so that it may come out negative. Gretton et al. (2012), "A kernel two-sample test", eq. 3.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        return np.exp(-0.5 * squares / bandwidth**2)

    def within(a: np.ndarray) -> float:
        matrix = kernel(a, a)
        return (matrix.sum() - np.trace(matrix)) / (len(a) * (len(a) - 1))

    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


@dataclass
class Run:
    """What one seed gave."""

    model: Autoencoder
    held_out: np.ndarray
    history: History
    mixture: LatentMixtureSampler
    gaussian: LatentMixtureSampler
    scores: dict[str, list[float]]
    seconds: dict[str, float]


def run(x: np.ndarray, seed: int, epochs: int) -> Run:
    """Split, train, fit, draw and score, all from one seed."""
    order = np.random.default_rng(seed).permutation(len(x))
    learnt, held_out = x[order[HELD_OUT:]], x[order[:HELD_OUT]]
    torch.manual_seed(seed)
    model = Autoencoder(WIDTHS, output="sigmoid")
    begin = time.perf_counter()
    history = train(model, learnt, epochs=epochs, validation=held_out, seed=seed, **TRAINING)
    trained = time.perf_counter()
    mixture = LatentMixtureSampler(random_state=seed).fit(model, learnt)
    fitted = time.perf_counter()
    gaussian = LatentMixtureSampler(1).fit(model, learnt)
    drawn = {
        "one Gaussian": gaussian.sample(DRAWN, seed)[0].numpy(),
        "mixture": mixture.sample(DRAWN, seed)[0].numpy(),
        "reconstructed": reconstruct(model, learnt),
        "real": learnt,
    }
    scores = {name: [squared_mmd(digits, held_out, width) for width in BANDWIDTHS] for name, digits in drawn.items()}
    seconds = {"training": trained - begin, "mixture": fitted - trained}
    return Run(model, held_out, history, mixture, gaussian, scores, seconds)


# ---- pictures


def draw(found: Run, output: Path) -> list[Path]:
    """Losses, reconstructions, steps between two digits, and new ones."""
    _, pair = pyplot.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    for ax, sampler in zip(pair, (found.gaussian, found.mixture), strict=True):
        K = sampler.mixture.n_components
        plot.samples(sampler.sample(64, 0)[0], ax)
        ax.set_title("latents from one Gaussian" if K == 1 else f"latents from a mixture of {K}")
    axes = {
        "losses": plot.losses(found.history),
        "reconstructions": plot.reconstructions(found.held_out, reconstruct(found.model, found.held_out)),
        "interpolation": plot.interpolation(found.model, found.held_out[:6], found.held_out[6:12]),
        "generated": pair[0],
    }
    return [save(ax, output / f"{name}.png") for name, ax in axes.items()]


def draw_plane(model: LatentModel, x: np.ndarray, digit: np.ndarray, output: Path) -> list[Path]:
    """Where digits lie in two latents, and what is decoded there."""
    scatter = plot.latent_scatter(encode(model, x), digit, pyplot.subplots(layout="constrained", figsize=(7, 6))[1])
    return [save(scatter, output / "latents.png"), save(plot.manifold_grid(model), output / "manifold.png")]


def save(ax: matplotlib.axes.Axes, path: Path) -> Path:
    ax.figure.savefig(path, dpi=110)
    pyplot.close(ax.figure)
    return path


# ---- all of it


def report(name: str, text: object) -> None:
    print(f"{name:16}{text}".rstrip(), flush=True)


def report_scores(scores: dict[str, np.ndarray]) -> None:
    """Mean and spread over the seeds, and how often the mixture was better, of scores (seeds, bandwidths)."""
    seeds = len(scores["mixture"])
    report("score", f"squared MMD x 1000 to the digits held out, mean and standard deviation of {seeds} seeds")
    report("- bandwidth", "".join(f"{width:<16g}" for width in BANDWIDTHS))
    for name, values in scores.items():
        spread = values.std(axis=0, ddof=min(1, seeds - 1))
        pairs = zip(1000 * values.mean(axis=0), 1000 * spread, strict=True)
        report(f"- {name}", "".join(f"{f'{mean:.2f} +- {deviation:.2f}':16}" for mean, deviation in pairs))
    better = (scores["mixture"] < scores["one Gaussian"]).sum(axis=0)
    report("- better", "".join(f"{f'{count} of {seeds} seeds':16}" for count in better))


def main() -> None:
    arguments = read_arguments()
    matplotlib.use("Agg")
    torch.set_num_threads(1)  # nets of this size are slower on two
    begin = time.perf_counter()
    arguments.output.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    report("digits", f"{len(x)} x {x.shape[1]}, {HELD_OUT} of them held out")
    runs = [run(x, seed, arguments.epochs) for seed in range(arguments.seeds)]
    first = runs[0]
    size = sum(weight.numel() for weight in first.model.parameters())
    widths = "-".join(map(str, WIDTHS))
    report("autoencoder", f"{widths} and back, {size} parameters")
    report("training", f"{arguments.epochs} epochs, {first.seconds['training']:.1f} s")
    report("error", f"{first.history['validation_loss'][-1]:.4f} squared, per pixel held out (variance {x.var():.4f})")
    K = " ".join(str(found.mixture.mixture.n_components) for found in runs)
    report("mixture", f"{K} components by BIC, {first.seconds['mixture']:.1f} s")
    report_scores({name: np.array([found.scores[name] for found in runs]) for name in first.scores})
    torch.manual_seed(0)
    plane = VAE(64, 2, widths=(256, 128))
    history = train(plane, x, epochs=arguments.epochs, seed=0, **TRAINING)
    report("VAE", f"64-256-128-2, loss {history['loss'][-1]:.2f} nats per digit")
    save_model(first.model, arguments.output, first.mixture)
    written = [*draw(first, arguments.output), *draw_plane(plane, x, digits.target, arguments.output)]
    report("written", " ".join(str(path) for path in [arguments.output / "model.safetensors", *written]))
    report("seconds", f"{time.perf_counter() - begin:.1f}")


if __name__ == "__main__":
    main()
