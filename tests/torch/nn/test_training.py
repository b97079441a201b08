"""Training: what follows from the seed, what an interruption leaves, what stops it, and what lightning must not do."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from emalgam import plot
from emalgam.model_file import ModelFileError
from emalgam.nn import VAE, Autoencoder, History, MixtureVAE, as_dataset, train

X = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
ROOT = Path(__file__).parents[3]
Weights = dict[str, Tensor]


def noisy() -> Autoencoder:
    """A model whose losses draw random numbers."""
    torch.manual_seed(1)
    return Autoencoder((6, 3), denoising=0.3)


def trained(model: nn.Module | None = None, **options: Any) -> tuple[Weights, History]:
    model = noisy() if model is None else model
    settings = {"epochs": 4, "batch_size": 50, "validation": 0.2, "learning_rate": 0.01} | options
    history = train(model, settings.pop("data", X), **settings)
    return {name: value.clone() for name, value in model.state_dict().items()}, history


def same(first: tuple[Weights, History], second: tuple[Weights, History]) -> bool:
    """The same losses and the same weights, to the last bit."""
    (weights, history), (others, other_history) = first, second
    assert list(history) == list(other_history)
    return all(history[name].tobytes() == other_history[name].tobytes() for name in history) and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


class Reaching(nn.Module):
    """Its losses are the distance to the data, and what a test wants of them; a Module of no class of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(6))
        self.calls = 0

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        distance = (x - self.center).square().sum(1).mean()
        return {"loss": distance, "norm": self.center.detach().norm()}


# ---- seeds


def test_the_same_seed_gives_the_same_weights() -> None:
    first = trained(seed=3)
    assert same(first, trained(seed=3))
    assert not same(first, trained(seed=4))
    assert first[1].epochs == 4
    assert list(first[1]) == ["loss", "validation_loss"]
    assert first[1]["loss"][-1] < first[1]["loss"][0]


class Dropping(Reaching):
    """Random numbers that nobody can seed but torch's own generator."""

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        return super().losses(nn.functional.dropout(x, 0.5, self.training))


def test_random_numbers_of_the_program_neither_matter_nor_change() -> None:
    torch.manual_seed(7)
    first = trained(Dropping())
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    np.random.seed(5)  # noqa: NPY002 - the generator that others share
    torch.manual_seed(8)
    assert same(first, trained(Dropping()))
    assert not same(first, trained(Dropping(), seed=1))


