"""Data that the tests of several layers fit."""

from __future__ import annotations

import numpy as np


def blobs(N: int = 1500, D: int = 3, K: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated clusters, and their centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(K, D)) * 4
    shapes = rng.normal(size=(K, D, D)) * 0.2 + np.eye(D)
    labels = rng.integers(0, K, N)
    return centres[labels] + np.einsum("nij,nj->ni", shapes[labels], rng.normal(size=(N, D))), centres


def start(centres: np.ndarray, covariance_type: str) -> dict[str, np.ndarray]:
    """Complete initial parameters, so that two libraries begin at the same point."""
    K, D = centres.shape
    precisions = {
        "full": np.tile(np.eye(D), (K, 1, 1)),
        "tied": np.eye(D),
        "diag": np.ones((K, D)),
        "spherical": np.ones(K),
    }[covariance_type]
    return {"weights_init": np.full(K, 1 / K), "means_init": centres + 0.3, "precisions_init": precisions}
