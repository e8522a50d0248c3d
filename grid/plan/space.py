"""Which trials a grid consists of: named grids, exclusions, replicates, nuisance levels, order."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from grid.config import (
    FACTORS,
    LEVELS,
    MATTERS_WITH,
    SETTINGS,
    InputError,
    TrialConfig,
    changed_settings,
    check_level,
    check_setting,
    idle_settings,
    varied,
)

ORDER_SEED = 0
"""Seed of the order of the trials, of the controls and of the validation split; recorded in the manifest."""

Cell = dict[str, str]
"""One combination: factor -> level."""
Levels = dict[str, tuple[str, ...]]
"""Factor -> the levels to cross."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A named grid: a question, the levels that answer it, and the default training settings."""

    question: str
    levels: Levels
    data: str = "emnist-balanced"
    """Name of the data set."""
    per_class: int | None = None
    """Training images per class; None for all."""
    epochs: int = 27
    """Full budget of a trial."""


_FULL: Levels = {
    "model": ("mlp", "cnn"),
    "lr_schedule": ("constant", "step", "cosine", "one_cycle"),
    "activation": ("relu", "leaky_relu", "elu", "gelu"),
    "optimizer": ("sgd", "adam", "rmsprop", "asgd", "adagrad"),
    "batch_norm": ("off", "on"),
    "regularization": ("none", "l1", "l2"),
    "dropout": ("off", "on"),
}

GRIDS: dict[str, Grid] = {
    "full": Grid(question="Which combination of all techniques wins, and what does each contribute?", levels=_FULL),
    "mlp": Grid(question="The full grid for the MLP alone", levels=_FULL | {"model": ("mlp",)}),
    "cnn": Grid(question="The full grid for the CNN alone", levels=_FULL | {"model": ("cnn",)}),
    "techniques": Grid(
        question="Which techniques matter at all? A screening with two levels per factor",
        levels={
            "model": ("mlp", "cnn"),
            "lr_schedule": ("constant", "one_cycle"),
            "activation": ("relu", "gelu"),
            "optimizer": ("sgd", "adam"),
            "batch_norm": ("off", "on"),
            "regularization": ("none", "l2"),
            "dropout": ("off", "on"),
        },
    ),
    "smoke": Grid(
        question="Does everything work here? A small grid on images drawn from fonts, without a network",
        levels={
            "model": ("mlp", "cnn"),
            "lr_schedule": ("cosine",),
            "activation": ("relu", "gelu"),
            "optimizer": ("sgd", "adam"),
            "batch_norm": ("off", "on"),
            "regularization": ("none",),
            "dropout": ("off", "on"),
        },
        data="glyphs",
        per_class=100,
        epochs=9,
    ),
}

EXCLUSIONS: dict[str, Callable[[Cell], bool]] = {
    "adamw decays the weights already; l2 in the loss would decay them twice": (
        lambda cell: cell["optimizer"] == "adamw" and cell["regularization"] in ("l2", "elastic")
    ),
}
"""Reason, printed and stored -> whether it excludes a cell from every grid."""


def find_grid(name: str) -> Grid:
    """Return a named grid.

    Raises:
        InputError: There is no grid of that name.
    """
    if name not in GRIDS:
        raise InputError(f"unknown grid '{name}'; choose from {', '.join(sorted(GRIDS))}")
    return GRIDS[name]


def restrict(levels: Levels, only: Iterable[tuple[str, Sequence[str]]]) -> Levels:
    """Return `levels` with some factors restricted to the levels asked for.

    A factor may be restricted to any of its levels, even to those that the grid itself leaves out. If it is restricted
    twice, the levels that both restrictions allow remain.

    Args:
        levels: The grid's own levels.
        only: Pairs of a factor and the levels it is restricted to.

    Raises:
        InputError: Unknown factor or level, or no level left.
    """
    held: Levels = {}
    for factor, wanted in only:
        for level in wanted:
            check_level(factor, level)
        held[factor] = tuple(level for level in held.get(factor, LEVELS[factor]) if level in wanted)
        if not held[factor]:
            raise InputError(f"--only leaves no cell: no {factor} is left; give {factor}=LEVEL[,LEVEL] once")
    return {factor: held.get(factor, levels[factor]) for factor in FACTORS}


def vary(settings: Iterable[tuple[str, Sequence[str]]]) -> Levels:
    """Return the levels of settings that become factors of a grid.

    Args:
        settings: Pairs of a setting and its values.

    Raises:
        InputError: Unknown setting, a value out of range, or fewer than two values.
    """
    levels: Levels = {}
    for name, values in settings:
        if name in FACTORS:
            raise InputError(f"{name} is a factor: give --only {name}={','.join(values)}")
        check_setting(name)
        known = tuple(dict.fromkeys(changed_settings({name: value}).get(name, SETTINGS[name]) for value in values))
        if len(known) < 2 or name in levels:
            raise InputError(f"--vary takes each setting once, with two values or more; got {name}={','.join(values)}")
        levels[name] = known
    return levels


def cross(levels: Levels) -> tuple[list[Cell], dict[str, int]]:
    """Return the cells of the full factorial that are left, and how many each exclusion removed.

    Cells that differ only in a setting that does not matter with their other levels are one.

    Raises:
        InputError: The exclusions leave no cell.
    """
    cells: dict[tuple[str, ...], Cell] = {}
    excluded: Counter[str] = Counter()
    for combination in product(*levels.values()):
        cell, idle = _without_idle(dict(zip(levels, combination, strict=True)))
        reasons = [reason for reason, excludes in EXCLUSIONS.items() if excludes(cell)]
        if not reasons and tuple(cell.values()) in cells:
            reasons = [f"{name} matters only with {_condition(name)}" for name in idle]
        excluded.update(reasons[:1])
        if not reasons:
            cells[tuple(cell.values())] = cell
    if not cells:
        raise InputError(f"--only leaves no cell: all are excluded ({'; '.join(excluded)}); allow other levels")
    return list(cells.values()), dict(excluded)


def _without_idle(cell: Cell) -> tuple[Cell, list[str]]:
    """Return a cell with the defaults of the settings that do not matter in it, and these settings."""
    idle = idle_settings(cell)
    return cell | {name: SETTINGS[name] for name in idle}, idle


def _condition(name: str) -> str:
    factor, levels = MATTERS_WITH[name]
    return f"{factor}={','.join(levels)}"


def expand(
    cells: Sequence[Cell],
    *,
    seeds: int,
    lr_scales: Sequence[float],
    order_seed: int,
    configure: Callable[[Cell, int, float], TrialConfig],
) -> list[TrialConfig]:
    """Return the trials of a grid in random order.

    The place of a trial depends on `order_seed` and on the trial alone: a grid that grows keeps its order.

    Args:
        cells: Cells to train.
        seeds: Replicates per cell.
        lr_scales: Nuisance levels per replicate.
        order_seed: Seed of the order.
        configure: Builds the trial of a cell, a seed and a nuisance level.
    """
    trials = [configure(cell, seed, scale) for cell in cells for seed in range(seeds) for scale in lr_scales]
    return sorted(trials, key=lambda trial: _draw(order_seed, trial.cell_key, trial.seed, trial.lr_scale))


def shared_settings(trials: Sequence[TrialConfig]) -> dict[str, str]:
    """Return what all trials of a grid share: everything except factors, seed and nuisance."""
    varying = {*varied(trials), "seed", "lr_scale", "learning_rate"}
    return {name: value for name, value in trials[0].to_params().items() if name not in varying}


def _draw(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
