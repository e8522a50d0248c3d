"""What becomes of a trial whose worker dies, hangs or waits for the storage. Pure rules, without Ray."""

import math
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from grid.wording import format_seconds

MOST_DEATHS = 8
"""Deaths of its worker without a new epoch in between, after which a trial fails; losses of nodes do not count."""
FEWEST_FUTILE_DEATHS = 12
"""Deaths without any epoch of any trial in between, after which the run ends; at least three for each worker."""
FEWEST_ALIKE = 8
"""Trials that end first and all fail alike, after which the run ends; at least one for each worker."""
STORAGE_PATIENCE_SECONDS = 600.0
"""How long a trial waits for a storage that fails before the run ends."""
EPOCH_FACTOR = 20.0
"""An epoch that takes this many times as long as expected is ended."""
FLOOR_SECONDS = 300.0
"""No epoch is ended earlier than this; the first of a worker may take as long on top, to start."""
LONGEST_TICK_SECONDS = 1.0
"""More time than this between two looks is not counted: the machine or this process was suspended."""
KEEP = "--keep-going"
NUMBER = re.compile(r"\d+")
KNOWN_EPOCHS = 25
"""Epochs of a model from which the expected time is taken."""


@dataclass(frozen=True)
class Death:
    """How a worker died."""

    reason: str
    """In words, without what differs from one death to the next."""
    own: bool
    """Whether the trial may be to blame: not if its node was lost."""


def explain_death(text: str, *, killed_for_memory: bool) -> Death:
    """Return how a worker died.

    Args:
        text: What Ray says of it.
        killed_for_memory: Whether the kernel has just killed a process of this machine for want of memory.
    """
    low, last_line = text.lower(), (text.strip().splitlines() or ["no reason given"])[-1].strip()
    if "outofmemoryerror" in low or "low on memory" in low:
        return Death("killed by Ray because its node ran low on memory", own=True)
    if "creation task" in low:
        return Death(f"it could not start: {last_line}", own=True)
    if "traceback (most recent call last)" in low:
        return Death(f"it raised {last_line}", own=True)
    if "preempt" in low:
        return Death("its node was preempted", own=False)
    if "node has died" in low or "nodediederror" in low or "node it was running on" in low:
        return Death("its node was lost", own=False)
    if "is unavailable" in low or "owner has died" in low or "intended_system_exit" in low:
        return Death("its node does not answer", own=False)
    if killed_for_memory:
        return Death("killed by the kernel for want of memory", own=True)
    if "worker process has died" in low:
        return Death("killed, or crashed; the kernel's log (dmesg) of its machine may say why", own=True)
    return Death(last_line, own=True)


class Recovery:
    """Decides whether a trial is run again, and when all of them had better stop.

    Args:
        slots: Workers at once.
        keep_going: Whether to go on though the first trials all fail alike.
    """

    def __init__(self, slots: int, *, keep_going: bool = False):
        self._most_alike = math.inf if keep_going else max(FEWEST_ALIKE, slots)
        self._alike: list[str] | None = []
        """Why the trials failed that have ended; None once one has trained, has not failed, or has failed otherwise."""
        self._most_futile = max(FEWEST_FUTILE_DEATHS, 3 * slots)
        self._futile: list[str] = []
        self._deaths: Counter[str] = Counter()
        self._hung: set[str] = set()
        self._epochs: Counter[str] = Counter()

    def progressed(self, trial_key: str, epoch: int) -> None:
        """Note that a trial has finished an epoch."""
        self._futile.clear()
        self._alike = None
        if epoch > self._epochs[trial_key]:
            self._epochs[trial_key] = epoch
            self._deaths.pop(trial_key, None)

    def died(self, trial_key: str, death: Death) -> str:
        """Return why a trial fails whose worker has died; empty if it is run again."""
        self._futile.append(death.reason)
        self._deaths[trial_key] += death.own
        if self._deaths[trial_key] < MOST_DEATHS:
            return ""
        return f"its worker died {MOST_DEATHS} times without finishing an epoch: {death.reason}"

    def hung(self, trial_key: str, overdue: str) -> str:
        """Return why a trial fails whose epoch was ended for being overdue; empty if it is run again."""
        again = trial_key in self._hung
        self._hung.add(trial_key)
        return f"{overdue}, twice" if again else ""

    def ended(self, failure: str) -> None:
        """Note that a trial has ended, and why it failed; empty if it did not."""
        if self._alike is None:
            return
        reason = (failure.strip().splitlines() or [""])[-1]
        if not reason or (self._alike and NUMBER.sub("#", self._alike[0]) != NUMBER.sub("#", reason)):
            self._alike = None
        else:
            self._alike.append(reason)

    @property
    def futile(self) -> str:
        """Why no trial gets anywhere; empty as long as some do."""
        if self._alike and len(self._alike) >= self._most_alike:
            return f"the first {len(self._alike)} trials all failed alike ({self._alike[0]}); fix that, or pass {KEEP}"
        if len(self._futile) < self._most_futile:
            return ""
        reason, _ = Counter(self._futile).most_common(1)[0]
        hint = "pass a smaller --concurrency, or find the reason"
        return f"{len(self._futile)} workers died in a row, none after an epoch ({reason}); {hint}"


