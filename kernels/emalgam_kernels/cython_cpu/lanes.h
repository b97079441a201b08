/* Lanes for __builtin_shufflevector: EVEN_<lanes>_<group> takes the even groups of lanes of two vectors alternately,
 * ODD_ the odd ones. Both together are one step of a transposition, their sum one of a reduction; see tile.h.
 * BOTH_<lanes> joins two vectors of half as many lanes. */
#pragma once
#define EVEN_2_1 0, 2
#define ODD_2_1 1, 3
#define EVEN_4_1 0, 4, 2, 6
#define ODD_4_1 1, 5, 3, 7
#define EVEN_4_2 0, 1, 4, 5
#define ODD_4_2 2, 3, 6, 7
#define EVEN_8_1 0, 8, 2, 10, 4, 12, 6, 14
#define ODD_8_1 1, 9, 3, 11, 5, 13, 7, 15
#define EVEN_8_2 0, 1, 8, 9, 4, 5, 12, 13
#define ODD_8_2 2, 3, 10, 11, 6, 7, 14, 15
#define EVEN_8_4 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_8_4 4, 5, 6, 7, 12, 13, 14, 15
#define EVEN_16_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD_16_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define EVEN_16_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define ODD_16_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define EVEN_16_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define ODD_16_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define EVEN_16_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define ODD_16_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define BOTH_4 0, 1, 2, 3
#define BOTH_8 0, 1, 2, 3, 4, 5, 6, 7
#define BOTH_16 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
