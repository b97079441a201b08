"""The E-step of many fits: a pass over the tiles of a problem, from logits to statistics."""

from __future__ import annotations

import numpy as np

from emalgam_kernels.numba_cpu.batch_memory import (
    INNER,
    INNER_REDUCTION,
    SPLICED,
    Components,
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
    COMPONENTS_AT_ONCE,
    DIAG,
    compiled,
    constant,
    direct_logit_tile,
    direct_statistic_tile,
    fill_row,
    inner_product,
    log,
    packed_logit_tile,
    packed_statistic_tile,
    softmax_tile,
)

START, PACKED, DIRECT = map(constant, range(3))  # logits by distance to the seeds; ⟨η, φ(z)⟩; about each own mean
DIAGONAL = constant(DIAG)


# ---- distances and logits --------------------------------------------------------------------------------------------


@compiled(INNER)
def distance_tile(frame: Frame, tiles: Tiles, seeds: np.ndarray, slot: int, columns: int) -> None:
    """logits ← −½ of the squared distance to each seed, in the metric of k-means++."""
    z, y, whitened, logits = tiles.z[slot], tiles.y, tiles.whitened, tiles.logits
    direct_logit_tile(DIAGONAL, frame.metric, seeds, frame.constants, z, columns, y, whitened, logits)


@compiled(INNER)
def logits_of(
    rules: Rules,
    frame: Frame,
    tiles: Tiles,
    components: Components,
    K: int,
    side: int,
    form: int,
    slot: int,
    columns: int,
    ready: bool,
) -> None:
    """L_k of a tile; packed ones without −½ zᵀΛz if Λ is shared."""
    z, means, y, whitened, logits = tiles.z[slot], components.means[side, :K], tiles.y, tiles.whitened, tiles.logits
    if form == START:
        distance_tile(frame, tiles, means, slot, columns)
    elif form == PACKED:
        natural = components.natural[side, : even(K)]
        phi = tiles.phi[min(slot, len(tiles.phi) - 1)]
        packed_logit_tile(rules.packed_map, natural, z, columns, ready, phi, logits)
    else:
        factors, constants = components.factors[side], components.log_constants[side]
        direct_logit_tile(rules.direct_map, factors, means, constants, z, columns, y, whitened, logits)


@compiled(INNER)
def even(K: int) -> int:
    """Rows of logits: K in whole register blocks."""
    return (K + COMPONENTS_AT_ONCE - 1) // COMPONENTS_AT_ONCE * COMPONENTS_AT_ONCE


# ---- passes ----------------------------------------------------------------------------------------------------------


@compiled(SPLICED)
def expect(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, side: int, form: int, centred: bool
) -> float:
    """Σ ω log p and the statistics of a pass: about each component's own mean if they are `centred`."""
    tiles, components, scratch, sum_log_p = work.tiles, work.components, work.scratch, 0.0
    statistics = scratch.centred_statistics[: even(K)] if centred else scratch.statistics[: even(K)]
    for k in range(K):
        fill_row(statistics[k], statistics.shape[1], 0)
    log_p, total, r, ready = tiles.scratch[0], tiles.scratch[1], tiles.logits[: even(K)], problem.kept and rules.whole
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        z, phi, weight = tiles.z[slot], tiles.phi[min(slot, len(tiles.phi) - 1)], tiles.rows[slot, 0]
        columns = whole(rows)
        logits_of(rules, work.frame, tiles, components, K, side, form, slot, columns, ready)
        softmax_tile(r, K, columns, weight, form == START, log_p, total)
        sum_log_p += inner_product(weight, log_p, rows)
        if centred:
            means, y, whitened, products = components.means[side, :K], tiles.y, tiles.whitened, tiles.products
            direct_statistic_tile(rules.direct_map, means, z, r, columns, y, whitened, products, statistics)
        else:
            built = ready or (form == PACKED and rules.whole)
            packed_statistic_tile(rules.packed_map, z, r, columns, built, phi, statistics)
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
        logits_of(rules, work.frame, tiles, work.components, K, side, form, slot, columns, ready)
        softmax_tile(tiles.logits, K, columns, ones, form == START, log_p, total)
        sum_log_p += inner_product(weight, log_p, rows)
        for k in range(K):
            entropy += entropy_of(tiles.logits[k], weight, rows)
    return sum_log_p, entropy
