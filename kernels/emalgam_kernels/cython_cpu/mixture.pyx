# cython: language_level=3, binding=True, annotation_typing=False, boundscheck=False, wraparound=False
"""The E-step and its statistics, compiled: blocks of rows through the tile loop of tile.h, without the GIL.

The functions are specified in `emalgam_kernels.reference.mixture`.
"""

from __future__ import annotations

import os

import numpy as np

cimport numpy as cnp
from libc.stdlib cimport calloc, free

from emalgam_kernels import contract
from emalgam_kernels.blocks import for_each_block, native_slices, rows_per_block, sum_over_blocks, workspace
from emalgam_kernels.parameters import Direct, Packed

cnp.import_array()

cdef extern from "tiles.h" nogil:
    ctypedef struct Problem:
        const char *x
        Py_ssize_t rows, D, K, F, x_row_stride, x_column_stride
        int x_is_float32, map, direct, hard
        const double *shift
        const double *scale
        const double *whitening
        const double *coefficients
        Py_ssize_t coefficient_stride
        const double *mean
        const double *log_constant
        const char *weight
        Py_ssize_t weight_stride
        char *log_prob
        Py_ssize_t log_prob_stride
        char *responsibilities
        Py_ssize_t responsibility_row_stride, responsibility_column_stride
        int responsibilities_are_float32
        double *statistics
        double *total

    ctypedef struct Tiles_f64:
        const char *level
        Py_ssize_t step
        Py_ssize_t (*workspace_size)(Py_ssize_t, Py_ssize_t, Py_ssize_t, int, int) noexcept nogil
        void (*mixture_block)(const Problem *, char *) noexcept nogil
        void (*feature_tile)(int, const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                             double *) noexcept nogil
        void (*pack_natural)(const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, double *) noexcept nogil
        void (*logit_tile)(const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *, Py_ssize_t,
                           Py_ssize_t, int, double *) noexcept nogil
        void (*softmax_tile)(double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *, int, int,
                             double *, double *) noexcept nogil
        void (*statistic_tile)(const double *, Py_ssize_t, const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                               double *, Py_ssize_t) noexcept nogil

    ctypedef struct Tiles_f32:
        const char *level
        Py_ssize_t step
        Py_ssize_t (*workspace_size)(Py_ssize_t, Py_ssize_t, Py_ssize_t, int, int) noexcept nogil
        void (*mixture_block)(const Problem *, char *) noexcept nogil
        void (*feature_tile)(int, const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                             float *) noexcept nogil
        void (*pack_natural)(const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float *) noexcept nogil
        void (*logit_tile)(const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float *, Py_ssize_t,
                           Py_ssize_t, int, float *) noexcept nogil
        void (*softmax_tile)(float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float *, int, int,
                             float *, float *) noexcept nogil
        void (*statistic_tile)(const float *, Py_ssize_t, const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                               double *, Py_ssize_t) noexcept nogil

    int simd_level_of "simd_level"(const char *wanted)
    const Tiles_f64 *tiles_f64(int level)
    const Tiles_f32 *tiles_f32(int level)

cdef const Tiles_f64 *_f64
cdef const Tiles_f32 *_f32

FEATURE_MAP_CODES = {"full": 0, "diag": 1, "spherical": 2}


def select_simd_level(wanted: str | None = None) -> str:
    """Use the code of one SIMD level, and say which: "v4", "v3", "baseline", at most what the processor has."""
    global _f64, _f32
    if wanted is not None and wanted not in ("v4", "v3", "baseline"):
        raise ValueError(f"SIMD level is {wanted!r}; expected v4, v3 or baseline (EMALGAM_SIMD)")
    cdef bytes name = (wanted or "v4").encode()
    cdef int level = simd_level_of(name)
    _f64, _f32 = tiles_f64(level), tiles_f32(level)
    return _f64.level.decode()


select_simd_level(os.environ.get("EMALGAM_SIMD") or None)


def simd_level() -> str:
    """The SIMD level whose code runs."""
    return _f64.level.decode()


