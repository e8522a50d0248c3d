import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from grid.config import TrialConfig
from grid.plan import Plan
from grid.record import Recorder, Store, StoredTrial
from grid.spool import Spool
from grid.trial import EpochReport
from grid.watcher import Watcher

CONFIG = TrialConfig(learning_rate=1e-3, epochs=9)
CONTROL = replace(CONFIG, seed=1)
PLAN = Plan([CONFIG.cell], {}, [CONFIG, CONTROL], frozenset({CONTROL.trial_key}))


def report(epoch: int, val_accuracy: float = 0.5) -> EpochReport:
    return EpochReport(epoch, 1.0, 0.5, 1.0, val_accuracy, 1e-3, 2.0, 100.0, diverged=math.isnan(val_accuracy))


def stored(config: TrialConfig, status: str, epochs_run: int = 9, accuracies: tuple[float, ...] = ()) -> StoredTrial:
    return StoredTrial("id", status, config, {"epochs_run": epochs_run, "best_val_accuracy": 0.7}, False, accuracies)


@pytest.fixture
def store(store_uri: str) -> Store:
    store = Store(store_uri, "some grid")
    store.create()
    return store


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.jsonl")
    yield spool
    spool.close()


def watch(store: Store, spool: Spool, known: dict[str, StoredTrial] | None = None) -> Watcher:
    return Watcher(PLAN, known or {}, Recorder(store, spool), rungs=(1, 3), concurrency=2)


def events(spool: Spool, kind: str) -> list[dict[str, object]]:
    return [event for event in spool.pending()[0] if event["kind"] == kind]


def test_a_trial_is_recorded_from_start_to_end(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    for epoch, accuracy in enumerate((0.5, 0.7, 0.6), start=1):
        watcher.reported(CONFIG, report(epoch, accuracy))
    watcher.ended(CONFIG, "stopped", "")
    assert [event["epoch"] for event in events(spool, "epoch")] == [1, 2, 3]
    (end,) = events(spool, "end")
    assert end["metrics"] == {"best_val_accuracy": 0.7, "epochs_run": 3}
    assert watcher.standings[CONFIG.trial_key].best_val_accuracy == 0.7
    assert watcher.progress.done["stopped"] == 1


def test_only_rungs_get_a_value_of_their_own(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    watcher.started(CONFIG)
    for epoch in (1, 2, 3):
        watcher.reported(CONFIG, report(epoch))
    names = [name for event in events(spool, "epoch") for name in dict(event["metrics"])]  # type: ignore[call-overload]
    assert [name for name in names if "_at_" in name] == ["val_accuracy_at_1", "val_accuracy_at_3"]


def test_an_epoch_that_comes_twice_is_recorded_once(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool)
    for _ in range(2):
        watcher.started(CONFIG)
        watcher.reported(CONFIG, report(1))
    assert len(events(spool, "epoch")) == 1


def test_epochs_that_the_store_has_are_not_recorded_again(store: Store, spool: Spool) -> None:
    watcher = watch(store, spool, {CONFIG.trial_key: stored(CONFIG, "", accuracies=(0.4, 0.9))})
    watcher.started(CONFIG)
    for epoch in (1, 2, 3):
        watcher.reported(CONFIG, report(epoch))
    watcher.ended(CONFIG, "stopped", "")
    assert [event["epoch"] for event in events(spool, "epoch")] == [3]
    assert watcher.standings[CONFIG.trial_key].best_val_accuracy == 0.9


@pytest.mark.parametrize("status", ["completed", "stopped", "diverged"])
def test_trials_that_ended_are_not_run_again(status: str, store: Store, spool: Spool) -> None:
    watcher = watch(store, spool, {CONFIG.trial_key: stored(CONFIG, status)})
    assert watcher.todo == [CONTROL]
    assert watcher.standings[CONFIG.trial_key].status == status
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
    watcher.reported(CONFIG, report(1, math.nan))
    watcher.ended(CONFIG, "diverged", "")
    (epoch,), (end,) = events(spool, "epoch"), events(spool, "end")
    assert "val_accuracy" not in dict(epoch["metrics"])  # type: ignore[call-overload]
    assert end["metrics"] == {"epochs_run": 1}
    assert watcher.standings[CONFIG.trial_key].best_val_accuracy is None


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
