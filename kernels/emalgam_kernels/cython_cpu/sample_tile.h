/* Random numbers and samples, tile by tile; levels.h includes this once for every pair of type and instruction set.
 *
 * Letters and tiles are those of tile.h. Philox works on 64-bit lanes, one row in each: a word is the low half of its
 * lane, what the high half holds does not matter, and one instruction multiplies the low halves of a whole register.
 */

#include "vectors_begin.h"

typedef uint64_t N_(words) __attribute__((vector_size(VECTOR_BYTES)));
#define WORDS N_(words)
#define UVEC N_(uvec)
#if IS_FLOAT64
typedef uint64_t N_(uvec) __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef uint32_t N_(uvec) __attribute__((vector_size(VECTOR_BYTES)));
#endif

/* The 64-bit products of the low halves of a and m. */
#if defined(__x86_64__) && VECTOR_BYTES == 64
#define PRODUCT(a, m) ((WORDS)_mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(m)))
#elif defined(__x86_64__) && VECTOR_BYTES == 32
#define PRODUCT(a, m) ((WORDS)_mm256_mul_epu32((__m256i)(a), _mm256_set1_epi64x(m)))
#elif defined(__x86_64__)
#define PRODUCT(a, m) ((WORDS)_mm_mul_epu32((__m128i)(a), _mm_set1_epi64x(m)))
#else
#define PRODUCT(a, m) (((a) & 0xffffffffu) * (uint64_t)(m))
#endif

/* ---- Philox and uniforms ----------------------------------------------------------------------------------- */

/* Philox4x32-10 of the counters (low and high half of the row, stream, block): Salmon et al. (2011). */
INLINE void N_(philox)(uint64_t seed, uint32_t stream, uint32_t block, WORDS rows, WORDS *word) {
    WORDS a = rows, b = rows >> 32, c = (WORDS){0} + stream, d = (WORDS){0} + block;
    uint32_t first_key = (uint32_t)seed, second_key = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const WORDS left = PRODUCT(a, PHILOX_FIRST_MULTIPLIER), right = PRODUCT(c, PHILOX_SECOND_MULTIPLIER);
        a = (right >> 32) ^ b ^ (uint64_t)first_key;
        b = right;
        c = (left >> 32) ^ d ^ (uint64_t)second_key;
        d = left;
        first_key += PHILOX_FIRST_KEY_INCREMENT;
        second_key += PHILOX_SECOND_KEY_INCREMENT;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

/* (k + ½) 2^−m of the m highest bits k of a lane, m = MANTISSA_BITS: 1 + k 2^−m by its bits, less 1 − 2^−(m + 1). */
INLINE VEC N_(unit)(UVEC bits) {
    const IVEC mantissa = (IVEC)(bits >> (8 * sizeof(REAL) - MANTISSA_BITS));
    const VEC number = (VEC)(mantissa | (EXPONENT_BIAS << MANTISSA_BITS));
    return number - ((REAL)1 - (REAL)0.5 / ((INTEGER)1 << MANTISSA_BITS));
}

/* UNIFORMS vectors of uniforms: lane i those of the row (first + i) >> halve. */
#if IS_FLOAT64
#define UNIFORMS 2
INLINE void N_(uniform_block)(uint64_t seed, uint32_t stream, uint32_t block, uint64_t first, int halve, VEC *u) {
    const WORDS rows = (LOAD_WORDS(lane_numbers) + first) >> halve;
    WORDS word[4];
    N_(philox)(seed, stream, block, rows, word);
    u[0] = N_(unit)((word[1] << 32) | (word[0] & 0xffffffffu));
    u[1] = N_(unit)((word[3] << 32) | (word[2] & 0xffffffffu));
}
#else
#define UNIFORMS 4
INLINE void N_(uniform_block)(uint64_t seed, uint32_t stream, uint32_t block, uint64_t first, int halve, VEC *u) {
    const WORDS even = 2 * LOAD_WORDS(lane_numbers) + first;
    WORDS left[4], right[4];
    N_(philox)(seed, stream, block, even >> halve, left);
    N_(philox)(seed, stream, block, (even + 1) >> halve, right);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) u[i] = N_(unit)((UVEC)((right[i] << 32) | (left[i] & 0xffffffffu)));
}
#endif

