"""A store that people edited by hand: whatever they did, it is counted, said and passed over, and nothing is doubled.

`tests.test_more_controls` trains by formula instead of with Ray; the store, the driver and the readers are real.
"""

import json
import math
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from analysis.curves import read_curves
from analysis.estimates.cells import rank_cells
from analysis.page.render import _subtitle
from analysis.rank import format_ranking
from analysis.store import Experiment, read_experiment
from analysis.verdict import Verdict, analyse, headline
from grid.config import InputError
from grid.confirm import _parser as confirm_parser
from grid.confirm import read_confirmation
from grid.driver.finalists import _load_as_before
from grid.metrics import recorded_rungs
from grid.record.store import Store
from grid.recorded import TWIN
from grid.train.checkpoints import Checkpoints
from tests.test_more_controls import Driver, Trainer, accuracy_of

OPTIONS = ("--controls", "0.25", "--seeds", "3")
PLANNED = 48
"""Trials of that command."""


class Edited:
    """A recorded grid, and the ways in which people change it."""

    def __init__(self, driver: Driver):
        self.driver = driver
        self.store: Store = driver.store()
        self.client: MlflowClient = self.store.client
        self.taken: dict[str, str] = {}
        """Run id -> trial key."""
        ended = {run.data.tags["trial_key"] for run in self.runs() if "status" in run.data.tags}
        self.open = {config.trial_key for config in driver.planned(*OPTIONS)} - ended
        """Keys of the trials that have not ended."""

    def runs(self) -> list[Run]:
        """Return the trials, in the order in which they began: an edit concerns the same one in every run of a test."""
        order = ["attributes.start_time"]
        return list(self.client.search_runs([self.store.experiment_id], "tags.kind = 'trial'", order_by=order))

    def take(self, of: Mapping[str, str | None]) -> str:
        """Return a run with these tags that has not been taken yet."""
        left = [run for run in self.runs() if run.info.run_id not in self.taken]
        left.sort(
            key=lambda run: run.data.tags.get("control") or "", reverse=True
        )  # others are rare among the completed
        run = next(run for run in left if all(run.data.tags.get(name) == value for name, value in of.items()))
        self.taken[run.info.run_id] = run.data.tags["trial_key"]
        return str(run.info.run_id)

    def sql(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.driver.uri.removeprefix("sqlite:///"))) as database, database:
            assert database.execute(statement, values).rowcount

    def set_tag(self, run_id: str, name: str, value: str | None) -> None:
        if value is None:
            self.sql("delete from tags where run_uuid = ? and key = ?", run_id, name)
        else:
            self.client.set_tag(run_id, name, value)


