"""Ranks the cells of a grid: `python -m analysis.rank --experiment smoke-glyphs`.

Finalists come first, then cells with the full budget, then stopped ones by rung (`grid.ranking` has the rule). Each
cell has an interval for another seed and one for other images, and is or is not tied with the best (`grid.ties`).
Diverged and failed trials are counted, not ranked.
"""

import sys
from base64 import b64decode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.formatting import TABLES, to_records
from analysis.store import Experiment, read_experiment
from analysis.summaries import summarise_trials
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
from grid.ranking import RankedCell
from grid.ranking import rank_cells as rank_summaries
from grid.ties import CONFIDENCE, compare_paired, image_variance, seed_variance, tied_with_best
from grid.wording import count, explain_spared

PLACE_COLUMNS = ("rank", "tier", "tied")
TRAINING_COLUMNS = ("epochs_run", "epochs", "lr_scale")
REPLICATE_COLUMNS = ("seeds", "diverged", "stopped", "controls", "controls_end")
INTERVAL_COLUMNS = ("val_accuracy", "spread", "seed_half", "image_half", "low", "high")
TEST_COLUMNS = ("test_accuracy_as_validated", "test_seed_half", "test_image_half", "test_accuracy")
BALANCED_COLUMNS = ("val_balanced_accuracy", "test_balanced_accuracy")
BEHIND_COLUMNS = ("behind", "behind_seed_half", "behind_image_half")
COLUMNS = (*TRAINING_COLUMNS, *REPLICATE_COLUMNS, *INTERVAL_COLUMNS, *TEST_COLUMNS, *BALANCED_COLUMNS, *BEHIND_COLUMNS)
"""After `PLACE_COLUMNS` and the factors."""
SHOWN_PER_MODEL = 3
REFIT_TITLE = "the best finalist, trained on most validation images as well; val acc is of the rest"
SAME = 1e-9
"""Accuracies that differ by less are equal but for rounding."""
Row = dict[str, Any]
Right = NDArray[np.float64] | None


def rank_cells(
    trials: pd.DataFrame, finalists: pd.DataFrame | None = None, *, val_images: int | None = None
) -> pd.DataFrame:
    """Rank cells by the strongest evidence available for each.

    Args:
        trials: `analysis.store.Experiment.trials`.
        finalists: `.finalists` of the same experiment; None or empty before `grid.confirm`.
        val_images: Number of validation images; None if unknown.

    Returns:
        A row per ranked cell, best first.

        - `rank`, `tier` (finalist, completed, stopped), `tied` (whether it may be the best: finalists among finalists,
          other cells among all that trained to the full budget in the grid), the factors;
        - `epochs_run` (reached by at least half of the replicates), `epochs` (full budget), `lr_scale`;
        - numbers of replicates: `seeds` (with an accuracy after `epochs_run` epochs), `diverged`, `stopped` (before);
          `controls` (unstopped controls that count as stopped where ASHA would have stopped them) and `controls_end`
          (their mean accuracy at the end; NaN if all diverged later);
        - `val_accuracy` (mean over `seeds`), `spread` (standard deviation over them; NaN for one), `seed_half` and
          `image_half` (half-widths of its 95% intervals for another seed and for other images; NaN if unknown), `low`
          and `high` (95% interval for both);
        - of tested finalists, else NaN: `test_accuracy_as_validated` (mean over the nets, classes weighted as in the
          validation data), its `test_seed_half` and `test_image_half`, and `test_accuracy` (plain share);
        - `val_balanced_accuracy` and `test_balanced_accuracy`: means over the classes at the end of the budget and in
          the test, averaged over the nets; NaN if not recorded, as where all classes have one size;
        - of finalists after the first, else NaN: how far they are `behind` it on the seeds and images that both have,
          with the half-widths of 95% intervals for another seed and for other images (NaN if unknown).

    Raises:
        InputError: The trials have different budgets.
    """
    confirmed = _rank_finalists(finalists, val_images) if finalists is not None and len(finalists) else []
    factors = factors_among(trials.columns)
    known = {tuple(row[factor] for factor in factors) for row in confirmed}
    rest = [row for row in _rank_trials(trials, val_images) if tuple(row[factor] for factor in factors) not in known]
    columns = [*PLACE_COLUMNS, *factors, *COLUMNS]
    ranked = pd.DataFrame([*confirmed, *rest], columns=columns).astype({"tied": bool})
    return ranked.assign(rank=range(1, len(ranked) + 1))


