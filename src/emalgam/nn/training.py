"""`train`: a model, its data, lightning; and `History`, what the losses were.

lightning drives the epochs, devices, mixed precision, loggers and the progress bar (`emalgam.nn.loop` is the module
that imports it). What this package adds is what makes a training repeatable: the order of the data and the random
numbers of every epoch follow from (seed, epoch) alone, so that a training that was killed goes on from the end of its
last epoch to the very same weights.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from emalgam.files import replacing
from emalgam.model_file import ModelFileError, fail
from emalgam.nn.data import Indexed, Part, as_dataset, check_data, is_loader
from emalgam.tables import reading
from emalgam.validation import check_integer, check_positive

CHECKPOINT: Final = "checkpoint.ckpt"
LOSSES: Final = "losses.csv"
VALIDATION: Final = "validation_"

__all__ = ["History", "train"]


class History(Mapping[str, np.ndarray]):
    """Losses after each epoch: ``history["loss"]`` is an array (epochs,), the mean over the data.

    Names are those of the model's `losses`, and the same with ``validation_`` in front for the validation data.

    Parameters
    ----------
    losses : mapping of str to (epochs,) numbers

    Attributes
    ----------
    epochs : int
        How many there were.
    best_epoch : int
        That with the lowest validation loss, or without validation the lowest loss; epochs are counted from 1.

    Examples
    --------
    >>> history = History({"loss": [3.0, 2.0, 1.0], "validation_loss": [3.0, 2.5, 2.6]})
    >>> history["loss"], history.best_epoch
    (array([3., 2., 1.]), 2)
    """

    def __init__(self, losses: Mapping[str, Iterable[float]]) -> None:
        self._losses = {name: np.asarray(values, np.float64) for name, values in losses.items()}
        lengths = {len(values) for values in self._losses.values()}
        if len(lengths) > 1:
            raise ValueError(f"losses have {sorted(lengths)} entries; expected one for each epoch")
        self.epochs = lengths.pop() if lengths else 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self._losses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.6g}" for name, values in self.items()) if self.epochs else "nothing"
        return f"History of {self.epochs} epochs: {last}"

    @property
    def best_epoch(self) -> int:
        return 1 + int(np.nanargmin(self[VALIDATION + "loss" if VALIDATION + "loss" in self else "loss"]))

    def write(self, path: str | os.PathLike[str]) -> None:
        """As a CSV file: a column ``epoch``, and one for each loss, with all digits; at once and whole."""
        lines = [",".join(["epoch", *self])]
        for epoch in range(self.epochs):
            lines.append(",".join([str(epoch + 1), *(repr(float(values[epoch])) for values in self.values())]))
        with replacing(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """What `write` wrote; ValueError naming the file if it is missing, or something else."""
        with reading(Path(path)), open(path, newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file)) or [[]]
            if head[:1] != ["epoch"] or any(len(row) != len(head) for row in rows):
                raise ValueError("is no table of losses; expected a column epoch, then one for each loss")
            columns = np.array(rows, np.float64).reshape(len(rows), len(head)).T
        return cls(dict(zip(head[1:], columns[1:], strict=True)))


@dataclass(frozen=True)
class Settings:
    """What `train` was asked for, beside the model and the data."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    patience: int | None
    precision: str
    devices: Any
    folder: Path | None
    resume: bool
    progress: bool
    loggers: tuple[Any, ...]

    def __post_init__(self) -> None:
        numbers: dict[str, float] = {"learning_rate": check_positive("learning_rate", self.learning_rate)}
        least = {"epochs": 1, "batch_size": 1, "seed": 0} | ({} if self.patience is None else {"patience": 1})
        numbers |= {name: check_integer(name, getattr(self, name), bound) for name, bound in least.items()}
        for name, number in numbers.items():
            object.__setattr__(self, name, number)  # NumPy's numbers are none for JSON
        if self.resume and self.folder is None:
            raise ValueError("resume=True needs the folder that the training to go on with was given")

    @property
    def checkpoint(self) -> Path | None:
        return None if self.folder is None else self.folder / CHECKPOINT


