"""What all commands that train have in common: they record themselves, train what is left, and say how it ended."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid.config import InputError, TrialConfig
from grid.data.dataset import Dataset
from grid.data.load import load
from grid.driver.messages import describe_packing, print_facts
from grid.driver.provenance import CodeCheck
from grid.driver.watcher import Watcher
from grid.masking import mask
from grid.plan.asha import Asha
from grid.plan.budget import NO_LIMIT, Budget
from grid.plan.packing import Packing
from grid.plan.trials import Plan
from grid.record.commands import CODE_KEYS, RECORD, describe_source, record_command
from grid.record.fence import LeaseLostError
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store, StoredTrial
from grid.recorded import MANIFEST, command_path
from grid.train.checkpoints import Checkpoints
from grid.train.hardware import numeric_settings
from grid.train.trial import DeviceData, Trial
from grid.tune import tuner


@dataclass(frozen=True)
class Prepared:
    """What a run needs besides Ray."""

    dataset: Dataset
    spool: Spool
    store: Store
    """This driver holds its lease."""
    samples: bytes = b""
    """A PNG file with some of its images; empty if none is recorded."""


@dataclass(frozen=True)
class Training:
    """Where trials are trained, and what is kept of them."""

    packing: Packing
    checkpoints: Checkpoints
    keep_weights: bool = False
    """Whether the last checkpoint of a completed trial is kept."""
    keep_going: bool = False
    """Whether to go on though the first trials all fail alike."""
    budget: Budget = NO_LIMIT
    """What the grid may take in all."""
    make_trial: Callable[[TrialConfig, DeviceData], Trial] = Trial
    """Makes a trial in a worker; `benchmarks.grid_scale` passes one that steps through a curve."""
    watch: Callable[..., Watcher] = Watcher
    """Makes what hears of every event; `benchmarks.grid_scale` passes one with a stopwatch."""


@dataclass(frozen=True)
class Ready:
    """A plan that may be trained."""

    plan: Plan
    stored: Mapping[str, StoredTrial]
    """What the store has, by trial key."""
    asha: Asha
    """With the arrivals of earlier runs."""
    check: CodeCheck
    """That this code may train it."""
    facts: Mapping[str, str]
    """What a person should know first."""


def load_recorded(manifest: Mapping[str, Any], experiment: str, data_dir: Path, *, refit: bool = False) -> Dataset:
    """Load the data set that an experiment was trained on, by name, size and split.

    Args:
        manifest: Of the experiment.
        experiment: Its name.
        data_dir: Holds the files, which may be others by now.
        refit: As for `load`.

    Raises:
        InputError: The manifest does not say which, or the files can't be read.
    """
    match manifest:
        case {"data": {"name": str(name), "per_class": int() | None as per_class}, "order_seed": int(split_seed)}:
            return load(name, data_dir, per_class=per_class, split_seed=split_seed, refit=refit)
    raise InputError(f"'{experiment}' does not say what it was trained on (grid.json); run grid.run again")


def on_device(config: TrialConfig, packing: Packing) -> TrialConfig:
    """Return an earlier trial as the devices of a packing train it; on the kind that trained it as it is."""
    if config.device == packing.device:
        return config
    settings = numeric_settings(packing.device, bfloat16=packing.bfloat16)
    return TrialConfig.from_params(config.to_params() | settings)


def begin(
    recorder: Recorder,
    prepared: Prepared,
    ready: Ready,
    record: Mapping[str, Any],
    *,
    described: Mapping[str, Any],
    before: Mapping[str, Any],
) -> None:
    """Record the command and the manifest.

    Args:
        recorder: Of the experiment's trials.
        prepared: With the store and the sheet of samples.
        ready: With what the store has.
        record: From `grid.driver.provenance.describe_command`.
        described: The manifest without what the record says of the code.
        before: The manifest as it was.
    """
    command = record_command(prepared.store, {**record, "plan": described}, before)
    manifest = {**described, **{name: record[name] for name in CODE_KEYS}, RECORD: command_path(command)}
    files = {MANIFEST: json.dumps(manifest, indent=2).encode()}
    pictures = {"samples.png": prepared.samples} if prepared.samples else None
    recorder.begin(files, ready.stored, command=command, source=describe_source(record), pictures=pictures)


def train_all(ready: Ready, dataset: Dataset, recorder: Recorder, training: Training) -> tuple[Watcher, bool]:
    """Train what is left of a plan; Ray must be connected and the recorder must have begun.

    Args:
        ready: What is to be trained.
        dataset: What it is trained on.
        recorder: Where events go; closed at the end.
        training: Where trials are trained.

    Returns:
        How the trials ended, and whether all events have reached the store.

    Raises:
        LeaseLostError: Another driver has taken the experiment over.
    """
    watcher = training.watch(
        ready.plan,
        recorder,
        training.checkpoints,
        rungs=ready.asha.rungs,
        concurrency=training.packing.concurrency,
        budget=training.budget,
        keep_weights=training.keep_weights,
    )
    watcher.resume(ready.stored)
    left = {"runs": f"{len(watcher.todo)} left to run, {training.packing}"}
    if training.budget.is_limited:
        left["limit"] = f"{training.budget}; so far {training.budget.describe(watcher.spent)}"
    print_facts({**ready.facts, **describe_packing(training.packing), **left})
    with watcher.until_interrupted():
        if watcher.todo and not watcher.exhausted:
            _train_left(ready, watcher, dataset, training)
            watcher.record_spent()
        finished = len(watcher.summaries) == watcher.total and not watcher.lost
        if finished and not training.keep_weights:
            watcher.clear_checkpoints()
        delivered = recorder.close(finished=finished)
    if watcher.lost:
        raise LeaseLostError(recorder.store.lost)
    return watcher, delivered


def finish(watcher: Watcher, recorder: Recorder, *, delivered: bool) -> int:
    """Say on stderr why a command that trains single cells is not done, and return the exit code; 0 if it is."""
    for complaint in recorder.complain("run the same command to try again"):
        print(complaint, file=sys.stderr)
    if watcher.interrupted:
        reason = watcher.problem or watcher.unusable
        print(f"{reason or 'interrupted'}; run the same command to continue", file=sys.stderr)
        return 1 if reason else 130
    if not delivered:
        uri = mask(recorder.store.uri)
        print(f"not everything has reached {uri}: {recorder.error}; run the same command again", file=sys.stderr)
        return 1
    return 0


def _train_left(ready: Ready, watcher: Watcher, dataset: Dataset, training: Training) -> None:
    tuner.run_trials(
        watcher.todo,
        dataset,
        watcher,
        asha=ready.asha,
        controls=ready.plan.controls,
        packing=training.packing,
        checkpoints=training.checkpoints,
        keep_weights=training.keep_weights,
        keep_going=training.keep_going,
        make_trial=training.make_trial,
        save_each_epoch=training.budget.is_limited,
    )
    watcher.progress.show(last=True)
