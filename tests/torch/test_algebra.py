"""The algebra of EM on tensors gives what it gives on NumPy arrays: one code, two libraries."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from emalgam.covariance import COVARIANCES, Covariance
from emalgam.guard import Cancellation, Evaluation, parameters_of
from emalgam.m_step import MStep
from emalgam.namespace import beside, cholesky, invert_triangular, to_host
from emalgam.observations import Observations
from emalgam.packing import Components, Frame, features
from tests.conftest import COVARIANCE_TYPES
from tests.samples import blobs

TENSOR = torch.zeros(1, dtype=torch.float64)
every_type = pytest.mark.parametrize(
    "covariance", [COVARIANCES[name] for name in COVARIANCE_TYPES], ids=COVARIANCE_TYPES
)
every_algorithm = pytest.mark.parametrize("algorithm", ["packed", "direct"])


def close(found: Any, expected: np.ndarray) -> None:
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(to_host(found), expected, rtol=1e-12, atol=1e-12)


def components_of(covariance: Covariance, K: int, D: int) -> Components:
    rng = np.random.default_rng(K * D)
    wide = rng.normal(size=(K, D, 3 * D))
    matrices = wide @ wide.swapaxes(1, 2) / (3 * D)
    shaped = {
        "full": matrices,
        "tied": matrices[0],
        "diag": rng.uniform(0.5, 2, (K, D)),
        "spherical": rng.uniform(0.5, 2, K),
    }[covariance.name]
    weights = np.append(rng.dirichlet(np.ones(K - 1)), 0.0)  # one component without weight
    return Components(weights, rng.normal(size=(K, D)), shaped, covariance.factor(shaped))


@every_type
@every_algorithm
def test_parameters_of_the_kernels(covariance: Covariance, algorithm: str) -> None:
    components, frame = components_of(covariance, 4, 3), Frame(np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 4.0]))
    there = Frame(beside(frame.shift, TENSOR), beside(frame.scale, TENSOR))
    how = Evaluation(algorithm, "float64", 0.0)
    expected = parameters_of(covariance, components, frame, how)
    found = parameters_of(covariance, components.beside(TENSOR), there, how)
    for field in dataclasses.fields(expected):
        value = getattr(expected, field.name)
        if isinstance(value, np.ndarray):
            close(getattr(found, field.name), value)
        else:
            assert getattr(found, field.name) == value


@every_type
def test_cancellation(covariance: Covariance) -> None:
    components = components_of(covariance, 4, 3)
    expected = Cancellation.of(covariance, components)
    packed, own = Cancellation.scalars(covariance, components.beside(TENSOR))
    close(packed(), np.array(expected.packed))
    close(own(), np.array(expected.own()))


@every_type
@every_algorithm
def test_m_step(covariance: Covariance, algorithm: str) -> None:
    """One M-step from the statistics of a pass; a component is empty."""
    x, _ = blobs(300)
    data = Observations.of(x, None, covariance, "reference", 1)
    old = components_of(covariance, 3, x.shape[1])
    statistics, _ = data.statistics(parameters_of(covariance, old, data.frame, Evaluation(algorithm, "float64", 0.0)))
    m_step = MStep(data, covariance, 3, "auto", "regularize", np.random.default_rng(0))
    moments = covariance.moments(statistics, old, algorithm)
    expected = m_step.update(moments, old, algorithm, 1, reseed=False)
    m_step.added_there = beside(m_step.added, TENSOR)
    m_step.scatter_there = None if data.scatter is None else beside(data.scatter, TENSOR)
    old_there = old.beside(TENSOR)
    moments_there = covariance.moments(beside(statistics, TENSOR), old_there, algorithm)
    found, sound = m_step.update_where_it_lies(moments_there, old_there, algorithm)
    assert bool(sound)
    for field in dataclasses.fields(Components):
        close(getattr(found, field.name), getattr(expected, field.name))
    for field in dataclasses.fields(Components):
        assert isinstance(getattr(found.on_host(), field.name), np.ndarray)


@every_type
def test_a_collapse_is_reported_and_does_not_raise(covariance: Covariance) -> None:
    """What makes the host raise leaves a tensor that is not finite, and `sound` says so."""
    x, _ = blobs(300)
    data = Observations.of(x, None, covariance, "reference", 1)
    old = components_of(covariance, 3, x.shape[1])
    statistics, _ = data.statistics(parameters_of(covariance, old, data.frame, Evaluation("packed", "float64", 0.0)))
    m_step = MStep(data, covariance, 3, 0.0, "regularize", np.random.default_rng(0))
    m_step.added_there = beside(m_step.added - 100.0, TENSOR)
    m_step.scatter_there = None if data.scatter is None else beside(data.scatter, TENSOR)
    moments = covariance.moments(beside(statistics, TENSOR), old.beside(TENSOR), "packed")
    _, sound = m_step.update_where_it_lies(moments, old.beside(TENSOR), "packed")
    assert not bool(sound)


@pytest.mark.parametrize("feature_map", ["full", "diag", "spherical"])
def test_features(feature_map: str) -> None:
    z = np.random.default_rng(0).normal(size=(5, 3))
    close(features(beside(z, TENSOR), feature_map), features(z, feature_map))


def test_triangular_inverse() -> None:
    lower = cholesky(components_of(COVARIANCES["full"], 4, 5).covariances)
    close(invert_triangular(beside(lower, TENSOR)), invert_triangular(lower))
    close(cholesky(beside(lower @ lower.swapaxes(1, 2), TENSOR)), lower)
