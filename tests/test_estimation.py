"""Least squares against NIST's certified values, maximum likelihood, and that the two are one."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from emalgam.estimation import (
    LeastSquares,
    bernoulli_log_likelihood,
    bernoulli_map,
    bernoulli_mle,
    categorical_log_likelihood,
    categorical_mle,
    gaussian_log_likelihood,
    gaussian_mle,
    ols,
)
from emalgam.information import cross_entropy, entropy, kl_discrete

DATA = Path(__file__).parent / "data"
EPS = np.finfo(np.float64).eps

# ---- NIST's Statistical Reference Datasets, https://www.itl.nist.gov/div898/strd


@dataclass(frozen=True, eq=False)
class Certified:
    """A data set with its certified values, and the digits that `ols` has to reach."""

    X: np.ndarray
    y: np.ndarray
    coefficients: tuple[float, ...]
    standard_errors: tuple[float, ...]
    residual_sum_of_squares: float
    r_squared: float
    digits: float


def powers(x: np.ndarray, degree: int) -> np.ndarray:
    """1, x, …, x^degree."""
    return np.vander(x, degree + 1, increasing=True)


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The first column, and the others."""
    values = np.loadtxt(DATA / f"{name}.csv", delimiter=",", skiprows=1)
    return values[:, 0], values[:, 1:]


def longley() -> Certified:
    y, x = table("longley")
    return Certified(
        np.column_stack([np.ones(16), x]),
        y,
        (
            -3482258.63459582,
            15.0618722713733,
            -0.0358191792925910,
            -2.02022980381683,
            -1.03322686717359,
            -0.0511041056535807,
            1829.15146461355,
        ),
        (
            890420.383607373,
            84.9149257747669,
            0.0334910077722432,
            0.488399681651699,
            0.214274163161675,
            0.226073200069370,
            455.478499142212,
        ),
        836424.055505915,
        0.995479004577296,
        12,
    )


def norris() -> Certified:
    y, x = table("norris")
    coefficients, errors = (-0.262323073774029, 1.00211681802045), (0.232818234301152, 0.000429796848199937)
    return Certified(powers(x[:, 0], 1), y, coefficients, errors, 26.6173985294224, 0.999993745883712, 11)


def filip() -> Certified:
    y, x = table("filip")
    return Certified(
        powers(x[:, 0], 10),
        y,
        (
            -1467.48961422980,
            -2772.17959193342,
            -2316.37108160893,
            -1127.97394098372,
            -354.478233703349,
            -75.1242017393757,
            -10.8753180355343,
            -1.06221498588947,
            -0.0670191154593408,
            -0.00246781078275479,
            -0.0000402962525080404,
        ),
        (
            298.084530995537,
            559.779865474950,
            466.477572127796,
            227.204274477751,
            71.6478660875927,
            15.2897178747400,
            2.23691159816033,
            0.221624321934227,
            0.0142363763154724,
            0.000535617408889821,
            0.00000896632837373868,
        ),
        0.000795851382172941,
        0.996727416185620,
        7,
    )


def no_intercept(first: int) -> Certified:
    """NoInt1 and NoInt2: a line through the origin, whose R² is about zero."""
    if first == 60:
        x, y = np.arange(60.0, 71), np.arange(130.0, 141)
        certified = (2.07438016528926,), (0.0165289256198347,), 127.272727272727, 0.999365492298663
    else:
        x, y = np.array([4.0, 5, 6]), np.array([3.0, 4, 4])
        certified = (0.727272727272727,), (0.0420827318078432,), 0.272727272727273, 0.993348115299335
    return Certified(x[:, None], y, *certified, 12)


def wampler(number: int) -> Certified:
    """y is a polynomial of x = 0, …, 20; in sets 3 to 5 with a disturbance orthogonal to all fifth-degree ones."""
    x = np.arange(21.0)
    base = 0.1 if number == 2 else 1.0
    y = sum(np.array([int(v) ** j for v in x]) * base**j for j in range(6))
    half = [759, -2048, 2048, -2048, 2523, -2048, 2048, -2048, 1838, -2048]
    size = {1: 0, 2: 0, 3: 1, 4: 100, 5: 10_000}[number]
    errors = 2152.32624678170, 2363.55173469681, 779.343524331583, 101.475507550350, 5.64566512170752, 0.112324854679312
    return Certified(
        powers(x, 5),
        y + size * np.array([*half, 2048, *half[::-1]]),
        tuple(base**j for j in range(6)),
        tuple(size * error for error in errors),
        83554268.0 * size**2,
        {0: 1.0, 1: 0.999995559025820, 100: 0.957478440825662, 10_000: 0.00224668921574940}[size],
        12,
    )


SETS = {
    "Longley": longley,
    "Norris": norris,
    "Filip": filip,
    "NoInt1": lambda: no_intercept(60),
    "NoInt2": lambda: no_intercept(4),
    **{f"Wampler{number}": lambda number=number: wampler(number) for number in range(1, 6)},
}


def digits(values: object, certified: object) -> float:
    """The digits that the worst of the values has right: −log₁₀ of its relative error, 16 at most."""
    error = np.abs(np.asarray(values) / np.asarray(certified) - 1)
    return float(-np.log10(np.maximum(error, 1e-16).max()))


