"""Does the cost per trial grow with the grid? Runs grids of 96, 1,920 and 9,600 trials whose training takes no time.

    python -m benchmarks.grid_scale     # minutes; --quick: half a minute

What `grid.run` calls is called: plan, Ray, Tune, ASHA, worker processes, checkpoints, spool, recorder, the sqlite store
and the table at the end are real. Only the training of an epoch is replaced, by the next value of a curve, which takes
microseconds. Each grid runs in a process of its own, two trials at once. Afterwards its store is checked: each trial
must have exactly one run, which has ended with a status.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from grid.arguments import Parser, positive, run_command
from grid.config import TrialConfig
from grid.driver import experiment
from grid.driver.training import Training
from grid.driver.watcher import Watcher
from grid.metrics import FINAL_STATUSES, EpochReport
from grid.parts.registry import GRIDS
from grid.plan.request import DEFAULT_CONTROLS, Request
from grid.plan.trials import Plan
from grid.record.store import Store, StoredTrial
from grid.train.checkpoints import Checkpoints
from grid.train.trial import DeviceData, Trial
from grid.tune import connection

SIZES = ("smoke:3", "full:1", "full:5")
QUICK = "smoke:2"
AT_ONCE = 2
EPOCHS = 9
DIVERGING = 0.02
"""Share of the trials that diverge in their second epoch if they reach it."""


@dataclass(frozen=True)
class Cost:
    """What a grid cost; times in seconds."""

    trials: int
    reports: int
    planning: float
    """Until Tune is called: plan, comparison with the store, recorder, watcher."""
    starting: float
    """From then to the first report: the worker processes import torch."""
    running: float
    """From the first report to the return of Tune."""
    ending: float
    """From then until all reports are in the store and the table is printed."""
    next_trial: float
    """Median time in a worker between the last step of a trial and the first step of the next trial."""
    next_epoch: float
    """Median time in a worker between two steps of a trial."""
    megabytes: float
    """Peak memory of the driver."""

    @property
    def per_trial(self) -> float:
        """Seconds per trial, without the start of the workers."""
        return (self.planning + self.running + self.ending) / self.trials

    @property
    def line(self) -> str:
        """Row of the table."""
        per_report = self.running / self.reports
        return (
            f"{self.trials:>6,} {self.reports:>7,} {self.planning:>6.1f} {self.starting:>6.1f} {self.running:>6.1f} "
            f"{self.ending:>6.1f} {self.per_trial * 1000:>6.1f} {per_report * 1000:>7.1f} "
            f"{self.next_trial * 1000:>6.1f} {self.next_epoch * 1000:>6.1f} {self.megabytes:>6,.0f}"
        )


HEADER = """\
                                   seconds    ms for each    ms to next driver
trials reports   plan  start    run    end  trial  report  trial  epoch     MB"""


class CurveTrial(Trial):
    """Yields a curve that depends on the trial key alone; reports as `train_loss` the seconds since the last step."""

    last_step_at = math.nan
    """When the latest step of any trial ended in this process."""

    def __init__(self, config: TrialConfig, data: DeviceData):
        self.config = config
        self.epoch = 0
        luck = random.Random(config.trial_key)  # noqa: S311  (a curve)
        self._diverges = luck.random() < DIVERGING
        self._asymptote = luck.uniform(0.2, 0.9)
        self._pace = luck.uniform(0.5, 2.0)

    def run_epoch(self) -> EpochReport:
        """Take the next value of the curve."""
        begun = time.perf_counter()
        waited = 0.0 if math.isnan(CurveTrial.last_step_at) else begun - CurveTrial.last_step_at
        self.epoch += 1
        diverged = self._diverges and self.epoch == 2
        accuracy = math.nan if diverged else self._asymptote * (1 - math.exp(-self.epoch / self._pace))
        CurveTrial.last_step_at = time.perf_counter()
        return EpochReport(
            epoch=self.epoch,
            train_loss=waited,
            train_accuracy=accuracy,
            val_loss=1 - accuracy,
            val_accuracy=accuracy,
            learning_rate=self.config.learning_rate,
            epoch_seconds=CurveTrial.last_step_at - begun,
            samples_per_second=1.0,
            diverged=diverged,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position on the curve."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of another trial's `state_dict`."""
        self.epoch = state["epoch"]


