"""The backward passes of `emalgam.nn.operators`: gradients of log-densities and responsibilities as packed algebra.

A loss depends on the logits L_nk = log w_k N(x_n; μ_k, Σ_k) = ⟨η_k, φ(x_n)⟩ with coefficients a_nk = ∂ loss / ∂ L_nk:
g_n r_nk for a log-density with the gradient g, r_nk (G_nk − Σ_j G_nj r_nj) for responsibilities with the gradient G. So

    ∂ loss / ∂ η_k = Σ_n a_nk φ(x_n)        the statistics of an M-step: `em_statistics` with the weights g
    ∂ loss / ∂ x_n = J_φ(x_n)ᵀ Σ_k a_nk η_k = Σ_k a_nk Λ_k (μ_k − x_n)

and the statistics about the means, M_k = Σ_n a_nk (1, x − μ_k, (x − μ_k)(x − μ_k)ᵀ), give the gradients in w, μ and L
by the chain rule. Nothing of size (N, K, D) exists; what is of size (N, K) exists a block of rows at a time. Where
`emalgam.guard` says that packed products would cancel, each component's differences are formed first.

Letters: N rows, D features, K components, F packed statistics. NumPy arrays on the CPU, tensors on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from emalgam import arrays, backends
from emalgam.blas import one_blas_thread
from emalgam.covariance import COVARIANCES
from emalgam.mixture import Mixture, Query
from emalgam.namespace import as_float64, as_type, beside, is_tensor, namespace, to_host, where_true
from emalgam.observations import moderation
from emalgam.packing import Components, Moments, features, unpack_symmetric
from emalgam_kernels import Direct, Parameters
from emalgam_kernels.blocks import for_each_block, sum_over_blocks

ELEMENTS_OF_A_BLOCK: Final = 2**18  # of the largest array, (rows, D, D) or (rows, K): 2 MB, which a second cache holds
ELEMENTS_ON_A_GPU: Final = 2**26
LARGEST_KEPT: Final = 2**18  # elements of L: what takes longer to prepare takes much longer to evaluate
LARGEST_LOG: Final = float(np.log(np.finfo(np.float64).max))
FULL: Final = COVARIANCES["full"]


class ParameterGradients(NamedTuple):
    """Gradients in the weights (K,), the means (K, D) and the Cholesky factors (K, D, D); float64 on the host."""

    weights: np.ndarray
    means: np.ndarray
    scale_tril: np.ndarray


class Form(Protocol):
    """A way to pull coefficients back through the logits."""

    @property
    def dtype(self) -> str:
        """The type that rows and coefficients come in."""

    def input_gradient(self, a: Any, z: Any) -> Any:
        """Σ_k a_nk ∂ L_nk / ∂ z_n, (n, D), for coefficients (n, K) and rows (n, D) in the frame."""

    def add_statistics(self, a: Any, z: Any, out: Any) -> None:
        """out (K, F) += Σ_n a_nk φ(z_n), about the origin or about each component's mean."""


@dataclass(frozen=True, eq=False)
class PackedForm:
    """Through ⟨η_k, φ(z)⟩, in `dtype`: `precisions` Λ_k (K, D²) and `linear` Λ_k μ_k (K, D)."""

    precisions: Any
    linear: Any
    dtype: str

    def input_gradient(self, a: Any, z: Any) -> Any:
        # J_φ(z)ᵀ Σ_k a_k η_k = Σ_k a_k Λ_k μ_k − (Σ_k a_k Λ_k) z
        D = z.shape[1]
        curvature = (a @ self.precisions).reshape(len(z), D, D)
        return a @ self.linear - (curvature @ z[:, :, None])[:, :, 0]

    def add_statistics(self, a: Any, z: Any, out: Any) -> None:
        out += a.T @ features(z, "full")


@dataclass(frozen=True, eq=False)
class DirectForm:
    """Through −½ (z − μ_k)ᵀ Λ_k (z − μ_k), differences first; `means` (K, D) and `precisions` Λ_k (K, D, D)."""

    means: Any
    precisions: Any
    dtype: str = "float64"

    def input_gradient(self, a: Any, z: Any) -> Any:
        gradient = namespace(z).zeros_like(z)
        for k in range(len(self.means)):
            gradient += a[:, k, None] * ((self.means[k] - z) @ self.precisions[k])
        return gradient

    def add_statistics(self, a: Any, z: Any, out: Any) -> None:
        for k in range(len(self.means)):
            out[k] += a[:, k] @ features(z - self.means[k], "full")


