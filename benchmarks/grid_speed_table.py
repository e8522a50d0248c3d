"""What `grid_speed` makes of its runs: a contender's store read, rows kept in a CSV file, tables and ratios."""

import csv
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from grid.config import InputError

OURS = "ours"
POINTS = """
SELECT metrics.run_uuid, metrics.key, metrics.value
FROM metrics JOIN runs ON runs.run_uuid = metrics.run_uuid
WHERE runs.lifecycle_stage = 'active' AND metrics.key IN ('val_accuracy', 'epoch_seconds') AND NOT metrics.is_nan
"""


@dataclass(frozen=True)
class Stored:
    """What a contender's MLflow store tells of its run."""

    trials: int
    """Runs that have trained an epoch."""
    epochs: int
    """Of all trials; a diverged epoch has a time and no accuracy, and counts."""
    epoch_seconds: float
    """Sum over all epochs."""
    best_val_accuracy: float
    """In [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of one contender from start to exit; a line of the CSV file."""

    model: str
    contender: str
    repeat: int
    """From 0; runs of one repeat are a pair."""
    wall_seconds: float
    trials: int
    epochs: int
    """Trained in all."""
    epoch_seconds: float
    """Sum over all epochs, of all slots."""
    best_val_accuracy: float
    cells: int
    """That were to be trained."""
    seeds: int
    """Trials of each cell."""
    budget: int
    """Epochs of a trial that is not stopped."""
    data: str
    train_images: int
    val_images: int
    peer_init: str
    """Whose initial weights the peers have: `ours` or `torch`."""
    slots: int
    commit: str

    @property
    def setting(self) -> tuple[object, ...]:
        """What rows of one table have in common."""
        data = self.data, self.train_images, self.val_images
        return self.cells, self.seeds, self.budget, *data, self.peer_init, self.slots

    @property
    def seconds_per_epoch(self) -> float:
        """Wall time over the epochs that all trials have trained."""
        return self.wall_seconds / self.epochs

    @property
    def samples_per_second(self) -> float:
        """Training images seen per second of wall time."""
        return self.train_images * self.epochs / self.wall_seconds

    @property
    def overhead(self) -> float:
        """Seconds of wall time per trial in which a slot trained nothing."""
        return (self.wall_seconds - self.epoch_seconds / self.slots) / self.trials


def read_store(path: Path) -> Stored:
    """Read an MLflow database.

    Raises:
        InputError: No trial has trained an epoch.
    """
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        points = database.execute(POINTS).fetchall()
    seconds = [(run, value) for run, name, value in points if name == "epoch_seconds"]
    accuracies = [value for _, name, value in points if name == "val_accuracy"]
    if not seconds or not accuracies:
        raise InputError(f"{path} holds no trial that has trained an epoch")
    return Stored(len({run for run, _ in seconds}), len(seconds), sum(value for _, value in seconds), max(accuracies))


def append_row(path: Path, row: Row) -> None:
    """Add a line to a CSV file, with the names first if it is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def read_rows(path: Path) -> list[Row]:
    """Read a CSV file that `append_row` wrote.

    Raises:
        InputError: It can't be read, or it is another file.
    """
    names = [field.name for field in fields(Row)]
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                raise InputError(f"{path} is not a file that --csv wrote: its first line differs")
            return [_read_row(line) for line in reader]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds a line that --csv did not write: {error}") from error


def check_alike(rows: Sequence[Row]) -> None:
    """Raise `InputError` if runs of one model can't be put into one table."""
    for model, some in by_model(rows):
        for row in some:
            if row.setting != some[0].setting:
                raise InputError(f"{model} runs of two settings, {some[0].setting} and {row.setting}; use another file")


def by_model(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each model with its rows, in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.model, []).append(row)
    yield from groups.items()


