"""Failures of the rule that an experiment has one driver: second drivers, and a driver that sleeps.

A second driver runs in a folder of its own, as on another machine, with a clock that is wrong, requests that are slow,
or process ids of its own. A driver that sleeps is stopped until another one has taken its place, and then woken.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.chaos.arena import Arena
from benchmarks.servers.local import wait_until

PATIENCE_SECONDS = 600.0
"""A second driver that has neither been refused nor done its work by then hangs."""
OWN_PROCESS_IDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
HANDICAP = """
import sys, time
from mlflow.tracking import MlflowClient
from grid.run import main
clock, offset, delay = time.time, float(sys.argv.pop(1)), float(sys.argv.pop(1))
time.time = lambda: clock() + offset
def slow_down(write):
    def write_late(*given, **named):
        time.sleep(delay)
        return write(*given, **named)
    return write_late
for name in ("create_experiment", "create_run", "set_experiment_tag", "set_tag"):
    setattr(MlflowClient, name, slow_down(getattr(MlflowClient, name)))
sys.exit(main(sys.argv[1:]))
"""
"""A driver whose clock is some seconds ahead, and whose requests take some seconds more."""


def kill_driver(arena: Arena) -> None:
    """SIGKILL the driver; its Ray processes notice and exit."""
    assert arena.driver is not None
    arena.driver.kill()
    arena.driver.wait()


def start_slow_driver(arena: Arena) -> None:
    """Start a second driver each of whose requests takes 1.2 s more."""
    _start_second(arena, delay=1.2)


def start_driver_ahead_of_time(arena: Arena) -> None:
    """Start a second driver whose clock is a day ahead."""
    _start_second(arena, offset=86_400)


def start_driver_behind_time(arena: Arena) -> None:
    """Start a second driver whose clock is 150 s behind."""
    _start_second(arena, offset=-150)


def start_driver_with_own_process_ids(arena: Arena) -> None:
    """Start a second driver in a process space of its own, in which the first one can't be seen; needs root."""
    may = shutil.which("unshare") and subprocess.run([*OWN_PROCESS_IDS, "true"], check=False).returncode == 0
    _start_second(arena, wrap=OWN_PROCESS_IDS if may else ())


def stop_driver(arena: Arena) -> None:
    """SIGSTOP the driver until another one has taken over, then wake it, and let the other one finish."""
    assert arena.driver is not None
    arena.driver.send_signal(signal.SIGSTOP)
    was_driving = arena.is_driving()
    with _second(arena) as (second, log):
        wait_until(lambda: _drives(log) or second.poll() is not None, PATIENCE_SECONDS)
        arena.driver.send_signal(signal.SIGCONT)
        wait_until(arena.ended, PATIENCE_SECONDS)
        if was_driving and _drives(log) and arena.driver.poll() in (None, 0):
            arena.two_drivers += 1
        wait_until(lambda: second.poll() is not None, PATIENCE_SECONDS)


DRIVER_FAILURES: dict[str, Callable[[Arena], None]] = {
    "second driver, slow": start_slow_driver,
    "second driver, ahead": start_driver_ahead_of_time,
    "second driver, behind": start_driver_behind_time,
    "second driver, own ids": start_driver_with_own_process_ids,
    "driver stopped": stop_driver,
}


def _start_second(arena: Arena, *, offset: float = 0, delay: float = 0, wrap: Sequence[str] = ()) -> None:
    with _second(arena, offset=offset, delay=delay, wrap=wrap) as (second, log):
        while second.poll() is None:
            if _drives(log) and arena.is_driving():
                arena.two_drivers += 1
                return
            time.sleep(0.2)


@contextlib.contextmanager
def _second(
    arena: Arena, *, offset: float = 0, delay: float = 0, wrap: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a second driver; yield it and its log."""
    folder = next(folder for number in range(1000) if not (folder := arena.folder / f"elsewhere-{number}").exists())
    folder.mkdir()
    command = [*wrap, sys.executable, "-c", HANDICAP, str(offset), str(delay), *arena.options]
    with (folder / "log").open("wb") as file:
        second = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, start_new_session=True)
    try:
        yield second, folder / "log"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(second.pid, signal.SIGKILL)
        second.wait()


def _drives(log: Path) -> bool:
    return "left to run" in log.read_text(errors="replace")
