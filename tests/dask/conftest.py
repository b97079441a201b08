"""Small clusters of this machine: of threads for most tests, of processes where one has to die."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster


@pytest.fixture
def threads() -> Iterator[None]:
    """Dask without a cluster."""
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture
def small_files(tmp_path: Path) -> Iterator[Callable[[pd.DataFrame], Any]]:
    """A frame in ten files, of which Dask's optimizer reads more at once the fewer columns it is asked for."""

    def written(frame: pd.DataFrame) -> Any:
        wide = frame.assign(**{f"other{number}": 0.0 for number in range(4)})
        for number in range(10):
            some = wide.iloc[len(wide) * number // 10 : len(wide) * (number + 1) // 10]
            some.to_parquet(tmp_path / f"{number}.parquet")
        return dd.read_parquet(str(tmp_path))

    with dask.config.set({"dataframe.parquet.minimum-partition-size": 1}):
        yield written


def _clients(processes: bool) -> Iterator[Any]:
    how = {"n_workers": 2, "threads_per_worker": 1, "processes": processes, "dashboard_address": ":0"}
    # A worker that waits for a busy machine would take partitions of the other one, which a test counts as moved.
    with dask.config.set({"distributed.scheduler.work-stealing": False}):
        cluster = LocalCluster(**how)
    with cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="package")
def client() -> Iterator[Any]:
    """Two workers of one thread in this process; closed after these tests, as others count what is allocated here."""
    yield from _clients(processes=False)


@pytest.fixture(scope="package")
def processes() -> Iterator[Any]:
    """Two workers of one thread in processes of their own."""
    yield from _clients(processes=True)
