"""What the answers should be, from NumPy, SciPy and mpmath alone: nothing here may import what it judges.

Two precisions. Long double (64 bits of mantissa on x86-64) covers thousands of rows; mpmath, at 60 digits, some
hundred, and shows that long double was enough. Letters: N samples, D features, K components, F packed statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np

LONG = np.longdouble
DIGITS = 60


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A mixture in scikit-learn's shapes: covariances full (K, D, D), tied (D, D), diag (K, D), spherical (K,)."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    covariance_type: str

    @property
    def n_components(self) -> int:
        return self.means.shape[0]

    @property
    def n_features(self) -> int:
        return self.means.shape[1]


def full_covariances(mixture: Gaussians) -> np.ndarray:
    """Σ_k of every component as (K, D, D) long double, whatever the covariance type."""
    K, D = mixture.n_components, mixture.n_features
    given = mixture.covariances.astype(LONG)
    identity = np.eye(D, dtype=LONG)
    return {
        "full": lambda: given,
        "tied": lambda: np.broadcast_to(given, (K, D, D)),
        "diag": lambda: given[:, :, None] * identity,
        "spherical": lambda: given[:, None, None] * identity,
    }[mixture.covariance_type]()


# ---- long double


def cholesky(matrices: np.ndarray) -> np.ndarray:
    """Lower Cholesky factors of (K, D, D), column by column, in long double (LAPACK has none)."""
    a = matrices.astype(LONG)
    factors = np.zeros_like(a)
    for j in range(a.shape[-1]):
        column = a[:, j:, j] - np.einsum("kip,kp->ki", factors[:, j:, :j], factors[:, j, :j])
        factors[:, j:, j] = column / np.sqrt(column[:, :1])
    return factors


def triangular_inverse(factors: np.ndarray) -> np.ndarray:
    """Inverses of lower triangular (K, D, D) by forward substitution, in long double."""
    inverse = np.zeros_like(factors)
    for i in range(factors.shape[-1]):
        unit = np.zeros((len(factors), factors.shape[-1]), LONG)
        unit[:, i] = 1
        known = np.einsum("kp,kpj->kj", factors[:, i, :i], inverse[:, :i])
        inverse[:, i] = (unit - known) / factors[:, i, i, None]
    return inverse


def precision_factors(mixture: Gaussians) -> np.ndarray:
    """P_k, upper triangular with P Pᵀ = Σ_k⁻¹, (K, D, D) long double."""
    return triangular_inverse(cholesky(full_covariances(mixture))).transpose(0, 2, 1)


def mahalanobis(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """(x_n − μ_k)ᵀ Σ_k⁻¹ (x_n − μ_k), (N, K) long double."""
    factors, means = precision_factors(mixture), mixture.means.astype(LONG)
    distance = np.empty((len(x), len(means)), LONG)
    for k, factor in enumerate(factors):
        distance[:, k] = np.square((x.astype(LONG) - means[k]) @ factor).sum(axis=1)
    return distance


def log_constants(mixture: Gaussians) -> np.ndarray:
    """log w_k − D/2 log 2π − ½ log |Σ_k|, (K,) long double; −∞ for a weight of zero."""
    diagonal = np.einsum("kdd->kd", precision_factors(mixture))
    with np.errstate(divide="ignore"):
        log_weights = np.log(mixture.weights.astype(LONG))
    return log_weights - mixture.n_features * np.log(2 * LONG(np.pi)) / 2 + np.log(diagonal).sum(axis=1)


def joint_log_prob(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """L_nk = log w_k N(x_n; μ_k, Σ_k), (N, K) long double."""
    return log_constants(mixture) - mahalanobis(x, mixture) / 2


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log Σ_k exp(L_nk), (N,)."""
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1))


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(L_nk) / Σ_j exp(L_nj), (N, K)."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def log_prob(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """log p(x_n), (N,) long double."""
    return log_sum_exp(joint_log_prob(x, mixture))


def responsibilities(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """r_nk, (N, K) long double."""
    return softmax(joint_log_prob(x, mixture))


def hard_responsibilities(logits: np.ndarray) -> np.ndarray:
    """One at the largest L_nk of each row (the first of equals), zero elsewhere: the assignment step of k-means."""
    return (logits.argmax(axis=1)[:, None] == np.arange(logits.shape[1])).astype(LONG)


# ---- packed statistics and natural parameters


@dataclass(frozen=True, eq=False)
class Frame:
    """z = ((x − shift) · scale) W, in which the kernels see the data; `whitening` W is (D, D) or None."""

    shift: np.ndarray
    scale: np.ndarray
    whitening: np.ndarray | None = None

    def apply(self, x: np.ndarray) -> np.ndarray:
        """z of every row, (N, D) long double."""
        z = (x.astype(LONG) - self.shift.astype(LONG)) * self.scale.astype(LONG)
        return z if self.whitening is None else z @ self.whitening.astype(LONG)


def features(z: np.ndarray, feature_map: str) -> np.ndarray:
    """φ(z), (N, F): full z_i z_j (i ≥ j, row by row), z, 1; diag z_i², z, 1; spherical ‖z‖², z, 1."""
    one = np.ones((len(z), 1), z.dtype)
    if feature_map == "full":
        lower = [z[:, i, None] * z[:, : i + 1] for i in range(z.shape[1])]
        return np.hstack([*lower, z, one])
    square = np.square(z)
    return np.hstack([square if feature_map == "diag" else square.sum(axis=1, keepdims=True), z, one])


def statistics(r: np.ndarray, z: np.ndarray, feature_map: str, means: np.ndarray | None = None) -> np.ndarray:
    """Σ_n r_nk φ(z_n), or Σ_n r_nk φ(z_n − μ_k) if `means` (K, D) are given; (K, F) long double.

    `r` (N, K) contains the sample weights.
    """
    if means is None:
        return r.T @ features(z, feature_map)
    return np.stack([r[:, k] @ features(z - mean.astype(LONG), feature_map) for k, mean in enumerate(means)])


def feature_map_of(covariance_type: str) -> str:
    """The φ of each covariance type; tied is spherical in the frame whitened by the shared covariance."""
    return "spherical" if covariance_type == "tied" else covariance_type


def in_frame(mixture: Gaussians, frame: Frame) -> Gaussians:
    """The density of z when x has this mixture, with full covariances, in long double."""
    linear = np.diag(frame.scale.astype(LONG))
    if frame.whitening is not None:
        linear = linear @ frame.whitening.astype(LONG)
    covariances = linear.T @ full_covariances(mixture) @ linear
    return Gaussians(mixture.weights, frame.apply(mixture.means), covariances, "full")


def natural_parameters(mixture: Gaussians, frame: Frame) -> np.ndarray:
    """η with ⟨η_k, φ(z)⟩ = log w_k N(x; μ_k, Σ_k), (K, F) float64.

    With Λ = Σ_z⁻¹ in the frame: the quadratic part is −½ Λ (off-diagonals doubled, as φ holds the lower triangle), the
    linear part Λ μ, the constant c_k − ½ μᵀ Λ μ.
    """
    framed = in_frame(mixture, frame)
    factors = precision_factors(framed)
    precision = factors @ factors.transpose(0, 2, 1)
    linear = np.einsum("kij,kj->ki", precision, framed.means)
    constant = log_constants(mixture) - np.einsum("ki,ki->k", linear, framed.means) / 2
    i, j = np.tril_indices(mixture.n_features)
    quadratic = {
        "full": lambda: precision[:, i, j] * np.where(i == j, LONG(-0.5), LONG(-1)),
        "diag": lambda: np.einsum("kdd->kd", precision) / -2,
        "spherical": lambda: precision[:, 0, :1] / -2,
    }[feature_map_of(mixture.covariance_type)]()
    return np.hstack([quadratic, linear, constant[:, None]]).astype(np.float64)


# ---- mpmath


def exact(values: np.ndarray) -> np.ndarray:
    """The same numbers as mpmath's, in an object array; nothing is rounded."""

    def convert(value: np.floating) -> mpmath.mpf:
        high = float(value)
        return mpmath.mpf(high) + (float(value - type(value)(high)) if np.isfinite(high) else 0)

    with mpmath.workdps(DIGITS):
        return np.vectorize(convert, otypes=[object])(values)


