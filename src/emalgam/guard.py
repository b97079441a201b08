"""The guard: packed while the inner product keeps its digits, direct where it would cancel.

The terms of ⟨η_k, φ⟩ cancel down to a log-density. Near component k they are as large as
c = Σ_ij |Λ_ij| s_i s_j with s_i² = Σ_ii + μ_i² (`Covariance.cancellation`), so the rounding error is a few eps · c:
known before each pass, for nothing. ``bench/precision.py`` measures the factors below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, TypeVar

import numpy as np

from emalgam.covariance import Covariance
from emalgam.namespace import namespace
from emalgam.packing import Components, Frame
from emalgam_kernels import Parameters

ALGORITHMS: Final = ("auto", "packed", "direct")

# Largest absolute error of a log-density, in nats, that "auto" lets a tile of float32 and of float64 arithmetic make.
TOLERANCE: Final = {"float32": 1e-3, "float64": 1e-9}
ERROR_FACTOR: Final = 4.0

PRECISIONS: Final = ("strict", "mixed", "tf32")
EPS_OF_TF32: Final = 2.0**-10

LARGEST_FLOAT32: Final = 1e9  # squares of rows further out than this could overflow a float32 tile
# What rounding may add to a change of the mean log-density, by the error bound of a pass. Errors of rows and components
# average out: that of a mean was up to 6 % of the bound (`python bench/precision.py`), and a change has two of them.
NOISE_OF_A_CHANGE: Final = 1 / 8


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a pass evaluates log-densities, and the bound on its absolute error near the components, in nats."""

    algorithm: str
    arithmetic: str
    error_bound: float


@dataclass(frozen=True, slots=True)
class Cancellation:
    """How large the terms of ⟨η_k, φ⟩ are near the components (`Covariance.cancellation`).

    `packed` is about the origin of the frame; `own()` about each component's own mean, where only Σ_k itself can
    cancel.
    """

    packed: float
    own: Callable[[], float]

    @classmethod
    def of(cls, covariance: Covariance, components: Components) -> Cancellation:
        """Of components on the host; not finite where they are so far apart that squares overflow."""
        packed, own = cls.scalars(covariance, components)

        def number(scalar: Callable[[], np.ndarray]) -> float:
            with np.errstate(over="ignore", invalid="ignore"):
                return float(scalar())

        return cls(number(packed), lambda: number(own))

    @staticmethod
    def scalars(
        covariance: Covariance, components: Components
    ) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
        """What computes the two numbers where the components lie."""

        def own() -> np.ndarray:
            zero = namespace(components.means).zeros_like(components.means)
            return covariance.cancellation(replace(components, means=zero))

        return lambda: covariance.cancellation(components), own


def choose_evaluation(
    algorithm: str, dtype: np.dtype, cancellation: Cancellation, precision: str = "strict"
) -> Evaluation:
    """Packed in the data's own precision while the bound keeps the tolerance, then packed in float64, then direct.

    float32 data tolerate 1e-3 nats in float32 arithmetic; float64 arithmetic, whatever the data, 1e-9. "packed" stays
    with the data's precision, "direct" always computes in float64. With `precision` "tf32" products round the operands
    of what would be float32 arithmetic to TF32, and the bound says what that costs.
    """
    arithmetics = ("float32", "float64") if dtype == np.float32 else ("float64",)
    if algorithm != "direct":
        for arithmetic in arithmetics:
            bound = packed_bound(arithmetic, cancellation.packed)
            if algorithm == "packed" or bound <= TOLERANCE[arithmetic]:
                if arithmetic == "float32" and precision == "tf32":
                    return Evaluation("packed", "tf32", ERROR_FACTOR * EPS_OF_TF32 * cancellation.packed)
                return Evaluation("packed", arithmetic, bound)
    # About its own mean only Σ_k itself can cancel. The shift rounds z and μ_k where they have size m; where there is
    # none (`Frame.about_origin`, in queries) this is more than the error.
    size = cancellation.own() + cancellation.packed**0.5
    return Evaluation("direct", "float64", ERROR_FACTOR * float(np.finfo(np.float64).eps) * size)


Number = TypeVar("Number", float, np.ndarray)


def packed_bound(arithmetic: str, packed: Number) -> Number:
    """The bound on the absolute error of the packed form near the components, in nats; `packed` as in Cancellation."""
    return ERROR_FACTOR * float(np.finfo(arithmetic).eps) * packed


def packed_reach(arithmetic: str, own: Number, n_features: int) -> Number:
    """½ m²: a row whose log-density is lower than that below the constants is too far away for the packed form.

    At m standard deviations from the components the terms are about m² · own / D large, so the tolerance holds while
    4 · eps · m² · own / D does, with `own` as in Cancellation.
    """
    return 0.5 * TOLERANCE[arithmetic] / (packed_bound(arithmetic, own) / n_features)


@dataclass
class Schedule:
    """The arithmetic of the passes of one run of EM, and which changes of the log-likelihood mean convergence.

    Under "mixed", passes compute in float32, where the guard lets them, until they change the mean log-likelihood by
    less than `tol` or than rounding might; then in float64, until a change is below `tol` whatever rounding did. The
    last pass is in float64, unless a callback ends the fit.

    Attributes
    ----------
    algorithm, precision : str
        As in `emalgam.fit`.
    tol : float
        Nats.
    dtype : dtype
        Of the data.
    largest : float
        max |z| in the frame.
    float32_iterations : int
        Passes that computed in float32.
    settled : bool
        Under "mixed": whether no more will.
    noise : float
        What the last pass, if it is one of those, may add to the next change; nats.
    """

    MEMORY: ClassVar[dict[str, type]] = {"float32_iterations": int, "settled": bool, "noise": float}

    algorithm: str
    precision: str
    tol: float
    dtype: np.dtype
    largest: float
    float32_iterations: int = 0
    settled: bool = False
    noise: float = 0.0

    def before(self, cancellation: Cancellation, last: bool = False) -> Evaluation:
        """The guard, before each pass; `last` if no other can follow."""
        dtype = self.dtype
        if self.precision == "mixed":
            # "packed" too: what it asks for is the data's own precision, not the rounding of other passes.
            accurate = packed_bound("float32", cancellation.packed) <= TOLERANCE["float32"]
            dtype = np.dtype(np.float32 if accurate and not (self.settled or last) else np.float64)
        if self.largest >= LARGEST_FLOAT32:
            dtype = np.dtype(np.float64)
        return choose_evaluation(self.algorithm, dtype, cancellation, self.precision)

    def after(self, how: Evaluation, change: float, reseeded: bool = False) -> bool:
        """Whether EM has converged, after a pass that changed the log-likelihood by `change`.

        One whose M-step `reseeded` a component says nothing: the next will be far from it.
        """
        in_float32 = how.arithmetic != "float64"
        self.float32_iterations += in_float32
        if self.precision != "mixed":
            return abs(change) < self.tol and not reseeded
        noise_before, self.noise = self.noise, NOISE_OF_A_CHANGE * how.error_bound if in_float32 else 0.0
        self.settled |= in_float32 and not reseeded and abs(change) < max(self.tol, self.noise)
        return not in_float32 and not reseeded and abs(change) + noise_before < self.tol

    def memory(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {name: getattr(self, name) for name in self.MEMORY}


def parameters_of(covariance: Covariance, components: Components, frame: Frame, how: Evaluation) -> Parameters:
    """What the kernels of `how.algorithm` need to know about `components`."""
    make = covariance.direct if how.algorithm == "direct" else covariance.packed
    return make(components, frame, how.arithmetic)