@dataclass(frozen=True)
class Data:
    """Training and validation data; each indexed, or a loader."""

    training: Any
    validation: Any
    checksums: tuple[int | None, ...]

    @staticmethod
    def prepare(model: nn.Module, data: Any, validation: Any, settings: Settings) -> Data:
        """Data that the model takes; a fraction for validation is drawn from the training data, by the seed."""
        fraction = isinstance(validation, Real)
        training = _usable(data, model, settings)
        validating = None if fraction or validation is None else _usable(validation, model, settings)
        # before any is set apart, so that errors name rows as the caller counts them
        checksums = (check_data(part, model) if isinstance(part, Indexed) else None for part in (training, validating))
        checked = tuple(checksums)
        if fraction:
            training, validating = _split(training, validation, settings.seed)
        return Data(training, validating, checked)

    def described(self) -> dict[str, Any]:
        """How many rows and a checksum (of those set apart too), as far as they are known beforehand."""
        rows = [len(part) if isinstance(part, Indexed) else None for part in (self.training, self.validation)]
        return {"rows": rows[0], "checksum": self.checksums[0], "validation": [rows[1], self.checksums[1]]}


def _usable(data: Any, model: nn.Module, settings: Settings) -> Any:
    """Indexed data, or a loader."""
    if isinstance(data, Iterator):
        raise TypeError(f"data is a {type(data).__name__}, which ends after one epoch; give a loader, or an array")
    if isinstance(data, IterableDataset):
        return DataLoader(data, settings.batch_size)
    return data if is_loader(data) else as_dataset(data, model)


def _split(data: Any, fraction: float, seed: int) -> tuple[Part, Part]:
    """All but a fraction, and the fraction, drawn at random."""
    if not isinstance(data, Indexed):
        raise TypeError(
            f"validation={fraction:g} is a fraction, and a {type(data).__name__} cannot be split; give data"
        )
    if not 0 < fraction < 1:
        raise ValueError(f"validation is {fraction!r}; expected data, or a fraction of the data between 0 and 1")
    count = round(fraction * len(data))
    if not 0 < count < len(data):
        raise ValueError(f"validation={fraction:g} of {len(data)} rows leaves {count} and {len(data) - count}")
    order = np.random.default_rng((seed, len(data))).permutation(len(data))
    return Part(data, np.sort(order[count:])), Part(data, np.sort(order[:count]))


def train(
    model: nn.Module,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    validation: Any = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    patience: int | None = None,
    precision: str = "32",
    devices: Any = "auto",
    progress: bool = True,
    loggers: Sequence[Any] = (),
) -> History:
    """Train a model by Adam, with lightning.

    The order of the data and the random numbers of every epoch (noise, reparameterisation, dropout) follow from the
    seed and the number of the epoch alone: the same seed on the same machine gives the same weights, and what was
    interrupted goes on to them. (With another number of torch's threads sums may differ in rounding.) Random numbers
    elsewhere in the program are left as they were.

    Parameters
    ----------
    model : LatentModel, or any Module
        With a method ``losses(x)`` or ``losses(x, generator=...)`` that returns scalars under names; "loss" is
        minimised, all are recorded. It is trained in place, and left in evaluation mode on the device it was on.
    data : (N, *data_shape) array or tensor, dataset, or loader
        Labels are ignored. Arrays may be memory maps, and of any floating-point dtype; integers need
        `emalgam.nn.as_dataset` with a scale. A loader gives the batches and their order itself; if it draws them by
        torch's random numbers or by its ``generator``, they follow from the seed and the epoch too. (With
        ``persistent_workers``, or a sampler that keeps a generator of its own, they depend on earlier epochs of the
        same process, so that a training that is resumed has another order.)
    epochs : int
        How often to go through the data; with `resume`, in all.
    batch_size : int
        Rows of a step, on each device; the last step of an epoch takes what is left.
    learning_rate : float
        Of Adam (Kingma & Ba 2015), whose other settings are torch's.
    validation : the same as data, or float, optional
        Data whose losses are recorded after each epoch, or the fraction of `data` to set apart for that, at random.
    seed : int
        See above. The weights that the model begins with are the caller's: ``torch.manual_seed`` before it is made.
    folder : path-like, optional
        Where ``losses.csv`` and ``checkpoint.ckpt`` are kept, replaced after each epoch at once and whole. It is made
        if need be. Nothing is written elsewhere.
    resume : bool
        Go on from the checkpoint in `folder` if there is one. It has to be of the same data, architecture and
        settings; `epochs`, `patience` and `devices` may differ. Without `patience` the weights of the best epoch are
        not kept, and it cannot be given afterwards unless the last epoch was the best.
    patience : int, optional
        Stop when the validation loss has not fallen for so many epochs; the model then has the weights of its best
        epoch, also if it never comes to that.
    precision : str
        lightning's: "32", "bf16-mixed", "16-mixed", ... "32" leaves a float64 model as it is; "64" and "bf16-true" turn
        the model into one of that dtype, which it stays. "16-true" is refused: float16 has no room for Adam.
    devices : "auto", "cpu", int or list of int
        "auto" is one device: a GPU if there is one. Several are lightning's, which runs the calling script once for
        each (distributed data parallel): write it with ``if __name__ == "__main__"``.
    progress : bool
        A bar on standard error, if that is a terminal.
    loggers : sequence of lightning loggers
        Which get the losses of each epoch.

    Returns
    -------
    History
        Losses after each epoch, those before an interruption included.

    Raises
    ------
    FloatingPointError
        If a loss or a gradient is not finite: naming it, the epoch and the step. The model keeps the weights before
        that step. ("16-mixed" leaves out steps whose gradients are not, as it is meant to.)
    ValueError, TypeError
        For data that the model's `check` refuses, before training begins, and for settings that make no sense.
    ModelFileError
        If there is a checkpoint and `resume` was not asked for; if it is forged, cut short, or of another training.
    ImportError
        If lightning is not installed.

    Notes
    -----
    Checkpoints are what ``torch.save`` writes. They are read by ``torch.load(weights_only=True)``, which makes tensors
    and plain values and executes nothing; models to pass on are saved by `emalgam.nn.save_model`.

    Examples
    --------
    >>> import torch
    >>> from emalgam.nn import Autoencoder, train
    >>> _ = torch.manual_seed(0)
    >>> model, x = Autoencoder((8, 3)), torch.randn(100, 3) @ torch.randn(3, 8)
    >>> history = train(model, x, epochs=30, batch_size=10, learning_rate=1e-2)
    >>> bool(history["loss"][-1] < 0.1 * history["loss"][0])
    True
    """
    where = None if folder is None else Path(folder)
    settings = Settings(
        epochs,
        batch_size,
        learning_rate,
        seed,
        patience,
        str(precision),
        devices,
        where,
        resume,
        progress,
        tuple(loggers),
    )
    if not callable(getattr(model, "losses", None)):
        raise TypeError(
            f"model is a {type(model).__name__} without a method losses; expected a LatentModel, or one like it"
        )
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} needs validation data to look at; give validation=")
    if find_spec("lightning") is None:
        raise ImportError("emalgam.nn.train needs lightning, which is not installed: pip install emalgam[torch]")
    _check_precision(model, settings.precision)
    with _as_it_was_if_refused(model):
        if settings.precision in ("64", "64-true"):
            model.double()  # before the data are prepared, which get the dtype of the model
        prepared = Data.prepare(model, data, validation, settings)
        _make_folder(settings)
    from emalgam.nn.loop import run

    return run(model, prepared, settings, _identity(model, prepared, settings))


