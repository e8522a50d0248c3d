"""Measures which techniques learn fast: a factorial analysis of variance at one rung, by default the first.

No cell is stopped before the first rung, so all levels are compared fairly there. Later rungs hold survivors only;
those are counted but never mixed in. What levels do to the end is measured by `final_effects`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import nan, sqrt

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from analysis.estimates.anova import (
    Levels,
    estimable_terms,
    estimate,
    fit_terms,
    in_order,
    mean_square,
    number_of_cells,
    variance_table,
)
from analysis.summaries import at_best_scales, explain_order, explain_scales, sample_of_order
from grid.config import InputError, factors_among
from grid.metrics import RUNG_METRIC, recorded_rungs
from grid.wording import count


@dataclass(frozen=True)
class RungEffects:
    """How levels change the validation accuracy at one epoch; accuracies and effects are fractions."""

    epoch: int
    """Whose accuracies are analysed."""
    factors: tuple[str, ...]
    """Factors with two or more levels among the trials, in the order of `grid.config.varied`."""
    fixed: dict[str, str]
    """The only level of each other factor."""
    seeds: int
    observations: int
    """Combinations of cell and seed with an accuracy."""
    missing: int
    """Combinations of the trials' levels and seeds without an accuracy."""
    complete: bool
    """Whether none is missing."""
    interactions_left_out: tuple[str, ...]
    """`a x b` that can't be estimated, usually because two of their levels never occur together with an accuracy."""
    grand_mean: float
    """Mean over all combinations of levels, equally weighted."""
    residual_sd: float
    levels: pd.DataFrame
    """`factor`, `level`, `observations`, `mean` (least squares), `effect` (mean - grand mean), and the ends `low` and
    `high` of the effect's interval; NaN where it can't be estimated."""
    interactions: pd.DataFrame
    """`factor`, `level`, `other_factor`, `other_level`, `observations`, `effect` (beyond the sum of the two levels'
    effects), `low`, `high`."""
    variance: pd.DataFrame
    """`term`, `df`, `sum_of_squares` (type II), `share` of the total about the mean, `omega_squared`, `F`, `p`, and
    `p_holm` over factors and interactions; sorted by falling share, the residual last."""
    divergence: pd.DataFrame
    """`factor`, `level`, `trials`, `diverged`, `rate`, `low`, `high`, over all trials."""
    survivors: pd.DataFrame
    """`rung` after the first, `factor`, `level`, `trials` (of the level), `reached` (of these, those with an accuracy
    at the rung) and `mean` (of the reached ones)."""
    notes: tuple[str, ...]
    """Sentences to read before trusting the tables."""


def measure_rung_effects(trials: pd.DataFrame, *, epoch: int | None = None, confidence: float = 0.95) -> RungEffects:
    """Split the variance at a rung among factors, two-way interactions and seeds (blocks), and estimate all effects.

    Of several learning-rate scales, the one at which a cell is ranked counts. A trial that diverged after the rung
    counts with its accuracy at the rung.

    Args:
        trials: From `analysis.store.read_experiment`; all with the same budget.
        epoch: A rung; None for the first. Without rungs, the full budget of the completed trials.
        confidence: Of all intervals, in (0, 1).

    Raises:
        InputError: The budgets differ, `epoch` is not a rung, no trial has an accuracy, no factor has two levels, or
            the observations are too few to separate the factors.
    """
    order = tuple(explain_order(trials))
    trials = sample_of_order(trials)
    rung, _ = _accuracies(trials, epoch)
    chosen = at_best_scales(trials)
    _, accuracies = _accuracies(chosen, rung)
    levels = {factor: in_order(factor, trials[factor]) for factor in factors_among(trials.columns)}
    varied = {factor: names for factor, names in levels.items() if len(names) > 1}
    observed = chosen.assign(accuracy=accuracies).dropna(subset="accuracy").reset_index(drop=True)
    missing = number_of_cells(varied) * trials["seed"].nunique() - len(observed)
    terms = estimable_terms(observed, varied, complete=not missing)
    fitted = fit_terms(observed, terms)
    estimates, estimable = estimate(fitted, terms, confidence), {term.parts for term in terms}
    effects = RungEffects(
        epoch=rung,
        factors=tuple(varied),
        fixed={factor: names[0] for factor, names in levels.items() if factor not in varied},
        seeds=trials["seed"].nunique(),
        observations=len(observed),
        missing=missing,
        complete=not missing,
        interactions_left_out=tuple(" x ".join(pair) for pair in combinations(varied, 2) if pair not in estimable),
        grand_mean=float(fitted.params[0]),
        residual_sd=sqrt(mean_square(fitted)),
        levels=_levels(estimates, observed, varied, float(fitted.params[0])),
        interactions=estimates[estimates["other_factor"] != ""].reset_index(drop=True),
        variance=variance_table(fitted, terms),
        divergence=divergence_rates(trials, varied, confidence),
        survivors=_survivors(trials, varied),
        notes=(),
    )
    return replace(effects, notes=(*order, *_notes(effects, chosen, accuracies), *explain_scales(trials)))


