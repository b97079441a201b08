/* Whole fits of many problems, for every SIMD level; the arithmetic is float64. */
#pragma once
#include <float.h>
#include <math.h>
#include "sample_tiles.h"
#include "tiles.h"

/* Bytes of tiles that are kept for a whole fit: about what a processor's share of the caches holds. A problem with more
 * samples makes each tile anew in every pass. Few columns, so that what a product reads stays in the first-level cache.
 */
#ifndef KEPT_BYTES
#define KEPT_BYTES (2 * 1024 * 1024)
#endif
#ifndef KEPT_COLUMNS
#define KEPT_COLUMNS 512
#endif

/* In the order and with the numbers of emalgam_kernels/batch.py. */
enum covariance { FULL_COVARIANCE, TIED_COVARIANCE, DIAG_COVARIANCE, SPHERICAL_COVARIANCE };
enum criterion { BIC, AIC, ICL };
enum status { FINE, NOT_CONVERGED, COLLAPSED, TOO_FEW_ROWS, NOT_FINITE, BAD_WEIGHT, NO_LIKELIHOOD };

/* Lifts that are tried at most. */
#define MOST_LIFTS 8

/* Logits relative to one component, of each alone, or about each component's own mean: see batch_tile.h. */
enum form { RELATIVE, PACKED, DIRECT };

/* exp of it, and sums of that, are far from infinity. */
#define MOST_EXPONENT 650
_Static_assert(KEPT_COLUMNS <= 1024 && MOST_COLUMNS <= 1024, "a lane of relative_softmax multiplies numbers below 2");

#define LOG_2_PI 1.8378770664093454836

/* An array with any stride along its first axis and none along the others. */
typedef struct {
    char *data;
    Py_ssize_t stride; /* bytes */
} Column;
#define ITEM(type, column, i) (*(type *)((column).data + (i) * (column).stride))

/* What the fits, or the predictions, of a call share. */
typedef struct {
    Problem samples;                           /* D; x, order and weight of all problems */
    Column offsets;                            /* (B + 1,) int64 */
    int covariance;
    Column n_components;                       /* (B,) int64 */
    Column weights, means, covariances;        /* (B, K), (B, K, D), … float64 */
    /* fits only */
    Column numbers;                            /* (B,) uint64 */
    Column fewest, most;                       /* (B,) int64 */
    Column log_likelihood, entropy;            /* (B,) float64 */
    Column n_iter, converged, status;          /* (B,) int64, bool, int64 */
    int criterion;
    Py_ssize_t n_init, max_iter, n_lifts;
    double tol, added, lifts[MOST_LIFTS], relative_floor, round_shift, no_mass;
    double rounding, equal, most_cancellation;
    uint64_t seed;
    uint32_t stream_of_problems, stream_of_seeds;
    /* predictions only */
    Column log_prob, labels;                   /* (N,) float64 and int64 */
} Batch;

typedef struct {
    const char *level;
    Py_ssize_t (*workspace_size)(const Batch *, Py_ssize_t start, Py_ssize_t stop, int predicting);
    void (*fit)(const Batch *, Py_ssize_t start, Py_ssize_t stop, char *workspace);
    void (*predict)(const Batch *, Py_ssize_t start, Py_ssize_t stop, char *workspace);
} Batch_functions;

#define BODY "batch_tile.h"
#include "levels.h"
#undef BODY

/* The functions of the level of that name; NULL if there is no such level. */
static inline const Batch_functions *batch_functions(const char *level) {
    const Batch_functions *all[] = {
#if defined(__x86_64__)
        &batch_functions_f64_v4, &batch_functions_f64_v3,
#endif
        &batch_functions_f64_baseline};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); ++i)
        if (!strcmp(all[i]->level, level)) return all[i];
    return NULL;
}
