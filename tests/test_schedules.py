import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from grid.config import STEP_PARTS, TrialConfig
from grid.parts.registry import LR_SCHEDULES
from grid.train.techniques.schedules import Schedule

EPOCHS, STEPS, PEAK = 9, 11, 0.5  # 99 steps: one_cycle's peak falls on step 29
BY_STEP = sorted(set(LR_SCHEDULES) - {"plateau"})


def scheduled(
    name: str, epochs: int = EPOCHS, steps: int = STEPS, peak: float = PEAK, **settings: float
) -> tuple[Schedule, SGD]:
    """Return a schedule of `epochs` of `steps` steps each, and its optimizer."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    config = TrialConfig(lr_schedule=name, epochs=epochs, learning_rate=peak, **settings)
    return Schedule(config, optimizer, epochs * steps), optimizer


def run_epoch(schedule: Schedule, optimizer: SGD, steps: int, val_loss: float) -> list[float]:
    """Return the learning rate of each step of one epoch."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.learning_rate)
        optimizer.step()
        schedule.after_step()
    schedule.after_epoch(val_loss)
    return rates


def all_rates(
    name: str, epochs: int = EPOCHS, steps: int = STEPS, peak: float = PEAK, val_loss: float = 1.0, **settings: float
) -> list[float]:
    schedule, optimizer = scheduled(name, epochs, steps, peak, **settings)
    return [rate for _ in range(epochs) for rate in run_epoch(schedule, optimizer, steps, val_loss)]


def one_cycle_rate(step: int) -> float:
    """Return the closed form: from 1/25 of the peak up to it and down to 1/250000 of it, along half cosines."""
    if step <= 29:
        low, share = PEAK / 25, 1 - step / 29
    else:
        low, share = PEAK / 250_000, (step - 29) / (99 - 29)
    return low + (PEAK - low) * (1 + math.cos(math.pi * share)) / 2


