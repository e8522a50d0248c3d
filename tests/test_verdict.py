import re
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.estimates.final_effects import FinalEffects
from analysis.estimates.rung_effects import RungEffects
from analysis.plot import difference_rows
from analysis.store import Experiment, read_experiment
from analysis.verdict import Fact, Unavailable, Verdict, analyse, headline, name_of, what_matters
from grid.config import FACTORS, InputError
from grid.parts import LEVELS
from grid.record.store import Store
from tests.stopped_grids import make_grid

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}
LONG = "Matters at the end (9 epochs)"


def trial(accuracy: float, status: str = "completed", epochs_run: int = 9, **changes: object) -> dict[str, object]:
    row = {**CELL, "seed": 0, "lr_scale": 1.0, "status": status, "control": False, "epochs": 9}
    rungs = {f"val_accuracy_at_{rung}": accuracy / 2 if epochs_run >= rung else np.nan for rung in (1, 3)}
    stop = float(epochs_run) if status == "stopped" else np.nan
    ends = {"final_val_accuracy": accuracy if status == "completed" else np.nan, "best_val_accuracy": accuracy}
    return row | {"epochs_run": epochs_run, "stop_epoch": stop, "control_chance": np.nan, **ends, **rungs} | changes


def analysed(*trials: dict[str, object], val_images: int | None = None, **data: object) -> Verdict:
    manifest = {"data": ({"val_images": val_images} if val_images else {}) | data}
    return analyse(Experiment("sqlite://", "name", "", pd.DataFrame(trials), pd.DataFrame(), manifest, ()))


def fact(verdict: Verdict, question: str) -> Fact:
    return {fact.question: fact for fact in headline(verdict)}[question]


def of_stopped_grid(controls: int = 40, random_state: int = 0) -> Verdict:
    grid = make_grid({"model": 2, "lr_schedule": 4, "activation": 4, "optimizer": 4, "batch_norm": 2})
    trials = grid.stopped_early(grid.draw_exactly(controls, np.random.default_rng(random_state)), 0.2)
    return analyse(Experiment("sqlite://", "name", "", trials, pd.DataFrame(), {}, ()))


@pytest.fixture(scope="module")
def verdict(finished_store: Store) -> Verdict:
    return analyse(read_experiment(finished_store.uri, "finished"))


@pytest.fixture(scope="module")
def stopped() -> Verdict:
    return of_stopped_grid()


def test_a_finished_experiment_answers_five_questions(verdict: Verdict) -> None:
    facts = list(headline(verdict))
    assert [fact.question for fact in facts] == ["Use", LONG, "After epoch 1", "Early stopping", "Holds for"]
    assert [fact.kind for fact in facts] == ["use", "matters", "fast", "stopping", "scope"]
    assert not any(isinstance(result, Unavailable) for result in vars(verdict).values())
    assert all(detail.strip() for fact in facts for detail in fact.details)


def test_the_best_cell_comes_with_both_intervals_and_its_test_accuracy(verdict: Verdict) -> None:
    best, first = fact(verdict, "Use"), verdict.cells.iloc[0]
    assert best.answer == "cnn constant gelu adam batch_norm"
    margins = f"±{100 * first['seed_half']:.1f} for another seed, ±{100 * first['image_half']:.1f} for other images"
    assert best.details[0] == f"{first['val_accuracy']:.2%} of the validation images (3 new seeds; {margins})."
    assert best.details[1].startswith(f"{first['test_accuracy_as_validated']:.2%} on the test set (±")
    assert not any("lucky" in detail for detail in best.details)


def test_a_winner_that_was_not_confirmed_was_partly_lucky() -> None:
    best = fact(analysed(trial(0.8), trial(0.7, activation="gelu"), val_images=100), "Use")
    assert best.details[-1].startswith("As the best of 2 trials it was partly lucky: expect less of another seed.")


@pytest.mark.parametrize(("end", "named"), [(0.9, True), (0.7, False)])
def test_a_control_that_ended_above_the_winner_is_named(end: float, named: bool) -> None:
    spared = trial(end, control=True, stop_epoch=1.0, activation="gelu")
    best = fact(analysed(trial(0.8), spared), "Use")
    assert best.answer == name_of(CELL)
    assert any("gelu" in detail and "90.00%" in detail for detail in best.details) is named


def test_the_factor_with_the_largest_planted_effect_is_found(verdict: Verdict) -> None:
    found = fact(verdict, LONG)
    assert found.answer.split(", ")[0] == "optimizer"
    assert re.match(r"optimizer: adam over asgd, 1\d\.\d ±\d\.\d points", found.details[0])


