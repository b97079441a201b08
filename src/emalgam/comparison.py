"""Stacks of Gaussians and mixtures as kernels take them, and the sums over their components that divergences share.

Letters: B mixtures of a stack, K components, D features, M Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final

import numpy as np

from emalgam.blas import one_blas_thread
from emalgam.covariance import COVARIANCES
from emalgam.gaussian import Gaussian, as_mixture, covariance_rank, without_repeats
from emalgam.mixture import MixtureAlgebra
from emalgam.packing import LOG_2_PI, power_of_two
from emalgam.stacks import Stacks, as_stacks, both_as_stacks, is_many_fits
from emalgam.validation import broadcast, check_threads
from emalgam_kernels import Gaussians
from emalgam_kernels.blocks import for_each_block

ELEMENTS_AT_ONCE: Final = 2**21  # numbers in the largest array of a block: 16 MB for each thread


# ---- Gaussians


def as_gaussians(name: str, value: Any) -> Gaussian:
    """A Gaussian, a sequence of Gaussians, or a mixture of one component, as one Gaussian or stack."""
    if isinstance(value, Gaussian):
        return value
    if isinstance(value, list | tuple):
        return _stacked(name, [as_gaussians(f"{name}[{i}]", each) for i, each in enumerate(value)])
    stacks = as_stacks(name, value if is_many_fits(value) else as_mixture(name, value))
    for rows, stack in stacks.groups[-1:]:  # those with the most components
        if stack.n_components > 1:
            which = f"{name}[{rows[0]}]" if stacks.shape else name
            raise ValueError(
                f"{which} is a mixture of {stack.n_components} components, for which there is no closed form; use "
                "kl_monte_carlo, kl_bounds or an approximation such as kl_variational"
            )
    stack = stacks.groups[0][1]
    shared, shape = stack.covariance.shared, stacks.shape
    covariances = stack.covariances if shared else stack.covariances[:, 0]
    kind = "full" if shared else stack.covariance_type
    means = stack.means[:, 0].reshape((*shape, stack.n_features))
    return Gaussian(means, covariances.reshape((*shape, *covariances.shape[1:])), kind)


def _stacked(name: str, gaussians: list[Gaussian]) -> Gaussian:
    """One stack of Gaussians of one shape."""
    if not gaussians:
        raise ValueError(f"{name} is empty; expected at least one Gaussian")
    for i, each in enumerate(gaussians):
        if each.mean.shape != gaussians[0].mean.shape:
            raise ValueError(
                f"{name}[{i}] has mean of shape {each.mean.shape}; {name}[0] {gaussians[0].mean.shape}: a sequence "
                "needs equal shapes"
            )
    kind = "full" if any(each.covariance_type == "full" for each in gaussians) else "diag"
    D, batch = gaussians[0].n_features, gaussians[0].batch_shape
    flat = [flattened(each, kind, np.dtype(np.float64)).covariances for each in gaussians]
    shape = (len(gaussians), *batch, D, D)[: len(batch) + (3 if kind == "full" else 2)]
    return Gaussian(np.stack([each.mean for each in gaussians]), np.stack(flat).reshape(shape), kind)


def common_type(p: Gaussian, q: Gaussian) -> str:
    """The cheapest type that holds both; ValueError if they have different numbers of features."""
    if p.n_features != q.n_features:
        raise ValueError(f"q has {q.n_features} features; p has {p.n_features}")
    return "full" if "full" in (p.covariance_type, q.covariance_type) else "diag"


def common(p: Gaussian, q: Gaussian) -> tuple[tuple[int, ...], str]:
    """The broadcast shape and the common type."""
    kind = common_type(p, q)
    try:
        return broadcast("the stacks", p=p.batch_shape, q=q.batch_shape), kind
    except ValueError as error:
        raise ValueError(f"{error}; for each with each use kl_all_pairs") from None


def flattened(
    gaussian: Gaussian, kind: str, dtype: np.dtype, factors: bool = False, centre: np.ndarray | None = None
) -> Gaussians:
    """A stack of M Gaussians as kernels take it, with `factors` or without, the means relative to a `centre` (D,).

    Each mean and matrix is in C order; what the stack shares has a stride of zero along M, and is not written out.
    """
    P = _matrices(gaussian, gaussian.precision_cholesky, kind, dtype) if factors else None
    means = _along_stack(gaussian.mean, 1, dtype, lambda means: means if centre is None else means - centre)
    return Gaussians(kind, means, _matrices(gaussian, gaussian.covariance, kind, dtype), P)


def _matrices(gaussian: Gaussian, values: np.ndarray, kind: str, dtype: np.dtype) -> np.ndarray:
    """Covariances or factors of a stack in the shape of those of `kind`, (M, D, D) or (M, D)."""
    D, given = gaussian.n_features, gaussian.covariance_type

    def of_kind(values: np.ndarray) -> np.ndarray:
        if given == "full":
            return values
        diagonal = np.repeat(values[:, None], D, axis=1) if given == "spherical" else values
        return diagonal if kind == "diag" else diagonal[:, :, None] * np.eye(D)

    return _along_stack(values, covariance_rank(given), dtype, of_kind)


def _along_stack(
    values: np.ndarray, rank: int, dtype: np.dtype, arrange: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Values (..., `rank` axes) as (M, ...) of a dtype, arranged before what the stack shares is repeated."""
    flat = values.reshape(-1, *values.shape[values.ndim - rank :])
    return _repeated(np.asarray(arrange(without_repeats(flat, rank)), dtype, order="C"), len(flat))


