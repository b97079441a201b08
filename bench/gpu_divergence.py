"""Divergences of Gaussians on a GPU: seconds, beside those of torch.distributions, and how accurate they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from bench.divergence import ALL, PAIRS, gaussians
from bench.gpu_clock import Run
from bench.tables import milliseconds, number, table
from emalgam_kernels import Gaussians, load
from emalgam_kernels.numba_cuda.device import REALS, float32_products

DRY_ALL: Final = (12, 2)
DRY_PAIRS: Final = (40, 2)
TORCH_SHARE: Final = 4  # of the columns of all pairs: torch's memory grows with the number of pairs
JUDGED: Final = 200  # Gaussians whose divergences the CPU computes, too


@dataclass(frozen=True)
class Figure:
    """One work in one dtype. Seconds; `whole` starts from covariances, `prepared` from what a contender keeps.

    Attributes
    ----------
    work, dtype : str
    pairs : int
    whole, prepared : float
        Of the kernels.
    torch_whole, torch_prepared : float
        Of torch.distributions, for as many pairs.
    error : float
        Largest relative difference from the reference in float64.
    same_bits : bool
        Whether two runs return the same bits.
    """

    work: str
    dtype: str
    pairs: int
    whole: float
    prepared: float
    torch_whole: float
    torch_prepared: float
    error: float
    same_bits: bool

    def cells(self) -> list[str]:
        """A row of the table."""
        faster = (self.torch_whole / self.whole, self.torch_prepared / self.prepared)
        rates = (milliseconds(self.whole), milliseconds(self.prepared), number(self.pairs / self.prepared / 1e6))
        theirs = (milliseconds(self.torch_whole), milliseconds(self.torch_prepared))
        bits = "yes" if self.same_bits else "**no**"
        return [
            self.work, self.dtype, *rates, *theirs, *(f"{number(ratio)} ×" for ratio in faster), f"{self.error:.1e}",
            bits,
        ]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What is computed: element by element, or all pairs, of M Gaussians with D features in one dtype."""

    all_pairs: bool
    size: tuple[int, int]
    dtype: str

    def __str__(self) -> str:
        how = "all pairs" if self.all_pairs else "element by element"
        return f"{how}, {self.size[0]} Gaussians, D = {self.size[1]}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return (self.size[0],) * (2 if self.all_pairs else 1)

    def given(self, device: torch.device) -> tuple[Any, Any]:
        """Means and covariances of p and q, on the device."""
        stacks = (gaussians(*self.size, seed=seed) for seed in (0, 1))
        p, q = (tuple(torch.as_tensor(each, dtype=REALS[self.dtype], device=device) for each in s) for s in stacks)
        return p, q


def measure(run: Run) -> list[Figure]:
    """Both works in both dtypes."""
    sizes = ((True, DRY_ALL if run.dry else ALL), (False, DRY_PAIRS if run.dry else PAIRS))
    found = []
    for all_pairs, size in sizes:
        for dtype in ("float64", "float32"):
            found.append(figure(Work(all_pairs, size, dtype), run))
            run.free()
    return found


def figure(work: Work, run: Run) -> Figure:
    """One row."""
    p, q = work.given(run.device)
    ready = prepared(p), prepared(q)
    out = [torch.full(work.shape, torch.nan, dtype=torch.float64, device=run.device) for _ in range(2)]
    for each in out:
        compute(work, *ready, each)
    theirs = torch_seconds(work, p, q, run)
    return Figure(
        str(work),
        work.dtype,
        out[0].numel(),
        run.seconds(lambda: compute(work, prepared(p), prepared(q), out[0])),
        run.seconds(lambda: compute(work, *ready, out[0])),
        *theirs,
        error(work, p, q, out[1]),
        torch.equal(*out) and bool(out[0].isfinite().all()),
    )


# ---- contenders


def prepared(given: Any) -> Gaussians:
    """Gaussians on the device with their factors."""
    factors = torch.empty_like(given[1])
    failed = load("numba_cuda", "kl").precision_factors(given[1], factors)
    if failed >= 0:
        raise ValueError(f"covariance {failed} is not positive definite")
    return Gaussians("full", *given, factors)  # type: ignore[arg-type]


def compute(work: Work, p: Gaussians, q: Gaussians, out: Any) -> None:
    """The kernels."""
    kernels = load("numba_cuda", "kl")
    (kernels.kl_all_pairs if work.all_pairs else kernels.kl_pairs)(p, q, out)


def torch_seconds(work: Work, p: Any, q: Any, run: Run) -> tuple[float, float]:
    """Of torch.distributions for all of the pairs: from covariances, and from distributions that hold their factors."""
    from torch.distributions import MultivariateNormal, kl_divergence

    share = TORCH_SHARE if work.all_pairs else 1
    few = tuple(each[: max(len(each) // share, 1)] for each in q)

    def distribution(given: Any) -> Any:
        return MultivariateNormal(given[0], covariance_matrix=given[1], validate_args=False)

    def divergence(left: Any, right: Any) -> torch.Tensor:
        if work.all_pairs:
            shape = (len(right.loc), len(left.loc))
            right = MultivariateNormal(right.loc[:, None], scale_tril=right.scale_tril[:, None], validate_args=False)
            left, right = left.expand(shape), right.expand(shape)
        found: torch.Tensor = kl_divergence(left, right)
        return found

    with float32_products(tf32=False):
        ready = distribution(p), distribution(few)
        again = run.seconds(lambda: divergence(*ready)) * len(q[0]) / len(few[0])
        return run.seconds(lambda: (distribution(p), distribution(q))) + again, again


def error(work: Work, p: Any, q: Any, found: torch.Tensor) -> float:
    """Largest relative difference of the first divergences from the CPU's reference in float64."""
    some = slice(0, min(JUDGED, work.size[0]))
    stacks = (on_host(each, some) for each in (p, q))
    part = found[some, some] if work.all_pairs else found[some]
    expected, kernels = np.empty(tuple(part.shape)), load("reference", "kl")
    (kernels.kl_all_pairs if work.all_pairs else kernels.kl_pairs)(*stacks, expected)
    return float(np.abs(part.cpu().numpy() / expected - 1).max())


def on_host(given: Any, some: slice) -> Gaussians:
    """Some of the Gaussians in float64, with the reference's factors."""
    means, covariances = (each[some].cpu().numpy().astype(np.float64) for each in given)
    factors = np.empty_like(covariances)
    load("reference", "kl").precision_factors(covariances, factors)
    return Gaussians("full", means, covariances, factors)


# ---- the report

NOTE: Final = """Milliseconds, by CUDA events, everything on the device. "whole" starts from means and covariances,
"prepared" from precision factors (torch: from distributions). torch.distributions computes a quarter of all pairs,
whose seconds count four times. "error" is the largest relative difference from the CPU's reference in float64.

"""


def text(found: list[Figure]) -> str:
    """The section."""
    header = ["work", "dtype", "whole", "prepared", "million pairs/s, prepared", "torch: whole", "prepared"]
    header += ["faster, whole", "faster, prepared", "error", "same bits"]
    return NOTE + table(header, [each.cells() for each in found])
