"""All results of an experiment, and its headline: what won, what matters, what stopping cost."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd

from analysis.effects import Effects, measure_effects, measure_final_effects
from analysis.rank import rank_cells
from analysis.stopping import FACTOR, Audit, audit_stopping
from analysis.store import Experiment
from grid.config import FACTORS, InputError, cell_name
from grid.wording import count

SIGNIFICANT = 0.05
"""The headline says that an effect may be noise if its p value (after Holm's correction) is not below this."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fact:
    """One answer of the headline."""

    question: str
    answer: str
    remark: str


@dataclass(frozen=True)
class Unavailable:
    """Stands for a result that the trials do not yield."""

    reason: str


@dataclass(frozen=True)
class Verdict:
    """An experiment and its results."""

    experiment: Experiment
    cells: pd.DataFrame
    """From `analysis.rank.rank_cells`."""
    effects: Effects | Unavailable = Unavailable("not measured")
    """At the first rung, from all trials."""
    effects_at_end: Effects | Unavailable | None = None
    """After the full budget, from the unstopped controls; None if `effects` are already at the end, or unavailable."""
    audit: Audit | Unavailable = Unavailable("not audited")


def analyse(experiment: Experiment) -> Verdict:
    """Rank the cells, measure the effects and audit early stopping.

    Raises:
        InputError: The trials have different budgets.
    """
    trials = experiment.trials
    cells = rank_cells(trials, experiment.finalists, val_images=experiment.val_images)
    effects = _attempt(lambda: measure_effects(trials))
    at_end = None
    if isinstance(effects, Effects) and effects.epoch < trials["epochs"].max():
        at_end = _attempt(lambda: measure_final_effects(trials))
    audit = _attempt(lambda: audit_stopping(trials, factor=experiment.rung_factor or FACTOR))
    return Verdict(experiment, cells, effects, at_end, audit)


def _attempt(measure: Callable[[], Result]) -> Result | Unavailable:
    try:
        return measure()
    except InputError as error:
        return Unavailable(str(error))


def headline(verdict: Verdict) -> Iterator[Fact]:
    """Yield the main results, each in a sentence or two."""
    yield _winner(verdict.cells)
    if isinstance(verdict.effects, Effects):
        yield _what_matters(verdict.effects, "")
    if isinstance(at_end := verdict.effects_at_end, Effects):
        yield _what_matters(at_end, f" among {count(at_end.observations, 'unstopped control')}")
    if isinstance(verdict.audit, Audit):
        yield _what_stopping_cost(verdict.audit)


def name_of(cell: Mapping[Any, Any]) -> str:
    """Return the name of a cell, given as a row of the ranking or of the trials."""
    return cell_name({factor: str(cell[factor]) for factor in FACTORS})


def _winner(cells: pd.DataFrame) -> Fact:
    if not len(cells):
        return Fact("Best cell", "none", "No trial has an accuracy: all diverged or failed.")
    best = cells.iloc[0]
    seeds = "one seed" if best["seeds"] == 1 else f"{best['seeds']} seeds"
    accuracy = f"{best['val_accuracy']:.2%} of the validation images ({seeds})"
    if not pd.isna(best["test_accuracy"]):
        accuracy += f", {best['test_accuracy']:.2%} of the test images"
    return Fact("Best cell", name_of(best.to_dict()), f"{accuracy}. {_lead(cells)}")


def _lead(cells: pd.DataFrame) -> str:
    """Say how certain the first place is."""
    best = cells.iloc[0]
    if len(cells) == 1:
        return "It is the only cell."
    if pd.isna(best["group"]):
        return "How certain the order is remains unknown: one seed, and no count of images in the store."
    rivals = cells[(cells["tier"] == best["tier"]) & (cells["epochs_run"] == best["epochs_run"])]
    tied = int((rivals["group"] == best["group"]).sum())
    if tied > 1:
        return f"It is tied with {count(tied - 1, 'other')}."
    if len(rivals) == 1:
        return "No other cell trained for as many epochs."
    return f"It is {100 * (best['val_accuracy'] - rivals['val_accuracy'].iloc[1]):.2f} points ahead of the next."


def _what_matters(effects: Effects, sample: str) -> Fact:
    question = f"Matters most after epoch {effects.epoch}"
    first = effects.variance[effects.variance["term"].isin(effects.factors)].iloc[0]
    if not first["share"] > 0:
        return Fact(question, "nothing", "All cells have the same accuracy.")
    levels = effects.levels[effects.levels["factor"] == first["term"]].dropna(subset="effect")
    best, worst = levels.loc[levels["effect"].idxmax()], levels.loc[levels["effect"].idxmin()]
    return Fact(
        question,
        str(first["term"]),
        f"It explains {first['share']:.0%} of the variance{sample}: {best['level']} is "
        f"{100 * (best['effect'] - worst['effect']):.1f} points above {worst['level']}, averaged over the "
        f"other factors.{_doubt(first['p_holm'])}",
    )


def _doubt(p: float) -> str:
    """Say whether an effect may be noise; nothing if that is unlikely."""
    if pd.isna(p):
        return " There are too few trials to say whether that is more than noise."
    return "" if p < SIGNIFICANT else f" It may be noise (p = {p:.2f})."


def _what_stopping_cost(audit: Audit) -> Fact:
    if not audit.rungs:
        return Fact("Early stopping", "none", "Every trial had the full budget.")
    savings = audit.savings
    saved = (savings["saved"] * savings["epochs_full"]).sum() / max(1, savings["epochs_full"].sum())
    stopped, above = (int(audit.false_stops[name].sum()) for name in ("stopped", "beat_winner"))
    remark = "What it cost is unknown: it would have stopped no unstopped control."
    if stopped:
        controls = count(stopped, "unstopped control")
        remark = f"Of {controls} that it would have stopped, {above} ended above the best trial that it did not stop."
    return Fact("Early stopping", f"saved {saved:.0%} of the epochs", remark)
