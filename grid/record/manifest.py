"""What is written down of a whole grid, so that its numbers can be understood and had again: `grid.json`."""

import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grid.store_uri import mask

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy")


def describe_code() -> dict[str, Any]:
    """Return the commit of this code, the versions it runs with, the host and the command."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": ["python", "-m", "grid.run", *map(mask, sys.argv[1:])],
    }


def describe_plan(
    *,
    grid: str,
    levels: Mapping[str, Sequence[str]],
    excluded: Mapping[str, int],
    cells: int,
    trials: int,
    order_seed: int,
    rungs: Sequence[int],
    rung_factor: int,
    seeds: int,
    lr_scales: Sequence[float],
    controls: float,
    settings: Mapping[str, str],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what is trained, in JSON's types.

    Args:
        grid: Name of the grid.
        levels: Factor -> levels crossed.
        excluded: Reason -> number of cells taken out.
        cells: Number of cells left.
        trials: Number of trials.
        order_seed: Draws order, controls and validation split.
        rungs: Epochs at which ASHA decides.
        rung_factor: One in this many goes on.
        seeds: Replicates per cell.
        lr_scales: Nuisance levels.
        controls: Share of trials exempt from stopping.
        settings: What all trials have in common.
        data: What the trials see: `name`, `per_class`, `train_images`, `val_images`, `classes`.
    """
    return {
        "grid": grid,
        "levels": {factor: list(names) for factor, names in levels.items()},
        "excluded": dict(excluded),
        "cells": cells,
        "trials": trials,
        "order_seed": order_seed,
        "rungs": {"epochs": list(rungs), "factor": rung_factor, "compared_within": "model"},
        "seeds": seeds,
        "lr_scales": list(lr_scales),
        "controls": controls,
        "settings": dict(settings),
        "data": dict(data),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607  (git of the PATH)
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
