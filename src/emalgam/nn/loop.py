"""The training loop: what lightning has to be told. Only this module imports it, and only `train` imports this one."""

from __future__ import annotations

import inspect
import logging
import math
import pickle
import signal
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from rich.console import Console
from torch import Tensor, nn

from emalgam.files import replacing
from emalgam.model_file import ModelFileError, fail
from emalgam.nn.data import Batches, Indexed, as_batch, dtype_of, loader_of
from emalgam.nn.training import LOSSES, VALIDATION, Data, History, Settings, check_identity, first_not_finite

FORMAT: Final = "emalgam.training"
FORMAT_VERSION: Final = 1
PARTS: Final = {"state_dict": dict, "optimizer_states": list, "loops": dict, "callbacks": dict}
ORDER, TRAINING_NOISE, VALIDATION_NOISE = range(3)


def run(model: nn.Module, data: Data, settings: Settings, identity: Mapping[str, Any]) -> History:
    """Train `model`; see `emalgam.nn.train`."""
    module = Module(model, data, settings)
    recorder = Recorder(module, settings)
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    path = settings.checkpoint if settings.checkpoint is not None and settings.checkpoint.exists() else None
    model.train()
    try:
        with _quietly(), _own_random_numbers(), _deterministic(), _interruptible():
            trainer = _trainer(recorder, settings, Checkpoints(identity, module))
            trainer.fit(module, ckpt_path=path, weights_only=True)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if path is None or module.restored or isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path}: holds no state to go on from ({error!r}; forged?)") from error
    finally:
        model.to(device).eval()
    if recorder.history.epochs == 0:
        raise ValueError("the loader gave no batches; expected at least one")
    recorder.restore_best(model)
    model.zero_grad()  # the last step's gradients take as much memory as the weights
    return recorder.history


def _trainer(recorder: Recorder, settings: Settings, checkpoints: Checkpoints) -> pl.Trainer:
    callbacks: list[Any] = [recorder]
    if settings.progress and Console(stderr=True).is_terminal:
        callbacks.append(RichProgressBar(leave=True, console_kwargs={"stderr": True}))
    one = settings.devices in ("auto", "cpu", 1) or (isinstance(settings.devices, list) and len(settings.devices) == 1)
    return pl.Trainer(
        accelerator="cpu" if settings.devices == "cpu" else "auto",
        devices=1 if settings.devices in ("auto", "cpu") else settings.devices,
        strategy="auto" if one else "ddp_find_unused_parameters_true",  # a pre-training uses some of them
        precision=settings.precision,
        max_epochs=settings.epochs,
        logger=list(settings.loggers) or False,
        callbacks=callbacks,
        plugins=[checkpoints],
        enable_progress_bar=len(callbacks) > 1,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if recorder.module.data.validation is None else 1.0,
        log_every_n_steps=1,
        use_distributed_sampler=not isinstance(recorder.module.data.training, Indexed),  # ours knows of processes
        default_root_dir=settings.folder,
    )


class Module(pl.LightningModule):
    """A model as lightning wants it."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings) -> None:
        super().__init__()
        self.model, self.data, self.settings = model, data, settings
        self.takes_generator = "generator" in inspect.signature(model.losses).parameters
        self.training_means, self.validation_means = Means(), Means()
        self.restored = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        return torch.optim.Adam(weights, lr=self.settings.learning_rate)

    def train_dataloader(self) -> Any:
        self.restored = True  # lightning asks for data when it has loaded the checkpoint
        return self._loader(self.data.training, shuffled=True)

    def val_dataloader(self) -> Any:
        return self._loader(self.data.validation, shuffled=False)

    def _loader(self, data: Any, *, shuffled: bool) -> Any:
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        if not isinstance(data, Indexed):
            if processes > 1:  # lightning gives each its rows, in an order that follows from the epoch
                return data
            return Repeatable(data, lambda: _derived(self.settings.seed, ORDER, self.current_epoch if shuffled else 0))
        if not isinstance(self.data.training, Indexed):  # lightning shares all rows among processes then, see _trainer
            rank, processes = 0, 1
        seed = _derived(self.settings.seed, ORDER) if shuffled else None
        return loader_of(data, Batches(len(data), self.settings.batch_size, seed, rank, processes))

    def on_train_epoch_start(self) -> None:
        self._seed(TRAINING_NOISE, self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        self._seed(VALIDATION_NOISE)  # the same noise each time: validation losses differ by the weights only

    def _seed(self, *of: int) -> None:
        seed = _derived(self.settings.seed, *of, self.global_rank)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(seed)  # for dropout, and losses that take no generator

    def training_step(self, batch: Any, step: int) -> Tensor:
        self.where = f"epoch {self.current_epoch + 1}, step {step + 1}"
        return self._losses(batch, self.training_means, self.where)["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A finite loss may have a gradient that is not: that of a square root at 0."""
        if self.trainer.precision == "16-mixed":  # which leaves such steps out, and goes on with a smaller scale
            return
        weights = [(name, weight) for name, weight in self.model.named_parameters() if weight.grad is not None]
        # the largest absolute value: one transfer from a GPU, and no square that overflows
        largest = torch.nn.utils.get_total_norm([weight.grad for _, weight in weights], math.inf)
        if not math.isfinite(largest):
            name = next(name for name, weight in weights if not torch.isfinite(weight.grad).all())
            raise _stopped(f"the gradient of {name}", float(largest), self.where)

    def validation_step(self, batch: Any, step: int) -> None:
        where = f"the validation after epoch {self.current_epoch + 1}, step {step + 1}"
        self._losses(batch, self.validation_means, where)

    def _losses(self, batch: Any, means: Means, where: str) -> dict[str, Tensor]:
        x = as_batch(batch, dtype_of(self.model))
        try:
            losses = self.model.losses(x, generator=self.generator) if self.takes_generator else self.model.losses(x)
        except ValueError as error:  # rows of a loader have no numbers: say at least which batch it was
            raise ValueError(f"{where}: {error}") from error
        if "loss" not in losses:
            raise ValueError(
                f"losses of {type(self.model).__name__} gives {', '.join(losses)}; expected 'loss' among them"
            )
        _check_scalars(losses)
        # all of them at once, as each transfer from a GPU waits for it
        numbers = torch.stack([_widened(loss) for loss in losses.values()]).tolist()
        values = dict(zip(losses, numbers, strict=True))
        name = first_not_finite(values)
        if name is not None:
            raise _stopped(name, values[name], where)
        means.add(values, len(x))
        return losses

    def on_train_epoch_end(self) -> None:
        """Means over all devices, for the recorder, loggers and the progress bar."""
        found = self.training_means.take(self)
        if self.data.validation is not None:
            found |= {VALIDATION + name: value for name, value in self.validation_means.take(self).items()}
        self.means = found
        shown = {name: value for name, value in found.items() if name in ("loss", VALIDATION + "loss")}
        self.log_dict(shown, prog_bar=True, sync_dist=True)
        self.log_dict({name: value for name, value in found.items() if name not in shown}, sync_dist=True)


