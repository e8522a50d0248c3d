from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from analysis.estimates.final_effects import (
    REPLAYED,
    FinalEffects,
    measure_experiment,
    measure_final_effects,
    usable_trials,
)
from analysis.store import Experiment
from analysis.summaries import at_best_scales
from grid.config import FACTORS, InputError
from grid.parts import LEVELS
from tests.stopped_grids import EPOCHS, SIZES, Grid, cells_of, make_grid, true_effects

TABLES = ("levels", "differences", "interactions")


def with_ends(grid: Grid, final: np.ndarray) -> Grid:
    return replace(grid, final=np.asarray(final, dtype=float))


def level(effects: FinalEffects, factor: str, name: str) -> pd.Series:
    return effects.levels.set_index(["factor", "level"]).loc[(factor, name)]


def difference(effects: FinalEffects, factor: str) -> pd.Series:
    """Return the largest difference of a factor."""
    return effects.differences[effects.differences["factor"] == factor].iloc[0]


def drawn(grid: Grid, number: int, random_state: int = 0) -> pd.DataFrame:
    """Return the trials of a stopped grid with so many controls among those that the rule stops."""
    controls = grid.draw_exactly(number, np.random.default_rng(random_state))
    return grid.stopped_early(controls, number / np.isfinite(grid.stop).sum())


def lost(trials: pd.DataFrame, rows: "pd.Series[bool]", status: str = "diverged") -> pd.DataFrame:
    """Return the trials, some of which diverged or failed in their second epoch."""
    trials = trials.copy()
    trials.loc[rows, "status"] = status
    trials.loc[rows, ["final_val_accuracy", "best_val_accuracy", "val_accuracy_at_3", "stop_epoch"]] = np.nan
    return trials


def test_in_a_grid_that_was_never_stopped_differences_are_those_of_the_means() -> None:
    grid = make_grid(seeds=2)
    trials = grid.never_stopped()
    effects = measure_final_effects(trials)
    assert (effects.trials, effects.seen, effects.probed, effects.stopped) == (192, 192, 0, 0)
    assert effects.grand_mean == pytest.approx(grid.final.mean())
    means = trials.groupby("optimizer")["final_val_accuracy"].mean()
    rows = effects.differences[effects.differences["factor"] == "optimizer"]
    assert len(rows) == 6
    for row in rows.to_dict("records"):
        assert row["difference"] == pytest.approx(means[row["level"]] - means[row["other_level"]])
        assert row["difference"] >= 0
    assert rows["difference"].is_monotonic_decreasing


def test_in_a_grid_that_was_never_stopped_an_interaction_is_what_the_sum_leaves() -> None:
    trials = make_grid(seeds=2).never_stopped()
    effects = measure_final_effects(trials)
    means = trials.groupby(["activation", "optimizer"])["final_val_accuracy"].mean()
    rows = effects.interactions.query("factor == 'activation' and other_factor == 'optimizer'")
    assert len(rows) == 12
    for row in rows.to_dict("records"):
        alone = sum(
            level(effects, row[factor], row[name])["effect"]
            for factor, name in (("factor", "level"), ("other_factor", "other_level"))
        )
        left = means[row["level"], row["other_level"]] - effects.grand_mean - alone
        assert row["effect"] == pytest.approx(left)


def test_if_all_stopped_trials_are_controls_the_effects_are_those_of_a_grid_that_was_never_stopped() -> None:
    grid = make_grid()
    everywhere = measure_final_effects(grid.stopped_early(np.ones(96, dtype=bool), 1.0))
    never = measure_final_effects(grid.never_stopped())
    assert (everywhere.probed, never.probed) == (int(np.isfinite(grid.stop).sum()), 0)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(everywhere, name), getattr(never, name))


