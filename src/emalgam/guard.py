"""The guard: packed while the inner product keeps its digits, direct where it would cancel.

The terms of ⟨η_k, φ⟩ cancel down to a log-density. Near component k they are as large as
c = Σ_ij |Λ_ij| s_i s_j with s_i² = Σ_ii + μ_i² (`Covariance.cancellation`), so the rounding error is a few eps · c:
known before each pass, for nothing. ``bench/precision.py`` measures the factors below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from emalgam.covariance import Covariance
from emalgam.packing import Components, Frame
from emalgam_kernels import Parameters

ALGORITHMS: Final = ("auto", "packed", "direct")

# Largest absolute error of a log-density, in nats, that "auto" lets a tile of float32 and of float64 arithmetic make.
TOLERANCE: Final = {"float32": 1e-3, "float64": 1e-9}
ERROR_FACTOR: Final = 4.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a pass evaluates log-densities, and the bound on its absolute error near the components, in nats."""

    algorithm: str
    arithmetic: str
    error_bound: float


def choose_evaluation(algorithm: str, dtype: np.dtype, covariance: Covariance, components: Components) -> Evaluation:
    """Packed in the data's own precision while the bound keeps the tolerance, then packed in float64, then direct.

    float32 data tolerate 1e-3 nats in float32 arithmetic; float64 arithmetic, whatever the data, 1e-9. "packed" stays
    with the data's precision, "direct" always computes in float64.
    """
    arithmetics = ("float32", "float64") if dtype == np.float32 else ("float64",)
    if algorithm != "direct":
        size = covariance.cancellation(components)
        for arithmetic in arithmetics:
            bound = ERROR_FACTOR * float(np.finfo(arithmetic).eps) * size
            if algorithm == "packed" or bound <= TOLERANCE[arithmetic]:
                return Evaluation("packed", arithmetic, bound)
    # About its own mean only Σ_k itself can cancel; the differences z − μ_k have size m.
    size = _own_cancellation(covariance, components) + float(np.sqrt(covariance.cancellation(components)))
    return Evaluation("direct", "float64", ERROR_FACTOR * float(np.finfo(np.float64).eps) * size)


def packed_reach(how: Evaluation, covariance: Covariance, components: Components) -> float:
    """½ m²: a row whose log-density is lower than that below the constants is too far away for the packed form.

    At m standard deviations from the components the terms are about m² · own / D large, so the tolerance holds while
    4 · eps · m² · own / D does.
    """
    eps = float(np.finfo(how.arithmetic).eps)
    own = _own_cancellation(covariance, components) / components.means.shape[1]
    return 0.5 * TOLERANCE[how.arithmetic] / (ERROR_FACTOR * eps * own)


def _own_cancellation(covariance: Covariance, components: Components) -> float:
    return covariance.cancellation(replace(components, means=np.zeros_like(components.means)))


def parameters_of(covariance: Covariance, components: Components, frame: Frame, how: Evaluation) -> Parameters:
    """What the kernels of `how.algorithm` need to know about `components`."""
    make = covariance.direct if how.algorithm == "direct" else covariance.packed
    return make(components, frame, how.arithmetic)
