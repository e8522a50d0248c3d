"""Is the analysis of a big grid fast? Times it on a store of 10,000 trials, next to a plain MLflow loop.

    python -m benchmarks.big_store     # 4 minutes on two cores
    python -m benchmarks.big_store --postgres

The store is a database that MLflow created: sqlite, or a PostgreSQL that is started for it. It is filled through
MLflow's own tables, and read back through MLflow's client before anything is timed. The trials are those of the grid
`full`, with as many seeds as necessary and simulated accuracies.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from sqlalchemy import create_engine, insert, text

from analysis.curves import read_curves
from analysis.estimates.cells import rank_cells
from analysis.estimates.rung_effects import measure_rung_effects
from analysis.stopping.figures import audit_stopping
from analysis.store import Experiment, read_experiment
from benchmarks.servers import postgres
from grid.arguments import Parser, positive, run_command
from grid.config import FACTORS, InputError, TrialConfig
from grid.metrics import EPOCH_METRICS, RUNG_METRIC
from grid.parts import LEVELS
from grid.parts.registry import GRIDS
from grid.plan.asha import FACTOR, Asha, rung_epochs
from grid.plan.controls import draw_controls
from grid.plan.space import ORDER_SEED, Cell, cross, expand
from grid.record.store import Store
from grid.store_uri import sqlite_path

EXPERIMENT = "big"
EPOCHS = 27
CONTROLS = 0.05
"""Share of unstopped controls among the trials."""
VAL_IMAGES = 18_800
FIRST_START = 1_750_000_000_000
"""Start of the first trial, in milliseconds since 1970."""
CHECKED = 25
"""Number of runs that are compared, value by value, with what was written."""
TABLES = (SqlRun, SqlParam, SqlTag, SqlMetric, SqlLatestMetric)
Row = dict[str, Any]


@dataclass(frozen=True)
class SimulatedTrial:
    """A trial that was trained by formula."""

    run_id: str
    config: TrialConfig
    control: bool
    status: str
    accuracies: tuple[float, ...]
    """Validation accuracy after each epoch; the epoch in which a trial diverges has none."""
    epochs_run: int
    rungs: tuple[int, ...]

    @property
    def tags(self) -> dict[str, str]:
        """The tags that `grid.record` writes."""
        config, control = self.config, "true" if self.control else "false"
        tags = {"kind": "trial", "trial_key": config.trial_key, "cell_key": config.cell_key, "control": control}
        stopped = {"stopped_at_epoch": str(self.epochs_run)} if self.status == "stopped" else {}
        return {**tags, "status": self.status, "mlflow.runName": config.name, **stopped}

    @property
    def history(self) -> Iterator[tuple[str, int, float]]:
        """Name, step and value of every metric, in the order in which they were reported."""
        for epoch, accuracy in enumerate(self.accuracies, start=1):
            yield from ((name, epoch, accuracy if name == "val_accuracy" else 1 - accuracy) for name in EPOCH_METRICS)
            if epoch in self.rungs:
                yield f"{RUNG_METRIC}{epoch}", epoch, accuracy
        if self.accuracies:
            yield "best_val_accuracy", self.epochs_run, max(self.accuracies)
        yield "epochs_run", self.epochs_run, float(self.epochs_run)


def simulate_grid(runs: int, seed: int = 0) -> list[SimulatedTrial]:
    """Return the first `runs` trials of a big grid with early stopping."""
    rng = random.Random(seed)  # noqa: S311  (a simulation)
    cells, _ = cross(GRIDS["full"].levels)
    trials = expand(
        cells, seeds=math.ceil(runs / len(cells)), lr_scales=(1.0,), order_seed=ORDER_SEED, configure=configure
    )[:runs]
    gains = {(factor, level): rng.gauss(0, 0.015) for factor in FACTORS for level in LEVELS[factor]}
    controls = draw_controls(trials, CONTROLS, ORDER_SEED).keys
    asha = Asha(rung_epochs(EPOCHS))
    return [simulate(trial, asha, trial.trial_key in controls, gains, rng) for trial in trials]


def configure(cell: Cell, seed: int, scale: float) -> TrialConfig:
    """Return the configuration of a trial; what `grid.plan.space.expand` calls for each."""
    settings = {"learning_rate": repr(1e-3 * scale), "epochs": str(EPOCHS), "data": "emnist-balanced"}
    return replace(TrialConfig.from_params({**cell, **settings}), seed=seed, lr_scale=scale)


def simulate(
    config: TrialConfig, asha: Asha, control: bool, gains: dict[tuple[str, str], float], rng: random.Random
) -> SimulatedTrial:
    """Train by formula; one in ten of the `asgd` trials without batch norm diverges."""
    best = 0.78 + sum(gains.get(level, 0.0) for level in config.cell.items()) + rng.gauss(0, 0.01)
    pace = rng.uniform(0.5, 2.0)
    fragile = config.optimizer == "asgd" and not config.batch_norm and rng.random() < 0.1
    diverges_in = rng.randint(1, 5) if fragile else None
    accuracies: list[float] = []
    status = ""
    for epoch in range(1, EPOCHS + 1):
        if epoch == diverges_in:
            asha.diverge(config.trial_key, group=asha.rule.group_of(config.cell), epoch=epoch)
            status = "diverged"
            break
        accuracy = min(0.99, max(0.02, best * (1 - math.exp(-pace * epoch)) + rng.gauss(0, 0.003)))
        accuracies.append(round(accuracy * VAL_IMAGES) / VAL_IMAGES)
        key, group = config.trial_key, config.model
        if not asha.decide(key, group=group, epoch=epoch, value=accuracies[-1], control=control):
            status = "stopped"
            break
    epochs_run = len(accuracies) + (status == "diverged")
    run_id = uuid.UUID(int=rng.getrandbits(128)).hex
    return SimulatedTrial(run_id, config, control, status or "completed", tuple(accuracies), epochs_run, asha.rungs)


def fill_store(uri: str, trials: Sequence[SimulatedTrial]) -> None:
    """Write the trials into a new store."""
    store = Store(uri, EXPERIMENT)
    store.create()
    manifest = {"rungs": {"epochs": rung_epochs(EPOCHS), "factor": FACTOR}, "data": {"val_images": VAL_IMAGES}}
    store.attach(store.parent_id, {"grid.json": json.dumps(manifest).encode()})
    engine = create_engine(store.uri)
    with engine.begin() as connection:
        for start in range(0, len(trials), 500):
            rows: dict[Any, list[Row]] = {table: [] for table in TABLES}
            for number, trial in enumerate(trials[start : start + 500], start=start):
                for table, trial_rows in rows_of(trial, number, store).items():
                    rows[table] += trial_rows
            for table, batch in rows.items():
                connection.execute(insert(table.__table__), batch)
    engine.dispose()


def count_bytes(uri: str) -> int:
    """Return the size of a store on the disk."""
    path = sqlite_path(uri)
    if path is not None:
        return path.stat().st_size
    engine = create_engine(uri)
    with engine.connect() as connection:
        size = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    engine.dispose()
    return int(size)


def rows_of(trial: SimulatedTrial, number: int, store: Store) -> dict[Any, list[Row]]:
    """Return a trial as rows of each of `TABLES`."""
    started, run = FIRST_START + 1000 * number, {"run_uuid": trial.run_id}
    points = [
        {**run, "key": name, "value": value, "timestamp": started + place, "step": step, "is_nan": False}
        for place, (name, step, value) in enumerate(trial.history)
    ]
    run_row = {
        **run,
        "name": trial.config.name,
        "status": "FINISHED",
        "start_time": started,
        "end_time": started + len(points),
        "experiment_id": int(store.experiment_id),
        "user_id": "unknown",
        "source_type": "UNKNOWN",
        "lifecycle_stage": "active",
        **dict.fromkeys(("source_name", "entry_point_name", "source_version"), ""),
        "artifact_uri": f"file:///nowhere/{trial.run_id}/artifacts",
    }
    tags = {**trial.tags, "mlflow.parentRunId": store.parent_id}
    return {
        SqlRun: [run_row],
        SqlParam: [{**run, "key": name, "value": value} for name, value in trial.config.to_params().items()],
        SqlTag: [{**run, "key": name, "value": value} for name, value in tags.items()],
        SqlMetric: points,
        SqlLatestMetric: list({point["key"]: point for point in points}.values()),
    }


def check_store(uri: str, trials: Sequence[SimulatedTrial], seed: int = 0) -> None:
    """Assert that MLflow's client reads some runs as they were written, and that `analysis.store` reads all trials."""
    client = mlflow.MlflowClient(uri)
    for trial in random.Random(seed).sample(list(trials), min(CHECKED, len(trials))):  # noqa: S311
        run = client.get_run(trial.run_id)
        assert run.data.params == trial.config.to_params()
        assert trial.tags.items() <= run.data.tags.items()
        assert run.data.metrics == {name: value for name, _, value in trial.history}
        history = client.get_metric_history(trial.run_id, "val_accuracy")
        assert tuple(point.value for point in history) == trial.accuracies
    experiment = read_experiment(uri, EXPERIMENT)
    assert len(experiment.trials) == len(trials)
    assert not experiment.notes


