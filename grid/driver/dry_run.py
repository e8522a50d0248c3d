"""`python -m grid.run --dry-run`: prints what would run and what it would cost; starts no trial, writes nothing."""

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from grid.data.catalogue import find_dataset
from grid.data.dataset import DataShape
from grid.data.load import is_on_disk, load
from grid.driver.messages import describe_cost, describe_packing, describe_plan, print_facts
from grid.driver.try_nodes import try_nodes
from grid.plan import forecast
from grid.plan.packing import Packing
from grid.plan.request import Request
from grid.plan.space import ORDER_SEED
from grid.plan.trials import Plan, make_plan
from grid.tune import connection
from grid.tune.gpus import find_gpus


def run(request: Request, ends: forecast.EndSpread | None = None) -> dict[str, Any]:
    """Print what a request would run and cost, and return it in JSON's types; docs/json.md says what is in it.

    Args:
        request: What a user asks for.
        ends: How much the ends of an earlier grid vary; None if there is none, and an assumption has to do.

    Raises:
        InputError: The request can't be met.
    """
    cluster = connection.find_cluster(request.address)
    where: AbstractContextManager[Packing]
    if cluster is None:
        where = nullcontext(connection.local_packing(request.concurrency, request.device))
    else:
        where = connection.connected(cluster, request.concurrency, device=request.device)
    with where as packing:
        shape, source = _look_at_data(request)
        plan = make_plan(request, packing=packing, fingerprint="", train_images=shape.train_images)
        if packing.device == "cpu" or find_gpus()[0] or (cluster and connection.cluster_has_gpu()):  # else none is up
            packing = try_nodes(plan.trials, shape, packing, connected=cluster is not None)
        (seconds_per_image, spread), timed_on = _calibrate(plan, shape, packing)
    cost = forecast.forecast(
        plan.trials,
        plan.controls,
        plan.rule,
        seconds_per_image=seconds_per_image,
        spread=spread,
        train_images=shape.train_images,
        slots=packing.slots,
    )
    data = {"data": f"{request.data}, {shape.train_images:,} training images {source}"}
    expected = describe_cost(cost, timed_on, packing, request.budget.price_per_hour)
    ends = ends or forecast.ASSUMED
    factor, widths = _widths(plan, ends)
    effects = {"effects": _explain_widths(factor, widths, ends)} if widths else {}
    print_facts(describe_plan(request, plan) | describe_packing(packing) | data | expected | effects)
    described = {"train_images": shape.train_images, "timed_on": timed_on, "widest": factor}
    return _describe(request, plan, packing, cost) | described | {"widths": [asdict(width) for width in widths]}


def _describe(request: Request, plan: Plan, packing: Packing, cost: forecast.Forecast) -> dict[str, Any]:
    return {
        "experiment": request.experiment,
        "grid": request.grid,
        "cells": len(plan.cells),
        "trials": len(plan.trials),
        "controls": len(plan.controls),
        "budget": request.epochs,
        "rungs": list(plan.rule.rungs(request.epochs)) if plan.rule.factor > 1 else [],
        "data": request.data,
        "at_once": packing.concurrency,
        "device": packing.device,
        "gpus_per_trial": packing.gpus_per_trial,
        "epochs": cost.epochs,
        "epochs_without_stopping": cost.full_epochs,
        "seconds": cost.seconds,
        "spread": cost.spread,
    }


def _widths(plan: Plan, ends: forecast.EndSpread) -> tuple[str, list[forecast.Width]]:
    """Return the factor with the most levels, and how well these can be compared; none if no trial is stopped."""
    if not plan.controls or plan.rule.factor == 1 or not plan.rule.rungs(plan.trials[0].epochs):
        return "", []
    counts = {factor: len({cell[factor] for cell in plan.cells}) for factor in plan.cells[0]}
    factor, levels = max(counts.items(), key=lambda item: item[1])
    return factor, forecast.expected_widths(plan.trials, len(plan.controls), plan.rule, levels, ends)


def _explain_widths(factor: str, widths: Sequence[forecast.Width], ends: forecast.EndSpread) -> str:
    first, *more = widths
    options = [f"±{100 * first.half_width:.1f} points with {first.controls:,} controls"]
    options += [
        f"±{100 * width.half_width:.1f} with {width.controls:,} ({width.epochs / first.epochs - 1:+.0%} epochs)"
        for width in more
    ]
    text = f"two levels of {factor}: {', '.join(options)}; {ends.source}"
    return textwrap.fill(text, 68, subsequent_indent=" " * 11, break_on_hyphens=False)


def _calibrate(plan: Plan, shape: DataShape, packing: Packing) -> tuple[forecast.Calibration, str]:
    """Time a few trials where they would run, and say where that was; no machine is started for it."""
    if packing.device == "cpu" or find_gpus()[0]:
        return forecast.calibrate(plan.trials, shape), "this machine"
    if connection.cluster_has_gpu():
        return connection.call_remote(forecast.calibrate, plan.trials, shape, packing=packing), "a GPU of the cluster"
    on_cpu = [replace(trial, device="cpu", fused=False) for trial in plan.trials]
    return forecast.calibrate(on_cpu, shape), "this machine's CPU, as no GPU is up: expect less"


def _look_at_data(request: Request) -> tuple[DataShape, str]:
    """Return the shape of the data, and where it is known from."""
    sizes = find_dataset(request.data, request.data_dir).sizes
    if sizes is None or is_on_disk(request.data, request.data_dir):
        dataset = load(request.data, request.data_dir, per_class=request.per_class, split_seed=ORDER_SEED)
        return dataset.shape, "on this disk"
    train_images, _ = sizes.split_sizes(request.per_class)
    return DataShape((1, 28, 28), sizes.class_count, train_images), "(not on this disk yet)"
