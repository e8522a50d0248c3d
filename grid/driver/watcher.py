"""Stands between Tune and the outside: passes the events of trials to the recorder and to the progress line."""

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from grid.config import TrialConfig
from grid.driver.progress import Progress
from grid.metrics import FINAL_METRIC, FINAL_STATUSES, RUNG_METRIC, EpochReport
from grid.plan.asha import Asha
from grid.plan.budget import NO_LIMIT, Budget, Spent
from grid.plan.forecast import expected_epochs
from grid.plan.trials import Plan
from grid.ranking import TrialSummary
from grid.record.recorder import Recorder
from grid.record.store import StoredTrial
from grid.recorded import read_grid_seconds
from grid.train.checkpoints import Checkpoints, StorageError
from grid.tune.recovery import AwakeClock

RECORD_SECONDS = 2.0
"""Between two records of how long the grid has been trained: as much may be forgotten when the driver is killed."""


class Watcher:
    """The `grid.tune.listener.Listener` of a grid: knows how every trial is doing.

    Args:
        plan: All trials of the grid.
        recorder: Where events go.
        checkpoints: Deleted when a trial ends.
        rungs: Epochs at which ASHA decides.
        concurrency: Trials at once.
        budget: What the grid may take in all.
        keep_weights: Whether the checkpoint of a completed trial is kept.
    """

    def __init__(
        self,
        plan: Plan,
        recorder: Recorder,
        checkpoints: Checkpoints,
        *,
        rungs: tuple[int, ...],
        concurrency: int,
        budget: Budget = NO_LIMIT,
        keep_weights: bool = False,
    ):
        self.total = len(plan.trials)
        self.todo = list(plan.trials)
        """Trials that have not ended, in the order in which they start."""
        self.summaries: dict[str, TrialSummary] = {}
        """Each trial that has ended, by its key."""
        self.progress = Progress(total=self.total, expected_epochs={}, concurrency=concurrency)
        self.interrupted = False
        self.problem = ""
        """Why nothing can be recorded any more; empty while it can."""
        self.unusable = ""
        """Which node or storage can't be used, and why; empty if all can."""
        self.exhausted = ""
        """Which limit of the budget has been reached, as an option; empty if none."""
        self.notices: Counter[str] = Counter()
        """What has gone wrong and was survived, with how often it happened."""
        self._accuracies: dict[str, list[float]] = {}
        self._stop_epochs: dict[str, int] = {}
        """Rungs at which ASHA stopped trials or would have, were they not controls, by trial key."""
        self._running: set[str] = set()
        self._controls = plan.controls
        self._control_chance = plan.control_chance
        self._rounds_before = plan.rounds_before
        self._rule = plan.rule
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._rungs = rungs
        self._keep_weights = keep_weights
        self._budget = budget
        self._clock = AwakeClock()
        self._spent_before = Spent(0.0, 0)
        self._recorded_seconds = 0.0
        self._epochs = 0

    @property
    def lost(self) -> bool:
        """Whether another driver has taken the experiment over; what this one still trains is not recorded."""
        return bool(self._recorder.store.lost)

    @property
    def spent(self) -> Spent:
        """What all runs of the grid have taken."""
        before = self._spent_before
        return Spent(before.seconds + self._clock.now, before.epochs + self._epochs)

    @property
    def suspending(self) -> bool:
        """Whether the budget is spent."""
        return bool(self.exhausted)

    def resume(self, stored: Mapping[str, StoredTrial]) -> None:
        """Continue where earlier runs left the grid.

        Args:
            stored: What the store has, by trial key.
        """
        self._spent_before = spent_on(stored.values(), self._recorder.store.grid_seconds())
        self._recorded_seconds = self._spent_before.seconds
        self._check_budget()
        known = [stored[trial.trial_key] for trial in self.todo if trial.trial_key in stored]
        self._accuracies = {trial.config.trial_key: list(trial.val_accuracies) for trial in known}
        self._stop_epochs = {trial.config.trial_key: trial.stop_epoch for trial in known if trial.stop_epoch}
        self._take_over_ended(known)
        self._end_what_was_over(known)
        self.todo = [trial for trial in self.todo if trial.trial_key not in self.summaries]
        self._checkpoints.delete_newer({trial.trial_key: self._epochs_of(trial) for trial in self.todo})
        self.progress.expected_epochs = expected_epochs(self.todo, self._controls, self._rule) if self.todo else {}

    def started(self, config: TrialConfig) -> None:
        """Record the start of a trial."""
        self._running.add(config.trial_key)
        self._accuracies.setdefault(config.trial_key, [])
        self._record(
            lambda: self._recorder.started(
                config,
                control=config.trial_key in self._controls,
                chance=self._control_chance,
                rounds_before=self._rounds_before,
            )
        )

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        """Record an epoch, once: a trial that was resumed reports some epochs again."""
        accuracies = self._accuracies[config.trial_key]
        if report.epoch <= len(accuracies):
            return
        accuracies.append(report.val_accuracy)
        self._epochs += 1
        self._check_budget()
        if stopped or spared:
            self._stop_epochs[config.trial_key] = report.epoch
        is_rung = report.epoch in self._rungs
        self._record(
            lambda: self._recorder.epoch_ended(config, report, is_rung=is_rung, stopped=stopped, spared=spared)
        )
        self.progress.epoch_ended(config.cell, report.epoch_seconds, report.metrics.get("val_accuracy"))

    def ended(self, config: TrialConfig, status: str, error: str) -> None:
        """Record the end of a trial, which may have had no worker to start in."""
        if config.trial_key not in self._running:
            self.started(config)
        self._running.discard(config.trial_key)
        self._end(config, status, error)

    def suspended(self, config: TrialConfig) -> None:
        """Record that a trial waits for the next run."""
        self._running.discard(config.trial_key)
        self._record(lambda: self._recorder.suspended(config))

    def tick(self) -> None:
        """Update the progress line, and end the run if another driver has taken it over."""
        self.interrupted = self.interrupted or self.lost
        self._clock.look()
        self._check_budget()
        if self.spent.seconds >= self._recorded_seconds + RECORD_SECONDS:
            self.record_spent()
        self.progress.running = len(self._running)
        self.progress.trouble = self._recorder.trouble
        self.progress.show()

    def record_spent(self) -> None:
        """Record how long the grid has been trained, by all commands."""
        self._recorded_seconds = self.spent.seconds
        self._record(lambda: self._recorder.time_spent(self._recorded_seconds))

    def notice(self, problem: str) -> None:
        """Show what has gone wrong."""
        self.notices[problem] += 1
        self.progress.notice(problem)

    def give_up(self, problem: str) -> None:
        """End the run; unfinished trials wait until the node or the storage is repaired."""
        self.unusable = self.unusable or problem
        self.interrupted = True

    def clear_checkpoints(self) -> None:
        """Delete what is left of a grid that has ended."""
        with self._noticing():
            self._checkpoints.clear()

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Stop gracefully on SIGINT or SIGTERM; a second signal ends the process at once."""
        kept = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(number, signal.SIG_DFL)

    def _check_budget(self) -> None:
        self.exhausted = self.exhausted or self._budget.exhausted(self.spent)

    def _epochs_of(self, config: TrialConfig) -> int:
        return len(self._accuracies.get(config.trial_key, ()))

    def _take_over_ended(self, known: list[StoredTrial]) -> None:
        for trial in known:
            if trial.status in FINAL_STATUSES:
                summary = summarise_trial(trial)
                self.summaries[trial.config.trial_key] = summary
                self.progress.done[trial.status] += 1
                self.progress.see(summary.cell, summary.best_val_accuracy)

    def _end_what_was_over(self, known: list[StoredTrial]) -> None:
        """Record the ends of trials whose driver crashed between their last epoch and their end."""
        for trial in known:
            if status := _status_of_unrecorded_end(trial):
                self._end(trial.config, status, "")

    def _end(self, config: TrialConfig, status: str, error: str) -> None:
        accuracies = self._accuracies.setdefault(config.trial_key, [])
        summary = TrialSummary(
            cell=config.cell,
            seed=config.seed,
            lr_scale=config.lr_scale,
            epochs=config.epochs,
            status=status,
            epochs_run=len(accuracies),
            best_val_accuracy=max((value for value in accuracies if not math.isnan(value)), default=None),
            final_val_accuracy=accuracies[-1] if status == "completed" and accuracies else None,
            stop_epoch=self._stop_epochs.get(config.trial_key),
            rung_accuracies={rung: accuracies[rung - 1] for rung in self._rungs if rung <= len(accuracies)},
        )
        self._record(
            lambda: self._recorder.ended(
                config,
                status,
                epochs_run=summary.epochs_run,
                best_val_accuracy=summary.best_val_accuracy,
                error=error,
            )
        )
        if not self.problem and not self.lost and not (self._keep_weights and status == "completed"):
            with self._noticing():
                self._checkpoints.delete(config.trial_key)
        self.summaries[config.trial_key] = summary
        self.progress.done[status] += 1

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Survive a storage that fails: a checkpoint that is left harms nobody, and goes when the grid has ended."""
        try:
            yield
        except StorageError as error:
            self.notice(str(error))

    def _record(self, write: Callable[[], None]) -> None:
        """Record, or end the run: what is not on the disk must not look as if it had happened."""
        if self.problem or self.lost:
            return
        try:
            write()
        except OSError as error:
            self.problem = f"can't write to the spool: {error.strerror}"
            self.interrupted = True


