"""Limits of CPUs and memory: as the kernel writes them, in folders made for the test, and real ones where root may."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from grid.config import InputError
from grid.plan.memory import BYTES_PER_TRIAL, DRIVER_BYTES, Memory
from grid.plan.packing import Packing, pack
from grid.tune.connection import _object_store_memory
from grid.tune.limits import (
    ADDRESS_SPACE,
    RAY_THREADS,
    TRIAL_THREADS,
    UNLIMITED,
    check_thread_limit,
    find_limits,
    largest_object_store,
    out_of_memory_kills,
)
from tests.waiting import without_waiting

MIB = 2**20
GIB = 2**30
CPUS = len(os.sched_getaffinity(0))
MACHINE = psutil.virtual_memory().total


def system(root: Path, mounts: dict[str, str], groups: str, files: dict[str, str]) -> Path:
    """Make a `/proc` and a `/sys` under `root`: what is mounted where, the process's groups, and their files."""
    lines = [
        f"30 20 0:{at} {top_and_place} rw shared:1 - {kind}" for at, (top_and_place, kind) in enumerate(mounts.items())
    ]
    texts = {"proc/self/mountinfo": "\n".join(lines), "proc/self/cgroup": groups}
    for name, text in {**texts, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V2 = {"/ /sys/fs/cgroup": "cgroup2 cgroup2 rw"}
V1 = {
    "/ /sys/fs/cgroup/cpu,cpuacct": "cgroup cgroup rw,cpu,cpuacct",
    "/ /sys/fs/cgroup/memory": "cgroup cgroup rw,memory",
}


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    limits = find_limits(system(tmp_path, {}, "", {}))
    assert (limits.cpus, limits.cpu_limit) == (CPUS, "")
    assert (limits.memory.total, limits.memory.place) == (MACHINE, "this machine")


@pytest.mark.parametrize(
    ("mounts", "groups", "files"),
    [
        (V2, "0::/", {"cpu.max": "50000 100000", "memory.max": f"{GIB}", "memory.current": "0"}),  # docker
        (V2, "0::/", {"cpu.max": "25000 50000", "memory.max": f"{2 * GIB}", "memory.high": f"{GIB}"}),
        (
            V2,
            "0::/a/b",
            {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": f"{GIB}"},
        ),  # systemd
        (V2, "0::/a/b", {"a/cpu.max": "max 100000", "a/b/cpu.max": "50000 100000", "a/b/memory.max": f"{GIB}"}),
        ({"/a /sys/fs/cgroup": "cgroup2 cgroup2 rw"}, "0::/a", {"cpu.max": "50000 100000", "memory.max": f"{GIB}"}),
        ({"/a /sys/fs/cgroup": "cgroup2 cgroup2 rw"}, "0::/../x", {"cpu.max": "50000 100000", "memory.max": f"{GIB}"}),
        (
            V1,
            "4:memory:/job\n3:cpu,cpuacct:/job/step",  # Slurm
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/job/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/job/step/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": f"{2**63 - 4096}",
                "memory/job/memory.limit_in_bytes": f"{GIB}",
            },
        ),
        (
            V1 | {"/ /sys/fs/cgroup/unified": "cgroup2 cgroup2 rw"},
            "4:memory:/\n3:cpu,cpuacct:/\n0::/",  # both versions at once
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": f"{GIB}",
            },
        ),
    ],
)
def test_the_smallest_limit_on_the_way_to_the_root_counts(
    mounts: dict[str, str], groups: str, files: dict[str, str], tmp_path: Path
) -> None:
    limits = find_limits(system(tmp_path, mounts, groups, files))
    assert (limits.cpus, limits.cpu_limit) == (0.5, "a quota of 0.5 CPUs")
    assert (limits.memory.total, limits.memory.place) == (GIB, "the container")


@pytest.mark.parametrize("text", ["max", "max 100000", "-1", "", "nonsense", "0 0", f"{2**63 - 4096}"])
def test_what_is_no_limit_does_not_limit(text: str, tmp_path: Path) -> None:
    files = dict.fromkeys(("cpu.max", "memory.max", "memory.limit_in_bytes", "cpu.cfs_quota_us"), text)
    limits = find_limits(system(tmp_path, V2, "0::/", files))
    assert (limits.cpus, limits.memory.total) == (CPUS, MACHINE)


@pytest.mark.parametrize(
    ("usage", "statistics"),
    [
        ("memory.current", "anon 5\ninactive_file {files}\nactive_file 0"),
        ("memory.usage_in_bytes", "total_inactive_file {files}"),
    ],
)
def test_memory_that_holds_files_is_free(usage: str, statistics: str, tmp_path: Path) -> None:
    files = {"memory.max": f"{GIB}", "memory.limit_in_bytes": f"{GIB}", usage: f"{700 * MIB}"}
    full = find_limits(system(tmp_path, V2, "0::/", files)).memory.free
    files["memory.stat"] = statistics.format(files=500 * MIB)
    free = find_limits(system(tmp_path, V2, "0::/", files)).memory.free
    assert free - full == pytest.approx(500 * MIB, abs=20 * MIB)  # this process grows a bit


