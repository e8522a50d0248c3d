import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.plan.asha import Asha, StoppingRule, rung_epochs

values = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def arrive(asha: Asha, accuracies: list[float], epoch: int = 1, group: str = "mlp") -> list[bool]:
    return [
        asha.decide(f"{group} {index}", group=group, epoch=epoch, value=value) for index, value in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, ()), (2, (1,)), (3, (1,)), (9, (1, 3)), (27, (1, 3, 9)), (28, (1, 3, 9, 27))]
)
def test_rungs_rise_by_the_factor_and_end_below_the_budget(epochs: int, rungs: tuple[int, ...]) -> None:
    assert rung_epochs(epochs) == rungs


def test_the_first_arrival_continues() -> None:
    assert arrive(Asha((1,)), [0.1]) == [True]


def test_of_falling_values_the_first_continues_and_of_rising_values_all() -> None:
    assert sum(arrive(Asha((1,)), [1 - index / 100 for index in range(81)])) == 1
    assert all(arrive(Asha((1,)), [index / 100 for index in range(81)]))


def test_a_random_order_keeps_about_a_third() -> None:
    rng = random.Random(0)
    kept = [sum(arrive(Asha((1,)), rng.sample(range(81), 81))) for _ in range(300)]
    assert 27 <= sum(kept) / len(kept) <= 31


@given(values)
def test_a_trial_continues_if_it_is_among_the_best_third_on_arrival(accuracies: list[float]) -> None:
    for count, (value, continues) in enumerate(zip(accuracies, arrive(Asha((1,)), accuracies), strict=True), start=1):
        better = sum(earlier > value for earlier in accuracies[:count])
        assert continues == (better < math.ceil(count / 3))


@given(values)
def test_replaying_the_arrivals_rebuilds_rungs_and_decisions(accuracies: list[float]) -> None:
    first, again = Asha((1, 3)), Asha((1, 3))
    assert arrive(first, accuracies) == arrive(again, accuracies)
    assert first.arrivals("mlp", 1) == again.arrivals("mlp", 1)


@given(values, st.data())
def test_a_resumed_driver_decides_like_an_uninterrupted_one(accuracies: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(accuracies)))
    uninterrupted, resumed = Asha((1,)), Asha((1,))
    decisions = arrive(uninterrupted, accuracies)
    for index, (value, continued) in enumerate(zip(accuracies[:cut], decisions[:cut], strict=True)):
        resumed.restore(f"mlp {index}", group="mlp", epoch=1, value=value, stop_epoch=None if continued else 1)
    assert arrive(resumed, accuracies) == decisions  # the first trials arrive again, as resumed trials do
    assert resumed == uninterrupted


def test_between_rungs_every_trial_continues_and_nothing_is_recorded() -> None:
    asha = Asha((1, 3))
    assert arrive(asha, [0.9, 0.1], epoch=2) == [True, True]
    assert (asha.arrivals("mlp", 1), asha.arrivals("mlp", 3)) == ((), ())


def test_a_second_arrival_of_a_trial_gets_the_same_answer_and_is_not_counted() -> None:
    asha = Asha((1,))
    assert asha.decide("a", group="mlp", epoch=1, value=0.5)
    arrive(asha, [0.9, 0.8])
    assert asha.decide("a", group="mlp", epoch=1, value=0.5)
    assert asha.arrivals("mlp", 1) == (0.5, 0.8, 0.9)


def test_models_are_not_compared_with_each_other() -> None:
    asha = Asha((1,))
    arrive(asha, [0.9] * 9, group="cnn")
    assert arrive(asha, [0.1], group="mlp") == [True]


def test_unstopped_controls_continue_and_count_for_the_others() -> None:
    asha = Asha((1,))
    arrive(asha, [0.9])
    assert asha.decide("control", group="mlp", epoch=1, value=0.1, control=True)
    assert asha.arrivals("mlp", 1) == (0.1, 0.9)


def test_a_control_that_would_have_been_stopped_counts_for_nobody_at_later_rungs() -> None:
    asha = Asha((1, 3))
    arrive(asha, [0.9])
    assert asha.decide("control", group="mlp", epoch=1, value=0.1, control=True)
    assert asha.stop_epoch("control") == 1
    assert asha.decide("control", group="mlp", epoch=3, value=0.99, control=True)
    assert asha.arrivals("mlp", 3) == ()
    assert asha.stop_epoch("control") == 1


def test_the_verdict_on_a_control_is_that_on_any_other_trial() -> None:
    rng = random.Random(1)
    values = [rng.random() for _ in range(200)]
    plain, controlled = Asha((1,)), Asha((1,))
    stopped = [not passes for passes in arrive(plain, values)]
    for index, value in enumerate(values):
        controlled.decide(f"mlp {index}", group="mlp", epoch=1, value=value, control=index % 3 == 0)
    assert [controlled.stop_epoch(f"mlp {index}") == 1 for index in range(200)] == stopped


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_about_one_in_factor_continues(factor: int) -> None:
    rng = random.Random(0)
    rule = StoppingRule(factor=factor)
    kept = [sum(arrive(Asha((1,), rule), rng.sample(range(80), 80))) for _ in range(200)]
    assert 80 / factor <= sum(kept) / len(kept) <= 80 / factor + 4


def test_a_rule_says_its_rungs_and_groups() -> None:
    rule = StoppingRule(grace=2, within=("model", "lr_schedule"))
    assert rule.rungs(27) == (2, 6, 18)
    assert rule.group_of({"model": "cnn", "lr_schedule": "step", "dropout": "on"}) == "cnn step"
    assert StoppingRule(within=()).group_of({"model": "cnn"}) == ""


def test_a_diverged_trial_counts_as_the_worst_at_the_rung_it_does_not_reach() -> None:
    asha = Asha((1, 3))
    asha.diverge("a", group="mlp", epoch=2)
    assert asha.arrivals("mlp", 3) == (-math.inf,)
    assert asha.arrivals("mlp", 1) == ()


def test_a_trial_that_diverges_after_the_last_rung_is_not_counted() -> None:
    asha = Asha((1, 3))
    asha.diverge("a", group="mlp", epoch=4)
    assert asha.arrivals("mlp", 3) == ()


def test_a_trial_with_nan_never_continues() -> None:
    assert arrive(Asha((1,)), [math.nan, 0.0]) == [False, True]
