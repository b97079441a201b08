"""The three kernels against the long-double and mpmath oracles, over every backend, arithmetic, form and layout."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emalgam_kernels import Direct, Packed
from tests import oracles
from tests.conftest import SIMULATED, Variant, variants
from tests.kernels.problems import SIZES, Problem, assert_within, direct, packed, problem
from tests.oracles import LONG, Frame, Gaussians
from tests.tolerances import EPS, tolerance

REPRESENTATIVE = {("full", "packed"), ("diag", "direct")}
every_variant = pytest.mark.parametrize("variant", variants(), indirect=True, ids=str)
every_size = pytest.mark.parametrize("size", SIZES)
few_variants = pytest.mark.parametrize(
    "variant",
    [v for v in variants() if (v.covariance_type, v.algorithm) in REPRESENTATIVE],
    indirect=True,
    ids=str,
)


def log_prob(variant: Variant, x: np.ndarray, parameters: Packed | Direct, n_threads: int = 1) -> np.ndarray:
    out = np.full(len(x), np.nan)
    variant.kernels.log_prob(x, parameters, out, n_threads)
    return out


def responsibilities(variant: Variant, x: np.ndarray, parameters: Packed | Direct, n_threads: int = 1) -> np.ndarray:
    out = np.full((len(x), parameters.n_components), np.nan)
    variant.kernels.responsibilities(x, parameters, out, n_threads)
    return out


def em_statistics(
    variant: Variant,
    x: np.ndarray,
    sample_weight: np.ndarray | None,
    parameters: Packed | Direct,
    hard: bool = False,
    n_threads: int = 1,
) -> tuple[np.ndarray, float]:
    out = np.full((parameters.n_components, parameters.n_statistics), np.nan)
    return out, variant.kernels.em_statistics(x, sample_weight, parameters, out, hard, n_threads)


def bound(operation: str, variant: Variant) -> float:
    return tolerance(f"{variant.algorithm} {operation}", variant.arithmetic)


def order_of_sum(variant: Variant, N: int) -> float:
    """What adding N terms in another order may change, relative to the sum of their absolute values."""
    return tolerance("order of a sum", variant.arithmetic) * float(N) ** 0.5


def flushed(variant: Variant) -> float:
    """Below this a responsibility may be zero instead."""
    return {"float64": 1e-300, "float32": 1e-36}[variant.arithmetic]


# ---- against the oracles


@every_variant
@every_size
def test_log_prob(variant: Variant, size: str) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, size)
    found = log_prob(variant, given.x, given.parameters(variant.arithmetic))
    assert_within(found, given.log_prob, bound("log_prob", variant) * given.log_prob_scale, "log p(x_n)")


@every_variant
@every_size
def test_responsibilities(variant: Variant, size: str) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, size)
    found = responsibilities(variant, given.x, given.parameters(variant.arithmetic))
    relative = bound("responsibilities", variant) * (given.logit_scale + given.log_prob_scale[:, None])
    assert_within(found, given.responsibilities, given.responsibilities * relative + flushed(variant), "r_nk")
    rounding = tolerance("sum of responsibilities", variant.arithmetic) * (2 + found.shape[1] ** 0.5)
    assert_within(found.astype(LONG).sum(axis=1), np.ones(len(found)), rounding, "Σ_k r_nk")


@every_variant
@every_size
def test_em_statistics(variant: Variant, size: str) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, size)
    found, total = em_statistics(variant, given.x, given.weight, given.parameters(variant.arithmetic))
    truth, scale = given.weighted_statistics
    assert_within(found, truth, bound("em_statistics", variant) * scale + flushed(variant), "S")
    scale = given.weight @ given.log_prob_scale
    assert_within(total, given.weight @ given.log_prob, bound("log-likelihood", variant) * scale, "Σ ω log p")


@every_variant
@every_size
def test_statistics_of_hard_assignment(variant: Variant, size: str) -> None:
    """Rows whose two best logits differ by less than rounding may go to either: S may be off by such rows, no more."""
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, size)
    found, total = em_statistics(variant, given.x, given.weight, given.parameters(variant.arithmetic), hard=True)
    best, scale = given.logits.max(axis=1), given.logit_scale.max(axis=1)
    error = 2 * bound("log_prob", variant) * scale
    tied = (given.logits > (best - 2 * error)[:, None]).sum(axis=1) > 1
    assert tied.mean() < 0.02, "the data hardly test anything"
    truth, absolute = given.hard_statistics
    either = Problem(given.x[tied], given.mixture, given.algorithm, given.frame)
    terms = np.broadcast_to(given.weight[tied, None], (tied.sum(), len(truth)))
    limit = (4 * EPS[variant.arithmetic] + order_of_sum(variant, len(given.x))) * absolute
    assert_within(found, truth, limit + either.statistics(terms, absolute=True), "S of hard assignment")
    assert_within(total, given.weight @ best, bound("log-likelihood", variant) * (given.weight @ scale), "Σ ω max L")


@every_variant
def test_against_mpmath(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "odd sizes")
    few = slice(0, 50)
    found = log_prob(variant, given.x[few], given.parameters(variant.arithmetic))
    error = oracles.absolute_errors(found, exact_log_prob(variant.covariance_type, variant.dtype, variant.algorithm))
    assert_within(error, np.zeros(50), bound("log_prob", variant) * given.log_prob_scale[few], "log p(x_n)")


def exact_log_prob(covariance_type: str, dtype: str, algorithm: str) -> np.ndarray:
    """mpmath's log p of the first 50 rows, computed once."""
    key = covariance_type, dtype
    if key not in _exact_log_prob:
        given = problem(covariance_type, dtype, algorithm, "odd sizes")
        _exact_log_prob[key] = oracles.exact_log_prob(given.x[:50], given.mixture)
    return _exact_log_prob[key]


