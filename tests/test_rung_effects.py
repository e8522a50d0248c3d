from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.stats import t
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from analysis.estimates.rung_effects import RungEffects, measure_rung_effects
from grid.config import FACTORS, InputError
from grid.parts import LEVELS

SMALL = {"model": 2, "activation": 3, "optimizer": 4}


def grid(sizes: dict[str, int] | None = None, seeds: int = 2, random_state: int = 0) -> pd.DataFrame:
    """Return every combination of the first levels, with accuracies that are noise around 0.5."""
    levels = [LEVELS[factor][: (SMALL if sizes is None else sizes).get(factor, 1)] for factor in FACTORS]
    trials = pd.DataFrame(product(*levels, range(seeds)), columns=[*FACTORS, "seed"])
    noise = np.random.default_rng(random_state).normal(0.5, 0.05, (len(trials), 2))
    return trials.assign(
        lr_scale=1.0,
        epochs=9,
        epochs_run=9,
        status="completed",
        control=False,
        final_val_accuracy=0.9,
        val_accuracy_at_1=noise[:, 0],
        val_accuracy_at_3=noise[:, 1] + 0.2,
    )


def without(trials: pd.DataFrame, *rows: int, status: str = "diverged") -> pd.DataFrame:
    """Return the trials without an accuracy in the given rows."""
    trials = trials.copy()
    trials.loc[list(rows), "status"] = status
    trials.loc[list(rows), ["val_accuracy_at_1", "val_accuracy_at_3", "final_val_accuracy"]] = np.nan
    return trials


def effect(effects: RungEffects, factor: str, level: str, column: str = "effect") -> float:
    return float(effects.levels.set_index(["factor", "level"]).loc[(factor, level), column])


def term(effects: RungEffects, name: str) -> pd.Series:
    return effects.variance.set_index("term").loc[name]


def reference(trials: pd.DataFrame) -> pd.DataFrame:
    formula = "val_accuracy_at_1 ~ (C(model, Sum) + C(activation, Sum) + C(optimizer, Sum)) ** 2 + C(seed, Sum)"
    table = anova_lm(ols(formula, trials.dropna(subset="val_accuracy_at_1")).fit(), typ=2)
    table.index = table.index.str.replace(r"C\((\w+), Sum\)", r"\1", regex=True).str.replace(":", " x ")
    return table.rename(index={"Residual": "residual"})


@pytest.mark.parametrize("lost", [(), (0, 5, 6, 17)])
def test_the_variance_table_is_that_of_statsmodels(lost: tuple[int, ...]) -> None:
    trials = without(grid(), *lost)
    table, expected = measure_rung_effects(trials).variance.set_index("term"), reference(trials)
    assert set(table.index) == set(expected.index)
    for ours, theirs in (("sum_of_squares", "sum_sq"), ("df", "df"), ("F", "F"), ("p", "PR(>F)")):
        np.testing.assert_allclose(table[ours], expected.loc[table.index, theirs], rtol=1e-8)


def test_in_a_complete_grid_the_sum_of_squares_of_a_factor_follows_from_its_effects() -> None:
    effects = measure_rung_effects(grid())
    for factor, rows in effects.levels.groupby("factor"):
        closed_form = effects.observations / len(rows) * np.sum(rows["effect"] ** 2)
        assert term(effects, str(factor))["sum_of_squares"] == pytest.approx(closed_form)


def test_sums_of_squares_are_those_of_the_example_in_anova() -> None:
    trials = grid({"model": 2, "activation": 2}, seeds=1)
    effects = measure_rung_effects(trials.assign(val_accuracy_at_1=[0.5, 0.6, 0.7, 1.0]))
    squares = effects.variance.set_index("term")["sum_of_squares"]
    assert squares[["model", "activation", "model x activation"]].tolist() == pytest.approx([0.09, 0.04, 0.01])
    assert effects.interactions["effect"].tolist() == pytest.approx([0.05, -0.05, -0.05, 0.05])


def test_in_a_complete_grid_the_shares_add_up() -> None:
    effects = measure_rung_effects(grid())
    assert effects.complete
    assert effects.variance["share"].sum() == pytest.approx(1)
    assert effects.variance["term"].iloc[-1] == "residual"
    assert effects.variance["share"].iloc[:-1].is_monotonic_decreasing


def test_in_a_complete_grid_effects_are_differences_of_means() -> None:
    trials = grid()
    effects, means = measure_rung_effects(trials), trials.groupby("optimizer")["val_accuracy_at_1"].mean()
    assert effects.grand_mean == pytest.approx(trials["val_accuracy_at_1"].mean())
    for level, mean in means.items():
        assert effect(effects, "optimizer", str(level), "mean") == pytest.approx(mean)
        assert effect(effects, "optimizer", str(level)) == pytest.approx(mean - effects.grand_mean)


