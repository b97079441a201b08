/* The numbers of emalgam_kernels/polynomials.py (which says where they come from), highest degree first. */
#pragma once

#define EXP_COEFFICIENTS_f64 \
    0x1.af389ecfc4b9cp-26, 0x1.28917c89a43a7p-22, 0x1.71de0db2f6b19p-19, 0x1.a019b9149a41cp-16, \
    0x1.a01a01a7c2efep-13, 0x1.6c16c17889ef1p-10, 0x1.11111111109b5p-7, 0x1.5555555553d68p-5, \
    0x1.5555555555556p-3, 0x1.0000000000001p-1
#define EXP_COEFFICIENTS_f32 0x1.6d10fcp-10f, 0x1.120b62p-7f, 0x1.55551ap-5f, 0x1.5554dep-3f, 0x1.000000p-1f

/* The bits of 2^(j/S) less j in the place that n = S e + j has when it is shifted so that e meets the exponent. */
#define EXP_STEPS_f64 16
#define EXP_STEPS_f32 32
#define EXP_OF_A_STEP_f64 \
    0x1.6c17bb51f236dp-10, 0x1.11120af701debp-7, 0x1.55555555194d2p-5, 0x1.55555554dd44dp-3, 0x1.0000000000000p-1
#define EXP_OF_A_STEP_f32 0x1.555596p-3f, 0x1.000052p-1f
#define EXP_TABLE_f64 \
    0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238, \
    0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429, \
    0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090, \
    0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da
#define EXP_TABLE_f32 \
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, \
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, \
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, \
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3

#define LOG_COEFFICIENTS_f64 \
    0x1.2b584aae78a57p-3, 0x1.39fe606542ddep-3, 0x1.7462b4ab2ef6bp-3, 0x1.c71c62e5800a1p-3, \
    0x1.2492492df148dp-2, 0x1.99999999952e2p-2, 0x1.5555555555558p-1
#define LOG_COEFFICIENTS_f32 0x1.2ee610p-2f, 0x1.997c30p-2f, 0x1.55555cp-1f

#define LOG2_E_f64 0x1.71547652b82fep+0
#define LOG2_E_f32 0x1.715476p+0f
#define LN2_HIGH_f64 0x1.62e42fee00000p-1
#define LN2_HIGH_f32 0x1.62e000p-1f
#define LN2_LOW_f64 0x1.a39ef35793c76p-33
#define LN2_LOW_f32 0x1.0bfbe8p-15f
#define EXP_UNDERFLOW_f64 -708.0
#define EXP_UNDERFLOW_f32 -87.0f

#define SIN_COEFFICIENTS_f64 \
    0x1.e3f38399551bfp-25, -0x1.e30071afc3e59p-19, 0x1.50782fda12d96p-13, -0x1.32d2cce2e5b19p-8, \
    0x1.466bc677587f8p-4, -0x1.4abbce625be41p-1, 0x1.921fb54442d18p+0
#define SIN_COEFFICIENTS_f32 -0x1.2d9b40p-8f, 0x1.465ec4p-4f, -0x1.4abbbap-1f, 0x1.921fb6p+0f

#define COS_COEFFICIENTS_f64 \
    -0x1.b2f3eb054afcdp-28, 0x1.f9ce245cada0bp-22, -0x1.a6d1eef479be1p-16, 0x1.e1f5068688d5bp-11, \
    -0x1.55d3c7e3cb241p-6, 0x1.03c1f081b5ac0p-2, -0x1.3bd3cc9be45dep+0
#define COS_COEFFICIENTS_f32 0x1.db6492p-11f, -0x1.55cb98p-6f, 0x1.03c1eap-2f, -0x1.3bd3ccp+0f
