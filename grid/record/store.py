"""One experiment in an MLflow store, as the driver sees it."""

import json
import logging
import os
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from grid.config import InputError, TrialConfig
from grid.files import sync
from grid.masking import mask
from grid.metrics import recorded_rungs
from grid.recorded import (
    GRID_SECONDS,
    MANIFEST,
    PARENT_TAG,
    TWIN,
    RecordedTrial,
    UnreadableError,
    choose_parent,
    drop_twins,
    first_values,
    is_parent,
    read_grid_seconds,
    read_trial,
)
from grid.store_client import (
    artifact_contents,
    experiment_names,
    find_experiment,
    missing_experiment,
    mlflow_settings,
    repeating,
    store_problem,
    waiting_for,
)
from grid.store_uri import artifact_location, local_path
from grid.wording import first_line

os.environ.update(mlflow_settings())

import mlflow.exceptions
from alembic.util import CommandError
from mlflow.entities import Metric, RunTag, ViewType
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import DataError, SQLAlchemyError

from grid.record.database import open_client
from grid.record.fence import Fence, Fenced, LeaseLostError

PAGE_SIZE = 1000
UNREACHABLE = (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError)
"""What a store raises when it is down, locked or slow."""


@dataclass(frozen=True)
class StoredTrial:
    """A trial as the store holds it."""

    run_id: str
    status: str
    """One of `grid.metrics.STATUSES`, or empty while it has not ended."""
    config: TrialConfig
    metrics: Mapping[str, float]
    """Last value of each."""
    control: bool
    control_chance: float | None = None
    """With which it was drawn to be one when it began; None if the store does not say."""
    reopened: bool = False
    """Whether it was stopped and trains on as a control that was drawn later; see `Store.reopen`."""
    was_stopped: bool = False
    """Whether ASHA stopped it."""
    stop_epoch: int | None = None
    """Rung at which ASHA stopped it or, if it is a control, would have."""
    val_accuracies: tuple[float, ...] = ()
    """After each recorded epoch of a trial that has to continue, NaN for a diverged epoch; empty for other trials."""
    tags: Mapping[str, str] = field(default_factory=dict)