def test_an_interaction_is_the_difference_from_the_sum_of_both_levels() -> None:
    trials = grid()
    effects = measure_rung_effects(trials)
    means = trials.groupby(["activation", "optimizer"])["val_accuracy_at_1"].mean()
    rows = effects.interactions.query("factor == 'activation' and other_factor == 'optimizer'")
    for row in rows.to_dict("records"):
        alone = effect(effects, "activation", row["level"]) + effect(effects, "optimizer", row["other_level"])
        expected = means[row["level"], row["other_level"]] - effects.grand_mean - alone
        assert row["effect"] == pytest.approx(expected)


@given(st.sets(st.integers(0, 47), max_size=8), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_effects_sum_to_zero_over_a_factor(lost: set[int], random_state: int) -> None:
    effects = measure_rung_effects(without(grid(random_state=random_state), *lost))
    np.testing.assert_allclose(effects.levels.groupby("factor")["effect"].sum(), 0, atol=1e-12)
    by = effects.interactions.groupby(["factor", "other_factor", "level"])
    np.testing.assert_allclose(by["effect"].sum(), 0, atol=1e-12)


@given(st.permutations(LEVELS["optimizer"][:4]), st.sets(st.integers(0, 47), max_size=4))
@settings(max_examples=25, deadline=None)
def test_names_of_levels_do_not_matter(names: list[str], lost: set[int]) -> None:
    trials = without(grid(), *lost)
    renamed = dict(zip(LEVELS["optimizer"][:4], names, strict=True))
    before, after = measure_rung_effects(trials), measure_rung_effects(trials.replace({"optimizer": renamed}))
    for old, new in renamed.items():
        for column in ("effect", "low", "high", "observations"):
            assert effect(after, "optimizer", new, column) == pytest.approx(effect(before, "optimizer", old, column))
    np.testing.assert_allclose(before.variance["p"], after.variance["p"])


def test_without_noise_a_planted_effect_is_found_exactly() -> None:
    trials = without(grid(), 3, 20)
    planted = trials["optimizer"].map({"sgd": -0.1, "adam": 0.1, "rmsprop": 0.03, "asgd": -0.03})
    effects = measure_rung_effects(
        trials.assign(val_accuracy_at_1=(0.5 + planted).mask(trials["status"] == "diverged"))
    )
    found = effects.levels.set_index("level").loc["adam"]
    assert found[["effect", "low", "high"]].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert effects.variance["term"].iloc[0] == "optimizer"
    assert term(effects, "residual")["share"] == 0


def test_seeds_are_blocks() -> None:
    trials = grid()
    shifted = trials.assign(val_accuracy_at_1=trials["val_accuracy_at_1"] + 0.3 * trials["seed"])
    before, after = measure_rung_effects(trials), measure_rung_effects(shifted)
    assert after.residual_sd == pytest.approx(before.residual_sd)
    assert after.variance["term"].iloc[0] == "seed"
    assert np.isnan(term(after, "seed")["p_holm"])


def test_p_values_are_corrected_by_holm() -> None:
    table = measure_rung_effects(grid()).variance.query("term not in ('seed', 'residual')")
    np.testing.assert_allclose(table["p_holm"], multipletests(table["p"], method="holm")[1])


def test_omega_squared_of_noise_is_zero_on_average() -> None:
    values = [term(measure_rung_effects(grid(random_state=i)), "activation")["omega_squared"] for i in range(60)]
    assert min(values) < 0
    assert np.mean(values) == pytest.approx(0, abs=0.013)


def planted(trials: pd.DataFrame, random: np.random.Generator, *, heteroscedastic: bool) -> pd.DataFrame:
    scale = 0.05 * np.where(heteroscedastic & (trials["optimizer"] == "sgd"), 4, 1)
    return trials.assign(val_accuracy_at_1=random.normal(0.5, scale))


@pytest.mark.parametrize(("lost", "heteroscedastic"), [((), False), ((), True), ((0, 5, 6, 17), True)])
def test_95_percent_of_the_intervals_cover_the_truth(lost: tuple[int, ...], heteroscedastic: bool) -> None:
    random, covered = np.random.default_rng(1), []
    for _ in range(70):
        effects = measure_rung_effects(without(planted(grid(), random, heteroscedastic=heteroscedastic), *lost))
        rows = pd.concat([effects.levels, effects.interactions])
        covered.append(((rows["low"] <= 0) & (rows["high"] >= 0)).mean())
    assert 0.92 < np.mean(covered) < 0.98


def test_a_noisier_level_has_a_wider_interval() -> None:
    trials = planted(grid(seeds=6), np.random.default_rng(0), heteroscedastic=True)
    rows = measure_rung_effects(trials).levels.set_index("level")
    width = rows["high"] - rows["low"]
    assert width["sgd"] > 1.5 * width["adam"]


def test_intervals_use_the_degrees_of_freedom_of_bell_and_mccaffrey() -> None:
    trials = without(grid({"model": 2, "activation": 3}, seeds=3), 0, 4)
    seen = trials.dropna(subset="val_accuracy_at_1")
    fit = ols("val_accuracy_at_1 ~ C(model, Sum) * C(activation, Sum) + C(seed, Sum)", seen).fit()
    weights = fit.model.pinv_wexog[1]
    space = null_space(fit.model.exog.T)
    slack = np.sum(space**2, axis=1)
    roots = np.linalg.eigvalsh((space.T * weights**2 / slack) @ space)
    df = roots.sum() ** 2 / (roots**2).sum()
    row = measure_rung_effects(trials).levels.iloc[0]
    expected = fit.HC2_se.iloc[1] * t.ppf(0.975, df)
    assert row["high"] - row["effect"] == pytest.approx(expected)


def test_a_diverged_trial_does_not_count_as_zero() -> None:
    trials = grid()
    worst = without(trials, 0)
    assert measure_rung_effects(worst).grand_mean == pytest.approx(measure_rung_effects(trials).grand_mean, abs=0.02)
    assert measure_rung_effects(worst).missing == 1
    assert any(
        "1 diverged trial left out of the means, not counted as zero" in n for n in measure_rung_effects(worst).notes
    )


def test_a_trial_that_diverged_after_the_rung_counts_at_the_rung() -> None:
    trials = grid()
    trials.loc[0, "status"] = "diverged"
    assert measure_rung_effects(trials).complete
    assert measure_rung_effects(trials).divergence["diverged"].tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 0]


