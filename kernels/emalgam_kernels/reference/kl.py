"""Divergences of Gaussians in plain NumPy: the specification of these kernels.

Each stack's means and matrices are C-contiguous, whatever the stride from one to the next; p and q have the same
covariance type, dtype and D. What is checked, and what is not: see `emalgam_kernels.reference.mixture`.
"""

from __future__ import annotations

import numpy as np

from emalgam_kernels import contract, polynomials
from emalgam_kernels.blocks import for_each_block
from emalgam_kernels.kl_blocks import (
    ASYMMETRY,
    FARTHEST,
    PAIRS_AT_ONCE,
    for_each_tile,
    guard,
    matrices_per_block,
    pairs_per_block,
    shift_of,
)
from emalgam_kernels.parameters import Gaussians


def precision_factors(covariances: np.ndarray, out: np.ndarray, n_threads: int = 1) -> int:
    """P_m, upper triangular with P Pᵀ = Σ⁻¹: what `Gaussians` holds as precisions_cholesky.

    Parameters
    ----------
    covariances : (M, D, D) float64 or float32
        Σ_m; only the lower triangles are read.
    out : (M, D, D) of that dtype
        Receives P_m, zeros below its diagonal; NaN where Σ_m is not positive definite.
    n_threads : int
        Threads to use; the result has the same bits for every number.

    Returns
    -------
    int
        The first m whose covariance is not positive definite (to rounding); −1 if all are.

    Notes
    -----
    Σ = L diag(pivots) Lᵀ is factorised in extended precision, since the last pivots are what little many subtractions
    leave; P = L⁻ᵀ diag(1 / √pivots). Backends may use plain arithmetic where it leaves enough digits: see PLAIN in
    `emalgam_kernels.kl_blocks`.
    """
    contract.precision_factors(covariances, out)
    failed: list[int] = []

    def block(start: int, stop: int) -> None:
        for first in range(start, stop, PAIRS_AT_ONCE):
            last = min(first + PAIRS_AT_ONCE, stop)
            out[first:last] = P = _precision_factors(covariances[first:last])
            wrong = np.flatnonzero(np.isnan(P).any(axis=(1, 2)))
            failed.extend(first + int(m) for m in wrong[:1])

    for_each_block(block, len(out), matrices_per_block(out.shape[1]), n_threads)
    return min(failed, default=-1)


def check_covariances(covariances: np.ndarray, n_threads: int = 1) -> int:
    """The first m whose Σ_m is not finite, symmetric and positive definite (both to rounding); −1 if there is none.

    Parameters
    ----------
    covariances : (M, D, D) float64 or float32
        Σ_m. Symmetric is |Σ_ij − Σ_ji| ≤ 1e-8 √(Σ_ii Σ_jj); positive definite is what `precision_factors` says.
    n_threads : int
        Threads to use.
    """
    contract.check_covariances(covariances)
    failed: list[int] = []

    def block(start: int, stop: int) -> None:
        for first in range(start, stop, PAIRS_AT_ONCE):
            part = covariances[first : min(first + PAIRS_AT_ONCE, stop)]
            with np.errstate(invalid="ignore"):
                size = np.sqrt(np.einsum("mii->mi", part))
                skew = np.abs(part - part.transpose(0, 2, 1))
                symmetric = skew <= part.dtype.type(ASYMMETRY) * size[:, :, None] * size[:, None, :]
            proper = symmetric.all(axis=(1, 2)) & ~np.isnan(_precision_factors(part)).any(axis=(1, 2))
            failed.extend(first + int(m) for m in np.flatnonzero(~proper)[:1])

    for_each_block(block, len(covariances), matrices_per_block(covariances.shape[1]), n_threads)
    return min(failed, default=-1)


