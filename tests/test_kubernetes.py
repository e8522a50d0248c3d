"""cluster-kuberay.yaml against the published schemas of Kubernetes and the published fields of KubeRay; not run."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from grid.run import _parser, read_request

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster-kuberay.yaml").read_text()
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all(TEXT)}
JOB = DOCUMENTS["RayJob"]
CLUSTER = JOB["spec"]["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
POD = object()
"""A template of pods, which Kubernetes' own schema describes."""

RAY_JOB = {
    "entrypoint": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "suspend": bool,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "runtimeEnvYAML": str,
    "submitterPodTemplate": POD,
    "rayClusterSpec": {
        "rayVersion": str,
        "authOptions": {"mode": {"disabled", "token"}, "secretName": str},
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {
            "version": {"v1", "v2"},
            "idleTimeoutSeconds": int,
            "upscalingMode": {"Default", "Aggressive", "Conservative"},
        },
        "headGroupSpec": {
            "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
            "rayStartParams": {"num-cpus": str, "num-gpus": str, "dashboard-host": str},
            "template": POD,
        },
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "numOfHosts": int,
                "idleTimeoutSeconds": int,
                "rayStartParams": {"num-cpus": str, "num-gpus": str},
                "template": POD,
            }
        ],
    },
}
"""Fields of `spec` of a RayJob and their types, of those that a grid may need.

By the KubeRay CRD API reference of KubeRay 1.6.2 (docs.ray.io, cluster/kubernetes/references/api.html) and
ray-operator/apis/ray/v1 of github.com/ray-project/kuberay.
"""


def problems(value: Any, wanted: Any, path: str = "spec") -> list[str]:
    """Return where a value does not have the wanted type or fields."""
    if wanted is POD:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **value.get("metadata", {})}}
        try:
            kubernetes_validate.validate({**pod, "spec": value["spec"]}, "1.30", strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{path}: {error.message}"]
        return []
    if isinstance(wanted, set):
        return [] if value in wanted else [f"{path}: {value} is none of {sorted(wanted)}"]
    if isinstance(wanted, list):
        return [problem for item in value for problem in problems(item, wanted[0], f"{path}[]")]
    if isinstance(wanted, dict):
        unknown = [f"{path}.{name}: unknown" for name in value.keys() - wanted.keys()]
        known = value.keys() & wanted.keys()
        return unknown + [one for name in known for one in problems(value[name], wanted[name], f"{path}.{name}")]
    return [] if type(value) is wanted else [f"{path}: {value!r} is no {wanted.__name__}"]


def test_the_job_has_kuberays_fields_and_kubernetes_pods() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert problems(JOB["spec"], RAY_JOB) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"entryPoint": "python"}, "spec.entryPoint: unknown"),
        ({"backoffLimit": "5"}, "spec.backoffLimit: '5' is no int"),
        ({"submissionMode": "Job"}, "spec.submissionMode: Job is none of"),
        ({"submitterPodTemplate": {"spec": {"containers": [{"image": "a"}]}}}, "'name' is a required property"),
    ],
)
def test_a_mistake_is_found(change: dict[str, Any], found: str) -> None:
    (problem,) = problems({**JOB["spec"], **change}, RAY_JOB)
    assert found in problem


@pytest.mark.parametrize("kind", [kind for kind in DOCUMENTS if kind != "RayJob"])
def test_the_rest_is_valid_kubernetes(kind: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[kind], "1.30", strict=True)


def test_ray_is_closed_by_a_token_and_nothing_is_reached_from_outside_the_cluster() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert {CLUSTER["headGroupSpec"]["serviceType"], DOCUMENTS["Service"]["spec"]["type"]} == {"ClusterIP"}
    policy, server = DOCUMENTS["NetworkPolicy"]["spec"], DOCUMENTS["Deployment"]["spec"]["template"]
    assert policy["podSelector"]["matchLabels"] == server["metadata"]["labels"]
    (allowed,) = policy["ingress"]
    labels = [group["template"]["metadata"]["labels"] for group in GROUPS]
    assert allowed["from"] == [{"podSelector": {"matchLabels": labels[0]}}]
    assert labels[0] == labels[1] != server["metadata"]["labels"]


