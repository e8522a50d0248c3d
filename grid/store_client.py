"""How the store is asked: MLflow's settings and log-in, a word while it does not answer, what its errors mean."""

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from grid.config import InputError
from grid.masking import mask
from grid.store_uri import DATABASES, artifact_folder, proxy_hint, sqlite_path
from grid.wording import count, first_line

LOGIN_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
NO_MLFLOW = "what answers there is no MLflow server"
NAMES_SHOWN = 5
NAME_LENGTH_SHOWN = 100
LONGEST_REASON = 500
"""Characters; a server may answer with a page."""
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # else on stderr where tqdm is installed
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines per run of a server, through the progress line
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",  # else from the server's bucket, which few readers reach
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for hours
    "PGCONNECT_TIMEOUT": "20",  # of PostgreSQL's client; without it, minutes
}
"""Environment variable -> value, for whatever the user has not set."""
RETRIES_VARIABLE = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
READER_RETRIES = os.environ.get(RETRIES_VARIABLE, "2")
"""How often MLflow repeats a question: as the user has set, looked up before `never_repeat` sets it."""
QUIET_SECONDS = 5.0


def mlflow_settings() -> Mapping[str, str]:
    """Return the environment variables that MLflow should see; to be set before it is imported."""
    return {**MLFLOW_SETTINGS, **os.environ}


def never_repeat() -> None:
    """Keep MLflow from repeating requests of this process, whatever the user has set.

    An attempt whose answer was lost may have arrived, so the recorder looks before it tries again; and what MLflow
    repeats, perhaps minutes later, is not asked about again by `grid.record.fence`.
    """
    os.environ[RETRIES_VARIABLE] = "0"


@contextmanager
def repeating() -> Iterator[None]:
    """Let MLflow repeat requests of this block, as often as the user has set: no write that could happen twice."""
    before = os.environ.get(RETRIES_VARIABLE, READER_RETRIES)
    os.environ[RETRIES_VARIABLE] = READER_RETRIES
    try:
        yield
    finally:
        if os.environ.get(RETRIES_VARIABLE) == READER_RETRIES:  # else `never_repeat` was called meanwhile
            os.environ[RETRIES_VARIABLE] = before


