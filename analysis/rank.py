"""Ranks the cells of a grid: `python -m analysis.rank --experiment smoke-glyphs`.

An accuracy after one epoch is never compared, or averaged, with one after nine: a cell is judged at the epoch that all
its replicates have reached, and cells with more epochs come first. Diverged and failed trials have no accuracy here;
they are counted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.store import read_trials
from grid.arguments import Parser
from grid.config import FACTORS, STATUSES, InputError, cell_name
from grid.store_uri import check_store_uri


def rank_cells(trials: pd.DataFrame) -> pd.DataFrame:
    """Rank cells by the best evidence that all their replicates share.

    Of the nuisance levels of a replicate the one that went furthest, then the most accurate one, counts. A cell whose
    replicates all had the full budget is the mean of their best accuracies; any other is the mean of the accuracies
    at the last rung that all of them have reached.

    Args:
        trials: From `analysis.store.read_trials`; of one budget.

    Returns:
        A row per cell with a ranked trial, best first: `rank`, the factors, `epochs_run` (that all replicates had),
        `epochs` (full budget), `seeds` (replicates that count), `val_accuracy` (mean), `spread` (standard
        deviation over the replicates; NaN for one).

    Raises:
        InputError: The trials are of several budgets.
    """
    budgets = sorted(trials["epochs"].unique())
    if len(budgets) > 1:
        raise InputError(f"trials of {' and '.join(map(str, budgets))} epochs can't be ranked together")
    counted = trials[trials["status"].isin(("completed", "stopped"))]
    counted = counted.sort_values(["epochs_run", "best_val_accuracy"]).groupby([*FACTORS, "seed"]).tail(1)
    shared = counted.groupby(list(FACTORS))["epochs_run"].transform("min")
    counted = counted.assign(epochs_run=shared, accuracy=_accuracy_at(counted, shared))
    cells = counted.groupby(list(FACTORS), as_index=False).agg(
        epochs_run=("epochs_run", "min"),
        epochs=("epochs", "min"),
        seeds=("seed", "nunique"),
        val_accuracy=("accuracy", "mean"),
        spread=("accuracy", "std"),
    )
    cells = cells.sort_values(["epochs_run", "val_accuracy"], ascending=False, ignore_index=True)
    cells.insert(0, "rank", range(1, len(cells) + 1))
    return cells


def _accuracy_at(trials: pd.DataFrame, epochs: pd.Series) -> pd.Series:
    """Return each trial's best accuracy if it had as many epochs as asked for, else the one at that rung."""
    accuracies = trials["best_val_accuracy"].where(trials["epochs_run"] == epochs)
    for epoch in epochs[accuracies.isna()].unique():
        accuracies = accuracies.mask(accuracies.isna() & (epochs == epoch), trials[f"val_accuracy_at_{epoch}"])
    return accuracies


def format_ranking(cells: pd.DataFrame, trials: pd.DataFrame, count: int) -> str:
    """Return the first `count` cells as text, and what could not be ranked."""
    lines = [f"{'rank':>4} {'val acc':>7} {'spread':>6} {'seeds':>5} {'epochs':>6}  cell"]
    for row in cells.head(count).to_dict("records"):
        spread = "" if pd.isna(row["spread"]) else f"{row['spread']:.2%}"
        cell = cell_name({factor: str(row[factor]) for factor in FACTORS})
        budget = f"{row['epochs_run']}/{row['epochs']}"
        figures = f"{row['rank']:>4} {row['val_accuracy']:>7.2%} {spread:>6} {row['seeds']:>5} {budget:>6}"
        lines.append(f"{figures}  {cell}")
    counts = trials["status"].value_counts()
    by_status = ", ".join(f"{counts[status]} {status}" for status in STATUSES if status in counts)
    lines.append(f"{min(count, len(cells))} of {len(cells)} cells shown; {len(trials)} trials: {by_status}")
    if not len(cells):
        lines.append("no trial reached an accuracy: all diverged or failed; try --lr-scales 0.1")
    elif cells["seeds"].max() == 1:
        lines.append("one seed per cell: the spread between runs is unknown; add replicates with grid.run --seeds 3")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ranking and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(prog="python -m analysis.rank", description="Rank the cells of a grid.")
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment")
    parser.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="cells to print (20)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all cells to a file")
    options = parser.parse_args(arguments)
    try:
        trials = read_trials(check_store_uri(options.store, must_exist=True), options.experiment)
        cells = rank_cells(trials)
        if options.csv:
            cells.to_csv(options.csv, index=False)
    except (InputError, OSError) as error:
        print(f"analysis.rank: {error}", file=sys.stderr)
        return 2
    print(format_ranking(cells, trials, options.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
