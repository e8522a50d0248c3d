"""Is the grid fast? Compares it with what a user would write with Ray Tune, and with Optuna, from their documentation.

    python -m benchmarks.grid_speed --data emnist-bymerge --data-dir DIR --csv speed.csv     # 25 minutes on two cores
    python -m benchmarks.grid_speed --report speed.csv                                       # prints its tables again

Measures the wall time of whole processes from start to exit, and divides it by the epochs trained. Each contender runs
in a new folder with a new MLflow store, which says what was trained. All train the same cells on the same images, with
the same learning rates, batch size and rule of early stopping (the best third continues). What differs:

- The scripts of the peers (`benchmarks/peers`) get from us the split into train and validation; their initial weights
  are torch's own.
- The peers train in float32, we in bfloat16 where the processor has it; `ours_f32` is our grid in float32.
- The peers evaluate the current weights of `asgd`, we evaluate the averaged ones.
- Each repeat changes the order of the contenders and the seed of the peers; our seed stays the same.

Running the command again with the same `--csv` adds repeats to the file.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.grid_speed_table import OURS, Row, append_row, check_alike, read_rows, read_store, report
from benchmarks.peers.common import open_dataset
from grid.arguments import Parser, add_data_dir, positive, run_command
from grid.config import InputError
from grid.data.catalogue import NAMES
from grid.data.load import load, split_indices
from grid.plan.space import ORDER_SEED
from grid.record.commands import describe_code

MODELS = ("mlp", "cnn")
READ_BY_PEERS = tuple(name for name in NAMES if name == "glyphs" or name.startswith("emnist"))
CONTENDERS = (OURS, "tune", "optuna", "ours_f32")
DEFAULT_CONTENDERS = ",".join(CONTENDERS[:3])
NEEDED = {"optuna": ("optuna", "optuna_integration")}
"""Contender -> packages that it needs and this project does not."""
HINT = 'pip install -e ".[bench]"'
Factors = dict[str, tuple[str, ...]]
CELLS: dict[str, Factors] = {
    "mlp": {
        "optimizer": ("sgd", "adam", "rmsprop", "asgd", "adagrad"),
        "activation": ("relu", "leaky_relu", "elu", "gelu"),
    },
    "cnn": {"optimizer": ("sgd", "adam", "adagrad"), "activation": ("relu", "gelu")},
}
QUICK_CELLS: Factors = {"optimizer": ("adam",), "activation": ("relu", "gelu")}
QUICK_PER_CLASS = 20
FIXED = ("lr_schedule=constant", "batch_norm=on", "regularization=none", "dropout=on")
STORE = "mlflow.db"
HEARTBEAT_SECONDS = 30.0
ROOT = Path(__file__).resolve().parents[1]
NOT_INHERITED = ("MLFLOW_", "TUNE_", "OMP_NUM_THREADS", "RAY_ADDRESS")
"""Prefixes of environment variables that no contender may inherit."""


@dataclass(frozen=True)
class Images:
    """The images that all contenders train on."""

    name: str
    folder: Path
    per_class: int | None
    split: Path
    """NumPy file with the positions of the `train` and the `val` images."""
    train_count: int
    val_count: int


@dataclass(frozen=True)
class Job:
    """What all contenders do with one model."""

    model: str
    factors: Factors
    images: Images
    epochs: int
    seeds: int
    """Trials of each cell."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a contender fails, 2 if an argument is wrong."""
    options = _parser().parse_args(arguments)
    return run_command("benchmarks.grid_speed", lambda: _report(options) if options.report else _run(options))


def _report(options: argparse.Namespace) -> int:
    print(report(read_rows(options.report)))
    return 0


def _run(options: argparse.Namespace) -> int:
    _check(options)
    rows = read_rows(options.csv) if options.csv and options.csv.exists() else []
    contenders = installed(options.contenders)
    try:
        with tempfile.TemporaryDirectory(prefix="grid-speed-") as name:
            images = prepare(options, Path(name))
            for model in options.models:
                factors = QUICK_CELLS if options.quick else CELLS[model]
                job = Job(model, factors, images, options.epochs, options.seeds)
                rows += run_job(job, contenders, options.repeats, rows, options.csv)
    except subprocess.CalledProcessError as error:
        print(f"{error.output}\nbenchmarks.grid_speed: {error}", file=sys.stderr)
        return 1
    print(report(rows))
    return 0


