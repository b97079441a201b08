/* Short names for vectors of the current arithmetic type and instruction set. No include guard: the body of a loop over
 * levels.h begins with this and ends with vectors_end.h. */

#define LANES ((Py_ssize_t)(VECTOR_BYTES / sizeof(REAL)))
#define IS_FLOAT64 (VECTOR_LANES * 8 == VECTOR_BYTES)
#define VEC N_(vec)
#define IVEC N_(ivec)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define KERNEL static __attribute__((noinline)) TARGET
#define LOAD(p) ((VEC)(*(const N_(anywhere) *)(p)))
#define STORE(p, v) (*(N_(anywhere) *)(p) = (v))
#define SELECT(mask, a, b) ((VEC)(((IVEC)(a) & (mask)) | ((IVEC)(b) & ~(mask))))