class AwakeClock:
    """Counts the seconds in which this process ran: not those in which it or the machine was suspended.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.now = 0.0
        """Seconds until the last look."""
        self._clock = clock
        self._seen_at = clock()

    def look(self) -> None:
        """Move on; called at least every `LONGEST_TICK_SECONDS`."""
        seen_at, self._seen_at = self._seen_at, self._clock()
        self.now += min(self._seen_at - seen_at, LONGEST_TICK_SECONDS)


class Deadlines:
    """Finds epochs that take much longer than others of the same trial or, before there are any, of its model.

    Args:
        clock: The time.
        floor_seconds: No epoch is overdue earlier.
    """

    def __init__(self, clock: AwakeClock, floor_seconds: float):
        self._clock = clock
        self._floor = floor_seconds
        self._limits: dict[str, tuple[float, float]] = {}
        """When each epoch that runs began, and the seconds that it may take, by trial key."""
        self._of_model: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KNOWN_EPOCHS))
        self._of_trial: dict[str, list[float]] = {}

    def begin(self, trial_key: str, model: str, *, first: bool = False) -> None:
        """Note that an epoch begins: the `first` since the trial was started or resumed, or a later one."""
        known = self._of_trial.get(trial_key) or self._of_model[model]
        limit = max(self._floor, EPOCH_FACTOR * median(known)) if known else math.inf
        self._limits[trial_key] = self._clock.now, limit + (self._floor if first else 0.0)

    def end(self, trial_key: str, model: str, seconds: float) -> None:
        """Note that an epoch has ended, and how long it took."""
        self._limits.pop(trial_key, None)
        self._of_model[model].append(seconds)
        self._of_trial.setdefault(trial_key, []).append(seconds)

    def forget(self, trial_key: str) -> None:
        """Watch a trial no longer."""
        self._limits.pop(trial_key, None)
        self._of_trial.pop(trial_key, None)

    def overdue(self) -> dict[str, str]:
        """Return the trials whose epoch takes too long, with the reason, once for each epoch."""
        now = self._clock.now
        late = {key: limit for key, (since, limit) in self._limits.items() if now - since > limit}
        for key in late:
            del self._limits[key]
        longer = f"{EPOCH_FACTOR:g} times as long as expected"
        return {key: f"an epoch took more than {limit:.0f} s, {longer}" for key, limit in late.items()}


class StorageWaits:
    """Finds out whether the storage has failed for too long.

    Args:
        clock: The time.
        patience_seconds: How long a trial waits.
    """

    def __init__(self, clock: AwakeClock, patience_seconds: float):
        self._clock = clock
        self._patience = patience_seconds
        self._since: dict[str, float] = {}

    def failed(self, trial_key: str, error: str) -> str:
        """Note that a trial can't use the storage; return why the run ends if that has lasted too long, else ""."""
        since = self._since.setdefault(trial_key, self._clock.now)
        if self._clock.now - since < self._patience:
            return ""
        return f"{error}; that has lasted for {format_seconds(self._clock.now - since)}: repair it or make room"

    def answered(self, trial_key: str) -> None:
        """Note that a trial waits no longer."""
        self._since.pop(trial_key, None)
