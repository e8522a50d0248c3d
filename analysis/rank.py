"""Ranks the cells of a grid: `python -m analysis.rank --experiment smoke-glyphs`.

Finalists come first, then cells with the full budget, then stopped ones by rung (`grid.ranking` has the rule). Each
cell has an interval and a letter that it shares with the cells it is tied with. Diverged and failed trials are counted,
not ranked.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from analysis.store import Experiment, read_experiment
from grid.arguments import Parser, add_experiment, add_store, run_command
from grid.config import FACTORS, InputError, cell_name
from grid.metrics import RUNG_METRIC, STATUSES, rung_epochs
from grid.ranking import RankedCell, TrialSummary
from grid.ranking import rank_cells as rank_summaries
from grid.wording import count

CONFIDENCE = 0.95
RESAMPLES = 9999
RANK_COLUMNS = ("rank", "tier", "group", *FACTORS, "epochs_run", "epochs", "seeds", "lr_scale", "val_accuracy")
INTERVAL_COLUMNS = ("spread", "low", "high", "test_accuracy")
Measured = tuple[RankedCell, float]
"""A cell and the standard error of its mean."""
SHOWN_PER_MODEL = 3
Item = TypeVar("Item")


def rank_cells(
    trials: pd.DataFrame, finalists: pd.DataFrame | None = None, *, val_images: int | None = None
) -> pd.DataFrame:
    """Rank cells by the strongest evidence available for each.

    Args:
        trials: `analysis.store.Experiment.trials`.
        finalists: `.finalists` of the same experiment; None or empty before `grid.confirm`.
        val_images: Number of validation images; None if unknown.

    Returns:
        A row per ranked cell, best first: `rank`, `tier` (finalist, completed, stopped), `group` (from 1; cells of the
        same tier and number of epochs that are tied with the best of the group; NaN if the noise is unknown), the
        factors, `epochs_run` (reached by all replicates), `epochs` (full budget), `seeds`, `lr_scale`, `val_accuracy`
        (mean), `spread` (standard deviation over the seeds; NaN for one seed), `low` and `high` (95% interval of the
        mean), `test_accuracy` (mean; NaN unless tested).

    Raises:
        InputError: The trials have different budgets.
    """
    confirmed = _rank_finalists(finalists) if finalists is not None and len(finalists) else _no_cells()
    cells = rank_summaries(_summaries(trials))
    finalist_cells = {tuple(row) for row in confirmed[list(FACTORS)].itertuples(index=False)}
    others = [cell for cell in cells if tuple(cell.cell.values()) not in finalist_cells]
    rest = _rank_trials(others, cells, val_images)
    ranked = pd.concat([table for table in (confirmed, rest) if len(table)] or [rest], ignore_index=True)
    ranked.insert(0, "rank", range(1, len(ranked) + 1))
    return ranked[[*RANK_COLUMNS, *INTERVAL_COLUMNS]]


def bootstrap_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the expanded percentile bootstrap interval of a mean; NaN for fewer than two values.

    The plain percentile interval is too narrow for few values; its level is raised so that for normal values it is as
    wide as Student's. Resampled means stay within the range of the values, and with fewer than five values that range
    is too narrow at any level (the range of two values covers their mean half of the time). Each end is therefore
    Student's where that lies farther out.

    Reference: Hesterberg 2015, https://arxiv.org/abs/1411.5279 (sections 4.1.1 and 5.3)
    """
    size = len(values)
    if size < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    quantile = np.sqrt(size / (size - 1)) * stats.t.ppf((1 - confidence) / 2, size - 1)
    interval = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=1 - 2 * stats.norm.cdf(quantile),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    mean = float(np.mean(values))
    half = stats.t.ppf((1 + confidence) / 2, size - 1) * float(np.std(values, ddof=1)) / np.sqrt(size)
    return float(min(interval.low, mean - half)), float(max(interval.high, mean + half))


