"""The examples run, as the README says to run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from emalgam.fits_file import load_fits
from emalgam.model_file import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def output(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(name: str, *arguments: object) -> dict[str, str]:
    """The same, by the words at the beginning of each line."""
    return {line[:16].strip(): line[16:] for line in output(name, *arguments).splitlines()}


def test_old_faithful(tmp_path: Path) -> None:
    """The golden numbers of the EM chapter, and a picture."""
    lines = output("old_faithful.py", tmp_path / "demo").splitlines()
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
    report = run("photograph.py", tmp_path / "demo", "--components", 6)
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


def test_tiles(tmp_path: Path) -> None:
    report = run("tiles.py", tmp_path / "demo", "--step", 96)
    assert report["tiles"] == "5 x 7 of 32 x 32 pixels, 169 patches of 6 features each"
    assert report["components"].startswith("1 to ")
    assert float(report["from means"].split()[0]) > 15, "the means show the photograph"
    fits = load_fits(tmp_path / "demo" / "tiles.parquet")
    assert len(fits) == 35
    assert (fits.n_components > 0).all()
    assert (tmp_path / "demo" / "tiles.png").read_bytes().startswith(PNG)


def test_sensors(tmp_path: Path) -> None:
    report = run("sensors.py", tmp_path / "demo", "--sensors", 12)
    assert report["sensors"] == "12, of 30 to 30000 rows"
    assert float(report["states found"].partition("%")[0]) > 80
    fits = load_fits(tmp_path / "demo" / "sensor_models.parquet")
    assert fits.n_samples.sum() == int(report["rows"])
    assert (tmp_path / "demo" / "sensors.png").read_bytes().startswith(PNG)
