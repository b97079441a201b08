/* The steps of the tile loop, each written once.
 *
 * levels.h includes this file once for every pair of arithmetic type and instruction set, with
 *   REAL, INTEGER    the arithmetic type and the integer of its width
 *   TYPE             f64 or f32, VECTOR_BYTES the width of a register, TARGET the compiler's target attribute
 *   LOGIT_ROWS, STATISTIC_ROWS, STATISTIC_COLUMNS   the register blocks of the two products
 *   N_(name)         the name with the pair's suffix
 *
 * Letters: N samples, D features, K components, F packed statistics, T columns of a tile. A tile is feature-major:
 * row d holds feature d of T samples, so every loop below runs with unit stride over samples. Rows are `stride`
 * elements apart, a multiple of the vector length and not a power of two (rows would share cache sets).
 */

#include "vectors_begin.h"
#define INTERLEAVE(a, b, group)                                                                                     \
    (__builtin_shufflevector(a, b, JOIN3(EVEN, VECTOR_LANES, group)) +                                               \
     __builtin_shufflevector(a, b, JOIN3(ODD, VECTOR_LANES, group)))

/* `lanes` vectors as the rows of a matrix ← its columns: swap off-diagonal blocks of 1, 2, 4, 8 lanes in turn. With fewer
 * vectors than lanes, each group of `lanes` lanes is a matrix of its own. */
INLINE void N_(transpose)(VEC *v, const int lanes) {
#define SWAP(GROUP)                                                                                                 \
    _Pragma("GCC unroll 16") for (int i = 0; i < lanes; ++i) if (GROUP < lanes && !(i & GROUP)) {                    \
        const VEC a = v[i], b = v[i + GROUP];                                                                       \
        v[i] = __builtin_shufflevector(a, b, JOIN3(EVEN, VECTOR_LANES, GROUP));                                     \
        v[i + GROUP] = __builtin_shufflevector(a, b, JOIN3(ODD, VECTOR_LANES, GROUP));                              \
    }
    SWAP(1)
#if VECTOR_LANES >= 4
    SWAP(2)
#endif
#if VECTOR_LANES >= 8
    SWAP(4)
#endif
#if VECTOR_LANES >= 16
    SWAP(8)
#endif
#undef SWAP
}

/* ---- features ---------------------------------------------------------------------------------------------- */

/* How many rows of φ are quadratic in z; D linear ones and a constant follow. */
INLINE Py_ssize_t N_(quadratic_count)(int map, Py_ssize_t D) {
    return map == FULL ? D * (D + 1) / 2 : map == DIAG ? D : map == SPHERICAL ? 1 : 0;
}

/* Rows [first, last) of φ(z) for one tile: full  z_i z_j (i ≥ j), z_i, 1; diag  z_i², z_i, 1; spherical  ‖z‖², z_i, 1;
 * linear  z_i, 1. */
KERNEL void N_(feature_tile)(int map, const REAL *restrict z, Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride,
                             Py_ssize_t first, Py_ssize_t last, REAL *restrict phi) {
    const Py_ssize_t quadratic = N_(quadratic_count)(map, D);
    Py_ssize_t i = 0, j = 0;
    if (map == FULL) { /* the pair (i, j) of row `first` */
        for (Py_ssize_t f = first < quadratic ? first : 0; f > i; f -= ++i) {}
        Py_ssize_t start = i * (i + 1) / 2;
        j = (first < quadratic ? first : 0) - start;
    }
    for (Py_ssize_t f = first; f < last; ++f, phi += stride) {
        if (f < quadratic && map == FULL) {
            const REAL *a = z + i * stride, *b = z + j * stride;
            for (Py_ssize_t n = 0; n < columns; n += LANES) STORE(phi + n, LOAD(a + n) * LOAD(b + n));
            if (++j > i) { ++i; j = 0; }
        } else if (f < quadratic && map == DIAG) {
            const REAL *a = z + f * stride;
            for (Py_ssize_t n = 0; n < columns; n += LANES) STORE(phi + n, LOAD(a + n) * LOAD(a + n));
        } else if (f < quadratic) {
            for (Py_ssize_t n = 0; n < columns; n += LANES) {
                VEC sum = LOAD(z + n) * LOAD(z + n);
                for (Py_ssize_t d = 1; d < D; ++d) sum += LOAD(z + d * stride + n) * LOAD(z + d * stride + n);
                STORE(phi + n, sum);
            }
        } else if (f < quadratic + D) {
            memcpy(phi, z + (f - quadratic) * stride, columns * sizeof(REAL));
        } else {
            for (Py_ssize_t n = 0; n < columns; n += LANES) STORE(phi + n, (VEC){0} + (REAL)1);
        }
    }
}