CLOSED_FORMS = {
    "constant": lambda step: 0.5,
    "step": lambda step: 0.5 * 0.1 ** (step // 33),
    "cosine": lambda step: 0.25 * (1 + math.cos(math.pi * step / 99)),
    "exponential": lambda step: 0.5 * 0.01 ** (step / 99),
    "one_cycle": one_cycle_rate,
    "plateau": lambda step: 0.5 * 0.3 ** (max(0, step // 11 - 1) // 2),  # patience 1: two epochs without a better loss
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_rates_of_the_whole_budget_follow_the_closed_form(name):
    expected = [CLOSED_FORMS[name](step) for step in range(EPOCHS * STEPS)]
    assert all_rates(name) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("steps", [11, 10, 7])
@pytest.mark.parametrize("epochs", [3, 8, 9, 27])
def test_step_is_constant_for_the_share_of_the_budget_that_the_analysis_assumes(epochs, steps):
    rates, alike = all_rates("step", epochs, steps), epochs // STEP_PARTS * steps
    assert rates[:alike] == all_rates("constant", epochs, steps)[:alike]
    assert rates[alike + steps] < 0.1


@pytest.mark.parametrize(
    ("name", "share"), [("constant", 1), ("step", 1e-2), ("cosine", 0), ("exponential", 1e-2), ("one_cycle", 4e-6)]
)
def test_the_budget_ends_with_the_final_share_of_the_peak_rate(name, share):
    """For `step`, the rate of the last step; for the others, the rate after it, where the curve ends."""
    schedule, optimizer = scheduled(name)
    rates = run_epoch(schedule, optimizer, EPOCHS * STEPS, val_loss=1.0)
    final = rates[-1] if name == "step" else schedule.learning_rate
    assert final == pytest.approx(share * PEAK, abs=1e-12)


def test_one_cycle_peaks_after_three_tenths_of_the_budget():
    rates = all_rates("one_cycle")
    assert max(rates) == rates[29] == PEAK
    assert sum(rates) / len(rates) == pytest.approx((0.3 * 1.04 / 2 + 0.7 / 2) * PEAK, rel=0.01)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(LR_SCHEDULES)),
    epochs=st.integers(1, 12),
    steps=st.integers(1, 12),
    peak=st.floats(1e-6, 10),
    losses=st.lists(st.floats(0, 9), min_size=12, max_size=12),
)
def test_no_rate_exceeds_the_peak_or_falls_below_zero(name, epochs, steps, peak, losses):
    schedule, optimizer = scheduled(name, epochs, steps, peak)
    for val_loss in losses[:epochs]:
        rates = run_epoch(schedule, optimizer, steps, val_loss)
        assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)


@given(epochs=st.integers(1, 30), steps=st.integers(1, 30))
def test_step_never_cuts_more_than_twice_however_the_budget_divides(epochs, steps):
    rates = {f"{rate:.3e}" for rate in all_rates("step", epochs, steps, 1.0)}
    assert rates <= {"1.000e+00", "1.000e-01", "1.000e-02"}


@pytest.mark.parametrize("name", BY_STEP)
def test_the_validation_loss_changes_plateau_only(name):
    assert all_rates(name, val_loss=math.inf) == all_rates(name, val_loss=1.0)


def test_plateau_keeps_its_rate_while_the_validation_loss_falls():
    schedule, optimizer = scheduled("plateau")
    rates = [rate for epoch in range(9) for rate in run_epoch(schedule, optimizer, 11, val_loss=1 / (1 + epoch))]
    assert set(rates) == {PEAK}


def test_plateau_is_constant_within_an_epoch():
    schedule, optimizer = scheduled("plateau")
    assert set(run_epoch(schedule, optimizer, 1000, val_loss=1.0)) == {PEAK}


@pytest.mark.parametrize("epochs", [10, 40])
def test_the_patience_of_plateau_is_a_tenth_of_the_budget(epochs):
    rates = all_rates("plateau", epochs, 1, 1.0)
    assert rates.index(pytest.approx(0.3)) == 2 + epochs // 10


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_one_cycle_does_not_change_momentum(name):
    kinds = {"adam": torch.optim.Adam, "sgd": lambda weights, lr: SGD(weights, lr=lr, momentum=0.9)}
    optimizer = kinds[name]([nn.Parameter(torch.zeros(1))], lr=1.0)
    before = dict(optimizer.param_groups[0])
    config = TrialConfig(lr_schedule="one_cycle", epochs=EPOCHS, learning_rate=PEAK)
    run_epoch(Schedule(config, optimizer, EPOCHS * STEPS), optimizer, 50, val_loss=1.0)
    after = optimizer.param_groups[0]
    assert (after.get("momentum"), after.get("betas")) == (before.get("momentum"), before.get("betas"))


@pytest.mark.parametrize("taken", [1, 4, 8])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_state_dict_resumes_identically(name, taken):
    first, optimizer = scheduled(name)
    for _ in range(taken):
        run_epoch(first, optimizer, 11, val_loss=1.0)
    second, other = scheduled(name)
    other.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    rest = [rate for _ in range(9 - taken) for rate in run_epoch(second, other, 11, val_loss=1.0)]
    assert rest == all_rates(name)[11 * taken :]


def test_settings_of_a_schedule_are_used():
    assert all_rates("exponential", final_share=0.5)[-1] == pytest.approx(0.5 * 0.5 ** (98 / 99))
    assert all_rates("step", final_share=0.25)[-1] == pytest.approx(PEAK / 4)
    assert all_rates("one_cycle", warmup_share=0.5).index(pytest.approx(PEAK, rel=1e-3)) == pytest.approx(49, abs=1)
    plateau = all_rates("plateau", epochs=10, steps=1, peak=1.0, plateau_factor=0.5, plateau_patience=0.4)
    assert plateau.index(pytest.approx(0.5)) == 2 + 4


@given(epochs=st.integers(1, 100_000))
def test_a_tenth_of_the_budget_is_a_tenth_of_its_epochs_rounded_down(epochs):
    assert int(epochs * TrialConfig(epochs=1, learning_rate=1).plateau_patience) == epochs // 10
