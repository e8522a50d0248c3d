from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.estimates.anova import Array, Term, effect_weights, estimable_terms, in_order
from analysis.estimates.final_effects import make_sample
from analysis.estimates.two_phase import Ends, Sample, estimate_ends
from analysis.multiplicity import level_quantile
from grid.config import FACTORS
from tests.stopped_grids import Grid, make_grid, planted_effects, true_effects

DRAWS = 200
LARGE = {"model": 2, "lr_schedule": 3, "activation": 3, "optimizer": 4, "batch_norm": 2, "regularization": 3}
"""Levels of each factor: 432 cells."""


def with_random_rungs(grid: Grid, random: np.random.Generator) -> Grid:
    """Return a grid whose accuracies at the rungs have nothing to do with the end."""
    return replace(grid, rungs=random.uniform(0.1, 0.9, grid.rungs.shape))


def terms_of(grid: Grid, *, pairs: bool = True) -> list[Term]:
    cells = grid.cells.assign(accuracy=0.0)
    varied = {name: in_order(name, cells[name]) for name in FACTORS if cells[name].nunique() > 1}
    return [term for term in estimable_terms(cells, varied, complete=True) if pairs or len(term.parts) == 1]


def main_weights(terms: list[Term]) -> Array:
    """Return the weights of all main effects, `[level, cell]`."""
    return np.concatenate([effect_weights(terms)[term.name] for term in terms if len(term.parts) == 1])


def sample_of(grid: Grid, drawn: Array, chances: Array | float | None = None) -> Sample:
    return make_sample(grid.stopped_early(drawn, chances))


def estimates(grid: Grid, samples: list[Sample]) -> Array:
    """Return the main effects in each sample, `[sample, level]`."""
    terms = terms_of(grid)
    weights = main_weights(terms)
    return np.array([weights @ estimate_ends(sample, terms).values for sample in samples])


def completed_only(grid: Grid, samples: list[Sample]) -> Array:
    """Return the distance of each level's mean from the mean of all, among the trials that reached the end."""
    found = []
    for sample in samples:
        finals = pd.Series(sample.final)
        means = [finals.groupby(grid.cells[term.name].to_numpy()).mean() for term in terms_of(grid, pairs=False)]
        order = [[level for _, level in term.labels] for term in terms_of(grid, pairs=False)]
        found.append(np.concatenate([mean[names] for mean, names in zip(means, order, strict=True)]) - finals.mean())
    return np.array(found)


def test_the_chance_of_a_trial_that_goes_on_is_one_and_the_others_add_up_to_those_drawn() -> None:
    grid = make_grid()
    chances = np.where(grid.cells["model"] == "mlp", 0.1, 0.5)
    sample = sample_of(grid, grid.draw(chances, np.random.default_rng(0)), chances)
    found = sample.seen_chances()
    assert set(found[~sample.stopped]) == {1.0}
    assert found[sample.stopped].sum() == pytest.approx(sample.probed.sum())
    low, high = sorted(set(np.round(found[sample.stopped], 9)))
    assert high / low == pytest.approx(5)


def test_without_a_record_all_chances_are_the_share_that_was_drawn() -> None:
    grid = make_grid()
    sample = sample_of(grid, grid.draw_exactly(17, np.random.default_rng(0)))
    assert sample.seen_chances()[sample.stopped] == pytest.approx(17 / sample.stopped.sum())


def test_no_chance_is_above_one() -> None:
    grid = make_grid()
    drawn = np.ones(len(grid.cells), dtype=bool)
    drawn[np.flatnonzero(np.isfinite(grid.stop))[0]] = False
    chances = np.where(np.arange(len(drawn)) % 2 == 0, 1.0, 0.5)
    assert sample_of(grid, drawn, chances).seen_chances().max() == 1


@pytest.mark.parametrize("stopped", [True, False])
def test_ends_that_are_all_seen_are_left_as_they_are_and_are_certain_about_the_draw(stopped: bool) -> None:
    grid = make_grid()
    trials = grid.stopped_early(np.ones(len(grid.cells), dtype=bool), 1.0) if stopped else grid.never_stopped()
    sample = make_sample(trials)
    ends = estimate_ends(sample, terms_of(grid))
    assert sample.stopped.any() == stopped
    np.testing.assert_allclose(ends.values, grid.final)
    np.testing.assert_allclose(ends.sampling, 0)


@pytest.mark.parametrize("informative", [True, False], ids=["rungs that tell", "rungs that mislead"])
def test_the_estimates_are_unbiased_and_completed_trials_alone_are_far_off(informative: bool) -> None:
    grid, random = make_grid(), np.random.default_rng(1)
    grid = grid if informative else with_random_rungs(grid, random)
    truth = true_effects(grid).to_numpy()
    samples = [sample_of(grid, grid.draw_exactly(30, random), 30 / 85) for _ in range(DRAWS)]
    found = estimates(grid, samples)
    bias, spread = found.mean(axis=0) - truth, found.std(axis=0)
    # Beside chance, some are allowed for: the regression has seen these controls, so their residuals are too small.
    assert np.all(np.abs(bias) < 4 * spread / np.sqrt(DRAWS) + 0.6 * spread)
    assert np.abs(completed_only(grid, samples).mean(axis=0) - truth).max() > 3 * np.abs(bias).max()


