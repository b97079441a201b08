/* Divergences of Gaussians, one pair in each lane; levels.h includes this file once for every type and level.
 *
 * A tile of matrices holds element (i, j) of LANES matrices side by side, at (i D + j) LANES: every loop below runs
 * over whole vectors, whatever D is. The functions are specified in emalgam_kernels/reference/kl.py.
 */

#include "vectors_begin.h"
#define AT(tile, i) LOAD((tile) + (i) * LANES)
#define PUT(tile, i, v) STORE((tile) + (i) * LANES, v)

/* ---- from one pair after the other to lanes ------------------------------------------------------------------- */

/* Prefetches what the pairs after the next LANES want, if they lie `tile` elements apart: the processor does not foresee
 * so many short streams. Into the second cache, whose queue of loads is long: a tile's loads at once would fill that of
 * the first and hold up the arithmetic. An address that is not one is no fault. */
#define FETCH_AHEAD(a, tile) __builtin_prefetch((a) + 2 * (tile), 0, 2)

/* tile ← a − b (b may be NULL), element f of lane l from a[l][f]. */
KERNEL void N_(gather)(const REAL *const *a, const REAL *const *b, Py_ssize_t count, REAL *restrict tile) {
    for (Py_ssize_t f = 0; f < count;) {
        if (count < LANES) { /* fewer elements than a vector has */
            for (Py_ssize_t l = 0; l < LANES; ++l) tile[f * LANES + l] = b ? a[l][f] - b[l][f] : a[l][f];
            ++f;
            continue;
        }
        const Py_ssize_t first = f + LANES <= count ? f : count - LANES; /* the last vectors may overlap */
        VEC v[VECTOR_LANES];
#pragma GCC unroll 16
        for (int l = 0; l < VECTOR_LANES; ++l) {
            FETCH_AHEAD(a[l] + first, count * LANES);
            if (b) FETCH_AHEAD(b[l] + first, count * LANES);
        }
#pragma GCC unroll 16
        for (int l = 0; l < VECTOR_LANES; ++l) v[l] = b ? LOAD(a[l] + first) - LOAD(b[l] + first) : LOAD(a[l] + first);
        N_(transpose)(v, VECTOR_LANES);
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES; ++i) PUT(tile, first + i, v[i]);
        f = first + LANES;
    }
}

/* out[l][f] ← element f of lane l, for the first `lanes` lanes. */
KERNEL void N_(scatter)(const REAL *restrict tile, Py_ssize_t count, Py_ssize_t lanes, REAL *const *out) {
    if (count < LANES) {
        for (Py_ssize_t l = 0; l < lanes; ++l)
            for (Py_ssize_t f = 0; f < count; ++f) out[l][f] = tile[f * LANES + l];
        return;
    }
    for (Py_ssize_t f = 0; f < count; f += LANES) {
        const Py_ssize_t first = f + LANES <= count ? f : count - LANES;
        VEC v[VECTOR_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES; ++i) v[i] = AT(tile, first + i);
        N_(transpose)(v, VECTOR_LANES);
        for (Py_ssize_t l = 0; l < lanes; ++l) STORE(out[l] + first, v[l]);
    }
}

/* Where each lane's mean, covariance and factor (NULL if there is none) are; lanes beyond `count` repeat the last. */
typedef struct {
    const REAL *mean[VECTOR_LANES], *covariance[VECTOR_LANES], *factor[VECTOR_LANES];
} N_(Lanes);

INLINE void N_(lanes_of)(const Stack *s, const Py_ssize_t *index, Py_ssize_t count, N_(Lanes) *lanes) {
    for (Py_ssize_t l = 0; l < LANES; ++l) {
        const Py_ssize_t m = index[l < count ? l : count - 1];
        lanes->mean[l] = (const REAL *)(s->mean + m * s->mean_stride);
        lanes->covariance[l] = (const REAL *)(s->covariance + m * s->covariance_stride);
        lanes->factor[l] = s->factor ? (const REAL *)(s->factor + m * s->factor_stride) : NULL;
    }
}

/* ---- d − log(1 + d), and the logarithm of a product ------------------------------------------------------------ */

/* d − log(x), where x is 1 + d and d may hold more digits. With x = 2ᵉ (1 + f), s = f / (2 + f) and log(1 + f) =
 * 2 s + s z p(z), z = s²: for e = 0, f = d, it is s (d − z p(z)), which cancels nothing, as d − 2 s = s d. */
INLINE VEC N_(excess)(VEC d, VEC x) {
    static const REAL c[] = {P_(LOG_COEFFICIENTS)};
    const IVEC bits = (IVEC)x;
    const IVEC e = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS;
    const IVEC near = (IVEC)(e == 0);
    const VEC f = SELECT(near, d, (VEC)(bits - (e << MANTISSA_BITS)) - (x - x + (REAL)1));
    const VEC exponent = (VEC)(e + ROUND_TO_INTEGER_BITS) - ROUND_TO_INTEGER;
    const VEC s = f / (f + (REAL)2), z = s * s;
    VEC p = z * c[0] + c[1];
#pragma GCC unroll 16
    for (size_t i = 2; i < sizeof(c) / sizeof(c[0]); ++i) p = p * z + c[i];
    const VEC log = exponent * P_(LN2_HIGH) + ((REAL)2 * s + (s * z * p + exponent * P_(LN2_LOW)));
    return SELECT(near, s * (d - z * p), d - log);
}

/* A product of normal numbers that neither overflows nor underflows: `mantissa` · 2^`exponent`. */
typedef struct {
    VEC mantissa;
    IVEC exponent;
} N_(Product);

