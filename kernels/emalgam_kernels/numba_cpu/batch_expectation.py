"""The E-step of many fits: a pass over the tiles of a problem, from logits to statistics."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from emalgam_kernels.numba_cpu.batch_memory import (
    INNER,
    INNER_REDUCTION,
    SPLICED,
    Frame,
    Problem,
    Rules,
    Samples,
    Tiles,
    Work,
    rows_of,
    visit,
    whole,
)
from emalgam_kernels.numba_cpu.tiles import (
    DIAG,
    compiled,
    constant,
    copy_row,
    direct_logit_tile,
    direct_statistic_tile,
    exp,
    fill_row,
    inner_product,
    log,
    packed_logit_tile,
    packed_statistic_tile,
    softmax_tile,
)

# Logits by distance to the seeds; ⟨η_k − η_c, φ(z)⟩ for all components but one; ⟨η, φ(z)⟩; about each own mean.
START, RELATIVE, PACKED, DIRECT = map(constant, range(4))
DIAGONAL = constant(DIAG)
MOST_LOGIT: Final = 650.0  # that `relative_softmax` takes exp of: sums do not overflow,
MOST_EXPONENT: Final = 900  # and are 2⁹⁰⁰ or more where a logit is as large
MANTISSA_BITS: Final = 52
MANTISSA: Final = 2**MANTISSA_BITS - 1
BITS_OF_ONE: Final = 1023 << MANTISSA_BITS
LN2: Final = math.log(2)


# ---- distances and logits --------------------------------------------------------------------------------------------


@compiled(INNER)
def distance_tile(frame: Frame, tiles: Tiles, seeds: np.ndarray, slot: int, columns: int) -> None:
    """logits ← −½ of the squared distance to each seed, in the metric of k-means++."""
    z, y, whitened, logits = tiles.z[slot], tiles.y, tiles.whitened, tiles.logits
    direct_logit_tile(DIAGONAL, frame.metric, seeds, frame.constants, z, columns, y, whitened, logits)


@compiled(INNER)
def logits_of(rules: Rules, work: Work, K: int, side: int, form: int, slot: int, columns: int, ready: bool) -> None:
    """L_k of a tile; packed ones without −½ zᵀΛz if Λ is shared, relative ones of `subtract_reference`'s K − 1 rows."""
    tiles, components = work.tiles, work.components
    z, means, y, whitened, logits = tiles.z[slot], components.means[side, :K], tiles.y, tiles.whitened, tiles.logits
    if form == START:
        distance_tile(work.frame, tiles, means, slot, columns)
    elif form == DIRECT:
        factors, constants = components.factors[side], components.log_constants[side]
        direct_logit_tile(rules.direct_map, factors, means, constants, z, columns, y, whitened, logits)
    else:
        natural = work.scratch.relative[: K - 1] if form == RELATIVE else components.natural[side, :K]
        phi = tiles.phi[min(slot, len(tiles.phi) - 1)]
        packed_logit_tile(rules.packed_map, natural, z, columns, ready, phi, logits)


# ---- relative to one component ---------------------------------------------------------------------------------------

# Logits relative to component c give the same responsibilities, Σ ω log p lacks ⟨η_c, Σ ω φ⟩, and since Σ_k r_k = ω,
# S_c = Σ ω φ − Σ_{k ≠ c} S_k: both products have one row less, and Σ ω φ is the same in all passes.


@compiled(INNER)
def reference_of(terms: np.ndarray, K: int) -> int:
    """c, the component with the smallest terms."""
    reference = 0
    for k in range(1, K):
        reference = k if terms[k] < terms[reference] else reference
    return reference


@compiled(INNER)
def subtract_reference(natural: np.ndarray, totals: np.ndarray, K: int, c: int, relative: np.ndarray) -> float:
    """relative_k ← η_k − η_c, the last component's in the place of c; returns ⟨η_c, Σ ω φ⟩."""
    F, common = len(totals), 0.0
    for k in range(K - 1):
        own = natural[K - 1 if k == c else k]
        for f in range(F):
            relative[k, f] = own[f] - natural[c, f]
    for f in range(F):
        common += natural[c, f] * totals[f]
    return common


@compiled(INNER)
def add_reference(totals: np.ndarray, K: int, c: int, statistics: np.ndarray) -> None:
    """S_c ← Σ ω φ − Σ_{k ≠ c} S_k, and the last component's from the place of c into its own."""
    F, own = len(totals), statistics[c]
    copy_row(own, F, statistics[K - 1])
    copy_row(totals, F, own)
    for k in range(K):
        if k != c:
            for f in range(F):
                own[f] -= statistics[k, f]


