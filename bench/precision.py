"""Measure the guard: the error of packed and direct log-densities in units of eps · cancellation, and of the tolerance.

    python bench/precision.py

For each kind of mixture the worst absolute error over points drawn from it, against long double from the parameters as
stored. The guard of `emalgam.guard` promises error ≤ 4 · eps · c for packed kernels; the last columns show what "auto"
delivers. Below: how far the mean of the 400 log-densities is off, where errors average out (`NOISE_OF_A_CHANGE`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from emalgam.guard import TOLERANCE, packed_bound
from emalgam.mixture import Mixture

CONDITIONS = (1.0, 1e2, 1e4, 1e6)
SEPARATIONS = (3.0, 30.0, 300.0, 1000.0)
LONG = np.longdouble


def random_covariance(rng: np.random.Generator, D: int, condition: float) -> np.ndarray:
    """A random orientation with eigenvalues spread evenly in the logarithm from 1 / condition to 1."""
    q = np.linalg.qr(rng.normal(size=(D, D)))[0]
    eigenvalues = condition ** -np.linspace(0, 1, D) if D > 1 else np.ones(1)
    matrix: np.ndarray = q * eigenvalues @ q.T
    return (matrix + matrix.T) / 2


def long_log_prob(x: np.ndarray, mixture: Mixture) -> np.ndarray:
    """log p in long double: Cholesky by hand, distances, log-sum-exp."""
    K, D = mixture.means.shape
    logits = np.empty((len(x), K), LONG)
    covariances = mixture.covariance.matrices(mixture.covariances, K, D)
    for k in range(K):
        lower = np.zeros((D, D), LONG)
        for i in range(D):
            for j in range(i + 1):
                rest = LONG(covariances[k, i, j]) - (lower[i, :j] * lower[j, :j]).sum()
                lower[i, j] = np.sqrt(rest) if i == j else rest / lower[j, j]
        y = np.empty((len(x), D), LONG)
        for i in range(D):
            centred = x[:, i].astype(LONG) - LONG(mixture.means[k, i])
            y[:, i] = (centred - y[:, :i] @ lower[i, :i]) / lower[i, i]
        constant = np.log(LONG(mixture.weights[k])) - np.log(np.diag(lower)).sum() - D * np.log(2 * LONG(np.pi)) / 2
        logits[:, k] = constant - (y**2).sum(axis=1) / 2
    top = logits.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))[:, 0]


def cases() -> Iterator[tuple[str, Mixture, np.random.Generator]]:
    for covariance_type in ("full", "tied", "diag", "spherical"):
        for D in (2, 8, 64):
            for separation in SEPARATIONS:
                for condition in CONDITIONS if covariance_type in ("full", "tied") else (1.0,):
                    rng = np.random.default_rng(0)
                    K = 4
                    means = rng.normal(size=(K, D)) * separation / np.sqrt(2 * D)
                    full = np.stack([random_covariance(rng, D, condition) for _ in range(K)])
                    covariances = {
                        "full": full,
                        "tied": full[0],
                        "diag": rng.uniform(0.5, 2, (K, D)),
                        "spherical": rng.uniform(0.5, 2, K),
                    }[covariance_type]
                    label = f"{covariance_type:9s} D={D:2d} separation={separation:6.0f} condition={condition:7.0e}"
                    yield label, Mixture(np.full(K, 0.25), means, covariances, covariance_type), rng


def main() -> None:
    worst = {"float32": 0.0, "float64": 0.0}
    delivered, of_mean = dict(worst), dict(worst)
    print(f"{'':52s} {'c':>9s}  packed error / (eps c)    auto error / tolerance")
    print(f"{'':52s} {'':9s}  {'float32':>9s} {'float64':>9s}   {'float32':>9s} {'float64':>9s}")
    for label, mixture, rng in cases():
        x64 = mixture.sample(400, rng)[0]
        cancellation = mixture.covariance.cancellation(mixture.components(mixture.own_frame()))
        ratios, outcomes = [], []
        for dtype in ("float32", "float64"):
            x = x64.astype(dtype)
            exact = long_log_prob(x, mixture)
            errors = mixture.log_prob(x, algorithm="packed").astype(LONG) - exact
            auto = float(np.abs(mixture.log_prob(x) - exact).max())
            ratios.append(float(np.abs(errors).max()) / (float(np.finfo(dtype).eps) * cancellation))
            outcomes.append(auto / TOLERANCE[dtype])
            of_mean[dtype] = max(of_mean[dtype], abs(float(errors.mean())) / packed_bound(dtype, cancellation))
            worst[dtype] = max(worst[dtype], ratios[-1])
            delivered[dtype] = max(delivered[dtype], outcomes[-1])
        figures = f"{ratios[0]:9.3f} {ratios[1]:9.3f}   {outcomes[0]:9.4f} {outcomes[1]:9.4f}"
        print(f"{label:52s} {cancellation:9.2e}  {figures}")
    for dtype, ratio in worst.items():
        print(
            f"{dtype}: worst packed error {ratio:.2f} eps c; worst auto error {delivered[dtype]:.3f} of the tolerance; "
            f"worst packed error of a mean {100 * of_mean[dtype]:.1f} % of the bound"
        )


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
