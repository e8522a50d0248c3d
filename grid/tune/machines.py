"""What a cluster has and may grow to: nodes that are up, and those that its autoscaler starts on demand."""

from collections.abc import Mapping, Sequence
from typing import Any

from grid.plan.packing import Node
from grid.wording import count

USUAL_GPU_BYTES = 16 * 2**30
"""Memory assumed for a GPU that is not up yet: that of the small GPUs which clouds rent out."""

WITH_BFLOAT16 = ("A10", "A10G", "A30", "A40", "A100", "B200", "B300", "GH200", "H100", "H200", "L4", "L40", "L40S")
"""Kinds of GPU, as Ray names them, without what follows a hyphen, that compute in bfloat16 themselves."""

HEAD = "node:__internal_head__"
"""The resource that Ray counts on the head only."""


def to_node(resources: Mapping[str, float], gpu_bytes: int) -> Node:
    """Return a node that is up, from the resources that Ray counts on it."""
    gpus = resources.get("GPU", 0)
    return Node(resources.get("CPU", 0), gpus, (gpu_bytes or USUAL_GPU_BYTES) if gpus else 0, gpu_kind(resources))


def with_growth(head: Sequence[Node], workers: Sequence[Node], scaling: Mapping[str, Any] | None) -> list[Node]:
    """Return the nodes of a cluster at its largest.

    Args:
        head: Nodes that the autoscaler does not manage: the head, or all of them if there is no autoscaler.
        workers: The other nodes that are up.
        scaling: The autoscaler's configuration (`ray_bootstrap_config.yaml`); None without an autoscaler.
    """
    if scaling is None:
        return [*head, *workers]
    room = max(0, int(scaling.get("max_workers", 0)) - len(workers))
    grown = [*head, *workers]
    unmatched = list(workers)
    node_types = scaling.get("available_node_types", {}).values()
    for node_type in sorted(node_types, key=lambda node_type: -node_type.get("resources", {}).get("GPU", 0)):
        resources, largest = node_type.get("resources", {}), int(node_type.get("max_workers", 0))
        up = [node for node in unmatched if _may_be_of(node, resources)][:largest]
        unmatched = [node for node in unmatched if node not in up]
        coming = min(room, largest - len(up))
        room -= coming
        grown += [_expected(resources, workers or head)] * coming
    return grown


def is_known_for_bfloat16(kind: str) -> bool:
    """Return whether GPUs of a kind that is not up yet are known to compute in bfloat16 themselves."""
    return kind.partition("-")[0] in WITH_BFLOAT16


def gpu_kind(resources: Mapping[str, float]) -> str:
    """Return the kind of GPU that Ray's resources name; empty if they name none."""
    return next((name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")), "")


def describe(nodes: Sequence[Node]) -> str:
    """Return in one line what is up, and what the cluster may grow to."""
    up = [node for node in nodes if node.here]
    text = _total(up)
    return text if len(up) == len(nodes) else f"{text} up; grows on demand to {_total(nodes)}"


def _total(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), int(sum(node.gpus for node in nodes))
    return ", ".join([count(len(nodes), "node"), f"{cpus:g} CPUs", count(gpus, "GPU")])


def _may_be_of(node: Node, resources: Mapping[str, float]) -> bool:
    """Return whether a node can be of a type; the one type of a cluster of own nodes states no resources."""
    return not resources or (node.gpus, node.cpus) == (resources.get("GPU", 0), resources.get("CPU", 0))


def _expected(resources: Mapping[str, float], known: Sequence[Node]) -> Node:
    if resources:
        gpus = resources.get("GPU", 0)
        return Node(resources.get("CPU", 0), gpus, USUAL_GPU_BYTES if gpus else 0, gpu_kind(resources), here=False)
    like = max(known, key=lambda node: node.cpus)  # own nodes that have not joined yet resemble those that have
    return Node(like.cpus, like.gpus, like.gpu_bytes, like.gpu_kind, here=False)
