"""What every way to compute a pass has to do: the fused kernel, matrix products, and the direct form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from emalgam_kernels import Packed
from tests.conftest import COVARIANCE_TYPES
from tests.cuda.passes import (
    ARITHMETICS,
    WAYS,
    Way,
    assert_right,
    assert_right_when_hard,
    current_device,
    make,
    one_pass,
)
from tests.kernels.problems import Problem, assert_within
from tests.oracles import Gaussians
from tests.tolerances import tolerance

every_arithmetic = pytest.mark.parametrize(("dtype", "arithmetic"), ARITHMETICS)
both_forms = pytest.mark.parametrize("covariance_type", ["full", "diag"])
several = pytest.mark.usefixtures("small")
packed_ways = pytest.mark.parametrize("way", ["fused", "products"], indirect=True)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


# ---- against the oracle


@several
@every_arithmetic
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_several_tiles_or_chunks(way: Way, covariance_type: str, dtype: str, arithmetic: str) -> None:
    given = make(covariance_type, dtype, way.algorithm, way.rows, 3, 5)
    assert_right(given, arithmetic, one_pass(way.run, given.x, given.weight, given.parameters(arithmetic)))


@several
@every_arithmetic
@both_forms
def test_hard_assignment(way: Way, covariance_type: str, dtype: str, arithmetic: str) -> None:
    given = make(covariance_type, dtype, way.algorithm, way.fewer, 3, 5)
    found = one_pass(way.run, given.x, given.weight, given.parameters(arithmetic), True)
    assert_right_when_hard(given, arithmetic, found)


@packed_ways
@pytest.mark.parametrize("K", [3, 20])
def test_first_of_equals_takes_the_row(way: Way, K: int) -> None:
    """K − 1 equal ones behind one that never wins: most threads of a row would miss the first of them."""
    given = make("diag", "float32", "packed", 10, 2, K)
    parameters = given.parameters("float32")
    assert isinstance(parameters, Packed)
    parameters.natural[1:] = parameters.natural[1]
    parameters.natural[0] = 0
    parameters.natural[0, -1] = -np.inf
    found = one_pass(way.run, given.x, None, parameters, hard=True, wanted="responsibilities statistics")
    assert found.responsibilities is not None
    np.testing.assert_array_equal(found.responsibilities, np.tile(np.arange(K) == 1, (10, 1)))


@packed_ways
@pytest.mark.parametrize("hard", [False, True])
def test_component_of_weight_zero_takes_nothing(way: Way, hard: bool) -> None:
    some = make("full", "float32", "packed", 50, 2, 3)
    mixture = Gaussians(np.array([0.4, 0.0, 0.6]), some.mixture.means, some.mixture.covariances, "full")
    given = Problem(some.x, mixture, "packed")
    found = one_pass(way.run, given.x, None, given.parameters("float32"), hard)
    assert found.log_prob is not None
    assert found.responsibilities is not None
    assert found.statistics is not None
    assert (found.responsibilities[:, 1] == 0).all()
    assert (found.statistics[1] == 0).all()
    if not hard:
        scale = np.delete(given.logit_scale, 1, axis=1).max(axis=1) + np.abs(given.log_prob)
        limit = tolerance("packed log_prob", "float32") * scale
        assert_within(found.log_prob, given.log_prob, limit, "log p(x_n)")


@both_forms
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_one_component_takes_everything(way: Way, covariance_type: str, arithmetic: str) -> None:
    given = make(covariance_type, arithmetic, way.algorithm, 50, 2, 1)
    soft, hard = (one_pass(way.run, given.x, None, given.parameters(arithmetic), hard) for hard in (False, True))
    assert soft.responsibilities is not None
    assert (soft.responsibilities == 1).all()
    soft.assert_same_bits(hard)


# ---- weights


@several
@every_arithmetic
@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag"])
def test_row_of_weight_zero_is_absent(way: Way, covariance_type: str, dtype: str, arithmetic: str) -> None:
    """Even if it holds the largest number there is: every bit of S is that of a harmless row."""
    given = make(covariance_type, dtype, way.algorithm, way.fewer, 2, 3)
    absurd = given.x.copy()
    absurd[given.weight == 0] = np.finfo(dtype).max * np.array([0.5, -0.5])
    parameters = given.parameters(arithmetic)
    expected, found = (one_pass(way.run, x, given.weight, parameters, wanted="statistics") for x in (given.x, absurd))
    found.assert_same_bits(expected)


def test_no_weights_are_ones(way: Way) -> None:
    given = make("diag", "float32", way.algorithm, 70, 2, 3)
    parameters = given.parameters("float32")
    without, ones = (one_pass(way.run, given.x, weight, parameters) for weight in (None, np.ones(70)))
    without.assert_same_bits(ones)


def test_all_weights_zero(way: Way) -> None:
    given = make("full", "float64", way.algorithm, 30, 2, 3)
    found = one_pass(way.run, given.x, np.zeros(30), given.parameters("float64"), wanted="statistics")
    assert found.statistics is not None
    assert (found.statistics == 0).all()
    assert found.total == 0


def test_no_rows(way: Way) -> None:
    given = make("full", "float64", way.algorithm, 10, 2, 3)
    found = one_pass(way.run, given.x[:0], None, given.parameters("float64"))
    assert found.statistics is not None
    assert (found.statistics == 0).all()
    assert found.total == 0


# ---- layouts of x, and which results are wanted


def sliced(x: torch.Tensor) -> torch.Tensor:
    larger = torch.full((2 * x.shape[0] + 1, 3 * x.shape[1]), -99, dtype=x.dtype, device=x.device)
    view = larger[1::2, ::3]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": sliced,
    "sliced and transposed": lambda x: sliced(x.T.contiguous()).T,
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one number for a row": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(70, 3), (20, 35)])
def test_layout_of_rows(way: Way, layout: str, shape: tuple[int, int]) -> None:
    given = make("spherical", "float32", way.algorithm, *shape, 2)
    parameters = given.parameters("float32")
    with current_device() as place:
        x = LAYOUTS[layout](torch.from_numpy(given.x).to(place))
        plain = x.contiguous()
    one_pass(way.run, x, given.weight, parameters).assert_same_bits(one_pass(way.run, plain, given.weight, parameters))


@several
@both_forms
def test_results_do_not_depend_on_what_else_is_wanted(way: Way, covariance_type: str) -> None:
    given = make(covariance_type, "float32", way.algorithm, way.fewer, 2, 3)
    parameters = given.parameters("float32")
    everything = one_pass(way.run, given.x, given.weight, parameters)
    for wanted in ("log_prob", "responsibilities", "statistics"):
        one_pass(way.run, given.x, given.weight, parameters, wanted=wanted).assert_same_bits(everything)


@several
@both_forms
def test_statistics_are_added_to(way: Way, covariance_type: str) -> None:
    given = make(covariance_type, "float64", way.algorithm, way.fewer, 2, 3)
    parameters = given.parameters("float64")
    fresh, added = (one_pass(way.run, given.x, None, parameters, start=start) for start in (0.0, 1000.0))
    assert fresh.statistics is not None
    assert fresh.total is not None
    np.testing.assert_allclose(added.statistics, fresh.statistics + 1000, rtol=1e-12)
    np.testing.assert_allclose(added.total, fresh.total + 1000, rtol=1e-12)


@several
def test_same_bits_twice(way: Way) -> None:
    given = make("full", "float32", way.algorithm, way.fewer, 3, 20)
    first, second = (one_pass(way.run, given.x, given.weight, given.parameters("float32")) for _ in range(2))
    first.assert_same_bits(second)
