"""From the best cells of a grid to tested nets. Heavy to import; `grid.confirm` is the light door.

Validation data choose; test data only report: a net that has been tested is never tested again. With `--refit` the best
finalist is trained on most validation images as well: nothing is left to choose.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from grid.config import NUMERICS_VERSION, InputError, TrialConfig, cell_name
from grid.data.dataset import Dataset
from grid.data.load import load_test
from grid.driver.final_test import FinalTest
from grid.driver.messages import describe_left_out, experiment_options, print_facts
from grid.driver.provenance import CodeCheck, check_code, describe_command
from grid.driver.training import Prepared, Ready, Training, finish, load_recorded, on_device, train_all
from grid.driver.try_nodes import try_nodes
from grid.driver.watcher import summarise_trial
from grid.metrics import AS_VALIDATED_METRIC, FINAL_STATUSES
from grid.parts.registry import check_known
from grid.plan.asha import NO_STOPPING, Asha
from grid.plan.packing import Packing
from grid.plan.request import Confirmation
from grid.plan.trials import Plan
from grid.ranking import RankedCell, rank_cells
from grid.record.commands import describe_source, record_command
from grid.record.lease import become_driver
from grid.record.predictor import register
from grid.record.recorder import Recorder
from grid.record.spool import Parked
from grid.record.store import UNREACHABLE, Store, StoredTrial
from grid.recorded import CONFIRM, FINALIST_KINDS, FIRST_FINALIST_SEED
from grid.store_uri import slug
from grid.ties import tied_with_best
from grid.train.checkpoints import Checkpoints
from grid.tune import connection
from grid.wording import count, first_line


@dataclass(frozen=True)
class Finalists:
    """The cells that are confirmed, and what they are trained with."""

    chosen: Sequence[RankedCell]
    also_tied: int
    """Cells that may be the best of their model as well and are not confirmed."""
    trained: Sequence[TrialConfig]
    """Configurations of the grid's trials."""
    prepared: Prepared
    checkpoints: Checkpoints
    check: CodeCheck
    """That this code may train them."""


def confirm(request: Confirmation) -> int:
    """Train and test the finalists of a grid, print them, and return the exit code.

    Raises:
        InputError: The request can't be met.
    """
    store = Store(request.store, request.experiment)
    store.open(missing=False)
    manifest, stored = store.manifest(), store.trials()
    ended = [trial for trial in stored.values() if trial.status in FINAL_STATUSES]
    ranked = rank_cells(map(summarise_trial, ended))
    if not ranked:
        raise InputError(f"no trial of '{request.experiment}' has ended with an accuracy; run python -m grid.run first")
    trained = [trial.config for trial in stored.values()]
    for config in trained:
        check_known(config)
    earlier = [*stored.values(), *(trial for kind in FINALIST_KINDS for trial in store.trials(kind).values())]
    check = check_code(store, earlier, accept=request.accept_code)
    dataset = _load_as_before(manifest, trained, request)
    if request.refit:
        chosen, also_tied = [_best_tested(store)], 0
        dataset = load_recorded(manifest, request.experiment, request.data_dir, refit=True)
    else:
        chosen, also_tied = choose(ranked, request.top, val_images=len(dataset.val_labels))
    test_images, test_labels = load_test(dataset.name, request.data_dir, dataset)
    checkpoints = Checkpoints(request.storage, slug(request.store, f"{request.experiment} {request.kind}"))
    with ExitStack() as stack:
        spool = become_driver(store, stack, spool=request.spool, storage=request.storage, kind=request.kind)
        finalists = Finalists(chosen, also_tied, trained, Prepared(dataset, spool, store), checkpoints, check)
        trials, exit_code = _train(request, finalists)
        if exit_code:
            return exit_code
        try:
            test = FinalTest.prepare(trials, store, dataset, checkpoints, test_images, test_labels)
            for trial in _untested(store, request.kind, trials):
                test.run(trial)
            return max(_conclude(request, store, trials), 1 if Parked(spool).lines else 0)
        except UNREACHABLE as error:
            problem = f"can't record the test results of the finalists: {first_line(error)}"
            raise InputError(f"{problem}; fix it and run the same command again") from error


