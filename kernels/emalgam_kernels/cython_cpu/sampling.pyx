# cython: language_level=3, binding=True, annotation_typing=False, boundscheck=False, wraparound=False
"""Random numbers, samples of mixtures and Monte Carlo divergences, compiled: sample_tile.h, without the GIL.

The functions are specified in `emalgam_kernels.reference.sampling`. They run on the SIMD level of
`emalgam_kernels.cython_cpu.mixture`.
"""

from __future__ import annotations

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from emalgam_kernels import contract
from emalgam_kernels.alias import stratum_ends
from emalgam_kernels.blocks import for_each_block, workspace
from emalgam_kernels.cython_cpu.mixture cimport StackedDensity
from emalgam_kernels.cython_cpu.mixture import simd_level
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
    contract.philox_words(seed, stream, block, first, out)
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
    contract.uniforms(seed, stream, first, out)
    cdef cnp.ndarray u = out
    cdef const Draw_functions *functions = _functions(u)
    cdef uint64_t key = seed, row = first
    cdef uint32_t stream_word = stream
    with nogil:
        functions.uniforms(key, stream_word, row, u.shape[0], u.data, u.strides[0])


def normals(seed: int, stream: int, first: int, out: np.ndarray, n_threads: int = 1) -> None:
    """Standard normals; see `emalgam_kernels.reference.sampling.normals`."""
    contract.normals(seed, stream, first, out)
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
    """What the blocks of one call share, and the arrays that its pointers borrow from: of a mixture, or of a stack."""

    cdef Draws draws
    cdef const Draw_functions *functions
    cdef object arrays
    cdef Py_ssize_t mean_stride, factor_stride, table_stride, alias_stride  # elements from a mixture to the next

    def __init__(self, sampler, seed, first, cnp.ndarray out, str draw):
        cdef Draws *p = &self.draws
        cdef cnp.ndarray means = sampler.means, factors = sampler.factors
        cdef cnp.ndarray probability = sampler.table.probability, alias = sampler.table.alias, ends
        cdef int axis = means.ndim - 2  # of the components
        self.functions = _functions(out)
        p.seed, p.first, p.K, p.D = seed, first, means.shape[axis], means.shape[axis + 1]
        p.antithetic, p.diagonal = draw == "antithetic", sampler.diagonal
        p.mean, p.factor = <double *> means.data, <double *> factors.data
        p.factors = 1 if factors.strides[axis] == 0 else p.K
        p.factor_stride = factors.strides[axis] // sizeof(double)
        p.probability, p.alias = <double *> probability.data, <int32_t *> alias.data
        self.arrays = [sampler]
        if draw == "stratified":
            offset = np.empty(1)
            uniforms(seed, OFFSET, 0, offset)
            ends = stratum_ends(sampler.weights, sampler.n_total, float(offset[0]))
            p.ends = <int64_t *> ends.data
            self.arrays.append(ends)
        if axis == 1:
            self.mean_stride = means.strides[0] // sizeof(double)
            self.factor_stride = factors.strides[0] // sizeof(double)
            self.table_stride = probability.strides[0] // sizeof(double)
            self.alias_stride = alias.strides[0] // sizeof(int32_t)

    def rows_of(self, cnp.ndarray out, cnp.ndarray labels):
        """A function that draws rows [start, stop) of `out` and `labels`, for one mixture."""
        cdef cnp.ndarray packed = np.empty(self.functions.packed_size(&self.draws), np.uint8)
        self.functions.pack(&self.draws, packed.data)

        def block(Py_ssize_t start, Py_ssize_t stop):
            cdef Draws p = self.draws
            cdef cnp.ndarray memory = workspace(self.functions.workspace_size(p.D)), packed_sampler = packed
            p.packed = packed_sampler.data
            p.out, p.out_row_stride, p.out_column_stride = out.data, out.strides[0], out.strides[1]
            p.labels, p.label_stride = labels.data, labels.strides[0]
            with nogil:
                self.functions.sample(&p, start, stop - start, memory.data)

        return block

    cdef void draw(self, Py_ssize_t b, uint64_t first, Py_ssize_t rows, Py_ssize_t itemsize, char *x, char *labels,
                   char *packed, char *memory) noexcept nogil:
        """Rows `first` … of mixture b of a stack into (rows, D) x and (rows,) labels; `packed` is scratch."""
        cdef Draws p = self.draws
        p.first += first
        p.mean, p.factor = p.mean + b * self.mean_stride, p.factor + b * self.factor_stride
        p.probability, p.alias = p.probability + b * self.table_stride, p.alias + b * self.alias_stride
        if p.ends:
            p.ends = p.ends + b * p.K
        p.out, p.out_row_stride, p.out_column_stride = x, p.D * itemsize, itemsize
        p.labels, p.label_stride = labels, sizeof(int64_t)
        p.packed = packed
        self.functions.pack(&p, packed)
        self.functions.sample(&p, 0, rows, memory)


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
    contract.sample_mixture(sampler, seed, first, out, labels, draw)
    block = _Samples(sampler, seed, first, out, draw).rows_of(out, labels)
    for_each_block(block, len(out), rows_per_block(out.shape[1]), n_threads)


