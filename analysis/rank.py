"""Ranks the cells of a grid: `python -m analysis.rank --experiment smoke-glyphs`.

An accuracy after one epoch is not compared with one after nine: cells whose replicates all had the full budget come
first, then the others by the epochs they had. Diverged and failed trials have no accuracy here; they are counted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.store import read_trials
from grid.config import FACTORS, STATUSES, InputError, cell_name
from grid.store_uri import check_store_uri


def rank_cells(trials: pd.DataFrame) -> pd.DataFrame:
    """Rank cells by the best evidence there is of each.

    Of the nuisance levels of a replicate the one that went furthest, then the most accurate one, counts. A cell has as
    many epochs as its least trained replicate.

    Args:
        trials: From `analysis.store.read_trials`.

    Returns:
        A row per cell with a ranked trial, best first: `rank`, the factors, `epochs_run`, `status`, `seeds` (replicates
        that count), `val_accuracy` (mean of their best), `spread` (standard deviation over them; NaN for one).
    """
    counted = trials[trials["status"].isin(("completed", "stopped"))]
    counted = counted.sort_values(["epochs_run", "best_val_accuracy"]).groupby([*FACTORS, "seed"]).tail(1)
    cells = counted.groupby(list(FACTORS), as_index=False).agg(
        epochs_run=("epochs_run", "min"),
        status=("status", "max"),  # stopped, if any replicate was
        seeds=("seed", "nunique"),
        val_accuracy=("best_val_accuracy", "mean"),
        spread=("best_val_accuracy", "std"),
    )
    cells = cells.sort_values(["epochs_run", "val_accuracy"], ascending=False, ignore_index=True)
    cells.insert(0, "rank", range(1, len(cells) + 1))
    return cells


def format_ranking(cells: pd.DataFrame, trials: pd.DataFrame, count: int) -> str:
    """Return the first `count` cells as text of at most 80 columns, and what could not be ranked."""
    lines = [f"{'rank':>4}  {'val acc':>7}  {'spread':>6}  {'seeds':>5}  {'epochs':>6}  {'status':<9}  cell"]
    for row in cells.head(count).to_dict("records"):
        spread = "" if pd.isna(row["spread"]) else f"{row['spread']:.2%}"
        cell = cell_name({factor: str(row[factor]) for factor in FACTORS})
        lines.append(
            f"{row['rank']:>4}  {row['val_accuracy']:>7.2%}  {spread:>6}  {row['seeds']:>5}  {row['epochs_run']:>6}  "
            f"{row['status']:<9}  {cell}"
        )
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
    parser = argparse.ArgumentParser(prog="python -m analysis.rank", description="Rank the cells of a grid.")
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
