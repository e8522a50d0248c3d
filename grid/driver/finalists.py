"""From the best cells of a grid to tested nets. Heavy to import; `grid.confirm` is the light door.

Validation chooses, the test set only tells: a net that has been tested is never tested again.
"""

import csv
import io
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grid.config import NUMERICS_VERSION, InputError, TrialConfig, cell_name
from grid.data.dataset import Dataset
from grid.data.load import load, load_test
from grid.driver.experiment import Training, print_facts, train_all
from grid.driver.pictures import confusion_picture, mistake_sheet
from grid.driver.watcher import summarise_trial
from grid.metrics import FINAL_STATUSES
from grid.plan.asha import Asha, rung_epochs
from grid.plan.packing import Packing
from grid.plan.request import Confirmation
from grid.plan.trials import Plan
from grid.ranking import RankedCell, rank_cells
from grid.record.predictor import forget_models, log_predictor, register
from grid.record.recorder import Recorder
from grid.record.spool import Spool, open_spool
from grid.record.store import UNREACHABLE, Store, StoredTrial
from grid.store_uri import mask, slug
from grid.train.checkpoints import Checkpoints
from grid.train.evaluation import (
    ClassScore,
    ConfusedPair,
    Evaluation,
    confused_pairs,
    evaluate,
    inference_state,
    per_class,
)
from grid.train.hardware import numeric_settings
from grid.train.trial import DeviceData
from grid.tune import connection
from grid.wording import first_line

FIRST_SEED = 1000
"""Of the finalists: the grid's own seeds are below, so that no finalist profits from the luck that made it one."""
PAIRS = 20
"""Confused pairs that are recorded."""
MISTAKES = 24
"""Mistakes that are drawn."""


def confirm(request: Confirmation) -> int:
    """Train and test the finalists of a grid, print them, and return the exit code.

    Raises:
        InputError: The request can't be met.
    """
    grid = Store(request.store, request.experiment)
    grid.create(missing=False)
    manifest, stored = grid.manifest(), grid.trials()
    chosen = choose(
        rank_cells(summarise_trial(trial) for trial in stored.values() if trial.status in FINAL_STATUSES), request.top
    )
    if not chosen:
        raise InputError(f"no trial of '{request.experiment}' has ended with an accuracy; run python -m grid.run first")
    dataset = _load_as_before(manifest, [trial.config for trial in stored.values()], request)
    test_images, test_labels = load_test(dataset.name, request.data_dir)
    name = slug(request.store, f"{request.experiment} confirm")
    checkpoints = Checkpoints(request.storage, name)
    with closing(open_spool(request.spool, request.store, f"{request.experiment} confirm")) as spool:
        packing = connection.connect(connection.find_cluster(request.address), request.concurrency, checkpoints)
        try:
            trials = finalist_trials(chosen, [trial.config for trial in stored.values()], request.seeds, packing)
            training = Training(packing, checkpoints, keep_weights=True)
            ended = _train(request, trials, dataset, spool, training)
        finally:
            connection.disconnect()
    if ended:
        return ended
    store = Store(request.store, request.experiment, kind="confirm")
    store.create(missing=False)
    try:
        with store.lease():  # two commands at once would test each net twice
            data = DeviceData.from_dataset(dataset, _device_here(trials[0]))
            for trial in _untested(store, trials):
                _test(store, trial, dataset, data, checkpoints, test_images, test_labels)
            return _conclude(request, store, trials)
    except UNREACHABLE as error:
        problem = f"can't record what the finalists are worth: {first_line(error)}"
        raise InputError(f"{problem}; fix it and run the same command again") from error


def choose(ranked: Sequence[RankedCell], top: int) -> list[RankedCell]:
    """Return the best `top` cells of each model, best first.

    Args:
        ranked: From `grid.ranking.rank_cells`.
        top: How many of each.
    """
    models = dict.fromkeys(cell.cell["model"] for cell in ranked)
    kept = {model: [cell for cell in ranked if cell.cell["model"] == model][:top] for model in models}
    return [cell for cell in ranked if cell in kept[cell.cell["model"]]]


