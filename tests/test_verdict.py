import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.effects import Effects
from analysis.store import Experiment, read_experiment
from analysis.verdict import Fact, Unavailable, Verdict, analyse, headline, name_of
from grid.config import FACTORS, LEVELS, InputError
from grid.record.store import Store

NOISE = [
    ("relu", 0, 0.0),
    ("relu", 1, 0.03),
    ("relu", 2, -0.03),
    ("gelu", 0, 0.02),
    ("gelu", 1, -0.03),
    ("gelu", 2, 0.02),
]
CELL = {factor: LEVELS[factor][0] for factor in FACTORS}


def trial(accuracy: float, status: str = "completed", epochs_run: int = 9, **changes: object) -> dict[str, object]:
    row = {**CELL, "seed": 0, "lr_scale": 1.0, "status": status, "control": False, "epochs": 9}
    rungs = {f"val_accuracy_at_{rung}": accuracy / 2 if epochs_run >= rung else np.nan for rung in (1, 3)}
    return row | {"epochs_run": epochs_run, "best_val_accuracy": accuracy, **rungs} | changes


def analysed(*trials: dict[str, object], val_images: int | None = None) -> Verdict:
    manifest = {"data": {"val_images": val_images}} if val_images else {}
    return analyse(Experiment("sqlite://", "name", "", pd.DataFrame(trials), pd.DataFrame(), manifest, ()))


def fact(verdict: Verdict, question: str) -> Fact:
    return {fact.question: fact for fact in headline(verdict)}[question]


@pytest.fixture(scope="module")
def verdict(finished_store: Store) -> Verdict:
    return analyse(read_experiment(finished_store.uri, "finished"))


def test_a_finished_experiment_answers_four_questions(verdict: Verdict) -> None:
    early, late = "Matters most after epoch 1", "Matters most after epoch 9"
    assert [fact.question for fact in headline(verdict)] == ["Best cell", early, late, "Early stopping"]
    assert not any(isinstance(result, Unavailable) for result in vars(verdict).values())


def test_the_best_cell_is_the_first_with_its_test_accuracy(verdict: Verdict) -> None:
    best = fact(verdict, "Best cell")
    assert best.answer == "cnn constant gelu adam batch_norm"
    first = verdict.cells.iloc[0]
    assert (
        f"{first['val_accuracy']:.2%} of the validation images (3 seeds), {first['test_accuracy']:.2%}" in best.remark
    )


def test_the_factor_with_the_largest_planted_effect_is_found(verdict: Verdict) -> None:
    found = fact(verdict, "Matters most after epoch 1")
    assert found.answer == "optimizer"
    assert re.search(r"of the variance: adam is \d\.\d points above asgd", found.remark)
    assert "noise" not in found.remark


def test_the_saved_share_counts_the_epochs_of_stopped_trials(verdict: Verdict) -> None:
    trials = verdict.experiment.trials
    stopped = trials[trials["status"] == "stopped"]
    saved = (stopped["epochs"] - stopped["epochs_run"]).sum() / trials["epochs"].sum()
    assert fact(verdict, "Early stopping").answer == f"saved {saved:.0%} of the epochs"


def test_an_unavailable_result_has_a_reason_and_no_fact() -> None:
    verdict = analysed(trial(0.8))
    assert isinstance(verdict.effects, Unavailable)
    assert "one level only" in verdict.effects.reason
    assert [fact.question for fact in headline(verdict)] == ["Best cell", "Early stopping"]


def test_trials_of_two_budgets_are_refused() -> None:
    with pytest.raises(InputError, match="^trials of 9 and 27 epochs can't be ranked together$"):
        analysed(trial(0.8), trial(0.8, model="cnn", epochs=27))


def test_without_an_accuracy_there_is_no_best_cell() -> None:
    verdict = analysed(trial(np.nan, "diverged", 1), trial(np.nan, "diverged", 1, model="cnn"))
    assert fact(verdict, "Best cell") == Fact("Best cell", "none", "No trial has an accuracy: all diverged or failed.")
    assert isinstance(verdict.effects, Unavailable)
    assert isinstance(verdict.audit, Unavailable)
    assert verdict.effects_at_end is None