@contextmanager
def _as_it_was_if_refused(model: nn.Module) -> Iterator[None]:
    """Gives a model its numbers back if the block raises."""
    before = {each: each.data for each in (*model.parameters(), *model.buffers())}
    try:
        yield
    except Exception:
        for each, values in before.items():
            each.data = values
        raise


def _check_precision(model: nn.Module, precision: str) -> None:
    """Words instead of NaN."""
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    if precision == "16-true" or torch.float16 in trained:
        raise ValueError(
            "Adam divides by 0 in float16, which rounds its squared gradients and its 1e-8 to 0; "
            'train in float32 with precision="16-mixed", or in bfloat16'
        )


def _make_folder(settings: Settings) -> None:
    """The folder, without a checkpoint that would be overwritten."""
    if settings.folder is None or settings.checkpoint is None:
        return
    settings.folder.mkdir(parents=True, exist_ok=True)
    if settings.checkpoint.exists() and not settings.resume:
        raise ModelFileError(
            f"{settings.checkpoint}: there is a checkpoint already; go on with resume=True, or name another folder"
        )


def _identity(model: nn.Module, data: Data, settings: Settings) -> dict[str, Any]:
    """What a training has to have in common with the one that it goes on with."""
    configuration = model.configuration() if hasattr(model, "configuration") else {}
    identity = {
        "model": type(model).__qualname__,
        "configuration": configuration,
        "pretraining": bool(getattr(model, "pretraining", False)),
        **{name: getattr(settings, name) for name in ("batch_size", "learning_rate", "seed", "precision")},
        **data.described(),
    }
    return json.loads(json.dumps(identity))


def check_identity(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    """ModelFileError naming what differs between the training of a checkpoint and this one."""
    if not isinstance(found, dict):
        fail(path, "identity", "is missing")
    for name, value in expected.items():
        if found.get(name) != value:
            raise ModelFileError(f"{path}: is of a training with {name} {found.get(name)!r}; this one has {value!r}")


def first_not_finite(losses: Mapping[str, float]) -> str | None:
    """The name of the first loss that is NaN or infinite."""
    return next((name for name, value in losses.items() if not math.isfinite(value)), None)
