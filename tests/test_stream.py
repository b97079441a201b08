"""Data in chunks: every source against the same data in memory, reading ahead, and input that is bad."""

from __future__ import annotations

import itertools
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import emalgam
from emalgam import parts as in_parts
from emalgam.covariance import COVARIANCES
from emalgam.parts import ObservationsInParts, Part, Sample
from emalgam.stream import ArrayStream, Stream, read_ahead, rejoined
from tests.conftest import CPU_BACKENDS, need
from tests.processes import output_of, python
from tests.samples import blobs, start
from tests.tolerances import tolerance

ROOT = Path(__file__).parents[1]
N = 1500
TYPES = tuple(COVARIANCES)


def rows(dtype: str = "float64") -> np.ndarray:
    return blobs(N)[0].astype(dtype)


def weights() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 3, N).astype(float)


def as_array(x: np.ndarray, weight: np.ndarray | None, folder: Path) -> Stream:
    return emalgam.open_stream(x, sample_weight=weight, chunk_rows=400)


def as_memory_map(x: np.ndarray, weight: np.ndarray | None, folder: Path) -> Stream:
    np.save(folder / "x.npy", x)
    return emalgam.open_stream(folder / "x.npy", sample_weight=weight, chunk_rows=511)


def as_parquet(x: np.ndarray, weight: np.ndarray | None, folder: Path) -> Stream:
    pq.write_table(table(x, weight), folder / "x.parquet", row_group_size=170)
    return emalgam.open_stream(folder / "x.parquet", sample_weight=None if weight is None else "weight", chunk_rows=333)


def as_folder(x: np.ndarray, weight: np.ndarray | None, folder: Path) -> Stream:
    (folder / "parts").mkdir()
    for number, begin in enumerate(range(0, N, 600)):
        part = None if weight is None else weight[begin : begin + 600]
        pq.write_table(table(x[begin : begin + 600], part), folder / "parts" / f"{number:03}.parquet")
    return emalgam.open_stream(folder / "parts", sample_weight=None if weight is None else "weight", chunk_rows=450)


def as_chunks(x: np.ndarray, weight: np.ndarray | None, folder: Path) -> Stream:
    cuts = [0, 1, 2, 300, 300, 1499, N]
    spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    return emalgam.open_stream([x[s] if weight is None else (x[s], weight[s]) for s in spans], chunk_rows=256)


def as_function(x: np.ndarray, weight: np.ndarray | None, folder: Path) -> Stream:
    def chunks() -> Iterator[Any]:
        for begin in range(0, N, 70):
            span = slice(begin, begin + 70)
            yield x[span] if weight is None else (x[span], weight[span])

    return emalgam.open_stream(chunks)


def table(x: np.ndarray, weight: np.ndarray | None) -> pa.Table:
    columns = {f"x{d}": column for d, column in enumerate(x.T)}
    return pa.table(columns if weight is None else {"weight": weight} | columns)


Source = Callable[[np.ndarray, np.ndarray | None, Path], Stream]
every_source = pytest.mark.parametrize(
    "source", [as_array, as_memory_map, as_parquet, as_folder, as_chunks, as_function]
)


# ---- against the same data in memory


