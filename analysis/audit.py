"""Says what early stopping saved, and what it may have cost: `python -m analysis.audit --experiment smoke-glyphs`.

Controls, drawn at random and never stopped, show how trials end that ASHA stops. The store does not hold what ASHA
would have decided about them, so its rule is replayed. A diverged control is never 0 and never dropped.
"""

import math
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from analysis.store import read_experiment
from grid.arguments import Parser
from grid.config import InputError
from grid.metrics import RUNG_METRIC

FACTOR = 3
"""One trial in this many goes on at a rung, unless the grid's manifest says otherwise."""
TOP = 10
"""Best completed trials of a model that a cheaper rule should not lose."""
FEWEST_FOR_INTERVAL = 4
"""Controls without which a rank correlation has no interval."""

FALSE_STOPS = ["model", "controls", "stopped", "false_stops", "rate", "low", "high", "beat_winner", "beat_winner_high"]


@dataclass(frozen=True)
class Audit:
    """What early stopping saved and cost, model by model. Shares and accuracies are fractions of 1."""

    rungs: tuple[int, ...]
    """Epochs at which was decided."""
    epochs: int
    """Full budget."""
    factor: int
    """One trial in this many goes on at a rung."""
    correlations: pd.DataFrame
    """`model`, `rung`, `controls` that reached it, `spearman` (rank correlation of their accuracy there with that at
    the full budget; those that diverged later rank lowest), `low`, `high` (NaN under four controls)."""
    false_stops: pd.DataFrame
    """`model`, `controls`, `stopped` (of them, by the replayed rule), `false_stops` (of these, those that ended above
    the median survivor), `rate` (false_stops / stopped), `low`, `high`, `beat_winner` (those that ended above the
    winner), `beat_winner_high` (one-sided upper bound on their rate)."""
    savings: pd.DataFrame
    """`model`, `trials`, `epochs_full` (trials x budget), `epochs_run`, `saved` (share of `epochs_full` that stopping
    left out; what diverged and failed trials left out is not counted)."""
    regret: pd.DataFrame
    """`model`, `winner` (accuracy of the best survivor), `best_stopped_control` (NaN if none was completed), `margin`
    (winner - best_stopped_control), `stopped` (trials that ASHA stopped), `at_most` (upper bound on how many of these
    would have ended above the winner)."""
    baseline: pd.DataFrame
    """`model`, `epochs` (that ASHA spent, a control's after its stop left out), `kept` (K: trials that can be trained
    to the end for as many epochs if all are trained to the first rung), `winner_rank` (at the first rung),
    `winner_kept` (it is among the K best there), `top` (survivors looked at, ten or fewer), `top_kept` (of them)."""
    agreement: float
    """Share of the other trials about which the replayed rule agrees with what happened; NaN without any."""
    notes: tuple[str, ...]
    """What the tables mean, and what they lack, in sentences."""
    confidence: float = 0.95
    """Of all intervals and bounds."""


def audit_stopping(trials: pd.DataFrame, *, factor: int = FACTOR, confidence: float = 0.95) -> Audit:
    """Measure what early stopping saved and cost.

    The rule is replayed with all arrivals at once (`rung_thresholds`), while ASHA judged each by the earlier ones;
    `agreement` says how often that makes a difference. A survivor is a completed trial that was let go on: by ASHA,
    or, if it is a control, by the replayed rule.

    Args:
        trials: From `analysis.store.read_experiment`; of one budget. Every trial counts by itself, replicates and
            learning-rate scales too, because each was stopped or not by itself.
        factor: One trial in this many goes on at a rung.
        confidence: Of all intervals and bounds, in (0, 1).

    Raises:
        InputError: The trials are of several budgets, or none has an accuracy, or stopped ones have none at a rung.
    """
    rungs = _rungs(trials)
    judged = _judge(trials, rungs, factor)
    false_stops = _false_stops(judged, confidence) if rungs else pd.DataFrame(columns=FALSE_STOPS)
    return Audit(
        rungs=rungs,
        epochs=int(trials["epochs"].iloc[0]),
        factor=factor,
        correlations=_correlations(judged, rungs, confidence),
        false_stops=false_stops,
        savings=_savings(trials),
        regret=_regret(judged, false_stops),
        baseline=_baseline(judged, rungs),
        agreement=_agreement(judged)[0],
        notes=tuple(_notes(judged, rungs, factor)),
        confidence=confidence,
    )


