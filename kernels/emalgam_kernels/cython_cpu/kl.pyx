# cython: language_level=3, binding=True, annotation_typing=False, boundscheck=False, wraparound=False
"""Divergences of Gaussians, compiled: one pair in each lane, blocks of pairs without the GIL.

The functions are specified in `emalgam_kernels.reference.kl`.
"""

from __future__ import annotations

import numpy as np

cimport numpy as cnp

from emalgam_kernels import contract
from emalgam_kernels.blocks import for_each_block, workspace
from emalgam_kernels.cython_cpu import mixture
from emalgam_kernels.kl_blocks import (
    ASYMMETRY, FARTHEST, PLAIN, ROWS_OF_A_BLOCK, for_each_tile, guard, matrices_per_block, pairs_per_block,
    shift_of
)
from emalgam_kernels.parameters import Gaussians

cnp.import_array()

cdef extern from "kl.h" nogil:
    ctypedef struct Stack:
        const char *mean
        const char *covariance
        const char *factor
        Py_ssize_t mean_stride, covariance_stride, factor_stride

    ctypedef struct Divergence:
        Stack p, q
        Py_ssize_t D
        int full
        double farthest, plain
        char *out
        Py_ssize_t row_stride, column_stride
        const char *shift
        double guard

    ctypedef struct Factorization:
        const char *covariance
        char *out
        Py_ssize_t D, covariance_stride, out_stride
        double plain, asymmetry

    ctypedef struct Divergence_functions:
        const char *level
        Py_ssize_t (*workspace_size)(Py_ssize_t, int, Py_ssize_t) noexcept nogil
        void (*pairs)(const Divergence *, Py_ssize_t, Py_ssize_t, char *) noexcept nogil
        void (*all_pairs)(const Divergence *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, char *) noexcept nogil
        Py_ssize_t (*precision_factors)(const Factorization *, Py_ssize_t, Py_ssize_t, char *) noexcept nogil

    const Divergence_functions *divergence_functions(const char *level, int is_float32)


cdef Stack _stack(object gaussians):
    cdef cnp.ndarray mean = gaussians.means, covariance = gaussians.covariances, factor = gaussians.precisions_cholesky
    cdef Stack stack
    stack.mean, stack.mean_stride = mean.data, mean.strides[0]
    stack.covariance, stack.covariance_stride = covariance.data, covariance.strides[0]
    stack.factor, stack.factor_stride = NULL, 0
    if factor is not None:
        stack.factor, stack.factor_stride = factor.data, factor.strides[0]
    return stack


cdef class _Blocks:
    """What the blocks of one call share, and the arrays that its pointers borrow from."""

    cdef Divergence divergence
    cdef const Divergence_functions *code
    cdef object arrays
    cdef Py_ssize_t workspace_size

    def __init__(self, p, q, cnp.ndarray out, cnp.ndarray shift=None):
        cdef Divergence *g = &self.divergence
        self.arrays = p, q, out, shift
        cdef bytes level = mixture.simd_level().encode()
        self.code = divergence_functions(level, p.means.dtype == np.float32)
        g.p, g.q, g.D, g.full = _stack(p), _stack(q), p.n_features, p.covariance_type == "full"
        g.farthest, g.plain = FARTHEST, PLAIN[p.means.dtype.name]
        g.out, g.row_stride = <char *> out.data, out.strides[0]
        if shift is not None:
            g.column_stride, g.shift, g.guard = out.strides[1], shift.data, guard(p.means.dtype)
        self.workspace_size = self.code.workspace_size(g.D, g.full, 0 if shift is None else ROWS_OF_A_BLOCK)

    def pairs(self, Py_ssize_t start, Py_ssize_t stop):
        cdef cnp.ndarray memory = workspace(self.workspace_size)
        with nogil:
            self.code.pairs(&self.divergence, start, stop, <char *> memory.data)

    def all_pairs(self, Py_ssize_t row, Py_ssize_t last_row, Py_ssize_t column, Py_ssize_t last_column):
        cdef cnp.ndarray memory = workspace(self.workspace_size)
        with nogil:
            self.code.all_pairs(&self.divergence, row, last_row, column, last_column, <char *> memory.data)


cdef class _Factors:
    """The blocks of precision_factors, and the first failure of each that has one; `out` is None for a check."""

    cdef Factorization factorization
    cdef const Divergence_functions *code
    cdef object arrays
    cdef readonly list failed
    cdef Py_ssize_t workspace_size

    def __init__(self, cnp.ndarray covariances, cnp.ndarray out):
        cdef Factorization *f = &self.factorization
        cdef bytes level = mixture.simd_level().encode()
        cdef str dtype = covariances.dtype.name
        self.arrays, self.failed = (covariances, out), []
        self.code = divergence_functions(level, dtype == "float32")
        f.covariance, f.covariance_stride, f.D = covariances.data, covariances.strides[0], covariances.shape[1]
        f.out, f.out_stride, f.plain, f.asymmetry = NULL, 0, PLAIN[dtype], ASYMMETRY
        if out is not None:
            f.out, f.out_stride = <char *> out.data, out.strides[0]
        self.workspace_size = self.code.workspace_size(f.D, True, 0)

    def factorize(self, Py_ssize_t start, Py_ssize_t stop):
        cdef cnp.ndarray memory = workspace(self.workspace_size)
        cdef Py_ssize_t first
        with nogil:
            first = self.code.precision_factors(&self.factorization, start, stop, <char *> memory.data)
        if first >= 0:
            self.failed.append(first)


def precision_factors(covariances: np.ndarray, out: np.ndarray, n_threads: int = 1) -> int:
    """P_m; see `emalgam_kernels.reference.kl.precision_factors`."""
    contract.precision_factors(covariances, out)
    return _first_failure(_Factors(covariances, out), covariances, n_threads)


def check_covariances(covariances: np.ndarray, n_threads: int = 1) -> int:
    """The first that is none; see `emalgam_kernels.reference.kl.check_covariances`."""
    contract.check_covariances(covariances)
    return _first_failure(_Factors(covariances, None), covariances, n_threads)


cdef _first_failure(_Factors factors, cnp.ndarray covariances, n_threads):
    for_each_block(factors.factorize, len(covariances), matrices_per_block(covariances.shape[1]), n_threads)
    return min(factors.failed, default=-1)


def kl_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_m ‖ q_m); see `emalgam_kernels.reference.kl.kl_pairs`."""
    contract.kl_pairs(p, q, out)
    for_each_block(_Blocks(p, q, out).pairs, len(out), pairs_per_block(p), n_threads)


def kl_all_pairs(p: Gaussians, q: Gaussians, out: np.ndarray, n_threads: int = 1) -> None:
    """KL(p_i ‖ q_j); see `emalgam_kernels.reference.kl.kl_all_pairs`."""
    contract.kl_all_pairs(p, q, out)
    for_each_tile(_Blocks(p, q, out, shift_of(p, q)).all_pairs, len(p), len(q), n_threads)
