import errno
import itertools
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from grid.config import TrialConfig
from grid.driver.watcher import Watcher, restore_rungs
from grid.metrics import EpochReport
from grid.plan.asha import Asha
from grid.plan.trials import Plan
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store, StoredTrial
from grid.train.checkpoints import Checkpoints
from grid.tune.recovery import AwakeClock

CONFIG = TrialConfig(learning_rate=1e-3, epochs=9)
CONTROL = replace(CONFIG, seed=1)
PLAN = Plan([CONFIG.cell], {}, [CONFIG, CONTROL], frozenset({CONTROL.trial_key}))


def report(epoch: int, val_accuracy: float = 0.5) -> EpochReport:
    return EpochReport(epoch=epoch, val_accuracy=val_accuracy, epoch_seconds=2.0, diverged=math.isnan(val_accuracy))


def stored(config: TrialConfig, status: str, epochs_run: int = 9, accuracies: tuple[float, ...] = ()) -> StoredTrial:
    metrics = {"epochs_run": epochs_run, "best_val_accuracy": 0.7}
    return StoredTrial("id", status, config, metrics, False, val_accuracies=accuracies)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.jsonl")
    yield spool
    spool.close()


def watch(store: Store, spool: Spool, known: dict[str, StoredTrial] | None = None) -> Watcher:
    checkpoints = Checkpoints(str(spool.path.parent), "some grid")
    watcher = Watcher(PLAN, Recorder(store, spool), checkpoints, rungs=(1, 3), concurrency=2)
    watcher.resume(known or {})
    return watcher


def events(spool: Spool, kind: str) -> list[dict[str, object]]:
    return [event for event in spool.pending()[0] if event["kind"] == kind]


