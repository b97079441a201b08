"""`emalgam train-ae` and `emalgam generate`: as processes, and where nothing depends on that, through `cli.main`."""

from __future__ import annotations

import gzip
import json
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from emalgam import cli
from emalgam.nn import (
    VAE,
    ConvAutoencoder,
    History,
    LatentMixtureSampler,
    MixtureVAE,
    load_extra,
    load_model,
    load_sampler,
    save_model,
)
from emalgam.tables import read_table, write_table
from tests.processes import output_of, run, run_json

N = 240
SHORT = ("--epochs", 2, "--batch-size", 60, "--threads", 1)
QUICK = (*SHORT, "-k", "1:3")


MIXTURE_VAE = ("--model", "mixture-vae", "--clusters", 3, "--latent", 2, "--widths", 16)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Bright squares on black, 8 × 8, bytes."""
    rng = np.random.default_rng(0)
    images = np.zeros((N, 8, 8), np.uint8)
    for image, (top, left) in zip(images, rng.integers(0, 5, (N, 2)), strict=True):
        image[top : top + 4, left : left + 4] = rng.integers(150, 256, (4, 4))
    return images


@pytest.fixture(scope="module")
def folder(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    np.save(folder / "images.npy", images)
    np.save(folder / "flat.npy", images.reshape(N, 64) / 255)
    idx = bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape) + images.tobytes()
    (folder / "images-idx3-ubyte").write_bytes(idx)
    (folder / "images-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    write_table(folder / "table.parquet", np.random.default_rng(1).normal(size=(N, 5)) * 3)
    return folder


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command changes in its process."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(torch, "set_num_threads", lambda wanted: None)


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON object that a command prints."""
    status = cli.main([*map(str, arguments), "--json"])
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    return json.loads(shown.out)


def fault(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """The one line on standard error."""
    assert cli.main(list(map(str, arguments))) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("error: ").rstrip("\n")


# ---- as processes


def test_from_data_to_a_picture(folder: Path, tmp_path: Path) -> None:
    """The two commands of the README, one after the other."""
    run_folder, picture = tmp_path / "run", tmp_path / "samples.png"
    arguments = (folder / "flat.npy", "--model", "vae", "--latent", 3, "-o", run_folder)
    trained = run_json("train-ae", *arguments, *QUICK)
    assert (trained["model"], trained["n_samples"], trained["epochs"]) == ("vae", N, 2)
    assert (trained["data_shape"], trained["latent_shape"]) == ([64], [3])
    assert 1 <= trained["mixture_components"] <= 3
    history = History.read(run_folder / "losses.csv")
    assert trained["validation_loss"] == history["validation_loss"][-1]
    for name in ("losses", "reconstructions"):
        assert imread(run_folder / f"{name}.png").shape[2] == 4
    assert load_sampler(run_folder).mixture.n_components == trained["mixture_components"]
    done = run("generate", run_folder, "-n", 64, "-o", picture)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("prior", "output")))
    assert lines == {"prior": f"mixture of {trained['mixture_components']}", "output": str(picture)}
    assert done.stderr == ""
    assert imread(picture).shape[2] == 4


def test_without_torch_the_error_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    for arguments in (["train-ae", str(folder / "flat.npy"), "-o", str(tmp_path)], ["generate", "run", "-o", "x.png"]):
        program = (
            "import contextlib, io, sys; sys.modules['torch'] = None\n"
            "from emalgam.cli import main\n"
            "with contextlib.redirect_stderr(io.StringIO()) as shown:\n"
            f"    status = main({arguments!r})\n"
            "print(status, shown.getvalue())"
        )
        expected = "1 error: emalgam.nn needs torch, which is not installed: pip install emalgam[torch]"
        assert output_of(program) == expected


def test_help_names_the_commands() -> None:
    text = run("--help", COLUMNS="120").stdout
    assert "train-ae" in text
    assert "generate" in text


# ---- models and data


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


