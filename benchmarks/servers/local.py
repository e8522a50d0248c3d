"""Processes that listen on this machine: a port for them, whether they answer, how they end."""

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PORTS = range(21_000, 32_768)
"""By default, Linux gives none of these to those who ask for any port, so a server finds its own free again after a
restart; Ray's workers, and the first jobs of `cluster-slurm.sh`, listen below them."""
_given: set[int] = set()


def free_port() -> int:
    """Return a port that nothing listens on, and never the same twice."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def wait_for_answer(server: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    """Wait until a server answers an HTTP request, whatever it says.

    Args:
        server: Its process.
        port: Of loopback.
        path: What is asked for, such as `/health`.
        log: What the server prints.

    Raises:
        RuntimeError: It has ended.
        TimeoutError: It does not answer.
    """

    def answers() -> bool:
        if server.poll() is not None:
            raise RuntimeError(f"a server ended with exit code {server.returncode}:\n{log.read_text()[-2000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
                connection.getresponse()
            except (OSError, http.client.HTTPException):
                return False
        return True

    wait_until(answers, 600)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: It did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s without success")
        time.sleep(0.1)


def kill_tree(process: subprocess.Popen[bytes] | None) -> None:
    """SIGKILL a process and its session if it is still running."""
    if process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
