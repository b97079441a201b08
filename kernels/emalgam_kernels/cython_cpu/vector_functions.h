/* Vectors of one arithmetic type and instruction set; levels.h includes this file once for every pair. */

#include "vectors_begin.h"

typedef REAL VEC __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER IVEC __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL N_(anywhere) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* ---- exp and log ------------------------------------------------------------------------------------------- */

/* How finely exp is reduced: to r = x − n ln 2 / S. Two registers of AVX-512 hold a table of 2^(j/S), j < S. */
#if defined(__x86_64__) && VECTOR_BYTES == 64
#define STEPS P_(EXP_STEPS)
#define STEP_COEFFICIENTS P_(EXP_OF_A_STEP)
#else
#define STEPS 1
#define STEP_COEFFICIENTS P_(EXP_COEFFICIENTS)
#endif

/* 2^(n/S) for n = S e + j in the low bits of `shifted`: they move so that e adds to the exponent of the table's j. */
INLINE VEC N_(two_to_the)(IVEC shifted) {
    const IVEC exponent = shifted << (MANTISSA_BITS - __builtin_ctz(STEPS));
#if defined(__x86_64__) && VECTOR_BYTES == 64
    static const INTEGER table[STEPS] = {P_(EXP_TABLE)};
    const __m512i low = _mm512_loadu_si512(table), high = _mm512_loadu_si512(table + STEPS / 2);
#if IS_FLOAT64
    return (VEC)(exponent + (IVEC)_mm512_permutex2var_epi64(low, (__m512i)shifted, high));
#else
    return (VEC)(exponent + (IVEC)_mm512_permutex2var_epi32(low, (__m512i)shifted, high));
#endif
#else
    return (VEC)(exponent + (EXPONENT_BIAS << MANTISSA_BITS));
#endif
}

/* exp(x), x ≤ 0, or ≤ 650 in float64: n = round(x S log2 e), r = x − n ln 2 / S, exp(x) = 2^(n/S) (1 + r + r² q(r)); 0
 * below the normal range. */
INLINE VEC N_(exp)(VEC x) {
    static const REAL q[] = {STEP_COEFFICIENTS};
    const VEC shifted = x * (P_(LOG2_E) * STEPS) + ROUND_TO_INTEGER;
    const VEC n = shifted - ROUND_TO_INTEGER;
    const VEC r = (x - n * (P_(LN2_HIGH) / STEPS)) - n * (P_(LN2_LOW) / STEPS);
    VEC p = r * q[0] + q[1];
#pragma GCC unroll 16
    for (size_t i = 2; i < sizeof(q) / sizeof(q[0]); ++i) p = p * r + q[i];
    const VEC power = N_(two_to_the)((IVEC)shifted);
    return (VEC)((IVEC)((p * (r * r) + r) * power + power) & ~(IVEC)(x < P_(EXP_UNDERFLOW)));
}

#undef STEPS
#undef STEP_COEFFICIENTS

/* log(x) for normal x > 0: x = 2ᵉ (1 + f), s = f / (2 + f), log(1 + f) = f − (f²/2 − s (f²/2 + s² p(s²))). NaN stays.
 */
INLINE VEC N_(log)(VEC x) {
    static const REAL c[] = {P_(LOG_COEFFICIENTS)};
    const VEC one = x - x + (REAL)1;
    const IVEC bits = (IVEC)x;
    /* The exponent that leaves a mantissa in [√½, √2). */
    const IVEC e = ((bits - SQRT_HALF_BITS) >> MANTISSA_BITS);
    const VEC f = (VEC)(bits - (e << MANTISSA_BITS)) - one;
    const VEC exponent = (VEC)(e + ROUND_TO_INTEGER_BITS) - ROUND_TO_INTEGER;
    const VEC s = f / (f + (REAL)2), z = s * s, half = (REAL)0.5 * f * f;
    VEC p = z * c[0] + c[1];
#pragma GCC unroll 16
    for (size_t i = 2; i < sizeof(c) / sizeof(c[0]); ++i) p = p * z + c[i];
    return exponent * P_(LN2_HIGH) + (f - (half - (s * (half + z * p) + exponent * P_(LN2_LOW))));
}

/* ---- square root -------------------------------------------------------------------------------------------- */

/* √x: GNU C has none of vectors. */
INLINE VEC N_(square_root)(VEC x) {
#if defined(__x86_64__) && VECTOR_BYTES == 64 && IS_FLOAT64
    return (VEC)_mm512_sqrt_pd((__m512d)x);
#elif defined(__x86_64__) && VECTOR_BYTES == 64
    return (VEC)_mm512_sqrt_ps((__m512)x);
#elif defined(__x86_64__) && VECTOR_BYTES == 32 && IS_FLOAT64
    return (VEC)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (VEC)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__) && IS_FLOAT64
    return (VEC)_mm_sqrt_pd((__m128d)x);
#elif defined(__x86_64__)
    return (VEC)_mm_sqrt_ps((__m128)x);
#else
    for (Py_ssize_t i = 0; i < LANES; ++i) x[i] = IS_FLOAT64 ? __builtin_sqrt(x[i]) : __builtin_sqrtf(x[i]);
    return x;
#endif
}

#include "vectors_end.h"