def _best_tested(store: Store) -> RankedCell:
    """Return the finalist that is best by validation.

    Raises:
        InputError: None is tested, or some are not yet.
    """
    finalists = store.trials(CONFIRM).values()
    untested = sum(trial.status in ("", "completed") and "test_accuracy" not in trial.metrics for trial in finalists)
    ranked = rank_cells(summarise_trial(trial) for trial in finalists if trial.status in FINAL_STATUSES)
    if untested or not ranked:
        what = f"{count(untested, 'net')} not tested yet" if untested else "no tested finalist"
        raise InputError(f"'{store.experiment}' has {what}; run the same command without --refit first")
    return ranked[0]


def choose(ranked: Sequence[RankedCell], top: int, *, val_images: int) -> tuple[list[RankedCell], int]:
    """Return the cells that may be the best of their model, best first, and how many more there are.

    Args:
        ranked: From `grid.ranking.rank_cells`.
        top: At most so many of each model; the best of a model is always one.
        val_images: Number of validation images.
    """
    chosen, also_tied = [], 0
    for model in {cell.cell["model"] for cell in ranked}:
        of_model = [cell for cell in ranked if cell.cell["model"] == model]
        ties = tied_with_best(of_model, val_images=val_images)
        tied = [cell for cell, is_tied in zip(of_model, ties, strict=True) if is_tied] or of_model[:1]
        chosen += tied[:top]
        also_tied += len(tied[top:])
    return [cell for cell in ranked if cell in chosen], also_tied