def test_epochs_differ_in_order_and_noise() -> None:
    seen: list[Tensor] = []

    class Watching(Reaching):
        def losses(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
            seen.append(torch.cat([x.flatten(), torch.rand(4, generator=generator)]))
            return super().losses(x)

    trained(Watching(), batch_size=200, epochs=3, validation=None)
    assert len({tuple(x[:-4].tolist()) for x in seen}) == 3
    assert len({tuple(x[-4:].tolist()) for x in seen}) == 3
    assert all(torch.equal(x[:-4].sort()[0], X.flatten().sort()[0]) for x in seen)


def test_validation_has_the_same_noise_each_time() -> None:
    frozen = noisy().requires_grad_(False)
    frozen.encoder.requires_grad_(True)
    history = train(frozen, X, epochs=3, validation=X[:50], learning_rate=1e-30)
    assert len(set(history["validation_loss"])) == 1
    assert len(set(history["loss"])) == 3


def test_losses_are_means_over_rows() -> None:
    model = Reaching()
    model.requires_grad_(True)
    history = train(model, X, epochs=1, batch_size=150, learning_rate=1e-30, validation=X[:7])
    assert history["loss"][0] == pytest.approx(X.square().sum(1).mean().item(), rel=1e-6)
    assert history["validation_loss"][0] == pytest.approx(X[:7].square().sum(1).mean().item(), rel=1e-6)
    assert list(history) == ["loss", "norm", "validation_loss", "validation_norm"]


def test_the_fraction_that_is_set_apart_follows_from_the_seed() -> None:
    numbers = torch.arange(100.0)[:, None].expand(100, 6)

    def parts(seed: int) -> tuple[list[float], list[float]]:
        seen: dict[bool, list[float]] = {True: [], False: []}

        class Watching(Reaching):
            def losses(self, x: Tensor) -> dict[str, Tensor]:
                seen[self.training] += x[:, 0].tolist()
                return super().losses(x)

        trained(Watching(), data=numbers, validation=0.3, seed=seed, epochs=1)
        return sorted(seen[True]), sorted(seen[False])

    learnt, apart = parts(0)
    assert sorted(learnt + apart) == numbers[:, 0].tolist()
    assert len(apart) == 30
    assert apart[-1] - apart[0] > 60  # from all over the data: a block of them has 29
    assert parts(0) == (learnt, apart)
    assert parts(1)[1] != apart


# ---- data of every kind


@pytest.mark.parametrize(
    "data",
    [
        X.numpy(),
        X.numpy().astype(np.float64),
        TensorDataset(X, torch.arange(200)),
        as_dataset(X, noisy()),
        [(row, 0) for row in X],
    ],
    ids=["array", "float64", "dataset", "prepared", "list"],
)
def test_data_of_every_kind_give_the_same_weights(data: Any) -> None:
    if isinstance(data, list):
        data = _Listed(data)
    assert same(trained(), trained(data=data))


class _Listed(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_memory_maps_of_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", (X * 255).to(torch.uint8).numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = noisy()
    history = train(model, as_dataset(mapped, model, scale=1 / 255), epochs=2)
    assert history["loss"][0] < 10
    with pytest.raises(TypeError, match="data have dtype uint8; say how to scale them"):
        train(model, mapped, epochs=2)


@pytest.mark.parametrize(("workers", "own"), [(0, False), (2, False), (0, True)])
def test_loaders_that_shuffle_follow_from_the_seed(workers: int, own: bool, tmp_path: Path) -> None:
    def shuffled() -> DataLoader[Any]:
        torch.seed()  # the rest of the program does as it likes
        generator = torch.Generator().manual_seed(17) if own else None
        return DataLoader(TensorDataset(X), batch_size=50, shuffle=True, num_workers=workers, generator=generator)

    options = {"validation": X, "learning_rate": 0.01}
    expected = trained(data=shuffled(), **options)
    assert same(expected, trained(data=shuffled(), **options))
    assert not same(expected, trained(data=shuffled(), seed=1, **options))
    trained(data=shuffled(), epochs=2, folder=tmp_path, **options)
    assert same(expected, trained(data=shuffled(), folder=tmp_path, resume=True, **options))


def test_loaders_that_shuffle_have_an_order_for_each_epoch() -> None:
    seen: list[tuple[float, ...]] = []

    class Watching(Reaching):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(tuple(x[:, 0].tolist()))
            return super().losses(x)

    loader = DataLoader(TensorDataset(X), batch_size=200, shuffle=True)
    trained(Watching(), data=loader, validation=None, epochs=3)
    assert len(set(seen)) == 3
    assert len({tuple(sorted(rows)) for rows in seen}) == 1


class Numbered(torch.utils.data.SequentialSampler):
    epochs: tuple[int, ...] = ()

    def set_epoch(self, epoch: int) -> None:
        self.epochs = (*self.epochs, epoch)


def test_samplers_of_loaders_are_told_the_epoch() -> None:
    sampler = Numbered(TensorDataset(X))
    trained(data=DataLoader(TensorDataset(X), batch_size=50, sampler=sampler), validation=None, epochs=3)
    assert sampler.epochs == (0, 1, 2)


def test_loaders_keep_their_order() -> None:
    loader = DataLoader(TensorDataset(X, torch.arange(200)), batch_size=50)
    first = trained(data=loader, validation=loader)
    assert same(first, trained(data=loader, validation=loader))
    assert first[1]["loss"][-1] < first[1]["loss"][0]
    with pytest.raises(TypeError, match=r"validation=0\.2 is a fraction, and a DataLoader cannot be split"):
        trained(data=loader)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((row, 0) for row in X)


def test_streams_are_read_in_their_order() -> None:
    assert same(trained(data=DataLoader(X, batch_size=50), validation=X), trained(data=Streamed(), validation=X))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"data": iter([X])}, TypeError, "data is a list_iterator, which ends after one epoch; give a loader"),
        ({"data": DataLoader(X, batch_size=500, drop_last=True)}, ValueError, "loader gave no batches"),
        ({"validation": DataLoader(X, batch_size=500, drop_last=True)}, ValueError, "loader gave no batches"),
    ],
)
def test_loaders_that_give_nothing(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        trained(**{"validation": None} | options)


def test_a_mixture_vae_of_another_dtype_than_its_data() -> None:
    torch.manual_seed(0)
    model = MixtureVAE(6, 2, 2, widths=(4,)).double()
    model.initialize_prior(DataLoader(X, batch_size=50), random_state=0)
    again = model.prior.means.detach().clone()
    model.initialize_prior(DataLoader(X.double(), batch_size=50), random_state=0)
    assert torch.equal(model.prior.means, again)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_full_covariances_in_16_bits(precision: str) -> None:
    torch.manual_seed(0)
    model = MixtureVAE(6, 2, 2, widths=(4,), covariance_type="full")
    model.initialize_prior(model.encode(torch.as_tensor(X)), random_state=0)
    assert np.isfinite(trained(model, precision=precision, epochs=2)[1]["loss"]).all()


def test_float64_models_stay_float64() -> None:
    model = noisy().double()
    weights, history = trained(model)
    assert {value.dtype for value in weights.values()} == {torch.float64}
    assert history["loss"].dtype == np.float64
    assert any(float(np.float32(loss)) != loss for loss in history["loss"])


@pytest.mark.parametrize(
    ("precision", "tolerance", "dtype"),
    [("bf16-mixed", 0.02, torch.float32), ("64", 1e-5, torch.float64)],  # bfloat16 has 8 bits
)
def test_other_precisions(precision: str, tolerance: float, dtype: torch.dtype) -> None:
    def plain() -> Autoencoder:
        torch.manual_seed(1)
        return Autoencoder((6, 3))

    _, expected = trained(plain())
    weights, found = trained(plain(), precision=precision)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=tolerance)
    assert (found["loss"] != expected["loss"]).any()
    assert {value.dtype for value in weights.values()} == {dtype}


