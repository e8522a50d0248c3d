"""Which techniques matter, and how much: `python -m analysis.effects --experiment smoke-glyphs`.

A factorial analysis of variance at one rung, by default the first: no cell has been stopped before it, so it is the one
table that is fair to every level. Later rungs hold survivors only; they are counted, and never mixed in.
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, nan, prod, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from analysis.anova import Levels, estimable_terms, estimate, fit_terms, in_order, mean_square, variance_table
from analysis.plot import draw_main_effects, effect_rows
from analysis.store import read_experiment
from grid.arguments import Parser
from grid.config import FACTORS, InputError
from grid.metrics import RUNG_METRIC

SHOWN_INTERACTIONS, SHOWN_DIVERGED = 6, 8


@dataclass(frozen=True)
class Effects:
    """What the levels of a grid do to the validation accuracy at one rung; accuracies and effects are fractions."""

    epoch: int
    """Whose accuracies are analysed."""
    factors: tuple[str, ...]
    """With two or more levels among the trials, in the order of `FACTORS`."""
    held: dict[str, str]
    """The level of each other factor."""
    seeds: int
    observations: int
    """Cell x seed with an accuracy."""
    missing: int
    """Combinations of the levels and seeds of the trials that have no accuracy."""
    complete: bool
    interactions_left_out: tuple[str, ...]
    """`a x b` that can't be estimated, mostly for a combination of two levels without an accuracy."""
    grand_mean: float
    """Mean over all combinations, each counting the same."""
    residual_sd: float
    levels: pd.DataFrame
    """`factor`, `level`, `observations`, `mean` (least squares), `effect` (its distance from the grand mean), and the
    ends `low` and `high` of the effect's interval; NaN where it can't be estimated."""
    interactions: pd.DataFrame
    """`factor`, `level`, `other_factor`, `other_level`, `observations`, `effect` (beyond the sum of the two levels'
    effects), `low`, `high`."""
    variance: pd.DataFrame
    """`term`, `df`, `sum_of_squares` (type II), `share` of the total about the mean, `omega_squared`, `F`, `p`, and
    `p_holm` over factors and interactions; by falling share, the residual last."""
    divergence: pd.DataFrame
    """`factor`, `level`, `trials`, `diverged`, `rate`, `low`, `high`, over all trials."""
    survivors: pd.DataFrame
    """`rung` after the first, `factor`, `level`, `trials` that have an accuracy there, `of` all, their `mean`."""
    notes: tuple[str, ...]
    """A sentence on each thing to know before believing the tables."""


def measure_effects(trials: pd.DataFrame, *, epoch: int | None = None, confidence: float = 0.95) -> Effects:
    """Split the variance at a rung among factors, two-way interactions and seeds (blocks), and estimate every effect.

    Of the nuisance levels of a cell and seed the best one counts. A trial that diverged after the rung counts with the
    accuracy that it had there.

    Args:
        trials: From `analysis.store.read_experiment`; of one budget.
        epoch: A rung; the first one if None. Without rungs, the full budget of the completed trials.
        confidence: Of all intervals, in (0, 1).

    Raises:
        InputError: The budgets differ, `epoch` is no rung, no trial has an accuracy, no factor has two levels, or the
            observations are too few to tell the factors apart.
    """
    rung, accuracies = _accuracies(trials, epoch)
    levels = {factor: in_order(factor, trials[factor]) for factor in FACTORS}
    varied = {factor: names for factor, names in levels.items() if len(names) > 1}
    seen = trials.assign(accuracy=accuracies).dropna(subset="accuracy")
    observed = seen.groupby([*FACTORS, "seed"])["accuracy"].max().reset_index()
    missing = prod(map(len, varied.values())) * trials["seed"].nunique() - len(observed)
    terms = estimable_terms(observed, varied, complete=not missing)
    fitted = fit_terms(observed, terms)
    estimates, parts = estimate(fitted, terms, confidence), {term.parts for term in terms}
    effects = Effects(
        epoch=rung,
        factors=tuple(varied),
        held={factor: names[0] for factor, names in levels.items() if factor not in varied},
        seeds=trials["seed"].nunique(),
        observations=len(observed),
        missing=missing,
        complete=not missing,
        interactions_left_out=tuple(" x ".join(pair) for pair in combinations(varied, 2) if pair not in parts),
        grand_mean=float(fitted.params[0]),
        residual_sd=sqrt(mean_square(fitted)),
        levels=_levels(estimates, observed, varied, float(fitted.params[0])),
        interactions=estimates[estimates["other_factor"] != ""].reset_index(drop=True),
        variance=variance_table(fitted, terms),
        divergence=_divergence(trials, varied, confidence),
        survivors=_survivors(trials, varied),
        notes=(),
    )
    return replace(effects, notes=tuple(_notes(effects, trials, accuracies)))


