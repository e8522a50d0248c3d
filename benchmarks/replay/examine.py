"""One replay: draws an order and controls, stops the trials, and compares every answer with the truth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import lcm
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.replay.curves import EPOCHS, STEPS, load_curves
from benchmarks.replay.draws import Table, draw_at_random, draw_controls, replay
from benchmarks.replay.estimators import ESTIMATORS, compare, truth
from benchmarks.replay.importance import METHODS, TRUTH, compare_importances, installed_methods, of_effects
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
    times: int = 1
    """Multiplies the number of controls."""
    designed: bool = True
    """Whether controls are drawn by a D-optimal design, as by a grid, or at random."""
    more: bool = False
    """Whether as many are drawn once more in the end, among the stopped trials."""
    importances: bool = False
    """Whether methods are asked how important each factor is."""


RULE = DEFAULT_RULE.for_steps(EPOCHS, STEPS)
"""What `grid.run` does by default."""
RULES: Mapping[str, StoppingRule] = {
    "model; rungs 2, 6; best 1/3": RULE,
    "model; rungs 2, 6; best 1/4": replace(RULE, factor=4),
    "model; rungs 1, 3; best 1/3": StoppingRule(grace=1),
    "model; rungs 1, 3; best 1/2": StoppingRule(grace=1, factor=2),
    "model; rung 3; best 1/3": StoppingRule(grace=3),
    "model; rung 3; best 1/9": StoppingRule(grace=3, factor=9),
    "model x schedule; rungs 2, 6; best 1/3": replace(RULE, within=("model", "lr_schedule")),
    "model x schedule; rungs 1, 3; best 1/3": StoppingRule(grace=1, within=("model", "lr_schedule")),
}
FEWER, MORE = 0.03, 0.2
DRAWS = (
    Setting("D-optimal", RULE, DEFAULT_CONTROLS),
    Setting("at random", RULE, DEFAULT_CONTROLS, designed=False),
    Setting("D-optimal, then as many more", RULE, DEFAULT_CONTROLS, more=True),
    Setting("D-optimal, twice as many", RULE, DEFAULT_CONTROLS, times=2),
)
SHARED = [Setting(f"{share:.0%}", RULE, share, tuple(ESTIMATORS)) for share in (FEWER, DEFAULT_CONTROLS, MORE)]
IMPORTANCE = "importance"
SETTINGS: Mapping[str, list[Setting]] = {
    "default": SHARED[1:2],
    "shares": SHARED,
    "rules": [Setting(label, rule, DEFAULT_CONTROLS) for label, rule in RULES.items()],
    "draws": list(DRAWS),
    IMPORTANCE: [Setting(IMPORTANCE, RULE, DEFAULT_CONTROLS, (), importances=True)],
}
"""Table -> what is replayed for it."""


@cache
def prepare(curves: Path) -> list[Table]:
    """Return the grids that the curves make up: with each seed of each model equally often, a seed per cell."""
    table = load_curves(curves)
    return [Table.of(table, number) for number in range(lcm(*table.groupby("model")["seed"].nunique()))]


@cache
def _unstopped(curves: Path, place: int) -> pd.DataFrame:
    table = prepare(curves)[place]
    nobody = np.zeros(len(table.cells), dtype=np.bool_)
    return replay(table, NO_STOPPING, nobody, 0.0, np.random.default_rng(0))


@cache
def _truth(curves: Path, place: int) -> pd.DataFrame:
    return truth(_unstopped(curves, place))


@cache
def _own_importances(curves: Path, place: int, method: str) -> "pd.Series[float]":
    return METHODS[method](_unstopped(curves, place))


def examine(task: tuple[Setting, int], curves: Path, seed: int) -> pd.DataFrame:
    """Replay a setting once; draws take the grids of `prepare` in turn.

    Returns:
        `setting`, `draw`, `seed`, `estimator`, and: for each effect its names, `error`, `half`, `covered`; for the
        whole replay (`estimator` empty) `question` and `value`, for importances `method` and `factor` as well.
    """
    setting, draw = task
    tables = prepare(curves)
    place = draw % len(tables)
    rng = np.random.default_rng([seed, draw])
    table = tables[place]
    number = setting.times * number_of_controls(len(table.cells), setting.share)
    controls, chance = (draw_controls if setting.designed else draw_at_random)(table.cells, number, rng)
    trials = replay(table, setting.rule, controls, chance, rng, number if setting.more else 0)
    parts = [
        compare(ESTIMATORS[name](trials), _truth(curves, place)).assign(estimator=name) for name in setting.estimators
    ]
    parts.append(pd.DataFrame(questions(table, trials), columns=["question", "value"]).assign(estimator=""))
    if setting.importances:
        parts.append(_ask_for_importances(trials, curves, place))
    return pd.concat(parts, ignore_index=True).assign(setting=setting.label, draw=draw, seed=place)


def _ask_for_importances(trials: pd.DataFrame, curves: Path, place: int) -> pd.DataFrame:
    true = of_effects(_truth(curves, place))
    rows = [("importance", TRUTH, factor, value) for factor, value in true.items()]
    for method in installed_methods():
        found, own = METHODS[method](trials), _own_importances(curves, place, method)
        rows += [("importance", method, factor, value) for factor, value in found.items()]
        rows += [(question, method, "", value) for question, value in compare_importances(found, true, own)]
    return pd.DataFrame(rows, columns=["question", "method", "factor", "value"]).assign(estimator="")


def questions(table: Table, trials: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """Yield what a replay says about winners and costs: regret, epochs, survivors."""
    ends = np.nan_to_num(table.accuracies[:, -1], nan=-np.inf)
    survived = ((trials["status"] == "completed") & trials["stop_epoch"].isna()).to_numpy()
    yield "epochs", trials["epochs_run"].sum() / (EPOCHS * len(trials))
    yield "regret", float(ends.max() - ends[survived].max())
    yield "best kept", float(survived[np.argsort(-ends, kind="stable")[:BEST]].sum())
    yield "slow starters kept", float(survived[(trials["lr_schedule"] == "one_cycle").to_numpy()].sum())