def test_float64_keeps_the_digits_of_the_data() -> None:
    fine = X.double() + 1e-9
    model = Reaching()
    history = train(model, fine, epochs=1, learning_rate=1e-30, precision="64")
    assert history["loss"][0] == pytest.approx(fine.square().sum(1).mean().item(), rel=1e-13)


def test_a_training_that_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = noisy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nan"):
        train(model, np.full((10, 6), np.nan), epochs=1, precision="64", folder=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_float64_is_asked_of_no_device_for_a_model_in_float32() -> None:
    """Apple's GPUs do not have it."""
    found: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            single = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in args)
            if single and isinstance(out, Tensor) and out.dtype == torch.float64:
                found.append(function)
            return out

    with Watch():
        _, history = trained(Reaching())
    assert history["loss"].dtype == np.float64
    assert found == []


def test_numbers_of_numpy_are_settings(tmp_path: Path) -> None:
    options = {
        "epochs": np.int64(4),
        "batch_size": np.int32(50),
        "learning_rate": np.float64(0.01),
        "seed": np.uint8(0),
    }
    assert same(trained(), trained(folder=tmp_path, **options))
    assert same(trained(), trained(folder=tmp_path, resume=True))


def test_a_vae_trains() -> None:
    torch.manual_seed(0)
    _, history = trained(VAE(6, 2, (8,)), epochs=3)
    assert {"loss", "validation_loss"} < set(history)
    assert all(np.isfinite(values).all() for values in history.values())


def test_the_model_ends_in_evaluation_mode_where_it_was() -> None:
    model = noisy()
    trained(model)
    assert not model.training
    assert next(model.parameters()).device.type == "cpu"
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


# ---- processes: they run side by side, as each takes seconds to import torch and lightning

KILLED = """
import os, signal, sys
import torch
from tests.torch.nn.test_training import X, noisy, trained
torch.set_num_threads(1)
folder, call, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if when == "step":
    class Dying(type(noisy())):
        calls = 0
        def losses(self, x, *, generator=None):
            self.calls += 1
            if self.calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().losses(x, generator=generator)
    Dying.__qualname__ = "Autoencoder"
    torch.manual_seed(1)
    model = Dying((6, 3), denoising=0.3)
else:  # between the checkpoint of an epoch and the table of losses
    import emalgam.nn.training as training
    write, written = training.History.write, 0
    def dying(self, path):
        global written
        written += 1
        if written == call:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, path)
    training.History.write = dying
    model = noisy()
trained(model, folder=folder)
"""