/* The first uniforms of `rows` rows. */
KERNEL void N_(uniforms)(uint64_t seed, uint32_t stream, uint64_t first, Py_ssize_t rows, char *out,
                         Py_ssize_t out_stride) {
    VEC u[UNIFORMS];
    for (Py_ssize_t n = 0; n < rows; n += LANES) {
        N_(uniform_block)(seed, stream, 0, first + n, 0, u);
        for (Py_ssize_t i = 0; i < LANES && n + i < rows; ++i, out += out_stride) *(REAL *)out = u[0][i];
    }
}

/* ---- normals ----------------------------------------------------------------------------------------------- */

/* cos 2πu and sin 2πu: 4 u = q + r with an integer q and |r| ≤ ½, both exact, then q quarter turns of the angle rπ/2. */
INLINE void N_(cos_sin)(VEC u, VEC *cosine, VEC *sine) {
    static const REAL p[] = {P_(SIN_COEFFICIENTS)}, q[] = {P_(COS_COEFFICIENTS)};
    const VEC shifted = u * (REAL)4 + ROUND_TO_INTEGER, r = u * (REAL)4 - (shifted - ROUND_TO_INTEGER), z = r * r;
    VEC s = z * p[0] + p[1], c = z * q[0] + q[1];
#pragma GCC unroll 16
    for (size_t i = 2; i < sizeof(p) / sizeof(p[0]); ++i) s = s * z + p[i];
#pragma GCC unroll 16
    for (size_t i = 2; i < sizeof(q) / sizeof(q[0]); ++i) c = c * z + q[i];
    s *= r;
    c = c * z + (REAL)1;
    /* The low bits of `shifted` hold q: odd ones swap the two, and the signs follow the quadrant. */
    const UVEC quarter = (UVEC)shifted;
    const IVEC odd = -(IVEC)(quarter & 1);
    const int to_sign = 8 * sizeof(REAL) - 2;
    *cosine = (VEC)((UVEC)SELECT(odd, s, c) ^ (((quarter + 1) & 2) << to_sign));
    *sine = (VEC)((UVEC)SELECT(odd, c, s) ^ ((quarter & 2) << to_sign));
}

/* ε (D, columns): normals of the rows (first + n) >> halve, by the Box-Muller transform of each pair of uniforms. Rows
 * up to a multiple of UNIFORMS are written. */
KERNEL void N_(normal_tile)(uint64_t seed, uint32_t stream, uint64_t first, int halve, Py_ssize_t D,
                            Py_ssize_t columns, Py_ssize_t stride, REAL *restrict noise) {
    for (Py_ssize_t d = 0; d < D; d += UNIFORMS, noise += UNIFORMS * stride)
        for (Py_ssize_t n = 0; n < columns; n += LANES) {
            VEC u[UNIFORMS], cosine, sine;
            N_(uniform_block)(seed, stream, (uint32_t)(d / UNIFORMS), first + n, halve, u);
#pragma GCC unroll 2
            for (int i = 0; i < UNIFORMS; i += 2) {
                const VEC radius = N_(square_root)((REAL)-2 * N_(log)(u[i]));
                N_(cos_sin)(u[i + 1], &cosine, &sine);
                STORE(noise + i * stride + n, radius * cosine);
                STORE(noise + (i + 1) * stride + n, radius * sine);
            }
        }
}

/* Elements of scratch memory for a tile of ε. */
INLINE Py_ssize_t N_(noise_size)(Py_ssize_t D) { return (D + UNIFORMS - 1) / UNIFORMS * UNIFORMS * NOISE_STRIDE(REAL); }

/* Normals of rows [first, first + rows) to the caller's array. */
KERNEL void N_(normals)(uint64_t seed, uint32_t stream, uint64_t first, Py_ssize_t rows, Py_ssize_t D, char *out,
                        Py_ssize_t row_stride, Py_ssize_t column_stride, char *workspace) {
    REAL *noise = (REAL *)workspace;
    const Py_ssize_t stride = NOISE_STRIDE(REAL);
    for (Py_ssize_t start = 0; start < rows; start += ROWS_OF_A_TILE) {
        const Py_ssize_t count = rows - start < ROWS_OF_A_TILE ? rows - start : ROWS_OF_A_TILE;
        N_(normal_tile)(seed, stream, first + start, 0, D, (count + LANES - 1) / LANES * LANES, stride, noise);
        for (Py_ssize_t n = 0; n < count; ++n) {
            char *row = out + (start + n) * row_stride;
            for (Py_ssize_t d = 0; d < D; ++d, row += column_stride) *(REAL *)row = noise[d * stride + n];
        }
    }
}

