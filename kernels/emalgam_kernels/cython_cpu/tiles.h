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
#include "polynomials.h"

enum feature_map { FULL = 0, DIAG = 1, SPHERICAL = 2 };

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

#define JOIN3_(a, b, c) a##_##b##_##c
#define JOIN3(a, b, c) JOIN3_(a, b, c)
#define JOIN2_(a, b) a##_##b
#define JOIN2(a, b) JOIN2_(a, b)
#define N_(name) JOIN3(name, TYPE, LEVEL)
#define P_(name) JOIN2(name, TYPE)

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

#if defined(__x86_64__)
#define LEVEL v4
#define LEVEL_NAME "x86-64-v4 (AVX-512)"
#define TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define VECTOR_BYTES 64
#define LANES_OF_FLOAT64 8
#define LANES_OF_FLOAT32 16
#define LOGIT_ROWS 8
#define STATISTIC_ROWS 3
#define STATISTIC_COLUMNS 8
#include "tile_types.h"

#define LEVEL v3
#define LEVEL_NAME "x86-64-v3 (AVX2)"
#define TARGET __attribute__((target("arch=x86-64-v3")))
#define VECTOR_BYTES 32
#define LANES_OF_FLOAT64 4
#define LANES_OF_FLOAT32 8
#define LOGIT_ROWS 4
#define STATISTIC_ROWS 3
#define STATISTIC_COLUMNS 4
#include "tile_types.h"
#endif

#define LEVEL baseline
#if defined(__x86_64__)
#define LEVEL_NAME "x86-64 (SSE2)"
#else
#define LEVEL_NAME "128-bit vectors"
#endif
#define TARGET
#define VECTOR_BYTES 16
#define LANES_OF_FLOAT64 2
#define LANES_OF_FLOAT32 4
#define LOGIT_ROWS 4
#define STATISTIC_ROWS 3
#define STATISTIC_COLUMNS 4
#include "tile_types.h"

/* The functions for this processor; `wanted` (or NULL) asks for a lower level: "v4", "v3" or "baseline". */
static inline int simd_level(const char *wanted) {
    int level = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) level = 1;
    if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        level = 2;
#endif
    const int most = !wanted || !strcmp(wanted, "v4") ? 2 : !strcmp(wanted, "v3") ? 1 : 0;
    return level < most ? level : most;
}

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
