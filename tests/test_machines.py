"""`grid.tune.machines`: what a cluster may grow to."""

import pytest

from grid.plan.packing import Node, pack_nodes
from grid.tune.machines import USUAL_GPU_BYTES, describe, is_known_for_bfloat16, to_node, with_growth

HEAD = Node(0, 0, 0)
GPU_KIND = {"resources": {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, "min_workers": 0, "max_workers": 3}
CLOUD = {
    "max_workers": 4,
    "available_node_types": {"head": {"resources": {"CPU": 0}, "max_workers": 0}, "gpu": GPU_KIND},
}
OWN = {"max_workers": 2, "available_node_types": {"local.cluster.node": {"resources": {}, "max_workers": 2}}}
UP = to_node({"CPU": 8.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}, 24 * 2**30)


def test_gpus_that_come_on_demand_are_planned_for_before_one_is_up() -> None:
    nodes = with_growth([HEAD], [], CLOUD)
    assert describe(nodes) == "1 node, 0 CPUs, 0 GPUs up; grows on demand to 4 nodes, 24 CPUs, 3 GPUs"
    packing = pack_nodes(nodes)
    assert (packing.concurrency, packing.gpus_per_trial, packing.device) == (24, 1 / 8, "cuda")
    assert [node.gpu_bytes for node in nodes[1:]] == [USUAL_GPU_BYTES] * 3


@pytest.mark.parametrize("up", [1, 2, 3])
def test_a_node_that_is_up_is_not_counted_twice(up: int) -> None:
    assert pack_nodes(with_growth([HEAD], [UP] * up, CLOUD)).concurrency == 24


def test_the_limit_on_all_workers_together_is_kept() -> None:
    two = {**CLOUD, "max_workers": 2}
    assert pack_nodes(with_growth([HEAD], [UP], two)).concurrency == 16


def test_nodes_with_gpus_are_planned_for_first() -> None:
    cpus = {"resources": {"CPU": 16}, "max_workers": 10}
    both = {"max_workers": 3, "available_node_types": {"cpu": cpus, "gpu": GPU_KIND}}
    assert sum(node.gpus for node in with_growth([HEAD], [], both)) == 3


def test_own_nodes_that_have_not_joined_yet_count_like_those_that_have() -> None:
    nodes = with_growth([Node(3, 0, 0)], [Node(4, 0, 0)], OWN)
    assert [(node.cpus, node.here) for node in nodes] == [(3, True), (4, True), (4, False)]
    assert [node.cpus for node in with_growth([Node(3, 0, 0)], [], OWN)] == [3, 3, 3]


def test_a_cluster_without_an_autoscaler_does_not_grow() -> None:
    nodes = with_growth([Node(3, 0, 0)], [Node(4, 0, 0)], None)
    assert describe(nodes) == "2 nodes, 7 CPUs, 0 GPUs"


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        *(("A10G", True), ("H100", True), ("A100-80G", True)),
        *(("T4", False), ("V100", False), ("GeForce-RTX-2080-Ti", False), ("", False)),
    ],
)
def test_of_a_gpu_that_is_not_up_yet_bfloat16_is_expected_only_if_its_kind_is_known_for_it(
    kind: str, known: bool
) -> None:
    assert is_known_for_bfloat16(kind) is known
