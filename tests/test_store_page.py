"""docs/store.md names everything that a recorded grid holds, and nothing else."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from analysis.trial_table import COLUMNS
from grid.config import TrialConfig
from grid.metrics import EPOCH_METRICS, FINAL_METRIC, RUNG_METRIC, TEST_METRICS
from grid.record.commands import commands_of, read_command
from grid.record.lease import Lease
from grid.record.store import Store
from grid.train.code_version import NUMERIC_CODE
from tests.schema import check_answer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "store.md").read_text()
OURS = re.compile(r"(?!mlflow\.)")
"""MLflow adds names of its own."""


def documented(kind: str, column: str) -> set[str]:
    """Return the names in the first column of the tables of a section, such as the column `tag` of the kind `trial`."""
    _, _, rest = PAGE.partition(f"\n## Runs of kind `{kind}`\n")
    section = re.split(r"^## ", rest, flags=re.M)[0]
    tables = re.findall(rf"^\| {column}[^|]* \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", section, re.M)
    names = {
        name for table in tables for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    names -= {name for name in names if name.startswith("mlflow.")}  # as `tags_of`
    also = {"confirm": "trial", "refit": "confirm"}  # what the page says that they have as well
    return names | (documented(also[kind], column) if kind in also else set())


def runs_of(store: Store, kind: str) -> list[Run]:
    return list(store.client.search_runs([store.experiment_id], f"tags.kind = '{kind}'"))


def tags_of(runs: Iterable[Run]) -> set[str]:
    return {name for run in runs for name in run.data.tags if OURS.match(name)}


def metrics_of(runs: Iterable[Run]) -> set[str]:
    rung = f"{RUNG_METRIC}<epoch>"
    return {re.sub(rf"^{RUNG_METRIC}\d+$", rung, name) for run in runs for name in run.data.metrics}


def artifacts_of(client: MlflowClient, runs: Iterable[Run]) -> set[str]:
    paths = {path for run in runs for path in files_of(client, run.info.run_id)}
    plain = {re.sub(r"^commands/[^/]+\.json$", "commands/<id>.json", path) for path in paths}
    return {re.sub(r"^parts/\w+/.+$", "parts/<digest>/<file>", path) for path in plain}


def files_of(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    """Yield the paths of all artifacts of a run."""
    for artifact in client.list_artifacts(run_id, folder):
        if artifact.is_dir:
            yield from files_of(client, run_id, artifact.path)
        else:
            yield artifact.path


@pytest.mark.parametrize("kind", ["grid", "trial", "confirm"])
def test_a_finished_grid_holds_nothing_that_is_not_documented(kind: str, finished_store: Store) -> None:
    runs = runs_of(finished_store, kind)
    assert runs
    assert tags_of(runs) <= documented(kind, "tag")
    assert metrics_of(runs) <= documented(kind, "metric") | set(EPOCH_METRICS)
    assert artifacts_of(finished_store.client, runs) <= documented(kind, "artifact")


def test_the_tags_of_a_lease_are_documented(store: Store) -> None:
    store.record_seconds(1.0)
    with Lease(store):
        tags = store.client.get_experiment(store.experiment_id).tags
        lease = store.client.get_experiment_by_name(f"lease 1 on experiment {store.experiment_id}")
    section = PAGE.partition("\n## Experiment\n")[2].partition("\n## ")[0]
    names = set(re.findall(r"`([^`]+)`", section))
    assert {re.sub(r"^lease_\d+$", "lease_<n>", name) for name in tags if OURS.match(name)} == {"lease_<n>"} < names
    assert lease is not None
    assert set(lease.tags) <= names
    assert documented("grid", "tag") == tags_of(runs_of(store, "grid"))


def test_parameters_are_the_fields_of_a_configuration() -> None:
    assert documented("trial", "parameter") == {field.name for field in fields(TrialConfig)}


def test_metrics_are_those_that_the_code_records() -> None:
    assert documented("trial", "metric with history") <= set(EPOCH_METRICS)
    without = {f"{RUNG_METRIC}<epoch>", FINAL_METRIC, "best_val_accuracy", "epochs_run"}
    assert documented("trial", "metric without history") == without
    assert documented("confirm", "metric without history") == without | set(TEST_METRICS)


def test_analysis_reads_only_documented_names() -> None:
    names = documented("trial", "tag") | documented("trial", "parameter") | documented("trial", "metric")
    derived = {"run_id", "stop_epoch", "before_unfinished"}  # from tags and starts
    assert set(COLUMNS) - derived <= names


@pytest.fixture(scope="module")
def recorded(glyphs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[dict[str, Any]]]:
    """A tiny grid with early stopping, a control that is drawn later, and its finalists; what the commands print."""
    folder = tmp_path_factory.mktemp("real")
    uri, shared = f"sqlite:///{folder}/mlflow.db", ["--data-dir", str(glyphs_dir), "--address", "local"]
    small = ["--only", "model=mlp", "--only", "optimizer=adam", "--only", "dropout=off", "--per-class", "20"]
    parts = ["--parts", str(ROOT / "examples" / "own_factor.py")]
    own = ["--only", "activation=relu", "--only", "clipping=1.0,0.1"]
    grid = ["grid.run", "--grid", "smoke", *small, *parts, *own, "--epochs", "2", "--controls", "0"]
    confirm = ["grid.confirm", "--top", "1", "--seeds", "1", *parts]
    answers: list[dict[str, Any]] = []
    for command in (grid, [*grid, "--more-controls", "1"], confirm):
        arguments = [*command, *shared, "--store", uri, "--experiment", "tiny", "--json"]
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, check=True, capture_output=True)
        answers.append(json.loads(done.stdout))
    store = Store(uri, "tiny")
    store.create()
    return store, answers


@pytest.fixture(scope="module")
def real_store(recorded: tuple[Store, list[dict[str, Any]]]) -> Store:
    return recorded[0]


@pytest.mark.slow
def test_commands_that_train_are_answered_by_the_schema(recorded: tuple[Store, list[dict[str, Any]]]) -> None:
    for answer in recorded[1]:
        check_answer("run", answer)
        assert (answer["exit_code"], len(answer["cells"])) == (0, 4)


@pytest.mark.slow
def test_the_commands_record_exactly_what_is_documented(real_store: Store) -> None:
    grid, trials, finalists = (runs_of(real_store, kind) for kind in ("grid", "trial", "confirm"))
    assert tags_of(grid) == documented("grid", "tag")
    assert artifacts_of(real_store.client, grid) == documented("grid", "artifact")
    no_gpu = set() if torch.cuda.is_available() else {"driver_version"}
    none_failed_or_is_new = {"error", "controls_rounds_before"}
    assert tags_of(trials) == documented("trial", "tag") - none_failed_or_is_new - no_gpu
    for runs in (trials, finalists):
        params = {name for run in runs for name in run.data.params}
        assert params == documented("trial", "parameter") | {"clipping"}
    one_size = {"val_balanced_accuracy"}  # of all classes
    assert metrics_of(trials) == (documented("trial", "metric") | set(EPOCH_METRICS)) - one_size
    drawn = {"would_stop_at_epoch", "control_chance", "controls_rounds_before"}  # no finalist is drawn
    assert (
        tags_of(finalists)
        == documented("confirm", "tag") - {"error", "stopped_at_epoch", "resumed_by", *drawn} - no_gpu
    )
    assert metrics_of(finalists) == (documented("confirm", "metric") | set(EPOCH_METRICS)) - one_size
    assert artifacts_of(real_store.client, finalists) == documented("confirm", "artifact") - {"traceback.txt"}


def rows_of(section: str) -> list[list[str]]:
    """Return the rows of the table of a section, cut into cells."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [row.split("|") for row in text.splitlines() if row.startswith("| `")]


@pytest.mark.slow
def test_the_record_of_every_command_has_the_documented_keys(real_store: Store) -> None:
    names = {name for row in rows_of("The commands") for name in re.findall(r"`(\w+)`", row[1])}
    ids = commands_of([*real_store.trials().values(), *real_store.trials("confirm").values()])
    records = [read_command(real_store, command_id) for command_id in ids]
    assert [record["command"][2] for record in records] == ["grid.confirm", "grid.run", "grid.run"]
    assert [set(record) for record in records] == [names - {"plan"}, names, names]
    (versions,) = [row[2] for row in rows_of("The commands") if row[1].strip() == "`versions`"]
    assert set(re.findall(r"`(\w+)`", versions)) == set(records[0]["versions"])
    described = real_store.manifest()
    assert described["record"] == f"commands/{ids[1]}.json"
    assert described.items() >= records[1]["plan"].items()


def test_the_page_names_the_code_that_is_hashed() -> None:
    (sentence,) = re.findall(r"^The hashed files are (.+?)\. ", PAGE, re.M | re.S)
    assert {name.rstrip("/") for name in re.findall(r"`([^`]+)`", sentence)} == set(NUMERIC_CODE)


@pytest.mark.slow
def test_the_manifest_has_the_documented_keys(real_store: Store) -> None:
    rows = rows_of("The manifest")
    manifest = real_store.manifest()
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} == set(manifest)
    for row in rows:
        parts = manifest[row[1].strip(" `")] if row[1].strip() in ("`rungs`", "`data`") else {}
        assert set(re.findall(r"`(\w+)`", row[2])) == set(parts), row
    assert json.dumps(manifest)
