"""Failures of what a grid runs on, which are not its trials' fault; each ends by itself after a while."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.chaos import recording
from benchmarks.chaos.arena import Arena

AWAY_SECONDS = (3.0, 15.0)
"""How long the storage is away, or a worker stopped: drawn between these."""
SPOOL_BYTES = 4 * 2**20
"""Size of the disk that the spool is on."""


def take_storage_away(arena: Arena) -> None:
    """Put a file in the place of the storage, as if a network disk were gone, and bring the storage back."""
    storage, kept = arena.folder / "storage", arena.folder / "storage-away"
    storage.rename(kept)
    _put_file(storage)
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    storage.unlink()
    kept.rename(storage)


def stop_worker(arena: Arena) -> None:
    """SIGSTOP one process that trains, and let it continue."""
    for worker in arena.children("TrialWorker", "ResourceTrainable")[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGSTOP)
            time.sleep(arena.rng.uniform(*AWAY_SECONDS))
            worker.send_signal(signal.SIGCONT)


def kill_worker(arena: Arena) -> None:
    """SIGKILL one process that trains."""
    for worker in arena.children("TrialWorker", "ResourceTrainable")[:1]:
        worker.kill()


def kill_ray(arena: Arena) -> None:
    """SIGKILL every Ray process under the driver, then wait until the driver has noticed and ended."""
    for process in arena.children("gcs_server", "raylet", "ray::"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    arena.wait_for_driver()


def restart_server(arena: Arena) -> None:
    """SIGKILL the MLflow server and start it again after 2 to 10 s."""
    arena.stop_server()
    time.sleep(arena.rng.uniform(2, 10))
    arena.start_server()


def fill_disk(arena: Arena) -> None:
    """Fill the disk that the spool is on until the driver gives up, then free it."""
    filler = arena.folder / "spool" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    arena.wait_for_driver()
    filler.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of `SPOOL_BYTES` at `folder`; yield whether that worked (if not, it is a plain folder)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SPOOL_BYTES}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


def lock_database(arena: Arena) -> None:
    """Lock the server's sqlite file for 30 s, which is longer than sqlite and MLflow wait."""
    database = sqlite3.connect(arena.folder / "mlflow.db", timeout=60, isolation_level=None)
    with contextlib.closing(database):
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        database.execute("ROLLBACK")


def restart_database(arena: Arena) -> None:
    """Crash PostgreSQL, and start it again after a while."""
    assert arena.backend.servers is not None
    database, _ = arena.backend.servers
    database.stop()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    database.start()


def throttle_bucket(arena: Arena) -> None:
    """Let S3 refuse every request for a while."""
    assert arena.backend.servers is not None
    _, bucket = arena.backend.servers
    bucket.throttled.touch()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    bucket.throttled.unlink()


def break_client(arena: Arena) -> None:
    """Let every write of the recorder raise an error of a library that is neither MLflow's nor SQLAlchemy's."""
    _disturb(arena, recording.BROKEN)


def refuse_reports(arena: Arena) -> None:
    """Let the store refuse whatever is reported of one trial; the next driver finds it willing again."""
    _disturb(arena, recording.REFUSED)


def _disturb(arena: Arena, name: str) -> None:
    file = arena.folder / name
    file.touch()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    file.unlink()


def _put_file(path: Path) -> None:
    """Make a file, though a worker that saves may make the folder again at the same moment."""
    while True:
        try:
            path.open("xb").close()
            return
        except FileExistsError:
            shutil.rmtree(path)


FAILURES: dict[str, Callable[[Arena], None]] = {
    "worker killed": kill_worker,
    "worker stopped": stop_worker,
    "Ray killed": kill_ray,
    "server killed": restart_server,
    "spool disk full": fill_disk,
    "client broken": break_client,
    "reports refused": refuse_reports,
}
FILE_FAILURES: dict[str, Callable[[Arena], None]] = {
    "storage away": take_storage_away,
    "database locked 30 s": lock_database,
}
SERVER_FAILURES: dict[str, Callable[[Arena], None]] = {
    "database restarted": restart_database,
    "S3 throttled": throttle_bucket,
}
