"""Analysis of variance with two-way interactions, for complete and incomplete grids; statsmodels fits the model.

The comments follow one example, two factors A and B of two levels each, with these accuracies:

           b1   b2
      a1  0.5  0.6     grand mean 0.7; effects: A -0.15, +0.15; B -0.10, +0.10; A x B +0.05, -0.05, -0.05, +0.05;
      a2  0.7  1.0     so a1 b1 is 0.7 - 0.15 - 0.10 + 0.05 = 0.5
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, product
from math import nan, prod, sqrt
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import helmert
from statsmodels.regression.linear_model import OLS, RegressionResults

from analysis.multiplicity import holm
from grid.config import MATTERS_WITH, SETTINGS, InputError, idle_settings
from grid.parts import LEVELS

TOLERANCE = 1e-9
"""Relative size below which a column adds nothing to those before it, or an observation has no residual."""
ROUNDING = 1e-20
"""Share of the raw sum of squares below which a sum of squares is rounding error; one image in 100,000 is 1e-10."""
ROWS_AT_ONCE = 1024  # of the [observation, observation] matrix, which may not fit into memory as a whole
INTERCEPT = "intercept"
"""Name of the mean of all combinations of levels among the weights of the effects."""
Array = NDArray[np.float64]
"""One or two dimensions."""
Levels = Mapping[str, tuple[str, ...]]
"""Factor -> its levels."""


@dataclass(frozen=True)
class Term:
    """A factor, the seed, or the interaction of two factors, in sum-to-zero coding."""

    parts: tuple[str, ...]
    """The factor, `("seed",)`, or the two factors."""
    labels: tuple[tuple[str, ...], ...]
    """(factor, level); for an interaction (factor, level, other factor, other level)."""
    codes: NDArray[np.intp]
    """Position of each observation in `labels`; -1 where the factor is a setting that does not matter."""
    coding: Array
    """`[label, coefficient]`: the effects are `coding @ coefficients`; they sum to zero over the levels of each part.

    With c = 1 / sqrt(2), A is `[[c], [-c]]`. Its coefficient -0.15 / c yields the effects -0.15 and +0.15.
    """

    @property
    def name(self) -> str:
        """Such as `optimizer x dropout`."""
        return " x ".join(self.parts)

    @property
    def df(self) -> int:
        """Degrees of freedom."""
        return int(self.coding.shape[1])

    @property
    def design(self) -> Array:
        """`[observation, coefficient]`; zero where the factor does not matter."""
        return np.asarray(np.where(self.codes[:, None] < 0, 0.0, self.coding[self.codes]))

    @property
    def indicators(self) -> Array:
        """`[observation, label]`: 1 for the label of each observation."""
        return np.asarray(self.codes[:, None] == np.arange(len(self.labels)), dtype=float)

    def crossed_with(self, other: "Term") -> "Term":
        """Return the interaction with another factor."""
        labels = tuple(own + others for own, others in product(self.labels, other.labels))
        idle = (self.codes < 0) | (other.codes < 0)
        codes = np.where(idle, -1, self.codes * len(other.labels) + other.codes)
        # A x B: kron([[c], [-c]], [[c], [-c]]) = [[1/2], [-1/2], [-1/2], [1/2]], for (a1 b1), (a1 b2), (a2 b1), (a2 b2)
        return Term(self.parts + other.parts, labels, codes, np.asarray(np.kron(self.coding, other.coding)))


def fit_terms(observed: pd.DataFrame, terms: Sequence[Term]) -> RegressionResults:
    """Fit the accuracies by least squares.

    Args:
        observed: A row per observation, with `accuracy`.
        terms: Of the model, coded for these observations; an intercept is added.
    """
    return OLS(observed["accuracy"].to_numpy(dtype=float), coding_matrix(terms)).fit()


def estimable_terms(observed: pd.DataFrame, varied: Levels, *, complete: bool) -> list[Term]:
    """Return the terms whose effects the observations identify: factors, then seeds, then two-way interactions.

    Args:
        observed: A row per observation, with the factors, `seed` and `accuracy`.
        varied: Factors with two or more levels.
        complete: Whether every combination of levels and seeds is observed.

    Raises:
        InputError: The observations don't identify the main effects.
    """
    factors = [_term(factor, observed[factor]) for factor in varied if len(in_order(factor, observed[factor])) > 1]
    if not factors:
        raise InputError("every factor has an accuracy at one level only; run a grid with two levels of a factor")
    blocks = factors + ([_term("seed", observed["seed"])] if observed["seed"].nunique() > 1 else [])
    if aliased := _first_aliased(blocks):
        raise InputError(
            f"{len(observed)} accuracies are too few to separate {aliased.name} from the rest; wait for more trials"
        )
    terms = blocks + [first.crossed_with(second) for first, second in combinations(factors, 2)]
    while aliased := _first_aliased(terms):
        terms.remove(aliased)
    # In an incomplete grid, interactions that use up every degree of freedom would leave no residual to test against.
    return terms if complete or len(observed) > 1 + sum(term.df for term in terms) else blocks


def mean_square(fit: RegressionResults) -> float:
    """Return the mean square of the residuals: NaN without degrees of freedom, 0 if it is only rounding error."""
    if not fit.df_resid:
        return nan
    return float(fit.ssr / fit.df_resid) if fit.ssr > ROUNDING * fit.uncentered_tss else 0.0


def variance_table(fit: RegressionResults, terms: Sequence[Term]) -> pd.DataFrame:
    """Test every term beside all terms that don't contain it (type II sums of squares).

    Omega squared may be slightly negative; clipping it would bias it. The seed is a block, not a hypothesis, so Holm's
    correction leaves it out.

    References:
        Langsrud 2003, https://doi.org/10.1023/A:1023260610025; Olejnik and Algina 2003,
        https://doi.org/10.1037/1082-989X.8.4.434; Holm 1979, https://www.jstor.org/stable/4615733.
    """
    noise, smallest = mean_square(fit), ROUNDING * fit.uncentered_tss
    total = np.float64(fit.centered_tss if fit.centered_tss > smallest else 0.0)
    table = pd.DataFrame({"term": [term.name for term in terms], "df": [term.df for term in terms]})
    squares = _type_ii(fit, terms)
    table["sum_of_squares"] = squares = np.where(squares > smallest, squares, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        table["share"] = squares / total
        table["omega_squared"] = (squares - table["df"] * noise) / (total + noise)
        table["F"] = squares / table["df"].to_numpy() / np.float64(noise)
        residual = fit.df_resid * noise if fit.df_resid else np.float64(0.0)
        last = pd.DataFrame([["residual", int(fit.df_resid), residual, residual / total]], columns=table.columns[:4])
    table["p"] = stats.f.sf(table["F"], table["df"], fit.df_resid or nan)
    tested = table["p"].notna() & (table["term"] != "seed")
    table["p_holm"] = holm(table["p"][tested])
    table = table.sort_values("share", ascending=False, kind="stable")
    return pd.concat([table, last], ignore_index=True)


def estimate(fit: RegressionResults, terms: Sequence[Term], confidence: float) -> pd.DataFrame:
    """Return the effect of every level, with `other_factor` and `other_level` empty, and of every pair of levels."""
    columns, identity = _columns(terms), np.eye(len(fit.params))
    shown = [term for term in terms if term.name != "seed"]
    contrasts = np.vstack([term.coding @ identity[columns[term.name]] for term in shown])
    effects, margins = contrasts @ fit.params, _half_widths(fit, contrasts, confidence)
    return list_labels(shown).assign(effect=effects, low=effects - margins, high=effects + margins)


def list_labels(terms: Sequence[Term]) -> pd.DataFrame:
    """Return all labels: `factor`, `level`, `other_factor`, `other_level` (both empty for a level), `observations`."""
    names = [(*label, "", "")[:4] for term in terms for label in term.labels]
    counts = np.concatenate([term.indicators.sum(axis=0).astype(int) for term in terms])
    table = pd.DataFrame(names, columns=["factor", "level", "other_factor", "other_level"])
    return table.assign(observations=counts)


def effect_weights(terms: Sequence[Term]) -> dict[str, Array]:
    """Return the weights that turn observations into effects.

    Returns:
        `[label, observation]` by the name of each term, and for the mean of all combinations under `INTERCEPT`.
    """
    inverse, columns = np.linalg.pinv(coding_matrix(terms)), _columns(terms)
    effects = {term.name: np.asarray(term.coding @ inverse[columns[term.name]]) for term in terms}
    return {INTERCEPT: inverse[:1], **effects}


def in_order(name: str, values: "pd.Series[Any]") -> tuple[Any, ...]:
    """Return the distinct values of a factor or of the seed: known levels in their usual order, then others sorted.

    Values that are all numbers are sorted as such; of others a setting's default comes first. Empty ones, of a setting
    that does not matter, are left out.
    """
    present = set(values.unique()) - {""}
    known = (*LEVELS.get(name, ()), *_sorted(present, SETTINGS.get(name)))
    return tuple(value for value in dict.fromkeys(known) if value in present)


def number_of_cells(varied: Levels) -> int:
    """Return how many cells a grid has, with cells that differ only where a setting does not matter as one."""
    if not set(MATTERS_WITH) & set(varied):
        return prod(map(len, varied.values()))
    cells = (dict(zip(varied, levels, strict=True)) for levels in product(*varied.values()))
    return len({tuple((cell | dict.fromkeys(idle_settings(cell), "")).values()) for cell in cells})


def _sorted(values: Iterable[Any], first: str | None) -> list[Any]:
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values, key=lambda value: (value != first, value))


def _term(name: str, values: "pd.Series[Any]") -> Term:
    labels = in_order(name, values)
    codes = pd.Index(labels).get_indexer(pd.Index(values))
    return Term((name,), tuple((name, str(label)) for label in labels), codes, np.asarray(helmert(len(labels)).T))


def coding_matrix(terms: Sequence[Term]) -> Array:
    """Return the design, `[observation, coefficient]`; its first column is the intercept."""
    return np.column_stack([np.ones(len(terms[0].codes)), *(term.design for term in terms)])


def _columns(terms: Sequence[Term]) -> dict[str, slice]:
    ends = list(accumulate((term.df for term in terms), initial=1))
    return {term.name: slice(*ends[index : index + 2]) for index, term in enumerate(terms)}


def _first_aliased(terms: Sequence[Term]) -> Term | None:
    """Return the first term with a column that is a combination of the columns before it."""
    matrix = coding_matrix(terms)
    diagonal = np.diagonal(np.linalg.qr(matrix, mode="r"))
    added = np.pad(np.abs(diagonal), (0, matrix.shape[1] - len(diagonal)))
    redundant, columns = added < TOLERANCE * sqrt(len(matrix)), _columns(terms)
    return next((term for term in terms if redundant[columns[term.name]].any()), None)


def _type_ii(fit: RegressionResults, terms: Sequence[Term]) -> Array:
    """Return each term's sum of squares: what it takes off the residuals of the terms that don't contain it.

    A:     rss(1, B) - rss(1, B, A)            = 0.10 - 0.01 = 0.09
    B:     rss(1, A) - rss(1, A, B)            = 0.05 - 0.01 = 0.04
    A x B: rss(1, A, B) - rss(1, A, B, A x B)  = 0.01 - 0.00 = 0.01
    """
    # The triangle R of a QR decomposition holds every sum of squares of the whole table in far fewer rows.
    triangle = np.asarray(np.linalg.qr(np.column_stack([fit.model.exog, fit.model.endog]), mode="r"))
    columns = _columns(terms)

    def residual_squares(model: Sequence[Term]) -> float:
        design = np.column_stack([triangle[:, 0], *(triangle[:, columns[term.name]] for term in model)])
        residuals = triangle[:, -1] - design @ np.linalg.lstsq(design, triangle[:, -1])[0]
        return float(residuals @ residuals)

    models = [[other for other in terms if not set(term.parts) <= set(other.parts)] for term in terms]
    return np.array(
        [residual_squares(model) - residual_squares([*model, term]) for term, model in zip(terms, models, strict=True)]
    )


def _half_widths(fit: RegressionResults, contrasts: Array, confidence: float) -> Array:
    """Return half the width of each contrast's interval, valid under noise that differs between observations.

    HC2 standard errors with Bell and McCaffrey's degrees of freedom; HC3 with the residual degrees of freedom is too
    wide in small grids. An observation that is alone in its combination has no residual; it gets the pooled variance.

    References:
        MacKinnon and White 1985, https://doi.org/10.1016/0304-4076(85)90158-7; Imbens and Kolesar 2016,
        https://doi.org/10.1162/REST_a_00552.
    """
    pooled = mean_square(fit)
    if not pooled > 0:
        return np.full(len(contrasts), pooled)
    basis = np.linalg.qr(fit.model.exog)[0]  # [observation, coefficient]
    leverage = np.sum(basis**2, axis=1)  # [observation]
    alone = leverage > 1 - TOLERANCE
    slack = np.where(alone, 1, 1 - leverage)
    noise = np.where(alone, pooled, fit.resid**2 / slack)
    weights = (contrasts @ fit.model.pinv_wexog) ** 2  # [contrast, observation]
    scaled = weights / slack
    # The variance is a weighted sum of squared residuals, mean sum(weights); `spread` is half of its variance:
    # the sum over i, k of weights_i weights_k (I - H)_ik^2 / (slack_i slack_k), by rows to save memory.

    spread = np.sum(scaled**2 * (1 - 2 * leverage), axis=1) + np.sum(weights[:, alone], axis=1) ** 2 / fit.df_resid
    for start in range(0, len(basis), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        spread += np.sum(scaled[:, rows] * (scaled @ (basis @ basis[rows].T) ** 2), axis=1)
    df = np.clip(np.sum(weights, axis=1) ** 2 / spread, 1, fit.df_resid)
    return np.asarray(stats.t.ppf((1 + confidence) / 2, df) * np.sqrt(weights @ noise))
