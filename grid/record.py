"""The only MLflow writer: a background thread that carries events from the spool to the store, in batches.

The driver appends an event and goes on; nothing here makes Tune's loop wait for a database or a server.
"""

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid.config import InputError, TrialConfig
from grid.spool import Event, Spool
from grid.store_uri import artifact_location, slug

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow.exceptions
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

BATCH_SIZE = 900
"""Metrics in one request; MLflow allows 1000 entries of all kinds."""
PARAM_BATCH_SIZE = 90
PAGE_SIZE = 1000
LONGEST_WAIT_SECONDS = 30.0
"""Between two attempts to reach a store that does not answer."""


@dataclass(frozen=True)
class StoredTrial:
    """A trial as the store has it."""

    run_id: str
    status: str
    """One of `grid.config.STATUSES`, or empty while it has not ended."""
    config: TrialConfig
    metrics: Mapping[str, float]
    """Last value of each."""
    control: bool
    val_accuracies: tuple[float, ...] = ()
    """Validation accuracy after each recorded epoch of a trial that has not ended; empty for the others."""


class Store:
    """One experiment in an MLflow store.

    Args:
        uri: Checked by `grid.store_uri.check_store_uri`.
        experiment: Made by `create` if missing.

    Raises:
        InputError: The store can't be opened.
    """

    def __init__(self, uri: str, experiment: str):
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri
        self.experiment = experiment
        try:
            self.client = MlflowClient(tracking_uri=uri)
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, ImportError) as error:
            raise InputError(f"can't open the store {uri}: {_first_line(error)}; pass another --store") from error
        self.experiment_id = ""

    def create(self) -> None:
        """Make database and experiment where they are missing.

        Raises:
            InputError: The store can't be written, or the experiment was deleted in it.
        """
        try:
            found = self.client.get_experiment_by_name(self.experiment)
            if found is None:
                location = artifact_location(self.uri, self.experiment)
                tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view for trainings
                self.experiment_id = self.client.create_experiment(self.experiment, location, tags)
                return
        except mlflow.exceptions.MlflowException as error:
            raise InputError(
                f"can't write to the store {self.uri}: {_first_line(error)}; pass another --store"
            ) from error
        if found.lifecycle_stage == "deleted":
            raise InputError(
                f"experiment '{self.experiment}' is deleted in {self.uri}; restore it or pass another --experiment"
            )
        self.experiment_id = found.experiment_id

    def parent_run(self) -> str | None:
        """Return the id of the run with tag `kind=grid`."""
        runs = self.client.search_runs([self.experiment_id], "tags.kind = 'grid'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def trials(self) -> dict[str, StoredTrial]:
        """Return the recorded trials by their keys."""
        stored = {}
        token = None
        while token != "":
            page = self.client.search_runs(
                [self.experiment_id],
                "tags.kind = 'trial'",
                ViewType.ACTIVE_ONLY,
                max_results=PAGE_SIZE,
                page_token=token,
            )
            stored.update({run.data.tags["trial_key"]: self._stored(run) for run in page})
            token = page.token or ""
        return stored

    def _stored(self, run: Any) -> StoredTrial:
        tags = run.data.tags
        status = tags.get("status", "")
        unfinished = status in ("", "failed")
        history = self.client.get_metric_history(run.info.run_id, "val_accuracy") if unfinished else []
        return StoredTrial(
            run_id=run.info.run_id,
            status=status,
            config=TrialConfig.from_params(run.data.params),
            metrics=run.data.metrics,
            control=tags.get("control") == "true",
            val_accuracies=tuple(point.value for point in sorted(history, key=lambda point: point.step)),
        )


class Recorder:
    """Takes what trials report and sees that it reaches the store.

    Args:
        store: Where to.
        spool: Keeps what has not arrived yet.
    """

    def __init__(self, store: Store, spool: Spool):
        self.store = store
        self.error = ""
        """Why the last attempt failed; empty if it did not."""
        self._spool = spool
        self._run_ids: dict[str, str] = {}
        self._parent_id = ""
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._deliver_until_closed, name="recorder", daemon=True)
        self._last_time = 0

    def begin(self, manifest: Mapping[str, Any], stored: Mapping[str, StoredTrial]) -> None:
        """Make or take up the parent run, attach the manifest, and start to deliver."""
        self._run_ids = {key: trial.run_id for key, trial in stored.items()}
        client = self.store.client
        self._parent_id = (
            self.store.parent_run()
            or client.create_run(
                self.store.experiment_id, tags={"kind": "grid"}, run_name=self.store.experiment
            ).info.run_id
        )
        client.update_run(self._parent_id, status="RUNNING")
        client.log_dict(self._parent_id, dict(manifest), "grid.json")
        self._thread.start()

    def trial_started(self, config: TrialConfig, *, control: bool) -> None:
        """Record that a trial has begun."""
        self._append(
            "start",
            config,
            name=config.name,
            params=config.to_params(),
            tags={
                "kind": "trial",
                "trial_key": config.trial_key,
                "cell_key": config.cell_key,
                "control": "true" if control else "false",
            },
        )

    def epoch_ended(self, config: TrialConfig, epoch: int, metrics: Mapping[str, float], *, is_rung: bool) -> None:
        """Record what an epoch yielded."""
        rung = {f"val_accuracy_at_{epoch}": metrics["val_accuracy"]} if is_rung and "val_accuracy" in metrics else {}
        self._append("epoch", config, epoch=epoch, metrics={**metrics, **rung})

    def trial_ended(
        self, config: TrialConfig, status: str, *, epochs_run: int, best_val_accuracy: float | None, error: str = ""
    ) -> None:
        """Record how a trial ended.

        Args:
            config: Which trial.
            status: One of `grid.config.STATUSES`.
            epochs_run: Epochs that were trained.
            best_val_accuracy: Highest of all epochs; None if there is none.
            error: Traceback of a failed trial.
        """
        tags = {"status": status} | ({"stopped_at_epoch": str(epochs_run)} if status == "stopped" else {})
        best = {} if best_val_accuracy is None else {"best_val_accuracy": best_val_accuracy}
        metrics = {**best, "epochs_run": float(epochs_run)}
        self._append("end", config, epoch=epochs_run, metrics=metrics, tags=tags, status=status, error=error)

    def close(self, *, finished: bool, patience_seconds: float = 30.0) -> bool:
        """Deliver what waits, end the parent run, and say whether everything has arrived.

        Args:
            finished: Whether every trial of the grid has ended.
            patience_seconds: How long a store that does not answer is waited for.
        """
        deadline = time.monotonic() + patience_seconds
        while self._spool.pending(limit=1)[0] and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.05)
        self._closing.set()
        self._wake.set()
        self._thread.join()
        delivered = not self._spool.pending(limit=1)[0]
        if delivered:
            self.store.client.set_terminated(self._parent_id, "FINISHED" if finished else "KILLED")
        self._spool.close()
        return delivered

    def _append(self, kind: str, config: TrialConfig, **fields: Any) -> None:
        self._last_time = max(self._last_time + 1, time.time_ns() // 1_000_000)
        self._spool.append({"kind": kind, "trial_key": config.trial_key, "time": self._last_time, **fields})
        self._wake.set()

    def _deliver_until_closed(self) -> None:
        wait = 0.5
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._deliver_pending()
                self.error, wait = "", 0.5
            except (mlflow.exceptions.MlflowException, OSError) as error:
                self.error = _first_line(error)
                self._closing.wait(wait)
                self._wake.set()
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _deliver_pending(self) -> None:
        while True:
            events, end = self._spool.pending()
            if not events:
                return
            by_trial = defaultdict(list)
            for event in events:
                by_trial[event["trial_key"]].append(event)
            for trial_key, some in by_trial.items():
                self._deliver(trial_key, some)
            self._spool.delivered(end)

    def _deliver(self, trial_key: str, events: list[Event]) -> None:
        client = self.store.client
        starts, ends = (([event for event in events if event["kind"] == kind]) for kind in ("start", "end"))
        if trial_key not in self._run_ids:
            self._run_ids[trial_key] = self._create_run(starts[0])
        elif starts:
            client.update_run(self._run_ids[trial_key], status="RUNNING")
        run_id = self._run_ids[trial_key]
        for part in _chunks(list(_metrics(events)), BATCH_SIZE):
            client.log_batch(run_id, metrics=part)
        if ends:
            self._end_run(run_id, ends[-1])

    def _create_run(self, start: Event) -> str:
        client = self.store.client
        tags = {**start["tags"], "mlflow.parentRunId": self._parent_id}
        run = client.create_run(self.store.experiment_id, start["time"], tags, start["name"])
        for part in _chunks([Param(name, value) for name, value in start["params"].items()], PARAM_BATCH_SIZE):
            client.log_batch(run.info.run_id, params=part)
        return str(run.info.run_id)

    def _end_run(self, run_id: str, end: Event) -> None:
        client = self.store.client
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in end["tags"].items()])
        if end["error"]:
            client.log_text(run_id, end["error"], "traceback.txt")
            client.set_tag(run_id, "error", end["error"].strip().splitlines()[-1][:500])
        client.set_terminated(run_id, "FAILED" if end["status"] == "failed" else "FINISHED", end["time"])


def open_spool(folder: Path, store_uri: str, experiment: str) -> Spool:
    """Open the spool of an experiment.

    Args:
        folder: Where the spools of all experiments lie.
        store_uri: Two stores may hold experiments of one name.
        experiment: Its name.

    Raises:
        InputError: The folder can't be written.
    """
    path = folder / f"{slug(store_uri, experiment)}.jsonl"
    try:
        return Spool(path)
    except OSError as error:
        raise InputError(
            f"can't write to the spool {path}: {error.strerror}; free the disk or mend its rights"
        ) from error


def _metrics(events: Iterable[Event]) -> Iterable[Metric]:
    for event in events:
        for name, value in event.get("metrics", {}).items():
            yield Metric(name, value, event["time"], event["epoch"])


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