INLINE void N_(multiply)(N_(Product) *product, VEC x) {
    const VEC value = product->mantissa * x;
    const IVEC e = ((IVEC)value - SQRT_HALF_BITS) >> MANTISSA_BITS;
    product->mantissa = (VEC)((IVEC)value - (e << MANTISSA_BITS)) + (value - value);
    product->exponent += e;
}

INLINE VEC N_(log_product)(const N_(Product) *product) {
    const VEC exponent = (VEC)(product->exponent + ROUND_TO_INTEGER_BITS) - ROUND_TO_INTEGER;
    return exponent * P_(LN2_HIGH) + (N_(log)(product->mantissa) + exponent * P_(LN2_LOW));
}

/* Σ_i log P_ii = −½ log |Σ| of each lane, P read where it lies. */
INLINE VEC N_(log_factors)(const REAL *const *factor, Py_ssize_t D, int full) {
    N_(Product) product = {(VEC){0} + (REAL)1, (IVEC){0}};
    const Py_ssize_t step = full ? D + 1 : 1, tile = (full ? D * D : D) * LANES;
    for (Py_ssize_t i = 0; i < D; ++i) {
        VEC x;
        for (int l = 0; l < VECTOR_LANES; ++l) {
            x[l] = factor[l][i * step];
            FETCH_AHEAD(factor[l] + i * step, tile);
        }
        N_(multiply)(&product, x);
    }
    return N_(log_product)(&product);
}

/* Σ_i log x_i of D vectors. */
INLINE VEC N_(log_tile)(const REAL *restrict x, Py_ssize_t D) {
    N_(Product) product = {(VEC){0} + (REAL)1, (IVEC){0}};
    for (Py_ssize_t i = 0; i < D; ++i) N_(multiply)(&product, AT(x, i));
    return N_(log_product)(&product);
}

/* ---- products of small matrices ------------------------------------------------------------------------------- */

/* A matrix in a tile, or its transpose: element (i, j) at i `row` + j `column`, in vectors. */
typedef struct {
    const REAL *tile;
    Py_ssize_t row, column;
} N_(Matrix);

/* One register block: out_ij ← Σ_k x_ik y_kj for first ≤ k < last. */
INLINE void N_(product_block)(const int rows, const int columns, N_(Matrix) x, N_(Matrix) y, Py_ssize_t i, Py_ssize_t j,
                              Py_ssize_t first, Py_ssize_t last, Py_ssize_t D, REAL *restrict out) {
    VEC sum[2][4] = {{{0}}};
    for (Py_ssize_t k = first; k < last; ++k) {
        VEC right[4];
#pragma GCC unroll 4
        for (int b = 0; b < columns; ++b) right[b] = AT(y.tile, k * y.row + (j + b) * y.column);
#pragma GCC unroll 4
        for (int a = 0; a < rows; ++a) {
            const VEC left = AT(x.tile, (i + a) * x.row + k * x.column);
#pragma GCC unroll 4
            for (int b = 0; b < columns; ++b) sum[a][b] += left * right[b];
        }
    }
#pragma GCC unroll 4
    for (int a = 0; a < rows; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < columns; ++b) PUT(out, (i + a) * D + j + b, sum[a][b]);
}

/* Which terms are not zero: y is upper triangular; x lower triangular; both are, x upper and y lower. In the last two
 * cases only the lower triangle of the result is wanted, and elements above it are undefined. */
enum N_(terms) { N_(UPPER_ON_THE_RIGHT), N_(LOWER_ON_THE_LEFT), N_(UPPER_BY_LOWER) };

/* out (D, D) ← x y. */
KERNEL void N_(product)(enum N_(terms) terms, N_(Matrix) x, N_(Matrix) y, Py_ssize_t D, REAL *restrict out) {
    for (Py_ssize_t i = 0; i < D;) {
        const int rows = D - i >= 2 ? 2 : 1;
        const Py_ssize_t wanted = terms == N_(UPPER_ON_THE_RIGHT) ? D : i + rows;
        for (Py_ssize_t j = 0; j < wanted;) {
            const int columns = wanted - j >= 4 ? 4 : wanted - j >= 2 ? 2 : 1;
            const Py_ssize_t first = terms == N_(UPPER_BY_LOWER) ? i : 0;
            const Py_ssize_t last = terms == N_(UPPER_ON_THE_RIGHT) ? j + columns
                                  : terms == N_(LOWER_ON_THE_LEFT) ? i + rows : D;
#define BLOCK(ROWS)                                                                                                 \
    (columns == 4   ? N_(product_block)(ROWS, 4, x, y, i, j, first, last, D, out)                                   \
     : columns == 2 ? N_(product_block)(ROWS, 2, x, y, i, j, first, last, D, out)                                   \
                    : N_(product_block)(ROWS, 1, x, y, i, j, first, last, D, out))
            if (rows == 2) BLOCK(2);
            else BLOCK(1);
#undef BLOCK
            j += columns;
        }
        i += rows;
    }
}

/* ‖Pᵀ m‖², and Pᵀ m if there is a place for it. */
INLINE VEC N_(squared_distance)(const REAL *restrict factor, const REAL *restrict m, Py_ssize_t D, REAL *restrict y) {
    VEC square = {0};
    for (Py_ssize_t i = 0; i < D; ++i) {
        VEC sum = {0};
        for (Py_ssize_t k = 0; k <= i; ++k) sum += AT(factor, k * D + i) * AT(m, k);
        if (y) PUT(y, i, sum);
        square += sum * sum;
    }
    return square;
}

INLINE REAL *N_(aligned)(char *workspace) { return (REAL *)(workspace + (64 - (size_t)workspace % 64) % 64); }

/* ---- P of covariances ------------------------------------------------------------------------------------------ */

