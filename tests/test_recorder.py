import errno
import math
import os
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from mlflow.entities import Metric, Param, Run, RunTag

from analysis.store import answering
from grid.config import InputError, TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record import courier, delivery
from grid.record import recorder as record
from grid.record.__main__ import main
from grid.record.commands import describe_code, describe_source
from grid.record.delivery import summarise_error
from grid.record.events import EpochEnded, to_json
from grid.record.recorder import Recorder
from grid.record.spool import Spool, open_spool
from grid.record.store import Store
from tests.waiting import wait_until

CONFIG = TrialConfig(learning_rate=1e-3, epochs=3, batch_norm=True)
METRICS = dict.fromkeys(EPOCH_METRICS, 0.25)


@pytest.fixture
def recorder(store: Store, tmp_path: Path) -> Recorder:
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({"grid.json": b"{}"}, {})
    return recorder


def runs(store: Store, kind: str = "trial") -> list[Run]:
    return list(store.client.search_runs([store.experiment_id], f"tags.kind = '{kind}'"))


OTHER = TrialConfig(learning_rate=1.0, epochs=3)
EXPIRED = ClientError({"Error": {"Code": "ExpiredToken", "Message": "The provided token has expired."}}, "PutObject")


def append_refused(spool: Spool, config: TrialConfig = CONFIG) -> None:
    """Append an epoch that MLflow never takes: no metric may have a name with a line break."""
    metrics = METRICS | {"epoch_seconds": 1.0, "of two\nlines": 0.5}
    event = EpochEnded(trial_key=config.trial_key, time=2_000_000_000_000, epoch=9, metrics=metrics, tags={})
    spool.append(to_json(event))


def fail_for(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, times: int = 2) -> None:
    """Let a method of the client raise an error some times before it works."""
    real = getattr(store.client, name)
    left = [error] * times

    def call(*given: object, **named: object) -> object:
        if left:
            raise left.pop()
        return real(*given, **named)

    monkeypatch.setattr(store.client, name, call)