@every_source
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_fit_is_that_of_the_data_in_memory(
    source: Source, weighted: bool, covariance_type: str, tmp_path: Path
) -> None:
    x, weight = rows(), weights() if weighted else None
    how: dict[str, Any] = {"covariance_type": covariance_type, "random_state": 0, "max_iter": 1000}
    whole = emalgam.fit(x, 4, sample_weight=weight, **how)
    streamed = emalgam.fit(source(x, weight, tmp_path), 4, **how)
    assert streamed.n_iter == whole.n_iter
    assert streamed.lower_bound == pytest.approx(whole.lower_bound, abs=1e-12)
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(streamed.mixture, name), getattr(whole.mixture, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_backends_and_types(backend: str, dtype: str, tmp_path: Path) -> None:
    need(backend)
    x = (rows() * 100).astype(dtype)
    whole = emalgam.fit(x, 4, random_state=0, backend=backend)
    streamed = emalgam.fit(as_memory_map(x, None, tmp_path), 4, random_state=0, backend=backend)
    assert streamed.backend == backend
    assert streamed.arithmetic == whole.arithmetic
    bound = tolerance("fit", whole.arithmetic) * np.abs(x).max()
    np.testing.assert_allclose(streamed.mixture.means, whole.mixture.means, rtol=0, atol=bound)


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_every_start(init_params: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"init_params": init_params, "n_init": 2, "random_state": 3, "max_iter": 500}
    whole = emalgam.fit(rows(), 3, **how)
    assert emalgam.fit(as_chunks(rows(), None, tmp_path), 3, **how).lower_bound == pytest.approx(whole.lower_bound)


@pytest.mark.parametrize("policy", ["regularize", "reseed"])
def test_policies(policy: str, tmp_path: Path) -> None:
    x, centres = blobs(N)
    given = start(np.vstack([centres, [[1e3] * 3]]), "full")
    how: dict[str, Any] = {"on_degenerate": policy, "random_state": 1, "tol": 1e-5, "max_iter": 300}
    whole = emalgam.fit(x, 5, **given, **how)
    streamed = emalgam.fit(as_chunks(x, None, tmp_path), 5, **given, **how)
    assert streamed.effective_components == whole.effective_components
    assert streamed.lower_bound == pytest.approx(whole.lower_bound, abs=1e-9)


def test_paths_and_memory_maps_are_streams_by_themselves(tmp_path: Path) -> None:
    x = rows()
    np.save(tmp_path / "x.npy", x)
    whole = emalgam.fit(x, 4, random_state=0)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for given in (tmp_path / "x.npy", str(tmp_path / "x.npy"), mapped):
        np.testing.assert_allclose(emalgam.fit(given, 4, random_state=0).mixture.means, whole.mixture.means, rtol=1e-12)
    estimator = emalgam.GaussianMixture(4, random_state=0).fit(tmp_path / "x.npy")
    np.testing.assert_allclose(estimator.means_, whole.mixture.means, rtol=1e-12)
    assert estimator.n_features_in_ == 3
    weight = weights()
    weighted = emalgam.fit(mapped, 4, sample_weight=weight, random_state=0)
    expected = emalgam.fit(x, 4, sample_weight=weight, random_state=0)
    np.testing.assert_allclose(weighted.mixture.means, expected.mixture.means, rtol=1e-9)


@every_source
def test_queries_row_by_row(source: Source, tmp_path: Path) -> None:
    x = rows()
    mixture = emalgam.fit(x, 4, random_state=0).mixture
    stream = source(x, None, tmp_path)
    np.testing.assert_array_equal(mixture.log_prob(stream), mixture.log_prob(x))
    np.testing.assert_array_equal(mixture.predict(stream), mixture.predict(x))
    np.testing.assert_array_equal(mixture.responsibilities(stream), mixture.responsibilities(x))
    assert mixture.bic(stream) == pytest.approx(mixture.bic(x), rel=1e-13)  # the sums of chunks are added
    estimator = emalgam.GaussianMixture(4, random_state=0).fit(stream)
    np.testing.assert_allclose(estimator.score_samples(stream), mixture.log_prob(x), rtol=1e-9)
    assert estimator.score(stream) == pytest.approx(float(mixture.log_prob(x).mean()))
    np.testing.assert_array_equal(estimator.predict(stream), mixture.predict(x))
    np.testing.assert_allclose(estimator.predict_proba(stream), mixture.responsibilities(x), atol=1e-9)


@pytest.mark.filterwarnings("ignore:X has feature names")  # scikit-learn's, as the fit is one of an array
@every_source
def test_scores_of_streams_are_weighted_by_their_weights(source: Source, tmp_path: Path) -> None:
    x, weight = rows(), weights()
    estimator = emalgam.GaussianMixture(4, random_state=0).fit(x)
    expected = estimator.score(x, sample_weight=weight)
    assert expected != pytest.approx(estimator.score(x), rel=1e-6)
    assert estimator.score(source(x, weight, tmp_path)) == pytest.approx(expected, rel=1e-13)


def test_scores_of_paths_and_memory_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = rows(), weights()
    np.save(tmp_path / "x.npy", x)
    estimator = emalgam.GaussianMixture(4, random_state=0).fit(x)
    expected = estimator.score(x), estimator.score(x, sample_weight=weight)
    monkeypatch.delattr(emalgam.GaussianMixture, "score_samples")  # a number for each row
    for given in (tmp_path / "x.npy", np.load(tmp_path / "x.npy", mmap_mode="r")):
        found = estimator.score(given), estimator.score(given, sample_weight=weight)
        assert found == pytest.approx(expected, rel=1e-13)
    with pytest.raises(ValueError, match="sample_weight was given beside data in parts"):
        estimator.score(ArrayStream(x, weight), sample_weight=weight)


def test_results_chunk_by_chunk(tmp_path: Path) -> None:
    x = rows()
    mixture = emalgam.fit(x, 4, random_state=0).mixture
    pieces = list(as_array(x, None, tmp_path).map(mixture.log_prob))
    assert [len(piece) for piece in pieces] == [400, 400, 400, 300]
    np.testing.assert_array_equal(np.concatenate(pieces), mixture.log_prob(x))


def test_columns_are_chosen_and_ordered(tmp_path: Path) -> None:
    x = rows()
    pq.write_table(table(x, weights()).append_column("name", pa.array(["a"] * N)), tmp_path / "x.parquet")
    stream = emalgam.open_stream(tmp_path / "x.parquet", columns=["x2", "x0"])
    np.testing.assert_array_equal(np.concatenate([chunk for chunk, _ in stream.chunks()]), x[:, [2, 0]])


def test_every_file_of_a_folder_has_to_have_the_columns(tmp_path: Path) -> None:
    pq.write_table(table(rows(), None), tmp_path / "0.parquet")
    pq.write_table(table(rows()[:, :2], None), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet: has no column 'x2'; there are x0, x1"):
        emalgam.fit(tmp_path, 2)


@pytest.mark.parametrize("single", [[0], [1], [0, 1]])
def test_a_folder_is_float32_if_all_its_files_are(single: list[int], tmp_path: Path) -> None:
    x = rows() + 1e8
    x[:700] -= 1e8
    for number, part in enumerate([x[:700], x[700:]]):
        pq.write_table(table(part.astype("f4" if number in single else "f8"), None), tmp_path / f"{number}.parquet")
    stream = emalgam.open_stream(tmp_path)
    assert stream.dtype == (np.float32 if single == [0, 1] else np.float64)
    read = np.concatenate([chunk for chunk, _ in stream.chunks()])
    assert read.dtype == stream.dtype
    expected = np.concatenate(
        [x[:700].astype("f4" if 0 in single else "f8"), x[700:].astype("f4" if 1 in single else "f8")]
    )
    np.testing.assert_array_equal(read, expected)


def test_a_file_that_becomes_float64_after_it_was_looked_at(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(table(rows("float32"), None), tmp_path / f"{number}.parquet")
    stream = emalgam.open_stream(tmp_path)
    pq.write_table(table(rows(), None), tmp_path / "1.parquet")
    message = r"1\.parquet: the table has dtype float64 in data of float32.*; the file has changed: open a new stream"
    with pytest.raises(ValueError, match=message):
        emalgam.fit(stream, 2)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"columns": ["x0", "x0"]}, "x0"), ({"columns": ["x0", "weight"], "sample_weight": "weight"}, "weight")],
)
def test_columns_are_asked_for_once(arguments: dict[str, Any], name: str, tmp_path: Path) -> None:
    pq.write_table(table(rows(), weights()), tmp_path / "x.parquet")
    message = f"x.parquet: column '{name}' is asked for twice; features, weights and labels have to differ"
    with pytest.raises(ValueError, match=message):
        emalgam.open_stream(tmp_path / "x.parquet", **arguments)


