"""Opens a store for writing. A sqlite file is made whole or not at all, whoever else starts or dies meanwhile."""

import shlex
import sqlite3
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import mlflow.store
from alembic.script import ScriptDirectory
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from grid.config import InputError
from grid.masking import mask
from grid.store_client import client_uri, log_in, never_repeat
from grid.store_uri import BUSY_SECONDS, sqlite_path, sqlite_tables

SETTLED_SECONDS = 5
"""A file that has not changed for so long is in nobody's hands."""


def open_client(uri: str) -> MlflowClient:
    """Return a client that writes to a store; a missing or empty sqlite file becomes a store first.

    Args:
        uri: Checked by `grid.store_uri.check_store_uri`.

    Raises:
        InputError: Its tables are not those of this version of MLflow.
    """
    never_repeat()
    log_in(uri)
    path = sqlite_path(uri)
    if path is not None:
        _recover(path)
        if not sqlite_tables(path, patience_seconds=BUSY_SECONDS):
            _fill(path)
        _check_schema(path, uri)
    return MlflowClient(tracking_uri=client_uri(uri))


def _recover(path: Path) -> None:
    """Undo what a process had begun to write when it was killed: while it is there, nobody can read only."""
    if path.exists():
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as database:
            database.execute("SELECT name FROM sqlite_master").fetchone()


def _fill(path: Path) -> None:
    """Create MLflow's tables in one transaction, unless another process has been faster.

    MLflow itself creates and alters them in hundreds of steps: a second process that starts meanwhile, or after the
    first was killed, finds half of them and fails.
    """
    statements = _schema(path)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        if not database.execute("SELECT name FROM sqlite_master").fetchall():
            for statement in statements:
                database.execute(statement)
        database.execute("COMMIT")


def _schema(path: Path) -> list[str]:
    """Return the statements that make a store, by letting MLflow make one in memory."""
    store = SqlAlchemyStore("sqlite+pysqlite:///:memory:", (path.parent / "mlartifacts").as_uri())
    try:
        connection = store.engine.raw_connection()
        return [line for line in connection.iterdump() if line not in ("BEGIN TRANSACTION;", "COMMIT;")]
    finally:
        store.engine.dispose()


def _check_schema(path: Path, uri: str) -> None:
    """Refuse tables that MLflow would alter: others may be reading them, and what is cut short is lost."""
    head = _newest_schema()
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as database:
        while _version(database) != head:
            if time.time() - path.stat().st_mtime > SETTLED_SECONDS:
                raise InputError(f"can't open the store {mask(uri)}: {_explain(database, uri)}")
            time.sleep(0.2)  # a server is making it


@cache
def _newest_schema() -> str | None:
    """Return the version of the tables that this MLflow makes, by reading all its migrations."""
    return ScriptDirectory(str(Path(mlflow.store.__path__[0], "db_migrations"))).get_current_head()


def _version(database: sqlite3.Connection) -> str | None:
    try:
        found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return None
    return str(found[0]) if found else None


def _explain(database: sqlite3.Connection, uri: str) -> str:
    if not database.execute("SELECT 1 FROM experiments WHERE experiment_id != 0").fetchone():
        return "somebody was interrupted while making it, and it holds no experiment; delete the file"
    hint = f"keep a copy of the file, then run:  mlflow db upgrade {shlex.quote(client_uri(uri))}"
    return f"its tables are not those of MLflow {mlflow.__version__}, another version has made them; {hint}"
