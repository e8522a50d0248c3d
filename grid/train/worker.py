"""The work of one process: train one trial after another, epoch by epoch. `grid.tune.tuner` runs it in Ray."""

import traceback
from collections.abc import Callable
from typing import Any

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.train.checkpoints import Checkpoints
from grid.train.trial import DeviceData, Trial

TRIES = 2
"""Attempts at an epoch that raises before its trial counts as failed."""


class Worker:
    """Trains trials, keeping the images on the device and the current trial in memory.

    A trial that continues past a rung is saved first, so that a worker that dies costs it at most one rung.

    Args:
        dataset: Images to train on.
        checkpoints: Where trials are saved, and resumed from.
        checkpoint_epochs: Epochs after which a trial is saved.
        begin: Makes a trial; `benchmarks.grid_scale` passes one that replays a curve.
    """

    def __init__(
        self,
        dataset: Dataset,
        checkpoints: Checkpoints,
        checkpoint_epochs: tuple[int, ...],
        begin: Callable[[TrialConfig, DeviceData], Trial] = Trial,
    ):
        self.checkpoints = checkpoints
        self._dataset = dataset
        self._checkpoint_epochs = checkpoint_epochs
        self._begin = begin
        self._data: DeviceData | None = None
        self._trial: Trial | None = None

    def clear(self) -> None:
        """Forget the current trial; the next epoch begins or resumes the trial that it is called with."""
        self._trial = None

    def run_epoch(self, config: TrialConfig) -> dict[str, Any]:
        """Train the next epoch of the current trial or, after `clear`, of another one.

        Returns:
            `report` with an `EpochReport`, or `error` with a traceback; and `done`, whether no epoch follows. An error
            is returned, not raised, so that the worker survives it.
        """
        for attempt in range(TRIES):
            try:
                trial = self._resume(config)
                if trial.epoch in self._checkpoint_epochs:  # not earlier: now it is known to continue
                    self.checkpoints.save(config.trial_key, trial.state_dict())
                report = trial.run_epoch()
                if trial.epoch == config.epochs and trial.epoch in self._checkpoint_epochs:
                    self.checkpoints.save(config.trial_key, trial.state_dict())
            except Exception:  # noqa: BLE001  (any error is recorded as the trial's failure)
                self._trial = None
                if attempt == TRIES - 1:
                    return {"error": traceback.format_exc(), "done": True}
            else:
                return {"report": report, "done": report.diverged or report.epoch == config.epochs}
        raise AssertionError("unreachable")

    def _resume(self, config: TrialConfig) -> Trial:
        if self._data is None:
            self._data = DeviceData.from_dataset(self._dataset, config.device)
        if self._trial is None:
            self._trial = self._begin(config, self._data)
            state = self.checkpoints.load(config.trial_key, config.device)
            if state is not None:
                self._trial.load_state_dict(state)
        return self._trial
