"""Other people's compiled code calls the tile functions: a small Cython module, and a function under ``@njit``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import emalgam_kernels
from tests.conftest import need
from tests.kernels.problems import Problem, assert_within, problem
from tests.oracles import LONG
from tests.processes import python
from tests.tolerances import tolerance

USER_PYX = """
# cython: language_level=3, boundscheck=False, wraparound=False
from libc.stdlib cimport free, malloc
from emalgam_kernels.cython_cpu.mixture cimport (
    feature_tile, logit_tile, pack_natural, softmax_tile, statistic_tile, tile_step,
    feature_tile_float32, logit_tile_float32, pack_natural_float32, softmax_tile_float32, statistic_tile_float32,
    tile_step_float32,
)

def score(const double[:, ::1] z, const double[:, ::1] natural, double[::1] log_prob, double[:, ::1] statistics):
    '''log p of one full-covariance tile z (D, T), and its statistics; all of it without the GIL.'''
    cdef Py_ssize_t D = z.shape[0], T = z.shape[1], K = natural.shape[0], F = natural.shape[1], n
    cdef double *memory = <double *> malloc((K * F + (F + K + 1) * T) * sizeof(double))
    cdef double *packed = memory
    cdef double *phi = packed + K * F
    cdef double *logits = phi + F * T
    cdef double *weight = logits + K * T
    if T % tile_step():
        raise ValueError("T is no multiple of tile_step()")
    with nogil:
        for n in range(T):
            weight[n] = 1
        pack_natural(&natural[0, 0], K, F, packed)
        feature_tile(0, &z[0, 0], D, T, T, 0, F, phi)
        logit_tile(packed, K, F, phi, T, T, logits)
        softmax_tile(logits, K, T, T, weight, &log_prob[0])
        statistic_tile(logits, K, phi, F, T, T, &statistics[0, 0])
    free(memory)

def score_float32(const float[:, ::1] z, const double[:, ::1] natural, float[::1] log_prob, double[:, ::1] statistics):
    cdef Py_ssize_t D = z.shape[0], T = z.shape[1], K = natural.shape[0], F = natural.shape[1], n
    cdef float *memory = <float *> malloc((K * F + (F + K + 1) * T) * sizeof(float))
    cdef float *packed = memory
    cdef float *phi = packed + K * F
    cdef float *logits = phi + F * T
    cdef float *weight = logits + K * T
    if T % tile_step_float32():
        raise ValueError("T is no multiple of tile_step_float32()")
    with nogil:
        for n in range(T):
            weight[n] = 1
        pack_natural_float32(&natural[0, 0], K, F, packed)
        feature_tile_float32(0, &z[0, 0], D, T, T, 0, F, phi)
        logit_tile_float32(packed, K, F, phi, T, T, logits)
        softmax_tile_float32(logits, K, T, T, weight, &log_prob[0])
        statistic_tile_float32(logits, K, phi, F, T, T, &statistics[0, 0])
    free(memory)
"""

# The include path is what mixture.pxd recommends: without it Cython overlooks an editable install.
USER_SETUP = """
from pathlib import Path
import emalgam_kernels
from Cython.Build import cythonize
from setuptools import Extension, setup
setup(
    name="user",
    script_args=["-q", "build_ext", "--inplace"],
    ext_modules=cythonize(
        [Extension("user", ["user.pyx"], extra_compile_args=["-O1", "-Werror"])],
        include_path=[str(Path(emalgam_kernels.__file__).parents[1])],
        quiet=True,
    ),
)
"""

USER_PROGRAM = """
import numpy as np, user
given = np.load("given.npz")
for score, dtype in ((user.score, np.float64), (user.score_float32, np.float32)):
    log_prob, statistics = np.empty(given["z"].shape[1], dtype), np.zeros(given["natural"].shape)
    score(given["z"].astype(dtype), given["natural"], log_prob, statistics)
    np.savez(f"found_{np.dtype(dtype).name}.npz", log_prob=log_prob, statistics=statistics)
