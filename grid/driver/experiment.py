"""A grid from request to verdict: plan, data, Ray, store, table. Heavy to import; `grid.run` is the light door."""

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from grid.config import FACTORS
from grid.data.catalogue import DATASETS
from grid.data.dataset import Dataset
from grid.data.load import is_on_disk, load
from grid.driver.progress import top_table
from grid.driver.watcher import Watcher, restore_rungs
from grid.plan import forecast
from grid.plan.asha import FACTOR, Asha, rung_epochs
from grid.plan.packing import Packing
from grid.plan.request import Request, resume_command
from grid.plan.space import ORDER_SEED, settings_of
from grid.plan.trials import Plan, check_comparable, make_plan
from grid.record.manifest import describe_code, describe_plan
from grid.record.recorder import Recorder
from grid.record.spool import Spool, open_spool
from grid.record.store import MANIFEST, UNREACHABLE, Store, StoredTrial
from grid.store_uri import mask
from grid.train.checkpoints import Checkpoints
from grid.tune import connection, tuner
from grid.tune.gpus import find_gpus
from grid.wording import count, format_seconds


def dry_run(request: Request) -> int:
    """Print what a request would run and cost; start no trial, write nothing."""
    cluster = connection.find_cluster(request.address)
    if cluster is None:
        packing = connection.local_packing(request.concurrency)
    else:
        packing = connection.connect(cluster, request.concurrency)
    try:
        plan = make_plan(request, packing=packing, fingerprint="")
        train_images, source = _training_images(request)
        timed, where = _calibrate(plan, DATASETS[request.data].class_count, packing)
    finally:
        connection.disconnect()
    seconds_per_image, spread = timed
    cost = forecast.forecast(
        plan.trials,
        plan.controls,
        seconds_per_image=seconds_per_image,
        spread=spread,
        train_images=train_images,
        slots=packing.slots,
    )
    facts = _describe(request, plan) | describe_packing(packing)
    facts["data"] = f"{request.data}, {train_images:,} training images {source}"
    print_facts(facts | _describe_cost(cost, where, packing, request.price_per_hour))
    return 0


def _calibrate(plan: Plan, classes: int, packing: Packing) -> tuple[forecast.Calibration, str]:
    """Time a few trials where they would run, and say where that was; no machine is started for it."""
    if packing.device == "cpu" or find_gpus()[0]:
        return forecast.calibrate(plan.trials, classes), "this machine"
    if connection.cluster_has_gpu():
        return connection.call_remote(forecast.calibrate, plan.trials, classes, packing=packing), "a GPU of the cluster"
    on_cpu = [replace(trial, device="cpu", fused=False) for trial in plan.trials]
    return forecast.calibrate(on_cpu, classes), "the CPU of this machine, as no GPU is up: expect less"


@dataclass(frozen=True)
class Prepared:
    """What a run needs besides Ray."""

    dataset: Dataset
    samples: bytes
    """A PNG file with some of its images."""
    spool: Spool
    store: Store
    """Claimed."""


def prepare(request: Request, checkpoints: Checkpoints, stack: ExitStack) -> Prepared:
    """Read the images, and claim the experiment in the store.

    Args:
        request: What the user asks.
        checkpoints: Tried.
        stack: Closes what is opened here.

    Raises:
        InputError: The request can't be met; nothing is in the store if it is for the images or the storage.
    """
    dataset = load(request.data, request.data_dir, per_class=request.per_class, split_seed=ORDER_SEED)
    spool = stack.enter_context(closing(open_spool(request.spool, request.store, request.experiment)))
    checkpoints.check()
    store = Store(request.store, request.experiment)
    store.create()
    store.request_lease()
    stack.callback(_let_go, store)
    # Drawn, and what draws imported, while the request_lease settles.
    draw = import_module("grid.driver.pictures").sample_sheet
    samples = draw(dataset.train_images, dataset.train_labels, dataset.classes)
    store.confirm_lease()
    return Prepared(dataset, samples, spool, store)


def _let_go(store: Store) -> None:
    with suppress(*UNREACHABLE):  # then the claim ends by itself
        store.release()


