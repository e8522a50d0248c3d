import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stopping import (
    ALL,
    MIN_FOR_LOSS,
    Audit,
    audit_experiment,
    audit_stopping,
    beat_by_chance,
    best_at_most,
    clopper_pearson,
    has_verdicts,
    held_back,
    replay,
    rung_thresholds,
    spearman,
    stop_epochs,
)
from analysis.store import Experiment
from grid.config import FACTORS, LEVELS, InputError
from grid.plan.asha import Asha, StoppingRule

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}
NAN = math.nan


def trial(at_1: float, at_3: float = NAN, final: float = NAN, status: str = "", **changes: object) -> dict[str, object]:
    """Return a trial with a budget of 9; its status and epochs follow from the accuracies unless given."""
    epochs_run = 1 if math.isnan(at_3) else 3 if math.isnan(final) else 9
    accuracies = {"final_val_accuracy": final, "best_val_accuracy": np.fmax(np.fmax(at_1, at_3), final)}
    row = {**CELL, "seed": 0, "lr_scale": 1.0, "epochs": 9, "control": False, **accuracies}
    row |= {"status": status or ("completed" if epochs_run == 9 else "stopped"), "epochs_run": epochs_run}
    return row | {"val_accuracy_at_1": at_1, "val_accuracy_at_3": at_3} | changes


def control(*accuracies: float, status: str = "", **changes: object) -> dict[str, object]:
    return trial(*accuracies, status=status, control=True, **changes)


def recorded(row: dict[str, object], stop_epoch: float = NAN) -> dict[str, object]:
    """Return a trial as a store has it that records ASHA's verdicts."""
    return row | {"control_chance": 0.1, "stop_epoch": stop_epoch}


def audit(*rows: dict[str, object], **rule: object) -> Audit:
    return audit_stopping(pd.DataFrame(rows), **rule)  # type: ignore[arg-type]


def only(table: pd.DataFrame) -> dict[str, object]:
    (row,) = table.to_dict("records")
    return {str(name): value for name, value in row.items()}


# Nine trials, three of which continue at epoch 1 and, together with two controls there, two at epoch 3.
STOPPED = [trial(at) for at in (0.10, 0.11, 0.12, 0.13)]
CONTINUED = [trial(0.50, 0.60, 0.70), trial(0.51, 0.61, 0.72), trial(0.49, 0.55)]
LATE, POOR = control(0.20, 0.40, 0.71), control(0.09, 0.10, 0.11)
GRID = [*STOPPED, *CONTINUED, LATE, POOR]


def test_one_trial_in_three_continues() -> None:
    trials = pd.DataFrame(GRID)
    assert rung_thresholds(trials, (1, 3), 3) == {("mlp", 1): 0.49, ("mlp", 3): 0.60}
    assert replay(trials, rung_thresholds(trials, (1, 3), 3)).fillna(0).tolist() == [1, 1, 1, 1, 0, 0, 3, 1, 1]


def test_without_recorded_verdicts_the_rule_is_replayed_on_the_controls_alone() -> None:
    lucky = trial(0.14, 0.3, 0.5)  # continued because few had arrived
    trials = pd.DataFrame([*GRID, lucky])
    assert not has_verdicts(trials)
    assert stop_epochs(trials, (1, 3)).fillna(0).tolist() == [1, 1, 1, 1, 0, 0, 3, 3, 1, 0]
    assert replay(trials, rung_thresholds(trials, (1, 3), 3)).fillna(0).tolist() == [1, 1, 1, 1, 0, 0, 3, 3, 1, 1]