ALONE = """
import socket, sys
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
from emalgam.nn import Autoencoder, train
assert "lightning" not in sys.modules
torch.set_num_threads(1)
print(train(Autoencoder((6, 3)), torch.rand(200, 6), epochs=3, batch_size=50, progress=True)["loss"].shape)
"""

TWO = """
import os, sys
import torch
from tests.torch.nn.test_training import X, noisy, trained
torch.set_num_threads(1)
if __name__ == "__main__":
    model = noisy()
    rows = []
    def watching(x, *, generator, losses=model.losses):
        rows.append(x)
        return losses(x, generator=generator)
    model.losses = watching
    weights, history = trained(model, devices=2, batch_size=25, validation=X[:40], folder="run")
    if os.environ.get("LOCAL_RANK", "0") == "1":
        torch.save({"weights": weights, "loss": torch.from_numpy(history["loss"]), "rows": rows}, "one.pt")
    else:
        torch.save({"weights": weights, "loss": torch.from_numpy(history["loss"]), "rows": rows}, "zero.pt")
"""

KILLS = {  # 4 steps and 1 of validation in an epoch: the call that does not return, and the epochs done by then
    "in the middle": ("13", "step", 2),
    "between": ("4", "epoch", 3),
}
Child = tuple[Path, "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    """Folders and the processes that run in them."""
    programs = {name: ["-c", KILLED, "run", *kill[:2]] for name, kill in KILLS.items()}
    programs |= {"alone": ["-W", "error", "-c", ALONE], "two": ["two.py"]}
    started: dict[str, Child] = {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for name, arguments in programs.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        if name == "two":
            (folder / "two.py").write_text(TWO)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = folder, subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, **pipes)
    yield started
    for _, process in started.values():
        process.kill()
        process.communicate()


def finished(child: Child) -> tuple[Path, int, str, str]:
    folder, process = child
    out, err = process.communicate(timeout=300)
    return folder, process.returncode, out, err


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_training_goes_on_to_the_same_weights(name: str, children: dict[str, Child]) -> None:
    folder, status, _, err = finished(children[name])
    assert status == -signal.SIGKILL, err
    table = folder / "run" / "losses.csv"
    assert History.read(table).epochs == KILLS[name][2] - (name == "between")  # the checkpoint is one ahead of it
    torch.manual_seed(99)
    other = Autoencoder((6, 3), denoising=0.3)  # begins with other weights: those of the checkpoint count
    expected = trained()
    assert same(expected, trained(other, folder=folder / "run", resume=True))
    assert History.read(table)["loss"].tobytes() == expected[1]["loss"].tobytes()
    assert sorted(os.listdir(folder / "run")) == ["checkpoint.ckpt", "losses.csv"]


def test_alone_in_a_process(children: dict[str, Child]) -> None:
    """Warnings are errors, the network is closed, standard output is the program's own."""
    folder, *result = finished(children["alone"])
    assert result == [0, "(3,)\n", ""]
    assert list(folder.iterdir()) == []


def test_two_devices(children: dict[str, Child]) -> None:
    """Two processes, each with half of the rows, come to the same weights and the same losses."""
    folder, status, _, err = finished(children["two"])
    assert status == 0, err
    zero, one = (torch.load(folder / name, weights_only=True) for name in ("zero.pt", "one.pt"))
    assert torch.equal(zero["loss"], one["loss"])
    assert all(torch.equal(zero["weights"][name], one["weights"][name]) for name in zero["weights"])
    assert History.read(folder / "run" / "losses.csv")["loss"].tolist() == zero["loss"].tolist()
    first = torch.cat([rank["rows"][step] for step in range(4) for rank in (zero, one)])  # 4 steps of 25 rows each
    assert sorted(first.tolist()) == sorted(X.tolist())
    assert not torch.equal(zero["rows"][0], one["rows"][0])
    assert zero["loss"][-1] < zero["loss"][0]


# ---- checkpoints


def test_more_epochs_and_none(tmp_path: Path) -> None:
    trained(folder=tmp_path, epochs=2)
    expected = trained(epochs=4)
    assert same(expected, trained(folder=tmp_path, epochs=4, resume=True))
    (tmp_path / "losses.csv").unlink()
    model = noisy()
    assert same(expected, trained(model, folder=tmp_path, epochs=4, resume=True))  # nothing left to do
    assert History.read(tmp_path / "losses.csv").epochs == 4


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    assert same(trained(), trained(folder=tmp_path / "a" / "b", resume=True))


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    trained(folder=tmp_path, epochs=1)
    with pytest.raises(
        ModelFileError, match=r"checkpoint\.ckpt: there is a checkpoint already; go on with resume=True"
    ):
        trained(folder=tmp_path)
    with pytest.raises(ValueError, match="resume=True needs the folder"):
        trained(resume=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 1}, "seed 0; this one has 1"),
        ({"batch_size": 20}, "batch_size 50; this one has 20"),
        ({"learning_rate": 0.1}, r"learning_rate 0\.01; this one has 0\.1"),
        ({"precision": "bf16-mixed"}, "precision '32'; this one has 'bf16-mixed'"),
        ({"data": X[:150]}, "rows 160; this one has 120"),
        ({"data": X + 1e-3}, "checksum"),
        ({"validation": X[:40]}, "rows 160; this one has 200"),
        ({"model": Autoencoder((6, 2), denoising=0.3)}, "configuration .*'widths': .*; this one has"),
        ({"model": Reaching()}, "model 'Autoencoder'; this one has 'Reaching'"),
    ],
)
def test_other_trainings_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    trained(folder=tmp_path, epochs=1)
    content = (tmp_path / "checkpoint.ckpt").read_bytes()
    with pytest.raises(ModelFileError, match=rf"checkpoint\.ckpt: is of a training with {text}"):
        trained(folder=tmp_path, resume=True, **options)
    assert (tmp_path / "checkpoint.ckpt").read_bytes() == content