cdef Py_ssize_t _padded(Py_ssize_t n_bytes) noexcept nogil:
    """In whole cache lines."""
    return (n_bytes + 63) // 64 * 64


cdef class _Pairs:
    """The samples of each pair of a stack, and the densities they are put into."""

    cdef _Samples samples
    cdef list densities
    cdef Py_ssize_t itemsize, packed_size, memory_size

    def __init__(self, sampler, densities, seed, first, dtype, draw):
        cdef StackedDensity density
        like = np.empty((0, sampler.n_features), dtype)
        self.samples, self.itemsize = _Samples(sampler, seed, first, like, draw), like.itemsize
        self.densities = [StackedDensity(each, sampler.n_features) for each in densities]
        self.packed_size = _padded(self.samples.functions.packed_size(&self.samples.draws))
        self.memory_size = self.samples.functions.workspace_size(self.samples.draws.D)
        for density in self.densities:
            self.memory_size = max(self.memory_size, density.workspace_size)

    def log_densities(self, pairs, Py_ssize_t start, cnp.ndarray logs):
        """Of samples [start, start + rows) of some pairs, into (densities, pairs, rows)."""
        cdef Py_ssize_t b, first_pair = pairs.start, n_pairs = logs.shape[1], rows = logs.shape[2]
        cdef Py_ssize_t D = self.samples.draws.D, itemsize = self.itemsize, n_densities = logs.shape[0]
        cdef Py_ssize_t x_size = _padded(rows * D * itemsize), label_size = _padded(rows * sizeof(int64_t))
        cdef cnp.ndarray given = workspace(x_size + label_size + self.packed_size + self.memory_size + 64)
        cdef char *x = given.data + (64 - <size_t> given.data % 64) % 64
        cdef char *labels = x + x_size
        cdef char *packed = labels + label_size
        cdef char *memory = packed + self.packed_size
        cdef double *out = <double *> logs.data
        cdef _Samples samples = self.samples
        # Names, as a list cannot be read without the GIL. Without a control the last two are not asked.
        cdef StackedDensity density_p = self.densities[0], density_q = self.densities[1]
        cdef StackedDensity control_p = self.densities[n_densities - 2], control_q = self.densities[n_densities - 1]
        cdef Py_ssize_t step = n_pairs * rows  # from one density to the next
        with nogil:
            for b in range(first_pair, first_pair + n_pairs):
                samples.draw(b, <uint64_t> start, rows, itemsize, x, labels, packed, memory)
                density_p.log_prob(b, x, rows, itemsize == 4, out, memory)
                density_q.log_prob(b, x, rows, itemsize == 4, out + step, memory)
                if n_densities > 2:
                    control_p.log_prob(b, x, rows, itemsize == 4, out + 2 * step, memory)
                    control_q.log_prob(b, x, rows, itemsize == 4, out + 3 * step, memory)
                out += rows


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
    contract.kl_monte_carlo(sampler, p, q, seed, first, n, out, draw, control)
    densities = p, q, *(control or ())
    pairs = _Pairs(sampler, densities, seed, first, p.arithmetic, draw)
    sum_log_ratios(pairs.log_densities, len(densities), sampler.n_features, n, out, n_threads)