def exact_solution(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The least-squares solution of these very floats: the normal equations at 100 digits."""
    with mpmath.workdps(100):
        A, b = mpmath.matrix(X.tolist()), mpmath.matrix(y.tolist())
        return np.array([float(v) for v in mpmath.lu_solve(A.T * A, A.T * b)])


@pytest.mark.parametrize("name", SETS)
def test_certified_values(name: str) -> None:
    """Coefficients to 12 digits or more; Filip to 7, for that many survive the rounding of its tenth powers."""
    nist = SETS[name]()
    result = ols(nist.X, nist.y)
    assert result.rank == nist.X.shape[1]
    assert digits(result.coefficients, nist.coefficients) >= nist.digits
    assert digits(result.r_squared, nist.r_squared) >= min(nist.digits + 1, 12)
    if nist.residual_sum_of_squares == 0:
        assert result.residual_sum_of_squares < 1e-20 * np.square(nist.y).sum()
        return
    assert digits(result.residual_sum_of_squares, nist.residual_sum_of_squares) >= nist.digits
    assert digits(result.standard_errors, nist.standard_errors) >= nist.digits - 1


def test_filip_where_others_reach_no_digit() -> None:
    """Neither the order of the rows nor luck has a say: the solution is that of the float64 matrix, to 12 digits."""
    nist = filip()
    exact = exact_solution(nist.X, nist.y)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(nist.y))
        coefficients = ols(nist.X[order], nist.y[order]).coefficients
        assert digits(coefficients, exact) >= 12
        assert digits(coefficients, nist.coefficients) >= 7
    assert digits(np.linalg.solve(nist.X.T @ nist.X, nist.X.T @ nist.y), nist.coefficients) < 1
    assert digits(np.linalg.lstsq(nist.X, nist.y)[0], nist.coefficients) < 1


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_wampler_to_the_last_bits(number: int) -> None:
    """The matrix has integers only, so nothing is lost: all coefficients are one."""
    nist = wampler(number)
    np.testing.assert_allclose(ols(nist.X, nist.y).coefficients, 1.0, rtol=2 * EPS)


# ---- least squares: any data


def problem(N: int = 40, P: int = 4, R: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An intercept and P − 1 features, R right-hand sides with noise, and weights that are small integers."""
    rng = np.random.default_rng(seed)
    X = np.column_stack([np.ones(N), rng.normal(size=(N, P - 1)) + 2])
    return X, X @ rng.normal(size=(P, R)) + rng.normal(size=(N, R)), rng.integers(0, 4, N)


def assert_same(result: LeastSquares, expected: LeastSquares, rtol: float = 1e-11, **index: object) -> None:
    for name in LeastSquares.__dataclass_fields__:
        wanted = np.asarray(getattr(expected, name))[index.get(name, ...)]
        np.testing.assert_allclose(getattr(result, name), wanted, rtol=rtol, atol=1e-14, err_msg=name)


def test_textbook_formulas() -> None:
    """On a well-conditioned problem the formulas of any textbook will do."""
    X, y, weight = problem()
    result = ols(X, y, sample_weight=weight)
    gram = np.linalg.inv(X.T @ (X * weight[:, None]))
    beta = gram @ X.T @ (y * weight[:, None])
    rss = (weight[:, None] * (y - X @ beta) ** 2).sum(axis=0)
    tss = (weight[:, None] * (y - np.average(y, axis=0, weights=weight)) ** 2).sum(axis=0)
    np.testing.assert_allclose(result.coefficients, beta, rtol=1e-11)
    np.testing.assert_allclose(result.residual_sum_of_squares, rss, rtol=1e-11)
    assert result.residual_degrees_of_freedom == weight.sum() - 4
    errors = np.sqrt(np.diag(gram)[:, None] * rss / (weight.sum() - 4))
    np.testing.assert_allclose(result.standard_errors, errors, rtol=1e-11)
    np.testing.assert_allclose(result.r_squared, 1 - rss / tss, rtol=1e-11)


def test_shapes() -> None:
    """One problem, many right-hand sides, a batch, and both: the same numbers."""
    X, y, weight = problem()
    batch_X, batch_y = np.stack([X, X[::-1] * 2]), np.stack([y, y[::-1] * 3])
    batch_weight = np.stack([weight, weight[::-1]])
    everything = ols(batch_X, batch_y, sample_weight=batch_weight)
    assert everything.coefficients.shape == everything.standard_errors.shape == (2, 4, 3)
    assert everything.residual_sum_of_squares.shape == everything.r_squared.shape == (2, 3)
    assert everything.rank.shape == everything.residual_degrees_of_freedom.shape == (2,)
    for b in range(2):
        assert_same(
            ols(batch_X[b], batch_y[b], sample_weight=batch_weight[b]),
            everything,
            **dict.fromkeys(LeastSquares.__dataclass_fields__, b),
        )
        first = ols(batch_X[b], batch_y[b, :, 0], sample_weight=batch_weight[b])
        assert first.coefficients.shape == first.standard_errors.shape == (4,)
        assert isinstance(first.rank, int)
        assert isinstance(first.residual_sum_of_squares, float)
        assert isinstance(first.r_squared, float)
        index: dict[str, object] = {"rank": b, "residual_degrees_of_freedom": b}
        index |= dict.fromkeys(("residual_sum_of_squares", "r_squared"), (b, 0))
        index |= dict.fromkeys(("coefficients", "standard_errors"), (b, slice(None), 0))
        assert_same(first, everything, **index)
    assert ols(batch_X, batch_y[:, :, 0]).coefficients.shape == (2, 4)
    common = ols(batch_X, batch_y, sample_weight=weight)
    assert_same(ols(X, y, sample_weight=weight), common, **dict.fromkeys(LeastSquares.__dataclass_fields__, 0))


@given(st.integers(0, 10**6))
def test_weight_is_repetition_and_zero_is_absence(seed: int) -> None:
    X, y, weight = problem(N=12, seed=seed)
    weight[:6] = [1, 2, 1, 3, 1, 0]
    repeated = ols(np.repeat(X, weight, axis=0), np.repeat(y, weight, axis=0))
    absurd = np.where(weight[:, None] == 0, 1e300, X)
    assert_same(ols(X, y, sample_weight=weight), repeated, rtol=1e-9)
    assert_same(ols(absurd, y, sample_weight=weight), repeated, rtol=1e-9)
    huge = ols(X, y, sample_weight=weight * 1e300)
    np.testing.assert_allclose(huge.coefficients, repeated.coefficients, rtol=1e-9)


@given(st.integers(0, 10**6))
def test_residuals_are_orthogonal_to_the_columns(seed: int) -> None:
    X, y, _ = problem(N=9, seed=seed)
    result = ols(X, y)
    assert np.abs(X.T @ (y - X @ result.coefficients)).max() < 1e-11
    worse = y - X @ (result.coefficients + np.random.default_rng(seed).normal(size=(4, 3)) * 1e-3)
    assert (np.square(worse).sum(axis=0) >= result.residual_sum_of_squares).all()


@pytest.mark.parametrize("unit", [2.0**-500, 2.0**500, 1e-150, 1e150])
def test_units_change_nothing(unit: float) -> None:
    """Columns of any unit: nothing is truncated, and powers of two change no bit."""
    X, y, _ = problem()
    plain, scale = ols(X, y), np.array([1, unit, 1 / unit, 1])
    result = ols(X * scale, y)
    rtol = 0 if unit in (2.0**-500, 2.0**500) else 1e-13
    assert result.rank == 4
    np.testing.assert_allclose(result.coefficients * scale[:, None], plain.coefficients, rtol=rtol)
    np.testing.assert_allclose(result.standard_errors * scale[:, None], plain.standard_errors, rtol=rtol)
    np.testing.assert_allclose(result.r_squared, plain.r_squared, rtol=rtol)
    np.testing.assert_allclose(ols(X, y * unit).coefficients, plain.coefficients * unit, rtol=rtol)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("elements", [32, 1000])
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, elements: int, noise: float) -> None:
    """Few rows at a time, fewer than columns even, and refinement over all of them: the solution of the whole."""
    rng = np.random.default_rng(0)
    X = powers(np.linspace(3, 4, 97), 5)
    y = np.stack([X @ np.arange(1.0, 7), X @ np.ones(6)], axis=1) + noise * rng.normal(size=(97, 2))
    whole = ols(X, y)
    monkeypatch.setattr("emalgam.least_squares.ELEMENTS_AT_ONCE", elements)
    parts = ols(X, y)
    np.testing.assert_allclose(parts.coefficients, whole.coefficients, rtol=1e-12)
    np.testing.assert_allclose(parts.coefficients[:, 0], exact_solution(X, y[:, 0]), rtol=1e-12)
    if noise:
        np.testing.assert_allclose(parts.standard_errors, whole.standard_errors, rtol=1e-9)
    batch = ols(np.stack([X, X + 1]), np.stack([y, y]))
    np.testing.assert_allclose(batch.coefficients[0], whole.coefficients, rtol=1e-12)