def test_a_trial_is_recorded_from_start_to_end(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    for epoch, accuracy in enumerate((0.5, 0.7, 0.6), start=1):
        watcher.epoch_ended(CONFIG, report(epoch, accuracy), stopped=False)
    watcher.ended(CONFIG, "stopped", "")
    assert [event["epoch"] for event in events(spool, "epoch")] == [1, 2, 3]
    (end,) = events(spool, "end")
    assert end["metrics"] == {"best_val_accuracy": 0.7, "epochs_run": 3}
    assert watcher.summaries[CONFIG.trial_key].best_val_accuracy == 0.7
    assert watcher.progress.done["stopped"] == 1


def test_only_rungs_get_a_value_of_their_own(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    for epoch in (1, 2, 3):
        watcher.epoch_ended(CONFIG, report(epoch), stopped=False)
    names = [name for event in events(spool, "epoch") for name in dict(event["metrics"])]  # type: ignore[call-overload]
    assert [name for name in names if "_at_" in name] == ["val_accuracy_at_1", "val_accuracy_at_3"]


def test_an_epoch_that_comes_twice_is_recorded_once(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    for _ in range(2):
        watcher.started(CONFIG)
        watcher.epoch_ended(CONFIG, report(1), stopped=False)
    assert len(events(spool, "epoch")) == 1


def test_epochs_that_the_store_has_are_not_recorded_again(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool, {CONFIG.trial_key: stored(CONFIG, "", accuracies=(0.4, 0.9))})
    watcher.started(CONFIG)
    for epoch in (1, 2, 3):
        watcher.epoch_ended(CONFIG, report(epoch), stopped=False)
    watcher.ended(CONFIG, "stopped", "")
    assert [event["epoch"] for event in events(spool, "epoch")] == [3]
    assert watcher.summaries[CONFIG.trial_key].best_val_accuracy == 0.9


@pytest.mark.parametrize("status", ["completed", "stopped", "diverged"])
def test_trials_that_ended_are_not_run_again(status: str, store: Store, spool: Spool) -> None:
    watcher = watch(store, spool, {CONFIG.trial_key: stored(CONFIG, status)})
    assert watcher.todo == [CONTROL]
    assert watcher.summaries[CONFIG.trial_key].status == status
    assert watcher.progress.done[status] == 1


@pytest.mark.parametrize("status", ["", "failed"])
def test_broken_trials_are_run_again(status: str, store: Store, spool: Spool) -> None:
    assert watch(store, spool, {CONFIG.trial_key: stored(CONFIG, status)}).todo == [CONFIG, CONTROL]


def test_controls_are_marked(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    watcher.started(CONTROL)
    assert [event["tags"]["control"] for event in events(spool, "start")] == ["false", "true"]  # type: ignore[index]


def test_a_diverged_epoch_leaves_no_accuracy(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    watcher.epoch_ended(CONFIG, report(1, math.nan), stopped=False)
    watcher.ended(CONFIG, "diverged", "")
    (epoch,), (end,) = events(spool, "epoch"), events(spool, "end")
    assert "val_accuracy" not in dict(epoch["metrics"])  # type: ignore[call-overload]
    assert end["metrics"] == {"epochs_run": 1}
    assert watcher.summaries[CONFIG.trial_key].best_val_accuracy is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_an_end_and_the_handlers_are_put_back(
    number: signal.Signals, store: Store, spool: Spool
) -> None:
    before = signal.getsignal(number)
    watcher = watch(store, spool)
    with watcher.until_interrupted():
        os.kill(os.getpid(), number)
        assert watcher.interrupted
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("status", "stop_epoch", "accuracies"),
    [("stopped", 1, (0.4,)), ("completed", None, (0.4,) * 9), ("diverged", None, (0.4, math.nan))],
)
def test_a_trial_whose_driver_died_before_its_end_is_ended_and_not_run_again(
    status: str, stop_epoch: int | None, accuracies: tuple[float, ...], store: Store, spool: Spool
) -> None:
    unfinished = stored(CONFIG, "", accuracies=accuracies)
    unfinished = replace(unfinished, was_stopped=stop_epoch is not None, stop_epoch=stop_epoch)
    watcher = watch(store, spool, {CONFIG.trial_key: unfinished})
    assert watcher.todo == [CONTROL]
    (end,) = events(spool, "end")
    assert (end["status"], end["metrics"]) == (status, {"best_val_accuracy": 0.4, "epochs_run": len(accuracies)})


def test_a_decision_to_stop_is_recorded_with_the_epoch_it_follows(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    watcher.epoch_ended(CONFIG, report(1), stopped=True)
    (epoch,) = events(spool, "epoch")
    assert epoch["tags"] == {"stopped_at_epoch": "1"}


def test_a_control_that_would_have_been_stopped_is_recorded_as_such_and_resumes(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONTROL)
    watcher.epoch_ended(CONTROL, report(1), stopped=False, spared=True)
    (epoch,) = events(spool, "epoch")
    assert epoch["tags"] == {"would_stop_at_epoch": "1"}
    spared = replace(stored(CONTROL, "", accuracies=(0.5,)), control=True, stop_epoch=1)
    assert watch(store, spool, {CONTROL.trial_key: spared}).todo == [CONFIG, CONTROL]


def test_time_is_recorded_though_no_epoch_ends_and_goes_on_where_the_last_run_was(
    store: Store, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(100.0, 0.5)
    monkeypatch.setattr("grid.driver.watcher.AwakeClock", lambda: AwakeClock(lambda: next(now)))
    store.record_seconds(7.0)
    older = replace(stored(CONFIG, "", accuracies=(0.4,)), tags={"grid_seconds": "9.0"})
    watcher = watch(store, spool, {CONFIG.trial_key: older})
    for _ in range(9):
        watcher.tick()
    watcher.record_spent()
    assert [event["seconds"] for event in events(spool, "spent")] == [11.0, 13.0, 13.5]


def test_a_suspended_trial_is_recorded_and_does_not_count_as_ended(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    watcher.suspended(CONFIG)
    watcher.tick()
    assert [event["trial_key"] for event in events(spool, "rest")] == [CONFIG.trial_key]
    assert (watcher.progress.running, watcher.summaries) == (0, {})


def test_a_trial_that_starts_again_after_its_worker_died_counts_once(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    for _ in range(2):
        watcher.started(CONFIG)
    watcher.tick()
    assert watcher.progress.running == 1


def test_a_new_watcher_writes_nothing(store: Store, spool: Spool) -> None:
    over = replace(stored(CONFIG, "", accuracies=(0.4,)), was_stopped=True, stop_epoch=1)
    checkpoints = Checkpoints(str(spool.path.parent), "some grid")
    watcher = Watcher(PLAN, Recorder(store, spool), checkpoints, rungs=(1, 3), concurrency=2)
    assert spool.pending()[0] == []
    watcher.resume({CONFIG.trial_key: over})
    assert [event["kind"] for event in spool.pending()[0]] == ["end"]


def test_a_driver_that_was_replaced_stops_records_nothing_and_keeps_the_checkpoints(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    checkpoints = Checkpoints(str(spool.path.parent), "some grid")
    checkpoints.save(CONFIG.trial_key, {"epoch": 1})
    before = spool.pending()[0]
    store.lost = "another driver has taken over"
    watcher.tick()
    assert watcher.interrupted
    watcher.epoch_ended(CONFIG, report(1, 0.5), stopped=True)
    watcher.ended(CONFIG, "stopped", "")
    watcher.suspended(CONFIG)
    assert spool.pending()[0] == before
    assert checkpoints.load(CONFIG.trial_key, "cpu") is not None


@pytest.mark.parametrize(("epochs", "kept"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_checkpoint_ahead_of_what_is_recorded_is_not_resumed(
    store: Store, spool: Spool, epochs: int, kept: bool
) -> None:
    checkpoints = Checkpoints(str(spool.path.parent), "some grid")
    checkpoints.save(CONFIG.trial_key, {"epoch": 3})
    watch(store, spool, {CONFIG.trial_key: stored(CONFIG, "", accuracies=(0.5,) * epochs)} if epochs else {})
    assert (checkpoints.load(CONFIG.trial_key, "cpu") is not None) == kept


def test_a_spool_that_cannot_be_written_ends_the_run_and_nothing_more_is_recorded(
    store: Store, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    monkeypatch.setattr("os.fsync", fail)
    watcher.epoch_ended(CONFIG, report(1), stopped=False)
    monkeypatch.undo()
    watcher.ended(CONFIG, "completed", "")
    assert (watcher.interrupted, watcher.problem) == (True, "can't write to the spool: No space left on device")
    assert [event["kind"] for event in spool.pending()[0]] == ["start"]


def fail(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_rungs_after_a_resume_equal_the_rungs_before() -> None:
    before, after = Asha((1, 3)), Asha((1, 3))
    known = {}
    for seed, accuracy in enumerate((0.5, 0.7, 0.3, 0.6, math.nan)):
        config = replace(CONFIG, seed=seed)
        if math.isnan(accuracy):
            before.diverge(config.trial_key, group="mlp", epoch=1)
            known[config.trial_key] = stored(config, "diverged", epochs_run=1)
            continue
        continued = before.decide(config.trial_key, group="mlp", epoch=1, value=accuracy)
        trial = stored(config, "completed" if continued else "stopped")
        trial.metrics["val_accuracy_at_1"] = accuracy  # type: ignore[index]
        known[config.trial_key] = replace(trial, was_stopped=not continued, stop_epoch=None if continued else 1)
    restore_rungs(after, known)
    assert after == before


def test_a_control_that_would_have_been_stopped_counts_after_a_resume_as_before() -> None:
    before, after = Asha((1, 3)), Asha((1, 3))
    known = {}
    for seed, accuracies in enumerate([(0.9, 0.8), (0.1, 0.95), (0.95, 0.7)]):
        config = replace(CONFIG, seed=seed)
        for epoch, value in zip((1, 3), accuracies, strict=True):
            before.decide(config.trial_key, group="mlp", epoch=epoch, value=value, control=True)
        trial = replace(stored(config, "completed"), control=True, stop_epoch=before.stop_epoch(config.trial_key))
        rungs = {f"val_accuracy_at_{epoch}": value for epoch, value in zip((1, 3), accuracies, strict=True)}
        known[config.trial_key] = replace(trial, metrics={**trial.metrics, **rungs})
    restore_rungs(after, known)
    assert after == before
    assert [trial.stop_epoch for trial in known.values()] == [None, 1, 3]
    assert after.arrivals("mlp", 3) == (0.7, 0.8)


def test_a_trial_that_failed_before_it_could_start_has_a_run_with_its_reason(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.ended(CONFIG, "failed", "no worker could start")
    assert [event["kind"] for event in spool.pending()[0]] == ["start", "end"]
    recorder = Recorder(store, spool)
    assert (recorder.recover(), recorder.parked, recorder.dropped) == (2, {}, {})
    (trial,) = store.trials().values()
    assert (trial.status, trial.tags["error"]) == ("failed", "no worker could start")


def test_the_progress_line_says_how_the_recording_is_doing(
    store: Store, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch(store, spool)
    watcher.tick()
    assert "MLflow" not in watcher.progress.line(200)
    monkeypatch.setattr(Recorder, "trouble", "MLflow not answering for 3 min, 214 reports waiting")
    watcher.tick()
    assert " | MLflow not answering for 3 min, 214 reports waiting | " in watcher.progress.line(200)


def test_a_storage_that_fails_when_a_trial_ends_is_noticed_and_survived(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    (spool.path.parent / "some grid").touch()  # where the folder of checkpoints should be
    for config in (CONFIG, CONTROL):
        watcher.started(config)
        watcher.ended(config, "completed", "")
    watcher.clear_checkpoints()
    assert len(events(spool, "end")) == 2
    ((problem, times),) = watcher.notices.items()
    assert (problem.startswith(f"can't write to the storage '{spool.path.parent}': "), times) == (True, 2)
    assert problem in watcher.progress.line(1000)