def test_kills_are_counted_where_the_process_runs(tmp_path: Path) -> None:
    root = system(tmp_path, V2, "0::/a", {"a/memory.events": "low 0\noom 4\noom_kill 3", "memory.events": "oom_kill 9"})
    assert out_of_memory_kills(root) == 3
    (root / "proc" / "vmstat").write_text("pgfault 7\noom_kill 2\n")
    (root / "proc" / "self" / "cgroup").write_text("")
    assert out_of_memory_kills(root) == 2


@pytest.mark.parametrize(
    ("memory", "expected", "reason"),
    [
        (Memory(64 * GIB, 60 * GIB), 8, "one per CPU"),
        (Memory(4 * GIB, 4 * GIB, "the container"), 4, "limited by memory: 4.0 GiB of the container"),
        (Memory(64 * GIB, 4 * GIB), 4, "limited by memory: 4.0 GiB free of 64.0 GiB of this machine"),
        (Memory(DRIVER_BYTES + BYTES_PER_TRIAL, 64 * GIB), 1, "limited by memory: 1.6 GiB of this machine"),
    ],
)
def test_memory_limits_how_many_run_at_once_and_is_named(memory: Memory, expected: int, reason: str) -> None:
    packing = pack(8, 0, 0, memory=memory)
    assert packing == Packing(expected, 1.0, 0.0)
    assert packing.reason == reason


def test_a_quota_is_named() -> None:
    assert pack(1.5, 0, 0, cpu_limit="a quota of 1.5 CPUs").reason == "one per CPU: a quota of 1.5 CPUs"


def test_memory_limits_the_trials_on_gpus() -> None:
    packing = pack(64, 2, 80 * GIB, memory=Memory(5 * GIB, 5 * GIB))
    assert packing == Packing(6, 1.0, 1 / 3)
    assert packing.reason == "3 per GPU, limited by memory: 5.0 GiB of this machine"


@pytest.mark.parametrize(
    ("memory", "concurrency", "message"),
    [
        (
            Memory(1300 * MIB, 1300 * MIB, "the container"),
            None,
            "one trial needs 1.6 GiB of memory, this command and Ray included, but there is only 1.3 GiB of the "
            "container; give it more, or pass --concurrency 1 to try nevertheless",
        ),
        (
            Memory(16 * GIB, GIB),
            None,
            "one trial needs 1.6 GiB of memory, this command and Ray included, but there is only 1.0 GiB free of "
            "16.0 GiB of this machine; free some, or pass --concurrency 1 to try nevertheless",
        ),
        (
            Memory(3 * GIB, GIB),
            4,
            "4 trials at once need 3.6 GiB of memory, and this machine has 3.0 GiB; pass --concurrency 3",
        ),
        (
            Memory(GIB, GIB),
            2,
            "2 trials at once need 2.2 GiB of memory, and this machine has 1.0 GiB; pass --concurrency 1",
        ),
    ],
)
def test_too_little_memory_is_one_line_with_what_is_needed(
    memory: Memory, concurrency: int | None, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        pack(8, 0, 0, concurrency, memory=memory)
    assert str(caught.value) == message


def test_the_user_may_try_one_trial_and_rely_on_memory_that_others_hold() -> None:
    assert pack(8, 0, 0, 1, memory=Memory(GIB, GIB)).concurrency == 1
    assert pack(8, 0, 0, 3, memory=Memory(16 * GIB, GIB)).concurrency == 3


@contextmanager
def control_groups(memory: int, cpus: float | None = None) -> Iterator[list[str]]:
    """Make real control groups with limits, of either version, and provide the files that a process joins them by."""
    versions: list[dict[str, dict[str, str]]] = [
        {
            "memory": {"memory.limit_in_bytes": f"{memory}"},
            "cpu": {"cpu.cfs_quota_us": f"{int(100_000 * (cpus or 0))}"},
        },
        {"": {"memory.max": f"{memory}", "cpu.max": f"{int(100_000 * (cpus or 0))} 100000"}},
    ]
    for version in versions:
        with ExitStack() as stack:
            joined = []
            try:
                for parent, limits in version.items():
                    group = Path("/sys/fs/cgroup", parent, f"test-{uuid4().hex}")
                    group.mkdir()
                    stack.callback(group.rmdir)
                    for name, value in limits.items():
                        if cpus is not None or not name.startswith("cpu"):
                            (group / name).write_text(value)
                    joined.append(str(group / "cgroup.procs"))
            except OSError:
                continue
            yield joined
            return
    pytest.skip("needs root and control groups that may be written")


JOIN = "import sys; [open(path, 'w').write('0') for path in sys.argv[1:]]; "
"""Joins control groups."""


def test_a_real_control_group_is_seen() -> None:
    script = JOIN + "from grid.tune.limits import find_limits; print(find_limits())"
    with control_groups(1300 * MIB, 0.5) as groups:
        command = [sys.executable, "-c", script, *groups]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "Limits(cpus=0.5, cpu_limit='a quota of 0.5 CPUs'" in done.stdout
    assert f"Memory(total={1300 * MIB}, " in done.stdout
    assert "place='the container'" in done.stdout


def test_a_grid_in_a_container_that_is_too_small_says_so_in_one_line(tmp_path: Path) -> None:
    script = JOIN + "from grid.run import main; "
    script += "sys.exit(main(['--grid', 'smoke', '--address', 'local', '--no-report']))"
    with control_groups(1300 * MIB) as groups:
        command = [sys.executable, "-c", script, *groups]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "one trial needs 1.6 GiB of memory" in line
    assert "1.3 GiB of the container" in line


@pytest.mark.slow
def test_a_grid_in_a_container_of_half_a_cpu_runs_one_trial_at_once_and_finishes(
    glyphs_dir: Path, tmp_path: Path
) -> None:
    held = "'--only', 'model=mlp', '--only', 'activation=relu', '--only', 'dropout=off', '--only', 'batch_norm=off'"
    script = JOIN + f"from grid.run import main; sys.exit(main(['--grid', 'smoke', '--address', 'local', {held}, "
    script += f"'--per-class', '10', '--epochs', '1', '--no-report', '--data-dir', {str(glyphs_dir)!r}]))"
    with control_groups(3 * GIB, 0.5) as groups:
        command = [sys.executable, "-c", script, *groups]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1200)
    assert (done.returncode, without_waiting(done.stderr)) == (0, "")
    assert "1 at once, 0.5 CPU each (one per CPU: a quota of 0.5 CPUs)" in done.stdout
    assert "\n2/2 done" in done.stdout


