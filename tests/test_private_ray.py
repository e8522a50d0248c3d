"""What is touched of Ray's private parts: for speed, with a switch and without a trace; for safety, always."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from socket import AF_UNIX, socket
from tempfile import TemporaryDirectory

import pytest
import ray  # noqa: F401  (sets variables of its own when it is imported)

from grid.config import InputError
from grid.tune import connection, private_ray

ROOT = Path(__file__).parents[1]
SMALL = ("--only", "lr_schedule=constant", "--only", "dropout=off", "--per-class", "10", "--epochs", "3")
SOCKETS = """
import json, os, time
import psutil
import ray
from grid.tune import connection

connection.connect(None, 1)
time.sleep(5)  # the agent of the node opens its ports late
mine = {process.pid for process in psutil.Process().children(recursive=True)}
sockets = [socket for socket in psutil.net_connections("tcp") if socket.status == "LISTEN" and socket.pid in mine]
addresses = sorted({socket.laddr.ip.removeprefix("::ffff:") for socket in sockets})
print(json.dumps([ray.util.get_node_ip_address(), addresses, os.environ["RAY_AUTH_MODE"]]))
connection.disconnect()
"""
UNTOUCHED = """
import sys
import ray
from ray._private import node, services
from ray.tune.execution import class_cache
from grid.tune import private_ray

def parts():
    starts = [getattr(node.Node, name) for name in dir(node.Node) if name.startswith("start_")]
    return [*starts, services.get_node, class_cache.DEFAULT_ENV_VARS]

before = parts()
with private_ray.fast_start(), private_ray.fast_trials():
    print(sum(one is not other for one, other in zip(before, parts())))