/* ---- L = η Φᵀ ---------------------------------------------------------------------------------------------- */

/* One register block: `rows` rows of L by `vectors` vectors of columns. η is packed with `rows` values per feature. */
INLINE void N_(logit_block)(const int rows, const int vectors, const REAL *restrict eta, const REAL *restrict phi,
                            Py_ssize_t features, Py_ssize_t stride, int accumulate, REAL *restrict logits,
                            Py_ssize_t logit_stride) {
    VEC sum[LOGIT_ROWS * 4];
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
        for (int v = 0; v < vectors; ++v)
            sum[i * vectors + v] = accumulate ? LOAD(logits + i * logit_stride + v * LANES) : (VEC){0};
    for (Py_ssize_t f = 0; f < features; ++f, phi += stride, eta += rows) {
        VEC column[8];
#pragma GCC unroll 32
        for (int v = 0; v < vectors; ++v) column[v] = LOAD(phi + v * LANES);
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
            for (int v = 0; v < vectors; ++v) sum[i * vectors + v] += eta[i] * column[v];
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
        for (int v = 0; v < vectors; ++v) STORE(logits + i * logit_stride + v * LANES, sum[i * vectors + v]);
}

/* How many rows of η the packed block at row k holds: LOGIT_ROWS while they last, then 4, 2, 1. */
INLINE int N_(block_rows)(Py_ssize_t left) {
    return left >= LOGIT_ROWS ? LOGIT_ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* η (K, F) of any strides into row blocks, feature by feature, so that logit_block reads it in order. */
KERNEL void N_(pack_natural)(const double *natural, Py_ssize_t row_stride, Py_ssize_t column_stride, Py_ssize_t K,
                             Py_ssize_t F, REAL *restrict packed) {
    for (Py_ssize_t k = 0; k < K;) {
        const int rows = N_(block_rows)(K - k);
        for (int i = 0; i < rows; ++i)
            for (Py_ssize_t f = 0; f < F; ++f)
                packed[f * rows + i] = (REAL)natural[(k + i) * row_stride + f * column_stride];
        k += rows, packed += rows * F;
    }
}

/* L (K, T) ← η[:, first : first + features] Φᵀ (+ L): `packed` is the whole packed η with F features a row. */
KERNEL void N_(logit_tile)(const REAL *restrict packed, Py_ssize_t K, Py_ssize_t F, Py_ssize_t first,
                           Py_ssize_t features, const REAL *restrict phi, Py_ssize_t columns, Py_ssize_t stride,
                           int accumulate, REAL *restrict logits) {
    for (Py_ssize_t n = 0; n < columns; n += 4 * LANES)
        for (Py_ssize_t k = 0; k < K;) {
            const int rows = N_(block_rows)(K - k);
            const REAL *eta = packed + k * F + first * rows, *p = phi + n;
            REAL *l = logits + k * stride + n;
#define BLOCK(ROWS, VECTORS)                                                                                        \
    for (int v = 0; v < 4; v += VECTORS)                                                                            \
    N_(logit_block)(ROWS, VECTORS, eta, p + v * LANES, features, stride, accumulate, l + v * LANES, stride)
            if (rows == LOGIT_ROWS) BLOCK(LOGIT_ROWS, 2);
#if LOGIT_ROWS > 4
            else if (rows == 4) BLOCK(4, 4);
#endif
            else if (rows == 2) BLOCK(2, 4);
            else BLOCK(1, 4);
#undef BLOCK
            k += rows;
        }
}

/* ---- log-sum-exp ------------------------------------------------------------------------------------------- */

/* L ← ω softmax_k(L), log p ← log Σ_k exp(L_k). `store` = 0 leaves L as it is; `hard` puts ω at the (first) maximum of
 * L instead, and log p is that maximum. With a place for `factor`, L ← exp(L − max) and factor ← ω / Σ_k: whoever
 * multiplies by L next may scale the smaller side. */
KERNEL void N_(softmax_tile)(REAL *restrict logits, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t stride,
                             const REAL *restrict weight, int hard, int store, REAL *restrict factor,
                             REAL *restrict log_prob) {
    if (K == 1) { /* nothing to choose: r = 1 */
        memcpy(log_prob, logits, columns * sizeof(REAL));
        if (store) memcpy(logits, weight, columns * sizeof(REAL));
        for (Py_ssize_t n = 0; factor && n < columns; ++n) factor[n] = 1;
        return;
    }
    for (Py_ssize_t n = 0; n < columns; n += 4 * LANES) {
        VEC top[4], sum[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) top[v] = LOAD(logits + n + v * LANES), sum[v] = (VEC){0};
        for (Py_ssize_t k = 1; k < K; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                const VEC l = LOAD(logits + k * stride + n + v * LANES);
                top[v] = SELECT((IVEC)(l > top[v]), l, top[v]);
            }
        if (hard) {
            for (Py_ssize_t k = 0; k < K; ++k)
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) {
                    REAL *l = logits + k * stride + n + v * LANES;
                    const IVEC chosen = (IVEC)(LOAD(l) == top[v]) & (IVEC)(sum[v] == (REAL)0);
                    sum[v] += (VEC)(chosen & (IVEC)((VEC){0} + (REAL)1));
                    STORE(l, (VEC)(chosen & (IVEC)LOAD(weight + n + v * LANES)));
                }
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) STORE(log_prob + n + v * LANES, top[v]);
            continue;
        }
        for (Py_ssize_t k = 0; k < K; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                REAL *l = logits + k * stride + n + v * LANES;
                const VEC e = N_(exp)(LOAD(l) - top[v]);
                sum[v] += e;
                if (store) STORE(l, e);
            }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            STORE(log_prob + n + v * LANES, top[v] + N_(log)(sum[v]));
            sum[v] = LOAD(weight + n + v * LANES) / sum[v];
            if (factor) STORE(factor + n + v * LANES, sum[v]);
        }
        if (!store || factor) continue;
        for (Py_ssize_t k = 0; k < K; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                REAL *l = logits + k * stride + n + v * LANES;
                STORE(l, LOAD(l) * sum[v]);
            }
    }
}

