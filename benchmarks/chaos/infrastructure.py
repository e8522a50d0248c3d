"""Failures of what a grid runs on, which are not its trials' fault; each ends by itself after a while."""

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Protocol

import psutil

AWAY_SECONDS = (3.0, 15.0)
"""How long the storage is away, or a worker stopped: drawn between these."""


class HasFolder(Protocol):
    """What is disturbed: an `Arena`."""

    folder: Path
    rng: random.Random


class Disturbed(HasFolder, Protocol):
    """The same, with a driver."""

    def children(self, *names: str) -> list[psutil.Process]:
        """Return the driver's descendants whose name contains one of `names`."""


def take_storage_away(arena: HasFolder) -> None:
    """Put a file in the place of the storage, as if a network disk were gone, and bring the storage back."""
    storage, kept = arena.folder / "storage", arena.folder / "storage-away"
    storage.rename(kept)
    _put_file(storage)
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    storage.unlink()
    kept.rename(storage)


def stop_worker(arena: Disturbed) -> None:
    """SIGSTOP one process that trains, and let it continue."""
    for worker in arena.children("TrialWorker", "ResourceTrainable")[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGSTOP)
            time.sleep(arena.rng.uniform(*AWAY_SECONDS))
            worker.send_signal(signal.SIGCONT)


def _put_file(path: Path) -> None:
    """Make a file, though a worker that saves may make the folder again at the same moment."""
    while True:
        try:
            path.open("xb").close()
            return
        except FileExistsError:
            shutil.rmtree(path)