@pytest.fixture(scope="module")
def recorded(_migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a grid in it, and a copy: 32 trials that ended, with two controls drawn later, and 3 that began."""
    folder, copy = tmp_path_factory.mktemp("edited") / "grid", tmp_path_factory.mktemp("copy") / "grid"
    folder.mkdir()
    shutil.copy(_migrated_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        driver = Driver(f"sqlite:///{folder}/mlflow.db", folder, monkeypatch)
        driver.run("--controls", "0.25", "--seeds", "2")
        driver.run("--controls", "0.25", "--seeds", "2", "--more-controls", "2")
        driver.run(*OPTIONS, trainer=Trainer(6))
    shutil.copytree(folder, copy)
    return folder, copy


@pytest.fixture
def edited(recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edited:
    folder, copy = recorded
    for name in ("mlartifacts", "spool", "storage"):
        shutil.rmtree(folder / name, ignore_errors=True)
        if (copy / name).exists():
            shutil.copytree(copy / name, folder / name)
    with closing(sqlite3.connect(copy / "mlflow.db")) as before, closing(sqlite3.connect(folder / "mlflow.db")) as now:
        before.backup(now)  # in place, as MLflow keeps connections to the file
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Edited(Driver(f"sqlite:///{folder}/mlflow.db", folder, monkeypatch))


Edit = Callable[[Edited], None]
STOPPED = {"status": "stopped"}
COMPLETED = {"status": "completed"}
UNSTOPPED = {"status": "completed", "control": "false"}
CONTROL = {"status": "completed", "would_stop_at_epoch": "1"}
BEGUN = {"status": None}


def tag(name: str, value: str | None, of: dict[str, str | None]) -> Edit:
    return lambda edited: edited.set_tag(edited.take(of), name, value)


def metric(name: str, value: float, step: int = 9) -> Edit:
    return lambda edited: edited.client.log_metric(edited.take(COMPLETED), name, value, step=step)


def param(name: str, value: str | None) -> Edit:
    def edit(edited: Edited) -> None:
        run_id = edited.take(STOPPED)
        edited.sql("delete from params where run_uuid = ? and key = ?", run_id, name)
        if value is not None:
            edited.client.log_param(run_id, name, value)

    return edit


def no_params(edited: Edited) -> None:
    edited.sql("delete from params where run_uuid = ?", edited.take(STOPPED))


def rename(edited: Edited) -> None:
    edited.client.update_run(edited.take(STOPPED), name="my favourite")


def double(edited: Edited) -> None:
    run = edited.client.get_run(edited.take(STOPPED))
    again = edited.client.create_run(edited.store.experiment_id, tags=run.data.tags).info.run_id
    for name, value in run.data.params.items():
        edited.client.log_param(again, name, value)
    for name in run.data.metrics:
        for point in edited.client.get_metric_history(run.info.run_id, name):
            edited.client.log_metric(again, name, point.value, step=point.step)


def add_foreign(edited: Edited) -> None:
    tags = {"kind": "trial", "status": "completed"}
    run_id = edited.client.create_run(edited.store.experiment_id, tags=tags).info.run_id
    edited.client.log_param(run_id, "depth", "7")


def delete(edited: Edited) -> None:
    edited.client.delete_run(edited.take(STOPPED))


STATUS = "tag status contradicts other tags or metrics"
WOULD_STOP = "tag would_stop_at_epoch contradicts other tags"
STOP = "tag stopped_at_epoch contradicts other tags"
SEED = "tag kind contradicts its seed"
KIND = "no tag kind=grid, trial, confirm or refit"
KEY = "tag trial_key is not the hash of its parameters"
PARAMS = "parameters are not a trial's"
ACCURACY = "an accuracy is not between 0 and 1"
EPOCHS_RUN = "metric epochs_run is not a number of epochs within its budget"
UNTRAINED = "a metric val_accuracy_at_... is of an epoch that it did not train"

LEFT_OUT: dict[str, tuple[Edit, str]] = {
    "kind deleted": (tag("kind", None, STOPPED), KIND),
    "kind misspelt": (tag("kind", "Trial", COMPLETED), KIND),
    "kind of the parent": (tag("kind", "grid", CONTROL), KIND),
    "kind of a finalist": (tag("kind", "confirm", CONTROL), SEED),
    "trial_key nonsense": (tag("trial_key", "nonsense's", STOPPED), KEY),
    "trial_key empty": (tag("trial_key", "", COMPLETED), KEY),
    "control deleted": (tag("control", None, CONTROL), "tag control is neither true nor false"),
    "control nonsense": (tag("control", "yes", STOPPED), "tag control is neither true nor false"),
    "control withdrawn": (tag("control", "false", CONTROL), WOULD_STOP),
    "status nonsense": (tag("status", "done", COMPLETED), "tag status is none of completed, stopped, "),
    "status completed": (tag("status", "completed", STOPPED), STOP),
    "status stopped": (tag("status", "stopped", COMPLETED), STATUS),
    "status diverged": (tag("status", "diverged", COMPLETED), STATUS),
    "stopped_at_epoch nonsense": (
        tag("stopped_at_epoch", "first", STOPPED),
        "tag stopped_at_epoch is not a whole number",
    ),
    "stopped_at_epoch endless": (tag("stopped_at_epoch", "9" * 5000, CONTROL), "tag stopped_at_epoch is not a whole"),
    "stopped_at_epoch zero": (
        tag("stopped_at_epoch", "0", STOPPED),
        "tag stopped_at_epoch is not an epoch of its budget",
    ),
    "stopped_at_epoch of another": (tag("stopped_at_epoch", "2", STOPPED), STATUS),
    "stopped_at_epoch added": (tag("stopped_at_epoch", "3", UNSTOPPED), STOP),
    "would_stop_at_epoch nonsense": (tag("would_stop_at_epoch", "no", CONTROL), "would_stop_at_epoch is not a whole"),
    "would_stop_at_epoch too late": (
        tag("would_stop_at_epoch", "99", CONTROL),
        "would_stop_at_epoch is not an epoch of",
    ),
    "would_stop_at_epoch added": (tag("would_stop_at_epoch", "1", STOPPED), WOULD_STOP),
    "control_chance nonsense": (tag("control_chance", "often", STOPPED), "tag control_chance is not between 0 and 1"),
    "control_chance above 1": (tag("control_chance", "2", COMPLETED), "tag control_chance is not between 0 and 1"),
    "control_chance nan": (tag("control_chance", "nan", CONTROL), "tag control_chance is not between 0 and 1"),
    "controls_rounds_before": (tag("controls_rounds_before", "-1", STOPPED), "controls_rounds_before is not a whole"),
    "error added": (tag("error", "it broke", COMPLETED), STATUS),
    "no parameters": (no_params, PARAMS),
    "model deleted": (param("model", None), PARAMS),
    "seed nonsense": (param("seed", "x"), PARAMS),
    "seed of another": (param("seed", "7"), KEY),
    "epochs of another": (param("epochs", "5"), KEY),
    "accuracy nan": (metric("final_val_accuracy", math.nan), ACCURACY),
    "accuracy infinite": (metric("best_val_accuracy", math.inf), ACCURACY),
    "accuracy negative": (metric("val_accuracy_at_1", -1.0), ACCURACY),
    "accuracy of an untrained epoch": (metric("val_accuracy_at_9", 0.5), UNTRAINED),
    "epochs_run nan": (metric("epochs_run", math.nan), EPOCHS_RUN),
    "epochs_run of another": (metric("epochs_run", 3), STATUS),
    "deleted": (delete, "1 run left out: deleted"),
}
"""An edit after which the run is left out, with the reason that `analysis` gives."""

HEALED: dict[str, tuple[Edit, str]] = {
    "trial_key deleted": (tag("trial_key", None, STOPPED), ""),
    "cell_key deleted": (tag("cell_key", None, STOPPED), ""),
    "cell_key nonsense": (tag("cell_key", "nonsense", COMPLETED), ""),
    "stopped_at_epoch deleted": (tag("stopped_at_epoch", None, STOPPED), ""),
    "control_chance deleted": (tag("control_chance", None, CONTROL), "1 trial without a known chance of being a"),
    "controls_rounds_before too many": (tag("controls_rounds_before", "9", CONTROL), "without a known chance of"),
    "val_correct nonsense": (tag("val_correct", "nonsense", COMPLETED), ""),
    "renamed": (rename, ""),
    "doubled": (double, "1 trial left out: another run of the same trial counts"),
    "foreign": (add_foreign, PARAMS),
    "no rung": (metric("val_accuracy_at_2", 0.5), "metric val_accuracy_at_2 of 1 trial ignored: it is not a rung"),
    "later value": (metric("val_accuracy", 0.5, step=2), ""),
    "later epoch": (metric("val_accuracy", 0.5, step=7), ""),
}
"""An edit that loses nothing: what was recorded is found all the same."""


def analyse_all(uri: str) -> Experiment:
    """Read a store as all commands do, and check that what is shown is what was recorded."""
    experiment = read_experiment(uri, "tiny")
    verdict = analyse(experiment)
    assert list(headline(verdict))
    assert format_ranking(verdict.cells, experiment, 20)
    trials = experiment.trials
    assert not trials.duplicated("trial_key").any()
    for row in trials.to_dict("records"):
        last = {row["epochs"]: row["final_val_accuracy"]} if row["status"] == "completed" else {}
        seen = {rung: row[f"val_accuracy_at_{rung}"] for rung in (1, 3) if rung <= row["epochs_run"]} | last
        assert seen == {epoch: accuracy_of(row["trial_key"], epoch) for epoch in seen}
    assert recorded_rungs(trials.columns) == [1, 3]
    curves = read_curves(experiment, trials["run_id"])
    assert not curves.duplicated(["run_id", "epoch"]).any()
    assert curves.groupby("run_id").size().to_dict() == trials.set_index("run_id")["epochs_run"].to_dict()
    return experiment


def left_out(experiment: Experiment) -> int:
    """Return how many runs the notes count."""
    counted = re.findall(r"^(\d+) (?:trial|run|finalist)s? left out", "\n".join(experiment.notes), re.MULTILINE)
    return sum(map(int, counted))


def check_recorded_once(edited: Edited) -> None:
    """Check that the runs that count have one value for each epoch, but for what was added by hand."""
    trials = read_experiment(edited.driver.uri, "tiny").trials
    for run_id, epochs in zip(trials["run_id"], trials["epochs_run"], strict=True):
        if run_id not in edited.taken:
            history = edited.client.get_metric_history(run_id, "val_accuracy")
            assert sorted(point.step for point in history) == list(range(1, epochs + 1))


def batches(edits: dict[str, tuple[Edit, str]], number: int) -> list[Any]:
    """Return the edits in so many parts, as there are not enough trials for all at once."""
    parts = [dict(list(edits.items())[start::number]) for start in range(number)]
    return [pytest.param(part, id=", ".join(part)) for part in parts]


@pytest.mark.parametrize("edits", batches(LEFT_OUT, 5))
def test_runs_that_contradict_themselves_are_left_out_and_trained_again(
    edits: dict[str, tuple[Edit, str]], edited: Edited, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(edited.runs())
    for edit, _ in edits.values():
        edit(edited)
    experiment = analyse_all(edited.driver.uri)
    notes = "\n".join(experiment.notes)
    assert [reason for _, reason in edits.values() if reason not in notes] == []
    assert set(experiment.trials["run_id"]) & edited.taken.keys() == set()
    assert len(experiment.trials) + left_out(experiment) == before
    capsys.readouterr()
    code, trainer = edited.driver.run(*OPTIONS)
    assert code == 0
    shown = capsys.readouterr().out
    seen_by_the_driver = [
        reason for _, reason in edits.values() if reason not in (KIND, SEED, "1 run left out: deleted")
    ]
    assert [reason for reason in seen_by_the_driver if reason not in shown] == []
    finished = {config.trial_key for config in trainer.trained}
    assert finished == set(edited.taken.values()) | edited.open
    assert len(analyse_all(edited.driver.uri).trials) == PLANNED
    check_recorded_once(edited)


@pytest.mark.parametrize("edits", batches(HEALED, 2))
def test_runs_that_lost_nothing_count_and_are_not_trained_again(
    edits: dict[str, tuple[Edit, str]], edited: Edited
) -> None:
    before = len(read_experiment(edited.driver.uri, "tiny").trials)
    for edit, _ in edits.values():
        edit(edited)
    experiment = analyse_all(edited.driver.uri)
    notes = "\n".join(experiment.notes)
    assert [reason for _, reason in edits.values() if reason not in notes] == []
    assert len(experiment.trials) == before
    code, trainer = edited.driver.run(*OPTIONS)
    assert (code, {config.trial_key for config in trainer.trained}) == (0, edited.open)
    assert len(analyse_all(edited.driver.uri).trials) == PLANNED
    check_recorded_once(edited)


@pytest.mark.parametrize("value", [None, ""])
def test_an_end_that_was_deleted_is_recorded_again_in_the_same_run(value: str | None, edited: Edited) -> None:
    for of in (STOPPED, COMPLETED, CONTROL):
        edited.set_tag(edited.take(of), "status", value)
    assert "left out: not ended yet" in "\n".join(analyse_all(edited.driver.uri).notes)
    _, trainer = edited.driver.run(*OPTIONS)
    assert {config.trial_key for config in trainer.trained} == edited.open
    trials = analyse_all(edited.driver.uri).trials
    assert (len(trials), set(edited.taken) - set(trials["run_id"])) == (PLANNED, set())


@pytest.mark.parametrize("of", [STOPPED, COMPLETED])
def test_a_trial_that_is_said_to_have_failed_is_trained_again_in_its_run(of: dict[str, str], edited: Edited) -> None:
    run_id = edited.take(of)
    before = edited.client.get_run(run_id).data
    edited.set_tag(run_id, "status", "failed")
    assert "failed" in set(analyse_all(edited.driver.uri).trials["status"])
    _, trainer = edited.driver.run(*OPTIONS)
    assert {config.trial_key for config in trainer.trained} == {edited.taken[run_id]} | edited.open
    after = edited.client.get_run(run_id).data
    renewed = {"error": "", "resumed_by": after.tags["resumed_by"]}
    assert after.tags | renewed == before.tags | renewed
    assert after.metrics == before.metrics
    edited.taken.clear()
    check_recorded_once(edited)


@pytest.mark.parametrize("step", [-1, 0, 1, 9])
def test_values_that_were_added_to_an_open_trial_hide_none_of_its_epochs(step: int, edited: Edited) -> None:
    run_id = edited.take({"status": None})
    for name in ("epoch_seconds", "val_accuracy"):
        edited.client.log_metric(run_id, name, 0.5, step=step)
    edited.driver.run(*OPTIONS)
    trials = analyse_all(edited.driver.uri).trials
    assert list(trials.loc[trials["trial_key"] == edited.taken[run_id], "run_id"]) == [run_id]


def test_a_deleted_run_that_is_restored_after_it_was_trained_again_counts_once(edited: Edited) -> None:
    delete(edited)
    edited.driver.run(*OPTIONS)
    (run_id,) = edited.taken
    edited.client.restore_run(run_id)
    experiment = analyse_all(edited.driver.uri)
    assert (len(experiment.trials), experiment.notes[0]) == (PLANNED, f"1 trial left out: {TWIN}")
    assert edited.driver.run(*OPTIONS)[1].trained == []


def test_a_checkpoint_of_a_deleted_run_is_not_continued(edited: Edited) -> None:
    """Its epochs would be missing in the new run."""
    run_id = edited.take({"status": None})
    checkpoints = Checkpoints(str(edited.driver.folder / "storage"), "tiny")
    checkpoints.save(edited.taken[run_id], {"epoch": 1})
    edited.client.delete_run(run_id)
    edited.driver.run(*OPTIONS, trainer=Trainer(0))
    assert checkpoints.load(edited.taken[run_id], "cpu") is None


def test_an_experiment_that_was_renamed_deleted_and_restored_is_found_again(edited: Edited) -> None:
    client, experiment_id = edited.client, edited.store.experiment_id
    before = read_experiment(edited.driver.uri, "tiny").trials
    client.rename_experiment(experiment_id, "huge")
    with pytest.raises(InputError, match="^no experiment 'tiny' in .*; it has huge"):
        read_experiment(edited.driver.uri, "tiny")
    client.rename_experiment(experiment_id, "tiny")
    client.delete_experiment(experiment_id)
    for refused in (lambda: read_experiment(edited.driver.uri, "tiny"), edited.driver.store):
        with pytest.raises(InputError, match="^experiment 'tiny' is deleted in sqlite"):
            refused()
    client.restore_experiment(experiment_id)
    pd.testing.assert_frame_equal(analyse_all(edited.driver.uri).trials, before)
    assert {config.trial_key for config in edited.driver.run(*OPTIONS)[1].trained} == edited.open


def test_a_deleted_parent_is_named_until_it_is_restored(edited: Edited) -> None:
    parent = edited.store.parent_id
    edited.client.delete_run(parent)
    note = f"is missing, with grid.json and more_controls.json: restore run {parent} in MLflow"
    experiment = analyse_all(edited.driver.uri)
    assert note in "\n".join(experiment.notes)
    drawn_later = experiment.trials["stopped_at_epoch"].notna() & experiment.trials["control"]
    assert drawn_later.sum() == 2
    assert experiment.trials.loc[drawn_later, "control_chance"].isna().all()
    with pytest.raises(InputError, match=f"'tiny' is deleted, but not its trials; restore run {parent} in MLflow, or"):
        edited.driver.store()
    edited.client.restore_run(parent)
    assert edited.driver.store().parent_id == parent
    assert note not in "\n".join(read_experiment(edited.driver.uri, "tiny").notes)


def test_an_experiment_whose_runs_were_all_deleted_begins_anew(edited: Edited) -> None:
    for run in edited.client.search_runs([edited.store.experiment_id]):
        edited.client.delete_run(run.info.run_id)
    assert len(edited.driver.run(*OPTIONS)[1].trained) == PLANNED
    assert len(analyse_all(edited.driver.uri).trials) == PLANNED


@pytest.mark.parametrize("earlier", [False, True])
def test_of_several_parents_that_of_most_trials_counts(earlier: bool, edited: Edited) -> None:
    parent = edited.store.parent_id
    start = 1 if earlier else None
    edited.client.create_run(edited.store.experiment_id, start, tags={"kind": "grid"})
    edited.set_tag(edited.take(STOPPED), "kind", "grid")
    experiment = analyse_all(edited.driver.uri)
    assert experiment.parent_id == edited.driver.store().parent_id == parent
    assert "2 runs of kind grid: the one that most trials name counts" in experiment.notes


KEYS = [
    ("grid",), ("levels",), ("excluded",), ("cells",), ("trials",), ("order_seed",), ("seeds",), ("lr_scales",),
    ("controls",), ("settings",), ("commit",), ("versions",), ("host",), ("platform",), ("command",),
    ("data",), ("data", "name"), ("data", "per_class"), ("data", "train_images"), ("data", "val_images"),
    ("data", "classes"), ("rungs",), ("rungs", "epochs"), ("rungs", "factor"), ("rungs", "compared_within"),
]  # fmt: skip
JUNK = [None, True, -1, 0, 2.5, 10**400, math.nan, "nonsense", "", [], [[]], ["x"], {}, {"x": {}}]


@pytest.mark.slow
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:12])
def test_a_manifest_may_hold_anything_at_every_key(junk: object, edited: Edited) -> None:
    """`analysis` reads nothing from it that it can't use, and the driver continues; both say the same of the trials."""
    before = json.loads(edited.store.artifact("grid.json") or b"")
    read = read_experiment(edited.driver.uri, "tiny")
    for changed in [[key] for key in KEYS] + [KEYS[::-1]]:
        manifest = deepcopy(before)
        for *outer, name in changed:
            part = manifest
            for each in outer:
                part = part[each]
            part[name] = junk
        found = replace(read, manifest=manifest)
        assert (found.val_images or 1) >= 1
        assert (found.rung_factor or 1) >= 1
        verdict = Verdict(found, rank_cells(read.trials, val_images=found.val_images))
        assert _subtitle(found)
        assert list(headline(verdict))
    edited.store.attach(edited.store.parent_id, {"grid.json": json.dumps(manifest).encode()})
    pd.testing.assert_frame_equal(analyse_all(edited.driver.uri).trials, read.trials)
    request = read_confirmation(confirm_parser().parse_args(["--experiment", "tiny", "--store", edited.driver.uri]))
    with pytest.raises(InputError, match="does not say what it was trained on"):
        _load_as_before(edited.store.manifest(), [], request)
    assert edited.driver.run(*OPTIONS)[0] == 0
