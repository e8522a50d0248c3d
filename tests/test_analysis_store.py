import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from analysis.curves import read_curves
from analysis.estimates.cells import rank_cells
from analysis.estimates.final_effects import measure_final_effects
from analysis.estimates.rung_effects import measure_rung_effects
from analysis.store import read_artifact, read_artifacts, read_experiment
from analysis.verdict import name_of
from grid.config import FACTORS, SETTINGS, InputError, TrialConfig, factors_among
from grid.metrics import EpochReport
from grid.parts.files import PartsFile, load, unload
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.store_uri import check_store_uri

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = TrialConfig(learning_rate=1e-3, epochs=9, seed=3, lr_scale=0.5)


def record(store: Store, folder: Path, status: str | None, epochs_run: int = 1, kind: str = "trial") -> None:
    config = CONFIG if kind == "trial" else replace(CONFIG, seed=1003)
    recorder = Recorder(store, Spool(folder / "spool.jsonl"), kind)
    recorder.begin({"grid.json": b'{"data": {"val_images": 940}}'}, {})
    recorder.started(config, control=True)
    for epoch in range(1, epochs_run + 1):
        diverged = status == "diverged" and epoch == epochs_run
        accuracy = math.nan if diverged else min(1, 0.25 * epoch)
        recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=accuracy), is_rung=epoch in (1, 3))
    if status:
        best = None if status == "failed" else min(1, 0.25 * epochs_run)
        recorder.ended(config, status, epochs_run=epochs_run, best_val_accuracy=best)
    recorder.close(finished=True)


def complete(store: Store, folder: Path, accuracies: Mapping[TrialConfig, float]) -> pd.DataFrame:
    """Record trials that trained to the end, and return their table."""
    folder.mkdir(exist_ok=True)
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({"grid.json": b"{}"}, {})
    for config, accuracy in accuracies.items():
        recorder.started(config, control=False)
        for epoch in range(1, 10):
            recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=accuracy), is_rung=epoch in (1, 3))
        recorder.ended(config, "completed", epochs_run=9, best_val_accuracy=accuracy)
    recorder.close(finished=True)
    return read_experiment(store.uri, "some grid").trials


def test_settings_that_differ_between_trials_are_factors(store: Store, tmp_path: Path) -> None:
    sizes = {32: (0.9, 0.92), 128: (0.8, 0.79), 256: (0.7, 0.7)}
    plain = replace(CONFIG, momentum=0.5)  # the same for all, and so no factor
    trials = complete(
        store,
        tmp_path,
        {
            replace(plain, batch_size=size, seed=seed): accuracy
            for size, accuracies in sizes.items()
            for seed, accuracy in enumerate(accuracies)
        },
    )
    assert factors_among(trials.columns) == (*FACTORS, "batch_size")
    ranked = rank_cells(trials)
    assert list(ranked["batch_size"]) == ["32", "128", "256"]
    assert name_of(ranked.iloc[0]) == "mlp constant relu adam batch_size=32"
    levels = measure_final_effects(trials).levels.set_index("level")["effect"]
    assert list(levels.index) == ["32", "128", "256"]  # not in the order of the alphabet
    assert list(levels) == pytest.approx([0.91 - 2.405 / 3, 0.795 - 2.405 / 3, 0.7 - 2.405 / 3])


SMOOTHING = (
    "from grid import parts\nparts.on_loss('smoothing', ('off', '0.1', '0.2'))(print)\nparts.setting('heat', 1.0)\n"
)


