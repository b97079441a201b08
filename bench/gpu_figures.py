"""A pass and an iteration of EM on a GPU: seconds, beside the competitors' and the floor, and how accurate they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, Final

import numpy as np
import torch

import emalgam
from bench.gpu_clock import Missing, NotMeasuredError, Run, shortened
from bench.gpu_machine import Limits
from bench.problems import SEED, SEPARATION, Case
from bench.tables import describe, milliseconds, say
from bench.torch_em import Plan, TorchEm, tune
from emalgam.covariance import COVARIANCES, Covariance
from emalgam.namespace import beside
from emalgam.observations import Observations
from emalgam.packing import Components, Frame
from emalgam_kernels import Packed, load
from emalgam_kernels.blocks import default_threads
from emalgam_kernels.numba_cuda.device import float32_products
from emalgam_kernels.numba_cuda.mixture import suits_fused


@dataclass(frozen=True)
class Bounds:
    """What an iteration has to be: milliseconds at most, and how many times faster than the plain torch EM."""

    milliseconds: float | None = None
    faster: float | None = None


CASES: Final = {
    Case(2_000_000, 64, 32, "full", "float32"): Bounds(25, 1.5),
    Case(10_000_000, 8, 16, "full", "float32"): Bounds(3, 3),
    Case(1_000_000, 128, 1024, "spherical", "float32"): Bounds(30),
    Case(2_000_000, 32, 64, "full", "float64"): Bounds(40),
    Case(1_000_000, 16, 64, "diag", "float32"): Bounds(),
    Case(1_000_000, 16, 64, "tied", "float32"): Bounds(),
}
DRY_CASES: Final = {
    Case(90, 3, 2, "full", "float32"): Bounds(25, 1.5),
    Case(90, 2, 3, "spherical", "float32"): Bounds(30),
    Case(90, 2, 2, "full", "float64"): Bounds(40),
    Case(70, 3, 2, "diag", "float32"): Bounds(),
    Case(70, 3, 2, "tied", "float32"): Bounds(),
}
MOST_ERROR: Final = {"float32": 1e-3, "float64": 1e-9}  # of a log-density, nats
ROUNDS: Final = 3  # of whole fits
SPAN_SECONDS: Final = 0.3  # by which the longer fit is longer
ROWS_OF_ACCURACY: Final = 4096
NEEDED: Final = 25.0  # seconds that a case may take; none is begun with less
NEEDED_BY_A_COMPETITOR: Final = 15.0
MOST_OF_SCIKIT_LEARN: Final = 10.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's data on the device, where fits begin, and the mixture after three iterations.

    Attributes
    ----------
    case : Case
    x : (N, D) tensor
    start : dict
        `weights_init`, `means_init`, `precisions_init` as NumPy arrays.
    fit : emalgam.Fit
        Of three iterations.
    data : Observations
    """

    case: Case
    x: torch.Tensor
    start: dict[str, np.ndarray]
    fit: Any
    data: Observations

    @property
    def covariance(self) -> Covariance:
        return COVARIANCES[self.case.covariance_type]

    @cached_property
    def on_host(self) -> Components:
        """The mixture in the frame of the data."""
        return self.fit.mixture.components(self.data.frame)

    @cached_property
    def components(self) -> Components:
        """The same on the device."""
        return self.on_host.beside(self.x)

    @cached_property
    def frame(self) -> Frame:
        """The frame, on the device."""
        return Frame(beside(self.data.frame.shift, self.x), beside(self.data.frame.scale, self.x))

    def packed(self, components: Components) -> Packed:
        """Parameters on the device, in the dtype of the data."""
        return self.covariance.packed(components, self.frame, self.case.dtype)

    def run_fit(self, iterations: int) -> Any:
        """So many iterations of emalgam from the start; adds nothing to covariances."""
        K, kind = self.case.K, self.case.covariance_type
        return fit(self.x, K, kind, self.start, iterations)