def measure_final_effects(trials: pd.DataFrame, *, confidence: float = 0.95) -> Effects:
    """Estimate the effects after the full budget from the controls, the only trials there that were not picked.

    They are few, so the intervals are wide, and interactions can seldom be told.

    Args:
        trials: As for `measure_effects`.
        confidence: Of all intervals, in (0, 1).

    Raises:
        InputError: There is no control, or too few to tell the factors apart.
    """
    controls = trials[trials["control"]]
    if controls.empty:
        raise InputError("no controls, so nothing is known of all levels at the end; run grid.run with --controls 0.05")
    rungs = [f"{RUNG_METRIC}{rung}" for rung in _rungs(trials)]
    effects = measure_effects(controls.drop(columns=rungs), confidence=confidence)
    lead = (
        f"{effects.observations:,} controls, drawn at random and never stopped: what the levels do after "
        f"{effects.epoch} epochs, without the bias of early stopping"
    )
    lost = _lost((controls["status"] == "diverged").sum())
    return replace(effects, notes=(lead, *lost))


def _accuracies(trials: pd.DataFrame, epoch: int | None) -> tuple[int, "pd.Series[float]"]:
    """Return the epoch to analyse and every trial's accuracy there, NaN where there is none."""
    budgets = sorted(map(int, trials["epochs"].unique()))
    if not budgets:
        raise InputError("there is no trial to analyse; run python -m grid.run first")
    if len(budgets) > 1:
        raise InputError(f"trials of {' and '.join(map(str, budgets))} epochs can't be analysed together")
    rungs = _rungs(trials)
    choices = rungs or budgets
    rung = choices[0] if epoch is None else epoch
    if rung not in choices:
        raise InputError(f"epoch {rung} is no rung; choose from {', '.join(map(str, choices))}")
    at_end = trials["best_val_accuracy"].where(trials["status"] == "completed")
    accuracies = trials[f"{RUNG_METRIC}{rung}"] if rungs else at_end
    if accuracies.isna().all():
        raise InputError(f"no trial has an accuracy at epoch {rung}: all diverged or failed; try --lr-scales 0.1")
    return rung, accuracies


def _rungs(trials: pd.DataFrame) -> list[int]:
    return sorted(int(name.removeprefix(RUNG_METRIC)) for name in trials.columns if name.startswith(RUNG_METRIC))


def _levels(estimates: pd.DataFrame, observed: pd.DataFrame, varied: Levels, grand_mean: float) -> pd.DataFrame:
    counts = _per_level(observed["accuracy"], observed, varied)[["factor", "level", "count"]]
    found = estimates.loc[estimates["other_factor"] == "", ["factor", "level", "effect", "low", "high"]]
    table = counts.rename(columns={"count": "observations"}).merge(found, "left", ["factor", "level"])
    table.insert(3, "mean", grand_mean + table["effect"])
    return table


def _divergence(trials: pd.DataFrame, varied: Levels, confidence: float) -> pd.DataFrame:
    """Return rates with Wilson's interval (Wilson 1927, https://doi.org/10.2307/2276774)."""
    table = _per_level((trials["status"] == "diverged").astype(float), trials, varied).astype({"sum": int})
    table = table.rename(columns={"count": "trials", "sum": "diverged", "mean": "rate"})
    low, high = proportion_confint(table["diverged"], table["trials"], 1 - confidence, "wilson")
    return table[["factor", "level", "trials", "diverged", "rate"]].assign(low=low, high=high)


