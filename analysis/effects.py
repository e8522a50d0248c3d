"""Prints which techniques matter, and how much: `python -m analysis.effects --experiment smoke-glyphs`.

At the end of training by default, or after a rung: who learns fast is another question than who ends well. The
estimates are those of `analysis.estimates`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import inf, isnan
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.estimates.earned import describe_together
from analysis.estimates.final_effects import FinalEffects, measure_experiment
from analysis.estimates.rung_effects import RungEffects, measure_rung_effects
from analysis.formatting import TABLES, format_interval, points, to_records, wrap
from analysis.plot import difference_rows, draw_main_effects, effect_rows
from analysis.store import Experiment, read_experiment
from grid.arguments import TEXT, Parser, add_experiment, add_output, add_store, print_json, run_command, write_output
from grid.wording import count

SHOWN_INTERACTIONS, SHOWN_DIVERGED, SHOWN_PAIRS = 6, 8, 10
FIRST = "first"
"""The first rung, whatever its epoch is."""
CSV_COLUMNS = ["factor", "level", "other_factor", "other_level", "effect", "low", "high"]


def format_final_effects(effects: FinalEffects) -> str:
    """Return the effects at the end as text of at most 80 columns; accuracies in percent, effects in points."""
    title = [f"validation accuracy at the end ({count(effects.epochs, 'epoch')}), mean {effects.grand_mean:.2%}"]
    title += [wrap(_evidence(effects))]
    if effects.fixed:
        title.append(f"fixed: {', '.join(f'{factor}={level}' for factor, level in effects.fixed.items())}")
    blocks = [title, _difference_lines(effects), _level_lines(effects), _pair_lines(effects), _earned_lines(effects)]
    blocks += [_divergence_lines(effects), list(effects.notes)]
    lines = [line for block in blocks if block for line in [*block, ""]]
    return "\n".join(wrap(line) if "\n" not in line else line for line in lines[:-1])


def _evidence(effects: FinalEffects) -> str:
    if not effects.stopped and not effects.probed:
        return f"from {count(effects.trials, 'trial')}, none of them stopped"
    return (
        f"from all {count(effects.trials, 'trial')}: {effects.seen:,} seen at the end, among them "
        f"{count(effects.probed, 'unstopped control')} that ASHA would have stopped; "
        f"{effects.stopped:,} were stopped, and their ends are estimated"
    )


def _difference_lines(effects: FinalEffects) -> list[str]:
    """Return the largest difference of each factor, the factors that matter first."""
    bounds = effects.differences.groupby("factor")["high"].max()
    found = difference_rows(effects.differences)
    rows = found.assign(levels=found["level"] + " over " + found["other_level"]).to_dict("records")
    width = max([15, *(len(row["factor"]) for row in rows)])
    rest = max([41 - width, *(len(row["levels"]) for row in rows)])
    lines = [f"{'what matters':<{width}} {'best over worst':<{rest}} {'points':>6}  {'95% interval':<15} {'verdict'}"]
    for row in rows:
        verdict = "sure" if row["sure"] else f"at most {100 * bounds[row['factor']]:.2f}"
        verdict = "unknown" if isnan(row["high"]) else verdict
        ends = format_interval(row["low"], row["high"])
        lines.append(
            f"{row['factor']:<{width}} {row['levels']:<{rest}} {100 * row['difference']:>6.2f}  {ends:<15} {verdict}"
        )
    return lines


def _level_lines(effects: FinalEffects) -> list[str]:
    lines = [f"{'effect of a level, in points':<34} {'trials':>6} {'mean':>7} {'effect':>7}   {'interval':>16}"]
    for row in effect_rows(effects.levels).to_dict("records"):
        ends = format_interval(row["low"], row["high"])
        figures = f"{row['trials']:>6} {row['mean']:>7.2%} {100 * row['effect']:>+7.2f}   {ends:>16}"
        lines.append(f"{row['factor'] + '=' + row['level']:<34} {figures}")
    return lines


def _pair_lines(effects: FinalEffects) -> list[str]:
    """Return the pairs of levels that stand out, the strongest first."""
    if effects.interactions.empty:
        return []
    found = effects.interactions[effects.interactions["stands_out"]].sort_values("effect", key=abs, ascending=False)
    lines = [f"{'pairs that stand out, beyond the sum of their effects':<58} {'points':>6}"]
    for row in found.head(SHOWN_PAIRS).to_dict("records"):
        name = f"{row['factor']}={row['level']}, {row['other_factor']}={row['other_level']}"
        half = 50 * (row["high"] - row["low"])
        lines.append(f"{name:<58} {100 * row['effect']:>+6.2f}  +-{half:.2f}")
    more = len(found) - SHOWN_PAIRS
    lines += [f"{count(more, 'weaker pair')}"] if more > 0 else []
    return lines if len(found) else [f"of {count(len(effects.interactions), 'pair')} of levels none stands out"]


def _earned_lines(effects: FinalEffects) -> list[str]:
    """Return what each of the best levels earns over the plain one, and all of them together."""
    if effects.earned is None:
        return []
    which = "the best levels" if effects.earned.surely_better else "all techniques"
    lines = [f"{f'what {which} earn, in points':<38} {'alone':>12} {'on average':>13} {'added last':>13}"]
    for row in effects.earned.table.to_dict("records"):
        name = f"{row['factor']}={row['level']} over {row['plain']}"
        columns = [
            f"{100 * row[which]:>+6.2f} +-{50 * (row[f'{which}_high'] - row[f'{which}_low']):.2f}"
            for which in ("alone", "average", "last")
        ]
        lines.append(f"{name:<38} {columns[0]:>12} {columns[1]:>13} {columns[2]:>13}")
    return [*lines, describe_together(effects.earned)]


def format_rung_effects(effects: RungEffects) -> str:
    """Return the effects at a rung as text of at most 80 columns; accuracies in percent, effects in points."""
    title = [f"validation accuracy at epoch {effects.epoch}, {effects.observations:,} cells x seeds"]
    title.append(f"mean {effects.grand_mean:.2%}, residual standard deviation {100 * effects.residual_sd:.2f} points")
    if effects.fixed:
        title.append(f"fixed: {', '.join(f'{factor}={level}' for factor, level in effects.fixed.items())}")
    blocks = [title, _variance_lines(effects), _rung_level_lines(effects), _divergence_lines(effects), effects.notes]
    lines = [line for block in blocks for line in [*block, ""]]
    return "\n".join(wrap(line) for line in lines[:-1])


def _variance_lines(effects: RungEffects) -> list[str]:
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


def _rung_level_lines(effects: RungEffects) -> list[str]:
    lines = [f"{'effect of a level, in points':<34} {'seen':>5} {'mean':>7} {'effect':>7}   {'interval':>16}"]
    order = [term for term in effects.variance["term"] if term in effects.factors]
    rows = effects.levels.sort_values("effect", ascending=False, kind="stable")
    for factor in dict.fromkeys([*order, *effects.factors]):
        for row in rows[rows["factor"] == factor].to_dict("records"):
            ends = format_interval(row["low"], row["high"])
            figures = f"{row['observations']:>5} {row['mean']:>7.2%} {100 * row['effect']:>+7.2f}   {ends:>16}"
            lines.append(f"{factor + '=' + row['level']:<34} {figures}")
    return lines


def _divergence_lines(effects: RungEffects | FinalEffects) -> list[str]:
    lines = [f"{'diverged, of all trials':<34} {'count':>13} {'rate':>7}   {'interval':>16}"]
    rows = effects.divergence[effects.divergence["diverged"] > 0].sort_values("rate", ascending=False, kind="stable")
    for row in rows.head(SHOWN_DIVERGED).to_dict("records"):
        name, diverged = f"{row['factor']}={row['level']}", f"{row['diverged']} of {row['trials']}"
        lines.append(f"{name:<34} {diverged:>13} {row['rate']:>7.1%}   {row['low']:>6.1%} to {row['high']:>6.1%}")
    if len(rows) > SHOWN_DIVERGED:
        lines.append(f"{count(len(rows) - SHOWN_DIVERGED, 'more level')}, none with a higher rate")
    return lines if len(rows) else [*lines, "none"]


def tabulate(effects: FinalEffects | RungEffects) -> pd.DataFrame:
    """Return all effects as one table with `CSV_COLUMNS`.

    The other columns are empty for the effect of a level. If `other_factor` is the factor itself, the effect is the
    difference of two of its levels; if it is another one, what a pair of levels has beyond the sum of their effects.
    """
    tables = [effects.levels, effects.interactions]
    if isinstance(effects, FinalEffects):
        differences = effects.differences.rename(columns={"difference": "effect"})
        tables.insert(1, differences.assign(other_factor=differences["factor"]))
    return pd.concat([table.reindex(columns=CSV_COLUMNS) for table in tables if len(table)], ignore_index=True)


def _columns(effects: FinalEffects | RungEffects) -> dict[str, Sequence[str]]:
    """Return the differences of levels at the end, or the effects of levels after a rung, as columns of text."""
    if isinstance(effects, RungEffects):
        table = effect_rows(effects.levels)
        names, values = table["factor"] + "=" + table["level"], table["effect"]
    else:
        table = effects.differences
        names, values = table["factor"] + ": " + table["level"] + " over " + table["other_level"], table["difference"]
    return {
        "points": [points(value) for value in values],
        "from": [points(value) for value in table["low"]],
        "to": [points(value) for value in table["high"]],
        "levels": list(names),
    }


def describe(effects: FinalEffects | RungEffects, experiment: Experiment) -> dict[str, Any]:
    """Return the effects in JSON's types."""
    return {
        "experiment": experiment.name,
        "epoch": effects.epochs if isinstance(effects, FinalEffects) else effects.epoch,
        "at_the_end": isinstance(effects, FinalEffects),
        "grand_mean": effects.grand_mean,
        "effects": to_records(tabulate(effects)),
        "earned": describe_earned(effects) if isinstance(effects, FinalEffects) else None,
        "notes": [*effects.notes, *experiment.notes],
    }


