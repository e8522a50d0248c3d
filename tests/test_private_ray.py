"""What is touched of Ray's private parts: for speed, with a switch and without a trace; for safety, always."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray  # noqa: F401  (sets variables of its own when it is imported)

from grid.tune import private_ray

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
