from itertools import combinations, product
from pathlib import Path

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

from analysis.effects import Effects, format_effects, main, measure_effects, measure_final_effects
from grid.config import FACTORS, LEVELS, InputError, TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

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
        best_val_accuracy=0.9,
        val_accuracy_at_1=noise[:, 0],
        val_accuracy_at_3=noise[:, 1] + 0.2,
    )


def without(trials: pd.DataFrame, *rows: int, status: str = "diverged") -> pd.DataFrame:
    """Return the trials without an accuracy in the given rows."""
    trials = trials.copy()
    trials.loc[list(rows), "status"] = status
    trials.loc[list(rows), ["val_accuracy_at_1", "val_accuracy_at_3", "best_val_accuracy"]] = np.nan
    return trials


def effect(effects: Effects, factor: str, level: str, column: str = "effect") -> float:
    return float(effects.levels.set_index(["factor", "level"]).loc[(factor, level), column])


def term(effects: Effects, name: str) -> pd.Series:
    return effects.variance.set_index("term").loc[name]


def reference(trials: pd.DataFrame) -> pd.DataFrame:
    formula = "val_accuracy_at_1 ~ (C(model, Sum) + C(activation, Sum) + C(optimizer, Sum)) ** 2 + C(seed, Sum)"
    table = anova_lm(ols(formula, trials.dropna(subset="val_accuracy_at_1")).fit(), typ=2)
    table.index = table.index.str.replace(r"C\((\w+), Sum\)", r"\1", regex=True).str.replace(":", " x ")
    return table.rename(index={"Residual": "residual"})


@pytest.mark.parametrize("lost", [(), (0, 5, 6, 17)])
def test_the_variance_table_is_that_of_statsmodels(lost: tuple[int, ...]) -> None:
    trials = without(grid(), *lost)
    table, expected = measure_effects(trials).variance.set_index("term"), reference(trials)
    assert set(table.index) == set(expected.index)
    for ours, theirs in (("sum_of_squares", "sum_sq"), ("df", "df"), ("F", "F"), ("p", "PR(>F)")):
        np.testing.assert_allclose(table[ours], expected.loc[table.index, theirs], rtol=1e-8)


def test_in_a_complete_grid_the_sum_of_squares_of_a_factor_follows_from_its_effects() -> None:
    effects = measure_effects(grid())
    for factor, rows in effects.levels.groupby("factor"):
        closed_form = effects.observations / len(rows) * np.sum(rows["effect"] ** 2)
        assert term(effects, str(factor))["sum_of_squares"] == pytest.approx(closed_form)


def test_sums_of_squares_are_those_of_the_example_in_anova() -> None:
    trials = grid({"model": 2, "activation": 2}, seeds=1)
    effects = measure_effects(trials.assign(val_accuracy_at_1=[0.5, 0.6, 0.7, 1.0]))
    squares = effects.variance.set_index("term")["sum_of_squares"]
    assert squares[["model", "activation", "model x activation"]].tolist() == pytest.approx([0.09, 0.04, 0.01])
    assert effects.interactions["effect"].tolist() == pytest.approx([0.05, -0.05, -0.05, 0.05])


def test_in_a_complete_grid_the_shares_add_up() -> None:
    effects = measure_effects(grid())
    assert effects.complete
    assert effects.variance["share"].sum() == pytest.approx(1)
    assert effects.variance["term"].iloc[-1] == "residual"
    assert effects.variance["share"].iloc[:-1].is_monotonic_decreasing


def test_in_a_complete_grid_effects_are_differences_of_means() -> None:
    trials = grid()
    effects, means = measure_effects(trials), trials.groupby("optimizer")["val_accuracy_at_1"].mean()
    assert effects.grand_mean == pytest.approx(trials["val_accuracy_at_1"].mean())
    for level, mean in means.items():
        assert effect(effects, "optimizer", str(level), "mean") == pytest.approx(mean)
        assert effect(effects, "optimizer", str(level)) == pytest.approx(mean - effects.grand_mean)