@dataclass(frozen=True)
class Training:
    """Where trials are trained."""

    packing: Packing
    checkpoints: Checkpoints
    keep_weights: bool = False
    """Whether the last checkpoint of a completed trial is kept."""


def run(request: Request, prepared: Prepared, training: Training) -> int:
    """Run what is left of a grid, print its best, and return the exit code; Ray must be connected.

    Args:
        request: What the user asks.
        prepared: From `prepare`.
        training: Where.

    Raises:
        InputError: The request can't be met.
    """
    store, dataset, packing = prepared.store, prepared.dataset, training.packing
    recorder = Recorder(store, prepared.spool)
    recorder.recover()
    stored = store.trials()
    begun = {key: trial.control for key, trial in stored.items()}
    plan = make_plan(request, packing=packing, fingerprint=dataset.fingerprint, begun=begun)
    check_comparable(plan.trials, [trial.config for trial in stored.values()], request.experiment)
    asha = Asha(rung_epochs(request.epochs))
    restore_rungs(asha, stored)
    manifest = json.dumps(_manifest(request, plan, asha, dataset), indent=2).encode()
    recorder.begin({MANIFEST: manifest, "samples.png": prepared.samples}, stored)
    watcher, delivered = train_all(plan, stored, dataset, recorder, asha, training, _describe(request, plan))
    if recorder.dropped:
        lost = f"{recorder.dropped.total()} reports of {len(recorder.dropped)} trials"
        print(f"{lost} had no run to go to (deleted in MLflow?); the same command trains these again", file=sys.stderr)
    undelivered = "" if delivered else recorder.error or "no reason given"
    return max(_conclude(request, watcher, undelivered), 1 if recorder.dropped else 0)


def train_all(
    plan: Plan,
    stored: Mapping[str, StoredTrial],
    dataset: Dataset,
    recorder: Recorder,
    asha: Asha,
    training: Training,
    facts: Mapping[str, str],
) -> tuple[Watcher, bool]:
    """Train what is left of a plan, by a recorder that has begun; Ray must be connected.

    Args:
        plan: What is to be trained.
        stored: What the store has, by trial key.
        dataset: What it is trained on.
        recorder: Where reports go; closed in the end.
        asha: With the arrivals of earlier runs.
        training: Where.
        facts: Printed first.

    Returns:
        How the trials stand, and whether all reports have reached the store.
    """
    packing, checkpoints = training.packing, training.checkpoints
    watcher = Watcher(
        plan,
        stored,
        recorder,
        checkpoints,
        rungs=asha.rungs,
        concurrency=packing.concurrency,
        keep_weights=training.keep_weights,
    )
    print_facts({**facts, **describe_packing(packing), "runs": f"{len(watcher.todo)} left to run, {packing}"})
    with watcher.until_interrupted():
        if watcher.todo:
            _train_left(plan, watcher, dataset, asha, training)
        finished = len(watcher.summaries) == watcher.total
        if finished and not training.keep_weights:
            checkpoints.clear()
        delivered = recorder.close(finished=finished)
    return watcher, delivered


def _train_left(plan: Plan, watcher: Watcher, dataset: Dataset, asha: Asha, training: Training) -> None:
    tuner.run_trials(
        watcher.todo,
        dataset,
        watcher,
        asha=asha,
        controls=plan.controls,
        packing=training.packing,
        checkpoints=training.checkpoints,
        keep_weights=training.keep_weights,
    )
    watcher.progress.show(last=True)


