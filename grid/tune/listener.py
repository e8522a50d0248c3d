"""The door between `grid.tune.bridge`, which knows Ray, and the rest, which does not."""

from typing import Any, Protocol

from grid.config import TrialConfig
from grid.metrics import EpochReport


class Listener(Protocol):
    """Hears how the trials progress; called from the driver's main thread, and must return quickly."""

    def started(self, config: TrialConfig) -> None:
        """A trial has begun, for the first time or again."""

    def epoch_ended(self, config: TrialConfig, report: EpochReport, *, stopped: bool, spared: bool = False) -> None:
        """An epoch has ended.

        `stopped` if ASHA has decided that it was the last, `spared` if ASHA would have, but the trial is a control.
        """

    def ended(self, config: TrialConfig, status: str, error: str) -> None:
        """A trial has ended with one of `grid.metrics.STATUSES`; `error` is the traceback of a failed one.

        It has not started if every worker that was to train it died before.
        """

    def suspended(self, config: TrialConfig) -> None:
        """A trial was interrupted before its end; another run may resume it."""

    def tick(self) -> None:
        """Called often, between the events: keeps a progress line alive."""

    def notice(self, problem: str) -> None:
        """Something went wrong that the run survives, so far: a worker died, or the storage has failed."""

    def give_up(self, problem: str) -> None:
        """The trials can't go on: a node can't train what the others train, or the storage stays away."""

    @property
    def suspending(self) -> bool:
        """Whether to start no trial any more, and to suspend each that runs once its epoch has ended."""

    @property
    def interrupted(self) -> bool:
        """Whether to stop now and leave the unfinished trials unfinished."""


class DriverOnly:
    """Holds a listener, and leaves it out when Tune pickles what it calls for a restore, which is not used here."""

    def __init__(self, listener: Listener):
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        return {}