def test_recorded_verdicts_are_taken_as_they_are() -> None:
    rows = [recorded(row, 1) for row in STOPPED] + [recorded(row) for row in CONTINUED[:2]]
    trials = pd.DataFrame([*rows, recorded(LATE, 3), recorded(POOR)])
    assert has_verdicts(trials)
    assert stop_epochs(trials, (1, 3)).fillna(0).tolist() == [1, 1, 1, 1, 0, 0, 3, 0]
    found = audit_stopping(trials)
    assert only(found.false_stops)["stopped"] == 1
    assert math.isnan(found.agreement)
    assert "ASHA's verdict on controls is recorded" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"control_chance": 0.1}, True), ({"stop_epoch": 1.0}, True), ({"control_chance": NAN, "stop_epoch": NAN}, False)],
    ids=["a chance", "a verdict", "neither"],
)
def test_verdicts_are_recorded_if_any_control_has_one_or_its_chance(changes: dict[str, float], expected: bool) -> None:
    trials = pd.DataFrame([*CONTINUED, LATE, control(0.5, 0.6, 0.7, **changes)])
    assert has_verdicts(trials) is expected
    assert not has_verdicts(pd.DataFrame([trial(0.1, **changes), LATE]))


def test_the_verdict_of_a_rung_is_that_of_asha() -> None:
    rng, asha, rows = np.random.default_rng(0), Asha((1, 3)), []
    for number in range(60):
        at_1, at_3, final = np.sort(rng.uniform(size=3))
        chosen = number % 4 == 0
        for epoch, value in ((1, at_1), (3, at_3)):
            if not asha.decide(str(number), group="mlp", epoch=epoch, value=value, control=chosen):
                break
        stop = asha.stop_epoch(str(number))
        ran = (at_1, at_3, final)[: 3 if chosen or stop is None else {1: 1, 3: 2}[stop]]
        rows.append(recorded(trial(*ran, control=chosen), NAN if stop is None else stop))
    trials = pd.DataFrame(rows)
    assert stop_epochs(trials, (1, 3)).fillna(0).tolist() == [asha.stop_epoch(str(i)) or 0 for i in range(60)]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(NAN), min_size=1, max_size=40), st.integers(2, 4))
def test_the_replay_decides_as_asha_does_about_the_last_arrival(values: list[float], factor: int) -> None:
    asha = Asha((1,), StoppingRule(factor=factor))
    decisions = [asha.decide(str(i), group="mlp", epoch=1, value=value) for i, value in enumerate(values)]
    trials = pd.DataFrame([trial(value, status="diverged" if math.isnan(value) else "stopped") for value in values])
    continues = values[-1] >= rung_thresholds(trials, (1,), factor)["mlp", 1]
    assert continues == decisions[-1]


def test_controls_that_the_rule_stopped_before_count_at_later_rungs_as_in_asha() -> None:
    without = [row for row in GRID if row is not POOR and row is not LATE]
    assert rung_thresholds(pd.DataFrame(without), (1, 3), 3)["mlp", 3] == 0.61


def test_a_diverged_trial_counts_once_at_the_first_rung_that_it_did_not_reach() -> None:
    diverged = [trial(0.5, status="diverged", epochs_run=2)] * 3
    trials = pd.DataFrame([*CONTINUED, *diverged])
    assert rung_thresholds(trials, (1, 3), 3) == {("mlp", 1): 0.50, ("mlp", 3): 0.60}


@pytest.mark.parametrize(
    ("within", "expected"),
    [
        (("model",), {("mlp", 1): 0.5, ("cnn", 1): 0.9}),
        ((), {("", 1): 0.9}),
        (("model", "lr_schedule"), {("mlp constant", 1): 0.5, ("mlp step", 1): 0.4, ("cnn constant", 1): 0.9}),
    ],
    ids=["model", "none", "model and schedule"],
)
def test_groups_have_their_own_thresholds(within: tuple[str, ...], expected: dict[tuple[str, int], float]) -> None:
    trials = pd.DataFrame([trial(0.5), trial(0.4, lr_schedule="step"), trial(0.9, model="cnn")])
    assert rung_thresholds(trials, (1,), 3, within) == expected


