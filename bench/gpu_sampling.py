"""Samples and Monte Carlo divergences on a GPU: seconds, beside torch and the floor, and whether they are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from bench.gpu_clock import Missing, Run
from bench.gpu_machine import Limits
from bench.gpu_report import cell, ratio, times
from bench.sampling import SEED, STANDARD_ERRORS, D, K, P, Q, torch_mixture
from bench.tables import milliseconds, number, say, table
from emalgam_kernels import load
from emalgam_kernels.numba_cuda.device import float32_products
from emalgam_kernels.parameters import take

DTYPES: Final = ("float32", "float64")
ROWS: Final = 10_000_000
TORCH_ROWS: Final = 1_000_000  # torch draws all K components of a row: K D numbers
ROWS_OF_ACCURACY: Final = 100_000
DRY_ROWS: Final = 64
DRY_TORCH_ROWS: Final = 40
NEEDED: Final = 5.0  # seconds that a dtype may take
MOST_ERROR: Final = {"float32": 1e-5, "float64": 1e-13}  # of a sample, in units of the largest


@dataclass(frozen=True)
class Figures:
    """Samples and divergences in one dtype; seconds of so many rows, `Missing` where there are none.

    `floor` is what the device's copy needs for the bytes that samples and labels have; `error` the largest difference
    of a sample from the reference's, in units of the largest sample; `deviation` that of the divergence from torch's
    estimate, in standard errors.
    """

    dtype: str
    rows: int
    torch_rows: int
    sampling: float | Missing
    floor: float | Missing
    torch_sampling: float | Missing
    divergence: float | Missing
    torch_divergence: float | Missing
    error: float | Missing
    deviation: float | Missing
    same_bits: bool | Missing

    def per_row(self, seconds: float | Missing) -> float | Missing:
        """Seconds of torch for as many rows as emalgam has."""
        return seconds if isinstance(seconds, Missing) else seconds * self.rows / self.torch_rows


def measure(run: Run, limits: Limits | Missing, reserve: float) -> list[Figures]:
    """Every dtype; what no longer fits into the time that is left but for `reserve` seconds is said to be missing."""
    return [_measure(dtype, run, limits, reserve) for dtype in DTYPES]


def _measure(dtype: str, run: Run, limits: Limits | Missing, reserve: float) -> Figures:
    rows, torch_rows = (DRY_ROWS, DRY_TORCH_ROWS) if run.dry else (ROWS, TORCH_ROWS)

    def attempt(what: str, function: Callable[[], Any]) -> Any:
        found = run.attempt(f"sampling, {dtype}, {what}", function, 0.0 if run.dry else reserve + NEEDED)
        say(f"    {dtype}, {what}: {found}")
        return found

    draw, estimate = sampler(dtype, rows, run), estimator(dtype, rows, run)
    n_bytes = rows * (D * getattr(torch, dtype).itemsize + 8)
    found = Figures(
        dtype=dtype,
        rows=rows,
        torch_rows=torch_rows,
        sampling=attempt("samples", lambda: run.seconds(draw)),
        floor=limits if isinstance(limits, Missing) else n_bytes / limits.copy,
        torch_sampling=attempt("torch's samples", lambda: run.seconds(torch_sampler(dtype, torch_rows, run))),
        divergence=attempt("divergence", lambda: run.seconds(estimate)),
        torch_divergence=attempt("torch's divergence", lambda: torch_seconds(dtype, torch_rows, run)),
        error=attempt("accuracy", lambda: error_of_samples(dtype, run)),
        deviation=attempt("divergences", lambda: deviation(estimate(), rows, dtype, torch_rows, run)),
        same_bits=attempt("two runs", lambda: torch.equal(estimate(), estimate())),
    )
    run.free()
    return found


# ---- emalgam


def sampler(dtype: str, rows: int, run: Run) -> Callable[[], torch.Tensor]:
    """Draws into tensors that are there."""
    x = torch.empty(rows, D, dtype=getattr(torch, dtype), device=run.device)
    labels, mixture = torch.empty(rows, dtype=torch.int64, device=run.device), P.sampler

    def draw() -> torch.Tensor:
        load("numba_cuda", "sampling").sample_mixture(mixture, SEED, 0, x, labels)
        return x

    return draw


def estimator(dtype: str, rows: int, run: Run) -> Callable[[], torch.Tensor]:
    """Σ d and Σ d² of log p − log q, which stay on the device."""
    p, q = (replace(each.packed, arithmetic=dtype) for each in (P, Q))
    out = torch.empty((1, 2), dtype=torch.float64, device=run.device)
    pair = [take(each, None) for each in (P.sampler, p, q)]

    def estimate() -> torch.Tensor:
        load("numba_cuda", "sampling").kl_monte_carlo(*pair, SEED, 0, rows, out)
        return out[0].clone()

    return estimate


def error_of_samples(dtype: str, run: Run) -> float:
    """max |Δx| beside the reference; AssertionError if it is too large or a label differs."""
    n = DRY_ROWS if run.dry else ROWS_OF_ACCURACY
    found = sampler(dtype, n, run)().cpu().numpy()
    expected, labels, there = np.empty_like(found), np.empty(n, np.int64), np.empty(n, np.int64)
    load("reference", "sampling").sample_mixture(P.sampler, SEED, 0, expected, labels)
    load("numba_cuda", "sampling").sample_mixture(P.sampler, SEED, 0, found, there)
    if (labels != there).any():
        raise AssertionError(f"{(labels != there).sum()} of {n} labels are not the reference's")
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= MOST_ERROR[dtype]:
        raise AssertionError(f"a sample is off the reference's by {error:.1e} of the largest one")
    return error


def deviation(sums: torch.Tensor, rows: int, dtype: str, torch_rows: int, run: Run) -> float:
    """By how many standard errors the divergence is off torch's; AssertionError beyond `STANDARD_ERRORS`."""
    total, square = sums.tolist()
    ratios = torch_ratios(dtype, torch_rows, run).double()
    variance = square / rows - (total / rows) ** 2
    error = math.sqrt(variance / rows + float(ratios.var()) / torch_rows)
    found = abs(total / rows - float(ratios.mean())) / error
    if not found <= STANDARD_ERRORS:
        raise AssertionError(f"the divergence is off torch's by {found:.1f} standard errors")
    return found


