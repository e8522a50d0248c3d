"""The rule by which cells are ranked; shared by the table at the end of a run, `grid.confirm` and `analysis.rank`.

An accuracy after one epoch is never compared or averaged with one after nine: a cell is ranked by the last epoch that
all its replicates have reached, and cells with more epochs come first. Diverged and failed trials have no accuracy
here. Standard library only.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from grid.config import FACTORS, InputError
from grid.metrics import RANKED_STATUSES


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
    """Highest of all epochs; None if there is none."""
    rung_accuracies: Mapping[int, float] = field(default_factory=dict)
    """Epoch -> validation accuracy after it, for the rungs that the trial reached."""


@dataclass(frozen=True)
class RankedCell:
    """A cell and the evidence that it is ranked by."""

    cell: Mapping[str, str]
    epochs: int
    """Full budget."""
    epochs_run: int
    """Epochs that all its replicates have reached."""
    accuracies: Mapping[int, float]
    """Seed -> validation accuracy: the best if every replicate had the full budget, else that at `epochs_run`."""
    lr_scale: float
    """Of the most accurate replicate."""

    @property
    def mean(self) -> float:
        """Mean validation accuracy over the seeds."""
        return fmean(self.accuracies.values())


def rank_cells(summaries: Iterable[TrialSummary]) -> list[RankedCell]:
    """Rank cells by the best evidence that all their replicates share, best first.

    Of a replicate's nuisance levels, the one with the most epochs counts; of several, the most accurate one.

    Raises:
        InputError: The trials are of several budgets.
    """
    replicates: dict[tuple[str, ...], dict[int, TrialSummary]] = defaultdict(dict)
    budgets = set()
    for summary in summaries:
        budgets.add(summary.epochs)
        if summary.status in RANKED_STATUSES and summary.best_val_accuracy is not None:
            by_seed = replicates[tuple(summary.cell[factor] for factor in FACTORS)]
            by_seed[summary.seed] = max(summary, by_seed.get(summary.seed, summary), key=_evidence)
    if len(budgets) > 1:
        raise InputError(f"trials of {' and '.join(map(str, sorted(budgets)))} epochs can't be ranked together")
    cells = [_summarise_cell(by_seed) for by_seed in replicates.values()]
    return sorted(cells, key=lambda ranked: (-ranked.epochs_run, -ranked.mean, tuple(ranked.cell.values())))


def _summarise_cell(by_seed: Mapping[int, TrialSummary]) -> RankedCell:
    shared = min(summary.epochs_run for summary in by_seed.values())
    accuracies = {seed: _accuracy_at(by_seed[seed], shared) for seed in sorted(by_seed)}
    best = by_seed[max(accuracies, key=lambda seed: accuracies[seed])]
    return RankedCell(
        cell={factor: best.cell[factor] for factor in FACTORS},
        epochs=best.epochs,
        epochs_run=shared,
        accuracies=accuracies,
        lr_scale=best.lr_scale,
    )


def _evidence(summary: TrialSummary) -> tuple[int, float]:
    return summary.epochs_run, summary.best_val_accuracy or 0.0


def _accuracy_at(summary: TrialSummary, epoch: int) -> float:
    if summary.epochs_run == epoch and summary.best_val_accuracy is not None:
        return summary.best_val_accuracy
    return summary.rung_accuracies.get(epoch, math.nan)