def test_r_squared_about_the_mean_wherever_there_is_a_constant() -> None:
    """A column of ones, or columns that add up to one; without, about zero. NaN where y does not vary."""
    rng = np.random.default_rng(0)
    groups = np.eye(3)[rng.integers(0, 3, 50)]
    y = groups @ [1.0, 2.0, 4.0] + rng.normal(size=50)
    coded = np.column_stack([np.full(50, 7.0), groups[:, 1:]])
    assert ols(groups, y).r_squared == pytest.approx(ols(coded, y).r_squared, rel=1e-12)
    alone = groups[:, 1:]
    expected = 1 - np.square(y - alone @ ols(alone, y).coefficients).sum() / np.square(y).sum()
    assert ols(alone, y).r_squared == pytest.approx(expected, rel=1e-12)
    assert np.isnan(ols(coded, np.full(50, 0.1)).r_squared)
    assert np.isnan(ols(alone, np.zeros(50)).r_squared)


def test_as_many_columns_as_rows_and_more() -> None:
    """N = P: the equations are solved, no standard errors. N < P: the first columns do it, the others are named."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(4, 4)), rng.normal(size=4)
    square = ols(X, y)
    np.testing.assert_allclose(square.coefficients, np.linalg.solve(X, y), rtol=1e-10)
    assert square.rank == 4
    assert square.residual_degrees_of_freedom == 0
    assert np.isnan(square.standard_errors).all()
    with pytest.warns(np.exceptions.RankWarning, match=r"rank 2 of 4, columns \[2, 3\] are combinations"):
        wide = ols(X[:2], y[:2])
    np.testing.assert_allclose(wide.coefficients, [*np.linalg.solve(X[:2, :2], y[:2]), 0, 0], rtol=1e-12)


# ---- least squares: rank


def dependent(kind: str) -> tuple[np.ndarray, list[int]]:
    """A matrix, and its columns that depend on earlier ones."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)) + 1e4
    dummies = np.eye(4)[rng.integers(0, 4, 60)]
    return {
        "copy": (np.column_stack([x, x[:, 0] * 3]), [3]),
        "difference": (np.column_stack([x[:, :2], x[:, 0] - x[:, 1], x[:, 2]]), [2]),
        "dummies": (np.column_stack([np.ones(60), dummies]), [4]),
        "zero": (np.column_stack([np.zeros(60), x]), [0]),
        "constants": (np.column_stack([np.ones(60), np.full(60, 0.1), x, np.full(60, 1e9)]), [1, 5]),
        "units": (np.column_stack([x, x.sum(axis=1) * 1e-200]), [3]),
    }[kind]


