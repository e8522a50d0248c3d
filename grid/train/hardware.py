"""Settings that depend on the machine: precision, memory format, fused kernels, and how memory is freed."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's `mallopt`, from malloc.h."""


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees; do nothing with another C library.

    By default glibc returns every large block to the system, which must then zero its pages again, with a page fault
    for each, for every layer at every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the maximum of older versions
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def numeric_settings(device: str, precision: str = "auto", bfloat16: bool | None = None) -> dict[str, str]:
    """Choose precision, memory format and fused optimizers by the capabilities of the device.

    Args:
        device: `cpu` or `cuda`.
        precision: `float32`, `bfloat16`, or `auto` to choose.
        bfloat16: Whether the GPUs compute fast in bfloat16; None queries this machine.

    Returns:
        Fields of `TrialConfig`, formatted as parameters.
    """
    if bfloat16 is None:
        bfloat16 = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bfloat16()
    return {
        "device": device,
        "precision": precision if precision != "auto" else "bfloat16" if bfloat16 else "float32",
        "memory_format": "channels_last",
        "fused": "on",
    }


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
