"""Measures which techniques matter at the end of training, from all trials of a grid that was stopped early.

The ends of the trials that ASHA stopped are estimated without bias (see `two_phase`), so every level is compared
at the full budget, whether or not its trials survived. Two levels of a factor are compared by Tukey's range, so that
the largest of many differences is not taken for more than it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from analysis.estimates.anova import (
    INTERCEPT,
    Array,
    Levels,
    Term,
    coding_matrix,
    effect_weights,
    estimable_terms,
    in_order,
    list_labels,
    number_of_cells,
)
from analysis.estimates.earned import Earned, measure_earned
from analysis.estimates.rung_effects import divergence_rates
from analysis.estimates.two_phase import Ends, Sample, estimate_ends
from analysis.multiplicity import holm, level_quantile
from analysis.stopping.verdicts import FACTOR, WITHIN, has_verdicts, stop_epochs
from analysis.store import Experiment
from analysis.summaries import at_best_scales, explain_order, explain_scales, sample_of_order
from grid.config import InputError, factors_among
from grid.metrics import RUNG_METRIC, recorded_rungs
from grid.wording import count

FEWEST_PROBED = 3
"""Controls that the rule stops and whose end is seen, below which nothing is said about the end."""
LARGEST_SHARE = 0.5
"""Coefficients of the two-way model per trial, above which pairs of levels are left out of it."""
NOTEWORTHY = 0.002
"""Smallest change of an effect, as a fraction, that the note on diverged trials names."""

REPLAYED = "what ASHA would have decided about the unstopped controls is not recorded; its rule was replayed on them"


@dataclass(frozen=True)
class FinalEffects:
    """What levels do to the validation accuracy at the end of the full budget; accuracies and effects are fractions."""

    epochs: int
    """Full budget."""
    factors: tuple[str, ...]
    """Factors with two or more levels among the trials, in the order of `grid.config.varied`."""
    fixed: dict[str, str]
    """The only level of each other factor."""
    trials: int
    """Trials that the estimates rest on: all but diverged, failed and unfinished ones."""
    seen: int
    """Of these, trials whose end is seen."""
    probed: int
    """Of these, unstopped controls that ASHA would have stopped."""
    stopped: int
    """Trials that ASHA stopped, whose ends are estimated."""
    diverged: int
    grand_mean: float
    """Mean over all combinations of levels, equally weighted."""
    levels: pd.DataFrame
    """`factor`, `level`, `trials`, `mean`, `effect` (mean - grand mean), `low`, `high`: a level's own interval."""
    differences: pd.DataFrame
    """For each two levels of a factor: `factor`, `level`, `other_level` (the lower one), `difference`, `low`, `high`
    (Tukey's, for all differences of the factor at once), `sure` (whether it is above 0)."""
    interactions: pd.DataFrame
    """`factor`, `level`, `other_factor`, `other_level`, `effect` (beyond the sum of the two levels' effects), `low`,
    `high`, `stands_out` (whether it differs from 0 after Holm's correction over all pairs)."""
    divergence: pd.DataFrame
    """`factor`, `level`, `trials`, `diverged`, `rate`, `low`, `high`, over all trials."""
    notes: tuple[str, ...]
    """Sentences to read before trusting the tables."""
    earned: Earned | None = None
    """What the best levels earn, each and together; None where fewer than two are surely better than the plain ones, or
    a pair of their factors can't be estimated."""
    confidence: float = 0.95


