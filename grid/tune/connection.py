"""Joins a Ray cluster, or starts a private Ray, checks its nodes, and leaves it. Knows Ray, but not Tune.

Imports no torch: a private Ray starts while another thread imports it.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grid.config import InputError
from grid.parts.files import PartsFile, load, loaded
from grid.plan.packing import Packing, pack
from grid.plan.request import NO_RAY, check_address, resume_command
from grid.surroundings import cpu_name
from grid.train.checkpoints import Checkpoints
from grid.tune import private_ray
from grid.tune.gpus import device_names, find_gpus, have_bfloat16
from grid.tune.limits import SMALLEST_OBJECT_STORE, UNLIMITED, check_thread_limit, find_limits, largest_object_store
from grid.tune.preflight import (
    ANSWER_SECONDS,
    HINT,
    QUIET_SECONDS,
    CodeVersion,
    NodeReport,
    inspect_node,
    marked_storage,
    plan_packing,
)
from grid.wording import count, first_line, last_line

RAY_OPTIONS: dict[str, Any] = {"logging_level": "CRITICAL", "log_to_driver": False, "configure_logging": True}
OBJECT_STORE_SHARE = 0.3
"""Of the memory, as Ray has it by default."""
MOST_NAMED = 3
"""Nodes that a note names; a cluster may have hundreds."""
NO_START = "wait until it is less busy, or look at its limits (ulimit -a), free memory and /dev/shm"
_leaving = ExitStack()
"""What is to be undone when Ray is left."""
Result = TypeVar("Result")


def find_cluster(address: str | None) -> str | None:
    """Return the address of the cluster to join; None to start a private Ray, for this run alone.

    A machine belongs to a cluster if RAY_ADDRESS says so, or if `ray start`, and so `ray up`, was run on it. The
    private Ray of another run is never joined.

    Args:
        address: What the user gave: `HOST:PORT`, `auto`, `local`, or None.

    Raises:
        InputError: No cluster answers where one should.
    """
    if address not in (None, "auto"):
        return None if address == "local" else address
    found = os.environ.get("RAY_ADDRESS") or private_ray.own_cluster()
    if found in (None, "auto", "local"):
        if address == "auto":
            raise InputError(f"this machine belongs to no Ray cluster; {NO_RAY}")
        return None
    try:
        return check_address(found)
    except InputError as error:
        hint = "bring it up again, or end it with `ray stop`, or pass --address local to run on this machine alone"
        raise InputError(f"the Ray cluster of this machine, {found}, does not answer; {hint}") from error


@contextmanager
def connected(
    address: str | None, concurrency: int | None, checkpoints: Checkpoints | None = None, *, device: str = "auto"
) -> Iterator[Packing]:
    """Within the block, be connected as by `connect`.

    Yields:
        How trials share the machine or the cluster.
    """
    try:
        yield connect(address, concurrency, checkpoints, device=device)
    finally:
        disconnect()


def connect(
    address: str | None, concurrency: int | None, checkpoints: Checkpoints | None = None, *, device: str = "auto"
) -> Packing:
    """Start a private Ray, or join a running cluster and check its nodes; choose how trials share it.

    Whatever it raises, `disconnect` is to be called.

    Args:
        address: Of a running cluster, from `find_cluster`; None starts a private Ray.
        concurrency: Trials at once, chosen by the user.
        checkpoints: The storage that all nodes of a cluster must reach; None skips that check.
        device: What trains: `cpu`, `cuda`, or `auto` for GPUs if there are any.

    Raises:
        InputError: No Ray answers at `address`, or `concurrency` is out of range, or a node can't train.
    """
    if address is None:
        packing = local_packing(concurrency, device)
        start(packing)
        return packing
    private_ray.listen_on(loopback=False)
    return _join(address, concurrency, checkpoints, device)


def start(packing: Packing) -> None:
    """Start a private Ray for trials that share this machine; if it dies, this process ends.

    Raises:
        InputError: It can't be started.
    """
    private_ray.listen_on(loopback=True)
    used = packing.concurrency * packing.cpus_per_trial
    cpus = max(1, round(used), *(int(node.cpus) for node in packing.nodes))  # beside GPUs all: more may share one
    private_ray.require_token()
    _leaving.enter_context(private_ray.own_folder())
    _leaving.enter_context(private_ray.own_token())
    _leaving.callback(ray.shutdown)
    with private_ray.patient_start(), private_ray.fast_start(), private_ray.quiet_errors():
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=sum(int(node.gpus) for node in packing.nodes) if packing.gpus_per_trial else None,
                include_dashboard=False,
                object_store_memory=_object_store_memory(),
                **RAY_OPTIONS,
            )
        except Exception as error:  # Ray raises a plain one
            raise InputError(f"can't start Ray on this machine: {first_line(error)}; {NO_START}") from error
    _watch_servers()


def _object_store_memory() -> int | None:
    """Return the bytes of Ray's object store; None leaves them to Ray, which does not see all limits."""
    memory, largest = find_limits().memory, largest_object_store()
    if memory.total == psutil.virtual_memory().total and largest == UNLIMITED:
        return None
    return min(largest, max(SMALLEST_OBJECT_STORE, int(OBJECT_STORE_SHARE * memory.total)))