def measure(uri: str, folder: Path) -> dict[str, float]:
    """Return the seconds that each step takes; the plain MLflow loop comes last."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    seconds: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = step()
        seconds[name] = time.perf_counter() - begun
        return result

    experiment: Experiment = timed("read_experiment", lambda: read_experiment(uri, EXPERIMENT))
    trials = experiment.trials
    timed("rank_cells", lambda: rank_cells(trials, val_images=VAL_IMAGES))
    timed("measure_rung_effects", lambda: measure_rung_effects(trials))
    timed("audit_stopping", lambda: audit_stopping(trials))
    curves = timed("read_curves of all runs", lambda: read_curves(experiment, trials["run_id"]))
    again = timed("read_curves again, from the cache", lambda: read_curves(experiment, trials["run_id"]))
    assert again.equals(curves)
    timed("analysis.report, a fresh process", lambda: write_report(uri, folder))
    timed("mlflow.search_runs", lambda: search_runs(uri))
    plain = timed("get_metric_history, run by run", lambda: loop_over_histories(uri, list(trials["run_id"])))
    assert plain.equals(curves)
    return seconds


def write_report(uri: str, folder: Path) -> None:
    """Write the report as a user does, with an empty cache."""
    command = [sys.executable, "-m", "analysis.report", "--experiment", EXPERIMENT, "--store", uri]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "empty cache")}
    out = ["--out", str(folder / "report.html")]
    subprocess.run([*command, *out], env=environment, check=True, capture_output=True)


def search_runs(uri: str) -> pd.DataFrame:
    """Read all trials as a user of MLflow would."""
    mlflow.set_tracking_uri(uri)
    return mlflow.search_runs(experiment_names=[EXPERIMENT], filter_string="tags.kind = 'trial'")


def loop_over_histories(uri: str, run_ids: Sequence[str]) -> pd.DataFrame:
    """Read all learning curves as a user of MLflow would."""
    client = mlflow.MlflowClient(uri)
    points = [(run_id, point) for run_id in run_ids for point in client.get_metric_history(run_id, "val_accuracy")]
    rows = [(run_id, point.step, point.value) for run_id, point in points]
    table = pd.DataFrame(rows, columns=["run_id", "epoch", "val_accuracy"]).astype({"run_id": "str"})
    return table.sort_values(["run_id", "epoch"], ignore_index=True)


def format_seconds(seconds: dict[str, float]) -> str:
    """Return the measurements as text of at most 80 columns."""
    lines = [f"{'step':<50} {'seconds':>9}"]
    lines += [f"{name:<50} {taken:>9.2f}" for name, taken in seconds.items()]
    plain = seconds["mlflow.search_runs"] + seconds["get_metric_history, run by run"]
    first = seconds["read_experiment"] + seconds["read_curves of all runs"]
    again = seconds["read_experiment"] + seconds["read_curves again, from the cache"]
    lines.append("a table of all trials and all their curves:")
    lines.append(f"{'  plain MLflow (the last two lines)':<50} {plain:>9.2f}")
    lines.append(f"{'  analysis.store, first time':<50} {first:>9.2f} {plain / first:>7.1f} x as fast")
    lines.append(f"{'  analysis.store, from then on':<50} {again:>9.2f} {plain / again:>7.1f} x as fast")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill a store, check it, measure, print the table, and return the exit code."""
    parser = Parser(prog="python -m benchmarks.big_store", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=positive, default=10_000, metavar="N", help="trials in the store (10000)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the store in this folder (a temporary one)")
    parser.add_argument("--postgres", action="store_true", help="in PostgreSQL (Debian: postgresql) instead of sqlite")
    options = parser.parse_args(arguments)
    if options.postgres and (lacking := postgres.missing()):
        parser.error(f"--postgres {lacking}")
    if options.folder and (options.folder / "mlflow.db").exists():
        parser.error(f"--folder {options.folder} already contains a store; pass another folder")
    return run_command(parser.name, lambda: _measure_in(options.folder, options.runs, in_postgres=options.postgres))


def _measure_in(kept: Path | None, runs: int, *, in_postgres: bool) -> int:
    with ExitStack() as stack:
        folder = (kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"can't make the folder {folder}: {error.strerror}; pass another --folder") from error
        stack.enter_context(chdir(folder))  # where MLflow puts the files of a store that is not sqlite
        uri = stack.enter_context(postgres.postgres()).uri if in_postgres else f"sqlite:///{folder}/mlflow.db"
        trials = simulate_grid(runs)
        begun = time.perf_counter()
        fill_store(uri, trials)
        filled = time.perf_counter() - begun
        check_store(uri, trials)
        epochs = sum(trial.epochs_run for trial in trials)
        print(f"{len(trials):,} trials, {epochs:,} epochs, {count_bytes(uri) / 1e6:.0f} MB, written in {filled:.0f} s")
        print(format_seconds(measure(uri, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