def _summaries(trials: pd.DataFrame) -> Iterable[TrialSummary]:
    rungs = rung_epochs(trials.columns)
    for row in trials.to_dict("records"):
        best = row["best_val_accuracy"]
        yield TrialSummary(
            cell={factor: row[factor] for factor in FACTORS},
            seed=row["seed"],
            lr_scale=row["lr_scale"],
            epochs=row["epochs"],
            status=row["status"],
            epochs_run=row["epochs_run"],
            best_val_accuracy=None if pd.isna(best) else best,
            rung_accuracies={rung: row[f"{RUNG_METRIC}{rung}"] for rung in rungs},
        )


def _rank_finalists(finalists: pd.DataFrame) -> pd.DataFrame:
    """Return the finalists, best first, in groups by their differences on shared seeds.

    The noise is what cells and seeds, added up, leave unexplained, pooled over all finalists.
    """
    tested = finalists.groupby(list(FACTORS))["test_accuracy"].mean()
    ranked = [cell for cell in rank_summaries(_summaries(finalists)) if cell.epochs_run == cell.epochs]
    rows = []
    for cell in ranked:
        low, high = bootstrap_interval(list(cell.accuracies.values()))
        test_accuracy = tested.get(tuple(cell.cell.values()), np.nan)
        rows.append(_row(cell, "finalist") | {"low": low, "high": high, "test_accuracy": test_accuracy})
    table = pd.DataFrame(rows, columns=list(_no_cells().columns))
    error, degrees = _paired_error(ranked)
    reach = _reach(len(ranked), degrees)

    def differ(best: RankedCell, cell: RankedCell) -> bool:
        shared = best.accuracies.keys() & cell.accuracies.keys()
        differences = [best.accuracies[seed] - cell.accuracies[seed] for seed in shared]
        return bool(shared) and abs(np.mean(differences)) > reach * error * np.sqrt(2 / len(shared))

    return table.assign(group=_group(ranked, differ) if degrees else np.nan)


def _rank_trials(cells: Sequence[RankedCell], all_cells: Sequence[RankedCell], val_images: int | None) -> pd.DataFrame:
    """Return cells of the grid, best first; the noise is that of all cells, finalists' included."""
    rows = []
    for epochs_run in sorted({cell.epochs_run for cell in cells}, reverse=True):
        same_epochs = [cell for cell in cells if cell.epochs_run == epochs_run]
        variance = _seed_variance([cell for cell in all_cells if cell.epochs_run == epochs_run])
        rows += _rank_same_epochs(same_epochs, variance, val_images)
    return pd.DataFrame(rows, columns=list(_no_cells().columns))


def _rank_same_epochs(
    cells: Sequence[RankedCell], variance: tuple[float | None, float], val_images: int | None
) -> list[dict[str, object]]:
    """Return a row for each of the cells of one number of epochs, with its interval and its group."""
    between_seeds, degrees = variance
    measured = [(cell, _standard_error(cell, between_seeds, val_images)) for cell in cells]
    quantile, reach = stats.t.ppf((1 + CONFIDENCE) / 2, degrees), _reach(len(cells), degrees)

    def differ(best: Measured, other: Measured) -> bool:
        return abs(best[0].mean - other[0].mean) > reach * float(np.hypot(best[1], other[1]))

    rows = []
    for (cell, error), group in zip(measured, _group(measured, differ), strict=True):
        tier = "completed" if cell.epochs_run == cell.epochs else "stopped"
        interval = {"low": cell.mean - quantile * error, "high": cell.mean + quantile * error}
        rows.append(_row(cell, tier) | interval | {"group": group if np.isfinite(error) else np.nan})
    return rows


@cache  # half a second for each new pair
def _reach(cells: int, degrees: float) -> float:
    """Return how many standard errors of a difference separate two of so many cells, whichever pair is compared.

    The best of many equal cells is best by luck, and the more cells, the larger its lead: at 1.96 standard errors, 300
    equal cells always fall into several groups. At Tukey's quantile they do in one ranking of twenty.

    Reference: Tukey 1953; Kramer 1956, https://doi.org/10.2307/3001469
    """
    if cells < 2 or not degrees:
        return np.inf
    return float(stats.studentized_range.ppf(CONFIDENCE, cells, degrees) / np.sqrt(2))