cdef Py_ssize_t _set_parameters(Problem *p, object parameters, Py_ssize_t n_features):
    """The mixture of a Problem, of a stack the first one; returns the bytes of scratch memory that a block takes."""
    cdef cnp.ndarray shift = parameters.shift, scale = parameters.scale, coefficients, mean, constants, whitening
    p.D, p.K, p.F = n_features, parameters.n_components, parameters.n_statistics
    p.map = FEATURE_MAP_CODES[parameters.feature_map]
    p.shift, p.scale = <double *> shift.data, <double *> scale.data
    if isinstance(parameters, Direct):
        coefficients, mean, constants = parameters.precisions_cholesky, parameters.means, parameters.log_constants
        p.direct, p.coefficient_stride = 1, coefficients.strides[mean.ndim - 2] // sizeof(double)
        p.mean, p.log_constant = <double *> mean.data, <double *> constants.data
    else:
        coefficients = parameters.natural
        if parameters.whitening is not None:
            whitening = parameters.whitening
            p.whitening = <double *> whitening.data
    p.coefficients = <double *> coefficients.data
    if parameters.arithmetic == "float32":
        return _f32.workspace_size(p.D, p.K, p.F, p.map, p.direct)
    return _f64.workspace_size(p.D, p.K, p.F, p.map, p.direct)


cdef Py_ssize_t _stack_stride(object array):
    """Elements from one mixture of a stack to the next."""
    return 0 if array is None else (<cnp.ndarray> array).strides[0] // sizeof(double)


ctypedef struct _Stacked:
    Problem first
    Py_ssize_t shift, scale, whitening, coefficients, mean, log_constant


cdef class StackedDensity:
    """log p of each mixture of a stack, for other Cython modules of this package: see mixture.pxd."""

    def __cinit__(self):
        self.stack = calloc(1, sizeof(_Stacked))
        if not self.stack:
            raise MemoryError("no memory for the parameters of a stack")

    def __dealloc__(self):
        free(self.stack)

    def __init__(self, parameters, Py_ssize_t n_features):
        cdef _Stacked *stack = <_Stacked *> self.stack
        self.arrays, self.float32 = parameters, parameters.arithmetic == "float32"
        self.workspace_size = _set_parameters(&stack.first, parameters, n_features)
        stack.shift, stack.scale = _stack_stride(parameters.shift), _stack_stride(parameters.scale)
        if stack.first.direct:
            stack.coefficients = _stack_stride(parameters.precisions_cholesky)
            stack.mean, stack.log_constant = _stack_stride(parameters.means), _stack_stride(parameters.log_constants)
        else:
            stack.coefficients, stack.whitening = _stack_stride(parameters.natural), _stack_stride(parameters.whitening)

    cdef void log_prob(self, Py_ssize_t b, const char *x, Py_ssize_t rows, int x_is_float32, double *out,
                       char *workspace) noexcept nogil:
        cdef _Stacked *stack = <_Stacked *> self.stack
        cdef Problem p = stack.first
        p.shift, p.scale = p.shift + b * stack.shift, p.scale + b * stack.scale
        p.coefficients = p.coefficients + b * stack.coefficients
        if p.whitening:
            p.whitening = p.whitening + b * stack.whitening
        if p.direct:
            p.mean, p.log_constant = p.mean + b * stack.mean, p.log_constant + b * stack.log_constant
        p.x, p.rows, p.x_is_float32 = x, rows, x_is_float32
        p.x_column_stride = sizeof(float) if x_is_float32 else sizeof(double)
        p.x_row_stride = p.D * p.x_column_stride
        p.log_prob, p.log_prob_stride = <char *> out, sizeof(double)
        if self.float32:
            _f32.mixture_block(&p, workspace)
        else:
            _f64.mixture_block(&p, workspace)


