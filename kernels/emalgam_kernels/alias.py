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
    weights : (K,) float64
        Non-negative; they need not sum to one. A label of weight zero is never drawn.

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
    excess = _normalised(weights) * len(weights)
    probability, alias = np.ones(len(excess)), np.arange(len(excess), dtype=np.int32)
    small = [k for k in range(len(excess)) if excess[k] < 1][::-1]
    large = [k for k in range(len(excess)) if excess[k] >= 1][::-1]
    while small and large:
        k, giver = small.pop(), large[-1]
        probability[k], alias[k] = excess[k], giver
        excess[giver] -= 1 - excess[k]
        if excess[giver] < 1:
            small.append(large.pop())
    # What is left differs from 1 by rounding, except for zeros, which must not be drawn.
    most_likely = int(np.argmax(weights))
    for k in small:
        if weights[k] == 0:
            probability[k], alias[k] = 0, most_likely
    return AliasTable(probability, alias)


def stratum_ends(weights: np.ndarray, n_total: int, offset: float) -> np.ndarray:
    """Row i of `n_total` has the first label k with i < ends_k: systematic inversion of (i + offset) / n_total.

    Label k gets ⌊n_total w_k⌋ or ⌈n_total w_k⌉ rows (one more or less by rounding alone), n_total w_k in the mean over
    a uniform offset.

    Parameters
    ----------
    weights : (K,) float64
        As in `alias_table`.
    n_total : int
    offset : float
        In (0, 1).

    Returns
    -------
    (K,) int64

    References
    ----------
    Cochran (1977), Sampling Techniques, chapter 8 (systematic sampling).

    >>> stratum_ends(np.array([0.5, 0.3, 0.2]), 10, 0.5)
    array([ 5,  8, 10])
    """
    cumulative = np.cumsum(_normalised(weights))
    ends = np.clip(np.ceil(n_total * cumulative - offset), 0, n_total).astype(np.int64)
    ends[int(np.flatnonzero(weights)[-1]) :] = n_total
    return ends


def _normalised(weights: np.ndarray) -> np.ndarray:
    """weights / Σ weights, as new float64."""
    w = np.array(weights, np.float64)
    for k in np.flatnonzero(~(np.isfinite(w) & (w >= 0)))[:1]:
        raise ValueError(f"weights[{k}] is {w[k]}; expected finite numbers that are not negative")
    total = math.fsum(w)
    if not total > 0:
        raise ValueError(f"the weights sum to {total}; expected at least one that is positive")
    return w / total
