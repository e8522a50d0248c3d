"""The fence: a driver asks whether it still holds the lease before every write, and again just before it happens."""

import threading
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import requests
from sqlalchemy import Engine, event

from grid.config import InputError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


class LeaseLostError(InputError):
    """This driver may not write any more: it has given the experiment up, or another one has taken it over."""


class Fence(Protocol):
    """Says whether this driver may still write."""

    def check(self) -> None:
        """Ask the store if need be.

        Raises:
            LeaseLostError: It may not.
        """

    def is_fresh(self) -> bool:
        """Return whether the last answer was yes and still counts; asks nobody."""


class Fenced:
    """An MLflow client that asks a fence before every method that may write, and again just before it does.

    The process may be stopped, for hours, between the question and the write.

    Args:
        client: What is fenced.
        fence: Who is asked.
    """

    READING = ("get_", "search_", "list_", "download_")
    """How the names of methods begin that only read."""

    def __init__(self, client: "MlflowClient", fence: Fence):
        _install()
        self._client = client
        self._fence = fence

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name.startswith(self.READING) or not callable(method):
            return method

        def write(*given: Any, **named: Any) -> Any:
            self._fence.check()
            _writing.fence = self._fence
            try:
                return method(*given, **named)
            finally:
                del _writing.fence

        return write


_writing = threading.local()
"""`fence` of the write that this thread is in."""


@cache
def _install() -> None:
    """Ask again wherever this process commits, or sends a request by way of `requests`.

    Narrower ways are unsafe: MLflow's runs, artifacts and models share one function, `http_request`, which each has
    imported by its name, and what a plugin for headers raises is swallowed. Uploads by boto3, and the threads of
    uploads in parts, pass by: only before they start the fence is asked.
    """
    send_unchecked = requests.Session.send

    def send(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        _check_again()
        return send_unchecked(session, request, **options)

    requests.Session.send = send  # type: ignore[method-assign, assignment]
    event.listen(Engine, "commit", _check_again)


def _check_again(*given: Any) -> None:
    fence: Fence | None = getattr(_writing, "fence", None)
    if fence is not None and not fence.is_fresh():
        raise TimeoutError("this driver was stopped in the middle of a write, which is tried again")