@compiled(INNER_REDUCTION)
def relative_softmax(logits: np.ndarray, columns: int, weight: np.ndarray, total: np.ndarray) -> float:
    """L ← ω exp(L_k) / s with s = 1 + Σ_k exp(L_k), for ω of one or zero; returns Σ ω log s.

    That takes one logarithm: of the product of what is left of each s without its exponent, 1 ≤ m < 2, at most 2⁵¹².
    NaN if exp cannot be added up as it is; L is lost then.
    """
    product, exponents, largest = 1.0, np.int64(0), np.int64(0)
    fill_row(total, columns, 1)
    for k in range(len(logits)):
        row = logits[k]
        for n in range(columns):
            exponential = exp(row[n] if row[n] < MOST_LOGIT else MOST_LOGIT)
            row[n] = exponential
            total[n] += exponential
    for n in range(columns):
        bits = np.float64(total[n] if weight[n] > 0 else 1.0).view(np.int64)
        exponent = (bits - BITS_OF_ONE) >> MANTISSA_BITS
        exponents += exponent
        largest = exponent if exponent > largest else largest
        product *= np.int64((bits & MANTISSA) | BITS_OF_ONE).view(np.float64)
        total[n] = weight[n] / total[n]
    for k in range(len(logits)):
        row = logits[k]
        for n in range(columns):
            row[n] *= total[n]
    return math.log(product) + exponents * LN2 if largest < MOST_EXPONENT else np.nan


@compiled(INNER)
def responsibilities_of(
    rules: Rules, work: Work, K: int, side: int, form: int, equal_weights: bool, slot: int, rows: int, ready: bool
) -> float:
    """L ← ω r_k for all components, or those that statistics need; returns Σ ω log Σ_k exp(L_k)."""
    tiles, columns = work.tiles, whole(rows)
    logits, weight, log_p, total = tiles.logits, tiles.rows[slot, 0], tiles.scratch[0], tiles.scratch[1]
    logits_of(rules, work, K, side, form, slot, columns, ready)
    if form == RELATIVE:
        if equal_weights:
            sum_log_s = relative_softmax(logits[: K - 1], columns, weight, total)
            if not np.isnan(sum_log_s):
                return sum_log_s
            logits_of(rules, work, K, side, form, slot, columns, ready)
        fill_row(logits[K - 1], columns, 0)  # that of c, whose place the last component has taken
    softmax_tile(logits, K, columns, weight, form == START, log_p, total)
    return inner_product(weight, log_p, rows)


# ---- passes ----------------------------------------------------------------------------------------------------------


@compiled(SPLICED)
def expect(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, side: int, form: int, centred: bool
) -> float:
    """Σ ω log p and the statistics of a pass: about each component's own mean if they are `centred`."""
    tiles, components, scratch, sum_log_p = work.tiles, work.components, work.scratch, 0.0
    equal_weights, ready = len(samples.sample_weight) == 0, problem.kept and rules.whole
    height, c = K - 1 if form == RELATIVE else K, reference_of(components.terms[side], K)
    r, statistics = tiles.logits[:height], scratch.centred_statistics if centred else scratch.statistics
    for k in range(height):
        fill_row(statistics[k], statistics.shape[1], 0)
    if form == RELATIVE:
        natural, totals = components.natural[side], work.frame.totals
        sum_log_p += subtract_reference(natural, totals, K, c, scratch.relative)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        z, phi, columns = tiles.z[slot], tiles.phi[min(slot, len(tiles.phi) - 1)], whole(rows)
        sum_log_p += responsibilities_of(rules, work, K, side, form, equal_weights, slot, rows, ready)
        if centred:
            means, y, whitened, products = components.means[side, :K], tiles.y, tiles.whitened, tiles.products
            direct_statistic_tile(rules.direct_map, means, z, r, columns, y, whitened, products, statistics)
        else:
            built = ready or (form in (RELATIVE, PACKED) and rules.whole)
            packed_statistic_tile(rules.packed_map, z, r, columns, built, phi, statistics)
    if form == RELATIVE:
        add_reference(work.frame.totals, K, c, scratch.statistics)
    return sum_log_p


@compiled(INNER_REDUCTION)
def entropy_of(r: np.ndarray, weight: np.ndarray, rows: int) -> float:
    """−Σ ω r log r."""
    total = 0.0
    for n in range(rows):
        total -= weight[n] * (r[n] * log(r[n]) if r[n] > 0 else 0.0)
    return total


@compiled(SPLICED)
def evaluate(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, side: int, form: int
) -> tuple[float, float]:
    """Σ ω log p as in `expect`, and the entropy of the responsibilities."""
    tiles, sum_log_p, entropy = work.tiles, 0.0, 0.0
    log_p, total, ones = tiles.scratch[0], tiles.scratch[1], tiles.scratch[2]
    fill_row(ones, len(ones), 1)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        weight, columns, ready = tiles.rows[slot, 0], whole(rows), problem.kept and rules.whole
        logits_of(rules, work, K, side, form, slot, columns, ready)
        softmax_tile(tiles.logits, K, columns, ones, form == START, log_p, total)
        sum_log_p += inner_product(weight, log_p, rows)
        for k in range(K):
            entropy += entropy_of(tiles.logits[k], weight, rows)
    return sum_log_p, entropy
