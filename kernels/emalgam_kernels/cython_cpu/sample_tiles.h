/* The sampling functions of sample_tile.h for every arithmetic type and SIMD level. */
#pragma once
#include <Python.h>
#include <stdint.h>
#include <string.h>
#include "vectors.h"

/* The numbers of emalgam_kernels/philox.py. */
#define PHILOX_ROUNDS 10
#define PHILOX_FIRST_MULTIPLIER 0xD2511F53u
#define PHILOX_SECOND_MULTIPLIER 0xCD9E8D57u
#define PHILOX_FIRST_KEY_INCREMENT 0x9E3779B9u
#define PHILOX_SECOND_KEY_INCREMENT 0xBB67AE85u
#define STREAM_OF_LABELS 0
#define STREAM_OF_NORMALS 1

#define ROWS_OF_A_TILE 512
#define ROWS_OF_A_STEP 16 /* the lanes of every vector divide it */
/* Rows of a tile of ε a power of two apart would share cache sets. */
#define NOISE_STRIDE(REAL) (ROWS_OF_A_TILE + 64 / (Py_ssize_t)sizeof(REAL))

static const uint64_t lane_numbers[] __attribute__((aligned(64))) = {0, 1, 2, 3, 4, 5, 6, 7};
#define LOAD_WORDS(p) (*(const WORDS *)(p))

/* What to draw, and where to. */
typedef struct {
    uint64_t seed, first;
    Py_ssize_t D, K;
    int antithetic, diagonal;
    const double *mean;            /* (K, D) */
    const double *factor;          /* (factors, D, D) or (factors, D), C-contiguous each */
    Py_ssize_t factors;            /* K, or 1 if all components share one */
    Py_ssize_t factor_stride;      /* elements from one to the next */
    const double *probability;     /* (K,) the alias table */
    const int32_t *alias;
    const int64_t *ends;           /* (K,) rows of the strata, or NULL */
    const char *packed;            /* what pack_sampler wrote */
    char *out;                     /* (rows, D) of the arithmetic type */
    Py_ssize_t out_row_stride, out_column_stride;
    char *labels;                  /* (rows,) int64 */
    Py_ssize_t label_stride;
} Draws;

typedef struct {
    const char *level;
    Py_ssize_t (*workspace_size)(Py_ssize_t D);
    Py_ssize_t (*packed_size)(const Draws *);
    void (*pack)(const Draws *, char *packed);
    void (*words)(uint64_t seed, uint32_t stream, uint32_t block, uint64_t first, Py_ssize_t rows, char *out,
                  Py_ssize_t row_stride, Py_ssize_t column_stride);
    void (*uniforms)(uint64_t seed, uint32_t stream, uint64_t first, Py_ssize_t rows, char *out,
                     Py_ssize_t out_stride);
    void (*normals)(uint64_t seed, uint32_t stream, uint64_t first, Py_ssize_t rows, Py_ssize_t D, char *out,
                    Py_ssize_t row_stride, Py_ssize_t column_stride, char *workspace);
    void (*sample)(const Draws *, Py_ssize_t start, Py_ssize_t rows, char *workspace);
} Draw_functions;

#define BODY "sample_tile.h"
#include "levels.h"
#undef BODY

/* The functions of the level of that name, for float32 or float64; NULL if there is no such level. */
static inline const Draw_functions *draw_functions(const char *level, int is_float32) {
    const Draw_functions *all[] = {
#if defined(__x86_64__)
        &draw_functions_f64_v4, &draw_functions_f32_v4, &draw_functions_f64_v3, &draw_functions_f32_v3,
#endif
        &draw_functions_f64_baseline, &draw_functions_f32_baseline};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i += 2)
        if (!strcmp(all[i]->level, level)) return all[i + !!is_float32];
    return NULL;
}
