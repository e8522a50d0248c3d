"""The only reader of MLflow: an experiment becomes tables with a row per trial.

It relies on the contract in docs/store.md alone, so that it also reads a store that another program wrote by that
contract. Runs that can't be used are counted and reported.
"""

import atexit
import gc
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from grid.store_client import (
    artifact_contents,
    client_uri,
    experiment_names,
    find_experiment,
    log_in,
    missing_experiment,
    mlflow_settings,
    repeating,
    store_problem,
    waiting_for,
)
from grid.store_uri import BUSY_SECONDS, check_store_uri, sqlite_path, sqlite_tables

os.environ.update(mlflow_settings())

import mlflow.db
import mlflow.exceptions
import pandas as pd
from alembic.util import CommandError
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from analysis.trial_table import Rounds, lost_finalists, not_started, tabulate, unfinished_rounds, unknown_chances
from grid.config import FACTORS, SETTINGS, InputError, factors_among
from grid.masking import mask
from grid.recorded import (
    CONFIRM,
    FINALIST_KINDS,
    MANIFEST,
    PARENT_TAG,
    REFIT,
    ROUNDS,
    choose_parent,
    command_path,
    is_parent,
    parse_rounds,
)
from grid.wording import count, first_line

LARGEST = 10**9
"""Number that a manifest may name; nothing that it counts is larger."""
PAGE_SIZE = 5000
SERVER_PAGE_SIZE = 1000
"""Of a server: it has a limited time for an answer."""
NEEDS_WRITING = ("readonly database", "unable to open database file", "out-of-date database schema")
"""In errors of a store that has to be recovered, or given the tables of this version of MLflow, before it is read."""
UNREACHABLE = (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError, ImportError)


class NothingEndedError(InputError):
    """No trial of an experiment has ended yet."""


@dataclass(frozen=True)
class GridState:
    """What the store says of a grid at one glance; it differs once another trial has ended."""

    last_end: tuple[str, int | None]
    """Id of the run that ended last, and when, in milliseconds since 1970."""
    status: str
    """MLflow's, of the parent run; empty if there is none."""
    driver: str
    """`HOST:PID` of the driver that holds the lease; empty if none does."""

    @property
    def has_ended(self) -> bool:
        """Whether every trial has ended, and no driver is at work, such as one that tests finalists."""
        return self.status == "FINISHED" and not self.driver


@dataclass(frozen=True)
class Experiment:
    """One experiment, as read from the store."""

    uri: str
    name: str
    parent_id: str
    """The run with tag `kind=grid`; empty if there is none."""
    trials: pd.DataFrame
    """A row per ended trial: `COLUMNS`, the factors and, for each rung in order, `val_accuracy_at_<epoch>` (float)."""
    finalists: pd.DataFrame
    """A row per ended training of a finalist: `COLUMNS`, the factors and `TEST_METRICS` (NaN before the test)."""
    manifest: Mapping[str, Any]
    """`grid.json`; empty if there is none."""
    notes: tuple[str, ...]
    """One sentence for each kind of run that the tables leave out."""
    refits: pd.DataFrame = field(default_factory=pd.DataFrame)
    """As `finalists`, of the best finalist trained on most validation images as well; empty if that was not done."""

    def described(self, part: str) -> Mapping[str, Any]:
        """Return an object in the manifest; empty if it is missing or not an object."""
        found = self.manifest.get(part)
        return found if isinstance(found, Mapping) else {}

    @property
    def planned(self) -> int | None:
        """Number of trials of the grid; None if the store does not say."""
        return _whole(self.manifest.get("trials"), at_least=1)

    @property
    def val_images(self) -> int | None:
        """Number of validation images; None if the store does not say."""
        return _whole(self.described("data").get("val_images"), at_least=1)

    @property
    def classes(self) -> int | None:
        """Number of classes of the data set; None if the store does not say."""
        names = self.described("data").get("classes")
        return len(names) if isinstance(names, list) and names else None

    @property
    def rung_factor(self) -> int | None:
        """One trial in this many continues at a rung, 1 for no stopping; None if the store does not say."""
        return _whole(self.described("rungs").get("factor"), at_least=1)

    @property
    def compared_within(self) -> tuple[str, ...] | None:
        """Factors whose levels trials share with those that ASHA compares them with; None if the store does not say."""
        text = self.described("rungs").get("compared_within")
        factors = tuple(filter(None, text.split(","))) if isinstance(text, str) else None
        return factors if factors is not None and set(factors) <= {*FACTORS, *SETTINGS} else None