def test_what_matters_lists_every_factor_in_the_order_of_the_picture(stopped: Verdict) -> None:
    effects = stopped.effects
    assert isinstance(effects, FinalEffects)
    found = what_matters(effects)
    rows = difference_rows(effects.differences)
    assert [detail.split(":")[0] for detail in found.details[: len(rows)]] == list(rows["factor"])
    assert found.answer == ", ".join(rows[rows["sure"]]["factor"])


def test_what_does_not_matter_has_a_bound(stopped: Verdict) -> None:
    effects = stopped.effects
    assert isinstance(effects, FinalEffects)
    bound = 100 * effects.differences.query("factor == 'batch_norm'")["high"].max()
    assert f"batch_norm: less than {bound:.1f} points between any two levels" in what_matters(effects).details


def test_levels_that_may_be_as_good_as_the_best_are_named(stopped: Verdict) -> None:
    effects = stopped.effects
    assert isinstance(effects, FinalEffects)
    rows = effects.differences.assign(sure=effects.differences["other_level"] != "cosine")
    (line,) = [
        line for line in what_matters(replace(effects, differences=rows)).details if line.startswith("lr_schedule")
    ]
    assert line.endswith(" points; cosine may be as good as one_cycle")


def test_a_grid_with_as_many_terms_as_trials_says_too_little() -> None:
    found = fact(analysed(trial(0.8), trial(0.7, activation="gelu")), LONG)
    assert (found.answer, found.details) == ("nothing for sure", ("activation: too few trials to say",))


def test_nothing_may_matter_for_sure(stopped: Verdict) -> None:
    effects = stopped.effects
    assert isinstance(effects, FinalEffects)
    unsure = replace(effects, differences=effects.differences.assign(sure=False))
    assert what_matters(unsure).answer == "nothing for sure"


@pytest.mark.parametrize(("pairs", "words"), [(0, "no pair of levels stands out"), (1, "both"), (3, "; 1 weaker int")])
def test_pairs_that_stand_out_are_named_the_strongest_first(stopped: Verdict, pairs: int, words: str) -> None:
    effects = stopped.effects
    assert isinstance(effects, FinalEffects)
    found = effects.interactions.assign(stands_out=False)
    crossed = found["factor"] + found["other_factor"]
    chosen = found[crossed.isin(crossed.unique()[: (0, 1, 0, 2)[pairs]])].index
    found.loc[chosen, "stands_out"] = True
    assert words in what_matters(replace(effects, interactions=found)).details[-1]


def test_who_learns_fast_is_compared_with_who_ends_well(stopped: Verdict) -> None:
    early = fact(stopped, "After epoch 1")
    assert early.answer == "it looked different"
    assert early.remark.endswith("Who learns fast is not who ends well.")
    assert isinstance(stopped.first, RungEffects)
    first = stopped.first.levels.set_index("level").loc["one_cycle", "effect"]
    assert early.details[0].startswith(f"lr_schedule=one_cycle {100 * first:+.1f} points then, +")


def test_effects_that_hardly_change_look_alike(stopped: Verdict) -> None:
    assert isinstance(stopped.effects, FinalEffects)
    assert isinstance(stopped.first, RungEffects)
    levels = stopped.first.levels.drop(columns="effect").merge(stopped.effects.levels[["factor", "level", "effect"]])
    early = fact(replace(stopped, first=replace(stopped.first, levels=levels)), "After epoch 1")
    assert (early.answer, early.remark) == (
        "it looked much the same",
        "Correlation of the effects then with those at the end: 1.00.",
    )


def test_the_saved_share_counts_the_epochs_of_stopped_trials(verdict: Verdict) -> None:
    trials = verdict.experiment.trials
    stopped = trials[trials["status"] == "stopped"]
    saved = (stopped["epochs"] - stopped["epochs_run"]).sum() / trials["epochs"].sum()
    assert fact(verdict, "Early stopping").answer == f"saved {saved:.0%} of the epochs"


def test_what_stopping_may_have_lost_is_bounded(stopped: Verdict) -> None:
    for detail in fact(stopped, "Early stopping").details:
        assert re.search(r"at most \d+ of \d+ stopped trials would have", detail)
    assert len(fact(stopped, "Early stopping").details) == 2


def test_without_controls_it_is_unknown_what_stopping_cost_and_what_matters() -> None:
    verdict = analysed(trial(0.8), trial(0.4, "stopped", 1, activation="gelu"))
    stopping = fact(verdict, "Early stopping")
    assert (stopping.answer, stopping.details) == ("saved 44% of the epochs", ())
    assert stopping.remark.startswith("What it cost is unknown: no unstopped control")
    unknown = fact(verdict, "Matters at the end")
    assert unknown.answer == "unknown"
    assert unknown.remark.startswith("Effects at the end are unknown: it was seen of 0 unstopped controls")


