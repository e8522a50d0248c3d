from math import inf, nan

import numpy as np
import pytest
from numpy.typing import NDArray

from grid.config import FACTORS
from grid.parts import LEVELS
from grid.ranking import RankedCell
from grid.ties import dunnett_quantile, image_variance, seed_variance, tied_with_best

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}
PUBLISHED = {
    5: (2.02, 2.44, 2.68, 2.85, 2.98, 3.08, 3.16, 3.24, 3.30),
    10: (1.81, 2.15, 2.34, 2.47, 2.56, 2.64, 2.70, 2.76, 2.81),
    20: (1.72, 2.03, 2.19, 2.30, 2.39, 2.46, 2.51, 2.56, 2.60),
    inf: (1.64, 1.92, 2.06, 2.16, 2.23, 2.29, 2.34, 2.38, 2.42),
}
"""Degrees of freedom -> quantiles for 1 to 9 comparisons: Dunnett 1955, table 1a."""


def cell(*accuracies: float, epochs_run: int = 9, diverged: tuple[int, ...] = ()) -> RankedCell:
    return RankedCell(CELL, 9, epochs_run, dict(enumerate(accuracies)), 1.0, diverged)


def ranked(accuracies: NDArray[np.float64]) -> list[RankedCell]:
    """Return a cell per row of `[cell, seed]`, best first."""
    return [cell(*row) for row in sorted(accuracies.tolist(), key=sum, reverse=True)]


@pytest.mark.parametrize("degrees", PUBLISHED)
def test_the_quantile_is_that_of_the_published_tables(degrees: float) -> None:
    quantiles = [dunnett_quantile(comparisons, degrees) for comparisons in range(1, 10)]
    assert quantiles == pytest.approx(PUBLISHED[degrees], abs=0.0051)


@pytest.mark.parametrize(("comparisons", "degrees"), [(2, 3), (40, 6), (300, inf)])
def test_the_quantile_is_exceeded_in_one_of_twenty_comparisons_of_equal_cells(comparisons: int, degrees: float) -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(40_000, comparisons + 1))
    spread = 1.0 if degrees == inf else np.sqrt(rng.chisquare(degrees, 40_000) / degrees)
    leads = (means[:, 1:].max(axis=1) - means[:, 0]) / np.sqrt(2) / spread
    assert np.mean(leads > dunnett_quantile(comparisons, degrees)) == pytest.approx(0.05, abs=0.005)


def test_nothing_to_compare_has_a_quantile_of_zero() -> None:
    assert dunnett_quantile(0, 5) == dunnett_quantile(3, 0) == 0


@pytest.mark.parametrize(("cells", "seeds"), [(6, 2), (40, 2), (100, 1)])
def test_the_tied_cells_contain_the_true_best_of_equal_cells(cells: int, seeds: int) -> None:
    """Among equal cells each may be called the best; the first of them is followed."""
    rng, kept = np.random.default_rng(0), 0
    for _ in range(400):
        accuracies = rng.normal(0.8, 0.005, (cells, seeds))  # that of 0.8 of 6400 images
        table = ranked(accuracies)
        followed = table.index(cell(*accuracies[0]))
        kept += tied_with_best(table, val_images=6400)[followed]
    assert kept / 400 >= 0.95 - 2 * 0.011


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_tied_finalists_contain_the_true_best_of_equal_ones(seeds: int) -> None:
    rng, kept = np.random.default_rng(0), 0
    for _ in range(400):
        accuracies = rng.normal(0.8, 0.005, (6, seeds)) + rng.normal(0, 0.05, seeds)
        table = ranked(accuracies)
        kept += tied_with_best(table, paired=True)[table.index(cell(*accuracies[0]))]
    assert kept / 400 >= 0.95 - 2 * 0.011


def test_cells_within_the_error_of_the_best_are_tied_with_it() -> None:
    """The limit is 2.06 standard errors of a difference, 2.9 points."""
    cells = [cell(0.8), cell(0.78), cell(0.772), cell(0.77)]
    assert tied_with_best(cells, val_images=1600) == [True, True, True, False]


def test_finalists_are_tied_by_their_differences_on_shared_seeds() -> None:
    base = np.array([0.70, 0.80, 0.75, 0.72, 0.78])
    noise = np.array([0.010, -0.012, 0.008, -0.009, 0.004])
    cells = [cell(*base), cell(*(base - 0.002 + noise)), cell(*(base - 0.03))]
    assert tied_with_best(cells, paired=True) == [True, True, False]
    assert tied_with_best(cells) == [True, True, True]


def test_only_cells_with_the_full_budget_are_tied() -> None:
    cells = [cell(0.8), cell(0.8, epochs_run=3), cell(0.8, epochs_run=1)]
    assert tied_with_best(cells, val_images=100) == [True, False, False]
    assert tied_with_best(cells[1:], val_images=100) == [False, False]
    assert tied_with_best([]) == []


def test_a_diverged_seed_counts_as_zero() -> None:
    sound, fragile = cell(0.70, 0.71, 0.72), cell(0.70, 0.72, diverged=(2,))
    assert tied_with_best([sound, fragile]) == tied_with_best([sound, fragile], paired=True) == [True, False]


def test_with_unknown_noise_no_cell_is_known_to_be_worse() -> None:
    cells = [cell(0.8), cell(0.3)]
    assert tied_with_best(cells) == tied_with_best(cells, paired=True) == [True, True]


def test_finalists_without_a_shared_seed_can_not_be_compared() -> None:
    others = RankedCell(CELL, 9, 9, {7: 0.1, 8: 0.1}, 1.0)
    assert tied_with_best([cell(0.80, 0.81), cell(0.79, 0.82), others], paired=True)[2]


def test_variances_are_pooled_over_cells_and_those_of_a_share() -> None:
    assert seed_variance([cell(0.5, 0.6), cell(0.1, 0.2, 0.3), cell(0.9)]) == (pytest.approx(0.025 / 3), 3)
    assert seed_variance([cell(0.5)]) == (pytest.approx(nan, nan_ok=True), 0)
    assert image_variance(0.8, 1600) == pytest.approx(0.0001)
    assert np.isnan(image_variance(0.8, None))
