"""The loop of `kl_monte_carlo` on a CPU: tiles of samples that stay in the cache, and their sums in a fixed order.

Backends bring their own samples and log-densities. Nothing grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from emalgam_kernels.blocks import sum_in_order

TILE_BYTES: Final = 2**18  # a quarter of the second-level cache
FEWEST_ROWS: Final = 512
MOST_ROWS: Final = 8192
MOST_PAIRS: Final = 64  # of a block: enough beside a hand-over, few enough that threads share a small stack
SUMS: Final = 2
SUMS_WITH_CONTROL: Final = 5


def rows_per_tile(n_features: int) -> int:
    """Samples that are drawn at once: a multiple of 512 that follows from D alone, as the order of the sums does."""
    return min(max(TILE_BYTES // (8 * n_features) // 512 * 512, FEWEST_ROWS), MOST_ROWS)


def sum_log_ratios(
    log_densities: Callable[[slice, int, np.ndarray], None],
    n_densities: int,
    n_features: int,
    n: int,
    out: np.ndarray,
    n_threads: int,
) -> None:
    """Sums over n samples of d = log p − log q, and of c for the control if there is one, for each pair of a stack.

    A block is some samples of some pairs: few samples of many, or a tile of one. Which ones follows from B, n and D
    alone, and the sums of a pair from n and D.

    Parameters
    ----------
    log_densities : callable
        ``log_densities(pairs, start, logs)`` evaluates the densities of some pairs at samples [start, start + rows) of
        each pair, into (densities, pairs, rows) float64.
    n_densities : int
        2: p and q; 4: and those of the control.
    n_features : int
        D.
    n : int
        Samples to draw for each pair.
    out : (B, 2) or (B, 5) float64
        Receives Σ d, Σ d², and with a control Σ c, Σ c², Σ d c.
    n_threads : int
        The result has the same bits for every number.
    """
    rows = rows_per_tile(n_features)
    pairs = min(max(MOST_ROWS // max(min(rows, n), 1), 1), MOST_PAIRS)
    tiles = -(-n // rows)
    spare: list[np.ndarray] = []

    def pairs_of(index: int) -> slice:
        start = index // tiles * pairs
        return slice(start, min(start + pairs, len(out)))

    def block(index: int, sums: np.ndarray) -> float:
        start = index % tiles * rows
        shape = n_densities, len(sums), min(rows, n - start)
        try:
            memory = spare.pop()
        except IndexError:
            memory = np.empty(n_densities * pairs * min(rows, n))
        logs = memory[: np.prod(shape)].reshape(shape)
        log_densities(pairs_of(index), start, logs)
        _add_sums(logs, sums)
        spare.append(memory)
        return 0.0

    out[...] = 0.0
    sum_in_order(block, lambda index: out[pairs_of(index)], tiles * -(-len(out) // pairs), n_threads)


def _add_sums(logs: np.ndarray, sums: np.ndarray) -> None:
    """Σ d, Σ d² (and Σ c, Σ c², Σ d c) by NumPy's pairwise sums: their order follows from the count alone."""
    d = logs[0] - logs[1]
    sums[:, 0] += d.sum(axis=1)
    sums[:, 1] += np.square(d).sum(axis=1)
    if len(logs) > SUMS:
        c = logs[2] - logs[3]
        sums[:, 2] += c.sum(axis=1)
        sums[:, 3] += np.square(c).sum(axis=1)
        sums[:, 4] += (d * c).sum(axis=1)


def one_by_one(
    sample: Callable[[int, int, np.ndarray, np.ndarray], None],
    log_prob: Callable[[int, int, np.ndarray, np.ndarray], None],
    n_features: int,
    dtype: str,
) -> Callable[[slice, int, np.ndarray], None]:
    """`log_densities` of a backend that goes through the pairs one after the other.

    Parameters
    ----------
    sample : callable
        ``sample(pair, start, x, labels)`` draws samples [start, start + len(x)) of a pair.
    log_prob : callable
        ``log_prob(density, pair, x, out)``.
    n_features : int
        D.
    dtype : {"float32", "float64"}
        Of the samples.
    """

    def log_densities(pairs: slice, start: int, logs: np.ndarray) -> None:
        rows = logs.shape[2]
        x, labels = np.empty((rows, n_features), dtype), np.empty(rows, np.int64)
        for place, pair in enumerate(range(pairs.start, pairs.stop)):
            sample(pair, start, x, labels)
            for density, log_p in enumerate(logs[:, place]):
                log_prob(density, pair, x, log_p)

    return log_densities
