"""Mixtures of fewer components: pairs of them merged by their moments, the cheapest first (Runnalls 2007)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from emalgam.covariance import COVARIANCES, Covariance
from emalgam.gaussian import as_mixture
from emalgam.mixture import Mixture
from emalgam.packing import Components, Frame
from emalgam.validation import check_integer


@dataclass(frozen=True, slots=True, eq=False)
class _Merger:
    """Components in a frame that are merged in pairs: what a pair becomes, and what merging it costs."""

    covariance: Covariance
    frame: Frame
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    log_dets: np.ndarray

    @classmethod
    def of(cls, mixture: Mixture) -> _Merger:
        """Copies of the components; those of a tied mixture are full, as a merged one no longer shares."""
        frame = mixture.own_frame()
        components = mixture.components(frame)
        covariances = components.covariances
        if mixture.covariance.shared:
            covariances = mixture.covariance.matrices(covariances, *mixture.means.shape)
        covariance = COVARIANCES["full" if mixture.covariance.shared else mixture.covariance_type]
        log_dets = -2.0 * mixture.covariance.log_det(components.precisions_cholesky, *mixture.means.shape)
        parts = (components.weights, components.means, covariances, log_dets)
        return cls(covariance, frame, *(np.array(part) for part in parts))

    def merged(self, i: int, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights (n,), means (n, D) and covariances of component i merged with each of `others` (n,)."""
        weight = self.weights[i] + self.weights[others]
        share = np.divide(self.weights[others], weight, out=np.zeros(len(others)), where=weight > 0)
        # w = w_i + w_j,  μ = μ_i + s δ,  Σ = (1 − s) Σ_i + s Σ_j + s (1 − s) δδᵀ  with s = w_j / w, δ = μ_j − μ_i
        offset = self.means[others] - self.means[i]
        spread = {
            "full": lambda: offset[:, :, None] * offset[:, None],
            "diag": lambda: offset**2,
            "spherical": lambda: (offset**2).mean(axis=1),
        }[self.covariance.name]()
        s = share.reshape(-1, *(1,) * (spread.ndim - 1))
        covariances = (1 - s) * self.covariances[i] + s * self.covariances[others] + s * (1 - s) * spread
        return weight, self.means[i] + share[:, None] * offset, covariances

    def costs(self, i: int, others: np.ndarray) -> np.ndarray:
        """B = ½ [(w_i + w_j) log |Σ_ij| − w_i log |Σ_i| − w_j log |Σ_j|], (n,), but not below zero by rounding."""
        weight, _, covariances = self.merged(i, others)
        after = weight * self._log_det(covariances)
        before = self.weights[i] * self.log_dets[i] + self.weights[others] * self.log_dets[others]
        return np.maximum(0.5 * (after - before), 0.0)

    def _log_det(self, covariances: np.ndarray) -> np.ndarray:
        if self.covariance.name == "full":
            return np.linalg.slogdet(covariances)[1]
        logs = np.log(covariances)
        return logs.sum(axis=1) if logs.ndim == 2 else logs * self.means.shape[1]

    def all_costs(self) -> np.ndarray:
        """The costs of all pairs, (K, K), zero on the diagonal."""
        K = len(self.weights)
        table = np.zeros((K, K))
        for i in range(K - 1):
            table[i, i + 1 :] = table[i + 1 :, i] = self.costs(i, np.arange(i + 1, K))
        return table

    def merge(self, i: int, j: int) -> None:
        """Put the merged pair in the place of i."""
        weight, means, covariances = self.merged(i, np.array([j]))
        self.weights[i], self.means[i], self.covariances[i] = weight[0], means[0], covariances[0]
        self.log_dets[i] = self._log_det(covariances)[0]

    def mixture(self, kept: np.ndarray) -> Mixture:
        """The mixture of the components `kept`."""
        covariances = self.covariances[kept]
        factors = self.covariance.factor(covariances)
        components = Components(self.weights[kept], self.means[kept], covariances, factors)
        return Mixture.from_components(components, self.frame, self.covariance)


