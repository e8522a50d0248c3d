"""Measures what early stopping saved and what it may have cost, by replaying its rule on the unstopped controls.

Unstopped controls (trials drawn at random and exempt from early stopping; `controls` below) show how stopped trials
would have ended. The store does not record what ASHA would have decided about them, so its rule is replayed here. A
diverged control is neither 0 nor dropped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from grid.config import InputError
from grid.metrics import RUNG_METRIC, rung_epochs
from grid.wording import count

FACTOR = 3
"""One trial in this many continues at a rung, unless the grid's manifest says otherwise."""
TOP = 10
"""Best completed trials of a model that a cheaper rule should not lose."""
MIN_FOR_INTERVAL = 4
"""Controls below which a rank correlation has no interval."""

FALSE_STOPS = ["model", "controls", "stopped", "false_stops", "rate", "low", "high", "beat_winner", "beat_winner_high"]


@dataclass(frozen=True)
class Audit:
    """What early stopping saved and cost, by model. Shares and accuracies are fractions."""

    rungs: tuple[int, ...]
    """Epochs at which trials are stopped."""
    epochs: int
    """Full budget."""
    factor: int
    """One trial in this many continues at a rung."""
    correlations: pd.DataFrame
    """`model`, `rung`, `controls` that reached it, `spearman` (rank correlation of their accuracy there with that at
    the full budget; those that diverged later rank lowest), `low`, `high` (NaN below `MIN_FOR_INTERVAL` controls)."""
    false_stops: pd.DataFrame
    """`model`, `controls`, `stopped` (controls that the replayed rule stops), `false_stops` (of these, those that ended
    above the median survivor), `rate` (false_stops / stopped), `low`, `high`, `beat_winner` (those that ended above the
    winner), `beat_winner_high` (one-sided upper bound on their rate)."""
    savings: pd.DataFrame
    """`model`, `trials`, `epochs_full` (trials x budget), `epochs_run`, `saved` (share of `epochs_full` that stopping
    avoided; epochs that diverged and failed trials did not train are not counted)."""
    regret: pd.DataFrame
    """`model`, `winner` (accuracy of the best survivor), `best_stopped_control` (NaN if none completed), `margin`
    (winner - best_stopped_control), `stopped` (trials that ASHA stopped), `at_most` (upper bound on how many of them
    would have ended above the winner)."""
    baseline: pd.DataFrame
    """`model`, `epochs` (that ASHA spent, without those of controls after their replayed stop), `kept` (K: trials that
    can be trained to the end in as many epochs after all were trained to the first rung), `winner_rank` (at the first
    rung), `winner_kept` (whether it is among the K best there), `top` (survivors examined, ten or fewer), `top_kept`
    (of them)."""
    agreement: float
    """Share of the other trials about which the replayed rule agrees with ASHA's decision; NaN without any."""
    notes: tuple[str, ...]
    """What the tables mean, and what is missing from them, in sentences."""
    confidence: float = 0.95
    """Of all intervals and bounds."""


def audit_stopping(trials: pd.DataFrame, *, factor: int = FACTOR, confidence: float = 0.95) -> Audit:
    """Measure what early stopping saved and cost.

    The rule is replayed on all arrivals at once (`rung_thresholds`), whereas ASHA compared each trial with earlier
    arrivals only; `agreement` says how often that matters. A survivor is a completed trial that was not stopped: by
    ASHA or, for a control, by the replayed rule.

    Args:
        trials: From `analysis.store.read_experiment`; all with the same budget. Every trial counts, replicates and
            learning-rate scales too, because each was stopped (or not) individually.
        factor: One trial in this many continues at a rung.
        confidence: Of all intervals and bounds, in (0, 1).

    Raises:
        InputError: The budgets differ, no trial has an accuracy, or stopped trials have none at any rung.
    """
    rungs = _rungs(trials)
    classified = _classify(trials, rungs, factor)
    false_stops = _false_stops(classified, confidence) if rungs else pd.DataFrame(columns=FALSE_STOPS)
    return Audit(
        rungs=rungs,
        epochs=int(trials["epochs"].iloc[0]),
        factor=factor,
        correlations=_correlations(classified, rungs, confidence),
        false_stops=false_stops,
        savings=_savings(trials),
        regret=_regret(classified, false_stops),
        baseline=_baseline(classified, rungs),
        agreement=_agreement(classified)[0],
        notes=tuple(_notes(classified, rungs, factor)),
        confidence=confidence,
    )


