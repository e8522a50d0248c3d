import math
from pathlib import Path

import pytest

from benchmarks.grid_scale import HEADER, Cost, RecordedTrial, blank_dataset, check_store, cut, main, request_of
from grid.config import TrialConfig
from grid.metrics import EpochReport
from grid.plan.packing import pack
from grid.plan.trials import Plan, make_plan
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.train.trial import DeviceData

DATA = DeviceData.from_dataset(blank_dataset())


def plan_of(trials: int, folder: Path) -> Plan:
    return cut(
        make_plan(request_of(trials, folder), packing=pack(2, 0, 0), fingerprint="0" * 16, train_images=10**6), trials
    )


def curve_of(config: TrialConfig, epochs: int = 9) -> list[EpochReport]:
    trial = RecordedTrial(config, DATA)
    return [trial.run_epoch() for _ in range(epochs)]


@pytest.mark.parametrize(("trials", "seeds"), [(60, 1), (1920, 1), (1921, 2), (10_000, 6)])
def test_a_big_grid_has_as_many_seeds_as_necessary(trials: int, seeds: int, tmp_path: Path) -> None:
    assert request_of(trials, tmp_path).seeds == seeds


def test_a_cut_plan_keeps_the_order_and_the_share_of_unstopped_controls(tmp_path: Path) -> None:
    whole = make_plan(request_of(1000, tmp_path), packing=pack(2, 0, 0), fingerprint="0" * 16, train_images=10**6)
    plan = cut(whole, 1000)
    assert plan.trials == whole.trials[:1000]
    assert 60 < len(plan.controls) < 140
    assert plan.controls <= {trial.trial_key for trial in plan.trials}


def test_a_curve_depends_on_the_trial_alone_and_some_diverge(tmp_path: Path) -> None:
    trials = plan_of(400, tmp_path).trials
    diverged = [trial for trial in trials if math.isnan(curve_of(trial)[1].val_accuracy)]
    assert 1 <= len(diverged) <= 30
    good = next(trial for trial in trials if trial not in diverged)
    accuracies = [report.val_accuracy for report in curve_of(good)]
    assert accuracies == [report.val_accuracy for report in curve_of(good)] == sorted(accuracies)
    assert 0 < accuracies[0] < accuracies[-1] < 1


def test_a_curve_that_is_resumed_continues(tmp_path: Path) -> None:
    (config,) = plan_of(1, tmp_path).trials
    suspended, resumed = RecordedTrial(config, DATA), RecordedTrial(config, DATA)
    suspended.run_epoch()
    resumed.load_state_dict(suspended.state_dict())
    assert resumed.run_epoch().epoch == 2


def test_a_row_is_as_wide_as_the_header_and_no_wider_than_a_terminal() -> None:
    row = Cost(10_000, 26_432, 6.2, 4.4, 1730.1, 1000.4, 0.2, 0.05, 1234.5).line
    assert len(row) == max(map(len, HEADER.splitlines())) <= 80


def test_a_store_that_lost_or_doubled_a_trial_is_noticed(store: Store, tmp_path: Path) -> None:
    plan = plan_of(2, tmp_path)
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
    assert row.split()[0] == "60"
    assert int(row.split()[1]) > 60