def hold(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """Let a method of the client answer once the returned event is set."""
    real, released = getattr(store.client, name), threading.Event()
    monkeypatch.setattr(store.client, name, lambda *given: (released.wait(60), real(*given))[1])
    return released


def record_trial(recorder: Recorder, status: str = "completed", epochs: int = 3, config: TrialConfig = CONFIG) -> None:
    recorder.started(config, control=False)
    for epoch in range(1, epochs + 1):
        recorder.epoch_ended(
            config, EpochReport(epoch=epoch, **{**METRICS, "val_accuracy": epoch / 10}), is_rung=epoch == 1
        )
    recorder.ended(config, status, epochs_run=epochs, best_val_accuracy=epochs / 10, error="")


def test_a_trial_becomes_one_run_of_the_contract(store: Store, recorder: Recorder) -> None:
    record_trial(recorder)
    assert recorder.close(finished=True)
    (run,) = runs(store)
    (parent,) = runs(store, "grid")
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    assert tags == {
        "kind": "trial",
        "trial_key": CONFIG.trial_key,
        "cell_key": CONFIG.cell_key,
        "control": "false",
        "status": "completed",
    }
    assert run.data.params == CONFIG.to_params()
    assert run.data.metrics == {
        **METRICS,
        "val_accuracy": 0.3,
        "val_accuracy_at_1": 0.1,
        "final_val_accuracy": 0.3,
        "best_val_accuracy": 0.3,
        "epochs_run": 3,
    }
    assert parent.data.metrics == {}
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.run_name == CONFIG.name
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")


def test_the_columns_of_mlflows_page_are_filled(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({}, {}, source=describe_source(describe_code()))
    named = replace(CONFIG, data="glyphs", data_fingerprint="0123456789abcdef")
    fail_for(store, monkeypatch, "log_inputs", ConnectionError("lost"))
    record_trial(recorder, config=named)
    assert recorder.close(finished=True)
    (run,) = runs(store)
    assert run.data.tags["mlflow.source.name"] == "python -m grid.run"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    assert run.data.tags["mlflow.user"]
    assert run.data.tags.get("mlflow.source.git.commit", "unknown") in describe_code()["commit"]
    (parent,) = runs(store, "grid")
    assert parent.data.tags["mlflow.source.name"] == "python -m grid.run"
    (found,) = parent.inputs.dataset_inputs
    assert found.dataset.name == "glyphs"
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("glyphs", "0123456789abcdef")
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}


def test_every_epoch_is_one_value_per_metric_at_its_step(store: Store, recorder: Recorder) -> None:
    record_trial(recorder)
    recorder.close(finished=True)
    (run,) = runs(store)
    history = store.client.get_metric_history(run.info.run_id, "val_accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    (rung,) = store.client.get_metric_history(run.info.run_id, "val_accuracy_at_1")
    assert (rung.step, rung.value) == (1, 0.1)


def test_the_parent_run_holds_the_manifest(store: Store, recorder: Recorder) -> None:
    recorder.close(finished=False)
    (parent,) = runs(store, "grid")
    assert store.client.download_artifacts(parent.info.run_id, "grid.json")
    assert parent.info.status == "KILLED"


def test_a_second_recorder_takes_up_the_parent_run(store: Store, recorder: Recorder, tmp_path: Path) -> None:
    recorder.close(finished=False)
    again = Recorder(store, Spool(tmp_path / "again.jsonl"))
    again.begin({}, store.trials())
    again.close(finished=True)
    assert len(runs(store, "grid")) == 1


def test_a_stopped_trial_tells_its_last_epoch(store: Store, recorder: Recorder) -> None:
    record_trial(recorder, "stopped", epochs=1)
    recorder.close(finished=True)
    (run,) = runs(store)
    assert (run.data.tags["status"], run.data.tags["stopped_at_epoch"]) == ("stopped", "1")


def test_a_failed_trial_keeps_its_traceback(store: Store, recorder: Recorder) -> None:
    recorder.started(CONFIG, control=True)
    error = "Traceback (most recent call last):\n  ...\nRuntimeError: no luck"
    recorder.ended(CONFIG, "failed", epochs_run=0, best_val_accuracy=None, error=error)
    recorder.close(finished=True)
    (run,) = runs(store)
    assert (run.info.status, run.data.tags["status"], run.data.tags["control"]) == ("FAILED", "failed", "true")
    assert run.data.tags["error"] == "RuntimeError: no luck"
    assert Path(store.client.download_artifacts(run.info.run_id, "traceback.txt")).read_text() == error
    assert "best_val_accuracy" not in run.data.metrics


@pytest.mark.parametrize(
    ("error", "summary"),
    [
        ("", ""),
        ("RuntimeError: no luck", "RuntimeError: no luck"),
        ("Traceback (most recent call last):\n  File\n    code()\nValueError: a\n  b\nc", "ValueError: a"),
        (
            "Traceback (most recent call last):\n  File\nKeyError: 'x'\n\nDuring handling, another:\n\n"
            "Traceback (most recent call last):\n  File\nOSError: gone\n",
            "OSError: gone",
        ),
    ],
)
def test_a_traceback_is_summarised_by_the_exception_that_ended_it(error: str, summary: str) -> None:
    assert summarise_error(error) == summary


def test_what_was_recorded_reads_back(store: Store, recorder: Recorder) -> None:
    record_trial(recorder)
    recorder.started(other := TrialConfig(learning_rate=1.0, epochs=3), control=True)
    recorder.epoch_ended(other, EpochReport(epoch=1, **METRICS), is_rung=False)
    recorder.close(finished=False)
    stored = store.trials()
    assert stored[CONFIG.trial_key].config == CONFIG
    assert (stored[CONFIG.trial_key].status, stored[CONFIG.trial_key].control) == ("completed", False)
    assert (stored[other.trial_key].status, stored[other.trial_key].control) == ("", True)
    assert stored[other.trial_key].val_accuracies == (0.25,)


def test_more_trials_than_a_page_read_back(store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.record.store.PAGE_SIZE", 2)
    for seed in range(5):
        recorder.started(TrialConfig(learning_rate=1.0, epochs=3, seed=seed), control=False)
    recorder.close(finished=False)
    assert {trial.config.seed for trial in store.trials().values()} == set(range(5))


def test_the_driver_does_not_wait_for_a_slow_store(
    store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = hold(store, monkeypatch, "create_run")
    record_trial(recorder)
    assert runs(store) == []
    released.set()
    assert recorder.close(finished=True)
    assert len(runs(store)) == 1


def test_a_store_that_stays_away_is_told_and_the_spool_kept(
    store: Store, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError("the cable is cut")

    monkeypatch.setattr(store.client, "create_run", refuse)
    record_trial(recorder)
    assert not recorder.close(finished=True, patience_seconds=0.5)
    assert recorder.error == "the cable is cut"
    monkeypatch.undo()
    again = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    again.begin({}, store.trials())
    assert again.close(finished=True)
    assert [run.data.tags["status"] for run in runs(store)] == ["completed"]


def test_an_experiment_that_was_deleted_is_refused(store: Store) -> None:
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(InputError, match="^experiment 'some grid' is deleted in sqlite.*; restore it or pass another"):
        Store(store.uri, "some grid").create()


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("postgresql+psycopg", "connection .*failed: .*; pass another --store$"),
        (
            "postgresql+psycopg2",
            r"No module named 'psycopg2'; install the database's driver \(PostgreSQL: pip install ",
        ),
    ],
)
def test_a_database_that_refuses_is_named_at_once_for_who_writes_and_who_reads(scheme: str, reason: str) -> None:
    uri = f"{scheme}://nobody@127.0.0.1:1/none"
    begun = time.monotonic()
    with pytest.raises(InputError, match=f"^can't open the store {re.escape(uri)}: .*{reason}"):
        Store(uri, "some grid")
    with pytest.raises(InputError, match=f"^can't (open|read) the store {re.escape(uri)}: .*{reason}"), answering(uri):
        pass
    assert time.monotonic() - begun < 60


def test_a_spool_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(InputError, match="^can't write to the spool /proc/spool/"):
        open_spool(Path("/proc/spool"), "sqlite:////x.db", "some grid")


def test_a_disk_that_is_full_when_a_run_begins_is_told_in_one_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Spool(tmp_path / "spool.jsonl")) as spool:
        recorder = Recorder(store, spool)
        monkeypatch.setattr("grid.record.spool._append_durably", full_disk)
        with pytest.raises(InputError, match="^can't write to the spool .*: No space left on device; free disk space"):
            recorder.begin({}, {}, pictures={"samples.png": b"a picture"})


def full_disk(*given: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_spool_in_use_is_refused(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "sqlite:////x.db", "some grid")
    with pytest.raises(InputError, match="^experiment 'some grid' is being run by another process from here"):
        open_spool(tmp_path, "sqlite:////x.db", "some grid")
    spool.close()


def leave_in_spool(store: Store, folder: Path) -> None:
    """Report a trial as a driver that dies before anything is delivered."""
    spool = open_spool(folder, store.uri, store.experiment)
    record_trial(Recorder(store, spool))
    spool.close()


def test_what_a_dead_driver_left_is_delivered_first_and_once(store: Store, tmp_path: Path) -> None:
    leave_in_spool(store, tmp_path)
    for expected in (5, 0):
        spool = open_spool(tmp_path, store.uri, store.experiment)
        assert Recorder(store, spool).recover() == expected
        spool.close()
    (run,) = runs(store)
    assert (run.data.tags["status"], run.data.metrics["epochs_run"]) == ("completed", 3)


def test_a_trial_whose_reports_come_together_takes_three_requests(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_in_spool(store, tmp_path)
    asked: list[str] = []
    for name in ("create_run", "update_run", "log_batch", "log_text", "set_tag", "set_terminated"):
        real = getattr(store.client, name)

        def ask(*given: object, name: str = name, real: Callable[..., object] = real, **named: object) -> object:
            asked.append(name)
            return real(*given, **named)

        monkeypatch.setattr(store.client, name, ask)
    with closing(open_spool(tmp_path, store.uri, store.experiment)) as spool:
        Recorder(store, spool).recover()
    assert asked == ["create_run", "log_batch", "set_terminated"]


def test_a_status_comes_with_the_last_of_the_metrics(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_in_spool(store, tmp_path)
    monkeypatch.setattr(delivery, "BATCH_SIZE", 10)
    sent: list[tuple[int, int, list[str]]] = []
    real = store.client.log_batch

    def log_batch(run_id: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
        sent.append((len(metrics), len(params), [tag.key for tag in tags]))
        real(run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(store.client, "log_batch", log_batch)
    with closing(open_spool(tmp_path, store.uri, store.experiment)) as spool:
        Recorder(store, spool).recover()
    metrics, params, tags = zip(*sent, strict=True)
    assert (max(metrics), sum(metrics)) == (10, 3 * len(METRICS) + 4)  # 3 epochs, a rung, the final one, 2 at the end
    assert params == (len(CONFIG.to_params()), *[0] * (len(sent) - 1))
    assert tags == (*[[]] * (len(sent) - 1), ["status"])
    (run,) = runs(store)
    assert run.data.params == CONFIG.to_params()


def test_delivering_twice_doubles_nothing(store: Store, tmp_path: Path) -> None:
    leave_in_spool(store, tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    reports = path.read_bytes()
    for _ in range(2):  # the second time as if the note of the delivery had been lost
        path.write_bytes(reports)
        spool = open_spool(tmp_path, store.uri, store.experiment)
        assert Recorder(store, spool).recover() == 5
        spool.close()
    (run,) = runs(store)
    history = store.client.get_metric_history(run.info.run_id, "val_accuracy")
    assert [point.step for point in history] == [1, 2, 3]


def test_a_run_that_was_made_although_the_answer_was_lost_is_not_made_again(
    store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_run = store.client.create_run
    attempts = []

    def lose_the_answer(*given: object) -> object:
        attempts.append(create_run(*given))
        if len(attempts) == 1:
            raise OSError("connection reset")
        return attempts[-1]

    monkeypatch.setattr(store.client, "create_run", lose_the_answer)
    record_trial(recorder)
    assert recorder.close(finished=True)
    assert len(runs(store)) == len(attempts) == 1


def test_a_store_that_does_not_take_old_reports_is_told(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_in_spool(store, tmp_path)
    monkeypatch.setattr(store.client, "search_runs", lambda *given, **named: (_ for _ in ()).throw(OSError("gone")))
    spool = open_spool(tmp_path, store.uri, store.experiment)
    with pytest.raises(InputError, match=r"^can't write to the store .*: gone; the events of an earlier run stay in"):
        Recorder(store, spool).recover()
    spool.close()


def test_the_command_delivers_what_is_left(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_in_spool(store, tmp_path)
    where = ["--experiment", store.experiment, "--store", store.uri, "--spool", str(tmp_path)]
    assert main(["--replay", *where]) == 0
    assert capsys.readouterr().out == f"5 reports delivered to {store.uri}\n"
    assert len(runs(store)) == 1


def test_the_command_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", "--experiment", "x", "--store", "foo://x"]) == 2
    assert capsys.readouterr().err.startswith("grid.record: can't open the store 'foo://x'")


def test_a_trial_that_was_suspended_is_not_left_running_and_goes_on_in_the_same_run(
    store: Store, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.started(CONFIG, control=False)
    recorder.suspended(CONFIG)
    recorder.close(finished=False)
    assert [run.info.status for run in runs(store)] == ["KILLED"]
    again = Recorder(store, Spool(tmp_path / "again.jsonl"))
    again.begin({}, store.trials())
    record_trial(again)
    again.close(finished=True)
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


def test_runs_that_a_dead_driver_left_running_are_closed(store: Store, recorder: Recorder, tmp_path: Path) -> None:
    recorder.started(CONFIG, control=False)
    recorder.close(finished=False)  # no word of the trial: the driver died
    assert [run.info.status for run in runs(store)] == ["RUNNING"]
    again = Recorder(store, Spool(tmp_path / "again.jsonl"))
    again.begin({}, store.trials())
    again.close(finished=False)
    assert [run.info.status for run in runs(store)] == ["KILLED"]


def test_a_stop_is_known_as_soon_as_its_epoch(store: Store, recorder: Recorder) -> None:
    recorder.started(CONFIG, control=False)
    recorder.epoch_ended(CONFIG, EpochReport(epoch=1, **METRICS), is_rung=True, stopped=True)
    recorder.close(finished=False)
    trial = store.trials()[CONFIG.trial_key]
    assert (trial.status, trial.was_stopped, trial.stop_epoch) == ("", True, 1)


def test_a_control_is_stored_with_the_epoch_at_which_it_would_have_been_stopped(
    store: Store, recorder: Recorder
) -> None:
    recorder.started(CONFIG, control=True)
    for epoch in (1, 2, 3):
        recorder.epoch_ended(CONFIG, EpochReport(epoch=epoch, **METRICS), is_rung=epoch == 1, spared=epoch == 1)
    recorder.ended(CONFIG, "completed", epochs_run=3, best_val_accuracy=0.25)
    recorder.close(finished=True)
    (run,) = runs(store)
    assert run.data.tags["would_stop_at_epoch"] == "1"
    assert "stopped_at_epoch" not in run.data.tags
    trial = store.trials()[CONFIG.trial_key]
    assert (trial.status, trial.control, trial.was_stopped, trial.stop_epoch) == ("completed", True, False, 1)


def test_the_final_accuracy_is_that_of_the_last_epoch_of_the_budget_not_the_best(
    store: Store, recorder: Recorder
) -> None:
    recorder.started(CONFIG, control=False)
    for epoch, accuracy in enumerate((0.5, 0.75, 0.625), start=1):
        correct = b"\xe0\x80" if epoch == 3 else b""
        report = EpochReport(epoch=epoch, **METRICS | {"val_accuracy": accuracy}, val_correct=correct)
        recorder.epoch_ended(CONFIG, report, is_rung=epoch == 1)
    recorder.ended(CONFIG, "completed", epochs_run=3, best_val_accuracy=0.75)
    recorder.close(finished=True)
    (run,) = runs(store)
    assert run.data.metrics["final_val_accuracy"] == 0.625
    (final,) = store.client.get_metric_history(run.info.run_id, "final_val_accuracy")
    assert final.step == 3
    assert b64decode(run.data.tags["val_correct"]) == b"\xe0\x80"


@pytest.mark.parametrize("status", ["stopped", "diverged"])
def test_a_trial_that_does_not_complete_has_no_final_accuracy(store: Store, recorder: Recorder, status: str) -> None:
    recorder.started(CONFIG, control=False)
    recorder.epoch_ended(CONFIG, EpochReport(epoch=1, **METRICS), is_rung=True)
    last = METRICS | {"val_accuracy": math.nan}
    recorder.epoch_ended(CONFIG, EpochReport(epoch=2, **METRICS), is_rung=False)
    if status == "diverged":
        recorder.epoch_ended(CONFIG, EpochReport(epoch=3, **last, diverged=True), is_rung=False)
    recorder.ended(CONFIG, status, epochs_run=3, best_val_accuracy=0.25)
    recorder.close(finished=True)
    (run,) = runs(store)
    assert "final_val_accuracy" not in run.data.metrics
    assert "val_correct" not in run.data.tags


def test_reports_of_a_deleted_run_are_dropped_and_counted_and_the_others_arrive(
    store: Store, recorder: Recorder
) -> None:
    recorder.started(CONFIG, control=False)
    wait_until(lambda: any(run.data.params for run in runs(store)))
    store.client.delete_run(runs(store)[0].info.run_id)
    recorder.epoch_ended(CONFIG, EpochReport(epoch=1, **METRICS), is_rung=False)
    record_trial(recorder, config=(other := TrialConfig(learning_rate=1.0, epochs=3)))
    assert recorder.close(finished=False)
    assert recorder.dropped == {CONFIG.trial_key: 1}
    assert [run.data.tags["trial_key"] for run in runs(store)] == [other.trial_key]


def test_the_time_spent_is_recorded_once_for_the_grid_and_not_for_finalists(
    store: Store, recorder: Recorder, tmp_path: Path
) -> None:
    for seconds in (1.0, 2.04):
        recorder.time_spent(seconds)
    assert recorder.close(finished=False)
    assert store.grid_seconds() == 2.0
    with closing(Spool(tmp_path / "killed.jsonl")) as spool:  # of a driver that could deliver nothing
        Recorder(store, spool, "confirm").time_spent(9.0)
        Recorder(store, spool).time_spent(5.0)
        assert Recorder(store, spool).recover() == 1
    assert store.grid_seconds() == 5.0


def test_time_spent_on_a_grid_that_is_deleted_holds_nothing_up(store: Store, recorder: Recorder) -> None:
    store.client.delete_run(store.parent_id)
    recorder.time_spent(1.0)
    record_trial(recorder)
    wait_until(lambda: [run.data.tags.get("status") for run in runs(store)] == ["completed"])
    assert (recorder.parked, recorder.dropped) == ({}, {})


def test_reports_without_a_run_do_not_block_an_experiment(store: Store, tmp_path: Path) -> None:
    with closing(Spool(tmp_path / "orphan.jsonl")) as spool:
        Recorder(store, spool).epoch_ended(CONFIG, EpochReport(epoch=2, **METRICS), is_rung=False)
        again = Recorder(store, spool)
        assert again.recover() == 0
        ((path, (parked,)),) = again.parked.items()
        assert (path.name, spool.pending()[0], again.dropped) == ("orphan.parked.jsonl", [], {})
        assert parked.reason == "its trial has no run in the store: the start of the trial was lost or refused"


def test_an_error_of_an_earlier_try_is_taken_off(store: Store, recorder: Recorder, tmp_path: Path) -> None:
    recorder.started(CONFIG, control=False)
    recorder.ended(CONFIG, "failed", epochs_run=0, best_val_accuracy=None, error="RuntimeError: no luck")
    recorder.close(finished=False)
    again = Recorder(store, Spool(tmp_path / "again.jsonl"))
    again.begin({}, store.trials())
    record_trial(again)
    again.close(finished=True)
    (run,) = runs(store)
    assert (run.data.tags["status"], run.data.tags["error"]) == ("completed", "")


def test_failing_twice_at_the_same_epoch_is_one_value(store: Store, recorder: Recorder, tmp_path: Path) -> None:
    error = "RuntimeError: no luck"
    again = Recorder(store, Spool(tmp_path / "again.jsonl"))
    for each in (recorder, again):
        if each is again:
            again.begin({}, store.trials())
        each.started(CONFIG, control=False)
        each.ended(CONFIG, "failed", epochs_run=0, best_val_accuracy=None, error=error)
        each.close(finished=True)
    (run,) = runs(store)
    assert len(store.client.get_metric_history(run.info.run_id, "epochs_run")) == 1
    assert run.data.tags["error"] == error


def test_artifacts_that_cannot_be_written_are_told(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").write_text("in the way")
    with (
        closing(Spool(tmp_path / "spool.jsonl")) as spool,
        pytest.raises(InputError, match="^can't write to the store sqlite.*; fix its permissions, or pass another"),
    ):
        Recorder(store, spool).begin({"grid.json": b"{}"}, {})


@pytest.mark.parametrize(
    ("request_name", "error"),
    [
        ("create_run", KeyError("region")),
        ("create_run", SystemExit(3)),
        ("log_batch", EXPIRED),
        ("log_batch", MemoryError()),
        ("log_batch", SystemExit(3)),
        ("set_terminated", RecursionError()),
        ("set_terminated", SystemExit(3)),
    ],
)
def test_any_error_of_any_library_is_survived(
    request_name: str, error: BaseException, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.01)
    fail_for(store, monkeypatch, request_name, error)
    record_trial(recorder)
    assert recorder.close(finished=True)
    (run,) = runs(store)
    assert (run.data.tags["status"], run.info.status, recorder.error) == ("completed", "FINISHED", "")
    assert [point.step for point in store.client.get_metric_history(run.info.run_id, "val_accuracy")] == [1, 2, 3]


def test_a_silent_store_is_told_while_the_grid_runs_and_no_longer_when_it_answers(
    store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recorder.trouble == ""
    monkeypatch.setattr(record, "PATIENCE_SECONDS", 0.0)
    released = hold(store, monkeypatch, "create_run")
    record_trial(recorder)
    silent = re.compile(r"MLflow not answering for \d+ s, 5 reports waiting")
    wait_until(lambda: bool(silent.fullmatch(recorder.trouble)))
    released.set()
    wait_until(lambda: recorder.trouble == "")
    assert recorder.close(finished=True)


def test_a_trial_that_fails_alone_holds_no_other_up_and_arrives_once_it_can(
    store: Store, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.01)
    log_batch = store.client.log_batch

    def log(run_id: str, **batch: object) -> None:
        if run_id == store.run_ids().get(CONFIG.trial_key):
            raise KeyError("a bug of somebody else")
        log_batch(run_id, **batch)

    monkeypatch.setattr(store.client, "log_batch", log)
    record_trial(recorder)
    for seed in range(1, 9):
        record_trial(recorder, config=TrialConfig(learning_rate=1.0, epochs=3, seed=seed))
        wait_until(lambda seed=seed: len([run for run in runs(store) if run.info.status == "FINISHED"]) == seed)
    assert recorder.trouble == "5 reports refused by MLflow"
    assert not recorder.close(finished=True, patience_seconds=0.2)
    (complaint,) = recorder.complain("try again")
    reason = "KeyError: 'a bug of somebody else'"
    assert (
        complaint
        == f"MLflow did not take 5 reports of 1 trial: {reason}; kept in {tmp_path}/spool.parked.jsonl; try again"
    )
    monkeypatch.undo()
    with closing(Spool(tmp_path / "spool.jsonl")) as spool:
        again = Recorder(store, spool)
        assert (again.recover(), again.parked) == (5, {})
    assert {run.data.tags["status"] for run in runs(store)} == {"completed"}
    assert not list(tmp_path.glob("*.jsonl"))
    history = store.client.get_metric_history(store.run_ids()[CONFIG.trial_key], "val_accuracy")
    assert [point.step for point in history] == [1, 2, 3]


def test_a_trial_that_fails_alone_does_not_keep_an_experiment_from_going_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.01)
    leave_in_spool(store, tmp_path)
    fail_for(store, monkeypatch, "log_batch", RuntimeError("a bug"), times=100)
    with closing(open_spool(tmp_path, store.uri, store.experiment)) as spool:
        recorder = Recorder(store, spool)
        assert recorder.recover() == 0
        recorder.begin({}, store.trials())
        record_trial(recorder, config=OTHER)
        monkeypatch.undo()
        assert recorder.close(finished=True)
    assert [run.data.tags["status"] for run in runs(store)] == ["completed"] * 2


def test_a_report_that_is_refused_for_ever_is_parked_alone(store: Store, tmp_path: Path) -> None:
    with closing(Spool(tmp_path / "spool.jsonl")) as spool:
        recorder = Recorder(store, spool)
        recorder.begin({}, {})
        recorder.started(CONFIG, control=False)
        append_refused(spool)
        spool.append({"kind": "an event of a later version", "trial_key": CONFIG.trial_key})
        recorder.epoch_ended(CONFIG, EpochReport(epoch=1, **METRICS), is_rung=False)
        recorder.ended(CONFIG, "completed", epochs_run=1, best_val_accuracy=0.25)
        record_trial(recorder, config=OTHER)
        assert recorder.close(finished=True)
        ((path, parked),) = recorder.parked.items()
    refused, unknown = (line.reason for line in parked)
    assert refused.startswith('Invalid value "of two')
    assert unknown == "not an event that this version knows; a newer one may"
    assert path == tmp_path / "spool.parked.jsonl"
    assert {run.data.tags["status"] for run in runs(store)} == {"completed"}


def test_the_command_tries_parked_reports_again_and_says_what_stays(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(open_spool(tmp_path, store.uri, store.experiment)) as spool:
        record_trial(Recorder(store, spool))
        append_refused(spool)
    where = ["--experiment", store.experiment, "--store", store.uri, "--spool", str(tmp_path)]
    for delivered in (5, 0):
        assert main(["--replay", *where]) == 1
        output = capsys.readouterr()
        assert output.out == f"{delivered} reports delivered to {store.uri}\n"
        assert output.err.startswith("MLflow did not take 1 report of 1 trial: ")
        assert output.err.endswith("run the same command to try again, or delete the file to give them up\n")
    (path,) = tmp_path.glob("*.parked.jsonl")
    path.write_text(path.read_text().replace("of two\\nlines", "in_one_line"))
    assert main(["--replay", *where]) == 0
    assert runs(store)[0].data.metrics["in_one_line"] == 0.5
    assert not list(tmp_path.glob("*.jsonl"))


def test_parked_reports_of_a_trial_that_was_trained_again_meanwhile_double_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.01)
    leave_in_spool(store, tmp_path)
    with closing(open_spool(tmp_path, store.uri, store.experiment)) as spool:
        fail_for(store, monkeypatch, "create_run", RuntimeError("a bug"), times=100)
        Recorder(store, spool).recover()
        monkeypatch.undo()
    (parked,) = tmp_path.glob("*.parked.jsonl")
    kept = parked.read_bytes()
    parked.unlink()
    with closing(Spool(tmp_path / "another.jsonl")) as spool:
        recorder = Recorder(store, spool)
        recorder.begin({}, {})
        record_trial(recorder)
        assert recorder.close(finished=True)
    parked.write_bytes(kept)
    with closing(open_spool(tmp_path, store.uri, store.experiment)) as spool:
        again = Recorder(store, spool)
        again.recover()
        assert not again.parked
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    for name, steps in (("val_accuracy", [1, 2, 3]), ("epochs_run", [3])):
        assert [point.step for point in store.client.get_metric_history(run.info.run_id, name)] == steps


@pytest.mark.parametrize("error", [EXPIRED, OSError("the bucket is gone")])
def test_a_traceback_that_cannot_be_stored_holds_no_metric_up_and_survives_a_restart(
    error: Exception, store: Store, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_for(store, monkeypatch, "log_artifacts", error, times=100)
    recorder.started(CONFIG, control=False)
    recorder.ended(CONFIG, "failed", epochs_run=0, best_val_accuracy=None, error="RuntimeError: no luck")
    record_trial(recorder, config=OTHER)
    wait_until(lambda: sorted(run.info.status for run in runs(store)) == ["FAILED", "FINISHED"])
    monkeypatch.setattr(record, "PATIENCE_SECONDS", 0.0)
    silent = re.compile(r"artifact store not answering for \d+ s, 1 file waiting")
    wait_until(lambda: bool(silent.fullmatch(recorder.trouble)))
    assert not recorder.close(finished=True, patience_seconds=0.5)
    assert recorder.error.endswith(str(error))
    monkeypatch.undo()
    with closing(Spool(tmp_path / "spool.jsonl")) as spool:
        again = Recorder(store, spool)
        assert again.recover() == 0
        again.begin({}, store.trials())
        assert again.close(finished=True)
    run_id = store.run_ids()[CONFIG.trial_key]
    assert Path(store.client.download_artifacts(run_id, "traceback.txt")).read_text() == "RuntimeError: no luck"
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_upload_that_hangs_holds_no_metric_up(
    store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = hold(store, monkeypatch, "log_artifacts")
    recorder.started(CONFIG, control=False)
    recorder.ended(CONFIG, "failed", epochs_run=0, best_val_accuracy=None, error="RuntimeError: no luck")
    record_trial(recorder, config=OTHER)
    wait_until(lambda: sorted(run.info.status for run in runs(store)) == ["FAILED", "FINISHED"])
    released.set()
    assert recorder.close(finished=True)


def test_pictures_follow_when_the_recorder_has_begun(store: Store, tmp_path: Path) -> None:
    with closing(Spool(tmp_path / "spool.jsonl")) as spool:
        recorder = Recorder(store, spool)
        recorder.begin({}, {}, pictures={"samples.png": b"a picture"})
        assert recorder.close(finished=True)
    assert store.artifact("samples.png") == b"a picture"


def test_an_error_while_an_error_is_dealt_with_is_survived_and_told(
    store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(record, "PATIENCE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(store.client, "create_run", fail)
        patch.setattr(courier, "describe", fail)
        record_trial(recorder)
        wait_until(lambda: recorder.error == "MemoryError")
        assert re.fullmatch(r"MLflow not answering for \d+ s, 5 reports waiting", recorder.trouble)
    wait_until(lambda: recorder.error == recorder.trouble == "" and len(runs(store)) == 1)
    assert recorder.close(finished=True)


def test_a_spool_that_can_not_be_read_is_told_and_its_reports_arrive_when_it_can(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(courier, "LONGEST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(record, "PATIENCE_SECONDS", 0.0)
    spool = tmp_path / "spool.jsonl"
    recorder = Recorder(store, Spool(spool))
    spool.rename(tmp_path / "hidden")  # before its thread starts, which may have it open already
    recorder.begin({}, {})
    record_trial(recorder)
    wait_until(lambda: "No such file or directory" in recorder.error)
    wait_until(lambda: recorder.trouble.endswith("5 reports waiting"))
    (tmp_path / "hidden").rename(spool)
    assert recorder.close(finished=True)
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


def test_reports_wait_for_an_experiment_that_was_deleted_until_it_is_restored(
    store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "LONGEST_WAIT_SECONDS", 0.1)
    recorder.started(CONFIG, control=False)
    wait_until(lambda: bool(runs(store)))
    store.client.delete_experiment(store.experiment_id)
    record_trial(recorder)
    record_trial(recorder, config=OTHER)
    wait_until(lambda: recorder.error != "")
    store.client.restore_experiment(store.experiment_id)
    assert recorder.close(finished=True)
    assert (recorder.parked, recorder.dropped) == ({}, {})
    assert [run.data.tags["status"] for run in runs(store)] == ["completed"] * 2


def test_what_a_power_loss_leaves_is_told_in_one_line_and_the_rest_arrives(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_in_spool(store, tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b"\0" * 99 + b"\n" + b"\0" * 50)
    path.with_suffix(".delivered").touch()
    where = ["--experiment", store.experiment, "--store", store.uri, "--spool", str(tmp_path)]
    assert main(["--replay", *where]) == 0
    output = capsys.readouterr()
    assert output.out == f"5 reports delivered to {store.uri}\n"
    assert output.err == f"2 damaged lines (150 bytes) of {path} had to be left out; a power loss leaves such lines\n"
    assert runs(store)[0].data.tags["status"] == "completed"


def test_a_trial_with_a_hole_in_its_history_keeps_its_epochs_in_place(store: Store, recorder: Recorder) -> None:
    recorder.started(CONFIG, control=False)
    for epoch in (1, 3):
        recorder.epoch_ended(CONFIG, EpochReport(epoch=epoch, **METRICS | {"val_accuracy": epoch / 10}), is_rung=False)
    recorder.close(finished=False)
    accuracies = store.trials()[CONFIG.trial_key].val_accuracies
    assert (len(accuracies), accuracies[0], accuracies[2]) == (3, 0.1, 0.3)
    assert math.isnan(accuracies[1])
