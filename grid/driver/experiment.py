"""A grid from data to table: prepares, trains what is left, reports. Heavy to import; `grid.run` is the light door."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from typing import Any

from grid.config import CHOICES, SETTINGS, InputError
from grid.data.dataset import Dataset
from grid.data.load import load
from grid.driver.messages import (
    conclude,
    describe_left_out,
    describe_plan,
    experiment_options,
    print_facts,
)
from grid.driver.more_controls import draw_if_asked, reopen_drawn
from grid.driver.provenance import check_code, describe_command
from grid.driver.training import Prepared, Ready, Training, begin, train_all
from grid.driver.try_nodes import try_nodes
from grid.driver.watcher import Watcher, restore_rungs
from grid.parts import LEVELS
from grid.plan.asha import Asha
from grid.plan.packing import THIS_MACHINE, Packing
from grid.plan.request import Request
from grid.plan.space import ORDER_SEED, shared_settings
from grid.plan.trials import Plan, check_comparable, first_and_last_of_each_model, make_plan
from grid.record.lease import become_driver
from grid.record.recorder import Recorder
from grid.record.rounds import read_rounds
from grid.record.store import Store
from grid.train.checkpoints import Checkpoints


def prepare(
    request: Request,
    packing: Packing,
    checkpoints: Checkpoints,
    stack: ExitStack,
    await_ray: Callable[[], object] = lambda: None,
) -> tuple[Prepared, Packing]:
    """Read the images, try each net on them, and take the lease on the experiment.

    Args:
        request: What the user asked for.
        packing: Where trials run.
        checkpoints: Where trials are suspended; tested here.
        stack: Closes what is opened here.
        await_ray: Returns once Ray is connected; on this machine's CPUs nothing waits for it.

    Returns:
        What the run needs, and where trials run by what was measured.

    Raises:
        InputError: The request can't be met. Nothing is in the store if the images, the storage or the nodes are the
            reason.
    """
    dataset = load(request.data, request.data_dir, per_class=request.per_class, split_seed=ORDER_SEED)
    checkpoints.check()
    remote = packing.device != "cpu" or packing.machines != THIS_MACHINE
    if remote:
        await_ray()
    packing = try_nodes(first_and_last_of_each_model(request, packing), dataset.shape, packing, connected=remote)
    store = Store(request.store, request.experiment)
    spool = become_driver(store, stack, spool=request.spool, storage=request.storage)
    draw = import_module("grid.driver.pictures").sample_sheet
    samples = draw(dataset.train_images, dataset.train_labels, dataset.classes)
    return Prepared(dataset, spool, store, samples), packing


def run(request: Request, prepared: Prepared, training: Training) -> int:
    """Run what is left of a grid, print the best cells, and return the exit code; Ray must be connected.

    Args:
        request: What the user asked for.
        prepared: From `prepare`.
        training: Where trials are trained.

    Raises:
        InputError: The request can't be met.
    """
    recorder = Recorder(prepared.store, prepared.spool)
    recorder.recover()
    before = prepared.store.manifest()
    ready = _plan_what_is_left(request, prepared, training.packing, before)
    record = describe_command("grid.run", request, ready.check, training.packing.devices)
    described = _manifest(request, ready.plan, ready.asha, prepared.dataset)
    described["first"] = _all_first(request, before)
    begin(recorder, prepared, ready, record, described=described, before=before)
    watcher, delivered = train_all(ready, prepared.dataset, recorder, training)
    return _report(request, watcher, recorder, delivered)


def _plan_what_is_left(request: Request, prepared: Prepared, packing: Packing, before: Mapping[str, Any]) -> Ready:
    """Plan the grid, and compare it with what the store has of it: its trials, and `before`, its `grid.json`.

    Raises:
        InputError: They are not comparable.
    """
    store = prepared.store
    rounds = read_rounds(store)
    stored = reopen_drawn(store, store.trials(), rounds)
    left_out = describe_left_out(store)
    begun = {key: trial.control for key, trial in stored.items()}
    dataset = prepared.dataset
    plan = make_plan(
        _as_recorded(request, before, packing),
        packing=packing,
        fingerprint=dataset.fingerprint,
        train_images=len(dataset.train_labels),
        begun=begun,
    )
    check_comparable(plan.trials, [trial.config for trial in stored.values()], request.experiment)
    check = check_code(store, stored.values(), accept=request.accept_code)
    asha = Asha.of(plan.rule, request.epochs)
    restore_rungs(asha, stored)
    if stored:
        _check_same_rule(before, plan, asha, request.experiment)
    plan, stored, remark = draw_if_asked(request.more_controls, plan, stored, store, rounds)
    facts = describe_plan(request, plan) | ({"controls": remark} if remark else {}) | left_out | dict(check.facts)
    return Ready(plan, stored, asha, check, facts)


def _report(request: Request, watcher: Watcher, recorder: Recorder, delivered: bool) -> int:
    """Print how a run ended, and return its exit code."""
    undelivered = "" if delivered else recorder.error or "no reason given"
    conclusion = conclude(request, watcher, undelivered)
    print(f"\n{conclusion.table}\n")
    retry = f"try again with:  python -m grid.record --replay {experiment_options(request)}"
    for complaint in [*recorder.complain(retry), *conclusion.complaints]:
        print(complaint, file=sys.stderr)
    print_facts(conclusion.next_commands or {})
    return max(conclusion.exit_code, 1 if recorder.dropped or recorder.parked else 0)


def _describe_rule(plan: Plan, asha: Asha) -> dict[str, Any]:
    rule = plan.rule
    return {"epochs": list(asha.rungs), "factor": rule.factor, "compared_within": ",".join(rule.within)}


def _all_first(request: Request, before: Mapping[str, Any]) -> list[dict[str, list[str]]]:
    """Return the levels that this command and earlier ones have put first."""
    kept = before.get("first")
    earlier = [each for each in kept if isinstance(each, dict)] if isinstance(kept, list) else []
    now = {factor: list(levels) for factor, levels in request.first.items()}
    return earlier if not now or now in earlier else [*earlier, now]


def _check_same_rule(manifest: Mapping[str, Any], plan: Plan, asha: Asha, experiment: str) -> None:
    rungs, now = manifest.get("rungs"), _describe_rule(plan, asha)
    before = rungs if isinstance(rungs, Mapping) else {}
    known = [name for name in now if _is_rule_entry(name, before.get(name))]
    changed = "; ".join(f"{name} {before[name]!r}, now {now[name]!r}" for name in known if before[name] != now[name])
    if changed:
        hint = "ask for the same --grace, --stop-factor, --stop-within and --no-stopping, or pick another --experiment"
        raise InputError(f"experiment '{experiment}' was stopped early by another rule ({changed}); {hint}")


def _as_recorded(request: Request, manifest: Mapping[str, Any], packing: Packing) -> Request:
    """Return a request that leaves its first rung or its precision open with those that its experiment has already.

    A precision that the machines lack stays open: the comparison with the experiment's trials then refuses it.
    """
    rungs, settings = manifest.get("rungs"), manifest.get("settings")
    epochs = rungs.get("epochs") if isinstance(rungs, Mapping) else None
    precision = settings.get("precision") if isinstance(settings, Mapping) else None
    lacks = precision == "tf32" if packing.device == "cpu" else precision != "float32" and packing.bfloat16 is False
    if request.precision == "auto" and precision in CHOICES["precision"] and not lacks:
        request = replace(request, precision=precision)
    if request.rule.grace is not None or not epochs or not _is_rule_entry("epochs", epochs):
        return request
    return replace(request, rule=replace(request.rule, grace=max(1, epochs[0])))


def _is_rule_entry(name: str, value: object) -> bool:
    """Return whether an entry of the manifest says something; people may have edited it."""
    if name == "epochs":
        return isinstance(value, list) and all(type(epoch) is int for epoch in value)
    if name == "factor":
        return type(value) is int and value >= 1
    return isinstance(value, str) and set(filter(None, value.split(","))) <= {*LEVELS, *SETTINGS}


def _manifest(request: Request, plan: Plan, asha: Asha, dataset: Dataset) -> dict[str, Any]:
    """Return what is trained, on what, in JSON's types; see docs/store.md."""
    return {
        "grid": request.grid,
        "levels": {factor: list(levels) for factor, levels in request.levels.items()},
        "excluded": plan.excluded,
        "cells": len(plan.cells),
        "trials": len(plan.trials),
        "order_seed": ORDER_SEED,
        "rungs": _describe_rule(plan, asha),
        "seeds": request.seeds,
        "lr_scales": list(request.lr_scales),
        "controls": request.controls,
        "settings": shared_settings(plan.trials),
        "data": {
            "name": request.data,
            "per_class": request.per_class,
            "train_images": len(dataset.train_images),
            "val_images": len(dataset.val_images),
            "classes": list(dataset.classes),
        },
    }
