"""Is a training step fast? Compares training with the peak speed of the processor. Needs neither Ray nor MLflow.

    python -m benchmarks.step_speed [--device cuda] [--threads 1] [--profile]     # 1 minute on one core

Trains each model on random images, in each precision: bare, and with every technique that costs time. The speed of
training (validation excluded) is compared with the fastest matrix product that torch reaches on this device in the same
precision. Only matrix products and convolutions count as work, with 2 FLOPs for each multiply-add:

    forward + gradient of the weights + gradient of the inputs (the first layer has none: images need no gradient)

Everything else that a step does, from batch norm to the optimizer, therefore lowers the share of the peak.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints when it starts and stops

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from grid.arguments import Parser, positive, run_command
from grid.config import InputError, TrialConfig, cell_name
from grid.parts.registry import ACTIONS, LEVELS, MODELS, OPTIMIZERS
from grid.train.hardware import keep_freed_memory, numeric_settings
from grid.train.trial import DeviceData, Trial, random_data
from grid.wording import count

CLASSES = 47
SIDE = 28
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 1.5
"""Time spent on each matrix size when the peak is measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each trial, print the table, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return run_command(parser.name, lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    data = random_images(options.images, options.device)
    peaks = {name: matmul_peak(dtype, options.device) for name, dtype in PRECISIONS.items()}
    print(f"{_device_name(options.device)}, torch {torch.__version__}, batch size {options.batch_size}")
    for name, peak in peaks.items():
        print(f"matmul peak in {name}: {peak / 1e9:,.0f} GFLOP/s")
    print(f"\n{'precision':<9} {'images/s':>9} {'MFLOP/image':>11} {'GFLOP/s':>9} {'of peak':>7}  trial")
    for config in trials(options):
        flops = flops_per_image(config, data)
        speed = images_per_second(config, data, options.repeats)
        rate = flops * speed
        print(
            f"{config.precision:<9} {speed:>9,.0f} {flops / 1e6:>11.2f} {rate / 1e9:>9,.0f} "
            f"{rate / peaks[config.precision]:>7.1%}  {cell_name(config.cell)}",
            flush=True,
        )
        if options.profile:
            print(top_operators(config, data, options.profile))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.step_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="kind of device (cpu)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (1, as for a trial)")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["mlp", "cnn"], help="nets to train (mlp and cnn)"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS), help="precisions (both)"
    )
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam", help="optimizer (adam)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images per step (128)")
    parser.add_argument("--images", type=positive, default=6400, metavar="N", help="training images per epoch (6400)")
    parser.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="timed epochs; the median is printed (5)"
    )
    parser.add_argument(
        "--techniques", action="store_true", help="time augmentation, mixup, ... as well, each beside the bare trial"
    )
    parser.add_argument(
        "--profile",
        type=positive,
        nargs="?",
        const=15,
        metavar="ROWS",
        help="print the slowest operators of each trial (15)",
    )
    return parser


def trials(options: argparse.Namespace) -> Iterator[TrialConfig]:
    """Yield the trials to time: each model and precision, bare and with the techniques that cost time."""
    for model in options.models:
        for precision in options.precisions:
            settings = numeric_settings(options.device, precision)
            params = settings | {
                "model": model,
                "optimizer": options.optimizer,
                "learning_rate": str(OPTIMIZERS[options.optimizer].base_learning_rate),
                "epochs": "1000",
                "batch_size": str(options.batch_size),
            }
            bare = TrialConfig.from_params(params)
            yield bare
            yield replace(bare, batch_norm=True, dropout=True)
            yield replace(bare, batch_norm=True, dropout=True, activation="gelu", regularization="elastic")
            if options.techniques:
                in_training = [factor for factor in ACTIONS if "prediction" not in ACTIONS[factor]]
                levels = [(factor, level) for factor in in_training for level in LEVELS[factor][1:]]
                yield from (TrialConfig.from_params(params | {factor: level}) for factor, level in levels)


def random_images(number: int, device: str) -> DeviceData:
    """Return random images and labels of the shape of EMNIST; see `grid.train.trial.random_data`."""
    return random_data(number, (1, SIDE, SIDE), CLASSES, device)


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of the fastest square matrix product."""
    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        until = time.perf_counter() + SECONDS
        while time.perf_counter() < until:
            seconds = _time(partial(torch.mm, left, right, out=out), device)
            best = max(best, 2 * size**3 / seconds)
    return best


def flops_per_image(config: TrialConfig, data: DeviceData) -> float:
    """Count the FLOPs of matrix products and convolutions, forward and backward, per training image."""
    trial = Trial(config, data)
    images = torch.zeros(config.batch_size, 1, SIDE, SIDE, device=config.device)
    with FlopCounterMode(display=False) as counter:
        trial.net.train()
        trial.net(images).sum().backward()
    return float(counter.get_total_flops()) / config.batch_size


def images_per_second(config: TrialConfig, data: DeviceData, repeats: int) -> float:
    """Return the median speed of training over `repeats` epochs, after a warm-up epoch."""
    trial = Trial(config, data)
    trial.run_epoch()
    return statistics.median(trial.run_epoch().samples_per_second for _ in range(repeats))


def top_operators(config: TrialConfig, data: DeviceData, rows: int) -> str:
    """Return the slowest operators of one epoch and their shares of its time, according to torch's profiler."""
    trial = Trial(config, data)
    trial.run_epoch()
    cuda = config.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        trial.run_epoch()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, order))
    total = sum(getattr(event, order) for event in events)
    lines = [f"    {getattr(event, order) / total:>6.1%} {event.count:>6} x {event.key}" for event in events[:rows]]
    return "\n".join(lines)


def _time(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {count(torch.get_num_threads(), 'thread')}"


if __name__ == "__main__":
    sys.exit(main())
