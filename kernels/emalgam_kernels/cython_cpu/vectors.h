/* Vectors for every arithmetic type and instruction set: their types, exp, log and square root. */
#pragma once
#include <Python.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "simd.h"

#define BODY "vector_functions.h"
#include "levels.h"
#undef BODY
