"""Every backend has the reference's kernels: names, parameters, defaults, annotations; and behaves as they say."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest

import emalgam_kernels
from emalgam_kernels import FILES, HOMES, Direct, Packed, statistic_count
from tests.conftest import CPU_BACKENDS, need
from tests.kernels.problems import SIZES, problem


def test_required_backend_is_here(required_backend: str) -> None:
    need(required_backend)
    assert emalgam_kernels.probe(required_backend) is None
    assert emalgam_kernels.load(required_backend).__name__ == f"emalgam_kernels.{required_backend}.mixture"


def test_every_cpu_backend_is_tested() -> None:
    assert set(CPU_BACKENDS) | {"numba_cuda"} == set(emalgam_kernels.BACKENDS)


def kernel_of(backend: str, kernel: str) -> Callable[..., object]:
    """A kernel of a backend."""
    found: Callable[..., object] = getattr(emalgam_kernels.load(backend, HOMES[kernel]), kernel)
    return found


@pytest.mark.parametrize("kernel", HOMES)
def test_signature_is_that_of_the_reference(backend: str, kernel: str) -> None:
    specified = inspect.signature(kernel_of("reference", kernel))
    found = inspect.signature(kernel_of(backend, kernel))
    assert list(found.parameters) == list(specified.parameters), f"{backend}.{kernel}: names or order differ"
    for name, parameter in specified.parameters.items():
        assert found.parameters[name].kind == parameter.kind, f"{backend}.{kernel}({name}): kind"
        assert found.parameters[name].default == parameter.default, f"{backend}.{kernel}({name}): default"
        assert found.parameters[name].annotation == parameter.annotation, f"{backend}.{kernel}({name}): annotation"
    assert found.return_annotation == specified.return_annotation, f"{backend}.{kernel}: annotation of the result"


@pytest.mark.parametrize("kernel", HOMES)
def test_docstring_says_or_points_to_the_specification(backend: str, kernel: str) -> None:
    function = kernel_of(backend, kernel)
    text = inspect.getdoc(function) or ""
    if backend == "reference":
        names = inspect.signature(function).parameters
        assert [name for name in names if name not in text] == []
    else:
        assert f"emalgam_kernels.reference.{HOMES[kernel]}.{kernel}" in text


def test_out_is_written_in_place(backend: str) -> None:
    kernels, given = emalgam_kernels.load(backend), problem("full", "float64", "packed", "one feature")
    parameters, (N, K) = given.parameters("float64"), given.responsibilities.shape
    outs = {
        "log_prob": np.full(N, np.nan),
        "responsibilities": np.full((N, K), np.nan),
        "em_statistics": np.full((K, parameters.n_statistics), np.nan),
    }
    assert kernels.log_prob(given.x, parameters, outs["log_prob"]) is None
    assert kernels.responsibilities(given.x, parameters, outs["responsibilities"]) is None
    assert type(kernels.em_statistics(given.x, None, parameters, outs["em_statistics"])) is float
    assert {name: np.isfinite(out).all() for name, out in outs.items()} == dict.fromkeys(outs, True)


def test_statistics_replace_what_out_held(backend: str) -> None:
    kernels, given = emalgam_kernels.load(backend), problem("diag", "float64", "packed", "one feature")
    parameters = given.parameters("float64")
    first = np.zeros((parameters.n_components, parameters.n_statistics))
    second = np.full_like(first, 1e9)
    kernels.em_statistics(given.x, None, parameters, first)
    kernels.em_statistics(given.x, None, parameters, second)
    np.testing.assert_array_equal(first, second)


def test_arguments_may_be_given_by_name(backend: str) -> None:
    kernels, given = emalgam_kernels.load(backend), problem("diag", "float64", "packed", "one row")
    parameters = given.parameters("float64")
    statistics = np.empty((parameters.n_components, parameters.n_statistics))
    weight = np.ones(1)
    kernels.em_statistics(
        x=given.x, sample_weight=weight, parameters=parameters, out=statistics, hard=True, n_threads=2
    )
    kernels.log_prob(x=given.x, parameters=parameters, out=np.empty(1), n_threads=2)
    kernels.responsibilities(x=given.x, parameters=parameters, out=np.empty((1, 4)), n_threads=2)


@pytest.mark.parametrize("kernel", FILES["mixture"])
def test_no_rows(backend: str, kernel: str) -> None:
    kernels, given = emalgam_kernels.load(backend), problem("full", "float64", "packed", "one feature")
    parameters, x = given.parameters("float64"), np.empty((0, 1))
    statistics = np.ones((parameters.n_components, parameters.n_statistics))
    if kernel == "em_statistics":
        assert kernels.em_statistics(x, None, parameters, statistics, n_threads=2) == 0.0
        assert not statistics.any()
    else:
        shape = (0,) if kernel == "log_prob" else (0, parameters.n_components)
        assert getattr(kernels, kernel)(x, parameters, np.empty(shape), n_threads=2) is None


def test_counts_of_parameters() -> None:
    packed = problem("full", "float64", "packed", "odd sizes").parameters("float64")
    direct = problem("spherical", "float64", "direct", "odd sizes").parameters("float64")
    assert isinstance(packed, Packed)
    assert isinstance(direct, Direct)
    _, D, K = SIZES["odd sizes"]
    assert (packed.n_components, packed.n_statistics) == (K, statistic_count("full", D)) == (K, 10)
    assert (direct.n_components, direct.n_statistics) == (K, statistic_count("diag", D)) == (K, 7)
