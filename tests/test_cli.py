"""The command line as a process: what it prints where, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import emalgam
import emalgam_kernels
from emalgam import cli
from emalgam.cli import options
from emalgam.mixture import Mixture
from emalgam.model_file import load_metadata, load_model, save_model
from emalgam.tables import FORMATS, read_table, write_table
from tests.conftest import need
from tests.processes import OnTerminal, error_of, run, run_json

K, D, N = 3, 2, 900
TRUE_MEANS = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.normal(size=(N, D)) + TRUE_MEANS[np.arange(N) % K]


@pytest.fixture(scope="module")
def folder(x: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in every format and a model fitted to them."""
    folder = tmp_path_factory.mktemp("cli")
    for suffix in FORMATS:
        write_table(folder / f"x{suffix}", x)
    run("fit", folder / "x.npy", "-k", K, "-o", folder / "model.safetensors", "--quiet")
    return folder


def test_help_names_every_command_and_the_exit_codes() -> None:
    for arguments in ([], ["--help"]):
        text = run(*arguments, COLUMNS="120").stdout
        for command in ("fit", "fit-many", "score", "predict", "sample", "info"):
            assert command in text
        assert "Exit codes: 0 done" in text
    assert "--covariance" in run("fit", "--help", COLUMNS="120").stdout


def test_version() -> None:
    assert run("--version").stdout == f"emalgam {emalgam.__version__}\n"


def test_every_backend_can_be_named() -> None:
    assert get_args(get_args(options.Backend)[0]) == ("auto", *emalgam_kernels.BACKENDS)


@pytest.mark.parametrize("suffix", FORMATS)
def test_fit_finds_the_components_in_every_format(suffix: str, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    report = run_json("fit", folder / f"x{suffix}", "-k", K, "--covariance", "full", "-o", model, "--tol", 1e-6)
    mixture = load_model(model)
    order = np.lexsort(mixture.means.round().T)
    np.testing.assert_allclose(mixture.means[order], TRUE_MEANS[[0, 1, 2]], atol=0.3)
    assert report["converged"] is True
    assert (report["n_samples"], report["n_features"], report["n_components"]) == (N, D, K)
    assert report["covariance_type"] == "full"
    assert report["effective_components"] == K
    assert report["backend"] in emalgam_kernels.BACKENDS
    assert report["output"] == str(model)
    log_prob = mixture.log_prob(read_table(folder / "x.npy"))
    assert report["log_likelihood"] == pytest.approx(log_prob.sum(), rel=1e-12)
    assert report["bic"] == pytest.approx(mixture.bic(read_table(folder / "x.npy")), rel=1e-12)
    assert load_metadata(model)["n_iter"] == str(report["n_iter"])


def test_the_same_seed_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 2)):
        options = ["--seed", 3, "--init", "random", "--threads", threads, "-o", tmp_path / name, "--quiet"]
        run("fit", folder / "x.npy", "-k", 2, *options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_fit_reports_in_words_and_keeps_quiet_when_told(folder: Path) -> None:
    done = run("fit", folder / "x.npy", "-k", K)
    lines = dict(
        line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("backend", "converged"))
    )
    assert lines == {"backend": run_json("info")["default_backend"], "converged": "yes"}
    assert done.stderr == ""  # no progress: it is no terminal
    quiet = run("fit", folder / "x.npy", "-k", K, "--quiet")
    assert quiet.stdout == quiet.stderr == ""


def test_a_fit_that_did_not_converge_warns_and_succeeds(folder: Path) -> None:
    done = run("fit", folder / "x.npy", "-k", K, "--init", "random", "--max-iter", 1, "--json")
    assert json.loads(done.stdout)["converged"] is False
    assert done.stderr.startswith("warning: EM did not converge in 1 iterations")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("algorithm", ["packed", "direct"])