PEAK_OF_A_PASS = """
import sys
from bench.memory import peak
from emalgam import open_stream
stream = open_stream(sys.argv[1])
assert sum(stream.map(len)) == int(sys.argv[2])
print(peak())
"""


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    piece = pa.table({f"x{d}": column for d, column in enumerate(np.random.default_rng(0).normal(size=(8, 2**18)))})
    sizes, peaks = [], []
    for pieces in (8, 32):
        path = tmp_path / f"{pieces}.parquet"
        with pq.ParquetWriter(path, piece.schema, compression="none", use_dictionary=False) as writer:
            for _ in range(pieces):
                writer.write_table(piece)
        done = python("-c", PEAK_OF_A_PASS, str(path), str(pieces * 2**18), folder=ROOT)
        assert done.returncode == 0, done.stderr
        sizes.append(path.stat().st_size)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4, f"{sizes} bytes took {peaks} bytes of memory"


def test_frames_are_arrays_and_lists_are_pairs() -> None:
    x, weight = rows(), weights()
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    for given in (frame, pl.from_pandas(frame)):
        np.testing.assert_array_equal(np.concatenate([*emalgam.open_stream(given, chunk_rows=400).map(np.copy)]), x)
    for chunks in ([[x[:700]], [x[700:]]], [[x[:700], weight[:700]], [x[700:], weight[700:]]]):
        (part, omega), *rest = emalgam.open_stream(chunks).chunks()
        np.testing.assert_array_equal(part, x)
        assert not rest
        assert omega is None if len(chunks[0]) == 1 else np.array_equal(omega, weight)