def _check_scalars(losses: Mapping[str, Tensor]) -> None:
    for name, loss in losses.items():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else None
        if shape != ():
            given = f"a {type(loss).__name__}" if shape is None else f"a tensor of shape {shape}"
            raise TypeError(f"losses gives {name!r} as {given}; expected tensors (): means over the data")


def _widened(loss: Tensor) -> Tensor:
    """Without a graph, in float32 at least; not in float64, which some devices lack."""
    return loss.detach().to(torch.promote_types(loss.dtype, torch.float32))


def _stopped(name: str, value: float, where: str) -> FloatingPointError:
    return FloatingPointError(
        f"{name} is {value} in {where}; training has stopped, with the weights before this step: "
        "try a smaller learning_rate, or look at the data"
    )


class Repeatable:
    """Someone's loader, which takes the seed of its order and of its workers from us: it draws them as it begins."""

    def __init__(self, loader: Any, seed: Callable[[], int]) -> None:
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            for generator in (torch.default_generator, getattr(self.loader, "generator", None)):
                if generator is not None:
                    generator.manual_seed(self.seed())
            batches = iter(self.loader)
            first = list(islice(batches, 1))
        yield from chain(first, batches)

    @property
    def sampler(self) -> Any:
        """Where lightning looks for a `set_epoch` to call."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        """The same."""
        return getattr(self.loader, "batch_sampler", None)


class Means:
    """Means of losses over the rows of an epoch, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.rows = 0

    def add(self, losses: Mapping[str, float], rows: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + rows * value
        self.rows += rows

    def take(self, module: pl.LightningModule) -> dict[str, float]:
        """The means over all processes; begins anew."""
        totals = torch.tensor([*self.sums.values(), self.rows], dtype=torch.float64)
        if module.trainer.world_size > 1:
            totals = module.trainer.strategy.reduce(totals.to(module.device), reduce_op="sum").cpu()
        *sums, rows = totals.tolist()
        if rows == 0:
            raise ValueError("a loader gave no batches; expected at least one in each epoch")
        names = list(self.sums)
        self.sums, self.rows = {}, 0
        return {name: total / rows for name, total in zip(names, sums, strict=True)}


class Recorder(Checkpoint):
    """What is kept after each epoch: its losses, the best weights, and a checkpoint with both.

    lightning's own callback for early stopping forgets, when a training is resumed, that it had stopped; this one does
    not.
    """

    def __init__(self, module: Module, settings: Settings) -> None:
        self.module, self.settings = module, settings
        self.losses: dict[str, list[float]] = {}
        self.best_weights: dict[str, Tensor] | None = None

    @property
    def history(self) -> History:
        return History(self.losses)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.losses:  # the weights at the start belong to what has to come out again
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in self.module.means.items():
            self.losses.setdefault(name, []).append(value)
        if self.settings.patience is not None and self.history.best_epoch == self.history.epochs:
            self._keep_weights()
        self._save(trainer)
        self._stop_if_lost(trainer)

    def _keep_weights(self) -> None:
        weights = self.module.model.state_dict()
        self.best_weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}

    def _save(self, trainer: pl.Trainer) -> None:
        if self.settings.folder is None or self.settings.checkpoint is None:
            return
        trainer.save_checkpoint(self.settings.checkpoint)
        self._write_losses(trainer)

    def _write_losses(self, trainer: pl.Trainer) -> None:
        if self.settings.folder is not None and trainer.is_global_zero:
            self.history.write(self.settings.folder / LOSSES)

    def _stop_if_lost(self, trainer: pl.Trainer) -> None:
        """Stop if no epoch was better for as many as there is patience for."""
        history, patience = self.history, self.settings.patience
        if patience is not None and history.epochs and history.epochs - history.best_epoch >= patience:
            trainer.should_stop = True

    def restore_best(self, model: nn.Module) -> None:
        """With patience: the weights of the best epoch."""
        if self.settings.patience is not None and self.best_weights is not None:
            model.load_state_dict(self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = {name: values.tolist() for name, values in History(state_dict["losses"]).items()}
        # without patience nobody would renew them
        self.best_weights = None if self.settings.patience is None else state_dict["best_weights"]
        epochs = self.history.epochs
        if epochs > self.settings.epochs:
            raise ModelFileError(f"{self.settings.checkpoint}: has {epochs} epochs already; give epochs >= {epochs}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a checkpoint was loaded: the table may be older than it, and the training may have stopped."""
        if not self.losses:
            return
        best = self.history.best_epoch
        if self.settings.patience is not None and self.best_weights is None:
            if best < self.history.epochs:
                problem = f"has not the weights of epoch {best}, the best so far, as it was written without patience"
                raise ModelFileError(f"{self.settings.checkpoint}: {problem}; go on without it")
            self._keep_weights()
        self._write_losses(trainer)
        self._stop_if_lost(trainer)


class Checkpoints(CheckpointIO):
    """Checkpoints that are replaced whole, and read without executing anything that they hold."""

    def __init__(self, identity: Mapping[str, Any], module: Module) -> None:
        self.identity, self.module = identity, module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        described = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": dict(self.identity)}
        with replacing(path, durable=True) as file:
            torch.save(checkpoint | {"emalgam": described}, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        path = Path(path)
        try:
            _check_sizes(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except ModelFileError:
            raise
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
        except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, LookupError, EOFError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelFileError(f"{path}: is no checkpoint, or is cut short or forged ({first})") from error
        self._check(path, checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def _check(self, path: Path, checkpoint: Any) -> None:
        """ModelFileError if it is not of a training like this one."""
        about = checkpoint.get("emalgam") if isinstance(checkpoint, dict) else None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            fail(path, "format", f"is no {FORMAT!r}")
        if about.get("format_version") != FORMAT_VERSION:
            fail(path, "format_version", f"is {about.get('format_version')!r}; expected {FORMAT_VERSION}")
        check_identity(path, about.get("identity"), self.identity)
        for part, kind in PARTS.items():
            if not isinstance(checkpoint.get(part), kind):
                fail(path, part, f"is {type(checkpoint.get(part)).__name__}, expected a {kind.__name__}")
        if len(checkpoint["optimizer_states"]) != 1:
            fail(path, "optimizer_states", f"has {len(checkpoint['optimizer_states'])} entries, expected 1")
        if Recorder.__qualname__ not in checkpoint["callbacks"]:
            fail(path, "callbacks", f"has no {Recorder.__qualname__!r}")
        expected = {name: tuple(weight.shape) for name, weight in self.module.state_dict().items()}
        found = {name: tuple(getattr(weight, "shape", ())) for name, weight in checkpoint["state_dict"].items()}
        for name in dict.fromkeys((*expected, *found)):
            if expected.get(name) != found.get(name):
                fail(path, name, f"has shape {found.get(name)}, the model's has {expected.get(name)}")


def _check_sizes(path: Path) -> None:
    """ModelFileError if the parts claim more bytes than the file has: torch would take memory for them."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        claimed = sum(part.file_size for part in archive.infolist())
    if claimed > size:
        fail(path, "archive", f"claims {claimed} bytes in a file of {size} (forged?)")


def _derived(seed: int, *of: int) -> int:
    """A seed for one purpose."""
    return int(np.random.SeedSequence((seed, *of)).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---- lightning as a guest


@contextmanager
def _quietly() -> Iterator[None]:
    """No notes on hardware, tips and other packages; warnings but for those that do not concern our use."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # rows come from memory by the batch: worker processes would slow that down
            warnings.filterwarnings("ignore", message=r".*does not have many workers")
            # `run` and `Means.take` raise an error then
            warnings.filterwarnings("ignore", message=r"Total length of .* across ranks is zero")
            # lightning's own use of torch 2.13
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leaves torch's random numbers as they were, on all devices: `torch.manual_seed` seeds them all."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    """cuDNN's deterministic kernels, which the same weights for the same seed need."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _interruptible() -> Iterator[None]:
    """Control-C stays KeyboardInterrupt: lightning ends the process, and ignores any further one."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)
