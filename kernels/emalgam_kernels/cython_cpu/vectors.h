/* Vectors of the current arithmetic type and instruction set, and exp and log of them. No include guard: the body of a
 * loop over levels.h begins with this and ends with vectors_end.h. */

#define LANES ((Py_ssize_t)(VECTOR_BYTES / sizeof(REAL)))
typedef REAL N_(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER N_(ivec) __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL N_(anywhere) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#define VEC N_(vec)
#define IVEC N_(ivec)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define KERNEL static __attribute__((noinline)) TARGET
#define LOAD(p) ((VEC)(*(const N_(anywhere) *)(p)))
#define STORE(p, v) (*(N_(anywhere) *)(p) = (v))
#define SELECT(mask, a, b) ((VEC)(((IVEC)(a) & (mask)) | ((IVEC)(b) & ~(mask))))

/* ---- exp and log ------------------------------------------------------------------------------------------- */

/* exp(x) for x ≤ 0: n = round(x log2 e), r = x − n ln 2, exp(x) = 2ⁿ (1 + r + r² q(r)); 0 below the normal range. */
INLINE VEC N_(exp)(VEC x) {
    static const REAL q[] = {P_(EXP_COEFFICIENTS)};
    const VEC shifted = x * P_(LOG2_E) + ROUND_TO_INTEGER;
    const VEC n = shifted - ROUND_TO_INTEGER;
    const VEC r = (x - n * P_(LN2_HIGH)) - n * P_(LN2_LOW);
    VEC p = r * q[0] + q[1];
#pragma GCC unroll 16
    for (size_t i = 2; i < sizeof(q) / sizeof(q[0]); ++i) p = p * r + q[i];
    p = p * (r * r) + r + (REAL)1;
    /* The low bits of `shifted` hold n: move them into the exponent. */
    const VEC power = (VEC)(((IVEC)shifted << MANTISSA_BITS) + (EXPONENT_BIAS << MANTISSA_BITS));
    return (VEC)((IVEC)(p * power) & ~(IVEC)(x < P_(EXP_UNDERFLOW)));
}

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