@pytest.mark.parametrize(
    ("kind", "limit", "said"),
    [
        ("RLIMIT_AS", 4 * GIB, "virtual memory to 4,096 MiB, but torch and Ray need 8,272 MiB; .* ulimit -v unlimited"),
        ("RLIMIT_FSIZE", 2 * MIB, "the size of a file to 2 MiB, but torch and Ray need 81 MiB; .* ulimit -f unlimited"),
    ],
)
@pytest.mark.parametrize("command", ["grid.run", "grid.confirm"])
def test_a_limit_of_the_shell_that_is_too_small_is_named(
    command: str, kind: str, limit: int, said: str, store_uri: str
) -> None:
    code = f"import resource, runpy; resource.setrlimit(resource.{kind}, ({limit}, {limit})); "
    code += f"runpy.run_module('{command}', run_name='__main__')"
    arguments = ["--experiment=x", f"--store={store_uri}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"{command}: the shell limits {said}.*\n", done.stderr), done.stderr


@pytest.mark.parametrize(("kind", "room"), [("RLIMIT_AS", GIB), ("RLIMIT_FSIZE", GIB)])
def test_a_limit_of_the_shell_makes_the_object_store_smaller(
    kind: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_object_store() == UNLIMITED
    found = getattr(resource, kind)
    limit = room + (ADDRESS_SPACE if kind == "RLIMIT_AS" else MIB)
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (limit if asked == found else -1, -1))
    assert largest_object_store() == room
    assert _object_store_memory() == room


@pytest.mark.parametrize(
    ("mounts", "groups", "folder"),
    [
        (V2, "0::/", ""),
        (V2, "0::/a/b", "a/"),
        ({"/ /sys/fs/cgroup/pids": "cgroup cgroup rw,pids"}, "5:pids:/", "pids/"),
    ],
)
def test_a_container_that_allows_too_few_threads_is_named(
    mounts: dict[str, str], groups: str, folder: str, tmp_path: Path
) -> None:
    needed = RAY_THREADS + 2 * TRIAL_THREADS
    root = system(tmp_path, mounts, groups, {f"{folder}pids.max": f"{needed + 9}", f"{folder}pids.current": "10"})
    check_thread_limit(1, root)
    with pytest.raises(InputError, match=rf"^the container limits processes and threads to {needed + 9}, of which 10 "):
        check_thread_limit(2, root)


@pytest.mark.parametrize("limit", ["max", "", "many"])
def test_a_container_without_a_limit_of_threads_is_none(limit: str, tmp_path: Path) -> None:
    check_thread_limit(100, system(tmp_path, V2, "0::/", {"pids.max": limit, "pids.current": "10"}))


NOBODY = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="changing the user needs root, whom the limit does not bind")
def test_a_shell_that_allows_too_few_threads_is_named() -> None:
    """As an ordinary user, since root may have any number."""
    code = (
        "import os, resource\nfrom grid.config import InputError\nfrom grid.tune.limits import check_thread_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NPROC, (150, 150)); os.setuid({NOBODY})\n"
        "try:\n    check_thread_limit(2)\nexcept InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=900)
    assert re.fullmatch(
        r"the shell limits processes and threads to 150, of which \d+ are in use, but Ray with 2 trials at once needs "
        r"about 300; lift it with  ulimit -u unlimited .*\n",
        done.stdout,
    ), done.stdout + done.stderr
