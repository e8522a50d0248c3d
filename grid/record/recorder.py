"""The writer: a background thread that carries events from the spool to the store, in batches.

The driver appends an event and continues: Tune's loop never waits for a database or a server. What a crashed driver
left behind is delivered by the next run, or by

    python -m grid.record --replay --experiment NAME [--store URI] [--spool FOLDER]
"""

import threading
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from mlflow.entities import Metric, Param, RunTag

from grid.config import InputError, TrialConfig
from grid.masking import mask
from grid.metrics import FINAL_METRIC, RUNG_METRIC, EpochReport
from grid.record.events import Ended, EpochEnded, Event, Started, Suspended, from_json, to_json
from grid.record.spool import Spool
from grid.record.store import UNREACHABLE, Store, StoredTrial
from grid.wording import first_line

BATCH_SIZE = 900
"""Metrics in one request; MLflow allows 1000 entries of all kinds."""
LONGEST_WAIT_SECONDS = 15.0
"""Between two attempts to reach a store that does not answer."""


class Recorder:
    """Takes the events of trials and makes sure that they reach the store.

    Args:
        store: Where they go; its experiment exists.
        spool: Keeps what has not arrived yet.
        kind: Of the runs: `trial`, or `confirm` for finalists.
    """

    def __init__(self, store: Store, spool: Spool, kind: str = "trial"):
        self.store = store
        self.error = ""
        """Why the last attempt failed; empty if it succeeded."""
        self.dropped: Counter[str] = Counter()
        """Events by trial key that the store will never take, because their run was deleted."""
        self._spool = spool
        self._kind = kind
        self._run_ids: dict[str, str] = {}
        self._failed: set[str] = set()
        """Keys of the trials that failed in an earlier run."""
        self._reopened: dict[str, int | None] = {}
        """Rungs at which trials were stopped that train on as controls, by trial key."""
        self._ended_at: dict[str, float] = {}
        """Epochs run, by the keys of the trials that ended in an earlier run and train on."""
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._deliver_until_closed, name="recorder", daemon=True)
        self._last_time = 0

    def recover(self) -> int:
        """Deliver what an earlier driver left in the spool; return the number of events.

        Raises:
            InputError: The store does not take them.
        """
        try:
            if self._spool.pending(limit=1)[0]:
                self._run_ids = self.store.run_ids(self._kind)
            return self._deliver_pending()
        except UNREACHABLE as error:
            kept = f"the events of an earlier run stay in {self._spool.path}"
            raise InputError(f"can't write to the store {mask(self.store.uri)}: {first_line(error)}; {kept}") from error

    def begin(self, files: Mapping[str, bytes], stored: Mapping[str, StoredTrial]) -> None:
        """Attach files to the parent run, close the runs that a crashed driver left open, and start to deliver.

        Args:
            files: Name, such as `grid.json` -> content.
            stored: What the store has, by trial key.

        Raises:
            InputError: The store or its artifact location can't be written.
        """
        client = self.store.client
        self._run_ids = {key: trial.run_id for key, trial in stored.items()}
        self._failed = {key for key, trial in stored.items() if trial.status == "failed"}
        self._reopened = {key: trial.stop_epoch for key, trial in stored.items() if trial.reopened}
        ended_before = self._failed | self._reopened.keys()
        self._ended_at = {key: stored[key].metrics.get("epochs_run", 0.0) for key in ended_before}
        try:
            client.update_run(self.store.parent_id, status="RUNNING")
            self.store.attach(self.store.parent_id, files)
            for trial in stored.values():
                if not trial.status:
                    client.update_run(trial.run_id, status="KILLED")
        except UNREACHABLE as error:
            hint = "fix its permissions, or pass another --store"
            raise InputError(f"can't write to the store {mask(self.store.uri)}: {first_line(error)}; {hint}") from error
        self._thread.start()

    def started(
        self, config: TrialConfig, *, control: bool, chance: float | None = None, rounds_before: int = 0
    ) -> None:
        """Record that a trial has started, or resumes.

        Args:
            config: Which trial.
            control: Whether it is an unstopped control.
            chance: With which it was drawn to be one; recorded when the trial starts for the first time.
            rounds_before: Rounds of `--more-controls` that were drawn before; likewise.
        """
        tags = {
            "kind": self._kind,
            "trial_key": config.trial_key,
            "cell_key": config.cell_key,
            "control": "true" if control else "false",
        }
        tags |= {} if chance is None else {"control_chance": repr(chance)}
        tags |= {"controls_rounds_before": str(rounds_before)} if rounds_before else {}
        self._append(
            Started(
                trial_key=config.trial_key, time=self._now(), name=config.name, params=config.to_params(), tags=tags
            )
        )

    def epoch_ended(
        self,
        config: TrialConfig,
        report: EpochReport,
        *,
        is_rung: bool,
        stopped: bool = False,
        spared: bool = False,
    ) -> None:
        """Record what an epoch yielded and, in the same event, what ASHA decided after it.

        Args:
            config: Which trial.
            report: Of the epoch.
            is_rung: Whether ASHA decides at this epoch.
            stopped: Whether it stopped the trial.
            spared: Whether it would have stopped it here, were it not an unstopped control.
        """
        metrics = report.metrics
        if is_rung and "val_accuracy" in metrics:
            metrics[f"{RUNG_METRIC}{report.epoch}"] = metrics["val_accuracy"]
        if report.epoch == config.epochs and "val_accuracy" in metrics:
            metrics[FINAL_METRIC] = metrics["val_accuracy"]
        tags = {"stopped_at_epoch": str(report.epoch)} if stopped else {}
        tags |= {"would_stop_at_epoch": str(report.epoch)} if spared else {}
        tags |= {"val_correct": b64encode(report.val_correct).decode()} if report.val_correct else {}
        self._append(
            EpochEnded(trial_key=config.trial_key, time=self._now(), epoch=report.epoch, metrics=metrics, tags=tags)
        )

    def ended(
        self, config: TrialConfig, status: str, *, epochs_run: int, best_val_accuracy: float | None, error: str = ""
    ) -> None:
        """Record how a trial ended.

        Args:
            config: Which trial.
            status: One of `grid.metrics.STATUSES`.
            epochs_run: Epochs that were trained.
            best_val_accuracy: Highest of all epochs; None if there is none.
            error: Traceback of a failed trial.
        """
        tags = {"status": status} | ({"stopped_at_epoch": str(epochs_run)} if status == "stopped" else {})
        if config.trial_key in self._reopened:
            tags |= {"control": "true", "would_stop_at_epoch": str(self._reopened[config.trial_key])}
        best = {} if best_val_accuracy is None else {"best_val_accuracy": best_val_accuracy}
        again = epochs_run == self._ended_at.get(config.trial_key)  # recorded at this epoch when it ended before
        metrics = {} if again else {**best, "epochs_run": float(epochs_run)}
        self._append(
            Ended(
                trial_key=config.trial_key,
                time=self._now(),
                epoch=epochs_run,
                metrics=metrics,
                tags=tags,
                status=status,
                error=error,
            )
        )

    def suspended(self, config: TrialConfig) -> None:
        """Record that a trial waits for the next run to resume it."""
        self._append(Suspended(trial_key=config.trial_key, time=self._now()))

    def close(self, *, finished: bool, patience_seconds: float = 30.0) -> bool:
        """Deliver what is left, end the parent run, and say whether everything has arrived.

        Args:
            finished: Whether every trial of the grid has ended.
            patience_seconds: How long to wait for a store that does not answer.
        """
        deadline = time.monotonic() + patience_seconds
        while self._thread.is_alive() and self._spool.pending(limit=1)[0] and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.05)
        self._closing.set()
        self._wake.set()
        self._thread.join()
        delivered = not self._spool.pending(limit=1)[0] and self._end_parent(finished)
        self._spool.close()
        return delivered

    def _end_parent(self, finished: bool) -> bool:
        try:
            self.store.client.set_terminated(self.store.parent_id, "FINISHED" if finished else "KILLED")
        except UNREACHABLE as error:
            self.error = first_line(error)
        return not self.error

    def _now(self) -> int:
        """Return the time in milliseconds, later than that of any event before."""
        self._last_time = max(self._last_time + 1, time.time_ns() // 1_000_000)
        return self._last_time

    def _append(self, event: Event) -> None:
        self._spool.append(to_json(event))
        self._wake.set()

    def _deliver_until_closed(self) -> None:
        try:
            self._deliver_and_retry()
        except BaseException as error:
            self.error = f"the recorder broke: {type(error).__name__}: {first_line(error)}"
            raise

    def _deliver_and_retry(self) -> None:
        wait = 0.5
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._deliver_pending()
                self.error, wait = "", 0.5
            except UNREACHABLE as error:
                self.error = first_line(error)
                self._closing.wait(wait)
                self._wake.set()
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _deliver_pending(self) -> int:
        delivered = 0
        while True:
            lines, end = self._spool.pending()
            if not lines:
                return delivered
            by_trial: defaultdict[str, list[Event]] = defaultdict(list)
            for event in map(from_json, lines):
                by_trial[event.trial_key].append(event)
            for trial_key, events in by_trial.items():
                self._deliver_or_drop(trial_key, events)
            self._spool.delivered(end)
            delivered += len(lines)

    def _deliver_or_drop(self, trial_key: str, events: Sequence[Event]) -> None:
        try:
            self._deliver(trial_key, events)
        except UNREACHABLE as error:
            if not self.store.is_gone(self._run_ids.get(trial_key), error):
                raise
            self._run_ids.pop(trial_key, None)
            self.dropped[trial_key] += len(events)

    def _deliver(self, trial_key: str, events: Sequence[Event]) -> None:
        """Deliver the events of a trial in as few requests as possible: a request costs more than its content."""
        params: Mapping[str, str] = {}
        for event in events:
            if isinstance(event, Started):
                self._open_run(event)
                params = event.params
        if trial_key not in self._run_ids:
            self.dropped[trial_key] += len(events)
            return
        run_id, last = self._run_ids[trial_key], events[-1]
        tags = {name: tag for event in events if isinstance(event, EpochEnded) for name, tag in event.tags.items()}
        if isinstance(last, Ended):
            if last.error:
                self.store.client.log_text(run_id, last.error, "traceback.txt")
            tags |= self._tags_of_end(last)
        self._log(run_id, list(_metrics(events)), params, tags)
        if isinstance(last, Ended):
            self.store.client.set_terminated(run_id, "FAILED" if last.status == "failed" else "FINISHED", last.time)
        if isinstance(last, Suspended):
            self.store.client.set_terminated(run_id, "KILLED", last.time)

    def _tags_of_end(self, event: Ended) -> dict[str, str]:
        failed_before = event.trial_key in self._failed  # whose error this end replaces
        error = {"error": summarise_error(event.error)} if event.error or failed_before else {}
        return {**error, **event.tags}

    def _open_run(self, event: Started) -> None:
        if event.trial_key not in self._run_ids and self.error:  # an attempt whose answer was lost may have made it
            self._run_ids |= self.store.run_ids(self._kind, event.trial_key)
        if event.trial_key in self._run_ids:
            self.store.client.update_run(self._run_ids[event.trial_key], status="RUNNING")
        else:
            tags = {**event.tags, "mlflow.parentRunId": self.store.parent_id}
            run = self.store.client.create_run(self.store.experiment_id, event.time, tags, event.name)
            self._run_ids[event.trial_key] = run.info.run_id

    def _log(self, run_id: str, metrics: list[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log everything; the tags, which may say that a trial has ended, go into the last request."""
        entries = [Param(*param) for param in params.items()]
        while metrics or entries or tags:
            batch, metrics = metrics[:BATCH_SIZE], metrics[BATCH_SIZE:]
            last = [] if metrics else [RunTag(*tag) for tag in tags.items()]
            self.store.client.log_batch(run_id, metrics=batch, params=entries, tags=last)
            entries, tags = [], tags if metrics else {}


def summarise_error(traceback: str) -> str:
    """Return the line of a traceback that names the exception, at most 500 characters of it."""
    last_traceback = traceback.rpartition("Traceback (most recent call last):")[2].strip("\n")
    return next((line[:500] for line in last_traceback.splitlines() if not line.startswith(" ")), "")


def _metrics(events: Sequence[Event]) -> Iterator[Metric]:
    for event in events:
        if isinstance(event, EpochEnded | Ended):
            for name, value in event.metrics.items():
                yield Metric(name, value, event.time, event.epoch)
