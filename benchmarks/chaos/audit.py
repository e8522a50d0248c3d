"""Compare the store of a disturbed grid with that of an undisturbed one; `benchmarks.chaos` prints the result."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from grid.config import TrialConfig
from grid.metrics import STATUSES, recorded_rungs
from grid.plan.asha import Asha

TIMINGS = ("epoch_seconds", "samples_per_second")
"""Metrics that differ from run to run."""

Histories = dict[str, list[tuple[int, float, int]]]
"""Metric -> list of (step, value, time)."""


@dataclass
class Audit:
    """Result of the comparison."""

    experiments: int = 0
    trials: int = 0
    """Of the undisturbed grid."""
    values: int = 0
    """Metric values that both runs recorded."""
    lost: int = 0
    """Trials without a run or a final status, and epochs missing from a run."""
    doubled: int = 0
    """Second runs of a trial, second parents, second values of a run, metric and step."""
    orphans: int = 0
    """Runs left running, reports left in a spool, checkpoints left of ended trials."""
    different: int = 0
    """Values that differ from the undisturbed ones, and unstopped controls that ended with another status."""
    wrong_decisions: int = 0
    """Decisions at rungs that ASHA does not make when the recorded arrivals are replayed in their order."""
    two_drivers: int = 0
    """How often two drivers worked on one experiment, as far as their logs and exit codes say."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (
            self.lost or self.doubled or self.orphans or self.different or self.wrong_decisions or self.two_drivers
        )

    @property
    def summary(self) -> str:
        """All counts in one line."""
        return (
            f"{self.lost} lost, {self.doubled} doubled, {self.orphans} orphans, {self.different} different, "
            f"{self.wrong_decisions} wrong decisions, {self.two_drivers} times two drivers"
        )


@dataclass
class Recorded:
    """One trial as an experiment recorded it."""

    config: TrialConfig
    tags: dict[str, str]
    epochs_run: int
    histories: Histories


def audit(uri: str, folder: Path, reference: str, experiments: list[str], checkpoints: Sequence[str] = ()) -> Audit:
    """Compare experiments of a store with a reference experiment.

    Args:
        uri: URI of the store.
        folder: Folder in which the drivers ran; contains `spool`.
        reference: Name of the undisturbed experiment.
        experiments: Names of the disturbed experiments.
        checkpoints: Those that are left.
    """
    client = MlflowClient(tracking_uri=uri)
    found = Audit(experiments=len(experiments))
    undisturbed = _read(client, reference, Audit())
    found.trials = len(undisturbed)
    for experiment in experiments:
        trials = _read(client, experiment, found)
        found.lost += len(set(undisturbed) - set(trials))
        for key, trial in trials.items():
            _compare(trial, undisturbed[key], found)
        found.wrong_decisions += wrong_decisions(list(trials.values()))
    found.orphans += len(list((folder / "spool").glob("*.jsonl")))
    found.orphans += len(checkpoints)
    return found


def wrong_decisions(trials: list[Recorded]) -> int:
    """Count the recorded decisions that ASHA does not make when the recorded arrivals are replayed in their order."""
    asha = Asha(tuple(recorded_rungs({name for trial in trials for name in trial.histories})))
    wrong = 0
    for _, epoch, value, trial in sorted(_arrivals(trials, asha.rungs), key=lambda arrival: arrival[0]):
        config, control = trial.config, trial.tags["control"] == "true"
        group = asha.rule.group_of(config.cell)
        if isnan(value):
            asha.diverge(config.trial_key, group=group, epoch=epoch)
            continue
        asha.decide(config.trial_key, group=group, epoch=epoch, value=value, control=control)
        recorded = trial.tags.get("would_stop_at_epoch" if control else "stopped_at_epoch")
        wrong += (asha.stop_epoch(config.trial_key) == epoch) != (recorded == str(epoch))
    return wrong


def _arrivals(trials: list[Recorded], rungs: Iterable[int]) -> Iterator[tuple[int, int, float, Recorded]]:
    """Yield the time, the epoch and the accuracy of each arrival at a rung; NaN for a divergence in that epoch."""
    for trial in trials:
        for epoch in rungs:
            for _, value, when in trial.histories.get(f"val_accuracy_at_{epoch}", []):
                yield when, epoch, value, trial
        if trial.tags.get("status") == "diverged":
            for step, _, when in trial.histories.get("epoch_seconds", []):
                if step == trial.epochs_run:
                    yield when, step, nan, trial


def _read(client: MlflowClient, experiment: str, found: Audit) -> dict[str, Recorded]:
    (entry,) = client.search_experiments(filter_string=f"name = '{experiment}'")
    runs = client.search_runs([entry.experiment_id], max_results=5000)
    kinds = Counter(run.data.tags["kind"] for run in runs)
    found.doubled += kinds["grid"] - 1
    trials: dict[str, Recorded] = {}
    for run in runs:
        found.orphans += run.info.status == "RUNNING"
        if run.data.tags["kind"] == "trial":
            found.doubled += run.data.tags["trial_key"] in trials
            found.lost += run.data.tags.get("status") not in STATUSES
            trials[run.data.tags["trial_key"]] = _recorded(client, run)
    return trials


def _recorded(client: MlflowClient, run: Run) -> Recorded:
    histories = {
        name: [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    config = TrialConfig.from_params(run.data.params)
    return Recorded(config, run.data.tags, int(run.data.metrics.get("epochs_run", 0)), histories)


def _compare(trial: Recorded, undisturbed: Recorded, found: Audit) -> None:
    for name, points in trial.histories.items():
        steps = [step for step, _, _ in points]
        found.doubled += len(steps) - len(set(steps))
        if name in ("val_accuracy", *TIMINGS):
            found.lost += len(set(range(1, trial.epochs_run + 1)) - set(steps))
        if name in TIMINGS or ("_at_" not in name and name in ("best_val_accuracy", "epochs_run")):
            continue
        expected = {step: value for step, value, _ in undisturbed.histories.get(name, [])}
        shared = [(value, expected[step]) for step, value, _ in points if step in expected]
        found.values += len(shared)
        found.different += sum(value != other for value, other in shared)
    if trial.tags["control"] == "true":
        found.different += trial.tags.get("status") != undisturbed.tags["status"]
