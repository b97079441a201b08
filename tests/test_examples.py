"""The examples run, as the README says to run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from emalgam.model_file import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(name: str, *arguments: str) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_old_faithful(tmp_path: Path) -> None:
    """The golden numbers of the EM chapter, and a picture."""
    lines = run("old_faithful.py", str(tmp_path / "demo")).splitlines()
    picture = tmp_path / "demo" / "old_faithful.png"
    assert lines == [
        "eruptions       272 x 2",
        "start           -137.488246 mean log-likelihood",
        "iterations      9 until it changed by less than 1e-4",
        "then            -4.155382999",
        "converged       -1130.26396 log-likelihood",
        "weight          0.355873",
        "mean            2.036388 54.478516",
        "covariance      0.0691677 0.4351676 33.697282",
        "weight          0.644127",
        "mean            4.289662 79.968115",
        "covariance      0.1699684 0.9406093 36.046211",
        "generated       500 points",
        f"written         {picture}",
    ]
    assert picture.read_bytes().startswith(PNG)


def test_photograph(tmp_path: Path) -> None:
    printed = run("photograph.py", str(tmp_path / "demo"), "--components", "6")
    report = {line[:16].strip(): line[16:] for line in printed.splitlines()}
    assert report["pixels"] == "273280 x 3 (uint8)"
    assert report["iterations"].endswith("(converged)")
    assert float(report["BIC"]) > -2 * float(report["log-likelihood"].split()[0])
    assert list(report) == [
        "pixels",
        "components",
        "backend",
        "iterations",
        "seconds",
        "log-likelihood",
        "BIC",
        "written",
    ]
    mixture = load_model(tmp_path / "demo" / "model.safetensors")
    assert mixture.means.shape == (6, 3)
    assert np.logical_and(mixture.means > 0, mixture.means < 255).all()
    assert (tmp_path / "demo" / "photograph.png").read_bytes().startswith(PNG)
