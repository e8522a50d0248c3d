"""Which Ray a run joins, with a real one: `ray start` on the loopback address, with a made-up GPU."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grid.config import InputError
from grid.tune import connection
from grid.tune.connection import find_cluster

ROOT = Path(__file__).parents[1]
PACKING = """
from grid.tune import connection
from grid.driver.messages import describe_packing
print(describe_packing(connection.connect(connection.find_cluster(None), None)))
"""
PRIVATE = """
import sys
from grid.tune import connection
connection.connect(None, 1)
print("up", flush=True)
sys.stdin.read()
connection.disconnect()
"""


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for Ray of this test alone; its name is short because the paths of sockets may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    for name, value in {"RAY_TMPDIR": str(folder), "HOME": str(folder), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):  # an empty one forbids the GPU that is pretended
        monkeypatch.delenv(name, raising=False)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pretended_cluster(ray_folder: Path) -> Iterator[str]:
    """A cluster of one node that reports a GPU and eight CPUs; yields `:PORT`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = [str(Path(sys.executable).parent / "ray")]
    subprocess.run([*ray, "get-auth-token", "--generate"], check=True, capture_output=True)
    start = [*ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    start += ["--num-cpus=8", "--num-gpus=1", "--include-dashboard=false"]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    file = ray_folder / "ray" / "ray_current_cluster"
    while not file.exists() and process.poll() is None:
        time.sleep(0.2)
    yield f":{port}"
    process.terminate()
    process.wait(60)


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.slow
def test_a_run_joins_the_cluster_of_its_machine_and_packs_its_gpu(pretended_cluster: str) -> None:
    done = run_script(PACKING)
    assert "'where': '1 node, 8 CPUs, 1 GPU'" in done.stdout, done.stderr
    assert "'at once': '8 at once, 0.125 GPU each (8 per GPU, the most that may share one)'" in done.stdout
    found = find_cluster("auto")
    assert found is not None
    assert found.endswith(pretended_cluster)
    assert find_cluster(None) == found
    assert find_cluster("local") is None


@pytest.mark.slow
def test_the_private_ray_of_another_run_is_not_joined(ray_folder: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", PRIVATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "up\n"
    try:
        assert find_cluster(None) is None
        with pytest.raises(InputError, match="^this machine belongs to no Ray cluster; start one with `ray up`"):
            find_cluster("auto")
    finally:
        other.communicate("")


def test_a_cluster_that_is_gone_is_an_error_and_not_replaced_by_a_private_ray(ray_folder: Path) -> None:
    (ray_folder / "ray").mkdir()
    (ray_folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(
        InputError, match=r"^the Ray cluster of this machine, 127.0.0.1:1, does not answer; bring it up"
    ):
        find_cluster(None)
    assert find_cluster("local") is None


def test_the_environment_variable_of_ray_names_the_cluster(ray_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match="does not answer"):
        find_cluster(None)
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"
    assert find_cluster("10.0.0.1:6379") == "10.0.0.1:6379"


def test_two_nodes_on_one_machine_are_two_and_a_dead_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "one", "Alive": True, "NodeID": "aaaaaaaa"}
    other = {**node, "NodeID": "bbbbbbbb"}
    monkeypatch.setattr("ray.nodes", lambda: [node, other, {**node, "NodeID": "cccccccc", "Alive": False}])
    found = connection._alive_nodes()
    assert {name: each["NodeID"] for name, each in found.items()} == {
        "10.0.0.1 (one)": "aaaaaaaa",
        "10.0.0.1 (one) bbbbbb": "bbbbbbbb",
    }
    assert not connection.is_one_machine()
