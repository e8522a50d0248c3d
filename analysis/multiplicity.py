"""Corrections for many comparisons at once: p values (Holm) and differences between levels (Tukey)."""

from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats


def holm(p: "pd.Series[float]") -> "pd.Series[float]":
    """Return p values corrected for their number (Holm 1979)."""
    # statsmodels' own collects garbage at each call, which takes longer than the whole analysis of a small grid.
    return (p.sort_values() * np.arange(len(p), 0, -1)).cummax().clip(upper=1)


def level_quantile(levels: int, degrees: NDArray[np.float64], confidence: float) -> float:
    """Return how many standard errors a difference of two of so many levels reaches, whichever two are compared.

    Args:
        levels: Of the factor.
        degrees: Of freedom of each difference; the smallest one counts for all, rounded down to two digits.
        confidence: That all differences of the factor lie in their intervals, in (0, 1).

    Returns:
        NaN if the degrees of freedom are unknown.

    Reference: Tukey 1953; Kramer 1956, https://doi.org/10.2307/3001469
    """
    smallest = float(np.min(degrees))
    if not np.isfinite(smallest):
        return np.nan
    whole = max(1, int(smallest))
    digit = 10 ** max(0, len(str(whole)) - 2)
    return _studentized_range(levels, whole // digit * digit, confidence)


@cache  # a fifth of a second each
def _studentized_range(levels: int, degrees: int, confidence: float) -> float:
    if levels == 2:
        return float(stats.t.ppf((1 + confidence) / 2, degrees))
    return float(stats.studentized_range.ppf(confidence, levels, degrees) / np.sqrt(2))
