"""Measures which techniques matter, and how much: `python -m analysis.effects --experiment smoke-glyphs`.

A factorial analysis of variance at one rung, by default the first: no cell is stopped before it, so all levels are
compared fairly there. Later rungs hold survivors only; those are counted but never mixed in. At the full budget only
unstopped controls (trials drawn at random and exempt from early stopping) are analysed.
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
from grid.arguments import Parser, add_experiment, add_store, run_command
from grid.config import FACTORS, InputError
from grid.metrics import RUNG_METRIC, rung_epochs
from grid.wording import count

SHOWN_INTERACTIONS, SHOWN_DIVERGED = 6, 8


@dataclass(frozen=True)
class Effects:
    """How levels change the validation accuracy at one epoch; accuracies and effects are fractions."""

    epoch: int
    """Whose accuracies are analysed."""
    factors: tuple[str, ...]
    """Factors with two or more levels among the trials, in the order of `FACTORS`."""
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


def measure_effects(trials: pd.DataFrame, *, epoch: int | None = None, confidence: float = 0.95) -> Effects:
    """Split the variance at a rung among factors, two-way interactions and seeds (blocks), and estimate all effects.

    For each cell and seed the best learning-rate scale counts. A trial that diverged after the rung counts with its
    accuracy at the rung.

    Args:
        trials: From `analysis.store.read_experiment`; all with the same budget.
        epoch: A rung; None for the first. Without rungs, the full budget of the completed trials.
        confidence: Of all intervals, in (0, 1).

    Raises:
        InputError: The budgets differ, `epoch` is not a rung, no trial has an accuracy, no factor has two levels, or
            the observations are too few to separate the factors.
    """
    rung, accuracies = _accuracies(trials, epoch)
    levels = {factor: in_order(factor, trials[factor]) for factor in FACTORS}
    varied = {factor: names for factor, names in levels.items() if len(names) > 1}
    seen = trials.assign(accuracy=accuracies).dropna(subset="accuracy")
    observed = seen.groupby([*FACTORS, "seed"])["accuracy"].max().reset_index()
    missing = prod(map(len, varied.values())) * trials["seed"].nunique() - len(observed)
    terms = estimable_terms(observed, varied, complete=not missing)
    fitted = fit_terms(observed, terms)
    estimates, estimable = estimate(fitted, terms, confidence), {term.parts for term in terms}
    effects = Effects(
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
        divergence=_divergence(trials, varied, confidence),
        survivors=_survivors(trials, varied),
        notes=(),
    )
    return replace(effects, notes=tuple(_notes(effects, trials, accuracies)))


def measure_final_effects(trials: pd.DataFrame, *, confidence: float = 0.95) -> Effects:
    """Estimate the effects at the full budget from the unstopped controls alone, the unbiased sample there.

    Controls are few, so the intervals are wide and interactions are seldom estimable.

    Args:
        trials: As for `measure_effects`.
        confidence: Of all intervals, in (0, 1).

    Raises:
        InputError: There are no controls, or too few to separate the factors.
    """
    controls = trials[trials["control"]]
    if controls.empty:
        raise InputError("no unstopped controls, so effects at the end are unknown; run grid.run with --controls 0.05")
    needed = 1 + sum(trials[factor].nunique() - 1 for factor in FACTORS)
    if len(controls) < needed:
        raise InputError(
            f"{count(len(controls), 'unstopped control')}, too few to estimate effects at the end, which takes "
            f"{needed} or more; run grid.run with more --controls in another --experiment"
        )
    rungs = [f"{RUNG_METRIC}{rung}" for rung in rung_epochs(trials.columns)]
    effects = measure_effects(controls.drop(columns=rungs), confidence=confidence)
    lead = (
        f"estimated from {count(effects.observations, 'unstopped control')}, drawn at random: the effects of levels "
        f"after {count(effects.epoch, 'epoch')}, without the bias of early stopping"
    )
    return replace(effects, notes=(lead, *_divergence_note((controls["status"] == "diverged").sum())))


def _accuracies(trials: pd.DataFrame, epoch: int | None) -> tuple[int, "pd.Series[float]"]:
    """Return the epoch to analyse and every trial's accuracy there, NaN where there is none."""
    budgets = sorted(map(int, trials["epochs"].unique()))
    if not budgets:
        raise InputError("there are no trials to analyse; run python -m grid.run first")
    if len(budgets) > 1:
        raise InputError(f"trials of {' and '.join(map(str, budgets))} epochs can't be analysed together")
    rungs = rung_epochs(trials.columns)
    choices = rungs or budgets
    rung = choices[0] if epoch is None else epoch
    if rung not in choices:
        raise InputError(f"epoch {rung} is not a rung; choose from {', '.join(map(str, choices))}")
    at_end = trials["best_val_accuracy"].where(trials["status"] == "completed")
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


def _divergence(trials: pd.DataFrame, varied: Levels, confidence: float) -> pd.DataFrame:
    """Return the rate of divergence of each level with its score interval.

    Reference: Wilson 1927, https://doi.org/10.2307/2276774
    """
    table = _per_level((trials["status"] == "diverged").astype(float), trials, varied).astype({"sum": int})
    table = table.rename(columns={"count": "trials", "sum": "diverged", "mean": "rate"})
    low, high = proportion_confint(table["diverged"], table["trials"], 1 - confidence, "wilson")
    return table[["factor", "level", "trials", "diverged", "rate"]].assign(low=low, high=high)


def _survivors(trials: pd.DataFrame, varied: Levels) -> pd.DataFrame:
    later = rung_epochs(trials.columns)[1:]
    tables = [_per_level(trials[f"{RUNG_METRIC}{rung}"], trials, varied).assign(rung=rung) for rung in later]
    table = pd.concat(tables or [pd.DataFrame(columns=["factor", "level", "size", "count", "mean", "rung"])])
    table = table.rename(columns={"count": "reached", "size": "trials"})
    return table[["rung", "factor", "level", "trials", "reached", "mean"]].reset_index(drop=True)


