"""Very many fits on a GPU: fits per second from main memory and from the device, and whether they are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

import emalgam
from bench.gpu_clock import Run
from bench.many_fits import ITERATIONS, WORKS, Work, problems
from bench.tables import milliseconds, number, table
from emalgam_kernels import load
from emalgam_kernels.batch import Mixtures, Outcomes, Problems, Settings

DTYPES: Final = ("float64", "float32")
DRY: Final = (Work(5, 40, 2, 2, 1, 0),)
DRY_ITERATIONS: Final = 2
JUDGED: Final = 50  # problems that the reference fits, too


@dataclass(frozen=True)
class Figure:
    """One work in one dtype.

    Attributes
    ----------
    work : Work
    dtype : str
    iterations : int
        Of each fit.
    kernel : float
        Seconds with samples and results on the device.
    whole : float
        Seconds of `emalgam.fit_many` from main memory and back.
    error : float
        Largest relative difference of a log-likelihood from the reference's.
    same_bits : bool
        Whether two runs return the same bits.
    """

    work: Work
    dtype: str
    iterations: int
    kernel: float
    whole: float
    error: float
    same_bits: bool

    def cells(self) -> list[str]:
        """A row of the table."""
        rates = [number(self.work.B / seconds) for seconds in (self.kernel, self.whole)]
        spans = [milliseconds(seconds) for seconds in (self.kernel, self.whole)]
        return [str(self.work), self.dtype, *spans, *rates, f"{self.error:.1e}", "yes" if self.same_bits else "**no**"]


def measure(run: Run) -> list[Figure]:
    """Both works in both dtypes."""
    found = []
    for work in DRY if run.dry else WORKS:
        x = problems(work)
        for dtype in DTYPES:
            found.append(figure(work, x.astype(dtype), run))
            run.free()
    return found


def figure(work: Work, x: np.ndarray, run: Run) -> Figure:
    """One row."""
    iterations = DRY_ITERATIONS if run.dry else ITERATIONS
    settings = {"max_iter": iterations, "tol": 0.0}

    def whole(some: int = work.B, backend: str = "numba_cuda") -> emalgam.ManyFits:
        return emalgam.fit_many(x[:some], work.K, random_state=0, backend=backend, **settings)

    on_device = prepared(work, x, run)
    results = [fitted(work, on_device, settings, run) for _ in range(2)]
    judged = min(JUDGED, work.B)
    expected = whole(judged, "reference").log_likelihood
    error = np.abs(whole(judged).log_likelihood / expected - 1).max()
    return Figure(
        work, x.dtype.name, iterations,
        run.seconds(lambda: fitted(work, on_device, settings, run)), run.wall(whole), float(error),
        all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and bool(results[0][2].isfinite().all()),
    )  # fmt: skip


def prepared(work: Work, x: np.ndarray, run: Run) -> Problems:
    """The problems with their samples on the device."""
    rows: Any = torch.as_tensor(x.reshape(-1, work.D), device=run.device)
    return Problems(rows, np.arange(work.B + 1) * work.N, None, None, np.arange(work.B, dtype=np.uint64))


def fitted(work: Work, given: Problems, settings: dict[str, Any], run: Run) -> tuple[torch.Tensor, ...]:
    """The kernel, with results on the device: weights, means, log-likelihoods."""
    B, K = work.B, work.K
    counts = np.full(B, K)
    mixtures, outcomes = (
        sent(each, run) for each in (Mixtures.empty("full", B, K, given.n_features), Outcomes.empty(B))
    )
    load("numba_cuda", "batch").fit_many(given, Settings("full", counts, counts, **settings), mixtures, outcomes)
    return mixtures.weights, mixtures.means, outcomes.log_likelihood


def sent(results: Any, run: Run) -> Any:
    """`Mixtures` or `Outcomes` with tensors on the device in place of arrays."""
    names = [name for name in results.__slots__ if name != "covariance_type"]
    arrays = {name: torch.as_tensor(getattr(results, name), device=run.device) for name in names}
    return type(results)(**{name: arrays.get(name, getattr(results, name)) for name in results.__slots__})


# ---- the report

NOTE: Final = """Milliseconds and fits per second, full covariances, k-means++ and {iterations} iterations in each fit.
"device": samples and results stay there, by CUDA events; "whole": `emalgam.fit_many` of NumPy arrays, by the wall
clock. "error" is the largest relative difference of a log-likelihood from the reference's.

"""


def text(found: list[Figure]) -> str:
    """The section."""
    header = ["work", "dtype", "device", "whole", "fits/s, device", "fits/s, whole", "error", "same bits"]
    return NOTE.format(iterations=found[0].iterations) + table(header, [each.cells() for each in found])