@pytest.mark.parametrize("kind", ["copy", "difference", "dummies", "zero", "constants", "units"])
def test_dependent_columns_are_named(kind: str) -> None:
    """Rank, a warning with the columns, and the basic solution: that of the other columns, zero for these."""
    X, columns = dependent(kind)
    others = np.setdiff1d(np.arange(X.shape[1]), columns)
    y = np.random.default_rng(1).normal(size=60) + X[:, others].sum(axis=1)
    with pytest.warns(np.exceptions.RankWarning) as caught:
        result = ols(X, y)
    rank = len(others)
    expected = (
        f"X has dependent columns: rank {rank} of {X.shape[1]}, columns {columns} are combinations of those before"
    )
    assert str(caught[0].message).startswith(expected)
    assert caught[0].filename == __file__
    assert result.rank == rank
    assert result.residual_degrees_of_freedom == 60 - rank
    basic = ols(X[:, others], y)
    np.testing.assert_allclose(result.coefficients[others], basic.coefficients, rtol=1e-9)
    np.testing.assert_array_equal(result.coefficients[columns], 0)
    np.testing.assert_allclose(result.standard_errors[others], basic.standard_errors, rtol=1e-6)
    assert np.isnan(result.standard_errors[columns]).all()
    assert result.residual_sum_of_squares == pytest.approx(basic.residual_sum_of_squares, rel=1e-9)
    assert result.r_squared == pytest.approx(basic.r_squared, rel=1e-9)


def test_close_is_not_dependent() -> None:
    """Columns that differ in their tenth digit are ill-conditioned, not dependent: solved, without a warning."""
    x = np.random.default_rng(0).normal(size=50)
    X = np.column_stack([x, x + 1e-10 * np.arange(50)])
    result = ols(X, X.sum(axis=1))
    assert result.rank == 2
    np.testing.assert_allclose(result.coefficients, exact_solution(X, X.sum(axis=1)), rtol=1e-11)


def test_nothing_to_fit_with() -> None:
    with pytest.warns(np.exceptions.RankWarning, match=r"rank 0 of 2, columns \[0, 1\]"):
        result = ols(np.zeros((5, 2)), np.arange(5.0))
    np.testing.assert_array_equal(result.coefficients, 0)
    assert result.residual_sum_of_squares == pytest.approx(30)
    assert result.r_squared == 0


def test_ranks_of_a_batch() -> None:
    """Every problem has its own rank, and none disturbs another."""
    X, y, _ = problem(N=20, R=1)
    batch = np.stack([X] * 4)
    batch[1, :, 2] = 5 * X[:, 1]
    batch[3, :, 1:] = 0
    with pytest.warns(
        np.exceptions.RankWarning, match=r"in 2 problems of the batch; problem 1: rank 3 of 4, columns \[2"
    ):
        result = ols(batch, np.stack([y[:, 0]] * 4))
    np.testing.assert_array_equal(result.rank, [4, 3, 4, 1])
    single = ols(X, y[:, 0])
    for b in (0, 2):
        np.testing.assert_allclose(result.coefficients[b], single.coefficients, rtol=1e-12)
    assert result.coefficients[3, 0] == pytest.approx(y.mean(), rel=1e-12)
    np.testing.assert_array_equal(result.coefficients[[1, 3], [2, 1]], 0)


def test_many_equal_rows_hide_no_dependence() -> None:
    """Rounding must not add up over the rows: groups of a million rows still sum to the constant."""
    groups = np.arange(400_000) % 3
    X = np.column_stack([np.ones(len(groups)), *(groups == k for k in range(3))])
    with pytest.warns(np.exceptions.RankWarning, match=r"columns \[3\]"):
        assert ols(X, groups).rank == 3


