"""Fit a mixture to each group of a Parquet table with ``emalgam fit-many``, and draw what was found.

The table is made here, with a seed: sensors that report temperature and pressure of a machine, between 30 and 30 000
rows each, one sensor after the other. A machine has one to five ways to run, each of which is a cluster of the readings
that overlaps its neighbours; how many is what the fits have to find out, and few rows cannot tell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow
from matplotlib import pyplot
from matplotlib.axes import Axes
from pyarrow import parquet

import emalgam
from emalgam import plot

FEWEST_ROWS, MOST_ROWS = 30, 30_000
MOST_STATES = 5
TRIED = 6


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--sensors", type=int, default=400, help="number of sensors (default: 400)")
    parser.add_argument("--backend", default="auto", help="see `emalgam info` (default: auto)")
    return parser.parse_args()


def readings(rng: np.random.Generator, n_rows: int, n_states: int) -> np.ndarray:
    """(n, 2) readings of a machine with so many states, whose means are drawn around a ring, at least 40° apart."""
    gaps = rng.dirichlet(np.ones(n_states)) * (360 - 40 * n_states) + 40
    angles = np.radians(np.cumsum(gaps))
    means = np.stack([60 + 18 * np.cos(angles), 3 + np.sin(angles)], axis=1)
    states = rng.choice(n_states, n_rows, p=rng.dirichlet(np.full(n_states, 8.0)))
    slopes = rng.uniform(-0.8, 0.8, n_states)[states]
    first, second = rng.normal(size=(2, n_rows))
    noise = np.stack([4.5 * first, 0.25 * (slopes * first + np.sqrt(1 - slopes**2) * second)], axis=1)
    return means[states] + noise


def write_readings(path: Path, n_sensors: int) -> np.ndarray:
    """The table, and the true number of states of each sensor."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(FEWEST_ROWS, MOST_ROWS, n_sensors).astype(int)
    rng.shuffle(sizes)
    n_states = rng.integers(1, MOST_STATES + 1, n_sensors)
    schema = pyarrow.schema([("sensor", pyarrow.int32()), ("temperature", "float"), ("pressure", "float")])
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, n_sensors, 200):
            some = range(first, min(first + 200, n_sensors))
            x = np.concatenate([readings(rng, sizes[s], n_states[s]) for s in some]).astype(np.float32)
            sensor = np.repeat(np.array(some, np.int32), sizes[some.start : some.stop])
            writer.write_table(pyarrow.table([sensor, x[:, 0], x[:, 1]], schema=schema))
    return n_states


def fit(table: Path, models: Path, backend: str) -> dict[str, object]:
    """What ``emalgam fit-many`` reports."""
    command = ["fit-many", table, "--by", "sensor", "--features", "temperature,pressure", "-o", models]
    command += ["-k", f"1:{TRIED}", "--tol", 1e-5, "--max-iter", 300, "--backend", backend, "--json"]
    done = subprocess.run([sys.executable, "-m", "emalgam", *map(str, command)], stdout=subprocess.PIPE, check=True)
    report: dict[str, object] = json.loads(done.stdout)
    return report


def draw_counts(fits: emalgam.ManyFits, n_states: np.ndarray, ax: Axes) -> None:
    """How often BIC finds the number of states, against the number of rows."""
    edges = np.geomspace(FEWEST_ROWS, MOST_ROWS + 1, 11)
    middles = np.sqrt(edges[1:] * edges[:-1])
    difference = fits.n_components - n_states
    bins = np.digitize(fits.n_samples, edges) - 1
    bottom = np.zeros(len(middles))
    kinds = {"fewer": difference < 0, "as many": difference == 0, "more": difference > 0}
    for (label, chosen), color in zip(kinds.items(), ("#c7d3e3", "#2f6db3", "#e08b3e"), strict=True):
        share = np.bincount(bins[chosen], minlength=10) / np.maximum(np.bincount(bins, minlength=10), 1)
        ax.bar(middles, share, np.diff(edges) * 0.92, bottom, label=label, color=color)
        bottom += share
    ax.set(xscale="log", xlabel="rows of the sensor", ylabel="share of the sensors", ylim=(0, 1))
    title = "BIC chooses, of the states that there are,"
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, title=title, alignment="left")


def draw_sensor(fits: emalgam.ManyFits, table: Path, sensor: int, n_states: int, ax: Axes) -> None:
    """Readings of a sensor, and its mixture; labels are 0, 1, ..., and fits are in ascending order of labels."""
    rows = parquet.read_table(table, filters=[("sensor", "=", sensor)])
    x = np.stack([rows["temperature"].to_numpy(), rows["pressure"].to_numpy()], axis=1)
    mixture = fits.mixture(sensor)
    plot.responsibilities(x, mixture, ax, max_points=1500)
    plot.ellipses(mixture, ax, n_std=(2,), labels=False)
    ax.set_title("")
    rows_in_words = f"{len(x):_}".replace("_", " ")
    ax.set_title(f"{rows_in_words} rows, {n_states} states: K = {mixture.n_components}", loc="left", fontsize="medium")
    ax.set(xlabel="temperature in °C", ylabel="pressure in bar")
    ax.label_outer()


def draw(fits: emalgam.ManyFits, n_states: np.ndarray, table: Path, path: Path) -> None:
    """What BIC chose, and the mixtures of six sensors with four states or more, from the shortest to the longest."""
    figure = pyplot.figure(figsize=(15, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9))
    draw_counts(fits, n_states, left.subplots())
    rich = np.flatnonzero(n_states >= 4)
    by_size = rich[np.argsort(fits.n_samples[rich])]
    chosen = by_size[np.linspace(0, len(by_size) - 1, 6).astype(int)]
    for sensor, ax in zip(chosen, right.subplots(2, 3, sharex=True, sharey=True).flat, strict=True):
        draw_sensor(fits, table, int(sensor), int(n_states[sensor]), ax)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = read_arguments()
    matplotlib.use("Agg")
    arguments.output.mkdir(parents=True, exist_ok=True)
    table, models = arguments.output / "sensors.parquet", arguments.output / "sensor_models.parquet"
    picture = arguments.output / "sensors.png"
    n_states = write_readings(table, arguments.sensors)
    report = fit(table, models, arguments.backend)
    fits = emalgam.load_fits(models)
    draw(fits, n_states, table, picture)
    long = fits.n_samples >= 1000
    print(f"rows            {report['n_samples']}")
    print(f"sensors         {len(fits)}, of {fits.n_samples.min()} to {fits.n_samples.max()} rows")
    print(f"backend         {report['backend']}")
    print(f"seconds         {report['seconds']:.2f} ({report['fits_per_second']:.0f} sensors a second)")
    print(f"states found    {(fits.n_components == n_states)[long].mean():.1%} of sensors with 1000 rows or more")
    print(f"written         {table} {models} {picture}")


if __name__ == "__main__":
    main()