# ---- torch


def torch_sampler(dtype: str, rows: int, run: Run) -> Callable[[], torch.Tensor]:
    """Draws as torch does."""
    mixture = torch_mixture(P, dtype, run.device)
    return lambda: mixture.sample((rows,))


def torch_ratios(dtype: str, rows: int, run: Run) -> torch.Tensor:
    """log p − log q at torch's samples."""
    p, q = (torch_mixture(each, dtype, run.device) for each in (P, Q))
    x = p.sample((rows,))
    return p.log_prob(x) - q.log_prob(x)


def torch_seconds(dtype: str, rows: int, run: Run) -> float:
    """Seconds of torch's estimate, TF32 off."""
    with float32_products(False):
        return run.seconds(lambda: torch_ratios(dtype, rows, run).mean())


# ---- the report


NOTE: Final = f"""A mixture of K = {K} full Gaussians in D = {D} features. Milliseconds by CUDA events: `sample_mixture`
into tensors on the device, and `kl_monte_carlo` against another such mixture. The floor is the time in which the
device's copy moves as many bytes as samples and labels have; "share" is the floor by the time. torch is
`MixtureSameFamily`, which draws all components of every row: on {TORCH_ROWS:,} rows, and its time times as many as
there are more rows. "error" is the largest difference of a sample from the reference's, in units of the largest
sample, with the same labels; "deviation" how far the divergence is from torch's, in standard errors.

"""


def text(found: list[Figures]) -> str:
    """The section of the report."""
    rows = []
    for each in found:
        torch_sampling, torch_divergence = each.per_row(each.torch_sampling), each.per_row(each.torch_divergence)
        rows.append(
            [
                f"{each.rows:,}, {each.dtype}",
                cell(each.sampling, milliseconds),
                cell(each.floor, milliseconds),
                cell(ratio(each.floor, each.sampling), lambda share: f"{100 * share:.0f} %"),
                cell(torch_sampling, milliseconds),
                cell(ratio(torch_sampling, each.sampling), times),
                cell(each.divergence, milliseconds),
                cell(torch_divergence, milliseconds),
                cell(ratio(torch_divergence, each.divergence), times),
                cell(each.error, lambda value: f"{value:.1e}"),
                cell(each.deviation, number),
                cell(each.same_bits, lambda same: "yes" if same else "**no**"),
            ]
        )
    header = ["rows, dtype", "samples", "floor", "share", "torch", "faster"]
    header += ["divergence", "torch", "faster", "error", "deviation", "same bits"]
    return NOTE + table(header, rows)
