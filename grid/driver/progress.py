"""What a person sees of a grid: one line while it runs, a table of the best cells at the end."""

import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from grid.config import cell_name
from grid.metrics import STATUSES
from grid.ranking import RankedCell, TrialSummary, rank_cells
from grid.wording import count, explain_spared, format_seconds

TERMINAL_SECONDS = 0.5
"""Between two updates of the line on a terminal."""
LOG_SECONDS = 30.0
"""Between two lines in a file."""
NOTICE_SECONDS = 60.0
"""How long a notice is shown."""


@dataclass
class Progress:
    """Counts trials and epochs, and shows the state in one line.

    Args:
        total: Trials of the grid.
        expected_epochs: By model, in this run.
        concurrency: Trials at once.
        done: Ended trials by status, those of earlier runs included.
        stream: Where the line is written.
    """

    total: int
    expected_epochs: Mapping[str, float]
    concurrency: int
    done: Counter[str] = field(default_factory=Counter)
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    running: int = 0
    trouble: str = ""
    """What a person should know of the recording."""
    best: tuple[float, str] | None = None
    """Highest validation accuracy and the name of its cell."""
    _epochs: Counter[str] = field(default_factory=Counter)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _shown_at: float = 0.0
    _notice: str = ""
    _noticed_at: float = 0.0

    def notice(self, problem: str) -> None:
        """Show for a while what has gone wrong."""
        self._notice, self._noticed_at = problem, time.monotonic()

    def epoch_ended(self, cell: Mapping[str, str], seconds: float, val_accuracy: float | None) -> None:
        """Count an epoch of a trial."""
        self._epochs[cell["model"]] += 1
        self._seconds[cell["model"]] += seconds
        self.see(cell, val_accuracy)

    def see(self, cell: Mapping[str, str], val_accuracy: float | None) -> None:
        """Remember an accuracy if it is the best so far."""
        if val_accuracy is not None and (self.best is None or val_accuracy > self.best[0]):
            self.best = (val_accuracy, cell_name(cell))

    def seconds_left(self) -> float | None:
        """Return the expected seconds left; None until every model has finished an epoch."""
        if not all(self._epochs[model] for model in self.expected_epochs):
            return None
        left = sum(
            max(0.0, expected - self._epochs[model]) * self._seconds[model] / self._epochs[model]
            for model, expected in self.expected_epochs.items()
        )
        return left / self.concurrency

    def line(self, width: int) -> str:
        """Return the state in one line of at most `width` characters."""
        ended = self.done["completed"] + self.done["stopped"] + self.done["diverged"] + self.done["failed"]
        parts = [f"{ended}/{self.total} done", f"{self.running} running"]
        parts += [self.trouble] if self.trouble else []
        parts += [f"{self.done[status]} {status}" for status in STATUSES[1:] if self.done[status] or status != "failed"]
        left = self.seconds_left()
        if ended < self.total:
            parts.append("time left unknown" if left is None else f"{format_seconds(left)} left")
        if self._notice and time.monotonic() - self._noticed_at < NOTICE_SECONDS:
            parts.append(self._notice)
        if self.best:
            parts.append(f"best {self.best[0]:.1%} {self.best[1]}")
        line = " | ".join(parts)
        return line if len(line) <= width else f"{line[: width - 3]}..."

    def show(self, *, last: bool = False) -> None:
        """Write the line if it is due: in place on a terminal, from time to time elsewhere."""
        terminal = self.stream.isatty()
        now = time.monotonic()
        if not last and now - self._shown_at < (TERMINAL_SECONDS if terminal else LOG_SECONDS):
            return
        self._shown_at = now
        line = self.line(shutil.get_terminal_size().columns - 1 if terminal else 120)
        try:
            self.stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
            if last and terminal:
                self.stream.write("\n")
            self.stream.flush()
        except BrokenPipeError:  # nobody reads any more; the run continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def top_table(summaries: Sequence[TrialSummary], top: int = 10) -> str:
    """Return the best cells as a table, at most 80 columns wide if all learning-rate scales are 1.

    Cells of which more than half of the replicates diverged have no rank; trials are counted below by status.

    Args:
        summaries: Trials that have ended, all with the same budget.
        top: Rows.
    """
    if not summaries:
        return "no trial has ended yet"
    ranked = rank_cells(summaries)
    lines = [f"{'rank':>4}  {'val acc':>7}  {'epochs':<8}  cell"]
    for rank, cell in enumerate(ranked[:top], start=1):
        lines.append(f"{rank:>4}  {cell.mean:>7.2%}{'*' if cell.spared else ' '} {_budget(cell):<8}  {_name(cell)}")
    counts = Counter(summary.status for summary in summaries)
    by_status = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    shown = f"{min(top, len(ranked))} of {count(len(ranked), 'cell')} shown"
    marked = [(rank, cell.spared_mean) for rank, cell in enumerate(ranked[:top], start=1) if cell.spared]
    return "\n".join([*lines, *explain_spared(marked), f"{shown}; {count(len(summaries), 'trial')}: {by_status}"])


def _name(ranked: RankedCell) -> str:
    scale = f" lr x{ranked.lr_scale:g}" if ranked.lr_scale != 1 else ""
    diverged = f" ({len(ranked.diverged)} diverged)" if ranked.diverged else ""
    return f"{cell_name(ranked.cell)}{scale}{diverged}"


def _budget(ranked: RankedCell) -> str:
    seeds = len(ranked.accuracies)
    return f"{ranked.epochs_run}/{ranked.epochs}" + (f" x{seeds}" if seeds > 1 else "")
