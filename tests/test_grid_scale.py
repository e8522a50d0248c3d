"""The benchmark of the cost per trial: its curves, its check of the store, its table."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.grid_scale import HEADER, Cost, CurveTrial, check_store, main, request_of
from grid.config import TrialConfig
from grid.data.load import load
from grid.metrics import EpochReport
from grid.plan.packing import pack
from grid.plan.trials import Plan, make_plan
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.train.trial import DeviceData


def plan_of(folder: Path) -> Plan:
    request = request_of("smoke", 1, folder)
    return make_plan(request, packing=pack(2, 0, 0), fingerprint="0" * 16, train_images=10**6)


@pytest.fixture(scope="module")
def data(glyphs_dir: Path) -> DeviceData:
    return DeviceData.from_dataset(load("glyphs", glyphs_dir, per_class=2))


def curve_of(config: TrialConfig, data: DeviceData, epochs: int = 9) -> list[EpochReport]:
    trial = CurveTrial(config, data)
    return [trial.run_epoch() for _ in range(epochs)]


def test_a_curve_depends_on_the_trial_alone_and_some_diverge(tmp_path: Path, data: DeviceData) -> None:
    trials = [replace(trial, seed=seed) for trial in plan_of(tmp_path).trials for seed in range(12)]
    diverged = [trial for trial in trials if math.isnan(curve_of(trial, data)[1].val_accuracy)]
    assert 1 <= len(diverged) <= 30
    good = next(trial for trial in trials if trial not in diverged)
    accuracies = [report.val_accuracy for report in curve_of(good, data)]
    assert accuracies == [report.val_accuracy for report in curve_of(good, data)] == sorted(accuracies)
    assert 0 < accuracies[0] < accuracies[-1] < 1


def test_a_curve_that_is_resumed_continues(tmp_path: Path, data: DeviceData) -> None:
    config = plan_of(tmp_path).trials[0]
    suspended, resumed = CurveTrial(config, data), CurveTrial(config, data)
    suspended.run_epoch()
    resumed.load_state_dict(suspended.state_dict())
    assert resumed.run_epoch().epoch == 2


def test_a_row_is_as_wide_as_the_header_and_no_wider_than_a_terminal() -> None:
    row = Cost(10_000, 26_432, 6.2, 4.4, 1730.1, 1000.4, 0.2, 0.05, 1234.5).line
    assert len(row) == max(map(len, HEADER.splitlines())) <= 80


def test_a_store_that_lost_or_doubled_a_trial_is_noticed(store: Store, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan = replace(plan, trials=plan.trials[:2])
    for number, trial in enumerate(plan.trials):
        with pytest.raises(AssertionError, match="lost or doubled"):
            check_store(store, plan)
        end(store, trial, tmp_path / f"{number}.jsonl")
    check_store(store, plan)
    end(store, plan.trials[0], tmp_path / "doubled.jsonl")
    with pytest.raises(AssertionError, match="lost or doubled"):
        check_store(store, plan)


def end(store: Store, config: TrialConfig, spool: Path) -> None:
    """Record a trial of one epoch in a new run, even if the store already has a run of it."""
    recorder = Recorder(store, Spool(spool))
    recorder.begin({}, {})
    recorder.started(config, control=False)
    recorder.ended(config, "stopped", epochs_run=1, best_val_accuracy=0.5)
    assert recorder.close(finished=True)


@pytest.mark.slow
def test_a_small_grid_runs_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 0
    *header, row = capsys.readouterr().out.splitlines()
    assert "\n".join(header) == HEADER
    assert row.split()[0] == "64"
    assert int(row.split()[1]) > 64


@pytest.mark.parametrize(("grid", "problem"), [("big:1", "no grid is called 'big'"), ("full:0", "must be 1 or more")])
def test_a_wrong_grid_is_one_line(grid: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--grids", grid])
    (message,) = capsys.readouterr().err.splitlines()
    assert problem in message
