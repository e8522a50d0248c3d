"""How many trials run at once, on which share of a CPU or GPU. Pure functions, without torch or Ray."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from grid.config import InputError
from grid.plan.memory import Memory

GPU_BYTES_PER_TRIAL = 2 * 2**30
"""CUDA context, data set, net and cuDNN workspace of one trial, rounded up: what is assumed until it is measured."""
MAX_TRIALS_PER_GPU = 8
SLOWER = 1.5
"""How much more all CPUs must train than a GPU to be named: two of them may share a core."""
WORTH = 0.05
"""Gain in speed, as a share, that more trials at once must bring."""
THIS_MACHINE = "this machine"
MAX_TRIALS_PER_CPU = 64
"""How many trials may share one CPU."""


@dataclass(frozen=True)
class Node:
    """The resources of one machine."""

    cpus: float
    gpus: float
    gpu_bytes: int
    """Memory of its smallest GPU."""
    gpu_kind: str = ""
    """Ray's name for it, such as `A10G`; empty if unknown."""
    here: bool = True
    """Whether the machine is up; otherwise a cluster starts it on demand."""
    trials: float = math.inf
    """Trials that its memory holds."""
    cpu_limit: str = ""
    """What limits the CPUs if not their number, such as `a quota of 1.5 CPUs`."""
    memory_limit: str = ""
    """What limits the memory, such as `1.3 GiB of the container`."""


@dataclass(frozen=True)
class Sharing:
    """How fast trials train that share one device, measured with real ones."""

    speeds: Mapping[int, float]
    """Trials at once -> training images per second of all of them; no more trials than its memory held."""
    trial_bytes: int
    """Memory of the device that one trial takes; 0 on a CPU."""
    cpu_speed: float
    """Training images per second of one thread on a CPU of that machine, for comparison."""

    @property
    def best(self) -> int:
        """Trials at once that are fastest in all, or fewer if they are about as fast."""
        return min(trials for trials, speed in self.speeds.items() if speed >= max(self.speeds.values()) / (1 + WORTH))

    def speedup(self, trials: int) -> float:
        """Return how much faster than one trial some are in all; more than were measured are no faster."""
        return self.speeds[max(number for number in self.speeds if number <= trials)] / self.speeds[1]

    def __str__(self) -> str:
        gain = f"{self.speedup(self.best):.1f} times as fast as 1, {self.trial_bytes / 2**30:.1f} GiB each"
        return f"measured, {gain}" if self.best > 1 else f"measured, {max(self.speeds)} are no faster than 1"


@dataclass(frozen=True)
class Packing:
    """How trials share a machine or a cluster."""

    concurrency: int
    """Trials at once."""
    cpus_per_trial: float
    gpus_per_trial: float
    """Share of one GPU; 0 where trials run on CPUs. Ray only counts shares: it does not partition the memory."""
    reason: str = field(default="", compare=False)
    """What limits the number."""
    machines: str = field(default=THIS_MACHINE, compare=False)
    """The machines it was chosen for, in words."""
    devices: tuple[str, ...] = field(default=(), compare=False)
    """Names of the GPUs, or of the CPUs of machines without one, that were up when it was chosen."""
    bfloat16: bool | None = field(default=None, compare=False)
    """Whether all GPUs compute fast in bfloat16; None if the driver queries its own machine."""

    nodes: tuple[Node, ...] = field(default=(), compare=False)
    """What it was chosen for."""
    wanted: int | None = field(default=None, compare=False)
    """Trials at once, if the user chose."""
    sharing: Sharing | None = field(default=None, compare=False)
    """How trials share a GPU; None until it is measured."""

    @property
    def slots(self) -> float:
        """How many times as fast as one trial that has its device for itself all are."""
        if not self.gpus_per_trial:
            return self.concurrency * self.cpus_per_trial
        if self.sharing is None:
            return self.concurrency
        return self.concurrency * self.gpus_per_trial * self.sharing.speedup(round(1 / self.gpus_per_trial))

    @property
    def note(self) -> str:
        """What a person should know of this choice; empty if nothing."""
        cpus = min((node.cpus / max(1, node.gpus) for node in self.nodes if node.gpus), default=0.0)
        if self.sharing is None or self.wanted is not None:
            return ""
        gpu, all_cpus = max(self.sharing.speeds.values()), cpus * self.sharing.cpu_speed
        if SLOWER * gpu >= all_cpus:
            return ""
        speeds = f"a GPU trains {gpu:,.0f} images a second, the {cpus:.3g} CPUs beside it up to {all_cpus:,.0f}"
        return f"{speeds}; --device cpu may be faster"

    @property
    def device(self) -> str:
        """Kind of device that trains: `cpu` or `cuda`."""
        return "cuda" if self.gpus_per_trial else "cpu"

    def __str__(self) -> str:
        share = f"{self.gpus_per_trial:.3g} GPU" if self.gpus_per_trial else f"{self.cpus_per_trial:.3g} CPU"
        return f"{self.concurrency} at once, {share} each"


def pack(
    cpus: float,
    gpus: float,
    gpu_bytes: int,
    concurrency: int | None = None,
    *,
    memory: Memory | None = None,
    cpu_limit: str = "",
    device: str = "auto",
) -> Packing:
    """Choose how many trials run at once on one machine.

    Args:
        cpus: CPUs of the machine.
        gpus: GPUs of the machine.
        gpu_bytes: Memory of its smallest GPU.
        concurrency: The user's number, which overrides the choice.
        memory: Of the machine; None if it is plenty.
        cpu_limit: What limits the CPUs if not their number.
        device: What trains: `cpu`, `cuda`, or `auto` for GPUs if there are any.

    Raises:
        InputError: `concurrency` is out of range, or the memory is too small.
    """
    node = Node(cpus, gpus, gpu_bytes, cpu_limit=cpu_limit)
    if memory is not None:
        memory.check(concurrency)
        node = replace(node, trials=memory.trials, memory_limit=memory.limit)
    return pack_nodes([node], concurrency, device)