def fit(x: torch.Tensor, K: int, covariance_type: str, start: dict[str, np.ndarray], iterations: int) -> Any:
    """`emalgam.fit` that ends after `iterations`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        return emalgam.fit(
            x, K, covariance_type=covariance_type, tol=0.0, reg_covar=0.0, max_iter=iterations,
            backend="numba_cuda", **start,
        )  # fmt: skip


# ---- data


def blobs(case: Case, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """`bench.problems.blobs` made on the device: N rows from K Gaussians of unequal weight; and their means (K, D).

    Variances from 1/2 to 2 in any orientation; spherical: the same in all directions.
    """
    N, D, K = case.size
    rng = np.random.default_rng(SEED)
    means = rng.normal(size=(K, D)) * SEPARATION / np.sqrt(2 * D)
    shares = torch.as_tensor(rng.uniform(0.5, 1.5, K), device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = getattr(torch, case.dtype)
    labels = torch.multinomial(shares, N, replacement=True, generator=generator)
    x = torch.randn(N, D, dtype=dtype, device=device, generator=generator)
    for k in range(K):
        rows = (labels == k).nonzero()[:, 0]
        if case.covariance_type == "spherical":
            spread = np.exp2(rng.uniform(-0.5, 0.5)) * np.eye(D)
        else:
            spread = np.exp2(rng.uniform(-0.5, 0.5, D))[:, None] * np.linalg.qr(rng.normal(size=(D, D)))[0]
        there = torch.as_tensor(spread, dtype=dtype, device=device)
        x[rows] = x[rows] @ there + torch.as_tensor(means[k], dtype=dtype, device=device)
    return x, means


def beginning(case: Case, means: np.ndarray) -> dict[str, np.ndarray]:
    """True means moved by about one standard deviation, equal weights, variances 3/2."""
    K, D = means.shape
    rng = np.random.default_rng(SEED + 1)
    precisions = {
        "full": np.tile(np.eye(D), (K, 1, 1)),
        "tied": np.eye(D),
        "diag": np.ones((K, D)),
        "spherical": np.ones(K),
    }[case.covariance_type]
    moved = means + rng.normal(size=means.shape) / np.sqrt(D)
    return {"weights_init": np.full(K, 1 / K), "means_init": moved, "precisions_init": precisions / 1.5}


def prepare(case: Case, run: Run) -> tuple[Problem, float]:
    """The problem, and the seconds by which the first fit took longer than the second: Numba's compilation."""
    x, means = blobs(case, run.device)
    start = beginning(case, means)
    found: list[Any] = []
    seconds = [
        run.wall(lambda: found.append(fit(x, case.K, case.covariance_type, start, 3)))
        for _ in range(1 if run.dry else 2)
    ]
    data = Observations.of(x, None, COVARIANCES[case.covariance_type], "numba_cuda")
    return Problem(case, x, start, found[-1], data), seconds[0] - seconds[-1]


# ---- what is measured of a case


@dataclass(frozen=True)
class Transfer:
    """A pass over rows in main memory: seconds by the wall clock, seconds of one copy from pinned memory and a pass
    after it by CUDA events, and bytes of x.
    """

    rows: int
    seconds: float
    queued: float
    n_bytes: int


@dataclass(frozen=True)
class Torch:
    """The plain torch EM: what the tuning chose, seconds of a pass and of an iteration, and how far Σ log p is off."""

    plan: Plan
    one_pass: float
    iteration: float
    difference: float


@dataclass(frozen=True)
class Figures:
    """Everything about one case; `Missing` says why something is not there. Seconds."""

    case: Case
    bounds: Bounds
    choice: str
    compilation: float
    floor: float | Missing
    one_pass: float | Missing
    iteration: float | Missing
    transfer: Transfer | Missing
    torch: Torch | Missing
    scikit_learn: float | Missing
    error: float | Missing
    same_bits: bool | Missing

    @classmethod
    def without(cls, case: Case, bounds: Bounds, reason: Missing) -> Figures:
        """Nothing but the reason."""
        return cls(case, bounds, str(reason), 0.0, *[reason] * 8)


