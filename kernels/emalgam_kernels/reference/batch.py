"""Many fits at once in plain NumPy: the specification of these kernels.

Each problem is fitted by itself: its frame, its starts, its iterations and its choice of K use nothing but its own
samples, its number and the settings. So a problem's result is the same whatever its neighbours, the order, the slices
or the threads. Arithmetic is float64.

Here the logits are ``c_k − ½ ‖P_kᵀ (z − μ_k)‖²`` and moments are about each component's own mean, which never cancels.
Other backends use the packed form, ``⟨η_k, φ(z)⟩``, while the guard's bound on its error (`emalgam.guard`) is at most
1e-9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emalgam_kernels import contract
from emalgam_kernels.batch import (
    EQUAL,
    LIFTS,
    NO_MASS,
    RELATIVE_FLOOR,
    ROUND_SHIFT,
    ROUNDING,
    Mixtures,
    Outcomes,
    Problems,
    Settings,
    Status,
    criterion_value,
    parameter_count,
    replaces,
)
from emalgam_kernels.blocks import for_each_block
from emalgam_kernels.philox import PROBLEMS, SEEDS
from emalgam_kernels.reference.sampling import philox_words

ROWS_AT_ONCE = 4096


def fit_many(
    problems: Problems, settings: Settings, mixtures: Mixtures, outcomes: Outcomes, n_threads: int = 1
) -> None:
    """Fit a Gaussian mixture to each of B problems by EM.

    Parameters
    ----------
    problems : Problems
    settings : Settings
    mixtures : Mixtures
        Filled with NaN and zeros; receives the mixtures, in `n_components` how many components each has.
    outcomes : Outcomes
        Receives how each fit ended.
    n_threads : int
        Threads to use, each on whole problems; the result has the same bits for every number.

    Notes
    -----
    Of each problem: greedy k-means++ (the best of 2 + log K candidates), an M-step of that hard assignment, then EM
    until the mean log-likelihood changes by less than `tol`. Of all restarts and numbers of components the smallest
    criterion wins, the first of those that are equal to rounding; one that has collapsed only if all have. A problem
    that cannot be fitted gets a status and leaves the others alone.

    References
    ----------
    Dempster, Laird, Rubin (1977); Arthur, Vassilvitskii (2007), section 2.2; Bishop (2006), section 9.2.
    """
    contract.fit_many(problems, settings, mixtures, outcomes)

    def block(start: int, stop: int) -> None:
        for b in range(start, stop):
            rows = _rows(problems, b)
            fewest, most = int(settings.fewest[b]), int(settings.most[b])
            status = _why_not(rows, fewest)
            if status == Status.FINE:
                data = _Data.of(rows, settings)
                seeds = _SeedDraws(settings.seed, int(problems.numbers[b]))
                counts = range(fewest, min(most, len(rows.x)) + 1)
                best = None if data is None else _best(data, settings, counts, seeds)
                status = Status.NO_LIKELIHOOD if best is None else best.status
                if data is not None and best is not None:
                    _store(best, data, b, mixtures, outcomes)
            outcomes.status[b] = status

    for_each_block(block, len(problems), 1, n_threads)


def predict_many(
    problems: Problems, mixtures: Mixtures, log_prob: np.ndarray, labels: np.ndarray, n_threads: int = 1
) -> None:
    """log p(x_n) and the component of the largest responsibility, each sample under the mixture of its own problem.

    Parameters
    ----------
    problems : Problems
        `numbers` and `sample_weight` are not read.
    mixtures : Mixtures
    log_prob : (N,) float64
        Receives log p(x), in nats, of each row of x; NaN where the problem has no mixture, a covariance is not positive
        definite (it may have overflowed) or the row is not finite.
    labels : (N,) int64
        Receives argmax_k r_k, the first of equals; −1 where log p is NaN.
    n_threads : int
        Threads to use; the result has the same bits for every number.
    """
    contract.predict_many(problems, mixtures, log_prob, labels)

    def block(start: int, stop: int) -> None:
        for b in range(start, stop):
            K, D = int(mixtures.n_components[b]), problems.n_features
            first, last = int(problems.offsets[b]), int(problems.offsets[b + 1])
            covariances = _as_matrices(mixtures.covariance_type, mixtures.covariances[b], K, D)
            components = _Components(mixtures.weights[b, :K], mixtures.means[b, :K], covariances)
            known = K > 0 and _positive_definite(covariances)
            for at in range(first, last, ROWS_AT_ONCE):
                span = slice(at, min(at + ROWS_AT_ONCE, last))
                rows = span if problems.order is None else problems.order[span]
                x = problems.x[rows].astype(np.float64)
                logits = _logits(x, components) if known else np.full((len(x), 1), np.nan)
                log_p = _log_sum_exp(logits)
                log_prob[rows] = log_p
                labels[rows] = np.where(np.isnan(log_p), -1, logits.argmax(axis=1))

    for_each_block(block, len(problems), 1, n_threads)


# ---- the samples of a problem


@dataclass(frozen=True)
class _Rows:
    """The samples with weight: (n, D) and (n,) float64; and whether a weight is negative or not finite."""

    x: np.ndarray
    weight: np.ndarray
    bad_weight: bool


def _rows(problems: Problems, b: int) -> _Rows:
    span = slice(int(problems.offsets[b]), int(problems.offsets[b + 1]))
    rows = span if problems.order is None else problems.order[span]
    x = problems.x[rows].astype(np.float64)
    if problems.sample_weight is None:
        return _Rows(x, np.ones(len(x)), False)
    weight = problems.sample_weight[rows]
    taking_part = weight > 0
    return _Rows(x[taking_part], weight[taking_part], not bool((np.isfinite(weight) & (weight >= 0)).all()))


def _why_not(rows: _Rows, fewest: int) -> Status:
    """Why a problem cannot be fitted; `FINE` if it can."""
    if rows.bad_weight:
        return Status.BAD_WEIGHT
    if len(rows.x) < fewest:
        return Status.TOO_FEW_ROWS
    return Status.FINE if np.isfinite(rows.x).all() else Status.NOT_FINITE


def _power_of_two(deviation: np.ndarray) -> np.ndarray:
    """The power of two that brings a positive number into [½, 1); 1 for zero. Neither it nor its inverse overflows."""
    exponent = np.clip(-np.frexp(deviation)[1], -1021, 1021)
    return np.where(deviation > 0, np.ldexp(1.0, exponent), 1.0)


@dataclass(frozen=True)
class _Data:
    """The samples of a problem in their frame, z = (x − shift) · scale.

    Attributes
    ----------
    z : (n, D)
    closeness : (D,)
        One over the variances (spherical: ones), which k-means++ multiplies squared distances by.
    weight : (n,)
    shift, scale : (D,)
    floor : (D,)
        RELATIVE_FLOOR of each variance; a constant feature takes the frame's unit.
    added : (D,)
        To the diagonal of every covariance.
    pivots : (D,)
        Variances of all samples, of the type's shape and with `added` and `floor`: that of feature d given those before
        it.
    """

    z: np.ndarray
    closeness: np.ndarray
    weight: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    floor: np.ndarray
    added: np.ndarray
    pivots: np.ndarray

    @classmethod
    def of(cls, rows: _Rows, settings: Settings) -> _Data | None:
        """None if what is to be added to covariances is infinite in the frame."""
        share = (rows.weight / rows.weight.max()) / (rows.weight / rows.weight.max()).sum()
        low, high = rows.x.min(axis=0), rows.x.max(axis=0)
        # Within the range of each feature nothing overflows; a constant one is exactly zero in the frame.
        middle, scale = np.where(high > low, low / 2 + high / 2, low), _power_of_two(high / 2 - low / 2)
        z = (rows.x - middle) * scale
        mean = share @ z
        deviation = np.sqrt(share @ (z - mean) ** 2)
        finer = _power_of_two(deviation)
        # A rounded mean leaves the differences between samples exact: those that are equal stay so on every backend.
        mean = np.rint(mean * (finer * ROUND_SHIFT)) / (finer * ROUND_SHIFT)
        if settings.covariance_type == "spherical":  # one scale for all features
            varies = deviation > 0
            finer = np.full_like(scale, (scale * finer)[varies].min(initial=np.inf) if varies.any() else 1.0) / scale
        z = (z - mean) * finer
        variance = (deviation * finer) ** 2
        spread = np.where(variance > 0, variance, 1.0)
        floor, scale = RELATIVE_FLOOR * spread, scale * finer
        closeness = np.ones_like(spread) if settings.covariance_type == "spherical" else 1.0 / spread
        with np.errstate(over="ignore", invalid="ignore"):
            added = floor if settings.added < 0 else settings.added * scale**2
        if not np.isfinite(added).all():
            return None
        if settings.covariance_type == "spherical":
            floor, added = np.full_like(floor, floor.mean()), np.full_like(added, added.mean())
        total = _constrain(settings.covariance_type, ((z * share[:, None]).T @ z)[None], np.ones(1))[0]
        pivots = np.diag(np.linalg.cholesky(total + np.diag(added + floor))) ** 2
        return cls(z, closeness, rows.weight, middle + mean / scale * finer, scale, floor, added, pivots)


# ---- mixtures of a problem; whatever their type, covariances are matrices (K, D, D) here


@dataclass(frozen=True)
class _Components:
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    collapsed: bool = False


def _constrain(covariance_type: str, covariances: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Of all matrices that the type allows, the ones that maximize the likelihood: Bishop (2006), exercise 9.6 ff."""
    identity = np.eye(covariances.shape[1])
    if covariance_type == "tied":
        return np.broadcast_to(np.tensordot(mass / mass.sum(), covariances, 1), covariances.shape)
    if covariance_type == "diag":
        return covariances * identity
    if covariance_type == "spherical":
        variance = np.einsum("kii->k", covariances) / len(identity)
        return variance[:, None, None] * identity
    return covariances