def read_experiment(uri: str | None, name: str) -> Experiment:
    """Read an experiment with one (paged) search.

    Args:
        uri: MLflow tracking URI; None for the `default_store_uri`. It may be read-only: nothing is written to it.
        name: Of the experiment.

    Raises:
        NothingEndedError: None of its trials has ended.
        InputError: The store does not answer or has no such experiment.
    """
    uri = check_store_uri(uri, read_only=True)
    with answering(uri) as client:
        experiment_id = _find(client, uri, name)
        runs = list(_search(client, uri, experiment_id))
        deleted = sum(1 for _ in _search(client, uri, experiment_id, view=ViewType.DELETED_ONLY))
    by_kind = _by_kind(runs)
    if not by_kind["trial"]:
        raise NothingEndedError(f"experiment '{name}' in {mask(uri)} has no trial yet; run python -m grid.run first")
    parent = _choose_parent(by_kind["grid"], by_kind["trial"])
    parent_id = parent.info.run_id if parent else ""
    notes = _parent_notes(by_kind["grid"], by_kind["trial"])
    files = read_artifacts(uri, parent_id, (MANIFEST, ROUNDS))
    manifest, problem = _parse_manifest(files.get(MANIFEST) or b"{}")
    notes += [problem] if problem else []
    rounds = _parse_rounds(files.get(ROUNDS) or b"[]")
    trials, left_out = tabulate(by_kind["trial"], "trial", rounds)
    if trials.empty:
        reasons = "; ".join(left_out)
        raise NothingEndedError(
            f"no trial of experiment '{name}' in {mask(uri)} has ended yet ({reasons}); wait for one"
        )
    factors = factors_among(trials.columns)
    finalists, left_out_finalists = tabulate(by_kind[CONFIRM], "finalist", (), factors)
    refits, left_out_refits = tabulate(by_kind[REFIT], "refit", (), factors)
    foreign = len(by_kind[""])
    notes = [
        *left_out,
        *left_out_finalists,
        *left_out_refits,
        *lost_finalists(finalists, "finalist"),
        *lost_finalists(refits, "refit"),
        *([f"{count(foreign, 'run')} left out: no tag kind=grid, trial, confirm or refit"] if foreign else []),
        *([f"{count(deleted, 'run')} left out: deleted"] if deleted else []),
        *notes,
        *not_started(manifest, len(by_kind["trial"])),
        *unfinished_rounds(rounds, trials),
        *unknown_chances(trials),
    ]
    return Experiment(uri, name, parent_id, trials, finalists, manifest, tuple(notes), refits)


def read_state(uri: str | None, name: str) -> GridState:
    """Read two runs of an experiment, however many it has: the one that ended last, and the parent.

    Args:
        uri: As for `read_experiment`.
        name: Of the experiment.

    Raises:
        InputError: The store does not answer or has no such experiment.
    """
    uri = check_store_uri(uri, read_only=True)
    with answering(uri) as client:
        experiment_id = _find(client, uri, name)
        with waiting_for(uri):
            latest = client.search_runs([experiment_id], max_results=1, order_by=["attributes.end_time DESC"])
        parent = _find_parent(client, uri, experiment_id)
    last_end = (latest[0].info.run_id, latest[0].info.end_time) if latest else ("", None)
    driver = parent.data.tags.get("driver", "") if parent else ""
    return GridState(last_end, parent.info.status if parent else "", driver)