def _repeated(values: np.ndarray, count: int) -> np.ndarray:
    """`count` along the first axis, of which there may be one."""
    return values if len(values) == count else np.broadcast_to(values, (count, *values.shape[1:]))


def centre_of(p: Gaussian, q: Gaussian) -> np.ndarray:
    """The median of all means, (D,): one that lies far away does not move it."""
    means = np.concatenate([each.mean.reshape(-1, each.n_features) for each in (p, q)])
    return np.median(means, axis=0) if len(means) else np.zeros(p.n_features)


def pairs_of(
    p: Gaussian, q: Gaussian, shape: tuple[int, ...], kind: str, dtype: np.dtype
) -> Callable[[slice], tuple[Gaussians, Gaussians]]:
    """A function that gives some of the pairs of two stacks that broadcast: views where they are in a stack's order.

    In float32 the means of p are μ_p − μ_q and those of q zero: a divergence depends on the difference alone, of which
    means that were rounded before would have left few digits.
    """
    of_p, of_q = (_members_of(each, shape, kind, dtype) for each in (p, q))
    zero = np.zeros((1, p.n_features), dtype)

    def pairs(rows: slice) -> tuple[Gaussians, Gaussians]:
        (means_p, covariances_p), (means_q, covariances_q) = of_p(rows), of_q(rows)
        if dtype != np.float64:
            difference = np.empty(means_p.shape, dtype)
            with np.errstate(over="ignore"):
                means_p = np.subtract(means_p, means_q, out=difference, casting="same_kind")
            means_q = np.broadcast_to(zero, difference.shape)
        return Gaussians(kind, means_p, covariances_p), Gaussians(kind, means_q, covariances_q)

    return pairs


def _members_of(
    gaussian: Gaussian, shape: tuple[int, ...], kind: str, dtype: np.dtype
) -> Callable[[slice], tuple[np.ndarray, np.ndarray]]:
    """A function that gives means, in float64, and covariances of some of a stack that is broadcast and flattened."""
    means = _along_stack(gaussian.mean, 1, np.dtype(np.float64), lambda means: means)
    parts, count = (means, _matrices(gaussian, gaussian.covariance, kind, dtype)), math.prod(shape)
    if len(means) in (1, count):
        first, second = (_repeated(part, count) for part in parts)
        return lambda rows: (first[rows], second[rows])
    index = np.broadcast_to(np.arange(len(means)).reshape(gaussian.batch_shape), shape).ravel()
    return lambda rows: (_chosen(parts[0], index[rows]), _chosen(parts[1], index[rows]))


