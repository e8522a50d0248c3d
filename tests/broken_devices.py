"""Trials whose devices fail: importable by workers, as code of a test file is not."""

import os
import time
from pathlib import Path
from uuid import uuid4

import ray
import torch

from grid.config import TrialConfig
from grid.metrics import EpochReport
from grid.train.trial import DeviceData, Trial
from grid.tune.room import MOST_FAILURES
from tests.waiting import wait_until

ILLEGAL = "CUDA error: an illegal memory access was encountered"
MOST = 3
"""Trials that fit into the memory of the machine that is made up here."""


class Sticky(Trial):
    """Trains; but the first process that comes to one trial breaks, and stays so, as after an error of a GPU."""

    broken = False

    def run_epoch(self) -> EpochReport:
        mark = Path(os.environ["BREAKS"])
        if self.config.seed == 3 and not mark.exists():
            mark.touch()
            Sticky.broken = True
        if Sticky.broken:
            raise torch.AcceleratorError(ILLEGAL)
        return super().run_epoch()


class Crowded(Trial):
    """Trains, if no more than `MOST` processes of its kind are there; the first ones wait until there are more."""

    def __init__(self, config: TrialConfig, data: DeviceData):
        super().__init__(config, data)
        self._folder = Path(os.environ["CROWD"])
        (self._folder / str(os.getpid())).touch()

    def run_epoch(self) -> EpochReport:
        too_many = self._folder / "too many"
        deadline = time.monotonic() + 300  # processes of a busy machine start one after the other
        while not too_many.exists() and not self._is_crowded() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._is_crowded():
            too_many.touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().run_epoch()

    def _is_crowded(self) -> bool:
        return sum(Path("/proc", mark.name).exists() for mark in self._folder.iterdir()) > MOST


class OneHuge(Trial):
    """Trains, but for one seed, which finds no memory however few there are."""

    HUGE = 9

    def run_epoch(self) -> EpochReport:
        if self.config.seed == self.HUGE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        time.sleep(0.5)  # so that others are beside it
        return super().run_epoch()


class Starved(Trial):
    """Finds no memory, however few there are."""

    def run_epoch(self) -> EpochReport:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class OneWrong(Trial):
    """Trains, but for one seed."""

    WRONG = 9

    def run_epoch(self) -> EpochReport:
        if self.config.seed == self.WRONG:
            raise ValueError("a wrong shape")
        return super().run_epoch()


class Wrong(Trial):
    """Raises what is the training's own fault."""

    def run_epoch(self) -> EpochReport:
        raise ValueError("a wrong shape")


class Broken(Trial):
    """Trains, but not on the second of two GPUs; the first one waits until that has failed often enough."""

    def run_epoch(self) -> EpochReport:
        failures = Path(os.environ["FAILURES"])
        if ray.get_gpu_ids() == [1]:
            (failures / uuid4().hex).touch()
            raise torch.AcceleratorError(ILLEGAL)
        wait_until(lambda: len(list(failures.iterdir())) >= MOST_FAILURES, 300, every=0.1)
        return super().run_epoch()
