"""What a cluster is and may become: machines that are up, and those that its autoscaler starts on demand."""

from collections.abc import Mapping, Sequence
from typing import Any

from grid.plan.packing import Node
from grid.wording import count

USUAL_GPU_BYTES = 16 * 2**30
"""Memory of a GPU that is not up yet: that of the small ones which clouds rent out."""

WITHOUT_BFLOAT16 = ("K80", "M60", "P4", "P100", "V100", "T4")
"""Kinds of GPU, as Ray names them, that are not fast in bfloat16."""

HEAD = "node:__internal_head__"
"""What Ray counts on the head alone."""


def to_node(resources: Mapping[str, float], gpu_bytes: int) -> Node:
    """Return a machine that is up, from what Ray counts on it."""
    gpus = resources.get("GPU", 0)
    return Node(resources.get("CPU", 0), gpus, (gpu_bytes or USUAL_GPU_BYTES) if gpus else 0, kind_of(resources))


def with_growth(head: Sequence[Node], workers: Sequence[Node], scaling: Mapping[str, Any] | None) -> list[Node]:
    """Return the machines of a cluster as large as it may become.

    Args:
        head: Those that are not the autoscaler's: the head, or all if there is no autoscaler.
        workers: The others that are up.
        scaling: The configuration of the autoscaler (`ray_bootstrap_config.yaml`), None without one.
    """
    if scaling is None:
        return [*head, *workers]
    room = max(0, int(scaling.get("max_workers", 0)) - len(workers))
    grown = [*head, *workers]
    waiting = list(workers)
    kinds = scaling.get("available_node_types", {}).values()
    for kind in sorted(kinds, key=lambda kind: -kind.get("resources", {}).get("GPU", 0)):
        most = int(kind.get("max_workers", 0))
        alike = [node for node in waiting if _is_of(node, kind.get("resources", {}))][:most]
        waiting = [node for node in waiting if node not in alike]
        coming = min(room, most - len(alike))
        room -= coming
        grown += [_expected(kind.get("resources", {}), workers or head)] * coming
    return grown


def has_fast_bfloat16(nodes: Sequence[Node]) -> bool:
    """Say whether all GPUs of a cluster are known to be fast in bfloat16; asks none, as none may be up."""
    kinds = [node.gpu_kind for node in nodes if node.gpus]
    return all(kind and kind not in WITHOUT_BFLOAT16 for kind in kinds)


def kind_of(resources: Mapping[str, float]) -> str:
    """Return the kind of GPU among Ray's resources, empty if it is not told."""
    return next((name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")), "")


def describe(nodes: Sequence[Node]) -> str:
    """Return in one line what is up, and what may come."""
    here = [node for node in nodes if node.here]
    text = _sum(here)
    return text if len(here) == len(nodes) else f"{text} up; grows on demand to {_sum(nodes)}"


def _sum(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), int(sum(node.gpus for node in nodes))
    return ", ".join([count(len(nodes), "node"), f"{cpus:g} CPUs", count(gpus, "GPU")])


def _is_of(node: Node, resources: Mapping[str, float]) -> bool:
    """Say whether a machine can be of a kind; machines that a person owns are all of one kind, which tells nothing."""
    return not resources or (node.gpus, node.cpus) == (resources.get("GPU", 0), resources.get("CPU", 0))


def _expected(resources: Mapping[str, float], known: Sequence[Node]) -> Node:
    if resources:
        gpus = resources.get("GPU", 0)
        return Node(resources.get("CPU", 0), gpus, USUAL_GPU_BYTES if gpus else 0, kind_of(resources), here=False)
    like = max(known, key=lambda node: node.cpus)  # own machines that have not joined yet: like those that have
    return Node(like.cpus, like.gpus, like.gpu_bytes, like.gpu_kind, here=False)