cdef class _Block:
    """The part of a Problem that all blocks share, and the arrays that its pointers borrow from."""

    cdef Problem problem
    cdef bint float32
    cdef object x, weight, log_prob, responsibilities, arrays
    cdef Py_ssize_t workspace_size

    def __init__(self, x, parameters, weight=None, log_prob=None, responsibilities=None, bint hard=False):
        self.x, self.weight, self.log_prob, self.responsibilities = x, weight, log_prob, responsibilities
        self.float32 = parameters.arithmetic == "float32"
        self.arrays, self.problem.hard = parameters, hard
        self.workspace_size = _set_parameters(&self.problem, parameters, x.shape[1])

    cdef double run(self, Py_ssize_t start, Py_ssize_t stop, cnp.ndarray partial) except? -1:
        """One block of rows; statistics are added to `partial` if there is one."""
        cdef Problem p = self.problem
        cdef cnp.ndarray rows, weight, log_prob, responsibilities, memory = workspace(self.workspace_size)
        cdef double total = 0
        for first, last, piece in native_slices(self.x, start, stop):
            rows = piece
            p.x, p.rows, p.x_is_float32 = <char *> rows.data, rows.shape[0], rows.itemsize == 4
            p.x_row_stride, p.x_column_stride = rows.strides[0], rows.strides[1]
            if self.weight is not None:
                weight = self.weight[first:last]
                p.weight, p.weight_stride = <char *> weight.data, weight.strides[0]
            if self.log_prob is not None:
                log_prob = self.log_prob[first:last]
                p.log_prob, p.log_prob_stride = <char *> log_prob.data, log_prob.strides[0]
            if self.responsibilities is not None:
                responsibilities = self.responsibilities[first:last]
                p.responsibilities = <char *> responsibilities.data
                p.responsibility_row_stride = responsibilities.strides[0]
                p.responsibility_column_stride = responsibilities.strides[1]
                p.responsibilities_are_float32 = responsibilities.itemsize == 4
            if partial is not None:
                p.statistics, p.total = <double *> partial.data, &total
            with nogil:
                if self.float32:
                    _f32.mixture_block(&p, <char *> memory.data)
                else:
                    _f64.mixture_block(&p, <char *> memory.data)
        return total

    def rows(self, start, stop):
        self.run(start, stop, None)

    def add(self, start, stop, partial):
        return self.run(start, stop, partial)


cdef bint _is_float64(object array, int n_axes, Py_ssize_t first, Py_ssize_t last, bint written):
    """Whether it is an aligned float64 array with that many axes, and so many elements along the first and last."""
    return (cnp.PyArray_Check(array) and cnp.PyArray_NDIM(array) == n_axes and cnp.PyArray_TYPE(array) == cnp.NPY_DOUBLE
            and (cnp.PyArray_ISBEHAVED(array) if written else cnp.PyArray_ISBEHAVED_RO(array))
            and cnp.PyArray_DIM(array, 0) == first and cnp.PyArray_DIM(array, n_axes - 1) == last)


cdef bint _fit_at_a_glance(object x, object parameters, object weight, object log_prob, object responsibilities,
                           object statistics):
    """Whether arguments are the usual ones, and fit: what `emalgam_kernels.contract` takes ten times as long to see.

    False decides nothing: the contract knows more, and finds the words. None is what a kernel has not.
    """
    if not (cnp.PyArray_Check(x) and cnp.PyArray_NDIM(x) == 2 and cnp.PyArray_ISBEHAVED_RO(x)
            and cnp.PyArray_TYPE(x) in (cnp.NPY_DOUBLE, cnp.NPY_FLOAT)
            and (type(parameters) is Packed or type(parameters) is Direct)):
        return False
    cdef object shift = parameters.shift, arithmetic = parameters.arithmetic
    cdef object rows = parameters.natural if type(parameters) is Packed else parameters.means  # one of each component
    cdef Py_ssize_t N = cnp.PyArray_DIM(x, 0), D = cnp.PyArray_DIM(x, 1), K
    if not (_is_float64(shift, 1, D, D, False) and (arithmetic == "float64" or arithmetic == "float32")):
        return False
    K = cnp.PyArray_DIM(rows, 0)
    return ((weight is None or _is_float64(weight, 1, N, N, False))
            and (log_prob is None or _is_float64(log_prob, 1, N, N, True))
            and (responsibilities is None or _is_float64(responsibilities, 2, N, K, True))
            and (statistics is None or _is_float64(statistics, 2, K, parameters.n_statistics, True)))


def log_prob(x: np.ndarray, parameters: Packed | Direct, out: np.ndarray, n_threads: int = 1) -> None:
    """log p(x_n); see `emalgam_kernels.reference.mixture.log_prob`."""
    if out is None or not _fit_at_a_glance(x, parameters, None, out, None, None):
        contract.log_prob(x, parameters, out)
    rows = rows_per_block(parameters.n_components, parameters.n_statistics)
    for_each_block(_Block(x, parameters, log_prob=out).rows, len(x), rows, n_threads)


