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


class Backend(Protocol):
    """Where an MLflow server and a grid keep what they keep."""

    @property
    def database(self) -> str:
        """URI of the server's database."""

    @property
    def artifacts(self) -> str:
        """Folder or URI of the server's files."""

    @property
    def storage(self) -> str:
        """Folder or URI of checkpoints."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the server and the drivers need."""

    def checkpoints(self) -> list[str]:
        """Return those that are left."""


class Disturbed(Protocol):
    """What is disturbed: an `Arena`."""

    folder: Path
    rng: random.Random
    backend: Backend


@dataclass
class Files:
    """An sqlite file and folders."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def database(self) -> str:
        """URI of the server's database."""
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def artifacts(self) -> str:
        """Folder of the server's files."""
        return str(self.folder / "artifacts")

    @property
    def storage(self) -> str:
        """Folder of checkpoints."""
        return str(self.folder / "storage")

    def checkpoints(self) -> list[str]:
        """Return those that are left."""
        return list(map(str, Path(self.storage).glob("*/checkpoints/*")))


@dataclass
class Servers:
    """PostgreSQL and an S3 API."""

    postgres: Postgres
    bucket: ObjectStore

    @property
    def database(self) -> str:
        """URI of the server's database."""
        return self.postgres.uri

    @property
    def artifacts(self) -> str:
        """URI of the server's files."""
        return self.bucket.uri("artifacts")

    @property
    def storage(self) -> str:
        """URI of checkpoints."""
        return self.bucket.uri("storage")

    @property
    def environment(self) -> Mapping[str, str]:
        """The bucket's address and key."""
        return self.bucket.environment

    def checkpoints(self) -> list[str]:
        """Return those that are left."""
        return self.bucket.objects("storage/")


@contextmanager
def start_backend(folder: Path, *, servers: bool) -> Iterator[Backend]:
    """Start the servers, if such are wanted; they end with the block."""
    if not servers:
        yield Files(folder)
        return
    with postgres() as database, object_store(folder) as bucket:
        yield Servers(database, bucket)


def lock_database(arena: Disturbed) -> None:
    """Lock the server's sqlite file for 30 s, which is longer than sqlite and MLflow wait."""
    database = sqlite3.connect(arena.folder / "mlflow.db", timeout=60, isolation_level=None)
    with contextlib.closing(database):
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        database.execute("ROLLBACK")


def restart_database(arena: Disturbed) -> None:
    """Crash PostgreSQL, and start it again after a while."""
    assert isinstance(arena.backend, Servers)
    arena.backend.postgres.stop()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    arena.backend.postgres.start()


def throttle_bucket(arena: Disturbed) -> None:
    """Let S3 refuse every request for a while."""
    assert isinstance(arena.backend, Servers)
    arena.backend.bucket.throttled.touch()
    time.sleep(arena.rng.uniform(*AWAY_SECONDS))
    arena.backend.bucket.throttled.unlink()


FILE_FAILURES: dict[str, Callable[[Disturbed], None]] = {
    "storage away": take_storage_away,
    "database locked 30 s": lock_database,
}
SERVER_FAILURES: dict[str, Callable[[Disturbed], None]] = {
    "database restarted": restart_database,
    "S3 throttled": throttle_bucket,
}