def test_models_that_are_compared_with_each_other_have_one_winner() -> None:
    cnn = [trial(0.8, 0.85, 0.9, model="cnn"), control(0.1, 0.2, 0.95, model="cnn")]
    together = audit(*GRID, *cnn, within=())
    assert only(together.lost_winners)["model"] == ALL
    assert (only(together.regret)["winner"], only(together.lost_winners)["beat"]) == (0.9, 1)
    assert together.savings["model"].tolist() == ["cnn", "mlp"]
    assert "the best 1 in 3 of all trials" in together.notes[0]
    apart = audit(*GRID, *cnn, within=("model", "lr_schedule"))
    assert apart.regret["model"].tolist() == ["cnn", "mlp"]
    assert "of a model x lr_schedule group's trials" in apart.notes[0]


def test_without_stopping_nothing_can_be_lost() -> None:
    found = audit(*CONTINUED[:2], recorded(LATE), POOR, factor=1)
    assert found.notes == ("the grid was trained without early stopping: no trial was stopped, so nothing can be lost",)
    assert (only(found.savings)["saved"], len(found.baseline)) == (0, 0)
    assert only(found.lost_winners)["tried"] == 0


def test_an_experiment_is_audited_by_the_rule_of_its_manifest() -> None:
    trials = pd.DataFrame(GRID)
    manifest = {"rungs": {"factor": 2, "compared_within": "model,dropout"}}
    found = audit_experiment(Experiment("", "x", "", trials, trials[:0], manifest, ()))
    assert found.factor == 2
    assert "the best 1 in 2 of a model x dropout group's trials" in found.notes[0]
    strange = {"rungs": {"factor": "3", "compared_within": ["model"]}}
    for manifest in ({}, strange, {"rungs": {"compared_within": "model,colour"}}):
        found = audit_experiment(Experiment("", "x", "", trials, trials[:0], manifest, ()))
        assert "the best 1 in 3 of a model's trials" in found.notes[0]


def test_a_false_stop_is_a_control_that_ended_above_the_median_survivor() -> None:
    row = only(audit(*GRID).false_stops)
    assert (row["controls"], row["stopped"], row["false_stops"], row["rate"]) == (2, 2, 0, 0)  # .71 is the median
    better = control(0.20, 0.40, 0.715)
    row = only(audit(*GRID[:-2], better, POOR).false_stops)
    assert (row["stopped"], row["false_stops"], row["rate"], row["beat_winner"]) == (2, 1, 0.5, 0)


def test_a_control_that_the_rule_does_not_stop_is_a_survivor() -> None:
    found = audit(*GRID, control(0.9, 0.9, 0.95))
    assert only(found.regret)["winner"] == 0.95
    assert only(found.false_stops)["stopped"] == 2


def test_a_control_that_the_rule_stops_is_not_the_winner_but_beats_it() -> None:
    found = audit(*GRID[:-2], control(0.20, 0.40, 0.80), POOR)
    assert only(found.false_stops)["beat_winner"] == 1
    assert only(found.regret)["winner"] == 0.72
    assert only(found.regret)["margin"] == pytest.approx(-0.08)


def test_the_bound_on_lost_winners_is_the_rule_of_three_on_the_stopped_trials() -> None:
    row = only(audit(*[trial(0.1)] * 1000, *CONTINUED, *[control(0.05, 0.3, 0.4)] * 300).lost_winners)
    assert row["stopped"] == 1001
    assert row["at_most"] == math.floor(1001 * (1 - 0.05 ** (1 / 300)))  # about 3 / 300 of 1001


def test_the_final_accuracy_counts_and_not_the_best_of_all_epochs() -> None:
    faded = [row | {"best_val_accuracy": 0.99} for row in (LATE, CONTINUED[0])]
    row = only(audit(*GRID[:4], *CONTINUED[1:], *faded, POOR).regret)
    assert (row["winner"], row["best_stopped_control"]) == (0.72, 0.71)


def test_controls_that_would_beat_the_winner_are_compared_with_coin_flips() -> None:
    diverged = control(0.05, status="diverged")
    row = only(audit(*GRID[:-2], control(0.20, 0.40, 0.80), POOR, diverged).lost_winners)
    assert (row["tried"], row["beat"], row["stopped"]) == (2, 1, 5)
    assert row["by_chance"] == pytest.approx(2 / (2 + 1))