def responsibilities(
    x: np.ndarray,
    parameters: Packed | Direct,
    out: np.ndarray,
    n_threads: int = 1,
    log_prob: np.ndarray | None = None,
) -> None:
    """r_nk; see `emalgam_kernels.reference.mixture.responsibilities`."""
    if out is None or not _fit_at_a_glance(x, parameters, None, log_prob, out, None):
        contract.responsibilities(x, parameters, out, log_prob)
    rows = rows_per_block(parameters.n_components, parameters.n_statistics)
    block = _Block(x, parameters, log_prob=log_prob, responsibilities=out)
    for_each_block(block.rows, len(x), rows, n_threads)


def em_statistics(
    x: np.ndarray,
    sample_weight: np.ndarray | None,
    parameters: Packed | Direct,
    out: np.ndarray,
    hard: bool = False,
    n_threads: int = 1,
) -> float:
    """S and Σ ω log p; see `emalgam_kernels.reference.mixture.em_statistics`."""
    if out is None or not _fit_at_a_glance(x, parameters, sample_weight, None, None, out):
        contract.em_statistics(x, sample_weight, parameters, out)
    rows = rows_per_block(parameters.n_components, parameters.n_statistics)
    block = _Block(x, parameters, weight=sample_weight, hard=hard)
    return sum_over_blocks(block.add, len(x), rows, out, n_threads)


# ---- the tile functions that mixture.pxd offers to other Cython modules

cpdef Py_ssize_t tile_step() noexcept nogil:
    return _f64.step

cpdef Py_ssize_t tile_step_float32() noexcept nogil:
    return _f32.step

cdef void feature_tile(int feature_map, const double *z, Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride,
                       Py_ssize_t first, Py_ssize_t last, double *phi) noexcept nogil:
    _f64.feature_tile(feature_map, z, D, columns, stride, first, last, phi)

cdef void feature_tile_float32(int feature_map, const float *z, Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride,
                               Py_ssize_t first, Py_ssize_t last, float *phi) noexcept nogil:
    _f32.feature_tile(feature_map, z, D, columns, stride, first, last, phi)

cdef void pack_natural(const double *natural, Py_ssize_t K, Py_ssize_t F, double *packed) noexcept nogil:
    _f64.pack_natural(natural, F, 1, K, F, packed)

cdef void pack_natural_float32(const double *natural, Py_ssize_t K, Py_ssize_t F, float *packed) noexcept nogil:
    _f32.pack_natural(natural, F, 1, K, F, packed)

cdef void logit_tile(const double *packed, Py_ssize_t K, Py_ssize_t F, const double *phi, Py_ssize_t columns,
                     Py_ssize_t stride, double *logits) noexcept nogil:
    _f64.logit_tile(packed, K, F, 0, F, phi, columns, stride, 0, logits)

cdef void logit_tile_float32(const float *packed, Py_ssize_t K, Py_ssize_t F, const float *phi, Py_ssize_t columns,
                             Py_ssize_t stride, float *logits) noexcept nogil:
    _f32.logit_tile(packed, K, F, 0, F, phi, columns, stride, 0, logits)

cdef void softmax_tile(double *logits, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t stride, const double *weight,
                       double *log_prob) noexcept nogil:
    _f64.softmax_tile(logits, K, columns, stride, weight, 0, 1, NULL, log_prob)

cdef void softmax_tile_float32(float *logits, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t stride,
                               const float *weight, float *log_prob) noexcept nogil:
    _f32.softmax_tile(logits, K, columns, stride, weight, 0, 1, NULL, log_prob)

cdef void statistic_tile(const double *r, Py_ssize_t K, const double *phi, Py_ssize_t F, Py_ssize_t columns,
                         Py_ssize_t stride, double *statistics) noexcept nogil:
    _f64.statistic_tile(r, K, phi, F, columns, stride, statistics, F)

cdef void statistic_tile_float32(const float *r, Py_ssize_t K, const float *phi, Py_ssize_t F, Py_ssize_t columns,
                                 Py_ssize_t stride, double *statistics) noexcept nogil:
    _f32.statistic_tile(r, K, phi, F, columns, stride, statistics, F)