"""

T = 256


@pytest.fixture(scope="module")
def tile() -> Problem:
    """One tile of rows, already in the frame."""
    given = problem("full", "float32", "packed", "odd sizes")
    return Problem(given.x[:T], given.mixture, "packed", given.frame)


def check(tile: Problem, arithmetic: str, log_prob: np.ndarray, statistics: np.ndarray) -> None:
    bound = tolerance("packed log_prob", arithmetic)
    assert_within(log_prob, tile.log_prob, bound * tile.log_prob_scale, "log p(x_n)")
    scale = tile.statistics(tile.responsibilities * (tile.logit_scale + tile.log_prob_scale[:, None]), absolute=True)
    assert_within(statistics, tile.statistics(tile.responsibilities), bound * scale, "S")


@pytest.mark.usefixtures("cython_cpu")
def test_cython_module_that_cimports_tile_functions(tmp_path: Path, tile: Problem) -> None:
    (tmp_path / "user.pyx").write_text(USER_PYX)
    (tmp_path / "setup.py").write_text(USER_SETUP)
    z = np.ascontiguousarray(tile.frame.apply(tile.x).T.astype(np.float64))
    np.savez(tmp_path / "given.npz", z=z, natural=tile.parameters("float64").natural)
    for program in (["setup.py"], ["-c", USER_PROGRAM]):
        finished = python(*program, folder=tmp_path)
        assert finished.returncode == 0, finished.stderr + finished.stdout
    for arithmetic in ("float64", "float32"):
        found = np.load(tmp_path / f"found_{arithmetic}.npz")
        check(tile, arithmetic, found["log_prob"], found["statistics"])


def test_declarations_ship_with_the_package(cython_cpu: ModuleType) -> None:
    folder = Path(emalgam_kernels.__file__).parent
    assert (folder / "cython_cpu" / "mixture.pxd").is_file()
    exported = cython_cpu.__pyx_capi__
    names = ("feature_tile", "pack_natural", "logit_tile", "softmax_tile", "statistic_tile")
    assert set(exported) >= {*names, *(f"{name}_float32" for name in names), "tile_step", "tile_step_float32"}


def test_njit_function_that_calls_tile_functions(tile: Problem) -> None:
    need("numba_cpu")
    import numba

    from emalgam_kernels.numba_cpu import tiles
    from emalgam_kernels.numba_cpu.tiles import feature_tile, logit_tile, softmax_tile, statistic_tile

    full = tiles.FULL

    @numba.njit(nogil=True)
    def score(z, natural, n_components, log_prob, statistics):  # type: ignore[no-untyped-def]
        columns = z.shape[1]
        phi = np.empty((natural.shape[1], columns), z.dtype)
        logits = np.empty((natural.shape[0], columns), z.dtype)
        weight = np.ones(columns, z.dtype)
        feature_tile(full, z, columns, 0, phi)
        logit_tile(natural, 0, phi, columns, False, logits)
        softmax_tile(logits, n_components, columns, weight, False, log_prob, np.empty_like(weight))
        statistic_tile(logits, phi, columns, 0, statistics)

    K, F = tile.parameters("float64").natural.shape
    natural = tiles.pack_natural(tile.parameters("float64").natural, "float64")
    log_prob, statistics = np.empty(T), np.zeros(natural.shape)
    score(np.ascontiguousarray(tile.frame.apply(tile.x).T.astype(np.float64)), natural, K, log_prob, statistics)
    check(tile, "float64", log_prob, statistics[:K, :F].astype(LONG))
    # What is compiled for a caller without reference counts serves all: an array from it would be freed too early.
    functions = [value for value in vars(tiles).values() if hasattr(value, "nopython_signatures")]
    returned = [str(signature.return_type) for each in functions for signature in each.nopython_signatures]
    assert len(returned) > 4
    assert not [name for name in returned if "array" in name.lower()]
