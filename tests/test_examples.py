"""The examples run, as the README says to run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from emalgam.model_file import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def test_photograph(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "photograph.py"), str(tmp_path / "demo"), "--components", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = {line[:16].strip(): line[16:] for line in done.stdout.splitlines()}
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
