"""Covariances of many fits, their Cholesky factors and the inverses of these: matrices (D, D), or rows (1, D).

L and L⁻¹ are lower triangles.
"""

from __future__ import annotations

import math

import numpy as np

from emalgam_kernels.numba_cpu.batch_memory import INNER, INNER_REDUCTION, Rules
from emalgam_kernels.numba_cpu.tiles import FULL, compiled, copy_row, fill_row


@compiled(INNER_REDUCTION)
def dot(a: np.ndarray, b: np.ndarray, count: int) -> float:
    """Σ_i a_i b_i."""
    total = 0.0
    for i in range(count):
        total += a[i] * b[i]
    return total


@compiled(INNER)
def factorize(matrix: np.ndarray, added: np.ndarray, floor: np.ndarray, times: float, lower: np.ndarray) -> bool:
    """L with L Lᵀ = matrix + diag(added + times · floor); False if that is not positive definite."""
    H, D = matrix.shape
    for i in range(D):
        row = min(i, H - 1)
        pivot = matrix[row, i] + (added[i] + times * floor[i])
        if H == D:
            for j in range(i):
                lower[i, j] = (matrix[i, j] - dot(lower[i], lower[j], j)) / lower[j, j]
            pivot -= dot(lower[i], lower[i], i)
        if not pivot > 0:
            return False
        lower[row, i] = math.sqrt(pivot)
    return True


@compiled(INNER)
def invert(lower: np.ndarray, factor: np.ndarray) -> None:
    """factor ← L⁻¹: row i is (e_i − Σ_{j<i} L_ij row j) / L_ii."""
    H, D = lower.shape
    for i in range(D):
        row = min(i, H - 1)
        inverse = 1 / lower[row, i]
        if H == D:
            fill_row(factor[i], i, 0)
            for j in range(i):
                scaled = lower[i, j] * inverse
                for m in range(j + 1):
                    factor[i, m] -= scaled * factor[j, m]
        factor[row, i] = inverse


@compiled(INNER)
def multiply(factor: np.ndarray, precision: np.ndarray) -> None:
    """Lower triangle of Λ ← L⁻ᵀ L⁻¹: the sum over rows of L⁻¹ of rowᵀ row."""
    H, D = precision.shape
    if H < D:
        for i in range(D):
            precision[0, i] = factor[0, i] * factor[0, i]
        return
    for row in range(D):
        fill_row(precision[row], row + 1, 0)
        for i in range(row + 1):
            left = factor[row, i]
            for j in range(i + 1):
                precision[i, j] += left * factor[row, j]


@compiled(INNER)
def symmetric_product(lower: np.ndarray, packed: np.ndarray) -> float:
    """⟨A, B⟩ of two symmetric matrices: the lower triangle of A, and that of B row by row."""
    total = 0.0
    for i in range(len(lower)):
        start = i * (i + 1) // 2
        total += 2 * dot(lower[i], packed[start:], i) + lower[i, i] * packed[start + i]
    return total


# ---- what makes them -------------------------------------------------------------------------------------------------


@compiled(INNER)
def average(row: np.ndarray, count: int) -> None:
    """Every entry ← the mean of all."""
    total = 0.0
    for d in range(count):
        total += row[d]
    for d in range(count):
        row[d] = total / count


@compiled(INNER)
def divide(rules: Rules, second: np.ndarray, mass: float, out: np.ndarray) -> None:
    """out ← second / mass, a matrix or a row; averaged over features if there is one variance for all."""
    D = out.shape[1]
    if rules.direct_map == FULL:
        for i in range(D):
            for j in range(i + 1):
                out[i, j] = out[j, i] = second[i * (i + 1) // 2 + j] / mass
        return
    for i in range(D):
        out[0, i] = second[i] / mass
    if rules.isotropic:
        average(out[0], D)


@compiled(INNER)
def copy_matrix(matrix: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(matrix)):
        copy_row(matrix[i], matrix.shape[1], out[i])