def test_a_slow_starter_that_wins_at_the_end_is_found_though_few_of_its_trials_survive() -> None:
    grid = make_grid({"model": 2, "lr_schedule": 4, "activation": 4, "optimizer": 4, "batch_norm": 2})
    trials = drawn(grid, 40)
    survivors = trials[trials["stop_epoch"].isna()]["lr_schedule"].value_counts()
    assert survivors.get("one_cycle", 0) < 0.1 * survivors.sum()
    effects = measure_final_effects(trials)
    assert difference(effects, "lr_schedule")["level"] == "one_cycle"
    assert difference(effects, "lr_schedule")["sure"]
    assert level(effects, "lr_schedule", "one_cycle")["effect"] == pytest.approx(
        true_effects(grid)["lr_schedule", "one_cycle"], abs=0.01
    )


def test_counts_say_what_the_effects_rest_on() -> None:
    grid = make_grid()
    trials = lost(drawn(grid, 30), pd.Series(np.arange(96) == 0))
    effects = measure_final_effects(trials)
    kept = usable_trials(trials)
    assert (effects.epochs, effects.trials, effects.diverged) == (EPOCHS, 95, 1)
    assert effects.seen == kept["final_val_accuracy"].notna().sum()
    assert effects.seen + effects.stopped == 95
    assert effects.probed == (kept["stop_epoch"].notna() & kept["final_val_accuracy"].notna()).sum()
    assert effects.levels.groupby("factor")["trials"].sum().unique().tolist() == [95]


def test_an_effect_is_inside_its_interval_and_levels_add_up_to_zero() -> None:
    effects = measure_final_effects(drawn(make_grid(), 20))
    for table, value in (("levels", "effect"), ("differences", "difference"), ("interactions", "effect")):
        rows = getattr(effects, table)
        assert ((rows["low"] < rows[value]) & (rows[value] < rows["high"])).all()
    np.testing.assert_allclose(effects.levels.groupby("factor")["effect"].sum(), 0, atol=1e-12)
    np.testing.assert_allclose(effects.levels["mean"] - effects.levels["effect"], effects.grand_mean)


def test_more_confidence_has_wider_intervals() -> None:
    trials = drawn(make_grid(), 20)
    narrow, wide = (measure_final_effects(trials, confidence=confidence) for confidence in (0.8, 0.95))
    for table in TABLES:
        ours, theirs = getattr(narrow, table), getattr(wide, table)
        assert (ours["high"] - ours["low"] < theirs["high"] - theirs["low"]).all()


@pytest.mark.parametrize("levels", range(2, 9))
def test_a_factor_may_have_any_number_of_levels(levels: int) -> None:
    names = [*LEVELS["optimizer"], "mine"][:levels]
    base = make_grid({"model": 2, "activation": 4, "batch_norm": 2})
    cells = pd.concat([base.cells.assign(optimizer=name) for name in names], ignore_index=True)
    parts = [np.concatenate([values] * levels) for values in (base.rungs, base.final, base.stop)]
    effects = measure_final_effects(drawn(Grid(cells, *parts), 5 * levels))
    rows = effects.differences[effects.differences["factor"] == "optimizer"]
    assert len(rows) == levels * (levels - 1) / 2
    assert set(effects.levels.query("factor == 'optimizer'")["level"]) == set(names)
    assert np.isfinite(rows[["difference", "low", "high"]]).all(axis=None)


def test_a_difference_of_many_levels_has_a_wider_interval_than_students() -> None:
    effects = measure_final_effects(make_grid({"optimizer": 5, "activation": 4}, seeds=4).never_stopped())
    half = {name: (difference(effects, name)["high"] - difference(effects, name)["low"]) / 2 for name in FACTORS[2:4]}
    assert half["optimizer"] > 1.1 * half["activation"] * np.sqrt(4 / 5)


def test_of_equal_levels_one_grid_in_twenty_has_a_sure_difference() -> None:
    random, found = np.random.default_rng(0), []
    cells = cells_of({"optimizer": 5, "model": 2, "batch_norm": 2, "dropout": 2}, 5)
    trials = Grid(cells, *blank(len(cells))).never_stopped()
    for _ in range(200):
        noise = random.normal(0.7, 0.02, len(cells))
        rows = measure_final_effects(trials.assign(final_val_accuracy=noise)).differences
        found.append(rows[rows["factor"] == "optimizer"]["sure"].any())
    assert 0.01 < np.mean(found) < 0.09


