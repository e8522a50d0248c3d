"""What is recorded, as it waits in the spool: what has happened to a trial, and the time that has been spent.

On disk each is one line of JSON. Spools of earlier versions are read as well, so the names there never change.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Started:
    """A trial has started, or resumes."""

    trial_key: str
    time: int
    """In milliseconds since 1970; every event of a driver has a time of its own."""
    name: str
    """Of the MLflow run."""
    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """An epoch has ended."""

    trial_key: str
    time: int
    epoch: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial has ended; no epoch follows."""

    trial_key: str
    time: int
    epoch: int
    """Epochs run."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str]
    status: str
    """One of `grid.metrics.STATUSES`."""
    error: str = ""
    """Traceback of a failed trial."""


@dataclass(frozen=True, kw_only=True)
class Suspended:
    """A trial waits for the next run to resume it."""

    trial_key: str
    time: int


@dataclass(frozen=True, kw_only=True)
class TimeSpent:
    """Trials of a grid have been trained for so long, by all commands together; an event of no trial."""

    trial_key: str = ""
    time: int
    seconds: float


Event = Started | EpochEnded | Ended | Suspended | TimeSpent

KINDS: dict[str, type[Event]] = {
    "start": Started,
    "epoch": EpochEnded,
    "end": Ended,
    "rest": Suspended,
    "spent": TimeSpent,
}
"""Name on disk -> event."""
_NAMES = {event: name for name, event in KINDS.items()}


def to_json(event: Event) -> dict[str, Any]:
    """Return an event in JSON's types; `from_json` inverts it."""
    return {"kind": _NAMES[type(event)], **asdict(event)}


def from_json(line: Mapping[str, Any]) -> Event:
    """Return the event that `to_json` made a line from."""
    values = dict(line)
    return KINDS[values.pop("kind")](**values)
