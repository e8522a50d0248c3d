import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from benchmarks.chaos import recording
from benchmarks.chaos.__main__ import FAILURES, draw_schedule, print_table
from benchmarks.chaos.audit import Audit, _read, audit, wrong_decisions
from grid.config import TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.waiting import wait_until

CONFIG = TrialConfig(learning_rate=1e-3, epochs=3)


def record(uri: str, folder: Path, experiment: str, accuracies: dict[int, tuple[float, ...]]) -> Store:
    """Record one trial per seed with these accuracies; a trial with a single epoch was stopped."""
    store = Store(uri, experiment)
    store.create()
    recorder = Recorder(store, Spool(folder / f"{experiment}.jsonl"))
    recorder.begin({}, {})
    for seed, curve in accuracies.items():
        config, stopped = replace(CONFIG, seed=seed), len(curve) == 1
        recorder.started(config, control=False)
        for epoch, accuracy in enumerate(curve, start=1):
            metrics = {**dict.fromkeys(EPOCH_METRICS, 0.5), "val_accuracy": accuracy}
            recorder.epoch_ended(config, EpochReport(epoch=epoch, **metrics), is_rung=epoch == 1, stopped=stopped)
        status = "stopped" if stopped else "completed"
        recorder.ended(config, status, epochs_run=len(curve), best_val_accuracy=max(curve))
    recorder.close(finished=True)
    return store


GOOD = {0: (0.5, 0.6, 0.7), 1: (0.4,)}


class Auditor:
    """Records a disturbed experiment and compares it with an undisturbed one."""

    def __init__(self, uri: str, folder: Path):
        self.uri, self.folder = uri, folder
        record(uri, folder, "undisturbed", GOOD)

    def record(self, accuracies: dict[int, tuple[float, ...]]) -> Store:
        return record(self.uri, self.folder, "disturbed", accuracies)

    def audit(self) -> Audit:
        return audit(self.uri, self.folder, "undisturbed", ["disturbed"])


@pytest.fixture
def auditor(store_uri: str, tmp_path: Path) -> Auditor:
    return Auditor(store_uri, tmp_path)


def test_an_experiment_without_damage_is_clean(auditor: Auditor) -> None:
    auditor.record(GOOD)
    found = auditor.audit()
    assert found.clean
    assert found.values > 20


def test_a_missing_trial_is_lost(auditor: Auditor) -> None:
    auditor.record({0: GOOD[0]})
    assert auditor.audit().lost == 1


def test_a_run_without_a_status_is_lost_and_a_running_one_is_an_orphan(auditor: Auditor) -> None:
    store = auditor.record(GOOD)
    run_id = store.run_ids()[CONFIG.trial_key]
    store.client.delete_tag(run_id, "status")
    store.client.update_run(run_id, status="RUNNING")
    found = auditor.audit()
    assert (found.lost, found.orphans) == (1, 1)


def test_a_second_run_and_a_second_value_are_doubled(auditor: Auditor) -> None:
    store = auditor.record(GOOD)
    store.client.log_metric(store.run_ids()[CONFIG.trial_key], "val_loss", 0.5, timestamp=1, step=2)
    assert auditor.audit().doubled == 1
    store.client.create_run(store.experiment_id, tags={"kind": "grid"})
    assert auditor.audit().doubled == 2


def test_another_value_is_different(auditor: Auditor) -> None:
    auditor.record({**GOOD, 0: (0.5, 0.61, 0.7)})
    assert auditor.audit().different == 1


def test_another_last_value_is_different_as_that_epochs_and_as_the_final_accuracy(auditor: Auditor) -> None:
    auditor.record({**GOOD, 0: (0.5, 0.6, 0.71)})
    assert auditor.audit().different == 2


def test_a_stop_that_asha_would_not_make_is_a_wrong_decision(auditor: Auditor) -> None:
    auditor.record({1: (0.4,), 0: GOOD[0]})  # ASHA never stops the first arrival at a rung
    assert auditor.audit().wrong_decisions == 1


