"""What each kernel asks of its arguments: a check of the same name, which every backend calls before anything else.

Arguments whose kind, shape, dtype or layout is wrong are an error that says what came and what is wanted, since a
kernel would follow their pointers outside of arrays. So is a number by which memory is found: an offset, a row's
number, a count. Other values, such as NaN or a negative weight, are not looked at: that is for the layer above.

Parameters (`Packed`, `Direct`, `Gaussians`, `Sampler`) are checked when they are built. They are frozen, so that a call
only has to see that its arrays fit them. `kinds` is what a backend's arrays are instances of; a GPU's tensors count.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from emalgam_kernels.batch import COVARIANCE_TYPES, CRITERIA, Mixtures, Outcomes, Problems, Settings, covariance_shape
from emalgam_kernels.checks import (
    BOOL,
    FLOAT64,
    FLOATS,
    INT64,
    UINT32,
    UINT64,
    Kinds,
    expect,
    expect_axes,
    expect_integer,
    expect_option,
    expect_samples,
    not_an_array,
)
from emalgam_kernels.parameters import ARITHMETICS, Direct, Gaussians, Packed, Sampler

DRAWS: Final = ("plain", "antithetic", "stratified")

# ---- mixture


def log_prob(x: Any, parameters: Packed | Direct, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.mixture.log_prob`."""
    N = _expect_rows_of(parameters, x, kinds)
    expect("out", out, (N,), FLOAT64, kinds, written=True)


def responsibilities(
    x: Any, parameters: Packed | Direct, out: Any, log_prob: Any = None, kinds: Kinds = np.ndarray
) -> None:
    """See `emalgam_kernels.reference.mixture.responsibilities`."""
    N = _expect_rows_of(parameters, x, kinds)
    expect("out", out, (N, parameters.n_components), FLOATS, kinds, written=True)
    if log_prob is not None:
        expect("log_prob", log_prob, (N,), FLOAT64, kinds, written=True)