class Store:
    """One experiment in an MLflow store.

    Args:
        uri: Checked by `grid.store_uri.check_store_uri`.
        experiment: Its name; `create` creates it if it is missing.

    Raises:
        InputError: The store can't be opened.
    """

    def __init__(self, uri: str, experiment: str):
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it logs the tracebacks of what it also raises
        self.uri = uri
        self.experiment = experiment
        try:
            self.client = open_client(uri)
        except (*UNREACHABLE, CommandError, ImportError, sqlite3.Error) as error:
            raise InputError(f"can't open the store {mask(uri)}: {first_line(error)}; pass another --store") from error
        self.experiment_id = ""
        self.parent_id = ""
        """The run with tag `kind=grid`; empty if there is none yet."""
        self.lost = ""
        """Who has taken the experiment over from this driver, as a message; empty while nobody has."""
        self.left_out: dict[str, list[str]] = {}
        """Why `trials` last left runs out -> their ids."""

    def create(self) -> None:
        """Create database, experiment and parent run if they are missing; nobody else does so at the same time."""
        self.open()
        self.create_parent()

    def open(self, *, missing: bool = True) -> None:
        """Create database and experiment if they are missing; another driver may do so at the same time.

        To be called before other threads write through MLflow.

        Args:
            missing: Whether a missing experiment may be created.

        Raises:
            InputError: The store can't be written, or the experiment is deleted or missing.
        """
        with self.answering(), repeating():
            found = find_experiment(self.client, self.uri, self.experiment)
            if found is None and not missing:
                raise missing_experiment(self.experiment, self.uri, experiment_names(self.client))
            found = found or self._create_experiment()
            if found.lifecycle_stage == "deleted":
                hint = "restore it or pass another --experiment"
                raise InputError(f"experiment '{self.experiment}' is deleted in {mask(self.uri)}; {hint}")
            self.experiment_id = found.experiment_id
            self.parent_id = self._find_parent()

    def create_parent(self) -> None:
        """Create the parent run if it is missing; only who holds the lease may.

        Raises:
            InputError: The store can't be written.
        """
        with self.answering():
            self.parent_id = self._find_parent() or self._create_parent()

    def fence(self, fence: Fence) -> None:
        """Ask a fence before everything that writes."""
        self.client = cast(MlflowClient, Fenced(self.client, fence))

    def _create_experiment(self) -> Any:
        location = artifact_location(self.uri, self.experiment)
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view for trainings
        try:
            return self.client.get_experiment(self.client.create_experiment(self.experiment, location, tags))
        except mlflow.exceptions.MlflowException as error:
            if not already_exists(error):
                raise
            return self.client.get_experiment_by_name(self.experiment)  # another driver was faster

    def _find_parent(self) -> str:
        """Return the run of kind `grid` that most trials name; empty if there is none.

        Raises:
            InputError: It is deleted, and its trials are not.
        """
        parents = self._parents(ViewType.ACTIVE_ONLY)
        if not parents:
            self._refuse_deleted_parent()
        return choose_parent(parents, (run.data.tags.get(PARENT_TAG, "") for run in self._search("trial")))

    def _parents(self, view: int) -> list[str]:
        """Return the parents of trials, oldest first."""
        order = ["attributes.start_time"]
        found = self.client.search_runs([self.experiment_id], "tags.kind = 'grid'", view, order_by=order)
        return [run.info.run_id for run in found if is_parent(run.data.tags)]

    def _refuse_deleted_parent(self) -> None:
        for run_id in self._parents(ViewType.DELETED_ONLY):
            orphans = f"tags.kind = 'trial' and tags.`{PARENT_TAG}` = '{run_id}'"
            if self.client.search_runs([self.experiment_id], orphans, max_results=1):
                what = f"the run of kind grid of experiment '{self.experiment}' is deleted, but not its trials"
                raise InputError(f"{what}; restore run {run_id} in MLflow, or delete the trials as well")

    def _create_parent(self) -> str:
        run = self.client.create_run(self.experiment_id, tags={"kind": "grid"}, run_name=self.experiment)
        return str(run.info.run_id)

    def is_gone(self, run_id: str | None, error: BaseException) -> bool:
        """Return whether a write failed because its run was deleted, so that no later attempt can succeed."""
        if run_id is None or not isinstance(error, mlflow.exceptions.MlflowException):
            return False
        # Asked twice: the experiment, which was deleted with its runs, may be restored between these questions.
        return self._is_run_deleted(run_id) and not self._is_deleted() and self._is_run_deleted(run_id)

    def _is_run_deleted(self, run_id: str) -> bool:
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except mlflow.exceptions.MlflowException as missing:
            return bool(missing.error_code == "RESOURCE_DOES_NOT_EXIST")

    def is_refusal(self, error: BaseException) -> bool:
        """Return whether a write failed for what was written, so that no later attempt can succeed."""
        if isinstance(error.__cause__, DataError):
            return True
        if "must be in the 'active' state" in str(error):  # deleted then, and perhaps restored by now
            return False
        code = getattr(error, "error_code", "")
        return code == "INVALID_PARAMETER_VALUE" and not self._is_deleted()

    def _is_deleted(self) -> bool:
        """Return whether the experiment is deleted, which refuses every write until somebody restores it."""
        return bool(self.client.get_experiment(self.experiment_id).lifecycle_stage == "deleted")

    def artifact(self, name: str) -> bytes | None:
        """Return a file of the parent run; None if it has no such file. See `artifacts`."""
        return self.artifacts(name).get(name)

    def artifacts(self, *names: str) -> dict[str, bytes]:
        """Return those files of the parent run that exist, such as `grid.json` or `commands/ID.json`, by name.

        Raises:
            InputError: The store does not answer.
        """
        if not self.parent_id:
            return {}
        with self.answering(), _errors_of_artifact_stores():
            run = self.client.get_run(self.parent_id)
            return artifact_contents(self.client, self.uri, run, names)

    def manifest(self) -> dict[str, Any]:
        """Return `grid.json`; empty if there is none, or it is damaged.

        Raises:
            InputError: The store does not answer.
        """
        try:
            manifest = json.loads(self.artifact(MANIFEST) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def attach(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Add files to the artifacts of a run, replacing earlier ones.

        Args:
            run_id: Which run.
            files: Path, such as `test/confusion.csv` -> content.
        """
        with tempfile.TemporaryDirectory() as folder:
            for path, content in files.items():
                file = Path(folder, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            if files:
                with _errors_of_artifact_stores():
                    self.client.log_artifacts(run_id, folder)
                    self._sync(run_id, files)

    def _sync(self, run_id: str, paths: Iterable[str]) -> None:
        """Return once artifacts in a folder of this machine are on the disk; MLflow only copies them."""
        location = self.client.get_run(run_id).info.artifact_uri
        for path in paths if urlsplit(location).scheme in ("", "file") else ():
            artifact = local_path(location) / path
            with suppress(FileNotFoundError):
                sync(artifact)
                sync(artifact.parent)

    def log_test(self, run_id: str, metrics: Mapping[str, float], model_id: str | None = None) -> None:
        """Record the test results of a finalist in one request.

        Args:
            run_id: Of the finalist.
            metrics: `grid.metrics.TEST_METRICS`.
            model_id: Of its logged model; MLflow shows the metrics with it.
        """
        now = time.time_ns() // 1_000_000
        values = [Metric(name, value, now, 0, model_id=model_id) for name, value in metrics.items()]
        tags = [] if model_id is None else [RunTag("model_id", model_id)]
        self.client.log_batch(run_id, metrics=values, tags=tags)

    def run_ids(self, kind: str = "trial", trial_key: str = "") -> dict[str, str]:
        """Return trial key -> run id of all recorded trials of a kind, or of one trial.

        A run whose parameters have not arrived yet is one of them, unless its trial has another.
        """
        runs = list(self._search(kind, trial_key))
        begun = {run.data.tags["trial_key"]: run.info.run_id for run in runs if _has_only_begun(run)}
        read, _ = _read(runs)
        return begun | {key: trial.run_id for key, trial in read.items()}

    def trials(self, kind: str = "trial") -> dict[str, StoredTrial]:
        """Return the recorded trials by their keys; `left_out` says which runs were left out.

        Args:
            kind: `trial` for those of the grid, `confirm` for finalists.

        Raises:
            InputError: The store does not answer.
        """
        with self.answering():
            read, self.left_out = _read(self._search(kind))
            return {key: self._stored(trial) for key, trial in read.items()}

    def grid_seconds(self) -> float:
        """Return in how many seconds trials of the grid have been trained, by all commands; 0 if nothing is recorded.

        Raises:
            InputError: The store does not answer.
        """
        with self.answering():
            return read_grid_seconds(self.client.get_run(self.parent_id).data.tags)

    def record_seconds(self, seconds: float) -> None:
        """Record in how many seconds trials of the grid have been trained, by all commands."""
        self.client.set_tag(self.parent_id, GRID_SECONDS, f"{seconds:.1f}")

    def reopen(self, trial: StoredTrial) -> StoredTrial:
        """Return a stopped trial as one that has to continue, as an unstopped control.

        Raises:
            InputError: The store does not answer.
        """
        with self.answering():
            accuracies = self._accuracies(trial.run_id, trial.config.epochs)
        return replace(trial, status="", control=True, reopened=True, was_stopped=False, val_accuracies=accuracies)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turn the errors of a store that is down, locked or slow into an `InputError`."""
        try:
            with waiting_for(self.uri):
                yield
        except UNREACHABLE as error:
            raise InputError(f"can't use the store {mask(self.uri)}: {store_problem(error, self.uri)}") from error

    def _search(self, kind: str, trial_key: str = "") -> Iterable[Any]:
        query = f"tags.kind = '{kind}'" + (f" and tags.trial_key = '{trial_key}'" if trial_key else "")
        token = None
        while token != "":
            page = self.client.search_runs([self.experiment_id], query, max_results=PAGE_SIZE, page_token=token)
            yield from page
            token = page.token or ""

    def _stored(self, trial: RecordedTrial) -> StoredTrial:
        ended = trial.status not in ("", "failed")
        accuracies = () if ended else self._accuracies(trial.run_id, trial.config.epochs)
        last = trial.epochs_run if trial.status else len(accuracies)
        rungs = {name for name in trial.metrics if any(epoch > last for epoch in recorded_rungs([name]))}
        metrics = {name: value for name, value in trial.metrics.items() if name not in rungs}
        return StoredTrial(
            run_id=trial.run_id,
            status=trial.status,
            config=trial.config,
            metrics=metrics | ({"epochs_run": trial.epochs_run} if trial.status else {}),
            control=trial.control,
            control_chance=trial.control_chance,
            tags=trial.tags,
            was_stopped=trial.stopped_at is not None and trial.would_stop_at is None,
            stop_epoch=trial.stop_epoch,
            val_accuracies=accuracies,
        )

    def _accuracies(self, run_id: str, epochs: int) -> tuple[float, ...]:
        """Return the accuracies up to the last recorded epoch of the budget, NaN where one is missing."""
        accuracies = first_values(self.client.get_metric_history(run_id, "val_accuracy"))
        recorded = first_values(self.client.get_metric_history(run_id, "epoch_seconds"))
        last = max((epoch for epoch in recorded if epoch <= epochs), default=0)
        return tuple(accuracies.get(epoch, nan) for epoch in range(1, last + 1))


@contextmanager
def _errors_of_artifact_stores() -> Iterator[None]:
    """Turn the errors of the libraries that carry artifacts, such as botocore's, into an `OSError`."""
    try:
        yield
    except (*UNREACHABLE, LeaseLostError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def already_exists(error: mlflow.exceptions.MlflowException) -> bool:
    """Return whether something was not created because there is one of that name."""
    return bool(error.error_code == "RESOURCE_ALREADY_EXISTS")


def _has_only_begun(run: Any) -> bool:
    return "trial_key" in run.data.tags and not run.data.params


def _read(runs: Iterable[Any]) -> tuple[dict[str, RecordedTrial], dict[str, list[str]]]:
    """Return the runs that can be read as trials, by key, and why others were left out -> their ids.

    Of several runs of a trial one counts.
    """
    read = []
    left_out = defaultdict(list)
    for run in runs:
        try:
            read.append(_read_run(run))
        except UnreadableError as reason:
            left_out[str(reason)].append(run.info.run_id)
    counting, twins = drop_twins(read)
    if twins:
        left_out[TWIN] = twins
    return counting, dict(left_out)


def _read_run(run: Any) -> RecordedTrial:
    """Return a run that can be continued.

    Raises:
        UnreadableError: It can't be read, or lacks parameters.
    """
    trial = read_trial(run.info.run_id, run.data.tags, run.data.params, run.data.metrics)
    if not trial.complete:
        raise UnreadableError("parameters are missing")
    return trial
