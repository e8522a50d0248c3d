"""A grid that has not ended, because it still runs or its budget is spent: no level may look bad for its survivors."""

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.estimates.final_effects import measure_final_effects
from analysis.estimates.rung_effects import measure_rung_effects
from analysis.store import read_experiment
from analysis.summaries import explain_order, sample_of_order
from analysis.trial_table import not_started
from benchmarks.planted.grids import Grid, Plan, plant
from grid.config import InputError, TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

GRIDS = 30
PLAN = Plan(seeds=2, controls=120)


def interrupted(trials: pd.DataFrame, slots: int, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """Return the trials that have ended once a share of all has started, in random order, `slots` at once."""
    starts, ends = np.empty(len(trials)), np.empty(len(trials))
    free = [0.0] * slots
    for trial in rng.permutation(len(trials)):
        starts[trial] = heapq.heappop(free) + 1e-6 * rng.random()
        ends[trial] = starts[trial] + trials["epochs_run"].iloc[trial]
        heapq.heappush(free, ends[trial])
    now = np.quantile(starts, share)
    unfinished = (starts < now) & (ends > now)
    before = starts < min(starts[unfinished], default=np.inf)
    return trials.assign(before_unfinished=before)[ends <= now]


def slope_and_coverage(grids: list[tuple[Grid, Any]], point: int) -> tuple[float, float]:
    """Return by what factor effects are found too large or too small, and how many intervals cover the truth."""
    found = np.array(
        [
            (grid.truth[row.factor, row.level][point], row.effect, row.low, row.high)
            for grid, effects in grids
            for row in effects.levels.itertuples()
        ]
    )
    truth, effect, low, high = found.T
    return float(truth @ effect / (truth @ truth)), float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize(("measure", "point"), [(measure_rung_effects, 0), (measure_final_effects, -1)])
def test_effects_of_an_unfinished_grid_are_without_bias(measure: Callable[..., Any], point: int) -> None:
    rng = np.random.default_rng(0)
    drawn = [plant(PLAN, rng) for _ in range(GRIDS)]
    slope, coverage = slope_and_coverage(
        [(grid, measure(interrupted(grid.trials, 60, 0.5, rng))) for grid in drawn], point
    )
    assert slope == pytest.approx(1, abs=0.03)
    assert coverage > 0.92


def test_without_the_rule_levels_with_survivors_look_bad() -> None:
    rng = np.random.default_rng(0)
    drawn = [plant(PLAN, rng) for _ in range(GRIDS)]
    tables = [interrupted(grid.trials, 150, 0.6, rng).drop(columns="before_unfinished") for grid in drawn]
    slope, coverage = slope_and_coverage([(g, measure_rung_effects(t)) for g, t in zip(drawn, tables, strict=True)], 0)
    assert slope < 0.95
    assert coverage < 0.9


def test_what_is_left_out_is_said_and_nothing_at_all_is_refused() -> None:
    trials = pd.DataFrame({"before_unfinished": [True, False, False]})
    assert len(sample_of_order(trials)) == 1
    said = "2 trials left out that started after one that has not ended: of those, long ones are still missing"
    assert list(explain_order(trials)) == [said]
    with pytest.raises(InputError, match="^all trials that have ended started after one that still runs; wait for"):
        sample_of_order(trials[1:])
    assert list(explain_order(trials[:1])) == []


def test_the_store_says_which_trials_started_before_one_that_has_not_ended(store: Store, tmp_path: Path) -> None:
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({"grid.json": b'{"trials": 9}'}, {})
    for seed, ends in enumerate((True, False, True)):
        config = TrialConfig(learning_rate=0.1, epochs=1, seed=seed)
        recorder.started(config, control=False)
        recorder.epoch_ended(config, EpochReport(epoch=1, val_accuracy=0.5), is_rung=False)
        if ends:
            recorder.ended(config, "completed", epochs_run=1, best_val_accuracy=0.5)
    recorder.close(finished=False)
    experiment = read_experiment(store.uri, store.experiment)
    assert dict(zip(experiment.trials["seed"], experiment.trials["before_unfinished"], strict=True)) == {
        0: True,
        2: False,
    }
    assert "6 of 9 trials not started yet: their order is random, so those that have started are a random sample" in (
        experiment.notes
    )


@pytest.mark.parametrize(
    ("manifest", "notes"),
    [
        ({}, []),
        ({"trials": "x"}, []),
        ({"trials": 5}, []),
        (
            {"trials": 6, "first": [{"dropout": ["on"], "model": ["mlp", "cnn"]}, 3]},
            [
                "1 of 6 trials not started yet, as cells with dropout=on, model=mlp/cnn come first; until all have "
                "ended, effects rest on three or more factors not acting together"
            ],
        ),
    ],
)
def test_what_has_not_started_is_said_with_what_follows_from_the_order(
    manifest: dict[str, Any], notes: list[str]
) -> None:
    assert not_started(manifest, 5) == notes
