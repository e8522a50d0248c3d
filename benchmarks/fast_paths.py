"""Is reduced precision as accurate as plain float32? Trains the same cells with the same seeds both ways.

    python -m benchmarks.fast_paths --data emnist-bymerge --data-dir DIR     # 3 minutes

Fast: the settings that `grid.run` chooses on this machine (bfloat16 where the processor supports it, channels last,
fused optimizers). Plain: float32, contiguous memory, one kernel for each weight. Prints for each cell the mean
difference between the final validation accuracies over the seeds, with its 95 % interval (paired, Student's t).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import t

from grid.arguments import Parser, add_data_dir, positive, run_command
from grid.config import InputError, TrialConfig, cell_name
from grid.data.catalogue import NAMES, find_dataset
from grid.data.load import load
from grid.parts.registry import OPTIMIZERS
from grid.train.hardware import keep_freed_memory, numeric_settings
from grid.train.trial import DeviceData, train

CELLS = (
    {"model": "mlp", "optimizer": "adam", "activation": "relu"},
    {"model": "mlp", "optimizer": "sgd", "activation": "gelu", "batch_norm": "on", "dropout": "on"},
    {"model": "cnn", "optimizer": "adam", "activation": "relu", "regularization": "elastic"},
    {"model": "cnn", "optimizer": "rmsprop", "activation": "elu", "batch_norm": "on", "dropout": "on"},
)


@dataclass(frozen=True)
class Difference:
    """Mean accuracy of the fast way minus that of the plain way, in [-1, 1]."""

    mean: float
    half_width: float
    """Half the width of the 95 % interval."""

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains 0."""
        return abs(self.mean) <= self.half_width


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both ways, print a row for each cell, and return the exit code."""
    parser = Parser(prog="python -m benchmarks.fast_paths", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="glyphs", metavar="NAME", help=f"{', '.join(NAMES)} (glyphs)")
    add_data_dir(parser)
    parser.add_argument("--per-class", type=positive, default=100, metavar="N", help="training images per class (100)")
    parser.add_argument("--epochs", type=positive, default=5, metavar="N", help="epochs of each training (5)")
    parser.add_argument(
        "--seeds", type=positive, default=5, metavar="N", help="pairs of trainings per cell, at least 2 (5)"
    )
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="precision of the fast way (auto)"
    )
    options = parser.parse_args(arguments)
    return run_command("benchmarks.fast_paths", lambda: _compare_cells(options))


def _compare_cells(options: argparse.Namespace) -> int:
    find_dataset(options.data, options.data_dir)
    if options.seeds < 2:
        raise InputError(f"--seeds must be at least 2, got {options.seeds}")
    torch.set_num_threads(1)
    keep_freed_memory()
    data = DeviceData.from_dataset(load(options.data, options.data_dir, per_class=options.per_class))
    print(f"{'plain':>7} {'fast':>7} {'difference':>11} {'95 % interval':>18}  cell")
    for cell in CELLS:
        plain, fast = train_both_ways(cell, data, options)
        found = compare(plain, fast)
        interval = f"{found.mean - found.half_width:+.2%} to {found.mean + found.half_width:+.2%}"
        print(
            f"{statistics.mean(plain):>7.2%} {statistics.mean(fast):>7.2%} {found.mean:>+11.2%} {interval:>18}  "
            f"{cell_name(cell)}{'' if found.within_noise else '  BEYOND NOISE'}",
            flush=True,
        )
    return 0


def train_both_ways(
    cell: dict[str, str], data: DeviceData, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Return the final validation accuracies of the plain and of the fast trials, one of each for every seed."""
    plain: list[float] = []
    fast: list[float] = []
    for seed in range(options.seeds):
        both = configs(cell, seed=seed, epochs=options.epochs, precision=options.precision, name=options.data)
        for accuracies, config in zip((plain, fast), both, strict=True):
            accuracies.append(train(config, data).reports[-1].val_accuracy)
    return plain, fast


def configs(
    cell: dict[str, str], *, seed: int, epochs: int, precision: str, name: str
) -> tuple[TrialConfig, TrialConfig]:
    """Return the trial of a cell in the plain and in the fast way.

    Args:
        cell: Levels by factor.
        seed: Seed of both trials.
        epochs: Budget of both trials.
        precision: Precision of the fast way: `auto`, `float32` or `bfloat16`.
        name: Name of the data set.
    """
    rate = OPTIMIZERS[cell["optimizer"]].base_learning_rate
    settings = {"learning_rate": repr(rate), "epochs": str(epochs), "seed": str(seed), "data": name}
    fast = TrialConfig.from_params(cell | settings | numeric_settings("cpu", precision))
    return replace(fast, precision="float32", memory_format="contiguous", fused=False), fast


def compare(plain: Sequence[float], fast: Sequence[float]) -> Difference:
    """Return the mean difference between paired accuracies, with its interval."""
    pairs = [after - before for before, after in zip(plain, fast, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * error)


if __name__ == "__main__":
    sys.exit(main())