def elementwise(function: Callable[[mpmath.mpf], mpmath.mpf], values: np.ndarray) -> np.ndarray:
    """mpmath's `function` of every entry of an array of floats, at `DIGITS` digits."""
    with mpmath.workdps(DIGITS):
        return np.vectorize(function, otypes=[object])(exact(values))


def exact_joint_log_prob(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """L_nk, (N, K) mpf: the precision matrix of every component once, then ½ dᵀ Λ d for all rows."""
    with mpmath.workdps(DIGITS):
        rows, means = exact(x), exact(mixture.means)
        logits = np.empty((len(x), mixture.n_components), object)
        for k, covariance in enumerate(full_covariances(mixture)):
            matrix = mpmath.matrix(exact(covariance).tolist())
            precision = np.array((matrix**-1).tolist(), object).reshape(covariance.shape)
            constant = mpmath.log(exact(mixture.weights)[k]) - mpmath.log(mpmath.det(2 * mpmath.pi * matrix)) / 2
            centred = rows - means[k]
            logits[:, k] = constant - ((centred @ precision) * centred).sum(axis=1) / 2
        return logits


def exact_log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log Σ_k exp(L_nk) of mpf logits, (N,) mpf: 60 digits and unbounded exponents need no maximum taken out."""
    with mpmath.workdps(DIGITS):
        return np.array([mpmath.log(mpmath.fsum(map(mpmath.exp, row))) for row in logits], object)


def exact_softmax(logits: np.ndarray) -> np.ndarray:
    """softmax_k of mpf logits, (N, K) mpf."""
    with mpmath.workdps(DIGITS):
        exponentials = np.vectorize(mpmath.exp, otypes=[object])(logits)
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def exact_log_prob(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """log p(x_n), (N,) mpf."""
    return exact_log_sum_exp(exact_joint_log_prob(x, mixture))


def exact_responsibilities(x: np.ndarray, mixture: Gaussians) -> np.ndarray:
    """r_nk, (N, K) mpf."""
    return exact_softmax(exact_joint_log_prob(x, mixture))


def exact_divergence(
    mean_p: np.ndarray, covariance_p: np.ndarray, mean_q: np.ndarray, covariance_q: np.ndarray
) -> mpmath.mpf:
    """KL(N(μ_p, Σ_p) ‖ N(μ_q, Σ_q)) in nats; (D,) means, and (D, D) covariances or (D,) variances, of floats.

    ½ [tr(Σ_q⁻¹ Σ_p) − D + (μ_p − μ_q)ᵀ Σ_q⁻¹ (μ_p − μ_q) + log |Σ_q| − log |Σ_p|].
    """
    with mpmath.workdps(DIGITS):
        p, q = (
            mpmath.matrix((np.diag(exact(c)) if c.ndim == 1 else exact(c)).tolist())
            for c in (covariance_p, covariance_q)
        )
        precision = np.array((q**-1).tolist(), object).reshape(q.rows, q.rows)
        centred = exact(mean_p) - exact(mean_q)
        trace = (precision * np.array(p.tolist(), object).reshape(precision.shape).T).sum()
        logs = mpmath.log(mpmath.det(q)) - mpmath.log(mpmath.det(p))
        return (trace - len(centred) + centred @ precision @ centred + logs) / 2


def absolute_errors(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|values − truth| as float64, the difference taken exactly; `truth` holds mpf."""
    with mpmath.workdps(DIGITS):
        return np.abs(exact(values) - truth).astype(np.float64)


def ulp_errors(values: np.ndarray, truth: np.ndarray, dtype: str) -> np.ndarray:
    """|values − truth| in units of the last place that a number of `dtype` has at `truth` (mpf)."""
    mantissa = np.finfo(dtype).nmant
    with mpmath.workdps(DIGITS):
        last_place = [mpmath.ldexp(1, int(mpmath.floor(mpmath.log(abs(t), 2))) - mantissa) if t else 1 for t in truth]
        return (np.abs(exact(values) - truth) / np.array(last_place, object)).astype(np.float64)


def chebyshev_coefficients(
    function: Callable[[mpmath.mpf], mpmath.mpf], interval: tuple[mpmath.mpf, mpmath.mpf], count: int, dtype: str
) -> list[float]:
    """Interpolant of `function` at `count` Chebyshev nodes: coefficients, highest degree first, rounded to `dtype`."""
    with mpmath.workdps(DIGITS):
        middle, half = (interval[1] + interval[0]) / 2, (interval[1] - interval[0]) / 2
        angles = [mpmath.pi * (2 * k + 1) / (2 * count) for k in range(count)]
        values = [function(middle + half * mpmath.cos(angle)) for angle in angles]
        t = np.array(
            [1 / half, -middle / half], object
        )  # (x − middle) / half as a polynomial in x, highest degree first
        before, chebyshev = np.array([mpmath.mpf(0)], object), np.array([mpmath.mpf(1)], object)
        fitted = np.full(count, mpmath.mpf(0), object)
        for degree in range(count):
            terms = (value * mpmath.cos(degree * angle) for value, angle in zip(values, angles, strict=True))
            coefficient = mpmath.fsum(terms) * (2 if degree else 1) / count
            fitted[count - len(chebyshev) :] += coefficient * chebyshev
            # T₁ = t, T_{j+1} = 2 t T_j − T_{j−1}
            following = np.convolve((2 if degree else 1) * t, chebyshev)
            following[len(following) - len(before) :] -= before
            before, chebyshev = chebyshev, following
        bits = np.finfo(dtype).nmant + 1
        return [float(mpmath.mpf(c, prec=bits, rounding="n")) for c in fitted]
