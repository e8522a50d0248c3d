"""What depends on the machine: precision, memory format, fused kernels, how memory is freed, and its description."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from grid.config import InputError
from grid.surroundings import cpu_name

BFLOAT16_FROM = (8, 0)
"""Compute capability from which NVIDIA's GPUs compute in bfloat16 and TF32: Ampere. Before, torch emulates bfloat16.

Reference: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
"""
DRIVER_VERSION = Path("/sys/module/nvidia/version")

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the block, as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def numeric_settings(device: str, precision: str = "auto", bfloat16: bool | None = None) -> dict[str, str]:
    """Choose precision, memory format and fused optimizers by the capabilities of the device.

    Args:
        device: `cpu` or `cuda`.
        precision: `float32`, `bfloat16`, `tf32`, or `auto` to choose.
        bfloat16: Whether the GPUs compute in bfloat16 themselves; None queries this machine.

    Returns:
        Fields of `TrialConfig`, formatted as parameters.

    Raises:
        InputError: `tf32` on CPUs. Whether GPUs have what was asked for, each of them says by `precision_problem`.
    """
    if bfloat16 is None:
        bfloat16 = gpus_have_bfloat16() if device == "cuda" else _cpu_has_bfloat16()
    if device == "cpu" and precision == "tf32":
        raise InputError("--precision tf32 is one of NVIDIA's GPUs, and trials run on CPUs here; pass float32 or auto")
    return {
        "device": device,
        "precision": precision if precision != "auto" else "bfloat16" if bfloat16 else "float32",
        "memory_format": "channels_last",
        "fused": "on",
    }


def precision_problem(device: str, precision: str) -> str:
    """Return why the GPUs of this machine should not train in a precision; empty if they should."""
    if device != "cuda" or precision == "float32" or gpus_have_bfloat16():
        return ""
    needed = ".".join(map(str, BFLOAT16_FROM))
    hint = "a grid can have --precision float32"
    return f"has a GPU of a compute capability below {needed}, which lacks {precision}; {hint}"


def gpus_have_bfloat16() -> bool:
    """Return whether all GPUs of this machine compute in bfloat16 themselves, rather than emulate it."""
    if torch.version.hip:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    indices = range(torch.cuda.device_count())
    return all(torch.cuda.get_device_capability(index) >= BFLOAT16_FROM for index in indices)


def use_precision(device: str, precision: str) -> None:
    """Have this process compute float32 on a GPU as a trial asks: in full unless it asks for `tf32`.

    By default torch computes convolutions in TF32, which has 10 bits instead of 23, and products of matrices in full.
    """
    if device == "cuda":
        computed = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = computed
        torch.backends.cudnn.conv.fp32_precision = computed  # type: ignore[attr-defined]


@cache
def describe_machine(device: str) -> dict[str, str]:
    """Return what a trial that trains here is marked with: names and versions of the device and its software."""
    described = {"device_name": cpu_name(), "torch_version": torch.__version__}
    if device == "cuda":
        described["device_name"] = torch.cuda.get_device_name()
        with suppress(OSError):
            described["driver_version"] = DRIVER_VERSION.read_text().strip()
    return described


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
