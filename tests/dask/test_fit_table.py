"""`emalgam fit-many --dask`: shards from workers give the bytes of a run without, interrupted or not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emalgam import distributed, fit_table
from emalgam.backends import resolve
from emalgam.fit_table import Job
from tests.dask.test_cluster import address
from tests.test_cli_many import GROUPS_OF_A_SHARD, B, disturbed, output, path, table, undisturbed

__all__ = ["output", "path", "table", "undisturbed"]  # fixtures


def on(client: Any) -> tuple[str, str]:
    return "--dask", address(client)


def job(path: Path, output: Path) -> Job:
    """That of the command line's `arguments`."""
    settings = {"covariance_type": "full", "criterion": "bic", "n_init": 1, "max_iter": 100, "tol": 1e-3}
    settings |= {"reg_covar": "auto", "random_state": 0, "backend": resolve("auto")}
    features = ("a", "b")
    return Job(
        table=path,
        output=output,
        by="sensor",
        features=features,
        weights=None,
        n_components=range(1, 3),
        settings=settings,
    )


def test_killed_runs_go_on_to_the_bytes_of_one_without_workers(
    processes: Any, path: Path, output: Path, undisturbed: tuple[bytes, int]
) -> None:
    processes.wait_for_workers(2, timeout=60)
    whole, touched = undisturbed
    parts = output.with_name(f"{output.name}.parts")
    assert disturbed("kill", touched // 2, path, output, *on(processes)).returncode == -signal.SIGKILL
    before = {part: part.stat().st_ino for part in parts.glob("[!.]*.parquet")}
    assert before
    done = disturbed("kill", 0, path, output, "--resume", "--json", *on(processes))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["n_groups"], report["resumed"] >= GROUPS_OF_A_SHARD * (len(before) - 1) > 0) == (B, True)
    assert output.read_bytes() == whole
    assert list(output.parent.iterdir()) == [output]


def test_a_worker_that_dies_costs_no_row(
    processes: Any, path: Path, output: Path, undisturbed: tuple[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_table, "GROUPS_OF_A_SHARD", GROUPS_OF_A_SHARD)
    processes.wait_for_workers(2, timeout=60)

    def fitting(*given: Any) -> Iterator[tuple[Any, Any]]:
        fitted = distributed.fit_shards(processes, *given)
        yield next(fitted)
        os.kill(next(iter(processes.run(os.getpid).values())), signal.SIGKILL)
        yield from fitted

    fit_table.fit_table(job(path, output), fitting=fitting)
    assert output.read_bytes() == undisturbed[0]


def test_workers_that_find_another_table_say_so(
    processes: Any, path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.wait_for_workers(2, timeout=60)
    monkeypatch.setattr(distributed, "_content", lambda table: {"rows": 1})  # here, not in the workers' processes
    with pytest.raises(
        ValueError, match=r"table.parquet: is another table: {'rows': \d+.* instead of {'rows': 1} \(on "
    ):
        fit_table.fit_table(job(path, output), fitting=partial(distributed.fit_shards, processes))
    assert list(output.parent.iterdir()) == []
