"""Does a grid survive failures? Injects a seeded schedule of them and compares the results with an undisturbed run.

    python -m benchmarks.chaos --kills 20 --seed 1     # 8 minutes on two cores
    python -m benchmarks.chaos --servers               # on PostgreSQL and an S3 API

Everything is real: drivers, Ray, an MLflow server on sqlite or PostgreSQL, SIGKILL. The grid is repeated, each time as
a new experiment, until every failure has been injected; then each value in the store is compared with the one that the
undisturbed run recorded. Needs Linux; the failure `spool disk full` needs root, to mount a small disk, and is left out
without it.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.chaos import infrastructure
from benchmarks.chaos.arena import Arena
from benchmarks.chaos.audit import Audit, audit
from benchmarks.chaos.backends import start_backend
from benchmarks.chaos.drivers import DRIVER_FAILURES, kill_driver
from benchmarks.chaos.infrastructure import FILE_FAILURES, SERVER_FAILURES, small_disk
from benchmarks.servers import postgres
from benchmarks.servers.local import free_port, kill_tree
from grid.arguments import Parser, positive, run_command
from grid.config import InputError
from grid.wording import count

GRID = ["--grid", "smoke", "--only", "model=mlp", "--per-class", "60", "--epochs", "9", "--seeds", "2"]
MAX_STARTS = 50
"""A grid that needs more drivers than this counts as lost."""
FAILURES = {
    "driver killed": kill_driver,
    **infrastructure.FAILURES,
    **DRIVER_FAILURES,
    **FILE_FAILURES,
    **SERVER_FAILURES,
}
"""Name -> what injects it; their order decides which schedule a seed draws."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Inject the failures, print the table, and return 0 if every grid survived with nothing wrong."""
    parser = Parser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=positive, default=20, metavar="N", help="failures to inject (20)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the schedule (1)")
    parser.add_argument("--seeds", type=positive, default=2, metavar="N", help="replicates per cell (2)")
    parser.add_argument(
        "--servers", action="store_true", help="on PostgreSQL (Debian: postgresql) and an S3 API instead of files"
    )
    parser.add_argument(
        "--failure", action="append", choices=list(FAILURES), help="inject only this kind; may be repeated"
    )
    options = parser.parse_args(arguments)
    if wrong := [kind for kind in options.failure or () if kind in _elsewhere(options)]:
        parser.error(f"--failure '{wrong[0]}' is one of {'files' if options.servers else '--servers'} only")
    if options.servers and (lacking := postgres.missing()):
        parser.error(f"--servers {lacking}")
    return run_command(parser.name, lambda: _inject_all(options))


def _elsewhere(options: argparse.Namespace) -> dict[str, Callable[[Arena], None]]:
    return FILE_FAILURES if options.servers else SERVER_FAILURES


def _inject_all(options: argparse.Namespace) -> int:
    rng = random.Random(options.seed)  # noqa: S311  (a schedule)
    grid = [*GRID[:-1], str(options.seeds)]
    elsewhere = _elsewhere(options)
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
                raise InputError(f"the undisturbed run ended with exit code {code}:\n{arena.log}")
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


if __name__ == "__main__":
    sys.exit(main())
