"""Where EM begins: k-means, k-means++, rows of the data, random responsibilities, or given parameters.

All are passes of the same kernels. k-means is EM with hard responsibilities and equal, spherical covariances; the
distances of k-means++ are log-densities of a unit Gaussian. Distances are taken between standardized features (between
raw ones for spherical covariances), so that the start does not depend on units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from emalgam import backends
from emalgam.arrays import empty
from emalgam.covariance import COVARIANCES, Covariance
from emalgam.namespace import as_float64, beside, is_tensor, namespace, to_host
from emalgam.observations import Observations
from emalgam.packing import Components, Frame, features
from emalgam_kernels import Direct, statistic_count
from emalgam_kernels.philox import RESPONSIBILITIES

KMEANS_TOLERANCE: Final = 1e-4  # of the mean variance, as in scikit-learn's KMeans
KMEANS_ITERATIONS: Final = 300
KMEANS_ITERATIONS_ON_ALL: Final = 10  # after convergence on a sample
ROWS_PER_COMPONENT: Final = 256  # of a sample; enough to compare candidates and to run Lloyd's algorithm on
FEWEST_ROWS_OF_A_SAMPLE: Final = 8192
ELEMENTS_OF_A_SAMPLE: Final = 2**20
ROWS_AT_ONCE: Final = 4096


@dataclass(frozen=True)
class Given:
    """Parameters that the user fixed, in the frame; None where the initialization decides."""

    weights: np.ndarray | None = None
    means: np.ndarray | None = None
    precisions_cholesky: np.ndarray | None = None

    @property
    def complete(self) -> bool:
        return self.weights is not None and self.means is not None and self.precisions_cholesky is not None


def metric_frame(data: Observations, covariance: Covariance) -> Frame:
    """The frame whose Euclidean distance compares rows: exactly standardized, or the data's own units for spherical."""
    if covariance.isotropic_frame:
        return data.frame
    deviation = np.where(data.variance > 0, np.sqrt(data.variance), 1.0)
    return Frame(data.frame.shift, data.frame.scale / deviation)


def unit_components(centres: np.ndarray) -> Components:
    """Equal, spherical components about `centres` (K, D): the nearest centre has the largest density."""
    K = len(centres)
    return Components(np.full(K, 1.0 / K), centres, np.ones(K), np.ones(K))


# ---- seeds


def draw(mass: Any, u: np.ndarray, ends: np.ndarray | None = None) -> np.ndarray:
    """Indices i with probability proportional to mass_i ≥ 0, from uniforms u: the inverse of the cumulative sum.

    An index without mass is never drawn, and leaving it out changes no draw. `ends` are `block_ends(mass)`, if they are
    known. Memory: a block for each of `u` beyond the arguments.
    """
    ends = block_ends(mass) if ends is None else ends
    targets = u * ends[-1]
    last = int(np.searchsorted(ends, ends[-1]))  # the last block that holds any mass
    blocks = np.minimum(np.searchsorted(ends, targets, side="right"), last)
    chosen = np.empty(len(u), np.int64)
    numbers = np.unique(blocks)
    parts = [mass[block * ROWS_AT_ONCE : (block + 1) * ROWS_AT_ONCE] for block in numbers.tolist()]
    # One copy from a GPU, however many blocks.
    on_host = to_host(namespace(mass).concatenate(parts))
    for block, part in zip(numbers, np.split(on_host, np.cumsum([len(part) for part in parts[:-1]])), strict=True):
        drawn = blocks == block
        start = int(block) * ROWS_AT_ONCE
        rest = targets[drawn] - (ends[block - 1] if block else 0.0)
        inside = np.searchsorted(np.cumsum(part), rest, side="right")
        chosen[drawn] = start + np.minimum(inside, np.flatnonzero(part)[-1])
    return chosen


def block_ends(mass: Any) -> np.ndarray:
    """Cumulative sums of `mass` at the end of each ROWS_AT_ONCE elements and at the end of all, on the host."""
    if not is_tensor(mass):
        return np.cumsum(np.add.reduceat(mass, np.arange(0, len(mass), ROWS_AT_ONCE)))
    whole = len(mass) // ROWS_AT_ONCE * ROWS_AT_ONCE
    sums = [mass[:whole].reshape(-1, ROWS_AT_ONCE).sum(axis=1), mass[whole:].sum()[None]]
    return np.cumsum(to_host(namespace(mass).concatenate(sums[: 1 if whole == len(mass) else 2])))


