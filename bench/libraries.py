"""The competitors behind one function, and the check that all of them compute the same thing.

Every library begins from the same parameters and adds nothing to covariances, so after m iterations all must hold the
same mixture but for rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np

import emalgam
from bench.problems import SMALLEST, SMOKE_SIZE, Case, Problem, problem

EMALGAM: Final = ("cython_cpu", "numba_cpu")
REFERENCE: Final = "reference"
SCIKIT_LEARN: Final = "scikit-learn"
ONEDAL: Final = "oneDAL"
ITERATIONS_COMPARED: Final = 3

# Largest difference from scikit-learn's float64 result on the same rows after ITERATIONS_COMPARED iterations. The
# clusters have variances near one, so means and covariances compare as they are. float64: rounding only, 1e-12 at most
# was seen. float32: scikit-learn sums N terms in float32 and was off by 1e-5 nats and 1e-3, the others by a hundredth.
TOLERANCES: Final = {
    "float64": {"lower bound (nats)": 1e-10, "weights (relative)": 1e-10, "means": 1e-10, "covariances": 1e-10},
    "float32": {"lower bound (nats)": 2e-4, "weights (relative)": 3e-3, "means": 3e-3, "covariances": 3e-3},
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """Parameters after so many iterations, the last one's mean log-likelihood, and what the library says it ran."""

    iterations: int
    lower_bound: float
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    how: str


def fit_emalgam(backend: str, problem: Problem, iterations: int) -> Outcome:
    """`emalgam.fit` on all processors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        result = emalgam.fit(
            problem.x,
            problem.case.K,
            covariance_type=problem.case.covariance_type,
            tol=0.0,
            reg_covar=0.0,
            max_iter=iterations,
            weights_init=problem.weights,
            means_init=problem.means,
            precisions_init=problem.precisions,
            backend=backend,
        )
    if result.backend != backend:
        raise AssertionError(f"emalgam ran {result.backend}; expected {backend}")
    how = f"{result.algorithm}, {result.arithmetic}"
    mixture = result.mixture
    return Outcome(result.n_iter, result.lower_bound, mixture.weights, mixture.means, mixture.covariances, how)


def fit_scikit_learn(problem: Problem, iterations: int) -> Outcome:
    """`sklearn.mixture.GaussianMixture`: a complete start skips its k-means; BLAS on all processors."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    dtype = problem.x.dtype
    model = GaussianMixture(
        problem.case.K,
        covariance_type=problem.case.covariance_type,
        tol=0.0,
        reg_covar=0.0,
        max_iter=iterations,
        weights_init=problem.weights.astype(dtype),
        means_init=problem.means.astype(dtype),
        precisions_init=problem.precisions.astype(dtype),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(problem.x)
    how = str(model.means_.dtype)
    return Outcome(model.n_iter_, model.lower_bound_, model.weights_, model.means_, model.covariances_, how)


def fit_onedal(problem: Problem, iterations: int) -> Outcome:
    """`daal4py.em_gmm` on all processors. Full and diagonal covariances; stops when the likelihood stands still."""
    from daal4py import em_gmm

    case, dtype = problem.case, problem.x.dtype
    full = case.covariance_type == "full"
    algorithm = em_gmm(
        nComponents=case.K,
        fptype="float" if dtype == np.float32 else "double",
        maxIterations=iterations,
        accuracyThreshold=0.0,
        covarianceStorage="full" if full else "diagonal",
    )
    covariances = list((problem.covariances if full else problem.covariances[:, None]).astype(dtype))
    result = algorithm.compute(problem.x, problem.weights[None].astype(dtype), problem.means.astype(dtype), covariances)
    found = np.stack(result.covariances).reshape(problem.covariances.shape)
    ran, total = int(result.nIterations.item()), float(result.goalFunction.item())
    return Outcome(ran, total / case.N, result.weights[0], result.means, found, str(result.means.dtype))


Fit = Callable[[Problem, int], Outcome]


def _backend(name: str) -> Fit:
    return lambda problem, iterations: fit_emalgam(name, problem, iterations)


LIBRARIES: Final[dict[str, Fit]] = {
    **{name: _backend(name) for name in (*EMALGAM, REFERENCE)},
    SCIKIT_LEARN: fit_scikit_learn,
    ONEDAL: fit_onedal,
}


def competitors(case: Case) -> list[str]:
    """Who takes part: the plain NumPy reference only in the smallest size, oneDAL where it has the covariance type."""
    return [
        name
        for name in LIBRARIES
        if not (name == REFERENCE and case.size not in (SMALLEST, SMOKE_SIZE))
        and not (name == ONEDAL and case.covariance_type not in ("full", "diag"))
    ]


@lru_cache(maxsize=1)
def expected(case: Case) -> Outcome:
    """scikit-learn's result in float64, on the rows as they are in the case's dtype."""
    given = problem(case)
    return fit_scikit_learn(replace(given, x=given.x.astype(np.float64)), ITERATIONS_COMPARED)


def differences(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    """How far a result is from the expected one, the largest over all elements."""
    return {
        "lower bound (nats)": abs(float(outcome.lower_bound) - float(truth.lower_bound)),
        "weights (relative)": float(np.abs(outcome.weights / truth.weights - 1).max()),
        "means": float(np.abs(outcome.means - truth.means).max()),
        "covariances": float(np.abs(outcome.covariances - truth.covariances).max()),
    }


def verify(name: str, case: Case, outcome: Outcome) -> dict[str, float]:
    """The differences from `expected`; AssertionError if one is too large, or if the arithmetic is not the case's."""
    truth = expected(case)
    if outcome.iterations != truth.iterations or case.dtype not in outcome.how:
        raise AssertionError(
            f"{name} ran {outcome.iterations} iterations ({outcome.how}) on {case}; "
            f"expected {truth.iterations} in {case.dtype}"
        )
    found = differences(outcome, truth)
    for quantity, allowed in TOLERANCES[case.dtype].items():
        if not found[quantity] <= allowed:
            raise AssertionError(
                f"{name} does not compute what scikit-learn computes on {case}: after {truth.iterations} iterations "
                f"{quantity} differs by {found[quantity]:.2g}; expected at most {allowed:g}. Its time means nothing."
            )
    return found
