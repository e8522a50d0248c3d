r"""A table of real learning curves: the full grid, never stopped, on real images. Loads it, and writes it anew.

`curves.csv` holds for each cell of a grid, and for each of its seeds, the validation images that were right after
every epoch; models may have different numbers of seeds. On it any stopping rule, any draw of controls and any
estimator can be replayed in seconds. The images are a ByMerge-47 cut of EMNIST, 60 per class to train on.

    python -m grid.run --grid full --data emnist-bymerge --data-dir DIR --per-class 60 --epochs 9 \
        --seeds 2 --no-stopping --experiment curves     # hours on two cores
    python -m benchmarks.replay.curves --experiment curves
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.curves import read_curves
from analysis.store import read_experiment
from grid.arguments import Parser, add_experiment, add_store, run_command
from grid.config import FACTORS, InputError
from grid.parts import LEVELS
from grid.wording import count

PATH = Path(__file__).with_name("curves.csv")
VAL_IMAGES = 4465
"""Validation images of the cut: 95 for each of 47 classes."""
EPOCHS = 9
STEPS = 60 * 47 // 128
"""In an epoch: 60 training images of each class, in batches of 128."""
COLUMNS = [str(epoch) for epoch in range(1, EPOCHS + 1)]


def load_curves(path: Path = PATH) -> pd.DataFrame:
    """Return the learning curves.

    Returns:
        The factors, `seed`, and `1` to `9`: validation accuracy after that epoch, NaN from the epoch on in which the
        training diverged. Sorted by seed, then by the order of the levels in `grid.parts.LEVELS`.
    """
    table = pd.read_csv(path, comment="#", keep_default_na=False, na_values={name: [""] for name in COLUMNS})
    table[COLUMNS] = table[COLUMNS] / VAL_IMAGES
    return table


def export(store: str | None, experiment: str, path: Path) -> int:
    """Write the curves of an experiment's completed and diverged trials; return how many there are.

    A seed of which a model has fewer cells than of another is not written: its training has not ended.

    Raises:
        InputError: The store can't be read, or a trial was stopped.
    """
    found = read_experiment(store, experiment)
    trials = found.trials[found.trials["status"].isin(("completed", "diverged"))]
    if len(trials) < len(found.trials):
        raise InputError(f"experiment '{experiment}' has stopped or failed trials; train it with --no-stopping")
    if found.val_images != VAL_IMAGES:
        raise InputError(f"experiment '{experiment}' has {found.val_images} validation images, not {VAL_IMAGES}")
    trials = _whole_seeds(trials)
    histories = read_curves(found, trials["run_id"])
    wide = histories.pivot_table(index="run_id", columns="epoch", values="val_accuracy")
    correct = (wide.reindex(columns=range(1, EPOCHS + 1)) * VAL_IMAGES).round().astype("Int64")
    table = trials[["run_id", *FACTORS, "seed"]].join(correct.set_axis(COLUMNS, axis=1), on="run_id")
    table = table.sort_values(["seed", *FACTORS], key=_place, ignore_index=True).drop(columns="run_id")
    commit = found.manifest.get("commit", "unknown")
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# validation images that were right of {VAL_IMAGES} after each epoch; commit {commit}\n")
        table.to_csv(file, index=False, lineterminator="\n")
    return len(table)


def _whole_seeds(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of those seeds of a model that have the most cells."""
    cells = trials.groupby(["model", "seed"])["cell_key"].transform("nunique")
    return trials[cells == cells.groupby(trials["model"]).transform("max")]


def describe(curves: pd.DataFrame) -> str:
    """Return which cells and seeds a table of curves has, such as `mlp: 960 cells x 2 seeds`."""
    models = curves.groupby("model", sort=False)
    return ", ".join(
        f"{name}: {count(len(rows[list(FACTORS)].drop_duplicates()), 'cell')} x {count(rows['seed'].nunique(), 'seed')}"
        for name, rows in models
    )


def in_order(curves: pd.DataFrame) -> pd.DataFrame:
    """Return curves sorted by the order of the levels."""
    return curves.sort_values(list(FACTORS), key=_place, ignore_index=True)


def _place(values: "pd.Series[Any]") -> "pd.Series[Any]":
    levels = LEVELS.get(str(values.name), ())
    return values.map({level: place for place, level in enumerate(levels)}) if levels else values


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table from an experiment, and return the exit code."""
    parser = Parser(
        prog="python -m benchmarks.replay.curves",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument("--output", type=Path, default=PATH, metavar="FILE", help="where to write the table")
    options = parser.parse_args(arguments)

    def write() -> int:
        number = export(options.store, options.experiment, options.output)
        print(f"{number:,} curves in {options.output} ({describe(load_curves(options.output))})")
        return 0

    return run_command(parser.name, write)


if __name__ == "__main__":
    raise SystemExit(main())