/* a b + c with one rounding. fma(a, b, 0) is a product that the compiler cannot join with an addition. */
INLINE VEC N_(fma)(VEC a, VEC b, VEC c) {
    VEC out;
#pragma GCC unroll 16
    for (int l = 0; l < VECTOR_LANES; ++l)
        out[l] = sizeof(REAL) == 8 ? (REAL)__builtin_fma(a[l], b[l], c[l]) : (REAL)__builtin_fmaf(a[l], b[l], c[l]);
    return out;
}

INLINE VEC N_(sqrt)(VEC x) {
    VEC out;
#pragma GCC unroll 16
    for (int l = 0; l < VECTOR_LANES; ++l)
        out[l] = sizeof(REAL) == 8 ? (REAL)__builtin_sqrt(x[l]) : (REAL)__builtin_sqrtf(x[l]);
    return out;
}

/* (high, low) −= (m, m_low) (l, l_low) in twice the precision: Dekker (1971), Numerische Mathematik 18, 224-242. */
INLINE void N_(subtract_product)(VEC m, VEC m_low, VEC l, VEC l_low, VEC *high, VEC *low) {
    const VEC a = *high, product = N_(fma)(m, l, (VEC){0}), rest = N_(fma)(m, l, -product);
    const VEC difference = a - product, back = difference - a;
    const VEC error = (a - (difference - back)) - (product + back);
    *high = difference;
    *low = *low + (error - rest) - m * l_low - m_low * l;
}

/* m_ij = Σ_ij − Σ_{k<j} m_ik l_jk for `rows` rows i. The lower triangle of A holds Σ, and l in the columns before j; m_ij
 * goes to the upper one, at (j, i). If `exact`, in twice the precision: `low` holds the lower halves. */
INLINE void N_(eliminate)(const int exact, const int rows, Py_ssize_t i, Py_ssize_t j, Py_ssize_t D, REAL *restrict A,
                          REAL *restrict low) {
    VEC high[4], rest[4] = {{0}};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) high[r] = AT(A, (i + r) * D + j);
    for (Py_ssize_t k = 0; k < j; ++k) {
        const VEC l = AT(A, j * D + k), l_low = exact ? AT(low, j * D + k) : (VEC){0};
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const VEC m = AT(A, k * D + i + r);
            if (exact) N_(subtract_product)(m, AT(low, k * D + i + r), l, l_low, high + r, rest + r);
            else high[r] -= m * l;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        PUT(A, j * D + i + r, high[r]);
        if (exact) PUT(low, j * D + i + r, rest[r]);
    }
}

/* Σ = L diag(pivot) Lᵀ with unit lower triangular L, column by column; l_ij = m_ij / pivot_j replaces Σ_ij below the
 * diagonal. `reciprocal` ← 1 / pivot, NaN where that is not positive. */
INLINE void N_(eliminate_all)(const int exact, REAL *restrict A, REAL *restrict low, Py_ssize_t D,
                              REAL *restrict reciprocal) {
    for (Py_ssize_t j = 0; j < D; ++j) {
        Py_ssize_t i = j;
        for (; i + 4 <= D; i += 4) N_(eliminate)(exact, 4, i, j, D, A, low);
        for (; i < D; ++i) N_(eliminate)(exact, 1, i, j, D, A, low);
        const VEC high = AT(A, j * D + j), rest = exact ? AT(low, j * D + j) : (VEC){0}, pivot = high + rest;
        const VEC pivot_low = rest - (pivot - high);
        VEC inverse = (REAL)1 / pivot;
        inverse = SELECT((IVEC)(inverse > (REAL)0) & (IVEC)(inverse < (REAL)INFINITY), inverse, (VEC){0} + (REAL)NAN);
        PUT(reciprocal, j, inverse);
        for (i = j + 1; i < D; ++i) {
            const VEC m = AT(A, j * D + i), l = m * inverse;
            PUT(A, i * D + j, l);
            if (exact)
                PUT(low, i * D + j, (N_(fma)(-l, pivot, m) + AT(low, j * D + i) - l * pivot_low) * inverse);
        }
    }
}

KERNEL void N_(factorize_covariance)(int exact, REAL *restrict A, REAL *restrict low, Py_ssize_t D,
                                     REAL *restrict reciprocal) {
    if (exact) N_(eliminate_all)(1, A, low, D, reciprocal);
    else N_(eliminate_all)(0, A, low, D, reciprocal);
}

/* P ← L⁻ᵀ, upper triangular: row i of L⁻¹ from those above it. */
KERNEL void N_(invert)(const REAL *restrict L, Py_ssize_t D, REAL *restrict P) {
    for (Py_ssize_t i = 0; i < D; ++i) {
        for (Py_ssize_t j = 0; j < i; ++j) {
            VEC sum = AT(L, i * D + j);
            for (Py_ssize_t k = j + 1; k < i; ++k) sum += AT(L, i * D + k) * AT(P, j * D + k);
            PUT(P, j * D + i, -sum);
            PUT(P, i * D + j, (VEC){0});
        }
        PUT(P, i * D + i, (VEC){0} + (REAL)1);
    }
}

/* Σ_i Σ_ii (Σ⁻¹)_ii of Σ⁻¹ = P diag(reciprocal) Pᵀ. */
INLINE VEC N_(inflation)(const REAL *restrict variance, const REAL *restrict P, const REAL *restrict reciprocal,
                         Py_ssize_t D) {
    VEC total = {0};
    for (Py_ssize_t i = 0; i < D; ++i) {
        VEC precision = {0};
        for (Py_ssize_t k = i; k < D; ++k) precision += AT(P, i * D + k) * AT(P, i * D + k) * AT(reciprocal, k);
        total += AT(variance, i) * precision;
    }
    return total;
}

