"""What the backends share for the kernels `kl`: the grid of blocks, the frame of all pairs, and their guard.

All pairs are one inner product each, ``KL(p ‖ q) = −H_p − ⟨η_q, E_p φ⟩``, whose terms are as large as

    B = Σ_i Λ_q,ii (Σ_p,ii + m_p,i² + m_q,i²) + |½ log |Σ_p|| + |½ log |Σ_q|| + D,     Λ_q = Σ_q⁻¹,  m = μ − shift:

|Λ_ij M_ij| ≤ √(Λ_ii Λ_jj M_ii M_jj), whose squares, summed over i and j, are (Σ_i Λ_ii M_ii)². A divergence that is
small beside B has lost digits, and is computed again from the two Gaussians themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from emalgam_kernels.blocks import FLOP_PER_BLOCK, for_each_block
from emalgam_kernels.parameters import Gaussians

PAIRS_AT_ONCE: Final = 64  # blocks of pairs are multiples of it: every backend's tiles stay whole
MOST_PAIRS: Final = 16384
ROWS_OF_A_BLOCK: Final = 512  # all pairs: preparing one Gaussian costs as much as some ten of its products
COLUMNS_OF_A_BLOCK: Final = 512

# The relative error that all pairs keep to; that of float32 is as many times larger as its eps.
RELATIVE_ERROR: Final = {"float64": 1e-12, "float32": 1e-12 * 2**29}
# The error of the inner product in units of eps · B: 5 was the largest seen for D = 1 … 64 and conditions up to 1e4,
# where the pair form can tell.
ROUNDING: Final = 8.0

# Pairs: what the covariances contribute to 2 KL is Σ (e − log(1 + e)) over the eigenvalues e of E up to here, and
# tr E + log |Σ_q| − log |Σ_p| beyond, where an eigenvalue of I + E may be so small that its factors have lost digits.
FARTHEST: Final = 1.0

# P in plain arithmetic has Pᵀ Σ P = I to eps times Σ_i Σ_ii (Σ⁻¹)_ii, the sum of the variance inflation factors (0.8 of
# that was the largest seen for D = 2 … 16 and conditions up to 1e4). Up to these sums that is 4e-14 and 3e-6; beyond,
# Σ is factorised in twice the precision.
PLAIN: Final = {"float64": 256.0, "float32": 32.0}

# How far, in standard deviations of i and j, Σ_ij and Σ_ji may differ by rounding.
ASYMMETRY: Final = 1e-8


def pairs_per_block(p: Gaussians) -> int:
    """Pairs of one block of `kl_pairs`: a multiple of `PAIRS_AT_ONCE`."""
    return matrices_per_block(p.n_features) if p.covariance_type == "full" else MOST_PAIRS


def matrices_per_block(n_features: int) -> int:
    """The same where D × D matrices are multiplied or factorised."""
    flop = 2 * n_features**3 + 12 * n_features**2 + 100 * n_features
    return min(max(FLOP_PER_BLOCK // flop // PAIRS_AT_ONCE, 1) * PAIRS_AT_ONCE, MOST_PAIRS)


def for_each_tile(block: Callable[[int, int, int, int], None], n_rows: int, n_columns: int, n_threads: int) -> None:
    """Call ``block(first row, last row + 1, first column, last column + 1)`` for every block of an (M₁, M₂) result."""
    across = -(-n_columns // COLUMNS_OF_A_BLOCK)

    def tile(index: int, _: int) -> None:
        row, column = index // across * ROWS_OF_A_BLOCK, index % across * COLUMNS_OF_A_BLOCK
        block(row, min(row + ROWS_OF_A_BLOCK, n_rows), column, min(column + COLUMNS_OF_A_BLOCK, n_columns))

    for_each_block(tile, -(-n_rows // ROWS_OF_A_BLOCK) * across, 1, n_threads)


def shift_of(p: Gaussians, q: Gaussians) -> np.ndarray:
    """The mean of all means, (D,) of the stacks' dtype: the origin in which E φ and η are formed.

    A scale of a power of two would change no digit of any product: the frame does without.
    """
    total = p.means.sum(axis=0, dtype=np.float64) + q.means.sum(axis=0, dtype=np.float64)
    return np.ascontiguousarray(total / max(len(p) + len(q), 1), dtype=p.means.dtype)


def guard(dtype: np.dtype) -> float:
    """A divergence below this multiple of B is computed again."""
    return float(ROUNDING * np.finfo(dtype).eps / RELATIVE_ERROR[dtype.name])
