"""The plain torch EM that the GPU's benchmark compares with computes what emalgam computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emalgam_kernels
from bench.torch_em import FEATURES, Plan, TorchEm, tune
from emalgam_kernels import Packed, statistic_count

N, D, K = 300, 3, 4


def problem(feature_map: str, whitened: bool, dtype: str) -> tuple[np.ndarray, Packed]:
    """Data off the origin, and K log-densities that are concave, in a frame that moves and scales the data."""
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(N, D)) * 2 + 5).astype(dtype)
    natural = rng.normal(size=(K, statistic_count(feature_map, D)))
    squares = {"full": [0, 2, 5], "diag": [0, 1, 2], "spherical": [0]}[feature_map]
    natural[:, squares] = -2 - rng.uniform(size=(K, len(squares)))
    whitening = np.triu(rng.normal(size=(D, D))) if whitened else None
    return x, Packed(feature_map, np.full(D, 5.0), np.full(D, 0.5), whitening, natural)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("feature_map", "whitened", "features"),
    [
        *(("full", False, features) for features in FEATURES),
        ("diag", False, "torch"),
        ("spherical", False, "torch"),
        ("spherical", True, "torch"),
    ],
)
@pytest.mark.parametrize(("rows", "parts"), [(64, 1), (64, 4), (1024, 1), (300, 3)])
def test_statistics_of_a_pass(
    feature_map: str, whitened: bool, features: str, rows: int, parts: int, dtype: str
) -> None:
    x, parameters = problem(feature_map, whitened, dtype)
    expected = np.empty(parameters.natural.shape)
    total = emalgam_kernels.load("reference").em_statistics(x, None, parameters, expected)
    em = TorchEm(torch.from_numpy(x), parameters, Plan(features, rows, parts))
    for _ in range(2):  # nothing is left over from one pass to the next
        statistics, log_p = em.statistics(parameters)
    tolerance = {"float64": 1e-12, "float32": 1e-4}[dtype]
    np.testing.assert_allclose(statistics.numpy(), expected, rtol=tolerance, atol=tolerance * N)
    assert float(log_p) == pytest.approx(total, rel=tolerance)
    assert statistics.dtype == log_p.dtype == torch.float64


def test_tuning_takes_the_fastest() -> None:
    x, parameters = problem("full", False, "float64")
    seconds = iter([3.0, 2.0, 1.0, 0.5, 4.0])
    plan = tune(torch.from_numpy(x), parameters, lambda _: next(seconds))
    assert plan == Plan(FEATURES[2], 4096, 4)
