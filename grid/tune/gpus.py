"""The GPUs of this machine. Torch, which knows them, takes a second to import; without a driver it is not asked."""

import sys
from importlib import import_module
from pathlib import Path

from grid.surroundings import cpu_name

DRIVER_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Files in /dev of the drivers that torch can train with on Linux: NVIDIA, NVIDIA on Tegra, AMD, Windows (WSL)."""


def find_gpus(devices: Path = Path("/dev")) -> tuple[int, int]:
    """Return how many GPUs torch can train with, and the bytes of memory of the smallest; 0 and 0 without one."""
    if sys.platform == "linux" and not any(next(devices.glob(name), None) for name in DRIVER_FILES):
        return 0, 0
    import torch  # noqa: PLC0415  (see above)

    count = torch.cuda.device_count()
    return count, min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=0)


def device_names() -> tuple[str, ...]:
    """Return the names of the GPUs of this machine, each once; the name of its CPU if it has none."""
    gpus = find_gpus()[0]
    if not gpus:
        return (cpu_name(),)
    import torch  # noqa: PLC0415  (see above)

    return tuple(dict.fromkeys(torch.cuda.get_device_name(index) for index in range(gpus)))


def have_bfloat16() -> bool:
    """Return whether all GPUs of this machine, of which there is one at least, compute in bfloat16 themselves."""
    return bool(import_module("grid.train.hardware").gpus_have_bfloat16())
