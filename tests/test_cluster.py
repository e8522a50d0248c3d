"""`cluster-local.yaml` on real hosts: `ray up`, a grid that loses a worker host and the head, `ray down`.

The hosts are namespaces of this machine (`tests.cluster_hosts`); Ray and ssh are real. The tests build on
each other, in their order, because each `ray up` takes a minute.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos.audit import audit
from tests.cluster_hosts import Hosts, hosts, missing
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
BIN = ROOT / ".venv" / "bin"


def _is_set_up() -> bool:
    """Return whether `make setup` has nothing left to do; a host would do it in the .venv of this checkout."""
    ready, wanted = ROOT / ".venv" / "ready", ROOT / "pyproject.toml"
    return ready.exists() and ready.stat().st_mtime >= wanted.stat().st_mtime


LACKING = missing() or ("" if _is_set_up() else "needs a .venv that is as new as pyproject.toml (make setup)")

PATIENT = """
import time, torch
from grid import parts

@parts.activation("patient", shape="rising")
class Patient(torch.nn.Module):
    def forward(self, inputs):
        time.sleep(0.05 if self.training else 0)
        return torch.relu(inputs)
"""
"""A parts file with which trials take long though they compute little."""
SEEDS = max(2, os.cpu_count() or 2)
"""Enough for minutes on any machine: Ray notices a lost host after half a minute, and restarts it after that."""
TRIALS = 32 * SEEDS

PATIENCE_SECONDS = 1800.0
"""For each step; the longest takes three minutes on an idle machine."""

pytestmark = [
    pytest.mark.timeout(4 * PATIENCE_SECONDS),
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=LACKING),
]

REQUESTS = """
import http.client, json, sys, urllib.error, urllib.request, grpc

def ask(kind, address, token=None):
    headers = {"authorization": "Bearer " + token} if token else {}
    try:
        if kind == "http":
            return str(urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20).status)
        call = grpc.insecure_channel(address).unary_unary(kind)
        call(b"", timeout=20, metadata=list(headers.items()))
        return "ANSWERED"
    except urllib.error.HTTPError as error:
        return str(error.code)
    except grpc.RpcError as error:
        return error.code().name
    except (OSError, http.client.HTTPException):
        return "NO HTTP"

print(json.dumps([ask(*question) for question in json.loads(sys.argv[1])]))
"""
"""Requests URLs by HTTP or calls methods by gRPC, with or without a token, and prints how each request ended."""

METHODS = {
    "GCS": "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "raylet": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "object manager": "/ray.rpc.ObjectManagerService/Pull",
    "Ray client": "/ray.rpc.RayletDriver/KVExists",
}
"""One method of each of Ray's servers; the others answer that they do not implement it."""