def report(rows: Sequence[Row]) -> str:
    """Return all tables, at most 80 columns wide.

    Raises:
        InputError: There is nothing to report, or what can't be put into one table.
    """
    if not rows:
        raise InputError("no run to report")
    check_alike(rows)
    tables = "\n\n".join(table(some) for _, some in by_model(rows))
    return f"{tables}\n\ncommit {', '.join(dict.fromkeys(row.commit for row in rows))}"


def table(rows: Sequence[Row]) -> str:
    """Return what contenders made of one model, and how ours compares."""
    first, contenders = rows[0], list(dict.fromkeys(row.contender for row in rows))
    counts = f"{first.train_images:,} training and {first.val_images:,} validation images"
    lines = [
        f"{first.model}: {first.cells} cells{_seeds(first.seeds)}, {_epochs(first.budget)}, {first.slots} at once",
        f"{first.data}: {counts}; peers' init: {first.peer_init}",
        f"{'contender':<9} {'wall s':>6} {'(min-max)':<13} {'trials':>6} {'epochs':>6} {'s/epoch':>7} "
        f"{'samples/s':>9} {'overhead':>8} {'best':>7}",
    ]
    lines += [_line(name, [row for row in rows if row.contender == name]) for name in contenders]
    lines.append("medians; overhead: seconds per trial in which a slot trained nothing")
    for name in contenders:
        if name != OURS and (pairs := paired(rows, OURS, name)):
            lines += ["", *compare(name, pairs)]
    return "\n".join(lines + _notes(rows))


def paired(rows: Iterable[Row], one: str, other: str) -> list[tuple[Row, Row]]:
    """Return the runs of two contenders of one model, repeat by repeat, where both are."""
    found = {(row.contender, row.repeat): row for row in rows}
    repeats = sorted({repeat for _, repeat in found})
    return [(found[one, n], found[other, n]) for n in repeats if (one, n) in found and (other, n) in found]


def compare(name: str, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Return how many times as fast ours is, and how much better, with the spread over the repeats."""
    fast = [other.seconds_per_epoch / ours.seconds_per_epoch for ours, other in pairs]
    whole = [other.wall_seconds / ours.wall_seconds for ours, other in pairs]
    better = [100 * (ours.best_val_accuracy - other.best_val_accuracy) for ours, other in pairs]
    repeats = "1 repeat" if len(pairs) == 1 else f"{len(pairs)} paired repeats"
    return [
        f"ours against {name}, {repeats}: median (min to max)",
        f"  as fast, per epoch trained  {_spread(fast, '{:.2f}')} times",
        f"  as fast, start to exit      {_spread(whole, '{:.2f}')} times",
        f"  best validation accuracy    {_spread(better, '{:+.2f}')} points",
    ]


def _line(name: str, rows: Sequence[Row]) -> str:
    walls = [row.wall_seconds for row in rows]
    digits = 1 if max(walls) < 1000 else 0
    spread = f"({min(walls):.{digits}f}-{max(walls):.{digits}f})"

    def middle(value: Callable[[Row], float]) -> float:
        return median(value(row) for row in rows)

    return (
        f"{name:<9} {median(walls):>6.1f} {spread:<13} "
        f"{middle(lambda row: row.trials):>6g} {middle(lambda row: row.epochs):>6g} "
        f"{middle(lambda row: row.seconds_per_epoch):>7.2f} {middle(lambda row: row.samples_per_second):>9,.0f} "
        f"{middle(lambda row: row.overhead):>6.2f} s {middle(lambda row: row.best_val_accuracy):>7.2%}"
    )


def _seeds(count: int) -> str:
    return "" if count == 1 else f" x {count} seeds"


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def _notes(rows: Iterable[Row]) -> list[str]:
    return [
        f"{row.contender}, repeat {row.repeat}: {row.trials} trials for {row.cells} cells{_seeds(row.seeds)}"
        for row in rows
        if row.trials != row.cells * row.seeds
    ]


def _read_row(line: dict[str, str]) -> Row:
    kinds = {"str": str, "int": int, "float": float, str: str, int: int, float: float}
    return Row(**{field.name: kinds[field.type](line[field.name]) for field in fields(Row)})