def test_bits_do_not_depend_on_the_threads_of_blas() -> None:
    """BLAS divides products this large among its threads, and adds them up in another order."""
    rng = np.random.default_rng(0)
    X, noise = rng.normal(size=(25_000, 20)), rng.normal(size=25_000)

    def results() -> list[np.ndarray]:
        fit, gaussian = ols(X, X.sum(axis=1) + noise), gaussian_mle(X)
        return [
            *(fit.coefficients, fit.standard_errors, gaussian.mean, gaussian.covariance),
            np.asarray(gaussian_log_likelihood(gaussian.mean, gaussian.covariance, X)),
        ]

    with threadpool_limits(1, user_api="blas"):
        expected = results()
    with threadpool_limits(2, user_api="blas"):
        for found, one_thread in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(found, one_thread)


# ---- least squares: what comes in


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int8", "bool", "longdouble"])
def test_dtypes_and_layouts(dtype: str) -> None:
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.integers(-3, 4, (30, 2)), np.eye(2)[rng.integers(0, 2, 30)]], axis=1).astype(dtype)
    y = rng.integers(0, 2, 30).astype(dtype)
    result = ols(X, y)
    expected = ols(X.astype(np.float64), y.astype(np.float64))
    assert result.coefficients.dtype == np.float64
    for layout in (X, np.asfortranarray(X), np.repeat(X, 2, axis=0)[::2], X[::-1][::-1]):
        layout.setflags(write=False)
        assert_same(ols(layout, y), expected, rtol=1e-12)
    assert_same(ols(X.tolist(), y.tolist()), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1.0, 2.0]), r"X has shape \(2,\); expected \(samples, columns\).*X\.reshape\(-1, 1\)"),
        ((np.zeros((0, 2)), []), r"X has shape \(0, 2\)"),
        ((np.eye(2), [1.0]), r"y has shape \(1,\); expected \(2,\) for X of shape \(2, 2\), or one axis more"),
        ((np.eye(2)[None], [1.0, 2.0]), r"y has shape \(2,\); expected \(1, 2\)"),
        ((np.eye(2), np.zeros((2, 0))), r"y has shape \(2, 0\)"),
        (([[1.0], [np.nan]], [1.0, 2.0]), r"X contains NaN at \[1, 0\]; expected finite numbers"),
        (([[1.0], [2.0]], [1.0, np.inf]), r"y contains inf at \[1\]"),
        (([["a"]], [1.0]), r"X has dtype <U1; expected real numbers"),
        ((np.eye(2) * 1j, [1.0, 2.0]), r"X has dtype complex128"),
        (([[1.0], [1.0, 2.0]], [1.0, 2.0]), r"X is a list that cannot be read as an array"),
    ],
)
def test_bad_data(arguments: tuple[object, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ols(*arguments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0], r"sample_weight has shape \(1,\); expected one number per sample: \(3, 2\)"),
        ([1.0, -1.0], r"sample_weight is -1 at \[1\]; expected weights >= 0"),
        ([[1, 1], [1, 1], [0, 0]], r"sample_weight is zero for every sample at \[2\]; expected at least one"),
        ([1.0, np.nan], r"sample_weight contains NaN at \[1\]"),
        (["a", "b"], r"sample_weight has dtype <U1"),
    ],
)
def test_bad_weights(weight: object, message: str) -> None:
    """The same check for all functions."""
    x = np.eye(2)[None].repeat(3, axis=0)
    coins = np.zeros((3, 2), int)
    for call in (
        lambda: ols(x, np.ones((3, 2)), sample_weight=weight),
        lambda: gaussian_mle(x, weight),
        lambda: gaussian_log_likelihood(np.zeros(2), np.eye(2), x, weight),
        lambda: bernoulli_mle(coins, weight),
        lambda: bernoulli_map(coins, 2, 2, weight),
        lambda: bernoulli_log_likelihood(0.5, coins, weight),
        lambda: categorical_mle(coins, sample_weight=weight),
        lambda: categorical_log_likelihood([1.0], coins, weight),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- Gaussian


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("weighted", [False, True])
def test_gaussian_mle(offset: float, weighted: bool) -> None:
    """Mean and covariance ÷ Σω against long double, and the likelihood against SciPy's density."""
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + offset
    weight = rng.integers(0, 4, 500) if weighted else None
    result = gaussian_mle(x, weight)
    rows = np.repeat(x, weight, axis=0) if weighted else x
    mean = rows.astype(np.longdouble).mean(axis=0)
    centred = rows.astype(np.longdouble) - mean
    covariance = (centred.T @ centred / len(rows)).astype(np.float64)
    np.testing.assert_allclose(result.mean, mean.astype(np.float64), rtol=1e-14)
    np.testing.assert_allclose(result.covariance, covariance, rtol=1e-12)
    np.testing.assert_array_equal(result.covariance, result.covariance.T)
    peer = multivariate_normal.logpdf(centred.astype(np.float64), np.zeros(3), covariance).sum()
    assert result.log_likelihood == pytest.approx(peer, rel=1e-12)
    ours = gaussian_log_likelihood(result.mean, result.covariance, x, weight)
    assert ours == pytest.approx(result.log_likelihood, rel=1e-7 if offset else 1e-12)  # the mean is rounded there


def test_gaussian_mle_has_the_greatest_likelihood() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 2))
    best = gaussian_mle(x)
    for _ in range(20):
        root = np.eye(2) + 0.05 * rng.normal(size=(2, 2))
        mean = best.mean + 0.05 * rng.normal(size=2)
        assert gaussian_log_likelihood(mean, root @ best.covariance @ root.T, x) < best.log_likelihood