def test_idx_files_give_what_arrays_give(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name in ("images.npy", "images-idx3-ubyte", "images-idx3-ubyte.gz"):
        report(capsys, "train-ae", folder / name, "--scale", "1/255", "-o", tmp_path / name, *QUICK, "--latent", 2)
        found.append(weights_of(tmp_path / name))
    for other in found[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in found[0].items())
    assert load_extra(tmp_path / "images.npy")["image_shape"] == [8, 8]


def test_convolutions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "conv", "--widths", 4, "--latent", 2, "--denoising", 0.2, *QUICK)
    trained = report(capsys, "train-ae", folder / "images.npy", "--scale", "1/255", "-o", tmp_path / "a", *options)
    assert (trained["data_shape"], trained["latent_shape"]) == ([1, 8, 8], [2, 2, 2])
    model = load_model(tmp_path / "a")
    assert isinstance(model, ConvAutoencoder)
    assert (tuple(model.channels), model.denoising, model.configuration()["output"]) == ((4, 2), 0.2, "sigmoid")
    report(capsys, "train-ae", folder / "flat.npy", "--shape", "1,8,8", "-o", tmp_path / "b", *options)
    assert load_model(tmp_path / "b").data_shape == (1, 8, 8)
    drawn = report(capsys, "generate", tmp_path / "a", "-n", 5, "-o", tmp_path / "x.npy", "--seed", 3)
    x = np.load(tmp_path / "x.npy")
    assert drawn["data_shape"] == [1, 8, 8]
    np.testing.assert_array_equal(x, load_sampler(tmp_path / "a").sample(5, 3)[0].numpy())


def test_a_mixture_vae_is_pretrained_and_draws_from_its_prior(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*MIXTURE_VAE, "--pretrain", 3, *SHORT)
    trained = report(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path / "run", *options)
    assert trained["mixture_components"] is None
    assert History.read(tmp_path / "run" / "pretraining" / "losses.csv").epochs == 3
    model = load_model(tmp_path / "run")
    assert isinstance(model, MixtureVAE)
    assert model.n_components == 3
    assert not model.pretraining
    drawn = report(capsys, "generate", tmp_path / "run", "-n", 30, "-o", tmp_path / "x.csv")
    assert drawn["prior"] == "the model's own"
    assert read_table(tmp_path / "x.csv").shape == (30, 64)
    longer = [3 if option == 2 else option for option in options]  # epochs, and the latents
    longer[longer.index("--latent") + 1] = 2
    resumed = report(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path / "run", *longer, "--resume")
    assert resumed["epochs"] == 3
    text = fault(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path / "run", *options, "--pretrain", 9, "--resume")
    assert text == f"{tmp_path / 'run'}: had 3 epochs of pre-training, and --pretrain is 9"
    text = fault(capsys, "generate", tmp_path / "run", "--prior", "mixture", "-o", tmp_path / "x.png")
    assert "sampler is missing: the model was saved without one" in text


def test_options_of_models_reach_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def configuration(data: str, *options: object) -> dict[str, Any]:
        run_folder = tmp_path / str(len(list(tmp_path.iterdir())))
        report(capsys, "train-ae", folder / data, "-o", run_folder, *options, "--epochs", 1, "--threads", 1)
        return load_model(run_folder).configuration()

    mixture_options = ("--covariance", "full", "--kl", "monte_carlo", "--activation", "tanh", "--denoising", 0.1)
    found = configuration("flat.npy", *MIXTURE_VAE, *mixture_options)
    expected = {"covariance_type": "full", "kl": "monte_carlo", "activation": "tanh", "denoising": 0.1}
    assert {name: found[name] for name in expected} == expected
    conv = ("--model", "conv", "--shape", "8,8", "--widths", 4, "--latent", 1, "-k", 1)
    found = configuration("flat.npy", *conv, "--tied", "--upsample", "nearest", "--activation", "elu")
    assert (found["tied"], found["upsample"], found["activation"]) == (True, "nearest", "elu")


def test_threads_are_those_of_the_mixture_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, found = LatentMixtureSampler.fit, []

    def watched(self: LatentMixtureSampler, *arguments: Any, **options: Any) -> LatentMixtureSampler:
        found.append(self.n_threads)
        return fit(self, *arguments, **options)

    monkeypatch.setattr(LatentMixtureSampler, "fit", watched)
    report(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path, "--latent", 2, *QUICK)
    assert found == [1]


def test_a_mixture_vae_in_float64(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path, *MIXTURE_VAE, "--precision", 64, *SHORT)
    assert {weight.dtype for weight in load_model(tmp_path).parameters()} == {torch.float64}


