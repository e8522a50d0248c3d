"""Do the statistics find what was planted? Simulates grids with known effects and analyses them.

    python -m benchmarks.planted --grids 1000     # 10 minutes on one core; --jobs 2 for two

Prints how often the intervals of `analysis` cover the truth, and how far off other ways to estimate the effects are.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from benchmarks.planted.coverage import examine, format_summary, summarise
from benchmarks.planted.grids import COUNTS, EPOCHS, RUNGS
from benchmarks.processes import run_all
from grid.arguments import Parser, positive, run_command


def run(grids: int, seed: int, jobs: int) -> pd.DataFrame:
    """Simulate and analyse grids in `jobs` processes; return the summary."""
    return summarise(run_all(partial(examine, seed=seed), range(grids), jobs, "grids"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and analyse grids, print the summary, and return the exit code."""
    parser = Parser(prog="python -m benchmarks.planted", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grids", type=positive, default=1000, metavar="N", help="grids to simulate (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the simulation (0)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (1)")
    options = parser.parse_args(arguments)

    def report() -> int:
        begun = time.monotonic()
        summary = run(options.grids, options.seed, options.jobs)
        grids = f"{options.grids:,} grids of {int(np.prod(COUNTS))} cells"
        print(f"{grids}, 1 or 2 seeds, {EPOCHS} epochs, rungs {RUNGS}, seed {options.seed}")
        print(format_summary(summary))
        print(f"{time.monotonic() - begun:.0f} s")
        return 0

    return run_command(parser.name, report)


if __name__ == "__main__":
    sys.exit(main())
