"""Proves a GPU machine: runs the tests marked `gpu` there, times training steps, and writes one page.

make gpu-report                                    # or, where only torch, numpy and pytest are installed:
python3 -m benchmarks.gpu_report [--out FILE]      # minutes
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from grid.arguments import Parser, run_command, write_output
from grid.config import InputError

ROOT = Path(__file__).parent.parent
BARE = ROOT / "benchmarks" / "bare"
ABOUT = """
import torch
from grid.train.hardware import describe_machine, numeric_settings
if not torch.cuda.is_available():
    raise SystemExit("no GPU that torch can use")
for name, value in describe_machine("cuda").items():
    print(f"{name}: {value}")
print(f"cuda_version: {torch.version.cuda}")
print(f"compute_capability: {'.'.join(map(str, torch.cuda.get_device_capability()))}")
print(f"memory: {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB")
print(f"precision: {numeric_settings('cuda')['precision']} (what --precision auto takes)")
"""
SHARING = """
from grid.config import TrialConfig
from grid.plan.packing import MAX_TRIALS_PER_GPU
from grid.plan.sharing import measure_sharing
from grid.train.hardware import numeric_settings
for model in ("mlp", "cnn", "resnet"):
    params = {**numeric_settings("cuda"), "model": model, "epochs": "9", "learning_rate": "0.01"}
    found = measure_sharing([TrialConfig.from_params(params)], DataShape((1, 28, 28), 47, 94_000), MAX_TRIALS_PER_GPU)
    speeds = ", ".join(f"{number} at once {speed:,.0f}" for number, speed in found.speeds.items())
    print(f"{model}: images per second: {speeds}; one thread of a CPU {found.cpu_speed:,.0f}; {found}")
"""
TESTS = ("-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider", "-q", "-ra")
SPEED = ("-m", "benchmarks.step_speed", "--device", "cuda", "--models", "mlp", "cnn", "resnet", "--techniques")


def main() -> int:
    """Write the page and return the exit code: 0, 1 if a test or the timing failed, or 2 without a GPU."""
    parser = Parser(prog="python -m benchmarks.gpu_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_report.md"), metavar="FILE", help="(gpu_report.md)")
    options = parser.parse_args()
    return run_command(parser.name, lambda: report(options.out))


def report(page: Path) -> int:
    """Run everything and write the page.

    Raises:
        InputError: There is no GPU, or the page can't be written.
    """
    _, about = _run("-c", ABOUT)
    if "compute_capability" not in about:
        raise InputError((about.strip().splitlines() or ["nothing answers"])[-1] + "; run this on a machine with one")
    failed, tests = _run(*TESTS, "tests/test_gpu.py")
    slow, speed = _run(*SPEED)
    unshared, sharing = _run("-c", SHARING)
    parts = {"Machine": about, "Tests": tests, "Training steps": speed, "Trials that share it": sharing}
    write_output(
        page,
        "# What this GPU does\n"
        + "".join(f"\n## {name}\n\n```\n{text.strip()}\n```\n" for name, text in parts.items()),
    )
    slow = slow or unshared
    said = "a test failed" if failed else "all tests passed"
    print(f"{page}: {said}{'; timing it failed' if slow else ''}")
    return 1 if failed or slow else 0


def _run(*arguments: str) -> tuple[int, str]:
    """Run Python in this folder; return its exit code and what it printed, which is printed here as well."""
    paths = [str(ROOT), *([] if find_spec("jaxtyping") else [str(BARE)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
