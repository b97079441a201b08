"""exp and log: their coefficients are what they claim to be, and every backend's results are within 2 ulp.

The coefficients of sin and cos are held to their claims here, their results in `tests.kernels.test_sampling`.

The kernels do not export exp and log, so they are reached through mixtures whose logits are known exactly. With D = 1,
no frame, and η = (0, 0, 0), (0, 1, 0) the logits of a row x are 0 and x. For x so low that 1 + exp(x) rounds to 1, the
second responsibility *is* exp(x) as evaluated. Above, r₁ / r₀ is exp(x) times two more roundings. With K
equal logits of zero, log p is log(K) as evaluated: the sum of K ones is exact.
"""

from __future__ import annotations

import re
from pathlib import Path

import mpmath
import numpy as np
import pytest

import emalgam_kernels
from emalgam_kernels import Packed, polynomials
from tests import oracles
from tests.conftest import DTYPES, need
from tests.tolerances import EPS, tolerance

HEADER = Path(emalgam_kernels.__file__).parent / "cython_cpu" / "polynomials.h"
FLUSHED = {"float64": 2.3e-308, "float32": 2e-38}
MOST_COMPONENTS = 700


def exp_remainder(r: mpmath.mpf) -> mpmath.mpf:
    """q(r) = (exp(r) − 1 − r) / r²; near zero, where that cancels, the first terms of its series."""
    return (mpmath.exp(r) - 1 - r) / r**2 if abs(r) > 1e-15 else mpmath.mpf(1) / 2 + r / 6


def log_remainder(z: mpmath.mpf) -> mpmath.mpf:
    """p(z) = (2 atanh(s) / s − 2) / z with z = s²."""
    s = mpmath.sqrt(z)
    return (2 * mpmath.atanh(s) / s - 2) / z


def sin_ratio(z: mpmath.mpf) -> mpmath.mpf:
    """s(z) = sin(πr/2) / r with z = r²."""
    r = mpmath.sqrt(z)
    return mpmath.sin(mpmath.pi / 2 * r) / r


def cos_remainder(z: mpmath.mpf) -> mpmath.mpf:
    """c(z) = (cos(πr/2) − 1) / z with z = r²."""
    return (mpmath.cos(mpmath.pi / 2 * mpmath.sqrt(z)) - 1) / z


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_are_chebyshev_interpolants(dtype: str) -> None:
    with mpmath.workdps(oracles.DIGITS):
        half, root = mpmath.log(2) / 2, mpmath.sqrt(2)
        exp_interval, log_interval = (-half, half), (mpmath.mpf(0), ((root - 1) / (root + 1)) ** 2)
    fitted = oracles.chebyshev_coefficients(exp_remainder, exp_interval, len(polynomials.EXP[dtype]), dtype)
    assert [c.hex() for c in polynomials.EXP[dtype]] == [c.hex() for c in fitted]
    fitted = oracles.chebyshev_coefficients(log_remainder, log_interval, len(polynomials.LOG[dtype]), dtype)
    assert [c.hex() for c in polynomials.LOG[dtype]] == [c.hex() for c in fitted]
    squares = mpmath.mpf(0), mpmath.mpf(1) / 4
    for function, given in ((sin_ratio, polynomials.SIN[dtype]), (cos_remainder, polynomials.COS[dtype])):
        fitted = oracles.chebyshev_coefficients(function, squares, {"float64": 7, "float32": 4}[dtype], dtype)
        assert [c.hex() for c in given] == [c.hex() for c in fitted]
    assert (len(polynomials.EXP[dtype]), len(polynomials.LOG[dtype])) == {"float64": (10, 7), "float32": (5, 3)}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_with_a_table(dtype: str) -> None:
    steps, given = polynomials.EXP_STEPS[dtype], polynomials.EXP_OF_A_STEP[dtype]
    assert (steps, len(given)) == {"float64": (16, 5), "float32": (32, 2)}[dtype]
    with mpmath.workdps(oracles.DIGITS):
        half = mpmath.log(2) / (2 * steps)
        powers = [mpmath.mpf(2) ** (mpmath.mpf(j) / steps) for j in range(steps)]
        rounded = [float(mpmath.mpf(power, prec=np.finfo(dtype).nmant + 1, rounding="n")) for power in powers]
    assert list(polynomials.EXP_TABLE[dtype]) == rounded
    fitted = oracles.chebyshev_coefficients(exp_remainder, (-half, half), len(given), dtype)
    assert [c.hex() for c in given] == [c.hex() for c in fitted]


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_of_the_range_reduction(dtype: str) -> None:
    high, low = polynomials.LN2_HIGH[dtype], polynomials.LN2_LOW[dtype]
    bits, exponents = np.finfo(dtype).nmant + 1, np.finfo(dtype).maxexp
    with mpmath.workdps(oracles.DIGITS):
        assert abs(mpmath.log(2) - high - low) < mpmath.mpf(2) ** (-bits) * low
        assert polynomials.LOG2_E[dtype] == float(np.dtype(dtype).type(float(1 / mpmath.log(2))))
        underflow = mpmath.exp(polynomials.EXP_UNDERFLOW[dtype])
    for number in (
        high,
        low,
        *polynomials.EXP[dtype],
        *polynomials.LOG[dtype],
        *polynomials.SIN[dtype],
        *polynomials.COS[dtype],
    ):
        assert float(np.dtype(dtype).type(number)) == number, f"{number.hex()} is no {dtype}"
    numerator = int(high * 2 ** (bits + 1))
    assert numerator % exponents == 0, "n · LN2_HIGH must be exact for every exponent n"
    assert np.finfo(dtype).tiny <= underflow < 4 * np.finfo(dtype).tiny


