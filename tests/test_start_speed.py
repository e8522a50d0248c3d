"""The benchmark of private touches: its table, and one pair of real grids."""

import pytest

from benchmarks import start_speed
from grid.tune.private_ray import TOUCHES


def test_by_default_every_touch_is_measured_and_all_at_once() -> None:
    assert start_speed.switches(None) == {"all": "1", **{touch: touch for touch in TOUCHES}}
    assert start_speed.switches("poll,preload") == {"poll": "poll", "preload": "preload"}


def test_an_unknown_touch_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert start_speed.main(["--without", "pole"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.start_speed: unknown touch 'pole'; choose from ")


def test_a_saving_is_the_median_of_the_differences_within_pairs() -> None:
    table = start_speed.report({"poll": [(3.0, 2.5), (13.0, 12.0), (4.0, 3.75)]})
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["none", "3.75", "2.50", "to", "12.00"],
        ["poll", "4.00", "3.00", "to", "13.00", "0.50", "0.25", "to", "1.00"],
    ]


@pytest.mark.slow
def test_a_grid_is_timed_without_a_touch_and_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert start_speed.main(["--without", "poll", "--repeats", "1"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["without", "none", "poll"]
    assert " s without poll, " in captured.err
