"""`grid.tune.tuner` on a real Ray: one private cluster for all tests of the file."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray.tune.search import Searcher

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.data.load import load
from grid.metrics import EpochReport
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.train.checkpoints import Checkpoints
from grid.train.trial import DeviceData, train
from grid.tune.connection import connect, disconnect
from grid.tune.preflight import CodeVersion
from grid.tune.queue import Queue
from grid.tune.tuner import AshaScheduler, run_trials
from tests.broken_devices import OneWrong

pytestmark = pytest.mark.slow

CONFIG = TrialConfig(learning_rate=0.05, optimizer="sgd", epochs=3, hidden_sizes="32-32", batch_norm=True)


def worker_pids() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            names = ("TrialWorker", "ResourceTrainable")  # Ray renames a process while it trains
            found |= {process.pid} if any(name in process.name() for name in names) else set()
    return found


class Notes:
    """A listener that notes every event, and interrupts the run after a number of epochs."""

    def __init__(self, end_after: int = 10**9):
        self.starts: list[str] = []
        self.reports: dict[str, list[EpochReport]] = {}
        self.ends: dict[str, tuple[str, str]] = {}
        self.spared_at: dict[str, int] = {}
        self.suspensions: list[str] = []
        self.worker_pids: set[int] = set()
        self.problems: list[str] = []
        self.notices: list[str] = []
        self.end_after = end_after

    def started(self, config: TrialConfig) -> None:
        self.starts.append(config.trial_key)

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        self.reports.setdefault(config.trial_key, []).append(report)
        if spared:
            self.spared_at[config.trial_key] = report.epoch

    def ended(self, config: TrialConfig, status: str, error: str) -> None:
        self.ends[config.trial_key] = (status, error)

    def suspended(self, config: TrialConfig) -> None:
        self.suspensions.append(config.trial_key)

    def notice(self, problem: str) -> None:
        self.notices.append(problem)

    def give_up(self, problem: str) -> None:
        self.problems.append(problem)

    def tick(self) -> None:
        self.worker_pids |= worker_pids()

    @property
    def suspending(self) -> bool:
        return False

    @property
    def interrupted(self) -> bool:
        return bool(self.problems) or sum(map(len, self.reports.values())) >= self.end_after


@pytest.fixture(scope="module")
def packing() -> Iterator[Packing]:
    yield connect(None, 2)
    disconnect()


@pytest.fixture(scope="module")
def dataset(glyphs_dir: Path) -> Dataset:
    return load("glyphs", glyphs_dir, per_class=20)


def run(trials: list[TrialConfig], dataset: Dataset, packing: Packing, folder: Path, **changes: object) -> Notes:
    notes = Notes(**({"end_after": changes.pop("end_after")} if "end_after" in changes else {}))  # type: ignore[arg-type]
    settings = {"asha": Asha(()), "controls": (), "packing": packing}
    settings["checkpoints"] = Checkpoints(str(folder), "test")
    run_trials(trials, dataset, notes, **(settings | changes))  # type: ignore[arg-type]
    return notes


def test_a_trial_in_a_worker_yields_the_numbers_of_a_plain_training(
    dataset: Dataset, packing: Packing, tmp_path: Path
) -> None:
    notes = run([CONFIG], dataset, packing, tmp_path)
    plain = train(CONFIG, DeviceData.from_dataset(dataset)).reports
    assert notes.ends == {CONFIG.trial_key: ("completed", "")}
    assert [(report.val_loss, report.val_accuracy) for report in notes.reports[CONFIG.trial_key]] == [
        (report.val_loss, report.val_accuracy) for report in plain
    ]


def test_asha_stops_trials_but_never_unstopped_controls(dataset: Dataset, packing: Packing, tmp_path: Path) -> None:
    trials = [replace(CONFIG, seed=seed, learning_rate=0.05 / 4**seed) for seed in range(6)]
    control = trials[-1].trial_key
    asha = Asha((1,))
    notes = run(trials, dataset, packing, tmp_path, asha=asha, controls={control})
    statuses = [notes.ends[trial.trial_key][0] for trial in trials]
    assert statuses[-1] == "completed"
    assert "stopped" in statuses
    verdict = asha.stop_epoch(control)
    assert notes.spared_at == ({} if verdict is None else {control: verdict})
    assert len(asha.arrivals("mlp", 1)) == 6
    for trial, status in zip(trials, statuses, strict=True):
        assert len(notes.reports[trial.trial_key]) == (1 if status == "stopped" else 3)


def test_a_control_that_asha_would_have_stopped_is_reported_as_such_once(
    dataset: Dataset, packing: Packing, tmp_path: Path
) -> None:
    asha = Asha((1, 2))
    for earlier in range(3):
        asha.restore(f"earlier {earlier}", group="mlp", epoch=1, value=0.99, stop_epoch=None)
    poor = replace(CONFIG, learning_rate=1e-9)
    notes = run([poor], dataset, packing, tmp_path, asha=asha, controls={poor.trial_key})
    assert notes.ends == {poor.trial_key: ("completed", "")}
    assert notes.spared_at == {poor.trial_key: 1}


def test_workers_train_many_trials_whatever_becomes_of_one(dataset: Dataset, packing: Packing, tmp_path: Path) -> None:
    """One trial diverges, which is neither stopped nor completed, and one raises: it has failed, with its traceback."""
    wild, broken = replace(CONFIG, learning_rate=1e20, batch_norm=False), replace(CONFIG, seed=OneWrong.WRONG)
    others = [replace(CONFIG, seed=seed) for seed in range(6)]
    before = worker_pids()
    notes = run([wild, broken, *others], dataset, packing, tmp_path, make_trial=OneWrong, asha=Asha((1,)))
    assert notes.ends[wild.trial_key] == ("diverged", "")
    status, error = notes.ends[broken.trial_key]
    assert status == "failed"
    assert error.startswith("Traceback")
    assert error.strip().endswith("ValueError: a wrong shape")
    assert "completed" in {notes.ends[other.trial_key][0] for other in others} <= {"completed", "stopped"}
    assert 1 <= len(notes.worker_pids - before) <= packing.concurrency


def test_trials_start_in_the_order_given_and_tune_leaves_nothing_behind(
    dataset: Dataset, packing: Packing, tmp_path: Path
) -> None:
    trials = [replace(CONFIG, seed=seed, epochs=1) for seed in (3, 1, 4, 0, 5)]
    notes = run(trials, dataset, replace(packing, concurrency=1), tmp_path)
    assert notes.starts == [trial.trial_key for trial in trials]
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_free_worker_does_not_get_a_trial_for_which_a_worker_is_starting() -> None:
    scheduler = AshaScheduler(Asha(()), (), Notes())
    waiting, stopped, new = (
        SimpleNamespace(trial_id=status, status=status.rstrip("2")) for status in ("PENDING", "TERMINATED", "PENDING2")
    )
    scheduler.on_trial_add(None, waiting)  # type: ignore[arg-type]
    assert scheduler.choose_trial_to_run(None) is waiting  # a worker starts for it, which takes a while
    scheduler.on_trial_add(None, stopped)  # type: ignore[arg-type]
    scheduler.on_trial_add(None, new)  # type: ignore[arg-type]
    assert scheduler.choose_trial_to_run(None) is new  # gets the worker that has become free
    assert scheduler.choose_trial_to_run(None) is None


def test_a_trial_whose_worker_died_starts_before_trials_that_wait() -> None:
    lost, waiting = CONFIG, replace(CONFIG, seed=1)
    queue = Queue([lost, waiting], 2, Notes())
    assert queue.suggest("1") == {"trial": lost}
    queue.on_trial_complete("1", error=True)
    queue.put_back(lost)
    assert queue.suggest("2") == {"trial": lost}
    assert queue.suggest("3") == {"trial": waiting}
    queue.on_trial_complete("3")
    assert queue.suggest("4") is None  # trial 2 still runs, and may be put back
    queue.on_trial_complete("2")
    assert queue.suggest("5") == Searcher.FINISHED


def test_a_queue_that_may_hand_out_less_waits_until_enough_have_ended() -> None:
    queue = Queue([replace(CONFIG, seed=seed) for seed in range(4)], 3, Notes())
    assert all(queue.suggest(str(number)) for number in range(2))
    queue.most = 2
    assert queue.suggest("2") is None
    queue.on_trial_complete("0")
    assert queue.suggest("3") == {"trial": replace(CONFIG, seed=2)}


def test_an_interruption_suspends_the_trials_that_run(dataset: Dataset, packing: Packing, tmp_path: Path) -> None:
    trials = [replace(CONFIG, seed=seed, epochs=50) for seed in range(3)]
    notes = run(trials, dataset, packing, tmp_path, end_after=4)
    assert notes.ends == {}
    assert sorted(notes.suspensions) == sorted(set(notes.starts))
    assert 4 <= sum(map(len, notes.reports.values())) < 50


def test_a_worker_on_a_node_with_other_code_ends_the_run_with_one_line_and_no_trial(
    dataset: Dataset, packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = CodeVersion.here()
    monkeypatch.setattr("grid.tune.tuner.CodeVersion.here", lambda: replace(here, digest="another"))
    notes = run([CONFIG], dataset, packing, tmp_path)
    assert notes.ends == notes.reports == {}
    assert re.match(
        r"^node 127\.0\.0\.1 \(.+\) has other code \(\w+, the driver another\); bring the", notes.problems[0]
    )
    assert list(tmp_path.rglob("probe-*")) == []


def test_workers_read_the_images_from_the_memory_of_their_node(dataset: Dataset, packing: Packing) -> None:
    @ray.remote
    def read(given: Dataset) -> bool:
        return bool(given.train_images.flags.writeable)  # a copy would be writeable

    assert ray.get(read.remote(ray.put(dataset))) is False


class Killer(Notes):
    """Kills the workers once, as soon as a trial has reported a number of epochs."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after
        self.killed: set[int] = set()

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        super().epoch_ended(config, report, stopped=stopped)
        if report.epoch >= self.after and not self.killed:
            self.killed = worker_pids()
            for pid in self.killed:
                with suppress(ProcessLookupError):  # of an earlier test, just ended
                    os.kill(pid, signal.SIGKILL)


