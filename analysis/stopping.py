"""Measures what early stopping saved and what it may have cost, from the unstopped controls.

Unstopped controls (trials drawn at random and exempt from early stopping; `controls` below) show how stopped trials
would have ended. ASHA's verdict on them is recorded; for stores of older versions, which lack it, the rule is replayed.
A diverged control is neither 0 nor dropped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import chi2, hypergeom, norm
from statsmodels.stats.proportion import proportion_confint

from analysis.multiplicity import holm
from analysis.store import Experiment
from grid.config import FACTORS, STEP_PARTS, InputError
from grid.metrics import RUNG_METRIC, rung_epochs
from grid.wording import count

FACTOR = 3
"""One trial in this many continues at a rung, unless the grid's manifest says otherwise."""
WITHIN = ("model",)
"""Factors whose levels trials share with those that they are compared with, unless the manifest says otherwise."""
ALL = "all"
"""Stands for the model in a table if trials are compared across models."""
TOP = 10
"""Best completed trials of a model that a cheaper rule should not lose."""
MIN_FOR_INTERVAL = 4
"""Controls below which a rank correlation has no interval."""
MIN_FOR_LOSS = 20
"""Completed controls that the rule would have stopped below which the loss of accuracy has no bound."""
HELD_BACK = 1 / 3
"""A level is held back if its trials continue at less than this share of the rate of the factor's other levels."""

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
            *_rule_notes(classified, rungs, factor, within, agreement, decided),
            *_notes(classified, rungs, factor, within, confidence),
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


def has_verdicts(trials: pd.DataFrame) -> bool:
    """Return whether the store has ASHA's verdicts on controls.

    It has if any control has one, or has the chance with which it was drawn, which is recorded since verdicts are. A
    control without a verdict then passed every rung. Stores of older versions, and tables without these columns, have
    neither.
    """
    controls = trials[trials["control"]]
    return bool(any(controls[name].notna().any() for name in ("control_chance", "stop_epoch") if name in controls))


def stop_epochs(
    trials: pd.DataFrame, rungs: Sequence[int], *, factor: int = FACTOR, within: Sequence[str] = WITHIN
) -> "pd.Series[float]":
    """Return the rung at which ASHA stopped each trial or, if it is a control, would have; NaN if at none.

    What ASHA decided is recorded. Only if the store lacks its verdicts on controls (`has_verdicts`), the rule is
    replayed on them, with all arrivals at once, whereas ASHA compares each trial with earlier arrivals.

    Args:
        trials: From `analysis.store.read_experiment`; all with the same budget.
        rungs: Epochs below the budget at which trials were stopped.
        factor: As for `audit_stopping`.
        within: As for `audit_stopping`.
    """
    decided = trials["epochs_run"].where(trials["status"] == "stopped").astype(float)
    if has_verdicts(trials):
        verdicts = trials["stop_epoch"].astype(float)
    else:
        verdicts = replay(trials, rung_thresholds(trials, rungs, factor, within), within)
    return decided.where(~trials["control"], verdicts)


def rung_thresholds(
    trials: pd.DataFrame, rungs: Sequence[int], factor: int, within: Sequence[str] = WITHIN
) -> dict[tuple[str, int], float]:
    """Return the lowest accuracy that continues, by group and rung: the ceil(n / factor)-th best of n arrivals.

    As in the ASHA that wrote the stores without verdicts, the arrivals are all trials with a value at the rung,
    including controls that the rule would have stopped before, and each trial that diverged on the way there, as worse
    than any other.

    Reference: Li et al. 2020, https://arxiv.org/abs/1810.05934 (here with all arrivals at once)
    """
    thresholds = {}
    for name, group in trials.groupby(_groups(trials, within)):
        on_the_way = group["status"] == "diverged"
        for rung in rungs:
            values = group[f"{RUNG_METRIC}{rung}"]
            arrived = np.sort(values.where(values.notna() | ~on_the_way, -math.inf).dropna())
            on_the_way &= values.notna()
            best = math.ceil(len(arrived) / factor)
            thresholds[str(name), rung] = float(arrived[-best]) if best else -math.inf
    return thresholds


def replay(
    trials: pd.DataFrame, thresholds: Mapping[tuple[str, int], float], within: Sequence[str] = WITHIN
) -> "pd.Series[float]":
    """Return the first rung at which each trial is below the threshold; NaN if it is at no rung that it reached."""
    stops, groups = pd.Series(math.nan, index=trials.index), _groups(trials, within)
    for (group, rung), threshold in thresholds.items():
        below = (groups == group) & (trials[f"{RUNG_METRIC}{rung}"] < threshold)
        stops = stops.mask(stops.isna() & below, rung)
    return stops