def _accuracies(trials: pd.DataFrame, epoch: int | None) -> tuple[int, "pd.Series[float]"]:
    """Return the epoch to analyse and every trial's accuracy there, NaN where there is none."""
    budgets = sorted(map(int, trials["epochs"].unique()))
    if not budgets:
        raise InputError("there are no trials to analyse; run python -m grid.run first")
    if len(budgets) > 1:
        raise InputError(f"trials of {' and '.join(map(str, budgets))} epochs can't be analysed together")
    rungs = recorded_rungs(trials.columns)
    choices = rungs or budgets
    rung = choices[0] if epoch is None else epoch
    if rung not in choices:
        raise InputError(f"epoch {rung} is not a rung; choose from {', '.join(map(str, choices))}")
    at_end = trials["final_val_accuracy"]
    accuracies = trials[f"{RUNG_METRIC}{rung}"] if rungs else at_end
    if accuracies.isna().all():
        raise InputError(f"no trial has an accuracy at epoch {rung}: all diverged or failed; try --lr-scales 0.1")
    return rung, accuracies


def _levels(estimates: pd.DataFrame, observed: pd.DataFrame, varied: Levels, grand_mean: float) -> pd.DataFrame:
    counts = _per_level(observed["accuracy"], observed, varied)[["factor", "level", "count"]]
    main_effects = estimates.loc[estimates["other_factor"] == "", ["factor", "level", "effect", "low", "high"]]
    table = counts.rename(columns={"count": "observations"}).merge(main_effects, "left", ["factor", "level"])
    table.insert(3, "mean", grand_mean + table["effect"])
    return table


def divergence_rates(trials: pd.DataFrame, varied: Levels, confidence: float) -> pd.DataFrame:
    """Return the rate of divergence of each level with its score interval.

    Reference: Wilson 1927, https://doi.org/10.2307/2276774
    """
    table = _per_level((trials["status"] == "diverged").astype(float), trials, varied).astype({"sum": int})
    table = table.rename(columns={"count": "trials", "sum": "diverged", "mean": "rate"})
    low, high = proportion_confint(table["diverged"], table["trials"], 1 - confidence, "wilson")
    return table[["factor", "level", "trials", "diverged", "rate"]].assign(low=low, high=high)


def _survivors(trials: pd.DataFrame, varied: Levels) -> pd.DataFrame:
    later = recorded_rungs(trials.columns)[1:]
    tables = [_per_level(trials[f"{RUNG_METRIC}{rung}"], trials, varied).assign(rung=rung) for rung in later]
    table = pd.concat(tables or [pd.DataFrame(columns=["factor", "level", "size", "count", "mean", "rung"])])
    table = table.rename(columns={"count": "reached", "size": "trials"})
    return table[["rung", "factor", "level", "trials", "reached", "mean"]].reset_index(drop=True)


def _per_level(values: "pd.Series[float]", rows: pd.DataFrame, varied: Levels) -> pd.DataFrame:
    """Return `factor`, `level`, `size`, `count` (not NaN), `sum` and `mean` (NaN for none) of each level's rows."""
    tables, known = [], values.notna().to_numpy()
    for factor, names in varied.items():
        codes = pd.Index(names).get_indexer(pd.Index(rows[factor]))
        shown, seen = codes >= 0, known & (codes >= 0)
        sizes = np.bincount(codes[shown], minlength=len(names))
        counts = np.bincount(codes[seen], minlength=len(names))
        sums = np.bincount(codes[seen], values[seen], minlength=len(names))
        means = np.divide(sums, counts, out=np.full(len(names), nan), where=counts > 0)
        columns = {"level": names, "size": sizes, "count": counts, "sum": sums, "mean": means}
        tables.append(pd.DataFrame(columns).assign(factor=factor))
    return pd.concat(tables, ignore_index=True)


def _notes(effects: RungEffects, trials: pd.DataFrame, accuracies: "pd.Series[float]") -> Iterator[str]:
    epoch, reached = effects.epoch, accuracies.notna()
    yield (
        f"complete: every cell and seed has an accuracy at epoch {epoch}, so the shares add up to 100%"
        if effects.complete
        else f"incomplete: {effects.missing:,} of {effects.missing + effects.observations:,} combinations of cell and "
        "seed have no accuracy; means are least-squares means, and the shares (type II) need not add up to 100%"
    )
    if epoch > min(recorded_rungs(trials.columns), default=epoch):
        controls = count(int((reached & trials["control"]).sum()), "unstopped control")
        yield (
            f"epoch {epoch} has survivors only: {reached.sum():,} of {count(len(trials), 'trial')}, among them "
            f"{controls}; a level that is stopped often looks better than it is"
        )
    yield from _divergence_note(((trials["status"] == "diverged") & ~reached).sum())
    unseen = effects.levels[effects.levels["observations"] == 0]
    if len(unseen):
        yield f"no accuracy at all, hence no effect: {', '.join(unseen['factor'] + '=' + unseen['level'])}"
    if effects.interactions_left_out:
        yield f"interactions that these trials can't estimate: {', '.join(effects.interactions_left_out)}"
    if np.isnan(effects.residual_sd):
        yield "as many terms as accuracies: no residual is left, so the effects have no intervals"
    elif effects.seeds == 1:
        yield "one seed: the residual mixes noise with interactions of three or more factors"


def _divergence_note(diverged: int) -> Iterator[str]:
    if diverged:
        yield (
            f"{count(int(diverged), 'diverged trial')} left out of the means, not counted as zero: a level that "
            "diverges often looks better than it is"
        )