def blank(cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.full((cells, 2), 0.5), np.full(cells, 0.7), np.full(cells, np.nan)


def test_a_planted_pair_stands_out_and_no_other() -> None:
    grid = make_grid(seeds=2, noise=0.01)
    pair = (grid.cells["activation"] == "elu") & (grid.cells["optimizer"] == "adam")
    planted = replace(grid, final=grid.final + 0.08 * pair.to_numpy())
    effects = measure_final_effects(drawn(planted, 60))
    strongest = effects.interactions.sort_values("effect", key=abs).iloc[-1]
    assert strongest[["level", "other_level", "stands_out"]].tolist() == ["elu", "adam", True]
    found = effects.interactions[effects.interactions["stands_out"].astype(bool)]
    assert set(map(tuple, found[["factor", "other_factor"]].to_numpy())) == {("activation", "optimizer")}


def test_among_effects_that_add_up_pairs_rarely_stand_out() -> None:
    grids = [measure_final_effects(drawn(make_grid(random_state=number), 30, number)) for number in range(20)]
    assert np.mean([effects.interactions["stands_out"].any() for effects in grids]) <= 0.2


@pytest.mark.parametrize("number", range(3, 13))
def test_any_number_of_controls_from_three_on_yields_finite_intervals(number: int) -> None:
    effects = measure_final_effects(drawn(make_grid(), number, number))
    assert effects.probed == number
    assert all(np.isfinite(getattr(effects, table)[["low", "high"]].to_numpy(dtype=float)).all() for table in TABLES)


@pytest.mark.parametrize(("number", "words"), [(0, "0 unstopped controls"), (1, "1 unstopped control"), (2, "2 un")])
def test_too_few_controls_are_one_line(number: int, words: str) -> None:
    with pytest.raises(InputError) as error:
        measure_final_effects(drawn(make_grid(), number))
    assert str(error.value).startswith(f"effects at the end are unknown: it was seen of {words}")
    assert str(error.value).endswith("that ASHA would have stopped, 3 are needed; run grid.run with --more-controls 60")
    assert "\n" not in str(error.value)


def test_unequal_chances_of_controls_change_the_estimate() -> None:
    grid = make_grid(noise=0.05)
    chances = np.where(grid.final > grid.final.mean(), 0.5, 0.1)
    controls = grid.draw(chances, np.random.default_rng(1))
    recorded, unrecorded = (measure_final_effects(grid.stopped_early(controls, known)) for known in (chances, None))
    assert abs(recorded.grand_mean - unrecorded.grand_mean) > 1e-4


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_grid_with_holes_is_analysed(status: str) -> None:
    grid = make_grid({"model": 2, "lr_schedule": 4, "activation": 4, "optimizer": 4, "batch_norm": 2})
    holes = pd.Series(np.random.default_rng(0).random(len(grid.cells)) < 0.06)
    effects = measure_final_effects(lost(drawn(grid, 50), holes, status).iloc[3:])
    found = effects.levels.set_index(["factor", "level"])["effect"]
    np.testing.assert_allclose(found, true_effects(grid)[found.index], atol=0.015)
    assert effects.diverged == (holes.iloc[3:].sum() if status == "diverged" else 0)


def test_the_note_on_diverged_trials_names_the_effect_that_would_move() -> None:
    trials = drawn(make_grid(seeds=2), 40)
    worst = (trials["optimizer"] == "rmsprop") & (trials["seed"] == 0) & (trials["activation"] == "relu")
    effects = measure_final_effects(lost(trials, worst), classes=47)
    (note,) = [note for note in effects.notes if "diverged" in note]
    assert note.startswith("8 diverged trials left out, not counted as zero; if they counted as guesses, these effects")
    assert note.split("most: ")[1].startswith("optimizer=rmsprop by -")


def test_a_diverged_trial_of_a_level_that_always_ends_as_a_guess_changes_nothing() -> None:
    grid = make_grid(seeds=2)
    trials = grid.never_stopped().assign(final_val_accuracy=0.25)
    effects = measure_final_effects(lost(trials, pd.Series(np.arange(192) == 0)), classes=4)
    assert effects.notes[-1].endswith("as guesses they would change no main effect noticeably")


def test_rates_of_divergence_are_over_all_trials() -> None:
    trials = drawn(make_grid(), 30)
    effects = measure_final_effects(lost(trials, trials.index < 6))
    rate = effects.divergence.set_index(["factor", "level"]).loc[("model", "mlp")]
    assert rate[["trials", "diverged"]].tolist() == [48, 6]


def test_a_level_without_an_accuracy_is_named() -> None:
    trials = make_grid(seeds=2).never_stopped()
    effects = measure_final_effects(lost(trials, trials["optimizer"] == "adam", "failed"))
    assert "no accuracy at all, hence no effect: optimizer=adam" in effects.notes
    assert "adam" not in set(effects.levels["level"])


def test_in_a_small_grid_pairs_are_left_out_and_named() -> None:
    effects = measure_final_effects(make_grid({"model": 2, "activation": 3}).never_stopped())
    assert effects.interactions.empty
    assert "pairs of factors that these trials can't estimate: model x activation" in effects.notes


def test_a_factor_with_one_level_is_fixed_and_the_seed_is_no_factor() -> None:
    effects = measure_final_effects(make_grid({"model": 2, "optimizer": 3}, seeds=4).never_stopped())
    assert effects.factors == ("model", "optimizer")
    assert effects.fixed["lr_schedule"] == "constant"
    assert set(effects.levels["factor"]) == set(effects.differences["factor"]) == {"model", "optimizer"}


def test_the_names_of_levels_do_not_matter() -> None:
    trials = drawn(make_grid(), 25)
    renamed = trials.assign(model=trials["model"].map({"mlp": "cnn", "cnn": "mlp"}))
    before, after = measure_final_effects(trials), measure_final_effects(renamed)
    assert level(before, "model", "cnn")["effect"] == pytest.approx(level(after, "model", "mlp")["effect"])
    assert difference(before, "model")["difference"] == pytest.approx(difference(after, "model")["difference"])


def test_a_trial_that_stopped_where_no_accuracy_is_recorded_is_left_out() -> None:
    trials = drawn(make_grid(), 25)
    odd = trials.index[trials["status"] == "stopped"][0]
    trials.loc[odd, "stop_epoch"] = 2
    assert measure_final_effects(trials).trials == 95


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (make_grid().never_stopped().iloc[:0], "^trials of no epochs can't be analysed together"),
        (make_grid().never_stopped().assign(epochs=[3, 9] * 48), "^trials of 3 and 9 epochs can't be analysed togeth"),
        (make_grid({}).never_stopped(), "^every factor has an accuracy at one level only; run a grid with two levels"),
        (make_grid().never_stopped().assign(status="diverged"), "^no trial has an accuracy: all diverged or failed"),
        (make_grid().never_stopped().iloc[[0, 95]], "^2 accuracies are too few to separate"),
    ],
)
def test_trials_that_cannot_be_analysed_raise_an_error(trials: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_final_effects(trials)


def test_without_noise_the_effects_are_exact_and_sure() -> None:
    grid = make_grid(noise=0.0, seeds=2)
    effects = measure_final_effects(grid.never_stopped())
    assert difference(effects, "model")[["difference", "low", "high"]].tolist() == pytest.approx([0.05] * 3)
    assert bool(difference(effects, "model")["sure"])


def test_as_many_terms_as_trials_leave_no_intervals() -> None:
    effects = measure_final_effects(make_grid({"model": 2}).never_stopped())
    assert effects.differences[["low", "high"]].isna().all(axis=None)
    assert effects.levels["effect"].notna().all()
    assert not effects.differences["sure"].any()
    assert "as many terms as trials: no residual is left, so the effects have no intervals" in effects.notes


def experiment_of(trials: pd.DataFrame) -> Experiment:
    return Experiment("sqlite://", "name", "", trials, pd.DataFrame(), {}, ())


def test_recorded_verdicts_on_controls_are_taken_as_they_are() -> None:
    trials = drawn(make_grid(), 30)
    found, expected = measure_experiment(experiment_of(trials)), measure_final_effects(trials)
    pd.testing.assert_frame_equal(found.levels, expected.levels)
    assert REPLAYED not in found.notes


def test_where_no_verdict_on_controls_is_recorded_the_rule_is_replayed() -> None:
    trials = drawn(make_grid(), 30)
    old = trials.assign(control_chance=np.nan, stop_epoch=trials["stop_epoch"].mask(trials["control"]))
    effects = measure_experiment(experiment_of(old))
    assert effects.probed == pytest.approx(30, abs=5)
    assert REPLAYED in effects.notes


def test_of_several_learning_rate_scales_the_one_counts_at_which_a_cell_is_ranked() -> None:
    trials = make_grid(seeds=2).never_stopped()
    worse = trials.assign(lr_scale=0.3, final_val_accuracy=trials["final_val_accuracy"] - 0.1)
    both, alone = measure_final_effects(pd.concat([trials, worse], ignore_index=True)), measure_final_effects(trials)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(both, name), getattr(alone, name))
    assert both.divergence["trials"].sum() == 2 * alone.divergence["trials"].sum()
    assert "of 2 learning-rate scales, for each cell the one counts at which it is ranked" in both.notes


