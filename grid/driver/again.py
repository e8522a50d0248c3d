"""Trains a random part of an earlier experiment once more, on the same seeds: has anything changed since?

Drawn are trials that were trained to the end whatever their accuracy was, so that luck has no say in the comparison.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from grid.config import NUMERICS_VERSION, InputError, TrialConfig
from grid.data.dataset import Dataset
from grid.driver.messages import describe_left_out, print_facts
from grid.driver.provenance import check_code, describe_command
from grid.driver.training import Prepared, Ready, Training, begin, finish, load_recorded, on_device, train_all
from grid.driver.try_nodes import try_nodes
from grid.driver.watcher import restore_rungs
from grid.metrics import FEWEST_PAIRS_LEFT, FINAL_STATUSES
from grid.parts.registry import check_known
from grid.plan.asha import Asha, StoppingRule
from grid.plan.packing import Packing
from grid.plan.request import Again
from grid.plan.space import shared_settings
from grid.plan.trials import Plan
from grid.record.commands import CODE_KEYS, RECORD
from grid.record.lease import become_driver
from grid.record.recorder import Recorder
from grid.record.store import Store, StoredTrial
from grid.store_uri import slug
from grid.train.checkpoints import Checkpoints
from grid.tune import connection
from grid.wording import count


def run(request: Again) -> int:
    """Train the part once more, and return the exit code.

    Raises:
        InputError: The request can't be met.
    """
    earlier = Store(request.store, request.against)
    earlier.open(missing=False)
    manifest, stored = earlier.manifest(), earlier.trials()
    drawn, how = draw(list(stored.values()), request.share)
    for trial in drawn:
        check_known(trial.config)
    dataset = load_recorded(manifest, request.against, request.data_dir)  # other images may be what is asked about
    checkpoints = Checkpoints(request.storage, slug(request.store, request.experiment))
    cluster = connection.find_cluster(request.address)
    with (
        connection.connected(cluster, request.concurrency, checkpoints, device=request.device) as packing,
        ExitStack() as stack,
    ):
        trials = [as_now(trial.config, dataset, packing) for trial in drawn]
        packing = try_nodes(trials, dataset.shape, packing)
        checkpoints.check()
        store = Store(request.store, request.experiment)
        spool = become_driver(store, stack, spool=request.spool, storage=request.storage)
        training = Training(packing, checkpoints, keep_going=request.keep_going)
        print_facts({"again": f"{request.against}: {how}"})
        return _train(request, trials, Prepared(dataset, spool, store), training, manifest)


def draw(trials: Sequence[StoredTrial], share: float) -> tuple[list[StoredTrial], str]:
    """Return a random part of the trials that takes a share of the epochs of all, and how it was drawn, in words.

    A larger share contains a smaller one.

    Raises:
        InputError: It is too small for a comparison, or no trial qualifies.
    """
    ended = [trial for trial in trials if trial.status in FINAL_STATUSES]
    never_stopped = not any(trial.status == "stopped" or trial.stop_epoch for trial in ended)
    fit = [trial for trial in ended if trial.status == "completed" and (never_stopped or _is_drawn_at_once(trial))]
    if not fit:
        raise InputError("the experiment has no unstopped control that was trained to the end; nothing can be repeated")
    levels: dict[str, set[str]] = {}
    for trial in fit:
        for factor, level in trial.config.cell.items():
            levels.setdefault(factor, set()).add(level)
    needed = 1 + sum(len(names) - 1 for names in levels.values()) + FEWEST_PAIRS_LEFT
    epochs = sum(int(trial.metrics["epochs_run"]) for trial in ended)
    wanted = round(share * epochs / fit[0].config.epochs)
    if min(wanted, len(fit)) < needed:
        enough = needed * fit[0].config.epochs / epochs
        hint = f"pass --share {enough:.3f}" if len(fit) >= needed else "run grid.run with --more-controls on it"
        what = f"a share of {share:g} is {count(min(wanted, len(fit)), 'trial')}"
        raise InputError(f"{what}, too few to compare {count(len(levels), 'factor')}: {needed} are needed; {hint}")
    chosen = sorted(fit, key=lambda trial: hashlib.sha256(f"again {trial.config.trial_key}".encode()).hexdigest())
    return chosen[:wanted], f"{count(min(wanted, len(fit)), 'trial')} of {len(fit):,} that were trained to the end"


def _is_drawn_at_once(trial: StoredTrial) -> bool:
    """Return whether a trial is a control since it began, rather than drawn later among the stopped."""
    return trial.control and "stopped_at_epoch" not in trial.tags


def as_now(config: TrialConfig, dataset: Dataset, packing: Packing) -> TrialConfig:
    """Return an earlier trial as this code trains it, on these images and this kind of device."""
    now = replace(config, numerics_version=NUMERICS_VERSION, data_fingerprint=dataset.fingerprint)
    return on_device(now, packing)


def _train(
    request: Again, trials: list[TrialConfig], prepared: Prepared, training: Training, earlier: Mapping[str, Any]
) -> int:
    store = prepared.store
    recorder = Recorder(store, prepared.spool)
    recorder.recover()
    stored, before = store.trials(), store.manifest()
    left_out = describe_left_out(store)
    check = check_code(store, stored.values(), accept=request.accept_code)
    asha = _rungs(earlier)
    restore_rungs(asha, stored)
    plan = Plan([], {}, trials, frozenset(trial.trial_key for trial in trials), control_chance=1.0, rule=asha.rule)
    described = {name: value for name, value in earlier.items() if name not in (*CODE_KEYS, RECORD)}
    described |= {
        "trials": len(trials),
        "settings": shared_settings(trials),
        "against": {"experiment": request.against, "share": request.share},
    }
    record = describe_command("grid.run", request, check, training.packing.devices)
    ready = Ready(plan, stored, asha, check, {"trials": f"{len(trials):,}"} | left_out | dict(check.facts))
    begin(recorder, prepared, ready, record, described=described, before=before)
    watcher, delivered = train_all(ready, prepared.dataset, recorder, training)
    return finish(watcher, recorder, delivered=delivered)


def _rungs(manifest: Mapping[str, Any]) -> Asha:
    """Return the rungs of the earlier experiment, so that accuracies are recorded there; all trials pass them."""
    match manifest.get("rungs"):
        case {"epochs": [*epochs], "factor": int(factor), "compared_within": str(within)}:
            rule = StoppingRule(factor=factor, within=tuple(filter(None, within.split(","))))
            return Asha(tuple(epoch for epoch in epochs if isinstance(epoch, int)), rule)
    return Asha((), StoppingRule(factor=1))