def test_a_single_cell_has_no_rival() -> None:
    assert (
        fact(analysed(trial(0.8)), "Best cell").remark
        == "80.00% of the validation images (one seed). It is the only cell."
    )


@pytest.mark.parametrize(("others", "words"), [(1, "1 other."), (2, "2 others.")])
def test_ties_of_the_best_are_counted(others: int, words: str) -> None:
    rivals = [trial(0.79, activation=name) for name in ("gelu", "elu")[:others]]
    assert fact(analysed(trial(0.8), *rivals, val_images=100), "Best cell").remark.endswith(f"It is tied with {words}")


def test_a_lead_is_stated_in_points() -> None:
    verdict = analysed(trial(0.8), trial(0.7, activation="gelu"), val_images=10000)
    assert fact(verdict, "Best cell").remark.endswith("It is 10.00 points ahead of the next.")


def test_without_a_count_of_images_the_lead_is_of_unknown_certainty() -> None:
    verdict = analysed(trial(0.8), trial(0.7, activation="gelu"))
    assert "How certain the order is remains unknown" in fact(verdict, "Best cell").remark


def test_what_matters_at_the_end_is_estimated_from_the_controls(verdict: Verdict) -> None:
    controls = verdict.experiment.trials["control"] & (verdict.experiment.trials["status"] == "completed")
    assert isinstance(verdict.effects_at_end, Effects)
    assert verdict.effects_at_end.observations == controls.sum()
    assert f"among {controls.sum()} unstopped controls: " in fact(verdict, "Matters most after epoch 9").remark


def test_without_controls_the_effects_at_the_end_are_unavailable() -> None:
    verdict = analysed(trial(0.8), trial(0.7, activation="gelu"))
    assert isinstance(verdict.effects_at_end, Unavailable)
    assert verdict.effects_at_end.reason.startswith("no unstopped controls, so effects at the end are unknown")


def test_the_only_cell_with_the_full_budget_has_no_rival() -> None:
    verdict = analysed(trial(0.8), trial(0.7, "stopped", 3, activation="gelu"), val_images=100)
    assert fact(verdict, "Best cell").remark.endswith("No other cell trained for as many epochs.")


def test_effects_of_a_saturated_grid_are_stated_with_a_doubt() -> None:
    found = fact(analysed(trial(0.8), trial(0.7, activation="gelu")), "Matters most after epoch 1")
    assert found.remark.endswith("There are too few trials to say whether that is more than noise.")


def test_an_effect_that_may_be_noise_is_stated_as_such() -> None:
    trials = [trial(0.8 + luck, seed=seed, activation=name) for name, seed, luck in NOISE]
    assert "It may be noise (p = " in fact(analysed(*trials), "Matters most after epoch 1").remark


def test_nothing_matters_among_cells_of_equal_accuracy() -> None:
    found = fact(
        analysed(*[trial(0.8, seed=seed, activation=name) for name, seed, _ in NOISE]), "Matters most after epoch 1"
    )
    assert found == Fact("Matters most after epoch 1", "nothing", "All cells have the same accuracy.")


def test_a_level_without_an_effect_is_not_the_worst_level(verdict: Verdict) -> None:
    unseen = {"factor": "optimizer", "level": "adagrad", "observations": 0}
    levels = pd.concat([verdict.effects.levels, pd.DataFrame([unseen])])
    found = fact(replace(verdict, effects=replace(verdict.effects, levels=levels)), "Matters most after epoch 1")
    assert "points above asgd" in found.remark


def test_without_controls_the_cost_of_stopping_is_unknown() -> None:
    stopping = fact(analysed(trial(0.8), trial(0.4, "stopped", 1, activation="gelu")), "Early stopping")
    assert stopping.answer == "saved 44% of the epochs"
    assert stopping.remark == "What it cost is unknown: it would have stopped no unstopped control."


def test_without_rungs_nothing_is_saved() -> None:
    plain = {name: value for name, value in trial(0.8).items() if not name.startswith("val_accuracy_at_")}
    assert fact(analysed(plain), "Early stopping") == Fact("Early stopping", "none", "Every trial had the full budget.")


def test_a_cell_is_named_after_its_levels() -> None:
    assert name_of(trial(0.8, batch_norm="on", regularization="l2")) == "mlp constant relu sgd batch_norm l2"