@pytest.mark.parametrize("sizes", [(2,), (20,), (3, 2, 2), (2,) * 12, (20, 5)], ids=str)
def test_any_number_of_factors_with_any_names_is_ranked_and_measured(
    sizes: tuple[int, ...], store: Store, tmp_path: Path
) -> None:
    """A level of a factor is worth its place; the last cell is the best."""
    names = [f"factor_{number}" for number in range(len(sizes))]
    own = "; ".join(f"{name}=v0" for name in names)
    cells = list(product(*(range(size) for size in sizes)))
    rng = random.Random(0)
    shown = [cells[0], cells[-1], *rng.sample(cells[1:-1], min(len(cells) - 2, 80))] if len(cells) > 2 else cells
    plain = CONFIG.to_params()
    trials = {
        TrialConfig.from_params(
            {
                **plain,
                "own": own,
                "seed": str(seed),
                **{name: f"v{level}" for name, level in zip(names, cell, strict=True)},
            }
        ): 0.3 + 0.01 * sum(cell) + 0.0001 * seed
        for cell in shown
        for seed in range(2)
    }
    table = complete(store, tmp_path, trials)
    assert sorted(factors_among(table.columns)) == sorted([*FACTORS, *names])
    best = rank_cells(table).iloc[0]
    assert [best[name] for name in names] == [f"v{size - 1}" for size in sizes]
    effects = measure_final_effects(table)
    assert set(effects.levels["factor"]) == set(names)
    assert effects.levels.groupby("factor").size().to_dict() == dict(zip(names, sizes, strict=True))
    found = effects.levels.set_index(["factor", "level"])["effect"]
    assert found[names[0], f"v{sizes[0] - 1}"] - found[names[0], "v0"] == pytest.approx(0.01 * (sizes[0] - 1))


def test_a_factor_added_later_counts_as_its_first_level_before(store: Store, tmp_path: Path) -> None:
    """The file is known where trials are recorded, and unknown where they are read."""
    before = {replace(CONFIG, seed=seed): 0.5 + 0.01 * seed for seed in range(3)}
    complete(store, tmp_path, before)
    load([PartsFile("own.py", SMOOTHING)])
    plain = CONFIG.to_params()
    added = {
        TrialConfig.from_params({**plain, "seed": str(seed), "smoothing": level, "heat": "1.0"}): 0.6 + 0.01 * seed
        for level in ("0.1", "0.2")
        for seed in range(3)
    }
    complete(store, tmp_path / "later", added)
    unload("own.py")
    assert "smoothing" not in SETTINGS
    trials = read_experiment(store.uri, "some grid").trials
    assert factors_among(trials.columns) == (*FACTORS, "smoothing")  # heat is the same in all
    assert sorted(trials["smoothing"].value_counts().items()) == [("0.1", 3), ("0.2", 3), ("off", 3)]
    assert trials["cell_key"].nunique() == 3
    ranked = rank_cells(trials)
    assert [name_of(cell) for _, cell in ranked.iterrows()][-1] == "mlp constant relu adam"
    levels = measure_final_effects(trials).levels.set_index("level")["effect"]
    assert list(levels.index) == ["off", "0.1", "0.2"]
    assert levels["off"] == pytest.approx(-0.2 / 3)


def test_a_setting_is_compared_where_it_matters_alone(store: Store, tmp_path: Path) -> None:
    """Momentum is worth 0.2 with sgd; adam, which has none, is worth 0.1 and batch norm 0.05 in all of them."""
    cells = {("sgd", 0.5): 0.5, ("sgd", 0.9): 0.7, ("adam", 0.9): 0.7}
    trials = complete(
        store,
        tmp_path,
        {
            replace(CONFIG, optimizer=optimizer, momentum=momentum, batch_norm=norm, seed=seed): (
                accuracy + 0.05 * norm + 0.001 * seed * (-1) ** norm
            )
            for (optimizer, momentum), accuracy in cells.items()
            for norm in (False, True)
            for seed in (0, 1)
        },
    )
    assert set(trials.loc[trials["optimizer"] == "adam", "momentum"]) == {""}
    for effects in (measure_final_effects(trials), measure_rung_effects(trials)):
        levels = effects.levels.set_index(["factor", "level"])["effect"]
        assert levels["momentum", "0.9"] == pytest.approx(0.1)
        assert levels["optimizer", "adam"] == pytest.approx(0.05)
        assert levels["batch_norm", "on"] == pytest.approx(0.025, abs=0.001)
    assert measure_rung_effects(trials).missing == 0
    assert {name_of(cell) for _, cell in rank_cells(trials).iterrows()} == {
        *("mlp constant relu adam", "mlp constant relu adam batch_norm"),
        *("mlp constant relu sgd", "mlp constant relu sgd batch_norm"),
        *("mlp constant relu sgd momentum=0.5", "mlp constant relu sgd batch_norm momentum=0.5"),
    }


