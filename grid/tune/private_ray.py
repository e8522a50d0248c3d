"""The only file that touches parts of Ray which Ray does not promise to keep. A Ray that lacks one runs without it.

The touches in `TOUCHES` are for speed alone: `GRID_PLAIN_RAY=1` turns all of them off, `GRID_PLAIN_RAY=poll,preload`
these two. The functions below them have no switch: they keep a private Ray closed to others, survive the deaths of
workers, or find out what no public call returns.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from socket import AF_UNIX, socket
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from grid.config import InputError

SWITCH = "GRID_PLAIN_RAY"
POLL_SECONDS = 0.02
"""How often a starting Ray is asked whether it is up; Ray itself asks every second."""
RAYS_SECONDS = 30.0
"""For which Ray itself waits until it is up; then it fails."""
START_SECONDS = 600.0
"""For which a Ray is awaited whose servers are alive: on a machine that is far too busy."""
FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  (a folder is made in it that only its owner can enter)
"""Where a private Ray may put its files if they can't be where Ray puts them."""
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes that the kernel leaves for the folder in the name of a socket of Ray."""
PROBE_BYTES = 1 << 20


def fast_start() -> AbstractContextManager[None]:
    """Make a private Ray that starts within the block start faster."""
    return _applied(START)


def fast_trials() -> AbstractContextManager[None]:
    """Make Ray Tune's first trials within the block start faster."""
    return _applied(TRIALS)


@contextmanager
def _applied(touches: Mapping[str, Callable[[], AbstractContextManager[None]]]) -> Iterator[None]:
    switched_off = os.environ.get(SWITCH, "")
    with ExitStack() as stack:
        for name, touch in touches.items():
            if switched_off != "1" and name not in switched_off.split(","):
                stack.enter_context(touch())
        yield


def _skip(server: str) -> AbstractContextManager[None]:
    """Leave a server process out."""
    return _replaced("ray._private.node.Node", f"start_{server}", lambda start: lambda *arguments, **settings: None)


def _quick_poll() -> AbstractContextManager[None]:
    """Notice within `POLL_SECONDS` that Ray is up."""
    return _replaced("ray._private.services", "get_node", lambda get_node: partial(_await_node, get_node))


def _await_node(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    begun = time.monotonic()
    with suppress(AttributeError, TypeError):  # a Ray with another client, or none, is not polled
        client = _find("ray._raylet", "GcsClient")(address=gcs_address)
        while not client.get_all_node_info():
            waited = time.monotonic() - begun
            if waited > START_SECONDS or (waited > RAYS_SECONDS and not _has_raylet()):
                break
            time.sleep(POLL_SECONDS if waited < RAYS_SECONDS else 1)
    return get_node(gcs_address, node_id)


def _has_raylet() -> bool:
    return any(is_up(server) and server.name() == "raylet" for server in servers())


@contextmanager
def _preloaded_workers() -> Iterator[None]:
    """Have workers import what trials need while the driver is still busy, and keep them until the first trial."""
    settings = {
        "RAY_preload_python_modules": "grid.tune.preload",
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
    }
    with _environment(settings):
        yield


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables that Ray's servers inherit, and restore them."""
    kept = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _plain_environment() -> AbstractContextManager[None]:
    """Let trials use the workers that are up: Tune asks for new ones, with a setting for PyTorch Lightning."""
    return _replaced("ray.tune.execution.class_cache", "DEFAULT_ENV_VARS", lambda settings: {})


@contextmanager
def _replaced(owner: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a part of Ray by what `make` makes of it; do nothing if this Ray lacks it."""
    module, _, attribute = owner.rpartition(".")
    found = _find(module, attribute)
    if not hasattr(found, name):
        yield
        return
    kept = getattr(found, name)
    setattr(found, name, make(kept))
    try:
        yield
    finally:
        setattr(found, name, kept)


def _find(module: str, name: str) -> Any:
    """Return a part of Ray; None if this Ray lacks it."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


# Beside each the seconds that it saves of a tiny grid on two idle cores (LOG.md; `python -m benchmarks.start_speed`).
START: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "monitor": partial(_skip, "monitor"),  # 1.6, with "log_monitor": the autoscaler, which has no nodes to add
    "log_monitor": partial(_skip, "log_monitor"),  # copies the workers' output to the driver, which ignores it
    "api_server": partial(_skip, "api_server"),  # 0.8: serves statistics that are not requested
    "poll": _quick_poll,  # 0.6
    "preload": _preloaded_workers,  # 2.1, with "environment"
}
TRIALS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "environment": _plain_environment,  # without it, "preload" saves nothing
}
TOUCHES = (*START, *TRIALS)


def listen_on(*, loopback: bool) -> None:
    """Make the next Ray of this process listen on the loopback address only, or on an address that others reach.

    The public RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER sets the same constant, but too early: when Ray is imported.
    """
    constants = _find("ray._private", "ray_constants")
    if hasattr(constants, "ENABLE_RAY_CLUSTER"):
        constants.ENABLE_RAY_CLUSTER = not loopback


