"""What the couriers carry to the store: events of trials in as few requests as possible, and files for artifacts."""

import json
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from grid.record.courier import Refusal
from grid.record.events import Ended, EpochEnded, Event, Started, Suspended, TimeSpent, from_json
from grid.record.spool import Line
from grid.record.store import UNREACHABLE, Store

BATCH_SIZE = 900
"""Metrics in one request; MLflow allows 1000 entries of all kinds."""


class EventCarrier:
    """Carries the events of trials.

    Args:
        store: Where they go.
        kind: Of the runs: `trial`, or `confirm` for finalists.
        attach: Takes the id of a run, a path and a content, and adds the file to the run's artifacts later.
    """

    def __init__(self, store: Store, kind: str, attach: Callable[[str, str, bytes], None]):
        self.run_ids: dict[str, str] = {}
        """Of the trials that the store has, by trial key."""
        self.failed: set[str] = set()
        """Keys of the trials that failed in an earlier run."""
        self.dropped: Counter[str] = Counter()
        """Number of events by trial key whose run somebody has deleted."""
        self._deleted: set[str] = set()
        self._uncertain: set[str] = set()
        """Trials whose run may exist, because the answer to the request that creates it was lost."""
        self._parent_has_data = False
        """Whether the parent run names the data set."""
        self._without_data: set[str] = set()
        """Trials whose run is new and does not name its data set yet."""
        self._store = store
        self._kind = kind
        self._attach = attach

    def group_of(self, line: Line) -> str:
        """Return the key of the trial; empty for what is of the grid."""
        return str(line.get("trial_key", ""))

    def deliver(self, group: str, lines: Sequence[Line], *, again: bool) -> None:
        """Deliver events of a trial, or drop them if their run was deleted; without a group, those of the grid."""
        events = [_to_event(line) for line in lines]
        if not group:
            self._deliver_time_spent(events)
            return
        if again:
            events = self._without_superseded(group, events)
        try:
            self._deliver(group, events, again=again)
        except UNREACHABLE as error:
            if not self._store.is_gone(self.run_ids.get(group), error):
                raise
            del self.run_ids[group]
            self._deleted.add(group)
            self.dropped[group] += len(events)

    def is_refused(self, error: Exception) -> bool:
        """Return whether the store refuses an event for what it contains."""
        return self._store.is_refusal(error)

    def _deliver_time_spent(self, events: Sequence[Event]) -> None:
        seconds = [event.seconds for event in events if isinstance(event, TimeSpent)]
        if len(seconds) < len(events):
            raise Refusal("an event of a trial that does not name the trial")
        try:
            self._store.record_seconds(max(seconds))
        except UNREACHABLE as error:
            if not self._store.is_gone(self._store.parent_id, error):
                raise

    def _deliver(self, trial_key: str, events: Sequence[Event], *, again: bool) -> None:
        params: Mapping[str, str] = {}
        for event in events:
            if isinstance(event, Started):
                self._open_run(event, again=again)
                params = event.params
                self._name_data(event)
        if not events or self._is_dropped(trial_key, len(events)):
            return
        run_id, last = self.run_ids[trial_key], events[-1]
        tags = {name: tag for event in events if isinstance(event, EpochEnded) for name, tag in event.tags.items()}
        if isinstance(last, Ended):
            tags |= self._tags_of_end(last)
        self._log(run_id, list(_metrics(events)), params, tags)
        if isinstance(last, Ended):
            self._store.client.set_terminated(run_id, "FAILED" if last.status == "failed" else "FINISHED", last.time)
            if last.error:
                self._attach(run_id, "traceback.txt", last.error.encode())
        if isinstance(last, Suspended):
            self._store.client.set_terminated(run_id, "KILLED", last.time)

    def _is_dropped(self, trial_key: str, events: int) -> bool:
        if trial_key in self.run_ids:
            return False
        if trial_key not in self._deleted:
            raise Refusal("its trial has no run in the store: the start of the trial was lost or refused")
        self.dropped[trial_key] += events
        return True

    def _tags_of_end(self, event: Ended) -> dict[str, str]:
        failed_before = event.trial_key in self.failed  # whose error this end replaces
        error = {"error": summarise_error(event.error)} if event.error or failed_before else {}
        return {**error, **event.tags}

    def _open_run(self, event: Started, *, again: bool) -> None:
        if event.trial_key not in self.run_ids and event.trial_key in self._uncertain:
            self.run_ids |= self._store.run_ids(self._kind, event.trial_key)
        if event.trial_key not in self.run_ids:
            tags = {**event.tags, "mlflow.parentRunId": self._store.parent_id}
            self._uncertain.add(event.trial_key)
            run = self._store.client.create_run(self._store.experiment_id, event.time, tags, event.name)
            self._uncertain.discard(event.trial_key)
            self.run_ids[event.trial_key] = run.info.run_id
            self._without_data.add(event.trial_key)
        elif not again:
            self._store.client.update_run(self.run_ids[event.trial_key], status="RUNNING")

    def _name_data(self, event: Started) -> None:
        """Name the data set of a new run as its input, which MLflow's page shows."""
        if event.trial_key not in self._without_data:
            return
        name, digest = event.params.get("data", ""), event.params.get("data_fingerprint", "")
        self._without_data.discard(event.trial_key)
        if not name or not digest:
            return
        dataset = Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"name": name}))
        context = [InputTag("mlflow.data.context", "training")]
        try:
            for run_id in [*([] if self._parent_has_data else [self._store.parent_id]), self.run_ids[event.trial_key]]:
                self._store.client.log_inputs(run_id, [DatasetInput(dataset, context)])
            self._parent_has_data = True
        except UNREACHABLE:
            self._without_data.add(event.trial_key)  # with the next attempt
            raise

    def _log(self, run_id: str, metrics: list[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log everything; the tags, which may say that a trial has ended, go into the last request."""
        entries = [Param(*param) for param in params.items()]
        while metrics or entries or tags:
            batch, metrics = metrics[:BATCH_SIZE], metrics[BATCH_SIZE:]
            last = [] if metrics else [RunTag(*tag) for tag in tags.items()]
            self._store.client.log_batch(run_id, metrics=batch, params=entries, tags=last)
            entries, tags = [], tags if metrics else {}

    def _without_superseded(self, trial_key: str, events: Sequence[Event]) -> list[Event]:
        """Return parked events without those of which a later training of the trial has recorded others."""
        latest = {_slot(event): event for event in events}
        events = [event for event in events if latest[_slot(event)] is event]
        if trial_key not in self.run_ids:
            return events
        run_id, client = self.run_ids[trial_key], self._store.client
        epochs = {point.step: point.timestamp for point in client.get_metric_history(run_id, "epoch_seconds")}
        ended = max((point.timestamp for point in client.get_metric_history(run_id, "epochs_run")), default=0)
        return [event for event in events if not _is_superseded(event, epochs, ended)]


class ArtifactCarrier:
    """Carries files to the artifacts of runs.

    Args:
        store: Where they go.
    """

    def __init__(self, store: Store):
        self._store = store

    def group_of(self, line: Line) -> str:
        """Return the run and the path: no file waits for another."""
        return f"{line.get('run_id')}/{line.get('path')}"

    def deliver(self, group: str, lines: Sequence[Line], *, again: bool) -> None:
        """Add files to a run, unless it was deleted."""
        for line in lines:
            try:
                run_id, path, content = line["run_id"], line["path"], b64decode(line["content"])
            except (KeyError, TypeError, ValueError) as error:
                raise Refusal("not a file for an artifact; it may be of a newer version") from error
            try:
                self._store.attach(run_id, {path: content})
            except UNREACHABLE as error:
                if not self._store.is_gone(run_id, error):
                    raise

    def is_refused(self, error: Exception) -> bool:
        """Return whether the store refuses a file for what it is."""
        return self._store.is_refusal(error)


def artifact_line(run_id: str, path: str, content: bytes) -> Line:
    """Return what an `ArtifactCarrier` delivers, in JSON's types."""
    return {"run_id": run_id, "path": path, "content": b64encode(content).decode()}


def summarise_error(traceback: str) -> str:
    """Return the line of a traceback that names the exception, at most 500 characters of it."""
    last_traceback = traceback.rpartition("Traceback (most recent call last):")[2].strip("\n")
    return next((line[:500] for line in last_traceback.splitlines() if not line.startswith(" ")), "")


def _to_event(line: Line) -> Event:
    try:
        return from_json(line)
    except (KeyError, TypeError) as error:
        raise Refusal("not an event that this version knows; a newer one may") from error


def _metrics(events: Sequence[Event]) -> Iterator[Metric]:
    for event in events:
        if isinstance(event, EpochEnded | Ended):
            for name, value in event.metrics.items():
                yield Metric(name, value, event.time, event.epoch)


def _slot(event: Event) -> tuple[type[Event], int]:
    return type(event), event.epoch if isinstance(event, EpochEnded) else 0


def _is_superseded(event: Event, epochs: Mapping[int, int], ended: int) -> bool:
    """Return whether a run has the epoch at another time, or an end that came later."""
    if isinstance(event, EpochEnded):
        return epochs.get(event.epoch, event.time) != event.time
    return not isinstance(event, Started) and ended > event.time
