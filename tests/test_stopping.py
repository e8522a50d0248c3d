import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stopping import (
    Audit,
    audit_stopping,
    clopper_pearson,
    rung_thresholds,
    spearman,
    stop_epochs,
)
from grid.config import FACTORS, LEVELS, InputError
from grid.plan.asha import Asha, StoppingRule

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}
NAN = math.nan


def trial(at_1: float, at_3: float = NAN, final: float = NAN, status: str = "", **changes: object) -> dict[str, object]:
    """Return a trial with a budget of 9; its status and epochs follow from the accuracies unless given."""
    epochs_run = 1 if math.isnan(at_3) else 3 if math.isnan(final) else 9
    best = np.fmax(np.fmax(at_1, at_3), final)
    row = {**CELL, "seed": 0, "lr_scale": 1.0, "epochs": 9, "control": False, "best_val_accuracy": best}
    row |= {"status": status or ("completed" if epochs_run == 9 else "stopped"), "epochs_run": epochs_run}
    return row | {"val_accuracy_at_1": at_1, "val_accuracy_at_3": at_3} | changes


def control(*accuracies: float, status: str = "", **changes: object) -> dict[str, object]:
    return trial(*accuracies, status=status, control=True, **changes)


def audit(*rows: dict[str, object]) -> Audit:
    return audit_stopping(pd.DataFrame(rows))


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
    assert stop_epochs(trials, rung_thresholds(trials, (1, 3), 3)).fillna(0).tolist() == [1, 1, 1, 1, 0, 0, 3, 1, 1]


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


def test_models_have_their_own_thresholds() -> None:
    trials = pd.DataFrame([trial(0.5), trial(0.9, model="cnn")])
    assert rung_thresholds(trials, (1,), 3) == {("mlp", 1): 0.5, ("cnn", 1): 0.9}


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
    row = only(audit(*[trial(0.1)] * 1000, *CONTINUED, *[control(0.05, 0.3, 0.4)] * 300).regret)
    assert row["stopped"] == 1001
    assert row["at_most"] == math.floor(1001 * (1 - 0.05 ** (1 / 300)))  # about 3 / 300 of 1001


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
