"""Starts a grid fast: while a private Ray starts, another thread imports the rest, reads images and takes the lease."""

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from threading import Event
from typing import Any

from grid.plan.packing import Packing
from grid.plan.request import Request
from grid.store_uri import slug
from grid.train.checkpoints import Checkpoints
from grid.tune import connection


def run(request: Request) -> int:
    """Run what is left of a grid, print the best cells, and return the exit code.

    Raises:
        InputError: The request can't be met.
    """
    checkpoints = Checkpoints(request.storage, slug(request.store, request.experiment))
    cluster = connection.find_cluster(request.address)
    with ExitStack() as stack:
        stack.callback(connection.disconnect)
        if cluster is None:
            experiment, (prepared, packing) = _start_here(request, checkpoints, stack)
        else:
            experiment, (prepared, packing) = _join(cluster, request, checkpoints, stack)
        _keep_what_is_imported(stack)
        exit_code: int = experiment.run(
            request,
            prepared,
            experiment.Training(packing, checkpoints, keep_going=request.keep_going, budget=request.budget),
        )
    return exit_code


def _start_here(request: Request, checkpoints: Checkpoints, stack: ExitStack) -> tuple[Any, tuple[Any, Packing]]:
    """Start a private Ray on this machine, and prepare meanwhile."""
    packing = connection.local_packing(request.concurrency, request.device)  # raises before anything is started
    ray_is_up = Event()
    executor = stack.enter_context(_background())
    preparing = executor.submit(_prepare, request, packing, checkpoints, stack, ray_is_up.wait)
    try:
        connection.start(packing)
    finally:
        ray_is_up.set()
    return preparing.result()


def _join(
    cluster: str, request: Request, checkpoints: Checkpoints, stack: ExitStack
) -> tuple[Any, tuple[Any, Packing]]:
    """Join a cluster, whose nodes are checked before anything is written to the store, then prepare."""
    packing = connection.connect(cluster, request.concurrency, checkpoints, device=request.device)
    return _prepare(request, packing, checkpoints, stack)


def _prepare(request: Request, *arguments: Any) -> tuple[Any, tuple[Any, Packing]]:
    """Import `grid.driver.experiment`, which takes seconds, and return it with what it has prepared."""
    experiment = import_module("grid.driver.experiment")
    return experiment, experiment.prepare(request, *arguments)


def _keep_what_is_imported(stack: ExitStack) -> None:
    """Let the garbage collector, off since `grid.run`, work again, but not on what has been imported."""
    gc.freeze()
    stack.callback(gc.unfreeze)
    gc.enable()


@contextmanager
def _background() -> Iterator[ThreadPoolExecutor]:
    """Provide a thread and wait for it at the end, except after Ctrl-C: it may be in the middle of a download."""
    executor = ThreadPoolExecutor(1, "preparing")
    try:
        yield executor
    finally:
        executor.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)
