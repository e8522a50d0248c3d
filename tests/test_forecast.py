import math

import numpy as np
import pytest
from scipy import stats

from analysis.estimates.final_effects import measure_final_effects, measure_spread
from benchmarks.replay.curves import PATH
from benchmarks.replay.draws import Table, draw_controls, replay
from benchmarks.replay.examine import prepare
from grid.config import TrialConfig
from grid.data.dataset import DataShape
from grid.parts.registry import GRIDS
from grid.plan.asha import DEFAULT_RULE, NO_STOPPING, StoppingRule
from grid.plan.forecast import EndSpread, calibrate, expected_epochs, expected_widths, forecast
from grid.plan.space import cross, expand


def trials(epochs: int = 9, name: str = "full") -> list[TrialConfig]:
    cells, _ = cross(GRIDS[name].levels)
    fixed = {"learning_rate": "0.01", "epochs": str(epochs)}
    return expand(
        cells,
        seeds=1,
        lr_scales=(1.0,),
        order_seed=0,
        configure=lambda cell, seed, scale: TrialConfig.from_params({**cell, **fixed, "seed": str(seed)}),
    )


def test_without_rungs_every_trial_runs_its_full_budget() -> None:
    assert expected_epochs(trials(epochs=1), ()) == {"mlp": pytest.approx(960), "cnn": pytest.approx(960)}


def test_asha_runs_a_third_past_each_rung() -> None:
    ideal = 960 * (1 + 2 / 3 + 6 / 9)  # all run one epoch, a third two more, a ninth six more
    for epochs in expected_epochs(trials(), ()).values():
        assert ideal <= epochs <= 1.06 * ideal  # the first arrivals are compared with few others


def test_without_stopping_every_trial_runs_its_full_budget() -> None:
    quarter = trials()[::4]
    assert sum(expected_epochs(quarter, (), NO_STOPPING).values()) == pytest.approx(9 * len(quarter))


@pytest.mark.parametrize(
    ("rule", "per_trial", "excess"),
    [
        (StoppingRule(factor=2), 1 + 2 / 2 + 6 / 4, 0.1),
        (StoppingRule(grace=3), 3 + 6 / 3, 0.1),
        (StoppingRule(within=("model", "lr_schedule")), 1 + 2 / 3 + 6 / 9, 0.25),
        (StoppingRule(within=()), 1 + 2 / 3 + 6 / 9, 0.1),
    ],
    ids=["one in two", "from epoch 3", "by schedule", "all together"],
)
def test_another_rule_costs_what_it_lets_continue(rule: StoppingRule, per_trial: float, excess: float) -> None:
    quarter = trials()[::4]
    epochs = sum(expected_epochs(quarter, (), rule).values()) / len(quarter)
    assert per_trial <= epochs <= (1 + excess) * per_trial  # the first of a group are compared with few others


def test_a_rule_changes_the_forecast() -> None:
    speed = {"seconds_per_image": {"mlp": 1e-4, "cnn": 1e-3}, "spread": 0.1, "train_images": 1000, "slots": 2}
    stopped, whole = (forecast(trials()[::4], (), rule, **speed) for rule in (DEFAULT_RULE, NO_STOPPING))
    assert whole.epochs == pytest.approx(whole.full_epochs) == stopped.full_epochs
    assert stopped.seconds < 0.3 * whole.seconds


def test_unstopped_controls_run_their_full_budget() -> None:
    smoke = trials(name="smoke")
    assert sum(expected_epochs(smoke, {trial.trial_key for trial in smoke}).values()) == pytest.approx(9 * len(smoke))


def test_the_cost_is_epochs_times_images_times_seconds_over_the_slots() -> None:
    smoke = trials(epochs=1, name="smoke")
    speed = {"seconds_per_image": {"mlp": 1e-4, "cnn": 1e-3}, "spread": 0.1, "train_images": 1000, "slots": 2}
    cost = forecast(smoke, (), DEFAULT_RULE, **speed)
    assert (cost.epochs, cost.full_epochs) == (pytest.approx(32), 32)
    assert cost.seconds == pytest.approx(16 * 1000 * (1e-4 + 1e-3) / 2)


def test_calibration_times_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.plan.forecast.CALIBRATION_IMAGES", 256)
    seconds, spread = calibrate(trials(name="smoke"), DataShape((1, 28, 28), 47, 94_000))
    assert set(seconds) == {"mlp", "cnn"}
    assert 0 < seconds["mlp"] < seconds["cnn"] < 1
    assert spread >= 0


def test_with_every_trial_a_control_the_width_is_that_of_a_grid_that_is_never_stopped() -> None:
    plan = trials(epochs=9, name="smoke")
    *_, last = expected_widths(plan, len(plan), DEFAULT_RULE, levels=2, spread=EndSpread(0.02, 0.5, ""))
    student = stats.t.ppf(0.975, len(plan) - 1)
    assert last.half_width == pytest.approx(student * 0.02 * math.sqrt(2 * 2 / len(plan)), rel=1e-4)
    assert last.epochs == pytest.approx(9 * len(plan))


def test_more_controls_narrow_the_effects_and_cost_epochs() -> None:
    widths = expected_widths(trials(epochs=3, name="mlp"), 60, DEFAULT_RULE, levels=5)
    assert [width.controls for width in widths] == [60, 120, 240]
    assert widths[0].half_width > widths[1].half_width > widths[2].half_width
    assert widths[0].epochs < widths[1].epochs < widths[2].epochs


def test_ends_that_vary_twice_as_much_are_compared_half_as_well() -> None:
    plan, once, twice = trials(name="smoke"), EndSpread(0.01, 0.02, ""), EndSpread(0.02, 0.04, "")
    first, second = (expected_widths(plan, 10, DEFAULT_RULE, 2, spread)[0] for spread in (once, twice))
    assert second.half_width == pytest.approx(2 * first.half_width)


@pytest.mark.parametrize("factor", ["lr_schedule", "optimizer", "dropout"])
def test_the_forecast_from_a_real_grid_is_about_the_width_that_its_effects_have(factor: str) -> None:
    table, rng = prepare(PATH)[0], np.random.default_rng(0)
    mlp = Table(table.cells[table.cells["model"] == "mlp"].reset_index(drop=True), table.accuracies[:960])
    grid = replay(mlp, DEFAULT_RULE, *draw_controls(mlp.cells, 60, rng), rng)
    differences = measure_final_effects(grid).differences.query("factor == @factor")
    levels = len(set(differences["level"]) | set(differences["other_level"]))
    (width, *_) = expected_widths(trials(name="mlp"), 60, DEFAULT_RULE, levels, EndSpread(*measure_spread(grid), ""))
    assert width.half_width == pytest.approx((differences["high"] - differences["difference"]).mean(), rel=0.15)
