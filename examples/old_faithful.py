"""The EM algorithm on the eruptions of Old Faithful: a fit from a bad start, and points that the mixture generates.

The data are 272 pairs of minutes: how long the geyser erupted, and how long the next eruption let wait.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

import emalgam
from emalgam import plot
from emalgam.tables import read_table

DATA = Path(__file__).parent / "data" / "old_faithful.csv"
START = {
    "weights_init": [0.5, 0.5],
    "means_init": [[0.0, 50.0], [0.0, 100.0]],
    "precisions_init": [np.eye(2), np.eye(2)],
}
GENERATED = 500


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo"), help="folder to write to (default: demo)")
    return parser.parse_args()


def draw(x: np.ndarray, generated: np.ndarray, mixture: emalgam.Mixture, path: Path) -> None:
    """The data and as many generated points as are given, both in the colours of their components."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for ax, points, title in zip(axes, (x, generated), ("eruptions", "generated"), strict=True):
        ax.set(xlabel="eruption (minutes)", ylabel="wait for the next (minutes)", title=f"{len(points)} {title}")
        plot.responsibilities(points, mixture, ax)
        plot.ellipses(mixture, ax)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = read_arguments()
    matplotlib.use("Agg")
    x = read_table(DATA)
    fitted = emalgam.fit(x, 2, tol=1e-4, reg_covar=0, **START)
    mixture = emalgam.fit(x, 2, tol=1e-14, reg_covar=0, **START).mixture
    generated, _ = mixture.sample(GENERATED, random_state=0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "old_faithful.png"
    draw(x, generated, mixture, picture)
    print(f"eruptions       {len(x)} x {x.shape[1]}")
    print(f"start           {fitted.lower_bounds[0]:.6f} mean log-likelihood")
    print(f"iterations      {len(fitted.lower_bounds) - 1} until it changed by less than 1e-4")
    print(f"then            {fitted.lower_bounds[-1]:.9f}")
    print(f"converged       {mixture.log_prob(x).sum():.5f} log-likelihood")
    for weight, mean, covariance in zip(mixture.weights, mixture.means, mixture.covariances, strict=True):
        print(f"weight          {weight:.6f}")
        print(f"mean            {mean[0]:.6f} {mean[1]:.6f}")
        print(f"covariance      {covariance[0, 0]:.7f} {covariance[0, 1]:.7f} {covariance[1, 1]:.6f}")
    print(f"generated       {len(generated)} points")
    print(f"written         {picture}")


if __name__ == "__main__":
    main()
