"""How many trials may run at once, and where: fewer once a device had too little memory, or keeps failing."""

from collections import Counter, defaultdict
from typing import Any

from grid.plan.packing import Packing
from grid.tune.connection import occupy
from grid.tune.queue import Queue
from grid.wording import count

MOST_FAILURES = 3
"""Failures of one device in a row, for each trial that shares it, after which every further one takes a share away."""


class Room:
    """Takes shares of machines away from the trials, and gives them back.

    Args:
        queue: Hands out the trials.
        packing: How they share the machines.
    """

    def __init__(self, queue: Queue, packing: Packing):
        self._queue = queue
        self._packing = packing
        self._sharing = round(1 / packing.gpus_per_trial) if packing.gpus_per_trial else 1
        self._taken: defaultdict[str, list[Any]] = defaultdict(list)
        """What holds a share, by the reason."""
        self._failures: Counter[str] = Counter()
        """Of each device, since an epoch has ended there."""
        self.shrinks = 0
        """How often a share was taken away."""

    @property
    def most(self) -> int:
        """Trials that may run at once."""
        return self._queue.most

    @property
    def at_once(self) -> str:
        """The same in words."""
        return f"{count(self.most, 'trial')} at once"

    def take(self, node: str, reason: str) -> None:
        """Keep trials from one share of a node; at least one share of all must be left."""
        self.shrinks += 1
        self._queue.most -= 1
        self._taken[reason].append(occupy(node, self._packing))

    def give_back(self, reason: str) -> None:
        """Let trials have again what was taken for a reason."""
        self._queue.most += len(self._taken[reason])
        self._taken[reason].clear()

    def trained(self, device: str) -> None:
        """Note that a device has trained an epoch."""
        self._failures.pop(device, None)

    def failed(self, node: str, device: str) -> bool:
        """Note that a device has failed; return whether a share was taken away for it.

        A broken one fails at once what is put there, is free again, and would fail one trial after another.
        """
        self._failures[device] += 1
        if self._failures[device] < MOST_FAILURES * self._sharing or self.most == 1:
            return False
        self.take(node, device)
        return True
