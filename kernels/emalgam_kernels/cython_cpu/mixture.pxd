"""Tile functions for other people's Cython: ``from emalgam_kernels.cython_cpu.mixture cimport logit_tile``.

A tile is feature-major: row d holds feature d of `columns` samples, rows are `stride` elements apart. `columns` is a
multiple of ``tile_step()`` (``tile_step_float32()`` for the float32 functions). All run without the GIL and validate
nothing.

``cythonize(..., include_path=[str(Path(emalgam_kernels.__file__).parents[1])])`` finds this file however the package is
installed; for an editable install it has to be said. No header and no compiler flag is needed.
"""

cpdef Py_ssize_t tile_step() noexcept nogil
cpdef Py_ssize_t tile_step_float32() noexcept nogil

# Rows [first, last) of φ(z): feature_map 0 full, 1 diag, 2 spherical, 3 (z, 1) alone.
cdef void feature_tile(int feature_map, const double *z, Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride,
                       Py_ssize_t first, Py_ssize_t last, double *phi) noexcept nogil
cdef void feature_tile_float32(int feature_map, const float *z, Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride,
                               Py_ssize_t first, Py_ssize_t last, float *phi) noexcept nogil

# η (K, F) in the order logit_tile reads it; `packed` holds K · F elements.
cdef void pack_natural(const double *natural, Py_ssize_t K, Py_ssize_t F, double *packed) noexcept nogil
cdef void pack_natural_float32(const double *natural, Py_ssize_t K, Py_ssize_t F, float *packed) noexcept nogil

# L (K, columns) = η Φᵀ.
cdef void logit_tile(const double *packed, Py_ssize_t K, Py_ssize_t F, const double *phi, Py_ssize_t columns,
                     Py_ssize_t stride, double *logits) noexcept nogil
cdef void logit_tile_float32(const float *packed, Py_ssize_t K, Py_ssize_t F, const float *phi, Py_ssize_t columns,
                             Py_ssize_t stride, float *logits) noexcept nogil

# L <- weight · softmax_k(L), log_prob <- log Σ_k exp(L_k).
cdef void softmax_tile(double *logits, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t stride, const double *weight,
                       double *log_prob) noexcept nogil
cdef void softmax_tile_float32(float *logits, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t stride,
                               const float *weight, float *log_prob) noexcept nogil

# S (K, F) float64 += R Φ.
cdef void statistic_tile(const double *r, Py_ssize_t K, const double *phi, Py_ssize_t F, Py_ssize_t columns,
                         Py_ssize_t stride, double *statistics) noexcept nogil
cdef void statistic_tile_float32(const float *r, Py_ssize_t K, const float *phi, Py_ssize_t F, Py_ssize_t columns,
                                 Py_ssize_t stride, double *statistics) noexcept nogil

# The log-densities of a stack of mixtures, for the other modules of this package: no part of what is offered.
cdef class StackedDensity:
    cdef void *stack
    cdef object arrays
    cdef bint float32
    cdef Py_ssize_t workspace_size

    # log p of mixture b at (rows, D) C-contiguous samples; `workspace` holds workspace_size bytes.
    cdef void log_prob(self, Py_ssize_t b, const char *x, Py_ssize_t rows, int x_is_float32, double *out,
                       char *workspace) noexcept nogil
