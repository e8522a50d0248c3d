"""The work of one process: train one trial after another, epoch by epoch. `grid.tune.tuner` runs it in Ray."""

import time
import traceback
from collections.abc import Callable
from typing import Any

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.metrics import EpochReport
from grid.train.checkpoints import Checkpoints, StorageError
from grid.train.device_errors import DeviceError
from grid.train.trial import DeviceData, Trial

TRIES = 2
"""Attempts at an epoch that raises before its trial counts as failed."""
WAIT_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between two attempts to reach a storage that fails; the last is repeated."""


class Worker:
    """Trains trials, keeping the images on the device and the current trial in memory.

    A trial that continues past a rung is saved first, so that a worker that dies costs it at most one rung.

    Args:
        dataset: Images to train on.
        checkpoints: Where trials are saved, and resumed from.
        checkpoint_epochs: Epochs after which a trial is saved.
        make_trial: Makes a trial.
        sleep: Waits a number of seconds.
        save_each_epoch: Whether a trial is saved after every epoch that is not its last.
    """

    def __init__(
        self,
        dataset: Dataset,
        checkpoints: Checkpoints,
        checkpoint_epochs: tuple[int, ...],
        make_trial: Callable[[TrialConfig, DeviceData], Trial] = Trial,
        sleep: Callable[[float], None] = time.sleep,
        *,
        save_each_epoch: bool = False,
    ):
        self.checkpoints = checkpoints
        self._dataset = dataset
        self._checkpoint_epochs = checkpoint_epochs
        self._make_trial = make_trial
        self._sleep = sleep
        self._save_each_epoch = save_each_epoch
        self._data: DeviceData | None = None
        self._waits = 0
        self._device_error: DeviceError | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the current trial; the next epoch begins or resumes the trial that it is called with."""
        self._trial: Trial | None = None
        self._report: EpochReport | None = None  # of an epoch that is trained, but not saved yet
        self._failures = 0

    def run_epoch(self, config: TrialConfig) -> dict[str, Any]:
        """Train the next epoch of the current trial or, after `clear`, of another one.

        Returns:
            `report` with an `EpochReport`, or `error` with a traceback, or `storage_error` if the storage has failed
            and nothing is lost: call again; or `device_error` with a line, and `out_of_memory`, if this process can
            train no more: end it. And `done`, whether no epoch follows. An error is returned, not raised, so that the
            worker survives it.
        """
        while self._device_error is None:
            try:
                report = self._run_epoch(config)
            except StorageError as error:
                return self.wait_for_storage(error)
            except Exception as error:  # noqa: BLE001  (any other error is recorded as the trial's failure)
                self._device_error = DeviceError.of(error)
                self._trial = self._report = None
                self._failures += 1
                if self._failures == TRIES and self._device_error is None:
                    return {"error": traceback.format_exc(), "done": True}
            else:
                self._failures = self._waits = 0
                return {"report": report, "done": report.diverged or report.epoch == config.epochs}
        short = self._device_error.out_of_memory
        return {"device_error": str(self._device_error), "out_of_memory": short, "done": False}

    def wait_for_storage(self, error: StorageError) -> dict[str, Any]:
        """Wait a while, longer each time, and return what `run_epoch` returns for a storage that has failed."""
        self._sleep(WAIT_SECONDS[min(self._waits, len(WAIT_SECONDS) - 1)])
        self._waits += 1
        return {"storage_error": str(error), "done": False}

    def _run_epoch(self, config: TrialConfig) -> EpochReport:
        trial = self._resume(config)
        if self._report is None:
            if trial.epoch in self._checkpoint_epochs:  # not earlier: now it is known to continue
                self.checkpoints.save(config.trial_key, trial.state_dict())
            self._report = trial.run_epoch()
        is_last = trial.epoch == config.epochs
        if self._save_each_epoch if not is_last else trial.epoch in self._checkpoint_epochs:
            self.checkpoints.save(config.trial_key, trial.state_dict())
        report, self._report = self._report, None
        return report

    def _resume(self, config: TrialConfig) -> Trial:
        if self._data is None:
            self._data = DeviceData.from_dataset(self._dataset, config.device)
        if self._trial is None:
            state = self.checkpoints.load(config.trial_key, config.device)
            trial = self._make_trial(config, self._data)
            if state is not None:
                trial.load_state_dict(state)
            self._trial = trial
        return self._trial
