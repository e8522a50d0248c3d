"""The command as a user gives it, with Ray, sqlite, real trainings and a real registry."""

import os
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import Run

from analysis.rank import main as rank
from analysis.report import write_report
from analysis.store import read_experiment
from grid.config import InputError, TrialConfig
from grid.confirm import main as confirm
from grid.data.load import load, load_test
from grid.driver.final_test import FinalTest
from grid.driver.finalists import FIRST_FINALIST_SEED, _best_replicate, _describe, choose, finalist_trials
from grid.metrics import EPOCH_METRICS
from grid.plan.packing import Packing
from grid.ranking import RankedCell
from grid.record.store import Store, StoredTrial
from grid.run import main as run
from tests.test_store_page import documented, metrics_of, tags_of

CPU = Packing(1, 1.0, 0.0)
CONFIG = TrialConfig(learning_rate=1e-3, epochs=9, lr_scale=0.5)


def cell(accuracy: float, epochs_run: int = 9, **levels: str) -> RankedCell:
    return RankedCell({**CONFIG.cell, **levels}, 9, epochs_run, {0: accuracy}, lr_scale=0.5)


def test_all_cells_that_may_be_the_best_of_their_model_are_chosen() -> None:
    close = [cell(0.9, model="cnn"), cell(0.89, model="cnn", dropout="on"), cell(0.7), cell(0.69, dropout="on")]
    worse = [cell(0.5, batch_norm="on"), cell(0.9, 3, model="cnn", batch_norm="on")]
    assert choose([*close, *worse], 3, val_images=400) == (close, 0)


def test_at_most_so_many_of_each_model_are_chosen_and_the_other_ties_counted() -> None:
    ranked = [cell(0.9, model="cnn"), cell(0.89, model="cnn", dropout="on"), cell(0.7), cell(0.69, dropout="on")]
    assert choose(ranked, 1, val_images=400) == ([ranked[0], ranked[2]], 2)


def test_one_cell_of_each_model_is_chosen_even_if_its_lead_is_sure_or_it_was_stopped() -> None:
    ranked = [cell(0.9, model="cnn"), cell(0.5, model="cnn", dropout="on"), cell(0.7, 3), cell(0.7, 1, dropout="on")]
    assert choose(ranked, 3, val_images=400) == ([ranked[0], ranked[2]], 0)


def test_the_net_that_is_registered_has_the_best_end_not_the_best_epoch() -> None:
    ends = [
        {"best_val_accuracy": 0.9, "final_val_accuracy": 0.5},
        {"best_val_accuracy": 0.7, "final_val_accuracy": 0.7},
    ]
    tested = [StoredTrial(f"{i}", "completed", CONFIG, {"epochs_run": 9.0, **end}, True) for i, end in enumerate(ends)]
    assert _best_replicate(cell(0.6), tested).run_id == "1"


def test_the_description_says_how_many_more_cells_may_be_as_good() -> None:
    assert _describe([CONFIG], 0) == {"finalists": "1 cell x 1 new seed, 9 epochs each"}
    assert _describe([CONFIG], 4)["not confirmed"] == "4 more cells may be as good; --top N confirms more of each model"


def test_finalists_are_paired_on_seeds_that_the_grid_has_not_used() -> None:
    trained = [CONFIG, replace(CONFIG, dropout=True), replace(CONFIG, lr_scale=1.0, seed=7)]
    trials = finalist_trials([cell(0.7), cell(0.6, dropout="on")], trained, 3, CPU)
    assert {(trial.dropout, trial.seed) for trial in trials} == {
        (dropout, FIRST_FINALIST_SEED + seed) for dropout in (False, True) for seed in range(3)
    }
    assert {trial.lr_scale for trial in trials} == {0.5}


def test_finalists_trained_on_another_device_take_its_numeric_settings() -> None:
    (trial,) = finalist_trials([cell(0.7)], [replace(CONFIG, device="cuda")], 1, CPU)
    assert (trial.device, trial.memory_format, trial.learning_rate) == ("cpu", "channels_last", 1e-3)


