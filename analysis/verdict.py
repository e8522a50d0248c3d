"""All that the analysis has to say of one experiment, and its headline: what won, what matters, what stopping cost."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.audit import FACTOR, Audit, audit_stopping
from analysis.effects import Effects, measure_effects, measure_final_effects
from analysis.rank import rank_cells
from analysis.store import Experiment
from grid.config import FACTORS, InputError, cell_name

SIGNIFICANT = 0.05
"""Of p values (after Holm) above it the headline says that the effect may be noise."""


@dataclass(frozen=True)
class Fact:
    """One answer of the headline."""

    question: str
    answer: str
    remark: str


@dataclass(frozen=True)
class Verdict:
    """An experiment and what follows from it."""

    experiment: Experiment
    cells: pd.DataFrame
    """From `analysis.rank.rank_cells`."""
    effects: Effects | None = None
    """At the first rung, of all trials."""
    effects_at_end: Effects | None = None
    """After the full budget, of the controls; None where the first rung is the end."""
    audit: Audit | None = None
    problems: dict[str, str] = field(default_factory=dict)
    """`effects`, `effects_at_end` or `audit` -> why it could not be had."""


def analyse(experiment: Experiment) -> Verdict:
    """Rank, measure and audit an experiment.

    Raises:
        InputError: Its trials are of several budgets.
    """
    trials, problems = experiment.trials, {}
    cells = rank_cells(trials, experiment.finalists, val_images=experiment.val_images)
    effects = effects_at_end = audit = None
    try:
        effects = measure_effects(trials)
        if effects.epoch < trials["epochs"].max():
            effects_at_end = measure_final_effects(trials)
    except InputError as error:
        problems["effects" if effects is None else "effects_at_end"] = str(error)
    try:
        audit = audit_stopping(trials, factor=experiment.rung_factor or FACTOR)
    except InputError as error:
        problems["audit"] = str(error)
    return Verdict(experiment, cells, effects, effects_at_end, audit, problems)


def headline(verdict: Verdict) -> Iterator[Fact]:
    """Yield the answers that a reader in a hurry takes along."""
    yield _winner(verdict.cells)
    if verdict.effects is not None:
        yield _what_matters(verdict.effects, "")
    if verdict.effects_at_end is not None:
        controls = f" of the {verdict.effects_at_end.observations:,} controls"
        yield _what_matters(verdict.effects_at_end, controls)
    if verdict.audit is not None:
        yield _what_stopping_cost(verdict.audit)


def name_of(cell: Mapping[Any, Any]) -> str:
    """Format a row of the ranking."""
    return cell_name({factor: str(cell[factor]) for factor in FACTORS})


def _winner(cells: pd.DataFrame) -> Fact:
    if not len(cells):
        return Fact("Best cell", "none", "No trial reached an accuracy: all diverged or failed.")
    best = cells.iloc[0]
    seeds = "one seed" if best["seeds"] == 1 else f"{best['seeds']} seeds"
    accuracy = f"{best['val_accuracy']:.2%} of the validation images ({seeds})"
    if not pd.isna(best["test_accuracy"]):
        accuracy += f", {best['test_accuracy']:.2%} of the test images"
    return Fact("Best cell", name_of(best.to_dict()), f"{accuracy}. {_lead(cells)}")


def _lead(cells: pd.DataFrame) -> str:
    """Say how sure the first place is."""
    best = cells.iloc[0]
    if len(cells) == 1:
        return "It is the only one."
    if pd.isna(best["group"]):
        return "How sure the order is can't be said: one seed, and no count of images in the store."
    rivals = cells[(cells["tier"] == best["tier"]) & (cells["epochs_run"] == best["epochs_run"])]
    tied = int((rivals["group"] == best["group"]).sum())
    if tied > 1:
        return f"It can't be told apart from {tied - 1:,} other{'s' * (tied > 2)}."
    if len(rivals) == 1:
        return "No other went as far."
    return f"It is {100 * (best['val_accuracy'] - rivals['val_accuracy'].iloc[1]):.2f} points ahead of the next."


def _what_matters(effects: Effects, whose: str) -> Fact:
    question = f"Matters most after epoch {effects.epoch}"
    first = effects.variance[effects.variance["term"].isin(effects.factors)].iloc[0]
    if not first["share"] > 0:
        return Fact(question, "nothing", "All cells have the same accuracy.")
    levels = effects.levels[effects.levels["factor"] == first["term"]].dropna(subset="effect")
    best, worst = levels.loc[levels["effect"].idxmax()], levels.loc[levels["effect"].idxmin()]
    return Fact(
        question,
        str(first["term"]),
        f"It explains {first['share']:.0%} of the variance{whose}: {best['level']} is "
        f"{100 * (best['effect'] - worst['effect']):.1f} points above {worst['level']}, averaged over all the rest."
        f"{_doubt(first['p_holm'])}",
    )


def _doubt(p: float) -> str:
    """Say whether an effect may be noise; nothing if it hardly can."""
    if pd.isna(p):
        return " Too few trials to say whether that is more than noise."
    return "" if p < SIGNIFICANT else f" It may be noise (p = {p:.2f})."


def _what_stopping_cost(audit: Audit) -> Fact:
    if not audit.rungs:
        return Fact("Early stopping", "none", "Every trial had the full budget.")
    savings = audit.savings
    saved = (savings["saved"] * savings["epochs_full"]).sum() / max(1, savings["epochs_full"].sum())
    stopped, above = (int(audit.false_stops[name].sum()) for name in ("stopped", "beat_winner"))
    remark = "What it cost is unknown: no control that would have been stopped."
    if stopped:
        controls = "1 control" if stopped == 1 else f"{stopped} controls"
        remark = f"Of {controls} that it would have stopped, {above} ended above the best that it let go on."
    return Fact("Early stopping", f"saved {saved:.0%} of the epochs", remark)