def pack_nodes(nodes: Sequence[Node], concurrency: int | None = None, device: str = "auto") -> Packing:
    """Choose how many trials run at once on machines that may differ; all trials take the same share of a machine.

    On CPUs, one trial per CPU, as a trial has one thread. On GPUs, as many as memory and CPUs allow on the machine that
    has the least per GPU. If any machine has a GPU, those without one are left out.

    Args:
        nodes: All machines that are up or that the cluster may start.
        concurrency: The user's number, which overrides the choice.
        device: What trains: `cpu`, `cuda`, or `auto` for GPUs if there are any.

    Raises:
        InputError: `concurrency` is out of range, or no machine can train.
    """
    cpus = sum(node.cpus for node in nodes)
    if concurrency is not None and concurrency < 1:
        raise InputError(f"--concurrency must be 1 or more, got {concurrency}")
    largest = int(MAX_TRIALS_PER_CPU * max(1.0, cpus))
    if concurrency is not None and concurrency > largest:
        raise InputError(
            f"--concurrency must be at most {largest} here ({MAX_TRIALS_PER_CPU} per CPU), got {concurrency}"
        )
    with_gpu = [node for node in nodes if node.gpus >= 1 and node.cpus > 0]
    if device == "cuda" and not with_gpu:
        raise InputError("--device cuda needs a GPU that torch can use, and none was found; pass --device cpu or auto")
    if with_gpu and device != "cpu":
        return _pack_gpus(with_gpu, concurrency, None)
    if not cpus:
        raise InputError("no machine of the cluster has a CPU for trials; add a worker, or give CPUs to the head")
    if concurrency is None:
        return _pack_cpus(nodes)
    return Packing(concurrency, _cpu_share([node.cpus for node in nodes], concurrency), 0.0, "as --concurrency asks")


def _pack_cpus(nodes: Sequence[Node]) -> Packing:
    """Return one trial per CPU, or fewer where the memory holds fewer."""
    whole = sum(int(node.cpus) for node in nodes)
    by_memory = [node.memory_limit for node in nodes if node.trials < max(1, int(node.cpus))]
    fitting = sum(int(min(node.cpus, node.trials)) for node in nodes)
    reasons = ["one per CPU"] if fitting == whole else [f"limited by memory: {', '.join(sorted(set(by_memory)))}"]
    reasons += sorted({node.cpu_limit for node in nodes if node.cpu_limit and fitting == whole})
    return Packing(max(1, fitting), 1.0 if whole else max(node.cpus for node in nodes), 0.0, ": ".join(reasons))


def pack_as_measured(packing: Packing, sharings: Sequence[Sharing]) -> Packing:
    """Choose again how many trials share a GPU.

    Args:
        packing: On GPUs, chosen by assumption.
        sharings: What was measured on one GPU of each machine that is up; the one for the fewest trials counts.
    """
    sharing = min(sharings, key=lambda sharing: (sharing.best, sharing.speeds[1]))
    chosen = _pack_gpus(packing.nodes, packing.wanted, sharing)
    return replace(chosen, machines=packing.machines, devices=packing.devices, bfloat16=packing.bfloat16)


def most_per_gpu(packing: Packing) -> int:
    """Return how many trials at once are worth measuring on a GPU, whose memory is not known yet."""
    if packing.wanted is not None:
        return min(MAX_TRIALS_PER_GPU, round(1 / packing.gpus_per_trial))
    return max(1, min(MAX_TRIALS_PER_GPU, *_limits_beside_gpus(packing.nodes).values()))


def _pack_gpus(nodes: Sequence[Node], concurrency: int | None, sharing: Sharing | None) -> Packing:
    gpus = sum(int(node.gpus) for node in nodes)
    limits = {
        "the most that may share one": MAX_TRIALS_PER_GPU,
        "limited by its memory": min(node.gpu_bytes for node in nodes) // GPU_BYTES_PER_TRIAL,
    }
    limits = (limits if sharing is None else {str(sharing): sharing.best}) | _limits_beside_gpus(nodes)
    fitting = max(1, min(limits.values()))
    per_gpu = fitting if concurrency is None else math.ceil(concurrency / gpus)
    binding = min(limits, key=lambda reason: limits[reason])
    reason = f"{per_gpu} per GPU, {binding}" if concurrency is None else "as --concurrency asks"
    share = min(1.0, *(node.cpus / (int(node.gpus) * per_gpu) for node in nodes))
    number = concurrency or per_gpu * gpus
    return Packing(number, share, 1 / per_gpu, reason, nodes=tuple(nodes), wanted=concurrency, sharing=sharing)


def _limits_beside_gpus(nodes: Sequence[Node]) -> dict[str, int]:
    """Return how many trials per GPU the CPUs and the memory of the machines allow, by what limits them."""
    limits = {"limited by the CPUs": int(min(node.cpus / node.gpus for node in nodes))}
    smallest = min(nodes, key=lambda node: node.trials / int(node.gpus))
    if smallest.trials < math.inf:
        limits[f"limited by memory: {smallest.memory_limit}"] = int(smallest.trials / int(smallest.gpus))
    return limits


def _cpu_share(cpus: Sequence[float], concurrency: int) -> float:
    """Return the largest share of a CPU, at most 1, that `concurrency` trials can all have on these machines."""
    share = min(1.0, sum(cpus) / concurrency)
    while sum(int(each / share + 1e-9) for each in cpus) < concurrency:
        share = max(each / (int(each / share + 1e-9) + 1) for each in cpus)
    return share