def measure_final_effects(
    trials: pd.DataFrame, *, classes: int | None = None, confidence: float = 0.95
) -> FinalEffects:
    """Estimate the effects of all levels, their differences and the interactions of pairs at the end of training.

    Of several learning-rate scales, the one at which a cell is ranked counts. Diverged trials have no accuracy and are
    left out; a note says which effects would move if they counted as guesses.

    Args:
        trials: From `analysis.store.read_experiment`, one budget, their `stop_epoch` filled in.
        classes: Of the data set; None if unknown. A guess is right in one of so many cases.
        confidence: Of all intervals, in (0, 1).

    Raises:
        InputError: The budgets differ, no factor has two levels, the trials are too few, or too few ends of trials
            that ASHA would have stopped are seen.
    """
    order = tuple(explain_order(trials))
    trials = sample_of_order(trials)
    epochs, chosen = _budget(trials), at_best_scales(trials)
    levels = {factor: in_order(factor, trials[factor]) for factor in factors_among(trials.columns)}
    varied = {factor: names for factor, names in levels.items() if len(names) > 1}
    rows = usable_trials(chosen)
    sample, terms = make_sample(rows), _terms(rows, varied)
    _check_probed(sample)
    ends, weights = estimate_ends(sample, terms), effect_weights(terms)
    mean, effects = float(weights[INTERCEPT][0] @ ends.values), _effects(terms, weights, ends, confidence)
    differences = _differences(terms, weights, ends, confidence)
    return FinalEffects(
        epochs=epochs,
        factors=tuple(varied),
        fixed={factor: names[0] for factor, names in levels.items() if factor not in varied},
        trials=len(rows),
        seen=int(sample.seen.sum()),
        probed=int(sample.probed.sum()),
        stopped=int((sample.stopped & ~sample.seen).sum()),
        diverged=int((chosen["status"] == "diverged").sum()),
        grand_mean=mean,
        levels=_levels(effects, mean),
        differences=differences,
        interactions=_interactions(effects, confidence),
        divergence=divergence_rates(trials, varied, confidence),
        notes=(*order, *explain_scales(trials), *_notes(chosen, rows, terms, varied, classes)),
        earned=measure_earned(terms, weights, ends, differences, confidence),
        confidence=confidence,
    )


def measure_experiment(experiment: Experiment) -> FinalEffects:
    """Measure the effects at the end in an experiment.

    Stores of older versions lack ASHA's verdicts on controls; there the rule is replayed on them, and a note says so.

    Raises:
        InputError: As `measure_final_effects`.
    """
    trials = experiment.trials
    if has_verdicts(trials) or not _rungs(trials):
        return measure_final_effects(trials, classes=experiment.classes)
    effects = measure_final_effects(with_verdicts(experiment), classes=experiment.classes)
    return replace(effects, notes=(*effects.notes, *([REPLAYED] if trials["control"].any() else [])))


def with_verdicts(experiment: Experiment) -> pd.DataFrame:
    """Return the trials of an experiment with what ASHA decided about controls, or would by the rule it names."""
    trials, factor, within = experiment.trials, experiment.rung_factor, experiment.compared_within
    if has_verdicts(trials) or not _rungs(trials):
        return trials
    replayed = stop_epochs(
        trials,
        _rungs(trials),
        factor=FACTOR if factor is None else factor,
        within=WITHIN if within is None else within,
    )
    return trials.assign(stop_epoch=replayed)


def measure_spread(trials: pd.DataFrame) -> tuple[float, float]:
    """Return how much ends vary, as standard deviations: around what levels explain, and around their forecast.

    The forecast is that of the rungs for a trial that ASHA stops. Controls show how far it is off; their residuals are
    inflated as they are in the intervals. Without such controls the first number stands for both.

    Args:
        trials: As for `measure_final_effects`.

    Raises:
        InputError: As `measure_final_effects`.
    """
    trials, factors = sample_of_order(trials), factors_among(trials.columns)
    varied = {factor: names for factor in factors if len(names := in_order(factor, trials[factor])) > 1}
    rows = usable_trials(at_best_scales(trials))
    sample, terms = make_sample(rows), _terms(rows, varied)
    _check_probed(sample)
    ends = estimate_ends(sample, terms)
    around_levels = float(np.sqrt(ends.noise.mean()))
    chances = 1 / ends.represented[sample.probed]
    drawn = chances < 1
    if not drawn.any():
        return around_levels, around_levels
    squares = (ends.sampling[sample.probed] * chances**2)[drawn] / (1 - chances[drawn])
    return around_levels, float(np.sqrt(squares.mean()))


