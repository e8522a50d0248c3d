"""Whether every machine can train what the driver asks: same code, same packages, same storage, enough memory.

Each fault is one line that names the machine and the mend. Knows no Ray: `grid.connection` carries `report` to them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import psutil
import yaml

import nets
from grid.checkpoint import Checkpoints
from grid.cluster import HEAD, describe, has_fast_bfloat16, to_node, with_growth
from grid.config import InputError, first_line
from grid.gpus import find_gpus
from grid.packing import Node, Packing, pack_nodes

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")
BYTES_PER_TRIAL = 700 * 2**20
"""What one process that trains has for itself: torch, the images, a net and its gradients, rounded up."""
ANSWER_SECONDS = 120.0
"""How long a machine may take to say what it has; it imports torch for that."""
MEND = "bring the cluster up again with this folder (`ray up`)"


@dataclass(frozen=True)
class Code:
    """What must be the same wherever trials of one experiment are trained."""

    digest: str
    """Of the sources of grid/ and nets/: a synced folder has no git, and a commit does not tell of later changes."""
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> "Code":
        """Return the code of this process."""
        folders = (Path(__file__).parent, Path(str(nets.__file__)).parent)
        files = sorted(file for folder in folders for file in folder.glob("*.py"))
        digest = sha256(b"".join(f"{file.parent.name}/{file.name}".encode() + file.read_bytes() for file in files))
        return cls(digest.hexdigest()[:12], {name: version(name) for name in PACKAGES})

    def faults(self, wanted: "Code") -> list[str]:
        """Return what differs from the driver's code."""
        others = {name: found for name, found in self.versions.items() if found != wanted.versions.get(name)}
        found = [
            f"has {name} {other}, the driver {wanted.versions.get(name)}; {MEND}" for name, other in others.items()
        ]
        if self.digest != wanted.digest:
            found.append(f"has other code ({self.digest}, the driver {wanted.digest}); {MEND}")
        return found


@dataclass(frozen=True)
class Report:
    """What one machine says of itself."""

    code: Code
    storage_fault: str
    """Empty if it reads there what the driver wrote, and can write."""
    gpu_bytes: int
    """Memory of its smallest GPU, 0 without one."""
    scaling: str
    """The autoscaler's configuration, on the head of a cluster that has one; else empty."""

    def faults(self, code: Code) -> list[str]:
        """Return why the machine can't train by this code."""
        return self.code.faults(code) + [self.storage_fault] * bool(self.storage_fault)


def report(checkpoints: Checkpoints | None, mark: str, name: str, cluster: str) -> Report:
    """Look at this machine; runs on every one.

    Args:
        checkpoints: The storage to try; None leaves it out.
        mark: What the driver has written there.
        name: Under which this machine writes.
        cluster: Address of the cluster's head.
    """
    fault = "" if checkpoints is None else storage_fault(checkpoints, mark, name)
    return Report(Code.here(), fault, find_gpus()[1], _scaling(cluster))


def _scaling(cluster: str) -> str:
    """Return the configuration of the autoscaler of a cluster if that runs on this machine, else an empty text.

    The command line of its process tells, because a file alone may be left from another time.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = dict(word.partition("=")[::2] for word in process.info["cmdline"] or ())
        if words.get("--gcs-address") == cluster and "--autoscaling-config" in words:
            return Path(words["--autoscaling-config"]).expanduser().read_text()
    return ""


def mark_storage(checkpoints: Checkpoints) -> str:
    """Write what the machines are to find in the storage, and return it."""
    mark = os.urandom(8).hex()
    checkpoints.save(_mark_file(mark), {})
    return mark


def unmark_storage(checkpoints: Checkpoints, mark: str) -> None:
    """Take away what `mark_storage` wrote; the mark of another driver stays."""
    checkpoints.delete(_mark_file(mark))


def _mark_file(mark: str) -> str:
    return f"probe-driver-{mark}"


def storage_fault(checkpoints: Checkpoints, mark: str, name: str) -> str:
    """Say why this machine can't use the storage; empty if it can."""
    mend = "mount the same folder on all nodes, or pass --storage s3://BUCKET"
    try:
        if checkpoints.load(_mark_file(mark), "cpu") is None:
            return f"does not see in {checkpoints} what the driver wrote there; {mend}"
        checkpoints.save(f"probe-{name}", {})
        checkpoints.delete(f"probe-{name}")
    except OSError as error:
        return f"can't use the storage {checkpoints} ({first_line(error)}); {mend}"
    return ""


@dataclass(frozen=True)
class Wanted:
    """What a machine that joins after the start must have, too."""

    code: Code
    """The driver's."""
    mark: str
    """From `mark_storage`."""

    def fault(self, checkpoints: Checkpoints, name: str) -> str:
        """Say why this machine can't train; empty if it can."""
        faults = self.code.here().faults(self.code) or [storage_fault(checkpoints, self.mark, name.partition(" ")[0])]
        return f"node {name} {faults[0]}" if faults[0] else ""


def memory_fault(memory: float, node: Node, packing: Packing) -> str:
    """Say whether a machine lacks memory for the trials that it will hold; empty if not.

    Args:
        memory: Bytes that it has for trials.
        node: The machine.
        packing: How trials share the cluster.
    """
    on_gpu = packing.gpus_per_trial > 0
    share, capacity = (packing.gpus_per_trial, node.gpus) if on_gpu else (packing.cpus_per_trial, node.cpus)
    trials = min(packing.concurrency, int(capacity / share + 1e-9))
    needed = trials * BYTES_PER_TRIAL
    if needed <= memory:
        return ""
    most = max(1, int(memory // BYTES_PER_TRIAL))
    mend = f"pass --concurrency {max(1, packing.concurrency * most // trials)}"
    return f"has {memory / 2**30:.1f} GiB of memory for {trials} trials, which need {needed / 2**30:.1f}; {mend}"


def judge(
    resources: Mapping[str, Mapping[str, float]],
    reports: Mapping[str, Report | str],
    code: Code,
    concurrency: int | None,
) -> Packing:
    """Choose how trials share a cluster, as large as it may become.

    Args:
        resources: What Ray counts on each machine, by the machine's name.
        reports: What each says of itself; text where it could not.
        code: The driver's.
        concurrency: Trials at once, chosen by the user.

    Raises:
        InputError: A machine can't train; one line for each that can't.
    """
    heard = {name: report for name, report in reports.items() if isinstance(report, Report)}
    _raise({name: said for name, said in reports.items() if isinstance(said, str)})
    _raise({name: fault for name, report in heard.items() for fault in report.faults(code)[:1]})
    nodes = {name: to_node(resources[name], report.gpu_bytes) for name, report in heard.items()}
    scaling = next((yaml.safe_load(report.scaling) for report in heard.values() if report.scaling), None)
    heads = [node for name, node in nodes.items() if HEAD in resources[name]]
    workers = [node for name, node in nodes.items() if HEAD not in resources[name]]
    machines = with_growth(heads, workers, scaling)
    packing = pack_nodes(machines, concurrency)
    _raise({name: memory_fault(resources[name].get("memory", 0), node, packing) for name, node in nodes.items()})
    fast = has_fast_bfloat16(machines) if packing.gpus_per_trial else None
    return replace(packing, machines=describe(machines), bfloat16=fast)


def _raise(faults: Mapping[str, str]) -> None:
    lines = [f"node {name} {fault}" for name, fault in faults.items() if fault]
    if lines:
        raise InputError("\n".join(lines))
