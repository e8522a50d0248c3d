"""Carries the lines of a queue to the store in a thread that outlives every error.

A store that takes nothing is tried again and again, and every line waits. A group of lines, such as the events of a
trial, that fails while others arrive is parked, tried again from time to time, and holds nothing up but itself. A line
that the store will never take is parked alone.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol

from grid.record.fence import LeaseLostError
from grid.record.spool import Line, Parked, ParkedLine, Queue
from grid.record.store import UNREACHABLE
from grid.wording import first_line

CAPACITY = 10_000
"""Lines in memory; more wait on the disk."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0
"""Between two attempts to reach a store that does not answer: doubled after each failure."""
PARKED_WAIT_SECONDS = 5.0
"""Before parked lines are tried again: doubled after each failure, up to 5 minutes."""
LONGEST_PARKED_WAIT_SECONDS = 300.0
ATTEMPTS = 3
"""Failures of a group, while others arrive, before it is parked; and groups in a row that fail before a wait."""
GRACE_SECONDS = 25.0
"""At the end, for an attempt that has begun; a server that is asked may be silent for 20."""


class Refusal(Exception):  # noqa: N818  (no error of the program)
    """A line can't be delivered, now or later; the text says why."""


class Carrier(Protocol):
    """Knows what the lines mean and where they go."""

    def group_of(self, line: Line) -> str:
        """Return what a line belongs to; lines of a group are delivered in their order."""

    def deliver(self, group: str, lines: Sequence[Line], *, again: bool) -> None:
        """Deliver lines of a group; `again` if they were parked, so that later ones may have overtaken them."""

    def is_refused(self, error: Exception) -> bool:
        """Return whether the store will never take a line that caused this error."""


