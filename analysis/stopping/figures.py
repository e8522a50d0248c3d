"""The figures of an audit: what early stopping saved and what it may have cost, by model.

Unstopped controls (trials drawn at random and exempt from early stopping; `controls` below) show how stopped trials
would have ended. A diverged control is neither 0 nor dropped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.stopping.bounds import beat_by_chance, best_at_most, clopper_pearson, spearman
from analysis.stopping.notes import describe_gaps, describe_rule
from analysis.stopping.verdicts import FACTOR, WITHIN, has_verdicts, replay, rung_thresholds, stop_epochs
from analysis.store import Experiment
from grid.config import InputError
from grid.metrics import RUNG_METRIC, recorded_rungs

ALL = "all"
"""Stands for the model in a table if trials are compared across models."""
TOP = 10
"""Best completed trials of a model that a cheaper rule should not lose."""
FALSE_STOPS = ["model", "controls", "stopped", "false_stops", "rate", "low", "high", "beat_winner", "beat_winner_high"]


@dataclass(frozen=True)
class Audit:
    """What early stopping saved and cost, by model. Shares and accuracies are fractions.

    If trials were compared across models, the tables but `savings` have one row, whose `model` is `ALL`. A winner is
    the best survivor of a row.
    """

    rungs: tuple[int, ...]
    """Epochs at which trials are stopped."""
    epochs: int
    """Full budget."""
    factor: int
    """One trial in this many continues at a rung; 1 if none was stopped."""
    within: tuple[str, ...]
    """Trials were compared with those that have the same levels of these factors; empty for with all."""
    correlations: pd.DataFrame
    """`model`, `rung`, `controls` that reached it, `spearman` (rank correlation of their accuracy there with that at
    the full budget; those that diverged later rank lowest), `low`, `high` (NaN below `MIN_FOR_INTERVAL` controls)."""
    false_stops: pd.DataFrame
    """`model`, `controls`, `stopped` (controls that the rule would have stopped), `false_stops` (of these, those that
    ended above the median survivor), `rate` (false_stops / stopped), `low`, `high`, `beat_winner` (those that ended
    above the winner), `beat_winner_high` (one-sided upper bound on their rate)."""
    savings: pd.DataFrame
    """`model`, `trials`, `epochs_full` (trials x budget), `epochs_run`, `saved` (share of `epochs_full` that stopping
    avoided; epochs that diverged and failed trials did not train are not counted)."""
    lost_winners: pd.DataFrame
    """`model`, `tried` (controls that the rule would have stopped and that completed), `beat` (those of them that ended
    above the winner), `by_chance` (how many are expected to if stopping were a coin flip, see `beat_by_chance`),
    `stopped` (trials that ASHA stopped), `at_most` (one-sided upper bound on how many of them would have ended above
    the winner)."""
    regret: pd.DataFrame
    """`model`, `winner` (accuracy of the best survivor), `best_stopped_control` (NaN if none completed), `margin`
    (winner - best_stopped_control), `loss_at_most` (upper bound on how far the best of the trials that ASHA stopped is
    expected to end above the winner, see `best_at_most`; NaN below `MIN_FOR_LOSS` controls)."""
    baseline: pd.DataFrame
    """`model`, `epochs` (that ASHA spent, without those of controls after their stop), `kept` (K: trials that
    can be trained to the end in as many epochs after all were trained to the first rung), `winner_rank` (at the first
    rung), `winner_kept` (whether it is among the K best there), `top` (survivors examined, ten or fewer), `top_kept`
    (of them)."""
    agreement: float
    """Share of the trials without controls about which the replayed rule agrees with ASHA; NaN if nothing is
    replayed."""
    notes: tuple[str, ...]
    """What the tables mean, and what is missing from them, in sentences."""
    confidence: float = 0.95
    """Of all intervals and bounds."""


def audit_stopping(
    trials: pd.DataFrame, *, factor: int = FACTOR, within: Sequence[str] = WITHIN, confidence: float = 0.95
) -> Audit:
    """Measure what early stopping saved and cost.

    A survivor is a completed trial that was not stopped: by ASHA or, for a control, by its verdict (`stop_epochs`).

    Args:
        trials: From `analysis.store.read_experiment`; all with the same budget. Every trial counts, replicates and
            learning-rate scales too, because each was stopped (or not) individually.
        factor: One trial in this many continues at a rung; 1 for no stopping.
        within: Trials were compared with those that have the same levels of these factors; empty for with all.
        confidence: Of all intervals and bounds, in (0, 1).

    Raises:
        InputError: The budgets differ, no trial has an accuracy, or stopped trials have none at any rung.
    """
    rungs = _rungs(trials)
    classified = _classify(trials, rungs, factor, within)
    false_stops = _false_stops(classified, confidence) if rungs else pd.DataFrame(columns=FALSE_STOPS)
    agreement, decided = (math.nan, 0) if has_verdicts(trials) else _agreement(classified, rungs, factor, within)
    return Audit(
        rungs=rungs,
        epochs=int(trials["epochs"].iloc[0]),
        factor=factor,
        within=tuple(within),
        correlations=_correlations(classified, rungs, confidence),
        false_stops=false_stops,
        savings=_savings(trials),
        lost_winners=_lost_winners(classified, false_stops),
        regret=_regret(classified, false_stops, confidence),
        baseline=_baseline(classified, rungs if factor > 1 else ()),
        agreement=agreement,
        notes=(
            *describe_rule(classified, rungs, factor, within, agreement, decided),
            *describe_gaps(classified, rungs, factor, within, confidence),
        ),
        confidence=confidence,
    )


def audit_experiment(experiment: Experiment) -> Audit:
    """Measure what early stopping saved and cost in an experiment, by the rule that its manifest names.

    Raises:
        InputError: As `audit_stopping`.
    """
    factor, within = experiment.rung_factor, experiment.compared_within
    return audit_stopping(
        experiment.trials,
        factor=FACTOR if factor is None else factor,
        within=WITHIN if within is None else within,
    )


def _rungs(trials: pd.DataFrame) -> tuple[int, ...]:
    """Return the rungs below the budget that any trial reached."""
    if trials.empty:
        raise InputError("there are no trials to audit; run python -m grid.run first")
    budgets = sorted(trials["epochs"].unique())
    if len(budgets) > 1:
        mixed = " and ".join(map(str, budgets))
        raise InputError(f"trials of {mixed} epochs can't be audited together; audit one budget at a time")
    if not trials["best_val_accuracy"].notna().any():
        raise InputError("no trial has an accuracy: all diverged or failed; try --lr-scales 0.1")
    reached = (rung for rung in recorded_rungs(trials.columns) if trials[f"{RUNG_METRIC}{rung}"].notna().any())
    rungs = tuple(rung for rung in reached if rung < budgets[0])
    if not rungs and (trials["status"] == "stopped").any():
        raise InputError("trials were stopped, but none has a val_accuracy_at_<epoch>; record it at every rung")
    return rungs


def _classify(trials: pd.DataFrame, rungs: Sequence[int], factor: int, within: Sequence[str]) -> pd.DataFrame:
    """Add five columns.

    `verdict`: the rung at which ASHA stopped the trial or would have. `survived`: whether it completed without being
    stopped. `ended_control`: whether it is a control that completed or diverged. `final`: its accuracy at the full
    budget, -inf if it did not complete. `row`: its model, or `ALL` if trials are compared across models.
    """
    verdict = stop_epochs(trials, rungs, factor=factor, within=within)
    completed, diverged = trials["status"] == "completed", trials["status"] == "diverged"
    return trials.assign(
        verdict=verdict,
        survived=completed & verdict.isna(),
        ended_control=trials["control"] & (completed | diverged),
        final=trials["final_val_accuracy"].where(completed, -math.inf),
        row=trials["model"] if "model" in within else ALL,
    )


def _rows_with(classified: pd.DataFrame, flag: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and all trials of each row of a table, if any of them has the flag."""
    for name, trials in classified.groupby("row"):
        if trials[flag].any():
            yield str(name), trials


