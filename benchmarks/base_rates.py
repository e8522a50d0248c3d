"""Which base learning rate suits each optimizer? A sweep over a 1-2-5 ladder, the source of `grid.train.optimizers`.

    python -m benchmarks.base_rates --data emnist-bymerge --data-dir DIR     # 16 minutes on two cores

For each optimizer and rate it trains four cells of each model (batch norm on and off, activation relu and gelu) and
prints the mean of their best validation accuracies. The base rate is the one whose worse model is closest to that
model's own best: both models share one rate, so that an optimizer means the same in every cell.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from multiprocessing import get_context

import torch

from grid.arguments import Parser, add_data_dir, run_command
from grid.config import TrialConfig
from grid.data.catalogue import NAMES, check_name
from grid.data.dataset import Dataset
from grid.data.load import load
from grid.train.hardware import numeric_settings
from grid.train.optimizers import OPTIMIZERS
from grid.train.trial import DeviceData, train

Job = tuple[str, float, str, int]
"""Optimizer, learning rate, model, epochs."""
RATES = [mantissa * 10.0**exponent for exponent in (-4, -3, -2, -1) for mantissa in (1, 2, 5)]
MODELS = ("mlp", "cnn")
_data: DeviceData


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep, print its tables, and return the exit code."""
    parser = Parser(prog="python -m benchmarks.base_rates", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="glyphs", metavar="NAME", help=f"{', '.join(NAMES)} (glyphs)")
    add_data_dir(parser)
    parser.add_argument("--per-class", type=int, default=100, metavar="N", help="training images per class (100)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="epochs of each training (3)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="optimizers to sweep (all)"
    )
    options = parser.parse_args(arguments)
    return run_command("benchmarks.base_rates", lambda: _sweep(options))


def _sweep(options: argparse.Namespace) -> int:
    check_name(options.data)
    dataset = load(options.data, options.data_dir, per_class=options.per_class)
    begun = time.monotonic()
    print(f"{'optimizer':<10} {'rate':>7}  " + "  ".join(f"{model:>7}" for model in MODELS) + "  behind the best rate")
    with get_context("spawn").Pool(len(os.sched_getaffinity(0)), _set_up, (dataset,)) as pool:
        for optimizer in options.optimizers:
            jobs = [(optimizer, rate, model, options.epochs) for rate in RATES for model in MODELS]
            _print_optimizer(optimizer, dict(zip(jobs, pool.map(_accuracy, jobs, chunksize=1), strict=True)))
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


def _set_up(dataset: Dataset) -> None:
    global _data
    torch.set_num_threads(1)
    _data = DeviceData.from_dataset(dataset)


def _accuracy(job: Job) -> float:
    optimizer, rate, model, epochs = job
    numeric = numeric_settings("cpu")
    accuracies = []
    for batch_norm, activation in product(("off", "on"), ("relu", "gelu")):
        config = TrialConfig.from_params(
            {
                **numeric,
                "model": model,
                "optimizer": optimizer,
                "batch_norm": batch_norm,
                "activation": activation,
                "learning_rate": repr(rate),
                "epochs": str(epochs),
            }
        )
        accuracies.append(
            train(config, _data).best_val_accuracy or 0.0
        )  # diverged in its first epoch: the worst result
    return statistics.mean(accuracies)


def _print_optimizer(optimizer: str, accuracies: dict[Job, float]) -> None:
    table: dict[float, dict[str, float]] = {rate: {} for rate in RATES}
    for (_, rate, model, _), accuracy in accuracies.items():
        table[rate][model] = accuracy
    best = {model: max(row[model] for row in table.values()) for model in MODELS}
    behind = {rate: max(best[model] - row[model] for model in MODELS) for rate, row in table.items()}
    chosen = min(behind, key=behind.__getitem__)
    for rate, row in table.items():
        figures = "  ".join(f"{row[model]:>7.2%}" for model in MODELS)
        mark = "  <- best for both" if rate == chosen else ""
        mark += "  (base rate)" if rate == OPTIMIZERS[optimizer].base_learning_rate else ""
        print(f"{optimizer:<10} {rate:>7.4g}  {figures}  {behind[rate]:>7.2%}{mark}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