def _chosen(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Some of a flattened stack; what it shares is not written out."""
    if values.strides[0] == 0:
        return _repeated(values[:1], len(index))
    return np.ascontiguousarray(values[index])


# ---- stacks of mixtures


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """B mixtures of K components in common units: x · scale.

    `weights` (B, K), `means` (B, K, D), `covariances` and `factors` (B, K, D, D) or for "diag" (B, K, D). A mixture of
    fewer components has copies of its first one, of weight zero.
    """

    kind: str
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    factors: np.ndarray

    def __len__(self) -> int:
        return int(self.weights.shape[0])

    @property
    def n_components(self) -> int:
        return int(self.weights.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.means.shape[2])

    @property
    def log_weights(self) -> np.ndarray:
        """log w, −inf for a component without weight."""
        with np.errstate(divide="ignore"):
            return np.log(self.weights)

    @classmethod
    def of(cls, stacks: Stacks, kind: str, scale: np.ndarray) -> Stack:
        """Components of the type `kind`, multiplied by `scale` (D,), powers of two: no digit changes."""
        B, K, D = len(stacks), stacks.most_components, stacks.n_features
        square = (B, K, D, D) if kind == "full" else (B, K, D)
        weights, means, covariances, factors = np.zeros((B, K)), np.empty((B, K, D)), np.empty(square), np.empty(square)
        for rows, stack in stacks.groups:
            own = stack.n_components
            weights[rows, :own] = stack.weights
            padded = np.concatenate([np.arange(own), np.zeros(K - own, np.int64)])
            means[rows] = stack.means[:, padded]
            covariances[rows] = shaped(stack, stack.covariances, kind)[:, padded]
            factors[rows] = shaped(stack, stack.precisions_cholesky, kind)[:, padded]
        along = scale[:, None] if kind == "full" else scale
        factors /= along
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            covariances *= along
            covariances *= scale
        if not np.isfinite(covariances).all():  # overflowed in the data's units: the factors did not
            covariances = COVARIANCES[kind].covariances(factors)
        means *= scale
        return cls(kind, weights, means, covariances, factors)

    def take(self, rows: Any) -> Stack:
        """Some of the mixtures."""
        parts = (self.weights, self.means, self.covariances, self.factors)
        return Stack(self.kind, *(part[rows] for part in parts))

    def components(self, some: slice) -> Stack:
        """Some of the components of each mixture."""
        parts = (self.weights, self.means, self.covariances, self.factors)
        return Stack(self.kind, *(part[:, some] for part in parts))

    def entropies(self) -> np.ndarray:
        """Σ_k w_k H(component k) of each mixture, (B,)."""
        diagonal = np.einsum("bkii->bki", self.factors) if self.kind == "full" else self.factors
        entropy = 0.5 * self.n_features * (1.0 + LOG_2_PI) - np.log(diagonal).sum(axis=2)
        return np.einsum("bk,bk->b", self.weights, entropy)

    def gaussians(self, arrange: Callable[[np.ndarray], np.ndarray]) -> Gaussians:
        """The components as kernels take them, every array (B, K, ...) brought in order by `arrange`."""

        def flat(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(arrange(values).reshape(-1, *values.shape[2:]))

        return Gaussians(self.kind, flat(self.means), flat(self.covariances), flat(self.factors))


def shaped(mixture: MixtureAlgebra, values: np.ndarray, kind: str) -> np.ndarray:
    """Covariances or factors of a mixture or of a stack as (..., K, D, D), or for "diag" as (..., K, D)."""
    arrange = mixture.covariance.matrices if kind == "full" else mixture.covariance.diagonals
    return arrange(values, mixture.n_components, mixture.n_features)


def common_kind(*mixtures: MixtureAlgebra) -> str:
    """The cheapest type that holds the components of all."""
    return "diag" if all(mixture.covariance.direct_map == "diag" for mixture in mixtures) else "full"


def in_common_units(*given: Stacks) -> tuple[np.ndarray, list[Stack]]:
    """The scale (D,) by which all are multiplied, and the stacks, all of the cheapest type that holds them."""
    together = [stack for stacks in given for _, stack in stacks.groups]
    deviations = np.zeros(together[0].n_features)
    for stack in together:
        diagonals = shaped(stack, stack.precisions_cholesky, "diag")
        deviations = np.maximum(deviations, (1.0 / diagonals).max(axis=(0, 1)))
    scale, kind = power_of_two(deviations), common_kind(*together)
    return scale, [Stack.of(stacks, kind, scale) for stacks in given]


# A table holds −log of how much of component b of q is at component a of p, for blocks of p and q: (B_p, K_p, K_q, B_q)
# each with each, or (B, K_p, K_q, 1) one to one.
Table = Callable[[Stack, Stack, bool], np.ndarray]


def divergences(kernels: ModuleType) -> Table:
    """The table of KL(f_a ‖ g_b)."""

    def table(p: Stack, q: Stack, each_with_each: bool) -> np.ndarray:
        K_p, K_q = p.n_components, q.n_components
        if each_with_each:
            out = np.empty((len(p) * K_p, K_q * len(q)))
            kernels.kl_all_pairs(p.gaussians(lambda v: v), q.gaussians(lambda v: v.swapaxes(0, 1)), out)
            return out.reshape(len(p), K_p, K_q, len(q))
        one_to_one = np.empty(len(p) * K_p * K_q)
        left = p.gaussians(lambda v: np.repeat(v, K_q, axis=1))
        kernels.kl_pairs(left, q.gaussians(lambda v: np.repeat(v[:, None], K_p, axis=1)), one_to_one)
        return one_to_one.reshape(len(p), K_p, K_q, 1)

    return table


def overlaps(p: Stack, q: Stack, each_with_each: bool) -> np.ndarray:
    """The table of −log ∫ f_a g_b = −log N(μ_a; μ_b, Σ_a + Σ_b)."""
    order = (0, 1) if not each_with_each else (1, 0)

    def left(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values, (0, 1), (-2, -1))[..., None, None]

    def right(values: np.ndarray) -> np.ndarray:
        moved = np.moveaxis(values, order, (-2, -1))
        return moved[..., None, None, :, :] if each_with_each else moved[..., :, None, :, None]

    offset = np.subtract(left(p.means), right(q.means), order="C")
    covariance = np.add(left(p.covariances), right(q.covariances), order="C")
    if p.kind == "diag":
        return 0.5 * (offset**2 / covariance + np.log(covariance) + LOG_2_PI).sum(axis=0)
    return _negative_log_density(offset, covariance)


def _negative_log_density(offset: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """−log N(δ; 0, Σ) for δ (D, ...) and Σ (D, D, ...), the factors of all matrices at once, in place."""
    D = len(offset)
    log_det, square = np.zeros(offset.shape[1:]), np.zeros(offset.shape[1:])
    # Column j of L, and y = L⁻¹ δ as one more row below: L_ij = (Σ_ij − Σ_k L_ik L_jk) / L_jj
    for j in range(D):
        for k in range(j):
            covariance[j:, j] -= covariance[j:, k] * covariance[j, k]
            offset[j] -= offset[k] * covariance[j, k]
        root = np.sqrt(covariance[j, j])
        covariance[j:, j] /= root
        offset[j] /= root
        log_det += np.log(root)
        square += offset[j] ** 2
    return 0.5 * (D * LOG_2_PI + square) + log_det


def log_sum_exp(terms: np.ndarray) -> np.ndarray:
    """log Σ_b exp over axis 2, in place."""
    top = terms.max(axis=2, keepdims=True)
    top[np.isneginf(top)] = 0.0
    terms -= top
    with np.errstate(divide="ignore"):
        return np.log(np.exp(terms, out=terms).sum(axis=2)) + top[:, :, 0]


def largest(terms: np.ndarray) -> np.ndarray:
    """max_b, over axis 2."""
    return terms.max(axis=2)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two stacks of mixtures and which of them meet: one to one (their shapes broadcast) or each with each."""

    p: Stack
    q: Stack
    shape_p: tuple[int, ...]
    shape_q: tuple[int, ...]
    all_pairs: bool
    n_threads: int

    @classmethod
    def of(cls, p: Any, q: Any, all_pairs: bool, n_threads: int | None) -> Comparison:
        """Of two arguments that users give."""
        left, right = both_as_stacks(p, q)
        result_shape(left.shape, right.shape, all_pairs)
        own, other = in_common_units(left, right)[1]
        return cls(own, other, left.shape, right.shape, all_pairs, check_threads(n_threads))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return result_shape(self.shape_p, self.shape_q, self.all_pairs)

    def of_p(self, values: np.ndarray) -> np.ndarray:
        """One value for each p, (B_p,), in a shape that broadcasts to the result."""
        return values.reshape(self.shape_p + (1,) * len(self.shape_q) if self.all_pairs else self.shape_p)

    def entropies(self) -> np.ndarray:
        """Σ_a π_a H(f_a)."""
        return self.of_p(self.p.entropies())

    def own(self, table: Table) -> np.ndarray:
        """Σ_a π_a log Σ_a' π_a' exp(−table_aa') of p with itself."""
        alone = replace(self, q=self.p, shape_q=self.shape_p, all_pairs=False)
        return self.of_p(alone.cross(table).reshape(-1))

    def cross(self, table: Table, over: Callable[[np.ndarray], np.ndarray] = log_sum_exp) -> np.ndarray:
        """Σ_a π_a log Σ_b ω_b exp(−table_ab), or with another function `over` b than log Σ exp."""
        if self.all_pairs or 1 in (len(self.p), len(self.q)):
            return self._each_with_each(table, over).reshape(self.shape)
        _, rows, columns = meetings(self.shape_p, self.shape_q, False)
        out = np.empty(len(rows))

        def block(start: int, stop: int) -> None:
            p, q = self.p.take(rows[start:stop]), self.q.take(columns[start:stop])
            out[start:stop] = _expected(table, p, q, False, over)[:, 0]

        with one_blas_thread():
            for_each_block(block, len(out), self._pairs_at_once(written_out=True), self.n_threads)
        return out.reshape(self.shape)

    def _each_with_each(self, table: Table, over: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(B_p, B_q), in blocks of both."""
        n_p, n_q = len(self.p), len(self.q)
        pairs = self._pairs_at_once(written_out=table is overlaps)
        columns = min(pairs, n_q)
        rows, across = pairs // columns, -(-n_q // columns)
        out = np.empty((n_p, n_q))

        def block(index: int, _: int) -> None:
            down, right = divmod(index, across)
            mine, yours = slice(down * rows, (down + 1) * rows), slice(right * columns, (right + 1) * columns)
            p, q = self.p.take(mine), self.q.take(yours)
            out[mine, yours] = _expected(table, p, q, True, over)

        with one_blas_thread():
            for_each_block(block, -(-n_p // rows) * across, 1, self.n_threads)
        return out

    def _pairs_at_once(self, written_out: bool) -> int:
        """Pairs of mixtures in a block: each takes K_p K_q numbers, times D² where covariances are written out."""
        numbers = self.p.n_components * self.q.n_components
        return max(ELEMENTS_AT_ONCE // (numbers * self.p.covariances[0, 0].size if written_out else numbers), 1)


def result_shape(shape_p: tuple[int, ...], shape_q: tuple[int, ...], all_pairs: bool) -> tuple[int, ...]:
    if all_pairs:
        return shape_p + shape_q
    try:
        return broadcast("the stacks", p=shape_p, q=shape_q)
    except ValueError as error:
        raise ValueError(f"{error}; for each with each use all_pairs=True") from None


def _expected(
    table: Table, p: Stack, q: Stack, each_with_each: bool, over: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Σ_a π_a over_b(log ω_b − table_ab) of one block, (B_p, B_q) or (B, 1), over a few components a at a time.

    Components without weight do not count.
    """
    columns = len(q) if each_with_each else 1
    log_weights = q.log_weights.T if each_with_each else q.log_weights[:, None, :, None]
    total = np.zeros((len(p), columns))
    each = 1 if each_with_each and table is not overlaps else p.covariances[0, 0].size
    step = max(ELEMENTS_AT_ONCE // (total.size * q.n_components * each), 1)
    for start in range(0, p.n_components, step):
        part = p.components(slice(start, start + step))
        numbers = table(part, q, each_with_each)
        terms = over(np.subtract(log_weights, numbers, out=numbers))
        total += np.einsum("ba,bac->bc", part.weights, np.where(part.weights[:, :, None] > 0, terms, 0.0))
    return total


def meetings(
    shape_p: tuple[int, ...], shape_q: tuple[int, ...], all_pairs: bool
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """The shape of the result, and for each of its numbers which p and which q (flattened) meet."""
    shape = result_shape(shape_p, shape_q, all_pairs)
    rows = np.arange(math.prod(shape_p)).reshape(shape_p + (1,) * len(shape_q) if all_pairs else shape_p)
    columns = np.arange(math.prod(shape_q)).reshape(shape_q)
    return shape, np.broadcast_to(rows, shape).ravel(), np.broadcast_to(columns, shape).ravel()