def test_an_interaction_is_the_difference_from_the_sum_of_both_levels() -> None:
    trials = grid()
    effects = measure_effects(trials)
    means = trials.groupby(["activation", "optimizer"])["val_accuracy_at_1"].mean()
    rows = effects.interactions.query("factor == 'activation' and other_factor == 'optimizer'")
    for row in rows.to_dict("records"):
        alone = effect(effects, "activation", row["level"]) + effect(effects, "optimizer", row["other_level"])
        expected = means[row["level"], row["other_level"]] - effects.grand_mean - alone
        assert row["effect"] == pytest.approx(expected)


@given(st.sets(st.integers(0, 47), max_size=8), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_effects_sum_to_zero_over_a_factor(lost: set[int], random_state: int) -> None:
    effects = measure_effects(without(grid(random_state=random_state), *lost))
    np.testing.assert_allclose(effects.levels.groupby("factor")["effect"].sum(), 0, atol=1e-12)
    by = effects.interactions.groupby(["factor", "other_factor", "level"])
    np.testing.assert_allclose(by["effect"].sum(), 0, atol=1e-12)


@given(st.permutations(LEVELS["optimizer"][:4]), st.sets(st.integers(0, 47), max_size=4))
@settings(max_examples=25, deadline=None)
def test_names_of_levels_do_not_matter(names: list[str], lost: set[int]) -> None:
    trials = without(grid(), *lost)
    renamed = dict(zip(LEVELS["optimizer"][:4], names, strict=True))
    before, after = measure_effects(trials), measure_effects(trials.replace({"optimizer": renamed}))
    for old, new in renamed.items():
        for column in ("effect", "low", "high", "observations"):
            assert effect(after, "optimizer", new, column) == pytest.approx(effect(before, "optimizer", old, column))
    np.testing.assert_allclose(before.variance["p"], after.variance["p"])


def test_without_noise_a_planted_effect_is_found_exactly() -> None:
    trials = without(grid(), 3, 20)
    planted = trials["optimizer"].map({"sgd": -0.1, "adam": 0.1, "rmsprop": 0.03, "asgd": -0.03})
    effects = measure_effects(trials.assign(val_accuracy_at_1=(0.5 + planted).mask(trials["status"] == "diverged")))
    found = effects.levels.set_index("level").loc["adam"]
    assert found[["effect", "low", "high"]].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert effects.variance["term"].iloc[0] == "optimizer"
    assert term(effects, "residual")["share"] == 0


def test_seeds_are_blocks() -> None:
    trials = grid()
    shifted = trials.assign(val_accuracy_at_1=trials["val_accuracy_at_1"] + 0.3 * trials["seed"])
    before, after = measure_effects(trials), measure_effects(shifted)
    assert after.residual_sd == pytest.approx(before.residual_sd)
    assert after.variance["term"].iloc[0] == "seed"
    assert np.isnan(term(after, "seed")["p_holm"])


def test_p_values_are_corrected_by_holm() -> None:
    table = measure_effects(grid()).variance.query("term not in ('seed', 'residual')")
    np.testing.assert_allclose(table["p_holm"], multipletests(table["p"], method="holm")[1])


def test_omega_squared_of_noise_is_zero_on_average() -> None:
    values = [term(measure_effects(grid(random_state=i)), "activation")["omega_squared"] for i in range(60)]
    assert min(values) < 0
    assert np.mean(values) == pytest.approx(0, abs=0.013)


def planted(trials: pd.DataFrame, random: np.random.Generator, *, heteroscedastic: bool) -> pd.DataFrame:
    scale = 0.05 * np.where(heteroscedastic & (trials["optimizer"] == "sgd"), 4, 1)
    return trials.assign(val_accuracy_at_1=random.normal(0.5, scale))


@pytest.mark.parametrize(("lost", "heteroscedastic"), [((), False), ((), True), ((0, 5, 6, 17), True)])
def test_95_percent_of_the_intervals_cover_the_truth(lost: tuple[int, ...], heteroscedastic: bool) -> None:
    random, covered = np.random.default_rng(1), []
    for _ in range(70):
        effects = measure_effects(without(planted(grid(), random, heteroscedastic=heteroscedastic), *lost))
        rows = pd.concat([effects.levels, effects.interactions])
        covered.append(((rows["low"] <= 0) & (rows["high"] >= 0)).mean())
    assert 0.92 < np.mean(covered) < 0.98


def test_a_noisier_level_has_a_wider_interval() -> None:
    trials = planted(grid(seeds=6), np.random.default_rng(0), heteroscedastic=True)
    rows = measure_effects(trials).levels.set_index("level")
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
    row = measure_effects(trials).levels.iloc[0]
    expected = fit.HC2_se.iloc[1] * t.ppf(0.975, df)
    assert row["high"] - row["effect"] == pytest.approx(expected)


def test_a_diverged_trial_does_not_count_as_zero() -> None:
    trials = grid()
    worst = without(trials, 0)
    assert measure_effects(worst).grand_mean == pytest.approx(measure_effects(trials).grand_mean, abs=0.02)
    assert measure_effects(worst).missing == 1
    assert any("1 diverged trial left out of the means, not counted as zero" in n for n in measure_effects(worst).notes)


def test_a_trial_that_diverged_after_the_rung_counts_at_the_rung() -> None:
    trials = grid()
    trials.loc[0, "status"] = "diverged"
    assert measure_effects(trials).complete
    assert measure_effects(trials).divergence["diverged"].tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 0]


