"""Categorical draws in constant time: the alias table, and the rows of each stratum of a stratified draw."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class AliasTable(NamedTuple):
    """Column k keeps its own label with `probability` and else gives `alias`; each of K columns is as likely.

    Attributes
    ----------
    probability : (K,) float64
    alias : (K,) int32
    """

    probability: np.ndarray
    alias: np.ndarray


def alias_table(weights: np.ndarray) -> AliasTable:
    """The alias table of `weights`, the same for the same weights on every machine.

    Parameters
    ----------
    weights : (..., K) float64
        Non-negative; they need not sum to one. A label of weight zero is never drawn. Leading axes are those of a
        stack of tables.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, or all are zero.

    References
    ----------
    Walker (1977), ACM TOMS 3, 253-256; Vose (1991), IEEE TSE 17, 972-975.

    >>> alias_table(np.array([0.5, 0.25, 0.25]))
    AliasTable(probability=array([1.  , 0.75, 0.75]), alias=array([0, 0, 0], dtype=int32))
    """
    w = _checked(weights)
    tables = [_columns(each) for each in w.reshape(-1, w.shape[-1]).tolist()]
    probability, alias = zip(*tables, strict=True) if tables else ((), ())
    return AliasTable(np.reshape(np.array(probability), w.shape), np.reshape(np.array(alias, np.int32), w.shape))


def _columns(weights: list[float]) -> tuple[list[float], list[int]]:
    """Probabilities and aliases of one table: Python's own numbers, which are quick where K is small."""
    K, total = len(weights), _total(weights)
    excess = [weight / total * K for weight in weights]
    probability, alias = [1.0] * K, list(range(K))
    small = [k for k in range(K) if excess[k] < 1][::-1]
    large = [k for k in range(K) if excess[k] >= 1][::-1]
    while small and large:
        k, giver = small.pop(), large[-1]
        probability[k], alias[k] = excess[k], giver
        excess[giver] -= 1 - excess[k]
        if excess[giver] < 1:
            small.append(large.pop())
    # What is left differs from 1 by rounding, except for zeros, which must not be drawn.
    most_likely = weights.index(max(weights))
    for k in small:
        if weights[k] == 0:
            probability[k], alias[k] = 0.0, most_likely
    return probability, alias


def stratum_ends(weights: np.ndarray, n_total: int, offset: float) -> np.ndarray:
    """Row i of `n_total` has the first label k with i < ends_k: systematic inversion of (i + offset) / n_total.

    Label k gets ⌊n_total w_k⌋ or ⌈n_total w_k⌉ rows (one more or less by rounding alone), n_total w_k in the mean over
    a uniform offset.

    Parameters
    ----------
    weights : (..., K) float64
        As in `alias_table`.
    n_total : int
    offset : float
        In (0, 1).

    Returns
    -------
    (..., K) int64

    References
    ----------
    Cochran (1977), Sampling Techniques, chapter 8 (systematic sampling).

    >>> stratum_ends(np.array([0.5, 0.3, 0.2]), 10, 0.5)
    array([ 5,  8, 10])
    """
    cumulative = np.cumsum(_normalised(weights), axis=-1)
    ends = np.clip(np.ceil(n_total * cumulative - offset), 0, n_total).astype(np.int64)
    last = np.shape(weights)[-1] - 1 - np.argmax(np.flip(weights, -1) > 0, axis=-1)
    ends[np.arange(ends.shape[-1]) >= last[..., None]] = n_total
    return ends


def _checked(weights: np.ndarray) -> np.ndarray:
    """Weights as float64, all finite and not negative."""
    w = np.asarray(weights, np.float64)
    for index in np.argwhere(~(np.isfinite(w) & (w >= 0)))[:1].tolist():
        where = ", ".join(map(str, index))
        raise ValueError(f"weights[{where}] is {w[tuple(index)]}; expected finite numbers that are not negative")
    return w


def _total(weights: list[float]) -> float:
    """Σ weights, rounded once."""
    total = math.fsum(weights)
    if not total > 0:
        raise ValueError(f"the weights sum to {total}; expected at least one that is positive")
    return total


def _normalised(weights: np.ndarray) -> np.ndarray:
    """weights / Σ weights, as new float64."""
    w = _checked(weights)
    totals = [_total(each) for each in w.reshape(-1, w.shape[-1]).tolist()]
    return w / np.reshape(totals, (*w.shape[:-1], 1))
