"""Ways to estimate what levels do at the end of training, from the trials of a grid that was stopped early."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from analysis.estimates.anova import estimable_terms, estimate, fit_terms, in_order
from analysis.estimates.final_effects import measure_final_effects
from analysis.estimates.rung_effects import measure_rung_effects
from grid.config import FACTORS, InputError

CONFIDENCE = 0.95
KEYS = ["factor", "level", "other_factor", "other_level"]


def truth(unstopped: pd.DataFrame) -> pd.DataFrame:
    """Return the effects in the same grid if none of its trials is stopped: least squares on all ends.

    Args:
        unstopped: Trials that were all trained to the end.

    Returns:
        `KEYS` (the last two empty for a main effect) and `effect`.
    """
    effects = measure_rung_effects(unstopped.filter(regex="^(?!val_accuracy_at_)"))
    tables = [effects.levels.assign(other_factor="", other_level=""), effects.interactions]
    return pd.concat(tables, ignore_index=True)[[*KEYS, "effect"]]


def ours(trials: pd.DataFrame) -> pd.DataFrame:
    """Estimate all effects by the function that `analysis.effects` calls."""
    effects = measure_final_effects(trials, confidence=CONFIDENCE)
    tables = [effects.levels.assign(other_factor="", other_level=""), effects.interactions]
    return pd.concat(tables, ignore_index=True)[[*KEYS, "effect", "low", "high"]]


def completed_only(trials: pd.DataFrame) -> pd.DataFrame:
    """Estimate main effects from the trials that completed, as one does who takes a stopped grid for a whole one."""
    return _main_effects(trials[trials["status"] == "completed"])


def controls_only(trials: pd.DataFrame) -> pd.DataFrame:
    """Estimate main effects from the unstopped controls alone, which nothing selected."""
    return _main_effects(trials[(trials["status"] == "completed") & trials["control"]])


ESTIMATORS: Mapping[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "completed only": completed_only,
    "controls only": controls_only,
    "ours": ours,
}


def _main_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the main effects by least squares; no rows if they can't be separated."""
    observed = rows.assign(accuracy=rows["final_val_accuracy"])
    varied = {factor: in_order(factor, rows[factor]) for factor in FACTORS if rows[factor].nunique() > 1}
    try:
        terms = [term for term in estimable_terms(observed, varied, complete=False) if len(term.parts) == 1]
    except InputError:
        return pd.DataFrame(columns=[*KEYS, "effect", "low", "high"])
    fitted = fit_terms(observed, terms)
    if not fitted.df_resid:
        return pd.DataFrame(columns=[*KEYS, "effect", "low", "high"])
    return estimate(fitted, terms, CONFIDENCE)[[*KEYS, "effect", "low", "high"]]


def compare(estimates: pd.DataFrame, true: pd.DataFrame) -> pd.DataFrame:
    """Return `KEYS`, `error`, `half` (of the interval's width) and `covered` for each effect that is estimated."""
    both = estimates.merge(true, on=KEYS, suffixes=("", "_true"))
    error = both["effect"] - both["effect_true"]
    covered = (both["low"] <= both["effect_true"]) & (both["effect_true"] <= both["high"])
    return both[KEYS].assign(error=error, half=(both["high"] - both["low"]) / 2, covered=covered)


def root_mean_square(values: "pd.Series[float]") -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))
