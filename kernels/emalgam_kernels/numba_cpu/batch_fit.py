"""EM of a problem: its restarts with every number of components, and the best of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from emalgam_kernels import batch
from emalgam_kernels.batch import EQUAL, MOST_CANCELLATION, Status
from emalgam_kernels.numba_cpu.batch_expectation import (
    DIRECT,
    PACKED,
    RELATIVE,
    START,
    evaluate,
    expect,
    reference_of,
)
from emalgam_kernels.numba_cpu.batch_frame import prepare
from emalgam_kernels.numba_cpu.batch_matrices import copy_matrix
from emalgam_kernels.numba_cpu.batch_maximization import Verdict, begin, maximize
from emalgam_kernels.numba_cpu.batch_memory import (
    BEST,
    INNER,
    NEW,
    OLD,
    SCALE,
    SHIFT,
    SPLICED,
    Components,
    Frame,
    Problem,
    Rules,
    Samples,
    Work,
    describe,
)
from emalgam_kernels.numba_cpu.batch_seeding import choose_seeds, key_of
from emalgam_kernels.numba_cpu.tiles import compiled, copy_row

_FINE, _NOT_CONVERGED, _COLLAPSED, _TOO_FEW_ROWS, _NOT_FINITE, _BAD_WEIGHT, _NO_LIKELIHOOD, _ = map(int, Status)
replaces: Any = compiled(INNER)(batch.replaces)


class Fit(NamedTuple):
    """The outcome of a start; `value` is that of the criterion. K is 0 if it came to nothing."""

    K: int
    status: int
    log_likelihood: float
    entropy: float
    n_iter: int
    converged: bool
    value: float


@compiled(SPLICED)
def fit_problem(
    rules: Rules,
    samples: Samples,
    where: tuple[int, int],
    number: np.uint64,
    choices: tuple[int, int],
    work: Work,
) -> Fit:
    """The best fit, see `replaces`; its components are those at BEST.

    `where` are the first and the number of the problem's samples, `choices` the fewest and the most components.
    """
    problem, bad = describe(rules, samples, where[0], where[1], len(work.tiles.z))
    if bad or problem.positive < choices[0]:
        return no_fit(_BAD_WEIGHT if bad else _TOO_FEW_ROWS)
    total = prepare(rules, samples, problem, work)
    if np.isnan(total):
        return no_fit(_NOT_FINITE)
    key, best, margin = key_of(rules.seed, number), no_fit(_NO_LIKELIHOOD), EQUAL * total * problem.largest
    for K in range(choices[0], min(choices[1], problem.positive) + 1):
        for restart in range(rules.n_init):
            fit, side = restart_fit(rules, samples, problem, work, key, K, restart, total)
            collapsed, best_collapsed = fit.status == _COLLAPSED, best.status == _COLLAPSED
            if fit.K > 0 and (best.K == 0 or replaces(fit.value, collapsed, best.value, best_collapsed, margin)):
                keep(work.components, K, side)
                best = fit
    return best


@compiled(INNER)
def no_fit(status: int) -> Fit:
    return Fit(0, status, np.nan, np.nan, 0, False, np.nan)


# ---- a start ---------------------------------------------------------------------------------------------------------


@compiled(SPLICED)
def restart_fit(
    rules: Rules, samples: Samples, problem: Problem, work: Work, key: np.uint64, K: int, restart: int, total: float
) -> tuple[Fit, int]:
    """EM from one start, and where its components are."""
    old, new = OLD, NEW
    choose_seeds(samples, problem, work, key, K, restart, total, work.components.means[new])
    begin(work.frame, work.components, K, new)
    verdict, form = Verdict(True, False, 0.0, 0.0), START
    bound, converged, n_iter = -np.inf, False, -1  # the M-step of the start is none
    while verdict.fine and n_iter < rules.max_iter and not converged:
        old, new, previous, common = new, old, bound, verdict.common
        sum_log_p, verdict = step(rules, samples, problem, work, K, old, new, form)
        n_iter += 1
        if n_iter > 0:
            bound = (sum_log_p + (0.0 if form == DIRECT else common)) / total
            converged = abs(bound - previous) < rules.tol
            if not abs(bound) < np.inf:
                break
        form = form_of(verdict, work.components.terms[new], K)
    form = PACKED if form == RELATIVE else form
    log_p, entropy = evaluate(rules, samples, problem, work, K, new, form)
    log_p += verdict.common if form == PACKED else 0.0
    for d in range(work.frame.rows.shape[1]):
        log_p += total * np.log(work.frame.rows[SCALE, d])
    log_p, entropy = log_p * problem.largest, entropy * problem.largest
    value = criterion_of(rules, K, log_p, entropy, np.log(total) + np.log(problem.largest))
    fine = verdict.fine and abs(log_p) < np.inf and (abs(bound) < np.inf or n_iter == 0)
    status = _COLLAPSED if verdict.collapsed else _FINE if converged else _NOT_CONVERGED
    return Fit(K if fine else 0, status, log_p, entropy, n_iter, converged, value), new


@compiled(SPLICED)
def step(
    rules: Rules, samples: Samples, problem: Problem, work: Work, K: int, old: int, new: int, form: int
) -> tuple[float, Verdict]:
    """The E-step with the old components and the M-step that makes the new ones; and Σ ω log p as in `expect`.

    Where statistics lead to components that the guard does not let pass, the step is done again with packed ones, or
    with statistics about the old means, which do not cancel.
    """
    terms, centred = work.components.terms, form == DIRECT
    while True:
        sum_log_p = expect(rules, samples, problem, work, K, old, form, centred)
        verdict = maximize(rules, work, K, old, new, centred)
        relative = form == RELATIVE
        if centred or keeps_digits(verdict, terms[new, reference_of(terms[old], K)] if relative else 0.0):
            return sum_log_p, verdict
        form, centred = PACKED if relative else form, not relative or not keeps_digits(verdict, 0.0)


@compiled(INNER)
def keeps_digits(verdict: Verdict, terms: float) -> bool:
    """The guard: whether components came of it, and what ⟨η, φ(z)⟩ adds up is small enough, with further `terms`."""
    return verdict.fine and verdict.cancellation + terms <= MOST_CANCELLATION


@compiled(INNER)
def form_of(verdict: Verdict, terms: np.ndarray, K: int) -> int:
    """The first form of the logits that keeps the digits of components."""
    if keeps_digits(verdict, terms[reference_of(terms, K)]):
        return RELATIVE
    return PACKED if keeps_digits(verdict, 0.0) else DIRECT


@compiled(INNER)
def criterion_of(rules: Rules, K: int, log_likelihood: float, entropy: float, log_total: float) -> float:
    """See `emalgam_kernels.batch.criterion_value`."""
    n_parameters = rules.parameters_at_all + K * rules.parameters_each
    penalty = 2.0 if rules.aic else log_total
    return -2.0 * log_likelihood + n_parameters * penalty + (2.0 * entropy if rules.icl else 0.0)


# ---- the best --------------------------------------------------------------------------------------------------------


@compiled(INNER)
def keep(components: Components, K: int, side: int) -> None:
    """The best components so far."""
    copy_row(components.weights[side], K, components.weights[BEST])
    for k in range(K):
        copy_row(components.means[side, k], components.means.shape[2], components.means[BEST, k])
        c = min(k, components.covariances.shape[1] - 1)
        copy_matrix(components.covariances[side, c], components.covariances[BEST, c])


@compiled(INNER)
def store(
    frame: Frame, components: Components, K: int, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray
) -> None:
    """The best components, out of their frame: x = z / scale + shift."""
    scale, D = frame.rows[SCALE], frame.rows.shape[1]
    for k in range(K):
        weights[k] = components.weights[BEST, k]
        for d in range(D):
            means[k, d] = components.means[BEST, k, d] / scale[d] + frame.rows[SHIFT, d]
    for c in range(min(K, components.covariances.shape[1])):
        covariance = components.covariances[BEST, c]
        for i in range(covariances.shape[1]):
            for j in range(covariances.shape[2]):
                covariances[c, i, j] = covariance[i, j] / (scale[i if len(covariance) == D else j] * scale[j])