def em_statistics(x: Any, sample_weight: Any, parameters: Packed | Direct, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.mixture.em_statistics`."""
    N = _expect_rows_of(parameters, x, kinds)
    if sample_weight is not None:
        expect("sample_weight", sample_weight, (N,), FLOAT64, kinds)
    expect("out", out, (parameters.n_components, parameters.n_statistics), FLOAT64, kinds, written=True)


def _expect_rows_of(parameters: Packed | Direct, x: Any, kinds: Kinds) -> int:
    """N of samples and one mixture that fit each other."""
    D = _expect_mixture("parameters", parameters, (), kinds)
    N, found = expect_samples(x, kinds)
    if found != D:
        raise ValueError(f"x has shape {(N, found)}; expected (N, {D}), as the parameters have")
    return N


def _expect_mixture(name: str, parameters: Any, stack: tuple[int, ...], kinds: Kinds) -> int:
    """D of Packed or Direct: one mixture, or a stack of (B,)."""
    if not isinstance(parameters, (Packed, Direct)):
        raise TypeError(f"{name} is {type(parameters).__name__}; expected Packed or Direct")
    shift = parameters.shift
    if not isinstance(shift, kinds):
        raise not_an_array(f"{name}.shift", shift, kinds)
    shape = shift.shape
    if shape[:-1] != stack:
        raise ValueError(f"{name} has {_stack(shape[:-1])}; expected {_stack(stack)}")
    if kinds is np.ndarray and parameters.arithmetic not in ARITHMETICS:
        raise ValueError(f"{name}.arithmetic is {parameters.arithmetic!r}; expected one of {', '.join(ARITHMETICS)}")
    return shape[-1]


def _stack(shape: tuple[int, ...]) -> str:
    return f"a stack of {shape[0]} mixtures" if shape else "one mixture, no stack"


# ---- kl


def precision_factors(covariances: Any, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.kl.precision_factors`."""
    shape = check_covariances(covariances, kinds)
    expect("out", out, shape, FLOATS, kinds, written=True, free=1)
    if out.dtype != covariances.dtype:
        raise ValueError(f"out is {out.dtype}; expected {covariances.dtype}, as the covariances are")


def check_covariances(covariances: Any, kinds: Kinds = np.ndarray) -> tuple[int, ...]:
    """See `emalgam_kernels.reference.kl.check_covariances`; returns (M, D, D)."""
    M, D, _ = expect_axes("covariances", covariances, "M, D, D", kinds)
    expect("covariances", covariances, (M, max(D, 1), max(D, 1)), FLOATS, kinds, free=1)
    return M, D, D


def kl_pairs(p: Gaussians, q: Gaussians, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.kl.kl_pairs`."""
    _expect_alike(p, q, kinds)
    if len(p) != len(q):
        raise ValueError(f"p has {len(p)} Gaussians and q {len(q)}; expected as many")
    expect("out", out, (len(p),), FLOAT64, kinds, written=True)


def kl_all_pairs(p: Gaussians, q: Gaussians, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.kl.kl_all_pairs`."""
    _expect_alike(p, q, kinds)
    for name, each in (("p", p), ("q", q)):
        if each.precisions_cholesky is None:
            raise ValueError(
                f"{name}.precisions_cholesky is None; kl_all_pairs needs them: compute them with precision_factors"
            )
    expect("out", out, (len(p), len(q)), FLOAT64, kinds, written=True)


def _expect_alike(p: Gaussians, q: Gaussians, kinds: Kinds) -> None:
    """Two stacks of one covariance type, dtype and number of features."""
    for name, each in (("p", p), ("q", q)):
        if not isinstance(each, Gaussians):
            raise TypeError(f"{name} is {type(each).__name__}; expected Gaussians")
        if not isinstance(each.means, kinds):
            raise not_an_array(f"{name}.means", each.means, kinds)
    if p.covariance_type != q.covariance_type:
        raise ValueError(
            f"the covariances of p are {p.covariance_type} and those of q {q.covariance_type}; expected one type"
        )
    if p.means.dtype != q.means.dtype:
        raise ValueError(f"p is {p.means.dtype} and q {q.means.dtype}; expected one dtype")
    if p.n_features != q.n_features:
        raise ValueError(f"p has {p.n_features} features and q {q.n_features}; expected as many")


# ---- sampling


def philox_words(seed: int, stream: int, block: int, first: int, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.sampling.philox_words`."""
    _expect_counter(seed, first, stream)
    expect_integer("block", block, 0, 2**32)
    n, _ = expect_axes("out", out, "n, 4", kinds)
    expect("out", out, (n, 4), UINT32, kinds, written=True)


def uniforms(seed: int, stream: int, first: int, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.sampling.uniforms`."""
    _expect_counter(seed, first, stream)
    expect("out", out, expect_axes("out", out, "n", kinds), FLOATS, kinds, written=True)


def normals(seed: int, stream: int, first: int, out: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.sampling.normals`."""
    _expect_counter(seed, first, stream)
    n, D = expect_axes("out", out, "n, D", kinds)
    expect("out", out, (n, max(D, 1)), FLOATS, kinds, written=True)


def sample_mixture(
    sampler: Sampler, seed: int, first: int, out: Any, labels: Any, draw: str, kinds: Kinds = np.ndarray
) -> None:
    """See `emalgam_kernels.reference.sampling.sample_mixture`."""
    _expect_counter(seed, first)
    _expect_sampler(sampler, (), draw)
    n, _ = expect_axes("out", out, "n, D", kinds)
    expect("out", out, (n, sampler.n_features), FLOATS, kinds, written=True)
    expect("labels", labels, (n,), INT64, kinds, written=True)


def kl_monte_carlo(
    sampler: Sampler,
    p: Packed | Direct,
    q: Packed | Direct,
    seed: int,
    first: int,
    n: int,
    out: Any,
    draw: str,
    control: Any,
    kinds: Kinds = np.ndarray,
) -> None:
    """See `emalgam_kernels.reference.sampling.kl_monte_carlo`; only `out` may be a tensor."""
    _expect_counter(seed, first)
    expect_integer("n", n, 0, 2**63)
    B, _ = expect_axes("out", out, "B, 2", kinds)
    expect("out", out, (B, 2 if control is None else 5), FLOAT64, kinds, written=True)
    _expect_sampler(sampler, (B,), draw)
    if control is not None and not (isinstance(control, tuple) and len(control) == 2):
        raise TypeError(f"control is {type(control).__name__}; expected two mixtures (Packed, Packed), or None")
    names = ("p", "q", "control[0]", "control[1]")
    for name, each in zip(names, (p, q, *(control or ())), strict=False):
        D = _expect_mixture(name, each, (B,), kinds)
        if not isinstance(each.shift, np.ndarray):
            raise not_an_array(f"{name}.shift", each.shift)
        if sampler.n_features != D:
            raise ValueError(f"{name} has {D} features; expected {sampler.n_features}, as the sampler has")


def _expect_counter(seed: int, first: int, stream: int = 0) -> None:
    """What `emalgam_kernels.philox` makes counters of."""
    expect_integer("seed", seed, 0, 2**64)
    expect_integer("first", first, 0, 2**64)
    expect_integer("stream", stream, 0, 2**32)


def _expect_sampler(sampler: Any, stack: tuple[int, ...], draw: str) -> None:
    """One mixture to draw from, or a stack of (B,), that has what `draw` needs."""
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler is {type(sampler).__name__}; expected Sampler")
    if sampler.weights.shape[:-1] != stack:
        raise ValueError(f"sampler has {_stack(sampler.weights.shape[:-1])}; expected {_stack(stack)}")
    expect_option("draw", draw, DRAWS)
    if draw == "stratified":
        expect_integer("sampler.n_total", sampler.n_total, 1, 2**63)


# ---- batch: a call takes whole problems, so that there is time to look at the numbers by which memory is found


def fit_many(
    problems: Problems, settings: Settings, mixtures: Mixtures, outcomes: Outcomes, kinds: Kinds = np.ndarray
) -> None:
    """See `emalgam_kernels.reference.batch.fit_many`."""
    N, B = _expect_problems(problems, kinds)
    K = _expect_mixtures(mixtures, B, problems.n_features, kinds, written=True)
    if problems.sample_weight is not None:
        expect("sample_weight", problems.sample_weight, (N,), FLOAT64, kinds)
    numbers = UINT64 if isinstance(problems.numbers, np.ndarray) else (*UINT64, *INT64)
    expect("numbers", problems.numbers, (B,), numbers, kinds)
    if settings.covariance_type != mixtures.covariance_type:
        raise ValueError(
            f"the settings say {settings.covariance_type}, and the mixtures {mixtures.covariance_type}; "
            "expected one covariance type"
        )
    expect_option("criterion", settings.criterion, CRITERIA)
    expect_integer("n_init", settings.n_init, 1, 2**31)
    expect_integer("max_iter", settings.max_iter, 0, 2**63)
    expect_integer("seed", settings.seed, 0, 2**64)
    for name, counts in (("fewest", settings.fewest), ("most", settings.most)):
        expect(name, counts, (B,), INT64, kinds)
    _expect_range("fewest", settings.fewest, 1, 2**63 - 1)
    _expect_range("most", settings.most, 1, K)
    dtypes = {"log_likelihood": FLOAT64, "entropy": FLOAT64, "n_iter": INT64, "converged": BOOL, "status": INT64}
    for name, dtype in dtypes.items():
        expect(name, getattr(outcomes, name), (B,), dtype, kinds, written=True)


def predict_many(problems: Problems, mixtures: Mixtures, log_prob: Any, labels: Any, kinds: Kinds = np.ndarray) -> None:
    """See `emalgam_kernels.reference.batch.predict_many`."""
    N, B = _expect_problems(problems, kinds)
    K = _expect_mixtures(mixtures, B, problems.n_features, kinds)
    _expect_range("n_components", mixtures.n_components, 0, K)
    expect("log_prob", log_prob, (N,), FLOAT64, kinds, written=True)
    expect("labels", labels, (N,), INT64, kinds, written=True)


def _expect_problems(problems: Problems, kinds: Kinds) -> tuple[int, int]:
    """N and B of problems whose samples all lie in x."""
    N, D = expect_axes("x", problems.x, "N, D", kinds)
    expect("x", problems.x, (N, max(D, 1)), FLOATS, kinds)
    (edges,) = expect_axes("offsets", problems.offsets, "B + 1", kinds)
    expect("offsets", problems.offsets, (max(edges, 1),), INT64, kinds)
    offsets, order, n = problems.offsets, problems.order, N
    if order is not None:
        (n,) = expect_axes("order", order, "N", kinds)
        expect("order", order, (n,), INT64, kinds)
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or last > n or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets lead from {first} to {last}, or down; expected ascending numbers from 0 to {n}")
    if order is not None:
        _expect_range("order", order[first:last], 0, N - 1)
    return N, edges - 1


def _expect_mixtures(mixtures: Mixtures, B: int, D: int, kinds: Kinds, written: bool = False) -> int:
    """K of B mixtures of D features."""
    expect_option("covariance_type", mixtures.covariance_type, COVARIANCE_TYPES)
    _, K = expect_axes("weights", mixtures.weights, "B, K", kinds)
    expect("n_components", mixtures.n_components, (B,), INT64, kinds, written)
    expect("weights", mixtures.weights, (B, K), FLOAT64, kinds, written)
    expect("means", mixtures.means, (B, K, D), FLOAT64, kinds, written)
    shape = covariance_shape(mixtures.covariance_type, B, K, D)
    expect("covariances", mixtures.covariances, shape, FLOAT64, kinds, written)
    return K


def _expect_range(name: str, numbers: Any, first: int, last: int) -> None:
    """Integers in [first, last], of either place; on a device this waits for it."""
    if len(numbers) > 0:
        least, most = int(numbers.min()), int(numbers.max())
        if least < first or most > last:
            raise ValueError(f"{name} has numbers from {least} to {most}; expected them from {first} to {last}")