def test_fit_takes_every_option(covariance: str, algorithm: str, folder: Path) -> None:
    options = ["--covariance", covariance, "--algorithm", algorithm, "--n-init", 2, "--init", "k-means++"]
    more = ["--reg-covar", 0.25, "--on-degenerate", "reseed", "--backend", "reference", "--threads", 1]
    report = run_json("fit", folder / "x.npy", "-k", K, *options, *more)
    assert report["covariance_type"] == covariance
    assert report["algorithm"] == algorithm
    assert report["backend"] == "reference"


def test_reg_covar_is_honoured(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "wide.safetensors"
    run("fit", folder / "x.npy", "-k", K, "--covariance", "diag", "--reg-covar", 1000, "-o", model)
    assert load_model(model).covariances.min() > 1000


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_are_honoured(suffix: str, x: np.ndarray, folder: Path, tmp_path: Path) -> None:
    weights = (np.arange(N) % K != 0).astype(float)
    write_table(tmp_path / f"w{suffix}", weights, name="weights")
    write_table(tmp_path / "kept.npy", x[weights > 0])
    both = ["-k", 2, "--tol", 1e-9, "--max-iter", 1000]
    weighted = run_json("fit", folder / "x.npy", *both, "--weights", tmp_path / f"w{suffix}")
    kept = run_json("fit", tmp_path / "kept.npy", *both)
    assert weighted["lower_bound"] == pytest.approx(kept["lower_bound"], abs=1e-6)
    assert "bic" not in weighted


def test_score(x: np.ndarray, folder: Path, tmp_path: Path) -> None:
    mixture = load_model(folder / "model.safetensors")
    report = run_json("score", folder / "x.csv", folder / "model.safetensors", "--each", tmp_path / "each.npy")
    log_prob = mixture.log_prob(x)
    assert report["n_samples"] == N
    assert report["n_parameters"] == mixture.n_parameters == K * 5 + K - 1
    assert report["log_likelihood"] == pytest.approx(log_prob.sum(), rel=1e-12)
    assert report["mean_log_likelihood"] == pytest.approx(log_prob.mean(), rel=1e-12)
    assert report["aic"] == pytest.approx(mixture.aic(x), rel=1e-12)
    assert report["bic"] == pytest.approx(mixture.bic(x), rel=1e-12)
    np.testing.assert_allclose(read_table(tmp_path / "each.npy"), log_prob, rtol=1e-12)
    assert "mean log likelihood" in run("score", folder / "x.npy", folder / "model.safetensors").stdout


@pytest.mark.parametrize("suffix", FORMATS)
def test_predict(suffix: str, x: np.ndarray, folder: Path, tmp_path: Path) -> None:
    mixture = load_model(folder / "model.safetensors")
    labels, proba = tmp_path / f"labels{suffix}", tmp_path / f"proba{suffix}"
    report = run_json("predict", folder / "x.npy", folder / "model.safetensors", "-o", labels)
    assert read_table(labels).ravel().tolist() == mixture.predict(x).tolist()
    assert report["rows_per_component"] == np.bincount(mixture.predict(x)).tolist()
    again = run_json("predict", folder / "x.npy", folder / "model.safetensors", "-o", proba, "--proba")
    np.testing.assert_allclose(read_table(proba), mixture.responsibilities(x), rtol=1e-12, atol=1e-300)
    assert again["rows_per_component"] == report["rows_per_component"]


def test_sample(folder: Path, tmp_path: Path) -> None:
    options = ["-n", 5000, "--seed", 11, "--labels", tmp_path / "labels.npy"]
    for name in ("a.npy", "b.npy"):
        report = run_json("sample", folder / "model.safetensors", "-o", tmp_path / name, *options)
        assert (report["n_samples"], report["n_features"]) == (5000, D)
    drawn, labels = read_table(tmp_path / "a.npy"), read_table(tmp_path / "labels.npy")
    mixture = load_model(folder / "model.safetensors")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    for k in range(K):
        # six standard errors of a mean of a third of the rows, each of variance about one
        np.testing.assert_allclose(drawn[labels == k].mean(axis=0), mixture.means[k], atol=6 / np.sqrt(5000 / K))


def test_kl(folder: Path, tmp_path: Path) -> None:
    """Every estimator; the model from itself is zero wherever the estimator is exact there."""
    model = load_model(folder / "model.safetensors")
    moved = Mixture(model.weights, model.means + 0.2, model.covariances, model.covariance_type)
    save_model(moved, tmp_path / "moved.safetensors")
    report = run_json("kl", folder / "model.safetensors", tmp_path / "moved.safetensors", "-n", 20000)
    estimate, error = report["monte_carlo"], report["monte_carlo_error"]
    assert abs(report["control_variate"] - estimate) < 6 * (error + report["control_variate_error"])
    assert report["lower_bound"] <= estimate + 6 * error
    assert report["upper_bound"] >= estimate - 6 * error
    same = run_json("kl", folder / "model.safetensors", folder / "model.safetensors")
    assert [same[name] for name in ("monte_carlo", "variational", "unscented")] == [0.0, 0.0, 0.0]


def test_info_tells_of_every_backend() -> None:
    report = run_json("info")
    assert [backend["name"] for backend in report["backends"]] == list(emalgam_kernels.BACKENDS)
    for backend in report["backends"]:
        assert backend["available"] is (emalgam_kernels.probe(backend["name"]) is None)
        assert backend["available"] or (backend["reason"] and backend["install"])
    assert report["n_threads"] >= 1
    assert report["default_backend"] in emalgam_kernels.PREFERRED
    assert report["simd_level"]
    assert report["gpu"]
    assert report["versions"]["numpy"] == np.__version__
    text = run("info").stdout
    for line in ("default backend", "simd level", "gpu", "numba kernels", "reference             available"):
        assert line in text
    unavailable = [backend for backend in report["backends"] if not backend["available"]]
    for backend in unavailable:
        assert f"{backend['name']:22}unavailable: {backend['reason']}" in text
        assert f"to install it: {backend['install']}" in text


def test_info_times_the_numba_kernels() -> None:
    need("numba_cpu")
    kernels = run_json("info", "--compile")["numba_kernels"]
    assert kernels["error"] is None
    seconds = kernels["compile_seconds"]
    blocks = {(name.split()[0], form) for name in seconds for form in ("float64", "float32") if form in name}
    kernels_of = {
        "mixture_block",
        "precision_factors",
        "kl_pairs",
        "kl_all_pairs",
        "uniform_block",
        "normal_block",
        "sample_block",
    }
    assert blocks >= {(name, dtype) for name in kernels_of for dtype in ("float64", "float32")}
    assert sum(name.startswith("mixture_block") for name in seconds) >= 6, "packed and direct, in three pairs of types"
    assert all(value > 0 for value in seconds.values()), "0 is what comes from disk with no record of its compilation"
    text = run("info").stdout
    for name, value in seconds.items():
        assert f"{name}: compiled in {value:.1f} s" in text


def test_info_survives_a_broken_numba(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise OSError('libLLVM is gone')\n")
    done = run("info", "--compile", PYTHONPATH=str(tmp_path))
    assert "compiling failed with OSError: libLLVM is gone" in done.stdout
    assert done.stderr == ""


def test_info_survives_a_backend_that_does_not_exist() -> None:
    report = json.loads(run("info", "--json", EMALGAM_BACKEND="abacus").stdout)
    assert report["default_backend"].startswith("none: environment variable EMALGAM_BACKEND is 'abacus'")


BAD_DATA = {
    "missing": (None, "there is no such file"),
    "NaN": (np.array([[1.0, 2.0], [3.0, np.nan]]), "x contains NaN at row 1, column 1"),
    "infinity": (np.array([[1.0, -np.inf], [3.0, 4.0]]), "x contains inf at row 0, column 1"),
    "one dimension": (np.ones(5), "x has shape (5,); expected two dimensions: (samples, features)"),
    "no rows": (np.empty((0, 2)), "x has shape (0, 2); expected at least one sample"),
    "too few rows": (np.eye(2), "there are 2 samples"),
    "complex": (np.ones((5, 2)) + 1j, "has dtype complex128; expected real numbers"),
    "text": (np.array([["a", "b"]]), "has dtype <U1; expected real numbers"),
    "objects": (np.array([[1, None]], dtype=object), "has dtype object; expected real numbers"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case: str, tmp_path: Path) -> None:
    array, message = BAD_DATA[case]
    if array is not None:
        np.save(tmp_path / "x.npy", array)
    assert message in error_of("fit", tmp_path / "x.npy", "-k", 3, "-o", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_ragged_and_cut_tables_are_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ragged.csv").write_text("1,2\n3\n")
    assert "Expected 2 columns, got 1" in error_of("fit", tmp_path / "ragged.csv", "-k", 1)
    (tmp_path / "text.csv").write_text("a,b\n1,2\n3,four\n")
    assert "column 'b' holds 'four' at row 1" in error_of("fit", tmp_path / "text.csv", "-k", 1)
    (tmp_path / "cut.npy").write_bytes((folder / "x.npy").read_bytes()[:-100])
    assert "cut short" in error_of("fit", tmp_path / "cut.npy", "-k", 1)
    assert "supported are .npy" in error_of("fit", tmp_path / "x.xls", "-k", 1)


def test_bad_models_are_one_line(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    assert "there is no such file" in error_of("score", folder / "x.npy", model)
    model.write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert "cut short" in error_of("predict", folder / "x.npy", model, "-o", tmp_path / "labels.npy")
    assert "cut short" in error_of("sample", model, "-o", tmp_path / "x.npy")
    np.save(tmp_path / "wide.npy", np.ones((4, D + 1)))
    expected = f"x has {D + 1} features; the mixture has {D}"
    assert expected in error_of("score", tmp_path / "wide.npy", folder / "model.safetensors")


def test_weights_that_do_not_fit_are_one_line(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones((N, 2)))
    message = error_of("fit", folder / "x.npy", "-k", 2, "--weights", tmp_path / "w.npy")
    assert "has shape (900, 2); expected one weight for each row" in message
    np.save(tmp_path / "w.npy", np.ones(N - 1))
    assert "sample_weight has shape (899,)" in error_of(
        "fit", folder / "x.npy", "-k", 2, "--weights", tmp_path / "w.npy"
    )
    np.save(tmp_path / "w.npy", np.zeros(N))
    assert "zero for every sample" in error_of("fit", folder / "x.npy", "-k", 2, "--weights", tmp_path / "w.npy")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_precision_that_the_backend_does_not_have_is_one_line(dtype: str, x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x.astype(dtype))
    command = ["fit", tmp_path / "x.npy", "-k", 2, "--backend", "reference"]
    message = error_of(*command, "--precision", "tf32")
    assert f"precision is 'tf32', which is for float32 data on backend numba_cuda; these are {dtype} on ref" in message
    assert "leave it at 'strict'" in message
    assert run_json(*command, "--precision", "strict")["arithmetic"] == dtype


def test_mixed_precision_says_how_many_iterations_were_in_float32(folder: Path) -> None:
    report = run_json("fit", folder / "x.npy", "-k", 2, "--precision", "mixed", "--init", "random_from_data")
    assert report["arithmetic"] == "float64"
    assert 0 < report["float32_iterations"] < report["n_iter"]
    command = ["fit", folder / "x.npy", "-k", 2, "--precision", "mixed", "--algorithm", "direct"]
    assert "precision is 'mixed' and algorithm 'direct', which computes in float64 only" in error_of(*command)


def test_a_collapsed_component_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.repeat([[0.0, 0.0], [1.0, 1.0]], 20, axis=0))
    message = error_of("fit", tmp_path / "x.npy", "-k", 2, "--on-degenerate", "error")
    assert "collapsed in iteration" in message


def test_nothing_that_is_read_is_replaced(folder: Path, tmp_path: Path) -> None:
    """Nor a file that was just written, nor a pipe or a device such as /dev/null, which root could replace."""
    for name in ("x.npy", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    x, model, link, pipe = (tmp_path / name for name in ("x.npy", "model.safetensors", "link.npy", "pipe.npy"))
    link.symlink_to(x)
    os.mkfifo(pipe)
    before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
    commands: list[list[object]] = [
        ["fit", x, "-k", 2, "-o", x],
        ["fit", x, "-k", 2, "-o", link],
        ["fit", x, "-k", 2, "-o", tmp_path / "m", "--checkpoint", tmp_path / "m"],
        ["fit", x, "-k", 2, "-o", tmp_path / "m", "--weights", tmp_path / "m"],
        ["fit-many", x, "--by", "a", "-k", 1, "-o", x],
        ["score", x, model, "--each", x],
        ["predict", x, model, "-o", tmp_path / ".." / tmp_path.name / "x.npy"],
        ["sample", model, "-o", tmp_path / "s.npy", "--labels", tmp_path / "s.npy"],
    ]
    for command in commands:
        assert "is named twice, and what is there would be lost; name another" in error_of(*command)
    for command in (["fit", x, "-k", 2, "-o", pipe], ["sample", model, "-o", pipe]):
        assert "pipe.npy is not a regular file; name a file to write" in error_of(*command)
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before


def test_outputs_are_checked_before_the_work(folder: Path, tmp_path: Path) -> None:
    model = folder / "model.safetensors"
    absent = tmp_path / "absent" / "out"
    assert "there is no folder" in error_of("fit", folder / "x.npy", "-k", 2, "-o", absent)
    assert "is a folder" in error_of("fit", folder / "x.npy", "-k", 2, "-o", tmp_path)
    assert "there is no folder" in error_of("predict", folder / "x.npy", model, "-o", f"{absent}.npy")
    assert "supported are .npy" in error_of("predict", folder / "x.npy", model, "-o", tmp_path / "labels.txt")
    assert "supported are .npy" in error_of("score", folder / "x.npy", model, "--each", tmp_path / "each.json")
    assert "supported are .npy" in error_of("sample", model, "-o", tmp_path / "x.npy", "--labels", tmp_path / "labels")
    assert list(tmp_path.iterdir()) == []


USAGE = {
    "no data": (["fit"], "Missing argument"),
    "no components": (["fit", "x.npy"], "Missing option"),
    "no such command": (["train"], "No such command 'train'"),
    "no such option": (["fit", "x.npy", "-k", 2, "--clusters", 3], "No such option: --clusters"),
    "not a number": (["fit", "x.npy", "-k", "two"], "Invalid value for '-k'"),
    "zero components": (["fit", "x.npy", "-k", 0], "Invalid value for '-k'"),
    "negative tolerance": (["fit", "x.npy", "-k", 1, "--tol", -1], "Invalid value for '--tol'"),
    "covariance": (["fit", "x.npy", "-k", 1, "--covariance", "low-rank"], "Invalid value for '--covariance'"),
    "backend": (["fit", "x.npy", "-k", 1, "--backend", "abacus"], "Invalid value for '--backend'"),
    "precision": (["fit", "x.npy", "-k", 1, "--precision", "half"], "Invalid value for '--precision'"),
    "threads": (["fit", "x.npy", "-k", 1, "--threads", 0], "Invalid value for '--threads'"),
    "no samples": (["sample", "m.safetensors", "-o", "s.npy", "-n", 0], "Invalid value for '-n' / '--samples'"),
    "fewer samples": (["kl", "m.safetensors", "m.safetensors", "-n", -3], "Invalid value for '-n' / '--samples'"),
    "floor": (["fit", "x.npy", "-k", 1, "--reg-covar", "much"], "'much' is neither auto nor a number >= 0"),
    "negative floor": (["fit", "x.npy", "-k", 1, "--reg-covar=-1"], "'-1' is neither auto nor a number >= 0"),
    "seed": (["sample", "m", "-o", "x.npy", "--seed", -1], "Invalid value for '--seed'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_command_line_ends_with_2(case: str) -> None:
    arguments, message = USAGE[case]
    line = error_of(*arguments, status=2)
    assert message in line
    assert line.endswith("(see emalgam --help)")


def test_a_backend_that_cannot_run_ends_with_3(folder: Path) -> None:
    without_numba = "import sys; sys.modules['numba'] = None; from emalgam.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", without_numba, "fit", str(folder / "x.npy"), "-k", "2"]
    for option, environment in ((["--backend", "numba_cpu"], {}), ([], {"EMALGAM_BACKEND": "numba_cpu"})):
        done = subprocess.run(
            [*command, *option], capture_output=True, text=True, check=False, env=os.environ | environment
        )
        assert done.returncode == 3
        assert done.stdout == ""
        start = "error: backend 'numba_cpu' is unavailable: Numba is not installed. To install it: pip install numba."
        assert done.stderr.startswith(start)
        assert "Available here: reference" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_backend_in_the_environment_that_does_not_exist_is_one_line(folder: Path) -> None:
    message = error_of("fit", folder / "x.npy", "-k", 2, EMALGAM_BACKEND="abacus")
    assert "environment variable EMALGAM_BACKEND is 'abacus'; expected one of auto" in message


def test_the_reader_of_the_output_may_leave(folder: Path) -> None:
    command = f"'{sys.executable}' -m emalgam score '{folder}/x.npy' '{folder}/model.safetensors' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_progress_is_for_terminals(folder: Path) -> None:
    with OnTerminal("fit", folder / "x.npy", "-k", 2, "--json") as terminal:
        status, out, shown = terminal.finish()
    assert status == 0
    assert "restart 0  log-likelihood -" in shown
    assert json.loads(out)["n_components"] == 2


def test_an_interrupt_ends_with_130_and_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    endless = ["--tol", 0, "--max-iter", 10**9, "-o", tmp_path / "model.safetensors"]
    with OnTerminal("fit", folder / "x.npy", "-k", 2, *endless) as terminal:
        terminal.read(until="log-likelihood")
        terminal.process.send_signal(signal.SIGINT)
        status, out, shown = terminal.finish()
    assert status == 130
    assert "Traceback" not in shown
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("absent", ["dask", "distributed"])
@pytest.mark.parametrize("command", [["fit", "-k", "2"], ["fit-many", "-k", "2", "--by", "x0", "-o", "fits.parquet"]])
def test_a_cluster_without_dask_says_what_to_install(absent: str, command: list[str], folder: Path) -> None:
    code = f"import sys\nsys.modules[{absent!r}] = None\nfrom emalgam.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    arguments = [*command, str(folder / "x.parquet"), "--dask", "tcp://127.0.0.1:1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a cluster needs Dask (")
    assert done.stderr.endswith('to install it: pip install "emalgam[dask]"\n')


def test_a_fit_starts_without_what_it_does_not_need(folder: Path) -> None:
    code = (
        "import sys\n"
        "from emalgam.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'sklearn', 'scipy', 'matplotlib', 'numba', 'torch', 'pyarrow', 'pandas', 'rich'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", code, "fit", str(folder / "x.npy"), "-k", "2", "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_kl_computes_everything_with_the_backend_that_was_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emalgam import backends

    genuine, seen = backends.kernels, set()

    def kernels(name: str, *file: str) -> Any:
        seen.add(name)
        return genuine(name, *file)

    monkeypatch.setattr(backends, "kernels", kernels)
    monkeypatch.setattr(backends, "host_kernels", lambda file: genuine("reference", file))  # of checks
    model = str(folder / "model.safetensors")
    assert cli.main(["kl", model, model, "-n", "100", "--backend", "reference"]) == 0
    assert seen == {"reference"}


def test_sample_draws_as_it_is_told(folder: Path, tmp_path: Path) -> None:
    how = ("-n", 1000, "--draw", "stratified", "--backend", "reference", "--labels", tmp_path / "labels.npy")
    run_json("sample", folder / "model.safetensors", "-o", tmp_path / "x.npy", *how)
    counts = np.bincount(np.load(tmp_path / "labels.npy"), minlength=K)
    assert (np.abs(counts - 1000 * load_model(folder / "model.safetensors").weights) <= 1).all()
