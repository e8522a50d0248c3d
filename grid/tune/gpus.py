"""The GPUs of this machine. Torch, which knows them, takes a second to import; without a driver it is not asked."""

import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

DRIVER_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Files in /dev of the drivers that torch can train with on Linux: NVIDIA, NVIDIA on Tegra, AMD, Windows (WSL)."""


def find_gpus(devices: Path = Path("/dev")) -> tuple[int, int]:
    """Return how many GPUs torch can train with, and the bytes of memory of the smallest; 0 and 0 without one."""
    if sys.platform == "linux" and not any(next(devices.glob(name), None) for name in DRIVER_FILES):
        return 0, 0
    import torch  # noqa: PLC0415  (see above)

    count = torch.cuda.device_count()
    return count, min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=0)


def device_names(processors: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Return the names of the GPUs of this machine, each once; the name of its CPU if it has none."""
    gpus = find_gpus()[0]
    if not gpus:
        return (_cpu_name(processors),)
    import torch  # noqa: PLC0415  (see above)

    return tuple(dict.fromkeys(torch.cuda.get_device_name(index) for index in range(gpus)))


def _cpu_name(processors: Path) -> str:
    with suppress(OSError, subprocess.CalledProcessError):
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        if found := re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", processors.read_text(), re.M):
            return found[1].strip()
    return platform.processor() or platform.machine()