def test_divergence_is_a_rate_with_a_wilson_interval() -> None:
    row = measure_effects(without(grid(), 0, 1)).divergence.iloc[0]
    assert (row["level"], row["trials"], row["diverged"], row["rate"]) == ("mlp", 24, 2, pytest.approx(1 / 12))
    assert (row["low"], row["high"]) == (pytest.approx(0.0232, abs=1e-4), pytest.approx(0.2585, abs=1e-4))


def test_failed_trials_are_missing_but_not_counted_as_diverged() -> None:
    effects = measure_effects(without(grid(), 0, status="failed"))
    assert (effects.missing, effects.divergence["diverged"].sum()) == (1, 0)


def test_the_best_learning_rate_scale_counts() -> None:
    trials = grid()
    worse = trials.assign(lr_scale=0.5, val_accuracy_at_1=trials["val_accuracy_at_1"] - 0.1)
    both = measure_effects(pd.concat([worse, trials], ignore_index=True))
    pd.testing.assert_frame_equal(both.levels, measure_effects(trials).levels)
    assert both.notes[-1] == "for each cell and seed the best of 2 learning-rate scales counts"


def test_a_factor_with_one_level_is_fixed() -> None:
    effects = measure_effects(grid())
    assert effects.factors == ("model", "activation", "optimizer")
    assert effects.fixed == {"lr_schedule": "constant", "batch_norm": "off", "regularization": "none", "dropout": "off"}


def test_an_interaction_with_an_empty_combination_is_left_out() -> None:
    trials = grid()
    lost = trials.index[(trials["activation"] == "elu") & (trials["optimizer"] == "sgd")]
    effects = measure_effects(without(trials, *lost))
    assert effects.interactions_left_out == ("activation x optimizer",)
    assert list(dict.fromkeys(effects.interactions["other_factor"])) == ["activation", "optimizer"]
    assert "interactions that these trials can't estimate: activation x optimizer" in effects.notes


def test_a_level_without_any_accuracy_has_a_row_but_no_effect() -> None:
    trials = grid()
    effects = measure_effects(without(trials, *trials.index[trials["optimizer"] == "sgd"]))
    assert effect(effects, "optimizer", "sgd", "observations") == 0
    assert np.isnan(effect(effects, "optimizer", "sgd"))
    assert effects.levels["effect"].count() == len(effects.levels) - 1
    assert "no accuracy at all, hence no effect: optimizer=sgd" in effects.notes


