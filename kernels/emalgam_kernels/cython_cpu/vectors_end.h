/* What vectors_begin.h defined, undone for the next type and level. */

#undef LANES
#undef IS_FLOAT64
#undef VEC
#undef IVEC
#undef INLINE
#undef KERNEL
#undef LOAD
#undef STORE
#undef SELECT
