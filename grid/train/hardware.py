"""What torch finds on this machine, and what is made of it: precision, layout, memory that is kept."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let the C library keep the memory that this process frees, where it is glibc.

    By default it returns every large block to the system, which then zeroes the pages again, with one page fault each,
    at every step and for every layer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def numeric_settings(device: str, precision: str = "auto", bfloat16: bool | None = None) -> dict[str, str]:
    """Choose precision, memory format and fused optimizers by what the device can do.

    Args:
        device: `cpu` or `cuda`.
        precision: `auto`, or one that overrides the choice.
        bfloat16: Whether the GPUs are fast in it; None asks this machine.

    Returns:
        The fields of `TrialConfig` of these names, formatted as parameters.
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
