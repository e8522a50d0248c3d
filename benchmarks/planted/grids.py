"""Simulates grids with known effects, learning curves and divergence, and stops them with the grid's own ASHA.

Accuracies are main effects + two-way interactions + a seed's block + noise. The noise is even in half of the grids and
differs by level in the other half; in half of the grids some trials diverge, at a rate that depends on the levels.
Effects and noise change from epoch to epoch, so that learning curves cross.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.stopping import rung_thresholds, stop_epochs
from grid.config import FACTORS, LEVELS
from grid.metrics import RUNG_METRIC
from grid.plan.asha import FACTOR, Asha, rung_epochs

Array = NDArray[np.float64]
Level = tuple[str, ...]
"""(factor, level) of a main effect; (factor, level, other factor, other level) of an interaction."""
LABEL_COLUMNS = ("factor", "level", "other_factor", "other_level")

EPOCHS = 9
RUNGS = rung_epochs(EPOCHS)
POINTS = (*RUNGS, EPOCHS)
"""Epochs at which a curve is simulated."""
MEANS = np.array([0.3, 0.5, 0.7])
"""Accuracy at each point of `POINTS`."""
CORRELATIONS = (0.8, 0.4)
"""Of effects and noise at the first rung with those at the full budget: in three of four grids, in the fourth."""
MAIN_SD, PAIR_SD, SEED_SD, NOISE_SD = 0.03, 0.01, 0.005, 0.02
CONTROLS = 0.1
"""Share of unstopped controls among the trials."""
COUNTS = (2, 3, 3, 3, 2, 1, 2)
"""Number of levels of each of `FACTORS`: 216 cells."""
LEVEL_NAMES = {factor: LEVELS[factor][:count] for factor, count in zip(FACTORS, COUNTS, strict=True)}
UNEVEN = {"optimizer": (0.5, 1.0, 2.0), "batch_norm": (0.7, 1.4)}
"""Factor -> what each of its levels multiplies the noise by in grids with uneven noise."""
DIVERGED_AT, DIVERGED_AT_SHARES = (1, 2, 6), (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Plan:
    """The kind of a simulated grid."""

    seeds: int = 1
    """Replicates per cell."""
    uneven: bool = False
    """Whether the noise differs by level."""
    holes: bool = False
    """Whether trials diverge."""
    correlation: float = CORRELATIONS[0]
    noise_sd: float = NOISE_SD
    """Standard deviation of an accuracy."""

    @classmethod
    def of(cls, index: int) -> "Plan":
        """Return the kind of the `index`-th grid; all combinations of seeds, noise and holes are equally frequent."""
        correlation = CORRELATIONS[index // 8 % 4 == 3]
        return cls(1 + index // 4 % 2, bool(index % 2), bool(index // 2 % 2), correlation)


@dataclass(frozen=True)
class Grid:
    """A simulated grid and its planted effects."""

    trials: pd.DataFrame
    """As `analysis.store` returns them."""
    unstopped: pd.DataFrame
    """The same trials if none had been stopped."""
    truth: dict[Level, Array]
    """Effect of every level and of every pair of levels, at each of `POINTS`."""

    @property
    def final(self) -> "pd.Series[float]":
        """Accuracy of every trial at the full budget if none had been stopped; minus infinity if it diverged."""
        return self.unstopped["best_val_accuracy"].where(self.unstopped["status"] == "completed", -np.inf)


def plant(plan: Plan, rng: np.random.Generator) -> Grid:
    """Simulate a grid of a kind."""
    truth = draw_truth(plan, rng)
    trials = lay_out(plan, rng)
    values = draw_curves(trials, truth, plan, rng)
    diverged_at = draw_divergence(trials, rng) if plan.holes else np.full(len(trials), np.inf)
    unstopped = observe(trials, values, diverged_at, np.full(len(trials), EPOCHS))
    return Grid(observe(trials, values, diverged_at, stop(unstopped, diverged_at, rng)), unstopped, truth)


def draw_truth(plan: Plan, rng: np.random.Generator) -> dict[Level, Array]:
    """Draw the effects at every point; they sum to zero over the levels of each factor."""
    truth: dict[Level, Array] = {}
    for factor, names in LEVEL_NAMES.items():
        effects = _drift(MAIN_SD, (len(names),), plan, rng)
        effects -= effects.mean(axis=1, keepdims=True)
        truth |= {(factor, name): effects[:, i] for i, name in enumerate(names)}
    for (factor, names), (other, other_names) in combinations(LEVEL_NAMES.items(), 2):
        effects = _drift(PAIR_SD, (len(names), len(other_names)), plan, rng)
        effects -= effects.mean(axis=1, keepdims=True)
        effects -= effects.mean(axis=2, keepdims=True)
        for (i, name), (j, other_name) in product(enumerate(names), enumerate(other_names)):
            truth[factor, name, other, other_name] = effects[:, i, j]
    return truth


def lay_out(plan: Plan, rng: np.random.Generator) -> pd.DataFrame:
    """Return every cell x seed in random order; some of the trials are unstopped controls."""
    rows = [(*cell, seed) for cell in product(*LEVEL_NAMES.values()) for seed in range(plan.seeds)]
    trials = pd.DataFrame(rows, columns=[*FACTORS, "seed"]).sample(frac=1, random_state=rng, ignore_index=True)
    controls = np.zeros(len(trials), bool)
    controls[rng.choice(len(trials), round(CONTROLS * len(trials)), replace=False)] = True
    names = trials.index.astype(str)
    return trials.assign(
        lr_scale=1.0, epochs=EPOCHS, control=controls, trial_key=names, cell_key=names, run_id=names
    )  # replicates have different cell keys here, which is harmless: the analysis groups by the factors


def draw_curves(trials: pd.DataFrame, truth: Mapping[Level, Array], plan: Plan, rng: np.random.Generator) -> Array:
    """Return the accuracy of each trial at every point, `[trial, point]`."""
    values = np.tile(MEANS, (len(trials), 1))
    for label, effects in truth.items():
        values[has(trials, label)] += effects
    values += rng.normal(0, SEED_SD, (plan.seeds, 1))[trials["seed"]]
    noise = _drift(plan.noise_sd, (len(trials),), plan, rng).T
    for factor, scales in UNEVEN.items() if plan.uneven else ():
        noise *= trials[factor].map(dict(zip(LEVEL_NAMES[factor], scales, strict=True))).to_numpy()[:, None]
    return values + noise


def draw_divergence(trials: pd.DataFrame, rng: np.random.Generator) -> Array:
    """Return the epoch in which each trial diverges, or infinity; it depends on the levels, not on the accuracy."""
    rates = np.full(len(trials), 0.02)
    rates[has(trials, ("optimizer", LEVEL_NAMES["optimizer"][2], "batch_norm", "off"))] += 0.3
    rates[has(trials, ("lr_schedule", LEVEL_NAMES["lr_schedule"][1]))] += 0.05
    epochs = rng.choice(DIVERGED_AT, len(trials), p=DIVERGED_AT_SHARES)
    return np.where(rng.random(len(trials)) < rates, epochs, np.inf)


def stop(unstopped: pd.DataFrame, diverged_at: Array, rng: np.random.Generator) -> NDArray[np.int_]:
    """Send the trials through the rungs of `grid.plan.asha` in random order; return the epochs that each may run."""
    asha = Asha(RUNGS)
    allowed = np.full(len(unstopped), EPOCHS)
    columns = [unstopped[f"{RUNG_METRIC}{rung}"].tolist() for rung in RUNGS]
    models, controls = unstopped["model"].tolist(), unstopped["control"].tolist()
    for trial in rng.permutation(len(unstopped)):
        for rung, values in zip(RUNGS, columns, strict=True):
            if diverged_at[trial] <= rung:
                asha.diverge(str(trial), group=models[trial], epoch=int(diverged_at[trial]))
                break
            value, control = values[trial], controls[trial]
            if not asha.decide(str(trial), group=models[trial], epoch=rung, value=value, control=control):
                allowed[trial] = rung
                break
    return allowed


def observe(trials: pd.DataFrame, values: Array, diverged_at: Array, allowed: NDArray[np.int_]) -> pd.DataFrame:
    """Return the trials as the store holds them if each may run the allowed number of epochs."""
    seen = np.where((allowed[:, None] >= POINTS) & (diverged_at[:, None] > POINTS), values, np.nan)
    diverged = diverged_at <= allowed
    stopped_at = np.where(~diverged & (allowed < EPOCHS), allowed, np.nan)
    rungs = {f"{RUNG_METRIC}{rung}": seen[:, i] for i, rung in enumerate(RUNGS)}
    return trials.assign(
        status=np.select([diverged, allowed < EPOCHS], ["diverged", "stopped"], "completed"),
        stopped_at_epoch=stopped_at,
        stop_epoch=stopped_at,
        epochs_run=np.minimum(allowed, diverged_at).astype(int),
        final_val_accuracy=seen[:, -1],
        best_val_accuracy=np.fmax.reduce(seen, axis=1),
        **rungs,
    )


def true_false_stops(grid: Grid) -> dict[str, float]:
    """Return, for each model, the share of false stops among all trials that the replayed rule stops."""
    rule_stops = stop_epochs(grid.unstopped, rung_thresholds(grid.trials, RUNGS, FACTOR)).notna()
    completed = grid.trials["status"] == "completed"
    survived = completed & ~(grid.trials["control"] & rule_stops)
    rates = {}
    for model in LEVEL_NAMES["model"]:
        in_model = grid.trials["model"] == model
        rates[model] = float((grid.final[in_model & rule_stops] > grid.final[in_model & survived].median()).mean())
    return rates


def _drift(spread: float, shape: tuple[int, ...], plan: Plan, rng: np.random.Generator) -> Array:
    """Draw normal values at every point, `[point, *shape]`; each point is correlated with the previous one."""
    kept = plan.correlation ** (1 / (len(POINTS) - 1))
    drawn = rng.normal(0, spread, (len(POINTS), *shape))
    for point in range(1, len(POINTS)):
        drawn[point] = kept * drawn[point - 1] + np.sqrt(1 - kept**2) * drawn[point]
    return drawn


def has(trials: pd.DataFrame, label: Level) -> "pd.Series[bool]":
    """Return which trials have the level, or both levels, of a label."""
    first = trials[label[0]] == label[1]
    return first & has(trials, label[2:]) if label[2:] else first
