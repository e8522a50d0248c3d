"""What a worker process does: trains one trial after another, epoch by epoch. `grid.tune.tuner` hangs it into Ray."""

import traceback
from collections.abc import Callable
from typing import Any

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.train.checkpoints import Checkpoints
from grid.train.trial import DeviceData, Trial

TRIES = 2
"""How often an epoch that raises is tried."""


class Worker:
    """Keeps the images on the device and the trial in hand.

    A trial that goes on past a rung is put down first, so that the death of its worker costs at most one rung.

    Args:
        dataset: What is trained on.
        checkpoints: Where trials are put down, and taken up if they were.
        checkpoint_epochs: After which epochs.
        begin: Makes a trial; `benchmarks.grid_scale` gives one that replays a curve.
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
        """Let go of the trial in hand."""
        self._trial = None

    def run_epoch(self, config: TrialConfig) -> dict[str, Any]:
        """Train the next epoch of a trial, that in hand or, after `clear`, another.

        Returns:
            Its `EpochReport` as `report`, or `error` with a traceback, and `done`: whether no epoch follows. An error
            of the trial is a result, so that the worker lives on.
        """
        for attempt in range(TRIES):
            try:
                trial = self._resume(config)
                if trial.epoch in self._checkpoint_epochs:  # not before it is known to go on
                    self.checkpoints.save(config.trial_key, trial.state_dict())
                report = trial.run_epoch()
                if trial.epoch == config.epochs and trial.epoch in self._checkpoint_epochs:
                    self.checkpoints.save(config.trial_key, trial.state_dict())
            except Exception:  # noqa: BLE001  (whatever it is, it is recorded as the trial's failure)
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
