"""The figures of the report: for each, one function computes its table and another draws it as SVG.

Colours are those of Okabe and Ito, which colour-blind readers can distinguish; marks also differ in shape. Figures are
as narrow as a phone's screen, so that their text stays readable there.
Reference: Okabe and Ito 2008, https://jfly.uni-koeln.de/color/
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grid.config import FACTORS, SETTINGS
from grid.metrics import RUNG_METRIC, STATUSES, recorded_rungs

WIDTH = 4.6
"""Inches, 442 pixels in a browser: about the width of a phone or half of the page."""
INK, MUTED, RULE = "#222222", "#666666", "#d9d9d9"
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
LEGEND_COLUMNS = 4
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
HEAT_MAPS = 4
CURVES_PER_MODEL = 150
"""Of each status; more would blend into a blot."""


def curve_sample(trials: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return a random sample of the completed and the stopped trials, whose learning curves are drawn.

    Returns:
        `run_id`, `model`, `status`, `available` (trials of the model and status); at most `CURVES_PER_MODEL` of each.
    """
    drawable = trials[trials["status"].isin(("completed", "stopped"))][["run_id", "model", "status"]]
    drawable = drawable.assign(available=drawable.groupby(["model", "status"])["run_id"].transform("size"))
    shuffled = drawable.sample(frac=1, random_state=seed)
    return shuffled.groupby(["model", "status"]).head(CURVES_PER_MODEL).sort_index().reset_index(drop=True)


