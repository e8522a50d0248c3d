"""Runs the trials of a grid as Ray Tune trials, stops them by ASHA, and tells a listener."""

import socket
import tempfile
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from grid.config import InputError, TrialConfig
from grid.data.dataset import Dataset
from grid.parts.files import PartsFile, load, loaded
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.train.checkpoints import Checkpoints, StorageError
from grid.train.hardware import keep_freed_memory, precision_problem
from grid.train.trial import DeviceData, Trial
from grid.train.worker import Worker
from grid.tune import private_ray
from grid.tune.bridge import Bridge, Interruption, config_of
from grid.tune.connection import node_name
from grid.tune.listener import DriverOnly, Listener
from grid.tune.preflight import CodeVersion, Requirements, marked_storage
from grid.tune.queue import Queue


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
    keep_going: bool = False,
    save_each_epoch: bool = False,
    make_trial: Callable[[TrialConfig, DeviceData], Trial] = Trial,
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
        keep_going: Whether to go on though the first trials all fail alike.
        save_each_epoch: Whether trials are saved after every epoch, because they may be suspended after any.
        make_trial: Makes a trial in a worker; `grid.driver.training` says when another one than `Trial`.
    """
    checkpoint_epochs = (*asha.rungs, *({trial.epochs for trial in trials} if keep_weights else ()))
    worker = Worker(dataset, checkpoints, checkpoint_epochs, make_trial, save_each_epoch=save_each_epoch)
    queue = Queue(trials, packing.concurrency, listener)
    tune_config = _tune_config(queue, AshaScheduler(asha, controls, listener), packing.concurrency)
    bridge = Bridge(listener, asha, queue, packing, controls=controls, keep_going=keep_going)
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


def _tune_config(queue: Queue, scheduler: TrialScheduler, concurrency: int) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=queue,
        num_samples=-1,  # the queue says when it is empty
        scheduler=scheduler,
        max_concurrent_trials=concurrency,  # respected for a `Searcher`; Tune ignores it for any other `search_alg`
        reuse_actors=True,
        trial_dirname_creator=lambda trial: config_of(trial).trial_key,
    )


def _run_config(bridge: Bridge, listener: Listener, folder: str) -> tune.RunConfig:
    return tune.RunConfig(
        storage_path=folder,  # of Tune's own files, which nobody reads; it saves no trial
        verbose=0,
        stop=Interruption(listener),
        callbacks=[bridge],
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        failure_config=tune.FailureConfig(max_failures=0),  # `Queue.put_back` instead: Tune counts all deaths alike
    )


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
        self._node = ray.get_runtime_context().get_node_id()
        self._device = f"{self._node} {ray.get_gpu_ids()}"
        self._place = node_name(ray.util.get_node_ip_address(), socket.gethostname())

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare for another trial; always possible."""
        self._worker.clear()
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch, if this node can, and say which node it is."""
        try:
            self._problem = self._find_problem() if self._problem is None else self._problem
        except StorageError as error:
            return self._worker.wait_for_storage(error)
        if self._problem:
            return {"node_problem": self._problem}
        where = {"node": self._node, "place": self._place, "device": self._device}
        return self._worker.run_epoch(self.config["trial"]) | where

    def _find_problem(self) -> str:
        name = self._place
        try:
            load(self._parts)
        except InputError as error:
            return f"{name} can't use the parts file: {error}"
        trial: TrialConfig = self.config["trial"]
        lacks = precision_problem(trial.device, trial.precision)
        return f"node {name} {lacks}" if lacks else self._requirements.problem(self._worker.checkpoints, name)


class AshaScheduler(DriverOnly, FIFOScheduler):
    """Asks `Asha` at every result, and ends what is to be suspended."""

    def __init__(self, asha: Asha, controls: Collection[str], listener: Listener):
        super().__init__(listener)
        FIFOScheduler.__init__(self)
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
        """Return whether a trial continues: at a rung, only if it is among the best; none if all are suspended."""
        if "report" not in result:
            return str(TrialScheduler.CONTINUE)
        config = config_of(trial)
        continues = self._asha.decide(
            config.trial_key,
            group=self._asha.rule.group_of(config.cell),
            epoch=result["report"].epoch,
            value=result["report"].val_accuracy,
            control=config.trial_key in self._controls,
        )
        return str(TrialScheduler.CONTINUE if continues and not self._listener.suspending else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Tell ASHA of a diverged trial, which never arrives at its next rung."""
        if "report" in result and result["report"].diverged:
            config = config_of(trial)
            group = self._asha.rule.group_of(config.cell)
            self._asha.diverge(config.trial_key, group=group, epoch=result["report"].epoch)