def measure(case: Case, bounds: Bounds, run: Run, limits: Limits | Missing, reserve: float) -> Figures:
    """One case; what no longer fits into the time that is left but for `reserve` seconds is said to be missing."""

    def attempt(what: str, function: Callable[[], Any], needs: float = 5.0) -> Any:
        found = run.attempt(f"{describe(case)}, {what}", function, 0.0 if run.dry else reserve + needs)
        say(f"    {what}: {found[0] if isinstance(found, tuple) else found}")
        return found

    problem, compilation = prepare(case, run)
    one_pass = attempt("a pass", lambda: seconds_of_a_pass(problem, run))
    known = one_pass if isinstance(one_pass, float) else 0.05
    iterated = attempt("an iteration", lambda: seconds_of_an_iteration(problem, run, known))
    iteration, last = (iterated, problem.fit) if isinstance(iterated, Missing) else iterated
    return Figures(
        case=case,
        bounds=bounds,
        choice=f"{last.algorithm}, {last.arithmetic}, {way(problem)}",
        compilation=compilation,
        floor=limits if isinstance(limits, Missing) else case.flop / limits.products[case.dtype],
        one_pass=one_pass,
        iteration=iteration,
        same_bits=attempt("two runs", lambda: same_bits(problem)),
        error=attempt("accuracy", lambda: error_of_log_prob(problem)),
        torch=attempt("plain torch", lambda: torch_em(problem, run), NEEDED_BY_A_COMPETITOR),
        transfer=attempt("from main memory", lambda: transfer(problem, run)),
        scikit_learn=attempt(
            "scikit-learn",
            lambda: scikit_learn(problem, run, min(run.left - reserve, MOST_OF_SCIKIT_LEARN)),
            NEEDED_BY_A_COMPETITOR,
        ),
    )


def way(problem: Problem) -> str:
    """Which kernels take the packed parameters of a pass."""
    case = problem.case
    whitened = case.covariance_type == "tied"
    return "fused" if suits_fused(case.D, case.K, case.F, case.dtype, whitened, problem.x.device) else "products"


def seconds_of_a_pass(problem: Problem, run: Run) -> float:
    """`em_statistics` on what lies on the device, by its own clock."""
    parameters = problem.packed(problem.components)
    out = problem.components.means.new_empty(problem.case.K, problem.case.F)
    kernels = load("numba_cuda")
    return run.seconds(lambda: kernels.em_statistics(problem.x, None, parameters, out))


def difference(run: Run, work: Callable[[int], Any], iterations: int, rounds: int) -> float:
    """Seconds of one iteration: `work` with 1 + `iterations` less that with 1."""
    found = [run.wall(lambda: work(1 + iterations)) - run.wall(lambda: work(1)) for _ in range(rounds)]
    return median(found) / iterations


def iterations_to_time(run: Run, one_pass: float) -> int:
    """By how many iterations the longer of two fits is longer."""
    return 2 if run.dry else min(max(math.ceil(SPAN_SECONDS / one_pass), 5), 50)


def seconds_of_an_iteration(problem: Problem, run: Run, one_pass: float) -> tuple[float, Any]:
    """`emalgam.fit`, the M-step, the guard and the convergence test included; and the longest fit."""
    fits: list[Any] = []
    seconds = difference(
        run, lambda n: fits.append(problem.run_fit(n)), iterations_to_time(run, one_pass), 1 if run.dry else ROUNDS
    )
    return seconds, max(fits, key=lambda each: each.n_iter)


def same_bits(problem: Problem) -> bool:
    """Whether two passes return the same bits."""
    found = []
    for _ in range(2):
        out = problem.components.means.new_full((problem.case.K, problem.case.F), math.nan)
        parameters = problem.packed(problem.components)
        found.append((out, load("numba_cuda").em_statistics(problem.x, None, parameters, out)))
    (first, total), (second, other) = found
    return torch.equal(first, second) and torch.equal(total, other) and bool(first.isfinite().all())


def error_of_log_prob(problem: Problem) -> float:
    """max |Δ log p| beside the CPU's reference, which computes directly in float64; nats."""
    x, covariance = problem.x[:ROWS_OF_ACCURACY], problem.covariance
    found = torch.empty(len(x), dtype=x.dtype, device=x.device)
    load("numba_cuda").log_prob(x, problem.packed(problem.components), found)
    expected = np.empty(len(x))
    parameters = covariance.direct(problem.on_host, problem.data.frame, "float64")
    load("reference").log_prob(x.cpu().numpy(), parameters, expected, n_threads=default_threads())
    return float(np.abs(found.cpu().numpy() - expected).max())


