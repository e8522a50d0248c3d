"""The algebra of an analysis of variance with two-way interactions, complete or not; statsmodels does the fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, product
from math import nan, sqrt
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import helmert
from statsmodels.regression.linear_model import OLS, RegressionResults

from grid.config import LEVELS, InputError

TOLERANCE = 1e-9
"""Relative size under which a column adds nothing to those before it, or an observation leaves no residual."""
ROUNDING = 1e-20
"""Share of the raw sum of squares under which a sum of squares is rounding; one image in 100,000 is 1e-10."""
ROWS_AT_ONCE = 1024  # of an observation x observation matrix, which might not fit into memory as a whole
Array = NDArray[np.float64]
"""One or two dimensions."""
Levels = Mapping[str, tuple[str, ...]]
"""Factor -> its levels."""


@dataclass(frozen=True)
class Term:
    """A factor, the seed, or the interaction of two factors, in sum-to-zero coding."""

    parts: tuple[str, ...]
    """Names of what it is made of."""
    labels: tuple[tuple[str, ...], ...]
    """(factor, level), of an interaction (factor, level, other factor, other level)."""
    codes: NDArray[np.intp]
    """Position in `labels` of each observation."""
    coding: Array
    """`[label, coefficient]`: effects are `coding @ coefficients`, which sum to zero over each part."""

    @property
    def name(self) -> str:
        """Such as `optimizer x dropout`."""
        return " x ".join(self.parts)

    @property
    def df(self) -> int:
        """Degrees of freedom."""
        return int(self.coding.shape[1])

    def crossed_with(self, other: "Term") -> "Term":
        """Return the interaction with another factor."""
        labels = tuple(one + two for one, two in product(self.labels, other.labels))
        codes = self.codes * len(other.labels) + other.codes
        return Term(self.parts + other.parts, labels, codes, np.asarray(np.kron(self.coding, other.coding)))


def fit_terms(observed: pd.DataFrame, terms: Sequence[Term]) -> RegressionResults:
    """Fit the accuracies of the observations by least squares.

    Args:
        observed: A row per observation, with `accuracy`.
        terms: Of these observations; the intercept is added.
    """
    return OLS(observed["accuracy"].to_numpy(dtype=float), _matrix(terms)).fit()


def estimable_terms(observed: pd.DataFrame, varied: Levels, *, complete: bool) -> list[Term]:
    """Return the terms that the observations can tell apart: factors and seeds, then two-way interactions.

    Args:
        observed: A row per observation, with the factors, `seed` and `accuracy`.
        varied: Factors with two or more levels.
        complete: Whether every combination of levels and seeds is observed.

    Raises:
        InputError: They can't even tell the factors apart.
    """
    factors = [_term(factor, observed[factor]) for factor in varied if observed[factor].nunique() > 1]
    if not factors:
        raise InputError("every factor has an accuracy at one level only; run a grid with two levels of a factor")
    blocks = factors + ([_term("seed", observed["seed"])] if observed["seed"].nunique() > 1 else [])
    if lost := _first_lost(blocks):
        raise InputError(f"{len(observed)} accuracies can't tell {lost.name} from the rest; wait for more trials")
    terms = blocks + [one.crossed_with(other) for one, other in combinations(factors, 2)]
    while lost := _first_lost(terms):
        terms.remove(lost)
    # A part of a grid that every interaction fits by itself would leave nothing to judge any effect by.
    return terms if complete or len(observed) > 1 + sum(term.df for term in terms) else blocks


def mean_square(fit: RegressionResults) -> float:
    """Return that of the residuals: NaN without degrees of freedom, 0 for what is rounding."""
    if not fit.df_resid:
        return nan
    return float(fit.ssr / fit.df_resid) if fit.ssr > ROUNDING * fit.uncentered_tss else 0.0


def variance_table(fit: RegressionResults, terms: Sequence[Term]) -> pd.DataFrame:
    """Test every term against the model of the terms that don't contain it (type II sums of squares).

    Omega squared may come out a little below 0; clipping it would bias it. The seed, a block, is no hypothesis and has
    no part in Holm's correction.

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
    table["p_holm"] = _holm(table["p"][tested])
    table = table.sort_values("share", ascending=False, kind="stable")
    return pd.concat([table, last], ignore_index=True)


def estimate(fit: RegressionResults, terms: Sequence[Term], confidence: float) -> pd.DataFrame:
    """Return the effect of every level, with empty `other_factor` and `other_level`, and of every two of them."""
    columns, identity = _columns(terms), np.eye(len(fit.params))
    shown = [term for term in terms if term.name != "seed"]
    contrasts = np.vstack([term.coding @ identity[columns[term.name]] for term in shown])
    effects, margins = contrasts @ fit.params, _half_widths(fit, contrasts, confidence)
    counts = np.concatenate([np.bincount(term.codes, minlength=len(term.labels)) for term in shown])
    names = [(*label, "", "")[:4] for term in shown for label in term.labels]
    table = pd.DataFrame(names, columns=["factor", "level", "other_factor", "other_level"])
    return table.assign(observations=counts, effect=effects, low=effects - margins, high=effects + margins)