def kl_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_m ‖ q_m) = ∫ p_m log (p_m / q_m), in nats, element by element.

    Parameters
    ----------
    p, q : Gaussians
        M each, of one covariance type and dtype, which is that of the arithmetic. Where precisions_cholesky is None,
        the covariances are factorised here.
    out : (M,) float64
        Receives the divergences: exactly 0 where p_m and q_m hold the same numbers, never negative. NaN where Σ_p or
        Σ_q is not positive definite and came without P.
    n_threads : int
        Threads to use; the result has the same bits for every number.

    Notes
    -----
    With P_q P_qᵀ = Σ_q⁻¹, E = P_qᵀ (Σ_p − Σ_q) P_q, whose eigenvalues are e, and δ = P_qᵀ (μ_p − μ_q):

        KL = ½ [ Σ (e − log(1 + e)) + ‖δ‖² ].

    No eigenvalue is computed: of I + E = L diag(1 + d) Lᵀ with unit lower triangular L,

        Σ (e − log(1 + e)) = tr E − log |I + E| = Σ_k (d_k − log(1 + d_k)) + Σ_{i>k} L_ik² (1 + d_k),

    in which no term is negative: a tiny divergence keeps its digits. With Σ_q positive definite, Σ_p is so too if and
    only if all 1 + d_k > 0; only distant covariances need a factor of Σ_p itself, for log |Σ_p|.

    Relative errors in float64: 1e-12 where KL ≥ 1e-3 and condition numbers are at most 1e4, 1e-7 down to 1e-12 where
    they are at most 100.

    References
    ----------
    Kullback (1959), Information Theory and Statistics, chapter 9.
    """
    contract.kl_pairs(p, q, out)

    def block(start: int, stop: int) -> None:
        for first in range(start, stop, PAIRS_AT_ONCE):
            index = np.arange(first, min(first + PAIRS_AT_ONCE, stop))
            out[index] = _divergences(p, q, index, index)

    for_each_block(block, len(out), pairs_per_block(p), n_threads)


def kl_all_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_i ‖ q_j) = −H(p_i) − ⟨η_q, E_p φ⟩ for all i and j, in nats, as one matrix product.

    Parameters
    ----------
    p, q : Gaussians
        M₁ and M₂, of one covariance type and dtype, which is that of the arithmetic; each with its
        precisions_cholesky, which serves many pairs: ValueError without.
    out : (M₁, M₂) float64
        Receives the divergences: exactly 0 where p_i and q_j hold the same numbers, never negative.
    n_threads : int
        Threads to use; the result has the same bits for every number.

    Notes
    -----
    A pair whose inner product may be off by more than 1e-12 relative (float32: 2²⁹ times that) is computed as in
    `kl_pairs`, with the same bits; see `emalgam_kernels.kl_blocks`.

    References
    ----------
    Nielsen and Nock (2010), Entropies and cross-entropies of exponential families.
    """
    contract.kl_all_pairs(p, q, out)
    shift, limit = shift_of(p, q), guard(p.means.dtype)

    def block(row: int, last_row: int, column: int, last_column: int) -> None:
        phi, size_of_p, negative_entropy = _expectations(p, slice(row, last_row), shift)
        natural, size_of_q = _naturals(q, slice(column, last_column), shift)
        divergence = phi @ -natural.T + negative_entropy[:, None]
        small = ~(divergence >= divergence.dtype.type(limit) * (size_of_p @ size_of_q.T))
        i, j = np.nonzero(small)
        for first in range(0, len(i), PAIRS_AT_ONCE):
            at = i[first : first + PAIRS_AT_ONCE], j[first : first + PAIRS_AT_ONCE]
            divergence[at] = _divergences(p, q, row + at[0], column + at[1])
        out[row:last_row, column:last_column] = divergence

    for_each_tile(block, len(p), len(q), n_threads)


