"""Whether every node can train what the driver asks: same code, same packages, same storage, enough memory.

Each problem is one line that names the node and says what to do. `grid.tune.connection` runs `inspect_node` on every
node before anything is trained.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import yaml

from grid.config import InputError
from grid.plan.memory import BYTES_PER_TRIAL
from grid.plan.packing import Node, Packing, pack_nodes
from grid.surroundings import cpu_name
from grid.train.checkpoints import Checkpoints, StorageError
from grid.train.code_version import digest_here, package_versions
from grid.tune.gpus import device_names, find_gpus, have_bfloat16
from grid.tune.limits import Limits, find_limits
from grid.tune.machines import HEAD, describe, is_known_for_bfloat16, to_node, with_growth
from grid.tune.private_ray import autoscaler_configuration
from grid.wording import first_line

QUIET_SECONDS = 30.0
"""After which a node that has not answered is named on the screen."""
ANSWER_SECONDS = 900.0
"""How long a node may take to answer: it imports torch first, perhaps beside a hundred other processes."""
STORAGE_HINT = "mount the same folder on all nodes, or pass --storage s3://BUCKET"
HINT = "bring the cluster up again with this folder (`ray up`)"


@dataclass(frozen=True)
class CodeVersion:
    """What must be the same wherever trials of one experiment are trained."""

    digest: str
    """Of the sources of grid/ and nets/: a synced folder has no git, and a commit misses uncommitted changes."""
    versions: Mapping[str, str]
    """Of the packages in `PACKAGES`, by name."""

    @classmethod
    def here(cls) -> "CodeVersion":
        """Return the code of this process."""
        return cls(digest_here(), package_versions())

    def problems(self, wanted: "CodeVersion") -> list[str]:
        """Return what differs from the driver's code."""
        others = {name: found for name, found in self.versions.items() if found != wanted.versions.get(name)}
        found = [
            f"has {name} {other}, the driver {wanted.versions.get(name)}; {HINT}" for name, other in others.items()
        ]
        if self.digest != wanted.digest:
            found.append(f"has other code ({self.digest}, the driver {wanted.digest}); {HINT}")
        return found


@dataclass(frozen=True)
class NodeReport:
    """What one node reports about itself."""

    code: CodeVersion
    storage_problem: str
    """Why it can't use the storage; empty if it finds there what the driver wrote, and can write."""
    gpu_bytes: int
    """Memory of its smallest GPU; 0 without one."""
    scaling: str
    """The autoscaler's configuration as YAML, if the autoscaler runs on this node; else empty."""
    limits: Limits
    """What its container or batch job may use, which Ray does not always see."""
    cpu: str = ""
    """Name of its CPU."""
    devices: tuple[str, ...] = ()
    """Names of its GPUs, or of its CPU if it has none."""
    bfloat16: bool = False
    """Whether all its GPUs compute in bfloat16 themselves."""

    def problems(self, code: CodeVersion) -> list[str]:
        """Return why the node can't train with the driver's code."""
        return self.code.problems(code) + [self.storage_problem] * bool(self.storage_problem)


def inspect_node(checkpoints: Checkpoints | None, mark: str, name: str, cluster: str) -> NodeReport:
    """Check the node that this runs on.

    Args:
        checkpoints: The storage to try; None skips it.
        mark: What the driver wrote there, from `marked_storage`.
        name: A file name for what this node writes there.
        cluster: Address of the cluster's head.
    """
    problem = "" if checkpoints is None else storage_problem(checkpoints, mark, name)
    scaling, (gpus, gpu_bytes) = autoscaler_configuration(cluster), find_gpus()
    bfloat16 = gpus > 0 and have_bfloat16()
    return NodeReport(
        CodeVersion.here(), problem, gpu_bytes, scaling, find_limits(), cpu_name(), device_names(), bfloat16
    )


@contextmanager
def marked_storage(checkpoints: Checkpoints) -> Iterator[str]:
    """Within the block, have a mark in the storage for the nodes to find; the marks of other drivers stay.

    Yields:
        The mark.

    Raises:
        StorageError: The storage can't be written.
    """
    mark = os.urandom(8).hex()
    try:
        checkpoints.save(_mark_file(mark), {})
        yield mark
    finally:
        with suppress(StorageError):
            checkpoints.delete(_mark_file(mark))


def _mark_file(mark: str) -> str:
    return f"probe-driver-{mark}"


def storage_problem(checkpoints: Checkpoints, mark: str, name: str) -> str:
    """Return why the node that this runs on can't use the storage; empty if it can."""
    try:
        return _other_storage(checkpoints, mark, name)
    except OSError as error:
        return f"can't use the storage {checkpoints} ({first_line(error)}); {STORAGE_HINT}"


def _other_storage(checkpoints: Checkpoints, mark: str, name: str) -> str:
    """Return why the storage is not the driver's, which can be written here; raise `StorageError` if it fails."""
    if checkpoints.load(_mark_file(mark), "cpu") is None:
        return f"does not see in {checkpoints} what the driver wrote there; {STORAGE_HINT}"
    checkpoints.save(f"probe-{name}", {})
    checkpoints.delete(f"probe-{name}")
    return ""


