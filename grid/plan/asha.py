"""Asynchronous successive halving (ASHA): which trials continue past a rung. Plain values in, plain values out.

An unstopped control is a trial that is exempt from stopping. `grid.tune.tuner` plugs ASHA into Ray. Unlike Ray's own
scheduler, it never ranks a non-finite value above a finite one, compares trials only within their model (an MLP is not
stopped for being worse than a CNN), decides once per trial and rung, and can be rebuilt from recorded arrivals.

Reference: Li et al. 2020, https://arxiv.org/abs/1810.05934 (stopping variant)
"""

import math
from bisect import bisect_right, insort
from collections import defaultdict
from dataclasses import dataclass, field

FACTOR = 3
"""One trial in `FACTOR` continues past each rung."""


def rung_epochs(epochs: int, first: int = 1, factor: int = FACTOR) -> tuple[int, ...]:
    """Return the epochs of the rungs: first, first x factor, ... below the full budget."""
    rungs = []
    while first < epochs:
        rungs.append(first)
        first *= factor
    return tuple(rungs)


@dataclass
class Asha:
    """The rungs of a grid and the trials that have arrived at them.

    A trial continues if fewer than ceil(n / factor) of the n arrivals so far, its own included, beat it. As each is
    compared with earlier arrivals only, trials must arrive in random order.
    """

    rungs: tuple[int, ...]
    """Epochs of the rungs, increasing."""
    factor: int = FACTOR
    _values: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    _decisions: dict[tuple[str, int], bool] = field(default_factory=dict)

    def decide(self, trial_key: str, *, group: str, epoch: int, value: float, control: bool = False) -> bool:
        """Record that a trial has ended an epoch, and return whether it continues.

        A trial that reaches a rung a second time, resumed after a crash, gets the same answer and is not counted again.

        Args:
            trial_key: The trial that arrives.
            group: Trials are compared within a group only.
            epoch: The epoch that has ended, from 1.
            value: Validation accuracy; NaN for a diverged trial, which counts as worse than any other.
            control: Whether the trial is an unstopped control; its value counts for the others.
        """
        if epoch not in self.rungs:
            return True
        decided = self._decisions.get((trial_key, epoch))
        if decided is None:
            decided = self._arrive(self._values[group, epoch], value) or control
            self._decisions[trial_key, epoch] = decided
        return decided

    def diverge(self, trial_key: str, *, group: str, epoch: int) -> None:
        """Record at the next rung that a trial diverged in `epoch`."""
        if coming := [rung for rung in self.rungs if rung >= epoch]:
            self.decide(trial_key, group=group, epoch=coming[0], value=math.nan)

    def restore(self, trial_key: str, *, group: str, epoch: int, value: float, continued: bool) -> None:
        """Restore a recorded arrival with the decision of that time, even if it would differ today.

        Args:
            trial_key: The trial that arrived.
            group: Trials are compared within a group only.
            epoch: The rung.
            value: Validation accuracy; NaN for a trial that diverged before it.
            continued: Whether the trial continued.
        """
        insort(self._values[group, epoch], -math.inf if math.isnan(value) else value)
        self._decisions[trial_key, epoch] = continued

    def arrivals(self, group: str, epoch: int) -> tuple[float, ...]:
        """Return the values recorded at a rung, lowest first."""
        return tuple(self._values[group, epoch])

    def _arrive(self, values: list[float], value: float) -> bool:
        insort(values, -math.inf if math.isnan(value) else value)
        better = len(values) - bisect_right(values, value)
        return math.isfinite(value) and better < math.ceil(len(values) / self.factor)
