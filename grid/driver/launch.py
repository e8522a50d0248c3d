"""Starts a grid fast: while Ray comes up, another thread imports the rest, reads the images and claims the store."""

import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from grid.plan.request import Request, resume_command
from grid.store_uri import slug
from grid.train.checkpoints import Checkpoints
from grid.tune import connection


def run(request: Request) -> int:
    """Run what is left of a grid, print its best, and return the exit code.

    Raises:
        InputError: The request can't be met.
    """
    checkpoints = Checkpoints(request.storage, slug(request.store, request.experiment))
    cluster = connection.find_cluster(request.address)
    if cluster is None:
        connection.local_packing(request.concurrency)  # raises if it can't be met
    with ExitStack() as stack:
        stack.callback(connection.disconnect)
        if cluster is not None:  # whose machines are looked at before anything is in the store
            packing = connection.connect(cluster, request.concurrency, checkpoints)
        preparing = stack.enter_context(_background()).submit(_prepare, request, checkpoints, stack)
        if cluster is None:
            packing = connection.connect(None, request.concurrency)
            connection.watch_servers(_give_up)
        experiment, prepared = preparing.result()
        gc.freeze()  # what has been imported stays: nothing to look through again and again
        stack.callback(gc.unfreeze)
        gc.enable()
        training = experiment.Training(packing, checkpoints)
        exit_code: int = experiment.run(request, prepared, training)
    return exit_code


@contextmanager
def _background() -> Iterator[ThreadPoolExecutor]:
    """Have a thread that is waited for, but not after Ctrl-C: it may be in the middle of a download."""
    executor = ThreadPoolExecutor(1, "preparing")
    try:
        yield executor
    finally:
        executor.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)


def _prepare(request: Request, checkpoints: Checkpoints, stack: ExitStack) -> tuple[Any, Any]:
    """Import `grid.driver.experiment`, which takes seconds, and return it with what it has prepared."""
    experiment = import_module("grid.driver.experiment")
    return experiment, experiment.prepare(request, checkpoints, stack)


def _give_up() -> None:
    """End at once: Ray is gone and would let us wait; all that was reported is in the spool."""
    print(f"\nRay has died under the run; go on with:  {resume_command()}", file=sys.stderr, flush=True)
    os._exit(1)
