"""Does a grid survive failures? Injects a seeded schedule of them and compares the results with an undisturbed run.

    python -m benchmarks.chaos --kills 20 --seed 1     # 8 minutes on two cores
    python -m benchmarks.chaos --servers               # on PostgreSQL and an S3 API

Everything is real: drivers, Ray, an MLflow server on sqlite or PostgreSQL, SIGKILL. The grid is repeated, each time as
a new experiment, until every failure has been injected; then each value in the store is compared with the one that the
undisturbed run recorded. Needs Linux; the failure `spool disk full` needs root, to mount a small disk, and is left out
without it.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos import recording
from benchmarks.chaos.audit import Audit, audit
from benchmarks.chaos.backends import FILE_FAILURES, SERVER_FAILURES, Backend, start_backend
from benchmarks.chaos.drivers import DRIVER_FAILURES
from benchmarks.chaos.infrastructure import stop_worker
from benchmarks.servers import postgres
from benchmarks.servers.local import free_port, kill_tree, wait_until
from benchmarks.servers.mlflow_server import start_mlflow
from grid.arguments import Parser
from grid.wording import count

GRID = ["--grid", "smoke", "--only", "model=mlp", "--per-class", "60", "--epochs", "9", "--seeds", "2"]
PATIENCE_SECONDS = 300.0
"""A driver that takes longer counts as hanging and is killed."""
MAX_STARTS = 50
"""A grid that needs more drivers than this counts as lost."""
ROOT = Path(__file__).parents[2]
"""Of the project, whose drivers import `benchmarks`."""
SPOOL_BYTES = 4 * 2**20
"""Size of the disk that the spool is on."""


@dataclass
class Arena:
    """An MLflow server and a driver in a folder of their own, and the means to kill them."""

    folder: Path
    rng: random.Random
    port: int
    grid: list[str]
    backend: Backend
    server: subprocess.Popen[bytes] | None = None
    driver: subprocess.Popen[bytes] | None = None
    starts: int = 0
    """Number of drivers started so far."""
    experiment: str = ""
    """That the driver runs."""
    two_drivers: int = 0
    """How often a second driver trained, or a driver went on that had been replaced."""
    notes: Counter[str] = field(default_factory=Counter)
    """What is printed below the table, with how often it happened."""

    @property
    def uri(self) -> str:
        """URI of the MLflow server."""
        return f"http://127.0.0.1:{self.port}"

    def start_server(self) -> None:
        """Start the MLflow server and wait until it answers."""
        backend = self.backend
        self.server = start_mlflow(self.folder, self.port, backend.database, backend.artifacts, backend.environment)

    def stop_server(self) -> None:
        """SIGKILL the server and all its children."""
        kill_tree(self.server)

    def start_driver(self, experiment: str) -> None:
        """Start or continue the grid, and wait until trials run."""
        self.starts += 1
        self.experiment = experiment
        self.driver = self._spawn(
            [sys.executable, "-m", recording.__name__, *self.options], f"driver-{self.starts}.log"
        )
        wait_until(lambda: self.ended() or "left to run" in self.log, PATIENCE_SECONDS)

    @property
    def options(self) -> list[str]:
        """Of `grid.run`, as the driver is given them."""
        place = ["--store", self.uri, "--experiment", self.experiment, "--data-dir", str(self.folder / "data")]
        return [*self.grid, *place, "--storage", self.backend.storage, "--no-report"]

    @property
    def log(self) -> str:
        """What the driver has printed."""
        return (self.folder / f"driver-{self.starts}.log").read_text(errors="replace")

    def is_driving(self) -> bool:
        """Return whether the driver still works: it gives its lease up once it has printed its table."""
        return not self.ended() and "cells shown" not in self.log

    def ended(self) -> bool:
        """Return whether the driver has ended."""
        return self.driver is not None and self.driver.poll() is not None

    def wait_for_driver(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Return the exit code of the driver, which is killed if it does not end in time."""
        assert self.driver is not None
        try:
            return self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            self.notes["hanging drivers killed"] += 1
            kill_tree(self.driver)
            return self.driver.wait()

    def children(self, *names: str) -> list[psutil.Process]:
        """Return the driver's descendants whose name contains one of `names`."""
        assert self.driver is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(self.driver.pid).children(recursive=True)
            return [process for process in descendants if any(name in _name(process) for name in names)]
        return []

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, **self.backend.environment, "PYTHONPATH": path},
            )


def kill_driver(arena: Arena) -> None:
    """SIGKILL the driver; its Ray processes notice and exit."""
    assert arena.driver is not None
    arena.driver.kill()
    arena.driver.wait()


def kill_worker(arena: Arena) -> None:
    """SIGKILL one process that trains."""
    for worker in arena.children("TrialWorker", "ResourceTrainable")[:1]:
        worker.kill()