def test_a_pretraining_is_another_training(tmp_path: Path) -> None:
    model = MixtureVAE(6, 2, 2, widths=(4,))
    model.pretraining = True
    trained(model, folder=tmp_path, epochs=1)
    model.pretraining = False
    with pytest.raises(ModelFileError, match="is of a training with pretraining True; this one has False"):
        trained(model, folder=tmp_path, resume=True)


def test_fewer_epochs_than_there_were(tmp_path: Path) -> None:
    trained(folder=tmp_path, epochs=3)
    with pytest.raises(ModelFileError, match=r"checkpoint\.ckpt: has 3 epochs already; give epochs >= 3"):
        trained(folder=tmp_path, epochs=2, resume=True)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_checkpoints_execute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained(folder=tmp_path, epochs=1)
    path = tmp_path / "checkpoint.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"evil": Evil()}, path)
    with pytest.raises(ModelFileError, match=r"checkpoint\.ckpt: is no checkpoint, or is cut short or forged"):
        trained(folder=tmp_path, resume=True)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelFileError, match=r"checkpoint\.ckpt: is no checkpoint, or is cut short or forged"):
        trained(folder=tmp_path, resume=True)
    assert not (tmp_path / "evil").exists()


def test_forged_and_cut_checkpoints(tmp_path: Path) -> None:
    trained(folder=tmp_path, epochs=1)
    path = tmp_path / "checkpoint.ckpt"
    content = path.read_bytes()
    checkpoint = torch.load(path, weights_only=True)

    def refused(text: str) -> None:
        with pytest.raises(ModelFileError, match=rf"checkpoint\.ckpt: {text}"):
            trained(folder=tmp_path, resume=True)

    for cut in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        refused("is no checkpoint, or is cut short or forged")
    for change, text in [
        ({"emalgam": None}, "format is no 'emalgam.training'"),
        ({"emalgam": checkpoint["emalgam"] | {"format_version": 2}}, "format_version is 2; expected 1"),
        ({"emalgam": checkpoint["emalgam"] | {"identity": None}}, "identity is missing"),
        ({"state_dict": {}}, r"model\.encoder\.0\.weight has shape None, the model's has \(3, 6\)"),
        ({"state_dict": 3}, "state_dict is int, expected a dict"),
        ({"loops": None}, "loops is NoneType, expected a dict"),
        ({"loops": {"fit_loop": 3}}, "holds no state to go on from .*forged"),
        ({"optimizer_states": []}, "optimizer_states has 0 entries, expected 1"),
        ({"optimizer_states": [{}]}, "holds no state to go on from .*forged"),
        ({"callbacks": {}}, "callbacks has no 'Recorder'"),
        ({"callbacks": {"Recorder": {"losses": 3}}}, "holds no state to go on from .*forged"),
    ]:
        torch.save(checkpoint | change, path)
        refused(text)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    refused(r"archive claims 10000000 bytes in a file of \d+ \(forged\?\)")


