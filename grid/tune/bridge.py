"""Hears what Ray Tune says of the trials, and tells a `Listener`; ends workers that hang or whose device failed."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from grid.config import TrialConfig
from grid.metrics import EpochReport
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.tune import private_ray, recovery
from grid.tune.connection import is_one_machine
from grid.tune.limits import out_of_memory_kills
from grid.tune.listener import DriverOnly, Listener
from grid.tune.queue import Queue
from grid.tune.recovery import AwakeClock, Deadlines, Death, Recovery, StorageWaits, explain_death
from grid.tune.room import Room


class Bridge(DriverOnly, tune.Callback):
    """Translates Tune's calls for a `Listener`."""

    def __init__(
        self,
        listener: Listener,
        asha: Asha,
        queue: Queue,
        packing: Packing,
        *,
        controls: Collection[str],
        keep_going: bool,
    ):
        super().__init__(listener)
        self._asha = asha
        self._controls = controls
        self._queue = queue
        self._room = Room(queue, packing)
        self._recovery = Recovery(packing.concurrency, keep_going=keep_going)
        self._clock = AwakeClock()
        self._deadlines = Deadlines(self._clock, recovery.FLOOR_SECONDS)
        self._storage_waits = StorageWaits(self._clock, recovery.STORAGE_PATIENCE_SECONDS)
        self._started: dict[str, TrialConfig] = {}
        """Trials that have started and not ended."""
        self._tune_trials: dict[str, TuneTrial] = {}
        self._overdue: dict[str, str] = {}
        """Why a trial's worker was killed from here."""
        self._device_errors: dict[str, dict[str, Any]] = {}
        """What a worker said of its device before it was killed from here, by trial key."""
        self._devices: dict[str, str] = {}
        """Where each trial runs, as far as its worker has said so: the node and, of it, the GPU."""
        self._shrinks_before: dict[str, int] = {}
        """How often the room for trials had shrunk when a trial began the epoch that runs."""
        self._suspended: set[str] = set()
        """Trials that train no further in this run, though they have neither ended nor been stopped."""
        self._kills = out_of_memory_kills()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """End what hangs, and let the listener work."""
        self._clock.look()
        for trial_key, reason in self._deadlines.overdue().items():
            self._overdue[trial_key] = reason
            private_ray.kill_worker(self._tune_trials[trial_key])
        self._listener.tick()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note the start of a trial."""
        config = config_of(trial)
        self._tune_trials[config.trial_key] = trial
        self._shrinks_before[config.trial_key] = self._room.shrinks
        self._deadlines.begin(config.trial_key, config.model, first=True)
        self._start(config)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass on what a worker has returned."""
        config = config_of(trial)
        if "device" in result:
            self._devices[config.trial_key] = result["device"]
        if "node_problem" in result:
            self._listener.give_up(result["node_problem"])
        elif "storage_error" in result:
            self._wait_for_storage(config, result["storage_error"])
        elif "device_error" in result:
            self._device_errors[config.trial_key] = result | {"alone": self._is_alone(config.trial_key)}
            private_ray.kill_worker(trial)
        elif "report" in result:
            self._room.trained(result["device"])
            self._end_epoch(config, result["report"], done=result["done"])

    def _wait_for_storage(self, config: TrialConfig, error: str) -> None:
        self._deadlines.begin(config.trial_key, config.model, first=True)
        self._listener.notice(error)
        if problem := self._storage_waits.failed(config.trial_key, error):
            self._listener.give_up(problem)

    def _end_epoch(self, config: TrialConfig, report: EpochReport, *, done: bool) -> None:
        self._storage_waits.answered(config.trial_key)
        self._recovery.progressed(config.trial_key, report.epoch)
        self._shrinks_before[config.trial_key] = self._room.shrinks
        self._deadlines.end(config.trial_key, config.model, report.epoch_seconds)
        if not done:
            self._deadlines.begin(config.trial_key, config.model)
        ended = report.diverged or report.epoch == config.epochs
        worst = self._asha.stop_epoch(config.trial_key) == report.epoch
        stopped = worst and done and not ended and config.trial_key not in self._controls
        spared = worst and not stopped
        if done and not ended and not stopped:
            self._suspended.add(config.trial_key)
        self._listener.epoch_ended(config, report, stopped=stopped, spared=spared)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note the end of a trial, unless the run is interrupted."""
        result = trial.last_result
        config = config_of(trial)
        if config.trial_key in self._suspended:
            self._forget(config.trial_key)
        elif result.get("done") and "node_problem" not in result:  # otherwise the run is interrupted
            self._end(config, _status(config, result), result.get("error", ""))
            self._give_up_if_futile()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Put a trial back whose worker has died, or let it fail."""
        config = config_of(trial)
        self._forget(config.trial_key)
        overdue = self._overdue.pop(config.trial_key, "")
        device = self._device_errors.pop(config.trial_key, None)
        if overdue:
            failure = self._recovery.hung(config.trial_key, overdue)
            self._listener.notice(overdue)
        elif device:
            failure = self._device_failed(config, device)
        else:
            death = self._explain_death(trial)
            failure = self._recovery.died(config.trial_key, death)
            self._listener.notice(f"a worker died: {death.reason}")
        if failure:
            self._end(config, "failed", failure)
        else:
            self._queue.put_back(config)
        self._give_up_if_futile()

    def _give_up_if_futile(self) -> None:
        if self._recovery.futile:
            self._listener.give_up(self._recovery.futile)

    def _device_failed(self, config: TrialConfig, device: dict[str, Any]) -> str:
        """Return why a trial fails whose device has failed; empty if it is run again, by another process."""
        reason, place = device["device_error"], device["place"]
        if not device["out_of_memory"]:
            left_out = self._room.failed(device["node"], device["device"])
            fewer = f"; it keeps failing: {self._room.at_once} from now on" if left_out else ""
            self._listener.notice(f"the device of {place} failed, and its process was replaced: {reason}{fewer}")
            return self._recovery.died(config.trial_key, Death(reason, own=True))
        if self._shrinks_before[config.trial_key] < self._room.shrinks:  # it failed beside trials that are gone by now
            return self._recovery.died(config.trial_key, Death(reason, own=False))
        if device["alone"] or self._room.most == 1:
            self._room.give_back(config.trial_key)  # this trial was too large, not the others too many
            return f"{place} ran out of memory with no other trial beside it: {reason}"
        self._room.take(device["node"], config.trial_key)
        self._listener.notice(f"{place} ran out of memory: {self._room.at_once} from now on ({reason})")
        return self._recovery.died(config.trial_key, Death(reason, own=False))

    def _is_alone(self, trial_key: str) -> bool:
        """Return whether no other trial runs on the device of a trial; one that has not said where it is may."""
        device, others = self._devices.get(trial_key), self._tune_trials.keys() - {trial_key}
        return all(self._devices.get(other, device) != device for other in others)

    def _explain_death(self, trial: TuneTrial) -> Death:
        before, self._kills = self._kills, out_of_memory_kills()
        here = self._kills > before and is_one_machine()
        return explain_death(_last_error(trial), killed_for_memory=here)

    def _start(self, config: TrialConfig) -> None:
        self._started[config.trial_key] = config
        self._listener.started(config)

    def _end(self, config: TrialConfig, status: str, error: str) -> None:
        self._forget(config.trial_key)
        self._started.pop(config.trial_key, None)
        self._listener.ended(config, status, error)
        self._recovery.ended(error)

    def _forget(self, trial_key: str) -> None:
        self._tune_trials.pop(trial_key, None)
        self._devices.pop(trial_key, None)
        self._deadlines.forget(trial_key)
        self._storage_waits.answered(trial_key)

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        """Suspend what has not ended."""
        for config in self._started.values():
            self._listener.suspended(config)


class Interruption(DriverOnly, tune.Stopper):
    """Ends the whole run when the listener says so."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether a trial ends with a result that ASHA does not see."""
        return "error" in result or "node_problem" in result  # such a result has no accuracy for ASHA

    def stop_all(self) -> bool:
        """Return whether all trials end."""
        return self._listener.interrupted


def config_of(trial: TuneTrial) -> TrialConfig:
    """Return what a trial of Tune trains."""
    config: TrialConfig = trial.config["trial"]
    return config


def _last_error(trial: TuneTrial) -> str:
    """Return what Ray says of the last error of a trial; `trial.get_error()` finds it only once Tune has copied it."""
    file = trial.error_file
    return Path(file).read_text().rpartition("Failure # ")[2] if file and Path(file).exists() else ""


def _status(config: TrialConfig, result: dict[str, Any]) -> str:
    if "error" in result:
        return "failed"
    if result["report"].diverged:
        return "diverged"
    return "completed" if result["report"].epoch == config.epochs else "stopped"