def finalist_trials(
    chosen: Iterable[RankedCell], trained: Sequence[TrialConfig], seeds: int, packing: Packing
) -> list[TrialConfig]:
    """Return the trainings of the finalists: their configurations as they were in the grid, on new seeds.

    Args:
        chosen: Cells to confirm.
        trained: Configurations of the grid.
        seeds: Replicates of each, `FIRST_SEED` and up.
        packing: Where they are trained.

    Raises:
        InputError: The grid was trained by code that yields other numbers.
    """
    others = {config.numerics_version for config in trained} - {NUMERICS_VERSION}
    if others:
        versions = f"numbers of version {min(others)}, this code's are of version {NUMERICS_VERSION}"
        raise InputError(f"the grid has {versions}; confirm it with the code that trained it, or train it again")
    known = {(tuple(config.cell.values()), config.lr_scale): config for config in trained}
    templates = [known[tuple(ranked.cell.values()), ranked.lr_scale] for ranked in chosen]
    if any(template.device != packing.device for template in templates):
        settings = numeric_settings(packing.device, bfloat16=packing.bfloat16)
        templates = [TrialConfig.from_params(template.to_params() | settings) for template in templates]
    return [replace(template, seed=FIRST_SEED + seed) for seed in range(seeds) for template in templates]


def _load_as_before(manifest: Mapping[str, Any], trained: Sequence[TrialConfig], request: Confirmation) -> Dataset:
    """Load the images that the grid was trained on.

    Raises:
        InputError: They are other ones.
    """
    try:
        name, per_class = manifest["data"]["name"], manifest["data"]["per_class"]
        split_seed = manifest["order_seed"]
    except (KeyError, TypeError) as error:
        hint = "(grid.json); run grid.run again"
        raise InputError(f"'{request.experiment}' does not say what it was trained on {hint}") from error
    dataset = load(name, request.data_dir, per_class=per_class, split_seed=split_seed)
    if {config.data_fingerprint for config in trained} != {dataset.fingerprint}:
        raise InputError(f"the images in {request.data_dir} are not those of the grid; pass its --data-dir")
    return dataset


def _train(
    request: Confirmation, trials: Sequence[TrialConfig], dataset: Dataset, spool: Spool, training: Training
) -> int:
    """Train what is not trained yet; return 0, or the exit code if something is left."""
    training.checkpoints.check()
    store = Store(request.store, request.experiment, kind="confirm")
    store.create(missing=False)
    store.claim()
    recorder = Recorder(store, spool)
    try:
        recorder.recover()
        stored = store.trials()
        recorder.begin({}, stored)
    except InputError:
        store.release()
        raise
    plan = Plan([], {}, list(trials), frozenset(trial.trial_key for trial in trials))
    asha = Asha(rung_epochs(trials[0].epochs))
    watcher, delivered = train_all(plan, stored, dataset, recorder, asha, training, _describe(trials))
    if watcher.interrupted:
        reason = watcher.problem or watcher.unusable_node
        print(f"{reason or 'interrupted'}; the same command goes on", file=sys.stderr)
        return 1 if reason else 130
    if not delivered:
        print(f"not everything has reached {mask(request.store)}: {recorder.error}; run it again", file=sys.stderr)
        return 1
    return 0


def _describe(trials: Sequence[TrialConfig]) -> dict[str, str]:
    cells = {trial.cell_key for trial in trials}
    return {
        "finalists": f"{len(cells)} cells x {len(trials) // len(cells)} new seeds, {trials[0].epochs} epochs each",
    }


def _untested(store: Store, trials: Sequence[TrialConfig]) -> list[StoredTrial]:
    stored = store.trials()
    wanted = [stored[trial.trial_key] for trial in trials if trial.trial_key in stored]
    return [trial for trial in wanted if trial.status == "completed" and "test_accuracy" not in trial.metrics]


