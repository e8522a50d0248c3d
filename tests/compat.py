"""Proves the lower bounds in pyproject.toml, and the newest Ray: `python -m tests.compat` (half an hour, 1 GB).

Wheels are laid over the environment, which itself does not change: the lower bounds all at once, then the newest Ray.
With each, the smoke grid is interrupted, continued and ranked; with the lower bounds, the fast tests run as well. Torch
and torchvision stay those of the environment, because their wheels have gigabytes.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNPROVEN = ("torch", "torchvision")
COMPANIONS = {"mlflow": ("mlflow-skinny=={}", "mlflow-tracing=={}"), "pandas": ("pytz",)}
"""What an old version of a package needs besides, and the environment lacks or has in another version."""
OLD_WARNINGS = ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning", "pandas.errors.PerformanceWarning")
"""Of old versions about each other; in tests, all other warnings are errors."""
START_SECONDS = 300.0


def main() -> int:
    """Prove all bounds; return 1 if one does not hold."""
    bounds = lower_bounds((ROOT / "pyproject.toml").read_text())
    wheels = [wheel for name, version in bounds.items() if name not in UNPROVEN for wheel in pinned(name, version)]
    good = prove("the lower bounds", wheels, with_tests=True)
    return 0 if prove("the newest Ray", ["ray"], with_tests=False) and good else 1


def lower_bounds(pyproject: str) -> dict[str, str]:
    """Return the lowest version of each dependency."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    matches = [re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", dependency) for dependency in dependencies]
    return {match[1]: match[2] for match in matches if match}


def pinned(name: str, version: str) -> list[str]:
    """Return what to install for a package at a version."""
    return [f"{name}=={version}", *(companion.format(version) for companion in COMPANIONS.get(name, ()))]


def prove(what: str, wheels: Sequence[str], *, with_tests: bool) -> bool:
    """Return whether all works with wheels laid over the environment, and print it."""
    print(f"{what}: {' '.join(wheels)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="compat-") as parent:
        overlay, folder = Path(parent, "overlay"), Path(parent, "grid")
        folder.mkdir()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"]
        subprocess.run([*pip, str(overlay), *wheels], check=True)
        environment = os.environ | {"PYTHONPATH": f"{overlay}:{ROOT}"}
        results = {"the grid": run_grid(folder, environment)}
        if with_tests:
            results["the tests"] = run_tests(environment)
    for name, passed in results.items():
        print(f"{what}: {name} {'passed' if passed else 'FAILED'}", flush=True)
    return all(results.values())


def run_grid(folder: Path, environment: dict[str, str]) -> bool:
    """Interrupt the smoke grid after its first trial, continue it, and rank it; return whether all that worked."""
    command = [sys.executable, "-m", "grid.run", "--grid", "smoke", "--experiment", "compat", "--address", "local"]
    started = subprocess.Popen(command, cwd=folder, env=environment)
    deadline = time.monotonic() + START_SECONDS
    while not has_ended_trial(folder) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    if started.wait(120) != 130:
        return False
    rest = (command, [sys.executable, "-m", "analysis.rank", "--experiment", "compat"])
    return all(subprocess.run(each, cwd=folder, env=environment, check=False).returncode == 0 for each in rest)


def has_ended_trial(folder: Path) -> bool:
    """Return whether a trial of the grid has ended."""
    return any('"kind":"end"' in spool.read_text() for spool in (folder / "spool").glob("*.jsonl"))


def run_tests(environment: dict[str, str]) -> bool:
    """Run the fast tests, except those of Ray's autoscaler, whose inner parts differ between versions."""
    ignored = [argument for name in OLD_WARNINGS for argument in ("-W", f"ignore::{name}")]
    autoscaler = [f"--ignore={file}" for file in sorted(ROOT.glob("tests/test_cluster_aws*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *ignored, *autoscaler]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
