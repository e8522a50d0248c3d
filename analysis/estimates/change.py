"""Whether two experiments differ, and at which levels: from the trials that both have, one by one.

A trial that both have has the same cell, seed and learning-rate scale, so what the seed does to both cancels as far as
their code computes the same. Only trials count that were not chosen by their accuracy: after the first rung all of
them, at the end the unstopped controls. Survivors owe part of their accuracy to luck, which the other experiment does
not repeat, so a level with many survivors would seem to have become worse.

References:
    HC3: MacKinnon and White 1985, https://doi.org/10.1016/0304-4076(85)90158-7; many comparisons: Holm 1979.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.estimates.anova import (
    INTERCEPT,
    Array,
    Levels,
    Term,
    coding_matrix,
    effect_weights,
    estimable_terms,
    in_order,
)
from analysis.multiplicity import holm
from grid.config import SETTINGS, InputError, factors_among
from grid.metrics import FEWEST_PAIRS_LEFT, RUNG_METRIC, recorded_rungs

CONFIDENCE = 0.95
POWER = 0.9
"""Chance with which a change of the size that is named would be found."""


@dataclass(frozen=True)
class Change:
    """What the second of two experiments has beyond the first; accuracies are fractions."""

    epoch: int
    """After which they are compared."""
    at_the_end: bool
    """Whether that is the end of the full budget."""
    pairs: int
    """Trials that both have, not chosen by their accuracy."""
    identical: int
    """Of these, those with the same accuracy to the last bit."""
    noise: float
    """Standard deviation of a pair's difference around what levels explain."""
    mean: float
    """Of the differences, over all combinations of levels, equally weighted."""
    low: float
    high: float
    findable: float
    """How large a change of the mean must be to be found with a chance of `POWER`."""
    levels: pd.DataFrame
    """`factor`, `level`, `change` (beyond that of the factor's other levels), `low`, `high`, `p` (after Holm's
    correction over all levels and the mean), `moved` (whether it differs from 0), `findable`. Of two levels only the
    second."""
    p: float
    """Of the mean, after the same correction."""

    @property
    def moved(self) -> bool:
        """Whether the mean differs from 0."""
        return self.p < 1 - CONFIDENCE


