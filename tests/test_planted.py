import math
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from analysis.estimates.rung_effects import measure_rung_effects
from analysis.stopping.verdicts import stop_epochs
from benchmarks.planted import coverage
from benchmarks.planted.__main__ import main
from benchmarks.planted.coverage import compare, examine, format_summary, least_squares, summarise, tally_ranking
from benchmarks.planted.grids import COUNTS, EPOCHS, LEVEL_NAMES, POINTS, RUNGS, Grid, Plan, plant, true_false_stops
from grid.config import FACTORS

NOISELESS = Plan(noise_sd=0, level_seed_sd=0)


def grid(plan: Plan = Plan(), seed: int = 0) -> Grid:  # noqa: B008  (frozen)
    return plant(plan, np.random.default_rng(seed))


def test_planted_effects_sum_to_zero_over_the_levels_of_each_factor() -> None:
    truth = grid().truth
    for factor, names in LEVEL_NAMES.items():
        assert np.sum([truth[factor, name] for name in names], axis=0) == pytest.approx(0)
    for name in LEVEL_NAMES["optimizer"]:
        pairs = [truth["activation", other, "optimizer", name] for other in LEVEL_NAMES["activation"]]
        assert np.sum(pairs, axis=0) == pytest.approx(0)


@pytest.mark.parametrize("point", range(len(POINTS)))
def test_without_noise_the_planted_effects_are_differences_of_means(point: int) -> None:
    simulated = grid(NOISELESS)
    column = "best_val_accuracy" if POINTS[point] == EPOCHS else f"val_accuracy_at_{POINTS[point]}"
    accuracies = simulated.unstopped[column]
    for factor in FACTORS:
        for level, mean in accuracies.groupby(simulated.unstopped[factor]).mean().items():
            assert mean - accuracies.mean() == pytest.approx(simulated.truth[factor, str(level)][point], abs=1e-12)


@pytest.mark.parametrize("plan", [NOISELESS, replace(NOISELESS, holes=True), replace(NOISELESS, seeds=2)])
def test_without_noise_the_analysis_finds_the_planted_effects(plan: Plan) -> None:
    simulated = grid(plan)
    effects = measure_rung_effects(simulated.trials, epoch=1)
    for table in (effects.levels, effects.interactions):
        assert compare(table, simulated.truth, 0)["error"].abs().max() < 1e-9


def test_effects_at_the_first_rung_and_at_the_end_correlate_as_planned() -> None:
    effects = np.array([e for seed in range(20) for label, e in grid(seed=seed).truth.items() if len(label) == 2])
    assert np.corrcoef(effects[:, 0], effects[:, -1])[0, 1] == pytest.approx(0.8, abs=0.06)


def test_uneven_noise_differs_by_level() -> None:
    trials, even = grid(Plan(uneven=True)).unstopped, grid().unstopped
    noise = (trials["val_accuracy_at_1"] - even["val_accuracy_at_1"]).groupby(trials["optimizer"]).std()
    assert noise[LEVEL_NAMES["optimizer"][2]] > 1.5 * noise[LEVEL_NAMES["optimizer"][1]]


def test_a_simulated_trial_looks_like_a_stored_one() -> None:
    trials = grid(Plan(holes=True, seeds=2)).trials
    assert len(trials) == 2 * math.prod(COUNTS)
    assert set(trials["status"]) == {"completed", "stopped", "diverged"}
    reached = trials[[f"val_accuracy_at_{rung}" for rung in RUNGS]].notna().sum(axis=1)
    stopped = trials["status"] == "stopped"
    assert (trials.loc[stopped, "stopped_at_epoch"] == trials.loc[stopped, "epochs_run"]).all()
    assert (reached[stopped] == trials.loc[stopped, "epochs_run"].map({1: 1, 3: 2})).all()
    assert trials.loc[trials["status"] == "completed", "epochs_run"].eq(EPOCHS).all()


def test_a_diverged_trial_has_no_accuracy_from_its_last_epoch_on() -> None:
    trials = grid(Plan(holes=True, seeds=2)).trials
    diverged = trials[trials["status"] == "diverged"]
    for rung in RUNGS:
        assert (diverged[f"val_accuracy_at_{rung}"].isna() == (diverged["epochs_run"] <= rung)).all()


def test_controls_are_never_stopped_and_about_a_third_of_the_others_continue() -> None:
    trials = grid().trials
    assert set(trials.loc[trials["control"], "status"]) == {"completed"}
    assert 0.3 <= trials.loc[~trials["control"], "epochs_run"].gt(1).mean() <= 0.45


def test_trials_diverge_where_their_levels_do() -> None:
    trials = grid(Plan(holes=True, seeds=2)).trials
    risky = (trials["optimizer"] == LEVEL_NAMES["optimizer"][2]) & (trials["batch_norm"] == "off")
    diverged = trials["status"] == "diverged"
    assert diverged[risky].mean() > 2 * diverged[~risky].mean()
    assert not (grid().trials["status"] == "diverged").any()


@pytest.mark.parametrize("holes", [False, True])
def test_controls_have_the_verdicts_that_the_other_trials_get(holes: bool) -> None:
    trials = grid(Plan(holes=holes, seeds=2)).trials
    others = trials[~trials["control"]]
    assert (others["stop_epoch"].notna() == (others["status"] == "stopped")).all()
    rates = trials[trials["val_accuracy_at_1"].notna()].groupby("control")["stop_epoch"].agg(lambda at: at.eq(1).mean())
    assert rates[True] == pytest.approx(rates[False], abs=0.2)
    replayed = stop_epochs(trials.drop(columns=["stop_epoch", "control_chance"]), RUNGS)[trials["control"]]
    assert (replayed.fillna(0) == trials.loc[trials["control"], "stop_epoch"].fillna(0)).mean() > 0.8


