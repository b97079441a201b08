"""Results on standard output: text, or one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from emalgam.mixture import LogLikelihood, Mixture


def print_report(report: Mapping[str, Any], as_json: bool) -> None:
    """Print a JSON object, or one line for each entry that has a value."""
    if as_json:
        typer.echo(json.dumps({key: _plain(value) for key, value in report.items()}))
    else:
        for key, value in report.items():
            if value is not None:
                print_line(key.replace("_", " "), _text(value))


def print_line(label: str, *texts: object) -> None:
    """Print texts in a column, beside a label."""
    for row, text in enumerate(texts):
        typer.echo(f"{label if row == 0 else '':21} {text}")


def _plain(value: Any) -> Any:
    """A value that JSON has: paths as text, null for what is not finite."""
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def criteria(mixture: Mixture, found: LogLikelihood) -> dict[str, float]:
    """Log-likelihood, AIC and BIC, in nats."""
    return {
        "mean_log_likelihood": found.mean,
        "log_likelihood": found.total,
        "aic": found.aic(mixture.n_parameters),
        "bic": found.bic(mixture.n_parameters),
    }
