"""Where grids are disturbed: an MLflow server, a driver, and what they are kept on."""

import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos import recording
from benchmarks.chaos.backends import Backend
from benchmarks.servers.local import kill_tree, wait_until
from benchmarks.servers.mlflow_server import start_mlflow

PATIENCE_SECONDS = 300.0
"""A driver that takes longer counts as hanging and is killed."""
ROOT = Path(__file__).parents[2]
"""Of the project, whose drivers import `benchmarks`."""


@dataclass
class Arena:
    """An MLflow server and a driver in a folder of their own, and the means to kill them."""

    folder: Path
    rng: random.Random
    port: int
    grid: list[str]
    backend: Backend
    server: subprocess.Popen[bytes] | None = None
    driver: subprocess.Popen[bytes] | None = None
    starts: int = 0
    """Number of drivers started so far."""
    experiment: str = ""
    """That the driver runs."""
    two_drivers: int = 0
    """How often a second driver trained, or a driver went on that had been replaced."""
    notes: Counter[str] = field(default_factory=Counter)
    """What is printed below the table, with how often it happened."""

    @property
    def uri(self) -> str:
        """URI of the MLflow server."""
        return f"http://127.0.0.1:{self.port}"

    def start_server(self) -> None:
        """Start the MLflow server and wait until it answers."""
        backend = self.backend
        self.server = start_mlflow(self.folder, self.port, backend.database, backend.artifacts, backend.environment)

    def stop_server(self) -> None:
        """SIGKILL the server and all its children."""
        kill_tree(self.server)

    def start_driver(self, experiment: str) -> None:
        """Start or continue the grid, and wait until trials run."""
        self.starts += 1
        self.experiment = experiment
        self.driver = self._spawn(
            [sys.executable, "-m", recording.__name__, *self.options], f"driver-{self.starts}.log"
        )
        wait_until(lambda: self.ended() or "left to run" in self.log, PATIENCE_SECONDS)

    @property
    def options(self) -> list[str]:
        """Of `grid.run`, as the driver is given them."""
        place = ["--store", self.uri, "--experiment", self.experiment, "--data-dir", str(self.folder / "data")]
        return [*self.grid, *place, "--storage", self.backend.storage, "--no-report"]

    @property
    def log(self) -> str:
        """What the driver has printed."""
        return (self.folder / f"driver-{self.starts}.log").read_text(errors="replace")

    def is_driving(self) -> bool:
        """Return whether the driver still works: it gives its lease up once it has printed its table."""
        return not self.ended() and "cells shown" not in self.log

    def ended(self) -> bool:
        """Return whether the driver has ended."""
        return self.driver is not None and self.driver.poll() is not None

    def wait_for_driver(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Return the exit code of the driver, which is killed if it does not end in time."""
        assert self.driver is not None
        try:
            return self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            self.notes["hanging drivers killed"] += 1
            kill_tree(self.driver)
            return self.driver.wait()

    def children(self, *names: str) -> list[psutil.Process]:
        """Return the driver's descendants whose name contains one of `names`."""
        assert self.driver is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(self.driver.pid).children(recursive=True)
            return [process for process in descendants if any(name in _name(process) for name in names)]
        return []

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, **self.backend.environment, "PYTHONPATH": path},
            )


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.name()
    return ""
