"""One replay: draws an order and controls, stops the trials, and compares every answer with the truth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import lcm
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.replay.curves import EPOCHS, load_curves
from benchmarks.replay.draws import Table, draw_controls, replay
from benchmarks.replay.estimators import ESTIMATORS, compare, truth
from grid.plan.asha import DEFAULT_RULE, NO_STOPPING, StoppingRule
from grid.plan.controls import number_of_controls
from grid.plan.request import DEFAULT_CONTROLS

BEST = 20
"""Cells whose survival is counted."""


@dataclass(frozen=True)
class Setting:
    """What is replayed."""

    label: str
    rule: StoppingRule
    share: float
    """Of controls."""
    estimators: tuple[str, ...] = ("ours",)


RULES: Mapping[str, StoppingRule] = {
    "model; rungs 1, 3; best 1/3": DEFAULT_RULE,
    "model; rungs 1, 3; best 1/2": StoppingRule(factor=2),
    "model; rungs 1, 3; best 1/4": StoppingRule(factor=4),
    "model; rung 3; best 1/3": StoppingRule(grace=3),
    "model; rung 3; best 1/2": StoppingRule(grace=3, factor=2),
    "model x schedule; rungs 1, 3; best 1/3": StoppingRule(within=("model", "lr_schedule")),
    "model x schedule; rungs 1, 3; best 1/2": StoppingRule(within=("model", "lr_schedule"), factor=2),
}
SHARES = (DEFAULT_CONTROLS, 0.1, 0.2)
SETTINGS: Mapping[str, list[Setting]] = {
    "shares": [Setting(f"{share:.0%}", DEFAULT_RULE, share, tuple(ESTIMATORS)) for share in SHARES],
    "rules": [Setting(label, rule, DEFAULT_CONTROLS) for label, rule in RULES.items()],
}
"""Table -> what is replayed for it."""


@cache
def prepare(curves: Path) -> list[Table]:
    """Return the grids that the curves make up: with each seed of each model equally often, a seed per cell."""
    table = load_curves(curves)
    return [Table.of(table, number) for number in range(lcm(*table.groupby("model")["seed"].nunique()))]


@cache
def _truth(curves: Path, seed: int) -> pd.DataFrame:
    table = prepare(curves)[seed]
    nobody = np.zeros(len(table.cells), dtype=np.bool_)
    return truth(replay(table, NO_STOPPING, nobody, 0.0, np.random.default_rng(0)))


def examine(task: tuple[Setting, int], curves: Path, seed: int) -> pd.DataFrame:
    """Replay a setting once; draws take the grids of `prepare` in turn.

    Returns:
        `setting`, `draw`, `seed`, `estimator`, and: for each effect its names, `error`, `half`, `covered`; for the
        whole replay (`estimator` empty) `question` and `value`.
    """
    setting, draw = task
    tables = prepare(curves)
    place = draw % len(tables)
    rng = np.random.default_rng([seed, draw])
    table = tables[place]
    controls, chance = draw_controls(table.cells, number_of_controls(len(table.cells), setting.share), rng)
    trials = replay(table, setting.rule, controls, chance, rng)
    parts = [
        compare(ESTIMATORS[name](trials), _truth(curves, place)).assign(estimator=name) for name in setting.estimators
    ]
    parts.append(pd.DataFrame(questions(table, trials), columns=["question", "value"]).assign(estimator=""))
    return pd.concat(parts, ignore_index=True).assign(setting=setting.label, draw=draw, seed=place)


def questions(table: Table, trials: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """Yield what a replay says about winners and costs: regret, epochs, survivors."""
    ends = np.nan_to_num(table.accuracies[:, -1], nan=-np.inf)
    survived = ((trials["status"] == "completed") & trials["stop_epoch"].isna()).to_numpy()
    yield "epochs", trials["epochs_run"].sum() / (EPOCHS * len(trials))
    yield "regret", float(ends.max() - ends[survived].max())
    yield "best kept", float(survived[np.argsort(-ends, kind="stable")[:BEST]].sum())
    yield "slow starters kept", float(survived[(trials["lr_schedule"] == "one_cycle").to_numpy()].sum())
