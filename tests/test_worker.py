"""The work of a worker process, run in this one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grid.config import TrialConfig
from grid.data.load import load
from grid.metrics import EpochReport
from grid.train.checkpoints import Checkpoints
from grid.train.trial import DeviceData, Trial
from grid.train.worker import TRIES, Worker

CONFIG = TrialConfig(learning_rate=0.05, epochs=3)
WAITS: list[float] = []
"""Seconds that the worker waited for the storage."""


class Counting(Trial):
    """Counts its epochs instead of training; the next `raises` epochs raise."""

    raises = 0
    error: BaseException
    trained = 0

    def __init__(self, config: TrialConfig, data: DeviceData):
        self.epoch = 0

    def run_epoch(self) -> EpochReport:
        if Counting.raises:
            Counting.raises -= 1
            raise Counting.error
        self.epoch += 1
        Counting.trained += 1
        return EpochReport(epoch=self.epoch, val_accuracy=0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]


@pytest.fixture
def worker(glyphs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(Counting, "raises", 0)
    monkeypatch.setattr(Counting, "error", RuntimeError("out of luck"), raising=False)
    monkeypatch.setattr(Counting, "trained", 0)
    WAITS.clear()
    checkpoints = Checkpoints(str(tmp_path), "test")
    return Worker(load("glyphs", glyphs_dir, per_class=2), checkpoints, (1, 3), Counting, WAITS.append)


def test_a_trial_is_done_after_its_last_epoch(worker: Worker) -> None:
    results = [worker.run_epoch(CONFIG) for _ in range(3)]
    assert [(result["report"].epoch, result["done"]) for result in results] == [(1, False), (2, False), (3, True)]


def test_a_trial_is_saved_at_a_rung_only_when_it_continues(worker: Worker) -> None:
    worker.run_epoch(CONFIG)
    assert worker.checkpoints.load(CONFIG.trial_key, "cpu") is None
    worker.run_epoch(CONFIG)
    assert worker.checkpoints.load(CONFIG.trial_key, "cpu") == {"epoch": 1}


def test_another_trial_starts_from_scratch_and_a_saved_one_resumes(worker: Worker) -> None:
    other = TrialConfig(learning_rate=0.05, epochs=3, seed=1)
    epochs = [worker.run_epoch(CONFIG)["report"].epoch for _ in range(2)]
    for config in (other, CONFIG):
        worker.clear()
        epochs.append(worker.run_epoch(config)["report"].epoch)
    assert epochs == [1, 2, 1, 2]


def test_an_epoch_that_raises_is_retried_and_then_returned_as_an_error(worker: Worker) -> None:
    Counting.raises = TRIES - 1
    assert worker.run_epoch(CONFIG)["report"].epoch == 1
    Counting.raises = TRIES
    result = worker.run_epoch(CONFIG)
    assert result["done"]
    assert result["error"].endswith("RuntimeError: out of luck\n")


@contextmanager
def storage_away(folder: Path) -> Iterator[None]:
    """Put a file in the place of the storage's folder, so that it can be neither read nor written."""
    kept = folder / "kept"
    (folder / "test").mkdir(exist_ok=True)
    (folder / "test").rename(kept)
    (folder / "test").touch()
    yield
    (folder / "test").unlink()
    kept.rename(folder / "test")


def test_an_epoch_is_not_trained_again_because_the_storage_failed(worker: Worker, tmp_path: Path) -> None:
    worker.run_epoch(CONFIG)
    with storage_away(tmp_path):  # at a rung, where the trial is saved before it continues
        results = [worker.run_epoch(CONFIG) for _ in range(8)]
    for result in results:
        assert result["storage_error"].startswith(f"can't write to the storage '{tmp_path}': ")
        assert not result["done"]
    assert (WAITS, Counting.trained) == ([0.5, 1, 2, 4, 8, 8, 8, 8], 1)
    assert worker.run_epoch(CONFIG)["report"].epoch == 2
    assert worker.checkpoints.load(CONFIG.trial_key, "cpu") == {"epoch": 1}


def test_the_last_epoch_is_kept_until_it_is_saved(worker: Worker, tmp_path: Path) -> None:
    for _ in range(2):
        worker.run_epoch(CONFIG)
    with storage_away(tmp_path):
        assert [set(worker.run_epoch(CONFIG)) for _ in range(3)] == [{"storage_error", "done"}] * 3
    result = worker.run_epoch(CONFIG)
    assert (result["report"].epoch, result["done"], Counting.trained) == (3, True, 3)
    assert worker.checkpoints.load(CONFIG.trial_key, "cpu") == {"epoch": 3}


def test_a_trial_that_is_to_resume_waits_for_the_storage_and_does_not_start_over(
    worker: Worker, tmp_path: Path
) -> None:
    for _ in range(2):
        worker.run_epoch(CONFIG)
    worker.clear()
    with storage_away(tmp_path):
        assert worker.run_epoch(CONFIG)["storage_error"].startswith(f"can't read the storage '{tmp_path}': ")
    assert worker.run_epoch(CONFIG)["report"].epoch == 2


def test_failures_of_the_storage_are_no_tries_of_the_trial(worker: Worker, tmp_path: Path) -> None:
    Counting.raises = TRIES - 1
    with storage_away(tmp_path):
        for _ in range(5 * TRIES):
            assert "storage_error" in worker.run_epoch(CONFIG)
    assert worker.run_epoch(CONFIG)["report"].epoch == 1


def test_after_an_error_of_the_device_a_worker_trains_no_more_and_says_so(worker: Worker) -> None:
    worker.run_epoch(CONFIG)
    Counting.raises, Counting.error = 1, RuntimeError("CUDA error: an illegal memory access was encountered")
    said = {"device_error": str(Counting.error), "out_of_memory": False, "done": False}
    assert worker.run_epoch(CONFIG) == said
    worker.clear()  # as for the next trial
    assert worker.run_epoch(CONFIG) == said
    assert Counting.trained == 1


def test_a_worker_says_that_memory_was_short(worker: Worker) -> None:
    Counting.raises, Counting.error = 1, MemoryError()
    assert worker.run_epoch(CONFIG) == {"device_error": "MemoryError", "out_of_memory": True, "done": False}
