import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from analysis.effects import _difference_lines, describe_earned, format_final_effects
from analysis.estimates.earned import Earned
from analysis.estimates.final_effects import FinalEffects, measure_final_effects
from grid.config import FACTORS
from grid.parts import LEVELS
from tests.stopped_grids import Grid, make_grid

GAINS = {"cnn": 0.05, "adam": 0.03, "on": 0.02}
"""Of the levels of model, optimizer and batch norm, each alone; sgd, the first optimizer, earns nothing."""
OVERLAP = -0.01
"""What any two of them have beyond their sum."""
CROSSED = {"model": ("mlp", "cnn"), "optimizer": ("sgd", "adam"), "batch_norm": ("off", "on"), "dropout": ("off", "on")}


def planted(noise: float, seeds: int = 4, random_state: int = 0) -> Grid:
    """Return a grid of two levels per factor whose techniques overlap; dropout does nothing."""
    levels = [CROSSED.get(factor, LEVELS[factor][:1]) for factor in FACTORS]
    cells = pd.DataFrame(product(*levels, range(seeds)), columns=[*FACTORS, "seed"])
    used = np.column_stack([cells[factor].eq(CROSSED[factor][1]) for factor in ("model", "optimizer", "batch_norm")])
    number = used.sum(axis=1)
    final = 0.7 + used @ list(GAINS.values()) + OVERLAP * number * (number - 1) / 2
    final = final + np.random.default_rng(random_state).normal(0, noise, len(cells))
    rungs = np.column_stack([final - 0.2, final - 0.1])
    return Grid(cells, rungs, final, np.full(len(cells), np.nan))


def earned(effects: FinalEffects) -> Earned:
    assert effects.earned is not None
    return effects.earned


def test_techniques_that_overlap_earn_less_together_than_alone() -> None:
    found = earned(measure_final_effects(planted(noise=1e-6).never_stopped()))
    assert list(zip(found.table["factor"], found.table["level"], found.table["plain"], strict=True)) == [
        ("model", "cnn", "mlp"),
        ("optimizer", "adam", "sgd"),
        ("batch_norm", "on", "off"),
    ]
    assert found.table["alone"].to_list() == pytest.approx([0.05, 0.03, 0.02], abs=1e-5)
    assert found.table["average"].to_list() == pytest.approx([0.04, 0.02, 0.01], abs=1e-5)
    assert found.table["last"].to_list() == pytest.approx([0.03, 0.01, 0.00], abs=1e-5)
    assert found.summed.value == pytest.approx(0.10, abs=1e-5)
    assert found.together.value == pytest.approx(0.07, abs=1e-5)
    assert found.beyond.value == pytest.approx(-0.03, abs=1e-5)
    assert found.beyond.high < 0


def test_intervals_cover_what_was_planted() -> None:
    truth = {"summed": 0.10, "together": 0.07, "beyond": -0.03}
    grids, missed = 0, dict.fromkeys((*truth, "alone", "average", "last"), 0)
    for random_state in range(220):
        found = earned(measure_final_effects(planted(0.004, seeds=2, random_state=random_state).never_stopped()))
        if len(found.table) > 3:
            continue  # by chance dropout, too, seems to earn something
        grids += 1
        for name, value in truth.items():
            estimate = getattr(found, name)
            missed[name] += not estimate.low <= value <= estimate.high
        for name, value in (("alone", 0.05), ("average", 0.04), ("last", 0.03)):
            row = found.table.iloc[0]
            missed[name] += not row[f"{name}_low"] <= value <= row[f"{name}_high"]
    assert grids >= 200
    assert all(2 <= number <= 20 for number in missed.values()), missed  # some 10 are expected


def test_in_a_grid_of_many_levels_the_figures_are_those_of_the_means() -> None:
    grid = make_grid(seeds=2, noise=0.0)
    found = earned(measure_final_effects(grid.never_stopped()))
    rows = grid.cells.assign(end=grid.final)
    by_schedule = rows.groupby("lr_schedule")["end"].mean()
    row = found.table.set_index("factor").loc["lr_schedule"]
    assert (row["level"], row["plain"]) == ("one_cycle", "constant")
    assert row["average"] == pytest.approx(by_schedule["one_cycle"] - by_schedule["constant"])
    assert found.beyond.value == pytest.approx(0, abs=1e-9)  # the levels of these grids add up


def test_where_fewer_than_two_factors_surely_earn_something_all_of_two_levels_are_measured() -> None:
    only = planted(noise=1e-3).never_stopped().query("model == 'mlp' and optimizer == 'sgd'")
    effects = measure_final_effects(only)
    found = earned(effects)
    assert not found.surely_better
    assert found.table["factor"].to_list() == ["batch_norm", "dropout"]
    assert found.table["alone"].to_list() == pytest.approx([0.02, 0.0], abs=2e-3)
    assert found.together.value == pytest.approx(0.02, abs=2e-3)
    assert found.together.value == pytest.approx(found.summed.value + found.beyond.value)
    assert "what all techniques earn, in points" in format_final_effects(effects)
    document = describe_earned(effects)
    assert document is not None
    assert document["surely_better"] is False


def test_nothing_is_said_of_one_technique() -> None:
    only = planted(noise=1e-3).never_stopped().query("model == 'mlp' and optimizer == 'sgd' and dropout == 'off'")
    effects = measure_final_effects(only)
    assert effects.earned is None
    assert "earn" not in format_final_effects(effects)
    assert describe_earned(effects) is None


def test_long_names_of_factors_have_room() -> None:
    rows = [
        {"factor": factor, "level": "ema", "other_level": "off", "difference": 0.0013, "low": -0.0023, "high": 0.005}
        for factor in ("weight_averaging", "mixup")
    ]
    effects = measure_final_effects(planted(noise=1e-3).never_stopped())
    heading, *lines = _difference_lines(replace(effects, differences=pd.DataFrame(rows).assign(sure=False)))
    assert {line.index("ema over off") for line in lines} == {heading.index("best over worst")}
    assert {line.index("at most") for line in lines} == {heading.index("verdict")}
    assert max(map(len, (heading, *lines))) <= 80


def test_the_text_has_a_line_per_technique_and_says_how_they_combine() -> None:
    effects = measure_final_effects(planted(noise=0.002).never_stopped())
    lines = format_final_effects(effects).split("\n")
    (row,) = (line for line in lines if line.startswith("optimizer=adam over sgd"))
    start = lines.index(row)
    assert "alone    on average    added last" in lines[start - 2]
    closing = " ".join(" ".join(lines[start + 2 : start + 4]).split())
    assert "they do in part the same work (beyond the sum: -" in closing
    assert max(map(len, lines)) <= 80
    document = describe_earned(effects)
    assert document is not None
    assert json.loads(json.dumps(document))["levels"][1]["level"] == "adam"
    assert document["beyond"]["value"] < 0
