"""The process that holds a lease, as another process can recognise it: alive, certainly dead, or unknown."""

import fcntl
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

from grid.store_uri import sqlite_path

LONGEST_NAME = 100
"""Of a driver: a host has at most 64 characters on Linux."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A driver, and what identifies its process."""

    driver: str = "another driver"
    """`HOST:PID`, for people."""
    boot: str = ""
    """Identifies one start of one kernel, which containers share; empty if unknown."""
    spaces: str = ""
    """Namespaces in which `pid` and `started` mean something."""
    pid: int = 0
    started: str = ""
    """Start of the process, in clock ticks since that of the kernel."""
    lock: str = ""
    """Device and inode of the file that it has locked; empty if none."""

    @classmethod
    def here(cls, lock: str = "") -> "Holder":
        """Return this process."""
        pid = os.getpid()
        started = _started(pid)
        return cls(
            driver=f"{socket.gethostname()}:{pid}",
            boot=_boot(),
            spaces=_spaces(),
            pid=pid,
            started=started,
            lock=lock,
        )

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Holder":
        """Return the holder that `to_tags` described; what is missing is unknown."""
        known = {field.name: tags[field.name] for field in fields(cls) if field.name in tags}
        pid, driver = known.pop("pid", ""), _printable(known.pop("driver", ""))
        return cls(**known, driver=driver or cls.driver, pid=int(pid) if pid.isdecimal() and len(pid) < 10 else 0)

    def to_tags(self) -> dict[str, str]:
        """Return everything as text."""
        return {name: str(value) for name, value in asdict(self).items()}

    def is_dead(self, here: "Holder") -> bool:
        """Return whether its process has certainly ended, as seen from another one."""
        if not self.boot or self.boot != here.boot:
            return False
        if self.lock and self.lock == here.lock:  # a lock has one owner, and ends with it
            return True
        return bool(self.spaces) and self.spaces == here.spaces and not _runs(self.pid, self.started)


class StoreLock:
    """A lock on an experiment in a sqlite file: of all processes on one kernel, containers included, one has it.

    Args:
        uri: Of the store. Only for a sqlite file there is a lock.
        experiment_id: Which experiment of the store.
    """

    def __init__(self, uri: str, experiment_id: str):
        database = sqlite_path(uri)
        database = database and database.resolve()  # whatever symbolic link it is reached by
        self._path = database and database.with_name(f"{database.name}.{experiment_id}.lock")
        self._file: TextIO | None = None
        self.name = ""
        """Device and inode of the file that this process has locked; empty if it has locked none."""
        self._is_taken = False

    def acquire(self) -> None:
        """Lock it, if that is possible."""
        self._is_taken = False
        while self._path is not None and self._file is None:
            try:
                file = self._path.open("w")
            except OSError:  # a folder that may not be written; the store decides alone
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._is_taken = isinstance(error, BlockingIOError)  # otherwise: a file system without locks
                file.close()
                return
            if _is_at(self._path, file):
                self._file = file
                self.name = _inode(os.fstat(file.fileno()))
            else:
                file.close()

    def is_held_by(self, other: Holder, here: Holder) -> bool:
        """Return whether another process has it, which is alive therefore."""
        if self._path is None or self._file is not None or not self._is_taken or other.boot != here.boot:
            return False
        with suppress(OSError):
            return other.lock == _inode(self._path.stat())
        return False

    def release(self) -> None:
        """Unlock it and remove its file, if this process has it; several threads may ask for it."""
        file, self._file, self.name = self._file, None, ""
        if file is None or self._path is None:
            return
        with suppress(OSError):
            if _is_at(self._path, file):
                self._path.unlink()
        file.close()


def _is_at(path: Path, file: TextIO) -> bool:
    """Return whether a file has not been removed, by an earlier owner of the lock, since it was opened."""
    with suppress(FileNotFoundError):
        return _inode(os.fstat(file.fileno())) == _inode(path.stat())
    return False


def _inode(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"


def _printable(text: str) -> str:
    """Return what of a text, which somebody may have edited, fits into a line on the screen."""
    return "".join(filter(str.isprintable, text))[:LONGEST_NAME].strip()


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _spaces() -> str:
    found = []
    for kind in ("pid", "time"):  # the second since Linux 5.6
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/ns/{kind}"))  # noqa: PTH115  (no path)
    return " ".join(found)


def _runs(pid: int, started: str) -> bool:
    """Return whether a process may be alive; another user's may not be visible in /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    try:
        state = _state(pid)
    except OSError:
        return True
    return state[0] != "Z" and (not started or state[19] == started)


def _started(pid: int) -> str:
    with suppress(OSError):
        return _state(pid)[19]
    return ""


def _state(pid: int) -> list[str]:
    """Return the fields of a process from its state on; its name, which comes before, may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
