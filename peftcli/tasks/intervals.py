"""95 % intervals: how far off a number may be that was measured on so few rows. N rows, R resamples."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959964
DRAWS = 1000
"""Bootstrap samples."""
AT_ONCE = 2**22
"""Counts held at a time, 32 MB."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): honest near 0 and 1 and for small n."""
    centre = share + Z_95**2 / (2 * n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def of_mean(values: Sequence[float], proportion: bool = False) -> tuple[float, float]:
    """Of a mean over rows: Wilson's for a proportion of right rows, else the bootstrap's percentiles.

    Args:
        values: Each row's [N].
        proportion: Whether a row is right or wrong, and not by chance 0 or 1; a share of its samples may be between.
    """
    if proportion and all(value in (0, 1) for value in values):
        return wilson(sum(values) / len(values), len(values))
    return of_ratio(values, [1] * len(values))


def of_ratio(totals: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Of sum(totals) / sum(weights), such as the loss a token, by drawing rows anew (Efron 1979); the same every time.

    Args:
        totals: What each row adds above the line [N].
        weights: What it adds below it [N], not all nought.
    """
    import numpy as np

    generator, n = np.random.default_rng(0), len(totals)
    shares_N = np.full(n, 1 / n)
    size = max(1, AT_ONCE // n)
    parts = []
    for at in range(0, DRAWS, size):
        counts_RN = generator.multinomial(n, shares_N, size=min(size, DRAWS - at))
        parts.append((counts_RN @ np.asarray(totals)) / (counts_RN @ np.asarray(weights)))
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
    return float(low), float(high)
