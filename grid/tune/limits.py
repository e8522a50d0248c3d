"""How many CPUs and how much memory this process may use: of the machine, or of its container, batch job or service.

Linux limits both by control groups, which nest: the smallest limit on the way to the root counts. Version 1 has a tree
for each resource, version 2 one for all.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from grid.config import InputError
from grid.plan.memory import Memory
from grid.wording import count

UNLIMITED = 2**60
"""Limits as large as this are none; version 1 writes 2^63 rounded down to a page."""
SMALLEST_OBJECT_STORE = 80 * 2**20
RAY_THREADS, TRIAL_THREADS = 200, 50
"""Threads of Ray's servers and the driver, and of a worker: what a grid on two cores was seen to have, rounded up."""
ADDRESS_SPACE = 8 * 2**30
"""Bytes that a process with torch and Ray maps at most, beside Ray's object store; most of them it never uses."""


@dataclass(frozen=True)
class Limits:
    """What this process and its children may use."""

    cpus: float
    cpu_limit: str
    """What limits the CPUs, such as `a quota of 1.5 CPUs`; empty if it is their number."""
    memory: Memory


def find_limits(root: Path = Path("/")) -> Limits:
    """Return the limits of this process.

    Args:
        root: Where `proc` and `sys` are.
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quotas = [quota for folder in _groups(root, "cpu") if (quota := _cpu_quota(folder))]
    quota = min(quotas, default=cpus)
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _groups(root, "memory"):
        limit = _memory_limit(folder)
        total, free = min(total, limit), min(free, max(0, limit - _used_memory(folder)))
    own = psutil.Process().memory_info()
    free += max(0, own.rss - getattr(own, "shared", 0))
    memory = Memory(total, free, "the container" if total < machine.total else "this machine")
    return Limits(min(cpus, quota), f"a quota of {quota:.2g} CPUs" if quota < cpus else "", memory)


def largest_object_store() -> int:
    """Return how many bytes Ray's object store may have by the limits of the shell: a file that each process maps.

    Raises:
        InputError: They leave too few for it; torch or Ray would crash.
    """
    largest = UNLIMITED
    for kind, option, what, taken in (
        (resource.RLIMIT_AS, "v", "virtual memory", ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, "f", "the size of a file", 2**20),  # Ray's file is a little larger than its store
    ):
        limit = resource.getrlimit(kind)[0]
        if limit == resource.RLIM_INFINITY:
            continue
        largest = min(largest, limit - taken)
        if largest < SMALLEST_OBJECT_STORE:
            needed = f"torch and Ray need {(taken + SMALLEST_OBJECT_STORE) / 2**20:,.0f} MiB"
            hint = f"lift it with  ulimit -{option} unlimited  or, of a batch job, where it is submitted"
            raise InputError(f"the shell limits {what} to {limit / 2**20:,.0f} MiB, but {needed}; {hint}")
    return largest


def check_thread_limit(trials: int, root: Path = Path("/")) -> None:
    """Check that processes and threads may be started as Ray does; it would hang without a word.

    Args:
        trials: That run at once.
        root: Where `proc` and `sys` are.

    Raises:
        InputError: The shell, a container or a batch job allows too few.
    """
    needed = RAY_THREADS + TRIAL_THREADS * trials
    for room, limit, what, hint in _thread_limits(root):
        if room < needed:
            used = f"{limit:,}, of which {limit - room:,} are in use"
            wanted = f"Ray with {count(trials, 'trial')} at once needs about {needed:,}"
            raise InputError(f"{what} limits processes and threads to {used}, but {wanted}; {hint}")


def _thread_limits(root: Path) -> Iterator[tuple[int, int, str, str]]:
    """Yield each limit: how many threads are left, how many are allowed, what limits them, and how to lift it."""
    allowed = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if allowed != resource.RLIM_INFINITY and os.getuid() != 0:  # root may exceed it
        hint = "lift it with  ulimit -u unlimited  or, of a batch job, where it is submitted"
        yield allowed - _threads_of(os.getuid()), allowed, "the shell", hint
    for folder in _groups(root, "pids"):
        limit, used = (_text(folder / f"pids.{name}").strip() for name in ("max", "current"))
        if limit.isdecimal() and used.isdecimal():
            hint = "lift it with  --pids-limit  of docker or podman, or where the container or job is described"
            yield int(limit) - int(used), int(limit), "the container", hint


def _threads_of(user: int) -> int:
    """Return how many threads the processes of a user have."""
    processes = psutil.process_iter(["uids", "num_threads"])
    return sum(
        each.info["num_threads"] or 0 for each in processes if each.info["uids"] and each.info["uids"].real == user
    )


def out_of_memory_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed for want of memory, in this control group or on this machine."""
    for folder in _groups(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            if "oom_kill" in (fields := _fields(folder / name)):
                return fields["oom_kill"]
    return _fields(root / "proc" / "vmstat").get("oom_kill", 0)


def _groups(root: Path, resource: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups for a resource, from its own up to the root."""
    lines = [line.split(":", 2) for line in _text(root / "proc" / "self" / "cgroup").splitlines()]
    paths = {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}  # "" for version 2
    for line in _text(root / "proc" / "self" / "mountinfo").splitlines():
        fields, _, system = line.partition(" - ")
        kind, _, options = [*system.split(), "", "", ""][:3]
        key = {"cgroup2": "", "cgroup": resource}.get(kind)
        if key is None or key not in paths or (key and key not in options.split(",")):
            continue
        top, mount_point = fields.split()[3:5]
        yield from _upwards(root / mount_point.lstrip("/"), Path(paths[key]), Path(top))


def _upwards(mount_point: Path, group: Path, top: Path) -> Iterator[Path]:
    """Yield the folders of a control group and of those around it; `top` is the one that is mounted."""
    inside = group.relative_to(top) if group.is_relative_to(top) else Path()  # else a container that sees only its own
    for part in (inside, *inside.parents):
        if ".." not in part.parts:
            yield mount_point / part


def _cpu_quota(folder: Path) -> float | None:
    """Return the CPUs that a control group may use; None if it has no quota."""
    numbers = _text(folder / "cpu.max").split() or [
        _text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        return None
    return int(numbers[0]) / int(numbers[1])


def _memory_limit(folder: Path) -> int:
    texts = [_text(folder / name).strip() for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text.isdecimal()]
    return min((limit for limit in limits if limit), default=UNLIMITED)


def _used_memory(folder: Path) -> int:
    """Return the bytes in use that the kernel can't simply drop: all but what has been read from files."""
    used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
    statistics = _fields(folder / "memory.stat")
    files = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    files += statistics.get("total_active_file", statistics.get("active_file", 0))
    return max(0, int(used) - files) if used.strip().isdecimal() else 0


def _fields(file: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    pairs = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _text(file: Path) -> str:
    """Return the text of a file; "" if it can't be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