/* ---- S += R Φ ---------------------------------------------------------------------------------------------- */

/* out[i] += the sum of the lanes of a[i], for `count` of eight vectors: halve the vectors, interleaving their lanes,
 * until one lane is left of each. */
INLINE void N_(add_lane_sums)(const int count, VEC *a, double *restrict out) {
#if VECTOR_LANES >= 2
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) a[i] = INTERLEAVE(a[2 * i], a[2 * i + 1], 1);
#endif
#if VECTOR_LANES >= 4
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) a[i] = INTERLEAVE(a[2 * i], a[2 * i + 1], 2);
#endif
#if VECTOR_LANES >= 8
    a[0] = INTERLEAVE(a[0], a[1], 4);
#endif
#if VECTOR_LANES == 16
    for (int i = 0; i < count; ++i) out[i] += (double)a[0][i] + (double)a[0][i + 8];
#else
    for (int i = 0; i < count; ++i) out[i] += (double)a[i / (VECTOR_LANES)][i % (VECTOR_LANES)];
#endif
}

/* One register block: rows of R by columns of S (rows of Φ), each sum kept in lanes until the tile ends. */
INLINE void N_(statistic_block)(const int rows, const int features, const REAL *restrict r, const REAL *restrict phi,
                                Py_ssize_t columns, Py_ssize_t stride, double *restrict out, Py_ssize_t F) {
    VEC sum[STATISTIC_ROWS][8];
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
        for (int j = 0; j < 8; ++j) sum[i][j] = (VEC){0};
    for (Py_ssize_t n = 0; n < columns; n += LANES) {
        VEC left[STATISTIC_ROWS];
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i) left[i] = LOAD(r + i * stride + n);
#pragma GCC unroll 32
        for (int j = 0; j < features; ++j) {
            const VEC right = LOAD(phi + j * stride + n);
#pragma GCC unroll 32
            for (int i = 0; i < rows; ++i) sum[i][j] += left[i] * right;
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) N_(add_lane_sums)(features, sum[i], out + i * F);
}

