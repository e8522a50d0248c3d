"""Ranks cells by the strongest evidence: finalists, then cells with the full budget, then stopped ones by rung.

`grid.ranking` has the rule. Each cell has an interval for another seed and one for other images, and is or is not tied
with the best (`grid.ties`). Diverged and failed trials are counted, not ranked.
"""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.store import Experiment
from analysis.summaries import summarise_trials
from grid.config import factors_among
from grid.ranking import RankedCell
from grid.ranking import rank_cells as rank_summaries
from grid.ties import CONFIDENCE, compare_paired, image_variance, seed_variance, tied_with_best

PLACE_COLUMNS = ("rank", "tier", "tied")
TRAINING_COLUMNS = ("epochs_run", "epochs", "lr_scale")
REPLICATE_COLUMNS = ("seeds", "diverged", "stopped", "controls", "controls_end")
INTERVAL_COLUMNS = ("val_accuracy", "spread", "seed_half", "image_half", "low", "high")
TEST_COLUMNS = ("test_accuracy_as_validated", "test_seed_half", "test_image_half", "test_accuracy")
BALANCED_COLUMNS = ("val_balanced_accuracy", "test_balanced_accuracy")
BEHIND_COLUMNS = ("behind", "behind_seed_half", "behind_image_half")
COLUMNS = (*TRAINING_COLUMNS, *REPLICATE_COLUMNS, *INTERVAL_COLUMNS, *TEST_COLUMNS, *BALANCED_COLUMNS, *BEHIND_COLUMNS)
"""After `PLACE_COLUMNS` and the factors."""
Row = dict[str, Any]
Right = NDArray[np.float64] | None


def rank_cells(
    trials: pd.DataFrame, finalists: pd.DataFrame | None = None, *, val_images: int | None = None
) -> pd.DataFrame:
    """Rank cells by the strongest evidence available for each.

    Args:
        trials: `analysis.store.Experiment.trials`.
        finalists: `.finalists` of the same experiment; None or empty before `grid.confirm`.
        val_images: Number of validation images; None if unknown.

    Returns:
        A row per ranked cell, best first.

        - `rank`, `tier` (finalist, completed, stopped), `tied` (whether it may be the best: finalists among finalists,
          other cells among all that trained to the full budget in the grid), the factors;
        - `epochs_run` (reached by at least half of the replicates), `epochs` (full budget), `lr_scale`;
        - numbers of replicates: `seeds` (with an accuracy after `epochs_run` epochs), `diverged`, `stopped` (before);
          `controls` (unstopped controls that count as stopped where ASHA would have stopped them) and `controls_end`
          (their mean accuracy at the end; NaN if all diverged later);
        - `val_accuracy` (mean over `seeds`), `spread` (standard deviation over them; NaN for one), `seed_half` and
          `image_half` (half-widths of its 95% intervals for another seed and for other images; NaN if unknown), `low`
          and `high` (95% interval for both);
        - of tested finalists, else NaN: `test_accuracy_as_validated` (mean over the nets, classes weighted as in the
          validation data), its `test_seed_half` and `test_image_half`, and `test_accuracy` (plain share);
        - `val_balanced_accuracy` and `test_balanced_accuracy`: means over the classes at the end of the budget and in
          the test, averaged over the nets; NaN if not recorded, as where all classes have one size;
        - of finalists after the first, else NaN: how far they are `behind` it on the seeds and images that both have,
          with the half-widths of 95% intervals for another seed and for other images (NaN if unknown).

    Raises:
        InputError: The trials have different budgets.
    """
    confirmed = _rank_finalists(finalists, val_images) if finalists is not None and len(finalists) else []
    factors = factors_among(trials.columns)
    known = {tuple(row[factor] for factor in factors) for row in confirmed}
    rest = [row for row in _rank_trials(trials, val_images) if tuple(row[factor] for factor in factors) not in known]
    columns = [*PLACE_COLUMNS, *factors, *COLUMNS]
    ranked = pd.DataFrame([*confirmed, *rest], columns=columns).astype({"tied": bool})
    return ranked.assign(rank=range(1, len(ranked) + 1))


