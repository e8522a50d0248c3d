import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stopping.figures import audit_stopping
from analysis.stopping.verdicts import has_verdicts, held_back, replay, rung_thresholds, stop_epochs
from grid.parts import LEVELS
from grid.plan.asha import Asha, StoppingRule
from tests.audited_trials import CONTINUED, GRID, LATE, NAN, POOR, STOPPED, control, only, recorded, slow_start, trial


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
