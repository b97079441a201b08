/* The tile loop for every arithmetic type and instruction set, and the choice between instruction sets at run time.
 *
 * Vector types are GNU C's (gcc 12, clang 15 or newer), so the same source gives SSE2, AVX2, AVX-512 and NEON code. On
 * x86-64 each level is compiled with its own register blocks, and `simd_level` picks one when the module is loaded.
 */
#pragma once
#include <Python.h>
#include <stdint.h>
#include <string.h>
#include "lanes.h"
#include "vectors.h"

/* LINEAR is what tied needs while it lasts: −½ zᵀΛz is common to all components. */
enum feature_map { FULL = 0, DIAG = 1, SPHERICAL = 2, LINEAR = 3 };

/* Tile sizes: Φ, logits and x of a tile share the second-level cache; a block of Φ stays near the first. */
#ifndef FEATURES_AT_ONCE
#define FEATURES_AT_ONCE 160
#endif
#ifndef TILE_BYTES
#define TILE_BYTES (640 * 1024)
#endif
#ifndef MOST_COLUMNS
#define MOST_COLUMNS 512
#endif

#define ROWS_OF_A_LOAD 32

/* One block of rows and everything that a kernel needs for it. Results without a place are NULL. */
typedef struct {
    const char *x;                     /* (rows, D) float32 or float64, any strides */
    Py_ssize_t rows, D, K, F, x_row_stride, x_column_stride;
    const char *order;                 /* (rows,) int64: the rows of x and weight to take, or NULL: all in turn */
    Py_ssize_t order_stride;
    int x_is_float32, map, direct, hard;
    const double *shift, *scale;       /* (D,) the frame */
    const double *whitening;           /* (D, D) or NULL, applied after shift and scale: z W */
    const double *coefficients;        /* packed: η (K, F); direct: P (K, D, D) or its diagonals (K, D) */
    Py_ssize_t coefficient_stride;     /* direct, full: from P_k to P_k+1; 0 if they share one */
    const double *mean, *log_constant; /* direct: (K, D), (K,) */
    const char *weight;                /* (rows,) float64 or NULL */
    Py_ssize_t weight_stride;
    char *log_prob;                    /* (rows,) float64 */
    Py_ssize_t log_prob_stride;
    char *responsibilities;            /* (rows, K) float32 or float64 */
    Py_ssize_t responsibility_row_stride, responsibility_column_stride;
    int responsibilities_are_float32;
    double *statistics, *total;        /* (K, F), (1,): added to */
} Problem;

/* One level's functions. `step`: columns of a tile are a multiple of it. */
#define TILES(REAL)                                                                                                 \
    struct {                                                                                                        \
        const char *level;                                                                                          \
        Py_ssize_t step;                                                                                            \
        Py_ssize_t (*workspace_size)(Py_ssize_t D, Py_ssize_t K, Py_ssize_t F, int map, int direct);                \
        void (*mixture_block)(const Problem *, char *workspace);                                                    \
        void (*feature_tile)(int map, const REAL *z, Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride,           \
                             Py_ssize_t first, Py_ssize_t last, REAL *phi);                                         \
        void (*pack_natural)(const double *natural, Py_ssize_t row_stride, Py_ssize_t column_stride, Py_ssize_t K,  \
                             Py_ssize_t F, REAL *packed);                                                           \
        void (*logit_tile)(const REAL *packed, Py_ssize_t K, Py_ssize_t F, Py_ssize_t first, Py_ssize_t features,   \
                           const REAL *phi, Py_ssize_t columns, Py_ssize_t stride, int accumulate, REAL *logits);   \
        void (*softmax_tile)(REAL *logits, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t stride,                     \
                             const REAL *weight, int hard, int store, REAL *factor, REAL *log_prob);                \
        void (*statistic_tile)(const REAL *r, Py_ssize_t K, const REAL *phi, Py_ssize_t features,                   \
                               Py_ssize_t columns, Py_ssize_t stride, double *out, Py_ssize_t F);                   \
    }
typedef TILES(double) Tiles_f64;
typedef TILES(float) Tiles_f32;

#define BODY "tile.h"
#include "levels.h"
#undef BODY

static inline const Tiles_f64 *tiles_f64(int level) {
#if defined(__x86_64__)
    if (level == 2) return &tiles_f64_v4;
    if (level == 1) return &tiles_f64_v3;
#endif
    return &tiles_f64_baseline;
}

static inline const Tiles_f32 *tiles_f32(int level) {
#if defined(__x86_64__)
    if (level == 2) return &tiles_f32_v4;
    if (level == 1) return &tiles_f32_v3;
#endif
    return &tiles_f32_baseline;
}
