/* What vectors.h defined, undone for the next type and level. */

#undef LANES
#undef VEC
#undef IVEC
#undef INLINE
#undef KERNEL
#undef LOAD
#undef STORE
#undef SELECT