def test_generation_from_a_bfloat16_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = VAE(6, 2, (4,)).to(torch.bfloat16)
    sampler = LatentMixtureSampler(2, random_state=0).fit_latents(np.random.default_rng(0).normal(size=(50, 2)))
    save_model(model, tmp_path, sampler)
    for prior in ("model", "mixture"):
        report(capsys, "generate", tmp_path, "--prior", prior, "-n", 7, "-o", tmp_path / "x.npy")
        x = np.load(tmp_path / "x.npy")
        assert (x.shape, x.dtype) == ((7, 6), np.float32)
        assert np.isfinite(x).all()


KILLED = """
import os, signal, sys
from emalgam import cli
from emalgam.nn import training
write, tables = training.History.write, []
def dying(self, path):
    tables.append(path)
    if len(tables) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path)
training.History.write = dying
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("tables", [3, 6])  # there is one at the start and after each of 2 epochs, in both steps
def test_a_killed_mixture_vae_goes_on_to_the_same_file(
    tables: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*map(str, ("train-ae", folder / "flat.npy", *MIXTURE_VAE, *SHORT, "-o"))]
    killed = [sys.executable, "-c", KILLED, str(tables), *arguments, str(tmp_path / "a")]
    assert subprocess.run(killed, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "a" / "checkpoint.ckpt").exists() == (tables > 3)
    text = fault(capsys, *arguments, tmp_path / "a")
    assert text == f"{tmp_path / 'a'}: there is a training in it already; go on with --resume, or name another folder"
    report(capsys, *arguments, tmp_path / "a", "--resume")
    report(capsys, *arguments, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_table_outside_the_unit_interval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "table.parquet"
    report(capsys, "train-ae", data, "--model", "linear", "--latent", 2, "-o", tmp_path / "linear", *QUICK)
    vae = report(capsys, "train-ae", data, "--model", "vae", "--latent", 2, "-o", tmp_path / "vae", *QUICK)
    assert vae["data_shape"] == [5]
    assert load_model(tmp_path / "vae").configuration()["likelihood"]["name"] == "gaussian"
    assert load_extra(tmp_path / "vae")["image_shape"] == [1, 5]
    prior = report(capsys, "generate", tmp_path / "vae", "--prior", "model", "-o", tmp_path / "x.parquet")
    assert prior["prior"] == "the model's own"
    assert read_table(tmp_path / "x.parquet").shape == (64, 5)
    text = fault(capsys, "generate", tmp_path / "linear", "--prior", "model", "-o", tmp_path / "x.png")
    assert "LinearAutoencoder has no prior to draw latents from" in text


def test_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        report(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path / name, "--latent", 2, "--seed", seed, *QUICK)
        report(capsys, "generate", tmp_path / name, "-n", 9, "-o", tmp_path / f"{name}.npy", "--seed", seed)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.npy").read_bytes() != (tmp_path / "c.npy").read_bytes()
    a, b = (weights_of(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_validation_from_a_file_and_none_at_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train-ae", folder / "flat.npy", "--latent", 2, *QUICK)
    from_file = report(capsys, *arguments, "-o", tmp_path / "a", "--validation", folder / "flat.npy", "--patience", 1)
    assert "validation_loss" in from_file
    without = report(capsys, *arguments, "-o", tmp_path / "b", "--validation", 0)
    assert "validation_loss" not in without


# ---- bad input


def test_bad_input_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, flat, images = tmp_path / "run", folder / "flat.npy", folder / "images.npy"
    np.save(tmp_path / "nan.npy", np.full((10, 4), np.nan))
    np.save(tmp_path / "row.npy", np.zeros(4))
    (tmp_path / "text.txt").write_text("1 2 3\n")
    (tmp_path / "cut.idx").write_bytes((folder / "images-idx3-ubyte").read_bytes()[:100])
    (tmp_path / "wrong.npy").write_bytes(b"not an array")
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "wrong.npy",), f"{tmp_path / 'wrong.npy'}: "),
        ((images,), "holds uint8 numbers; say how to scale them: --scale 1/255 for images of bytes"),
        ((tmp_path / "none.npy",), "there is no such file"),
        ((tmp_path / "text.txt",), ".txt files are not supported; supported are .npy, .npz, .csv, .parquet and IDX"),
        ((tmp_path / "cut.idx",), "does not fit in"),
        ((tmp_path / "row.npy",), "has shape (4,); expected rows of data: (N, features) or (N, H, W)"),
        ((tmp_path / "nan.npy",), "x contains nan at [0, 0]; expected finite numbers"),
        ((flat, "--shape", "9,9"), "data of --shape (9, 9) have 81 values"),
        ((folder / "table.parquet", "--model", "conv"), "5 values are no square image; give --shape C,H,W"),
        ((folder / "table.parquet", "--model", "vae", "--likelihood", "bernoulli"), "expects values in [0, 1]"),
        ((images, "--model", "vae", "--scale", 1e30, "--learning-rate", 1e30), "in epoch 1, step"),
        ((flat, "--validation", images), "holds uint8 numbers"),
        ((flat, "--validation", 0.001), "of 240 rows leaves"),
        # 2^50 bytes, more than addresses reach
        (
            (flat, "--widths", "1,16777216,16777216"),
            "out of memory: can't allocate memory: you tried to allocate 11258",
        ),
    ]
    for number, (arguments, message) in enumerate(wrong):
        assert message in fault(capsys, "train-ae", *arguments, "-o", out / str(number), *QUICK), arguments


def test_a_bad_command_line_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[tuple[tuple[object, ...], str]] = [
        (("--beta", 2), "--beta is for vae, mixture-vae, not for --model autoencoder; leave it out"),
        (("--model", "linear", "--widths", 3), "--widths is for autoencoder, conv, vae, mixture-vae, not for"),
        (
            ("--model", "vae", "--denoising", 0.5),
            "--denoising is for autoencoder, conv, mixture-vae, not for --model",
        ),
        (("--model", "vae", "--clusters", 3), "--clusters is for mixture-vae, not for --model vae"),
        (("--tied", "--model", "vae"), "--tied is for linear, autoencoder, conv, not for --model vae; leave it out"),
        (
            (*MIXTURE_VAE, "-k", 3),
            "--components is for linear, autoencoder, conv, vae, not for --model mixture-vae",
        ),
        ((*MIXTURE_VAE, "--covariance", "tied"), "--covariance of a mixture VAE's prior is diag or full"),
        (("--model", "mixture-vae"), "needs --clusters, the number of components of its prior"),
        (("--patience", 3, "--validation", 0), "--patience looks at the validation loss"),
        (("--widths", "3,x"), "'3,x' is no list of numbers >= 1, such as 256,64"),
        (("--scale", "1/0"), "'1/0' is no number other than 0, such as 0.5 or 1/255"),
        (("--validation", 1.5), "1.5 is no fraction, 0 <= fraction < 1"),
        (("-k", "3:1"), "'3:1' is no number of components"),
    ]
    for arguments, message in wrong:
        text = fault(capsys, "train-ae", folder / "flat.npy", "-o", tmp_path / "run", *arguments, status=2)
        assert message in text
    assert not (tmp_path / "run").exists()


def test_a_training_is_not_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("train-ae", folder / "flat.npy", "-o", tmp_path / "run", "--latent", 2, *QUICK)
    trained = report(capsys, *arguments)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    text = fault(capsys, *arguments)
    assert text == f"{tmp_path / 'run'}: there is a training in it already; go on with --resume, or name another folder"
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    resumed = report(capsys, *arguments, "--resume")
    assert {name: value for name, value in resumed.items() if "seconds" not in name} == {
        name: value for name, value in trained.items() if "seconds" not in name
    }
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert (cli.main([*map(str, arguments), "--resume", "--quiet"]), capsys.readouterr().out) == (0, "")


def test_generation_from_what_is_no_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "x.png"
    assert fault(capsys, "generate", folder / "flat.npy", "-o", picture).startswith(f"{folder / 'flat.npy'}: header")
    assert "there is no such file" in fault(capsys, "generate", tmp_path / "none", "-o", picture)
    save_model(ConvAutoencoder((1, 8, 8), (4, 2)), tmp_path)
    assert "has no prior to draw latents from" in fault(capsys, "generate", tmp_path, "-o", picture)
    text = fault(capsys, "generate", tmp_path, "-o", tmp_path / "x.gif")
    assert "expected a picture, .png, or numbers: .npy, .npz, .csv, .parquet" in text
    text = fault(capsys, "generate", tmp_path, "-o", tmp_path / "nowhere" / "x.png")
    assert f"there is no folder {tmp_path / 'nowhere'}" in text
