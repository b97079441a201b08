"""Workers in processes of their own: one that dies, what moves between them, and the command line."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import LocalCluster

import emalgam
from emalgam import cli, distributed
from emalgam import parts as in_parts
from tests.dask.test_distributed import assert_close, assert_same_bits, rows, weights
from tests.test_cli import run_json


def reading(block: np.ndarray, death: Path) -> np.ndarray:
    """The block; whoever reads one while there is a file `death` takes it along and dies."""
    try:
        death.unlink()
    except FileNotFoundError:
        return block
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


def test_a_worker_that_dies_in_a_pass_costs_no_bit(processes: Any, tmp_path: Path) -> None:
    death = tmp_path / "death"
    x = da.from_array(rows(), chunks=(300, 3)).map_blocks(reading, death, dtype=float, meta=np.empty((0, 0)))
    how: dict[str, Any] = {"random_state": 0, "client": processes, "tol": 0.0, "max_iter": 6}
    with pytest.warns(emalgam.ConvergenceWarning):
        undisturbed = distributed.fit(x, 4, **how)
    before = set(processes.run(os.getpid).values())

    def kill(step: emalgam.Iteration) -> None:
        if step.iteration == 3:
            death.touch()

    with pytest.warns(emalgam.ConvergenceWarning):
        disturbed = distributed.fit(x, 4, callback=kill, **how)
    assert not death.exists()
    processes.wait_for_workers(2, timeout=60)
    assert len(before - set(processes.run(os.getpid).values())) == 1
    assert_same_bits(disturbed, undisturbed)


def test_persisted_partitions_of_a_worker_that_dies_are_made_again(processes: Any) -> None:
    processes.wait_for_workers(2, timeout=60)
    x = processes.persist(da.from_array(rows(), chunks=(300, 3)))
    how: dict[str, Any] = {"random_state": 0, "client": processes, "tol": 0.0, "max_iter": 5}
    with pytest.warns(emalgam.ConvergenceWarning):
        undisturbed = distributed.fit(x, 4, **how)

    def kill(step: emalgam.Iteration) -> None:
        if step.iteration == 2:
            os.kill(next(iter(processes.run(os.getpid).values())), signal.SIGKILL)

    with pytest.warns(emalgam.ConvergenceWarning):
        disturbed = distributed.fit(x, 4, callback=kill, **how)
    assert_same_bits(disturbed, undisturbed)


def sent(client: Any) -> int:
    """Bytes that workers have given to each other and to clients."""
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


def test_rows_stay_where_they_lie(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_parts, "ELEMENTS_OF_A_SAMPLE", 0)
    monkeypatch.setattr(in_parts, "FEWEST_ROWS_OF_A_SAMPLE", 500)
    processes.wait_for_workers(2, timeout=60)
    x = processes.persist(da.random.default_rng(0).normal(size=(400_000, 4), chunks=(50_000, 4)))
    processes.compute(x.sum()).result()
    before = sent(processes)
    with pytest.warns(emalgam.ConvergenceWarning):
        distributed.fit(x, 3, random_state=0, client=processes, tol=0.0, max_iter=10)
    assert sent(processes) - before < 0.1 * x.nbytes  # of ten iterations, and the survey


# ---- the command line


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "x.parquet"
    columns = {f"x{d}": column for d, column in enumerate(rows().T)}
    pq.write_table(pa.table(columns | {"weight": weights()}), path, row_group_size=200)
    return path


def address(client: Any) -> str:
    return str(client.scheduler.address)


def test_fit_on_a_scheduler(processes: Any, table: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    arguments = ("-k", 4, "--max-iter", 500, "-o", model)
    report = run_json("fit", table, *arguments, "--dask", address(processes), "--weight-column", "weight", "--persist")
    expected = emalgam.fit(rows(), 4, sample_weight=weights(), random_state=0, max_iter=500)
    assert (report["n_samples"], report["n_features"], report["n_iter"]) == (1500, 3, expected.n_iter)
    assert "bic" not in report
    np.testing.assert_allclose(emalgam.load_model(model).means, expected.mixture.means, rtol=1e-9)


def test_criteria_of_a_folder(processes: Any, tmp_path: Path) -> None:
    x = rows()
    for number, part in enumerate(np.array_split(x, 3)):
        pq.write_table(pa.table({f"x{d}": part[:, d] for d in range(3)}), tmp_path / f"{number}.parquet")
    report = run_json("fit", tmp_path, "-k", 4, "--dask", address(processes))
    expected = emalgam.fit(x, 4, random_state=0)
    assert report["bic"] == pytest.approx(expected.mixture.bic(x), rel=1e-10)
    assert report["log_likelihood"] == pytest.approx(expected.mixture.log_prob(x).sum(), rel=1e-10)


def test_features_on_a_scheduler(processes: Any, table: Path) -> None:
    report = run_json("fit", table, "-k", 4, "--dask", address(processes), "--features", "x2, x0")
    expected = emalgam.fit(rows()[:, [2, 0]], 4, random_state=0)
    assert report["lower_bound"] == pytest.approx(expected.lower_bound, rel=1e-10)


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line on standard error of a command in this process, which has Dask loaded."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own

    def run(*arguments: object, status: int = 1) -> str:
        assert cli.main(list(map(str, arguments))) == status
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
        return told.err.removeprefix("error: ").rstrip("\n")

    return run


def test_errors_of_the_command_line(error_of: Callable[..., str], processes: Any, table: Path, tmp_path: Path) -> None:
    on = ("-k", 2, "--dask", address(processes))
    wanted = "x.npy: cannot be read on a cluster; expected a .parquet file, or a folder of them"
    assert error_of("fit", tmp_path / "x.npy", *on).endswith(wanted)
    assert "absent.parquet" in error_of("fit", tmp_path / "absent.parquet", *on)
    assert "has no column 'w'" in error_of("fit", table, *on, "--weight-column", "w")
    assert "--persist" in error_of("fit", table, "-k", 2, "--persist", status=2)


def test_no_scheduler_and_no_workers(error_of: Callable[..., str], table: Path) -> None:
    fit = ("fit", table, "-k", 2, "--dask")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        told = error_of(*fit, "tcp://127.0.0.1:1")
        assert told.startswith("there is no Dask scheduler at tcp://127.0.0.1:1 (Timed out trying to connect")
        assert told.endswith("start one with `dask scheduler`, or correct the address")
        assert "there is no Dask scheduler at nonsense" in error_of(*fit, "nonsense")
        with LocalCluster(n_workers=0, processes=False, protocol="tcp://", dashboard_address=":0") as cluster:
            told = error_of(*fit, cluster.scheduler_address)
            assert told.endswith(f"has no workers; start some with `dask worker {cluster.scheduler_address}`")


def test_a_scheduler_that_is_lost() -> None:
    with LocalCluster(n_workers=1, processes=False, protocol="tcp://", dashboard_address=":0") as cluster:
        lost = f"the Dask scheduler at {cluster.scheduler_address} was lost"

        def wait_in_vain() -> None:
            with distributed.connected(cluster.scheduler_address) as client:
                future = client.submit(time.sleep, 3)
                cluster.close()
                future.result()

        with pytest.raises(ValueError, match=lost):
            wait_in_vain()


def test_the_fit_of_processes_is_that_of_memory(processes: Any) -> None:
    x = da.from_array(rows(), chunks=(400, 3))
    assert_close(distributed.fit(x, 4, random_state=0, client=processes), emalgam.fit(rows(), 4, random_state=0))