# ---- early stopping


class Straying(Reaching):
    """The validation loss falls for some epochs and then rises."""

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            return {"loss": (self.center - 1.0).square().sum()}
        return {"loss": (self.center - 0.35).square().sum()}


def test_patience_keeps_the_best_weights(tmp_path: Path) -> None:
    options = {"learning_rate": 0.1, "batch_size": 200, "validation": X[:50], "epochs": 20}
    _, unstopped = trained(Straying(), **options)
    best = int(unstopped["validation_loss"].argmin())
    assert 1 <= best <= 10
    model = Straying()
    first = trained(model, patience=3, folder=tmp_path, **options)
    assert first[1].epochs == best + 1 + 3
    assert first[1].best_epoch == best + 1
    losses = model.eval().losses(X)
    assert losses["loss"].item() == pytest.approx(first[1]["validation_loss"][best], rel=1e-6)
    assert same(first, trained(Straying(), patience=3, folder=tmp_path, resume=True, **options))  # it had stopped
    more = trained(Straying(), patience=5, folder=tmp_path, resume=True, **options)
    assert same(more, trained(Straying(), patience=5, **options))


def test_patience_that_comes_later(tmp_path: Path) -> None:
    """The best weights have to be there: those of the last epoch are, others are not."""
    options = {"learning_rate": 0.1, "batch_size": 200, "validation": X[:50], "folder": tmp_path, "resume": True}
    whole = {**options, "folder": None, "resume": False, "patience": 3, "epochs": 20}
    expected = trained(Straying(), **whole)
    best = expected[1].best_epoch
    trained(Straying(), epochs=best, **options)
    before = (tmp_path / "checkpoint.ckpt").read_bytes()
    assert same(expected, trained(Straying(), **options | {"patience": 3, "epochs": 20}))
    (tmp_path / "checkpoint.ckpt").write_bytes(before)
    trained(Straying(), epochs=best + 1, **options)
    text = rf"checkpoint\.ckpt: has not the weights of epoch {best}, the best so far, .*; go on without it"
    with pytest.raises(ModelFileError, match=text):
        trained(Straying(), **options | {"patience": 3, "epochs": 20})


def test_patience_that_was_given_up(tmp_path: Path) -> None:
    """What is then the best is not kept, and an older one must not take its place."""
    options = {"learning_rate": 0.1, "batch_size": 200, "validation": X[:50], "folder": tmp_path, "resume": True}
    best = trained(Straying(), **options | {"folder": None, "resume": False, "epochs": 20})[1].best_epoch
    trained(Straying(), **options | {"patience": 3, "epochs": best - 1})
    trained(Straying(), **options | {"epochs": best + 1})
    with pytest.raises(ModelFileError, match=f"has not the weights of epoch {best}"):
        trained(Straying(), **options | {"patience": 9, "epochs": 20})


def test_patience_that_is_not_needed() -> None:
    model = Straying()
    options = {"learning_rate": 0.1, "batch_size": 200, "validation": X[:50], "epochs": 6}
    _, history = trained(model, patience=50, **options)
    assert history.epochs == 6
    assert history.best_epoch < 6
    assert model.losses(X)["loss"].item() == pytest.approx(history["validation_loss"].min(), rel=1e-6)


# ---- what stops a training


class Failing(Reaching):
    def __init__(self, call: int, name: str, value: float) -> None:
        super().__init__()
        self.at, self.name, self.value = call, name, value

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        losses = super().losses(x)
        return losses | {self.name: losses[self.name] * self.value} if self.calls == self.at else losses


@pytest.mark.parametrize(
    ("call", "name", "value", "text"),
    [
        (1, "loss", float("nan"), "loss is nan in epoch 1, step 1; training has stopped, with the weights before"),
        (13, "loss", float("inf"), "loss is inf in epoch 3, step 3;"),
        (6, "norm", float("-inf"), "norm is -inf in epoch 2, step 1;"),
        (10, "norm", float("nan"), "norm is nan in the validation after epoch 2, step 1;"),
    ],
)
def test_losses_that_are_not_finite_stop(call: int, name: str, value: float, text: str, tmp_path: Path) -> None:
    model = Failing(call, name, value)
    with pytest.raises(FloatingPointError, match=text):
        trained(model, folder=tmp_path)
    assert model.calls == call
    assert torch.isfinite(model.center).all()
    assert not model.training
    assert History.read(tmp_path / "losses.csv").epochs == (call - 1) // 5
    assert same(trained(reaching_as("Failing")), trained(Failing(0, name, 1.0), folder=tmp_path, resume=True))


@pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["32", "16-mixed"])  # the second is bfloat16 on a CPU, which scales no gradients
def test_gradients_that_are_not_finite_stop(precision: str) -> None:
    class Cornered(Reaching):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            losses = super().losses(x)
            root = self.center.abs().sum().sqrt()  # 0 at 0, and its slope is infinite there
            return {"loss": root if self.calls == 5 + 3 else losses["loss"] * 0.0}

    model = Cornered()
    text = "the gradient of center is nan in epoch 2, step 3; training has stopped, with the weights before this step"
    with pytest.raises(FloatingPointError, match=text):
        trained(model, precision=precision)
    assert model.center.tolist() == [0.0] * 6


def test_large_gradients_are_finite() -> None:
    class Steep(Reaching):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": 1e30 * super().losses(x)["loss"]}  # whose square is not, in float32

    assert torch.isfinite(trained(Steep(), epochs=1)[0]["center"]).all()


def test_rows_are_those_of_the_data_whatever_is_set_apart() -> None:
    bad = X.clone()
    bad[150, 2] = 2.0
    for options in ({"validation": 0.5}, {"validation": X[:9]}, {"validation": bad, "data": X}):
        with pytest.raises(ValueError, match=r"x is 2 at \[150, 2\]"):
            trained(Autoencoder((6, 3), output="sigmoid"), **({"data": bad} | options))


def test_batches_of_a_loader_are_named() -> None:
    bad = X.clone()
    bad[150, 2] = torch.nan
    with pytest.raises(ValueError, match=r"epoch 1, step 4: x contains nan at \[0, 2\]"):
        trained(data=DataLoader(bad, batch_size=50), validation=None)
    with pytest.raises(ValueError, match=r"the validation after epoch 1, step 4: x contains nan at \[0, 2\]"):
        trained(validation=DataLoader(bad, batch_size=50))


