"""What a disturbed grid is kept on: files, as on a laptop, or servers, as of a cluster; and how each fails."""

import contextlib
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.chaos.infrastructure import AWAY_SECONDS, take_storage_away
from benchmarks.servers.object_store import ObjectStore, object_store
from benchmarks.servers.postgres import Postgres, postgres


@dataclass(frozen=True)
class Backend:
    """Where an MLflow server and a grid keep what they keep."""

    database: str
    """URI of the server's database."""
    artifacts: str
    """Folder or URI of the server's files."""
    storage: str
    """Folder or URI of checkpoints."""
    checkpoints: Callable[[], list[str]]
    """Returns those that are left."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the server and the drivers need."""
    servers: tuple[Postgres, ObjectStore] | None = None
    """If it is not files."""


class Disturbed(Protocol):
    """What is disturbed: an `Arena`."""

    folder: Path
    rng: random.Random
    backend: Backend


@contextmanager
def start_backend(folder: Path, *, servers: bool) -> Iterator[Backend]:
    """Start the servers, if such are wanted; they end with the block."""
    if not servers:
        storage = folder / "storage"
        files = f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts"), str(storage)
        yield Backend(*files, checkpoints=lambda: list(map(str, storage.glob("*/checkpoints/*"))))
        return
    with postgres() as database, object_store(folder) as bucket:
        yield Backend(
            database.uri,
            bucket.uri("artifacts"),
            bucket.uri("storage"),
            checkpoints=lambda: bucket.objects("storage/"),
            environment=bucket.environment,
            servers=(database, bucket),
        )


def lock_database(arena: Disturbed) -> None:
    """Lock the server's sqlite file for 30 s, which is longer than sqlite and MLflow wait."""
    database = sqlite3.connect(arena.folder / "mlflow.db", timeout=60, isolation_level=None)
    with contextlib.closing(database):
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        database.execute("ROLLBACK")


def restart_database(arena: Disturbed) -> None:
    """Crash PostgreSQL, and start it again after a while."""
    assert arena.backend.servers is not None
    database, _ = arena.backend.servers
    database.stop()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    database.start()


def throttle_bucket(arena: Disturbed) -> None:
    """Let S3 refuse every request for a while."""
    assert arena.backend.servers is not None
    _, bucket = arena.backend.servers
    bucket.throttled.touch()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    bucket.throttled.unlink()


FILE_FAILURES: dict[str, Callable[[Disturbed], None]] = {
    "storage away": take_storage_away,
    "database locked 30 s": lock_database,
}
SERVER_FAILURES: dict[str, Callable[[Disturbed], None]] = {
    "database restarted": restart_database,
    "S3 throttled": throttle_bucket,
}