def rung_thresholds(trials: pd.DataFrame, rungs: Sequence[int], factor: int) -> dict[tuple[str, int], float]:
    """Return the lowest accuracy that continues, by model and rung: the ceil(n / factor)-th best of n arrivals.

    As in ASHA itself, the arrivals are all trials with a value at the rung, including controls that the rule would have
    stopped before, and each trial that diverged on the way there, as worse than any other.

    Reference: Li et al. 2020, https://arxiv.org/abs/1810.05934 (here with all arrivals at once)
    """
    thresholds = {}
    for name, model_trials in trials.groupby("model"):
        on_the_way = model_trials["status"] == "diverged"
        for rung in rungs:
            values = model_trials[f"{RUNG_METRIC}{rung}"]
            arrived = np.sort(values.where(values.notna() | ~on_the_way, -math.inf).dropna())
            on_the_way &= values.notna()
            best = math.ceil(len(arrived) / factor)
            thresholds[str(name), rung] = float(arrived[-best]) if best else -math.inf
    return thresholds


def stop_epochs(trials: pd.DataFrame, thresholds: dict[tuple[str, int], float]) -> pd.Series:
    """Return the first rung at which each trial is below the threshold; NaN if it is at no rung that it reached."""
    stops = pd.Series(math.nan, index=trials.index)
    for (model, rung), threshold in thresholds.items():
        below = (trials["model"] == model) & (trials[f"{RUNG_METRIC}{rung}"] < threshold)
        stops = stops.mask(stops.isna() & below, rung)
    return stops


def clopper_pearson(successes: int, total: int, confidence: float) -> tuple[float, float]:
    """Return the exact interval of a proportion; 0 to 1 if the total is 0.

    Reference: Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404
    """
    if total == 0:
        return 0.0, 1.0
    low, high = proportion_confint(successes, total, alpha=1 - confidence, method="beta")
    return float(low), float(high)


def spearman(first: pd.Series, last: pd.Series, confidence: float) -> tuple[float, float, float]:
    """Return the rank correlation and the ends of its interval, by Fisher's z; NaN where undefined.

    For the interval a perfect order counts as half a swap of neighbours less than perfect, since z would be infinite.

    Reference: Bonett and Wright 2000, https://doi.org/10.1007/BF02294183
    """
    pairs = len(first)
    if pairs < 2 or first.nunique() < 2 or last.nunique() < 2:
        return math.nan, math.nan, math.nan
    correlation = float(np.corrcoef(first.rank(), last.rank())[0, 1])
    if pairs < MIN_FOR_INTERVAL:
        return correlation, math.nan, math.nan
    limit = 1 - 6 / (pairs**3 - pairs)  # swapping two neighbours costs 12 / (n^3 - n)
    z = math.atanh(min(max(correlation, -limit), limit))
    error = math.sqrt((1 + correlation**2 / 2) / (pairs - 3))
    half = float(norm.ppf((1 + confidence) / 2)) * error
    return correlation, math.tanh(z - half), math.tanh(z + half)


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
    reached = (rung for rung in rung_epochs(trials.columns) if trials[f"{RUNG_METRIC}{rung}"].notna().any())
    rungs = tuple(rung for rung in reached if rung < budgets[0])
    if not rungs and (trials["status"] == "stopped").any():
        raise InputError("trials were stopped, but none has a val_accuracy_at_<epoch>; record it at every rung")
    return rungs


def _classify(trials: pd.DataFrame, rungs: Sequence[int], factor: int) -> pd.DataFrame:
    """Add four columns.

    `rule_stop`: the rung at which the replayed rule stops the trial. `survived`: whether it completed without being
    stopped. `ended_control`: whether it is a control that completed or diverged. `final`: its accuracy at the full
    budget, -inf if it did not complete.
    """
    rule_stop = stop_epochs(trials, rung_thresholds(trials, rungs, factor))
    completed, diverged = trials["status"] == "completed", trials["status"] == "diverged"
    return trials.assign(
        rule_stop=rule_stop,
        survived=completed & ~(trials["control"] & rule_stop.notna()),
        ended_control=trials["control"] & (completed | diverged),
        final=trials["best_val_accuracy"].where(completed, -math.inf),
    )