@pytest.mark.parametrize(
    "given", [[np.zeros((2, 3))], [(np.zeros((2, 3)), np.ones(2))], (x for x in [np.zeros((2, 3))]), rows]
)
@pytest.mark.parametrize("fit", [emalgam.fit, lambda x, k: emalgam.GaussianMixture(k).fit(x)])
def test_chunks_that_are_no_stream_yet(given: Any, fit: Callable[[Any, int], Any]) -> None:
    with pytest.raises(ValueError, match=f"x is a {type(given).__name__}.*emalgam.open_stream takes"):
        fit(given, 2)


# ---- the sample


def test_the_sample_does_not_depend_on_the_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_parts, "ELEMENTS_OF_A_SAMPLE", 0)
    monkeypatch.setattr(in_parts, "FEWEST_ROWS_OF_A_SAMPLE", 50)
    x, weight, seen = rows(), weights(), []
    for chunk_rows in (1, 7, 100, 1499, N):
        stream = ArrayStream(x, weight, chunk_rows)
        data = ObservationsInParts.of(stream, COVARIANCES["full"], "reference")
        assert 50 <= len(data.sample.x) <= 100
        seen.append(data.sample.x)
    assert all(np.array_equal(each, seen[0]) for each in seen)


def test_the_sample_is_uniform_and_without_rows_of_weight_zero() -> None:
    x, weight = np.arange(20_000.0)[:, None], np.ones(20_000)
    weight[::2] = 0
    sample = Sample.of(Part(0, x, weight), weight, seed=1, wanted=500)
    taken = sample.x[:, 0]
    assert (taken % 2 == 1).all()
    assert 500 <= len(taken) <= 1000
    # The mean of a uniform sample of 0 … 19 999: five standard errors.
    assert abs(taken.mean() - 10_000) <= 5 * 20_000 / np.sqrt(12 * len(taken))


# ---- reading ahead