def test_header_holds_the_same_numbers() -> None:
    text = HEADER.read_text().replace("\\\n", " ")
    defined = dict(re.findall(r"#define (\w+) (.+)", text))
    for name, suffix in (("float64", "f64"), ("float32", "f32")):
        expected = {
            "EXP_COEFFICIENTS": polynomials.EXP[name],
            "LOG_COEFFICIENTS": polynomials.LOG[name],
            "SIN_COEFFICIENTS": polynomials.SIN[name],
            "COS_COEFFICIENTS": polynomials.COS[name],
            "LOG2_E": (polynomials.LOG2_E[name],),
            "LN2_HIGH": (polynomials.LN2_HIGH[name],),
            "LN2_LOW": (polynomials.LN2_LOW[name],),
            "EXP_UNDERFLOW": (polynomials.EXP_UNDERFLOW[name],),
            "EXP_OF_A_STEP": polynomials.EXP_OF_A_STEP[name],
        }
        steps = polynomials.EXP_STEPS[name]
        assert int(defined.pop(f"EXP_STEPS_{suffix}")) == steps
        bits = [int(literal, 16) for literal in defined.pop(f"EXP_TABLE_{suffix}").split(",")]
        place = 2 ** np.finfo(name).nmant // steps
        restored = np.array([each + j * place for j, each in enumerate(bits)], f"int{8 * np.dtype(name).itemsize}")
        assert restored.view(name).tolist() == list(polynomials.EXP_TABLE[name])
        for macro, numbers in expected.items():
            literals = [literal.strip() for literal in defined.pop(f"{macro}_{suffix}").split(",")]
            assert all(literal.endswith("f") for literal in literals) == (suffix == "f32"), f"{macro}_{suffix}: type"
            found = [float.fromhex(x.removesuffix("f")) if "x" in x else float(x.removesuffix("f")) for x in literals]
            assert [x.hex() for x in found] == [x.hex() for x in numbers], f"{macro}_{suffix} in {HEADER.name}"
    assert defined == {}, f"{HEADER.name} defines what polynomials.py does not hold"


