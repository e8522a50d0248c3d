"""Does reduced precision reach the same accuracy as plain float32? The same cells and seeds, trained both ways.

    python -m benchmarks.fast_paths --data emnist-bymerge --data-dir DIR

Fast: the settings that `grid.run` chooses on this machine (bfloat16 where the processor has it, channels last, fused
optimizers). Plain: float32, contiguous, one kernel for each weight. Printed for each cell is the mean difference of the
final validation accuracies over the seeds, with its 95 % interval (paired, Student's t).
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy.stats import t

from grid.config import TrialConfig, cell_name
from grid.data.load import load
from grid.train.hardware import keep_freed_memory, numeric_settings
from grid.train.optimizers import OPTIMIZERS
from grid.train.trial import DeviceData, train

CELLS = (
    {"model": "mlp", "optimizer": "adam", "activation": "relu"},
    {"model": "mlp", "optimizer": "sgd", "activation": "gelu", "batch_norm": "on", "dropout": "on"},
    {"model": "cnn", "optimizer": "adam", "activation": "relu", "regularization": "elastic"},
    {"model": "cnn", "optimizer": "rmsprop", "activation": "elu", "batch_norm": "on", "dropout": "on"},
)


@dataclass(frozen=True)
class Difference:
    """Fast minus plain, as shares."""

    mean: float
    half_width: float
    """Of the 95 % interval."""

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0."""
        return abs(self.mean) <= self.half_width


def main() -> None:
    """Train both ways and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast_paths", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="glyphs", help="data set (glyphs)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of data sets (data)")
    parser.add_argument("--per-class", type=int, default=100, help="training images per class (100)")
    parser.add_argument("--epochs", type=int, default=5, help="(5)")
    parser.add_argument("--seeds", type=int, default=5, help="(5)")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="of the fast way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    data = DeviceData.from_dataset(load(options.data, options.data_dir, per_class=options.per_class))
    print(f"{'plain':>7} {'fast':>7} {'difference':>11} {'95 % interval':>18}  cell")
    for cell in CELLS:
        plain: list[float] = []
        fast: list[float] = []
        for seed in range(options.seeds):
            both = configs(cell, seed=seed, epochs=options.epochs, precision=options.precision, name=options.data)
            for accuracies, config in zip((plain, fast), both, strict=True):
                accuracies.append(train(config, data).reports[-1].val_accuracy)
        found = compare(plain, fast)
        interval = f"{found.mean - found.half_width:+.2%} to {found.mean + found.half_width:+.2%}"
        print(
            f"{statistics.mean(plain):>7.2%} {statistics.mean(fast):>7.2%} {found.mean:>+11.2%} {interval:>18}  "
            f"{cell_name(both[0].cell)}{'' if found.within_noise else '  BEYOND NOISE'}",
            flush=True,
        )


def configs(
    cell: dict[str, str], *, seed: int, epochs: int, precision: str, name: str
) -> tuple[TrialConfig, TrialConfig]:
    """Return the plain and the fast trial of a cell."""
    rate = OPTIMIZERS[cell["optimizer"]].base_learning_rate
    settings = {"learning_rate": repr(rate), "epochs": str(epochs), "seed": str(seed), "data": name}
    fast = TrialConfig.from_params(cell | settings | numeric_settings("cpu", precision))
    return replace(fast, precision="float32", memory_format="contiguous", fused=False), fast


def compare(plain: Sequence[float], fast: Sequence[float]) -> Difference:
    """Return the mean difference of paired accuracies with its interval."""
    pairs = [after - before for before, after in zip(plain, fast, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * error)


if __name__ == "__main__":
    main()