@contextmanager
def waiting_for(uri: str) -> Iterator[None]:
    """Say on stderr that an answer takes long: after 5 s, and in one line once the wait is over.

    Args:
        uri: Of the store that is asked.
    """
    over = threading.Event()
    thread = threading.Thread(target=_say_how_long, args=(mask(uri), over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def client_uri(uri: str, *, read_only: bool = False) -> str:
    """Return a store's URI for MLflow, by one from `check_store_uri`.

    Args:
        uri: Of the store.
        read_only: Open a sqlite file so that nothing is written, not even a missing table.
    """
    path = sqlite_path(uri)
    if path is None or not (read_only or unquote(uri) != uri):
        return uri
    from sqlalchemy.engine import URL  # noqa: PLC0415  (heavy; its versions escape differently)

    # sqlite's own escapes keep `?` and `%` from SQLAlchemy; with a driver named, MLflow creates no folder `file:`.
    query = {"mode": "ro" if read_only else "rwc", "uri": "true"}
    return URL.create("sqlite+pysqlite", database=f"file:{quote(str(path))}", query=query).render_as_string()


@cache
def log_in(uri: str) -> None:
    """Connect to a database, once for each; where that is refused, MLflow would try again for a minute and a half.

    Raises:
        InputError: Its driver is not installed.
        sqlalchemy.exc.SQLAlchemyError: It refuses.
    """
    if urlsplit(uri).scheme.split("+")[0] not in DATABASES:
        return
    from sqlalchemy import create_engine  # noqa: PLC0415  (heavy)

    try:
        engine = create_engine(uri)
    except ImportError as error:
        raise InputError(
            f"can't open the store {mask(uri)}: {first_line(error)}"
            "; install the database's driver (PostgreSQL: pip install 'psycopg[binary]')"
        ) from error
    engine.connect().close()
    engine.dispose()


def find_experiment(client: Any, uri: str, name: str) -> Any:
    """Return an experiment of a store by an `MlflowClient`; None if there is none.

    Raises:
        InputError: What answers is no MLflow server: MLflow takes any JSON, and even nothing, for an experiment.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.name != name:
        raise InputError(f"can't use the store {mask(uri)}: {NO_MLFLOW}; pass another --store")
    return found


def experiment_names(client: Any) -> list[str]:
    """Return the names of all experiments of a store, by an `MlflowClient`, which returns them in pages."""
    names: list[str] = []
    token: str | None = None
    while token != "":
        page = client.search_experiments(page_token=token)
        names += [experiment.name for experiment in page]
        token = page.token or ""
    return names


def missing_experiment(name: str, uri: str, others: Iterable[str]) -> InputError:
    """Return the error of an experiment that its store lacks, with the nearest names that it has.

    MLflow's own empty experiment is not offered.
    """
    offered = sorted(set(others) - {"Default"})
    nearest = get_close_matches(name, offered, n=NAMES_SHOWN, cutoff=0.5) if len(offered) > NAMES_SHOWN else []
    shown = nearest or offered[:NAMES_SHOWN]
    names = ", ".join(map(_shorten, shown)) or "none"
    number = f"{count(len(offered), 'experiment')}, such as " if len(offered) > len(shown) else ""
    return InputError(f"no experiment '{_shorten(name)}' in {mask(uri)}; it has {number}{names}")


def store_problem(error: BaseException, uri: str) -> str:
    """Return why a store could not be used, and what to do: the end of a message that begins with its name."""
    line = first_line(error)[:LONGEST_REASON]
    if "mlflow-artifacts URI was supplied" in line:
        return "its files are with the MLflow server that wrote it; pass the server's address as --store"
    refused = re.search(r" failed with error code (401|403) != 200", line)
    is_page = " valid JSON format" in line or re.search(r" error code \d+ != 200.*'<", line)
    login = f"set {' and '.join(LOGIN_VARIABLES)} or MLFLOW_TRACKING_TOKEN, or " if refused else ""
    what = f"{NO_MLFLOW}: " if is_page and not refused else ""
    return f"{what}{line}{proxy_hint(uri)}; {login}pass another --store"


def artifact_contents(client: Any, uri: str, run: Any, paths: Collection[str]) -> dict[str, bytes]:
    """Return path -> content of those artifacts of a run that exist, by an `MlflowClient`; lists each folder once.

    Args:
        client: Of the store.
        uri: Of the store.
        run: As the client returns it.
        paths: Such as `grid.json` or `commands/ID.json`.
    """
    here = artifact_folder(uri, run.info.artifact_uri)
    if here is not None:
        return {path: (here / path).read_bytes() for path in paths if (here / path).exists()}
    run_id, folders = run.info.run_id, {path.rpartition("/")[0] for path in paths}
    known = {artifact.path for folder in folders for artifact in client.list_artifacts(run_id, folder or None)}
    with tempfile.TemporaryDirectory() as target:
        found = {path: client.download_artifacts(run_id, path, target) for path in paths if path in known}
        return {path: Path(file).read_bytes() for path, file in found.items()}


def _shorten(name: str) -> str:
    return name if len(name) <= NAME_LENGTH_SHOWN else f"{name[:NAME_LENGTH_SHOWN]}..."


def _say_how_long(store: str, over: threading.Event) -> None:
    start = time.monotonic()
    if over.wait(QUIET_SECONDS):
        return
    with suppress(OSError, ValueError, AttributeError):  # stderr is closed or missing
        is_terminal = sys.stderr.isatty()
        _say(f"waiting for the store {store}", start, replace=is_terminal)
        while not over.wait(1.0 if is_terminal else None):
            _say(f"waiting for the store {store}", start, replace=is_terminal)
        _say(f"waited for the store {store}", start, before="\033[K" if is_terminal else "")


def _say(text: str, start: float, *, before: str = "", replace: bool = False) -> None:
    line = f"{text} ({time.monotonic() - start:.0f} s)"
    if replace:  # a longer line would wrap, and the next one would not replace it
        line = line[: shutil.get_terminal_size().columns - 1]
    print(f"{before}{line}", end="\r" if replace else "\n", file=sys.stderr, flush=True)