_exact_log_prob: dict[tuple[str, str], np.ndarray] = {}


@every_variant
def test_data_far_from_the_origin(variant: Variant) -> None:
    """The frame takes the offset out: the bound is that of centred data, though x keeps only the digits it has."""
    offset = {"float64": 1e8, "float32": 1e4}[variant.dtype]
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one feature", offset)
    found = log_prob(variant, given.x, given.parameters(variant.arithmetic))
    assert_within(found, given.log_prob, bound("log_prob", variant) * given.log_prob_scale, "log p(x_n)")


@every_variant
def test_row_far_from_everything(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one feature")
    far = Problem(np.array([[1e6], [-3e6]], variant.dtype), given.mixture, variant.algorithm, given.frame)
    parameters = given.parameters(variant.arithmetic)
    found = log_prob(variant, far.x, parameters)
    assert (found < -1e10).all()
    assert_within(found, far.log_prob, bound("log_prob", variant) * far.log_prob_scale, "log p(x_n)")
    assert_within(responsibilities(variant, far.x, parameters).sum(axis=1), np.ones(2), 1e-6, "Σ_k r_nk")


@every_variant
def test_one_component_takes_everything(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one component")
    parameters = given.parameters(variant.arithmetic)
    assert (responsibilities(variant, given.x, parameters) == 1).all()
    soft, hard = (em_statistics(variant, given.x, None, parameters, hard) for hard in (False, True))
    np.testing.assert_array_equal(soft[0], hard[0])
    assert soft[1] == hard[1]


@every_variant
def test_component_of_weight_zero_takes_nothing(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one feature")
    some = given.mixture
    mixture = Gaussians(np.array([0.4, 0.0, 0.6]), some.means, some.covariances, some.covariance_type)
    without = Problem(given.x, mixture, variant.algorithm)
    parameters = without.parameters(variant.arithmetic)
    found = log_prob(variant, given.x, parameters)
    scale = np.nan_to_num(np.where(without.responsibilities == 0, 0, without.logit_scale), posinf=0).sum(axis=1)
    assert_within(found, without.log_prob, bound("log_prob", variant) * (scale + abs(without.log_prob)), "log p(x_n)")
    assert (responsibilities(variant, given.x, parameters)[:, 1] == 0).all()
    for hard in (False, True):
        statistics, total = em_statistics(variant, given.x, None, parameters, hard)
        assert (statistics[1] == 0).all()
        assert np.isfinite(total)


@every_variant
def test_equal_components(variant: Variant) -> None:
    """Soft assignment divides a row evenly; hard assignment gives it to the first."""
    one = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one component").mixture
    tied = variant.covariance_type == "tied"
    three = Gaussians(
        np.full(3, 1 / 3), np.repeat(one.means, 3, 0), one.covariances if tied else np.repeat(one.covariances, 3, 0),
        one.covariance_type,
    )  # fmt: skip
    x = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one component").x
    parameters = Problem(x, three, variant.algorithm).parameters(variant.arithmetic)
    r = responsibilities(variant, x, parameters)
    assert (r == r[:, :1]).all()
    assert_within(r, np.full(r.shape, 1 / LONG(3)), EPS[variant.arithmetic], "r_nk")
    statistics, _ = em_statistics(variant, x, None, parameters, hard=True)
    assert statistics[0, -1] == len(x)
    assert (statistics[1:] == 0).all()


# ---- sample weights


@every_variant
def test_no_weights_are_ones(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a tile and a row")
    parameters = given.parameters(variant.arithmetic)
    for hard in (False, True):
        without, total = em_statistics(variant, given.x, None, parameters, hard)
        ones, total_of_ones = em_statistics(variant, given.x, np.ones(len(given.x)), parameters, hard)
        np.testing.assert_array_equal(without, ones)
        assert total == total_of_ones


@every_variant
@pytest.mark.parametrize("hard", [False, True])
def test_row_of_weight_zero_is_absent(variant: Variant, hard: bool) -> None:
    """Even if it holds the largest number there is: every bit of the result is that of a harmless row."""
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a tile and a row")
    parameters, weight = given.parameters(variant.arithmetic), given.weight
    absurd = given.x.copy()
    absurd[weight == 0] = np.finfo(variant.dtype).max * np.array([0.5, -0.5])
    expected, total = em_statistics(variant, given.x, weight, parameters, hard)
    found, total_of_found = em_statistics(variant, absurd, weight, parameters, hard)
    np.testing.assert_array_equal(found, expected)
    assert total_of_found == total
    kept, total_of_kept = em_statistics(variant, given.x[weight > 0], weight[weight > 0], parameters, hard)
    scale = given.statistics(np.broadcast_to(weight[:, None], given.responsibilities.shape), absolute=True)
    rounding = order_of_sum(variant, len(given.x))
    assert_within(found, kept, rounding * scale, "S with the rows of weight zero left out")
    assert_within(
        total, total_of_kept, rounding * (weight @ np.abs(given.log_prob)), "Σ ω log p with those rows left out"
    )


@every_variant
@pytest.mark.parametrize("hard", [False, True])
def test_all_weights_zero(variant: Variant, hard: bool) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one feature")
    statistics, total = em_statistics(
        variant, given.x, np.zeros(len(given.x)), given.parameters(variant.arithmetic), hard
    )
    assert (statistics == 0).all()
    assert total == 0


@every_variant
def test_weights_of_either_sign(variant: Variant) -> None:
    """Statistics are linear in the weights: a gradient's weights may be negative."""
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a tile and a row")
    parameters = given.parameters(variant.arithmetic)
    weight = np.random.default_rng(0).normal(size=len(given.x))
    weight[::7] = 0.0
    found, total = em_statistics(variant, given.x, weight, parameters)
    positive, of_positive = em_statistics(variant, given.x, np.maximum(weight, 0.0), parameters)
    negative, of_negative = em_statistics(variant, given.x, np.maximum(-weight, 0.0), parameters)
    size = np.abs(weight)
    scale = given.statistics(np.broadcast_to(size[:, None], given.responsibilities.shape), absolute=True)
    rounding = order_of_sum(variant, len(given.x))
    assert_within(found, positive - negative, rounding * scale, "S with weights of either sign")
    assert_within(
        total, of_positive - of_negative, rounding * (size @ np.abs(given.log_prob)), "Σ ω log p with such weights"
    )


@every_variant
def test_weight_two_is_the_row_twice(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a tile and a row")
    parameters = given.parameters(variant.arithmetic)
    counts = np.random.default_rng(0).integers(0, 4, len(given.x))
    weighted, total = em_statistics(variant, given.x, counts.astype(np.float64), parameters)
    repeated, total_of_repeated = em_statistics(variant, np.repeat(given.x, counts, axis=0), None, parameters)
    scale = given.statistics(np.broadcast_to(counts[:, None], given.responsibilities.shape), absolute=True)
    rounding = order_of_sum(variant, counts.sum())
    assert_within(weighted, repeated, rounding * scale, "S with rows repeated")
    assert_within(
        total, total_of_repeated, rounding * (counts @ np.abs(given.log_prob)), "Σ ω log p with rows repeated"
    )


@few_variants
def test_layout_of_weights(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a tile and a row")
    parameters, weight = given.parameters(variant.arithmetic), given.weight
    expected, total = em_statistics(variant, given.x, weight, parameters)
    strided, read_only = np.repeat(weight, 3)[::3], weight.copy()
    read_only.flags.writeable = False
    for each in (strided, weight[::-1].copy()[::-1], read_only):
        found, total_of_found = em_statistics(variant, given.x, each, parameters)
        np.testing.assert_array_equal(found, expected)
        assert total_of_found == total


# ---- layouts and dtypes of x


def misaligned(x: np.ndarray) -> np.ndarray:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    moved = memory[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


def sliced(x: np.ndarray) -> np.ndarray:
    larger = np.full((2 * x.shape[0], 2 * x.shape[1]), -99, x.dtype)
    larger[::2, ::-2] = x
    return larger[::2, ::-2]


def read_only(x: np.ndarray) -> np.ndarray:
    frozen = x.copy()
    frozen.flags.writeable = False
    return frozen


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Fortran": np.asfortranarray,
    "sliced": sliced,
    "rows reversed": lambda x: x[::-1].copy()[::-1],
    "one row for all": lambda x: np.broadcast_to(x[0], x.shape),
    "read-only": read_only,
    "misaligned": misaligned,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


def assert_same_results(variant: Variant, x: np.ndarray, same: np.ndarray, parameters: Packed | Direct) -> None:
    """All kernels give the same bits for two arrays that hold the same numbers."""
    np.testing.assert_array_equal(log_prob(variant, x, parameters), log_prob(variant, same, parameters))
    np.testing.assert_array_equal(responsibilities(variant, x, parameters), responsibilities(variant, same, parameters))
    weight = np.arange(len(x)) % 7 / 2
    found, expected = (em_statistics(variant, each, weight, parameters) for each in (x, same))
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


@few_variants
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_rows(variant: Variant, layout: str) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "odd sizes")
    x = LAYOUTS[layout](given.x)
    assert_same_results(variant, x, np.array(x, variant.dtype, order="C"), given.parameters(variant.arithmetic))


@few_variants
def test_memory_mapped_rows(variant: Variant, tmp_path: Path) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "odd sizes")
    np.save(tmp_path / "x.npy", given.x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert_same_results(variant, mapped, given.x, given.parameters(variant.arithmetic))


@pytest.mark.parametrize(
    "dtype",
    ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "f2", "g", ">i2", ">i8", ">f4", ">f8"],
)
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_dtype_of_rows(backend: str, dtype: str, arithmetic: str) -> None:
    given = problem("full", "float64", "packed", "odd sizes")
    variant = Variant(backend, "float64", "full", "packed", arithmetic)
    x = np.clip(np.round(given.x), 0 if "u" in dtype else -100, 100).astype(dtype)
    assert_same_results(variant, x, x.astype(np.float64), given.parameters(arithmetic))


@few_variants
def test_conversion_in_several_pieces(variant: Variant) -> None:
    """More rows than are converted at once: the pieces must not be confused."""
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "one feature")
    N = 101 if SIMULATED else 5001
    x = np.random.default_rng(0).integers(-100, 100, (N, 1)).astype(np.int16)
    parameters, converted = given.parameters(variant.arithmetic), x.astype(np.float64)
    np.testing.assert_array_equal(log_prob(variant, x, parameters), log_prob(variant, converted, parameters))
    weight = np.arange(N) % 7 / 2
    found, expected = (em_statistics(variant, each, weight, parameters) for each in (x, converted))
    scale = Problem(converted, given.mixture, given.algorithm, given.frame).statistics(np.full((N, 3), 3.0), True)
    assert_within(found[0], expected[0], order_of_sum(variant, N) * scale, "S of converted rows")


# ---- layouts of out


@few_variants
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layout_of_responsibilities(variant: Variant, dtype: str) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "odd sizes")
    parameters, (N, K) = given.parameters(variant.arithmetic), given.responsibilities.shape
    expected = responsibilities(variant, given.x, parameters).astype(dtype)
    outs = [np.empty((N, K), dtype), np.empty((K, N), dtype).T, np.empty((2 * N, 3 * K), dtype)[::-2, 1::3]]
    for out in outs:
        variant.kernels.responsibilities(given.x, parameters, out)
        np.testing.assert_array_equal(out, expected)


@few_variants
def test_layout_of_other_outs(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "odd sizes")
    parameters, N = given.parameters(variant.arithmetic), len(given.x)
    expected = log_prob(variant, given.x, parameters)
    for out in (np.empty(3 * N)[::3], np.empty(N)[::-1]):
        variant.kernels.log_prob(given.x, parameters, out)
        np.testing.assert_array_equal(out, expected)
    statistics, _ = em_statistics(variant, given.x, None, parameters)
    K, F = statistics.shape
    for out in (np.empty((F, K)).T, np.empty((2 * K, 2 * F))[::2, ::-2]):
        variant.kernels.em_statistics(given.x, None, parameters, out)
        np.testing.assert_array_equal(out, statistics)


def guarded(shape: tuple[int, ...], step: int = 1) -> tuple[np.ndarray, Callable[[], bool]]:
    """An array of the shape amid canaries (and, with a step, with canaries between its elements)."""
    memory = np.full([3 * step * n for n in shape], 12345.678)
    inside = tuple(slice(step * n, 2 * step * n, step) for n in shape)
    mask = np.ones(memory.shape, bool)
    mask[inside] = False
    return memory[inside], lambda: bool((memory[mask] == 12345.678).all())


@every_variant
@pytest.mark.parametrize("step", [1, 2])
def test_nothing_is_written_outside_out(variant: Variant, step: int) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a tile and a row")
    parameters, (N, K) = given.parameters(variant.arithmetic), given.responsibilities.shape
    x, weight = given.x.copy(), given.weight.copy()
    calls: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], object]]] = {
        "log_prob": ((N,), lambda out: variant.kernels.log_prob(given.x, parameters, out)),
        "responsibilities": ((N, K), lambda out: variant.kernels.responsibilities(given.x, parameters, out)),
        "em_statistics": (
            (K, parameters.n_statistics),
            lambda out: variant.kernels.em_statistics(given.x, given.weight, parameters, out),
        ),
    }
    for name, (shape, call) in calls.items():
        out, intact = guarded(shape, step)
        call(out)
        assert intact(), f"{name} wrote outside out"
        assert (out != 12345.678).all(), f"{name} left entries of out as they were"
    np.testing.assert_array_equal(given.x, x, err_msg="x was changed")
    np.testing.assert_array_equal(given.weight, weight, err_msg="the weights were changed")
    for name in ("shift", "scale", "natural", "means", "precisions_cholesky", "log_constants"):
        if hasattr(parameters, name):
            fresh = getattr(given.parameters(variant.arithmetic), name)
            np.testing.assert_array_equal(getattr(parameters, name), fresh, err_msg=f"{name} was changed")