def installed(contenders: Sequence[str]) -> list[str]:
    """Return the contenders whose packages are installed; print which are skipped, and why.

    Raises:
        InputError: No contender is left.
    """
    found = []
    for name in contenders:
        lacking = [package for package in NEEDED.get(name, ()) if find_spec(package) is None]
        if lacking:
            print(f"{name} is skipped: {' and '.join(lacking)} not installed; run: {HINT}", file=sys.stderr)
        else:
            found.append(name)
    if not found:
        raise InputError("no contender is left: the packages of all of them are missing")
    return found


def prepare(options: argparse.Namespace, folder: Path) -> Images:
    """Load the images (rendered or downloaded if they are missing), and write the split for the peers to a file."""
    data_dir, per_class = options.data_dir.absolute(), options.per_class
    dataset = load(options.data, data_dir, per_class=per_class, split_seed=ORDER_SEED)
    labels = open_dataset(options.data, data_dir).targets.numpy()
    train, val = split_indices(labels - labels.min(), len(dataset.classes), per_class=per_class, split_seed=ORDER_SEED)
    split = folder / "split.npz"
    np.savez(split, train=train, val=val)
    return Images(options.data, data_dir, per_class, split, len(train), len(val))


def run_job(job: Job, contenders: Sequence[str], repeats: int, earlier: Sequence[Row], csv: Path | None) -> list[Row]:
    """Run the repeats of one model, add each to the CSV file, and return their rows.

    Args:
        job: What is trained.
        contenders: Names of the contenders.
        repeats: Runs of each contender.
        earlier: Rows of earlier invocations; their repeats are not numbered again.
        csv: File to which rows are added; None for no file.

    Raises:
        InputError: Earlier rows were made with other settings.
    """
    first = 1 + max((row.repeat for row in earlier if row.model == job.model), default=-1)
    rows: list[Row] = []
    for repeat in range(first, first + repeats):
        for name in rotate(contenders, repeat):
            row = run(name, job, repeat)
            check_alike([*earlier, row])
            if csv is not None:
                append_row(csv, row)
            rows.append(row)
    return rows


def rotate(contenders: Sequence[str], repeat: int) -> list[str]:
    """Return the contenders rotated by `repeat` places, so that each of them is first, second, ... equally often."""
    shift = repeat % len(contenders)
    return [*contenders[shift:], *contenders[:shift]]


def run(name: str, job: Job, repeat: int) -> Row:
    """Run one contender in a new folder and return what it achieved.

    Raises:
        subprocess.CalledProcessError: The contender failed; `output` holds the last lines that it printed.
    """
    slots = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix=f"grid-speed-{name}-") as folder:
        if name.startswith(OURS):
            arguments = ["grid.run", *our_arguments(job, "float32" if name == "ours_f32" else "auto")]
        else:
            arguments = [f"benchmarks.peers.{name}_script", *peer_arguments(job, slots, repeat)]
        arguments += ["--store", f"sqlite:///{folder}/{STORE}"]
        seconds = time_command([sys.executable, "-m", *arguments], Path(folder), f"{job.model} {name}, repeat {repeat}")
        stored = read_store(Path(folder) / STORE)
    return Row(
        model=job.model,
        contender=name,
        repeat=repeat,
        wall_seconds=seconds,
        trials=stored.trials,
        epochs=stored.epochs,
        epoch_seconds=stored.epoch_seconds,
        best_val_accuracy=stored.best_val_accuracy,
        cells=math.prod(len(levels) for levels in job.factors.values()),
        seeds=job.seeds,
        budget=job.epochs,
        data=job.images.name,
        train_images=job.images.train_count,
        val_images=job.images.val_count,
        slots=slots,
        commit=describe_code()["commit"],
    )


