"""Prints the cells of a grid, best first: `python -m analysis.rank --experiment smoke-glyphs`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.estimates.cells import combine_halves, rank_cells, rank_refits
from analysis.formatting import TABLES, to_records
from analysis.store import Experiment, read_experiment
from grid.arguments import (
    TEXT,
    Parser,
    add_experiment,
    add_output,
    add_store,
    positive,
    print_json,
    run_command,
    write_output,
)
from grid.config import InputError, cell_name, factors_among
from grid.metrics import STATUSES
from grid.wording import count, explain_spared

SHOWN_PER_MODEL = 3
REFIT_TITLE = "the best finalist, trained on most validation images as well; val acc is of the rest"
SAME = 1e-9
"""Accuracies that differ by less are equal but for rounding."""


def format_ranking(cells: pd.DataFrame, experiment: Experiment, top: int) -> str:
    """Return the finalists, the `top` cells of the grid and the best of each model as text, with notes.

    Args:
        cells: From `rank_cells`.
        experiment: That the cells are of.
        top: How many cells of the grid to show.
    """
    trials = experiment.trials
    finalists = cells[cells["tier"] == "finalist"]
    blocks = []
    if len(finalists):
        blocks.append(f"finalists, trained again on new seeds\n{_table(finalists, 'test')}")
        blocks += _lags(finalists)
    refits = rank_refits(experiment)
    if len(refits):
        blocks.append(f"{REFIT_TITLE}\n{_table(refits, 'test')}")
    others = cells[cells["tier"] != "finalist"]
    blocks.append(f"cells of the grid\n{_table(others.head(top), 'epochs')}")
    counts = trials["status"].value_counts()
    by_status = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if status in counts)
    shown = f"{min(top, len(others)):,} of {count(len(others), 'cell')} shown"
    blocks.append(f"{shown}; {count(len(trials), 'trial')}: {by_status}")
    if not len(cells):
        blocks.append("no trial has an accuracy: all diverged or failed; try --lr-scales 0.1")
    models = cells["model"].unique()
    if len(models) > 1:
        of_models = [cells[cells["model"] == model].head(SHOWN_PER_MODEL) for model in models]
        blocks += [f"best {model}\n{_table(best, 'epochs')}" for model, best in zip(models, of_models, strict=True)]
    notes = [*_explain_controls(others.head(top)), *_doubts(cells, experiment.val_images), *experiment.notes]
    return "\n\n".join([*blocks, "\n".join(notes)]).rstrip()


def _lags(finalists: pd.DataFrame) -> list[str]:
    """Return how far finalists are behind the first one, where they share seeds with it."""
    rows = finalists[finalists["behind"].notna()].to_dict("records")
    if not rows:
        return []
    columns = {
        "rank": [f"{row['rank']}" for row in rows],
        "points": [f"{100 * row['behind']:.2f}" for row in rows],
        "+- seed": [_points(row["behind_seed_half"]) for row in rows],
        "+- images": [_points(row["behind_image_half"]) for row in rows],
    }
    lines = _align({name: texts for name, texts in columns.items() if any(texts)})
    return ["\n".join(["behind the first, on the same seeds and images", *lines])]


def _explain_controls(shown: pd.DataFrame) -> list[str]:
    marked = shown[shown["controls"] > 0]
    return explain_spared(list(zip(marked["rank"], marked["controls_end"].astype(float), strict=True)))


def _doubts(cells: pd.DataFrame, val_images: int | None) -> list[str]:
    """Return lines on how certain the order is."""
    lines, grid = [], cells[cells["tier"] != "finalist"]
    if cells["low"].notna().any():
        lines.append("+-: half the width of a 95% interval in points, for another seed or other images")
        lines.append("tie: may be as good as the best, among cells trained to the full budget")
    if (cells["test_accuracy"] - cells["test_accuracy_as_validated"]).abs().max() > SAME:
        lines.append("test: each class weighted by its share of the validation images")
    if cells["val_balanced_accuracy"].notna().any():
        lines.append("balanced: mean over the classes, which differ in size")
    if len(grid) and grid["seeds"].max() == 1:
        lines.append(
            "one seed per cell: how another would differ is unknown;"
            if val_images
            else "one seed per cell and no count of images in the store: ties are unknown;"
        )
        lines.append("add replicates with grid.run --seeds 3, or run grid.confirm")
    return lines


def _table(cells: pd.DataFrame, last: str) -> str:
    """Return cells as lines: of at most 80 columns with one seed per cell, unless many levels are not the default."""
    columns = dict(_columns(cells, last))
    names = columns.pop("cell")
    return "\n".join(f"{line}  {name}" for line, name in zip(_align(columns), ["cell", *names], strict=True))


def _columns(cells: pd.DataFrame, last: str) -> dict[str, Sequence[str]]:
    """Return what a table of cells shows, as text; columns without any are left out.

    Args:
        cells: From `rank_cells`.
        last: What the column before the cell shows: `epochs` or `test` accuracy.
    """
    rows = cells.to_dict("records")
    columns = {
        "rank": [f"{row['rank']}" for row in rows],
        "tie": ["yes" if row["tied"] and not np.isnan(row["low"]) else "" for row in rows],
        "val acc": [f"{row['val_accuracy']:.2%}" + "*" * (row["controls"] > 0) for row in rows],
        "+- seed": [_points(row["seed_half"]) for row in rows],
        "+- images": [_points(row["image_half"]) for row in rows],
        "balanced": [_share(row["val_balanced_accuracy"]) for row in rows],
        "seeds": _seeds(rows),
        **(
            _test_columns(rows)
            if last == "test"
            else {"epochs": [f"{row['epochs_run']}/{row['epochs']}" for row in rows]}
        ),
    }
    shown = {name: texts for name, texts in columns.items() if any(texts) or name == "rank"}
    return {**shown, "cell": [*map(_name, rows)]}


def format_tables(cells: pd.DataFrame, top: int, kind: str) -> str:
    """Return the finalists, if there are any, and the best cells of the grid, as tables for other programs.

    Args:
        cells: From `rank_cells`.
        top: How many cells of the grid.
        kind: One of `analysis.formatting.TABLES`.
    """
    finalists, others = cells[cells["tier"] == "finalist"], cells[cells["tier"] != "finalist"].head(top)
    shown = [*([_columns(finalists, "test")] if len(finalists) else []), _columns(others, "epochs")]
    return "\n\n".join(map(TABLES[kind], shown))


def describe_experiment(uri: str, name: str) -> dict[str, Any]:
    """Return the ranking of an experiment in JSON's types; without cells, and with the reason, if it has none yet.

    Args:
        uri: MLflow tracking URI.
        name: Of the experiment.
    """
    try:
        experiment = read_experiment(uri, name)
    except InputError as error:
        return {"experiment": name, "cells": [], "refit": [], "trials": {}, "notes": [str(error)]}
    cells = rank_cells(experiment.trials, experiment.finalists, val_images=experiment.val_images)
    return describe(cells, experiment)


def describe(cells: pd.DataFrame, experiment: Experiment) -> dict[str, Any]:
    """Return the ranking in JSON's types; docs/json.md says what is in it."""
    return {
        "experiment": experiment.name,
        "cells": to_records(cells),
        "refit": to_records(rank_refits(experiment)),
        "trials": {str(status): int(number) for status, number in experiment.trials["status"].value_counts().items()},
        "notes": [*_doubts(cells, experiment.val_images), *experiment.notes],
    }