def test_gaussian_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks, blocks of rows, and rows of weight zero."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 3, 40, 2)), rng.integers(0, 3, (2, 3, 40))
    result = gaussian_mle(x, weight)
    assert result.mean.shape == (2, 3, 2)
    assert result.covariance.shape == (2, 3, 2, 2)
    assert result.log_likelihood.shape == (2, 3)
    likelihood = gaussian_log_likelihood(result.mean, result.covariance, x, weight)
    np.testing.assert_allclose(likelihood, result.log_likelihood, rtol=1e-12)
    for module in ("estimation", "least_squares"):
        monkeypatch.setattr(f"emalgam.{module}.ELEMENTS_AT_ONCE", 16)
    absurd = np.where(weight[..., None] == 0, 1e250, x)
    for index in np.ndindex(2, 3):
        single = gaussian_mle(absurd[index], weight[index])
        for name in ("mean", "covariance", "log_likelihood"):
            np.testing.assert_allclose(getattr(single, name), getattr(result, name)[index], rtol=1e-12)
        tiny = gaussian_mle(np.where(weight[index][:, None] == 0, 1e250, x[index] * 1e-100), weight[index])
        np.testing.assert_allclose(tiny.mean, single.mean * 1e-100, rtol=1e-12)
        log_likelihood = gaussian_log_likelihood(single.mean, single.covariance, absurd[index], weight[index])
        assert log_likelihood == pytest.approx(result.log_likelihood[index], rel=1e-12)
    grid = gaussian_log_likelihood(np.zeros((5, 1, 2)), np.tile(np.eye(2), (3, 1, 1)), x[0, 0])
    assert grid.shape == (5, 3)
    np.testing.assert_allclose(grid, gaussian_log_likelihood([0, 0], np.eye(2), x[0, 0]), rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-160, 1e160])
def test_gaussian_units(unit: float) -> None:
    """The covariance may overflow; mean and likelihood do not."""
    x = np.random.default_rng(0).normal(size=(30, 2))
    plain, scaled = gaussian_mle(x), gaussian_mle(x * unit)
    np.testing.assert_allclose(scaled.mean, plain.mean * unit, rtol=1e-12)
    assert scaled.log_likelihood == pytest.approx(plain.log_likelihood - 60 * np.log(unit), rel=1e-12)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((5, 1)),
        np.full((5, 2), 0.1),
        np.random.default_rng(0).normal(size=(3, 3)),
        np.random.default_rng(0).normal(size=(9, 1)) * [1, 3] + [0, 1e6],
    ],
)
def test_likelihood_without_bound(x: np.ndarray) -> None:
    """Data in a hyperplane: a Gaussian ever flatter is ever more likely."""
    assert gaussian_mle(x).log_likelihood == np.inf


