/* Names of what is compiled once for each arithmetic type and SIMD level, and the choice of a level at run time. */
#pragma once
#include <string.h>
#include "polynomials.h"

#define JOIN3_(a, b, c) a##_##b##_##c
#define JOIN3(a, b, c) JOIN3_(a, b, c)
#define JOIN2_(a, b) a##_##b
#define JOIN2(a, b) JOIN2_(a, b)
#define N_(name) JOIN3(name, TYPE, LEVEL)
#define P_(name) JOIN2(name, TYPE)

/* The functions for this processor; `wanted` (or NULL) asks for a lower level: "v4", "v3" or "baseline". */
static inline int simd_level(const char *wanted) {
    int level = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) level = 1;
    if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        level = 2;
#endif
    const int most = !wanted || !strcmp(wanted, "v4") ? 2 : !strcmp(wanted, "v3") ? 1 : 0;
    return level < most ? level : most;
}
