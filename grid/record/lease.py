"""The lease on an experiment: the right to be its one driver, kept alive by heartbeats in the store."""

import os
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

import psutil

from grid.config import InputError
from grid.record.store import UNREACHABLE, Store

CONFIRM_SECONDS = 0.5
"""Of two drivers that request a lease within this time, the later one gets it."""
HEARTBEAT_SECONDS = 15.0
"""Between two heartbeats of the driver that holds the lease."""
EXPIRY_SECONDS = 90.0
"""Without a heartbeat for this long, a driver on another host counts as dead."""


class Lease:
    """The lease on an experiment; a context manager that holds it for as long as the block lasts.

    `request` and `confirm` do the same in two steps, so that other work can be done while the request is pending.

    Args:
        store: The experiment; its parent run exists.
    """

    def __init__(self, store: Store):
        self._store = store
        self._requested_at = 0.0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def request(self) -> None:
        """Ask to be the one driver; `confirm` says whether that was granted.

        Raises:
            InputError: Another driver is alive, or the store does not answer.
        """
        with self._store.answering():
            tags = self._store.client.get_run(self._store.parent_id).data.tags
            driver, seen = tags.get("driver", ""), float(tags.get("driver_seen", 0))
            if driver and driver != _this_driver() and _is_alive(driver, seen):
                raise InputError(
                    f"experiment '{self._store.experiment}' is being run by {driver} (last heartbeat "
                    f"{time.time() - seen:.0f} s ago); wait for it or stop it; if it has crashed, its lease expires "
                    f"after {EXPIRY_SECONDS:.0f} s"
                )
            self._tag("driver", _this_driver())
            self._heartbeat()
        self._requested_at = time.monotonic()

    def confirm(self) -> None:
        """Wait until any driver that looked before this request must have made its own, then start the heartbeats.

        Raises:
            InputError: Another driver requested the lease later, or the store does not answer.
        """
        time.sleep(max(0.0, self._requested_at + CONFIRM_SECONDS - time.monotonic()))
        if self._holder() != _this_driver():
            raise InputError(f"another driver has just started on experiment '{self._store.experiment}'; wait for it")
        self._thread.start()

    def release(self) -> None:
        """Stop the heartbeats and give the lease up, if it is this driver's; a store that is down lets it expire."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(InputError):
            if self._holder() == _this_driver():
                with self._store.answering():
                    self._tag("driver", "")

    def __enter__(self) -> "Lease":
        self.request()
        self.confirm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(*UNREACHABLE):  # whoever records will notice, and retry
                self._heartbeat()

    def _heartbeat(self) -> None:
        self._tag("driver_seen", f"{time.time():.0f}")

    def _holder(self) -> str:
        with self._store.answering():
            return str(self._store.client.get_run(self._store.parent_id).data.tags.get("driver", ""))

    def _tag(self, name: str, value: str) -> None:
        self._store.client.set_tag(self._store.parent_id, name, value)


def _this_driver() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _is_alive(driver: str, seen: float) -> bool:
    host, _, pid = driver.rpartition(":")
    if host == socket.gethostname() and not psutil.pid_exists(int(pid)):
        return False
    return time.time() - seen < EXPIRY_SECONDS
