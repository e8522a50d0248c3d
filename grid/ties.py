"""Which cells may be the best one: ties by Hsu's multiple comparisons with the best.

The best of many equal cells is best by luck, and the more cells, the larger its lead. Hsu's rule allows for that: in at
least 95 of 100 rankings, the cell that is truly the best is among those that it calls tied with the best.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from grid.ranking import RankedCell

CONFIDENCE = 0.95
CHI_POINTS, NORMAL_POINTS = 64, 150
"""Of the two quadratures in `dunnett_quantile`: enough for five digits."""
Comparison = tuple[NDArray[np.float64], NDArray[np.float64], float]
"""What cells are behind the first one, `[cell]`; standard errors of that, `[cell]`, NaN if unknown; their degrees of
freedom."""


def tied_with_best(cells: Sequence[RankedCell], *, val_images: int | None = None, paired: bool = False) -> list[bool]:
    """Return which cells may be the best: those that luck alone may have put behind the first one.

    Only cells with the full budget are compared; the others are never tied. A diverged replicate counts as accuracy 0.

    Args:
        cells: From `grid.ranking.rank_cells`, best first.
        val_images: Number of validation images, which the noise is computed from if every cell has one seed.
        paired: Whether the cells share the draws of their seeds, as finalists do: then the differences on each seed
            count, and the noise is what cells and seeds, added up, leave unexplained.

    Returns:
        `[cell]`; the first one, if it has the full budget, is tied with itself. If the noise is unknown, all are tied.

    Reference: Hsu 1984, https://doi.org/10.1214/aos/1176346732
    """
    full = [cell for cell in cells if cell.epochs_run == cell.epochs]
    if not full:
        return [False] * len(cells)
    behind, errors, degrees = compare_paired(full) if paired else _compare(full, val_images)
    worse = behind > dunnett_quantile(len(full) - 1, degrees) * errors
    worse[0] = False
    tied = iter((~worse).tolist())
    return [cell.epochs_run == cell.epochs and next(tied) for cell in cells]


@cache
def dunnett_quantile(comparisons: int, degrees: float, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided quantile of the largest of several Student variables with correlations of 1/2.

    Such are the differences, in standard errors, between equal cells and one of them. Given their common variance and
    that one's luck, they are independent; both are integrated out.

    Args:
        comparisons: Number of variables; 0 for a quantile of 0.
        degrees: Degrees of freedom of the common variance; infinite if it is known.
        confidence: Level, in (0.5, 1).

    Reference: Dunnett 1955, https://doi.org/10.1080/01621459.1955.10501294
    """
    if comparisons < 1 or not degrees:
        return 0.0
    luck, step = np.linspace(-9, 9, NORMAL_POINTS, retstep=True)
    weights = stats.norm.pdf(luck) * step
    spreads, chances = _chi_quadrature(degrees)

    def excess(quantile: float) -> float:
        below = stats.norm.cdf(luck + math.sqrt(2) * quantile * spreads[:, None]) ** comparisons  # [spread, luck]
        return float(chances @ below @ weights) - confidence

    return float(optimize.brentq(excess, 0, 100))


def compare_paired(cells: Sequence[RankedCell]) -> Comparison:
    """Compare cells with the first one on the seeds that both have; seeds that diverged count as accuracy 0."""
    error, degrees = _paired_error(cells)
    best = cells[0].scores
    shared = [best.keys() & cell.scores.keys() for cell in cells]
    behind = [
        sum(best[seed] - cell.scores[seed] for seed in seeds) / (len(seeds) or math.nan)
        for cell, seeds in zip(cells, shared, strict=True)
    ]
    errors = [error * math.sqrt(2 / len(seeds)) if seeds else math.nan for seeds in shared]
    return np.array(behind), np.array(errors), degrees


def seed_variance(cells: Sequence[RankedCell]) -> tuple[float, float]:
    """Return the variance between seeds, pooled over the cells, and its degrees of freedom.

    NaN and 0 if no cell has two seeds.
    """
    degrees = sum(len(cell.accuracies) - 1 for cell in cells)
    squares = sum((value - cell.mean) ** 2 for cell in cells for value in cell.accuracies.values())
    return (squares / degrees, degrees) if degrees else (math.nan, 0)


def image_variance(accuracy: float, images: int | None) -> float:
    """Return the variance of a share of so many images; NaN if their number is unknown."""
    return accuracy * (1 - accuracy) / images if images else math.nan


def _chi_quadrature(degrees: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values of an estimated standard deviation whose true value is 1, and the weight of each."""
    if math.isinf(degrees):
        return np.ones(1), np.ones(1)
    points, weights = np.polynomial.legendre.leggauss(CHI_POINTS)
    return np.sqrt(stats.chi2.ppf((points + 1) / 2, degrees) / degrees), weights / 2


def _compare(cells: Sequence[RankedCell], val_images: int | None) -> Comparison:
    """Compare cells with the first one, their seeds being independent draws."""
    variance, degrees = seed_variance(cells)
    if degrees:
        variances = np.array([variance / len(cell.accuracies) for cell in cells])
    else:
        variances, degrees = np.array([image_variance(cell.mean, val_images) for cell in cells]), math.inf
    scores = np.array([cell.score for cell in cells])
    return scores[0] - scores, np.sqrt(variances[0] + variances), degrees


def _paired_error(cells: Sequence[RankedCell]) -> tuple[float, int]:
    """Return the residual standard deviation of cells + seeds, possibly incomplete, and its degrees of freedom."""
    observed = [(number, seed) for number, cell in enumerate(cells) for seed in cell.accuracies]
    values = np.array([cells[number].accuracies[seed] for number, seed in observed])
    seeds = sorted({seed for _, seed in observed})
    # 2 cells x 2 seeds, a row per accuracy: [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]; its rank is 3
    design = np.zeros((len(observed), len(cells) + len(seeds)))
    for row, (number, seed) in enumerate(observed):
        design[row, number] = design[row, len(cells) + seeds.index(seed)] = 1
    degrees = len(observed) - int(np.linalg.matrix_rank(design))
    if not degrees:
        return math.nan, 0
    residuals = values - design @ np.linalg.lstsq(design, values)[0]
    return float(np.sqrt(residuals @ residuals / degrees)), degrees
