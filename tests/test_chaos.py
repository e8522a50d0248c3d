import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chaos import FAILURES, draw_schedule, main
from benchmarks.chaos_audit import Audit, audit
from grid.config import TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

CONFIG = TrialConfig(learning_rate=1e-3, epochs=3)


def record(uri: str, folder: Path, experiment: str, accuracies: dict[int, tuple[float, ...]]) -> Store:
    """Record one trial per seed with these accuracies; one of a single epoch is stopped."""
    store = Store(uri, experiment)
    store.create()
    recorder = Recorder(store, Spool(folder / f"{experiment}.jsonl"))
    recorder.begin({}, {})
    for seed, some in accuracies.items():
        config, stopped = replace(CONFIG, seed=seed), len(some) == 1
        recorder.started(config, control=False)
        for epoch, accuracy in enumerate(some, start=1):
            metrics = {**dict.fromkeys(EPOCH_METRICS, 0.5), "val_accuracy": accuracy}
            recorder.epoch_ended(config, EpochReport(epoch=epoch, **metrics), is_rung=epoch == 1, stopped=stopped)
        status = "stopped" if stopped else "completed"
        recorder.ended(config, status, epochs_run=len(some), best_val_accuracy=max(some))
    recorder.close(finished=True)
    return store


GOOD = {0: (0.5, 0.6, 0.7), 1: (0.4,)}


@pytest.fixture
def found(store_uri: str, tmp_path: Path) -> "Finder":
    return Finder(store_uri, tmp_path)


class Finder:
    """Audits an experiment against a good one."""

    def __init__(self, uri: str, folder: Path):
        self.uri, self.folder = uri, folder
        record(uri, folder, "reference", GOOD)

    def __call__(self) -> Audit:
        return audit(self.uri, self.folder, "reference", ["disturbed"])


def test_a_good_experiment_is_clean(found: Finder) -> None:
    record(found.uri, found.folder, "disturbed", GOOD)
    assert found().clean
    assert found().values > 20


def test_a_missing_trial_is_lost(found: Finder) -> None:
    record(found.uri, found.folder, "disturbed", {0: GOOD[0]})
    assert found().lost == 1


def test_a_run_without_a_status_is_lost_and_a_running_one_an_orphan(found: Finder) -> None:
    store = record(found.uri, found.folder, "disturbed", GOOD)
    run_id = store.run_ids()[CONFIG.trial_key]
    store.client.delete_tag(run_id, "status")
    store.client.update_run(run_id, status="RUNNING")
    assert (found().lost, found().orphans) == (1, 1)


def test_a_second_run_and_a_second_value_are_doubled(found: Finder) -> None:
    store = record(found.uri, found.folder, "disturbed", GOOD)
    store.client.log_metric(store.run_ids()[CONFIG.trial_key], "val_loss", 0.5, timestamp=1, step=2)
    assert found().doubled == 1
    store.client.create_run(store.experiment_id, tags={"kind": "grid"})
    assert found().doubled == 2


def test_another_value_is_different(found: Finder) -> None:
    record(found.uri, found.folder, "disturbed", {**GOOD, 0: (0.5, 0.6, 0.71)})
    assert found().different == 1


def test_a_stop_that_asha_would_not_make_is_a_wrong_decision(found: Finder) -> None:
    record(found.uri, found.folder, "disturbed", {1: (0.4,), 0: GOOD[0]})  # the first arrival may not be stopped
    assert found().wrong_decisions == 1


def test_leftovers_are_orphans(found: Finder) -> None:
    record(found.uri, found.folder, "disturbed", GOOD)
    (found.folder / "spool").mkdir()
    (found.folder / "spool" / "left.jsonl").touch()
    assert found().orphans == 1


def test_every_kind_of_fault_strikes_about_equally_often() -> None:
    counts = Counter(draw_schedule(20, random.Random(1), list(FAILURES)))
    assert sum(counts.values()) == 20
    assert set(counts.values()) <= {3, 4}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills by what Linux shows of processes")
def test_a_grid_survives_what_dies_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["driver killed", "worker killed", "server killed", "Ray killed"]
    problems = [word for kind in kinds for word in ("--problem", kind)]
    assert main(["--kills", "4", "--seeds", "1", *problems]) == 0
    assert "0 lost, 0 doubled, 0 orphans, 0 different, 0 wrong decisions" in capsys.readouterr().out
