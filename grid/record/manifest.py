"""What is written down about the code that trains a grid, so that its numbers can be understood and reproduced."""

import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grid.masking import mask_arguments

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy")


def describe_code() -> dict[str, Any]:
    """Return the commit of this code, the versions it runs with, the host and the command, without secrets."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": ["python", "-m", "grid.run", *mask_arguments(sys.argv[1:])],
    }


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607  (git of the PATH)
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
