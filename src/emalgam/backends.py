"""Which backends exist, which one runs, and why not: argument > `use_backend` > EMALGAM_BACKEND > automatic.

Automatic means numba_cuda for data on a GPU, else cython_cpu if it was built, else numba_cpu, else the plain NumPy
reference. A backend that was asked for by name runs or raises `BackendUnavailable`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import emalgam_kernels
from emalgam.arrays import on_gpu

VARIABLE: Final = "EMALGAM_BACKEND"

INSTALL: Final = {
    "reference": "pip install emalgam",
    "cython_cpu": "apt-get install gcc python3-dev && pip install --force-reinstall --no-binary emalgam emalgam",
    "numba_cpu": "pip install numba",
    "numba_cuda": 'pip install --upgrade "emalgam[cuda]"',
}

_used: ContextVar[str | None] = ContextVar("emalgam_backend", default=None)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One backend on this machine: `reason` says why it is unavailable, `install` the command that mends it."""

    name: str
    available: bool
    reason: str | None
    install: str


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here."""

    def __init__(self, name: str, reason: str, text: str | None = None) -> None:
        if text is None:
            available = ", ".join(s.name for s in status() if s.available)
            remedy = f"To install it: {INSTALL[name]}. Available here: {available}."
            text = f"backend {name!r} is unavailable: {reason}. {remedy}"
        super().__init__(text)
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """As another process said it."""
        return type(self), (self.name, self.reason, str(self))


def _probe(name: str) -> str | None:
    """Why `name` cannot run, from importing it for good: a library that is present may still be broken."""
    reason = emalgam_kernels.probe(name)
    if reason is not None:
        return reason
    try:
        emalgam_kernels.load(name)
    except Exception as error:  # a broken compiler library raises anything; the reason is reported, not lost
        return f"importing it failed with {type(error).__name__}: {error}"
    return None


def status() -> list[BackendStatus]:
    """Every backend in the order of `emalgam_kernels.BACKENDS`, each imported to see whether it really runs."""
    reasons = ((name, _probe(name)) for name in emalgam_kernels.BACKENDS)
    return [BackendStatus(name, reason is None, reason, INSTALL[name]) for name, reason in reasons]


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in emalgam_kernels.BACKENDS:
        expected = ", ".join(("auto", *emalgam_kernels.BACKENDS))
        raise ValueError(f"{source} is {name!r}; expected one of {expected}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` the backend of every call in the block that does not name one itself.

    Raises
    ------
    ValueError
        If there is no such backend.
    BackendUnavailable
        If it cannot run here.

    Examples
    --------
    >>> import emalgam
    >>> with emalgam.use_backend("reference"):
    ...     emalgam.backends.resolve()
    'reference'
    """
    if _known(name, "backend") != "auto":
        reason = _probe(name)
        if reason is not None:
            raise BackendUnavailable(name, reason)
    token = _used.set(name)
    try:
        yield
    finally:
        _used.reset(token)


def _chosen(backend: str) -> str:
    """What the argument, `use_backend` and the environment say, in this order; "auto" if they leave it open."""
    name = _known(backend, "backend")
    if name == "auto":
        name = _used.get() or _known(os.environ.get(VARIABLE) or "auto", f"environment variable {VARIABLE}")
    return name


def _fastest_of_the_cpu() -> str:
    return next(candidate for candidate in emalgam_kernels.PREFERRED if _probe(candidate) is None)


def resolve(backend: str = "auto", x: Any = None) -> str:
    """The name of the backend that runs `backend` on data `x`.

    Raises
    ------
    ValueError
        For an unknown name, or a CPU backend and data on a GPU.
    BackendUnavailable
        If a backend that was named, or the only one that can read `x`, cannot run here.
    """
    name = _chosen(backend)
    gpu = x is not None and on_gpu(x)
    if name == "auto" and not gpu:
        return _fastest_of_the_cpu()
    if name == "auto":
        name = "numba_cuda"
    reason = _probe(name)
    if reason is not None:
        raise BackendUnavailable(name, reason)
    if gpu and name != "numba_cuda":
        raise ValueError(f"the data are on a GPU and backend {name!r} runs on the CPU; move them first: x.cpu()")
    return name


def kernels(backend: str = "auto", file: str = "mixture") -> ModuleType:
    """The kernels of one of `emalgam_kernels.FILES`, of what `resolve` says to `backend`.

    Raises
    ------
    ValueError
        For an unknown name.
    BackendUnavailable
        If the backend cannot run here or lacks these kernels.
    """
    name = resolve(backend)
    try:
        return emalgam_kernels.load(name, file)
    except ImportError as error:
        raise BackendUnavailable(name, f"it has no kernels {file!r} ({error})") from None


def host_kernels(file: str) -> ModuleType:
    """The same for work that is done in main memory whatever comes later: of the CPU, even if numba_cuda is chosen."""
    name = _chosen("auto")
    return kernels(_fastest_of_the_cpu() if name == "numba_cuda" else name, file)
