"""Checkpoints: an interrupted fit goes on to the same bits; a file of anything else is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emalgam
from emalgam.checkpoint import Checkpoint
from emalgam.model_file import ModelFileError
from tests.samples import blobs


class Interrupt(Exception):
    pass


def interrupt(restart: int, iteration: int) -> Any:
    """A callback that raises in one iteration."""

    def callback(event: emalgam.Iteration) -> None:
        if (event.restart, event.iteration) == (restart, iteration):
            raise Interrupt

    return callback


def fit(x: Any, path: Path | None = None, resume: bool = False, **arguments: Any) -> emalgam.Fit:
    checkpoint = None if path is None else Checkpoint(path, seconds=0, resume=resume)
    how = {"random_state": 3, "tol": 1e-7, "max_iter": 200, "init_params": "random_from_data"} | arguments
    return emalgam.fit(x, 4, checkpoint=checkpoint, **how)


def assert_same_bits(first: emalgam.Fit, second: emalgam.Fit) -> None:
    for name in ("weights", "means", "covariances", "precisions_cholesky"):
        np.testing.assert_array_equal(getattr(first.mixture, name), getattr(second.mixture, name), err_msg=name)
    for name in ("lower_bounds", "converged", "n_iter", "effective_components", "algorithm", "error_bound"):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("at", [(0, 2), (0, 9), (1, 3)])
def test_goes_on_to_the_same_bits(covariance_type: str, at: tuple[int, int], tmp_path: Path) -> None:
    x, path = blobs(800)[0], tmp_path / "state"
    how = {"covariance_type": covariance_type, "n_init": 2}
    whole = fit(x, **how)
    with pytest.raises(Interrupt):
        fit(x, path, callback=interrupt(*at), **how)
    assert path.exists()
    assert_same_bits(fit(x, path, resume=True, **how), whole)


def test_twice_interrupted_and_reseeding(tmp_path: Path) -> None:
    x = np.concatenate([blobs(400)[0], np.zeros((60, 3))])
    path, how = tmp_path / "state", {"on_degenerate": "reseed", "reg_covar": 0.0}
    whole = fit(x, **how)
    assert whole.n_iter > 12
    for iteration in (4, 12):
        with pytest.raises(Interrupt):
            fit(x, path, resume=True, callback=interrupt(0, iteration), **how)
    assert_same_bits(fit(x, path, resume=True, **how), whole)


def test_streams(tmp_path: Path) -> None:
    x, path = blobs(900)[0], tmp_path / "state"
    stream = emalgam.open_stream(x, chunk_rows=250)
    with pytest.raises(Interrupt):
        fit(stream, path, callback=interrupt(0, 5))
    assert_same_bits(fit(stream, path, resume=True), fit(stream))


def test_nothing_to_go_on_from_is_a_beginning(tmp_path: Path) -> None:
    assert_same_bits(fit(blobs(300)[0], tmp_path / "state", resume=True), fit(blobs(300)[0]))


def test_more_iterations_than_before(tmp_path: Path) -> None:
    x, path = blobs(800)[0], tmp_path / "state"
    with pytest.warns(emalgam.ConvergenceWarning):
        fit(x, path, max_iter=6)
    assert_same_bits(fit(x, path, resume=True), fit(x))


def test_written_only_so_often(tmp_path: Path) -> None:
    emalgam.fit(blobs(300)[0], 4, checkpoint=Checkpoint(tmp_path / "state", seconds=1000))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_overwritten_by_chance(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(ModelFileError, match="there is a checkpoint already; resume from it, or remove it"):
        fit(blobs(300)[0], tmp_path / "state")


def test_end_removes_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state", seconds=0)
    emalgam.fit(blobs(800)[0], 4, init_params="random_from_data", random_state=3, checkpoint=checkpoint)
    assert (tmp_path / "state").exists()
    checkpoint.end()
    checkpoint.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": blobs(801)[0]}, "is of a fit with n_samples_with_weight 800; this one has 801"),
        ({"x": blobs(800)[0] + 1}, "is of a fit with shift ["),
        ({"x": blobs(800)[0][:, :2]}, "is of a fit with n_features 3; this one has 2"),
        ({"covariance_type": "diag"}, "is of a fit with covariance_type 'full'; this one has 'diag'"),
        ({"tol": 1e-3}, "is of a fit with tol 1e-07; this one has 0.001"),
        ({"random_state": 4}, "is of a fit with another random_state; give the integer that it began with"),
        ({"n_init": 3}, "is of a fit with n_init 1; this one has 3"),
        ({"weights_init": [0.1, 0.2, 0.3, 0.4]}, "is of a fit with weights_init None; this one has '"),
        ({"means_init": np.eye(4, 3)}, "is of a fit with means_init None; this one has '"),
        ({"precisions_init": np.stack([np.eye(3)] * 4)}, "is of a fit with precisions_init None; this one has '"),
    ],
)
def test_other_data_and_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(Interrupt):
        fit(blobs(800)[0], path, callback=interrupt(0, 5))
    with pytest.raises(ModelFileError, match=re.escape(f"{path}: {message}")):
        fit(**{"x": blobs(800)[0], "path": path, "resume": True} | change)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    x = blobs(300)[0]
    message = re.escape("checkpoint is 'state'; expected emalgam.checkpoint.Checkpoint(path)")
    with pytest.raises(ValueError, match=message):
        emalgam.fit(x, 4, checkpoint="state")  # type: ignore[arg-type]
    for resume in (False, True):
        with pytest.raises(ModelFileError, match=re.escape(f"{tmp_path}: is not a regular file")):
            fit(x, tmp_path, resume=resume)


def test_errors_are_short_however_many_features_there_are(tmp_path: Path) -> None:
    x, path = np.random.default_rng(0).normal(size=(400, 200)), tmp_path / "state"
    with pytest.raises(Interrupt):
        fit(x, path, covariance_type="diag", callback=interrupt(0, 5))
    with pytest.raises(ModelFileError, match="is of a fit with shift") as error:
        fit(x + 1, path, covariance_type="diag", resume=True)
    assert len(str(error.value)) < len(str(path)) + 500


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(Interrupt):
        fit(blobs(800)[0], path, callback=interrupt(0, 5))
    content = path.read_bytes()
    for end in (0, 4, 100, len(content) // 2, len(content) - 8):
        path.write_bytes(content[:end])
        with pytest.raises(ModelFileError, match="state: "):
            fit(blobs(800)[0], path, resume=True)
    for old, new in [
        (b"emalgam.checkpoint", b"emalgam.chickpoint"),
        (b'"format_version":"1"', b'"format_version":"9"'),
        (b"restart", b"restort"),
        (b'"weights"', b'"weighty"'),
        (b"F64", b"I64"),
        (b'"state"', b'"stale"'),
    ]:
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(ModelFileError, match="state: "):
            fit(blobs(800)[0], path, resume=True)


def test_a_full_disk_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    with pytest.raises(Interrupt):
        fit(blobs(800)[0], path, callback=interrupt(0, 5))
    content = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fit(blobs(800)[0], path, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert path.read_bytes() == content