def spent_on(trials: Iterable[StoredTrial], grid_seconds: float) -> Spent:
    """Return what earlier runs of a grid have taken.

    Args:
        trials: What the store has; in older stores each says how many seconds that were when its last epoch ended.
        grid_seconds: What the store says of the grid.
    """
    seconds, epochs = grid_seconds, 0
    for trial in trials:
        seconds = max(seconds, read_grid_seconds(trial.tags))
        epochs += int(trial.metrics.get("epochs_run", 0)) if trial.status else len(trial.val_accuracies)
    return Spent(seconds, epochs)


def restore_rungs(asha: Asha, stored: Mapping[str, StoredTrial]) -> None:
    """Restore the rungs that earlier runs recorded: every arrival, with the verdict of that time."""
    for key, trial in stored.items():
        group = asha.rule.group_of(trial.config.cell)
        for epoch in asha.rungs:
            value = trial.metrics.get(f"{RUNG_METRIC}{epoch}")
            if value is not None:
                asha.restore(key, group=group, epoch=epoch, value=value, stop_epoch=trial.stop_epoch)
        if trial.status == "diverged":
            asha.diverge(key, group=group, epoch=int(trial.metrics["epochs_run"]))
        elif trial.val_accuracies and math.isnan(trial.val_accuracies[-1]):
            asha.diverge(key, group=group, epoch=len(trial.val_accuracies))


