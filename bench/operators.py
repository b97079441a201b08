"""emalgam's torch operator beside torch's own mixture: log-density and all gradients, seconds and memory.

    python -m bench.operators

Both evaluate log p of the same rows and pull a mean back to the rows, weights, means and Cholesky factors, in turns on
torch's threads; values and gradients are compared before anything is timed. Memory is measured in a process for each,
``python -m bench.operators emalgam float32 100000``, by the peak of resident memory that the operating system records.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np

from bench.memory import MEBIBYTE, in_new_process, peak, resident
from bench.peers import load_torch
from bench.tables import Target, Topic, judged, milliseconds, number, say, size, table
from bench.turns import in_turns, timed

N, D, K = 100_000, 16, 64
SMOKE_N: Final = 2_000
WARM_N: Final = 1_000
ROUNDS: Final = 3
OURS, TORCH = "emalgam", "torch"
CONTENDERS: Final = (OURS, TORCH)
DTYPES: Final = ("float32", "float64")
FASTER: Final = 10.0
MOST_MEMORY: Final = 0.1  # of torch's
# Largest difference of a gradient, of its largest entry; torch's float32 sums over N rows differ by this much.
TOLERANCES: Final = {"float32": 1e-3, "float64": 1e-9}

Tensors = list[Any]


def problem(n_samples: int, dtype: str) -> Tensors:
    """x (N, D), weights, means and Cholesky factors, all requiring gradients; rows are drawn from the mixture."""
    torch = load_torch()
    rng = np.random.default_rng(0)
    weights, means = rng.dirichlet(np.full(K, 5.0)), rng.normal(0, 2, (K, D))
    lower = np.tril(rng.normal(0, 0.2, (K, D, D)), -1) + np.eye(D) * rng.uniform(0.7, 1.3, (K, D, 1))
    labels, x = rng.choice(K, n_samples, p=weights), rng.normal(size=(n_samples, D))
    for k in range(K):  # one at a time: what this takes would count as the evaluation's peak
        x[labels == k] = x[labels == k] @ lower[k].T + means[k]
    kind = getattr(torch, dtype)
    return [torch.tensor(each, dtype=kind, requires_grad=True) for each in (x, weights, means, lower)]


def log_prob(contender: str, x: Any, weights: Any, means: Any, lower: Any) -> Any:
    """As their users call them."""
    if contender == OURS:
        from emalgam.nn import mixture_log_prob

        return mixture_log_prob(x, weights, means, lower)
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, scale_tril=lower)).log_prob(x)


def forward_and_backward(contender: str, tensors: Tensors) -> Tensors:
    """The mean log p and its gradients in x, means and Cholesky factors; the one in the weights is computed too.

    torch's categorical distribution divides the weights by their sum before, which makes that one another number.
    """
    for each in tensors:
        each.grad = None
    value = log_prob(contender, *tensors).mean()
    value.backward()
    x, _, means, lower = tensors
    return [value.detach(), x.grad, means.grad, lower.grad.tril()]


def verify(tensors: Tensors, dtype: str) -> None:
    """AssertionError unless both compute the same; this warms up too."""
    found, expected = (forward_and_backward(contender, tensors) for contender in CONTENDERS)
    for name, ours, theirs in zip(("log p", "x", "means", "scale_tril"), found, expected, strict=True):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= TOLERANCES[dtype]:
            raise AssertionError(f"{name} in {dtype} differs by {error:.2g}")


def seconds(dtype: str, n_samples: int, rounds: int) -> dict[str, float]:
    """Medians of both, in turns."""
    tensors = problem(n_samples, dtype)
    verify(tensors, dtype)

    def once(contender: str) -> float:
        return timed(partial(forward_and_backward, contender, tensors))[0]

    found = in_turns({each: partial(once, each) for each in CONTENDERS}, rounds)
    return {contender: median(times) for contender, times in found.items()}


# ---- memory


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: resident before the evaluation, and of the peak."""

    contender: str
    dtype: str
    before: int
    peak: int

    @property
    def beyond(self) -> float:
        """MiB that forward and backward took, gradients included."""
        return (self.peak - self.before) / MEBIBYTE


def memory_here(contender: str, dtype: str, n_samples: int) -> Memory:
    """What one evaluation takes in this process, once it has done a small one."""
    forward_and_backward(contender, problem(WARM_N, dtype))
    tensors = problem(n_samples, dtype)
    before = resident()
    forward_and_backward(contender, tensors)
    return Memory(contender, dtype, before, peak())


def memories(n_samples: int) -> dict[str, dict[str, Memory]]:
    """By dtype and contender, each in a new process."""
    return {
        dtype: {each: Memory(**in_new_process("bench.operators", each, dtype, n_samples)) for each in CONTENDERS}
        for dtype in DTYPES
    }


# ---- writing

NOTE: Final = """Forward and backward of the mean log-density of {size} (rows, features, components), full covariances
given as Cholesky factors: `emalgam.nn.mixture_log_prob` beside torch's `MixtureSameFamily` of `MultivariateNormal`,
with gradients in rows, weights, means and factors, on torch's threads. Memory is the peak of resident memory less what
was resident before, gradients included.

"""


def topic(smoke: bool) -> Topic:
    """Time and memory in both dtypes."""
    n_samples = SMOKE_N if smoke else N
    say("    memory")
    found = memories(n_samples)
    say("    times")
    measured = {dtype: seconds(dtype, n_samples, 1 if smoke else ROUNDS) for dtype in DTYPES}
    where = size(n_samples, D, K)
    targets = [target for dtype in DTYPES for target in _targets(where, dtype, measured[dtype], found[dtype])]
    rows = [row for dtype in DTYPES for row in _rows(dtype, measured[dtype], found[dtype])]
    shown = table(["contender", "dtype", "ms", "MiB"], rows)
    return Topic([f"## The torch operator\n\n{NOTE.format(size=where)}{shown}\n{judged(targets)}"], targets)


def _targets(where: str, dtype: str, measured: dict[str, float], found: dict[str, Memory]) -> Sequence[Target]:
    faster, share = measured[TORCH] / measured[OURS], found[OURS].beyond / found[TORCH].beyond
    return (
        Target(f"forward and backward, {where}, {dtype}: faster than {TORCH}", faster, FASTER, True, " ×"),
        Target(f"forward and backward, {where}, {dtype}: share of {TORCH}'s memory", share, MOST_MEMORY, False),
    )


def _rows(dtype: str, measured: dict[str, float], found: dict[str, Memory]) -> Sequence[Sequence[str]]:
    return [[each, dtype, milliseconds(measured[each]), number(found[each].beyond)] for each in CONTENDERS]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asdict(memory_here(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
    else:
        print("\n".join(topic(smoke=False).sections))
