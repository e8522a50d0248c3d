"""What the ranking rests on: how each trial ended, and at which learning-rate scale each cell is ranked."""

from collections.abc import Iterator

import pandas as pd

from grid.config import InputError, factors_among
from grid.metrics import RUNG_METRIC, recorded_rungs
from grid.ranking import TrialSummary, choose_scales
from grid.wording import count


def summarise_trials(trials: pd.DataFrame) -> Iterator[TrialSummary]:
    """Yield how each trial ended.

    Args:
        trials: From `analysis.store.read_experiment`.
    """
    rungs, factors = recorded_rungs(trials.columns), factors_among(trials.columns)
    for row in trials.to_dict("records"):
        yield TrialSummary(
            cell={factor: row[factor] for factor in factors},
            seed=row["seed"],
            lr_scale=row["lr_scale"],
            epochs=row["epochs"],
            status=row["status"],
            epochs_run=row["epochs_run"],
            best_val_accuracy=_known(row["best_val_accuracy"]),
            final_val_accuracy=_known(row["final_val_accuracy"]),
            stop_epoch=None if pd.isna(row["stop_epoch"]) else int(row["stop_epoch"]),
            rung_accuracies={rung: row[f"{RUNG_METRIC}{rung}"] for rung in rungs},
        )


def sample_of_order(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that started before each one that has not ended: of these, none is missing for being long.

    The order in which trials start is random, but not that in which they end: stopped ones are early, so that levels
    with many survivors would look bad while a grid runs, or once its budget is spent.

    Raises:
        InputError: There is none.
    """
    if "before_unfinished" not in trials:
        return trials
    kept = trials[trials["before_unfinished"]]
    if kept.empty:
        raise InputError("all trials that have ended started after one that still runs; wait for that one")
    return kept


def explain_order(trials: pd.DataFrame) -> Iterator[str]:
    """Yield how many trials `sample_of_order` leaves out."""
    left_out = 0 if "before_unfinished" not in trials else int((~trials["before_unfinished"]).sum())
    if left_out:
        yield (
            f"{count(left_out, 'trial')} left out that started after one that has not ended: of those, long ones are "
            "still missing"
        )


def at_best_scales(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of each cell at the learning-rate scale at which it is ranked.

    Raises:
        InputError: The trials are of several budgets.
    """
    if trials["lr_scale"].nunique() < 2:
        return trials
    chosen = {(*cell.cell.values(), cell.lr_scale) for cell in choose_scales(summarise_trials(trials))}
    kept = [
        row in chosen for row in trials[[*factors_among(trials.columns), "lr_scale"]].itertuples(index=False, name=None)
    ]
    return trials[kept]


def explain_scales(trials: pd.DataFrame) -> Iterator[str]:
    """Yield which learning-rate scale counts, if there are several."""
    if (scales := trials["lr_scale"].nunique()) > 1:
        yield f"of {scales} learning-rate scales, for each cell the one counts at which it is ranked"


def _known(value: float) -> float | None:
    return None if pd.isna(value) else value
