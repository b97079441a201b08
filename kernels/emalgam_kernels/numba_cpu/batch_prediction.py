"""Mixtures that are given, and what they say of samples: log p and labels."""

from __future__ import annotations

import numpy as np

from emalgam_kernels.numba_cpu.batch_expectation import DIRECT, START, logits_of
from emalgam_kernels.numba_cpu.batch_matrices import factorize, invert
from emalgam_kernels.numba_cpu.batch_maximization import log_constant
from emalgam_kernels.numba_cpu.batch_memory import (
    ADDED,
    BEST,
    COARSE,
    FINER,
    FLOOR,
    INNER,
    MEAN,
    MIDDLE,
    Rules,
    Samples,
    Work,
    describe,
    rows_of,
    visit,
    whole,
)
from emalgam_kernels.numba_cpu.tiles import compiled, copy_row, fill_row, softmax_tile


@compiled(INNER)
def adopt(work: Work, K: int, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
    """BEST ← a mixture in the units of the data, with its factors; NaN where a covariance is not positive definite."""
    rows, components, lower = work.frame.rows, work.components, work.scratch.lower
    H, D = lower.shape
    for row in (MIDDLE, MEAN, FLOOR, ADDED):
        fill_row(rows[row], D, 0)
    fill_row(rows[COARSE], D, 1)
    fill_row(rows[FINER], D, 1)
    for k in range(K):
        c = min(k, components.factors.shape[1] - 1)
        covariance, factor = components.covariances[BEST, c], components.factors[BEST, c]
        if c == k:
            for i in range(H):
                for j in range(D):
                    covariance[i, j] = covariances[c, i, min(j, covariances.shape[2] - 1)]
            fine = factorize(covariance, rows[ADDED], rows[FLOOR], 0.0, lower)
            invert(lower, factor)
            factor[0, 0] = factor[0, 0] if fine else np.nan
        copy_row(means[k], D, components.means[BEST, k])
        components.log_constants[BEST, k] = log_constant(weights[k], factor, H, D)


@compiled(INNER)
def label_tile(logits: np.ndarray, K: int, rows: int, top: np.ndarray, labels: np.ndarray) -> None:
    """labels ← argmax_k L_k, the first of equals."""
    copy_row(logits[0], rows, top)
    fill_row(labels, rows, 0)
    for k in range(1, K):
        row = logits[k]
        for n in range(rows):
            labels[n] = k if row[n] > top[n] else labels[n]
            top[n] = row[n] if row[n] > top[n] else top[n]


@compiled(INNER)
def predict_problem(
    rules: Rules,
    samples: Samples,
    where: tuple[int, int],
    K: int,
    work: Work,
    log_prob: np.ndarray,
    labels: np.ndarray,
) -> None:
    """log p and labels of a problem's samples under the components at BEST, which are in the units of the data."""
    tiles, log_p, label, top = work.tiles, work.tiles.scratch[0], work.tiles.scratch[1], work.tiles.scratch[2]
    problem, _ = describe(rules, samples, where[0], where[1], 0)
    for tile in range(problem.tiles):
        slot, rows = visit(samples, problem, work.frame, tiles, tile), rows_of(problem, tile)
        columns, weight, form = whole(rows), tiles.rows[slot, 0], DIRECT
        logits_of(rules, work, K, BEST, form, slot, columns, problem.kept)
        label_tile(tiles.logits, K, rows, top, label)
        softmax_tile(tiles.logits, K, columns, weight, form == START, log_p, top)
        for n in range(rows):
            i = problem.first + tile * problem.columns + n
            i = samples.order[i] if len(samples.order) > 0 else i
            known = abs(log_p[n]) < np.inf
            log_prob[i] = log_p[n] if known else np.nan
            labels[i] = int(label[n]) if known else -1
