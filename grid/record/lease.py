"""The lease on an experiment: the right to be its one driver, decided by the store.

Every lease has a number. Whoever creates the MLflow experiment that is named after a number has the lease of that
number, since a store creates a name once; the highest number holds. The holder changes a tag from time to time. A
driver that finds a lease held watches this heartbeat by its own clock; no clocks are compared.
"""

import itertools
import re
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mlflow.exceptions import MlflowException

from grid.config import InputError
from grid.record.fence import LeaseLostError
from grid.record.holder import Holder, StoreLock
from grid.record.moved import find_move
from grid.record.spool import Spool, open_spool, unwritable
from grid.record.store import Store, already_exists
from grid.store_uri import artifact_location
from grid.wording import count

HEARTBEAT_SECONDS = 15.0
"""Between two heartbeats of the driver that holds the lease."""
EXPIRY_SECONDS = 90.0
"""A heartbeat that another driver has watched for this long without a change is the last one."""
POLL_SECONDS = 1.0
"""Between two looks at the heartbeat of another driver."""
TAG = "lease_"
"""Of the experiment, with the number of the lease: the count of its heartbeats, or `RELEASED`."""
RELEASED = "released"


def become_driver(store: Store, stack: ExitStack, *, spool: Path, storage: str, kind: str = "trial") -> Spool:
    """Take the lease on an experiment, and what belongs to it if its store was moved or copied.

    Args:
        store: The experiment; created if it is missing.
        stack: Closes the spool and gives the lease up.
        spool: Folder of spools.
        storage: Folder or URI of checkpoints.
        kind: Of the runs that are recorded: `trial` or `confirm`.

    Returns:
        The spool of this driver.

    Raises:
        InputError: Another driver is alive, or the store, the spool or what was moved can't be written.
    """
    move = find_move(store.uri, store.experiment)
    if move is not None:
        move.take_reports(spool)
    name = store.experiment if kind == "trial" else f"{store.experiment} {kind}"
    opened = stack.enter_context(closing(open_spool(spool, store.uri, name)))
    store.open()
    lease = Lease(store, opened, kind)
    stack.callback(lease.release)  # also while it is still waited for, in another thread
    lease.acquire()
    if move is not None:
        move.take_rest(storage)
    return opened