def test_a_saturated_grid_has_effects_but_no_intervals() -> None:
    effects = measure_effects(grid({"model": 2, "activation": 3}, seeds=1))
    assert effects.levels["effect"].notna().all()
    assert np.isnan(effects.residual_sd)
    assert effects.levels[["low", "high"]].isna().all(axis=None)
    assert effects.variance[["F", "p", "p_holm"]].isna().all(axis=None)
    assert any("the effects have no intervals" in note for note in effects.notes)


def test_the_first_trials_of_a_grid_yield_main_effects_alone() -> None:
    effects = measure_effects(grid({"model": 2, "activation": 2, "optimizer": 2}, seeds=1).iloc[:7])
    assert effects.interactions_left_out == tuple(" x ".join(pair) for pair in combinations(effects.factors, 2))
    assert effects.levels["high"].notna().all()


def test_an_observation_alone_in_its_combination_does_not_change_the_noise() -> None:
    trials = grid(seeds=3)
    rows = trials.index[(trials["activation"] == "elu") & (trials["optimizer"] == "sgd")]
    effects = measure_effects(without(trials, *rows[1:]))
    alone = effects.interactions.query("level == 'elu' and other_level == 'sgd'").iloc[0]
    assert effects.interactions_left_out == ()
    assert effects.residual_sd < alone["high"] - alone["effect"] < 3 * effects.residual_sd


def test_accuracies_that_are_all_equal_have_no_effects() -> None:
    effects = measure_effects(grid().assign(val_accuracy_at_1=0.7))
    assert (effects.grand_mean, effects.residual_sd) == (pytest.approx(0.7), 0)
    assert effects.variance["share"].isna().all()
    np.testing.assert_allclose(effects.levels[["effect", "low", "high"]], 0, atol=1e-12)


def test_a_note_says_that_a_later_rung_has_survivors_only() -> None:
    trials = grid()
    trials.loc[[1, 2, 3], ["val_accuracy_at_3", "status"]] = [np.nan, "stopped"]
    effects = measure_effects(trials.assign(control=trials.index < 2), epoch=3)
    assert (effects.epoch, effects.observations) == (3, 45)
    assert any("survivors only: 45 of 48 trials, among them 1 unstopped control" in note for note in effects.notes)


def test_survivors_are_counted_per_level_of_each_later_rung() -> None:
    trials = grid()
    trials.loc[[1, 2, 3], "val_accuracy_at_3"] = np.nan
    row = measure_effects(trials).survivors.iloc[0]
    assert (row["rung"], row["level"], row["trials"], row["reached"]) == (3, "mlp", 24, 21)
    assert row["mean"] == pytest.approx(trials.query("model == 'mlp'")["val_accuracy_at_3"].mean())


def test_a_grid_without_rungs_is_analysed_at_its_full_budget() -> None:
    trials = grid().drop(columns=["val_accuracy_at_1", "val_accuracy_at_3"]).assign(epochs=1)
    trials.loc[0, "status"] = "stopped"
    effects = measure_effects(trials)
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
        measure_effects(trials)


def test_an_epoch_that_is_not_a_rung_is_an_error_with_the_choices() -> None:
    with pytest.raises(InputError, match="^epoch 2 is not a rung; choose from 1, 3$"):
        measure_effects(grid(), epoch=2)


def controlled() -> pd.DataFrame:
    """Return a grid whose unstopped controls, half of its trials, reverse the effect of the first rung at the end."""
    trials = grid(seeds=4)
    trials["control"] = trials["seed"] < 2
    trials["val_accuracy_at_1"] = trials["val_accuracy_at_1"] + 0.1 * (trials["model"] == "cnn")
    at_end = 0.7 - 0.1 * (trials["model"] == "cnn") + trials["val_accuracy_at_3"] / 100
    trials["best_val_accuracy"] = at_end.where(trials["control"], 0.99)
    return trials


