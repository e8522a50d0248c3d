"""cluster.yaml: what Ray's own code does with it, against a mock of AWS. No network, no credentials, no account."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import ray
import yaml
from moto import mock_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.command_runner import SSHCommandRunner, SSHOptions, _with_interactive
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
NODE_TYPES = tuple(CLUSTER["available_node_types"])
DOCS = ROOT / "docs/cluster_aws.md"
WORKERS = tuple(name for name in NODE_TYPES if name.startswith("worker"))
COMMAND_LISTS = tuple(key for key in CLUSTER if key.endswith("_commands"))
COMMANDS = [command for key in COMMAND_LISTS for command in CLUSTER[key]]
HOME_ADDRESS = "203.0.113.7/32"


@dataclass(frozen=True)
class Account:
    """An AWS account in which `ray up` and the autoscaler have run."""

    given: dict[str, Any]
    """cluster.yaml, filled in."""
    resolved: dict[str, Any]
    """The configuration that Ray derives from it."""
    group: str
    """The security group that docs/cluster_aws.md creates."""
    requests: dict[str, dict[str, Any]]
    """The requests to EC2, by node type."""
    groups: frozenset[str]
    roles: frozenset[str]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """A mock of AWS, prepared as docs/cluster_aws.md describes; sockets reach this machine only."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        seal(patch, tmp_path_factory.mktemp("home"))
        ec2, iam = boto3.client("ec2", CLUSTER["provider"]["region"]), boto3.client("iam")
        group = ec2.create_security_group(GroupName="factorial-grid", Description="ssh from home")["GroupId"]
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": HOME_ADDRESS}]}
        nodes = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, nodes])
        for name in ("factorial-grid-head", "factorial-grid-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        given = copy.deepcopy(CLUSTER)
        for node_type in given["available_node_types"].values():
            assert node_type["node_config"]["SecurityGroupIds"] == ["sg-FILL-IN"]
            node_type["node_config"]["SecurityGroupIds"] = [group]
        resolved = commands._bootstrap_config(given, no_config_cache=True)
        groups = {found["GroupName"] for found in ec2.describe_security_groups()["SecurityGroups"]}
        roles = {role["RoleName"] for role in iam.list_roles()["Roles"]}
        requests = launch(resolved)
        yield Account(given, resolved, group, requests, frozenset(groups), frozenset(roles))


def seal(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Use a separate home and invalid credentials, and block connections to other machines."""
    reach = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"a connection to {address}"
        reach(self, address)

    patch.setattr(socket.socket, "connect", connect)
    patch.setattr(aws_config.time, "sleep", lambda seconds: None)
    patch.setenv("HOME", str(home))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        patch.setenv(name, "none")
    patch.delenv("AWS_PROFILE", raising=False)
    for cache in (aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die):
        cache.cache_clear()


def launch(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Launch a node of each type with Ray, and return its requests to EC2."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    client = provider.ec2_fail_fast.meta.client
    image = client.describe_images()["Images"][0]["ImageId"]
    asked = []

    def note(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        asked.append(copy.deepcopy(params))
        return params | {"ImageId": image}  # EC2 looks up resolve:ssm, the mock does not

    client.meta.events.register("provide-client-params.ec2.RunInstances", note)
    for name in NODE_TYPES:
        tags = {TAG_RAY_NODE_KIND: name.split(".")[0], TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_LAUNCH_CONFIG: "0"}
        node_config = config["available_node_types"][name]["node_config"]
        assert len(provider.create_node(node_config, tags | {TAG_RAY_NODE_NAME: name}, 1)) == 1
    return dict(zip(NODE_TYPES, asked, strict=True))


def describe(account: Account) -> Any:
    return boto3.client("ec2", account.given["provider"]["region"])


def open_ports(account: Account, config: dict[str, Any]) -> set[tuple[int, str]]:
    """Return which ports of a cluster are open to which addresses."""
    types = config["available_node_types"].values()
    groups = sorted({group for node_type in types for group in node_type["node_config"]["SecurityGroupIds"]})
    found = describe(account).describe_security_groups(GroupIds=groups)["SecurityGroups"]
    rules = [rule for group in found for rule in group["IpPermissions"]]
    sources = [(rule["FromPort"], source) for rule in rules for source in rule["IpRanges"] + rule["Ipv6Ranges"]]
    return {(port, source.get("CidrIp", source.get("CidrIpv6"))) for port, source in sources}


# What Ray accepts, and what it requests from AWS


def test_ray_accepts_the_file_and_fills_in_the_resources_of_the_instances(account: Account) -> None:
    types = account.resolved["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {(types[name]["resources"]["CPU"], types[name]["resources"]["GPU"]) for name in WORKERS} == {(4, 1)}
    assert account.resolved["max_workers"] == CLUSTER["metadata"]["most_workers"]
    assert {name: node_type["max_workers"] for name, node_type in types.items()} == {
        "head": 0,
        "worker.on-demand": 4,
        "worker.spot": 4,
    }


def test_a_mistyped_key_is_refused(account: Account) -> None:
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        commands._bootstrap_config(account.given | {"idle_timeout_minuets": 5}, no_config_cache=True)


def test_the_tests_connect_to_this_machine_only(account: Account) -> None:
    with socket.socket() as outside, pytest.raises(AssertionError, match="a connection to"):
        outside.connect(("192.0.2.1", 443))


def test_ray_creates_no_group_and_no_role_of_its_own(account: Account) -> None:
    assert account.groups == {"default", "factorial-grid"}
    assert account.roles == set()


def test_only_ssh_from_home_is_let_in(account: Account) -> None:
    assert open_ports(account, account.resolved) == {(22, HOME_ADDRESS)}


def test_ray_by_default_would_allow_ssh_from_anywhere(account: Account) -> None:
    given = copy.deepcopy(account.given)
    for node_type in given["available_node_types"].values():
        del node_type["node_config"]["SecurityGroupIds"]
    assert (22, "0.0.0.0/0") in open_ports(account, commands._bootstrap_config(given, no_config_cache=True))


def test_a_group_that_is_not_filled_in_is_refused(account: Account, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        commands._bootstrap_config(copy.deepcopy(CLUSTER), no_config_cache=True)
    assert "Failed to detect a security group" in capfd.readouterr().err


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_each_node_is_requested_with_group_role_disk_and_tags(account: Account, node_type: str) -> None:
    request = account.requests[node_type]
    disk = request["BlockDeviceMappings"][0]["Ebs"]
    specs = request["TagSpecifications"]
    tags = {spec["ResourceType"]: {tag["Key"]: tag["Value"] for tag in spec["Tags"]} for spec in specs}
    assert request["SecurityGroupIds"] == [account.group]
    assert request["IamInstanceProfile"] == {"Name": f"factorial-grid-{node_type.split('.')[0]}"}
    assert request["MetadataOptions"]["HttpTokens"] == "required"
    assert (disk["Encrypted"], disk["DeleteOnTermination"], disk["VolumeSize"] >= 64) == (True, True, True)
    assert tags["instance"]["project"] == tags["volume"]["project"] == "factorial-grid"
    assert tags["instance"]["ray-cluster-name"] == "factorial-grid"


def test_workers_have_a_gpu_and_its_driver_and_the_head_has_neither(account: Account) -> None:
    types = {name: request["InstanceType"] for name, request in account.requests.items()}
    driver = {name: "nvidia-driver" in request["ImageId"] for name, request in account.requests.items()}
    assert types == {"head": "m7i.xlarge", "worker.on-demand": "g6.xlarge", "worker.spot": "g6.xlarge"}
    assert driver == {"head": False, "worker.on-demand": True, "worker.spot": True}
    assert all(request["ImageId"].startswith("resolve:ssm:/aws/service/") for request in account.requests.values())


def test_only_the_spot_type_is_requested_as_spot_and_without_a_price_limit(account: Account) -> None:
    market = {name: request.get("InstanceMarketOptions") for name, request in account.requests.items()}
    assert market == {"head": None, "worker.on-demand": None, "worker.spot": {"MarketType": "spot"}}


def test_every_zone_of_the_region_is_tried(account: Account) -> None:
    subnets = {subnet["SubnetId"] for subnet in describe(account).describe_subnets()["Subnets"]}
    assert len(subnets) > 1
    for node_type in account.resolved["available_node_types"].values():
        assert set(node_type["node_config"]["SubnetIds"]) == subnets


def test_ray_down_stops_the_head_and_keeps_its_disk(account: Account) -> None:
    provider = AWSNodeProvider(account.resolved["provider"], account.resolved["cluster_name"])
    (head,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "head"})
    provider.terminate_nodes([head])
    (reservation,) = describe(account).describe_instances(InstanceIds=[head])["Reservations"]
    assert reservation["Instances"][0]["State"]["Name"] == "stopped"


# What is copied to the nodes


def copied(tmp_path: Path) -> set[str]:
    """Copy the mounts with the rsync commands that Ray makes, to a folder instead of a node; return what arrives."""
    sent: list[list[str]] = []
    runner = SimpleNamespace(
        _get_ssh_target=lambda: "node",
        _create_rsync_filter_args=lambda options: SSHCommandRunner._create_rsync_filter_args(None, options),
        _run_helper=lambda command, silent: sent.append(command),
        ssh_options=SSHOptions(None),
        ssh_user="ubuntu",
    )
    for remote, local in CLUSTER["file_mounts"].items():
        source = tmp_path / Path(local).expanduser()
        end = "/" if source.is_dir() else ""
        options = {"rsync_exclude": CLUSTER["rsync_exclude"]}
        SSHCommandRunner.run_rsync_up(runner, f"{source}{end}", remote + end, options)
    for command in sent:
        target = tmp_path / "node" / command[-1].removeprefix("ubuntu@node:/")
        target.parent.mkdir(parents=True, exist_ok=True)
        without_ssh = [argument for argument in command[:-1] if argument != "--rsh" and not argument.startswith("ssh ")]
        subprocess.run([*without_ssh, target], check=True, capture_output=True)
    home = tmp_path / "node/home/ubuntu"
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


@pytest.mark.skipif(not shutil.which("rsync"), reason="no rsync here")
def test_the_project_the_token_and_the_versions_arrive_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = [
        "grid/run.py",
        "nets/cnn.py",
        "analysis/rank.py",
        "benchmarks/chaos/audit.py",
        "examples/own_factor.py",
        "analysis/notebooks/a.ipynb",
    ]
    wanted += ["LICENSE", "Makefile", "README.md", "pyproject.toml"]
    left = [".venv/bin/python", ".git/HEAD", "data/EMNIST/raw/x", "storage/a", "spool/a", "mlflow.db", "mlartifacts/a"]
    left += ["grid/__pycache__/run.pyc", "analysis/notebooks/.ipynb_checkpoints/a.ipynb", "tests/test_run.py"]
    for name in [*wanted, *left, ".ray/auth_token", ".ray/grid-constraints.txt", ".ray/session.log"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert copied(tmp_path) == {f"grid/{name}" for name in wanted} | {".ray/auth_token", ".ray/grid-constraints.txt"}


def test_every_file_that_the_comments_name_exists() -> None:
    text = (ROOT / "cluster.yaml").read_text() + (ROOT / "cluster-local.yaml").read_text()
    named = re.findall(r"\b(?:grid|tests|docs)/[\w/]+\.\w+", "\n".join(re.findall(r"#.*", text)))
    assert {"grid/plan/packing.py", "docs/cluster_own.md"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_package_of_the_project_is_copied() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = {name.removesuffix("*") for name in found["include"]}
    assert {f"/home/ubuntu/grid/{name}" for name in packages} <= set(CLUSTER["file_mounts"])
    assert all((ROOT / local).exists() for local in CLUSTER["file_mounts"].values() if not local.startswith("~"))


# What runs on the nodes


def run_bash(command: str, home: Path, **environment: str) -> str:
    """Run a command in a shell as Ray's ssh starts it; return its output."""
    (home / ".bashrc").touch()
    shell = shlex.split(" ".join(_with_interactive(command)))[-1]
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]} | environment
    ran = subprocess.run(
        ["bash", "-c", shell], cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def find(text: str) -> str:
    """Return the only command that contains a text."""
    (command,) = [command for command in COMMANDS if text in command]
    return command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_valid_bash_as_ray_wraps_it(command: str) -> None:
    shell = shlex.split(" ".join(_with_interactive(command)))[-1]
    subprocess.run(["bash", "-n", "-c", shell], check=True, capture_output=True)


def test_every_server_listens_on_its_node_only() -> None:
    text = "\n".join(COMMANDS)
    assert "0.0.0.0" not in text
    assert set(re.findall(r"--(?:dashboard-)?host[= ](\S+)", text)) == {"127.0.0.1"}
    assert "--dashboard-host=127.0.0.1" in find("ray start --head")


def test_ray_requires_a_token_on_head_and_workers_and_what_can_not_stays_closed() -> None:
    starts = [command for command in COMMANDS if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_enable_metrics_collection=0 " in command for command in starts)
    assert "AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1 " in find("ray start --head")
    assert all(re.search(r"RAY_AUTH_MODE=token\s+ray start", command) for command in starts)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in find("ray start --head")


def test_every_shell_has_the_token_mode_the_storage_and_the_environment(tmp_path: Path) -> None:
    for command in [command for command in CLUSTER["setup_commands"][:3] for _ in range(2)]:
        run_bash(command, tmp_path)
    said = run_bash("echo $RAY_AUTH_MODE $STORAGE ${PATH%%/.venv*}", tmp_path).split()
    assert said == ["token", "s3://BUCKET-FILL-IN/storage", f"{tmp_path}/bin:{tmp_path}/grid"]
    assert (tmp_path / ".bashrc").read_text() == ". ~/.grid_env\n"


SERVER = """#!/usr/bin/env python3
import http.server, os, sys
open("starts", "a").write(f"{os.getpid()}\\n")
open("place", "w").write(os.environ["MLFLOW_BACKEND_STORE_URI"] + " " + os.environ["MLFLOW_ARTIFACTS_DESTINATION"])
host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), http.server.BaseHTTPRequestHandler).serve_forever()
"""
FLOCK = """#!/bin/sh
{flock} "$@" || touch given-up
"""


def test_mlflow_is_started_once_and_again_only_after_it_has_died(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "bin").mkdir()
    for name, script in {"mlflow": SERVER, "flock": FLOCK.format(flock=shutil.which("flock"))}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    command = find("mlflow server").replace("5000", port)
    starts = tmp_path / "mlflow/starts"
    given_up = tmp_path / "mlflow/given-up"
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    run_bash(find("MLFLOW_BACKEND_STORE_URI"), tmp_path)
    try:
        run_bash(command, tmp_path, PATH=path)
        run_bash(command, tmp_path, PATH=path)
        wait_until(given_up.exists)  # else the second one may find the lock free, in the background
        assert len(starts.read_text().split()) == 1
        os.kill(int(starts.read_text()), signal.SIGKILL)
        subprocess.run(["flock", tmp_path / "mlflow/server.lock", "true"], check=True, timeout=900)  # the lock is free
        run_bash(command, tmp_path, PATH=path)
        assert len(starts.read_text().split()) == 2
        place = (tmp_path / "mlflow/place").read_text()
        assert place == f"sqlite:///{tmp_path}/mlflow/mlflow.db {tmp_path}/mlflow/artifacts"
    finally:
        os.kill(int(starts.read_text().split()[-1]), signal.SIGKILL)


@pytest.mark.slow
def test_the_workers_command_waits_for_free_gpus_of_the_requested_market(tmp_path: Path) -> None:
    run_bash(find("bin/workers"), tmp_path)
    script = (tmp_path / "bin/workers").read_text().replace("20 * 60", "3")
    ray.init(address="local", num_cpus=1, num_gpus=2, labels={"market": "spot"}, include_dashboard=False)
    try:
        environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        said = [
            subprocess.run(
                [sys.executable, "-c", script, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            for arguments in (["2"], ["2", "spot"], ["1", "on-demand"], ["3"])
        ]
    finally:
        ray.shutdown()
    assert [ran.returncode for ran in said] == [0, 0, 1, 1]
    assert said[1].stdout == "2 workers are up\n"
    assert "no 1 on-demand workers in 20 minutes" in said[2].stderr


# What the documentation tells a user to do


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL))
def test_every_block_to_paste_is_valid_bash(block: str) -> None:
    subprocess.run(["bash", "-n", "-c", block], check=True, capture_output=True)


def test_the_roles_may_use_one_bucket_and_the_head_may_start_workers(tmp_path: Path) -> None:
    policies = re.search(r"^ROLE=.*(?=^aws s3 mb)", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    assert policies is not None
    said = run_bash(f"BUCKET=mine\n{policies[0]}\necho [$ROLE, $WORKER, $HEAD]", tmp_path)
    _, worker, head = (policy["Statement"] for policy in json.loads(said))
    everywhere = [s["Action"] for s in head if s["Resource"] == "*" and "Condition" not in s]
    assert {s["Resource"] for s in worker} == {"arn:aws:s3:::mine", "arn:aws:s3:::mine/*"}
    assert everywhere == [["ec2:Describe*", "ec2:RunInstances"]]
    assert [s["Resource"] for s in head if s["Action"] == "iam:PassRole"] == [
        "arn:aws:iam::*:role/factorial-grid-worker"
    ]
