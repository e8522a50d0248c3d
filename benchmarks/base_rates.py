"""Which base learning rate suits each optimizer, and what would fewer rates cost? Source of `grid/parts/builtin.py`.

    python -m benchmarks.base_rates --data emnist-bymerge --data-dir DIR --csv rates.csv     # adds what it lacks
    python -m benchmarks.base_rates --report rates.csv                                       # prints its tables again

Trains each optimizer over a 1-2-5 ladder of rates around its present base rate, in cells that cross the rules of
initial weights, models and their sizes, batch norm, activations and schedules that are asked for. Accuracy is that of
the validation images after the last epoch; a training that diverges counts as zero. A file holds one budget and one set
of images: others are refused.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from grid.arguments import Parser, add_data_dir, positive, run_command
from grid.config import CHOICES, InputError, Params, TrialConfig
from grid.data.catalogue import NAMES, find_dataset
from grid.data.dataset import Dataset
from grid.data.load import load
from grid.parts import LEVELS
from grid.parts.registry import OPTIMIZERS
from grid.train.hardware import keep_freed_memory, numeric_settings
from grid.train.techniques.optimizers import base_learning_rate
from grid.train.trial import DeviceData, Trial
from grid.wording import count, first_line

LADDER = [mantissa * 10.0**exponent for exponent in (-4, -3, -2, -1) for mantissa in (1, 2, 5)]
CROSSED = {
    "initialization": (CHOICES["initialization"], CHOICES["initialization"][:1]),
    "model": (LEVELS["model"], LEVELS["model"]),
    "batch_norm": (LEVELS["batch_norm"], LEVELS["batch_norm"]),
    "dropout": (LEVELS["dropout"], ("off",)),
    "activation": (LEVELS["activation"], ("relu", "gelu")),
    "lr_schedule": (LEVELS["lr_schedule"], ("cosine",)),
    "channels": (None, (TrialConfig.channels,)),
    "dense_size": (None, (str(TrialConfig.dense_size),)),
}
"""Setting -> the values that may be asked for (None: any), and those that are crossed by default."""
BUDGET = ("data", "data_fingerprint", "epochs")
"""What all trainings of a file share."""
SETTINGS = (*CROSSED, "optimizer", "learning_rate", "seed", *BUDGET)
RESULTS = ("val_accuracy", "epoch_seconds", "weights")
GROUPS = {
    "one rate for each optimizer": [],
    "... and model": ["model"],
    "... and batch norm": ["batch_norm"],
    "... and model and batch norm": ["model", "batch_norm"],
    "... and schedule": ["lr_schedule"],
    "... and activation": ["activation"],
}
"""What may have a rate of its own."""
_data: DeviceData


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 if an argument is wrong."""
    options = _parser().parse_args(arguments)
    return run_command("benchmarks.base_rates", lambda: _report(options.report) if options.report else _sweep(options))


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.base_rates", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where trainings are added")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the tables of this file; train nothing")
    parser.add_argument("--data", default="glyphs", metavar="NAME", help=f"{', '.join(NAMES)} (glyphs)")
    add_data_dir(parser)
    parser.add_argument("--per-class", type=positive, metavar="N", help="training images per class (all)")
    parser.add_argument("--epochs", type=positive, default=3, metavar="N", help="epochs of each training (3)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="trainings of each cell and rate (1)")
    parser.add_argument("--below", type=int, default=2, metavar="N", help="rates below the base rate (2)")
    parser.add_argument("--above", type=int, default=2, metavar="N", help="rates above the base rate (2)")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="(all)")
    for name, (choices, chosen) in CROSSED.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, nargs="+", choices=choices, default=chosen, help=f"({' '.join(chosen)})")
    return parser


