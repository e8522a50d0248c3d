"""What a machine has, and what is made of it: how many trials run at once, in which precision."""

import math
from dataclasses import dataclass

import torch

from grid.config import InputError

GPU_BYTES_PER_TRIAL = 2 * 2**30
"""CUDA context, data set, net and cuDNN's workspace of one trial, rounded up."""
MAX_TRIALS_PER_GPU = 8
MOST_PER_CPU = 64
"""Trials that one CPU may be shared by."""


@dataclass(frozen=True)
class Packing:
    """How trials share a machine or a cluster."""

    concurrency: int
    """Trials at once."""
    cpus_per_trial: float
    gpus_per_trial: float
    """Share of one GPU; 0 where trials run on CPUs. Bookkeeping of Ray: memory is not kept apart."""

    @property
    def slots(self) -> float:
        """Trials that really run at once: as many as asked for on GPUs, as many as there are CPUs on CPUs."""
        return self.concurrency if self.gpus_per_trial else self.concurrency * self.cpus_per_trial

    @property
    def device(self) -> str:
        """Kind of device that trains: `cpu` or `cuda`."""
        return "cuda" if self.gpus_per_trial else "cpu"

    def __str__(self) -> str:
        share = f"{self.gpus_per_trial:.3g} GPU" if self.gpus_per_trial else f"{self.cpus_per_trial:.3g} CPU"
        return f"{self.concurrency} at once, {share} each"


def pack(cpus: float, gpus: float, gpu_bytes: int, concurrency: int | None = None) -> Packing:
    """Choose how many trials run at once.

    On CPUs one per CPU: a trial has one thread. On GPUs as many as their memory and the CPUs that drive them allow.

    Args:
        cpus: CPUs of the machine or cluster.
        gpus: GPUs of the machine or cluster.
        gpu_bytes: Memory of its smallest GPU.
        concurrency: The user's own number instead.

    Raises:
        InputError: `concurrency` is below 1.
    """
    if concurrency is not None and concurrency < 1:
        raise InputError(f"--concurrency must be 1 or more, got {concurrency}")
    if concurrency is not None and concurrency > MOST_PER_CPU * max(1.0, cpus):
        most = int(MOST_PER_CPU * max(1.0, cpus))
        raise InputError(f"--concurrency must be at most {most} here ({MOST_PER_CPU} per CPU), got {concurrency}")
    if gpus >= 1:
        fitting = max(1, min(MAX_TRIALS_PER_GPU, gpu_bytes // GPU_BYTES_PER_TRIAL, int(cpus // gpus)))
        per_gpu = fitting if concurrency is None else math.ceil(concurrency / gpus)
        return Packing(concurrency or int(per_gpu * gpus), min(1.0, cpus / (per_gpu * gpus)), 1 / per_gpu)
    return Packing(concurrency or max(1, int(cpus)), min(1.0, cpus / (concurrency or 1)), 0.0)


def gpu_memory() -> int:
    """Return the bytes of this machine's smallest GPU, 0 without one."""
    count = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=0)


def numeric_settings(device: str, precision: str = "auto") -> dict[str, str]:
    """Choose precision, memory format and fused optimizers by what the device can do.

    Args:
        device: `cpu` or `cuda`.
        precision: `auto`, or one that overrides the choice.

    Returns:
        The fields of `TrialConfig` of these names, spelled as parameters.
    """
    native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bfloat16()
    return {
        "device": device,
        "precision": precision if precision != "auto" else "bfloat16" if native else "float32",
        "memory_format": "channels_last",
        "fused": "on",
    }


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