@pytest.mark.parametrize(("tried", "survivors"), [(1, 1), (81, 90), (30, 4)])
def test_coin_flips_let_as_many_beat_all_survivors_as_expected(tried: int, survivors: int) -> None:
    ends = np.random.default_rng(0).uniform(size=(20_000, tried + survivors))
    beat = (ends[:, :tried] > ends[:, tried:].max(axis=1, keepdims=True)).sum(axis=1)
    assert abs(beat.mean() - beat_by_chance(tried, survivors)) < 4 * beat.std() / math.sqrt(len(beat))


SHAPES = {
    "normal": lambda rng, size: rng.normal(0.6, 0.05, size),
    "skewed": lambda rng, size: 0.8 - rng.gamma(2, 0.05, size),
    "even": lambda rng, size: rng.uniform(0.3, 0.8, size),
    "two groups": lambda rng, size: rng.normal(np.where(rng.random(size) < 0.15, 0.7, 0.5), 0.03),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seen", "unseen"), [(MIN_FOR_LOSS, 100), (30, 800), (80, 800), (30, 20)])
def test_the_bound_on_the_best_of_the_stopped_holds_as_often_as_stated(shape: str, seen: int, unseen: int) -> None:
    rng, draw = np.random.default_rng(2), SHAPES[shape]
    truth = draw(rng, (500, unseen)).max(axis=1).mean()
    bounds = [best_at_most(ends, unseen, 0.95) for ends in draw(rng, (500, seen))]
    assert np.mean(np.array(bounds) >= truth) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 500)


def test_the_bound_on_the_best_of_the_stopped_is_that_of_the_formula() -> None:
    ends = np.array([*[0.1] * 17, 0.5, *[0.6] * 2, *[0.7] * 2, 0.8])  # the tail of 23: the best 5 over the sixth, 0.5
    scale = (0.1 + 0.1 + 0.2 + 0.2 + 0.3) / (stats.chi2.ppf(0.05, 10) / 2)
    reach = (stats.norm.ppf((50 - 0.375) / 50.25) - 0.6745) / (stats.norm.pdf(0.6745) * 4 - 0.6745)
    assert best_at_most(ends / 10, 50, 0.95) == pytest.approx((0.5 + scale * reach) / 10, rel=1e-3)
    assert best_at_most(ends, 50, 0.95) == 1  # no accuracy is higher
    assert math.isnan(best_at_most(ends[: MIN_FOR_LOSS - 1], 50, 0.95))


def test_the_loss_is_bounded_by_that_of_the_best_and_is_never_negative() -> None:
    tried = [control(0.05, 0.3, at) for at in np.linspace(0.1, 0.4, 40)]
    row = only(audit(*[trial(0.1)] * 100, *CONTINUED, *tried).regret)
    bound = best_at_most(np.linspace(0.1, 0.4, 40), 101, 0.95)
    assert row["loss_at_most"] == max(0, bound - 0.72) == 0
    better = CONTINUED[0] | {"final_val_accuracy": 0.41}
    row = only(audit(*[trial(0.1)] * 100, better, CONTINUED[2], *tried).regret)
    assert row["loss_at_most"] == pytest.approx(bound - 0.41)


def test_few_controls_give_no_bound_on_the_loss_and_without_stopped_trials_there_is_none() -> None:
    assert math.isnan(only(audit(*GRID).regret)["loss_at_most"])
    found = audit(recorded(CONTINUED[0]), recorded(LATE, 1))
    assert only(found.regret)["loss_at_most"] == 0


def slow_start(rate: float = 0.0, trials: int = 60, other_rate: float = 0.5) -> pd.DataFrame:
    """Return trials of two schedules, of which these shares continue at epoch 1."""
    rates = {"one_cycle": rate, "cosine": other_rate}
    return pd.DataFrame(
        [
            trial(0.5, *(() if number >= round(share * trials) else (0.6, 0.7)), lr_schedule=schedule)
            for schedule, share in rates.items()
            for number in range(trials)
        ]
    )