/* P ← L⁻ᵀ and `reciprocal` ← 1 / pivot of Σ = L diag(pivot) Lᵀ, which is in A already and is overwritten: in plain
 * arithmetic, and again in twice the precision in lanes where that has lost digits (see PLAIN in kl_blocks.py). `low` is
 * of the size of A, `spare` (D) vectors. */
KERNEL void N_(precisions_of)(const REAL *const *covariance, Py_ssize_t D, REAL plain, REAL *restrict A,
                              REAL *restrict low, REAL *restrict P, REAL *restrict reciprocal, REAL *restrict spare) {
    for (Py_ssize_t i = 0; i < D; ++i) PUT(spare, i, AT(A, i * D + i));
    N_(factorize_covariance)(0, A, low, D, reciprocal);
    N_(invert)(A, D, P);
    const IVEC exact = (IVEC)(N_(inflation)(spare, P, reciprocal, D) <= plain); /* not so if NaN */
    Py_ssize_t count = 0;
    for (int l = 0; l < VECTOR_LANES; ++l) count += exact[l] != 0;
    if (count == LANES) return;
    N_(gather)(covariance, NULL, D * D, A);
    N_(factorize_covariance)(1, A, low, D, spare);
    N_(invert)(A, D, low);
    for (Py_ssize_t i = 0; i < D; ++i) {
        PUT(reciprocal, i, SELECT(exact, AT(reciprocal, i), AT(spare, i)));
        for (Py_ssize_t j = i; j < D; ++j) PUT(P, i * D + j, SELECT(exact, AT(P, i * D + j), AT(low, i * D + j)));
    }
}

/* P ← P diag(√reciprocal). */
INLINE void N_(scale_columns)(const REAL *restrict reciprocal, Py_ssize_t D, REAL *restrict P) {
    for (Py_ssize_t j = 0; j < D; ++j) {
        const VEC scale = N_(sqrt)(AT(reciprocal, j));
        for (Py_ssize_t i = 0; i <= j; ++i) PUT(P, i * D + j, AT(P, i * D + j) * scale);
    }
}

/* Lanes whose matrices are symmetric: |a_ij − a_ji| ≤ tolerance √(a_ii a_jj). */
INLINE IVEC N_(symmetric)(const REAL *restrict A, Py_ssize_t D, REAL tolerance) {
    IVEC symmetric = (IVEC)((VEC){0} == (VEC){0}), same = symmetric;
    for (Py_ssize_t i = 1; i < D; ++i)
        for (Py_ssize_t j = 0; j < i; ++j) same &= (IVEC)(AT(A, i * D + j) == AT(A, j * D + i));
    Py_ssize_t count = 0;
    for (int l = 0; l < VECTOR_LANES; ++l) count += same[l] != 0;
    if (count == LANES) return same;
    for (Py_ssize_t i = 1; i < D; ++i) {
        const VEC allowed = tolerance * N_(sqrt)(AT(A, i * D + i));
        for (Py_ssize_t j = 0; j < i; ++j) {
            const VEC difference = AT(A, i * D + j) - AT(A, j * D + i);
            const VEC size = SELECT((IVEC)(difference < 0), -difference, difference);
            symmetric &= (IVEC)(size <= allowed * N_(sqrt)(AT(A, j * D + j)));
        }
    }
    return symmetric;
}

/* Lanes whose Σ in A plain elimination proves to be positive definite; overwrites A. With H = Σ scaled to a unit diagonal,
 * |H| = Π pivot_i / Σ_ii and the least eigenvalue of H is at least |H| / e, for the others have the mean D / (D − 1) at
 * most. Rounding moves it by no more than D² eps: Higham (2002), theorem 10.5. */
INLINE IVEC N_(plainly_positive)(REAL *restrict A, Py_ssize_t D, REAL *restrict reciprocal, REAL *restrict variance) {
    VEC inverse_determinant = (VEC){0} + (REAL)1;
    for (Py_ssize_t i = 0; i < D; ++i) PUT(variance, i, AT(A, i * D + i));
    N_(factorize_covariance)(0, A, NULL, D, reciprocal);
    for (Py_ssize_t i = 0; i < D; ++i) inverse_determinant *= AT(variance, i) * AT(reciprocal, i);
    const REAL eps = sizeof(REAL) == 8 ? (REAL)DBL_EPSILON : (REAL)FLT_EPSILON;
    return (IVEC)(inverse_determinant * ((REAL)(D * D) * eps) < (REAL)0.01); /* not so if NaN */
}

/* out_m ← P_m for start ≤ m < stop, unless `out` is NULL: then only symmetry is checked, too. Returns the first m whose
 * covariance is not (symmetric and) positive definite, or −1. */
KERNEL Py_ssize_t N_(precision_factors)(const Factorization *f, Py_ssize_t start, Py_ssize_t stop, char *workspace) {
    const Py_ssize_t D = f->D;
    REAL *A = N_(aligned)(workspace), *low = A + D * D * LANES, *P = low + D * D * LANES;
    REAL *reciprocal = P + D * D * LANES, *spare = reciprocal + D * LANES;
    Py_ssize_t failed = -1;
    for (Py_ssize_t first = start; first < stop; first += LANES) {
        const Py_ssize_t count = stop - first < LANES ? stop - first : LANES;
        const REAL *from[VECTOR_LANES];
        for (Py_ssize_t l = 0; l < LANES; ++l)
            from[l] = (const REAL *)(f->covariance + (first + (l < count ? l : count - 1)) * f->covariance_stride);
        N_(gather)(from, NULL, D * D, A);
        IVEC proper = (IVEC)((VEC){0} == (VEC){0});
        if (!f->out) {
            proper = N_(symmetric)(A, D, (REAL)f->asymmetry);
            const IVEC sure = proper & N_(plainly_positive)(A, D, reciprocal, spare);
            Py_ssize_t lanes = 0;
            for (int l = 0; l < VECTOR_LANES; ++l) lanes += sure[l] != 0;
            if (lanes == LANES) continue;
            N_(gather)(from, NULL, D * D, A);
        }
        N_(precisions_of)(from, D, (REAL)f->plain, A, low, P, reciprocal, spare);
        for (Py_ssize_t k = 0; k < D; ++k) proper &= (IVEC)(AT(reciprocal, k) > (REAL)0);
        for (Py_ssize_t l = 0; l < count && failed < 0; ++l)
            if (!proper[l]) failed = first + l;
        if (!f->out) continue;
        REAL *to[VECTOR_LANES];
        for (Py_ssize_t l = 0; l < count; ++l) to[l] = (REAL *)(f->out + (first + l) * f->out_stride);
        N_(scale_columns)(reciprocal, D, P);
        N_(scatter)(P, D * D, count, to);
    }
    return failed;
}

