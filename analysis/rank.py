"""Ranks the cells of a grid: `python -m analysis.rank --experiment smoke-glyphs`.

Finalists first, then cells that had the full budget, then the stopped ones by rung (`grid.ranking` has the rule), each
with an interval and with the cells that it can't be told apart from. Diverged and failed trials have no rank; they are
counted.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pandas as pd
from scipy import stats

from analysis.store import Experiment, read_experiment
from grid.arguments import Parser
from grid.config import FACTORS, InputError, cell_name
from grid.metrics import RUNG_METRIC, STATUSES
from grid.ranking import RankedCell, TrialSummary
from grid.ranking import rank_cells as rank_summaries

CONFIDENCE = 0.95
RESAMPLES = 9999
RANK_COLUMNS = ("rank", "tier", "group", *FACTORS, "epochs_run", "epochs", "seeds", "lr_scale", "val_accuracy")
INTERVAL_COLUMNS = ("spread", "low", "high", "test_accuracy")


def rank_cells(
    trials: pd.DataFrame, finalists: pd.DataFrame | None = None, *, val_images: int | None = None
) -> pd.DataFrame:
    """Rank cells by the best evidence there is.

    Args:
        trials: `analysis.store.Experiment.trials`.
        finalists: `.finalists` of the same experiment; None or empty before `grid.confirm`.
        val_images: Images behind each accuracy; None if unknown.

    Returns:
        A row per ranked cell, best first: `rank`, `tier` (finalist, completed, stopped), `group` (cells of a tier and a
        number of epochs that can't be told apart from the best of them; from 1; NaN if nothing is known of the noise),
        the factors, `epochs_run` (that all replicates had), `epochs` (full budget), `seeds`, `lr_scale`,
        `val_accuracy` (mean), `spread` (standard deviation over the seeds; NaN for one), `low` and `high` (95 %
        interval of the mean), `test_accuracy` (mean; NaN unless tested).

    Raises:
        InputError: The trials are of several budgets.
    """
    confirmed = _rank_finalists(finalists) if finalists is not None and len(finalists) else _no_cells()
    cells = rank_summaries(_summaries(trials))
    known = {tuple(row) for row in confirmed[list(FACTORS)].itertuples(index=False)}
    rest = _rank_trials([cell for cell in cells if tuple(cell.cell.values()) not in known], cells, val_images)
    ranked = pd.concat([part for part in (confirmed, rest) if len(part)] or [rest], ignore_index=True)
    ranked.insert(0, "rank", range(1, len(ranked) + 1))
    return ranked[[*RANK_COLUMNS, *INTERVAL_COLUMNS]]


def bootstrap_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the expanded percentile bootstrap interval of a mean; NaN for fewer than two values.

    The plain percentile interval of few values is too narrow; its level is raised so that for normal values it is as
    wide as Student's. No resample leaves the range of the values, which under five of them is too narrow at any level
    (two values hold their mean between them half of the time), so each end is Student's where that lies farther out.

    Reference: Hesterberg 2015, https://arxiv.org/abs/1411.5279 (section 4.1.1, 5.3)
    """
    count = len(values)
    if count < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    quantile = np.sqrt(count / (count - 1)) * stats.t.ppf((1 - confidence) / 2, count - 1)
    interval = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=1 - 2 * stats.norm.cdf(quantile),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    mean = float(np.mean(values))
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * float(np.std(values, ddof=1)) / np.sqrt(count)
    return float(min(interval.low, mean - half)), float(max(interval.high, mean + half))


def _summaries(trials: pd.DataFrame) -> Iterable[TrialSummary]:
    rungs = [name for name in trials.columns if name.startswith(RUNG_METRIC)]
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
            rung_accuracies={int(name.removeprefix(RUNG_METRIC)): row[name] for name in rungs},
        )