def levels_held_back(trials: pd.DataFrame) -> list[tuple[str, str, int]]:
    found = held_back(trials, stop_epochs(trials, (1, 3)), (1, 3))
    return [(row["factor"], row["level"], row["rung"]) for row in found.to_dict("records")]


def test_a_level_of_which_hardly_a_trial_continues_is_named() -> None:
    assert levels_held_back(slow_start(1 / 60)) == [("lr_schedule", "one_cycle", 1)]
    row = only(held_back(slow_start(1 / 60), stop_epochs(slow_start(1 / 60), (1, 3)), (1, 3)))
    assert (row["rate"], row["others"]) == (pytest.approx(1 / 60), 0.5)
    table = [[1, 59], [30, 30]]  # four tests: two levels at two rungs
    assert row["p"] == pytest.approx(min(1, 4 * stats.fisher_exact(table, alternative="less").pvalue))


@pytest.mark.parametrize(
    "trials",
    [slow_start(0.25), slow_start(0, trials=4), slow_start(0.5)],
    ids=["a rate of half the others'", "few trials", "equal rates"],
)
def test_a_level_is_not_named_for_a_small_difference_or_by_chance(trials: pd.DataFrame) -> None:
    assert levels_held_back(trials) == []


def test_a_level_that_several_rungs_hold_back_is_named_for_the_first() -> None:
    some = slow_start(0.2, trials=100, other_rate=0.9)
    late = some["lr_schedule"].eq("one_cycle") & some["status"].eq("completed")
    some.loc[late, ["status", "epochs_run"]] = ["stopped", 3]
    assert levels_held_back(some) == [("lr_schedule", "one_cycle", 1)]


def test_controls_count_by_their_verdict_and_not_at_later_rungs() -> None:
    trials = slow_start().assign(control=True, status="completed", control_chance=0.1, stop_epoch=NAN)
    trials.loc[trials["lr_schedule"] == "one_cycle", "stop_epoch"] = 1.0
    trials["val_accuracy_at_3"] = 0.6
    found = held_back(trials, stop_epochs(trials, (1, 3)), (1, 3))
    assert (found["rung"].tolist(), found["rate"].tolist(), found["others"].tolist()) == ([1], [0], [1])


def test_levels_that_continue_alike_are_seldom_named() -> None:
    rng, named = np.random.default_rng(0), 0
    cells = product(LEVELS["lr_schedule"], LEVELS["activation"])
    trials = pd.DataFrame([trial(0.1, lr_schedule=s, activation=a) for s, a in cells] * 4)
    for _ in range(100):
        continued = rng.permutation(len(trials)) % 3 == 0
        stops = pd.Series(np.where(continued, NAN, 1.0), trials.index)
        named += len(held_back(trials, stops, (1,))) > 0
    assert named <= 10  # 5 are expected at most


def test_a_note_says_what_to_do_for_a_level_that_is_held_back() -> None:
    rows = slow_start(1 / 60).to_dict("records")
    assert audit(*rows).notes[-1] == (
        "after epoch 1 only 2% of lr_schedule=one_cycle continued, but 50% of the others: the ranking says little "
        "about it; what it is worth at the end is what analysis.effects estimates; if it only starts slowly, "
        "--stop-within model,lr_schedule or --grace 3 gives it a chance"
    )


def test_a_note_says_until_when_constant_and_step_are_the_same() -> None:
    notes = audit(*GRID, trial(0.4, lr_schedule="step")).notes
    assert notes[-1] == (
        "lr_schedule=constant and step are the same procedure for the first 1/3 of the budget: what differs between "
        "them after epoch 1, 3 is chance"
    )
    assert not [note for note in audit(*GRID).notes if "same procedure" in note]
    longer = [row | {"epochs": 8} for row in (*GRID, trial(0.4, lr_schedule="step"))]
    assert audit(*longer).notes[-1].endswith("after epoch 1 is chance")


