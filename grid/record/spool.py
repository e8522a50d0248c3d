"""Durable queues on the local disk: what was appended survives a crash, and a power loss, and is delivered later.

One line of JSON per event. A second file holds how many bytes have been delivered; without it everything is delivered
again, which changes nothing in the store. What the store does not take is parked in a third.
"""

import errno
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from grid.config import InputError
from grid.files import rename_durably, sync, write_durably
from grid.store_uri import slug

Line = dict[str, Any]
"""An event in JSON's types; see `grid.record.events`."""


class Queue:
    """Lines that wait to be delivered.

    Args:
        path: The file; it is made if missing. A line that a crash left half-written is cut off.

    Raises:
        OSError: The file can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.unreadable: dict[int, int] = {}
        """Position and length in bytes of the lines that a crash or a power loss has damaged."""
        self._mark = path.with_suffix(".delivered")
        self._file = _open_to_append(path)
        content = path.read_bytes()
        self._cut_torn_line(content)
        self._delivered = self._read_mark(content)
        self.appended = content.count(b"\n", self._delivered)
        """Lines that were not delivered when the queue was opened, and those that were appended since."""

    def append(self, line: Line) -> None:
        """Return only once the line is on the disk.

        Raises:
            OSError: It can't be written; nothing of it stays.
        """
        _append_durably(self._file, [line])
        self.appended += 1

    def pending(self, limit: int = 10_000, start: int | None = None) -> tuple[list[Line], int]:
        """Return up to `limit` undelivered lines, oldest first, and where they end, for `delivered`.

        Args:
            limit: How many lines.
            start: Where an earlier call ended; None for the first undelivered line.
        """
        lines: list[Line] = []
        end = self._delivered if start is None else start
        with self.path.open("rb") as file:
            file.seek(end)
            for content in file:
                if len(lines) == limit or not content.endswith(b"\n"):
                    break
                line = _parse(content)
                if line is None:
                    self.unreadable[end] = len(content)
                else:
                    lines.append(line)
                end += len(content)
        return lines, end

    def delivered(self, end: int) -> None:
        """Record that everything before byte `end` has arrived."""
        if end != self._delivered and not self._file.closed:
            write_durably(self._mark, str(end).encode())
            self._delivered = end

    def close(self) -> None:
        """Close the file, and remove it if everything was delivered; may be called twice."""
        if self._file.closed:
            return
        self._file.close()
        if self._delivered == self.path.stat().st_size:
            self._mark.unlink(missing_ok=True)
            self.path.unlink()

    def _empty(self) -> None:
        self.delivered(0)
        self._file.truncate(0)
        self.appended = 0
        self.unreadable.clear()

    def _read_mark(self, content: bytes) -> int:
        """Return how much was delivered; 0 if the file that says so is damaged or of another queue."""
        try:
            mark = int(self._mark.read_bytes())
        except (FileNotFoundError, ValueError):
            return 0
        return mark if 0 < mark <= len(content) and content[mark - 1 : mark] == b"\n" else 0

    def _cut_torn_line(self, content: bytes) -> None:
        end = content.rfind(b"\n") + 1
        if end < len(content):
            self.unreadable[end] = len(content) - end
            self._file.truncate(end)


class Spool(Queue):
    """Events of one experiment that wait for the store.

    Args:
        path: The file; it and its folder are made if missing.

    Raises:
        BlockingIOError: Another process has it open.
        OSError: The file can't be written.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".lock").touch()
        self._lock = path.with_suffix(".lock").open("r+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
            super().__init__(path)
        except OSError:
            self._lock.close()
            raise

    @property
    def owner(self) -> str:
        """The lease under which it was last written to; empty if unknown. It outlives the events."""
        self._lock.seek(0)
        return self._lock.read()

    @owner.setter
    def owner(self, lease: str) -> None:
        self._lock.seek(0)
        self._lock.write(lease)
        self._lock.truncate()
        self._lock.flush()
        os.fsync(self._lock.fileno())

    @cached_property
    def artifacts(self) -> Queue:
        """Files for the artifacts of runs, which wait on their own: they may take long, and hold no event up."""
        return Queue(self.path.with_suffix(".artifacts.jsonl"))

    def set_aside(self) -> tuple[int, Path | None]:
        """Move all that waits or is parked to a folder of its own, from which nothing is delivered.

        Returns:
            The number of lines, and the folder; None if there is none.

        Raises:
            OSError: They can't be moved.
        """
        events = self.pending(limit=sys.maxsize)[0]
        suffixes = (".parked.jsonl", ".artifacts.jsonl", ".artifacts.parked.jsonl")
        others = [path for suffix in suffixes if (path := self.path.with_suffix(suffix)).exists()]
        if not events and not others:
            return 0, None
        folders = (self.path.with_suffix(f".superseded-{number}") for number in itertools.count(1))
        folder = next(folder for folder in folders if not folder.exists())
        folder.mkdir()
        write_durably(folder / self.path.name, b"".join(map(_encode, events)))
        lines = len(events)
        for path in others:
            lines += path.read_bytes().count(b"\n")
            rename_durably(path, folder / path.name)
        self.path.with_suffix(".artifacts.delivered").unlink(missing_ok=True)
        self._empty()
        return lines, folder

    def close(self) -> None:
        """Close the files, remove those of which everything was delivered, and unlock them; may be called twice."""
        if "artifacts" in self.__dict__:  # opened
            self.artifacts.close()
        super().close()
        self._lock.close()


@dataclass(frozen=True)
class ParkedLine:
    """A line that the store did not take."""

    group: str
    """What it belongs to, such as a trial."""
    reason: str
    again: bool
    """Whether it is tried again, and holds back what follows in its group; False if the store will never take it."""
    line: Line


class Parked:
    """Lines of a queue that the store did not take, in a file beside it; there is no file if there are none.

    Args:
        queue: The queue that they were in.
    """

    def __init__(self, queue: Queue):
        self.path = queue.path.with_suffix(".parked.jsonl")
        self.lines: list[ParkedLine] = []
        """Oldest first."""
        with suppress(FileNotFoundError):
            for content in self.path.read_bytes().splitlines():
                with suppress(TypeError):
                    self.lines.append(ParkedLine(**(_parse(content) or {})))
        self.held = self._find_held()
        """Groups with a line that is tried again."""

    def add(self, group: str, lines: Sequence[Line], reason: str, *, again: bool) -> None:
        """Park lines; return once they are on the disk.

        Raises:
            OSError: They can't be written.
        """
        added = [ParkedLine(group, reason, again, line) for line in lines]
        with _open_to_append(self.path) as file:
            _append_durably(file, map(asdict, added))
        self.lines += added
        self.held |= {group} if again else set()

    def replace(self, old: Sequence[ParkedLine], new: Sequence[ParkedLine]) -> None:
        """Put lines in the place of others of the same group; an empty file is removed.

        Raises:
            OSError: They can't be written.
        """
        gone = set(map(id, old))
        kept = [line for line in self.lines if id(line) not in gone] + list(new)
        if kept:
            write_durably(self.path, b"".join(map(_encode, map(asdict, kept))))
        else:
            self.path.unlink(missing_ok=True)
        self.lines = kept
        self.held = self._find_held()

    def _find_held(self) -> set[str]:
        return {line.group for line in self.lines if line.again}


def driven_from_here(experiment: str) -> InputError:
    """Return what to say if another process of this folder holds a lock."""
    hint = "wait for it or stop it"
    return InputError(f"experiment '{experiment}' is being run by another process from here; {hint}")


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
        raise driven_from_here(experiment) from error
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the error of a spool that can't be written."""
    return InputError(f"can't write to the spool {path}: {error.strerror}; free disk space or fix its permissions")


def _open_to_append(path: Path) -> BinaryIO:
    is_new = not path.exists()
    file = path.open("ab", buffering=0)  # a buffer would write later what was refused now
    if is_new:
        sync(path.parent)
    return file


def _append_durably(file: BinaryIO, lines: Iterable[Line]) -> None:
    content = b"".join(map(_encode, lines))
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        if os.fstat(file.fileno()).st_size > end:
            file.truncate(end)
        raise


def _encode(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _parse(content: bytes) -> Line | None:
    """Return a line of JSON, even if a power loss has put zeros before it; None if it is damaged."""
    try:
        line = json.loads(content.strip(b"\0\n"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None