print(sum(one is not other for one, other in zip(before, parts())))
"""


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.mark.parametrize(
    ("switch", "changed"),
    [("", "5"), ("1", "0"), ("poll", "4"), ("poll,environment", "3"), (",".join(private_ray.TOUCHES), "0")],
)
def test_the_switch_turns_off_all_touches_or_some_by_name_and_none_outlives_its_block(
    switch: str, changed: str, tmp_path: Path
) -> None:
    done = run_python("-c", UNTOUCHED, cwd=tmp_path, GRID_PLAIN_RAY=switch)
    assert done.stdout.split() == [changed, "0"], done.stderr


def test_a_ray_that_starts_slowly_is_awaited_as_long_as_its_raylet_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Starting:
        def __init__(self, address: str):
            pass

        def get_all_node_info(self) -> dict[str, object]:
            return {}

    monkeypatch.setattr(private_ray, "RAYS_SECONDS", 0.0)
    monkeypatch.setattr(private_ray, "_find", lambda module, name: Starting)
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    with subprocess.Popen([program, "1000"]) as raylet:
        threading.Timer(2, raylet.kill).start()
        assert private_ray._await_node(lambda *given: given, "the address", "the node") == ("the address", "the node")
        assert raylet.poll() == -signal.SIGKILL


def test_what_the_user_has_set_for_the_start_of_ray_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, port = "RAY_agent_register_timeout_ms", "RAY_gcs_server_port_wait_time_s"
    monkeypatch.setenv(agent, "7")
    monkeypatch.delenv(port, raising=False)
    with private_ray.patient_start():
        assert os.environ[agent] == "7"
        assert float(os.environ[port]) >= 300
    assert port not in os.environ


def test_the_environment_is_as_before_after_a_fast_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_preload_python_modules", "mine")
    before = dict(os.environ)
    with private_ray.fast_start():
        assert "grid.tune.preload" in os.environ.values()
    assert dict(os.environ) == before


def test_a_ray_that_lacks_every_private_part_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray._private", "ray._private.node", "ray._private.services", "ray._raylet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "ray.tune.execution.class_cache", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with private_ray.fast_start(), private_ray.fast_trials():
        private_ray.listen_on(loopback=True)
        private_ray.require_token()


def test_a_ray_with_another_client_is_not_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._raylet.GcsClient", lambda: None)
    assert private_ray._await_node(lambda *arguments: arguments, "127.0.0.1:1", "id") == ("127.0.0.1:1", "id")


def test_a_mode_that_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    private_ray.require_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def folder_of_ray(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str | None:
    """Return the folder that a private Ray is given; None for Ray's own."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with private_ray.own_folder():
        found = os.environ.get("RAY_TMPDIR")
        made = found if found != variables.get("RAY_TMPDIR") else None
        assert made is None or Path(made).stat().st_mode & 0o077 == 0
    assert os.environ.get("RAY_TMPDIR") == variables.get("RAY_TMPDIR")
    assert made is None or not Path(made).exists()
    return made


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_ray_keeps_the_folder_that_the_user_chose_if_it_will_do(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporaryDirectory(prefix="a folder ") as folder:
        assert folder_of_ray(monkeypatch, **{variable: folder}) is None


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize(
    "name", ["x" * private_ray.LONGEST_FOLDER, "/proc/none", "/dev/full", "relative", "", "ü", "\udcff"]
)
def test_ray_gets_a_new_folder_where_its_own_will_not_do(
    variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with TemporaryDirectory() as short:
        folder = name if name.startswith(("/", "relative")) or not name else f"{short}/{name}"
        assert str(folder_of_ray(monkeypatch, **{variable: folder})).startswith("/tmp/r-")


def test_a_folder_of_ray_that_is_no_folder_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporaryDirectory() as short:
        Path(short, "ray").symlink_to("gone")
        assert folder_of_ray(monkeypatch, TMPDIR=short) is not None


def test_the_limit_of_a_folder_s_name_is_the_kernel_s() -> None:
    session = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    for longer, fits in ((0, True), (1, False)):
        with TemporaryDirectory(dir="/tmp") as short, socket(AF_UNIX) as listener:
            room = private_ray.LONGEST_FOLDER + longer - len(short) - 1
            path = Path(short, "x" * room, session)
            path.parent.mkdir(parents=True)
            with nullcontext() if fits else pytest.raises(OSError, match="too long"):
                listener.bind(str(path))


def test_where_no_folder_will_do_the_message_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_ray, "FOLDERS", ("/proc/a", "/proc/b"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/mine")
    message = "no folder will do for Ray's files and sockets: /proc/mine, /proc/a, /proc/b; set RAY_TMPDIR to one that"
    with pytest.raises(InputError, match=message), private_ray.own_folder():
        pass


@pytest.mark.slow
def test_a_private_ray_starts_where_its_folder_s_name_is_too_long_and_home_cannot_be_written(tmp_path: Path) -> None:
    long = tmp_path / ("a_job_of_slurm_" * 5)
    long.mkdir()
    done = run_python("-c", SOCKETS, cwd=tmp_path, TMPDIR=str(long), HOME="/proc/none")
    assert json.loads(done.stdout) == ["127.0.0.1", ["127.0.0.1"], "token"], done.stderr
    assert not list(long.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["", "1"])
def test_a_private_ray_listens_on_this_machine_alone_and_asks_for_a_token(switch: str, tmp_path: Path) -> None:
    done = run_python("-c", SOCKETS, cwd=tmp_path, GRID_PLAIN_RAY=switch)
    assert json.loads(done.stdout) == ["127.0.0.1", ["127.0.0.1"], "token"], done.stderr


@pytest.mark.slow
def test_the_smoke_grid_runs_without_any_private_part_of_ray(tmp_path: Path, glyphs_dir: Path) -> None:
    command = ("-m", "grid.run", "--grid", "smoke", *SMALL, "--data-dir", str(glyphs_dir), "--address", "local")
    done = run_python(*command, cwd=tmp_path, GRID_PLAIN_RAY="1")
    assert done.returncode == 0, done.stderr
    assert "16/16 done" in done.stdout


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSome of the raylet failed to start up.")

    monkeypatch.setattr("ray.init", init)
    try:
        with pytest.raises(InputError, match=r"can't start Ray on this machine: The current node timed out"):
            connection.connect(None, 1)
    finally:
        connection.disconnect()
