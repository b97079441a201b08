"""The M-step of many fits: weights, means and covariances from statistics, and what the next E-step needs of them."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from emalgam_kernels.batch import LIFTS, NO_MASS, RELATIVE_FLOOR, ROUNDING
from emalgam_kernels.numba_cpu.batch_matrices import (
    copy_matrix,
    divide,
    dot,
    factorize,
    invert,
    multiply,
    symmetric_product,
)
from emalgam_kernels.numba_cpu.batch_memory import (
    ADDED,
    EXTENT,
    FLOOR,
    INNER,
    PIVOT,
    SPLICED,
    Components,
    Frame,
    Rules,
    Scratch,
    Work,
)
from emalgam_kernels.numba_cpu.tiles import FULL, LINEAR, compiled, constant, fill_row, quadratic_count

HALF_LOG_2_PI: Final = 0.5 * math.log(2 * math.pi)
FAILED, LIFTED, NARROW, BROAD = map(constant, range(4))  # what became of a covariance


class Verdict(NamedTuple):
    """What an M-step came to."""

    fine: bool  # there are components
    collapsed: bool
    cancellation: float  # how large the terms of ⟨η, φ(z)⟩ are near a component; infinite if a covariance was lifted
    common: float  # what the packed logits of all components lack, summed: −½ ⟨Λ, Σ ω z zᵀ⟩ if Λ is shared


@compiled(SPLICED)
def maximize(rules: Rules, work: Work, K: int, old: int, new: int, centred: bool) -> Verdict:
    """w_k = N_k / N, μ_k and Σ_k from the statistics of a pass; Bishop (2006), eq. 9.24-9.26.

    A component without data stays where it was, without weight.
    """
    frame, components, scratch = work.frame, work.components, work.scratch
    statistics = scratch.centred_statistics if centred else scratch.statistics
    first = quadratic_count(rules.direct_map if centred else rules.packed_map, components.means.shape[2])
    collapsed = move(components, statistics, scratch.mass, first, K, old, new, centred)
    fine, lifted = True, False
    if rules.shared:
        estimate_shared(frame, scratch.mass, statistics, first, K, centred, components.covariances[new, 0])
    for c in range(1 if rules.shared else K):
        covariance, factor = components.covariances[new, c], components.factors[new, c]
        if not rules.shared and scratch.mass[c] == 0:
            copy_matrix(components.covariances[old, c], covariance)
            copy_matrix(components.factors[old, c], factor)
            continue
        if not rules.shared:
            estimate(rules, statistics[c], scratch.mass[c], first, covariance)
        outcome = regularize(frame, covariance, scratch.lower)
        fine &= outcome != FAILED
        lifted |= outcome == LIFTED
        collapsed |= outcome in (LIFTED, NARROW) and not rules.shared
        invert(scratch.lower, factor)
    cancellation = express(rules, frame, components, scratch, K, new)
    common = -0.5 * symmetric_product(scratch.precision, frame.scatter[0]) if rules.shared else 0.0
    return Verdict(fine, collapsed, np.inf if lifted else cancellation, common)


# ---- from statistics to parameters -----------------------------------------------------------------------------------


@compiled(INNER)
def move(
    components: Components,
    statistics: np.ndarray,
    mass: np.ndarray,
    first: int,
    K: int,
    old: int,
    new: int,
    centred: bool,
) -> bool:
    """Mass, weights and means of the new components; returns whether one is without data, whose mass becomes zero."""
    total, empty = 0.0, False
    for k in range(K):
        mass[k] = statistics[k, first + components.means.shape[2]]
        total += mass[k]
    for k in range(K):
        if mass[k] <= NO_MASS * total:
            mass[k], empty = 0.0, True
        components.weights[new, k] = mass[k] / total
        for d in range(components.means.shape[2]):
            centre = components.means[old, k, d] if centred or mass[k] == 0 else 0.0
            components.means[new, k, d] = centre + (statistics[k, first + d] / mass[k] if mass[k] > 0 else 0.0)
    return empty


@compiled(INNER)
def estimate(rules: Rules, statistics: np.ndarray, mass: float, first: int, out: np.ndarray) -> None:
    """Σ r (z − a)(z − a)ᵀ / N_k − δδᵀ with δ = Σ r (z − a) / N_k, about whatever centre a."""
    H, D = out.shape
    offset, squares = statistics[first : first + D], 0.0
    if rules.isotropic:  # (Σ r ‖z − a‖² / N_k − ‖δ‖²) / D
        for i in range(first):
            squares += statistics[i] / mass
        for i in range(D):
            squares -= (offset[i] / mass) * (offset[i] / mass)
        for i in range(D):
            out[0, i] = squares / D
        return
    divide(rules, statistics, mass, out)
    for i in range(D):
        row = min(i, H - 1)
        for j in range(0 if H == D else i, D if H == D else i + 1):
            out[row, j] -= (offset[i] / mass) * (offset[j] / mass)


@compiled(INNER)
def estimate_shared(
    frame: Frame, mass: np.ndarray, statistics: np.ndarray, first: int, K: int, centred: bool, out: np.ndarray
) -> None:
    """(Σ_n ω z zᵀ − Σ_k N_k δ_k δ_kᵀ) / Σ_k N_k; about the centres the first term is summed over components."""
    total = 0.0
    for k in range(K):
        total += mass[k]
    for i in range(len(out)):
        for j in range(i + 1):
            f = i * (i + 1) // 2 + j
            second = 0.0 if centred else frame.scatter[0, f]
            for k in range(K):
                if mass[k] > 0:
                    second += statistics[k, f] if centred else 0.0
                    second -= statistics[k, first + i] * (statistics[k, first + j] / mass[k])
            out[i, j] = out[j, i] = second / total


@compiled(INNER)
def singular(frame: Frame, covariance: np.ndarray, times: float, lower: np.ndarray) -> bool:
    """Whether some pivot, what the other features leave of a variance, or of the spread of all samples, is rounding."""
    added, floor, found = frame.rows[ADDED], frame.rows[FLOOR], False
    for i in range(len(floor)):
        row = min(i, len(covariance) - 1)
        variance = covariance[row, i] + (added[i] + times * floor[i])
        found |= lower[row, i] * lower[row, i] <= ROUNDING * max(variance, ROUNDING * floor[i] / RELATIVE_FLOOR)
    return found


@compiled(INNER)
def regularize(frame: Frame, covariance: np.ndarray, lower: np.ndarray) -> int:
    """Σ + diag(added), with as many floors as it takes to be positive definite; its L; and what became of it.

    It was lifted if it took any floor, and is narrow if, given the features before it, some feature varies less than
    the floor, and less than it does in all samples together.
    """
    added, floor, pivots = frame.rows[ADDED], frame.rows[FLOOR], frame.rows[PIVOT]
    for times in LIFTS:
        if factorize(covariance, added, floor, times, lower) and not singular(frame, covariance, times, lower):
            narrow = False
            for i in range(len(floor)):
                row, least = min(i, len(covariance) - 1), added[i] + floor[i]
                covariance[row, i] += added[i] + times * floor[i]
                narrow |= lower[row, i] * lower[row, i] < least and pivots[i] > 2 * least
            return LIFTED if times > 0 else NARROW if narrow else BROAD
    return FAILED


# ---- what the E-step needs -------------------------------------------------------------------------------------------


@compiled(INNER)
def log_constant(weight: float, factor: np.ndarray, H: int, D: int) -> float:
    """log w + log |L⁻¹| − ½ D log 2π."""
    value = np.log(weight) - D * HALF_LOG_2_PI
    for i in range(D):
        value += np.log(factor[min(i, H - 1), i])
    return float(value)


@compiled(INNER)
def pack(
    packed_map: int, precision: np.ndarray, factor: np.ndarray, mean: np.ndarray, offset: float, natural: np.ndarray
) -> None:
    """η = (−½ Λ_ii, −Λ_ij, Λμ, offset − ½ ‖L⁻¹μ‖²) in the order of the feature map."""
    H, D = precision.shape
    first = quadratic_count(packed_map, D)
    fill_row(natural[first:], D, 0)
    for i in range(D):
        row, start = min(i, H - 1), 0 if H == D else i
        whitened = dot(factor[row, start:], mean[start:], i + 1 - start)
        offset -= 0.5 * whitened * whitened
        for j in range(start, i + 1):
            natural[first + j] += factor[row, j] * whitened
    natural[first + D] = offset
    if packed_map == FULL:
        for i in range(D):
            for j in range(i + 1):
                natural[i * (i + 1) // 2 + j] = -precision[i, j] if j < i else -0.5 * precision[i, i]
    elif packed_map != LINEAR:
        for i in range(first):
            natural[i] = -0.5 * precision[0, i]


@compiled(INNER)
def size_of_terms(precision: np.ndarray, size: np.ndarray) -> float:
    """Σ_ij |Λ_ij| s_i s_j: how large the terms of ⟨η, φ(z)⟩ are where |z_i| is about s_i."""
    H, D = precision.shape
    total = 0.0
    for i in range(D):
        row = min(i, H - 1)
        for j in range(i if H == D else 0):
            total += 2 * abs(precision[i, j]) * size[i] * size[j]
        total += precision[row, i] * size[i] * size[i]
    return total


@compiled(INNER)
def express(rules: Rules, frame: Frame, components: Components, scratch: Scratch, K: int, side: int) -> float:
    """Constants, natural parameters and terms from weights, means and factors; returns the largest cancellation."""
    precision, size, D, most = scratch.precision, scratch.vector, components.means.shape[2], 0.0
    for k in range(K):
        c = min(k, components.factors.shape[1] - 1)
        factor, mean, weight = components.factors[side, c], components.means[side, k], components.weights[side, k]
        covariance = components.covariances[side, c]
        if c == k:
            multiply(factor, precision)
        offset = log_constant(weight, factor, len(precision), D)
        components.log_constants[side, k] = offset
        pack(rules.packed_map, precision, factor, mean, offset, components.natural[side, k])
        components.terms[side, k] = np.inf
        if weight > 0:
            for i in range(D):  # near the component
                size[i] = math.sqrt(covariance[min(i, len(covariance) - 1), i] + mean[i] * mean[i])
            terms = size_of_terms(precision, size) + D + 2
            most = most if terms <= most else terms  # NaN is the largest
            components.terms[side, k] = size_of_terms(precision, frame.rows[EXTENT]) / weight
    return most


@compiled(INNER)
def begin(frame: Frame, components: Components, K: int, side: int) -> None:
    """Before the first M-step: independent features with the variances of all samples."""
    for c in range(min(K, components.covariances.shape[1])):
        covariance, factor = components.covariances[side, c], components.factors[side, c]
        for i in range(frame.rows.shape[1]):
            row, variance = min(i, len(covariance) - 1), frame.rows[FLOOR, i] / RELATIVE_FLOOR
            if row == i:
                fill_row(covariance[i], len(covariance), 0)
                fill_row(factor[i], len(covariance), 0)
            covariance[row, i], factor[row, i] = variance, 1 / math.sqrt(variance)
