"""What the watcher sums up of a trial, live and from the store: the values that cells are ranked by."""

from dataclasses import replace
from pathlib import Path

import pytest

from grid.config import TrialConfig
from grid.driver.watcher import Watcher, summarise_trial
from grid.metrics import EpochReport
from grid.plan.trials import Plan
from grid.ranking import TrialSummary
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store, StoredTrial
from grid.train.checkpoints import Checkpoints

CONFIG = TrialConfig(learning_rate=1e-3, epochs=3)
PLAN = Plan([CONFIG.cell], {}, [CONFIG], frozenset())
RUNGS = (1,)


@pytest.fixture
def recorder(store: Store, tmp_path: Path) -> Recorder:
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({}, {})
    return recorder


def watch(
    recorder: Recorder, folder: Path, known: dict[str, StoredTrial] | None = None, *, control: bool = False
) -> Watcher:
    plan = replace(PLAN, controls=frozenset({CONFIG.trial_key} if control else {}))
    watcher = Watcher(plan, recorder, Checkpoints(str(folder), "some grid"), rungs=RUNGS, concurrency=1)
    watcher.resume(known or {})
    return watcher


def run_trial(watcher: Watcher, accuracies: tuple[float, ...], status: str, *, spared: bool = False) -> TrialSummary:
    """Let a trial report some epochs; at the first one ASHA stops it, or would have."""
    watcher.started(CONFIG)
    for epoch, accuracy in enumerate(accuracies, start=1):
        report = EpochReport(epoch=epoch, val_accuracy=accuracy, epoch_seconds=1.0)
        stopped = status == "stopped" and epoch == len(accuracies)
        watcher.epoch_ended(CONFIG, report, stopped=stopped, spared=spared and epoch == 1)
    watcher.ended(CONFIG, status, "")
    return watcher.summaries[CONFIG.trial_key]


@pytest.mark.parametrize(
    ("accuracies", "status", "spared", "final", "stop_epoch"),
    [
        ((0.5, 0.75, 0.625), "completed", False, 0.625, None),
        ((0.5, 0.75, 0.625), "completed", True, 0.625, 1),
        ((0.5,), "stopped", False, None, 1),
    ],
)
def test_a_trial_is_summed_up_alike_live_and_from_the_store(
    accuracies: tuple[float, ...],
    status: str,
    spared: bool,
    final: float | None,
    stop_epoch: int | None,
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    live = run_trial(watch(recorder, tmp_path, control=spared), accuracies, status, spared=spared)
    assert (live.final_val_accuracy, live.stop_epoch, live.rung_accuracies) == (final, stop_epoch, {1: 0.5})
    recorder.close(finished=True)
    assert summarise_trial(recorder.store.trials()[CONFIG.trial_key]) == live


def test_a_verdict_of_an_earlier_run_is_kept(recorder: Recorder, tmp_path: Path) -> None:
    """A control that would have been stopped resumes and completes."""
    metrics = {"val_accuracy_at_1": 0.5, "val_accuracy": 0.5}
    begun = StoredTrial("id", "", CONFIG, metrics, True, stop_epoch=1, val_accuracies=(0.5,))
    summary = run_trial(watch(recorder, tmp_path, {CONFIG.trial_key: begun}), (0.5, 0.75, 0.625), "completed")
    recorder.close(finished=True)
    assert (summary.stop_epoch, summary.epochs_run, summary.final_val_accuracy) == (1, 3, 0.625)


def test_the_end_in_older_stores_is_the_last_accuracy() -> None:
    metrics = {"epochs_run": 3.0, "best_val_accuracy": 0.75, "val_accuracy": 0.625}
    assert summarise_trial(StoredTrial("id", "completed", CONFIG, metrics, False)).final_val_accuracy == 0.625
    assert summarise_trial(StoredTrial("id", "stopped", CONFIG, metrics, False)).final_val_accuracy is None
