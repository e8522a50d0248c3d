"""Intervals and bounds for what is seen of few controls: proportions, rank correlations, the best of the unseen."""

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import chi2, norm
from statsmodels.stats.proportion import proportion_confint

MIN_FOR_INTERVAL = 4
"""Controls below which a rank correlation has no interval."""
MIN_FOR_LOSS = 20
"""Completed controls that the rule would have stopped below which the loss of accuracy has no bound."""


def beat_by_chance(tried: int, survivors: int) -> float:
    """Return how many would-be-stopped controls are expected to beat all survivors if stopping were a coin flip.

    Then every order of the ends is equally likely, and each of the tried controls is the best of itself and the
    survivors with chance 1 / (survivors + 1). About so many controls above the winner say that the rule is no better
    than chance; none above it says little if this number is small as well.
    """
    return tried / (survivors + 1)


def best_at_most(ends: NDArray[np.float64], unseen: int, confidence: float) -> float:
    """Return an upper confidence limit of the expected best of the trials that were stopped.

    The best quarter of the sample is taken as the upper quarter of a normal distribution. Accuracies have an end and
    are usually skewed downwards, so their upper quarter is shorter than that, and the limit is conservative. The mean
    excess over the quarter's lower end is taken as that of exponential draws, which vary more than normal ones. A small
    group of far better trials is covered only if the sample has some of them.

    Args:
        ends: Accuracies at the full budget of a random sample of the trials that the rule stops, `[control]`.
        unseen: Number of those that it did stop, from 1.
        confidence: One-sided.

    Returns:
        An accuracy of at most 1; NaN for fewer than `MIN_FOR_LOSS` ends.

    References:
        expected best of a normal sample: Blom 1958, Statistical Estimates and Transformed Beta-Variables
        interval of an exponential mean: Epstein and Sobel 1953, https://doi.org/10.1080/01621459.1953.10483488
    """
    if len(ends) < MIN_FOR_LOSS:
        return math.nan
    top = len(ends) // 4
    start, *best = np.sort(ends)[-top - 1 :]
    mean_excess = 2 * float(np.sum(best - start)) / float(chi2.ppf(1 - confidence, 2 * top))
    quartile = norm.ppf(0.75)  # in standard deviations above the mean, as the next two
    mean_of_quarter = norm.pdf(quartile) / 0.25
    expected_best = norm.ppf((unseen - 0.375) / (unseen + 0.25))
    reach = max(0.0, expected_best - quartile) / (mean_of_quarter - quartile)
    return float(min(1.0, start + mean_excess * reach))


def clopper_pearson(successes: int, total: int, confidence: float) -> tuple[float, float]:
    """Return the exact interval of a proportion; 0 to 1 if the total is 0.

    Reference: Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404
    """
    if total == 0:
        return 0.0, 1.0
    low, high = proportion_confint(successes, total, alpha=1 - confidence, method="beta")
    return float(low), float(high)


def spearman(first: pd.Series, last: pd.Series, confidence: float) -> tuple[float, float, float]:
    """Return the rank correlation and the ends of its interval, by Fisher's z; NaN where undefined.

    For the interval a perfect order counts as half a swap of neighbours less than perfect, since z would be infinite.

    Reference: Bonett and Wright 2000, https://doi.org/10.1007/BF02294183
    """
    pairs = len(first)
    if pairs < 2 or first.nunique() < 2 or last.nunique() < 2:
        return math.nan, math.nan, math.nan
    correlation = float(np.corrcoef(first.rank(), last.rank())[0, 1])
    if pairs < MIN_FOR_INTERVAL:
        return correlation, math.nan, math.nan
    limit = 1 - 6 / (pairs**3 - pairs)  # swapping two neighbours costs 12 / (n^3 - n)
    z = math.atanh(min(max(correlation, -limit), limit))
    error = math.sqrt((1 + correlation**2 / 2) / (pairs - 3))
    half = float(norm.ppf((1 + confidence) / 2)) * error
    return correlation, math.tanh(z - half), math.tanh(z + half)