def rung_thresholds(trials: pd.DataFrame, rungs: Sequence[int], factor: int) -> dict[tuple[str, int], float]:
    """Return the lowest accuracy that goes on, by model and rung: the ceil(n / factor)-th best of the n that came.

    As in ASHA itself, those that came are all that have a value at the rung, controls included, also those that the
    rule would have stopped before; and a trial that diverged on the way to it, as worse than any other.

    Reference: Li et al. 2020, https://arxiv.org/abs/1810.05934 (here with all arrivals at once)
    """
    thresholds = {}
    for name, of_model in trials.groupby("model"):
        on_the_way = of_model["status"] == "diverged"
        for rung in rungs:
            values = of_model[f"{RUNG_METRIC}{rung}"]
            arrived = np.sort(values.where(values.notna() | ~on_the_way, -math.inf).dropna())
            on_the_way &= values.notna()
            best = math.ceil(len(arrived) / factor)
            thresholds[str(name), rung] = float(arrived[-best]) if best else -math.inf
    return thresholds


def stop_epochs(trials: pd.DataFrame, thresholds: dict[tuple[str, int], float]) -> pd.Series:
    """Return the rung at which each trial falls below the threshold first; NaN if at none that it has a value at."""
    stops = pd.Series(math.nan, index=trials.index)
    for (model, rung), threshold in thresholds.items():
        below = (trials["model"] == model) & (trials[f"{RUNG_METRIC}{rung}"] < threshold)
        stops = stops.mask(stops.isna() & below, rung)
    return stops


def clopper_pearson(count: int, of: int, confidence: float) -> tuple[float, float]:
    """Return the exact interval of a share; 0 to 1 if there is nothing to count.

    Reference: Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404
    """
    if of == 0:
        return 0.0, 1.0
    low, high = proportion_confint(count, of, alpha=1 - confidence, method="beta")
    return float(low), float(high)


def spearman(first: pd.Series, last: pd.Series, confidence: float) -> tuple[float, float, float]:
    """Return the rank correlation and its interval, through Fisher's z; a perfect order counts as half a swap less.

    Reference: Bonett and Wright 2000, https://doi.org/10.1007/BF02294183
    """
    count = len(first)
    if count < 2 or first.nunique() < 2 or last.nunique() < 2:
        return math.nan, math.nan, math.nan
    correlation = float(np.corrcoef(first.rank(), last.rank())[0, 1])
    if count < FEWEST_FOR_INTERVAL:
        return correlation, math.nan, math.nan
    most = 1 - 6 / (count**3 - count)  # swapping two neighbours costs 12 / (n^3 - n)
    z = math.atanh(min(max(correlation, -most), most))
    error = math.sqrt((1 + correlation**2 / 2) / (count - 3))
    reach = float(norm.ppf((1 + confidence) / 2)) * error
    return correlation, math.tanh(z - reach), math.tanh(z + reach)


