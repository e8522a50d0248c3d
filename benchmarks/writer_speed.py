"""Does the driver wait for MLflow? Compares the recorder with Ray's own MLflow callback, fed with the same reports.

    python -m benchmarks.writer_speed     # 1 minute

The recorder receives the reports of 100 trials at a steady rate. Prints the rate that it sustained, how long each
report blocked the driver's loop, and the lag between a report and its arrival in sqlite. Ray's `MLflowLoggerCallback`
receives the same reports one after another, because it blocks the loop until each has arrived.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.registry import register_trainable

from grid.arguments import Parser, positive, run_command
from grid.config import InputError, TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

AUTOMATIC = ("time_this_iter_s", "time_total_s", "pid", "timestamp", "iterations_since_restore", "time_since_restore")
"""Numbers that Tune adds to every result and its callback logs."""
REPORT = EpochReport(
    epoch=1,
    train_loss=0.5,
    train_accuracy=0.5,
    val_loss=0.5,
    val_accuracy=0.5,
    learning_rate=0.5,
    epoch_seconds=0.5,
    samples_per_second=0.5,
)
"""What every epoch reports; the values do not matter here."""


@dataclass(frozen=True)
class Speed:
    """How a writer coped with the reports; times in seconds."""

    reports: int
    wall: float
    costs: list[float]
    """How long each report blocked the driver."""
    lags: list[float]
    """Samples of the time between a report and its arrival in the store."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both writers, print the table, and return the exit code."""
    parser = Parser(prog="python -m benchmarks.writer_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=positive, default=100, metavar="N", help="trials at once (100)")
    parser.add_argument("--rate", type=float, default=2.0, metavar="X", help="reports per second and trial (2)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="how long the recorder is fed (30)")
    options = parser.parse_args(arguments)
    return run_command(parser.name, lambda: _report(options.trials, options.rate, options.seconds))


def _report(trials: int, rate: float, seconds: float) -> int:
    if rate <= 0 or seconds <= 0:
        raise InputError("--rate and --seconds must be above 0")
    with tempfile.TemporaryDirectory() as name:
        ours = feed_recorder(Path(name), trials, trials * rate, seconds)
        rays = feed_callback(Path(name), trials, reports=min(200, ours.reports))
    print(
        f"{'writer':<22} {'reports':>7} {'reports/s':>9} {'cost: median':>12} {'p99':>9} {'lag: median':>11} {'max':>7}"
    )
    print_speed("grid.record.recorder", ours)
    print_speed("MLflowLoggerCallback", rays)
    third = len(ours.lags) // 3
    early, late = statistics.median(ours.lags[:third]), statistics.median(ours.lags[-third:])
    print(f"median lag of grid.record.recorder: {early:.2f} s in the first third, {late:.2f} s in the last")
    ratio = statistics.median(rays.costs) / statistics.median(ours.costs)
    print(f"with Ray's callback, a report blocks the driver {ratio:,.0f} times as long (medians of one run)")
    return 0


def feed_recorder(folder: Path, trials: int, rate: float, seconds: float) -> Speed:
    """Report through the recorder at a steady rate of `rate` reports per second."""
    store = Store(f"sqlite:///{folder}/ours.db", "speed")
    store.create()
    spool = Spool(folder / "spool.jsonl")
    recorder = Recorder(store, spool)
    recorder.begin({}, {})
    configs = [TrialConfig(learning_rate=1.0, epochs=10**6, seed=seed) for seed in range(trials)]
    for config in configs:
        recorder.started(config, control=False)
    while spool.pending(limit=1)[0]:
        time.sleep(0.1)  # the starts of the runs are not measured
    done = threading.Event()
    lags: list[float] = []
    sampler = threading.Thread(target=sample_lags, args=(spool, done, lags))
    sampler.start()
    costs = []
    begun = time.perf_counter()
    for count in range(int(rate * seconds)):
        time.sleep(max(0.0, begun + count / rate - time.perf_counter()))
        config, epoch = configs[count % trials], count // trials + 1
        before = time.perf_counter()
        recorder.epoch_ended(config, replace(REPORT, epoch=epoch), is_rung=False)
        costs.append(time.perf_counter() - before)
    wall = time.perf_counter() - begun
    done.set()
    sampler.join()
    before = time.perf_counter()
    assert recorder.close(finished=True)
    lags.append(time.perf_counter() - before)
    return Speed(len(costs), wall, costs, lags)


def sample_lags(spool: Spool, done: threading.Event, lags: list[float]) -> None:
    """Sample the age of the oldest report that has not arrived, ten times a second."""
    while not done.wait(0.1):
        waiting = spool.pending(limit=1)[0]
        lags.append(time.time() - waiting[0]["time"] / 1000 if waiting else 0.0)


def feed_callback(folder: Path, trials: int, reports: int) -> Speed:
    """Report through Ray's callback as fast as it accepts reports."""
    register_trainable("speed", lambda config: None)
    callback = MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/rays.db", experiment_name="speed")
    callback.setup()
    begun_trials = [TuneTrial("speed", config={"seed": seed}, stub=True) for seed in range(trials)]
    for trial in begun_trials:
        callback.log_trial_start(trial)
    costs = []
    begun = time.perf_counter()
    for count in range(reports):
        result = dict.fromkeys((*EPOCH_METRICS, *AUTOMATIC), 0.5)
        before = time.perf_counter()
        callback.log_trial_result(
            count, begun_trials[count % trials], {**result, "training_iteration": count // trials}
        )
        costs.append(time.perf_counter() - before)
    return Speed(reports, time.perf_counter() - begun, costs, costs)


def print_speed(name: str, speed: Speed) -> None:
    """Print a row of the table."""
    cost, p99 = statistics.median(speed.costs) * 1000, statistics.quantiles(speed.costs, n=100)[-1] * 1000
    print(
        f"{name:<22} {speed.reports:>7,} {speed.reports / speed.wall:>9.0f} {cost:>9.2f} ms {p99:>6.2f} ms "
        f"{statistics.median(speed.lags):>9.2f} s {max(speed.lags):>5.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