def test_the_reader_is_ahead_but_not_far() -> None:
    made: list[int] = []
    threads: list[int] = []
    ended: list[int] = []
    third = threading.Event()

    def chunks() -> Iterator[Any]:
        try:
            for number in range(50):
                made.append(number)
                threads.append(threading.get_ident())
                if number == 3:
                    third.set()
                yield np.zeros((1, 1)), None
        finally:
            ended.append(threading.get_ident())

    ahead = read_ahead(chunks(), depth=2)
    next(ahead)
    assert third.wait(10)  # one handed over, two in the queue, one in hand
    assert len(made) == 4
    ahead.close()
    assert len(made) <= 5
    assert set(threads) == set(ended), "a generator is closed by another thread than the one that ran it"
    assert threading.get_ident() not in threads


def test_errors_of_the_reader_are_raised_where_the_data_are_used() -> None:
    def chunks() -> Iterator[np.ndarray]:
        yield rows()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        emalgam.fit(emalgam.open_stream(chunks), 2)


def test_an_error_of_the_compute_ends_the_reader() -> None:
    events: list[str] = []

    def chunks() -> Iterator[np.ndarray]:
        events.append("begun")
        try:
            yield from itertools.repeat(rows())
        finally:
            events.append("ended")

    def task(part: Part) -> int:
        raise KeyboardInterrupt

    stream = emalgam.open_stream(chunks)
    with pytest.raises(KeyboardInterrupt):
        stream.fold(task, int.__add__)
    assert sorted(events) == ["begun", "begun", "ended", "ended"], "one was looked at, one was folded"


INTERRUPTED_FITS = """
import numpy as np, emalgam
from tests.interrupts import assert_threads_are_idle, interrupt_at_random

x = np.random.default_rng(0).normal(size=(2000, 2))
begun = ended = 0

def chunks():
    global begun, ended
    begun += 1
    try:
        yield x
    finally:
        ended += 1

stream = emalgam.open_stream(chunks, chunk_rows=100)
interrupt_at_random(lambda: emalgam.fit(stream, 1, max_iter=2, tol=1.0), 500)
assert_threads_are_idle()
assert ended == begun, f"{begun} generators were begun, and {ended} of them closed"
print("done")
"""


def test_interrupts_at_any_moment_leave_no_reader_behind() -> None:
    """No thread that reads on or waits, no open generator, no lock that stays locked."""
    assert output_of(INTERRUPTED_FITS, folder=ROOT) == "done"


FORKED = """
import os, numpy as np
from emalgam.stream import read_ahead
ahead = read_ahead((np.zeros((1, 1)), None) for _ in range(50))
next(ahead)
child = os.fork()
ahead.close()
if child:
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_has_no_reader_to_wait_for() -> None:
    assert output_of(FORKED) == "0"


FORKED_IN_A_FIT = """
import os, signal, threading
import numpy as np
from emalgam import blas
np.ones((2, 2)) @ np.ones((2, 2))
def numbers():
    return [library.num_threads for library in blas._libraries()]
before, inside, leave = numbers(), threading.Event(), threading.Event()
def fit():
    with blas.one_blas_thread(), blas._lock:
        inside.set()
        leave.wait()
threading.Thread(target=fit).start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    found = numbers()
    with blas.one_blas_thread():
        limited = numbers()
    os._exit(not (found == numbers() == before and set(limited) <= {1}))
leave.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_during_a_fit_has_blas_as_it_was() -> None:
    assert output_of(FORKED_IN_A_FIT) == "0"