def read_manifests(uri: str | None, limit: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and manifests of a store's experiments, the latest first.

    Args:
        uri: As for `read_experiment`.
        limit: Experiments to look at, at most.

    Raises:
        InputError: The store does not answer.
    """
    uri = check_store_uri(uri, must_exist=True)
    with answering(uri) as client:
        experiments = client.search_experiments(order_by=["creation_time DESC"], max_results=limit)
        for experiment in experiments:
            yield experiment.name, _parse_manifest(_read_manifest(client, uri, experiment.experiment_id))[0]


def _find_parent(client: MlflowClient, uri: str, experiment_id: str) -> Run | None:
    runs = _search(client, uri, experiment_id, "tags.kind = 'grid'")
    parents = [run for run in runs if is_parent(run.data.tags)]
    return _choose_parent(parents, _search(client, uri, experiment_id, "tags.kind = 'trial'"))


def _read_manifest(client: MlflowClient, uri: str, experiment_id: str) -> bytes:
    parent = _find_parent(client, uri, experiment_id)
    if parent is None:
        return b"{}"
    with waiting_for(uri):
        return artifact_contents(client, uri, parent, [MANIFEST]).get(MANIFEST) or b"{}"


def _by_kind(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of each kind; those of unknown kinds are under no name."""
    by_kind: dict[str, list[Run]] = {"grid": [], "trial": [], **{kind: [] for kind in FINALIST_KINDS}, "": []}
    for run in runs:
        kind = run.data.tags.get("kind", "")
        is_known = kind in by_kind and (kind != "grid" or is_parent(run.data.tags))
        by_kind[kind if is_known else ""].append(run)
    return by_kind


def _choose_parent(parents: Iterable[Run], trials: Iterable[Run]) -> Run | None:
    runs = {run.info.run_id: run for run in sorted(parents, key=lambda run: run.info.start_time)}
    return runs.get(choose_parent(list(runs), (run.data.tags.get(PARENT_TAG, "") for run in trials)))


def _parent_notes(parents: Sequence[Run], trials: Iterable[Run]) -> list[str]:
    """Return what is wrong with the runs of kind `grid`."""
    named = Counter(run.data.tags.get(PARENT_TAG, "") for run in trials)
    missing = set(named) - {run.info.run_id for run in parents} - {""}
    notes = [f"{len(parents)} runs of kind grid: the one that most trials name counts"] if len(parents) > 1 else []
    return notes + [
        f"the run of kind grid that {count(named[run_id], 'trial')} name is missing, with {MANIFEST} and {ROUNDS}: "
        f"restore run {run_id} in MLflow"
        for run_id in sorted(missing)
    ]


def _parse_manifest(content: bytes) -> tuple[Mapping[str, Any], str]:
    """Return the manifest and the reason why it could not be read, if any."""
    try:
        manifest = json.loads(content)
        json.dumps(manifest, ensure_ascii=False).encode()  # else half a surrogate pair could not be printed
    except (ValueError, RecursionError) as error:
        return {}, f"the manifest ({MANIFEST}) is damaged and was ignored: {first_line(error)}"
    if not isinstance(manifest, dict):
        return {}, f"the manifest ({MANIFEST}) is not a JSON object and was ignored"
    return manifest, ""


def _parse_rounds(content: bytes) -> Rounds | None:
    """Return the rounds of controls that were drawn after the grid had ended; None if they can't be read."""
    try:
        return parse_rounds(content)
    except ValueError:
        return None


def _whole(value: object, *, at_least: int) -> int | None:
    """Return a value if it is a whole number in range; another program may have written anything."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if at_least <= value <= LARGEST else None


def read_artifact(uri: str, run_id: str, path: str) -> bytes | None:
    """Return the content of a run's artifact; None if there is no such artifact. See `read_artifacts`."""
    return read_artifacts(uri, run_id, [path]).get(path)


def read_artifacts(uri: str, run_id: str, paths: Collection[str]) -> dict[str, bytes]:
    """Return path -> content of those artifacts of a run that exist.

    Args:
        uri: Of the store.
        run_id: Empty for no run, which has none.
        paths: Such as `test/confusion.png`.

    Raises:
        InputError: The store does not answer.
    """
    if not run_id:
        return {}
    with answering(uri) as client, waiting_for(uri):
        return artifact_contents(client, uri, client.get_run(run_id), paths)


def read_commands(experiment: Experiment, command_ids: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Return the records of commands by their ids; empty if a record is missing or damaged.

    Raises:
        InputError: The store does not answer.
    """
    paths = {command_id: command_path(command_id) for command_id in command_ids}
    contents = read_artifacts(experiment.uri, experiment.parent_id, paths.values())
    return {command_id: _parse_manifest(contents.get(path) or b"{}")[0] for command_id, path in paths.items()}


@contextmanager
def answering(uri: str) -> Iterator[MlflowClient]:
    """Open a store for reading, and turn the errors of one that is down, locked or slow into an `InputError`.

    Args:
        uri: From `grid.store_uri.check_store_uri`.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it logs the tracebacks of what it also raises
    try:
        with repeating():
            yield _open(uri)
    except (*UNREACHABLE, CommandError, sqlite3.Error) as error:
        raise InputError(f"can't read the store {mask(uri)}: {store_problem(error, uri)}") from error


def _open(uri: str) -> MlflowClient:
    """Return a client that changes nothing: of a sqlite file itself or, if it can't be read as it is, of a copy."""
    path = sqlite_path(uri)
    if path is None:
        log_in(uri)
        return MlflowClient(tracking_uri=uri)
    try:
        with waiting_for(uri):
            sqlite_tables(path, patience_seconds=BUSY_SECONDS)
        return MlflowClient(tracking_uri=client_uri(uri, read_only=True))
    except (*UNREACHABLE, sqlite3.Error) as error:
        if not any(symptom in str(error) for symptom in NEEDS_WRITING):
            raise
        with waiting_for(uri):
            return MlflowClient(tracking_uri=_copy(path, path.stat().st_mtime_ns))


@cache
def _copy(path: Path, changed: int) -> str:
    """Return the URI of a copy of a sqlite store, for the rest of the process; its tables are those of this MLflow.

    Args:
        path: Of the store.
        changed: When it was last changed; a copy is as old as that.
    """
    folder = tempfile.TemporaryDirectory(prefix="store-", suffix=f"-{changed}")
    atexit.register(folder.cleanup)
    for suffix in ("", "-journal", "-wal"):  # what sqlite needs to restore the last transaction
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{folder.name}/mlflow.db{suffix}")
    uri = f"sqlite:///{folder.name}/mlflow.db"
    mlflow.db.upgrade.main([uri], standalone_mode=False)
    return uri


def _find(client: MlflowClient, uri: str, name: str) -> str:
    with waiting_for(uri):
        found = find_experiment(client, uri, name)
    if found is None:
        raise missing_experiment(name, uri, experiment_names(client))
    if found.lifecycle_stage == "deleted":
        raise InputError(f"experiment '{name}' is deleted in {mask(uri)}; restore it or name another --experiment")
    return str(found.experiment_id)


def _search(
    client: MlflowClient, uri: str, experiment_id: str, query: str = "", view: int = ViewType.ACTIVE_ONLY
) -> Iterator[Run]:
    size = SERVER_PAGE_SIZE if uri.startswith("http") else PAGE_SIZE
    token = None
    while token != "":
        with _no_collection(), waiting_for(uri):
            page = client.search_runs([experiment_id], query, view, size, page_token=token)
        yield from page
        token = page.token or ""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection: MLflow creates 45 objects per run, and scanning them takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
