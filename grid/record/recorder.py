"""The writer: a background thread that carries events from the spool to the store, in batches.

The driver appends an event and goes on; nothing here makes Tune's loop wait for a database or a server. What a dead
driver left behind is delivered by the next run, or by

    python -m grid.record --replay --experiment NAME [--store URI] [--spool FOLDER]
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from grid.config import InputError, TrialConfig
from grid.metrics import RUNG_METRIC
from grid.record.spool import Event, Spool
from grid.record.store import UNREACHABLE, Store, StoredTrial
from grid.store_uri import mask
from grid.wording import first_line

BATCH_SIZE = 900
"""Metrics in one request; MLflow allows 1000 entries of all kinds."""
LONGEST_WAIT_SECONDS = 15.0
"""Between two attempts to reach a store that does not answer."""
HEARTBEAT_SECONDS = 15.0
"""Between two signs of life of a driver in the store."""


class Recorder:
    """Takes what trials report and sees that it reaches the store.

    Args:
        store: Where to; its experiment exists.
        spool: Keeps what has not arrived yet.
    """

    def __init__(self, store: Store, spool: Spool):
        self.store = store
        self.error = ""
        """Why the last attempt failed; empty if it did not."""
        self._spool = spool
        self.dropped: Counter[str] = Counter()
        """Reports by trial key that the store will never take, because somebody deleted their run."""
        self._run_ids: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}
        """Epochs run, by the keys of the trials that failed in an earlier run."""
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
                self._run_ids = self.store.run_ids()
            return self._deliver_pending()
        except UNREACHABLE as error:
            kept = f"the reports of an earlier run stay in {self._spool.path}"
            raise InputError(f"can't write to the store {mask(self.store.uri)}: {first_line(error)}; {kept}") from error

    def begin(self, files: Mapping[str, bytes], stored: Mapping[str, StoredTrial]) -> None:
        """Attach files to the parent run, close the runs that a dead driver left open, and start to deliver.

        Args:
            files: Name, such as `grid.json` -> content.
            stored: What the store has, by trial key.

        Raises:
            InputError: The store or the place of its artifacts can't be written.
        """
        client = self.store.client
        self._run_ids = {key: trial.run_id for key, trial in stored.items()}
        self._failed_at = {
            key: trial.metrics.get("epochs_run", 0.0) for key, trial in stored.items() if trial.status == "failed"
        }
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

    def started(self, config: TrialConfig, *, control: bool) -> None:
        """Record that a trial has begun, or goes on."""
        self._append(
            "start",
            config,
            name=config.name,
            params=config.to_params(),
            tags={
                "kind": self.store.kind,
                "trial_key": config.trial_key,
                "cell_key": config.cell_key,
                "control": "true" if control else "false",
            },
        )

    def epoch_ended(
        self, config: TrialConfig, epoch: int, metrics: Mapping[str, float], *, is_rung: bool, stopped: bool = False
    ) -> None:
        """Record what an epoch yielded and, in the same breath, whether ASHA stopped the trial after it."""
        rung = {f"{RUNG_METRIC}{epoch}": metrics["val_accuracy"]} if is_rung and "val_accuracy" in metrics else {}
        tags = {"stopped_at_epoch": str(epoch)} if stopped else {}
        self._append("epoch", config, epoch=epoch, metrics={**metrics, **rung}, tags=tags)

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
        best = {} if best_val_accuracy is None else {"best_val_accuracy": best_val_accuracy}
        again = epochs_run == self._failed_at.get(config.trial_key)  # recorded at this epoch when it failed before
        metrics = {} if again else {**best, "epochs_run": float(epochs_run)}
        self._append("end", config, epoch=epochs_run, metrics=metrics, tags=tags, status=status, error=error)

    def suspended(self, config: TrialConfig) -> None:
        """Record that a trial rests until another run takes it up."""
        self._append("rest", config)

    def close(self, *, finished: bool, patience_seconds: float = 30.0) -> bool:
        """Deliver what waits, end the parent run, and say whether everything has arrived.

        Args:
            finished: Whether every trial of the grid has ended.
            patience_seconds: How long a store that does not answer is waited for.
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
            self.store.release()
        except UNREACHABLE as error:
            self.error = first_line(error)
        return not self.error

    def _append(self, kind: str, config: TrialConfig, **fields: Any) -> None:
        self._last_time = max(self._last_time + 1, time.time_ns() // 1_000_000)
        self._spool.append({"kind": kind, "trial_key": config.trial_key, "time": self._last_time, **fields})
        self._wake.set()

    def _deliver_until_closed(self) -> None:
        try:
            self._deliver_and_retry()
        except BaseException as error:
            self.error = f"the recorder broke: {type(error).__name__}: {first_line(error)}"
            raise

    def _deliver_and_retry(self) -> None:
        wait, shown_life_at = 0.5, time.monotonic()
        while not self._closing.is_set():
            self._wake.wait(HEARTBEAT_SECONDS)
            self._wake.clear()
            try:
                self._deliver_pending()
                if time.monotonic() - shown_life_at >= HEARTBEAT_SECONDS:
                    self.store.heartbeat()
                    shown_life_at = time.monotonic()
                self.error, wait = "", 0.5
            except UNREACHABLE as error:
                self.error = first_line(error)
                self._closing.wait(wait)
                self._wake.set()
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _deliver_pending(self) -> int:
        count = 0
        while True:
            events, end = self._spool.pending()
            if not events:
                return count
            by_trial = defaultdict(list)
            for event in events:
                by_trial[event["trial_key"]].append(event)
            for trial_key, some in by_trial.items():
                self._deliver_or_drop(trial_key, some)
            self._spool.delivered(end)
            count += len(events)

    def _deliver_or_drop(self, trial_key: str, events: list[Event]) -> None:
        try:
            self._deliver(trial_key, events)
        except UNREACHABLE as error:
            if not self.store.is_gone(self._run_ids.get(trial_key), error):
                raise
            self._run_ids.pop(trial_key, None)
            self.dropped[trial_key] += len(events)

    def _deliver(self, trial_key: str, events: list[Event]) -> None:
        """Carry the events of a trial in as few requests as they take: each costs more than what is in it."""
        starts = [event for event in events if event["kind"] == "start"]
        for start in starts:
            self._begin_run(trial_key, start)
        if trial_key not in self._run_ids:
            self.dropped[trial_key] += len(events)
            return
        run_id, last = self._run_ids[trial_key], events[-1]
        tags = {name: value for event in events if event["kind"] == "epoch" for name, value in event["tags"].items()}
        if last["kind"] == "end":
            if last["error"]:
                self.store.client.log_text(run_id, last["error"], "traceback.txt")
            if last["error"] or trial_key in self._failed_at:
                tags["error"] = summarise(last["error"])
            tags |= last["tags"]
        self._log(run_id, list(_metrics(events)), starts[-1]["params"] if starts else {}, tags)
        if last["kind"] == "end":
            status = "FAILED" if last["status"] == "failed" else "FINISHED"
            self.store.client.set_terminated(run_id, status, last["time"])
        if last["kind"] == "rest":
            self.store.client.set_terminated(run_id, "KILLED", last["time"])

    def _begin_run(self, trial_key: str, start: Event) -> None:
        if trial_key not in self._run_ids and self.error:  # an attempt whose answer was lost may have made it
            self._run_ids |= self.store.run_ids(trial_key)
        if trial_key in self._run_ids:
            self.store.client.update_run(self._run_ids[trial_key], status="RUNNING")
        else:
            tags = {**start["tags"], "mlflow.parentRunId": self.store.parent_id}
            run = self.store.client.create_run(self.store.experiment_id, start["time"], tags, start["name"])
            self._run_ids[trial_key] = run.info.run_id

    def _log(self, run_id: str, metrics: list[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log all of it; the tags, which may say that a trial has ended, in the last request."""
        entries = [Param(*param) for param in params.items()]
        while metrics or entries or tags:
            some, metrics = metrics[:BATCH_SIZE], metrics[BATCH_SIZE:]
            last = [] if metrics else [RunTag(*tag) for tag in tags.items()]
            self.store.client.log_batch(run_id, metrics=some, params=entries, tags=last)
            entries, tags = [], tags if metrics else {}


def summarise(error: str) -> str:
    """Return the line of a traceback that names the exception, at most 500 characters of it."""
    last_traceback = error.rpartition("Traceback (most recent call last):")[2].strip("\n")
    return next((line[:500] for line in last_traceback.splitlines() if not line.startswith(" ")), "")


def _metrics(events: Iterable[Event]) -> Iterable[Metric]:
    for event in events:
        for name, value in event.get("metrics", {}).items():
            yield Metric(name, value, event["time"], event["epoch"])
