"""Where the store is: its address, checked before anything heavy is imported or written, its proxy, its folders."""

import os
import re
import socket
import sqlite3
import tempfile
from contextlib import closing
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from grid.config import InputError
from grid.masking import mask
from grid.wording import first_line

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
DEFAULT_STORE = "sqlite:///mlflow.db"
SQLITE = "sqlite:///"
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}
DATABASES = ("postgresql", "mysql", "mssql")
CONNECT_SECONDS = 5
BUSY_SECONDS = 20
"""How long a locked sqlite file is waited for; MLflow waits as long."""


def check_store_uri(uri: str | None, *, must_exist: bool = False, read_only: bool = False) -> str:
    """Return an absolute store URI that can be opened and written, as far as can be checked without writing to it.

    Args:
        uri: Any MLflow tracking URI; None for the `default_store_uri`.
        must_exist: Refuse a missing or empty sqlite file, which MLflow would otherwise create.
        read_only: The store is only read, so it need not be writable, but must exist.

    Returns:
        Of a sqlite file: `sqlite:///` and its path, in which only `%` and `?` are escaped; see `sqlite_path`.

    Raises:
        InputError: It can't be opened or written.
    """
    named = uri or default_store_uri()
    origin = f" (from {STORE_VARIABLE})" if not uri and os.environ.get(STORE_VARIABLE) else ""
    try:
        return _check(named, must_exist=must_exist or read_only, read_only=read_only)
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, InputError) else _cannot_open(named, first_line(error))
        raise InputError(f"{reason}{origin}") from error


def default_store_uri() -> str:
    """Return where the store is if no `--store` is given: what MLflow's users have set, else `mlflow.db` here."""
    return os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def is_default(uri: str) -> bool:
    """Return whether a command in this folder finds a store without `--store`, in any shell."""
    return (
        not os.environ.get(STORE_VARIABLE) and sqlite_path(uri) == Path(DEFAULT_STORE.removeprefix(SQLITE)).absolute()
    )


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a store, by a URI from `check_store_uri`; None if it is not a sqlite file."""
    return Path(unquote(uri.removeprefix(SQLITE))) if uri.startswith(SQLITE) else None


def bypass_proxies(uri: str) -> None:
    """Make requests to a server on this machine go there, not through a proxy, which would look on its own machine."""
    host = urlsplit(uri).hostname
    if host and find_proxy(uri) and _is_here(host):
        hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{hosts},{host}".lstrip(",")


def find_proxy(uri: str) -> tuple[str, str]:
    """Return the environment variable that sends requests to a server through a proxy, and its value; else empty."""
    variables = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    if not variables or urlsplit(uri).scheme not in ("http", "https"):
        return "", ""
    from requests.utils import get_environ_proxies, select_proxy  # noqa: PLC0415  (heavy; what MLflow asks as well)

    proxy = select_proxy(uri, get_environ_proxies(uri))
    return next(((name, value) for name, value in variables.items() if value and value == proxy), ("", ""))


def proxy_hint(uri: str) -> str:
    """Return what to say about the proxy when a server does not answer; empty if there is none."""
    name, _ = find_proxy(uri)
    host = urlsplit(uri).hostname
    return f"; {name} sends requests through a proxy, NO_PROXY={host} sends them directly" if name else ""


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where the artifacts of a new experiment go: next to a sqlite file; None lets the server choose."""
    path = sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts" / slug(uri, experiment)).as_uri()


def local_path(location: str) -> Path:
    """Return the path of a `file:` URI."""
    return Path(unquote(urlsplit(location).path))


def artifact_folder(uri: str, recorded: str) -> Path | None:
    """Return where on this machine the artifacts of a run are; None if MLflow has to find them.

    MLflow records absolute paths. If a sqlite file was moved or copied with its artifacts, they are beside it.

    Args:
        uri: Of the store.
        recorded: The run's `artifact_uri`.
    """
    path = sqlite_path(uri)
    if path is None or urlsplit(recorded).scheme not in ("", "file"):
        return None
    folder = local_path(recorded)
    if "mlartifacts" in folder.parts:
        start = len(folder.parts) - folder.parts[::-1].index("mlartifacts") - 1
        beside = path.parent.joinpath(*folder.parts[start:])
        if beside.is_dir():
            return beside
    return folder


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