def _seed_variance(cells: Sequence[RankedCell]) -> tuple[float | None, float]:
    """Return the variance between seeds, pooled over the cells, and its degrees of freedom.

    None and infinity where no cell has two seeds.
    """
    degrees = sum(len(cell.accuracies) - 1 for cell in cells)
    squares = sum(float(np.sum((np.array(list(cell.accuracies.values())) - cell.mean) ** 2)) for cell in cells)
    return (squares / degrees, degrees) if degrees else (None, np.inf)


def _standard_error(cell: RankedCell, seed_variance: float | None, val_images: int | None) -> float:
    """Return the standard error of a cell's mean; NaN if it is unknown.

    Without a variance between seeds it is that of a share of `val_images`, which ignores how another seed would differ.
    """
    if seed_variance is not None:
        return float(np.sqrt(seed_variance / len(cell.accuracies)))
    return float(np.sqrt(cell.mean * (1 - cell.mean) / (val_images or np.nan)))


def _paired_error(cells: Sequence[RankedCell]) -> tuple[float, int]:
    """Return the residual standard deviation of cells x seeds, possibly incomplete, and its degrees of freedom."""
    observed = [(number, seed) for number, cell in enumerate(cells) for seed in cell.accuracies]
    values = np.array([cells[number].accuracies[seed] for number, seed in observed])
    seeds = sorted({seed for _, seed in observed})
    # 2 cells x 2 seeds, a row per accuracy: [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]; its rank is 3
    design = np.zeros((len(observed), len(cells) + len(seeds)))
    for row, (number, seed) in enumerate(observed):
        design[row, number] = design[row, len(cells) + seeds.index(seed)] = 1
    degrees = len(observed) - int(np.linalg.matrix_rank(design)) if observed else 0
    if not degrees:
        return np.nan, 0
    residuals = values - design @ np.linalg.lstsq(design, values)[0]
    return float(np.sqrt(residuals @ residuals / degrees)), degrees


def _group(ranked: Sequence[Item], differ: Callable[[Item, Item], bool]) -> list[float]:
    """Number the groups of a ranking from 1: a new one starts with each item that differs from the best of the last."""
    groups: list[float] = []
    best = None
    for item in ranked:
        if best is None or differ(best, item):
            best = item
            groups.append(groups[-1] + 1 if groups else 1)
        else:
            groups.append(groups[-1])
    return groups


def _row(cell: RankedCell, tier: str) -> dict[str, object]:
    accuracies = list(cell.accuracies.values())
    return {
        "tier": tier,
        "group": np.nan,
        **cell.cell,
        "epochs_run": cell.epochs_run,
        "epochs": cell.epochs,
        "seeds": len(accuracies),
        "lr_scale": cell.lr_scale,
        "val_accuracy": cell.mean,
        "spread": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else np.nan,
        "low": np.nan,
        "high": np.nan,
        "test_accuracy": np.nan,
    }


def _no_cells() -> pd.DataFrame:
    return pd.DataFrame(columns=[*RANK_COLUMNS[1:], *INTERVAL_COLUMNS])


def format_ranking(cells: pd.DataFrame, experiment: Experiment, top: int) -> str:
    """Return the finalists, the `top` cells of the grid and the best of each model as text, with notes.

    Args:
        cells: From `rank_cells`.
        experiment: That the cells are of.
        top: How many cells of the grid to show.
    """
    trials = experiment.trials
    finalists = cells[cells["tier"] == "finalist"]
    blocks = []
    if len(finalists):
        blocks.append(f"finalists, trained again on new seeds\n{_table(finalists, 'test')}")
    others = cells[cells["tier"] != "finalist"]
    blocks.append(f"cells of the grid\n{_table(others.head(top), 'epochs')}")
    counts = trials["status"].value_counts()
    by_status = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if status in counts)
    shown = f"{min(top, len(others)):,} of {count(len(others), 'cell')} shown"
    blocks.append(f"{shown}; {count(len(trials), 'trial')}: {by_status}")
    if not len(cells):
        blocks.append("no trial has an accuracy: all diverged or failed; try --lr-scales 0.1")
    models = cells["model"].unique()
    if len(models) > 1:
        of_models = [cells[cells["model"] == model].head(SHOWN_PER_MODEL) for model in models]
        blocks += [f"best {model}\n{_table(best, 'epochs')}" for model, best in zip(models, of_models, strict=True)]
    return "\n\n".join([*blocks, "\n".join([*_doubts(cells, experiment.val_images), *experiment.notes])]).rstrip()


