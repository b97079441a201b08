"""`make demo-ae` in short: the example runs, writes what it says, and its score is what it claims to be."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from emalgam.nn import load_model, load_sampler

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits.py"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["digits"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    del sys.modules["digits"]
    return module


def test_digits(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "demo"), "--epochs", "10", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = {line[:16].strip(): line[16:] for line in done.stdout.splitlines()}
    assert report["digits"] == "1797 x 64, 500 of them held out"
    assert report["autoencoder"] == "64-256-128-12 and back, 102220 parameters"
    assert report["training"].startswith("10 epochs, ")
    assert report["- bandwidth"].split() == ["3", "1.5"]
    score = {name: float(report[f"- {name}"].split()[0]) for name in ("one Gaussian", "mixture", "real")}
    # -0.46, 7.99 and 12.33 were measured
    assert abs(score["real"]) < 1 < score["mixture"] < score["one Gaussian"]
    names = ("losses", "reconstructions", "interpolation", "generated", "latents", "manifold")
    pictures = [tmp_path / "demo" / f"{name}.png" for name in names]
    assert report["written"] == " ".join(map(str, [tmp_path / "demo" / "model.safetensors", *pictures]))
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
    assert load_model(tmp_path / "demo").latent_shape == (12,)
    assert load_sampler(tmp_path / "demo").sample(3, 0)[0].shape == (3, 64)


def test_the_discrepancy_of_normal_samples(example: ModuleType) -> None:
    """E k over N(0, s² I) and N(μ, t² I) is known: (h² / v)^(D/2) exp(−‖μ‖² / 2v), v = h² + s² + t²."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3000, 2)), rng.normal((1.0, 0.0), size=(3000, 2))
    bandwidth = 1.5
    v = bandwidth**2 + 2
    expected = 2 * bandwidth**2 / v * (1 - np.exp(-1 / (2 * v)))
    # the standard deviation over seeds was measured as 0.007
    assert example.squared_mmd(x, y, bandwidth) == pytest.approx(expected, abs=0.035)


def test_the_discrepancy_of_one_distribution_is_zero_in_the_mean(example: ModuleType) -> None:
    rng = np.random.default_rng(1)
    values = [example.squared_mmd(*rng.normal(size=(2, 100, 3)), 1.0) for _ in range(200)]
    assert abs(np.mean(values)) < 5 * np.std(values) / np.sqrt(200)
    assert min(values) < 0 < max(values)
