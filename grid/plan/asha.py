"""Asynchronous successive halving (ASHA): which trials continue past a rung. Plain values in, plain values out.

An unstopped control is a trial that is exempt from stopping. `grid.tune.tuner` plugs ASHA into Ray. Unlike Ray's own
scheduler, it never ranks a non-finite value above a finite one, compares trials only within their model (an MLP is not
stopped for being worse than a CNN), decides once per trial and rung, and can be rebuilt from recorded arrivals.

Reference: Li et al. 2020, https://arxiv.org/abs/1810.05934 (stopping variant)
"""

import math
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

FACTOR = 3
"""By default one trial in `FACTOR` continues past each rung; each rung has `FACTOR` times the epochs of the last."""
FEWEST_STEPS = 40
"""Training steps before the first rung. After 22 steps of the CNN on real images the order of its trials says nothing
of the end, and all of the best are stopped; after 44 steps the winner is never lost (`benchmarks.replay`)."""


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """Which trials are compared, when, and how many of them continue."""

    factor: int = FACTOR
    """One trial in this many continues past each rung; 1 for no stopping at all."""
    grace: int | None = None
    """Epoch of the first rung; None for the first epoch, or what `for_steps` makes of it."""
    within: tuple[str, ...] = ("model",)
    """Trials are compared with those that have the same levels of these factors; empty for with all."""

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """Return the epochs of the rungs for a full budget."""
        return rung_epochs(epochs, 1 if self.grace is None else self.grace)

    def for_steps(self, epochs: int, steps: int) -> "StoppingRule":
        """Return the rule with the first rung at the end of the first epoch that ends after `FEWEST_STEPS` or later.

        It is no later than a third of the budget, and stays where it is if it was given.

        Args:
            epochs: Full budget.
            steps: In an epoch.
        """
        if self.grace is not None:
            return self
        return replace(self, grace=max(1, min(math.ceil(FEWEST_STEPS / max(1, steps)), epochs // 3)))

    def group_of(self, cell: Mapping[str, str]) -> str:
        """Return the name of the group in which a cell's trials are compared."""
        return " ".join(cell[factor] for factor in self.within)


DEFAULT_RULE = StoppingRule()
NO_STOPPING = StoppingRule(factor=1)


def rung_epochs(epochs: int, first: int = 1) -> tuple[int, ...]:
    """Return the epochs of the rungs: first, first x `FACTOR`, ... below the full budget."""
    rungs = []
    while first < epochs:
        rungs.append(first)
        first *= FACTOR
    return tuple(rungs)


@dataclass
class Asha:
    """The rungs of a grid and the trials that have arrived at them.

    A trial continues if fewer than ceil(n / factor) of the n arrivals so far, its own included, beat it. As each is
    compared with earlier arrivals only, trials must arrive in random order.

    An unstopped control gets a verdict like any other trial; if that is to stop, it trains on, but its values at
    later rungs count for nobody. So the rule decides the same about the others, whatever the share of controls.
    """

    rungs: tuple[int, ...]
    """Epochs of the rungs, increasing."""
    rule: StoppingRule = DEFAULT_RULE
    _values: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    _verdicts: dict[tuple[str, int], bool] = field(default_factory=dict)
    _stop_epochs: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: StoppingRule, epochs: int) -> "Asha":
        """Return the rungs of a rule for a full budget, without arrivals."""
        return cls(rule.rungs(epochs), rule)

    def decide(self, trial_key: str, *, group: str, epoch: int, value: float, control: bool = False) -> bool:
        """Record that a trial has ended an epoch, and return whether it continues.

        A trial that reaches a rung a second time, resumed after a crash, gets the same answer and is not counted again.

        Args:
            trial_key: The trial that arrives.
            group: From `StoppingRule.group_of`; trials are compared within a group only.
            epoch: The epoch that has ended, from 1.
            value: Validation accuracy; NaN for a diverged trial, which counts as worse than any other.
            control: Whether the trial is an unstopped control, which always continues.
        """
        if epoch not in self.rungs:
            return True
        if epoch > self._stop_epochs.get(trial_key, epoch):
            return True
        if (trial_key, epoch) not in self._verdicts:
            self._record(trial_key, epoch, self._arrive(self._values[group, epoch], value))
        return control or self._verdicts[trial_key, epoch]

    def stop_epoch(self, trial_key: str) -> int | None:
        """Return the rung at which the rule stops a trial, be it a control or not; None if it has passed all so far."""
        return self._stop_epochs.get(trial_key)

    def diverge(self, trial_key: str, *, group: str, epoch: int) -> None:
        """Record at the next rung that a trial diverged in `epoch`."""
        if coming := [rung for rung in self.rungs if rung >= epoch]:
            self.decide(trial_key, group=group, epoch=coming[0], value=math.nan)

    def restore(self, trial_key: str, *, group: str, epoch: int, value: float, stop_epoch: int | None) -> None:
        """Restore a recorded arrival with the verdict of that time, even if it would differ today.

        Args:
            trial_key: The trial that arrived.
            group: As for `decide`.
            epoch: The rung.
            value: Validation accuracy; NaN for a trial that diverged before it.
            stop_epoch: Rung at which the trial was stopped or, if it is a control, would have been; None if at none.
        """
        if stop_epoch is None or epoch <= stop_epoch:
            insort(self._values[group, epoch], -math.inf if math.isnan(value) else value)
            self._record(trial_key, epoch, epoch != stop_epoch)

    def arrivals(self, group: str, epoch: int) -> tuple[float, ...]:
        """Return the values recorded at a rung, lowest first."""
        return tuple(self._values[group, epoch])

    def _record(self, trial_key: str, epoch: int, passes: bool) -> None:
        self._verdicts[trial_key, epoch] = passes
        if not passes:
            self._stop_epochs[trial_key] = epoch

    def _arrive(self, values: list[float], value: float) -> bool:
        insort(values, -math.inf if math.isnan(value) else value)
        better = len(values) - bisect_right(values, value)
        return math.isfinite(value) and better < math.ceil(len(values) / self.rule.factor)