def _survivors(trials: pd.DataFrame, varied: Levels) -> pd.DataFrame:
    tables = [_per_level(trials[f"{RUNG_METRIC}{rung}"], trials, varied).assign(rung=rung) for rung in _rungs(trials)]
    table = pd.concat(tables[1:] or [pd.DataFrame(columns=["factor", "level", "size", "count", "mean", "rung"])])
    table = table.rename(columns={"count": "trials", "size": "of"})
    return table[["rung", "factor", "level", "trials", "of", "mean"]].reset_index(drop=True)


def _per_level(values: "pd.Series[float]", rows: pd.DataFrame, varied: Levels) -> pd.DataFrame:
    """Return `factor`, `level`, `size`, `count` (not NaN), `sum` and `mean` of the rows of each level, if any."""
    tables, known = [], values.notna().to_numpy()
    for factor, names in varied.items():
        codes = pd.Categorical(rows[factor], categories=list(names)).codes
        sizes, counts = (np.bincount(some, minlength=len(names)) for some in (codes, codes[known]))
        sums = np.bincount(codes[known], values[known], minlength=len(names))
        means = np.divide(sums, counts, out=np.full(len(names), nan), where=counts > 0)
        columns = {"level": names, "size": sizes, "count": counts, "sum": sums, "mean": means}
        tables.append(pd.DataFrame(columns).assign(factor=factor))
    return pd.concat(tables, ignore_index=True)


def _notes(effects: Effects, trials: pd.DataFrame, accuracies: "pd.Series[float]") -> Iterator[str]:
    epoch, reached = effects.epoch, accuracies.notna()
    yield (
        f"complete: every cell and seed has an accuracy at epoch {epoch}, so the shares add up to 100 %"
        if effects.complete
        else f"incomplete: {effects.missing:,} of {effects.missing + effects.observations:,} cells x seeds have no "
        "accuracy; means are least-squares means, and the shares (type II) need not add up to 100 %"
    )
    if epoch > min(_rungs(trials), default=epoch):
        controls = (reached & trials["control"]).sum()
        yield (
            f"epoch {epoch} has survivors only: {reached.sum():,} of {len(trials):,} trials, {controls:,} of them "
            f"{'a control' if controls == 1 else 'controls'}; a level that is stopped often looks better than it is"
        )
    yield from _lost(((trials["status"] == "diverged") & ~reached).sum())
    unseen = effects.levels[effects.levels["observations"] == 0]
    if len(unseen):
        yield f"no accuracy at all, so no effect: {', '.join(unseen['factor'] + '=' + unseen['level'])}"
    if effects.interactions_left_out:
        yield f"interactions that these trials can't tell: {', '.join(effects.interactions_left_out)}"
    if np.isnan(effects.residual_sd):
        yield "as many terms as accuracies: nothing is left to judge the effects by, so they have no intervals"
    elif effects.seeds == 1:
        yield "one seed: the residual is noise and interactions of three or more factors, which can't be told apart"
    if (scales := trials["lr_scale"].nunique()) > 1:
        yield f"of the {scales} values of lr_scale the best one of each cell and seed counts"


def _lost(diverged: int) -> Iterator[str]:
    if diverged:
        yield (
            f"{diverged:,} diverged {'trial is' if diverged == 1 else 'trials are'} missing from the means, not zeros "
            "in them: a level that diverges often looks better than it is"
        )


def format_effects(effects: Effects) -> str:
    """Return what matters most as text of at most 80 columns; accuracies in percent, effects in points."""
    title = [f"validation accuracy at epoch {effects.epoch}, {effects.observations:,} cells x seeds"]
    title.append(f"mean {effects.grand_mean:.2%}, residual standard deviation {100 * effects.residual_sd:.2f} points")
    title += [f"held: {', '.join(f'{factor}={level}' for factor, level in effects.held.items())}"] * bool(effects.held)
    parts = [title, _variance_lines(effects), _level_lines(effects), _divergence_lines(effects), effects.notes]
    lines = [line for part in parts for line in [*part, ""]]
    return "\n".join(_wrap(line) for line in lines[:-1])