def test_effects_at_the_end_are_estimated_from_the_controls_alone() -> None:
    first, last = measure_effects(controlled()), measure_final_effects(controlled())
    assert (last.epoch, last.observations) == (9, controlled()["control"].sum())
    assert effect(first, "model", "cnn") == pytest.approx(0.05, abs=0.02)
    assert effect(last, "model", "cnn") == pytest.approx(-0.05, abs=0.002)
    assert last.notes[0].startswith(
        "estimated from 48 unstopped controls, drawn at random: the effects of levels after 9"
    )


def test_a_note_counts_diverged_controls() -> None:
    notes = measure_final_effects(without(controlled(), 0)).notes
    assert notes[1].startswith("1 diverged trial left out of the means, not counted as zero")


def test_without_controls_the_effects_at_the_end_are_unknown() -> None:
    with pytest.raises(InputError, match="^no unstopped controls, so effects at the end are unknown; run grid.run"):
        measure_final_effects(grid())


def test_too_few_controls_are_named_instead_of_the_grid() -> None:
    trials = grid(seeds=1)
    trials["control"] = trials.index == trials.index[0]
    with pytest.raises(InputError, match=r"^1 unstopped control, too few to estimate effects .* takes \d+ or more;"):
        measure_final_effects(trials)


def test_a_note_says_what_the_residual_of_one_seed_mixes() -> None:
    note = "one seed: the residual mixes noise with interactions of three or more factors"
    assert note in measure_effects(grid(seeds=1)).notes
    assert note not in measure_effects(grid(seeds=2)).notes


@pytest.mark.parametrize("trials", [without(grid(dict.fromkeys(FACTORS, 2), 1), 3), grid({"model": 2}, seeds=1)])
def test_the_text_is_at_most_80_columns_wide(trials: pd.DataFrame) -> None:
    assert max(map(len, format_effects(measure_effects(trials)).splitlines())) <= 80


def test_the_text_has_every_level_and_the_largest_terms() -> None:
    effects = measure_effects(without(grid(dict.fromkeys(FACTORS, 2), seeds=1), 3))
    text = format_effects(effects)
    assert all(f"\n{row.factor}={row.level} " in text for row in effects.levels.itertuples())
    assert [line.split("  ")[0] in text for line in effects.variance["term"][:7]] == [True] * 7
    assert "\n15 more interactions " in text
    assert f"{100 * effect(effects, 'model', 'cnn'):+.2f}" in text


def test_the_command_prints_the_effects_and_writes_them(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({}, {})
    for seed, (optimizer, accuracy) in product((0, 1), (("sgd", 0.5), ("adam", 0.7))):
        config = TrialConfig(optimizer=optimizer, seed=seed, learning_rate=1e-3, epochs=1)
        recorder.started(config, control=False)
        recorder.epoch_ended(config, EpochReport(epoch=1, val_accuracy=accuracy), is_rung=False)
        recorder.ended(config, "completed", epochs_run=1, best_val_accuracy=accuracy)
    recorder.close(finished=True)
    assert main(["--experiment", "some grid", "--store", store.uri, "--csv", str(tmp_path / "x.csv")]) == 0
    assert "optimizer=adam 2 70.00% +10.00 +10.00 to +10.00" in " ".join(capsys.readouterr().out.split())
    assert pd.read_csv(tmp_path / "x.csv")["mean"].tolist() == pytest.approx([0.5, 0.7])
    assert main(["--experiment", "some grid", "--store", store.uri, "--svg", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    assert main(["--experiment", "some grid", "--store", store.uri, "--controls"]) == 2
    assert "no unstopped controls" in capsys.readouterr().err


def test_a_missing_store_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.effects: can't open the store")
    assert list(tmp_path.iterdir()) == []