def in_order(name: str, values: "pd.Series[Any]") -> tuple[Any, ...]:
    """Return the values of a factor, or the seeds, that are there: known levels in their usual order, others sorted."""
    present = set(values)
    return tuple(value for value in dict.fromkeys((*LEVELS.get(name, ()), *sorted(present))) if value in present)


def _term(name: str, values: "pd.Series[Any]") -> Term:
    labels = in_order(name, values)
    codes = pd.Categorical(values, categories=list(labels)).codes.astype(np.intp)
    return Term((name,), tuple((name, str(label)) for label in labels), codes, np.asarray(helmert(len(labels)).T))


def _matrix(terms: Sequence[Term]) -> Array:
    return np.column_stack([np.ones(len(terms[0].codes)), *(term.coding[term.codes] for term in terms)])


def _columns(terms: Sequence[Term]) -> dict[str, slice]:
    ends = list(accumulate((term.df for term in terms), initial=1))
    return {term.name: slice(*ends[index : index + 2]) for index, term in enumerate(terms)}


def _first_lost(terms: Sequence[Term]) -> Term | None:
    """Return the first term with a column that the columns before it span."""
    matrix = _matrix(terms)
    diagonal = np.diagonal(np.linalg.qr(matrix, mode="r"))
    added = np.pad(np.abs(diagonal), (0, matrix.shape[1] - len(diagonal)))
    lost, columns = added < TOLERANCE * sqrt(len(matrix)), _columns(terms)
    return next((term for term in terms if lost[columns[term.name]].any()), None)


def _holm(p: "pd.Series[float]") -> "pd.Series[float]":
    # That of statsmodels collects garbage at each call, which takes longer than the whole analysis of a small grid.
    return (p.sort_values() * np.arange(len(p), 0, -1)).cummax().clip(upper=1)


def _type_ii(fit: RegressionResults, terms: Sequence[Term]) -> Array:
    # The triangle of a QR decomposition has every sum of squares of the whole table.
    triangle = np.asarray(np.linalg.qr(np.column_stack([fit.model.exog, fit.model.endog]), mode="r"))
    columns = _columns(terms)

    def left_by(some: Sequence[Term]) -> float:
        chosen = np.column_stack([triangle[:, 0], *(triangle[:, columns[term.name]] for term in some)])
        residuals = triangle[:, -1] - chosen @ np.linalg.lstsq(chosen, triangle[:, -1])[0]
        return float(residuals @ residuals)

    rests = [[other for other in terms if not set(term.parts) <= set(other.parts)] for term in terms]
    return np.array([left_by(rest) - left_by([*rest, term]) for term, rest in zip(terms, rests, strict=True)])


def _half_widths(fit: RegressionResults, contrasts: Array, confidence: float) -> Array:
    """Return half the width of each contrast's interval, whatever the noise of each observation.

    HC2 standard errors with Bell and McCaffrey's degrees of freedom. HC3 with the residual ones is too wide where the
    grid is small. An observation that leaves no residual, alone in its combination, lends the pooled variance.

    References:
        MacKinnon and White 1985, https://doi.org/10.1016/0304-4076(85)90158-7; Imbens and Kolesar 2016,
        https://doi.org/10.1162/REST_a_00552.
    """
    pooled = mean_square(fit)
    if not pooled > 0:
        return np.full(len(contrasts), pooled)
    basis = np.linalg.qr(fit.model.exog)[0]
    leverage = np.sum(basis**2, axis=1)
    alone = leverage > 1 - TOLERANCE
    slack = np.where(alone, 1, 1 - leverage)
    noise = np.where(alone, pooled, fit.resid**2 / slack)
    weights = (contrasts @ fit.model.pinv_wexog) ** 2
    scaled = weights / slack
    spread = np.sum(scaled**2 * (1 - 2 * leverage), axis=1) + np.sum(weights[:, alone], axis=1) ** 2 / fit.df_resid
    for start in range(0, len(basis), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        spread += np.sum(scaled[:, rows] * (scaled @ (basis @ basis[rows].T) ** 2), axis=1)
    df = np.clip(np.sum(weights, axis=1) ** 2 / spread, 1, fit.df_resid)
    return np.asarray(stats.t.ppf((1 + confidence) / 2, df) * np.sqrt(weights @ noise))
