"""Packed parameters by the fused kernel, against the long-double oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from emalgam_kernels.numba_cuda import crossover, device, fused
from emalgam_kernels.numba_cuda.fused import BLOCKS_PER_MULTIPROCESSOR, ROWS_OF_A_TILE, Plan, plan, run
from emalgam_kernels.numba_cuda.mixture import suits_fused
from emalgam_kernels.parameters import statistic_count
from tests.conftest import COVARIANCE_TYPES
from tests.cuda.passes import (
    assert_right,
    current_device,
    make,
    one_pass,
)
from tests.kernels.problems import assert_within

SIZES = {
    "one row": (1, 3, 4),
    "one feature": (40, 1, 3),
    "one component": (40, 3, 1),
    "a tile": (ROWS_OF_A_TILE[0], 2, 3),
    "a tile and a row": (ROWS_OF_A_TILE[0] + 1, 2, 3),
    "many components": (20, 2, 45),
    "more components than threads": (20, 1, 70),
}

ON_THE_DEVICES = (163 * 1024, 227 * 1024)  # shared memory of a block: A100; H100, H200, B200

every_covariance_type = pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)


def plan_here(D: int, K: int, F: int, arithmetic: str) -> Plan:
    """The plan of a problem without a whitening that fits the device of the tests."""
    way = plan(D, K, F, arithmetic, False, device.most_shared_bytes(device.default_device()))
    assert way is not None
    return way


# ---- against the oracle


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_sizes(covariance_type: str, size: str) -> None:
    given = make(covariance_type, "float32", "packed", *SIZES[size])
    assert_right(given, "float32", one_pass(run, given.x, given.weight, given.parameters("float32")))


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.usefixtures("small")
def test_several_tasks_of_a_thread(arithmetic: str, most: int) -> None:
    """Some threads have one task more than others; some blocks have several tiles."""
    D = 3 if device.SIMULATED else 8
    F = statistic_count("full", D)
    K = 4 * ((most - 1) * fused.MORE_THREADS // -(-F // 4)) + 5
    way = plan_here(D, K, F, arithmetic)
    tasks = -(-K // 4) * -(-F // 4)
    assert (most - 1) * way.threads < tasks < most * way.threads
    assert way.tasks_of_a_thread == fused.MOST_TASKS
    given = make("full", arithmetic, "packed", way.blocks * way.tile.T + 3, D, K)
    assert_right(given, arithmetic, one_pass(run, given.x, given.weight, given.parameters(arithmetic)))


@pytest.mark.parametrize("K", [3, 15])
def test_columns_in_slices_and_whole(K: int) -> None:
    """With few statistics several threads share a task, each with some of the tile's columns."""
    assert plan_here(3, K, statistic_count("diag", 3), "float32").tile.slices > 1
    given = make("diag", "float32", "packed", 70, 3, K)
    assert_right(given, "float32", one_pass(run, given.x, given.weight, given.parameters("float32")))


