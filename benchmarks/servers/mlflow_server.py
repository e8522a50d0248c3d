"""MLflow's server as the yaml files of clusters start it: on loopback, the database's password in no command."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.servers.local import wait_for_answer


def start_mlflow(
    folder: Path, port: int, database: str, artifacts: str, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the server, in a session of its own, and return when it answers.

    Args:
        folder: For its log.
        port: Of loopback.
        database: URI of where the records go.
        artifacts: Folder or URI of where the files go.
        environment: Variables that it needs for these.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    own = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **environment, **own},
        )
    wait_for_answer(server, port, "/health", folder / "server.log")
    return server