def _correlations(classified: pd.DataFrame, rungs: Sequence[int], confidence: float) -> pd.DataFrame:
    rows = []
    for model, trials in _rows_with(classified, "ended_control"):
        for rung in rungs:
            reached = trials[trials["ended_control"] & trials[f"{RUNG_METRIC}{rung}"].notna()]
            correlation = spearman(reached[f"{RUNG_METRIC}{rung}"], reached["final"], confidence)
            rows.append((model, rung, len(reached), *correlation))
    return pd.DataFrame(rows, columns=["model", "rung", "controls", "spearman", "low", "high"])


def _false_stops(classified: pd.DataFrame, confidence: float) -> pd.DataFrame:
    rows = []
    for model, trials in _rows_with(classified, "survived"):
        survivors = trials.loc[trials["survived"], "final"]
        controls = trials[trials["ended_control"]]
        stopped = controls.loc[controls["verdict"].notna(), "final"]
        false, beat = int((stopped > survivors.median()).sum()), int((stopped > survivors.max()).sum())
        rate = false / len(stopped) if len(stopped) else math.nan
        interval = clopper_pearson(false, len(stopped), confidence)
        _, beat_high = clopper_pearson(beat, len(stopped), 2 * confidence - 1)  # one-sided: 95% from a 90% interval
        if len(controls):
            rows.append((model, len(controls), len(stopped), false, rate, *interval, beat, beat_high))
    return pd.DataFrame(rows, columns=FALSE_STOPS)


