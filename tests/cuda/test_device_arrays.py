"""Fits and queries on data that lie on the device: the CPU's results, beside the data, and one wait an iteration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import emalgam
from emalgam import em, initialization
from emalgam.namespace import beside, to_host
from emalgam.observations import Observations
from emalgam_kernels.numba_cuda import device, mixture, staging
from tests.conftest import COVARIANCE_TYPES, ON_A_GPU, SIMULATED
from tests.samples import blobs, start

N = 40 if SIMULATED else 3000
every_type = pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def on_device(x: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(x).to(device.default_device())


def data(dtype: str = "float64", D: int = 2, K: int = 3) -> tuple[np.ndarray, np.ndarray]:
    x, centres = blobs(N, D, K)
    return x.astype(dtype), centres


def quiet_fit(x: Any, K: int, **how: Any) -> emalgam.Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        return emalgam.fit(x, K, random_state=0, **how)


def assert_same(found: emalgam.Fit, expected: emalgam.Fit, dtype: str) -> None:
    tolerance = {"float64": 1e-8, "float32": 2e-4}[dtype]
    assert found.n_iter == expected.n_iter
    np.testing.assert_allclose(found.lower_bounds, expected.lower_bounds, rtol=0, atol=tolerance)
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(
            getattr(found.mixture, name), getattr(expected.mixture, name), rtol=tolerance, atol=tolerance, err_msg=name
        )


@every_type
@every_dtype
def test_fit_from_given_parameters(covariance_type: str, dtype: str) -> None:
    x, centres = data(dtype)
    how = {"covariance_type": covariance_type, "max_iter": 3, "tol": 0.0, **start(centres, covariance_type)}
    found = quiet_fit(on_device(x), 3, **how)
    assert (found.backend, found.arithmetic) == ("numba_cuda", dtype)
    assert_same(found, quiet_fit(x, 3, backend="reference", **how), dtype)


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
@pytest.mark.parametrize("weighted", [False, True])
def test_initializations(init_params: str, weighted: bool) -> None:
    """The same random numbers give the same start as on the CPU."""
    x, _ = data()
    weight = np.random.default_rng(1).integers(0, 3, N).astype(float) if weighted else None
    how = {"max_iter": 2, "init_params": init_params}
    there = None if weight is None else on_device(weight)
    found = quiet_fit(on_device(x), 3, sample_weight=there, **how)
    assert_same(found, quiet_fit(x, 3, sample_weight=weight, backend="reference", **how), "float64")


@pytest.mark.parametrize("init_params", ["random", "random_from_data"])
def test_random_starts_are_drawn_beside_the_data(init_params: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host learns of blocks, seeds and sums; nothing that it is sent, or sends, is as long as the data."""
    lengths, rows = [], math.isqrt(N) + 10  # of a block: more than there are blocks

    def counted(array: Any) -> Any:
        lengths.append(array.shape[0])
        return array

    monkeypatch.setattr(initialization, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(initialization, "to_host", lambda array: counted(to_host(array)))
    monkeypatch.setattr(initialization, "beside", lambda array, other: beside(counted(array), other))
    x, _ = data()
    weight, covariance = np.random.default_rng(1).integers(0, 3, N).astype(float), em.COVARIANCES["full"]
    there, here = (Observations.of(*each, covariance) for each in ((on_device(x), on_device(weight)), (x, weight)))
    starts = [
        initialization.INITIALIZATIONS[init_params](each, covariance, 3, np.random.default_rng(2))
        for each in (there, here)
    ]
    np.testing.assert_allclose(*starts, rtol=1e-12, atol=1e-12)
    assert 0 < max(lengths) <= rows < N


def test_initialization_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emalgam.initialization.FEWEST_ROWS_OF_A_SAMPLE", 8)
    monkeypatch.setattr("emalgam.initialization.ROWS_PER_COMPONENT", 8)
    monkeypatch.setattr("emalgam.initialization.ROWS_AT_ONCE", 16)
    x, _ = data()
    assert_same(quiet_fit(on_device(x), 3, max_iter=2), quiet_fit(x, 3, max_iter=2, backend="reference"), "float64")


@pytest.mark.parametrize(
    ("separation", "ladder"),
    [(3.0, ("packed", "float32")), (300.0, ("packed", "float64")), (1e5, ("direct", "float64"))],
)
def test_ladder(separation: float, ladder: tuple[str, str]) -> None:
    """float32, then float64 arithmetic on the float32 data, then direct: as on the CPU."""
    rng = np.random.default_rng(0)
    centres = np.array([[-1.0, 0.0], [1.0, 0.5]]) * separation
    x = (centres[rng.integers(0, 2, N)] + rng.normal(size=(N, 2))).astype(np.float32)
    how = {"max_iter": 2, "tol": 0.0, "reg_covar": 0.0, **start(centres, "full")}
    found, expected = quiet_fit(on_device(x), 2, **how), quiet_fit(x, 2, backend="reference", **how)
    assert (found.algorithm, found.arithmetic) == (expected.algorithm, expected.arithmetic) == ladder
    assert_same(found, expected, "float32")


@pytest.mark.parametrize("policy", ["regularize", "reseed", "error"])
def test_a_collapse_is_handled_on_the_host(policy: str) -> None:
    """Half of the rows are one point: the M-step on the device reports it, and the policy decides as on the CPU."""
    x, _ = data()
    x[: N // 2] = 50.0
    how = {
        "reg_covar": 0.0,
        "on_degenerate": policy,
        "max_iter": 4,
        "tol": 0.0,
        **start(np.array([[50.0, 50.0], x[-1], x[-2]]), "full"),
    }
    if policy == "error":
        for place in (on_device(x), x):
            with pytest.raises(emalgam.DegenerateComponentError, match="component 0 collapsed"):
                quiet_fit(place, 3, **how)
        return
    found, expected = quiet_fit(on_device(x), 3, **how), quiet_fit(x, 3, backend="reference", **how)
    np.testing.assert_allclose(found.mixture.means, expected.mixture.means, rtol=1e-5, atol=1e-5)


@every_type
@pytest.mark.parametrize("policy", ["regularize", "reseed", "error"])
def test_one_wait_an_iteration(covariance_type: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two passes the host learns four numbers in one transfer, and asks for nothing else."""
    transfers = []

    def counted(array: Any) -> np.ndarray:
        transfers.append(tuple(array.shape))
        return to_host(array)

    def unexpected(_: Any) -> Any:
        raise AssertionError("the host does the M-step")

    x, centres = data()
    monkeypatch.setattr(em, "to_host", counted)
    monkeypatch.setattr(em.Moments, "on_host", unexpected)
    how = {"covariance_type": covariance_type, "on_degenerate": policy, **start(centres, covariance_type)}
    quiet_fit(on_device(x), 3, max_iter=5, tol=0.0, **how)
    assert transfers == [(4,)] * 5


@every_type
def test_narrow_components_are_those_of_the_host(covariance_type: str) -> None:
    """As wide as the data, flat in one direction, almost flat, a point; one feature of the data is flat as well."""
    covariance, rng = em.COVARIANCES[covariance_type], np.random.default_rng(0)
    total, floor = np.diag([1.0, 2.0, 3.0, 0.0]), np.full(4, 1e-6)
    wide = rng.normal(size=(20, 4)) * [1, 1, 1, 0]
    flat = wide.copy()
    flat[:, 0] = -flat[:, 1] - flat[:, 2] if covariance_type == "full" else 0
    some = np.array([rows.T @ rows / 20 for rows in (wide, flat, flat + 1e-2 * wide, 0 * wide)])
    estimate = {
        "full": some,
        "tied": some[0],
        "diag": np.einsum("kii->ki", some),
        "spherical": np.einsum("kii->k", some) / 4,
    }[covariance_type]
    expected = covariance.narrow(estimate, total, floor)
    found = covariance.narrow(*(on_device(each) for each in (estimate, total, floor)))
    np.testing.assert_array_equal(to_host(found), expected)
    narrow = {"full": [False, True, False, True], "tied": [False], "spherical": [False, False, False, True]}
    assert expected.tolist() == narrow.get(covariance_type, [False, True, False, True])


@pytest.mark.skipif(not ON_A_GPU, reason="only a GPU can tell who waits")
@every_type
@pytest.mark.parametrize("policy", ["regularize", "error"])
@pytest.mark.parametrize("algorithm", ["packed", "direct"])
def test_nothing_else_waits(covariance_type: str, algorithm: str, policy: str) -> None:
    """torch itself raises at any synchronisation between the parameters and the four numbers."""
    x, centres = data()
    tensor = on_device(x)
    covariance = em.COVARIANCES[covariance_type]
    observations = Observations.of(tensor, None, covariance)
    settings, rng = em.Settings(algorithm=algorithm, on_degenerate=policy), np.random.default_rng(0)
    restart = em._RestartOnGpu(observations, covariance, 3, settings, rng, 0)
    given = em.given_parameters(covariance, 3, observations.frame, *start(centres, covariance_type).values())
    components = restart.first(given)
    how = restart.evaluation(em.Cancellation.of(covariance, components))
    components = components.beside(tensor)

    def iteration() -> None:
        parameters = em.parameters_of(covariance, components, restart.frame, how)
        statistics, _ = observations.statistics(parameters)
        moments = covariance.moments(statistics, components, how.algorithm)
        following, _ = restart.m_step.update_where_it_lies(moments, components, how.algorithm)
        for scalar in em.Cancellation.scalars(covariance, following):
            scalar()

    iteration()  # compiles, and fills what is kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_type
@every_dtype
def test_estimator_end_to_end(covariance_type: str, dtype: str) -> None:
    x, _ = data(dtype)
    tensor = on_device(x)
    pytest.importorskip("sklearn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = emalgam.GaussianMixture(3, covariance_type=covariance_type, max_iter=3, random_state=0).fit(tensor)
    assert model.backend_ == "numba_cuda"
    for method in ("score_samples", "predict_proba", "predict"):
        result = getattr(model, method)(tensor)
        assert isinstance(result, torch.Tensor), method
        assert result.device == tensor.device
        expected = getattr(model.mixture_, {"score_samples": "log_prob", "predict_proba": "responsibilities"}.get(
            method, method
        ))(x, backend="reference")  # fmt: skip
        np.testing.assert_allclose(to_host(result), expected, atol=1e-3 if dtype == "float32" else 1e-9)
    assert model.predict_proba(tensor).dtype == tensor.dtype
    assert model.score(tensor) == pytest.approx(model.mixture_.log_prob(x, backend="reference").mean(), abs=1e-3)
    assert model.bic(tensor) == pytest.approx(model.mixture_.bic(x, backend="reference"), rel=1e-5)
    assert isinstance(model.means_, np.ndarray)


def test_layouts_and_types() -> None:
    """Transposed, strided, reversed columns, half precision, integers: read where they lie, same answer."""
    x = (np.round(data()[0] * 4) / 4).astype(np.float32)  # exact in half precision
    mixture = emalgam.Mixture([0.5, 0.5], [[0.0, 0.0], [1.0, 2.0]], np.array([np.eye(2), 2 * np.eye(2)]))
    expected = mixture.log_prob(x, backend="reference")
    tensor = on_device(x)
    wide = torch.zeros((N, 7), dtype=tensor.dtype, device=tensor.device)
    wide[:, 1::4] = tensor
    layouts = {
        "contiguous": tensor,
        "transposed": tensor.T.contiguous().T,
        "strided": wide[:, 1::4],
        "half": tensor.half(),
        "double": tensor.double(),
    }
    for name, layout in layouts.items():
        np.testing.assert_allclose(to_host(mixture.log_prob(layout)), expected, atol=1e-4, err_msg=name)
    integers = mixture.log_prob(np.round(x), backend="reference")
    np.testing.assert_allclose(to_host(mixture.log_prob(tensor.round().int())), integers, atol=1e-9)


def test_rows_far_away_are_evaluated_again() -> None:
    mixture = emalgam.Mixture([0.5, 0.5], [[0.0, 0.0], [3.0, 1.0]], np.array([np.eye(2), 2 * np.eye(2)]))
    x = np.array([[0.0, 0.0], [1e5, -1e5], [1e200, 1e200]])
    expected = mixture.log_prob(x, backend="reference")
    np.testing.assert_allclose(to_host(mixture.log_prob(on_device(x))), expected, rtol=1e-13)
    np.testing.assert_allclose(to_host(mixture.responsibilities(on_device(x))).sum(axis=1), 1.0)
    assert to_host(mixture.predict(on_device(x))).tolist() == mixture.predict(x, backend="reference").tolist()


@pytest.mark.parametrize("at_once", [2**26, 16])
def test_labels_in_few_launches(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at once as responsibilities may take memory, however few a thread of the host would take."""
    monkeypatch.setattr("emalgam.mixture.ROWS_AT_ONCE", 1)
    monkeypatch.setattr("emalgam.mixture.ELEMENTS_ON_A_GPU", at_once)
    passes: list[int] = []

    def counted(x: Any, *arguments: Any) -> None:
        passes.append(len(x))
        run(x, *arguments)

    run = mixture.run
    monkeypatch.setattr(mixture, "run", counted)
    x, _ = data()
    two = emalgam.Mixture([0.5, 0.5], [[0.0, 0.0], [1.0, 2.0]], np.array([np.eye(2), 2 * np.eye(2)]))
    found = to_host(two.predict(on_device(x)))
    assert len(passes) == -(-2 * N // at_once)
    np.testing.assert_array_equal(found, two.predict(x, backend="reference"))


# ---- main memory


@pytest.mark.parametrize("resident", [True, False])
@every_dtype
def test_numpy_data(resident: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With backend="numba_cuda" they go to the device once if they fit, else in pieces in every pass."""
    if not resident:
        monkeypatch.setattr(mixture, "free_bytes", lambda _: 0)
    monkeypatch.setattr(staging, "PIECE_BYTES", 400)
    x, centres = data(dtype)
    weight = np.random.default_rng(1).integers(0, 3, N).astype(float)
    how = {"max_iter": 3, "tol": 0.0, "sample_weight": weight, **start(centres, "full")}
    seen = Observations.of(x, weight, em.COVARIANCES["full"], "numba_cuda")
    assert isinstance(seen.x, torch.Tensor) is resident
    found = quiet_fit(x, 3, backend="numba_cuda", **how)
    assert found.backend == "numba_cuda"
    assert_same(found, quiet_fit(x, 3, backend="reference", **how), dtype)
    log_prob = found.mixture.log_prob(x, backend="numba_cuda")
    assert isinstance(log_prob, np.ndarray)
    np.testing.assert_allclose(log_prob, found.mixture.log_prob(x, backend="reference"), atol=1e-3)
    r = found.mixture.responsibilities(x, backend="numba_cuda")
    np.testing.assert_allclose(r, found.mixture.responsibilities(x, backend="reference"), atol=1e-3)


@pytest.mark.parametrize("kind", ["int", "big-endian", "strided", "memory-mapped", "half"])
def test_pieces_of_any_layout(kind: str, tmp_path: Any) -> None:
    x = np.round(data()[0])
    np.save(tmp_path / "x.npy", x)
    array = {
        "int": x.astype(np.int32),
        "big-endian": x.astype(">f8"),
        "strided": np.repeat(x, 2, axis=1)[::-1, ::2],
        "memory-mapped": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "half": x.astype(np.float16),
    }[kind]
    inbound = staging.Inbound(array, 7, device.default_device(), 2)
    found = np.concatenate([to_host(piece).copy() for piece in inbound.pieces()])
    np.testing.assert_array_equal(found, array.astype(np.float64))
    out = np.zeros(array.shape)
    outbound = staging.Outbound(out, 7, device.default_device(), 2)
    for first in range(0, N, 7):
        outbound.put(first, on_device(found[first : first + 7]))
    outbound.finish()
    np.testing.assert_array_equal(out, found)


@every_type
@every_dtype
def test_mixed_precision_ends_in_float64(covariance_type: str, dtype: str) -> None:
    x, centres = data(dtype)
    how = {"covariance_type": covariance_type, "tol": 1e-3, "precision": "mixed", **start(centres, covariance_type)}
    found = quiet_fit(on_device(x), 3, **how)
    expected = quiet_fit(x, 3, backend="reference", **how)
    assert found.converged
    assert (found.arithmetic, expected.arithmetic) == ("float64", "float64")
    assert found.float32_iterations == expected.float32_iterations > 0
    assert found.n_iter > found.float32_iterations
    assert_same(found, expected, "float32")


# ---- what is refused


def test_tf32_is_for_float32_on_the_device() -> None:
    x, centres = data("float32")
    how = {"max_iter": 2, "precision": "tf32", **start(centres, "full")}
    found = quiet_fit(on_device(x), 3, **how)
    assert found.arithmetic == "tf32"
    assert found.error_bound > 1e3 * quiet_fit(on_device(x), 3, **{**how, "precision": "strict"}).error_bound
    for wrong, message in (
        ((x, "cython_cpu"), "precision is 'tf32', .* these are float32 on cython_cpu"),
        ((on_device(x).double(), "auto"), "precision is 'tf32', .* these are float64 on numba_cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet_fit(wrong[0], 3, backend=wrong[1], **how)


def allow(how: str) -> None:
    """Let products round to TF32, or forbid it, in one of the ways that torch has."""
    if how.startswith("allow_tf32"):
        torch.backends.cuda.matmul.allow_tf32 = how.endswith("True")
    elif how in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(how)
    elif how == "everywhere":
        torch.backends.fp32_precision = "tf32"
    else:
        torch.backends.cuda.matmul.fp32_precision = how


def settings() -> list[Any]:
    """What torch says about TF32, refusals included."""

    def answer(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError:
            return "refused"

    backends = torch.backends
    return [
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.fp32_precision,
        answer(lambda: backends.cuda.matmul.allow_tf32),
        answer(torch.get_float32_matmul_precision),
    ]


@pytest.fixture
def torchs_own_settings() -> Iterator[None]:
    """What torch starts with, before and after."""

    def reset() -> None:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.mark.usefixtures("torchs_own_settings")
@pytest.mark.parametrize("before", ["", "high", "allow_tf32 = True", "ieee"])
@pytest.mark.parametrize(
    "how",
    ["none", "ieee", "tf32", "allow_tf32 = True", "allow_tf32 = False", "highest", "high", "medium", "everywhere"],
)
def test_products_are_strict_whatever_the_process_allows(before: str, how: str) -> None:
    """In torch's new way to allow TF32, in its old ones, in one after the other; afterwards all is as it was."""
    for each in (before, how):
        if each:
            allow(each)
    found, setting = settings(), torch.backends.cuda.matmul
    with device.float32_products(False):
        assert (setting.fp32_precision, setting.allow_tf32) == ("ieee", False)
        with device.float32_products(True):
            assert (setting.fp32_precision, setting.allow_tf32) == ("tf32", True)
        assert (setting.fp32_precision, setting.allow_tf32) == ("ieee", False)
    assert settings() == found


def test_nan_on_the_device() -> None:
    x, _ = data()
    x[17, 1] = np.nan
    with pytest.raises(ValueError, match="x contains NaN at row 17, column 1"):
        emalgam.fit(on_device(x), 2)


def test_bad_weights_on_the_device() -> None:
    x, _ = data()
    for value, message in ((-1.0, r"sample_weight is -1.0 at row 4"), (np.inf, "sample_weight contains inf at row 4")):
        weight = np.ones(N)
        weight[4] = value
        with pytest.raises(ValueError, match=message):
            emalgam.fit(on_device(x), 2, sample_weight=on_device(weight))


def test_shapes_and_types_on_the_device() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(5,\); expected two dimensions"):
        emalgam.fit(on_device(np.zeros(5)), 1)
    with pytest.raises(ValueError, match=r"x has dtype torch\.complex64; expected real numbers"):
        emalgam.fit(on_device(np.zeros((5, 2), np.complex64)), 1)
    with pytest.raises(ValueError, match=r"requires a gradient; call x\.detach"):
        emalgam.fit(on_device(np.zeros((5, 2))).requires_grad_(), 1)


def test_mixed_places() -> None:
    x, _ = data()
    with pytest.raises(ValueError, match=r"must be on one device, but x on the GPU .*, sample_weight on the CPU"):
        emalgam.fit(on_device(x), 2, sample_weight=np.ones(N))
    with pytest.raises(ValueError, match="the data are on a GPU and backend 'reference' runs on the CPU"):
        emalgam.fit(on_device(x), 2, backend="reference")


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    x, centres = data()
    monkeypatch.setattr(mixture, "run", full)
    with pytest.raises(MemoryError, match=r"memory does not suffice for a pass .*2.00 GiB.*give a NumPy array"):
        quiet_fit(on_device(x), 3, max_iter=1, **start(centres, "full"))


@pytest.mark.parametrize("direction", [staging.Inbound, staging.Outbound])
def test_no_page_locked_memory_says_what_to_do(direction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises there is not an error of the GPU's memory."""

    def full(*_: Any, pin_memory: bool = False, **__: Any) -> None:
        assert pin_memory is ON_A_GPU
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    piece = on_device(np.zeros((7, 2)))
    monkeypatch.setattr(device.torch, "empty", full)
    message = (
        r"112 bytes of page-locked main memory could not be had \(CUDA error: out of memory\); .*ulimit -l.*cuda\(\)"
    )
    with pytest.raises(MemoryError, match=message):
        direction(np.zeros((N, 2)), 7, device.default_device(), 1).put(0, piece)
