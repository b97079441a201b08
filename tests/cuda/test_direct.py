"""The direct form on the device, against the long-double oracle."""

from __future__ import annotations

import numpy as np
import pytest

from emalgam_kernels.numba_cuda.direct import run
from tests.cuda.passes import (
    assert_right,
    make,
    one_pass,
)
from tests.kernels.problems import Problem
from tests.oracles import Gaussians

SIZES = {
    "one row": (1, 3, 4),
    "one feature": (40, 1, 3),
    "one component": (40, 3, 1),
    "several lanes": (30, 2, 19),
    "two panels": (20, 35, 2),
}

both_forms = pytest.mark.parametrize("covariance_type", ["full", "diag"])


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
