"""What a disturbed grid is kept on: files, as on a laptop, or servers, as of a cluster."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