# ---- P of covariances


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _precision_factors(covariances: np.ndarray) -> np.ndarray:
    """P (n, D, D) of the dtype of the covariances, NaN where one is not positive definite."""
    L, pivots = _factorize(covariances)
    P = (_inverse(L).transpose(0, 2, 1) / np.sqrt(pivots)[:, None]).astype(covariances.dtype)
    P[~((pivots > 0) & (pivots < np.inf)).all(axis=1)] = np.nan
    return P


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _factorize(covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit lower triangular L (n, D, D) and pivots (n, D), in long double: Σ = L diag(pivots) Lᵀ."""
    A = covariances.astype(np.longdouble)
    D = A.shape[1]
    for k in range(D):
        below = A[:, k + 1 :, k].copy()
        A[:, k + 1 :, k] /= A[:, k, k, None]
        A[:, k + 1 :, k + 1 :] -= below[:, :, None] * A[:, None, k + 1 :, k]
    L = np.tril(A, -1) + np.eye(D, dtype=A.dtype)
    return L, np.einsum("mii->mi", A)


@np.errstate(over="ignore", invalid="ignore")
def _inverse(L: np.ndarray) -> np.ndarray:
    """L⁻¹ of unit lower triangular matrices (n, D, D), row by row."""
    inverse = np.zeros_like(L)
    for i in range(L.shape[1]):
        inverse[:, i, i] = 1
        inverse[:, i, :i] = -(L[:, i : i + 1, :i] @ inverse[:, :i, :i])[:, 0]
    return inverse


# ---- pairs


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _divergences(p: Gaussians, q: Gaussians, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """KL(p_i ‖ q_j) for arrays of indices, (n,)."""
    factor = _factors(q, j)
    difference, m = p.covariances[i] - q.covariances[j], p.means[i] - q.means[j]
    half = factor.dtype.type(0.5)
    if p.covariance_type == "diag":
        e, delta = difference * factor * factor, m * factor
        # Where 1 + e has lost digits it is σ_p² P_q².
        ratio = np.where(e < -half, p.covariances[i] * factor * factor, e + 1)
        terms = np.where(ratio > 0, _excess(e, ratio) + delta * delta, np.nan)
        return half * terms.sum(axis=1, dtype=e.dtype)
    E = factor.transpose(0, 2, 1) @ (difference @ factor)
    delta = np.einsum("nij,ni->nj", factor, m)
    close = _close(E.copy())
    logs = _log_determinant(_factors(p, i)) - _log_determinant(factor)
    terms = np.where(close <= FARTHEST, close, np.einsum("nii->n", E) + 2 * logs)
    return half * (terms + np.einsum("ni,ni->n", delta, delta))


def _close(E: np.ndarray) -> np.ndarray:
    """tr E − log |I + E|, (n, D, D) → (n,), from I + E = L diag(1 + d) Lᵀ; inf if a pivot 1 + d is not positive.

    Overwrites E. d has all the digits of E: 1 is not added before the end.
    """
    total = np.zeros(len(E), E.dtype)
    for k in range(E.shape[1]):
        d = E[:, k, k]
        below = E[:, k + 1 :, k].copy()
        column = below / (d + 1)[:, None]
        E[:, k + 1 :, k + 1 :] -= below[:, :, None] * column[:, None, :]
        total += np.where(d > -1, _excess(d, d + 1), np.inf) + np.einsum("ni,ni->n", below, column)
    return total


def _excess(d: np.ndarray, x: np.ndarray) -> np.ndarray:
    """d − log(x), where x is 1 + d and d may hold more digits.

    With s = d / (2 + d), z = s² and log(1 + d) = 2 s + s z p(z), and as d − 2 s = s d, it is s (d − z p(z)) for
    √½ ≤ x < √2, the range of the polynomial p: nothing cancels.
    """
    s = d / (d + 2)
    z = s * s
    p = np.zeros_like(d)
    for coefficient in polynomials.LOG[d.dtype.name]:
        p = p * z + d.dtype.type(coefficient)
    return np.where((x >= np.sqrt(0.5)) & (x < np.sqrt(2.0)), s * (d - z * p), d - np.log(x))


def _factors(gaussians: Gaussians, index: np.ndarray | slice) -> np.ndarray:
    """P of the chosen ones, computed if it was not given: NaN where Σ is not positive definite."""
    if gaussians.precisions_cholesky is not None:
        return gaussians.precisions_cholesky[index]
    covariances = gaussians.covariances[index]
    if gaussians.covariance_type == "full":
        return _precision_factors(covariances)
    return np.where(covariances > 0, 1 / np.sqrt(covariances), covariances.dtype.type(np.nan))


def _log_determinant(factor: np.ndarray) -> np.ndarray:
    """Σ_i log P_ii = −½ log |Σ|."""
    diagonal = np.einsum("mii->mi", factor) if factor.ndim == 3 else factor
    return np.log(diagonal).sum(axis=1)


# ---- all pairs: F features for the divergence, and D + 2 for the size B of its terms (see kl_blocks)


def _expectations(p: Gaussians, rows: slice, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E_p φ, what B takes of p, and −H_p up to a constant: (n, F), (n, D + 2), (n,).

    φ is that of `emalgam_kernels.parameters.statistic_count`, about `shift`: Σ_ij + m_i m_j, m, 1.
    """
    m, covariance, logs = p.means[rows] - shift, p.covariances[rows], _log_determinant(_factors(p, rows))
    one = np.ones((len(m), 1), m.dtype)
    if p.covariance_type == "diag":
        second = diagonal = covariance + m * m
    else:
        i, j = np.tril_indices(p.n_features)
        second = covariance[:, i, j] + m[:, i] * m[:, j]
        diagonal = second[:, i == j]
    size = np.hstack([diagonal, one, np.abs(logs)[:, None]])
    return np.hstack([second, m, one]), size, logs - m.dtype.type(p.n_features / 2)


def _naturals(q: Gaussians, columns: slice, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """η_q, and what B takes of q: (n, F) and (n, D + 2).

    With Λ = P Pᵀ: −½ Λ_ii and −Λ_ij (i > j), Λ m, −½ mᵀ Λ m − ½ log |Σ|, up to the constant that −H_p lacks too.
    """
    m, factor = q.means[columns] - shift, _factors(q, columns)
    logs = _log_determinant(factor)
    half = m.dtype.type(0.5)
    if q.covariance_type == "diag":
        precision = diagonal = factor * factor
        linear, quadratic = precision * m, -half * precision
    else:
        precision = factor @ factor.transpose(0, 2, 1)
        i, j = np.tril_indices(q.n_features)
        diagonal, linear = np.einsum("mii->mi", precision), np.einsum("mij,mj->mi", precision, m)
        quadratic = precision[:, i, j] * np.where(i == j, -half, -2 * half)
    constant = logs - half * np.einsum("mi,mi->m", linear, m)
    size = np.einsum("mi,mi->m", diagonal, m * m) + np.abs(logs) + m.dtype.type(q.n_features)
    one = np.ones_like(size)
    return np.hstack([quadratic, linear, constant[:, None]]), np.hstack([diagonal, size[:, None], one[:, None]])