def rank_refits(experiment: Experiment) -> pd.DataFrame:
    """Return the cells that were trained on most validation images as well, as `rank_cells` returns finalists.

    Their validation accuracy is of the few images that were still held out; nothing is chosen by it.
    """
    refits = experiment.refits
    if refits.empty:
        return refits
    return rank_cells(experiment.trials[:0], refits).assign(tied=False)


def _rank_trials(trials: pd.DataFrame, val_images: int | None) -> list[Row]:
    """Return a row per cell of the grid, best first."""
    cells = rank_summaries(summarise_trials(trials))
    ties = tied_with_best(cells, val_images=val_images)
    tiers = ("completed" if cell.epochs_run == cell.epochs else "stopped" for cell in cells)
    rows = zip(_rows(cells, val_images), tiers, ties, _balanced(trials, cells), strict=True)
    return [row | {"tier": tier, "tied": tied} | balanced for row, tier, tied, balanced in rows]


def _rank_finalists(finalists: pd.DataFrame, val_images: int | None) -> list[Row]:
    """Return a row per finalist, best first."""
    cells = [cell for cell in rank_summaries(summarise_trials(finalists)) if cell.epochs_run == cell.epochs]
    ties = tied_with_best(cells, val_images=val_images, paired=True)
    more = _tests(finalists, cells), _balanced(finalists, cells), _behind(finalists, cells, val_images)
    rows = zip(_rows(cells, val_images), *more, ties, strict=True)
    return [
        row | test | balanced | behind | {"tier": "finalist", "tied": tied}
        for row, test, balanced, behind, tied in rows
    ]


def _rows(cells: Sequence[RankedCell], val_images: int | None) -> list[Row]:
    """Return the columns of each cell, but for the place; seeds spread alike in all cells of one number of epochs."""
    spreads = {
        epochs_run: seed_variance([cell for cell in cells if cell.epochs_run == epochs_run])
        for epochs_run in {cell.epochs_run for cell in cells}
    }
    rows = []
    for cell in cells:
        seed_half, image_half = _halves(cell.mean, len(cell.accuracies), spreads[cell.epochs_run], val_images)
        half = combine_halves(seed_half, image_half)
        interval = {"seed_half": seed_half, "image_half": image_half, "low": cell.mean - half, "high": cell.mean + half}
        rows.append(_row(cell) | interval)
    return rows


def _row(cell: RankedCell) -> Row:
    accuracies = list(cell.accuracies.values())
    return {
        **cell.cell,
        "epochs_run": cell.epochs_run,
        "epochs": cell.epochs,
        "lr_scale": cell.lr_scale,
        "seeds": len(accuracies),
        "diverged": len(cell.diverged),
        "stopped": cell.stopped,
        "controls": len(cell.spared),
        "controls_end": cell.spared_mean,
        "val_accuracy": cell.mean,
        "spread": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else np.nan,
    }