def kill_ray(arena: Arena) -> None:
    """SIGKILL every Ray process under the driver, then wait until the driver has noticed and ended."""
    for process in arena.children("gcs_server", "raylet", "ray::"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    arena.wait_for_driver()


def restart_server(arena: Arena) -> None:
    """SIGKILL the MLflow server and start it again after 2 to 10 s."""
    arena.stop_server()
    time.sleep(arena.rng.uniform(2, 10))
    arena.start_server()


def fill_disk(arena: Arena) -> None:
    """Fill the disk that the spool is on until the driver gives up, then free it."""
    filler = arena.folder / "spool" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    arena.wait_for_driver()
    filler.unlink()


FAILURES: dict[str, Callable[[Arena], None]] = {
    "driver killed": kill_driver,
    "worker killed": kill_worker,
    "worker stopped": stop_worker,
    "Ray killed": kill_ray,
    "server killed": restart_server,
    "spool disk full": fill_disk,
    "client broken": recording.break_client,
    "reports refused": recording.refuse_reports,
    **DRIVER_FAILURES,
    **FILE_FAILURES,
    **SERVER_FAILURES,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Inject the failures, print the table, and return 0 if every grid survived with nothing wrong."""
    parser = Parser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="failures to inject (20)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the schedule (1)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="replicates per cell, 16 trials each (2)")
    parser.add_argument(
        "--servers", action="store_true", help="on PostgreSQL (Debian: postgresql) and an S3 API instead of files"
    )
    parser.add_argument(
        "--failure", action="append", choices=list(FAILURES), help="inject only this kind; may be repeated"
    )
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)  # noqa: S311  (a schedule)
    grid = [*GRID[:-1], str(options.seeds)]
    elsewhere = FILE_FAILURES if options.servers else SERVER_FAILURES
    if wrong := [kind for kind in options.failure or () if kind in elsewhere]:
        parser.error(f"--failure '{wrong[0]}' is one of {'files' if options.servers else '--servers'} only")
    if options.servers and (lacking := postgres.missing()):
        parser.error(f"--servers {lacking}")
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as name,
        small_disk(Path(name) / "spool") as is_small,
        start_backend(Path(name), servers=options.servers) as backend,
    ):
        left_out = set(elsewhere) if is_small else {*elsewhere, "spool disk full"}
        kinds = [kind for kind in options.failure or FAILURES if kind not in left_out]
        schedule = draw_schedule(options.kills, rng, kinds)
        arena = Arena(Path(name), rng, free_port(), grid, backend)
        arena.start_server()
        try:
            arena.start_driver("undisturbed")
            if code := arena.wait_for_driver():
                parser.exit(1, f"the undisturbed run ended with exit code {code}:\n{arena.log}")
            survived, experiments = run_schedule(arena, schedule)
            result = audit(arena.uri, arena.folder, "undisturbed", experiments, backend.checkpoints())
            result.two_drivers = arena.two_drivers
        finally:
            kill_tree(arena.driver)
            arena.stop_server()
    print_table(schedule, survived, result, arena.notes)
    return 0 if result.clean and len(schedule) == survived.total() else 1


def draw_schedule(kills: int, rng: random.Random, kinds: Sequence[str]) -> list[str]:
    """Return the names of the failures in the order in which they are injected, every kind about equally often."""
    schedule: list[str] = []
    while len(schedule) < kills:
        schedule += rng.sample(kinds, len(kinds))
    return schedule[:kills]


def run_schedule(arena: Arena, schedule: list[str]) -> tuple[Counter[str], list[str]]:
    """Inject the failures in order.

    Returns:
        How many failures of each kind were survived, and the names of the disturbed experiments.

    Raises:
        RuntimeError: A grid did not end within `MAX_STARTS` drivers.
    """
    survived: Counter[str] = Counter()
    waiting = list(schedule)
    experiments: list[str] = []
    while waiting:
        experiments.append(f"disturbed-{len(experiments) + 1}")
        injected: list[str] = []
        starts, code = 0, 1
        while code != 0:
            if starts == MAX_STARTS:
                raise RuntimeError(f"{experiments[-1]} did not end within {starts} drivers")
            arena.start_driver(experiments[-1])
            injected += inject(arena, waiting)
            code = arena.wait_for_driver()
            starts += 1
        survived.update(injected)
    return survived, experiments


def inject(arena: Arena, waiting: list[str]) -> list[str]:
    """Inject one failure after another until the driver has ended; remove them from `waiting` and return them."""
    injected = []
    while waiting:
        time.sleep(arena.rng.uniform(0.5, 5))
        if not arena.is_driving():
            break
        name = waiting.pop(0)
        print(f"{time.strftime('%X')}  {name}, {len(waiting)} to come", file=sys.stderr, flush=True)
        FAILURES[name](arena)
        injected.append(name)
    return injected


def print_table(schedule: list[str], survived: Counter[str], result: Audit, notes: Counter[str]) -> None:
    """Print how many failures were injected and survived, and what the audit found."""
    print(f"{'failure':<22} {'injected':>8} {'survived':>8}")
    for name, injected in Counter(schedule).items():
        print(f"{name:<22} {injected:>8} {survived[name]:>8}")
    print(f"{count(len(schedule), 'failure')} injected, {survived.total()} survived")
    print(f"{count(result.experiments, 'grid')} of {result.trials} trials, {result.values:,} values compared")
    print(result.summary)
    for note, times in notes.items():
        print(f"{note}: {times}")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of `SPOOL_BYTES` at `folder`; yield whether that worked (if not, it is a plain folder)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SPOOL_BYTES}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.name()
    return ""


if __name__ == "__main__":
    sys.exit(main())
