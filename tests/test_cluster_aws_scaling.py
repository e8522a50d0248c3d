"""Which workers Ray's autoscaler requests by cluster.yaml, and what it does when EC2 has no spot capacity."""

import time
from collections.abc import Collection
from pathlib import Path

import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.node_provider import CloudInstance, ICloudInstanceProvider, LaunchNodeError
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler
from ray.core.generated.autoscaler_pb2 import ClusterResourceState, NodeStatus, ResourceRequest
from ray.core.generated.common_pb2 import LabelSelector, LabelSelectorConstraint, LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import NodeKind

CLUSTER = yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())
TRIAL = {"CPU": 1.0, "GPU": 0.25}


class Cloud(ICloudInstanceProvider):
    """EC2 that has no capacity for some node types, and says so at once."""

    def __init__(self, without: Collection[str]):
        self._without = without
        self._errors: list[LaunchNodeError] = []
        self._nodes = {"i-head": CloudInstance("i-head", node_type="head", is_running=True, node_kind=NodeKind.HEAD)}
        self.requested: list[tuple[str, int]] = []

    def get_non_terminated(self) -> dict[str, CloudInstance]:
        return dict(self._nodes)

    def launch(self, shape: dict[str, int], request_id: str) -> None:
        for node_type, count in shape.items():
            self.requested.append((node_type, count))
            if node_type in self._without:
                self._errors.append(LaunchNodeError(node_type, count, request_id, time.time_ns()))
                continue
            for number in range(len(self._nodes), len(self._nodes) + count):
                self._nodes[f"i-{number}"] = CloudInstance(
                    f"i-{number}",
                    node_type=node_type,
                    is_running=True,
                    request_id=request_id,
                    node_kind=NodeKind.WORKER,
                )

    def terminate(self, ids: list[str], request_id: str) -> None:
        raise AssertionError("no node is idle here")

    def poll_errors(self) -> list[LaunchNodeError]:
        errors, self._errors = self._errors, []
        return errors


def requested(
    trials: int, *, without: Collection[str] = (), on_demand: int = 0, since: int = 0
) -> list[tuple[str, int]]:
    """Run Ray's autoscaler eight times while trials wait; return what it requests from EC2.

    Args:
        trials: How many wait.
        without: Node types that EC2 has no capacity for.
        on_demand: How many workers `workers N on-demand` waits for.
        since: After how many rounds that command is called.
    """
    cloud, monitor = Cloud(without), CloudResourceMonitor()
    config = AutoscalingConfig(CLUSTER, skip_content_hash=True)
    for name in ("worker.spot", "worker.on-demand"):  # as `ray up` fills it in
        config.get_raw_config_mutable()["available_node_types"][name]["resources"] = {"CPU": 4, "GPU": 1}
    instances = InstanceManager(InstanceStorage("a", InMemoryStorage()), [CloudInstanceUpdater(cloud), monitor])
    scheduler = ResourceDemandScheduler(None)
    for version in range(8):
        state = waiting(trials, on_demand if version >= since else 0)
        state.cluster_resource_state_version, state.last_seen_autoscaler_state_version = version + 1, version
        nodes, errors = cloud.get_non_terminated(), cloud.poll_errors()
        Reconciler.reconcile(instances, scheduler, cloud, monitor, state, nodes, config, cloud_provider_errors=errors)
    return cloud.requested


def waiting(trials: int, on_demand: int) -> ClusterResourceState:
    """Return the state that Ray reports to its autoscaler: the head runs, trials and `workers N on-demand` wait."""
    state = ClusterResourceState()
    head = state.node_states.add(node_id=b"head", instance_id="i-head", ray_node_type_name="head")
    head.status = NodeStatus.RUNNING
    head.total_resources["node:__internal_head__"] = 1
    state.pending_resource_requests.add(count=trials, request=ResourceRequest(resources_bundle=TRIAL))
    market = LabelSelectorConstraint(
        label_key="market", operator=LabelSelectorOperator.LABEL_OPERATOR_IN, label_values=["on-demand"]
    )
    bundle = ResourceRequest(resources_bundle={"GPU": 1}, label_selectors=[LabelSelector(label_constraints=[market])])
    if on_demand:
        state.pending_gang_resource_requests.add(requests=[bundle] * on_demand)
    return state


def test_four_trials_share_a_worker_and_spot_comes_first() -> None:
    assert requested(trials=4) == [("worker.spot", 1)]
    assert requested(trials=8) == [("worker.spot", 2)]


def test_no_more_workers_than_allowed_are_requested() -> None:
    assert requested(trials=1000) == [("worker.spot", CLUSTER["metadata"]["most_workers"])]


def test_without_trials_no_worker_is_requested() -> None:
    assert requested(trials=0) == []


def test_ray_keeps_requesting_spot_if_there_is_no_capacity() -> None:
    """If this fails, Ray has learnt to fall back, and cluster.yaml no longer needs `workers N on-demand`."""
    assert set(requested(trials=16, without=["worker.spot"])) == {("worker.spot", 4)}


def test_on_demand_requested_by_name_comes_before_the_run_and_during_it() -> None:
    assert requested(trials=0, on_demand=4, without=["worker.spot"]) == [("worker.on-demand", 4)]
    during = requested(trials=16, on_demand=4, since=3, without=["worker.spot"])
    assert during[-1] == ("worker.on-demand", 4)
    assert set(during[:-1]) == {("worker.spot", 4)}