def test_divergence_is_a_rate_with_a_wilson_interval() -> None:
    row = measure_rung_effects(without(grid(), 0, 1)).divergence.iloc[0]
    assert (row["level"], row["trials"], row["diverged"], row["rate"]) == ("mlp", 24, 2, pytest.approx(1 / 12))
    assert (row["low"], row["high"]) == (pytest.approx(0.0232, abs=1e-4), pytest.approx(0.2585, abs=1e-4))


def test_failed_trials_are_missing_but_not_counted_as_diverged() -> None:
    effects = measure_rung_effects(without(grid(), 0, status="failed"))
    assert (effects.missing, effects.divergence["diverged"].sum()) == (1, 0)


def test_the_learning_rate_scale_counts_at_which_a_cell_is_ranked() -> None:
    trials = grid().assign(best_val_accuracy=0.9, stop_epoch=np.nan)
    worse = trials.assign(lr_scale=0.5, final_val_accuracy=0.8, val_accuracy_at_1=trials["val_accuracy_at_1"] + 0.1)
    both = measure_rung_effects(pd.concat([worse, trials], ignore_index=True))
    pd.testing.assert_frame_equal(both.levels, measure_rung_effects(trials).levels)
    assert both.notes[-1] == "of 2 learning-rate scales, for each cell the one counts at which it is ranked"


def test_a_factor_with_one_level_is_fixed() -> None:
    effects = measure_rung_effects(grid())
    assert effects.factors == ("model", "activation", "optimizer")
    assert effects.fixed == {"lr_schedule": "constant", "batch_norm": "off", "regularization": "none", "dropout": "off"}


def test_an_interaction_with_an_empty_combination_is_left_out() -> None:
    trials = grid()
    lost = trials.index[(trials["activation"] == "elu") & (trials["optimizer"] == "sgd")]
    effects = measure_rung_effects(without(trials, *lost))
    assert effects.interactions_left_out == ("activation x optimizer",)
    assert list(dict.fromkeys(effects.interactions["other_factor"])) == ["activation", "optimizer"]
    assert "interactions that these trials can't estimate: activation x optimizer" in effects.notes


def test_a_level_without_any_accuracy_has_a_row_but_no_effect() -> None:
    trials = grid()
    effects = measure_rung_effects(without(trials, *trials.index[trials["optimizer"] == "sgd"]))
    assert effect(effects, "optimizer", "sgd", "observations") == 0
    assert np.isnan(effect(effects, "optimizer", "sgd"))
    assert effects.levels["effect"].count() == len(effects.levels) - 1
    assert "no accuracy at all, hence no effect: optimizer=sgd" in effects.notes