def _conclude(request: Request, watcher: Watcher, undelivered: str) -> int:
    summaries = list(watcher.summaries.values())
    where = shlex.join(["--experiment", request.experiment, "--store", mask(request.store)])
    print(f"\n{top_table(summaries)}\n")
    if undelivered:
        print(f"not everything has reached {mask(request.store)}: {undelivered}", file=sys.stderr)
        print(f"kept in {request.spool}; deliver it with:  python -m grid.record --replay {where}", file=sys.stderr)
    if watcher.problem:
        print(f"{watcher.problem}; free the disk, then go on with:  {resume_command()}", file=sys.stderr)
        return 1
    if watcher.unusable_node:
        print(f"{watcher.unusable_node}; then go on with:  {resume_command()}", file=sys.stderr)
        return 1
    if watcher.interrupted:
        print(f"interrupted; go on with:  {resume_command()}", file=sys.stderr)
        return 130
    address = shlex.quote(mask(request.store))
    data_dir = (
        "" if request.data_dir == Path("data").absolute() else f" --data-dir {shlex.quote(str(request.data_dir))}"
    )
    server = f"mlflow server --host 127.0.0.1 --backend-store-uri {address}"
    look = {
        "ranking": f"python -m analysis.rank {where}",
        "report": f"python -m analysis.report {where}",
        "all runs": address if request.store.startswith("http") else server,
        "finalists": f"python -m grid.confirm {where}{data_dir}",
    }
    print_facts(look)
    failed = any(summary.status == "failed" for summary in summaries)
    return 1 if failed or undelivered or len(summaries) < watcher.total else 0


def _training_images(request: Request) -> tuple[int, str]:
    if is_on_disk(request.data, request.data_dir):
        dataset = load(request.data, request.data_dir, per_class=request.per_class, split_seed=ORDER_SEED)
        return len(dataset.train_images), "on this disk"
    return DATASETS[request.data].split_sizes(request.per_class)[0], "by its publisher (not on this disk yet)"


def _describe(request: Request, plan: Plan) -> dict[str, str]:
    levels = " x ".join(str(len(request.levels[factor])) for factor in FACTORS)
    facts = {"grid": f"{request.grid}: {levels} levels, {len(plan.cells):,} cells"}
    if plan.excluded:
        facts["excluded"] = "; ".join(f"{count:,} cells: {reason}" for reason, count in plan.excluded.items())
    facts["trials"] = (
        f"{len(plan.trials):,} = cells x {count(request.seeds, 'seed')} x "
        f"{count(len(request.lr_scales), 'lr scale')}; {count(len(plan.controls), 'control')}, never stopped"
    )
    rungs = ", ".join(map(str, rung_epochs(request.epochs))) or "none"
    facts["budget"] = f"{request.epochs} epochs; one in {FACTOR} goes on after epoch {rungs}"
    return facts


def describe_packing(packing: Packing) -> dict[str, str]:
    """Return where trials run, and why so many at once."""
    return {"where": packing.machines, "at once": f"{packing} ({packing.reason})"}


def _describe_cost(
    cost: forecast.Forecast, where: str, packing: Packing, price_per_hour: float | None
) -> dict[str, str]:
    saved = 1 - cost.epochs / cost.full_epochs
    hours = cost.seconds / 3600
    facts = {
        "epochs": f"{cost.epochs:,.0f} expected of {cost.full_epochs:,} ({saved:.0%} saved by stopping early)",
        "time": f"{format_seconds(cost.seconds)}, timed on {where} (cells vary by {cost.spread:.0%})",
    }
    if packing.gpus_per_trial:
        facts["GPU-hours"] = f"{hours * packing.concurrency * packing.gpus_per_trial:,.1f}"
    if price_per_hour is not None:
        facts["price"] = f"{hours * price_per_hour:,.2f} at {price_per_hour:g} per hour"
    return facts


def _manifest(request: Request, plan: Plan, asha: Asha, dataset: Dataset) -> dict[str, Any]:
    described = describe_plan(
        grid=request.grid,
        levels=request.levels,
        excluded=plan.excluded,
        cells=len(plan.cells),
        trials=len(plan.trials),
        order_seed=ORDER_SEED,
        rungs=asha.rungs,
        rung_factor=asha.factor,
        seeds=request.seeds,
        lr_scales=request.lr_scales,
        controls=request.controls,
        settings=settings_of(plan.trials[0]),
        data={
            "name": request.data,
            "per_class": request.per_class,
            "train_images": len(dataset.train_images),
            "val_images": len(dataset.val_images),
            "classes": list(dataset.classes),
        },
    )
    return described | describe_code()


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and what is to be said of them."""
    for name, text in facts.items():
        print(f"{name:<9}  {text}", flush=True)
