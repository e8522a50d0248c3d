"""Runs the trials of a grid as Ray Tune trials, stops them by ASHA, and tells a listener.

With `grid.tune.connection` and `grid.tune.private_ray` the only file that knows Ray.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Collection, Sequence
from typing import Any

# Read when Ray Tune is imported.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # Tune's own snapshots, for a restore that is not used here
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.train.checkpoints import Checkpoints
from grid.train.hardware import keep_freed_memory
from grid.train.trial import DeviceData, Trial
from grid.train.worker import Worker
from grid.tune import private_ray
from grid.tune.connection import node_name
from grid.tune.listener import Listener
from grid.tune.preflight import CodeVersion, Requirements, mark_storage, unmark_storage

WORKER_RESTARTS = 8
"""How often a trial is run again because its worker died. Errors of the trial itself never restart a worker."""


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
    mark = mark_storage(checkpoints)
    checkpoint_epochs = (*asha.rungs, *({trial.epochs for trial in trials} if keep_weights else ()))
    worker = Worker(dataset, checkpoints, checkpoint_epochs, begin)
    trainable = tune.with_resources(
        # The images go into Ray's object store: sent to each node once, shared in memory by its workers.
        tune.with_parameters(TrialWorker, worker=worker, requirements=Requirements(CodeVersion.here(), mark)),
        {"CPU": packing.cpus_per_trial, "GPU": packing.gpus_per_trial},
    )
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as folder:
        tune_config = _tune_config(trials, AshaScheduler(asha, controls), packing.concurrency)
        try:
            with private_ray.fast_trials():
                tune.Tuner(trainable, tune_config=tune_config, run_config=_run_config(listener, asha, folder)).fit()
        finally:
            unmark_storage(checkpoints, mark)


def _tune_config(trials: Sequence[TrialConfig], scheduler: TrialScheduler, concurrency: int) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=_Queue(trials),
        num_samples=len(trials),
        scheduler=scheduler,
        max_concurrent_trials=concurrency,  # respected for a `Searcher`; Tune ignores it for any other `search_alg`
        reuse_actors=True,
        trial_dirname_creator=lambda trial: _config(trial).trial_key,
    )


def _run_config(listener: Listener, asha: Asha, folder: str) -> tune.RunConfig:
    return tune.RunConfig(
        storage_path=folder,  # of Tune's own files, which nobody reads; it saves no trial
        verbose=0,
        stop=_Interruption(listener),
        callbacks=[_Bridge(listener, asha)],
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        failure_config=tune.FailureConfig(max_failures=WORKER_RESTARTS),
    )


class _Queue(Searcher):
    """Hands Tune one trial after another; a `grid_search` would copy the whole list for each trial in it."""

    def __init__(self, trials: Sequence[TrialConfig]):
        super().__init__()
        self._trials = iter(trials)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {"trial": next(self._trials)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass


class TrialWorker(tune.Trainable):
    """Trains one trial after another in one process, which keeps torch and the images."""

    def setup(self, config: dict[str, Any], worker: Worker, requirements: Requirements) -> None:  # type: ignore[override]
        """Prepare for the first trial; this node may have joined after the others were checked."""
        torch.set_num_threads(1)
        keep_freed_memory()
        name = node_name(ray.util.get_node_ip_address(), socket.gethostname())
        self._problem = requirements.problem(worker.checkpoints, name)
        self._worker = worker

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare for another trial; always possible."""
        self._worker.clear()
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch."""
        return {"node_problem": self._problem} if self._problem else self._worker.run_epoch(self.config["trial"])


class AshaScheduler(FIFOScheduler):
    """Asks `Asha` at every result."""

    def __init__(self, asha: Asha, controls: Collection[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._asha = asha
        self._controls = controls
        self._new: list[TuneTrial] = []
        self._restarted: list[TuneTrial] = []
        self._known: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Note a trial that waits to start, for the first time or again after the death of its worker."""
        (self._restarted if trial.trial_id in self._known else self._new).append(trial)
        self._known.add(trial.trial_id)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return the next trial to start: one whose worker died before one that was just added.

        Tune's own rule searches all trials at every step. It also gives a free worker to the first trial that waits,
        even if a new worker is starting for that trial, and then ends the new worker: where trials are shorter than
        the start of a worker, no second worker ever comes up.
        """
        new, self._new = self._new, []
        self._restarted = [trial for trial in self._restarted if trial.status == TuneTrial.PENDING]
        waiting = [*self._restarted, *new] if new else []
        return next((trial for trial in waiting if trial.status == TuneTrial.PENDING), None)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Return whether a trial continues: at a rung, only if it is among the best."""
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

    def __init__(self, listener: Listener, asha: Asha):
        super().__init__(listener)
        self._asha = asha
        self._running: dict[str, TrialConfig] = {}

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._listener.tick()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        config = _config(trial)
        self._running[config.trial_key] = config
        self._listener.started(config)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        if "node_problem" in result:
            self._listener.give_up(result["node_problem"])
        elif "error" not in result:
            config, report = _config(trial), result["report"]
            ended = report.diverged or report.epoch == config.epochs
            stopped = result["done"] and not ended
            spared = not stopped and self._asha.stop_epoch(config.trial_key) == report.epoch
            self._listener.epoch_ended(config, report, stopped=stopped, spared=spared)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        result = trial.last_result
        if result.get("done") and "node_problem" not in result:  # otherwise the run is interrupted
            self._end(_config(trial), _status(_config(trial), result), result.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._end(_config(trial), "failed", str(trial.get_error()))

    def _end(self, config: TrialConfig, status: str, error: str) -> None:
        self._running.pop(config.trial_key, None)
        self._listener.ended(config, status, error)

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        for config in self._running.values():
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


def _status(config: TrialConfig, result: dict[str, Any]) -> str:
    if "error" in result:
        return "failed"
    if result["report"].diverged:
        return "diverged"
    return "completed" if result["report"].epoch == config.epochs else "stopped"
