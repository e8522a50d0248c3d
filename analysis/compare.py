"""Compares two experiments: `python -m analysis.compare BEFORE AFTER`.

Two experiments of other code, another torch, another machine or other data, with trials in common.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from analysis.estimates.change import POWER, Change, change_at_end, change_at_rung, pair_trials
from analysis.formatting import format_interval, to_records, wrap
from analysis.store import Experiment, read_experiment
from grid.arguments import Parser, add_json_instead, add_store, print_json, run_command
from grid.config import InputError
from grid.wording import count

SHOWN = 12
"""Levels in the table of those that did not move."""


def compare(before: Experiment, after: Experiment) -> tuple[list[Change], list[str]]:
    """Return what has changed at the end and after the first rung, and why one of them is unknown.

    Raises:
        InputError: The experiments have no trial in common, or too few for either.
    """
    pairs = pair_trials(before.trials, after.trials)
    if pairs.empty:
        raise InputError(f"'{before.name}' and '{after.name}' have no trial in common: the same cell, seed and scale")
    changes, problems = [], []
    attempts: dict[str, Callable[..., Change]] = {"at the end": change_at_end, "after the first rung": change_at_rung}
    for where, measure in attempts.items():
        try:
            changes.append(measure(pairs))
        except InputError as error:
            problems.append(f"not compared {where}: {error}")
    if not changes:
        raise InputError(f"'{before.name}' and '{after.name}' can't be compared; {'; '.join(problems)}")
    return changes, problems


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield what two manifests have different: code, versions, machine, settings, data."""
    for name in ("commit", "platform", "host"):
        if before.get(name) != after.get(name):
            yield f"{name}: {before.get(name, 'not recorded')}, then {after.get(name, 'not recorded')}"
    for part in ("versions", "settings", "data"):
        old, new = (found if isinstance(found := each.get(part), Mapping) else {} for each in (before, after))
        for name in dict.fromkeys((*old, *new)):
            if name != "classes" and old.get(name) != new.get(name):
                yield f"{name}: {old.get(name, 'not recorded')}, then {new.get(name, 'not recorded')}"


def format_change(change: Change) -> str:
    """Return a change as text of at most 80 columns; accuracies in percent, changes in points."""
    lines = [wrap(f"{_where(change)}: {count(change.pairs, 'pair')} of trials, {change.identical:,} of them identical")]
    verdict = "moved" if change.moved else "no change found"
    lines.append(
        f"mean change {100 * change.mean:+.2f} points, {format_interval(change.low, change.high)}: {verdict}; "
        f"{POWER:.0%} sure to find {100 * change.findable:.2f}"
    )
    lines.append(f"a pair differs by {100 * change.noise:.2f} points (standard deviation) beside what levels explain")
    moved = change.levels[change.levels["moved"]].sort_values("change", key=abs, ascending=False)
    shown = moved if len(moved) else change.levels.sort_values("p").head(SHOWN)
    if len(shown):
        lines.append("")
        lines.append(f"{'change beyond the other levels':<34} {'points':>7}   {'interval':>16} {'findable':>9}")
    for row in shown.to_dict("records"):
        name = f"{row['factor']}={row['level']}"
        interval = format_interval(row["low"], row["high"])
        lines.append(f"{name:<34} {100 * row['change']:>+7.2f}   {interval:>16} {100 * row['findable']:>9.2f}")
    levels = count(len(change.levels), "level")
    lines.append(f"moved: {len(moved)} of {levels}, after Holm's correction over all of them and the mean")
    return "\n".join(lines)


def _where(change: Change) -> str:
    return f"at the end, after {count(change.epoch, 'epoch')}" if change.at_the_end else f"after epoch {change.epoch}"


def describe(changes: Sequence[Change], notes: Sequence[str], before: Experiment, after: Experiment) -> dict[str, Any]:
    """Return everything in JSON's types."""
    return {
        "before": before.name,
        "after": after.name,
        "different": list(differences(before.manifest, after.manifest)),
        "changes": [{**asdict(each), "moved": each.moved, "levels": to_records(each.levels)} for each in changes],
        "notes": list(notes),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what has changed and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.compare",
        description="Compare two experiments by the trials that both have: did a level move with other code, another "
        "torch, another machine, other data?",
    )
    parser.add_argument("before", metavar="BEFORE", help="name of an MLflow experiment")
    parser.add_argument("after", metavar="AFTER", help="name of another one")
    add_store(parser)
    add_json_instead(parser)
    options = parser.parse_args(arguments)

    def report() -> int:
        before, after = (read_experiment(options.store, name) for name in (options.before, options.after))
        changes, problems = compare(before, after)
        notes = [*problems, *(f"{each.name}: {note}" for each in (before, after) for note in each.notes)]
        if options.json:
            print_json(describe(changes, notes, before, after))
            return 0
        print(wrap(f"{after.name} beyond {before.name}"))
        for line in differences(before.manifest, after.manifest):
            print(wrap(f"different {line}"))
        print("", *map(format_change, changes), sep="\n\n")
        print("", *map(wrap, notes), sep="\n")
        return 0

    return run_command(parser.name, report)


if __name__ == "__main__":
    sys.exit(main())