def merge_costs(p: Any) -> np.ndarray:
    """How much merging each pair of components may cost: upper bounds of KL(before ‖ after), in nats.

    Parameters
    ----------
    p : Mixture or fitted GaussianMixture

    Returns
    -------
    (K, K) float64
        B_ij = ½ [(w_i + w_j) log |Σ_ij| − w_i log |Σ_i| − w_j log |Σ_j|], symmetric, zero on the diagonal.

    References
    ----------
    Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction, IEEE Transactions on Aerospace and
    Electronic Systems 43, 989-999: the bound B(i, j) of eq. 21.

    Examples
    --------
    >>> import numpy as np
    >>> p = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.ones(2), "spherical")
    >>> merge_costs(p).round(6)
    array([[0.      , 0.346574],
           [0.346574, 0.      ]])
    """
    return _Merger.of(as_mixture("p", p)).all_costs()


def merge(p: Any, i: int, j: int) -> Mixture:
    """The mixture in which components i and j have become one with their weight, mean and covariance.

    Parameters
    ----------
    p : Mixture or fitted GaussianMixture
    i, j : int
        Different components; the merged one takes the place of the smaller index.

    Returns
    -------
    Mixture
        Of K − 1 components. The type stays (variances are matched for "diag", their mean for "spherical"), but for
        "tied", which becomes "full". Mean and covariance of the whole mixture stay, for "full" and "tied".

    References
    ----------
    Runnalls (2007); Salmond (1990), Mixture reduction algorithms for target tracking in clutter.

    Examples
    --------
    >>> import numpy as np
    >>> p = Mixture(np.array([0.25, 0.25, 0.5]), np.array([[-1.0], [1.0], [9.0]]), np.ones(3), "spherical")
    >>> merge(p, 0, 1)
    Mixture(weights=array([0.5, 0.5]), means=array([[0.],
           [9.]]), covariances=array([2., 1.]), covariance_type='spherical')
    """
    mixture = as_mixture("p", p)
    K = mixture.n_components
    for name, index in (("i", i), ("j", j)):
        if check_integer(name, index, 0) >= K:
            raise ValueError(f"{name} is {index}; the mixture has {K} components, 0 to {K - 1}")
    if i == j:
        raise ValueError(f"i and j are both {i}; expected different components")
    merger = _Merger.of(mixture)
    merger.merge(min(i, j), max(i, j))
    return merger.mixture(np.delete(np.arange(K), max(i, j)))


def reduce(p: Any, n_components: int) -> Mixture:
    """A mixture of fewer components: the pair that is cheapest to merge is merged, again and again.

    Parameters
    ----------
    p : Mixture or fitted GaussianMixture
    n_components : int
        From 1 to K.

    Returns
    -------
    Mixture
        The survivors in their order; types as in `merge`.

    Notes
    -----
    O(K²) costs are computed: all pairs once, then the K of each merged component. Memory: (K, K).

    References
    ----------
    Runnalls (2007), with the bound of `merge_costs`.

    Examples
    --------
    >>> import numpy as np
    >>> p = Mixture(np.array([0.25, 0.25, 0.5]), np.array([[-1.0], [1.0], [9.0]]), np.ones(3), "spherical")
    >>> reduce(p, 2).means
    array([[0.],
           [9.]])
    """
    mixture = as_mixture("p", p)
    K, wanted = mixture.n_components, check_integer("n_components", n_components, 1)
    if wanted > K:
        raise ValueError(f"n_components is {wanted}; the mixture has {K}")
    if wanted == K:
        return mixture
    merger = _Merger.of(mixture)
    costs, alive = merger.all_costs(), np.ones(K, bool)
    np.fill_diagonal(costs, np.inf)
    for _ in range(K - wanted):
        i, j = divmod(int(costs.argmin()), K)
        merger.merge(i, j)
        alive[j] = False
        costs[j] = costs[:, j] = np.inf
        others = np.flatnonzero(alive & (np.arange(K) != i))
        costs[i, others] = costs[others, i] = merger.costs(i, others)
    return merger.mixture(np.flatnonzero(alive))
