"""Joins a Ray cluster, or starts a Ray of its own, looks at its machines, and leaves it. Knows Ray, but not Tune.

Imports no torch: a private Ray comes up while another thread does.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
import ray
from ray._private import ray_constants, services, utils
from ray._private.authentication import authentication_token_setup as token
from ray._private.node import Node
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grid.config import InputError
from grid.plan.packing import Packing, pack
from grid.plan.request import NO_RAY, check_address
from grid.train.checkpoints import Checkpoints
from grid.tune.gpus import find_gpus
from grid.tune.preflight import (
    ANSWER_SECONDS,
    HINT,
    CodeVersion,
    NodeReport,
    inspect_node,
    mark_storage,
    plan_packing,
    unmark_storage,
)
from grid.wording import last_line

RAY_OPTIONS: dict[str, Any] = {"logging_level": "CRITICAL", "log_to_driver": False, "configure_logging": True}

EARLY_WORKERS = {
    "preload_python_modules": ["grid.tune.preload"],
    "idle_worker_killing_time_threshold_ms": 60_000,
}
"""Lets worker processes import what trials need while the driver is still busy, and keeps them until then."""

SKIPPED_SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")
"""What a private Ray is started without: an autoscaler that has no machines, a reader of logs that nobody is shown, and
a server of statistics that nobody asks for. They take two seconds of two cores to start, and one to end."""

POLL_SECONDS = 0.02
"""How often a private Ray is asked whether it is up; Ray itself asks every second."""

_leaving = threading.Event()
Result = TypeVar("Result")


def find_cluster(address: str | None) -> str | None:
    """Return the address of the cluster to join; None if Ray is to start here, for this run alone.

    A machine belongs to a cluster if RAY_ADDRESS says so, or if `ray start`, and so `ray up`, was run on it. The Ray
    that another run has started for itself is never joined.

    Args:
        address: What the user gave: `HOST:PORT`, `auto`, `local`, or None.

    Raises:
        InputError: No cluster answers where one should.
    """
    if address not in (None, "auto"):
        return None if address == "local" else address
    found = os.environ.get("RAY_ADDRESS") or utils.read_ray_address()
    if found in (None, "", "auto", "local"):
        if address == "auto":
            raise InputError(f"this machine belongs to no Ray cluster; {NO_RAY}")
        return None
    try:
        return check_address(found)
    except InputError as error:
        hint = "bring it up again, or end it with `ray stop`, or pass --address local to run on this machine alone"
        raise InputError(f"the Ray cluster of this machine, {found}, does not answer; {hint}") from error


def connect(address: str | None, concurrency: int | None, checkpoints: Checkpoints | None = None) -> Packing:
    """Start Ray on this machine, or join a running cluster, and choose how trials share it.

    Args:
        address: Of a running cluster, from `find_cluster`; None starts a private one.
        concurrency: Trials at once, chosen by the user.
        checkpoints: The storage that all machines of a cluster must reach; None does not try.

    Raises:
        InputError: No Ray answers at `address`, or `concurrency` is out of range, or a machine can't train.
    """
    if address is None:
        packing = local_packing(concurrency)
        ray_constants.ENABLE_RAY_CLUSTER = False  # a Ray that no other machine joins listens on localhost alone
        cpus = max(1, round(packing.concurrency * packing.cpus_per_trial))
        with fast_start():
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, _system_config=EARLY_WORKERS, **RAY_OPTIONS
            )
        return packing
    ray_constants.ENABLE_RAY_CLUSTER = True
    logging.getLogger("ray").setLevel(logging.ERROR)
    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # Ray does so for the address `auto` alone
    try:
        ray.init(address=address, **RAY_OPTIONS)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        closed = "if it is closed by a token, ~/.ray/auth_token must be the cluster's"
        raise InputError(f"no Ray answers at '{address}' ({type(error).__name__}; {closed}); {NO_RAY}") from error
    try:
        return _survey(address, concurrency, checkpoints)
    except InputError:
        ray.shutdown()
        raise


@contextmanager
def fast_start() -> Iterator[None]:
    """Let a Ray that is started within do without `SKIPPED_SERVICES`, and be used as soon as it is up.

    These are private parts of Ray: one that is not there is left alone.
    """
    get_node: Any = getattr(services, "get_node", None)
    wanted: list[tuple[Any, str, Any]] = [
        *((Node, name, lambda node, **settings: None) for name in SKIPPED_SERVICES),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")),  # the agent opens fewer ports
        (services, "get_node", partial(_await_node, get_node)),
    ]
    changes = [change for change in wanted if hasattr(*change[:2])]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, part in changes:
            setattr(owner, name, part)
        yield
    finally:
        for owner, name, part in kept:
            setattr(owner, name, part)


def _await_node(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """Return what `get_node` says of this machine, once it can say something."""
    client = GcsClient(address=gcs_address)
    until = time.monotonic() + ANSWER_SECONDS
    while not client.get_all_node_info() and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return get_node(gcs_address, node_id)


def _survey(address: str, concurrency: int | None, checkpoints: Checkpoints | None) -> Packing:
    """Ask every machine of the cluster what it has; raise if one can't train."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = [machine_name(node["NodeManagerAddress"], node["NodeManagerHostname"]) for node in alive]
    resources = {name: node["Resources"] for name, node in zip(names, alive, strict=True)}
    reports = _ask({name: node["NodeID"] for name, node in zip(names, alive, strict=True)}, address, checkpoints)
    return plan_packing(resources, reports, CodeVersion.here(), concurrency)


