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

    surely_better: bool
    """Whether all of these levels surely beat their plain ones. Otherwise fewer than two do, and these are the second
    levels of all factors of two, which the data did not choose, whatever they earn."""

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
    """Return what the best levels earn, or what all second levels of factors of two earn if fewer than two are sure.

    None if there are no two such factors either, or if a pair of them can't be estimated.

    Args:
        terms: Of the two-way model.
        weights: From `analysis.estimates.anova.effect_weights`.
        ends: Of all trials.
        differences: As in `analysis.estimates.final_effects.FinalEffects`.
        confidence: Of all intervals, in (0, 1).
    """
    model = _Model({term.name: term for term in terms}, weights)
    levels = {factor: [label[1] for label in model.terms[factor].labels] for factor in differences["factor"].unique()}
    levels = {factor: names for factor, names in levels.items() if factor not in MATTERS_WITH}
    surely = differences[differences["sure"]]
    sure = set(zip(surely["factor"], surely["level"], surely["other_level"], strict=True))
    best = {factor: level for factor, level in _best_levels(differences).items() if factor in levels}
    best = {factor: level for factor, level in best.items() if (factor, level, levels[factor][0]) in sure}
    if not (surely_better := len(best) > 1):
        best = {factor: names[1] for factor, names in levels.items() if len(names) == 2}
    plain = {factor: levels[factor][0] for factor in best}
    pairs = list(combinations(best, 2))
    if not pairs or any(f"{first} x {second}" not in model.terms for first, second in pairs):
        return None
    contrasts = {
        "alone": [model.cell(plain | {factor: best[factor]}) - model.cell(plain) for factor in best],
        "average": [model.cell({factor: best[factor]}) - model.cell({factor: plain[factor]}) for factor in best],
        "last": [model.cell(best) - model.cell(best | {factor: plain[factor]}) for factor in best],
    }
    summed, together = np.sum(contrasts["alone"], axis=0), model.cell(best) - model.cell(plain)
    rows = {name: _estimate(ends, gains, confidence) for name, gains in contrasts.items()}
    sums = _estimate(ends, [summed, together, together - summed], confidence)
    columns: dict[str, Any] = {"factor": list(best), "level": list(best.values()), "plain": list(plain.values())}
    for name, found in rows.items():
        columns |= {name: found[:, 0], f"{name}_low": found[:, 1], f"{name}_high": found[:, 2]}
    return Earned(surely_better, pd.DataFrame(columns), *(Estimate(*map(float, row)) for row in sums))


@dataclass(frozen=True)
class _Model:
    """The two-way model: its terms by name, and the weights that turn the ends of trials into its effects."""

    terms: Mapping[str, Term]
    weights: Mapping[str, Array]

    def cell(self, levels: Mapping[str, str]) -> Array:
        """Return the weights of the accuracy at some levels, beside the mean, `[trial]`; a mean over other factors."""
        singles = [self._weights(name, (name, level)) for name, level in levels.items()]
        pairs = [
            self._weights(f"{first} x {second}", (first, levels[first], second, levels[second]))
            for first, second in combinations(levels, 2)
        ]
        return np.asarray(np.sum([*singles, *pairs], axis=0))

    def _weights(self, term: str, label: tuple[str, ...]) -> Array:
        return np.asarray(self.weights[term][self.terms[term].labels.index(label)])


def _estimate(ends: Ends, contrasts: Sequence[Array], confidence: float) -> Array:
    """Return the value of each contrast and the ends of its interval, `[contrast, 3]`."""
    values, errors, degrees = ends.weighted_sums(np.vstack(contrasts))
    half = stats.t.ppf((1 + confidence) / 2, degrees) * errors
    return np.column_stack([values, values - half, values + half])


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
