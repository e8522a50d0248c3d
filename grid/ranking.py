"""The rule by which cells are ranked; shared by the table at the end of a run, `grid.confirm` and `analysis.rank`.

What is ranked is a cell, all its replicates together: first by the largest epoch that at least half of them reached,
then by their mean accuracy there. Accuracies of different epochs are never compared or averaged, and the accuracy at
the full budget is that of the weights at the end, not the highest on the way. Standard library only.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from grid.config import InputError
from grid.metrics import FINAL_STATUSES


@dataclass(frozen=True, kw_only=True)
class TrialSummary:
    """How one trial ended."""

    cell: Mapping[str, str]
    seed: int
    lr_scale: float
    epochs: int
    """Full budget."""
    status: str
    epochs_run: int
    best_val_accuracy: float | None
    """Highest of all epochs; None if there is none. Never ranked."""
    final_val_accuracy: float | None = None
    """Of the weights at the end of the full budget; None unless the trial completed."""
    stop_epoch: int | None = None
    """Rung at which ASHA stopped it or, if it is an unstopped control, would have."""
    rung_accuracies: Mapping[int, float] = field(default_factory=dict)
    """Epoch -> validation accuracy after it, for the rungs that the trial reached."""

    @property
    def spared(self) -> bool:
        """Whether it is an unstopped control that trained past the rung at which ASHA would have stopped it."""
        return self.stop_epoch is not None and self.epochs_run > self.stop_epoch

    @property
    def diverged(self) -> bool:
        """Whether it counts as diverged: a spared control counts as stopped, even if it diverged later."""
        return self.status == "diverged" and not self.spared

    @property
    def accuracies(self) -> dict[int, float]:
        """Epoch -> validation accuracy, for the epochs that count.

        None of them if it diverged; if it is a spared control, up to the rung at which ASHA would have stopped it.
        """
        if self.diverged:
            return {}
        final = {} if self.final_val_accuracy is None else {self.epochs: self.final_val_accuracy}
        last = self.epochs if self.stop_epoch is None else self.stop_epoch
        known = {**self.rung_accuracies, **final}
        return {epoch: value for epoch, value in known.items() if epoch <= last and math.isfinite(value)}


@dataclass(frozen=True)
class RankedCell:
    """A cell and the evidence that it is ranked by."""

    cell: Mapping[str, str]
    epochs: int
    """Full budget."""
    epochs_run: int
    """Largest epoch that at least half of its replicates reached."""
    accuracies: Mapping[int, float]
    """Seed -> validation accuracy after `epochs_run` epochs, for the replicates that reached them."""
    lr_scale: float
    """The scale at which the cell ranks best."""
    diverged: tuple[int, ...] = ()
    """Seeds of its diverged replicates."""
    stopped: int = 0
    """Number of its replicates that were stopped before `epochs_run`."""
    spared: Mapping[int, float] = field(default_factory=dict)
    """Seed -> accuracy at the end of its unstopped controls that count as stopped; NaN if they diverged later."""

    @property
    def mean(self) -> float:
        """Mean validation accuracy of the replicates that have one."""
        return fmean(self.accuracies.values())

    @property
    def spared_mean(self) -> float:
        """Mean accuracy at the end of the controls in `spared`; NaN if there are none, or all diverged later."""
        return fmean(ends) if (ends := [end for end in self.spared.values() if not math.isnan(end)]) else math.nan

    @property
    def scores(self) -> dict[int, float]:
        """Seed -> what the order is decided by: the accuracy, 0 for a diverged replicate."""
        return {**self.accuracies, **dict.fromkeys(self.diverged, 0.0)}

    @property
    def score(self) -> float:
        """Mean of the scores."""
        return fmean(self.scores.values())


def rank_cells(summaries: Iterable[TrialSummary]) -> list[RankedCell]:
    """Rank the cells of which at least half of the replicates have an accuracy, best first.

    Failed trials have no part: they are run again.

    Raises:
        InputError: The trials are of several budgets.
    """
    return sorted((cell for cell in choose_scales(summaries) if cell.epochs_run), key=_place)


def choose_scales(summaries: Iterable[TrialSummary]) -> list[RankedCell]:
    """Return each cell with the learning-rate scale at which all its replicates together rank best, in no order.

    What a control did after ASHA would have stopped it has no part in the choice. So the choice is the same whichever
    trials are unstopped controls.

    Raises:
        InputError: The trials are of several budgets.
    """
    by_scale: dict[tuple[str, ...], dict[float, list[TrialSummary]]] = defaultdict(lambda: defaultdict(list))
    budgets = set()
    for summary in summaries:
        budgets.add(summary.epochs)
        if summary.status in FINAL_STATUSES:
            by_scale[tuple(summary.cell.values())][summary.lr_scale].append(summary)
    if len(budgets) > 1:
        raise InputError(f"trials of {' and '.join(map(str, sorted(budgets)))} epochs can't be ranked together")
    return [min(map(_summarise_cell, scales.values()), key=_place) for scales in by_scale.values()]


def _summarise_cell(replicates: Sequence[TrialSummary]) -> RankedCell:
    """Return a cell with one learning-rate scale; its `epochs_run` is 0 if less than half have an accuracy."""
    replicates = sorted(replicates, key=lambda replicate: replicate.seed)
    by_seed = {replicate.seed: replicate.accuracies for replicate in replicates}
    epochs_run = _shared_epoch(list(by_seed.values()))
    accuracies = {seed: known[epochs_run] for seed, known in by_seed.items() if epochs_run in known}
    diverged = tuple(replicate.seed for replicate in replicates if replicate.diverged)
    first = replicates[0]
    return RankedCell(
        cell=first.cell,
        epochs=first.epochs,
        epochs_run=epochs_run,
        accuracies=accuracies,
        lr_scale=first.lr_scale,
        diverged=diverged,
        stopped=len(by_seed) - len(accuracies) - len(diverged),
        spared={
            replicate.seed: math.nan if replicate.final_val_accuracy is None else replicate.final_val_accuracy
            for replicate in replicates
            if replicate.spared
        },
    )


def _shared_epoch(replicates: Sequence[Mapping[int, float]]) -> int:
    """Return the largest epoch at which at least half of the replicates have an accuracy; 0 if there is none."""
    epochs = {epoch for accuracies in replicates for epoch in accuracies}
    shared = (epoch for epoch in epochs if 2 * sum(epoch in accuracies for accuracies in replicates) >= len(replicates))
    return max(shared, default=0)


def _place(cell: RankedCell) -> tuple[object, ...]:
    """Return what cells are sorted by, best first."""
    return -cell.epochs_run, -cell.score if cell.epochs_run else 0.0, tuple(cell.cell.values()), cell.lr_scale