def curve_table(sample: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the spread of the learning curves.

    Args:
        sample: From `curve_sample`.
        curves: From `analysis.curves.read_curves`.

    Returns:
        `model`, `status`, `epoch`, `trials` (that trained that epoch), and `lowest`, `median`, `highest` accuracy.
    """
    joined = curves.merge(sample, on="run_id")
    grouped = joined.groupby(["model", "status", "epoch"])["val_accuracy"]
    return grouped.agg(trials="size", lowest="min", median="median", highest="max").reset_index()


def draw_curves(sample: pd.DataFrame, curves: pd.DataFrame, model: str) -> str:
    """Draw the learning curves of a model, those of completed trials over those of stopped ones."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(3.1)
        joined = curves.merge(sample[sample["model"] == model], on="run_id")
        for status, colour, mark, alpha in (("stopped", ORANGE, "x", 0.45), ("completed", BLUE, "o", 0.5)):
            of_status = joined[joined["status"] == status]
            for _, curve in of_status.groupby("run_id"):
                axes.plot(curve["epoch"], 100 * curve["val_accuracy"], color=colour, lw=0.8, alpha=alpha)
            ends = of_status.groupby("run_id").tail(1)
            axes.plot(ends["epoch"], 100 * ends["val_accuracy"], mark, ms=3.5, color=colour, alpha=alpha)
            if len(ends):
                available = ends["available"].iloc[0]
                drawn = f"{len(ends):,} of {available:,}" if available > len(ends) else f"{len(ends):,}"
                axes.plot([], [], mark, ls="-", ms=3.5, color=colour, label=f"{status} ({drawn})")
        axes.set(xlabel="epoch", ylabel="validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, f"learning curves of {model}")


def funnel_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Return how many trials reached each rung and the full budget.

    Returns:
        `model`, `epoch` (0 for the start, then the rungs and the full budget), `trials` that had an accuracy after that
        epoch, and their `share` of the model's trials.
    """
    rungs = recorded_rungs(trials.columns)
    rows = []
    for model, model_trials in trials.groupby("model"):
        reached = {rung: int(model_trials[f"{RUNG_METRIC}{rung}"].notna().sum()) for rung in rungs}
        reached[int(model_trials["epochs"].iloc[0])] = int((model_trials["status"] == "completed").sum())
        rows += [(model, 0, len(model_trials), 1.0)]
        rows += [(model, epoch, number, number / len(model_trials)) for epoch, number in sorted(reached.items())]
    return pd.DataFrame(rows, columns=["model", "epoch", "trials", "share"])


def draw_funnel(funnel: pd.DataFrame) -> str:
    """Draw how many trials of each model reached each rung and the full budget."""
    models = list(funnel["model"].unique())
    stages = sorted(funnel["epoch"].unique())
    with mpl.rc_context(STYLE):
        figure, axes = _figure(1.0 + 0.22 * len(stages) * len(models))
        height = 0.8 / len(models)
        for number, model in enumerate(models):
            rows = funnel[funnel["model"] == model]
            places = [stages.index(epoch) + (number - (len(models) - 1) / 2) * height for epoch in rows["epoch"]]
            axes.barh(places, rows["trials"], height=0.9 * height, label=model, **_fill(number))
            for place, trials, share in zip(places, rows["trials"], rows["share"], strict=True):
                axes.text(trials, place, f" {trials:,}  {share:.0%}", va="center", color=INK, fontsize=8)
        names = ["started" if epoch == 0 else f"after epoch {epoch}" for epoch in stages]
        axes.set_yticks(range(len(stages)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * funnel["trials"].max())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trials")
        figure.legend(loc="outside lower center", ncols=min(len(models), LEGEND_COLUMNS))
        return _svg(figure, "how far trials got")


def effect_rows(levels: pd.DataFrame) -> pd.DataFrame:
    """Return the levels in drawing order: factors by falling range of their effects, levels by falling effect.

    Args:
        levels: `analysis.estimates.final_effects.FinalEffects.levels`, or those after a rung.
    """
    effects = levels.groupby("factor")["effect"]
    widest = (effects.transform("max") - effects.transform("min")).fillna(0)
    place = levels["factor"].map({factor: number for number, factor in enumerate((*FACTORS, *SETTINGS))})
    order = levels.assign(widest=widest, place=place).sort_values(
        ["widest", "place", "effect"], ascending=[False, True, False]
    )
    return levels.loc[order.index].reset_index(drop=True)


def difference_rows(differences: pd.DataFrame) -> pd.DataFrame:
    """Return the largest difference of each factor in drawing order: sure ones first, larger ones first.

    Args:
        differences: `analysis.estimates.final_effects.FinalEffects.differences`.
    """
    largest = differences.drop_duplicates("factor")
    return largest.sort_values(["sure", "difference"], ascending=False, kind="stable").reset_index(drop=True)


def draw_differences(rows: pd.DataFrame) -> str:
    """Draw the largest difference of each factor with its interval.

    Args:
        rows: From `difference_rows`.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.75 + 0.4 * len(rows))
        for place, row in enumerate(rows.to_dict("records")):
            ends = [[100 * (row["difference"] - row["low"])], [100 * (row["high"] - row["difference"])]]
            colour, shape = (BLUE, "o") if row["sure"] else (MUTED, "s")
            axes.errorbar(100 * row["difference"], place, xerr=ends, fmt=shape, ms=5, color=colour, capsize=2, lw=1.5)
            name = f"{row['factor']}: {row['level']} over {row['other_level']}"
            words = axes.text(0, place - 0.36, name, transform=axes.get_yaxis_transform(), fontsize=8, va="center")
            words.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # over the lines of the grid
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.grid(axis="x", color=RULE, lw=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("percentage points at the end of training")
        for shape, colour, label in (("o", BLUE, "sure"), ("s", MUTED, "may be chance")):
            axes.plot([], [], shape, color=colour, ls="-", label=label)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "the largest difference of each factor")


def draw_main_effects(rows: pd.DataFrame, name: str = "effects of all levels") -> str:
    """Draw the effect of every level with its interval, factor by factor.

    Args:
        rows: From `effect_rows`.
        name: Of the figure; unique on a page.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.55 + 0.19 * (len(rows) + 1.4 * rows["factor"].nunique()))
        place, ticks = 0.0, {}
        for factor, levels in rows.groupby("factor", sort=False):
            ticks[place] = str(factor), "bold"
            for row in levels.to_dict("records"):
                place += 1
                ends = [[100 * (row["effect"] - row["low"])], [100 * (row["high"] - row["effect"])]]
                colour, shape = (BLUE, "o") if row["effect"] >= 0 else (ORANGE, "s")
                axes.errorbar(100 * row["effect"], place, xerr=ends, fmt=shape, ms=4.5, color=colour, capsize=2, lw=1.4)
                ticks[place] = str(row["level"]), "normal"
            place += 1.4
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.grid(axis="x", color=RULE, lw=0.5)
        axes.set_axisbelow(True)
        axes.set_yticks(list(ticks), [name for name, _ in ticks.values()])
        for label, (_, weight) in zip(axes.get_yticklabels(), ticks.values(), strict=True):
            label.set_fontweight(weight)
        axes.set_ylim(place - 0.6, -0.7)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("percentage points above or below the mean of all cells")
        return _svg(figure, name)


def variance_bars(variance: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """Return the terms that explain most, all other terms as one, and the residual.

    Args:
        variance: `analysis.estimates.rung_effects.RungEffects.variance`.
        count: How many terms are named.

    Returns:
        `term`, `share` (0 if all accuracies are equal).
    """
    variance = variance.fillna({"share": 0.0})
    terms = variance[variance["term"] != "residual"]
    rest = terms["share"].iloc[count:]
    others = [{"term": f"{len(rest)} other terms", "share": rest.sum()}] if len(rest) else []
    left = [{"term": "residual", "share": variance.loc[variance["term"] == "residual", "share"].sum()}]
    return pd.concat([terms[["term", "share"]].head(count), pd.DataFrame(others + left)], ignore_index=True)


def draw_variance(bars: pd.DataFrame) -> str:
    """Draw how much of the variance each term explains."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.45 + 0.2 * len(bars))
        axes.barh(range(len(bars)), 100 * bars["share"], color=[_term_colour(term) for term in bars["term"]])
        for place, share in enumerate(bars["share"]):
            axes.text(100 * share, place, f" {share:.1%}", va="center", color=INK, fontsize=8)
        axes.set_yticks(range(len(bars)), list(bars["term"]))
        axes.invert_yaxis()
        axes.set_xlim(0, 118 * max(bars["share"].max(), 0.01))
        axes.set_xlabel("share of the variance, %")
        return _svg(figure, "shares of the variance")


def strongest_interactions(interactions: pd.DataFrame, count: int = HEAT_MAPS) -> list[tuple[str, str]]:
    """Return the pairs of factors with the strongest pair of levels that stands out, the strongest first.

    Args:
        interactions: `analysis.estimates.final_effects.FinalEffects.interactions`.
        count: How many at most.
    """
    found = interactions[interactions["stands_out"].astype(bool)]
    found = found.sort_values("effect", key=abs, ascending=False, kind="stable")
    pairs = found.drop_duplicates(["factor", "other_factor"]).head(count)
    return list(pairs[["factor", "other_factor"]].itertuples(index=False, name=None))


def interaction_map(interactions: pd.DataFrame, pair: tuple[str, str]) -> pd.DataFrame:
    """Return the interaction effects of two factors, levels of one in the rows and of the other in the columns."""
    rows = interactions[(interactions["factor"] == pair[0]) & (interactions["other_factor"] == pair[1])]
    wide = rows.pivot_table(index="level", columns="other_level", values="effect", sort=False)
    wide = wide.rename_axis(index=pair[0], columns=pair[1])
    return wide.T if len(wide.columns) > len(wide) else wide


def draw_interaction(effects: pd.DataFrame, pair: tuple[str, str], largest: float | None = None) -> str:
    """Draw a heat map of interaction effects in percentage points.

    Args:
        effects: From `interaction_map`.
        pair: The two factors.
        largest: Largest absolute effect, as a fraction, of all maps that share a colour scale; None for this map's own.
    """
    values = 100 * effects.to_numpy()
    darkest = 130 * max(np.abs(effects.to_numpy()).max() if largest is None else largest, 1e-9)
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.8 + 0.3 * len(effects), width=1.35 + 0.66 * len(effects.columns))
        axes.imshow(values, cmap="PuOr_r", vmin=-darkest, vmax=darkest, aspect="auto")
        for row, column in np.ndindex(*values.shape):
            ink = "white" if abs(values[row, column]) > 0.6 * darkest else INK
            axes.text(column, row, f"{values[row, column]:+z.1f}", ha="center", va="center", color=ink, fontsize=8.5)
        axes.set_xticks(range(len(effects.columns)), list(effects.columns), color=INK)
        axes.set_yticks(range(len(effects)), list(effects.index))
        axes.set_xlabel(str(effects.columns.name), weight="bold")
        axes.set_ylabel(str(effects.index.name), weight="bold", labelpad=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _svg(figure, " x ".join(pair))


def draw_finalists(cells: pd.DataFrame, names: Sequence[str]) -> str:
    """Draw the finalists' validation accuracies with their intervals, and their test accuracies.

    Args:
        cells: Finalists of `analysis.estimates.cells.rank_cells`.
        names: Their names, in the same order.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.85 + 0.42 * len(cells))
        places = np.arange(len(cells))
        ends = 100 * np.array([cells["val_accuracy"] - cells["low"], cells["high"] - cells["val_accuracy"]])
        axes.errorbar(
            100 * cells["val_accuracy"], places, xerr=ends, fmt="o", ms=5, color=BLUE, capsize=2, label="validation"
        )
        if cells["test_accuracy_as_validated"].notna().any():
            axes.plot(100 * cells["test_accuracy_as_validated"], places + 0.2, "D", ms=4, color=ORANGE, label="test")
        for place, name in zip(places, names, strict=True):
            axes.text(0, place - 0.36, name, transform=axes.get_yaxis_transform(), fontsize=8, va="center")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(cells) - 0.5, -0.6)
        axes.grid(axis="x", color=RULE, lw=0.5)
        axes.set_xlabel("accuracy, %")
        marks, labels = axes.get_legend_handles_labels()
        figure.legend(marks[::-1], labels[::-1], loc="outside lower center", ncols=2)
        return _svg(figure, "accuracies of the finalists")


def cost_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Return what the trials cost.

    Returns:
        `model`, `trials`, a count of trials per status, `epochs_run`, and `hours` (summed over trials: epochs run x
        seconds of the last epoch).
    """
    hours = trials["epochs_run"] * trials["epoch_seconds"] / 3600
    grouped = trials.assign(hours=hours).groupby("model")
    counts = pd.crosstab(trials["model"], trials["status"]).reindex(columns=list(STATUSES), fill_value=0)
    sums = pd.DataFrame({"epochs_run": grouped["epochs_run"].sum(), "hours": grouped["hours"].sum()})
    return pd.concat([grouped.size().rename("trials"), counts, sums], axis=1).reset_index()


def _fill(number: int) -> dict[str, Any]:
    """Return how the bars of the `number`-th model are filled: hatched once its colour has been used before."""
    repeats, colour = divmod(number, len(PALETTE))
    return {"color": PALETTE[colour], "hatch": "//" * repeats, "edgecolor": "white", "lw": 0}


def _term_colour(term: str) -> str:
    if term == "residual" or term.endswith(" other terms"):
        return RULE
    return ORANGE if " x " in term else BLUE


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element; its ids start with its name, so that a page can hold several figures."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups
    prefix = re.sub(r"\W+", "-", name)
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}-", svg)