def _as_matrices(covariance_type: str, shaped: np.ndarray, K: int, D: int) -> np.ndarray:
    """One problem's covariances in the shape of the type as (K, D, D)."""
    identity = np.eye(D)
    if covariance_type == "full":
        return shaped[:K]
    if covariance_type == "tied":
        return np.broadcast_to(shaped, (K, D, D))
    return (shaped[:K, :, None] if covariance_type == "diag" else shaped[:K, None, None]) * identity


def _positive_definite(covariances: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(covariances)
    except np.linalg.LinAlgError:
        return False
    return True


def _logits(z: np.ndarray, components: _Components) -> np.ndarray:
    """L_nk = log w_k N(z_n; μ_k, Σ_k) = log w_k − ½ ‖L_k⁻¹ (z_n − μ_k)‖² − log |L_k| − ½ D log 2π; (n, K)."""
    logits = np.empty((len(z), len(components.weights)))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weights = np.log(components.weights)
        for k, (mean, covariance) in enumerate(zip(components.means, components.covariances, strict=True)):
            lower = np.linalg.cholesky(covariance)
            y = np.linalg.solve(lower, (z - mean).T)
            constant = log_weights[k] - np.log(np.diag(lower)).sum() - 0.5 * len(mean) * np.log(2 * np.pi)
            logits[:, k] = constant - 0.5 * (y * y).sum(axis=0)
    return logits


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log Σ_k exp(L_k) with the maximum taken out."""
    top = logits.max(axis=1)
    with np.errstate(invalid="ignore"):
        log_p: np.ndarray = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return log_p


# ---- the start


class _SeedDraws:
    """Uniform numbers of a problem: the first of each block of Philox, for every K and restart.

    The key is made of the first two words of (seed, PROBLEMS, block 0, row = the problem's number). Number t of restart
    i with K components is that of (key, SEEDS, block t, row = 2³² K + i).
    """

    def __init__(self, seed: int, number: int) -> None:
        words = np.empty((1, 4), np.uint32)
        philox_words(seed, PROBLEMS, 0, number, words)
        self.key = int(words[0, 0]) | int(words[0, 1]) << 32

    def uniform(self, K: int, restart: int, t: int) -> float:
        """In the open interval (0, 1), with 52 bits, as `emalgam_kernels.philox` makes them."""
        words = np.empty((1, 4), np.uint32)
        philox_words(self.key, SEEDS, t, (K << 32) + restart, words)
        return ((int(words[0, 0]) | int(words[0, 1]) << 32) >> 12) * 2.0**-52 + 2.0**-53


def _draw(mass: np.ndarray, u: float) -> int:
    """An index with probability in proportion to mass ≥ 0: the inverse of the cumulative sum, never one without."""
    cumulative = np.cumsum(mass)
    return min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), int(np.flatnonzero(mass)[-1]))


def _distances(data: _Data, row: int) -> np.ndarray:
    """Σ_d (z_nd − z_row,d)² · closeness_d, (n,)."""
    distances: np.ndarray = ((data.z - data.z[row]) ** 2 * data.closeness).sum(axis=1)
    return distances


def _labels(data: _Data, K: int, restart: int, draws: _SeedDraws) -> tuple[np.ndarray, np.ndarray]:
    """The seeds of greedy k-means++, (K,) rows, and each sample's nearest seed, the first of equals, (n,)."""
    seeds = [_draw(data.weight, draws.uniform(K, restart, 0))]
    nearest = _distances(data, seeds[0])
    labels, t = np.zeros(len(nearest), np.int64), 1
    for k in range(1, K):
        mass = data.weight * nearest
        best, least, found = -1, np.inf, nearest
        for _ in range(2 + int(np.log(K))):
            candidate = _draw(mass if mass.any() else data.weight, draws.uniform(K, restart, t))
            distances = _distances(data, candidate)
            potential = float(data.weight @ np.minimum(nearest, distances))
            t += 1
            if potential < (1 - ROUNDING) * least:
                best, least, found = candidate, potential, distances
        seeds.append(best)
        labels[found < nearest] = k
        nearest = np.minimum(nearest, found)
    return np.array(seeds), labels


# ---- EM


@dataclass(frozen=True)
class _Fit:
    components: _Components
    log_likelihood: float
    entropy: float
    n_iter: int
    converged: bool
    value: float
    status: Status

    @property
    def collapsed(self) -> bool:
        return self.status == Status.COLLAPSED


def _best(data: _Data, settings: Settings, numbers_of_components: range, draws: _SeedDraws) -> _Fit | None:
    """The best of all numbers of components and restarts, see `replaces`; None if none has a finite likelihood."""
    best, margin = None, EQUAL * data.weight.sum()
    for K in numbers_of_components:
        for restart in range(settings.n_init):
            try:
                fit = _restart(data, settings, K, restart, draws)
            except (np.linalg.LinAlgError, FloatingPointError):
                continue
            if best is None or replaces(fit.value, fit.collapsed, best.value, best.collapsed, margin):
                best = fit
    return best


def _restart(data: _Data, settings: Settings, K: int, restart: int, draws: _SeedDraws) -> _Fit:
    """EM from one start; LinAlgError or FloatingPointError if it comes to nothing."""
    seeds, labels = _labels(data, K, restart, draws)
    broadest = np.broadcast_to(np.diag(data.floor / RELATIVE_FLOOR), (K, len(data.floor), len(data.floor)))
    components = _Components(np.full(K, 1 / K), data.z[seeds], broadest)
    components = _maximize(data, settings, np.eye(K)[labels], components)
    total, bound, converged, n_iter = data.weight.sum(), -np.inf, False, 0
    while n_iter < settings.max_iter and not converged:
        log_p, r = _expect(data, components)
        previous, bound = bound, float(data.weight @ log_p) / total
        components = _maximize(data, settings, r, components)
        converged, n_iter = abs(bound - previous) < settings.tol, n_iter + 1
    log_p, r = _expect(data, components)
    log_likelihood = float(data.weight @ (log_p + np.log(data.scale).sum()))
    entropy = -float(data.weight @ (r * np.log(np.where(r > 0, r, 1.0))).sum(axis=1))
    count = parameter_count(settings.covariance_type, K, data.z.shape[1])
    value = float(criterion_value(settings.criterion, log_likelihood, entropy, count, total))
    status = Status.COLLAPSED if components.collapsed else Status.FINE if converged else Status.NOT_CONVERGED
    return _Fit(components, log_likelihood, entropy, n_iter, converged, value, status)


def _expect(data: _Data, components: _Components) -> tuple[np.ndarray, np.ndarray]:
    """log p(z_n), (n,), and the responsibilities, (n, K); FloatingPointError if they are not finite."""
    logits = _logits(data.z, components)
    log_p = _log_sum_exp(logits)
    if not np.isfinite(log_p).all():
        raise FloatingPointError("the log-likelihood is not finite")
    return log_p, np.exp(logits - log_p[:, None])


def _maximize(data: _Data, settings: Settings, r: np.ndarray, old: _Components) -> _Components:
    """The M-step: w_k = N_k / N, μ_k and Σ_k from the moments about the old means; Bishop (2006), eq. 9.24-9.26.

    A component without data stays where it was, without weight.
    """
    weighted = r * data.weight[:, None]
    mass = weighted.sum(axis=0)
    empty = mass <= NO_MASS * mass.sum()
    safe = np.where(empty, 1.0, mass)
    means, estimates = np.empty_like(old.means), np.empty_like(old.covariances)
    for k, mean in enumerate(old.means):
        centred = data.z - mean
        offset = weighted[:, k] @ centred / safe[k]
        means[k] = mean + offset
        estimates[k] = (centred * weighted[:, k, None]).T @ centred / safe[k] - np.outer(offset, offset)
    estimates = _constrain(settings.covariance_type, estimates, np.where(empty, 0.0, mass))
    kept = empty if settings.covariance_type != "tied" else np.zeros_like(empty)
    covariances, collapsed = old.covariances.copy(), bool(empty.any())
    for moved in np.flatnonzero(~kept):
        covariances[moved], narrow = _regularized(estimates[moved], data)
        collapsed |= narrow and settings.covariance_type != "tied"
    means = np.where(empty[:, None], old.means, means)
    return _Components(np.where(empty, 0.0, mass) / mass.sum(), means, covariances, collapsed)


def _regularized(estimate: np.ndarray, data: _Data) -> tuple[np.ndarray, bool]:
    """Σ + diag(added), with as many floors as it takes to be positive definite; and whether it has collapsed.

    It has if it took any, or if, given the features before it, some feature varies less than the floor, and less than
    it does in all samples together. LinAlgError if nothing makes it positive definite.
    """
    least = data.added + data.floor
    for times in LIFTS:
        covariance = estimate + np.diag(data.added + times * data.floor)
        try:
            pivots = np.diag(np.linalg.cholesky(covariance)) ** 2
        except np.linalg.LinAlgError:
            continue
        # What the other features leave of a variance, or a component of the spread of all samples, may be rounding.
        if (pivots <= ROUNDING * np.maximum(np.diag(covariance), ROUNDING * data.floor / RELATIVE_FLOOR)).any():
            continue
        return covariance, times > 0 or bool(((pivots < least) & (data.pivots > 2 * least)).any())
    raise np.linalg.LinAlgError("a covariance is not positive definite, whatever is added to it")


def _store(best: _Fit, data: _Data, b: int, mixtures: Mixtures, outcomes: Outcomes) -> None:
    """A fit, out of its frame: x = z / scale + shift."""
    K = len(best.components.weights)
    mixtures.n_components[b] = K
    mixtures.weights[b, :K] = best.components.weights
    mixtures.means[b, :K] = best.components.means / data.scale + data.shift
    with np.errstate(all="ignore"):  # what leaves the range of float64 is found by `withdraw_out_of_range`
        covariances = best.components.covariances / np.outer(data.scale, data.scale)
    place = mixtures.covariances[b]
    if mixtures.covariance_type == "full":
        place[:K] = covariances
    elif mixtures.covariance_type == "tied":
        place[...] = covariances[0]
    elif mixtures.covariance_type == "diag":
        place[:K] = np.einsum("kii->ki", covariances)
    else:
        place[:K] = covariances[:, 0, 0]
    outcomes.log_likelihood[b], outcomes.entropy[b] = best.log_likelihood, best.entropy
    outcomes.n_iter[b], outcomes.converged[b] = best.n_iter, best.converged