def test_the_death_of_a_worker_costs_at_most_a_rung_and_no_bit(
    dataset: Dataset, packing: Packing, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=6, optimizer="adam", lr_schedule="cosine", dropout=True)
    notes = Killer(after=4)
    checkpoints = Checkpoints(str(tmp_path), "test")
    settings = {"controls": (), "packing": packing}
    run_trials([config], dataset, notes, asha=Asha((1, 3)), checkpoints=checkpoints, **settings)  # type: ignore[arg-type]
    assert notes.killed
    assert notes.ends == {config.trial_key: ("completed", "")}
    epochs = [report.epoch for report in notes.reports[config.trial_key]]
    assert epochs[-3:] == [4, 5, 6]
    assert epochs[: epochs.index(4) + 1] == [1, 2, 3, 4]
    assert set(epochs[epochs.index(4) + 1 :]) <= {4, 5, 6}  # resumed after epoch 3, not begun again
    last = {report.epoch: report.val_loss for report in notes.reports[config.trial_key]}
    plain = {report.epoch: report.val_loss for report in train(config, DeviceData.from_dataset(dataset)).reports}
    assert last == plain


class Assassin(Notes):
    """Kills every worker as soon as it is there."""

    def tick(self) -> None:
        for pid in worker_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_trial_whose_workers_all_die_fails_with_the_reason(
    dataset: Dataset, packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grid.tune.recovery.MOST_DEATHS", 2)
    notes = Assassin()
    settings = {"asha": Asha(()), "controls": (), "checkpoints": Checkpoints(str(tmp_path), "test")}
    run_trials([CONFIG], dataset, notes, packing=packing, **settings)  # type: ignore[arg-type]
    reason = "killed, or crashed; the kernel's log (dmesg) of its machine may say why"
    assert notes.ends == {CONFIG.trial_key: ("failed", f"its worker died 2 times without finishing an epoch: {reason}")}
    assert notes.notices == [f"a worker died: {reason}"] * 2


class Stopper(Notes):
    """Stops the worker of a trial a number of times, each time after it has reported two epochs."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        super().epoch_ended(config, report, stopped=stopped)
        if report.epoch == 2 and self.times:
            self.times -= 1
            for pid in worker_pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("times", [1, 2])
def test_an_epoch_that_hangs_is_ended_and_tried_once_more(
    times: int, dataset: Dataset, packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grid.tune.recovery.FLOOR_SECONDS", 15.0)
    config = replace(CONFIG, epochs=6)
    notes = Stopper(times)
    checkpoints = Checkpoints(str(tmp_path), "test")
    settings = {"asha": Asha((1,)), "controls": (), "packing": packing}
    run_trials([config], dataset, notes, checkpoints=checkpoints, **settings)  # type: ignore[arg-type]
    overdue = r"an epoch took more than \d+ s, 20 times as long as expected"
    assert len(notes.notices) == times
    assert all(re.fullmatch(overdue, notice) for notice in notes.notices)
    if times == 2:
        ((status, error),) = notes.ends.values()
        assert (status, error) == ("failed", f"{notes.notices[1]}, twice")
        return
    assert notes.ends == {config.trial_key: ("completed", "")}
    last = {report.epoch: report.val_loss for report in notes.reports[config.trial_key]}
    plain = {report.epoch: report.val_loss for report in train(config, DeviceData.from_dataset(dataset)).reports}
    assert last == plain


class Unplugger(Notes):
    """Puts a file in the place of the storage after an epoch, and takes it away again after some failures."""

    def __init__(self, folder: Path, failures: int):
        super().__init__()
        self.folder = folder
        self.failures = failures

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        super().epoch_ended(config, report, stopped=stopped)
        if report.epoch == 1:
            (self.folder / "test").rename(self.folder / "kept")
            (self.folder / "test").touch()

    def notice(self, problem: str) -> None:
        super().notice(problem)
        if len(self.notices) == self.failures:
            (self.folder / "test").unlink()
            (self.folder / "kept").rename(self.folder / "test")


def test_a_storage_that_fails_for_a_while_costs_nothing(dataset: Dataset, packing: Packing, tmp_path: Path) -> None:
    notes = Unplugger(tmp_path, 3)
    settings = {"asha": Asha((1,)), "controls": (), "checkpoints": Checkpoints(str(tmp_path), "test")}
    run_trials([CONFIG], dataset, notes, packing=packing, **settings)  # type: ignore[arg-type]
    assert notes.ends == {CONFIG.trial_key: ("completed", "")}
    assert [report.epoch for report in notes.reports[CONFIG.trial_key]] == [1, 2, 3]
    assert len(notes.notices) == 3


def test_a_storage_that_stays_away_suspends_the_trials_and_is_named(
    dataset: Dataset, packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grid.tune.recovery.STORAGE_PATIENCE_SECONDS", 2.0)
    notes = Unplugger(tmp_path, 10**9)
    settings = {"asha": Asha((1,)), "controls": (), "checkpoints": Checkpoints(str(tmp_path), "test")}
    run_trials([CONFIG], dataset, notes, packing=packing, **settings)  # type: ignore[arg-type]
    assert notes.ends == {}
    assert notes.suspensions == [CONFIG.trial_key]
    assert notes.problems[0].startswith(f"can't write to the storage '{tmp_path}': ")