def _rungs(trials: pd.DataFrame) -> tuple[int, ...]:
    if trials.empty:
        raise InputError("there is no trial to audit; run python -m grid.run first")
    budgets = sorted(trials["epochs"].unique())
    if len(budgets) > 1:
        mixed = " and ".join(map(str, budgets))
        raise InputError(f"trials of {mixed} epochs can't be audited together; audit one budget at a time")
    if not trials["best_val_accuracy"].notna().any():
        raise InputError("no trial reached an accuracy: all diverged or failed; try --lr-scales 0.1")
    names = [name for name in trials.columns if name.startswith(RUNG_METRIC) and trials[name].notna().any()]
    rungs = tuple(sorted(rung for name in names if (rung := int(name.removeprefix(RUNG_METRIC))) < budgets[0]))
    if not rungs and (trials["status"] == "stopped").any():
        raise InputError("trials were stopped, but none has a val_accuracy_at_<epoch>; record it at every rung")
    return rungs


def _judge(trials: pd.DataFrame, rungs: Sequence[int], factor: int) -> pd.DataFrame:
    """Add what the rule would do (`rule_stop`), who survived, and who is a control whose end is known."""
    rule_stop = stop_epochs(trials, rung_thresholds(trials, rungs, factor))
    completed, diverged = trials["status"] == "completed", trials["status"] == "diverged"
    return trials.assign(
        rule_stop=rule_stop,
        survived=completed & ~(trials["control"] & rule_stop.notna()),
        judge=trials["control"] & (completed | diverged),
        final=trials["best_val_accuracy"].where(completed, -math.inf),
    )


def _models(judged: pd.DataFrame, who: str) -> Iterable[tuple[str, pd.DataFrame]]:
    """Yield each model's trials if any of them is what is asked for."""
    for name, of_model in judged.groupby("model"):
        if of_model[who].any():
            yield str(name), of_model


def _correlations(judged: pd.DataFrame, rungs: Sequence[int], confidence: float) -> pd.DataFrame:
    rows = []
    for model, of_model in _models(judged, "judge"):
        for rung in rungs:
            reached = of_model[of_model["judge"] & of_model[f"{RUNG_METRIC}{rung}"].notna()]
            figures = spearman(reached[f"{RUNG_METRIC}{rung}"], reached["final"], confidence)
            rows.append((model, rung, len(reached), *figures))
    return pd.DataFrame(rows, columns=["model", "rung", "controls", "spearman", "low", "high"])