/* S (K, features) float64 += R Φ over one tile; rows of S are F apart. */
KERNEL void N_(statistic_tile)(const REAL *restrict r, Py_ssize_t K, const REAL *restrict phi, Py_ssize_t features,
                               Py_ssize_t columns, Py_ssize_t stride, double *restrict out, Py_ssize_t F) {
    for (Py_ssize_t f = 0; f < features;) {
        const Py_ssize_t width = features - f >= STATISTIC_COLUMNS ? STATISTIC_COLUMNS
                               : features - f >= 4 ? 4 : features - f >= 2 ? 2 : 1;
        for (Py_ssize_t k = 0; k < K;) {
            const Py_ssize_t height = K - k >= STATISTIC_ROWS ? STATISTIC_ROWS : K - k;
            const REAL *a = r + k * stride, *b = phi + f * stride;
            double *s = out + k * F + f;
#define BLOCK(ROWS)                                                                                                 \
    (width == STATISTIC_COLUMNS ? N_(statistic_block)(ROWS, STATISTIC_COLUMNS, a, b, columns, stride, s, F)          \
     : width == 4               ? N_(statistic_block)(ROWS, 4, a, b, columns, stride, s, F)                         \
     : width == 2               ? N_(statistic_block)(ROWS, 2, a, b, columns, stride, s, F)                         \
                                : N_(statistic_block)(ROWS, 1, a, b, columns, stride, s, F))
            if (height == STATISTIC_ROWS) BLOCK(STATISTIC_ROWS);
#if STATISTIC_ROWS > 3
            else if (height == 3) BLOCK(3);
#endif
            else if (height == 2) BLOCK(2);
            else BLOCK(1);
#undef BLOCK
            k += height;
        }
        f += width;
    }
}

/* ---- one block of rows: the tile loop ------------------------------------------------------------------------ */

/* Which row of x and weight the problem's row n is. */
INLINE Py_ssize_t N_(row_of)(const Problem *p, Py_ssize_t n) {
    return p->order ? (Py_ssize_t)*(const int64_t *)(p->order + n * p->order_stride) : n;
}

#define DOUBLES (VECTOR_BYTES / 8) /* of a vector, whatever the arithmetic type */
typedef double N_(doubles) __attribute__((vector_size(VECTOR_BYTES)));
typedef double N_(doubles_anywhere) __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef float N_(floats) __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef float N_(floats_anywhere) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4), may_alias));

/* (x − shift) · scale of DOUBLES features side by side. */
INLINE N_(doubles) N_(framed)(const int x_is_float32, const char *x, const double *shift, const double *scale) {
    const N_(doubles) v = x_is_float32 ? __builtin_convertvector(*(const N_(floats_anywhere) *)x, N_(doubles))
                                       : (N_(doubles))*(const N_(doubles_anywhere) *)x;
    return (v - *(const N_(doubles_anywhere) *)shift) * *(const N_(doubles_anywhere) *)scale;
}

/* z ← (x − shift) · scale for whole vectors of rows whose D ≥ DOUBLES features lie side by side: read row by row, and
 * transposed, DOUBLES features of LANES rows at once. Returns how many of `rows` these are. */
INLINE Py_ssize_t N_(load_rows)(const int x_is_float32, const Problem *p, Py_ssize_t start, Py_ssize_t rows,
                                Py_ssize_t stride, REAL *restrict z) {
    const Py_ssize_t size = x_is_float32 ? sizeof(float) : sizeof(double);
    Py_ssize_t n = 0;
    for (; n + LANES <= rows; n += LANES) {
        const char *row[VECTOR_LANES];
        for (Py_ssize_t l = 0; l < LANES; ++l) row[l] = p->x + N_(row_of)(p, start + n + l) * p->x_row_stride;
        for (Py_ssize_t d = 0; d < p->D; d += DOUBLES) {
            const Py_ssize_t first = d + DOUBLES <= p->D ? d : p->D - DOUBLES; /* the last ones may overlap */
            const double *shift = p->shift + first, *scale = p->scale + first;
            VEC v[DOUBLES];
#pragma GCC unroll 8
            for (int i = 0; i < DOUBLES; ++i) {
                const N_(doubles) one = N_(framed)(x_is_float32, row[i] + first * size, shift, scale);
#if IS_FLOAT64
                v[i] = one;
#else
                const N_(doubles) two = N_(framed)(x_is_float32, row[i + DOUBLES] + first * size, shift, scale);
                v[i] = __builtin_shufflevector(__builtin_convertvector(one, N_(floats)),
                                               __builtin_convertvector(two, N_(floats)), JOIN2(BOTH, VECTOR_LANES));
#endif
            }
            N_(transpose)(v, DOUBLES);
#pragma GCC unroll 8
            for (int i = 0; i < DOUBLES; ++i) STORE(z + (first + i) * stride + n, v[i]);
        }
    }
    return n;
}