def _check(uri: str, *, must_exist: bool, read_only: bool) -> str:
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        return _check_sqlite(uri, must_exist=must_exist, read_only=read_only)
    if scheme not in ("http", "https", *DATABASES):
        raise InputError(f"can't open the store '{mask(uri)}'; give sqlite:///FILE, http://HOST:PORT or a database URI")
    if scheme in DATABASES and (uri.count("@") > 1 or "@" in urlsplit(uri).path):
        raise InputError(f"can't open the store '{mask(uri)}': write @ in a password as %40, / as %2F")
    return _check_server(uri, scheme)


def _check_sqlite(uri: str, *, must_exist: bool, read_only: bool) -> str:
    path = _named_file(uri)
    absolute = f"{SQLITE}{path}".replace("%", "%25").replace("?", "%3F")
    problem = (
        _name_problem(uri, path)
        or _access_problem(path, must_exist=must_exist, read_only=read_only)
        or _content_problem(path, must_exist=must_exist)
    )
    if problem:
        raise InputError(_cannot_open(f"{SQLITE}{path}", problem))
    return absolute


def _named_file(uri: str) -> Path:
    """Return the absolute path in a sqlite URI; `%20` is a space, as for MLflow, unless a file is called that."""
    text = uri.removeprefix(SQLITE)
    readings = (Path(text).absolute(), Path(unquote(text)).absolute())
    return max(readings, key=lambda path: (path.is_file(), path.parent.is_dir()))


def _name_problem(uri: str, path: Path) -> str:
    if not uri.startswith(SQLITE) or path.name == "":
        return "it names no file"
    if re.search(r"\?\w+=", uri):
        return "options such as ?mode=ro are not taken; write ? in the name of a file as %3F"
    if str(path) != os.fsencode(path).decode(errors="replace"):
        return "its path is not UTF-8"
    return ""


def _access_problem(path: Path, *, must_exist: bool, read_only: bool) -> str:
    if path.exists() and not path.is_file():
        return "it is not a file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if must_exist and not path.exists():
        return "there is no such file"
    if path.exists() and not os.access(path, os.R_OK):
        return "the file can't be read"
    if read_only:
        return ""
    if path.exists() and not os.access(path, os.W_OK):
        return "the file can't be written"
    return write_problem(path.parent)


def _content_problem(path: Path, *, must_exist: bool) -> str:
    try:
        tables = sqlite_tables(path)
    except sqlite3.OperationalError:  # locked, or to be recovered first: MLflow waits, and tells
        return ""
    except sqlite3.DatabaseError as error:
        is_damaged = "malformed" in str(error)
        return f"the database is damaged ({error})" if is_damaged else "the file is not a sqlite database"
    if not tables:
        return "it is empty, no grid has been recorded in it" if must_exist else ""
    return "" if "experiments" in tables else "it is a sqlite database, but not one of MLflow"


def sqlite_tables(path: Path, patience_seconds: float = 1.0) -> set[str]:
    """Return the names of the tables of a sqlite file, which may be missing; nothing is written.

    Raises:
        sqlite3.Error: They can't be read.
    """
    if not path.exists():
        return set()
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=patience_seconds)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _check_server(uri: str, scheme: str) -> str:
    """Connect to a server, or to the proxy that requests to it go through."""
    bypass_proxies(uri)
    name, proxy = find_proxy(uri)
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}") if proxy else urlsplit(uri)
    try:
        port = parts.port or PORTS.get(parts.scheme.split("+")[0])
        if parts.hostname and port:  # else a socket file, or a name that only the database's driver knows
            socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        where = f"its proxy ({name}) does not answer: " if name else ""
        reason = f"{where}{first_line(error)}{proxy_hint(uri)}"
        raise InputError(
            f"can't open the store {mask(uri)}: {reason}; start the server or pass another --store"
        ) from error
    return uri


def _cannot_open(uri: str, problem: str) -> str:
    return f"can't open the store {mask(uri)}: {problem}; pass another --store"


def _is_here(host: str) -> bool:
    try:
        return all(ip_address(str(found[4][0])).is_loopback for found in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False
