"""Failures of what the recorder calls: an error of a foreign library, and a report that the store refuses for ever.

Run as a command, this module is `grid.run` with a client of MLflow that fails while a file says so:

    python -m benchmarks.chaos.recording --grid smoke ...
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

import grid.run

WRITES = ("create_run", "update_run", "log_batch", "log_artifacts", "set_terminated")
"""Methods of the client that the recorder calls."""
BROKEN, REFUSED = "client-broken", "report-refused"
"""Files in the driver's folder: while the first exists every write fails; the second holds the run that is refused."""


def break_writes(client: type[MlflowClient], folder: Path) -> None:
    """Let a class of clients fail while a file in the folder says so."""
    for name in WRITES:
        setattr(client, name, _breakable(name, getattr(client, name), folder))


def _breakable(name: str, write: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def attempt(self: MlflowClient, *given: Any, **named: Any) -> Any:
        if (folder / BROKEN).exists():
            expired = {"Error": {"Code": "ExpiredToken", "Message": "The provided token has expired."}}
            raise ClientError(expired, "PutObject")
        if name == "log_batch" and _is_refused(folder / REFUSED, given[0]):
            raise MlflowException("refused for ever", INVALID_PARAMETER_VALUE)
        return write(self, *given, **named)

    return attempt


def _is_refused(file: Path, run_id: str) -> bool:
    """Return whether a run is refused: the first that reports while the file exists."""
    try:
        with file.open("r+") as opened:
            refused = opened.read()
            if not refused:
                opened.write(run_id)
            return refused in ("", run_id)
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    break_writes(MlflowClient, Path.cwd())
    sys.exit(grid.run.main())
