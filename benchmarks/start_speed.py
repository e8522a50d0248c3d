"""What does each touch of Ray's private parts save? Times a tiny grid from start to exit, without each touch in turn.

    python -m benchmarks.start_speed                                   # every touch, 5 repeats: half an hour
    python -m benchmarks.start_speed --without poll,preload --repeats 9

In every repeat, each contender runs next to a grid with all touches of `grid.tune.private_ray` on,
so that other load on the machine slows down both; a saving is the median of the differences within these pairs.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from grid.arguments import Parser, positive, run_command
from grid.config import InputError
from grid.data.glyphs import render_if_missing
from grid.tune.private_ray import SWITCH, TOUCHES

GRID = ("--grid=smoke", "--only=model=mlp", "--only=lr_schedule=constant", "--only=dropout=off", "--per-class=10")
ONCE = ("--epochs=1", "--address=local")
PLAIN = "1"
"""The value of the switch that turns all touches off."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 if an argument is wrong."""
    parser = Parser(prog="python -m benchmarks.start_speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="grids per contender (5)")
    parser.add_argument("--without", metavar="TOUCH[,TOUCH]", help=f"{', '.join(TOUCHES)} (each, and all at once)")
    options = parser.parse_args(arguments)

    def run() -> int:
        print(report(measure(switches(options.without), options.repeats)))
        return 0

    return run_command(parser.name, run)


def switches(without: str | None) -> dict[str, str]:
    """Return the value of the switch for each contender, by its name in the table.

    Raises:
        InputError: A touch is not known.
    """
    if without is None:
        return {"all": PLAIN, **{touch: touch for touch in TOUCHES}}
    for touch in without.split(","):
        if touch not in TOUCHES:
            raise InputError(f"unknown touch '{touch}'; choose from {', '.join(TOUCHES)}")
    return {touch: touch for touch in without.split(",")}


def measure(contenders: Mapping[str, str], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of a grid without a touch and with all of them, in pairs, for each contender."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="start-speed-") as folder:
        render_if_missing(Path(folder))
        run_grid(Path(folder), "")  # reads the libraries into memory
        for repeat in range(repeats):
            for name, switched_off in contenders.items():
                order = (switched_off, "") if repeat % 2 else ("", switched_off)
                seconds = {value: run_grid(Path(folder), value) for value in order}
                pairs[name].append((seconds[switched_off], seconds[""]))
                slow, fast = pairs[name][-1]
                note = f"repeat {repeat + 1}: {slow:.2f} s without {name}, {fast:.2f} s with"
                print(note, file=sys.stderr, flush=True)
    return pairs


def run_grid(data_dir: Path, switched_off: str) -> float:
    """Return the seconds of a tiny grid from start to exit."""
    with tempfile.TemporaryDirectory(prefix="start-speed-") as folder:
        command = [sys.executable, "-m", "grid.run", *GRID, *ONCE, "--no-report", f"--data-dir={data_dir}"]
        start = time.monotonic()
        subprocess.run(command, cwd=folder, env=os.environ | {SWITCH: switched_off}, check=True, capture_output=True)
        return time.monotonic() - start


def report(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return the table: seconds without a touch and what the touch saves, each as median and range."""
    lines = [f"{'without':<12}  {'seconds':>7}  {'range':>13}  {'saves':>6}  {'range':>15}"]
    with_all = [fast for seconds in pairs.values() for _, fast in seconds]
    lines.append(f"{'none':<12}  {_summary(with_all, 13)}")
    for name, seconds in pairs.items():
        saved = [slow - fast for slow, fast in seconds]
        lines.append(f"{name:<12}  {_summary([slow for slow, _ in seconds], 13)}  {_summary(saved, 15, 6)}")
    return "\n".join(lines)


def _summary(values: Sequence[float], range_width: int, width: int = 7) -> str:
    spread = f"{min(values):.2f} to {max(values):.2f}"
    return f"{median(values):>{width}.2f}  {spread:>{range_width}}"


if __name__ == "__main__":
    sys.exit(main())