def _false_stops(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    rows = []
    for model, of_model in _models(judged, "survived"):
        survivors = of_model.loc[of_model["survived"], "final"]
        controls = of_model[of_model["judge"]]
        stopped = controls.loc[controls["rule_stop"].notna(), "final"]
        false, beat = int((stopped > survivors.median()).sum()), int((stopped > survivors.max()).sum())
        rate = false / len(stopped) if len(stopped) else math.nan
        interval = clopper_pearson(false, len(stopped), confidence)
        _, beat_high = clopper_pearson(beat, len(stopped), 2 * confidence - 1)  # one side of it
        if len(controls):
            rows.append((model, len(controls), len(stopped), false, rate, *interval, beat, beat_high))
    return pd.DataFrame(rows, columns=FALSE_STOPS)


def _savings(trials: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for model, of_model in trials.groupby("model"):
        full = int(of_model["epochs"].sum())
        stopped = of_model[of_model["status"] == "stopped"]
        saved = (stopped["epochs"] - stopped["epochs_run"]).sum() / full
        rows.append((str(model), len(of_model), full, int(of_model["epochs_run"].sum()), float(saved)))
    return pd.DataFrame(rows, columns=["model", "trials", "epochs_full", "epochs_run", "saved"])


def _regret(judged: pd.DataFrame, false_stops: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for model, bound in zip(false_stops["model"], false_stops["beat_winner_high"], strict=True):
        of_model = judged[judged["model"] == model]
        winner = of_model.loc[of_model["survived"], "final"].max()
        missed = of_model["judge"] & of_model["rule_stop"].notna() & (of_model["status"] == "completed")
        best = of_model.loc[missed, "final"].max()
        stopped = int((of_model["status"] == "stopped").sum())
        rows.append((model, winner, best, winner - best, stopped, math.floor(bound * stopped)))
    return pd.DataFrame(rows, columns=["model", "winner", "best_stopped_control", "margin", "stopped", "at_most"])


def _baseline(judged: pd.DataFrame, rungs: Sequence[int]) -> pd.DataFrame:
    rows = []
    for model, of_model in _models(judged, "survived") if rungs else ():
        first, budget = rungs[0], int(of_model["epochs"].iloc[0])
        needed = of_model["rule_stop"].where(of_model["control"]).fillna(budget)
        spent = int(np.minimum(of_model["epochs_run"], needed).sum())
        screening = int(of_model["epochs_run"].clip(upper=first).sum())
        ranks = of_model[f"{RUNG_METRIC}{first}"].rank(ascending=False, method="min")
        kept = min(max((spent - screening) // (budget - first), 0), int(ranks.count()))
        best = of_model[of_model["survived"]].nlargest(TOP, "final").index
        top = ranks[best].fillna(len(of_model))
        winner = int(top.iloc[0])
        rows.append((model, spent, kept, winner, winner <= kept, len(top), int((top <= kept).sum())))
    return pd.DataFrame(rows, columns=["model", "epochs", "kept", "winner_rank", "winner_kept", "top", "top_kept"])


def _agreement(judged: pd.DataFrame) -> tuple[float, int]:
    """Return the share of agreement, and of how many trials: those about which ASHA really decided."""
    at_a_rung = judged.filter(like=RUNG_METRIC).notna().any(axis=1)
    decided = judged[at_a_rung & ~judged["control"] & (judged["status"] != "failed")]
    really = decided["epochs_run"].where(decided["status"] == "stopped")
    return float((really.fillna(0) == decided["rule_stop"].fillna(0)).mean()), len(decided)


def _notes(judged: pd.DataFrame, rungs: Sequence[int], factor: int) -> list[str]:
    if not rungs:
        return [f"no rung below the budget of {judged['epochs'].iloc[0]}: nothing was stopped, so nothing can be lost"]
    agreement, count = _agreement(judged)
    agreed = f"; the two agree on {agreement:.0%} of {count:,} trials" if count else ""
    notes = [
        f"the rule is replayed: at each rung the best 1 in {factor} of all trials of a model that came there go on, "
        "controls and diverged ones counted, as ASHA counts them; ASHA itself judged each by the earlier ones "
        f"alone{agreed}",
        *_control_notes(judged[judged["control"]]),
    ]
    for model, of_model in judged.groupby("model"):
        if not of_model["survived"].any():
            notes.append(f"{model}: no trial was completed that the rule let go on, so there is no winner yet")
        if judged["judge"].any() and not of_model["judge"].any():
            notes.append(f"{model}: no control has an end to judge by, so what stopping cost there is unknown")
    for column, noun in (("seed", "seeds"), ("lr_scale", "learning-rate scales")):
        if (count := judged[column].nunique()) > 1:
            notes.append(f"{count} {noun}: every trial counts by itself, as it was stopped or not by itself")
    return notes


def _control_notes(controls: pd.DataFrame) -> list[str]:
    if controls.empty:
        return ["no controls: what stopping cost can't be known; run grid.run with --controls 0.05 next time"]
    judges = controls[controls["judge"]]
    notes = [
        "controls were drawn at random, so they tell how trials like the stopped ones would have ended: a false stop "
        "ended above the median of the model's survivors, which are the completed trials that were let go on"
    ]
    if without_end := len(controls) - len(judges):
        notes.append(f"left out: {without_end} of {len(controls)} controls, which failed or were stopped after all")
    if diverged := int((judges["status"] == "diverged").sum()):
        before = (judges["status"] == "diverged") & judges["rule_stop"].notna()
        notes.append(
            f"{diverged} of {len(judges)} controls diverged: they rank lowest and are no false stops; "
            f"stopped rightly are those that the rule would have stopped before: {before.sum()}"
        )
    if judges["model"].value_counts().lt(FEWEST_FOR_INTERVAL).any():
        notes.append(f"a rank correlation of fewer than {FEWEST_FOR_INTERVAL} controls has no interval")
    return notes


def format_audit(audit: Audit) -> str:
    """Return the audit as text of at most 80 columns."""
    sure = f"{audit.confidence:.0%}"
    rungs = " and ".join(map(str, audit.rungs)) or "none"
    start = _epochs(min(audit.rungs, default=0))
    tables = [
        _table(
            f"What stopping saved (rungs: {rungs}; budget: {_epochs(audit.epochs)})",
            audit.savings,
            "model | trials | epochs run | without stopping | saved",
            "{model} | {trials:,} | {epochs_run:,} | {epochs_full:,} | {saved:.0%}",
        ),
        _table(
            "Does the order at a rung foretell the order at the end? (controls)",
            audit.correlations,
            f"model | rung | controls | rank correlation | {sure} interval",
            "{model} | {rung} | {controls} | {spearman:.2f} | {low:.2f} to {high:.2f}",
        ),
        _table(
            "How many that the rule stops would beat the median survivor? (controls)",
            audit.false_stops,
            f"model | controls | rule would stop | false stops | rate | {sure} interval",
            "{model} | {controls} | {stopped} | {false_stops} | {rate:.0%} | {low:.0%} to {high:.0%}",
        ),
        _table(
            "Did stopping lose a trial that is better than the winner? (controls)",
            audit.regret,
            f"model | winner | best stopped control | margin | better ones lost ({sure} sure)",
            "{model} | {winner:.2%} | {best_stopped_control:.2%} | {margin:+.2%} | at most {at_most:,} of {stopped:,}",
        ),
        _table(
            f"Would a plain rule have done? (all for {start}, then the best K to the end)",
            audit.baseline,
            "model | epochs | K | winner's rank then | best survivors kept",
            "{model} | {epochs:,} | {kept:,} | {winner_rank:,} | {top_kept} of {top}",
        ),
    ]
    notes = "\n".join(textwrap.fill(note, 80, subsequent_indent="  ") for note in audit.notes)
    return "\n\n".join([*(table for table in tables if table), notes])


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _table(title: str, table: pd.DataFrame, heads: str, cells: str) -> str:
    """Return a title and a line per row, or nothing for no rows; what starts with a NaN is left empty."""
    lines = [heads.split(" | ")]
    for row in table.itertuples(index=False, name=None):
        words = cells.format(**dict(zip(table.columns, row, strict=True))).split(" | ")
        lines.append(["" if re.match(r"\+?nan\b", word) else word for word in words])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(map(str.rjust, words, widths)) for words in lines]
    return "\n".join([title, *aligned]) if len(table) else ""


def tidy(audit: Audit) -> pd.DataFrame:
    """Return all tables as one: `table`, `model`, `rung` (missing where there is none), `quantity`, `value`."""
    names = ("correlations", "false_stops", "savings", "regret", "baseline")
    tables = [
        table.melt([key for key in ("model", "rung") if key in table], var_name="quantity").assign(table=name)
        for name in names
        if len(table := getattr(audit, name))
    ]
    return pd.DataFrame(pd.concat(tables, ignore_index=True), columns=["table", "model", "rung", "quantity", "value"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the audit and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(prog="python -m analysis.audit", description="Say what early stopping saved, and what it cost.")
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment")
    parser.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures to a file, one per line")
    options = parser.parse_args(arguments)
    try:
        experiment = read_experiment(options.store, options.experiment)
        audit = audit_stopping(experiment.trials, factor=experiment.rung_factor or FACTOR)
        if options.csv:
            tidy(audit).to_csv(options.csv, index=False)
    except (InputError, OSError) as error:
        print(f"analysis.audit: {error}", file=sys.stderr)
        return 2
    print(format_audit(replace(audit, notes=audit.notes + experiment.notes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
