"""A durable queue on the local disk: what was appended survives a crash of the process and is delivered later.

One line of JSON per event. A second file holds how many bytes have been delivered.
"""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from grid.config import InputError
from grid.store_uri import slug

Line = dict[str, Any]
"""An event in JSON's types; see `grid.record.events`."""


class Spool:
    """Events of one experiment that wait for the store.

    Args:
        path: The file; it and its folder are made if missing. A line that a crash left half-written is cut off.

    Raises:
        BlockingIOError: Another process has it open.
        OSError: The file can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            self._lock.close()
            raise
        self._mark = path.with_suffix(".delivered")
        self._delivered = int(self._mark.read_text()) if self._mark.exists() else 0
        self._file = path.open("ab", buffering=0)  # a buffer would write later what was refused now
        self._cut_torn_line()

    def append(self, line: Line) -> None:
        """Return only once the line is on the disk.

        Raises:
            OSError: It can't be written; nothing of it stays.
        """
        content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            self._forget_after(end)
            raise

    def pending(self, limit: int = 10_000) -> tuple[list[Line], int]:
        """Return up to `limit` undelivered lines, oldest first, and where they end, for `delivered`."""
        lines: list[Line] = []
        end = self._delivered
        with self.path.open("rb") as file:
            file.seek(end)
            for line in file:
                if len(lines) == limit or not line.endswith(b"\n"):
                    break
                lines.append(json.loads(line))
                end += len(line)
        return lines, end

    def delivered(self, end: int) -> None:
        """Record that everything before byte `end` has arrived."""
        fresh = self._mark.with_suffix(".new")
        fresh.write_text(str(end))
        fresh.replace(self._mark)
        self._delivered = end

    def close(self) -> None:
        """Close the file, remove it if everything was delivered, and unlock it; may be called twice."""
        if self._file.closed:
            return
        self._file.close()
        if self._delivered == self.path.stat().st_size:
            self._mark.unlink(missing_ok=True)
            self.path.unlink()
        self._lock.close()

    def _cut_torn_line(self) -> None:
        content = self.path.read_bytes()
        self._forget_after(content.rfind(b"\n") + 1)

    def _forget_after(self, end: int) -> None:
        if os.fstat(self._file.fileno()).st_size > end:
            self._file.truncate(end)


def open_spool(folder: Path, store_uri: str, experiment: str) -> Spool:
    """Open the spool of an experiment.

    Args:
        folder: Holds the spools of all experiments.
        store_uri: Two stores may hold experiments of the same name.
        experiment: Its name.

    Raises:
        InputError: Another driver has it open, or the folder can't be written.
    """
    path = folder / f"{slug(store_uri, experiment)}.jsonl"
    try:
        return Spool(path)
    except BlockingIOError as error:
        hint = "wait for it or stop it"
        raise InputError(f"experiment '{experiment}' is being run by another process from here; {hint}") from error
    except OSError as error:
        raise InputError(
            f"can't write to the spool {path}: {error.strerror}; free disk space or fix its permissions"
        ) from error
