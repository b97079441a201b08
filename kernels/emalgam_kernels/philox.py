"""The constants of Philox4x32-10 and what its counters mean here: the same in every backend.

A word is a function of (seed, stream, row, block): key = seed, its low 32 bits first; counter = (low 32 bits of the
row's number, high 32 bits, stream, block). The four words of a block become two float64 or four float32 uniforms:

- float64: ``((high : low) >> 12) + ½) · 2⁻⁵²`` of the words (low, high) = (w₀, w₁), then (w₂, w₃);
- float32: ``((w >> 9) + ½) · 2⁻²³`` of each word.

Both are exact, lie in the open interval (0, 1) and are symmetric about ½. (One bit more could not be: with the ½ it
would need 54, or 25, bits, and the largest would round to 1.) Adding ½ to an integer below 2⁵² rounds nothing, so
every backend gets the same bits.

References
----------
Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from typing import Final

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)  # of the golden ratio and √3 − 1
ROUNDS: Final = 10

# Streams that the samplers use; others are free.
LABELS: Final = 0
NORMALS: Final = 1
OFFSET: Final = 2  # of a stratified draw: the first uniform of row 0
ROWS_OF_A_SAMPLE: Final = 2**32 - 5  # which rows of data in parts a start looks at
PROBLEMS: Final = 2**32 - 1  # of many fits: row = the problem's number, whose first two words are the problem's own key
SEEDS: Final = 2**32 - 2  # with that key: where k-means++ starts
LABELS_OF_MANY: Final = 2**32 - 3  # of samples of many mixtures, one after the other
NORMALS_OF_MANY: Final = 2**32 - 4
RESPONSIBILITIES: Final = 2**32 - 6  # that EM may start with: row n K + k

UNIFORMS_PER_BLOCK: Final = {"float64": 2, "float32": 4}
DRAWS: Final = ("plain", "antithetic", "stratified")


def key(seed: int) -> tuple[int, int]:
    """The seed's low and high 32 bits.

    >>> key(2**32 + 7)
    (7, 1)
    """
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def rows_per_block(n_features: int) -> int:
    """Rows that a thread draws at once: a multiple of 512, a few hundred microseconds of work.

    >>> rows_per_block(8)
    16384
    """
    return min(max(2**17 // n_features // 512 * 512, 1024), 32768)
