"""Simulates grids with known effects, learning curves and divergence, and stops them with the grid's own ASHA.

Accuracies are main effects + two-way interactions + how levels answer to a seed + noise. Every trial has a seed of its
own, as in a grid. The noise is even in half of the grids and differs by level in the other half; in half of the grids
some trials diverge, at a rate that depends on the levels. Effects and noise change from epoch to epoch, so that
learning curves cross. A third of the grids is resumed with another share of controls half-way, a third is grown by a
level after it has ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.replay.draws import Table, draw_controls, replay
from grid.config import FACTORS
from grid.parts import LEVELS
from grid.plan.asha import DEFAULT_RULE, rung_epochs

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
MAIN_SD, PAIR_SD, LEVEL_SEED_SD, NOISE_SD = 0.03, 0.01, 0.005, 0.02
"""Standard deviations: of effects, of interactions, of how a level answers to a seed, of the rest."""
FEWEST, MOST = 40, 200
"""Unstopped controls; all numbers between are equally frequent."""
HISTORIES = ("fresh", "resumed", "grown")
"""Ways in which a grid came about: at once; half with other controls; the last level of a factor added later."""
GROWN_FACTOR = "activation"
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
    controls: int = 100
    history: str = "fresh"
    """One of `HISTORIES`."""
    shared_seeds: bool = False
    """Whether all cells draw the same from a seed, as grids once did; their deviations are correlated then."""
    noise_sd: float = NOISE_SD
    """Standard deviation of an accuracy, without the answer to a seed."""
    level_seed_sd: float = LEVEL_SEED_SD
    """Standard deviation of how a level answers to a seed."""

    @classmethod
    def of(cls, index: int) -> "Plan":
        """Return the kind of the `index`-th grid; all combinations of seeds, noise and holes are equally frequent."""
        correlation = CORRELATIONS[index // 8 % 4 == 3]
        controls, history = FEWEST + index % (MOST - FEWEST + 1), HISTORIES[index % len(HISTORIES)]
        return cls(1 + index // 4 % 2, bool(index % 2), bool(index // 2 % 2), correlation, controls, history)


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
        return self.unstopped["final_val_accuracy"].where(self.unstopped["status"] == "completed", -np.inf)


def plant(plan: Plan, rng: np.random.Generator) -> Grid:
    """Simulate a grid of a kind."""
    truth = draw_truth(plan, rng)
    trials = lay_out(plan, rng)
    values = draw_curves(trials, truth, plan, rng)
    diverged_at = draw_divergence(trials, rng) if plan.holes else np.full(len(trials), np.inf)
    table = Table(trials[list(FACTORS)], _every_epoch(values, diverged_at))
    controls, chances = _draw_controls(trials, plan, rng)
    everybody = np.ones(len(trials), dtype=np.bool_)
    stopped, unstopped = (
        replay(table, DEFAULT_RULE, chosen, chances, rng).assign(seed=trials["seed"])
        for chosen in (controls, everybody)
    )
    return Grid(stopped, unstopped, truth)


def _every_epoch(values: Array, diverged_at: Array) -> Array:
    """Return the accuracy after every epoch, `[trial, epoch]`: that of the last point, NaN once diverged."""
    epochs = np.arange(1, EPOCHS + 1)
    last_point = np.searchsorted(POINTS, epochs, side="right") - 1
    return np.where(epochs < diverged_at[:, None], values[:, last_point], np.nan)


def _draw_controls(trials: pd.DataFrame, plan: Plan, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Array]:
    """Draw the unstopped controls; return which trials they are, and each trial's chance."""
    laid_out = trials[[*FACTORS, "seed"]]
    controls, chance = draw_controls(laid_out, plan.controls, rng)
    chances = np.full(len(trials), chance)
    if plan.history != "fresh":
        if plan.history == "resumed":
            late = rng.random(len(trials)) < 0.5
        else:
            late = (trials[GROWN_FACTOR] == LEVEL_NAMES[GROWN_FACTOR][-1]).to_numpy()
        others, other_chance = draw_controls(laid_out, int(rng.integers(FEWEST, MOST + 1)), rng)
        controls, chances = np.where(late, others, controls), np.where(late, other_chance, chances)
    return controls, chances


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
    """Return every cell x seed in random order."""
    rows = [(*cell, seed) for cell in product(*LEVEL_NAMES.values()) for seed in range(plan.seeds)]
    return pd.DataFrame(rows, columns=[*FACTORS, "seed"]).sample(frac=1, random_state=rng, ignore_index=True)


def draw_curves(trials: pd.DataFrame, truth: Mapping[Level, Array], plan: Plan, rng: np.random.Generator) -> Array:
    """Return the accuracy of each trial at every point, `[trial, point]`."""
    values = np.tile(MEANS, (len(trials), 1))
    for label, effects in truth.items():
        values[has(trials, label)] += effects
    seeds = trials["seed"].to_numpy() if plan.shared_seeds else np.arange(len(trials))
    for factor, names in LEVEL_NAMES.items():
        answers = rng.normal(0, plan.level_seed_sd, (seeds.max() + 1, len(names)))
        values += answers[seeds, trials[factor].map({name: i for i, name in enumerate(names)})][:, None]
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


def true_false_stops(grid: Grid) -> dict[str, float]:
    """Return, for each model, the share of false stops among all trials that ASHA stops or would have stopped."""
    trials = grid.trials
    doomed = trials["stop_epoch"].notna()
    survived = (trials["status"] == "completed") & ~doomed
    rates = {}
    for model in LEVEL_NAMES["model"]:
        in_model = trials["model"] == model
        rates[model] = float((grid.final[in_model & doomed] > grid.final[in_model & survived].median()).mean())
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
