"""Runs the trials of a grid as Ray Tune trials, stops them by ASHA, tells a listener.

With `grid.tune.connection` the only file that knows Ray.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Collection, Sequence
from typing import Any

for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # snapshots of all trials, for a restore, which is not used here
    "RAY_AIR_NEW_OUTPUT": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402  (after the settings that it reads when imported)
import torch  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.execution import class_cache  # noqa: E402
from ray.tune.experiment import Trial as TuneTrial  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from grid.config import TrialConfig  # noqa: E402
from grid.data.dataset import Dataset  # noqa: E402
from grid.metrics import EpochReport  # noqa: E402
from grid.plan.asha import Asha  # noqa: E402
from grid.plan.packing import Packing  # noqa: E402
from grid.train.checkpoints import Checkpoints  # noqa: E402
from grid.train.hardware import keep_freed_memory  # noqa: E402
from grid.train.trial import DeviceData, Trial  # noqa: E402
from grid.train.worker import Worker  # noqa: E402
from grid.tune.connection import machine_name  # noqa: E402
from grid.tune.listener import Listener  # noqa: E402
from grid.tune.preflight import CodeVersion, Requirements, mark_storage, unmark_storage  # noqa: E402

class_cache.DEFAULT_ENV_VARS.clear()  # a setting for PyTorch Lightning, which keeps trials out of prestarted workers

WORKER_RESTARTS = 8
"""How often a trial whose worker died is run again. Errors of the trial itself never restart a worker."""


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
        trials: In the order in which they are to start.
        dataset: Travels to each node once.
        listener: Is told of everything.
        asha: Its rungs, with earlier arrivals if a grid is resumed.
        controls: Keys of the trials that are never stopped.
        packing: How many at once, with which resources.
        checkpoints: Where trials are put down at rungs, and taken up if they were.
        keep_weights: Whether a trial is put down after its last epoch, too.
        begin: Makes a trial in a worker; `benchmarks.grid_scale` passes one that replays a recorded curve.
    """
    mark = mark_storage(checkpoints)
    checkpoint_epochs = (*asha.rungs, *({trial.epochs for trial in trials} if keep_weights else ()))
    worker = Worker(dataset, checkpoints, checkpoint_epochs, begin)
    trainable = tune.with_resources(
        # The images go into Ray's object store: to each node once, and its workers read the same memory.
        tune.with_parameters(TrialWorker, worker=worker, wanted=Requirements(CodeVersion.here(), mark)),
        {"CPU": packing.cpus_per_trial, "GPU": packing.gpus_per_trial},
    )
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as folder:
        tune_config = _tune_config(trials, AshaScheduler(asha, controls), packing.concurrency)
        bridge = _Bridge(listener)
        try:
            tune.Tuner(trainable, tune_config=tune_config, run_config=_run_config(listener, bridge, folder)).fit()
        finally:
            unmark_storage(checkpoints, mark)
    bridge.suspend_running()


def _tune_config(trials: Sequence[TrialConfig], scheduler: TrialScheduler, concurrency: int) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=_Queue(trials),
        num_samples=len(trials),
        scheduler=scheduler,
        max_concurrent_trials=concurrency,  # holds for a `Searcher`; another `search_alg` would make Tune ignore it
        reuse_actors=True,
        trial_dirname_creator=lambda trial: _config(trial).trial_key,
    )


def _run_config(listener: Listener, bridge: "_Bridge", folder: str) -> tune.RunConfig:
    return tune.RunConfig(
        storage_path=folder,  # of Tune's own files, which nobody reads; it puts no trial down
        verbose=0,
        stop=_Interruption(listener),
        callbacks=[bridge],
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        failure_config=tune.FailureConfig(max_failures=WORKER_RESTARTS),
    )


class _Queue(Searcher):
    """Hands Tune one trial after another: of a `grid_search` it copies the whole list for each trial in it."""

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

    def setup(self, config: dict[str, Any], worker: Worker, wanted: Requirements) -> None:  # type: ignore[override]
        """Prepare for the first trial; this machine may have joined after the others were looked at."""
        torch.set_num_threads(1)
        keep_freed_memory()
        name = machine_name(ray.util.get_node_ip_address(), socket.gethostname())
        self._problem = wanted.problem(worker.checkpoints, name)
        self._worker = worker

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial; always possible."""
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
        self._fresh: list[TuneTrial] = []
        self._again: list[TuneTrial] = []
        self._known: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Note a trial that is to start, for the first time or, after the death of its worker, again."""
        (self._again if trial.trial_id in self._known else self._fresh).append(trial)
        self._known.add(trial.trial_id)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return a trial that has just come, or one that has to begin again, for a worker that is free or a new one.

        Tune's own rule searches all trials at every step, and gives a free worker to the first that waits though a new
        one is starting for it, which is ended: where trials are shorter than the start of a worker, none ever starts.
        """
        fresh, self._fresh = self._fresh, []
        self._again = [trial for trial in self._again if trial.status == TuneTrial.PENDING]
        waiting = [*self._again, *fresh] if fresh else []
        return next((trial for trial in waiting if trial.status == TuneTrial.PENDING), None)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Stop a trial that is not among the best at a rung."""
        config = _config(trial)
        goes_on = self._asha.goes_on(
            config.trial_key,
            group=config.model,
            epoch=result["report"].epoch,
            value=result["report"].val_accuracy,
            control=config.trial_key in self._controls,
        )
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Count a diverged trial at the rung that it does not reach."""
        if "report" in result and result["report"].diverged:
            config = _config(trial)
            self._asha.diverge(config.trial_key, group=config.model, epoch=result["report"].epoch)


class _DriverOnly:
    """Holds a listener, which stays in the driver: Tune pickles its parts for a restore, which is not used here."""

    def __init__(self, listener: Listener):
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Bridge(_DriverOnly, tune.Callback):
    """Translates Tune's calls for a `Listener`."""

    def __init__(self, listener: Listener):
        super().__init__(listener)
        self._running: dict[str, TrialConfig] = {}

    def suspend_running(self) -> None:
        """Report the trials that had started and have not ended."""
        for config in self._running.values():
            self._listener.suspended(config)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._listener.tick()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._running[trial.trial_id] = _config(trial)
        self._listener.started(_config(trial))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        if "node_problem" in result:
            self._listener.give_up(result["node_problem"])
        elif "error" not in result:
            report: EpochReport = result["report"]
            ended = report.diverged or report.epoch == _config(trial).epochs
            self._listener.epoch_ended(_config(trial), report, stopped=result["done"] and not ended)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if (
            trial.last_result.get("done") and "node_problem" not in trial.last_result
        ):  # else the run is interrupted, and the trial goes on another time
            status = _status(_config(trial), trial.last_result)
            self._running.pop(trial.trial_id, None)
            self._listener.ended(_config(trial), status, trial.last_result.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._running.pop(trial.trial_id, None)
        self._listener.ended(_config(trial), "failed", str(trial.get_error()))


class _Interruption(_DriverOnly, tune.Stopper):
    """Ends the whole run when the listener says so."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return "error" in result or "node_problem" in result  # ASHA has nothing to judge

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