def _doubts(cells: pd.DataFrame, val_images: int | None) -> list[str]:
    """Return lines on how certain the order is."""
    grid = cells[cells["tier"] != "finalist"]
    if not len(grid):
        return []
    leader = grid.iloc[0]
    if grid["seeds"].max() > 1:
        return [
            "+-: 95% interval from the spread between seeds",
            "tie: cells that share a letter are tied with the best of them",
        ]
    more = "add replicates with grid.run --seeds 3, or run grid.confirm"
    if val_images is None:
        return [f"one seed per cell and no count of images in the store: ties are unknown; {more}"]
    tied = int(((grid["group"] == leader["group"]) & (grid["epochs_run"] == leader["epochs_run"])).sum())
    error = np.sqrt(leader["val_accuracy"] * (1 - leader["val_accuracy"]) / val_images)
    return [
        f"one seed per cell: {f'the best {tied} are tied (a)' if tied > 1 else 'no cell is tied with the best'}; "
        "+- is the sampling error of",
        f"{val_images:,} images (standard error {100 * error:.2f} points), without the spread between seeds;",
        more,
    ]


def _table(cells: pd.DataFrame, last: str) -> str:
    """Return cells as lines of at most 80 columns, unless a cell has many levels that are not the default.

    Args:
        cells: From `rank_cells`.
        last: What the column before the cell shows: `epochs` or `test` accuracy.
    """
    lines = [f"{'rank':>4} {'tie':<3} {'val acc':>7} {'+-':>5} {'seeds':>5} {last:>6}  cell"]
    for row in cells.to_dict("records"):
        half = "" if pd.isna(row["low"]) else f"{50 * (row['high'] - row['low']):.2f}"
        budget = f"{row['epochs_run']}/{row['epochs']}"
        test = "" if pd.isna(row["test_accuracy"]) else f"{row['test_accuracy']:.2%}"
        figures = (
            f"{row['rank']:>4} {tie_letters(row['group']):<3} {row['val_accuracy']:>7.2%} {half:>5} {row['seeds']:>5}"
        )
        cell = cell_name({factor: str(row[factor]) for factor in FACTORS})
        scale = "" if row["lr_scale"] == 1 else f" lr x{row['lr_scale']:g}"
        lines.append(f"{figures} {budget if last == 'epochs' else test:>6}  {cell}{scale}")
    return "\n".join(lines)


def tie_letters(group: float) -> str:
    """Return group 1 as a, 26 as z, 27 as aa, and NaN as an empty string."""
    letters, group = "", 0 if pd.isna(group) else int(group)
    while group:
        group, letter = divmod(group - 1, len(ascii_lowercase))
        letters = ascii_lowercase[letter] + letters
    return letters


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ranking and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.rank", description="Rank the cells of a grid, with intervals and ties between cells."
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument("--top", type=int, default=20, metavar="N", help="cells of the grid to print (20)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all ranked cells to FILE")
    options = parser.parse_args(arguments)

    def rank() -> int:
        if options.top < 1:
            raise InputError(f"--top must be 1 or more, got {options.top}")
        experiment = read_experiment(options.store, options.experiment)
        cells = rank_cells(experiment.trials, experiment.finalists, val_images=experiment.val_images)
        if options.csv:
            cells.to_csv(options.csv, index=False)
        print(format_ranking(cells, experiment, options.top))
        return 0

    return run_command(parser.name, rank, errors=(InputError, OSError))


if __name__ == "__main__":
    sys.exit(main())