def count_false_stops(simulated: Grid, model: str) -> float:
    """Count the false stops again, trial by trial, as they are defined."""
    trials = [row for row in simulated.trials.to_dict("records") if row["model"] == model]
    ends = {row["trial_key"]: row for row in simulated.unstopped.to_dict("records")}
    stopped = {row["trial_key"] for row in trials if not math.isnan(row["stop_epoch"])}
    survivors = [r for r in trials if r["status"] == "completed" and not (r["control"] and r["trial_key"] in stopped)]
    median = np.median([row["final_val_accuracy"] for row in survivors])
    wrong = [k for k in stopped if ends[k]["status"] == "completed" and ends[k]["final_val_accuracy"] > median]
    return len(wrong) / len(stopped)


@pytest.mark.parametrize(("holes", "correlation"), [*product((False, True), (0.8, 0.4))])
def test_the_true_rate_of_false_stops_equals_a_count_trial_by_trial(holes: bool, correlation: float) -> None:
    simulated = grid(Plan(holes=holes, correlation=correlation, seeds=2))
    rates = true_false_stops(simulated)
    assert rates == {model: pytest.approx(count_false_stops(simulated, model)) for model in LEVEL_NAMES["model"]}
    assert max(rates.values()) > 0


def test_curves_that_never_cross_have_no_false_stops() -> None:
    assert true_false_stops(grid(Plan(correlation=1, seeds=2))) == {"mlp": 0, "cnn": 0}


def test_least_squares_finds_main_effects_without_noise_and_omits_absent_levels() -> None:
    simulated = grid(NOISELESS)
    found = compare(least_squares(simulated.unstopped), simulated.truth, -1)
    assert found["error"].abs().max() < 1e-9
    absent = LEVEL_NAMES["optimizer"][0]
    assert absent not in set(least_squares(simulated.unstopped[simulated.unstopped["optimizer"] != absent])["level"])
    assert least_squares(simulated.unstopped[:5]).empty


def test_the_truth_is_centred_on_the_levels_that_have_an_estimate() -> None:
    estimates = pd.DataFrame({"factor": ["a", "a"], "level": ["x", "y"], "effect": [-1.0, 1.0], "low": -3.0, "high": 0})
    found = compare(estimates, {("a", "x"): np.array([1.0]), ("a", "y"): np.array([3.0])}, 0)
    assert found["error"].tolist() == [0, 0]
    assert found["covered"].tolist() == [True, False]


def test_a_diverged_cell_ranked_above_a_completed_one_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = grid(Plan(holes=True)).trials
    assert tally_ranking(trials)[2] == 0
    upside_down = trials.sort_values("status", ascending=False, ignore_index=True)
    upside_down.insert(0, "rank", range(1, len(trials) + 1))  # stopped, diverged, completed
    monkeypatch.setattr(coverage, "rank_cells", lambda _: upside_down)
    diverged = (trials["status"] == "diverged") & trials["stop_epoch"].isna()  # others count as stopped
    assert tally_ranking(trials)[2] == diverged.sum()


def test_a_summary_is_a_ratio_with_its_standard_error_over_grids() -> None:
    summary = summarise([[("q", "", 1.0, 2.0)], [("q", "", 3.0, 2.0)]])
    assert summary.loc[("q", "")].to_dict() == {"sum": 4, "count": 4, "value": 1, "error": pytest.approx(2**0.5 / 4)}


@pytest.fixture(scope="module")
def summary() -> pd.DataFrame:
    return summarise([examine(index, seed=1) for index in range(8, 32)])


def test_intervals_cover_the_planted_effects(summary: pd.DataFrame) -> None:
    for question in ("main effects: covered", "interactions: covered"):
        rows = summary.loc[question]
        assert 0.90 <= rows["sum"].sum() / rows["count"].sum() <= 0.98
        assert rows["value"].min() >= 0.80  # six grids of each kind


def test_intervals_of_the_audit_cover_the_truth_and_diverged_cells_rank_last(summary: pd.DataFrame) -> None:
    assert summary.loc["false stops: covered", "value"].min() >= 0.93
    assert summary.loc["lost winners: bounded", "value"].min() >= 0.93
    assert summary.loc[("ranking: violations", ""), "sum"] == 0


def test_estimates_from_survivors_are_shrunken_and_those_at_the_first_rung_are_not(summary: pd.DataFrame) -> None:
    slopes = summary.loc["slope", "value"]
    assert slopes["ours"] == pytest.approx(1, abs=0.03)
    assert slopes["survivors"] < 0.95
    assert summary.loc[("covered", "survivors"), "value"] < 0.9


def test_the_text_is_narrow_whatever_the_number_of_grids(summary: pd.DataFrame) -> None:
    assert max(map(len, format_summary(summary).splitlines())) <= 80
    assert "none" in format_summary(summarise([examine(0, seed=1)]))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_prints_the_table(jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--grids", "2", "--seed", "3", "--jobs", str(jobs)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 grids of 216 cells")
    assert format_summary(summarise([examine(index, seed=3) for index in range(2)])) in printed
