"""How a store is asked: time limits and proxies, and a word on the screen while it does not answer.

The same for the driver, which writes, and for `analysis`, which reads. Standard library only.
"""

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from grid.masking import mask

MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # else on stderr where tqdm is installed
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines per run of a server, through the progress line
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "PGCONNECT_TIMEOUT": "20",  # of PostgreSQL's client; without it, minutes
}
"""Environment variable -> value, for whatever the user has not set; a locked sqlite file is waited for as long."""
RETRIES_VARIABLE = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
READER_RETRIES = 2
QUIET_SECONDS = 5.0


def mlflow_settings(*, writes: bool) -> Mapping[str, str]:
    """Return the environment variables that MLflow should see; to be set before it is imported.

    A question may be repeated by MLflow itself. What writes may not: an attempt whose answer was lost may have
    arrived, so the recorder looks before it tries again.
    """
    return {**MLFLOW_SETTINGS, RETRIES_VARIABLE: str(0 if writes else READER_RETRIES), **os.environ}


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


def experiment_names(client: Any) -> list[str]:
    """Return the names of all experiments of a store, by an `MlflowClient`, which returns them in pages."""
    names: list[str] = []
    token: str | None = None
    while token != "":
        page = client.search_experiments(page_token=token)
        names += [experiment.name for experiment in page]
        token = page.token or ""
    return names


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


def _is_here(host: str) -> bool:
    try:
        return all(ip_address(str(found[4][0])).is_loopback for found in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False


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