@dataclass(frozen=True, eq=False)
class CentralMoments:
    """M_k in the frame: `mass` Σ a (K,), `first` Σ a (z − μ_k) (K, D), `second` Σ a (z − μ_k)(z − μ_k)ᵀ (K, D, D)."""

    mass: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, statistics: np.ndarray, components: Components, direct: bool) -> CentralMoments:
        """From statistics (K, F) about the origin, or about the means."""
        means = components.means
        moments = Moments.of(statistics, means if direct else np.zeros_like(means))
        # Σ a (z − c) and Σ a (z − c)(z − c)ᵀ, moved from the centre c by δ = μ − c
        mass, delta = moments.mass, means - moments.centres
        first = moments.first - mass[:, None] * delta
        cross = delta[:, :, None] * first[:, None]
        second = unpack_symmetric(moments.second, means.shape[1]) - cross - cross.swapaxes(1, 2)
        return cls(mass, first, second - mass[:, None, None] * (delta[:, :, None] * delta[:, None]))

    def __add__(self, other: CentralMoments) -> CentralMoments:
        return CentralMoments(self.mass + other.mass, self.first + other.first, self.second + other.second)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What depends on the parameters alone: `weights` (K,), `means` (K, D), `lower` L_k (K, D, D), float64 on the host.

    `query` holds the mixture of the normalised weights in its frame, for data of a type on a device, but no data.
    """

    weights: np.ndarray
    means: np.ndarray
    lower: np.ndarray
    query: Query

    @classmethod
    @np.errstate(all="ignore")
    def of(cls, weights: np.ndarray, means: np.ndarray, lower: np.ndarray, none: Any) -> Prepared:
        """Prepared for data like `none`, which has no rows."""
        mixture = Mixture.from_cholesky(weights, means, lower)
        return cls(weights, means, lower, Query(mixture, backends.resolve("auto", none), none, "auto", 1))

    def serves(self, weights: np.ndarray, means: np.ndarray, lower: np.ndarray, none: Any) -> bool:
        """Whether these are its parameters, and its kind of data and backend."""
        ours, query = (self.weights, self.means, self.lower), self.query
        return (
            query.backend == backends.resolve("auto", none)
            and (query.data.dtype, query.data.device) == (none.dtype, none.device)
            and all(np.array_equal(own, given) for own, given in zip(ours, (weights, means, lower), strict=True))
        )

    @cached_property
    def log_total(self) -> float:
        """log Σ_k w_k."""
        with np.errstate(all="ignore"):
            return float(np.log(self.weights.sum()))

    @cached_property
    def precisions(self) -> np.ndarray:
        """Λ_k in the frame, (K, D, D)."""
        P = self.query.components.precisions_cholesky
        with np.errstate(all="ignore"):
            return P @ P.swapaxes(1, 2)


# A training step evaluates the same parameters forwards and backwards.
_recent: deque[Prepared] = deque(maxlen=4)


def _prepare(weights: np.ndarray, means: np.ndarray, lower: np.ndarray, none: Any) -> Prepared:
    """One of the last few, or a new one."""
    for prepared in tuple(_recent):
        if prepared.serves(weights, means, lower, none):
            return prepared
    prepared = Prepared.of(weights, means, lower, none)
    if lower.size <= LARGEST_KEPT:
        _recent.append(prepared)
    return prepared


class Evaluation:
    """A mixture Σ_k w_k N(μ_k, L_k L_kᵀ) at rows x: its values and what they pull back.

    Parameters
    ----------
    x : (N, D) float32 or float64 tensor
        Read where it lies.
    weights, means, scale_tril : (K,), (K, D), (K, D, D) tensors
        Weights need not sum to one. Of L_k the lower triangle is read. NaN, negative weights and diagonals that are not
        positive give NaN.
    n_threads : int
        Threads of the CPU; no result depends on it.
    """

    def __init__(self, x: Any, weights: Any, means: Any, scale_tril: Any, n_threads: int) -> None:
        w, mu, lower = (to_host(each).astype(np.float64) for each in (weights, means, scale_tril))
        self.weights, lower = np.where(w < 0, np.nan, w), np.tril(lower)
        diagonal = np.einsum("kdd->kd", lower)
        diagonal[~(diagonal > 0)] = np.nan
        self.data, self.n_threads = arrays.read(x), n_threads
        self.prepared = _prepare(
            self.weights, mu, lower, arrays.empty((0, mu.shape[1]), arrays.tile_dtype(x), self.data)
        )
        self.log_total = self.prepared.log_total
        self.query = self.prepared.query.of(self.data, n_threads)
        self.components, self.frame = self.query.components, self.query.frame
        self.direct = isinstance(self.query.parameters, Direct)

    # ---- values

    @np.errstate(all="ignore")
    def log_prob(self) -> Any:
        """log p(x_n), (N,) float64."""
        return self.query.log_prob() + self.log_total

    @np.errstate(all="ignore")
    def responsibilities(self) -> Any:
        """r_nk, (N, K) in the type of x."""
        return self.query.responsibilities(slice(None))

    # ---- gradients of Σ_n g_n log p(x_n)

    @np.errstate(all="ignore")
    def input_gradient(self, gradient: Any) -> Any:
        """−g_n Σ_k r_nk Λ_k (x_n − μ_k), (N, D) in the type of x, for g (N,)."""
        out = arrays.empty(tuple(self.data.shape), arrays.tile_dtype(self.data), self.data)
        g, form = arrays.read(gradient), self._form(self.query.parameters.arithmetic)

        def block(rows: slice) -> None:
            r = self.query.responsibilities(rows, n_threads=1)
            self._pull_back(form, r * g[rows, None], rows, out)

        self._for_each_block(block)
        return out

    @np.errstate(all="ignore")
    def parameter_gradients(self, gradient: Any, log_prob: Any) -> ParameterGradients:
        """Gradients in w, μ and L for g (N,): a pass of `em_statistics`, and another one of rows that are far away."""
        g, log_p = as_float64(arrays.read(gradient)), as_float64(arrays.read(log_prob))
        far = self.query.beyond_reach(log_p - self.log_total)
        moments = self._moments(self.data, namespace(g).where(far, 0.0, g), self.query.parameters)
        if bool(far.any()):
            rows = where_true(far)
            directly = FULL.direct(self.components, self.frame, "float64")
            moments += self._moments(self.data[rows], g[rows], directly)
        gradients = self._chain(moments)
        for k in self.absent:
            gradients.weights[k] = float((g * self._ratio(k, self.data, log_p)).sum())
        return gradients

    # ---- gradients of Σ_nk G_nk r_nk

    @np.errstate(all="ignore")
    def responsibility_gradients(self, gradient: Any) -> tuple[Any, ParameterGradients]:
        """Gradients in x (N, D) and in the parameters for G (N, K)."""
        out = arrays.empty(tuple(self.data.shape), arrays.tile_dtype(self.data), self.data)
        G, form = arrays.read(gradient), self._form("float64")

        def block(rows: slice, statistics: Any, of_absent: Any) -> None:
            r, log_p = self.query.evaluate(rows, n_threads=1)
            # ∂ loss / ∂ log(w_k N_k): r_nk (G_nk − Σ_j G_nj r_nj)
            slope = as_float64(G[rows] - (G[rows] * r).sum(axis=1)[:, None])
            form.add_statistics(r * slope, self._pull_back(form, r * slope, rows, out), statistics)
            for k in self.absent:
                ratio = self._ratio(k, self.data[rows], log_p + self.log_total)
                of_absent[k] += (slope[:, k] * ratio).sum()

        sums = np.empty((len(self.weights), self.query.parameters.n_statistics + 1))
        self._sum_over_blocks(lambda rows, sums: block(rows, sums[:, :-1], sums[:, -1]), sums)
        gradients = self._chain(CentralMoments.of(sums[:, :-1], self.components, self.direct))
        gradients.weights[self.absent] = sums[self.absent, -1]
        return out, gradients

    # ---- parts

    def _form(self, dtype: str) -> Form:
        precisions = self.prepared.precisions
        if self.direct:
            return DirectForm(beside(self.components.means, self.data), beside(precisions, self.data))
        linear = (precisions @ self.components.means[:, :, None])[:, :, 0]
        flat = precisions.reshape(len(precisions), -1)
        return PackedForm(beside(flat.astype(dtype), self.data), beside(linear.astype(dtype), self.data), dtype)

    def _pull_back(self, form: Form, a: Any, rows: slice, out: Any) -> Any:
        """out ← Σ_k a_nk ∂ L_nk / ∂ x_n for some rows; returns their z in the form's type."""
        shift, scale = (beside(each, self.data) for each in (self.frame.shift, self.frame.scale))
        z = as_type((self.data[rows] - shift) * scale, form.dtype)
        out[rows] = form.input_gradient(as_type(a, form.dtype), z) * scale
        return z

    def _moments(self, x: Any, g: Any, parameters: Parameters) -> CentralMoments:
        """M_k of some rows with the coefficients g_n r_nk."""
        factor = moderation(float(abs(g).max())) if len(g) else 1.0  # float32 tiles hold the weights too
        statistics = np.empty((parameters.n_components, parameters.n_statistics))
        self.query.kernels.em_statistics(x, g * factor, parameters, statistics, n_threads=self.n_threads)
        return CentralMoments.of(statistics / factor, self.components, isinstance(parameters, Direct))

    @np.errstate(all="ignore")
    def _chain(self, moments: CentralMoments) -> ParameterGradients:
        """The gradients in w, μ and L, in the data's units."""
        P, scale = self.components.precisions_cholesky, self.frame.scale
        # ∂ L_nk / ∂ μ_k = Λ_k (z − μ_k)
        means = (self.prepared.precisions @ moments.first[:, :, None])[:, :, 0]
        # ∂ L_nk / ∂ L_k = the lower triangle of L_k⁻ᵀ (y yᵀ − I), with y = L_k⁻¹ (z − μ_k) and L_k⁻ᵀ = P_k
        identity = np.eye(P.shape[1]) * moments.mass[:, None, None]
        lower = np.tril(P @ (P.swapaxes(1, 2) @ moments.second @ P - identity))
        # ∂ L_nk / ∂ w_k = 1 / w_k
        return ParameterGradients(moments.mass / self.weights, means * scale, lower * scale[:, None])

    # ---- components of weight zero

    @cached_property
    def absent(self) -> list[int]:
        """Components of weight zero: they have no responsibility, but their weights have a gradient."""
        return np.flatnonzero(self.weights == 0).tolist()

    def _ratio(self, k: int, x: Any, log_prob: Any) -> Any:
        """∂ log p(x_n) / ∂ w_k = N(x_n; μ_k, Σ_k) / p(x_n), (n,); the largest float64 where it overflows."""
        parts = self.components.means, self.components.covariances, self.components.precisions_cholesky
        own = Components(np.ones(1), *(each[k : k + 1] for each in parts))
        alone = Mixture.from_components(own, self.frame, FULL)
        log_ratio = Query(alone, self.query.backend, x, "auto", 1).log_prob() - log_prob
        return namespace(log_ratio).exp(namespace(log_ratio).clip(log_ratio, None, LARGEST_LOG))

    # ---- blocks of rows

    def _blocks(self) -> Iterator[slice]:
        rows, N = self._rows_of_a_block, len(self.data)
        return (slice(start, min(start + rows, N)) for start in range(0, N, rows))

    @property
    def _rows_of_a_block(self) -> int:
        K, D = self.components.means.shape
        elements = ELEMENTS_ON_A_GPU if is_tensor(self.data) else ELEMENTS_OF_A_BLOCK
        return max(elements // max(D * D, K), 1)

    def _for_each_block(self, block: Callable[[slice], None]) -> None:
        if is_tensor(self.data):
            for rows in self._blocks():
                block(rows)
            return

        @np.errstate(all="ignore")
        def task(start: int, stop: int) -> None:
            block(slice(start, stop))

        with one_blas_thread():
            for_each_block(task, len(self.data), self._rows_of_a_block, self.n_threads)

    def _sum_over_blocks(self, block: Callable[[slice, Any], None], out: np.ndarray) -> None:
        """out ← what the blocks add to zeros, in their order."""
        if is_tensor(self.data):
            sums = beside(np.zeros_like(out), self.data)
            for rows in self._blocks():
                block(rows, sums)
            out[...] = to_host(sums)
            return

        @np.errstate(all="ignore")
        def task(start: int, stop: int, partial: np.ndarray) -> float:
            block(slice(start, stop), partial)
            return 0.0

        with one_blas_thread():
            sum_over_blocks(task, len(self.data), self._rows_of_a_block, out, self.n_threads)