def summarise_trial(trial: StoredTrial) -> TrialSummary:
    """Return the summary of a recorded trial that has ended.

    Older stores have no final accuracy: there it is the last value of `val_accuracy`.
    """
    rungs = {name: value for name, value in trial.metrics.items() if name.startswith(RUNG_METRIC)}
    final = trial.metrics.get(FINAL_METRIC, trial.metrics.get("val_accuracy"))
    return TrialSummary(
        cell=trial.config.cell,
        seed=trial.config.seed,
        lr_scale=trial.config.lr_scale,
        epochs=trial.config.epochs,
        status=trial.status,
        epochs_run=int(trial.metrics["epochs_run"]),
        best_val_accuracy=trial.metrics.get("best_val_accuracy"),
        final_val_accuracy=final if trial.status == "completed" else None,
        stop_epoch=trial.stop_epoch,
        rung_accuracies={int(name.removeprefix(RUNG_METRIC)): value for name, value in rungs.items()},
    )


def _status_of_unrecorded_end(trial: StoredTrial) -> str:
    """Return how a trial ended whose last epoch is recorded, but not its end; empty for all others."""
    accuracies = trial.val_accuracies
    if trial.status or not accuracies:
        return ""
    if trial.was_stopped:
        return "stopped"
    if math.isnan(accuracies[-1]):
        return "diverged"
    return "completed" if len(accuracies) == trial.config.epochs else ""