def _rank_finalists(finalists: pd.DataFrame) -> pd.DataFrame:
    """Return the finalists, best first; those whose paired difference to the best may be 0 are of one group.

    The noise is that of cells x seeds beyond the sum of both, pooled over all finalists.
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

    def differ(one: RankedCell, other: RankedCell) -> bool:
        shared = one.accuracies.keys() & other.accuracies.keys()
        differences = [one.accuracies[seed] - other.accuracies[seed] for seed in shared]
        return bool(shared) and abs(np.mean(differences)) > reach * error * np.sqrt(2 / len(shared))

    return table.assign(group=_group(ranked, differ) if degrees else np.nan)


def _rank_trials(cells: Sequence[RankedCell], all_cells: Sequence[RankedCell], val_images: int | None) -> pd.DataFrame:
    rows, groups = [], []
    for epochs_run in sorted({cell.epochs_run for cell in cells}, reverse=True):
        some = [cell for cell in cells if cell.epochs_run == epochs_run]
        errors, degrees = _standard_errors(
            some, [cell for cell in all_cells if cell.epochs_run == epochs_run], val_images
        )
        quantile, reach = stats.t.ppf((1 + CONFIDENCE) / 2, degrees), _reach(len(some), degrees)
        for cell in some:
            half = quantile * errors[id(cell)]
            tier = "completed" if epochs_run == cell.epochs else "stopped"
            rows.append(_row(cell, tier) | {"low": cell.mean - half, "high": cell.mean + half})
        found = _group(some, _farther_apart(reach, errors))
        groups += [group if np.isfinite(errors[id(cell)]) else np.nan for group, cell in zip(found, some, strict=True)]
    return pd.DataFrame(rows, columns=list(_no_cells().columns)).assign(group=groups)


def _farther_apart(reach: float, errors: Mapping[int, float]) -> Callable[[RankedCell, RankedCell], bool]:
    """Return the test whether two cells differ by more than `reach` standard errors."""
    return lambda one, other: abs(one.mean - other.mean) > reach * float(np.hypot(errors[id(one)], errors[id(other)]))


def _reach(count: int, degrees: float) -> float:
    """Return how many standard errors of a difference tell two of `count` cells apart, whichever two are looked at.

    The best of many equal cells is best by luck, and the more there are, the farther ahead: at 1.96 errors, 300 equal
    cells fall into several groups each time. At Tukey's quantile equal cells do so in one ranking of twenty.

    Reference: Tukey 1953; Kramer 1956, https://doi.org/10.2307/3001469
    """
    if count < 2 or not degrees:
        return np.inf
    return float(stats.studentized_range.ppf(CONFIDENCE, count, degrees) / np.sqrt(2))


def _standard_errors(
    cells: Sequence[RankedCell], as_far: Sequence[RankedCell], val_images: int | None
) -> tuple[dict[int, float], float]:
    """Return the standard error of each cell's mean, by its id, and the degrees of freedom that it is known with.

    From the spread between seeds, pooled over the cells of as many epochs; where no cell has two seeds, that of a share
    of `val_images` images, which leaves out what another seed would change.
    """
    degrees = sum(len(cell.accuracies) - 1 for cell in as_far)
    if not degrees:
        return {
            id(cell): float(np.sqrt(cell.mean * (1 - cell.mean) / (val_images or np.nan))) for cell in cells
        }, np.inf
    squares = sum(float(np.sum((np.array(list(cell.accuracies.values())) - cell.mean) ** 2)) for cell in as_far)
    return {id(cell): float(np.sqrt(squares / degrees / len(cell.accuracies))) for cell in cells}, degrees


def _paired_error(cells: Sequence[RankedCell]) -> tuple[float, int]:
    """Return the residual standard deviation of cells x seeds, some perhaps missing, and its degrees of freedom."""
    known = [(cell, seed) for cell in range(len(cells)) for seed in cells[cell].accuracies]
    values = np.array([cells[cell].accuracies[seed] for cell, seed in known])
    seeds = sorted({seed for _, seed in known})
    design = np.zeros((len(known), len(cells) + len(seeds)))
    for row, (cell, seed) in enumerate(known):
        design[row, cell] = design[row, len(cells) + seeds.index(seed)] = 1
    degrees = len(known) - int(np.linalg.matrix_rank(design)) if known else 0
    if not degrees:
        return np.nan, 0
    residuals = values - design @ np.linalg.lstsq(design, values)[0]
    return float(np.sqrt(residuals @ residuals / degrees)), degrees


def _group(cells: Sequence[RankedCell], differ: Callable[[RankedCell, RankedCell], bool]) -> list[float]:
    """Number the cells: one that can't be told apart from the best of the current group belongs to it."""
    groups: list[float] = []
    best = None
    for cell in cells:
        if best is None or differ(best, cell):
            best = cell
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


