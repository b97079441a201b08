"""Questions to fitted mixtures: ``emalgam score``, ``predict``, ``sample`` and ``kl``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from emalgam.cli.input import open_here
from emalgam.cli.options import (
    Algorithm,
    Backend,
    Data,
    Json,
    Model,
    Seed,
    TableToWrite,
    Threads,
)
from emalgam.cli.output import check_table
from emalgam.cli.report import criteria, print_report
from emalgam.tables import write_table


def score(
    data: Data,
    model: Model,
    each: Annotated[Path | None, typer.Option(help="Write the log-density of each row to this table.")] = None,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Log-likelihood of DATA under MODEL, in nats, and its AIC and BIC."""
    from emalgam.mixture import LogLikelihood
    from emalgam.model_file import load_model

    check_table(each, data, model)
    mixture, (x, _) = load_model(model), open_here(data)
    how: dict[str, Any] = {"backend": backend, "algorithm": algorithm, "n_threads": threads}
    if each is None:
        found = LogLikelihood.of(mixture, x, **how)
    else:
        log_prob = mixture.log_prob(x, **how)
        write_table(each, log_prob, name="log_prob")
        found = LogLikelihood(float(log_prob.sum()), float(len(log_prob)))
    sizes = {"n_samples": int(found.weight), "n_components": mixture.n_components, "n_parameters": mixture.n_parameters}
    print_report(sizes | criteria(mixture, found) | {"each": each}, as_json)


def predict(
    data: Data,
    model: Model,
    output: TableToWrite,
    proba: Annotated[bool, typer.Option("--proba", help="Write the probability of every component instead.")] = False,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The component that each row of DATA most probably came from."""
    from emalgam.model_file import load_model

    check_table(output, data, model)
    mixture = load_model(model)
    assign = mixture.responsibilities if proba else mixture.predict
    assigned = assign(open_here(data)[0], backend=backend, algorithm=algorithm, n_threads=threads)
    write_table(output, assigned, name="probability" if proba else "label")
    labels = assigned.argmax(axis=1) if proba else assigned
    counts = np.bincount(labels, minlength=mixture.n_components).tolist()
    print_report({"n_samples": len(assigned), "rows_per_component": counts, "output": output}, as_json)


def sample(
    model: Model,
    output: TableToWrite,
    n_samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Rows to draw.")] = 1000,
    labels: Annotated[Path | None, typer.Option(help="Write the component of each row to this table.")] = None,
    draw: Annotated[
        Literal["plain", "antithetic", "stratified"],
        typer.Option(help="antithetic: rows in mirrored pairs; stratified: labels in order, in proportion to weights."),
    ] = "plain",
    seed: Seed = 0,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Draw rows from MODEL, in random order but for --draw stratified."""
    from emalgam.model_file import load_model

    check_table(output, model)
    check_table(labels, model, output)
    x, drawn = load_model(model).sample(n_samples, seed, draw=draw, backend=backend, n_threads=threads)
    write_table(output, x)
    if labels is not None:
        write_table(labels, drawn, name="label")
    print_report({"n_samples": len(x), "n_features": x.shape[1], "output": output, "labels": labels}, as_json)


def kl(
    p: Annotated[Path, typer.Argument(help="A model.", show_default=False)],
    q: Annotated[Path, typer.Argument(help="Another one, over the same features.", show_default=False)],
    n_samples: Annotated[int, typer.Option("-n", "--samples", min=30, help="Rows that Monte Carlo draws.")] = 100_000,
    seed: Seed = 0,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Kullback-Leibler divergence of P from Q, in nats, by every estimator."""
    from emalgam import divergence
    from emalgam.model_file import load_model

    pair = load_model(p), load_model(q)
    how: dict[str, Any] = {"backend": backend, "n_threads": threads}
    report: dict[str, Any] = {}
    if all(mixture.n_components == 1 for mixture in pair):
        report["closed_form"] = float(divergence.kl(*pair, **how))
    for name, estimator in (("monte_carlo", "plain"), ("control_variate", "control")):
        found = divergence.kl_monte_carlo(*pair, n_samples=n_samples, estimator=estimator, random_state=seed, **how)
        report |= {name: float(found.value), f"{name}_error": float(found.standard_error)}
    for name in ("variational", "matched", "unscented"):
        report[name] = float(getattr(divergence, f"kl_{name}")(*pair, **how))
    report["product"] = float(divergence.kl_product(*pair, n_threads=threads))  # NumPy, whatever the backend
    bounds = divergence.kl_bounds(*pair, **how)
    print_report(report | {"lower_bound": float(bounds.lower), "upper_bound": float(bounds.upper)}, as_json)
