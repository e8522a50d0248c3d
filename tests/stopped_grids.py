"""Grids that learn by formula: their ends are known, one third is never stopped, and controls can be drawn again."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.estimates.anova import Array
from grid.config import FACTORS
from grid.parts import LEVELS

RUNGS = (1, 3)
EPOCHS = 9
SIZES = {"model": 2, "lr_schedule": 4, "activation": 3, "optimizer": 4}
"""Levels of each factor: 96 cells."""
START = {"one_cycle": -0.16, "cosine": -0.05, "adam": 0.08, "rmsprop": 0.05, "gelu": 0.03}
"""What a level adds to the accuracy after the first rung."""
END = {"one_cycle": 0.04, "cosine": 0.02, "adam": 0.02, "rmsprop": -0.04, "gelu": -0.01, "cnn": 0.05}
"""What a level adds to the accuracy at the end: slow starters win."""


@dataclass(frozen=True)
class Grid:
    """Cells and what each of them does if nothing stops it."""

    cells: pd.DataFrame
    """The factors and `seed`."""
    rungs: Array
    """Accuracy at each rung, `[cell, rung]`."""
    final: Array
    """Accuracy at the end, `[cell]`."""
    stop: Array
    """Rung that stops a cell, control or not, `[cell]`; NaN if none does."""

    def stopped_early(self, drawn: NDArray[np.bool_], chances: Array | float | None = None) -> pd.DataFrame:
        """Return the trials as the store would have them.

        Args:
            drawn: Whether a cell is an unstopped control, `[cell]`.
            chances: With which it was drawn to be one; None if the store does not say.
        """
        seen = np.isnan(self.stop) | drawn
        last = np.where(seen, EPOCHS, self.stop)
        reached = np.where(last[:, None] >= np.array(RUNGS), self.rungs, np.nan)
        accuracies = {f"val_accuracy_at_{rung}": reached[:, index] for index, rung in enumerate(RUNGS)}
        final = np.where(seen, self.final, np.nan)
        return self.cells.assign(
            run_id=[f"run {number}" for number in range(len(self.cells))],
            lr_scale=1.0,
            epochs=EPOCHS,
            epochs_run=last.astype(int),
            epoch_seconds=2.0,
            status=np.where(seen, "completed", "stopped"),
            control=drawn,
            control_chance=np.nan if chances is None else chances,
            stopped_at_epoch=np.where(seen, np.nan, self.stop),
            stop_epoch=self.stop,
            final_val_accuracy=final,
            best_val_accuracy=final,
            val_correct="",
            **accuracies,
        )

    def never_stopped(self) -> pd.DataFrame:
        """Return the trials of a grid in which every trial had the full budget."""
        return self.stopped_early(np.ones(len(self.cells), dtype=bool), 1.0).assign(stop_epoch=np.nan)

    def draw(self, share: Array | float, random: np.random.Generator) -> NDArray[np.bool_]:
        """Draw each cell to be a control with a chance of its own, `[cell]`."""
        return random.random(len(self.cells)) < share

    def draw_exactly(self, number: int, random: np.random.Generator) -> NDArray[np.bool_]:
        """Draw so many of the cells that the rule stops to be controls, `[cell]`."""
        drawn = np.zeros(len(self.cells), dtype=bool)
        drawn[random.permutation(np.flatnonzero(np.isfinite(self.stop)))[:number]] = True
        return drawn


def cells_of(sizes: dict[str, int], seeds: int = 1) -> pd.DataFrame:
    """Return every combination of the first levels of each factor."""
    levels = [LEVELS[factor][: sizes.get(factor, 1)] for factor in FACTORS]
    return pd.DataFrame(product(*levels, range(seeds)), columns=[*FACTORS, "seed"])


def make_grid(
    sizes: dict[str, int] | None = None, *, seeds: int = 1, noise: float = 0.02, random_state: int = 0
) -> Grid:
    """Return a grid of which two thirds are stopped at the first rung, and two thirds of the others at the second."""
    cells = cells_of(SIZES if sizes is None else sizes, seeds)
    random = np.random.default_rng(random_state)
    start, end = _sums(cells, START), _sums(cells, END)
    luck = random.normal(0, noise, len(cells))
    final = np.asarray(0.7 + end + luck)
    first = 0.4 + start + luck + random.normal(0, noise, len(cells))
    rungs = np.column_stack([first, 0.3 * first + 0.65 * final])
    stop = np.full(len(cells), np.nan)
    stop[rungs[:, 0] < np.quantile(rungs[:, 0], 2 / 3)] = RUNGS[0]
    going = np.isnan(stop)
    stop[going & (rungs[:, 1] < np.quantile(rungs[going, 1], 2 / 3))] = RUNGS[1]
    return Grid(cells, rungs, final, stop)


def _sums(cells: pd.DataFrame, gains: dict[str, float]) -> Array:
    """Return what the levels of each cell add up to, `[cell]`."""
    return np.sum([cells[factor].map(gains).fillna(0.0).to_numpy(dtype=float) for factor in FACTORS], axis=0)


def true_effects(grid: Grid) -> "pd.Series[float]":
    """Return what each level did to the end of these very cells, by factor and level."""
    return _effects(grid.cells, grid.final)


def planted_effects(grid: Grid) -> "pd.Series[float]":
    """Return what each level does to the end on average over seeds, by factor and level."""
    return _effects(grid.cells, _sums(grid.cells, END))


def _effects(cells: pd.DataFrame, ends: Array) -> "pd.Series[float]":
    effects = {
        (factor, level): ends[cells[factor] == level].mean() - ends.mean()
        for factor in FACTORS
        if cells[factor].nunique() > 1
        for level in cells[factor].unique()
    }
    return pd.Series(effects)
