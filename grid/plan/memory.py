"""How many trials the memory of a machine holds. Pure, without torch or Ray."""

from dataclasses import dataclass

from grid.config import InputError

BYTES_PER_TRIAL = 700 * 2**20
"""Memory that one training process does not share: torch, the images, a net and its gradients, rounded up."""
DRIVER_BYTES = 900 * 2**20
"""Memory of the process that starts the trials and of the servers of a private Ray, rounded up."""


@dataclass(frozen=True)
class Memory:
    """The memory that this process and its children may use."""

    total: int
    """Bytes, used or not."""
    free: int
    """Bytes that are free, can be freed, or are this process's own."""
    place: str = "this machine"
    """Whose it is: `this machine`, or `the container`."""

    @property
    def trials(self) -> int:
        """Trials that the free memory holds beside the driver and a private Ray."""
        return _holds(min(self.free, self.total))

    @property
    def limit(self) -> str:
        """What limits `trials`, in words."""
        if self.trials == _holds(self.total):
            return f"{_gib(self.total)} of {self.place}"
        return f"{_gib(self.free)} free of {_gib(self.total)} of {self.place}"

    def check(self, concurrency: int | None) -> None:
        """Refuse what can't work.

        A user's number may rely on memory that other programs still hold, and one trial may always be tried.

        Args:
            concurrency: Trials at once, chosen by the user; None for as many as fit.

        Raises:
            InputError: The memory is too small for one trial, or for `concurrency` of them.
        """
        most = max(1, _holds(self.total))
        if concurrency is None and self.trials < 1:
            hint = "free some" if _holds(self.total) else "give it more"
            raise InputError(
                f"one trial needs {_gib(_needs(1))} of memory, this command and Ray included, but there is only "
                f"{self.limit}; {hint}, or pass --concurrency 1 to try nevertheless"
            )
        if concurrency is not None and concurrency > most:
            needs = f"{concurrency} trials at once need {_gib(_needs(concurrency))} of memory"
            raise InputError(f"{needs}, and {self.place} has {_gib(self.total)}; pass --concurrency {most}")


def _holds(memory: int) -> int:
    return max(0, (memory - DRIVER_BYTES) // BYTES_PER_TRIAL)


def _needs(trials: int) -> int:
    return DRIVER_BYTES + trials * BYTES_PER_TRIAL


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