def format_ranking(cells: pd.DataFrame, experiment: Experiment, count: int) -> str:
    """Return the first `count` cells and the best of each model as text, and what could not be ranked."""
    trials = experiment.trials
    finalists = cells[cells["tier"] == "finalist"]
    blocks = []
    if len(finalists):
        blocks.append(f"finalists, trained again on new seeds\n{_table(finalists, 'test')}")
    others = cells[cells["tier"] != "finalist"]
    blocks.append(f"cells of the grid\n{_table(others.head(count), 'epochs')}")
    counts = trials["status"].value_counts()
    by_status = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if status in counts)
    blocks.append(f"{min(count, len(others)):,} of {len(others):,} cells shown; {len(trials):,} trials: {by_status}")
    if not len(cells):
        blocks.append("no trial reached an accuracy: all diverged or failed; try --lr-scales 0.1")
    models = cells["model"].unique()
    if len(models) > 1:
        best = [f"best {model}\n{_table(cells[cells['model'] == model].head(3), 'epochs')}" for model in models]
        blocks += best
    return "\n\n".join([*blocks, "\n".join([*_doubts(cells, experiment.val_images), *experiment.notes])]).rstrip()


def _doubts(cells: pd.DataFrame, val_images: int | None) -> list[str]:
    """Say how much of the order is sure."""
    grid = cells[cells["tier"] != "finalist"]
    if not len(grid):
        return []
    leader = grid.iloc[0]
    if grid["seeds"].max() > 1:
        return ["+-: 95 % interval from the spread between seeds; one letter under tie: can't be told apart"]
    more = "add replicates with grid.run --seeds 3, or run grid.confirm"
    if val_images is None:
        return [f"one seed per cell and no count of images in the store: ties are unknown; {more}"]
    tied = int(((grid["group"] == leader["group"]) & (grid["epochs_run"] == leader["epochs_run"])).sum())
    error = np.sqrt(leader["val_accuracy"] * (1 - leader["val_accuracy"]) / val_images)
    return [
        f"one seed per cell: the best {tied} can't be told apart (tie a); +- is the error of a",
        f"share of {val_images:,} images (standard error {100 * error:.2f} points), not that of a seed;",
        more,
    ]


def _table(cells: pd.DataFrame, last: str) -> str:
    """Return cells as lines of at most 80 columns, with the usual levels.

    Args:
        cells: From `rank_cells`.
        last: What the column before the cell shows: `epochs`, or `test` accuracy.
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
    """Return group 1 as a, 26 as z, 27 as aa; nothing for NaN."""
    letters, group = "", 0 if pd.isna(group) else int(group)
    while group:
        group, letter = divmod(group - 1, len(ascii_lowercase))
        letters = ascii_lowercase[letter] + letters
    return letters


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ranking and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(prog="python -m analysis.rank", description="Rank the cells of a grid.")
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment")
    parser.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="cells to print (20)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all cells to a file")
    options = parser.parse_args(arguments)
    try:
        if options.top < 1:
            raise InputError(f"--top must be 1 or more, got {options.top}")
        experiment = read_experiment(options.store, options.experiment)
        cells = rank_cells(experiment.trials, experiment.finalists, val_images=experiment.val_images)
        if options.csv:
            cells.to_csv(options.csv, index=False)
    except (InputError, OSError) as error:
        print(f"analysis.rank: {error}", file=sys.stderr)
        return 2
    print(format_ranking(cells, experiment, options.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
