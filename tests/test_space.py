from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.config import FACTORS, InputError, TrialConfig
from grid.parts import LEVELS
from grid.parts.registry import EXCLUSIONS, GRIDS, check_level
from grid.plan.space import Cell, cross, expand, find_grid, restrict, shared_settings

drawn_levels = st.fixed_dictionaries(
    {factor: st.lists(st.sampled_from(names), min_size=1, unique=True).map(tuple) for factor, names in LEVELS.items()}
)


def configure(cell: Cell, seed: int, lr_scale: float) -> TrialConfig:
    varying = {"seed": str(seed), "lr_scale": repr(lr_scale), "learning_rate": "0.1", "epochs": "9"}
    return TrialConfig.from_params({**cell, **varying})


def trials_of(name: str, seeds: int = 1, order_seed: int = 0) -> list[TrialConfig]:
    cells, _ = cross(GRIDS[name].levels)
    return expand(cells, seeds=seeds, lr_scales=(1.0,), order_seed=order_seed, configure=configure)


def test_the_full_grid_has_1920_cells() -> None:
    cells, excluded = cross(GRIDS["full"].levels)
    assert (len(cells), excluded) == (1920, {})


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_crosses_known_levels_of_all_factors(name: str) -> None:
    assert tuple(GRIDS[name].levels)[: len(FACTORS)] == FACTORS
    for factor, levels in GRIDS[name].levels.items():
        for level in levels:
            check_level(factor, level)


def test_the_grid_of_each_model_is_half_of_the_full_grid() -> None:
    assert len(cross(GRIDS["mlp"].levels)[0]) == len(cross(GRIDS["cnn"].levels)[0]) == 960


@given(drawn_levels)
@settings(max_examples=20)
def test_a_cell_is_either_kept_once_or_excluded_with_a_reason(levels: dict[str, tuple[str, ...]]) -> None:
    size = 1
    for names in levels.values():
        size *= len(names)
    try:
        cells, excluded = cross(levels)
    except InputError:
        return
    assert len({tuple(cell.items()) for cell in cells}) == len(cells) == size - sum(excluded.values())
    assert not any(excludes(cell) for cell in cells for excludes in EXCLUSIONS.values())


def test_decoupled_decay_is_not_crossed_with_l2() -> None:
    levels = restrict(GRIDS["mlp"].levels, [("optimizer", ("adamw",))])
    cells, excluded = cross(levels)
    assert {cell["regularization"] for cell in cells} == {"none", "l1"}
    assert excluded == {"adamw decays the weights already; l2 in the loss would decay them twice": 64}


def test_an_unknown_grid_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="^unknown grid 'x'; choose from cnn, full, mlp, record, smoke, techniques$"):
        find_grid("x")


def test_only_accepts_levels_that_the_grid_leaves_out() -> None:
    assert restrict(GRIDS["full"].levels, [("activation", ("silu", "relu"))])["activation"] == ("relu", "silu")


def test_only_does_not_change_the_other_factors() -> None:
    levels = restrict(GRIDS["full"].levels, [("model", ("mlp",))])
    assert levels == {**GRIDS["full"].levels, "model": ("mlp",)}


def test_only_given_twice_keeps_the_levels_in_both() -> None:
    only = [("optimizer", ("sgd", "adam")), ("optimizer", ("adam", "rmsprop"))]
    assert restrict(GRIDS["full"].levels, only)["optimizer"] == ("adam",)


def test_only_with_an_unknown_level_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="^unknown optimizer 'sdg'; choose from .*adagrad, adam, .*sgd"):
        restrict(GRIDS["full"].levels, [("optimizer", ("sdg",))])


def test_only_that_contradicts_itself_leaves_no_cell() -> None:
    with pytest.raises(InputError, match="^--only leaves no cell: no model is left"):
        restrict(GRIDS["full"].levels, [("model", ("mlp",)), ("model", ("cnn",))])


def test_only_that_is_excluded_leaves_no_cell_and_says_why() -> None:
    levels = restrict(GRIDS["full"].levels, [("optimizer", ("adamw",)), ("regularization", ("l2",))])
    with pytest.raises(InputError, match="^--only leaves no cell: all are excluded .adamw decays"):
        cross(levels)


def test_trials_are_cells_times_seeds_times_learning_rate_scales() -> None:
    cells, _ = cross(GRIDS["smoke"].levels)
    trials = expand(cells, seeds=3, lr_scales=(0.5, 1.0), order_seed=0, configure=configure)
    assert len({trial.trial_key for trial in trials}) == len(cells) * 3 * 2


def test_the_order_is_random_and_follows_its_seed() -> None:
    assert trials_of("smoke") == trials_of("smoke")
    assert trials_of("smoke") != trials_of("smoke", order_seed=1)
    models = [trial.model for trial in trials_of("full")]
    assert (
        860 < sum(first != second for first, second in pairwise(models)) < 1060
    )  # 960 expected, standard deviation 22


def test_a_grid_that_grows_keeps_the_order_it_had() -> None:
    small = trials_of("smoke")
    assert [trial for trial in trials_of("smoke", seeds=3) if trial.seed == 0] == small


def test_shared_settings_are_the_same_for_all_trials() -> None:
    described = [shared_settings([trial]) for trial in trials_of("smoke", seeds=2)]
    assert described.count(described[0]) == len(described)
    assert described[0]["epochs"] == "9"
