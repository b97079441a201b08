"""The compiled kernels on every SIMD level that this processor has, and inside the memory that they asked for."""

from __future__ import annotations

import os
from dataclasses import fields
from types import ModuleType

import numpy as np
import pytest

from emalgam_kernels import Packed, load
from emalgam_kernels.batch import Mixtures, Outcomes, Problems, Settings, Status
from tests.conftest import COVARIANCE_TYPES, Variant, variants
from tests.kernels import test_mixture
from tests.kernels.problems import SIZES, problem
from tests.kernels.test_blocks import assert_workspace_is_large_enough
from tests.processes import output_of, python

LEVELS = {"v4": "x86-64-v4 (AVX-512)", "v3": "x86-64-v3 (AVX2)", "baseline": "x86-64 (SSE2)"}
compiled_variants = pytest.mark.parametrize("variant", variants(backends=("cython_cpu",)), indirect=True, ids=str)
lower_levels = pytest.mark.parametrize("simd_level", ["v3", "baseline"], indirect=True)


@lower_levels
@compiled_variants
@pytest.mark.parametrize("size", [size for size in SIZES if size != "a block and a row"])
def test_lower_levels_against_the_oracle(simd_level: str, variant: Variant, size: str) -> None:
    test_mixture.test_log_prob(variant, size)
    test_mixture.test_responsibilities(variant, size)
    test_mixture.test_em_statistics(variant, size)


@pytest.mark.parametrize("simd_level", LEVELS, indirect=True)
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("D", [1, 2, 3, 7, 8, 9, 16, 19])
def test_rows_are_loaded_to_the_bits_of_columns(
    cython_cpu: ModuleType, simd_level: str, D: int, dtype: str, arithmetic: str
) -> None:
    """Features side by side are read as vectors and transposed, whatever D is; others one by one."""
    rng, N, F = np.random.default_rng(0), 45, 2 * D + 1
    wide = rng.normal(size=(2 * N, D + 3)).astype(dtype)
    rows = wide[::2, 1 : D + 1]
    shift, scale = np.arange(D) * 0.3, 2.0 ** -np.arange(D)
    for d in range(D):
        natural = np.zeros((1, F))
        natural[0, D + d] = 1.0  # log p is z_d
        packed = Packed("diag", shift, scale, None, natural, arithmetic)
        found = np.empty((3, N))
        for out, x in zip(found, (rows, np.ascontiguousarray(rows), np.asfortranarray(rows)), strict=True):
            cython_cpu.log_prob(x, packed, out)
        expected = ((rows[:, d].astype(np.float64) - shift[d]) * scale[d]).astype(arithmetic)
        np.testing.assert_array_equal(found, np.tile(expected, (3, 1)))


@pytest.mark.usefixtures("cython_cpu")
@pytest.mark.parametrize("simd_level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("D", [8, 9, 19])
def test_rows_in_an_order_are_loaded_to_the_bits_of_rows_in_theirs(simd_level: str, D: int, dtype: str) -> None:
    """Whole vectors of rows, and a rest, of more than one problem; what a row without weight holds is no matter."""
    rng, sizes = np.random.default_rng(D), [45, 17, 130]
    N, numbers = sum(sizes), np.arange(len(sizes), dtype=np.uint64)
    x = (rng.normal(size=(N, D)) + 5 * rng.integers(0, 2, (N, 1))).astype(dtype)
    weight, order = np.arange(N) % 5 * 0.5, rng.permutation(N)
    x[weight == 0] = np.nan
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    shuffled = fitted(Problems(x, offsets, order, weight, numbers))
    in_order = fitted(Problems(x[order], offsets, None, weight[order], numbers))
    assert set(in_order["status"]) <= {Status.FINE, Status.NOT_CONVERGED}
    for name, expected in in_order.items():
        np.testing.assert_array_equal(shuffled[name], expected, err_msg=name)


def fitted(problems: Problems) -> dict[str, np.ndarray]:
    """The mixtures of two components and the outcomes, by their names."""
    B, counts = len(problems), np.full(len(problems), 2)
    mixtures, outcomes = Mixtures.empty("diag", B, 2, problems.n_features), Outcomes.empty(B)
    load("cython_cpu", "batch").fit_many(problems, Settings("diag", counts, counts), mixtures, outcomes)
    arrays = {"weights": mixtures.weights, "means": mixtures.means, "covariances": mixtures.covariances}
    return arrays | {field.name: getattr(outcomes, field.name) for field in fields(outcomes)}


@lower_levels
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_lower_levels_assign_as_the_oracle_does(simd_level: str, covariance_type: str, arithmetic: str) -> None:
    variant = Variant("cython_cpu", "float32", covariance_type, "packed", arithmetic)
    test_mixture.test_statistics_of_hard_assignment(variant, "odd sizes")


@pytest.mark.parametrize("wanted", LEVELS)
def test_level_is_at_most_the_wanted_one(cython_cpu: ModuleType, wanted: str) -> None:
    before = cython_cpu.simd_level()
    try:
        found = cython_cpu.select_simd_level(wanted)
        assert found == cython_cpu.simd_level()
        names = [*LEVELS.values(), "128-bit vectors"]
        assert names.index(found) >= names.index(LEVELS[wanted])
        assert (cython_cpu.tile_step() % 16, cython_cpu.tile_step_float32()) == (0, 2 * cython_cpu.tile_step())
    finally:
        cython_cpu.select_simd_level(os.environ.get("EMALGAM_SIMD"))
    assert cython_cpu.simd_level() == before


def test_unknown_level_is_an_error(cython_cpu: ModuleType) -> None:
    before = cython_cpu.simd_level()
    with pytest.raises(ValueError, match=r"SIMD level is 'sse9'; expected v4, v3 or baseline \(EMALGAM_SIMD\)"):
        cython_cpu.select_simd_level("sse9")
    assert cython_cpu.simd_level() == before


@pytest.mark.usefixtures("cython_cpu")
def test_environment_selects_the_level() -> None:
    program = "from emalgam_kernels.cython_cpu import mixture; print(mixture.simd_level())"
    assert output_of(program, {"EMALGAM_SIMD": "baseline"}) in ("x86-64 (SSE2)", "128-bit vectors")
    finished = python("-c", program, environment={"EMALGAM_SIMD": "avx"})
    assert finished.returncode != 0
    assert "SIMD level is 'avx'; expected v4, v3 or baseline (EMALGAM_SIMD)" in finished.stderr


@lower_levels
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_workspace_is_large_enough(
    simd_level: str, cython_cpu: ModuleType, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alignment of rows depends on the level."""
    assert_workspace_is_large_enough(cython_cpu, arithmetic, monkeypatch)


def test_levels_agree_to_rounding(cython_cpu: ModuleType) -> None:
    """Each level has register blocks of its own, so the bits may differ; more than rounding may not."""
    given = problem("full", "float64", "packed", "features in pieces")
    parameters, found = given.parameters("float64"), {}
    try:
        for level in LEVELS:
            cython_cpu.select_simd_level(level)
            found[level] = np.empty(len(given.x))
            cython_cpu.log_prob(given.x, parameters, found[level])
    finally:
        cython_cpu.select_simd_level(os.environ.get("EMALGAM_SIMD"))
    for level in LEVELS:
        np.testing.assert_allclose(found[level], found["baseline"], rtol=1e-12)
