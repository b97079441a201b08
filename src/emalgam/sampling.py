"""Gaussians to draw from and to compute with, Monte Carlo expectations, and mixtures of fewer components.

Random numbers are Philox's: sample i is a function of (seed, i) alone, whatever the number of threads and the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from emalgam import arrays, backends
from emalgam.draws import philox_seed, sampler_of
from emalgam.gaussian import Gaussian, as_mixture, moment_match
from emalgam.reduction import merge, merge_costs, reduce
from emalgam.validation import check_integer, check_threads

__all__ = ["Estimate", "Gaussian", "expectation", "merge", "merge_costs", "moment_match", "reduce"]

ELEMENTS_AT_ONCE: Final = 2**20  # numbers of a chunk of samples: 8 MB


class Estimate(NamedTuple):
    """A Monte Carlo estimate: floats, or arrays of one shape."""

    value: Any
    standard_error: Any
    n_samples: Any


def expectation(
    f: Callable[[np.ndarray], Any],
    p: Any,
    n: int,
    seed: Any = None,
    *,
    backend: str = "auto",
    n_threads: int | None = None,
) -> Estimate:
    """E_p[f(x)] as the mean of f over n samples of p, with its standard error; memory does not grow with n.

    Parameters
    ----------
    f : callable
        Takes samples (m, D) float64 and returns m values, or m rows of values: (m, ...).
    p : Gaussian, Mixture or fitted GaussianMixture
    n : int
        Number of samples.
    seed : None, int or NumPy generator
        As `random_state` of `Gaussian.sample`.
    backend, n_threads
        As in `Gaussian.sample`.

    Returns
    -------
    Estimate
        `value` and `standard_error` floats, or of the shape of f's values; the standard error is NaN for n = 1.

    Raises
    ------
    ValueError
        For n < 1, or if f returns another number of rows than it got.

    References
    ----------
    Bishop (2006), eq. 11.2; means and squares merge as in Chan, Golub, LeVeque (1983), "Algorithms for
    computing the sample variance: analysis and recommendations".

    Examples
    --------
    >>> second_moment = expectation(lambda x: x[:, 0] ** 2, Gaussian(0.0, 4.0), n=20_000, seed=0)
    >>> abs(second_moment.value - 4.0) < 4 * second_moment.standard_error
    True
    """
    n, threads = check_integer("n (n_samples)", n, 1), check_threads(n_threads)
    mixture, kernels, key = as_mixture("p", p), backends.kernels(backend, "sampling"), philox_seed(seed)
    sampler, rows = sampler_of(mixture), max(ELEMENTS_AT_ONCE // mixture.n_features, 1)
    mean, squares = np.zeros(()), np.zeros(())
    for first in range(0, n, rows):
        count = min(rows, n - first)
        x = np.empty((count, mixture.n_features))
        kernels.sample_mixture(sampler, key, first, x, np.empty(count, np.int64), n_threads=threads)
        values = _values(f, x)
        # M ← M + M' + δ² n n' / (n + n') with δ = mean' − mean
        chunk_mean = values.mean(axis=0)
        change = chunk_mean - mean
        squares = squares + ((values - chunk_mean) ** 2).sum(axis=0) + change**2 * (first * count / (first + count))
        mean = mean + change * (count / (first + count))
    error = np.sqrt(squares / (n - 1) / n) if n > 1 else np.full_like(squares, np.nan)
    if mean.ndim == 0:
        return Estimate(float(mean), float(error), n)
    return Estimate(mean, error, n)


def _values(f: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    values = arrays.to_numpy(f(x), "what f returns")
    if values.dtype.kind not in "fiub" or values.ndim == 0 or len(values) != len(x):
        raise ValueError(
            f"f returned shape {values.shape} and dtype {values.dtype} for {len(x)} samples; expected real numbers of "
            f"shape ({len(x)}, ...)"
        )
    return values.astype(np.float64, copy=False)