/* ---- pairs ---------------------------------------------------------------------------------------------------- */

/* Σ_k log(1 + d_k) of the diagonal that `factorize` leaves, to some eps: one logarithm of the product. */
INLINE VEC N_(log_pivots)(const REAL *restrict E, Py_ssize_t D) {
    N_(Product) product = {(VEC){0} + (REAL)1, (IVEC){0}};
    for (Py_ssize_t k = 0; k < D; ++k) N_(multiply)(&product, AT(E, k * D + k) + (REAL)1);
    return N_(log_product)(&product);
}

/* I + E = L diag(1 + d) Lᵀ with unit lower triangular L, column by column; overwrites E (its lower triangle).
 * Σ_{i > k} L_ik² (1 + d_k) is returned; d stays on the diagonal, and the smallest 1 + d goes to `least`. */
KERNEL VEC N_(factorize)(REAL *restrict E, Py_ssize_t D, REAL *restrict column, VEC *least) {
    VEC squares = {0};
    *least = (VEC){0} + (REAL)1;
    for (Py_ssize_t k = 0; k < D; ++k) {
        const VEC pivot = AT(E, k * D + k) + (REAL)1, reciprocal = (REAL)1 / pivot;
        *least = SELECT((IVEC)(pivot >= *least), *least, pivot); /* NaN counts as least, and stays */
        for (Py_ssize_t i = k + 1; i < D; ++i) {
            const VEC m = AT(E, i * D + k), l = m * reciprocal;
            PUT(column, i, l);
            squares += m * l;
            for (Py_ssize_t j = k + 1; j <= i; ++j) PUT(E, i * D + j, AT(E, i * D + j) - m * AT(column, j));
        }
    }
    return squares;
}

/* One thread's tiles for pairs: five of D D vectors (of D for diagonals) and three of D. */
typedef struct {
    REAL *E, *factor, *half_way, *covariance, *low, *m, *reciprocal, *spare;
} N_(Tiles_of_pairs);

INLINE N_(Tiles_of_pairs) N_(tiles_of_pairs)(REAL *work, Py_ssize_t D, int full) {
    const Py_ssize_t width = (full ? D * D : D) * LANES;
    REAL *m = work + 5 * width;
    return (N_(Tiles_of_pairs)){work, work + width, work + 2 * width, work + 3 * width, work + 4 * width,
                                m, m + D * LANES, m + 2 * D * LANES};
}

/* log |Σ_q| − log |Σ_p| of full covariances; overwrites all tiles if p came without P. */
INLINE VEC N_(log_ratio)(const Divergence *g, const N_(Lanes) *p, const N_(Lanes) *q, const N_(Tiles_of_pairs) *t) {
    const Py_ssize_t D = g->D;
    const VEC log_q = q->factor[0] ? (REAL)2 * N_(log_factors)(q->factor, D, 1) : N_(log_tile)(t->reciprocal, D);
    if (p->factor[0]) return (REAL)2 * N_(log_factors)(p->factor, D, 1) - log_q;
    if (q->factor[0]) N_(gather)(p->covariance, NULL, D * D, t->covariance); /* else Σ_p is there already */
    N_(precisions_of)(p->covariance, D, (REAL)g->plain, t->covariance, t->low, t->factor, t->reciprocal, t->spare);
    return N_(log_tile)(t->reciprocal, D) - log_q;
}

/* P_q, and Σ_p − Σ_q, both full. */
INLINE void N_(difference_and_factor)(const Divergence *g, const N_(Lanes) *p, const N_(Lanes) *q,
                                      const N_(Tiles_of_pairs) *t) {
    const Py_ssize_t D = g->D;
    if (q->factor[0]) {
        N_(gather)(p->covariance, q->covariance, D * D, t->E);
        N_(gather)(q->factor, NULL, D * D, t->factor);
        return;
    }
    N_(gather)(p->covariance, NULL, D * D, t->covariance);
    N_(gather)(q->covariance, NULL, D * D, t->half_way);
    for (Py_ssize_t f = 0; f < D * D; ++f) PUT(t->E, f, AT(t->covariance, f) - AT(t->half_way, f));
    N_(precisions_of)(q->covariance, D, (REAL)g->plain, t->half_way, t->low, t->factor, t->reciprocal, t->spare);
    N_(scale_columns)(t->reciprocal, D, t->factor);
}

/* Two forms of what the covariances contribute to 2 KL, from E = P_qᵀ (Σ_p − Σ_q) P_q with eigenvalues e:
 *     Σ (e − log(1 + e)) = Σ_k (d_k − log(1 + d_k)) + Σ_{i>k} L_ik² (1 + d_k)     while that is at most `farthest`, and
 *     tr E + log |Σ_q| − log |Σ_p|     beyond, where an eigenvalue of I + E may be so small that L has lost digits. */
