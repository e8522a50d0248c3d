import gc
import math
from pathlib import Path

import pytest

from analysis.curves import read_curves
from analysis.store import read_experiment
from benchmarks import big_store
from benchmarks.big_store import (
    EPOCHS,
    EXPERIMENT,
    SimulatedTrial,
    check_store,
    fill_store,
    format_seconds,
    main,
    simulate_grid,
)
from benchmarks.servers import postgres
from grid.metrics import STATUSES

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def trials() -> list[SimulatedTrial]:
    return simulate_grid(60)


@pytest.fixture(scope="module")
def uri(trials: list[SimulatedTrial], tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('big')}/mlflow.db"
    fill_store(uri, trials)
    return uri


def test_a_big_grid_has_as_many_seeds_as_necessary() -> None:
    trials = simulate_grid(2000)
    assert len({trial.config.trial_key for trial in trials}) == 2000
    assert {trial.config.seed for trial in trials} == {0, 1}
    assert {trial.status for trial in trials} == set(STATUSES) - {"failed"}


def test_the_epochs_of_a_trial_match_its_status() -> None:
    for trial in simulate_grid(400):
        ends = {"completed": {EPOCHS}, "stopped": {1, 3, 9}, "diverged": set(range(1, 6))}[trial.status]
        assert trial.epochs_run in ends
        assert len(trial.accuracies) == trial.epochs_run - (trial.status == "diverged")
        assert not (trial.control and trial.status == "stopped")


def test_trials_are_read_back_as_they_were_written(trials: list[SimulatedTrial], uri: str) -> None:
    check_store(uri, trials)
    table = read_experiment(uri, EXPERIMENT).trials.set_index("run_id")
    for trial in trials:
        row = table.loc[trial.run_id]
        assert (row["status"], row["control"], row["epochs_run"]) == (trial.status, trial.control, trial.epochs_run)
        assert row["best_val_accuracy"] == pytest.approx(max(trial.accuracies, default=math.nan), nan_ok=True)


def test_a_store_that_lacks_a_trial_is_noticed(trials: list[SimulatedTrial], uri: str) -> None:
    with pytest.raises(AssertionError):
        check_store(uri, trials[:-1])


def test_curves_equal_those_of_the_plain_loop(trials: list[SimulatedTrial], uri: str) -> None:
    experiment = read_experiment(uri, EXPERIMENT)
    curves = read_curves(experiment, experiment.trials["run_id"])
    assert big_store.loop_over_histories(uri, [trial.run_id for trial in trials]).equals(curves)
    assert len(curves) == sum(len(trial.accuracies) for trial in trials)


@pytest.mark.parametrize("enabled", [True, False])
def test_reading_leaves_the_garbage_collector_as_it_was(uri: str, enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        read_experiment(uri, EXPERIMENT)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_the_table_says_how_much_faster() -> None:
    names = ["read_experiment", "read_curves of all runs", "read_curves again, from the cache"]
    seconds = dict.fromkeys(names, 1.0) | {"mlflow.search_runs": 3.0, "get_metric_history, run by run": 5.0}
    lines = format_seconds(seconds).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[-5:] for line in lines[-2:]] == [["2.00", "4.0", "x", "as", "fast"]] * 2


def test_the_benchmark_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--runs", "60", "--folder", str(tmp_path / "kept")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("60 trials, ")
    assert sum("analysis.report" in line for line in lines) == 1
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path / "kept")])
    assert "already contains a store" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
def test_the_benchmark_runs_on_postgres(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--runs", "60", "--postgres"])
    assert capsys.readouterr().out.startswith("60 trials, ")