/* ---- labels ------------------------------------------------------------------------------------------------ */

#if IS_FLOAT64
/* Labels by the alias table: column ⌊u₁ K⌋, kept if u₂ is below its probability. */
KERNEL void N_(label_tile)(const Draws *p, uint64_t first, int halve, Py_ssize_t columns, int32_t *restrict labels) {
    for (Py_ssize_t n = 0; n < columns; n += LANES) {
        VEC u[UNIFORMS];
        N_(uniform_block)(p->seed, STREAM_OF_LABELS, 0, first + n, halve, u);
        const VEC scaled = u[0] * (double)p->K;
        for (Py_ssize_t i = 0; i < LANES; ++i) {
            const int32_t column = (int32_t)scaled[i];
            labels[n + i] = u[1][i] < p->probability[column] ? column : p->alias[column];
        }
    }
}

/* Labels by the rows of the strata: row i has the first label k with i < ends[k]. */
KERNEL void N_(stratum_tile)(const Draws *p, uint64_t first, Py_ssize_t columns, int32_t *restrict labels) {
    int64_t row = (int64_t)(first % (uint64_t)p->ends[p->K - 1]);
    int32_t k = 0;
    for (Py_ssize_t n = 0; n < columns; ++n, ++row) {
        if (row == p->ends[p->K - 1]) row = 0, k = 0;
        while (row >= p->ends[k]) ++k;
        labels[n] = k;
    }
}

/* The four words of each row, (rows, 4) uint32. */
KERNEL void N_(words_of_rows)(uint64_t seed, uint32_t stream, uint32_t block, uint64_t first, Py_ssize_t rows,
                              char *out, Py_ssize_t row_stride, Py_ssize_t column_stride) {
    WORDS word[4];
    for (Py_ssize_t n = 0; n < rows; n += LANES) {
        N_(philox)(seed, stream, block, LOAD_WORDS(lane_numbers) + (first + n), word);
        for (Py_ssize_t i = 0; i < LANES && n + i < rows; ++i)
            for (int w = 0; w < 4; ++w)
                *(uint32_t *)(out + (n + i) * row_stride + w * column_stride) = (uint32_t)word[w][i];
    }
}
#endif

/* ---- x = μ + L ε ------------------------------------------------------------------------------------------- */

/* D rounded up to whole vectors: the row length of packed means and factors. */
INLINE Py_ssize_t N_(padded)(Py_ssize_t D) { return (D + LANES - 1) / LANES * LANES; }

/* The means, (K, padded D), then the columns of each factor, (D, padded D), or its diagonal: what sample_rows reads. */
KERNEL void N_(pack_sampler)(const Draws *p, char *packed) {
    const Py_ssize_t D = p->D, width = N_(padded)(D), height = p->diagonal ? 1 : D;
    REAL *out = (REAL *)packed;
    memset(out, 0, (p->K + p->factors * height) * width * sizeof(REAL));
    for (Py_ssize_t k = 0; k < p->K; ++k, out += width)
        for (Py_ssize_t d = 0; d < D; ++d) out[d] = (REAL)p->mean[k * D + d];
    for (Py_ssize_t k = 0; k < p->factors; ++k) {
        const double *factor = p->factor + k * p->factor_stride;
        for (Py_ssize_t j = 0; j < height; ++j, out += width)
            for (Py_ssize_t i = p->diagonal ? 0 : j; i < D; ++i)
                out[i] = (REAL)(p->diagonal ? factor[i] : factor[i * D + j]);
    }
}

/* Bytes that pack_sampler writes. */
KERNEL Py_ssize_t N_(packed_size)(const Draws *p) {
    return (p->K + p->factors * (p->diagonal ? 1 : p->D)) * N_(padded)(p->D) * sizeof(REAL);
}

