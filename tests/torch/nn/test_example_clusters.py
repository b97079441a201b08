"""The example that finds classes without labels runs, and its clusters are better than those of k-means on pixels."""

from __future__ import annotations

from pathlib import Path

from tests.test_examples import PNG, run


def test_clusters(tmp_path: Path) -> None:
    """One seed and half the epochs; the margin of 0.01 is five times the spread of k-means."""
    report = run("clusters.py", tmp_path, "--seeds", 1, "--pretraining", 60, "--epochs", 20)
    means, mixture = (float(report[name].split(",")[0]) for name in ("k-means", "mixture VAE"))
    assert report["digits"] == "1797 x 64, seeds 0 to 0"
    assert means > 0.75
    assert mixture > means + 0.01
    assert (tmp_path / "clusters.png").read_bytes().startswith(PNG)