def _join(address: str, concurrency: int | None, checkpoints: Checkpoints | None, device: str) -> Packing:
    logging.getLogger("ray").setLevel(logging.ERROR)
    if _has_token():
        private_ray.require_token()  # Ray does so for the address `auto` only
    _leaving.callback(ray.shutdown)
    try:
        with private_ray.quiet_errors():
            ray.init(address=address, **RAY_OPTIONS)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        closed = "if it is closed by a token, ~/.ray/auth_token must be the cluster's"
        raise InputError(f"no Ray answers at '{address}' ({type(error).__name__}; {closed}); {NO_RAY}") from error
    return _check_nodes(address, concurrency, checkpoints, device)


def _has_token() -> bool:
    """Return whether there is a token, by the rules of Ray's documentation."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    try:
        return bool(named) or Path("~/.ray/auth_token").expanduser().exists()
    except PermissionError:  # a home that is another user's
        return False


def _check_nodes(address: str, concurrency: int | None, checkpoints: Checkpoints | None, device: str) -> Packing:
    """Ask every node of the cluster for a report; raise if one can't train."""
    alive = _alive_nodes()
    resources = {name: node["Resources"] for name, node in alive.items()}
    reports = _reports({name: node["NodeID"] for name, node in alive.items()}, address, checkpoints)
    return plan_packing(resources, reports, CodeVersion.here(), concurrency, device)


def _reports(node_ids: dict[str, str], address: str, checkpoints: Checkpoints | None) -> dict[str, NodeReport | str]:
    """Return what each node reports, or why it does not."""
    with nullcontext("") if checkpoints is None else marked_storage(checkpoints) as mark:
        calls = {name: (checkpoints, mark, node_id, address) for name, node_id in node_ids.items()}
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(inspect_node)  # it may have initialised CUDA
        return _ask(task, node_ids, calls, failing=lambda reason: f"can't load this code ({reason}); {HINT}")


def _ask(
    task: Any,
    node_ids: Mapping[str, str],
    calls: Mapping[str, tuple[Any, ...]],
    failing: Callable[[str], str],
) -> dict[str, Any]:
    """Run a task on nodes, beside whatever runs there.

    Args:
        task: A remote function of Ray.
        node_ids: Where, by the name of the node.
        calls: The arguments, by the name of the node.
        failing: Says in words that a call has failed, given the reason.

    Returns:
        What it returns, or why it could not, by the name of the node.
    """
    pending = {
        name: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(*calls[name])
        for name, node_id in node_ids.items()
    }
    if silent := _silent(pending, QUIET_SECONDS):
        print(f"note: waiting for {_listed(silent)}, silent for {QUIET_SECONDS:.0f} s: busy, or down", file=sys.stderr)
        silent = _silent(pending, ANSWER_SECONDS - QUIET_SECONDS)
    late = f"does not answer within {ANSWER_SECONDS:.0f} s; wait until it is less busy, or take it out"
    return {name: late if name in silent else _answer(answer, failing) for name, answer in pending.items()}