def finalist_trials(
    chosen: Iterable[RankedCell], trained: Sequence[TrialConfig], seeds: int, packing: Packing
) -> list[TrialConfig]:
    """Return the trainings of the finalists: their configurations as they were in the grid, on new seeds.

    Args:
        chosen: Cells to confirm.
        trained: Configurations of the grid.
        seeds: Replicates of each, `FIRST_FINALIST_SEED` and up.
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
    templates = [on_device(template, packing) for template in templates]
    replicates = range(FIRST_FINALIST_SEED, FIRST_FINALIST_SEED + seeds)
    return [replace(template, seed=seed, shared_seed=True) for seed in replicates for template in templates]


def _load_as_before(manifest: Mapping[str, Any], trained: Sequence[TrialConfig], request: Confirmation) -> Dataset:
    """Load the images that the grid was trained on.

    Raises:
        InputError: They are other ones.
    """
    dataset = load_recorded(manifest, request.experiment, request.data_dir)
    if {config.data_fingerprint for config in trained} != {dataset.fingerprint}:
        raise InputError(f"the images in {request.data_dir} are not those of the grid; pass its --data-dir")
    return dataset


def _train(request: Confirmation, finalists: Finalists) -> tuple[list[TrialConfig], int]:
    """Train the finalists that are not trained yet.

    Returns:
        The trainings of all finalists; 0, or the exit code if some are left.
    """
    checkpoints = finalists.checkpoints
    cluster = connection.find_cluster(request.address)
    with connection.connected(cluster, request.concurrency, checkpoints, device=request.device) as packing:
        trials = finalist_trials(finalists.chosen, finalists.trained, request.seeds, packing)
        dataset = finalists.prepared.dataset
        trials = [replace(trial, data_fingerprint=dataset.fingerprint) for trial in trials]
        packing = try_nodes(trials, dataset.shape, packing)
        training = Training(packing, checkpoints, keep_weights=True)
        return trials, _train_left(request, trials, finalists, training)


def _train_left(request: Confirmation, trials: Sequence[TrialConfig], finalists: Finalists, training: Training) -> int:
    training.checkpoints.check()
    prepared = finalists.prepared
    store = prepared.store
    recorder = Recorder(store, prepared.spool, request.kind)
    recorder.recover()
    stored = store.trials(request.kind)
    left_out = describe_left_out(store)
    record = describe_command("grid.confirm", request, finalists.check, training.packing.devices)
    recorder.begin({}, stored, command=record_command(store, record), source=describe_source(record))
    plan = Plan([], {}, list(trials), frozenset(trial.trial_key for trial in trials), rule=NO_STOPPING)
    asha = Asha.of(plan.rule, trials[0].epochs)
    refit_on = len(prepared.dataset.train_labels) if request.refit else None
    facts = _describe(trials, finalists.also_tied, refit_on) | left_out | dict(finalists.check.facts)
    ready = Ready(plan, stored, asha, finalists.check, facts)
    watcher, delivered = train_all(ready, prepared.dataset, recorder, training)
    return finish(watcher, recorder, delivered=delivered)


def _untested(store: Store, kind: str, trials: Sequence[TrialConfig]) -> list[StoredTrial]:
    stored = store.trials(kind)
    known = [stored[trial.trial_key] for trial in trials if trial.trial_key in stored]
    return [trial for trial in known if trial.status == "completed" and "test_accuracy" not in trial.metrics]


def _describe(trials: Sequence[TrialConfig], also_tied: int, refit_on: int | None = None) -> dict[str, str]:
    cells = {trial.cell_key for trial in trials}
    seeds, epochs = count(len(trials) // len(cells), "new seed"), count(trials[0].epochs, "epoch")
    trainings = f"{count(len(cells), 'cell')} x {seeds}, {epochs} each"
    facts = {"refit": f"{trainings}, on {refit_on:,} images"} if refit_on else {"finalists": trainings}
    if also_tied:
        facts["not confirmed"] = f"{count(also_tied, 'more cell')} may be as good; --top N confirms more of each model"
    return facts


def _conclude(request: Confirmation, store: Store, trials: Sequence[TrialConfig]) -> int:
    stored = store.trials(request.kind)
    ended = [stored[trial.trial_key] for trial in trials if trial.trial_key in stored]
    tested = [trial for trial in ended if "test_accuracy" in trial.metrics]
    ranked = rank_cells(map(summarise_trial, ended))
    print(f"\n{_table(ranked, tested)}\n")
    if request.register and ranked:
        best = _best_replicate(ranked[0], tested)
        version = register(store.client, best.tags["model_id"], request.register)
        print_facts({"registered": f"models:/{request.register}/{version}, {best.config.name}"})
    where = experiment_options(request)
    print_facts({"ranking": f"python -m analysis.rank {where}", "report": f"python -m analysis.report {where}"})
    if len(tested) < len(trials):
        print(f"{len(trials) - len(tested)} of {len(trials)} trainings diverged or failed; see MLflow", file=sys.stderr)
        return 1
    return 0


def _table(ranked: Sequence[RankedCell], tested: Sequence[StoredTrial]) -> str:
    lines = [f"{'rank':>4}  {'val acc':>7}  {'test acc':>8}  {'seeds':>5}  cell"]
    for rank, cell in enumerate(ranked, start=1):
        tests = [_test_accuracy(trial) for trial in tested if trial.config.cell == cell.cell]
        figures = f"{rank:>4}  {cell.mean:>7.2%}  {fmean(tests):>8.2%}  {len(tests):>5}"
        lines.append(f"{figures}  {cell_name(cell.cell)}")
    return "\n".join(lines)


def _best_replicate(cell: RankedCell, tested: Sequence[StoredTrial]) -> StoredTrial:
    replicates = (trial for trial in tested if trial.config.cell == cell.cell)
    return max(replicates, key=lambda trial: summarise_trial(trial).final_val_accuracy or 0.0)


def _test_accuracy(trial: StoredTrial) -> float:
    """Return the test accuracy that compares with validation; older stores have the plain one only."""
    return trial.metrics.get(AS_VALIDATED_METRIC, trial.metrics["test_accuracy"])