def require_token() -> None:
    """Make this process and the next Ray that it starts ask for a token, unless the user has set RAY_AUTH_MODE."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    config = _find("ray._raylet", "Config")
    if hasattr(config, "initialize"):
        config.initialize("")  # Ray read the environment when it was imported


def own_token() -> AbstractContextManager[None]:
    """Give the private Ray of the block a token of its own, unless the user has set one: Ray would save it at home."""
    is_set = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return _environment({} if is_set else {"RAY_AUTH_TOKEN": _token()})


@cache
def _token() -> str:
    """Return the token of this process: Ray reads it once, so a second private Ray must have the same."""
    return secrets.token_hex(32)


@contextmanager
def own_folder() -> Iterator[None]:
    """Have the private Ray of the block put its files and sockets where it can: where Ray would, or in a new folder.

    A new one is made if Ray's is missing, full, not ours to write, or its name is too long for a socket's.

    Raises:
        InputError: No folder will do.
    """
    if _takes_ray(_ray_folder()):
        yield
        return
    folders = [*FOLDERS, os.environ.get("XDG_RUNTIME_DIR", "")]
    folder = next(filter(_takes_ray, map(Path, folders)), None)
    if folder is None:
        rule = f"that you can write, on a local disk, with a name of at most {LONGEST_FOLDER} bytes"
        tried = ", ".join(filter(None, [str(_ray_folder()), *folders]))
        raise InputError(f"no folder will do for Ray's files and sockets: {tried}; set RAY_TMPDIR to one {rule}")
    with (
        TemporaryDirectory(prefix="r-", dir=folder, ignore_cleanup_errors=True) as made,
        _environment({"RAY_TMPDIR": made}),
    ):
        yield


def patient_start() -> AbstractContextManager[None]:
    """Let the servers of a private Ray that starts within the block wait for one another; the user's settings count."""
    settings = {
        "RAY_gcs_server_port_wait_time_s": f"{START_SECONDS:.0f}",
        "RAY_agent_register_timeout_ms": f"{START_SECONDS * 1000:.0f}",
    }
    return _environment({name: value for name, value in settings.items() if name not in os.environ})


def quiet_errors() -> AbstractContextManager[None]:
    """Keep a Ray that is joined or started within the block from printing ten lines for each worker that dies."""
    return _replaced("ray._private.worker", "listen_error_messages", lambda listen: lambda *arguments: None)


@contextmanager
def deaths_as_actor_errors() -> Iterator[None]:
    """Let Ray Tune survive all deaths of workers: it ends at once if Ray's memory monitor has killed one."""
    manager = "ray.air.execution._internal.actor_manager.RayActorManager"
    with (
        _replaced(manager, "_actor_task_failed", _with_actor_error),
        _replaced(manager, "_actor_start_failed", _with_actor_error),
    ):
        yield


def _ray_folder() -> Path:
    """Return where Ray puts its own folder, by its rule."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")))  # noqa: S108


def _takes_ray(folder: Path) -> bool:
    """Return whether a session of Ray can have its files and sockets in a folder."""
    if not folder.is_absolute() or not str(folder).isascii() or len(str(folder)) > LONGEST_FOLDER:
        return False
    present = folder / "ray" if os.path.lexists(folder / "ray") else folder
    try:
        present.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="r-", dir=present, ignore_cleanup_errors=True) as probe:
            Path(probe, "file").write_bytes(bytes(PROBE_BYTES))
            with socket(AF_UNIX) as listener:
                listener.bind(f"{probe}/socket")
    except OSError:
        return False
    return True


def _with_actor_error(fail: Callable[..., None]) -> Callable[..., None]:
    def fail_by_death(*arguments: Any, exception: Exception, **named: Any) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        fail(*arguments, exception=exception, **named)

    return fail_by_death


def kill_worker(trial: Any) -> None:
    """Kill the process that trains a trial of Ray Tune, which then counts as dead."""
    actor = getattr(getattr(trial, "temporary_state", None), "ray_actor", None)
    if actor is not None:
        ray.kill(actor)


def own_cluster() -> str | None:
    """Return the address of the cluster that `ray start` made this machine a node of; None if there is none."""
    try:
        return (_ray_folder() / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def servers() -> list[psutil.Process]:
    """Return the server processes that the private Ray of this process depends on."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() in ("gcs_server", "raylet"):
                found.append(process)
    return found


def is_up(server: psutil.Process) -> bool:
    """Return whether a server process has not ended."""
    try:
        return server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def autoscaler_configuration(cluster: str) -> str:
    """Return the autoscaler's configuration as YAML if the autoscaler of a cluster runs on this node, else "".

    The command line of its process names the file; a file alone may be left from an earlier cluster.

    Args:
        cluster: Address of the cluster's head.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = dict(word.partition("=")[::2] for word in process.info["cmdline"] or ())
        if words.get("--gcs-address") == cluster and "--autoscaling-config" in words:
            return Path(words["--autoscaling-config"]).expanduser().read_text()
    return ""