@dataclass(frozen=True)
class Scaled:
    """A stopped grid with two learning-rate scales, of which adam wants the small one and the others the large one."""

    grid: Grid

    @classmethod
    def of(cls, random_state: int) -> "Scaled":
        random = np.random.default_rng(random_state)
        cells = pd.concat([cells_of(SIZES).assign(scale=scale) for scale in (0.1, 1.0)], ignore_index=True)
        fits = (cells["optimizer"] == "adam") == (cells["scale"] == 0.1)
        slow, luck = cells["lr_schedule"] == "one_cycle", random.normal(0, 0.01, len(cells))
        final = 0.7 + 0.06 * fits + 0.03 * slow + luck
        first = 0.4 + 0.06 * fits - 0.16 * slow + luck + random.normal(0, 0.01, len(cells))
        stop = np.where(first < np.quantile(first, 0.85), 1.0, np.nan)
        return cls(Grid(cells, np.column_stack([first, 0.3 * first + 0.65 * final]), final.to_numpy(), stop))

    def stopped_early(self, share: float, random: np.random.Generator) -> pd.DataFrame:
        trials = self.grid.stopped_early(self.grid.draw(share, random), share)
        return trials.assign(lr_scale=self.grid.cells["scale"])


def test_the_choice_of_scales_is_the_same_whichever_trials_are_controls() -> None:
    scaled, random = Scaled.of(0), np.random.default_rng(0)
    chosen = [at_best_scales(scaled.stopped_early(share, random)).index.tolist() for share in (0, 0.1, 0.4)]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == len(scaled.grid.cells) / 2


def test_effects_at_the_scales_of_the_ranking_are_without_bias() -> None:
    scaled, random = Scaled.of(1), np.random.default_rng(1)
    kept = at_best_scales(scaled.stopped_early(0, random)).index
    best = Grid(scaled.grid.cells.loc[kept].reset_index(), scaled.grid.rungs, scaled.grid.final[kept], scaled.grid.stop)
    draws = [measure_final_effects(scaled.stopped_early(0.4, random)).levels for _ in range(60)]
    found = pd.concat([levels.set_index(["factor", "level"])["effect"] for levels in draws], axis=1)
    errors = found.sub(true_effects(best).rename_axis(["factor", "level"]), axis=0)
    assert (errors.mean(axis=1).abs() < 4 * errors.std(axis=1) / np.sqrt(len(draws)) + 0.0005).all()
    assert errors.std(axis=1).max() < 0.01