def test_a_grid_of_another_numerics_version_is_not_confirmed() -> None:
    with pytest.raises(
        InputError, match=r"^the grid has numbers of version 1, this code's are of version \d+; confirm"
    ):
        finalist_trials([cell(0.7)], [replace(CONFIG, numerics_version=1)], 1, CPU)


@pytest.fixture(scope="module")
def finished_grid(_migrated_database: Path, glyphs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a grid of 4 trials has run, for copying."""
    folder = tmp_path_factory.mktemp("grid")
    shutil.copy(_migrated_database, folder / "mlflow.db")
    only = [f"--only={factor}" for factor in ("activation=relu", "optimizer=adam", "dropout=off")]
    shared = ["--store", f"sqlite:///{folder}/mlflow.db", "--experiment", "tiny", "--data-dir", str(glyphs_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["--grid", "smoke", *only, "--per-class", "20", "--epochs", "3", *shared]) == 0
    return folder


@pytest.fixture
def arguments(
    finished_grid: Path, store_uri: str, glyphs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The options that all commands share, in a folder of its own with a copy of the finished grid."""
    shutil.copytree(finished_grid, tmp_path, dirs_exist_ok=True)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:  # which holds absolute paths
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            moved = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            database.execute(moved, (str(finished_grid), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return ["--store", store_uri, "--experiment", "tiny", "--data-dir", str(glyphs_dir)]


def confirmed(store_uri: str, kind: str = "confirm") -> list[Run]:
    store = Store(store_uri, "tiny")
    store.open(missing=False)
    return list(store.client.search_runs([store.experiment_id], f"tags.kind = '{kind}'"))


@pytest.mark.slow
def test_finalists_are_trained_tested_once_registered_and_read_back(
    arguments: list[str], store_uri: str, glyphs_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refit = [*arguments, "--seeds", "2", "--register", "reader", "--refit"]
    command = [*arguments, "--top", "1", "--seeds", "2", "--register", "reader"]
    assert confirm(refit) == 2
    assert "'tiny' has no tested finalist; run the same command without --refit first" in capfd.readouterr().err
    assert confirm(command) == 0
    out = capfd.readouterr().out
    assert "registered" in out
    assert re.search(r"^   1  +\d\d\.\d\d%  +\d\d\.\d\d%  +2  ", out, re.MULTILINE)
    runs = confirmed(store_uri)
    assert len(runs) == 4
    for finalist in runs:
        check_finalist(finalist, tmp_path)
    assert confirm(command) == 0
    assert "tested" not in capfd.readouterr().out
    assert {each.info.run_id: each.data.metrics for each in confirmed(store_uri)} == {
        each.info.run_id: each.data.metrics for each in runs
    }
    assert list((tmp_path / "storage").rglob("*.pt")) == []
    check_registered(store_uri, glyphs_dir)
    assert rank([*arguments[:4]]) == 0
    assert "finalists, trained again on new seeds" in capfd.readouterr().out
    check_refit(refit, store_uri, tmp_path, capfd)


def check_refit(command: list[str], store_uri: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Train the best finalist on most validation images as well, and read the result back."""
    for tested in (2, 0):
        assert confirm(command) == 0
        out = capfd.readouterr().out
        assert f"refit      1 cell x 2 new seeds, 3 epochs each, on {47 * (20 + 50 - 50 // 6):,} images\n" in out
        assert out.count("tested") == tested
    refits = confirmed(store_uri, "refit")
    assert len(refits) == 2
    for refit in refits:
        check_finalist(refit, folder)
        params = refit.data.params
        before = next(each for each in confirmed(store_uri) if each.data.params["model"] == params["model"])
        differing = {name for name, value in params.items() if value != before.data.params[name]}
        assert {"data_fingerprint"} <= differing <= {"data_fingerprint", "seed"}
    assert metrics_of(refits) <= documented("refit", "metric") | set(EPOCH_METRICS)
    assert tags_of(refits) <= documented("refit", "tag")
    assert mlflow.MlflowClient(store_uri).get_model_version("reader", "2").run_id in {run.info.run_id for run in refits}
    experiment = read_experiment(store_uri, "tiny")
    assert len(experiment.finalists) == 4
    assert not any("left out" in note for note in experiment.notes)
    assert rank(command[:4]) == 0
    assert "the best finalist, trained on most validation images as well" in capfd.readouterr().out
    write_report(store_uri, "tiny", folder / "refit.html")
    assert "Trained on most validation images as well, " in (folder / "refit.html").read_text()


def check_finalist(finalist: Run, folder: Path) -> None:
    metrics, tags = finalist.data.metrics, finalist.data.tags
    assert 0 < metrics["test_accuracy"] < 1
    assert (metrics["test_images"], metrics["epochs_run"], tags["status"]) == (2820, 3, "completed")
    assert metrics["parameters"] > 1000
    assert metrics["inference_ms_per_image"] > 0
    files = {file.name for file in next(folder.rglob(f"{finalist.info.run_id}/artifacts/test")).iterdir()}
    assert files == {"confusion.csv", "confusion.png", "per_class.csv", "confused_pairs.csv", "mistakes.png"}


def check_registered(store_uri: str, glyphs_dir: Path) -> None:
    """Load the winner as any user would and classify test images with it."""
    mlflow.set_tracking_uri(store_uri)
    assert len(mlflow.MlflowClient().search_model_versions("name = 'reader'")) == 1
    reader = mlflow.pyfunc.load_model("models:/reader/1")
    images, labels = load_test("glyphs", glyphs_dir)
    classes = np.array(load("glyphs", glyphs_dir, per_class=20).classes)
    read = np.array(reader.predict(images[:500]))
    winner = mlflow.get_run(mlflow.MlflowClient().get_model_version("reader", "1").run_id)
    assert np.mean(read == classes[labels[:500]]) == pytest.approx(winner.data.metrics["test_accuracy"], abs=0.1)
    assert reader.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 28, 28)


@pytest.mark.slow
def test_lost_weights_are_reported_and_nothing_is_tested(
    arguments: list[str], store_uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grid.train.checkpoints.Checkpoints.load", lambda *unused: None)
    assert confirm([*arguments, "--top", "1", "--seeds", "1"]) == 2
    assert re.search("the weights of .* are gone from the storage; delete run", capfd.readouterr().err)
    assert not [each for each in confirmed(store_uri) if "test_accuracy" in each.data.metrics]


@pytest.mark.slow
def test_a_second_command_is_refused_while_the_first_one_tests(
    arguments: list[str], store_uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drivers = []

    def give_up(test: FinalTest, trial: StoredTrial) -> None:
        drivers.append(test.store.client.get_run(test.store.parent_id).data.tags["driver"])
        raise OSError("the cable is cut")

    monkeypatch.setattr("grid.driver.final_test.FinalTest.run", give_up)
    assert confirm([*arguments, "--top", "1", "--seeds", "1"]) == 2
    assert drivers[0].endswith(f":{os.getpid()}")
    assert "grid.confirm: can't record the test results of the finalists: the cable is cut" in capfd.readouterr().err


def record_ended_trial(store: Store, manifest: bytes) -> None:
    """Write what `grid.confirm` reads, as another program might."""
    store.attach(store.parent_id, {"grid.json": manifest})
    tags = {"kind": "trial", "status": "completed", "trial_key": CONFIG.trial_key}
    run_id = store.client.create_run(store.experiment_id, tags=tags).info.run_id
    for name, value in CONFIG.to_params().items():
        store.client.log_param(run_id, name, value)
    for name, value in {"best_val_accuracy": 0.5, "final_val_accuracy": 0.5, "epochs_run": 9}.items():
        store.client.log_metric(run_id, name, value)


def test_images_that_differ_from_the_grids_are_refused(
    store: Store, glyphs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    record_ended_trial(store, b'{"data": {"name": "glyphs", "per_class": 20}, "order_seed": 0}')
    shared = ["--experiment", "some grid", "--store", store.uri]
    assert confirm([*shared, "--data-dir", str(glyphs_dir)]) == 2
    assert "are not those of the grid; pass its --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", [b"{}", b'{"data": {"na', b'{"data": {"name": "glyphs"}}', b'{"data": null}'])
def test_a_grid_whose_manifest_does_not_name_its_images_can_not_be_confirmed(
    manifest: bytes, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    record_ended_trial(store, manifest)
    assert confirm(["--experiment", "some grid", "--store", store.uri]) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