def _test_columns(rows: Sequence[Mapping[Any, Any]]) -> dict[str, list[str]]:
    halves = (combine_halves(row["test_seed_half"], row["test_image_half"]) for row in rows)
    tests = (row["test_accuracy_as_validated"] for row in rows)
    balanced = [_share(row["test_balanced_accuracy"]) if _share(row["val_balanced_accuracy"]) else "" for row in rows]
    return {"test": [*map(_share, tests)], "+-": [*map(_points, halves)], "balanced ": balanced}


def _align(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line of headers and a line per row, flush right."""
    columns = {name: [name, *texts] for name, texts in columns.items()}
    padded = [[text.rjust(max(map(len, texts))) for text in texts] for texts in columns.values()]
    return [" ".join(line) for line in zip(*padded, strict=True)]


def _share(share: float) -> str:
    return "" if np.isnan(share) else f"{share:.2%}"


def _points(half: float) -> str:
    return "" if np.isnan(half) else f"{100 * half:.2f}"


def _seeds(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """Return how many replicates have the shown accuracy, and of how many; nothing if every cell has a single one."""
    pairs = [(row["seeds"], row["seeds"] + row["diverged"] + row["stopped"]) for row in rows]
    if all(replicates == 1 for _, replicates in pairs):
        return [""] * len(rows)
    return [f"{seeds}" if seeds == replicates else f"{seeds}/{replicates}" for seeds, replicates in pairs]


def _name(row: Mapping[Any, Any]) -> str:
    cell = cell_name({factor: str(row[factor]) for factor in factors_among(row.keys())})
    scale = "" if row["lr_scale"] == 1 else f" lr x{row['lr_scale']:g}"
    return f"{cell}{scale}" + (f" ({row['diverged']} diverged)" if row["diverged"] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ranking and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.rank", description="Rank the cells of a grid, with intervals and ties between cells."
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="cells of the grid to print (20)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all ranked cells to FILE")
    add_output(parser)
    options = parser.parse_args(arguments)

    def rank() -> int:
        experiment = read_experiment(options.store, options.experiment)
        cells = rank_cells(experiment.trials, experiment.finalists, val_images=experiment.val_images)
        if options.csv:
            write_output(options.csv, cells.to_csv(index=False))
        if options.json:
            print_json(describe(cells, experiment))
        elif options.format != TEXT:
            print(format_tables(cells, options.top, options.format))
        else:
            print(format_ranking(cells, experiment, options.top))
        return 0

    return run_command(parser.name, rank)


if __name__ == "__main__":
    sys.exit(main())