def test_a_diverged_control_is_never_a_false_stop_and_counts_as_stopped_only_if_it_was_before() -> None:
    before, after = control(0.05, status="diverged"), control(0.9, status="diverged")
    found = audit(*GRID, before, after)
    row = only(found.false_stops)
    assert (row["controls"], row["stopped"], row["false_stops"]) == (4, 3, 0)
    assert "2 of 4 controls diverged" in " ".join(found.notes)
    assert "the rule would have stopped 1 of them before" in " ".join(found.notes)


def test_a_diverged_control_ranks_lowest_at_the_end() -> None:
    good = [control(at, at, at + 0.1) for at in (0.3, 0.4, 0.5)]
    correlations = audit(*good, control(0.9, status="diverged")).correlations
    assert correlations["controls"].tolist() == [4, 3]
    assert correlations["spearman"].tolist() == pytest.approx([-0.2, 1.0])


def test_a_note_counts_failed_controls_which_are_left_out() -> None:
    found = audit(*GRID, control(0.9, 0.9, status="failed"))
    assert only(found.false_stops)["controls"] == 2
    assert "left out: 1 of 3 controls, which failed or were stopped after all" in found.notes


def test_epochs_that_diverged_trials_did_not_train_are_not_savings() -> None:
    row = only(audit(*GRID, trial(NAN, status="diverged")).savings)
    assert (row["trials"], row["epochs_full"], row["epochs_run"]) == (10, 90, 4 + 9 + 9 + 3 + 18 + 1)
    assert row["saved"] == pytest.approx((4 * 8 + 6) / 90)


def test_the_simpler_rule_gets_the_epochs_of_asha_without_those_of_its_controls() -> None:
    row = only(audit(*GRID).baseline)
    assert row["epochs"] == 4 + 9 + 9 + 3 + 1 + 1
    assert row["kept"] == (27 - 9) // 8
    assert (row["winner_rank"], row["winner_kept"], row["top"], row["top_kept"]) == (1, True, 2, 2)


def test_the_simpler_rule_loses_a_winner_that_starts_slowly() -> None:
    late = trial(0.14, 0.65, 0.9)  # continued because few had arrived
    row = only(audit(*GRID, late).baseline)
    assert (row["winner_rank"], row["winner_kept"], row["top"], row["top_kept"]) == (5, False, 3, 2)


def test_at_most_ten_survivors_are_examined() -> None:
    trials = [trial(0.5 + i / 100, 0.6 + i / 100, 0.7 + i / 100) for i in range(20)]
    row = only(audit(*trials).baseline)
    assert (row["top"], row["kept"], row["top_kept"]) == (10, 20, 10)


def test_agreement_compares_the_replay_with_asha_without_the_controls() -> None:
    assert audit(*GRID).agreement == 1
    assert audit(*GRID, trial(0.14, 0.3, 0.5)).agreement == pytest.approx(7 / 8)
    assert math.isnan(audit(LATE, POOR).agreement)


def test_the_rank_correlation_equals_that_of_scipy_with_the_interval_of_bonett_and_wright() -> None:
    rng = np.random.default_rng(0)
    first = pd.Series(rng.normal(size=30))
    last = first + rng.normal(size=30)
    r, low, high = spearman(first, last, 0.95)
    assert r == pytest.approx(stats.spearmanr(first, last).statistic)
    reach = 1.959964 * math.sqrt((1 + r**2 / 2) / 27)
    assert (math.atanh(low), math.atanh(high)) == pytest.approx((math.atanh(r) - reach, math.atanh(r) + reach))


def test_the_interval_of_a_rank_correlation_covers_it_as_often_as_stated() -> None:
    rng = np.random.default_rng(1)
    normal = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=(1000, 15))
    intervals = [spearman(pd.Series(sample[:, 0]), pd.Series(sample[:, 1]), 0.95) for sample in normal]
    truth = 6 / math.pi * math.asin(0.7 / 2)
    assert 0.93 <= np.mean([low <= truth <= high for _, low, high in intervals]) <= 0.98


