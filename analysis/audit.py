"""Prints what early stopping saved and what it may have cost: `python -m analysis.audit --experiment smoke-glyphs`.

The figures come from `analysis.stopping.figures`; here is how they read, as text and in the report.
"""

import re
import sys
import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.formatting import to_records
from analysis.stopping.figures import ALL, Audit, audit_experiment
from analysis.store import Experiment, read_experiment
from grid.arguments import Parser, add_experiment, add_json_instead, add_store, print_json, run_command, write_output
from grid.wording import count


@dataclass(frozen=True)
class TableWording:
    """How one table of the audit reads, as text and in the report."""

    caption: str
    remark: str
    """How to read it, in sentences."""
    headers: Mapping[str, str]
    """Shown columns, in order -> header; `low` and `high`, where the table has them, come last."""
    row: str
    """Format of a row of text, a field per header."""

    @property
    def has_interval(self) -> bool:
        """Whether the table ends with an interval."""
        return "{low" in self.row


WORDING: Mapping[str, TableWording] = {
    "savings": TableWording(
        "What stopping saved",
        "Epochs that diverged and failed trials did not train are not counted as saved.",
        {"model": "model", "trials": "trials", "epochs_run": "epochs run"}
        | {"epochs_full": "without stopping", "saved": "saved"},
        "{model} | {trials:,} | {epochs_run:,} | {epochs_full:,} | {saved:.0%}",
    ),
    "correlations": TableWording(
        "Does the order at a rung predict the order at the end?",
        "Spearman's rank correlation over the unstopped controls: 1 is the same order, 0 is no relation.",
        {"model": "model", "rung": "after epoch", "controls": "controls", "spearman": "rank correlation"},
        "{model} | {rung} | {controls} | {spearman:.2f} | {low:.2f} to {high:.2f}",
    ),
    "false_stops": TableWording(
        "How many of the trials that the rule stops would beat the median survivor?",
        "Counted among the unstopped controls, which kept training where any other trial would have been stopped.",
        {"model": "model", "controls": "controls", "stopped": "would be stopped", "false_stops": "beat the median"}
        | {"rate": "rate"},
        "{model} | {controls} | {stopped} | {false_stops} | {rate:.0%} | {low:.0%} to {high:.0%}",
    ),
    "lost_winners": TableWording(
        "Did stopping lose a trial that is better than the winner?",
        "Of the controls that would have been stopped, how many ended above the winner, and how many are expected to "
        "if stopping were a coin flip. The last column bounds, with {sure} confidence, how many of the stopped trials "
        "would have.",
        {"model": "model", "tried": "controls", "beat": "beat winner", "by_chance": "by coin flips"}
        | {"stopped": "stopped trials", "at_most": "better (at most)"},
        "{model} | {tried} | {beat} | {by_chance:.2f} | {stopped:,} | {at_most:,}",
    ),
    "regret": TableWording(
        "How much accuracy may stopping have lost?",
        "The last column bounds, with {sure} confidence, how far the best of the stopped trials is expected to end "
        "above the winner. It is wide if controls are few.",
        {"model": "model", "winner": "winner", "best_stopped_control": "best stopped control", "margin": "margin"}
        | {"loss_at_most": "loss (at most)"},
        "{model} | {winner:.2%} | {best_stopped_control:.2%} | {margin:+.2%} | {loss_at_most:.1%}",
    ),
    "baseline": TableWording(
        "Would a simpler rule do: train all to epoch {start}, then the best K to the end?",
        "K is the largest number that takes no more epochs than were trained.",
        {"model": "model", "epochs": "epochs", "kept": "K", "winner_rank": "winner's rank then"}
        | {"winner_kept": "winner kept", "top_kept": "best survivors kept"},
        "{model} | {epochs:,} | {kept:,} | {winner_rank:,} | {winner_kept} | {top_kept} of {top}",
    ),
}
"""Table of the audit -> how it reads."""


def caption_of(name: str, audit: Audit) -> str:
    """Return the caption of a table of `WORDING`."""
    return WORDING[name].caption.format(start=min(audit.rungs, default=1))


