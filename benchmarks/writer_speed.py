"""Does the driver wait for MLflow? Feeds the recorder as 100 trials would, beside Ray's own MLflow callback.

    python -m benchmarks.writer_speed

Ours: reports come evenly at the rate asked for; printed are the rate kept, what a report costs the driver (its loop is
held for so long), and the lag between a report and its arrival in sqlite. Ray's: the same reports, one after another,
through `MLflowLoggerCallback`, which holds the loop until they have arrived.
"""

import argparse
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.registry import register_trainable

from grid.config import TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

AUTOMATIC = ("time_this_iter_s", "time_total_s", "pid", "timestamp", "iterations_since_restore", "time_since_restore")
"""Numbers that Tune adds to every result, and its callback logs."""


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
"""Of every epoch; the values do not matter here."""


@dataclass(frozen=True)
class Speed:
    """What a writer made of the reports; times in seconds."""

    reports: int
    wall: float
    costs: list[float]
    """How long each report held the driver."""
    lags: list[float]
    """Between a report and its arrival, sampled."""


def main() -> None:
    """Measure both writers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="trials at once")
    parser.add_argument("--rate", type=float, default=2.0, help="reports per second and trial")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long ours is fed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ours = feed_recorder(Path(name), options.trials, options.trials * options.rate, options.seconds)
        rays = feed_callback(Path(name), options.trials, reports=min(200, ours.reports))
    print(
        f"{'writer':<22} {'reports':>7} {'reports/s':>9} {'cost: median':>12} {'p99':>9} {'lag: median':>11} {'max':>7}"
    )
    print_speed("grid.record.recorder", ours)
    print_speed("MLflowLoggerCallback", rays)
    third = len(ours.lags) // 3
    early, late = statistics.median(ours.lags[:third]), statistics.median(ours.lags[-third:])
    print(f"lag of grid.record.recorder, median of the first third {early:.2f} s, of the last {late:.2f} s")
    ratio = statistics.median(rays.costs) / statistics.median(ours.costs)
    print(f"a report holds the driver {ratio:,.0f} times as long with Ray's callback (medians of one run)")


def feed_recorder(folder: Path, trials: int, rate: float, seconds: float) -> Speed:
    """Report at a steady rate through the recorder."""
    store = Store(f"sqlite:///{folder}/ours.db", "speed")
    store.create()
    spool = Spool(folder / "spool.jsonl")
    recorder = Recorder(store, spool)
    recorder.begin({}, {})
    configs = [TrialConfig(learning_rate=1.0, epochs=10**6, seed=seed) for seed in range(trials)]
    for config in configs:
        recorder.started(config, control=False)
    while spool.pending(limit=1)[0]:
        time.sleep(0.1)  # starting runs is no report
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
    """Note the age of the oldest report that has not arrived, ten times a second."""
    while not done.wait(0.1):
        waiting = spool.pending(limit=1)[0]
        lags.append(time.time() - waiting[0]["time"] / 1000 if waiting else 0.0)


def feed_callback(folder: Path, trials: int, reports: int) -> Speed:
    """Report through Ray's callback as fast as it takes them."""
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
    """Print one row."""
    cost, p99 = statistics.median(speed.costs) * 1000, statistics.quantiles(speed.costs, n=100)[-1] * 1000
    print(
        f"{name:<22} {speed.reports:>7,} {speed.reports / speed.wall:>9.0f} {cost:>9.2f} ms {p99:>6.2f} ms "
        f"{statistics.median(speed.lags):>9.2f} s {max(speed.lags):>5.2f} s"
    )


if __name__ == "__main__":
    main()