/* `count` of a vector's lanes to one row of the caller's array. */
INLINE void N_(store_row)(VEC x, Py_ssize_t count, char *out, Py_ssize_t column_stride) {
    if (count >= LANES && column_stride == sizeof(REAL)) STORE((REAL *)out, x);
    else
        for (Py_ssize_t i = 0; i < LANES && i < count; ++i) *(REAL *)(out + i * column_stride) = x[i];
}

/* x = μ_k + Σ_j ε_j L_k[:, j] for `count` rows of one tile, a vector of features at a time. */
INLINE void N_(sample_rows)(const Draws *p, const Py_ssize_t D, const int32_t *restrict labels,
                            const REAL *restrict noise, Py_ssize_t count, char *out) {
    const Py_ssize_t stride = NOISE_STRIDE(REAL), width = N_(padded)(D);
    const REAL *means = (const REAL *)p->packed, *factors = means + p->K * width;
    const Py_ssize_t step = p->factors > 1 ? (p->diagonal ? 1 : D) * width : 0;
    for (Py_ssize_t n = 0; n < count; ++n, out += p->out_row_stride) {
        const REAL *mean = means + labels[n] * width, *factor = factors + labels[n] * step, *e = noise + n;
        for (Py_ssize_t d = 0; d < D; d += LANES) {
            VEC x = LOAD(mean + d);
            if (p->diagonal) {
                VEC own = {0};
                for (Py_ssize_t i = 0; i < LANES && d + i < D; ++i) own[i] = e[(d + i) * stride];
                x += own * LOAD(factor + d);
            } else {
                const Py_ssize_t last = d + LANES < D ? d + LANES : D;
                for (Py_ssize_t j = 0; j < last; ++j) x += e[j * stride] * LOAD(factor + j * width + d);
            }
            N_(store_row)(x, D - d, out + d * p->out_column_stride, p->out_column_stride);
        }
    }
}

/* Rows [start, start + rows) of the caller's arrays. */
KERNEL void N_(sample_block)(const Draws *p, Py_ssize_t start, Py_ssize_t rows, char *workspace) {
    REAL *noise = (REAL *)workspace;
    int32_t *labels = (int32_t *)(noise + N_(noise_size)(p->D));
    const Py_ssize_t stride = NOISE_STRIDE(REAL);
    for (const Py_ssize_t end = start + rows; start < end; start += ROWS_OF_A_TILE) {
        const Py_ssize_t count = end - start < ROWS_OF_A_TILE ? end - start : ROWS_OF_A_TILE;
        const Py_ssize_t columns = (count + ROWS_OF_A_STEP - 1) / ROWS_OF_A_STEP * ROWS_OF_A_STEP;
        const uint64_t first = p->first + start;
        if (p->ends) JOIN3(stratum_tile, f64, LEVEL)(p, first, columns, labels);
        else JOIN3(label_tile, f64, LEVEL)(p, first, p->antithetic, columns, labels);
        N_(normal_tile)(p->seed, STREAM_OF_NORMALS, first, p->antithetic, p->D, columns, stride, noise);
        for (Py_ssize_t d = 0; p->antithetic && d < p->D; ++d)
            for (Py_ssize_t n = (first + 1) % 2; n < columns; n += 2) noise[d * stride + n] = -noise[d * stride + n];
        for (Py_ssize_t n = 0; n < count; ++n) *(int64_t *)(p->labels + (start + n) * p->label_stride) = labels[n];
        char *out = p->out + start * p->out_row_stride;
        if (p->D == LANES) N_(sample_rows)(p, LANES, labels, noise, count, out);
        else N_(sample_rows)(p, p->D, labels, noise, count, out);
    }
}

/* Bytes of scratch memory for `normals` and `sample_block`. */
KERNEL Py_ssize_t N_(draw_workspace)(Py_ssize_t D) {
    return N_(noise_size)(D) * sizeof(REAL) + ROWS_OF_A_TILE * sizeof(int32_t);
}

static const Draw_functions N_(draw_functions) = {
    LEVEL_NAME, N_(draw_workspace), N_(packed_size), N_(pack_sampler), JOIN3(words_of_rows, f64, LEVEL),
    N_(uniforms), N_(normals), N_(sample_block)};

#undef WORDS
#undef UVEC
#undef PRODUCT
#undef UNIFORMS
#include "vectors_end.h"
