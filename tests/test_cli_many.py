"""`emalgam fit-many` as a process: what it writes and prints, and what kill -9 and a full disk leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

import emalgam
from tests.processes import OnTerminal, error_of, run, run_json

B, GROUPS_OF_A_SHARD = 40, 7
SHARDS = -(-B // GROUPS_OF_A_SHARD)

# The command line with small shards, in which something happens when a file in a folder is touched for the nth time:
# Python announces each open, rename, remove, mkdir and rmdir to audit hooks before it is done.
DRIVER = f"""
import os, resource, signal, sys
from emalgam import cli, fit_table

fit_table.GROUPS_OF_A_SHARD = {GROUPS_OF_A_SHARD}
what, folder, nth, *arguments = sys.argv[1:]
touched = 0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

def cut():
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which ends the process in the middle of a write
    fill()

def watch(event, details):
    global touched
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(details[0]).startswith(folder):
        touched += 1
        if touched == int(nth):
            globals()[what]()

sys.addaudithook(watch)
status = cli.main(arguments)
if what == "count":
    print(touched)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def table() -> arrow.Table:
    """Groups of 2 to 60 rows, each in one piece, in no order."""
    rng = np.random.default_rng(8)
    sizes = rng.integers(2, 60, B)
    names = np.repeat([f"sensor {b:02}" for b in rng.permutation(B)], sizes)
    x = rng.normal(size=(len(names), 2)) + 8 * rng.integers(0, 2, (len(names), 1))
    return arrow.table({"sensor": names, "a": x[:, 0], "b": x[:, 1], "w": rng.integers(0, 3, len(names))})


