"""`emalgam fit` on data that are read in chunks, as a process: reports, progress, kill and resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emalgam.model_file import load_model
from emalgam.tables import write_table
from tests.processes import OnTerminal, error_of, run_json
from tests.samples import blobs

N = 6000
HOW = ("-k", 4, "--tol", 1e-6, "--max-iter", 1000, "--init", "random_from_data", "--seed", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as .npy, as a Parquet file with weights, and as a folder of Parquet files."""
    folder = tmp_path_factory.mktemp("stream")
    x = blobs(N)[0]
    np.save(folder / "x.npy", x)
    columns = {f"x{d}": column for d, column in enumerate(x.T)}
    weights = np.random.default_rng(1).integers(0, 3, N).astype(float)
    write_table(folder / "weights.npy", weights)
    pq.write_table(pa.table(columns | {"w": weights}), folder / "x.parquet", row_group_size=500)
    (folder / "parts").mkdir()
    for number, begin in enumerate(range(0, N, 2500)):
        part = pa.table({name: column[begin : begin + 2500] for name, column in columns.items()})
        pq.write_table(part, folder / "parts" / f"{number}.parquet")
    return folder


def test_a_folder_is_read_in_chunks_and_gives_the_model_of_the_array(folder: Path, tmp_path: Path) -> None:
    whole = run_json("fit", folder / "x.npy", *HOW, "--in-memory", "-o", tmp_path / "whole")
    parts = run_json("fit", folder / "parts", *HOW, "-o", tmp_path / "parts")
    np.testing.assert_allclose(load_model(tmp_path / "parts").means, load_model(tmp_path / "whole").means, rtol=1e-9)
    assert parts["n_samples"] == N
    assert parts["n_features"] == 3
    assert parts["passes"] == parts["n_iter"] + 2  # the survey and the frame
    assert parts["rows_per_second"] > 0
    for name in ("lower_bound", "bic", "aic", "log_likelihood"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9)


def test_weights_from_a_column(folder: Path, tmp_path: Path) -> None:
    run_json("fit", folder / "x.parquet", *HOW, "--weight-column", "w", "-o", tmp_path / "column")
    run_json("fit", folder / "x.npy", *HOW, "--weights", folder / "weights.npy", "--stream", "-o", tmp_path / "file")
    run_json("fit", folder / "x.npy", *HOW, "--weights", folder / "weights.npy", "-o", tmp_path / "whole")
    for name in ("column", "file"):
        np.testing.assert_allclose(load_model(tmp_path / name).means, load_model(tmp_path / "whole").means, rtol=1e-9)


def test_features_are_chosen_and_ordered(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.load(folder / "x.npy")[:, [2, 0]])
    expected = run_json("fit", tmp_path / "x.npy", *HOW, "-o", tmp_path / "expected")
    for number, (data, how) in enumerate([("x.parquet", ()), ("x.parquet", ("--stream",)), ("parts", ())]):
        found = run_json("fit", folder / data, *HOW, *how, "--features", "x2, x0", "-o", tmp_path / str(number))
        assert found["lower_bound"] == pytest.approx(expected["lower_bound"], rel=1e-12)
        means = load_model(tmp_path / str(number)).means
        np.testing.assert_allclose(means, load_model(tmp_path / "expected").means, rtol=1e-9)
    message = error_of("fit", folder / "x.parquet", "-k", 2, "--features", "x2,y")
    assert message == f"{folder / 'x.parquet'}: has no column 'y'; there are x0, x1, x2, w"
    assert ".parquet files only" in error_of("fit", folder / "x.npy", "-k", 2, "--features", "x2")


def test_nothing_is_written_among_the_data(folder: Path, tmp_path: Path) -> None:
    """It would be read as data in the next run, such as one that resumes."""
    parts = folder / "parts"
    before = sorted(parts.iterdir())
    commands: list[list[object]] = [
        ["fit", parts, "-k", 2, "-o", parts / "model.safetensors"],
        ["fit", parts, "-k", 2, "-o", tmp_path / "model.safetensors", "--checkpoint", parts / "state"],
        ["predict", parts, tmp_path / "model.safetensors", "-o", parts / "labels.npy"],
    ]
    for command in commands:
        assert f"would be taken for data, as it lies in {parts}; write it into another folder" in error_of(*command)
    assert sorted(parts.iterdir()) == before