class Stopwatch(Watcher):
    """A watcher that also notes when each phase ends, and the waiting times between steps."""

    def __init__(self, plan: Plan, *parts: Any, **settings: Any):
        super().__init__(plan, *parts, **settings)
        self.plan = plan
        self.planned_at = math.nan
        self.trained_at = math.nan
        self.first_report_at = math.nan
        self.to_next_trial: list[float] = []
        self.to_next_epoch: list[float] = []

    def resume(self, stored: Mapping[str, StoredTrial]) -> None:
        """Do what a watcher does, then note the time."""
        super().resume(stored)
        self.planned_at = time.perf_counter()

    def clear_checkpoints(self) -> None:
        """Note that all have been trained, then do what a watcher does."""
        self.trained_at = time.perf_counter()
        super().clear_checkpoints()

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        """Note the times, then do what a watcher does."""
        if math.isnan(self.first_report_at):
            self.first_report_at = time.perf_counter()
        (self.to_next_trial if report.epoch == 1 else self.to_next_epoch).append(report.train_loss)
        super().epoch_ended(config, report, stopped=stopped, spared=spared)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a grid of each size in a process of its own and print the table."""
    parser = Parser(prog="python -m benchmarks.grid_scale", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--grids", type=size, nargs="+", default=list(map(size, SIZES)), metavar="GRID[:SEEDS]", help=" ".join(SIZES)
    )
    parser.add_argument("--quick", action="store_true", help=f"run {QUICK} alone")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def report() -> int:
        if options.in_this_process:
            ((grid, seeds),) = options.grids
            with tempfile.TemporaryDirectory(prefix="scale-") as folder:
                print(json.dumps(asdict(measure(grid, seeds, Path(folder)))))
            return 0
        print(HEADER, flush=True)
        for grid, seeds in [size(QUICK)] if options.quick else options.grids:
            print(measure_in_subprocess(grid, seeds).line, flush=True)
        return 0

    return run_command(parser.name, report)


def size(text: str) -> tuple[str, int]:
    """Read `GRID` or `GRID:SEEDS`.

    Raises:
        argparse.ArgumentTypeError: There is no such grid, or the seeds are no number from 1.
    """
    grid, _, seeds = text.partition(":")
    if grid not in GRIDS:
        raise argparse.ArgumentTypeError(f"no grid is called '{grid}'; there are {', '.join(GRIDS)}")
    return grid, positive(seeds or "1")


def measure_in_subprocess(grid: str, seeds: int) -> Cost:
    """Run a grid in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.grid_scale", "--in-this-process", "--grids", f"{grid}:{seeds}"]
    with tempfile.TemporaryDirectory(prefix="scale-cwd-") as folder:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def measure(grid: str, seeds: int, folder: Path) -> Cost:
    """Run a grid with trials that take no time, by what `grid.run` calls; check its store, and return what it cost."""
    request = request_of(grid, seeds, folder)
    checkpoints = Checkpoints(request.storage, request.experiment)
    watches: list[Stopwatch] = []

    def watch(*parts: Any, **settings: Any) -> Stopwatch:
        watches.append(Stopwatch(*parts, **settings))
        return watches[-1]

    with (
        connection.connected(None, request.concurrency, checkpoints, device=request.device) as packing,
        contextlib.ExitStack() as stack,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        prepared, packing = experiment.prepare(request, packing, checkpoints, stack)
        training = Training(packing, checkpoints, make_trial=CurveTrial, watch=watch)
        begun = time.perf_counter()
        code = experiment.run(request, prepared, training)
        done = time.perf_counter()
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert code == 0, code
    (watcher,) = watches
    check_store(prepared.store, watcher.plan)
    return Cost(
        trials=watcher.total,
        reports=len(watcher.to_next_trial) + len(watcher.to_next_epoch),
        planning=watcher.planned_at - begun,
        starting=watcher.first_report_at - watcher.planned_at,
        running=watcher.trained_at - watcher.first_report_at,
        ending=done - watcher.trained_at,
        next_trial=statistics.median(watcher.to_next_trial),
        next_epoch=statistics.median(watcher.to_next_epoch),
        megabytes=megabytes,
    )


def request_of(grid: str, seeds: int, folder: Path) -> Request:
    """Return a request for a grid on a few images; no trial looks at them."""
    return Request(
        grid=grid,
        levels=GRIDS[grid].levels,
        data="glyphs",
        data_dir=folder / "data",
        per_class=2,
        epochs=EPOCHS,
        seeds=seeds,
        lr_scales=(1.0,),
        controls=DEFAULT_CONTROLS,
        store=f"sqlite:///{folder}/mlflow.db",
        experiment="scale",
        storage=str(folder / "storage"),
        spool=folder / "spool",
        address="local",
        concurrency=AT_ONCE,
        device="cpu",
        precision="float32",
    )


def check_store(store: Store, plan: Plan) -> None:
    """Assert that the store has exactly one run for each trial, ended and with a status."""
    client = MlflowClient(tracking_uri=store.uri)
    found: Counter[str] = Counter()
    token: str | None = None
    while token != "":
        page = client.search_runs([store.experiment_id], "tags.kind = 'trial'", max_results=1000, page_token=token)
        token = page.token or ""
        for run in page:
            assert run.data.tags["status"] in FINAL_STATUSES, run.data.tags
            assert run.info.status == "FINISHED", run.info
            found[run.data.tags["trial_key"]] += 1
    assert found == Counter(trial.trial_key for trial in plan.trials), "lost or doubled trials"


if __name__ == "__main__":
    sys.exit(main())