def usable_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that ended with an accuracy: completed, or stopped at a rung that has one.

    Raises:
        InputError: There is none.
    """
    completed = (trials["status"] == "completed") & trials["final_val_accuracy"].notna()
    stopped = (trials["status"] == "stopped") & trials["stop_epoch"].isin(_rungs(trials))
    if not (completed | stopped).any():
        raise InputError("no trial has an accuracy: all diverged or failed; try --lr-scales 0.1")
    return trials[completed | stopped]


def _rungs(trials: pd.DataFrame) -> list[int]:
    """Return the rungs before the end."""
    return [rung for rung in recorded_rungs(trials.columns) if rung < trials["epochs"].iloc[0]]


def make_sample(rows: pd.DataFrame) -> Sample:
    """Return what was seen of the trials; see `usable_trials`."""
    rungs = _rungs(rows)
    stop = rows["stop_epoch"].map({rung: index for index, rung in enumerate(rungs)}).fillna(len(rungs))
    return Sample(
        rungs=rows[[f"{RUNG_METRIC}{rung}" for rung in rungs]].to_numpy(dtype=float),
        final=rows["final_val_accuracy"].to_numpy(dtype=float),
        stop=np.asarray(stop, dtype=np.int_),
        chance=rows["control_chance"].to_numpy(dtype=float),
    )


def _budget(trials: pd.DataFrame) -> int:
    budgets = sorted(map(int, trials["epochs"].unique()))
    if len(budgets) != 1:
        mixed = " and ".join(map(str, budgets)) or "no"
        raise InputError(f"trials of {mixed} epochs can't be analysed together; analyse one budget at a time")
    return budgets[0]


def _terms(rows: pd.DataFrame, varied: Levels) -> list[Term]:
    """Return the terms of the two-way model; without pairs of levels where they would take up most of the trials."""
    observed = rows.assign(accuracy=0.0)
    complete = len(rows) == number_of_cells(varied) * rows["seed"].nunique()
    terms = estimable_terms(observed, varied, complete=complete)
    coefficients = 1 + sum(term.df for term in terms)
    return terms if coefficients <= LARGEST_SHARE * len(rows) else [term for term in terms if len(term.parts) == 1]


def _check_probed(sample: Sample) -> None:
    probed, stopped = int(sample.probed.sum()), int(sample.stopped.sum())
    if stopped and probed < min(FEWEST_PROBED, stopped):
        seen = f"seen of {count(probed, 'unstopped control')} that ASHA would have stopped, {FEWEST_PROBED} are needed"
        raise InputError(f"effects at the end are unknown: it was {seen}; run grid.run with --more-controls 60")


def _effects(terms: Sequence[Term], weights: dict[str, Array], ends: Ends, confidence: float) -> pd.DataFrame:
    """Return every level's effect, with `other_factor` and `other_level` empty, and every pair's, with intervals."""
    shown = [term for term in terms if term.name != "seed"]
    effects, errors, degrees = ends.weighted_sums(np.vstack([weights[term.name] for term in shown]))
    half = stats.t.ppf((1 + confidence) / 2, degrees) * errors
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(effects) / errors, degrees)
    labels = list_labels(shown).rename(columns={"observations": "trials"})
    return labels.assign(effect=effects, low=effects - half, high=effects + half, p=p)


def _levels(effects: pd.DataFrame, mean: float) -> pd.DataFrame:
    table = effects[effects["other_factor"] == ""]
    return table.assign(mean=mean + table["effect"])[["factor", "level", "trials", "mean", "effect", "low", "high"]]


def _interactions(effects: pd.DataFrame, confidence: float) -> pd.DataFrame:
    table = effects[effects["other_factor"] != ""].reset_index(drop=True)
    table["stands_out"] = holm(table["p"]) < 1 - confidence
    return table.drop(columns=["trials", "p"])


def _differences(terms: Sequence[Term], weights: dict[str, Array], ends: Ends, confidence: float) -> pd.DataFrame:
    """Return the difference of each two levels, the higher one first; the largest of each factor come first."""
    tables = []
    for term in _main_effects(terms):
        own, pairs = weights[term.name], np.array(list(combinations(range(len(term.labels)), 2)))
        sums, errors, degrees = ends.weighted_sums(own[pairs[:, 0]] - own[pairs[:, 1]])
        known = bool(np.isfinite(degrees).all())
        half = errors * (level_quantile(len(term.labels), degrees, confidence) if known else np.nan)
        names = np.array([level for _, level in term.labels])
        higher = np.where(sums >= 0, pairs[:, 0], pairs[:, 1])
        table = pd.DataFrame({"factor": term.name, "level": names[higher], "other_level": names[pairs.sum(1) - higher]})
        table = table.assign(difference=np.abs(sums), low=np.abs(sums) - half, high=np.abs(sums) + half)
        tables.append(table.sort_values("difference", ascending=False, kind="stable"))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(sure=table["low"] > 0)


def _main_effects(terms: Sequence[Term]) -> list[Term]:
    return [term for term in terms if len(term.parts) == 1 and term.name != "seed"]


def _notes(
    trials: pd.DataFrame, rows: pd.DataFrame, terms: Sequence[Term], varied: Levels, classes: int | None
) -> Iterator[str]:
    named = {term.name for term in terms}
    left_out = [
        f"{first} x {second}" for first, second in combinations(varied, 2) if f"{first} x {second}" not in named
    ]
    if left_out:
        yield f"pairs of factors that these trials can't estimate: {', '.join(left_out)}"
    if len(rows) <= len(coding_matrix(terms)[0]):
        yield "as many terms as trials: no residual is left, so the effects have no intervals"
    unseen = [
        f"{factor}={level}" for factor, names in varied.items() for level in names if (rows[factor] != level).all()
    ]
    if unseen:
        yield f"no accuracy at all, hence no effect: {', '.join(unseen)}"
    diverged = int((trials["status"] == "diverged").sum())
    if diverged:
        consequence = _if_guessing(trials, rows, terms, classes)
        yield f"{count(diverged, 'diverged trial')} left out, not counted as zero; {consequence}"


def _if_guessing(trials: pd.DataFrame, rows: pd.DataFrame, terms: Sequence[Term], classes: int | None) -> str:
    """Say which main effects would move most if a diverged trial counted as a guess."""
    guess = 1 / classes if classes else 0.0
    diverged = trials[trials["status"] == "diverged"]
    widened = pd.concat([rows, diverged.assign(final_val_accuracy=guess)], ignore_index=True)
    varied = {term.name: tuple(level for _, level in term.labels) for term in _main_effects(terms)}
    kept = widened[widened[list(varied)].isin({name: [*names, ""] for name, names in varied.items()}).all(axis=1)]
    before, after = ((_main_effect_values(part, varied)) for part in (rows, kept))
    moved = (after - before).sort_values(key=abs, ascending=False)
    moved = moved[moved.abs() >= NOTEWORTHY].head(3)
    if moved.empty:
        return "as guesses they would change no main effect noticeably"
    shifts = ", ".join(f"{name} by {100 * shift:+.1f} points" for name, shift in moved.items())
    return f"if they counted as guesses, these effects would move most: {shifts}"


def _main_effect_values(rows: pd.DataFrame, varied: Levels) -> "pd.Series[float]":
    terms = _terms(rows, varied)
    ends, weights = estimate_ends(make_sample(rows), terms), effect_weights(terms)
    effects = {
        f"{factor}={level}": value
        for term in _main_effects(terms)
        for (factor, level), value in zip(term.labels, weights[term.name] @ ends.values, strict=True)
    }
    return pd.Series(effects)
