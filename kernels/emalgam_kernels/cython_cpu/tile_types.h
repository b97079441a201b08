/* BODY for float64 and float32 at the current LEVEL, with the constants that depend on the type. No include guard:
 * levels.h includes this once for each level, and defines the level anew before. */

#define REAL double
#define INTEGER int64_t
#define TYPE f64
#define VECTOR_LANES LANES_OF_FLOAT64
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023LL
#define ROUND_TO_INTEGER 0x1.8p52
#define ROUND_TO_INTEGER_BITS 0x4338000000000000LL
#define SQRT_HALF_BITS 0x3fe6a09e667f3bcdLL
#include BODY
#undef REAL
#undef INTEGER
#undef TYPE
#undef VECTOR_LANES
#undef MANTISSA_BITS
#undef EXPONENT_BIAS
#undef ROUND_TO_INTEGER
#undef ROUND_TO_INTEGER_BITS
#undef SQRT_HALF_BITS

#define REAL float
#define INTEGER int32_t
#define TYPE f32
#define VECTOR_LANES LANES_OF_FLOAT32
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#define ROUND_TO_INTEGER 0x1.8p23f
#define ROUND_TO_INTEGER_BITS 0x4b400000
#define SQRT_HALF_BITS 0x3f3504f3
#include BODY
#undef REAL
#undef INTEGER
#undef TYPE
#undef VECTOR_LANES
#undef MANTISSA_BITS
#undef EXPONENT_BIAS
#undef ROUND_TO_INTEGER
#undef ROUND_TO_INTEGER_BITS
#undef SQRT_HALF_BITS

#undef LEVEL
#undef LEVEL_NAME
#undef TARGET
#undef VECTOR_BYTES
#undef LANES_OF_FLOAT64
#undef LANES_OF_FLOAT32
#undef LOGIT_ROWS
#undef STATISTIC_ROWS
#undef STATISTIC_COLUMNS