def test_a_trial_is_a_row_with_types(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    (row,) = read_experiment(store.uri, "some grid").trials.to_dict("records")
    assert {factor: row[factor] for factor in FACTORS} == {factor: CONFIG.cell[factor] for factor in FACTORS}
    assert (row["seed"], row["lr_scale"], row["epochs"], row["epochs_run"]) == (3, 0.5, 9, 1)
    assert (row["status"], row["control"], row["stopped_at_epoch"]) == ("stopped", True, 1)
    assert (row["trial_key"], row["cell_key"]) == (CONFIG.trial_key, CONFIG.cell_key)
    assert (row["best_val_accuracy"], row["val_accuracy_at_1"]) == (0.25, 0.25)


def test_a_trial_without_an_accuracy_is_a_row_with_none(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "failed")
    assert read_experiment(store.uri, "some grid").trials["best_val_accuracy"].isna().all()


def test_the_manifest_is_read_with_the_trials(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    experiment = read_experiment(store.uri, "some grid")
    assert (experiment.val_images, experiment.parent_id, experiment.notes) == (940, store.parent_id, ())


@pytest.mark.parametrize("content", [b'{"data": {"val', b"\xff\xfe\x00", b"[1, 2]"])
def test_a_damaged_manifest_is_ignored_with_a_note(store: Store, tmp_path: Path, content: bytes) -> None:
    record(store, tmp_path, "stopped")
    store.attach(store.parent_id, {"grid.json": content})
    experiment = read_experiment(store.uri, "some grid")
    assert (experiment.manifest, len(experiment.trials)) == ({}, 1)
    assert experiment.notes[0].startswith("the manifest (grid.json) is ")
    assert store.manifest() == {}


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"data": null, "rungs": null}',
        b'{"data": "glyphs", "rungs": "1,3"}',
        b'{"data": {"val_images": "many"}, "rungs": {"factor": "three"}}',
        b'{"data": {"val_images": 0}, "rungs": {"factor": 0}}',
    ],
)
def test_a_manifest_of_another_program_may_hold_anything(store: Store, tmp_path: Path, manifest: bytes) -> None:
    record(store, tmp_path, "stopped")
    store.attach(store.parent_id, {"grid.json": manifest})
    experiment = read_experiment(store.uri, "some grid")
    assert (experiment.val_images, experiment.rung_factor, experiment.compared_within) == (None, None, None)


@pytest.mark.parametrize(
    ("rungs", "factor", "within"),
    [
        (b'{"factor": 1, "compared_within": "model"}', 1, ("model",)),
        (b'{"factor": 3, "compared_within": "model,lr_schedule"}', 3, ("model", "lr_schedule")),
        (b'{"factor": 3, "compared_within": ""}', 3, ()),
        (b'{"factor": 3}', 3, None),
        (b'{"factor": 3.5, "compared_within": ["model"]}', None, None),
        (b'{"factor": true, "compared_within": "model,colour"}', None, None),
    ],
)
def test_the_stopping_rule_is_that_of_the_manifest(
    store: Store, tmp_path: Path, rungs: bytes, factor: int | None, within: tuple[str, ...] | None
) -> None:
    record(store, tmp_path, "stopped")
    store.attach(store.parent_id, {"grid.json": b'{"rungs": ' + rungs + b"}"})
    experiment = read_experiment(store.uri, "some grid")
    assert (experiment.rung_factor, experiment.compared_within) == (factor, within)


