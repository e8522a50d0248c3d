"""Is the verdict true? Replays the grid on real curves a thousand times, and compares every answer with the truth.

    python -m benchmarks.replay --only default --draws 1000 --jobs 2    # 20 minutes on two cores
    python -m benchmarks.replay --draws 200 --jobs 2                    # all tables: an hour

A draw takes a random order of arrival and random controls, and stops the trials by the grid's own ASHA. The curves are
those of `curves.csv`: the full grid on real images, never stopped, so what stopping hides is known.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.processes import run_all
from benchmarks.replay.curves import EPOCHS, PATH, describe, load_curves
from benchmarks.replay.examine import DRAWS, IMPORTANCE, RULES, SETTINGS, Setting, examine
from benchmarks.replay.importance import HINT, missing_packages
from benchmarks.replay.summary import format_draws, format_estimators, format_importances, format_rules
from grid.arguments import Parser, positive, run_command

FORMATS: Mapping[str, Callable[[pd.DataFrame], str]] = {
    "default": format_estimators,
    "shares": format_estimators,
    "rules": partial(format_rules, labels=RULES),
    "draws": partial(format_draws, labels=[setting.label for setting in DRAWS]),
    IMPORTANCE: format_importances,
}
"""Table -> what prints it."""


def run(curves: Path, settings: Sequence[Setting], draws: int, seed: int, jobs: int) -> pd.DataFrame:
    """Replay every setting `draws` times, in `jobs` processes.

    Returns:
        A row per setting, draw and question; see `examine`.
    """
    tasks = [(setting, draw) for draw in range(draws) for setting in settings]
    found = run_all(partial(examine, curves=curves, seed=seed), tasks, jobs, "replays")
    return pd.concat(found, ignore_index=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, print the tables, and return the exit code."""
    parser = Parser(prog="python -m benchmarks.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=positive, default=1000, metavar="N", help="replays of each setting (1000)")
    parser.add_argument("--only", choices=tuple(SETTINGS), help="one of the tables")
    parser.add_argument("--curves", type=Path, default=PATH, metavar="FILE", help="table of curves (curves.csv)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (0)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (1)")
    options = parser.parse_args(arguments)

    def report() -> int:
        begun = time.monotonic()
        tables = [options.only] if options.only else [name for name in SETTINGS if name != "default"]
        chosen = dict.fromkeys(setting for table in tables for setting in SETTINGS[table])
        found = run(options.curves, list(chosen), options.draws, options.seed, options.jobs)
        curves = describe(load_curves(options.curves))
        print(f"{curves}; {EPOCHS} epochs, {options.draws:,} draws, seed {options.seed}\n")
        for table in tables:
            print(FORMATS[table](found), end="\n\n")
        if IMPORTANCE in tables and (missing := missing_packages()):
            print(f"Optuna's methods left out: {' and '.join(missing)} not installed; run:\n{HINT}\n")
        print(f"{time.monotonic() - begun:.0f} s")
        return 0

    return run_command(parser.name, report)


if __name__ == "__main__":
    sys.exit(main())