@pytest.mark.parametrize("first", ["float32", "float64"])
def test_a_file_without_a_column_is_found_when_the_folder_is_opened(first: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(rows()[:20], columns=["a", "b", "c"])
    frame.astype(first).to_parquet(tmp_path / "1.parquet")
    frame[["a", "b"]].to_parquet(tmp_path / "2.parquet")
    with pytest.raises(ValueError, match=r"2\.parquet: has no column 'c'"):
        emalgam.open_stream(tmp_path)


def test_rejoined() -> None:
    sizes = [3, 1, 7, 2]
    given = [(np.full((n, 1), float(k)), np.ones(n) if k == 2 else None) for k, n in enumerate(sizes)]
    out = list(rejoined(given, 5))
    assert [len(x) for x, _ in out] == [5, 5, 3]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in out]), np.concatenate([x for x, _ in given]))
    assert [weight is None for _, weight in out] == [False, False, False]
    big = np.zeros((5, 1))
    assert next(rejoined([(big, None)], 5))[0].base is big


# ---- bad input


def test_not_finite_names_the_row_of_all() -> None:
    x = rows()
    x[1234, 1] = np.nan
    with pytest.raises(ValueError, match="contains NaN at row 1234, column 1"):
        emalgam.fit(ArrayStream(x, None, 100), 2)
    mixture = emalgam.fit(rows(), 2).mixture
    with pytest.raises(ValueError, match=r"row 34, column 1.*\(rows are counted from row 1200 of the stream\)"):
        mixture.log_prob(ArrayStream(x, None, 100))


@pytest.mark.parametrize(("value", "message"), [(-1.0, "is -1.0 at row 1300"), (np.nan, "contains nan at row 1300")])
def test_bad_weights_name_the_row_of_all(value: float, message: str) -> None:
    weight = np.ones(N)
    weight[1300] = value
    with pytest.raises(ValueError, match=message):
        emalgam.fit(ArrayStream(rows(), weight, 100), 2)


@pytest.mark.parametrize("growth", [1, -1])
def test_a_stream_that_differs_between_passes(growth: int) -> None:
    passes = itertools.count()

    def chunks() -> Iterator[np.ndarray]:
        yield rows()[: 700 + growth * 100 * next(passes)]

    stream = emalgam.open_stream(chunks)  # which looks at the first chunk: the passes of the fit are those after it
    message = f"the stream has {700 + 200 * growth} rows in this pass and had {700 + 100 * growth} before"
    with pytest.raises(ValueError, match=message):
        emalgam.fit(stream, 2)


def test_a_stream_that_is_empty_in_a_later_pass() -> None:
    given = [rows()]
    stream = emalgam.open_stream(given)
    mixture = emalgam.fit(stream, 2).mixture
    given.clear()
    with pytest.raises(ValueError, match=f"the stream has 0 rows in this pass and had {N} before"):
        mixture.bic(stream)