def test_score_and_predict_read_folders(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run_json("fit", folder / "parts", *HOW, "-o", model)
    whole, parts = (run_json("score", folder / data, model) for data in ("x.npy", "parts"))
    assert parts.pop("each") is whole.pop("each") is None
    assert parts == pytest.approx(whole, rel=1e-12)
    each = run_json("score", folder / "parts", model, "--each", tmp_path / "each.npy")
    assert each["log_likelihood"] == pytest.approx(whole["log_likelihood"], rel=1e-12)
    x, mixture = np.load(folder / "x.npy"), load_model(model)
    np.testing.assert_array_equal(np.load(tmp_path / "each.npy"), mixture.log_prob(x))
    assert run_json("predict", folder / "parts", model, "-o", tmp_path / "labels.npy")["n_samples"] == N
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), mixture.predict(x))


def test_progress_shows_the_pass_and_the_rate(folder: Path) -> None:
    with OnTerminal("fit", folder / "parts", *HOW, "--json") as terminal:
        status, out, shown = terminal.finish()
    assert status == 0
    assert "rows/s" in shown
    assert "pass " in shown
    assert json.loads(out)["converged"]


# ---- kill and resume


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "emalgam", *map(str, arguments)]


@pytest.mark.parametrize("named", [True, False])
def test_killed_and_resumed_is_the_same_model(named: bool, folder: Path, tmp_path: Path) -> None:
    long: tuple[Any, ...] = ("fit", folder / "parts", "-k", 12, "--tol", 0, "--max-iter", 4000, "--quiet", "--seed", 3)
    model = tmp_path / "model"
    state = tmp_path / ("state" if named else "model.checkpoint")
    checkpointed = (*long, "-o", model, *(("--checkpoint", state) if named else ()), "--checkpoint-every", 0)
    with subprocess.Popen(command(*checkpointed)) as process:
        seen, deadline = set(), time.monotonic() + 120
        while len(seen) < 5 and process.poll() is None and time.monotonic() < deadline:
            if state.exists():
                seen.add(state.stat().st_mtime_ns)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert state.exists()
    assert not model.exists()
    subprocess.run(command(*checkpointed, "--resume", "--max-iter", 400), check=True, capture_output=True)
    assert not state.exists()
    whole = tmp_path / "whole"
    subprocess.run(command(*long, "-o", whole, "--max-iter", 400), check=True, capture_output=True)
    assert model.read_bytes() == whole.read_bytes()


def test_bad_options(folder: Path, tmp_path: Path) -> None:
    assert "--checkpoint" in error_of("fit", folder / "x.npy", "-k", 2, "--resume", status=2)
    both = ("--weights", folder / "weights.npy", "--weight-column", "w")
    assert "not both" in error_of("fit", folder / "x.parquet", "-k", 2, *both, status=2)
    assert "--stream" in error_of("fit", folder / "parts", "-k", 2, "--in-memory", status=2)
    assert "has no column 'v'" in error_of("fit", folder / "x.parquet", "-k", 2, "--weight-column", "v")
    twice = "is asked for twice; features, weights and labels have to differ"
    for how in (("--features", "x0,x0"), ("--features", "x0,w", "--weight-column", "w")):
        assert error_of("fit", folder / "x.parquet", "-k", 2, *how).endswith(twice)
    (tmp_path / "state").write_bytes(b"")
    message = error_of("fit", folder / "x.npy", "-k", 2, "--checkpoint", tmp_path / "state")
    assert "there is a checkpoint already" in message
    assert "header is cut short" in error_of(
        "fit", folder / "x.npy", "-k", 2, "--checkpoint", tmp_path / "state", "--resume"
    )
    (tmp_path / "empty").mkdir()
    assert "empty" in error_of("fit", tmp_path / "empty", "-k", 2)
