"""The GPUs of this machine. Torch, which counts them, takes a second to import; without a driver it is not asked."""

import sys
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
