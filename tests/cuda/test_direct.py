"""The direct form on the device, against the long-double oracle."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emalgam_kernels.numba_cuda import products
from emalgam_kernels.numba_cuda.direct import run
from emalgam_kernels.numba_cuda.products import COLUMN_STEP
from tests.conftest import COVARIANCE_TYPES
from tests.cuda.passes import (
    ARITHMETICS,
    assert_right,
    assert_right_when_hard,
    current_device,
    make,
    one_pass,
)
from tests.kernels.problems import Problem
from tests.oracles import Gaussians

# With `small_chunks` two chunks of two parts, and a rest; or one and a rest.
SEVERAL_CHUNKS, TWO_CHUNKS = 5 * COLUMN_STEP - 10, 3 * COLUMN_STEP - 10
SIZES = {
    "one row": (1, 3, 4),
    "one feature": (40, 1, 3),
    "one component": (40, 3, 1),
    "several lanes": (30, 2, 19),
    "two panels": (20, 35, 2),
}

every_arithmetic = pytest.mark.parametrize(("dtype", "arithmetic"), ARITHMETICS)
every_covariance_type = pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
both_forms = pytest.mark.parametrize("covariance_type", ["full", "diag"])


@pytest.fixture(autouse=True, scope="module")
def _switch_often() -> Iterator[None]:
    """The simulator polls its threads: the less they wait for the interpreter, the sooner it is done."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two sums."""
    monkeypatch.setattr(products, "ROWS_OF_A_SUM", COLUMN_STEP)
    monkeypatch.setattr(products, "MOST_ROWS", 2 * COLUMN_STEP)


@every_arithmetic
@every_covariance_type
@pytest.mark.usefixtures("small_chunks")
def test_several_chunks(covariance_type: str, dtype: str, arithmetic: str) -> None:
    given = make(covariance_type, dtype, "direct", SEVERAL_CHUNKS, 3, 5)
    assert_right(given, arithmetic, one_pass(run, given.x, given.weight, given.parameters(arithmetic)))


@both_forms
@pytest.mark.parametrize("size", SIZES)
def test_sizes(covariance_type: str, size: str) -> None:
    given = make(covariance_type, "float32", "direct", *SIZES[size])
    assert_right(given, "float32", one_pass(run, given.x, given.weight, given.parameters("float32")))


@both_forms
def test_components_far_apart(covariance_type: str) -> None:
    """Where the packed form would be off by some nats: its terms are 1e8, its rounding 10."""
    given = make(covariance_type, "float32", "direct", 50, 2, 3, spread=1e4)
    assert_right(given, "float32", one_pass(run, given.x, given.weight, given.parameters("float32")))


@both_forms
@every_arithmetic
@pytest.mark.usefixtures("small_chunks")
def test_hard_assignment(covariance_type: str, dtype: str, arithmetic: str) -> None:
    given = make(covariance_type, dtype, "direct", TWO_CHUNKS, 3, 5)
    assert_right_when_hard(given, arithmetic, one_pass(run, given.x, given.weight, given.parameters(arithmetic), True))


@both_forms
def test_one_component_takes_everything(covariance_type: str) -> None:
    given = make(covariance_type, "float32", "direct", 50, 2, 1)
    soft, hard = (one_pass(run, given.x, None, given.parameters("float32"), hard) for hard in (False, True))
    assert soft.responsibilities is not None
    assert (soft.responsibilities == 1).all()
    soft.assert_same_bits(hard)


@both_forms
@pytest.mark.parametrize("hard", [False, True])
def test_component_of_weight_zero_takes_nothing(covariance_type: str, hard: bool) -> None:
    some = make(covariance_type, "float32", "direct", 50, 2, 3)
    mixture = Gaussians(np.array([0.4, 0.0, 0.6]), some.mixture.means, some.mixture.covariances, covariance_type)
    found = one_pass(run, some.x, None, Problem(some.x, mixture, "direct").parameters("float32"), hard)
    assert found.responsibilities is not None
    assert found.statistics is not None
    assert (found.responsibilities[:, 1] == 0).all()
    assert (found.statistics[1] == 0).all()
    assert np.isfinite(found.total).all()


@both_forms
@every_arithmetic
@pytest.mark.usefixtures("small_chunks")
def test_row_of_weight_zero_is_absent(covariance_type: str, dtype: str, arithmetic: str) -> None:
    """Even if it holds the largest number there is: every bit of S is that of a harmless row."""
    given = make(covariance_type, dtype, "direct", TWO_CHUNKS, 2, 3)
    absurd = given.x.copy()
    absurd[given.weight == 0] = np.finfo(dtype).max * np.array([0.5, -0.5])
    parameters = given.parameters(arithmetic)
    expected, found = (one_pass(run, x, given.weight, parameters, wanted="statistics") for x in (given.x, absurd))
    found.assert_same_bits(expected)


@both_forms
def test_transposed_rows(covariance_type: str) -> None:
    given = make(covariance_type, "float32", "direct", 70, 3, 2)
    parameters = given.parameters("float32")
    with current_device() as place:
        x = torch.from_numpy(given.x).to(place).T.contiguous().T
    one_pass(run, x, given.weight, parameters).assert_same_bits(one_pass(run, given.x, given.weight, parameters))


@both_forms
@pytest.mark.usefixtures("small_chunks")
def test_results_do_not_depend_on_what_else_is_wanted(covariance_type: str) -> None:
    given = make(covariance_type, "float32", "direct", TWO_CHUNKS, 2, 3)
    parameters = given.parameters("float32")
    everything = one_pass(run, given.x, given.weight, parameters)
    for wanted in ("log_prob", "responsibilities", "statistics"):
        one_pass(run, given.x, given.weight, parameters, wanted=wanted).assert_same_bits(everything)


@both_forms
@pytest.mark.usefixtures("small_chunks")
def test_statistics_are_added_to(covariance_type: str) -> None:
    given = make(covariance_type, "float64", "direct", TWO_CHUNKS, 2, 3)
    parameters = given.parameters("float64")
    fresh, added = (one_pass(run, given.x, None, parameters, start=start) for start in (0.0, 1000.0))
    assert fresh.statistics is not None
    assert fresh.total is not None
    np.testing.assert_allclose(added.statistics, fresh.statistics + 1000, rtol=1e-12)
    np.testing.assert_allclose(added.total, fresh.total + 1000, rtol=1e-12)
