"""The writer: background threads that carry events from the spool to the store, in batches.

The driver appends an event and continues: Tune's loop never waits for a database or a server. What a crashed driver
left behind is delivered by the next run, or by

    python -m grid.record --replay --experiment NAME [--store URI] [--spool FOLDER]
"""

import time
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mlflow.entities import RunTag

from grid.config import InputError, TrialConfig
from grid.masking import mask
from grid.metrics import FINAL_METRIC, RUNG_METRIC, EpochReport
from grid.record.courier import Courier, describe
from grid.record.delivery import ArtifactCarrier, EventCarrier, artifact_line
from grid.record.events import Ended, EpochEnded, Event, Started, Suspended, TimeSpent, to_json
from grid.record.fence import LeaseLostError
from grid.record.spool import ParkedLine, Spool, unwritable
from grid.record.store import UNREACHABLE, Store, StoredTrial
from grid.wording import count, first_line, format_seconds

MOST_RESUMES = 150
"""Commands that the tag `resumed_by` names, the last ones; MLflow allows 5000 characters."""
PATIENCE_SECONDS = 5.0
"""Without an arrival, before a store counts as silent."""


class Recorder:
    """Takes the events of trials and makes sure that they reach the store.

    Args:
        store: Where they go; its experiment exists.
        spool: Keeps what has not arrived yet.
        kind: Of the runs: `trial`, or `confirm` for finalists.
    """

    def __init__(self, store: Store, spool: Spool, kind: str = "trial"):
        self.store = store
        self._spool = spool
        self._kind = kind
        self._carrier = EventCarrier(store, kind, self._attach_later)
        self._events = Courier("recorder", spool, self._carrier)
        self._last_error = ""
        """Of the end of the parent run."""
        self._reopened: dict[str, int | None] = {}
        """Rungs at which trials were stopped that train on as controls, by trial key."""
        self._ended_at: dict[str, float] = {}
        """Epochs run, by the keys of the trials that ended in an earlier run and train on."""
        self._command = ""
        """Id of the record of this command; empty for one that has none."""
        self._resumed_by: dict[str, list[str]] = {}
        """Ids of the commands that trained a trial further than the one that started it, by trial key."""
        self._source: Mapping[str, str] = {}
        """Tags of every run that this command starts."""
        self._machines: dict[str, Mapping[str, str]] = {}
        """What each trial was last trained on."""
        self._last_time = 0

    @property
    def error(self) -> str:
        """Why the last attempt to reach the store failed; empty if it succeeded."""
        return self._events.error or self._artifacts.error or self._last_error

    @property
    def dropped(self) -> Counter[str]:
        """Number of events by trial key whose run was deleted in MLflow."""
        return self._carrier.dropped

    @property
    def parked(self) -> Mapping[Path, Sequence[ParkedLine]]:
        """What the store did not take while it took other reports, by the file that keeps it."""
        couriers = (self._events, self._artifacts)
        return {courier.parked.path: courier.parked.lines for courier in couriers if courier.parked.lines}

    @property
    def trouble(self) -> str:
        """What a person should know while the grid runs; empty if everything arrives."""
        troubles = []
        for courier, whose, noun in (
            (self._events, "MLflow", "report"),
            (self._artifacts, "artifact store", "file"),
        ):
            if courier.silent_seconds > PATIENCE_SECONDS:
                silent, waiting = format_seconds(courier.silent_seconds), count(courier.waiting, noun)
                troubles.append(f"{whose} not answering for {silent}, {waiting} waiting")
        refused = sum(map(len, self.parked.values()))
        return " | ".join([*troubles, *([f"{count(refused, 'report')} refused by MLflow"] if refused else [])])

    def complain(self, retry: str) -> list[str]:
        """Return a line on each kind of report that is not in the store for good.

        Args:
            retry: What to do to deliver parked reports, such as `try again with:  COMMAND`.
        """
        lines = []
        if damaged := [*self._spool.unreadable.values(), *self._spool.artifacts.unreadable.values()]:
            what = f"{count(len(damaged), 'damaged line')} ({count(sum(damaged), 'byte')}) of {self._spool.path}"
            lines.append(f"{what} had to be left out; a power loss leaves such lines")
        if self.dropped:
            what = f"{count(self.dropped.total(), 'report')} of {count(len(self.dropped), 'trial')}"
            lines.append(f"{what} were for runs that are deleted in MLflow; run the same command to train these again")
        for path, parked in self.parked.items():
            groups, reasons = {line.group for line in parked}, Counter(line.reason for line in parked)
            what, whose = count(len(parked), "report"), count(len(groups), "trial")
            others = f" (and {count(len(reasons) - 1, 'other reason')})" if len(reasons) > 1 else ""
            reason = f"{reasons.most_common(1)[0][0]}{others}"
            lines.append(f"MLflow did not take {what} of {whose}: {reason}; kept in {path}; {retry}")
        return lines

    @cached_property
    def _artifacts(self) -> Courier:
        return Courier("artifacts", self._spool.artifacts, ArtifactCarrier(self.store))

    def recover(self) -> int:
        """Deliver what an earlier driver left in the spool; return the number of events that arrived.

        Events of single trials that fail are parked, and hold nothing up. Files follow once the recorder has begun.

        Raises:
            InputError: The store does not take them.
        """
        found, damaged = self._spool.appended + len(self._events.parked.lines), len(self._spool.unreadable)
        try:
            if found:
                self._carrier.run_ids = self.store.run_ids(self._kind)
            self._catch_up()
        except LeaseLostError:
            raise
        except Exception as error:
            kept = f"the events of an earlier run stay in {self._spool.path}"
            raise InputError(f"can't write to the store {mask(self.store.uri)}: {describe(error)}; {kept}") from error
        return found - len(self._events.parked.lines) - len(self._spool.unreadable) + damaged

    def _catch_up(self) -> None:
        try:
            self._events.catch_up()
        except LeaseLostError:
            raise
        except Exception as error:  # noqa: BLE001  (of whichever library)
            self.store.client.get_run(self.store.parent_id)  # raises if it is the store that fails
            self._events.park_backlog(error)

    def replay(self) -> tuple[int, int]:
        """Deliver everything that an earlier driver left; return the number of events and of files that arrived.

        Raises:
            InputError: The store does not take them.
        """
        events, found = self.recover(), self._artifacts.waiting
        try:
            self._artifacts.catch_up()
        except Exception as error:
            uri, kept = mask(self.store.uri), f"files of an earlier run stay in {self._spool.artifacts.path}"
            raise InputError(f"can't write artifacts to the store {uri}: {describe(error)}; {kept}") from error
        return events, found - self._artifacts.waiting

    def begin(
        self,
        files: Mapping[str, bytes],
        stored: Mapping[str, StoredTrial],
        *,
        command: str = "",
        source: Mapping[str, str] | None = None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> None:
        """Attach files to the parent run, close the runs that a crashed driver left open, and start to deliver.

        Args:
            files: Name, such as `grid.json` -> content.
            stored: What the store has, by trial key.
            command: Id of the record of this command, which every trial that it trains will name.
            source: Tags of every run that this command starts, and of the parent run; see `describe_source`.
            pictures: The same, of files that nobody waits for.

        Raises:
            InputError: The store or its artifact location can't be written.
        """
        client = self.store.client
        self._command = command
        self._source = source or {}
        self._resumed_by = {key: _split(trial.tags.get("resumed_by")) for key, trial in stored.items()}
        self._carrier.run_ids |= {key: trial.run_id for key, trial in stored.items()}
        self._carrier.failed = {key for key, trial in stored.items() if trial.status == "failed"}
        self._reopened = {key: trial.stop_epoch for key, trial in stored.items() if trial.reopened}
        ended_before = self._carrier.failed | self._reopened.keys()
        self._ended_at = {key: stored[key].metrics.get("epochs_run", 0.0) for key in ended_before}
        try:
            client.update_run(self.store.parent_id, status="RUNNING")
            if self._source:
                client.log_batch(self.store.parent_id, tags=[RunTag(*tag) for tag in self._source.items()])
            self.store.attach(self.store.parent_id, files)
            for trial in stored.values():
                if not trial.status:
                    client.update_run(trial.run_id, status="KILLED")
        except UNREACHABLE as error:
            hint = "fix its permissions, or pass another --store"
            raise InputError(f"can't write to the store {mask(self.store.uri)}: {first_line(error)}; {hint}") from error
        try:
            for name, content in (pictures or {}).items():
                self._attach_later(self.store.parent_id, name, content)
        except OSError as error:
            raise unwritable(self._spool.path, error) from error
        for courier in (self._events, self._artifacts):
            courier.start()
            courier.wake()

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
            **self._source,
        }
        tags |= {} if chance is None else {"control_chance": repr(chance)}
        tags |= {"controls_rounds_before": str(rounds_before)} if rounds_before else {}
        tags |= {"command": self._command} if self._command else {}
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
        tags |= self._tags_of_resumed(config.trial_key)
        if report.machine != self._machines.get(config.trial_key, {}):
            tags |= report.machine
            self._machines[config.trial_key] = report.machine
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
        tags |= self._tags_of_resumed(config.trial_key)
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

    def _tags_of_resumed(self, trial_key: str) -> dict[str, str]:
        """Return the tag that names this command, once, if an earlier one started the trial."""
        if not self._command or trial_key not in self._resumed_by:
            return {}
        earlier = self._resumed_by.pop(trial_key)
        return {"resumed_by": ",".join([*earlier, self._command][-MOST_RESUMES:])}

    def suspended(self, config: TrialConfig) -> None:
        """Record that a trial waits for the next run to resume it."""
        self._append(Suspended(trial_key=config.trial_key, time=self._now()))

    def time_spent(self, seconds: float) -> None:
        """Record in how many seconds trials of the grid have been trained, by all commands; for finalists nothing.

        Args:
            seconds: Those of earlier commands included.
        """
        if self._kind == "trial":
            self._append(TimeSpent(time=self._now(), seconds=seconds))

    def close(self, *, finished: bool, patience_seconds: float = 30.0) -> bool:
        """Deliver what is left, end the parent run, and say whether everything has arrived.

        Args:
            finished: Whether every trial of the grid has ended.
            patience_seconds: How long to wait for a store that does not answer.
        """
        deadline = time.monotonic() + patience_seconds
        arrived = [courier.close(deadline) for courier in (self._events, self._artifacts)]
        delivered = all(arrived) and self._end_parent(finished)
        self._spool.close()
        return delivered

    def _end_parent(self, finished: bool) -> bool:
        try:
            self.store.client.set_terminated(self.store.parent_id, "FINISHED" if finished else "KILLED")
        except (*UNREACHABLE, LeaseLostError) as error:
            self._last_error = first_line(error)
        return not self._last_error

    def _now(self) -> int:
        """Return the time in milliseconds, later than that of any event before."""
        self._last_time = max(self._last_time + 1, time.time_ns() // 1_000_000)
        return self._last_time

    def _append(self, event: Event) -> None:
        self._spool.append(to_json(event))
        self._events.wake()

    def _attach_later(self, run_id: str, path: str, content: bytes) -> None:
        self._spool.artifacts.append(artifact_line(run_id, path, content))
        self._artifacts.wake()


def _split(names: str | None) -> list[str]:
    return names.split(",") if names else []