def _ask(nodes: dict[str, str], address: str, checkpoints: Checkpoints | None) -> dict[str, NodeReport | str]:
    """Return what each machine reports, or why it does not."""
    mark = "" if checkpoints is None else mark_storage(checkpoints)
    task = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
    asked = {
        name: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            checkpoints, mark, name.partition(" ")[0], address
        )
        for name, node_id in nodes.items()
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS, fetch_local=False)
    said: dict[str, NodeReport | str] = {}
    for name, answer in asked.items():
        try:
            said[name] = ray.get(answer, timeout=1)
        except GetTimeoutError:
            said[name] = f"does not answer within {ANSWER_SECONDS:.0f} s; see `ray status`, or take it out"
        except RayError as error:
            said[name] = f"can't load this code ({last_line(error)}); {HINT}"
    if checkpoints is not None:
        unmark_storage(checkpoints, mark)
    return said


def machine_name(address: str, host: str) -> str:
    """Return how problems call a machine."""
    return f"{address} ({host})"


def local_packing(concurrency: int | None) -> Packing:
    """Choose how trials share this machine, without starting Ray."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return pack(cpus, *find_gpus(), concurrency)


def has_gpu() -> bool:
    """Say whether a GPU of the cluster is up."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def call(function: Callable[..., Result], *arguments: Any, packing: Packing) -> Result:
    """Call a function where a trial would run, and return what it returns."""
    task = ray.remote(num_cpus=packing.cpus_per_trial, num_gpus=packing.gpus_per_trial)(function)
    result: Result = ray.get(task.remote(*arguments))
    return result


def guard(on_death: Callable[[], None]) -> None:
    """Watch over the processes of a private Ray, and call `on_death` from another thread if one of them dies."""
    children = psutil.Process().children(recursive=True)
    servers = [process for process in children if process.name() in ("gcs_server", "raylet")]
    _leaving.clear()

    def watch() -> None:
        while not _leaving.wait(0.1):
            if any(not server.is_running() or server.status() == psutil.STATUS_ZOMBIE for server in servers):
                on_death()
                return

    threading.Thread(target=watch, name="guard", daemon=True).start()


def disconnect() -> None:
    """Leave the cluster; a private one ends."""
    _leaving.set()
    ray.shutdown()