def test_a_saturated_grid_has_effects_but_no_intervals() -> None:
    effects = measure_rung_effects(grid({"model": 2, "activation": 3}, seeds=1))
    assert effects.levels["effect"].notna().all()
    assert np.isnan(effects.residual_sd)
    assert effects.levels[["low", "high"]].isna().all(axis=None)
    assert effects.variance[["F", "p", "p_holm"]].isna().all(axis=None)
    assert any("the effects have no intervals" in note for note in effects.notes)


def test_the_first_trials_of_a_grid_yield_main_effects_alone() -> None:
    effects = measure_rung_effects(grid({"model": 2, "activation": 2, "optimizer": 2}, seeds=1).iloc[:7])
    assert effects.interactions_left_out == tuple(" x ".join(pair) for pair in combinations(effects.factors, 2))
    assert effects.levels["high"].notna().all()


def test_an_observation_alone_in_its_combination_does_not_change_the_noise() -> None:
    trials = grid(seeds=3)
    rows = trials.index[(trials["activation"] == "elu") & (trials["optimizer"] == "sgd")]
    effects = measure_rung_effects(without(trials, *rows[1:]))
    alone = effects.interactions.query("level == 'elu' and other_level == 'sgd'").iloc[0]
    assert effects.interactions_left_out == ()
    assert effects.residual_sd < alone["high"] - alone["effect"] < 3 * effects.residual_sd


def test_accuracies_that_are_all_equal_have_no_effects() -> None:
    effects = measure_rung_effects(grid().assign(val_accuracy_at_1=0.7))
    assert (effects.grand_mean, effects.residual_sd) == (pytest.approx(0.7), 0)
    assert effects.variance["share"].isna().all()
    np.testing.assert_allclose(effects.levels[["effect", "low", "high"]], 0, atol=1e-12)


def test_a_note_says_that_a_later_rung_has_survivors_only() -> None:
    trials = grid()
    trials.loc[[1, 2, 3], ["val_accuracy_at_3", "status"]] = [np.nan, "stopped"]
    effects = measure_rung_effects(trials.assign(control=trials.index < 2), epoch=3)
    assert (effects.epoch, effects.observations) == (3, 45)
    assert any("survivors only: 45 of 48 trials, among them 1 unstopped control" in note for note in effects.notes)


def test_survivors_are_counted_per_level_of_each_later_rung() -> None:
    trials = grid()
    trials.loc[[1, 2, 3], "val_accuracy_at_3"] = np.nan
    row = measure_rung_effects(trials).survivors.iloc[0]
    assert (row["rung"], row["level"], row["trials"], row["reached"]) == (3, "mlp", 24, 21)
    assert row["mean"] == pytest.approx(trials.query("model == 'mlp'")["val_accuracy_at_3"].mean())


def test_a_grid_without_rungs_is_analysed_at_its_full_budget() -> None:
    trials = grid().drop(columns=["val_accuracy_at_1", "val_accuracy_at_3"]).assign(epochs=1)
    trials.loc[0, ["status", "final_val_accuracy"]] = ["failed", np.nan]
    effects = measure_rung_effects(trials)
    assert (effects.epoch, effects.observations, len(effects.survivors)) == (1, 47, 0)
    assert effects.grand_mean == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (grid().iloc[:0], "^there are no trials to analyse; run python -m grid.run first$"),
        (grid().assign(epochs=[3, 9] * 24), "^trials of 3 and 9 epochs can't be analysed together$"),
        (without(grid(), *range(48)), "^no trial has an accuracy at epoch 1: all diverged or failed; try --lr-scales"),
        (grid({}), "^every factor has an accuracy at one level only; run a grid with two levels of a factor$"),
        (grid().iloc[[0, 46]], "^2 accuracies are too few to separate activation from the rest; wait for more trials$"),
    ],
)
def test_trials_that_cannot_be_analysed_raise_an_error(trials: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_rung_effects(trials)


def test_an_epoch_that_is_not_a_rung_is_an_error_with_the_choices() -> None:
    with pytest.raises(InputError, match="^epoch 2 is not a rung; choose from 1, 3$"):
        measure_rung_effects(grid(), epoch=2)


def test_a_note_says_what_the_residual_of_one_seed_mixes() -> None:
    note = "one seed: the residual mixes noise with interactions of three or more factors"
    assert note in measure_rung_effects(grid(seeds=1)).notes
    assert note not in measure_rung_effects(grid(seeds=2)).notes
