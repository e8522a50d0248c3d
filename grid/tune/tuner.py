"""Runs the trials of a grid as Ray Tune trials, stops them by ASHA, and tells a listener.

With `grid.tune.connection` and `grid.tune.private_ray` the only file that knows Ray.
"""

import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

# Read when Ray Tune is imported.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # Tune's own snapshots, for a restore that is not used here
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # the listener hears of them
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from grid.config import InputError, TrialConfig
from grid.data.dataset import Dataset
from grid.metrics import EpochReport
from grid.parts.files import PartsFile, load, loaded
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.train.checkpoints import Checkpoints, StorageError
from grid.train.hardware import keep_freed_memory
from grid.train.trial import DeviceData, Trial
from grid.train.worker import Worker
from grid.tune import private_ray
from grid.tune.connection import is_one_machine, node_name
from grid.tune.limits import out_of_memory_kills
from grid.tune.listener import Listener
from grid.tune.preflight import CodeVersion, Requirements, marked_storage
from grid.tune.recovery import (
    FLOOR_SECONDS,
    STORAGE_PATIENCE_SECONDS,
    AwakeClock,
    Deadlines,
    Death,
    Recovery,
    StorageWaits,
    explain_death,
)


def run_trials(
    trials: Sequence[TrialConfig],
    dataset: Dataset,
    listener: Listener,
    *,
    asha: Asha,
    controls: Collection[str],
    packing: Packing,
    checkpoints: Checkpoints,
    keep_weights: bool = False,
    begin: Callable[[TrialConfig, DeviceData], Trial] = Trial,
) -> None:
    """Run trials to their ends; Ray must be connected.

    Args:
        trials: In the order in which they start.
        dataset: Sent to each node once.
        listener: Hears of every event.
        asha: The rungs, with earlier arrivals if a grid is resumed.
        controls: Keys of the unstopped controls, trials that ASHA never stops.
        packing: How many run at once, with which resources.
        checkpoints: Where trials are saved at rungs, and resumed from.
        keep_weights: Whether a trial is saved after its last epoch as well.
        begin: Makes a trial in a worker; `benchmarks.grid_scale` passes one that replays a recorded curve.
    """
    checkpoint_epochs = (*asha.rungs, *({trial.epochs for trial in trials} if keep_weights else ()))
    worker = Worker(dataset, checkpoints, checkpoint_epochs, begin)
    queue = Queue(trials)
    tune_config = _tune_config(queue, AshaScheduler(asha, controls), packing.concurrency)
    bridge = _Bridge(listener, asha, queue, packing.concurrency)
    with (
        marked_storage(checkpoints) as mark,
        tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as folder,
        private_ray.fast_trials(),
        private_ray.deaths_as_actor_errors(),
    ):
        trainable = _trainable(worker, Requirements(CodeVersion.here(), mark), packing)
        tune.Tuner(trainable, tune_config=tune_config, run_config=_run_config(bridge, listener, folder)).fit()


def _trainable(worker: Worker, requirements: Requirements, packing: Packing) -> Any:
    return tune.with_resources(
        # The images go into Ray's object store: sent to each node once, shared in memory by its workers.
        tune.with_parameters(TrialWorker, worker=worker, requirements=requirements, parts=loaded()),
        {"CPU": packing.cpus_per_trial, "GPU": packing.gpus_per_trial},
    )


def _tune_config(queue: "Queue", scheduler: TrialScheduler, concurrency: int) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=queue,
        num_samples=-1,  # the queue says when it is empty
        scheduler=scheduler,
        max_concurrent_trials=concurrency,  # respected for a `Searcher`; Tune ignores it for any other `search_alg`
        reuse_actors=True,
        trial_dirname_creator=lambda trial: _config(trial).trial_key,
    )


def _run_config(bridge: "_Bridge", listener: Listener, folder: str) -> tune.RunConfig:
    return tune.RunConfig(
        storage_path=folder,  # of Tune's own files, which nobody reads; it saves no trial
        verbose=0,
        stop=_Interruption(listener),
        callbacks=[bridge],
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        failure_config=tune.FailureConfig(max_failures=0),  # `Queue.put_back` instead: Tune counts all deaths alike
    )


class Queue(Searcher):
    """Hands Tune one trial after another; a `grid_search` would copy the whole list for each trial in it."""

    def __init__(self, trials: Iterable[TrialConfig]):
        super().__init__()
        self._trials = iter(trials)
        self._put_back: deque[TrialConfig] = deque()
        self._running: set[str] = set()

    def put_back(self, config: TrialConfig) -> None:
        """Hand out a trial again, before all that have not started."""
        self._put_back.append(config)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial; None if there is none, unless one that runs is put back; else `FINISHED`."""
        config = self._put_back.popleft() if self._put_back else next(self._trials, None)
        if config is None:
            return None if self._running else str(Searcher.FINISHED)
        self._running.add(trial_id)
        return {"trial": config}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note that a trial has ended; if its worker died, it is put back before Tune asks for another."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""


class TrialWorker(tune.Trainable):
    """Trains one trial after another in one process, which keeps torch and the images."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], worker: Worker, requirements: Requirements, parts: Sequence[PartsFile]
    ) -> None:
        """Prepare for the first trial; this node may have joined after the others were checked."""
        torch.set_num_threads(1)
        keep_freed_memory()
        self._requirements = requirements
        self._parts = parts
        self._problem: str | None = None
        self._worker = worker

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare for another trial; always possible."""
        self._worker.clear()
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch, if this node can."""
        try:
            self._problem = self._find_problem() if self._problem is None else self._problem
        except StorageError as error:
            return self._worker.wait_for_storage(error)
        return {"node_problem": self._problem} if self._problem else self._worker.run_epoch(self.config["trial"])

    def _find_problem(self) -> str:
        name = node_name(ray.util.get_node_ip_address(), socket.gethostname())
        try:
            load(self._parts)
        except InputError as error:
            return f"{name} can't use the parts file: {error}"
        return self._requirements.problem(self._worker.checkpoints, name)


