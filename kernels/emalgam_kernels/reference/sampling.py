"""Random numbers, samples of mixtures and Monte Carlo divergences in plain NumPy: the specification of these kernels.

Every number is a function of (seed, stream, row, block), as `emalgam_kernels.philox` says: any rows can be drawn alone,
in any order and on any backend. Uniforms and labels have the same bits everywhere, normals agree to a few ulp.
"""

from __future__ import annotations

import numpy as np

from emalgam_kernels import contract
from emalgam_kernels.alias import stratum_ends
from emalgam_kernels.blocks import for_each_block
from emalgam_kernels.monte_carlo import one_by_one, sum_log_ratios
from emalgam_kernels.parameters import Direct, Packed, Sampler, take
from emalgam_kernels.philox import (
    KEY_INCREMENTS,
    LABELS,
    MULTIPLIERS,
    NORMALS,
    OFFSET,
    ROUNDS,
    UNIFORMS_PER_BLOCK,
    key,
)
from emalgam_kernels.reference.mixture import log_prob

ROWS_AT_ONCE = 4096
LOW = np.uint64(0xFFFFFFFF)


def philox_words(seed: int, stream: int, block: int, first: int, out: np.ndarray) -> None:
    """The four words of Philox4x32-10 of each row: what all other kernels here are made of.

    Parameters
    ----------
    seed : int
        The key, in [0, 2⁶⁴).
    stream, block : int
        The third and fourth words of the counter, in [0, 2³²).
    first : int
        The number of the row that `out` begins with, in [0, 2⁶⁴): the first two words of the counter.
    out : (n, 4) uint32
        Receives the words.

    References
    ----------
    Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC'11.

    >>> words = np.empty((1, 4), np.uint32)
    >>> philox_words(0, 0, 0, 0, words)
    >>> [f"{word:08x}" for word in words[0]]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    contract.philox_words(seed, stream, block, first, out)
    rows = np.uint64(first) + np.arange(len(out), dtype=np.uint64)
    out[...] = np.stack(_words(seed, stream, block, rows), axis=1)


def uniforms(seed: int, stream: int, first: int, out: np.ndarray) -> None:
    """The first uniform of each row's block 0, in the open interval (0, 1).

    Parameters
    ----------
    seed, stream, first
        As in `philox_words`. Streams 0, 1 and 2 are those of labels, normals and the offset of stratified draws.
    out : (n,) float64 or float32
        Receives the uniforms: multiples of 2⁻⁵³, or 2⁻²⁴, and the same bits on every backend.

    >>> out = np.empty(2)
    >>> uniforms(seed=1, stream=3, first=0, out=out)
    >>> bool((0 < out).all() and (out < 1).all())
    True
    """
    contract.uniforms(seed, stream, first, out)
    rows = np.uint64(first) + np.arange(len(out), dtype=np.uint64)
    out[...] = _uniforms(seed, stream, 0, rows, str(out.dtype))[0]


def normals(seed: int, stream: int, first: int, out: np.ndarray, n_threads: int = 1) -> None:
    """Standard normals by the Box-Muller transform, both halves used.

    Row i takes the uniforms u₁, u₂ … of its blocks 0, 1 …, and each pair of them gives the next two normals

        √(−2 ln u₁) cos 2πu₂,   √(−2 ln u₁) sin 2πu₂.

    Parameters
    ----------
    seed, stream, first
        As in `philox_words`.
    out : (n, D) float64 or float32, any strides
        Receives the normals: |ε| < 8.6, or 5.8 in float32, whose uniforms have 23 bits.
    n_threads : int
        Threads to use; the result has the same bits for every number.

    References
    ----------
    Box, Muller (1958), Annals of Mathematical Statistics 29, 610-611.
    """
    contract.normals(seed, stream, first, out)

    def block(start: int, stop: int) -> None:
        rows = np.uint64(first) + np.arange(start, stop, dtype=np.uint64)
        out[start:stop] = _normals(seed, stream, rows, out.shape[1], str(out.dtype))

    for_each_block(block, len(out), ROWS_AT_ONCE, n_threads)


def sample_mixture(
    sampler: Sampler,
    seed: int,
    first: int,
    out: np.ndarray,
    labels: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
) -> None:
    """Rows [first, first + n) of the samples x = μ_k + L_k ε of a mixture.

    Parameters
    ----------
    sampler : Sampler
        The mixture.
    seed, first
        As in `philox_words`.
    out : (n, D) float64 or float32, any strides
        Receives the samples; its dtype is that of the normals and of the arithmetic.
    labels : (n,) int64, any strides
        Receives the labels k, which do not depend on the dtype of `out`.
    draw : {"plain", "antithetic", "stratified"}
        "plain": the label of row i is that of column ⌊u₁ K⌋ of the alias table, kept if u₂ < probability, for the
        float64 uniforms u₁, u₂ of stream 0; ε are the normals of stream 1. "antithetic": rows 2 j and 2 j + 1 take the
        label and the noise of row j, the second with −ε. "stratified": labels as in
        `emalgam_kernels.alias.stratum_ends` over ``sampler.n_total`` rows, in ascending order.
    n_threads : int
        Threads to use; the result has the same bits for every number.
    """
    contract.sample_mixture(sampler, seed, first, out, labels, draw)
    ends = ends_of_strata(sampler, seed) if draw == "stratified" else None

    def block(start: int, stop: int) -> None:
        rows = np.uint64(first) + np.arange(start, stop, dtype=np.uint64)
        drawn = rows >> np.uint64(1) if draw == "antithetic" else rows
        k = _labels(sampler, seed, drawn) if ends is None else _strata(ends, drawn)
        noise = _normals(seed, NORMALS, drawn, out.shape[1], str(out.dtype))
        if draw == "antithetic":
            noise[rows % np.uint64(2) == 1] *= -1
        labels[start:stop] = k
        out[start:stop] = _affine(sampler, k, noise)

    for_each_block(block, len(out), ROWS_AT_ONCE, n_threads)


def kl_monte_carlo(
    sampler: Sampler,
    p: Packed | Direct,
    q: Packed | Direct,
    seed: int,
    first: int,
    n: int,
    out: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
    control: tuple[Packed, Packed] | None = None,
) -> None:
    """Σ d and Σ d² of d = log p(x) − log q(x), in nats, over n samples x that are never stored: for B pairs (p, q).

    Parameters
    ----------
    sampler : Sampler
        Draws from p: a stack of B.
    p, q : Packed or Direct
        The two mixtures of each pair: stacks of B. Samples have the dtype of p's arithmetic.
    seed, first, draw
        As in `sample_mixture`: every pair has the same random numbers.
    n : int
        The number of samples of each pair: those of rows [first, first + n).
    out : (B, 2) float64, or (B, 5) with a control
        Receives Σ d, Σ d², and with a control Σ c, Σ c², Σ d c: of each pair what a stack of it alone gives, bit by
        bit. They are over samples, whatever `draw` is: Σ d² gives the standard error of plain draws only, as others
        are not independent.
    n_threads : int
        Threads to use; the result has the same bits for every number.
    control : (Packed, Packed), optional
        A control variate c = log g_p(x) − log g_q(x), such as two single Gaussians with the moments of p and q, for
        which the mean of c under p is known: stacks of B.

    References
    ----------
    Hershey, Olsen (2007), section 2 (Monte Carlo sampling); Glasserman (2003), section 4.1 (control variates).
    """
    contract.kl_monte_carlo(sampler, p, q, seed, first, n, out, draw, control)

    def sample(pair: int, start: int, x: np.ndarray, labels: np.ndarray) -> None:
        sample_mixture(take(sampler, pair), seed, first + start, x, labels, draw)

    def log_density(density: int, pair: int, x: np.ndarray, out: np.ndarray) -> None:
        log_prob(x, take(densities[density], pair), out)

    densities, D = (p, q, *(control or ())), sampler.n_features
    evaluate = one_by_one(sample, log_density, D, p.arithmetic)
    sum_log_ratios(evaluate, len(densities), D, n, out, n_threads)


def _words(seed: int, stream: int, block: int, rows: np.ndarray) -> list[np.ndarray]:
    """Philox4x32-10 of the counters (low, high half of the row, stream, block): four (n,) uint64 below 2³²."""
    c_0, c_1 = rows & LOW, rows >> np.uint64(32)
    c_2, c_3 = np.full_like(rows, stream), np.full_like(rows, block)
    k_0, k_1 = key(seed)
    for _ in range(ROUNDS):
        product_0, product_1 = c_0 * np.uint64(MULTIPLIERS[0]), c_2 * np.uint64(MULTIPLIERS[1])
        c_0, c_1 = (product_1 >> np.uint64(32)) ^ c_1 ^ np.uint64(k_0), product_1 & LOW
        c_2, c_3 = (product_0 >> np.uint64(32)) ^ c_3 ^ np.uint64(k_1), product_0 & LOW
        k_0, k_1 = (k_0 + KEY_INCREMENTS[0]) & 0xFFFFFFFF, (k_1 + KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return [c_0, c_1, c_2, c_3]


def _uniforms(seed: int, stream: int, block: int, rows: np.ndarray, dtype: str) -> list[np.ndarray]:
    """The block's uniforms: two (n,) float64, or four (n,) float32."""
    words = _words(seed, stream, block, rows)
    if dtype == "float32":
        return [((w >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23) for w in words]
    integers = ((high << np.uint64(32) | low) >> np.uint64(12) for low, high in (words[:2], words[2:]))
    return [(integer.astype(np.float64) + 0.5) * 2.0**-52 for integer in integers]


def _normals(seed: int, stream: int, rows: np.ndarray, n_features: int, dtype: str) -> np.ndarray:
    """(n, D) normals of the rows."""
    drawn = []
    for block in range(-(-n_features // UNIFORMS_PER_BLOCK[dtype])):
        u = _uniforms(seed, stream, block, rows, dtype)
        for u_1, u_2 in zip(u[::2], u[1::2], strict=True):
            radius = np.sqrt(-2 * np.log(u_1))
            cosine, sine = _cos_sin(u_2)
            drawn += [radius * cosine, radius * sine]
    return np.stack(drawn[:n_features], axis=1)


def _cos_sin(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos 2πu and sin 2πu. 4 u = quadrant + r is exact, so neither loses digits where it is small."""
    quadrant = np.rint(4 * u)
    angle = (4 * u - quadrant) * u.dtype.type(np.pi / 2)
    cosine, sine = np.cos(angle), np.sin(angle)
    turns = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)]
    which = quadrant.astype(np.int64) % 4
    return np.choose(which, [c for c, _ in turns]), np.choose(which, [s for _, s in turns])


def _labels(sampler: Sampler, seed: int, rows: np.ndarray) -> np.ndarray:
    """(n,) labels by the alias table."""
    u_1, u_2 = _uniforms(seed, LABELS, 0, rows, "float64")
    column = (u_1 * sampler.n_components).astype(np.int64)
    return np.where(u_2 < sampler.table.probability[column], column, sampler.table.alias[column])


def ends_of_strata(sampler: Sampler, seed: int) -> np.ndarray:
    """`stratum_ends` with the offset of the stratified draws of a seed."""
    offset = np.empty(1)
    uniforms(seed, OFFSET, 0, offset)
    return stratum_ends(sampler.weights, sampler.n_total, float(offset[0]))


def _strata(ends: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) labels by the rows of the strata."""
    return np.searchsorted(ends, (rows % np.uint64(ends[-1])).astype(np.int64), side="right")


def _affine(sampler: Sampler, labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """μ_k + L_k ε, (n, D), one column of L_k after the other: no product whose rounding depends on the rows beside."""
    x = sampler.means.astype(noise.dtype)[labels]
    factors = sampler.factors.astype(noise.dtype)
    if sampler.diagonal:
        return x + factors[labels] * noise
    for j in range(noise.shape[1]):
        x[:, j:] += factors[labels, j:, j] * noise[:, j, None]
    return x
