"""Does the cost per trial grow with the grid? Runs grids of 100, 1,000 and 10,000 trials whose training takes no time.

    python -m benchmarks.grid_scale     # 5 minutes on two cores; --quick: 15 s

Plan, Ray, Tune, ASHA, worker processes, checkpoints, spool, recorder and the sqlite store are real. Only the training
of an epoch is replaced, by the next value of a curve, which takes microseconds. Each grid consists of the first trials
of `full`, with as many seeds as necessary, and runs in a process of its own, two trials at once. Afterwards its store
is checked: each trial must have exactly one run, which has ended with a status.
"""

import argparse
import contextlib
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.tracking import MlflowClient

from grid.arguments import Parser, positive, run_command
from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.driver.watcher import Watcher, restore_rungs
from grid.metrics import FINAL_STATUSES, EpochReport
from grid.parts.registry import GRIDS
from grid.plan.asha import Asha
from grid.plan.request import DEFAULT_CONTROLS, Request
from grid.plan.space import cross
from grid.plan.trials import Plan, make_plan
from grid.record.lease import Lease
from grid.record.recorder import Recorder
from grid.record.spool import open_spool
from grid.record.store import Store
from grid.train.checkpoints import Checkpoints
from grid.train.trial import DeviceData, Trial
from grid.tune import connection, tuner

SIZES = (100, 1_000, 10_000)
QUICK = (60,)
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
    """From the request to the first call of Tune: store, plan, recorder, watcher."""
    starting: float
    """From then to the first report: the worker processes import torch."""
    running: float
    """From the first report to the return of Tune."""
    delivering: float
    """From then until all reports have arrived in the store."""
    next_trial: float
    """Median time in a worker between the last step of a trial and the first step of the next trial."""
    next_epoch: float
    """Median time in a worker between two steps of a trial."""
    megabytes: float
    """Peak memory of the driver."""

    @property
    def per_trial(self) -> float:
        """Seconds per trial, without the start of the workers."""
        return (self.planning + self.running + self.delivering) / self.trials

    @property
    def line(self) -> str:
        """Row of the table."""
        per_report = self.running / self.reports
        return (
            f"{self.trials:>6,} {self.reports:>7,} {self.planning:>6.1f} {self.starting:>6.1f} {self.running:>6.1f} "
            f"{self.delivering:>8.1f} {self.per_trial * 1000:>6.1f} {per_report * 1000:>7.1f} "
            f"{self.next_trial * 1000:>6.1f} {self.next_epoch * 1000:>6.1f} {self.megabytes:>6,.0f}"
        )


HEADER = """\
                                     seconds    ms for each    ms to next driver
trials reports   plan  start    run  deliver  trial  report  trial  epoch     MB"""


