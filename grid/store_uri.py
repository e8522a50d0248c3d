"""Where the store is: makes its address absolute and checks it, before anything heavy is imported or written."""

import os
import re
import socket
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from grid.config import InputError
from grid.masking import mask
from grid.wording import first_line

SQLITE_MAGIC = b"SQLite format 3\0"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def check_store_uri(uri: str | None, *, must_exist: bool = False) -> str:
    """Return an absolute store URI that can be opened and written, as far as can be checked without writing to it.

    Args:
        uri: Any MLflow tracking URI; None for `mlflow.db` in the working directory.
        must_exist: Refuse a missing sqlite file, which MLflow would otherwise create.

    Raises:
        InputError: It can't be opened or written.
    """
    uri = uri or "sqlite:///mlflow.db"
    try:
        return _check(uri, must_exist)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"can't open the store '{mask(uri)}': {first_line(error)}; pass another --store") from error


def missing_experiment(name: str, uri: str, others: Iterable[str]) -> InputError:
    """Return the error of an experiment that its store lacks; MLflow's own empty one is not offered."""
    offered = ", ".join(sorted(set(others) - {"Default"})) or "none"
    return InputError(f"no experiment '{name}' in {mask(uri)}; it has {offered}")


def _check(uri: str, must_exist: bool) -> str:
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        return _check_sqlite(uri, must_exist)
    if scheme in ("http", "https"):
        return _check_server(uri)
    if scheme not in DATABASES:
        raise InputError(f"can't open the store '{mask(uri)}'; give sqlite:///FILE, http://HOST:PORT or a database URI")
    if uri.count("@") > 1 or "@" in urlsplit(uri).path:
        raise InputError(f"can't open the store '{mask(uri)}': write @ in a password as %40, / as %2F")
    _ = urlsplit(uri).port  # raises if it is not a number
    return uri


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where the artifacts of a new experiment go: next to a sqlite file; None lets the server choose."""
    if not uri.startswith("sqlite:///"):
        return None
    return (_sqlite_path(uri).parent / "mlartifacts" / slug(uri, experiment)).as_uri()


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store, symbolic links resolved; None for any other store."""
    return _sqlite_path(uri).resolve() if uri.startswith("sqlite:///") else None


def slug(uri: str, experiment: str) -> str:
    """Return a file name for an experiment of a store."""
    return (
        f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', experiment)[:80]}-{sha256(f'{uri} {experiment}'.encode()).hexdigest()[:8]}"
    )


def write_problem(folder: Path) -> str:
    """Return why no file can be created in `folder`, or an empty text. Permissions alone do not reveal a full disk."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"can't write to the folder {folder} ({error.strerror})"
    return ""


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def _check_sqlite(uri: str, must_exist: bool) -> str:
    path = _sqlite_path(uri).absolute()
    absolute = f"sqlite:///{path}"
    problem = ""
    if not uri.startswith("sqlite:///") or path.name == "":
        problem = "it names no file"
    elif path.exists() and not path.is_file():
        problem = "it is not a file"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    elif must_exist and not path.exists():
        problem = "there is no such file"
    elif not _is_sqlite_or_new(path):
        problem = "the file is not a sqlite database"
    elif path.exists() and not os.access(path, os.W_OK):
        problem = "the file can't be written"
    else:
        problem = write_problem(path.parent)
    if problem:
        raise InputError(f"can't open the store {absolute}: {problem}; pass another --store")
    return absolute


def _is_sqlite_or_new(path: Path) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        return file.read(len(SQLITE_MAGIC)) in (b"", SQLITE_MAGIC)


def _check_server(uri: str) -> str:
    parts = urlsplit(uri)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"can't open the store {mask(uri)}: {error}; start the server or pass another --store"
        ) from error
    return uri
