# cython: language_level=3, binding=True, annotation_typing=False, boundscheck=False, wraparound=False
"""Random numbers, samples of mixtures and Monte Carlo divergences, compiled: sample_tile.h, without the GIL.

The functions are specified in `emalgam_kernels.reference.sampling`. They run on the SIMD level of
`emalgam_kernels.cython_cpu.mixture`.
"""

from __future__ import annotations

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from emalgam_kernels.alias import stratum_ends
from emalgam_kernels.blocks import for_each_block, workspace
from emalgam_kernels.cython_cpu.mixture import log_prob, simd_level
from emalgam_kernels.monte_carlo import sum_log_ratios
from emalgam_kernels.parameters import Direct, Packed, Sampler
from emalgam_kernels.philox import OFFSET, rows_per_block

cnp.import_array()

cdef extern from "sample_tiles.h" nogil:
    ctypedef struct Draws:
        uint64_t seed, first
        Py_ssize_t D, K
        int antithetic, diagonal
        const double *mean
        const double *factor
        Py_ssize_t factors, factor_stride
        const double *probability
        const int32_t *alias
        const int64_t *ends
        const char *packed
        char *out
        Py_ssize_t out_row_stride, out_column_stride
        char *labels
        Py_ssize_t label_stride

    ctypedef struct Draw_functions:
        Py_ssize_t (*workspace_size)(Py_ssize_t) noexcept nogil
        Py_ssize_t (*packed_size)(const Draws *) noexcept nogil
        void (*pack)(const Draws *, char *) noexcept nogil
        void (*words)(uint64_t, uint32_t, uint32_t, uint64_t, Py_ssize_t, char *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*uniforms)(uint64_t, uint32_t, uint64_t, Py_ssize_t, char *, Py_ssize_t) noexcept nogil
        void (*normals)(uint64_t, uint32_t, uint64_t, Py_ssize_t, Py_ssize_t, char *, Py_ssize_t, Py_ssize_t,
                        char *) noexcept nogil
        void (*sample)(const Draws *, Py_ssize_t, Py_ssize_t, char *) noexcept nogil

    const Draw_functions *draw_functions(const char *level, int is_float32)


cdef const Draw_functions *_functions(cnp.ndarray out) except NULL:
    """The functions for the dtype of `out`, at the level that mixture uses."""
    cdef bytes level = simd_level().encode()
    return draw_functions(level, out.itemsize == 4)


def philox_words(seed: int, stream: int, block: int, first: int, out: np.ndarray) -> None:
    """The words of Philox4x32-10; see `emalgam_kernels.reference.sampling.philox_words`."""
    cdef cnp.ndarray words = out
    cdef bytes level = simd_level().encode()
    cdef const Draw_functions *functions = draw_functions(level, 0)
    cdef uint64_t key = seed, row = first
    cdef uint32_t stream_word = stream, block_word = block
    with nogil:
        functions.words(key, stream_word, block_word, row, words.shape[0], words.data, words.strides[0],
                        words.strides[1])


def uniforms(seed: int, stream: int, first: int, out: np.ndarray) -> None:
    """Uniforms in (0, 1); see `emalgam_kernels.reference.sampling.uniforms`."""
    cdef cnp.ndarray u = out
    cdef const Draw_functions *functions = _functions(u)
    cdef uint64_t key = seed, row = first
    cdef uint32_t stream_word = stream
    with nogil:
        functions.uniforms(key, stream_word, row, u.shape[0], u.data, u.strides[0])


def normals(seed: int, stream: int, first: int, out: np.ndarray, n_threads: int = 1) -> None:
    """Standard normals; see `emalgam_kernels.reference.sampling.normals`."""
    block = _Normals(seed, stream, first, out)
    for_each_block(block.rows, len(out), rows_per_block(out.shape[1]), n_threads)


