"""Tells errors of the device that trains from errors of the trial.

After most errors of a GPU its process can't use it any more: whatever is trained there next fails within milliseconds,
through no fault of its own. So a process with such an error has to end.
"""

from grid.wording import first_line

FAULTS = (
    "cuda error",
    "cuda driver error",
    "hip error:",
    "cudnn error",
    "cudnn_status_",
    "cublas_status_",
    "cusolver_status_",
    "cusparse_status_",
    "cufft_",
    "miopenstatus",
    "rocblas_status_",
    "nccl error",
    "device-side assert",
    "no kernel image is available",
    "cuda initialization",
    "cuda unknown error",
    "nvidia driver",
    "no cuda gpus are available",
    "unable to find an engine to execute this computation",
)
"""What the texts of errors say that torch raises for a device, in lower case, in any version."""
TYPES = frozenset(("AcceleratorError", "DistBackendError", "DeferredCudaCallError"))
"""Names of the types that torch raises for devices alone."""
OUT_OF_MEMORY = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "defaultcpuallocator: not enough memory",
    "defaultcpuallocator: can't allocate memory",
)


class DeviceError(Exception):
    """The device failed, or had no memory left; the process has to end, and the trial is not to blame.

    Args:
        reason: In one line.
        out_of_memory: Whether memory was short.
    """

    def __init__(self, reason: str, *, out_of_memory: bool):
        super().__init__(reason)
        self.out_of_memory = out_of_memory

    @classmethod
    def of(cls, error: BaseException) -> "DeviceError | None":
        """Return an error of the device, if an error or one that it was raised from is one; else None."""
        seen: set[int] = set()
        cause: BaseException | None = error
        while cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            if found := cls._of_one(cause):
                return found
            cause = cause.__cause__ or cause.__context__
        return None

    @classmethod
    def _of_one(cls, error: BaseException) -> "DeviceError | None":
        names = {kind.__name__ for kind in type(error).__mro__}
        if not names & TYPES and not isinstance(error, RuntimeError | MemoryError):
            return None
        low, reason = str(error).lower(), first_line(error)
        if isinstance(error, MemoryError) or "OutOfMemoryError" in names or any(text in low for text in OUT_OF_MEMORY):
            return cls(reason or "out of memory", out_of_memory=True)
        if names & TYPES or any(text in low for text in FAULTS):
            return cls(reason, out_of_memory=False)
        return None