def rank_refits(experiment: Experiment) -> pd.DataFrame:
    """Return the cells that were trained on most validation images as well, as `rank_cells` returns finalists.

    Their validation accuracy is of the few images that were still held out; nothing is chosen by it.
    """
    refits = experiment.refits
    if refits.empty:
        return refits
    return rank_cells(experiment.trials[:0], refits).assign(tied=False)


def _rank_trials(trials: pd.DataFrame, val_images: int | None) -> list[Row]:
    """Return a row per cell of the grid, best first."""
    cells = rank_summaries(summarise_trials(trials))
    ties = tied_with_best(cells, val_images=val_images)
    tiers = ("completed" if cell.epochs_run == cell.epochs else "stopped" for cell in cells)
    rows = zip(_rows(cells, val_images), tiers, ties, _balanced(trials, cells), strict=True)
    return [row | {"tier": tier, "tied": tied} | balanced for row, tier, tied, balanced in rows]


def _rank_finalists(finalists: pd.DataFrame, val_images: int | None) -> list[Row]:
    """Return a row per finalist, best first."""
    cells = [cell for cell in rank_summaries(summarise_trials(finalists)) if cell.epochs_run == cell.epochs]
    ties = tied_with_best(cells, val_images=val_images, paired=True)
    more = _tests(finalists, cells), _balanced(finalists, cells), _behind(finalists, cells, val_images)
    rows = zip(_rows(cells, val_images), *more, ties, strict=True)
    return [
        row | test | balanced | behind | {"tier": "finalist", "tied": tied}
        for row, test, balanced, behind, tied in rows
    ]


def _rows(cells: Sequence[RankedCell], val_images: int | None) -> list[Row]:
    """Return the columns of each cell, but for the place; seeds spread alike in all cells of one number of epochs."""
    spreads = {
        epochs_run: seed_variance([cell for cell in cells if cell.epochs_run == epochs_run])
        for epochs_run in {cell.epochs_run for cell in cells}
    }
    rows = []
    for cell in cells:
        seed_half, image_half = _halves(cell.mean, len(cell.accuracies), spreads[cell.epochs_run], val_images)
        half = combine_halves(seed_half, image_half)
        interval = {"seed_half": seed_half, "image_half": image_half, "low": cell.mean - half, "high": cell.mean + half}
        rows.append(_row(cell) | interval)
    return rows


def _row(cell: RankedCell) -> Row:
    accuracies = list(cell.accuracies.values())
    return {
        **cell.cell,
        "epochs_run": cell.epochs_run,
        "epochs": cell.epochs,
        "lr_scale": cell.lr_scale,
        "seeds": len(accuracies),
        "diverged": len(cell.diverged),
        "stopped": cell.stopped,
        "controls": len(cell.spared),
        "controls_end": cell.spared_mean,
        "val_accuracy": cell.mean,
        "spread": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else np.nan,
    }


