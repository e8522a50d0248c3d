"""Is our grid fast? Runs it beside what a user would write with Ray Tune, and with Optuna, from their documentation.

    python -m benchmarks.grid_speed --data emnist-bymerge --data-dir DIR --csv speed.csv
    python -m benchmarks.grid_speed --report speed.csv

Each contender is a process of its own, timed from start to exit, in a new folder with a new MLflow store, which tells
what was trained. All train the same cells on the same images with the same learning rates, batch size and stopping by
thirds. The peers' code is in `benchmarks/peers`; they take from us the cut into train and validation and, unless
`--peer-init torch` is given, the standard deviations of the initial weights: with torch's own, which are smaller, they
are better by points after a few epochs. They train in float32 (the contender `ours_f32` is ours in float32), and judge
`asgd` by its weights as they are, not by their averages. Each repeat changes the order of the contenders and the peers'
seed; ours has the same seed throughout. Another invocation with the same `--csv` adds repeats to it.
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
from grid.arguments import Parser
from grid.config import InputError
from grid.data.catalogue import NAMES, check_name
from grid.data.load import load, split_indices
from grid.plan.space import ORDER_SEED
from grid.record.manifest import describe_code

MODELS = ("mlp", "cnn")
CONTENDERS = (OURS, "tune", "optuna", "ours_f32")
DEFAULT_CONTENDERS = ",".join(CONTENDERS[:3])
NEEDED = {"optuna": ("optuna", "optuna_integration")}
"""Contender -> packages that this project itself does not need."""
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
FOREIGN = ("MLFLOW_", "TUNE_", "OMP_NUM_THREADS", "RAY_ADDRESS")
"""How settings begin that a contender is not to inherit."""


@dataclass(frozen=True)
class Images:
    """What all contenders train on."""

    name: str
    folder: Path
    per_class: int | None
    split: Path
    """File with the positions of `train` and `val`."""
    train_count: int
    val_count: int


@dataclass(frozen=True)
class Job:
    """One model's runs, but for the contender and the repeat."""

    model: str
    factors: Factors
    images: Images
    epochs: int
    seeds: int
    """Trials of each cell."""
    peer_init: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a contender fails, 2 if an argument is wrong."""
    options = _parser().parse_args(arguments)
    try:
        if options.report is not None:
            print(report(read_rows(options.report)))
            return 0
        _check(options)
        rows = [] if options.csv is None or not options.csv.exists() else read_rows(options.csv)
        contenders = present(options.contenders)
        with tempfile.TemporaryDirectory(prefix="grid-speed-") as name:
            images = prepare(options, Path(name))
            for model in options.models:
                factors = QUICK_CELLS if options.quick else CELLS[model]
                job = Job(model, factors, images, options.epochs, options.seeds, options.peer_init)
                rows += run_job(job, contenders, options.repeats, rows, options.csv)
        print(report(rows))
        return 0
    except InputError as error:
        print(f"benchmarks.grid_speed: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{error.output}\nbenchmarks.grid_speed: {error}", file=sys.stderr)
        return 1


def present(contenders: Sequence[str]) -> list[str]:
    """Return the contenders whose packages are installed, and say what the others lack.

    Raises:
        InputError: None is left.
    """
    found = []
    for name in contenders:
        lacking = [package for package in NEEDED.get(name, ()) if find_spec(package) is None]
        if lacking:
            print(f"{name} is skipped: no {' and no '.join(lacking)} here; {HINT}", file=sys.stderr)
        else:
            found.append(name)
    if not found:
        raise InputError("no contender is left")
    return found


def prepare(options: argparse.Namespace, folder: Path) -> Images:
    """Look for the images, or make or fetch them, and write the split for the peers."""
    data_dir, per_class = options.data_dir.absolute(), options.per_class
    dataset = load(options.data, data_dir, per_class=per_class, split_seed=ORDER_SEED)
    labels = open_dataset(options.data, data_dir).targets.numpy()
    train, val = split_indices(labels - labels.min(), len(dataset.classes), per_class=per_class, split_seed=ORDER_SEED)
    split = folder / "split.npz"
    np.savez(split, train=train, val=val)
    return Images(options.data, data_dir, per_class, split, len(train), len(val))


def run_job(job: Job, contenders: Sequence[str], repeats: int, earlier: Sequence[Row], csv: Path | None) -> list[Row]:
    """Run the repeats of one model and return their rows, which are in the CSV file by then.

    Raises:
        InputError: Earlier rows are of another setting.
    """
    first = 1 + max((row.repeat for row in earlier if row.model == job.model), default=-1)
    rows: list[Row] = []
    for repeat in range(first, first + repeats):
        for name in turned(contenders, repeat):
            row = run(name, job, repeat)
            check_alike([*earlier, row])
            if csv is not None:
                append_row(csv, row)
            rows.append(row)
    return rows


def turned(contenders: Sequence[str], repeat: int) -> list[str]:
    """Return the order of a repeat: each contender takes each place once in as many repeats as there are contenders."""
    shift = repeat % len(contenders)
    return [*contenders[shift:], *contenders[:shift]]


def run(name: str, job: Job, repeat: int) -> Row:
    """Run one contender in a new folder and return what it made.

    Raises:
        subprocess.CalledProcessError: It failed; `output` is the end of what it wrote.
    """
    slots = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix=f"grid-speed-{name}-") as folder:
        if name.startswith(OURS):
            arguments = ["grid.run", *our_arguments(job, "float32" if name == "ours_f32" else "auto")]
        else:
            arguments = [f"benchmarks.peers.{name}_script", *peer_arguments(job, slots, repeat)]
        arguments += ["--store", f"sqlite:///{folder}/{STORE}"]
        seconds = timed([sys.executable, "-m", *arguments], Path(folder), f"{job.model} {name}, repeat {repeat}")
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
        peer_init=job.peer_init,
        slots=slots,
        commit=describe_code()["commit"],
    )


def our_arguments(job: Job, precision: str) -> list[str]:
    """Return the arguments of `grid.run`, but for the store."""
    levels = (f"model={job.model}", *(f"{factor}={','.join(names)}" for factor, names in job.factors.items()), *FIXED)
    some = [] if job.images.per_class is None else ["--per-class", str(job.images.per_class)]
    return [
        *("--grid", "full", *(word for level in levels for word in ("--only", level))),
        *("--data", job.images.name, "--data-dir", str(job.images.folder), *some),
        *("--epochs", str(job.epochs), "--seeds", str(job.seeds), "--controls", "0"),
        *("--address", "local", "--precision", precision),
    ]


def peer_arguments(job: Job, slots: int, repeat: int) -> list[str]:
    """Return the arguments of a script in `benchmarks/peers`, but for the store; each repeat has its own seeds."""
    seeds = range(repeat * job.seeds, (repeat + 1) * job.seeds)
    levels = (word for factor, names in job.factors.items() for word in (f"--{factor}s", ",".join(names)))
    return [
        *("--model", job.model, *levels, "--init", job.peer_init),
        *("--data", job.images.name, "--data-dir", str(job.images.folder), "--split", str(job.images.split)),
        *("--epochs", str(job.epochs), "--slots", str(slots), "--seeds", ",".join(map(str, seeds))),
    ]


def timed(command: Sequence[str], folder: Path, title: str) -> float:
    """Run a command to its end, show that it lives, and return the seconds from start to exit.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    _say(f"{title} ...")
    log = folder / "output.log"
    with log.open("wb") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=clean(os.environ), stdout=output, stderr=subprocess.STDOUT)
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


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a contender is alone, knows this project, trains on CPUs and reports to nobody."""
    kept = {name: value for name, value in environment.items() if not name.startswith(FOREIGN)}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **quiet, "PYTHONPATH": path}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.grid_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*MODELS, "both"), default="both", help="which nets are trained (both)")
    parser.add_argument("--contenders", default=DEFAULT_CONTENDERS, metavar="NAME[,NAME]", help=", ".join(CONTENDERS))
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of each contender (3)")
    parser.add_argument("--data", default="glyphs", metavar="NAME", help=f"{', '.join(NAMES)} (glyphs)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="files of data sets (data)")
    parser.add_argument("--per-class", type=int, metavar="N", help="training images per class (all)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of a trial that is not stopped (3)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trials of each cell (1)")
    parser.add_argument(
        "--peer-init",
        choices=("ours", "torch"),
        default="ours",
        help="standard deviation of their first weights (ours)",
    )
    parser.add_argument("--quick", action="store_true", help="2 cells, 20 images per class, once: does it work?")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add a line per run to this file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the tables of such a file; run nothing")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Check the options and fill what is missing.

    Raises:
        InputError: A value is wrong.
    """
    options.contenders = options.contenders.split(",")
    for name in options.contenders:
        if name not in CONTENDERS:
            raise InputError(f"unknown contender '{name}'; choose from {', '.join(CONTENDERS)}")
    if len(set(options.contenders)) < len(options.contenders):
        raise InputError("--contenders names one twice")
    check_name(options.data)
    options.models = MODELS if options.model == "both" else (options.model,)
    options.repeats = (1 if options.quick else 3) if options.repeats is None else options.repeats
    options.per_class = QUICK_PER_CLASS if options.quick and options.per_class is None else options.per_class
    for name in ("repeats", "epochs", "seeds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")


if __name__ == "__main__":
    sys.exit(main())