def test_gaussian_of_bad_input() -> None:
    with pytest.raises(ValueError, match=r"X has shape \(3,\); expected \(samples, features\).*X\.reshape\(-1, 1\)"):
        gaussian_mle([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"X contains NaN at \[0, 1, 0\]"):
        gaussian_mle([[[1.0], [np.nan]]])
    with pytest.raises(ValueError, match=r"mean has shape \(2,\) and covariance \(1, 1\); expected \(\.\.\., 1\)"):
        gaussian_log_likelihood([0.0, 0.0], [[1.0]], [[1.0]])
    with pytest.raises(ValueError, match=r"leading axes do not broadcast: mean \(2,\), covariance \(\), X \(3,\)"):
        gaussian_log_likelihood(np.zeros((2, 1)), [[1.0]], np.zeros((3, 4, 1)))
    with pytest.raises(ValueError, match=r"covariance at \[1\] is not positive definite"):
        gaussian_log_likelihood([0.0], [[[1.0]], [[-1.0]]], [[1.0]])


# ---- coins and categories


def test_heads_heads_heads_tails_tails() -> None:
    """The ordered probability of HHHTT at 0.6 is 0.6³ · 0.4² = 0.03456; that of the count is ten times as much."""
    coins = [1, 1, 1, 0, 0]
    likelihood = math.exp(bernoulli_log_likelihood(0.6, coins))
    assert likelihood == pytest.approx(0.03456, rel=1e-14)
    assert math.comb(5, 3) * likelihood == pytest.approx(0.3456, rel=1e-14)
    grid = np.linspace(0, 1, 101)
    curve = bernoulli_log_likelihood(grid, coins)
    assert curve.shape == (101,)
    assert grid[np.argmax(curve)] == bernoulli_mle(coins) == 0.6
    np.testing.assert_array_equal(curve[[0, -1]], -np.inf)


def test_all_heads() -> None:
    """The estimate is 1, however weighted, and its likelihood 1; a Beta prior keeps it below."""
    heads, weight = np.ones(7, bool), np.random.default_rng(0).uniform(size=7)
    assert bernoulli_mle(heads) == bernoulli_mle(heads, weight) == 1.0
    assert bernoulli_log_likelihood(1.0, heads, weight) == 0.0
    assert bernoulli_log_likelihood(0.0, ~heads) == 0.0
    assert bernoulli_map(heads, 2, 2) == pytest.approx(8 / 9)
    assert bernoulli_map(heads, 1, 1) == 1.0


def test_map_is_the_mode_of_the_posterior() -> None:
    from scipy.stats import beta

    coins, weight = [1, 1, 0, 1, 0, 0, 0], [1.0, 2.5, 1, 1, 0, 3, 1]
    grid = np.linspace(0, 1, 10_001)
    posterior = beta.logpdf(grid, 3.5, 1.5) + bernoulli_log_likelihood(grid, coins, weight)
    assert grid[np.argmax(posterior)] == pytest.approx(float(bernoulli_map(coins, 3.5, 1.5, weight)), abs=1e-4)
    assert bernoulli_map(coins, 1, 1, weight) == bernoulli_mle(coins, weight)
    np.testing.assert_allclose(bernoulli_map([1, 1], [1, 2, 5], [1, 2, 5]), [1, 3 / 4, 6 / 10])


def test_coins_in_batches_and_with_weights() -> None:
    rng = np.random.default_rng(0)
    coins, weight = rng.integers(0, 2, (3, 4, 50)), rng.integers(0, 3, (3, 4, 50))
    shares = bernoulli_mle(coins, weight)
    assert shares.shape == (3, 4)
    likelihood = bernoulli_log_likelihood(shares, coins, weight)
    for index in np.ndindex(3, 4):
        repeated = np.repeat(coins[index], weight[index])
        assert shares[index] == pytest.approx(repeated.mean(), rel=1e-14)
        assert likelihood[index] == pytest.approx(float(bernoulli_log_likelihood(shares[index], repeated)), rel=1e-13)
    assert bernoulli_mle([1.0, 0.0], 3) == 0.5


def test_categories() -> None:
    rng = np.random.default_rng(0)
    labels, weight = rng.integers(0, 4, (2, 60)), rng.integers(0, 3, (2, 60))
    shares = categorical_mle(labels, 6, sample_weight=weight)
    assert shares.shape == (2, 6)
    likelihood = categorical_log_likelihood(shares, labels, weight)
    for b in range(2):
        repeated = np.repeat(labels[b], weight[b])
        np.testing.assert_allclose(shares[b], np.bincount(repeated, minlength=6) / len(repeated), rtol=1e-14)
        assert likelihood[b] == pytest.approx(np.log(shares[b][repeated]).sum(), rel=1e-13)
    assert categorical_mle([2, 0]).shape == (3,)
    assert categorical_log_likelihood([1.0, 0.0], [0, 0]) == 0.0
    assert categorical_log_likelihood([1.0, 0.0], [0, 1]) == -np.inf
    assert categorical_log_likelihood([1.0, 0.0], [0, 1], [1, 0]) == 0.0
    coins = np.array([1, 1, 1, 0, 0])
    assert categorical_log_likelihood([0.4, 0.6], coins) == pytest.approx(float(bernoulli_log_likelihood(0.6, coins)))
    np.testing.assert_array_equal(categorical_mle(np.arange(3), sample_weight=[3, 1, 4]), [3 / 8, 1 / 8, 4 / 8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bernoulli_mle([0, 1, 2]), r"x is 2 at \[2\]; expected 0 or 1"),
        (lambda: bernoulli_mle([[0.0, 0.5]]), r"x is 0\.5 at \[0, 1\]; expected 0 or 1"),
        (lambda: bernoulli_mle([]), r"x has shape \(0,\); expected at least one sample along the last axis"),
        (lambda: bernoulli_mle([1, np.nan]), r"x contains NaN at \[1\]"),
        (lambda: bernoulli_log_likelihood([0.5, 1.5], [1]), r"theta is 1\.5 at \[1\]; expected a probability"),
        (
            lambda: bernoulli_log_likelihood([0.5] * 3, [[1], [0]]),
            r"leading axes do not broadcast: theta \(3,\), x \(2,\)",
        ),
        (lambda: bernoulli_map([1], 0, 1), r"alpha is 0; expected a number > 0"),
        (lambda: bernoulli_map([1], 1, [1, -2]), r"beta is -2 at \[1\]; expected a number > 0"),
        (
            lambda: bernoulli_map([1, 1], 0.5, 0.5),
            r"the posterior Beta\(2\.5, 0\.5\) has no mode: its density is unbounded",
        ),
        (lambda: categorical_mle([0, -1]), r"labels is -1 at \[1\]; expected integers from 0 to 0"),
        (lambda: categorical_mle([0, 3], 3), r"labels is 3 at \[1\]; expected integers from 0 to 2"),
        (lambda: categorical_mle([0.0, 1.0]), r"labels has dtype float64 and shape \(2,\); expected integers"),
        (lambda: categorical_mle([0], 0), r"n_categories is 0; expected an integer >= 1"),
        (
            lambda: categorical_mle([[0, 3], [10**12, 0]]),
            r"labels is 1000000000000 at \[1, 0\], which makes 2000000000002 counts; expected at most 1073741824: "
            r"number the labels without gaps, np\.unique\(labels, return_inverse=True\)\[1\]",
        ),
        (
            lambda: categorical_mle(np.array([0, 2**63], np.uint64)),
            r"labels is 9223372036854775808 at \[1\], which makes 9223372036854775809 counts",
        ),
        (lambda: categorical_mle([0], 10**12), r"n_categories is 1000000000000, which .*; expected at most 1073741824"),
        (lambda: categorical_mle([-3, -1]), r"labels is -3 at \[0\]; expected integers from 0 to 0"),
        (lambda: categorical_mle(np.array([0, 2**63], np.uint64), 3), r"labels is 9223372036854775808 at \[1\]; exp"),
        (lambda: categorical_log_likelihood([0.5, 0.6], [0]), r"probabilities has sum 1\.1"),
    ],
)
def test_bad_coins_and_categories(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- the equalities of the notes


def test_least_squares_is_the_gaussian_mle() -> None:
    """OLS = the β of greatest Gaussian likelihood = the β of least mean squared error, at any σ² and with σ² free."""
    X, y, _ = problem(R=1)
    y = y[:, 0]
    result = ols(X, y)

    def log_likelihood(beta: np.ndarray, variance: float) -> float:
        return float(gaussian_log_likelihood([0.0], [[variance]], (y - X @ beta)[:, None]))

    variance = result.residual_sum_of_squares / len(y)
    # −(m/2) ln 2π − (m/2) ln σ² − RSS / 2σ²: at any σ² the β of least squares has the most
    m = len(y)
    expected = -m / 2 * np.log(2 * np.pi) - m / 2 * np.log(variance) - m / 2
    assert log_likelihood(result.coefficients, variance) == pytest.approx(expected, rel=1e-13)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = result.coefficients + 0.1 * rng.normal(size=4)
        gain = log_likelihood(result.coefficients, 2.0) - log_likelihood(other, 2.0)
        excess = np.square(y - X @ other).sum() - result.residual_sum_of_squares
        assert gain > 0
        assert gain == pytest.approx(excess / 4, rel=1e-9)
        assert log_likelihood(other, variance * rng.uniform(0.5, 2)) < expected
    # the residuals' own maximum-likelihood Gaussian: mean zero (there is an intercept), variance RSS / N
    residuals = gaussian_mle((y - X @ result.coefficients)[:, None])
    assert residuals.mean[0] == pytest.approx(0, abs=1e-14)
    assert residuals.covariance[0, 0] == pytest.approx(variance, rel=1e-13)
    assert residuals.log_likelihood == pytest.approx(expected, rel=1e-13)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 10**6))