def _sweep(options: argparse.Namespace) -> int:
    find_dataset(options.data, options.data_dir)
    if options.csv is None:
        raise InputError("name the file that trainings are added to: --csv FILE")
    dataset = load(options.data, options.data_dir, per_class=options.per_class)
    budget = {"data": options.data, "data_fingerprint": dataset.fingerprint, "epochs": str(options.epochs)}
    done = trained_before(options.csv, budget)
    wanted = [params for params in plan(options, budget) if tuple(params[name] for name in SETTINGS) not in done]
    begun = time.monotonic()
    with get_context("spawn").Pool(len(os.sched_getaffinity(0)), _set_up, (dataset,)) as pool:
        for number, row in enumerate(pool.imap_unordered(_train, wanted, chunksize=1), start=1):
            pd.DataFrame([row]).to_csv(options.csv, mode="a", header=not options.csv.exists(), index=False)
            if number % 50 == 0 or number == len(wanted):
                print(f"{number:,} of {len(wanted):,} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return _report(options.csv)


def plan(options: argparse.Namespace, budget: Params) -> Iterator[Params]:
    """Yield the settings of each training that is asked for.

    Args:
        options: The command line.
        budget: A value for each name in `BUDGET`.
    """
    crossed = product(*(getattr(options, name) for name in CROSSED))
    for (optimizer, seed), values in product(product(options.optimizers, range(options.seeds)), crossed):
        cell = {**dict(zip(CROSSED, values, strict=True)), "optimizer": optimizer}
        for rate in around(base_learning_rate(cell), options.below, options.above):
            yield {**cell, "learning_rate": repr(rate), "seed": str(seed), **budget}


def around(rate: float, below: int, above: int) -> list[float]:
    """Return the rates of the ladder from so many below the one that is nearest to `rate` to so many above it."""
    nearest = min(range(len(LADDER)), key=lambda place: abs(LADDER[place] - rate))
    return LADDER[max(0, nearest - below) : nearest + above + 1]


def trained_before(file: Path, budget: Params) -> set[tuple[str, ...]]:
    """Return the settings of the trainings in a file, which need not exist.

    Raises:
        InputError: The file is none of this command's, or of another budget or other images.
    """
    if not file.exists():
        return set()
    rows = read(file)[list(SETTINGS)].astype(str)
    for name in BUDGET:
        if others := set(rows[name]) - {budget[name]}:
            raise InputError(f"{file} has trainings with {name} {min(others)}, not {budget[name]}; use another --csv")
    return set(rows.itertuples(index=False, name=None))


def read(file: Path) -> pd.DataFrame:
    """Read a file of trainings.

    Raises:
        InputError: It can't be read, or is none of this command's.
    """
    try:
        rows = pd.read_csv(file, dtype=dict.fromkeys(SETTINGS, str))
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        raise InputError(f"can't read {file}: {first_line(error)}") from error
    if list(rows.columns) != [*SETTINGS, *RESULTS]:
        raise InputError(f"{file} was not written by --csv: its header line differs")
    return rows


def _set_up(dataset: Dataset) -> None:
    global _data
    torch.set_num_threads(1)
    keep_freed_memory()  # as a worker does
    _data = DeviceData.from_dataset(dataset)


def _train(params: Params) -> Params:
    config = TrialConfig.from_params({**numeric_settings("cpu"), **params})
    trial = Trial(config, _data)
    reports = [trial.run_epoch()]
    while not reports[-1].diverged and trial.epoch < config.epochs:
        reports.append(trial.run_epoch())
    return {
        **params,
        "val_accuracy": "0" if reports[-1].diverged else repr(reports[-1].val_accuracy),
        "epoch_seconds": f"{median(report.epoch_seconds for report in reports):.3f}",
        "weights": str(sum(parameter.numel() for parameter in trial.net.parameters())),
    }


def _report(file: Path) -> int:
    trained = read(file).astype({"learning_rate": float})
    columns = [name for name in CROSSED if trained[name].nunique() > 1 and name not in ("activation", "lr_schedule")]
    print(f"{count(len(trained), 'training')} of {trained['epochs'].iloc[0]} epochs on {trained['data'].iloc[0]}")
    for optimizer, rows in trained.groupby("optimizer", sort=False):
        print(f"\n{optimizer}: validation accuracy in %, mean over {_varied(rows, columns)}")
        print(rate_table(rows, columns))
    costs = pd.concat({rule: cost_table(rows) for rule, rows in trained.groupby("initialization", sort=False)}, axis=1)
    print(f"\npoints lost to the best rate of each cell, mean over cells (worst in ten)\n{costs.to_string()}")
    print(f"\naccuracy in % at the best rate, and the rate\n{best_table(trained, columns)}")
    return 0


def rate_table(rows: pd.DataFrame, columns: Sequence[str]) -> str:
    """Return the accuracy of each rate of one optimizer, one column for each combination of `columns`."""
    table = 100 * rows.pivot_table("val_accuracy", "learning_rate", list(columns) or ["model"])
    base = rows["learning_rate"].map("{:g}".format)
    table.index = pd.Index(sorted(base.unique(), key=float), name="rate")
    return table.to_string(float_format="{:.2f}".format)


def regrets(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the points that each rate loses to the best rate of its cell, both means over seeds."""
    cell = [*CROSSED, "optimizer"]
    means = rows.groupby([*cell, "learning_rate"], as_index=False)[["val_accuracy"]].mean()
    best = means.groupby(cell)["val_accuracy"].transform("max")
    return means.assign(points=100 * (best - means["val_accuracy"]))


def cost_table(rows: pd.DataFrame) -> pd.Series:
    """Return what each rule of `GROUPS` loses if every group has the rate that loses least on average.

    A rule is left out if one of its factors has a single level.
    """
    lost = regrets(rows)
    costs = {}
    for rule, factors in GROUPS.items():
        if any(rows[factor].nunique() < 2 for factor in factors):
            continue  # the groups would be those of another rule
        of_cells = []
        for _, group in lost.groupby(["optimizer", *factors]):
            table = group.pivot_table("points", [*CROSSED, "optimizer"], "learning_rate").dropna(axis=1)
            of_cells.append(table[table.mean().idxmin()])
        points = pd.concat(of_cells)
        costs[rule] = f"{points.mean():.2f} ({points.quantile(0.9):.2f})"
    return pd.Series(costs)


def best_table(trained: pd.DataFrame, columns: Sequence[str]) -> str:
    """Return the accuracy at the rate that suits each combination of optimizer and `columns` best."""
    keys = [*columns, "optimizer"]
    means = trained.groupby([*keys, "learning_rate"], as_index=False)[list(RESULTS)].mean()
    best = means.loc[means.groupby(keys)["val_accuracy"].idxmax()]
    shown = best.assign(val_accuracy=100 * best["val_accuracy"])
    return shown.to_string(
        index=False,
        formatters={
            "val_accuracy": "{:.2f}".format,
            "learning_rate": "{:g}".format,
            "epoch_seconds": "{:.2f}".format,
            "weights": "{:,.0f}".format,
        },
    )


def _varied(rows: pd.DataFrame, columns: Sequence[str]) -> str:
    averaged = [name for name in (*CROSSED, "seed") if name not in columns and rows[name].nunique() > 1]
    return ", ".join(f"{name} {' '.join(map(str, rows[name].unique()))}" for name in averaged) or "one training"


if __name__ == "__main__":
    sys.exit(main())
