# cython: language_level=3, binding=True, annotation_typing=False, boundscheck=False, wraparound=False
"""Many fits at once, compiled: whole problems on each thread, without the GIL.

The functions are specified in `emalgam_kernels.reference.batch`. They run on the SIMD level of
`emalgam_kernels.cython_cpu.mixture`.
"""

from __future__ import annotations

import numpy as np

cimport numpy as cnp
from libc.stdint cimport uint32_t, uint64_t

from emalgam_kernels import contract
from emalgam_kernels.batch import (
    COVARIANCE_TYPES, CRITERIA, EQUAL, LIFTS, MOST_CANCELLATION, NO_MASS, RELATIVE_FLOOR, ROUND_SHIFT, ROUNDING,
    Mixtures, Outcomes, Problems, Settings, passes_of_a_fit, problems_per_block
)
from emalgam_kernels.blocks import for_each_block, workspace
from emalgam_kernels.cython_cpu import mixture
from emalgam_kernels.philox import PROBLEMS, SEEDS

cnp.import_array()

cdef extern from "batch.h" nogil:
    enum: MOST_LIFTS

    ctypedef struct Problem:
        const char *x
        Py_ssize_t D, x_row_stride, x_column_stride
        int x_is_float32
        const char *order
        Py_ssize_t order_stride
        const char *weight
        Py_ssize_t weight_stride

    ctypedef struct Column:
        char *data
        Py_ssize_t stride

    ctypedef struct Batch:
        Problem samples
        Column offsets
        int covariance
        Column n_components, weights, means, covariances
        Column numbers, fewest, most, log_likelihood, entropy, n_iter, converged, status
        int criterion
        Py_ssize_t n_init, max_iter, n_lifts
        double tol, added
        double lifts[MOST_LIFTS]
        double relative_floor, round_shift, no_mass, rounding, equal, most_cancellation
        uint64_t seed
        uint32_t stream_of_problems, stream_of_seeds
        Column log_prob, labels

    ctypedef struct Batch_functions:
        Py_ssize_t (*workspace_size)(const Batch *, Py_ssize_t, Py_ssize_t, int) noexcept nogil
        void (*fit)(const Batch *, Py_ssize_t, Py_ssize_t, char *) noexcept nogil
        void (*predict)(const Batch *, Py_ssize_t, Py_ssize_t, char *) noexcept nogil

    const Batch_functions *batch_functions(const char *level)


cdef Column _column(cnp.ndarray array):
    cdef Column column
    column.data, column.stride = array.data, array.strides[0]
    return column


cdef class _Blocks:
    """What the blocks of one call share, and the arrays that its pointers borrow from."""

    cdef Batch batch
    cdef const Batch_functions *functions
    cdef list arrays

    def __init__(self, problems, mixtures):
        cdef Batch *g = &self.batch
        cdef cnp.ndarray x = problems.x, order
        cdef bytes level = mixture.simd_level().encode()
        self.functions = batch_functions(level)
        self.arrays = [problems, mixtures]
        g.samples.x, g.samples.D, g.samples.x_is_float32 = x.data, x.shape[1], x.itemsize == 4
        g.samples.x_row_stride, g.samples.x_column_stride = x.strides[0], x.strides[1]
        if problems.order is not None:
            order = problems.order
            g.samples.order, g.samples.order_stride = order.data, order.strides[0]
        g.offsets = _column(problems.offsets)
        g.covariance = COVARIANCE_TYPES.index(mixtures.covariance_type)
        g.n_components, g.weights = _column(mixtures.n_components), _column(mixtures.weights)
        g.means, g.covariances = _column(mixtures.means), _column(mixtures.covariances)

    cdef how_to_fit(self, problems, settings, outcomes):
        cdef Batch *g = &self.batch
        cdef cnp.ndarray weight
        self.arrays += [settings, outcomes]
        g.numbers = _column(problems.numbers)
        if problems.sample_weight is not None:
            weight = problems.sample_weight
            g.samples.weight, g.samples.weight_stride = weight.data, weight.strides[0]
        g.fewest, g.most = _column(settings.fewest), _column(settings.most)
        g.criterion = CRITERIA.index(settings.criterion)
        g.n_init, g.max_iter, g.tol, g.added = settings.n_init, settings.max_iter, settings.tol, settings.added
        g.relative_floor, g.round_shift, g.no_mass = RELATIVE_FLOOR, ROUND_SHIFT, NO_MASS
        g.rounding, g.equal, g.most_cancellation = ROUNDING, EQUAL, MOST_CANCELLATION
        g.n_lifts = len(LIFTS)
        for i in range(g.n_lifts):
            g.lifts[i] = LIFTS[i]
        g.seed, g.stream_of_problems, g.stream_of_seeds = settings.seed, PROBLEMS, SEEDS
        g.log_likelihood, g.entropy = _column(outcomes.log_likelihood), _column(outcomes.entropy)
        g.n_iter, g.converged = _column(outcomes.n_iter), _column(outcomes.converged)
        g.status = _column(outcomes.status)

    cdef where_to_predict(self, log_prob, labels):
        self.arrays += [log_prob, labels]
        self.batch.log_prob, self.batch.labels = _column(log_prob), _column(labels)

    def fit(self, Py_ssize_t start, Py_ssize_t stop):
        cdef cnp.ndarray memory = workspace(self.functions.workspace_size(&self.batch, start, stop, False))
        with nogil:
            self.functions.fit(&self.batch, start, stop, memory.data)

    def predict(self, Py_ssize_t start, Py_ssize_t stop):
        cdef cnp.ndarray memory = workspace(self.functions.workspace_size(&self.batch, start, stop, True))
        with nogil:
            self.functions.predict(&self.batch, start, stop, memory.data)


def fit_many(
    problems: Problems, settings: Settings, mixtures: Mixtures, outcomes: Outcomes, n_threads: int = 1
) -> None:
    """A fit of each problem; see `emalgam_kernels.reference.batch.fit_many`."""
    contract.fit_many(problems, settings, mixtures, outcomes)
    cdef _Blocks blocks = _Blocks(problems, mixtures)
    blocks.how_to_fit(problems, settings, outcomes)
    at_once = problems_per_block(problems, settings.most, passes_of_a_fit(settings))
    for_each_block(blocks.fit, len(problems), at_once, n_threads)


def predict_many(
    problems: Problems, mixtures: Mixtures, log_prob: np.ndarray, labels: np.ndarray, n_threads: int = 1
) -> None:
    """log p and labels; see `emalgam_kernels.reference.batch.predict_many`."""
    contract.predict_many(problems, mixtures, log_prob, labels)
    cdef _Blocks blocks = _Blocks(problems, mixtures)
    blocks.where_to_predict(log_prob, labels)
    for_each_block(blocks.predict, len(problems), problems_per_block(problems, mixtures.n_components), n_threads)