def pair_trials(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that both experiments have: the factors, `seed`, `lr_scale`, and all columns of both.

    `unchosen` says of each whether it would have been trained to the end whatever its accuracy was.

    A factor that only one of them knows has its default in the other.

    Args:
        first: From `analysis.store.read_experiment`; its columns get the suffix `_1`.
        second: The same; `_2`.
    """
    factors = factors_among({*first.columns, *second.columns})
    keys = [*factors, "seed", "lr_scale"]
    filled = [
        table.assign(
            unchosen=_unchosen(table), **{name: SETTINGS[name] for name in factors if name not in table}
        ).drop_duplicates(keys)
        for table in (first, second)
    ]
    return filled[0].merge(filled[1], on=keys, suffixes=("_1", "_2"))


def change_at_rung(pairs: pd.DataFrame) -> Change:
    """Compare after the first rung that both experiments have.

    Raises:
        InputError: They have none in common, or too few pairs.
    """
    names = {str(name).removesuffix("_1") for name in pairs}
    rungs = recorded_rungs({name for name in names if {f"{name}_1", f"{name}_2"} <= set(pairs)})
    if not rungs:
        raise InputError("they have no rung in common")
    column = f"{RUNG_METRIC}{rungs[0]}"
    return _measure(pairs, column, rungs[0], at_the_end=False)


def change_at_end(pairs: pd.DataFrame) -> Change:
    """Compare at the end of the full budget, by the unstopped controls of both.

    Raises:
        InputError: The budgets differ, or there are too few pairs.
    """
    budgets = sorted({*map(int, pairs["epochs_1"]), *map(int, pairs["epochs_2"])})
    if len(budgets) > 1:
        raise InputError(f"their budgets differ ({' and '.join(map(str, budgets))} epochs)")
    return _measure(
        pairs[pairs["unchosen_1"] & pairs["unchosen_2"]],
        "final_val_accuracy",
        budgets[0] if budgets else 0,
        at_the_end=True,
    )


def _unchosen(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Return which trials of a whole experiment would have been trained to the end whatever their accuracy was."""
    drawn_at_once = trials["control"] & trials["stopped_at_epoch"].isna()
    never_stopped = bool((trials["status"] != "stopped").all() and trials["stop_epoch"].isna().all())
    return drawn_at_once | never_stopped


def _measure(pairs: pd.DataFrame, column: str, epoch: int, *, at_the_end: bool) -> Change:
    values = pairs[[f"{column}_1", f"{column}_2"]].to_numpy(dtype=float)
    kept = np.isfinite(values).all(axis=1)
    rows, differences = pairs[kept].reset_index(drop=True), values[kept, 1] - values[kept, 0]
    if rows.empty:
        raise InputError("they have no unstopped control in common" if at_the_end else "no trial reached it in both")
    terms = _main_effects(rows)
    design = coding_matrix(terms)
    left = len(rows) - design.shape[1]
    labels, contrasts = _contrasts(terms)
    basis = np.linalg.qr(design)[0]
    residuals = differences - basis @ (basis.T @ differences)
    leverage = np.sum(basis**2, axis=1)
    errors = np.sqrt(contrasts**2 @ (residuals / np.maximum(1 - leverage, 1e-6)) ** 2)  # HC3
    found = contrasts @ differences
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(errors > 0, np.abs(found) / errors, np.where(found == 0, 0.0, np.inf))
    p = holm(pd.Series(2 * stats.t.sf(statistic, left))).sort_index().to_numpy()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, left) * errors
    findable = (stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / len(p), left) + stats.t.ppf(POWER, left)) * errors
    table = pd.DataFrame(labels, columns=["factor", "level"]).assign(
        change=found[1:],
        low=(found - half)[1:],
        high=(found + half)[1:],
        p=p[1:],
        moved=p[1:] < 1 - CONFIDENCE,
        findable=findable[1:],
    )
    return Change(
        epoch=epoch,
        at_the_end=at_the_end,
        pairs=len(rows),
        identical=int((differences == 0).sum()),
        noise=float(np.sqrt(np.sum(residuals**2) / left)),
        mean=float(found[0]),
        low=float((found - half)[0]),
        high=float((found + half)[0]),
        findable=float(findable[0]),
        levels=table,
        p=float(p[0]),
    )


def _main_effects(rows: pd.DataFrame) -> list[Term]:
    """Return the terms of the mean and of each factor's levels.

    Raises:
        InputError: The pairs are too few for them.
    """
    factors = factors_among(rows.columns)
    varied: Levels = {factor: names for factor in factors if len(names := in_order(factor, rows[factor])) > 1}
    terms = [term for term in estimable_terms(rows, varied, complete=False) if len(term.parts) == 1]
    needed = coding_matrix(terms).shape[1] + FEWEST_PAIRS_LEFT
    if len(rows) < needed:
        raise InputError(f"{len(rows)} pairs are too few to compare {len(varied)} factors; {needed} are needed")
    return terms


def _contrasts(terms: Sequence[Term]) -> tuple[list[tuple[str, ...]], Array]:
    """Return the levels that are compared with the other levels of their factor, and what to weigh the trials with.

    Returns:
        (factor, level) of each; and `[1 + level, trial]`, the first row for the mean.
    """
    weights = effect_weights(terms)
    labels: list[tuple[str, ...]] = []
    contrasts = [weights[INTERCEPT]]
    for term in terms:
        if term.name != "seed":
            levels = len(term.labels)
            shown = slice(None) if levels > 2 else slice(1, None)
            labels += term.labels[shown]
            contrasts.append(weights[term.name][shown] * levels / (levels - 1))  # from the mean to the others' mean
    return labels, np.vstack(contrasts)
