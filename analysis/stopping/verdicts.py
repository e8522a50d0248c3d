"""What the stopping rule decided about each trial, and would have decided about the unstopped controls.

ASHA's verdict on a control is recorded. Stores of older versions lack it; there the rule is replayed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from analysis.multiplicity import holm
from grid.config import factors_among
from grid.metrics import RUNG_METRIC

FACTOR = 3
"""One trial in this many continues at a rung, unless the grid's manifest says otherwise."""
WITHIN = ("model",)
"""Factors whose levels trials share with those that they are compared with, unless the manifest says otherwise."""
HELD_BACK = 1 / 3
"""A level is held back if its trials continue at less than this share of the rate of the factor's other levels."""


def has_verdicts(trials: pd.DataFrame) -> bool:
    """Return whether the store has ASHA's verdicts on controls.

    It has if any control has one, or has the chance with which it was drawn, which is recorded since verdicts are. A
    control without a verdict then passed every rung. Stores of older versions, and tables without these columns, have
    neither.
    """
    controls = trials[trials["control"]]
    return bool(any(controls[name].notna().any() for name in ("control_chance", "stop_epoch") if name in controls))


def stop_epochs(
    trials: pd.DataFrame, rungs: Sequence[int], *, factor: int = FACTOR, within: Sequence[str] = WITHIN
) -> "pd.Series[float]":
    """Return the rung at which ASHA stopped each trial or, if it is a control, would have; NaN if at none.

    What ASHA decided is recorded. Only if the store lacks its verdicts on controls (`has_verdicts`), the rule is
    replayed on them, with all arrivals at once, whereas ASHA compares each trial with earlier arrivals.

    Args:
        trials: From `analysis.store.read_experiment`; all with the same budget.
        rungs: Epochs below the budget at which trials were stopped.
        factor: As for `audit_stopping`.
        within: As for `audit_stopping`.
    """
    decided = trials["epochs_run"].where(trials["status"] == "stopped").astype(float)
    if has_verdicts(trials):
        verdicts = trials["stop_epoch"].astype(float)
    else:
        verdicts = replay(trials, rung_thresholds(trials, rungs, factor, within), within)
    return decided.where(~trials["control"], verdicts)


def rung_thresholds(
    trials: pd.DataFrame, rungs: Sequence[int], factor: int, within: Sequence[str] = WITHIN
) -> dict[tuple[str, int], float]:
    """Return the lowest accuracy that continues, by group and rung: the ceil(n / factor)-th best of n arrivals.

    As in the ASHA that wrote the stores without verdicts, the arrivals are all trials with a value at the rung,
    including controls that the rule would have stopped before, and each trial that diverged on the way there, as worse
    than any other.

    Reference: Li et al. 2020, https://arxiv.org/abs/1810.05934 (here with all arrivals at once)
    """
    thresholds = {}
    for name, group in trials.groupby(_groups(trials, within)):
        on_the_way = group["status"] == "diverged"
        for rung in rungs:
            values = group[f"{RUNG_METRIC}{rung}"]
            arrived = np.sort(values.where(values.notna() | ~on_the_way, -math.inf).dropna())
            on_the_way &= values.notna()
            best = math.ceil(len(arrived) / factor)
            thresholds[str(name), rung] = float(arrived[-best]) if best else -math.inf
    return thresholds


def replay(
    trials: pd.DataFrame, thresholds: Mapping[tuple[str, int], float], within: Sequence[str] = WITHIN
) -> "pd.Series[float]":
    """Return the first rung at which each trial is below the threshold; NaN if it is at no rung that it reached."""
    stops, groups = pd.Series(math.nan, index=trials.index), _groups(trials, within)
    for (group, rung), threshold in thresholds.items():
        below = (groups == group) & (trials[f"{RUNG_METRIC}{rung}"] < threshold)
        stops = stops.mask(stops.isna() & below, rung)
    return stops


def _groups(trials: pd.DataFrame, within: Sequence[str]) -> "pd.Series[str]":
    """Return the name of the group in which each trial is compared."""
    groups = pd.Series("", index=trials.index)
    for factor in within:
        groups = (groups + " " + trials[factor].astype(str)).str.strip()
    return groups


def held_back(
    trials: pd.DataFrame, stops: "pd.Series[float]", rungs: Sequence[int], confidence: float = 0.95
) -> pd.DataFrame:
    """Return the levels that a rung all but removes, so that the ranking says little about them.

    These are the levels of which fewer continued than of the factor's other levels, significantly (Fisher's exact test,
    one-sided, with Holm's correction over all levels and rungs) and relevantly (`HELD_BACK`). As the rule fixes how
    many continue in all, the exact test fits: under the null hypothesis the numbers are hypergeometric. Seeds and
    scales of one cell count as independent trials; the second condition guards against what that exaggerates.

    Args:
        trials: Those of one budget.
        stops: From `stop_epochs`.
        rungs: Epochs at which trials were stopped.
        confidence: 1 - the chance of naming any level if all continue alike.

    Returns:
        `factor`, `level`, `rung`, `rate` and `others` (shares of the level's trials and of the other levels' trials
        that reached the rung and continued), `p` (corrected). Of a level that several rungs hold back, the first rung.

    References:
        Fisher 1935, The Logic of Inductive Inference, https://doi.org/10.2307/2342435
        Holm 1979, https://www.jstor.org/stable/4615733
    """
    rows = [row for rung in rungs for row in _rates_at(trials, stops, rung)]
    table = pd.DataFrame(rows, columns=["factor", "level", "rung", "rate", "others", "p"])
    if table.empty:
        return table
    table["p"] = holm(table["p"])
    found = table[(table["p"] < 1 - confidence) & (table["rate"] < HELD_BACK * table["others"])]
    return found.drop_duplicates(["factor", "level"]).reset_index(drop=True)


def _rates_at(
    trials: pd.DataFrame, stops: "pd.Series[float]", rung: int
) -> Iterator[tuple[str, str, int, float, float, float]]:
    """Yield for each level with what share it and the other levels continued at a rung, and the uncorrected p."""
    arrived = trials[f"{RUNG_METRIC}{rung}"].notna() & ~(stops < rung)
    continued = (stops[arrived] != rung).astype(int)
    for factor in factors_among(trials.columns):
        levels = trials.loc[arrived, factor].astype(str)
        table = continued[levels != ""].groupby(levels).agg(["sum", "count"])
        went, came = table["sum"].sum(), table["count"].sum()
        for level, passed, number in table.itertuples() if len(table) > 1 else ():
            others, rest = went - passed, came - number
            p = float(hypergeom.cdf(passed, came, went, number))
            yield factor, str(level), rung, passed / number, others / rest, p