INLINE VEC N_(covariance_terms)(const Divergence *g, const N_(Lanes) *p, const N_(Lanes) *q,
                                const N_(Tiles_of_pairs) *t) {
    const Py_ssize_t D = g->D;
    VEC trace = {0}, least;
    for (Py_ssize_t i = 0; i < D; ++i) trace += AT(t->E, i * D + i);
    VEC close = N_(factorize)(t->E, D, t->m, &least);
    /* the first condition: what a logarithm makes of a negative number means nothing */
    const VEC rough = trace - N_(log_pivots)(t->E, D);
    const IVEC near = (IVEC)(least > (REAL)0) & (IVEC)(rough <= (REAL)g->farthest);
    Py_ssize_t count = 0;
    for (int l = 0; l < VECTOR_LANES; ++l) count += near[l] != 0;
    for (Py_ssize_t i = 0; count && i < D; ++i) {
        const VEC d = AT(t->E, i * D + i);
        close += N_(excess)(d, d + (REAL)1);
    }
    return count == LANES ? close : SELECT(near, close, trace + N_(log_ratio)(g, p, q, t));
}

/* KL of each lane's pair: ½ (covariance_terms + ‖P_qᵀ (μ_p − μ_q)‖²). */
KERNEL VEC N_(full_pairs)(const Divergence *g, const N_(Lanes) *p, const N_(Lanes) *q, REAL *restrict work) {
    const Py_ssize_t D = g->D;
    const N_(Tiles_of_pairs) t = N_(tiles_of_pairs)(work, D, 1);
    N_(difference_and_factor)(g, p, q, &t);
    N_(gather)(p->mean, q->mean, D, t.m);
    const N_(Matrix) difference = {t.E, D, 1}, P = {t.factor, D, 1}, transposed = {t.factor, 1, D};
    const N_(Matrix) right = {t.half_way, D, 1};
    N_(product)(N_(UPPER_ON_THE_RIGHT), difference, P, D, t.half_way);
    N_(product)(N_(LOWER_ON_THE_LEFT), transposed, right, D, t.E);
    const VEC distance = N_(squared_distance)(t.factor, t.m, D, NULL);
    return (REAL)0.5 * (N_(covariance_terms)(g, p, q, &t) + distance);
}

/* The same for diagonals: e = (σ_p² − σ_q²) P_q², δ = (μ_p − μ_q) P_q, ½ Σ [ e − log(1 + e) + δ² ]; where 1 + e < ½
 * it is computed as σ_p² P_q². */
KERNEL VEC N_(diag_pairs)(const Divergence *g, const N_(Lanes) *p, const N_(Lanes) *q, REAL *restrict work) {
    const Py_ssize_t D = g->D;
    const N_(Tiles_of_pairs) t = N_(tiles_of_pairs)(work, D, 0);
    REAL *variance = t.half_way;
    N_(gather)(p->covariance, q->covariance, D, t.E);
    N_(gather)(p->covariance, NULL, D, variance);
    N_(gather)(q->factor[0] ? q->factor : q->covariance, NULL, D, t.factor);
    N_(gather)(p->mean, q->mean, D, t.m);
    VEC sum = {0};
    for (Py_ssize_t i = 0; i < D; ++i) {
        const VEC given = AT(t.factor, i), P = q->factor[0] ? given : (REAL)1 / N_(sqrt)(given);
        const VEC e = AT(t.E, i) * P * P, delta = AT(t.m, i) * P;
        const VEC ratio = SELECT((IVEC)(e < (REAL)-0.5), AT(variance, i) * P * P, e + (REAL)1);
        const IVEC proper = (IVEC)(AT(variance, i) > (REAL)0) & (IVEC)(P < (REAL)INFINITY);
        sum += SELECT(proper, N_(excess)(e, ratio) + delta * delta, (VEC){0} + (REAL)NAN);
    }
    return (REAL)0.5 * sum;
}

/* KL(p_i ‖ q_j) for up to LANES pairs (i, j) of indices. */
INLINE VEC N_(lane_pairs)(const Divergence *g, const Py_ssize_t *i, const Py_ssize_t *j, Py_ssize_t count, REAL *work) {
    N_(Lanes) p, q;
    N_(lanes_of)(&g->p, i, count, &p);
    N_(lanes_of)(&g->q, j, count, &q);
    return g->full ? N_(full_pairs)(g, &p, &q, work) : N_(diag_pairs)(g, &p, &q, work);
}

/* out_m ← KL(p_m ‖ q_m) for start ≤ m < stop. */
KERNEL void N_(pairs)(const Divergence *g, Py_ssize_t start, Py_ssize_t stop, char *workspace) {
    for (Py_ssize_t first = start; first < stop; first += LANES) {
        const Py_ssize_t count = stop - first < LANES ? stop - first : LANES;
        Py_ssize_t index[VECTOR_LANES];
        for (Py_ssize_t l = 0; l < LANES; ++l) index[l] = first + l;
        const VEC divergence = N_(lane_pairs)(g, index, index, count, N_(aligned)(workspace));
        for (Py_ssize_t l = 0; l < count; ++l) *(double *)(g->out + (first + l) * g->row_stride) = divergence[l];
    }
}

/* ---- all pairs ------------------------------------------------------------------------------------------------ */

/* Features of a Gaussian: F for the divergence, and D + 2 for the size B of its terms (see kl_blocks.py). */
INLINE Py_ssize_t N_(feature_count)(Py_ssize_t D, int full) { return full ? (D + 1) * (D + 2) / 2 : 2 * D + 1; }

/* m ← μ − shift. */
INLINE void N_(centre)(const N_(Lanes) *lanes, const REAL *shift, Py_ssize_t D, REAL *restrict m) {
    N_(gather)(lanes->mean, NULL, D, m);
    for (Py_ssize_t i = 0; i < D; ++i) PUT(m, i, AT(m, i) - shift[i]);
}

