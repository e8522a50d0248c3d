"""Starts a grid fast: while Ray comes up, another thread imports the rest, reads the images and claims the store."""

import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from grid import connection
from grid.checkpoint import Checkpoints
from grid.request import Request, resume_command
from grid.store_uri import slug


def run(request: Request) -> int:
    """Run what is left of a grid, print its best, and return the exit code.

    Raises:
        InputError: The request can't be met; nothing has been written but what an earlier run had left to write.
    """
    checkpoints = Checkpoints(request.storage, slug(request.store, request.experiment))
    cluster = connection.find_cluster(request.address)
    if cluster is None:
        connection.local_packing(request.concurrency)  # raises if it can't be met
    with ExitStack() as stack:
        stack.callback(connection.disconnect)
        if cluster is not None:  # whose machines are looked at before anything is written
            packing = connection.connect(cluster, request.concurrency, checkpoints)
        background = stack.enter_context(ThreadPoolExecutor(1, "preparing"))
        preparing = background.submit(_prepare, request, stack)
        if cluster is None:
            packing = connection.connect(None, request.concurrency)
            connection.guard(_give_up)
        experiment, prepared = preparing.result()
        gc.enable()
        exit_code: int = experiment.run(request, prepared, packing)
    return exit_code


def _prepare(request: Request, stack: ExitStack) -> tuple[Any, Any]:
    """Return `grid.experiment`, which takes seconds to import, and what it has prepared, to be closed by `stack`."""
    experiment = import_module("grid.experiment")
    prepared = experiment.prepare(request)
    stack.callback(prepared.close)
    return experiment, prepared


def _give_up() -> None:
    """End at once: Ray is gone and would let us wait; all that was reported is in the spool."""
    print(f"\nRay has died under the run; go on with:  {resume_command()}", file=sys.stderr, flush=True)
    os._exit(1)
