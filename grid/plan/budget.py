"""What a grid may take in all, over any number of commands, and what it has taken."""

from dataclasses import dataclass

from grid.config import InputError
from grid.wording import count, format_seconds

EXHAUSTED = 3
"""Exit code of a run that has spent its budget before all trials have ended."""


@dataclass(frozen=True)
class Spent:
    """What a grid has taken in all."""

    seconds: float
    """In which trials were trained: not those of pauses, nor those in which the machine slept."""
    epochs: int


@dataclass(frozen=True)
class Budget:
    """What a grid may take in all.

    Raises:
        InputError: A value is out of its range, or a cost has no price.
    """

    hours: float | None = None
    cost: float | None = None
    """In the currency of `price_per_hour`."""
    price_per_hour: float | None = None
    """Of the machine or cluster."""
    epochs: int | None = None

    def __post_init__(self) -> None:
        named = {"max-hours": self.hours, "max-cost": self.cost, "price-per-hour": self.price_per_hour}
        for name, value in named.items():
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} must be finite and above 0, got {value:g}")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"--max-epochs must be at least 1, got {self.epochs}")
        if self.cost is not None and self.price_per_hour is None:
            raise InputError("--max-cost needs the price of the machine or cluster: pass --price-per-hour as well")

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return (self.hours, self.cost, self.epochs) != (None, None, None)

    def exhausted(self, spent: Spent) -> str:
        """Return which limit has been reached, as an option with its value; empty if none."""
        hours = spent.seconds / 3600
        if self.hours is not None and hours >= self.hours:
            return f"--max-hours {self.hours:g}"
        if self.cost is not None and hours * (self.price_per_hour or 0.0) >= self.cost:
            return f"--max-cost {self.cost:g}"
        if self.epochs is not None and spent.epochs >= self.epochs:
            return f"--max-epochs {self.epochs}"
        return ""

    def __str__(self) -> str:
        limits = []
        if self.hours is not None:
            limits.append(format_seconds(3600 * self.hours))
        if self.cost is not None:
            limits.append(f"a cost of {self.cost:g} at {self.price_per_hour:g} per hour")
        if self.epochs is not None:
            limits.append(count(self.epochs, "epoch"))
        return f"at most {', '.join(limits)} in all" if limits else "no limit"

    def describe(self, spent: Spent) -> str:
        """Return what has been spent, in the units of the limits."""
        parts = [f"{format_seconds(spent.seconds)} of training", count(spent.epochs, "epoch")]
        if self.price_per_hour is not None:
            parts.append(f"a cost of {spent.seconds / 3600 * self.price_per_hour:.2f}")
        return ", ".join(parts)


NO_LIMIT = Budget()
