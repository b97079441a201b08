/* The file BODY for every instruction set and arithmetic type. No include guard: each header that holds code for vectors
 * defines BODY and includes this. */

#if defined(__x86_64__)
#define LEVEL v4
#define LEVEL_NAME "x86-64-v4 (AVX-512)"
#define TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define VECTOR_BYTES 64
#define LANES_OF_FLOAT64 8
#define LANES_OF_FLOAT32 16
#define LOGIT_ROWS 8
#define STATISTIC_ROWS 4
#define STATISTIC_COLUMNS 6
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
