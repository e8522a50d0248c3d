"""Measures what each technique earns: alone, on average and on top of all others; and what all of them earn together.

Papers add a technique to a plain net, or take it from the best one, and report either. The two differ where techniques
do each other's work: what each earns alone then adds up to more than they earn together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.estimates.anova import Array, Term
from analysis.estimates.two_phase import Ends
from grid.config import MATTERS_WITH


@dataclass(frozen=True)
class Estimate:
    """A difference of accuracies with its interval, as fractions."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Earned:
    """What the best levels earn over the plain ones, the first of each factor, by the two-way model.

    Factors whose plain level may be the best are averaged over. All accuracies are fractions.
    """

    table: pd.DataFrame
    """A row per factor, in their order: `factor`, `level`, `plain` (the level it is compared with), then `alone` (added
    to plain levels of the other rows), `average` (over all levels of all factors) and `last` (added to the best levels
    of the other rows), each with `_low` and `_high` of an interval of its own."""
    summed: Estimate
    """The sum of `alone`."""
    together: Estimate
    """What all of them earn at once."""
    beyond: Estimate
    """`together` - `summed`: below 0 where they do each other's work."""


def measure_earned(
    terms: Sequence[Term],
    weights: Mapping[str, Array],
    ends: Ends,
    differences: pd.DataFrame,
    confidence: float,
) -> Earned | None:
    """Return what the best levels earn.

    None unless two factors surely have a better level than their first, and all pairs of such factors can be estimated.

    Args:
        terms: Of the two-way model.
        weights: From `analysis.estimates.anova.effect_weights`.
        ends: Of all trials.
        differences: As in `analysis.estimates.final_effects.FinalEffects`.
        confidence: Of all intervals, in (0, 1).
    """
    known = {term.name: term for term in terms}
    best = {
        factor: (level, known[factor].labels[0][1])
        for factor, level in _best_levels(differences).items()
        if factor not in MATTERS_WITH and _is_sure(differences, factor, level, known[factor].labels[0][1])
    }
    pairs = list(combinations(best, 2))
    if not pairs or any(f"{first} x {second}" not in known for first, second in pairs):
        return None

    def gain(factor: str, *, others_at_best: bool) -> Array:
        rest = {name: levels[0 if others_at_best else 1] for name, levels in best.items()}
        level, plain = best[factor]
        return _cell(known, weights, rest | {factor: level}) - _cell(known, weights, rest | {factor: plain})

    alone = np.array([gain(factor, others_at_best=False) for factor in best])
    average = np.array([_main(known, weights, factor, *levels) for factor, levels in best.items()])
    last = np.array([gain(factor, others_at_best=True) for factor in best])
    top, bottom = ({factor: levels[place] for factor, levels in best.items()} for place in (0, 1))
    together = _cell(known, weights, top) - _cell(known, weights, bottom)
    sums = np.vstack([alone, average, last, alone.sum(axis=0), together, together - alone.sum(axis=0)])
    values, errors, degrees = ends.weighted_sums(sums)
    half = stats.t.ppf((1 + confidence) / 2, degrees) * errors
    bounds = np.column_stack([values, values - half, values + half])
    estimates = [Estimate(*map(float, row)) for row in bounds]
    columns: dict[str, Any] = {
        "factor": list(best),
        "level": [level for level, _ in best.values()],
        "plain": [plain for _, plain in best.values()],
    }
    for index, name in enumerate(("alone", "average", "last")):
        mine = estimates[index * len(best) : (index + 1) * len(best)]
        columns[name] = [estimate.value for estimate in mine]
        columns[f"{name}_low"] = [estimate.low for estimate in mine]
        columns[f"{name}_high"] = [estimate.high for estimate in mine]
    return Earned(pd.DataFrame(columns), *estimates[-3:])


def describe_together(earned: Earned) -> str:
    """Say in one sentence what the levels earn together, and whether that is what they earn alone."""
    together, summed, beyond = earned.together, earned.summed, earned.beyond
    text = f"together they earn {_points(together)} points; alone they add up to {_points(summed)}"
    if not beyond.low > 0 and not beyond.high < 0:
        return f"{text}, which may be the same (beyond the sum: {_points(beyond)})"
    meaning = "help each other" if beyond.value > 0 else "do in part the same work"
    return f"{text}: they {meaning} (beyond the sum: {_points(beyond)})"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.2f} ±{100 * estimate.half:.2f}"


def _best_levels(differences: pd.DataFrame) -> dict[str, str]:
    """Return the level of each factor that is below no other; none where levels are equal but for rounding."""
    best: dict[str, str] = {}
    for factor, rows in differences.groupby("factor", sort=False):
        tops = set(rows["level"]) - set(rows["other_level"])
        best |= {str(factor): str(tops.pop())} if len(tops) == 1 else {}
    return best


def _is_sure(differences: pd.DataFrame, factor: str, level: str, plain: str) -> bool:
    chosen = differences[["factor", "level", "other_level"]].eq([factor, level, plain]).all(axis=1)
    return bool(differences.loc[chosen, "sure"].any())


def _cell(terms: Mapping[str, Term], weights: Mapping[str, Array], levels: Mapping[str, str]) -> Array:
    """Return the weights of the accuracy at some levels, beside the mean, `[trial]`; averaged over other factors."""
    singles = [weights[name][terms[name].labels.index((name, level))] for name, level in levels.items()]
    pairs = [
        weights[name][terms[name].labels.index((first, levels[first], second, levels[second]))]
        for first, second in combinations(levels, 2)
        for name in [f"{first} x {second}"]
    ]
    return np.asarray(np.sum([*singles, *pairs], axis=0))


def _main(terms: Mapping[str, Term], weights: Mapping[str, Array], factor: str, level: str, plain: str) -> Array:
    labels = terms[factor].labels
    return np.asarray(weights[factor][labels.index((factor, level))] - weights[factor][labels.index((factor, plain))])