def _models_with(classified: pd.DataFrame, flag: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each model and all its trials, if any of them has the flag."""
    for name, model_trials in classified.groupby("model"):
        if model_trials[flag].any():
            yield str(name), model_trials


def _correlations(classified: pd.DataFrame, rungs: Sequence[int], confidence: float) -> pd.DataFrame:
    rows = []
    for model, trials in _models_with(classified, "ended_control"):
        for rung in rungs:
            reached = trials[trials["ended_control"] & trials[f"{RUNG_METRIC}{rung}"].notna()]
            correlation = spearman(reached[f"{RUNG_METRIC}{rung}"], reached["final"], confidence)
            rows.append((model, rung, len(reached), *correlation))
    return pd.DataFrame(rows, columns=["model", "rung", "controls", "spearman", "low", "high"])


def _false_stops(classified: pd.DataFrame, confidence: float) -> pd.DataFrame:
    rows = []
    for model, trials in _models_with(classified, "survived"):
        survivors = trials.loc[trials["survived"], "final"]
        controls = trials[trials["ended_control"]]
        stopped = controls.loc[controls["rule_stop"].notna(), "final"]
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


def _regret(classified: pd.DataFrame, false_stops: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for model, bound in zip(false_stops["model"], false_stops["beat_winner_high"], strict=True):
        trials = classified[classified["model"] == model]
        winner = trials.loc[trials["survived"], "final"].max()
        missed = trials["ended_control"] & trials["rule_stop"].notna() & (trials["status"] == "completed")
        best = trials.loc[missed, "final"].max()
        stopped = int((trials["status"] == "stopped").sum())
        rows.append((model, winner, best, winner - best, stopped, math.floor(bound * stopped)))
    return pd.DataFrame(rows, columns=["model", "winner", "best_stopped_control", "margin", "stopped", "at_most"])


def _baseline(classified: pd.DataFrame, rungs: Sequence[int]) -> pd.DataFrame:
    rows = []
    for model, trials in _models_with(classified, "survived") if rungs else ():
        first, budget = rungs[0], int(trials["epochs"].iloc[0])
        needed = trials["rule_stop"].where(trials["control"]).fillna(budget)
        spent = int(np.minimum(trials["epochs_run"], needed).sum())
        screening = int(trials["epochs_run"].clip(upper=first).sum())
        ranks = trials[f"{RUNG_METRIC}{first}"].rank(ascending=False, method="min")
        kept = min(max((spent - screening) // (budget - first), 0), int(ranks.count()))
        best = trials[trials["survived"]].nlargest(TOP, "final").index
        top = ranks[best].fillna(len(trials))
        winner = int(top.iloc[0])
        rows.append((model, spent, kept, winner, winner <= kept, len(top), int((top <= kept).sum())))
    return pd.DataFrame(rows, columns=["model", "epochs", "kept", "winner_rank", "winner_kept", "top", "top_kept"])


def _agreement(classified: pd.DataFrame) -> tuple[float, int]:
    """Return the share of agreement with ASHA, and the number of trials about which ASHA decided."""
    at_a_rung = classified.filter(like=RUNG_METRIC).notna().any(axis=1)
    decided = classified[at_a_rung & ~classified["control"] & (classified["status"] != "failed")]
    asha_stop = decided["epochs_run"].where(decided["status"] == "stopped")
    return float((asha_stop.fillna(0) == decided["rule_stop"].fillna(0)).mean()), len(decided)


def _notes(classified: pd.DataFrame, rungs: Sequence[int], factor: int) -> Iterator[str]:
    if not rungs:
        budget = count(int(classified["epochs"].iloc[0]), "epoch")
        yield f"no rung below the budget of {budget}: no trial was stopped, so nothing can be lost"
        return
    agreement, decided = _agreement(classified)
    agreed = f"; the two agree on {agreement:.0%} of {count(decided, 'trial')}" if decided else ""
    yield (
        f"the rule is replayed: at each rung the best 1 in {factor} of a model's trials that reached it continue; "
        "controls and diverged trials count, as in ASHA; ASHA itself compared each trial with earlier arrivals only"
        f"{agreed}"
    )
    yield from _control_notes(classified[classified["control"]])
    for model, trials in classified.groupby("model"):
        if not trials["survived"].any():
            yield f"{model}: no completed trial that the rule would not have stopped, so there is no winner yet"
        if classified["ended_control"].any() and not trials["ended_control"].any():
            yield f"{model}: no control has completed or diverged, so the cost of stopping is unknown"
    for column, noun in (("seed", "seed"), ("lr_scale", "learning-rate scale")):
        if (values := classified[column].nunique()) > 1:
            yield f"{count(values, noun)}: every trial counts, because each was stopped or not individually"


def _control_notes(controls: pd.DataFrame) -> Iterator[str]:
    if controls.empty:
        yield "no unstopped controls: the cost of stopping is unknown; run grid.run with --controls 0.05 next time"
        return
    ended = controls[controls["ended_control"]]
    yield (
        "unstopped controls were drawn at random, so they show how stopped trials would have ended; a false stop is a "
        "control that the rule would have stopped and that ended above the median of its model's survivors (completed "
        "trials that were not stopped)"
    )
    if without_end := len(controls) - len(ended):
        yield f"left out: {without_end} of {count(len(controls), 'control')}, which failed or were stopped after all"
    if diverged := int((ended["status"] == "diverged").sum()):
        before = int(((ended["status"] == "diverged") & ended["rule_stop"].notna()).sum())
        yield (
            f"{diverged} of {count(len(ended), 'control')} diverged: they rank lowest and are never false stops; the "
            f"rule would have stopped {before} of them before"
        )
    if ended["model"].value_counts().lt(MIN_FOR_INTERVAL).any():
        yield f"a rank correlation of fewer than {MIN_FOR_INTERVAL} controls has no interval"
