"""Choosing a backend: argument, context, environment, automatic; and the errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from typing import ClassVar

import numpy as np
import pytest

import emalgam
import emalgam_kernels
from emalgam import BackendUnavailable, backends


class OnGpu:
    """What an array on a GPU looks like from outside."""

    __cuda_array_interface__: ClassVar = {"shape": (4, 2), "typestr": "<f8", "data": (1, False), "version": 3}


def test_order_of_preference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument > context > environment > automatic."""
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.resolve() == "reference"
    with emalgam.use_backend(backend):
        assert backends.resolve() == backend
        assert backends.resolve("reference") == "reference"
        with emalgam.use_backend("reference"):
            assert backends.resolve() == "reference"
        assert backends.resolve() == backend
    assert backends.resolve() == "reference"


def test_automatic_takes_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    genuine = emalgam_kernels.probe
    absent: set[str] = set()
    monkeypatch.setattr(emalgam_kernels, "probe", lambda name: "gone" if name in absent else genuine(name))
    for name in [b for b in emalgam_kernels.PREFERRED if genuine(b) is None]:
        assert backends.resolve() == name
        absent.add(name)


def test_a_broken_library_is_passed_over_and_its_reason_told(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = emalgam_kernels.load

    def load(name: str) -> object:
        if name == "cython_cpu":
            raise OSError("libm.so.6: version not found")
        return genuine(name)

    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(emalgam_kernels, "probe", lambda name: None)
    monkeypatch.setattr(emalgam_kernels, "load", load)
    assert backends.resolve() != "cython_cpu"
    with pytest.raises(BackendUnavailable, match="importing it failed with OSError: libm"):
        backends.resolve("cython_cpu")


def test_a_mistyped_simd_level_is_no_reason_to_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMALGAM_SIMD", "avx2")
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    with pytest.raises(ValueError, match="environment variable EMALGAM_SIMD is 'avx2'; expected one of v4, v3, base"):
        backends.resolve()


def test_unavailable_says_all_four_things(no_gpu: str) -> None:
    """Which backend, why, the command that installs it, and what is available."""
    with pytest.raises(BackendUnavailable) as caught:
        backends.resolve("numba_cuda")
    text = str(caught.value)
    assert "backend 'numba_cuda' is unavailable" in text
    assert no_gpu in text
    assert 'pip install --upgrade "emalgam[cuda]"' in text
    assert "Available here: reference" in text


@pytest.mark.parametrize("name", ["gpu", "", "Cython_CPU"])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"backend is {name!r}; expected one of auto, reference"):
        backends.resolve(name)
    with pytest.raises(ValueError, match="backend is"), emalgam.use_backend(name):
        pass
    if name:
        monkeypatch.setenv(backends.VARIABLE, name)
        with pytest.raises(ValueError, match=f"environment variable EMALGAM_BACKEND is {name!r}"):
            backends.resolve()


def test_context_of_an_unavailable_backend(no_gpu: str) -> None:
    with (
        pytest.raises(BackendUnavailable, match=f"'numba_cuda' is unavailable: {no_gpu}"),
        emalgam.use_backend("numba_cuda"),
    ):
        pass


def test_context_is_of_one_thread() -> None:
    """Another thread is not affected by somebody's `with`."""
    seen: list[str] = []
    with emalgam.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.resolve()))
        thread.start()
        thread.join()
    assert seen == [backends.resolve()]


@pytest.mark.usefixtures("no_gpu")
def test_data_on_a_gpu_without_its_backend() -> None:
    """Never a silent copy to the CPU."""
    with pytest.raises(BackendUnavailable, match="numba_cuda"):
        emalgam.fit(OnGpu(), 2)
    with pytest.raises(BackendUnavailable, match="numba_cuda"):
        emalgam.GaussianMixture(2).fit(OnGpu())
    with pytest.raises(ValueError, match="the data are on a GPU and backend 'reference' runs on the CPU"):
        emalgam.fit(OnGpu(), 2, backend="reference")


def test_mixed_devices() -> None:
    with pytest.raises(
        ValueError, match="all arrays must be on one device, but x on the CPU, sample_weight on the GPU"
    ):
        emalgam.fit(np.eye(4), 1, sample_weight=OnGpu())
    with pytest.raises(ValueError, match="all arrays must be on one device"):
        emalgam.GaussianMixture(1).fit(np.eye(4), sample_weight=OnGpu())


def test_status_lists_every_backend() -> None:
    listed = backends.status()
    assert [s.name for s in listed] == list(emalgam_kernels.BACKENDS)
    for each in listed:
        assert each.available == (each.reason is None)
        assert each.install.startswith(("pip install", "apt-get install"))


def test_the_fit_ran_where_it_says(backend: str) -> None:
    with emalgam.use_backend(backend):
        assert emalgam.fit(np.random.default_rng(0).normal(size=(50, 2)), 1).backend == backend


HEAVY = ("torch", "dask", "matplotlib", "numba", "sklearn", "scipy", "pyarrow", "typer", "rich", "safetensors")


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import emalgam", ""),
        ("import emalgam; emalgam.fit", ""),
        (
            "import emalgam, numpy as n; emalgam.fit(n.eye(9, 2) + n.ones((9, 1)), 1, backend='reference')",
            "",
        ),
        ("import emalgam; emalgam.load_model", ""),
        ("import emalgam; emalgam.plot", ""),
        ("import emalgam.cli", ""),
        ("import emalgam; emalgam.GaussianMixture", "sklearn"),
    ],
)
def test_imports_are_lazy(code: str, loaded: str) -> None:
    """Nothing heavy before it is needed."""
    program = f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    allowed = {"": set(), "sklearn": {"sklearn", "scipy", "pyarrow"}}[loaded]  # scikit-learn brings the other two
    if code == "import emalgam.cli":
        allowed = {"typer", "rich"}
    assert set(found) <= allowed
    assert loaded == "" or loaded in found


def test_public_names() -> None:
    for name in emalgam.__all__:
        assert getattr(emalgam, name) is not None
    assert set(emalgam.__all__) <= set(dir(emalgam))
    with pytest.raises(AttributeError, match="module 'emalgam' has no attribute 'nonsense'"):
        emalgam.nonsense  # noqa: B018


def test_unavailable_as_another_process_said_it() -> None:
    """A worker of a cluster raises it, and says what is available there."""
    raised = backends.BackendUnavailable("cython_cpu", "there is no compiler", "in the words of the worker")
    arrived = pickle.loads(pickle.dumps(raised))
    assert (str(arrived), arrived.name, arrived.reason) == (str(raised), "cython_cpu", "there is no compiler")