def transfer(problem: Problem, run: Run) -> Transfer:
    """`em_statistics` on a NumPy array: rows cross the bus while the device computes; and all of them before."""
    kernels, x = load("numba_cuda"), problem.x.cpu()
    parameters = problem.covariance.packed(problem.on_host, problem.data.frame, problem.case.dtype)
    out = np.empty((problem.case.K, problem.case.F))

    def in_pieces() -> float:
        return kernels.em_statistics(x.numpy(), None, parameters, out, n_threads=default_threads())

    in_pieces()
    seconds = median(run.wall(in_pieces) for _ in range(1 if run.dry else ROUNDS))
    pinned, there = x if run.dry else x.pin_memory(), torch.empty_like(problem.x)
    known, place = problem.packed(problem.components), problem.components.means.new_empty(out.shape)

    def at_once() -> None:
        there.copy_(pinned, non_blocking=True)
        kernels.em_statistics(there, None, known, place)

    return Transfer(len(x), seconds, run.seconds(at_once, repeats=ROUNDS, warmups=1), x.nbytes)


# ---- competitors


def torch_em(problem: Problem, run: Run) -> Torch:
    """Plain torch, tuned on this problem; TF32 off."""
    out = problem.components.means.new_empty(problem.case.K, problem.case.F)
    parameters = problem.packed(problem.components)
    total = load("numba_cuda").em_statistics(problem.x, None, parameters, out)
    with float32_products(False):
        plan = tune(problem.x, parameters, lambda work: run.seconds(work, repeats=2, warmups=1))
        em = TorchEm(problem.x, parameters, plan)
        one_pass = run.seconds(lambda: em.statistics(parameters))
        apart = abs(float(em.statistics(parameters)[1] / total) - 1)

        def work(iterations: int) -> None:
            components = problem.components
            for _ in range(iterations):
                components = torch_iteration(problem, em, components)

        iteration = difference(run, work, iterations_to_time(run, one_pass), 1 if run.dry else ROUNDS)
        return Torch(plan, one_pass, iteration, apart)


def torch_iteration(problem: Problem, em: TorchEm, old: Components) -> Components:
    """A pass and the M-step: emalgam's algebra, without its guard and its policies."""
    covariance = problem.covariance
    statistics, total = em.statistics(problem.packed(old))
    moments = covariance.moments(statistics, old, "packed")
    scatter = None if problem.data.scatter is None else beside(problem.data.scatter, problem.x)
    covariances = covariance.estimate(moments, "packed", scatter)
    float(total)  # a test of convergence would need it in every iteration
    factor = covariance.factor(covariances)
    return Components(moments.mass / moments.mass.sum(), moments.means(), covariances, factor)


def scikit_learn(problem: Problem, run: Run, seconds: float) -> float:
    """scikit-learn's GaussianMixture on the tensor, if it takes no more than `seconds`.

    What it raises is a reason why there is no number, not a failure of this run.
    """
    try:
        from sklearn import config_context
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise NotMeasuredError("scikit-learn is not installed") from error
    case = problem.case
    start = {name: torch.as_tensor(value).to(problem.x) for name, value in problem.start.items()}

    def work(iterations: int, x: torch.Tensor = problem.x) -> None:
        GaussianMixture(
            case.K, covariance_type=case.covariance_type, tol=0.0, reg_covar=0.0, max_iter=iterations,
            init_params="random_from_data", random_state=0, **start,
        ).fit(x)  # fmt: skip

    some = problem.x[: max(case.N // 10, 10 * case.K)]
    with config_context(array_api_dispatch=True), warnings.catch_warnings(), float32_products(False):
        warnings.simplefilter("ignore")
        try:
            work(1, some)  # loads and starts what it needs
            tenth = run.wall(lambda: work(2, some))
            rounds = min(int(seconds / (20 * tenth)), 1 if run.dry else ROUNDS)
            found = difference(run, work, 1, rounds) if rounds else None
        except Exception as error:  # whatever it is, the row says so
            raise NotMeasuredError(f"it ended with {shortened(error)}") from error
    if found is None:
        raise NotMeasuredError(f"out of time: two iterations on {len(some)} rows take {milliseconds(tenth)} ms")
    return found
