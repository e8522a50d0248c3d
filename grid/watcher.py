"""Stands between Tune and the outside: passes what trials report to the recorder and the progress line."""

import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from grid.config import TrialConfig
from grid.forecast import expected_epochs
from grid.plan import Plan
from grid.progress import Progress, Standing
from grid.record import Recorder, StoredTrial
from grid.trial import EpochReport

FINAL = ("completed", "stopped", "diverged")
"""Statuses of trials that are not run again."""


class Watcher:
    """The `grid.tuner.Listener` of a grid: remembers how every trial stands.

    Args:
        plan: All trials of the grid.
        stored: Trials that the store has from earlier runs.
        recorder: Where reports go.
        rungs: Epochs at which ASHA decides.
        concurrency: Trials at once.
    """

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[str, StoredTrial],
        recorder: Recorder,
        *,
        rungs: Sequence[int],
        concurrency: int,
    ):
        known = {trial.trial_key: stored[trial.trial_key] for trial in plan.trials if trial.trial_key in stored}
        self.todo = [
            trial for trial in plan.trials if trial.trial_key not in known or known[trial.trial_key].status not in FINAL
        ]
        """Trials that have not ended, in the order in which they start."""
        self.standings = {key: _restore_standing(trial) for key, trial in known.items() if trial.status in FINAL}
        """How each trial that has ended stands, by its key."""
        self.interrupted = False
        self.total = len(plan.trials)
        self._accuracies = {key: list(trial.val_accuracies) for key, trial in known.items()}
        self._controls = plan.controls
        self._recorder = recorder
        self._rungs = rungs
        self._running: set[str] = set()
        self.progress = Progress(
            total=self.total,
            expected_epochs=expected_epochs(self.todo, plan.controls) if self.todo else {},
            concurrency=concurrency,
            done=Counter(standing.status for standing in self.standings.values()),
        )

    def started(self, config: TrialConfig) -> None:
        """Record the start of a trial."""
        self._running.add(config.trial_key)
        self._accuracies.setdefault(config.trial_key, [])
        self._recorder.trial_started(config, control=config.trial_key in self._controls)

    def reported(self, config: TrialConfig, report: EpochReport) -> None:
        """Record an epoch, once: a trial that was begun anew reports its first epochs again."""
        accuracies = self._accuracies[config.trial_key]
        if report.epoch <= len(accuracies):
            return
        accuracies.append(report.val_accuracy)
        self._recorder.epoch_ended(config, report.epoch, report.metrics, is_rung=report.epoch in self._rungs)
        self.progress.epoch_ended(config.cell, report.epoch_seconds, report.metrics.get("val_accuracy"))

    def ended(self, config: TrialConfig, status: str, error: str) -> None:
        """Record the end of a trial."""
        self._running.discard(config.trial_key)
        accuracies = self._accuracies.setdefault(config.trial_key, [])
        best = max((accuracy for accuracy in accuracies if accuracy == accuracy), default=None)  # not NaN
        self._recorder.trial_ended(config, status, epochs_run=len(accuracies), best_val_accuracy=best, error=error)
        self.standings[config.trial_key] = Standing(
            cell=config.cell,
            seed=config.seed,
            lr_scale=config.lr_scale,
            status=status,
            epochs_run=len(accuracies),
            best_val_accuracy=best,
        )
        self.progress.done[status] += 1

    def tick(self) -> None:
        """Keep the progress line alive."""
        self.progress.running = len(self._running)
        self.progress.show()

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


def _restore_standing(trial: StoredTrial) -> Standing:
    return Standing(
        cell=trial.config.cell,
        seed=trial.config.seed,
        lr_scale=trial.config.lr_scale,
        status=trial.status,
        epochs_run=int(trial.metrics["epochs_run"]),
        best_val_accuracy=trial.metrics.get("best_val_accuracy"),
    )