class RecordedTrial(Trial):
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
        waited = 0.0 if math.isnan(RecordedTrial.last_step_at) else begun - RecordedTrial.last_step_at
        self.epoch += 1
        diverged = self._diverges and self.epoch == 2
        accuracy = math.nan if diverged else self._asymptote * (1 - math.exp(-self.epoch / self._pace))
        RecordedTrial.last_step_at = time.perf_counter()
        return EpochReport(
            epoch=self.epoch,
            train_loss=waited,
            train_accuracy=accuracy,
            val_loss=1 - accuracy,
            val_accuracy=accuracy,
            learning_rate=self.config.learning_rate,
            epoch_seconds=RecordedTrial.last_step_at - begun,
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
    """A watcher that also notes the time of the first report and the waiting times between steps."""

    def __init__(self, *parts: Any, **settings: Any):
        super().__init__(*parts, **settings)
        self.first_report_at = math.nan
        self.to_next_trial: list[float] = []
        self.to_next_epoch: list[float] = []

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        """Note the times, then do what a watcher does."""
        if math.isnan(self.first_report_at):
            self.first_report_at = time.perf_counter()
        (self.to_next_trial if report.epoch == 1 else self.to_next_epoch).append(report.train_loss)
        super().epoch_ended(config, report, stopped=stopped, spared=spared)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a grid of each size in a process of its own and print the table."""
    parser = Parser(prog="python -m benchmarks.grid_scale", description=__doc__.splitlines()[0])
    sizes = " ".join(map(str, SIZES))
    parser.add_argument(
        "--trials", type=positive, nargs="+", default=list(SIZES), metavar="N", help=f"sizes of the grids ({sizes})"
    )
    parser.add_argument("--quick", action="store_true", help=f"run one grid of {QUICK[0]} trials")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def report() -> int:
        if options.in_this_process:
            with tempfile.TemporaryDirectory(prefix="scale-") as folder:
                print(json.dumps(asdict(measure(options.trials[0], Path(folder)))))
            return 0
        print(HEADER, flush=True)
        for trials in QUICK if options.quick else options.trials:
            print(measure_in_subprocess(trials).line, flush=True)
        return 0

    return run_command(parser.name, report)


def measure_in_subprocess(trials: int) -> Cost:
    """Run a grid in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.grid_scale", "--in-this-process", "--trials", str(trials)]
    with tempfile.TemporaryDirectory(prefix="scale-cwd-") as folder:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def measure(trials: int, folder: Path) -> Cost:
    """Run a grid of recorded trials in this process, check its store, and return what it cost."""
    dataset = blank_dataset()
    request = request_of(trials, folder)
    checkpoints = Checkpoints(request.storage, request.experiment)
    packing = connection.connect(None, AT_ONCE, checkpoints)
    try:
        begun = time.perf_counter()
        store = Store(request.store, request.experiment)
        store.create()
        spool_of_grid = open_spool(request.spool, request.store, request.experiment)
        with contextlib.closing(spool_of_grid) as spool, Lease(store):
            recorder = Recorder(store, spool)
            recorder.recover()
            plan = cut(
                make_plan(
                    request, packing=packing, fingerprint=dataset.fingerprint, train_images=len(dataset.train_labels)
                ),
                trials,
            )
            asha = Asha.of(plan.rule, request.epochs)
            restore_rungs(asha, store.trials())
            recorder.begin({"grid.json": b"{}"}, {})
            watcher = Stopwatch(plan, recorder, checkpoints, rungs=asha.rungs, concurrency=packing.concurrency)
            watcher.resume({})
            planned = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                tuner.run_trials(
                    watcher.todo,
                    dataset,
                    watcher,
                    asha=asha,
                    controls=plan.controls,
                    packing=packing,
                    checkpoints=checkpoints,
                    begin=RecordedTrial,
                )
                checkpoints.clear()
            ended = time.perf_counter()
            assert recorder.close(finished=True), recorder.error
            delivered = time.perf_counter()
            megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finally:
        connection.disconnect()
    check_store(store, plan)
    return Cost(
        trials=trials,
        reports=len(watcher.to_next_trial) + len(watcher.to_next_epoch),
        planning=planned - begun,
        starting=watcher.first_report_at - planned,
        running=ended - watcher.first_report_at,
        delivering=delivered - ended,
        next_trial=statistics.median(watcher.to_next_trial),
        next_epoch=statistics.median(watcher.to_next_epoch),
        megabytes=megabytes,
    )


def request_of(trials: int, folder: Path) -> Request:
    """Return a request for the grid `full` with enough seeds for a number of trials."""
    levels = GRIDS["full"].levels
    return Request(
        grid="full",
        levels=levels,
        data="glyphs",
        data_dir=folder / "data",
        per_class=None,
        epochs=EPOCHS,
        seeds=math.ceil(trials / len(cross(levels)[0])),
        lr_scales=(1.0,),
        controls=DEFAULT_CONTROLS,
        store=f"sqlite:///{folder}/mlflow.db",
        experiment="scale",
        storage=str(folder / "storage"),
        spool=folder / "spool",
        address="local",
        concurrency=AT_ONCE,
        precision="float32",
    )


def cut(plan: Plan, trials: int) -> Plan:
    """Return a plan of only the first trials."""
    kept = plan.trials[:trials]
    return replace(plan, trials=kept, controls=plan.controls & {trial.trial_key for trial in kept})


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


def blank_dataset() -> Dataset:
    """Return a data set of black images; no trial looks at them."""
    images, labels = np.zeros((64, 28, 28), dtype=np.uint8), np.zeros(64, dtype=np.int64)
    return Dataset("glyphs", ("a", "b"), images, labels, images, labels, fingerprint="0" * 16)


if __name__ == "__main__":
    sys.exit(main())