@pytest.mark.parametrize("rows", [16, 32])
def test_threads_of_a_column(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A column of the log-sum-exp may have one thread or several."""
    monkeypatch.setattr(fused, "ROWS_OF_A_TILE", (rows,))
    plan.cache_clear()
    try:
        given = make("full", "float64", "packed", 70, 2, 7)
        assert_right(given, "float64", one_pass(run, given.x, given.weight, given.parameters("float64")))
    finally:
        plan.cache_clear()


@pytest.mark.usefixtures("small")
def test_float32_statistics_of_many_tiles_keep_their_digits() -> None:
    """Every row the same: a running float32 sum over the tiles would lose digits, pairs of them do not."""
    rows = 40 if device.SIMULATED else 2000
    given = make("diag", "float32", "packed", 1, 2, 1)
    parameters = given.parameters("float32")
    N = rows * ROWS_OF_A_TILE[0]
    with current_device() as place:
        x = torch.from_numpy(given.x).to(place).expand(N, 2)
    found = one_pass(run, x, None, parameters, wanted="statistics")
    one = one_pass(run, given.x, None, parameters, wanted="statistics")
    assert found.statistics is not None
    assert one.statistics is not None
    rounding = 2.0**-23 * np.log2(ROWS_OF_A_TILE[0])  # within a tile
    assert_within(found.statistics, N * one.statistics, N * rounding * np.abs(one.statistics), "S")
    assert found.statistics[0, -1] == N


# ---- plans


@every_covariance_type
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("most_bytes", [device.SHARED_BYTES, 99 * 1024, *ON_THE_DEVICES])
def test_plans_stay_within_the_device(covariance_type: str, arithmetic: str, most_bytes: int) -> None:
    feature_map = "spherical" if covariance_type == "tied" else covariance_type
    found = 0
    for D in range(1, 120, 3):
        for K in (1, 2, 5, 16, 33, 64, 100, 300):
            F = statistic_count(feature_map, D)
            way = plan(D, K, F, arithmetic, covariance_type == "tied", most_bytes)
            if way is None:
                continue
            found += 1
            assert way.shared_bytes <= most_bytes
            assert way.tile.T <= way.threads <= fused.MORE_THREADS
            tasks = -(-K // 4) * -(-F // 4)
            assert tasks <= way.tasks_of_a_thread * way.threads
            assert way.tile.slices == 1 or way.tile.slices * tasks <= way.threads
            assert way.tile.slices <= way.tile.T // 4
            assert 1 <= way.blocks <= BLOCKS_PER_MULTIPROCESSOR
            if way.shared_bytes > device.SHARED_BYTES:
                assert way.blocks * (way.shared_bytes + 1024) <= most_bytes + 1024
    assert found > 10


@pytest.mark.parametrize("most_bytes", [99 * 1024, *ON_THE_DEVICES])
def test_more_shared_memory_leaves_small_problems_as_they_are(most_bytes: int) -> None:
    """But for the blocks that it has room for."""
    for arithmetic in ("float32", "float64"):
        for D, K in ((2, 3), (8, 16), (4, 64)):
            of = D, K, statistic_count("full", D), arithmetic, False
            least, more = plan(*of, device.SHARED_BYTES), plan(*of, most_bytes)
            assert least is not None
            assert more is not None
            assert replace(more, blocks=least.blocks) == least


def test_blocks_that_registers_or_shared_memory_leave_room_for() -> None:
    """No plan counts on four where two run at once."""
    for arithmetic, K, blocks in (("float32", 3, 2), ("float64", 3, 1)):
        F = statistic_count("full", 2)
        assert fused._fused(arithmetic, arithmetic, 1).resident_blocks(fused.MORE_THREADS, 0) == blocks
        way = plan(2, K, F, arithmetic, False, ON_THE_DEVICES[0])
        assert way is not None
        assert way.blocks == min(blocks * fused.MORE_THREADS // way.threads, BLOCKS_PER_MULTIPROCESSOR)
        tight = plan(2, K, F, arithmetic, False, way.shared_bytes)
        assert tight is not None
        assert tight.blocks == 1


def test_which_way_is_taken_while_none_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task of a thread: fused; three, which leave room for one block: products. A measured table overrides that."""
    place = device.default_device()
    monkeypatch.setattr(crossover, "table", lambda: {"float32": [], "float64": []})
    D, F = 62, 64
    few, many = 4, fused.MORE_THREADS // 4  # components: the tasks of all threads are 4 × 4 of their statistics
    for arithmetic in ("float32", "float64"):
        ways = [plan_here(D, K, F, arithmetic) for K in (few, many, 2 * many)]
        assert [way.tasks_of_a_thread for way in ways] == [1, 1, fused.MOST_TASKS]
        assert [suits_fused(D, K, F, arithmetic, False, place) for K in (few, many, 2 * many)] == [True, True, False]
    monkeypatch.setattr(crossover, "table", lambda: {"float32": [[F, 2 * many]], "float64": [[0, 0]]})
    assert suits_fused(D, 2 * many, F, "float32", False, place)
    assert not suits_fused(D, few, F, "float64", False, place)
    assert not suits_fused(D, 4 * many, F, "float32", False, place)


@pytest.mark.skipif(device.SIMULATED, reason="the simulator is too slow for blocks of 256 threads")
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("covariance_type", ["full", "spherical"])
def test_more_shared_memory_than_every_launch_may_ask_for(covariance_type: str, arithmetic: str) -> None:
    """And a launch that asks for less does not take it away again."""
    D = 12 if covariance_type == "full" else 96
    given, less = (make(covariance_type, arithmetic, "packed", 150, D, K) for K in (100, 80))
    F = statistic_count(covariance_type, D)
    assert plan_here(D, 100, F, arithmetic).shared_bytes > plan_here(D, 80, F, arithmetic).shared_bytes
    assert plan_here(D, 80, F, arithmetic).shared_bytes > device.SHARED_BYTES
    first = one_pass(run, given.x, given.weight, given.parameters(arithmetic))
    assert_right(given, arithmetic, first)
    assert_right(less, arithmetic, one_pass(run, less.x, less.weight, less.parameters(arithmetic)))
    first.assert_same_bits(one_pass(run, given.x, given.weight, given.parameters(arithmetic)))


def test_what_does_not_fit() -> None:
    assert plan(2, 100_000, 6, "float32", False, ON_THE_DEVICES[-1]) is None
    assert plan(200, 2, statistic_count("full", 200), "float32", False, ON_THE_DEVICES[-1]) is None
    given = make("full", "float32", "packed", 3, 90, 2)
    with pytest.raises(ValueError, match="D = 90, K = 2, F = 4186 do not fit the fused kernel"):
        one_pass(run, given.x, None, given.parameters("float32"))