def our_arguments(job: Job, precision: str) -> list[str]:
    """Return the arguments of `grid.run`, except the store."""
    levels = (f"model={job.model}", *(f"{factor}={','.join(names)}" for factor, names in job.factors.items()), *FIXED)
    subset = [] if job.images.per_class is None else ["--per-class", str(job.images.per_class)]
    return [
        *("--grid", "full", *(word for level in levels for word in ("--only", level))),
        *("--data", job.images.name, "--data-dir", str(job.images.folder), *subset),
        *("--epochs", str(job.epochs), "--seeds", str(job.seeds), "--controls", "0"),
        *("--address", "local", "--precision", precision, "--no-report"),
    ]


def peer_arguments(job: Job, slots: int, repeat: int) -> list[str]:
    """Return the arguments of a script in `benchmarks/peers`, except the store; each repeat has its own seeds."""
    seeds = range(repeat * job.seeds, (repeat + 1) * job.seeds)
    levels = (word for factor, names in job.factors.items() for word in (f"--{factor}s", ",".join(names)))
    return [
        *("--model", job.model, *levels),
        *("--data", job.images.name, "--data-dir", str(job.images.folder), "--split", str(job.images.split)),
        *("--epochs", str(job.epochs), "--slots", str(slots), "--seeds", ",".join(map(str, seeds))),
    ]


def time_command(command: Sequence[str], folder: Path, title: str) -> float:
    """Run a command and return the seconds from its start to its exit; print a sign of life every 30 s.

    Args:
        command: Program and arguments.
        folder: Where it runs; its output goes into `output.log` there.
        title: Starts each line that is printed on stderr.

    Raises:
        subprocess.CalledProcessError: The command failed; `output` holds the last lines that it printed.
    """
    _say(f"{title} ...")
    log = folder / "output.log"
    with log.open("wb") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=isolate(os.environ), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(HEARTBEAT_SECONDS)
                except subprocess.TimeoutExpired:
                    _say(f"{title} ... {time.perf_counter() - begun:.0f} s")
        finally:
            process.kill()
        seconds = time.perf_counter() - begun
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise subprocess.CalledProcessError(process.returncode, command, tail)
    _say(f"{title}: {seconds:.1f} s")
    return seconds


def isolate(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with this project on its path, but without a cluster, a store, GPUs or usage reports."""
    kept = {name: value for name, value in environment.items() if not name.startswith(NOT_INHERITED)}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **settings, "PYTHONPATH": path}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.grid_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*MODELS, "both"), default="both", help="nets to train (both)")
    parser.add_argument(
        "--contenders",
        default=DEFAULT_CONTENDERS,
        metavar="NAME[,NAME]",
        help=f"{', '.join(CONTENDERS)} ({DEFAULT_CONTENDERS})",
    )
    parser.add_argument("--repeats", type=positive, metavar="N", help="runs of each contender (3)")
    parser.add_argument("--data", default="glyphs", metavar="NAME", help=f"{', '.join(READ_BY_PEERS)} (glyphs)")
    add_data_dir(parser)
    parser.add_argument("--per-class", type=positive, metavar="N", help="training images per class (all)")
    parser.add_argument(
        "--epochs", type=positive, default=3, metavar="N", help="budget of a trial that is not stopped (3)"
    )
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="trials of each cell (1)")
    parser.add_argument("--quick", action="store_true", help="try it out: 2 cells, 20 images per class, 1 repeat")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add a line per run to this file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the tables of such a file, run nothing")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Check the options and fill in the defaults that depend on others.

    Raises:
        InputError: An option has a wrong value.
    """
    options.contenders = options.contenders.split(",")
    for name in options.contenders:
        if name not in CONTENDERS:
            raise InputError(f"unknown contender '{name}'; choose from {', '.join(CONTENDERS)}")
    if len(set(options.contenders)) < len(options.contenders):
        raise InputError(f"--contenders must differ, got {','.join(options.contenders)}")
    if options.data not in READ_BY_PEERS:
        raise InputError(f"unknown data set '{options.data}'; choose from {', '.join(READ_BY_PEERS)}")
    options.models = MODELS if options.model == "both" else (options.model,)
    options.repeats = (1 if options.quick else 3) if options.repeats is None else options.repeats
    options.per_class = QUICK_PER_CLASS if options.quick and options.per_class is None else options.per_class


if __name__ == "__main__":
    sys.exit(main())