def _halves(
    mean: float, seeds: int, variance: tuple[float, float], images: int | None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the half-widths of a mean accuracy's intervals for another seed and for other images.

    Args:
        mean: Over the seeds.
        seeds: How many.
        variance: From `grid.ties.seed_variance`.
        images: That it was measured on; None if unknown.
        confidence: Level of each.
    """
    between_seeds, degrees = variance
    upper = (1 + confidence) / 2
    seed_half = stats.t.ppf(upper, degrees) * np.sqrt(between_seeds / seeds) if degrees else np.nan
    return float(seed_half), float(stats.norm.ppf(upper) * np.sqrt(image_variance(mean, images)))


def combine_halves(first: float, second: float) -> float:
    """Return the half-width for two independent sources of error, of which one may be unknown.

    Reference: Zou and Donner 2008, https://doi.org/10.1002/sim.3095
    """
    return np.nan if np.isnan([first, second]).all() else float(np.sqrt(np.nansum([first**2, second**2])))


def _behind(finalists: pd.DataFrame, cells: Sequence[RankedCell], val_images: int | None) -> list[dict[str, float]]:
    """Return how far each cell is behind the first one; an image that both nets get right tells nothing apart."""
    if not cells:
        return []
    behind, errors, degrees = compare_paired(cells)
    seed_halves = errors * (stats.t.ppf((1 + CONFIDENCE) / 2, degrees) if degrees else np.nan)
    factors = factors_among(finalists.columns)
    correct = {
        (*(row[factor] for factor in factors), row["seed"]): right_of(row["val_correct"], val_images)
        for row in finalists.to_dict("records")
    }
    rows = [dict.fromkeys(BEHIND_COLUMNS, np.nan)]
    for number, cell in enumerate(cells[1:], start=1):
        shared = cells[0].accuracies.keys() & cell.accuracies.keys()
        pairs = [(correct[*cells[0].cell.values(), seed], correct[*cell.cell.values(), seed]) for seed in shared]
        figures = (behind[number], seed_halves[number], _image_half(pairs))
        rows.append(dict(zip(BEHIND_COLUMNS, map(float, figures), strict=True)))
    return rows


def _image_half(pairs: Sequence[tuple[Right, Right]]) -> float:
    """Return the half-width for other images of a mean difference between nets that were measured on the same images.

    Args:
        pairs: What both nets got right, for each seed.

    Reference: with one seed, McNemar 1947, https://doi.org/10.1007/BF02295996
    """
    known = [(first, second) for first, second in pairs if first is not None and second is not None]
    if not known or len(known) < len(pairs):
        return np.nan
    differences = np.mean([first - second for first, second in known], axis=0)
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2) * differences.std(ddof=1) / np.sqrt(len(differences)))


def right_of(val_correct: str, images: int | None) -> Right:
    """Return 1 for each validation image that a net got right, else 0, `[image]`; None if the store does not say.

    Args:
        val_correct: See `analysis.trial_table.COLUMNS`.
        images: Number of validation images; None if unknown.
    """
    try:
        packed = np.frombuffer(b64decode(val_correct, validate=True), np.uint8)
    except ValueError:  # another program may have written anything
        return None
    if not images or images < 2 or len(packed) != -(-images // 8):
        return None
    return np.unpackbits(packed, count=images).astype(float)


def _tests(finalists: pd.DataFrame, cells: Sequence[RankedCell]) -> list[dict[str, float]]:
    """Return the columns about the test of each finalist; those of untested ones are NaN."""
    factors, name = list(factors_among(finalists.columns)), TEST_COLUMNS[0]
    tested = finalists[finalists[name].notna()]
    by_cell = tested.groupby(factors)[name]
    degrees = len(tested) - by_cell.ngroups
    squares = float(((tested[name] - by_cell.transform("mean")) ** 2).sum())
    variance = (squares / degrees if degrees else np.nan, float(degrees))
    measured = {"mean": (name, "mean"), "plain": ("test_accuracy", "mean"), "images": ("test_images", "mean")}
    nets = tested.groupby(factors, as_index=False).agg(**measured, seeds=(name, "size")).to_dict("records")
    known = {tuple(row[factor] for factor in factors): row for row in nets}

    def columns(row: Mapping[Any, Any]) -> tuple[float, ...]:
        images = None if np.isnan(row["images"]) else int(row["images"])
        return (row["mean"], *_halves(row["mean"], row["seeds"], variance, images), row["plain"])

    rows = (known.get(tuple(cell.cell.values())) for cell in cells)
    values = (columns(row) if row else [np.nan] * len(TEST_COLUMNS) for row in rows)
    return [dict(zip(TEST_COLUMNS, row, strict=True)) for row in values]


def _balanced(trials: pd.DataFrame, cells: Sequence[RankedCell]) -> list[dict[str, float]]:
    """Return the balanced accuracies of each cell at the end of the budget: means over the seeds that count there."""
    factors, missing = list(factors_among(trials.columns)), dict.fromkeys(BALANCED_COLUMNS, np.nan)
    values = trials.reindex(columns=list(BALANCED_COLUMNS)).to_dict("records")
    keys = trials[[*factors, "lr_scale", "seed"]].itertuples(index=False, name=None)
    known = dict(zip(keys, values, strict=True))

    def of(cell: RankedCell) -> dict[str, float]:
        rows = [known.get((*cell.cell.values(), cell.lr_scale, seed), missing) for seed in cell.accuracies]
        return {name: float(np.mean([row[name] for row in rows])) for name in BALANCED_COLUMNS}

    return [of(cell) if cell.accuracies and cell.epochs_run == cell.epochs else missing for cell in cells]