def test_without_rungs_nothing_is_saved() -> None:
    plain = {name: value for name, value in trial(0.8).items() if not name.startswith("val_accuracy_at_")}
    stopping = fact(analysed(plain), "Early stopping")
    assert (stopping.answer, stopping.remark) == ("none", "Every trial had the full budget.")


def test_a_single_cell_has_no_rival_and_no_effects() -> None:
    verdict = analysed(trial(0.8))
    assert [fact.question for fact in headline(verdict)] == ["Use", "Early stopping", "Holds for"]
    assert fact(verdict, "Use").details == (
        "80.00% of the validation images (one seed).",
        "It is the only cell.",
    )


def test_trials_of_two_budgets_are_refused() -> None:
    with pytest.raises(InputError, match="^trials of 9 and 27 epochs can't be ranked together"):
        analysed(trial(0.8), trial(0.8, model="cnn", epochs=27))


def test_without_an_accuracy_there_is_no_best_cell() -> None:
    verdict = analysed(trial(np.nan, "diverged", 1), trial(np.nan, "diverged", 1, model="cnn"))
    best = fact(verdict, "Use")
    assert (best.answer, best.remark) == ("nothing yet", "No trial has an accuracy: all diverged or failed.")
    assert isinstance(verdict.effects, Unavailable)
    assert isinstance(verdict.audit, Unavailable)
    assert [fact.question for fact in headline(verdict)] == ["Use", "Holds for"]


@pytest.mark.parametrize(("others", "words"), [(1, "; 1 other may be as good."), (2, "; 2 others may be as good.")])
def test_ties_of_the_best_are_counted(others: int, words: str) -> None:
    rivals = [trial(0.79, activation=name) for name in ("gelu", "elu")[:others]]
    best = fact(analysed(trial(0.8), *rivals, val_images=100), "Use")
    assert best.details[1] == f"It is 1.00 points above the next{words}"


def test_a_sure_lead_is_stated_in_points() -> None:
    verdict = analysed(trial(0.8), trial(0.7, activation="gelu"), val_images=10000)
    assert fact(verdict, "Use").details[1] == "It is 10.00 points above the next, more than chance explains."


def test_the_only_cell_with_the_full_budget_has_no_rival() -> None:
    verdict = analysed(trial(0.8), trial(0.7, "stopped", 3, activation="gelu"), val_images=100)
    assert fact(verdict, "Use").details[1] == "No other cell trained for as many epochs."


def test_the_scope_names_data_budget_and_rates() -> None:
    scope = fact(analysed(trial(0.8), name="emnist-bymerge", per_class=60), "Holds for")
    assert scope.answer == "emnist-bymerge, 60 images per class, 9 epochs"
    assert scope.details[0].startswith("One base learning rate per optimizer")
    scaled = fact(analysed(trial(0.8), trial(0.8, lr_scale=3.0)), "Holds for")
    assert scaled.answer == "these images, 9 epochs"
    assert scaled.details[0].startswith("Each cell was trained with 2 learning-rate scales")


def test_a_cell_is_named_after_its_levels() -> None:
    assert name_of(trial(0.8, batch_norm="on", regularization="l2")) == "mlp constant relu sgd batch_norm l2"


def test_a_lead_among_finalists_has_intervals_on_the_same_seeds_and_images() -> None:
    rows = [trial(0.5, activation=name, seed=seed) for name in ("relu", "gelu") for seed in (0, 1)]
    tested = {"test_accuracy": np.nan, "test_accuracy_as_validated": np.nan, "test_images": np.nan}
    right = {("relu", 0): b"\xff\xf0", ("relu", 1): b"\xff\xe0", ("gelu", 0): b"\xfe\xf0", ("gelu", 1): b"\xf8\xe0"}
    finalists = pd.DataFrame(
        {**row, **tested, "val_correct": b64encode(right[row["activation"], row["seed"]]).decode()} for row in rows
    )
    finalists["final_val_accuracy"] = [12 / 16, 11 / 16, 11 / 16, 8 / 16]
    experiment = Experiment("sqlite://", "x", "", pd.DataFrame(rows), finalists, {"data": {"val_images": 16}}, ())
    details = " ".join(fact(analyse(experiment), "Use").details)
    assert re.search(
        r"12\.50 points above the next \(±[\d.]+ for another seed, ±14\.1 for other images, on the same", details
    )