/* E_p φ: Σ_ij + m_i m_j (i ≥ j), m, 1; then what B takes of p: Σ_ii + m_i², 1, |½ log |Σ||. Row f of `out` is `stride`
 * after the row before it. Returns −H_p, up to a constant. */
KERNEL VEC N_(expectations)(const Divergence *g, const N_(Lanes) *p, REAL *restrict work, Py_ssize_t stride,
                            REAL *restrict out) {
    const Py_ssize_t D = g->D, F = N_(feature_count)(D, g->full), width = g->full ? D * D : D;
    REAL *covariance = work, *m = work + width * LANES;
    N_(gather)(p->covariance, NULL, width, covariance);
    N_(centre)(p, (const REAL *)g->shift, D, m);
    const VEC logs = N_(log_factors)(p->factor, D, g->full), one = (VEC){0} + (REAL)1;
    REAL *place = out, *size = out + F * stride;
    for (Py_ssize_t i = 0; i < D; ++i) {
        for (Py_ssize_t j = g->full ? 0 : i; j <= i; ++j, place += stride)
            STORE(place, AT(covariance, g->full ? i * D + j : i) + AT(m, i) * AT(m, j));
        STORE(size + i * stride, LOAD(place - stride));
        STORE(out + (F - 1 - D + i) * stride, AT(m, i));
    }
    STORE(out + (F - 1) * stride, one);
    STORE(size + D * stride, one);
    STORE(size + (D + 1) * stride, SELECT((IVEC)(logs < 0), -logs, logs));
    return logs - (REAL)0.5 * (REAL)D;
}

/* −η_q: ½ Λ_ii, Λ_ij (i > j), −Λ m, ½ mᵀ Λ m + ½ log |Σ|; then what B takes of q: Λ_ii, then
 * Σ_i Λ_ii m_i² + |½ log |Σ|| + D, 1. Λ = P Pᵀ. */
KERNEL void N_(naturals)(const Divergence *g, const N_(Lanes) *q, REAL *restrict work, Py_ssize_t stride,
                         REAL *restrict out) {
    const Py_ssize_t D = g->D, F = N_(feature_count)(D, g->full), width = g->full ? D * D : D;
    REAL *factor = work, *precision = factor + width * LANES, *m = precision + width * LANES, *y = m + D * LANES;
    N_(gather)(q->factor, NULL, width, factor);
    N_(centre)(q, (const REAL *)g->shift, D, m);
    const VEC logs = N_(log_factors)(q->factor, D, g->full);
    VEC distance = {0}, size = SELECT((IVEC)(logs < 0), -logs, logs) + (REAL)D;
    if (g->full) {
        const N_(Matrix) P = {factor, D, 1}, transposed = {factor, 1, D};
        N_(product)(N_(UPPER_BY_LOWER), P, transposed, D, precision);
        distance = N_(squared_distance)(factor, m, D, y);
    }
    REAL *place = out;
    for (Py_ssize_t i = 0; i < D; ++i) {
        const VEC diagonal = g->full ? AT(precision, i * D + i) : AT(factor, i) * AT(factor, i);
        VEC linear = {0};
        for (Py_ssize_t j = 0; g->full && j < i; ++j, place += stride) STORE(place, AT(precision, i * D + j));
        STORE(place, (REAL)0.5 * diagonal);
        place += stride;
        for (Py_ssize_t k = i; g->full && k < D; ++k) linear += AT(factor, i * D + k) * AT(y, k);
        if (!g->full) linear = diagonal * AT(m, i), distance += linear * AT(m, i);
        STORE(out + (F - 1 - D + i) * stride, -linear);
        STORE(out + (F + i) * stride, diagonal);
        size += diagonal * AT(m, i) * AT(m, i);
    }
    STORE(out + (F - 1) * stride, (REAL)0.5 * distance - logs);
    STORE(out + (F + D) * stride, size);
    STORE(out + (F + D + 1) * stride, (VEC){0} + (REAL)1);
}

#define COLUMNS 128 /* of a tile of −η; a multiple of 4 LANES */
#define STRIDE (COLUMNS + LANES)
#define CHUNK 64 /* rows of E φ that are multiplied with it at once; a multiple of every LOGIT_ROWS */

/* One thread's memory for all pairs. */
typedef struct {
    REAL *work, *natural, *divergences, *sizes, *packed, *negative_entropy;
    Py_ssize_t rows, columns[VECTOR_LANES], lanes_rows[VECTOR_LANES], waiting;
} N_(Tiles);

INLINE Py_ssize_t N_(work_size)(Py_ssize_t D, int full) {
    const Py_ssize_t width = full ? D * D : D, features = N_(feature_count)(D, full) + D + 2;
    return (5 * width + 3 * D + (features > D ? features : D)) * LANES;
}

/* Bytes for `rows` rows of all pairs; for pairs `rows` is 0. */
KERNEL Py_ssize_t N_(divergence_workspace_size)(Py_ssize_t D, int full, Py_ssize_t rows) {
    const Py_ssize_t features = N_(feature_count)(D, full) + D + 2;
    const Py_ssize_t tiles = rows ? (features + 2 * CHUNK) * STRIDE + rows * (features + 1) + LANES : 0;
    return (N_(work_size)(D, full) + tiles) * sizeof(REAL) + 64;
}