def test_few_controls_have_no_interval_and_a_perfect_order_is_not_certain() -> None:
    rising = pd.Series([1.0, 2.0, 3.0, 4.0])
    assert spearman(rising[:3], rising[:3], 0.95)[0] == pytest.approx(1)
    assert all(map(math.isnan, spearman(rising[:3], rising[:3], 0.95)[1:]))
    assert spearman(rising, rising, 0.95)[1] < 0.5
    assert all(map(math.isnan, spearman(rising, rising * 0, 0.95)))


def test_the_exact_interval_of_no_success_and_of_no_trial() -> None:
    assert clopper_pearson(0, 30, 0.90) == pytest.approx((0, 1 - 0.05 ** (1 / 30)))
    assert clopper_pearson(0, 0, 0.95) == (0, 1)


def test_without_controls_only_the_tables_that_need_none_have_rows() -> None:
    found = audit(*STOPPED, *CONTINUED)
    assert len(found.savings) == len(found.baseline) == 1
    assert found.correlations.empty
    assert found.false_stops.empty
    assert found.regret.empty
    assert (
        "no unstopped controls: the cost of stopping is unknown; run grid.run with --controls 0.05 next time"
        in found.notes
    )


def test_without_rungs_nothing_can_be_lost() -> None:
    found = audit_stopping(pd.DataFrame([trial(0.5, status="completed", epochs=1)]).filter(regex="^(?!val_acc)"))
    assert found.notes == ("no rung below the budget of 1 epoch: no trial was stopped, so nothing can be lost",)
    assert (only(found.savings)["saved"], len(found.baseline)) == (0, 0)


def test_a_single_trial_is_the_winner() -> None:
    found = audit(trial(0.5, 0.6, 0.7))
    assert (only(found.baseline)["winner_rank"], only(found.baseline)["kept"]) == (1, 1)


def test_a_grid_whose_trials_all_diverged_says_what_to_do() -> None:
    with pytest.raises(InputError, match="^no trial has an accuracy: all diverged or failed; try --lr-scales 0.1$"):
        audit(trial(NAN, status="diverged"))


def test_a_grid_whose_trials_all_diverged_later_has_no_winner() -> None:
    found = audit(trial(0.5, status="diverged"), control(0.4, 0.5, status="diverged"))
    assert "mlp: no completed trial that the rule would not have stopped, so there is no winner yet" in found.notes
    assert found.false_stops.empty


def test_an_empty_table_says_what_to_do() -> None:
    with pytest.raises(InputError, match="^there are no trials to audit; run python -m grid.run first$"):
        audit_stopping(pd.DataFrame())


def test_budgets_are_not_mixed() -> None:
    with pytest.raises(InputError, match="^trials of 3 and 9 epochs can't be audited together; audit one budget"):
        audit(trial(0.5), trial(0.6, epochs=3))


def test_stopped_trials_need_accuracies_at_their_rungs() -> None:
    with pytest.raises(InputError, match="^trials were stopped, but none has a val_accuracy_at_<epoch>"):
        audit_stopping(pd.DataFrame(STOPPED).drop(columns=["val_accuracy_at_1", "val_accuracy_at_3"]))


def test_a_note_names_a_model_without_controls() -> None:
    found = audit(*GRID, trial(0.5, 0.6, 0.7, model="cnn"))
    assert "cnn: no control has completed or diverged, so the cost of stopping is unknown" in found.notes
    assert found.false_stops["model"].tolist() == ["mlp"]


def test_notes_say_that_each_replicate_and_scale_counts() -> None:
    notes = audit(*GRID, trial(0.5, 0.6, 0.7, seed=1, lr_scale=0.5)).notes
    assert "2 seeds: every trial counts, because each was stopped or not individually" in notes
    assert "2 learning-rate scales: every trial counts, because each was stopped or not individually" in notes
