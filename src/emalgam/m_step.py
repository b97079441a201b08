"""The M-step: weights, means and covariances from the moments, and what is done when a component collapses.

A component collapses when no data are left to it, or when its data have (almost) no spread in a direction in which all
data have some. `on_degenerate` is the policy: "regularize" keeps it positive definite, "reseed" starts it again at a
random row (at most ten times as often as there are components; then it regularizes), "error" names it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import numpy as np

from emalgam.covariance import Covariance
from emalgam.initialization import draw_by_weight
from emalgam.namespace import beside, namespace
from emalgam.packing import Components, Moments
from emalgam.parts import Data
from emalgam_kernels.batch import LIFTS, NO_MASS, RELATIVE_FLOOR

RESEEDS_PER_COMPONENT: Final = 10
POLICIES: Final = ("regularize", "reseed", "error")


class DegenerateComponentError(ValueError):
    """A component collapsed under ``on_degenerate="error"``; `component` is its index (None: the tied covariance)."""

    def __init__(self, component: int | None, iteration: int, reason: str) -> None:
        which = "the tied covariance" if component is None else f"component {component}"
        super().__init__(
            f"{which} collapsed in iteration {iteration}: {reason}; use fewer components, a larger reg_covar, "
            'or on_degenerate="regularize" or "reseed"'
        )
        self.component, self.iteration = component, iteration


class NumericalError(ValueError):
    """A fit met NaN or infinity, or a covariance that no floor could mend."""


class MStep:
    """The M-step of one restart: `reg_covar` and `on_degenerate` as in `emalgam.fit`."""

    def __init__(
        self,
        data: Data,
        covariance: Covariance,
        n_components: int,
        reg_covar: float | str,
        on_degenerate: str,
        rng: np.random.Generator,
    ) -> None:
        self.data, self.covariance, self.K = data, covariance, n_components
        self.on_degenerate, self.rng = on_degenerate, rng
        # In the frame; a constant feature has no scale of its own and takes the frame's unit.
        self.spread = np.where(data.variance > 0, data.variance, 1.0)
        self.floor = RELATIVE_FLOOR * self.spread
        self.added = self.floor if reg_covar == "auto" else float(reg_covar) * data.frame.scale**2
        # The same where the data lie: to send them in every iteration would wait for the device.
        self.added_there = beside(self.added, data.sample.x)
        self.scatter_there = None if data.scatter is None else beside(data.scatter, data.sample.x)
        self.collapsed = np.empty(0, np.int64)  # components, in the last update; "regularize" does not look for them
        self.reseeded = False
        self.reseeds_left = RESEEDS_PER_COMPONENT * n_components

    @cached_property
    def limits_there(self) -> tuple[Any, Any]:
        """What `narrow` compares with, where the data lie."""
        return beside(self.data.total_covariance, self.data.sample.x), beside(self.floor, self.data.sample.x)

    def broadest(self, means: np.ndarray) -> Components:
        """Components about `means`, each as wide as all data."""
        covariances = self.covariance.from_variances(self.spread, self.K)
        return Components(np.full(self.K, 1.0 / self.K), means, covariances, self.covariance.factor(covariances))

    def update(self, moments: Moments, old: Components, algorithm: str, iteration: int, reseed: bool) -> Components:
        """w_k = N_k / Σ N, μ_k and Σ_k from the moments, regularized; then the policy.

        `reseed` is False in the last iteration: a component that no pass would look at again is not started anew.

        Raises
        ------
        DegenerateComponentError
            Under "error".
        NumericalError
            If the moments or a covariance are not finite, or nothing makes it positive definite.

        References
        ----------
        Bishop (2006), eq. 9.24-9.26.
        """
        total = moments.mass.sum()
        if not (np.isfinite(total) and total > 0):
            raise NumericalError(f"the responsibilities of iteration {iteration} sum to {total}")
        empty, weights, means, estimate, covariances = self.estimate(
            moments, old, algorithm, self.added, self.data.scatter
        )
        if not np.isfinite(covariances).all():
            raise NumericalError(f"a covariance became NaN or infinite in iteration {iteration}")
        if self.on_degenerate != "regularize":
            narrow = self.covariance.narrow(estimate, self.data.total_covariance, self.floor)
            collapsed = self.collapsed = np.flatnonzero(empty | narrow)
            if len(collapsed) and self.on_degenerate == "error":
                raise self.collapse(int(collapsed[0]), weights, iteration)
            self.reseeded = reseed and 0 < len(collapsed) <= self.reseeds_left
            if self.reseeded:
                self.reseed(collapsed, weights, means, covariances)
        covariances, factors = self.factor(covariances, iteration)
        return Components(weights, means, covariances, factors)

    def estimate(
        self, moments: Moments, old: Components, algorithm: str, added: np.ndarray, scatter: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Which components are empty, weights, means, covariances, and these regularized by `added`.

        An empty component stays where it was, without weight.
        """
        xp = namespace(moments.mass)
        total = moments.mass.sum()
        empty = moments.mass <= NO_MASS * total
        weights = xp.where(empty, 0.0, moments.mass) / total
        means = xp.where(empty[:, None], old.means, moments.means())
        estimate = self.covariance.estimate(moments, algorithm, scatter)
        covariances = self.covariance.regularize(estimate, added)
        if not self.covariance.shared:
            kept = empty.reshape(-1, *[1] * (covariances.ndim - 1))
            covariances = xp.where(kept, old.covariances, covariances)
        return empty, weights, means, estimate, covariances

    def update_where_it_lies(self, moments: Moments, old: Components, algorithm: str) -> tuple[Components, Any]:
        """`update` on a GPU, waiting for nothing, and whether all was in order, a bool () there.

        If it was not, `update` has to decide on the host. Under "regularize" a collapse is in order.
        """
        empty, weights, means, estimate, covariances = self.estimate(
            moments, old, algorithm, self.added_there, self.scatter_there
        )
        factors = self.covariance.factor(covariances)
        xp = namespace(moments.mass)
        sound = moments.mass.sum() > 0
        for part in (weights, means, covariances, factors):
            sound &= xp.isfinite(part).all()
        if self.on_degenerate != "regularize":
            sound &= ~(empty | self.covariance.narrow(estimate, *self.limits_there)).any()
        return Components(weights, means, covariances, factors), sound

    def collapse(self, k: int, weights: np.ndarray, iteration: int) -> DegenerateComponentError:
        """The error that names component k."""
        reason = "it has no data left" if weights[k] == 0 else "its data have (almost) no spread in some direction"
        return DegenerateComponentError(k, iteration, f"{reason} (weight {weights[k]:.3g})")

    def reseed(self, collapsed: np.ndarray, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
        """Start the collapsed components again at random rows, as wide as all data, with weight 1 / K; in place."""
        self.reseeds_left -= len(collapsed)
        rows = draw_by_weight(self.data.sample, self.rng.random(len(collapsed)))
        means[collapsed] = self.data.frame.apply(self.data.sample.rows(rows))
        if not self.covariance.shared:  # a shared covariance is as wide as it should be
            covariances[collapsed] = self.broadest(means).covariances[collapsed]
        weights[collapsed] = 1.0 / self.K
        weights /= weights.sum()

    def factor(self, covariances: np.ndarray, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Covariances and their factors; those that are not positive definite get the floor, growing until they are."""
        try:
            return covariances, self.covariance.factor(covariances)
        except np.linalg.LinAlgError:
            if self.covariance.shared:
                return self.lift(covariances, None, iteration)
        pairs = [self.lift(covariances[k : k + 1], k, iteration) for k in range(self.K)]
        return np.concatenate([c for c, _ in pairs]), np.concatenate([f for _, f in pairs])

    def lift(self, covariances: np.ndarray, k: int | None, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """One covariance and its factor, with as many floors added as it takes."""
        for times in LIFTS:
            lifted = self.covariance.regularize(covariances, times * self.floor)
            try:
                return lifted, self.covariance.factor(lifted)
            except np.linalg.LinAlgError:
                if self.on_degenerate == "error":
                    reason = "its covariance is not positive definite"
                    raise DegenerateComponentError(k, iteration, reason) from None
        raise NumericalError(f"a covariance of iteration {iteration} is not positive definite, whatever is added to it")


def effective_components(components: Components, covariance: Covariance) -> int:
    """How many components have weight and differ from every earlier one by more than rounding."""
    alive = np.flatnonzero(components.weights > 0)
    means = components.means[alive]
    shapes = np.empty((len(alive), 0))
    if not covariance.shared:
        shapes = components.covariances[alive].reshape(len(alive), -1)
    count = 0
    for k in range(len(alive)):
        twins = np.flatnonzero(_equal(means[:k], means[k]))
        count += not _equal(shapes[twins], shapes[k]).any()
    return count


def _equal(rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which rows are equal to `row` but for rounding, (n,) bool."""
    return (np.abs(rows - row) <= 1e-6 * np.maximum(np.abs(row), np.sqrt(RELATIVE_FLOOR))).all(axis=1)
