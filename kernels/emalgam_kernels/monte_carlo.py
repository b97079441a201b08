"""The loop of `kl_monte_carlo` on a CPU: tiles of samples that stay in the cache, and their sums in a fixed order.

Backends bring their own `sample_mixture` and `log_prob`. Nothing grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from emalgam_kernels.blocks import sum_over_blocks
from emalgam_kernels.parameters import Direct, Packed

TILE_BYTES: Final = 2**18  # a quarter of the second-level cache
FEWEST_ROWS: Final = 512
MOST_ROWS: Final = 8192
SUMS: Final = 2
SUMS_WITH_CONTROL: Final = 5

Parameters = Packed | Direct


def rows_per_tile(n_features: int) -> int:
    """Samples that are drawn at once: a multiple of 512 that follows from D alone, as the order of the sums does."""
    return min(max(TILE_BYTES // (8 * n_features) // 512 * 512, FEWEST_ROWS), MOST_ROWS)


class _Tile:
    """Samples, labels and log-densities of one tile."""

    def __init__(self, rows: int, n_features: int, dtype: str) -> None:
        self.x = np.empty((rows, n_features), dtype)
        self.labels = np.empty(rows, np.int64)
        self.log_p, self.log_q = np.empty(rows), np.empty(rows)


def sum_log_ratios(
    sample: Callable[[int, np.ndarray, np.ndarray], None],
    log_prob: Callable[[np.ndarray, Any, np.ndarray], None],
    n_features: int,
    pairs: tuple[tuple[Parameters, Parameters], ...],
    n: int,
    out: np.ndarray,
    n_threads: int,
) -> None:
    """Sums over n samples of d = log p − log q for the first pair, and c for the second if there is one.

    Parameters
    ----------
    sample : callable
        ``sample(start, x, labels)`` draws samples [start, start + len(x)).
    log_prob : callable
        The backend's `log_prob`.
    n_features : int
        D.
    pairs : (p, q), or (p, q) and the control's
        Samples have the dtype of the first one's arithmetic.
    n : int
        Samples to draw.
    out : (2,) or (5,) float64
        Receives Σ d, Σ d², and with a control Σ c, Σ c², Σ d c.
    n_threads : int
        The result has the same bits for every number.
    """
    rows, dtype = rows_per_tile(n_features), pairs[0][0].arithmetic
    spare: list[_Tile] = []

    def block(start: int, stop: int, sums: np.ndarray) -> float:
        try:
            tile = spare.pop()
        except IndexError:
            tile = _Tile(rows, n_features, dtype)
        count = stop - start
        x, log_p, log_q = tile.x[:count], tile.log_p[:count], tile.log_q[:count]
        sample(start, x, tile.labels[:count])
        ratios = []
        for p, q in pairs:
            log_prob(x, p, log_p)
            log_prob(x, q, log_q)
            ratios.append(log_p - log_q)
        _add_sums(ratios, sums)
        spare.append(tile)
        return 0.0

    whole = np.empty(SUMS_WITH_CONTROL)
    sum_over_blocks(block, n, rows, whole, n_threads)
    out[...] = whole[: len(out)]


def _add_sums(ratios: list[np.ndarray], sums: np.ndarray) -> None:
    """Σ d, Σ d² (and Σ c, Σ c², Σ d c) by NumPy's pairwise sums: their order follows from the count alone."""
    d = ratios[0]
    sums[:2] += d.sum(), np.square(d).sum()
    for c in ratios[1:]:
        sums[2:] += c.sum(), np.square(c).sum(), (d * c).sum()