def test_mle_is_least_kl_is_least_cross_entropy(labels: list[int], seed: int) -> None:
    """−log-likelihood / N = H(shares, q) = H(shares) + KL(shares ‖ q), so that all three are least at q = shares."""
    shares = categorical_mle(labels, 4)
    q = np.random.default_rng(seed).dirichlet(np.ones(4), 5)
    mean_loss = -np.asarray(categorical_log_likelihood(q, labels)) / len(labels)
    np.testing.assert_allclose(mean_loss, cross_entropy(shares, q), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean_loss, entropy(shares) + kl_discrete(shares, q), rtol=1e-12, atol=1e-12)
    best = -categorical_log_likelihood(shares, labels) / len(labels)
    assert best == pytest.approx(float(entropy(shares)), abs=1e-12)
    assert (mean_loss >= best - 1e-12).all()
    assert kl_discrete(shares, shares) == 0.0


def test_minimum_kl_to_the_data_is_the_gaussian_mle() -> None:
    """Mean −log-likelihood − that of the estimate = KL(N(estimate) ‖ N(q)) in closed form, for Gaussians q."""
    x = np.random.default_rng(0).normal(size=(100, 1)) * 2 + 1
    best = gaussian_mle(x)
    mean, variance = float(best.mean[0]), float(best.covariance[0, 0])
    for m, v in ((0.0, 1.0), (1.0, 3.0), (mean + 1e-3, variance)):
        closed_form = 0.5 * (math.log(v / variance) + (variance + (mean - m) ** 2) / v - 1)
        excess = (best.log_likelihood - gaussian_log_likelihood([m], [[v]], x)) / len(x)
        assert excess == pytest.approx(closed_form, rel=1e-8)


def test_nothing_is_said_when_all_is_well() -> None:
    X, y, weight = problem()
    before = X.copy(), y.copy(), weight.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ols(X, y, sample_weight=weight)
    for array, copy in zip((X, y, weight), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_uniform_posterior_has_no_mode() -> None:
    with pytest.raises(ValueError, match=r"the posterior Beta\(1, 1\) has no mode: it is uniform"):
        bernoulli_map([1, 0], 0.5, 0.5, [0.5, 0.5])