@dataclass(frozen=True)
class Requirements:
    """What a node that joins after the start must have as well."""

    code: CodeVersion
    """The driver's."""
    mark: str
    """From `marked_storage`."""

    def problem(self, checkpoints: Checkpoints, name: str) -> str:
        """Return why the node that this runs on can't train; empty if it can.

        Raises:
            StorageError: The storage has failed; another try may succeed.
        """
        if problems := self.code.here().problems(self.code):
            return f"node {name} {problems[0]}, or finish the change if somebody is changing this folder"
        problem = _other_storage(checkpoints, self.mark, name.partition(" ")[0])
        return f"node {name} {problem}" if problem else ""


def memory_problem(memory: float, node: Node, packing: Packing) -> str:
    """Return why a node's memory is too small for the trials that it will hold; empty if it is not.

    Args:
        memory: Bytes that the node has for trials.
        node: The node.
        packing: How trials share the cluster.
    """
    on_gpu = packing.gpus_per_trial > 0
    share, capacity = (packing.gpus_per_trial, node.gpus) if on_gpu else (packing.cpus_per_trial, node.cpus)
    trials = min(packing.concurrency, int(capacity / share + 1e-9))
    needed = trials * BYTES_PER_TRIAL
    if needed <= memory:
        return ""
    fitting = max(1, int(memory // BYTES_PER_TRIAL))
    hint = f"pass --concurrency {max(1, packing.concurrency * fitting // trials)}"
    return f"has {memory / 2**30:.1f} GiB of memory for {trials} trials, which need {needed / 2**30:.1f}; {hint}"


def plan_packing(
    resources: Mapping[str, Mapping[str, float]],
    reports: Mapping[str, NodeReport | str],
    code: CodeVersion,
    concurrency: int | None,
    device: str = "auto",
) -> Packing:
    """Choose how trials share a cluster, planned for its largest size.

    Args:
        resources: What Ray counts on each node, by the node's name.
        reports: What each node reports; the reason as text if it could not.
        code: The driver's.
        concurrency: Trials at once, chosen by the user.
        device: What trains: `cpu`, `cuda`, or `auto` for GPUs if there are any.

    Raises:
        InputError: A node can't train; one line for each such node.
    """
    received = _check_reports(reports, code)
    memory = {name: min(resources[name].get("memory", 0), received[name].limits.memory.total) for name in received}
    up = {
        name: _limited(to_node(resources[name], report.gpu_bytes), report.limits, memory[name])
        for name, report in received.items()
    }
    nodes = _largest_cluster(up, resources, received)
    packing = pack_nodes(nodes, concurrency, device)
    _raise({name: memory_problem(memory[name], node, packing) for name, node in up.items()})
    fast = _all_have_bfloat16(nodes, up, received) if packing.gpus_per_trial else None
    on_gpus = packing.gpus_per_trial > 0
    named = (name for report in received.values() for name in (report.devices if on_gpus else (report.cpu,)))
    devices = tuple(dict.fromkeys(named))
    return replace(packing, machines=describe(nodes), bfloat16=fast, devices=devices)


def _all_have_bfloat16(nodes: Sequence[Node], up: Mapping[str, Node], reports: Mapping[str, NodeReport]) -> bool:
    """Return whether all GPUs compute in bfloat16 themselves: those that are up say so, others by their kind."""
    say = all(reports[name].bfloat16 for name, node in up.items() if node.gpus)
    return say and all(is_known_for_bfloat16(node.gpu_kind) for node in nodes if node.gpus and not node.here)


def _limited(node: Node, limits: Limits, memory: float) -> Node:
    """Return a node without the CPUs that Ray counts and a quota forbids, and with as many trials as memory holds.

    Only beside GPUs: of CPUs, a node whose memory is too small for its trials is refused, see `memory_problem`.
    """
    if node.gpus:
        node = replace(node, trials=memory // BYTES_PER_TRIAL, memory_limit=f"{memory / 2**30:.1f} GiB of a node")
    if not limits.cpu_limit or limits.cpus >= node.cpus:
        return node
    return replace(node, cpus=limits.cpus, cpu_limit=limits.cpu_limit)


def _check_reports(reports: Mapping[str, NodeReport | str], code: CodeVersion) -> dict[str, NodeReport]:
    """Return all reports; raise if one is missing or describes a node that can't train."""
    _raise({name: reason for name, reason in reports.items() if isinstance(reason, str)})
    received = {name: report for name, report in reports.items() if isinstance(report, NodeReport)}
    _raise({name: problem for name, report in received.items() for problem in report.problems(code)[:1]})
    return received


def _largest_cluster(
    up: Mapping[str, Node], resources: Mapping[str, Mapping[str, float]], reports: Mapping[str, NodeReport]
) -> list[Node]:
    """Return the nodes that are up, and those that the autoscaler may add by its configuration."""
    scaling = next((yaml.safe_load(report.scaling) for report in reports.values() if report.scaling), None)
    heads = [node for name, node in up.items() if HEAD in resources[name]]
    workers = [node for name, node in up.items() if HEAD not in resources[name]]
    return with_growth(heads, workers, scaling)


def _raise(problems: Mapping[str, str]) -> None:
    lines = [f"node {name} {problem}" for name, problem in problems.items() if problem]
    if lines:
        raise InputError("\n".join(lines))