def describe_earned(effects: FinalEffects) -> dict[str, Any] | None:
    """Return what the best levels earn, in JSON's types; see `analysis.estimates.earned.Earned`."""
    earned = effects.earned
    if earned is None:
        return None
    sums = {name: asdict(getattr(earned, name)) for name in ("summed", "together", "beyond")}
    return {"surely_better": earned.surely_better, "levels": to_records(earned.table), **sums}


def measure(experiment: Experiment, epoch: int | str | None) -> FinalEffects | RungEffects:
    """Measure the effects at the end of training, or after a rung.

    Args:
        experiment: With the trials.
        epoch: A rung, or `FIRST`; `None` for the end.

    Raises:
        InputError: The trials don't yield them.
    """
    trials = experiment.trials
    if epoch is None or epoch == trials["epochs"].max():
        return measure_experiment(experiment)
    return measure_rung_effects(trials, epoch=None if epoch == FIRST else int(epoch))


def _epoch(text: str) -> int | str:
    try:
        return FIRST if text == FIRST else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes the epoch of a rung, or {FIRST}, got '{text}'") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the effects and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.effects",
        description="Measure which factors matter and how much each level changes the validation accuracy: "
        "at the end of training, from all trials, or after a rung.",
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument(
        "--epoch", type=_epoch, metavar="N", help="a rung, or 'first', for who learns fast (the end of training)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the effects of levels to FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the effects to FILE: of levels, then of pairs")
    add_output(parser)
    options = parser.parse_args(arguments)

    def report_effects() -> int:
        experiment = read_experiment(options.store, options.experiment)
        effects = measure(experiment, options.epoch)
        if options.svg:
            write_output(options.svg, draw_main_effects(effect_rows(effects.levels)))
        if options.csv:
            write_output(options.csv, tabulate(effects).to_csv(index=False))
        if options.json:
            print_json(describe(effects, experiment))
            return 0
        if options.format != TEXT:
            print(TABLES[options.format](_columns(effects)))
            return 0
        text = format_final_effects(effects) if isinstance(effects, FinalEffects) else format_rung_effects(effects)
        print("\n".join([text, *map(wrap, experiment.notes)]))
        return 0

    return run_command(parser.name, report_effects)


if __name__ == "__main__":
    sys.exit(main())
