"""Analyses simulated grids, and counts how often the intervals cover what was planted."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.linalg import block_diag, helmert
from statsmodels.regression.linear_model import OLS

from analysis.estimates.cells import rank_cells
from analysis.estimates.final_effects import FinalEffects, measure_final_effects
from analysis.estimates.rung_effects import measure_rung_effects
from analysis.stopping.figures import audit_stopping
from benchmarks.planted.grids import (
    CORRELATIONS,
    COUNTS,
    LABEL_COLUMNS,
    LEVEL_NAMES,
    RUNGS,
    Array,
    Grid,
    Level,
    Plan,
    has,
    plant,
    true_false_stops,
)
from grid.config import FACTORS
from grid.plan.asha import FACTOR

Tally = tuple[str, str, float, float]
"""Question, group, sum, number of cases: the answer is the ratio of the two sums over all grids."""

CONFIDENCE = 0.95
VIEWS = {
    "ours": "all trials (ours)",
    "controls": "controls alone",
    "completed": "completed trials",
    "survivors": "same, but no controls",
    "foretold": "all, after first rung",
}
"""Ways to estimate main effects at the end of training."""


def least_squares(trials: pd.DataFrame) -> pd.DataFrame:
    """Estimate main effects on the final accuracies as a textbook does: least squares, even noise, no interactions.

    Returns:
        `factor`, `level`, `effect`, `low`, `high` of each level that occurs; no rows if they are not identifiable.
    """
    present = {
        factor: [name for name in names if has(trials, (factor, name)).any()] for factor, names in LEVEL_NAMES.items()
    }
    present = {factor: names for factor, names in present.items() if len(names) > 1}
    codings = {factor: helmert(len(names)).T for factor, names in present.items()}
    parts = [coding[[present[factor].index(name) for name in trials[factor]]] for factor, coding in codings.items()]
    design = np.column_stack([np.ones(len(trials)), *parts])
    table = pd.DataFrame(
        [(factor, name) for factor in present for name in present[factor]], columns=["factor", "level"]
    )
    if len(design) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return table[:0].assign(effect=np.nan, low=np.nan, high=np.nan)
    contrasts = np.column_stack([np.zeros(len(table)), block_diag(*codings.values())])
    test = OLS(trials["final_val_accuracy"].to_numpy(), design).fit().t_test(contrasts)
    low, high = test.conf_int(1 - CONFIDENCE).T
    return table.assign(effect=test.effect, low=low, high=high)


def compare(estimates: pd.DataFrame, truth: Mapping[Level, Array], point: int) -> pd.DataFrame:
    """Compare estimates with the planted effects at a point.

    If a level has no estimate, the truth is centred on the levels that have one, as the estimates are.

    Returns:
        `error`, `truth` and `covered` of each estimate.
    """
    labels = estimates[[name for name in LABEL_COLUMNS if name in estimates]].itertuples(index=False, name=None)
    planted = pd.Series([truth[label][point] for label in labels], index=estimates.index, dtype=float)
    if "other_factor" not in estimates:
        planted -= planted.groupby(estimates["factor"]).transform("mean")
    covered = (estimates["low"] <= planted) & (planted <= estimates["high"])
    return pd.DataFrame({"error": estimates["effect"] - planted, "truth": planted, "covered": covered})


def examine(index: int, seed: int) -> list[Tally]:
    """Simulate the `index`-th grid, analyse it, and tally the results."""
    plan = Plan.of(index)
    grid = plant(plan, np.random.default_rng([seed, index]))
    kind = f"{'uneven' if plan.uneven else 'even'} noise, {'holes' if plan.holes else 'complete'}"
    effects = measure_rung_effects(grid.trials, epoch=RUNGS[0], confidence=CONFIDENCE)
    final = measure_final_effects(grid.trials, confidence=CONFIDENCE)
    tallies = [*tally_views(grid, plan, effects.levels, final.levels), *tally_final(grid, plan, final)]
    tallies += [*tally_audit(grid, plan), tally_ranking(grid.trials)]
    for name, estimates, expected in (
        ("main effects", effects.levels, sum(COUNTS) - COUNTS.count(1)),
        ("interactions", effects.interactions, sum(a * b for a, b in combinations(COUNTS, 2) if a > 1 < b)),
    ):
        found = compare(estimates.dropna(subset="effect"), grid.truth, 0)
        tallies.append((f"{name}: covered", kind, float(found["covered"].sum()), len(found)))
        tallies.append((f"{name}: estimated", kind, len(found), expected))
    return tallies


def tally_final(grid: Grid, plan: Plan, final: FinalEffects) -> Iterator[Tally]:
    """Tally whether what `analysis.effects` prints about the end covers the truth."""
    levels, pairs = compare(final.levels, grid.truth, -1), compare(final.interactions, grid.truth, -1)
    kinds = (
        f"{'holes' if plan.holes else 'complete'}, {'uneven' if plan.uneven else 'even'} noise",
        f"correlation {plan.correlation:g}",
        plan.history,
        f"{plan.controls // 40 * 40} to {plan.controls // 40 * 40 + 39} controls",
    )
    for kind in kinds:
        yield "end, main effects: covered", kind, float(levels["covered"].sum()), len(levels)
        yield "end, interactions: covered", kind, float(pairs["covered"].sum()), len(pairs)
        yield "end: half-width", kind, float((final.levels["high"] - final.levels["low"]).sum() / 2), len(levels)
    for factor, table in final.differences.groupby("factor"):
        planted = np.array(
            [
                grid.truth[str(factor), level][-1] - grid.truth[str(factor), other][-1]
                for level, other in table[["level", "other_level"]].itertuples(index=False)
            ]
        )
        all_covered = bool(((table["low"] <= planted) & (planted <= table["high"])).all())
        for kind in kinds:
            yield "end, all differences: covered", kind, float(all_covered), 1


def tally_views(grid: Grid, plan: Plan, first: pd.DataFrame, final: pd.DataFrame) -> Iterator[Tally]:
    """Tally how well each of `VIEWS` estimates the main effects at the end."""
    completed = grid.trials[grid.trials["status"] == "completed"]
    estimates = {
        "ours": final,
        "controls": least_squares(completed[completed["control"]]),
        "completed": least_squares(completed),
        "survivors": least_squares(completed[~completed["control"]]),
        "foretold": first,
    }
    for view, table in estimates.items() if plan.correlation == CORRELATIONS[0] else ():
        found = compare(table.dropna(subset="effect"), grid.truth, -1)
        yield "estimated", view, len(found), sum(COUNTS) - COUNTS.count(1)
        yield "|error|", view, float(found["error"].abs().sum()), len(found)
        products = (found["truth"] + found["error"]) * found["truth"]
        yield "slope", view, float(products.sum()), float((found["truth"] ** 2).sum())
        yield "covered", view, float(found["covered"].sum()), len(found)


def tally_audit(grid: Grid, plan: Plan) -> Iterator[Tally]:
    """Tally whether intervals of the false-stop rate cover the truth, and whether the bounds on what is lost hold."""
    truth = true_false_stops(grid)
    kind = f"{plan.correlation:g}"
    audit = audit_stopping(grid.trials, factor=FACTOR, confidence=CONFIDENCE)
    for row in audit.false_stops.to_dict("records"):
        yield "false stops: covered", kind, float(row["low"] <= truth[row["model"]] <= row["high"]), 1
        yield "false stops: truth", kind, truth[row["model"]], 1
        yield "false stops: measured", kind, float(row["false_stops"]), float(row["stopped"])
    for row in audit.lost_winners.merge(audit.regret, on="model").to_dict("records"):
        ends = grid.final[(grid.trials["status"] == "stopped") & (grid.trials["model"] == row["model"])]
        yield "lost winners: bounded", kind, float((ends > row["winner"]).sum() <= row["at_most"]), 1
        if not np.isnan(row["loss_at_most"]):
            yield "loss: bounded", kind, float(ends.max() - row["winner"] <= row["loss_at_most"]), 1


def tally_ranking(trials: pd.DataFrame) -> Tally:
    """Tally the cells whose trials all diverged and that are ranked above a cell that ASHA let complete.

    Controls that ASHA would have stopped count as stopped, however they ended.
    """
    ranked = rank_cells(trials)[[*FACTORS, "rank"]]
    counted = trials.assign(status=trials["status"].where(trials["stop_epoch"].isna(), "stopped"))
    ends = counted.groupby(list(FACTORS))["status"].agg(set).rename("ends").reset_index().merge(ranked, "left")
    lowest_completed = ends.loc[ends["ends"].map(lambda statuses: statuses == {"completed"}), "rank"].max()
    diverged = ends[ends["ends"].map(lambda statuses: statuses == {"diverged"})]
    return "ranking: violations", "", float((diverged["rank"] < lowest_completed).sum()), len(diverged)


def summarise(tallies: Sequence[Sequence[Tally]]) -> pd.DataFrame:
    """Sum the tallies of all grids.

    Returns:
        By question and group: `sum`, `count`, their ratio `value`, and its standard `error` over grids.

    Reference: Cochran 1977, Sampling Techniques, section 6.3 (ratio estimator)
    """
    rows = [(index, *tally) for index, grid_tallies in enumerate(tallies) for tally in grid_tallies]
    table = pd.DataFrame(rows, columns=["grid", "question", "group", "sum", "count"])
    table = table.groupby(["question", "group", "grid"], as_index=False)[["sum", "count"]].sum()
    totals = table.groupby(["question", "group"])[["sum", "count"]].sum()
    value = totals["sum"] / totals["count"]
    table = table.join(value.rename("value"), on=["question", "group"])
    table["square"] = (table["sum"] - table["value"] * table["count"]) ** 2
    squares = table.groupby(["question", "group"])["square"].sum()
    return totals.assign(value=value, error=squares**0.5 / totals["count"])


def format_summary(summary: pd.DataFrame) -> str:
    """Return the answers as text of at most 80 columns."""
    answers, nothing = summary.to_dict("index"), {"sum": 0, "count": 0}

    def figure(question: str, group: str, style: str = ".1%") -> str:
        answer = answers.get((question, group), nothing)
        return f"{answer['value']:{style}} ±{answer['error']:{style}}" if answer["count"] else "none"

    lines = ["1. Do the 95% intervals at the first rung cover the planted effects?"]
    lines.append(f"{'grids with':<24} {'main effects':>14} {'interactions':>14} {'estimable pairs':>18}")
    for kind in (f"{noise} noise, {holes}" for holes in ("complete", "holes") for noise in ("even", "uneven")):
        main, pairs = figure("main effects: covered", kind), figure("interactions: covered", kind)
        lines.append(f"{kind:<24} {main:>14} {pairs:>14} {figure('interactions: estimated', kind):>18}")
    ranking = answers["ranking: violations", ""]
    lines += ["", "2. Are diverged cells ranked above completed ones?"]
    lines.append(f"{ranking['sum']:.0f} of {ranking['count']:,.0f} diverged cells")
    lines += ["", "3. Audit, by the correlation of first rung and full budget"]
    questions = [("true rate of false stops", "false stops: truth"), ("measured by controls", "false stops: measured")]
    questions += [
        ("95% interval covers it", "false stops: covered"),
        ("95% bound on lost winners", "lost winners: bounded"),
    ]
    questions += [("95% bound on accuracy lost", "loss: bounded")]
    groups = [f"{rho:g}" for rho in CORRELATIONS if ("lost winners: bounded", f"{rho:g}") in answers]
    lines.append(f"{'':<26}" + "".join(f"{group:>15}" for group in groups))
    for label, question in questions:
        lines.append(f"{label:<26}" + "".join(f"{figure(question, group):>15}" for group in groups))
    lines += [
        "",
        f"4. Main effects at the end, correlation {CORRELATIONS[0]:g} (slope below 1: shrunken)",
    ]
    lines.append(f"{'':<24} {'|error|':>12} {'slope':>11} {'covered':>12} {'estimable':>12}")
    for view, label in VIEWS.items():
        error, slope = figure("|error|", view, ".2%"), figure("slope", view, ".2f")
        covered, known = figure("covered", view), figure("estimated", view)
        lines.append(f"{label:<24} {error:>12} {slope:>11} {covered:>12} {known:>12}")
    lines += ["", "5. Do the 95% intervals of analysis.effects at the end cover the truth?"]
    lines.append(f"{'grids with':<24} {'main effects':>14} {'differences':>14} {'interactions':>14} {'± points':>9}")
    for kind in summary.loc["end: half-width"].index if "end: half-width" in summary.index.get_level_values(0) else ():
        main, pairs = figure("end, main effects: covered", kind), figure("end, interactions: covered", kind)
        differences, width = figure("end, all differences: covered", kind), answers["end: half-width", kind]["value"]
        lines.append(f"{kind:<24} {main:>14} {differences:>14} {pairs:>14} {100 * width:>9.2f}")
    return "\n".join([*lines, "", "± is the standard error over grids"])