class AshaScheduler(FIFOScheduler):
    """Asks `Asha` at every result."""

    def __init__(self, asha: Asha, controls: Collection[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._asha = asha
        self._controls = controls
        self._new: list[TuneTrial] = []

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Note a trial that waits to start."""
        self._new.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return the next trial to start, once.

        Tune's own rule searches all trials at every step. It also gives a free worker to the first trial that waits,
        even if a new worker is starting for that trial, and then ends the new worker: where trials are shorter than
        the start of a worker, no second worker ever comes up.
        """
        new, self._new = self._new, []
        return next((trial for trial in new if trial.status == TuneTrial.PENDING), None)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Return whether a trial continues: at a rung, only if it is among the best."""
        if "report" not in result:
            return str(TrialScheduler.CONTINUE)
        config = _config(trial)
        continues = self._asha.decide(
            config.trial_key,
            group=self._asha.rule.group_of(config.cell),
            epoch=result["report"].epoch,
            value=result["report"].val_accuracy,
            control=config.trial_key in self._controls,
        )
        return str(TrialScheduler.CONTINUE if continues else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Tell ASHA of a diverged trial, which never arrives at its next rung."""
        if "report" in result and result["report"].diverged:
            config = _config(trial)
            group = self._asha.rule.group_of(config.cell)
            self._asha.diverge(config.trial_key, group=group, epoch=result["report"].epoch)


class _DriverOnly:
    """Holds a listener, and leaves it out when Tune pickles its callbacks for a restore, which is not used here."""

    def __init__(self, listener: Listener):
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Bridge(_DriverOnly, tune.Callback):
    """Translates Tune's calls for a `Listener`."""

    def __init__(self, listener: Listener, asha: Asha, queue: Queue, concurrency: int):
        super().__init__(listener)
        self._asha = asha
        self._queue = queue
        self._recovery = Recovery(concurrency)
        self._clock = AwakeClock()
        self._deadlines = Deadlines(self._clock, FLOOR_SECONDS)
        self._storage_waits = StorageWaits(self._clock, STORAGE_PATIENCE_SECONDS)
        self._started: dict[str, TrialConfig] = {}
        """Trials that have started and not ended."""
        self._tune_trials: dict[str, TuneTrial] = {}
        self._overdue: dict[str, str] = {}
        """Why a trial's worker was killed from here."""
        self._kills = out_of_memory_kills()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._clock.look()
        for trial_key, reason in self._deadlines.overdue().items():
            self._overdue[trial_key] = reason
            private_ray.kill_worker(self._tune_trials[trial_key])
        self._listener.tick()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        config = _config(trial)
        self._tune_trials[config.trial_key] = trial
        self._deadlines.begin(config.trial_key, config.model, first=True)
        self._start(config)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        config = _config(trial)
        if "node_problem" in result:
            self._listener.give_up(result["node_problem"])
        elif "storage_error" in result:
            self._wait_for_storage(config, result["storage_error"])
        elif "report" in result:
            self._end_epoch(config, result["report"], done=result["done"])

    def _wait_for_storage(self, config: TrialConfig, error: str) -> None:
        self._deadlines.begin(config.trial_key, config.model, first=True)
        self._listener.notice(error)
        if problem := self._storage_waits.failed(config.trial_key, error):
            self._listener.give_up(problem)

    def _end_epoch(self, config: TrialConfig, report: EpochReport, *, done: bool) -> None:
        self._storage_waits.answered(config.trial_key)
        self._recovery.progressed(config.trial_key, report.epoch)
        self._deadlines.end(config.trial_key, config.model, report.epoch_seconds)
        if not done:
            self._deadlines.begin(config.trial_key, config.model)
        ended = report.diverged or report.epoch == config.epochs
        stopped = done and not ended
        spared = not stopped and self._asha.stop_epoch(config.trial_key) == report.epoch
        self._listener.epoch_ended(config, report, stopped=stopped, spared=spared)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        result = trial.last_result
        if result.get("done") and "node_problem" not in result:  # otherwise the run is interrupted
            self._end(_config(trial), _status(_config(trial), result), result.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        config = _config(trial)
        self._forget(config.trial_key)
        if overdue := self._overdue.pop(config.trial_key, ""):
            failure = self._recovery.hung(config.trial_key, overdue)
            self._listener.notice(overdue)
        else:
            death = self._explain_death(trial)
            failure = self._recovery.died(config.trial_key, death)
            self._listener.notice(f"a worker died: {death.reason}")
        if failure:
            self._end(config, "failed", failure)
        else:
            self._queue.put_back(config)
        if self._recovery.futile:
            self._listener.give_up(self._recovery.futile)

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

    def _forget(self, trial_key: str) -> None:
        self._tune_trials.pop(trial_key, None)
        self._deadlines.forget(trial_key)
        self._storage_waits.answered(trial_key)

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        for config in self._started.values():
            self._listener.suspended(config)


class _Interruption(_DriverOnly, tune.Stopper):
    """Ends the whole run when the listener says so."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return "error" in result or "node_problem" in result  # such a result has no accuracy for ASHA

    def stop_all(self) -> bool:
        return self._listener.interrupted


def _config(trial: TuneTrial) -> TrialConfig:
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