/* z ← (x − shift) · scale for one feature of `rows` rows from `start`. */
INLINE void N_(load_feature)(const int x_is_float32, const int ordered, const Problem *p, Py_ssize_t start,
                             Py_ssize_t rows, Py_ssize_t d, REAL *restrict z) {
    const char *x = p->x + d * p->x_column_stride;
    const double shift = p->shift[d], scale = p->scale[d];
    for (Py_ssize_t n = 0; n < rows; ++n) {
        const char *at = x + (ordered ? N_(row_of)(p, start + n) : start + n) * p->x_row_stride;
        z[n] = (REAL)(((x_is_float32 ? (double)*(const float *)at : *(const double *)at) - shift) * scale);
    }
}

/* z ← (x − shift) · scale for `rows` rows of x, zero in padding columns and where the weight is zero: such a row may
 * hold anything, and 0 · φ must be 0. */
KERNEL void N_(load_tile)(const Problem *p, Py_ssize_t start, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride,
                          REAL *restrict weight, REAL *restrict z) {
    for (Py_ssize_t n = 0; n < rows; ++n)
        weight[n] = p->weight
            ? (REAL)*(const double *)(p->weight + N_(row_of)(p, start + n) * p->weight_stride) : (REAL)1;
    for (Py_ssize_t n = rows; n < columns; ++n) weight[n] = 0;
    Py_ssize_t first = 0;
    if (p->x_column_stride == (Py_ssize_t)(p->x_is_float32 ? sizeof(float) : sizeof(double)) && p->D >= DOUBLES)
        first = p->x_is_float32 ? N_(load_rows)(1, p, start, rows, stride, z)
                                : N_(load_rows)(0, p, start, rows, stride, z);
    /* A few rows at a time, so that the cache lines of row-major x are still there for the next feature. */
    for (; first < rows; first += ROWS_OF_A_LOAD) {
        const Py_ssize_t count = rows - first < ROWS_OF_A_LOAD ? rows - first : ROWS_OF_A_LOAD;
        for (Py_ssize_t d = 0; d < p->D; ++d) {
            REAL *row = z + d * stride + first;
            if (p->x_is_float32 && p->order) N_(load_feature)(1, 1, p, start + first, count, d, row);
            else if (p->x_is_float32) N_(load_feature)(1, 0, p, start + first, count, d, row);
            else if (p->order) N_(load_feature)(0, 1, p, start + first, count, d, row);
            else N_(load_feature)(0, 0, p, start + first, count, d, row);
        }
    }
    for (Py_ssize_t d = 0; d < p->D; ++d)
        for (Py_ssize_t n = rows; n < columns; ++n) z[d * stride + n] = 0;
    if (!p->weight) return;
    for (Py_ssize_t n = 0; n < rows; ++n)
        if (weight[n] == 0)
            for (Py_ssize_t d = 0; d < p->D; ++d) z[d * stride + n] = 0;
}

/* Each of `rows` rows times `factor`. */
KERNEL void N_(scale_rows)(REAL *restrict tile, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride,
                           const REAL *restrict factor) {
    for (Py_ssize_t i = 0; i < rows; ++i, tile += stride)
        for (Py_ssize_t n = 0; n < columns; n += LANES) STORE(tile + n, LOAD(tile + n) * LOAD(factor + n));
}

/* L = η Φᵀ with at most `features` rows of Φ at once. `kept`: phi holds all of Φ; else it is made of z, in pieces. */
KERNEL void N_(packed_logit_tile)(const Problem *p, const REAL *restrict packed, const REAL *restrict z,
                                  Py_ssize_t columns, Py_ssize_t stride, Py_ssize_t features, int kept,
                                  REAL *restrict phi, REAL *restrict logits) {
    for (Py_ssize_t f = 0; f < p->F; f += features) {
        const Py_ssize_t width = p->F - f < features ? p->F - f : features;
        REAL *piece = kept ? phi + f * stride : phi;
        if (!kept) N_(feature_tile)(p->map, z, p->D, columns, stride, f, f + width, piece);
        N_(logit_tile)(packed, p->K, p->F, f, width, piece, columns, stride, f > 0, logits);
    }
}