def test_no_secret_is_written_down_and_every_secret_is_made_by_the_page() -> None:
    containers = [container for group in GROUPS for container in group["template"]["spec"]["containers"]]
    containers += DOCUMENTS["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert not re.search(r"(?i)password|AKIA", TEXT)
    named = {source["secretRef"]["name"] for container in containers for source in container["envFrom"]}
    assert named == set(re.findall(r"create secret generic (\S+)", PAGE))


PAGE = (ROOT / "docs" / "cluster_kubernetes.md").read_text()


def test_workers_are_bounded_waited_for_and_end_when_idle() -> None:
    (workers,) = CLUSTER["workerGroupSpecs"]
    (waited,) = {
        entry["value"] for entry in workers["template"]["spec"]["containers"][0]["env"] if entry["name"] == "WORKERS"
    }
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (0, int(waited), int(waited))
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert CLUSTER["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_ray_of_the_file_and_the_page_is_the_one_that_the_tests_run() -> None:
    installed = importlib.metadata.version("ray")
    assert CLUSTER["rayVersion"] == installed
    assert set(re.findall(r"rayproject/ray:(\d+\.\d+\.\d+)", PAGE)) == {installed}


SUBMITTER = """if ! ray job status --address http://head:8265 job >/dev/null 2>&1 ; then \\
ray job submit --address http://head:8265 --no-wait --submission-id job -- {entrypoint} ; fi ; \\
ray job logs --address http://head:8265 --follow job"""
"""What KubeRay's submitter runs by bash: `BuildJobSubmitCommand` in ray-operator/controllers/ray/common/job.go."""

RAY = """#!{python}
import os, subprocess, sys
if sys.argv[2] == "submit":  # joins the words, and the job agent gives them to bash, as Ray does
    entrypoint = subprocess.list2cmdline(sys.argv[sys.argv.index("--") + 1 :])
    on_the_head = dict(os.environ, WORKERS="4", STORAGE="s3://BUCKET/storage")
    subprocess.run(entrypoint, shell=True, executable="/bin/bash", env=on_the_head, check=True)
sys.exit(sys.argv[2] == "status")  # there is no such job yet
"""
PYTHON = """#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([os.environ.get("WORKERS"), sys.argv[1:]]) + "\\n")
"""


def test_the_entrypoint_waits_and_runs_a_command_of_the_grid_on_the_head(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    for name, script in (("ray", RAY), ("python", PYTHON)):
        (tmp_path / name).write_text(script.format(python=sys.executable, calls=str(calls)))
        (tmp_path / name).chmod(0o755)
    command = SUBMITTER.format(entrypoint=JOB["spec"]["entrypoint"])
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], check=True, env=environment)
    (head, waited), (_, run) = map(json.loads, calls.read_text().splitlines())
    assert (head, waited[0]) == ("4", "-c")
    assert ast.unparse(ast.parse(waited[1])).endswith("ray.util.placement_group([dict(GPU=1)] * 4).wait(1200)")
    assert run[:2] == ["-m", "grid.run"]
    words = [word.replace("http://mlflow:5000", "sqlite:///mlflow.db") for word in run[2:]]  # a server has to answer
    assert read_request(_parser().parse_args(words)).storage == "s3://BUCKET/storage"


def test_no_secret_and_no_environment_gets_into_the_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"*.env", ".git", ".venv", "mlflow.db*", "data", "storage", "spool", "mlartifacts"} <= set(left_out)
    assert set(re.findall(r"\S+\.env\b", PAGE.partition("```bash")[2].partition("```")[0])) == {
        "--from-env-file=database.env",
        "--from-env-file=bucket.env",
    }
