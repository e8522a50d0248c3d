"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], bool], seconds: float = 100, *, explain: Callable[[], str] = lambda: "", every: float = 0.02
) -> None:
    """Return as soon as a condition holds; fail if that takes longer than any busy machine needs.

    Args:
        condition: Is asked until it holds.
        seconds: Patience.
        explain: Called for what the failure says.
        every: Seconds between two looks.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s {explain()}"
        time.sleep(every)


def without_waiting(stderr: str) -> str:
    """Return what was printed without the lines that a busy machine adds: that a store or a node is waited for."""
    waiting = ("waiting for the store", "waited for the store", "note: waiting for")
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(waiting))