/* S += R Φ, or R (f Φ) with a `factor` f, after packed_logit_tile of the same z and phi. */
KERNEL void N_(packed_statistic_tile)(const Problem *p, const REAL *restrict z, const REAL *restrict r,
                                      const REAL *restrict factor, Py_ssize_t columns, Py_ssize_t stride,
                                      Py_ssize_t features, int kept, REAL *restrict phi) {
    for (Py_ssize_t f = 0; f < p->F; f += features) {
        const Py_ssize_t width = p->F - f < features ? p->F - f : features;
        REAL *piece = kept ? phi + f * stride : phi;
        if (!kept && features < p->F) N_(feature_tile)(p->map, z, p->D, columns, stride, f, f + width, piece);
        if (factor) N_(scale_rows)(piece, width, columns, stride, factor);
        N_(statistic_tile)(r, p->K, piece, width, columns, stride, p->statistics + f, p->F);
    }
}

/* d ← z − μ_k, the D rows that both direct steps start from. */
KERNEL void N_(centre_tile)(const REAL *restrict z, const double *restrict mean, Py_ssize_t D, Py_ssize_t columns,
                            Py_ssize_t stride, REAL *restrict centred) {
    for (Py_ssize_t d = 0; d < D; ++d)
        for (Py_ssize_t n = 0; n < columns; n += LANES)
            STORE(centred + d * stride + n, LOAD(z + d * stride + n) - (REAL)mean[d]);
}

/* L_k = c_k − ½ ‖P_kᵀ (z − μ_k)‖²: the logits without features, for parameters that would cancel. */
KERNEL void N_(direct_logit_tile)(const Problem *p, const REAL *restrict packed, const REAL *restrict z,
                                  Py_ssize_t columns, Py_ssize_t stride, REAL *restrict centred,
                                  REAL *restrict whitened, REAL *restrict logits) {
    const Py_ssize_t D = p->D;
    for (Py_ssize_t k = 0; k < p->K; ++k) {
        N_(centre_tile)(z, p->mean + k * D, D, columns, stride, centred);
        const REAL *y = centred;
        if (p->map == FULL) {
            N_(logit_tile)(packed + k * D * D, D, D, 0, D, centred, columns, stride, 0, whitened);
            y = whitened;
        }
        for (Py_ssize_t n = 0; n < columns; n += LANES) {
            VEC sum = {0};
            for (Py_ssize_t d = 0; d < D; ++d) {
                VEC v = LOAD(y + d * stride + n);
                if (p->map != FULL) v *= packed[k * D + d];
                sum += v * v;
            }
            STORE(logits + k * stride + n, (REAL)p->log_constant[k] - (REAL)0.5 * sum);
        }
    }
}

/* Σ r d², Σ r d, Σ r of d = z − mean, added to out (2 D + 1,): each feature is read once, in four chains of additions. */
KERNEL void N_(diagonal_statistics)(const REAL *restrict z, const REAL *restrict r, const double *restrict mean,
                                    Py_ssize_t D, Py_ssize_t columns, Py_ssize_t stride, double *restrict out) {
    for (Py_ssize_t d = 0; d <= D; ++d, z += stride) {
        VEC sum[8] = {{0}};
        double found[8] = {0};
        for (Py_ssize_t n = 0; n < columns; n += 4 * LANES)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                const VEC weight = LOAD(r + n + v * LANES);
                const VEC difference = d < D ? LOAD(z + n + v * LANES) - (REAL)mean[d] : (VEC){0};
                sum[v] += (weight * difference) * difference;
                sum[4 + v] += d < D ? weight * difference : weight;
            }
        N_(add_lane_sums)(8, sum, found);
        if (d < D) out[d] += (found[0] + found[1]) + (found[2] + found[3]);
        out[D + d] += (found[4] + found[5]) + (found[6] + found[7]);
    }
}

