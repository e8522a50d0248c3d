"""Rows and tables of `grid_speed`: read a contender's store, keep rows in a CSV file, print tables and ratios."""

import csv
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev

from scipy.stats import t as student

from grid.config import InputError
from grid.wording import count

OURS = "ours"
POINTS = """
SELECT metrics.run_uuid, metrics.key, metrics.value
FROM metrics JOIN runs ON runs.run_uuid = metrics.run_uuid
WHERE runs.lifecycle_stage = 'active' AND metrics.key IN ('val_accuracy', 'epoch_seconds') AND NOT metrics.is_nan
"""


@dataclass(frozen=True)
class Stored:
    """What a contender trained, according to its MLflow store."""

    trials: int
    """Runs that trained at least one epoch."""
    epochs: int
    """Epochs of all trials, diverged ones included (they have a time and no accuracy)."""
    epoch_seconds: float
    """Sum over all epochs of all trials."""
    best_val_accuracy: float
    """In [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of one contender from start to exit: a line of the CSV file."""

    model: str
    contender: str
    repeat: int
    """From 0; the runs of one repeat are compared with each other."""
    wall_seconds: float
    trials: int
    epochs: int
    """Epochs trained by all trials."""
    epoch_seconds: float
    """Sum over all epochs, and so over all slots."""
    best_val_accuracy: float
    cells: int
    """Cells that should have been trained."""
    seeds: int
    """Trials of each cell."""
    budget: int
    """Epochs of a trial that is not stopped."""
    data: str
    train_images: int
    val_images: int
    slots: int
    commit: str

    @property
    def setting(self) -> tuple[object, ...]:
        """The settings that all rows of one table share."""
        data = self.data, self.train_images, self.val_images
        return self.cells, self.seeds, self.budget, *data, self.slots

    @property
    def seconds_per_epoch(self) -> float:
        """Wall time per epoch trained."""
        return self.wall_seconds / self.epochs

    @property
    def samples_per_second(self) -> float:
        """Training images seen per second of wall time."""
        return self.train_images * self.epochs / self.wall_seconds

    @property
    def overhead(self) -> float:
        """Seconds per trial in which a slot trained nothing."""
        return (self.wall_seconds - self.epoch_seconds / self.slots) / self.trials


def read_store(path: Path) -> Stored:
    """Read an MLflow database.

    Raises:
        InputError: No trial in it has trained an epoch.
    """
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        points = database.execute(POINTS).fetchall()
    seconds = [(run, value) for run, name, value in points if name == "epoch_seconds"]
    accuracies = [value for _, name, value in points if name == "val_accuracy"]
    if not seconds or not accuracies:
        raise InputError(f"{path} holds no trial that has trained an epoch")
    return Stored(len({run for run, _ in seconds}), len(seconds), sum(value for _, value in seconds), max(accuracies))


def append_row(path: Path, row: Row) -> None:
    """Add a line to a CSV file, after a header line if the file is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def read_rows(path: Path) -> list[Row]:
    """Read a CSV file that `append_row` wrote.

    Raises:
        InputError: The file can't be read, or `append_row` did not write it.
    """
    names = [field.name for field in fields(Row)]
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                raise InputError(f"{path} was not written by --csv: its header line differs")
            return [_read_row(line) for line in reader]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a damaged line: {error}") from error


def check_alike(rows: Sequence[Row]) -> None:
    """Check that all rows of each model have the same settings.

    Raises:
        InputError: Two rows of a model can't be in one table.
    """
    for model, group in by_model(rows):
        for row in group:
            if row.setting != group[0].setting:
                settings = f"{group[0].setting} and {row.setting}"
                raise InputError(f"{model} has runs with different settings, {settings}; use one file per setting")


def by_model(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each model with its rows, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.model, []).append(row)
    yield from groups.items()


def report(rows: Sequence[Row]) -> str:
    """Return all tables, at most 80 columns wide.

    Raises:
        InputError: There are no rows, or rows of one model have different settings.
    """
    if not rows:
        raise InputError("there are no runs to report")
    check_alike(rows)
    tables = "\n\n".join(table(group) for _, group in by_model(rows))
    return f"{tables}\n\ncommit {', '.join(dict.fromkeys(row.commit for row in rows))}"


def table(rows: Sequence[Row]) -> str:
    """Return the table of one model, and how ours compares with each other contender."""
    first, contenders = rows[0], list(dict.fromkeys(row.contender for row in rows))
    counts = f"{first.train_images:,} training and {first.val_images:,} validation images"
    size = f"{first.cells} cells{_seeds(first.seeds)}, {count(first.budget, 'epoch')}"
    lines = [
        f"{first.model}: {size}, {first.slots} at once",
        f"{first.data}: {counts}",
        f"{'contender':<9} {'wall s':>6} {'(min-max)':<13} {'trials':>6} {'epochs':>6} {'s/epoch':>7} "
        f"{'samples/s':>9} {'overhead':>8} {'best':>7}",
    ]
    lines += [_line(name, [row for row in rows if row.contender == name]) for name in contenders]
    lines.append("medians; overhead: seconds per trial in which a slot trained nothing")
    for name in contenders:
        if name != OURS and (pairs := paired(rows, OURS, name)):
            lines += ["", *compare(name, pairs)]
    return "\n".join(lines + _notes(rows))


def paired(rows: Iterable[Row], first: str, second: str) -> list[tuple[Row, Row]]:
    """Return the runs of two contenders that belong to the same repeat."""
    found = {(row.contender, row.repeat): row for row in rows}
    repeats = sorted({repeat for _, repeat in found})
    return [(found[first, n], found[second, n]) for n in repeats if (first, n) in found and (second, n) in found]


def compare(name: str, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Return how many times as fast and how much more accurate ours is, with the spread over the repeats."""
    fast = [other.seconds_per_epoch / ours.seconds_per_epoch for ours, other in pairs]
    whole = [other.wall_seconds / ours.wall_seconds for ours, other in pairs]
    better = [100 * (ours.best_val_accuracy - other.best_val_accuracy) for ours, other in pairs]
    return [
        f"ours against {name}, {count(len(pairs), 'paired repeat')}: median (min to max)",
        f"  as fast, per trained epoch  {_spread(fast, '{:.2f}')} times",
        f"  as fast, start to exit      {_spread(whole, '{:.2f}')} times",
        f"  best validation accuracy    {_spread(better, '{:+.2f}')} points",
        f"  not slower to learn         {_learning(better)}",
    ]


def _learning(better: Sequence[float]) -> str:
    """Say whether the best accuracy of ours is at least theirs, by Student's interval over the repeats."""
    if len(better) < 2:
        return "not known from one repeat"
    half = float(student.ppf(0.975, len(better) - 1)) * stdev(better) / len(better) ** 0.5
    low, high = mean(better) - half, mean(better) + half
    verdict = "yes" if low >= 0 else "no" if high < 0 else "open"
    return f"{verdict} (mean {mean(better):+.2f}, 95% interval {low:+.2f} to {high:+.2f})"


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


def _seeds(number: int) -> str:
    return "" if number == 1 else f" x {count(number, 'seed')}"


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
