"""Runs a function on many tasks, in several processes if wanted, and shows how far it has come."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, noun: str) -> list[Result]:
    """Return the results in the order of the tasks, whatever the number of processes.

    Args:
        function: What to run; other processes import it by its name.
        tasks: Its arguments.
        jobs: Processes; 1 for this one alone. Each computes with one thread, so that they don't wait for each other.
        noun: Of the tasks, for the progress on stderr.
    """
    results: list[Result] = []
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when another process imports numpy
    with get_context("spawn").Pool(jobs) if jobs > 1 else nullcontext() as pool:
        for result in (pool.imap if pool else map)(function, tasks):
            results.append(result)
            if len(results) % 10 == 0 or len(results) == len(tasks):
                print(f"\r{len(results):,}/{len(tasks):,} {noun}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results
