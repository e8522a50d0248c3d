"""Do the statistics find what was planted? Simulates grids with known effects and analyses them.

    python -m benchmarks.planted --grids 1000     # 14 minutes on one core; --jobs 2 for two

Prints how often the intervals of `analysis` cover the truth, and how far off other ways to estimate the effects are.
Accuracies are main effects + two-way interactions + a seed's block + noise. The noise is even in half of the grids and
differs by level in the other half; in half of the grids some trials diverge, at a rate that depends on the levels.
Effects and noise change from epoch to epoch, so that learning curves cross, and the grid's own ASHA stops trials.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from multiprocessing import get_context

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import block_diag, helmert
from statsmodels.regression.linear_model import OLS

from analysis.audit import audit_stopping, rung_thresholds, stop_epochs
from analysis.effects import measure_effects
from analysis.rank import rank_cells
from grid.arguments import Parser
from grid.config import FACTORS, LEVELS
from grid.metrics import RUNG_METRIC
from grid.plan.asha import FACTOR, Asha, rung_epochs

Array = NDArray[np.float64]
Level = tuple[str, ...]
"""(factor, level) of a main effect; (factor, level, other factor, other level) of an interaction."""
LABEL_COLUMNS = ("factor", "level", "other_factor", "other_level")
Tally = tuple[str, str, float, float]
"""Question, group, sum, number of cases: the answer is the ratio of the two sums over all grids."""

EPOCHS = 9
RUNGS = rung_epochs(EPOCHS)
POINTS = (*RUNGS, EPOCHS)
"""Epochs at which a curve is simulated."""
MEANS = np.array([0.3, 0.5, 0.7])
"""Accuracy at each point of `POINTS`."""
CORRELATIONS = (0.8, 0.4)
"""Of effects and noise at the first rung with those at the full budget: in three of four grids, in the fourth."""
MAIN_SD, PAIR_SD, SEED_SD, NOISE_SD = 0.03, 0.01, 0.005, 0.02
CONTROLS = 0.1
"""Share of unstopped controls among the trials."""
COUNTS = (2, 3, 3, 3, 2, 1, 2)
"""Number of levels of each of `FACTORS`: 216 cells."""
LEVEL_NAMES = {factor: LEVELS[factor][:count] for factor, count in zip(FACTORS, COUNTS, strict=True)}
UNEVEN = {"optimizer": (0.5, 1.0, 2.0), "batch_norm": (0.7, 1.4)}
"""Factor -> what each of its levels multiplies the noise by in grids with uneven noise."""
DIVERGED_AT, DIVERGED_AT_SHARES = (1, 2, 6), (0.6, 0.2, 0.2)
CONFIDENCE = 0.95
VIEWS = {
    "ours": "first rung; truth there",
    "foretold": "first rung; truth at end",
    "completed": "completed; truth at end",
    "survivors": "same, but no controls",
    "controls": "controls; truth at end",
}
"""Ways to estimate main effects, and the truth with which each estimate is compared."""


@dataclass(frozen=True)
class Plan:
    """The kind of a simulated grid."""

    seeds: int = 1
    """Replicates per cell."""
    uneven: bool = False
    """Whether the noise differs by level."""
    holes: bool = False
    """Whether trials diverge."""
    correlation: float = CORRELATIONS[0]
    noise_sd: float = NOISE_SD
    """Standard deviation of an accuracy."""

    @classmethod
    def of(cls, index: int) -> "Plan":
        """Return the kind of the `index`-th grid; all combinations of seeds, noise and holes are equally frequent."""
        correlation = CORRELATIONS[index // 8 % 4 == 3]
        return cls(1 + index // 4 % 2, bool(index % 2), bool(index // 2 % 2), correlation)


@dataclass(frozen=True)
class Grid:
    """A simulated grid and its planted effects."""

    trials: pd.DataFrame
    """As `analysis.store` returns them."""
    unstopped: pd.DataFrame
    """The same trials if none had been stopped."""
    truth: dict[Level, Array]
    """Effect of every level and of every pair of levels, at each of `POINTS`."""

    @property
    def final(self) -> "pd.Series[float]":
        """Accuracy of every trial at the full budget if none had been stopped; minus infinity if it diverged."""
        return self.unstopped["best_val_accuracy"].where(self.unstopped["status"] == "completed", -np.inf)


def plant(plan: Plan, rng: np.random.Generator) -> Grid:
    """Simulate a grid of a kind."""
    truth = draw_truth(plan, rng)
    trials = lay_out(plan, rng)
    values = draw_curves(trials, truth, plan, rng)
    diverged_at = draw_divergence(trials, rng) if plan.holes else np.full(len(trials), np.inf)
    unstopped = observe(trials, values, diverged_at, np.full(len(trials), EPOCHS))
    return Grid(observe(trials, values, diverged_at, stop(unstopped, diverged_at, rng)), unstopped, truth)


def draw_truth(plan: Plan, rng: np.random.Generator) -> dict[Level, Array]:
    """Draw the effects at every point; they sum to zero over the levels of each factor."""
    truth: dict[Level, Array] = {}
    for factor, names in LEVEL_NAMES.items():
        effects = _drift(MAIN_SD, (len(names),), plan, rng)
        effects -= effects.mean(axis=1, keepdims=True)
        truth |= {(factor, name): effects[:, i] for i, name in enumerate(names)}
    for (factor, names), (other, other_names) in combinations(LEVEL_NAMES.items(), 2):
        effects = _drift(PAIR_SD, (len(names), len(other_names)), plan, rng)
        effects -= effects.mean(axis=1, keepdims=True)
        effects -= effects.mean(axis=2, keepdims=True)
        for (i, name), (j, other_name) in product(enumerate(names), enumerate(other_names)):
            truth[factor, name, other, other_name] = effects[:, i, j]
    return truth


def lay_out(plan: Plan, rng: np.random.Generator) -> pd.DataFrame:
    """Return every cell x seed in random order; some of the trials are unstopped controls."""
    rows = [(*cell, seed) for cell in product(*LEVEL_NAMES.values()) for seed in range(plan.seeds)]
    trials = pd.DataFrame(rows, columns=[*FACTORS, "seed"]).sample(frac=1, random_state=rng, ignore_index=True)
    controls = np.zeros(len(trials), bool)
    controls[rng.choice(len(trials), round(CONTROLS * len(trials)), replace=False)] = True
    names = trials.index.astype(str)
    return trials.assign(
        lr_scale=1.0, epochs=EPOCHS, control=controls, trial_key=names, cell_key=names, run_id=names
    )  # replicates have different cell keys here, which is harmless: the analysis groups by the factors


def draw_curves(trials: pd.DataFrame, truth: Mapping[Level, Array], plan: Plan, rng: np.random.Generator) -> Array:
    """Return the accuracy of each trial at every point, `[trial, point]`."""
    values = np.tile(MEANS, (len(trials), 1))
    for label, effects in truth.items():
        values[_has(trials, label)] += effects
    values += rng.normal(0, SEED_SD, (plan.seeds, 1))[trials["seed"]]
    noise = _drift(plan.noise_sd, (len(trials),), plan, rng).T
    for factor, scales in UNEVEN.items() if plan.uneven else ():
        noise *= trials[factor].map(dict(zip(LEVEL_NAMES[factor], scales, strict=True))).to_numpy()[:, None]
    return values + noise


def draw_divergence(trials: pd.DataFrame, rng: np.random.Generator) -> Array:
    """Return the epoch in which each trial diverges, or infinity; it depends on the levels, not on the accuracy."""
    rates = np.full(len(trials), 0.02)
    rates[_has(trials, ("optimizer", LEVEL_NAMES["optimizer"][2], "batch_norm", "off"))] += 0.3
    rates[_has(trials, ("lr_schedule", LEVEL_NAMES["lr_schedule"][1]))] += 0.05
    epochs = rng.choice(DIVERGED_AT, len(trials), p=DIVERGED_AT_SHARES)
    return np.where(rng.random(len(trials)) < rates, epochs, np.inf)


def stop(unstopped: pd.DataFrame, diverged_at: Array, rng: np.random.Generator) -> NDArray[np.int_]:
    """Send the trials through the rungs of `grid.plan.asha` in random order; return the epochs that each may run."""
    asha = Asha(RUNGS)
    allowed = np.full(len(unstopped), EPOCHS)
    columns = [unstopped[f"{RUNG_METRIC}{rung}"].tolist() for rung in RUNGS]
    models, controls = unstopped["model"].tolist(), unstopped["control"].tolist()
    for trial in rng.permutation(len(unstopped)):
        for rung, values in zip(RUNGS, columns, strict=True):
            if diverged_at[trial] <= rung:
                asha.diverge(str(trial), group=models[trial], epoch=int(diverged_at[trial]))
                break
            value, control = values[trial], controls[trial]
            if not asha.decide(str(trial), group=models[trial], epoch=rung, value=value, control=control):
                allowed[trial] = rung
                break
    return allowed


def observe(trials: pd.DataFrame, values: Array, diverged_at: Array, allowed: NDArray[np.int_]) -> pd.DataFrame:
    """Return the trials as the store holds them if each may run the allowed number of epochs."""
    seen = np.where((allowed[:, None] >= POINTS) & (diverged_at[:, None] > POINTS), values, np.nan)
    diverged = diverged_at <= allowed
    rungs = {f"{RUNG_METRIC}{rung}": seen[:, i] for i, rung in enumerate(RUNGS)}
    return trials.assign(
        status=np.select([diverged, allowed < EPOCHS], ["diverged", "stopped"], "completed"),
        stopped_at_epoch=np.where(~diverged & (allowed < EPOCHS), allowed, np.nan),
        epochs_run=np.minimum(allowed, diverged_at).astype(int),
        best_val_accuracy=np.fmax.reduce(seen, axis=1),
        **rungs,
    )


def true_false_stops(grid: Grid) -> dict[str, float]:
    """Return, for each model, the share of false stops among all trials that the replayed rule stops."""
    rule_stops = stop_epochs(grid.unstopped, rung_thresholds(grid.trials, RUNGS, FACTOR)).notna()
    completed = grid.trials["status"] == "completed"
    survived = completed & ~(grid.trials["control"] & rule_stops)
    rates = {}
    for model in LEVEL_NAMES["model"]:
        in_model = grid.trials["model"] == model
        rates[model] = float((grid.final[in_model & rule_stops] > grid.final[in_model & survived].median()).mean())
    return rates


def least_squares(trials: pd.DataFrame) -> pd.DataFrame:
    """Estimate main effects on the final accuracies as a textbook does: least squares, even noise, no interactions.

    Returns:
        `factor`, `level`, `effect`, `low`, `high` of each level that occurs; no rows if they are not identifiable.
    """
    present = {
        factor: [name for name in names if _has(trials, (factor, name)).any()] for factor, names in LEVEL_NAMES.items()
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
    test = OLS(trials["best_val_accuracy"].to_numpy(), design).fit().t_test(contrasts)
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
    effects = measure_effects(grid.trials, epoch=RUNGS[0], confidence=CONFIDENCE)
    tallies = [*tally_views(grid, plan, effects.levels), *tally_audit(grid, plan), tally_ranking(grid.trials)]
    for name, estimates, expected in (
        ("main effects", effects.levels, sum(COUNTS) - COUNTS.count(1)),
        ("interactions", effects.interactions, sum(a * b for a, b in combinations(COUNTS, 2) if a > 1 < b)),
    ):
        found = compare(estimates.dropna(subset="effect"), grid.truth, 0)
        tallies.append((f"{name}: covered", kind, float(found["covered"].sum()), len(found)))
        tallies.append((f"{name}: estimated", kind, len(found), expected))
    return tallies


def tally_views(grid: Grid, plan: Plan, levels: pd.DataFrame) -> Iterator[Tally]:
    """Tally how well each of `VIEWS` estimates the main effects."""
    completed = grid.trials[grid.trials["status"] == "completed"]
    estimates = {
        "ours": (levels, 0),
        "foretold": (levels, -1),
        "completed": (least_squares(completed), -1),
        "survivors": (least_squares(completed[~completed["control"]]), -1),
        "controls": (least_squares(completed[completed["control"]]), -1),
    }
    for view, (table, point) in estimates.items() if plan.correlation == CORRELATIONS[0] else ():
        found = compare(table.dropna(subset="effect"), grid.truth, point)
        yield "estimated", view, len(found), sum(COUNTS) - COUNTS.count(1)
        yield "|error|", view, float(found["error"].abs().sum()), len(found)
        products = (found["truth"] + found["error"]) * found["truth"]
        yield "slope", view, float(products.sum()), float((found["truth"] ** 2).sum())
        yield "covered", view, float(found["covered"].sum()), len(found)


def tally_audit(grid: Grid, plan: Plan) -> Iterator[Tally]:
    """Tally whether intervals of the false-stop rate cover the truth and whether the bound on lost winners holds."""
    truth = true_false_stops(grid)
    kind = f"{plan.correlation:g}"
    audit = audit_stopping(grid.trials, factor=FACTOR, confidence=CONFIDENCE)
    for row in audit.false_stops.to_dict("records"):
        yield "false stops: covered", kind, float(row["low"] <= truth[row["model"]] <= row["high"]), 1
        yield "false stops: truth", kind, truth[row["model"]], 1
        yield "false stops: measured", kind, float(row["false_stops"]), float(row["stopped"])
    for row in audit.regret.to_dict("records"):
        stopped = (grid.trials["status"] == "stopped") & (grid.trials["model"] == row["model"])
        lost = (grid.final[stopped] > row["winner"]).sum()
        yield "lost winners: bounded", kind, float(lost <= row["at_most"]), 1
    yield "agreement", kind, audit.agreement, 1


def tally_ranking(trials: pd.DataFrame) -> Tally:
    """Tally the cells whose trials all diverged and that are ranked above a completed cell."""
    ranked = rank_cells(trials)[[*FACTORS, "rank"]]
    ends = trials.groupby(list(FACTORS))["status"].agg(set).rename("ends").reset_index().merge(ranked, "left")
    lowest_completed = ends.loc[ends["ends"].map(lambda statuses: "completed" in statuses), "rank"].max()
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
    questions += [("replayed rule as ASHA", "agreement")]
    groups = [f"{correlation:g}" for correlation in CORRELATIONS if ("agreement", f"{correlation:g}") in answers]
    lines.append(f"{'':<26}" + "".join(f"{group:>15}" for group in groups))
    for label, question in questions:
        lines.append(f"{label:<26}" + "".join(f"{figure(question, group):>15}" for group in groups))
    lines += [
        "",
        f"4. Main effects by the trials used, correlation {CORRELATIONS[0]:g} (slope below 1: shrunken)",
    ]
    lines.append(f"{'':<24} {'|error|':>12} {'slope':>11} {'covered':>12} {'estimable':>12}")
    for view, label in VIEWS.items():
        error, slope = figure("|error|", view, ".2%"), figure("slope", view, ".2f")
        covered, known = figure("covered", view), figure("estimated", view)
        lines.append(f"{label:<24} {error:>12} {slope:>11} {covered:>12} {known:>12}")
    return "\n".join([*lines, "", "± is the standard error over grids"])


def run(grids: int, seed: int, jobs: int) -> pd.DataFrame:
    """Simulate and analyse grids in `jobs` processes; return the summary."""
    tallies = []
    with get_context("spawn").Pool(jobs) if jobs > 1 else nullcontext() as pool:
        for grid_tallies in (pool.imap if pool else map)(partial(examine, seed=seed), range(grids)):
            tallies.append(grid_tallies)
            if len(tallies) % 10 == 0 or len(tallies) == grids:
                print(f"\r{len(tallies)}/{grids} grids", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return summarise(tallies)


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Simulate and analyse grids; print the summary and return it."""
    parser = Parser(prog="python -m benchmarks.planted", description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=int, default=1000, metavar="N", help="grids to simulate (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the simulation (0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    summary = run(options.grids, options.seed, options.jobs)
    cells = int(np.prod(COUNTS))
    print(
        f"{options.grids:,} grids of {cells} cells, 1 or 2 seeds, {EPOCHS} epochs, rungs {RUNGS}, seed {options.seed}"
    )
    print(format_summary(summary))
    print(f"{time.monotonic() - begun:.0f} s")
    return summary


def _drift(spread: float, shape: tuple[int, ...], plan: Plan, rng: np.random.Generator) -> Array:
    """Draw normal values at every point, `[point, *shape]`; each point is correlated with the previous one."""
    kept = plan.correlation ** (1 / (len(POINTS) - 1))
    drawn = rng.normal(0, spread, (len(POINTS), *shape))
    for point in range(1, len(POINTS)):
        drawn[point] = kept * drawn[point - 1] + np.sqrt(1 - kept**2) * drawn[point]
    return drawn


def _has(trials: pd.DataFrame, label: Level) -> "pd.Series[bool]":
    has = trials[label[0]] == label[1]
    return has & _has(trials, label[2:]) if label[2:] else has


if __name__ == "__main__":
    main()
