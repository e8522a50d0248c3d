"""The command `python -m grid.check FILE.py`: tries the parts of a user on small trainings, before a grid is begun."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import grid
from grid.arguments import Parser, add_data_dir, add_debug, add_json, for_programs, run_command
from grid.config import InputError
from grid.data.catalogue import find_dataset
from grid.parts.files import PartsFile, load_files, loaded
from grid.parts.registry import GRIDS, ORIGINS
from grid.plan.space import cross, restrict
from grid.wording import count, last_line

if TYPE_CHECKING:
    from grid.train.conformance import Finding

ELSEWHERE = """
import json, sys
from grid.parts.files import PartsFile, load
from grid.config import InputError
try:
    load([PartsFile(**file) for file in json.load(sys.stdin)])
except InputError as error:
    sys.exit(str(error))
"""
"""What a worker does with parts files."""
EMNIST_SHAPE, EMNIST_CLASSES = (1, 28, 28), 47


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. 0: all parts are sound; 1: some are not; 2: the file can't be used."""
    parser = Parser(
        prog="python -m grid.check",
        description="Try the parts of a file on small trainings: shapes, finite losses, equal bits when repeated or\n"
        "resumed, no use of global random state, no weights shared by accident, and whether workers can use it.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.py", help="parts files, as for grid.run --parts")
    add_data_dir(parser)
    add_debug(parser)
    add_json(parser)
    options = parser.parse_args(arguments)

    def run() -> int:
        load_files(options.files)
        with for_programs(options.json) as answer:
            found = check(options.data_dir)
            faults = sum(finding.is_fault for finding in found)
            answer({"parts": sorted(ORIGINS), "faults": faults, "findings": [_describe(finding) for finding in found]})
        return 1 if faults else 0

    return run_command(parser.name, run, debug=options.debug)


def check(data_dir: Path) -> list["Finding"]:
    """Print what is wrong with the parts that are loaded, a line for each fault, and return what was found."""
    found = []
    for finding in _findings(data_dir):
        found.append(finding)
        print(f"{_place(finding.part)}: {'' if finding.is_fault else 'note: '}{finding.text}", flush=True)
    parts, faults = count(len(ORIGINS), "part"), sum(finding.is_fault for finding in found)
    print(f"{parts} checked: {count(faults, 'fault') if faults else 'all sound'}")
    return found


def _describe(finding: "Finding") -> dict[str, object]:
    return {"part": finding.part, "place": _place(finding.part), "is_fault": finding.is_fault, "text": finding.text}


def _findings(data_dir: Path) -> Iterator["Finding"]:
    conformance = import_module("grid.train.conformance")  # torch: seconds that a wrong argument need not wait
    import_module("torch").set_num_threads(1)  # as in a worker
    problem = _problem_elsewhere(loaded())
    if problem:
        yield conformance.Finding(next(iter(ORIGINS)), f"can't be used in another process: {problem}")
    image_shape, classes = EMNIST_SHAPE, EMNIST_CLASSES
    for part in sorted(ORIGINS, key=lambda part: not part.startswith("data ")):
        kind, _, name = part.partition(" ")
        try:
            if kind == "data":
                image_shape, classes = _look_at(name, data_dir)
            elif kind == "grid":
                _check_grid(name, data_dir)
            elif kind == "exclusion":
                cross(restrict(GRIDS["full"].levels, []))
            else:
                yield from conformance.examine(part, image_shape, classes)
        except InputError as error:
            yield conformance.Finding(part, str(error))


def _look_at(name: str, data_dir: Path) -> tuple[tuple[int, int, int], int]:
    """Return the image shape and the number of classes of a data set, after it was read twice."""
    data = import_module("grid.data.load")
    first, again = (data.load(name, data_dir.absolute()) for _ in range(2))
    if first.fingerprint != again.fingerprint:
        raise InputError("returns other images at a second call; draw from a generator with a seed of its own")
    data.load_test(name, data_dir.absolute(), first)
    return first.image_shape, len(first.classes)


def _check_grid(name: str, data_dir: Path) -> None:
    cross(restrict(GRIDS[name].levels, []))
    find_dataset(GRIDS[name].data, data_dir)


def _problem_elsewhere(files: Sequence[PartsFile]) -> str:
    """Return why a process in another folder can't use the files; empty if it can."""
    root = str(Path(str(grid.__file__)).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", ELSEWHERE],
            input=json.dumps([asdict(file) for file in files]),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    return last_line(RuntimeError(done.stderr or "it ended without a word")) if done.returncode else ""


def _place(part: str) -> str:
    """Return the file and the line at which a part is added, as far as its name shows it, and the part."""
    origin, name = ORIGINS[part], part.partition(" ")[2]
    texts = {file.name: file.text.splitlines() for file in loaded()}
    quoted = f'"{name}"', f"'{name}'"
    lines = [number for number, line in enumerate(texts.get(origin, []), 1) if any(word in line for word in quoted)]
    return f"{origin}:{lines[0]}: {part}" if lines else f"{origin}: {part}"


if __name__ == "__main__":
    sys.exit(main())
