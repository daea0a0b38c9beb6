"""Rank correlations, plain and with a third row held fixed, and their bootstrap over clusters.

Spearman's: Pearson's of the ranks, tied values at their average rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000


def spearman(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float:
    """Rank correlation of (N,) and (N,), ties at their average rank; NaN if one is constant."""
    return float(correlations(np.array([x, y, y], np.float64))[0, 1])


def partial_spearman(
    x: Sequence[float] | Floats, y: Sequence[float] | Floats, fixed: Sequence[float] | Floats
) -> float:
    """Rank correlation of x and y with that of both to `fixed` taken out; all (N,)."""
    return float(correlations(np.array([x, fixed, y], np.float64))[1, 2])


def correlations(table: Floats) -> Floats:
    """One row (2, K) of `bootstrap`, of the table (K, N) as it is."""
    groups = [np.unique(row, return_inverse=True)[1] for row in table]
    return _correlations(groups, np.ones(table.shape[1]))


def bootstrap(table: Floats, clusters: NDArray[np.int64], *, seed: int) -> Floats:
    """The correlations in resamples that draw whole clusters with replacement.

    Equals ranking each resample by itself, but sorts once: a resample is a weight a pair, and the
    average rank of a tied group follows from the weights before it.

    Args:
        table: (K, N) judgement, what is held fixed, and the gaps.
        clusters: (N,) number of each pair's prompt, from 0.
        seed: of the draws.

    Returns:
        (RESAMPLES, 2, K): correlations with row 0, and with row 1 held fixed; NaN where not
        defined.
    """
    random = np.random.default_rng(seed)
    groups = [np.unique(row, return_inverse=True)[1] for row in table]
    count = int(clusters.max()) + 1
    draws = np.empty((RESAMPLES, 2, len(table)))
    for draw in draws:
        drawn = np.bincount(random.integers(0, count, count), minlength=count)
        draw[:] = _correlations(groups, drawn[clusters].astype(np.float64))
    return draws


def settled(values: Floats) -> Floats:
    """(N,) on another scale, and equal where only rounding had made a difference: 2/3 must tie with
    4/6, and 4.3 − 4.1 with 2.2 − 2."""
    largest = float(np.abs(values).max()) or 1.0
    return np.round(values / largest, 12)


def _correlations(groups: Sequence[NDArray[np.int64]], weights: Floats) -> Floats:
    """(2, K) correlations with row 0: plain, and with row 1 held fixed.

    Args:
        groups: K rows (N,), each pair's place among the different values of the row.
        weights: (N,) how often each pair counts.
    """
    ranks = np.stack([_ranks(row, weights) for row in groups])
    ranks = ranks - (ranks @ weights / weights.sum())[:, None]
    products = (ranks * weights) @ ranks.T
    sizes = np.sqrt(np.diag(products))
    with np.errstate(divide="ignore", invalid="ignore"):
        every = np.clip(products / np.outer(sizes, sizes), -1.0, 1.0)
        plain, with_fixed = every[0], every[1]
        rest = (1 - plain[1] ** 2) * (1 - with_fixed**2)  # what is left of both
        fixed = (plain - plain[1] * with_fixed) / np.sqrt(np.where(rest > 1e-12, rest, np.nan))
    return np.stack([plain, np.clip(fixed, -1.0, 1.0)])


def _ranks(groups: NDArray[np.int64], weights: Floats) -> Floats:
    """Average ranks, but for a constant that no correlation sees."""
    sizes = np.bincount(groups, weights)
    return (np.cumsum(sizes) - sizes / 2)[groups]