def test_the_intervals_cover_what_was_planted() -> None:
    random, covered = np.random.default_rng(2), []
    terms = terms_of(make_grid())
    weights = main_weights(terms)
    for number in range(150):
        grid = make_grid(random_state=number)
        ends = estimate_ends(sample_of(grid, grid.draw_exactly(25, random), 0.3), terms)
        effects, errors, degrees = ends.weighted_sums(weights)
        covered.append(np.abs(effects - planted_effects(grid).to_numpy()) < stats.t.ppf(0.975, degrees) * errors)
    assert np.mean(covered) > 0.9


def test_the_intervals_are_not_wider_than_they_need_to_be() -> None:
    random, grid = np.random.default_rng(3), make_grid()
    terms = terms_of(grid)
    samples = [sample_of(grid, grid.draw_exactly(25, random), 0.3) for _ in range(100)]
    weights = main_weights(terms)
    errors = np.mean([estimate_ends(sample, terms).weighted_sums(weights)[1] for sample in samples], axis=0)
    assert np.mean(errors / estimates(grid, samples).std(axis=0)) < 1.6


def unequally_drawn(random: np.random.Generator, *, recorded: bool) -> Array:
    """Return errors of the mean over all cells if lucky cells are drawn five times as often, `[draw]`."""
    grid = with_random_rungs(make_grid(LARGE, noise=0.05), random)
    lucky = grid.final > grid.final.mean()
    chances = np.where(lucky, 0.5, 0.1)
    terms, errors = terms_of(grid), []
    for _ in range(DRAWS // 5):
        sample = sample_of(grid, grid.draw(chances, random), chances if recorded else None)
        errors.append(estimate_ends(sample, terms).values.mean() - grid.final.mean())
    return np.array(errors)


def test_recorded_chances_count() -> None:
    with_record = unequally_drawn(np.random.default_rng(4), recorded=True)
    without = unequally_drawn(np.random.default_rng(4), recorded=False)
    assert without.mean() > 0.01
    assert abs(with_record.mean()) < 0.4 * without.mean()


def test_every_number_of_controls_has_finite_intervals_that_change_smoothly() -> None:
    grid = make_grid(LARGE)
    assert len(grid.cells) == 432
    terms = terms_of(grid)
    weights, widths = main_weights(terms), []
    order = np.random.default_rng(5).permutation(np.flatnonzero(np.isfinite(grid.stop)))
    for number in range(40, 121):
        drawn = np.isin(np.arange(len(grid.cells)), order[:number])
        widths.append(estimate_ends(sample_of(grid, drawn), terms).weighted_sums(weights)[1].mean())
    assert np.isfinite(widths).all()
    neighbours = pd.Series(widths).rolling(7, center=True, min_periods=4).median()
    assert (np.array(widths) / neighbours).max() < 1.6
    assert widths[-1] < widths[0]


@pytest.mark.parametrize("number", range(3, 12))
def test_few_controls_have_wide_but_finite_intervals(number: int) -> None:
    grid = make_grid()
    terms = terms_of(grid, pairs=False)
    sample = sample_of(grid, grid.draw_exactly(number, np.random.default_rng(number)))
    effects, errors, degrees = estimate_ends(sample, terms).weighted_sums(main_weights(terms))
    assert np.isfinite(effects).all()
    assert (errors > 0).all()
    assert (degrees >= 1).all()


def test_an_interval_adds_up_squares_of_the_weights() -> None:
    probed, represented = np.array([False, True]), np.array([1.0, 1.0])
    ends = Ends(np.array([0.5, 0.7]), np.array([0.0, 4.0]), np.array([1.0, 1.0]), probed, represented, 0.9)
    sums, errors, degrees = ends.weighted_sums(np.array([[1.0, -1.0], [2.0, -2.0], [1.0, 0.0]]))
    assert sums == pytest.approx([-0.2, -0.4, 0.5])
    assert errors**2 == pytest.approx([6, 24, 1])
    # Satterthwaite: 6 squared / (4 squared / 1 + 2 squared / 1.8), as the noise rests on two trials with 0.9 each; the
    # last sum rests on one trial
    both = 36 / (16 + 4 / 1.8)
    assert degrees == pytest.approx([both, both, 1])


def test_more_noise_between_the_seeds_widens_the_intervals_of_a_grid_that_was_never_stopped() -> None:
    widths = []
    for noise in (0.01, 0.04):
        grid = make_grid(noise=noise)
        terms = terms_of(grid)
        ends = estimate_ends(make_sample(grid.never_stopped()), terms)
        widths.append(ends.weighted_sums(main_weights(terms))[1].mean())
    assert widths[1] / widths[0] == pytest.approx(4, rel=0.05)


def test_two_levels_are_compared_by_students_t() -> None:
    assert level_quantile(2, np.array([10.0, 30.0]), 0.95) == pytest.approx(stats.t.ppf(0.975, 10), rel=1e-4)


def test_more_levels_are_compared_more_carefully() -> None:
    quantiles = [level_quantile(levels, np.array([20.0]), 0.95) for levels in (2, 3, 5)]
    assert quantiles == sorted(quantiles)
    assert quantiles[2] == pytest.approx(stats.studentized_range.ppf(0.95, 5, 20) / np.sqrt(2))


@pytest.mark.parametrize("degrees", [1.9, 57.3, 99.0, 119.9, 1234.0])
def test_the_quantile_of_differences_is_never_narrower_than_the_exact_one(degrees: float) -> None:
    exact = stats.studentized_range.ppf(0.95, 4, degrees) / np.sqrt(2)
    assert exact <= level_quantile(4, np.array([degrees, 2 * degrees]), 0.95) * (1 + 1e-6)
    if degrees > 10:
        assert level_quantile(4, np.array([degrees]), 0.95) < 1.01 * exact