def test_a_diverged_trial_counts_as_an_arrival_below_all_others(auditor: Auditor) -> None:
    """Four have come with it, of which two go on; without it, 0.45 would be the second of three and stopped."""
    auditor.record({0: GOOD[0], 1: (0.4,)})
    recorder = Recorder(Store(auditor.uri, "disturbed"), Spool(auditor.folder / "later.jsonl"))
    recorder.store.create()
    recorder.begin({}, {})
    diverged, last = (replace(CONFIG, seed=seed) for seed in (2, 3))
    recorder.started(diverged, control=False)
    recorder.epoch_ended(diverged, EpochReport(epoch=1, diverged=True, epoch_seconds=0.5), is_rung=True)
    recorder.ended(diverged, "diverged", epochs_run=1, best_val_accuracy=None)
    time.sleep(0.01)  # arrivals are ordered by milliseconds
    recorder.started(last, control=False)
    for epoch in (1, 2, 3):
        recorder.epoch_ended(last, EpochReport(epoch=epoch, **dict.fromkeys(EPOCH_METRICS, 0.45)), is_rung=epoch == 1)
    recorder.ended(last, "completed", epochs_run=3, best_val_accuracy=0.45)
    recorder.close(finished=True)
    client = MlflowClient(tracking_uri=auditor.uri)
    assert wrong_decisions(list(_read(client, "disturbed", Audit()).values())) == 0


@pytest.mark.parametrize(("spared_at", "wrong"), [(1, 0), (None, 1)])
def test_a_control_is_recorded_with_the_rung_at_which_asha_would_have_stopped_it(
    auditor: Auditor, spared_at: int | None, wrong: int
) -> None:
    auditor.record({0: GOOD[0]})
    recorder = Recorder(Store(auditor.uri, "disturbed"), Spool(auditor.folder / "control.jsonl"))
    recorder.store.create()
    recorder.begin({}, {})
    recorder.started(control := replace(CONFIG, seed=1), control=True)
    for epoch in (1, 2, 3):
        report = EpochReport(epoch=epoch, **dict.fromkeys(EPOCH_METRICS, 0.4))
        recorder.epoch_ended(control, report, is_rung=epoch == 1, spared=epoch == spared_at)
    recorder.ended(control, "completed", epochs_run=3, best_val_accuracy=0.4)
    recorder.close(finished=True)
    assert auditor.audit().wrong_decisions == wrong


def test_two_drivers_are_not_clean() -> None:
    assert not Audit(two_drivers=1).clean


def test_reports_left_in_the_spool_are_orphans(auditor: Auditor) -> None:
    auditor.record(GOOD)
    (auditor.folder / "spool").mkdir()
    (auditor.folder / "spool" / "left.jsonl").touch()
    assert auditor.audit().orphans == 1


def test_every_kind_of_failure_is_injected_about_equally_often() -> None:
    kills = 3 * len(FAILURES) + 2
    counts = Counter(draw_schedule(kills, random.Random(1), list(FAILURES)))
    assert sum(counts.values()) == kills
    assert set(counts.values()) == {3, 4}


def test_the_table_counts_the_failures_and_what_the_audit_found(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ["driver killed", "worker killed", "driver killed"]
    print_table(schedule, Counter(schedule[:2]), Audit(experiments=2, trials=32, values=2571, lost=1), Counter())
    header, driver, worker, *totals = capsys.readouterr().out.splitlines()
    assert header.split() == ["failure", "injected", "survived"]
    assert (driver.split()[-2:], worker.split()[-2:]) == (["2", "1"], ["1", "1"])
    assert totals == [
        "3 failures injected, 2 survived",
        "2 grids of 32 trials, 2,571 values compared",
        "1 lost, 0 doubled, 0 orphans, 0 different, 0 wrong decisions, 0 times two drivers",
    ]


def test_a_broken_client_costs_time_and_a_refused_trial_waits_for_the_next_driver(
    auditor: Auditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in recording.WRITES:
        monkeypatch.setattr(MlflowClient, name, getattr(MlflowClient, name))  # put back at the end
    recording.break_writes(MlflowClient, tmp_path)
    store = Store(auditor.uri, "disturbed")
    store.create()
    recorder = Recorder(store, Spool(tmp_path / "disturbed.jsonl"))
    recorder.begin({}, {})
    (tmp_path / recording.BROKEN).touch()
    recorder.started(CONFIG, control=False)
    wait_until(lambda: "ExpiredToken" in recorder.error)
    (tmp_path / recording.REFUSED).touch()
    (tmp_path / recording.BROKEN).unlink()
    assert recorder.close(finished=False)
    assert (len(store.run_ids()), [line.reason for (line,) in recorder.parked.values()]) == (1, ["refused for ever"])
    (tmp_path / recording.REFUSED).unlink()
    again = Recorder(store, Spool(tmp_path / "disturbed.jsonl"))
    assert (again.recover(), again.parked) == (1, {})
    again.begin({}, store.trials())
    again.close(finished=False)
    assert TrialConfig.from_params(store.client.get_run(store.run_ids()[CONFIG.trial_key]).data.params) == CONFIG