cdef class _Normals:
    """Where the blocks of one call draw to."""

    cdef cnp.ndarray out
    cdef const Draw_functions *functions
    cdef uint64_t seed, first
    cdef uint32_t stream

    def __init__(self, seed, stream, first, cnp.ndarray out):
        self.seed, self.stream, self.first, self.out = seed, stream, first, out
        self.functions = _functions(out)

    def rows(self, Py_ssize_t start, Py_ssize_t stop):
        cdef cnp.ndarray out = self.out
        cdef cnp.ndarray memory = workspace(self.functions.workspace_size(out.shape[1]))
        with nogil:
            self.functions.normals(self.seed, self.stream, self.first + start, stop - start, out.shape[1],
                                   out.data + start * out.strides[0], out.strides[0], out.strides[1], memory.data)


cdef class _Samples:
    """What the blocks of one call share, and the arrays that its pointers borrow from."""

    cdef Draws draws
    cdef const Draw_functions *functions
    cdef object arrays

    def __init__(self, sampler, seed, first, cnp.ndarray out, str draw):
        cdef Draws *p = &self.draws
        cdef cnp.ndarray means = sampler.means, factors = sampler.factors
        cdef cnp.ndarray probability = sampler.table.probability, alias = sampler.table.alias, ends, packed
        self.functions = _functions(out)
        p.seed, p.first, p.K, p.D = seed, first, means.shape[0], means.shape[1]
        p.antithetic, p.diagonal = draw == "antithetic", factors.ndim == 2
        p.mean, p.factor = <double *> means.data, <double *> factors.data
        p.factors = 1 if factors.strides[0] == 0 else p.K
        p.factor_stride = factors.strides[0] // sizeof(double)
        p.probability, p.alias = <double *> probability.data, <int32_t *> alias.data
        self.arrays = [sampler]
        if draw == "stratified":
            offset = np.empty(1)
            uniforms(seed, OFFSET, 0, offset)
            ends = stratum_ends(sampler.weights, sampler.n_total, float(offset[0]))
            p.ends = <int64_t *> ends.data
            self.arrays.append(ends)
        packed = np.empty(self.functions.packed_size(p), np.uint8)
        self.functions.pack(p, packed.data)
        p.packed = packed.data
        self.arrays.append(packed)

    cpdef draw(self, Py_ssize_t first, cnp.ndarray out, cnp.ndarray labels, Py_ssize_t start, Py_ssize_t stop):
        """Rows [start, stop) of `out` and `labels`, whose row 0 is row `first` of the samples."""
        cdef Draws p = self.draws
        cdef cnp.ndarray memory = workspace(self.functions.workspace_size(p.D))
        p.first += <uint64_t> first
        p.out, p.out_row_stride, p.out_column_stride = out.data, out.strides[0], out.strides[1]
        p.labels, p.label_stride = labels.data, labels.strides[0]
        with nogil:
            self.functions.sample(&p, start, stop - start, memory.data)


def sample_mixture(
    sampler: Sampler,
    seed: int,
    first: int,
    out: np.ndarray,
    labels: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
) -> None:
    """Samples of a mixture; see `emalgam_kernels.reference.sampling.sample_mixture`."""
    samples = _Samples(sampler, seed, first, out, draw)

    def block(start, stop):
        samples.draw(0, out, labels, start, stop)

    for_each_block(block, len(out), rows_per_block(out.shape[1]), n_threads)


def kl_monte_carlo(
    sampler: Sampler,
    p: Packed | Direct,
    q: Packed | Direct,
    seed: int,
    first: int,
    n: int,
    out: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
    control: tuple[Packed, Packed] | None = None,
) -> None:
    """Sums of log p − log q over samples; see `emalgam_kernels.reference.sampling.kl_monte_carlo`."""
    samples = _Samples(sampler, seed, first, np.empty((0, sampler.n_features), p.arithmetic), draw)

    def sample(start, x, labels):
        samples.draw(start, x, labels, 0, len(x))

    pairs = ((p, q),) if control is None else ((p, q), control)
    sum_log_ratios(sample, log_prob, sampler.n_features, pairs, n, out, n_threads)