def test_no_weight_and_too_few_rows() -> None:
    with pytest.raises(ValueError, match="sample_weight is zero for every sample"):
        emalgam.fit(ArrayStream(rows(), np.zeros(N), 100), 2)
    with pytest.raises(ValueError, match="there are 3 samples"):
        emalgam.fit(ArrayStream(rows()[:3], None, 2), 4)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ((x for x in [rows()]), {}, "a generator can be gone through once or not at all"),
        (7, {}, "a int can be gone through once or not at all"),
        ([], {}, "the stream has no rows"),
        (list, {}, "the stream has no rows"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], {}, "chunk 1 has 4 features; those before it have 3"),
        ([np.zeros((2, 3)), np.zeros(3)], {}, "chunk 1 has shape (3,)"),
        (
            [pd.DataFrame(np.zeros((2, 3)), columns=[*"abc"]), pd.DataFrame(np.zeros((2, 3)), columns=[*"acb"])],
            {},
            "chunk 1 has columns a, c, b; those before it have a, b, c",
        ),
        (
            [np.zeros((2, 3), np.float32), np.full((2, 3), 1e300)],
            {},
            "chunk 1 has dtype float64 in data of float32, and may be rounded to it; give all chunks one dtype",
        ),
        (itertools.repeat(iter([rows()])).__next__, {}, "the function gives the same iterator again"),
        ([(np.zeros((2, 3)), np.ones(3))], {}, "the weights of chunk 0 have shape (3,); expected (2,)"),
        ([np.zeros((2, 3))], {"sample_weight": np.ones(2)}, "sample_weight was given beside an iterable"),
        (
            np.zeros((2, 3)),
            {"sample_weight": np.ones(3)},
            "sample_weight has shape (3,); expected one number per row: (2,)",
        ),
        (np.zeros((2, 3)), {"columns": ["a"]}, "columns was given, which is for Parquet"),
        (np.zeros(3), {}, "has shape (3,)"),
        (np.zeros((2, 3)), {"chunk_rows": 0}, "chunk_rows is 0; expected an integer >= 1"),
        ([np.zeros((2, 3))], {"chunk_rows": -1}, "chunk_rows is -1"),
        ("data.parquet", {"chunk_rows": 2.5}, "chunk_rows is 2.5"),
        ([(np.zeros((2, 3)), None, None)], {}, "chunk 0 is a tuple of 3; expected an (n, D) array, or it"),
        ("data.csv", {}, "data.csv: cannot be read in chunks; expected a .npy or .parquet file"),
        ("absent.npy", {}, "absent.npy: there is no such file"),
        ("absent.parquet", {}, "absent.parquet: there is no such file or folder"),
    ],
)
def test_bad_sources(source: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        emalgam.fit(emalgam.open_stream(source, **arguments), 2)


def thousand_rows() -> Iterator[np.ndarray]:
    yield rows()


def test_streams_can_be_sent_to_another_process() -> None:
    stream = emalgam.open_stream(thousand_rows)
    copy = pickle.loads(pickle.dumps(stream))
    for given in (copy, stream):
        np.testing.assert_array_equal(np.concatenate([chunk for chunk, _ in given.chunks()]), rows())


def test_a_function_has_to_make_new_iterators_for_one_pass_too() -> None:
    """Whoever looked at the first chunk has it: one pass over the rest would be short of it."""
    once = iter([rows()[:700], rows()[700:]])
    with pytest.raises(ValueError, match="the function gives the same iterator again"):
        [*emalgam.open_stream(lambda: once).map(len)]


def test_one_number_weighs_all_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    fits = [
        emalgam.fit(x, 2, sample_weight=2.0, random_state=0, max_iter=3, tol=1.0).mixture
        for x in (np.load(tmp_path / "x.npy"), np.load(tmp_path / "x.npy", mmap_mode="r"))
    ]
    np.testing.assert_allclose(fits[0].means, fits[1].means, rtol=1e-12)


def test_parquet_names_its_features(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows(), columns=["a", "b", "c"])
    frame.to_parquet(tmp_path / "x.parquet")
    frame[["c", "a", "b"]].to_parquet(tmp_path / "other.parquet")
    model = emalgam.GaussianMixture(2, random_state=0).fit(tmp_path / "x.parquet")
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(model.predict(frame), model.predict(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(tmp_path / "other.parquet")


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match="holds no Parquet files"):
        emalgam.open_stream(tmp_path)
    path.write_bytes(b"PAR1 this is no table")
    with pytest.raises(ValueError, match=r"x\.parquet"):
        emalgam.open_stream(path)
    pq.write_table(table(rows(), None).append_column("name", pa.array(["a"] * N)), path)
    with pytest.raises(ValueError, match="column 'name' holds values of type string; expected numbers"):
        emalgam.open_stream(path)
    with pytest.raises(ValueError, match="has no column 'y'; there are x0, x1, x2, name"):
        emalgam.open_stream(path, columns=["y"])
    with pytest.raises(ValueError, match="has no column 'w'"):
        emalgam.open_stream(path, columns=["x0"], sample_weight="w")
    with pytest.raises(ValueError, match="sample_weight is ndarray; expected the name of a column"):
        emalgam.open_stream(path, sample_weight=np.ones(N))


def test_weights_twice() -> None:
    with pytest.raises(ValueError, match="sample_weight was given beside data in parts"):
        emalgam.fit(ArrayStream(rows()), 2, sample_weight=weights())
