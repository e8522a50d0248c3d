"""What is reported of nodes that can't train, without a cluster."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from grid.config import InputError
from grid.plan.memory import Memory
from grid.plan.packing import Node, Packing
from grid.train.checkpoints import Checkpoints
from grid.tune import connection
from grid.tune.limits import Limits
from grid.tune.machines import HEAD
from grid.tune.preflight import (
    BYTES_PER_TRIAL,
    CodeVersion,
    NodeReport,
    Requirements,
    marked_storage,
    memory_problem,
    plan_packing,
    storage_problem,
)

CODE = CodeVersion("0123456789ab", {"torch": "2.15", "ray": "2.60"})
GOOD = NodeReport(CODE, "", 0, "", Limits(4.0, "", Memory(16 * 2**30, 16 * 2**30)))
RESOURCES = {"CPU": 4.0, "memory": 8.0 * 2**30}
TWO = {"10.0.0.1 (head)": {**RESOURCES, HEAD: 1.0}, "10.0.0.2 (node)": RESOURCES}


def plan_with_second(second: NodeReport | str) -> Packing:
    return plan_packing(TWO, dict(zip(TWO, (GOOD, second), strict=True)), CODE, None)


def test_a_good_cluster_is_packed_and_described() -> None:
    packing = plan_with_second(GOOD)
    assert (packing.concurrency, packing.machines, packing.bfloat16) == (8, "2 nodes, 8 CPUs, 0 GPUs", None)


def test_the_devices_of_all_nodes_are_named_each_once() -> None:
    reports = {
        name: replace(GOOD, cpu="a CPU", devices=devices)
        for name, devices in zip(TWO, (("a", "b"), ("b", "c")), strict=True)
    }
    gpus = {name: {**resources, "GPU": 2.0} for name, resources in TWO.items()}
    assert plan_packing(gpus, reports, CODE, None).devices == ("a", "b", "c")
    on_cpus = plan_packing(gpus, reports, CODE, None, "cpu")
    assert (on_cpus.devices, on_cpus.device, on_cpus.concurrency) == (("a CPU",), "cpu", 8)


def test_gpus_that_are_asked_for_and_missing_are_refused() -> None:
    with pytest.raises(InputError, match="^--device cuda needs a GPU that torch can use, and none was found"):
        plan_packing(TWO, dict.fromkeys(TWO, GOOD), CODE, None, "cuda")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("does not answer", "does not answer"),
        (
            replace(GOOD, code=replace(CODE, versions={"torch": "2.14", "ray": "2.60"})),
            "has torch 2.14, the driver 2.15; ",
        ),
        (
            replace(GOOD, code=replace(CODE, digest="f" * 12)),
            "has other code (ffffffffffff, the driver 0123456789ab); ",
        ),
        (replace(GOOD, storage_problem="can't use the storage"), "can't use the storage"),
    ],
)
def test_a_node_that_cannot_train_is_named_with_what_to_do(second: NodeReport | str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_with_second(second)
    assert str(caught.value).startswith(f"node 10.0.0.2 (node) {message}")
    assert "\n" not in str(caught.value)


def test_limits_that_ray_does_not_see_count() -> None:
    memory = Memory(2 * 2**30, 2 * 2**30, "the container")
    with pytest.raises(
        InputError, match=r"^node 10.0.0.2 \(node\) has 2.0 GiB of memory for 4 trials, which need 2.7; pass"
    ):
        plan_with_second(replace(GOOD, limits=Limits(4.0, "", memory)))
    packing = plan_with_second(replace(GOOD, limits=Limits(1.5, "a quota of 1.5 CPUs", memory)))
    assert (packing.concurrency, packing.reason) == (5, "one per CPU: a quota of 1.5 CPUs")


def test_nodes_that_the_autoscaler_may_add_are_planned_for() -> None:
    kinds = {"gpu": {"resources": {"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}, "max_workers": 2}}
    scaling = json.dumps({"max_workers": 2, "available_node_types": kinds})
    name = next(iter(TWO))
    packing = plan_packing({name: TWO[name]}, {name: replace(GOOD, scaling=scaling)}, CODE, None)
    assert (packing.concurrency, packing.gpus_per_trial, packing.bfloat16) == (16, 1 / 8, False)


GPUS = {"10.0.0.1 (head)": {**RESOURCES, HEAD: 1.0, "CPU": 0.0}, "10.0.0.2 (node)": {**RESOURCES, "GPU": 1.0}}


@pytest.mark.parametrize("bfloat16", [True, False])
def test_gpus_that_are_up_say_whether_they_have_bfloat16_whatever_they_are_called(bfloat16: bool) -> None:
    resources = {**GPUS, "10.0.0.2 (node)": {**GPUS["10.0.0.2 (node)"], "accelerator_type:GeForce-RTX-2080-Ti": 1.0}}
    reports = {"10.0.0.1 (head)": GOOD, "10.0.0.2 (node)": replace(GOOD, gpu_bytes=2**34, bfloat16=bfloat16)}
    assert plan_packing(resources, reports, CODE, None).bfloat16 is bfloat16


def test_too_little_memory_is_reported_with_a_concurrency_that_fits() -> None:
    node, packing = Node(4, 0, 0), Packing(8, 1.0, 0.0)  # two such nodes
    assert memory_problem(4 * BYTES_PER_TRIAL, node, packing) == ""
    problem = memory_problem(2 * BYTES_PER_TRIAL, node, packing)
    assert problem == "has 1.4 GiB of memory for 4 trials, which need 2.7; pass --concurrency 4"


def test_a_head_that_holds_no_trials_needs_no_memory_for_them() -> None:
    assert memory_problem(0, Node(0, 0, 0), Packing(8, 1.0, 1 / 8)) == ""


def test_storage_that_is_another_folder_or_unwritable_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path / "here"), "grid")
    with marked_storage(checkpoints) as mark:
        assert storage_problem(checkpoints, mark, "node") == ""
        assert [file.name for file in tmp_path.rglob("*.pt")] == [f"probe-driver-{mark}.pt"]
        problem = storage_problem(checkpoints, "another run's", "node")
        assert problem.startswith(f"does not see in {tmp_path / 'here'} what")
        with marked_storage(checkpoints):  # of a second driver, which comes and goes
            pass
        assert storage_problem(checkpoints, mark, "node") == ""
    (tmp_path / "file").touch()
    blocked = Checkpoints(str(tmp_path / "file"), "grid")
    assert storage_problem(blocked, mark, "node").startswith(f"can't use the storage {tmp_path / 'file'} (")


def test_ctrl_c_while_nodes_are_asked_leaves_no_mark_in_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert list(tmp_path.rglob("probe-driver-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        connection._reports({}, "127.0.0.1:1", Checkpoints(str(tmp_path), "grid"))
    assert list(tmp_path.rglob("probe-*")) == []


def test_a_node_that_joins_late_is_checked_in_the_same_way(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "grid")
    with marked_storage(checkpoints) as mark:
        assert Requirements(CodeVersion.here(), mark).problem(checkpoints, "10.0.0.3 (late)") == ""
        problem = Requirements(CODE, mark).problem(checkpoints, "10.0.0.3 (late)")
        assert problem.startswith("node 10.0.0.3 (late) has torch ")
        assert problem.endswith("or finish the change if somebody is changing this folder")
    assert "does not see" in Requirements(CodeVersion.here(), mark).problem(checkpoints, "10.0.0.3 (late)")


def test_the_code_version_is_stable_and_names_the_packages() -> None:
    here = CodeVersion.here()
    assert here == CodeVersion.here()
    assert len(here.digest) == 12
    assert here.versions["torch"]