def _per_level(values: "pd.Series[float]", rows: pd.DataFrame, varied: Levels) -> pd.DataFrame:
    """Return `factor`, `level`, `size`, `count` (not NaN), `sum` and `mean` (NaN for none) of each level's rows."""
    tables, known = [], values.notna().to_numpy()
    for factor, names in varied.items():
        codes = pd.Categorical(rows[factor], categories=list(names)).codes
        sizes = np.bincount(codes, minlength=len(names))
        counts = np.bincount(codes[known], minlength=len(names))
        sums = np.bincount(codes[known], values[known], minlength=len(names))
        means = np.divide(sums, counts, out=np.full(len(names), nan), where=counts > 0)
        columns = {"level": names, "size": sizes, "count": counts, "sum": sums, "mean": means}
        tables.append(pd.DataFrame(columns).assign(factor=factor))
    return pd.concat(tables, ignore_index=True)


def _notes(effects: Effects, trials: pd.DataFrame, accuracies: "pd.Series[float]") -> Iterator[str]:
    epoch, reached = effects.epoch, accuracies.notna()
    yield (
        f"complete: every cell and seed has an accuracy at epoch {epoch}, so the shares add up to 100%"
        if effects.complete
        else f"incomplete: {effects.missing:,} of {effects.missing + effects.observations:,} combinations of cell and "
        "seed have no accuracy; means are least-squares means, and the shares (type II) need not add up to 100%"
    )
    if epoch > min(rung_epochs(trials.columns), default=epoch):
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
    if (scales := trials["lr_scale"].nunique()) > 1:
        yield f"for each cell and seed the best of {scales} learning-rate scales counts"


def _divergence_note(diverged: int) -> Iterator[str]:
    if diverged:
        yield (
            f"{count(int(diverged), 'diverged trial')} left out of the means, not counted as zero: a level that "
            "diverges often looks better than it is"
        )


def format_effects(effects: Effects) -> str:
    """Return the largest effects as text of at most 80 columns; accuracies in percent, effects in points."""
    title = [f"validation accuracy at epoch {effects.epoch}, {effects.observations:,} cells x seeds"]
    title.append(f"mean {effects.grand_mean:.2%}, residual standard deviation {100 * effects.residual_sd:.2f} points")
    if effects.fixed:
        title.append(f"fixed: {', '.join(f'{factor}={level}' for factor, level in effects.fixed.items())}")
    blocks = [title, _variance_lines(effects), _level_lines(effects), _divergence_lines(effects), effects.notes]
    lines = [line for block in blocks for line in [*block, ""]]
    return "\n".join(_wrap(line) for line in lines[:-1])


def _variance_lines(effects: Effects) -> list[str]:
    lines = [f"{'share of variance':<34} {'df':>4} {'share':>7} {'omega^2':>7} {'F':>10} {'p (Holm)':>9}"]
    crossed = effects.variance["term"].str.contains(" x ")
    shown = effects.variance[~crossed | (crossed.cumsum() <= SHOWN_INTERACTIONS)]
    for row in shown.fillna({"p_holm": inf}).to_dict("records"):
        p = f"{row['p_holm']:.4f}".replace("0.0000", "<0.0001").replace("inf", "")
        tests = "" if row["term"] == "residual" else f"{row['omega_squared']:>7.2%} {row['F']:>10.2f} {p:>9}"
        lines.append(f"{row['term']:<34} {row['df']:>4} {row['share']:>7.2%} {tests}".rstrip())
    if more := len(effects.variance) - len(shown):
        rest = count(more, "more interaction")
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
    rows = effects.divergence[effects.divergence["diverged"] > 0].sort_values("rate", ascending=False, kind="stable")
    for row in rows.head(SHOWN_DIVERGED).to_dict("records"):
        name, diverged = f"{row['factor']}={row['level']}", f"{row['diverged']} of {row['trials']}"
        lines.append(f"{name:<34} {diverged:>13} {row['rate']:>7.1%}   {row['low']:>6.1%} to {row['high']:>6.1%}")
    if len(rows) > SHOWN_DIVERGED:
        lines.append(f"{count(len(rows) - SHOWN_DIVERGED, 'more level')}, none with a higher rate")
    return lines if len(rows) else [*lines, "none"]


def _wrap(line: str) -> str:
    return textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) if len(line) > 80 else line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the effects and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.effects",
        description="Measure which factors matter and how much each level changes the validation accuracy, "
        "after the first rung or at the end.",
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument("--epoch", type=int, metavar="N", help="rung to analyse (the first)")
    parser.add_argument(
        "--controls",
        action="store_true",
        help="effects after the full budget, from the unstopped controls alone (trials exempt from early stopping)",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the effects of levels to FILE")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the effects of levels, then of pairs of levels, to FILE"
    )
    options = parser.parse_args(arguments)

    def report_effects() -> int:
        experiment = read_experiment(options.store, options.experiment)
        if options.controls:
            effects = measure_final_effects(experiment.trials)
        else:
            effects = measure_effects(experiment.trials, epoch=options.epoch)
        if options.svg:
            options.svg.write_text(draw_main_effects(effect_rows(effects.levels)), encoding="utf-8")
        if options.csv:
            pd.concat([effects.levels, effects.interactions]).to_csv(options.csv, index=False)
        print("\n".join([format_effects(effects), *map(_wrap, experiment.notes)]))
        return 0

    return run_command(parser.name, report_effects, errors=(InputError, OSError))


if __name__ == "__main__":
    sys.exit(main())
