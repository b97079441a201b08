"""The one table of tolerances: how far a result may be from its oracle, and why.

The dtype is the one that the arithmetic is done in. "eps" below is that of the dtype (2⁻⁵² or 2⁻²³), and a bound that
says "of the scale" is multiplied by the quantity that the test states, which says how much of the digits the problem
itself costs. Never enlarge a number here without the reason beside it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

EPS: Final = {"float64": 2.0**-52, "float32": 2.0**-23}
# How far a Monte Carlo mean may be from the truth: a false alarm once in 1.7 million comparisons, and seeds are fixed.
STANDARD_ERRORS: Final = 5.0


class Tolerance(NamedTuple):
    """The bound, and why it is neither smaller nor larger."""

    value: float
    reason: str


def _both(operation: str, multiple_of_eps: float, reason: str) -> dict[tuple[str, str], Tolerance]:
    return {(operation, dtype): Tolerance(multiple_of_eps * eps, reason) for dtype, eps in EPS.items()}


def _ulp(operation: str, ulp: float, reason: str) -> dict[tuple[str, str], Tolerance]:
    return {(operation, dtype): Tolerance(ulp, reason) for dtype in EPS}


TOLERANCES: Final[dict[tuple[str, str], Tolerance]] = {
    # logits and what follows from them; scale: kernels/problems.py, Problem.logit_scale
    **_both(
        "packed log_prob",
        4,
        "the guard's own promise: 4 eps of m² plus the squared distance (1 to 2.5 were measured over all sizes)",
    ),
    **_both(
        "direct log_prob",
        2,
        "no cancellation: the rounding of z, of P and of the sum of squares (0.6 to 0.7 of the scale were measured)",
    ),
    ("log_prob far from others", "float64"): Tolerance(
        2 * EPS["float64"],
        "of 1 + |log p| + D log(distance): x − μ is rounded once, and log |P| and log scale, as large as the logarithm "
        "of the distance, cancel (1.2 of that was measured)",
    ),
    **_both(
        "packed responsibilities",
        4,
        "relative: exp turns the absolute error of L_nk − log p(x_n) into a relative one, which is that of log_prob",
    ),
    **_both("direct responsibilities", 2, "relative: as for packed, with the error of the direct logits"),
    **_both(
        "packed em_statistics",
        2,
        "of Σ |ω r φ| scale: each term carries the relative error of its responsibility, half of which cancels in the "
        "sum (0.5 was measured)",
    ),
    **_both("direct em_statistics", 1, "as for packed, with the error of the direct logits (0.4 was measured)"),
    **_both(
        "packed log-likelihood",
        4,
        "of Σ ω scale: the sum of what log_prob is allowed; the rounding of the sum itself, in float64, grows like √N",
    ),
    **_both(
        "direct log-likelihood",
        4,
        "as for packed: direct terms are so accurate that the order of the sum decides (2 of the scale were measured)",
    ),
    **_both(
        "sum of responsibilities",
        1,
        "of 2 + √K: a quotient, a product, and a running sum of K terms, whose rounding grows like √K (6 at K = 64)",
    ),
    **_both(
        "order of a sum",
        1,
        "of √N Σ |terms|: the same N numbers added in another order; running sums were seen to differ by half of it",
    ),
    **_both("same mixture", 8, "of the scale: two results that may each be wrong by the packed tolerance of 4"),
    # exp and log as the kernels evaluate them, in units of the last place
    **_ulp("exp", 2, "DESIGN section 2 asks for 2 ulp; the polynomial, its reduction and its roundings need 1"),
    **_ulp(
        "exp by ratio",
        3,
        "2 for exp, and half a unit for each of the two roundings that r_1 / r_0 contains (product or quotient, twice)",
    ),
    **_ulp("log", 2, "DESIGN section 2 asks for 2 ulp; fdlibm's arrangement stays below 1"),
    **_ulp("numpy exp", 4, "the reference takes NumPy's: 2.5 ulp in float32 by its documentation, 4 with Intel's SVML"),
    **_ulp("numpy exp by ratio", 5, "4 for NumPy's exp, and the two roundings"),
    **_ulp("numpy log", 4, "the reference takes NumPy's: 3.8 ulp in float32 by its documentation, 4 with Intel's SVML"),
    # random numbers
    **_ulp(
        "normal",
        3,
        "Box-Muller: 1.5 ulp for cos or sin, log's error halved by the square root, and the roundings of root and "
        "product (2.3 and 2.7 were measured)",
    ),
    **_ulp(
        "numpy normal",
        5,
        "the reference takes NumPy's log, sin and cos, up to 4 ulp with Intel's SVML, and rounds the angle (2.6 and "
        "3.3 were measured)",
    ),
    ("log ratio", "float64"): Tolerance(
        2e-9, "nats a sample: the guard's promise, 1e-9, for each of two log-densities"
    ),
    ("log ratio", "float32"): Tolerance(
        2e-3, "nats a sample: the guard's promise, 1e-3, for each of two log-densities"
    ),
    # whole fits; relative, or of the largest entry
    ("fit", "float64"): Tolerance(
        1e-9, "tens of iterations, each with an error of some eps that later ones mostly forget"
    ),
    ("fit", "float32"): Tolerance(
        2e-4, "statistics of float32 tiles carry 1e-6 of the scale, and the floor of tol 1e-4 decides where they stop"
    ),
    ("monotone", "float64"): Tolerance(1e-9, "nats by which the bound may fall: the guard's promise for log-densities"),
    ("monotone", "float32"): Tolerance(1e-3, "nats by which the bound may fall: the guard's promise for log-densities"),
    ("affine", "float64"): Tolerance(1e-6, "rounding of 4 x + 64, multiplied by thirty iterations of a slow direction"),
    ("affine", "float32"): Tolerance(
        2e-2, "4 x + 64 keeps 18 of the 24 bits of x: other data by 4e-6 of their scale, after thirty iterations"
    ),
    # divergences and the algebra of Gaussians; relative unless it says otherwise
    ("closed-form KL", "float64"): Tolerance(
        1e-12, "what is promised for divergences of at least 1e-3 and condition numbers of at most 1e4"
    ),
    ("tiny KL", "float64"): Tolerance(1e-7, "what is promised down to 1e-12 for condition numbers of at most 100"),
    ("closed-form KL", "float32"): Tolerance(
        5e-6, "at condition numbers of at most 100: rounding of P and of two products (5e-7 was measured, 4 eps)"
    ),
    ("tiny KL", "float32"): Tolerance(5e-6, "as for larger ones: no term cancels another, however small they are"),
    **_both(
        "precision factors",
        2,
        "of the condition number: what is left is the rounding of L⁻¹ (0.6 was measured)",
    ),
    **_both(
        "diagonal of precision factors",
        2,
        "relative, at condition numbers of a thousand: the roundings of 1 / √pivot (0.8 was measured); where plain "
        "arithmetic suffices, times the sum of the variance inflation factors (0.8 of it was measured)",
    ),
    ("all pairs", "float64"): Tolerance(1e-12, "relative: what the guard of all pairs lets pass"),
    ("all pairs", "float32"): Tolerance(
        1e-12 * 2**29, "relative: what the guard lets pass, eps being 2²⁹ times larger"
    ),
    ("divergence of mixtures", "float64"): Tolerance(
        1e-13,
        "absolute, times 1 + the largest divergence of components: all pairs promise 1e-12 of each, oracles lose some "
        "eps to inverses at condition numbers of some ten (1e-15 was measured)",
    ),
    ("quadrature", "float64"): Tolerance(1e-9, "absolute: ten pieces, each to 1e-12, of an integrand of size 1 to 100"),
    ("algebra of Gaussians", "float64"): Tolerance(
        1e-12, "a factorisation and some products at condition numbers of some tens: 1e-14 were measured"
    ),
    ("affine invariance of KL", "float64"): Tolerance(
        1e-9, "of 1 + KL: the mapped covariances are rounded, at condition numbers up to 1e4"
    ),
    # torch
    **_both(
        "mixture operators",
        16,
        "of 1 + max |log p|: log-densities absolutely, responsibilities and gradients relative to the largest entry, "
        "as an error of a logit is a relative one of what it weighs (0.1 to 7 were measured)",
    ),
    **_both(
        "continuous Bernoulli",
        2,
        "of 1 + |log-normaliser|: log(−expm1(−|h|) / |h|) rounds four times; its slope is a difference of two numbers "
        "of size 2 at most where the series ends (0.5 and 1.1 were measured)",
    ),
    # what the oracles owe each other
    ("long double log_prob", "float64"): Tolerance(
        2.0**-56, "of the scale: sixteen times finer than the float64 results that it judges (64 bits of mantissa)"
    ),
}


def tolerance(operation: str, dtype: str) -> float:
    """The bound for an operation whose arithmetic is done in `dtype`."""
    return TOLERANCES[operation, dtype].value