def _groups(trials: pd.DataFrame, within: Sequence[str]) -> "pd.Series[str]":
    """Return the name of the group in which each trial is compared."""
    groups = pd.Series("", index=trials.index)
    for factor in within:
        groups = (groups + " " + trials[factor].astype(str)).str.strip()
    return groups


def beat_by_chance(tried: int, survivors: int) -> float:
    """Return how many would-be-stopped controls are expected to beat all survivors if stopping were a coin flip.

    Then every order of the ends is equally likely, and each of the tried controls is the best of itself and the
    survivors with chance 1 / (survivors + 1). About so many controls above the winner say that the rule is no better
    than chance; none above it says little if this number is small as well.
    """
    return tried / (survivors + 1)


def best_at_most(ends: NDArray[np.float64], unseen: int, confidence: float) -> float:
    """Return an upper confidence limit of the expected best of the trials that were stopped.

    The best quarter of the sample is taken as the upper quarter of a normal distribution. Accuracies have an end and
    are usually skewed downwards, so their upper quarter is shorter than that, and the limit is conservative. The mean
    excess over the quarter's lower end is taken as that of exponential draws, which vary more than normal ones. A small
    group of far better trials is covered only if the sample has some of them.

    Args:
        ends: Accuracies at the full budget of a random sample of the trials that the rule stops, `[control]`.
        unseen: Number of those that it did stop, from 1.
        confidence: One-sided.

    Returns:
        An accuracy of at most 1; NaN for fewer than `MIN_FOR_LOSS` ends.

    References:
        expected best of a normal sample: Blom 1958, Statistical Estimates and Transformed Beta-Variables
        interval of an exponential mean: Epstein and Sobel 1953, https://doi.org/10.1080/01621459.1953.10483488
    """
    if len(ends) < MIN_FOR_LOSS:
        return math.nan
    top = len(ends) // 4
    start, *best = np.sort(ends)[-top - 1 :]
    mean_excess = 2 * float(np.sum(best - start)) / float(chi2.ppf(1 - confidence, 2 * top))
    quartile = norm.ppf(0.75)  # in standard deviations above the mean, as the next two
    mean_of_quarter = norm.pdf(quartile) / 0.25
    expected_best = norm.ppf((unseen - 0.375) / (unseen + 0.25))
    reach = max(0.0, expected_best - quartile) / (mean_of_quarter - quartile)
    return float(min(1.0, start + mean_excess * reach))


def held_back(
    trials: pd.DataFrame, stops: "pd.Series[float]", rungs: Sequence[int], confidence: float = 0.95
) -> pd.DataFrame:
    """Return the levels that a rung all but removes, so that the ranking says little about them.

    These are the levels of which fewer continued than of the factor's other levels, significantly (Fisher's exact test,
    one-sided, with Holm's correction over all levels and rungs) and relevantly (`HELD_BACK`). As the rule fixes how
    many continue in all, the exact test fits: under the null hypothesis the numbers are hypergeometric. Seeds and
    scales of one cell count as independent trials; the second condition guards against what that exaggerates.

    Args:
        trials: Those of one budget.
        stops: From `stop_epochs`.
        rungs: Epochs at which trials were stopped.
        confidence: 1 - the chance of naming any level if all continue alike.

    Returns:
        `factor`, `level`, `rung`, `rate` and `others` (shares of the level's trials and of the other levels' trials
        that reached the rung and continued), `p` (corrected). Of a level that several rungs hold back, the first rung.

    References:
        Fisher 1935, The Logic of Inductive Inference, https://doi.org/10.2307/2342435
        Holm 1979, https://www.jstor.org/stable/4615733
    """
    rows = [row for rung in rungs for row in _rates_at(trials, stops, rung)]
    table = pd.DataFrame(rows, columns=["factor", "level", "rung", "rate", "others", "p"])
    if table.empty:
        return table
    table["p"] = holm(table["p"])
    found = table[(table["p"] < 1 - confidence) & (table["rate"] < HELD_BACK * table["others"])]
    return found.drop_duplicates(["factor", "level"]).reset_index(drop=True)


def _rates_at(
    trials: pd.DataFrame, stops: "pd.Series[float]", rung: int
) -> Iterator[tuple[str, str, int, float, float, float]]:
    """Yield for each level with what share it and the other levels continued at a rung, and the uncorrected p."""
    arrived = trials[f"{RUNG_METRIC}{rung}"].notna() & ~(stops < rung)
    continued = (stops[arrived] != rung).astype(int)
    for factor in FACTORS:
        table = continued.groupby(trials.loc[arrived, factor].astype(str)).agg(["sum", "count"])
        went, came = table["sum"].sum(), table["count"].sum()
        for level, passed, number in table.itertuples() if len(table) > 1 else ():
            others, rest = went - passed, came - number
            p = float(hypergeom.cdf(passed, came, went, number))
            yield factor, str(level), rung, passed / number, others / rest, p


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


