"""Checkpoints of long fits: after an interruption EM goes on with the same numbers.

A checkpoint is a safetensors file with the state between two iterations, in the frame of the data: float64 tensors, and
JSON in its metadata. Nothing in it is executed, and the header is held against the size of the file before memory is
taken for what it promises. It names the data and the settings; a fit of others refuses it.
"""

from __future__ import annotations

import json
import os
import reprlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from emalgam.covariance import COVARIANCES
from emalgam.files import replacing
from emalgam.guard import Schedule
from emalgam.model_file import (
    ModelFileError,
    check_entry,
    check_format,
    check_offsets,
    fail,
    metadata_of,
    read_file,
)
from emalgam.packing import Components

FORMAT: Final = "emalgam.checkpoint"
FORMAT_VERSION: Final = "1"
PARTS: Final = ("weights", "means", "covariances", "precisions_cholesky")
FACTS: Final = ("converged", "effective_components", "algorithm", "arithmetic", "error_bound", "float32_iterations")


@dataclass(frozen=True, eq=False)
class State:
    """Where EM is after an M-step.

    Attributes
    ----------
    restart, iteration : int
        The restart, and how many of its iterations are done.
    components : Components
        In the frame of the data.
    lower_bounds : list of float
        Of the restart's iterations, nats.
    reseeds_left : int
        How many components the M-step may still start anew.
    schedule : dict
        What `emalgam.guard.Schedule` remembers of the passes.
    rng : dict
        The random generator's state.
    best : Best or None
        The best of the restarts before.
    """

    restart: int
    iteration: int
    components: Components
    lower_bounds: list[float]
    reseeds_left: int
    schedule: dict[str, Any]
    rng: dict[str, Any]
    best: Best | None = None


@dataclass(frozen=True, eq=False)
class Best:
    """A restart that is done, as far as a `Fit` needs it; its components in the data's units."""

    components: Components
    lower_bounds: list[float]
    converged: bool
    effective_components: int
    algorithm: str
    arithmetic: str
    error_bound: float
    float32_iterations: int


class Checkpoint:
    """The file of one fit.

    Parameters
    ----------
    path : path-like
    seconds : float
        It is written at most so often.
    resume : bool
        Go on from the file if there is one; without, it is an error if there is one.
    """

    def __init__(self, path: str | os.PathLike[str], *, seconds: float = 30.0, resume: bool = False) -> None:
        self.path, self.seconds, self.resume = Path(path), seconds, resume
        self._written = time.monotonic()

    def begin(self, identity: Mapping[str, Any], covariance_type: str) -> State | None:
        """The state to go on from; None to begin.

        Raises
        ------
        ModelFileError
            If the file is no regular one, cut short, forged, or of a fit of other data or with other settings, naming
            which; or if there is one and nobody asked to go on from it.
        """
        self.identity, self.covariance_type = json.loads(_json(identity)), covariance_type
        if not self.path.exists():
            return None
        if not self.resume and self.path.is_file():
            raise ModelFileError(f"{self.path}: there is a checkpoint already; resume from it, or remove it")
        tensors, metadata = _read(self.path)
        try:
            return self._state(tensors, metadata)
        except ModelFileError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelFileError(f"{self.path}: metadata is not that of a checkpoint ({error!r})") from error

    def record(self, state: State) -> None:
        """Write `state`, if it is time to: beside the last one, which it then replaces.

        OSError if it cannot be written; the last one is then still there.
        """
        if time.monotonic() - self._written < self.seconds:
            return
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(getattr(state.components, name)) for name in PARTS}
        tensors["lower_bounds"] = np.array(state.lower_bounds)
        about: dict[str, Any] = {
            "identity": self.identity,
            "restart": state.restart,
            "iteration": state.iteration,
            "reseeds_left": state.reseeds_left,
            "schedule": state.schedule,
            "rng": state.rng,
        }
        if state.best is not None:
            tensors |= {f"best_{name}": np.ascontiguousarray(getattr(state.best.components, name)) for name in PARTS}
            tensors["best_lower_bounds"] = np.array(state.best.lower_bounds)
            about["best"] = {name: getattr(state.best, name) for name in FACTS}
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "state": _json(about)}
        with replacing(self.path, durable=True) as file:
            file.write(save(tensors, metadata))
        self._written = time.monotonic()

    def end(self) -> None:
        """Remove the file: the fit is done."""
        self.path.unlink(missing_ok=True)

    def _state(self, tensors: dict[str, np.ndarray], about: dict[str, Any]) -> State:
        for name, value in self.identity.items():
            found = about["identity"].get(name)
            if found == value:
                continue
            if name == "random_state":
                problem = "another random_state; give the integer that it began with"
            else:
                problem = f"{name} {reprlib.repr(found)}; this one has {reprlib.repr(value)}"
            raise ModelFileError(f"{self.path}: is of a fit with {problem}")
        K, D = int(self.identity["n_components"]), int(self.identity["n_features"])
        best = None
        if about.get("best") is not None:
            facts = [about["best"][name] for name in FACTS]
            best = Best(self._components("best_", tensors, K, D), tensors["best_lower_bounds"].tolist(), *facts)
        components = self._components("", tensors, K, D)
        trace = tensors["lower_bounds"].tolist()
        if len(trace) != about["iteration"]:
            raise ModelFileError(
                f"{self.path}: lower_bounds has {len(trace)} entries for {about['iteration']} iterations"
            )
        schedule = {name: kind(about["schedule"][name]) for name, kind in Schedule.MEMORY.items()}
        counts = int(about["restart"]), int(about["iteration"])
        return State(*counts, components, trace, int(about["reseeds_left"]), schedule, about["rng"], best)

    def _components(self, prefix: str, tensors: dict[str, np.ndarray], K: int, D: int) -> Components:
        shape = COVARIANCES[self.covariance_type].shape(K, D)
        expected = dict(zip(PARTS, ((K,), (K, D), shape, shape), strict=True))
        for name, wanted in expected.items():
            found = tensors.get(f"{prefix}{name}")
            if found is None or found.shape != wanted or found.dtype != np.float64 or not np.isfinite(found).all():
                raise ModelFileError(f"{self.path}: {prefix}{name} is missing or no finite float64 array {wanted}")
        return Components(*(tensors[f"{prefix}{name}"] for name in PARTS))


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), default=lambda array: array.tolist())


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file whose header is sound, and what its metadata say."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content, state = read_file(path, _check)
    try:
        return load(content), json.loads(state)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {error}") from error


def _check(header: dict[str, Any], data_bytes: int, path: str | os.PathLike[str]) -> str:
    """The state in the metadata, if the header is sound: float64 tensors that fill the rest of the file."""
    metadata = metadata_of(header, path)
    check_format(metadata, FORMAT, FORMAT_VERSION, path)
    if "state" not in metadata:
        fail(path, "state", "is missing from the metadata")
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        check_entry(name, header[name], "F64", path)
    check_offsets(header, names, data_bytes, path)
    return metadata["state"]