def test_metrics_without_an_epoch_are_ignored(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    run_id = store.run_ids()[CONFIG.trial_key]
    store.client.log_metric(run_id, "val_accuracy_at_best", 0.5)
    (row,) = read_experiment(store.uri, "some grid").trials.to_dict("records")
    assert [name for name in row if name.startswith("val_accuracy_at_")] == ["val_accuracy_at_1"]


@pytest.mark.parametrize(("kind", "noun"), [("confirm", "finalist"), ("refit", "refit")])
def test_a_note_counts_diverged_finalists_and_refits(kind: str, noun: str, store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    record(store, tmp_path, "diverged", kind=kind)
    (note,) = read_experiment(store.uri, "some grid").notes
    assert note == f"1 training of 1 {noun} diverged: their means are over the remaining seeds"


def test_tests_of_older_stores_compare_with_validation_by_their_plain_accuracy(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "completed", 9)
    record(store, tmp_path, "completed", 9, kind="confirm")
    (run_id,) = store.run_ids("confirm").values()
    store.log_test(run_id, {"test_accuracy": 0.75})
    assert list(read_experiment(store.uri, "some grid").finalists["test_accuracy_as_validated"]) == [0.75]
    store.log_test(run_id, {"test_accuracy_as_validated": 0.5})
    (finalist,) = read_experiment(store.uri, "some grid").finalists.to_dict("records")
    assert (finalist["test_accuracy"], finalist["test_accuracy_as_validated"]) == (0.75, 0.5)


def test_a_missing_artifact_is_none(store: Store) -> None:
    assert read_artifact(store.uri, store.parent_id, "no/such.json") is None
    assert read_artifact(store.uri, "", "grid.json") is None


def test_all_artifacts_of_a_run_are_read_with_one_question(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.attach(store.parent_id, {"a.txt": b"a", "commands/b.json": b"b"})
    asked: list[str] = []
    get_run = MlflowClient.get_run
    monkeypatch.setattr(MlflowClient, "get_run", lambda self, run_id: asked.append(run_id) or get_run(self, run_id))
    paths = ["a.txt", "commands/b.json", "commands/c.json"]
    assert read_artifacts(store.uri, store.parent_id, paths) == {"a.txt": b"a", "commands/b.json": b"b"}
    assert read_artifacts(store.uri, "", paths) == {}
    assert asked == [store.parent_id]


def test_of_two_runs_of_a_trial_the_longer_counts_with_a_note_on_the_other(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped", epochs_run=1)
    record(store, tmp_path, "stopped", epochs_run=3)
    experiment = read_experiment(store.uri, "some grid")
    assert list(experiment.trials["epochs_run"]) == [3]
    assert experiment.notes == ("1 trial left out: another run of the same trial counts",)


def test_notes_count_deleted_foreign_unfinished_and_unreadable_runs(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    make = store.client.create_run
    store.client.delete_run(make(store.experiment_id, tags={"kind": "trial"}).info.run_id)
    make(store.experiment_id)
    unreadable = make(store.experiment_id, tags={"kind": "trial", "status": "stopped"}).info.run_id
    unfinished = make(store.experiment_id, tags={"kind": "trial"}).info.run_id
    for name, value in CONFIG.to_params().items():
        store.client.log_param(unfinished, name, value)
    experiment = read_experiment(store.uri, "some grid")
    assert len(experiment.trials) == 1
    assert set(experiment.notes) == {
        "1 trial left out: not ended yet",
        f"1 trial left out: parameters are not a trial's (run {unreadable})",
        "1 run left out: no tag kind=grid, trial, confirm or refit",
        "1 run left out: deleted",
    }


def test_a_store_that_another_program_wrote_by_the_contract_is_read(store: Store) -> None:
    run_id = store.client.create_run(store.experiment_id, tags={"kind": "trial", "status": "completed"}).info.run_id
    for name in (*FACTORS, "seed", "lr_scale", "epochs"):
        store.client.log_param(run_id, name, CONFIG.to_params()[name])
    store.client.log_metric(run_id, "best_val_accuracy", 0.5)
    store.client.log_metric(run_id, "epochs_run", 9)
    experiment = read_experiment(store.uri, "some grid")
    assert list(experiment.trials["best_val_accuracy"]) == [0.5]
    assert experiment.val_images is None


def test_more_runs_than_a_page_are_all_read(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("analysis.store.PAGE_SIZE", 2)
    record(store, tmp_path, "stopped")
    for _ in range(5):
        store.client.create_run(store.experiment_id)
    assert read_experiment(store.uri, "some grid").notes == (
        "5 runs left out: no tag kind=grid, trial, confirm or refit",
    )


def test_curves_are_what_was_reported(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped", epochs_run=3)
    experiment = read_experiment(store.uri, "some grid")
    curves = read_curves(experiment, experiment.trials["run_id"])
    assert list(curves["epoch"]) == [1, 2, 3]
    assert list(curves["val_accuracy"]) == [0.25, 0.5, 0.75]


def test_curves_are_read_from_the_store_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(store, tmp_path, "stopped", epochs_run=3)
    experiment = read_experiment(store.uri, "some grid")
    first = read_curves(experiment, experiment.trials["run_id"])
    monkeypatch.setattr("analysis.store.MlflowClient", None)
    assert read_curves(experiment, experiment.trials["run_id"]).equals(first)


def test_a_curve_that_has_grown_is_read_again(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "failed", epochs_run=1)
    before = read_experiment(store.uri, "some grid")
    assert len(read_curves(before, before.trials["run_id"])) == 1
    store.client.log_metric(before.trials["run_id"][0], "val_accuracy", 0.5, step=2)
    store.client.log_metric(before.trials["run_id"][0], "epochs_run", 2, step=2)
    after = read_experiment(store.uri, "some grid")
    assert len(read_curves(after, after.trials["run_id"])) == 2


def test_a_damaged_or_read_only_cache_costs_only_time(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    experiment = read_experiment(store.uri, "some grid")
    read_curves(experiment, experiment.trials["run_id"])
    (cached,) = (tmp_path / "cache" / "factorial-grid").iterdir()
    whole = cached.read_bytes()
    for damaged in (b"garbage", b"", bytes(len(whole)), whole[:-9], whole[:200] + bytes(len(whole) - 200)):
        cached.write_bytes(damaged)
        assert len(read_curves(experiment, experiment.trials["run_id"])) == 1
    cached.unlink()
    cached.parent.rmdir()
    cached.parent.write_text("not a folder")
    assert len(read_curves(experiment, experiment.trials["run_id"])) == 1


def test_an_empty_experiment_is_an_error(store: Store) -> None:
    with pytest.raises(
        InputError, match="^experiment 'some grid' in .* has no trial yet; run python -m grid.run first$"
    ):
        read_experiment(store.uri, "some grid")


def test_an_experiment_without_an_ended_trial_is_an_error(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, None)
    with pytest.raises(InputError, match="^no trial of experiment 'some grid' in .* has ended yet"):
        read_experiment(store.uri, "some grid")


def test_an_unknown_experiment_is_an_error_with_the_choices(store: Store) -> None:
    with pytest.raises(InputError, match=r"^no experiment 'other' in sqlite.*; it has some grid"):
        read_experiment(store.uri, "other")


def test_a_deleted_experiment_is_an_error(store: Store) -> None:
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(InputError, match="^experiment 'some grid' is deleted in sqlite"):
        read_experiment(store.uri, "some grid")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"SQLite format 3\0" + b"garbage" * 1000, "the file is not a sqlite database"),
        (b"", "it is empty, no grid has been recorded in it"),
    ],
)
def test_a_file_without_a_store_is_an_error_in_one_line_and_stays_as_it_is(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(InputError, match=rf"^can't open the store sqlite:.*: {problem}; pass another --store$"):
        read_experiment(f"sqlite:///{tmp_path}/mlflow.db", "some grid")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"mlflow.db": content}


def test_a_wrong_name_in_a_store_of_many_is_answered_with_the_nearest(store: Store, tmp_path: Path) -> None:
    names = [f"night-{number:04d}-{'x' * 200}" for number in range(1500)]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        columns = "experiment_id, name, lifecycle_stage, artifact_location, workspace"
        rows = [(1000 + number, name, "active", "/", "default") for number, name in enumerate(names)]
        database.executemany(f"INSERT INTO experiments ({columns}) VALUES (?, ?, ?, ?, ?)", rows)
    with pytest.raises(InputError, match=r"; it has 1,502 experiments, such as some grid$"):
        read_experiment(store.uri, "some grit")
    with pytest.raises(InputError, match=r"; it has 1,502 experiments, such as night-0000-x*\.\.\., ") as error:
        read_experiment(store.uri, "day")
    assert len(str(error.value)) < 1000
    with pytest.raises(InputError, match=r"; it has 1,502 experiments, such as some grid$"):
        Store(store.uri, "some grit").open(missing=False)


# A store that may only be read


@pytest.fixture
def archive(store: Store, tmp_path: Path) -> Iterator[Path]:
    """A folder with a store of one trial, outside pytest's own folders, which nobody else may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(tmp_path / "mlflow.db", folder)
        archived = Store(f"sqlite:///{folder}/mlflow.db", "archived grid")
        archived.create()
        record(archived, tmp_path, "stopped")
        yield folder


@contextmanager
def reading_only(folder: Path) -> Iterator[None]:
    """Become somebody who may not change a folder, and check that it is left as it was."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    is_root = os.getuid() == 0
    for file in before:
        file.chmod(0o444)
    folder.chmod(0o555)
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        assert not os.access(folder, os.W_OK)
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o755)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def interrupt_a_write(path: Path) -> None:
    """Leave what a program leaves that is killed while it writes: half a transaction, and how to undo it."""
    with sqlite3.connect(path) as database:  # more than the cache holds, so that pages reach the file before the end
        database.execute("CREATE TABLE big (content BLOB)")
        database.executemany("INSERT INTO big VALUES (zeroblob(?))", [(10_000,)] * 50)
    database.close()
    crash = (
        "import os, sqlite3, sys; database = sqlite3.connect(sys.argv[1]); database.execute('PRAGMA cache_size = 1');"
        "database.execute('UPDATE tags SET value = 1'); database.execute('UPDATE big SET content = randomblob(10000)');"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", crash, str(path)], check=False)
    assert Path(f"{path}-journal").stat().st_size > 0


def use_a_log(path: Path) -> None:
    """Let a sqlite file have a write-ahead log, for which a reader needs two more files beside it."""
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode = WAL")
    database.close()


@pytest.mark.parametrize("change", [None, interrupt_a_write, use_a_log])
def test_a_store_that_may_only_be_read_is_read_and_left_as_it_is(
    archive: Path, change: Callable[[Path], None] | None
) -> None:
    if change:
        change(archive / "mlflow.db")
    with reading_only(archive):
        experiment = read_experiment(f"sqlite:///{archive}/mlflow.db", "archived grid")
    assert list(experiment.trials["status"]) == ["stopped"]
    assert experiment.val_images == 940


def test_a_driver_says_that_it_cannot_write_to_a_store(archive: Path) -> None:
    uri = f"sqlite:///{archive}/mlflow.db"
    with (
        reading_only(archive),
        pytest.raises(InputError, match="^can't open the store .*: the file can't be written; "),
    ):
        check_store_uri(uri)


def test_reading_an_own_store_changes_nothing_either(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    before = (tmp_path / "mlflow.db").read_bytes()
    read_experiment(store.uri, "some grid")
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert not list(tmp_path.glob("mlflow.db-*"))
