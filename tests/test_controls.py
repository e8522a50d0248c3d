from collections import Counter
from math import prod
from time import process_time

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from grid.config import TrialConfig
from grid.parts.registry import GRIDS
from grid.plan.controls import _Model, draw_cells, draw_controls, draw_more, number_of_controls
from grid.plan.space import Levels, cross, expand, restrict

FULL = tuple(len(levels) for levels in GRIDS["full"].levels.values())
"""Numbers of levels of the full grid: 1,920 cells."""


def trials_of(levels: Levels, seeds: int = 1, lr_scales: tuple[float, ...] = (1.0,)) -> list[TrialConfig]:
    def configure(cell: dict[str, str], seed: int, lr_scale: float) -> TrialConfig:
        varying = {"seed": str(seed), "lr_scale": repr(lr_scale), "learning_rate": "0.1", "epochs": "9"}
        return TrialConfig.from_params({**cell, **varying})

    return expand(cross(levels)[0], seeds=seeds, lr_scales=lr_scales, order_seed=0, configure=configure)


def draw(counts: tuple[int, ...], wanted: int, seed: int = 0) -> NDArray[np.int_]:
    return draw_cells(counts, wanted, np.random.default_rng(seed))


def main_effects(counts: tuple[int, ...], cells: NDArray[np.int_]) -> NDArray[np.float64]:
    """Return the design of a model with main effects alone, `[cell, coefficient]`."""
    return _Model(counts).rows(cells)[:, : 1 + sum(count - 1 for count in counts)]


def variance(counts: tuple[int, ...], cells: NDArray[np.int_]) -> float:
    """Return the mean variance of the main effects, 1 where all cells of the same number are orthogonal."""
    design = main_effects(counts, cells)
    variances = np.diag(np.linalg.inv(design.T @ design))[1:]
    return float(variances.mean()) * len(cells)


@pytest.mark.parametrize(
    ("trials", "share", "wanted"),
    [
        (1920, 0.03, 60),
        (1920, 0.05, 96),
        (10_000, 0.03, 300),
        (32, 0.03, 10),
        (2, 0.01, 1),
        (32, 1.0, 32),
        (32, 0.0, 0),
    ],
)
def test_controls_are_a_share_but_at_least_sixty_or_a_third(trials: int, share: float, wanted: int) -> None:
    assert number_of_controls(trials, share) == wanted


@pytest.mark.parametrize("wanted", [5, 13])
def test_every_cell_has_the_same_chance(wanted: int) -> None:
    counts, draws = (2, 3, 3), 2000
    times = Counter(tuple(cell) for seed in range(draws) for cell in draw(counts, wanted, seed).tolist())
    found = [times[cell] for cell in np.ndindex(counts)]
    chance = wanted / 18
    # without replacement: a cell's count has this variance and the counts are correlated by -1 / 17
    chi_square = sum((each - draws * chance) ** 2 for each in found) * 17 / 18 / (draws * chance * (1 - chance))
    assert stats.chi2(17).sf(chi_square) > 0.001


@pytest.mark.parametrize("counts", [FULL, (2, 2, 2), (5, 2), (2, 3, 2, 1)])
def test_all_main_effects_can_be_estimated_from_as_many_controls_as_coefficients_and_more(
    counts: tuple[int, ...],
) -> None:
    coefficients = 1 + sum(count - 1 for count in counts)
    for wanted in range(coefficients, min(coefficients + 30, prod(counts) + 1)):
        design = main_effects(counts, draw(counts, wanted))
        assert np.linalg.matrix_rank(design) == coefficients, wanted


@pytest.mark.parametrize(("wanted", "gain"), [(29, 1.5), (60, 1.2), (96, 1.1)])
def test_main_effects_vary_less_than_with_plain_random_draws(wanted: int, gain: float) -> None:
    plain = []
    for seed in range(21):
        cells = np.random.default_rng(seed).choice(prod(FULL), wanted, replace=False)
        plain.append(variance(FULL, np.column_stack(np.unravel_index(cells, FULL))))
    ours = [variance(FULL, draw(FULL, wanted, seed)) for seed in range(5)]
    assert np.median(plain) > gain * np.median(ours)
    assert max(ours) < 1.15  # of 1 at best


def test_pairs_of_levels_bias_main_effects_less_than_with_plain_random_draws() -> None:
    def alias(cells: NDArray[np.int_]) -> float:
        both, mains = _Model(FULL).rows(cells), main_effects(FULL, cells)
        return float(np.square(np.linalg.pinv(mains) @ both[:, mains.shape[1] :]).sum())

    plain = np.random.default_rng(0).choice(prod(FULL), 60, replace=False)
    assert alias(draw(FULL, 60)) < alias(np.column_stack(np.unravel_index(plain, FULL))) / 2


def test_a_cell_is_drawn_once() -> None:
    for wanted in (0, 1, 60, 1000, 1919, 1920):
        assert len({tuple(cell) for cell in draw(FULL, wanted).tolist()}) == wanted


def test_controls_follow_their_seed_and_not_the_order_of_the_trials() -> None:
    trials = trials_of(GRIDS["full"].levels)
    drawn = draw_controls(trials, 0.03, 0)
    assert drawn == draw_controls(trials[::-1], 0.03, 0)
    assert drawn.keys != draw_controls(trials, 0.03, 1).keys
    assert len(drawn.keys) == 60


def test_seeds_and_learning_rate_scales_are_balanced_as_well() -> None:
    trials = trials_of(GRIDS["techniques"].levels, seeds=2, lr_scales=(0.5, 1.0, 2.0))
    keys = draw_controls(trials, 0.03, 0).keys
    controls = [trial for trial in trials if trial.trial_key in keys]
    assert len(controls) == 60
    assert all(27 <= count <= 33 for count in Counter(trial.seed for trial in controls).values())
    assert all(17 <= count <= 23 for count in Counter(trial.lr_scale for trial in controls).values())


def test_cells_that_are_excluded_are_not_drawn_and_the_others_keep_the_chance_of_the_full_product() -> None:
    levels = restrict(GRIDS["mlp"].levels, [("optimizer", ("sgd", "adamw"))])
    trials = trials_of(levels)
    assert len(trials) == 320  # of 384
    numbers = []
    for seed in range(100):
        drawn = draw_controls(trials, 0.25, seed)
        assert drawn.keys <= {trial.trial_key for trial in trials}
        assert drawn.chance == 96 / 384
        numbers.append(len(drawn.keys))
    assert abs(np.mean(numbers) - 80) < 1


@pytest.mark.parametrize(("counts", "wanted", "seconds"), [(FULL, 96, 2), ((*FULL, 6, 1), 346, 20)])
def test_a_draw_takes_seconds(counts: tuple[int, ...], wanted: int, seconds: float) -> None:
    begun = process_time()
    draw(counts, wanted, 7)
    assert process_time() - begun < seconds


def test_more_controls_are_drawn_among_the_stopped_with_the_same_chance() -> None:
    stopped = [f"trial {number}" for number in range(10)]
    rounds = [draw_more(stopped, 3, 0, number) for number in range(1, 2001)]
    assert {len(set(drawn)) for drawn in rounds} == {3}
    times = Counter(key for drawn in rounds for key in drawn)
    assert all(520 < times[key] < 680 for key in stopped)  # 600 expected, standard deviation 20
    assert draw_more(stopped[::-1], 3, 0, 1) == rounds[0]
    assert sorted(draw_more(stopped, 20, 0, 1)) == sorted(stopped)