def draw_by_weight(data: Observations, u: np.ndarray) -> np.ndarray:
    """Rows drawn with probability proportional to their weight."""
    return (u * len(data.x)).astype(np.int64) if data.weight is None else draw(data.weight, u)


def rows_of_a_sample(data: Observations, n_components: int) -> int:
    """How many rows may be copied to look at them more often than the rest."""
    wanted = max(ROWS_PER_COMPONENT * n_components, FEWEST_ROWS_OF_A_SAMPLE)
    return max(min(wanted, ELEMENTS_OF_A_SAMPLE // data.n_features), 1)


class _Distances:
    """Squared distances of rows to points, in the metric frame, by the direct kernel."""

    def __init__(self, data: Observations, frame: Frame) -> None:
        self.data = data
        # Where the rows lie: to send them with every point would wait for the device.
        D = data.n_features
        numbers = frame.shift, frame.scale, np.ones((1, D)), np.zeros(1)
        self.shift, self.scale, self.ones, self.zero = (beside(each, data.x) for each in numbers)

    def empty(self) -> Any:
        """A number for each row, where the rows lie."""
        return empty((len(self.data.x),), np.float64, self.data.x)

    def to(self, point: Any, out: Any) -> Any:
        """‖z_n − z‖² = −2 log N(z_n; z, 1) but for a constant; `point` (D,) and `out` (N,) float64, beside the rows."""
        unit = Direct("diag", self.shift, self.scale, point[None], self.ones, self.zero)
        self.data.kernels.log_prob(self.data.x, unit, out, n_threads=self.data.n_threads)
        out *= -2.0
        return out


def plus_plus_rows(data: Observations, frame: Frame, n_seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Rows chosen by greedy k-means++: each next one with probability ω d², the best of 2 + log K candidates.

    Candidates are compared by the potential they leave on all rows, or on 256 rows per seed, drawn by weight, if there
    are more. On a GPU the host learns of a seed, in turn: the sums of ω d², the blocks that are drawn from, the
    candidates and their potentials.

    References
    ----------
    Arthur, Vassilvitskii (2007), "k-means++: the advantages of careful seeding", section 2.2.
    """
    N, most = len(data.x), rows_of_a_sample(data, n_seeds)
    sampled = most < N
    sample = np.sort(draw_by_weight(data, rng.random(most))) if sampled else np.arange(N)
    all_rows = _Distances(data, frame)
    trial_rows = _Distances(data.subset(sample), frame) if sampled else all_rows
    trial_weight = None if sampled else data.weight
    xp = namespace(data.x)

    seeds = draw_by_weight(data, rng.random(1))
    nearest = all_rows.to(beside(_points(data, frame, seeds), data.x)[0], all_rows.empty())
    if data.weight is not None:
        nearest[data.weight == 0] = 0.0
    spare, trial, trial_places = all_rows.empty(), trial_rows.empty(), beside(sample, data.x)
    while len(seeds) < n_seeds:
        mass = nearest if data.weight is None else xp.multiply(nearest, data.weight, out=spare)
        u = rng.random(2 + int(np.log(n_seeds)))
        ends = block_ends(mass)
        candidates = draw(mass, u, ends) if ends[-1] > 0 else draw_by_weight(data, u)
        points = beside(_points(data, frame, candidates), data.x)
        so_far = nearest[trial_places] if sampled else nearest
        potentials = []
        for point in points:
            xp.fmin(so_far, trial_rows.to(point, trial), out=trial)
            potentials.append(trial.sum() if trial_weight is None else trial @ trial_weight)
        best = int(np.argmin(to_host(xp.stack(potentials))))
        xp.fmin(nearest, all_rows.to(points[best], spare), out=nearest)
        seeds = np.append(seeds, candidates[best])
    return seeds


def _points(data: Observations, frame: Frame, rows: np.ndarray) -> np.ndarray:
    """Rows of the data in the metric frame; (n, D) float64, on the host."""
    return frame.apply(data.rows(rows))


def data_rows(data: Observations, n_seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Different rows, drawn by weight."""
    mass = empty((len(data.x),), np.float64, data.x)
    mass[:] = 1.0 if data.weight is None else data.weight
    seeds = []
    for _ in range(n_seeds):
        seeds.append(int(draw(mass, rng.random(1))[0]))
        mass[seeds[-1]] = 0.0
    return np.array(seeds)


# ---- from centres to the statistics of a first M-step


def kmeans(data: Observations, frame: Frame, centres: np.ndarray, iterations: int) -> np.ndarray:
    """Lloyd's algorithm from `centres` (K, D) in the metric frame; a centre without rows stays where it is."""
    spherical = COVARIANCES["spherical"]
    spread = float(np.mean(data.variance * (frame.scale / data.frame.scale) ** 2))
    for _ in range(iterations):
        components = unit_components(centres)
        statistics, _ = data.statistics(spherical.packed(components, frame, "float64"), hard=True)
        moments = spherical.moments(statistics, components, "packed")
        moved = np.where(moments.mass[:, None] > 0, moments.means(), centres)
        shift = ((moved - centres) ** 2).sum()
        centres = moved
        if shift <= KMEANS_TOLERANCE * spread:
            break
    return centres


def kmeans_rows(data: Observations, frame: Frame, n_seeds: int, rng: np.random.Generator) -> np.ndarray:
    """k-means from k-means++ seeds: to convergence on a sample if there are many rows, then a little further on all."""
    centres = _points(data, frame, plus_plus_rows(data, frame, n_seeds, rng))
    most = rows_of_a_sample(data, n_seeds)
    if len(data.x) <= most:
        return kmeans(data, frame, centres, KMEANS_ITERATIONS)
    rows = np.sort(draw_by_weight(data, rng.random(most)))
    return kmeans(data, frame, kmeans(data.subset(rows), frame, centres, KMEANS_ITERATIONS), KMEANS_ITERATIONS_ON_ALL)


def hard_statistics(data: Observations, covariance: Covariance, frame: Frame, centres: np.ndarray) -> np.ndarray:
    """S in the data's frame with every row given to its nearest centre; `centres` in the metric frame."""
    K = len(centres)
    ratio = frame.scale / data.frame.scale
    means = data.frame.apply(frame.undo(centres))
    covariances = covariance.from_variances(ratio**-2.0, K)
    components = Components(np.full(K, 1.0 / K), means, covariances, covariance.factor(covariances))
    statistics, _ = data.statistics(covariance.packed(components, data.frame, "float64"), hard=True)
    if covariance.shared:  # out of the metric that took the place of the whitening
        statistics[:, 1:-1] /= ratio
    return statistics


def random_statistics(
    data: Observations, covariance: Covariance, n_components: int, rng: np.random.Generator
) -> np.ndarray:
    """S for responsibilities drawn uniformly and normalized, row by row; drawn where the rows lie."""
    sampling, seed = backends.kernels(data.backend, "sampling"), int(rng.integers(2**64, dtype=np.uint64))
    F = statistic_count(covariance.feature_map, data.n_features)
    frame = Frame(beside(data.frame.shift, data.x), beside(data.frame.scale, data.x))
    out = beside(np.zeros((n_components, F)), data.x)
    step = max(ELEMENTS_OF_A_SAMPLE // max(F, n_components), 1)
    for start in range(0, len(data.x), step):
        rows = slice(start, start + step)
        r = empty((len(data.x[rows]), n_components), np.float64, data.x)
        sampling.uniforms(seed, RESPONSIBILITIES, start * n_components, r.reshape(-1))
        r /= r.sum(axis=1)[:, None]
        if data.weight is not None:
            r *= data.weight[rows, None]
        out += r.T @ features(frame.apply(as_float64(data.x[rows])), covariance.feature_map)
    return to_host(out)


Start = Callable[[Observations, Covariance, int, np.random.Generator], np.ndarray]


def _from_centres(choose: Callable[[Observations, Frame, int, np.random.Generator], np.ndarray]) -> Start:
    """An initialization that gives every row to the nearest of the centres that `choose` finds."""

    def start(data: Observations, covariance: Covariance, n_components: int, rng: np.random.Generator) -> np.ndarray:
        frame = metric_frame(data, covariance)
        return hard_statistics(data, covariance, frame, choose(data, frame, n_components, rng))

    return start


# Each gives the statistics S (K, F), about zero in the data's frame, of the responsibilities it begins with.
INITIALIZATIONS: Final[dict[str, Start]] = {
    "kmeans": _from_centres(kmeans_rows),
    "k-means++": _from_centres(lambda data, frame, K, rng: _points(data, frame, plus_plus_rows(data, frame, K, rng))),
    "random_from_data": _from_centres(lambda data, frame, K, rng: _points(data, frame, data_rows(data, K, rng))),
    "random": random_statistics,
}