/* S_k += Σ_n r_nk φ(z_n − μ_k): statistics about the component's own mean. */
KERNEL void N_(direct_statistic_tile)(const Problem *p, const REAL *restrict z, const REAL *restrict r,
                                      Py_ssize_t columns, Py_ssize_t stride, REAL *restrict centred,
                                      REAL *restrict weighted, double *restrict square) {
    const Py_ssize_t D = p->D;
    REAL *one = centred + D * stride; /* the centred tile with a row of ones below: y = (z − μ_k, 1) */
    for (Py_ssize_t n = 0; n < columns; ++n) one[n] = 1;
    for (Py_ssize_t k = 0; k < p->K; ++k) {
        double *out = p->statistics + k * p->F;
        const REAL *weight = r + k * stride;
        if (p->map != FULL) {
            N_(diagonal_statistics)(z, weight, p->mean + k * D, D, columns, stride, out);
            continue;
        }
        N_(centre_tile)(z, p->mean + k * D, D, columns, stride, centred);
        for (Py_ssize_t d = 0; d < D; ++d)
            for (Py_ssize_t n = 0; n < columns; n += LANES)
                STORE(weighted + d * stride + n, LOAD(centred + d * stride + n) * LOAD(weight + n));
        memset(square, 0, D * D * sizeof(double));
        N_(statistic_tile)(weighted, D, centred, D, columns, stride, square, D);
        for (Py_ssize_t i = 0; i < D; ++i)
            for (Py_ssize_t j = 0; j <= i; ++j) *out++ += square[i * D + j];
        N_(statistic_tile)(weight, 1, centred, D + 1, columns, stride, out, D + 1);
    }
}

/* Responsibilities of one tile, component-major, to the caller's rows. */
KERNEL void N_(write_responsibilities)(const Problem *p, Py_ssize_t start, Py_ssize_t rows, Py_ssize_t stride,
                                       const REAL *restrict r) {
    for (Py_ssize_t n = 0; n < rows; ++n) {
        char *out = p->responsibilities + (start + n) * p->responsibility_row_stride;
        for (Py_ssize_t k = 0; k < p->K; ++k, out += p->responsibility_column_stride)
            if (p->responsibilities_are_float32) *(float *)out = (float)r[k * stride + n];
            else *(double *)out = (double)r[k * stride + n];
    }
}

/* The sizes that follow from (D, K, F) alone: rows of Φ kept at once, columns and row stride of a tile. */
INLINE void N_(tile_shape)(Py_ssize_t D, Py_ssize_t K, Py_ssize_t F, int direct, Py_ssize_t *features,
                           Py_ssize_t *columns, Py_ssize_t *stride) {
    const Py_ssize_t pieces = (F + FEATURES_AT_ONCE - 1) / FEATURES_AT_ONCE;
    *features = direct ? 2 * (D + 1) : (F + pieces - 1) / pieces;
    const Py_ssize_t height = *features + K + 2 * D + 3, step = 8 * LANES;
    Py_ssize_t n = TILE_BYTES / (height * (Py_ssize_t)sizeof(REAL)) / step * step;
    *columns = n < step ? step : n > MOST_COLUMNS ? MOST_COLUMNS : n;
    *stride = *columns + LANES;
}

KERNEL Py_ssize_t N_(workspace_size)(Py_ssize_t D, Py_ssize_t K, Py_ssize_t F, int map, int direct) {
    Py_ssize_t features, columns, stride;
    N_(tile_shape)(D, K, F, direct, &features, &columns, &stride);
    const Py_ssize_t coefficients = direct ? (map == FULL ? K * D * D : K * D) : K * F;
    const Py_ssize_t whitening = D * D, square = direct ? D * D * sizeof(double) / sizeof(REAL) : 0;
    /* up to 63 bytes go to the alignment of the start and of each of the arrays that mixture_block takes */
    return ((features + K + 2 * D + 3) * stride + coefficients + whitening + square) * sizeof(REAL) + 12 * 64;
}