@pytest.fixture(scope="module")
def path(table: arrow.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "table.parquet"
    parquet.write_table(table, path, row_group_size=300)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A file in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "fits.parquet"


def arguments(path: Path, output: Path) -> list[object]:
    return ["fit-many", path, "--by", "sensor", "--features", "a,b", "-k", "1:2", "-o", output]


def disturbed(what: str, nth: int, path: Path, output: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """Run the driver; `what` happens when a file in the output's folder is touched for the nth time."""
    command = [sys.executable, "-c", DRIVER, what, output.parent, nth, *arguments(path, output), "--quiet", *more]
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, timeout=300)


def finish(path: Path, output: Path) -> bytes:
    """Go on to the end, which leaves the output and nothing else."""
    done = disturbed("kill", 0, path, output, "--resume")
    assert done.returncode == 0, done.stderr
    assert list(output.parent.iterdir()) == [output]
    return output.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The output of a run that nothing disturbs, and how often that run touched files."""
    output = tmp_path_factory.mktemp("undisturbed") / "fits.parquet"
    done = disturbed("count", 0, path, output)
    assert done.returncode == 0, done.stderr
    return output.read_bytes(), int(done.stdout)


# ---- a run that nothing disturbs


def test_a_folder_is_no_table(path: Path, output: Path) -> None:
    done = disturbed("count", 0, path.parent, output)
    assert done.returncode != 0
    assert "is a folder; expected one Parquet file" in " ".join(done.stderr.split())


def test_spaces_between_features(path: Path, output: Path, undisturbed: tuple[bytes, int]) -> None:
    assert disturbed("count", 0, path, output, "--features", "a, b").returncode == 0
    assert output.read_bytes() == undisturbed[0]


def test_the_rows_are_those_of_fit_many(table: arrow.Table, path: Path, output: Path) -> None:
    report = run_json(*arguments(path, output), "--weights", "w", "--seed", 3, "--criterion", "aic")
    x = np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1)
    labels, weights = table["sensor"].to_numpy(), table["w"].to_numpy()
    fits = emalgam.fit_many(
        x, range(1, 3), groups=labels, sample_weight=weights, criterion="aic", random_state=3, backend=report["backend"]
    )
    loaded = emalgam.load_fits(output)
    for name in ("groups", "n_samples", "total_weight", "n_components", "log_likelihood", "n_iter", "status"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(fits, name), err_msg=name)
    K = loaded.weights.shape[1]
    np.testing.assert_array_equal(loaded.covariances, fits.covariances[:, :K])
    assert loaded.criterion == "aic"
    rows = parquet.read_table(output)
    assert rows.column_names[0] == "sensor"
    assert rows["sensor"].to_pylist() == list(dict.fromkeys(labels.tolist())), "in the order of the table"
    np.testing.assert_array_equal(np.sort(rows["bic"].to_numpy()), np.sort(fits.bic))
    assert report["n_groups"] == B
    assert report["n_samples"] == len(x)
    assert report["resumed"] == 0
    assert sum(report["status"].values()) == B
    assert list(output.parent.iterdir()) == [output]


def test_every_option(path: Path, output: Path) -> None:
    more = ["--covariance", "diag", "--n-init", 2, "--max-iter", 7, "--tol", 0, "--reg-covar", 100, "--threads", 1]
    report = run_json(*arguments(path, output), *more, "-k", 2, "--backend", "reference", "--criterion", "icl")
    assert (report["covariance_type"], report["criterion"], report["backend"]) == ("diag", "icl", "reference")
    fits = emalgam.load_fits(output)
    assert fits.covariance_type == "diag"
    fitted = fits.n_components > 0
    assert set(fits.n_components[fitted].tolist()) == {2}
    assert set(fits.n_iter[fitted].tolist()) == {7}
    assert np.nanmin(fits.covariances) > 100


def test_a_report_in_words_and_none(path: Path, output: Path) -> None:
    done = run(*arguments(path, output))
    assert f"n groups              {B}" in done.stdout
    assert " fine" in next(line for line in done.stdout.splitlines() if line.startswith("status"))
    assert done.stderr == ""
    quiet = run(*arguments(path, output), "--quiet")
    assert quiet.stdout == quiet.stderr == ""


def test_progress_is_for_terminals(path: Path, output: Path) -> None:
    with OnTerminal(*arguments(path, output), "--json") as terminal:
        status, out, shown = terminal.finish()
    assert status == 0
    assert f"{B}/{B}" in shown
    assert "fits/s" in shown
    assert json.loads(out)["n_groups"] == B


# ---- kill -9


@pytest.mark.parametrize("share", [0.0, 0.1, 0.45, 0.7, 0.75, 0.95])
def test_a_killed_run_goes_on(share: float, path: Path, output: Path, undisturbed: tuple[bytes, int]) -> None:
    """Killed at some of the moments at which it touches a file, from the first to the last."""
    whole, touched = undisturbed
    assert touched > 3 * SHARDS
    done = disturbed("kill", 1 + int(share * touched), path, output)
    assert done.returncode == -signal.SIGKILL
    if output.exists():
        assert output.read_bytes() == whole
    assert finish(path, output) == whole


def test_a_run_that_is_killed_again_and_again_ends(path: Path, output: Path, undisturbed: tuple[bytes, int]) -> None:
    whole, touched = undisturbed
    runs, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        assert runs < SHARDS + 2, "each run has to write a shard at least"
        status = disturbed("kill", touched // 3, path, output, "--resume").returncode
        runs += 1
    assert status == 0
    assert runs >= 2
    assert output.read_bytes() == whole


def test_a_run_that_is_killed_in_the_middle_of_a_write_goes_on(
    path: Path, output: Path, undisturbed: tuple[bytes, int]
) -> None:
    done = disturbed("cut", 10, path, output)
    assert done.returncode == -signal.SIGXFSZ
    parts = list((output.parent / "fits.parquet.parts").iterdir())
    assert any(part.name.startswith(".") for part in parts), "the remains of the write"
    for part in parts:
        if part.suffix == ".parquet" and not part.name.startswith("."):
            emalgam.load_fits(part)
    assert finish(path, output) == undisturbed[0]


def test_what_was_fitted_is_not_fitted_again(path: Path, output: Path, undisturbed: tuple[bytes, int]) -> None:
    assert disturbed("kill", undisturbed[1] // 2, path, output).returncode == -signal.SIGKILL
    parts = output.parent / "fits.parquet.parts"
    before = {part: part.stat().st_ino for part in parts.glob("[!.]*.parquet")}
    assert len(before) > 1
    assert disturbed("kill", 5, path, output, "--resume").returncode == -signal.SIGKILL
    assert {part: part.stat().st_ino for part in before} == before
    report = json.loads(disturbed("kill", 0, path, output, "--resume", "--json").stdout)
    assert report["resumed"] >= GROUPS_OF_A_SHARD * len(before)
    assert run_json(*arguments(path, output), "--resume")["resumed"] == B, "a finished run has nothing left to do"
    assert output.read_bytes() == undisturbed[0]


# ---- a full disk


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    share: float, path: Path, output: Path, undisturbed: tuple[bytes, int]
) -> None:
    done = disturbed("fill", int(share * undisturbed[1]), path, output)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {output}.parts/")
    assert done.stderr.endswith(
        ".parquet: File too large; what was fitted is kept: make room and go on with --resume\n"
    )
    assert done.stderr.count("\n") == 1
    parts = list((output.parent / "fits.parquet.parts").glob("*"))
    shards = [part for part in parts if part.suffix == ".parquet"]
    assert len(parts) == len(shards) + 1, "the shards and what they are shards of"
    assert sum(len(emalgam.load_fits(shard)) for shard in shards) == GROUPS_OF_A_SHARD * len(shards) > 0
    assert finish(path, output) == undisturbed[0]


def test_a_disk_that_is_full_from_the_start_leaves_nothing(path: Path, output: Path) -> None:
    done = disturbed("fill", 1, path, output)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert list(output.parent.iterdir()) == []


# ---- going on with something else


def test_going_on_with_other_settings_says_what_differs(
    path: Path, output: Path, undisturbed: tuple[bytes, int]
) -> None:
    assert disturbed("kill", undisturbed[1] // 2, path, output).returncode == -signal.SIGKILL
    message = error_of(*arguments(path, output), "--resume", "--tol", 0.5, "-k", "1:3")
    assert "holds an unfinished run that cannot be gone on with: " in message
    assert "most components was 2 and is 3, tol was 0.001 and is 0.5. To begin anew, remove the folder" in message
    assert "holds an unfinished run: go on with --resume" in error_of(*arguments(path, output))
    assert finish(path, output) == undisturbed[0]
    message = error_of(*arguments(path, output), "--resume", "--seed", 1)
    assert "is the result of another job" in message
    assert "random_state was 0 and is 1. To replace it, leave out --resume" in message


def test_going_on_with_another_table_says_so(table: arrow.Table, tmp_path: Path, output: Path) -> None:
    path = tmp_path / "table.parquet"
    parquet.write_table(table, path)
    assert disturbed("kill", 12, path, output).returncode == -signal.SIGKILL
    parquet.write_table(table.slice(0, table.num_rows - 1), path)
    message = error_of(*arguments(path, output), "--resume")
    assert f"table's rows was {table.num_rows} and is {table.num_rows - 1}" in message


def test_the_output_of_something_else_is_not_gone_on_with(path: Path, output: Path, table: arrow.Table) -> None:
    parquet.write_table(table, output)
    assert "format is None, expected 'emalgam.fits'" in error_of(*arguments(path, output), "--resume")
    run(*arguments(path, output), "--quiet")
    assert len(emalgam.load_fits(output)) == B


# ---- bad input


def test_columns_that_are_not_there(path: Path, output: Path) -> None:
    options = ["-k", 1, "-o", output]
    message = error_of("fit-many", path, "--by", "device", *options)
    assert message == f"{path}: has no column 'device'; there are sensor, a, b, w"
    assert "has no column 'c'" in error_of("fit-many", path, "--by", "sensor", "--features", "a,c", *options)
    assert "has no column 'v'" in error_of("fit-many", path, "--by", "sensor", "--weights", "v", *options)
    assert "'a' is asked for twice" in error_of("fit-many", path, "--by", "sensor", "--features", "a,a", *options)
    assert list(output.parent.iterdir()) == []


def test_files_that_are_no_tables_are_one_line(path: Path, tmp_path: Path, output: Path) -> None:
    absent = tmp_path / "absent.parquet"
    options = ["--by", "sensor", "-k", 1, "-o", output]
    assert error_of("fit-many", absent, *options) == f"{absent}: there is no such file"
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:-100])
    assert error_of("fit-many", cut, *options).startswith(f"{cut}: ")
    damaged = tmp_path / "damaged.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    damaged.write_bytes(content)
    assert error_of("fit-many", damaged, *options, "--features", "a,b").startswith(f"{damaged}: ")
    assert "there is no folder" in error_of("fit-many", path, "--by", "sensor", "-k", 1, "-o", absent / "out.parquet")
    table = path.parent / "fits.csv"
    expected = f"{table}: many fits are written as Parquet; name it fits.parquet"
    assert error_of("fit-many", path, "--by", "sensor", "--features", "a", "-k", 1, "-o", table) == expected
    assert list(output.parent.iterdir()) == []


def test_a_label_may_not_have_the_name_of_a_column_of_the_output(tmp_path: Path, output: Path) -> None:
    parquet.write_table(arrow.table({"status": [1, 1], "a": [1.0, 2.0]}), tmp_path / "t.parquet")
    message = error_of("fit-many", tmp_path / "t.parquet", "--by", "status", "-k", 1, "-o", output)
    assert "column 'status' has the name of a column of the output; rename it" in message


def test_missing_numbers_are_a_status(tmp_path: Path, output: Path) -> None:
    columns = {"sensor": [1, 1, 2, 2, 2], "a": [1.0, None, 2.0, 3.0, 5.0]}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    report = run_json("fit-many", tmp_path / "t.parquet", "--by", "sensor", "-k", 1, "-o", output)
    assert report["status"] == {"fine": 1, "not_finite": 1}
    rows = parquet.read_table(output).to_pylist()
    assert (rows[0]["n_components"], rows[0]["weights"], rows[0]["n_samples"]) == (0, [], 2)
    assert rows[0]["message"] == "the samples hold NaN or infinity"
    assert rows[1]["means"] == pytest.approx([10 / 3])


@pytest.mark.parametrize("components", ["6:1", "0", "1:", "²"])
def test_a_wrong_range_ends_with_2(components: str, path: Path, output: Path) -> None:
    line = error_of("fit-many", path, "--by", "sensor", f"-k{components}", "-o", output, status=2)
    assert f"{components!r} is no number of components; expected a number >= 1, or FIRST:LAST" in line