def _device_here(config: TrialConfig) -> str:
    """Return the kind of device that a net is tested on: that of its training, unless this machine has none."""
    return config.device if config.device == "cpu" or torch.cuda.is_available() else "cpu"


def _test(
    store: Store,
    trial: StoredTrial,
    dataset: Dataset,
    data: DeviceData,
    checkpoints: Checkpoints,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> None:
    """Test one net and record what it is worth; the numbers come last, and with them it counts as tested."""
    config = trial.config
    if config.device != _device_here(config):
        config = replace(config, device="cpu", fused=False)
    state = checkpoints.load(trial.config.trial_key, config.device)
    if state is None:
        hint = f"delete run {trial.run_id} in MLflow and run again"
        raise InputError(f"the weights of {trial.config.name} are gone from the storage; {hint}")
    result = evaluate(config, state, data, images, labels)
    store.attach(trial.run_id, _files(result, trial.config, dataset, images))
    weights = inference_state(config, state, data)
    forget_models(store.client, trial.run_id)
    model_id = log_predictor(
        store.client, trial.run_id, trial.config, weights, data, dataset.classes, dataset.val_images[:4]
    )
    store.log_test(trial.run_id, result.metrics, model_id)
    checkpoints.delete(trial.config.trial_key)
    print(f"tested  {result.accuracy:.2%}  {trial.config.name}", flush=True)


def _files(result: Evaluation, config: TrialConfig, dataset: Dataset, images: NDArray[np.uint8]) -> dict[str, bytes]:
    """Return what a person looks at beside the numbers."""
    classes, wrong = dataset.classes, result.mistakes
    most = wrong.indices[:MISTAKES]
    pictured = images[most], wrong.true[:MISTAKES], wrong.predicted[:MISTAKES], wrong.confidence[:MISTAKES]
    matrix = ([name, *row] for name, row in zip(classes, result.confusion, strict=True))
    return {
        "test/confusion.csv": _csv(["true", *classes], matrix),
        "test/confusion.png": confusion_picture(result.confusion, classes, config.name),
        "test/per_class.csv": _csv(ClassScore._fields, per_class(result.confusion, classes)),
        "test/confused_pairs.csv": _csv(ConfusedPair._fields, confused_pairs(result.confusion, classes, PAIRS)),
        "test/mistakes.png": mistake_sheet(*pictured, classes),
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def _conclude(request: Confirmation, store: Store, trials: Sequence[TrialConfig]) -> int:
    stored = {key: trial for key, trial in store.trials().items() if "test_accuracy" in trial.metrics}
    tested = [stored[trial.trial_key] for trial in trials if trial.trial_key in stored]
    ranked = rank_cells(summarise_trial(trial) for trial in tested)
    print(f"\n{'rank':>4}  {'val acc':>7}  {'test acc':>8}  {'seeds':>5}  cell")
    for rank, cell in enumerate(ranked, start=1):
        tests = [trial.metrics["test_accuracy"] for trial in tested if trial.config.cell == cell.cell]
        figures = f"{rank:>4}  {cell.mean:>7.2%}  {fmean(tests):>8.2%}  {len(tests):>5}"
        print(f"{figures}  {cell_name(cell.cell)}")
    print()
    if request.register and ranked:
        best = max(
            (trial for trial in tested if trial.config.cell == ranked[0].cell),
            key=lambda trial: trial.metrics["best_val_accuracy"],
        )
        version = register(store.client, best.tags["model_id"], request.register)
        print_facts({"registered": f"models:/{request.register}/{version}, {best.config.name}"})
    where = shlex.join(["--experiment", request.experiment, "--store", mask(request.store)])
    print_facts({"ranking": f"python -m analysis.rank {where}", "report": f"python -m analysis.report {where}"})
    if len(tested) < len(trials):
        print(f"{len(trials) - len(tested)} of {len(trials)} trainings diverged or failed; see MLflow", file=sys.stderr)
        return 1
    return 0
