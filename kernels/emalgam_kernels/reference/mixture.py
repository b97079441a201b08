"""The E-step and its statistics in plain NumPy: the specification of these kernels.

Each follows the same steps over a block of rows: the frame, the logits L (two ways: packed and direct), the
log-sum-exp over components, and the statistics.

Every kernel of every backend first looks whether its arguments are arrays of the shapes, dtypes and layouts that are
said here, writeable where it writes, and fit each other: TypeError for what is no array, ValueError for the rest, with
nothing read or written (`emalgam_kernels.contract`). Numbers are not looked at, be they NaN, infinite or negative where
that makes no sense: the layer above does. Only those by which memory is found are (offsets, numbers of rows, counts).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from emalgam_kernels import contract
from emalgam_kernels.blocks import for_each_block, native_slices, rows_per_block, sum_over_blocks
from emalgam_kernels.parameters import Direct, Packed

ROWS_AT_ONCE = 1024


def log_prob(x: np.ndarray, parameters: Packed | Direct, out: np.ndarray, n_threads: int = 1) -> None:
    """log p(x_n) = log Σ_k exp(L_nk), in nats.

    Parameters
    ----------
    x : (N, D) any real dtype and any strides
        float32 and float64 are read where they lie; other types are converted a few rows at a time.
    parameters : Packed or Direct
        The mixture.
    out : (N,) float64
        Receives log p(x_n).
    n_threads : int
        Threads to use; the result has the same bits for every number.
    """

    contract.log_prob(x, parameters, out)

    def block(start: int, stop: int) -> None:
        for first, last, rows in _slices(x, start, stop):
            out[first:last] = _log_sum_exp(_logits(into_frame(rows, parameters), parameters))[0]

    for_each_block(block, len(x), rows_per_block(parameters.n_components, parameters.n_statistics), n_threads)


def responsibilities(
    x: np.ndarray,
    parameters: Packed | Direct,
    out: np.ndarray,
    n_threads: int = 1,
    log_prob: np.ndarray | None = None,
) -> None:
    """r_nk = exp(L_nk − log p(x_n)), the posterior probability of component k given x_n.

    Parameters
    ----------
    x, parameters, n_threads
        As in `log_prob`.
    out : (N, K) float32 or float64
        Receives r_nk; each row sums to one.
    log_prob : (N,) float64, optional
        Receives log p(x_n), which comes for nothing.
    """

    contract.responsibilities(x, parameters, out, log_prob)

    def block(start: int, stop: int) -> None:
        for first, last, rows in _slices(x, start, stop):
            log_p, r = _log_sum_exp(_logits(into_frame(rows, parameters), parameters))
            out[first:last] = r
            if log_prob is not None:
                log_prob[first:last] = log_p

    for_each_block(block, len(x), rows_per_block(parameters.n_components, parameters.n_statistics), n_threads)


def em_statistics(
    x: np.ndarray,
    sample_weight: np.ndarray | None,
    parameters: Packed | Direct,
    out: np.ndarray,
    hard: bool = False,
    n_threads: int = 1,
) -> float:
    """S_k = Σ_n ω_n r_nk φ(z_n) and Σ_n ω_n log p(x_n): E-step and M-step statistics in one pass.

    Parameters
    ----------
    x, parameters, n_threads
        As in `log_prob`. With `Direct`, statistics are about each component's own mean: φ(z_n − μ_k).
    sample_weight : (N,) float64 or None
        ω_n; None means ones. A row of weight zero has no influence, whatever (finite) it holds. Statistics are linear
        in ω: EM's weights are not negative, those of a gradient may be.
    out : (K, F) float64
        Receives S.
    hard : bool
        Put the whole weight on the component with the largest L_nk (the first of equals), as k-means does; the
        returned sum is then Σ_n ω_n max_k L_nk.

    Returns
    -------
    float
        Σ_n ω_n log p(x_n), in nats.

    References
    ----------
    Dempster, Laird, Rubin (1977), eq. 2.2-2.3; Bishop (2006), eq. 9.23-9.27.
    """

    contract.em_statistics(x, sample_weight, parameters, out)

    def block(start: int, stop: int, partial: np.ndarray) -> float:
        total = 0.0
        for first, last, rows in _slices(x, start, stop):
            weight = np.ones(last - first) if sample_weight is None else sample_weight[first:last].copy()
            z = np.where(weight[:, None] == 0, 0, into_frame(rows, parameters))
            logits = _logits(z, parameters)
            log_p, r = _log_sum_exp(logits)
            if hard:
                log_p, r = logits.max(axis=1), (logits.argmax(axis=1)[:, None] == np.arange(logits.shape[1]))
            r = (r * weight[:, None]).astype(logits.dtype)
            if isinstance(parameters, Packed):
                partial += r.T @ features(z, parameters.feature_map)
            else:
                for k, mean in enumerate(parameters.means.astype(z.dtype)):
                    partial[k] += r[:, k] @ features(z - mean, parameters.feature_map)
            total += float(weight @ log_p.astype(np.float64))
        return total

    rows = rows_per_block(parameters.n_components, parameters.n_statistics)
    return sum_over_blocks(block, len(x), rows, out, n_threads)


def _slices(x: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """A few rows at a time, so that nothing here grows with N."""
    for first, last, rows in native_slices(x, start, stop):
        for row in range(first, last, ROWS_AT_ONCE):
            end = min(row + ROWS_AT_ONCE, last)
            yield row, end, rows[row - first : end - first]


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def into_frame(x: np.ndarray, parameters: Packed | Direct) -> np.ndarray:
    """z = (x − shift) · scale, then z W, in the arithmetic type."""
    z = ((x.astype(np.float64, order="C") - parameters.shift) * parameters.scale).astype(parameters.arithmetic)
    if isinstance(parameters, Packed) and parameters.whitening is not None:
        z = z @ parameters.whitening.astype(parameters.arithmetic)
    return z


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def features(z: np.ndarray, feature_map: str) -> np.ndarray:
    """φ(z), (N, F): see `emalgam_kernels.parameters.statistic_count`."""
    one = np.ones((len(z), 1), z.dtype)
    if feature_map == "full":
        i, j = np.tril_indices(z.shape[1])
        return np.hstack([z[:, i] * z[:, j], z, one])
    square = z * z
    return np.hstack([square if feature_map == "diag" else square.sum(axis=1, keepdims=True), z, one])


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _logits(z: np.ndarray, parameters: Packed | Direct) -> np.ndarray:
    """L_nk = log w_k N(x_n; μ_k, Σ_k): ⟨η_k, φ(z_n)⟩, or c_k − ½ ‖P_kᵀ (z_n − μ_k)‖²; (N, K)."""
    if isinstance(parameters, Packed):
        return features(z, parameters.feature_map) @ parameters.natural.astype(z.dtype).T
    logits = np.empty((len(z), parameters.n_components), z.dtype)
    for k in range(parameters.n_components):
        centred = z - parameters.means[k].astype(z.dtype)
        factor = parameters.precisions_cholesky[k].astype(z.dtype)
        y = centred @ factor if parameters.feature_map == "full" else centred * factor
        logits[:, k] = z.dtype.type(parameters.log_constants[k]) - z.dtype.type(0.5) * np.einsum("nd,nd->n", y, y)
    return logits


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _log_sum_exp(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log Σ_k exp(L_k) with the maximum taken out, and softmax_k(L)."""
    top = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits - top)
    total = exponentials.sum(axis=1, keepdims=True)
    return (top + np.log(total))[:, 0], exponentials / total