def _savings(trials: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for model, model_trials in trials.groupby("model"):
        full = int(model_trials["epochs"].sum())
        stopped = model_trials[model_trials["status"] == "stopped"]
        saved = (stopped["epochs"] - stopped["epochs_run"]).sum() / full
        rows.append((str(model), len(model_trials), full, int(model_trials["epochs_run"].sum()), float(saved)))
    return pd.DataFrame(rows, columns=["model", "trials", "epochs_full", "epochs_run", "saved"])


def _lost_winners(classified: pd.DataFrame, false_stops: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for found in false_stops.to_dict("records"):
        trials = classified[classified["row"] == found["model"]]
        tried, stopped = int(_was_spared(trials).sum()), int((trials["status"] == "stopped").sum())
        by_chance = beat_by_chance(tried, int(trials["survived"].sum()))
        bound = math.floor(found["beat_winner_high"] * stopped)
        rows.append((found["model"], tried, found["beat_winner"], by_chance, stopped, bound))
    return pd.DataFrame(rows, columns=["model", "tried", "beat", "by_chance", "stopped", "at_most"])


def _regret(classified: pd.DataFrame, false_stops: pd.DataFrame, confidence: float) -> pd.DataFrame:
    rows = []
    for name in false_stops["model"]:
        trials = classified[classified["row"] == name]
        winner = trials.loc[trials["survived"], "final"].max()
        ends, stopped = trials.loc[_was_spared(trials), "final"], int((trials["status"] == "stopped").sum())
        bound = best_at_most(ends.to_numpy(dtype=float), stopped, confidence) if stopped else -math.inf
        loss = bound if math.isnan(bound) else max(0.0, bound - winner)
        rows.append((name, winner, ends.max(), winner - ends.max(), loss))
    return pd.DataFrame(rows, columns=["model", "winner", "best_stopped_control", "margin", "loss_at_most"])


def _was_spared(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Return which trials are controls that the rule would have stopped and that completed."""
    return trials["ended_control"] & trials["verdict"].notna() & (trials["status"] == "completed")


def _baseline(classified: pd.DataFrame, rungs: Sequence[int]) -> pd.DataFrame:
    rows = []
    for model, trials in _rows_with(classified, "survived") if rungs else ():
        first, budget = rungs[0], int(trials["epochs"].iloc[0])
        needed = trials["verdict"].where(trials["control"]).fillna(budget)
        spent = int(np.minimum(trials["epochs_run"], needed).sum())
        screening = int(trials["epochs_run"].clip(upper=first).sum())
        ranks = trials[f"{RUNG_METRIC}{first}"].rank(ascending=False, method="min")
        kept = min(max((spent - screening) // (budget - first), 0), int(ranks.count()))
        best = trials[trials["survived"]].nlargest(TOP, "final").index
        top = ranks[best].fillna(len(trials))
        winner = int(top.iloc[0])
        rows.append((model, spent, kept, winner, winner <= kept, len(top), int((top <= kept).sum())))
    return pd.DataFrame(rows, columns=["model", "epochs", "kept", "winner_rank", "winner_kept", "top", "top_kept"])


def _agreement(classified: pd.DataFrame, rungs: Sequence[int], factor: int, within: Sequence[str]) -> tuple[float, int]:
    """Return how often the replayed rule agrees with ASHA, as a share, and of how many decided trials."""
    at_a_rung = classified.filter(like=RUNG_METRIC).notna().any(axis=1)
    decided = at_a_rung & ~classified["control"] & (classified["status"] != "failed")
    replayed = replay(classified, rung_thresholds(classified, rungs, factor, within), within)
    agree = replayed[decided].fillna(0) == classified.loc[decided, "verdict"].fillna(0)
    return float(agree.mean()), int(decided.sum())
