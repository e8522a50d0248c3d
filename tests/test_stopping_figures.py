import math

import numpy as np
import pandas as pd
import pytest

from analysis.stopping.bounds import best_at_most
from analysis.stopping.figures import ALL, audit_experiment, audit_stopping
from analysis.store import Experiment
from grid.config import InputError
from tests.audited_trials import CONTINUED, GRID, LATE, NAN, POOR, STOPPED, audit, control, only, recorded, trial


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