/* Σ a_n b_n in float64: eight chains of additions, since each would wait for the one before it. */
KERNEL double N_(inner_product)(const REAL *restrict a, const REAL *restrict b, Py_ssize_t count) {
    double sum[8] = {0};
    Py_ssize_t n = 0;
    for (; n + 8 <= count; n += 8)
        for (int i = 0; i < 8; ++i) sum[i] += (double)a[n + i] * (double)b[n + i];
    for (; n < count; ++n) sum[n % 8] += (double)a[n] * (double)b[n];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

/* The coefficients as logit_tile reads them: η; for direct P_kᵀ, or the diagonal of P_k; and the whitening Wᵀ. */
KERNEL void N_(pack_coefficients)(const Problem *p, REAL *restrict packed, REAL *restrict whitening) {
    const Py_ssize_t D = p->D, K = p->K, F = p->F;
    if (!p->direct) N_(pack_natural)(p->coefficients, F, 1, K, F, packed);
    else if (p->map == FULL)
        for (Py_ssize_t k = 0; k < K; ++k)
            N_(pack_natural)(p->coefficients + k * p->coefficient_stride, 1, D, D, D, packed + k * D * D);
    else
        for (Py_ssize_t i = 0; i < K * D; ++i) packed[i] = (REAL)p->coefficients[i];
    if (p->whitening) N_(pack_natural)(p->whitening, 1, D, D, D, whitening);
}

/* Rows [0, rows) of the problem's x, tile by tile: load, logits, log-sum-exp, and whichever results have a place. */
KERNEL void N_(mixture_block)(const Problem *p, char *workspace) {
    const Py_ssize_t D = p->D, K = p->K, F = p->F;
    Py_ssize_t features, T, stride;
    N_(tile_shape)(D, K, F, p->direct, &features, &T, &stride);
#define TAKE(count) (REAL *)workspace; workspace += ((count) * sizeof(REAL) + 63) / 64 * 64
    workspace += (64 - (size_t)workspace % 64) % 64;
    REAL *z = TAKE(D * stride);
    REAL *whitened = TAKE(D * stride);
    REAL *phi = TAKE(features * stride);
    REAL *logits = TAKE(K * stride);
    REAL *weight = TAKE(stride);
    REAL *log_prob = TAKE(stride);
    REAL *factor = TAKE(stride);
    /* S = (E f) Φᵀ = E (f Φ)ᵀ: with fewer features than components it is cheaper to scale Φ. */
    if (p->direct || p->hard || p->responsibilities || !p->statistics || F >= K) factor = NULL;
    REAL *whitening = TAKE(D * D);
    double *square = (double *)workspace;
    if (p->direct) workspace += (D * D * sizeof(double) + 63) / 64 * 64;
    REAL *packed = (REAL *)workspace;
#undef TAKE
    REAL *second = phi + (D + 1) * stride; /* direct: centred rows in phi, weighted ones behind */

    N_(pack_coefficients)(p, packed, whitening);
    double total = 0;
    for (Py_ssize_t start = 0; start < p->rows; start += T) {
        const Py_ssize_t rows = p->rows - start < T ? p->rows - start : T;
        const Py_ssize_t columns = (rows + 8 * LANES - 1) / (8 * LANES) * (8 * LANES);
        N_(load_tile)(p, start, rows, columns, stride, weight, z);
        const REAL *tile = z;
        if (p->whitening) {
            N_(logit_tile)(whitening, D, D, 0, D, z, columns, stride, 0, whitened);
            tile = whitened;
        }
        if (p->direct)
            N_(direct_logit_tile)(p, packed, tile, columns, stride, phi, second, logits);
        else
            N_(packed_logit_tile)(p, packed, tile, columns, stride, features, 0, phi, logits);
        N_(softmax_tile)(logits, K, columns, stride, weight, p->hard, p->statistics || p->responsibilities, factor,
                         log_prob);
        if (p->log_prob)
            for (Py_ssize_t n = 0; n < rows; ++n)
                *(double *)(p->log_prob + (start + n) * p->log_prob_stride) = (double)log_prob[n];
        if (p->responsibilities) N_(write_responsibilities)(p, start, rows, stride, logits);
        if (!p->statistics) continue;
        total += N_(inner_product)(weight, log_prob, rows);
        if (p->direct)
            N_(direct_statistic_tile)(p, tile, logits, columns, stride, phi, second, square);
        else
            N_(packed_statistic_tile)(p, tile, logits, factor, columns, stride, features, 0, phi);
    }
    if (p->total) *p->total += total;
}

static const JOIN2(Tiles, TYPE) N_(tiles) = {
    LEVEL_NAME, 8 * VECTOR_LANES, N_(workspace_size), N_(mixture_block), N_(feature_tile), N_(pack_natural),
    N_(logit_tile), N_(softmax_tile), N_(statistic_tile)};

#undef DOUBLES
#undef INTERLEAVE
#include "vectors_end.h"