class Lease:
    """The lease on an experiment; a context manager that holds it for as long as the block lasts.

    While it is held, everything that is written through the store is fenced: as soon as another driver may have taken
    the lease over, the store is asked, and a driver that has lost it gets `LeaseLostError`.

    Args:
        store: The experiment, opened.
        spool: Of this driver. What an earlier driver left in it is set aside if others have continued since.
        kind: Of the runs that this driver records: `trial` or `confirm`.
    """

    def __init__(self, store: Store, spool: Spool | None = None, kind: str = "trial"):
        self.number = 0
        """Of this lease; 0 before it is acquired."""
        self._store = store
        self._client = store.client
        self._spool = spool
        self._kind = kind
        self._lock = StoreLock(store.uri, store.experiment_id)
        self._beats = itertools.count()
        self._confirmed_at = (0.0, 0.0)
        """When the last heartbeat began after which no other driver had come."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True)

    def acquire(self) -> None:
        """Become the one driver; wait for as long as it is unknown whether another one is alive.

        Raises:
            InputError: Another driver is alive, or the store does not answer.
        """
        try:
            with self._store.answering():
                self._claim(self._wait_until_free())
                self._confirm()
                self._store.fence(self)
                self._store.create_parent()
                self._tidy()
                self._adopt_spool()
        except BaseException:
            self.release()
            raise
        self._thread.start()

    def check(self) -> None:
        """Make sure that this driver still holds the lease; only after a pause without heartbeats the store is asked.

        Raises:
            LeaseLostError: Another driver holds it, or this one has given it up.
        """
        if self._store.lost:
            raise LeaseLostError(self._store.lost)
        if self._ending.is_set():
            what = f"this driver has given experiment '{self._store.experiment}' up"
            raise LeaseLostError(f"{what}; what has not arrived is kept for the next run")
        if _seconds_since(self._confirmed_at) >= EXPIRY_SECONDS / 2:
            self._confirm()

    def is_fresh(self) -> bool:
        """Return whether a heartbeat of this driver is recent enough to write."""
        is_over = self._store.lost or self._ending.is_set()
        return not is_over and _seconds_since(self._confirmed_at) < EXPIRY_SECONDS / 2

    def release(self) -> None:
        """Stop the heartbeats and give the lease up, if it is this driver's; a store that is down lets it expire.

        The store can be read on, but nothing more can be written through it.
        """
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.number and not self._store.lost:
            with suppress(InputError), self._store.answering():
                self._give_up()
        self._lock.release()

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _wait_until_free(self) -> int:
        """Return the number of the next lease once that of the last one is free."""
        seen: tuple[int, str] | None = None
        watched, looked_at = 0.0, time.monotonic()
        while True:
            number, beat = self._highest()
            if number == 0 or beat == RELEASED:
                self._lock.acquire()
                return number + 1
            holder = self._holder(number)
            if self._is_dead(holder) or watched >= EXPIRY_SECONDS:
                return number + 1
            if seen is None:
                seen = (number, beat)
                self._announce(holder)
            elif seen != (number, beat):
                raise self._refusal(holder)
            if self._ending.wait(POLL_SECONDS):
                raise InputError(f"stopped waiting for experiment '{self._store.experiment}'")
            watched += min(time.monotonic() - looked_at, 2 * POLL_SECONDS)  # not more: this driver was stopped itself
            looked_at = time.monotonic()

    def _is_dead(self, holder: Holder) -> bool:
        """Return whether a holder is certainly dead.

        Raises:
            InputError: It is certainly alive.
        """
        self._lock.acquire()
        here = Holder.here(self._lock.name)
        if self._lock.is_held_by(holder, here):
            raise self._refusal(holder)
        return holder.is_dead(here)

    def _announce(self, holder: Holder) -> None:
        print(
            f"experiment '{self._store.experiment}' was last run by {holder.driver}, which may be alive: watching its "
            f"heartbeat for up to {EXPIRY_SECONDS:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def _refusal(self, holder: Holder) -> InputError:
        hint = "wait for it or stop it"
        return InputError(f"experiment '{self._store.experiment}' is being run by {holder.driver}; {hint}")

    def _claim(self, number: int) -> None:
        here = Holder.here(self._lock.name)
        name = self._name(number)
        try:
            lease_id = self._client.create_experiment(
                name, artifact_location(self._store.uri, name), {**here.to_tags(), "kind": self._kind}
            )
        except MlflowException as error:
            if not already_exists(error):
                raise
            raise self._refusal(self._holder(number)) from error
        self.number = number
        self._beat()  # before the name may be purged: `mlflow gc` purges what is deleted
        self._client.delete_experiment(lease_id)

    def _tidy(self) -> None:
        """Say in the parent run who drives, and remove what earlier leases left."""
        self._store.client.set_tag(self._store.parent_id, "driver", Holder.here().driver)
        self._tell_time()
        experiment_id = self._store.experiment_id
        for number in _numbers(self._client.get_experiment(experiment_id).tags):
            if number < self.number:
                self._store.client.delete_experiment_tag(experiment_id, f"{TAG}{number}")
        before = self._client.get_experiment_by_name(self._name(self.number - 1))
        if before is not None and before.lifecycle_stage == "active":  # its driver died while it acquired it
            self._store.client.delete_experiment(before.experiment_id)

    def _adopt_spool(self) -> None:
        if self._spool is None:
            return
        experiment_id, _, number = self._spool.owner.partition(" ")
        is_known = number.isdecimal()  # not by versions that had no numbers
        try:
            if is_known and (experiment_id != self._store.experiment_id or self._continued_since(int(number))):
                self._set_aside(self._spool)
            self._spool.owner = f"{self._store.experiment_id} {self.number}"
        except OSError as error:
            raise unwritable(self._spool.path, error) from error

    def _continued_since(self, number: int) -> bool:
        """Return whether a driver that records the same kind of runs may have held the lease after a number."""
        for later in range(number + 1, self.number):
            entry = self._client.get_experiment_by_name(self._name(later))
            if entry is None or entry.tags.get("kind") == self._kind:
                return True
        return False

    def _set_aside(self, spool: Spool) -> None:
        reports, path = spool.set_aside()
        if path is not None:
            print(
                f"{count(reports, 'report')} of an earlier run from here came too late: another driver has continued "
                f"experiment '{self._store.experiment}' since, and trains these epochs itself; kept in {path}",
                file=sys.stderr,
                flush=True,
            )

    def _give_up(self) -> None:
        self._confirm()
        if self._store.parent_id:
            self._client.set_tag(self._store.parent_id, "driver", "")
        self._set_tag(RELEASED)

    def _keep_alive(self) -> None:
        while not self._ending.wait(HEARTBEAT_SECONDS):
            try:
                self._confirm()
                self._tell_time()
            except LeaseLostError:
                return
            except Exception:  # noqa: BLE001, S112  (whatever it is, the next heartbeat may succeed)
                continue

    def _confirm(self) -> None:
        """Write a heartbeat, then see that no other driver has come.

        This order makes it safe to write for a while: who comes later sees this heartbeat, and watches it first.
        """
        began = _read_clocks()
        try:
            self._beat()
        finally:  # a store that takes no heartbeat may still say who has come
            self._refuse_if_replaced()
        self._confirmed_at = began

    def _refuse_if_replaced(self) -> None:
        highest, _ = self._highest()
        if highest > self.number:
            self._store.lost = (
                f"{self._holder(highest).driver} has taken over experiment '{self._store.experiment}' from this "
                "driver, which gave no sign of life for too long and stops now; nothing is recorded twice"
            )
            raise LeaseLostError(self._store.lost)

    def _beat(self) -> None:
        self._set_tag(str(next(self._beats)))

    def _set_tag(self, value: str) -> None:
        self._client.set_experiment_tag(self._store.experiment_id, f"{TAG}{self.number}", value)

    def _tell_time(self) -> None:
        self._client.set_tag(self._store.parent_id, "driver_seen", f"{time.time():.0f}")

    def _highest(self) -> tuple[int, str]:
        """Return the number of the last lease, 0 if there was none, and its heartbeat.

        Names may have been purged; then the tags know the number.
        """
        tags = self._client.get_experiment(self._store.experiment_id).tags
        number = max(_numbers(tags), default=0)
        while self._client.get_experiment_by_name(self._name(number + 1)) is not None:
            number += 1
        return number, tags.get(f"{TAG}{number}", "")

    def _holder(self, number: int) -> Holder:
        entry = self._client.get_experiment_by_name(self._name(number))
        return Holder() if entry is None else Holder.from_tags(entry.tags)

    def _name(self, number: int) -> str:
        return f"lease {number} on experiment {self._store.experiment_id}"


def _numbers(tags: Mapping[str, Any]) -> list[int]:
    matches = (re.fullmatch(rf"{TAG}([1-9][0-9]*)", name) for name in tags)
    return [int(match[1]) for match in matches if match]


def _read_clocks() -> tuple[float, float]:
    """Return the time by two clocks that go on while the machine sleeps, if it has both."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)), time.time()


def _seconds_since(reading: tuple[float, float]) -> float:
    """Return the longer of the times that the two clocks say."""
    return max(now - then for now, then in zip(_read_clocks(), reading, strict=True))