class Courier:
    """Delivers a queue.

    Args:
        name: Of its thread.
        queue: What is delivered.
        carrier: Who delivers it.
    """

    def __init__(self, name: str, queue: Queue, carrier: Carrier):
        self.queue = queue
        self.parked = Parked(queue)
        self.error = ""
        """Why the last attempt failed; empty if it succeeded."""
        self._carrier = carrier
        self._position: int | None = None
        """In the queue, behind the last line that was read."""
        self._read = 0
        self._backlog: defaultdict[str, list[Line]] = defaultdict(list)
        """Lines that were read and have not arrived, by group."""
        self._failures: Counter[str] = Counter()
        """In a row, by group."""
        self._failed: dict[str, Exception] = {}
        """Groups that have failed since the last one arrived."""
        self._strikes: Counter[str] = Counter()
        """How often a group has failed while others arrived."""
        self._silent_since: float | None = None
        """Since when something is to be delivered and nothing has arrived."""
        self._parked_wait = PARKED_WAIT_SECONDS
        self._parked_at = 0.0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def waiting(self) -> int:
        """Number of lines that have not arrived, those that the store will never take not counted."""
        backlog = sum(map(len, list(self._backlog.values())))
        return self.queue.appended - self._read + backlog + sum(line.again for line in self.parked.lines)

    @property
    def silent_seconds(self) -> float:
        """For how long nothing has arrived although lines are waiting."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Start to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to deliver."""
        self._wake.set()

    def close(self, deadline: float) -> bool:
        """Deliver what is left, end the thread, and return whether everything has arrived or is parked for good.

        Args:
            deadline: How long to wait for a store that does not answer, on the clock of `time.monotonic`.
        """
        self._parked_at = 0.0
        while self._thread.is_alive() and self.waiting and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.05)
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)
        return not self.waiting

    def catch_up(self) -> None:
        """Deliver everything now, what was parked earlier first; what fails alone is parked.

        Raises:
            Exception: What the store raised, if it takes nothing.
        """
        self._retry_parked(self.parked.lines)
        for _ in range(ATTEMPTS - 1):
            try:
                return self._deliver_pending()
            except Exception:  # noqa: BLE001  (of whichever library; the last attempt raises)
                time.sleep(FIRST_WAIT_SECONDS)
        return self._deliver_pending()

    def park_backlog(self, error: Exception) -> None:
        """Park what was read and has not arrived, to be tried again later."""
        for group in list(self._backlog):
            self._park(group, describe(error))
        self._mark()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._deliver_until_closed()
            except BaseException as error:  # noqa: BLE001  (such as a second MemoryError while one is dealt with)
                self.error = type(error).__name__
                time.sleep(FIRST_WAIT_SECONDS)
                self._wake.set()

    def _deliver_until_closed(self) -> None:
        wait = FIRST_WAIT_SECONDS
        while not self._closing.is_set():
            self._wake.wait(PARKED_WAIT_SECONDS if self.parked.held else None)
            self._wake.clear()
            try:
                self._deliver_pending()
                self._retry_held_if_due()
                self.error, wait = "", FIRST_WAIT_SECONDS
            except LeaseLostError as error:
                self.error = describe(error)
                self._closing.set()
            except BaseException as error:  # noqa: BLE001  (whatever a library raises, the next attempt may succeed)
                self._silent_since = self._silent_since or time.monotonic()
                self.error = describe(error)
                self._closing.wait(wait)
                self._wake.set()
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _deliver_pending(self) -> None:
        """Deliver until nothing is left; raise if the store takes nothing more."""
        while self._fetch():
            self._silent_since = self._silent_since or time.monotonic()
            self._deliver_backlog()
            self._mark()

    def _fetch(self) -> bool:
        """Read more lines; return whether there are any to deliver."""
        room = CAPACITY - sum(map(len, self._backlog.values()))
        damaged = len(self.queue.unreadable)
        lines, self._position = self.queue.pending(room, self._position)
        for line in lines:
            self._backlog[self._carrier.group_of(line)].append(line)
        self._read += len(lines) + len(self.queue.unreadable) - damaged
        self._mark()
        return bool(self._backlog)

    def _mark(self) -> None:
        if not self._backlog and self._position is not None:
            self.queue.delivered(self._position)
            self._silent_since = None

    def _deliver_backlog(self) -> None:
        """Try each group, those that have failed before last; raise if one failed and is not parked."""
        problem: Exception | None = None
        misses = 0
        for group in sorted(self._backlog, key=lambda group: self._failures[group]):
            if group not in self._backlog:  # parked meanwhile
                continue
            if group in self.parked.held:  # what follows a line waits behind it
                self._park(group, self.error)
                continue
            try:
                self._send(group, self._backlog[group], again=False)
            except LeaseLostError:
                raise
            except Exception as error:  # noqa: BLE001  (of whichever library)
                self._failures[group] += 1
                self._failed[group] = error
                problem, misses = error, misses + 1
                if misses == ATTEMPTS:
                    break
            else:
                self._arrived(group)
                misses = 0
        if problem is not None and self._failures:
            raise problem

    def _arrived(self, group: str) -> None:
        """Note that the store takes something, and park the groups that it keeps failing to take meanwhile."""
        self._forget(group)
        self._silent_since = time.monotonic()
        self._failed, failed = {}, self._failed
        for other, error in failed.items():
            self._strikes[other] += 1
            if self._strikes[other] == ATTEMPTS:
                self._park(other, describe(error))

    def _park(self, group: str, reason: str) -> None:
        self.parked.add(group, self._backlog[group], reason, again=True)
        self._forget(group)

    def _forget(self, group: str) -> None:
        del self._backlog[group]
        self._failures.pop(group, None)
        self._strikes.pop(group, None)
        self._failed.pop(group, None)

    def _send(self, group: str, lines: list[Line], *, again: bool) -> None:
        """Deliver lines; those that the store refuses for ever are found one by one, and parked.

        On an error `lines` has what has not been dealt with.
        """
        try:
            self._carrier.deliver(group, lines, again=again)
        except Exception as error:
            if not isinstance(error, Refusal) and not self._carrier.is_refused(error):
                raise
            if len(lines) == 1:
                self.parked.add(group, lines, describe(error), again=False)
                return
            while lines:
                self._send(group, lines[:1], again=again)
                del lines[0]

    def _retry_held_if_due(self) -> None:
        if not self.parked.held or time.monotonic() < self._parked_at:
            return
        succeeded = self._retry_parked([line for line in self.parked.lines if line.again])
        longer = min(2 * self._parked_wait, LONGEST_PARKED_WAIT_SECONDS)
        self._parked_wait = PARKED_WAIT_SECONDS if succeeded else longer
        self._parked_at = time.monotonic() + self._parked_wait

    def _retry_parked(self, parked: Sequence[ParkedLine]) -> bool:
        """Try parked lines again; return whether all groups were dealt with."""
        groups: defaultdict[str, list[ParkedLine]] = defaultdict(list)
        for line in parked:
            groups[line.group].append(line)
        failed = [group for group, lines in groups.items() if not self._retry_group(group, lines)]
        return not failed

    def _retry_group(self, group: str, parked: Sequence[ParkedLine]) -> bool:
        lines = [each.line for each in parked]
        try:
            self._send(group, lines, again=True)
        except LeaseLostError:
            raise
        except Exception as error:  # noqa: BLE001  (of whichever library)
            if len(lines) < len(parked) or not all(line.again for line in parked):
                self.parked.replace(parked, [ParkedLine(group, describe(error), True, line) for line in lines])
            return False
        self.parked.replace(parked, [])
        return True


def describe(error: BaseException) -> str:
    """Return an error in one line without its secrets: of a store its text, of anything else its type as well."""
    text, kind = first_line(error), type(error).__name__
    return text if isinstance(error, (*UNREACHABLE, LeaseLostError, Refusal)) or text == kind else f"{kind}: {text}"
