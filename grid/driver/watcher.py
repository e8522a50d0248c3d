"""Stands between Tune and the outside: passes what trials report to the recorder and the progress line."""

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from grid.config import TrialConfig
from grid.driver.progress import Progress
from grid.metrics import FINAL_STATUSES, RUNG_METRIC, EpochReport
from grid.plan.asha import Asha
from grid.plan.forecast import expected_epochs
from grid.plan.trials import Plan
from grid.ranking import TrialSummary
from grid.record.recorder import Recorder
from grid.record.store import StoredTrial
from grid.train.checkpoints import Checkpoints


class Watcher:
    """The `grid.tune.tuner.Listener` of a grid: remembers how every trial stands.

    Args:
        plan: All trials of the grid.
        stored: Trials that the store has from earlier runs.
        recorder: Where reports go.
        checkpoints: Forgotten when a trial ends.
        rungs: Epochs at which ASHA decides.
        concurrency: Trials at once.
        keep_weights: Whether the checkpoint of a completed trial is kept.
    """

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[str, StoredTrial],
        recorder: Recorder,
        checkpoints: Checkpoints,
        *,
        rungs: tuple[int, ...],
        concurrency: int,
        keep_weights: bool = False,
    ):
        known = {trial.trial_key: stored[trial.trial_key] for trial in plan.trials if trial.trial_key in stored}
        self.summaries = {key: summarise_trial(trial) for key, trial in known.items() if trial.status in FINAL_STATUSES}
        """How each trial that has ended stands, by its key."""
        self.interrupted = False
        self.problem = ""
        """Why nothing can be recorded any more; empty while it can."""
        self.unusable_node = ""
        """Which machine can't train, and why; empty if all can."""
        self.total = len(plan.trials)
        self._accuracies = {key: list(trial.val_accuracies) for key, trial in known.items()}
        self._controls = plan.controls
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._rungs = rungs
        self._keep_weights = keep_weights
        self._running: dict[str, TrialConfig] = {}
        self.progress = Progress(
            total=self.total,
            expected_epochs={},
            concurrency=concurrency,
            done=Counter(summary.status for summary in self.summaries.values()),
        )
        for summary in self.summaries.values():
            self.progress.see(summary.cell, summary.best_val_accuracy)
        for trial in known.values():
            self._end_if_over(trial)
        self.todo = [trial for trial in plan.trials if trial.trial_key not in self.summaries]
        """Trials that have not ended, in the order in which they start."""
        self.progress.expected_epochs = expected_epochs(self.todo, plan.controls) if self.todo else {}

    def started(self, config: TrialConfig) -> None:
        """Record the start of a trial."""
        self._running[config.trial_key] = config
        self._accuracies.setdefault(config.trial_key, [])
        self._keep(self._recorder.started, config, control=config.trial_key in self._controls)

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool) -> None:
        """Record an epoch, once: a trial that was taken up again reports some epochs again."""
        accuracies = self._accuracies[config.trial_key]
        if report.epoch <= len(accuracies):
            return
        accuracies.append(report.val_accuracy)
        is_rung = report.epoch in self._rungs
        self._keep(self._recorder.epoch_ended, config, report.epoch, report.metrics, is_rung=is_rung, stopped=stopped)
        self.progress.epoch_ended(config.cell, report.epoch_seconds, report.metrics.get("val_accuracy"))

    def ended(self, config: TrialConfig, status: str, error: str) -> None:
        """Record the end of a trial."""
        self._running.pop(config.trial_key, None)
        accuracies = self._accuracies.setdefault(config.trial_key, [])
        best = max((accuracy for accuracy in accuracies if not math.isnan(accuracy)), default=None)
        figures = {"epochs_run": len(accuracies), "best_val_accuracy": best}
        self._keep(self._recorder.ended, config, status, **figures, error=error)
        if not self.problem and not (self._keep_weights and status == "completed"):
            self._checkpoints.delete(config.trial_key)
        self.summaries[config.trial_key] = TrialSummary(
            cell=config.cell,
            seed=config.seed,
            lr_scale=config.lr_scale,
            epochs=config.epochs,
            status=status,
            epochs_run=len(accuracies),
            best_val_accuracy=best,
            rung_accuracies={rung: accuracies[rung - 1] for rung in self._rungs if rung <= len(accuracies)},
        )
        self.progress.done[status] += 1

    def tick(self) -> None:
        """Keep the progress line alive."""
        self.progress.running = len(self._running)
        self.progress.show()

    def give_up(self, problem: str) -> None:
        """End the run: what is left waits until the machine is mended."""
        self.unusable_node = self.unusable_node or problem
        self.interrupted = True

    def suspended(self, config: TrialConfig) -> None:
        """Record that a trial was interrupted; another run resumes it."""
        self._running.pop(config.trial_key, None)
        self._keep(self._recorder.suspended, config)

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Let Ctrl-C and a polite kill end the run in good order; a second one ends it at once."""
        kept = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(number, signal.SIG_DFL)

    def _keep(self, record: Callable[..., None], config: TrialConfig, *values: object, **named: object) -> None:
        """Record, or end the run: what is not on the disk must not look as if it had happened."""
        if self.problem:
            return
        try:
            record(config, *values, **named)
        except OSError as error:
            self.problem = f"can't write to the spool: {error.strerror}"
            self.interrupted = True

    def _end_if_over(self, trial: StoredTrial) -> None:
        """Record the end of a trial whose driver died between its last epoch and its end."""
        accuracies = trial.val_accuracies
        if trial.status or not accuracies:
            return
        if trial.stopped_at is not None:
            self.ended(trial.config, "stopped", "")
        elif math.isnan(accuracies[-1]):
            self.ended(trial.config, "diverged", "")
        elif len(accuracies) == trial.config.epochs:
            self.ended(trial.config, "completed", "")


def restore_rungs(asha: Asha, stored: Mapping[str, StoredTrial]) -> None:
    """Bring the rungs to where earlier runs left them: every recorded arrival, with the decision that was made."""
    for key, trial in stored.items():
        group = trial.config.model
        for epoch in asha.rungs:
            value = trial.metrics.get(f"{RUNG_METRIC}{epoch}")
            if value is not None:
                asha.restore(key, group=group, epoch=epoch, value=value, went_on=trial.stopped_at != epoch)
        if trial.status == "diverged":
            asha.diverge(key, group=group, epoch=int(trial.metrics["epochs_run"]))
        elif trial.val_accuracies and math.isnan(trial.val_accuracies[-1]):
            asha.diverge(key, group=group, epoch=len(trial.val_accuracies))


def summarise_trial(trial: StoredTrial) -> TrialSummary:
    """Return where a trial that has ended stands."""
    rungs = {name: value for name, value in trial.metrics.items() if name.startswith(RUNG_METRIC)}
    return TrialSummary(
        cell=trial.config.cell,
        seed=trial.config.seed,
        lr_scale=trial.config.lr_scale,
        epochs=trial.config.epochs,
        status=trial.status,
        epochs_run=int(trial.metrics["epochs_run"]),
        best_val_accuracy=trial.metrics.get("best_val_accuracy"),
        rung_accuracies={int(name.removeprefix(RUNG_METRIC)): value for name, value in rungs.items()},
    )