class Cluster:
    """The laptop's view: the filled-in configuration, and the commands that a user types."""

    def __init__(self, made: Hosts):
        self.hosts = made
        self.config = made.folder / "cluster-local.yaml"
        self.config.write_text(fill_in((ROOT / "cluster-local.yaml").read_text(), made))
        self.project = made.home / "factorial-grid"

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray ...` on the laptop, in the project's folder."""
        return self.hosts.run("laptop", [str(BIN / "ray"), *arguments], ROOT, PATIENCE_SECONDS)

    def up(self) -> None:
        done = self.ray("up", str(self.config), "-y")
        assert done.returncode == 0, done.stdout

    def execute(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the head through `ray exec`."""
        return self.ray("exec", str(self.config), f"cd factorial-grid && {command}")

    def on(self, name: str, command: str) -> str:
        """Return the output of a shell command on a host."""
        return self.hosts.run(name, ["bash", "-c", command], Path("/"), PATIENCE_SECONDS).stdout

    def nodes(self) -> int:
        """Return how many nodes are up."""
        status = self.on("head", f"source ~/.bashrc; {BIN}/ray status")
        return sum(map(int, re.findall(r"^ (\d+) local\.cluster\.node", status, re.MULTILINE)))

    def wait_for_nodes(self, count: int) -> None:
        """Wait until a number of nodes is up; polls rarely, because `ray status` takes a second of CPU."""
        wait_until(lambda: self.nodes() == count, PATIENCE_SECONDS, every=5)

    def trains(self, name: str) -> bool:
        """Return whether a trial runs on a host."""
        return bool(re.search(r"ray::\S*(TrialWorker|Trainable)", self.on(name, "ps -e -o args")))


def fill_in(text: str, made: Hosts) -> str:
    """Fill in what the FILL comments of the file ask for."""
    workers = ", ".join(made.address(name) for name in made.names if name.startswith("worker"))
    values = {
        "head_ip: HEAD_IP": f"head_ip: {made.address('head')}",
        "[WORKER_IP, WORKER_IP]": f"[{workers}]",
        "ssh_user: SSH_USER": "ssh_user: root",
        "ssh_private_key: SSH_PRIVATE_KEY": f"ssh_private_key: {made.key}",
    }
    for blank, value in values.items():
        assert text.count(blank) == 1, blank
        text = text.replace(blank, value)
    return text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    # Each host has its own home, so code and token are really sent; .venv is there, as after a first `make setup`.
    shared = {"factorial-grid/.venv": ROOT / ".venv", "storage": folder / "storage"}
    with hosts(folder, ("head", "worker-1", "worker-2", "laptop"), shared) as made:
        cluster = Cluster(made)
        assert cluster.ray("get-auth-token", "--generate").returncode == 0
        cluster.up()
        cluster.wait_for_nodes(3)
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


def test_the_dry_run_shows_what_the_cluster_would_do_and_cost_and_a_wrong_token_is_refused(cluster: Cluster) -> None:
    refused = start_with_a_wrong_token(cluster)  # takes Ray half a minute, in the background
    printed = cluster.execute("python -m grid.run --grid smoke --dry-run --price-per-hour 3").stdout
    assert re.search(r"^where +3 nodes, \d+ CPUs, 0 GPUs\r?$", printed, re.MULTILINE), printed
    assert re.search(r"^at once +\d+ at once, 1 CPU each \(one per CPU\)", printed, re.MULTILINE)
    assert re.search(r"^price +[\d.]+ at 3 per hour", printed, re.MULTILINE)
    assert not (cluster.hosts.own_home("head") / "factorial-grid" / "storage").exists()
    assert refused.wait(PATIENCE_SECONDS) == 2
    lines = (cluster.hosts.folder / "refused.log").read_text().splitlines()
    assert "~/.ray/auth_token must be the cluster's" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]


def start_with_a_wrong_token(cluster: Cluster) -> subprocess.Popen[bytes]:
    address = f"{cluster.hosts.address('head')}:6379"
    command = ["env", "RAY_AUTH_TOKEN=" + "0" * 64, "RAY_AUTH_MODE=token", str(BIN / "python"), "-m", "grid.run"]
    command += ["--grid", "smoke", "--dry-run", "--address", address]
    return cluster.hosts.popen("laptop", command, ROOT, cluster.hosts.folder / "refused.log")


def test_a_storage_that_is_not_shared_and_other_code_are_reported_by_node_before_any_trial(cluster: Cluster) -> None:
    other = cluster.hosts.own_home("worker-2") / "factorial-grid" / "nets" / "mlp.py"
    kept = other.read_text()
    other.write_text(kept + "\n# other code\n")
    try:
        refused = cluster.execute("python -m grid.run --grid smoke")
    finally:
        other.write_text(kept)
    name_1, name_2 = (f"node {cluster.hosts.address(name)} ({name})" for name in ("worker-1", "worker-2"))
    assert refused.returncode != 0
    assert f"{name_1} does not see in {cluster.project}/storage what the driver wrote there; mount" in refused.stdout
    assert f"{name_2} has other code (" in refused.stdout
    assert "bring the cluster up again" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert "left to run" not in refused.stdout


def ask(cluster: Cluster, host: str, *questions: tuple[str, ...]) -> list[str]:
    command = [str(BIN / "python"), "-c", REQUESTS, json.dumps(questions)]
    answers: list[str] = json.loads(
        cluster.hosts.run(host, command, Path("/"), PATIENCE_SECONDS).stdout.splitlines()[-1]
    )
    return answers


def test_every_port_refuses_a_stranger_without_the_token(cluster: Cluster) -> None:
    head = cluster.hosts.address("head")
    listening = cluster.on("head", "ss -ltnH").splitlines()
    ports = sorted({int(line.split()[3].rpartition(":")[2]) for line in listening} - {22})
    assert {5000, 6379, 8265} <= set(ports)
    pages = ask(cluster, "laptop", *(("http", f"http://{head}:{port}/metrics") for port in ports))
    assert set(pages) <= {"401", "NO HTTP"}, list(zip(ports, pages, strict=True))
    calls = [(server, port) for server in METHODS for port in ports]
    said = ask(cluster, "laptop", *((METHODS[server], f"{head}:{port}") for server, port in calls))
    assert set(said) <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, list(zip(calls, said, strict=True))
    refusing = {server for (server, _), answer in zip(calls, said, strict=True) if answer == "UNAUTHENTICATED"}
    assert refusing == set(METHODS)


def test_the_token_gives_access_and_mlflow_and_the_dashboard_answer_on_the_head_only(cluster: Cluster) -> None:
    token = (cluster.hosts.own_home("head") / ".ray" / "auth_token").read_text().strip()
    head = cluster.hosts.address("head")
    gcs = METHODS["GCS"], f"{head}:6379"
    assert ask(cluster, "laptop", (*gcs, "wrong"), (*gcs, token)) == ["UNAUTHENTICATED", "ANSWERED"]
    outside = [("http", f"http://{head}:{port}") for port in (5000, 8265)]
    assert ask(cluster, "laptop", *outside) == ["NO HTTP"] * 2
    page = "http", "http://127.0.0.1:8265/api/cluster_status"
    mlflow = "http", "http://127.0.0.1:5000/health"
    assert ask(cluster, "head", page, (*page, token), mlflow) == ["401", "200", "200"]


def test_a_grid_survives_the_loss_of_a_worker_host_and_of_the_head(cluster: Cluster) -> None:
    (cluster.hosts.own_home("head") / "factorial-grid" / "patient.py").write_text(PATIENT)
    options = f"--seeds {SEEDS} --controls 0 --per-class 20 --data-dir ~/data --storage ~/storage"
    own = "--only activation=patient,squared_relu"
    files = "--parts patient.py --parts examples/own_activation.py"  # which no worker has
    command = f"python -m grid.run --grid smoke --experiment lossy {options} {own} {files}"
    log = cluster.hosts.folder / "grid.log"
    executing = [str(BIN / "ray"), "exec", str(cluster.config), f"cd factorial-grid && {command}"]
    first = cluster.hosts.popen("laptop", executing, ROOT, log)
    wait_until(lambda: cluster.trains("worker-1") and cluster.trains("worker-2"), PATIENCE_SECONDS, every=1)
    cluster.hosts.kill("worker-2")
    time.sleep(3)
    cluster.hosts.start("worker-2")
    wait_until(lambda: cluster.trains("worker-2") or first.poll() is not None, PATIENCE_SECONDS, every=1)
    assert first.poll() is None, log.read_text()[-2000:]  # the host is back and trains, without any command
    cluster.hosts.kill("head")
    first.wait(PATIENCE_SECONDS)
    assert f" {TRIALS}/{TRIALS} done" not in log.read_text()
    cluster.hosts.start("head")
    cluster.up()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (again := cluster.execute(command)).returncode and "is being run by" in again.stdout:
        assert time.monotonic() < deadline
        time.sleep(5)  # until the lease of the dead driver expires
    assert again.returncode == 0, again.stdout[-3000:]
    assert f"{TRIALS}/{TRIALS} done" in again.stdout
    check_record(cluster)


def check_record(cluster: Cluster) -> None:
    folder = cluster.hosts.own_home("head") / "factorial-grid"
    found = audit(f"sqlite:///{folder}/mlflow.db", folder, "lossy", ["lossy"])
    assert found.trials == TRIALS
    assert found.clean, found
    assert list((cluster.hosts.folder / "storage").glob("*/checkpoints/*")) == []


def test_ray_down_ends_the_head_and_no_trial_runs_on_the_workers(cluster: Cluster) -> None:
    done = cluster.ray("down", str(cluster.config), "-y")
    assert "Command failed" not in done.stdout
    assert "raylet" not in cluster.on("head", "ps -e -o args")
    assert not cluster.trains("worker-1")  # Ray itself ends there a minute later