def summarise_loss(audit: Audit) -> list[str]:
    """Return what stopping may have lost: for each model with controls that the rule would have stopped, a sentence."""
    rows = audit.lost_winners.merge(audit.regret, on="model").to_dict("records")
    return [_summarise_loss(row, f"{audit.confidence:.0%}") for row in rows if row["tried"]]


def _summarise_loss(row: Mapping[Hashable, Any], sure: str) -> str:
    whose = "" if row["model"] == ALL else f"{row['model']}: "
    beat = f"{row['beat']:,}" if row["beat"] else "none"
    text = (
        f"{whose}of {count(row['tried'], 'control')} that would have been stopped, {beat} ended above the winner "
        f"({row['by_chance']:.2f} expected from coin flips)"
    )
    if not row["stopped"]:
        return text
    return f"{text}; at most {row['at_most']:,} of {count(row['stopped'], 'stopped trial')} would have ({sure})"


def format_audit(audit: Audit) -> str:
    """Return the audit as text of at most 80 columns."""
    rungs = ", ".join(map(str, audit.rungs)) or "none"
    budget = count(audit.epochs, "epoch")
    title = f"rungs after epochs: {rungs}; budget: {budget}; intervals and bounds at {audit.confidence:.0%}"
    tables = [_table(name, audit) for name in WORDING]
    parts = [title, _fill(summarise_loss(audit)), *tables, _fill(audit.notes)]
    return "\n\n".join(part for part in parts if part)


def _fill(sentences: Iterable[str]) -> str:
    """Return the sentences as lines of at most 80 columns."""
    return "\n".join(
        textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for text in sentences
    )


def _table(name: str, audit: Audit) -> str:
    """Return a caption, the headers and a line per row; nothing for no rows. Fields that start with a NaN are empty."""
    table, wording = getattr(audit, name), WORDING[name]
    lines = [[*wording.headers.values(), *[f"{audit.confidence:.0%} interval"] * wording.has_interval]]
    for row in table.to_dict("records"):
        words = {key: ("no", "yes")[value] if isinstance(value, bool) else value for key, value in row.items()}
        fields = wording.row.format(**words).split(" | ")
        lines.append(["" if re.match(r"\+?nan\b", field) else field for field in fields])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(map(str.rjust, fields, widths)) for fields in lines]
    return "\n".join([caption_of(name, audit), *aligned]) if len(table) else ""


def tidy(audit: Audit) -> pd.DataFrame:
    """Return all tables as one: `table`, `model`, `rung` (NaN where a table has none), `quantity`, `value`."""
    names = ("correlations", "false_stops", "savings", "lost_winners", "regret", "baseline")
    tables = [
        table.melt([key for key in ("model", "rung") if key in table], var_name="quantity").assign(table=name)
        for name in names
        if len(table := getattr(audit, name))
    ]
    return pd.DataFrame(pd.concat(tables, ignore_index=True), columns=["table", "model", "rung", "quantity", "value"])


def describe(audit: Audit, experiment: Experiment) -> dict[str, Any]:
    """Return the audit in JSON's types; docs/json.md says what is in it."""
    return {
        "experiment": experiment.name,
        "rungs": list(audit.rungs),
        "epochs": audit.epochs,
        "factor": audit.factor,
        "within": list(audit.within),
        "confidence": audit.confidence,
        **{name: to_records(getattr(audit, name)) for name in WORDING},
        "notes": [*audit.notes, *experiment.notes],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the audit and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.audit",
        description="Measure what early stopping saved and what it may have cost, from the unstopped controls: trials "
        "drawn at random and exempt from early stopping.",
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures to FILE, one per line")
    add_json_instead(parser)
    options = parser.parse_args(arguments)

    def report_audit() -> int:
        experiment = read_experiment(options.store, options.experiment)
        audit = audit_experiment(experiment)
        if options.csv:
            write_output(options.csv, tidy(audit).to_csv(index=False))
        if options.json:
            print_json(describe(audit, experiment))
            return 0
        print(format_audit(replace(audit, notes=audit.notes + experiment.notes)))
        return 0

    return run_command(parser.name, report_audit)


if __name__ == "__main__":
    sys.exit(main())