def _variance_lines(effects: Effects) -> list[str]:
    lines = [f"{'share of variance':<34} {'df':>4} {'share':>7} {'omega^2':>7} {'F':>10} {'p (Holm)':>9}"]
    crossed = effects.variance["term"].str.contains(" x ")
    shown = effects.variance[~crossed | (crossed.cumsum() <= SHOWN_INTERACTIONS)]
    for row in shown.fillna({"p_holm": inf}).to_dict("records"):
        p = f"{row['p_holm']:.4f}".replace("0.0000", "<0.0001").replace("inf", "")
        tests = "" if row["term"] == "residual" else f"{row['omega_squared']:>7.2%} {row['F']:>10.2f} {p:>9}"
        lines.append(f"{row['term']:<34} {row['df']:>4} {row['share']:>7.2%} {tests}".rstrip())
    if count := len(effects.variance) - len(shown):
        rest = f"{count} more interaction{'s' * (count > 1)}"
        lines.append(f"{rest:<39} {effects.variance['share'].sum() - shown['share'].sum():>7.2%}")
    return lines


def _level_lines(effects: Effects) -> list[str]:
    lines = [f"{'effect of a level, in points':<34} {'seen':>5} {'mean':>7} {'effect':>7}   {'interval':>16}"]
    order = [term for term in effects.variance["term"] if term in effects.factors]
    rows = effects.levels.sort_values("effect", ascending=False, kind="stable")
    for factor in dict.fromkeys([*order, *effects.factors]):
        for row in rows[rows["factor"] == factor].to_dict("records"):
            ends = f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}"
            figures = f"{row['observations']:>5} {row['mean']:>7.2%} {100 * row['effect']:>+7.2f}   {ends:>16}"
            lines.append(f"{factor + '=' + row['level']:<34} {figures}")
    return lines


def _divergence_lines(effects: Effects) -> list[str]:
    lines = [f"{'diverged, of all trials':<34} {'count':>13} {'rate':>7}   {'interval':>16}"]
    some = effects.divergence[effects.divergence["diverged"] > 0].sort_values("rate", ascending=False, kind="stable")
    for row in some.head(SHOWN_DIVERGED).to_dict("records"):
        name, count = f"{row['factor']}={row['level']}", f"{row['diverged']} of {row['trials']}"
        lines.append(f"{name:<34} {count:>13} {row['rate']:>7.1%}   {row['low']:>6.1%} to {row['high']:>6.1%}")
    more = len(some) - SHOWN_DIVERGED
    return lines + ([f"{more} more levels less often"] if more > 0 else [] if len(some) else ["none"])


def _wrap(line: str) -> str:
    return textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) if len(line) > 80 else line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the effects and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(prog="python -m analysis.effects", description="Show which factors matter, and how much.")
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment")
    parser.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")
    parser.add_argument("--epoch", type=int, metavar="N", help="rung to analyse (the first)")
    parser.add_argument("--controls", action="store_true", help="controls alone, after the full budget")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the effects of levels")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the effects of levels, then of pairs of levels")
    options = parser.parse_args(arguments)
    try:
        experiment = read_experiment(options.store, options.experiment)
        if options.controls:
            effects = measure_final_effects(experiment.trials)
        else:
            effects = measure_effects(experiment.trials, epoch=options.epoch)
        if options.svg:
            options.svg.write_text(draw_main_effects(effect_rows(effects.levels)), encoding="utf-8")
        if options.csv:
            pd.concat([effects.levels, effects.interactions]).to_csv(options.csv, index=False)
    except (InputError, OSError) as error:
        print(f"analysis.effects: {error}", file=sys.stderr)
        return 2
    print("\n".join([format_effects(effects), *map(_wrap, experiment.notes)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
