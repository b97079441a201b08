"""A batched EM in plain torch on the CPU, written as well as torch allows: what `emalgam.fit_many` is measured beside.

All problems of a chunk at once, in float64: Φ (B, N, F) is made once, an iteration is two batched products, a softmax
and batched Cholesky factors of the covariances, all in place where torch has such a form.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from bench.peers import load_torch

ELEMENTS_OF_A_CHUNK: Final = 2**17  # numbers of Φ that are worked on at once: they stay in the cache


def em(x: np.ndarray, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray, iterations: int) -> np.ndarray:
    """Σ log p of each problem after `iterations` from the given parameters, (B,).

    x is (B, N, D), the parameters are as in `emalgam.ManyFits`, without NaN. What is added to covariances is emalgam's
    default: 1e-6 of each feature's variance.
    """
    torch = load_torch()
    B, N, D = x.shape
    step = max(ELEMENTS_OF_A_CHUNK // (N * (D + 1) * (D + 2) // 2), 1)
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in (x, weights, means, covariances)]
    found = [_em(torch, [part[b : b + step] for part in parts], iterations) for b in range(0, B, step)]
    return np.concatenate([each.numpy() for each in found])


def _em(torch: Any, parts: list[Any], iterations: int) -> Any:
    x, w, mu, sigma = parts
    B, N, D = x.shape
    shift = x.mean(dim=1, keepdim=True)
    z, mu = x - shift, mu - shift
    floor = 1e-6 * (z * z).mean(dim=1)
    i, j = torch.tril_indices(D, D)
    phi = torch.cat([z[:, :, i] * z[:, :, j], z, torch.ones_like(z[:, :, :1])], dim=2)
    doubled = torch.where(i == j, 1.0, 2.0).to(x.dtype)
    logits = torch.empty((B, N, w.shape[1]), dtype=x.dtype)
    for _ in range(iterations):
        torch.bmm(phi, _natural(torch, w, mu, sigma, (i, j), doubled).transpose(1, 2), out=logits)
        torch.softmax(logits, dim=2, out=logits)
        s = torch.bmm(logits.transpose(1, 2), phi)
        mass = s[:, :, -1:]
        w, mu = mass[:, :, 0] / N, s[:, :, -1 - D : -1] / mass
        sigma = torch.empty((*w.shape, D, D), dtype=x.dtype)
        sigma[:, :, i, j] = s[:, :, : -1 - D] / mass - mu[:, :, i] * mu[:, :, j]
        sigma[:, :, j, i] = sigma[:, :, i, j]
        sigma.diagonal(dim1=2, dim2=3).add_(floor[:, None])
    torch.bmm(phi, _natural(torch, w, mu, sigma, (i, j), doubled).transpose(1, 2), out=logits)
    return torch.logsumexp(logits, dim=2).sum(dim=1)


def _natural(torch: Any, w: Any, mu: Any, sigma: Any, triangle: tuple[Any, Any], doubled: Any) -> Any:
    """η (B, K, F): −½ Λ with off-diagonals doubled, Λ μ, and log w − ½ μᵀ Λ μ − ½ log |Σ| − ½ D log 2π."""
    lower = torch.linalg.cholesky(sigma)
    precision = torch.cholesky_inverse(lower)
    linear = (precision @ mu[..., None])[..., 0]
    log_det = lower.diagonal(dim1=2, dim2=3).log().sum(dim=2)
    constant = w.log() - 0.5 * (linear * mu).sum(dim=2) - log_det - 0.5 * mu.shape[2] * math.log(2 * math.pi)
    quadratic = -0.5 * doubled * precision[:, :, triangle[0], triangle[1]]
    return torch.cat([quadratic, linear, constant[..., None]], dim=2)
