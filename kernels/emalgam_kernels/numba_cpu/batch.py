"""Many fits at once, compiled by Numba on first use: whole problems, a block of them on a thread.

The functions are specified in `emalgam_kernels.reference.batch`. Two jitted functions serve them, whatever the types
and strides of x, and are kept on disk.

`batch_memory` says what a thread has of a problem. `batch_frame` finds the frame that it is fitted in, `batch_seeding`
makes a start, `batch_expectation` and `batch_maximization` are the steps of EM, both with the matrices of
`batch_matrices`, and `batch_fit` runs them and keeps the best; `batch_prediction` takes mixtures as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np

from emalgam_kernels import batch, contract, philox, polynomials, scalars
from emalgam_kernels.batch import Mixtures, Outcomes, Problems, Settings, parameter_count
from emalgam_kernels.blocks import CACHE_LINE, FLOP_PER_EXPONENTIAL, carve, cuts, for_each_block, tile_dtype
from emalgam_kernels.numba_cpu import (
    batch_expectation,
    batch_fit,
    batch_frame,
    batch_matrices,
    batch_maximization,
    batch_memory,
    batch_prediction,
    batch_seeding,
    draws,
    tiles,
)
from emalgam_kernels.numba_cpu.batch_fit import fit_problem, store
from emalgam_kernels.numba_cpu.batch_memory import OUTER, Components, Frame, Rules, Samples, Scratch, Tiles, Work
from emalgam_kernels.numba_cpu.batch_prediction import adopt, predict_problem
from emalgam_kernels.numba_cpu.compilation import compile_function
from emalgam_kernels.numba_cpu.tiles import (
    DIAG,
    FULL,
    LINEAR,
    SPHERICAL,
    STATISTICS_AT_ONCE,
    padded,
)
from emalgam_kernels.parameters import statistic_count

PACKED_MAPS: Final = {"full": FULL, "tied": LINEAR, "diag": DIAG, "spherical": SPHERICAL}
FEATURES_AT_ONCE: Final = 160  # Φ is kept in one piece if it has no more rows
KEPT_BYTES: Final = 768 * 1024  # of z and Φ, in the second-level cache
TILE_BYTES: Final = 128 * 1024
MOST_COLUMNS: Final = 512  # `relative_softmax` multiplies as many numbers below 2
STEP: Final = 64
ITERATIONS: Final = 20  # of a fit: a guess that decides how many make a block
SAMPLES_OF_AN_M_STEP: Final = 30  # that take as long as what an iteration takes for any number of them
# Covariances of each type as (B, C, H, width).
AS_MATRICES: Final[dict[str, Any]] = {
    "full": (),
    "tied": np.s_[:, None],
    "diag": np.s_[:, :, None],
    "spherical": np.s_[:, :, None, None],
}

# ---- compiled: each function is a closure over `version`, see `compile_function`


def _fit_function(version: str) -> Callable[..., None]:
    """A block of fits, as a closure over `version`."""

    def fit_block(
        float64: np.ndarray,
        float32: np.ndarray,
        offsets: np.ndarray,
        order: np.ndarray,
        sample_weight: np.ndarray,
        rules: Rules,
        work: Work,
        blocks: tuple[int, int],
        n_components: np.ndarray,
        weights: np.ndarray,
        means: np.ndarray,
        covariances: np.ndarray,
        numbers: np.ndarray,
        fewest: np.ndarray,
        most: np.ndarray,
        log_likelihood: np.ndarray,
        entropy: np.ndarray,
        n_iter: np.ndarray,
        converged: np.ndarray,
        status: np.ndarray,
    ) -> None:
        """Problems start ≤ b < stop; the arrays are those of Problems, Mixtures and Outcomes."""
        _ = version
        samples = Samples(float64, float32, order, sample_weight)
        for b in range(blocks[0], blocks[1]):
            where, choices = (offsets[b], offsets[b + 1] - offsets[b]), (fewest[b], most[b])
            fit = fit_problem(rules, samples, where, numbers[b], choices, work)
            status[b] = fit.status
            if fit.K > 0:
                store(work.frame, work.components, fit.K, weights[b], means[b], covariances[b])
                n_components[b], log_likelihood[b], entropy[b] = fit.K, fit.log_likelihood, fit.entropy
                n_iter[b], converged[b] = fit.n_iter, fit.converged

    return fit_block


def _predict_function(version: str) -> Callable[..., None]:
    """A block of predictions, as a closure over `version`."""

    def predict_block(
        float64: np.ndarray,
        float32: np.ndarray,
        offsets: np.ndarray,
        order: np.ndarray,
        sample_weight: np.ndarray,
        rules: Rules,
        work: Work,
        blocks: tuple[int, int],
        n_components: np.ndarray,
        weights: np.ndarray,
        means: np.ndarray,
        covariances: np.ndarray,
        log_prob: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        """Problems start ≤ b < stop; the arrays are those of Problems and Mixtures."""
        _ = version
        samples = Samples(float64, float32, order, sample_weight)
        for b in range(blocks[0], blocks[1]):
            first, count, K = offsets[b], offsets[b + 1] - offsets[b], n_components[b]
            if K > 0:
                adopt(work, K, weights[b], means[b], covariances[b])
                predict_problem(rules, samples, (first, count), K, work, log_prob, labels)
            else:
                for n in range(first, first + count):
                    i = order[n] if len(order) > 0 else n
                    log_prob[i], labels[i] = np.nan, -1

    return predict_block


_FUNCTIONS: Final[dict[str, Callable[[str], Callable[..., None]]]] = {
    "fit_many": _fit_function,
    "predict_many": _predict_function,
}
_STEPS: Final = (
    batch_memory,
    batch_matrices,
    batch_frame,
    batch_seeding,
    batch_expectation,
    batch_maximization,
    batch_fit,
    batch_prediction,
)
_SOURCES: Final = *_STEPS, tiles, draws, scalars, polynomials, batch, philox
_compiled: dict[str, Callable[..., None]] = {}
_compiling = threading.Lock()


def _function(kernel: str, rules: Rules, work: Work) -> Callable[..., None]:
    """The block function of a kernel, for arrays of any strides."""
    with _compiling:
        if kernel not in _compiled:
            types: Any = numba.types
            typeof: Any = numba.typeof
            array, integer, real = types.Array, types.int64, types.float64
            x = (array(each, 2, "A", readonly=True) for each in (real, types.float32))
            rows = (array(each, 1, "A", readonly=True) for each in (integer, integer, real))
            shared = typeof(rules), typeof(work), types.UniTuple(integer, 2)
            mixtures = array(integer, 1, "A"), *(array(real, n, "A") for n in (2, 3, 4))
            if kernel == "fit_many":
                given = (array(each, 1, "A", readonly=True) for each in (types.uint64, integer, integer))
                results = [*given, *(array(each, 1, "A") for each in (real, real, integer, types.boolean, integer))]
            else:
                results = [array(real, 1, "A"), array(integer, 1, "A")]
            signature = types.void(*x, *rows, *shared, *mixtures, *results)
            _compiled[kernel] = compile_function(kernel, _FUNCTIONS[kernel], signature, _SOURCES, OUTER)
        return _compiled[kernel]


# ---- a thread's memory ---------------------------------------------------------------------------------------------


def _statistics(covariance_type: str, n_features: int) -> int:
    """F of the packed form."""
    return n_features + 1 if covariance_type == "tied" else statistic_count(covariance_type, n_features)


def _pieces(n_statistics: int) -> int:
    """Rows of Φ at once: F in equal pieces of at most FEATURES_AT_ONCE."""
    pieces = -(-n_statistics // FEATURES_AT_ONCE)
    return padded(-(-n_statistics // pieces), STATISTICS_AT_ONCE)


def _columns(n_statistics: int, n_features: int) -> int:
    """T. It follows from D and F alone, or a result would depend on other problems."""
    return min(max(TILE_BYTES // (8 * (_pieces(n_statistics) + n_features)) // STEP * STEP, STEP), MOST_COLUMNS)


def _work_of(rules: Rules, n_components: int, n_features: int, n_statistics: int, most_samples: int) -> Work:
    """The calling thread's memory."""
    D, F, T, matrix = n_features, padded(n_statistics, STATISTICS_AT_ONCE), rules.columns, rules.direct_map == FULL
    K, C, H = n_components, 1 if rules.shared else n_components, D if matrix else 1
    direct_F, features = statistic_count("full" if matrix else "diag", D), _pieces(n_statistics)
    stride = T + CACHE_LINE // 8  # rows a power of two apart would share cache sets
    kept_bytes = 8 * stride * (D + 2 + (features if rules.whole else 0))
    slots = max(min(KEPT_BYTES // kept_bytes, -(-most_samples // T)), 1)
    y, whitened = padded(D + 1, STATISTICS_AT_ONCE), D + 1
    factor = (D, padded(D, STATISTICS_AT_ONCE)) if matrix else (1, D)
    kept = [(slots, D, stride), (slots if rules.whole else 1, features, stride), (slots, 2, stride)]
    groups = [
        [*kept, (T, D), (K, stride), (3, stride), (y, stride), (whitened, stride), (whitened, y)],
        [(10, D), (1, 1, D), (1, D), (K,), (1, direct_F), (n_statistics,)],
        [(3, K), (3, K, D), (3, C, H, D), (3, C, *factor), (3, K), (3, K, F), (3, K)],
        [(K, F), (K, F), (K, direct_F), (H, D), (H, D), (D,), (K,), (K, D), (K,)],
    ]
    arrays = iter(carve([shape for group in groups for shape in group], np.dtype(np.float64)))
    tile, frame, components, scratch = ([next(arrays) for _ in group] for group in groups)
    work = Work(Tiles(*tile), Frame(*frame), Components(*components), Scratch(np.empty(K, np.int64), *scratch))
    # What only pads, and what stays zero.
    padding = work.components.factors, work.components.natural, work.scratch.relative
    for zeros in (*padding, work.frame.origin, work.frame.constants):
        zeros[...] = 0
    return work


# ---- blocks --------------------------------------------------------------------------------------------------------


def _rules(settings: Settings, n_features: int) -> Rules:
    """What the compiled functions know of the settings."""
    covariance_type = settings.covariance_type
    n_statistics = _statistics(covariance_type, n_features)
    n_parameters = [parameter_count(covariance_type, K, n_features) for K in (1, 2)]
    return Rules(
        packed_map=PACKED_MAPS[covariance_type],
        direct_map=FULL if covariance_type in ("full", "tied") else DIAG,
        shared=covariance_type == "tied",
        isotropic=covariance_type == "spherical",
        whole=n_statistics <= FEATURES_AT_ONCE,
        columns=_columns(n_statistics, n_features),
        parameters_at_all=float(2 * n_parameters[0] - n_parameters[1]),
        parameters_each=float(n_parameters[1] - n_parameters[0]),
        aic=settings.criterion == "aic",
        icl=settings.criterion == "icl",
        n_init=int(settings.n_init),
        max_iter=int(settings.max_iter),
        tol=float(settings.tol),
        added=float(settings.added),
        seed=np.uint64(settings.seed),
    )


def _native(x: np.ndarray) -> np.ndarray:
    """x in a type and byte order that compiled functions read; what they can read as it is, is not copied."""
    return x if x.dtype == tile_dtype(x) and x.flags.aligned else x.astype(tile_dtype(x))


def _run(
    kernel: str,
    problems: Problems,
    rules: Rules,
    mixtures: Mixtures,
    results: list[np.ndarray],
    flop: np.ndarray,
    n_threads: int,
) -> None:
    """Call the compiled function for blocks of problems, each of which takes `flop`."""
    x, D, K = _native(problems.x), problems.n_features, mixtures.weights.shape[1]
    empty, most_samples = np.empty((0, D)), int(np.diff(problems.offsets).max(initial=0))
    arguments = (
        x if x.dtype == np.float64 else empty,
        x if x.dtype == np.float32 else empty.astype(np.float32),
        problems.offsets,
        np.empty(0, np.int64) if problems.order is None else problems.order,
        np.empty(0) if problems.sample_weight is None else problems.sample_weight,
        rules,
    )
    n_statistics = _statistics(mixtures.covariance_type, D)
    covariances = mixtures.covariances[AS_MATRICES[mixtures.covariance_type]]
    results = [mixtures.n_components, mixtures.weights, mixtures.means, covariances, *results]
    local, edges = threading.local(), cuts(flop)

    def block(index: int, _: int) -> None:
        if not hasattr(local, "work"):
            local.work = _work_of(rules, K, D, n_statistics, most_samples)
        function = _function(kernel, rules, local.work)
        function(*arguments, local.work, (int(edges[index]), int(edges[index + 1])), *results)

    for_each_block(block, len(edges) - 1, 1, n_threads)


def _flop(problems: Problems, covariance_type: str, n_components: np.ndarray) -> np.ndarray:
    """What one pass over each problem takes, roughly, (B,)."""
    per_component = 4 * _statistics(covariance_type, problems.n_features) + FLOP_PER_EXPONENTIAL
    flop: np.ndarray = (np.diff(problems.offsets) + SAMPLES_OF_AN_M_STEP) * (n_components * float(per_component))
    return flop


def fit_many(
    problems: Problems, settings: Settings, mixtures: Mixtures, outcomes: Outcomes, n_threads: int = 1
) -> None:
    """EM of many problems; see `emalgam_kernels.reference.batch.fit_many`."""
    contract.fit_many(problems, settings, mixtures, outcomes)
    rules = _rules(settings, problems.n_features)
    given = [problems.numbers, settings.fewest, settings.most]
    results = [outcomes.log_likelihood, outcomes.entropy, outcomes.n_iter, outcomes.converged, outcomes.status]
    passes = settings.n_init * (settings.most - settings.fewest + 1) * min(settings.max_iter, ITERATIONS)
    flop = _flop(problems, settings.covariance_type, settings.most) * passes
    _run("fit_many", problems, rules, mixtures, given + results, flop, n_threads)


def predict_many(
    problems: Problems, mixtures: Mixtures, log_prob: np.ndarray, labels: np.ndarray, n_threads: int = 1
) -> None:
    """log p and labels; see `emalgam_kernels.reference.batch.predict_many`."""
    contract.predict_many(problems, mixtures, log_prob, labels)
    none = np.empty(0, np.int64)
    rules = _rules(Settings(mixtures.covariance_type, none, none), problems.n_features)
    flop = _flop(problems, mixtures.covariance_type, mixtures.n_components)
    _run("predict_many", problems, rules, mixtures, [log_prob, labels], flop, n_threads)