# ---- threads and memory


@pytest.mark.parametrize(
    "variant",
    [v for v in variants() if v.backend != "reference" or (v.covariance_type, v.algorithm) in REPRESENTATIVE],
    indirect=True,
    ids=str,
)
def test_same_bits_for_any_number_of_threads(variant: Variant) -> None:
    given = problem(variant.covariance_type, variant.dtype, variant.algorithm, "a block and a row")
    x, parameters = np.concatenate([given.x, given.x[::-1]]), given.parameters(variant.arithmetic)
    weight = np.arange(len(x)) % 7 / 2
    one = log_prob(variant, x, parameters), responsibilities(variant, x, parameters)
    statistics, total = em_statistics(variant, x, weight, parameters)
    for n_threads in (1, 2, 3, 7):
        np.testing.assert_array_equal(log_prob(variant, x, parameters, n_threads), one[0])
        np.testing.assert_array_equal(responsibilities(variant, x, parameters, n_threads), one[1])
        found, total_of_found = em_statistics(variant, x, weight, parameters, n_threads=n_threads)
        np.testing.assert_array_equal(found, statistics, err_msg=f"S differs for {n_threads} threads")
        assert total_of_found == total


@pytest.mark.skipif(SIMULATED, reason="270 000 rows: too many for the simulator of CUDA kernels")
@pytest.mark.parametrize("dtype", ["float64", "int16"])
@pytest.mark.parametrize("algorithm", ["packed", "direct"])
def test_memory_does_not_grow_with_the_number_of_rows(backend: str, algorithm: str, dtype: str) -> None:
    """A temporary of one byte for each of the rows by which the calls differ would show."""
    variant = Variant(backend, "float64", "full", algorithm)
    mixture = Gaussians(np.array([0.3, 0.7]), np.array([[0.0, 0.0], [1, 2]]), np.ones((2, 2)), "diag")
    build = packed if algorithm == "packed" else direct
    parameters = build(mixture, Frame(np.zeros(2), np.ones(2)), "float64")
    few, many = 70_000, 270_000

    def peak(N: int) -> int:
        x, weight = np.zeros((N, 2), dtype), np.ones(N)
        out, r, statistics = np.empty(N), np.empty((N, 2)), np.empty((2, parameters.n_statistics))
        tracemalloc.start()
        try:
            for n_threads in (1, 2):
                variant.kernels.log_prob(x, parameters, out, n_threads)
                variant.kernels.responsibilities(x, parameters, r, n_threads)
                variant.kernels.em_statistics(x, weight, parameters, statistics, False, n_threads)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(few)
    assert peak(many) - peak(few) < many - few, "temporary memory grows with N"
