"""Replays on real learning curves: is what the commands print true of them?"""

import numpy as np
import pandas as pd
import pytest

from analysis.estimates.final_effects import measure_final_effects
from benchmarks.replay.__main__ import main
from benchmarks.replay.curves import EPOCHS, PATH, load_curves
from benchmarks.replay.draws import Table, draw_controls, replay
from benchmarks.replay.estimators import ESTIMATORS, compare, root_mean_square, truth
from benchmarks.replay.examine import Setting, examine, prepare
from benchmarks.replay.summary import summarise
from grid.config import FACTORS
from grid.plan.asha import DEFAULT_RULE, NO_STOPPING, StoppingRule

DRAWS = 30


@pytest.fixture(scope="module")
def table() -> Table:
    return prepare(PATH)[0]


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    setting = Setting("3%", DEFAULT_RULE, 0.03, tuple(ESTIMATORS))
    return pd.concat([examine((setting, draw), PATH, 1) for draw in range(DRAWS)], ignore_index=True)


def run(table: Table, rule: StoppingRule = DEFAULT_RULE, controls: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return replay(table, rule, *draw_controls(table.cells, controls, rng), rng)


def test_the_table_is_whole_and_small() -> None:
    curves = load_curves()
    assert PATH.stat().st_size < 1_000_000
    assert curves.groupby("seed").size().nunique() == 1
    assert not curves.duplicated([*FACTORS, "seed"]).any()
    values = curves[[str(epoch) for epoch in range(1, EPOCHS + 1)]]
    assert ((values > 0.01) & (values < 1) | values.isna()).all(axis=None)


def test_seeds_of_a_cell_differ(table: Table) -> None:
    first, second = (part.accuracies[:, -1] for part in prepare(PATH)[:2])
    assert 0.002 < np.nanstd(first - second) / np.sqrt(2) < 0.03


def test_without_stopping_every_end_is_seen_and_effects_are_differences_of_means(table: Table) -> None:
    trials = run(table, NO_STOPPING, controls=0)
    assert (trials["epochs_run"] == EPOCHS).all()
    means = trials.groupby("optimizer")["final_val_accuracy"].mean()
    effects = measure_final_effects(trials).levels.query("factor == 'optimizer'").set_index("level")["effect"]
    pd.testing.assert_series_equal(effects.sort_index(), (means - means.mean()).sort_index(), check_names=False)


def test_stopping_saves_epochs_and_spares_the_controls(table: Table) -> None:
    trials = run(table)
    assert trials["epochs_run"].sum() < 0.4 * EPOCHS * len(trials)
    assert trials["control"].sum() == 60
    assert (trials.loc[trials["control"], "status"] != "stopped").all()
    assert trials.loc[trials["status"] == "stopped", "final_val_accuracy"].isna().all()


def test_the_effects_at_the_end_are_found_without_bias_and_with_honest_intervals(found: pd.DataFrame) -> None:
    ours = summarise(found).set_index("estimator").loc["ours"]
    assert abs(ours["bias"]) < 0.15
    assert ours["covered"] >= 0.93
    assert ours["worst"] >= 0.8
    assert ours["pairs"] >= 0.93


def test_ours_errs_less_than_completed_trials_or_controls_alone(found: pd.DataFrame) -> None:
    error = summarise(found).set_index("estimator")["error"]
    assert error["ours"] < 0.9 * error["controls only"]
    assert error["ours"] < 0.75 * error["completed only"]


def test_any_number_of_controls_yields_intervals_that_change_smoothly(table: Table) -> None:
    widths = []
    for controls in range(40, 121, 13):
        levels = measure_final_effects(run(table, controls=controls, seed=controls)).levels
        widths.append(float((levels["high"] - levels["low"]).mean()))
    assert max(widths) < 3 * min(widths)
    assert np.isfinite(widths).all()


@pytest.mark.parametrize("within", [("model",), ("model", "lr_schedule"), ()])
def test_every_rule_leaves_the_effects_unbiased(table: Table, within: tuple[str, ...]) -> None:
    true = truth(run(table, NO_STOPPING, controls=0))
    rule = StoppingRule(within=within, factor=2)
    errors = [compare(ESTIMATORS["ours"](run(table, rule, 100, seed)), true) for seed in range(5)]
    main_effects = pd.concat(errors).query("other_factor == ''")
    assert root_mean_square(main_effects["error"]) < 0.003


def test_the_command_prints_both_tables_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draws", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("3%       ours") for line in lines)
    assert any(line.startswith("model x schedule; rungs 1, 3; best 1/2") for line in lines)