def _rule_notes(
    classified: pd.DataFrame,
    rungs: Sequence[int],
    factor: int,
    within: Sequence[str],
    agreement: float,
    decided: int,
) -> Iterator[str]:
    """Yield what the rule was, and how its verdicts on controls are known."""
    if not rungs:
        budget = count(int(classified["epochs"].iloc[0]), "epoch")
        yield f"no rung below the budget of {budget}: no trial was stopped, so nothing can be lost"
        return
    if factor == 1:
        yield "the grid was trained without early stopping: no trial was stopped, so nothing can be lost"
        return
    rule = f"at each rung the best 1 in {factor} of {_whose(within)} trials that reached it continue"
    if has_verdicts(classified):
        yield f"{rule}; ASHA's verdict on controls is recorded, and those it would have stopped count at no later rung"
        return
    agreed = f"; the two agree on {agreement:.0%} of {count(decided, 'trial')}" if decided else ""
    yield (
        f"the rule is replayed: {rule}; controls and diverged trials count, as in ASHA; ASHA itself compared each "
        f"trial with earlier arrivals only{agreed}"
    )


def _whose(within: Sequence[str]) -> str:
    """Return the genitive of the group in which trials are compared."""
    if not within:
        return "all"
    return "a model's" if tuple(within) == WITHIN else f"a {' x '.join(within)} group's"


def _notes(
    classified: pd.DataFrame, rungs: Sequence[int], factor: int, within: Sequence[str], confidence: float
) -> Iterator[str]:
    """Yield what the tables mean, what is missing from them, and which levels the rungs treat badly."""
    if not rungs or factor == 1:
        return
    yield from _control_notes(classified[classified["control"]])
    for name, trials in classified.groupby("row"):
        if not trials["survived"].any():
            yield f"{name}: no completed trial that the rule would not have stopped, so there is no winner yet"
        if classified["ended_control"].any() and not trials["ended_control"].any():
            yield f"{name}: no control has completed or diverged, so the cost of stopping is unknown"
    for column, noun in (("seed", "seed"), ("lr_scale", "learning-rate scale")):
        if (values := classified[column].nunique()) > 1:
            yield f"{count(values, noun)}: every trial counts, because each was stopped or not individually"
    yield from _level_notes(classified, rungs, within, confidence)


def _level_notes(
    classified: pd.DataFrame, rungs: Sequence[int], within: Sequence[str], confidence: float
) -> Iterator[str]:
    for row in held_back(classified, classified["verdict"], rungs, confidence).to_dict("records"):
        level = f"{row['factor']}={row['level']}"
        remedies = [f"--stop-within {','.join([*within, row['factor']])}"]
        remedies += [f"--grace {later}" for later in rungs[rungs.index(row["rung"]) + 1 :][:1]]
        yield (
            f"after epoch {row['rung']} only {row['rate']:.0%} of {level} continued, but {row['others']:.0%} of the "
            "others: the ranking says little about it; what it is worth at the end is what analysis.effects estimates; "
            f"if it only starts slowly, {' or '.join(remedies)} gives it a chance"
        )
    alike = [rung for rung in rungs if rung * STEP_PARTS <= classified["epochs"].iloc[0]]
    if alike and {"constant", "step"} <= set(classified["lr_schedule"]):
        yield (
            f"lr_schedule=constant and step are the same procedure for the first 1/{STEP_PARTS} of the budget: what "
            f"differs between them after epoch {', '.join(map(str, alike))} is chance"
        )


def _control_notes(controls: pd.DataFrame) -> Iterator[str]:
    if controls.empty:
        yield "no unstopped controls: the cost of stopping is unknown; run grid.run with --controls 0.05 next time"
        return
    ended = controls[controls["ended_control"]]
    yield (
        "unstopped controls were drawn at random, so they show how stopped trials would have ended; a false stop is a "
        "control that the rule would have stopped and that ended above the median of the survivors with which it is "
        "compared (completed trials that were not stopped)"
    )
    if without_end := len(controls) - len(ended):
        yield f"left out: {without_end} of {count(len(controls), 'control')}, which failed or were stopped after all"
    if diverged := int((ended["status"] == "diverged").sum()):
        before = int(((ended["status"] == "diverged") & ended["verdict"].notna()).sum())
        yield (
            f"{diverged} of {count(len(ended), 'control')} diverged: they rank lowest and are never false stops; the "
            f"rule would have stopped {before} of them before"
        )
    if ended["row"].value_counts().lt(MIN_FOR_INTERVAL).any():
        yield f"a rank correlation of fewer than {MIN_FOR_INTERVAL} controls has no interval"
