"""One pass of a way to compute on the device, from NumPy to NumPy, and what its results have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch

from emalgam_kernels import Direct, Packed
from emalgam_kernels.numba_cuda import device, direct, fused, products
from emalgam_kernels.numba_cuda.problem import DirectProblem, Frame, PackedProblem, Results, Sums
from tests import oracles
from tests.kernels.problems import Problem, assert_within, random_mixture, sample
from tests.tolerances import EPS, tolerance

ARITHMETICS = [("float64", "float64"), ("float32", "float32"), ("float32", "float64")]
SMALLEST = {"float64": 1e-300, "float32": 1e-36}  # below this a responsibility may be zero instead

Run = Callable[..., None]


@dataclass(frozen=True)
class Way:
    """A way to compute a pass; with the fixture `small`, `rows` are several tiles or chunks and a rest, `fewer` two."""

    run: Run
    algorithm: str
    rows: int
    fewer: int


TILES = fused.BLOCKS_PER_MULTIPROCESSOR * fused.ROWS_OF_A_TILE[0] + 5
CHUNKS = 5 * products.COLUMN_STEP - 10, 3 * products.COLUMN_STEP - 10
WAYS = {
    "fused": Way(fused.run, "packed", TILES, TILES),
    "products": Way(products.run, "packed", *CHUNKS),
    "direct": Way(direct.run, "direct", *CHUNKS),
}


@contextmanager
def current_device() -> Iterator[torch.device]:
    """Where the tests compute."""
    place = device.default_device()
    with device.on(place):
        yield place


def on_device(parameters: Packed | Direct, hard: bool = False, tf32: bool = False) -> PackedProblem | DirectProblem:
    """Parameters as tensors; the shift in two parts, high = float32(shift) and low = float32(shift − high)."""
    place, real = device.default_device(), np.dtype(parameters.arithmetic)

    def send(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, real, order="C")).to(place)

    high = parameters.shift.astype(real)
    frame = Frame(send(np.stack([high, (parameters.shift - high).astype(real)])), send(parameters.scale))
    kind, arithmetic = parameters.feature_map, parameters.arithmetic
    if isinstance(parameters, Packed):
        whitening = None if parameters.whitening is None else send(parameters.whitening)
        return PackedProblem(kind, arithmetic, tf32, frame, whitening, send(parameters.natural), hard)
    factors = parameters.precisions_cholesky
    shared = factors.strides[0] == 0
    means, constants = send(parameters.means), send(parameters.log_constants)
    return DirectProblem(kind, arithmetic, frame, means, send(factors[:1] if shared else factors), constants, hard)


@dataclass(frozen=True, eq=False)
class Found:
    """The results of a pass as NumPy arrays; None for those that were not wanted."""

    log_prob: np.ndarray | None
    responsibilities: np.ndarray | None
    statistics: np.ndarray | None
    total: np.ndarray | None

    def assert_same_bits(self, other: Found) -> None:
        """Every result that both have."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None:
                np.testing.assert_array_equal(mine, theirs, field.name)


def one_pass(
    run: Run,
    x: np.ndarray | torch.Tensor,
    weight: np.ndarray | None,
    parameters: Packed | Direct,
    hard: bool = False,
    wanted: str = "log_prob responsibilities statistics",
    start: float = 0.0,
) -> Found:
    """What `run` finds; the strides of `x` are kept, S and the total begin at `start`."""
    real, K, F = device.REALS[parameters.arithmetic], parameters.n_components, parameters.n_statistics
    with current_device() as place:

        def result(name: str, *shape: int) -> torch.Tensor | None:
            return torch.full(shape, float("nan"), dtype=real, device=place) if name in wanted.split() else None

        n = len(x)
        begun = Sums(*(torch.full(shape, start, dtype=torch.float64, device=place) for shape in ((K, F), (1,))))
        sums = begun if "statistics" in wanted.split() else None
        results = Results(result("log_prob", n), result("responsibilities", n, K), sums)
        rows = x if isinstance(x, torch.Tensor) else torch.from_numpy(x).to(place)
        omega = None if weight is None else torch.from_numpy(weight).to(place, real)
        run(rows, omega, on_device(parameters, hard), results)
    found = (results.log_prob, results.responsibilities, sums and sums.statistics, sums and sums.total)
    return Found(*(None if each is None else each.cpu().numpy() for each in found))


def make(covariance_type: str, dtype: str, algorithm: str, N: int, D: int, K: int, spread: float = 3.0) -> Problem:
    """A problem of a given size."""
    rng = np.random.default_rng([N, D, K])
    mixture = random_mixture(rng, K, D, covariance_type, spread)
    return Problem(sample(rng, mixture, N, dtype), mixture, algorithm)


def assert_right(given: Problem, arithmetic: str, found: Found) -> None:
    """Soft results with `given.weight` are within the tolerances; log p and r of rows of weight zero are anyone's."""
    assert found.log_prob is not None
    assert found.responsibilities is not None
    assert found.statistics is not None
    assert found.total is not None

    def bound(operation: str) -> float:
        return tolerance(f"{given.algorithm} {operation}", arithmetic)

    live = given.weight > 0
    limit = bound("log_prob") * given.log_prob_scale
    assert_within(found.log_prob[live], given.log_prob[live], limit[live], "log p(x_n)")
    scale = given.logit_scale + given.log_prob_scale[:, None]
    limit = given.responsibilities * bound("responsibilities") * scale + SMALLEST[arithmetic]
    assert_within(found.responsibilities[live], given.responsibilities[live], limit[live], "r_nk")
    truth, scale = given.weighted_statistics
    assert_within(found.statistics, truth, bound("em_statistics") * scale + SMALLEST[arithmetic], "S")
    limit = bound("log-likelihood") * (given.weight @ given.log_prob_scale)
    assert_within(found.total[0], given.weight @ given.log_prob, limit, "Σ ω log p")


def assert_right_when_hard(given: Problem, arithmetic: str, found: Found) -> None:
    """Results of hard assignment with `given.weight`, for data of which no row could go to either of two components."""
    assert found.statistics is not None
    assert found.total is not None
    scale = given.logit_scale.max(axis=1)
    error = tolerance(f"{given.algorithm} log_prob", arithmetic) * scale
    second = np.sort(given.logits, axis=1)[:, -2]
    assert (given.logits.max(axis=1) - second > 2 * error).all(), "a row that could go to either of two components"
    truth, absolute = given.hard_statistics
    rounding = 4 * EPS[arithmetic] + tolerance("order of a sum", arithmetic) * float(len(given.x)) ** 0.5
    assert_within(found.statistics, truth, rounding * absolute, "S of hard assignment")
    limit = tolerance(f"{given.algorithm} log-likelihood", arithmetic) * (given.weight @ scale)
    assert_within(found.total[0], given.weight @ given.logits.max(axis=1), limit, "Σ ω max L")
    expected = oracles.hard_responsibilities(given.logits)
    if found.responsibilities is not None:
        live = given.weight > 0
        np.testing.assert_array_equal(found.responsibilities[live], expected[live])