def logit_mixture(dtype: str, constants: tuple[float, float] = (0.0, 0.0)) -> Packed:
    """Logits c₀ and x + c₁ for a row x."""
    natural = np.array([[0.0, 0.0, constants[0]], [0.0, 1.0, constants[1]]])
    return Packed("diag", np.zeros(1), np.ones(1), None, natural, dtype)


def exp_as_evaluated(backend: str, logits: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """r₁ and r₀ of rows whose logits are x and 0."""
    r = np.empty((len(logits), 2), dtype)
    emalgam_kernels.load(backend).responsibilities(logits[:, None], logit_mixture(dtype), r)
    return r[:, 1], r[:, 0]


def exp_errors(backend: str, dtype: str) -> dict[str, float]:
    """Worst error of exp in ulp: where r₁ is exp(x) itself, and by the ratio elsewhere."""
    rng, lowest = np.random.default_rng(0), polynomials.EXP_UNDERFLOW[dtype]
    split = np.log(EPS[dtype] / 4)
    below = np.concatenate([rng.uniform(lowest, split, 3000), np.linspace(lowest, lowest + 1, 100)]).astype(dtype)
    r_1, r_0 = exp_as_evaluated(backend, below, dtype)
    assert (r_0 == 1).all()
    errors = {"exp": float(oracles.ulp_errors(r_1, oracles.elementwise(mpmath.exp, below), dtype).max())}
    above = np.concatenate([rng.uniform(split, 0, 2000), -np.logspace(-18, 0, 500)]).astype(dtype)
    r_1, r_0 = exp_as_evaluated(backend, above, dtype)
    ratio = r_1.astype(np.longdouble) / r_0
    errors["exp by ratio"] = float(oracles.ulp_errors(ratio, oracles.elementwise(mpmath.exp, above), dtype).max())
    return errors


def log_error(backend: str, dtype: str) -> float:
    """Worst error of log in ulp over the integers that a sum of equal terms can be."""
    kernels, counts = emalgam_kernels.load(backend), np.arange(2, MOST_COMPONENTS)
    found, out = np.empty(len(counts)), np.empty(1)
    for index, K in enumerate(counts):
        parameters = Packed("diag", np.zeros(1), np.ones(1), None, np.zeros((K, 3)), dtype)
        kernels.log_prob(np.zeros((1, 1)), parameters, out)
        found[index] = out[0]
    return float(oracles.ulp_errors(found, oracles.elementwise(mpmath.log, counts.astype(float)), dtype).max())


def assert_few_ulp(backend: str, dtype: str, errors: dict[str, float]) -> None:
    for operation, error in errors.items():
        bound = tolerance(f"numpy {operation}" if backend == "reference" else operation, dtype)
        assert error <= bound, f"{operation} of {backend} in {dtype} is off by {error:.2f} ulp"


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp(backend: str, dtype: str) -> None:
    assert_few_ulp(backend, dtype, exp_errors(backend, dtype))


def test_exp_of_logits_relative_to_a_component() -> None:
    """Those of many fits may be as large as `MOST_LOGIT`: the function that Numba's kernels call is there to call."""
    need("numba_cpu")
    import numba

    from emalgam_kernels.numba_cpu import tiles
    from emalgam_kernels.numba_cpu.batch_expectation import MOST_LOGIT

    @numba.njit
    def exp_of(x: np.ndarray, out: np.ndarray) -> None:
        for n in range(len(x)):
            out[n] = tiles.exp(x[n])

    x = np.append(np.random.default_rng(0).uniform(0, MOST_LOGIT, 3000), [0.0, MOST_LOGIT])
    out = np.empty_like(x)
    exp_of(x, out)
    errors = oracles.ulp_errors(out, oracles.elementwise(mpmath.exp, x), "float64")
    assert_few_ulp("numba_cpu", "float64", {"exp": float(errors.max())})


@pytest.mark.parametrize("dtype", DTYPES)
def test_log(backend: str, dtype: str) -> None:
    assert_few_ulp(backend, dtype, {"log": log_error(backend, dtype)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("simd_level", ["v3", "baseline"], indirect=True)
def test_exp_and_log_of_other_simd_levels(simd_level: str, dtype: str) -> None:
    errors = {**exp_errors("cython_cpu", dtype), "log": log_error("cython_cpu", dtype)}
    assert_few_ulp(f"cython_cpu on {simd_level}", dtype, errors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_of_zero_and_log_of_one_are_exact(backend: str, dtype: str) -> None:
    out, r = np.empty(1), np.empty((1, 2))
    kernels, one = emalgam_kernels.load(backend), Packed("diag", np.zeros(1), np.ones(1), None, np.zeros((1, 3)), dtype)
    kernels.log_prob(np.zeros((1, 1)), one, out)
    kernels.responsibilities(np.zeros((1, 1)), logit_mixture(dtype), r)
    assert out[0] == 0.0
    assert r.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_underflow_gives_zero_or_a_number_below_the_normal_range(backend: str, dtype: str) -> None:
    lowest = polynomials.EXP_UNDERFLOW[dtype]
    logits = np.array([lowest * 1.001, lowest - 1, 2 * lowest, 1e3 * lowest, -1e15], dtype)
    r_1, r_0 = exp_as_evaluated(backend, logits, dtype)
    assert (r_0 == 1).all()
    assert ((r_1 >= 0) & (r_1 <= FLUSHED[dtype])).all(), r_1
    assert (r_1[2:] == 0).all(), r_1
    out = np.empty(len(logits))
    emalgam_kernels.load(backend).log_prob(logits[:, None], logit_mixture(dtype), out)
    assert (out == 0).all(), out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
def test_minus_infinity_is_a_component_without_weight(backend: str, dtype: str, first: bool) -> None:
    parameters = logit_mixture(dtype, (-np.inf, 0.0) if first else (0.0, -np.inf))
    x, out, r = np.array([[-3.0], [0.0], [5.0]]), np.empty(3), np.empty((3, 2))
    emalgam_kernels.load(backend).log_prob(x, parameters, out)
    emalgam_kernels.load(backend).responsibilities(x, parameters, r)
    assert out.tolist() == ([-3.0, 0.0, 5.0] if first else [0.0, 0.0, 0.0])
    assert r.tolist() == [[0.0, 1.0] if first else [1.0, 0.0]] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("component", [0, 1])
def test_nan_stays_nan(backend: str, dtype: str, component: int) -> None:
    constants = (np.nan, 0.0) if component == 0 else (0.0, np.nan)
    out, r = np.empty(70), np.empty((70, 2))
    x = np.linspace(-2, 2, 70)[:, None]
    emalgam_kernels.load(backend).log_prob(x, logit_mixture(dtype, constants), out)
    emalgam_kernels.load(backend).responsibilities(x, logit_mixture(dtype, constants), r)
    assert np.isnan(out).all(), "a NaN in a component must show in log p"
    assert np.isnan(r).all(), "a NaN in a component must show in every responsibility"
    statistics = np.empty((2, 3))
    assert np.isnan(emalgam_kernels.load(backend).em_statistics(x, None, logit_mixture(dtype, constants), statistics))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_row_stays_in_its_row(backend: str, dtype: str) -> None:
    x = np.linspace(-2, 2, 70)[:, None].astype(dtype)
    clean, spoiled = np.empty((70, 2)), np.empty((70, 2))
    emalgam_kernels.load(backend).responsibilities(x, logit_mixture(dtype), clean)
    x[33] = np.nan
    emalgam_kernels.load(backend).responsibilities(x, logit_mixture(dtype), spoiled)
    assert np.isnan(spoiled[33]).all()
    np.testing.assert_array_equal(np.delete(spoiled, 33, axis=0), np.delete(clean, 33, axis=0))
