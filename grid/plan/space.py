"""Which trials a grid consists of: levels, exclusions, replicates, nuisance levels, order."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product

from grid.config import (
    MATTERS_WITH,
    OWN,
    SETTINGS,
    InputError,
    TrialConfig,
    changed_settings,
    check_setting,
    idle_settings,
    varied,
)
from grid.parts import LEVELS
from grid.parts.registry import ACTIONS, EXCLUSIONS, GRIDS, Grid, Levels, check_level, is_from_file
from grid.wording import first_line

ORDER_SEED = 0
"""Seed of the order of the trials, of the controls and of the validation split; recorded in the manifest."""

Cell = dict[str, str]
"""One combination: factor -> level."""


def find_grid(name: str) -> Grid:
    """Return a named grid.

    Raises:
        InputError: There is no grid of that name.
    """
    if name not in GRIDS:
        raise InputError(f"unknown grid '{name}'; choose from {', '.join(sorted(GRIDS))}")
    return GRIDS[name]


def restrict(levels: Levels, only: Iterable[tuple[str, Sequence[str]]]) -> Levels:
    """Return `levels` and those of factors of parts files, with some factors restricted to the levels asked for.

    A factor may be restricted to any of its levels, even to those that the grid itself leaves out. If it is restricted
    twice, the levels that both restrictions allow remain.

    Args:
        levels: The grid's own levels.
        only: Pairs of a factor and the levels it is restricted to.

    Raises:
        InputError: Unknown factor or level, or no level left.
    """
    held: dict[str, Sequence[str]] = {}
    for factor, wanted in only:
        for level in wanted:
            check_level(factor, level)
        held[factor] = tuple(level for level in held.get(factor, LEVELS[factor]) if level in wanted)
        if not held[factor]:
            raise InputError(f"--only leaves no cell: no {factor} is left; give {factor}=LEVEL[,LEVEL] once")
    own = {factor: LEVELS[factor] for factor in ACTIONS if is_from_file("factor", factor)}
    chosen = {**own, **levels, **held}
    return {factor: tuple(chosen[factor]) for factor in LEVELS if factor in chosen}


def vary(settings: Iterable[tuple[str, Sequence[str]]]) -> Levels:
    """Return the levels of settings that become factors of a grid.

    Args:
        settings: Pairs of a setting and its values.

    Raises:
        InputError: Unknown setting, a value out of range, or fewer than two values.
    """
    levels: dict[str, Sequence[str]] = {}
    for name, values in settings:
        if name in LEVELS:
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
        reasons = [reason for reason in EXCLUSIONS if _is_excluded(cell, reason)]
        if not reasons and tuple(cell.values()) in cells:
            reasons = [f"{name} matters only with {_condition(name)}" for name in idle]
        excluded.update(reasons[:1])
        if not reasons:
            cells[tuple(cell.values())] = cell
    if not cells:
        raise InputError(f"--only leaves no cell: all are excluded ({'; '.join(excluded)}); allow other levels")
    return list(cells.values()), dict(excluded)


def _is_excluded(cell: Cell, reason: str) -> bool:
    try:
        return EXCLUSIONS[reason](cell)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"exclusion '{reason}': {type(error).__name__}: {first_line(error)}") from error


def _without_idle(cell: Cell) -> tuple[Cell, list[str]]:
    """Return a cell with the defaults of the settings that do not matter in it, and these settings."""
    idle = idle_settings(cell)
    return cell | {name: SETTINGS[name] for name in idle}, idle


def _condition(name: str) -> str:
    factor, levels = MATTERS_WITH[name]
    return f"{factor}={','.join(levels)}"


def read_first(levels: Levels, wanted: Iterable[tuple[str, Sequence[str]]]) -> Levels:
    """Return the levels whose cells start first, by factor.

    Args:
        levels: Of the grid.
        wanted: Pairs of a factor and some of its levels.

    Raises:
        InputError: Unknown factor or level, or no cell of the grid has them.
    """
    first: dict[str, Sequence[str]] = {}
    for factor, chosen in wanted:
        if factor not in levels or factor in first:
            hint = f"choose from {', '.join(levels)}"
            raise InputError(f"--first takes each factor of the grid once, got '{factor}'; {hint}")
        if unknown := set(chosen) - set(levels[factor]):
            hint = f"choose from {', '.join(levels[factor])}"
            raise InputError(f"--first: the grid has no {factor}={min(unknown)}; {hint}")
        first[factor] = chosen
    cells, _ = cross(levels)  # raises if nothing is left
    if not any(has_levels(cell, first) for cell in cells):
        raise InputError("--first: no cell of the grid has all of these levels; give fewer")
    return first


def has_levels(cell: Cell, levels: Levels) -> bool:
    """Return whether a cell has one of the levels of each factor."""
    return all(cell[factor] in allowed for factor, allowed in levels.items())


def expand(
    cells: Sequence[Cell],
    *,
    seeds: int,
    lr_scales: Sequence[float],
    order_seed: int,
    configure: Callable[[Cell, int, float], TrialConfig],
    first: Levels | None = None,
) -> list[TrialConfig]:
    """Return the trials of a grid in random order, if none are to be `first`.

    The place of a trial depends on `order_seed` and on the trial alone: a grid that grows keeps its order.

    Args:
        cells: Cells to train.
        seeds: Replicates per cell.
        lr_scales: Nuisance levels per replicate.
        order_seed: Seed of the order.
        configure: Builds the trial of a cell, a seed and a nuisance level.
        first: Levels whose cells come before all others.
    """
    ahead, behind = ([cell for cell in cells if has_levels(cell, first or {}) is wanted] for wanted in (True, False))
    trials: list[TrialConfig] = []
    for part in (ahead, behind):
        drawn = [configure(cell, seed, scale) for cell in part for seed in range(seeds) for scale in lr_scales]
        trials += sorted(drawn, key=lambda trial: _draw(order_seed, trial.cell_key, trial.seed, trial.lr_scale))
    return trials


def shared_settings(trials: Sequence[TrialConfig]) -> dict[str, str]:
    """Return what all trials of a grid share: everything except factors, seed and nuisance."""
    varying = {*varied(trials), "seed", "lr_scale", "learning_rate", "own"}
    known = {**trials[0].to_params(), **{name: trials[0].text(name) for name in OWN}}
    return {name: value for name, value in known.items() if name not in varying}


def _draw(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