def _halves(
    mean: float, seeds: int, variance: tuple[float, float], images: int | None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the half-widths of a mean accuracy's intervals for another seed and for other images.

    Args:
        mean: Over the seeds.
        seeds: How many.
        variance: From `grid.ties.seed_variance`.
        images: That it was measured on; None if unknown.
        confidence: Level of each.
    """
    between_seeds, degrees = variance
    upper = (1 + confidence) / 2
    seed_half = stats.t.ppf(upper, degrees) * np.sqrt(between_seeds / seeds) if degrees else np.nan
    return float(seed_half), float(stats.norm.ppf(upper) * np.sqrt(image_variance(mean, images)))


def combine_halves(first: float, second: float) -> float:
    """Return the half-width for two independent sources of error, of which one may be unknown.

    Reference: Zou and Donner 2008, https://doi.org/10.1002/sim.3095
    """
    return np.nan if np.isnan([first, second]).all() else float(np.sqrt(np.nansum([first**2, second**2])))


def _behind(finalists: pd.DataFrame, cells: Sequence[RankedCell], val_images: int | None) -> list[dict[str, float]]:
    """Return how far each cell is behind the first one; an image that both nets get right tells nothing apart."""
    if not cells:
        return []
    behind, errors, degrees = compare_paired(cells)
    seed_halves = errors * (stats.t.ppf((1 + CONFIDENCE) / 2, degrees) if degrees else np.nan)
    factors = factors_among(finalists.columns)
    correct = {
        (*(row[factor] for factor in factors), row["seed"]): right_of(row["val_correct"], val_images)
        for row in finalists.to_dict("records")
    }
    rows = [dict.fromkeys(BEHIND_COLUMNS, np.nan)]
    for number, cell in enumerate(cells[1:], start=1):
        shared = cells[0].accuracies.keys() & cell.accuracies.keys()
        pairs = [(correct[*cells[0].cell.values(), seed], correct[*cell.cell.values(), seed]) for seed in shared]
        figures = (behind[number], seed_halves[number], _image_half(pairs))
        rows.append(dict(zip(BEHIND_COLUMNS, map(float, figures), strict=True)))
    return rows


def _image_half(pairs: Sequence[tuple[Right, Right]]) -> float:
    """Return the half-width for other images of a mean difference between nets that were measured on the same images.

    Args:
        pairs: What both nets got right, for each seed.

    Reference: with one seed, McNemar 1947, https://doi.org/10.1007/BF02295996
    """
    known = [(first, second) for first, second in pairs if first is not None and second is not None]
    if not known or len(known) < len(pairs):
        return np.nan
    differences = np.mean([first - second for first, second in known], axis=0)
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2) * differences.std(ddof=1) / np.sqrt(len(differences)))


def right_of(val_correct: str, images: int | None) -> Right:
    """Return 1 for each validation image that a net got right, else 0, `[image]`; None if the store does not say.

    Args:
        val_correct: See `analysis.trial_table.COLUMNS`.
        images: Number of validation images; None if unknown.
    """
    try:
        packed = np.frombuffer(b64decode(val_correct, validate=True), np.uint8)
    except ValueError:  # another program may have written anything
        return None
    if not images or images < 2 or len(packed) != -(-images // 8):
        return None
    return np.unpackbits(packed, count=images).astype(float)


def _tests(finalists: pd.DataFrame, cells: Sequence[RankedCell]) -> list[dict[str, float]]:
    """Return the columns about the test of each finalist; those of untested ones are NaN."""
    factors, name = list(factors_among(finalists.columns)), TEST_COLUMNS[0]
    tested = finalists[finalists[name].notna()]
    by_cell = tested.groupby(factors)[name]
    degrees = len(tested) - by_cell.ngroups
    squares = float(((tested[name] - by_cell.transform("mean")) ** 2).sum())
    variance = (squares / degrees if degrees else np.nan, float(degrees))
    measured = {"mean": (name, "mean"), "plain": ("test_accuracy", "mean"), "images": ("test_images", "mean")}
    nets = tested.groupby(factors, as_index=False).agg(**measured, seeds=(name, "size")).to_dict("records")
    known = {tuple(row[factor] for factor in factors): row for row in nets}

    def columns(row: Mapping[Any, Any]) -> tuple[float, ...]:
        images = None if np.isnan(row["images"]) else int(row["images"])
        return (row["mean"], *_halves(row["mean"], row["seeds"], variance, images), row["plain"])

    rows = (known.get(tuple(cell.cell.values())) for cell in cells)
    values = (columns(row) if row else [np.nan] * len(TEST_COLUMNS) for row in rows)
    return [dict(zip(TEST_COLUMNS, row, strict=True)) for row in values]


def _balanced(trials: pd.DataFrame, cells: Sequence[RankedCell]) -> list[dict[str, float]]:
    """Return the balanced accuracies of each cell at the end of the budget: means over the seeds that count there."""
    factors, missing = list(factors_among(trials.columns)), dict.fromkeys(BALANCED_COLUMNS, np.nan)
    values = trials.reindex(columns=list(BALANCED_COLUMNS)).to_dict("records")
    keys = trials[[*factors, "lr_scale", "seed"]].itertuples(index=False, name=None)
    known = dict(zip(keys, values, strict=True))

    def of(cell: RankedCell) -> dict[str, float]:
        rows = [known.get((*cell.cell.values(), cell.lr_scale, seed), missing) for seed in cell.accuracies]
        return {name: float(np.mean([row[name] for row in rows])) for name in BALANCED_COLUMNS}

    return [of(cell) if cell.accuracies and cell.epochs_run == cell.epochs else missing for cell in cells]


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
