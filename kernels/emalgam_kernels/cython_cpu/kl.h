/* The functions of kl_tile.h for every arithmetic type and SIMD level. */
#pragma once
#include <float.h>
#include <math.h>
#include "tiles.h"

/* A stack of Gaussians: each mean and matrix contiguous, `..._stride` bytes from one to the next (0: shared by all). */
typedef struct {
    const char *mean, *covariance, *factor; /* μ (D,); Σ and P (D, D), or (D,) if diagonal; P may be NULL */
    Py_ssize_t mean_stride, covariance_stride, factor_stride;
} Stack;

/* What all blocks of a call share. */
typedef struct {
    Stack p, q;
    Py_ssize_t D;
    int full;
    double farthest, plain;               /* see kl_blocks.py */
    char *out;                            /* float64: (M,), or (M₁, M₂) */
    Py_ssize_t row_stride, column_stride; /* bytes */
    const char *shift;                    /* all pairs: (D,) of the arithmetic type */
    double guard;                         /* all pairs: the multiple of B below which a pair is computed again */
} Divergence;

/* Covariances (D, D), one every `covariance_stride` bytes, and where their P go; `out` is NULL if only the check is
 * wanted. */
typedef struct {
    const char *covariance;
    char *out;
    Py_ssize_t D, covariance_stride, out_stride;
    double plain, asymmetry; /* see kl_blocks.py */
} Factorization;

typedef struct {
    const char *level;
    Py_ssize_t (*workspace_size)(Py_ssize_t D, int full, Py_ssize_t rows);
    void (*pairs)(const Divergence *, Py_ssize_t start, Py_ssize_t stop, char *workspace);
    void (*all_pairs)(const Divergence *, Py_ssize_t row, Py_ssize_t last_row, Py_ssize_t column,
                      Py_ssize_t last_column, char *workspace);
    Py_ssize_t (*precision_factors)(const Factorization *, Py_ssize_t start, Py_ssize_t stop, char *workspace);
} Divergence_functions;

#define BODY "kl_tile.h"
#include "levels.h"
#undef BODY

/* The functions of the level of that name, for float32 or float64; NULL if there is no such level. */
static inline const Divergence_functions *divergence_functions(const char *level, int is_float32) {
    const Divergence_functions *all[] = {
#if defined(__x86_64__)
        &divergence_functions_f64_v4, &divergence_functions_f32_v4,
        &divergence_functions_f64_v3, &divergence_functions_f32_v3,
#endif
        &divergence_functions_f64_baseline, &divergence_functions_f32_baseline};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i += 2)
        if (!strcmp(all[i]->level, level)) return all[i + !!is_float32];
    return NULL;
}