def reaching_as(name: str) -> Reaching:
    """Of another name: a checkpoint's training goes by it."""
    return type(name, (Reaching,), {})()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, in a background job too, whose shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_control_c_is_a_keyboard_interrupt(tmp_path: Path) -> None:
    class Interrupting(Reaching):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            if self.calls == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return super().losses(x)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trained(Interrupting(), folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert History.read(tmp_path / "losses.csv").epochs == 1


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (X[:, :5], ValueError, r"x has shape \(\d+, 5\); expected \(N, 6\)"),
        (X.reshape(200, 2, 3), ValueError, r"expected \(N, 6\); call x\.reshape\(-1, 6\)"),
        (X * 2, ValueError, r"x is 1\.\d+ .*expects values in \[0, 1\]"),
        (X.where(X < 0.99, torch.nan), ValueError, "x contains nan"),
        (X.to(torch.complex64), TypeError, "data have dtype torch.complex64; expected real numbers"),
        (X[:0], ValueError, "data have no rows"),
        (DataLoader(X[:, :5], batch_size=50), ValueError, r"x has shape \(50, 5\); expected \(N, 6\)"),
        (DataLoader(X * 2, batch_size=50), ValueError, r"expects values in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("validation", [False, True])
def test_data_that_the_model_refuses(data: Any, error: type[Exception], text: str, validation: bool) -> None:
    model = Autoencoder((6, 3), output="sigmoid")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    several = {"data": X, "validation": data} if validation and not isinstance(data, DataLoader) else {"data": data}
    with pytest.raises(error, match=text):
        train(model, **several, epochs=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0; expected an integer >= 1"),
        ({"batch_size": 2.5}, ValueError, r"batch_size is 2\.5; expected an integer >= 1"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate is 0\.0; expected a finite number > 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate is nan; expected a finite number"),
        ({"seed": -1}, ValueError, "seed is -1; expected an integer >= 0"),
        ({"patience": 0}, ValueError, "patience is 0; expected an integer >= 1"),
        ({"patience": 2, "validation": None}, ValueError, "patience=2 needs validation data"),
        ({"validation": 1.5}, ValueError, r"validation is 1\.5; expected data, or a fraction"),
        ({"validation": 0}, ValueError, "validation is 0; expected data, or a fraction"),
        ({"validation": 1}, ValueError, "validation is 1; expected data, or a fraction"),
        ({"validation": np.float32(2)}, ValueError, "validation is .*2.*; expected data, or a fraction"),
        ({"validation": 0.001}, ValueError, r"validation=0\.001 of 200 rows leaves 0 and 200"),
        ({"precision": "8"}, ValueError, "Precision '8' is invalid"),
        ({"precision": "16-true"}, ValueError, "Adam divides by 0 in float16, .*; train in float32 with precision="),
        ({"model": noisy().half()}, ValueError, "Adam divides by 0 in float16"),
        ({"model": nn.Linear(6, 6)}, TypeError, "model is a Linear without a method losses"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        trained(**options)


def test_losses_without_the_one_to_minimise() -> None:
    class Nameless(Reaching):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            return {"elbo": super().losses(x)["loss"]}

    with pytest.raises(ValueError, match="losses of Nameless gives elbo; expected 'loss' among them"):
        trained(Nameless())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda loss: loss.expand(3), r"losses gives 'loss' as a tensor of shape \(3,\); expected tensors \(\): means"),
        (lambda loss: loss.item(), "losses gives 'loss' as a float; expected tensors"),
    ],
)
def test_losses_that_are_no_scalars(change: Any, text: str) -> None:
    class Odd(Reaching):
        def losses(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": change(super().losses(x)["loss"])}

    with pytest.raises(TypeError, match=text):
        trained(Odd())


# ---- lightning as a guest


class Remembering:
    """As much of lightning's logger as its users write."""

    def __init__(self) -> None:
        from lightning.pytorch.loggers.logger import DummyLogger

        self.rows: list[dict[str, float]] = []
        outer = self

        class Logger(DummyLogger):
            def log_metrics(self, *arguments: Any, **named: Any) -> None:
                outer.rows.append(dict(named.get("metrics") or arguments[0]))

        self.logger = Logger()


def test_loggers_get_the_losses() -> None:
    remembering = Remembering()
    _, history = trained(loggers=[remembering.logger])
    rows = [row for row in remembering.rows if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(history["loss"].tolist(), rel=1e-6)
    assert [row["validation_loss"] for row in rows] == pytest.approx(history["validation_loss"].tolist(), rel=1e-6)


def test_nothing_is_printed_warned_or_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TMPDIR", str(work))
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        trained(folder=tmp_path / "run", progress=False)
        trained(validation=None)
    assert [str(warning.message) for warning in caught] == []
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert list(work.iterdir()) == []
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["checkpoint.ckpt", "losses.csv"]


def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes the captured stream for a terminal
    trained()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Epoch 3/3" in err
    assert "validation_loss" in err
    trained(progress=False)
    assert capfd.readouterr() == ("", "")


# ---- histories


@pytest.fixture
def history() -> History:
    return History({"loss": [1 / 3, 0.1, 1e-300], "validation_loss": [2.0, 1.0, 1.5]})


def test_histories_are_read_and_drawn(history: History, tmp_path: Path) -> None:
    history.write(tmp_path / "losses.csv")
    again = History.read(tmp_path / "losses.csv")
    assert {name: values.tolist() for name, values in again.items()} == {
        name: values.tolist() for name, values in history.items()
    }
    assert (tmp_path / "losses.csv").read_text().splitlines()[0] == "epoch,loss,validation_loss"
    assert (again.epochs, again.best_epoch, len(again)) == (3, 2, 2)
    assert "3 epochs: loss 1e-300, validation_loss 1.5" in repr(again)
    line = plot.losses(again).lines[0]
    assert line.get_ydata().tolist() == history["loss"].tolist()


@pytest.mark.parametrize(
    "content",
    [b"", b"a,b\n1,2\n", b"epoch,loss\n1\n", b"epoch,loss\n1,x\n", b"\xff\xfe", b'epoch,"loss\n1,2' * 9999, None],
)
def test_tables_that_are_no_history(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "losses.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"losses\.csv: "):
        History.read(tmp_path / "losses.csv")


def test_histories_of_unequal_length() -> None:
    with pytest.raises(ValueError, match=r"losses have \[1, 2\] entries; expected one for each epoch"):
        History({"loss": [1.0], "kl": [1.0, 2.0]})