def _silent(pending: Mapping[str, Any], seconds: float) -> list[str]:
    """Return the names of nodes that have not answered after so many seconds at most."""
    _, missing = ray.wait(list(pending.values()), num_returns=len(pending), timeout=seconds, fetch_local=False)
    return [name for name, answer in pending.items() if answer in missing]


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are beside them."""
    others = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + f" and {count(others, 'other')}" * (others > 0)


def _answer(answered: Any, failing: Callable[[str], str]) -> Any:
    try:
        return ray.get(answered)
    except RayError as error:
        return failing(last_line(error))


def _alive_nodes() -> dict[str, Any]:
    """Return what Ray knows of each node that is up, by its name; a machine may run several."""
    found: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            name = node_name(node["NodeManagerAddress"], node["NodeManagerHostname"])
            found[f"{name} {node['NodeID'][:6]}" if name in found else name] = node
    return found


def node_name(address: str, host: str) -> str:
    """Return the name of a node in messages."""
    return f"{address} ({host})"


def local_packing(concurrency: int | None, device: str = "auto") -> Packing:
    """Choose how trials share this machine, without starting Ray.

    Raises:
        InputError: `concurrency` is out of range, the memory is too small, or too few threads are allowed.
    """
    limits = find_limits()
    gpus, gpu_bytes = find_gpus()
    packing = pack(
        limits.cpus,
        gpus,
        gpu_bytes,
        concurrency,
        memory=limits.memory,
        cpu_limit=limits.cpu_limit,
        device=device,
    )
    check_thread_limit(packing.concurrency)
    bfloat16 = have_bfloat16() if packing.gpus_per_trial else None
    devices = device_names() if packing.gpus_per_trial else (cpu_name(),)
    return replace(packing, devices=devices, bfloat16=bfloat16)


def is_one_machine() -> bool:
    """Return whether this machine is the only node that is up."""
    return len(_alive_nodes()) == 1


def cluster_has_gpu() -> bool:
    """Return whether a node with a GPU is up."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def call_remote(function: Callable[..., Result], *arguments: Any, packing: Packing) -> Result:
    """Call a function in a worker process, with the resources of a trial, and return what it returns."""
    task = ray.remote(num_cpus=packing.cpus_per_trial, num_gpus=packing.gpus_per_trial)(_call_with_parts)
    result: Result = ray.get(task.remote(loaded(), function, *arguments))
    return result


def _call_with_parts(files: Sequence[PartsFile], function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process that does not know the user's parts files yet."""
    load(files)
    return function(*arguments)


def call_on_nodes(
    function: Callable[..., Result], *arguments: Any, packing: Packing, failing: str
) -> dict[str, Result | str]:
    """Call a function on every node that can hold a trial; it waits for no trial that runs there.

    Args:
        function: What to call.
        arguments: Of the function.
        packing: The resources of a trial.
        failing: What a node can't do if the call fails there, such as `can't train a step`.

    Returns:
        What it returns, or why it could not, by the name of the node.
    """
    wanted = {"CPU": packing.cpus_per_trial, "GPU": packing.gpus_per_trial}
    node_ids = {
        name: node["NodeID"]
        for name, node in _alive_nodes().items()
        if all(node["Resources"].get(name, 0) >= share for name, share in wanted.items())
    }
    calls = dict.fromkeys(node_ids, (loaded(), function, *arguments))
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(_call_with_parts)  # its process frees a GPU by its end
    return _ask(task, node_ids, calls, failing=lambda reason: f"{failing} ({reason})")


class _Holder:
    """Does nothing."""


def occupy(node_id: str, packing: Packing) -> Any:
    """Hold the share of a node that a trial has, so that none is put there, until the actor returned is forgotten."""
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    holder = ray.remote(_Holder).options(
        num_cpus=packing.cpus_per_trial, num_gpus=packing.gpus_per_trial, scheduling_strategy=here
    )
    return holder.remote()


def _watch_servers() -> None:
    """Watch the server processes of a private Ray from another thread, until it is left."""
    servers, is_left = private_ray.servers(), threading.Event()
    _leaving.callback(is_left.set)

    def watch() -> None:
        while not is_left.wait(0.1):
            if not all(map(private_ray.is_up, servers)) and not is_left.is_set():
                _give_up()

    threading.Thread(target=watch, name="watch-servers", daemon=True).start()


def _give_up() -> None:
    """End the process: without Ray it would wait forever. Everything that was reported is in the spool."""
    print(f"\nRay died during the run; continue with:  {resume_command()}", file=sys.stderr, flush=True)
    os._exit(1)


def disconnect() -> None:
    """Leave the cluster; a private one ends."""
    _leaving.close()
