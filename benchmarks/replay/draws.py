"""Replays a grid on the table of real curves: random arrivals, stopped by the grid's own ASHA, with controls drawn."""

from dataclasses import dataclass
from math import prod

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.replay.curves import EPOCHS, in_order
from grid.config import FACTORS
from grid.metrics import RUNG_METRIC
from grid.plan.asha import Asha, StoppingRule
from grid.plan.controls import draw_cells


@dataclass(frozen=True)
class Table:
    """The curves of one grid with a seed per cell, as arrays."""

    cells: pd.DataFrame
    """The factors; one row per cell."""
    accuracies: NDArray[np.float64]
    """`[cell, epoch]`, NaN from the epoch on in which the training diverged."""

    @classmethod
    def of(cls, curves: pd.DataFrame, number: int) -> "Table":
        """Return a grid in which each model has its `number`-th seed, counted anew where a model has fewer.

        Args:
            curves: From `benchmarks.replay.curves.load_curves`.
            number: From 0.
        """
        seeds = curves.groupby("model")["seed"].unique()
        chosen = curves["model"].map(lambda model: sorted(seeds[model])[number % len(seeds[model])])
        rows = in_order(curves[curves["seed"] == chosen])
        return cls(rows[list(FACTORS)], rows[[str(epoch) for epoch in range(1, EPOCHS + 1)]].to_numpy(dtype=float))

    @property
    def diverged_at(self) -> NDArray[np.float64]:
        """Epoch in which each training diverged, infinity for never, `[cell]`."""
        lost = np.isnan(self.accuracies)
        return np.where(lost.any(axis=1), lost.argmax(axis=1) + 1.0, np.inf)


def draw_controls(laid_out: pd.DataFrame, wanted: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], float]:
    """Draw unstopped controls as a grid does.

    Args:
        laid_out: A row per trial, a column per factor (or seed).
        wanted: How many in a full factorial; fewer if some cells are missing.
        rng: Draws them.

    Returns:
        Which trials they are, `[trial]`, and the chance that each trial had.
    """
    codes = np.column_stack([pd.factorize(column)[0] for _, column in laid_out.items()])
    counts = (codes.max(axis=0) + 1).tolist()
    drawn = {tuple(cell) for cell in draw_cells(counts, wanted, rng).tolist()}
    return np.array([tuple(cell) in drawn for cell in codes.tolist()]), wanted / prod(counts)


def draw_at_random(laid_out: pd.DataFrame, wanted: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], float]:
    """Draw unstopped controls without a design; arguments and results are those of `draw_controls`."""
    lots = rng.permutation(len(laid_out))
    return lots < wanted, wanted / len(laid_out)


def replay(
    table: Table,
    rule: StoppingRule,
    controls: NDArray[np.bool_],
    chance: float | NDArray[np.float64],
    rng: np.random.Generator,
    later: int = 0,
) -> pd.DataFrame:
    """Run a grid on the table, one trial after another in random order.

    Args:
        table: The curves.
        rule: Which trials are stopped.
        controls: Which trials are unstopped controls, `[cell]`.
        chance: With which each trial was drawn to be one.
        rng: Draws the order of arrival.
        later: How many more controls are drawn in the end, among the trials that were stopped.

    Returns:
        The trials as `analysis.store.read_experiment` returns them.
    """
    asha = Asha.of(rule, EPOCHS)
    compared = table.cells[list(rule.within)].astype(str).to_numpy().tolist()
    groups = [rule.group_of(dict(zip(rule.within, levels, strict=True))) for levels in compared]
    allowed, stop = np.full(len(groups), EPOCHS), np.full(len(groups), np.nan)
    diverged_at = table.diverged_at
    for trial in rng.permutation(len(groups)):
        key, group, control = str(trial), groups[trial], bool(controls[trial])
        for rung in asha.rungs:
            if diverged_at[trial] <= rung:
                asha.diverge(key, group=group, epoch=int(diverged_at[trial]))
                break
            value = float(table.accuracies[trial, rung - 1])
            continues = asha.decide(key, group=group, epoch=rung, value=value, control=control)
            if asha.stop_epoch(key) == rung:
                stop[trial] = rung
            if not continues:
                allowed[trial] = rung
                break
    if later:
        stopped = np.flatnonzero(allowed < EPOCHS)
        drawn = rng.choice(stopped, min(later, len(stopped)), replace=False)
        controls = controls.copy()
        allowed[drawn], controls[drawn] = EPOCHS, True
        chance = 1 - (1 - chance) * (1 - len(drawn) / len(stopped))
    return _observe(table, allowed, stop, controls, chance, asha.rungs)


def _observe(
    table: Table,
    allowed: NDArray[np.int_],
    stop: NDArray[np.float64],
    controls: NDArray[np.bool_],
    chance: float | NDArray[np.float64],
    rungs: tuple[int, ...],
) -> pd.DataFrame:
    diverged_at, names = table.diverged_at, table.cells.index.astype(str)
    diverged = diverged_at <= allowed
    completed = (allowed == EPOCHS) & ~diverged
    epochs = np.minimum(allowed, diverged_at).astype(int)
    seen = np.where(np.arange(1, EPOCHS + 1) <= epochs[:, None], table.accuracies, np.nan)
    return table.cells.assign(
        run_id=names,
        trial_key=names,
        cell_key=names,
        seed=0,
        lr_scale=1.0,
        epochs=EPOCHS,
        status=np.select([diverged, completed], ["diverged", "completed"], "stopped"),
        control=controls,
        control_chance=chance,
        stopped_at_epoch=np.where(~diverged & ~completed, stop, np.nan),
        stop_epoch=np.where(diverged & ~controls, np.nan, stop),
        epochs_run=epochs,
        final_val_accuracy=np.where(completed, table.accuracies[:, -1], np.nan),
        best_val_accuracy=np.fmax.reduce(seen, axis=1),
        epoch_seconds=np.nan,
        val_correct="",
        **{f"{RUNG_METRIC}{rung}": seen[:, rung - 1] for rung in rungs},
    )