/* E φ of rows [row, last_row) as logit_tile reads it: blocks of rows, feature by feature. */
KERNEL void N_(pack_expectations)(const Divergence *g, Py_ssize_t row, Py_ssize_t last_row, N_(Tiles) *t) {
    const Py_ssize_t D = g->D, features = N_(feature_count)(D, g->full) + D + 2, rows = last_row - row;
    REAL *tile = t->work + N_(work_size)(D, g->full) - features * LANES;
    for (Py_ssize_t k = 0, block = 0; k < rows; k += LANES) {
        const Py_ssize_t count = rows - k < LANES ? rows - k : LANES;
        Py_ssize_t index[VECTOR_LANES];
        for (Py_ssize_t l = 0; l < LANES; ++l) index[l] = row + k + l;
        N_(Lanes) p;
        N_(lanes_of)(&g->p, index, count, &p);
        const VEC entropy = N_(expectations)(g, &p, t->work, LANES, tile);
        for (Py_ssize_t l = 0; l < count; ++l) {
            t->negative_entropy[k + l] = entropy[l];
            while (k + l >= block + N_(block_rows)(rows - block)) block += N_(block_rows)(rows - block);
            const Py_ssize_t height = N_(block_rows)(rows - block);
            REAL *place = t->packed + block * features + (k + l - block);
            for (Py_ssize_t f = 0; f < features; ++f) place[f * height] = tile[f * LANES + l];
        }
    }
}

/* The pairs that wait, from the Gaussians themselves. */
KERNEL void N_(compute_again)(const Divergence *g, N_(Tiles) *t) {
    if (!t->waiting) return;
    const VEC divergence = N_(lane_pairs)(g, t->lanes_rows, t->columns, t->waiting, t->work);
    for (Py_ssize_t l = 0; l < t->waiting; ++l)
        *(double *)(g->out + t->lanes_rows[l] * g->row_stride + t->columns[l] * g->column_stride) = divergence[l];
    t->waiting = 0;
}

/* One row of a tile to the caller's: −H_p − ⟨η_q, E φ⟩, or a place in the queue where that is small beside B. */
INLINE void N_(write_row)(const Divergence *g, Py_ssize_t row, Py_ssize_t column, Py_ssize_t count, REAL entropy,
                          REAL *restrict divergence, const REAL *restrict size, N_(Tiles) *t) {
    const REAL guard = (REAL)g->guard;
    char *out = g->out + row * g->row_stride + column * g->column_stride;
    for (Py_ssize_t n = 0; n < count; n += LANES) {
        const VEC value = LOAD(divergence + n) + entropy;
        const IVEC exact = (IVEC)(value >= guard * LOAD(size + n));
        STORE(divergence + n, value);
        Py_ssize_t right = 0, width = count - n < LANES ? count - n : LANES;
        for (int l = 0; l < VECTOR_LANES; ++l) right += exact[l] != 0;
        for (Py_ssize_t l = 0; right < LANES && l < width; ++l) {
            if (exact[l]) continue;
            t->lanes_rows[t->waiting] = row;
            t->columns[t->waiting++] = column + n + l;
            if (t->waiting == LANES) N_(compute_again)(g, t);
        }
        for (Py_ssize_t l = 0; l < width; ++l)
            if (right == LANES || exact[l]) *(double *)(out + (n + l) * g->column_stride) = divergence[n + l];
    }
}

/* out_ij ← KL(p_i ‖ q_j) for one block of rows and columns. */
KERNEL void N_(all_pairs)(const Divergence *g, Py_ssize_t row, Py_ssize_t last_row, Py_ssize_t column,
                          Py_ssize_t last_column, char *workspace) {
    const Py_ssize_t D = g->D, F = N_(feature_count)(D, g->full), features = F + D + 2, rows = last_row - row;
    N_(Tiles) t = {.work = N_(aligned)(workspace), .rows = rows};
    t.natural = t.work + N_(work_size)(D, g->full);
    t.divergences = t.natural + features * STRIDE;
    t.sizes = t.divergences + CHUNK * STRIDE;
    t.packed = t.sizes + CHUNK * STRIDE;
    t.negative_entropy = t.packed + rows * features;
    N_(pack_expectations)(g, row, last_row, &t);
    for (Py_ssize_t start = column; start < last_column; start += COLUMNS) {
        const Py_ssize_t count = last_column - start < COLUMNS ? last_column - start : COLUMNS;
        const Py_ssize_t columns = (count + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
        for (Py_ssize_t n = 0; n < columns; n += LANES) {
            Py_ssize_t index[VECTOR_LANES];
            for (Py_ssize_t l = 0; l < LANES; ++l) index[l] = start + (n + l < count ? n + l : count - 1);
            N_(Lanes) q;
            N_(lanes_of)(&g->q, index, LANES, &q);
            N_(naturals)(g, &q, t.work, STRIDE, t.natural + n);
        }
        for (Py_ssize_t k = 0; k < rows; k += CHUNK) {
            const Py_ssize_t height = rows - k < CHUNK ? rows - k : CHUNK;
            const REAL *packed = t.packed + k * features;
            N_(logit_tile)(packed, height, features, 0, F, t.natural, columns, STRIDE, 0, t.divergences);
            N_(logit_tile)(packed, height, features, F, D + 2, t.natural + F * STRIDE, columns, STRIDE, 0, t.sizes);
            for (Py_ssize_t i = 0; i < height; ++i)
                N_(write_row)(g, row + k + i, start, count, t.negative_entropy[k + i], t.divergences + i * STRIDE,
                              t.sizes + i * STRIDE, &t);
        }
    }
    N_(compute_again)(g, &t);
}

static const Divergence_functions N_(divergence_functions) = {LEVEL_NAME, N_(divergence_workspace_size), N_(pairs),
                                                              N_(all_pairs), N_(precision_factors)};

#include "vectors_end.h"
#undef AT
#undef PUT
#undef COLUMNS
#undef STRIDE
#undef CHUNK
#undef FETCH_AHEAD
